"""The GRPO trainer: its formulas by hand, its loop and its options."""

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.grpo_gr00t import (
    PRESETS,
    alive_advantages,
    group_advantages,
    grpo_loss,
    informative_groups,
    sample_groups,
)
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import logged, make_tiny_agent, train, without_time

NAMED_METRICS = (
    "actor/loss", "actor/grad_norm", "actor/approx_kl", "actor/pg_clipfrac", "actor/entropy", "actor/lr",
    "actor/ratio_first_minibatch_max_dev", "rollout/returns_mean", "rollout/advantages_mean", "rollout/groups_kept",
    "rollout/num_rollouts", "rollout/group_success_std", "env/episode_len", "env/success_once", "time/env_s",
    "time/env_wait_s", "time/policy_s", "time/update_s", "time/total_s", "charts/SPS",
)  # fmt: skip
# Of five iterations at a small step size, where rounding is not amplified.
RECORDED = {
    "actor/loss": [0.06256939, 0.1525068, 0.2089705, 0.1400397, 0.1798366],
    "actor/entropy": [10.06584, 10.0689, 10.06984, 10.07415, 10.07746],
    "rollout/group_success_std": [0.3946434, 0.2545772, 0.3946434, 0.3464289, 0.3051198],
}  # fmt: skip


def test_group_advantages_by_hand():
    # group (1, 0, 0, 1): mean 1/2, population std 1/2
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4)
    torch.testing.assert_close(advantages[:4], torch.tensor([1.0, -1, -1, 1]), atol=1e-5, rtol=0)
    assert torch.equal(advantages[4:], torch.zeros(4))
    # (1, 0, 0, 0): mean 1/4, population std sqrt(3)/4
    expected = torch.tensor([3.0, -1, -1, -1]) / 3**0.5
    torch.testing.assert_close(group_advantages(torch.tensor([1.0, 0, 0, 0]), 4), expected, atol=1e-5, rtol=0)


def test_alive_advantages_by_hand():
    # Episode 0 succeeds after one decision, 2 after three; 1 and 3 fail after two and four. Deviation 1/2.
    returns, num_decisions = torch.tensor([1.0, 0, 1, 0]), torch.tensor([1, 2, 3, 4])
    expected = [
        [1 - 1 / 3, 0, 0, 0],  # of 1, 2 and 3 one succeeds
        [0 - 2 / 3, 0 - 1 / 2, 0, 0],  # then 2 and 3 run beside it
        [1 - 1 / 3, 1 - 0, 1 - 0, 0],
        [0 - 2 / 3, 0 - 1 / 2, 0 - 1, 0],  # alone in the end
    ]
    advantages = alive_advantages(returns, num_decisions, 4)
    torch.testing.assert_close(advantages, torch.tensor(expected) / 0.5, atol=1e-5, rtol=0)
    # Of several groups, each by itself.
    both = alive_advantages(torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 0]), torch.tensor([1, 2, 3, 4, 5, 5, 5, 5]), 4)
    assert torch.equal(both[:4, :4], advantages)
    assert torch.equal(both[:4, 4], torch.zeros(4))
    torch.testing.assert_close(both[7], torch.full((5,), -1 / (3**0.5 / 4)), atol=1e-5, rtol=0)


def test_alive_advantages_vanish_where_there_is_nothing_to_compare():
    for value in (0.0, 1.0, 0.3):
        equal = alive_advantages(torch.full((3,), value), torch.tensor([5, 2, 3]), 3)
        assert torch.equal(equal, torch.zeros(3, 5))
    last = alive_advantages(torch.tensor([0.0, 1, 1]), torch.tensor([5, 2, 3]), 3)[0]  # alone from the fourth on
    assert (last[:3] < 0).all()
    assert torch.equal(last[3:], torch.zeros(2))
    # After the last success all that still run fail alike.
    failing = alive_advantages(torch.tensor([1.0, 0, 0]), torch.tensor([1, 4, 4]), 3)
    assert torch.equal(failing[:, 1:], torch.zeros(3, 3))


