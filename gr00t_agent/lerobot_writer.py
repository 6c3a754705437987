"""Writes LeRobot datasets in the v2.1 and v3.0 layouts, with GR00T's `meta/modality.json`.

Two steps, so that many processes can record and a broken-off recording can go on: `stage_episode` writes one episode
into a folder of its own, whole or not at all; `assemble_dataset` makes a dataset of staged episodes, in the order
given. Both layouts come from the same staged episodes, with the same pixels: videos are joined, not encoded again.

Shape legend: T frames of an episode, H x W pixels.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from gr00t_agent.files import whole_folder
from gr00t_agent.lerobot_values import is_no_text

Version = Literal["v2.1", "v3.0"]
VERSIONS: tuple[Version, ...] = ("v2.1", "v3.0")
Frames = NDArray[np.uint8]
Stats = dict[str, Any]

STATE_COLUMN, ACTION_COLUMN = "observation.state", "action"
EPISODE_FILE, TABLE_FILE = "episode.json", "table.parquet"
# What the dataset keeps of each episode by itself.
EPISODE_FIELDS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")
CHUNK_SIZE = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTIC_NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
# Frames of an episode whose pixels enter the statistics.
STATISTICS_FRAMES = 25
INDEX_COLUMNS = {
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is the same for all episodes of a dataset.

    Attributes:
        fps: frames per second.
        robot_type: robot's name in `info.json`.
        state_names: names of the state's elements.
        action_names: names of the action's elements.
        storage: `video` for H.264 mp4 files, `image` for lossless PNGs inside the parquet files.
        crf: quality of the videos, 0 (lossless) to 51; 18 is visually lossless.
        keyframe_interval: frames between those that decode on their own: small is quick at random, large is small.
    """

    fps: int = 20
    robot_type: str = "panda"
    state_names: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper_0", "gripper_1")
    action_names: tuple[str, ...] = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    storage: Literal["video", "image"] = "video"
    crf: int = 18
    keyframe_interval: int = 8

    def __post_init__(self) -> None:
        if self.storage not in ("video", "image"):
            raise ValueError(f"storage={self.storage!r} is unknown (valid: video, image)")
        if self.fps < 1 or self.keyframe_interval < 1 or not 0 <= self.crf <= 51:
            raise ValueError(
                f"fps={self.fps} and keyframe_interval={self.keyframe_interval} must be at least 1, "
                f"and crf={self.crf} in 0-51"
            )


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration.

    Attributes:
        frames: camera column (`observation.images.image`) -> uint8 [T, H, W, 3].
        states: float32 [T, state width], what was observed before each action.
        actions: float32 [T, action width], in the data convention.
        instruction: the task's text.
        info: numbers and texts to keep with the episode, e.g. its seed.
    """

    frames: Mapping[str, Frames]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    instruction: str
    info: Mapping[str, int | float | str] = field(default_factory=dict[str, int | float | str])


def stage_episode(folder: Path, episode: Episode, recording: Recording) -> None:
    """Write one episode to `folder`, replacing what was there.

    Raises:
        ValueError: no frames, lengths or widths that differ, values that are not finite in float32, an instruction that
            says nothing, odd image sizes in a video, or a name in `info` that the dataset needs itself.
        OSError: it cannot be written, because the disk is full, say; `folder` is as it was.
    """
    _check(episode, recording)
    with whole_folder(folder) as temporary:
        _write_episode(temporary, episode, recording)


def _write_episode(folder: Path, episode: Episode, recording: Recording) -> None:
    length = len(episode.actions)
    columns: dict[str, Any] = {
        STATE_COLUMN: _vectors(episode.states),
        ACTION_COLUMN: _vectors(episode.actions),
        "timestamp": pa.array(np.arange(length) / recording.fps, pa.float32()),
        "frame_index": pa.array(np.arange(length), pa.int64()),
    }
    histograms: dict[str, list[list[int]]] = {}
    for camera, frames in episode.frames.items():
        histograms[camera] = _histogram(frames).tolist()
        if recording.storage == "video":
            encode_video(folder / f"{camera}.mp4", frames, recording)
        else:
            columns[camera] = _png_column(frames)
    pq.write_table(pa.table(columns), folder / TABLE_FILE)
    camera_shapes = {camera: list(frames.shape[1:]) for camera, frames in episode.frames.items()}
    content = dict(
        length=length, instruction=episode.instruction, info=dict(episode.info), shapes=camera_shapes,
        storage=recording.storage, histograms=histograms,
    )  # fmt: skip
    (folder / EPISODE_FILE).write_text(json.dumps(content), encoding="utf-8")


def _check(episode: Episode, recording: Recording) -> None:
    reserved = [name for name in episode.info if name in EPISODE_FIELDS or "/" in name]
    if reserved:
        raise ValueError(f"info has {', '.join(reserved)}; its names hold no '/' and are none of {EPISODE_FIELDS}")
    if is_no_text(episode.instruction):
        raise ValueError(f"instruction is {episode.instruction!r}; it must be a sentence, which says what is done")
    lengths = {"states": len(episode.states), "actions": len(episode.actions)}
    lengths |= {camera: len(frames) for camera, frames in episode.frames.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"an episode's parts must have one length of at least 1, got {lengths}")
    for name, values, names in (
        ("states", episode.states, recording.state_names),
        ("actions", episode.actions, recording.action_names),
    ):
        if values.shape[1:] != (len(names),):
            raise ValueError(
                f"{name} has shape {values.shape}, expected ({len(values)}, {len(names)}): {', '.join(names)}"
            )
        if values.dtype.kind not in "biuf":
            raise ValueError(f"{name} is {values.dtype}; it must hold numbers")
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            written = values.astype(np.float32)
        if not np.isfinite(written).all():
            frame = np.argwhere(~np.isfinite(written))[0, 0]
            raise ValueError(f"{name} is not finite in frame {frame}: {values[frame].tolist()}, written as float32")
    for camera, frames in episode.frames.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"{camera} is {frames.dtype} {frames.shape}; it must be uint8 [frames, height, width, 3]")
        if recording.storage == "video" and (frames.shape[1] % 2 or frames.shape[2] % 2):
            raise ValueError(f"{camera} is {frames.shape[1]}x{frames.shape[2]} pixels; videos need even sizes")


def encode_video(path: Path, frames: Frames, recording: Recording) -> None:
    """Write frames uint8 [T, H, W, 3] as an H.264 mp4 without B-frames, so that it can be cut and joined."""
    options = {
        "crf": str(recording.crf),
        "g": str(recording.keyframe_interval),
        "bf": "0",
        "preset": "fast",
        "threads": "1",
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=recording.fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def assemble_dataset(
    folder: Path, staged: Sequence[Path], recording: Recording, *, version: Version, modality: Mapping[str, Any]
) -> None:
    """Make a dataset of staged episodes, which keep their files.

    Args:
        folder: the new dataset; must not exist, or be empty.
        staged: folders of `stage_episode`, in the order that the episodes will have.
        recording: what they were staged with.
        version: layout.
        modality: content of `meta/modality.json`.

    Raises:
        FileExistsError: `folder` holds files.
        ValueError: nothing is staged, the version is unknown, or the episodes differ in cameras or image sizes.
        OSError: it cannot be written, because the disk is full, say; there is no new dataset.
    """
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} cannot be written (valid: {', '.join(VERSIONS)})")
    if not staged:
        raise ValueError(f"no staged episodes are given for {folder}; record at least one")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give another folder, or remove it to write it anew")
    contents = [json.loads((path / EPISODE_FILE).read_text("utf-8")) for path in staged]
    for path, content in zip(staged, contents, strict=True):
        if (content["shapes"], content["storage"]) != (contents[0]["shapes"], recording.storage):
            raise ValueError(
                f"{path} has {content['storage']}s of {content['shapes']}, but {staged[0]} has {recording.storage}s of "
                f"{contents[0]['shapes']}; one dataset has one resolution and storage"
            )
    with whole_folder(folder) as temporary:
        (temporary / "meta").mkdir()
        _Assembly(temporary, staged, contents, recording, version).write(modality)


class _Assembly:
    """One dataset in the making."""

    def __init__(
        self,
        folder: Path,
        staged: Sequence[Path],
        contents: Sequence[dict[str, Any]],
        recording: Recording,
        version: Version,
    ) -> None:
        self.folder, self.staged, self.contents = folder, staged, contents
        self.recording, self.version = recording, version
        self.cameras: list[str] = list(contents[0]["shapes"])
        self.is_video = recording.storage == "video"
        texts = list(dict.fromkeys(content["instruction"] for content in contents))
        self.task_id = {text: i for i, text in enumerate(texts)}
        self.starts = [0, *itertools.accumulate(content["length"] for content in contents)]

    def write(self, modality: Mapping[str, Any]) -> None:
        stats: list[dict[str, Stats]] = []
        numbers: dict[str, list[NDArray[Any]]] = {}
        places = self._write_v2() if self.version == "v2.1" else self._write_v3()
        for episode_id in range(len(self.staged)):
            table = self._table(episode_id, with_images=False)
            arrays = {name: _numpy(table[name]) for name in table.column_names}
            histograms = self.contents[episode_id]["histograms"]
            stats.append(_feature_stats(arrays, {camera: np.array(histograms[camera]) for camera in self.cameras}))
            for name, array in arrays.items():
                numbers.setdefault(name, []).append(array)
        total = {
            camera: np.sum([content["histograms"][camera] for content in self.contents], axis=0)
            for camera in self.cameras
        }
        whole = _feature_stats({name: np.concatenate(arrays) for name, arrays in numbers.items()}, total)
        meta = self.folder / "meta"
        _write_json(meta / "stats.json", whole)
        _write_json(meta / "modality.json", modality)
        _write_json(meta / "info.json", self._info())
        rows = [
            dict(episode_index=i, tasks=[content["instruction"]], length=content["length"], **content["info"])
            for i, content in enumerate(self.contents)
        ]
        if self.version == "v2.1":
            _write_lines(meta / "episodes.jsonl", rows)
            _write_lines(meta / "tasks.jsonl", [dict(task_index=i, task=text) for text, i in self.task_id.items()])
            _write_lines(meta / "episodes_stats.jsonl", [dict(episode_index=i, stats=s) for i, s in enumerate(stats)])
            return
        _write_tasks_table(meta / "tasks.parquet", self.task_id)
        for row, place, stat in zip(rows, places, stats, strict=True):
            row |= place
            row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            row |= {f"stats/{name}/{kind}": value for name, values in stat.items() for kind, value in values.items()}
        path = meta / "episodes" / "chunk-000" / "file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path)

    def _table(self, episode_id: int, *, with_images: bool = True) -> pa.Table:
        """Return an episode's rows, in the dataset's numbering."""
        wanted = [STATE_COLUMN, ACTION_COLUMN, "timestamp", "frame_index"]
        if with_images and not self.is_video:
            wanted += self.cameras
        table = pq.read_table(self.staged[episode_id] / TABLE_FILE, columns=wanted)
        length, task = self.contents[episode_id]["length"], self.task_id[self.contents[episode_id]["instruction"]]
        start = self.starts[episode_id]
        for name, values in (
            ("episode_index", np.full(length, episode_id)),
            ("index", np.arange(start, start + length)),
            ("task_index", np.full(length, task)),
        ):
            table = table.append_column(name, pa.array(values, pa.int64()))
        return table.replace_schema_metadata(
            {b"huggingface": json.dumps(self._hub_schema(table.column_names)).encode()}
        )

    def _hub_schema(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the column types as the `datasets` package records them."""
        features: dict[str, Any] = {}
        widths = {STATE_COLUMN: len(self.recording.state_names), ACTION_COLUMN: len(self.recording.action_names)}
        for name in names:
            if name in widths:
                value = {"dtype": "float32", "_type": "Value"}
                features[name] = {"feature": value, "length": widths[name], "_type": "Sequence"}
            elif name in INDEX_COLUMNS:
                features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "_type": "Value"}
            else:
                features[name] = {"_type": "Image"}
        return {"info": {"features": features}}

    def _write_v2(self) -> list[dict[str, Any]]:
        for episode_id, source in enumerate(self.staged):
            chunk = f"chunk-{episode_id // CHUNK_SIZE:03d}"
            path = self.folder / "data" / chunk / f"episode_{episode_id:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self._table(episode_id), path)
            for camera in self.cameras if self.is_video else ():
                target = self.folder / "videos" / chunk / camera / f"episode_{episode_id:06d}.mp4"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / f"{camera}.mp4", target)
        return []

    def _write_v3(self) -> list[dict[str, Any]]:
        places: list[dict[str, Any]] = [{} for _ in self.staged]
        sizes = [path.joinpath(TABLE_FILE).stat().st_size for path in self.staged]
        for number, group in enumerate(_groups(sizes, DATA_FILE_MB)):
            place = {"chunk_index": number // CHUNK_SIZE, "file_index": number % CHUNK_SIZE}
            path = self.folder / "data" / _chunk_file(place, "parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(path, self._table(group[0]).schema) as writer:
                for episode_id in group:
                    # A row group each: one episode can be read without the others.
                    writer.write_table(self._table(episode_id))
                    places[episode_id] |= {f"data/{name}": value for name, value in place.items()}
                    places[episode_id] |= {
                        "dataset_from_index": self.starts[episode_id],
                        "dataset_to_index": self.starts[episode_id + 1],
                    }
        for camera in self.cameras if self.is_video else ():
            sizes = [path.joinpath(f"{camera}.mp4").stat().st_size for path in self.staged]
            for number, group in enumerate(_groups(sizes, VIDEO_FILE_MB)):
                place = {"chunk_index": number // CHUNK_SIZE, "file_index": number % CHUNK_SIZE}
                path = self.folder / "videos" / camera / _chunk_file(place, "mp4")
                path.parent.mkdir(parents=True, exist_ok=True)
                join_videos(path, [self.staged[i] / f"{camera}.mp4" for i in group], self.recording.fps)
                for episode_id in group:
                    begin, end = (self.starts[i] - self.starts[group[0]] for i in (episode_id, episode_id + 1))
                    values = dict(
                        place, from_timestamp=begin / self.recording.fps, to_timestamp=end / self.recording.fps
                    )
                    places[episode_id] |= {f"videos/{camera}/{name}": value for name, value in values.items()}
        return places

    def _info(self) -> dict[str, Any]:
        recording, num_episodes = self.recording, len(self.staged)
        features: dict[str, Any] = {}
        for camera in self.cameras:
            shape = self.contents[0]["shapes"][camera]
            features[camera] = {
                "dtype": recording.storage, "shape": shape, "names": ["height", "width", "channels"],
            }  # fmt: skip
            if self.is_video:
                features[camera]["info"] = {
                    "video.fps": float(recording.fps), "video.height": shape[0], "video.width": shape[1],
                    "video.channels": 3, "video.codec": "h264", "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False, "has_audio": False,
                }  # fmt: skip
        for name, names in ((STATE_COLUMN, recording.state_names), (ACTION_COLUMN, recording.action_names)):
            features[name] = {"dtype": "float32", "shape": [len(names)], "names": {"motors": list(names)}}
        for name in INDEX_COLUMNS:
            dtype = "float32" if name == "timestamp" else "int64"
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        info: dict[str, Any] = dict(
            codebase_version=self.version, robot_type=recording.robot_type, total_episodes=num_episodes,
            total_frames=self.starts[-1], total_tasks=len(self.task_id), chunks_size=CHUNK_SIZE, fps=recording.fps,
            splits={"train": f"0:{num_episodes}"},
        )  # fmt: skip
        if self.version == "v2.1":
            info |= dict(
                total_videos=num_episodes * len(self.cameras) * self.is_video,
                total_chunks=-(-num_episodes // CHUNK_SIZE),
                data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
            )
        else:
            info |= dict(
                data_files_size_in_mb=DATA_FILE_MB,
                video_files_size_in_mb=VIDEO_FILE_MB,
                data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            )
        if not self.is_video:
            info["video_path"] = None
        return info | {"features": features}


def join_videos(path: Path, sources: Sequence[Path], fps: int) -> None:
    """Write videos of one encoder one after another into `path`, packet by packet."""
    with av.open(str(path), "w") as output:
        stream = None
        first_frame = 0
        for source in sources:
            with av.open(str(source)) as video:
                given = video.streams.video[0]
                assert given.time_base is not None
                if stream is None:
                    stream = output.add_stream_from_template(given)
                ticks = Fraction(1, fps) / given.time_base
                num_frames = 0
                for packet in video.demux(given):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts += int(first_frame * ticks)
                    packet.dts += int(first_frame * ticks)
                    packet.stream = stream
                    output.mux(packet)
                    num_frames += 1
                first_frame += num_frames


def _groups(sizes: Sequence[int], limit_mb: int) -> list[list[int]]:
    """Return consecutive indices, as many together as stay below the limit."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = limit_mb * 1024**2
        groups[-1].append(i)
        room -= size
    return groups


def _chunk_file(place: Mapping[str, int], suffix: str) -> Path:
    return Path(f"chunk-{place['chunk_index']:03d}") / f"file-{place['file_index']:03d}.{suffix}"


def _vectors(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _png_column(frames: Frames) -> pa.Array:
    cells: list[dict[str, Any]] = []
    for i, image in enumerate(frames):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
        cells.append({"bytes": buffer.getvalue(), "path": f"frame_{i:06d}.png"})
    return pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(len(array), -1)
    return array.to_numpy().reshape(-1, 1)


def _histogram(frames: Frames) -> NDArray[np.int64]:
    """Return how often each value occurs in each channel of some of the frames, [3, 257]; the last is the count."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, STATISTICS_FRAMES).round().astype(int))]
    counts = [np.bincount(chosen[..., channel].reshape(-1), minlength=256) for channel in range(3)]
    return np.concatenate([np.stack(counts), np.full((3, 1), len(chosen))], axis=1)


def _feature_stats(arrays: Mapping[str, NDArray[Any]], histograms: Mapping[str, NDArray[np.int64]]) -> dict[str, Stats]:
    """Return min, max, mean, std, count and quantiles of each column: lists of its width, [3, 1, 1] for images."""
    stats: dict[str, Stats] = {}
    for name, array in arrays.items():
        exact = array.astype(np.float64)
        values = {kind: getattr(exact, kind)(axis=0).tolist() for kind in ("min", "max", "mean", "std")}
        quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
        values |= {kind: row.tolist() for kind, row in zip(QUANTILES, quantiles, strict=True)}
        stats[name] = {**values, "count": [len(array)]}
    levels = np.arange(256) / 255.0
    for camera, table in histograms.items():
        counts, total = table[:, :256], table[:, :256].sum(axis=1, keepdims=True)
        mean = (counts * levels).sum(axis=1, keepdims=True) / total
        variance = (counts * (levels - mean) ** 2).sum(axis=1, keepdims=True) / total
        cumulative = np.cumsum(counts, axis=1) / total
        values = {
            "min": levels[(counts > 0).argmax(axis=1)][:, None],
            "max": levels[255 - (counts[:, ::-1] > 0).argmax(axis=1)][:, None],
            "mean": mean,
            "std": np.sqrt(variance),
        }
        for kind, fraction in QUANTILES.items():
            values[kind] = levels[(cumulative >= fraction).argmax(axis=1)][:, None]
        stats[camera] = {kind: value[:, :, None].tolist() for kind, value in values.items()}
        stats[camera]["count"] = [int(table[0, 256])]
    return stats


def _write_tasks_table(path: Path, task_id: Mapping[str, int]) -> None:
    """Write the tasks as pandas would a frame whose index is the text."""
    table = pa.table({"task_index": pa.array(task_id.values(), pa.int64()), "task": pa.array(task_id, pa.string())})
    columns = [
        dict(name="task_index", field_name="task_index", pandas_type="int64", numpy_type="int64", metadata=None),
        dict(name="task", field_name="task", pandas_type="unicode", numpy_type="object", metadata=None),
    ]
    text = dict(name=None, field_name=None, pandas_type="unicode", numpy_type="object", metadata={"encoding": "UTF-8"})
    pandas = dict(index_columns=["task"], column_indexes=[text], columns=columns, pandas_version="2.0.0")
    pq.write_table(table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()}), path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
