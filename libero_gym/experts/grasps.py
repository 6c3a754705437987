"""Where to grasp an object: candidates from the shape of its collision geometry, scored.

The gripper comes from above. Its frame (the end-effector site) has x along the fingers' motion, z along the fingers,
pointing down; `yaw` turns it about the vertical, 0 being the orientation at reset, in which the fingers move along
the world's y axis. All lengths are in metres, angles in rad.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from libero_gym.experts.geometry import Shapes

FloatArray = npt.NDArray[np.float64]

# The gripper in the frame of its site, from the vertices of robosuite's Panda gripper with the fingers fully open.
FINGER_INNER = 0.0386
FINGER_OUTER = 0.0545
FINGER_HALF_WIDTH = 0.0088
TIP_DEPTH = 0.0095
PALM_HEIGHT = 0.031
HAND_HALF_LENGTH = 0.104
HAND_HALF_WIDTH = 0.032
HAND_TOP = 0.25
"""How much of the arm above the fingers counts: it comes down from above."""

MAX_WIDTH = 0.070
"""Widest part that is grasped across: 7 mm less than the opening."""

_RIM_DEPTH = 0.018
# Walls of bowls and mugs widen towards the rim; between upright fingers such a wall creeps out.
_RIM_ROLL = 0.16
_BODY_DEPTH = 0.020
_CLEARANCE = 0.003
_LEAN_FROM, _LEAN_OVER, _MAX_LEAN = 0.70, 0.12, 0.35
_SLICE = 0.010
_YAW_STEP_DEG = 3
_INTRUSION_COST = 0.5
_NUM_ALTERNATIVES = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Grasp:
    """A pose of the gripper, fixed to the object.

    Attributes:
        position: float64 [3], of the site in the world.
        rotation: float64 [3, 3], world from gripper.
        kind: "rim" straddles a wall, "across" holds the whole object.
    """

    position: FloatArray
    rotation: FloatArray
    kind: str


def gripper_rotation(yaw: float, roll: float = 0.0) -> FloatArray:
    """Return world from gripper, [3, 3], of a gripper that points down.

    Args:
        yaw: rad.
        roll: rad by which it is then turned about its y axis: the fingertips move towards +x of the gripper.
    """
    sine, cosine = np.sin(yaw), np.cos(yaw)
    down = np.array([[-sine, cosine, 0.0], [cosine, sine, 0.0], [0.0, 0.0, -1.0]])
    return down @ np.array([[np.cos(roll), 0.0, np.sin(roll)], [0.0, 1.0, 0.0], [-np.sin(roll), 0.0, np.cos(roll)]])


def lean_outwards(rotation: FloatArray, offset: FloatArray) -> FloatArray:
    """Return `rotation` with the fingers turned away from the robot where it has to stretch.

    Pointing straight down, the wrist has to be above the fingers, and the elbow is nearly straight at 0.8 m from the
    robot's base: the arm loses a direction of motion there. Leaning moves the wrist back.

    Args:
        rotation: [3, 3], world from gripper.
        offset: [2], from the robot's base to the gripper.
    """
    distance = float(np.linalg.norm(offset))
    lean = _MAX_LEAN * min(1.0, max(0.0, (distance - _LEAN_FROM) / _LEAN_OVER))
    if lean == 0.0:
        return rotation
    x, y = offset / distance
    # Rotation about the horizontal axis (y, -x): turns down (-z) towards the offset's direction.
    cosine, sine = np.cos(lean), np.sin(lean)
    axis = np.array([y, -x, 0.0])
    cross = np.array([[0.0, 0.0, axis[1]], [0.0, 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    return (np.eye(3) + sine * cross + (1.0 - cosine) * (cross @ cross)) @ rotation


def opening_axis(yaw: float) -> FloatArray:
    """Return the horizontal direction [2] of the fingers' motion."""
    return gripper_rotation(yaw)[:2, 0]


def choose_grasp(shapes: Shapes, body_id: int, *, preferred_yaw: float = 0.0, attempt: int = 0) -> Grasp:
    """Return the best grasp of the object as it stands.

    Args:
        shapes: clouds of the scene.
        body_id: root body of the object.
        preferred_yaw: the yaw that costs nothing.
        attempt: 0 for the best candidate; n for the n-th best that differs, after failures.

    Raises:
        ValueError: the object is neither narrow enough nor has it a rim.
    """
    cloud = shapes.cloud(body_id)
    candidates = _candidates_across(cloud, preferred_yaw) or _candidates_rim(cloud, preferred_yaw)
    if not candidates:
        name = shapes.model.body(body_id).name
        raise ValueError(f"body {name!r} has no part narrower than {MAX_WIDTH} m and no rim to grasp")
    obstacles = shapes.obstacles((body_id,), cloud[:, :2].mean(axis=0), 0.25)
    rank = attempt % _NUM_ALTERNATIVES
    best: list[tuple[float, int]] = []
    order = sorted(range(len(candidates)), key=lambda index: candidates[index][0])
    for index in order:
        cost, grasp = candidates[index]
        # The rest cost more than those found, even if nothing stands in their way.
        if len(best) > rank and cost > best[rank][0]:
            break
        best = sorted([*best, (cost + _INTRUSION_COST * _intrusion(obstacles, grasp), index)])
    return candidates[best[min(rank, len(best) - 1)][1]][1]


