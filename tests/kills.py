"""A kill at any file operation: from then on nothing of the program touches a file.

`killed_at` ends the program at one operation. `states_at_kills` keeps what each such end would leave, of one program
that runs to its end: as a kill makes nothing of its own, that is what there is at that moment.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

CHANGES = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "fsync")

_OPERATIONS = {name: getattr(os, name) for name in CHANGES}
_OPEN = open


class Killed(BaseException):
    """No handler of the program catches it."""


class Kill:
    """Counts operations that change files.

    Attributes:
        count: operations so far.
    """

    def __init__(self, at: int | None, look: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._at = at
        self._look = look

    def before(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `operation`, before which the program may be killed."""

        def called(*inputs: Any, **options: Any) -> Any:
            self._step()
            return operation(*inputs, **options)

        return called

    def opening(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `open`, after which the program may be killed, with an empty file for what was to be written."""

        def called(file: Any, mode: str = "r", *inputs: Any, **options: Any) -> Any:
            opened = operation(file, mode, *inputs, **options)
            if set(mode) & set("wax+"):
                try:
                    self._step()
                except Killed:
                    opened.close()
                    raise
            return opened

        return called

    def _step(self) -> None:
        self.count += 1
        self._look()
        if self._at is not None and self.count >= self._at:
            raise Killed


@contextmanager
def killed_at(number: int | None) -> Generator[Kill]:
    """Kills the program at the operation `number`, from 1; with None it only counts."""
    kill = Kill(number)
    with _observed(kill):
        yield kill


@contextmanager
def states_at_kills(folder: Path, copies: Path) -> Generator[list[Path]]:
    """Gives copies of what a kill at each operation would leave of `folder`, without those that equal an earlier one.

    A copy of a folder that is not there yet is none either.
    """
    states: list[Path] = []
    seen: set[bytes] = set()

    def look() -> None:
        with _unobserved():
            state = _digest(folder)
            if state not in seen:
                seen.add(state)
                states.append(copies / f"{len(states):03}")
                if folder.exists():
                    shutil.copytree(folder, states[-1], symlinks=True)

    with _observed(Kill(None, look)):
        yield states


def _digest(folder: Path) -> bytes:
    """Returns a digest of the names and contents of all that is in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0{path.is_dir()}\0".encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


@contextmanager
def _unobserved() -> Generator[None]:
    """What is done within is not the program's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, operation in _OPERATIONS.items():
            patch.setattr(os, name, operation)
        for module in (builtins, io):
            patch.setattr(module, "open", _OPEN)
        yield


@contextmanager
def _observed(kill: Kill) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, kill.before(getattr(os, name)))
        serialize_file = getattr(safetensors.torch, "serialize_file")  # noqa: B009 (a name of its own)
        patch.setattr(safetensors.torch, "serialize_file", kill.before(serialize_file))
        for module in (builtins, io):
            patch.setattr(module, "open", kill.opening(open))
        yield
