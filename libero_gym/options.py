"""What `LiberoEnv` and `LiberoVectorEnv` have in common: checked options, spaces, the reward of a step."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from libero_gym.conventions import CONTROL_FREQUENCY_HZ, ActionMode, action_dim, check_action_mode, count_substeps
from libero_gym.physics.simulation import Stepping
from libero_gym.rendering.cameras import Camera, view_keys
from libero_gym.rendering.protocol import Renderer, RendererKind, ViewKind, Views, check_renderer
from libero_gym.rendering.renderers import make_renderer
from libero_gym.rendering.textures import TextureColorspace, check_texture_colorspace
from libero_gym.tasks.initial_states import InitStates
from libero_gym.tasks.suites import TaskSpec, check_assets, get_task, horizon, is_integer, list_tasks

RewardKind = Literal["sparse", "relative"]
Value = TypeVar("Value", float, npt.NDArray[np.float32])

DEFAULT_CAMERAS = ("agentview", "robot0_eye_in_hand")
DEFAULT_IMAGE_SIZE = 256
DEFAULT_RENDER_SIZE = 512
# Sixteen times the default in height and width: a picture of 50 MB. A number beyond is a slip, which takes all memory.
MAX_IMAGE_SIZE = 4096
METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQUENCY_HZ}
CLOSED = "the environment is closed; make a new one"
VECTOR_ARGUMENTS = (
    "num_envs",
    "num_action_chunks",
    "images_as_torch",
    "max_episode_steps",
    "autoreset_mode",
    "num_threads",
    "physics",
    "warp_options",
)
"""What `LiberoVectorEnv` takes and `LiberoEnv` does not."""

# States lie within: eef position (m), axis-angle (rad, |v| <= 2 pi by its definition from w in -1..1), fingers (m).
_STATE_LIMIT = np.array([10.0] * 3 + [2 * np.pi] * 3 + [1.0] * 2, dtype=np.float32)
# An absolute pose lies within: grip site's position (m, beyond the arm's reach), axis-angle (rad, as observed).
_POSE_LIMIT = np.array([2.0] * 3 + [2 * np.pi] * 3, dtype=np.float32)
# The Panda's joint limits, rad: `range` in robosuite's panda/robot.xml.
_JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973], dtype=np.float32)
_JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973], dtype=np.float32)
# Those of the instructions of LIBERO and LIBERO-PRO, and more than their longest.
_CHARACTERS = string.ascii_letters + string.digits + " .,'\u2019-_()"
_MAX_SENTENCE = 512
# Nothing that is drawn is farther away, m: the far clipping planes of LIBERO's scenes are at 530 and 592 m.
_MAX_DEPTH = 1000.0


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Arguments that a single and a vector environment share, checked.

    Attributes:
        suite: suite of the tasks.
        tasks: those that episodes are sampled from.
        image_size: height and width of the cameras' pictures, pixels, at most `MAX_IMAGE_SIZE`.
        camera_names: cameras, from `libero_gym.rendering.cameras.check_cameras`.
        renderer: kind of renderer, None for the best one; checked where no pictures are observed, too.
        observe_images: whether there are images.
        observe_depth: whether there is depth.
        observe_segmentation: whether there is segmentation.
        observe_text: whether there is the instruction.
        reward: "sparse" or "relative", see `step_reward`.
        horizon: steps until an episode is truncated, from `check_horizon`; None is that of each task's own suite.
        max_episode_steps: steps after which it is truncated in any case; None sets no such limit.
        init_states: kind of the initial states, from `check_init_states`.
        stepping: see `libero_gym.Simulation`.
        action_mode: what the numbers of an action mean.
        control_freq: environment steps a second.
        render_mode: None or one of `render_modes`.
        render_size: height and width of what `render` returns, pixels, at most `MAX_IMAGE_SIZE`.
        texture_colorspace: "linear" or "auto", see `libero_gym.rendering.textures`.
    """

    suite: str
    tasks: tuple[TaskSpec, ...]
    image_size: int
    camera_names: tuple[str | Camera, ...]
    renderer: RendererKind | None
    observe_images: bool
    observe_depth: bool
    observe_segmentation: bool
    observe_text: bool
    reward: RewardKind
    horizon: int | None
    max_episode_steps: int | None = None
    init_states: InitStates
    stepping: Stepping
    action_mode: ActionMode
    control_freq: int
    render_mode: str | None
    render_size: int
    texture_colorspace: TextureColorspace

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is not among the allowed ones; the message lists them.
            TypeError: one that is True or False is neither.
        """
        for name in ("observe_images", "observe_depth", "observe_segmentation", "observe_text"):
            check_boolean(name, getattr(self, name))
        _check_size("image_size", self.image_size)
        _check_size("render_size", self.render_size)
        if self.reward not in get_args(RewardKind):
            raise ValueError(f"reward={self.reward!r} is unknown (valid: 'sparse', 'relative')")
        if self.stepping not in get_args(Stepping):
            raise ValueError(f"stepping={self.stepping!r} is unknown (valid: 'exact', 'fast', 'numpy')")
        check_renderer(self.renderer)
        check_action_mode(self.action_mode)
        count_substeps(self.control_freq)
        check_texture_colorspace(self.texture_colorspace)

    @property
    def view_kinds(self) -> tuple[ViewKind, ...]:
        """What is observed of each camera."""
        is_observed: dict[ViewKind, bool] = {
            "images": self.observe_images,
            "depth": self.observe_depth,
            "segmentation": self.observe_segmentation,
        }
        return tuple(kind for kind in is_observed if is_observed[kind])

    def horizon_of(self, task: TaskSpec) -> int:
        """Return the steps after which an episode of `task` is truncated."""
        steps = horizon(task.suite) if self.horizon is None else self.horizon
        return steps if self.max_episode_steps is None else min(steps, self.max_episode_steps)

    def find_task(self, task_id: Any) -> TaskSpec | None:
        """Return the one of `tasks` that has a number in the suite; None if it is another of the suite.

        By number: a file of one's own may have been edited since.

        Raises:
            ValueError: the suite has no such task.
            TypeError: `task_id` is no integer.
        """
        asked = get_task(self.suite, task_id)
        return next((t for t in self.tasks if (t.suite, t.task_id) == (asked.suite, asked.task_id)), None)

    @property
    def longest_horizon(self) -> int:
        """Steps after which an episode of any of `tasks` has been truncated."""
        return max(self.horizon_of(task) for task in self.tasks)

    def open_renderer(self, *, num_worlds: int = 1, num_threads: int | None = None) -> Renderer | None:
        """Return the renderer for so many worlds; None where no pictures are observed.

        Raises:
            ValueError: an unknown kind.
            RendererUnavailableError: the renderer cannot be used on this machine.
        """
        if not self.view_kinds:
            return None
        return make_renderer(
            self.renderer,
            camera_names=self.camera_names,
            image_size=int(self.image_size),
            num_worlds=num_worlds,
            num_threads=num_threads,
            texture_colorspace=self.texture_colorspace,
            view_kinds=self.view_kinds,
        )

    def open_viewer(self, *, num_worlds: int = 1, num_threads: int | None = None) -> Renderer:
        """Return the renderer of `render`, which draws the first camera in its own size.

        Raises:
            RendererUnavailableError: the renderer cannot be used on this machine.
        """
        return make_renderer(
            self.renderer,
            camera_names=self.camera_names[:1],
            image_size=int(self.render_size),
            num_worlds=num_worlds,
            num_threads=num_threads,
            texture_colorspace=self.texture_colorspace,
        )


def name_views(camera_names: Sequence[str | Camera], views: Views) -> dict[str, Any]:
    """Return what was drawn [N, K, H, W, channels] by the keys of the cameras, each [N, H, W, channels]; no copies."""
    return {
        key: view[:, camera]
        for kind, view in zip(get_args(ViewKind), views, strict=True)
        if view is not None
        for camera, key in enumerate(view_keys(camera_names, kind))
    }


def check_keywords(constructor: Any, keywords: Mapping[str, Any]) -> None:
    """Raise TypeError unless `constructor` takes all of `keywords`; the message names those that it takes."""
    parameters = inspect.signature(constructor).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # a subclass that passes on what it is given
    valid = [name for name in parameters if name != "self"]
    unknown = [name for name in keywords if name not in valid]
    if unknown:
        # In Python's words, which Gymnasium and TorchRL look for.
        problem = f"got an unexpected keyword argument {unknown[0]!r}"
        nearest = difflib.get_close_matches(unknown[0], valid, n=1)
        if unknown[0] in VECTOR_ARGUMENTS:
            problem += ", which vector environments have: make one by gymnasium.make_vec"
        elif nearest:
            problem += f"; did you mean {nearest[0]!r}?"
        raise TypeError(f"{problem} (valid: {', '.join(valid)})")


def check_reset_options(options: Any, valid: Sequence[str]) -> dict[str, Any]:
    """Return the options of a reset as a dictionary.

    Raises:
        TypeError: they are no dictionary.
        ValueError: there is one that is not among `valid`.
    """
    names = ", ".join(repr(name) for name in valid)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options={options!r} is a {type(options).__name__}, not a dictionary (of: {names})")
    chosen = dict(cast("Mapping[str, Any]", options or {}))
    unknown = sorted(set(chosen) - set(valid), key=str)
    if unknown:
        raise ValueError(f"unknown reset options {unknown} (valid: {names})")
    return chosen


def choose_tasks(suite: str | TaskSpec, task_id: int | None, task_ids: Sequence[int] | None) -> list[TaskSpec]:
    """Return the tasks that an environment is made for: `task_id`, `task_ids`, all of the suite, or the one given.

    Raises:
        ValueError: both are given, `task_ids` is empty or no sequence, or the suite has no such task; or a task is
            given with ids, or is not one of its suite; or the assets of a task are not installed.
        TypeError: an id is not an integer, or `suite` is neither a name nor a task.
    """
    tasks = _name_tasks(suite, task_id, task_ids)
    check_assets(tasks)
    return tasks


def _name_tasks(suite: str | TaskSpec, task_id: int | None, task_ids: Sequence[int] | None) -> list[TaskSpec]:
    if not isinstance(cast(Any, suite), str | TaskSpec):
        raise TypeError(
            f"suite={suite!r} is a {type(suite).__name__}, neither the name of a suite (libero_gym.list_suites()) nor "
            "a task of one (libero_gym.list_tasks)"
        )
    if task_id is not None and task_ids is not None:
        raise ValueError(f"task_id={task_id!r} and task_ids={task_ids!r} are both given; leave one of them out")
    if isinstance(suite, TaskSpec):
        if task_id is not None or task_ids is not None:
            raise ValueError(f"task_id or task_ids were given with one task, {suite.name!r}; leave them out")
        if get_task(suite.suite, suite.task_id) != suite:
            raise ValueError(
                f"{suite} is not task {suite.task_id} of {suite.suite}; make a suite of your own BDDL files by "
                "libero_gym.register_suite, and take the task from libero_gym.list_tasks"
            )
        return [suite]
    if is_integer(task_ids):
        raise ValueError(f"task_ids={task_ids!r} is not a sequence of tasks (for one task: task_ids=[{task_ids}])")
    if task_id is not None:
        return [get_task(suite, task_id)]
    if task_ids is None:
        return list_tasks(suite)
    if not isinstance(cast(Any, task_ids), Collection):
        raise ValueError(
            f"task_ids={task_ids!r} is a {type(task_ids).__name__}, not a sequence of tasks: give a list, such as "
            "[0, 3]"
        )
    if not len(task_ids):
        raise ValueError("task_ids is empty; name at least one task, or None for all of the suite")
    return [get_task(suite, number) for number in task_ids]


def check_boolean(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} is not a boolean (valid: True, False)")


def check_render_mode(render_mode: str | None, valid: Sequence[str]) -> None:
    """Raise ValueError unless `render_mode` is None or one of `valid`."""
    if render_mode not in (None, *valid):
        names = ", ".join(repr(mode) for mode in (None, *valid))
        raise ValueError(f"render_mode={render_mode!r} is unknown (valid: {names})")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless `seed` is None or an integer that is not negative; a boolean is none."""
    if seed is not None and (not is_integer(seed) or seed < 0):
        raise ValueError(f"seed={seed!r} is not a seed (valid: None, or an integer from 0 on)")


