"""LIBERO's physics for many worlds: `Simulation`s, stepped by a pool of threads.

Shape legend: N worlds, C steps of an action chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from libero_gym.conventions import CONTROL_FREQUENCY_HZ, ActionMode
from libero_gym.fork import Owner, Uncopied
from libero_gym.physics.simulation import PhysicsError, Simulation, Stepping
from libero_gym.physics.states import read_task
from libero_gym.physics.worlds import BoolArray, FloatArray, IntArray, Steps
from libero_gym.rendering.protocol import Views
from libero_gym.tasks.initial_states import EpisodeStart, InitStates
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec

# Worlds are reported as done in up to this many parts, of at least that many, each while later ones are still stepped.
_MAX_PARTS, _MIN_PART = 4, 8


class CpuWorlds(Uncopied):
    """N worlds of any scenes; each equals a `Simulation` to the last bit, whatever the number of threads.

    See `libero_gym.physics.worlds.Worlds`, which this implements.
    """

    _HOW_TO_MAKE_ANOTHER = (
        "make other worlds with the same arguments, and give them these worlds' get_states by set_state"
    )

    def __init__(
        self,
        num_worlds: int,
        *,
        stepping: Stepping = "exact",
        action_mode: ActionMode = "delta_pose",
        control_freq: int = CONTROL_FREQUENCY_HZ,
        num_threads: int = 1,
    ) -> None:
        """Start the threads; simulations are made by the first reset.

        Args:
            num_worlds: N.
            stepping: see `libero_gym.Simulation`.
            action_mode: see `LiberoEnv`.
            control_freq: environment steps a second.
            num_threads: threads to step and reset with; with one, the calling thread does it.
        """
        self._owner = Owner("the simulated worlds")
        self.num_worlds = num_worlds
        self._stepping: Stepping = stepping
        self._action_mode: ActionMode = action_mode
        self._control_freq = control_freq
        self._simulations: list[Simulation | None] = [None] * num_worlds
        # Kept from scenes that worlds have left, the last used last; at most one for each world.
        self._spare: list[Simulation] = []
        self._chunk_s = np.zeros(num_worlds)  # of a core, for the last chunk
        self._pool: ThreadPoolExecutor | None = None
        if min(num_threads, num_worlds) > 1:
            self._pool = ThreadPoolExecutor(min(num_threads, num_worlds), "libero-step")

    @property
    def simulations(self) -> tuple[Simulation, ...]:
        """The live simulation of each world.

        Raises:
            ValueError: a world was never reset.
        """
        return tuple(self._simulation(i) for i in range(self.num_worlds))

    @property
    def current_tasks(self) -> list[TaskSpec | None]:
        """Task of each world, None where it was never reset."""
        return [None if simulation is None else simulation.task for simulation in self._simulations]

    @property
    def init_state_ids(self) -> IntArray:
        """int64 [N], initial state that each world was reset to, -1 where it never was."""
        return np.array([-1 if simulation is None else simulation.init_state_id for simulation in self._simulations])

    def reset(self, world_ids: IntArray, starts: Sequence[EpisodeStart], *, init_states: InitStates) -> None:
        """Put worlds where episodes start; see `Worlds.reset`."""
        self._owner.check()
        scenes = load_scenes([start.task for start in starts])
        for i, scene in zip(world_ids.tolist(), scenes, strict=True):
            self._put_simulation(i, self._find_simulation(i, scene))
        starts_by_world = dict(zip(world_ids.tolist(), starts, strict=True))

        def begin(i: int) -> None:
            start = starts_by_world[i]
            random_state = np.random.RandomState(start.placement_seed)
            self._simulation(i).reset(start.task, start.init_state_id, random_state, init_states=init_states)

        futures = self._submit(begin, starts_by_world)
        wait(futures)
        _raise_first(futures)

    def step(
        self,
        actions: FloatArray,
        is_active: BoolArray,
        steps_left: IntArray,
        *,
        out: Steps | None = None,
        on_part_done: Callable[[IntArray], None] | None = None,
    ) -> Steps:
        """Run up to C steps in each active world; see `Worlds.step`.

        An error names its world. Of several, the first world's is raised, and its `dump` holds the state before.
        """
        self._owner.check()
        steps = Steps.none(self.num_worlds, actions.shape[1]) if out is None else out

        def run(i: int) -> None:
            started = time.thread_time()
            if is_active[i]:
                self._run_chunk(i, actions[i], int(steps_left[i]), steps)
            self._chunk_s[i] = time.thread_time() - started

        # What took longest the last time begins, so that the threads end together.
        order = np.argsort(-self._chunk_s, kind="stable")
        submitted = self._submit(run, order.tolist())
        futures = [submitted[k] for k in np.argsort(order)]
        try:
            if on_part_done is not None and self._pool is not None:
                for part in np.array_split(order, max(1, min(self.num_worlds // _MIN_PART, _MAX_PARTS))):
                    if any(futures[i].exception() for i in part):
                        break
                    on_part_done(part)
        finally:
            wait(futures)
        _raise_first(futures)
        return steps

    def success(self) -> BoolArray:
        """Return bool [N], whether the goal held at the end of the last step."""
        return np.array([simulation is not None and simulation.success() for simulation in self._simulations])

    def states(self, world_ids: IntArray | None = None) -> npt.NDArray[np.float32]:
        """Return the proprioception of some worlds, float32 [num, 8]; see `Worlds.states`."""
        ids = range(self.num_worlds) if world_ids is None else world_ids.tolist()
        return np.stack([self._simulation(i).states() for i in ids])

    def views(self, renderer: Any, world_ids: IntArray, *, as_torch: bool) -> Views:
        """Return what the renderer draws of some worlds; see `Worlds.views`."""
        simulations = [self._simulation(i) for i in world_ids.tolist()]
        return renderer.views(simulations, as_torch=True) if as_torch else renderer.views(simulations)

    def get_state(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return `Simulation.get_state` of a world."""
        return self._simulation(world_id).get_state()

    def get_states(self) -> list[dict[str, npt.NDArray[Any]]]:
        """Return `get_state` of all worlds."""
        return [self.get_state(i) for i in range(self.num_worlds)]

    def check_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if `set_state` would take a state; see `Worlds.check_state`."""
        self._owner.check()
        (scene,) = load_scenes([read_task(state)])
        simulation = self._find_simulation(world_id, scene)
        if simulation is not self._simulations[world_id] and simulation not in self._spare:
            self._keep(simulation)  # for the world that is set to the state
        simulation.check_state(state)

    def set_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `get_state` returned, to the last bit, also of another scene; see `Worlds.set_state`."""
        self._owner.check()
        (scene,) = load_scenes([read_task(state)])
        simulation = self._find_simulation(world_id, scene)
        simulation.set_state(state)  # raises before the world gives up its own
        self._put_simulation(world_id, simulation)

    def physics_error(self, world_id: int, reason: str, action: npt.NDArray[np.float64]) -> PhysicsError:
        """Return the error to raise for an action, having dumped the world's state and the action."""
        return self._simulation(world_id).physics_error(reason, action)

    def close(self) -> None:
        """Release threads and simulations; a second call does nothing."""
        if self._pool is not None and self._owner.is_this_process:  # a forked child has no such threads to wait for
            self._pool.shutdown()
        self._pool = None
        self._spare.clear()
        self._simulations = [None] * self.num_worlds

    def _simulation(self, world_id: int) -> Simulation:
        self._owner.check()
        simulation = self._simulations[world_id]
        if simulation is None:
            raise ValueError("reset() must be called first")
        return simulation

    def _find_simulation(self, world_id: int, scene: Scene) -> Simulation:
        """Return a simulation of `scene` for a world: its own, a spare one, or a new one."""
        candidates = (self._simulations[world_id], *self._spare)
        found = next((other for other in candidates if other is not None and other.scene is scene), None)
        if found is not None:
            return found
        return Simulation(
            scene, stepping=self._stepping, action_mode=self._action_mode, control_freq=self._control_freq
        )

    def _put_simulation(self, world_id: int, simulation: Simulation) -> None:
        """Give a world a simulation from `_find_simulation`, and keep its former one."""
        own = self._simulations[world_id]
        if own is simulation:
            return
        if simulation in self._spare:
            self._spare.remove(simulation)
        if own is not None:
            self._keep(own)
        self._simulations[world_id] = simulation

    def _keep(self, simulation: Simulation) -> None:
        self._spare.append(simulation)
        del self._spare[: -self.num_worlds]

    def _run_chunk(self, i: int, chunk: FloatArray, steps_left: int, steps: Steps) -> None:
        """Step world `i` until its chunk [C, A] or its episode ends, and note it in `steps`."""
        simulation = self._simulation(i)
        for step, action in enumerate(chunk):
            is_success = simulation.step(action)
            steps.ran[i, step] = True
            steps.successes[i, step] = is_success
            if is_success or step + 1 >= steps_left:
                break

    def _submit(self, function: Callable[[int], None], world_ids: Iterable[int]) -> list[Future[None]]:
        """Apply `function` to worlds, in threads if there are several; an error names the world."""

        def apply(i: int) -> None:
            try:
                function(i)
            except Exception as error:
                error.add_note(f"raised by environment {i} of {self.num_worlds}")
                raise

        if self._pool is not None:
            return [self._pool.submit(apply, i) for i in world_ids]
        return [_run_now(apply, i) for i in world_ids]


def _run_now(function: Callable[[int], None], i: int) -> Future[None]:
    """Return what a thread would, having called `function(i)` in this one."""
    future: Future[None] = Future()
    try:
        future.set_result(function(i))
    except Exception as error:
        future.set_exception(error)
    return future


def _raise_first(futures: Sequence[Future[None]]) -> None:
    """Raise the first error of what has ended."""
    for future in futures:
        future.result()
