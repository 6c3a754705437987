"""The DSRL loop: what it stores, one update by value, the same run when resumed or shared, learning, evaluation."""

import ast
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform, TransformedDistribution

from algorithms import dsrl_gr00t, eval_gr00t
from algorithms.common import presets
from algorithms.common.checkpoint_notes import suite_of
from algorithms.common.evaluation import evaluate
from algorithms.common.randomness import MINIBATCHES, UPDATES, seed_of
from algorithms.common.resume import checkpoints_in
from algorithms.common.steering import NoiseActor, NoiseSpace, SteeredAgent, load_noise_actor, load_steered
from tests.algorithms.common.test_args import arguments
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import LineFlow, logged, make_args, make_line_flow, make_tiny_agent, train
from tests.algorithms.test_processes import run_two

NAME = "dsrl_libero_spatial_1"
NAMED_METRICS = (
    "actor/loss", "actor/grad_norm", "actor/entropy", "actor/lr", "actor/num_updates", "critic/loss", "critic/value",
    "critic/value_std", "critic/target", "critic/grad_norm", "actor/alpha", "rollout/rewards_mean",
    "rollout/noise_magnitude", "rollout/replay_size", "env/episode_len", "env/success_once", "env/success_once_task_0",
    "time/env_s", "time/env_wait_s", "time/policy_s", "time/update_s", "time/total_s", "charts/SPS",
)  # fmt: skip
LEARNING: dict[str, Any] = dict(
    num_envs=16, num_steps=6, num_iterations=16, warmup_iterations=5, replay_capacity=10_000, num_updates=60,
    minibatch_size=128, learning_rate=1e-3, critic_learning_rate=1e-3, alpha_learning_rate=3e-3, num_critics=2,
    truncation="failure", hidden_dims=(64, 64), noise_form="executed",
)  # fmt: skip


