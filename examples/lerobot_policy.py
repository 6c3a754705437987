"""A policy that LeRobot trained on this project's demonstrations, evaluated by LeRobot's own `eval_policy`.

    pip install . lerobot==0.4.4       # without LeRobot's extra `libero`, which writes over the installed LIBERO
    python examples/lerobot_policy.py --policy outputs/train/checkpoints/last/pretrained_model --task-id 3

LeRobot's policies act as data sets do: a gripper of 1 is open, of 0 closed. The environment opens at -1 and closes at
1, which is `1 - 2 * gripper`. `libero_gym.adapters.LeRobotVectorEnv` says so, and renames observations as LeRobot's
environments name them. Policies that were trained on LeRobot's own data sets of LIBERO: `convention="lerobot"`.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym

import libero_gym  # noqa: F401 - registers the ids
from libero_gym.adapters import LeRobotVectorEnv


def make_envs(suite: str, task_id: int, num_envs: int, **options: Any) -> LeRobotVectorEnv:
    """Returns environments for LeRobot's evaluation."""
    envs = gym.make_vec(
        f"libero_gym/{suite}-v0",
        num_envs=num_envs,
        task_id=task_id,
        observe_text=False,  # LeRobot asks `envs[0].task_description` instead
        autoreset_mode="SAME_STEP",
        **options,
    )
    return LeRobotVectorEnv(envs)


def evaluate(policy: Any, processors: tuple[Any, Any], envs: LeRobotVectorEnv, num_episodes: int) -> dict[str, Any]:
    """Returns what LeRobot's `eval_policy` says of a policy with its pre- and postprocessor."""
    from lerobot.processor import PolicyProcessorPipeline  # not needed by the wrapper
    from lerobot.scripts.lerobot_eval import eval_policy

    unchanged = PolicyProcessorPipeline(steps=[])
    result = eval_policy(envs, policy, unchanged, unchanged, *processors, n_episodes=num_episodes, start_seed=0)
    return result["aggregated"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parses the command line and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="folder of LeRobot's checkpoint, `pretrained_model`")
    parser.add_argument("--suite", default="libero_spatial", help="suite, see libero_gym.list_suites()")
    parser.add_argument("--task-id", type=int, default=3, help="task of the suite")
    parser.add_argument("--num-envs", type=int, default=10, help="environments side by side")
    parser.add_argument("--num-episodes", type=int, default=50, help="episodes to evaluate")
    args = parser.parse_args(arguments)

    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(args.policy)
    policy = get_policy_class(config.type).from_pretrained(args.policy, config=config)
    processors = make_pre_post_processors(config, pretrained_path=args.policy)
    envs = make_envs(args.suite, args.task_id, args.num_envs)
    result = evaluate(policy, processors, envs, args.num_episodes)
    print(result)
    envs.close()
    return result


if __name__ == "__main__":
    main()
