"""Registers `libero_gym/<suite>-v0` with Gymnasium for every suite that is installed.

Runs when `libero_gym` is imported, which `gymnasium.make("libero_gym:libero_gym/libero_spatial-v0")` does by itself.
Costs a few file listings; neither MuJoCo nor LIBERO is imported.
"""

from __future__ import annotations

from pathlib import Path

from gymnasium.envs.registration import register, registry

from libero_gym.tasks.own_suites import add_suite, named_suites, read_suite
from libero_gym.tasks.suites import COMBINED_SUITES, HORIZONS, TaskSpec, check_name_is_free, list_named_suites, tasks_of


def register_envs() -> None:
    """Register the ids; a second call changes nothing.

    Where no distribution provides `libero`, one has written over another, or the scene archive is none, base and
    combined suites are registered all the same: making one of them then raises the error that says what to do, instead
    of Gymnasium's "namespace not found". Nor is it looked whether the suites that `LIBERO_GYM_SUITES` names are there,
    or whether LIBERO-PRO's have their assets.
    """
    try:
        suites = list_named_suites()
    except (ImportError, OSError, ValueError):
        suites = [*HORIZONS, *COMBINED_SUITES]
    for suite in [*suites, *named_suites()]:
        env_id = f"libero_gym/{suite}-v0"
        if env_id not in registry:
            register(
                id=env_id,
                entry_point="libero_gym.env:LiberoEnv",
                vector_entry_point="libero_gym.vector:LiberoVectorEnv",
                kwargs={"suite": suite},
            )


def register_suite(name: str, folder: str | Path, init_states: str | Path | None = None) -> list[TaskSpec]:
    """Make a folder of one's own BDDL files the suite `name`, and the id `libero_gym/<name>-v0`.

    Each file is a task, in the order of their names; its instruction is the file's `(:language ...)`, without
    parentheses. What LIBERO's files may say, these may: its objects, fixtures, regions and predicates.

    Without `init_states`, 50 states of each task are drawn by LIBERO's sampler when they are first needed (a minute a
    task, and half a minute for each new scene; kept in the cache): with settled objects and the fixtures among which
    they were placed, as `init_states="settled"`, the default. Episodes are cut after 480 steps, unless `horizon` says
    otherwise, or the name begins with that of a base suite, whose horizon it then has.

    A file that is edited later is another task at once, see `TaskSpec.digest`; register again only to have it checked.

    The registration holds for this process and those it starts (see `libero_gym.tasks.own_suites`).

    Args:
        name: letters, digits, "_" and "-".
        folder: with the `.bddl` files.
        init_states: folder with `<task>.pruned_init.npz`, `.pruned_init` or `.npz` files of stored states, as LIBERO's.

    Returns:
        The tasks, as `libero_gym.list_tasks(name)` gives them.

    Raises:
        ValueError: the name is that of another suite, or cannot be part of an id, or a file is no LIBERO task: it has
            another form, or names a problem, a predicate, an object or a type of objects that there is not, or one
            whose model is not installed; or stored states are no table of finite numbers. Nothing has been registered.
        FileNotFoundError: a folder is missing, has no BDDL files, or has no states of a task.
    """
    check_name_is_free(name)
    suite = read_suite(name, Path(folder), None if init_states is None else Path(init_states))
    tasks = tasks_of(suite)
    add_suite(suite)
    register_envs()
    return list(tasks)
