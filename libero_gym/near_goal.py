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
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.initial_states import InitStates
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, get_task, horizon, is_integer
from libero_gym.vector import LiberoVectorEnv

SimulationState = dict[str, npt.NDArray[Any]]

# Expert episodes whose states are kept, some hundred kilobytes each.
_MAX_KEPT = 256


class NearGoalVectorEnv(gymnasium.vector.VectorWrapper):
    """A `LiberoVectorEnv` whose episodes begin some steps before a scripted expert succeeds.

    An expert (`libero_gym.experts`, without noise) solves the task from an initial state. An episode begins with the
    simulation, the robot's controller included, as it was so many steps before the goal first held; an expert that
    needs fewer steps gives its own start. Each initial state i that is asked for or sampled stands for one of
    n * k starts, where n is `num_init_states` and k the number of `steps_before_success`: number i modulo n * k, of
    which each k in a row are of one initial state. `init_state_id` in the infos is that initial state.

    Spaces, rewards, horizon, autoreset and the other infos are those of the environments, counted from the new start.

    Args:
        envs: a `LiberoVectorEnv` with physics on the CPU, which resets itself in the same step or not at all.
        steps_before_success: environment steps of the expert from an episode's beginning to its success; several are
            used in turn.
        num_init_states: how many of a task's initial states experts start from, the first ones. An expert takes a
            tenth to half a second of a core, once for each task and initial state.

    Raises:
        TypeError: `envs` is no `LiberoVectorEnv`.
        ValueError: a number is not positive, there are no steps, or `envs` reset themselves in the next step.
    """

    def __init__(
        self, envs: gymnasium.vector.VectorEnv, *, steps_before_success: Sequence[int], num_init_states: int = 4
    ) -> None:
        if not isinstance(envs, LiberoVectorEnv):
            raise TypeError(f"{type(envs).__name__} is no LiberoVectorEnv: wrap the environments as they are made")
        if envs.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP:
            raise ValueError("autoreset_mode=NEXT_STEP is not possible near the goal (valid: SAME_STEP, DISABLED)")
        for steps in (num_init_states, *steps_before_success):
            if not is_integer(steps) or steps < 1:
                raise ValueError(f"{steps!r} among steps_before_success and num_init_states is not a positive integer")
        if not steps_before_success:
            raise ValueError("steps_before_success is empty: give at least one number of steps")
        super().__init__(envs)
        self._envs = envs
        self._steps_before_success = tuple(steps_before_success)
        self._num_init_states = num_init_states

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin episodes; see `LiberoVectorEnv.reset`.

        Raises:
            ValueError: as there.
            RuntimeError: the expert does not succeed from an initial state.
        """
        _, infos = self._envs.reset(seed=seed, options=options)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_))
        self._begin(np.flatnonzero(mask), infos)
        return self._envs.observe(), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step; see `LiberoVectorEnv.step` and, for what a new episode can raise, `reset`."""
        obs, rewards, terminated, truncated, infos = self._envs.step(actions)
        if "final_obs" in infos:
            self._begin(np.flatnonzero(terminated | truncated), infos)
            obs = self._envs.observe()
        return obs, rewards, terminated, truncated, infos

    def observe(self) -> dict[str, Any]:
        """Observe without stepping; see `LiberoVectorEnv.observe`."""
        return self._envs.observe()

    def _begin(self, env_ids: npt.NDArray[np.intp], infos: dict[str, Any]) -> None:
        """Move episodes that have just begun to their starts."""
        num_starts = self._num_init_states * len(self._steps_before_success)
        for i in env_ids.tolist():
            start = int(infos["init_state_id"][i]) % num_starts
            init_state_id, which = divmod(start, len(self._steps_before_success))
            task = get_task(self._envs.options.suite, int(infos["task_id"][i]))
            passed = states_of_expert(task, init_state_id, self._envs.options.init_states)
            state = passed[max(0, len(passed) - self._steps_before_success[which])]
            self._envs.set_state(i, self._envs.get_state(i) | state)
            infos["init_state_id"][i] = init_state_id


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
