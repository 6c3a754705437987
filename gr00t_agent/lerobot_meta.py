"""What the files in a LeRobot dataset's `meta/` say: columns, cameras, episodes and tasks.

Versions 2.0 and 2.1 keep one data file and one video an episode, 3.0 joins episodes into larger files.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from gr00t_agent.lerobot_values import (
    damaged_file,
    existing_file,
    holds_text,
    path_inside,
    read_indices,
    read_table,
    read_texts,
    to_number,
    to_text,
    to_whole,
)

INFO_FILE = Path("meta") / "info.json"


class VideoSpan(NamedTuple):
    """Where an episode's frames are: the mp4 file, and the part of it from `start_s` to before `end_s`."""

    path: Path
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """Where one episode lies.

    Attributes:
        episode_id: the dataset's `episode_index`.
        length: frames.
        data_file: parquet file, absolute.
        videos: camera column -> its span of an mp4 file.
        info: what else the dataset records of the episode.
        instruction: the text of the episode's first row; empty until the rows are read.
    """

    episode_id: int
    length: int
    data_file: Path
    videos: Mapping[str, VideoSpan]
    info: Mapping[str, Any]
    instruction: str = ""


def read_info(folder: Path) -> dict[str, Any]:
    """Return `meta/info.json`.

    Raises:
        FileNotFoundError: the folder is no LeRobot dataset.
        ValueError: another version of the layout, no episodes, no JSON of a dataset, or one without what every dataset
            states.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INFO_FILE}; give the top folder of a LeRobot dataset")
    try:
        info: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise damaged_file(path, error) from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}; it must hold an object with codebase_version, fps ...")
    info = cast("dict[str, Any]", info)
    version = str(info.get("codebase_version"))
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise ValueError(f"{path}: codebase_version={version!r} is not supported (valid: v2.0, v2.1, v3.0)")
    absent = [key for key in ("fps", "features", "data_path") if key not in info]
    if absent:
        raise ValueError(
            f"{path} has no {', '.join(absent)} (present: {', '.join(info)}); every LeRobot dataset states them: "
            "download or write the file again"
        )
    if not to_number(info["fps"], f"{path}: fps") > 0:
        raise ValueError(f"{path}: fps is {info['fps']!r}; it must be above 0")
    if not isinstance(info["features"], dict):
        raise ValueError(f"{path}: features is a {type(info['features']).__name__}; it must map columns to their types")
    if info.get("total_episodes") == 0:
        raise ValueError(f"{folder} is empty: its info.json counts no episodes")
    return info


def feature_of(folder: Path, info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what info.json says of a column that it has: at least its `dtype` and its `shape`.

    Raises:
        ValueError: it does not say these, or not as a text and a list of whole numbers.
    """
    where = f"{folder / INFO_FILE}: features[{name!r}]"
    feature = info["features"][name]
    if not isinstance(feature, dict):
        raise ValueError(f"{where} is {feature!r}; it must have dtype and shape")
    feature = cast("dict[str, Any]", feature)
    to_text(feature.get("dtype"), f"{where} dtype")
    shape = feature.get("shape")
    if not isinstance(shape, list):
        raise ValueError(f"{where} shape is {shape!r}; it must be a list of whole numbers")
    sizes = [to_whole(size, f"{where} shape {shape}") for size in cast("list[Any]", shape)]
    if any(size < 1 for size in sizes):
        raise ValueError(f"{where} shape is {shape}; its sizes must be at least 1")
    return {**feature, "shape": sizes}


def image_axes(feature: Mapping[str, Any], where: str) -> tuple[int, int, int]:
    """Return which elements of an image column's shape are height, width and channels.

    The column's `names` say it. Without names, the channels are where the 3 is, and the height comes before the width
    unless the column's `info` (what was measured on the video) says the reverse.

    Raises:
        ValueError: not three sizes, or not three channels.
    """
    shape, names = feature["shape"], feature.get("names")
    if len(shape) != 3:
        raise ValueError(f"{where} has shape {shape}; an image has height, width and channels")
    if isinstance(names, dict):  # {"axes": [...]}
        lists = [value for value in cast("dict[str, Any]", names).values() if isinstance(value, list)]
        names = lists[0] if len(lists) == 1 else None
    labels = [str(name).lower() for name in cast("list[Any]", names)] if isinstance(names, list) else []
    height, width = ([i for i, label in enumerate(labels) if label in (long, long[0])] for long in ("height", "width"))
    if len(labels) == 3 and len(height) == len(width) == 1:
        axes = (height[0], width[0], 3 - height[0] - width[0])
    else:
        axes = (1, 2, 0) if shape[0] == 3 and shape[2] != 3 else (0, 1, 2)
        measured = feature.get("info") or feature.get("video_info") or {}
        stated = (shape[axes[1]], shape[axes[0]])
        if isinstance(measured, dict) and stated == (measured.get("video.height"), measured.get("video.width")):
            axes = (axes[1], axes[0], axes[2])
    if shape[axes[2]] != 3:
        raise ValueError(
            f"{where} has {shape[axes[2]]} channels (shape {shape}, names {feature.get('names')}); it must have 3"
        )
    return axes


