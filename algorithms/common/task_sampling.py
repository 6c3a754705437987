"""Which tasks a trainer plays how often: those most on which its policy both succeeds and fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# What a solved task keeps, so that it is not forgotten; a task at 50 % success has five times as much besides.
FLOOR = 0.1


class TaskSampler:
    """Weights of tasks that follow their success.

    A task weighs sqrt(p (1 - p)) + `FLOOR`, p its success: the standard deviation of an episode's outcome. So the
    success over all tasks is estimated best with as many episodes (Neyman's allocation). Nothing can be learnt from
    outcomes that are all the same; by their variance, p (1 - p), a task that succeeds in one of twenty episodes would
    be played so rarely that its few successes are forgotten.

    Args:
        task_ids: tasks in the order of the environments', one named twice weighs twice.

    Attributes:
        weights: float64, one for each of `task_ids`, with mean 1.
    """

    def __init__(self, task_ids: Sequence[int]) -> None:
        self._task_ids = np.array(task_ids)
        self.weights: NDArray[np.float64] = np.ones(len(task_ids))

    def update(self, tallies: NDArray[np.float64]) -> None:
        """Follows the success of a cohort; of a task that it does not have, success is taken to be 50 %.

        Args:
            tallies: [T, 3] episodes, successes and steps by task.
        """
        if not tallies[:, 0].any():
            return
        episodes, successes = np.zeros((2, max(len(tallies), self._task_ids.max() + 1)))
        episodes[: len(tallies)], successes[: len(tallies)] = tallies[:, 0], tallies[:, 1]
        success = (successes + 1) / (episodes + 2)  # one success and one failure seen beforehand
        weights = (np.sqrt(success * (1 - success)) + FLOOR)[self._task_ids]
        self.weights = weights / weights.mean()

    def metrics(self) -> dict[str, float]:
        """Returns how often each task is played, relative to all alike."""
        tasks, inverse = np.unique(self._task_ids, return_inverse=True)
        of_task = np.bincount(inverse, weights=self.weights) * (len(tasks) / len(self._task_ids))
        return {f"env/weight_task_{task}": float(w) for task, w in zip(tasks, of_task, strict=True)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns what `load_state_dict` takes."""
        return {"task_weights": torch.from_numpy(self.weights.copy())}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where another one was."""
        self.weights = state["task_weights"].numpy().copy()
