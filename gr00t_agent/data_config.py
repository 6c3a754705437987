"""What a robot's data looks like: modality keys, normalisation, embodiment, and the statistics files.

Keys are GR00T's: `video.<camera>`, `state.<part>`, `action.<part>` and one annotation with the instruction. In
LIBERO's data `roll`, `pitch` and `yaw` are the three components of an axis-angle vector (rad), not Euler angles.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gr00t_agent.files import (
    dataclass_from_json,
    has_file,
    is_number,
    is_whole,
    naming,
    read_json,
    require,
    typed,
    write_json,
)

NormalisationMode = Literal["min_max", "mean_std", "q99", "binary"]
NORMALISATION_MODES: tuple[str, ...] = get_args(NormalisationMode)
STATISTIC_NAMES = ("max", "min", "mean", "std", "q01", "q99")

METADATA_PATH = Path("experiment_cfg") / "metadata.json"

# Index of each embodiment's weights. The two public code bases disagree.
EMBODIMENT_IDS: dict[str, dict[str, int]] = {
    "nvidia": {"gr1": 24, "oxe_droid": 17, "agibot_genie1": 26, "new_embodiment": 31},
    "rlinf": {
        "libero_franka": 31,
        "isaaclab_franka": 31,
        "maniskill_widowx": 30,
        "gr1": 24,
        "oxe_droid": 17,
        "agibot_genie1": 26,
        "robocasa_panda_omron": 13,
        "libero_panda": 2,
        "new_embodiment": 10,
    },
}


def embodiment_id(tag: str, table: str = "rlinf") -> int:
    """Return the index of an embodiment's weights.

    Args:
        tag: Embodiment tag, e.g. `libero_franka`.
        table: `nvidia` (GR00T-N1.5's own code) or `rlinf`.

    Raises:
        ValueError: Unknown table or tag.
    """
    if table not in EMBODIMENT_IDS:
        raise ValueError(f"embodiment table {table!r} is unknown (valid: {', '.join(EMBODIMENT_IDS)})")
    if tag not in EMBODIMENT_IDS[table]:
        raise ValueError(
            f"embodiment_tag={tag!r} is not in the {table} table (valid: {', '.join(EMBODIMENT_IDS[table])}); "
            "give PolicyConfig.embodiment_id for an embodiment of your own"
        )
    return EMBODIMENT_IDS[table][tag]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a policy reads and writes for one robot. Subclass or instantiate it for a robot of your own.

    Attributes:
        embodiment_tag: Key into the statistics file and the embodiment tables.
        video_keys: Cameras, in the order of the prompt's images.
        state_keys: State parts, concatenated in this order.
        action_keys: Action parts, concatenated in this order.
        language_key: Key of the instruction.
        state_modes: Normalisation per state key; keys not named use `min_max`.
        action_modes: Normalisation per action key; keys not named use `min_max`.
        gripper_key: Action part that is 1 open, 0 close in the data and -1 open, +1 close in the environment:
            sign(1 - 2 g), as in NVIDIA's and RLinf's LIBERO clients, in which g = 0.5 becomes 0 and moves neither way.
            None: actions go to the environment as they are.
        crop_scale: Fraction of each side that the centre crop keeps; 1 for no crop.
        action_horizon: Steps of one action chunk.
    """

    embodiment_tag: str
    video_keys: tuple[str, ...]
    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    language_key: str = "annotation.human.action.task_description"
    state_modes: Mapping[str, NormalisationMode] = field(default_factory=dict[str, NormalisationMode])
    action_modes: Mapping[str, NormalisationMode] = field(default_factory=dict[str, NormalisationMode])
    gripper_key: str | None = None
    crop_scale: float = 0.95
    action_horizon: int = 16

    def __post_init__(self) -> None:
        if not isinstance(cast(Any, self.embodiment_tag), str) or not self.embodiment_tag:
            raise ValueError(
                f"embodiment_tag={self.embodiment_tag!r} is no name; give the one that the statistics file has, such "
                "as 'libero_franka'"
            )
        for name, keys in (("video", self.video_keys), ("state", self.state_keys), ("action", self.action_keys)):
            if not keys:
                raise ValueError(f"{name}_keys is empty; a policy needs at least one {name} key")
            for key in keys:
                if not key.startswith(f"{name}."):
                    raise ValueError(f"{name}_keys has {key!r}; its keys start with '{name}.'")
                if keys.count(key) > 1:
                    raise ValueError(f"{name}_keys has {key!r} twice; name each part once")
        for modes, keys in ((self.state_modes, self.state_keys), (self.action_modes, self.action_keys)):
            for key, mode in modes.items():
                if key not in keys:
                    raise ValueError(f"a normalisation is given for {key!r}, which is not among {', '.join(keys)}")
                if mode not in NORMALISATION_MODES:
                    raise ValueError(f"normalisation {mode!r} is unknown (valid: {', '.join(NORMALISATION_MODES)})")
        if self.gripper_key is not None and self.gripper_key not in self.action_keys:
            raise ValueError(f"gripper_key={self.gripper_key!r} is not among {', '.join(self.action_keys)}")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale={self.crop_scale} is not in (0, 1]")
        if not is_whole(self.action_horizon):
            raise ValueError(f"action_horizon={self.action_horizon!r} is not an int; give a whole number")
        if self.action_horizon < 1:
            raise ValueError(f"action_horizon={self.action_horizon} is below 1")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> "DataConfig":
        """Rebuild from `to_json`.

        Raises:
            ValueError: Something is unknown, of another type, or not allowed.
        """
        return dataclass_from_json(DataConfig, data, "data_config")


@dataclass(frozen=True, kw_only=True)
class LiberoFrankaDataConfig(DataConfig):
    """LIBERO with two cameras: end-effector position (m), axis-angle (rad), gripper qpos (m)."""

    embodiment_tag: str = "libero_franka"
    video_keys: tuple[str, ...] = ("video.image", "video.wrist_image")
    state_keys: tuple[str, ...] = (
        "state.x",
        "state.y",
        "state.z",
        "state.roll",
        "state.pitch",
        "state.yaw",
        "state.gripper",
    )
    action_keys: tuple[str, ...] = (
        "action.x",
        "action.y",
        "action.z",
        "action.roll",
        "action.pitch",
        "action.yaw",
        "action.gripper",
    )
    gripper_key: str | None = "action.gripper"


DATA_CONFIGS: dict[str, type[DataConfig]] = {"libero_franka": LiberoFrankaDataConfig}


def load_data_config(name: str) -> DataConfig:
    """Return a data config by name, or from a file of one's own.

    Args:
        name: A key of `DATA_CONFIGS`, or `path/to/file.py:Name`, where Name is a `DataConfig` or a subclass that
            needs no arguments.

    Raises:
        ValueError: Unknown name, or the file does not define it.
        FileNotFoundError: The file does not exist.
    """
    if ":" not in name:
        if name not in DATA_CONFIGS:
            raise ValueError(
                f"data_config={name!r} is unknown (valid: {', '.join(DATA_CONFIGS)}, or path/to/file.py:Name)"
            )
        return DATA_CONFIGS[name]()  # pyright: ignore[reportCallIssue]
    file_name, _, attribute = name.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise FileNotFoundError(f"data_config={name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"data_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"data_config={name!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: object = getattr(module, attribute, None)
    if isinstance(found, type) and issubclass(found, DataConfig):
        found = found()  # pyright: ignore[reportCallIssue]
    if not isinstance(found, DataConfig):
        raise ValueError(f"data_config={name!r}: {path} defines no DataConfig called {attribute!r}")
    return found


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """Statistics and modalities of one embodiment's data (an entry of `metadata.json`).

    Attributes:
        statistics: `state` or `action` -> part -> `max min mean std q01 q99` -> one number per element.
        modalities: `video` -> camera -> resolution (width, height) ...; `state`, `action` -> part -> shape ...
        embodiment_tag: Tag.
    """

    statistics: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    modalities: Mapping[str, Mapping[str, Mapping[str, Any]]]
    embodiment_tag: str

    def part(self, key: str) -> Mapping[str, Sequence[float]]:
        """Return the statistics of `state.<part>` or `action.<part>`.

        Raises:
            KeyError: The part or one of its statistics is missing.
            ValueError: Its statistics are none, see `check_statistics`.
        """
        modality, _, part = key.partition(".")
        parts = self.statistics.get(modality, {})
        if part not in parts:
            raise KeyError(
                f"metadata of {self.embodiment_tag} has no statistics for {key!r} "
                f"(present: {', '.join(f'{modality}.{p}' for p in parts) or 'none'})"
            )
        check_statistics(parts[part], f"statistics of {key!r}")
        return parts[part]

    def resolution(self, key: str) -> tuple[int, int] | None:
        """Return (height, width) in pixels of camera `video.<name>`, None if the file does not say."""
        entry = self.modalities.get("video", {}).get(key.partition(".")[2])
        if entry is None:
            return None
        width, height = require(entry, "resolution", f"modalities of {key!r}")
        return int(height), int(width)


def check_statistics(statistics: Any, where: str) -> None:
    """Check the statistics of one part: equally many finite numbers each, in order.

    Raises:
        KeyError: One of them is missing.
        ValueError: No list of numbers, not finite, of another length than the others, a negative deviation, or a lower
            bound above the upper one.
    """
    if not isinstance(statistics, Mapping):
        raise ValueError(f"{where} are {statistics!r}; they must be lists of numbers by name")
    given = cast(Mapping[str, Any], statistics)
    if missing := [name for name in STATISTIC_NAMES if name not in given]:
        raise KeyError(f"{where} lack {', '.join(missing)} (needed: {', '.join(STATISTIC_NAMES)})")
    columns: dict[str, list[float]] = {}
    for name in STATISTIC_NAMES:
        column: Any = given[name]
        is_list = isinstance(column, Sequence) and not isinstance(column, str)
        values = list(cast(Sequence[Any], column)) if is_list else []
        if not values or not all(is_number(x) for x in values):
            raise ValueError(f"{where}: {name} is {column!r}; it must be a list of finite numbers, one an element")
        columns[name] = values
    widths = {name: len(values) for name, values in columns.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{where} have different lengths: {widths}; give one number for each element of the part")
    for low, high in (("min", "max"), ("q01", "q99")):
        for i, (a, b) in enumerate(zip(columns[low], columns[high], strict=True)):
            if a > b:
                raise ValueError(f"{where}: {low}[{i}]={a} is above {high}[{i}]={b}; compute the statistics again")
            if not is_number(b - a):
                raise ValueError(f"{where}: {high}[{i}] - {low}[{i}] is {b} - {a}, beyond single precision")
    if min(columns["std"]) < 0:
        raise ValueError(f"{where}: std is {columns['std']}, which is negative; compute the statistics again")


def _check_entry(entry: Any, tag: str) -> None:
    """Check one embodiment's entry of a `metadata.json`: statistics, and sizes that fit them."""
    groups = Mapping[str, Mapping[str, dict[str, Any]]]
    all_statistics = typed(require(entry, "statistics", tag), groups, f"{tag}.statistics")
    modalities = typed(require(entry, "modalities", tag), groups, f"{tag}.modalities")
    for modality, parts in all_statistics.items():
        for part, statistics in parts.items():
            where = f"{tag}.statistics.{modality}.{part}"
            check_statistics(statistics, where)
            width, shape = len(statistics["max"]), modalities.get(modality, {}).get(part, {}).get("shape")
            if shape is None:
                continue
            sizes = typed(shape, tuple[int, ...], f"{tag}.modalities.{modality}.{part}.shape")
            if min(sizes, default=1) < 1 or math.prod(sizes) != width:
                raise ValueError(f"{where} have {width} elements, but modalities say shape={shape}; they must fit")
    for camera, description in modalities.get("video", {}).items():
        where = f"{tag}.modalities.video.{camera}"
        size = typed(require(description, "resolution", where), tuple[int, int], f"{where}.resolution")
        if min(size) < 1:
            raise ValueError(f"{where}.resolution={list(size)} must be width and height in pixels")
        if typed(description.get("channels", 3), int, f"{where}.channels") != 3:
            raise ValueError(f"{where}.channels={description['channels']} is not supported (supported: 3)")


def read_metadata(path: Path, embodiment_tag: str) -> DatasetMetadata:
    """Read one embodiment's entry of a `metadata.json`.

    Raises:
        FileNotFoundError: No such file.
        KeyError: The entry lacks something.
        ValueError: The file has no entry for the tag, is damaged, or numbers in the entry are not what they must be
            (see `check_statistics`).
    """
    if not has_file(path):
        raise FileNotFoundError(
            f"{path} does not exist; a checkpoint keeps its statistics there. Give metadata= to use other statistics"
        )
    data = read_json(path)
    if embodiment_tag not in data:
        raise ValueError(
            f"{path} has no entry for embodiment_tag={embodiment_tag!r} (present: {', '.join(data) or 'none'}); take "
            "the data config of one that is present, give its statistics as metadata=, or fine-tune on its data first"
        )
    entry = data[embodiment_tag]
    with naming(path):
        _check_entry(typed(entry, dict, embodiment_tag), embodiment_tag)
    return DatasetMetadata(
        statistics=entry["statistics"], modalities=entry["modalities"], embodiment_tag=embodiment_tag
    )


def write_metadata(path: Path, metadata: DatasetMetadata) -> None:
    """Write a `metadata.json`; entries of other embodiments in an existing file are kept."""
    data = read_json(path) if has_file(path) else {}
    data[metadata.embodiment_tag] = asdict(metadata)
    write_json(path, data)


@dataclass(frozen=True, kw_only=True)
class ModalitySlice:
    """Where one part lies in a dataset's flat column.

    Attributes:
        original_key: Column of the dataset, None for the default one of the modality.
        start: First element.
        end: One past the last element.
    """

    original_key: str | None
    start: int
    end: int


def read_modality(path: Path) -> dict[str, ModalitySlice | str]:
    """Read a LeRobot-style `modality.json`.

    Returns:
        Full key -> slice for `state.*` and `action.*`, or -> original column for `video.*` and `annotation.*`.

    What is no modality or no entry of one (a comment, say) is passed over.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No JSON object, or a start, end or column that is missing or none.
    """
    data: Any = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; it must hold an object with video, state and action")
    parsed: dict[str, ModalitySlice | str] = {}
    for modality, parts in cast("dict[str, Any]", data).items():
        for part, entry in cast("dict[str, Any]", parts).items() if isinstance(parts, dict) else ():
            if modality not in ("state", "action", "video", "annotation") or not isinstance(entry, dict):
                continue
            key = f"{modality}.{part}"
            fields = cast("dict[str, Any]", entry)
            column = fields.get("original_key")
            if column is not None and not isinstance(column, str):
                raise ValueError(f"{path}: {key} has original_key {column!r}; it must name a column")
            if modality not in ("state", "action"):
                parsed[key] = column or part
                continue
            absent = {"start", "end"} - set(fields)
            if absent:
                raise ValueError(
                    f"{path}: {key} lacks {', '.join(sorted(absent))}; it must have start and end, the first element "
                    "and one past the last"
                )
            for name in ("start", "end"):
                number = fields[name]
                if isinstance(number, bool) or not isinstance(number, int | float) or number % 1:
                    raise ValueError(f"{path}: {key} has {name} {number!r}; it must be a whole number")
            parsed[key] = ModalitySlice(original_key=column, start=int(fields["start"]), end=int(fields["end"]))
    return parsed
