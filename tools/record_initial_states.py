"""Records the initial states that `libero_gym` ships, and checks them; see `libero_gym.tasks.initial_states`.

    python tools/record_initial_states.py --suite libero_spatial --output libero_gym/data/settled
    python tools/record_initial_states.py --suite libero_spatial --output libero_gym/data/held_out --kind held_out
    python tools/record_initial_states.py --suite libero_spatial --check

Recording needs MuJoCo 3.3.7. A second recording equals the first to the last bit on the same kind of processor, and to
1e-13 on another, where BLAS rounds differently. `--check` tells whether all states still hold under the installed
version.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.physics.predicates import Goal, in_contact
from libero_gym.physics.simulation import NUM_SETTLING_STEPS, SETTLING_ACTION, Simulation
from libero_gym.tasks.bddl import Region, read_problem
from libero_gym.tasks.initial_states import OVERLAPPING, RecordedKind, load_recorded_states, source_digest
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec, list_tasks, load_init_states

FloatArray = npt.NDArray[np.float64]

RECORDING_VERSION = "3.3.7"
"""The MuJoCo under which states are recorded."""

# Recording: seeds tried for the fixtures of a state, and the slide, in metres, that calls for the next one. Objects
# that LIBERO stores in the air slide by up to 1.5 cm when they land.
_NUM_FIXTURE_SEEDS = 8
_SLIDE = 0.02

# Held-out states: how many a task has, and the seeds they are sampled with. Those of task t start at 1,000,000 +
# 1,000 t; nothing else uses these: settled states have the fixtures of seeds below 400, and runs are seeded by small
# numbers.
_NUM_HELD_OUT = 50
_FIRST_HELD_OUT_SEED = 1_000_000
_HELD_OUT_SEEDS_PER_TASK = 1000

# Checking, in metres: how far from its region of the table an object may be, and how far it may move while at rest.
# LIBERO's stored states themselves are up to 1.4 cm outside.
_REGION_MARGIN = 0.05
_REST = 2e-3


class UnsettledWorld(NamedTuple):
    """What a reset of LIBERO samples: positions [nq], velocities [nv] and fixture poses as in `RecordedStates`."""

    qpos: FloatArray
    qvel: FloatArray
    fixture_poses: FloatArray


def record_suite(suite: str, folder: Path, kind: RecordedKind = "settled") -> Path:
    """Settle all states of `suite` and write them to `folder`.

    Settled states: state i has the fixtures of the first of the seeds i, i + 50, ..., i + 350 under which no object
    slides by more than 2 cm while it settles. LIBERO samples fixtures without regard to the objects of the stored
    state, and now and then a fixture then stands inside an object and throws it off. Where all seeds fail, the objects
    overlap one another (`OVERLAPPING`), and the first seed with the least slide is taken.

    Held-out states: 50 for each task t, sampled by LIBERO (`sample_world`) with the first seeds from 1,000,000 +
    1,000 t on under which no object slides by more than 2 cm and the premise holds afterwards (`find_faults`). The
    seeds are kept in the file, `{t}_seeds`.

    Raises:
        RuntimeError: the installed MuJoCo is not 3.3.7.
    """
    if mujoco.__version__ != RECORDING_VERSION:
        raise RuntimeError(
            f"mujoco {mujoco.__version__} settles some states in other places; record with {RECORDING_VERSION}"
        )
    arrays: dict[str, Any] = {}
    tasks = list_tasks(suite)
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        simulation = Simulation(scene)
        if kind == "held_out":
            seeds, settled = _sample_held_out(simulation, task)
            arrays[f"{task.task_id}_seeds"] = np.array(seeds)
        else:
            settled = [settle(simulation, task, state_id) for state_id in range(len(load_init_states(task)))]
        controllers = [np.concatenate([s["goal_pos"], s["goal_ori"].ravel(), s["gripper"]]) for s in settled]
        arrays[f"{task.task_id}_source"] = np.array(source_digest(task))
        arrays[f"{task.task_id}_physics"] = np.array([s["physics"] for s in settled])
        arrays[f"{task.task_id}_fixture_poses"] = np.array([s["fixture_poses"] for s in settled])
        arrays[f"{task.task_id}_controller"] = np.array(controllers)
        print(f"{suite}/{task.task_id}: {len(settled)} states", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.npz"
    np.savez_compressed(path, **arrays)
    return path


def _sample_held_out(simulation: Simulation, task: TaskSpec) -> tuple[list[int], list[dict[str, npt.NDArray[Any]]]]:
    """Return the seeds and the settled states, as `settle` does, of the held-out states of `task`."""
    first = _FIRST_HELD_OUT_SEED + _HELD_OUT_SEEDS_PER_TASK * task.task_id
    seeds: list[int] = []
    settled: list[dict[str, npt.NDArray[Any]]] = []
    with reference_env(task) as env:
        for seed in range(first, first + _HELD_OUT_SEEDS_PER_TASK):
            place_world(simulation, task, sample_world(env, simulation.scene, seed))
            slide = _take_settling_steps(simulation)
            outcome = _outcome(simulation)
            faults = [f"an object slides by {1e3 * slide:.0f} mm"] * (slide > _SLIDE)
            faults += _present_faults(simulation, task)
            if faults:  # stdout is LIBERO's
                print(f"{task.suite}/{task.task_id}: seed {seed} is replaced: {'; '.join(faults)}", file=sys.stderr)
                continue
            seeds.append(seed)
            settled.append(outcome)
            if len(seeds) == _NUM_HELD_OUT:
                num_replaced = seed + 1 - first - _NUM_HELD_OUT
                print(f"{task.suite}/{task.task_id}: {num_replaced} seeds were replaced", file=sys.stderr, flush=True)
                return seeds, settled
    raise RuntimeError(f"{_HELD_OUT_SEEDS_PER_TASK} seeds give only {len(seeds)} states of {task}")


def sample_world(env: Any, scene: Scene, seed: int) -> UnsettledWorld:
    """Return what `numpy.random.seed(seed); env.reset()` samples in LIBERO's own environment of a task of `scene`.

    LIBERO appends its samplers of drawers' and knobs' positions anew at every reset and calls all of them; here the
    list is cut back, so that every reset samples what the first after construction samples.
    """
    num_samplers = len(env.env.object_property_initializers)
    np.random.seed(seed)  # noqa: NPY002 - LIBERO draws from the global stream
    env.reset()
    del env.env.object_property_initializers[num_samplers:]
    model = env.sim.model
    fixtures = [model.body_name2id(scene.physics_model.body(int(i)).name) for i in scene.fixture_body_ids]
    return UnsettledWorld(
        qpos=np.array(env.sim.data.qpos),
        qvel=np.array(env.sim.data.qvel),
        fixture_poses=np.concatenate([model.body_pos[fixtures], model.body_quat[fixtures]], axis=1),
    )


def place_world(simulation: Simulation, task: TaskSpec, world: UnsettledWorld) -> None:
    """Reset `simulation` to `world`, before any settling step."""
    simulation.reset(task, 0, np.random.RandomState(0), init_states="original", num_settling_steps=0)
    simulation.set_state({**simulation.get_state(), "fixture_poses": world.fixture_poses})
    simulation.data.qpos[:] = world.qpos
    simulation.data.qvel[:] = world.qvel


def settle(simulation: Simulation, task: TaskSpec, state_id: int) -> dict[str, npt.NDArray[Any]]:
    """Return `get_state()` after settling, its entry "physics" replaced by positions and velocities [nq + nv]."""
    slides: list[float] = []
    outcomes: list[dict[str, npt.NDArray[Any]]] = []
    for seed in range(state_id, state_id + 50 * _NUM_FIXTURE_SEEDS, 50):
        slides.append(_settle_once(simulation, task, state_id, seed))
        outcomes.append(_outcome(simulation))
        if slides[-1] <= _SLIDE:
            return outcomes[-1]
    # Fixtures that touch nothing change the least slide by rounding only.
    return next(o for o, slide in zip(outcomes, slides, strict=True) if slide <= min(slides) + 1e-3)


def _outcome(simulation: Simulation) -> dict[str, npt.NDArray[Any]]:
    return {**simulation.get_state(), "physics": np.concatenate([simulation.data.qpos, simulation.data.qvel])}


def _settle_once(simulation: Simulation, task: TaskSpec, state_id: int, seed: int) -> float:
    """Settle one original state and return how far its objects slid at most, in metres."""
    random_state = np.random.RandomState(seed)
    simulation.reset(task, state_id, random_state, init_states="original", num_settling_steps=0)
    return _take_settling_steps(simulation)


def _take_settling_steps(simulation: Simulation) -> float:
    """Take LIBERO's ten steps without motion and return how far objects slid at most, in metres."""
    mujoco.mj_kinematics(simulation.model, simulation.data)
    objects = [thing.body_id for thing in simulation.scene.objects.values() if not thing.is_fixture]
    before = simulation.data.xpos[objects, :2].copy()
    for _ in range(NUM_SETTLING_STEPS):
        simulation.step(SETTLING_ACTION)
    return float(np.linalg.norm(simulation.data.xpos[objects, :2] - before, axis=1).max())


