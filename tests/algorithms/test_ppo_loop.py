"""The PPO loop itself: plugged-in agents and environments, what it logs and leaves behind, and that it learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from algorithms import ppo_gr00t
from algorithms.ppo_gr00t import Args
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.mlp_agent import MLPAgent

NAMED_METRICS = (
    "actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac",
    "actor/value_clip_ratio", "actor/entropy", "actor/explained_variance", "actor/lr",
    "actor/ratio_first_minibatch_max_dev", "rollout/returns_mean", "rollout/advantages_mean", "env/episode_len",
    "env/success_once", "time/env_s", "time/policy_s", "time/update_s", "time/total_s", "charts/SPS",
)  # fmt: skip


def make_agent(args: Args) -> MLPAgent:
    return MLPAgent(("state.x",), 1, args.num_action_chunks)


def make_envs(args: Args, num_envs: int, image_size: int, autoreset_mode=AutoresetMode.SAME_STEP) -> LineVectorEnv:
    return LineVectorEnv(num_envs, args.num_action_chunks, autoreset=autoreset_mode)


def line_args(folder: Path, **changes: Any) -> Args:
    defaults = dict(
        output_dir=folder, num_iterations=2, num_envs=8, num_steps=16, num_action_chunks=2, minibatch_size=32,
        micro_batch_size=32, update_epochs=4, learning_rate=3e-3, value_learning_rate=3e-3, eval_episodes_per_task=0,
        log_with=(),
    )  # fmt: skip
    return Args(**(defaults | changes))


def train(folder: Path, **changes: Any) -> dict[str, float]:
    return ppo_gr00t.main(line_args(folder, **changes), make_agent, make_envs)


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "charts/"))}


def test_every_named_metric_is_logged_and_the_run_folder_is_complete(tmp_path: Path):
    metrics = train(tmp_path, log_with=("tensorboard",))
    assert set(NAMED_METRICS) <= set(metrics)
    assert all(np.isfinite(metrics[name]) for name in NAMED_METRICS)
    run = tmp_path / "ppo_libero_spatial_1"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert lines[0]["global_step"] < lines[1]["global_step"]
    assert json.loads((run / "args.json").read_text())["num_envs"] == 8
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert (run / "checkpoints" / "iteration_2" / "model.safetensors").is_file()
    assert list(run.rglob("events.out.tfevents.*"))


def test_same_seed_gives_the_same_metrics_and_another_seed_others(tmp_path: Path):
    first, again, other = (without_time(train(tmp_path, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first["actor/loss"] != other["actor/loss"]


def test_first_minibatch_ratio_is_one(tmp_path: Path):
    assert train(tmp_path)["actor/ratio_first_minibatch_max_dev"] < 1e-5


def test_micro_batches_accumulate_to_the_whole_minibatch(tmp_path: Path):
    whole = without_time(train(tmp_path, num_iterations=1))
    parts = without_time(train(tmp_path, num_iterations=1, micro_batch_size=8))
    for name in ("actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_disagreeing_log_probabilities_stop_the_run(tmp_path: Path):
    class Dropout(MLPAgent):
        def forward(self, obs: Any, action: Any = None) -> Any:
            action, logprob, entropy, value = super().forward(obs, action)
            return action, logprob + torch.rand_like(logprob), entropy, value

    with pytest.raises(RuntimeError, match="log-probabilities at rollout and at update differ"):
        ppo_gr00t.main(line_args(tmp_path), lambda args: Dropout(("state.x",), 1, 2), make_envs)


def test_non_finite_gradient_stops_the_run_and_leaves_a_dump_that_loads(tmp_path: Path):
    class Explodes(MLPAgent):
        def forward(self, obs: Any, action: Any = None) -> Any:
            evaluating = action is not None
            action, logprob, entropy, value = super().forward(obs, action)
            return action, logprob, entropy, value * (torch.inf if evaluating else 1.0)

    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        ppo_gr00t.main(line_args(tmp_path), lambda args: Explodes(("state.x",), 1, 2), make_envs)
    (dump,) = (tmp_path / "ppo_libero_spatial_1").glob("non_finite_*.safetensors")
    from safetensors.torch import load_file

    assert not torch.isfinite(load_file(dump)["values"]).any()


def test_target_kl_ends_the_update_early(tmp_path: Path):
    free = train(tmp_path, num_iterations=1, learning_rate=0.05)
    stopped = train(tmp_path, num_iterations=1, learning_rate=0.05, target_kl=1e-4)
    assert stopped["actor/approx_kl"] < free["actor/approx_kl"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns(tmp_path: Path, seed: int):
    before = train(tmp_path, seed=seed, num_iterations=1)["env/success_once"]
    after = train(tmp_path, seed=seed, num_iterations=30)["env/success_once"]
    assert before <= 0.8
    assert after >= 0.95
