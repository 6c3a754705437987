"""Physics on the GPU for worlds of several scenes: one group of rows for each scene, all groups stepped at once.

Worlds of a scene are rows of a `libero_gym.physics.warp_worlds.WarpWorlds`. A world that is reset to a task of another
scene takes a row there and gives up its own, which another newcomer gets, or else the last row that is in use: the rows
in use are always the first ones. Memory is reserved for a quarter more rows than are in use, and never given back; the
graph that is launched covers no more rows than are needed, and is one that was captured before, or a new one.

Groups run on streams of their own: nothing is read from the device while they run, and nothing is written to it. On a
CPU they run one after another.

A world moves as it does among worlds of its scene alone: on a CPU to the last bit in the same row of as many. Other
rows, and other numbers of them, change the order in which MuJoCo Warp adds up contacts, and so the rounding.

Shape legend: N worlds, C steps of an action chunk, R worlds that are reset, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import warp as wp

from libero_gym.conventions import ACTION_DIM, STATE_DIM
from libero_gym.fork import Owner, Uncopied
from libero_gym.physics import warp_kernels as kernels
from libero_gym.physics.simulation import PhysicsError
from libero_gym.physics.states import read_task
from libero_gym.physics.warp_loading import load_modules
from libero_gym.physics.warp_worlds import (
    WarpOptions,
    WarpWorlds,
    check_tasks,
    choose_device,
    raise_on_faults,
    state_identity,
)
from libero_gym.physics.worlds import BoolArray, FloatArray, IntArray, Steps
from libero_gym.rendering.protocol import Views
from libero_gym.rendering.raycast import DevicePoses
from libero_gym.tasks.initial_states import EpisodeStart, InitStates
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec

# Rows that are reserved: a quarter more than are needed, in multiples of this.
_RESERVE, _RESERVE_STEP = 1.25, 32
# A new graph is captured over a few more rows than are in use, in multiples of this; one that was captured before is
# taken rather, if it has no more rows than that, or at most so many times those in use.
_SURPLUS, _ROWS_STEP, _MAX_SURPLUS = 1.05, 8, 1.25
# Graphs kept for a scene, those used last: 64 worlds on average, tasks being drawn alike, call for six in all.
_MAX_GRAPHS = 8
# Threads that copy one row of one array.
_COPY_LANES = 32


def make_warp_worlds(
    tasks: Sequence[TaskSpec],
    num_worlds: int,
    *,
    num_action_chunks: int = 1,
    device: str | None = None,
    options: WarpOptions | None = None,
) -> WarpWorlds | GroupedWarpWorlds:
    """Return N worlds that can be at any of `tasks`: a `WarpWorlds` if these share a scene, which takes no rows apart.

    Args:
        tasks: of any scenes and suites.
        num_worlds: N.
        num_action_chunks: C.
        device: see `WarpWorlds`.
        options: see `WarpWorlds`.

    Raises:
        ValueError: Warp has no such device.
    """
    scenes = load_scenes(tasks)
    if len({scene.key for scene in scenes}) == 1:
        return WarpWorlds(
            scenes[0], tasks, num_worlds, num_action_chunks=num_action_chunks, device=device, options=options
        )
    return GroupedWarpWorlds(tasks, num_worlds, num_action_chunks=num_action_chunks, device=device, options=options)


class GroupedWarpWorlds(Uncopied):
    """N worlds of several scenes on one device; each is at a task and a state of its own.

    See `libero_gym.physics.worlds.Worlds`, which this implements.

    Attributes:
        tasks: tasks that a world can be reset to.
        num_worlds: N.
        device: Warp's name of the device.
    """

    _HOW_TO_MAKE_ANOTHER = (
        "make other worlds with the same arguments, and give them these worlds' get_states by set_state"
    )

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        num_worlds: int,
        *,
        num_action_chunks: int = 1,
        device: str | None = None,
        options: WarpOptions | None = None,
    ) -> None:
        """Load the scenes; memory is allocated, and kernels are compiled, for those that worlds are reset to.

        Args:
            tasks: of any scenes and suites.
            num_worlds: N.
            num_action_chunks: C.
            device: see `WarpWorlds`.
            options: see `WarpWorlds`.

        Raises:
            ValueError: Warp has no such device.
        """
        self.device = choose_device(device)
        self._owner = Owner("the simulated worlds")
        self.tasks = tuple(tasks)
        self.num_worlds = num_worlds
        self._num_chunks = num_action_chunks
        tasks_of_scene: dict[str, list[TaskSpec]] = {}
        scenes: dict[str, Scene] = {}
        scene_of_task = dict(zip(tasks, load_scenes(tasks), strict=True))
        for task, scene in scene_of_task.items():
            tasks_of_scene.setdefault(scene.key, []).append(task)
            scenes[scene.key] = scene
        self._groups = [
            _Group(
                scenes[key],
                members,
                num_worlds,
                num_action_chunks=num_action_chunks,
                device=self.device,
                options=options,
            )
            for key, members in tasks_of_scene.items()
        ]
        group_of_scene = {key: i for i, key in enumerate(tasks_of_scene)}
        self._group_of_task = {task: group_of_scene[scene.key] for task, scene in scene_of_task.items()}

        # Where each world is; -1 where it was never reset.
        self._group_ids = np.full(num_worlds, -1, np.int64)
        self._rows = np.full(num_worlds, -1, np.int64)
        self._current_tasks: list[TaskSpec | None] = [None] * num_worlds
        self._init_state_ids = np.full(num_worlds, -1, np.int64)

    @property
    def current_tasks(self) -> list[TaskSpec | None]:
        """Task of each world, None where it was never reset."""
        return list(self._current_tasks)

    @property
    def init_state_ids(self) -> IntArray:
        """int64 [N], initial state that each world was reset to, -1 where it never was."""
        return self._init_state_ids.copy()

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes, in the order in which `tasks` first name them."""
        return tuple(group.scene for group in self._groups)

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows that a step computes for each of `scenes`: the worlds there and a few idle ones; 0 where there are none.

        Every other number of a scene costs the capture of a graph, once.
        """
        return tuple(group.rows.num_worlds if group.count else 0 for group in self._groups)

    def reset(self, world_ids: IntArray, starts: Sequence[EpisodeStart], *, init_states: InitStates) -> None:
        """Start episodes, objects at rest, in any of the scenes; see `WarpWorlds.reset`.

        Raises:
            ValueError: a task is not among those given to the constructor. No world has been touched.
            FileNotFoundError: states of this kind are not recorded for the suite. No world has been touched.
            PhysicsError: a world diverged or ran out of space while settling; the others have been reset.
        """
        self._owner.check()
        if not len(world_ids):
            return
        settles = init_states == "original"
        group_ids = self._find_groups([start.task for start in starts])
        self._reserve(world_ids, group_ids)
        chosen = [(self._groups[i], np.flatnonzero(group_ids == i)) for i in np.unique(group_ids).tolist()]
        values = [
            group.worlds.read_starts([starts[i] for i in members.tolist()], init_states) for group, members in chosen
        ]

        self._place(world_ids, group_ids)
        for i, start in zip(world_ids.tolist(), starts, strict=True):
            self._current_tasks[i] = start.task
            self._init_state_ids[i] = start.init_state_id
        groups = [group for group, _ in chosen]
        for (group, members), values_of_group in zip(chosen, values, strict=True):
            group.rows.upload_starts(self._rows[world_ids[members]], values_of_group, settles=settles)
        self._launch(groups, lambda group: group.rows.launch_starts(settles=settles, stream=group.stream))
        if settles:
            self._raise_on_faults(groups)

    def step(
        self,
        actions: FloatArray,
        is_active: BoolArray,
        steps_left: IntArray,
        *,
        out: Steps | None = None,
        on_part_done: Callable[[IntArray], None] | None = None,
    ) -> Steps:
        """Run up to C steps in each active world; see `WarpWorlds.step`. A scene without active worlds costs nothing.

        Raises:
            ValueError: an active world was never reset.
            PhysicsError: a world diverged or ran out of space; it must be reset.
        """
        self._owner.check()
        steps = Steps.none(self.num_worlds, self._num_chunks) if out is None else out
        fresh = np.flatnonzero(is_active & (self._group_ids < 0))
        if len(fresh):
            raise ValueError(f"worlds {fresh.tolist()} were never reset")
        groups = [self._groups[i] for i in np.unique(self._group_ids[is_active]).tolist()]
        for group in groups:
            ids = group.world_ids
            group.rows.upload_chunk(
                group.fill(actions[ids], (self._num_chunks, ACTION_DIM)),
                group.fill(is_active[ids]),
                group.fill(steps_left[ids]),
            )
        self._launch(groups, lambda group: group.rows.launch_step(stream=group.stream), times=self._num_chunks)
        for group in groups:
            ran, successes = group.rows.read_chunk()
            steps.ran[group.world_ids] = ran[: group.count]
            steps.successes[group.world_ids] = successes[: group.count]
        self._raise_on_faults(groups)
        return steps

    def success(self) -> BoolArray:
        """Return bool [N], whether the goal held at the end of the last step."""
        self._owner.check()
        successes = np.zeros(self.num_worlds, np.bool_)
        for group in self._used_groups():
            successes[group.world_ids] = group.rows.success()[: group.count]
        return successes

    def states(self, world_ids: IntArray | None = None) -> npt.NDArray[np.float32]:
        """Return the observed proprioception of some worlds (None: all), float32 [num, 8]; see `Worlds.states`.

        Raises:
            ValueError: one of them was never reset.
        """
        ids = np.arange(self.num_worlds) if world_ids is None else world_ids
        states = np.empty((len(ids), STATE_DIM), np.float32)
        for group, members in self._split(ids):
            states[members] = group.rows.states(self._rows[ids[members]])
        return states

    def poses(self, world_ids: IntArray) -> list[DevicePoses]:
        """Return what the images of some worlds show, on the device, scene by scene.

        Raises:
            ValueError: one of them was never reset.
        """
        return [
            group.rows.poses(self._rows[world_ids[members]], places=members)
            for group, members in self._split(world_ids)
        ]

    def views(self, renderer: Any, world_ids: IntArray, *, as_torch: bool) -> Views:
        """Return what a `WarpRenderer` draws of some worlds on the device; see `Worlds.views`."""
        return renderer.views_of_poses(*self.poses(world_ids), as_torch=as_torch)

    def get_state(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return everything that decides a world's future and what it shows; see `Worlds.get_state`."""
        self._owner.check()
        identity = self._identity(world_id)
        group = self._groups[self._group_ids[world_id]]
        return identity | group.worlds.read_row(int(self._rows[world_id]))

    def get_states(self) -> list[dict[str, npt.NDArray[Any]]]:
        """Return `get_state` of all worlds, with one download of each array of each scene."""
        self._owner.check()
        identities = [self._identity(i) for i in range(self.num_worlds)]
        states: list[dict[str, npt.NDArray[Any]]] = [{} for _ in identities]
        for group in self._used_groups():
            for world_id, row in zip(group.world_ids.tolist(), group.rows.read_rows(group.count), strict=True):
                states[world_id] = identities[world_id] | row
        return states

    def check_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if `set_state` would take a state; see `Worlds.check_state`."""
        self._owner.check()
        group_ids = self._find_groups([read_task(state)])
        self._reserve(np.array([world_id]), group_ids)
        self._groups[int(group_ids[0])].worlds.read_state(state)

    def set_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `get_state` returned, also of another scene; see `Worlds.set_state`.

        Raises:
            ValueError: an entry is missing, surplus, of another type or shape, or not finite, or the state belongs to
                a task that is not among those of these worlds, or to other versions. No world has been touched.
        """
        self._owner.check()
        world_ids, group_ids = np.array([world_id]), self._find_groups([read_task(state)])
        self._reserve(world_ids, group_ids)
        group = self._groups[int(group_ids[0])]
        task, checked = group.worlds.read_state(state)
        self._place(world_ids, group_ids)
        group.rows.write_row(int(self._rows[world_id]), task, checked)
        self._current_tasks[world_id] = task
        self._init_state_ids[world_id] = int(checked["init_state_id"])

    def physics_error(self, world_id: int, reason: str, action: npt.NDArray[np.float64]) -> PhysicsError:
        """Return the error to raise for an action; the state is not dumped."""
        return PhysicsError(reason)

    def close(self) -> None:
        """Release what was captured and allocated, in the process that made it; a second call does nothing."""
        if self._owner.is_this_process:
            for group in self._groups:
                group.close()

    def _used_groups(self) -> list[_Group]:
        return [group for group in self._groups if group.count]

    def _find_groups(self, tasks: Sequence[TaskSpec]) -> IntArray:
        """Return the group of each task, int64 [len(tasks)]."""
        check_tasks(tasks, self._group_of_task)
        return np.array([self._group_of_task[task] for task in tasks], np.int64)

    def _split(self, world_ids: IntArray) -> list[tuple[_Group, IntArray]]:
        """Return each group that has some of the worlds, with their places in `world_ids`."""
        self._owner.check()
        group_ids = self._group_ids[world_ids]
        if (group_ids < 0).any():
            raise ValueError(f"worlds {world_ids[group_ids < 0].tolist()} were never reset")
        return [(self._groups[i], np.flatnonzero(group_ids == i)) for i in np.unique(group_ids).tolist()]

    def _reserve(self, world_ids: IntArray, group_ids: IntArray) -> None:
        """Allocate what it takes to move worlds into groups, and load the kernels of all that is new side by side."""
        final = self._group_ids.copy()
        final[world_ids] = group_ids
        counts = np.bincount(final[final >= 0], minlength=len(self._groups))
        grown = [group for group, count in zip(self._groups, counts.tolist(), strict=True) if group.reserve(count)]
        # Scenes share most of their kernels, and rows all of them.
        found = (module for group in grown if group.is_new for module in group.worlds.find_kernels())
        modules = {(id(module), block_size): (module, device, block_size) for module, device, block_size in found}
        if modules:
            load_modules(list(modules.values()))
        for group in grown:
            group.take_over()

    def _place(self, world_ids: IntArray, group_ids: IntArray) -> None:
        """Give worlds rows in groups; those of a world that stays in its group stay what they are."""
        moves = self._group_ids[world_ids] != group_ids
        moving, targets = world_ids[moves], group_ids[moves]
        origins, freed = self._group_ids[moving], self._rows[moving]
        for i in np.union1d(targets, origins[origins >= 0]).tolist():
            group = self._groups[i]
            group.exchange(freed[origins == i], moving[targets == i])
            self._rows[group.world_ids] = np.arange(group.count)
        self._group_ids[moving] = targets

    def _launch(self, groups: Sequence[_Group], launch: Callable[[_Group], None], *, times: int = 1) -> None:
        """Launch something on each group's stream, so many times: after what came before, before what comes after.

        The device's current stream stays what it is, because other threads launch to it.
        """
        streams = [group.stream for group in groups if group.stream is not None]
        for stream in streams:
            stream.wait_stream(wp.get_stream(self.device))
        for _ in range(times):
            for group in groups:
                launch(group)
        for stream in streams:
            wp.get_stream(self.device).wait_stream(stream)

    def _raise_on_faults(self, groups: Iterable[_Group]) -> None:
        has_diverged, overflow = np.zeros(self.num_worlds, np.bool_), np.zeros(self.num_worlds, np.int32)
        for group in groups:
            diverged_rows, overflow_rows = group.rows.read_faults()
            has_diverged[group.world_ids] = diverged_rows[: group.count]
            overflow[group.world_ids] = overflow_rows[: group.count]
        raise_on_faults(has_diverged, overflow)

    def _identity(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        task = self._current_tasks[world_id]
        if task is None:
            raise ValueError("reset() must be called first")
        scene = self._groups[self._group_ids[world_id]].scene
        return state_identity(scene, task, int(self._init_state_ids[world_id]))


class _Group:
    """The worlds of one scene: rows of a `WarpWorlds`, the first `count` of which are in use.

    Attributes:
        scene: the scene.
        tasks: tasks of the scene.
        count: worlds of the scene.
        stream: where the group runs; None on a CPU.
    """

    def __init__(self, scene: Scene, tasks: Sequence[TaskSpec], max_rows: int, **options: Any) -> None:
        """Allocate nothing yet; `options` are those of `WarpWorlds`, which never has more than `max_rows`."""
        self.scene = scene
        self.tasks = tuple(tasks)
        self.count = 0
        self.stream = None if options["device"] == "cpu" else wp.Stream(options["device"])
        self._max_rows = max_rows
        self._options = options
        self._device = options["device"]
        self._world_ids = np.full(max_rows, -1, np.int64)
        self._worlds: WarpWorlds | None = None
        self._parts: dict[int, WarpWorlds] = {}  # by their number of rows, those used last at the end
        # Tables name arrays by address: what holds the arrays is kept beside them.
        self._table: Any = None
        self._resting: Any = None  # of a single row that is at rest and has no task
        self._resting_arrays: list[Any] = []
        self._outgrown: Any = None  # what rows are still to be taken over from
        self._outgrown_worlds: WarpWorlds | None = None

    @property
    def world_ids(self) -> IntArray:
        """int64 [count], world of each row."""
        return self._world_ids[: self.count]

    @property
    def worlds(self) -> WarpWorlds:
        """All rows that are reserved.

        Raises:
            ValueError: the worlds are closed.
        """
        if self._worlds is None:
            raise ValueError("the worlds are closed; make other ones")
        return self._worlds

    @property
    def rows(self) -> WarpWorlds:
        """The first rows, `count` of them or a few more: what is launched, and all that needs an array of rows."""
        fresh = min(self.worlds.num_worlds, _multiple(_SURPLUS * self.count, _ROWS_STEP))
        limit = max(fresh, _MAX_SURPLUS * self.count)
        size = min((size for size in self._parts if self.count <= size <= limit), default=fresh)
        if size not in self._parts:
            self._parts[size] = self.worlds.first_rows(size)
            if len(self._parts) > _MAX_GRAPHS:
                wp.synchronize_device(self._device)  # the graph may be running
                del self._parts[next(iter(self._parts))]
        self._parts[size] = self._parts.pop(size)
        return self._parts[size]

    def fill(self, values: npt.NDArray[Any], shape: tuple[int, ...] = ()) -> npt.NDArray[Any]:
        """Return values of the worlds [count, ...], followed by zeros for the rows that `rows` has besides."""
        filled = np.zeros((self.rows.num_worlds, *shape), values.dtype)
        filled[: self.count] = values
        return filled

    def reserve(self, count: int) -> bool:
        """Allocate rows for so many worlds, if there are fewer; `take_over` makes them usable, kernels loaded."""
        if count == 0 or (self._worlds is not None and count <= self._worlds.num_worlds):
            return False
        num_rows = min(self._max_rows, _multiple(_RESERVE * count, _RESERVE_STEP))
        if self._worlds is not None:
            wp.synchronize_device(self._device)  # its graphs may be running
            self._parts.clear()
        self._outgrown, self._outgrown_worlds = self._table, self._worlds
        self._worlds = WarpWorlds(self.scene, self.tasks, num_rows, loads_kernels=False, **self._options)
        return True

    @property
    def is_new(self) -> bool:
        """Whether `reserve` has allocated the first rows and `take_over` has not been called since."""
        return self._worlds is not None and self._table is None

    def take_over(self) -> None:
        """Copy the rows in use from the memory that was outgrown."""
        arrays = [array for array in self.worlds.row_arrays() if array.size]
        self._table = self._tabulate(arrays)
        if self._resting is None:
            self._resting_arrays = [wp.clone(array[:1]) for array in arrays]
            self._resting = self._tabulate(self._resting_arrays)
        if self._outgrown is not None:
            self._copy(self._outgrown, np.arange(self.count), np.arange(self.count))
        self._outgrown = self._outgrown_worlds = None

    def exchange(self, freed: IntArray, joining: IntArray) -> None:
        """Let worlds leave the rows `freed` and others, `joining`, come in; newcomers' rows are not written.

        Rows in use stay the first ones. Worlds that neither leave nor come may get other rows.
        """
        freed = np.sort(freed)
        num_reused = min(len(freed), len(joining))
        appended = np.arange(self.count, self.count + len(joining) - num_reused)
        self._world_ids[np.concatenate([freed[:num_reused], appended])] = joining

        holes = freed[num_reused:]
        count = self.count + len(joining) - len(freed)
        targets = holes[holes < count]
        sources = np.setdiff1d(np.arange(count, self.count), holes)
        self._copy(self._table, sources, targets)
        self._world_ids[targets] = self._world_ids[sources]
        # Rows are computed even if they idle: what they hold must be harmless.
        left = np.arange(count, self.count)
        self._copy(self._resting, np.zeros_like(left), left)
        self.count = count

    def close(self) -> None:
        """Release memory and graphs."""
        self._parts.clear()
        self._worlds = self._table = self._resting = self._outgrown = None

    def _tabulate(self, arrays: Sequence[Any]) -> Any:
        """Return arrays [N, ...] as an array of `warp_kernels.Rows`, which does not keep them alive."""
        table: list[Any] = []
        for array in arrays:
            rows: Any = kernels.Rows()
            shape = (array.shape[0], array.strides[0])
            rows.data = wp.array(ptr=array.ptr, dtype=wp.uint8, shape=shape, device=self._device)
            table.append(rows)
        return wp.array(table, dtype=kernels.Rows, device=self._device)

    def _copy(self, source: Any, source_rows: IntArray, target_rows: IntArray) -> None:
        """Copy rows of a table into this group's."""
        if not len(source_rows):
            return
        wp.launch(
            kernels.copy_rows,
            dim=(len(source_rows), self._table.shape[0], _COPY_LANES),
            inputs=[
                source,
                wp.array(source_rows, dtype=int, device=self._device),
                self._table,
                wp.array(target_rows, dtype=int, device=self._device),
                _COPY_LANES,
            ],
            device=self._device,
        )


def _multiple(value: float, step: int) -> int:
    """Return the smallest multiple of `step` that is not less than `value`."""
    return int(-(-value // step)) * step