def test_alive_advantages_of_equally_long_episodes_are_those_of_the_group_without_oneself():
    returns = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1])
    alive = alive_advantages(returns, torch.full((12,), 3), 4)
    expected = group_advantages(returns, 4) * 4 / 3
    torch.testing.assert_close(alive, expected[:, None].expand(12, 3))


def test_informative_groups_drop_the_all_equal_ones():
    success = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]).bool()
    assert informative_groups(success, 4, 0.1, 0.9).tolist() == [False, False, True]


def test_the_copies_of_the_formulas_agree():
    generator = torch.Generator().manual_seed(0)
    logratio, advantages = torch.randn(2, 1000, generator=generator)
    for dual_clip in (None, 3.0):
        ours = grpo_gr00t.policy_loss(logratio, advantages, 0.2, 0.28, dual_clip)
        theirs = ppo_gr00t.policy_loss(logratio, advantages, 0.2, 0.28, dual_clip)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    tokens = logratio.reshape(10, 10, 10)
    assert torch.equal(grpo_gr00t.k3_kl(tokens), ppo_gr00t.k3_kl(tokens))
    assert torch.equal(grpo_gr00t.sum_per_decision(tokens), ppo_gr00t.sum_per_decision(tokens))
    executed = torch.arange(10) < torch.arange(1, 11)[:, None]
    for level in ("chunk", "action", "token"):
        ours, theirs = (m.mask_unexecuted(tokens, executed, level) for m in (grpo_gr00t, ppo_gr00t))
        assert torch.equal(ours, theirs)
    assert torch.equal(grpo_gr00t.mean_of_executed(tokens, executed), ppo_gr00t.mean_of_executed(tokens, executed))


def two_decisions() -> tuple[dict[str, torch.Tensor], grpo_gr00t.Batch, grpo_gr00t.Args]:
    """Of two actions each; the second one's last was not executed, and the agent says absurd things of it."""
    outputs = dict(
        newlogprob=torch.tensor([[0.25, -0.25], [0.0, 70.0]]),
        entropy=torch.tensor([[1.0, 2.0], [4.0, 80.0]]),
        flow_error=torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [90.0, 90.0]]]),
    )
    batch = grpo_gr00t.Batch(
        executed=torch.tensor([[True, True], [True, False]]),
        logprobs=torch.tensor([-math.log(1.5), -math.log(0.5)]),
        start_logprobs=torch.tensor([math.log(2), 0.0]),
        advantages=torch.tensor([2.0, -2.0]),
        weights=torch.tensor([0.5, 1.5]),
        imitation_weights=torch.tensor([2.0, 0.0]),
        is_measured=torch.tensor([True, True]),
    )
    args = grpo_gr00t.Args(ent_coef=0.1, kl_coef=0.5, imitation_coef=0.25, clip_coef_high=0.2)
    return {name: output.requires_grad_() for name, output in outputs.items()}, batch, args


