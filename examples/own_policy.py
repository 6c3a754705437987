"""A policy of one's own in the vector environment: what it sees, what it returns, how success is counted.

    pip install .
    python examples/own_policy.py --num-envs 8

The policy here is forty lines of NumPy that move the gripper to a point above the table and close it. It solves
nothing; it shows the shapes. Eight episodes take a quarter of a minute on two cores.

Each environment runs one episode: with `autoreset_mode="DISABLED"` an episode that has ended idles, at no cost, until
the others have ended too. One decision is a chunk of `num_action_chunks` actions, after which the environment observes
once.
"""

from __future__ import annotations

import argparse
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import libero_gym  # noqa: F401 - registers the ids


class Policy(Protocol):
    """What `evaluate` asks of a policy."""

    def act(self, obs: dict[str, Any]) -> NDArray[np.float32]:
        """Returns actions [N, C, 7] for observations of N environments."""
        ...


class ReachPolicy:
    """Moves the end effector towards a point by proportional control, then closes the gripper.

    Args:
        target: where to, world frame, m [3].
        num_action_chunks: actions of one decision, C.
    """

    def __init__(self, target: tuple[float, float, float], num_action_chunks: int) -> None:
        self.target = np.asarray(target, dtype=np.float32)
        self.num_action_chunks = num_action_chunks

    def act(self, obs: dict[str, Any]) -> NDArray[np.float32]:
        """Returns actions [N, C, 7]; motions are in units of 5 cm, which one step does not exceed."""
        position = obs["states"][:, :3]  # [N, 3]; obs["images"] is uint8 [N, H, W, 3], here unused
        remaining = (self.target - position) / 0.05  # [N, 3]
        actions = np.zeros((len(position), 7), dtype=np.float32)
        actions[:, :3] = np.clip(remaining / self.num_action_chunks, -1, 1)
        is_there = np.linalg.norm(self.target - position, axis=1) < 0.02
        actions[:, 6] = np.where(is_there, 1.0, -1.0)  # closes, opens
        return np.repeat(actions[:, None], self.num_action_chunks, axis=1)  # [N, C, 7]


def evaluate(policy: Policy, envs: gym.vector.VectorEnv[Any, Any, Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Runs one episode in each environment, initial states 0, 1, ..., and returns what came of it.

    Returns:
        `success` bool [N], `episode_length` int [N] in steps, `states` float32 [N, 8] at the end.
    """
    obs, info = envs.reset(seed=seed, options={"init_state_id": np.arange(envs.num_envs)})
    has_ended = np.zeros(envs.num_envs, dtype=bool)
    success = np.zeros(envs.num_envs, dtype=bool)
    while not has_ended.all():
        obs, _, terminated, truncated, info = envs.step(policy.act(obs))
        success |= terminated
        has_ended |= terminated | truncated
    return {"success": success, "episode_length": info["episode_length"], "states": obs["states"]}


def main(arguments: list[str] | None = None) -> dict[str, NDArray[Any]]:
    """Parses the command line and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_spatial", help="suite, see libero_gym.list_suites()")
    parser.add_argument("--task-id", type=int, default=0, help="task of the suite")
    parser.add_argument("--num-envs", type=int, default=8, help="episodes, all at once; at most 50 states are stored")
    parser.add_argument("--num-action-chunks", type=int, default=5, help="actions of one decision")
    parser.add_argument("--horizon", type=int, default=100, help="steps after which an episode is cut")
    parser.add_argument("--image-size", type=int, default=128, help="height and width of the images, pixels")
    args = parser.parse_args(arguments)

    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0",
        num_envs=args.num_envs,
        vectorization_mode="vector_entry_point",
        task_ids=[args.task_id],
        num_action_chunks=args.num_action_chunks,
        horizon=args.horizon,
        image_size=args.image_size,
        autoreset_mode="DISABLED",
    )
    policy = ReachPolicy(target=(0.0, 0.1, 1.1), num_action_chunks=args.num_action_chunks)
    result = evaluate(policy, envs)
    envs.close()
    print(f"success {result['success'].mean():.0%} of {args.num_envs} episodes, steps {result['episode_length']}")
    print("where the end effectors came to, m:", *np.round(result["states"][:, :3], 2).tolist())
    return result


if __name__ == "__main__":
    main()
