"""Where compiled scenes and compiled native code are kept, and how a folder gets there safely.

Nothing is written outside this folder: not to the home folder's configuration, not to site-packages.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder, creating it if needed.

    The first that is set of: the environment variable `LIBERO_GYM_CACHE`, `$XDG_CACHE_HOME/libero_gym`,
    `~/.cache/libero_gym`.

    Raises:
        OSError: the folder cannot be created; the message names `LIBERO_GYM_CACHE` as the remedy.
    """
    if configured := os.environ.get("LIBERO_GYM_CACHE"):
        path = Path(configured).expanduser()
    elif xdg_cache := os.environ.get("XDG_CACHE_HOME"):
        path = Path(xdg_cache).expanduser() / "libero_gym"
    else:
        path = Path.home() / ".cache" / "libero_gym"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot create the cache folder {path} ({error.strerror}); set LIBERO_GYM_CACHE to a writable folder"
        ) from error
    return path


@contextmanager
def file_lock(name: str) -> Generator[None]:
    """Hold the machine-wide lock `name`; other processes and threads that want it wait.

    The kernel drops the lock when its holder dies, so a killed process leaves nothing behind that blocks.
    """
    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def publish_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder by `write(folder)` and put it at `target` in one step.

    A reader sees the whole folder or none. A folder that stands at `target` is replaced; call this under
    `file_lock` where several processes may do so.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
    staging.mkdir()
    try:
        write(staging)
        if target.exists():
            discarded = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
            target.rename(discarded)
            staging.rename(target)
            shutil.rmtree(discarded)
        else:
            staging.rename(target)
    finally:
        if staging.exists():
            shutil.rmtree(staging)
