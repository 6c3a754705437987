"""One LIBERO task as a Gymnasium environment."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self, SupportsFloat, cast

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding

from libero_gym.conventions import CONTROL_FREQUENCY_HZ, ActionMode
from libero_gym.fork import Owner, Uncopied
from libero_gym.options import (
    CLOSED,
    DEFAULT_CAMERAS,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_RENDER_SIZE,
    METADATA,
    EnvOptions,
    RewardKind,
    check_horizon,
    check_keywords,
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
from libero_gym.physics.inspection import SegmentationLabel
from libero_gym.physics.simulation import PhysicsError, Simulation, Stepping
from libero_gym.physics.states import EPISODE, read_episode, read_task, write_generator
from libero_gym.rendering.cameras import Camera, check_cameras, check_cameras_of_scene
from libero_gym.rendering.protocol import Renderer, RendererKind
from libero_gym.rendering.textures import TextureColorspace
from libero_gym.tasks.initial_states import InitStates, check_init_states, sample_start
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, list_tasks, member_suites, task_number
from libero_gym.window import Window, check_usable, is_usable

__all__ = ["LiberoEnv", "PhysicsError"]

# What single environments of version 0.1.0 did not save.
_OLDER_STATES_LACK = {"episode_return": np.array(0.0), "is_done": np.array(False)}


class LiberoEnv(Uncopied, gymnasium.Env[dict[str, Any], npt.NDArray[np.float32]]):
    """A Franka Panda arm at a table, with a task given as a sentence.

    ## Description
    The tasks of LIBERO (Liu et al., 2023) and LIBERO-PRO, simulated with MuJoCo at 500 Hz and controlled at 20 Hz
    (`control_freq`).
    Dynamics, initial states, observations and success are those of LIBERO's own environment, to the last bit on one
    build of BLAS and MuJoCo from 3.3.6 on.

    ## Action space
    `Box(-1, 1, (7,), float32)`; values outside are clipped.

    | index | meaning | unit |
    |---|---|---|
    | 0-2 | desired change of the end effector's position, world frame | 5 cm |
    | 3-5 | desired rotation of the end effector, axis-angle, world frame | 0.5 rad |
    | 6 | gripper: negative opens, positive closes, 0 holds | |

    An operational-space controller turns them into joint torques for 25 physics steps of 2 ms.

    So it is with `action_mode="delta_pose"`, LIBERO's. The others have robosuite 1.4's other controllers; the last
    number is the gripper's, as above, in all of them:

    | `action_mode` | numbers before the gripper's | Box | robosuite |
    |---|---|---|---|
    | `"delta_pose"` | 6, see above | -1..1, clipped | OSC_POSE |
    | `"absolute_pose"` | 6: position (m) and axis-angle (rad) | -2..2, -2 pi..2 pi | OSC_POSE, `control_delta: false` |
    | `"delta_joint_pos"` | 7: desired change of the joints | -1..1, clipped, units of 0.05 rad | JOINT_POSITION |
    | `"absolute_joint_pos"` | 7: desired joint positions, rad | the joints' limits | JOINT_POSITION, `set_qpos` |

    Absolute numbers are not clipped, as in robosuite. The pose is that of the grip site, in the world's frame. `states`
    holds the same position, but the orientation of the hand, from which the site's differs by -90 degrees about z;
    `hold_action` returns what stands for the present pose.

    ## Observation space
    `Dict`:

    | key | space | meaning |
    |---|---|---|
    | `images` | uint8 (H, W, 3) | camera `camera_names[0]` |
    | `wrist_images` | uint8 (H, W, 3) | camera `camera_names[1]` |
    | `states` | float32 (8,) | end effector's position (3, m), axis-angle (3, rad), finger positions (2, m) |
    | `task_descriptions` | Text | the instruction; without `observe_text` it is left out |
    | `depth`, `wrist_depth` | float32 (H, W, 1) | with `observe_depth`: metres along the camera's axis |
    | `segmentation`, `wrist_segmentation` | int32 (H, W, 1) | with `observe_segmentation`: ids of bodies |

    Depth is the distance of what is seen at a pixel's centre from the plane of the camera (not along the ray), as
    robosuite's `get_real_depth_map` returns it; where nothing is seen it is that of MuJoCo's far clipping plane (530 m,
    in kitchens 592 m). Segmentation tells the body of MuJoCo's model that is seen there, -1 where none is;
    `segmentation_labels` names bodies and the objects that they are parts of. That is finer than robosuite's
    "instance", a cabinet's drawers being told apart, and coarser than its "element". Both show the same pixels as the
    images, mirrored as they are.

    Images follow the public LIBERO clients and released checkpoints: LIBERO's raw image rotated by 180 degrees. The
    raw image is the camera's true view flipped vertically (OpenGL's row order), so what is returned is the *mirror
    image* of the true view. Observations are those of 2 ms before the step's end, as in LIBERO. No two observations
    share memory.

    ## Reward
    `reward="sparse"`: 1 at each step at whose end the goal holds, else 0; as the episode ends there, an episode
    returns 0 or 1. `reward="relative"`: the change of that value since the previous step, for use with environments
    that go on after success.

    ## Starting state
    One of the initial states of the task (50 of each kind), after the customary ten steps without motion in which
    objects come to rest, which count for nothing. `init_states="settled"` takes them as they came to rest under
    MuJoCo 3.3, before a change of contacts that makes some of them end elsewhere (see
    `libero_gym.tasks.initial_states`), fixtures included; `"held_out"` (not libero_90) takes states that LIBERO's
    reset sampled and that are none of the stored ones, come to rest alike; `"original"` places fixtures at random as
    LIBERO does and settles under the installed version.
    Without options the task (unless fixed by `task_id`), the state and the seed of the fixtures are sampled from the
    environment's own generator, which `reset(seed=...)` seeds. `reset(options={"task_id": 3, "init_state_id": 7})`
    chooses. With "original" states `placement_seed` chooses the fixtures too: `reset(options={"init_state_id": 7,
    "placement_seed": 5})` equals LIBERO's `env.seed(5); env.reset(); env.set_init_state(states[7])` on an environment
    just made, and ten steps without motion. `reset(seed=5)` alone does not.

    ## Episode end
    `terminated` when the goal holds; `truncated` after `horizon` steps (default: that of the task's own suite, see
    `libero_gym.tasks.suites.HORIZONS`). Gymnasium's `max_episode_steps` is a limit besides, which makes episodes
    shorter, not longer.

    `info` has `success` (bool), `task_id` (the task's number in `suite`), `init_state_id`, and `episode_length` (steps
    so far).

    ## Arguments
    - `suite`: see `libero_gym.list_suites()`; or one task, from `libero_gym.list_tasks`. A combined suite, such as
      `libero_40`, holds the tasks of several suites, numbered one suite after another
      (`libero_gym.tasks.suites.COMBINED_SUITES`).
    - `task_id`: fixes the task; None samples one at each reset.
    - `task_ids`: sequence of tasks to sample from, instead of `task_id`; None takes all of the suite.
    - `image_size`: height and width in pixels, 1 to 4096.
    - `camera_names`: cameras of `images`, `wrist_images`, and `<name>_images` for further ones, as many as wanted:
      names among `libero_gym.list_cameras(task)`, or a `libero_gym.Camera` of one's own with pose and field of view.
    - `renderer`: "egl", "osmesa" or "warp"; None takes the best that the machine has.
    - `texture_colorspace`: "linear" draws textures as MuJoCo up to 3.3.2 did, which public data sets and released
      checkpoints saw, under any version and by any renderer; "auto" as the installed MuJoCo does, which is much darker
      on the floor of libero_object from 3.3.3 on (see `libero_gym.rendering.textures`).
    - `observe_images`: False leaves the images out. Without depth and segmentation, that needs no renderer.
    - `observe_depth`, `observe_segmentation`: True adds them for each camera, see above; by every renderer. Those of
      further cameras are `<name>_depth` and `<name>_segmentation`.
    - `observe_text`: False leaves the instruction out, for libraries that take numbers only.
    - `reward`, `horizon`: see above.
    - `init_states`: see above; None is "settled" for the suites that it is recorded for, else "original".
    - `stepping`: "exact", "fast" or "numpy", see `libero_gym.physics.simulation.Simulation`.
    - `action_mode`: see above.
    - `control_freq`: environment steps a second, robosuite's; a divisor of 500 Hz up to 250. `horizon` counts steps,
      however long. Objects come to rest at 20 Hz by "delta_pose" always, so that starts are the same for all.
    - `render_mode`: "rgb_array": `render()` returns what the first camera sees, as it sees it: upright and not
      mirrored; "human" shows it in a window at 20 frames a second, at each reset and step. That needs pygame and a
      display; the metadata of an environment made without them do not list it.
    - `render_size`: height and width of that picture, 1 to 4096 pixels. It has a renderer of its own, opened when first
      needed.

    ## Version history
    - v0: initial version.
    """

    metadata: dict[str, Any] = {**METADATA, "render_modes": ["rgb_array", "human"]}  # noqa: RUF012 - Gymnasium's
    _HOW_TO_MAKE_ANOTHER = (
        "make another one by gymnasium.make(env.spec), reset it, and give its unwrapped.set_state what this one's "
        "unwrapped.get_state returns"
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments that there are not; the message names the others."""
        check_keywords(cls.__init__, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        suite: str | TaskSpec,
        *,
        task_id: int | None = None,
        task_ids: Sequence[int] | None = None,
        image_size: int = DEFAULT_IMAGE_SIZE,
        camera_names: Sequence[str | Camera] = DEFAULT_CAMERAS,
        renderer: RendererKind | None = None,
        texture_colorspace: TextureColorspace = "linear",
        observe_images: bool = True,
        observe_depth: bool = False,
        observe_segmentation: bool = False,
        observe_text: bool = True,
        reward: RewardKind = "sparse",
        horizon: int | None = None,
        init_states: InitStates | None = None,
        stepping: Stepping = "exact",
        action_mode: ActionMode = "delta_pose",
        control_freq: int = CONTROL_FREQUENCY_HZ,
        render_mode: str | None = None,
        render_size: int = DEFAULT_RENDER_SIZE,
    ) -> None:
        """Create the environment; scenes are opened by the first reset.

        Raises:
            ValueError: an argument is not among the allowed ones; the message lists them.
            TypeError: there is no such argument, an id is not an integer, or what is True or False is neither.
            DependencyNotInstalled: `render_mode="human"` without pygame.
            RuntimeError: `render_mode="human"` without a display.
            FileNotFoundError: the suite has no initial states of this kind; the message lists those that have.
            RendererUnavailableError: the renderer cannot be used on this machine.
            ModuleNotFoundError: LIBERO is not installed.
        """
        self._tasks = choose_tasks(suite, task_id, task_ids)
        suite = suite.suite if isinstance(suite, TaskSpec) else suite
        check_render_mode(render_mode, self.metadata["render_modes"])
        if render_mode == "human":
            check_usable()
        self.metadata = {**self.metadata, "render_fps": control_freq}
        if not is_usable():
            self.metadata["render_modes"] = ["rgb_array"]
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
            horizon=check_horizon(horizon, suite),
            init_states=check_init_states(init_states, suite),
            stepping=stepping,
            action_mode=action_mode,
            control_freq=control_freq,
            render_mode=render_mode,
            render_size=render_size,
            texture_colorspace=texture_colorspace,
        )
        self.observation_space = make_observation_space(
            image_size,
            view_kinds=self.options.view_kinds,
            has_text=observe_text,
            camera_names=camera_names,
            tasks=list_tasks(suite),  # so that environments of one suite have one space
        )
        self.action_space = make_action_space(action_mode)
        self.render_mode = render_mode
        self._spec: EnvSpec | None = None
        self._owner = Owner("the environment")
        self._renderer = self.options.open_renderer()
        self._viewer: Renderer | None = None
        self._window: Window | None = None
        self._simulations: dict[str, Simulation] = {}
        self._simulation: Simulation | None = None
        self._is_closed = False
        self._num_steps = 0
        self._total_reward = 0.0
        self._last_value = 0.0
        self._is_done = False

    @property
    def spec(self) -> EnvSpec | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How Gymnasium made the environment; its `max_episode_steps` is the horizon, the longest of its tasks'."""
        return with_horizon(self._spec, self.options.longest_horizon)

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._spec = spec

    @property
    def _max_episode_steps(self) -> int:
        """The longest horizon of its tasks, by the name that LeRobot's evaluation asks for."""
        return self.options.longest_horizon

    @property
    def task_ids(self) -> tuple[int, ...]:
        """Tasks that episodes are sampled from."""
        return tuple(task_number(self.options.suite, task) for task in self._tasks)

    @property
    def task_description(self) -> str:
        """The instruction of the current episode."""
        return self.task.language

    @property
    def model(self) -> mujoco.MjModel:
        """The live physics model (without visual geoms)."""
        return self._require_simulation().model

    @property
    def data(self) -> mujoco.MjData:
        """The live simulation state."""
        return self._require_simulation().data

    @property
    def simulation(self) -> Simulation:
        """The live simulation of the current task's scene."""
        return self._require_simulation()

    @property
    def task(self) -> TaskSpec:
        """The task of the current episode."""
        return cast("TaskSpec", self._require_simulation().task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: re-seeds the environment's generator.
            options: `task_id`, `init_state_id`, and with "original" states `placement_seed`, each optional.

        Raises:
            ValueError: an unknown option, a seed or id that is no integer or out of range, a `placement_seed` where
                states hold their fixtures, or the environment is closed. Nothing has been touched.
            TypeError: `task_id` is not an integer, or `options` is no dictionary. Nothing has been touched.
            PhysicsError: the simulation diverged while objects came to rest. The generator is as it was.
            RuntimeError: this process was forked from the one that made the environment.
        """
        self._owner.check()
        if self._is_closed:
            raise ValueError(CLOSED)
        chosen = check_reset_options(options, ("task_id", "init_state_id", "placement_seed"))
        task_id, init_state_id = chosen.get("task_id"), chosen.get("init_state_id")
        placement_seed = chosen.get("placement_seed")
        check_seed(seed)
        task = None if task_id is None else self._known_task(task_id)
        kind = self.options.init_states
        # Sampled from a copy, so that a reset that is refused leaves the generator as it was.
        rng = copy.deepcopy(self.np_random) if seed is None else seeding.np_random(int(seed))[0]
        start = sample_start(
            rng, self._tasks, kind, task=task, init_state_id=init_state_id, placement_seed=placement_seed
        )
        simulation = self._open_simulation(start.task)
        random_state = np.random.RandomState(start.placement_seed)
        simulation.reset(start.task, start.init_state_id, random_state, init_states=kind)
        super().reset(seed=None if seed is None else int(seed))
        self._np_random = rng
        self._simulation = simulation
        self._num_steps = 0
        self._total_reward = 0.0
        self._last_value = float(simulation.success())
        self._is_done = False
        self._show()
        return self._observe(), self._info()

    def step(self, action: npt.NDArray[np.float32]) -> tuple[dict[str, Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Advance by 50 ms, or as `control_freq` says.

        Gymnasium leaves open what a step after the episode's end does. Here the simulation goes on as if there had been
        no end: rewards are paid as before, `episode_length` counts on, `terminated` says whether the goal holds at this
        step's end, and `truncated` stays True once `horizon` steps are over. Only `reset` or `set_state` begins anew.

        Raises:
            ValueError: `action` has another width, `reset` was not called, or the environment is closed.
            PhysicsError: `action` is not finite, or the simulation diverged.
            RuntimeError: this process was forked from the one that made the environment.
        """
        simulation = self._require_simulation()
        is_success = simulation.step(action)
        self._num_steps += 1
        value = float(is_success)
        reward = step_reward(self.options.reward, value, self._last_value)
        self._last_value = value
        self._total_reward += reward
        is_cut = self._num_steps >= self.options.horizon_of(self.task)
        self._is_done |= is_success or is_cut
        self._show()
        return self._observe(), reward, is_success, is_cut, self._info()

    def render(self) -> npt.NDArray[np.uint8] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what the first camera sees, uint8 (render_size, render_size, 3), upright and not mirrored.

        None without a render mode, and with "human", whose window shows it already.

        Raises:
            ValueError: `reset` was not called.
            RendererUnavailableError: no renderer can be used on this machine.
        """
        if self.render_mode != "rgb_array":
            return None
        return self._view()

    def object_poses(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return where objects and fixtures are, by their names in BDDL: float64 [7], position (m), quaternion wxyz.

        World frame, root bodies; those by which the step's success was judged, 2 ms before its end. For policies that
        see them (teachers, experts) and for rewards of one's own; observations do not hold them.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return inspection.object_poses(self._require_simulation())

    def goal_state(self) -> dict[str, bool]:
        """Return which parts of the task's goal hold, by their text, such as "on akita_black_bowl_1 plate_1".

        The goal holds, as `info["success"]` says, where all of them do.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return inspection.goal_state(self._require_simulation())

    def hold_action(self) -> npt.NDArray[np.float32]:
        """Return the action that keeps the arm and the gripper where they are, float32 [A].

        With the absolute modes that is the grip site's pose 2 ms before the step's end, or the joints' positions at it.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return self._require_simulation().hold_action().astype(np.float32)

    def segmentation_labels(self) -> dict[int, SegmentationLabel]:
        """Return what the numbers in `segmentation` are, in the scene of the current task: body and object by name.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return inspection.segmentation_labels(self._require_simulation().scene)

    def observe(self) -> dict[str, Any]:
        """Return the current observation, for instance after `set_state`.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return self._observe()

    def get_state(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything that decides the future and the present observation, as arrays; no entry needs pickle.

        `LiberoVectorEnv.get_state` returns the same, so that states go from one to the other.

        Raises:
            ValueError: `reset` was not called, or the environment is closed.
        """
        return self._require_simulation().get_state() | {
            "episode_length": np.array(self._num_steps),
            "episode_return": np.array(self._total_reward),
            "last_value": np.array(self._last_value),
            "is_done": np.array(self._is_done),
            "rng": write_generator(self.np_random),
        }

    def set_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restore what `get_state` returned, to the last bit; also that of another environment, single or one of many.

        Those of `physics="warp"` are of another kind, and refused.

        Raises:
            ValueError: an entry is missing, surplus, of another type or shape, not finite or out of its range, or the
                state belongs to another suite, to a task that the environment was not made for, or to other versions.
                Nothing has been touched.
            TypeError: `state` is no dictionary.
        """
        self._owner.check()
        if self._is_closed:
            raise ValueError(CLOSED)
        task = read_task(state)
        if task.suite not in member_suites(self.options.suite):
            raise ValueError(f"the state belongs to suite {task.suite}, this environment to {self.options.suite}")
        self._known_task(task_number(self.options.suite, task))
        is_older = not state.keys() & _OLDER_STATES_LACK.keys()
        episode, rng = read_episode({**state, **_OLDER_STATES_LACK} if is_older else state)
        simulation = self._open_simulation(task)
        simulation.set_state({name: state[name] for name in state if name not in EPISODE})
        self._simulation = simulation
        self._num_steps = int(episode["episode_length"])
        self._total_reward = float(episode["episode_return"])
        self._last_value = float(episode["last_value"])
        self._is_done = bool(episode["is_done"])
        self.np_random = rng

    def close(self) -> None:
        """Release the renderer, in the process that made it. A second call does nothing."""
        self._is_closed = True
        if not self._owner.is_this_process:
            return
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        if self._window is not None:
            self._window.close()
            self._window = None
        self._simulations.clear()
        self._simulation = None

    def _known_task(self, task_id: Any) -> TaskSpec:
        task = self.options.find_task(task_id)
        if task is None:
            made_for = f"task_ids={list(self.task_ids)}" if len(self._tasks) > 1 else f"task_id={self.task_ids[0]}"
            raise ValueError(
                f"task_id={task_id} was asked of an environment made for {made_for}: "
                "make it without task_id to choose at reset"
            )
        return task

    def _open_simulation(self, task: TaskSpec) -> Simulation:
        scene = load_scene(task)
        if scene.key not in self._simulations:
            check_cameras_of_scene(self.options.camera_names, scene)
            self._simulations[scene.key] = Simulation(
                scene,
                stepping=self.options.stepping,
                action_mode=self.options.action_mode,
                control_freq=self.options.control_freq,
            )
        return self._simulations[scene.key]

    def _require_simulation(self) -> Simulation:
        self._owner.check()
        if self._simulation is None:
            raise ValueError(CLOSED if self._is_closed else "reset() must be called first")
        return self._simulation

    def _observe(self) -> dict[str, Any]:
        simulation = self._require_simulation()
        observation: dict[str, Any] = {"states": simulation.states()}
        if self.options.observe_text:
            observation["task_descriptions"] = self.task.language
        if self._renderer is not None:
            views = name_views(self.options.camera_names, self._renderer.views([simulation]))
            observation.update({key: view[0].copy() for key, view in views.items()})
        return observation

    def _view(self) -> npt.NDArray[np.uint8]:
        simulation = self._require_simulation()
        if self._viewer is None:
            self._viewer = self.options.open_viewer()
        return np.ascontiguousarray(self._viewer.render([simulation])[0, 0, :, ::-1])

    def _show(self) -> None:
        if self.render_mode != "human":
            return
        if self._window is None:
            caption = f"{self.task.suite} {self.task.task_id}: {self.task.language}"
            self._window = Window(self.options.render_size, fps=self.metadata["render_fps"], caption=caption)
        self._window.show(self._view())

    def _info(self) -> dict[str, Any]:
        simulation = self._require_simulation()
        return {
            "success": simulation.success(),
            "task_id": task_number(self.options.suite, self.task),
            "init_state_id": simulation.init_state_id,
            "episode_length": self._num_steps,
        }
