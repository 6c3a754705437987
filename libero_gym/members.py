"""One environment of a `LiberoVectorEnv`, as `call`, `get_attr` and other people's wrappers ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from libero_gym.env import LiberoEnv
from libero_gym.options import EnvOptions, make_action_space, with_horizon
from libero_gym.physics.inspection import SegmentationLabel
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.suites import TaskSpec


class Member:
    """What a `LiberoEnv` shows, of environment `env_id` of a vector environment; it is stepped and reset with all."""

    def __init__(self, envs: Any, env_id: int) -> None:
        """Name environment `env_id` of `envs`, a `LiberoVectorEnv`, which imports this."""
        self._envs = envs
        self._env_id = env_id

    @property
    def unwrapped(self) -> Self:
        """This."""
        return self

    @property
    def spec(self) -> EnvSpec | None:
        """How Gymnasium would make such a single environment; its `max_episode_steps` is as that of all.

        What only many environments have (chunks, autoreset, threads, physics on a GPU, torch tensors) is left out.
        """
        spec = with_horizon(self._envs.spec, self.options.longest_horizon)
        if spec is not None:
            taken = inspect.signature(LiberoEnv.__init__).parameters
            spec.kwargs = {name: value for name, value in spec.kwargs.items() if name in taken}
            decided = {"horizon": self.options.horizon, "renderer": self.options.renderer}
            spec.kwargs |= {name: value for name, value in decided.items() if value is not None}
        return spec

    @property
    def metadata(self) -> dict[str, Any]:
        """Render modes and frames a second."""
        return self._envs.metadata

    @property
    def options(self) -> EnvOptions:
        """The arguments."""
        return self._envs.options

    @property
    def render_mode(self) -> str | None:
        """What `render` returns."""
        return self._envs.render_mode

    @property
    def observation_space(self) -> spaces.Space[Any]:
        """That of a single environment."""
        return self._envs.single_observation_space

    @property
    def action_space(self) -> spaces.Space[Any]:
        """That of a single environment, which takes no chunks."""
        return make_action_space(self.options.action_mode)

    @property
    def np_random(self) -> np.random.Generator:
        """The environment's own generator."""
        return self._envs.np_random[self._env_id]

    @property
    def np_random_seed(self) -> int:
        """What that generator was seeded with; see `LiberoVectorEnv.np_random_seed`."""
        return self._envs.np_random_seed[self._env_id]

    @property
    def _max_episode_steps(self) -> int:
        """The longest horizon of its tasks, by the name that LeRobot's evaluation asks for."""
        return self.options.longest_horizon

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Tasks that episodes are sampled from."""
        return self._envs.task_ids

    @property
    def task(self) -> TaskSpec:
        """The task of the current episode.

        Raises:
            ValueError: `reset` was not called.
        """
        task = self._envs.worlds.current_tasks[self._env_id]
        if task is None:
            raise ValueError("reset() must be called first")
        return task

    @property
    def task_description(self) -> str:
        """The instruction of the current episode."""
        return self.task.language

    @property
    def simulation(self) -> Simulation:
        """The live simulation; see `LiberoVectorEnv.simulations`."""
        return self._envs.simulations[self._env_id]

    @property
    def model(self) -> mujoco.MjModel:
        """The live physics model (without visual geoms)."""
        return self.simulation.model

    @property
    def data(self) -> mujoco.MjData:
        """The live simulation state."""
        return self.simulation.data

    def observe(self) -> dict[str, Any]:
        """Return the current observation."""
        observation = self._envs.observe()
        return {key: value[self._env_id] for key, value in observation.items()}

    def render(self) -> npt.NDArray[np.uint8] | None:
        """Return this environment's picture; see `LiberoVectorEnv.render`."""
        if self.render_mode is None:
            return None
        return self._envs.render_some(np.array([self._env_id]))[0]

    def object_poses(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return where objects and fixtures are; see `LiberoVectorEnv.object_poses`."""
        return self._envs.object_poses(self._env_id)

    def goal_state(self) -> dict[str, bool]:
        """Return which parts of the goal hold; see `LiberoVectorEnv.goal_state`."""
        return self._envs.goal_state(self._env_id)

    def hold_action(self) -> npt.NDArray[np.float32]:
        """Return the action that keeps arm and gripper; see `LiberoVectorEnv.hold_action`."""
        return self._envs.hold_action(self._env_id)

    def segmentation_labels(self) -> dict[int, SegmentationLabel]:
        """Return what the numbers in `segmentation` are; see `LiberoVectorEnv.segmentation_labels`."""
        return self._envs.segmentation_labels(self._env_id)

    def get_state(self) -> dict[str, Any]:
        """Return everything that decides the future; see `LiberoVectorEnv.get_state`."""
        return self._envs.get_state(self._env_id)

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; see `LiberoVectorEnv.set_state`."""
        self._envs.set_state(self._env_id, state)
