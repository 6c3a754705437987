"""Observations to GR00T's modality keys or LeRobot's, and actions back: what passes between environment and policy.

A `modality.json` (the file that GR00T data sets carry in `meta/`) names slices of the state and action
vectors and the cameras. The default one describes LIBERO. Note its names `state.roll`, `.pitch`, `.yaw`: in
LIBERO data they hold the three components of an axis-angle vector (rad), not Euler angles.

Shape legend: N environments (absent for a single one), C action chunk steps, H x W pixels. Every function
here takes any number of leading dimensions and keeps them.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from libero_gym.conventions import ACTION_DIM, STATE_DIM, gripper_from_data
from libero_gym.tasks.suites import is_integer

Observation = dict[str, Any]
LeRobotConvention = Literal["demonstrations", "lerobot"]

# The gripper's place in an action.
_GRIPPER = (ACTION_DIM - 1, ACTION_DIM)

# The sections of a modality.json, and an example of each.
_SECTIONS = {
    "video": '{"image": {"original_key": "observation.images.image"}}',
    "state": '{"x": {"start": 0, "end": 1}}',
    "action": '{"x": {"start": 0, "end": 1}}',
    "annotation": '{"human.action.task_description": {}}',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modality:
    """Which part of an observation or action each modality key stands for.

    Attributes:
        video: Name -> key of the image in the environment's observation.
        state: Name -> (start, end) in `states` [8].
        action: Name -> (start, end) in the action [7]. Each of its numbers belongs to one key, the last to `gripper`,
            whose data say 1 open, 0 closed.
        annotation: Names that hold the task description.
    """

    video: Mapping[str, str]
    state: Mapping[str, tuple[int, int]]
    action: Mapping[str, tuple[int, int]]
    annotation: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks the slices.

        Raises:
            ValueError: One does not fit the 8 states or 7 actions, or a number of the action belongs to no key or to
                several, or the gripper's to another than `gripper`.
        """
        _check_slices("state", self.state, STATE_DIM)
        _check_slices("action", self.action, ACTION_DIM)
        counts = np.zeros(ACTION_DIM, np.int64)
        for start, end in self.action.values():
            counts[start:end] += 1
        if (counts != 1).any():
            raise ValueError(
                f"action is {dict(self.action)}, where numbers {np.flatnonzero(counts == 0).tolist()} belong to no key "
                f"and {np.flatnonzero(counts > 1).tolist()} to several; each of 0-{ACTION_DIM - 1} must belong to one"
            )
        if tuple(self.action.get("gripper", ())) != _GRIPPER:
            raise ValueError(
                f"action is {dict(self.action)}, where number {_GRIPPER[0]} is not that of a key `gripper`; give it "
                "one of its own, with start 6 and end 7, by which its data (1 open, 0 closed) are converted"
            )


def load_modality(path: str | Path | None = None) -> Modality:
    """Reads a `modality.json`.

    A camera's observation key is the last part of its `original_key`, in the plural where the environment
    uses the plural: `observation.images.wrist_image` is `wrist_images`.

    Args:
        path: The file; None reads the LIBERO one that ships with this package.

    Returns:
        The parsed description.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: `path` is no path.
        ValueError: The file is no JSON, lacks a section, has one of another form, or is no such `Modality`.
    """
    if path is not None and not isinstance(cast(Any, path), str | PathLike):
        raise TypeError(
            f"modality={path!r} is a {type(path).__name__} (valid: a path to a modality.json, a Modality, or None for "
            "LIBERO's); write a dictionary to a file as JSON, or make a Modality of it"
        )
    if path is None:
        source, text = ("modality.json", (resources.files("libero_gym") / "data" / "modality.json").read_text("utf-8"))
    else:
        source, text = str(path), Path(path).read_text("utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    missing = {"video", "state", "action"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{source} lacks {sorted(missing)} (needed: video, state, action; optional: annotation)")
    sections = {name: _entries(source, name, content.get(name, {})) for name in _SECTIONS}
    video = {name: _observation_key(source, name, entry) for name, entry in sections["video"].items()}
    state = _slices(source, "state", sections["state"], STATE_DIM)
    action = _slices(source, "action", sections["action"], ACTION_DIM)
    try:
        return Modality(video=video, state=state, action=action, annotation=tuple(sections["annotation"]))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _entries(source: str, section: str, content: Any) -> dict[str, dict[str, Any]]:
    """Returns a section of the file, an object of objects."""
    if not isinstance(content, dict):
        raise ValueError(f"{source}: {section} is {content!r}; it must be an object, such as {_SECTIONS[section]}")
    for name, entry in cast("dict[str, Any]", content).items():
        if not isinstance(entry, dict):
            raise ValueError(
                f"{source}: {section}.{name} is {entry!r}; it must be an object, as in {_SECTIONS[section]}"
            )
    return cast("dict[str, dict[str, Any]]", content)


