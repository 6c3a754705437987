"""Many worlds stepped together: what the vector environment asks of physics, whatever computes it.

`libero_gym.physics.cpu_worlds.CpuWorlds` is LIBERO to the last bit. On a GPU,
`libero_gym.physics.warp_worlds.WarpWorlds` runs worlds of one scene and
`libero_gym.physics.warp_groups.GroupedWarpWorlds` those of several. Episodes (rewards, horizons, autoreset, what is
sampled) are none of their business.

Shape legend: N worlds, C steps of an action chunk, A numbers of an action (7, of joints 8), R worlds that are reset, K
cameras, H = W = image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from libero_gym.physics.simulation import PhysicsError
from libero_gym.rendering.protocol import Views
from libero_gym.tasks.initial_states import EpisodeStart, InitStates
from libero_gym.tasks.suites import TaskSpec

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]


class Steps(NamedTuple):
    """What a chunk of steps came to.

    Attributes:
        ran: bool [N, C], whether each step was run.
        successes: bool [N, C], whether the goal held after it; False where none was run.
    """

    ran: BoolArray
    successes: BoolArray

    @classmethod
    def none(cls, num_worlds: int, num_steps: int) -> Self:
        """Return that nothing was run."""
        shape = (num_worlds, num_steps)
        return cls(np.zeros(shape, np.bool_), np.zeros(shape, np.bool_))


class Worlds(Protocol):
    """N worlds, each at a task and a state of its own."""

    @property
    def num_worlds(self) -> int:
        """N."""
        ...

    @property
    def current_tasks(self) -> Sequence[TaskSpec | None]:
        """Task of each world, None where it was never reset."""
        ...

    @property
    def init_state_ids(self) -> IntArray:
        """int64 [N], initial state that each world was reset to, -1 where it never was."""
        ...

    def reset(self, world_ids: IntArray, starts: Sequence[EpisodeStart], *, init_states: InitStates) -> None:
        """Put worlds where episodes start, objects at rest.

        Args:
            world_ids: int64 [R].
            starts: of length R.
            init_states: kind of the states.

        Raises:
            ValueError: these worlds cannot hold a task. No world has been touched.
            FileNotFoundError: states of this kind are not recorded for the suite. No world has been touched.
            PhysicsError: a world diverged or ran out of space while settling; the others have been reset.
        """
        ...

    def step(
        self,
        actions: FloatArray,
        is_active: BoolArray,
        steps_left: IntArray,
        *,
        out: Steps | None = None,
        on_part_done: Callable[[IntArray], None] | None = None,
    ) -> Steps:
        """Run up to C environment steps in each active world, until its goal holds or its steps are used up.

        Args:
            actions: float [N, C, A], see `libero_gym.Simulation.step`. Those of idle worlds do not matter.
            is_active: bool [N], False where nothing is to happen.
            steps_left: int [N], steps until the episode is cut.
            out: all False; filled in and returned. After an error it tells what was run before.
            on_part_done: may be called, in this thread, with the ids of worlds that have ended their chunk while
                others are still stepped: these may be rendered then and asked for their `states`. None has everything
                stepped without pause.

        Raises:
            ValueError: an active world was never reset.
            PhysicsError: a world diverged or ran out of space; the others have taken their steps.
        """
        ...

    def success(self) -> BoolArray:
        """Return bool [N], whether the goal held at the end of the last step."""
        ...

    def states(self, world_ids: IntArray | None = None) -> npt.NDArray[np.float32]:
        """Return the proprioception of some worlds (None: all), float32 [num, 8]; see `Simulation.states`."""
        ...

    def views(self, renderer: Any, world_ids: IntArray, *, as_torch: bool) -> Views:
        """Return all of some worlds that the renderer was made for, num worlds each.

        Args:
            renderer: from `libero_gym.rendering.renderers.make_renderer`.
            world_ids: int64 [num].
            as_torch: whether as tensors on the renderer's device; needs the renderer "warp".
        """
        ...

    def get_state(self, world_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return everything that decides a world's future and what it shows, as arrays (copies) that need no pickle.

        Raises:
            ValueError: the world was never reset.
        """
        ...

    def get_states(self) -> list[dict[str, npt.NDArray[Any]]]:
        """Return `get_state` of all worlds."""
        ...

    def check_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if `set_state` would take a state; no world is touched.

        Raises:
            ValueError: as `set_state`.
        """
        ...

    def set_state(self, world_id: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `get_state` returned, also from other worlds of the same kind.

        Raises:
            ValueError: an entry is missing, surplus, of another type or shape, or not finite, or the state belongs to
                another scene or task. No world has been touched.
        """
        ...

    def physics_error(self, world_id: int, reason: str, action: npt.NDArray[np.float64]) -> PhysicsError:
        """Return the error to raise for an action, float64 [A], that `world_id` must not be given."""
        ...

    def close(self) -> None:
        """Release threads and memory; a second call does nothing."""
        ...
