"""Compares the runtime with LIBERO's own environment, live: positions, observations, success, fixture poses.

`python -m benchmarks.parity` runs all tasks of four suites under three action sequences of 200 steps and a sample of
LIBERO-90 and LIBERO-PRO, prints a table, and one JSON line at the end. `--num-steps`, `--suites` and `--tasks` make it
shorter. Sequences: "contact" descends on the table, sweeps, closes the gripper and lifts; "random" is uniform;
"smooth" is a sum of slow sines.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, suite_name, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.physics.controller import axis_angle_from_quat
from libero_gym.physics.simulation import Simulation, Stepping, load_task_data
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec, load_init_states

SEQUENCES = ("contact", "random", "smooth")
FULL_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
SAMPLE = (
    ("libero_90", 3),
    ("libero_90", 20),
    ("libero_90", 39),
    ("libero_90", 47),
    ("libero_90", 74),
    ("libero_spatial_swap", 0),
    ("libero_goal_task", 0),
    ("libero_10_object", 2),
    ("libero_object_with_mug", 1),
)

PREDICATE_KINDS = ("on object", "on part", "on table region", "in", "open", "close", "turnon", "turnoff")
"""All that LIBERO's goals use: `on` judges differently by what carries the second argument."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Largest differences from LIBERO over one run; all zero when the two are identical, NaN where one has NaN.

    Attributes:
        suite: suite name.
        task_id: task.
        sequence: action sequence.
        num_steps: environment steps compared.
        max_qpos: rad, m.
        max_qvel: rad/s, m/s.
        max_states: of the observed proprioception in single precision.
        max_fixture: of the fixtures' positions and quaternions.
        num_success_mismatches: steps whose success differs.
        num_successes: steps at which LIBERO's goal holds.
        max_contacts: contacts at the busiest step.
    """

    suite: str
    task_id: int
    sequence: str
    num_steps: int
    max_qpos: float
    max_qvel: float
    max_states: float
    max_fixture: float
    num_success_mismatches: int
    num_successes: int
    max_contacts: int

    def is_exact(self) -> bool:
        """Return whether nothing differs."""
        return not any((self.max_qpos, self.max_qvel, self.max_states, self.max_fixture, self.num_success_mismatches))


def largest_differences(runs: Sequence[Comparison]) -> dict[str, float]:
    """Return the largest differences of several runs by name; NaN if it is one's."""
    names = ("max_qpos", "max_qvel", "max_states", "max_fixture")
    return {name: float(np.max([getattr(run, name) for run in runs])) for name in names}


def make_actions(sequence: str, num_steps: int, seed: int) -> FloatArray:
    """Return an action sequence, float64 [num_steps, 7].

    Raises:
        ValueError: unknown `sequence`.
    """
    rng = np.random.default_rng(seed)
    if sequence == "random":
        return rng.uniform(-1, 1, (num_steps, 7))
    if sequence == "smooth":
        steps = np.arange(num_steps)[:, None]
        return np.sin(steps * rng.uniform(0.02, 0.2, (1, 7)) + rng.uniform(0, 2 * np.pi, (1, 7)))
    if sequence != "contact":
        raise ValueError(f"sequence={sequence!r} is unknown (valid: {', '.join(SEQUENCES)})")
    actions = np.zeros((num_steps, 7))
    quarter = num_steps // 4
    actions[:, 6] = -1
    actions[:quarter, :3] = [*rng.uniform(-0.4, 0.4, 2), -1]
    actions[quarter : 2 * quarter, :3] = [*rng.uniform(-1, 1, 2), -0.2]
    actions[2 * quarter :, 6] = 1
    actions[2 * quarter : 3 * quarter, :3] = [*rng.uniform(-0.3, 0.3, 2), -0.1]
    actions[3 * quarter :, 2:6] = [1, 0, 0.2, 0.5]
    return actions


