"""The PPO trainer's formulas against cases worked out by hand."""

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common.args import share_of_process
from algorithms.common.batch import concatenate, index, mean_of
from algorithms.common.episodes import Episode, clustered_interval, finished_episodes, wilson_interval
from algorithms.common.processes import explained_variance, group_means, mean_and_variance
from algorithms.common.stages import EnvStep
from algorithms.ppo_gr00t import (
    Args,
    Batch,
    Outcomes,
    check_args,
    compute_gae,
    k3_kl,
    mask_unexecuted,
    mean_of_executed,
    policy_loss,
    ppo_loss,
    select_decisions,
    sum_per_decision,
    trajectory_weights,
    value_loss,
    won_decisions,
)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def gae(rewards, values, next_values, terminated, ended, gamma=0.5, lam=0.5):
    return compute_gae(
        column(*rewards),
        column(*values),
        column(*next_values),
        column(*terminated).bool(),
        column(*ended).bool(),
        gamma,
        lam,
    )


def test_gae_of_an_uninterrupted_episode():
    # deltas: 1 + .5*2 - 4 = -2;  0 + .5*6 - 2 = 1;  A_1 = 1;  A_0 = -2 + .25*1
    advantages, returns = gae([1, 0], [4, 2], [2, 6], [0, 0], [0, 0])
    torch.testing.assert_close(advantages, column(-1.75, 1.0))
    torch.testing.assert_close(returns, column(2.25, 3.0))


def test_gae_at_a_termination_ignores_the_next_value_and_carries_nothing_over():
    # delta_0 = 1 - 4 = -3 (next value 100 must not enter);  delta_1 = 0 + .5*6 - 2 = 1
    advantages, _ = gae([1, 0], [4, 2], [100, 6], [1, 0], [1, 0])
    torch.testing.assert_close(advantages, column(-3.0, 1.0))


def test_gae_at_a_truncation_bootstraps_from_the_final_value_and_carries_nothing_over():
    # delta_0 = 1 + .5*8 - 4 = 1
    advantages, _ = gae([1, 0], [4, 2], [8, 6], [0, 0], [1, 0])
    torch.testing.assert_close(advantages, column(1.0, 1.0))


def test_gae_keeps_environments_apart():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    both, _ = compute_gae(rewards, rewards * 0, rewards * 0, rewards > 9, rewards > 9, 0.9, 0.8)
    for n in range(2):
        alone, _ = compute_gae(
            rewards[:, n : n + 1],
            rewards[:, :1] * 0,
            rewards[:, :1] * 0,
            rewards[:, :1] > 9,
            rewards[:, :1] > 9,
            0.9,
            0.8,
        )
        torch.testing.assert_close(both[:, n : n + 1], alone)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # clipped at 1.2
        (0.5, 2.0, -1.0, False),  # a worse ratio for a good action is not clipped
        (0.5, -2.0, 1.6, True),  # clipped at 0.8
        (5.0, -2.0, 10.0, False),
    ],
)
def test_policy_loss(ratio: float, advantage: float, loss: float, clipped: bool):
    got, mask = policy_loss(torch.tensor([math.log(ratio)]), torch.tensor([advantage]), 0.2, 0.2, None)
    assert got.item() == pytest.approx(loss)
    assert mask.item() == clipped


def test_dual_clip_bounds_the_loss_of_bad_actions_only():
    logratio, advantages = torch.tensor([5.0, 5.0]).log(), torch.tensor([-2.0, 2.0])
    loss, clipped = policy_loss(logratio, advantages, 0.2, 0.2, 3.0)
    torch.testing.assert_close(loss, torch.tensor([6.0, -2.4]))
    assert clipped.all()  # neither has a gradient


def test_asymmetric_clip():
    loss, _ = policy_loss(torch.tensor([2.0]).log(), torch.tensor([1.0]), 0.2, 0.28, None)
    assert loss.item() == pytest.approx(-1.28)


