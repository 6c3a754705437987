"""Compares this project's reader and writer of LeRobot datasets with the public `lerobot` package, frame by frame.

    python tools/lerobot_interop.py --peer .venv-lerobot/bin/python

`--peer` is the Python of an environment of its own that has lerobot and nothing of this project: 0.6 reads and writes
layout v3.0 (Python >= 3.12), 0.3 layout v2.1. `make test-lerobot` makes one and runs this. For videos and for images,
each package reads what the other wrote, what lerobot's editing tools made of both, and what it wrote itself.

Numbers, instructions, timestamps, action chunks and their padding must be equal. Pixels must be equal between the two
readers, to `PIXEL_TOLERANCE` in videos. Against what was recorded, images are equal; videos are within the codec's
error, and nearer to the recorded frame than to its neighbours.

Prints a table, then one JSON document as its last line; the exit status is 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gr00t_agent import LiberoFrankaDataConfig, lerobot_writer
from gr00t_agent.lerobot import LeRobotDataset
from gr00t_agent.lerobot_writer import Episode, Recording, Version, assemble_dataset, stage_episode

PEER_SCRIPT = Path(__file__).with_name("lerobot_peer.py")
MODALITY_FILE = Path(__file__).parents[1] / "libero_gym" / "data" / "modality.json"
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
LENGTHS = (13, 20, 1, 30, 17)
TASKS = ("pick up the black bowl", 'open the "top" drawer — öffne sie', "line\u2028separator\x85in a task")
SIZE = 64
# Frames of a video may be decoded by another release of FFmpeg's libraries, whose conversion to RGB rounds otherwise.
PIXEL_TOLERANCE = 2
# Mean error of a frame of the recorded, moving gradients.
CODEC_TOLERANCE = 4.0

Arrays = dict[str, NDArray[Any]]


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    peer: Path
    """Python of an environment that has lerobot."""
    output: Path | None = None
    """Where the datasets are written and stay; a temporary folder if not given."""


def recording() -> Arrays:
    """Returns what is recorded: images uint8 [F, V, H, W, 3], state [F, 8], action [F, 7], episode and task [F]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    images: list[NDArray[np.uint8]] = []
    for episode, length in enumerate(LENGTHS):
        for k in range(length):
            planes = [2 * x + 4 * k, 2 * y + 4 * k, np.full_like(x, 30 * episode + 4 * k)]
            view = np.stack(planes, -1).clip(0, 255).astype(np.uint8)
            images.append(np.stack([view, view[:, ::-1]]))
    total = sum(LENGTHS)
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return dict(
        images=np.stack(images),
        state=rng.normal(size=(total, 8)).astype(np.float32),
        action=rng.uniform(-1, 1, (total, 7)).astype(np.float32),
        episode=episode,
        task=np.array([TASKS[i % len(TASKS)] for i in episode]),
        timestamp=np.concatenate([np.arange(length) / 20 for length in LENGTHS]).astype(np.float32),
    )


def write_ours(folder: Path, recorded: Arrays, storage: Any, version: Version) -> None:
    """Writes the recording by our writer."""
    settings = Recording(storage=storage)
    staged: list[Path] = []
    for i in range(len(LENGTHS)):
        rows = recorded["episode"] == i
        staged.append(folder.with_name(f"{folder.name}_staged") / f"{i}")
        episode = Episode(
            frames={camera: recorded["images"][rows, view] for view, camera in enumerate(CAMERAS)},
            states=recorded["state"][rows],
            actions=recorded["action"][rows],
            instruction=str(recorded["task"][rows][0]),
        )
        stage_episode(staged[-1], episode, settings)
    # An episode a file, so that places in several files are compared; but lerobot wants a size above 0 to be stated.
    with patch.multiple(lerobot_writer, DATA_FILE_MB=0, VIDEO_FILE_MB=0):
        assemble_dataset(folder, staged, settings, version=version, modality=json.loads(MODALITY_FILE.read_text()))
    info_file = folder / "meta" / "info.json"
    info = json.loads(info_file.read_text())
    info_file.write_text(json.dumps(info | dict(data_files_size_in_mb=100, video_files_size_in_mb=200)))


