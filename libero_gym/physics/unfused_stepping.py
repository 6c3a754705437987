# type: ignore
# ruff: noqa: SIM110 - Warp has no `all`
"""The launches of a step as MuJoCo Warp's functions make them, to compare the fused kernels with.

Shape legend: N worlds, B bodies, G geoms, Q pairs of bodies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mujoco
import mujoco_warp
import warp as wp
from mujoco_warp._src.collision_convex import convex_narrowphase
from mujoco_warp._src.collision_core import create_collision_context
from mujoco_warp._src.collision_driver import _add_geom_pair, _broadphase_filter

from libero_gym.physics.fused_dynamics import FAR, NOWHERE

_PAIR_THREADS = 128
_WARP_SIZE = 32


class UnfusedLaunches:
    """What `Substep` launches with `is_fused=False`."""

    def __init__(self, mjm: mujoco.MjModel, model: Any, data: Any, *, device: str) -> None:
        """Allocate what a step needs; the arguments are those of `Substep`."""
        self._model, self._data, self._device = model, data, device
        with wp.ScopedDevice(device):
            self._body_first_geom = wp.array(mjm.body_geomadr, dtype=int)
            self._body_num_geoms = wp.array(mjm.body_geomnum, dtype=int)
            self._geom_bounds = wp.zeros((data.nworld, mjm.ngeom, 2), dtype=wp.vec3)
            self._body_bounds = wp.zeros((data.nworld, mjm.nbody, 2), dtype=wp.vec3)
            self._collisions = create_collision_context(data.naconmax)

    def place_bodies(self) -> None:
        """Launch what computes poses."""
        with wp.ScopedDevice(self._device):
            mujoco_warp.kinematics(self._model, self._data)

    def find_contacts(self) -> None:
        """Launch what computes poses and contacts."""
        with wp.ScopedDevice(self._device):
            mujoco_warp.fwd_position(self._model, self._data, factorize=False)

    def run(self, substep: Any, control: Callable[[], None]) -> None:
        """Launch the kernels of a step on the strands of `substep`."""
        model, data = self._model, self._data
        with wp.ScopedDevice(self._device):
            mujoco_warp.kinematics(model, data)
            mujoco_warp.com_pos(model, data)
            with substep._strand(0):
                self._smooth_dynamics(control)
            self._collide(substep)
            mujoco_warp.make_constraint(model, data)
            substep._join(0)
            substep.solver.solve()
            mujoco_warp.euler(model, data)

    def _smooth_dynamics(self, control: Callable[[], None]) -> None:
        """Compute all forces but the constraints'."""
        model, data = self._model, self._data
        mujoco_warp.crb(model, data)
        mujoco_warp.transmission(model, data)
        mujoco_warp.fwd_velocity(model, data)
        control()
        mujoco_warp.fwd_actuation(model, data)
        mujoco_warp.fwd_acceleration(model, data, factorize=True)

    def _collide(self, substep: Any) -> None:
        """Find the contacts."""
        model, data, found = self._model, self._data, self._collisions
        data.ncollision.zero_()
        data.nacon.zero_()
        self._find_pairs(substep)
        for index, pair in enumerate(substep._convex_pairs, start=1):
            with substep._strand(index):
                convex_narrowphase(model, data, found, [pair])
        mujoco_warp.primitive_narrowphase(model, data, found, substep._primitive_pairs)
        for index in range(1, 1 + len(substep._convex_pairs)):
            substep._join(index)

    def _find_pairs(self, substep: Any) -> None:
        model, data, found, pairs = self._model, self._data, self._collisions, substep._pairs
        substep._num_near.zero_()
        wp.launch(
            _bound_geoms,
            dim=self._geom_bounds.shape[:2],
            inputs=[
                model.geom_type,
                model.geom_aabb,
                model.geom_margin,
                model.geom_gap,
                data.geom_xpos,
                data.geom_xmat,
            ],
            outputs=[self._geom_bounds],
        )
        wp.launch(
            _bound_bodies,
            dim=self._body_bounds.shape[:2],
            inputs=[self._body_first_geom, self._body_num_geoms, self._geom_bounds],
            outputs=[self._body_bounds],
        )
        wp.launch(
            _find_near_bodies,
            dim=substep._near.shape,
            inputs=[pairs.bodies, self._body_bounds],
            outputs=[substep._num_near, substep._near],
        )
        sizes = tuple(
            array.shape[0]
            for array in (
                model.geom_aabb,
                model.geom_rbound,
                model.geom_margin,
                model.geom_gap,
                model.pair_margin,
                model.pair_gap,
            )
        )
        wp.launch_tiled(
            _make_broad_phase(model.opt.broadphase_filter, *sizes),
            dim=[data.nworld],
            inputs=[
                model.geom_type,
                model.geom_aabb,
                model.geom_rbound,
                model.geom_margin,
                model.geom_gap,
                model.pair_margin,
                model.pair_gap,
                pairs.first,
                pairs.geoms,
                pairs.ids,
                substep._num_near,
                substep._near,
                self._geom_bounds,
                data.geom_xpos,
                data.geom_xmat,
                data.naconmax,
            ],
            outputs=[data.ncollision, found.collision_pair, found.collision_pairid, found.collision_worldid],
            block_dim=_PAIR_THREADS,
        )