def test_grpo_loss_of_two_decisions_by_hand():
    outputs, batch, args = two_decisions()
    inputs: dict[str, Any] = dict(outputs, mb_size=torch.tensor(4.0), args=args, only_imitates=False)
    loss, terms, logratio = grpo_loss(**inputs, batch=batch)
    assert logratio.exp().tolist() == pytest.approx([1.5, 0.5])
    expected = {
        "actor/loss": [-2 * 1.2, 2 * 0.8],  # both are clipped
        "actor/imitation_loss": [2 * 2.5, 0.0],
        "actor/entropy": [3.0, 4.0],
        "actor/reference_kl": [2 - 1 - math.log(2), 0.0],
        "actor/approx_kl": [1.5 - 1 - math.log(1.5), 0.5 - 1 - math.log(0.5)],
        "actor/pg_clipfrac": [1.0, 1.0],
    }
    assert {name: term.tolist() for name, term in terms.items()} == {
        name: pytest.approx(values, abs=1e-6) for name, values in expected.items()
    }
    first = -2.4 - 0.1 * 3 + 0.5 * (1 - math.log(2))
    second = 1.6 - 0.1 * 4 + 0.5 * 0
    # The two are half of a minibatch of four.
    assert loss.item() == pytest.approx((0.5 * first + 1.5 * second) / 4 + 0.25 * (5 + 0) / 4)

    parts = [
        grpo_loss(
            **{name: output[[row]] for name, output in outputs.items()},
            batch=batch.at(np.array([row])),
            mb_size=torch.tensor(4.0),
            args=args,
            only_imitates=False,
        )[0]
        for row in range(2)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item())

    gradients = torch.autograd.grad(loss, list(outputs.values()))
    assert not any(gradient[1, 1].any() for gradient in gradients)  # of the action that was not executed


def test_grpo_by_imitation_alone_gives_the_policy_no_other_gradient():
    outputs, batch, args = two_decisions()
    size = torch.tensor(2.0)
    loss, _, _ = grpo_loss(**outputs, batch=batch, mb_size=size, args=args, only_imitates=True)
    assert loss.item() == pytest.approx(0.25 * 5 / 2)
    loss.backward()
    assert outputs["newlogprob"].grad is None
    # The entropy stays in the graph, for learned noise under DDP.
    assert outputs["entropy"].grad is not None
    assert not outputs["entropy"].grad.any()
    assert outputs["flow_error"].grad is not None
    assert outputs["flow_error"].grad.flatten(1).tolist() == [[0.25 * 2 / 4 / 2] * 4, [0.0] * 4]


def test_groups_are_drawn_without_replacement_while_there_are_enough():
    jobs = [(task, state) for task in range(2) for state in range(3)]
    drawn = sample_groups((1, 2), jobs, 6, 4)
    assert sorted(map(tuple, drawn[::4, :2].tolist())) == jobs
    assert (drawn.reshape(6, 4, 3) == drawn[::4][:, None]).all()
    assert len(set(drawn[:, 2].tolist())) == 6
    assert len(sample_groups((1, 2), jobs, 14, 2)) == 28
    assert not np.array_equal(drawn, sample_groups((1, 3), jobs, 6, 4))


def test_weighted_groups_are_drawn_as_often_as_their_weight_says():
    jobs = [(task, state) for task in range(3) for state in range(4)]
    weights = np.repeat([0.5, 1.0, 1.5], 4)
    counts = np.zeros(12)
    for number in range(400):
        drawn = sample_groups((1, number), jobs, 6, 2, weights)
        assert len({tuple(group) for group in drawn[::2, :2].tolist()}) == 6  # at most 0.75 of each is expected
        assert len(set(drawn[:, 2].tolist())) == 6
        assert np.bincount(drawn[::2, 0], minlength=3).tolist() == [1, 2, 3]
        for task, state in drawn[::2, :2]:
            counts[4 * task + state] += 1
    assert counts / 400 == pytest.approx(weights / weights.sum() * 6, abs=0.1)
    # More groups than jobs: each as often as expected, rounded up or down.
    drawn = sample_groups((1, 2), jobs, 30, 2, weights)[::2]
    times = np.array([((drawn[:, 0] == task) & (drawn[:, 1] == state)).sum() for task, state in jobs])
    assert (np.abs(times - weights / weights.sum() * 30) < 1).all()
    assert np.array_equal(drawn, sample_groups((1, 2), jobs, 30, 2, weights)[::2])
    assert 1 not in sample_groups((1, 2), [(0, 0), (1, 0)], 8, 2, np.array([1.0, 0.0]))[:, 0]


