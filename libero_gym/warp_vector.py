"""`LiberoVectorEnv` on the GPU physics of `libero_gym.physics.warp_worlds`.

Shape legend: N environments, C steps of an action chunk, H = W = `image_size` pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from libero_gym.env import CLOSED, OBSERVATION_KEYS
from libero_gym.physics.simulation import ACTION_DIM, PhysicsError
from libero_gym.physics.warp_worlds import WarpOptions, WarpWorlds, WorldStart
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec, get_task
from libero_gym.vector import LiberoVectorEnv

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


class LiberoWarpEnv(LiberoVectorEnv):
    """`LiberoVectorEnv` on this module's physics: the same contract, for thousands of environments on a GPU.

    Actions, observations, rewards, infos, autoreset, chunks and resets are those of `LiberoVectorEnv`; what the physics
    does differently is said in `libero_gym.physics.warp_worlds`. All tasks must be of one scene: any of libero_spatial, or of
    libero_goal; one of libero_object. A step runs all environments together, so that its time hardly depends on how
    many of them idle; prefer SAME_STEP autoreset, and states that are settled.

    ## Arguments
    Those of `LiberoVectorEnv`, without `stepping`, and with the renderer "warp" only. In addition:
    - `warp_options`: sizes of buffers and limits of the solver; a `PhysicsError` says when they do not suffice.
    """

    def __init__(
        self,
        suite: str,
        num_envs: int = 1,
        *,
        warp_options: WarpOptions | None = None,
        physics: Literal["warp"] = "warp",
        **options: Any,
    ) -> None:
        """Create the environments and their scene.

        Raises:
            ValueError: an argument is not among the allowed ones, or the tasks are of several scenes.
            ModuleNotFoundError: LIBERO is not installed.
        """
        if physics != "warp":
            raise ValueError(f"physics={physics!r} is not that of LiberoWarpEnv; make a LiberoVectorEnv with it")
        if "stepping" in options:
            raise ValueError(f"stepping={options['stepping']!r} chooses among CPU steppers; leave it out here")
        super().__init__(suite, num_envs, **options)
        self._worlds: WarpWorlds | None = WarpWorlds(
            self._only_scene(), self._tasks, self.num_envs, num_action_chunks=self._num_chunks, options=warp_options
        )
        self._episode_tasks: list[TaskSpec | None] = [None] * self.num_envs
        self._init_state_ids = np.zeros(self.num_envs, np.int64)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._returns = np.zeros(self.num_envs)
        self._last_values = np.zeros(self.num_envs, np.float32)
        self._is_done = np.zeros(self.num_envs, np.bool_)
        self._rewards = np.zeros((self.num_envs, self._num_chunks), np.float32)
        self._num_steps = np.zeros(self.num_envs, np.int64)

    @property
    def worlds(self) -> WarpWorlds:
        """The simulated worlds.

        Raises:
            ValueError: the environment is closed.
        """
        if self._worlds is None:
            raise ValueError(CLOSED)
        return self._worlds

    @property
    def simulations(self) -> tuple[Any, ...]:
        """Not there: the worlds live on the device.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("physics='warp' has no simulation for each environment; see `worlds`")

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes; see `LiberoVectorEnv.reset`, which raises the same errors."""
        self._rewards = np.zeros_like(self._rewards)
        self._num_steps = np.zeros_like(self._num_steps)
        return super().reset(seed=seed, options=options)

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Run up to C steps in each environment; see `LiberoVectorEnv.step`, which raises the same errors."""
        self._require_started()
        chunks = self._check_chunks(actions)
        is_idle = self._is_done.copy()
        if self._autoreset is not AutoresetMode.DISABLED:
            self._start_episodes(np.flatnonzero(is_idle), None, None)
        ran, successes = self.worlds.step(chunks, ~is_idle, self._horizon - self._lengths)  # [N, C] each
        values = successes.astype(np.float32)
        previous = np.zeros_like(values)
        if self._reward_kind == "relative":
            previous = np.concatenate([self._last_values[:, None], values[:, :-1]], axis=1)
        self._rewards = np.where(ran, values - previous, np.float32(0))
        self._num_steps = ran.sum(axis=1)
        has_stepped = self._num_steps > 0
        last = np.maximum(self._num_steps - 1, 0)
        self._last_values = np.where(has_stepped, values[np.arange(self.num_envs), last], self._last_values)
        self._lengths += self._num_steps
        rewards = self._rewards.sum(axis=1, dtype=np.float64)
        self._returns += rewards
        terminations = np.asarray(successes.any(axis=1))
        truncations = has_stepped & (self._lengths >= self._horizon)
        ended = terminations | truncations
        self._is_done |= ended
        self._stale |= has_stepped
        final: dict[str, Any] = {}
        if self._autoreset is AutoresetMode.SAME_STEP and ended.any():
            indices = np.flatnonzero(ended)
            final_images = self._draw(indices)
            final_states = self.worlds.states()[indices]
            final_texts = self._descriptions()
            final_info = self._episode_infos()
            self._start_episodes(indices, None, None)
            observation, final_obs = self._observe(), self._observe()  # which share no memory
            final_obs["states"][indices] = final_states
            final_obs["task_descriptions"] = final_texts
            if final_images is not None:
                for camera, key in enumerate(OBSERVATION_KEYS):
                    final_obs[key][indices] = final_images[:, camera]
            final = {"final_obs": final_obs, "final_info": final_info}
            final |= {"_final_obs": ended.copy(), "_final_info": ended.copy()}
        else:
            observation = self._observe()
        return observation, rewards, terminations, truncations, self._infos() | final

    def get_state(self, env_id: int) -> dict[str, Any]:
        """Return everything that decides the future of environment `env_id`, as arrays; no entry needs pickle.

        Raises:
            ValueError: `env_id` is out of range, or the environment was never reset.
        """
        self._slot(env_id)
        self._require_started()
        return self._with_episode(env_id, self.worlds.get_state(env_id))

    def get_states(self) -> list[dict[str, Any]]:
        """Return `get_state` of all environments, many times faster than one by one; see there."""
        self._require_started()
        return [self._with_episode(env_id, state) for env_id, state in enumerate(self.worlds.get_states())]

    def _with_episode(self, env_id: int, world_state: dict[str, Any]) -> dict[str, Any]:
        return world_state | {
            "scene": np.array(self.worlds.scene.key),
            "suite": np.array(self._suite),
            "task_id": np.array(self._task(env_id).task_id),
            "init_state_id": self._init_state_ids[env_id].copy(),
            "episode_length": self._lengths[env_id].copy(),
            "episode_return": self._returns[env_id].copy(),
            "last_value": self._last_values[env_id].copy(),
            "is_done": self._is_done[env_id].copy(),
            "rng": np.array(json.dumps(self._slot(env_id).rng.bit_generator.state)),
        }

    def set_state(self, env_id: int, state: Mapping[str, Any]) -> None:
        """Restore in environment `env_id` what `get_state` returned, also from another environment of the same tasks.

        Raises:
            ValueError: `env_id` is out of range, or the state belongs to another scene or task.
        """
        slot = self._slot(env_id)
        if str(state["scene"]) != self.worlds.scene.key:
            raise ValueError(f"the state belongs to scene {state['scene']}, these environments to another one")
        task = self._known_task(get_task(str(state["suite"]), int(state["task_id"])))
        self.worlds.set_state(env_id, {**state, "task": np.array(self.worlds.tasks.index(task))})
        self._episode_tasks[env_id] = task
        self._init_state_ids[env_id] = state["init_state_id"]
        self._lengths[env_id] = state["episode_length"]
        self._returns[env_id] = state["episode_return"]
        self._last_values[env_id] = state["last_value"]
        self._is_done[env_id] = state["is_done"]
        slot.rng.bit_generator.state = json.loads(str(state["rng"]))
        self._stale[env_id] = True

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads, renderer and worlds; called once by `close`."""
        super().close_extras(**kwargs)
        self._worlds = None

    def _only_scene(self) -> Scene:
        scenes = load_scenes(self._tasks)
        groups: dict[str, list[int]] = {}
        for task, scene in zip(self._tasks, scenes, strict=True):
            groups.setdefault(scene.key, []).append(task.task_id)
        if len(groups) > 1:
            raise ValueError(
                f"these tasks of {self._suite} are of {len(groups)} scenes, physics='warp' steps one: choose task_ids "
                f"among one of {list(groups.values())}"
            )
        return scenes[0]

    def _open_renderer(self, kind: Any, cameras: tuple[str, ...], size: int, threads: int) -> Any:
        if kind not in (None, "warp"):
            raise ValueError(f"physics='warp' draws with renderer='warp' (given: {kind!r})")
        return super()._open_renderer("warp", cameras, size, threads)

    def _check_chunks(self, actions: Any) -> npt.NDArray[np.float32]:
        """Return actions as [N, C, 7]."""
        values = np.asarray(actions, dtype=np.float32)
        lead = (self.num_envs,) if self._num_chunks == 1 else (self.num_envs, self._num_chunks)
        if values.shape != (*lead, ACTION_DIM):
            raise ValueError(f"actions have shape {values.shape}; expected {(*lead, ACTION_DIM)}")
        chunks = values.reshape(self.num_envs, self._num_chunks, ACTION_DIM)
        is_bad = ~np.isfinite(chunks).all(axis=(1, 2))
        if is_bad.any():
            raise PhysicsError(
                f"actions of environments {np.flatnonzero(is_bad).tolist()} are not finite; "
                "check the policy's output for NaN"
            )
        return chunks

    def _is_started(self, env_id: int) -> bool:
        return self._episode_tasks[env_id] is not None

    def _require_started(self) -> None:
        if None in self._episode_tasks:
            raise ValueError("reset() must be called first (some environments are new)")

    def _task(self, env_id: int) -> TaskSpec:
        task = self._episode_tasks[env_id]
        if task is None:
            raise ValueError(f"environment {env_id} was never reset")
        return task

    def _start_episodes(self, indices: IntArray, task_ids: IntArray | None, init_state_ids: IntArray | None) -> None:
        if not len(indices):
            return
        starts = [
            WorldStart(task=task, init_state_id=init_state_id, placement_seed=placement_seed)
            for task, init_state_id, placement_seed in self._draw_starts(indices, task_ids, init_state_ids).values()
        ]
        self.worlds.reset(indices, starts, init_states=self._init_states)
        for i, start in zip(indices, starts, strict=True):
            self._episode_tasks[i] = start.task
            self._init_state_ids[i] = start.init_state_id
        self._lengths[indices], self._returns[indices], self._is_done[indices] = 0, 0.0, False
        self._last_values[indices] = self.worlds.success()[indices]
        self._stale[indices] = True

    def _observe(self) -> dict[str, Any]:
        """Draw what has changed and return copies."""
        self._require_started()
        indices = np.flatnonzero(self._stale)
        images = self._draw(indices)
        if images is not None:
            if len(indices) == self.num_envs:
                self._images = images
            else:
                self._images[indices] = images
        self._stale[:] = False
        observation: dict[str, Any] = {}
        if self._images is not None:
            views = ((key, self._images[:, camera]) for camera, key in enumerate(OBSERVATION_KEYS))
            observation = {key: view.clone() if self._as_torch else view.copy() for key, view in views}
        return observation | {"states": self.worlds.states(), "task_descriptions": self._descriptions()}

    def _draw(self, indices: IntArray) -> Any:
        """Images [num, num_cameras, H, W, 3] of some environments; None without images or environments."""
        if self._renderer is None or not len(indices):
            return None
        poses = self.worlds.poses(indices)
        return self._renderer.render_poses_torch(poses) if self._as_torch else self._renderer.render_poses(poses)

    def _descriptions(self) -> tuple[str, ...]:
        return tuple(self._task(i).language for i in range(self.num_envs))

    def _episode_infos(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "success": self.worlds.success(),
            "task_id": np.array([self._task(i).task_id for i in range(self.num_envs)]),
            "init_state_id": self._init_state_ids.copy(),
            "episode_length": self._lengths.copy(),
            "episode_return": self._returns.copy(),
        }

    def _infos(self) -> dict[str, Any]:
        return self._episode_infos() | {"rewards": self._rewards.copy(), "num_steps": self._num_steps.copy()}
