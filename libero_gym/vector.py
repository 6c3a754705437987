"""Many LIBERO environments in one process: episodes and their rewards over worlds that are stepped together.

Shape legend: N environments, C steps of an action chunk, K cameras, H = W = `image_size` pixels.
"""

from __future__ import annotations

import copy
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from libero_gym.conventions import CONTROL_FREQUENCY_HZ, STATE_DIM, ActionMode, action_dim
from libero_gym.fork import Owner, Uncopied
from libero_gym.members import Member
from libero_gym.options import (
    CLOSED,
    DEFAULT_CAMERAS,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_RENDER_SIZE,
    METADATA,
    EnvOptions,
    RewardKind,
    check_boolean,
    check_horizon,
    check_keywords,
    check_limit,
    check_render_mode,
    check_reset_options,
    check_seed,
    choose_tasks,
    make_action_space,
    make_observation_space,
    name_views,
    step_reward,
    with_horizon,
)
from libero_gym.physics import inspection
from libero_gym.physics.cpu_worlds import CpuWorlds
from libero_gym.physics.inspection import SegmentationLabel
from libero_gym.physics.simulation import PhysicsError, Simulation, Stepping
from libero_gym.physics.states import EPISODE, check_is_mapping, read_episode, read_task, write_generator
from libero_gym.physics.worlds import BoolArray, IntArray, Steps, Worlds
from libero_gym.rendering.cameras import Camera, check_cameras, check_cameras_of_scene
from libero_gym.rendering.protocol import Renderer, RendererKind, ViewKind, Views
from libero_gym.rendering.textures import TextureColorspace
from libero_gym.tasks.initial_states import EpisodeStart, InitStates, check_init_states, sample_start
from libero_gym.tasks.scenes import load_scene, load_scenes
from libero_gym.tasks.suites import TaskSpec, is_integer, list_tasks, member_suites, task_number

if TYPE_CHECKING:
    from libero_gym.physics.warp_worlds import WarpOptions

_RESET_OPTIONS = ("reset_mask", "task_id", "init_state_id", "placement_seed")


class Episodes:
    """Book-keeping of N episodes: how long they are, what they have been paid, whether they have ended.

    Attributes:
        length: int64 [N], steps so far.
        horizon: int64 [N], steps after which the episode is cut.
        total_reward: float64 [N], sum of the rewards so far.
        last_value: float32 [N], 1 where the goal held at the end of the last step.
        is_done: bool [N], True from an episode's end to the start of the next.
    """

    def __init__(self, num_envs: int, *, reward: RewardKind) -> None:
        """Begin with no episodes."""
        self.length = np.zeros(num_envs, np.int64)
        self.horizon = np.zeros(num_envs, np.int64)
        self.total_reward = np.zeros(num_envs)
        self.last_value = np.zeros(num_envs, np.float32)
        self.is_done = np.zeros(num_envs, np.bool_)
        self._reward: RewardKind = reward

    @property
    def steps_left(self) -> IntArray:
        """int64 [N], steps until an episode is cut."""
        return self.horizon - self.length

    def begin(self, env_ids: IntArray, successes: BoolArray, horizons: Sequence[int]) -> None:
        """Begin episodes in which the goal holds already, or not (bool [num]), to be cut after so many steps each."""
        self.horizon[env_ids] = horizons
        self.length[env_ids], self.total_reward[env_ids], self.is_done[env_ids] = 0, 0.0, False
        self.last_value[env_ids] = successes

    def advance(self, steps: Steps) -> tuple[npt.NDArray[np.float32], BoolArray, BoolArray]:
        """Book steps; return their rewards, float32 [N, C], and which episodes terminated and were truncated, bool [N].

        Rewards are 0 where no step was run. An episode may end both ways at once.
        """
        values = steps.successes.astype(np.float32)
        previous = np.concatenate([self.last_value[:, None], values[:, :-1]], axis=1)
        rewards = np.where(steps.ran, step_reward(self._reward, values, previous), np.float32(0))
        num_steps = steps.ran.sum(axis=1)
        has_stepped = num_steps > 0
        last = np.maximum(num_steps - 1, 0)
        self.last_value[has_stepped] = values[np.arange(len(values)), last][has_stepped]
        self.length += num_steps
        self.total_reward += rewards.sum(axis=1, dtype=np.float64)
        terminations = np.asarray(steps.successes.any(axis=1))
        truncations = has_stepped & (self.length >= self.horizon)
        self.is_done |= terminations | truncations
        return rewards, terminations, truncations

    def get_state(self, env_id: int) -> dict[str, npt.NDArray[Any]]:
        """Return what is known of an episode, by the keys of `libero_gym.physics.states.EPISODE`."""
        return {
            "episode_length": np.array(self.length[env_id]),
            "episode_return": np.array(self.total_reward[env_id]),
            "last_value": np.array(self.last_value[env_id], np.float64),
            "is_done": np.array(self.is_done[env_id]),
        }

    def set_state(self, env_id: int, state: Mapping[str, Any], horizon: int) -> None:
        """Restore what `get_state` returned, in an episode that is cut after `horizon` steps."""
        self.horizon[env_id] = horizon
        self.length[env_id] = int(state["episode_length"])
        self.total_reward[env_id] = float(state["episode_return"])
        self.last_value[env_id] = float(state["last_value"])
        self.is_done[env_id] = bool(state["is_done"])


