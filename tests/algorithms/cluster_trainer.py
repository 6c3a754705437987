"""The asynchronous trainer on the line environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gymnasium.vector import AutoresetMode

from algorithms import async_ppo_gr00t
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import DEFAULTS, make_mlp_agent


def make_line_envs(
    args: Any, num_envs: int, image_size: int, autoreset: Any = AutoresetMode.SAME_STEP, num_threads: int | None = None
) -> LineVectorEnv:
    return LineVectorEnv(num_envs, args.num_action_chunks, autoreset=autoreset, image_size=image_size)


def train(folder: Path, make_envs: Any = make_line_envs, make_agent: Any = make_mlp_agent, **changes: Any) -> Any:
    args = async_ppo_gr00t.Args(**(DEFAULTS["ppo"] | dict(output_dir=Path(folder)) | changes))
    return async_ppo_gr00t.main(args, make_agent, make_envs)
