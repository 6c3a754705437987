"""Videos of episodes, with what happened written on every frame.

`write_video` shows one episode, `write_tiled_video` several side by side, `tile_videos` what was written before, and
`write_pictures` pictures of any kind, also as a GIF.
`RolloutRecorder` films what a trainer's first environments do while it collects a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
import torch
from av.container import InputContainer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from libero_gym.conventions import CONTROL_FREQUENCY_HZ as CONTROL_FREQUENCY_HZ

CAPTION_HEIGHT = 48
VIEW_SIZE = 256
IMAGE_KEYS = ("video.image", "video.wrist_image")
VIDEO_SUFFIXES = (".mp4", ".gif")
TASK_KEY = "annotation.human.action.task_description"

_SUCCESS, _FAILURE, _RUNNING = (18, 84, 38), (110, 28, 28), (0, 0, 0)
# Colours of a GIF, and the number of its pictures that they are chosen from.
_GIF_COLORS, _GIF_SAMPLES = 256, 8


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One moment of an episode.

    Attributes:
        views: camera images uint8 [H, W, 3], shown side by side.
        task: the instruction.
        step: environment steps taken in the episode.
        reward: the episode's return so far.
        success: True once the episode has succeeded.
        ended: True in the episode's last frame.
    """

    views: Sequence[NDArray[np.uint8]]
    task: str
    step: int
    reward: float
    success: bool
    ended: bool = False


def frame_of(
    obs: Mapping[str, Any], env_id: int, *, step: int, reward: float, success: bool, ended: bool = False
) -> Frame:
    """Returns what environment `env_id` of a vector environment shows; the rest as in `Frame`.

    Args:
        obs: observation with GR00T's modality keys; images may lie on any device.
        env_id: which environment.
        step: see `Frame`.
        reward: see `Frame`.
        success: see `Frame`.
        ended: see `Frame`.
    """
    views = [_to_numpy(obs[key][env_id]) for key in IMAGE_KEYS]
    return Frame(views=views, task=str(obs[TASK_KEY][env_id]), step=step, reward=reward, success=success, ended=ended)


def draw(frame: Frame, view_size: int = VIEW_SIZE) -> NDArray[np.uint8]:
    """Returns `frame` as one picture: its views, `view_size` pixels high, above a caption.

    The caption's ground is green once the episode has succeeded, red if it ends without success.
    """
    width = view_size * len(frame.views)
    ground = _SUCCESS if frame.success else _FAILURE if frame.ended else _RUNNING
    picture = Image.new("RGB", (width, view_size + CAPTION_HEIGHT), ground)
    for i, view in enumerate(frame.views):
        image = Image.fromarray(view)
        if image.size != (view_size, view_size):
            image = image.resize((view_size, view_size), Image.Resampling.BICUBIC)
        picture.paste(image, (i * view_size, 0))
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    task = frame.task
    while canvas.textlength(task, font=font) > width - 12:
        task = task.removesuffix("...")[:-1] + "..."
    canvas.text((6, view_size + 4), task, font=font, fill="white")
    status = f"step {frame.step:4d}   reward {frame.reward:4.1f}   success {'yes' if frame.success else 'no'}"
    canvas.text((6, view_size + 25), status, font=font, fill="lightgray")
    return np.asarray(picture)


def write_video(path: Path, frames: Sequence[Frame], fps: float) -> None:
    """Writes an episode as an H.264 mp4.

    Raises:
        ValueError: there are no frames, or they differ in views.
    """
    _num_views(path, [frames])
    write_pictures(path, (draw(frame) for frame in frames), fps)


def write_tiled_video(
    path: Path, episodes: Sequence[Sequence[Frame]], fps: float, *, columns: int | None = None, view_size: int = 192
) -> None:
    """Writes several episodes as one H.264 mp4, each in its own tile, all started together.

    An episode that is over keeps showing its last frame.

    Args:
        path: the file.
        episodes: frames of each episode; all with the same number of views.
        fps: frames per second.
        columns: tiles in a row; None makes the picture about 16 by 9.
        view_size: height and width of each view, pixels.

    Raises:
        ValueError: there is no episode, one has no frames, they differ in views, `view_size` is not even, or `columns`
            is less than 1.
    """
    if view_size < 2 or view_size % 2:
        raise ValueError(f"view_size={view_size} must be a positive even number of pixels")
    size = view_size + CAPTION_HEIGHT, view_size * _num_views(path, episodes)
    columns = _checked_columns(columns, len(episodes), size[1], size[0])
    streams = [(draw(frame, view_size) for frame in episode) for episode in episodes]
    write_pictures(path, _tiled(streams, size, columns), fps)


