"""An exponential moving average of weights in training."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of parameters, kept in float32.

    The decay rises to its final value as (1 + n) / (10 + n) over the updates n, so that the initial weights are soon
    forgotten.

    Args:
        parameters: what is averaged.
        decay: weight of the past, in (0, 1).

    Attributes:
        averages: one tensor per parameter.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} is not in (0, 1)")
        self.decay = decay
        self._parameters = list(parameters)
        self.averages: list[Tensor] = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Takes in the present weights, after update number `num_updates` (from 1)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        present = [p.detach().float() for p in self._parameters]
        torch._foreach_lerp_(self.averages, present, 1 - decay)  # pyright: ignore

    @contextmanager
    def applied(self) -> Generator[None]:
        """Puts the averages in place of the weights for a while."""
        saved = [p.detach().clone() for p in self._parameters]
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(saved)

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
