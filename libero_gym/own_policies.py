"""Policies of one's own: where they are, and those for evaluations as functions of one environment's observation.

    package.module:make     a function, or a class, that takes no arguments and returns a policy; the module lies in the
                            current folder or is installed
    path/to/file.py:make    the same in a file

Shape legend: C executed steps of a chunk of H steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled

from libero_gym.adapters import observation_to_modality
from libero_gym.conventions import ACTION_DIM
from libero_gym.tasks.suites import is_integer


def policy_file(name: str) -> Path:
    """Return the file that the policy `name` is defined in, without running it.

    Raises:
        ValueError: `name` is not of a form that the module says, or there is no such module.
        FileNotFoundError: there is no such file.
    """
    return Path(str(_spec(name).origin))


def load_factory(name: str) -> Callable[[], Any]:
    """Return what `name` names, and run its module.

    Raises:
        ValueError: the module does not define it, or it cannot be called; otherwise as `policy_file`.
    """
    spec, attribute = _spec(name), name.rpartition(":")[2]
    if name.rpartition(":")[0].endswith(".py"):
        module = _run_file(spec)
    else:
        with _importing_from_here():
            module = importlib.import_module(spec.name)
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        defined = [value.__name__ for value in own if callable(value)]
        raise ValueError(
            f"policy={name!r}: {spec.origin} defines no function or class {attribute!r} (it has: {', '.join(defined)})"
        )
    return found


def is_for_evaluations(policy: Any) -> bool:
    """Return whether a policy has, or is about to have, the interface of `gr00t_agent.Policy`."""
    return hasattr(policy, "predict")


def check_for_evaluations(name: str, policy: Any) -> None:
    """Raise ValueError unless `policy`, which `name` made, has what `gr00t_agent.Policy` says."""
    for attribute in ("image_size", "num_action_chunks"):
        value: Any = getattr(policy, attribute, None)
        if not is_integer(value) or value < 1:
            raise ValueError(
                f"policy={name!r} made a {type(policy).__name__}, whose {attribute} is {value!r}; give it a positive "
                "whole number, see gr00t_agent.Policy"
            )
    if not callable(getattr(policy, "predict", None)):
        raise ValueError(
            f"policy={name!r} made a {type(policy).__name__}, which has no method predict(obs, *, generator); see "
            "gr00t_agent.Policy"
        )


class EvaluatedPolicy:
    """A policy for evaluations (`gr00t_agent.Policy`) as a function of one environment's observation.

    Args:
        name: what made it.
        policy: decides for one environment.

    Attributes:
        image_size: of the cameras that it looks through, pixels.

    Raises:
        ValueError: it lacks something of such a policy.
        DependencyNotInstalled: there is no PyTorch, whose generators such policies draw from.
    """

    def __init__(self, name: str, policy: Any) -> None:
        check_for_evaluations(name, policy)
        try:
            import torch  # only here: the environment needs none
        except ModuleNotFoundError as error:
            raise DependencyNotInstalled(
                f"policy={name!r} is one for evaluations, which draw from PyTorch's generators: `pip install torch`"
            ) from error
        self.image_size = int(policy.image_size)
        self._name, self._policy = name, policy
        self._generator = torch.Generator()

    def begin_episode(self, seed: int) -> None:
        """Tell the policy, if it has a method `reset`, and draw what comes from `seed`."""
        self._generator.manual_seed(seed)
        if hasattr(self._policy, "reset"):
            self._policy.reset([0])

    def __call__(self, observation: Mapping[str, Any]) -> npt.NDArray[np.float32]:
        """Return the steps of a decision that are executed, float32 [C, 7].

        Raises:
            ValueError: the policy's actions are not of shape [1, H, 7] with H >= C.
        """
        batch = {key: (value,) if isinstance(value, str) else value[None] for key, value in observation.items()}
        chosen = self._policy.predict(observation_to_modality(batch), generator=[self._generator])
        actions = np.asarray(chosen.detach().cpu().float() if hasattr(chosen, "detach") else chosen, np.float32)
        num_steps = self._policy.num_action_chunks
        if actions.ndim != 3 or actions.shape[::2] != (1, ACTION_DIM) or actions.shape[1] < num_steps:
            raise ValueError(
                f"policy {self._name}: actions have shape {list(actions.shape)}; expected [1, H, {ACTION_DIM}] with "
                f"H >= {num_steps} (num_action_chunks)"
            )
        return actions[0, :num_steps]


def _spec(name: str) -> ModuleSpec:
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    if not (is_file or all(part.isidentifier() for part in place.split("."))) or not attribute.isidentifier():
        raise ValueError(f"policy={name!r} names no function; give package.module:make or path/to/file.py:make")
    if is_file:
        path = Path(place)
        if not path.is_file():
            raise FileNotFoundError(f"policy={name!r}: there is no file {path}; give its path")
        spec = importlib.util.spec_from_file_location(f"policy_{path.stem}", path)
    else:
        spec = _module_spec(place)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"policy={name!r}: there is no module {place} here or installed; for a file elsewhere give "
            f"path/to/file.py:{attribute}"
        )
    return spec


def _module_spec(place: str) -> ModuleSpec | None:
    try:
        with _importing_from_here():
            return importlib.util.find_spec(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # what a package above it imports
        return None


def _run_file(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None  # a Python file has one
    sys.modules[spec.name] = module  # where its dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


@contextmanager
def _importing_from_here() -> Generator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
