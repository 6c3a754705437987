"""What every process of a cluster does: take its place, say its versions, pass on that it was asked to stop.

Imports neither PyTorch nor Ray, so that processes that need neither start fast and are small.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import signal
import threading
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
