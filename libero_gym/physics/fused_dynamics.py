# type: ignore
# ruff: noqa: UP018 - Warp takes float(0.0) for a variable that a loop changes, and 0.0 for a constant
"""A world's kinematics, forces, accelerations and integration in one kernel each.

MuJoCo Warp launches some forty kernels for this, most of which take less time than a GPU needs to begin one. Here the
threads of a block share a world: what does not depend on each other is spread over them, and where one part needs what
another wrote, all wait (`sync_block`). Formulas and their order are MuJoCo Warp's functions of the names given in each
kernel's docstring; sums over what a joint carries are taken over the bodies of its subtree, which follow each other.

What scenes of LIBERO do not have is not computed; `find_unsupported` tells what that is. Forces applied from outside
(`qfrc_applied`, `xfrc_applied`) are not read, and factors of M and moments of actuators, which nothing here needs, are
not kept.

Shape legend: N worlds, B bodies, G geoms, V degrees of freedom, T kinematic trees.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import mujoco
import mujoco_warp
import numpy as np
import warp as wp
from mujoco_warp._src import math
from mujoco_warp._src.types import vec10

from libero_gym.physics.blocks import collect_arrays, sync_block
from libero_gym.physics.fused_constraints import (
    CONTACT_BLOCK_THREADS,
    ConstraintRows,
    Contacts,
    add_contacts,
    add_joint_row,
    begin_rows,
    choose_num_blocks,
    contact_tables,
    row_tables,
)

# Threads of a block. A world has some thirty bodies, fifty degrees of freedom and a hundred geoms, and ten trees.
_PLACE_THREADS = 64
_FORCE_THREADS = 64
_TREE_THREADS = 32
# m; float32 numbers of this size are a centimetre apart.
_FAR = 1.0e5
# Lower corner, and minus upper corner, of a box that none touches, m.
NOWHERE = 2.0e5
_FREE, _SLIDE = int(mujoco_warp.JointType.FREE), int(mujoco_warp.JointType.SLIDE)
_PLANE = int(mujoco_warp.GeomType.PLANE)
_MIN_VALUE = mujoco.mjMINVAL

wp.set_module_options({"enable_backward": False})


@wp.struct
class Placement:
    """What `place_bodies` reads and writes: arrays of MuJoCo Warp, and others that `FusedDynamics` has."""

    body_rootid: wp.array(dtype=int)
    body_weldid: wp.array(dtype=int)
    body_jntnum: wp.array(dtype=int)
    body_jntadr: wp.array(dtype=int)
    body_geomadr: wp.array(dtype=int)
    body_geomnum: wp.array(dtype=int)
    body_subtreenum: wp.array(dtype=int)
    body_branches: wp.array(dtype=int)
    body_branch_start: wp.array(dtype=int)
    body_pos: wp.array2d(dtype=wp.vec3)
    body_quat: wp.array2d(dtype=wp.quat)
    body_ipos: wp.array(dtype=wp.vec3)
    body_iquat: wp.array(dtype=wp.quat)
    body_mass: wp.array(dtype=float)
    body_subtreemass: wp.array(dtype=float)
    body_inertia: wp.array(dtype=wp.vec3)
    jnt_type: wp.array(dtype=int)
    jnt_qposadr: wp.array(dtype=int)
    jnt_dofadr: wp.array(dtype=int)
    jnt_bodyid: wp.array(dtype=int)
    jnt_pos: wp.array(dtype=wp.vec3)
    jnt_axis: wp.array(dtype=wp.vec3)
    qpos0: wp.array(dtype=float)
    geom_type: wp.array(dtype=int)
    geom_bodyid: wp.array(dtype=int)
    geom_pos: wp.array(dtype=wp.vec3)
    geom_quat: wp.array(dtype=wp.quat)
    geom_aabb: wp.array2d(dtype=wp.vec3)
    geom_margin: wp.array(dtype=float)
    geom_gap: wp.array(dtype=float)
    site_bodyid: wp.array(dtype=int)
    site_pos: wp.array(dtype=wp.vec3)
    site_quat: wp.array(dtype=wp.quat)
    qpos: wp.array2d(dtype=float)
    xpos: wp.array2d(dtype=wp.vec3)
    xquat: wp.array2d(dtype=wp.quat)
    xmat: wp.array2d(dtype=wp.mat33)
    xipos: wp.array2d(dtype=wp.vec3)
    ximat: wp.array2d(dtype=wp.mat33)
    xanchor: wp.array2d(dtype=wp.vec3)
    xaxis: wp.array2d(dtype=wp.vec3)
    geom_xpos: wp.array2d(dtype=wp.vec3)
    geom_xmat: wp.array2d(dtype=wp.mat33)
    site_xpos: wp.array2d(dtype=wp.vec3)
    site_xmat: wp.array2d(dtype=wp.mat33)
    subtree_com: wp.array2d(dtype=wp.vec3)
    cinert: wp.array2d(dtype=vec10)
    cdof: wp.array2d(dtype=wp.spatial_vector)
    geom_bounds: wp.array3d(dtype=wp.vec3)
    body_bounds: wp.array3d(dtype=wp.vec3)
    ncollision: wp.array(dtype=int)
    nacon: wp.array(dtype=int)
    num_convex: wp.array(dtype=int)


@wp.func
def _place_branch(p: Placement, world: int, branch: int):
    """Poses of the bodies on the way from the world to one that carries none; ways that share bodies write the same."""
    pos = p.xpos[world, 0]
    quat = p.xquat[world, 0]
    for i in range(p.body_branch_start[branch], p.body_branch_start[branch + 1]):
        body = p.body_branches[i]
        joint = p.body_jntadr[body]
        num_joints = p.body_jntnum[body]
        if num_joints == 1 and p.jnt_type[joint] == wp.static(_FREE):
            adr = p.jnt_qposadr[joint]
            pos = wp.vec3(p.qpos[world, adr], p.qpos[world, adr + 1], p.qpos[world, adr + 2])
            quat = wp.normalize(
                wp.quat(p.qpos[world, adr + 3], p.qpos[world, adr + 4], p.qpos[world, adr + 5], p.qpos[world, adr + 6])
            )
            p.xanchor[world, joint] = pos
            p.xaxis[world, joint] = p.jnt_axis[joint]
        else:
            pos = math.rot_vec_quat(p.body_pos[wp.min(world, p.body_pos.shape[0] - 1), body], quat) + pos
            quat = math.mul_quat(quat, p.body_quat[wp.min(world, p.body_quat.shape[0] - 1), body])
            for j in range(joint, joint + num_joints):
                anchor = math.rot_vec_quat(p.jnt_pos[j], quat) + pos
                axis = math.rot_vec_quat(p.jnt_axis[j], quat)
                adr = p.jnt_qposadr[j]
                if p.jnt_type[j] == wp.static(_SLIDE):
                    pos += axis * (p.qpos[world, adr] - p.qpos0[adr])
                else:
                    quat = math.mul_quat(
                        quat, math.axis_angle_to_quat(p.jnt_axis[j], p.qpos[world, adr] - p.qpos0[adr])
                    )
                    pos = anchor - math.rot_vec_quat(p.jnt_pos[j], quat)
                p.xanchor[world, j] = anchor
                p.xaxis[world, j] = axis
            quat = wp.normalize(quat)
        p.xpos[world, body] = pos
        p.xquat[world, body] = quat


@wp.func
def _bound_geom(p: Placement, world: int, geom: int):
    """Lower and upper corner of the box that another's must touch to collide."""
    if p.geom_type[geom] == wp.static(_PLANE):
        p.geom_bounds[world, geom, 0] = wp.vec3(-wp.static(_FAR))
        p.geom_bounds[world, geom, 1] = wp.vec3(wp.static(_FAR))
        return
    mat = p.geom_xmat[world, geom]
    center = p.geom_xpos[world, geom] + mat @ p.geom_aabb[geom, 0]
    half = p.geom_aabb[geom, 1]
    reach = wp.vec3(p.geom_margin[geom] + p.geom_gap[geom])
    for axis in range(3):
        for side in range(3):
            reach[axis] += wp.abs(mat[axis, side]) * half[side]
    if not wp.length(center) + wp.length(reach) < wp.static(_FAR):
        # The world has diverged. What is so far away would touch everything there, and take other worlds' space for
        # contacts.
        p.geom_bounds[world, geom, 0] = wp.vec3(wp.static(NOWHERE))
        p.geom_bounds[world, geom, 1] = wp.vec3(-wp.static(NOWHERE))
        return
    p.geom_bounds[world, geom, 0] = center - reach
    p.geom_bounds[world, geom, 1] = center + reach


