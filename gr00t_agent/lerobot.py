"""Reads LeRobot datasets (v2.0, v2.1 and v3.0) as observations with GR00T's modality keys and action chunks.

What GR00T adds to LeRobot's layout is `meta/modality.json`, which names the slices of the state and action columns
and the cameras. Frames come from mp4 files or from image columns; numbers are held in memory (60 bytes a frame),
frames are not: they are decoded on demand from a bounded number of open files, or once into a cache on disk
(`cache_frames`), from which random batches are read at memory speed, or from which they move to a GPU.

A frame that is followed by less than a chunk of its episode has its chunk filled up with the episode's last action;
`step_mask` is False there.

Shape legend: F frames of the chosen episodes, B batch, V cameras, H x W pixels, h action horizon, a action width.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import itertools
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from gr00t_agent.data_config import DataConfig, DatasetMetadata, LiberoFrankaDataConfig, ModalitySlice, read_modality
from gr00t_agent.files import resolve_folder

INFO_FILE = Path("meta") / "info.json"
MODALITY_FILE = Path("meta") / "modality.json"
DEFAULT_COLUMNS = {"state": "observation.state", "action": "action"}
QUANTILES = {"q01": 0.01, "q99": 0.99}
MAX_OPEN_FILES = 16
# How a file starts that was checked out without its content.
LFS_POINTER = b"version https://git-lfs"
# By how much a gripper's action may leave [0, 1].
GRIPPER_TOLERANCE = 1e-3

K = TypeVar("K")
T = TypeVar("T")
Frames = NDArray[np.uint8]


class Batch(NamedTuple):
    """Samples that a policy learns from.

    Attributes:
        obs: `video.*` uint8 [B, H, W, 3], `state.*` float32 [B, width], and the instructions, a list of B str.
        actions: float32 [B, h, a], as in the data: for LIBERO the gripper is 1 open, 0 close.
        step_mask: bool [B, h], True at steps before the episode's end.
    """

    obs: dict[str, Any]
    actions: Tensor
    step_mask: Tensor


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """Where one episode lies.

    Attributes:
        episode_id: the dataset's `episode_index`.
        length: frames.
        instruction: the task's text.
        data_file: parquet file, absolute.
        videos: camera column -> (mp4 file, time in seconds of the episode's first frame in it).
        info: what else the dataset records of the episode.
    """

    episode_id: int
    length: int
    instruction: str
    data_file: Path
    videos: Mapping[str, tuple[Path, float]]
    info: Mapping[str, Any]


def resolve_dataset(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a dataset, downloaded if it is a hub name.

    Raises:
        FileNotFoundError: neither a folder nor of the form `owner/name`, or the hub does not give it.
    """
    hint = "make one with `python algorithms/collect_demos.py`"
    return resolve_folder("dataset", path_or_hub_id, hint, repo_type="dataset")


def read_info(folder: Path) -> dict[str, Any]:
    """Return `meta/info.json`.

    Raises:
        FileNotFoundError: the folder is no LeRobot dataset.
        KeyError: what every dataset states is missing.
        ValueError: another version of the layout, no episodes, or no JSON.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INFO_FILE}; give the top folder of a LeRobot dataset")
    try:
        info: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    version = str(info.get("codebase_version"))
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise ValueError(f"{path}: codebase_version={version!r} is not supported (valid: v2.0, v2.1, v3.0)")
    absent = [key for key in ("fps", "features", "data_path") if key not in info]
    if absent:
        raise KeyError(f"{path} has no {', '.join(absent)} (present: {', '.join(info)})")
    if not info.get("total_episodes"):
        raise ValueError(f"{folder} is empty: its info.json counts no episodes")
    return info


def read_episodes(folder: Path, info: Mapping[str, Any]) -> list[EpisodeEntry]:
    """Return a dataset's episodes in order.

    Raises:
        FileNotFoundError: a file of `meta/` is missing.
        ValueError: a file of `meta/` is damaged.
    """
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    is_v3 = str(info["codebase_version"]).startswith("v3")
    entries: list[EpisodeEntry] = []
    for row in _rows_v3(folder) if is_v3 else _rows_v2(folder):
        episode_id = int(row["episode_index"])
        videos: dict[str, tuple[Path, float]] = {}
        if is_v3:
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        else:
            place = {"episode_chunk": episode_id // info["chunks_size"], "episode_index": episode_id}
        for camera in cameras:
            start = 0.0
            video_place = dict(place)
            if is_v3:
                start = float(row[f"videos/{camera}/from_timestamp"])
                video_place = {name: row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index")}
            videos[camera] = (folder / info["video_path"].format(video_key=camera, **video_place), start)
        tasks = cast("Sequence[str]", row["tasks"])
        entries.append(
            EpisodeEntry(
                episode_id=episode_id,
                length=int(row["length"]),
                instruction=str(tasks[0]) if len(tasks) else "",
                data_file=folder / info["data_path"].format(**place),
                videos=videos,
                info={k: v for k, v in row.items() if "/" not in k and k not in ("episode_index", "length", "tasks")},
            )
        )
    return sorted(entries, key=lambda entry: entry.episode_id)


def read_tasks(folder: Path, info: Mapping[str, Any]) -> dict[int, str]:
    """Return task index -> instruction.

    Raises:
        FileNotFoundError: the file of tasks is missing.
        ValueError: the file of tasks is damaged.
    """
    if not str(info["codebase_version"]).startswith("v3"):
        return {int(row["task_index"]): str(row["task"]) for row in _json_lines(folder / "meta" / "tasks.jsonl")}
    table = _read_table(folder / "meta" / "tasks.parquet")
    (text,) = [name for name in table.column_names if name != "task_index"]
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))


def _rows_v2(folder: Path) -> Iterator[dict[str, Any]]:
    yield from _json_lines(folder / "meta" / "episodes.jsonl")


def _rows_v3(folder: Path) -> Iterator[dict[str, Any]]:
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}/meta/episodes holds no parquet file; the dataset is incomplete")
    for file in files:
        table = _read_table(file)
        yield from table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _existing(path).read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise _damaged(path, error) from error


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    _existing(path)
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    """Return what to raise for a file that cannot be decoded."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return ValueError(f"{path} is a Git LFS pointer instead of the file; run `git lfs pull` in the dataset")
    reason = str(error).partition("\n")[0]
    return ValueError(f"{path} is damaged ({reason}); download or write it again")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the dataset is incomplete (download or write it again)")
    return path


class _RecentlyUsed(Generic[K, T]):
    """At most `size` things by key, the least recently used dropped first. One per thread, hence no locks."""

    def __init__(self, size: int, open_: Callable[[K], T], close: Callable[[T], None] = lambda _: None) -> None:
        self._size, self._open, self._close = size, open_, close
        self._things: OrderedDict[K, T] = OrderedDict()

    def __call__(self, key: K) -> T:
        if key in self._things:
            self._things.move_to_end(key)
            return self._things[key]
        while len(self._things) >= self._size:
            self._close(self._things.popitem(last=False)[1])
        thing = self._open(key)
        self._things[key] = thing
        return thing


class VideoFile:
    """Frames of one mp4 file by number, from 0.

    Args:
        path: the file.
        fps: its constant frame rate.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = _existing(path), fps
        try:
            self._container = av.open(str(path))
        except av.error.FFmpegError as error:
            raise _damaged(path, error) from error
        if not self._container.streams.video:
            raise ValueError(f"{path} holds no video stream")
        self._stream = self._container.streams.video[0]
        # The files are small and many are read at a time.
        self._stream.thread_type = "NONE"
        # Without it, a damaged frame may be patched up from its neighbours.
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._decoder: Iterator[av.VideoFrame] | None = None
        self._next = 0

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def read(self, numbers: Sequence[int]) -> list[Frames]:
        """Return the frames of these numbers, uint8 [H, W, 3] each.

        Raises:
            ValueError: the file is damaged, or ends before one of them.
        """
        wanted = sorted(set(numbers))
        found: dict[int, Frames] = {}
        try:
            for number in wanted:
                # Decoding on is cheaper than seeking when the next frame is near.
                if self._decoder is None or not 0 <= number - self._next < 8:
                    self._seek(number)
                assert self._decoder is not None
                for frame in self._decoder:
                    self._next = self._number(frame) + 1
                    if self._next > number:
                        break
                else:
                    self._decoder = None
                    raise ValueError(f"{self.path} ends before frame {number} ({number / self.fps:.3f} s)")
                if self._next != number + 1:
                    raise ValueError(f"{self.path} has no frame {number} ({number / self.fps:.3f} s)")
                found[number] = cast(Frames, frame.to_ndarray(format="rgb24"))
        except av.error.FFmpegError as error:
            self._decoder = None
            raise _damaged(self.path, error) from error
        return [found[number] for number in numbers]

    def _number(self, frame: av.VideoFrame) -> int:
        assert frame.pts is not None
        assert frame.time_base is not None
        return round(float(frame.pts * frame.time_base) * self.fps)

    def _seek(self, number: int) -> None:
        assert self._stream.time_base is not None
        self._container.seek(int(number / self.fps / self._stream.time_base), stream=self._stream)
        self._decoder = self._container.decode(self._stream)
        self._next = 0


class LeRobotDataset(Dataset[dict[str, Any]]):
    """A LeRobot dataset with random access to samples.

    One sample is a dict of the modality keys of one observation (no batch dimension), `actions` [h, a] and
    `step_mask` [h]; `torch.utils.data.DataLoader` collates samples without further help. `batch` does the same for
    many frames at once and is what the trainer uses.

    Args:
        path_or_hub_id: folder, or `owner/name` on the hub.
        data_config: which keys are read; None takes LIBERO's Franka.
        modality_file: a `modality.json` to use instead of the dataset's own, for datasets that have none.
        episode_ids: episodes to use; None takes all.
        episodes_per_task: use only the first so many of each task's episodes; None takes all.
        image_size: height and width to which frames are resized (antialiased); None keeps the dataset's size.

    Attributes:
        folder: where the dataset is.
        info: `meta/info.json`.
        episodes: the chosen episodes.
        data_config: as given.
        image_size: (height, width) of the frames that are returned, pixels.

    Raises:
        FileNotFoundError: no dataset, no `modality.json`, or a file is missing.
        KeyError: a key of the data config is not in `modality.json`, or a column is not in the dataset.
        ValueError: no episodes, cameras of several sizes, damaged files, a gripper of another convention than the
            data config's, or columns, lengths or slices that contradict each other.
    """

    def __init__(
        self,
        path_or_hub_id: str | Path,
        *,
        data_config: DataConfig | None = None,
        modality_file: Path | None = None,
        episode_ids: Sequence[int] | None = None,
        episodes_per_task: int | None = None,
        image_size: int | None = None,
    ) -> None:
        self.folder = resolve_dataset(path_or_hub_id)
        self.data_config = LiberoFrankaDataConfig() if data_config is None else data_config
        self.info = read_info(self.folder)
        self.fps = float(self.info["fps"])
        episodes = _choose(read_episodes(self.folder, self.info), episode_ids, self.folder)
        self.episodes = episodes if episodes_per_task is None else first_of_each_task(episodes, episodes_per_task)
        self._modality = self._read_modality(modality_file)
        self.cameras = [self._camera_column(key) for key in self.data_config.video_keys]
        self._stored_size = self._check_resolutions(image_size)
        self.image_size = self._stored_size if image_size is None else (image_size, image_size)
        self._read_numbers()
        self._cache: Tensor | None = None
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open files of their own.
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    # -- reading what describes the data ---------------------------------------------------------------------------

    def _read_modality(self, given: Path | None) -> dict[str, ModalitySlice | str]:
        path = self.folder / MODALITY_FILE if given is None else given
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; it says where {', '.join(self.data_config.state_keys[:2])} ... are. For "
                "LIBERO data use libero_gym/data/modality.json (modality_file=..., or copy it into meta/)"
            )
        try:
            modality = read_modality(path)
        except ValueError as error:
            raise _damaged(path, error) from error
        config = self.data_config
        wanted = [*config.video_keys, *config.state_keys, *config.action_keys, config.language_key]
        absent = [key for key in wanted if key not in modality]
        if absent:
            raise KeyError(f"{path} has no {', '.join(absent)} (present: {', '.join(modality)})")
        return modality

    def _column(self, name: str, key: str) -> dict[str, Any]:
        features = self.info["features"]
        if name not in features:
            raise KeyError(
                f"{key} is column {name!r}, which {self.folder} does not have (present: {', '.join(features)})"
            )
        return features[name]

    def _camera_column(self, key: str) -> str:
        name = cast(str, self._modality[key])
        if self._column(name, key)["dtype"] not in ("video", "image"):
            raise ValueError(f"{key} is column {name!r}, which holds no images")
        return name

    def _check_resolutions(self, image_size: int | None) -> tuple[int, int]:
        sizes: dict[str, tuple[int, int]] = {}
        for key, column in zip(self.data_config.video_keys, self.cameras, strict=True):
            shape = self.info["features"][column]["shape"]
            # Some datasets state channels first.
            height, width = (shape[1], shape[2]) if shape[0] == 3 else (shape[0], shape[1])
            sizes[key] = (int(height), int(width))
        if len(set(sizes.values())) > 1 and image_size is None:
            listing = ", ".join(f"{key} {height}x{width}" for key, (height, width) in sizes.items())
            raise ValueError(f"{self.folder} mixes resolutions ({listing}); give image_size to resize all to one")
        return next(iter(sizes.values()))

    def _slices(self, keys: Sequence[str]) -> dict[str, tuple[str, slice]]:
        """Return key -> (column, slice), checked against the columns' widths."""
        result: dict[str, tuple[str, slice]] = {}
        for key in keys:
            entry = cast(ModalitySlice, self._modality[key])
            name = entry.original_key or DEFAULT_COLUMNS[key.partition(".")[0]]
            width = int(np.prod(self._column(name, key)["shape"]))
            if not 0 <= entry.start < entry.end <= width:
                raise ValueError(
                    f"{key} is [{entry.start}, {entry.end}) of column {name!r}, which has {width} elements"
                )
            result[key] = (name, slice(entry.start, entry.end))
        return result

    def _language_column(self) -> str:
        key = self.data_config.language_key
        name = cast(str, self._modality[key])
        # GR00T's files leave original_key out where the column is named like the key.
        if name not in self.info["features"] and key in self.info["features"]:
            name = key
        self._column(name, key)
        return name

    def _read_numbers(self) -> None:
        """Read everything but frames."""
        config = self.data_config
        state, action = self._slices(config.state_keys), self._slices(config.action_keys)
        language = self._language_column()
        columns = sorted({name for name, _ in (*state.values(), *action.values())} | {language})
        tasks = read_tasks(self.folder, self.info)
        self.instructions: list[str] = sorted(set(tasks.values()))
        text_id = {text: i for i, text in enumerate(self.instructions)}
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
        rows: list[NDArray[np.int64]] = []
        read_file = functools.lru_cache(maxsize=1)(lambda file: self._read_file(file, columns))
        for entry in self.episodes:
            table, row_of_episode = read_file(entry.data_file)
            inds = row_of_episode.get(entry.episode_id, np.zeros(0, np.int64))
            if len(inds) != entry.length:
                raise ValueError(
                    f"{entry.data_file} has {len(inds)} rows of episode {entry.episode_id}, whose length is "
                    f"{entry.length}; the dataset is damaged"
                )
            rows.append(inds)
            for name in columns:
                parts[name].append(table[name][inds])
        joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.state = {key: joined[name][:, where] for key, (name, where) in state.items()}  # [F, width]
        self.action = np.concatenate([joined[name][:, where] for name, where in action.values()], axis=1)  # [F, a]
        for key, values in {**self.state, "action": self.action}.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{key} of {self.folder} is not finite in frame {np.argwhere(~np.isfinite(values))[0, 0]}"
                )
        self._check_gripper({key: joined[name][:, where] for key, (name, where) in action.items()})
        values = joined[language][:, 0]
        if values.dtype.kind in "iu":
            unknown = set(np.unique(values).tolist()) - tasks.keys()
            if unknown:
                raise ValueError(f"column {language!r} names tasks {sorted(unknown)}, which meta/ does not list")
            lookup = {index: text_id[text] for index, text in tasks.items()}
            self.instruction_id = np.array([lookup[int(v)] for v in values], dtype=np.int32)  # [F]
        else:
            self.instructions = sorted({str(v) for v in values})
            text_id = {text: i for i, text in enumerate(self.instructions)}
            self.instruction_id = np.array([text_id[str(v)] for v in values], dtype=np.int32)
        lengths = np.array([entry.length for entry in self.episodes])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # [episodes + 1]
        self.episode_of_frame = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # [F]
        self._row = np.concatenate(rows)  # [F], in the frame's parquet file

    def _check_gripper(self, actions: Mapping[str, NDArray[Any]]) -> None:
        """Check that the gripper is 1 open, 0 close: a policy learns any other convention without complaint."""
        key = self.data_config.gripper_key
        if key is None:
            return
        low, high = float(actions[key].min()), float(actions[key].max())
        if low < -GRIPPER_TOLERANCE or high > 1 + GRIPPER_TOLERANCE:
            raise ValueError(
                f"{key} of {self.folder} is in [{low:.3g}, {high:.3g}]; it must be 1 open, 0 close. Convert the column "
                "(LIBERO's own -1 open, +1 close: (1 - x) / 2), or give a DataConfig with gripper_key=None, whose "
                "actions go to the environment as they are"
            )

    @staticmethod
    def _read_file(file: Path, columns: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[int, NDArray[np.int64]]]:
        """Return columns [rows, width], and each episode's rows in the order of its frames."""
        table = _read_table(file, [*columns, "episode_index", "frame_index"])
        arrays = {name: _matrix(table[name]) for name in columns}
        episode, frame = (table[name].to_numpy() for name in ("episode_index", "frame_index"))
        rows = {int(i): np.flatnonzero(episode == i) for i in np.unique(episode)}
        return arrays, {i: inds[np.argsort(frame[inds])] for i, inds in rows.items()}

    # -- samples ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.action)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample of frame `index`.

        Raises:
            IndexError: not in 0 to the number of frames - 1.
            ValueError: the frame cannot be decoded.
        """
        obs, actions, step_mask = self.batch(np.array([index]))
        sample = {key: value[0] for key, value in obs.items()}
        return {**sample, "actions": actions[0], "step_mask": step_mask[0]}

    def batch(self, frames: NDArray[np.integer[Any]]) -> Batch:
        """Return the samples of `frames` [B]; images are on the device of the frame cache, the rest on the CPU.

        Raises:
            IndexError: not in 0 to the number of frames - 1.
            ValueError: a frame cannot be decoded.
        """
        frames = np.asarray(frames)
        if len(frames) and not (frames.min() >= 0 and frames.max() < len(self)):
            raise IndexError(f"frames {frames.min()}-{frames.max()} are not all in 0-{len(self) - 1}")
        images = self.images(frames)  # [B, V, H, W, 3]
        obs: dict[str, Any] = {key: images[:, i] for i, key in enumerate(self.data_config.video_keys)}
        obs |= {key: torch.from_numpy(values[frames]) for key, values in self.state.items()}
        obs[self.data_config.language_key] = [self.instructions[i] for i in self.instruction_id[frames]]
        ends = self.starts[1:][self.episode_of_frame[frames]]  # [B]
        steps = frames[:, None] + np.arange(self.data_config.action_horizon)  # [B, h]
        step_mask = steps < ends[:, None]
        actions = self.action[np.minimum(steps, ends[:, None] - 1)]
        return Batch(obs, torch.from_numpy(actions), torch.from_numpy(step_mask))

    def images(self, frames: NDArray[np.integer[Any]]) -> Tensor:
        """Return the images of `frames`, uint8 [B, V, H, W, 3]."""
        if self._cache is None:
            return self._decode(frames)
        if self._cache.device.type == "cpu":
            # NumPy copies whole frames; torch's index_select on the CPU takes bytes one by one, 100 times slower.
            return torch.from_numpy(self._cache.numpy()[frames])
        return self._cache.index_select(0, torch.from_numpy(frames.astype(np.int64)).to(self._cache.device))

    def _decode(self, frames: NDArray[np.integer[Any]]) -> Tensor:
        views = [self._resize(self._decode_camera(column, frames)) for column in self.cameras]
        return torch.stack(views, dim=1)

    def _resize(self, images: Frames) -> Tensor:
        result = torch.from_numpy(images)
        if tuple(images.shape[1:3]) == self.image_size:
            return result
        planes = result.permute(0, 3, 1, 2).float()
        resized = F.interpolate(planes, size=self.image_size, mode="bilinear", align_corners=False, antialias=True)
        return resized.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _decode_camera(self, column: str, frames: NDArray[np.integer[Any]]) -> Frames:
        feature = self.info["features"][column]
        images: list[Frames | None] = [None] * len(frames)
        # In order of time, so that neighbours in a file are decoded in one go.
        for episode, places in itertools.groupby(np.argsort(frames), key=lambda p: self.episode_of_frame[frames[p]]):
            entry, group = self.episodes[episode], list(places)
            read = self._read_video if feature["dtype"] == "video" else self._read_images
            for place, image in zip(group, read(column, entry, frames[group]), strict=True):
                images[place] = image
        shapes = {image.shape for image in images if image is not None}
        if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
            raise ValueError(f"{column} of {self.folder} mixes resolutions: {sorted(shapes)}")
        stated = tuple(sorted(int(n) for n in feature["shape"]))
        for shape in shapes:
            if tuple(sorted(shape)) != stated:
                raise ValueError(
                    f"{column} of {self.folder} has frames of {shape}, its info.json says {feature['shape']}"
                )
        return np.stack(cast("list[Frames]", images))

    def _read_video(self, column: str, entry: EpisodeEntry, frames: NDArray[np.integer[Any]]) -> list[Frames]:
        if not hasattr(self._local, "videos"):
            self._local.videos = _RecentlyUsed[Path, VideoFile](
                MAX_OPEN_FILES, lambda path: VideoFile(path, self.fps), VideoFile.close
            )
        path, start_s = entry.videos[column]
        offset = round(start_s * self.fps) - int(self.starts[self.episode_of_frame[frames[0]]])
        return self._local.videos(path).read([int(frame) + offset for frame in frames])

    def _read_images(self, column: str, entry: EpisodeEntry, frames: NDArray[np.integer[Any]]) -> list[Frames]:
        if not hasattr(self._local, "images"):
            self._local.images = _RecentlyUsed[tuple[Path, str, int], list[Any]](2 * len(self.cameras), _read_row_group)
            self._local.rows = _RecentlyUsed[Path, list[int]](1024, _row_group_starts)
        starts = self._local.rows(entry.data_file)
        images: list[Frames] = []
        for row in self._row[frames]:
            group = bisect.bisect_right(starts, row) - 1
            cell = self._local.images((entry.data_file, column, group))[row - starts[group]]
            source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else self.folder / str(cell["path"])
            try:
                with Image.open(source) as image:
                    images.append(np.asarray(image.convert("RGB")))
            except OSError as error:
                raise ValueError(f"{entry.data_file}: image {row} of {column!r} cannot be decoded: {error}") from error
        return images

    # -- frame cache -----------------------------------------------------------------------------------------------

    @property
    def frame_bytes(self) -> int:
        """Bytes that all decoded frames take."""
        height, width = self.image_size
        return len(self) * len(self.cameras) * height * width * 3

    def cache_frames(
        self,
        folder: Path,
        *,
        num_threads: int = 4,
        device: torch.device | str = "cpu",
        on_episode: Callable[[int, int], None] = lambda done, total: None,
    ) -> Path:
        """Decode all frames once into one file, and read from it from now on.

        The file's name holds a fingerprint of the dataset, so a changed dataset is decoded anew. The file is mapped
        into memory, not loaded: the system keeps in RAM what fits.

        Args:
            folder: where the file is, or will be, written.
            num_threads: decoding threads.
            device: a GPU to hold the frames in its memory (`frame_bytes`); `cpu` reads the file.
            on_episode: called with the number of episodes decoded and of all.

        Returns:
            The file.

        Raises:
            ValueError: a frame cannot be decoded.
            OSError: the disk is full.
        """
        path = Path(folder) / f"frames_{self._fingerprint()}.npy"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                self._decode_into(temporary, num_threads, on_episode)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        # Copy-on-write: torch wants arrays that could be written to.
        frames = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        self._cache = frames if torch.device(device).type == "cpu" else _copy_in_parts(frames, torch.device(device))
        return path

    def _decode_into(self, path: Path, num_threads: int, on_episode: Callable[[int, int], None]) -> None:
        shape = (len(self), len(self.cameras), *self.image_size, 3)
        frames = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)

        def decode(episode: int) -> None:
            start, end = self.starts[episode : episode + 2]
            frames[start:end] = self._decode(np.arange(start, end)).numpy()

        with ThreadPoolExecutor(num_threads) as pool:
            for done, _ in enumerate(pool.map(decode, range(len(self.episodes))), 1):
                on_episode(done, len(self.episodes))
        frames.flush()

    def _fingerprint(self) -> str:
        files = sorted({file for entry in self.episodes for file in self._frame_files(entry)})
        stats = [(str(f.relative_to(self.folder)), _existing(f).stat().st_size, f.stat().st_mtime_ns) for f in files]
        what = [self.info, [entry.episode_id for entry in self.episodes], self.cameras, self.image_size, stats]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _frame_files(self, entry: EpisodeEntry) -> list[Path]:
        return [entry.videos[column][0] if column in entry.videos else entry.data_file for column in self.cameras]

    # -- statistics ------------------------------------------------------------------------------------------------

    def metadata(self) -> DatasetMetadata:
        """Return statistics and modalities as `experiment_cfg/metadata.json` holds them.

        Statistics are over all frames of the chosen episodes; `std` is the population's; quantiles interpolate
        linearly. The cameras' resolution is that of the frames returned here.
        """
        config = self.data_config
        statistics: dict[str, dict[str, dict[str, list[float]]]] = {"state": {}, "action": {}}
        modalities: dict[str, dict[str, dict[str, Any]]] = {"video": {}, "state": {}, "action": {}}
        height, width = self.image_size
        for key in config.video_keys:
            modalities["video"][key.partition(".")[2]] = {"resolution": [width, height], "channels": 3, "fps": self.fps}
        columns = dict(self.state)
        start = 0
        for key, (_, where) in self._slices(config.action_keys).items():
            columns[key] = self.action[:, start : start + where.stop - where.start]
            start += where.stop - where.start
        for key, values in columns.items():
            modality, _, part = key.partition(".")
            statistics[modality][part] = column_statistics(values)
            modalities[modality][part] = {
                "absolute": True, "rotation_type": None, "shape": [values.shape[1]], "continuous": True,
            }  # fmt: skip
        return DatasetMetadata(statistics=statistics, modalities=modalities, embodiment_tag=config.embodiment_tag)


def column_statistics(values: NDArray[Any]) -> dict[str, list[float]]:
    """Return max, min, mean, std, q01 and q99 of each element of [F, width], computed in float64."""
    exact = values.astype(np.float64)
    result = {name: getattr(exact, name)(axis=0).tolist() for name in ("max", "min", "mean", "std")}
    for name, fraction in QUANTILES.items():
        result[name] = np.quantile(exact, fraction, axis=0).tolist()
    return result


def check_metadata(own: DatasetMetadata, of_data: DatasetMetadata, config: DataConfig) -> None:
    """Check that a policy's metadata go with a dataset's.

    Raises:
        KeyError: the policy has no statistics for a key.
        ValueError: a part has another width, or a camera another resolution.
    """
    for key in (*config.state_keys, *config.action_keys):
        widths = len(own.part(key)["max"]), len(of_data.part(key)["max"])
        if widths[0] != widths[1]:
            raise ValueError(f"{key} has {widths[0]} elements in the policy's statistics, {widths[1]} in the dataset")
    for key in config.video_keys:
        sizes = own.resolution(key), of_data.resolution(key)
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{key} is {sizes[0]} pixels in the policy's metadata, {sizes[1]} in the dataset; read the dataset "
                "with another image_size, or use the dataset's own statistics"
            )


def _choose(episodes: list[EpisodeEntry], episode_ids: Sequence[int] | None, folder: Path) -> list[EpisodeEntry]:
    if not episodes:
        raise ValueError(f"{folder} is empty: its meta/ lists no episodes")
    if episode_ids is None:
        return episodes
    by_id = {entry.episode_id: entry for entry in episodes}
    absent = sorted(set(episode_ids) - by_id.keys())
    if absent or not episode_ids:
        raise ValueError(
            f"episode_ids={absent or list(episode_ids)} are not in {folder} (valid: {min(by_id)}-{max(by_id)})"
        )
    return [by_id[i] for i in episode_ids]


def first_of_each_task(episodes: Sequence[EpisodeEntry], count: int) -> list[EpisodeEntry]:
    """Return the first `count` episodes of each task, in their order.

    Raises:
        ValueError: a task has fewer.
    """
    by_task: dict[str, list[EpisodeEntry]] = {}
    for entry in episodes:
        by_task.setdefault(entry.instruction, []).append(entry)
    fewest = min(by_task, key=lambda task: len(by_task[task]))
    if not 1 <= count <= len(by_task[fewest]):
        raise ValueError(
            f"episodes_per_task={count} is not possible: {fewest!r} has {len(by_task[fewest])} episodes "
            f"(valid: 1-{len(by_task[fewest])})"
        )
    chosen = {entry.episode_id for entries in by_task.values() for entry in entries[:count]}
    return [entry for entry in episodes if entry.episode_id in chosen]


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return a column of numbers, lists of numbers or texts as an array [rows, width]."""
    array = column.combine_chunks()
    if not (
        pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type)
    ):
        return array.to_numpy(zero_copy_only=False).reshape(len(array), 1)
    values = array.flatten().to_numpy(zero_copy_only=False)
    if len(array) == 0 or len(values) % len(array):
        raise ValueError(f"a list column of {len(array)} rows has {len(values)} values: rows differ in width")
    return values.reshape(len(array), -1).astype(np.float32, copy=False)


def _row_group_starts(file: Path) -> list[int]:
    metadata = pq.read_metadata(file)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [0, *itertools.accumulate(counts)][:-1]


def _read_row_group(key: tuple[Path, str, int]) -> list[Any]:
    file, column, group = key
    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column].to_pylist()


def _copy_in_parts(frames: Tensor, device: torch.device, rows: int = 4096) -> Tensor:
    """Return a copy on `device`, made without a second whole copy in host memory."""
    result = torch.empty(frames.shape, dtype=frames.dtype, device=device)
    for start in range(0, len(frames), rows):
        result[start : start + rows].copy_(frames[start : start + rows])
    return result
