"""LIBERO's own environment behind the interface of `libero_gym.vector.LiberoVectorEnv`, for evaluations to compare.

One `OffScreenRenderEnv` a worker process: LIBERO's model, controller, renderer and verdict, run as public clients run
them; only initial states, horizons and instructions come from `libero_gym.tasks.suites`. Nothing here is fast: a reset
rebuilds the scene, and every step draws both images. Where none are observed, LIBERO reads no textures either.

An episode starts by `numpy.random.seed(s); env.reset(); env.set_init_state(state)`, then
- "original" states: LIBERO's stored state and ten steps without motion, gripper opening;
- "settled" and "held_out" states: the recorded outcome of those steps (see `libero_gym.tasks.initial_states`) with its
  fixture poses and the controller's memory, written into LIBERO's simulation.
With s drawn as `LiberoVectorEnv` draws it, both environments then go through the same states under the same actions.

Pictures are those of LIBERO on this machine: from MuJoCo 3.3.3 on, the floor of libero_object is much darker than in
public data sets and in what `libero_gym` draws by default. `texture_colorspace` says which look LIBERO has here;
`libero_gym` environments made with it draw the same pixels. Install `mujoco<3.3.3` to see LIBERO as those data sets do.

LIBERO appends its samplers of drawers' and knobs' positions anew at every reset and draws from all of them; here the
list is cut back to its length after construction, so that an episode does not depend on how many came before it.

Shape legend: N environments, C steps of an action chunk, H = W = `image_size` pixels.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from libero_gym.conventions import ACTION_DIM
from libero_gym.options import DEFAULT_CAMERAS, check_horizon, make_action_space, make_observation_space
from libero_gym.physics.controller import axis_angle_from_quat
from libero_gym.physics.simulation import NUM_SETTLING_STEPS, SETTLING_ACTION, PhysicsError
from libero_gym.rendering.cameras import view_keys
from libero_gym.rendering.textures import TextureColorspace, installed_colorspace
from libero_gym.tasks.initial_states import (
    InitStates,
    RecordedKind,
    check_init_states,
    count_init_states,
    load_recorded_states,
)
from libero_gym.tasks.scene_builder import import_libero, make_reference_env
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, get_task, horizon, list_tasks, load_init_states

_REPOSITORY = Path(__file__).resolve().parents[2]
_CLOSE_TIMEOUT_S = 10.0
_LOG_TAIL = 2000

BoolArray = npt.NDArray[np.bool_]


def check_reference_renderer(renderer: str | None) -> None:
    """Raises ValueError unless LIBERO's own environment can draw by `renderer`; None is its default, egl."""
    if renderer not in (None, "egl", "osmesa"):
        raise ValueError(f"renderer={renderer!r} is none that LIBERO has (valid: None, 'egl', 'osmesa')")


