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


def frozen_copy(agent: AgentT, *, share_frozen: bool) -> AgentT:
    """Returns a copy of `agent` that is not trained.

    Args:
        agent: what is copied.
        share_frozen: do not copy parameters that are frozen in `agent`, which must then never change (a backbone).
    """
    shared: dict[int, Any] = {id(p): p for p in agent.parameters() if share_frozen and not p.requires_grad}
    return copy.deepcopy(agent, shared).requires_grad_(False)


def logprobs_of(
    policy: nn.Module, store: FeatureStore, rows: NDArray[np.intp], actions: Any, num_passes: int, **noise: float
) -> Tensor:
    """Returns the log-probabilities that a policy gives to a rollout's actions; call it without gradients.

    Args:
        policy: an agent.
        store: holds the observations.
        rows: [B] where each decision's observation is in the store.
        actions: what was decided, tensors [B, ...].
        num_passes: forward passes.
        noise: options of the policy's noise.
    """
    logprobs: list[Tensor] = []
    for part in np.array_split(np.arange(len(rows)), num_passes):
        _, logprob, *_ = policy(store.get(rows[part]), index(actions, part), **noise)
        logprobs.append(logprob)
    return torch.cat(logprobs)
