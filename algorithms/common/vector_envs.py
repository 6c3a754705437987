"""What the trainers ask of vector environments beyond Gymnasium's interface. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
from numpy.typing import NDArray

EnvState = Mapping[str, NDArray[Any]]


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