class ReferenceVectorEnv(gymnasium.vector.VectorEnv[dict[str, Any], npt.NDArray[np.float32], npt.NDArray[Any]]):
    """N environments of LIBERO, one in a process; spaces, observations and infos as of `LiberoVectorEnv`.

    Autoreset is disabled: `reset(options={"reset_mask": bool [N]})` starts episodes, and a finished environment idles
    at no cost until then. Every reset must choose `task_id` and `init_state_id` (int [N]) and a seed.

    Args:
        suite: see `libero_gym.list_suites()`.
        num_envs: N; each process takes 2 GB (with images) and one core.
        num_action_chunks: C, environment steps of one `step`.
        image_size: height and width of both images, pixels.
        renderer: OpenGL platform; None takes "egl".
        observe_images: False leaves both images out and needs no OpenGL.
        horizon: steps before truncation; None takes that of each task's own suite.
        init_states: "settled", "held_out" or "original"; None as for `LiberoEnv`.

    Attributes:
        renderer_name: OpenGL platform in use, None without images.
        texture_colorspace: look of LIBERO's pictures under the installed MuJoCo, "linear" before 3.3.3, else "auto", in
            the terms of `libero_gym.rendering.textures`.

    Raises:
        ValueError: an argument is not among the allowed ones; the message lists them.
        FileNotFoundError: the suite has no initial states of this kind; the message lists those that have.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 - Gymnasium's declaration

    def __init__(
        self,
        suite: str,
        num_envs: int = 1,
        *,
        num_action_chunks: int = 1,
        image_size: int = 256,
        renderer: Literal["egl", "osmesa"] | None = None,
        observe_images: bool = True,
        horizon: int | None = None,
        init_states: InitStates | None = None,
    ) -> None:
        check_reference_renderer(renderer)
        if num_envs < 1 or num_action_chunks < 1:
            raise ValueError(f"num_envs={num_envs} and num_action_chunks={num_action_chunks} must be at least 1")
        self.num_envs = num_envs
        self.renderer_name: str | None = (renderer or "egl") if observe_images else None
        self.texture_colorspace: TextureColorspace = installed_colorspace()
        self.single_observation_space = make_observation_space(
            image_size, view_kinds=("images",) if observe_images else (), tasks=list_tasks(suite)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.single_action_space = make_action_space(num_action_chunks=num_action_chunks)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._num_chunks = num_action_chunks
        self._suite = suite
        self._init_states: InitStates = check_init_states(init_states, suite)
        settings = (suite, self._init_states, check_horizon(horizon, suite), int(image_size), observe_images)
        self._workers = [_Worker(settings, self.renderer_name) for _ in range(num_envs)]
        self._episodes: list[dict[str, Any]] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts episodes; see the class.

        Raises:
            ValueError: a seed, `task_id` or `init_state_id` is missing, an option is unknown or of wrong shape, an
                id is out of range, or environments left out of `reset_mask` were never reset.
            RuntimeError: LIBERO raised, or its process ended.
        """
        options = dict(options or {})
        unknown = sorted(set(options) - {"reset_mask", "task_id", "init_state_id"})
        missing = sorted({"task_id", "init_state_id"} - set(options))
        if unknown or missing or seed is None:
            raise ValueError(
                f"reset needs seed={seed} and the options task_id and init_state_id, and takes reset_mask besides "
                f"(missing: {missing}, unknown: {unknown})"
            )
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, np.bool_)))
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}; expected bool ({self.num_envs},), True = reset")
        if not self._episodes and not mask.all():
            raise ValueError(
                f"reset_mask leaves out environments {np.flatnonzero(~mask).tolist()}, which were never reset"
            )
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed)
        task_ids, state_ids = (
            np.broadcast_to(options[name], self.num_envs).tolist() for name in ("task_id", "init_state_id")
        )
        requests: dict[int, tuple[Any, ...]] = {}
        for i in np.flatnonzero(mask).tolist():
            num_states = count_init_states(get_task(self._suite, task_ids[i]), self._init_states)
            if not 0 <= state_ids[i] < num_states:
                raise ValueError(
                    f"init_state_id={state_ids[i]} is not among the stored states of {self._suite} task "
                    f"{task_ids[i]} (valid: 0-{num_states - 1})"
                )
            # The draw of LiberoVectorEnv for the fixtures.
            generator = seeding.np_random(seeds[i])[0]
            requests[i] = ("reset", task_ids[i], state_ids[i], int(generator.integers(2**32, dtype=np.uint64)))
        replies = self._ask(requests)
        self._episodes = [replies.get(i, episode) for i, episode in enumerate(self._episodes or [{}] * self.num_envs)]
        for episode in self._episodes:
            episode.update(rewards=np.zeros(self._num_chunks, np.float32), num_steps=0)
        return self._observation(), self._infos()

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Runs up to C steps in each environment whose episode goes on.

        Raises:
            ValueError: `actions` has the wrong shape, or `reset` was not called.
            PhysicsError: an action of an episode that goes on is not finite.
            RuntimeError: LIBERO raised, the simulation diverged, or a process ended.
        """
        if not self._episodes:
            raise ValueError("reset() must be called first")
        values = np.asarray(actions, np.float64)
        if values.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {values.shape}; expected {self.action_space.shape}")
        chunks = values.reshape(self.num_envs, self._num_chunks, ACTION_DIM)
        going = [i for i, episode in enumerate(self._episodes) if not episode["is_over"]]
        if not np.isfinite(chunks[going]).all():
            raise PhysicsError("actions are not finite; check the policy's output for NaN")
        for episode in self._episodes:
            episode.update(rewards=np.zeros(self._num_chunks, np.float32), num_steps=0)
        for i, reply in self._ask({i: ("step", chunks[i]) for i in going}).items():
            self._episodes[i] = reply
        ended = np.isin(np.arange(self.num_envs), going)
        terminations = ended & self._gather("terminated")
        truncations = ended & self._gather("truncated")
        rewards = self._gather("rewards").sum(axis=1, dtype=np.float64)
        return self._observation(), rewards, terminations, truncations, self._infos()

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the processes; called once by `close`."""
        for worker in self._workers:
            worker.close()

    def _ask(self, requests: dict[int, tuple[Any, ...]]) -> dict[int, dict[str, Any]]:
        """Sends requests to workers, which work at the same time, and returns their replies."""
        for i, request in requests.items():
            self._workers[i].send(request)
        # All answers are taken before the first error is raised.
        answers = {i: self._workers[i].receive() for i in requests}
        for i, answer in answers.items():
            if isinstance(answer, str):
                raise RuntimeError(f"environment {i} of {self.num_envs} failed\n{answer}")
        return {i: answer for i, answer in answers.items() if not isinstance(answer, str)}

    def _gather(self, name: str) -> npt.NDArray[Any]:
        return np.array([episode[name] for episode in self._episodes])

    def _observation(self) -> dict[str, Any]:
        arrays = [key for key in self.single_observation_space if key != "task_descriptions"]  # pyright: ignore
        observation: dict[str, Any] = {key: self._gather(key) for key in arrays}
        observation["task_descriptions"] = tuple(episode["task_descriptions"] for episode in self._episodes)
        return observation

    def _infos(self) -> dict[str, Any]:
        names = ("rewards", "num_steps", "success", "task_id", "init_state_id", "episode_length", "episode_return")
        return {name: self._gather(name) for name in names}


