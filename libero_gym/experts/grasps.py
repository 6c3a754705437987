"""Where to grasp an object: candidates from the shape of its collision geometry, scored.

The gripper comes from above. Its frame (the end-effector site) has x along the fingers' motion, z along the fingers,
pointing down; `yaw` turns it about the vertical, 0 being the orientation at reset, in which the fingers move along
the world's y axis. All lengths are in metres, angles in rad.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
INTRUSION_COST, _DROP_COST = 0.5, 15.0
_HAND_MARGIN = 0.012
_NUM_ALTERNATIVES = 4
_MAX_LEVER = 0.08
_SIDE_SHIFTS, _PITCHES = (0.0, 0.015, -0.015, 0.03, -0.03), (0.0, 0.3, -0.3)
_FLAT_LENGTH, _FLATNESS, _SPARE = 0.010, 0.0015, 0.006


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


def gripper_rotation(yaw: float, *, roll: float = 0.0, pitch: float = 0.0) -> FloatArray:
    """Return world from gripper, [3, 3], of a gripper that points down.

    Args:
        yaw: rad.
        roll: rad by which it is then turned about its y axis: the fingertips move towards +x of the gripper.
        pitch: rad by which it is then turned about its x axis, along which the fingers move: the fingertips move
            towards +y of the gripper.
    """
    sine, cosine = np.sin(yaw), np.cos(yaw)
    down = np.array([[-sine, cosine, 0.0], [cosine, sine, 0.0], [0.0, 0.0, -1.0]])
    about_y = np.array([[np.cos(roll), 0.0, np.sin(roll)], [0.0, 1.0, 0.0], [-np.sin(roll), 0.0, np.cos(roll)]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(pitch), np.sin(pitch)], [0.0, -np.sin(pitch), np.cos(pitch)]])
    return down @ about_y @ about_x


def tilted(inward: FloatArray, pitch: float) -> FloatArray:
    """Return world from gripper, [3, 3]: fingers side by side, pointing down and `pitch` rad towards `inward`."""
    yaw = float(np.arctan2(inward[1], inward[0]))
    # Of the two equivalent turns of the wrist, the one nearer to the middle of its range.
    if -np.pi / 4 < yaw <= 3 * np.pi / 4:
        return gripper_rotation(yaw, pitch=pitch)
    return gripper_rotation(yaw + (np.pi if yaw < 0 else -np.pi), pitch=-pitch)


def about_vertical(angle: float) -> FloatArray:
    """Return the rotation [3, 3] by `angle` rad about the vertical."""
    sine, cosine = np.sin(angle), np.cos(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


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


def choose_grasp(
    shapes: Shapes,
    body_id: int,
    *,
    ignored_body_ids: tuple[int, ...] = (),
    attempt: int = 0,
    carries: Sequence[FloatArray] = (),
) -> Grasp:
    """Return the best grasp of the object as it stands.

    Args:
        shapes: clouds of the scene.
        body_id: root body of the object.
        ignored_body_ids: bodies that are in nobody's way, such as the robot's.
        attempt: 0 for the best candidate; n for the n-th best that differs, after failures.
        carries: by how much the object may be moved, each [3]; grasps that let the hand get there cost less.

    Raises:
        ValueError: the object is neither narrow enough nor has it a rim.
    """
    cloud = shapes.cloud(body_id)
    candidates = _candidates_across(cloud) or _candidates_rim(cloud)
    weight = shapes.data.subtree_com[body_id, :2]
    if min((_lever(grasp, weight) for _, grasp in candidates), default=np.inf) > _MAX_LEVER:
        candidates = _candidates_handle(cloud, weight) or candidates
    if not candidates:
        name = shapes.model.body(body_id).name
        raise ValueError(f"body {name!r} has no part narrower than {MAX_WIDTH} m and no rim to grasp")
    middle, ignored = cloud[:, :2].mean(axis=0), (body_id, *ignored_body_ids)
    obstacles = shapes.obstacles(ignored, middle, 0.25)
    around = shapes.obstacles(ignored, middle + carries[0][:2], 0.25) if carries else np.zeros((0, 3))
    # The hand is always higher than the gripper's site.
    lowest = min(float(grasp.position[2]) for _, grasp in candidates)
    around = around[around[:, 2] > lowest + min((float(carry[2]) for carry in carries), default=0.0)]

    def total(cost: float, grasp: Grasp) -> float:
        drop = hand_room(around, grasp.position, grasp.rotation, carries) if carries else 0.0
        hits = intrusion(obstacles, grasp.position, grasp.rotation)
        return cost + INTRUSION_COST * hits + _DROP_COST * max(0.0, drop)

    rank = attempt % _NUM_ALTERNATIVES
    scored: list[tuple[float, int]] = []
    for index in sorted(range(len(candidates)), key=lambda index: candidates[index][0]):
        # The rest cost more than the best one, even if nothing stands in their way.
        if rank == 0 and scored and candidates[index][0] > min(scored)[0]:
            break
        scored.append((total(*candidates[index]), index))
    chosen: list[Grasp] = []
    for _, index in sorted(scored):
        grasp = candidates[index][1]
        if all(_differ(grasp, other) for other in chosen):
            chosen.append(grasp)
        if len(chosen) > rank:
            break
    return chosen[-1]


def hand_room(
    obstacles: FloatArray, position: FloatArray, rotation: FloatArray, carries: Sequence[FloatArray]
) -> float:
    """Return by how much the hand has to rise, in metres, to be above all that is below or inside it.

    Args:
        obstacles: float64 [n, 3].
        position: float64 [3], of the gripper's site.
        rotation: float64 [3, 3], world from gripper, pointing more or less down.
        carries: displacements of the gripper, each [3]; the one that needs least counts.
    """
    local = (obstacles - position) @ rotation
    rises: list[float] = []
    for x, y, z in np.array(carries) @ rotation:
        beside = local[local[:, 2] < z - PALM_HEIGHT + _HAND_MARGIN]
        is_under = (np.abs(beside[:, 0] - x) < HAND_HALF_LENGTH + _CLEARANCE) & (
            np.abs(beside[:, 1] - y) < HAND_HALF_WIDTH + _CLEARANCE
        )
        rises.append(float(np.max(z - beside[is_under, 2], initial=PALM_HEIGHT - _HAND_MARGIN)))
    return min(rises) - PALM_HEIGHT + _HAND_MARGIN


def _lever(grasp: Grasp, weight: FloatArray) -> float:
    """Return the horizontal distance between a grasp and the centre of mass [2]."""
    return float(np.linalg.norm(grasp.position[:2] - weight))


def _differ(grasp: Grasp, other: Grasp) -> bool:
    """Return whether two grasps differ by more than 15 mm or 15 degrees."""
    cosine = (float(np.sum(grasp.rotation * other.rotation)) - 1.0) / 2.0
    return float(np.linalg.norm(grasp.position - other.position)) > 0.015 or cosine < np.cos(np.deg2rad(15.0))


def _candidates_across(cloud: FloatArray) -> list[tuple[float, Grasp]]:
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
        centre, middle = (along.max() + along.min()) / 2, (side.max() + side.min()) / 2
        cost = abs(float(yaw)) + 15.0 * (width - widths.min())
        spare = max(0.0, FINGER_INNER - width / 2 - _SPARE)
        for shift, pitch, sideways in itertools.product(_SIDE_SHIFTS, _PITCHES, (0.0, spare, -spare)):
            # Off its middle, only what has flat sides is held.
            local = along[np.abs(side - middle - shift) < _FLAT_LENGTH]
            if shift and (local.size == 0 or float(np.ptp(local)) < width - _FLATNESS):
                continue
            # Off the middle between the fingers, the object slides there as they close.
            spot = (centre + sideways) * opening_axis(yaw) + (middle + shift) * _side_axis(yaw)
            grasp = Grasp(
                position=np.array([*spot, height]), rotation=gripper_rotation(float(yaw), pitch=pitch), kind="across"
            )
            candidates.append((cost + 10.0 * abs(shift) + abs(pitch) + 30.0 * abs(sideways), grasp))
    return candidates


def _candidates_handle(cloud: FloatArray, weight: FloatArray) -> list[tuple[float, Grasp]]:
    """Grasps across a part that sticks out to one side, such as a pan's handle; near the centre of mass is best."""
    offset = cloud[:, :2] - weight
    end = offset[np.argmax(np.linalg.norm(offset, axis=1))]
    length = float(np.linalg.norm(end))
    along, aside = offset @ (end / length), offset @ (np.array([-end[1], end[0]]) / length)
    candidates: list[tuple[float, Grasp]] = []
    for distance in np.arange(length - 0.01, 0.03, -0.01):
        part = np.abs(along - distance) < FINGER_HALF_WIDTH + _CLEARANCE
        if not part.any():
            continue
        if float(np.ptp(aside[part])) > MAX_WIDTH:
            break
        middle = (aside[part].max() + aside[part].min()) / 2
        spot = weight + distance * end / length + middle * np.array([-end[1], end[0]]) / length
        height = max(float(cloud[part, 2].max()) - _RIM_DEPTH, float(cloud[:, 2].min()) + TIP_DEPTH + 0.004)
        # Of the two equivalent turns of the wrist, the one nearer to none.
        yaw = (float(np.arctan2(end[1], end[0])) + np.pi / 2) % np.pi - np.pi / 2
        candidates += [
            (
                10.0 * distance + abs(pitch),
                Grasp(position=np.array([*spot, height]), rotation=gripper_rotation(yaw, pitch=pitch), kind="across"),
            )
            for pitch in _PITCHES
        ]
    return candidates


def _candidates_rim(cloud: FloatArray) -> list[tuple[float, Grasp]]:
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
                rotation = gripper_rotation(float(yaw), roll=-side * roll)
                cost = abs(float(yaw)) + (0.0 if side > 0 else 0.8) + 10.0 * shift + (0.3 if roll == 0 else 0.0)
                candidates.append((cost, Grasp(position=position, rotation=rotation, kind="rim")))
    return candidates


def intrusion(obstacles: FloatArray, position: FloatArray, rotation: FloatArray) -> float:
    """Return how many points of `obstacles` [n, 3] lie inside the open gripper at a pose."""
    local = (obstacles - position) @ rotation
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
