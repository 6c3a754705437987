"""Runs the scripted experts from all stored initial states of whole suites.

`python -m benchmarks.experts --suites libero_spatial` prints a table (success, mean and largest episode length, task
by task) and one JSON line at the end; `--output` also writes it to a file. Suites run under their own horizons, with
the exact stepping, fixtures placed by the seed `--seed` plus the initial state's index.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hardware import describe_run
from libero_gym.experts import HUMAN_LIKE, ExpertConfig, ExpertEpisode, run_expert
from libero_gym.scenes import load_scene
from libero_gym.simulation import Simulation
from libero_gym.suites import TaskSpec, horizon, list_tasks, load_init_states

TARGETS = {"libero_spatial": 0.95, "libero_object": 0.95, "libero_goal": 0.95, "libero_10": 0.80}
"""Success rate that the experts of a suite shall reach; other suites are only reported."""

STYLES = {"plain": ExpertConfig(), "human": HUMAN_LIKE}


def run_task(task: TaskSpec, init_state_ids: list[int], *, seed: int, config: ExpertConfig, num_threads: int) -> Any:
    """Run one task from each of the initial states; return the episodes in that order."""
    scene = load_scene(task)

    def run(part: list[int]) -> list[ExpertEpisode]:
        sim = Simulation(scene)
        return [run_expert(sim, task, state, seed=seed + state, config=config) for state in part]

    parts = [init_state_ids[offset::num_threads] for offset in range(num_threads)]
    with ThreadPoolExecutor(num_threads) as pool:
        episodes = [episode for part in pool.map(run, parts) for episode in part]
    return sorted(episodes, key=lambda episode: episode.init_state_id)


def summarise(task: TaskSpec, episodes: list[ExpertEpisode]) -> dict[str, Any]:
    """Return a task's row: lengths are those of successful episodes, in steps (None if there is none)."""
    lengths = [episode.length for episode in episodes if episode.success]
    return {
        "task_id": task.task_id,
        "name": task.name,
        "num_episodes": len(episodes),
        "num_successes": len(lengths),
        "mean_length": round(float(np.mean(lengths)), 1) if lengths else None,
        "max_length": max(lengths, default=None),
        "failed_init_state_ids": [episode.init_state_id for episode in episodes if not episode.success],
    }


def main() -> dict[str, Any]:
    """Parse the command line, run, print; return the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["libero_spatial", "libero_object", "libero_goal"])
    parser.add_argument("--task-ids", nargs="+", type=int, help="all tasks if absent")
    parser.add_argument("--num-states", type=int, help="the first so many stored states; all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--style", choices=list(STYLES), default="plain")
    parser.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()

    document: dict[str, Any] = {**describe_run(), "seed": args.seed, "style": args.style, "results": {}, "targets": {}}
    for suite in args.suites:
        start = time.perf_counter()
        rows: list[dict[str, Any]] = []
        print(f"\n{suite}: horizon {horizon(suite)}, seed {args.seed}, style {args.style}")
        print("| task | success | mean length | max length | failed initial states |")
        print("|---|---|---|---|---|")
        for task in list_tasks(suite):
            if args.task_ids is not None and task.task_id not in args.task_ids:
                continue
            states = list(range(len(load_init_states(task))))[: args.num_states]
            episodes = run_task(task, states, seed=args.seed, config=STYLES[args.style], num_threads=args.num_threads)
            row = summarise(task, episodes)
            rows.append(row)
            print(
                f"| {row['task_id']} {row['name'].replace('_', ' ')} | {row['num_successes']}/{row['num_episodes']} "
                f"| {row['mean_length']} | {row['max_length']} | {row['failed_init_state_ids'] or ''} |",
                flush=True,
            )
        num_episodes = sum(row["num_episodes"] for row in rows)
        num_successes = sum(row["num_successes"] for row in rows)
        rate = num_successes / num_episodes
        print(f"| **all** | **{num_successes}/{num_episodes} = {100 * rate:.1f} %** | | | |", flush=True)
        document["results"][suite] = {
            "horizon": horizon(suite),
            "num_episodes": num_episodes,
            "num_successes": num_successes,
            "success_rate": round(rate, 4),
            "tasks": rows,
            "seconds": round(time.perf_counter() - start, 1),
        }
        if suite in TARGETS:
            document["targets"][suite] = {"success_rate": TARGETS[suite], "is_met": rate >= TARGETS[suite]}
    text = json.dumps(document)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return document


if __name__ == "__main__":
    main()