class LiberoVectorEnv(Uncopied, gymnasium.vector.VectorEnv[dict[str, Any], npt.NDArray[np.float32], npt.NDArray[Any]]):
    """A batch of `libero_gym.env.LiberoEnv`, each with its own task, state and generator.

    Every environment behaves as a single one seeded with `seed + i` does, whatever the number of threads.

    ## Action space
    float32 [N, 7] ([N, 1, 7] is taken too), or [N, C, 7] with `num_action_chunks=C > 1`, where `single_action_space` is
    [C, 7]: a call of `step` then runs up to C steps and observes once, at their end. An environment whose episode ends
    within a chunk idles for its rest. Joint modes have 8 numbers in place of 7, see `LiberoEnv`.

    ## Observation space
    `Dict` as in `LiberoEnv` with a leading N; `task_descriptions` is a tuple of N str. With `images_as_torch=True`
    images, depth and segmentation are torch tensors on the renderer's device (which is a GPU if there is one).

    ## Rewards and ends
    `rewards` float64 [N] sums over the steps run. `terminations`: the goal holds; `truncations`: the horizon is
    reached (both may be True).

    ## Infos
    | key | type | meaning |
    |---|---|---|
    | `rewards` | float32 [N, C] | reward of each step, 0 where none was run |
    | `num_steps` | int64 [N] | steps run by this call |
    | `success` | bool [N] | the goal holds, in the episode observed |
    | `task_id`, `init_state_id` | int64 [N] | of the episode observed; the task's number in `suite` |
    | `episode_length` | int64 [N] | steps of the episode observed |
    | `episode_return` | float64 [N] | its sum of rewards |
    | `final_obs`, `final_info` | dicts of [N] | with SAME_STEP, after an episode's end: what the last step of the ended
      episodes showed, valid where `_final_obs` is True; other rows repeat the current observation. Instructions are
      an array of str there. Gymnasium's own `final_obs` is an array of dicts instead: its wrappers of observations
      need NEXT_STEP, and its `DictInfoToList` takes both, but no torch tensors |

    ## Autoreset
    `autoreset_mode`, also in `metadata["autoreset_mode"]`, as Gymnasium defines them:
    - NEXT_STEP (default): the next call resets a finished environment and ignores its action (no step is run, reward
      0);
    - SAME_STEP: a finished environment is reset in the same call; one that `set_state` or an error has left finished,
      by the next call, as under NEXT_STEP;
    - DISABLED: `reset(options={"reset_mask": bool [N]})` resets it. Until then it idles at no cost: no steps, reward
      0, neither terminated nor truncated again, the observation stays.

    ## Reset
    `reset(seed, options)`. `seed`: an int (environment i gets `seed + i`) or a list of N. Options, each optional:
    `task_id`, `init_state_id` and, with "original" states, `placement_seed` (an int or int [N]), `reset_mask` (bool
    [N], True = reset). What is not chosen is sampled from the environment's own generator; so it is at automatic
    resets. Tasks are sampled alike, or as `set_task_weights` says.

    Environments given the same `task_id`, `init_state_id` and seed start in the same state to the last bit, and stay
    in it under the same actions. A group of G for GRPO is `task_id=numpy.repeat(tasks, G)`,
    `init_state_id=numpy.repeat(states, G)` and `seed=numpy.repeat(seeds, G).tolist()`. The seed decides the fixtures of
    "original" states; "settled" and "held_out" ones hold theirs.

    ## Arguments
    As for `LiberoEnv`, but without `render_mode="human"`, and:
    - `num_envs`: N.
    - `task_ids`: a task named twice is sampled twice as often.
    - `max_episode_steps`: Gymnasium's limit besides the horizon; of the two, the shorter holds. One that is longer than
      the suite's horizon is refused: `horizon` makes episodes longer.
    - `num_action_chunks`: C.
    - `num_threads`: threads for stepping and drawing; None takes all cores that the process may use.
    - `images_as_torch`: see above; needs the renderer "warp".
    - `physics`: "cpu", or "warp" for thousands of environments on a GPU, see there.
    - `warp_options`: for `physics="warp"`, sizes of buffers and limits of the solver; a `PhysicsError` says when they
      do not suffice.

    ## Physics on a GPU
    `physics="warp"` is not LIBERO to the last bit; what it does differently is said in
    `libero_gym.physics.warp_worlds`. Tasks may be of any scenes and suites: environments of one scene are stepped as
    one, scenes at the same time (`libero_gym.physics.warp_groups`). `stepping` has no part in it, `action_mode` and
    `control_freq` are the default ones, and it draws with the renderer "warp" only. A step runs all environments of a
    scene together, so that its time hardly depends on how many of them idle; prefer SAME_STEP autoreset, and states
    that are settled.
    """

    metadata: dict[str, Any] = dict(METADATA)  # noqa: RUF012 - Gymnasium's declaration
    _HOW_TO_MAKE_ANOTHER = (
        "make another one with the same arguments, and give it what get_states returns by set_state(env_id, state)"
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments that there are not; the message names the others."""
        check_keywords(cls.__init__, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        suite: str | TaskSpec,
        num_envs: int = 1,
        *,
        task_id: int | None = None,
        task_ids: Sequence[int] | None = None,
        num_action_chunks: int = 1,
        image_size: int = DEFAULT_IMAGE_SIZE,
        camera_names: Sequence[str | Camera] = DEFAULT_CAMERAS,
        renderer: RendererKind | None = None,
        texture_colorspace: TextureColorspace = "linear",
        observe_images: bool = True,
        observe_depth: bool = False,
        observe_segmentation: bool = False,
        observe_text: bool = True,
        images_as_torch: bool = False,
        reward: RewardKind = "sparse",
        horizon: int | None = None,
        max_episode_steps: int | None = None,
        init_states: InitStates | None = None,
        stepping: Stepping = "exact",
        action_mode: ActionMode = "delta_pose",
        control_freq: int = CONTROL_FREQUENCY_HZ,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        render_mode: str | None = None,
        render_size: int = DEFAULT_RENDER_SIZE,
        physics: Literal["cpu", "warp"] = "cpu",
        warp_options: WarpOptions | None = None,
    ) -> None:
        """Create the environments; on the CPU, scenes are opened by the first reset.

        Raises:
            ValueError: an argument is not among the allowed ones; the message lists them.
            TypeError: there is no such argument, an id is not an integer, or what is True or False is neither.
            FileNotFoundError: the suite has no initial states of this kind; the message lists those that have.
            RendererUnavailableError: the renderer cannot be used on this machine.
            ModuleNotFoundError: LIBERO is not installed, or with `physics="warp"` MuJoCo Warp.
            ImportError: MuJoCo Warp is another version than GPU physics is made for.
        """
        if physics not in ("cpu", "warp"):
            raise ValueError(f"physics={physics!r} is unknown (valid: 'cpu', 'warp')")
        if physics == "cpu" and warp_options is not None:
            raise ValueError(f"{warp_options} is for physics='warp'; leave warp_options out with physics='cpu'")
        if physics == "warp" and stepping != "exact":
            raise ValueError(f"stepping={stepping!r} chooses among CPU steppers; leave it out with physics='warp'")
        check_boolean("images_as_torch", images_as_torch)
        if physics == "warp" and (action_mode != "delta_pose" or control_freq != CONTROL_FREQUENCY_HZ):
            raise ValueError(
                f"physics='warp' has action_mode='delta_pose' and control_freq={CONTROL_FREQUENCY_HZ} only (given: "
                f"{action_mode!r}, {control_freq!r}); take physics='cpu' for others"
            )
        self.num_envs = _positive("num_envs", num_envs)
        self._num_chunks = _positive("num_action_chunks", num_action_chunks)
        self._tasks = choose_tasks(suite, task_id, task_ids)
        suite = suite.suite if isinstance(suite, TaskSpec) else suite
        if render_mode == "human":
            raise ValueError(
                "render_mode='human' shows one environment in a window, and these are many; take gymnasium.make, or "
                "watch a task by python -m libero_gym.play (valid: None, 'rgb_array')"
            )
        check_render_mode(render_mode, METADATA["render_modes"])
        if images_as_torch or physics == "warp":
            asking = "images_as_torch=True" if images_as_torch else "physics='warp'"
            renderer = _only_warp(renderer, asking)
        horizon = check_horizon(horizon, suite)
        limit = check_limit(max_episode_steps, suite, has_horizon=horizon is not None)
        if horizon is not None and limit is not None:
            horizon, limit = min(horizon, limit), None
        self.options = EnvOptions(
            suite=suite,
            tasks=tuple(self._tasks),
            image_size=image_size,
            camera_names=check_cameras(camera_names, self._tasks),
            renderer=renderer,
            observe_images=observe_images,
            observe_depth=observe_depth,
            observe_segmentation=observe_segmentation,
            observe_text=observe_text,
            reward=reward,
            horizon=horizon,
            max_episode_steps=limit,
            init_states=check_init_states(init_states, suite),
            stepping=stepping,
            action_mode=action_mode,
            control_freq=control_freq,
            render_mode=render_mode,
            render_size=render_size,
            texture_colorspace=texture_colorspace,
        )
        if images_as_torch and not self.options.view_kinds:
            raise ValueError("images_as_torch=True needs observe_images=True, or depth or segmentation")
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        fps = max(1, round(control_freq / self._num_chunks))  # a call of `step` shows one frame
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode, "render_fps": fps}
        self._spec: EnvSpec | None = None
        self.render_mode = render_mode
        self.single_observation_space = make_observation_space(
            image_size,
            view_kinds=self.options.view_kinds,
            has_text=observe_text,
            camera_names=camera_names,
            tasks=list_tasks(suite),  # whose states these environments take
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.single_action_space = make_action_space(action_mode, num_action_chunks=self._num_chunks)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        threads = len(os.sched_getaffinity(0)) if num_threads is None else _positive("num_threads", num_threads)

        self._owner = Owner("the vector environment")
        self._renderer = self.options.open_renderer(num_worlds=self.num_envs, num_threads=threads)
        self._viewer: Renderer | None = None
        self._num_threads = threads
        self._worlds: Worlds | None
        if physics == "cpu":
            self._worlds = CpuWorlds(
                self.num_envs,
                stepping=stepping,
                action_mode=action_mode,
                control_freq=control_freq,
                num_threads=threads,
            )
        else:
            from libero_gym.physics.warp_loading import check_mujoco_warp  # imports Warp

            check_mujoco_warp()
            from libero_gym.physics.warp_groups import make_warp_worlds  # imports MuJoCo Warp
            from libero_gym.physics.warp_worlds import WarpOptions

            if not isinstance(cast(Any, warp_options), WarpOptions | None):
                raise TypeError(
                    f"warp_options={warp_options!r} is a {type(warp_options).__name__}; expected a "
                    "libero_gym.physics.warp_worlds.WarpOptions, such as WarpOptions(contacts_per_world=512)"
                )
            self._worlds = make_warp_worlds(
                self._tasks, self.num_envs, num_action_chunks=self._num_chunks, options=warp_options
            )
        generators = [seeding.np_random(None) for _ in range(self.num_envs)]
        self._rngs = [rng for rng, _ in generators]
        self._rng_seeds = [seed for _, seed in generators]
        self._task_probabilities: npt.NDArray[np.float64] | None = None
        self._start_state: Callable[[EpisodeStart], Mapping[str, Any]] | None = None
        self._tasks_with_cameras: set[TaskSpec] = set()
        self._episodes = Episodes(self.num_envs, reward=reward)
        self._rewards = np.zeros((self.num_envs, self._num_chunks), np.float32)  # of the last chunk
        self._num_steps = np.zeros(self.num_envs, np.int64)  # of the last chunk

        # What environments show, and which of it is no longer so.
        self._as_torch = images_as_torch
        self._views: Views | None = None
        self._states = np.zeros((self.num_envs, STATE_DIM), np.float32)
        self._is_stale = np.ones(self.num_envs, np.bool_)
        self._is_undrawn = np.ones(self.num_envs, np.bool_)
        self._is_looked_at = np.ones(self.num_envs, np.bool_)

    @property
    def spec(self) -> EnvSpec | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How Gymnasium made the environments; its `max_episode_steps` is the horizon, the longest of their tasks'."""
        return with_horizon(self._spec, self.options.longest_horizon)

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._spec = spec

    @property
    def generators(self) -> tuple[np.random.Generator, ...]:
        """Each environment's own generator, which what is not chosen is sampled from."""
        return tuple(self._rngs)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`generators`, by Gymnasium's name for them."""
        return self.generators

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What each generator was seeded with; -1 where it is from a restored state."""
        return tuple(self._rng_seeds)

    @property
    def renderer_name(self) -> str | None:
        """Kind of the renderer in use, or None where no pictures are observed."""
        return None if self._renderer is None else self._renderer.name

    @property
    def worlds(self) -> Worlds:
        """The simulated worlds: a `CpuWorlds`; with `physics="warp"` a `WarpWorlds`, a `GroupedWarpWorlds` of scenes.

        What is changed here by hand is not seen by `observe`; `set_state` is.

        Raises:
            ValueError: the environment is closed.
            RuntimeError: this process was forked from the one that made the environment.
        """
        self._owner.check()
        if self._worlds is None:
            raise ValueError(CLOSED)
        return self._worlds

    @property
    def texture_colorspace(self) -> TextureColorspace:
        """Which colours textures have, see `LiberoEnv`."""
        return self.options.texture_colorspace

    @property
    def simulations(self) -> tuple[Simulation, ...]:
        """The live simulation of each environment.

        Raises:
            ValueError: an environment was never reset, or all are closed.
            AttributeError: with `physics="warp"`, whose worlds live on the device.
        """
        worlds = self.worlds
        if not isinstance(worlds, CpuWorlds):
            raise AttributeError("physics='warp' has no simulation for each environment; see `worlds`")
        return worlds.simulations

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes; see the class.

        Raises:
            ValueError: an unknown option, one of wrong shape or type, an id that is not valid, environments left out of
                `reset_mask` that were never reset, a state from `set_start_states` that cannot be restored, or the
                environment is closed. No environment has been touched.
            TypeError: `options` is no dictionary. No environment has been touched.
            PhysicsError: a world diverged while its objects came to rest. The environments concerned are left
                finished, their generators as they were.
        """
        self._require_open()
        options = check_reset_options(options, _RESET_OPTIONS)
        env_ids = np.flatnonzero(self._reset_mask(options.get("reset_mask")))
        task_ids = self._ids("task_id", options.get("task_id"))
        init_state_ids = self._ids("init_state_id", options.get("init_state_id"))
        placement_seeds = self._ids("placement_seed", options.get("placement_seed"))
        seeds = self._seeds(seed)
        # Sampled from copies, so that a reset that is refused leaves the generators as they were.
        rngs = {
            i: copy.deepcopy(self._rngs[i]) if seeds[i] is None else seeding.np_random(seeds[i])[0]
            for i in env_ids.tolist()
        }
        starts = [
            sample_start(
                rng,
                self._tasks,
                self.options.init_states,
                task=None if task_ids is None else self._known_task(int(task_ids[i])),
                init_state_id=None if init_state_ids is None else int(init_state_ids[i]),
                placement_seed=None if placement_seeds is None else int(placement_seeds[i]),
                probabilities=self._task_probabilities,
            )
            for i, rng in rngs.items()
        ]
        self._begin(env_ids, starts)
        for i, rng in rngs.items():
            self._rngs[i] = rng
            if (chosen := seeds[i]) is not None:
                self._rng_seeds[i] = chosen
        self._rewards = np.zeros_like(self._rewards)
        self._num_steps = np.zeros_like(self._num_steps)
        return self._observe(), self._infos()

    def step(
        self, actions: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Run up to C steps in each environment; see the class.

        Raises:
            ValueError: `actions` has the wrong shape, `reset` was not called, or the environment is closed.
            PhysicsError: an action that is not ignored is not finite (nothing has been stepped then), or a simulation
                diverged. Its `dump` is of the first environment concerned, whose step is undone (on a GPU there is
                none: reset what the message names); the others have taken theirs, `observe` shows them, and episodes
                that ended go unreported.
        """
        self._require_started()  # raises before anything moves if an environment was never reset, or all are closed
        is_active = ~self._episodes.is_done
        chunks = self._check_actions(actions, is_active)
        if self.autoreset_mode is not AutoresetMode.DISABLED:
            self._begin_sampled(np.flatnonzero(~is_active))
        terminations, truncations = self._run(chunks, is_active)
        rewards = self._rewards.sum(axis=1, dtype=np.float64)
        ended = terminations | truncations
        observation, final = self._observe(), dict[str, Any]()
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            if self.options.observe_text:  # Gymnasium's wrappers of infos take arrays only
                observation["task_descriptions"] = np.array(observation["task_descriptions"])
            final = {"final_obs": observation, "final_info": self._episode_infos()}
            final |= {"_final_obs": ended.copy(), "_final_info": ended.copy()}
            self._begin_sampled(np.flatnonzero(ended))
            observation = self._observe()
        return observation, rewards, terminations, truncations, self._infos() | final

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Tasks that episodes are sampled from, by their numbers in the suite."""
        return tuple(task_number(self.options.suite, task) for task in self._tasks)

    def set_task_weights(self, weights: Sequence[float] | None) -> None:
        """Say how often the episodes that start from now on are of which task.

        The weights are no part of `get_state`.

        Args:
            weights: one for each of `task_ids`, not negative; None samples all alike, as at first.

        Raises:
            ValueError: they are not as many as the tasks, negative, not finite, or all 0.
        """
        if weights is None:
            self._task_probabilities = None
            return
        values = _as_numbers("weights", weights, (len(self._tasks),))
        if values.shape != (len(self._tasks),):
            raise ValueError(f"weights have shape {values.shape}; give one for each of the tasks {list(self.task_ids)}")
        if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
            raise ValueError(f"weights={values.tolist()}: they must be finite, not negative, and not all 0")
        self._task_probabilities = values / values.sum()

    def set_start_states(self, start_state: Callable[[EpisodeStart], Mapping[str, Any]] | None) -> None:
        """Say in which state of its world an episode begins from now on, by whatever reset.

        Args:
            start_state: returns, for what was chosen or sampled, what `get_state` of these environments' worlds (on the
                CPU, of a `Simulation`) returned at that task; what it raises, and a state that cannot be restored,
                leave the environments as they were. None begins at the initial state itself, as at first.

        Raises:
            TypeError: `start_state` is no function.
        """
        if start_state is not None and not callable(cast(Any, start_state)):
            raise TypeError(
                f"start_state={start_state!r} is no function; give one that takes an EpisodeStart and returns "
                "what Simulation.get_state returned, or None"
            )
        self._start_state = start_state

    def draw_only(self, env_ids: Sequence[int] | None) -> None:
        """Say whose images are drawn from now on, for those who look at few of them.

        Those of other environments, and their depth and segmentation, are as they were drawn last; at first black, 0 m
        and -1.

        Args:
            env_ids: environments that are drawn; None draws all, as at first.

        Raises:
            ValueError: there is no such environment.
            TypeError: they are no sequence.
        """
        chosen = self._check_env_ids(range(self.num_envs) if env_ids is None else env_ids)
        self._is_looked_at = np.isin(np.arange(self.num_envs), chosen)

    def observe(self) -> dict[str, Any]:
        """Return the current observation of all environments, for instance after `set_state`.

        Raises:
            ValueError: an environment was never reset, or all are closed.
        """
        self._require_started()
        return self._observe()

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Return what the first camera sees, upright and not mirrored; None without a render mode.

        Returns:
            For each environment uint8 (render_size, render_size, 3).

        Raises:
            ValueError: an environment was never reset, or all are closed.
            RendererUnavailableError: no renderer can be used on this machine.
        """
        if self.render_mode is None:
            return None
        return tuple(self.render_some(np.arange(self.num_envs)))

    def render_some(self, env_ids: IntArray) -> npt.NDArray[np.uint8]:
        """Return what `render` does for some of the environments, uint8 [num, render_size, render_size, 3].

        Raises:
            ValueError: there is no such environment; else as `render`.
            TypeError: they are no sequence.
        """
        env_ids = self._check_env_ids(env_ids)
        self._require_started()
        if self._viewer is None:
            self._viewer = self.options.open_viewer(num_worlds=self.num_envs, num_threads=self._num_threads)
        views = self.worlds.views(self._viewer, env_ids, as_torch=False)
        return np.ascontiguousarray(views.images[:, 0, :, ::-1])

    def get_state(self, env_id: int) -> dict[str, Any]:
        """Return everything that decides the future of environment `env_id`, as arrays; no entry needs pickle.

        Raises:
            ValueError: `env_id` is no integer or out of range, or the environment was never reset.
        """
        self._check_env_id(env_id)
        return self._with_episode(env_id, self.worlds.get_state(env_id))

    def get_states(self) -> list[dict[str, Any]]:
        """Return `get_state` of all environments, on a GPU many times faster than one by one; see there."""
        return [self._with_episode(env_id, state) for env_id, state in enumerate(self.worlds.get_states())]

    def set_state(self, env_id: int, state: Mapping[str, Any]) -> None:
        """Restore in environment `env_id` what `get_state` returned, to the last bit; also from another environment.

        On the CPU, states go to and from a `LiberoEnv`, too.

        Raises:
            ValueError: `env_id` is no integer or out of range, or an entry of the state is missing, surplus, of
                another type or shape, not finite or out of its range, or the state belongs to another suite or other
                versions; with `physics="warp"` also where it belongs to a task that these were not made for. Nothing
                has been touched.
            TypeError: `state` is no dictionary.
        """
        self._check_env_id(env_id)
        check_is_mapping(state)
        missing = sorted(set(EPISODE) - set(state))
        if missing:
            raise ValueError(
                f"the state lacks {missing}: give what get_state of an environment returned; that of a simulation goes "
                "to simulations[env_id].set_state"
            )
        task = read_task(state)
        if task.suite not in member_suites(self.options.suite):
            raise ValueError(f"the state belongs to suite {task.suite}, these environments to {self.options.suite}")
        episode, rng = read_episode(state)
        self._check_cameras([task])
        self.worlds.set_state(env_id, {name: state[name] for name in state if name not in EPISODE})
        self._episodes.set_state(env_id, episode, self.options.horizon_of(task))
        self._rngs[env_id], self._rng_seeds[env_id] = rng, -1
        self._is_stale[env_id] = True

    def object_poses(self, env_id: int) -> dict[str, npt.NDArray[np.float64]]:
        """Return where the objects of environment `env_id` are, see `LiberoEnv.object_poses`.

        With `physics="warp"` computed on the CPU from the positions at the step's end, one environment at a time.
        """
        self._check_env_id(env_id)
        worlds = self.worlds
        if isinstance(worlds, CpuWorlds):
            return inspection.object_poses(worlds.simulations[env_id])
        return inspection.inspect_positions(worlds.get_state(env_id))[0]

    def goal_state(self, env_id: int) -> dict[str, bool]:
        """Return which parts of the goal of environment `env_id` hold, see `LiberoEnv.goal_state`.

        With `physics="warp"` judged on the CPU by the positions at the step's end, whose contacts may differ from those
        that the GPU found where shapes barely touch.
        """
        self._check_env_id(env_id)
        worlds = self.worlds
        if isinstance(worlds, CpuWorlds):
            return inspection.goal_state(worlds.simulations[env_id])
        return inspection.inspect_positions(worlds.get_state(env_id))[1]

    def hold_action(self, env_id: int) -> npt.NDArray[np.float32]:
        """Return the action that keeps arm and gripper of environment `env_id`, see `LiberoEnv.hold_action`."""
        self._check_env_id(env_id)
        worlds = self.worlds
        if isinstance(worlds, CpuWorlds):
            return worlds.simulations[env_id].hold_action().astype(np.float32)
        return np.zeros(action_dim("delta_pose"), np.float32)

    def segmentation_labels(self, env_id: int) -> dict[int, SegmentationLabel]:
        """Return what the numbers in `segmentation` of environment `env_id` are, see `LiberoEnv.segmentation_labels`.

        Raises:
            ValueError: `env_id` is no integer or out of range, or the environment was never reset.
        """
        self._check_env_id(env_id)
        return inspection.segmentation_labels(load_scene(self._current_tasks()[env_id]))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return `env.name(*args, **kwargs)` for each environment, or the attribute if it is not callable.

        Raises:
            AttributeError: a `libero_gym.members.Member` (one of `envs`) has no such attribute.
        """
        values = self.get_attr(name)
        return tuple(value(*args, **kwargs) if callable(value) else value for value in values)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return attribute `name` of each environment.

        Raises:
            AttributeError: a `libero_gym.members.Member` (one of `envs`) has no such attribute.
        """
        if not hasattr(Member, name):
            together = name in ("reset", "step", "close")
            hint = f"; call {name} of the vector environment, which does it with all" if together else ""
            raise AttributeError(f"an environment of a LiberoVectorEnv has no attribute {name!r}{hint}")
        return tuple(getattr(member, name) for member in self.envs)

    @property
    def envs(self) -> tuple[Member, ...]:
        """Each environment as a single one shows itself; what has to do with an episode, from the first reset on."""
        return tuple(Member(self, env_id) for env_id in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Release threads, renderer and worlds, in the process that made them; called once by `close`."""
        if not self._owner.is_this_process:
            return
        if self._worlds is not None:
            self._worlds.close()
            self._worlds = None
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None

    def _begin(self, env_ids: IntArray, starts: Sequence[EpisodeStart]) -> None:
        """Start episodes where `starts` says."""
        if not len(env_ids):
            return
        self._check_cameras([start.task for start in starts])
        states = self._read_start_states(env_ids, starts)
        try:
            if self._start_state is None:
                self.worlds.reset(env_ids, starts, init_states=self.options.init_states)
            else:
                for i, state in zip(env_ids.tolist(), states, strict=True):
                    self.worlds.set_state(i, state)
        except PhysicsError:
            self._episodes.is_done[env_ids] = True  # nothing good can come of them before another reset
            self._is_stale[env_ids] = True
            raise
        horizons = [self.options.horizon_of(start.task) for start in starts]
        self._episodes.begin(env_ids, self.worlds.success()[env_ids], horizons)
        self._is_stale[env_ids] = True

    def _read_start_states(self, env_ids: IntArray, starts: Sequence[EpisodeStart]) -> list[Mapping[str, Any]]:
        """Return the states of `set_start_states`, all of which can be restored; none without it.

        Raises:
            ValueError: a state is of another task, or cannot be restored. No world has been touched.
            TypeError: it is no dictionary. No world has been touched.
        """
        if self._start_state is None:
            return []
        states = [self._start_state(start) for start in starts]
        for i, start, state in zip(env_ids.tolist(), starts, states, strict=True):
            try:
                task = read_task(state)
                if task != start.task:
                    raise ValueError(f"it is of {task.suite} task {task.task_id}")
                self.worlds.check_state(i, state)
            except (ValueError, TypeError) as error:
                source = "Simulation" if isinstance(self.worlds, CpuWorlds) else "envs.worlds"
                raise (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"the function of set_start_states returned a state for environment {i} that cannot begin an "
                    f"episode of {start.task.suite} task {start.task.task_id}: {error}; return what "
                    f"{source}.get_state returned at that task"
                ) from error
        return states

    def _check_cameras(self, tasks: Sequence[TaskSpec]) -> None:
        """Raise ValueError unless the tasks' scenes have what the cameras are of; looks at each task once."""
        new = [task for task in dict.fromkeys(tasks) if task not in self._tasks_with_cameras]
        for task, scene in zip(new, load_scenes(new), strict=True):
            check_cameras_of_scene(self.options.camera_names, scene)
            self._tasks_with_cameras.add(task)

    def _begin_sampled(self, env_ids: IntArray) -> None:
        """Start episodes of which the environments' own generators decide."""
        kind = self.options.init_states
        probabilities = self._task_probabilities
        starts = [sample_start(self._rngs[i], self._tasks, kind, probabilities=probabilities) for i in env_ids]
        self._begin(env_ids, starts)

    def _run(self, chunks: npt.NDArray[np.float64], is_active: BoolArray) -> tuple[BoolArray, BoolArray]:
        """Run chunks [N, C, A] and book them; return which episodes terminated and which were truncated.

        What ends early is drawn while the rest is stepped, unless drawing needs the same cores. The first images are
        drawn in one piece.
        """
        steps = Steps.none(self.num_envs, self._num_chunks)
        is_shown = np.zeros(self.num_envs, np.bool_)

        def show(env_ids: IntArray) -> None:
            self._is_stale[env_ids] |= steps.ran[env_ids].any(axis=1)
            is_shown[env_ids] = True
            self._refresh(env_ids)

        overlaps = self._renderer is not None and self._views is not None and not self._renderer.uses_all_cores
        try:
            self.worlds.step(
                chunks, is_active, self._episodes.steps_left, out=steps, on_part_done=show if overlaps else None
            )
        finally:  # after an error too: what has moved has moved
            self._is_stale |= ~is_shown & steps.ran.any(axis=1)
            self._rewards, terminations, truncations = self._episodes.advance(steps)
            self._num_steps = steps.ran.sum(axis=1)
        return terminations, truncations

    def _observe(self) -> dict[str, Any]:
        """Draw what has changed and return copies."""
        self._refresh(np.arange(self.num_envs))
        observation: dict[str, Any] = {}
        if self._views is not None:
            views = name_views(self.options.camera_names, self._views)
            observation = {key: view.clone() if self._as_torch else view.copy() for key, view in views.items()}
        observation["states"] = self._states.copy()
        if self.options.observe_text:
            observation["task_descriptions"] = tuple(task.language for task in self._current_tasks())
        return observation

    def _refresh(self, env_ids: IntArray) -> None:
        """Read and draw those of the environments that have changed."""
        changed = np.sort(env_ids[self._is_stale[env_ids]])
        if len(changed):
            self._states[changed] = self.worlds.states(changed)
            self._is_stale[changed] = False
            self._is_undrawn[changed] = True
        drawn = np.sort(env_ids[(self._is_undrawn & self._is_looked_at)[env_ids]])
        if self._renderer is None:
            return
        if len(drawn) == self.num_envs:
            self._views = self.worlds.views(self._renderer, drawn, as_torch=self._as_torch)
        else:
            if self._views is None:
                self._views = self._blank_views(self._renderer)
            if len(drawn):
                views = self.worlds.views(self._renderer, drawn, as_torch=self._as_torch)
                for known, view in zip(self._views, views, strict=True):
                    if view is not None:
                        known[drawn] = view
        self._is_undrawn[drawn] = False

    def _blank_views(self, renderer: Renderer) -> Views:
        """Return what is shown of environments that were never drawn."""
        spaces = self.single_observation_space.spaces
        blank: dict[ViewKind, Any] = {"images": 0, "depth": 0, "segmentation": -1}
        arrays: dict[ViewKind, Any] = {}
        for kind in self.options.view_kinds:
            space = spaces[kind]
            shape = (self.num_envs, len(self.options.camera_names), *space.shape)
            arrays[kind] = np.full(shape, blank[kind], space.dtype)
        if self._as_torch:
            import torch

            device = cast(Any, renderer).device
            arrays = {kind: torch.from_numpy(array).to(device) for kind, array in arrays.items()}
        return Views(**{kind: arrays.get(kind) for kind in blank})

    def _current_tasks(self) -> list[TaskSpec]:
        tasks = [task for task in self.worlds.current_tasks if task is not None]
        if len(tasks) < self.num_envs:
            raise ValueError("reset() must be called first")
        return tasks

    def _episode_infos(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "success": self.worlds.success(),
            "task_id": np.array([task_number(self.options.suite, task) for task in self._current_tasks()]),
            "init_state_id": self.worlds.init_state_ids,
            "episode_length": self._episodes.length.copy(),
            "episode_return": self._episodes.total_reward.copy(),
        }

    def _infos(self) -> dict[str, Any]:
        return self._episode_infos() | {"rewards": self._rewards.copy(), "num_steps": self._num_steps.copy()}

    def _with_episode(self, env_id: int, world_state: dict[str, Any]) -> dict[str, Any]:
        rng = write_generator(self._rngs[env_id])
        return world_state | self._episodes.get_state(env_id) | {"rng": rng}

    def _known_task(self, task_id: int) -> TaskSpec:
        task = self.options.find_task(task_id)
        if task is None:
            raise ValueError(
                f"task_id={task_id} of {self.options.suite} is not among the tasks that these environments were made "
                f"for (valid: {list(self.task_ids)}); make them with it in task_ids"
            )
        return task

    def _check_actions(self, actions: Any, is_active: BoolArray) -> npt.NDArray[np.float64]:
        """Return actions as [N, C, A]; those of environments that are not active are ignored, and 0 in what returns."""
        width = action_dim(self.options.action_mode)
        expected = (self.num_envs, width)
        if self._num_chunks > 1:
            expected = (self.num_envs, self._num_chunks, width)
        values = _as_numbers("actions", actions, expected)
        if values.shape != expected and (self._num_chunks > 1 or values.shape != (self.num_envs, 1, width)):
            raise ValueError(f"actions have shape {values.shape}; expected {expected}")
        chunks = np.where(is_active[:, None, None], values.reshape(self.num_envs, self._num_chunks, width), 0.0)
        is_bad = ~np.isfinite(chunks).all(axis=-1)  # [N, C]
        if is_bad.any():
            env_ids, steps = np.nonzero(is_bad)
            raise self.worlds.physics_error(
                int(env_ids[0]),
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
        tasks = self.worlds.current_tasks
        fresh = [i for i in range(self.num_envs) if not values[i] and tasks[i] is None]
        if fresh:
            raise ValueError(f"reset_mask leaves out environments {fresh}, which were never reset")
        return values

    def _ids(self, name: str, ids: Any) -> IntArray | None:
        if ids is None:
            return None
        values = np.asarray(ids)
        if values.dtype.kind not in "iu" or values.shape not in ((), (self.num_envs,)):
            raise ValueError(f"{name} is {values.dtype} {values.shape}; expected an int, or int ({self.num_envs},)")
        return np.broadcast_to(values, self.num_envs).astype(np.int64)

    def _seeds(self, seed: Any) -> Sequence[int | None]:
        if np.ndim(seed) == 0:
            check_seed(seed)
            return [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        seeds: list[Any] = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed has {len(seeds)} entries; expected an int or one for each of {self.num_envs}")
        for value in seeds:
            check_seed(value)
        return [None if value is None else int(value) for value in seeds]

    def _require_open(self) -> None:
        _ = self.worlds

    def _require_started(self) -> None:
        self._current_tasks()

    def _check_env_id(self, env_id: int) -> None:
        self._require_open()
        if not is_integer(env_id):
            hint = "; numpy.flatnonzero(mask) gives those of a mask" if isinstance(env_id, bool | np.bool_) else ""
            raise ValueError(f"env_id={env_id!r} is not an integer (valid: 0-{self.num_envs - 1}){hint}")
        if not 0 <= env_id < self.num_envs:
            raise ValueError(f"env_id={env_id} is out of range (valid: 0-{self.num_envs - 1})")

    def _check_env_ids(self, env_ids: Sequence[int] | IntArray) -> IntArray:
        """Return ids as int64 [num]."""
        if isinstance(env_ids, str) or np.ndim(env_ids) != 1:
            raise TypeError(f"env_ids={env_ids!r} is not a sequence of environments (for one: [{env_ids}])")
        for env_id in env_ids:
            self._check_env_id(cast(int, env_id))
        return np.array(env_ids, np.int64)


def _only_warp(renderer: RendererKind | None, asking: str) -> RendererKind:
    if renderer not in (None, "warp"):
        raise ValueError(f"{asking} draws with renderer='warp' (given: {renderer!r})")
    return "warp"


def _as_numbers(name: str, values: Any, expected: tuple[int, ...]) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        given = reprlib.repr(values)
        raise ValueError(f"{name}={given} are no array of numbers ({error}); expected {expected}") from error


def _positive(name: str, value: Any) -> int:
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer")
    return int(value)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    known = {member.name: member for member in AutoresetMode}
    if isinstance(mode, AutoresetMode):
        return mode
    if not isinstance(cast(Any, mode), str) or mode not in known:
        raise ValueError(f"autoreset_mode={mode!r} is unknown (valid: {sorted(known)})")
    return known[mode]