@pytest.mark.parametrize(("group_size", "message"), [(1, "must be at least 2"), (3, "must divide the 16 environments")])
def test_group_sizes_that_do_not_fit_are_refused(tmp_path: Path, group_size: int, message: str):
    with pytest.raises(ValueError, match=f"group_size={group_size} {message}"):
        train("grpo", tmp_path, group_size=group_size)


def test_every_named_metric_is_logged(tmp_path: Path):
    metrics = train("grpo", tmp_path)
    assert set(NAMED_METRICS) <= set(metrics)
    assert all(np.isfinite(metrics[name]) for name in NAMED_METRICS)


def test_recorded_losses_of_five_iterations(tmp_path: Path):
    train("grpo", tmp_path, num_iterations=5, learning_rate=3e-4)
    lines = logged(tmp_path / "grpo_libero_spatial_1")
    for name, values in RECORDED.items():
        assert [line[name] for line in lines] == pytest.approx(values, rel=1e-3), name


def test_members_of_a_group_start_alike_and_a_finished_episode_costs_nothing(tmp_path: Path):
    made: list[LineVectorEnv] = []
    starts: list[np.ndarray] = []

    class Watched(LineVectorEnv):
        def __init__(self, *inputs: Any, **options: Any):
            super().__init__(*inputs, **options)
            made.append(self)

        def restart(self, mask: np.ndarray, state_id: np.ndarray | None = None) -> None:
            super().restart(mask, state_id)
            starts.append(self.x.copy())

    metrics = train("grpo", tmp_path, env=Watched, num_iterations=1, max_rollouts=1)
    assert all(len(np.unique(group)) == 1 for group in starts[0].reshape(-1, 8))
    assert made[0].total_steps == pytest.approx(metrics["env/episode_len"] * 16)


def test_it_stops_sampling_at_enough_groups_and_never_exceeds_max_rollouts(tmp_path: Path):
    hopeless = train("grpo", tmp_path, num_iterations=1, min_group_success=1.1, max_group_success=2.0)
    assert hopeless["rollout/num_rollouts"] == 4
    assert hopeless["rollout/groups_kept"] == 0
    assert hopeless["actor/num_updates"] == 0
    assert "actor/loss" not in hopeless
    easy = train("grpo", tmp_path, num_iterations=1, min_group_success=-1.0, max_group_success=2.0, num_groups=2)
    assert easy["rollout/num_rollouts"] == 1
    assert easy["rollout/groups_kept"] == 1


def test_dropped_groups_cost_no_forward_pass_in_the_update(tmp_path: Path):
    rows: list[int] = []

    def counted(args: Any) -> Any:
        agent = make_tiny_agent(args)
        forward = agent.forward

        def count(obs: Any, action: Any = None, **options: Any) -> Any:
            if action is not None:
                rows.append(len(obs["state"]))
            return forward(obs, action, **options)

        agent.forward = count
        return agent

    options = dict(make_agent=counted, num_iterations=1, update_epochs=1, max_rollouts=1)
    metrics = train("grpo", tmp_path, min_group_success=1.1, max_group_success=2.0, **options)
    assert metrics["rollout/groups_kept"] == 0
    assert rows == []
    train("grpo", tmp_path, min_group_success=-1.0, max_group_success=2.0, **options)
    assert sum(rows) > 16


def test_successful_episodes_are_imitated(tmp_path: Path):
    """With nothing else to learn, the flow comes closer to what the episodes that succeeded did."""
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, max_rollouts=1, num_envs=32, num_minibatches=1)
    options |= dict(min_group_success=1.1, max_group_success=2.0)  # none is informative
    much = dict(update_epochs=20, num_iterations=4, learning_rate=1e-3)
    train("grpo", tmp_path, run_name="imitating", imitation_coef=1.0, **options, **much)
    train("grpo", tmp_path, run_name="plain", **options)
    imitating, plain = (logged(tmp_path / name) for name in ("imitating", "plain"))
    errors = [line["actor/imitation_loss"] for line in imitating]
    assert 0 < errors[-1] < 0.8 * errors[0]
    assert [line["actor/loss"] for line in imitating] == [0.0] * 4
    assert [line["actor/num_updates"] for line in plain] == [0.0] * 2


