# type: ignore
# ruff: noqa: SIM110 - Warp has no `all`
"""A step of MuJoCo Warp's physics in another order of launches: what does not wait for each other runs side by side.

`mujoco_warp.step` launches some hundred kernels one after another, and most of them are too small for a GPU: they take
as long as their slowest thread. Here the step falls into strands, which are streams of the captured graph:

    kinematics -> broad phase -> contacts of each pair of shapes (side by side) -> constraints -> solver -> integration
               -> inertia, velocities, bias, controller, actuators, smooth acceleration ------^

The broad phase compares boxes along the world's axes, first those of bodies, then those of their shapes, before MuJoCo
Warp's own test of a pair, which reads and computes many times as much. Meshes that can be proven never to touch are not
compared at all; see `libero_gym.physics.clearance`. The solver is `libero_gym.physics.newton`. Results are those of
`mujoco_warp.step` but for the order in which contacts are found, the rounding of sums, and where within its tolerance
the solver stops. Energy and sensors are not computed.

Shape legend: N worlds, B bodies, G geoms, Q pairs of bodies and P pairs of geoms that can collide.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import mujoco
import mujoco_warp
import numpy as np
import warp as wp
from mujoco_warp._src.collision_convex import convex_narrowphase
from mujoco_warp._src.collision_core import create_collision_context
from mujoco_warp._src.collision_driver import MJ_COLLISION_TABLE, _add_geom_pair, _broadphase_filter
from mujoco_warp._src.math import upper_trid_index
from mujoco_warp._src.types import CollisionType

from libero_gym.physics.clearance import find_clear_pairs
from libero_gym.physics.newton import NewtonSolver

# Threads that go through the pairs of a world on a GPU, a warp for each pair of bodies.
_PAIR_THREADS = 128
_WARP_SIZE = 32
# m; float32 numbers of this size are a centimetre apart.
_FAR = 1.0e5
# Lower corner, and minus upper corner, of a box that none touches, m.
_NOWHERE = 2.0e5


class Substep:
    """Advances MuJoCo Warp's worlds by one time step of 2 ms.

    Attributes:
        solver: solves for the constraints' forces.
    """

    def __init__(
        self, mjm: mujoco.MjModel, model: Any, data: Any, *, device: str, placed_bodies: Collection[int] = ()
    ) -> None:
        """Allocate what a step needs.

        Args:
            mjm: what `model` was made of.
            model: from `mujoco_warp.put_model`.
            data: from `mujoco_warp.make_data`.
            device: Warp's name of the device where they are.
            placed_bodies: bodies whose poses in their parents differ between worlds or will be changed.

        Raises:
            ValueError: the model has what scenes of LIBERO do not have; see also `NewtonSolver.of`.
        """
        _check_model(mjm, model)
        self._mjm, self._device = mjm, device
        with wp.ScopedDevice(device):
            self._pairs = _group_pairs(mjm, model, placed_bodies)
        self._convex_pairs, self._primitive_pairs = _pairs_of_shapes(model)
        self._strands = _make_strands(device, 1 + len(self._convex_pairs)) if wp.get_device(device).is_cuda else []
        self._allocate(model, data)

    def for_rows(self, model: Any, data: Any) -> Self:
        """Return the same for some of the worlds, with memory of its own; `model` and `data` are views of theirs."""
        other = copy.copy(self)
        other._allocate(model, data)
        return other

    def _allocate(self, model: Any, data: Any) -> None:
        self._model, self._data = model, data
        self.solver = NewtonSolver.of(self._mjm, model, data, device=self._device)
        with wp.ScopedDevice(self._device):
            self._collisions = create_collision_context(data.naconmax)
            self._geom_bounds = wp.zeros((data.nworld, self._mjm.ngeom, 2), dtype=wp.vec3)
            self._body_bounds = wp.zeros((data.nworld, self._mjm.nbody, 2), dtype=wp.vec3)
            self._num_near = wp.zeros(data.nworld, dtype=int)
            self._near = wp.zeros((data.nworld, len(self._pairs.bodies)), dtype=int)

    def run(self, control: Callable[[], None]) -> None:
        """Launch the kernels of a step; `control` launches those that set `ctrl`, after velocities and bias."""
        model, data = self._model, self._data
        with wp.ScopedDevice(self._device):
            mujoco_warp.kinematics(model, data)
            mujoco_warp.com_pos(model, data)
            with self._strand(0):
                self._smooth_dynamics(control)
            self._collide()
            mujoco_warp.make_constraint(model, data)
            self._join(0)
            self.solver.solve()
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

    def _collide(self) -> None:
        """Find the contacts."""
        model, data, found = self._model, self._data, self._collisions
        data.ncollision.zero_()
        data.nacon.zero_()
        self._find_pairs()
        for index, pair in enumerate(self._convex_pairs, start=1):
            with self._strand(index):
                convex_narrowphase(model, data, found, [pair])
        mujoco_warp.primitive_narrowphase(model, data, found, self._primitive_pairs)
        for index in range(1, 1 + len(self._convex_pairs)):
            self._join(index)

    def _find_pairs(self) -> None:
        model, data, found, pairs = self._model, self._data, self._collisions, self._pairs
        self._num_near.zero_()
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
            inputs=[pairs.body_first_geom, pairs.body_num_geoms, self._geom_bounds],
            outputs=[self._body_bounds],
        )
        wp.launch(
            _find_near_bodies,
            dim=self._near.shape,
            inputs=[pairs.bodies, self._body_bounds],
            outputs=[self._num_near, self._near],
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
                self._num_near,
                self._near,
                self._geom_bounds,
                data.geom_xpos,
                data.geom_xmat,
                data.naconmax,
            ],
            outputs=[data.ncollision, found.collision_pair, found.collision_pairid, found.collision_worldid],
            block_dim=_PAIR_THREADS,
        )

    @contextmanager
    def _strand(self, index: int) -> Iterator[None]:
        """Launch beside what follows, after what was launched before; on a CPU, at once."""
        if not self._strands:
            yield
            return
        with wp.ScopedStream(self._strands[index], sync_enter=True):
            yield

    def _join(self, index: int) -> None:
        """Let what follows wait for a strand."""
        if self._strands:
            wp.wait_stream(self._strands[index])


@functools.lru_cache
def _make_strands(device: str, number: int) -> list[Any]:
    """Return streams that captures of steps go through, one capture at a time."""
    return [wp.Stream(device) for _ in range(number)]


def _check_model(mjm: mujoco.MjModel, model: Any) -> None:
    disabled = mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_CONSTRAINT
    unsupported = {
        "an integrator other than Euler's": mjm.opt.integrator != mujoco.mjtIntegrator.mjINT_EULER,
        "contacts switched off": mjm.opt.disableflags & disabled,
        "sleeping bodies": model.opt.enableflags & mujoco_warp.EnableBit.SLEEP,
        "explicit pairs of shapes": mjm.npair,
        "signed distance fields": (mjm.geom_type == mujoco.mjtGeom.mjGEOM_SDF).any(),
        "moving surfaces": model.flg_surfacevel,
    }
    found = [name for name, value in unsupported.items() if value]
    if found:
        raise ValueError(
            f"GPU physics steps by Euler's method bodies whose shapes collide by what they are made of; this model has "
            f"{', '.join(found)}"
        )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of geoms that can collide, by pairs of bodies; Warp arrays.

    Attributes:
        bodies: [Q] pairs of bodies.
        first: [Q + 1] where the geoms of a pair of bodies begin.
        geoms: [P] pairs of geoms.
        ids: [P] MuJoCo Warp's `nxn_pairid` of them.
        body_first_geom: [B].
        body_num_geoms: [B].
    """

    bodies: Any
    first: Any
    geoms: Any
    ids: Any
    body_first_geom: Any
    body_num_geoms: Any


