"""Draws initial states with LIBERO's own sampler; run as a process of its own by `libero_gym.tasks.own_suites`.

`python -m libero_gym.tasks.state_sampler BDDL_FILE FILE` writes a `.npz` file with, for each of S states,

- `states` [S, 1 + nq + nv]: what `numpy.random.seed(s); env.reset()` samples (time, positions, velocities), for the
  seeds s = 0, 1, ... under which no object slides by more than 2 cm while it comes to rest;
- `seeds` [S];
- `physics`, `fixture_poses`, `controller`: the same at rest after LIBERO's ten steps without motion, as
  `libero_gym.tasks.initial_states.RecordedStates` holds them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.physics.simulation import NUM_SETTLING_STEPS, SETTLING_ACTION, Simulation
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.own_suites import NUM_STATES
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec

_SLIDE = 0.02
_MAX_SEEDS = 10 * NUM_STATES


def sample_states(task: TaskSpec) -> dict[str, npt.NDArray[Any]]:
    """Return what the module says; the first sample is written to `task.init_states_file`, for the simulation to read.

    Raises:
        RuntimeError: too many samples slide; the objects' regions are too small, or overlap.
    """
    scene = load_scene(task)
    simulation: Simulation | None = None
    rows: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("states", "seeds", "physics", "fixture_poses", "controller")
    }
    with reference_env(task, has_textures=False) as env:
        num_samplers = len(env.env.object_property_initializers)
        for seed in range(_MAX_SEEDS):
            np.random.seed(seed)  # noqa: NPY002 - LIBERO draws from the global stream
            env.reset()
            del env.env.object_property_initializers[num_samplers:]  # LIBERO appends them anew at every reset
            model, data = env.sim.model, env.sim.data
            fixtures = [model.body_name2id(scene.physics_model.body(int(i)).name) for i in scene.fixture_body_ids]
            poses = np.concatenate([model.body_pos[fixtures], model.body_quat[fixtures]], axis=1)
            state = np.concatenate([[0.0], data.qpos, data.qvel])
            if simulation is None:
                np.savez(task.init_states_file, states=state[None])
                simulation = Simulation(scene)
            settled, slide = _settle(simulation, task, state, poses)
            if slide > _SLIDE:
                continue
            rows["states"].append(state)
            rows["seeds"].append(np.array(seed))
            rows["physics"].append(np.concatenate([simulation.data.qpos, simulation.data.qvel]))
            rows["fixture_poses"].append(settled["fixture_poses"])
            memory = [settled["goal_pos"], settled["goal_ori"].ravel(), settled["gripper"]]
            rows["controller"].append(np.concatenate(memory))
            if len(rows["states"]) == NUM_STATES:
                return {name: np.array(values) for name, values in rows.items()}
    raise RuntimeError(
        f"of {_MAX_SEEDS} samples only {len(rows['states'])} come to rest where they are placed: see that the regions "
        "of the task's objects are large enough and apart"
    )


def _settle(
    simulation: Simulation, task: TaskSpec, state: npt.NDArray[np.float64], poses: npt.NDArray[np.float64]
) -> tuple[dict[str, npt.NDArray[Any]], float]:
    """Return the state at rest and how far objects slid at most, in metres."""
    simulation.reset(task, 0, np.random.RandomState(0), init_states="original", num_settling_steps=0)
    fixtures = simulation.scene.fixture_body_ids
    simulation.model.body_pos[fixtures], simulation.model.body_quat[fixtures] = poses[:, :3], poses[:, 3:]
    nq = simulation.model.nq
    simulation.data.qpos[:], simulation.data.qvel[:] = state[1 : 1 + nq], state[1 + nq :]
    mujoco.mj_kinematics(simulation.model, simulation.data)
    objects = [thing.body_id for thing in simulation.scene.objects.values() if not thing.is_fixture]
    before = simulation.data.xpos[objects, :2].copy()
    for _ in range(NUM_SETTLING_STEPS):
        simulation.step(SETTLING_ACTION)
    slides = np.linalg.norm(simulation.data.xpos[objects, :2] - before, axis=1)
    return simulation.get_state(), float(slides.max(initial=0.0))


def main() -> None:
    """Draw what the command line names."""
    bddl_file, file = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        task = TaskSpec(
            suite="own",
            task_id=0,
            name=bddl_file.stem,
            language=read_problem(bddl_file).instruction,
            bddl_file=bddl_file,
            init_states_file=Path(scratch) / "first.npz",
        )
        arrays: dict[str, Any] = dict(sample_states(task))
        np.savez(file, **arrays)


if __name__ == "__main__":
    main()