def find_faults(
    simulation: Simulation, task: TaskSpec, state_id: int, *, kind: RecordedKind = "settled", num_steps: int = 60
) -> list[str]:
    """Reset `simulation` to a recorded state and return what is wrong with it; nothing, if its premise holds.

    The premise: what the task's `:init` says of objects and joints holds (an object on a region of a table is within
    5 cm of it; one on a thing touches it and is above it; one in a thing is in it), the goal does not hold, and in
    `num_steps` steps without motion (60 are 3 s) nothing moves by more than 2 mm.
    """
    simulation.reset(task, state_id, np.random.RandomState(0), init_states=kind)
    return _present_faults(simulation, task, num_steps)


def _present_faults(simulation: Simulation, task: TaskSpec, num_steps: int = 60) -> list[str]:
    problem = read_problem(task.bddl_file)
    regions = {region.name: region for region in problem.regions if region.ranges}
    faults = [f"not {' '.join(atom)}" for atom in problem.init if not _holds(simulation, atom, regions)]
    faults += ["the goal holds at the start"] * simulation.success()
    names = list(simulation.scene.objects)
    bodies = [simulation.scene.objects[name].body_id for name in names]
    before = simulation.data.xpos[bodies].copy()
    for _ in range(num_steps):
        if simulation.step(SETTLING_ACTION):
            return [*faults, "the goal comes true by itself"]
    moved = np.linalg.norm(simulation.data.xpos[bodies] - before, axis=1)
    return faults + [f"{names[i]} moves by {1e3 * moved[i]:.0f} mm" for i in np.flatnonzero(moved > _REST)]


