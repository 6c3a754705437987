"""Many LIBERO environments in one process: a thread pool over native stepping, one batched renderer.

Shape legend: N environments, C steps of an action chunk, H = W = `image_size` pixels.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from libero_gym.env import (
    CLOSED,
    DEFAULT_CAMERAS,
    OBSERVATION_KEYS,
    RendererKind,
    RewardKind,
    check_horizon,
    check_reward_kind,
    make_action_space,
    make_observation_space,
)
from libero_gym.physics.simulation import (
    ACTION_DIM,
    InitStates,
    Simulation,
    Stepping,
    check_init_states,
    check_state,
    count_init_states,
)
from libero_gym.rendering.textures import TextureColorspace, check_texture_colorspace
from libero_gym.tasks.scenes import Scene, load_scenes
from libero_gym.tasks.suites import TaskSpec, get_task, is_integer, list_tasks

# Environments are drawn in up to this many parts, of at least that many, each while later ones are still stepped.
_MAX_PARTS, _MIN_PART = 4, 8
# What `get_state` adds to the state of a simulation.
_EPISODE_KEYS = frozenset({"episode_length", "episode_return", "last_value", "is_done", "rng"})
_RESET_OPTIONS = ("reset_mask", "task_id", "init_state_id")

Result = TypeVar("Result")
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(eq=False)
class _Slot:
    """One environment of the batch."""

    rng: np.random.Generator
    simulation: Simulation | None = None
    length: int = 0
    episode_return: float = 0.0
    last_value: float = 0.0
    is_done: bool = False
    chunk_rewards: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    num_steps: int = 0
    chunk_s: float = 0.0  # of a core, for the last chunk

    @property
    def world(self) -> Simulation:
        """The simulation of the current episode."""
        if self.simulation is None:
            raise ValueError("reset() must be called first")
        return self.simulation

    @property
    def task(self) -> TaskSpec:
        """The task of the current episode."""
        return cast("TaskSpec", self.world.task)


class LiberoVectorEnv(gymnasium.vector.VectorEnv[dict[str, Any], npt.NDArray[np.float32], npt.NDArray[Any]]):
    """A batch of `libero_gym.env.LiberoEnv`, each with its own task, state and generator.

    Every environment behaves as a single one seeded with `seed + i` does, whatever the number of threads.

    ## Action space
    float32 [N, 7] ([N, 1, 7] is taken too), or [N, C, 7] with `num_action_chunks=C > 1`: a call of `step` then runs
    up to C steps and observes once, at their end. An environment whose episode ends within a chunk idles for its rest.

    ## Observation space
    `Dict` as in `LiberoEnv` with a leading N; `task_descriptions` is a tuple of N str. With `images_as_torch=True`
    the two images are torch tensors on the renderer's device (which is a GPU if there is one).

    ## Rewards and ends
    `rewards` float64 [N] sums over the steps run. `terminations`: the goal holds; `truncations`: the horizon is
    reached (both may be True).

    ## Infos
    | key | type | meaning |
    |---|---|---|
    | `rewards` | float32 [N, C] | reward of each step, 0 where none was run |
    | `num_steps` | int64 [N] | steps run by this call |
    | `success` | bool [N] | the goal holds, in the episode observed |
    | `task_id`, `init_state_id` | int64 [N] | of the episode observed |
    | `episode_length` | int64 [N] | steps of the episode observed |
    | `episode_return` | float64 [N] | its sum of rewards |
    | `final_obs`, `final_info` | dicts of [N] | with SAME_STEP, after an episode's end: what the last step of the ended
      episodes showed, valid where `_final_obs` is True; other rows repeat the current observation. Gymnasium's own
      `final_obs` is an array of dicts instead: wrappers that read it, such as `DictInfoToList`, need NEXT_STEP |

    ## Autoreset
    `autoreset_mode`, also in `metadata["autoreset_mode"]`, as Gymnasium defines them:
    - SAME_STEP (default): a finished environment is reset in the same call; one that `set_state` or an error has
      left finished, by the next call, as under NEXT_STEP;
    - NEXT_STEP: the next call resets it and ignores its action (no step is run, reward 0);
    - DISABLED: `reset(options={"reset_mask": bool [N]})` resets it. Until then it idles at no cost: no steps, reward
      0, neither terminated nor truncated again, the observation stays.

    ## Reset
    `reset(seed, options)`. `seed`: an int (environment i gets `seed + i`) or a list of N. Options, each optional:
    `task_id` and `init_state_id` (an int or int [N]), `reset_mask` (bool [N], True = reset). What is not chosen is
    drawn from the environment's own generator; so it is at automatic resets.

    Environments given the same `task_id`, `init_state_id` and seed start in the same state to the last bit, and stay
    in it under the same actions. A group of G for GRPO is `task_id=numpy.repeat(tasks, G)`,
    `init_state_id=numpy.repeat(states, G)` and `seed=numpy.repeat(seeds, G).tolist()`. The seed decides the fixtures of
    "original" states; "settled" and "held_out" ones hold theirs.

    ## Arguments
    As for `LiberoEnv`, but `task_ids` for `task_id`, and:
    - `num_envs`: N.
    - `task_ids`: sequence of tasks to draw from, one named twice twice as often; None takes all of the suite.
    - `num_action_chunks`: C.
    - `num_threads`: threads for stepping and drawing; None takes all cores that the process may use.
    - `images_as_torch`: see above; needs the renderer "warp".
    - `physics`: "cpu", or "warp" for thousands of environments on a GPU, which is not LIBERO to the last bit: the
      result is a `libero_gym.warp_vector.LiberoWarpEnv`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 - Gymnasium's declaration

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Choose the class by `physics`, so that callers, and Gymnasium's registry, need not."""
        chosen: Any = cls
        if kwargs.get("physics") == "warp" and cls is LiberoVectorEnv:
            from libero_gym.warp_vector import LiberoWarpEnv  # imports Warp

            chosen = LiberoWarpEnv
        return super().__new__(chosen)

    def __init__(
        self,
        suite: str,
        num_envs: int = 1,
        *,
        task_ids: Sequence[int] | None = None,
        num_action_chunks: int = 1,
        image_size: int = 256,
        camera_names: Sequence[str] = DEFAULT_CAMERAS,
        renderer: RendererKind | None = None,
        texture_colorspace: TextureColorspace = "linear",
        observe_images: bool = True,
        images_as_torch: bool = False,
        reward: RewardKind = "sparse",
        horizon: int | None = None,
        init_states: InitStates | None = None,
        stepping: Stepping = "exact",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        num_threads: int | None = None,
        render_mode: str | None = None,
        physics: Literal["cpu", "warp"] = "cpu",
    ) -> None:
        """Create the environments; scenes are opened by the first reset.

        Raises:
            ValueError: an argument is not among the allowed ones; the message lists them.
            FileNotFoundError: the suite has no initial states of this kind; the message lists those that have.
            RendererUnavailableError: the renderer cannot be used on this machine.
            ModuleNotFoundError: LIBERO is not installed.
        """
        if physics not in ("cpu", "warp"):
            raise ValueError(f"physics={physics!r} is unknown (valid: 'cpu', 'warp')")
        self.num_envs = _positive("num_envs", num_envs)
        self._num_chunks = _positive("num_action_chunks", num_action_chunks)
        self._suite = suite
        if is_integer(task_ids):
            raise ValueError(f"task_ids={task_ids!r} is not a sequence of tasks (for one task: task_ids=[{task_ids}])")
        self._tasks = list_tasks(suite) if task_ids is None else [get_task(suite, task_id) for task_id in task_ids]
        if not self._tasks:
            raise ValueError("task_ids is empty; name at least one task, or None for all of the suite")
        self._reward_kind = check_reward_kind(reward)
        self._horizon = check_horizon(horizon, suite)
        self._init_states: InitStates = check_init_states(init_states, suite)
        if len(camera_names) != len(OBSERVATION_KEYS):
            raise ValueError(f"camera_names={tuple(camera_names)} must name {len(OBSERVATION_KEYS)} cameras")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r} is unknown (valid: None, 'rgb_array')")
        if (render_mode is not None or images_as_torch) and not observe_images:
            raise ValueError("render_mode='rgb_array' and images_as_torch=True need observe_images=True")
        if stepping not in ("exact", "fast", "numpy"):
            raise ValueError(f"stepping={stepping!r} is unknown (valid: 'exact', 'fast', 'numpy')")
        self._stepping: Stepping = stepping
        self._autoreset = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self._autoreset}
        self.render_mode = render_mode
        self.single_observation_space = make_observation_space(image_size, has_images=observe_images)
        self.single_action_space = make_action_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        if self._num_chunks > 1:
            shape = (self.num_envs, self._num_chunks, ACTION_DIM)
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, shape, np.float32)
        threads = len(os.sched_getaffinity(0)) if num_threads is None else _positive("num_threads", num_threads)
        self._pool: ThreadPoolExecutor | None = None
        if min(threads, self.num_envs) > 1:
            self._pool = ThreadPoolExecutor(min(threads, self.num_envs), "libero-step")
        self._as_torch = images_as_torch
        self._texture_colorspace: TextureColorspace = check_texture_colorspace(texture_colorspace)
        self._renderer: Any = None
        if observe_images:
            self._renderer = self._open_renderer(renderer, tuple(camera_names), int(image_size), threads)
        self._slots = [_Slot(rng=seeding.np_random(None)[0]) for _ in range(self.num_envs)]
        self._spare_simulations: list[Simulation] = []  # of other scenes, the last used last; at most one per slot
        self._images: Any = None
        self._states = np.zeros((self.num_envs, 8), np.float32)
        self._stale = np.ones(self.num_envs, np.bool_)

    @property
    def renderer_name(self) -> str | None:
        """Kind of the renderer in use, or None without images."""
        return None if self._renderer is None else self._renderer.name

    @property
    def texture_colorspace(self) -> TextureColorspace:
        """Which colours textures have, see `LiberoEnv`."""
        return self._texture_colorspace

    @property
    def simulations(self) -> tuple[Simulation, ...]:
        """The live simulation of each environment."""
        self._require_open()
        return tuple(slot.world for slot in self._slots)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes; see the class.

        Raises:
            ValueError: an unknown option, one of wrong shape or type, an id that is not valid, environments left out of
                `reset_mask` that were never reset, or the environment is closed. No environment has been touched.
        """
        self._require_open()
        options = dict(options or {})
        unknown = sorted(set(options) - set(_RESET_OPTIONS))
        if unknown:
            raise ValueError(f"unknown reset options {unknown} (valid: {list(_RESET_OPTIONS)})")
        mask = self._reset_mask(options.get("reset_mask"))
        indices = np.flatnonzero(mask)
        task_ids = self._ids("task_id", options.get("task_id"))
        init_state_ids = self._ids("init_state_id", options.get("init_state_id"))
        previous, seeds = [slot.rng for slot in self._slots], self._seeds(seed)
        # Drawn from copies, so that a reset that is refused leaves the generators as they were.
        generators = {
            i: copy.deepcopy(previous[i]) if seeds[i] is None else seeding.np_random(seeds[i])[0]
            for i in indices.tolist()
        }
        for i, rng in generators.items():
            self._slots[i].rng = rng
        try:
            self._start_episodes(indices, task_ids, init_state_ids)
        except Exception:
            for slot, rng in zip(self._slots, previous, strict=True):
                slot.rng = rng
            raise
        for slot in self._slots:
            slot.num_steps = 0
            slot.chunk_rewards = np.zeros(self._num_chunks, np.float32)
        return self._observe(), self._infos()

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Run up to C steps in each environment; see the class.

        Raises:
            ValueError: `actions` has the wrong shape, `reset` was not called, or the environment is closed.
            PhysicsError: an action is not finite (nothing has been stepped then), or a simulation diverged. Its `dump`
                is of the first environment concerned, whose step is undone; the others have taken theirs, `observe`
                shows them, and episodes that ended go unreported.
        """
        worlds = self.simulations  # raises before anything moves if an environment was never reset, or all are closed
        chunks = self._check_actions(actions, worlds)
        to_reset = np.zeros(self.num_envs, np.bool_)
        if self._autoreset is not AutoresetMode.DISABLED:
            to_reset = np.array([slot.is_done for slot in self._slots])
            self._start_episodes(np.flatnonzero(to_reset), None, None)
        ended = self._step_and_draw(chunks, to_reset)
        terminations = np.array([terminated for terminated, _ in ended])
        truncations = np.array([truncated for _, truncated in ended])
        rewards = np.array([slot.chunk_rewards.sum(dtype=np.float64) for slot in self._slots])
        done = terminations | truncations
        observation, final = self._observe(), dict[str, Any]()
        if self._autoreset is AutoresetMode.SAME_STEP and done.any():
            final = {"final_obs": observation, "final_info": self._episode_infos()}
            final |= {"_final_obs": done.copy(), "_final_info": done.copy()}
            self._start_episodes(np.flatnonzero(done), None, None)
            observation = self._observe()
        return observation, rewards, terminations, truncations, self._infos() | final

    def observe(self) -> dict[str, Any]:
        """Return the current observation of all environments, for instance after `set_state`.

        Raises:
            ValueError: an environment was never reset, or all are closed.
        """
        self._require_open()
        return self._observe()

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Return the first camera's image of each environment, uint8 (H, W, 3), or None without a render mode."""
        if self.render_mode is None:
            return None
        images = self.observe()[OBSERVATION_KEYS[0]]
        return tuple(np.asarray(image.cpu() if self._as_torch else image) for image in images)

    def get_state(self, env_id: int) -> dict[str, Any]:
        """Return everything that decides the future of environment `env_id`, as arrays; no entry needs pickle.

        Raises:
            ValueError: `env_id` is out of range, or the environment was never reset.
        """
        slot = self._slot(env_id)
        rng = json.dumps(slot.rng.bit_generator.state)
        return slot.world.get_state() | {
            "episode_length": np.array(slot.length),
            "episode_return": np.array(slot.episode_return),
            "last_value": np.array(slot.last_value),
            "is_done": np.array(slot.is_done),
            "rng": np.array(rng),
        }

    def get_states(self) -> list[dict[str, Any]]:
        """Return `get_state` of all environments; see there."""
        return [self.get_state(env_id) for env_id in range(self.num_envs)]

    def set_state(self, env_id: int, state: Mapping[str, Any]) -> None:
        """Restore in environment `env_id` what `get_state` returned, to the last bit; also from another environment.

        Raises:
            ValueError: `env_id` is out of range, or the state is incomplete or belongs to another suite or other
                versions.
        """
        slot = self._slot(env_id)
        missing = sorted(_EPISODE_KEYS - set(state))
        if missing:
            raise ValueError(
                f"the state lacks {missing}: give what get_state of a vector environment returned; that of a "
                "simulation goes to simulations[env_id].set_state"
            )
        if str(state["suite"]) != self._suite:
            raise ValueError(f"the state belongs to suite {state['suite']}, these environments to {self._suite}")
        scene = load_scenes([get_task(self._suite, int(state["task_id"]))])[0]
        check_state(state, scene)
        self._take_simulation(slot, scene)
        slot.world.set_state(state)
        slot.length = int(state["episode_length"])
        slot.episode_return = float(state["episode_return"])
        slot.last_value = float(state["last_value"])
        slot.is_done = bool(state["is_done"])
        slot.rng.bit_generator.state = json.loads(str(state["rng"]))
        self._stale[env_id] = True

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return `simulation.name(*args, **kwargs)` for each environment, or the attribute if it is not callable."""
        values = (getattr(simulation, name) for simulation in self.simulations)
        return tuple(value(*args, **kwargs) if callable(value) else value for value in values)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return attribute `name` of the simulation of each environment."""
        return tuple(getattr(simulation, name) for simulation in self.simulations)

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads, renderer and simulations; called once by `close`."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._spare_simulations.clear()
        for slot in self._slots:
            slot.simulation = None

    def _open_renderer(self, kind: RendererKind | None, cameras: tuple[str, ...], size: int, threads: int) -> Any:
        from libero_gym.rendering.renderers import (
            make_renderer,  # GL and Warp are imported only where images are wanted
        )

        if self._as_torch and kind is None:
            kind = "warp"
        if self._as_torch and kind != "warp":
            raise ValueError(f"images_as_torch=True needs renderer='warp' (given: {kind!r})")
        return make_renderer(
            kind,
            camera_names=cameras,
            image_size=size,
            num_worlds=self.num_envs,
            num_threads=threads,
            texture_colorspace=self._texture_colorspace,
        )

    def _each(self, function: Callable[[int], Result], indices: Sequence[int] | range) -> list[Result]:
        """Apply `function` to environments, in threads; an error names the environment."""
        if self._pool is None:
            return [self._named(function, i) for i in indices]
        return _results(self._submit(self._pool, function, indices))

    def _submit(
        self, pool: ThreadPoolExecutor, function: Callable[[int], Result], indices: Sequence[int] | range
    ) -> list[Future[Result]]:
        return [pool.submit(self._named, function, i) for i in indices]

    def _named(self, function: Callable[[int], Result], i: int) -> Result:
        try:
            return function(i)
        except Exception as error:
            error.add_note(f"raised by environment {i} of {self.num_envs}")
            raise

    def _step_and_draw(self, chunks: npt.NDArray[np.float64], is_idle: BoolArray) -> list[tuple[bool, bool]]:
        """Run chunks [N, C, 7] and return (terminated, truncated) of each environment.

        What ended early is drawn while threads step the rest, unless drawing needs the same cores.
        """

        def run(i: int) -> tuple[bool, bool]:
            start = time.thread_time()
            ends = self._run_chunk(i, chunks[i], is_idle=bool(is_idle[i]))
            self._slots[i].chunk_s = time.thread_time() - start
            return ends

        everyone = np.arange(self.num_envs)
        if self._pool is None:
            try:
                return self._each(run, range(self.num_envs))
            finally:
                self._mark_stepped(everyone)
        # What took longest the last time begins, so that the threads end together.
        order = np.argsort([-slot.chunk_s for slot in self._slots], kind="stable")
        submitted = self._submit(self._pool, run, order.tolist())
        futures = [submitted[k] for k in np.argsort(order)]
        # The first images are drawn in one piece.
        overlaps = self._images is not None and not self._renderer.uses_all_cores
        num_parts = max(1, min(self.num_envs // _MIN_PART, _MAX_PARTS)) if overlaps else 1
        try:
            for part in np.array_split(order, num_parts):
                if any(futures[i].exception() for i in part):
                    break
                self._mark_stepped(part)
                if overlaps:
                    self._refresh(part)
            return _results(futures)
        except BaseException:
            wait(futures)
            self._mark_stepped(everyone)  # the others have moved all the same
            raise

    def _mark_stepped(self, env_ids: IntArray) -> None:
        self._stale[env_ids] |= [self._slots[i].num_steps > 0 for i in env_ids]

    def _run_chunk(self, i: int, chunk: npt.NDArray[np.float64], *, is_idle: bool) -> tuple[bool, bool]:
        """Step environment `i` until its chunk or its episode ends; return (terminated, truncated)."""
        slot = self._slots[i]
        slot.num_steps = 0
        slot.chunk_rewards = np.zeros(self._num_chunks, np.float32)
        if is_idle or slot.is_done:
            return False, False
        simulation = slot.world
        for step, action in enumerate(chunk):
            is_success = simulation.step(action)
            value = float(is_success)
            reward = value - slot.last_value if self._reward_kind == "relative" else value
            slot.last_value = value
            slot.chunk_rewards[step] = reward
            slot.episode_return += reward
            slot.length += 1
            slot.num_steps += 1
            is_truncated = slot.length >= self._horizon
            if is_success or is_truncated:
                slot.is_done = True
                return is_success, is_truncated
        return False, False

    def _start_episodes(self, indices: IntArray, task_ids: IntArray | None, init_state_ids: IntArray | None) -> None:
        if not len(indices):
            return
        starts = self._draw_starts(indices, task_ids, init_state_ids)
        scenes = load_scenes([task for task, _, _ in starts.values()])
        for i, scene in zip(starts, scenes, strict=True):
            self._take_simulation(self._slots[i], scene)

        def start(i: int) -> None:
            slot = self._slots[i]
            task, init_state_id, placement_seed = starts[i]
            random_state = np.random.RandomState(placement_seed)
            slot.world.reset(task, init_state_id, random_state, init_states=self._init_states)
            slot.length, slot.episode_return, slot.is_done = 0, 0.0, False
            slot.last_value = float(slot.world.success())

        self._each(start, list(starts))
        self._stale[indices] = True

    def _draw_starts(
        self, indices: IntArray, task_ids: IntArray | None, init_state_ids: IntArray | None
    ) -> dict[int, tuple[TaskSpec, int, int]]:
        """Task, initial state and seed of the fixture poses of each environment, drawn in LiberoEnv.reset's order."""
        starts: dict[int, tuple[TaskSpec, int, int]] = {}
        for i in indices:
            rng = self._slots[i].rng
            if task_ids is None:
                task = self._tasks[int(rng.integers(len(self._tasks)))]
            else:
                task = self._known_task(get_task(self._suite, int(task_ids[i])))
            num_states = count_init_states(task, self._init_states)
            init_state_id = int(rng.integers(num_states)) if init_state_ids is None else int(init_state_ids[i])
            if not 0 <= init_state_id < num_states:
                raise ValueError(
                    f"init_state_id={init_state_id} is not among the stored states of {task.suite} task "
                    f"{task.task_id} (valid: 0-{num_states - 1})"
                )
            starts[int(i)] = (task, init_state_id, int(rng.integers(2**32, dtype=np.uint64)))
        return starts

    def _known_task(self, task: TaskSpec) -> TaskSpec:
        if task not in self._tasks:
            raise ValueError(
                f"task_id={task.task_id} of {task.suite} is not among the tasks that these environments were made for "
                f"(valid: {[known.task_id for known in self._tasks]}); make them with it in task_ids"
            )
        return task

    def _take_simulation(self, slot: _Slot, scene: Scene) -> None:
        """Give `slot` a simulation of `scene`: its own, a spare one, or a new one."""
        if slot.simulation is not None:
            if slot.simulation.scene is scene:
                return
            self._spare_simulations.append(slot.simulation)
        spare = next((i for i, other in enumerate(self._spare_simulations) if other.scene is scene), None)
        if spare is None:
            slot.simulation = Simulation(scene, stepping=self._stepping)
        else:
            slot.simulation = self._spare_simulations.pop(spare)
        del self._spare_simulations[: -self.num_envs]

    def _observe(self) -> dict[str, Any]:
        """Draw what has changed and return copies."""
        self._refresh(np.arange(self.num_envs))
        observation: dict[str, Any] = {}
        if self._images is not None:
            observation = {key: _copy(self._images[:, camera]) for camera, key in enumerate(OBSERVATION_KEYS)}
        observation["states"] = self._states.copy()
        observation["task_descriptions"] = tuple(slot.task.language for slot in self._slots)
        return observation

    def _refresh(self, env_ids: IntArray) -> None:
        """Draw those of the environments that have changed."""
        indices = env_ids[self._stale[env_ids]]
        for i in indices:
            self._states[i] = self._slots[i].world.states()
        images = self._draw(indices)
        if images is not None:
            if len(indices) == self.num_envs:
                self._images = images
            else:
                self._images[indices] = images
        self._stale[indices] = False

    def _draw(self, indices: IntArray) -> Any:
        """Images [num, num_cameras, H, W, 3] of some environments; None without images or environments."""
        if self._renderer is None or not len(indices):
            return None
        worlds = [self._slots[i].world for i in indices]
        return self._renderer.render_torch(worlds) if self._as_torch else self._renderer.render(worlds)

    def _episode_infos(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "success": np.array([slot.world.success() for slot in self._slots]),
            "task_id": np.array([slot.task.task_id for slot in self._slots]),
            "init_state_id": np.array([slot.world.init_state_id for slot in self._slots]),
            "episode_length": np.array([slot.length for slot in self._slots]),
            "episode_return": np.array([slot.episode_return for slot in self._slots]),
        }

    def _infos(self) -> dict[str, Any]:
        return self._episode_infos() | {
            "rewards": np.stack([slot.chunk_rewards for slot in self._slots]),
            "num_steps": np.array([slot.num_steps for slot in self._slots]),
        }

    def _check_actions(self, actions: Any, worlds: Sequence[Simulation]) -> npt.NDArray[np.float64]:
        """Return actions as [N, C, 7]."""
        values = np.asarray(actions, dtype=np.float64)
        expected = (self.num_envs, ACTION_DIM)
        if self._num_chunks > 1:
            expected = (self.num_envs, self._num_chunks, ACTION_DIM)
        if values.shape != expected and (self._num_chunks > 1 or values.shape != (self.num_envs, 1, ACTION_DIM)):
            raise ValueError(f"actions have shape {values.shape}; expected {expected}")
        chunks = values.reshape(self.num_envs, self._num_chunks, ACTION_DIM)
        is_bad = ~np.isfinite(chunks).all(axis=-1)  # [N, C]
        if is_bad.any():
            env_ids, steps = np.nonzero(is_bad)
            raise worlds[env_ids[0]].physics_error(
                f"actions of environments {np.unique(env_ids).tolist()} are not finite; "
                "check the policy's output for NaN",
                chunks[env_ids[0], steps[0]],
            )
        return chunks

    def _reset_mask(self, mask: Any) -> BoolArray:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        values = np.asarray(mask)
        if values.dtype != np.bool_ or values.shape != (self.num_envs,):
            raise ValueError(
                f"reset_mask is {values.dtype} {values.shape}; expected bool ({self.num_envs},), True = reset"
            )
        if not values.any():
            raise ValueError("reset_mask is False everywhere; at least one environment must be reset")
        fresh = [i for i in range(self.num_envs) if not values[i] and not self._is_started(i)]
        if fresh:
            raise ValueError(f"reset_mask leaves out environments {fresh}, which were never reset")
        return values

    def _is_started(self, env_id: int) -> bool:
        return self._slots[env_id].simulation is not None

    def _ids(self, name: str, ids: Any) -> IntArray | None:
        if ids is None:
            return None
        values = np.asarray(ids)
        if values.dtype.kind not in "iu" or values.shape not in ((), (self.num_envs,)):
            raise ValueError(f"{name} is {values.dtype} {values.shape}; expected an int, or int ({self.num_envs},)")
        return np.broadcast_to(values, self.num_envs).astype(np.int64)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed has {len(seed)} entries; expected an int or one for each of {self.num_envs}")
        return [None if value is None else int(value) for value in seed]

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError(CLOSED)

    def _slot(self, env_id: int) -> _Slot:
        self._require_open()
        if not 0 <= env_id < self.num_envs:
            raise ValueError(f"env_id={env_id} is out of range (valid: 0-{self.num_envs - 1})")
        return self._slots[env_id]


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer")
    return int(value)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    known = {member.name: member for member in AutoresetMode}
    if isinstance(mode, AutoresetMode):
        return mode
    if mode not in known:
        raise ValueError(f"autoreset_mode={mode!r} is unknown (valid: {sorted(known)})")
    return known[mode]


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    """Wait for all to end, then return their results or raise the first error."""
    wait(futures)
    return [future.result() for future in futures]


def _copy(values: Any) -> Any:
    if isinstance(values, tuple):
        return values
    return values.copy() if isinstance(values, np.ndarray) else values.clone()
