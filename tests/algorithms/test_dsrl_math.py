"""The mathematics of DSRL: densities, losses, targets and the replay buffer, by value."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform, TransformedDistribution

from algorithms.common.steering import NoiseActor, NoiseSpace
from algorithms.dsrl_gr00t import (
    Critics,
    Replay,
    Transitions,
    actor_loss,
    clipped_step,
    critic_loss,
    ensemble_value,
    polyak_update,
    td_target,
    temperature_loss,
)


def space(**changes: Any) -> NoiseSpace:
    return NoiseSpace(
        **(dict(num_steps=3, num_executed=2, padded_dim=4, action_dim=2, form="repeated", bound=1.5) | changes)
    )


def make_actor(noise_space: NoiseSpace, feature_dim: int = 5) -> NoiseActor:
    torch.manual_seed(0)
    actor = NoiseActor(noise_space, feature_dim=feature_dim, latent_dim=4, hidden_dims=(8, 8))
    with torch.no_grad():
        for head in (actor.mean, actor.log_std):
            head.weight.normal_(0, 0.7)
            head.bias.normal_(0, 0.3)
    return actor


# --- noise ---


def test_repeated_noise_is_one_vector_beside_padding_that_is_drawn():
    normal = torch.arange(12.0).reshape(1, 3, 4)
    assert space().dim == 2
    assert space().of_base_policy(normal).tolist() == [[0, 1]]
    noise = space().chunk_noise(torch.tensor([[7.0, 8.0]]), normal)
    assert noise.tolist() == [[[7, 8, 2, 3], [7, 8, 6, 7], [7, 8, 10, 11]]]


def test_noise_of_executed_steps_leaves_the_others_as_they_are_drawn():
    normal = torch.arange(12.0).reshape(1, 3, 4)
    own = space(form="executed")
    assert own.dim == 4
    assert own.of_base_policy(normal).tolist() == [[0, 1, 4, 5]]
    assert torch.equal(own.chunk_noise(own.of_base_policy(normal), normal), normal)
    noise = own.chunk_noise(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), normal)
    assert noise.tolist() == [[[-1, -2, 2, 3], [-3, -4, 6, 7], [8, 9, 10, 11]]]
    assert normal[0, 0, 0] == 0


def test_noise_for_each_step_is_all_that_the_policy_was_trained_on():
    normal = torch.arange(24.0).reshape(2, 3, 4)
    own = space(form="per_step")
    assert own.dim == 6
    assert own.of_base_policy(normal)[1].tolist() == [12, 13, 16, 17, 20, 21]
    assert torch.equal(own.chunk_noise(own.of_base_policy(normal), normal), normal)


def test_a_row_draws_what_the_evaluation_draws_for_the_base_policy():
    normal, eps = space().draw([torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)])
    assert (normal.shape, eps.shape) == ((2, 3, 4), (2, 2))
    assert torch.equal(normal[1], torch.randn((3, 4), generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(form="free"), r"form='free' is unknown \(valid: executed, per_step, repeated\)"),
        (dict(bound=0.0), "bound=0.0 must be positive"),
        (dict(action_dim=5), "action_dim=5 must be in 1-4"),
        (dict(num_executed=4), "num_executed=4 in 1-3"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        space(**changes)


# --- the actor ---


@pytest.mark.parametrize("form", ["executed", "per_step", "repeated"])
def test_the_log_density_is_that_of_the_squashed_gaussian(form: Any):
    actor = make_actor(space(form=form)).double()
    z, eps = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, actor.space.dim, dtype=torch.float64)
    mean, std = actor(z)
    transforms: list[Any] = [TanhTransform(), AffineTransform(0, 1.5)]
    expected = Independent(TransformedDistribution(Normal(mean, std), transforms), 1)
    decision, logprob = actor.sample(z, eps)
    torch.testing.assert_close(decision, 1.5 * torch.tanh(mean + std * eps))
    torch.testing.assert_close(logprob, expected.log_prob(decision))
    torch.testing.assert_close(actor.mode(z), 1.5 * torch.tanh(mean))


def test_the_log_density_is_finite_where_tanh_rounds_to_one():
    actor = make_actor(space())
    with torch.no_grad():
        actor.mean.bias.fill_(40.0)
    decision, logprob = actor.sample(torch.zeros(1, 5), torch.zeros(1, 2))
    assert decision.tolist() == [[1.5, 1.5]]
    assert torch.isfinite(logprob).all()
    assert torch.isfinite(torch.autograd.grad(logprob.sum(), actor.mean.bias)[0]).all()


def test_an_untrained_actor_squashes_a_standard_normal():
    actor = NoiseActor(space(), feature_dim=5, latent_dim=4, hidden_dims=(8,))
    mean, std = actor(torch.randn(100, 5))
    assert mean.abs().max() < 0.05
    assert (std - 1).abs().max() < 0.05


def test_features_are_standardised_and_what_hardly_varies_is_not_blown_up():
    actor = make_actor(space())
    actor.set_statistics(torch.tensor([1.0, 0, 0, 0, 5]), torch.tensor([2.0, 1, 1, 1, 0]))
    z = actor.standardise(torch.tensor([[3.0, 0, 0, 100, 5 + 1e-6]]).half())
    assert z[0].tolist() == [1, 0, 0, 10, 0]  # half precision keeps nothing of the last one's difference
    assert z.dtype == torch.float32
    assert actor.feature_std[4].item() == pytest.approx(1e-3)


# --- critics, targets and losses ---


def test_an_ensemble_is_its_critics_one_by_one():
    torch.manual_seed(0)
    critics = Critics(feature_dim=5, decision_dim=2, num_critics=3, latent_dim=4, hidden_dims=(8, 6))
    z, decision = torch.randn(7, 5), torch.randn(7, 2)
    values = critics(z, decision)
    assert values.shape == (3, 7)
    for j in range(3):
        x = torch.cat([critics.encoder(z), decision], -1)
        for layer in critics.heads:
            x = x.relu() if isinstance(layer, nn.ReLU) else x @ layer.weight[j] + layer.bias[j]
        torch.testing.assert_close(values[j], x[:, 0])
    assert (values.std(0) > 1e-3).all()  # each begins elsewhere


def test_targets_bootstrap_but_for_what_is_terminal():
    rewards, next_values = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([4.0, 100.0, 2.0])
    target = td_target(rewards, next_values, torch.tensor([False, True, False]), 0.5)
    assert target.tolist() == [2.0, 1.0, 0.0]
    # Not a number times 0 would be not a number.
    assert td_target(torch.ones(1), torch.tensor([math.nan]), torch.tensor([True]), 0.5).item() == 1


def test_losses_by_hand():
    values, target = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([1.0, 4.0])
    assert critic_loss(values, target).item() == (0 + 4 + 4 + 4) / 4
    assert ensemble_value(values, "mean").tolist() == [2, 4]
    assert ensemble_value(values, "min").tolist() == [1, 2]
    logprob = torch.tensor([-1.0, 3.0], requires_grad=True)
    assert actor_loss(logprob, target, torch.tensor(0.5)).item() == (-0.5 - 1 + 1.5 - 4) / 2


def test_the_temperature_rises_while_the_entropy_is_below_its_target():
    log_alpha = torch.tensor(math.log(0.2), requires_grad=True)
    logprob = torch.tensor([1.0, 3.0], requires_grad=True)  # entropy -2
    loss = temperature_loss(log_alpha, logprob, -1.5)
    assert loss.item() == pytest.approx(0.2 * (-2 + 1.5))
    (gradient,) = torch.autograd.grad(loss, log_alpha, retain_graph=True)
    assert gradient.item() == pytest.approx(-0.1)  # descent raises it
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(loss, logprob)


def test_targets_follow_by_a_part_of_the_way():
    torch.manual_seed(0)
    target, source = nn.Linear(2, 3), nn.Linear(2, 3)
    expected = {name: 0.9 * value + 0.1 * source.state_dict()[name] for name, value in target.state_dict().items()}
    polyak_update(target, source, 0.1)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("max_grad_norm", [100.0, 0.5])
def test_a_step_moves_its_own_parameters_alone(max_grad_norm: float):
    torch.manual_seed(0)
    moved, other, reference = nn.Linear(3, 2), nn.Linear(2, 1), nn.Linear(3, 2)
    reference.load_state_dict(moved.state_dict())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    x = torch.randn(5, 3)
    optimizer = torch.optim.SGD([*moved.parameters(), *other.parameters()], lr=0.1)
    norm = clipped_step(
        Accelerator(), optimizer, other(moved(x)).square().sum(), [*moved.parameters()], max_grad_norm
    )  # fmt: skip
    assert all(p.grad is None for p in (*moved.parameters(), *other.parameters()))
    other(reference(x)).square().sum().backward()
    expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(norm, expected_norm)
    for name, value in moved.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_gradient_that_is_not_finite_moves_nothing():
    layer = nn.Linear(2, 1)
    before = layer.weight.clone()
    optimizer = torch.optim.Adam(layer.parameters())
    loss = layer(torch.tensor([[math.inf, 1.0]])).sum()
    norm = clipped_step(Accelerator(), optimizer, loss, [*layer.parameters()], 1.0)
    assert not torch.isfinite(norm)
    assert torch.equal(layer.weight, before)


# --- replay ---


def transitions(first: int, count: int) -> Transitions:
    number = torch.arange(first, first + count)
    return Transitions(
        features=number[:, None].expand(-1, 3).half(),
        decision=number[:, None].float(),
        reward=10.0 * number,
        next_features=number[:, None].expand(-1, 3).half() + 1,
        terminal=number % 2 == 0,
    )


def test_the_oldest_decisions_give_way():
    replay = Replay(5)
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        replay.filled()
    replay.add(transitions(0, 3))
    assert replay.size == 3
    replay.add(transitions(3, 4))
    assert replay.size == 5
    kept = replay.get(torch.tensor([4, 0, 1, 2, 3]))
    assert kept.decision[:, 0].tolist() == [4, 5, 6, 2, 3]
    assert kept.reward.tolist() == [40, 50, 60, 20, 30]
    assert kept.terminal.tolist() == [True, False, True, True, False]
    assert kept.next_features[0].tolist() == [5, 5, 5]
    assert kept.features.dtype == torch.float16


@pytest.mark.parametrize("counts", [(3,), (3, 4)])
def test_a_buffer_goes_on_where_it_was(counts: tuple[int, ...]):
    whole, again = Replay(5), Replay(5)
    for first, count in zip(np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True):
        whole.add(transitions(first, count))
    again.load_state({name: value.clone() for name, value in whole.state().items()}, torch.device("cpu"))
    for replay in (whole, again):
        replay.add(transitions(20, 2))
    assert again.size == whole.size
    assert all(torch.equal(a, b) for a, b in zip(again.filled(), whole.filled(), strict=True))
    empty = Replay(5)
    empty.load_state(Replay(5).state(), torch.device("cpu"))
    assert empty.size == 0


def test_features_that_their_type_does_not_hold_are_refused():
    large = transitions(0, 2)._replace(features=torch.full((2, 3), 1e6).half())
    with pytest.raises(FloatingPointError, match=r"features of a decision is not finite in torch.float16; .*bfloat16"):
        Replay(5).add(large)