@wp.func
def _place_geom(p: Placement, world: int, geom: int):
    """Pose of a geom unless it stands still, and its box."""
    body = p.geom_bodyid[geom]
    if p.body_weldid[body] != 0:
        quat = p.xquat[world, body]
        p.geom_xpos[world, geom] = p.xpos[world, body] + math.rot_vec_quat(p.geom_pos[geom], quat)
        p.geom_xmat[world, geom] = math.quat_to_mat(math.mul_quat(quat, p.geom_quat[geom]))
    _bound_geom(p, world, geom)


@wp.func
def _bound_body(p: Placement, world: int, body: int):
    """Box around the boxes of a body's geoms."""
    low = wp.vec3(wp.static(NOWHERE))
    high = wp.vec3(-wp.static(NOWHERE))
    first = p.body_geomadr[body]
    for geom in range(first, first + p.body_geomnum[body]):
        low = wp.min(low, p.geom_bounds[world, geom, 0])
        high = wp.max(high, p.geom_bounds[world, geom, 1])
    p.body_bounds[world, body, 0] = low
    p.body_bounds[world, body, 1] = high


@wp.func
def _find_com(p: Placement, world: int, body: int):
    """Centre of mass of what a body carries, itself included."""
    com = wp.vec3(0.0)
    for other in range(body, body + p.body_subtreenum[body]):
        com += p.xipos[world, other] * p.body_mass[other]
    mass = p.body_subtreemass[body]
    if mass < wp.static(_MIN_VALUE):
        p.subtree_com[world, body] = p.xipos[world, body]
    else:
        p.subtree_com[world, body] = com / mass


