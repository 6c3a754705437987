"""What does not survive a fork: threads, OpenGL contexts, CUDA memory.

A child that uses what it inherited of them waits for ever for threads that only its parent has. Whatever owns such a
thing holds an `Owner` and asks it first.
"""

from __future__ import annotations

import os


class Owner:
    """The process in which an object was made."""

    def __init__(self, what: str) -> None:
        """Remembers the current process.

        Args:
            what: The object, as the error names it: "the renderer 'egl'".
        """
        self._what = what
        self._pid = os.getpid()

    @property
    def is_this_process(self) -> bool:
        """Whether the object was made in the current process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Returns in the process that made the object.

        Raises:
            RuntimeError: In any other, which was forked from it.
        """
        if not self.is_this_process:
            raise RuntimeError(
                f"{self._what} was opened by process {self._pid} and does not work in process {os.getpid()}, which was "
                "forked from it: start processes with multiprocessing.get_context('spawn'), and make environments in "
                "the process that uses them"
            )
