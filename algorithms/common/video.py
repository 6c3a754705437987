"""Videos of episodes, with what happened written on every frame.

`write_video` shows one episode, `write_tiled_video` several films side by side, and `write_pictures` pictures of any
kind, also as a GIF. `RolloutRecorder` films what a trainer's first environments do while it collects a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gr00t_agent.files import whole_file
from libero_gym.conventions import CONTROL_FREQUENCY_HZ as CONTROL_FREQUENCY_HZ

CAPTION_HEIGHT = 48
VIEW_SIZE = 256
IMAGE_KEYS = ("video.image", "video.wrist_image")
VIDEO_SUFFIXES = (".mp4", ".gif")
TASK_KEY = "annotation.human.action.task_description"

_SUCCESS, _FAILURE, _RUNNING = (18, 84, 38), (110, 28, 28), (0, 0, 0)
_ROLLOUT_VIEW_SIZE = 192
# Colours of a GIF, and the number of its pictures that they are chosen from.
_GIF_COLORS, _GIF_SAMPLES = 256, 8
# Largest denominator of a rate of pictures that an mp4 can have.
_MAX_RATE = 65535

Picture = NDArray[np.uint8]
"""[H, W, 3]."""


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

    views: Sequence[Picture]
    task: str
    step: int
    reward: float
    success: bool
    ended: bool = False


def frame_of(
    obs: Mapping[str, Any], env_id: int, *, step: int, reward: float, success: bool, ended: bool = False
) -> Frame:
    """Returns what environment `env_id` of a vector environment shows.

    Args:
        obs: observation with GR00T's modality keys; images may lie on any device.
        env_id: which environment.
        step: see `Frame`, as the others.
        reward: the episode's return so far.
        success: True once the episode has succeeded.
        ended: True in the episode's last frame.
    """
    images = [obs[key][env_id] for key in IMAGE_KEYS]
    # Arrays of their own: environments may write into theirs.
    views = [image.cpu().numpy() if isinstance(image, torch.Tensor) else np.array(image) for image in images]
    return Frame(views=views, task=str(obs[TASK_KEY][env_id]), step=step, reward=reward, success=success, ended=ended)


def picture_of(frame: Frame, view_size: int = VIEW_SIZE) -> Picture:
    """Returns a frame's views, `view_size` pixels high, above a caption.

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


def write_video(path: Path, frames: Iterable[Frame], fps: float) -> None:
    """Writes an episode; see `write_pictures`."""
    write_pictures(path, (picture_of(frame) for frame in frames), fps)


def write_tiled_video(
    path: Path, films: Sequence[Iterable[Picture]], fps: float, *, columns: int | None = None, width: int = 1920
) -> None:
    """Writes several films as one, each in its own tile, all begun together; see `write_pictures`.

    A film that is over keeps showing its last picture.

    Args:
        path: the file.
        films: pictures of each; all of one size.
        fps: pictures per second.
        columns: tiles in a row; None makes the whole about 16 by 9.
        width: of the whole, pixels; tiles are shrunk if they need more.

    Raises:
        ValueError: there is no film, one has no pictures, they differ in size, or `columns` is less than 1.
    """
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1, or None for about 16 by 9")
    write_pictures(path, _side_by_side(films, columns, width), fps)


def write_pictures(path: Path, pictures: Iterable[Picture], fps: float) -> None:
    """Writes pictures as an H.264 mp4, or as a GIF that repeats for ever; whole or not at all.

    Args:
        path: the file; its suffix, .mp4 or .gif, decides.
        pictures: of one size; for an mp4 with even height and width. A GIF keeps them all in memory, has one palette
            for all (so that what does not move costs nothing), and shows each for a whole number of hundredths of a
            second.
        fps: pictures per second.

    Raises:
        ValueError: the suffix is another one, there is no picture, or they differ in size.
    """
    if path.suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r} (valid: {', '.join(VIDEO_SUFFIXES)})")
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    with whole_file(path) as temporary:
        write(temporary, _of_one_size(pictures), fps)


def read_pictures(path: Path) -> Iterator[Picture]:
    """Yields the pictures of an mp4 that `write_pictures` wrote, as compression left them."""
    converter = VideoReformatter()
    with av.open(str(path)) as film:
        for frame in film.decode(video=0):
            picture: Any = converter.reformat(frame, format="rgb24").to_ndarray()
            yield picture


