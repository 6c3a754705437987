"""Runs the scripted experts from the stored initial states of whole suites.

`python -m benchmarks.experts --suites libero_object libero_goal --num-workers 16 --output results.json` prints a table
(success, mean and largest episode length, task by task) and one JSON line at the end. Suites run under their own
horizons, with the exact stepping; the seed of an episode is `--seed` plus the initial state's index.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.command_line import LARGEST_SEED, integer, launch_benchmark, make_parser, refusals, suite_name, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.experts import HUMAN_LIKE, ExpertConfig, run_expert
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.initial_states import check_init_state_id, check_init_states
from libero_gym.tasks.scenes import load_scene, load_scenes
from libero_gym.tasks.suites import get_task, horizon, load_init_states

SUCCESS_TARGETS = {"libero_spatial": 0.95, "libero_object": 0.95, "libero_goal": 0.95, "libero_10": 0.80}
"""Success rate that the experts of a suite shall reach at least, within the suite's horizon and within the length of
its longest demonstration; other suites are only reported."""

LONGEST_DEMONSTRATIONS = {
    "libero_spatial": 193,
    "libero_object": 254,
    "libero_goal": 270,
    "libero_10": 505,
    "libero_90": 373,
}
"""Steps of the longest human demonstration of each suite; of libero_object and libero_10 they are more than the horizon
(`libero_gym.tasks.suites.HORIZONS`), which is what counts there."""

STYLES = {"plain": ExpertConfig(), "human": HUMAN_LIKE}

_JOB_SIZE = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some episodes of one task, for one process.

    Attributes:
        suite: suite name.
        task_id: task in the suite.
        init_state_ids: stored initial states.
        seed: added to each of them.
        style: key of `STYLES`.
    """

    suite: str
    task_id: int
    init_state_ids: tuple[int, ...]
    seed: int
    style: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one episode ended.

    Attributes:
        init_state_id: stored initial state.
        success: whether the goal was reached within the suite's horizon.
        length: steps.
    """

    init_state_id: int
    success: bool
    length: int


def run_job(job: Job) -> list[Outcome]:
    """Run a job's episodes one after another."""
    task = get_task(job.suite, job.task_id)
    sim = Simulation(load_scene(task))
    outcomes: list[Outcome] = []
    for state in job.init_state_ids:
        episode = run_expert(sim, task, state, seed=job.seed + state, config=STYLES[job.style])
        outcomes.append(Outcome(init_state_id=state, success=episode.success, length=episode.length))
    return outcomes


def run_tasks(
    suite: str, task_ids: Iterable[int], *, states: list[int] | None, seed: int, style: str, pool: ProcessPoolExecutor
) -> Iterator[tuple[int, list[Outcome]]]:
    """Yield each task's id and episodes, in order, as they become complete.

    Args:
        suite: suite name.
        task_ids: tasks of the suite.
        states: stored initial states; None for all.
        seed: added to the index of the initial state.
        style: key of `STYLES`.
        pool: where the episodes run.
    """
    futures: list[tuple[int, list[Any]]] = []
    for task_id in task_ids:
        chosen = list(range(len(load_init_states(get_task(suite, task_id))))) if states is None else states
        jobs = [
            Job(
                suite=suite,
                task_id=task_id,
                init_state_ids=tuple(chosen[start : start + _JOB_SIZE]),
                seed=seed,
                style=style,
            )
            for start in range(0, len(chosen), _JOB_SIZE)
        ]
        futures.append((task_id, [pool.submit(run_job, job) for job in jobs]))
    for task_id, parts in futures:
        yield task_id, [outcome for part in parts for outcome in part.result()]


