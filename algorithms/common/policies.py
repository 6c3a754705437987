"""Policies that are no agents of ours, as an evaluation takes them, and what is executed of their action chunks.

A chunk source returns whole chunks [N, H, 7]; `FirstSteps` executes the first C steps of each, `TemporalEnsemble` the
mean of all chunks that reach to a step. Policies whose servers answer are in `algorithms.common.policy_clients`.

Shape legend: N environments, C executed steps of a chunk of H steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.common.evaluation import EpisodicPolicy
from libero_gym.conventions import ACTION_DIM
from libero_gym.own_policies import check_for_evaluations, load_factory


class ChunkSource(Protocol):
    """What decides; one with the methods of `EpisodicPolicy` is told when episodes begin and end."""

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns whole chunks, float32 [N, H, 7], H >= C."""
        ...


def check_is_numbers(value: Any, what: str, expected: str) -> None:
    """Raises ValueError unless `value` is an array of whole or real numbers: no truth values, complex ones or dates.

    Args:
        value: what should be an array.
        what: it is called, with who gave it.
        expected: of it, for the message.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    raise ValueError(f"{what} is {kind}; expected an array of {expected}")


def checked_chunk(
    value: Any, num_steps: int, who: str, *, num_rows: int | None = None, what: str = "actions"
) -> NDArray[np.float32]:
    """Returns `value` as a float32 array.

    Args:
        value: what should be actions [H, 7], or [N, H, 7].
        num_steps: C.
        who: gave it.
        num_rows: N; None for a single chunk.
        what: it is called.

    Raises:
        ValueError: it is no array of numbers of such a shape with at least C steps, or one is not finite in float32.
    """
    rows = () if num_rows is None else (num_rows,)
    expected = f"numbers of shape {[*rows, 'H', ACTION_DIM]} with H >= {num_steps} (num_action_chunks)".replace("'", "")
    array = _from_tensor(value) if isinstance(value, Tensor) else value
    check_is_numbers(array, f"{who}: {what}", expected)
    shape = array.shape
    if len(shape) != len(rows) + 2 or shape[: len(rows)] != rows or shape[-1] != ACTION_DIM or shape[-2] < num_steps:
        raise ValueError(f"{who}: {what} has shape {list(shape)}; expected {expected}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        chunk = array.astype(np.float32)
    if not np.isfinite(chunk).all():
        place = [int(i) for i in np.argwhere(~np.isfinite(chunk))[0]]
        raise ValueError(f"{who}: {what}{place} is {array[tuple(place)]}; expected finite {expected}, in float32")
    return chunk


def _from_tensor(tensor: Tensor) -> NDArray[Any]:
    """Returns a tensor's values; NumPy has not all of PyTorch's types of real numbers, and float64 holds them."""
    on_cpu = tensor.detach().cpu()
    return (on_cpu.double() if on_cpu.is_floating_point() else on_cpu).numpy()


class OwnPolicy:
    """A policy that `--policy` names, see `gr00t_agent.Policy`.

    Args:
        name: where it is, see `libero_gym.own_policies`.
        num_action_chunks: C; None takes the policy's own.

    Attributes:
        image_size: of the cameras.
        num_action_chunks: C.

    Raises:
        ValueError: it is not there, or what was made lacks something of a policy.
    """

    def __init__(self, name: str, num_action_chunks: int | None) -> None:
        policy = load_factory(name)()
        self._policy, self._name = policy, name
        check_for_evaluations(name, policy)
        self.image_size = int(policy.image_size)
        self.num_action_chunks = num_action_chunks or int(policy.num_action_chunks)
        self._reset = getattr(policy, "reset", None)

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        """Tells the policy, if it has a method `reset`."""
        if self._reset is not None:
            self._reset(list(env_ids))

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        """Does nothing: a policy is told of the next episode."""

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns the policy's chunks, float32 [N, H, 7].

        Raises:
            ValueError: they are none, see `checked_chunk`.
        """
        actions = self._policy.predict(obs, generator=generator)
        who = f"policy {self._name}"
        return torch.from_numpy(checked_chunk(actions, self.num_action_chunks, who, num_rows=len(generator)))


