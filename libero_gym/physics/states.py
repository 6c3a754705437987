"""What a saved state must be like, so that all of it is checked before any of it is restored."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding

from libero_gym.tasks.scenes import Scene, scene_key
from libero_gym.tasks.suites import TaskSpec, get_task


class Entry(NamedTuple):
    """An array of a state.

    Attributes:
        dtype: its type. Integers of any width and texts of any length are taken for one another.
        shape: its shape.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: npt.ArrayLike) -> Entry:
        """Return what describes `value`."""
        array = np.asarray(value)
        return cls(array.dtype, array.shape)


TEXT, INTEGER, NUMBER, FLAG = (Entry(np.dtype(kind)) for kind in (np.str_, np.int64, np.float64, np.bool_))
IDENTITY: dict[str, Entry] = {"scene": TEXT, "suite": TEXT, "task_id": INTEGER, "init_state_id": INTEGER}
EPISODE: dict[str, Entry] = {
    "episode_length": INTEGER, "episode_return": NUMBER, "last_value": NUMBER, "is_done": FLAG, "rng": TEXT,
}  # fmt: skip
"""What the state of an environment, single or one of many, holds besides that of its world."""


def check_is_mapping(state: Any) -> None:
    """Raise TypeError unless `state` maps names to values."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"the state is a {type(state).__name__}; expected the dictionary of arrays that get_state returned"
        )


def check_keys(state: Mapping[str, Any], keys: Collection[str], *, optional: Collection[str] = ()) -> None:
    """Raise unless `state` is a mapping that has all of `keys` and nothing else but `optional` ones.

    Raises:
        TypeError: it is no mapping.
        ValueError: it has other keys.
    """
    check_is_mapping(state)
    missing, surplus = sorted(set(keys) - set(state)), sorted(set(state) - set(keys) - set(optional))
    if missing:
        raise ValueError(
            f"the state lacks {missing}: give what get_state of such an object returned (given: {sorted(state)})"
        )
    if surplus:
        raise ValueError(f"the state has {surplus}, which are no part of it (valid: {sorted(keys)})")


def check_entries(
    state: Mapping[str, Any], layout: Mapping[str, Entry], *, must_be_finite: bool = True
) -> dict[str, npt.NDArray[Any]]:
    """Return the entries of `state` that `layout` names, as arrays.

    Raises:
        ValueError: one is of another type or shape, or holds numbers that are not finite.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in layout.items():
        value = np.asarray(state[name])
        kinds = [{"i": "integer", "u": "integer", "U": "text"}.get(d.kind, str(d)) for d in (value.dtype, entry.dtype)]
        if kinds[0] != kinds[1] or value.shape != entry.shape:
            raise ValueError(
                f"{name} of the state is {kinds[0]} {value.shape}; expected {kinds[1]} {entry.shape}, as get_state "
                "returns it"
            )
        if must_be_finite and value.dtype.kind == "f" and not np.isfinite(value).all():
            places = np.argwhere(~np.isfinite(value))[:3].tolist()
            raise ValueError(
                f"{name} of the state holds numbers that are not finite, at {places}: give a state from before the "
                "simulation diverged"
            )
        arrays[name] = value
    return arrays


def read_episode(state: Mapping[str, Any]) -> tuple[dict[str, npt.NDArray[Any]], np.random.Generator]:
    """Return the entries of `state` that `EPISODE` names, and the generator among them.

    Raises:
        ValueError: one is missing, of another type or shape, or not finite, the length is negative, or the last value
            neither 0 nor 1.
    """
    check_keys(state, EPISODE, optional=state)
    episode = check_entries(state, EPISODE)
    if episode["episode_length"] < 0:
        raise ValueError(f"episode_length={episode['episode_length']} of the state is negative: it counts steps")
    if episode["last_value"] not in (0.0, 1.0):
        raise ValueError(
            f"last_value={episode['last_value']} of the state is neither 0 nor 1: it says whether the goal held at the "
            "end of the last step; give what get_state returned"
        )
    return episode, read_generator(str(episode["rng"]))


def write_generator(rng: np.random.Generator) -> npt.NDArray[np.str_]:
    """Return the state of a generator as text."""
    return np.array(json.dumps(rng.bit_generator.state))


def read_generator(text: str) -> np.random.Generator:
    """Return a generator in the state that `write_generator` returned.

    Raises:
        ValueError: `text` is not such a state.
    """
    rng, _ = seeding.np_random(0)
    try:
        rng.bit_generator.state = json.loads(text)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"rng of the state is {text[:80]!r}, which is no state of a {type(rng.bit_generator).__name__} ({error}): "
            "give what get_state returned"
        ) from error
    return rng


def read_task(state: Mapping[str, Any]) -> TaskSpec:
    """Return the task that a state is of.

    Raises:
        ValueError: there is no such task, or the state does not name one.
    """
    check_keys(state, IDENTITY, optional=state)
    arrays = check_entries(state, IDENTITY)
    if arrays["init_state_id"] < 0:
        raise ValueError(f"init_state_id={arrays['init_state_id']} of the state is negative: it counts from 0")
    return get_task(str(arrays["suite"]), int(arrays["task_id"]))


def check_scene(state: Mapping[str, Any], scene: Scene) -> TaskSpec:
    """Return the task that a state is of.

    Raises:
        ValueError: state or task belong to another scene than `scene`, or there is no such task.
    """
    task = read_task(state)
    for what, key in (("the state", str(state["scene"])), (f"{task.suite} task {task.task_id}", scene_key(task))):
        if key != scene.key:
            raise ValueError(
                f"{what} belongs to scene {key}, this simulation to {scene.key}: "
                "restore a state in a simulation of the same task, built by the same versions"
            )
    return task