class LiberoEnvSpec(EnvSpec):
    """A specification whose `max_episode_steps` is at most the horizon.

    `gymnasium.make(max_episode_steps=...)` wraps an environment that does not get to know of it, and writes the number
    into a copy of its specification. Episodes end after the horizon all the same.
    """

    def __init__(self, spec: EnvSpec, episode_horizon: int) -> None:
        vars(self).update(vars(spec), _horizon=episode_horizon)
        self.max_episode_steps = episode_horizon if spec.max_episode_steps is None else spec.max_episode_steps

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_episode_steps" and value is not None:
            value = min(value, vars(self)["_horizon"])
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        names = [field.name for field in dataclasses.fields(EnvSpec)]
        return isinstance(other, EnvSpec) and all(getattr(self, name) == getattr(other, name) for name in names)

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as specifications, which may be changed


def with_horizon(spec: EnvSpec | None, episode_horizon: int) -> EnvSpec | None:
    """Return a specification that says after how many steps episodes are truncated, as wrappers and trainers ask it."""
    return None if spec is None else LiberoEnvSpec(spec, episode_horizon)


def check_horizon(episode_horizon: int | None, suite: str, *, name: str = "horizon") -> int | None:
    """Return `episode_horizon`, a number of steps, or None for that of each task's own suite.

    Args:
        episode_horizon: the number.
        suite: whose horizon the message names.
        name: of the argument.

    Raises:
        ValueError: it is not a positive integer.
    """
    if episode_horizon is None:
        return None
    if not is_integer(episode_horizon) or episode_horizon < 1:
        raise ValueError(f"{name}={episode_horizon!r} is not a positive number of steps (default: {horizon(suite)})")
    return int(episode_horizon)


