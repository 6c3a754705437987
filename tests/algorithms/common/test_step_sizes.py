"""Step sizes over a run."""

from typing import Any

import pytest
import torch

from algorithms.common.step_sizes import IMITATION_WARMUP, StepSizes, imitation_step_factor


def make(schedule: Any, target_kl: float | None = None, hold: float = 0.0) -> tuple[StepSizes, list[dict[str, Any]]]:
    groups = [{"name": name, "params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for name, lr in RATES.items()]
    optimizer = torch.optim.AdamW(groups)
    return StepSizes(optimizer, schedule, target_kl, hold), optimizer.param_groups


RATES = {"policy": 1e-3, "value": 1e-2}


def test_linear_falls_for_all_and_constant_for_none():
    for schedule, left in (("linear", 0.25), ("constant", 1.0)):
        sizes, groups = make(schedule)
        sizes.begin(0.75)
        assert [group["lr"] for group in groups] == pytest.approx([1e-3 * left, 1e-2 * left])


def test_linear_falls_after_the_part_that_holds():
    sizes, groups = make("linear", hold=0.6)
    for progress, left in ((0.0, 1.0), (0.6, 1.0), (0.7, 0.75), (0.9, 0.25), (0.3, 1.0)):
        sizes.begin(progress)
        assert [group["lr"] for group in groups] == pytest.approx([1e-3 * left, 1e-2 * left])


@pytest.mark.parametrize(
    ("schedule", "hold", "message"),
    [
        ("linear", 1.0, r"lr_hold=1.0 is not in \[0, 1\)"),
        ("linear", -0.1, r"lr_hold=-0.1 is not in \[0, 1\)"),
        ("constant", 0.5, "lr_hold=0.5 goes with --lr-schedule linear only"),
    ],
)
def test_holds_that_mean_nothing_are_refused(schedule, hold, message):
    with pytest.raises(ValueError, match=message):
        make(schedule, hold=hold)


def test_adaptive_follows_the_divergence_within_bounds_and_leaves_the_critic_alone():
    sizes, groups = make("adaptive", 0.1)
    for kl, expected in ((0.05, 1.0), (0.1, 1.0), (0.049, 1.5), (0.101, 1.0), (5.0, 1 / 1.5)):
        sizes.follow(torch.tensor(kl, dtype=torch.float64))
        assert groups[0]["lr"] == pytest.approx(1e-3 * expected)
    for kl, expected in ((0.0, 1e-2), (1.0, 1e-4)):
        for _ in range(20):
            sizes.begin(0.5)
            sizes.follow(torch.tensor(kl, dtype=torch.float64))
        assert groups[0]["lr"] == pytest.approx(expected)
    assert groups[1]["lr"] == 1e-2


def test_updates_end_beyond_the_target_only():
    sizes, _ = make("constant", 0.1)
    assert [sizes.exceeds(torch.tensor(kl, dtype=torch.float64)) for kl in (0.09, 0.1, 0.11)] == [False, False, True]
    assert not make("constant")[0].exceeds(torch.tensor(9.0))


@pytest.mark.parametrize("largest", [5.0, 0.5])
def test_imitation_rises_to_its_step_size_and_falls_to_that_of_what_follows(largest: float):
    rising = [imitation_step_factor(part * IMITATION_WARMUP, largest) for part in (0, 0.5, 1)]
    assert rising == pytest.approx([0, largest / 2, largest])
    halfway = IMITATION_WARMUP + (1 - IMITATION_WARMUP) / 2
    assert imitation_step_factor(halfway, largest) == pytest.approx((largest + 1) / 2)
    assert imitation_step_factor(1.0, largest) == 1


@pytest.mark.parametrize("target_kl", [None, 0.0])
def test_adaptive_without_a_target_is_refused(target_kl: float | None):
    with pytest.raises(ValueError, match="needs a positive target_kl"):
        make("adaptive", target_kl)


def test_moments_form_while_the_policy_rests_and_its_first_step_is_no_larger_than_the_next():
    sizes, groups = make("constant")
    optimizer = sizes._optimizer
    policy, value = (group["params"][0] for group in groups)

    def step() -> float:
        before = policy.item()
        policy.grad, value.grad = torch.randn(1, generator=noise), torch.ones(1)
        optimizer.step()
        return abs(policy.item() - before)

    noise = torch.Generator().manual_seed(0)
    for _ in range(20):
        with sizes.policy_scaled(0.0):
            assert step() == 0
    assert value.item() != 0
    assert groups[0]["lr"] == RATES["policy"]
    first, later = step(), [step() for _ in range(20)]
    assert first < 2 * max(later)
    assert first < 0.9 * RATES["policy"]  # without moments, Adam's first step is as large as the step size