def tile_videos(path: Path, videos: Sequence[Path], *, columns: int | None = None, width: int = 1920) -> None:
    """Writes videos of one size and frame rate as one, like `write_tiled_video`, shrunk to at most `width` pixels.

    Raises:
        ValueError: there are none, they differ in size or frame rate, or `columns` is less than 1.
    """
    with ExitStack() as stack:
        containers = [stack.enter_context(av.open(str(video))) for video in videos]
        streams = [container.streams.video[0] for container in containers]
        kinds = {(stream.height, stream.width, stream.average_rate or 0) for stream in streams}
        if len(kinds) != 1:
            raise ValueError(f"{path} needs videos of one size and frame rate (given: {videos}: {sorted(kinds)})")
        full_height, full_width, fps = kinds.pop()
        columns = _checked_columns(columns, len(videos), full_width, full_height)
        scale = min(1.0, width / (columns * full_width))
        size = round(full_height * scale / 2) * 2, round(full_width * scale / 2) * 2
        write_pictures(path, _tiled([_decoded(container, size) for container in containers], size, columns), float(fps))


def write_pictures(path: Path, pictures: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Writes pictures as an H.264 mp4, or as a GIF that repeats for ever; whole or not at all.

    Args:
        path: the file; its suffix, .mp4 or .gif, decides.
        pictures: uint8 [H, W, 3], for an mp4 with H and W even. A GIF keeps them all in memory, has one palette for all
            (so that what does not move costs nothing), and shows each for a whole number of hundredths of a second.
        fps: pictures per second.

    Raises:
        ValueError: the suffix is another one, or there is no picture for a GIF.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r} (valid: {', '.join(VIDEO_SUFFIXES)})")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        if path.suffix == ".gif":
            _write_gif(temporary, [np.array(picture) for picture in pictures], fps)
        else:
            _write_mp4(temporary, pictures, fps)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class RolloutRecorder:
    """Films the first environments of a trainer's rollouts, one tiled video per filmed iteration.

        recorder = RolloutRecorder(run.path / "videos", num_envs=4, interval=10, fps=20 / num_action_chunks)
        ...
        obs, reward, terminated, truncated, infos = envs.step(actions)
        recorder.add(iteration, obs, infos, terminated | truncated)
        ...
        recorder.write(iteration)  # after the rollout

    Iterations 1, 1 + interval, 1 + 2 * interval ... are filmed; in others both calls return at once. A tile shows one
    environment through the whole rollout, a frame per decision: with environments that reset themselves in the same
    step an episode's last observation is shown, and then the next episode. Frames are kept in memory until `write`
    (two views of 256 pixels are 0.4 MB a decision and environment).

    Args:
        folder: where `rollout_<iteration>.mp4` is written.
        num_envs: environments filmed, from the first on; at most as many as there are.
        interval: iterations from one film to the next; 0 films none.
        fps: frames per second: decisions per second of the robot's time.

    Raises:
        ValueError: `num_envs` is less than 1 or `interval` less than 0.
    """

    def __init__(self, folder: Path, *, num_envs: int, interval: int, fps: float) -> None:
        if num_envs < 1 or interval < 0:
            raise ValueError(f"num_envs={num_envs} must be at least 1 and interval={interval} at least 0 (0: no films)")
        self._folder = folder
        self._num_envs = num_envs
        self._interval = interval
        self._fps = fps
        self._frames: list[list[Frame]] = []

    def films(self, iteration: int) -> bool:
        """Returns whether `iteration` (from 1) is filmed."""
        return self._interval > 0 and (iteration - 1) % self._interval == 0

    def add(
        self, iteration: int, obs: Mapping[str, Any], infos: Mapping[str, Any], ended_mask: NDArray[np.bool_]
    ) -> None:
        """Takes a frame of each filmed environment after a step.

        Args:
            iteration: the trainer's, from 1.
            obs: the step's observation with GR00T's modality keys.
            infos: the step's infos; if an episode ended and `final_obs` and `final_info` are there, they are shown.
            ended_mask: bool [N], True where the step ended an episode.
        """
        if not self.films(iteration):
            return
        count = min(self._num_envs, len(ended_mask))
        self._frames = self._frames or [[] for _ in range(count)]
        for i in range(count):
            ended = bool(ended_mask[i])
            is_reset = ended and "final_obs" in infos
            shown, told = (infos["final_obs"], infos["final_info"]) if is_reset else (obs, infos)
            self._frames[i].append(
                frame_of(
                    shown, i, step=int(told["episode_length"][i]), reward=float(told["episode_return"][i]),
                    success=bool(told["success"][i]), ended=ended,
                )
            )  # fmt: skip

    def write(self, iteration: int) -> Path | None:
        """Writes the iteration's film and forgets its frames; returns the file, or None if nothing was filmed."""
        if not self._frames:
            return None
        path = self._folder / f"rollout_{iteration}.mp4"
        write_tiled_video(path, self._frames, self._fps)
        self._frames = []
        return path


