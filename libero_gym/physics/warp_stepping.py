# type: ignore
# ruff: noqa: SIM110 - Warp has no `all`
"""A step of MuJoCo Warp's physics in few launches, of which those that do not wait for each other run side by side.

`mujoco_warp.step` launches some hundred kernels one after another, and most of them are too small for a GPU: they take
as long as their slowest thread, or as a GPU needs to begin a kernel. Here a step is a dozen kernels, most of which give
each world a block of threads. They fall into strands, which are streams of the captured graph:

    kinematics -> broad phase -> contacts of each pair of shapes (side by side) -> constraints -> solver -> integration
               -> inertia, velocities, bias -> controller -> actuators, smooth acceleration ---^

Kinematics, forces and integration are `libero_gym.physics.fused_dynamics`, constraints are
`libero_gym.physics.fused_constraints`, and the solver is `libero_gym.physics.newton`; contacts of shapes are found by
MuJoCo Warp. The broad phase compares boxes along the world's axes, first those of bodies, then those of their shapes,
before MuJoCo Warp's own test of a pair, which reads and computes many times as much. Meshes that can be proven never to
touch are not compared at all; see `libero_gym.physics.clearance`. Results are those of `mujoco_warp.step` but for the
order in which contacts are found, the rounding of sums, and where within its tolerance the solver stops. Energy and
sensors are not computed.

Shape legend: N worlds, Q pairs of bodies and P pairs of geoms that can collide.
"""

from __future__ import annotations

import copy
import functools
import types
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

from libero_gym.physics.blocks import sync_block
from libero_gym.physics.clearance import find_clear_pairs
from libero_gym.physics.fused_dynamics import FusedDynamics, find_unsupported
from libero_gym.physics.newton import NewtonSolver
from libero_gym.physics.warp_loading import MUJOCO_WARP_VERSIONS

# Threads that go through the pairs of a world on a GPU, a warp for each pair of bodies.
_PAIR_THREADS = 128
_WARP_SIZE = 32


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
        self._find_convex_contacts = [_keep_memory(convex_narrowphase, data.naccdmax) for _ in self._convex_pairs]
        self._allocate(model, data)

    def for_rows(self, model: Any, data: Any) -> Self:
        """Return the same for some of the worlds; `model` and `data` are views of theirs.

        Both share memory for contacts of convex shapes, so that only one of them may be at work at a time.
        """
        other = copy.copy(self)
        other._allocate(model, data)
        return other

    def _allocate(self, model: Any, data: Any) -> None:
        self._model, self._data = model, data
        self.solver = NewtonSolver.of(self._mjm, model, data, device=self._device)
        self._dynamics = FusedDynamics(self._mjm, model, data, device=self._device)
        with wp.ScopedDevice(self._device):
            self._collisions = create_collision_context(data.naconmax)
            self._num_near = wp.zeros(data.nworld, dtype=int)
            self._near = wp.zeros((data.nworld, len(self._pairs.bodies)), dtype=int)

    def run(self, control: Callable[[], None]) -> None:
        """Launch the kernels of a step; `control` launches those that set `ctrl`, after velocities and bias."""
        dynamics = self._dynamics
        with wp.ScopedDevice(self._device):
            dynamics.place_bodies()
            with self._strand(0):
                dynamics.find_forces()
                control()
                dynamics.find_accelerations()
            self._collide()
            dynamics.add_contacts()
            self._join(0)
            self.solver.solve()
            dynamics.integrate()

    def place_bodies(self) -> None:
        """Launch what computes poses of all that moves from `qpos`."""
        self._dynamics.place_bodies()

    def find_contacts(self) -> None:
        """Launch what computes poses and contacts from `qpos`."""
        with wp.ScopedDevice(self._device):
            self.place_bodies()
            self._collide()

    def _collide(self) -> None:
        """Find the contacts of bodies in their places."""
        model, data, found = self._model, self._data, self._collisions
        self._find_pairs()
        for index, pair in enumerate(self._convex_pairs):
            with self._strand(1 + index):
                self._find_convex_contacts[index](self._dynamics.num_convex, model, data, found, [pair])
        mujoco_warp.primitive_narrowphase(model, data, found, self._primitive_pairs)
        for index in range(1, 1 + len(self._convex_pairs)):
            self._join(index)

    def _find_pairs(self) -> None:
        model, data, found, pairs = self._model, self._data, self._collisions, self._pairs
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
                pairs.bodies,
                pairs.first,
                pairs.geoms,
                pairs.ids,
                self._num_near,
                self._near,
                self._dynamics.body_bounds,
                self._dynamics.geom_bounds,
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


