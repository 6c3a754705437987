"""Skills for what moves about a joint, and for what is pushed rather than lifted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.experts.grasps import PALM_HEIGHT, TIP_DEPTH, about_vertical, choose_grasp, gripper_rotation, tilted
from libero_gym.experts.skills import CLOSED, OPEN, Command, Skill, World, grip, reach, release, retreat, travel
from libero_gym.tasks.scenes import SceneObject

FloatArray = npt.NDArray[np.float64]

# Metres and rad, chosen by trial over the stored initial states.
_STANDOFF = 0.07
_BAR_THICKNESS = 0.018
_LEAD = 0.05
_PULL, _ARM_RADIUS, _ARM_LENGTH = 0.16, 0.08, 0.35
_TILTS = (0.0, 0.25, 0.5)
_TURN_LEAD = 0.45
_PUSH_RADIUS = 0.03
_PRESS = 0.012
_FLAT = 0.03
_FLOOR_CLEARANCE = 0.006
_PUSH_LEAD = 0.035
_CORNER = 0.02
_LOST = 0.06
_SLANT = 0.6
_TIP_OVERLAP = 0.022
_DOOR_PITCH, _AJAR = 0.9, 0.7


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """A joint of a fixture and the part that it moves.

    Attributes:
        joint_id: id in the model.
        qpos_adr: address in qpos.
        body_id: the part.
    """

    joint_id: int
    qpos_adr: int
    body_id: int


def find_joint(world: World, qpos_adr: int) -> Joint:
    """Return the joint at an address in qpos."""
    joint_id = int(np.flatnonzero(world.model.jnt_qposadr == qpos_adr)[0])
    return Joint(joint_id=joint_id, qpos_adr=qpos_adr, body_id=int(world.model.jnt_bodyid[joint_id]))


def pull_open(world: World, joint: Joint, sign: float, is_done: Callable[[], bool]) -> Skill:
    """Grip a drawer's handle from the front, pull it out, let go and back off.

    Args:
        world: state.
        joint: a slide joint.
        sign: direction of the joint's position in which the drawer opens.
        is_done: tells when it is open enough.
    """
    outward = sign * world.data.xaxis[joint.joint_id]

    def handle() -> FloatArray:
        cloud = world.shapes.cloud(joint.body_id)
        along = cloud @ outward
        bar = cloud[along > along.max() - _BAR_THICKNESS]
        return (bar.max(axis=0) + bar.min(axis=0)) / 2

    rotation = _handle_rotation(world, handle(), outward)
    yield from travel(world, lambda: (handle() + _STANDOFF * outward, rotation), gripper=OPEN)
    if not (
        yield from reach(world, lambda: (handle(), rotation), gripper=OPEN, tolerance=0.008, speed=0.6, timeout=50)
    ):
        yield from _back_off(world, outward)
        return False
    yield from grip(world)
    for _ in range(70):
        position = handle() + _LEAD * outward
        if is_done() or float(np.linalg.norm(handle() - world.eef_pos)) > 0.03:
            break
        yield Command(position=position, rotation=world.leaning((position, rotation)), gripper=CLOSED, speed=0.8)
    yield from release(world)
    yield from _back_off(world, outward)
    return is_done()


def swing_open(world: World, joint: Joint, sign: float, is_done: Callable[[], bool]) -> Skill:
    """Pull a door ajar by its upright handle, then push it open from inside; True if it got far enough.

    Args:
        world: state.
        joint: a hinge with a vertical axis.
        sign: direction of the joint's position in which the door opens.
        is_done: tells when it is open enough.
    """
    axis, anchor = sign * world.data.xaxis[joint.joint_id], world.data.xanchor[joint.joint_id].copy()

    def opening(spot: FloatArray) -> FloatArray:
        return _unit(np.cross(axis, spot - anchor))

    def handle() -> FloatArray:
        cloud = world.shapes.cloud(joint.body_id)
        offset = cloud - cloud.mean(axis=0)
        # A door is wider than it is thick.
        width = np.array([*np.linalg.eigh(offset[:, :2].T @ offset[:, :2])[1][:, -1], 0.0])
        outside = np.cross(width, [0.0, 0.0, 1.0])
        along = cloud @ (outside if outside @ opening(cloud.mean(axis=0)) > 0 else -outside)
        bar = cloud[along > along.max() - _BAR_THICKNESS]
        return (bar.max(axis=0) + bar.min(axis=0)) / 2

    def ajar() -> float:
        return sign * (float(world.data.qpos[joint.qpos_adr]) - start)

    start = float(world.data.qpos[joint.qpos_adr])
    rotation = tilted(-opening(handle()), _DOOR_PITCH)
    yield from travel(world, lambda: (handle() - _STANDOFF * rotation[:, 2], rotation), gripper=OPEN)
    yield from reach(world, lambda: (handle(), rotation), gripper=OPEN, tolerance=0.008, speed=0.6, timeout=50)
    yield from grip(world)
    for _ in range(70):
        if is_done() or ajar() > _AJAR or float(np.linalg.norm(handle() - world.eef_pos)) > 0.05:
            break
        yield Command(position=handle() + _LEAD * opening(handle()), rotation=rotation, gripper=CLOSED, speed=0.8)
    yield from release(world)
    away = world.eef_pos - _STANDOFF * rotation[:, 2]
    yield from reach(world, lambda: (away, rotation), gripper=OPEN, tolerance=0.03, timeout=25)
    if ajar() < _AJAR / 2 or is_done():
        return is_done()
    return (yield from push_part(world, joint, sign, is_done))


def _handle_rotation(world: World, handle: FloatArray, outward: FloatArray) -> FloatArray:
    """Return world from gripper, [3, 3], that points at a drawer's handle, fingers above and below it.

    The hand points downwards as far as the arm behind it has to be above something when the drawer is open.
    """
    down, across = np.array([0.0, 0.0, -1.0]), np.array([-outward[1], outward[0], 0.0])
    pulled = handle + _PULL * outward
    obstacles = world.shapes.obstacles((world.robot_body_id,), pulled[:2], 0.4)

    def rotation(tilt: float) -> FloatArray:
        into = np.sin(tilt) * down - np.cos(tilt) * outward
        # Of the two equivalent turns of the wrist, the one nearer to that at reset.
        return max(
            (np.stack([np.cross(side, into), side, into], axis=1) for side in (across, -across)),
            key=lambda candidate: float(np.sum(candidate * gripper_rotation(0.0))),
        )

    def hits(tilt: float) -> int:
        local = (obstacles - pulled) @ rotation(tilt)
        is_near = np.linalg.norm(local[:, :2], axis=1) < _ARM_RADIUS
        return int(np.count_nonzero(is_near & (local[:, 2] > -_ARM_LENGTH) & (local[:, 2] < -PALM_HEIGHT)))

    return rotation(min(_TILTS, key=lambda tilt: tilt + 0.1 * hits(tilt)))


def turn(world: World, joint: Joint, sign: float, is_done: Callable[[], bool]) -> Skill:
    """Grasp a knob from above and turn it about its vertical axis; True if it turned far enough."""
    grasp = choose_grasp(world.shapes, joint.body_id)
    anchor = world.data.xanchor[joint.joint_id].copy()
    start = float(world.data.qpos[joint.qpos_adr])
    above = grasp.position + np.array([0.0, 0.0, 0.06])
    yield from travel(world, lambda: (above, grasp.rotation), gripper=OPEN)
    yield from reach(world, lambda: (grasp.position, grasp.rotation), gripper=OPEN, speed=0.8, timeout=40)
    yield from grip(world)
    for _ in range(60):
        if is_done():
            return True
        angle = float(world.data.qpos[joint.qpos_adr]) - start + sign * _TURN_LEAD
        turned = about_vertical(angle)
        position = anchor + turned @ (grasp.position - anchor)
        world.posture = turned @ grasp.rotation
        yield Command(position=position, rotation=world.posture, gripper=CLOSED)
    yield from release(world)
    yield from retreat(world)
    return is_done()


def push_part(world: World, joint: Joint, sign: float, is_done: Callable[[], bool]) -> Skill:
    """Push a drawer or a door with closed fingers, such as to shut it; True if it got far enough.

    Args:
        world: state.
        joint: a slide joint, or a hinge with a vertical axis.
        sign: direction of the joint's position in which it shall move.
        is_done: tells when it has moved far enough.
    """
    is_drawer = is_slide(world, joint)
    axis, anchor = world.data.xaxis[joint.joint_id].copy(), world.data.xanchor[joint.joint_id].copy()
    edge = _contact_point(world, joint, sign)  # in the part's frame

    def contact() -> FloatArray:
        return world.data.xpos[joint.body_id] + world.data.xmat[joint.body_id].reshape(3, 3) @ edge

    def ahead() -> FloatArray:
        return sign * axis if is_drawer else _unit(np.cross(sign * axis, contact() - anchor))

    # The hand slants away from what the part moves against.
    into = ahead() if is_drawer else _unit(ahead() + _unit(anchor - contact()))
    pointing = np.sin(_SLANT) * into + np.cos(_SLANT) * np.array([0.0, 0.0, -1.0])
    side = np.cross([0.0, 0.0, 1.0], into)
    # Of the two equivalent turns of the wrist, the one nearer to where it is.
    side = side if side @ world.eef_rotation[:, 0] >= 0 else -side
    rotation = np.stack([side, np.cross(pointing, side), pointing], axis=1)

    def before(gap: float) -> FloatArray:
        return contact() - gap * ahead() - TIP_DEPTH * pointing

    yield from travel(world, lambda: (before(0.07), rotation), gripper=CLOSED, tolerance=0.03)
    for _ in range(90):
        if is_done() or float(np.linalg.norm(before(0.0) - world.eef_pos)) > 0.12:
            break
        position = before(-_LEAD)
        yield Command(position=position, rotation=rotation, gripper=CLOSED, speed=0.8)
    away = world.eef_pos - 0.05 * ahead() + np.array([0.0, 0.0, 0.04])
    yield from reach(world, lambda: (away, rotation), gripper=CLOSED, tolerance=0.03, timeout=15)
    return is_done()


def _contact_point(world: World, joint: Joint, sign: float) -> FloatArray:
    """Return where to push a part, in its own frame: a drawer's handle, or a door's face near its free edge."""
    cloud = world.shapes.cloud(joint.body_id)
    if is_slide(world, joint):
        along = cloud @ (-sign * world.data.xaxis[joint.joint_id])
        bar = cloud[along > along.max() - 0.004]
    else:
        anchor = world.data.xanchor[joint.joint_id]
        radius = np.linalg.norm(cloud[:, :2] - anchor[:2], axis=1)
        bar = cloud[np.abs(radius - 0.8 * radius.max()) < 0.02]
        outside = np.cross(-sign * world.data.xaxis[joint.joint_id], bar.mean(axis=0) - anchor)
        bar = bar[bar @ _unit(outside) > (bar @ _unit(outside)).max() - 0.01]
    centre = (bar.max(axis=0) + bar.min(axis=0)) / 2
    if not is_slide(world, joint):
        # Only the fingertips are beside the door: the hand stays above it.
        centre[2] = bar[:, 2].max() - _TIP_OVERLAP
    pose = world.data.xmat[joint.body_id].reshape(3, 3)
    return pose.T @ (centre - world.data.xpos[joint.body_id])


def push(world: World, thing: SceneObject, goal: FloatArray, is_done: Callable[[], bool]) -> Skill:
    """Push a plate or bowl over the table from within, closed fingers against its rim; True if it got to `goal` [2].

    On the shallow slope of a plate's rim the fingers would slide up, so they press down while they push. From outside,
    whatever stands behind the plate would be in the hand's way.
    """
    extent = np.ptp(world.shapes.cloud(thing.body_id), axis=0)
    is_flat = float(extent[2]) < _FLAT
    radius = min(_PUSH_RADIUS, 0.3 * float(extent[:2].min())) if is_flat else 0.0
    press = -_PRESS if is_flat else _FLOOR_CLEARANCE
    goals = _free_path(world, thing, goal[:2])

    def inside(height: float) -> FloatArray:
        centre = world.position(thing)
        cloud = world.shapes.cloud(thing.body_id)
        spot = centre[:2] + radius * _unit(goals[0] - centre[:2])
        near = cloud[np.linalg.norm(cloud[:, :2] - spot, axis=1) < 0.012]
        return np.array([*spot, float(near[:, 2].max()) + TIP_DEPTH + height])

    low = max(0.0, press)
    rotation = gripper_rotation(0.0)
    yield from travel(world, lambda: (inside(0.05), rotation), gripper=CLOSED)
    yield from reach(world, lambda: (inside(low), rotation), gripper=CLOSED, tolerance=0.01, speed=0.7, timeout=30)
    for _ in range(110):
        rest = goals[0] - world.position(thing)[:2]
        if len(goals) > 1 and float(np.linalg.norm(rest)) < _CORNER:
            goals.pop(0)
        spot = inside(press)
        if is_done() or float(np.linalg.norm(spot[:2] - world.eef_pos[:2])) > _LOST:
            break
        # Always the same force ahead, wherever on the rim the fingers have come to bear; to the side, back in line.
        ahead, offset = _unit(rest), spot[:2] - world.eef_pos[:2]
        aside = offset - (offset @ ahead) * ahead
        position = np.array([*(world.eef_pos[:2] + _PUSH_LEAD * ahead + aside), spot[2]])
        yield Command(position=position, rotation=world.leaning((position, rotation)), gripper=CLOSED, speed=0.7)
    up = world.eef_pos + np.array([0.0, 0.0, 0.08])
    yield from reach(world, lambda: (up, rotation), gripper=CLOSED, tolerance=0.03, timeout=15)
    return is_done()


def _free_path(world: World, thing: SceneObject, goal: FloatArray) -> list[FloatArray]:
    """Return the points [2] to pass: straight to the goal or round one corner, whichever sweeps over least."""
    start = world.position(thing)[:2]
    cloud = world.shapes.cloud(thing.body_id)
    width = float(np.linalg.norm(cloud[:, :2] - start, axis=1).max())
    obstacles = world.shapes.obstacles((world.robot_body_id, thing.body_id), (start + goal) / 2, 0.4)
    low = float(cloud[:, 2].min())
    obstacles = obstacles[(obstacles[:, 2] > low + 0.005) & (obstacles[:, 2] < low + 0.05), :2]
    paths = [[goal], [np.array([start[0], goal[1]]), goal], [np.array([goal[0], start[1]]), goal]]

    def hits(path: list[FloatArray]) -> int:
        is_hit = np.zeros(len(obstacles), dtype=bool)
        for begin, end in itertools.pairwise([start, *path]):
            length = float(np.linalg.norm(end - begin))
            along = np.clip((obstacles - begin) @ _unit(end - begin), 0.0, length)
            is_hit |= np.linalg.norm(obstacles - begin - along[:, None] * _unit(end - begin), axis=1) < width
        return int(is_hit.sum())

    return min(paths, key=hits)


def _back_off(world: World, outward: FloatArray) -> Skill:
    """Leave a handle horizontally."""
    away, rotation = world.eef_pos + _STANDOFF * outward, world.posture
    return (yield from reach(world, lambda: (away, rotation), gripper=OPEN, tolerance=0.03, timeout=25))


def _unit(vector: FloatArray) -> FloatArray:
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


def is_slide(world: World, joint: Joint) -> bool:
    """Return whether the joint slides (a drawer) rather than turns (a door, a knob)."""
    return int(world.model.jnt_type[joint.joint_id]) == mujoco.mjtJoint.mjJNT_SLIDE
