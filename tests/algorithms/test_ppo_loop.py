"""The PPO loop itself: plugged-in agents and environments, what it logs and leaves behind, its options."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common import dry_run, presets
from algorithms.common.processes import group_means, mean_and_variance
from algorithms.ppo_gr00t import PRESETS, policy_loss, select_decisions
from examples.own_agent_in_ppo import MLPAgent
from libero_gym.physics.cpu_worlds import CpuWorlds
from libero_gym.physics.warp_worlds import WarpWorlds
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import TRAINERS, logged, make_mlp_agent, make_tiny_agent, train, without_time

NAMED_METRICS = (
    "actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac",
    "actor/value_clip_ratio", "actor/entropy", "actor/explained_variance", "actor/lr",
    "actor/ratio_first_minibatch_max_dev", "rollout/returns_mean", "rollout/advantages_mean", "env/episode_len",
    "env/success_once", "env/success_once_task_0", "time/env_s", "time/env_wait_s", "time/policy_s", "time/update_s",
    "time/total_s", "charts/SPS",
)  # fmt: skip
# Of five iterations at a small step size, where rounding is not amplified.
RECORDED = {
    "actor/loss": [-0.04560775, -0.05639359, -0.03139653, -0.04750025, -0.02300584],
    "actor/value_loss": [0.1667306, 0.1836078, 0.1015973, 0.1486856, 0.1261621],
    "actor/entropy": [10.06281, 10.0587, 10.0542, 10.05389, 10.05427],
    "rollout/returns_mean": [0.2001269, 0.3758281, 0.4160505, 0.6768631, 0.829837],
}  # fmt: skip


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    return load_file(newest / "model.safetensors")


@pytest.mark.charts
def test_every_named_metric_is_logged_and_the_run_folder_is_complete(tmp_path: Path):
    metrics = train("ppo", tmp_path, log_with=("tensorboard",))
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
    assert (run / "report.html").read_text().count("<path") > 20  # of its charts


def test_recorded_losses_of_five_iterations(tmp_path: Path):
    train("ppo", tmp_path, num_iterations=5, learning_rate=3e-4, value_learning_rate=3e-4, adam_eps=1e-5)
    lines = logged(tmp_path / "ppo_libero_spatial_1")
    for name, values in RECORDED.items():
        assert [line[name] for line in lines] == pytest.approx(values, rel=1e-3), name


def test_same_seed_gives_the_same_metrics_and_another_seed_others(tmp_path: Path):
    first, again, other = (without_time(train("ppo", tmp_path, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first["actor/loss"] != other["actor/loss"]


@pytest.mark.parametrize("make_agent", [make_mlp_agent, make_tiny_agent])
def test_first_minibatch_ratio_is_one(tmp_path: Path, make_agent: Any):
    metrics = train("ppo", tmp_path, make_agent=make_agent, num_iterations=1, num_steps=8, update_epochs=1)
    assert metrics["actor/ratio_first_minibatch_max_dev"] < 1e-4


def test_micro_batches_accumulate_to_the_whole_minibatch(tmp_path: Path):
    options = dict(num_iterations=1, loss_weighting="trajectory", kl_coef=0.1, ent_coef=0.01)
    whole = without_time(train("ppo", tmp_path, **options))
    parts = without_time(train("ppo", tmp_path, micro_batch_size=8, **options))
    for name in ("actor/loss", "actor/value_loss", "actor/grad_norm", "actor/approx_kl", "actor/reference_kl"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("level", ["action", "token"])
def test_log_probability_levels_differ_in_what_they_clip_only(tmp_path: Path, level: str):
    options = dict(make_agent=make_tiny_agent, num_iterations=1, num_steps=4, update_epochs=1, ent_coef=0.01)
    chunk = train("ppo", tmp_path, logprob_level="chunk", **options)
    other = train("ppo", tmp_path, logprob_level=level, **options)
    # One step from ratios of 1, so that nothing is clipped: the loss and the nats per decision are the same.
    assert other["actor/ratio_first_minibatch_max_dev"] < 1e-4
    assert other["actor/entropy"] == pytest.approx(chunk["actor/entropy"], rel=1e-5)
    assert other["actor/loss"] == pytest.approx(chunk["actor/loss"], abs=1e-5)
    # The mean over a decision's elements, instead of their sum, is what the ratio's gradient passes through.
    elements = {"action": 2, "token": 14}[level]
    assert other["actor/grad_norm"] < chunk["actor/grad_norm"] / elements**0.5


def test_critic_warmup_trains_only_the_value_head(tmp_path: Path):
    train("ppo", tmp_path, num_iterations=2, critic_warmup_iterations=1, save_interval=1)
    checkpoints = tmp_path / "ppo_libero_spatial_1" / "checkpoints"
    after = [load_file(checkpoints / f"iteration_{i}" / "model.safetensors") for i in (1, 2)]
    from accelerate.utils import set_seed

    set_seed(1)
    start = dict(MLPAgent(("state.x",), 1, 2).state_dict())
    warm, trained = ({name: not torch.equal(w[name], start[name]) for name in start} for w in after)
    assert warm == {name: name.startswith("critic") for name in start}
    assert all(trained.values())


def test_successful_episodes_are_imitated(tmp_path: Path):
    """With nothing else to learn, the flow comes closer to what the episodes that succeeded did."""
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, num_iterations=4, num_steps=12, minibatch_size=96)
    options |= dict(micro_batch_size=96, update_epochs=20, learning_rate=1e-3, gamma=0.0, reward_scale=0.0, vf_coef=0.0)
    options |= dict(norm_adv=False, max_ratio_deviation=1.0)
    train("ppo", tmp_path, imitation_coef=1.0, run_name="imitating", **options)
    train("ppo", tmp_path, run_name="plain", **(options | dict(update_epochs=1, num_iterations=2)))
    imitating, plain = ([line["actor/imitation_loss"] for line in logged(tmp_path / n)] for n in ("imitating", "plain"))
    assert plain == [0.0] * 2
    assert 0 < imitating[-1] < 0.8 * imitating[0]


def test_the_policy_begins_by_imitation_alone(tmp_path: Path):
    """The surrogate moves nothing then; the critic learns, and PPO goes on from there."""
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, num_steps=12, minibatch_size=96, micro_batch_size=96)
    options |= dict(update_epochs=2, imitation_coef=1.0, max_ratio_deviation=1.0)
    options |= dict(max_grad_norm=float("inf"))  # the critic's gradients would shorten the policy's
    imitation = dict(imitation_iterations=1, imitation_learning_rate=1e-3, imitation_epochs=3)

    def policy_after(name: str, num_iterations: int, **others: Any) -> dict[str, torch.Tensor]:
        train("ppo", tmp_path, run_name=name, num_iterations=num_iterations, **(options | others))
        return final_weights(tmp_path / name)

    far, near = (policy_after(f"imitating_{gamma}", 1, gamma=gamma, **imitation) for gamma in (0.99, 0.1))
    is_value = {name: "value_head" in name for name in far}
    assert any(is_value.values())
    assert all(torch.equal(far[name], near[name]) for name in far if not is_value[name])
    assert any(not torch.equal(far[name], near[name]) for name in far if is_value[name])
    slow = policy_after("slow", 1, **(imitation | dict(imitation_learning_rate=1e-4)))
    assert any(not torch.equal(far[name], slow[name]) for name in far if not is_value[name])

    far, near = (policy_after(f"both_{gamma}", 2, gamma=gamma, **imitation) for gamma in (0.99, 0.1))
    assert any(not torch.equal(far[name], near[name]) for name in far if not is_value[name])
    lines = logged(tmp_path / "both_0.99")
    assert [line["actor/num_updates"] for line in lines] == [3, 2]


def test_an_update_uses_the_fraction_of_decisions_with_the_largest_advantages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first of three iterations is by imitation alone, and uses all."""

    def recorded(advantages: torch.Tensor, groups: np.ndarray, num_selected: int) -> np.ndarray:
        rows = select_decisions(advantages, groups, num_selected)
        selected.append((advantages, rows))
        return rows

    def recorded_loss(logratio: torch.Tensor, advantages: torch.Tensor, *options: Any) -> Any:
        used.append(advantages)
        return policy_loss(logratio, advantages, *options)

    selected: list[tuple[torch.Tensor, np.ndarray]] = []
    used: list[torch.Tensor] = []
    monkeypatch.setattr(ppo_gr00t, "select_decisions", recorded)
    monkeypatch.setattr(ppo_gr00t, "policy_loss", recorded_loss)
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, num_iterations=3, num_steps=12, update_fraction=0.333333)
    options |= dict(update_epochs=2, imitation_coef=1.0, imitation_iterations=1, imitation_epochs=2, kl_coef=0.1)
    train("ppo", tmp_path, **options, loss_weighting="trajectory", policy_warmup_iterations=1)
    lines = logged(tmp_path / "ppo_libero_spatial_1")
    assert [line["actor/num_updates"] for line in lines] == [6, 2, 2]
    assert [len(rows) for _, rows in selected] == [96, 32, 32]
    assert [len(advantages) for advantages in used] == [32] * 10
    # The policy's step size rises over the whole of an iteration's updates.
    assert lines[1]["actor/lr"] == pytest.approx(lines[2]["actor/lr"]) == pytest.approx(3e-3)
    for (advantages, rows), of_iteration in zip(selected, (used[:6], used[6:8], used[8:]), strict=True):
        assert (advantages.mean().item(), advantages.std().item()) == pytest.approx((0, 1), abs=0.01)  # of all
        whole_epochs = torch.cat(of_iteration).reshape(2, -1).sort().values
        wanted = advantages[torch.from_numpy(rows)].sort().values
        assert torch.equal(whole_epochs, torch.stack([wanted, wanted]))
    for advantages, rows in selected[1:]:
        by_env = advantages.reshape(12, 8)  # a group each
        largest = by_env.abs().sort(dim=0, descending=True).values[:4]
        assert torch.equal(advantages[torch.from_numpy(rows)].abs().sort().values, largest.flatten().sort().values)


