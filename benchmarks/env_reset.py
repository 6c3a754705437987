"""Time of one reset to a stored initial state, without images: LIBERO's against ours.

`python -m benchmarks.env_reset` prints a table, one row a suite, and one JSON line at the end. LIBERO: `reset()` and
`set_init_state()`, without a renderer, which makes it several times faster than users see it. Ours: the same result
("bare"), and with the ten settling steps ("settled"), which LIBERO's users run in addition.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hardware import describe_run
from benchmarks.parity import reference_env
from libero_gym.scenes import load_scene
from libero_gym.simulation import Simulation
from libero_gym.suites import TaskSpec, get_task, load_init_states

TASKS = (("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 0), ("libero_10", 0), ("libero_90", 47))
TARGETS = {"libero / bare": 100.0, "bare ms": 5.0}


def measure_task(task: TaskSpec, *, num_resets: int) -> dict[str, float]:
    """Return median milliseconds a reset of "libero", "bare" and "settled"."""
    simulation = Simulation(load_scene(task))
    states = load_init_states(task)

    def reset_libero(env: Any, state_id: int) -> None:
        env.reset()
        env.set_init_state(states[state_id])

    def reset_ours(state_id: int, num_settling_steps: int) -> None:
        random_state = np.random.RandomState(state_id)
        simulation.reset(task, state_id, random_state, init_states="original", num_settling_steps=num_settling_steps)

    with reference_env(task) as env:
        return {
            "libero": _median_ms(lambda i: reset_libero(env, i), min(num_resets, 8)),
            "bare": _median_ms(lambda i: reset_ours(i, 0), num_resets),
            "settled": _median_ms(lambda i: reset_ours(i, 10), num_resets),
        }


def _median_ms(reset: Callable[[int], None], num_resets: int) -> float:
    reset(0)
    durations: list[float] = []
    for i in range(num_resets):
        started = time.perf_counter()
        reset(i)
        durations.append(1e3 * (time.perf_counter() - started))
    return float(np.median(durations))


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-resets", type=int, default=50)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(f"{'ms a reset':20}{'libero':>9}{'bare':>9}{'settled':>9}   libero/bare")
    results: dict[str, dict[str, float]] = {}
    for suite, task_id in TASKS:
        ms = measure_task(get_task(suite, task_id), num_resets=arguments.num_resets)
        ratio = ms["libero"] / ms["bare"]
        print(f"{f'{suite}/{task_id}':20}" + "".join(f"{x:9.2f}" for x in ms.values()) + f"{ratio:14.0f}", flush=True)
        results[f"{suite}/{task_id}"] = {
            **{f"{name} ms": round(value, 3) for name, value in ms.items()},
            "libero / bare": round(ratio, 1),
        }
    line = json.dumps({"benchmark": "env_reset", **describe_run(), "results": results, "targets": TARGETS})
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
