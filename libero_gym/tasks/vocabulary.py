"""What a BDDL file of one's own may name: LIBERO's problems, types of objects and predicates, and what it declares.

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


_FORMS = {
    "on": "(On object object-or-region)",
    "in": "(In object region)",
    "open": "(Open fixture-or-region)",
    "close": "(Close fixture-or-region)",
    "turnon": "(TurnOn fixture)",
    "turnoff": "(TurnOff fixture)",
}
# The method of a type of objects by which LIBERO judges a predicate.
_JOINT_METHODS = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}


def check_vocabulary(problem: Problem, path: Path, root: Path) -> None:
    """Return if LIBERO knows the problem, its types and predicates, and the file declares what start and goal name.

    Regions that neither names may be of what is not there, as some are in LIBERO's own files.

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
    declared = [name for _, names in (*problem.objects, *problem.fixtures) for name in names]
    declared += [region.name for region in problem.regions]
    for name in declared:
        if declared.count(name) > 1:
            raise ValueError(f"{path}: {name!r} is declared twice; give one of the two another name")
    for section, atoms in ((":init", problem.init), (":goal", problem.goal)):
        for atom in atoms:
            predicate, *names = atom
            _check_word(predicate, _FORMS, path, f"is no predicate in ({section} ...)")
            for name in names:
                _check_word(name, declared, path, "is neither an object, a fixture nor a region of the file")
            if fault := _find_fault(problem, section, atom, root):
                raise ValueError(f"{path}: ({' '.join(atom)}) in ({section} ...): {fault} (valid: {_FORMS[predicate]})")


def _find_fault(problem: Problem, section: str, atom: tuple[str, ...], root: Path) -> str | None:
    """Return what is wrong with an atom whose words are known, None if nothing is."""
    predicate, *names = atom
    types = {name: category for category, names in (*problem.objects, *problem.fixtures) for name in names}
    regions = {region.name: region for region in problem.regions}
    workspace = _WORKSPACES.get(problem.name)
    if len(names) != (2 if predicate in {"on", "in"} else 1):
        return f"{predicate!r} takes {'two names' if predicate in {'on', 'in'} else 'one name'}"
    for name in names:
        if types.get(name) == workspace and workspace is not None:
            return f"{name!r} is the workspace; name a region of it"
        if name in regions and regions[name].target not in types:
            return f"the region {name!r} is of {regions[name].target!r}, which the file does not declare"
    place = regions.get(names[-1])
    if predicate in {"on", "in"}:
        if names[0] in regions:
            return f"{names[0]!r} is a region, not an object"
        if predicate == "in" and place is None:
            return f"{names[1]!r} is no region"
        if section == ":init" and place is not None and types[place.target] == workspace and not place.ranges:
            return f"the region {names[1]!r} has no (:ranges ...), so that nothing can be placed in it"
        if section == ":init" and place is None and names[1] not in {n for _, ns in problem.objects for n in ns}:
            return f"{names[1]!r} is a fixture, on which LIBERO places nothing; name a region of it"
        return None
    known = joint_predicates(root)
    category = types[names[0] if place is None else place.target]
    if known and predicate not in known.get(category, ()):
        able = sorted(name for name, predicates in known.items() if predicate in predicates)
        return f"{category!r} is no type that can be asked for {predicate!r}, as {', '.join(able)} can"
    return None


@functools.cache
def problem_names(root: Path) -> frozenset[str]:
    """Return the names that a file's `(define (problem ...))` may have, in lower case; none for a scene archive."""
    return frozenset(node.name.lower() for _, nodes in registered_classes(root, "register_problem") for node in nodes)


@functools.cache
def object_types(root: Path) -> frozenset[str]:
    """Return the types of objects and fixtures, named as LIBERO's `register_object` does; none for a scene archive."""
    return frozenset(type_name(node.name) for _, nodes in registered_classes(root, "register_object") for node in nodes)


@functools.cache
def joint_predicates(root: Path) -> dict[str, frozenset[str]]:
    """Return, by type of objects, which of open, close, turnon and turnoff it knows; nothing for a scene archive."""
    known: dict[str, frozenset[str]] = {}
    for tree, classes in registered_classes(root, "register_object"):
        methods = {
            node.name: {method.name for method in node.body if isinstance(method, ast.FunctionDef) and _is_made(method)}
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }
        for node in classes:
            own = set[str]().union(*(methods.get(name, ()) for name in (node.name, *map(ast.unparse, node.bases))))
            predicates = {predicate for predicate, method in _JOINT_METHODS.items() if method in own}
            known.setdefault(type_name(node.name), frozenset(predicates))
    return known


def _is_made(method: ast.FunctionDef) -> bool:
    return not any(isinstance(line, ast.Raise) for line in method.body)


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
