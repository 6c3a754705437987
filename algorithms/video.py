"""Videos of episodes, with what happened written on every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CAPTION_HEIGHT = 48
VIEW_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One moment of an episode.

    Attributes:
        views: camera images uint8 [H, W, 3], shown side by side.
        task: the instruction.
        step: environment steps taken in the episode.
        reward: the episode's return so far.
        success: True once the episode has succeeded.
    """

    views: Sequence[NDArray[np.uint8]]
    task: str
    step: int
    reward: float
    success: bool


def draw(frame: Frame) -> NDArray[np.uint8]:
    """Returns `frame` as one picture: its views, `VIEW_SIZE` pixels high, above a caption."""
    width = VIEW_SIZE * len(frame.views)
    picture = Image.new("RGB", (width, VIEW_SIZE + CAPTION_HEIGHT))
    for i, view in enumerate(frame.views):
        picture.paste(
            Image.fromarray(view).resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.BICUBIC), (i * VIEW_SIZE, 0)
        )
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    task = frame.task
    while canvas.textlength(task, font=font) > width - 12:
        task = task.removesuffix("...")[:-1] + "..."
    canvas.text((6, VIEW_SIZE + 4), task, font=font, fill="white")
    outcome, colour = ("yes", "lightgreen") if frame.success else ("no", "lightgray")
    status = f"step {frame.step:4d}   reward {frame.reward:4.1f}   success {outcome}"
    canvas.text((6, VIEW_SIZE + 25), status, font=font, fill=colour)
    return np.asarray(picture)


def write_video(path: Path, frames: Sequence[Frame], fps: float) -> None:
    """Writes `frames` as an H.264 mp4; raises ValueError if there are none."""
    if not frames:
        raise ValueError(f"no frames for {path}: record at least one step of the episode")
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(
        path, np.stack([draw(f) for f in frames]), fps=fps, codec="libx264", plugin="FFMPEG", macro_block_size=8
    )
