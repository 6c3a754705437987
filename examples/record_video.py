"""An environment loop that films itself: Gymnasium's `RecordVideo` around `gym.make`.

    pip install ".[watch]"    # the environment, and what RecordVideo writes films with
    python examples/record_video.py --task-id 3

A scripted expert acts, so that the films show something; put a policy of your own in its place. Two episodes take half
a minute on two cores, after the scene was built once (another half minute).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo

import libero_gym  # noqa: F401 - registers the ids
from libero_gym.experts import HUMAN_LIKE, make_expert


def record(suite: str, task_id: int, *, num_episodes: int, image_size: int, output: Path, max_steps: int) -> list[bool]:
    """Films episodes from initial states 0, 1, ... and returns which of them succeeded."""
    env = gym.make(
        f"libero_gym/{suite}-v0",
        task_id=task_id,
        observe_images=False,  # what is filmed has its own size; a policy that sees leaves this out
        render_size=image_size,
        horizon=max_steps or None,
        render_mode="rgb_array",
    )
    env = RecordVideo(env, str(output), episode_trigger=lambda episode: True, name_prefix=f"{suite}-{task_id}")
    env = RecordEpisodeStatistics(env)

    successes: list[bool] = []
    for episode in range(num_episodes):
        obs, info = env.reset(seed=episode, options={"init_state_id": episode})
        world = env.unwrapped.simulation  # the expert looks behind the images; a policy needs `obs` alone
        expert = make_expert(env.unwrapped.task, HUMAN_LIKE)
        expert.reset(world, np.random.default_rng(episode))

        terminated = truncated = False
        while not (terminated or truncated):
            action = expert.act(world)  # float32 [7] within -1..1: motion, rotation, gripper
            obs, _, terminated, truncated, info = env.step(action)

        successes.append(bool(info["success"]))
        print(f"episode {episode}: {obs['task_descriptions']!r}, success={successes[-1]}, {info['episode']['l']} steps")
    env.close()  # writes the last film
    return successes


def main(arguments: list[str] | None = None) -> list[bool]:
    """Parses the command line and films."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_spatial", help="suite, see libero_gym.list_suites()")
    parser.add_argument("--task-id", type=int, default=3, help="task of the suite")
    parser.add_argument("--num-episodes", type=int, default=2, help="episodes to film")
    parser.add_argument("--image-size", type=int, default=512, help="height and width of the film, pixels")
    parser.add_argument("--max-steps", type=int, default=0, help="cut episodes there; 0: at the suite's horizon")
    parser.add_argument("--output", type=Path, default=Path("runs/record_video"), help="folder of the films")
    args = parser.parse_args(arguments)
    return record(**vars(args))


if __name__ == "__main__":
    main()
