"""Skills for compartments with a roof: an object goes in from the front, held at its rear end by a tilted gripper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from libero_gym.experts.articulation import Joint, find_joint
from libero_gym.experts.grasps import (
    HAND_HALF_LENGTH,
    HAND_HALF_WIDTH,
    INTRUSION_COST,
    MAX_WIDTH,
    PALM_HEIGHT,
    TIP_DEPTH,
    Grasp,
    gripper_rotation,
    intrusion,
    tilted,
)
from libero_gym.experts.skills import (
    CLOSED,
    OPEN,
    Pose,
    Skill,
    World,
    grip,
    pick,
    reach,
    release,
    rise_until_free,
    travel,
)
from libero_gym.tasks.scenes import SceneObject, SceneSite

FloatArray = npt.NDArray[np.float64]

# Metres and rad, chosen by trial over the stored initial states.
_ROOM_AHEAD = 0.3
_ROOF_POINTS = 3
_SILL = 0.012
_MARGIN = 0.015
_FRONT_MARGIN = 0.004
_STANDOFF = 0.05
_DOOR_MARGIN, _DOOR_NEAR = 0.01, 0.08
_LIFT = 0.05
_HALF_FINGER = 0.006
_TIP = 1.3
_UP = np.array([0.0, 0.0, 1.0])
_TAPER = 0.005
_PITCHES = (0.9, 1.1, 0.6, 0.3, 0.0)
_OFFSETS = np.arange(0.008, 0.16, 0.008)


@dataclass(frozen=True, kw_only=True, eq=False)
class Opening:
    """The open front of a compartment.

    Attributes:
        inward: float64 [3], horizontal direction in which things enter.
        across: float64 [3], horizontal, at right angles to it.
        front: coordinate along `inward` of the foremost surface.
        middle: coordinate along `across` of the middle between the walls.
        floor: height of the floor.
        ceiling: height of the roof.
        reach: coordinates along `inward` between which an object's root body is inside: the first, and the middle.
    """

    inward: FloatArray
    across: FloatArray
    front: float
    middle: float
    floor: float
    ceiling: float
    reach: tuple[float, float]


def find_opening(world: World, site: SceneSite) -> Opening | None:
    """Return the front through which things enter a region; None if nothing is above it, or if it is a drawer's."""
    if site.parent is None or site.joint_qpos_adr:
        return None
    parent = world.scene.objects[site.parent]
    cloud = world.shapes.cloud(parent.body_id)
    centre, pose = world.data.site_xpos[site.site_id], world.data.site_xmat[site.site_id].reshape(3, 3)
    extent = np.abs(pose @ site.size)
    offset = cloud - centre
    is_roof = np.all(np.abs(offset[:, :2]) < 0.5 * extent[:2], axis=1) & (offset[:, 2] > 0.0)
    if np.count_nonzero(is_roof) < _ROOF_POINTS:
        return None
    is_level = np.abs(offset[:, 2]) < 0.6 * extent[2]

    def blocking(inward: FloatArray) -> int:
        depth, aside = offset @ inward, offset @ _turned(inward)
        return int(np.count_nonzero(is_level & (depth < 0.0) & (depth > -_ROOM_AHEAD) & (np.abs(aside) < 0.05)))

    horizontal = [axis for axis in pose.T if abs(axis[2]) < 0.5]
    inward = min((sign * axis for axis, sign in itertools.product(horizontal, (1.0, -1.0))), key=blocking)
    across = _turned(inward)
    depth, aside = offset @ inward, offset @ across
    is_inside = is_level & (np.abs(depth) < 0.8 * float(np.abs(inward) @ extent))
    walls = aside[is_inside]
    left, right = walls[walls < 0.0].max(initial=-0.2), walls[walls > 0.0].min(initial=0.2)
    is_floor = np.all(np.abs(offset[:, :2]) < 0.5 * extent[:2], axis=1) & (offset[:, 2] < 0.0)
    floor = cloud[is_floor, 2].max() if is_floor.any() else cloud[:, 2].min() - 0.02
    half_depth = float(np.abs(inward) @ extent)
    start = float(centre @ inward)
    middle = float(left + right) / 2
    near = np.abs(aside - middle) < HAND_HALF_LENGTH
    return Opening(
        inward=inward,
        across=across,
        front=start + float(depth[near & (depth > -half_depth - 0.05)].min()),
        middle=float(centre @ across) + middle,
        floor=float(floor),
        ceiling=float(cloud[is_roof, 2].min()),
        reach=(start - half_depth, start),
    )


