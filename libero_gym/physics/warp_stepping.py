# type: ignore
"""A step of MuJoCo Warp's physics in another order of launches: what does not wait for each other runs side by side.

`mujoco_warp.step` launches some hundred kernels one after another, and most of them are too small for a GPU: they take
as long as their slowest thread. Here the step falls into strands, which are streams of the captured graph:

    kinematics -> broad phase -> contacts of each pair of shapes (side by side) -> constraints -> solver -> integration
               -> inertia, velocities, bias, controller, actuators, smooth acceleration ------^

The broad phase compares boxes along the world's axes, six numbers a shape, before MuJoCo Warp's own test of a pair, which
reads and computes many times as much. The solver is `libero_gym.physics.newton`. Results are those of `mujoco_warp.step` but for the
order in which contacts are found and sums rounded.

Shape legend: N worlds, G geoms, P pairs of geoms that can collide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mujoco
import mujoco_warp
import warp as wp
from mujoco_warp._src.collision_convex import convex_narrowphase
from mujoco_warp._src.collision_core import create_collision_context
from mujoco_warp._src.collision_driver import MJ_COLLISION_TABLE, _add_geom_pair, _broadphase_filter
from mujoco_warp._src.math import upper_trid_index
from mujoco_warp._src.types import CollisionType

from libero_gym.physics.newton import NewtonSolver

# Threads that go through the pairs of a world on a GPU.
_PAIR_THREADS = 256


class Substep:
    """Advances MuJoCo Warp's worlds by one time step of 2 ms.

    Attributes:
        solver: solves for the constraints' forces.
    """

    def __init__(self, mjm: mujoco.MjModel, model: Any, data: Any, *, device: str) -> None:
        """Allocate what a step needs.

        Args:
            mjm: what `model` was made of.
            model: from `mujoco_warp.put_model`.
            data: from `mujoco_warp.make_data`.
            device: Warp's name of the device where they are.

        Raises:
            ValueError: the model has what scenes of LIBERO do not have; see `NewtonSolver.of`.
        """
        self.solver = NewtonSolver.of(mjm, model, data, device=device)
        self._model, self._data, self._device = model, data, device
        with wp.ScopedDevice(device):
            self._collisions = create_collision_context(data.naconmax)
            self._bounds = wp.zeros((data.nworld, mjm.ngeom, 2), dtype=wp.vec3)
        self._convex_pairs, self._primitive_pairs = _pairs_of_shapes(model)
        num_strands = 1 + len(self._convex_pairs)
        self._strands = [wp.Stream(device) for _ in range(num_strands)] if wp.get_device(device).is_cuda else []

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
        model, data, found = self._model, self._data, self._collisions
        wp.launch(
            _bound_geoms,
            dim=self._bounds.shape[:2],
            inputs=[
                model.geom_type,
                model.geom_aabb,
                model.geom_margin,
                model.geom_gap,
                data.geom_xpos,
                data.geom_xmat,
            ],
            outputs=[self._bounds],
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
                model.nxn_geom_pair_filtered,
                model.nxn_pairid_filtered,
                data.geom_xpos,
                data.geom_xmat,
                self._bounds,
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


def _pairs_of_shapes(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the pairs of shapes that can collide in the model: those of GJK's kind, and those with formulas."""
    table = dict(MJ_COLLISION_TABLE)
    if model.opt.disableflags & mujoco_warp.DisableBit.NATIVECCD:
        box = mujoco_warp.GeomType.BOX
        table[box, box] = CollisionType.PRIMITIVE
    num_types = len(mujoco_warp.GeomType)
    there = [
        pair
        for pair in table
        if model.geom_pair_type_count[upper_trid_index(num_types, pair[0].value, pair[1].value)]
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
        bounds[world, geom, 0] = wp.vec3(-1.0e10)
        bounds[world, geom, 1] = wp.vec3(1.0e10)
        return
    mat = geom_xmat[world, geom]
    center = geom_xpos[world, geom] + mat @ geom_aabb[world % geom_aabb.shape[0], geom, 0]
    half = geom_aabb[world % geom_aabb.shape[0], geom, 1]
    margin = geom_margin[world % geom_margin.shape[0], geom] + geom_gap[world % geom_gap.shape[0], geom]
    reach = wp.vec3(margin)
    for axis in range(3):
        for side in range(3):
            reach[axis] += wp.abs(mat[axis, side]) * half[side]
    bounds[world, geom, 0] = center - reach
    bounds[world, geom, 1] = center + reach


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
        pairs: wp.array(dtype=wp.vec2i),
        pair_ids: wp.array(dtype=wp.vec2i),
        geom_xpos: wp.array2d(dtype=wp.vec3),
        geom_xmat: wp.array2d(dtype=wp.mat33),
        bounds: wp.array3d(dtype=wp.vec3),
        naconmax: int,
        ncollision: wp.array(dtype=int),
        collision_pair: wp.array(dtype=wp.vec2i),
        collision_pairid: wp.array(dtype=wp.vec2i),
        collision_worldid: wp.array(dtype=int),
    ):
        world, lane = wp.tid()
        for element in range(lane, pairs.shape[0], wp.block_dim()):
            pair = pairs[element]
            low_a = bounds[world, pair[0], 0]
            high_a = bounds[world, pair[0], 1]
            low_b = bounds[world, pair[1], 0]
            high_b = bounds[world, pair[1], 1]
            if wp.min(high_a - low_b) >= 0.0 and wp.min(high_b - low_a) >= 0.0:
                pair_id = pair_ids[element]
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
