"""Which episodes an evaluation plays, and where; needs no PyTorch, so that what cannot be is told at once.

A job is (task id, initial state id), a key is (seed, task id, initial state id).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libero_gym.tasks.initial_states import InitStates, check_init_states, count_init_states
from libero_gym.tasks.suites import TaskSpec, get_task, horizon, list_tasks, member_suites, task_number

# What an evaluation's folder holds from its first moment on.
PROTOCOL_FILE = "protocol.json"

Job = tuple[int, int]
Key = tuple[int, int, int]


def check_evaluation_folder(folder: Path, *, resume: bool) -> None:
    """Raises FileExistsError if `folder` holds an evaluation that is not to be gone on with."""
    if not resume and (folder / PROTOCOL_FILE).is_file():
        raise FileExistsError(f"{folder} holds an evaluation: go on with it by --resume, or give another --output-dir")


def evaluation_jobs(
    suite: str, task_ids: Sequence[int] | None, episodes_per_task: int, init_states: InitStates | None = None
) -> list[Job]:
    """Returns every job of the protocol; None is the suite's default kind of states.

    Raises:
        ValueError: if no task is named, or one that is not in the suite or has fewer initial states.
        FileNotFoundError: if the suite has no initial states of this kind.
    """
    kind = check_init_states(init_states, suite)
    tasks = chosen_tasks(suite, task_ids)
    for task_id, task in tasks:
        stored = count_init_states(task, kind)
        if not 1 <= episodes_per_task <= stored:
            raise ValueError(
                f"episodes_per_task={episodes_per_task} is not possible for task {task_id} of {suite}, "
                f"which stores {stored} initial states (valid: 1-{stored})"
            )
    return [(task_id, state) for task_id, _ in tasks for state in range(episodes_per_task)]


def stored_starts(suite: str, task_ids: Sequence[int] | None, init_states: InitStates | None = None) -> list[Job]:
    """Returns a job of every stored initial state; of a task that is named twice, all of them twice.

    `init_states` and what is raised are as of `evaluation_jobs`.
    """
    kind = check_init_states(init_states, suite)
    tasks = chosen_tasks(suite, task_ids)
    return [(task_id, state) for task_id, task in tasks for state in range(count_init_states(task, kind))]


def check_starts(args: Any) -> None:
    """Checks which tasks a trainer, or an evaluation, plays, and from where.

    Args:
        args: a trainer's or eval_gr00t.py's.

    Raises:
        ValueError: the suite, or a task of it, does not exist, has fewer initial states than there are starts near the
            goal, or has episodes that end before an expert would succeed from one of these.
        FileNotFoundError: the suite has no initial states of the kind that is asked for.
    """
    named = None if args.task_ids is None else tuple(dict.fromkeys(args.task_ids))
    kind = getattr(args, "init_states", None)
    num_states = Counter(task_id for task_id, _ in stored_starts(args.suite, named, kind))
    times = getattr(args, "steps_before_success", None)
    if not times:
        return
    for task_id, task in chosen_tasks(args.suite, named):
        longest_episode = horizon(task.suite) if args.horizon is None else args.horizon
        if max(times) > longest_episode:
            raise ValueError(
                f"steps_before_success={times} hold {max(times)}, but episodes of task {task_id} of {args.suite} end "
                f"after horizon={longest_episode} steps, before an expert would succeed; give steps of at most the "
                "horizon, or a longer --horizon"
            )
    task_id, fewest = min(num_states.items(), key=lambda item: item[1])
    if args.num_near_goal_states * len(times) > fewest:
        raise ValueError(
            f"num_near_goal_states={args.num_near_goal_states} times {len(times)} steps_before_success are more starts "
            f"than the {fewest} initial states of task {task_id} of {args.suite}; give --num-near-goal-states "
            f"{fewest // len(times)} at most, or fewer steps"
        )


def chosen_tasks(suite: str, task_ids: Sequence[int] | None) -> list[tuple[int, TaskSpec]]:
    """Returns tasks with their numbers in `suite`; None chooses all.

    Raises:
        ValueError: the suite, or a task of it, does not exist, or `task_ids` is empty.
    """
    if task_ids is not None and not task_ids:
        raise ValueError(
            f"task_ids={task_ids} names no task of {suite} (valid: 0-{len(list_tasks(suite)) - 1}); name one or more, "
            "or leave it out for all"
        )
    tasks = [get_task(suite, i) for i in task_ids] if task_ids is not None else list_tasks(suite)
    return [(task_number(suite, task), task) for task in tasks]


def stated_horizon(suite: str, episode_horizon: int | None) -> int | dict[str, int]:
    """Returns the steps after which episodes are cut, for a protocol; of a combined suite, those of each member."""
    if episode_horizon is not None:
        return episode_horizon
    members = member_suites(suite)
    return horizon(suite) if members == (suite,) else {member: horizon(member) for member in members}


def jobs_in_training(args: Any) -> list[Job]:
    """Returns the jobs of `evaluate_into`: every task's once, however often training names it."""
    task_ids = None if args.task_ids is None else tuple(dict.fromkeys(args.task_ids))
    return evaluation_jobs(args.suite, task_ids, args.eval_episodes_per_task)


def episode_keys(seeds: Sequence[int], jobs: Sequence[Job]) -> list[Key]:
    """Returns the key of every episode; raises ValueError if one is asked for twice."""
    keys = [(seed, *job) for seed in seeds for job in jobs]
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(
            f"(seed, task, initial state) {repeated[:3]} are asked for twice, but an episode counts once; name each "
            "seed and each task only once"
        )
    return keys
