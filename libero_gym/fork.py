"""What survives neither a fork nor a copy: threads, OpenGL contexts, CUDA memory, addresses of native memory.

A child that uses what it inherited of them waits for ever for threads that only its parent has. Whatever owns such a
thing holds an `Owner` and asks it first. A copy made field by field goes on using the original's memory, so that
stepping it steps the original; such classes are `Uncopied`.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn


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
                "the process that uses them, as the functions given to gymnasium.vector.AsyncVectorEnv do"
            )


class Uncopied:
    """Base of classes whose objects can be neither copied (`copy.copy`, `copy.deepcopy`) nor pickled."""

    _HOW_TO_MAKE_ANOTHER = "make another one with the same arguments"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses; copying asks here too.

        Raises:
            TypeError: Always; the message says how to make an independent object.
        """
        raise TypeError(
            f"{type(self).__name__} holds native memory, which a copy would share with the original and a pickle would "
            f"lose: {self._HOW_TO_MAKE_ANOTHER}"
        )
