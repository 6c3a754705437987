"""Time of one environment step without images: LIBERO's env.step, ours exact, ours fast, and bare physics.

`python -m benchmarks.env_step` prints a table, one row a suite, and one JSON line at the end. All four run the same
actions from the same state, in turn, several times; the fastest round of each counts. Bare physics is 25 `mj_step`
with the recorded controls of the exact run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from benchmarks.hardware import describe_run
from benchmarks.parity import make_actions, reference_env
from libero_gym import controller
from libero_gym.scenes import Scene, load_scene
from libero_gym.simulation import Simulation
from libero_gym.suites import TaskSpec, get_task, load_init_states

TASKS = (("libero_spatial", 0), ("libero_object", 0), ("libero_goal", 0), ("libero_10", 0), ("libero_90", 47))
TARGETS = {
    "libero / exact": 4.0,
    "exact / bare, libero_spatial": 1.5,
    "exact / bare, elsewhere": 1.9,
    "libero / fast": 5.0,
    "fast / bare": 1.2,
}

FloatArray = npt.NDArray[np.float64]


def measure_task(task: TaskSpec, *, num_steps: int, num_rounds: int) -> dict[str, float]:
    """Return milliseconds a step of "libero", "exact", "fast" and "bare"."""
    scene = load_scene(task)
    actions = make_actions("smooth", num_steps, seed=1)
    best: dict[str, float] = dict.fromkeys(("libero", "exact", "fast", "bare"), float("inf"))
    controls = record_controls(scene, task, actions)
    with reference_env(task) as env:
        runners: dict[str, Callable[[], float]] = {
            "libero": lambda: _time_libero(env, task, actions),
            "exact": lambda: _time_ours(Simulation(scene), task, actions),
            "fast": lambda: _time_ours(Simulation(scene, stepping="fast"), task, actions),
            "bare": lambda: _time_bare(Simulation(scene), task, controls),
        }
        for _ in range(num_rounds):
            for name, run in runners.items():
                best[name] = min(best[name], 1e3 * run() / num_steps)
    return best


def record_controls(scene: Scene, task: TaskSpec, actions: FloatArray) -> FloatArray:
    """Return the controls of each substep of an exact run, float64 [num_steps, 25, nu]."""
    simulation = Simulation(scene, stepping="numpy")
    simulation.reset(task, 0, np.random.RandomState(0), init_states="original")
    controls: list[FloatArray] = []
    original = controller.control_substep

    def recorder(**arguments: Any) -> None:
        original(**arguments)
        controls.append(simulation.data.ctrl.copy())

    controller.control_substep = recorder
    try:
        for action in actions:
            simulation.step(action)
    finally:
        controller.control_substep = original
    return np.array(controls).reshape(len(actions), controller.SUBSTEPS, -1)


def _time_libero(env: Any, task: TaskSpec, actions: FloatArray) -> float:
    np.random.seed(0)  # noqa: NPY002 - LIBERO draws from the global stream
    env.reset()
    env.set_init_state(load_init_states(task)[0])
    for _ in range(10):
        env.step([0.0] * 6 + [-1.0])
    started = time.perf_counter()
    for action in actions:
        env.step(action)
    return time.perf_counter() - started


def _time_ours(simulation: Simulation, task: TaskSpec, actions: FloatArray) -> float:
    simulation.reset(task, 0, np.random.RandomState(0), init_states="original")
    started = time.perf_counter()
    for action in actions:
        simulation.step(action)
        simulation.states()
    return time.perf_counter() - started


def _time_bare(simulation: Simulation, task: TaskSpec, controls: FloatArray) -> float:
    simulation.reset(task, 0, np.random.RandomState(0), init_states="original")
    model, data = simulation.model, simulation.data
    started = time.perf_counter()
    for step in controls:
        for control in step:
            data.ctrl[:] = control
            mujoco.mj_step(model, data)
    return time.perf_counter() - started


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    ratio_names = "   libero/exact  exact/bare  libero/fast  fast/bare"
    print(f"{'ms a step':20}{'libero':>9}{'exact':>9}{'fast':>9}{'bare':>9}{ratio_names}")
    results: dict[str, dict[str, float]] = {}
    for suite, task_id in TASKS:
        task = get_task(suite, task_id)
        ms = measure_task(task, num_steps=arguments.num_steps, num_rounds=arguments.num_rounds)
        ratios = {
            "libero / exact": ms["libero"] / ms["exact"],
            "exact / bare": ms["exact"] / ms["bare"],
            "libero / fast": ms["libero"] / ms["fast"],
            "fast / bare": ms["fast"] / ms["bare"],
        }
        print(
            f"{f'{suite}/{task_id}':20}"
            + "".join(f"{value:9.2f}" for value in ms.values())
            + "   {:12.2f}{:12.2f}{:13.2f}{:11.2f}".format(*ratios.values()),
            flush=True,
        )
        results[f"{suite}/{task_id}"] = {
            **{f"{name} ms": round(value, 3) for name, value in ms.items()},
            **{name: round(value, 2) for name, value in ratios.items()},
        }
    line = json.dumps({"benchmark": "env_step", **describe_run(), "results": results, "targets": TARGETS})
    if arguments.output:
        arguments.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