def blocking_door(world: World, site: SceneSite, opening: Opening) -> Joint | None:
    """Return the hinge of a door of the compartment's that stands where the hand has to be; None if none does."""
    parent = world.scene.objects[site.parent or ""]
    for address in parent.joint_qpos_adr:
        joint = find_joint(world, address)
        cloud = world.shapes.cloud(joint.body_id)
        ahead, aside = cloud @ opening.inward - opening.front, cloud @ opening.across - opening.middle
        if np.any((np.abs(aside) < HAND_HALF_LENGTH + _DOOR_MARGIN) & (ahead < -_DOOR_NEAR) & (ahead > -_ROOM_AHEAD)):
            return joint
    return None


def insert(world: World, thing: SceneObject, opening: Opening, *, attempt: int = 0) -> Skill:
    """Grasp an object, slide it into the compartment and let go; False if that did not work.

    It is held at its rear end or, if it is too wide there or too tall for the compartment, from above, and tipped over
    on the way: bottom first.
    """
    height = float(np.ptp(world.shapes.cloud(thing.body_id)[:, 2]))
    fits = height + 2 * _SILL < opening.ceiling - opening.floor
    grasp = _rear_grasp(world, thing, opening) if fits else None
    if grasp is None:
        rotation = tipped(opening.inward)
        is_held = yield from pick(world, thing, attempt=attempt)
    else:
        rotation = grasp.rotation
        is_held = yield from _pick_at(world, thing, grasp)
    if not is_held:
        return False
    inward, across = opening.inward, opening.across
    turned = (world.shapes.cloud(thing.body_id) - world.position(thing)) @ world.eef_rotation @ rotation.T
    root = rotation @ world.eef_rotation.T @ (world.position(thing) - world.eef_pos)
    first, middle = opening.reach
    depth = float(
        np.clip(_free_depth(opening, rotation, float(root @ inward)), first + _MARGIN, max(middle, first + _MARGIN))
    )
    inside = depth * inward + opening.middle * across + (opening.floor - float(turned[:, 2].min())) * _UP
    rise = 0.0 if grasp is not None else rise_until_free(world, thing, (inside - root, rotation))

    def at(along: float, height: float) -> Pose:
        """Return the gripper's pose that puts the object's root body there."""
        base = world.base(thing)
        shift = (along - base @ inward) * inward + (opening.middle - base @ across) * across
        return world.eef_pos + shift + np.array([0.0, 0.0, opening.floor + height + rise - base[2]]), rotation

    outside = opening.front - float((turned @ inward).max()) - 0.02
    yield from travel(world, lambda: at(outside, _SILL), gripper=CLOSED, thing=thing, tolerance=0.015)
    yield from reach(world, lambda: at(depth, _SILL), gripper=CLOSED, tolerance=0.008, speed=0.7, timeout=60)
    yield from reach(world, lambda: at(depth, -0.003), gripper=CLOSED, tolerance=0.006, speed=0.5, timeout=12)
    yield from release(world)
    away = world.eef_pos - 0.08 * rotation[:, 2]
    yield from reach(world, lambda: (away, rotation), gripper=OPEN, tolerance=0.02, timeout=25)
    return True