def _candidates_across(cloud: FloatArray, preferred_yaw: float) -> list[tuple[float, Grasp]]:
    """Grasps across the object, near its top; preferring no rotation, then a narrow and well aligned side."""
    bottom, top = float(cloud[:, 2].min()), float(cloud[:, 2].max())
    height = max(min(top - _BODY_DEPTH, (top + bottom) / 2 + 0.02), bottom + TIP_DEPTH + 0.004)
    height = max(height, top - PALM_HEIGHT + _CLEARANCE)
    part = cloud[np.abs(cloud[:, 2] - height) < _SLICE]
    if len(part) == 0:
        return []
    yaws = np.deg2rad(np.arange(-90, 90, _YAW_STEP_DEG))
    extents = [(part[:, :2] @ opening_axis(yaw), part[:, :2] @ _side_axis(yaw)) for yaw in yaws]
    widths = np.array([along.max() - along.min() for along, _ in extents])
    candidates: list[tuple[float, Grasp]] = []
    for index, (yaw, width, (along, side)) in enumerate(zip(yaws, widths, extents, strict=True)):
        # A box held askew springs into alignment as the fingers close, and slips out while it does.
        is_aligned = width < widths.take(range(index - 4, index + 5), mode="wrap").min() + 0.0015
        if width > MAX_WIDTH or not is_aligned:
            continue
        middle = (along.max() + along.min()) / 2 * opening_axis(yaw) + (side.max() + side.min()) / 2 * _side_axis(yaw)
        grasp = Grasp(position=np.array([*middle, height]), rotation=gripper_rotation(float(yaw)), kind="across")
        candidates.append((abs(_wrap(yaw - preferred_yaw)) + 15.0 * (width - widths.min()), grasp))
    return candidates


def _candidates_rim(cloud: FloatArray, preferred_yaw: float) -> list[tuple[float, Grasp]]:
    """Grasps of a bowl's or mug's wall, fingers inside and outside; the left side (+y) costs least."""
    top = float(cloud[:, 2].max())
    rim = cloud[cloud[:, 2] > top - 0.008]
    middle = (rim[:, :2].max(axis=0) + rim[:, :2].min(axis=0)) / 2
    candidates: list[tuple[float, Grasp]] = []
    for yaw in np.deg2rad(np.arange(-90, 90, 5)):
        for side in (1.0, -1.0):
            outward = side * opening_axis(yaw)
            radius = float(((rim[:, :2] - middle) @ outward).max())
            for shift, roll in itertools.product((0.0, 0.008, 0.016, 0.022), (_RIM_ROLL, 0.0)):
                position = np.array([*(middle + (radius - 0.006 - shift) * outward), top - _RIM_DEPTH])
                rotation = gripper_rotation(float(yaw), -side * roll)
                cost = (
                    abs(_wrap(yaw - preferred_yaw))
                    + (0.0 if side > 0 else 0.8)
                    + 10.0 * shift
                    + (0.3 if roll == 0 else 0.0)
                )
                candidates.append((cost, Grasp(position=position, rotation=rotation, kind="rim")))
    return candidates


def _intrusion(obstacles: FloatArray, grasp: Grasp) -> float:
    """Return how many obstacle points lie inside the open gripper."""
    local = (obstacles - grasp.position) @ grasp.rotation
    x, y, z = np.abs(local[:, 0]), np.abs(local[:, 1]), local[:, 2]
    in_fingers = (
        (x > FINGER_INNER - _CLEARANCE)
        & (x < FINGER_OUTER + _CLEARANCE)
        & (y < FINGER_HALF_WIDTH + _CLEARANCE)
        & (z < TIP_DEPTH + _CLEARANCE)
        & (z > -HAND_TOP)
    )
    in_hand = (
        (x < HAND_HALF_LENGTH + _CLEARANCE)
        & (y < HAND_HALF_WIDTH + _CLEARANCE)
        & (z < -PALM_HEIGHT + _CLEARANCE)
        & (z > -HAND_TOP)
    )
    return float(np.count_nonzero(in_fingers | in_hand))


def _side_axis(yaw: float) -> FloatArray:
    return gripper_rotation(yaw)[:2, 1]


def _wrap(angle: float) -> float:
    return float((angle + np.pi) % (2 * np.pi) - np.pi)
