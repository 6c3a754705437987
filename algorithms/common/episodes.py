"""Finished episodes and the statistics made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
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


def played_episodes(starts: NDArray[np.int64], success: NDArray[np.bool_], length: NDArray[np.int64]) -> list[Episode]:
    """Returns the episodes that were played from `starts` [E, 2] (task id, initial state id) to their end."""
    return [
        Episode(task_id=int(task_id), init_state_id=int(state_id), success=bool(s), length=int(n))
        for (task_id, state_id), s, n in zip(starts, success, length, strict=True)
    ]


def episode_metrics(episodes: Sequence[Episode], accelerator: Accelerator) -> dict[str, float]:
    """Returns `env/*` means over the episodes of all processes; empty if none ended."""
    everywhere: list[Episode] = gather_object(list(episodes)) if accelerator.num_processes > 1 else list(episodes)
    if not everywhere:
        return {}
    metrics = {
        "env/success_once": float(np.mean([e.success for e in everywhere])),
        "env/episode_len": float(np.mean([e.length for e in everywhere])),
        "env/num_episodes": float(len(everywhere)),
    }
    return metrics | {f"{SUCCESS_OF_TASK}{task}": rate for task, rate in success_by_task(everywhere).items()}


def success_by_task(episodes: Sequence[Episode]) -> dict[int, float]:
    """Returns the success rate of each task that has episodes, by task id in rising order."""
    outcomes: dict[int, list[bool]] = {}
    for episode in episodes:
        outcomes.setdefault(episode.task_id, []).append(episode.success)
    return {task_id: sum(outcomes[task_id]) / len(outcomes[task_id]) for task_id in sorted(outcomes)}


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a success probability; raises ValueError unless 0 <= successes <= episodes."""
    from scipy.stats import binomtest  # an eighth of what a trainer imports, which each of its processes would wait for

    interval = binomtest(successes, episodes).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)