def test_the_policy_begins_by_imitation_alone(tmp_path: Path):
    """Advantages, entropy and start policy move nothing then, nor do failures pass through the update."""
    passed: list[int] = []

    def make_agent(args: Any) -> Any:
        agent = make_tiny_agent(args)
        score = agent.score_with_flow_error

        def counted(obs: Any, *inputs: Any, **options: Any) -> Any:
            passed.append(len(obs["state"]))
            return score(obs, *inputs, **options)

        agent.score_with_flow_error = counted
        return agent

    def weights_after(name: str, num_iterations: int, **others: Any) -> dict[str, torch.Tensor]:
        train("grpo", tmp_path, run_name=name, num_iterations=num_iterations, **(options | others))
        return load_file(tmp_path / name / "checkpoints" / f"iteration_{num_iterations}" / "model.safetensors")

    options: dict[str, Any] = dict(make_agent=make_agent, max_rollouts=1, num_envs=32, update_epochs=2)
    options |= dict(num_minibatches=2, imitation_coef=1.0)
    options |= dict(imitation_iterations=1, imitation_epochs=3, imitation_learning_rate=1e-3)
    plain = weights_after("plain", 1)
    (line,) = logged(tmp_path / "plain")
    assert 0 < line["env/success_once"] < 1
    assert line["rollout/groups_kept"] > 0
    assert line["actor/num_updates"] == 6
    assert line["actor/loss"] == 0
    assert line["actor/imitation_loss"] > 0
    assert line["actor/lr"] == pytest.approx(3e-3)  # of the last update

    num_passed = sum(passed)
    other = weights_after("other", 1, baseline="alive", kl_coef=1.0)
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    slow = weights_after("slow", 1, imitation_learning_rate=1e-4)
    assert any(not torch.equal(plain[name], slow[name]) for name in plain)
    passed.clear()
    weights_after("both", 1, imitation_iterations=0, update_epochs=3)  # by the same episodes
    assert sum(passed) > num_passed

    group, alive = (weights_after(f"then_{baseline}", 2, baseline=baseline) for baseline in ("group", "alive"))
    assert any(not torch.equal(group[name], alive[name]) for name in group)
    assert [line["actor/num_updates"] for line in logged(tmp_path / "then_group")] == [6, 4]


def test_the_imitation_loss_is_a_mean_over_what_successful_episodes_did(tmp_path: Path):
    def make_agent(args: Any) -> Any:
        agent = make_tiny_agent(args)
        score = agent.score_with_flow_error

        def score_with_error_of_three(*inputs: Any, **options: Any) -> Any:
            *scored, error = score(*inputs, **options)
            return *scored, 0 * error + 3

        agent.score_with_flow_error = score_with_error_of_three
        return agent

    options: dict[str, Any] = dict(make_agent=make_agent, max_rollouts=1, num_envs=32, num_minibatches=1)
    metrics = train("grpo", tmp_path, imitation_coef=1.0, num_iterations=1, **options)
    assert 0 < metrics["env/success_once"] < 1
    assert metrics["actor/imitation_loss"] == pytest.approx(3)


