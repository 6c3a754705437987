"""Indexing, joining and averaging of the nested arrays that a rollout stores.

An observation is a dict of arrays, an action a NamedTuple of tensors, everything else one array; all have the batch as
their first dimension.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def index(tree: Any, inds: NDArray[np.intp]) -> Any:
    """Returns rows `inds` [M] of every array in `tree`, in the same nesting."""
    if isinstance(tree, dict):
        return {name: index(leaf, inds) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return type(tree)._make(index(leaf, inds) for leaf in tree)
    if isinstance(tree, torch.Tensor):
        return tree[torch.from_numpy(inds).to(tree.device)]
    return np.asarray(tree)[inds]


def concatenate(trees: Sequence[Any]) -> Any:
    """Returns `trees`, which are nested alike, joined along the first dimension of every array."""
    first = trees[0]
    if isinstance(first, dict):
        return {name: concatenate([tree[name] for tree in trees]) for name in first}
    if isinstance(first, tuple):
        return type(first)._make(concatenate(leaves) for leaves in zip(*trees, strict=True))
    if isinstance(first, torch.Tensor):
        return torch.cat(list(trees))
    return np.concatenate([np.asarray(tree) for tree in trees])


def mean_of(stats: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the mean of each named scalar over `stats`, which all have the same names."""
    means = torch.stack([torch.stack(list(scalars.values())) for scalars in stats]).mean(0)
    return dict(zip(stats[0], means, strict=True))