def compare_run(
    *,
    env: Any,
    task: TaskSpec,
    scene: Scene,
    sequence: str,
    num_steps: int,
    init_state_id: int = 0,
    seed: int = 0,
    stepping: Stepping = "exact",
) -> Comparison:
    """Run LIBERO's environment and a simulation side by side."""
    np.random.seed(seed)  # noqa: NPY002 - LIBERO draws from the global stream
    num_resets = getattr(env, "num_compared_resets", 0) + 1
    env.num_compared_resets = num_resets
    env.reset()
    observation = env.set_init_state(load_init_states(task)[init_state_id])
    simulation = Simulation(scene, stepping=stepping)
    simulation.reset(
        task,
        init_state_id,
        np.random.RandomState(seed),
        init_states="original",
        num_settling_steps=0,
        num_libero_resets=num_resets,
    )
    live = env.sim.model._model
    fixtures = [
        np.abs(live.body_pos - simulation.model.body_pos).max(),
        np.abs(live.body_quat - simulation.model.body_quat).max(),
    ]
    differences = {"qpos": [0.0], "qvel": [0.0], "states": [compare_states(observation, simulation)]}
    mismatches = successes = contacts = 0
    for action in make_actions(sequence, num_steps, seed):
        observation, _, is_success, _ = env.step(action)
        mismatches += bool(is_success) != simulation.step(action)
        successes += bool(is_success)
        contacts = max(contacts, simulation.data.ncon)
        differences["qpos"].append(np.abs(env.sim.data.qpos - simulation.data.qpos).max())
        differences["qvel"].append(np.abs(env.sim.data.qvel - simulation.data.qvel).max())
        differences["states"].append(compare_states(observation, simulation))
    return Comparison(
        suite=task.suite,
        task_id=task.task_id,
        sequence=sequence,
        num_steps=num_steps,
        max_qpos=float(np.max(differences["qpos"])),  # which is NaN if one of them is, unlike max
        max_qvel=float(np.max(differences["qvel"])),
        max_states=float(np.max(differences["states"])),
        max_fixture=float(np.max(fixtures)),
        num_success_mismatches=mismatches,
        num_successes=successes,
        max_contacts=contacts,
    )


def compare_states(observation: dict[str, Any], simulation: Simulation) -> float:
    """Return the largest difference between the proprioception of LIBERO's observation and of a simulation."""
    expected = [
        observation["robot0_eef_pos"],
        axis_angle_from_quat(observation["robot0_eef_quat"]),
        observation["robot0_gripper_qpos"],
    ]
    return float(np.abs(np.concatenate(expected).astype(np.float32) - simulation.states()).max())


def compare_predicates(env: Any, task: TaskSpec, scene: Scene, num_states: int, seed: int) -> tuple[int, int]:
    """Judge randomised states by LIBERO and here; return (mismatches, states that LIBERO calls a success).

    Things named in the goal are put near where they should be, and joints anywhere in their range, so that both
    verdicts occur.
    """
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # noqa: NPY002 - LIBERO draws from the global stream
    env.reset()
    env.set_init_state(load_init_states(task)[0])
    goal = load_task_data(scene, task).goal
    simulation = Simulation(scene)
    model, data, live = simulation.model, simulation.data, env.sim
    model.body_pos[:], model.body_quat[:] = live.model._model.body_pos, live.model._model.body_quat
    start = np.array(live.data.qpos)
    mismatches = positives = 0
    for _ in range(num_states):
        qpos = start.copy()
        for atom in goal.atoms:
            _perturb(scene, model, data, qpos, atom, rng)
        data.qpos[:] = qpos
        live.data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        live.forward()
        expected = bool(env.check_success())
        positives += expected
        mismatches += expected != goal(data)
    return mismatches, positives


def predicate_kinds(scene: Scene, task: TaskSpec) -> set[str]:
    """Return which of `PREDICATE_KINDS` the goal of `task` uses."""
    kinds: set[str] = set()
    for predicate, *names in load_task_data(scene, task).goal.atoms:
        if predicate != "on":
            kinds.add(predicate)
        elif names[1] in scene.objects:
            kinds.add("on object")
        else:
            kinds.add("on table region" if scene.sites[names[1]].parent is None else "on part")
    return kinds