def test_losses_of_a_fraction_weigh_as_those_of_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights of trajectories, and of what is imitated, have the mean 1 over the decisions that are used."""
    seen: list[torch.Tensor] = []

    def recorded(accelerator: Any, values: torch.Tensor) -> Any:
        seen.append(values)
        return mean_and_variance(accelerator, values)

    monkeypatch.setattr(ppo_gr00t, "mean_and_variance", recorded)
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, num_iterations=1, num_steps=12, imitation_coef=1.0)
    options |= dict(update_epochs=1, loss_weighting="trajectory", kl_coef=0.1, update_fraction=1 / 3)
    metrics = train("ppo", tmp_path, **options)
    assert [values.numel() for values in seen] == [96, 96, 96, 32, 32]
    # Before its only step the policy is the one it started from.
    assert metrics["actor/reference_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["actor/imitation_loss"] > 0


def test_a_dry_run_counts_the_updates_of_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def told(*_: Any, sizes: dict[str, int], passes: list[float], **others: Any) -> dict[str, float]:
        return dict(epoch=sizes["minibatches of an epoch"], all=sizes["updates of all iterations"], last=passes[-1])

    monkeypatch.setattr(dry_run, "measure", told)
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, dry_run=True, num_iterations=3)
    assert train("ppo", tmp_path, **options) == dict(epoch=4, all=48, last=4)
    assert train("ppo", tmp_path, **options, update_fraction=0.25) == dict(epoch=1, all=12, last=1)
    options |= dict(imitation_coef=1.0, imitation_iterations=2, imitation_epochs=10)
    assert train("ppo", tmp_path, **options, update_fraction=0.25) == dict(epoch=1, all=84, last=1)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_no_target_ends_imitation_alone_or_moves_its_step_size(tmp_path: Path, algorithm: str):
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, num_iterations=3, learning_rate=1e-3, target_kl=1e-9)
    options |= dict(lr_schedule="adaptive", imitation_coef=1.0, imitation_iterations=2, imitation_epochs=2)
    sizes = dict(ppo=dict(num_steps=12), grpo=dict(max_rollouts=1, num_envs=32))
    train(algorithm, tmp_path, run_name="run", **options, **sizes[algorithm])
    lines = logged(tmp_path / "run")
    num_minibatches = dict(ppo=3, grpo=4)[algorithm]
    assert [line["actor/num_updates"] for line in lines[:2]] == [2 * num_minibatches] * 2
    assert lines[2]["actor/num_updates"] < 4 * num_minibatches
    assert min(line["actor/approx_kl"] for line in lines) > 1e-9
    # It rises to 2e-4 at first, and is back at 1e-3 after the last update by imitation.
    halfway = 2e-4 + (1e-3 - 2e-4) * (0.5 - 0.1) / 0.9
    assert [line["actor/lr"] for line in lines] == pytest.approx([halfway, 1e-3, 1e-3])


def test_tasks_are_played_by_what_is_to_be_learnt(tmp_path: Path):
    class TwoTasks(LineVectorEnv):
        """Task 1 cannot be solved; tells what it is asked to sample."""

        task_ids = (0, 1)
        asked: ClassVar[list[list[float]]] = []

        def set_task_weights(self, weights: np.ndarray) -> None:
            self.asked.append(weights.tolist())

    train("ppo", tmp_path, env=TwoTasks, task_sampling="adaptive", num_iterations=3)
    last = logged(tmp_path / "ppo_libero_spatial_1")[-1]
    assert TwoTasks.asked[0] == [1, 1]
    assert TwoTasks.asked[-1] != [1, 1]
    assert [last["env/weight_task_0"], last["env/weight_task_1"]] == TwoTasks.asked[-2]
    with pytest.raises(TypeError, match="task_sampling='uniform'"):
        train("ppo", tmp_path, task_sampling="adaptive")


def test_advantages_are_centred_by_the_task_that_was_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class TaskByState(LineVectorEnv):
        """The side that a point starts from is its task; tells which one every step was of."""

        played: ClassVar[list[np.ndarray]] = []

        def step(self, actions: np.ndarray):
            self.played.append(self.state_id.copy())
            obs, reward, terminated, truncated, info = super().step(actions)
            if "final_info" in info:
                info["final_info"]["task_id"] = info["final_info"]["init_state_id"]
            return obs, reward, terminated, truncated, info | dict(task_id=self.state_id.copy())

    def recorded(accelerator: Any, values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        means = group_means(accelerator, values, groups)
        seen.append((values - means, groups))
        return means

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(ppo_gr00t, "group_means", recorded)
    train("ppo", tmp_path, env=TaskByState, center_adv_by_task=True, num_iterations=2, num_steps=12)
    assert np.array_equal(torch.cat([groups for _, groups in seen]).numpy(), np.stack(TaskByState.played))
    assert len(np.unique(TaskByState.played)) == 2
    for centred, groups in seen:
        for task in (0, 1):
            assert centred[groups == task].mean().item() == pytest.approx(0, abs=1e-6)


def test_divergence_from_the_start_policy_is_held_back_by_its_coefficient(tmp_path: Path):
    free = train("ppo", tmp_path, num_iterations=4, kl_coef=1e-9)
    held = train("ppo", tmp_path, num_iterations=4, kl_coef=1.0)
    assert 0 < held["actor/reference_kl"] < 0.5 * free["actor/reference_kl"]


def test_schedules(tmp_path: Path):
    class Annealed(MLPAgent):
        def forward(self, *inputs: Any, noise_anneal: float, **options: Any) -> Any:
            seen.append(noise_anneal)
            return super().forward(*inputs, **options)

    seen: list[float] = []
    train(
        "ppo", tmp_path, num_iterations=4, lr_schedule="linear", final_noise=0.5,
        make_agent=lambda args: Annealed(("state.x",), 1, 2),
    )  # fmt: skip
    lines = logged(tmp_path / "ppo_libero_spatial_1")
    assert [line["actor/lr"] for line in lines] == pytest.approx([3e-3 * left for left in (1, 0.75, 0.5, 0.25)])
    assert [line["actor/noise_anneal"] for line in lines] == [1, 0.875, 0.75, 0.625]
    assert sorted(set(seen), reverse=True) == [1, 0.875, 0.75, 0.625]


def test_noise_is_annealed_only_by_agents_that_can(tmp_path: Path):
    with pytest.raises(ValueError, match=r"final_noise=0\.5 needs an agent whose forward takes noise_anneal"):
        train("ppo", tmp_path, final_noise=0.5)
    with pytest.raises(ValueError, match=r"final_noise=0.0 is not in \(0, 1\]"):
        train("ppo", tmp_path, final_noise=0.0)


def test_disagreeing_log_probabilities_stop_the_run(tmp_path: Path):
    class Dropout(MLPAgent):
        def forward(self, *inputs: Any, **options: Any) -> Any:
            action, logprob, entropy, value = super().forward(*inputs, **options)
            return action, logprob + torch.rand_like(logprob), entropy, value

    with pytest.raises(RuntimeError, match="log-probabilities at rollout and at update differ"):
        train("ppo", tmp_path, make_agent=lambda args: Dropout(("state.x",), 1, 2))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_target_kl_ends_the_update_early(tmp_path: Path, algorithm: str):
    free = train(algorithm, tmp_path, num_iterations=1, learning_rate=0.05)
    stopped = train(algorithm, tmp_path, num_iterations=1, learning_rate=0.05, target_kl=1e-4)
    assert stopped["actor/num_updates"] < free["actor/num_updates"] == 16
    assert stopped["actor/approx_kl"] < free["actor/approx_kl"]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_agent_is_compiled_on_request(tmp_path: Path, algorithm: str):
    class Compiled(MLPAgent):
        def compile_network(self) -> None:
            compiled.append(self)

    compiled: list[MLPAgent] = []
    make_agent = lambda args: Compiled(("state.x",), 1, 2)  # noqa: E731
    train(algorithm, tmp_path, make_agent=make_agent, num_iterations=1)
    assert not compiled
    train(algorithm, tmp_path, make_agent=make_agent, num_iterations=1, compile=True, kl_coef=0.1)
    assert len(compiled) == 1


def test_the_adaptive_step_size_follows_target_kl(tmp_path: Path):
    """After both warm-ups, in which an update's KL is small for another reason."""
    options: dict[str, Any] = dict(lr_schedule="adaptive", critic_warmup_iterations=1)
    small = options | dict(num_iterations=5, policy_warmup_iterations=2, learning_rate=1e-6, target_kl=0.1)
    train("ppo", tmp_path / "small", **small)
    train("ppo", tmp_path / "large", num_iterations=4, learning_rate=0.05, target_kl=1e-4, **options)
    rates = {name: [line["actor/lr"] for line in logged(tmp_path / name / "ppo_libero_spatial_1")] for name in
             ("small", "large")}  # fmt: skip
    assert rates["small"] == pytest.approx([0, 0.5e-6, 1e-6, 1e-6, 1.5e-6])
    assert rates["large"] == pytest.approx([0, 0.05, 0.05 / 1.5, 0.05 / 2.25])
    with pytest.raises(ValueError, match="needs a positive target_kl"):
        train("ppo", tmp_path, lr_schedule="adaptive")


