"""Reference data and small observations for the agent's tests."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gr00t_agent import Gr00tAgent, PolicyConfig

REFERENCE_DIR = Path(os.environ.get("GR00T_REFERENCE_DIR", Path(__file__).parents[1] / "data" / "gr00t_n1d5"))


class Goldens(NamedTuple):
    """One recorded file: its JSON index and its tensors."""

    index: dict[str, Any]
    tensors: dict[str, Tensor]


def read_goldens(name: str) -> Goldens:
    index = json.loads((REFERENCE_DIR / f"{name}.json").read_text())
    tensors = load_file(REFERENCE_DIR / f"{name}.safetensors")
    for tensor_name, entry in index["tensors"].items():
        assert list(tensors[tensor_name].shape) == entry["shape"], tensor_name
    return Goldens(index, tensors)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The networks here are too small to share out, and waiting threads cost more than they compute."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def forward_goldens() -> Goldens:
    return read_goldens("forward_goldens")


@pytest.fixture(scope="session")
def rl_goldens() -> Goldens:
    return read_goldens("rl_goldens")


@pytest.fixture(scope="session")
def transform_goldens() -> Goldens:
    return read_goldens("transform_goldens")


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    return REFERENCE_DIR / "tiny_checkpoint"


@pytest.fixture(scope="session")
def tiny_agent(tiny_checkpoint: Path) -> Gr00tAgent:
    """The recorded network with padding read as in the reference; eval mode; do not change it."""
    return Gr00tAgent.from_pretrained(tiny_checkpoint, policy=PolicyConfig(padding="left")).eval()


def make_observation(batch: int, seed: int = 0, image_size: int = 64) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    texts = ["open the drawer", "pick up the black bowl from table center and place it on the plate"]
    obs: dict[str, Any] = {
        key: rng.integers(0, 255, (batch, image_size, image_size, 3), dtype=np.uint8)
        for key in ("video.image", "video.wrist_image")
    }
    for part in ("x", "y", "z", "roll", "pitch", "yaw"):
        obs[f"state.{part}"] = rng.uniform(-0.5, 0.5, (batch, 1)).astype(np.float32)
    obs["state.gripper"] = rng.uniform(-0.04, 0.04, (batch, 2)).astype(np.float32)
    obs["annotation.human.action.task_description"] = np.array([texts[i % 2] for i in range(batch)])
    return obs


def noise_of(agent: Gr00tAgent, batch: int) -> Tensor:
    """Initial noise of an agent's own sizes, the same each time."""
    head = agent.config.action_head
    return torch.randn(batch, head.action_horizon, head.action_dim, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def nano_agent() -> Gr00tAgent:
    """A nano network in eval mode; do not change it."""
    torch.manual_seed(0)
    return Gr00tAgent.from_preset("nano").eval()
