# type: ignore
# ruff: noqa: UP018 - Warp takes float(0.0) for a variable that a loop changes, and 0.0 for a constant
"""Constraint rows in the order in which they become known: those of joints with positions, those of contacts in one go.

The rows are those of `mujoco_warp.make_constraint`, which launches a kernel for each kind and three for contacts.
Degrees of freedom with friction have the first rows, as `libero_gym.physics.newton` wants it; limits and contacts
follow as threads come to them. Formulas are MuJoCo Warp's.

Shape legend: N worlds, B bodies, C contacts for which there is space.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import warp as wp
from mujoco_warp._src.constraint import _contact_kbimp, _efc_row
from mujoco_warp._src.support import jac_dof
from mujoco_warp._src.types import ConstraintType, ContactType, vec5

from libero_gym.physics.blocks import sync_block

# Threads of a block that share a contact on a GPU, and threads of a block.
_CONTACT_THREADS = 8
CONTACT_BLOCK_THREADS = 64
# Blocks go on to other contacts: no more of them than a GPU has at work at once.
_BLOCKS_PER_PROCESSOR = 32
_CONSTRAINT = int(ContactType.CONSTRAINT)
_FRICTION_DOF, _LIMIT_JOINT, _FRICTIONLESS, _ELLIPTIC = (
    int(kind)
    for kind in (
        ConstraintType.FRICTION_DOF,
        ConstraintType.LIMIT_JOINT,
        ConstraintType.CONTACT_FRICTIONLESS,
        ConstraintType.CONTACT_ELLIPTIC,
    )
)

wp.set_module_options({"enable_backward": False})


@wp.struct
class ConstraintRows:
    """Rows of constraints: arrays of MuJoCo Warp, and `efc_nnz` [N], how many entries of the Jacobian are taken.

    `friction_dofs` are degrees of freedom with friction, `limited_joints` joints with limits.
    """

    friction_dofs: wp.array(dtype=int)
    limited_joints: wp.array(dtype=int)
    disableflags: int
    timestep: wp.array(dtype=float)
    dof_solref: wp.array(dtype=wp.vec2)
    dof_solimp: wp.array(dtype=vec5)
    dof_frictionloss: wp.array(dtype=float)
    dof_invweight0: wp.array(dtype=float)
    jnt_qposadr: wp.array(dtype=int)
    jnt_dofadr: wp.array(dtype=int)
    jnt_solref: wp.array(dtype=wp.vec2)
    jnt_solimp: wp.array(dtype=vec5)
    jnt_range: wp.array(dtype=wp.vec2)
    jnt_margin: wp.array(dtype=float)
    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    njmax: int
    njmax_nnz: int
    efc_nnz: wp.array(dtype=int)
    nf: wp.array(dtype=int)
    nl: wp.array(dtype=int)
    nefc: wp.array(dtype=int)
    jtdaj_nblock: wp.array(dtype=int)
    jtdaj_adr: wp.array2d(dtype=int)
    jtdaj_nrow: wp.array2d(dtype=int)
    J_rownnz: wp.array2d(dtype=int)
    J_rowadr: wp.array2d(dtype=int)
    J_colind: wp.array3d(dtype=int)
    J: wp.array3d(dtype=float)
    type: wp.array2d(dtype=int)
    id: wp.array2d(dtype=int)
    pos: wp.array2d(dtype=float)
    margin: wp.array2d(dtype=float)
    D: wp.array2d(dtype=float)
    vel: wp.array2d(dtype=float)
    aref: wp.array2d(dtype=float)
    frictionloss: wp.array2d(dtype=float)


@wp.func
def begin_rows(r: ConstraintRows, world: int):
    """Count the rows of joint friction, which are always there if their entries have room."""
    count = wp.min(r.friction_dofs.shape[0], r.njmax_nnz)
    r.nf[world] = count
    r.nl[world] = 0
    r.nefc[world] = count
    r.jtdaj_nblock[world] = 0
    r.efc_nnz[world] = wp.min(r.friction_dofs.shape[0], r.njmax)


@wp.func
def _reserve_entries(r: ConstraintRows, world: int, num_rows: int, row_size: int) -> int:
    """Return where entries of rows that are to be added have room, -1 if they have none."""
    num_rows = wp.min(num_rows, r.njmax - r.nefc[world])
    if num_rows <= 0:
        return 0
    address = wp.atomic_add(r.efc_nnz, world, num_rows * row_size)
    if address + num_rows * row_size > r.njmax_nnz:
        return -1
    return address


@wp.func
def add_joint_row(r: ConstraintRows, world: int, index: int):
    """Write the row of the degree of freedom `friction_dofs[index]`.

    An index beyond them is that of a joint of `limited_joints`, which has a row if it is beyond its range.
    """
    # What both have in common comes last, so that a GPU has its instructions once.
    row = index
    address = index
    sign = float(1.0)
    margin = float(0.0)
    distance = float(0.0)
    frictionloss = float(0.0)
    if index < r.friction_dofs.shape[0]:
        if row >= r.njmax or row >= r.njmax_nnz:
            return
        dof = r.friction_dofs[index]
        id = dof
        kind = wp.static(_FRICTION_DOF)
        solref = r.dof_solref[dof]
        solimp = r.dof_solimp[dof]
        frictionloss = r.dof_frictionloss[dof]
    else:
        id = r.limited_joints[index - r.friction_dofs.shape[0]]
        kind = wp.static(_LIMIT_JOINT)
        limits = r.jnt_range[id]
        margin = r.jnt_margin[id]
        value = r.qpos[world, r.jnt_qposadr[id]]
        below = value - limits[0]
        above = limits[1] - value
        distance = wp.min(below, above) - margin
        if not distance < 0.0:
            return
        address = _reserve_entries(r, world, 1, 1)
        if address < 0:
            return
        wp.atomic_add(r.nl, world, 1)
        row = wp.atomic_add(r.nefc, world, 1)
        if row >= r.njmax:
            return
        block = wp.atomic_add(r.jtdaj_nblock, world, 1)
        r.jtdaj_adr[world, block] = row
        r.jtdaj_nrow[world, block] = 1
        sign = wp.where(below < above, 1.0, -1.0)
        dof = r.jnt_dofadr[id]
        solref = r.jnt_solref[id]
        solimp = r.jnt_solimp[id]
    r.J_rownnz[world, row] = 1
    r.J_rowadr[world, row] = address
    r.J_colind[world, 0, address] = dof
    r.J[world, 0, address] = sign
    _efc_row(
        r.disableflags,
        world,
        r.timestep[0],
        row,
        distance,
        distance,
        r.dof_invweight0[dof],
        solref,
        solimp,
        margin,
        sign * r.qvel[world, dof],
        frictionloss,
        kind,
        id,
        False,
        0.0,
        r.type,
        r.id,
        r.pos,
        r.margin,
        r.D,
        r.vel,
        r.aref,
        r.frictionloss,
    )


@wp.struct
class Contacts:
    """Contacts [C] of all worlds: arrays of MuJoCo Warp, and the degrees of freedom that move two bodies apart.

    Those of bodies a and b are pair_dofs[pair_first[a B + b]] .. pair_dofs[pair_first[a B + b + 1] - 1].
    """

    pair_first: wp.array(dtype=int)
    pair_dofs: wp.array(dtype=int)
    body_parentid: wp.array(dtype=int)
    body_rootid: wp.array(dtype=int)
    body_weldid: wp.array(dtype=int)
    body_invweight0: wp.array(dtype=wp.vec2)
    body_isdofancestor: wp.array2d(dtype=int)
    dof_bodyid: wp.array(dtype=int)
    geom_bodyid: wp.array(dtype=int)
    impratio_invsqrt: wp.array(dtype=float)
    subtree_com: wp.array2d(dtype=wp.vec3)
    cdof: wp.array2d(dtype=wp.spatial_vector)
    nacon: wp.array(dtype=int)
    naconmax: int
    contact_type: wp.array(dtype=int)
    contact_dim: wp.array(dtype=int)
    contact_dist: wp.array(dtype=float)
    contact_includemargin: wp.array(dtype=float)
    contact_worldid: wp.array(dtype=int)
    contact_geom: wp.array(dtype=wp.vec2i)
    contact_pos: wp.array(dtype=wp.vec3)
    contact_frame: wp.array(dtype=wp.mat33)
    contact_friction: wp.array(dtype=vec5)
    contact_solref: wp.array(dtype=wp.vec2)
    contact_solreffriction: wp.array(dtype=wp.vec2)
    contact_solimp: wp.array(dtype=vec5)
    contact_efc_address: wp.array2d(dtype=int)


@wp.func
def _bodies_of(c: Contacts, contact: int) -> wp.vec2i:
    """Bodies that a contact's geoms are fixed to."""
    geoms = c.contact_geom[contact]
    return wp.vec2i(c.body_weldid[c.geom_bodyid[geoms[0]]], c.body_weldid[c.geom_bodyid[geoms[1]]])