class _Worker:
    """A process with one environment of LIBERO.

    Started as a new interpreter rather than by `multiprocessing`, which would import the caller's script and with it
    everything that the policy needs. What LIBERO prints goes to a file, of which an error shows the end.
    """

    def __init__(self, settings: tuple[Any, ...], gl: str | None) -> None:
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        path = os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "MUJOCO_GL": gl or "disabled", "PYTHONPATH": path}
        if gl is not None:
            environment["PYOPENGL_PLATFORM"] = gl  # this process may have chosen another one for itself
        serve = f"from algorithms.common.reference_env import work; work({theirs.fileno()})"
        output: dict[str, Any] = dict(stdout=self._log, stderr=subprocess.STDOUT)
        self._process = subprocess.Popen(
            [sys.executable, "-c", serve], env=environment, pass_fds=[theirs.fileno()], **output
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self.send(settings)

    def send(self, request: tuple[Any, ...]) -> None:
        """Sends a request; that the process has ended is told by `receive`."""
        try:
            self._connection.send(request)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> dict[str, Any] | str:
        """Returns the reply to a request, or what went wrong."""
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            self._log.seek(0)
            tail = self._log.read()[-_LOG_TAIL:].decode(errors="replace")
            return f"the process of LIBERO's environment ended with code {code}; it printed:\n{tail}"

    def close(self) -> None:
        """Ends the process; a second call does nothing."""
        self._connection.close()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def work(descriptor: int) -> None:
    """Serves an environment over an inherited socket until the other side closes it; runs in a process of its own."""
    connection = Connection(descriptor)
    try:
        environment = _LiberoEnvironment(*connection.recv())
        while True:
            name, *arguments = connection.recv()
            try:
                answer = {"reset": environment.reset, "step": environment.step}[name](*arguments)
            except Exception:
                # The other side raises it: whatever happens here ends the evaluation.
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return


class _LiberoEnvironment:
    """LIBERO's environment of one task after another."""

    def __init__(
        self, suite: str, init_states: InitStates, episode_horizon: int | None, image_size: int, has_images: bool
    ) -> None:
        self._suite = suite
        self._init_states: InitStates = init_states
        self._episode_horizon = episode_horizon
        self._image_size = image_size
        self._has_images = has_images
        self._task: TaskSpec | None = None
        self._env: Any = None
        self._num_samplers = 0
        self._episode: dict[str, Any] = {}

    def reset(self, task_id: int, init_state_id: int, placement_seed: int) -> dict[str, Any]:
        """Starts an episode and returns what `_report` does."""
        task = get_task(self._suite, task_id)
        if task != self._task:
            self._open(task)
        env, domain = self._env, self._env.env
        del domain.object_property_initializers[self._num_samplers :]
        env.seed(placement_seed)
        env.reset()
        if self._init_states != "original":
            observation = self._set_recorded_state(task, self._init_states, init_state_id)
        else:
            observation = env.set_init_state(load_init_states(task)[init_state_id])
            for _ in range(NUM_SETTLING_STEPS):
                observation = env.step(SETTLING_ACTION)[0]
        self._raise_on_warning()
        self._horizon = self._episode_horizon or horizon(task.suite)
        self._episode = {
            "task_descriptions": task.language,
            "task_id": task_id,
            "init_state_id": init_state_id,
            "episode_length": 0,
            "episode_return": 0.0,
            "success": bool(env.check_success()),
        }
        return self._report(observation, np.zeros(0), is_over=False)

    def step(self, chunk: npt.NDArray[np.float64]) -> dict[str, Any]:
        """Runs actions [C, 7] until they or the episode end and returns what `_report` does."""
        episode = self._episode
        rewards = np.zeros(len(chunk), np.float32)
        observation: Any = None
        for step, action in enumerate(chunk):
            observation, rewards[step], is_success, _ = self._env.step(action)
            self._raise_on_warning()
            episode["episode_length"] += 1
            episode["episode_return"] += float(rewards[step])
            episode["success"] = bool(is_success)
            if is_success or episode["episode_length"] >= self._horizon:
                return self._report(observation, rewards, is_over=True, num_steps=step + 1)
        return self._report(observation, rewards, is_over=False, num_steps=len(chunk))

    def _open(self, task: TaskSpec) -> None:
        if self._env is not None:
            self._env.close()
        if self._has_images:
            size = self._image_size
            self._env = import_libero().env_wrapper.OffScreenRenderEnv(
                bddl_file_name=str(task.bddl_file),
                camera_names=list(DEFAULT_CAMERAS),
                camera_heights=size,
                camera_widths=size,
                ignore_done=True,
            )
        else:
            self._env = make_reference_env(task.bddl_file, has_textures=False)
            self._env.env.ignore_done = True
        self._task = task
        self._num_samplers = len(self._env.env.object_property_initializers)

    def _set_recorded_state(self, task: TaskSpec, kind: RecordedKind, index: int) -> Any:
        """Writes a recorded state into LIBERO's simulation and returns the observation."""
        states, scene, sim = load_recorded_states(task, kind), load_scene(task), self._env.sim
        for body_id, pose in zip(scene.fixture_body_ids, states.fixture_poses[index], strict=True):
            fixture = sim.model.body_name2id(scene.physics_model.body(int(body_id)).name)
            sim.model.body_pos[fixture] = pose[:3]
            sim.model.body_quat[fixture] = pose[3:]
        observation = self._env.set_init_state(np.concatenate([[0.0], states.physics[index]]))
        robot, memory = self._env.robots[0], states.controller[index]
        robot.controller.goal_pos = memory[:3].copy()
        robot.controller.goal_ori = memory[3:12].reshape(3, 3).copy()
        # The recorded state is ten steps old: the controller looks at it anew, not at the posture of the reset.
        robot.controller.new_update = True
        robot.gripper.current_action = memory[12:].copy()
        return observation

    def _raise_on_warning(self) -> None:
        counts = np.asarray(self._env.sim.data._data.warning.number)
        if counts.any():
            raise PhysicsError(f"MuJoCo's warning counters are {counts.tolist()} in {self._task}")

    def _report(
        self, observation: Any, rewards: npt.NDArray[Any], *, is_over: bool, num_steps: int = 0
    ) -> dict[str, Any]:
        """Returns the observation, the episode's numbers, and what this call added to them."""
        axis_angle = axis_angle_from_quat(observation["robot0_eef_quat"])
        parts = (observation["robot0_eef_pos"], axis_angle, observation["robot0_gripper_qpos"])
        states = np.concatenate(parts).astype(np.float32)
        images: dict[str, Any] = {}
        if self._has_images:
            for key, camera in zip(view_keys(DEFAULT_CAMERAS, "images"), DEFAULT_CAMERAS, strict=True):
                images[key] = np.ascontiguousarray(observation[f"{camera}_image"][::-1, ::-1])
        episode = self._episode
        return (
            episode
            | images
            | {
                "states": states,
                "rewards": rewards,
                "num_steps": num_steps,
                "is_over": is_over,
                "terminated": is_over and episode["success"],
                "truncated": is_over and episode["episode_length"] >= self._horizon,
            }
        )
