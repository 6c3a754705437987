"""The side of `lerobot_interop.py` that runs in an environment with lerobot, and without this project.

    python tools/lerobot_peer.py commands.json

A command is the name of a function below and its arguments.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

VERSION = importlib.metadata.version("lerobot")
# Up to 0.3.3 it wrote v2.1, which has nothing to finalize and takes the task apart from the frame.
IS_V2 = tuple(map(int, VERSION.split(".")[:2])) < (0, 4)
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
FPS, CHUNK = 20, 16


def open_dataset(folder: str, **options) -> LeRobotDataset:
    """Opens a dataset that is in a folder."""
    return LeRobotDataset(f"local/{Path(folder).name}", root=folder, video_backend="pyav", **options)


def write(recording: str, folder: str, storage: str) -> None:
    """Records the arrays of `recording` as lerobot's own recorders do."""
    with np.load(recording) as file:
        content = dict(file)
    image = {"dtype": storage, "shape": content["images"].shape[2:], "names": ["height", "width", "channels"]}
    features = dict.fromkeys(CAMERAS, image)
    for name in ("state", "action"):
        column = "observation.state" if name == "state" else "action"
        width = content[name].shape[1]
        features[column] = {"dtype": "float32", "shape": (width,), "names": [f"{name}_{i}" for i in range(width)]}
    options = dict(fps=FPS, features=features, root=folder, robot_type="panda", use_videos=storage == "video")
    dataset = LeRobotDataset.create("local/written", **options)
    for episode in range(content["episode"].max() + 1):
        for i in np.flatnonzero(content["episode"] == episode):
            frame = {camera: content["images"][i, view] for view, camera in enumerate(CAMERAS)}
            frame |= {"observation.state": content["state"][i], "action": content["action"][i]}
            task = str(content["task"][i])
            if IS_V2:
                dataset.add_frame(frame, task=task)
            else:
                dataset.add_frame(frame | {"task": task})
        dataset.save_episode()
    if not IS_V2:
        dataset.finalize()


def read(folder: str, target: str) -> None:
    """Writes what lerobot reads of every frame: images uint8 [F, V, H, W, 3], state, action chunk, padding ..."""
    dataset = open_dataset(folder, delta_timestamps={"action": [step / FPS for step in range(CHUNK)]})
    frames = [dataset[i] for i in range(len(dataset))]
    images = np.stack([[frame[camera].numpy() for camera in CAMERAS] for frame in frames])
    columns = dict(
        images=(images * 255).round().astype(np.uint8).transpose(0, 1, 3, 4, 2),
        state=np.stack([frame["observation.state"].numpy() for frame in frames]),
        action=np.stack([frame["action"].numpy() for frame in frames]),
        is_pad=np.stack([frame["action_is_pad"].numpy() for frame in frames]),
        task=np.array([frame["task"] for frame in frames]),
        **{
            name: np.array([frame[column].item() for frame in frames])
            for name, column in (("episode", "episode_index"), ("timestamp", "timestamp"))
        },
    )
    np.savez(target, **columns)


def delete(folder: str, target: str, episode: str) -> None:
    """Writes a dataset without one of its episodes."""
    from lerobot.datasets.dataset_tools import delete_episodes

    delete_episodes(open_dataset(folder), [int(episode)], output_dir=target, repo_id="local/deleted")


def merge(folder: str, other: str, target: str) -> None:
    """Writes the episodes of two datasets as one."""
    from lerobot.datasets.dataset_tools import merge_datasets

    merge_datasets([open_dataset(folder), open_dataset(other)], output_repo_id="local/merged", output_dir=Path(target))


if __name__ == "__main__":
    functions = {"write": write, "read": read, "delete": delete, "merge": merge}
    for command, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        functions[command](*arguments)