def read_ours(folder: Path) -> Arrays:
    """Returns what our reader reads of every frame, by the names that the peer uses."""
    config = LiberoFrankaDataConfig(gripper_key=None)
    dataset = LeRobotDataset(folder, data_config=config, modality_file=MODALITY_FILE)
    obs, actions, step_mask = dataset.batch(np.arange(len(dataset)))
    return dict(
        images=np.stack([obs[key].numpy() for key in config.video_keys], axis=1),
        state=np.concatenate([obs[key] for key in config.state_keys], axis=1),
        action=actions.numpy(),
        is_pad=~step_mask.numpy(),
        task=np.array(obs[config.language_key]),
        episode=np.array([dataset.episodes[i].episode_id for i in dataset.episode_of_frame]),
    )


def chunks(recorded: Arrays, rows: NDArray[np.intp]) -> Arrays:
    """Returns the recording of some rows, whole episodes, as a reader should give it."""
    lengths = np.bincount(recorded["episode"][rows])
    lengths = lengths[lengths > 0]
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # [F], of the row's episode
    ends = starts + np.repeat(lengths, lengths)
    steps = np.arange(len(rows))[:, None] + np.arange(16)  # [F, 16]
    chosen: Arrays = {name: values[rows] for name, values in recorded.items()}
    chosen["action"] = chosen["action"][np.minimum(steps, ends[:, None] - 1)]
    chosen["is_pad"] = steps >= ends[:, None]
    chosen["episode"] = np.repeat(np.arange(len(lengths)), lengths)
    return chosen


def differences(found: Arrays, expected: Arrays) -> list[str]:
    """Returns the names of what is not equal, images aside."""
    names = [name for name in found if name != "images" and name in expected]
    return [name for name in names if not np.array_equal(found[name], expected[name])]


def is_recorded(images: NDArray[np.uint8], expected: Arrays, storage: str) -> bool:
    """Returns whether images are those recorded: exactly, or in a video within its error and nearer than neighbours."""
    written = expected["images"].astype(int)
    if storage == "image":
        return np.array_equal(images, written)
    errors = [np.abs(images - np.roll(written, shift, axis=0)).mean((1, 2, 3, 4)) for shift in (-1, 0, 1)]
    # Saturated gradients do not differ from their neighbours.
    moves = np.abs(written - np.roll(written, 1, axis=0)).mean((1, 2, 3, 4)) > 3
    moves &= np.roll(moves, -1)
    return bool(errors[1].max() < CODEC_TOLERANCE and (np.argmin(errors, axis=0)[moves] == 1).all() and moves.any())


class Peer:
    """lerobot in its own environment, with caches of its own and without a network."""

    def __init__(self, python: Path, base: Path) -> None:
        self.python, self.base = python, base
        self.environment = dict(os.environ, HF_HOME=str(base / "hub"), HF_HUB_OFFLINE="1", PYTHONPATH="", SVT_LOG="1")
        self.version = self._run("-c", "import importlib.metadata as m; print(m.version('lerobot'))").strip()
        self.layout: Version = "v2.1" if self.version.startswith("0.3.") else "v3.0"

    def _run(self, *arguments: str) -> str:
        call = [str(self.python), *arguments]
        done = subprocess.run(call, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"lerobot failed: {' '.join(call)}\n{done.stderr}")
        return done.stdout

    def run(self, commands: list[list[str]]) -> None:
        """Runs commands of lerobot_peer.py in one process: importing lerobot takes longer than most of them."""
        file = self.base / "commands.json"
        file.write_text(json.dumps(commands))
        self._run(str(PEER_SCRIPT), str(file))


@dataclass(frozen=True)
class Case:
    """A dataset to be read by both packages, and which rows of the recording it holds."""

    name: str
    storage: str
    folder: Path
    rows: NDArray[np.intp]

    @property
    def read_by_peer(self) -> Path:
        """Where lerobot's reading of it is kept."""
        return self.folder.with_name(f"{self.folder.name}.npz")


