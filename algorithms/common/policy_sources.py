"""Where an evaluation's policy comes from, if from no checkpoint; needs no PyTorch, so that mistakes are told at once.

--policy package.module:make            a function, or a class, that takes no arguments and returns a policy
--policy path/to/file.py:make           the same in a file
--policy-server ws://localhost:8000     a server that speaks as openpi's does (wss:// with encryption)
--policy-server zmq://localhost:5555    NVIDIA's Isaac-GR00T server
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("ws", "wss", "zmq")


def check_address(address: str) -> None:
    """Raises ValueError unless `address` names a protocol, a host and a port."""
    remedy = "give ws://host:port (openpi's protocol) or zmq://host:port (Isaac-GR00T's)"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"policy_server={address!r} is no address ({error}); {remedy}") from error
    if parts.scheme not in SCHEMES or not parts.hostname or (port is None and parts.scheme != "wss"):
        raise ValueError(f"policy_server={address!r} is no address; {remedy}")


def policy_file(name: str) -> Path:
    """Returns the file that `--policy name` is defined in, without running it.

    Raises:
        ValueError: `name` is not of the form that the module says, or there is no such module.
        FileNotFoundError: there is no such file.
    """
    return Path(str(_spec(name).origin))


def load_factory(name: str) -> Callable[[], Any]:
    """Returns what `--policy name` names, and runs its module.

    Raises:
        ValueError: the module does not define it, or it cannot be called; otherwise as `policy_file`.
    """
    spec, attribute = _spec(name), name.rpartition(":")[2]
    if name.rpartition(":")[0].endswith(".py"):
        module = importlib.util.module_from_spec(spec)
        assert spec.loader is not None  # a Python file has one
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(spec.name)
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        defined = [value.__name__ for value in own if callable(value)]
        raise ValueError(
            f"policy={name!r}: {spec.origin} defines no function or class {attribute!r} (it has: {', '.join(defined)})"
        )
    return found


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
            f"policy={name!r}: there is no module {place}; give one that is installed, or path/to/file.py:{attribute}"
        )
    return spec


def _module_spec(place: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # what a package above it imports
        return None
