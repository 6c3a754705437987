"""What the trainers ask of vector environments beyond Gymnasium's interface. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

EnvState = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class StackedStates(Mapping[int, EnvState]):
    """States of environments by their number, stacked where arrays are alike.

    A thousand environments have some twenty thousand arrays, most of them small, which takes as long to pickle as
    a simulation takes for a decision; stacked they are as many as one environment has, or a few times that where
    scenes differ.

    Attributes:
        blocks: numbers of environments [n], and their arrays [n, ...] by name.
    """

    blocks: tuple[tuple[NDArray[np.int64], dict[str, NDArray[Any]]], ...]

    @classmethod
    def of(cls, states: Mapping[int, EnvState]) -> StackedStates:
        """Returns a copy of states."""
        alike: dict[Any, list[int]] = {}
        for env_id, state in states.items():
            form = tuple((name, array.shape, array.dtype.str) for name, array in state.items())
            alike.setdefault(form, []).append(env_id)
        return cls(
            tuple(
                (np.array(env_ids), {name: np.stack([states[i][name] for i in env_ids]) for name, _, _ in form})
                for form, env_ids in alike.items()
            )
        )

    def renumbered(self, env_ids: NDArray[np.int64]) -> StackedStates:
        """Returns the states with the number `env_ids[i]` for i."""
        return StackedStates(tuple((env_ids[numbers], arrays) for numbers, arrays in self.blocks))

    def __getitem__(self, env_id: int) -> EnvState:
        for numbers, arrays in self.blocks:
            for row in np.flatnonzero(numbers == env_id).tolist():
                return {name: array[row, ...] for name, array in arrays.items()}
        raise KeyError(env_id)

    def __iter__(self) -> Iterator[int]:
        return (env_id for numbers, _ in self.blocks for env_id in numbers.tolist())

    def __len__(self) -> int:
        return sum(len(numbers) for numbers, _ in self.blocks)


def merged_states(parts: Sequence[StackedStates | None]) -> StackedStates | None:
    """Returns the states of all parts, which are of different environments; None if one has none."""
    blocks: list[Any] = []
    for part in parts:
        if part is None:
            return None
        blocks += part.blocks
    return StackedStates(tuple(blocks))


def can_restore(envs: gym.vector.VectorEnv) -> bool:
    """Returns whether each environment's state can be taken and put back."""
    base = envs.unwrapped
    return hasattr(envs, "observe") and hasattr(base, "get_states") and hasattr(base, "set_state")


def put_back(envs: gym.vector.VectorEnv, states: Sequence[EnvState]) -> dict[str, Any]:
    """Puts a state into each environment, and returns what they then observe."""
    base = cast(Any, envs.unwrapped)
    for i, state in enumerate(states):
        base.set_state(i, state)
    return cast(Any, envs).observe()


def sampled_tasks(envs: gym.vector.VectorEnv) -> Sequence[int]:
    """Returns the tasks that environments sample from.

    Raises:
        TypeError: tasks cannot be weighted in these environments.
    """
    base = cast(Any, envs.unwrapped)
    if not hasattr(base, "set_task_weights"):
        raise TypeError(
            f"task_sampling='adaptive' needs environments with task_ids and set_task_weights, as LiberoVectorEnv "
            f"has them; {type(base).__name__} lacks them: take task_sampling='uniform'"
        )
    return base.task_ids
