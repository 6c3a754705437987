"""Where compiled scenes and compiled native code are kept, and how a folder gets there safely.

Nothing is written outside this folder: not to the home folder's configuration, not to site-packages. What is damaged
in it (cut by a full disk or a loss of power, changed by a fault of the disk) is found before it is used, and made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_REMEDY = "set LIBERO_GYM_CACHE to a writable folder"


def cache_dir() -> Path:
    """Return the cache folder, creating it if needed.

    The first that is set of: the environment variable `LIBERO_GYM_CACHE`, `$XDG_CACHE_HOME/libero_gym`,
    `~/.cache/libero_gym`.

    Raises:
        OSError: the folder cannot be created or written to; the message names `LIBERO_GYM_CACHE` as the remedy.
    """
    if configured := os.environ.get("LIBERO_GYM_CACHE"):
        path = Path(configured).expanduser()
    elif xdg_cache := os.environ.get("XDG_CACHE_HOME"):
        path = Path(xdg_cache).expanduser() / "libero_gym"
    else:
        try:
            path = Path.home() / ".cache" / "libero_gym"
        except RuntimeError as error:
            raise OSError(f"the cache folder is in the home folder, and there is none ({error}); {_REMEDY}") from error
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create the cache folder {path} ({error.strerror}); {_REMEDY}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"cannot write to the cache folder {path}; {_REMEDY}")
    return path


@contextmanager
def file_lock(name: str) -> Generator[None]:
    """Hold the machine-wide lock `name`; other processes and threads that want it wait.

    The kernel drops the lock when its holder dies, so a killed process leaves nothing behind that blocks.
    """
    path = cache_dir() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); {_REMEDY}") from error
    with handle:
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


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def checked_folder(name: str) -> Generator[Path]:
    """Give the folder `name` of the cache to a compiler that keeps its results there, one process at a time.

    Before, what is damaged is deleted, and so is what was left by a process that was killed here. After, what is there
    is noted, for the next process to check.
    """
    folder = cache_dir() / name
    with file_lock(name.replace("/", "-")):
        folder.mkdir(parents=True, exist_ok=True)
        drop_damaged(folder, keeps_unknown=False)
        yield folder
        note_files(folder)


def is_intact(folder: Path) -> bool:
    """Return whether all files in a folder are as `note_files` found them."""
    noted = _read_manifest(folder)
    return bool(noted) and all(_is(folder / name, size, digest) for name, (size, _, digest) in noted.items())


def drop_damaged(folder: Path, *, keeps_unknown: bool) -> None:
    """Delete the files of each folder in `folder` of which one is not as `note_files` found it.

    Folders stay, for whoever is about to write into them. Call this under a lock.

    Args:
        folder: folder of a compiler.
        keeps_unknown: whether files that were never noted stay, for compilers that write at any time; False where all
            writers note what they write.
    """
    noted = _read_manifest(folder)
    damaged = {Path(name).parts[0] for name, (size, _, digest) in noted.items() if not _is(folder / name, size, digest)}
    if not keeps_unknown:
        damaged |= {Path(name).parts[0] for name in _list_files(folder) if name not in noted}
    for name in _list_files(folder):
        if Path(name).parts[0] in damaged:
            (folder / name).unlink(missing_ok=True)
    _write_manifest(folder, {name: entry for name, entry in noted.items() if Path(name).parts[0] not in damaged})


def note_files(folder: Path) -> None:
    """Note the files in `folder` and below, for `drop_damaged`; those that have not changed are not read again.

    Call this under a lock.
    """
    known, noted = _read_manifest(folder), dict[str, list[Any]]()
    for name in _list_files(folder):
        try:
            stat = (folder / name).stat()
            seen = [stat.st_size, stat.st_mtime_ns]
            same = known.get(name, [None])[:2] == seen
            noted[name] = known[name] if same else [*seen, digest_file(folder / name)]
        except FileNotFoundError:  # somebody else's, who has just put it elsewhere
            continue
    _write_manifest(folder, noted)


def publish_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Put a file into a folder of the cache in one step: readers see all of it or nothing.

    Args:
        file: Where it shall be; its folder exists.
        write: Writes the file that it is given the path of.
    """
    # Beside the folder, whose files may be being noted.
    staging = file.parent.with_name(f".{file.parent.name}.{os.getpid()}.{secrets.token_hex(4)}{file.suffix}")
    try:
        write(staging)
        staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)


def _is(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and digest_file(path) == digest


def _list_files(folder: Path) -> list[str]:
    """Return the paths of all files below `folder`, relative to it, but for the manifest."""
    found = [Path(root, name).relative_to(folder) for root, _, names in os.walk(folder) for name in names]
    return sorted(str(path) for path in found if str(path) != MANIFEST_FILE)


def _read_manifest(folder: Path) -> dict[str, list[Any]]:
    """Return [size, time of change, digest] by path; a damaged manifest knows nothing."""
    try:
        noted = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return {str(name): [int(size), int(time), str(digest)] for name, (size, time, digest) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_manifest(folder: Path, noted: dict[str, list[Any]]) -> None:
    if noted != _read_manifest(folder):
        publish_file(folder / MANIFEST_FILE, lambda staging: staging.write_text(json.dumps(noted), encoding="utf-8"))
