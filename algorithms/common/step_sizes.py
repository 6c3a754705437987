"""Step sizes over a run: constant, falling, or such that updates end near a wanted divergence."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from algorithms.common.args import check_schedule

Schedule = Literal["constant", "linear", "adaptive"]

# An adaptive step size changes by this factor, and stays within this factor of where it started.
CHANGE, LARGEST_CHANGE = 1.5, 10.0
# Part of the updates by imitation alone in which the policy's step size rises.
IMITATION_WARMUP = 0.1


def imitation_step_factor(done: float, largest: float) -> float:
    """Returns what the policy's step size is multiplied by while it learns by imitation alone.

    It rises from 0 to `largest` and falls to 1, both linearly.

    Args:
        done: part of the updates by imitation alone that is done, in [0, 1].
        largest: where it ends to rise, after `IMITATION_WARMUP` of them.
    """
    if done <= IMITATION_WARMUP:
        return largest * done / IMITATION_WARMUP
    return 1 + (largest - 1) * (1 - done) / (1 - IMITATION_WARMUP)


class StepSizes:
    """The step sizes of an optimiser's parameter groups.

    Args:
        optimizer: its groups' step sizes are those to start from. A group named "value" never adapts.
        schedule: `constant`; `linear`: all fall to 0 by the end of training; `adaptive`: see `follow`.
        target_kl: what `adaptive` follows.
        hold: part of training, in [0, 1), before `linear` lets them fall.

    Raises:
        ValueError: `adaptive` has no positive `target_kl`, or `hold` is out of range or goes with another schedule.
    """

    def __init__(self, optimizer: Any, schedule: Schedule, target_kl: float | None, hold: float = 0.0) -> None:
        check_schedule(schedule, target_kl, hold)
        self._optimizer, self._schedule, self._target_kl, self._hold = optimizer, schedule, target_kl, hold
        self._start = [group["lr"] for group in optimizer.param_groups]

    def begin(self, progress: float) -> None:
        """Sets the step sizes of an update, with the part of training that is done before it, in [0, 1)."""
        if self._schedule == "linear":
            left = min(1.0, (1 - progress) / (1 - self._hold))
            for group, start in zip(self._optimizer.param_groups, self._start, strict=True):
                group["lr"] = start * left

    @contextmanager
    def policy_scaled(self, factor: float) -> Generator[None]:
        """Within it the policy's step sizes are `factor` times as large.

        At 0 nothing but the value head moves, and AdamW's moments form all the same.
        """
        groups = [group for group in self._optimizer.param_groups if group.get("name") != "value"]
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def exceeds(self, kl: Tensor) -> bool:
        """Returns whether an update shall end because of its divergence from the rollout's policy, a scalar.

        Waits for the device only if there is a target.
        """
        return self._target_kl is not None and kl.item() > self._target_kl

    def follow(self, kl: Tensor) -> None:
        """Adapts to an update that ended at `kl`, a scalar: smaller above the target, larger below half of it."""
        if self._schedule != "adaptive" or self._target_kl is None:
            return
        value = kl.item()
        change = 1 / CHANGE if value > self._target_kl else CHANGE if value < self._target_kl / 2 else 1.0
        for group, start in zip(self._optimizer.param_groups, self._start, strict=True):
            if group.get("name") != "value":
                group["lr"] = min(max(group["lr"] * change, start / LARGEST_CHANGE), start * LARGEST_CHANGE)