def _observation_key(source: str, name: str, entry: Mapping[str, Any]) -> str:
    original_key = entry.get("original_key", name)
    if not isinstance(original_key, str):
        raise ValueError(f"{source}: video.{name} has original_key {original_key!r}; it must name a camera's column")
    key = original_key.rsplit(".", 1)[-1]
    return key if key.endswith("s") else f"{key}s"


def _slices(
    source: str, section: str, entries: Mapping[str, Mapping[str, Any]], width: int
) -> dict[str, tuple[int, int]]:
    slices: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if "start" not in entry or "end" not in entry:
            raise ValueError(f"{source}: {section}.{name} needs `start` and `end`, got {dict(entry)}")
        for bound in ("start", "end"):
            number = entry[bound]
            if isinstance(number, bool) or not isinstance(number, int | float) or number % 1:
                raise ValueError(
                    f"{source}: {section}.{name} has {bound} {number!r}; it must be a whole number from 0 to {width}"
                )
        slices[name] = (int(entry["start"]), int(entry["end"]))
    return slices


def _check_slices(section: str, slices: Mapping[str, Any], width: int) -> None:
    for name, bounds in slices.items():
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(is_integer(bound) for bound in bounds):
            raise ValueError(f"{section}.{name} is {bounds!r}; expected (start, end), whole numbers from 0 to {width}")
        start, end = bounds
        if not 0 <= start < end <= width:
            raise ValueError(f"{section}.{name} is [{start}, {end}), which is not within [0, {width})")


@functools.cache
def _default_modality() -> Modality:
    return load_modality()


def observation_to_modality(observation: Mapping[str, Any], modality: Modality | None = None) -> Observation:
    """Renames and slices an environment observation into modality keys.

    Args:
        observation: `images`, `wrist_images` uint8 [..., H, W, 3], `states` float32 [..., 8],
            `task_descriptions` (a str, or a sequence of N of them).
        modality: The description to follow; None is LIBERO's.

    Returns:
        `video.*` uint8 [..., H, W, 3], `state.*` float32 [..., width] and `annotation.*`: a str for a single
        environment, else a str array [N]. Arrays are views of the observation's.

    Raises:
        ValueError: The observation lacks a camera that the modality names, or the instruction.
    """
    modality = modality or _default_modality()
    result: Observation = {}
    for name, key in modality.video.items():
        if key not in observation:
            cameras = sorted(set(observation) - {"states", "task_descriptions"})
            raise ValueError(f"video.{name} reads {key!r}, which is not in the observation (cameras: {cameras})")
        result[f"video.{name}"] = observation[key]
    states = observation["states"]
    for name, (start, end) in modality.state.items():
        result[f"state.{name}"] = states[..., start:end]
    if modality.annotation and "task_descriptions" not in observation:
        raise ValueError(_no_text(modality))
    text = observation.get("task_descriptions")
    for name in modality.annotation:
        result[f"annotation.{name}"] = text if isinstance(text, str) else np.asarray(text, dtype=np.str_)
    return result


def action_from_modality(action: Mapping[str, Any], modality: Modality | None = None) -> NDArray[np.float32]:
    """Assembles environment actions from `action.*` keys.

    The gripper's data convention (1 open, 0 closed) becomes the environment's, see
    `libero_gym.conventions.gripper_from_data`.

    Args:
        action: `action.<name>` arrays [..., width], e.g. [N, C, 1].
        modality: The description to follow; None is LIBERO's.

    Returns:
        Environment actions [..., 7], float32, not clipped.

    Raises:
        ValueError: A key is absent, a width is wrong, leading shapes differ, or a value is not finite.
    """
    modality = modality or _default_modality()
    keys = {f"action.{name}": bounds for name, bounds in modality.action.items()}
    missing = sorted(set(keys) - set(action))
    if missing:
        raise ValueError(f"the action lacks {missing} (got: {sorted(action)})")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        parts = {key: np.asarray(action[key], dtype=np.float32) for key in keys}
    lead = next(iter(parts.values())).shape[:-1]
    result = np.zeros((*lead, ACTION_DIM), dtype=np.float32)  # [..., 7]
    for key, (start, end) in keys.items():
        expected = (*lead, end - start)
        if parts[key].shape != expected:
            raise ValueError(
                f"{key} has shape {parts[key].shape}, expected {expected}: "
                "the key's width last, before it what all keys have in common"
            )
        if not np.isfinite(parts[key]).all():
            rows = np.unique(np.argwhere(~np.isfinite(parts[key]))[:, 0]).tolist() if lead else []
            where = f" in rows {rows}" if lead else ""
            raise ValueError(f"{key} holds values that are not finite{where}; check the policy's output for NaN")
        result[..., start:end] = parts[key]
    result[..., slice(*_GRIPPER)] = gripper_from_data(result[..., slice(*_GRIPPER)])
    return result