def test_late_episodes_are_failures_on_request_and_lookahead_is_bounded(tmp_path: Path):
    """A value network that says 5 everywhere: what advantages look ahead to is that, or 1, or nothing."""

    class Five(MLPAgent):
        def forward(self, *inputs: Any, **options: Any) -> Any:
            *rest, value = super().forward(*inputs, **options)
            return *rest, 0 * value + 5

        def get_value(self, obs: Any) -> torch.Tensor:
            return 0 * super().get_value(obs) + 5

    class Hopeless(LineVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            return super().step(0 * actions)

    options = dict(make_agent=lambda args: Five(("state.x",), 1, 2), env=Hopeless, num_iterations=1, num_steps=6)
    options |= dict(gamma=0.5, gae_lambda=1.0, minibatch_size=16, micro_batch_size=16)
    # Episodes of 12 steps are 6 decisions: the last one is cut. Returns are gamma^n times the value at the end.
    discounts = np.mean([0.5**n for n in range(1, 7)])
    for changes, value in (({}, 5), ({"value_bounds": (0.0, 1.0)}, 1), ({"truncation": "failure"}, 0)):
        metrics = train("ppo", tmp_path, **options, **changes)
        assert metrics["rollout/returns_mean"] == pytest.approx(value * discounts, abs=1e-5)


def test_rollouts_are_filmed_at_intervals(tmp_path: Path):
    train("ppo", tmp_path, num_iterations=3, num_steps=4, update_epochs=1, video_interval=2)
    videos = tmp_path / "ppo_libero_spatial_1" / "videos"
    assert sorted(path.name for path in videos.iterdir()) == ["rollout_1.mp4", "rollout_3.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t])
def test_environments_simulate_where_they_are_told_to(trainer: Any):
    for options, kind in ((dict(stepping="fast"), CpuWorlds), (dict(physics="warp"), WarpWorlds)):
        envs = trainer.make_envs(trainer.Args(horizon=30, num_action_chunks=3, **options), 2, 32)
        assert type(envs.unwrapped.worlds) is kind
        assert envs.action_space.shape == (2, 3, 7)
        envs.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(update_epochs=0), "update_epochs=0 must be at least 1"),
        (dict(save_interval=-1), "save_interval=-1 must be at least 0"),
        (dict(value_bounds=(1.0, 0.0)), "value_bounds=1.0 0.0 is no range"),
        (dict(eval_episodes_per_task=51), "episodes_per_task=51 is not possible for task 0"),
        (
            dict(physics="warp"),
            "simulates on a GPU, and PyTorch finds no CUDA device; take --preset libero_spatial_laptop",
        ),
    ],
)
def test_bad_arguments_stop_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train("ppo", tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_comparison_that_fails_leaves_the_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
):
    def fail(*_: Any) -> str:
        raise OSError("no space")

    monkeypatch.setattr(TRAINERS[algorithm], "compare_evaluations", fail)
    options: dict[str, Any] = dict(num_iterations=1, task_ids=(0,), eval_before=True, eval_episodes_per_task=1)
    with pytest.raises(OSError, match="no space"):
        train(algorithm, tmp_path, **options)
    (run,) = tmp_path.iterdir()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t])