def _group_pairs(mjm: mujoco.MjModel, model: Any, placed_bodies: Collection[int]) -> _Pairs:
    geoms, ids = model.nxn_geom_pair_filtered.numpy(), model.nxn_pairid_filtered.numpy()
    clear = find_clear_pairs(mjm, [(int(a), int(b)) for a, b in geoms], placed_bodies)
    kept = np.array([(int(a), int(b)) not in clear for a, b in geoms], dtype=np.bool_)
    geoms, ids = geoms[kept], ids[kept]
    bodies = mjm.geom_bodyid[geoms]
    order = np.lexsort((bodies[:, 1], bodies[:, 0]))
    pairs, first = np.unique(bodies[order], axis=0, return_index=True)
    return _Pairs(
        bodies=wp.array(pairs, dtype=wp.vec2i),
        first=wp.array(np.append(first, len(geoms)), dtype=int),
        geoms=wp.array(geoms[order], dtype=wp.vec2i),
        ids=wp.array(ids[order], dtype=wp.vec2i),
        body_first_geom=wp.array(mjm.body_geomadr, dtype=int),
        body_num_geoms=wp.array(mjm.body_geomnum, dtype=int),
    )


def _pairs_of_shapes(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the pairs of shapes that can collide in the model: those of GJK's kind, and those with formulas."""
    table = dict(MJ_COLLISION_TABLE)
    if model.opt.disableflags & mujoco_warp.DisableBit.NATIVECCD:
        box = mujoco_warp.GeomType.BOX
        table[box, box] = CollisionType.PRIMITIVE
    num_types = len(mujoco_warp.GeomType)
    there = [
        pair for pair in table if model.geom_pair_type_count[upper_trid_index(num_types, pair[0].value, pair[1].value)]
    ]
    convex = [pair for pair in there if table[pair] == CollisionType.CONVEX]
    return convex, [pair for pair in there if table[pair] == CollisionType.PRIMITIVE]


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
        bounds[world, geom, 0] = wp.vec3(-wp.static(_FAR))
        bounds[world, geom, 1] = wp.vec3(wp.static(_FAR))
        return
    mat = geom_xmat[world, geom]
    center = geom_xpos[world, geom] + mat @ geom_aabb[world % geom_aabb.shape[0], geom, 0]
    half = geom_aabb[world % geom_aabb.shape[0], geom, 1]
    margin = geom_margin[world % geom_margin.shape[0], geom] + geom_gap[world % geom_gap.shape[0], geom]
    reach = wp.vec3(margin)
    for axis in range(3):
        for side in range(3):
            reach[axis] += wp.abs(mat[axis, side]) * half[side]
    if not wp.length(center) + wp.length(reach) < wp.static(_FAR):
        # The world has diverged. What is so far away would touch everything there, and take other worlds' space for
        # contacts.
        bounds[world, geom, 0] = wp.vec3(wp.static(_NOWHERE))
        bounds[world, geom, 1] = wp.vec3(-wp.static(_NOWHERE))
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
    low = wp.vec3(wp.static(_NOWHERE))
    high = wp.vec3(-wp.static(_NOWHERE))
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
