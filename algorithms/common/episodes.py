"""Finished episodes and the statistics made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# The metric of a task is this and its id.
SUCCESS_OF_TASK = "env/success_once_task_"


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode that ran to its end.

    Attributes:
        task_id: the suite's task.
        init_state_id: the stored initial state that it started from.
        success: True if the task was solved at any step.
        length: environment steps.
    """

    task_id: int
    init_state_id: int
    success: bool
    length: int


def finished_episodes(infos: Mapping[str, Any], ended_mask: NDArray[np.bool_]) -> list[Episode]:
    """Returns the episodes that ended in a step of environments that reset themselves in the same step.

    Args:
        infos: the step's infos; `final_info` holds arrays [N] of the ended episodes.
        ended_mask: [N], True where an episode ended.
    """
    if not ended_mask.any():
        return []
    final = infos["final_info"]
    return [
        Episode(
            task_id=int(final["task_id"][i]),
            init_state_id=int(final["init_state_id"][i]),
            success=bool(final["success"][i]),
            length=int(final["episode_length"][i]),
        )
        for i in np.flatnonzero(ended_mask)
    ]


def played_tasks(infos: Mapping[str, Any], ended_mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the task [N] of the episode that each environment's step was of.

    Args:
        infos: the step's infos, of environments that reset themselves in the same step.
        ended_mask: [N], True where an episode ended: there `task_id` is the next one's.
    """
    if not ended_mask.any():
        return infos["task_id"]
    return np.where(ended_mask, infos["final_info"]["task_id"], infos["task_id"])


def played_episodes(starts: NDArray[np.int64], success: NDArray[np.bool_], length: NDArray[np.int64]) -> list[Episode]:
    """Returns the episodes that were played from `starts` [E, 2] (task id, initial state id) to their end."""
    return [
        Episode(task_id=int(task_id), init_state_id=int(state_id), success=bool(s), length=int(n))
        for (task_id, state_id), s, n in zip(starts, success, length, strict=True)
    ]


def iterations_ago(length: int, decision: int, *, num_action_chunks: int, decisions: int) -> int:
    """Returns how many iterations ago an episode began; 0 in the one in which it ended.

    Args:
        length: its environment steps.
        decision: of the iteration, at which it ended, from 0.
        num_action_chunks: environment steps of a decision.
        decisions: decisions per environment in an iteration.
    """
    before = -(-length // num_action_chunks) - (decision + 1)
    return max(0, -(-before // decisions))


class Cohorts:
    """Episodes by the iteration in which they began: what a rollout shorter than a horizon says of success.

    Successes end early. Of the episodes that end within an iteration they are too large a part, in a run's first
    iterations all. A cohort, the episodes that began in one iteration, is complete `lag` iterations later, and then
    tells the success of that iteration's policy and those that played on.

    Args:
        decisions: decisions per environment in an iteration.
        longest_episode: decisions of the longest episode; 0 if iterations play whole episodes.

    Attributes:
        lag: iterations after which all episodes that began in one have ended.
    """

    def __init__(self, decisions: int, longest_episode: int) -> None:
        self._decisions = decisions
        self.lag = -(-(longest_episode - 1) // decisions) if longest_episode else 0
        # [lag + 1, T, 3]: episodes, successes and steps of the T tasks; the oldest cohort first.
        self._tallies = np.zeros((self.lag + 1, 1, 3))

    def begin_iteration(self) -> None:
        """Begins a cohort, which the oldest one makes room for."""
        self._tallies = np.concatenate([self._tallies[1:], np.zeros_like(self._tallies[:1])])

    def add(self, ended: Sequence[tuple[Episode, int]]) -> None:
        """Counts episodes that ended in this iteration, each with the number of iterations ago in which it began."""
        for episode, age in ended:
            if episode.task_id >= self._tallies.shape[1]:
                added = episode.task_id + 1 - self._tallies.shape[1]
                self._tallies = np.pad(self._tallies, ((0, 0), (0, added), (0, 0)))
            cohort = self.lag - age
            if cohort >= 0:  # what was under way when training began belongs to none
                self._tallies[cohort, episode.task_id] += 1, episode.success, episode.length

    def complete(self) -> NDArray[np.float64]:
        """Returns episodes, successes and steps by task [T, 3] of the newest complete cohort; none in the first."""
        return self._tallies[0]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns what `load_state_dict` takes."""
        return {"tallies": torch.from_numpy(self._tallies.copy())}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on where another one was."""
        self._tallies = state["tallies"].numpy().copy()


def cohort_metrics(tallies: NDArray[np.float64]) -> dict[str, float]:
    """Returns `env/*` of a cohort's episodes, tallies [T, 3]; empty if it has none.

    Success and length are means over tasks of each task's mean, so that how often a task is played does not show.
    """
    tasks = np.flatnonzero(tallies[:, 0])
    if not len(tasks):
        return {}
    episodes, successes, steps = tallies[tasks].T
    metrics = {
        "env/success_once": np.mean(successes / episodes),
        "env/episode_len": np.mean(steps / episodes),
        "env/num_episodes": episodes.sum(),
    }
    for task_id, rate in zip(tasks, successes / episodes, strict=True):
        metrics[f"{SUCCESS_OF_TASK}{task_id}"] = rate
    return {name: float(value) for name, value in metrics.items()}


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a success probability; raises ValueError unless 0 <= successes <= episodes."""
    if not 0 <= successes <= episodes or episodes == 0:
        raise ValueError(f"successes={successes} of episodes={episodes}: give 0 <= successes <= episodes > 0")
    return _wilson(successes / episodes, episodes)


def clustered_interval(clusters: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Returns a 95 % interval of the success probability of episodes that come in clusters, such as initial states.

    Episodes of one initial state tend to end alike, and then tell less than as many episodes of different ones. So this
    is Wilson's interval of fewer episodes: their number divided by the design effect (Kish, Survey Sampling, 1965), the
    variance of the rate, estimated from how clusters differ, over that of independent episodes, at least 1. Where all
    episodes end alike, nothing can be estimated, and it is 1. With one episode in each cluster this is
    `wilson_interval`.

    Raises:
        ValueError: there is no cluster, or one without episodes.
    """
    sizes = np.array([len(cluster) for cluster in clusters])
    if not len(sizes) or not sizes.all():
        raise ValueError(f"the clusters have sizes {sizes.tolist()}: give at least one, each with an episode")
    successes = np.array([sum(cluster) for cluster in clusters])
    episodes = int(sizes.sum())
    rate = int(successes.sum()) / episodes

    variance = float(((successes - rate * sizes) ** 2).sum()) / episodes**2
    independent_variance = rate * (1 - rate) / episodes
    design_effect = max(1.0, variance / independent_variance) if independent_variance > 0 else 1.0
    return _wilson(rate, episodes / design_effect)


def _wilson(rate: float, episodes: float) -> tuple[float, float]:
    z_squared = NormalDist().inv_cdf(0.975) ** 2
    center = rate + z_squared / (2 * episodes)
    half_width = math.sqrt(z_squared * (rate * (1 - rate) / episodes + z_squared / (4 * episodes**2)))
    scale = 1 + z_squared / episodes
    low = 0.0 if rate == 0 else (center - half_width) / scale
    high = 1.0 if rate == 1 else (center + half_width) / scale
    return low, high
