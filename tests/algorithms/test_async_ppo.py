"""The asynchronous trainer: equal to PPO in turns, staleness, and workers that are killed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file

pytest.importorskip("ray", reason="Ray is not installed (pip install 'libero-gr00t[cluster]')")

from algorithms import async_ppo_gr00t, ppo_gr00t
from examples.own_agent_in_ppo import MLPAgent
from tests.algorithms import cluster_trainer, line_trainer
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import logged
from tests.test_repository import help_texts

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
)
NAME = "ppo_libero_spatial_1"
ADDED = {"rollout/staleness_mean", "rollout/workers_replaced", "rollout/episodes_discarded", "actor/importance_weight"}


def final_weights(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"iteration_{iteration}" / "model.safetensors")


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class Once:
    """Ends this process, once among all that share the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def kill(self) -> None:
        if not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DyingEnv(LineVectorEnv):
    once: Once

    def step(self, actions: Any) -> Any:
        if self.total_steps > 8 * 16 * 2 * 0.7:
            self.once.kill()
        return super().step(actions)


class DyingAgent(MLPAgent):
    """Dies while it decides the second rollout, and while it learns from the second."""

    folder: Path
    decisions = 0

    def forward(self, obs: Any, action: Any = None, *, generator: Any = None) -> Any:
        self.decisions += 1
        if action is None and self.decisions > 24:
            Once(self.folder / "rollout_worker").kill()
        if action is not None and self.decisions > 24:
            Once(self.folder / "learner").kill()
        return super().forward(obs, action, generator=generator)


def test_the_copies_of_arguments_and_formulas_agree():
    ours, theirs = (help_texts(module.Args) for module in (async_ppo_gr00t, ppo_gr00t))
    assert set(theirs) - set(ours) == {"dry_run"}
    defaults = [{f.name: f.default for f in dataclasses.fields(module.Args)} for module in (async_ppo_gr00t, ppo_gr00t)]
    for name in set(theirs) & set(ours):
        assert ours[name] == theirs[name]
        assert defaults[0][name] == defaults[1][name], name
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 6, 50, generator=generator)
    x, y = torch.rand(2, 6, 50, generator=generator) > 0.7
    tokens, executed = a.reshape(6, 5, 10), torch.arange(5) < torch.arange(1, 7)[:, None]
    calls: dict[str, tuple[Any, ...]] = {
        "compute_gae": (a, b, c, x, x | y, 0.9, 0.8),
        "trajectory_weights": (x, torch.full((6, 50), 5), 9),
        "won_decisions": (x, y),
        "policy_loss": (a.flatten(), b.flatten(), 0.2, 0.28, 3.0),
        "value_loss": (a.flatten(), b.flatten(), c.flatten(), 0.2, 1.0),
        "divergence": (a,),
        "of_executed": (tokens, executed, "chunk"),
        "mean_of_executed": (tokens, executed),
        "sum_per_decision": (tokens,),
    }
    for name, inputs in calls.items():
        results = [getattr(module, name)(*inputs) for module in (async_ppo_gr00t, ppo_gr00t)]
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_importance_weights_by_hand():
    weights = async_ppo_gr00t.importance_weights(torch.tensor([0.0, math.log(2), 9.0]), torch.zeros(3), 5.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 5.0]))


@pytest.mark.slow
@pytest.mark.usefixtures("local_cluster")
def test_in_turns_it_is_ppo_also_after_a_rollout_worker_and_a_learner_were_killed(tmp_path: Path):
    options: dict[str, Any] = dict(num_iterations=3, save_interval=1)
    line_trainer.train("ppo", tmp_path / "ppo", **options)

    def make_dying(args: Any) -> DyingAgent:
        agent = DyingAgent(("state.x",), 1, args.num_action_chunks)
        agent.folder = tmp_path
        return agent

    cluster_trainer.train(tmp_path / "async", make_agent=make_dying, **options)
    assert (tmp_path / "rollout_worker").exists()
    assert (tmp_path / "learner").exists()
    runs = [tmp_path / name / NAME for name in ("ppo", "async")]
    plain, other = (logged(run) for run in runs)
    assert [{k: v for k, v in line.items() if k not in ADDED} for line in other] == plain
    assert all(torch.equal(w, final_weights(runs[1], 3)[name]) for name, w in final_weights(runs[0], 3).items())


@pytest.mark.slow
@pytest.mark.usefixtures("local_cluster")
def test_weights_are_as_old_as_allowed_and_a_killed_env_worker_is_replaced(tmp_path: Path):
    def make_envs(
        args: Any, num_envs: int, size: int, autoreset: Any = AutoresetMode.SAME_STEP, num_threads: int | None = None
    ) -> Any:
        envs = DyingEnv(num_envs, args.num_action_chunks, autoreset=autoreset, image_size=size)
        envs.once = Once(tmp_path / "env_worker")
        return envs

    cluster_trainer.train(tmp_path / "async", make_envs=make_envs, num_iterations=3, max_staleness=1, env_workers=2)
    lines = logged(tmp_path / "async" / NAME)
    assert [line["rollout/staleness_mean"] for line in lines] == [0, 1, 1]
    assert sum(line["rollout/workers_replaced"] for line in lines) == 1
    assert sum(line["rollout/episodes_discarded"] for line in lines) == 4
    assert lines[0]["actor/importance_weight"] == 1.0 != lines[1]["actor/importance_weight"]
    assert all(line["actor/ratio_first_minibatch_max_dev"] < 1e-4 for line in lines)
