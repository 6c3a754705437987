"""Settled initial states: what LIBERO's stored states become after its settling steps, recorded once.

LIBERO stores states in which some objects hang in the air and lets them fall during the first ten steps. MuJoCo 3.4
corrected the contact of boxes, and since then some of them end elsewhere: the bowl "on the ramekin" of libero_spatial
task 5 slides to its rim. Objects that have come to rest under an older version stay where they are under every
version. The files in `data/settled/` therefore hold, for each stored state, the world after the settling steps under
MuJoCo 3.3.7: positions, velocities, fixture poses (which LIBERO samples, and on which things rest) and the
controller's memory.

`python -m libero_gym.settling --suite libero_spatial --output libero_gym/data/settled` recorded them; it needs
MuJoCo 3.3.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.suites import TaskSpec, list_tasks, load_init_states

FloatArray = npt.NDArray[np.float64]

_FOLDER = Path(__file__).resolve().parent / "data" / "settled"


@dataclass(frozen=True, kw_only=True, eq=False)
class SettledStates:
    """The settled states of one task; S states.

    Attributes:
        physics: float64 [S, nq + nv], positions and velocities.
        fixture_poses: float64 [S, num_fixtures, 7], position (m) and quaternion wxyz.
        controller: float64 [S, 14], the controller's goal position (3), goal orientation (9) and gripper (2).
    """

    physics: FloatArray
    fixture_poses: FloatArray
    controller: FloatArray


def has_settled_states(suite: str) -> bool:
    """Return whether settled states of `suite` are part of the package."""
    return (_FOLDER / f"{suite}.npz").is_file()


@functools.lru_cache(maxsize=256)
def load_settled_states(task: TaskSpec) -> SettledStates:
    """Return the recorded states of `task`.

    Raises:
        FileNotFoundError: none are recorded for its suite.
        ValueError: they were recorded from other initial states than the installed ones.
    """
    path = _FOLDER / f"{task.suite}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no settled states are recorded for {task.suite}; use init_states='original'")
    with np.load(path, allow_pickle=False) as archive:
        if str(archive[f"{task.task_id}_source"]) != _source_digest(task):
            raise ValueError(
                f"the settled states of {task.suite} task {task.task_id} come from other initial states than those in "
                f"{task.init_states_file}; use init_states='original'"
            )
        return SettledStates(
            physics=archive[f"{task.task_id}_physics"],
            fixture_poses=archive[f"{task.task_id}_fixture_poses"],
            controller=archive[f"{task.task_id}_controller"],
        )


def _source_digest(task: TaskSpec) -> str:
    content = np.ascontiguousarray(load_init_states(task)).tobytes() + task.bddl_file.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def record_suite(suite: str, folder: Path) -> Path:
    """Settle all stored states of `suite` and write them to `folder`; state i has the fixtures of seed i.

    Raises:
        RuntimeError: the installed MuJoCo is not 3.3.
    """
    from libero_gym.scenes import load_scenes
    from libero_gym.simulation import Simulation

    if not mujoco.__version__.startswith("3.3."):
        raise RuntimeError(f"mujoco {mujoco.__version__} settles some states wrongly; record with 3.3.x")
    arrays: dict[str, npt.NDArray[Any]] = {}
    tasks = list_tasks(suite)
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        simulation = Simulation(scene)
        settled: list[dict[str, npt.NDArray[Any]]] = []
        for state_id in range(len(load_init_states(task))):
            simulation.reset(task, state_id, np.random.RandomState(state_id), init_states="original")
            data = simulation.data
            settled.append({**simulation.get_state(), "physics": np.concatenate([data.qpos, data.qvel])})
        controllers = [np.concatenate([s["goal_pos"], s["goal_ori"].ravel(), s["gripper"]]) for s in settled]
        arrays[f"{task.task_id}_source"] = np.array(_source_digest(task))
        arrays[f"{task.task_id}_physics"] = np.array([s["physics"] for s in settled])
        arrays[f"{task.task_id}_fixture_poses"] = np.array([s["fixture_poses"] for s in settled])
        arrays[f"{task.task_id}_controller"] = np.array(controllers)
        print(f"{suite}/{task.task_id}: {len(settled)} states", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


def main() -> None:
    """Record what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    print(record_suite(arguments.suite, arguments.output))


if __name__ == "__main__":
    main()