def _holds(simulation: Simulation, atom: tuple[str, ...], regions: dict[str, Region]) -> bool:
    scene, data = simulation.scene, simulation.data
    if atom[0] != "on":
        return Goal(scene, (atom,))(data)
    thing, base = scene.objects[atom[1]], atom[2]
    if thing.is_fixture:
        return True  # it is where it was placed
    position = data.xpos[thing.body_id]
    if base in regions:
        x, y = position[:2] - scene.reference_pos[:2]
        outside = [
            float(np.hypot(max(x_min - x, 0.0, x - x_max), max(y_min - y, 0.0, y - y_max)))
            for x_min, y_min, x_max, y_max in regions[base].ranges
        ]
        return min(outside) <= _REGION_MARGIN
    # LIBERO's own predicate is not used here: it fails for a bowl on the microwave, whose site lies above its top.
    owner = scene.objects[(scene.sites[base].parent or "") if base in scene.sites else base]
    is_above = bool(position[2] >= data.xpos[owner.body_id, 2])
    return is_above and in_contact(data, thing.contact_mask, owner.contact_mask)


def check_suite(suite: str, kind: RecordedKind = "settled", *, num_steps: int = 60) -> int:
    """Print what is wrong with the recorded states of `suite`; return how many are at fault unexpectedly."""
    tasks = list_tasks(suite)
    num_states = num_unexpected = 0
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        simulation = Simulation(scene, stepping="fast")
        for state_id in range(len(load_recorded_states(task, kind).physics)):
            num_states += 1
            faults = find_faults(simulation, task, state_id, kind=kind, num_steps=num_steps)
            if faults:
                is_expected = kind == "settled" and state_id in OVERLAPPING.get((suite, task.task_id), ())
                num_unexpected += not is_expected
                known = " (objects overlap in LIBERO's state)" if is_expected else ""
                print(f"{suite}/{task.task_id} state {state_id}: {'; '.join(faults)}{known}", flush=True)
    states = f"{num_states} {kind} states"
    print(f"{suite}: {states} under mujoco {mujoco.__version__}, {num_unexpected} unexpectedly at fault")
    return num_unexpected


def main() -> None:
    """Record or check what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--kind", choices=get_args(RecordedKind), default="settled")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--output", type=Path, help=f"folder to record into; needs MuJoCo {RECORDING_VERSION}")
    action.add_argument("--check", action="store_true", help="check all states under the installed MuJoCo")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(check_suite(arguments.suite, arguments.kind) > 0)
    print(record_suite(arguments.suite, arguments.output, arguments.kind))


if __name__ == "__main__":
    main()