def _pick_at(world: World, thing: SceneObject, grasp: Grasp) -> Skill:
    """Take hold of the object along the fingers' direction and lift it a little; True if it is held afterwards."""
    offset = grasp.position - world.position(thing)

    def pose(gap: float) -> Pose:
        return world.position(thing) + offset - gap * grasp.rotation[:, 2], grasp.rotation

    yield from travel(world, lambda: pose(_STANDOFF), gripper=OPEN, thing=thing)
    yield from reach(world, lambda: pose(0.0), gripper=OPEN, tolerance=0.006, speed=0.8, timeout=40)
    yield from grip(world)
    lifted = world.eef_pos + np.array([0.0, 0.0, _LIFT])
    yield from reach(world, lambda: (lifted, grasp.rotation), gripper=CLOSED, tolerance=0.03, timeout=25)
    return world.is_held(thing)


def _rear_grasp(world: World, thing: SceneObject, opening: Opening) -> Grasp | None:
    """Return the best grasp across the end of the object that enters last; None if it is too wide there."""
    cloud, root = world.shapes.cloud(thing.body_id), world.position(thing)
    obstacles = world.shapes.obstacles((thing.body_id, world.robot_body_id), cloud[:, :2].mean(axis=0), 0.35)
    along, aside = cloud @ opening.inward, cloud @ opening.across
    wanted = opening.front + float(root @ opening.inward - along.min()) + 0.01
    best: tuple[float, Grasp | None] = (np.inf, None)
    slices = [np.abs(along - along.min() - back) < _HALF_FINGER for back in _OFFSETS]
    widths = [float(np.ptp(aside[part])) if part.any() else np.inf for part in slices]
    for back, part, width, next_width in zip(_OFFSETS, slices, widths, widths[1:], strict=False):
        if width > MAX_WIDTH:
            break
        # The pads do not hold a corner.
        if abs(next_width - width) > _TAPER:
            continue
        centre = (aside[part].max() + aside[part].min()) / 2
        top = float(cloud[part, 2].max())
        position = (along.min() + back) * opening.inward + centre * opening.across
        position[2] = max(top - 0.018, float(cloud[:, 2].min()) + TIP_DEPTH + 0.005)
        for pitch in _PITCHES:
            rotation = tilted(opening.inward, pitch)
            ahead = float((root - position) @ opening.inward)
            missing = max(0.0, min(wanted, opening.reach[1]) - _free_depth(opening, rotation, ahead))
            cost = (
                0.3 * pitch + 2.0 * ahead + 20.0 * missing + INTRUSION_COST * intrusion(obstacles, position, rotation)
            )
            if cost < best[0]:
                best = (cost, Grasp(position=position, rotation=rotation, kind="rear"))
    return best[1]


def _free_depth(opening: Opening, rotation: FloatArray, root_ahead: float) -> float:
    """Return how deep the object's root body gets before the hand meets the front, a coordinate along `inward`.

    Args:
        opening: where it goes.
        rotation: float64 [3, 3], world from gripper.
        root_ahead: how far the root is ahead of the gripper's site.
    """
    corners = np.array(
        [
            [x, y, -PALM_HEIGHT]
            for x in (-HAND_HALF_LENGTH, HAND_HALF_LENGTH)
            for y in (-HAND_HALF_WIDTH, HAND_HALF_WIDTH)
        ]
    )
    hand = float((corners @ rotation.T @ opening.inward).max())
    return opening.front - _FRONT_MARGIN - hand + root_ahead


def tipped(inward: FloatArray) -> FloatArray:
    """Return world from gripper, [3, 3]: fingers one above the other, pointing towards `inward` and a little down."""
    yaw = float(np.arctan2(-inward[0], inward[1]))
    if abs(yaw) <= np.pi / 2:
        return gripper_rotation(yaw, roll=_TIP)
    return gripper_rotation(yaw + (np.pi if yaw < 0 else -np.pi), roll=-_TIP)


def _turned(direction: FloatArray) -> FloatArray:
    """Return a horizontal direction turned by 90 degrees."""
    return np.array([-direction[1], direction[0], 0.0])
