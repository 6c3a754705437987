"""What is not trained: frozen parameters in a smaller type, and the policy that training started from."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.common.batch import index
from algorithms.common.features import FeatureStore

AgentT = TypeVar("AgentT", bound=nn.Module)


def store_frozen_as(agent: AgentT, dtype: torch.dtype) -> AgentT:
    """Converts the frozen parameters of `agent`, which need no float32 for small steps, and returns it."""
    for parameter in agent.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return agent


class StartPolicy:
    """The policy that training started from, kept to measure how far training has gone.

    Args:
        agent: what is copied.
        share_frozen: do not copy parameters that are frozen in `agent`, which must then never change (a backbone).
    """

    def __init__(self, agent: nn.Module, *, share_frozen: bool) -> None:
        shared: dict[int, Any] = {id(p): p for p in agent.parameters() if share_frozen and not p.requires_grad}
        self._policy = copy.deepcopy(agent, shared).requires_grad_(False)

    @torch.no_grad()
    def logprobs(
        self,
        store: FeatureStore,
        rows: NDArray[np.intp],
        actions: Any,
        inds: NDArray[np.intp],
        *,
        num_passes: int,
        **noise: float,
    ) -> Tensor:
        """Returns its log-probabilities [M, ...] of some of a rollout's actions.

        Args:
            store: holds the observations.
            rows: [B] where each decision's observation is in the store.
            actions: what was decided, tensors [B, ...].
            inds: [M] the decisions that are asked for.
            num_passes: forward passes.
            noise: options of the policy's noise.
        """
        logprobs: list[Tensor] = []
        for part in np.array_split(inds, num_passes):
            _, logprob, *_ = self._policy(store.get(rows[part]), index(actions, part), **noise)
            logprobs.append(logprob)
        return torch.cat(logprobs)
