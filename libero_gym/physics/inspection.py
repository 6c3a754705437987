"""What a world is like behind its observation: where things are, and which parts of the goal hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.physics.simulation import Simulation, load_task_data
from libero_gym.physics.states import read_task
from libero_gym.tasks.scenes import Scene, load_scene


class SegmentationLabel(NamedTuple):
    """What a number of the segmentation stands for.

    Attributes:
        body: name of the body in MuJoCo's model, such as "wooden_cabinet_1_cabinet_top".
        object: name in BDDL of the object or fixture that it is a part of, such as "wooden_cabinet_1"; for what BDDL
            does not name, the body that carries the whole: "robot0_base", "table", "world".
    """

    body: str
    object: str


Poses = dict[str, npt.NDArray[np.float64]]


def object_poses(simulation: Simulation) -> Poses:
    """Return where objects and fixtures are, by their names in BDDL; see `LiberoEnv.object_poses`."""
    return _poses(simulation.scene, simulation.data)


def goal_state(simulation: Simulation) -> dict[str, bool]:
    """Return which atoms of the task's goal hold, by their text; see `LiberoEnv.goal_state`.

    Raises:
        ValueError: `reset` was not called.
    """
    if simulation.task is None:
        raise ValueError("reset() must be called first")
    return load_task_data(simulation.scene, simulation.task).goal.atom_values(simulation.data)


def inspect_positions(state: Mapping[str, Any]) -> tuple[Poses, dict[str, bool]]:
    """Return object poses and goal state of a saved state of GPU physics, computed on the CPU from its positions.

    Args:
        state: has `qpos`, `body_pos`, `body_quat` and the task, as `WarpWorlds.get_state` returns them.
    """
    task = read_task(state)
    scene = load_scene(task)
    model = copy.copy(scene.physics_model)
    model.body_pos[:], model.body_quat[:] = state["body_pos"], state["body_quat"]
    data = mujoco.MjData(model)
    data.qpos[:] = state["qpos"]
    mujoco.mj_fwdPosition(model, data)
    return _poses(scene, data), load_task_data(scene, task).goal.atom_values(data)


def segmentation_labels(scene: Scene) -> dict[int, SegmentationLabel]:
    """Return body and object of each number of the segmentation of a scene; see `LiberoEnv.segmentation_labels`."""
    model = scene.physics_model
    objects: dict[int, str] = {thing.body_id: name for name, thing in scene.objects.items()}
    names = [str(model.body(body).name) for body in range(model.nbody)]
    roots: list[int] = model.body_rootid.tolist()
    return {
        body: SegmentationLabel(names[body], objects.get(roots[body], names[roots[body]])) for body in range(len(names))
    }


def _poses(scene: Scene, data: mujoco.MjData) -> Poses:
    ids = {name: thing.body_id for name, thing in scene.objects.items()}
    return {name: np.concatenate([data.xpos[i], data.xquat[i]]) for name, i in ids.items()}
