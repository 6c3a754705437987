"""Pairs of meshes that no position of the joints between them lets touch: not worth a test in every time step.

A robot's links are meshes of hundreds to thousands of corners, and neighbours but one are close to each other all the
time without ever touching: Panda's shoulder passes its base at a distance of a millimetre. That they never do is proven
here once, over the whole range of the joints between them: moving a joint by an angle moves no point further than the
angle times its distance from the axis, so that a distance measured at one position bounds those around it.

    distance(q) >= distance(centre) - sum over joints of reach * |q - centre|

Ranges are halved where this bound does not yet exclude contact (branch and bound).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import mujoco
import numpy as np
import numpy.typing as npt

# Joint limits are springs: a joint may go beyond by so much, rad or m.
_BEYOND_LIMIT = {mujoco.mjtJoint.mjJNT_HINGE: 0.1, mujoco.mjtJoint.mjJNT_SLIDE: 0.005}
# Measuring a distance takes some 4 us.
_MAX_MEASUREMENTS = 10_000
_MAX_JOINTS = 2
_FAR_M = 1.0

_proven: dict[bytes, bool] = {}


def find_clear_pairs(
    model: mujoco.MjModel, pairs: Iterable[tuple[int, int]], placed_bodies: Collection[int] = ()
) -> set[tuple[int, int]]:
    """Return those of some pairs of geoms that are meshes and can be proven never to touch.

    Pairs between which there are more than two joints, or joints without limits, are not among them, nor are pairs
    whose proof would take longer than some hundredths of a second. What is found is remembered, so that scenes share
    their robot's.

    Args:
        model: the model.
        pairs: ids of two geoms each.
        placed_bodies: bodies whose poses in their parents are not the model's but drawn for each episode; what they
            move against each other or against the rest is not proven.
    """
    placed = set(placed_bodies)
    return {pair for pair in pairs if _is_clear(model, *pair, placed)}


def _is_clear(model: mujoco.MjModel, geom_a: int, geom_b: int, placed: set[int]) -> bool:
    is_mesh = model.geom_type[[geom_a, geom_b]] == mujoco.mjtGeom.mjGEOM_MESH
    if not is_mesh.all():
        return False
    paths = [_path_to_world(model, int(model.geom_bodyid[geom])) for geom in (geom_a, geom_b)]
    if placed & (set(paths[0]) ^ set(paths[1])):
        return False
    joints = _joints_between(model, geom_a, geom_b)
    if joints is None:
        return False
    key = _fingerprint(model, geom_a, geom_b, list(joints))
    if key not in _proven:
        _proven[key] = _prove(model, geom_a, geom_b, joints)
    return _proven[key]


def _prove(model: mujoco.MjModel, geom_a: int, geom_b: int, joints: dict[int, float]) -> bool:
    """Return whether the geoms keep away from each other wherever `joints` are; their values are reaches in m."""
    model = copy.copy(model)
    # MuJoCo's other algorithm measures too short a distance between shapes that do not touch.
    model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_NATIVECCD)
    data = mujoco.MjData(model)
    margin = float(model.geom_margin[[geom_a, geom_b]].sum() + model.geom_gap[[geom_a, geom_b]].sum())
    ids = np.array(list(joints))
    addresses = model.jnt_qposadr[ids]
    reaches = np.array([joints[joint] if _is_hinge(model, joint) else 1.0 for joint in ids])
    beyond = np.array([_BEYOND_LIMIT[mujoco.mjtJoint(model.jnt_type[joint])] for joint in ids])
    low, high = model.jnt_range[ids, 0] - beyond, model.jnt_range[ids, 1] + beyond
    boxes = [((low + high) / 2, (high - low) / 2)]
    for _ in range(_MAX_MEASUREMENTS):
        if not boxes:
            return True
        centre, half = boxes.pop()
        data.qpos[:] = model.qpos0
        data.qpos[addresses] = centre
        mujoco.mj_kinematics(model, data)
        distance = mujoco.mj_geomDistance(model, data, geom_a, geom_b, _FAR_M, None) - margin
        moved = reaches * half
        if distance > moved.sum():
            continue
        if distance <= 0:
            return False
        widest = int(np.argmax(moved))
        half = half.copy()
        half[widest] /= 2
        step = np.zeros_like(half)
        step[widest] = half[widest]
        boxes += [(centre - step, half), (centre + step, half)]
    return False


def _joints_between(model: mujoco.MjModel, geom_a: int, geom_b: int) -> dict[int, float] | None:
    """Return the joints that move one geom against the other, each with how far from its axis points can be, m.

    None where they are too many, or not all of them hinges and slides with limits, or where there are none.
    """
    paths = [_path_to_world(model, int(model.geom_bodyid[geom])) for geom in (geom_a, geom_b)]
    common = set(paths[0]) & set(paths[1])
    joints: dict[int, float] = {}
    for geom, path in zip((geom_a, geom_b), paths, strict=True):
        reach = float(np.linalg.norm(model.geom_pos[geom]) + model.geom_rbound[geom])
        for body in path:
            if body in common:
                break
            reach += _shift(model, body)
            for joint in _joints_of(model, body):
                if mujoco.mjtJoint(model.jnt_type[joint]) not in _BEYOND_LIMIT or not model.jnt_limited[joint]:
                    return None
                joints[joint] = reach + float(np.linalg.norm(model.jnt_pos[joint]))
            reach += float(np.linalg.norm(model.body_pos[body]))
    return joints if 0 < len(joints) <= _MAX_JOINTS else None


def _path_to_world(model: mujoco.MjModel, body: int) -> list[int]:
    path = [body]
    while path[-1]:
        path.append(int(model.body_parentid[path[-1]]))
    return path


def _joints_of(model: mujoco.MjModel, body: int) -> range:
    first = int(model.body_jntadr[body])
    return range(first, first + int(model.body_jntnum[body]))


def _shift(model: mujoco.MjModel, body: int) -> float:
    """Return how far at most a body's joints move its origin away from where it is in its parent, m."""
    shift = 0.0
    for joint in _joints_of(model, body):
        if _is_hinge(model, joint):
            shift += 2 * float(np.linalg.norm(model.jnt_pos[joint]))
        else:
            away = np.abs(model.jnt_range[joint] - model.qpos0[model.jnt_qposadr[joint]]).max()
            shift += float(away) + _BEYOND_LIMIT[mujoco.mjtJoint.mjJNT_SLIDE]
    return shift