def _keep_memory(function: Callable[..., None], num_rows: int) -> Callable[..., None]:
    """Return a function of MuJoCo Warp that allocates memory when it is first called, and uses the same ever after.

    What a captured step allocates, frees and clears would be nodes of its graph, of which MuJoCo Warp makes dozens for
    each pair of shapes. Calls may be with fewer worlds.

    Args:
        function: allocates by `wp.empty` what need not be clear, always the same but for the number of rows, and one
            array of counters by `wp.zeros`. What is returned takes that array before the function's arguments, and
            leaves it to its caller to clear it. It raises RuntimeError where the function allocates anything else.
        num_rows: the most rows that any call will ask for.
    """
    original = function.__wrapped__
    allocator = _Allocator(function.__name__, num_rows)
    # The same function with another meaning of the name `wp`.
    keeping = types.FunctionType(
        original.__code__,
        {**original.__globals__, "wp": allocator},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )

    def call(counters: Any, *args: Any) -> None:
        allocator.begin(counters)
        keeping(*args)

    return call


class _Allocator:
    """Stands in for the module `warp` where memory is to be kept."""

    def __init__(self, function_name: str, num_rows: int) -> None:
        self._function_name, self._num_rows = function_name, num_rows
        self._kept: list[tuple[Any, Any, Any]] = []  # shape of a row, type, array

    def begin(self, counters: Any) -> None:
        """Give out the memory from its beginning."""
        self._counters, self._num_given, self._has_given_counters = counters, 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(wp, name)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        if self._has_given_counters or shape != self._counters.size or dtype is not int:
            raise self._surprise("zeros", shape, dtype)
        self._has_given_counters = True
        return self._counters

    def empty(self, shape: Any, dtype: Any) -> Any:
        if not isinstance(shape, tuple) or shape[0] > self._num_rows:
            raise self._surprise("empty", shape, dtype)
        row = shape[1:]
        if self._num_given == len(self._kept):
            self._kept.append((row, dtype, wp.empty((self._num_rows, *row), dtype=dtype)))
        kept_row, kept_dtype, array = self._kept[self._num_given]
        if (row, dtype) != (kept_row, kept_dtype):
            raise self._surprise("empty", shape, dtype)
        self._num_given += 1
        return array

    def _surprise(self, name: str, shape: Any, dtype: Any) -> RuntimeError:
        return RuntimeError(
            f"{self._function_name} of MuJoCo Warp asks for memory as no version does that GPU physics knows: "
            f"wp.{name}(shape={shape}, dtype={dtype.__name__}); install mujoco-warp{MUJOCO_WARP_VERSIONS}"
        )


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
    found = [name for name, value in unsupported.items() if value] + find_unsupported(mjm, model)
    if found:
        raise ValueError(
            f"GPU physics steps by Euler's method what scenes of LIBERO have: free bodies, damped hinges and slides, "
            f"motors and position servos; this model has {', '.join(found)}"
        )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of geoms that can collide, by pairs of bodies; Warp arrays.

    Attributes:
        bodies: [Q] pairs of bodies.
        first: [Q + 1] where the geoms of a pair of bodies begin.
        geoms: [P] pairs of geoms.
        ids: [P] MuJoCo Warp's `nxn_pairid` of them.
    """

    bodies: Any
    first: Any
    geoms: Any
    ids: Any


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
        body_pairs: wp.array(dtype=wp.vec2i),
        first: wp.array(dtype=int),
        pairs: wp.array(dtype=wp.vec2i),
        pair_ids: wp.array(dtype=wp.vec2i),
        num_near: wp.array(dtype=int),
        near: wp.array2d(dtype=int),
        body_bounds: wp.array3d(dtype=wp.vec3),
        bounds: wp.array3d(dtype=wp.vec3),
        geom_xpos: wp.array2d(dtype=wp.vec3),
        geom_xmat: wp.array2d(dtype=wp.mat33),
        naconmax: int,
        ncollision: wp.array(dtype=int),
        collision_pair: wp.array(dtype=wp.vec2i),
        collision_pairid: wp.array(dtype=wp.vec2i),
        collision_worldid: wp.array(dtype=int),
    ):
        """Compare the boxes of bodies, then those of near bodies' geoms; a block for each of N worlds."""
        world, lane = wp.tid()
        if lane == 0:
            num_near[world] = 0
        sync_block()
        for bodies in range(lane, body_pairs.shape[0], wp.block_dim()):
            if _overlap(body_bounds[world], body_pairs[bodies][0], body_pairs[bodies][1]):
                near[world, wp.atomic_add(num_near, world, 1)] = bodies
        sync_block()
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