def titled(pictures: Iterable[Picture], title: str) -> Iterator[Picture]:
    """Yields the pictures with a title in their upper left corner."""
    font = ImageFont.load_default(size=20)
    for picture in pictures:
        image = Image.fromarray(picture)
        canvas = ImageDraw.Draw(image)
        canvas.rectangle(canvas.textbbox((10, 6), title, font=font), fill="black")
        canvas.text((10, 6), title, font=font, fill="white")
        yield np.asarray(image)


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
            length, episode_return = int(told["episode_length"][i]), float(told["episode_return"][i])
            success = bool(told["success"][i])
            frame = frame_of(shown, i, step=length, reward=episode_return, success=success, ended=ended)
            self._frames[i].append(frame)

    def forget(self) -> None:
        """Forgets frames that were not written, of a rollout that is played again."""
        self._frames = []

    def write(self, iteration: int) -> Path | None:
        """Writes the iteration's film and forgets its frames; returns the file, or None if nothing was filmed."""
        if not self._frames:
            return None
        path = self._folder / f"rollout_{iteration}.mp4"
        films = [(picture_of(frame, _ROLLOUT_VIEW_SIZE) for frame in frames) for frames in self._frames]
        write_tiled_video(path, films, self._fps)
        self.forget()
        return path


def _of_one_size(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Yields the pictures; raises ValueError if there is none or one differs in size from the first."""
    shape: tuple[int, ...] | None = None
    for picture in pictures:
        shape = shape or picture.shape
        if picture.shape != shape:
            raise ValueError(f"pictures of a video are of one size, but {shape} is followed by {picture.shape}")
        yield picture
    if shape is None:
        raise ValueError("a video needs at least one picture")


def _side_by_side(films: Sequence[Iterable[Picture]], columns: int | None, width: int) -> Iterator[Picture]:
    shown: list[Picture | None] = [None] * len(films)
    for news in zip_longest(*films):
        shown = [old if new is None else new for old, new in zip(shown, news, strict=True)]
        tiles = [picture for picture in shown if picture is not None]
        if len(tiles) != len(films) or len({tile.shape for tile in tiles}) > 1:
            sizes = [None if picture is None else picture.shape for picture in shown]
            raise ValueError(f"films side by side need pictures of one size, at least one each (given: {sizes})")
        yield _tiled(tiles, columns, width)


def _tiled(tiles: Sequence[Picture], columns: int | None, width: int) -> Picture:
    height, full_width, _ = tiles[0].shape

    def distance(columns: int) -> float:
        rows = math.ceil(len(tiles) / columns)
        return abs(math.log(columns * full_width / (rows * height) / (16 / 9)))

    columns = columns or min(range(1, len(tiles) + 1), key=distance)
    scale = min(1.0, width / (columns * full_width))
    size = round(full_width * scale / 2) * 2, round(height * scale / 2) * 2
    whole = Image.new("RGB", (columns * size[0], math.ceil(len(tiles) / columns) * size[1]))
    for i, tile in enumerate(tiles):
        image = Image.fromarray(tile)
        small = image if image.size == size else image.resize(size, Image.Resampling.BOX)
        whole.paste(small, (i % columns * size[0], i // columns * size[1]))
    return np.asarray(whole)


def _write_mp4(path: Path, pictures: Iterator[Picture], fps: float) -> None:
    first = next(pictures)
    converter = VideoReformatter()  # a frame's own would keep its threads for as long as this one lives
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(_MAX_RATE))
        stream.height, stream.width = first.shape[:2]
        # What every browser plays; encoders default to other chroma sampling.
        stream.pix_fmt = "yuv420p"
        for picture in chain([first], pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            film.mux(stream.encode(converter.reformat(frame, format="yuv420p")))
        film.mux(stream.encode(None))


def _write_gif(path: Path, pictures: Iterator[Picture], fps: float) -> None:
    everything = list(pictures)
    # From the last one backwards: colours that tell how episodes ended are there.
    sample = np.concatenate(everything[:: -math.ceil(len(everything) / _GIF_SAMPLES)])
    # An octree keeps the colours of small things, which the median cut drops.
    palette = Image.fromarray(sample).quantize(_GIF_COLORS, method=Image.Quantize.FASTOCTREE)
    # Dithering would make still ground flicker, and the file several times as large.
    first, *others = (Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.NONE) for p in everything)
    first.save(path, save_all=True, append_images=others, duration=10 * round(100 / fps), loop=0)
