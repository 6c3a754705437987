"""What `LiberoEnv` and `LiberoVectorEnv` have in common: checked options, spaces, the reward of a step."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from libero_gym.conventions import ACTION_DIM, CONTROL_FREQUENCY_HZ
from libero_gym.physics.simulation import Stepping
from libero_gym.rendering.protocol import Renderer, RendererKind
from libero_gym.rendering.renderers import make_renderer
from libero_gym.rendering.textures import TextureColorspace, check_texture_colorspace
from libero_gym.tasks.initial_states import InitStates
from libero_gym.tasks.suites import TaskSpec, horizon, is_integer

RewardKind = Literal["sparse", "relative"]
Value = TypeVar("Value", float, npt.NDArray[np.float32])

DEFAULT_CAMERAS = ("agentview", "robot0_eye_in_hand")
OBSERVATION_KEYS = ("images", "wrist_images")
METADATA: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_FREQUENCY_HZ}
CLOSED = "the environment is closed; make a new one"

# States lie within: eef position (m), axis-angle (rad, |v| <= 2 pi by its definition from w in -1..1), fingers (m).
_STATE_LIMIT = np.array([10.0] * 3 + [2 * np.pi] * 3 + [1.0] * 2, dtype=np.float32)
_MAX_SENTENCE = 512


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Arguments that a single and a vector environment share, checked.

    Attributes:
        suite: suite of the tasks.
        image_size: height and width of both images, pixels.
        camera_names: cameras of `OBSERVATION_KEYS`.
        renderer: kind of renderer, None for the best one.
        observe_images: whether there are images.
        reward: "sparse" or "relative", see `step_reward`.
        horizon: steps until an episode is truncated, from `check_horizon`; None has `horizon_of` decide.
        init_states: kind of the initial states, from `check_init_states`.
        stepping: see `libero_gym.Simulation`.
        render_mode: None or "rgb_array".
        texture_colorspace: "linear" or "auto", see `libero_gym.rendering.textures`.
    """

    suite: str
    image_size: int
    camera_names: tuple[str, ...]
    renderer: RendererKind | None
    observe_images: bool
    reward: RewardKind
    horizon: int | None
    init_states: InitStates
    stepping: Stepping
    render_mode: str | None
    texture_colorspace: TextureColorspace

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is not among the allowed ones; the message lists them.
        """
        _check_image_size(self.image_size)
        if len(self.camera_names) != len(OBSERVATION_KEYS):
            raise ValueError(f"camera_names={self.camera_names} must name {len(OBSERVATION_KEYS)} cameras")
        if self.reward not in get_args(RewardKind):
            raise ValueError(f"reward={self.reward!r} is unknown (valid: 'sparse', 'relative')")
        if self.stepping not in get_args(Stepping):
            raise ValueError(f"stepping={self.stepping!r} is unknown (valid: 'exact', 'fast', 'numpy')")
        if self.render_mode not in (None, *METADATA["render_modes"]):
            raise ValueError(f"render_mode={self.render_mode!r} is unknown (valid: None, 'rgb_array')")
        if self.render_mode is not None and not self.observe_images:
            raise ValueError(f"render_mode={self.render_mode!r} needs observe_images=True")

        check_texture_colorspace(self.texture_colorspace)

    def horizon_of(self, task: TaskSpec) -> int:
        """Return the steps after which an episode of `task` is truncated: `horizon`, or those of its own suite."""
        return horizon(task.suite) if self.horizon is None else self.horizon

    def open_renderer(self, *, num_worlds: int = 1, num_threads: int | None = None) -> Renderer | None:
        """Return the renderer for so many worlds; None without images.

        Raises:
            ValueError: an unknown kind.
            RendererUnavailableError: the renderer cannot be used on this machine.
        """
        if not self.observe_images:
            return None
        return make_renderer(
            self.renderer,
            camera_names=self.camera_names,
            image_size=int(self.image_size),
            num_worlds=num_worlds,
            num_threads=num_threads,
            texture_colorspace=self.texture_colorspace,
        )


def check_horizon(episode_horizon: int | None, suite: str) -> int | None:
    """Return `episode_horizon`, a number of steps, or None for that of each task's own suite.

    Raises:
        ValueError: it is not a positive integer.
    """
    if episode_horizon is None:
        return None
    if not is_integer(episode_horizon) or episode_horizon < 1:
        raise ValueError(f"horizon={episode_horizon!r} is not a positive number of steps (default: {horizon(suite)})")
    return episode_horizon


def step_reward(kind: RewardKind, value: Value, previous: Value) -> Value:
    """Return the reward of a step at whose end the goal holds (`value` 1) or not (0), as numbers or as arrays.

    Args:
        kind: "sparse" pays the value, "relative" its change.
        value: 1 where the goal holds at the step's end.
        previous: the same before the step.
    """
    return value - previous if kind == "relative" else value


def make_observation_space(image_size: int, *, has_images: bool = True) -> spaces.Dict:
    """Return the observation space of one environment.

    Raises:
        ValueError: `image_size` is not a positive integer.
    """
    _check_image_size(image_size)
    image = spaces.Box(0, 255, (int(image_size), int(image_size), 3), np.uint8)
    images = dict.fromkeys(OBSERVATION_KEYS, image) if has_images else {}
    return spaces.Dict(
        {
            **images,
            "states": spaces.Box(-_STATE_LIMIT, _STATE_LIMIT, dtype=np.float32),
            "task_descriptions": spaces.Text(
                max_length=_MAX_SENTENCE, min_length=0, charset=string.ascii_letters + string.digits + " .,'\u2019-_()"
            ),
        }
    )


def make_action_space() -> spaces.Box:
    """Return the action space of one environment."""
    return spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def _check_image_size(image_size: int) -> None:
    if not is_integer(image_size) or image_size <= 0:
        raise ValueError(f"image_size={image_size!r} is not a positive number of pixels (usual: 128, 224, 256)")