@wp.kernel(enable_backward=False)
def _bound_geoms(
    geom_type: wp.array(dtype=int),
    geom_aabb: wp.array3d(dtype=wp.vec3),
    geom_margin: wp.array2d(dtype=float),
    geom_gap: wp.array2d(dtype=float),
    geom_xpos: wp.array2d(dtype=wp.vec3),
    geom_xmat: wp.array2d(dtype=wp.mat33),
    bounds: wp.array3d(dtype=wp.vec3),
):
    """Write the lower and the upper corner of the box that another's must touch to collide; dim (N, G)."""
    world, geom = wp.tid()
    if geom_type[geom] == wp.static(int(mujoco_warp.GeomType.PLANE)):
        bounds[world, geom, 0] = wp.vec3(-wp.static(FAR))
        bounds[world, geom, 1] = wp.vec3(wp.static(FAR))
        return
    mat = geom_xmat[world, geom]
    center = geom_xpos[world, geom] + mat @ geom_aabb[world % geom_aabb.shape[0], geom, 0]
    half = geom_aabb[world % geom_aabb.shape[0], geom, 1]
    margin = geom_margin[world % geom_margin.shape[0], geom] + geom_gap[world % geom_gap.shape[0], geom]
    reach = wp.vec3(margin)
    for axis in range(3):
        for side in range(3):
            reach[axis] += wp.abs(mat[axis, side]) * half[side]
    if not wp.length(center) + wp.length(reach) < wp.static(FAR):
        # The world has diverged. What is so far away would touch everything there, and take other worlds' space for
        # contacts.
        bounds[world, geom, 0] = wp.vec3(wp.static(NOWHERE))
        bounds[world, geom, 1] = wp.vec3(-wp.static(NOWHERE))
        return
    bounds[world, geom, 0] = center - reach
    bounds[world, geom, 1] = center + reach


@wp.kernel(enable_backward=False)
def _bound_bodies(
    body_first_geom: wp.array(dtype=int),
    body_num_geoms: wp.array(dtype=int),
    geom_bounds: wp.array3d(dtype=wp.vec3),
    bounds: wp.array3d(dtype=wp.vec3),
):
    """Write the box around the boxes of a body's geoms; dim (N, B)."""
    world, body = wp.tid()
    low = wp.vec3(wp.static(NOWHERE))
    high = wp.vec3(-wp.static(NOWHERE))
    first = body_first_geom[body]
    for geom in range(first, first + body_num_geoms[body]):
        low = wp.min(low, geom_bounds[world, geom, 0])
        high = wp.max(high, geom_bounds[world, geom, 1])
    bounds[world, body, 0] = low
    bounds[world, body, 1] = high


@wp.func
def _overlap(bounds: wp.array2d(dtype=wp.vec3), a: int, b: int) -> bool:
    """Whether two boxes touch."""
    low_a = bounds[a, 0]
    high_a = bounds[a, 1]
    low_b = bounds[b, 0]
    high_b = bounds[b, 1]
    for axis in range(3):
        if not (high_a[axis] >= low_b[axis] and high_b[axis] >= low_a[axis]):
            return False
    return True


@wp.kernel(enable_backward=False)
def _find_near_bodies(
    pairs: wp.array(dtype=wp.vec2i),
    bounds: wp.array3d(dtype=wp.vec3),
    num_near: wp.array(dtype=int),
    near: wp.array2d(dtype=int),
):
    """List the pairs of bodies whose boxes overlap; dim (N, Q)."""
    world, pair = wp.tid()
    if _overlap(bounds[world], pairs[pair][0], pairs[pair][1]):
        near[world, wp.atomic_add(num_near, world, 1)] = pair


@functools.lru_cache
def _make_broad_phase(broadphase_filter: int, *sizes: int) -> Any:
    """Return the kernel that finds the pairs of geoms which MuJoCo Warp's filter lets pass."""
    may_collide = _broadphase_filter(broadphase_filter, *sizes)

    @wp.kernel(module="unique", enable_backward=False)
    def find_pairs(
        geom_type: wp.array(dtype=int),
        geom_aabb: wp.array3d(dtype=wp.vec3),
        geom_rbound: wp.array2d(dtype=float),
        geom_margin: wp.array2d(dtype=float),
        geom_gap: wp.array2d(dtype=float),
        pair_margin: wp.array2d(dtype=float),
        pair_gap: wp.array2d(dtype=float),
        first: wp.array(dtype=int),
        pairs: wp.array(dtype=wp.vec2i),
        pair_ids: wp.array(dtype=wp.vec2i),
        num_near: wp.array(dtype=int),
        near: wp.array2d(dtype=int),
        bounds: wp.array3d(dtype=wp.vec3),
        geom_xpos: wp.array2d(dtype=wp.vec3),
        geom_xmat: wp.array2d(dtype=wp.mat33),
        naconmax: int,
        ncollision: wp.array(dtype=int),
        collision_pair: wp.array(dtype=wp.vec2i),
        collision_pairid: wp.array(dtype=wp.vec2i),
        collision_worldid: wp.array(dtype=int),
    ):
        world, lane = wp.tid()
        width = wp.min(wp.block_dim(), wp.static(_WARP_SIZE))
        for index in range(lane / width, num_near[world], wp.block_dim() / width):
            bodies = near[world, index]
            for element in range(first[bodies] + lane % width, first[bodies + 1], width):
                pair = pairs[element]
                pair_id = pair_ids[element]
                if not _overlap(bounds[world], pair[0], pair[1]):
                    continue
                if may_collide(
                    geom_aabb,
                    geom_rbound,
                    geom_margin,
                    geom_gap,
                    pair_margin,
                    pair_gap,
                    geom_xpos,
                    geom_xmat,
                    pair[0],
                    pair[1],
                    pair_id[0],
                    world,
                ):
                    _add_geom_pair(
                        naconmax,
                        pair[0],
                        pair[1],
                        geom_type[pair[0]],
                        geom_type[pair[1]],
                        world,
                        pair_id,
                        ncollision,
                        collision_pair,
                        collision_pairid,
                        collision_worldid,
                    )

    return find_pairs