@wp.func
def _reserve_rows(c: Contacts, r: ConstraintRows, contact: int):
    """Make room for the rows of a contact that is close enough."""
    is_constraint = c.contact_type[contact] & wp.static(_CONSTRAINT)
    if is_constraint == 0 or not c.contact_dist[contact] - c.contact_includemargin[contact] < 0.0:
        return
    world = c.contact_worldid[contact]
    num_rows = c.contact_dim[contact]
    bodies = _bodies_of(c, contact)
    pair = bodies[0] * c.body_weldid.shape[0] + bodies[1]
    row_size = c.pair_first[pair + 1] - c.pair_first[pair]
    address = _reserve_entries(r, world, num_rows, row_size)
    if address < 0:
        return
    first = wp.atomic_add(r.nefc, world, num_rows)
    if first >= r.njmax:
        return
    block = wp.atomic_add(r.jtdaj_nblock, world, 1)
    r.jtdaj_adr[world, block] = first
    r.jtdaj_nrow[world, block] = wp.min(num_rows, r.njmax - first)
    for k in range(num_rows):
        if first + k < r.njmax:
            c.contact_efc_address[contact, k] = first + k
            r.J_rownnz[world, first + k] = row_size
            r.J_rowadr[world, first + k] = address + k * row_size


@wp.func
def _fill_jacobian(c: Contacts, r: ConstraintRows, contact: int, member: int, num_members: int):
    """Write a member's share of the columns of a contact's rows."""
    world = c.contact_worldid[contact]
    first_row = c.contact_efc_address[contact, 0]
    row_size = r.J_rownnz[world, first_row]
    num_rows = wp.min(c.contact_dim[contact], r.njmax - first_row)
    address = r.J_rowadr[world, first_row]
    bodies = _bodies_of(c, contact)
    first = c.pair_first[bodies[0] * c.body_weldid.shape[0] + bodies[1]]
    pos = c.contact_pos[contact]
    frame = c.contact_frame[contact]
    for k in range(member, row_size, num_members):
        dof = c.pair_dofs[first + k]
        linear_a, angular_a = jac_dof(
            c.body_parentid,
            c.body_rootid,
            c.dof_bodyid,
            c.body_isdofancestor,
            c.subtree_com,
            c.cdof,
            pos,
            bodies[0],
            dof,
            world,
        )
        linear_b, angular_b = jac_dof(
            c.body_parentid,
            c.body_rootid,
            c.dof_bodyid,
            c.body_isdofancestor,
            c.subtree_com,
            c.cdof,
            pos,
            bodies[1],
            dof,
            world,
        )
        linear = frame @ (linear_b - linear_a)
        angular = frame @ (angular_b - angular_a)
        for row in range(num_rows):
            value = wp.where(row < 3, linear[row % 3], angular[row % 3])
            r.J_colind[world, 0, address + row * row_size + k] = dof
            r.J[world, 0, address + row * row_size + k] = value