def plan(base: Path, layout: Version, recorded: Arrays) -> tuple[list[Case], list[list[str]]]:
    """Returns the datasets to compare, and what lerobot has to do for them once ours are written."""
    everything, without = np.arange(len(recorded["episode"])), np.flatnonzero(recorded["episode"] != 1)
    cases: list[Case] = []
    commands: list[list[str]] = []
    for storage in ("video", "image"):
        ours, theirs = base / f"ours_{storage}", base / f"lerobot_{storage}"
        commands.append(["write", str(base / "recording.npz"), str(theirs), storage])
        cases += [Case("written by us", storage, ours, everything), Case("by lerobot", storage, theirs, everything)]
        for folder in (ours, theirs) if layout == "v3.0" else ():
            deleted = folder.with_name(f"{folder.name}_deleted")
            commands.append(["delete", str(folder), str(deleted), "1"])
            cases.append(Case(f"{folder.name}, an episode deleted by lerobot", storage, deleted, without))
        if layout == "v3.0":
            merged = base / f"merged_{storage}"
            commands.append(["merge", str(ours), f"{ours}_deleted", str(merged)])
            cases.append(Case("both of ours merged by lerobot", storage, merged, np.concatenate([everything, without])))
    return cases, commands + [["read", str(case.folder), str(case.read_by_peer)] for case in cases]


def compare(case: Case, expected: Arrays) -> dict[str, Any]:
    """Reads a dataset, and returns what differs from lerobot's reading or from what it should hold."""
    ours = read_ours(case.folder)
    with np.load(case.read_by_peer, allow_pickle=False) as file:
        theirs = dict(file)
    pixels = np.abs(ours["images"].astype(int) - theirs["images"].astype(int))
    allowed = 0 if case.storage == "image" else PIXEL_TOLERANCE
    wrong = [f"ours: {name}" for name in differences(ours, expected)]
    wrong += [f"lerobot: {name}" for name in differences(theirs, expected)]
    wrong += ["pixels between readers"] if pixels.max() > allowed else []
    wrong += [] if is_recorded(ours["images"], expected, case.storage) else ["pixels against the recording"]
    return dict(frames=len(ours["images"]), largest_pixel_difference=int(pixels.max()), wrong=wrong)


def main(args: Args) -> bool:
    """Runs all comparisons and returns whether everything agrees."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) if args.output is None else args.output
        base.mkdir(parents=True, exist_ok=True)
        peer = Peer(args.peer, base)
        recorded = recording()
        np.savez(base / "recording.npz", **cast("dict[str, Any]", recorded))
        for storage in ("video", "image"):
            write_ours(base / f"ours_{storage}", recorded, storage, peer.layout)
        cases, commands = plan(base, peer.layout, recorded)
        peer.run(commands)
        results = {f"{case.storage}, {case.name}": compare(case, expected_of(recorded, case.rows)) for case in cases}
    table = Table(f"lerobot {peer.version}, {peer.layout}", "frames", "largest difference of a pixel", "wrong")
    for name, row in results.items():
        table.add_row(name, str(row["frames"]), str(row["largest_pixel_difference"]), ", ".join(row["wrong"]) or "-")
    Console().print(table)
    print(json.dumps({"lerobot": peer.version, "layout": peer.layout, "results": results}))
    return not any(row["wrong"] for row in results.values())


def expected_of(recorded: Arrays, rows: NDArray[np.intp]) -> Arrays:
    """Returns what is to be read of a dataset with these rows: one part of the recording, or all of it and a part."""
    total = len(recorded["episode"])
    if len(rows) <= total:
        return chunks(recorded, rows)
    first, second = chunks(recorded, rows[:total]), chunks(recorded, rows[total:])
    second["episode"] += len(LENGTHS)
    return {name: np.concatenate([values, second[name]]) for name, values in first.items()}


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Args, description=__doc__)) else 1)
