"""What is not trained: frozen parameters in a smaller type, and the policy that training started from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from algorithms.common.batch import index
from algorithms.common.feature_store import FeatureStore

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


def reference_log_probs(
    call: Callable[..., Any],
    reference: nn.Module,
    store: FeatureStore,
    batch: Mapping[str, Any],
    num_passes: int,
    **options: float,
) -> Tensor:
    """Returns the reference's log-probabilities of all decisions in `batch`.

    Args:
        call: calls without gradients, in training's precision.
        reference: the policy.
        store: holds the observations.
        batch: `row` in the store and `action` of each decision.
        num_passes: forward passes.
        options: for the policy.
    """
    scores: list[Tensor] = []
    for part in np.array_split(np.arange(len(batch["row"])), num_passes):
        rows, actions = index(batch["row"], part), index(batch["action"], part)
        scores.append(call(reference, store.get(rows), actions, **options)[1])
    return torch.cat(scores)
