"""Reads LeRobot datasets (v2.0, v2.1 and v3.0) as observations with GR00T's modality keys and action chunks.

What GR00T adds to LeRobot's layout is `meta/modality.json`, which names the slices of the state and action columns
and the cameras. Frames come from mp4 files or from image columns; numbers are held in memory (70 bytes a frame),
frames are not: they are decoded on demand from a bounded number of open files, or once into a cache on disk
(`cache_frames`), from which random batches are read at memory speed, or from which they move to a GPU.

A video's frame belongs to a row if it is shown at the row's `timestamp`; how many rows or frames come before does not
matter. What a file says in another form than LeRobot's own tools is read where its meaning is certain, and refused by
name where it is not (`lerobot_values`).

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
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from gr00t_agent.data_config import DataConfig, DatasetMetadata, LiberoFrankaDataConfig, ModalitySlice, read_modality
from gr00t_agent.files import resolve_folder, whole_file
from gr00t_agent.lerobot_meta import (
    INFO_FILE,
    EpisodeEntry,
    feature_of,
    image_axes,
    read_episodes,
    read_info,
    read_tasks,
)
from gr00t_agent.lerobot_values import (
    damaged_file,
    decode_image,
    existing_file,
    holds_text,
    is_no_text,
    read_indices,
    read_numbers,
    read_scalars,
    read_table,
    read_texts,
    to_number,
)
from gr00t_agent.weights import to_device

MODALITY_FILE = Path("meta") / "modality.json"
DEFAULT_COLUMNS = {"state": "observation.state", "action": "action"}
QUANTILES = {"q01": 0.01, "q99": 0.99}
MAX_OPEN_FILES = 16
# By how much a gripper's action may leave [0, 1].
GRIPPER_TOLERANCE = 1e-3
# How far a row's timestamp may be from its frame's, in intervals between frames: the next frame is three times as far.
FRAME_TOLERANCE = 0.25
# By how much rates that are stated and measured may differ.
RATE_TOLERANCE = 0.05
# How much earlier to look for a frame when seeking to its time arrives behind it, as it does in files that seek by when
# frames are decoded.
SEEK_BACK_S = (0.0, 1.0, 10.0, float("inf"))
# Changes with the layout of cached frames.
CACHE_FORMAT = 2

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


def resolve_dataset(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a dataset, downloaded if it is a hub name.

    Raises:
        FileNotFoundError: neither a folder nor of the form `owner/name`, or the hub does not give it.
    """
    hint = "make one with `python algorithms/collect_demos.py`"
    return resolve_folder("dataset", path_or_hub_id, hint, repo_type="dataset")


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
    """Frames of one mp4 file by the times at which they are shown.

    Args:
        path: the file.
        fps: the rate of the rows that belong to it, frames a second; the file's own may be a multiple.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = existing_file(path), fps
        try:
            self._container = av.open(str(path))
        except av.error.FFmpegError as error:
            raise damaged_file(path, error) from error
        if not self._container.streams.video:
            raise ValueError(f"{path} holds no video stream")
        self._stream = self._container.streams.video[0]
        assert self._stream.time_base is not None
        self._tick_s = float(self._stream.time_base)
        # The files are small and many are read at a time.
        self._stream.thread_type = "NONE"
        # Without it, a damaged frame may be patched up from its neighbours.
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._first = min(self._stream.start_time or 0, 0)
        self._decoder: Iterator[av.VideoFrame] | None = None
        self._last = 0

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def find(self, times_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the stamps of the frames that are shown at these times, which increase; nothing is decoded.

        A stamp is a frame's time in units of the file. The nearest frame is taken if it is within `FRAME_TOLERANCE` of
        the interval between frames, the file's or the rows', whichever is shorter.

        Raises:
            ValueError: the file is damaged, ends before one of them, or has no frame at one of them.
        """
        try:
            stamps, is_end = self._stamps(times_s[0] - 1 / self.fps, times_s[-1] + 1 / self.fps)
        except av.error.FFmpegError as error:
            raise damaged_file(self.path, error) from error
        shown_s = stamps * self._tick_s
        steps_s = np.diff(shown_s)
        interval_s = min(1 / self.fps, float(np.median(steps_s))) if len(steps_s) else 1 / self.fps
        places = _nearest(shown_s, times_s)
        missing = np.ones(len(times_s), bool)
        if len(stamps):
            missing = np.abs(shown_s[places] - times_s) > FRAME_TOLERANCE * interval_s
        again = np.flatnonzero(np.diff(places) == 0)
        last = len(times_s) - 1
        if is_end and missing[last] and times_s[last] > max(shown_s, default=-math.inf) + interval_s / 2:
            wrong = f"ends before frame {last} ({times_s[last]:.3f} s)"
        elif missing.any():
            first = int(np.flatnonzero(missing)[0])
            wrong = f"has no frame {first} ({times_s[first]:.3f} s)"
            wrong += f", the nearest is at {shown_s[places[first]]:.3f} s" if len(stamps) else ""
        elif len(again):
            times = f"{times_s[again[0]]:.3f} and {times_s[again[0] + 1]:.3f} s"
            wrong = f"shows one picture for frames {again[0]} and {again[0] + 1} ({times})"
        elif len(steps_s) > 1 and steps_s.min() * self.fps > 1 + RATE_TOLERANCE:
            # Rows cannot follow each other faster than the frames.
            wrong = "has not the rate of its rows"
        else:
            return stamps[places]
        rate = self._stream.average_rate
        if rate is not None and abs(float(rate) - self.fps) > 1e-3 * self.fps:
            wrong += f"; it has {float(rate):.5g} frames a second, the dataset's info.json says fps={self.fps:g}"
        raise ValueError(f"{self.path} {wrong}")

    def _stamps(self, start_s: float, end_s: float) -> tuple[NDArray[np.int64], bool]:
        """Return the stamps of the frames shown from `start_s` to `end_s`, and whether the file has none after that."""
        self._decoder = None
        first, last = start_s / self._tick_s, end_s / self._tick_s
        found: set[int] = set()
        for back_s in SEEK_BACK_S:
            # The frames that are shown from `first` on follow a key frame that is shown before.
            is_before = self._seek(int(first), back_s) == self._first
            for packet in self._container.demux(self._stream):
                if packet.pts is None or packet.is_discard:
                    continue
                is_before = is_before or packet.pts <= first
                # Frames are stored by when they are decoded, which is never after they are shown.
                if not is_before or (packet.dts is not None and packet.dts > last):
                    break
                if first <= packet.pts <= last:
                    found.add(packet.pts)
            else:
                return np.array(sorted(found), np.int64), True
            if is_before:
                break
        return np.array(sorted(found), np.int64), False

    def read(self, stamps: Sequence[int] | NDArray[np.int64]) -> list[Frames]:
        """Return the frames with these stamps, uint8 [H, W, 3] each.

        Raises:
            ValueError: the file is damaged.
        """
        found: dict[int, Frames] = {}
        near = 8 / self.fps / self._tick_s
        for stamp in sorted({int(stamp) for stamp in stamps}):
            frame = None
            # Decoding on is cheaper than seeking when the next frame is near.
            if self._decoder is not None and 0 < stamp - self._last <= near:
                frame = self._decode_to(stamp, is_last_try=False)
            for back_s in SEEK_BACK_S:
                if frame is not None:
                    break
                self._seek(stamp, back_s)
                self._decoder = self._container.decode(self._stream)
                frame = self._decode_to(stamp, is_last_try=back_s == SEEK_BACK_S[-1])
            if frame is None:
                raise ValueError(f"{self.path} is damaged: its frame at {stamp * self._tick_s:.3f} s is not decoded")
            found[stamp] = cast(Frames, frame.to_ndarray(format="rgb24"))
        return [found[int(stamp)] for stamp in stamps]

    def _decode_to(self, stamp: int, *, is_last_try: bool) -> av.VideoFrame | None:
        """Decode up to the frame with this stamp; None if the frames to come are behind it, or need earlier ones."""
        assert self._decoder is not None
        try:
            for frame in self._decoder:
                if frame.pts is not None and frame.pts >= stamp:
                    self._last = frame.pts
                    return frame if frame.pts == stamp and not frame.is_corrupt else None
        except av.error.FFmpegError as error:
            if is_last_try:
                self._decoder = None
                raise damaged_file(self.path, error) from error
        self._decoder = None
        return None

    def _seek(self, stamp: int, back_s: float) -> int:
        """Go to the key frame before so much earlier than `stamp`; return where that is."""
        target = max(stamp - back_s / self._tick_s, self._first)
        self._container.seek(int(target), stream=self._stream)
        return int(target)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """What is read of rows, of one file or of all episodes.

    Attributes:
        columns: name -> float32 [rows, width].
        labels: what the instructions' column holds: texts, or indices of tasks.
        label_id: [rows], into `labels`.
        time_s: float64 [rows], the timestamp; empty if it is not needed.
        row: [rows], in their file, by episode and in the order of frames.
        spans: episode_index -> its part of `row`.
    """

    columns: dict[str, NDArray[np.float32]]
    labels: list[str | int]
    label_id: NDArray[np.int32]
    time_s: NDArray[np.float64]
    row: NDArray[np.int64]
    spans: dict[int, slice]


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
        ValueError: no episodes, cameras of several sizes, damaged files, a key of the data config that is not in
            `modality.json` or is at another's place there, a column that is not in the dataset, a gripper of another
            convention than the data config's, or values that contradict each other or cannot be read with certainty.
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
        self.fps = to_number(self.info["fps"], "fps")
        self._modality = self._read_modality(modality_file)
        self.cameras = [self._camera_column(key) for key in self.data_config.video_keys]
        self._check_places_differ(
            {key: f"column {name!r}" for key, name in zip(self.data_config.video_keys, self.cameras, strict=True)}
        )
        self._features = {column: feature_of(self.folder, self.info, column) for column in self.cameras}
        self._axes = {
            column: image_axes(feature, f"{self.folder / INFO_FILE}: features[{column!r}]")
            for column, feature in self._features.items()
        }
        stored_size = self._check_resolutions(image_size)
        self.image_size = stored_size if image_size is None else (image_size, image_size)
        videos = [column for column in self.cameras if self._features[column]["dtype"] == "video"]
        self.episodes = _choose(read_episodes(self.folder, self.info, videos), episode_ids, self.folder)
        if episodes_per_task is not None:
            self.episodes = self._with_instructions(self._read_rows({}))[0]
            self.episodes = first_of_each_task(self.episodes, episodes_per_task)
        self._read_numbers(has_videos=bool(videos))
        self._cache: Tensor | None = None
        self._stamps: dict[tuple[str, int], NDArray[np.int64]] = {}
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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise damaged_file(path, error) from error
        config = self.data_config
        wanted = [*config.video_keys, *config.state_keys, *config.action_keys, config.language_key]
        absent = [key for key in wanted if key not in modality]
        if absent:
            raise ValueError(
                f"{path} has no {', '.join(absent)} (present: {', '.join(modality)}); add what the data config names, "
                "or give a data config of what is there"
            )
        return modality

    def _column(self, name: str, key: str) -> str:
        features = self.info["features"]
        if name not in features:
            raise ValueError(
                f"{key} is column {name!r}, which {self.folder} does not have (present: {', '.join(features)})"
            )
        return name

    def _camera_column(self, key: str) -> str:
        name = self._column(cast(str, self._modality[key]), key)
        if feature_of(self.folder, self.info, name)["dtype"] not in ("video", "image"):
            raise ValueError(f"{key} is column {name!r}, which holds no images by {self.folder / INFO_FILE}")
        return name

    def _check_places_differ(self, places: Mapping[str, str]) -> None:
        """Check that no two keys of the data config are read from one place."""
        first: dict[str, str] = {}
        for key, place in places.items():
            other = first.setdefault(place, key)
            if other != key:
                raise ValueError(
                    f"{other} and {key} are both {place} of {self.folder}; correct the modality file, or give a "
                    "data config with one of them"
                )

    def _check_resolutions(self, image_size: int | None) -> tuple[int, int]:
        sizes: dict[str, tuple[int, int]] = {}
        for key, column in zip(self.data_config.video_keys, self.cameras, strict=True):
            shape, axes = self._features[column]["shape"], self._axes[column]
            sizes[key] = (shape[axes[0]], shape[axes[1]])
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
            width = self._width(self._column(name, key))
            if not 0 <= entry.start < entry.end <= width:
                raise ValueError(
                    f"{key} is [{entry.start}, {entry.end}) of column {name!r}, which has {width} elements by "
                    f"{self.folder / INFO_FILE}"
                )
            result[key] = (name, slice(entry.start, entry.end))
        self._check_places_differ(
            {key: f"[{where.start}, {where.stop}) of column {name!r}" for key, (name, where) in result.items()}
        )
        return result

    def _width(self, column: str) -> int:
        return math.prod(feature_of(self.folder, self.info, column)["shape"])

    def _language_column(self) -> str:
        key = self.data_config.language_key
        name = cast(str, self._modality[key])
        # GR00T's files leave original_key out where the column is named like the key.
        if name not in self.info["features"] and key in self.info["features"]:
            return key
        return self._column(name, key)

    def _read_numbers(self, *, has_videos: bool) -> None:
        """Read everything but frames."""
        config = self.data_config
        state, action = self._slices(config.state_keys), self._slices(config.action_keys)
        names = sorted({name for name, _ in (*state.values(), *action.values())})
        rows = self._read_rows({name: self._width(name) for name in names}, has_times=has_videos)
        self.state = {key: rows.columns[name][:, where] for key, (name, where) in state.items()}  # [F, width]
        self.action = np.concatenate(
            [rows.columns[name][:, where] for name, where in action.values()], axis=1
        )  # [F, a]
        lengths = np.array([entry.length for entry in self.episodes])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # [episodes + 1]
        self.episode_of_frame = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # [F]
        self._row, self._time_s = rows.row, rows.time_s  # [F]
        for key, values in {**self.state, "action": self.action}.items():
            if not np.isfinite(values).all():
                frame = np.argwhere(~np.isfinite(values))[0, 0]
                raise ValueError(f"{key} of {self.folder} is not finite in frame {frame} ({self._place(frame)})")
        self._check_gripper({key: rows.columns[name][:, where] for key, (name, where) in action.items()})
        self.episodes, self.instructions, self.instruction_id = self._with_instructions(rows)

    def _place(self, frame: int) -> str:
        """Return where a frame's row is, for a message."""
        return f"{self.episodes[self.episode_of_frame[frame]].data_file}: row {self._row[frame]}"

    def _read_rows(self, widths: Mapping[str, int], *, has_times: bool = False) -> _Rows:
        """Read the columns in `widths`, the instructions' column and, if asked, the timestamps of all episodes."""
        read_file = functools.lru_cache(maxsize=1)(lambda file: self._read_file(file, widths, has_times=has_times))
        parts: list[_Rows] = []
        known: dict[str | int, int] = {}
        for entry in self.episodes:
            rows = read_file(entry.data_file)
            span = rows.spans.get(entry.episode_id, slice(0, 0))
            inds = rows.row[span]
            if len(inds) != entry.length:
                raise ValueError(
                    f"{entry.data_file} has {len(inds)} rows of episode {entry.episode_id}, whose length is "
                    f"{entry.length}; the dataset is damaged"
                )
            ids = np.array([known.setdefault(label, len(known)) for label in rows.labels], np.int32)
            parts.append(
                replace(
                    rows, row=inds, columns={name: values[inds] for name, values in rows.columns.items()},
                    label_id=ids[rows.label_id[inds]], time_s=rows.time_s[inds] if has_times else rows.time_s,
                )
            )  # fmt: skip
            if has_times:
                self._check_times(entry, parts[-1])
        return _Rows(
            columns={name: np.concatenate([part.columns[name] for part in parts]) for name in widths},
            labels=list(known),
            label_id=np.concatenate([part.label_id for part in parts]),
            time_s=np.concatenate([part.time_s for part in parts]),
            row=np.concatenate([part.row for part in parts]),
            spans={},
        )

    def _read_file(self, file: Path, widths: Mapping[str, int], *, has_times: bool) -> _Rows:
        language = self._language_column()
        # Only videos need the timestamps: nothing else is found by time.
        names = {*widths, language, "episode_index", "frame_index"} | ({"timestamp"} if has_times else set())
        table = read_table(file, sorted(names))
        if not table.num_rows:
            raise ValueError(f"{file} has no rows, and meta/ says that episodes lie there; download or write it again")
        where = {name: f"{file}: column {name!r}" for name in names}
        columns: dict[str, NDArray[np.float32]] = {}
        for name, width in widths.items():
            values = read_numbers(table[name], where[name])
            if values.shape[1] != width:
                raise ValueError(f"{where[name]} has {values.shape[1]} elements a row, info.json says {width}")
            with np.errstate(over="ignore"):  # what becomes infinite is refused later
                columns[name] = values.astype(np.float32)
        episode, frame = (read_indices(table[name], where[name]) for name in ("episode_index", "frame_index"))
        order = np.lexsort((frame, episode))
        episode, frame = episode[order], frame[order]
        again = np.flatnonzero((np.diff(episode) == 0) & (np.diff(frame) == 0))
        if len(again):
            raise ValueError(f"{where['frame_index']} has {frame[again[0]]} twice in episode {episode[again[0]]}")
        ids, starts = np.unique(episode, return_index=True)
        ends = [*starts[1:].tolist(), len(order)]
        labels, label_id = self._labels(table[language], language, where[language])
        return _Rows(
            columns=columns,
            labels=labels,
            label_id=label_id,
            time_s=read_scalars(table["timestamp"], where["timestamp"]).astype(np.float64)
            if has_times
            else np.zeros(0),
            row=order,
            spans={i: slice(start, end) for i, start, end in zip(ids.tolist(), starts.tolist(), ends, strict=True)},
        )

    def _labels(self, column: pa.ChunkedArray, name: str, where: str) -> tuple[list[str | int], NDArray[np.int32]]:
        """Return the different instructions of a file, texts or indices of tasks, and which of them each row has."""
        feature = self.info["features"][name]
        stated = str(feature.get("dtype")) if isinstance(feature, dict) else ""
        if holds_text(column.type):
            values = np.array(read_texts(column, where), np.object_)
        elif pa.types.is_boolean(column.type) and "int" not in stated:
            raise ValueError(
                f"{where} holds {column.type}, info.json says {stated}; it must name tasks by text or number"
            )
        else:
            values = read_indices(column, where)
        distinct, ids = np.unique(values, return_inverse=True)
        return distinct.tolist(), ids.reshape(-1).astype(np.int32)

    def _with_instructions(self, rows: _Rows) -> tuple[list[EpisodeEntry], list[str], NDArray[np.int32]]:
        """Return the episodes with their instructions, all instructions in order, and each frame's [F]."""
        tasks = {} if all(isinstance(label, str) for label in rows.labels) else read_tasks(self.folder, self.info)
        texts = [label if isinstance(label, str) else tasks.get(label) for label in rows.labels]
        bad = next((i for i, text in enumerate(texts) if text is None or is_no_text(text)), None)
        if bad is not None:
            ends = np.cumsum([entry.length for entry in self.episodes])
            frame = np.flatnonzero(rows.label_id == bad)[0]
            file = self.episodes[np.searchsorted(ends, frame, "right")].data_file
            wrong = f"has the instruction {texts[bad]!r}; it must be a sentence, or name a task by number"
            if texts[bad] is None:
                unknown = sorted(label for label in rows.labels if isinstance(label, int) and label not in tasks)
                listed = ", ".join(map(str, sorted(tasks)))
                wrong = f"names tasks {unknown}, which meta/ does not list (it lists {listed})"
            raise ValueError(f"{file}: column {self._language_column()!r} {wrong}")
        instructions = sorted(set(cast("list[str]", texts)))
        ids = np.array([instructions.index(cast(str, text)) for text in texts], np.int32)[rows.label_id]
        starts = [0, *itertools.accumulate(entry.length for entry in self.episodes)]
        episodes = [
            replace(entry, instruction=instructions[ids[start]])
            for entry, start in zip(self.episodes, starts, strict=False)
        ]
        return episodes, instructions, ids

    def _check_times(self, entry: EpisodeEntry, rows: _Rows) -> None:
        """Check that an episode's timestamps can say which frames belong to its rows."""
        where, times_s = f"{entry.data_file}: column 'timestamp'", rows.time_s
        if not np.isfinite(times_s).all():
            raise ValueError(
                f"{where} is not finite in row {rows.row[~np.isfinite(times_s)][0]}; it must be in seconds"
            )
        steps_s = np.diff(times_s)
        falls = np.flatnonzero(steps_s <= 0)
        if len(falls):
            k = falls[0]
            raise ValueError(
                f"{where} goes from {times_s[k]:.3f} to {times_s[k + 1]:.3f} s in rows {rows.row[k]} and "
                f"{rows.row[k + 1]} of episode {entry.episode_id}; it must increase with frame_index, for videos' "
                "frames are found by it"
            )
        # Rows may have been left out, but none can be between two others.
        if len(steps_s) > 1 and np.median(steps_s) * self.fps < 1 - RATE_TOLERANCE:
            raise ValueError(
                f"{where} has a row every {np.median(steps_s):.4g} s in episode {entry.episode_id}, "
                f"{self.folder / INFO_FILE} says fps={self.fps:g}"
            )

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
        feature = self._features[column]
        images: list[Frames | None] = [None] * len(frames)
        # In order of time, so that neighbours in a file are decoded in one go.
        for episode, places in itertools.groupby(np.argsort(frames), key=lambda p: self.episode_of_frame[frames[p]]):
            group = list(places)
            read = self._read_video if feature["dtype"] == "video" else self._read_images
            for place, picture in zip(group, read(column, int(episode), frames[group]), strict=True):
                images[place] = picture
        shapes = {picture.shape for picture in images if picture is not None}
        if len(shapes) > 1 or any(len(shape) != 3 for shape in shapes):
            raise ValueError(f"{column} of {self.folder} mixes resolutions: {sorted(shapes)}")
        stated = tuple(feature["shape"][axis] for axis in self._axes[column])
        for shape in shapes:
            if shape != stated:
                raise ValueError(
                    f"{column} of {self.folder} has frames of {shape}, its info.json says {feature['shape']}, "
                    f"which is height {stated[0]} and width {stated[1]} by names {feature.get('names')}"
                )
        return np.stack(cast("list[Frames]", images))

    def _read_video(self, column: str, episode: int, frames: NDArray[np.integer[Any]]) -> list[Frames]:
        if not hasattr(self._local, "videos"):
            self._local.videos = _RecentlyUsed[Path, VideoFile](
                MAX_OPEN_FILES, lambda path: VideoFile(path, self.fps), VideoFile.close
            )
        video = self._local.videos(self.episodes[episode].videos[column].path)
        if (column, episode) not in self._stamps:
            self._stamps[column, episode] = self._find_frames(column, episode, video)
        return video.read(self._stamps[column, episode][frames - self.starts[episode]])

    def _find_frames(self, column: str, episode: int, video: VideoFile) -> NDArray[np.int64]:
        """Return the stamps of the frames that belong to an episode's rows."""
        entry = self.episodes[episode]
        span, rows = entry.videos[column], slice(*self.starts[episode : episode + 2])
        times_s = span.start_s + self._time_s[rows]
        # Other episodes' frames are before and after.
        tolerance_s = FRAME_TOLERANCE / self.fps
        outside = np.flatnonzero((times_s < span.start_s - tolerance_s) | (times_s > span.end_s - tolerance_s))
        if len(outside):
            raise ValueError(
                f"{entry.data_file}: column 'timestamp' is {self._time_s[rows][outside[0]]:.3f} s in row "
                f"{self._row[rows][outside[0]]}, which is at {times_s[outside[0]]:.3f} s of {span.path}, where episode "
                f"{entry.episode_id} has the frames from {span.start_s:.3f} to {span.end_s:.3f} s"
            )
        return video.find(times_s)

    def _read_images(self, column: str, episode: int, frames: NDArray[np.integer[Any]]) -> list[Frames]:
        if not hasattr(self._local, "images"):
            self._local.images = _RecentlyUsed[tuple[Path, str, int], pa.Array](2 * len(self.cameras), _read_row_group)
            self._local.rows = _RecentlyUsed[Path, list[int]](1024, _row_group_starts)
        file = self.episodes[episode].data_file
        starts = self._local.rows(file)
        images: list[Frames] = []
        for row in self._row[frames]:
            group = bisect.bisect_right(starts, row) - 1
            cell = self._local.images((file, column, group))[int(row - starts[group])]
            where = f"{file}: image {row} of {column!r}"
            images.append(decode_image(cell, self._features[column]["shape"], self._axes[column], self.folder, where))
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

        The file's name holds a fingerprint of the dataset, so a changed dataset is decoded anew (image files that lie
        beside the tables are not looked at). Each episode's checksum is kept in it: a file that is cut or damaged is
        written anew. The file is mapped into memory, not loaded: the system keeps in RAM what fits.

        Args:
            folder: where the file is, or will be, written.
            num_threads: decoding threads.
            device: a GPU to hold the frames in its memory (`frame_bytes`); `cpu` reads the file.
            on_episode: called with the number of episodes decoded and of all.

        Returns:
            The file.

        Raises:
            ValueError: a frame cannot be decoded, or there is no such device.
            OSError: the disk is full.
        """
        device = to_device(device)
        path = Path(folder) / f"frames_{self._fingerprint()}.npy"
        shape = (len(self), len(self.cameras), *self.image_size, 3)
        header = io.BytesIO()
        np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with ThreadPoolExecutor(num_threads) as pool:
            if not self._is_whole(path, header.getvalue(), pool):
                with whole_file(path) as temporary, temporary.open("wb") as file:
                    self._decode_into(file.fileno(), header.getvalue(), pool, on_episode)
        # Copy-on-write: torch wants arrays that could be written to.
        mapped = np.memmap(path, np.uint8, mode="c", offset=len(header.getvalue()), shape=shape)
        frames = torch.from_numpy(mapped)
        self._cache = frames if device.type == "cpu" else _copy_in_parts(frames, device)
        return path

    def _decode_into(
        self, file: int, header: bytes, pool: ThreadPoolExecutor, on_episode: Callable[[int, int], None]
    ) -> None:
        """Write header, frames and the episodes' checksums to an open file."""

        def decode(episode: int) -> int:
            start, end = self.starts[episode : episode + 2]
            content = self._decode(np.arange(start, end)).numpy()
            _write_at(file, content.data, len(header) + int(start) * (self.frame_bytes // len(self)))
            return zlib.crc32(content.data)

        # Written, not mapped: a full disk is then an error instead of a signal that ends the process.
        _write_at(file, memoryview(header), 0)
        sums = np.zeros(len(self.episodes), "<u4")
        for episode, checksum in enumerate(pool.map(decode, range(len(self.episodes)))):
            sums[episode] = checksum
            on_episode(episode + 1, len(self.episodes))
        _write_at(file, sums.data, len(header) + self.frame_bytes)

    def _is_whole(self, path: Path, header: bytes, pool: ThreadPoolExecutor) -> bool:
        """Return whether a file has the length and content that `_decode_into` gives it."""
        end = len(header) + self.frame_bytes
        if not path.is_file() or path.stat().st_size != end + 4 * len(self.episodes):
            return False
        content = np.memmap(path, np.uint8, mode="r")
        frames = content[len(header) : end].reshape(len(self), -1)
        sums = pool.map(zlib.crc32, (frames[i:k].data for i, k in itertools.pairwise(self.starts)))
        return content[: len(header)].tobytes() == header and list(sums) == content[end:].view("<u4").tolist()

    def _fingerprint(self) -> str:
        files = sorted({file for entry in self.episodes for file in self._frame_files(entry)})
        stats = {str(file.relative_to(self.folder)): existing_file(file).stat() for file in files}
        written = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        times = hashlib.sha256(self._time_s.tobytes() + self._row.tobytes()).hexdigest()
        spans = [
            (entry.episode_id, entry.length, [entry.videos[c][1:] for c in entry.videos]) for entry in self.episodes
        ]
        what = [CACHE_FORMAT, self.info, spans, times, self.cameras, self.image_size, written]
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
        for key, values in self._columns().items():
            modality, _, part = key.partition(".")
            statistics[modality][part] = column_statistics(values)
            modalities[modality][part] = {
                "absolute": True, "rotation_type": None, "shape": [values.shape[1]], "continuous": True,
            }  # fmt: skip
        return DatasetMetadata(statistics=statistics, modalities=modalities, embodiment_tag=config.embodiment_tag)

    def _columns(self) -> dict[str, NDArray[np.float32]]:
        """Return key -> [F, width] of states and actions."""
        columns = dict(self.state)
        start = 0
        for key, (_, where) in self._slices(self.data_config.action_keys).items():
            columns[key] = self.action[:, start : start + where.stop - where.start]
            start += where.stop - where.start
        return columns

    # -- identity --------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return what tells this dataset from another, JSON values by name; equal on every machine.

        Counts, instructions, and digests of all numbers that are read. Of pictures only the names and sizes of their
        files are looked at.
        """
        arrays: dict[str, NDArray[Any]] = {"the episodes' lengths": np.diff(self.starts)}
        arrays |= self._columns()
        arrays["each frame's instruction"] = self.instruction_id
        files = sorted({file for entry in self.episodes for file in self._frame_files(entry)})
        sizes = {str(file.relative_to(self.folder)): existing_file(file).stat().st_size for file in files}
        return {
            "number of episodes": len(self.episodes),
            "number of frames": len(self),
            "size of the pictures": list(self.image_size),
            "instructions": self.instructions,
            **{f"SHA-256 of {name}": hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()},
            "SHA-256 of the sizes of the pictures' files": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        }


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


def _row_group_starts(file: Path) -> list[int]:
    metadata = pq.read_metadata(file)
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [0, *itertools.accumulate(counts)][:-1]


def _read_row_group(key: tuple[Path, str, int]) -> pa.Array:
    file, column, group = key
    try:
        with pq.ParquetFile(file) as opened:
            if column not in opened.schema_arrow.names:
                present = ", ".join(opened.schema_arrow.names)
                raise ValueError(
                    f"{file} has no column {column!r}, whose images info.json says it has (present: {present})"
                )
            return opened.read_row_group(group, columns=[column])[column].combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise damaged_file(file, error) from error


def _nearest(sorted_values: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.intp]:
    """Return where the values nearest to `wanted` are; zeros if there are no values."""
    right = np.searchsorted(sorted_values, wanted).clip(0, max(len(sorted_values) - 1, 0))
    left = (right - 1).clip(0)
    if not len(sorted_values):
        return left
    is_left = np.abs(sorted_values[left] - wanted) <= np.abs(sorted_values[right] - wanted)
    return np.where(is_left, left, right)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    left = content.cast("B")
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def _copy_in_parts(frames: Tensor, device: torch.device, rows: int = 4096) -> Tensor:
    """Return a copy on `device`, made without a second whole copy in host memory."""
    result = torch.empty(frames.shape, dtype=frames.dtype, device=device)
    for start in range(0, len(frames), rows):
        result[start : start + rows].copy_(frames[start : start + rows])
    return result
