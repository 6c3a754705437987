"""A robot of one's own: other cameras, state and action parts, and its own statistics; fine-tuned, saved, run again.

    python examples/own_robot.py

A `DataConfig` says what the policy reads and writes, in order, and how each part is normalised; a `DatasetMetadata`
holds the statistics that normalisation needs. The demonstrations here are made up in memory, so that the example is
whole in itself; recorded ones come from `gr00t_agent.lerobot.LeRobotDataset(folder, data_config=...)`, whose
`metadata()` is what `make_metadata` computes here (docs/checkpoints.md says which files it wants). Thirty steps of
fine-tuning take half a minute on two cores.

The file also serves by name, wherever a data config is asked for: `load_data_config("examples/own_robot.py:Gripper")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from gr00t_agent import DataConfig, DatasetMetadata, Gr00tAgent, PolicyConfig

# A gripper over a bin: one camera, joint angles and fingers in, joint velocities and fingers out.
Gripper = DataConfig(
    embodiment_tag="bin_gripper",
    video_keys=("video.bin",),
    state_keys=("state.joints", "state.fingers"),
    action_keys=("action.joints", "action.fingers"),
    state_modes={"state.joints": "mean_std"},  # parts that are not named are brought to -1..1 by min and max
    action_modes={"action.fingers": "binary"},
    crop_scale=1.0,
)
WIDTHS = {"state.joints": 6, "state.fingers": 1, "action.joints": 6, "action.fingers": 1}
RESOLUTION = (96, 72)  # width, height in pixels


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    num_steps: int = 30
    """Steps of fine-tuning."""
    batch_size: int = 16
    """Demonstrated chunks per step."""
    learning_rate: float = 3e-4
    """AdamW's step size."""
    seed: int = 0
    """Seed of the demonstrations, the network's weights and the training noise."""
    output: Path = Path("runs/own_robot")
    """Where the checkpoint is written."""


def make_demonstrations(num: int, horizon: int, rng: np.random.Generator) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Makes up `num` moments: return to zero from where the joints are, and close the fingers where it is dark.

    Returns:
        Observations, with arrays [num, ...], and actions float32 [num, horizon, 7] in the order of `action_keys`.
    """
    width, height = RESOLUTION
    is_dark = rng.random(num) < 0.5
    joints = rng.uniform(-1.5, 1.5, (num, WIDTHS["state.joints"])).astype(np.float32)
    obs = {
        "video.bin": np.where(is_dark, 40, 200).astype(np.uint8)[:, None, None, None]
        + rng.integers(0, 40, (num, height, width, 3), dtype=np.uint8),
        "state.joints": joints,
        "state.fingers": rng.uniform(0, 0.08, (num, WIDTHS["state.fingers"])).astype(np.float32),
        Gripper.language_key: np.array(["empty the bin"] * num),
    }
    decay = 0.9 ** np.arange(horizon)  # [horizon]
    motion = -0.1 * joints[:, None] * decay[:, None]  # [num, horizon, 6]
    fingers = np.repeat(is_dark[:, None, None], horizon, axis=1)  # [num, horizon, 1]
    return obs, np.concatenate([motion, fingers], axis=-1).astype(np.float32)


def statistics(values: NDArray[np.float32]) -> dict[str, list[float]]:
    """Returns the statistics of each element of one part, values [..., width]."""
    flat = values.reshape(-1, values.shape[-1])
    rows = {
        "max": flat.max(0),
        "min": flat.min(0),
        "mean": flat.mean(0),
        "std": flat.std(0),
        "q01": np.quantile(flat, 0.01, axis=0),
        "q99": np.quantile(flat, 0.99, axis=0),
    }
    return {name: row.tolist() for name, row in rows.items()}


def make_metadata(obs: dict[str, Any], actions: NDArray[np.float32]) -> DatasetMetadata:
    """Returns the statistics and camera sizes of demonstrations, as a checkpoint keeps them."""
    ends = np.cumsum([WIDTHS[key] for key in Gripper.action_keys])
    parts = dict(zip(Gripper.action_keys, np.split(actions, ends[:-1], axis=-1), strict=True))
    return DatasetMetadata(
        embodiment_tag=Gripper.embodiment_tag,
        statistics={
            "state": {key.removeprefix("state."): statistics(obs[key]) for key in Gripper.state_keys},
            "action": {key.removeprefix("action."): statistics(part) for key, part in parts.items()},
        },
        modalities={"video": {"bin": {"resolution": list(RESOLUTION), "channels": 3, "fps": 10.0}}},
    )


def main(args: Args) -> list[float]:
    """Fine-tunes, saves, loads and acts; returns the loss of each step."""
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    obs, actions = make_demonstrations(512, Gripper.action_horizon, rng)

    agent = Gr00tAgent.from_preset(
        "nano",  # or "gr00t_n1d5"; from_pretrained takes the same two arguments
        policy=PolicyConfig(num_action_chunks=8, embodiment_id=0),  # which of the network's 32 sets of weights
        data_config=Gripper,
        metadata=make_metadata(obs, actions),
    )
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad], lr=args.learning_rate)

    losses: list[float] = []
    for step in range(args.num_steps):
        rows = rng.integers(0, len(actions), args.batch_size)
        batch = {key: value[rows] for key, value in obs.items()}
        loss = agent.sft_loss(batch, torch.from_numpy(actions[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == args.num_steps - 1:
            print(f"step {step}: flow-matching loss {losses[-1]:.3f}")

    agent.save_pretrained(args.output)  # weights, data config, statistics, tokenizer
    agent = Gr00tAgent.from_pretrained(args.output).eval()
    seen = {key: value[:2] for key, value in obs.items()}
    print("actions for two observations:", tuple(agent.predict(seen).shape))  # [2, C, 7]
    return losses


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
