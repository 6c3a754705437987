"""Where an object goes in a container that is open above, such as a basket, a drawer or a caddy's compartment."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from libero_gym.experts.grasps import about_vertical, gripper_rotation, hand_room
from libero_gym.experts.skills import CLOSED, OPEN, Pose, Skill, World, reach, release, rise_until_free, travel
from libero_gym.tasks.scenes import SceneObject, SceneSite

FloatArray = npt.NDArray[np.float64]

# Metres and rad, chosen by trial over the stored initial states.
_WALL_MARGIN, _WALL_SEARCH = 0.006, 0.02
_AMPLE_ROOM, _TIGHT_ROOM = 0.035, 0.030
_ROOM_VALUE = 50.0
_SHIFTS = (0.0, 0.02, -0.02)
_SHIFT_COST = 0.2
_TIP = 1.2


def floor(world: World, site: SceneSite) -> FloatArray:
    """Return the middle of a container's floor, [3]."""
    centre = world.data.site_xpos[site.site_id]
    half_height = float(np.abs(world.data.site_xmat[site.site_id].reshape(3, 3) @ site.size)[2])
    return centre - np.array([0.0, 0.0, half_height])


def fitting_turn(world: World, thing: SceneObject, site: SceneSite) -> tuple[float, bool]:
    """Return the turn about the vertical, in rad, with which an object fits into a container, and if it is tight."""
    cavity = _cavity(world, site)

    def room(angle: float) -> float:
        extents = [_extent(world, thing, axis, angle) for axis, _, _ in cavity]
        return min(high - low - (last - first) for (_, low, high), (first, last) in zip(cavity, extents, strict=True))

    turns = [float(angle) for angle in np.deg2rad(np.arange(-90.0, 91.0, 2.5))]
    best = min(turns, key=lambda angle: abs(angle) - _ROOM_VALUE * min(_AMPLE_ROOM, room(angle)))
    return best, room(best) < _TIGHT_ROOM


def spots_between_walls(world: World, thing: SceneObject, site: SceneSite, angle: float = 0.0) -> list[FloatArray]:
    """Return places on the floor for an object's base, each [3], the middle first.

    Args:
        world: state.
        thing: the object.
        site: the container's region.
        angle: rad by which the object will be turned about the vertical until then.
    """
    # The root body goes to the middle, unless the object were then in a wall.
    choices: list[list[FloatArray]] = []
    for axis, low, high in _cavity(world, site):
        behind, ahead = _extent(world, thing, axis, angle)
        first, last = low + _WALL_MARGIN - behind, high - _WALL_MARGIN - ahead
        middle = float(np.clip(0.0, first, last)) if first < last else (first + last) / 2
        shifted = np.clip(middle + np.array(_SHIFTS), first, last) if first < last else np.array([middle])
        choices.append([shift * axis for shift in dict.fromkeys(shifted.tolist())])
    return [floor(world, site) + first + second for first, second in itertools.product(*choices)]


def free_spot(world: World, thing: SceneObject, site: SceneSite, angle: float) -> Callable[[], FloatArray]:
    """Return where to let go of the held object: between the walls, above the floor, as low as the hand gets.

    Args:
        world: state.
        thing: the object.
        site: the container's region.
        angle: rad by which the object will be turned about the vertical until then.
    """

    def rise(goal: FloatArray, turned: FloatArray) -> float:
        carry = goal - world.base(thing)
        obstacles = world.shapes.obstacles((world.robot_body_id, thing.body_id), (world.eef_pos + carry)[:2], 0.15)
        return max(0.0, hand_room(obstacles, world.eef_pos, turned, [carry]))

    goals = spots_between_walls(world, thing, site, angle)
    turned = about_vertical(angle) @ world.posture
    costs = [rise(goal, turned) + _SHIFT_COST * float(np.linalg.norm(goal - goals[0])) for goal in goals]
    shift = goals[int(np.argmin(costs))] - floor(world, site)

    def spot() -> FloatArray:
        goal = floor(world, site) + shift
        posture = world.leaning((world.eef_pos + goal - world.base(thing), world.posture))
        return goal + np.array([0.0, 0.0, rise(goal, posture)])

    return spot


def is_too_tall(world: World, thing: SceneObject, site: SceneSite) -> bool:
    """Return whether the object's root body would be above the region if it stood on the container's floor."""
    height = float((world.position(thing) - world.base(thing))[2])
    bottom, centre = floor(world, site), world.data.site_xpos[site.site_id]
    return float(bottom[2]) + height > 2 * float(centre[2]) - float(bottom[2])


def lay(world: World, thing: SceneObject, site: SceneSite) -> Skill:
    """Carry the held object to a container, tip it over, lower it and let go; False if it slipped on the way."""
    posture = world.posture
    # Away from the robot, so that the hand is on this side.
    pitch = _TIP if posture[0, 1] > 0 else -_TIP
    rotation = posture @ gripper_rotation(0.0).T @ gripper_rotation(0.0, pitch=pitch)
    turned = (world.shapes.cloud(thing.body_id) - world.position(thing)) @ world.eef_rotation @ rotation.T
    root = rotation @ world.eef_rotation.T @ (world.position(thing) - world.eef_pos)
    goal = floor(world, site) - np.array([0.0, 0.0, float(turned[:, 2].min())])
    rise = rise_until_free(world, thing, (goal - root, rotation))

    def at(height: float) -> Pose:
        return world.eef_pos + floor(world, site) + np.array([0.0, 0.0, height + rise]) - world.base(thing), rotation

    yield from travel(world, lambda: at(0.04), gripper=CLOSED, thing=thing)
    yield from reach(world, lambda: at(0.0), gripper=CLOSED, tolerance=0.006, speed=0.6, timeout=30)
    if not world.is_held(thing):
        return False
    yield from release(world, thing)
    away = world.eef_pos - 0.08 * rotation[:, 2]
    return (yield from reach(world, lambda: (away, rotation), gripper=OPEN, tolerance=0.02, timeout=25))


def _cavity(world: World, site: SceneSite) -> list[tuple[FloatArray, float, float]]:
    """Return for both horizontal axes of a container: axis [3], and where its walls are, from the region's centre."""
    centre, pose = world.data.site_xpos[site.site_id], world.data.site_xmat[site.site_id].reshape(3, 3)
    height = float(np.abs(pose @ site.size)[2])
    parent = world.scene.objects[site.parent or ""]
    offset = world.shapes.cloud(parent.body_id) - centre
    offset = offset[np.abs(offset[:, 2]) < 0.7 * height]
    sides = [(axis, float(half)) for axis, half in zip(pose.T, site.size, strict=True) if abs(axis[2]) < 0.5]
    walls: list[tuple[FloatArray, float, float]] = []
    for (axis, half), (other, other_half) in (sides, sides[::-1]):
        along = (offset @ axis)[np.abs(offset @ other) < 0.5 * other_half]
        along = along[np.abs(along) < half + _WALL_SEARCH]
        low = float(along[along < 0.0].max(initial=-half - _WALL_SEARCH))
        walls.append((axis, low, float(along[along > 0.0].min(initial=half + _WALL_SEARCH))))
    return walls


def _extent(world: World, thing: SceneObject, axis: FloatArray, angle: float) -> tuple[float, float]:
    """Return how far the object, turned by `angle` rad about the vertical, extends from its root body along an axis."""
    along = (world.shapes.cloud(thing.body_id) - world.position(thing)) @ about_vertical(angle).T @ axis
    return float(along.min()), float(along.max())
