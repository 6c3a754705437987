"""What rollout workers give learners through Ray's object store: K decisions in n environments, as arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray


class Cut(NamedTuple):
    """Episodes that a decision truncated: its number, the rows [m] of their environments, and their encoded last
    observations [m, ...].
    """

    decision: int
    rows: NDArray[np.intp]
    features: dict[str, Any]


class Rollout(NamedTuple):
    """K decisions in n environments, arrays in host memory.

    `features` [K, n, ...] are the encoded observations that were decided on, `last_features` [n, ...] those after the
    last decision. `actions` and `logprobs` are the agent's, [K, n, ...]; all others are [K, n]: `versions` of the
    weights that decided, `executed_steps` environment steps of the decision, `episode_lengths` of the episode that
    ended with it, in environment steps, and `task_ids` of its episode, if they are asked for.
    """

    features: dict[str, Any]
    last_features: dict[str, Any]
    cut: list[Cut]
    actions: Any
    logprobs: Any
    values: Any
    rewards: Any
    terminal: Any
    succeeded: Any
    ended: Any
    executed_steps: Any
    episode_lengths: Any
    task_ids: Any
    versions: Any


def map_tree(function: Callable[..., Any], *trees: Any) -> Any:
    """Returns `function` of the corresponding leaves of trees that are nested alike."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: map_tree(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, tuple):
        return cast(Any, type(first))._make(map_tree(function, *leaves) for leaves in zip(*trees, strict=True))
    return function(*trees)


class DecisionArrays:
    """What K decisions in n environments leave behind, in host memory soon after each is made.

    Devices need no room for it: the features of a rollout may be tens of gigabytes. The memory is made once; what is
    put for the next rollout is written over what was put for the last. From a GPU it is copied while the host goes on.

    Args:
        num_steps: K.
        num_envs: n.
    """

    def __init__(self, num_steps: int, num_envs: int) -> None:
        self._shape = (num_steps, num_envs)
        self._kept: Any = None
        self._is_pinned = False

    def put(self, step: int, rows: slice, tensors: Any) -> None:
        """Copies what the decision `step` left behind in the environments `rows`, nested tensors [len(rows), ...]."""
        tensors = map_tree(torch.as_tensor, tensors)
        if self._kept is None:
            self._kept = map_tree(self._room_for, tensors)

        def copy(whole: torch.Tensor, leaf: torch.Tensor) -> None:
            whole[step, rows].copy_(leaf.detach(), non_blocking=leaf.is_cuda)

        map_tree(copy, self._kept, tensors)

    @property
    def arrays(self) -> Any:
        """[K, n, ...], nested and typed as `to_store` returns what was put; valid until something else is put."""
        if self._is_pinned:
            torch.cuda.synchronize()  # copies from the device may still be running
        return to_store(self._kept)

    def _room_for(self, leaf: torch.Tensor) -> torch.Tensor:
        self._is_pinned |= leaf.is_cuda
        shape = (*self._shape, *leaf.shape[1:])
        return torch.empty(shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)


def split_rollout(rollout: Rollout, num_parts: int) -> list[Rollout]:
    """Returns rollouts of equally many environments each, in order."""
    parts: list[Rollout] = []
    num_envs = rollout.rewards.shape[1]
    size = num_envs // num_parts
    for first in range(0, num_envs, size):
        rows = slice(first, first + size)
        cut: list[Cut] = []
        for k, at, features in rollout.cut:
            mine = np.flatnonzero((at >= first) & (at < first + size))
            if len(mine):
                cut.append(Cut(k, at[mine] - first, _of(features, mine)))
        fields = {
            name: _of(value, (slice(None), rows))
            for name, value in rollout._asdict().items()
            if name not in ("cut", "last_features")
        }
        parts.append(Rollout(**fields, cut=cut, last_features=_of(rollout.last_features, rows)))
    return parts


def _of(tree: Any, rows: Any) -> Any:
    return map_tree(lambda leaf: leaf[rows], tree)


def join_rollouts(parts: Sequence[Rollout], device: torch.device) -> Rollout:
    """Returns rollouts, tensors from the store, side by side as one on `device`.

    Without `features`, which the device need not have room for.
    """
    sizes = [part.rewards.shape[1] for part in parts]
    offsets = np.cumsum([0, *sizes[:-1]])

    def joined(name: str, dim: int) -> Any:
        trees = [getattr(part, name) for part in parts]
        return map_tree(lambda *leaves: torch.cat(leaves, dim=dim).to(device), *trees)

    of_decisions = [name for name in Rollout._fields if name not in ("features", "last_features", "cut")]
    return Rollout(
        features={},
        last_features=joined("last_features", 0),
        cut=[
            Cut(k, offset + rows, to_device(features, device))
            for offset, part in zip(offsets.tolist(), parts, strict=True)
            for k, rows, features in part.cut
        ],
        **{name: joined(name, 1) for name in of_decisions},
    )


def to_device(tree: Any, device: torch.device) -> Any:
    """Returns nested tensors on `device`."""
    return map_tree(lambda leaf: leaf.to(device), tree)


# --- tensors in the object store ---


class _Bfloat16(NamedTuple):
    """A tensor of a type that NumPy has not, as 16-bit integers."""

    bits: NDArray[np.int16]


def to_store(tree: Any) -> Any:
    """Returns nested tensors as arrays in host memory, which the object store keeps without a copy."""
    if isinstance(tree, Mapping):
        return {name: to_store(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return cast(Any, type(tree))._make(to_store(leaf) for leaf in tree)
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach().cpu().contiguous()
        return _Bfloat16(tensor.view(torch.int16).numpy()) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return tree


def from_store(tree: Any) -> Any:
    """Returns what `to_store` was given, tensors in host memory that must not be written to."""
    if isinstance(tree, _Bfloat16):
        return from_store(tree.bits).view(torch.bfloat16)
    if isinstance(tree, Mapping):
        return {name: from_store(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return cast(Any, type(tree))._make(from_store(leaf) for leaf in tree)
    if isinstance(tree, list):
        return [from_store(leaf) for leaf in tree]
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(tree)
    return tree