def _to_numpy(image: Any) -> NDArray[np.uint8]:
    """Returns an image, wherever it lies, as an array of its own."""
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else np.array(image)


def _num_views(path: Path, episodes: Sequence[Sequence[Frame]]) -> int:
    views = {len(frame.views) for episode in episodes for frame in episode}
    if not episodes or not all(episodes) or len(views) != 1:
        raise ValueError(
            f"{path} needs at least one episode, each of at least one frame, all frames with the same number of views "
            f"(given: {[len(episode) for episode in episodes]} frames, {sorted(views)} views)"
        )
    return views.pop()


def _checked_columns(columns: int | None, num_tiles: int, width: int, height: int) -> int:
    """Returns the tiles of a row: `columns`, or what makes the picture about 16 by 9."""

    def distance(columns: int) -> float:
        rows = math.ceil(num_tiles / columns)
        return abs(math.log(columns * width / (rows * height) / (16 / 9)))

    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1, or None for about 16 by 9")
    return min(range(1, num_tiles + 1), key=distance) if columns is None else columns


def _decoded(container: InputContainer, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yields the pictures of a video, shrunk to `size` (height, width)."""
    for frame in container.decode(video=0):
        small = frame.reformat(width=size[1], height=size[0], format="rgb24", interpolation="AREA")
        yield np.asarray(small.to_ndarray(), dtype=np.uint8)


def _tiled(
    streams: Sequence[Iterator[NDArray[np.uint8]]], size: tuple[int, int], columns: int
) -> Iterator[NDArray[np.uint8]]:
    """Yields pictures with a tile of `size` (height, width) per stream, which keeps its last picture at its end."""
    height, width = size
    picture = np.zeros((math.ceil(len(streams) / columns) * height, columns * width, 3), dtype=np.uint8)
    while True:
        news = [next(stream, None) for stream in streams]
        if all(new is None for new in news):
            return
        for i, new in enumerate(news):
            if new is not None:
                y, x = i // columns * height, i % columns * width
                picture[y : y + height, x : x + width] = new
        yield picture


def _write_mp4(path: Path, pictures: Iterable[NDArray[np.uint8]], fps: float) -> None:
    with iio.imopen(path, "w", plugin="pyav") as file:
        # What every browser plays; encoders default to other chroma sampling.
        file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        for picture in pictures:
            file.write_frame(picture)


def _write_gif(path: Path, pictures: Sequence[NDArray[np.uint8]], fps: float) -> None:
    if not pictures:
        raise ValueError(f"{path} needs at least one picture")
    # From the last one backwards: colours that tell how episodes ended are there.
    sample = np.concatenate(pictures[:: -math.ceil(len(pictures) / _GIF_SAMPLES)])
    # An octree keeps the colours of small things, which the median cut drops.
    palette = Image.fromarray(sample).quantize(_GIF_COLORS, method=Image.Quantize.FASTOCTREE)
    # Dithering would make still ground flicker, and the file several times as large.
    first, *others = (Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures)
    first.save(path, save_all=True, append_images=others, duration=10 * round(100 / fps), loop=0)
