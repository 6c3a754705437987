"""What is not trained: frozen parameters in a smaller type, and what training started from."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.common.batch import index
from algorithms.common.features import FeatureStore
from gr00t_agent import DatasetMetadata, Gr00tAgent

AgentT = TypeVar("AgentT", bound=nn.Module)


def store_frozen_as(agent: AgentT, dtype: torch.dtype) -> AgentT:
    """Converts the frozen parameters of `agent`, which need no float32 for small steps, and returns it.

    Those of layer norms stay as they are: what trained layers give them is float32, and on a CPU PyTorch's layer norm
    takes no weights of a smaller type than its input's.
    """
    norms = [module for module in agent.modules() if isinstance(module, nn.LayerNorm)]
    kept = {id(parameter) for norm in norms for parameter in norm.parameters()}
    for parameter in agent.parameters():
        if not parameter.requires_grad and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return agent


def origin_of(accelerator: Accelerator, agent: nn.Module, *, with_trained: bool = False) -> dict[str, str]:
    """Returns what a resumed run takes once more from where it began, as digests by name; reads all these weights.

    A checkpoint's state has trained parameters alone. Frozen ones, and how a GR00T agent normalises, come from the
    model that the run began with, and that may be another one by then.

    Args:
        accelerator: of this process.
        agent: as it was made: not yet prepared, which may split its weights.
        with_trained: of all weights, and not of the frozen ones alone, since a `StartPolicy` is made of them.

    Returns:
        See `Checkpoints`; empty on other processes than the main one.
    """
    if not accelerator.is_main_process:
        return {}
    weights: dict[str, Tensor] = dict(agent.named_parameters())
    what = "weights that training started from"
    if not with_trained:
        weights = {name: parameter for name, parameter in weights.items() if not parameter.requires_grad}
        what = "agent's frozen weights"
    origin = {f"SHA-256 of the {what}": _weights_digest(weights)}
    if isinstance(agent, Gr00tAgent):
        origin["SHA-256 of the agent's statistics"] = _metadata_digest(agent.preprocessor.metadata)
    return origin


def _weights_digest(weights: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _metadata_digest(metadata: DatasetMetadata) -> str:
    # In float32, as they are used: those of a dataset may differ in the last bits of float64 from machine to machine.
    content = [metadata.embodiment_tag, _in_float32(metadata.statistics), metadata.modalities]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _in_float32(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_float32(item) for key, item in cast(Mapping[str, Any], value).items()}
    return np.asarray(value, np.float32).tolist()


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