def check_limit(max_episode_steps: int | None, suite: str, *, has_horizon: bool) -> int | None:
    """Return `max_episode_steps`, a limit besides the horizon, or None where there is none.

    Args:
        max_episode_steps: the number.
        suite: of the tasks.
        has_horizon: whether `horizon` is given.

    Raises:
        ValueError: it is not a positive integer, or beyond the suite's own horizon, which is not given another.
    """
    limit = check_horizon(max_episode_steps, suite, name="max_episode_steps")
    if limit is not None and not has_horizon and limit > horizon(suite):
        raise ValueError(
            f"max_episode_steps={limit} makes no episode longer: those of {suite} are truncated after {horizon(suite)} "
            f"steps by then; give horizon={limit}"
        )
    return limit


def step_reward(kind: RewardKind, value: Value, previous: Value) -> Value:
    """Return the reward of a step at whose end the goal holds (`value` 1) or not (0), as numbers or as arrays.

    Args:
        kind: "sparse" pays the value, "relative" its change.
        value: 1 where the goal holds at the step's end.
        previous: the same before the step.
    """
    return value - previous if kind == "relative" else value


def make_observation_space(
    image_size: int,
    *,
    view_kinds: Sequence[ViewKind] = ("images",),
    has_text: bool = True,
    camera_names: Sequence[str | Camera] = DEFAULT_CAMERAS,
    tasks: Sequence[TaskSpec] = (),
) -> spaces.Dict:
    """Return the observation space of one environment.

    Args:
        image_size: height and width, pixels.
        view_kinds: what is observed of each camera.
        has_text: whether there is the instruction.
        camera_names: cameras.
        tasks: those whose instructions the space holds, besides all of LIBERO's.

    Raises:
        ValueError: `image_size` is not an integer from 1 to `MAX_IMAGE_SIZE`.
    """
    _check_size("image_size", image_size)
    size = int(image_size)
    view_spaces: dict[ViewKind, spaces.Space[Any]] = {
        "images": spaces.Box(0, 255, (size, size, 3), np.uint8),
        "depth": spaces.Box(0.0, _MAX_DEPTH, (size, size, 1), np.float32),
        "segmentation": spaces.Box(-1, np.iinfo(np.int32).max, (size, size, 1), np.int32),
    }
    entries: dict[str, spaces.Space[Any]] = {}
    for kind in view_kinds:
        entries.update(dict.fromkeys(view_keys(camera_names, kind), view_spaces[kind]))
    entries["states"] = spaces.Box(-_STATE_LIMIT, _STATE_LIMIT, dtype=np.float32)
    if has_text:
        sentences = [task.language for task in tasks]
        further = sorted({character for sentence in sentences for character in sentence} - set(_CHARACTERS))
        entries["task_descriptions"] = spaces.Text(
            max_length=max([_MAX_SENTENCE, *map(len, sentences)]), min_length=0, charset=_CHARACTERS + "".join(further)
        )
    return spaces.Dict(entries)


def make_action_space(action_mode: ActionMode = "delta_pose", *, num_action_chunks: int = 1) -> spaces.Box:
    """Return the action space of one environment, [A], or of its chunks, [C, A] with C > 1."""
    if action_mode == "absolute_pose":
        low, high = -_POSE_LIMIT, _POSE_LIMIT
    elif action_mode == "absolute_joint_pos":
        low, high = _JOINT_LOW, _JOINT_HIGH
    else:
        high = np.ones(action_dim(action_mode) - 1, np.float32)
        low = -high
    low, high = np.append(low, np.float32(-1)), np.append(high, np.float32(1))
    if num_action_chunks > 1:
        low, high = (np.tile(limit, (num_action_chunks, 1)) for limit in (low, high))
    return spaces.Box(low, high, dtype=np.float32)


def _check_size(name: str, size: int) -> None:
    if not is_integer(size) or size <= 0:
        raise ValueError(f"{name}={size!r} is not a positive number of pixels (usual: 128, 224, 256)")
    if size > MAX_IMAGE_SIZE:
        raise ValueError(f"{name}={size} is too many pixels a side (valid: 1-{MAX_IMAGE_SIZE}, usual: 128, 224, 256)")
