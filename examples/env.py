"""LIBERO's tasks as an environment of LeRobot's EnvHub: the `env.py` of a repository on the hub.

Put this file into a repository of your own. Who has installed LeRobot (without its extra `libero`) and this project
then evaluates a policy there, of those that were trained for LeRobot's own LIBERO environment:

    from lerobot.envs.factory import make_env
    from lerobot.scripts.lerobot_eval import eval_policy_all

    envs = make_env("you/your-repository", n_envs=10, trust_remote_code=True)  # {suite: {task_id: environments}}
    result = eval_policy_all(envs, policy, *processors, n_episodes=50, start_seed=0)

An episode begins at one of the task's 50 stored initial states, drawn by its seed. Policies trained on this project's
demonstrations: `CONVENTION = "demonstrations"`.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

import libero_gym
from libero_gym.adapters import LeRobotConvention, LeRobotVectorEnv

SUITE = "libero_spatial"
CONVENTION: LeRobotConvention = "lerobot"


def make_env(
    n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None
) -> dict[str, dict[int, gym.vector.VectorEnv]]:
    """Returns environments of each task of a suite, as LeRobot's `make_env` asks for them.

    Args:
        n_envs: environments of each task.
        use_async_envs: changes nothing: the environments of a task are stepped side by side, by threads.
        cfg: LeRobot's `EnvConfig`; its `task` names another suite, and its tasks, as in "libero_goal".
    """
    suite = getattr(cfg, "task", None) or SUITE
    return {suite: {task.task_id: _make_task(suite, task.task_id, n_envs) for task in libero_gym.list_tasks(suite)}}


def _make_task(suite: str, task_id: int, num_envs: int) -> LeRobotVectorEnv:
    envs = gym.make_vec(
        f"libero_gym/{suite}-v0",
        num_envs=num_envs,
        task_id=task_id,
        observe_text=False,  # LeRobot asks for `task_description` instead
        autoreset_mode="SAME_STEP",
    )
    return LeRobotVectorEnv(envs, convention=CONVENTION)
