"""Both trainers learn: a bandit to its optimum, and a LIBERO task that begins near its end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import learning
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import train


class ContextualBandit(LineVectorEnv):
    """One decision an episode: right if its first action components have, on average, the sign of the state.

    A policy that does not look at the state is right half of the time on average; certainty is the optimum.
    """

    def step(self, actions: np.ndarray) -> Any:
        chunks = actions.reshape(self.num_envs, -1, 7)
        live = ~self.idle
        success = live & (np.sign(chunks[:, :, 0].mean(1)) == np.sign(self.x))
        self.length = np.where(live, chunks.shape[1], self.length)
        infos: dict[str, Any] = dict(
            num_steps=live * chunks.shape[1], success=success, task_id=np.zeros(self.num_envs, np.int64),
            init_state_id=self.state_id.copy(), episode_length=self.length.copy(), episode_return=success.astype(float),
        )  # fmt: skip
        if self.metadata["autoreset_mode"].name == "DISABLED":
            self.idle |= live
        else:
            infos |= {"final_info": dict(infos), "final_obs": self.observe()}
            self.restart(live)
        return self.observe(), success.astype(np.float64), live, np.zeros_like(live), infos


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_bandit_is_solved(tmp_path: Path, algorithm: str, seed: int):
    options: dict[str, Any] = dict(env=ContextualBandit, seed=seed, num_envs=32, num_iterations=25)
    if algorithm == "grpo":
        options |= dict(num_groups=4, max_rollouts=2)
    else:
        options |= dict(num_steps=4)
    train(algorithm, tmp_path, **options)
    (file,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    success = [line["env/success_once"] for line in lines if "env/success_once" in line]
    assert success[0] <= 0.75
    assert np.mean(success[-5:]) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "num_iterations"), [("ppo", 16), ("grpo", 20)])
def test_a_libero_task_that_begins_near_its_end_is_solved(tmp_path: Path, algorithm: Any, num_iterations: int):
    """One seed of `benchmarks/learning.py`, shortened: opening a drawer whose handle the hand holds already."""
    lines = learning.train(algorithm, 1, tmp_path, num_iterations=num_iterations)
    lines = [line for line in lines if "env/success_once" in line]
    before, after = (learning.success_of(part) for part in (lines[:1], lines[-3:]))
    assert before[0] / before[1] <= 0.5
    assert after[0] / after[1] >= 0.9
