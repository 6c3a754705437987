"""Small LeRobot datasets of smooth moving images, for tests of the reader, the writer and the trainer."""

import json
from pathlib import Path

import numpy as np

from gr00t_agent.lerobot_writer import Episode, Recording, Version, assemble_dataset, stage_episode

CAMERAS = ("observation.images.image", "observation.images.wrist_image")
LENGTHS = (20, 5, 17, 18)
PARTS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def modality() -> dict:
    state = {name: {"start": i, "end": i + 1 + (name == "gripper")} for i, name in enumerate(PARTS)}
    return {
        "video": {column.rpartition(".")[2]: {"original_key": column} for column in CAMERAS},
        "state": state,
        "action": {name: {"start": i, "end": i + 1} for i, name in enumerate(PARTS)},
        "annotation": {"human.action.task_description": {"original_key": "task_index"}},
    }


def make_episode(number: int, length: int, size: int = 32) -> Episode:
    rng = np.random.default_rng(number)
    y, x, t = np.meshgrid(np.arange(size), np.arange(size), np.arange(length), indexing="ij")
    channels = [2 * x + 7 * t + 20 * number, 2 * y + 7 * t, 60 + 0 * x + 7 * t]
    image = np.clip(np.moveaxis(np.stack(channels, -1), 2, 0), 0, 255).astype(np.uint8)  # [T, H, W, 3]
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    actions[:, 6] = actions[:, 6] > 0
    return Episode(
        frames={CAMERAS[0]: image, CAMERAS[1]: np.ascontiguousarray(image[:, ::-1])},
        states=rng.normal(size=(length, 8)).astype(np.float32),
        actions=actions,
        instruction=("open the drawer", "close the drawer")[number % 2],
        info={"seed": number},
    )


def write_dataset(
    folder: Path, version: Version, storage: str, lengths=LENGTHS, *, has_constant_actions: bool = False
) -> list[Episode]:
    recording = Recording(storage=storage)
    episodes = [make_episode(i, length) for i, length in enumerate(lengths)]
    for episode in episodes if has_constant_actions else ():
        episode.actions[:] = episode.actions[0]
    staged = [folder.with_name(f"{folder.name}_staged") / f"episode_{i}" for i in range(len(episodes))]
    for path, episode in zip(staged, episodes, strict=True):
        stage_episode(path, episode, recording)
    assemble_dataset(folder, staged, recording, version=version, modality=modality())
    return episodes


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