def saved(folder: Path, iteration: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(
        folder / NAME / "checkpoints" / f"iteration_{iteration}" / "training_state" / f"{name}.safetensors"
    )


def assert_same_run(one: Path, other: Path, iteration: int) -> None:
    assert logged(one / NAME) == logged(other / NAME)
    for name in ("weights", "optimizer", "targets", "replay"):
        ours, theirs = saved(one, iteration, name), saved(other, iteration, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def by_step(values: torch.Tensor, num_envs: int = 8) -> torch.Tensor:
    return values.unflatten(0, (-1, num_envs))


# --- what is logged and stored ---


def test_every_named_metric_is_logged_and_the_checkpoint_is_complete(tmp_path: Path, capsys: Any):
    metrics = train("dsrl", tmp_path)
    assert set(NAMED_METRICS) <= set(metrics)
    assert all(np.isfinite(metrics[name]) for name in NAMED_METRICS)
    lines = [json.loads(line) for line in (tmp_path / NAME / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/replay_size"] for line in lines] == [64, 128, 160]
    # A report shows what belongs to a group.
    assert [name for name in lines[-1] if "/" not in name] == ["iteration", "global_step"]
    folder = tmp_path / NAME / "checkpoints" / "iteration_3"
    assert {path.name for path in folder.iterdir()} == {"noise_actor.json", "noise_actor.safetensors", "training_state"}
    assert suite_of(str(folder)) == "libero_spatial"
    weights = saved(tmp_path, 3, "weights")
    num_trained = sum(value.numel() for name, value in weights.items() if "feature_" not in name)
    out = capsys.readouterr().out
    assert f"{num_trained:,} parameters are trained" in out
    assert "ppo_gr00t.py --model" not in out


def test_nothing_is_learned_before_the_last_iteration_of_warm_up(tmp_path: Path):
    train("dsrl", tmp_path, warmup_iterations=2)
    lines = logged(tmp_path / NAME)
    assert [line["actor/num_updates"] for line in lines] == [0, 4, 4]
    assert ["critic/loss" in line for line in lines] == [False, True, True]


def test_warm_up_decides_as_the_policy_was_trained_and_the_actor_within_its_bound(tmp_path: Path):
    train("dsrl", tmp_path, num_iterations=2, num_envs=64, num_steps=16, replay_capacity=2048, noise_bound=0.5)
    decisions = saved(tmp_path, 2, "replay")["decision"]
    random, decided = decisions[:1024], decisions[1024:]
    assert random.mean().abs() < 0.05
    assert random.std().item() == pytest.approx(1, abs=0.05)
    assert decided.abs().max() <= 0.5
    assert random.abs().max() > 2


class Follows(LineVectorEnv):
    """Moves as its noise says in environments 0 to 3, and never in the others."""

    def step(self, actions: np.ndarray) -> Any:
        actions = actions.copy()
        actions[: len(actions) // 2, :, 0] = -np.sign(self.x[: len(actions) // 2, None])
        actions[len(actions) // 2 :] = 0
        return super().step(actions)


@pytest.mark.parametrize("truncation", ["bootstrap", "failure"])
def test_transitions_at_successes_and_truncations(tmp_path: Path, truncation: Any):
    """A success comes in the third step, which is in the second decision; the horizon is after the sixth."""
    train("dsrl", tmp_path, env=Follows, num_iterations=1, truncation=truncation, replay_dtype="float32",
          reward_scale=2.0)  # fmt: skip
    replay = {name: value for name, value in saved(tmp_path, 1, "replay").items() if name != "position"}
    features, following, reward, terminal = (
        by_step(replay[name]) for name in ("features", "next_features", "reward", "terminal")
    )
    x, next_x = features[..., 0], following[..., 0]

    # Environments that move: 0.7, 0.2, then within 0.15 of the origin, which is worth 1, and a new episode.
    successes = (torch.arange(8) % 2 == 1)[:, None].expand(8, 4)
    assert torch.equal(terminal[:, :4], successes)
    assert torch.equal(reward[:, :4], 2.0 * successes)
    torch.testing.assert_close(x[:, :4].abs(), torch.where(successes, 0.2, 0.7))
    torch.testing.assert_close(next_x[::2, :4], x[1::2, :4])

    # Environments that stay are cut at the sixth decision, and go on from their own last place, or not at all.
    assert (reward[:, 4:] == 0).all()
    follows = torch.arange(8) != (5 if truncation == "failure" else -1)
    torch.testing.assert_close(next_x[follows, 4:], x[follows, 4:])
    assert torch.equal(terminal[5, 4:], torch.full((4,), truncation == "failure"))
    assert not terminal[[0, 1, 2, 3, 4, 6, 7], 4:].any()
    changed = x[6, 4:] != x[5, 4:]  # where the new episode begins on the other side
    assert changed.any()


def test_rewards_are_shifted(tmp_path: Path):
    train("dsrl", tmp_path, env=Follows, num_iterations=1, reward_shift=-1.0)
    reward = by_step(saved(tmp_path, 1, "replay")["reward"])
    assert reward[:, 0].tolist() == [-1, 0] * 4
    assert (reward[:, 4:] == -1).all()


def test_the_policy_is_frozen(tmp_path: Path):
    agents: list[LineFlow] = []

    def make_agent(args: Any) -> LineFlow:
        agents.append(LineFlow(args.num_action_chunks))
        return agents[-1]

    train("dsrl", tmp_path, make_agent=make_agent)
    assert not agents[0].sixth.requires_grad
    assert agents[0].sixth.item() == pytest.approx(1 / 6)


def test_actions_that_are_not_finite_never_reach_the_environment(tmp_path: Path):
    class Faulty(LineFlow):
        def predict(self, encoded: Any, *, noise: torch.Tensor) -> torch.Tensor:
            return super().predict(encoded, noise=noise).index_fill(0, torch.tensor([3]), torch.nan)

    with pytest.raises(FloatingPointError, match=r"actions that are not finite in rows \[3\] of iteration 1"):
        train("dsrl", tmp_path, make_agent=lambda args: Faulty(2))
    (dump,) = (tmp_path / NAME / "faults").iterdir()
    assert {"actions", "decision", "features"} == set(load_file(dump))


def test_an_update_that_is_not_finite_stops_the_run(tmp_path: Path):
    with pytest.raises(FloatingPointError, match=r"not finite in the minibatch are \['loss'.*Lower the step sizes"):
        train("dsrl", tmp_path, critic_learning_rate=1e15)
    (dump,) = (tmp_path / NAME / "faults").iterdir()
    assert {"decision", "reward", "terminal", "values", "target"} <= set(load_file(dump))


# --- one update by value ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(critic_reduction="min", value_bounds=(0.0, 0.02), reward_scale=0.02),
        dict(critic_reduction="min", backup_entropy=True),
    ],
)
def test_the_first_update_is_what_the_equations_say(tmp_path: Path, changes: dict[str, Any]):
    """Everything again, from the stored decisions and the keys of the draws, by other means."""
    options: dict[str, Any] = dict(num_iterations=1, num_updates=1, polyak=0.25, gamma=0.9, **changes)
    metrics = train("dsrl", tmp_path, **options)
    args = make_args("dsrl", tmp_path, **options)
    replay = saved(tmp_path, 1, "replay")

    set_seed(args.seed)
    LineFlow(2)
    space = NoiseSpace(num_steps=4, num_executed=2, padded_dim=8, action_dim=7, form="repeated", bound=1.0)
    networks = dsrl_gr00t.Networks(args, space, 2)
    initial = {name: value.clone() for name, value in networks.critics.state_dict().items()}

    all_features = replay["features"].double()
    mean, std = all_features.mean(0), ((all_features - all_features.mean(0)) ** 2).mean(0).sqrt()
    inds = torch.from_numpy(np.random.default_rng((1, MINIBATCHES, 1, 0)).integers(64, size=32))
    eps = torch.randn((2, 32, 7), generator=torch.Generator().manual_seed(seed_of(1, UPDATES, 1, 0)))
    z, next_z = (((replay[name][inds].double() - mean) / std).float() for name in ("features", "next_features"))

    def decide(at: torch.Tensor, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loc, scale = networks.actor(at)
        transforms: list[Any] = [TanhTransform(), AffineTransform(0, 1.0)]
        distribution = Independent(TransformedDistribution(Normal(loc, scale), transforms), 1)
        decision = torch.tanh(loc + scale * normal)
        return decision, distribution.log_prob(decision)

    with torch.no_grad():
        next_decision, next_logprob = decide(next_z, eps[0])
        each = torch.stack([networks.critics(next_z, next_decision)[j] for j in range(3)])
        next_value = each.min(0).values if changes else each.mean(0)
        if args.backup_entropy:
            next_value = next_value - 0.02 * next_logprob
        if args.value_bounds is not None:
            next_value = next_value.clamp(0.0, 0.02)
        target = replay["reward"][inds] + 0.9 * next_value * (1 - replay["terminal"][inds].float())
        errors = networks.critics(z, replay["decision"][inds]) - target
        _, logprob = decide(z, eps[1])
    assert metrics["critic/target"] == pytest.approx(target.mean().item(), rel=1e-4, abs=1e-6)
    assert metrics["critic/loss"] == pytest.approx((errors**2).mean().item(), rel=1e-4)
    assert metrics["actor/entropy"] == pytest.approx(-logprob.mean().item(), rel=1e-4)
    assert metrics["actor/alpha"] == pytest.approx(0.02)

    # Critics after a first step of Adam; the actor's loss is by these; targets follow by a quarter.
    parameters = dict(networks.critics.named_parameters())
    loss = (networks.critics(z, replay["decision"][inds]) - target).square().mean()
    loss.backward()
    torch.optim.Adam(parameters.values(), lr=args.critic_learning_rate).step()
    weights, targets = saved(tmp_path, 1, "weights"), saved(tmp_path, 1, "targets")
    for name, value in parameters.items():
        torch.testing.assert_close(weights[f"critics.{name}"], value.detach(), atol=2e-5, rtol=1e-4)
        expected = 0.75 * initial[name] + 0.25 * weights[f"critics.{name}"]
        torch.testing.assert_close(targets[name], expected)
    with torch.no_grad():
        decision, logprob = decide(z, eps[1])
        values = networks.critics(z, decision)
        value = values.min(0).values if changes else values.mean(0)
        assert metrics["actor/loss"] == pytest.approx((0.02 * logprob - value).mean().item(), rel=1e-3, abs=1e-4)
    # Adam's first step has the size of the step size; the entropy is above its target, so alpha falls.
    assert weights["log_alpha"].item() == pytest.approx(math.log(0.02) - args.alpha_learning_rate, abs=1e-6)


# --- the same run ---


def test_same_seed_gives_the_same_metrics_and_another_seed_others(tmp_path: Path):
    first, again, other = (train("dsrl", tmp_path, seed=seed) for seed in (3, 3, 4))
    assert first["critic/loss"] == again["critic/loss"] != other["critic/loss"]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_results_do_not_depend_on_the_number_of_stages(tmp_path: Path, num_stages: int):
    train("dsrl", tmp_path / "one")
    train("dsrl", tmp_path / "several", pipeline_stage_num=num_stages)
    for one, several in zip(logged(tmp_path / "one" / NAME), logged(tmp_path / "several" / NAME), strict=True):
        assert several == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("make_agent", "done"), [(None, 1), (None, 3), (make_tiny_agent, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, make_agent: Any, done: int):
    """From within the warm-up, and from where the replay buffer has begun to overwrite."""
    options: dict[str, Any] = dict(make_agent=make_agent, warmup_iterations=2)
    train("dsrl", tmp_path / "whole", num_iterations=5, **options)
    train("dsrl", tmp_path / "parts", num_iterations=5, save_interval=1, keep_last=5, **options)
    for iteration in range(done + 1, 6):
        shutil.rmtree(tmp_path / "parts" / NAME / "checkpoints" / f"iteration_{iteration}")
    train("dsrl", tmp_path / "parts", num_iterations=5, resume="auto", **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 5)


def test_a_fault_in_a_rollout_keeps_the_iteration_before_it(tmp_path: Path):
    """Decisions of the rollout that broke off are in no replay buffer."""

    class Breaks(LineVectorEnv):
        num_steps = 0

        def step(self, actions: Any) -> Any:
            self.num_steps += 1
            if self.num_steps == 20:  # the fourth decision of the third iteration
                raise ZeroDivisionError
            return super().step(actions)

    with pytest.raises(ZeroDivisionError) as caught:
        train("dsrl", tmp_path / "parts", env=Breaks, num_iterations=4)
    assert "the state before this rollout is in" in " ".join(caught.value.__notes__)
    assert [done for done, _ in checkpoints_in(tmp_path / "parts" / NAME)] == [2]
    train("dsrl", tmp_path / "parts", num_iterations=4, resume="auto")
    train("dsrl", tmp_path / "whole", num_iterations=4)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)


def test_a_request_to_stop_saves_and_the_run_goes_on(tmp_path: Path):
    class Stops(LineVectorEnv):
        num_steps = 0

        def step(self, actions: Any) -> Any:
            self.num_steps += 1
            if self.num_steps == 11:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(actions)

    with pytest.raises(SystemExit) as caught:
        train("dsrl", tmp_path / "parts", env=Stops)
    assert caught.value.code == 0
    assert [done for done, _ in checkpoints_in(tmp_path / "parts" / NAME)] == [1]
    train("dsrl", tmp_path / "parts", resume="auto")
    train("dsrl", tmp_path / "whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 3)


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on_with_their_run(tmp_path: Path):
    options: dict[str, Any] = dict(num_updates=3, pipeline_stage_num=2, warmup_iterations=1)
    train("dsrl", tmp_path / "one", make_agent=make_tiny_agent, **options)
    run_two("dsrl", agent="tiny", output_dir=str(tmp_path / "two"), **options)
    for single, double in zip(logged(tmp_path / "one" / NAME), logged(tmp_path / "two" / NAME), strict=True):
        assert double == pytest.approx(single, rel=1e-4, abs=1e-5)
    for name in ("weights", "targets", "replay"):
        ours, theirs = saved(tmp_path / "one", 3, name), saved(tmp_path / "two", 3, name)
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key].float(), value.float(), atol=2e-3, rtol=2e-3)
    options |= dict(make_agent=make_tiny_agent, num_iterations=4)
    for folder in ("one", "two"):
        train("dsrl", tmp_path / folder, resume="auto", **options)
    one, two = (logged(tmp_path / folder / NAME)[-1] for folder in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3, abs=1e-3)


# --- learning and evaluating ---


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steering_beats_the_policy_that_is_steered(tmp_path: Path, seed: int):
    """A random GR00T, whose actions are little more than its noise: its walk finds the origin four times in ten."""
    train("dsrl", tmp_path, make_agent=make_tiny_agent, seed=seed, **LEARNING)
    (file,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    success = [line["env/success_once"] for line in lines if "env/success_once" in line]
    before, after = np.mean(success[:5]), np.mean(success[-5:])
    assert before <= 0.6
    assert after >= before + 0.3


def test_the_steered_policy_is_evaluated_without_exploration_and_loaded_again(tmp_path: Path):
    train("dsrl", tmp_path, **LEARNING)
    actor, base = load_noise_actor(tmp_path / NAME / "checkpoints" / "iteration_16")
    assert base is None  # the line's policy has no name that it could be loaded by
    steered = SteeredAgent(LineFlow(2), actor, "line")
    assert steered.num_action_chunks == 2
    envs = LineVectorEnv(4, autoreset=AutoresetMode.DISABLED)
    result = evaluate(steered, envs, [(0, state) for state in range(8)], seed=0)
    assert result.success_rate == 1.0
    assert {episode.length for episode in result.episodes} <= {3, 4}  # 0.7 at a quarter a step


def test_a_steered_agent_of_ones_own_is_not_taken_for_the_named_model(tmp_path: Path, capsys: Any):
    train("dsrl", tmp_path)
    assert "eval_gr00t.py" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"steers an agent of one's own, .* give eval_gr00t.py --policy a function"):
        load_steered(tmp_path / NAME / "checkpoints" / "iteration_3")


def test_an_agent_without_compile_network_is_not_compiled(tmp_path: Path):
    with pytest.raises(ValueError, match=r"compile=True needs an agent with a method compile_network.*LineFlow"):
        train("dsrl", tmp_path, compile=True)


def test_the_evaluation_in_training_is_of_the_steered_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def evaluate_into(folder: Path, iteration: int, agent: Any, make_envs: Any, args: Any) -> float:
        seen.append((iteration, agent.predict(make_envs(2).reset(seed=0)[0], generator=[torch.Generator()] * 2)))
        return 0.5

    monkeypatch.setattr("algorithms.dsrl_gr00t.evaluate_into", evaluate_into)
    metrics = train("dsrl", tmp_path, num_iterations=2, eval_interval=1, eval_episodes_per_task=1)
    assert metrics["eval/success_once"] == 0.5
    assert [iteration for iteration, _ in seen] == [1, 2]
    assert seen[0][1].shape == (2, 2, 7)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_checkpoints_name_the_policy_unless_the_agent_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dsrl_gr00t, "load_agent", make_line_flow)
    args = make_args("dsrl", tmp_path, num_iterations=1, model=presets.SPATIAL_START)

    def make_envs(args: Any, num_envs: int, image_size: int) -> LineVectorEnv:
        return LineVectorEnv(num_envs, args.num_action_chunks)

    def base_of(name: str, make_agent: Any) -> Any:
        dsrl_gr00t.main(replace(args, run_name=name), make_agent, make_envs)
        return load_noise_actor(tmp_path / name / "checkpoints" / "iteration_1")[1]

    assert base_of("named", None).model == str(Path(presets.SPATIAL_START).resolve())
    assert base_of("own", make_line_flow) is None


@pytest.mark.slow
def test_the_shipped_policy_is_steered_on_libero_and_evaluated_from_its_folder(tmp_path: Path):
    args = replace(
        dsrl_gr00t.PRESETS["demo"], output_dir=tmp_path, num_envs=2, num_steps=3, num_iterations=2, num_updates=3,
        minibatch_size=8, task_ids=(0,), horizon=20, log_with=(), eval_episodes_per_task=1, renderer="warp",
    )  # fmt: skip
    metrics = dsrl_gr00t.main(args)
    assert all(np.isfinite(metrics[name]) for name in ("critic/loss", "actor/loss", "actor/alpha", "eval/success_once"))
    folder = tmp_path / "demo_dsrl" / "checkpoints" / "iteration_2"
    weights = load_file(folder / "noise_actor.safetensors")
    assert weights["feature_mean"].shape == (384,)

    eval_args = eval_gr00t.Args(
        checkpoint=str(folder), suite="libero_spatial", task_ids=(0,), episodes_per_task=1, horizon=10, num_envs=1,
        renderer="warp", device="cpu", output_dir=tmp_path / "eval",
    )  # fmt: skip
    result = eval_gr00t.main(eval_args)
    assert result.protocol["base_model"] == presets.SPATIAL_START
    assert len(result.protocol["noise_actor_sha256"]) == 64
    evaluation = json.loads((Path(presets.SPATIAL_START) / "evaluation.json").read_text())
    assert result.protocol["weights_sha256"] == evaluation["protocol"]["weights_sha256"]

    other = str(Path(presets.SPATIAL_START).parent / "libero_spatial_rl")
    with pytest.raises(ValueError, match=r"has weights of SHA-256 .* give the folder or hub id .* by --base-model"):
        eval_gr00t.load_policy(replace(eval_args, base_model=other))
    with pytest.raises(FileNotFoundError, match=r"the base policy of .* is not at '/nowhere'; .*--base-model"):
        load_steered(folder, base_model="/nowhere")
    with pytest.raises(ValueError, match=r"base_model='x' goes with a checkpoint of dsrl_gr00t.py"):
        eval_gr00t.load_policy(replace(eval_args, checkpoint=other, base_model="x"))


# --- arguments ---


def test_an_argument_that_ppo_has_too_means_the_same():
    ppo, dsrl = arguments("ppo"), arguments("dsrl")
    shared = [name for name in ppo if name in dsrl]
    assert len(shared) > 30
    assert shared == [name for name in dsrl if name in ppo]  # the order of --help
    own = {"run_name", "seed", "num_iterations", "model", "compute_dtype", "num_steps", "reward_scale", "value_bounds",
           "minibatch_size", "learning_rate", "max_grad_norm"}  # fmt: skip
    assert {name for name in shared if ppo[name] != dsrl[name]} == own
    assert all(ppo[name][0] == dsrl[name][0] for name in shared)


def test_functions_that_ppo_has_too_are_the_same():
    from tests.algorithms.common.test_args import functions

    ppo, dsrl = functions("ppo"), functions("dsrl")
    same = {name for name in ppo.keys() & dsrl.keys() if ppo[name] == dsrl[name]}
    assert same == {"num_decisions", "saves", "score"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(warmup_iterations=0), "warmup_iterations=0 must be at least 1"),
        (dict(hidden_dims=()), r"hidden_dims=\(\) names none .*one or more in \[1, inf\)"),
        (dict(task_ids=()), r"task_ids=\(\) names no task of libero_spatial \(valid: 0-9\)"),
        (dict(polyak=0.0), r"polyak=0.0 is not in \(0, 1\]"),
        (dict(noise_bound=-1.0), "noise_bound=-1.0 must be more than 0"),
        (dict(replay_capacity=63), "replay_capacity=63 does not hold the 64 decisions of an iteration"),
        (dict(value_bounds=(1.0, 0.0)), "value_bounds=1.0 0.0 is no range"),
        (dict(value_bounds=(0.0, 1.0), reward_shift=-1.0), r"0.0 1.0 do not hold the rewards of a decision, -1 to 0"),
        (dict(value_bounds=(0.0, 1.0), reward_scale=2.0), r"0 to 2 \(reward_scale=2.0, reward_shift=0.0\)"),
        (dict(value_bounds=(0.0, 1.0), backup_entropy=True), "value_bounds=0 1 .* entropy .* --value-bounds None"),
        (dict(num_iterations=2, warmup_iterations=3), "num_iterations=2 end before warmup_iterations=3 do"),
        (dict(suite="nope", eval_episodes_per_task=0), "suite='nope' is not installed"),
        (dict(pipeline_stage_num=3), "pipeline_stage_num=3 must divide the 8 environments .* --pipeline-stage-num 2"),
        (dict(truncation="failure", reward_shift=-1.0), "nothing is worth more: give --truncation bootstrap"),
        (dict(eval_episodes_per_task=51), "episodes_per_task=51 is not possible for task 0"),
        (dict(physics="warp"), "simulates on a GPU, and PyTorch finds no CUDA device"),
    ],
)
def test_bad_arguments_stop_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        train("dsrl", tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_random_weights_are_not_steered_and_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="model='nano' has random weights, which steering does not change"):
        dsrl_gr00t.load_agent(dsrl_gr00t.Args())
    monkeypatch.setattr(dsrl_gr00t, "make_accelerator", lambda *inputs: SimpleNamespace(is_fsdp2=True))
    with pytest.raises(ValueError, match="DSRL does not run under FSDP"):
        train("dsrl", tmp_path)


def test_presets_can_be_run_and_keep_the_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for args in dsrl_gr00t.PRESETS.values():
        dsrl_gr00t.check_args(args)
    nano = dsrl_gr00t.PRESETS["libero_spatial_nano"]
    assert nano.num_iterations * nano.num_decisions * nano.num_action_chunks <= 1_340_000
    assert nano.replay_capacity >= nano.num_iterations * nano.num_decisions
    large = dsrl_gr00t.PRESETS["libero_spatial_gr00t_24gb"]
    row_bytes = 2 * 2 * (2048 + 1536)  # features before and after, float16
    assert large.replay_capacity * row_bytes < 2e9
    space = NoiseSpace(
        num_steps=16, num_executed=5, padded_dim=32, action_dim=7, form=large.noise_form, bound=large.noise_bound
    )
    networks = dsrl_gr00t.Networks(large, space, 2048 + 1536)
    assert 500_000 < sum(p.numel() for p in networks.parameters()) < 700_000
    assert isinstance(networks.actor, NoiseActor)


def test_the_shared_module_holds_no_loss_and_no_loop():
    source = Path(dsrl_gr00t.__file__).parent / "common" / "steering.py"
    names = {node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef)}
    assert not [name for name in names if "loss" in name or "train" in name]