def _modality_space(space: spaces.Space[Any], modality: Modality) -> spaces.Dict:
    """The observation space of one environment in modality keys."""
    if not isinstance(space, spaces.Dict):
        raise TypeError(f"ModalityObservation needs a Dict observation space, got {space}")
    source = cast("dict[str, spaces.Space[Any]]", space.spaces)
    result: dict[str, spaces.Space[Any]] = {}
    for name, key in modality.video.items():
        if key not in source:
            raise ValueError(f"video.{name} reads {key!r}, which is not observed (observed: {sorted(source)})")
        result[f"video.{name}"] = source[key]
    states = source["states"]
    assert isinstance(states, spaces.Box)
    for name, (start, end) in modality.state.items():
        result[f"state.{name}"] = spaces.Box(states.low[start:end], states.high[start:end], dtype=np.float32)
    if modality.annotation and "task_descriptions" not in source:
        raise ValueError(_no_text(modality))
    for name in modality.annotation:
        result[f"annotation.{name}"] = source["task_descriptions"]
    return spaces.Dict(result)


def _no_text(modality: Modality) -> str:
    return (
        f"annotation.{modality.annotation[0]} reads 'task_descriptions', which is not observed: make the environment "
        "with observe_text=True"
    )


def _convert_final(final: Any, convert: Callable[[Any], Observation]) -> Any:
    """Converts `final_obs`: a batch, or Gymnasium's object array [N] with None where no episode ended."""
    if not isinstance(final, np.ndarray):
        return convert(final)
    converted = np.full(final.shape, None)
    for i in np.flatnonzero(final != None):  # noqa: E711 - each element
        converted[i] = convert(final[i])
    return converted


def _observe(env: gymnasium.vector.VectorEnv) -> Observation:
    """Observes without stepping, through wrappers that have no `observe` of their own."""
    if hasattr(env, "observe"):
        return cast(Any, env).observe()
    if isinstance(env, gymnasium.vector.VectorObservationWrapper):
        return env.observations(_observe(env.env))
    if isinstance(env, gymnasium.vector.VectorWrapper):
        return _observe(env.env)
    raise AttributeError(
        f"{type(env).__name__} cannot observe without stepping; make the environments by gymnasium.make_vec, in its "
        "default mode (LiberoVectorEnv)"
    )


class ModalityVectorObservation(gymnasium.vector.VectorWrapper):
    """Vector environment whose observations, `info["final_obs"]` included, carry modality keys.

    Args:
        env: A vector environment with LIBERO observations.
        modality: A `Modality`, a path to a `modality.json`, or None for LIBERO's.

    Raises:
        TypeError: The modality is none of these.
        ValueError: The file is not such a description (see `load_modality`), or the modality names a camera that the
            environment does not observe.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv, modality: Modality | str | Path | None = None):
        super().__init__(env)
        self.modality = modality if isinstance(modality, Modality) else load_modality(modality)
        self.single_observation_space = _modality_space(env.single_observation_space, self.modality)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    # Gymnasium's VectorObservationWrapper refuses SAME_STEP autoreset, because it cannot convert `final_obs`.
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environments; see the wrapped environment."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return observation_to_modality(observations, self.modality), infos

    def observe(self) -> Observation:
        """Observes without stepping, for instance after `unwrapped.set_state`; see `LiberoVectorEnv.observe`.

        Raises:
            AttributeError: The wrapped environments are not a `LiberoVectorEnv`.
        """
        return observation_to_modality(_observe(self.env), self.modality)

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Steps the environments; see the wrapped environment."""
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        if "final_obs" in infos:
            final = _convert_final(infos["final_obs"], lambda each: observation_to_modality(each, self.modality))
            infos = {**infos, "final_obs": final}
        return observation_to_modality(observations, self.modality), rewards, terminations, truncations, infos


class ModalityObservation(gymnasium.ObservationWrapper[Any, Any, Any], RecordConstructorArgs):
    """Environment whose observations carry modality keys; for a vector environment, the vector form.

    `ModalityObservation(env)` of a `gymnasium.vector.VectorEnv` is a `ModalityVectorObservation`.

    Args:
        env: An environment, single or vector, with LIBERO observations.
        modality: A `Modality`, a path to a `modality.json`, or None for LIBERO's.

    Raises:
        TypeError: The modality is none of these.
        ValueError: The file is not such a description (see `load_modality`), or the modality names a camera that the
            environment does not observe.
    """

    def __new__(cls, env: Any, modality: Modality | str | Path | None = None) -> Any:
        """Dispatches on the kind of environment, so that callers need not."""
        if isinstance(env, gymnasium.vector.VectorEnv):
            return ModalityVectorObservation(env, modality)
        return super().__new__(cls)

    def __init__(self, env: gymnasium.Env[Any, Any], modality: Modality | str | Path | None = None):
        RecordConstructorArgs.__init__(self, modality=modality)  # by which gymnasium.make(env.spec) makes another
        gymnasium.ObservationWrapper.__init__(self, env)
        self.modality = modality if isinstance(modality, Modality) else load_modality(modality)
        self.observation_space = _modality_space(env.observation_space, self.modality)

    def observation(self, observation: Any) -> Observation:
        """Converts one observation, see `observation_to_modality`."""
        return observation_to_modality(observation, self.modality)


