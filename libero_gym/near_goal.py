"""Episodes that begin near their end: where a scripted expert stands a few steps before it succeeds.

A reverse curriculum (Florensa et al. 2017, arXiv:1707.05300) whose starts come from a demonstration (Salimans and Chen
2018, arXiv:1812.03381): a policy that hardly ever gets to the goal from a task's own start is often rewarded from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from libero_gym.experts import make_expert
from libero_gym.physics.cpu_worlds import CpuWorlds
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.initial_states import EpisodeStart, InitStates, count_init_states
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, get_task, horizon, is_integer
from libero_gym.vector import LiberoVectorEnv

SimulationState = dict[str, npt.NDArray[Any]]

# Expert episodes whose states are kept, some hundred kilobytes each.
_MAX_KEPT = 256


def near_goal_start(init_state_id: int, num_init_states: int, steps_before_success: Sequence[int]) -> int:
    """Return the number of the start that an initial state stands for, see `NearGoalVectorEnv`."""
    return init_state_id % (num_init_states * len(steps_before_success))


class NearGoalVectorEnv(gymnasium.vector.VectorWrapper):
    """A `LiberoVectorEnv` whose episodes begin some steps before a scripted expert succeeds.

    An expert (`libero_gym.experts`, without noise) solves the task from an initial state. An episode begins with the
    simulation, the robot's controller included, as it was so many steps before the goal first held. Each initial
    state i that is asked for or sampled stands for one of n * k starts, where n is `num_init_states` and k the number
    of `steps_before_success`: number i modulo n * k, of which each k in a row are of one initial state.
    `init_state_id` in the infos is that initial state. The fixtures of "original" states are those of the expert's
    episode, always the same.

    Spaces, rewards, horizon, autoreset and the other infos are those of the environments, counted from the new start.
    It is the environments themselves that begin there (`LiberoVectorEnv.set_start_states`), however they are reset.

    Args:
        envs: a `LiberoVectorEnv` with physics on the CPU.
        steps_before_success: environment steps of the expert from an episode's beginning to its success, at most those
            of its whole episode; several are used in turn.
        num_init_states: how many of a task's initial states experts start from, the first ones. An expert takes a
            tenth to half a second of a core, once for each task and initial state.

    Raises:
        TypeError: `envs` is no `LiberoVectorEnv`, or `steps_before_success` is no sequence.
        ValueError: a number is not a positive integer, there are no steps, or more than an episode of a task may have,
            a task has fewer initial states than there would be starts, or physics are not on the CPU.
    """

    def __init__(
        self, envs: gymnasium.vector.VectorEnv, *, steps_before_success: Sequence[int], num_init_states: int = 4
    ) -> None:
        if not isinstance(envs, LiberoVectorEnv):
            raise TypeError(f"{type(envs).__name__} is no LiberoVectorEnv: wrap the environments as they are made")
        if not isinstance(envs.worlds, CpuWorlds):
            raise ValueError(
                "experts run on the CPU, and the states of physics='warp' are of another kind: make the environments "
                "with physics='cpu'"
            )
        if isinstance(steps_before_success, str) or np.ndim(steps_before_success) != 1:
            raise TypeError(
                f"steps_before_success={steps_before_success!r} is not a sequence of numbers of steps, such as (3, 6)"
            )
        for steps in (num_init_states, *steps_before_success):
            if not is_integer(steps) or steps < 1:
                raise ValueError(f"{steps!r} among steps_before_success and num_init_states is not a positive integer")
        if not len(steps_before_success):
            raise ValueError("steps_before_success is empty: give at least one number of steps")
        super().__init__(envs)
        self._envs = envs
        self._steps_before_success = tuple(int(steps) for steps in steps_before_success)
        self._num_init_states = int(num_init_states)
        self._check_number_of_starts()
        self._check_horizons()
        envs.set_start_states(self._start_state)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin episodes; see `LiberoVectorEnv.reset`.

        Raises:
            ValueError: as there, a `placement_seed` is given, or the expert succeeds in fewer steps than are asked for
                (which `step` raises as well, where it begins an episode). No environment has been touched.
            RuntimeError: the expert does not succeed from an initial state. No environment has been touched.
        """
        if (options or {}).get("placement_seed") is not None:
            raise ValueError(
                "placement_seed chooses where fixtures stand, which near the goal is where the expert found them; "
                "leave it out"
            )
        return self._envs.reset(seed=seed, options=options)

    def observe(self) -> dict[str, Any]:
        """Observe without stepping; see `LiberoVectorEnv.observe`."""
        return self._envs.observe()

    def _check_number_of_starts(self) -> None:
        """Raise ValueError where some starts would never be begun from: an initial state stands for one of them."""
        num_steps, options = len(self._steps_before_success), self._envs.options
        for task_id in self._envs.task_ids:
            task = get_task(options.suite, task_id)
            num_states = count_init_states(task, options.init_states)
            if self._num_init_states * num_steps > num_states:
                raise ValueError(
                    f"num_init_states={self._num_init_states} times {num_steps} steps_before_success are "
                    f"{self._num_init_states * num_steps} starts, more than the {num_states} initial states of "
                    f"{task.suite} task {task.task_id}, each of which stands for one: give num_init_states of at most "
                    f"{num_states // num_steps}, or fewer steps"
                )

    def _check_horizons(self) -> None:
        """Raise ValueError where an episode is truncated before even the expert would succeed."""
        longest, options = max(self._steps_before_success), self._envs.options
        for task_id in self._envs.task_ids:
            task = get_task(options.suite, task_id)
            if longest > (allowed := options.horizon_of(task)):
                raise ValueError(
                    f"steps_before_success has {longest}, but episodes of {task.suite} task {task.task_id} are "
                    f"truncated after horizon={allowed} steps, before the expert itself would succeed: give steps of "
                    "at most the horizon, or make the environments with a longer one"
                )

    def _start_state(self, start: EpisodeStart) -> SimulationState:
        """Return the state in which the episode that an initial state stands for begins.

        Raises:
            ValueError: the expert's episode is shorter than the steps that are asked for.
            RuntimeError: the expert does not succeed.
        """
        number = near_goal_start(start.init_state_id, self._num_init_states, self._steps_before_success)
        init_state_id, which = divmod(number, len(self._steps_before_success))
        steps, task = self._steps_before_success[which], start.task
        passed = states_of_expert(task, init_state_id, self._envs.options.init_states)
        if steps > len(passed):
            raise ValueError(
                f"steps_before_success has {steps}, but from initial state {init_state_id} of {task.suite} task "
                f"{task.task_id} the expert succeeds after {len(passed)} steps: give at most so many, or leave this "
                "task or initial state out (task_ids, num_init_states)"
            )
        return passed[-steps]


@lru_cache(maxsize=_MAX_KEPT)
def states_of_expert(task: TaskSpec, init_state_id: int, init_states: InitStates) -> tuple[SimulationState, ...]:
    """Return the simulation's state before each step of an expert's episode, which ends when the goal first holds.

    Args:
        task: the task.
        init_state_id: stored initial state.
        init_states: kind of initial states.

    Raises:
        ValueError: the task's goal has a predicate without a skill.
        RuntimeError: the expert does not succeed within the suite's horizon.
    """
    simulation, expert = Simulation(load_scene(task)), make_expert(task)
    simulation.reset(task, init_state_id, np.random.RandomState(0), init_states=init_states)
    expert.reset(simulation, np.random.default_rng([0, task.task_id, init_state_id]))
    passed: list[SimulationState] = []
    while not simulation.success():
        if len(passed) == horizon(task.suite):
            raise RuntimeError(
                f"the expert does not solve task {task.task_id} of {task.suite} from initial state {init_state_id}, "
                "so there is no place near the goal; choose other tasks or fewer num_init_states"
            )
        passed.append(simulation.get_state())
        simulation.step(expert.act(simulation))
    return tuple(passed)
