"""Cameras: those of a scene, and others of one's own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, cast

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.rendering.protocol import ViewKind
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scenes import Scene, load_scene
from libero_gym.tasks.suites import TaskSpec

FloatArray = npt.NDArray[np.float64]

# Cameras of every scene of LIBERO's problems: those of its arenas (assets/scenes/*.xml), of `_setup_camera` in
# envs/problems, and of robosuite's Panda.
_COMMON_CAMERAS = (
    "agentview",
    "birdview",
    "frontview",
    "galleryview",
    "robot0_eye_in_hand",
    "robot0_robotview",
    "sideview",
)
# Bodies of the arm and of the gripper, by robosuite's prefixes for them: the same in every scene.
_ROBOT_PREFIXES = ("robot0_", "gripper0_")
_ROBOT_BODIES = (
    "robot0_base",
    *(f"robot0_link{i}" for i in range(8)),
    "robot0_right_hand",
    "gripper0_right_gripper",
    "gripper0_eef",
    "gripper0_leftfinger",
    "gripper0_finger_joint1_tip",
    "gripper0_rightfinger",
    "gripper0_finger_joint2_tip",
)
# What the scenes of a problem have besides, from the same places.
_FURTHER_CAMERAS = {
    "libero_coffee_table_manipulation": ("canonical_agentview",),
    "libero_floor_manipulation": (),
    "libero_kitchen_tabletop_manipulation": ("paperview",),
    "libero_living_room_tabletop_manipulation": ("paperview",),
    "libero_study_tabletop_manipulation": ("paperview",),
    "libero_tabletop_manipulation": (),
}


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera of one's own, or one of the scene's with another field of view.

    Attributes:
        name: names the observation; without `pos`, the scene's camera of this name (`list_cameras`).
        pos: position in metres, in the frame of `body`; None takes the scene's camera.
        look_at: what it looks at, metres, in the frame of `body`; needed with `pos`. The picture is upright, z up, or
            x up for a camera that looks straight down.
        fovy_deg: vertical field of view, degrees; None takes the scene camera's, or 45 for one of one's own.
        body: body that carries it, such as "robot0_right_hand"; "world" stands still.
    """

    name: str
    pos: tuple[float, float, float] | None = None
    look_at: tuple[float, float, float] | None = None
    fovy_deg: float | None = None
    body: str = "world"

    def __post_init__(self) -> None:
        """Check the values and make them tuples.

        Raises:
            ValueError: a value is not among the allowed ones, or does not go with another.
            TypeError: the name or the body is no text, or the field of view no number.
        """
        for field in ("name", "body"):
            if not isinstance(text := getattr(self, field), str):
                raise TypeError(f"camera {field}={text!r} is a {type(text).__name__}, not a name (text)")
        if isinstance(self.fovy_deg, bool) or not isinstance(cast(Any, self.fovy_deg), Real | None):
            raise TypeError(
                f"camera {self.name!r} has fovy_deg={self.fovy_deg!r}, which is no number (valid: above 0, below 180)"
            )
        if not self.name.isidentifier():
            raise ValueError(f"camera name={self.name!r} is not an identifier (letters, digits, '_')")
        if (self.pos is None) != (self.look_at is None) or (self.pos is None and self.body != "world"):
            raise ValueError(f"camera {self.name!r} needs pos and look_at, or neither, then without body")
        if self.fovy_deg is not None and not 0 < self.fovy_deg < 180:
            raise ValueError(f"camera {self.name!r} has fovy_deg={self.fovy_deg} (valid: above 0, below 180)")
        for field in ("pos", "look_at"):
            value = getattr(self, field)
            if value is not None:
                try:
                    point = tuple(float(x) for x in value)
                except (TypeError, ValueError):
                    point = ()
                if len(point) != 3 or not all(map(math.isfinite, point)):
                    raise ValueError(
                        f"camera {self.name!r} has {field}={value!r}; expected three finite numbers, metres"
                    )
                object.__setattr__(self, field, point)
        if self.pos is not None and self.pos == self.look_at:
            raise ValueError(f"camera {self.name!r} stands where it looks at, {self.pos}")


class CameraPlace(NamedTuple):
    """Where a camera of a model is.

    Attributes:
        body_id: body that carries it.
        pos: float64 [3], in the body's frame, m.
        quat_wxyz: float64 [4], in the body's frame; the camera looks along -z, x is right, y is up.
        fovy_deg: vertical field of view, degrees.
    """

    body_id: int
    pos: FloatArray
    quat_wxyz: FloatArray
    fovy_deg: float


def camera_name(camera: str | Camera) -> str:
    """Return a camera's name."""
    return camera if isinstance(camera, str) else camera.name


def view_keys(cameras: Sequence[str | Camera], kind: ViewKind) -> tuple[str, ...]:
    """Return the cameras' keys: `images`, `wrist_images`, `<name>_images` for further ones; `depth` and so on."""
    own = (kind, f"wrist_{kind}")
    return (*own[: len(cameras)], *(f"{camera_name(camera)}_{kind}" for camera in cameras[len(own) :]))


def list_cameras(task: TaskSpec) -> dict[str, Camera]:
    """Return the cameras of a task's scene by name, with their fields of view.

    Raises:
        TypeError: `task` is none.
    """
    if not isinstance(cast("Any", task), TaskSpec):
        raise TypeError(
            f"list_cameras takes a task, such as libero_gym.get_task('libero_spatial', 0) (given: {task!r})"
        )
    model = load_scene(task).physics_model
    cameras = (model.camera(i) for i in range(model.ncam))
    return {camera.name: Camera(name=camera.name, fovy_deg=float(camera.fovy[0])) for camera in cameras}