@wp.func
def _find_inertia(p: Placement, world: int, body: int):
    """Inertia about the centre of mass of the body's tree."""
    mat = p.ximat[world, body]
    inertia = p.body_inertia[body]
    mass = p.body_mass[body]
    dif = p.xipos[world, body] - p.subtree_com[world, p.body_rootid[body]]
    row0 = wp.cw_mul(mat[0], inertia)
    row1 = wp.cw_mul(mat[1], inertia)
    row2 = wp.cw_mul(mat[2], inertia)
    result = vec10()
    result[0] = wp.dot(row0, mat[0]) + mass * (dif[1] * dif[1] + dif[2] * dif[2])
    result[1] = wp.dot(row1, mat[1]) + mass * (dif[0] * dif[0] + dif[2] * dif[2])
    result[2] = wp.dot(row2, mat[2]) + mass * (dif[0] * dif[0] + dif[1] * dif[1])
    result[3] = wp.dot(row0, mat[1]) - mass * dif[0] * dif[1]
    result[4] = wp.dot(row0, mat[2]) - mass * dif[0] * dif[2]
    result[5] = wp.dot(row1, mat[2]) - mass * dif[1] * dif[2]
    result[6] = mass * dif[0]
    result[7] = mass * dif[1]
    result[8] = mass * dif[2]
    result[9] = mass
    p.cinert[world, body] = result


