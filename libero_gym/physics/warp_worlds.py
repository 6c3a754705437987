"""Physics on the GPU: many worlds of one scene stepped together by MuJoCo Warp, controller and goals included.

A second backend for training with thousands of worlds. It runs LIBERO's tasks with LIBERO's controller, timing and
goals, but it is not LIBERO to the last bit, as `libero_gym.physics.simulation` is. What differs:

- All numbers are float32. The arm agrees with the CPU's to 1e-6 rad after one environment step and to 1e-4 rad after
  thirty, until it touches something; contact then makes any rounding visible. `benchmarks/env_warp.py` measures what
  that means for success.
- Contacts of boxes come from the same algorithm as MuJoCo's (they are nearly all of LIBERO's contacts); those of
  meshes and cylinders from MuJoCo Warp's own. Which of two barely touching shapes are in contact can differ.
- Constraints are those of LIBERO (elliptic cones, impratio 20) and solved as there, by Newton's method with exact line
  search, in a kernel of this package (`libero_gym.physics.newton`); it stops at a tolerance of 1e-6 instead of 1e-8,
  which float32 cannot reach, and after at most 10 iterations instead of 100. Integration is LIBERO's: Euler with
  implicit damping.
- Pairs of the robot's meshes that can be proven never to touch are not compared (`libero_gym.physics.clearance`).
- On a GPU the order of contacts, and so the rounding of sums, varies from run to run: the same seed gives the same
  starts and the same samples, not the same trajectory to the last bit. On a CPU it does.
- Force sensors, which nothing here reads, are not computed.

`libero_gym.physics.warp_stepping` launches a substep's kernels; those that find contacts are MuJoCo Warp's. One
environment step (25 substeps) is one captured graph, and poses go to the ray caster without leaving the device.
Everything runs on a CPU too, for tests, there with a graph for each kind of substep.

Shape legend: N worlds, C steps of an action chunk, R worlds that are reset, B bodies, T tasks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import mujoco
import mujoco_warp
import numpy as np
import numpy.typing as npt
import warp as wp

from libero_gym.conventions import ACTION_DIM
from libero_gym.fork import Owner, Uncopied
from libero_gym.physics import predicates
from libero_gym.physics import warp_kernels as kernels
from libero_gym.physics.controller import (
    NULLSPACE_STIFFNESS,
    SUBSTEPS,
    ArmKinematics,
    creation_kinematics,
    inertia_addresses,
)
from libero_gym.physics.simulation import NUM_SETTLING_STEPS, SETTLING_ACTION, PhysicsError, load_task_data
from libero_gym.physics.states import IDENTITY, Entry, check_entries, check_keys, check_scene
from libero_gym.physics.warp_loading import check_mujoco_warp, find_modules, load_modules
from libero_gym.physics.warp_stepping import Substep
from libero_gym.physics.worlds import BoolArray, FloatArray, IntArray, Steps
from libero_gym.rendering.protocol import Views
from libero_gym.rendering.raycast import DevicePoses, default_device, list_devices
from libero_gym.tasks.initial_states import EpisodeStart, InitStates, load_recorded_states
from libero_gym.tasks.scenes import JointTest, Scene
from libero_gym.tasks.suites import TaskSpec, is_integer

logger = logging.getLogger(__name__)

# What an overflow of MuJoCo Warp's buffers loses. Its other reports (iterations spent, a penetration depth given up)
# cost accuracy for one substep, as they do in MuJoCo, and are no errors there either.
_LOSSES = {
    mujoco_warp.OverflowType.NEFC: "more constraints than constraints_per_world",
    mujoco_warp.OverflowType.NJMAX_NNZ: "more entries of constraint Jacobians than constraints_per_world allows for",
    mujoco_warp.OverflowType.BROADPHASE: "more pairs of close shapes than contacts_per_world",
    mujoco_warp.OverflowType.NARROWPHASE: "more contacts than contacts_per_world",
    mujoco_warp.OverflowType.CCD: "more contacts of meshes and cylinders than convex_contacts_per_world",
}


@dataclass(frozen=True, kw_only=True)
class WarpOptions:
    """Sizes of MuJoCo Warp's buffers and limits of its solver.

    Attributes:
        contacts_per_world: contacts for which there is space, on average over the worlds of a scene, which share it.
            libero_spatial has 88 at rest and 230 while its bowls settle, the other suites half of that.
        constraints_per_world: constraint rows of one world at most: three or four for a contact, one for a joint that
            has friction or is at its limit.
        convex_contacts_per_world: contacts that involve a mesh or a cylinder, on average over the worlds of a scene.
        solver_iterations: the solver's iterations in one substep at most. Most substeps need one or two, one in a
            hundred more than ten under random actions; the next substep goes on from what those reach.
        linesearch_iterations: the same for the line search within an iteration.
    """

    contacts_per_world: int = 256
    constraints_per_world: int = 1024
    convex_contacts_per_world: int = 32
    solver_iterations: int = 10
    linesearch_iterations: int = 50

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is no positive integer.
        """
        for name, value in vars(self).items():
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name}={value!r} is not an integer of at least 1")