def place_camera(model: mujoco.MjModel, camera: str | Camera) -> CameraPlace:
    """Return where a camera is.

    Raises:
        ValueError: the model has no such camera or body, or its camera tracks a target.
    """
    if isinstance(camera, str):
        camera = Camera(name=camera)
    if camera.pos is None or camera.look_at is None:
        index = _find(model, mujoco.mjtObj.mjOBJ_CAMERA, "camera", camera.name, model.ncam)
        if model.cam_mode[index] != mujoco.mjtCamLight.mjCAMLIGHT_FIXED:
            raise ValueError(f"camera {camera.name!r} tracks a target; only cameras fixed to a body can be rendered")
        return CameraPlace(
            body_id=int(model.cam_bodyid[index]),
            pos=model.cam_pos[index].copy(),
            quat_wxyz=model.cam_quat[index].copy(),
            fovy_deg=float(model.cam_fovy[index]) if camera.fovy_deg is None else camera.fovy_deg,
        )
    body_id = _find(model, mujoco.mjtObj.mjOBJ_BODY, "body", camera.body, model.nbody)
    pos = np.array(camera.pos)
    backward = _unit(pos - np.array(camera.look_at))
    is_vertical = abs(backward[2]) > 1.0 - 1e-9
    right = _unit(np.cross(np.array([1.0, 0.0, 0.0]) if is_vertical else np.array([0.0, 0.0, 1.0]), backward))
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, axes.ravel())
    return CameraPlace(body_id, pos, quat, 45.0 if camera.fovy_deg is None else camera.fovy_deg)


def check_cameras(cameras: Sequence[str | Camera], tasks: Sequence[TaskSpec]) -> tuple[str | Camera, ...]:
    """Return cameras as a tuple.

    Of tasks whose problem is none of LIBERO's, the scenes tell what cameras they have when they are opened
    (`check_cameras_of_scene`), and so they do for bodies other than the robot's.

    Args:
        cameras: names of the scenes' cameras, or cameras of one's own.
        tasks: those whose scenes are looked at.

    Raises:
        ValueError: there is none, or two have one name or would be observed by one key, or the scene of a task has no
            camera of a name, or the robot no body of that name.
        TypeError: they are no sequence, or one is neither a name nor a `Camera`.
    """
    if isinstance(cameras, str):
        raise TypeError(f"camera_names={cameras!r} is not a sequence (for one camera: [{cameras!r}])")
    if not isinstance(cast(Any, cameras), Sequence | np.ndarray):
        raise TypeError(
            f"camera_names={cameras!r} is a {type(cameras).__name__}, not a sequence of cameras: give a list, such as "
            "['agentview', 'robot0_eye_in_hand']"
        )
    for camera in cast("Sequence[Any]", cameras):
        if not isinstance(camera, str | Camera):
            raise TypeError(f"camera_names holds {camera!r}; expected names and libero_gym.Camera")
    names = [camera_name(camera) for camera in cameras]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"camera_names={names} must name at least one camera, and none twice (without images: observe_images=False)"
        )
    keys = view_keys(cameras, "images")
    by_key = dict(zip(keys, names, strict=True))
    hidden = [(key, name) for key, name in zip(keys, names, strict=True) if by_key[key] != name]
    if hidden:
        key, name = hidden[0]
        raise ValueError(
            f"camera {by_key[key]!r} would be observed as {key!r}, as {name!r} is; give it another name, or take it "
            f"in place of {name!r}"
        )
    of_scenes = [camera_name(camera) for camera in cameras if isinstance(camera, str) or camera.pos is None]
    _check_scenes_have(set(of_scenes), tasks)
    for camera in cameras:
        if isinstance(camera, Camera) and camera.body.startswith(_ROBOT_PREFIXES) and camera.body not in _ROBOT_BODIES:
            nearest = difflib.get_close_matches(camera.body, _ROBOT_BODIES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"camera {camera.name!r} is on body {camera.body!r}, which the robot has not{hint} (valid: "
                f"{', '.join(_ROBOT_BODIES)}, and what else the scene has)"
            )
    return tuple(cameras)


def check_cameras_of_scene(cameras: Sequence[str | Camera], scene: Scene) -> None:
    """Raise ValueError unless a scene has the cameras of these names, and the bodies that carry others."""
    for camera in cameras:
        place_camera(scene.physics_model, camera)


def _check_scenes_have(names: set[str], tasks: Sequence[TaskSpec]) -> None:
    further = names.difference(_COMMON_CAMERAS)
    for task in tasks if further else ():
        known = _FURTHER_CAMERAS.get(read_problem(task.bddl_file).name)
        absent = sorted(further.difference(known)) if known is not None else []
        if absent:
            valid = sorted((*_COMMON_CAMERAS, *(known or ())))
            nearest = difflib.get_close_matches(absent[0], valid, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"camera {absent[0]!r} is not in the scene of {task.suite} task {task.task_id}{hint} (valid: "
                f"{', '.join(valid)}, or a libero_gym.Camera with pos and look_at)"
            )


def _find(model: mujoco.MjModel, kind: mujoco.mjtObj, what: str, name: str, count: int) -> int:
    index = mujoco.mj_name2id(model, kind, name)
    if index < 0:
        known = [mujoco.mj_id2name(model, kind, i) for i in range(count)]
        plural = "cameras" if what == "camera" else "bodies"
        raise ValueError(f"{what} {name!r} is not in the scene ({plural}: {known})")
    return index


def _unit(vector: FloatArray) -> FloatArray:
    return vector / np.linalg.norm(vector)