@wp.func
def _fill_row(c: Contacts, r: ConstraintRows, contact: int, k: int):
    """Write the k-th row of a contact, of which the Jacobian is there."""
    world = c.contact_worldid[contact]
    row = c.contact_efc_address[contact, k]
    row_size = r.J_rownnz[world, row]
    address = r.J_rowadr[world, row]
    speed = float(0.0)
    for i in range(address, address + row_size):
        speed += r.J[world, 0, i] * r.qvel[world, r.J_colind[world, 0, i]]
    geoms = c.contact_geom[contact]
    weight = c.body_invweight0[c.geom_bodyid[geoms[0]]][0] + c.body_invweight0[c.geom_bodyid[geoms[1]]][0]
    margin = c.contact_includemargin[contact]
    distance = c.contact_dist[contact] - margin
    solref = c.contact_solref[contact]
    solimp = c.contact_solimp[contact]
    reference = distance
    if k > 0:
        reference = 0.0
    kind = wp.static(_ELLIPTIC)
    if c.contact_dim[contact] == 1:
        kind = wp.static(_FRICTIONLESS)
    _efc_row(
        r.disableflags,
        world,
        r.timestep[0],
        row,
        reference,
        distance,
        weight,
        solref,
        solimp,
        margin,
        speed,
        0.0,
        kind,
        contact,
        False,
        0.0,
        r.type,
        r.id,
        r.pos,
        r.margin,
        r.D,
        r.vel,
        r.aref,
        r.frictionloss,
    )
    if k > 0:
        scale = c.impratio_invsqrt[0] * c.impratio_invsqrt[0]
        if k > 1:
            friction = c.contact_friction[contact]
            scale *= friction[0] * friction[0] / (friction[k - 1] * friction[k - 1])
        r.D[world, row] = r.D[world, row] / scale
        solreffriction = c.contact_solreffriction[contact]
        if solreffriction[0] != 0.0 or solreffriction[1] != 0.0:
            solref = solreffriction
        damping = _contact_kbimp(r.disableflags, r.timestep[0], solref, solimp, distance, False)[1]
        r.aref[world, row] = -damping * speed