class WholeChunks:
    """A GR00T agent that returns all steps of its chunks.

    Args:
        agent: see `gr00t_agent.Gr00tAgent`.
    """

    def __init__(self, agent: Any) -> None:
        self._agent, (self._num_steps, _) = agent, agent.noise_shape

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns float32 [N, H, 7]."""
        return self._agent.predict(obs, generator=generator, num_steps=self._num_steps)


class FirstSteps:
    """Executes the first C steps of each chunk.

    Args:
        source: decides.
        num_action_chunks: C.
    """

    def __init__(self, source: ChunkSource, num_action_chunks: int) -> None:
        self._source, self._num_steps = source, num_action_chunks

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        """Tells the source."""
        if isinstance(self._source, EpisodicPolicy):
            self._source.begin_episodes(env_ids)

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        """Tells the source."""
        if isinstance(self._source, EpisodicPolicy):
            self._source.end_episodes(env_ids)

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns float32 [N, C, 7]."""
        return self._source.predict(obs, generator=generator)[:, : self._num_steps]


class TemporalEnsemble(FirstSteps):
    """Executes, at each step, a weighted mean of the actions that all chunks so far have for it.

    The weight of the i-th oldest of these chunks is exp(-k i), divided by the sum over all: k = 0 weighs them alike,
    and the larger k, the slower a new chunk is taken in. With C = 1 every step is decided anew, as in the source; with
    more, chunks are C steps apart.

    Source: Zhao et al. 2023 (arXiv:2304.13705), section IV-B and `temporal_agg` of its code, where k = 0.01. There a
    chunk whose action is exactly zero counts as absent, and here not.

    Args:
        source: decides.
        num_action_chunks: C.
        coefficient: k.

    Raises:
        ValueError: k is not finite.
    """

    def __init__(self, source: ChunkSource, num_action_chunks: int, coefficient: float) -> None:
        if not math.isfinite(coefficient):
            raise ValueError(f"temporal_ensemble={coefficient} must be a finite number; the source's is 0.01")
        super().__init__(source, num_action_chunks)
        self._coefficient = coefficient
        # What each environment's chunks, the oldest first, have for the steps from the present on: [H or fewer, 7].
        self._chunks: dict[int, list[Tensor]] = {}

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        """Forgets the chunks of episodes before."""
        super().begin_episodes(env_ids)
        for env_id in env_ids:
            self._chunks[env_id] = []

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns float32 [N, C, 7]."""
        newest = self._source.predict(obs, generator=generator).cpu()
        return torch.stack([self._blend(env_id, chunk) for env_id, chunk in enumerate(newest)])

    def _blend(self, env_id: int, newest: Tensor) -> Tensor:
        """Returns an environment's next C actions, [C, 7], and moves its chunks on by as many steps."""
        chunks = [*self._chunks.get(env_id, ()), newest]
        actions: list[Tensor] = []
        for step in range(self._num_steps):
            known = torch.stack([chunk[step] for chunk in chunks if len(chunk) > step])  # [n, 7], the oldest first
            weights = self._weights(len(known))
            actions.append((known * weights[:, None]).sum(dim=0) / weights.sum())
        self._chunks[env_id] = [chunk[self._num_steps :] for chunk in chunks if len(chunk) > self._num_steps]
        return torch.stack(actions).float()

    def _weights(self, count: int) -> Tensor:
        """Returns the weights of so many chunks, the oldest first, float64 [count]; the largest is 1."""
        age = torch.arange(count, dtype=torch.float64)
        # A negative k favours the newest: counted from there, no exponential overflows.
        rank = age if self._coefficient >= 0 else age.flip(0)
        return torch.exp(-abs(self._coefficient) * rank)