def test_what_is_imitated_only_has_no_part_in_the_rest_of_the_loss(tmp_path: Path):
    """A negligible weight, for which all successes are kept, trains as none does, and leaves what is logged alone."""
    options: dict[str, Any] = dict(make_agent=make_tiny_agent, max_rollouts=1, num_envs=32, num_minibatches=1)
    options |= dict(num_iterations=1, update_epochs=3, max_group_success=0.4, loss_weighting="trajectory", kl_coef=0.1)
    plain = train("grpo", tmp_path, **options)
    kept = train("grpo", tmp_path, imitation_coef=1e-12, **options)
    assert 0 < plain["rollout/groups_kept"] == kept["rollout/groups_kept"] < 1
    assert kept["actor/imitation_loss"] > 0
    assert plain["actor/imitation_loss"] == 0
    compared = ("actor/grad_norm", "actor/loss", "actor/approx_kl", "actor/reference_kl", "actor/pg_clipfrac",
                "actor/entropy", "rollout/advantages_mean")  # fmt: skip
    for name in compared:
        assert kept[name] == pytest.approx(plain[name], rel=1e-3), name
        assert plain[name] != 0, name


def test_the_baseline_of_those_that_still_run_changes_what_is_learnt(tmp_path: Path):
    options: dict[str, Any] = dict(num_iterations=1, max_rollouts=1, num_envs=32)
    group = train("grpo", tmp_path, **options)
    alive = train("grpo", tmp_path, baseline="alive", **options)
    assert alive["rollout/groups_kept"] == group["rollout/groups_kept"] > 0
    assert alive["actor/grad_norm"] != group["actor/grad_norm"]
    assert alive["actor/ratio_first_minibatch_max_dev"] < 1e-5


def test_tasks_are_played_by_what_is_to_be_learnt(tmp_path: Path):
    class HardTasks(LineVectorEnv):
        """All tasks but the first two begin out of reach; counts which are played."""

        played: ClassVar[list[np.ndarray]] = []

        def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
            assert options is not None
            result = super().reset(seed=seed, options=options)
            self.x = np.where(options["task_id"] < 2, self.x, 10).astype(np.float32)
            self.played.append(options["task_id"][::2])
            return result

    options: dict[str, Any] = dict(num_envs=80, group_size=2, num_groups=40, max_rollouts=1, num_iterations=3)
    train("grpo", tmp_path, env=HardTasks, task_sampling="adaptive", **options)
    lines = logged(tmp_path / "grpo_libero_spatial_1")
    weights = [[line[f"env/weight_task_{task}"] for task in range(10)] for line in lines]
    assert weights[0] == [1] * 10
    assert np.mean(weights[2]) == pytest.approx(1)
    assert min(weights[2][:2]) > max(weights[2][2:])
    easy = [(played < 2).sum() for played in HardTasks.played]
    assert easy[2] > easy[0]


def test_first_minibatch_ratio_is_one_and_the_seed_decides_everything(tmp_path: Path):
    first, again = train("grpo", tmp_path), train("grpo", tmp_path)
    assert first["actor/ratio_first_minibatch_max_dev"] < 1e-5
    assert without_time(first) == without_time(again)


def test_micro_batches_accumulate_to_the_whole_minibatch(tmp_path: Path):
    options = dict(num_iterations=1, loss_weighting="trajectory", kl_coef=0.1, ent_coef=0.01)
    whole = without_time(train("grpo", tmp_path, **options))
    parts = without_time(train("grpo", tmp_path, micro_batch_size=5, **options))
    for name in ("actor/loss", "actor/grad_norm", "actor/approx_kl", "actor/reference_kl"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_divergence_from_the_start_policy_is_held_back_by_its_coefficient(tmp_path: Path):
    free = train("grpo", tmp_path, num_iterations=4, kl_coef=1e-9)
    held = train("grpo", tmp_path, num_iterations=4, kl_coef=1.0)
    assert 0 < held["actor/reference_kl"] < 0.5 * free["actor/reference_kl"]


def test_presets_have_the_published_settings():
    args = PRESETS["libero_spatial_rlinf"]
    assert (args.group_size, args.num_envs * args.max_rollouts, args.update_epochs) == (8, 512, 2)
    assert (args.learning_rate, args.min_group_success, args.max_group_success) == (5e-6, 0.1, 0.9)
    assert (args.clip_coef, args.clip_coef_high, args.noise_level) == (0.2, 0.2, 0.5)
