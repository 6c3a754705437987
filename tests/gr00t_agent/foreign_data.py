"""Small LeRobot datasets as other people's tools leave them: built with json, pyarrow and PyAV, not by our writer.

Every image says which frame of which episode it is, in two grey levels that survive encoding.
"""

import copy
import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gr00t_agent.lerobot import LeRobotDataset
from tests.gr00t_agent.lerobot_data import CAMERAS, modality

TASKS = ("pick up the bowl", "open the drawer")
HEIGHT, WIDTH = 32, 48
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")


def picture(episode: int, k: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Returns frame k of an episode."""
    image = np.full((height, width, 3), 6 * k + 10, np.uint8)
    image[:, width // 2 :] = 40 * episode + 20
    return image


def frame_of(image: np.ndarray) -> tuple[int, int]:
    """Returns (episode, k) of a picture."""
    middle = image.shape[1] // 2
    return round((image[:, middle + 4 :].mean() - 20) / 40), round((image[:, : middle - 4].mean() - 10) / 6)


def png(image: np.ndarray | Image.Image) -> bytes:
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, format="PNG")
    return content.getvalue()


def write_video(path: Path, frames, fps, *, codec: str = "libx264", options: dict | None = None, ticks=None) -> None:
    """Writes frames; frame i is shown at `ticks[i]` / fps seconds, i / fps if not given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps).limit_denominator(1001), options=options or {"crf": "4"}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i if ticks is None else ticks[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Foreign:
    """A dataset's content, to be changed before it is written.

    Attributes:
        info: `meta/info.json`.
        modality: `meta/modality.json`.
        episodes: rows of `meta/episodes`.
        tasks: rows of tasks.jsonl, or the table of tasks.parquet.
        columns: of each episode, name -> arrow array.
        video_fps: rate of the videos.
        ticks: when a video's frames are shown, in frames of `video_fps`; None for one after another.
    """

    def __init__(self, version="v2.1", *, storage="video", fps=20, lengths=(12, 9), frames=None, video_fps=None):
        self.version, self.storage, self.fps, self.lengths = version, storage, fps, lengths
        self.frames, self.video_fps = frames or lengths, video_fps or fps
        self.ticks: list[int] | None = None
        image = {"dtype": storage, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
        features = {camera: copy.deepcopy(image) for camera in CAMERAS}
        features |= {
            "observation.state": {"dtype": "float32", "shape": [8]},
            "action": {"dtype": "float32", "shape": [7]},
        }
        features |= {name: {"dtype": "int64", "shape": [1], "names": None} for name in INDEX_COLUMNS}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        self.is_v3 = version.startswith("v3")
        self.info = dict(codebase_version=version, fps=fps, total_episodes=len(lengths), features=features)
        if self.is_v3:
            self.info |= dict(
                data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            )
        else:
            self.info |= dict(
                chunks_size=1000, data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
            )  # fmt: skip
        self.modality = modality()
        self.tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
        self.columns = [self._columns(i, length) for i, length in enumerate(lengths)]
        self.episodes = [self._episode(i) for i in range(len(lengths))]

    def _columns(self, episode: int, length: int) -> dict:
        rng = np.random.default_rng(episode)
        states = rng.normal(size=(length, 8)).astype(np.float32)
        actions = rng.uniform(0, 1, (length, 7)).astype(np.float32)
        start = sum(self.lengths[:episode])
        columns = {
            "observation.state": pa.array(states.tolist(), pa.list_(pa.float32())),
            "action": pa.array(actions.tolist(), pa.list_(pa.float32())),
            "timestamp": pa.array(np.arange(length) / self.fps, pa.float32()),
            "frame_index": pa.array(np.arange(length)),
            "episode_index": pa.array(np.full(length, episode)),
            "index": pa.array(start + np.arange(length)),
            "task_index": pa.array(np.full(length, episode % 2)),
        }
        if self.storage == "image":
            cells = [{"bytes": png(picture(episode, k)), "path": f"{k}.png"} for k in range(length)]
            columns |= {camera: pa.array(cells) for camera in CAMERAS}
        return columns

    def _episode(self, episode: int) -> dict:
        row = {"episode_index": episode, "length": self.lengths[episode], "tasks": [TASKS[episode % 2]]}
        if not self.is_v3:
            return row
        start_s, end_s = (sum(self.frames[:i]) / self.video_fps for i in (episode, episode + 1))
        row |= {"data/chunk_index": 0, "data/file_index": 0}
        for camera in CAMERAS if self.storage == "video" else ():
            place = {"chunk_index": 0, "file_index": 0, "from_timestamp": start_s, "to_timestamp": end_s}
            row |= {f"videos/{camera}/{name}": value for name, value in place.items()}
        return row

    def keep(self, ks: list[int], *, shift: float = 0.0) -> None:
        """Keeps only these rows of each episode, numbered anew, their timestamps moved by so many frames."""
        for episode, columns in enumerate(self.columns):
            rows = [k for k in ks if k < self.lengths[episode]]
            kept = {name: column.take(rows) for name, column in columns.items()}
            times = columns["timestamp"].to_numpy()[rows] + shift / self.fps
            kept |= {"timestamp": pa.array(times, pa.float32()), "frame_index": pa.array(np.arange(len(rows)))}
            self.columns[episode] = kept
            self.episodes[episode]["length"] = len(rows)

    def set_column(self, name: str, make) -> None:
        """Replaces a column by what `make(values of an episode)` returns."""
        for columns in self.columns:
            columns[name] = make(columns[name].to_pylist())

    def write(self, folder: Path) -> Path:
        meta = folder / "meta"
        meta.mkdir(parents=True)
        (meta / "info.json").write_text(json.dumps(self.info))
        (meta / "modality.json").write_text(json.dumps(self.modality))
        pictures = [[picture(i, k) for k in range(count)] for i, count in enumerate(self.frames)]
        if self.is_v3:
            (meta / "episodes/chunk-000").mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes/chunk-000/file-000.parquet")
            tasks = pa.Table.from_pylist(self.tasks) if isinstance(self.tasks, list) else self.tasks
            pq.write_table(tasks, meta / "tasks.parquet")
            (folder / "data/chunk-000").mkdir(parents=True)
            table = pa.concat_tables([pa.table(columns) for columns in self.columns])
            pq.write_table(table, folder / "data/chunk-000/file-000.parquet")
            pictures = [[image for images in pictures for image in images]]
        else:
            for name, rows in (("episodes", self.episodes), ("tasks", self.tasks)):
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (meta / f"{name}.jsonl").write_text(lines, "utf-8")
            (folder / "data/chunk-000").mkdir(parents=True)
            for i, columns in enumerate(self.columns):
                pq.write_table(pa.table(columns), folder / f"data/chunk-000/episode_{i:06d}.parquet")
        for camera in CAMERAS if self.storage == "video" else ():
            for i, images in enumerate(pictures):
                place = f"{camera}/chunk-000/file-{i:03d}" if self.is_v3 else f"chunk-000/{camera}/episode_{i:06d}"
                file = folder / "videos" / f"{place}.mp4"
                write_video(file, images, self.video_fps, ticks=self.ticks and self.ticks[: len(images)])
        return folder


def shown(dataset: LeRobotDataset) -> list[list[int]]:
    """Returns of each episode which frames its rows show; both cameras must agree, and be of the episode."""
    images = dataset.images(np.arange(len(dataset))).numpy()  # [F, V, H, W, 3]
    found = [[frame_of(view) for view in views] for views in images]
    assert all(len(set(views)) == 1 for views in found), found
    result: list[list[int]] = [[] for _ in dataset.episodes]
    for (number, k), episode in zip((views[0] for views in found), dataset.episode_of_frame, strict=True):
        assert number == dataset.episodes[episode].episode_id, found
        result[episode].append(k)
    return result


def instructions(dataset: LeRobotDataset) -> list[str]:
    """Returns the instruction of each episode's first row as a batch gives it."""
    key = dataset.data_config.language_key
    texts = dataset.batch(dataset.starts[:-1]).obs[key]
    assert texts == [entry.instruction for entry in dataset.episodes]
    return texts
