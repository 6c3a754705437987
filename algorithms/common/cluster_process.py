"""What every process of a cluster does: take its place, say its versions, pass on that it was asked to stop.

Imports neither PyTorch nor Ray, so that processes that need neither start fast and are small, and so that a process
has taken its place before anything asks for GPUs.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from algorithms.common.placement import Place
from algorithms.common.provenance import git_commit

# What has to be the same on all nodes, besides Python and the commit.
SAME_PACKAGES = ("libero-gr00t", "torch", "accelerate", "ray")

Bell = Any
"""Handle of an actor of class `StopBell`."""


class StopBell:
    """Holds the first request to stop that any process of a run got; the driver waits for it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._status = 0

    async def ring(self, status: int) -> None:
        """Asks the run to save and to end with this exit status."""
        if not self._rung.is_set():
            self._status = status
        self._rung.set()

    async def wait(self) -> int:
        """Returns the exit status when it is rung."""
        await self._rung.wait()
        return self._status


def exit_status(number: int) -> int:
    """Returns the exit status of a program that was asked to stop by this signal and has saved."""
    return os.EX_OK if number == signal.SIGTERM else 128 + number


def ring_on_signals(bell: Bell) -> None:
    """Has SIGTERM to this process ring the bell, instead of ending it."""

    def request(number: int, frame: FrameType | None) -> None:
        # The main thread may be in the middle of a call of Ray's.
        threading.Thread(target=bell.ring.remote, args=(exit_status(number),), daemon=True).start()

    signal.signal(signal.SIGTERM, request)


def process_of(role: type) -> type:
    """Returns the class of a process that takes its place, and only then imports and makes its role.

    A library that looks for GPUs as it is imported would otherwise see those of the whole node for good: CUDA reads
    what it is shown when it is first used.

    Args:
        role: a class that is made of a place, a `Bell`, and what is given besides.

    Returns:
        A class that is made of a place, a `Bell`, and a list of one reference to the role and its further inputs. It
        has the public methods of the role.
    """

    def __init__(self: Any, place: Place, bell: Bell, made_of: Any) -> None:
        import ray  # which has started this process

        take_place(place)
        ring_on_signals(bell)
        kind, inputs = ray.get(made_of[0])
        self._role = kind(place, bell, *inputs)

    names = [name for name in dir(role) if not name.startswith("_") and callable(getattr(role, name))]
    return type(role.__name__, (), {"__init__": __init__} | {name: _method_of_role(name) for name in names})


def _method_of_role(name: str) -> Callable[..., Any]:
    def method(self: Any, *inputs: Any) -> Any:
        return getattr(self._role, name)(*inputs)

    return method


def take_place(place: Place) -> None:
    """Shows this process the GPU of its place only; before anything asks for GPUs.

    GPUs of a node are numbered among those that it was started with, as Ray counts them: where CUDA_VISIBLE_DEVICES
    names them, by number or by UUID, in that order.

    Raises:
        ValueError: the variable names fewer than the place counts.
    """
    if place.gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place.gpu)
        return
    visible = [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    if place.gpu >= len(visible):
        raise ValueError(
            f"GPU {place.gpu} of a node has a process, and CUDA_VISIBLE_DEVICES={named!r} shows it {len(visible)}: "
            "start Ray on the node with as many GPUs as the variable names, and unset "
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[place.gpu]


def versions() -> dict[str, str | None]:
    """Returns what has to be the same on all nodes, of this one, by name; the commit is None where it is not known."""
    found: dict[str, str | None] = {"Python": platform.python_version()}
    for package in SAME_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"commit": git_commit()}