class WarpWorlds(Uncopied):
    """N worlds of one scene on one device; each is at a task and a state of its own.

    See `libero_gym.physics.worlds.Worlds`, which this implements. `libero_gym.physics.warp_groups` makes worlds of
    several scenes of it; what it needs for that are the methods that only launch, so that several scenes run at once,
    and those about rows: a row is the place of a world in the arrays.

    Attributes:
        scene: the scene.
        tasks: tasks that a world can be reset to.
        num_worlds: N.
        device: Warp's name of the device.
    """

    _HOW_TO_MAKE_ANOTHER = (
        "make other worlds with the same arguments, and give them these worlds' get_states by set_state"
    )

    def __init__(
        self,
        scene: Scene,
        tasks: Sequence[TaskSpec],
        num_worlds: int,
        *,
        num_action_chunks: int = 1,
        device: str | None = None,
        options: WarpOptions | None = None,
        loads_kernels: bool = True,
    ) -> None:
        """Allocate the worlds; call `reset` before `step`.

        Args:
            scene: from `libero_gym.tasks.scenes.load_scene`.
            tasks: tasks of the scene.
            num_worlds: N.
            num_action_chunks: C.
            device: "cpu" or a CUDA device such as "cuda:0"; None takes CUDA if it is there.
            options: None for the defaults.
            loads_kernels: False leaves it to the caller to load what `find_kernels` returns.

        Raises:
            ValueError: Warp has no such device, or the scene has what GPU physics does not compute.
            ImportError: MuJoCo Warp is another version than GPU physics is made for.
        """
        check_mujoco_warp()
        self.device = choose_device(device)
        self._owner = Owner("the simulated worlds")
        options = options or WarpOptions()
        self.scene = scene
        self.tasks = tuple(tasks)
        self.num_worlds = num_worlds
        self._current_tasks: list[TaskSpec | None] = [None] * num_worlds
        self._init_state_ids = np.full(num_worlds, -1, np.int64)
        self._task_index = {task: index for index, task in enumerate(self.tasks)}
        robot = scene.robot
        model = copy.copy(scene.physics_model)
        fixtures = scene.fixture_body_ids
        self._default_fixture_poses = np.concatenate([model.body_pos[fixtures], model.body_quat[fixtures]], axis=1)
        self._creation = creation_kinematics(model, robot)
        # Worlds that were never reset are computed as others are, and share the space for contacts. As the model has
        # it, fixtures stand in each other.
        task_data = load_task_data(scene, self.tasks[0])
        poses = task_data.fixture_sampler.sample(np.random.RandomState(0), self._default_fixture_poses)
        model.body_pos[fixtures], model.body_quat[fixtures] = poses[:, :3], poses[:, 3:]
        # MuJoCo Warp reads the second flag as: boxes collide by MuJoCo's algorithm for boxes.
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR | mujoco.mjtDisableBit.mjDSBL_NATIVECCD)
        model.opt.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
        model.opt.iterations = options.solver_iterations
        model.opt.ls_iterations = options.linesearch_iterations
        with wp.ScopedDevice(self.device):
            per_world = {"body_pos": num_worlds, "body_quat": num_worlds}
            self._model: Any = mujoco_warp.put_model(model, batch_sizes=per_world)
            self._data: Any = mujoco_warp.make_data(
                model,
                nworld=num_worlds,
                nconmax=options.contacts_per_world,
                njmax=options.constraints_per_world,
                nccdmax=min(options.convex_contacts_per_world, options.contacts_per_world),
            )
        self._model.opt.warn_overflow = 0  # read from `overflow` instead of printed
        self._substep = Substep(model, self._model, self._data, device=self.device, placed_bodies=fixtures.tolist())
        self._step_graphs: list[Any] = []
        self._refresh_graph: Any = None
        self._has_launched = False

        self._data.qpos.assign(np.tile(_resting_qpos(model, task_data.init_states[0]), (num_worlds, 1)))

        n, data = num_worlds, self._data
        self._live: Any = kernels.Live()
        for name in kernels.Live.vars:
            setattr(self._live, name, data.M if name == "inertia" else getattr(data, name))
        self._arm = self._upload(kernels.Arm, **_arm_values(scene))
        self._controller_start = self._upload(kernels.Creation, **_creation_values(self._creation))
        self._goals = self._upload(kernels.Goals, **_goal_values(scene, self.tasks))
        self._indicators = self._upload(kernels.Indicators, **_indicator_values(scene))
        num_indicators = len(scene.indicator_site_ids)
        self._memory = self._allocate(kernels.Memory, (n,))
        self._observed = self._allocate(
            kernels.Observed, (n,), body_pos=(n, model.nbody), body_mat=(n, model.nbody), is_lit=(n, num_indicators)
        )
        self._saved = self._allocate(
            kernels.Saved, (n,), qpos=(n, model.nq), qvel=(n, model.nv), qacc_warmstart=(n, model.nv)
        )
        self._is_lit = self._zeros((n, num_indicators), wp.uint8)
        max_atoms = int(np.diff(self._goals.task_first.numpy()).max())
        self._touched = self._zeros((n, max_atoms), wp.uint8)
        self._world_task = wp.full(n, -1, dtype=int, device=self.device)
        self._actions = self._zeros((n, num_action_chunks, ACTION_DIM), float)
        self._step = self._zeros(1, int)
        self._is_reset = self._zeros(n, wp.uint8)
        self._is_active = self._zeros(n, wp.uint8)
        self._is_success = self._zeros(n, wp.uint8)
        self._has_diverged = self._zeros(n, wp.uint8)
        self._steps_left = self._zeros(n, int)
        self._ran = self._zeros((n, num_action_chunks), wp.uint8)
        self._successes = self._zeros((n, num_action_chunks), wp.uint8)

        self._fixture_body_ids = wp.array(fixtures, dtype=int, device=self.device)
        static = np.flatnonzero(model.body_weldid[model.geom_bodyid] == 0)
        self._static_geoms = wp.array(static, dtype=int, device=self.device)
        self._geom_mat = wp.array(_matrices(model.geom_quat), dtype=wp.mat33, device=self.device)
        if loads_kernels:
            load_modules(self.find_kernels())

    def reset(self, world_ids: IntArray, starts: Sequence[EpisodeStart], *, init_states: InitStates) -> None:
        """Start episodes, objects at rest; see `libero_gym.physics.simulation.Simulation.reset`.

        "Original" states settle for ten steps in which the other worlds idle: that costs as much as ten steps of all
        worlds, recorded ones ("settled", "held_out") cost a copy.

        Args:
            world_ids: int64 [R].
            starts: of length R.
            init_states: kind of the states.

        Raises:
            ValueError: a task is not among the scene's tasks given to the constructor.
            FileNotFoundError: states of this kind are not recorded for the suite.
            PhysicsError: a world diverged or ran out of space while settling.
        """
        self._owner.check()
        if not len(world_ids):
            return
        settles = init_states == "original"
        self.upload_starts(world_ids, self.read_starts(starts, init_states), settles=settles)
        for i, begun in zip(world_ids, starts, strict=True):
            self._current_tasks[i] = begun.task
            self._init_state_ids[i] = begun.init_state_id
        self.launch_starts(settles=settles)
        if settles:
            raise_on_faults(*self.read_faults())

    @property
    def current_tasks(self) -> list[TaskSpec | None]:
        """Task of each world, None where it was never reset."""
        return list(self._current_tasks)

    @property
    def init_state_ids(self) -> IntArray:
        """int64 [N], initial state that each world was reset to, -1 where it never was."""
        return self._init_state_ids.copy()

    def step(
        self,
        actions: FloatArray,
        is_active: BoolArray,
        steps_left: IntArray,
        *,
        out: Steps | None = None,
        on_part_done: Callable[[IntArray], None] | None = None,
    ) -> Steps:
        """Run up to C steps in each active world; see `Worlds.step`. All end together: `on_part_done` is not called.

        Raises:
            ValueError: an active world was never reset.
            PhysicsError: a world diverged or ran out of space; it must be reset.
        """
        self._owner.check()
        steps = Steps.none(self.num_worlds, self._actions.shape[1]) if out is None else out
        fresh = [i for i in np.flatnonzero(is_active).tolist() if self._current_tasks[i] is None]
        if fresh:
            raise ValueError(f"worlds {fresh} were never reset")
        if not is_active.any():
            return steps
        self.upload_chunk(actions, is_active, steps_left)
        for _ in range(self._actions.shape[1]):
            self.launch_step()
        steps.ran[:], steps.successes[:] = self.read_chunk()
        raise_on_faults(*self.read_faults())
        return steps

    def success(self) -> BoolArray:
        """Return bool [N], whether the goal held at the end of the last step."""
        self._owner.check()
        return self._is_success.numpy().astype(np.bool_)

    def states(self, world_ids: IntArray | None = None) -> npt.NDArray[np.float32]:
        """Return the observed proprioception of some worlds (None: all), float32 [num, 8]; see `Worlds.states`."""
        self._owner.check()
        observed = self._observed
        angles = axis_angles(observed.eef_quat.numpy())
        states = np.concatenate([observed.eef_pos.numpy(), angles, observed.fingers.numpy()], axis=1)
        return states if world_ids is None else states[world_ids]

    def qpos(self) -> npt.NDArray[np.float32]:
        """Return positions, float32 [N, nq]."""
        self._owner.check()
        return self._data.qpos.numpy().copy()

    def poses(self, world_ids: IntArray, *, places: IntArray | None = None) -> DevicePoses:
        """Return what the images of some worlds show, on the device; `places` are those of the images."""
        self._owner.check()
        if np.array_equal(world_ids, np.arange(self.num_worlds)):
            body_pos, body_mat = self._observed.body_pos, self._observed.body_mat
        else:
            shape = (len(world_ids), self._observed.body_pos.shape[1])
            body_pos, body_mat = self._zeros(shape, wp.vec3), self._zeros(shape, wp.mat33)
            ids = wp.array(world_ids, dtype=int, device=self.device)
            self._launch(kernels.gather_poses, shape, ids, self._observed, body_pos, body_mat)
        is_lit = self._observed.is_lit.numpy()[world_ids]  # a few bytes a world
        lit_sites = np.where(is_lit > 0, self.scene.indicator_site_ids, -1).astype(np.int32)
        places = np.arange(len(world_ids)) if places is None else places
        return DevicePoses(scene=self.scene, body_pos=body_pos, body_mat=body_mat, lit_sites=lit_sites, places=places)

    def views(self, renderer: Any, world_ids: IntArray, *, as_torch: bool) -> Views:
        """Return what a `WarpRenderer` draws of some worlds on the device; see `Worlds.views`."""
        return renderer.views_of_poses(self.poses(world_ids), as_torch=as_torch)

    def get_state(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return everything that decides a world's future and what it shows; see `Worlds.get_state`."""
        return self._identity(world_id) | self.read_row(world_id)

    def get_states(self) -> list[dict[str, npt.NDArray[Any]]]:
        """Return `get_state` of all worlds, with one download of each array."""
        identities = [self._identity(i) for i in range(self.num_worlds)]
        return [identity | row for identity, row in zip(identities, self.read_rows(self.num_worlds), strict=True)]

    def check_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if `set_state` would take a state; see `Worlds.check_state`."""
        self.read_state(state)

    def set_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `get_state` returned, also from another world of the same scene and tasks.

        Raises:
            ValueError: an entry is missing, surplus, of another type or shape, or not finite, or the state belongs to
                another scene, or to a task that is not among those of these worlds. No world has been touched.
        """
        task, state = self.read_state(state)
        self.write_row(world_id, task, state)
        self._current_tasks[world_id] = task
        self._init_state_ids[world_id] = int(state["init_state_id"])

    def physics_error(self, world_id: int, reason: str, action: npt.NDArray[np.float64]) -> PhysicsError:
        """Return the error to raise for an action; the state is not dumped."""
        return PhysicsError(reason)

    def close(self) -> None:
        """Release what was captured, in the process that made it; the rest goes with the object."""
        if self._owner.is_this_process:
            self._step_graphs, self._refresh_graph = [], None

    def find_kernels(self) -> list[tuple[Any, Any, int | None]]:
        """Return the modules of kernels of resets and steps, for `load_modules`; what is missed loads when launched."""
        kept = {name: wp.clone(array) for name, array in self._state_arrays().items()}
        try:
            return find_modules(self._launch_all)
        finally:
            for name, array in self._state_arrays().items():  # copies and fills are no kernels, and have been done
                wp.copy(array, kept[name])

    def first_rows(self, num_rows: int) -> Self:
        """Return the worlds of the first rows as an object of their own, in the same memory.

        It captures graphs of its own, which compute no more than these rows, and has its share of the contacts' space.
        Only one of such objects may be at work at a time, and none of them knows what worlds are at.
        """
        rows = object.__new__(type(self))
        vars(rows).update(vars(self))
        rows.num_worlds = num_rows
        rows._data = _first_worlds(self._data, num_rows)
        rows._model = copy.copy(self._model)
        for name in ("body_pos", "body_quat"):
            setattr(rows._model, name, _head(getattr(self._model, name), num_rows))
        for name, struct in _ROW_STRUCTS.items():
            whole, part = getattr(self, name), struct()
            for member in struct.vars:
                setattr(part, member, _head(getattr(whole, member), num_rows))
            setattr(rows, name, part)
        for name in _ROW_ARRAYS:
            setattr(rows, name, _head(getattr(self, name), num_rows))
        rows._substep = self._substep.for_rows(rows._model, rows._data)
        rows._step_graphs, rows._refresh_graph = [], None
        return rows

    def row_arrays(self) -> list[Any]:
        """Return the arrays, leading dimension N, of all that a row takes along where it is copied to."""
        data = self._data
        arrays = (*self._state_arrays().values(), self._world_task, self._has_diverged, data.overflow)
        return [*arrays, data.geom_xpos, data.geom_xmat]  # the latter for static geoms, which no step places

    def read_starts(self, starts: Sequence[EpisodeStart], init_states: InitStates) -> dict[str, Any]:
        """Return what `upload_starts` takes; nothing is touched.

        Raises:
            ValueError: a task is not among the scene's tasks given to the constructor.
            FileNotFoundError: states of this kind are not recorded for the suite.
        """
        check_tasks([start.task for start in starts], self._task_index)
        return self._start_values(starts, init_states)

    def upload_starts(self, rows: IntArray, values: dict[str, Any], *, settles: bool) -> None:
        """Write starts into rows, int64 [R]; `launch_starts` does the rest."""
        self._prepare()
        self._launch(
            kernels.write_start,
            len(rows),
            self._upload(kernels.Start, world=rows, **values),
            self._fixture_body_ids,
            self._live,
            self._memory,
            self._model.body_pos,
            self._model.body_quat,
            self._world_task,
            self._has_diverged,
            self._data.overflow,
        )
        is_reset = np.zeros(self.num_worlds, np.uint8)
        is_reset[rows] = 1
        self._is_active.assign(is_reset)
        if settles:
            actions = np.zeros(self._actions.shape, np.float32)
            actions[:, 0] = SETTLING_ACTION
            self._actions.assign(actions)
            self._is_reset.assign(is_reset)
            self._steps_left.fill_(NUM_SETTLING_STEPS + 1)

    def launch_starts(self, *, settles: bool, stream: Any = None) -> None:
        """Launch what makes episodes of starts that were written: compute, judge, observe, and settle or not.

        Args:
            settles: as `upload_starts` was told.
            stream: where to; None is the device's current one, to which everything else goes.
        """
        wp.capture_launch(self._refresh_graph, stream=stream)
        for _ in range(NUM_SETTLING_STEPS if settles else 0):
            wp.launch(
                kernels.begin_settling_step,
                dim=self.num_worlds,
                inputs=[self._is_reset, self._is_active, self._step],
                device=self.device,
                stream=stream,
            )
            self.launch_step(stream=stream)

    def upload_chunk(self, actions: FloatArray, is_active: BoolArray, steps_left: IntArray) -> None:
        """Give actions [N, C, 7], see `step`; `launch_step` runs the next step of them."""
        self._prepare()
        self._ran.zero_()
        self._successes.zero_()
        self._actions.assign(np.asarray(actions, np.float32))
        self._is_active.assign(is_active.astype(np.uint8))
        self._steps_left.assign(np.asarray(steps_left, np.int32))
        self._step.zero_()

    def launch_step(self, *, stream: Any = None) -> None:
        """Launch the next step of the chunk on a stream; None is the device's current one."""
        for graph in self._step_graphs:
            wp.capture_launch(graph, stream=stream)

    def read_chunk(self) -> Steps:
        """Return what the chunk came to, waiting for it."""
        return Steps(self._ran.numpy().astype(np.bool_), self._successes.numpy().astype(np.bool_))

    def read_faults(self) -> tuple[BoolArray, npt.NDArray[np.int32]]:
        """Return which worlds have diverged, bool [N], and what did not fit, int32 [N]; see `raise_on_faults`."""
        return self._has_diverged.numpy().astype(np.bool_), self._data.overflow.numpy()

    def read_row(self, row: int) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a world's state, copied."""
        return {name: _row(array, row).numpy()[0].copy() for name, array in self._state_arrays().items()}

    def read_rows(self, num_rows: int) -> list[dict[str, npt.NDArray[Any]]]:
        """Return `read_row` of the first rows, with one download of each array."""
        arrays = {name: array.numpy() for name, array in self._state_arrays().items()}
        return [{name: array[row].copy() for name, array in arrays.items()} for row in range(num_rows)]

    def read_state(self, state: Mapping[str, npt.NDArray[Any]]) -> tuple[TaskSpec, dict[str, npt.NDArray[Any]]]:
        """Return the task and the entries of a state that may be restored.

        Raises:
            ValueError: see `set_state`.
        """
        layout = IDENTITY | self._state_layout
        check_keys(state, layout)
        task = check_scene(state, self.scene)
        check_tasks([task], self._task_index)
        return task, check_entries(state, layout)

    def write_row(self, row: int, task: TaskSpec, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore a state from `read_state` in a row."""
        for name, array in self._state_arrays().items():
            _row(array, row).assign(state[name][None])
        _row(self._world_task, row).fill_(self._task_index[task])
        _row(self._data.overflow, row).zero_()
        _row(self._has_diverged, row).zero_()
        self._forward()

    def _identity(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return the part of a world's state that says what it is a state of.

        Raises:
            ValueError: the world was never reset.
        """
        task = self._current_tasks[world_id]
        if task is None:
            raise ValueError("reset() must be called first")
        return state_identity(self.scene, task, int(self._init_state_ids[world_id]))

    def _state_arrays(self) -> dict[str, Any]:
        """Arrays with leading dimension N that make up the worlds' states."""
        self._owner.check()
        arrays = {name: getattr(self._memory, name) for name in kernels.Memory.vars}
        arrays |= {f"observed_{name}": getattr(self._observed, name) for name in kernels.Observed.vars}
        return arrays | {
            "qpos": self._live.qpos,
            "qvel": self._live.qvel,
            "qacc_warmstart": self._live.qacc_warmstart,
            "body_pos": self._model.body_pos,
            "body_quat": self._model.body_quat,
            "success": self._is_success,
            "is_lit": self._is_lit,
        }

    @functools.cached_property
    def _state_layout(self) -> dict[str, Entry]:
        """What each array of a world's state is like."""
        return {name: Entry.of(_row(array, 0).numpy()[0]) for name, array in self._state_arrays().items()}

    def _start_values(self, starts: Sequence[EpisodeStart], init_states: InitStates) -> dict[str, Any]:
        """Return the arrays of `warp_kernels.Start` apart from `world`."""
        count, nq, nv = len(starts), self._live.qpos.shape[1], self._live.qvel.shape[1]
        values: dict[str, Any] = {
            "task": np.array([self._task_index[start.task] for start in starts]),
            "qpos": np.empty((count, nq)),
            "qvel": np.empty((count, nv)),
            "qacc_warmstart": np.zeros((count, nv)),
            "fixture_poses": np.empty((count, len(self.scene.fixture_body_ids), 7)),
            "goal_pos": np.tile(self._creation.ee_pos, (count, 1)),
            "goal_ori": np.tile(self._creation.ee_ori, (count, 1, 1)),
            "gripper": np.zeros((count, 2)),
            "is_fresh": np.full(count, int(init_states == "original")),
        }
        for row, start in enumerate(starts):
            index = start.init_state_id
            if init_states != "original":
                recorded = load_recorded_states(start.task, init_states)
                physics, controller = recorded.physics[index], recorded.controller[index]
                values["fixture_poses"][row] = recorded.fixture_poses[index]
                values["goal_pos"][row] = controller[:3]
                values["goal_ori"][row] = controller[3:12].reshape(3, 3)
                values["gripper"][row] = controller[12:]
            else:
                task_data = load_task_data(self.scene, start.task)
                physics = task_data.init_states[index, 1:]  # time comes first
                values["fixture_poses"][row] = task_data.fixture_sampler.sample(
                    np.random.RandomState(start.placement_seed), self._default_fixture_poses
                )
            values["qpos"][row], values["qvel"][row] = physics[:nq], physics[nq:]
        return values

    def _refresh(self) -> None:
        """Launch what computes, judges and observes states that were written."""
        self._forward()
        self._judge()
        self._begin_step()
        self._launch(kernels.observe_poses, self._observed.body_pos.shape, *self._observing)
        self._launch(kernels.observe_fingers, self.num_worlds, *self._observing)

    def _forward(self) -> None:
        """Compute poses and contacts of the present positions in all worlds."""
        geoms, model, data = self._static_geoms, self._model, self._data
        self._substep.place_bodies()
        self._launch(
            kernels.place_static_geoms,
            (self.num_worlds, len(geoms)),
            geoms,
            model.geom_bodyid,
            model.geom_pos,
            self._geom_mat,
            self._live,
            data.geom_xpos,
            data.geom_xmat,
        )
        self._substep.find_contacts()

    def _prepare(self) -> None:
        """Capture a reset and an environment step as graphs, once.

        Their kernels are launched before, with all worlds idle, to load them.
        """
        if self._refresh_graph is not None:
            return
        if not self._has_launched:
            self._launch_all()
            self._has_launched = True
        self._refresh_graph, self._step_graphs = self._capture(self._refresh), self._capture_step()

    def _capture_step(self) -> list[Any]:
        """Return the graphs of an environment step, to be launched in turn.

        On a GPU it is one graph. A CPU gains nothing by that, and equal substeps are captured once.
        """
        if not wp.get_device(self.device).is_cpu:
            return [self._capture(self._launch_step)]
        first, *middle, before_last, last = (functools.partial(self._launch_substep, i) for i in range(SUBSTEPS))
        parts = (self._begin_step, first, middle[0], before_last, last, self._end_step)
        begin, first, among, before_last, last, end = (self._capture(part) for part in parts)
        return [begin, first, *[among] * len(middle), before_last, last, end]

    def _capture(self, launch: Callable[[], None]) -> Any:
        with wp.ScopedCapture(device=self.device) as capture:
            launch()
        return capture.graph

    def _launch_all(self) -> None:
        """Launch the kernels of resets and of steps, with all worlds idle."""
        self._is_active.zero_()
        self._step.zero_()
        self._refresh()
        self._begin_step()
        self._launch_substep(0)  # the others launch the same kernels
        self._end_step()

    def _launch_step(self) -> None:
        """Launch the kernels of one environment step."""
        self._begin_step()
        for substep in range(SUBSTEPS):
            self._launch_substep(substep)
        self._end_step()

    def _launch_substep(self, substep: int) -> None:
        self._substep.run(functools.partial(self._control, substep))

    def _end_step(self) -> None:
        self._judge()
        self._launch(
            kernels.end_step,
            self.num_worlds,
            self._live,
            self._data.overflow,
            self._saved,
            self._step,
            self._is_active,
            self._is_success,
            self._steps_left,
            self._has_diverged,
            self._ran,
            self._successes,
        )
        self._launch(kernels.next_step, 1, self._step)

    def _begin_step(self) -> None:
        inputs = (self._live, self._data.overflow, self._saved, self._is_active, self._is_lit, self._observed)
        self._launch(kernels.begin_step, self.num_worlds, *inputs)

    def _control(self, substep: int) -> None:
        """Run LIBERO's controller, between what MuJoCo calls `mj_step1` and `mj_step2`."""
        # Sensors hold the values after substep 24 of 25, whose poses are those of the positions before it.
        if substep == SUBSTEPS - 2:
            self._launch(kernels.observe_poses, self._observed.body_pos.shape, *self._observing)
        elif substep == SUBSTEPS - 1:
            self._launch(kernels.observe_fingers, self.num_worlds, *self._observing)
        self._launch(
            kernels.control,
            self.num_worlds,
            self._arm,
            self._controller_start,
            self._memory,
            self._live,
            self._actions,
            self._step,
            self._is_active,
            int(substep == 0),
        )

    def _judge(self) -> None:
        contact = self._data.contact
        self._touched.zero_()
        self._launch(
            kernels.mark_touching,
            contact.geom.shape[0],
            self._goals,
            self._world_task,
            self._data.nacon,
            contact.geom,
            contact.worldid,
            self._touched,
        )
        self._launch(
            kernels.judge,
            self.num_worlds,
            self._goals,
            self._indicators,
            self._live,
            self._world_task,
            self._touched,
            self._is_active,
            self._is_success,
            self._is_lit,
        )

    @property
    def _observing(self) -> tuple[Any, ...]:
        return self._arm, self._live, self._is_active, self._observed

    def _launch(self, kernel: Any, dim: Any, *inputs: Any) -> None:
        wp.launch(kernel, dim=dim, inputs=list(inputs), device=self.device)

    def _zeros(self, shape: Any, dtype: Any) -> Any:
        return wp.zeros(shape, dtype=dtype, device=self.device)

    def _allocate(self, struct: Any, lead: tuple[int, ...], **shapes: tuple[int, ...]) -> Any:
        """Return a kernel struct of zeros; its arrays have the shape `lead` unless `shapes` names another."""
        result = struct()
        for name, variable in struct.vars.items():
            setattr(result, name, self._zeros(shapes.get(name, lead), variable.type.dtype))
        return result

    def _upload(self, struct: Any, **values: Any) -> Any:
        """Return a kernel struct with `values`, NumPy arrays becoming arrays on the device."""
        result = struct()
        for name, variable in struct.vars.items():
            value = values[name]
            if isinstance(value, np.ndarray):
                value = wp.array(value, dtype=variable.type.dtype, device=self.device)
            setattr(result, name, value)
        return result


def choose_device(device: str | None) -> str:
    """Return Warp's name of a device; None is CUDA if it is there, and else the CPU, with a warning.

    Raises:
        ValueError: Warp has no such device.
    """
    chosen = default_device() if device is None else device
    if chosen not in list_devices():
        raise ValueError(f"Warp has no device {chosen!r} (valid: {list_devices()})")
    if device is None and chosen == "cpu":
        logger.warning(
            "physics='warp' finds no CUDA device and simulates on the CPU, as tests do: it compiles for a minute or "
            "more the first time, and is much slower than physics='cpu'"
        )
    return chosen


def check_tasks(tasks: Sequence[TaskSpec], known: Collection[TaskSpec]) -> None:
    """Raise ValueError unless all of `tasks` are among `known`, the tasks that worlds can be reset to."""
    unknown = sorted({f"{task.suite}/{task.task_id}" for task in tasks if task not in known})
    if unknown:
        valid = [f"{task.suite}/{task.task_id}" for task in known]
        raise ValueError(f"tasks {unknown} are not among those of these worlds (valid: {valid})")


def raise_on_faults(has_diverged: BoolArray, overflow: npt.NDArray[np.int32]) -> None:
    """Raise PhysicsError if a world has diverged (bool [N]), or lost something that did not fit (int32 [N], bits)."""
    diverged = np.flatnonzero(has_diverged)
    if len(diverged):
        raise PhysicsError(
            f"the simulation diverged in worlds {diverged.tolist()}; the state is no longer valid: reset them, and "
            "check that actions are within -1..1"
        )
    for kind, loss in _LOSSES.items():
        worlds = np.flatnonzero(overflow & int(kind))
        if len(worlds):
            raise PhysicsError(
                f"{loss} in worlds {worlds.tolist()}; the state is no longer valid: reset them, and make the "
                "worlds with larger WarpOptions"
            )


def state_identity(scene: Scene, task: TaskSpec, init_state_id: int) -> dict[str, npt.NDArray[Any]]:
    """Return the part of a world's state that says what it is a state of."""
    return {
        "scene": np.array(scene.key),
        "suite": np.array(task.suite),
        "task_id": np.array(task.task_id),
        "init_state_id": np.array(init_state_id),
    }


# What of `WarpWorlds` has a row for each world.
_ROW_STRUCTS = {
    "_live": kernels.Live,
    "_memory": kernels.Memory,
    "_observed": kernels.Observed,
    "_saved": kernels.Saved,
}
_ROW_ARRAYS = (
    "_is_lit",
    "_touched",
    "_world_task",
    "_actions",
    "_is_reset",
    "_is_active",
    "_is_success",
    "_has_diverged",
    "_steps_left",
    "_ran",
    "_successes",
)


def _head(array: Any, num: int) -> Any:
    """Return the first rows of an array, in the same memory; one without elements, which Warp cannot cut, as is."""
    return array[:num] if array.size else array


def _row(array: Any, row: int) -> Any:
    """Return one row of an array, as an array of one row in the same memory; one without elements as is."""
    return array[row : row + 1] if array.size else array


def _first_worlds(data: Any, num_worlds: int) -> Any:
    """Return MuJoCo Warp's `Data` of its first worlds, in the same memory, with their share of the contacts' space."""
    sizes = {"nworld": num_worlds}
    for name in ("naconmax", "naccdmax"):
        sizes[name] = getattr(data, name) * num_worlds // data.nworld

    def cut(values: Any) -> Any:
        part = copy.copy(values)
        for entry in dataclasses.fields(values):
            value, shape = getattr(values, entry.name), getattr(entry.type, "shape", None)
            if dataclasses.is_dataclass(value):
                setattr(part, entry.name, cut(value))
            elif value is not None and shape and shape[0] in sizes:
                setattr(part, entry.name, _head(value, sizes[shape[0]]))
        return part

    first = cut(data)
    for name, size in sizes.items():
        setattr(first, name, size)
    return first


def axis_angles(quat_wxyz: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return axis-angles [N, 3] in rad, of lengths 0 to 2 pi, of unit quaternions [N, 4].

    The same as `libero_gym.physics.controller.axis_angle_from_quat`, by an arc tangent, which float32 does not spoil
    near the identity.
    """
    w, xyz = quat_wxyz[:, :1].astype(np.float64), quat_wxyz[:, 1:].astype(np.float64)
    sine = np.linalg.norm(xyz, axis=1, keepdims=True)
    scale = np.where(sine > 0, 2.0 * np.arctan2(sine, w) / np.maximum(sine, 1e-30), 0.0)
    return (xyz * scale).astype(np.float32)


def _resting_qpos(model: mujoco.MjModel, init_state: FloatArray) -> npt.NDArray[np.float32]:
    """Return positions [nq] of a stored state (time comes first), objects hung up apart, where they touch nothing."""
    qpos = init_state[1 : 1 + model.nq].astype(np.float32)
    for number, address in enumerate(model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]):
        qpos[address : address + 3] = (0.0, 0.0, 10.0 + number)
    return qpos


def _arm_values(scene: Scene) -> dict[str, Any]:
    robot, model = scene.robot, scene.physics_model
    values: dict[str, Any] = {name: getattr(robot, name) for name in vars(robot) if name in kernels.Arm.vars}
    return values | {
        "qpos_adr": robot.arm_qpos_adr,
        "dof_adr": robot.arm_dof_adr,
        "actuator_ids": robot.arm_actuator_ids,
        "inertia_adr": inertia_addresses(model, robot),
        "finger_qpos_adr": robot.gripper_qpos_adr,
        "finger_actuator_ids": robot.gripper_actuator_ids,
        "eef_root_id": int(model.body_rootid[model.site_bodyid[robot.eef_site_id]]),
        "nullspace_stiffness": NULLSPACE_STIFFNESS,
        "nullspace_damping": 2.0 * math.sqrt(NULLSPACE_STIFFNESS),
    }


def _creation_values(creation: ArmKinematics) -> dict[str, Any]:
    jac = np.vstack([creation.jac_pos, creation.jac_ori])
    return {
        "ee_pos": wp.vec3(*creation.ee_pos),
        "ee_ori": wp.mat33(*creation.ee_ori.ravel()),
        "jac": kernels.mat67(*jac.ravel()),
        "mass": kernels.mat77(*creation.mass_matrix.ravel()),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Atom:
    """A goal atom as the kernels read it; `touches` are names of objects, `joint_qpos_adr` addresses in qpos."""

    kind: int
    bodies: tuple[int, int] = (-1, -1)
    site: int = -1
    size: FloatArray = field(default_factory=lambda: np.zeros(3))
    touches: tuple[str, str] | None = None
    joint_qpos_adr: tuple[int, ...] = ()
    test: JointTest | None = None
    is_any: bool = False


def _compile_atom(scene: Scene, atom: tuple[str, ...]) -> _Atom:
    """Translate an atom that `libero_gym.physics.predicates.Goal` has accepted."""
    predicate, *names = atom
    if predicate in ("on", "in"):
        thing = scene.objects[names[0]]
        if names[1] not in scene.sites:
            base = scene.objects[names[1]]
            bodies = (thing.body_id, base.body_id)
            return _Atom(kind=kernels.ON_OBJECT, bodies=bodies, touches=(base.name, thing.name))
        site = scene.sites[names[1]]
        wants_touch = predicate == "on" and site.parent is not None
        return _Atom(
            kind=kernels.ON_SITE if predicate == "on" else kernels.IN_SITE,
            bodies=(thing.body_id, -1),
            site=site.site_id,
            size=site.size,
            touches=(site.parent or "", thing.name) if wants_touch else None,
        )
    site = scene.sites.get(names[0])
    owner = scene.objects[names[0] if site is None else site.parent or ""]
    return _Atom(
        kind=kernels.JOINTS,
        joint_qpos_adr=owner.joint_qpos_adr if site is None else site.joint_qpos_adr,
        test=owner.joint_tests[predicate],
        is_any=predicate in ("open", "turnon"),
    )


def _goal_values(scene: Scene, tasks: Sequence[TaskSpec]) -> dict[str, Any]:
    goals = [[_compile_atom(scene, atom) for atom in load_task_data(scene, task).goal.atoms] for task in tasks]
    atoms = [atom for goal in goals for atom in goal]
    names = sorted({name for atom in atoms for name in atom.touches or ()})
    # A row of zeros stands in where no goal wants contact: arrays of no size have no address.
    touching = [scene.objects[name].contact_mask for name in names] or [np.zeros(scene.physics_model.ngeom)]
    return {
        "task_first": np.cumsum([0, *(len(goal) for goal in goals)]),
        "kind": np.array([atom.kind for atom in atoms]),
        "bodies": np.array([atom.bodies for atom in atoms]),
        "site": np.array([atom.site for atom in atoms]),
        "size": np.array([atom.size for atom in atoms]),
        "things": np.array([[names.index(n) for n in atom.touches] if atom.touches else (-1, -1) for atom in atoms]),
        "touching": np.array(touching, dtype=np.uint8),
        "is_any": np.array([atom.is_any for atom in atoms], dtype=np.uint8),
        "on_object_radius": predicates.ON_OBJECT_RADIUS,
        "on_site_slack": predicates.ON_SITE_SLACK,
        "on_site_height": predicates.ON_SITE_HEIGHT,
        "in_site_slack": predicates.IN_SITE_SLACK,
        **_joint_values([(atom.joint_qpos_adr, atom.test) for atom in atoms]),
    }


def _indicator_values(scene: Scene) -> dict[str, Any]:
    things = [thing for thing in scene.objects.values() for _ in thing.indicator_site_ids]
    return _joint_values([(thing.joint_qpos_adr, thing.joint_tests["turnon"]) for thing in things])


def _joint_values(entries: Sequence[tuple[tuple[int, ...], JointTest | None]]) -> dict[str, Any]:
    tests = [test or JointTest(value=0.0, above=True, inclusive=False) for _, test in entries]
    return {
        "joint_first": np.cumsum([0, *(len(addresses) for addresses, _ in entries)]),
        "joint_adr": np.array([address for addresses, _ in entries for address in addresses], dtype=np.int32),
        "threshold": np.array([test.value for test in tests], dtype=np.float32),
        "is_above": np.array([test.above for test in tests], dtype=np.uint8),
        "is_inclusive": np.array([test.inclusive for test in tests], dtype=np.uint8),
    }


def _matrices(quat_wxyz: FloatArray) -> FloatArray:
    """Return the rotation matrices [num, 3, 3] of quaternions [num, 4]."""
    matrices = np.empty((len(quat_wxyz), 9))
    for matrix, quat in zip(matrices, quat_wxyz, strict=True):
        mujoco.mju_quat2Mat(matrix, quat)
    return matrices.reshape(-1, 3, 3)