def test_an_entropy_bonus_without_effect_is_refused(trainer: Any):
    with pytest.raises(ValueError, match=r"ent_coef=0\.01 has no effect with noise_method='flow_sde'"):
        trainer.load_agent(trainer.Args(ent_coef=0.01))
    assert trainer.load_agent(trainer.Args(ent_coef=0.01, noise_method="reinflow"))


def test_presets_have_the_published_settings_and_sizes_that_divide():
    spatial, ten = PRESETS["libero_spatial_rlinf"], PRESETS["libero_10_rlinf"]
    assert spatial.num_envs * spatial.num_steps * 5 == 512 * 240
    assert (spatial.learning_rate, spatial.value_learning_rate, spatial.update_epochs) == (5e-6, 1e-4, 4)
    assert ten.num_envs * ten.num_steps * 10 == 512 * 480
    assert (ten.learning_rate, ten.value_learning_rate, ten.update_epochs, ten.num_action_chunks) == (2e-5, 2e-5, 1, 10)
    for name in ("spatial", "object", "goal", "10", "40"):
        start = presets.CHECKPOINTS / f"libero_{name}_fewshot"
        assert Path(PRESETS[f"libero_{name}_nano"].model) == start
        assert start.is_dir()
    near_goal = ("demo", "libero_spatial_laptop")
    for trainer, level in ((ppo_gr00t, 1.0), (grpo_gr00t, 1.4)):
        for name, args in trainer.PRESETS.items():
            begins_and_ends = (level, 0.3) if name in near_goal else (0.5, 1.0)
            assert (args.noise_method, args.noise_level, args.final_noise) == ("flow_sde", *begins_and_ends)
            assert (args.num_action_chunks, args.denoising_steps) == (10 if "libero_10" in name else 5, 4)
            intervals = (50, 0) if name in near_goal else (25, 50)
            if args.num_iterations < 50 and name not in near_goal:
                intervals = 2 * (args.num_iterations // 3,)  # thirds of a short run
            assert (args.save_interval, args.eval_interval) == intervals
    for args in PRESETS.values():
        assert args.num_minibatches > 0
        assert args.num_micro_batches > 0
