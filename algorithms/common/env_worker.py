"""A process of a cluster that steps environments. Needs no PyTorch: hundreds of them start fast and are small."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from algorithms.common.cluster_process import Bell
from algorithms.common.placement import Place
from algorithms.common.vector_envs import EnvState, StackedStates, can_restore, put_back, sampled_tasks

Step = tuple[dict[str, Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


def on_host(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns nested arrays, PyTorch's as NumPy's in host memory, which other processes can read."""
    return {
        name: on_host(leaf) if isinstance(leaf, dict) else leaf.cpu().numpy() if hasattr(leaf, "cpu") else leaf
        for name, leaf in tree.items()
    }


class EnvWorker:
    """Some of the environments.

    Args:
        place: where it runs.
        bell: of the run.
        make_envs: makes them.
    """

    def __init__(self, place: Place, bell: Bell, make_envs: Callable[[], gym.vector.VectorEnv]) -> None:
        self._envs = make_envs()
        self._obs: dict[str, Any] = {}

    def reset(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Starts episodes, one seed for each environment, and returns the observation."""
        obs, _ = self._envs.reset(seed=cast(Any, list(seeds)))
        self._obs = on_host(obs)
        return self._obs

    def step(self, actions: NDArray[np.float32]) -> tuple[Step, float]:
        """Returns what the environments return, and the seconds that they took."""
        start = time.perf_counter()
        obs, *rest, infos = self._envs.step(actions)
        self._obs = on_host(obs)
        step = cast(Step, (self._obs, *rest, on_host(infos)))
        return step, time.perf_counter() - start

    def states(self) -> StackedStates | None:
        """Returns each environment's state, by its number here; None if they cannot be taken and put back."""
        if not can_restore(self._envs):
            return None
        return StackedStates.of(dict(enumerate(cast(Any, self._envs.unwrapped).get_states())))

    def restore(self, states: Sequence[EnvState]) -> dict[str, Any]:
        """Puts back what `states` returned, and returns the observation."""
        self._obs = on_host(put_back(self._envs, states))
        return self._obs

    def observe(self) -> dict[str, Any]:
        """Returns the last observation."""
        return self._obs

    def task_ids(self) -> Sequence[int]:
        """Returns the tasks that the environments sample from.

        Raises:
            TypeError: tasks cannot be weighted in these environments.
        """
        return sampled_tasks(self._envs)

    def set_task_weights(self, weights: NDArray[np.float64]) -> None:
        """Says how often the episodes that start from now on are of each of `task_ids`."""
        cast(Any, self._envs.unwrapped).set_task_weights(weights)

    def ping(self) -> None:
        """Returns when the calls before it are done."""