def read_episodes(folder: Path, info: Mapping[str, Any], cameras: Sequence[str] | None = None) -> list[EpisodeEntry]:
    """Return a dataset's episodes in order, without their instructions. One that is listed again is counted once.

    Args:
        folder: the dataset.
        info: its info.json.
        cameras: video columns whose files are located; None takes all.

    Raises:
        FileNotFoundError: a file of `meta/` is missing.
        ValueError: a file of `meta/` is damaged or lacks a field, episodes are not as many as info.json says, one is
            listed with two lengths or places, or two episodes or cameras share frames.
    """
    is_v3 = str(info["codebase_version"]).startswith("v3")
    if cameras is None:
        columns: dict[str, Any] = info["features"]
        cameras = [name for name, f in columns.items() if isinstance(f, dict) and f.get("dtype") == "video"]
    entries: dict[int, EpisodeEntry] = {}
    for where, row in _rows_v3(folder) if is_v3 else _rows_v2(folder):
        entry = _episode(folder, info, cameras, where, row)
        if entries.setdefault(entry.episode_id, entry) != entry:
            raise ValueError(f"{where} lists episode {entry.episode_id} again, with other values; keep one of them")
    total = info.get("total_episodes")
    if total is not None and entries and len(entries) != to_whole(total, f"{folder / INFO_FILE}: total_episodes"):
        raise ValueError(
            f"{folder}/meta lists {len(entries)} episodes, {INFO_FILE} says total_episodes={total}; download or write "
            "the list again, or correct the number"
        )
    result = sorted(entries.values(), key=lambda entry: entry.episode_id)
    return _separated(folder, result, float(info["fps"]), is_v3=is_v3) if cameras else result


def _episode(
    folder: Path, info: Mapping[str, Any], cameras: Sequence[str], where: str, row: Mapping[str, Any]
) -> EpisodeEntry:
    def field(name: str, read: Callable[[Any, str], Any] = to_whole) -> Any:
        if name not in row:
            raise ValueError(f"{where} has no {name!r} (present: {', '.join(row)})")
        value = row[name]
        # Some writers keep numbers as arrays of shape [1].
        single = isinstance(value, list) and len(cast("list[Any]", value)) == 1
        return read(value[0] if single else value, f"{where}: {name}")

    is_v3 = str(info["codebase_version"]).startswith("v3")
    episode_id, length = field("episode_index"), field("length")
    if length < 1 or episode_id < 0:
        raise ValueError(f"{where}: episode {episode_id} has length {length}; numbers start at 0, lengths at 1")
    if is_v3:
        place = {name: field(f"data/{name}") for name in ("chunk_index", "file_index")}
    else:
        place = {"episode_index": episode_id}
        if "{episode_chunk" in f"{info['data_path']} {info.get('video_path')}":
            size = to_whole(info.get("chunks_size"), f"{folder / INFO_FILE}: chunks_size")
            if size < 1:
                raise ValueError(f"{folder / INFO_FILE}: chunks_size is {size}; it must be at least 1")
            place["episode_chunk"] = episode_id // size
    videos: dict[str, VideoSpan] = {}
    for camera in cameras:
        start_s, end_s, video_place = 0.0, float("inf"), place
        if is_v3:
            video_place = {name: field(f"videos/{camera}/{name}") for name in ("chunk_index", "file_index")}
            start_s = field(f"videos/{camera}/from_timestamp", to_number)
            if row.get(f"videos/{camera}/to_timestamp") is not None:
                end_s = field(f"videos/{camera}/to_timestamp", to_number)
            if start_s < 0 or end_s < start_s:
                raise ValueError(f"{where}: {camera} is from {start_s} to {end_s} s, which is no span of a video")
        videos[camera] = VideoSpan(
            _file_of(folder, info, "video_path", video_key=camera, **video_place), start_s, end_s
        )
    return EpisodeEntry(
        episode_id=episode_id,
        length=length,
        data_file=_file_of(folder, info, "data_path", **place),
        videos=videos,
        info={k: v for k, v in row.items() if "/" not in k and k not in ("episode_index", "length", "tasks")},
    )


def _file_of(folder: Path, info: Mapping[str, Any], key: str, **place: Any) -> Path:
    """Return a path that info.json gives as a template."""
    where = f"{folder / INFO_FILE}: {key}"
    template = to_text(info.get(key), where)
    try:
        given = template.format(**place)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{where} is {template!r}, which {info['codebase_version']} cannot fill in ({error}); it may have "
            f"{', '.join(f'{{{name}}}' for name in place)}"
        ) from error
    return path_inside(folder, given, where)