def _is_hinge(model: mujoco.MjModel, joint: int) -> bool:
    return model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE


def _fingerprint(model: mujoco.MjModel, geom_a: int, geom_b: int, joints: list[int]) -> bytes:
    """Return what the distances between two geoms depend on."""
    parts: list[npt.NDArray[np.generic]] = [
        model.jnt_type[joints],
        model.jnt_range[joints],
        model.jnt_axis[joints],
        model.jnt_pos[joints],
        model.qpos0[model.jnt_qposadr[joints]],
    ]
    paths = [_path_to_world(model, int(model.geom_bodyid[geom])) for geom in (geom_a, geom_b)]
    for geom, path, other in zip((geom_a, geom_b), paths, reversed(paths), strict=True):
        mesh = int(model.geom_dataid[geom])
        first = int(model.mesh_vertadr[mesh])
        bodies = [body for body in path if body not in other]
        parts += [
            model.mesh_vert[first : first + int(model.mesh_vertnum[mesh])],
            model.geom_pos[geom],
            model.geom_quat[geom],
            model.geom_margin[[geom]],
            model.geom_gap[[geom]],
            model.body_pos[bodies],
            model.body_quat[bodies],
        ]
    return b"".join(str(part.shape).encode() + np.ascontiguousarray(part).tobytes() for part in parts)