@wp.func
def _find_motions(p: Placement, world: int, joint: int):
    """Directions of a joint's degrees of freedom about the centre of mass of its tree."""
    body = p.jnt_bodyid[joint]
    dof = p.jnt_dofadr[joint]
    kind = p.jnt_type[joint]
    axis = p.xaxis[world, joint]
    offset = p.subtree_com[world, p.body_rootid[body]] - p.xanchor[world, joint]
    if kind == wp.static(_FREE):
        mat = wp.transpose(p.xmat[world, body])
        p.cdof[world, dof] = wp.spatial_vector(0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
        p.cdof[world, dof + 1] = wp.spatial_vector(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        p.cdof[world, dof + 2] = wp.spatial_vector(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
        p.cdof[world, dof + 3] = wp.spatial_vector(mat[0], wp.cross(mat[0], offset))
        p.cdof[world, dof + 4] = wp.spatial_vector(mat[1], wp.cross(mat[1], offset))
        p.cdof[world, dof + 5] = wp.spatial_vector(mat[2], wp.cross(mat[2], offset))
    elif kind == wp.static(_SLIDE):
        p.cdof[world, dof] = wp.spatial_vector(wp.vec3(0.0), axis)
    else:
        p.cdof[world, dof] = wp.spatial_vector(axis, wp.cross(axis, offset))


@wp.kernel
def place_bodies(p: Placement, rows: ConstraintRows):
    """Everything that follows from positions but contacts; a block for each of N worlds.

    `kinematics` and `com_pos`, the boxes of geoms and bodies, and of `make_constraint` the rows of joints. Numbers of
    pairs and contacts begin at 0.
    """
    world, lane = wp.tid()
    lanes = wp.block_dim()
    num_bodies = p.body_rootid.shape[0]
    if lane == 0:
        begin_rows(rows, world)
        if world == 0:
            p.ncollision[0] = 0
            p.nacon[0] = 0
            for i in range(p.num_convex.shape[0]):
                p.num_convex[i] = 0
    sync_block()
    for branch in range(lane, p.body_branch_start.shape[0] - 1, lanes):
        _place_branch(p, world, branch)
    # The last threads have no branch to follow.
    for i in range(lanes - 1 - lane, rows.friction_dofs.shape[0] + rows.limited_joints.shape[0], lanes):
        add_joint_row(rows, world, i)
    sync_block()
    for body in range(lane, num_bodies, lanes):
        quat = p.xquat[world, body]
        p.xmat[world, body] = math.quat_to_mat(quat)
        p.xipos[world, body] = p.xpos[world, body] + math.rot_vec_quat(p.body_ipos[body], quat)
        p.ximat[world, body] = math.quat_to_mat(math.mul_quat(quat, p.body_iquat[body]))
    for geom in range(lane, p.geom_type.shape[0], lanes):
        _place_geom(p, world, geom)
    for site in range(lane, p.site_bodyid.shape[0], lanes):
        body = p.site_bodyid[site]
        quat = p.xquat[world, body]
        p.site_xpos[world, site] = p.xpos[world, body] + math.rot_vec_quat(p.site_pos[site], quat)
        p.site_xmat[world, site] = math.quat_to_mat(math.mul_quat(quat, p.site_quat[site]))
    sync_block()
    for body in range(lane, num_bodies, lanes):
        _find_com(p, world, body)
        _bound_body(p, world, body)
    sync_block()
    for body in range(lane, num_bodies, lanes):
        _find_inertia(p, world, body)
    for joint in range(lane, p.jnt_type.shape[0], lanes):
        _find_motions(p, world, joint)


@wp.struct
class Motion:
    """What `find_forces` reads and writes: arrays of MuJoCo Warp, coefficients of the air's drag, and memory.

    `drag_linear` [B] are coefficients of minus a body's angular and linear velocity, `drag_angular_square` and
    `drag_linear_square` [B] those of minus its velocities' squares along the axes of inertia. `body_force` and
    `body_drag` [N, B] are forces about the centre of mass of the body's tree.
    """

    body_rootid: wp.array(dtype=int)
    body_jntnum: wp.array(dtype=int)
    body_jntadr: wp.array(dtype=int)
    body_dofadr: wp.array(dtype=int)
    body_subtreenum: wp.array(dtype=int)
    body_branches: wp.array(dtype=int)
    body_branch_start: wp.array(dtype=int)
    drag_linear: wp.array(dtype=wp.vec2)
    drag_angular_square: wp.array(dtype=wp.vec3)
    drag_linear_square: wp.array(dtype=wp.vec3)
    jnt_type: wp.array(dtype=int)
    jnt_qposadr: wp.array(dtype=int)
    jnt_dofadr: wp.array(dtype=int)
    dof_bodyid: wp.array(dtype=int)
    dof_parentid: wp.array(dtype=int)
    dof_armature: wp.array(dtype=float)
    dof_damping: wp.array(dtype=float)
    actuator_trnid: wp.array(dtype=wp.vec2i)
    actuator_gear: wp.array(dtype=wp.spatial_vector)
    M_rownnz: wp.array(dtype=int)
    M_rowadr: wp.array(dtype=int)
    gravity: wp.array(dtype=wp.vec3)
    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    xipos: wp.array2d(dtype=wp.vec3)
    ximat: wp.array2d(dtype=wp.mat33)
    subtree_com: wp.array2d(dtype=wp.vec3)
    cinert: wp.array2d(dtype=vec10)
    cdof: wp.array2d(dtype=wp.spatial_vector)
    crb: wp.array2d(dtype=vec10)
    M: wp.array2d(dtype=float)
    actuator_length: wp.array2d(dtype=float)
    actuator_velocity: wp.array2d(dtype=float)
    cvel: wp.array2d(dtype=wp.spatial_vector)
    cdof_dot: wp.array2d(dtype=wp.spatial_vector)
    cacc: wp.array2d(dtype=wp.spatial_vector)
    cfrc_int: wp.array2d(dtype=wp.spatial_vector)
    body_force: wp.array2d(dtype=wp.spatial_vector)
    body_drag: wp.array2d(dtype=wp.spatial_vector)
    subtree_drag: wp.array2d(dtype=wp.spatial_vector)
    qfrc_bias: wp.array2d(dtype=float)
    qfrc_damper: wp.array2d(dtype=float)
    qfrc_fluid: wp.array2d(dtype=float)
    qfrc_passive: wp.array2d(dtype=float)


@wp.func
def _move_branch(m: Motion, world: int, branch: int):
    """Velocities, and accelerations at no `qacc`, of the bodies on the way to one that carries none."""
    velocity = wp.spatial_vector()
    acceleration = wp.spatial_vector(wp.vec3(0.0), -m.gravity[0])
    if branch == 0:
        m.cvel[world, 0] = velocity
        m.cacc[world, 0] = acceleration
    for i in range(m.body_branch_start[branch], m.body_branch_start[branch + 1]):
        body = m.body_branches[i]
        dof = m.body_dofadr[body]
        first = m.body_jntadr[body]
        for joint in range(first, first + m.body_jntnum[body]):
            if m.jnt_type[joint] == wp.static(_FREE):
                for k in range(3):
                    velocity += m.cdof[world, dof + k] * m.qvel[world, dof + k]
                    m.cdof_dot[world, dof + k] = wp.spatial_vector()
                turning = velocity
                for k in range(3, 6):
                    motion = m.cdof[world, dof + k]
                    speed = m.qvel[world, dof + k]
                    change = math.motion_cross(turning, motion)
                    m.cdof_dot[world, dof + k] = change
                    velocity += motion * speed
                    acceleration += change * speed
                dof += 6
            else:
                motion = m.cdof[world, dof]
                speed = m.qvel[world, dof]
                change = math.motion_cross(velocity, motion)
                m.cdof_dot[world, dof] = change
                velocity += motion * speed
                acceleration += change * speed
                dof += 1
        m.cvel[world, body] = velocity
        m.cacc[world, body] = acceleration


@wp.func
def _add_inertias(m: Motion, world: int, body: int):
    """Inertia of what a body carries, itself included."""
    total = m.cinert[world, body]
    if body != 0:
        for other in range(body + 1, body + m.body_subtreenum[body]):
            total += m.cinert[world, other]
    m.crb[world, body] = total


@wp.func
def _fill_inertia_row(m: Motion, world: int, dof: int):
    """Row of the joint-space inertia matrix."""
    adr = m.M_rowadr[dof] + m.M_rownnz[dof] - 1
    motion = m.cdof[world, dof]
    momentum = math.inert_vec(m.crb[world, m.dof_bodyid[dof]], motion)
    m.M[world, adr] = m.dof_armature[dof] + wp.dot(motion, momentum)
    other = m.dof_parentid[dof]
    for _ in range(m.M_rownnz[dof] - 1):
        adr -= 1
        m.M[world, adr] = wp.dot(m.cdof[world, other], momentum)
        other = m.dof_parentid[other]


@wp.func
def _find_body_forces(m: Motion, world: int, body: int):
    """Force that a body's acceleration takes, and drag of the air, about the centre of mass of its tree."""
    if body == 0:
        m.body_force[world, 0] = wp.spatial_vector()
        m.body_drag[world, 0] = wp.spatial_vector()
        return
    inertia = m.cinert[world, body]
    velocity = m.cvel[world, body]
    m.body_force[world, body] = math.inert_vec(inertia, m.cacc[world, body]) + math.motion_cross_force(
        velocity, math.inert_vec(inertia, velocity)
    )
    rot = m.ximat[world, body]
    offset = m.xipos[world, body] - m.subtree_com[world, m.body_rootid[body]]
    angular = wp.spatial_top(velocity)
    linear = wp.spatial_bottom(velocity) - wp.cross(offset, angular)
    local_angular = wp.transpose(rot) @ angular
    local_linear = wp.transpose(rot) @ linear
    drag = m.drag_linear[body]
    torque = -local_angular * drag[0]
    force = -local_linear * drag[1]
    for axis in range(3):
        torque[axis] -= m.drag_angular_square[body][axis] * wp.abs(local_angular[axis]) * local_angular[axis]
        force[axis] -= m.drag_linear_square[body][axis] * wp.abs(local_linear[axis]) * local_linear[axis]
    force = rot @ force
    m.body_drag[world, body] = wp.spatial_vector(rot @ torque + wp.cross(offset, force), force)


@wp.func
def _add_body_forces(m: Motion, world: int, body: int):
    """Forces on what a body carries, itself included."""
    force = m.body_force[world, body]
    drag = m.body_drag[world, body]
    for other in range(body + 1, body + m.body_subtreenum[body]):
        force += m.body_force[world, other]
        drag += m.body_drag[world, other]
    m.cfrc_int[world, body] = force
    m.subtree_drag[world, body] = drag


@wp.kernel
def find_forces(m: Motion):
    """Inertia, and all forces that need no controls; a block for each of N worlds.

    `crb`, `transmission` and `fwd_velocity`.
    """
    world, lane = wp.tid()
    lanes = wp.block_dim()
    num_bodies = m.body_rootid.shape[0]
    num_dofs = m.dof_bodyid.shape[0]
    for branch in range(lane, m.body_branch_start.shape[0] - 1, lanes):
        _move_branch(m, world, branch)
    # The last threads have no branch to follow.
    for body in range(lanes - 1 - lane, num_bodies, lanes):
        _add_inertias(m, world, body)
    for actuator in range(lanes - 1 - lane, m.actuator_gear.shape[0], lanes):
        joint = m.actuator_trnid[actuator][0]
        gear = m.actuator_gear[actuator][0]
        m.actuator_length[world, actuator] = m.qpos[world, m.jnt_qposadr[joint]] * gear
        m.actuator_velocity[world, actuator] = gear * m.qvel[world, m.jnt_dofadr[joint]]
    sync_block()
    for dof in range(lane, num_dofs, lanes):
        _fill_inertia_row(m, world, dof)
    for body in range(lanes - 1 - lane, num_bodies, lanes):
        _find_body_forces(m, world, body)
    sync_block()
    for body in range(lane, num_bodies, lanes):
        _add_body_forces(m, world, body)
    sync_block()
    for dof in range(lane, num_dofs, lanes):
        body = m.dof_bodyid[dof]
        motion = m.cdof[world, dof]
        damper = -m.qvel[world, dof] * m.dof_damping[dof]
        drag = wp.dot(motion, m.subtree_drag[world, body])
        m.qfrc_bias[world, dof] = wp.dot(motion, m.cfrc_int[world, body])
        m.qfrc_damper[world, dof] = damper
        m.qfrc_fluid[world, dof] = drag
        m.qfrc_passive[world, dof] = damper + drag


@wp.struct
class Trees:
    """Where the degrees of freedom of kinematic trees [T] lie, and the entries of M within them.

    `tree_entry` [rows of a lower triangle, T] is -1 where M has none.
    """

    tree_first: wp.array(dtype=int)
    tree_size: wp.array(dtype=int)
    tree_entry: wp.array2d(dtype=int)


@wp.struct
class Actuation:
    """What `find_accelerations` reads and writes: arrays of MuJoCo Warp.

    Actuators dof_first_actuator[v] .. dof_first_actuator[v + 1] - 1 of `dof_actuators` move the degree of freedom v.
    """

    dof_first_actuator: wp.array(dtype=int)
    dof_actuators: wp.array(dtype=int)
    actuator_biastype: wp.array(dtype=int)
    actuator_gainprm: wp.array(dtype=vec10)
    actuator_biasprm: wp.array(dtype=vec10)
    actuator_forcelimited: wp.array(dtype=bool)
    actuator_forcerange: wp.array(dtype=wp.vec2)
    actuator_ctrllimited: wp.array(dtype=bool)
    actuator_ctrlrange: wp.array(dtype=wp.vec2)
    actuator_gear: wp.array(dtype=wp.spatial_vector)
    no_damping: wp.array(dtype=float)
    ctrl: wp.array2d(dtype=float)
    actuator_length: wp.array2d(dtype=float)
    actuator_velocity: wp.array2d(dtype=float)
    actuator_force: wp.array2d(dtype=float)
    M: wp.array2d(dtype=float)
    qfrc_passive: wp.array2d(dtype=float)
    qfrc_bias: wp.array2d(dtype=float)
    qfrc_actuator: wp.array2d(dtype=float)
    qfrc_smooth: wp.array2d(dtype=float)
    qacc_smooth: wp.array2d(dtype=float)


@wp.func
def _actuator_force(a: Actuation, world: int, actuator: int) -> float:
    ctrl = a.ctrl[world, actuator]
    if a.actuator_ctrllimited[actuator]:
        limits = a.actuator_ctrlrange[actuator]
        ctrl = wp.clamp(ctrl, limits[0], limits[1])
    force = a.actuator_gainprm[actuator][0] * ctrl
    if a.actuator_biastype[actuator] == wp.static(int(mujoco_warp.BiasType.AFFINE)):
        bias = a.actuator_biasprm[actuator]
        force += bias[0] + bias[1] * a.actuator_length[world, actuator] + bias[2] * a.actuator_velocity[world, actuator]
    if a.actuator_forcelimited[actuator]:
        limits = a.actuator_forcerange[actuator]
        force = wp.clamp(force, limits[0], limits[1])
    return force


@wp.struct
class Integration:
    """What `integrate` reads and writes: arrays of MuJoCo Warp, `efc_nnz` [N] of `ConstraintRows`, and memory."""

    jnt_type: wp.array(dtype=int)
    jnt_qposadr: wp.array(dtype=int)
    jnt_dofadr: wp.array(dtype=int)
    dof_damping: wp.array(dtype=float)
    timestep: wp.array(dtype=float)
    M: wp.array2d(dtype=float)
    Ma: wp.array2d(dtype=float)
    qacc: wp.array2d(dtype=float)
    damped_qacc: wp.array2d(dtype=float)
    qacc_warmstart: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    qpos: wp.array2d(dtype=float)
    time: wp.array(dtype=float)
    nefc: wp.array(dtype=int)
    njmax: int
    efc_nnz: wp.array(dtype=int)
    njmax_nnz: int
    ncollision: wp.array(dtype=int)
    nacon: wp.array(dtype=int)
    naconmax: int
    overflow: wp.array(dtype=int)


@wp.func
def _move_joint(s: Integration, world: int, joint: int):
    """Position of a joint after the step; `mujoco_warp`'s `_next_position`."""
    step = s.timestep[0]
    adr = s.jnt_qposadr[joint]
    dof = s.jnt_dofadr[joint]
    if s.jnt_type[joint] != wp.static(_FREE):
        s.qpos[world, adr] = s.qpos[world, adr] + step * s.qvel[world, dof]
        return
    for k in range(3):
        s.qpos[world, adr + k] = s.qpos[world, adr + k] + step * s.qvel[world, dof + k]
    quat = math.quat_integrate(
        wp.quat(s.qpos[world, adr + 3], s.qpos[world, adr + 4], s.qpos[world, adr + 5], s.qpos[world, adr + 6]),
        wp.vec3(s.qvel[world, dof + 3], s.qvel[world, dof + 4], s.qvel[world, dof + 5]),
        step,
    )
    for k in range(4):
        s.qpos[world, adr + 3 + k] = quat[k]


@wp.func
def _report_overflow(s: Integration, world: int):
    """What had no room in this step, as MuJoCo Warp reports it."""
    overflow = s.overflow[world]
    if s.nefc[world] > s.njmax:
        overflow = overflow | wp.static(int(mujoco_warp.OverflowType.NEFC))
    if s.efc_nnz[world] > s.njmax_nnz:
        overflow = overflow | wp.static(int(mujoco_warp.OverflowType.NJMAX_NNZ))
    if s.ncollision[0] > s.naconmax:
        overflow = overflow | wp.static(int(mujoco_warp.OverflowType.BROADPHASE))
    if s.nacon[0] > s.naconmax:
        overflow = overflow | wp.static(int(mujoco_warp.OverflowType.NARROWPHASE))
    s.overflow[world] = overflow


@functools.lru_cache
def _make_tree_kernels(max_size: int) -> tuple[Any, Any]:
    """Return the kernels that solve with M, whose trees have at most `max_size` degrees of freedom."""
    code = files(__package__).joinpath("trees.cu").read_text()

    @wp.func_native(snippet=f"#define SIZE {max_size}\n{code}\n#undef SIZE\n")
    def solve_tree(
        tree_first: wp.array(dtype=int),
        tree_size: wp.array(dtype=int),
        tree_entry: wp.array2d(dtype=int),
        M: wp.array2d(dtype=float),
        added: wp.array(dtype=float),
        scale: float,
        right: wp.array2d(dtype=float),
        x: wp.array2d(dtype=float),
        world: int,
        tree: int,
    ): ...

    @wp.kernel(module="unique", enable_backward=False)
    def find_accelerations(a: Actuation, trees: Trees):
        """Actuators' forces and the acceleration without constraints; a block for each of N worlds.

        `fwd_actuation` and `fwd_acceleration`.
        """
        world, lane = wp.tid()
        lanes = wp.block_dim()
        for actuator in range(lane, a.actuator_gear.shape[0], lanes):
            a.actuator_force[world, actuator] = _actuator_force(a, world, actuator)
        sync_block()
        for dof in range(lane, a.qfrc_smooth.shape[1], lanes):
            force = float(0.0)
            for i in range(a.dof_first_actuator[dof], a.dof_first_actuator[dof + 1]):
                actuator = a.dof_actuators[i]
                force += a.actuator_gear[actuator][0] * a.actuator_force[world, actuator]
            a.qfrc_actuator[world, dof] = force
            a.qfrc_smooth[world, dof] = a.qfrc_passive[world, dof] - a.qfrc_bias[world, dof] + force
        sync_block()
        for tree in range(lane, trees.tree_first.shape[0], lanes):
            solve_tree(
                trees.tree_first,
                trees.tree_size,
                trees.tree_entry,
                a.M,
                a.no_damping,
                0.0,
                a.qfrc_smooth,
                a.qacc_smooth,
                world,
                tree,
            )

    @wp.kernel(module="unique", enable_backward=False)
    def integrate(s: Integration, trees: Trees):
        """One step of Euler's method with implicit damping; a block for each of N worlds. `euler`."""
        world, lane = wp.tid()
        lanes = wp.block_dim()
        step = s.timestep[0]
        for tree in range(lane, trees.tree_first.shape[0], lanes):
            solve_tree(
                trees.tree_first,
                trees.tree_size,
                trees.tree_entry,
                s.M,
                s.dof_damping,
                step,
                s.Ma,
                s.damped_qacc,
                world,
                tree,
            )
        if lane == lanes - 1:
            _report_overflow(s, world)
            s.time[world] = s.time[world] + step
        sync_block()
        for dof in range(lane, s.qvel.shape[1], lanes):
            s.qacc_warmstart[world, dof] = s.qacc[world, dof]
            s.qvel[world, dof] = s.qvel[world, dof] + s.damped_qacc[world, dof] * step
        sync_block()
        for joint in range(lane, s.jnt_type.shape[0], lanes):
            _move_joint(s, world, joint)

    return find_accelerations, integrate


class FusedDynamics:
    """Launches the kernels of this module and `fused_constraints`, a block of threads for each world.

    Attributes:
        geom_bounds: [N, G, 2] lower and upper corner of the box that another's must touch for geoms to collide.
        body_bounds: [N, B, 2] those of the boxes around the geoms' boxes of a body.
        num_convex: numbers of contacts that need memory while they are computed, by kinds of shapes.
    """

    def __init__(self, mjm: mujoco.MjModel, model: Any, data: Any, *, device: str) -> None:
        """Allocate what the kernels need, see `libero_gym.physics.warp_stepping.Substep`."""
        self._device, self._num_worlds = device, data.nworld
        shape = (data.nworld, mjm.nbody)
        with wp.ScopedDevice(device):
            self.geom_bounds = wp.zeros((data.nworld, mjm.ngeom, 2), dtype=wp.vec3)
            self.body_bounds = wp.zeros((data.nworld, mjm.nbody, 2), dtype=wp.vec3)
            num_types = len(mujoco_warp.GeomType)
            self.num_convex = wp.zeros(num_types * (num_types + 1) // 2, dtype=int)
            own = {
                "num_convex": self.num_convex,
                "geom_bounds": self.geom_bounds,
                "body_bounds": self.body_bounds,
                "efc_nnz": wp.zeros(data.nworld, dtype=int),
                "body_force": wp.zeros(shape, dtype=wp.spatial_vector),
                "body_drag": wp.zeros(shape, dtype=wp.spatial_vector),
                "subtree_drag": wp.zeros(shape, dtype=wp.spatial_vector),
                "damped_qacc": wp.zeros((data.nworld, mjm.nv), dtype=float),
                "no_damping": wp.zeros(mjm.nv, dtype=float),
                **row_tables(mjm),
                **contact_tables(mjm),
                **_drag_tables(mjm),
                **_actuator_tables(mjm),
                **_tree_tables(mjm),
                **{f"contact_{name}": value for name, value in vars(data.contact).items()},
            }
            sources = (data.efc, data, model, model.opt)
            (
                self._placement,
                self._motion,
                self._trees,
                self._actuation,
                self._integration,
                self._rows,
                self._contacts,
            ) = (
                collect_arrays(struct, own, *sources)
                for struct in (Placement, Motion, Trees, Actuation, Integration, ConstraintRows, Contacts)
            )
        largest = int(np.bincount(mjm.dof_treeid).max())
        self._find_accelerations, self._integrate = _make_tree_kernels(largest)
        self._num_contact_blocks = choose_num_blocks(data.naconmax, device)

    def place_bodies(self) -> None:
        """Compute what follows from positions, and begin the rows of constraints."""
        self._launch(place_bodies, [self._placement, self._rows], _PLACE_THREADS)

    def find_forces(self) -> None:
        """Compute inertia and the forces that need no controls."""
        self._launch(find_forces, [self._motion], _FORCE_THREADS)

    def find_accelerations(self) -> None:
        """Compute actuators' forces and accelerations without constraints."""
        self._launch(self._find_accelerations, [self._actuation, self._trees], _TREE_THREADS)

    def add_contacts(self) -> None:
        """Add the rows of contacts to those of joints."""
        wp.launch_tiled(
            add_contacts,
            dim=[self._num_contact_blocks],
            inputs=[self._contacts, self._rows, self._num_contact_blocks],
            block_dim=CONTACT_BLOCK_THREADS,
            device=self._device,
        )

    def integrate(self) -> None:
        """Take the step."""
        self._launch(self._integrate, [self._integration, self._trees], _TREE_THREADS)

    def _launch(self, kernel: Any, inputs: list[Any], block_dim: int) -> None:
        wp.launch_tiled(kernel, dim=[self._num_worlds], inputs=inputs, block_dim=block_dim, device=self._device)


def _drag_tables(mjm: mujoco.MjModel) -> dict[str, Any]:
    """Return the coefficients of `Motion`: the air's drag on boxes with the bodies' inertia, MuJoCo's model.

    See https://mujoco.readthedocs.io/en/stable/computation/fluid.html#inertia-model.
    """
    density, viscosity = mjm.opt.density, mjm.opt.viscosity
    has_drag = mjm.body_mass >= mujoco.mjMINVAL
    has_drag[0] = False
    mass, inertia = mjm.body_mass[has_drag, None], mjm.body_inertia[has_drag]
    others = inertia.sum(axis=1, keepdims=True) - 2 * inertia
    box = np.sqrt(np.maximum(mujoco.mjMINVAL, others) * 6 / mass)
    diameter = box.mean(axis=1)
    linear, angular_square, linear_square = np.zeros((mjm.nbody, 2)), np.zeros((mjm.nbody, 3)), np.zeros((mjm.nbody, 3))
    linear[has_drag, 0] = np.pi * viscosity * diameter**3
    linear[has_drag, 1] = 3 * np.pi * viscosity * diameter
    angular_square[has_drag] = density / 64 * box * ((box**4).sum(axis=1, keepdims=True) - box**4)
    linear_square[has_drag] = density / 2 * box.prod(axis=1, keepdims=True) / box
    return {
        "drag_linear": wp.array(linear, dtype=wp.vec2),
        "drag_angular_square": wp.array(angular_square, dtype=wp.vec3),
        "drag_linear_square": wp.array(linear_square, dtype=wp.vec3),
    }


def _actuator_tables(mjm: mujoco.MjModel) -> dict[str, Any]:
    """Return which actuators move each degree of freedom, see `Actuation`."""
    moved = mjm.jnt_dofadr[mjm.actuator_trnid[:, 0]]
    return {
        "dof_first_actuator": wp.array(np.searchsorted(np.sort(moved), np.arange(mjm.nv + 1)), dtype=int),
        "dof_actuators": wp.array(np.argsort(moved, kind="stable"), dtype=int),
    }


def _tree_tables(mjm: mujoco.MjModel) -> dict[str, Any]:
    """Return the arrays of `Trees`."""
    size = np.bincount(mjm.dof_treeid)
    first = np.cumsum(size) - size
    largest = int(size.max())
    entry = np.full((largest * (largest + 1) // 2, len(size)), -1)
    rows = np.repeat(np.arange(mjm.nv), mjm.M_rownnz)
    tree = mjm.dof_treeid[rows]
    i, j = rows - first[tree], mjm.M_colind - first[tree]
    entry[i * (i + 1) // 2 + j, tree] = np.arange(len(rows))
    return {
        "tree_first": wp.array(first, dtype=int),
        "tree_size": wp.array(size, dtype=int),
        "tree_entry": wp.array(entry, dtype=int),
    }


def find_unsupported(mjm: mujoco.MjModel, model: Any) -> list[str]:
    """Return the names of what a model has that these kernels do not compute."""
    joint, disable = mujoco.mjtJoint, mujoco.mjtDisableBit
    unused = disable.mjDSBL_SENSOR | disable.mjDSBL_NATIVECCD | disable.mjDSBL_CONTACT | disable.mjDSBL_CONSTRAINT
    moves_joint = mjm.actuator_trntype == mujoco.mjtTrn.mjTRN_JOINT
    moved = mjm.jnt_type[mjm.actuator_trnid[moves_joint, 0]]
    actuators = {
        "actuators of other than hinges and slides": not moves_joint.all()
        or not np.isin(moved, (joint.mjJNT_HINGE, joint.mjJNT_SLIDE)).all(),
        "groups of actuators switched off": mjm.opt.disableactuator,
        "actuators with activations": mjm.na,
        "actuators of another gain than a fixed one": (mjm.actuator_gaintype != mujoco.mjtGain.mjGAIN_FIXED).any(),
        "actuators of another bias than an affine one": (
            mjm.actuator_biastype > int(mujoco.mjtBias.mjBIAS_AFFINE)
        ).any(),
        "actuators with delays": model.nhistory,
        "actuators with armature or damping": np.any(model.actuator_armature.numpy())
        or np.any(model.actuator_damping.numpy())
        or np.any(model.actuator_dampingpoly.numpy()),
        "limits of actuators' forces at joints": mjm.jnt_actfrclimited.any(),
    }
    features = {
        "ball joints": (mjm.jnt_type == joint.mjJNT_BALL).any(),
        "joints of free bodies beside others": (
            mjm.body_jntnum[mjm.jnt_bodyid[mjm.jnt_type == joint.mjJNT_FREE]] > 1
        ).any(),
        "mocap bodies": mjm.nmocap,
        "springs": mjm.jnt_stiffness.any() or np.any(model.jnt_stiffnesspoly.numpy()),
        "damping other than a linear one": np.any(model.dof_dampingpoly.numpy()),
        "compensated gravity": mjm.body_gravcomp.any(),
        "wind": mjm.opt.wind.any(),
        "drag of ellipsoids": mjm.geom_fluid.any(),
        "adhesion": model.flg_adhesion,
        "parts of the physics switched off": int(mjm.opt.disableflags) & ~int(unused),
    }
    return [name for name, value in (actuators | features).items() if value]
