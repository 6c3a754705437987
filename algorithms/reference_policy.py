"""The policy that training started from, kept to measure how far it has moved."""

from __future__ import annotations

import copy

from torch import nn


def frozen_copy(agent: nn.Module, *, share_frozen: bool) -> nn.Module:
    """Returns a copy of `agent` that is not trained.

    Args:
        agent: what is copied.
        share_frozen: do not copy parameters that are frozen in `agent`, which must then never change (a backbone).
    """
    shared = {id(p): p for p in agent.parameters() if share_frozen and not p.requires_grad}
    return copy.deepcopy(agent, dict(shared)).requires_grad_(False)
