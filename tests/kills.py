"""A kill at any file operation, simulated: from then on nothing of the program touches a file."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors.torch

CHANGES = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "fsync")


class Killed(BaseException):
    """No handler of the program catches it."""


class Kill:
    """Counts operations that change files.

    Attributes:
        count: operations so far.
    """

    def __init__(self, at: int | None) -> None:
        self.count = 0
        self._at = at

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
        if self._at is not None and self.count >= self._at:
            raise Killed


@contextmanager
def killed_at(number: int | None) -> Generator[Kill]:
    """Kills the program at the operation `number`, from 1; with None it only counts."""
    kill = Kill(number)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, kill.before(getattr(os, name)))
        serialize_file = getattr(safetensors.torch, "serialize_file")  # noqa: B009 (a name of its own)
        patch.setattr(safetensors.torch, "serialize_file", kill.before(serialize_file))
        for module in (builtins, io):
            patch.setattr(module, "open", kill.opening(open))
        yield kill