class LeRobotVectorEnv(gymnasium.vector.VectorWrapper):
    """Vector environment as LeRobot's `eval_policy` wants it, one step at a time.

    Observations are {"pixels": {name: uint8 [N, H, W, 3]}, "agent_pos": float32 [N, 8]}; the instruction is asked for
    by `call("task_description")`, and `final_info` has `is_success`. Pictures are turned by 180 degrees and states
    composed as LeRobot's processor of its own LIBERO environment does. The rest is a `convention`:

    | convention | whose | pictures | gripper's action |
    |---|---|---|---|
    | "demonstrations" | data sets of this project | `image`, `wrist_image` | 1 opens, 0 closes |
    | "lerobot" | LeRobot's LIBERO environment | `image`, `image2` | -1 opens, 1 closes |

    Args:
        env: a vector environment with LIBERO observations, two cameras, `autoreset_mode="SAME_STEP"`, and LIBERO's own
            actions: `action_mode="delta_pose"`, one step a call.
        convention: see above.

    Raises:
        ValueError: an unknown convention, another autoreset mode, other actions, or pictures that are not observed.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv, *, convention: LeRobotConvention = "demonstrations"):
        if convention not in get_args(LeRobotConvention):
            raise ValueError(f"convention={convention!r} is unknown (valid: 'demonstrations', 'lerobot')")
        if env.metadata["autoreset_mode"] is not gymnasium.vector.AutoresetMode.SAME_STEP:
            raise ValueError(f"{env.metadata['autoreset_mode']}: LeRobot needs autoreset_mode='SAME_STEP'")
        taken, given = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32), env.single_action_space
        if given != taken or env.action_space.shape != (env.num_envs, ACTION_DIM):
            raise ValueError(
                f"LeRobot's policies give ({env.num_envs}, {ACTION_DIM}) numbers, each row of {taken}; the environment "
                f"takes {env.action_space.shape}, of {' '.join(str(given).split())}: make it with "
                "action_mode='delta_pose' and num_action_chunks=1"
            )
        known = cast(spaces.Dict, env.single_observation_space)
        if missing := {"images", "wrist_images"} - set(known):
            raise ValueError(f"LeRobot's policies see two cameras; the environment does not observe {sorted(missing)}")
        super().__init__(env)
        self.convention: LeRobotConvention = convention
        names = ("image", "wrist_image" if convention == "demonstrations" else "image2")
        self._names = dict(zip(names, ("images", "wrist_images"), strict=True))
        pixels = spaces.Dict({name: known[key] for name, key in self._names.items()})
        self.single_observation_space = spaces.Dict({"pixels": pixels, "agent_pos": known["states"]})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)
        if convention == "demonstrations":
            low, high = np.full(ACTION_DIM, -1.0, np.float32), np.ones(ACTION_DIM, np.float32)
            low[-1] = 0.0
            self.single_action_space = spaces.Box(low, high)
            self.action_space = batch_space(self.single_action_space, env.num_envs)

    @property
    def envs(self) -> Any:
        """Each environment, for what LeRobot asks of the first one."""
        return cast(Any, self.env.unwrapped).envs

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns an attribute of each environment, or what calling it returns."""
        return cast(Any, self.env.unwrapped).call(name, *args, **kwargs)

    def get_attr(self, name: str) -> Any:
        """Returns an attribute of each environment."""
        return cast(Any, self.env.unwrapped).get_attr(name)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts episodes; see the wrapped environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observation(observation), info

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Takes actions [N, 7]; see the wrapped environment."""
        actions = np.array(actions, dtype=np.float32)
        if self.convention == "demonstrations":
            actions[..., -1] = gripper_from_data(actions[..., -1])
        observation, rewards, terminations, truncations, info = self.env.step(actions)
        if "final_info" in info:
            final = info["final_info"]
            info = {
                **info,
                "final_obs": _convert_final(info["final_obs"], self._observation),
                "final_info": {**final, "is_success": final["success"]},
            }
        return self._observation(observation), rewards, terminations, truncations, info

    def _observation(self, observation: Mapping[str, Any]) -> Observation:
        pixels = {name: observation[key] for name, key in self._names.items()}
        return {"pixels": pixels, "agent_pos": observation["states"]}