@wp.kernel
def add_contacts(c: Contacts, r: ConstraintRows, num_blocks: int):
    """Write the rows of contacts; dim (blocks, threads of a block), of which eight share a contact."""
    block, lane = wp.tid()
    num_members = wp.min(wp.block_dim(), wp.static(_CONTACT_THREADS))
    num_teams = wp.block_dim() / num_members
    member = lane % num_members
    num_contacts = wp.min(c.nacon[0], c.naconmax)
    for begin in range(block * num_teams, num_contacts, num_blocks * num_teams):
        contact = begin + lane / num_members
        if contact < num_contacts and member == 0:
            _reserve_rows(c, r, contact)
        sync_block()
        has_rows = bool(False)
        if contact < num_contacts:
            has_rows = c.contact_efc_address[contact, 0] >= 0
        if has_rows:
            _fill_jacobian(c, r, contact, member, num_members)
        sync_block()
        if has_rows:
            for k in range(member, c.contact_dim[contact], num_members):
                if c.contact_efc_address[contact, k] >= 0:
                    _fill_row(c, r, contact, k)


def row_tables(mjm: mujoco.MjModel) -> dict[str, Any]:
    """Return the arrays of `ConstraintRows` that MuJoCo Warp does not have."""
    return {
        "friction_dofs": wp.array(np.flatnonzero(mjm.dof_frictionloss > 0), dtype=int),
        "limited_joints": wp.array(np.flatnonzero(mjm.jnt_limited), dtype=int),
    }


def contact_tables(mjm: mujoco.MjModel) -> dict[str, Any]:
    """Return the arrays of `Contacts` that MuJoCo Warp does not have."""
    chains = [_chain(mjm, body) for body in range(mjm.nbody)]
    dofs = [sorted(set(a) ^ set(b), reverse=True) for a in chains for b in chains]
    return {
        "pair_first": wp.array(np.cumsum([0, *map(len, dofs)]), dtype=int),
        "pair_dofs": wp.array([dof for pair in dofs for dof in pair], dtype=int),
    }


def _chain(mjm: mujoco.MjModel, body: int) -> list[int]:
    """Return the degrees of freedom that move a body, if its own parent that it is fixed to has them."""
    chain = []
    body = mjm.body_weldid[body]
    dof = mjm.body_dofadr[body] + mjm.body_dofnum[body] - 1 if mjm.body_dofnum[body] else -1
    while dof >= 0:
        chain.append(int(dof))
        dof = mjm.dof_parentid[dof]
    return chain


def choose_num_blocks(num_contacts: int, device: str) -> int:
    """Return how many blocks of threads go through the contacts, of which there may be `num_contacts`."""
    chosen = wp.get_device(device)
    if chosen.is_cpu:
        return 1
    teams = CONTACT_BLOCK_THREADS // _CONTACT_THREADS
    return max(1, min(-(-num_contacts // teams), _BLOCKS_PER_PROCESSOR * chosen.sm_count))
