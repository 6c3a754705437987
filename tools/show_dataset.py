"""What is in a LeRobot dataset: a table, a contact sheet and videos.

    python tools/show_dataset.py --dataset runs/data/libero_spatial --output runs/data/shown

Prints episodes and lengths per task and the statistics of every state and action element; writes contact_sheet.png
(one row per shown episode: both views at evenly spaced moments) and, on request, an mp4 per shown episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from algorithms.common.command_line import launch, parse_args
from algorithms.common.video import Frame, write_video
from gr00t_agent.lerobot import LeRobotDataset

CAPTION_HEIGHT = 16


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    dataset: str
    """Folder or hub id of a LeRobot dataset."""
    modality_file: Path | None = None
    """A modality.json for datasets without one; LIBERO's is libero_gym/data/modality.json."""
    output: Path = Path("runs/dataset")
    """Where the contact sheet and the videos are written."""
    episodes_per_task: int = 1
    """Episodes shown of each task."""
    moments: int = 6
    """Moments per episode in the contact sheet."""
    view_size: int = 128
    """Height and width of a view in the contact sheet, pixels."""
    videos: bool = False
    """Write a video of each shown episode too."""


def lengths_table(dataset: LeRobotDataset) -> Table:
    """Returns a table of the tasks with counts and lengths of their episodes."""
    table = Table("task", "episodes", "frames", "steps (min / mean / max)")
    lengths: dict[str, list[int]] = {}
    for entry in dataset.episodes:
        lengths.setdefault(entry.instruction, []).append(entry.length)
    for instruction, of_task in lengths.items():
        steps = f"{min(of_task)} / {np.mean(of_task):.0f} / {max(of_task)}"
        table.add_row(instruction, str(len(of_task)), str(sum(of_task)), steps)
    return table


def statistics_table(dataset: LeRobotDataset) -> Table:
    """Returns a table of what the policy is normalised by."""
    table = Table("element", "min", "q01", "mean", "q99", "max", "std")
    metadata = dataset.metadata()
    for key in (*dataset.data_config.state_keys, *dataset.data_config.action_keys):
        part = metadata.part(key)
        for i in range(len(part["max"])):
            name = key if len(part["max"]) == 1 else f"{key}[{i}]"
            table.add_row(name, *(f"{part[kind][i]:.3f}" for kind in ("min", "q01", "mean", "q99", "max", "std")))
    return table


def contact_sheet(dataset: LeRobotDataset, shown: list[int], moments: int, view_size: int) -> Image.Image:
    """Returns one picture: a row per episode, its views below each other at evenly spaced moments."""
    num_views = len(dataset.cameras)
    row_height = CAPTION_HEIGHT + num_views * view_size
    sheet = Image.new("RGB", (moments * view_size, len(shown) * row_height))
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for row, episode in enumerate(shown):
        entry = dataset.episodes[episode]
        offsets = np.linspace(0, entry.length - 1, moments).round().astype(np.int64)
        images = dataset.images(dataset.starts[episode] + offsets).cpu().numpy()  # [moments, V, H, W, 3]
        top = row * row_height
        caption = f"episode {entry.episode_id}  {entry.length} steps  {entry.instruction}"
        canvas.text((3, top + 1), caption, font=font, fill="white")
        for column in range(moments):
            for view in range(num_views):
                picture = Image.fromarray(images[column, view]).resize((view_size, view_size), Image.Resampling.BICUBIC)
                sheet.paste(picture, (column * view_size, top + CAPTION_HEIGHT + view * view_size))
    return sheet


def first_episodes(dataset: LeRobotDataset, count: int) -> list[int]:
    """Returns the positions of the first `count` episodes of each task, task by task."""
    by_task: dict[str, list[int]] = {}
    for position, entry in enumerate(dataset.episodes):
        by_task.setdefault(entry.instruction, []).append(position)
    return [position for positions in by_task.values() for position in positions[:count]]


def episode_frames(dataset: LeRobotDataset, episode: int) -> list[Frame]:
    """Returns an episode as the frames of a video."""
    entry, start = dataset.episodes[episode], int(dataset.starts[episode])
    images: NDArray[np.uint8] = dataset.images(np.arange(start, start + entry.length)).cpu().numpy()
    return [
        Frame(views=list(views), task=entry.instruction, step=step, reward=0.0, success=step == entry.length - 1)
        for step, views in enumerate(images)
    ]


def main(args: Args) -> Path:
    """Prints the tables, writes the pictures, and returns the contact sheet's path."""
    if args.episodes_per_task < 1 or args.moments < 1 or args.view_size < 1:
        raise ValueError(
            f"episodes_per_task={args.episodes_per_task}, moments={args.moments} and view_size={args.view_size} "
            "must be at least 1"
        )
    dataset = LeRobotDataset(args.dataset, modality_file=args.modality_file)
    console = Console()
    console.print(lengths_table(dataset), statistics_table(dataset))
    shown = first_episodes(dataset, args.episodes_per_task)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "contact_sheet.png"
    contact_sheet(dataset, shown, args.moments, args.view_size).save(path)
    console.print(f"contact sheet  {path}", soft_wrap=True)
    for episode in shown if args.videos else ():
        video = args.output / f"episode_{dataset.episodes[episode].episode_id:06d}.mp4"
        write_video(video, episode_frames(dataset, episode), dataset.fps)
        console.print(f"video          {video}", soft_wrap=True)
    return path


if __name__ == "__main__":
    launch(main, parse_args(Args, __doc__))
