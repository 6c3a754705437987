"""Random numbers that depend on what they are for, not on who draws them.

Every draw of a training run has a key: the seed, the iteration, the decision, the environment. Nothing depends on how
environments are spread over processes and stages, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

# What a draw is for: the second part of a key, after the run's seed.
EPISODES, NOISE, MINIBATCHES, GROUPS, FLOW, UPDATES, EVALUATIONS = range(7)


def seed_of(*key: int) -> int:
    """Returns a seed in 0 .. 2^63 - 1 that is decided by all of `key`, non-negative integers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators_of(key: tuple[int, ...], env_ids: Iterable[int]) -> list[torch.Generator]:
    """Returns a generator for each environment, decided by `key` and its number among those of all processes."""
    return [torch.Generator().manual_seed(seed_of(*key, int(env_id))) for env_id in env_ids]


def flow_draws(
    key: tuple[int, ...], env_ids: Iterable[int], num_decisions: int, num_steps: int, chunk_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns noise float32 [K * N, H, A] and denoising steps int64 [K * N], 0 to `num_steps` - 1, for flow matching.

    Args:
        key: decides the draws together with an environment's number.
        env_ids: [N] numbers of this process's environments among those of all.
        num_decisions: K, decisions of each environment.
        num_steps: denoising steps.
        chunk_shape: H, A.
    """
    noise, steps = [], []
    for generator in generators_of(key, env_ids):
        noise.append(torch.randn((num_decisions, *chunk_shape), generator=generator))
        steps.append(torch.randint(num_steps, (num_decisions,), generator=generator))
    return torch.stack(noise, dim=1).flatten(0, 1), torch.stack(steps, dim=1).flatten()


def flow_draws_of(
    key: tuple[int, ...], env_ids: NDArray[np.integer], num_steps: int, chunk_shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `flow_draws` [B, H, A] and [B] for decisions of which environments have different numbers.

    Args:
        key: decides the draws together with an environment's number.
        env_ids: [B] the environment of each decision among those of all processes; an environment's in its order.
        num_steps: denoising steps.
        chunk_shape: H, A.
    """
    noise = torch.empty((len(env_ids), *chunk_shape))
    steps = torch.empty(len(env_ids), dtype=torch.int64)
    for env_id in np.unique(env_ids):
        rows = torch.from_numpy(np.flatnonzero(env_ids == env_id))
        noise[rows], steps[rows] = flow_draws(key, [env_id], len(rows), num_steps, chunk_shape)
    return noise, steps


def stratified_minibatches(strata: NDArray[np.integer], num_parts: int, key: tuple[int, ...]) -> list[NDArray[np.intp]]:
    """Returns `num_parts` random, disjoint sets of rows [M_i] that together are all rows: an epoch's minibatches.

    The rows of each stratum are shuffled and dealt to the parts in turn, beginning at a random part. So each part has
    equally many of a stratum, to within one, and who else's strata are dealt makes no difference: a part's rows over
    all processes do not depend on the number of processes, if strata lie whole on one.

    Args:
        strata: [B] stratum of each row, non-negative.
        num_parts: how many sets.
        key: decides the result together with the strata's numbers.
    """
    part_of_row = np.empty(len(strata), dtype=np.intp)
    position = np.empty(len(strata), dtype=np.float64)
    for stratum in np.unique(strata):
        rng = np.random.default_rng((*key, int(stratum)))
        rows = rng.permutation(np.flatnonzero(strata == stratum))
        part_of_row[rows] = (rng.integers(num_parts) + np.arange(len(rows))) % num_parts
        position[rows] = rng.random(len(rows))
    order = np.argsort(position, kind="stable")  # mixes strata, so that micro-batches are mixed too
    return [order[part_of_row[order] == part] for part in range(num_parts)]