def summarise(suite: str, task_id: int, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return a task's row: lengths are those of successful episodes, in steps (None if there is none)."""
    lengths = [outcome.length for outcome in outcomes if outcome.success]
    longest = LONGEST_DEMONSTRATIONS.get(suite)
    return {
        "task_id": task_id,
        "name": get_task(suite, task_id).name,
        "num_episodes": len(outcomes),
        "num_successes": len(lengths),
        "num_within_demonstrations": None if longest is None else sum(length <= longest for length in lengths),
        "mean_length": round(float(np.mean(lengths)), 1) if lengths else None,
        "max_length": max(lengths, default=None),
        "failed_init_state_ids": [outcome.init_state_id for outcome in outcomes if not outcome.success],
    }


def measure(suite: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a suite that was run as a whole and has targets, by name."""
    num_episodes = sum(row["num_episodes"] for row in rows)
    return {
        f"{suite}/success_rate": sum(row["num_successes"] for row in rows) / num_episodes,
        f"{suite}/success_rate_within_longest_demonstration": sum(row["num_within_demonstrations"] for row in rows)
        / num_episodes,
    }


def main() -> dict[str, Any]:
    """Parses the command line, runs, prints; returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--suites", type=suite_name, nargs="+", default=list(SUCCESS_TARGETS))
    parser.add_argument("--task-ids", type=integer(at_least=0), nargs="+", help="tasks of each suite; all if absent")
    parser.add_argument("--states", type=integer(at_least=0), nargs="+", help="stored initial states; all if absent")
    parser.add_argument("--seed", type=integer(at_least=0, at_most=LARGEST_SEED), default=0)
    parser.add_argument("--style", choices=list(STYLES), default="plain")
    parser.add_argument(
        "--num-workers", type=integer(at_least=1), default=len(os.sched_getaffinity(0)), help="processes"
    )
    args = parser.parse_args()
    with refusals(parser):
        specs = {suite: tasks_of(suite, args.task_ids) for suite in args.suites}
        for task in itertools.chain.from_iterable(specs.values()):
            for state in args.states or ():
                check_init_state_id(state, task, "original")

    results: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    # Missing scenes are built here, once, and not by whichever worker comes first.
    load_scenes(list(itertools.chain.from_iterable(specs.values())))
    # The numbers of a combined suite's tasks are not those that they have in their own.
    tasks = {suite: args.task_ids or list(range(len(found))) for suite, found in specs.items()}
    with ProcessPoolExecutor(args.num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for suite, task_ids in tasks.items():
            start = time.perf_counter()
            rows: list[dict[str, Any]] = []
            print(f"\n{suite}: horizon {horizon(suite)}, seed {args.seed}, style {args.style}")
            table = Table(
                {"success": "<9", "mean length": ">12.1f", "max length": ">12", "  task": "<72", "failed states": "<1"}
            )
            episodes = run_tasks(suite, task_ids, states=args.states, seed=args.seed, style=args.style, pool=pool)
            for task_id, outcomes in episodes:
                rows.append(row := summarise(suite, task_id, outcomes))
                success = f"{row['num_successes']}/{row['num_episodes']}"
                name = f"  {task_id} {row['name'].replace('_', ' ')}"
                failed = " ".join(map(str, row["failed_init_state_ids"]))
                table.add(success, row["mean_length"], row["max_length"], name, failed)
            num_episodes = sum(row["num_episodes"] for row in rows)
            num_successes = sum(row["num_successes"] for row in rows)
            rate = num_successes / num_episodes
            print(f"all: {num_successes}/{num_episodes} = {100 * rate:.1f} %", flush=True)
            results[suite] = {
                "horizon": horizon(suite),
                "init_states": check_init_states(None, suite),
                "num_episodes": num_episodes,
                "num_successes": num_successes,
                "success_rate": round(rate, 4),
                "tasks": rows,
                "seconds": round(time.perf_counter() - start, 1),
            }
            # A target speaks of a whole suite.
            if args.states is None and args.task_ids is None and suite in SUCCESS_TARGETS:
                values = measure(suite, rows)
                targets |= judge(values, at_least=dict.fromkeys(values, SUCCESS_TARGETS[suite]))
    names = ("task_ids", "states", "seed", "style", "num_workers")
    settings = {name: getattr(args, name) for name in names}
    return publish("experts", results, settings=settings, targets=targets, output=args.output)


if __name__ == "__main__":
    launch_benchmark(main)