def _separated(folder: Path, entries: list[EpisodeEntry], fps: float, *, is_v3: bool) -> list[EpisodeEntry]:
    """Check that no two episodes and no two cameras share frames, and end each span where the next one starts."""
    spans: dict[Path, list[tuple[float, int, str]]] = {}
    for i, entry in enumerate(entries):
        for camera, span in entry.videos.items():
            spans.setdefault(span.path, []).append((span.start_s, i, camera))
    ends: dict[tuple[int, str], float] = {}
    for path, of_file in spans.items():
        if len({camera for _, _, camera in of_file}) > 1:
            raise ValueError(f"{folder / INFO_FILE}: video_path gives several cameras the file {path}")
        of_file.sort()
        for (start_s, i, camera), following in itertools.zip_longest(of_file, of_file[1:]):
            end_s = entries[i].videos[camera].end_s
            # Some writers state the last frame's time as the end.
            ends[i, camera] = end_s + 1 / fps
            if following is None:
                continue
            next_s, k, _ = following
            if end_s == float("inf"):
                end_s = start_s + entries[i].length / fps
            if not is_v3 or end_s > next_s + 0.5 / fps:
                ids = entries[i].episode_id, entries[k].episode_id
                raise ValueError(
                    f"{folder}/meta places episode {ids[0]} ({entries[i].length} frames from {start_s:.3f} s) and "
                    f"episode {ids[1]} (from {next_s:.3f} s) on the same frames of {path}"
                )
            ends[i, camera] = min(ends[i, camera], next_s)
    return [
        replace(entry, videos={camera: span._replace(end_s=ends[i, camera]) for camera, span in entry.videos.items()})
        for i, entry in enumerate(entries)
    ]


def read_tasks(folder: Path, info: Mapping[str, Any]) -> dict[int, str]:
    """Return task index -> instruction.

    Raises:
        FileNotFoundError: the file of tasks is missing.
        ValueError: the file of tasks is damaged, lacks a field, or gives an index two texts.
    """
    pairs: Iterable[tuple[str, int, str]]
    if str(info["codebase_version"]).startswith("v3"):
        pairs = _tasks_v3(folder / "meta" / "tasks.parquet")
    else:
        pairs = (
            (where, to_whole(row.get("task_index"), f"{where}: task_index"),
             to_text(row.get("task"), f"{where}: task"))
            for where, row in _json_lines(folder / "meta" / "tasks.jsonl")
        )  # fmt: skip
    tasks: dict[int, str] = {}
    for where, task_id, task in pairs:
        if tasks.setdefault(task_id, task) != task:
            raise ValueError(
                f"{where} gives task_index {task_id} the text {task!r}, another the text {tasks[task_id]!r}"
            )
    return tasks


def _tasks_v3(path: Path) -> list[tuple[str, int, str]]:
    """Return the rows of tasks.parquet: the text is the table's pandas index, or a column of its own."""
    table = read_table(path)
    if "task_index" not in table.column_names:
        raise ValueError(f"{path} has no column 'task_index' (present: {', '.join(table.column_names)})")
    text_columns = [field.name for field in table.schema if holds_text(field.type)]
    try:
        pandas: dict[str, Any] = table.schema.pandas_metadata or {}
    except ValueError as error:
        raise damaged_file(path, error) from error
    index = [name for name in pandas.get("index_columns", []) if isinstance(name, str) and name in text_columns]
    named = [name for name in ("task", "__index_level_0__") if name in text_columns]
    candidates = index or named[:1] or text_columns
    if len(candidates) != 1:
        raise ValueError(
            f"{path} has the columns {', '.join(table.column_names)}; one of them must be a text that is called 'task' "
            "or is the index"
        )
    columns = {name: read_texts(table[name], f"{path}: column {name!r}") for name in {*candidates, *named}}
    task_ids = read_indices(table["task_index"], f"{path}: column 'task_index'")
    for name, column in columns.items():
        if column != columns[candidates[0]]:
            raise ValueError(
                f"{path}: columns {candidates[0]!r} and {name!r} are different texts; keep the instruction"
            )
    return [(f"{path}: row {i}", int(k), columns[candidates[0]][i]) for i, k in enumerate(task_ids)]


def _rows_v2(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from _json_lines(folder / "meta" / "episodes.jsonl")


def _rows_v3(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}/meta/episodes holds no parquet file; the dataset is incomplete")
    for file in files:
        table = read_table(file)
        rows = table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()
        yield from ((f"{file}: row {i}", row) for i, row in enumerate(rows))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return where each line is, and its object. Only a line feed ends a line: texts may hold other separators."""
    for i, line in enumerate(existing_file(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise damaged_file(path, error) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {i} is {row!r}; it must be an object")
        yield f"{path}: line {i}", cast("dict[str, Any]", row)
