"""Time of one environment step without images: LIBERO's env.step, ours exact, ours fast, and bare physics.

`python -m benchmarks.env_step` prints a table, one row a task, and one JSON line at the end. All four run the same
actions from the same state, in turn, several times; of each step its fastest time counts, so that other work on the
machine disturbs little. Bare physics is 25 `mj_step` with the recorded controls of the exact run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, tasks_of
from benchmarks.parity import make_actions
from benchmarks.publish import Table, judge, publish
from libero_gym.physics import controller
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import Scene, load_scene
from libero_gym.tasks.suites import TaskSpec, load_init_states

TASKS = (
    ("libero_spatial", 0),
    ("libero_spatial", 5),
    ("libero_object", 0),
    ("libero_object", 6),
    ("libero_goal", 0),
    ("libero_goal", 7),
    ("libero_10", 0),
    ("libero_10", 2),
    ("libero_10", 9),
    ("libero_90", 20),
    ("libero_90", 47),
    ("libero_90", 74),
    ("libero_goal_swap", 0),
    ("libero_object_with_mug", 1),
)
WAYS = ("libero", "exact", "fast", "bare")
RATIOS = (("libero", "exact"), ("exact", "bare"), ("libero", "fast"), ("fast", "bare"))

FloatArray = npt.NDArray[np.float64]


def measure_task(task: TaskSpec, *, num_steps: int, num_rounds: int) -> dict[str, float]:
    """Return milliseconds a step of "libero", "exact", "fast" and "bare"."""
    scene = load_scene(task)
    actions = make_actions("smooth", num_steps, seed=1)
    best = {name: np.full(num_steps, np.inf) for name in WAYS}
    controls = record_controls(scene, task, actions)
    with reference_env(task) as env:
        runners: dict[str, Callable[[], FloatArray]] = {
            "libero": lambda: _time_libero(env, task, actions),
            "exact": lambda: _time_ours(Simulation(scene), task, actions),
            "fast": lambda: _time_ours(Simulation(scene, stepping="fast"), task, actions),
            "bare": lambda: _time_bare(Simulation(scene), task, controls),
        }
        for _ in range(num_rounds):
            for name, run in runners.items():
                best[name] = np.minimum(best[name], run())
    return {name: 1e3 * float(seconds.mean()) for name, seconds in best.items()}


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


def _time_libero(env: Any, task: TaskSpec, actions: FloatArray) -> FloatArray:
    np.random.seed(0)  # noqa: NPY002 - LIBERO draws from the global stream
    env.reset()
    env.set_init_state(load_init_states(task)[0])
    for _ in range(10):
        env.step([0.0] * 6 + [-1.0])
    return _time_each(env.step, actions)


def _time_ours(simulation: Simulation, task: TaskSpec, actions: FloatArray) -> FloatArray:
    def step(action: FloatArray) -> None:
        simulation.step(action)
        simulation.states()

    simulation.reset(task, 0, np.random.RandomState(0), init_states="original")
    return _time_each(step, actions)


def _time_bare(simulation: Simulation, task: TaskSpec, controls: FloatArray) -> FloatArray:
    def step(substeps: FloatArray) -> None:
        for control in substeps:
            data.ctrl[:] = control
            mujoco.mj_step(model, data)

    simulation.reset(task, 0, np.random.RandomState(0), init_states="original")
    model, data = simulation.model, simulation.data
    return _time_each(step, controls)


def _time_each(step: Callable[[FloatArray], Any], arguments: FloatArray) -> FloatArray:
    """Return the seconds of each call."""
    seconds = np.empty(len(arguments))
    for i, argument in enumerate(arguments):
        started = time.perf_counter()
        step(argument)
        seconds[i] = time.perf_counter() - started
    return seconds


def judge_worst(results: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Returns each target with what the worst task reached; LIBERO-Spatial's scene has a target of its own."""

    def ratios(name: str, *, of_spatial: bool) -> Iterable[float]:
        return (row[name] for task, row in results.items() if task.startswith("libero_spatial/") == of_spatial)

    at_least = {"libero / exact": 4.0, "libero / fast": 5.0}
    values = {name: min(row[name] for row in results.values()) for name in at_least}
    at_most = {"fast / bare": 1.2}
    values["fast / bare"] = max(row["fast / bare"] for row in results.values())
    for where, of_spatial, target in (("libero_spatial", True, 1.5), ("elsewhere", False, 1.9)):
        measured = list(ratios("exact / bare", of_spatial=of_spatial))
        if measured:
            values[f"exact / bare, {where}"] = max(measured)
            at_most[f"exact / bare, {where}"] = target
    return judge(values, at_least=at_least, at_most=at_most)


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--num-steps", type=integer(at_least=1), default=60)
    parser.add_argument("--num-rounds", type=integer(at_least=1), default=7)
    suites = sorted({suite for suite, _ in TASKS})
    parser.add_argument("--suites", choices=suites, nargs="+", default=suites, help="suites of the tasks to measure")
    args = parser.parse_args()
    with refusals(parser):
        tasks = [task for suite, task_id in TASKS if suite in args.suites for task in tasks_of(suite, [task_id])]
    table = Table({"ms a step": "<26"} | dict.fromkeys(WAYS, ">9.2f") | {f"  {a}/{b}": ">14.2f" for a, b in RATIOS})
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        ms = measure_task(task, num_steps=args.num_steps, num_rounds=args.num_rounds)
        ratios = {f"{a} / {b}": ms[a] / ms[b] for a, b in RATIOS}
        table.add(f"{task.suite}/{task.task_id}", *ms.values(), *ratios.values())
        results[f"{task.suite}/{task.task_id}"] = {
            **{f"{way} ms": round(value, 3) for way, value in ms.items()},
            **{name: round(value, 2) for name, value in ratios.items()},
        }
    settings = {"suites": args.suites, "num_steps": args.num_steps, "num_rounds": args.num_rounds}
    return publish("env_step", results, settings=settings, targets=judge_worst(results), output=args.output)


if __name__ == "__main__":
    launch_benchmark(main)
