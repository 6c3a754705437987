"""Time of one reset to a stored initial state, without images: LIBERO's against ours; and opening many environments.

`python -m benchmarks.env_reset` prints a table, one row a task, and one JSON line at the end. LIBERO: `reset()` and
`set_init_state()`, without a renderer, which makes it several times faster than users see it. Ours: the same result
("bare"), with the ten settling steps that LIBERO's users run in addition ("settling"), and to the recorded outcome of
these ("settled", the default). Then 512 environments of LIBERO-Spatial are opened and reset, and the memory of 64 is
weighed.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.initial_states import InitStates, has_recorded_states
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, get_task, load_init_states
from libero_gym.vector import LiberoVectorEnv

TASKS = (
    ("libero_spatial", 0),
    ("libero_object", 0),
    ("libero_goal", 0),
    ("libero_10", 0),
    ("libero_10", 9),
    ("libero_90", 20),
    ("libero_90", 47),
    ("libero_90", 74),
    ("libero_goal_swap", 0),
    ("libero_object_with_mug", 1),
)

WAYS = ("libero", "bare", "settling", "settled")
# Of the task that fares worst.
AT_LEAST = {"libero / bare": 100.0}
AT_MOST = {"bare ms": 5.0, "512 environments s": 10.0, "environment MB": 20.0}


def measure_task(task: TaskSpec, *, num_resets: int) -> dict[str, float]:
    """Return median milliseconds a reset of "libero", "bare", "settling" and, where they are recorded, "settled".

    Resets go through the stored states, and begin again where these end.
    """
    simulation = Simulation(load_scene(task))
    states = load_init_states(task)

    def reset_libero(env: Any, i: int) -> None:
        env.reset()
        env.set_init_state(states[i % len(states)])

    def reset_ours(i: int, init_states: InitStates, num_settling_steps: int) -> None:
        state_id = i % len(states)
        random_state = np.random.RandomState(state_id)
        simulation.reset(task, state_id, random_state, init_states=init_states, num_settling_steps=num_settling_steps)

    with reference_env(task) as env:
        ms = {
            "libero": _median_ms(lambda i: reset_libero(env, i), min(num_resets, 8)),
            "bare": _median_ms(lambda i: reset_ours(i, "original", 0), num_resets),
            "settling": _median_ms(lambda i: reset_ours(i, "original", 10), num_resets),
        }
    if has_recorded_states(task.suite, "settled"):
        ms["settled"] = _median_ms(lambda i: reset_ours(i, "settled", 0), num_resets)
    return ms


def _median_ms(reset: Callable[[int], None], num_resets: int) -> float:
    reset(0)
    durations: list[float] = []
    for i in range(num_resets):
        started = time.perf_counter()
        reset(i)
        durations.append(1e3 * (time.perf_counter() - started))
    return float(np.median(durations))


def measure_many(suite: str, *, num_opened: int = 512, num_weighed: int = 64) -> dict[str, float]:
    """Return seconds until `num_opened` environments are reset, and MB of each of `num_weighed`, without images."""
    load_scene(get_task(suite, 0))
    first = LiberoVectorEnv(suite, 1, observe_images=False)
    first.reset(seed=0)
    gc.collect()
    before = _resident_mb()
    weighed = LiberoVectorEnv(suite, num_weighed, observe_images=False)
    weighed.reset(seed=0)
    for _ in range(5):
        weighed.step(weighed.action_space.sample())
    megabytes = (_resident_mb() - before) / num_weighed
    weighed.close()
    started = time.perf_counter()
    opened = LiberoVectorEnv(suite, num_opened, observe_images=False)
    opened.reset(seed=0)
    seconds = time.perf_counter() - started
    opened.close()
    return {f"{num_opened} environments s": round(seconds, 2), "environment MB": round(megabytes, 2)}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-resets", type=integer(at_least=1), default=50, help="of each kind")
    args = parser.parse_args()
    with refusals(parser):
        tasks = [task for suite, task_id in TASKS for task in tasks_of(suite, [task_id])]
    table = Table({"ms a reset": "<26"} | dict.fromkeys(WAYS, ">9.2f") | {"libero/bare": ">14.0f"})
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        ms = measure_task(task, num_resets=args.num_resets)
        ratio = ms["libero"] / ms["bare"]
        table.add(f"{task.suite}/{task.task_id}", *(ms.get(way, "-") for way in WAYS), ratio)
        results[f"{task.suite}/{task.task_id}"] = {
            **{f"{way} ms": round(value, 3) for way, value in ms.items()},
            "libero / bare": round(ratio, 1),
        }
    many = measure_many("libero_spatial")
    print(", ".join(f"{name}: {value}" for name, value in many.items()))
    worst = {
        "libero / bare": min(entry["libero / bare"] for entry in results.values()),
        "bare ms": max(entry["bare ms"] for entry in results.values()),
    }
    return publish(
        "env_reset",
        results | {"many": many},
        settings={"num_resets": args.num_resets},
        targets=judge(worst | many, at_least=AT_LEAST, at_most=AT_MOST),
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