def test_action_level_ratios_share_the_decision_advantage():
    logratio = torch.tensor([[0.0, 0.0], [1.1, 0.9]]).exp().log()
    loss, _ = policy_loss(logratio, torch.tensor([1.0, -1.0]), 0.2, 0.2, None)
    assert loss.shape == (2, 2)
    torch.testing.assert_close(loss[0], torch.tensor([-1.0, -1.0]))
    assert (loss[1] > 0).all()


def test_value_loss_takes_the_worse_of_value_and_clipped_value():
    # value 1.0 against return 1.0 is perfect, but the clipped value 0.2 is not: 0.5 * 0.8^2
    loss, clipped = value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2, 10.0)
    assert loss.item() == pytest.approx(0.32)
    assert clipped.item()
    loss, clipped = value_loss(torch.tensor([-1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2, 10.0)
    assert loss.item() == pytest.approx(2.0)
    assert not clipped.item()


def test_value_loss_is_linear_beyond_huber_delta():
    loss, _ = value_loss(torch.tensor([5.0]), torch.tensor([5.0]), torch.tensor([0.0]), 0.2, 1.0)
    assert loss.item() == pytest.approx(4.5)


def test_value_clip_is_not_active_within_the_clip_whatever_rounding_says():
    old = torch.linspace(-3, 3, 1001)
    values = old + 0.1999 * torch.linspace(-1, 1, 1001)
    assert not value_loss(values, old, torch.full_like(old, 0.3), 0.2, 10.0)[1].any()


def test_explained_variance():
    returns, accelerator = torch.tensor([0.0, 1.0, 2.0]), Accelerator()
    assert explained_variance(accelerator, returns, returns) == pytest.approx(1.0)
    assert explained_variance(accelerator, torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(accelerator, -returns, returns) == pytest.approx(-3.0)


def test_mean_and_variance_do_not_cancel_far_from_zero():
    mean, variance = mean_and_variance(Accelerator(), torch.tensor([1e4, 1e4 + 1, 1e4 + 2]))
    assert (mean.item(), variance.item()) == (10001.0, pytest.approx(2 / 3))


def test_group_means():
    values = torch.tensor([[1.0, 10.0], [3.0, 20.0], [-4.0, 60.0]])
    groups = torch.tensor([[0, 3], [0, 3], [2, 3]])
    means = group_means(Accelerator(), values, groups)
    assert means.tolist() == [[2, 30], [2, 30], [-4, 30]]
    assert means.dtype == values.dtype


def test_gae_with_a_truncation_inside_and_an_end_of_the_rollout_in_an_episode():
    # Environment 0: truncated after decision 1 (final value 8), a new episode goes on beyond the rollout (value 4).
    # gamma = lam = 1/2. delta = (0 + 1 - 2, 0 + 4 - 2, 0 + 2 - 2, 1 + 2 - 4) = (-1, 2, 0, -1).
    # A_3 = -1; A_2 = 0 + (-1)/4; A_1 = 2 (nothing carried over); A_0 = -1 + 2/4.
    truncated, _ = gae([0, 0, 0, 1], [2, 2, 2, 4], [2, 8, 4, 4], [0, 0, 0, 0], [0, 1, 0, 0])
    torch.testing.assert_close(truncated, column(-0.5, 2.0, -0.25, -1.0))
    # The same with success instead: decision 1 has delta 1 - 2 = -1 and no bootstrap.
    succeeded, returns = gae([0, 1, 0, 1], [2, 2, 2, 4], [2, 8, 4, 4], [0, 1, 0, 0], [0, 1, 0, 0])
    torch.testing.assert_close(succeeded, column(-1.25, -1.0, -0.25, -1.0))
    torch.testing.assert_close(returns, column(0.75, 1.0, 1.75, 3.0))


def test_gae_of_a_truncation_in_the_last_decision_uses_its_final_value():
    # delta = 0 + 8/2 - 2 = 2: what the environment was reset to (value 100) is not used.
    advantages, _ = gae([0], [2], [8], [0], [1])
    torch.testing.assert_close(advantages, column(2.0))


def test_trajectory_weights_by_hand():
    # Environment 0: the end of an episode of 7 decisions, then one of 2. Environment 1: one of 1, then the begin of one
    # whose end is unknown. Environment 2: a part of an episode that began before and goes on.
    ended = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
    lengths = torch.tensor([[9, 1, 9], [7, 9, 9], [9, 9, 9], [2, 9, 9]])
    decisions = torch.tensor([[7, 1, 48], [7, 48, 48], [2, 48, 48], [2, 48, 48]])
    torch.testing.assert_close(trajectory_weights(ended, lengths, 48), 1 / decisions)


def test_a_fragment_weighs_its_share_of_an_episode():
    # Ten environments whose episodes of 4 decisions begin one after another: each decision weighs a quarter, whichever
    # part of its episode lies in the rollout.
    steps = torch.arange(6)[:, None] + torch.arange(4)
    ended = steps % 4 == 3
    weights = trajectory_weights(ended, torch.full((6, 4), 4), 4)
    torch.testing.assert_close(weights, torch.full((6, 4), 0.25))


def test_won_are_the_decisions_of_episodes_that_succeeded_within_the_rollout():
    ended = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.bool)
    success = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    # The first wins and then fails, the second fails, wins and is cut by the rollout, the third never ends.
    assert won_decisions(ended, success).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_selected_are_the_largest_advantages_of_each_group_and_of_equal_ones_the_first():
    advantages = torch.tensor([0.5, -9.0, -3.0, 0.1, 3.0, -0.2, 3.0, 0.2])
    groups = np.array([4, 7, 4, 7, 4, 7, 4, 7])
    # Of group 4 rows 2, 4 and 6 are equal; of group 7 row 1 is largest, and rows 5 and 7 are equal.
    assert select_decisions(advantages, groups, 1).tolist() == [1, 2]
    assert select_decisions(advantages, groups, 2).tolist() == [1, 2, 4, 5]
    assert select_decisions(advantages, groups, 3).tolist() == [1, 2, 4, 5, 6, 7]
    assert select_decisions(advantages, groups, 4).tolist() == list(range(8))
    assert select_decisions(torch.zeros(8), groups, 2).tolist() == [0, 1, 2, 3]


def test_advantages_that_are_no_numbers_are_selected_and_so_stop_the_run():
    advantages = torch.tensor([5.0, math.nan, -math.inf, 6.0])
    assert select_decisions(advantages, np.zeros(4, dtype=int), 2).tolist() == [1, 2]


def test_what_is_selected_does_not_depend_on_the_number_of_processes():
    """Four groups of three environments, each with six decisions, of which many have equal advantages."""
    advantages = torch.randint(-4, 5, (6, 12), generator=torch.Generator().manual_seed(0)).float()

    def selected(num_processes: int) -> set[tuple[int, int]]:
        """Decision and environment."""
        found: set[tuple[int, int]] = set()
        for env_ids in np.split(np.arange(12), num_processes):
            groups = np.tile(env_ids // 3, 6)
            rows = select_decisions(advantages[:, torch.from_numpy(env_ids)].flatten(), groups, 7)
            assert np.bincount(groups[rows]).max() == 7
            found |= {(int(row) // len(env_ids), int(env_ids[row % len(env_ids)])) for row in rows}
        return found

    assert len(selected(1)) == 4 * 7
    assert selected(1) == selected(2) == selected(4)


@pytest.mark.parametrize(
    ("num_minibatches", "fraction", "kept"),
    [
        (5, 0.2, 1),
        (15, 0.2, 3),
        (35, 0.2, 7),
        (3, 1 / 3, 1),
        (3, 0.333, 1),
        (24, 0.333333, 8),
        (1, 1.0, 1),
        (7, 1.0, 7),
    ],
)
def test_a_fraction_leaves_whole_minibatches(num_minibatches: int, fraction: float, kept: int):
    args = Args(
        num_envs=num_minibatches,
        num_steps=8,
        minibatch_size=8,
        micro_batch_size=4,
        update_fraction=fraction,
        update_epochs=3,
        imitation_coef=1.0,
        imitation_iterations=2,
        imitation_epochs=5,
    )
    check_args(args)
    # Iterations of imitation alone use all decisions.
    assert [args.num_epoch_minibatches(i) for i in (1, 2, 3)] == [num_minibatches, num_minibatches, kept]
    assert [args.num_updates(i) for i in (1, 2, 3)] == [5 * num_minibatches, 5 * num_minibatches, 3 * kept]


@pytest.mark.parametrize(
    ("num_minibatches", "fraction", "advised"),
    [(3, 0.2, "0.333333"), (1, 0.2, "1"), (4, 0.3, "0.25"), (48, 0.2, "0.208333"), (10, 0.01, "0.1"), (3, 0.99, "1")],
)
def test_a_fraction_that_leaves_parts_of_minibatches_is_refused(num_minibatches: int, fraction: float, advised: str):
    args = Args(num_envs=num_minibatches, num_steps=8, minibatch_size=8, micro_batch_size=4, update_fraction=fraction)
    message = (
        rf"update_fraction={fraction} of {num_minibatches} minibatch\(es\) of 8 must .* --update-fraction {advised},"
    )
    with pytest.raises(ValueError, match=message):
        check_args(args)
    args.update_fraction = float(advised)
    check_args(args)


@pytest.mark.parametrize(
    ("critic", "policy", "factors"),
    [(0, 0, (1, 1, 1, 1)), (2, 0, (0, 0, 1, 1)), (0, 2, (0.25, 0.75, 1, 1)), (1, 2, (0, 0.25, 0.75, 1))],
)
def test_the_policy_rests_and_then_warms_up(critic: int, policy: int, factors: tuple[float, ...]):
    args = Args(critic_warmup_iterations=critic, policy_warmup_iterations=policy)
    assert [args.policy_step_factor(updated) for updated in (0.5, 1.5, 2.5, 3.5)] == list(factors)


def test_imitation_comes_before_the_warm_ups():
    args = Args(
        imitation_iterations=1,
        imitation_coef=10.0,
        imitation_learning_rate=4e-4,
        learning_rate=1e-4,
        critic_warmup_iterations=1,
        policy_warmup_iterations=2,
    )
    factors = [args.policy_step_factor(updated) for updated in (0.05, 0.1, 0.55, 1.0, 1.5, 2.5, 3.5, 4.5)]
    assert factors == pytest.approx([2, 4, 2.5, 1, 0, 0.25, 0.75, 1])
    assert [args.num_epochs(iteration) for iteration in (1, 2)] == [args.imitation_epochs, args.update_epochs]
    assert args.num_warmup_iterations == 4


def test_imitation_goes_over_into_ppo_at_its_step_size():
    args = Args(imitation_iterations=4, imitation_coef=10.0, imitation_learning_rate=4e-4, learning_rate=1e-4)
    factors = [args.policy_step_factor(updated) for updated in (0.2, 0.4, 2.2, 4.0, 4.1)]
    assert factors == pytest.approx([2, 4, 2.5, 1, 1])
    assert [args.only_imitates(iteration) for iteration in (1, 4, 5)] == [True, True, False]


def test_divergence_estimates_the_divergence_of_gaussians_and_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.3, 1.2)
    x = torch.randn(400_000, generator=generator)
    estimates = k3_kl(q.log_prob(x) - p.log_prob(x))
    assert (estimates >= -1e-6).all()
    assert estimates.mean().item() == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=0.02)
    assert k3_kl(torch.zeros(3)).tolist() == [0, 0, 0]


def test_actions_that_were_not_executed_count_for_nothing():
    tokens = torch.arange(12.0).reshape(2, 3, 2)  # two decisions, three actions of two dimensions
    executed = torch.tensor([[True, False, False], [True, True, True]])
    assert mask_unexecuted(tokens, executed, "chunk").tolist() == [0 + 1, 6 + 7 + 8 + 9 + 10 + 11]
    actions = mask_unexecuted(tokens.sum(-1), executed, "action")
    assert actions.tolist() == [[1, 0, 0], [13, 17, 21]]
    assert mask_unexecuted(tokens, executed, "token")[0].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert mean_of_executed(actions, executed).tolist() == [1, 17]
    assert mean_of_executed(tokens, executed).tolist() == [0.5, 8.5]
    chunks = torch.tensor([3.0, 4.0])
    assert mask_unexecuted(chunks, executed, "chunk").tolist() == [3, 4]
    assert mean_of_executed(chunks, executed).tolist() == [3, 4]
    assert sum_per_decision(tokens).tolist() == [15, 51]


@pytest.mark.parametrize("module", [ppo_gr00t, grpo_gr00t])
@pytest.mark.parametrize("shape", [(2, 1), (2, 1, 7), (1, 3)])
def test_scores_of_another_shape_are_not_spread_over_the_chunk(module: Any, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"shape .*; make it \[2\], or \[2, 3\] or \[2, 3, a\] by step or element"):
        module.mask_unexecuted(torch.zeros(shape), torch.ones(2, 3, dtype=torch.bool), "chunk")


def test_an_action_that_was_not_executed_gets_no_gradient():
    logprob = torch.zeros(1, 3, requires_grad=True)
    executed = torch.tensor([[True, True, False]])
    for level in ("chunk", "action"):
        logratio = mask_unexecuted(logprob, executed, level)
        loss = mean_of_executed(policy_loss(logratio, torch.ones(1), 0.2, 0.2, None)[0], executed)
        (gradient,) = torch.autograd.grad(loss.sum(), logprob)
        share = {"chunk": -1.0, "action": -0.5}[level]
        assert gradient.tolist() == [[share, share, 0.0]]


def test_the_loss_is_that_of_an_independent_formula():
    """Chunk, action and token level against loops over scalars."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((5,), (5, 3), (5, 3, 2)):
        logratio = 0.5 * torch.randn(shape, generator=generator)
        advantages = torch.randn(5, generator=generator)
        executed = torch.ones(5, 3, dtype=torch.bool)
        loss, clipped = (mean_of_executed(x, executed) for x in policy_loss(logratio, advantages, 0.2, 0.28, 3.0))
        for i in range(5):
            losses, flags = [], []
            for entry in logratio[i].flatten().tolist():
                ratio, advantage = math.exp(entry), advantages[i].item()
                bounded = min(max(ratio, 0.8), 1.28)
                objective = min(ratio * advantage, bounded * advantage)
                flags.append(objective < ratio * advantage)
                losses.append(-max(objective, 3 * advantage) if advantage < 0 else -objective)
            assert loss[i].item() == pytest.approx(np.mean(losses), rel=1e-5)
            assert clipped[i].item() == pytest.approx(np.mean(flags))


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            dict(minibatch_size=100),
            "num_minibatches",
            "num_decisions=3072 must be a positive multiple of minibatch_size=100",
        ),
        (dict(minibatch_size=0), "num_minibatches", "minibatch_size=0"),
        (dict(micro_batch_size=1000), "num_micro_batches", "minibatch_size=1024 must be .* micro_batch_size=1000"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], name: str, message: str):
    with pytest.raises(ValueError, match=message):
        getattr(Args(**change), name)


@pytest.mark.parametrize(("num_envs", "num_processes"), [(0, 1), (7, 2), (-4, 2)])
def test_sizes_that_cannot_be_shared_are_refused(num_envs: int, num_processes: int):
    with pytest.raises(ValueError, match=f"num_envs={num_envs} cannot be shared by {num_processes}"):
        share_of_process(Args(num_envs=num_envs), "num_envs", num_processes)


def test_wilson_interval_matches_the_closed_form():
    n, p, z = 50, 0.9, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson_interval(45, 50) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert wilson_interval(0, 50)[0] == 0.0
    assert wilson_interval(50, 50)[1] == 1.0
    with pytest.raises(ValueError, match="successes=51 of episodes=50: give 0 <= successes <= episodes > 0"):
        wilson_interval(51, 50)


def test_episodes_of_one_state_that_end_alike_count_less():
    # Three episodes of each state that always end alike are as good as one.
    alike = [[True] * 3] * 8 + [[False] * 3] * 2
    assert clustered_interval(alike) == pytest.approx(wilson_interval(8, 10), abs=1e-12)
    # In clusters of one, and where states differ by no more than chance, episodes are independent.
    assert clustered_interval([[True]] * 8 + [[False]] * 2) == pytest.approx(wilson_interval(8, 10), abs=1e-12)
    assert clustered_interval([[True, False]] * 5) == pytest.approx(wilson_interval(5, 10), abs=1e-12)
    # Between: of four states with two episodes, two end alike. By hand: rate 1/2, deviations 1, -1, 0, 0 of the
    # states' successes, variance 2 / 8^2 = 1/32, as large as that of independent episodes.
    assert clustered_interval([[True, True], [False, False], [True, False], [False, True]]) == pytest.approx(
        wilson_interval(4, 8), abs=1e-12
    )
    # Twelve episodes of six states, four of which end alike: deviations 1, 1, -1, -1, 0, 0, variance 4 / 12^2, a third
    # more than that of independent episodes, 3 / 12^2, so that they count as nine.
    some = [[True, True]] * 2 + [[False, False]] * 2 + [[True, False]] * 2
    z_squared = 1.959963984540054**2
    half_width = math.sqrt(z_squared * (0.25 / 9 + z_squared / 324)) / (1 + z_squared / 9)
    assert clustered_interval(some) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=1e-9)
    # Where nothing failed, nothing tells that states matter.
    assert clustered_interval([[True] * 3] * 10) == pytest.approx(wilson_interval(30, 30), abs=1e-12)
    with pytest.raises(ValueError, match=r"sizes \[2, 0\]: give at least one, each with an episode"):
        clustered_interval([[True, True], []])


def test_index_and_concatenate_keep_the_nesting():
    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    def tree(offset: int):
        pair = Pair(torch.arange(3.0), torch.arange(3) + offset)
        return {"video": np.arange(3) + offset, "text": np.array(["a", "b", "c"]), "pair": pair}

    joined = concatenate([tree(0), tree(10)])
    rows = index(joined, np.array([4, 1]))
    np.testing.assert_array_equal(rows["video"], [11, 1])
    np.testing.assert_array_equal(rows["text"], ["b", "b"])
    torch.testing.assert_close(rows["pair"].right, torch.tensor([11, 1]))


def test_means_are_taken_by_name():
    stats = [{"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, {"a": torch.tensor(3.0), "b": torch.tensor(5.0)}]
    assert {name: x.item() for name, x in mean_of(stats).items()} == {"a": 2.0, "b": 5.0}


def test_finished_episodes_reads_only_the_ended_rows():
    final = dict(task_id=[3, 4], init_state_id=[7, 8], success=[True, False], episode_length=[55, 240])
    infos = {"final_info": {name: np.array(values) for name, values in final.items()}}
    got = finished_episodes(infos, np.array([False, True]))
    assert got == [Episode(task_id=4, init_state_id=8, success=False, length=240)]
    assert finished_episodes({}, np.array([False, False])) == []


@pytest.mark.parametrize("truncation", ["bootstrap", "failure"])
def test_outcomes_of_a_step_are_entered_where_they_belong(truncation: Literal["bootstrap", "failure"]):
    """The second environment of three succeeds, the third is cut; both then begin with another task."""
    terminated, truncated = np.array([False, True, False]), np.array([False, False, True])
    infos = dict(
        num_steps=np.array([5, 2, 3]),
        task_id=np.array([7, 1, 1]),
        final_info=dict(episode_length=np.array([0, 42, 60]), task_id=np.array([0, 8, 9])),
    )
    step = EnvStep({}, np.array([0.0, 1.0, 0.0]), terminated, truncated, infos)
    outcomes = Outcomes.zeros(num_steps=2, num_envs=4)
    outcomes.put(1, slice(1, 4), step, Args(truncation=truncation, center_adv_by_task=True))
    assert {name: values[1].tolist() for name, values in vars(outcomes).items()} == dict(
        rewards=[0, 0, 1, 0],
        terminal=[False, False, True, truncation == "failure"],
        succeeded=[False, False, True, False],
        ended=[False, False, True, True],
        executed_steps=[0, 5, 2, 3],
        episode_lengths=[0, 0, 42, 60],
        task_ids=[0, 7, 8, 9],
    )
    assert not any(values[0].any() for values in vars(outcomes).values())


# Two decisions of two actions, of which the second one's last was not executed. Their ratios are 1.5 and 0.5.
BATCH = Batch(
    executed=torch.tensor([[True, True], [True, False]]),
    logprobs=torch.tensor([-math.log(1.5), -math.log(0.5)]),
    start_logprobs=torch.tensor([math.log(2), 0.0]),
    values=torch.tensor([0.0, 0.0]),
    advantages=torch.tensor([2.0, -2.0]),
    returns=torch.tensor([1.0, 1.0]),
    weights=torch.tensor([0.5, 1.5]),
    imitation_weights=torch.tensor([2.0, 0.0]),
)
LOSS_ARGS = Args(ent_coef=0.1, kl_coef=0.5, vf_coef=2.0, imitation_coef=0.25)


def policy_now() -> dict[str, torch.Tensor]:
    """What the agent says of the two decisions; what it says of the action that was not executed is absurd."""
    outputs = dict(
        newlogprob=torch.tensor([[0.25, -0.25], [0.0, 70.0]]),
        entropy=torch.tensor([[1.0, 2.0], [4.0, 80.0]]),
        newvalue=torch.tensor([1.0, -1.0]),
        flow_error=torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [90.0, 90.0]]]),
    )
    return {name: output.requires_grad_() for name, output in outputs.items()}


def gradients_of(loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    return {name: gradient.tolist() for name, gradient in zip(outputs, gradients, strict=True)}


def test_ppo_loss_of_two_decisions_by_hand():
    loss, terms, logratio = ppo_loss(**policy_now(), batch=BATCH, args=LOSS_ARGS, only_imitates=False)
    assert logratio.exp().tolist() == pytest.approx([1.5, 0.5])
    expected = {
        "actor/loss": [-2 * 1.2, 2 * 0.8],  # both are clipped
        "actor/value_loss": [0.5 * 0.8**2, 0.5 * 2**2],  # the first by the clipped value
        "actor/imitation_loss": [2 * 2.5, 0.0],
        "actor/entropy": [3.0, 4.0],
        "actor/reference_kl": [2 - 1 - math.log(2), 0.0],
        "actor/approx_kl": [1.5 - 1 - math.log(1.5), 0.5 - 1 - math.log(0.5)],
        "actor/pg_clipfrac": [1.0, 1.0],
        "actor/value_clip_ratio": [1.0, 0.0],
    }
    assert {name: term.tolist() for name, term in terms.items()} == {
        name: pytest.approx(values, abs=1e-6) for name, values in expected.items()
    }
    first = -2.4 - 0.1 * 3 + 0.5 * (1 - math.log(2)) + 2 * 0.32
    second = 1.6 - 0.1 * 4 + 0.5 * 0 + 2 * 2.0
    assert loss.item() == pytest.approx((0.5 * first + 1.5 * second) / 2 + 0.25 * (5 + 0) / 2)


def test_imitation_alone_gives_the_policy_no_other_gradient():
    outputs = policy_now()
    loss, terms, _ = ppo_loss(**outputs, batch=BATCH, args=LOSS_ARGS, only_imitates=True)
    assert loss.item() == pytest.approx((0.5 * 2 * 0.32 + 1.5 * 2 * 2.0) / 2 + 0.25 * 5 / 2)
    assert terms["actor/loss"].tolist() == pytest.approx([-2.4, 1.6])  # logged all the same
    loss.backward()
    assert outputs["newlogprob"].grad is None
    # The entropy stays in the graph, for learned noise under DDP.
    assert outputs["entropy"].grad is not None
    assert not outputs["entropy"].grad.any()
    assert outputs["newvalue"].grad is not None
    assert outputs["newvalue"].grad.tolist() == pytest.approx([0.0, 1.5 * 2 * -2 / 2])  # the first is clipped
    assert outputs["flow_error"].grad is not None
    assert outputs["flow_error"].grad.flatten(1).tolist() == [[0.25 * 2 / 4 / 2] * 4, [0.0] * 4]


def test_a_decision_counts_by_its_weight():
    def gradients(*weights: float) -> dict[str, list[Any]]:
        outputs, batch = policy_now(), replace(BATCH, weights=torch.tensor(weights))
        return gradients_of(ppo_loss(**outputs, batch=batch, args=LOSS_ARGS, only_imitates=False)[0], outputs)

    once, twice, never = gradients(1, 1), gradients(1, 2), gradients(1, 0)
    for name in ("newlogprob", "entropy", "newvalue"):
        assert once[name][0] == twice[name][0] == never[name][0]
        assert np.array_equal(np.multiply(2, once[name][1]), twice[name][1])
        assert not np.any(never[name][1])
    assert once["flow_error"] == twice["flow_error"] == never["flow_error"]  # has weights of its own


@pytest.mark.parametrize("level", ["chunk", "action", "token"])
def test_an_action_that_was_not_executed_has_no_influence_on_the_loss(level: str):
    generator = torch.Generator().manual_seed(0)
    args = replace(LOSS_ARGS, logprob_level=level)
    shape = {"chunk": (2,), "action": (2, 2), "token": (2, 2, 3)}[level]
    batch = replace(BATCH, logprobs=torch.zeros(shape), start_logprobs=torch.full(shape, 0.1))
    now = policy_now()
    if level == "token":
        now |= {name: now[name].detach()[..., None].expand(2, 2, 3).clone() for name in ("newlogprob", "entropy")}
    results = []
    for _ in range(2):
        for name in ("newlogprob", "entropy", "flow_error"):
            now[name] = now[name].detach().clone()
            now[name][1, 1] = torch.randn(now[name][1, 1].shape, generator=generator)
            now[name].requires_grad_()
        results.append(ppo_loss(**now, batch=batch, args=args, only_imitates=False))
        gradients = gradients_of(results[-1][0], now)
        assert not any(np.any(gradients[name][1][1]) for name in ("newlogprob", "entropy", "flow_error"))
    (loss, terms, logratio), (other_loss, other_terms, other_logratio) = results
    assert loss == other_loss
    assert all(torch.equal(term, other_terms[name]) for name, term in terms.items())
    assert torch.equal(logratio, other_logratio)


def test_a_batch_gives_some_of_its_decisions_in_any_order():
    some = BATCH.at(np.array([1, 1, 0]))
    assert some.executed.tolist() == [[True, False], [True, False], [True, True]]
    assert some.weights.tolist() == [1.5, 1.5, 0.5]
    assert vars(some).keys() == vars(BATCH).keys()