def _perturb(
    scene: Scene,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    qpos: FloatArray,
    atom: tuple[str, ...],
    rng: np.random.Generator,
) -> None:
    if len(atom) == 2:
        name = atom[1]
        addresses = scene.sites[name].joint_qpos_adr if name in scene.sites else scene.objects[name].joint_qpos_adr
        for address in addresses:
            joint = int(np.flatnonzero(model.jnt_qposadr == address)[0])
            low, high = model.jnt_range[joint]
            is_near_an_end = rng.random() < 0.5
            qpos[address] = rng.choice([low, high]) + rng.normal(0, 0.01) if is_near_an_end else rng.uniform(low, high)
        return
    thing = scene.objects[atom[1]]
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    if atom[2] in scene.sites:
        target = data.site_xpos[scene.sites[atom[2]].site_id]
    else:
        target = data.xpos[scene.objects[atom[2]].body_id]
    address = thing.joint_qpos_adr[-1]
    spread = 0.5 * scene.sites[atom[2]].size[:2] if atom[2] in scene.sites else 0.015
    qpos[address : address + 2] = target[:2] + rng.normal(0.0, 1.0, 2) * spread
    qpos[address + 2] = target[2] + rng.uniform(-0.02, 0.06)


def main() -> dict[str, Any]:
    """Compares, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--suites", type=suite_name, nargs="+", default=list(FULL_SUITES))
    parser.add_argument("--tasks", type=integer(at_least=0), nargs="+", help="task ids of each suite (default: all)")
    parser.add_argument("--num-steps", type=integer(at_least=1), default=200)
    parser.add_argument(
        "--num-predicate-states", type=integer(at_least=1), default=300, help="randomised states a task"
    )
    parser.add_argument("--no-sample", action="store_true", help="leave out LIBERO-90 and LIBERO-PRO")
    args = parser.parse_args()
    with refusals(parser):
        tasks = [task for name in args.suites for task in tasks_of(name, args.tasks)]
        if not args.no_sample:
            tasks += [task for name, task_id in SAMPLE for task in tasks_of(name, [task_id])]

    started = time.perf_counter()
    differences = dict.fromkeys(("qpos", "qvel", "states", "fixture"), ">9.1e")
    table = Table({"task": "<28", "sequence": "<8"} | differences | {"success": ">10", "contacts": ">9"})
    results: list[Comparison] = []
    num_states = num_mismatches = num_positives = 0
    positives_by_kind: collections.Counter[str] = collections.Counter()
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        with reference_env(task) as env:
            for seed, sequence in enumerate(SEQUENCES):
                run = compare_run(
                    env=env, task=task, scene=scene, sequence=sequence, num_steps=args.num_steps, seed=seed
                )
                results.append(run)
                success = f"{run.num_success_mismatches}/{run.num_successes}"
                found = (run.max_qpos, run.max_qvel, run.max_states, run.max_fixture)
                table.add(f"{run.suite}/{run.task_id}", run.sequence, *found, success, run.max_contacts)
            mismatches, positives = compare_predicates(env, task, scene, args.num_predicate_states, seed=7)
        num_states += args.num_predicate_states
        num_mismatches += mismatches
        num_positives += positives
        positives_by_kind.update(dict.fromkeys(predicate_kinds(scene, task), positives))
    print(f"{num_states} states judged, {num_positives} successes, {num_mismatches} mismatches")
    by_kind = ", ".join(f"{kind} {positives_by_kind[kind]}" for kind in PREDICATE_KINDS)
    print(f"successes of goals with each predicate: {by_kind}")

    zero = {
        **largest_differences(results),
        "num_success_mismatches": sum(run.num_success_mismatches for run in results),
        "predicate_mismatches": num_mismatches,
    }
    judged = {
        "predicate_states": num_states,
        "predicate_positives": num_positives,
        "predicate_kinds": sum(positives_by_kind[kind] > 0 for kind in PREDICATE_KINDS),
    }
    enough = {"predicate_states": 5000, "predicate_positives": 1000, "predicate_kinds": len(PREDICATE_KINDS)}
    outcome = {
        "num_tasks": len(tasks),
        "num_runs": len(results),
        "num_exact_runs": sum(run.is_exact() for run in results),
        "max_contacts": max(run.max_contacts for run in results),
        **zero,
        **judged,
        "predicate_positives_by_kind": {kind: positives_by_kind[kind] for kind in PREDICATE_KINDS},
        "inexact": [asdict(run) for run in results if not run.is_exact()],
        "seconds": round(time.perf_counter() - started, 1),
    }
    return publish(
        "parity",
        outcome,
        settings={
            "suites": args.suites,
            "tasks": args.tasks,
            "has_sample": not args.no_sample,
            "num_steps": args.num_steps,
            "num_predicate_states": args.num_predicate_states,
        },
        targets=judge(zero | judged, at_most=dict.fromkeys(zero, 0), at_least=enough),
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
