"""What a BDDL file of one's own may name: LIBERO's problems and types of objects, and what the file itself declares.

Problems and types are the classes that LIBERO's source registers (`register_problem` and `register_object` in
`envs`), read without importing it. A scene archive holds no source: nothing can be built from it, either.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
from collections.abc import Collection
from pathlib import Path

from libero_gym.tasks.bddl import Problem

# The type of the fixture that a problem is set on, which is no registered class: see each `_load_fixtures_in_arena`.
_WORKSPACES = {
    "libero_coffee_table_manipulation": "coffee_table",
    "libero_floor_manipulation": "floor",
    "libero_kitchen_tabletop_manipulation": "kitchen_table",
    "libero_living_room_tabletop_manipulation": "living_room_table",
    "libero_study_tabletop_manipulation": "study_table",
    "libero_tabletop_manipulation": "table",
}


def check_vocabulary(problem: Problem, path: Path, root: Path) -> None:
    """Return if LIBERO knows the problem and its types, and the file declares what its start and its goal name.

    Regions may be of what is not there, as some are in LIBERO's own files.

    Args:
        problem: what `path` says.
        path: the BDDL file.
        root: LIBERO's folder, see `libero_gym.tasks.suites.libero_root`.

    Raises:
        ValueError: it does not; the message names the file, the word, and the nearest that there are.
    """
    problems, types = problem_names(root), object_types(root)
    if problems:
        _check_word(problem.name, problems, path, "is none of LIBERO's problems")
    if types:
        for category, _ in problem.objects:
            _check_word(category, types, path, "is no type of LIBERO's objects")
    if types and problem.name in _WORKSPACES:
        for category, _ in problem.fixtures:
            known = {*types, _WORKSPACES[problem.name]}
            _check_word(category, known, path, f"is no type of fixtures of {problem.name}")
    things = {name for _, names in (*problem.objects, *problem.fixtures) for name in names}
    places = {*things, *(region.name for region in problem.regions)}
    for _, *names in (*problem.init, *problem.goal):
        for name in names:
            _check_word(name, places, path, "is neither an object, a fixture nor a region of the file")


@functools.cache
def problem_names(root: Path) -> frozenset[str]:
    """Return the names that a file's `(define (problem ...))` may have, in lower case; none for a scene archive."""
    return frozenset(node.name.lower() for _, nodes in registered_classes(root, "register_problem") for node in nodes)


@functools.cache
def object_types(root: Path) -> frozenset[str]:
    """Return the types of objects and fixtures, named as LIBERO's `register_object` does; none for a scene archive."""
    return frozenset(type_name(node.name) for _, nodes in registered_classes(root, "register_object") for node in nodes)


def type_name(class_name: str) -> str:
    """Return the type under which LIBERO registers a class of objects: `AkitaBlackBowl` is `akita_black_bowl`."""
    return "_".join(re.sub(r"([A-Z0-9])", r" \1", class_name).split()).lower()


def registered_classes(root: Path, decorator: str) -> list[tuple[ast.Module, list[ast.ClassDef]]]:
    """Return the modules of LIBERO's `envs` with classes that are decorated so, and these; none for a scene archive."""
    modules: list[tuple[ast.Module, list[ast.ClassDef]]] = []
    for path in sorted((root / "envs").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"@{decorator}" not in source:
            continue
        tree = ast.parse(source)
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        modules.append((tree, [node for node in classes if decorator in map(ast.unparse, node.decorator_list)]))
    return modules


def _check_word(word: str, known: Collection[str], path: Path, what: str) -> None:
    if word in known:
        return
    nearest = difflib.get_close_matches(word, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"valid: {', '.join(sorted(known))}"
    raise ValueError(f"{path}: {word!r} {what} ({hint})")
