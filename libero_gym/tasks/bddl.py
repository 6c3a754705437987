"""Reads LIBERO's BDDL task files: objects, fixtures, regions, initial state, goal and instruction."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"[()]|[^\s()]+")
# What a region may say, and how.
_REGION_ATTRIBUTES = {
    ":target": "(:target thing)",
    ":ranges": "(:ranges ((x_min y_min x_max y_max) ...))",
    ":yaw_rotation": "(:yaw_rotation ((low high)))",
    ":rgba": "(:rgba (r g b a))",
}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A named part of a table or of an object.

    Attributes:
        name: `<target>_<region>`, the name of the site in the model.
        target: the table, object or fixture it belongs to.
        ranges: rectangles (x_min, y_min, x_max, y_max) in metres relative to the table's centre; empty for parts
            of objects.
        yaw_range: (low, high) rad of the yaw that a fixture placed here gets.
        rgba: colour of the site.
    """

    name: str
    target: str
    ranges: tuple[tuple[float, ...], ...]
    yaw_range: tuple[float, ...]
    rgba: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One parsed BDDL file. All names are lower case, as LIBERO's own parser makes them.

    Attributes:
        name: the problem class, such as `libero_tabletop_manipulation`.
        instruction: the `:language` sentence as written in the file.
        objects: (category, instance names) in file order; movable.
        fixtures: (category, instance names) in file order; fixed, the workspace among them.
        regions: in file order.
        init: atoms of the initial state, in file order.
        goal: atoms of the goal, a conjunction.
    """

    name: str
    instruction: str
    objects: tuple[tuple[str, tuple[str, ...]], ...]
    fixtures: tuple[tuple[str, tuple[str, ...]], ...]
    regions: tuple[Region, ...]
    init: tuple[tuple[str, ...], ...]
    goal: tuple[tuple[str, ...], ...]

    def layout(self) -> list[Any]:
        """Return what decides the MJCF, as nested lists: two problems with equal layouts share one model."""
        return [
            self.name,
            [[category, list(names)] for category, names in self.objects],
            [[category, list(names)] for category, names in self.fixtures],
            [
                [region.name, region.target, [list(r) for r in region.ranges], list(region.rgba)]
                for region in self.regions
            ],
        ]


def read_problem(path: Path) -> Problem:
    """Parse the BDDL file at `path`.

    Raises:
        ValueError: the file is not a BDDL problem; the message names the file and what is wrong.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no BDDL file in UTF-8 ({error})") from error
    text = re.sub(r";.*$", "", content, flags=re.MULTILINE)
    try:
        return _read_sections(_parse(text.lower()), text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_sections(sections: list[Any], text: str) -> Problem:
    groups: dict[str, list[Any]] = {}
    for section in sections:
        if not isinstance(section, list) or not section or not isinstance(section[0], str):
            raise ValueError(f"{_show(section)} is no section, such as (:objects ...)")
        if section[0] in groups:
            raise ValueError(f"it has the section ({section[0]} ...) twice")
        groups[section[0]] = section[1:]
    missing = {"problem", ":regions", ":objects", ":fixtures", ":init", ":goal"} - groups.keys()
    if missing:
        raise ValueError(f"it lacks the sections {sorted(missing)}; is it a LIBERO task file?")
    if any(isinstance(word, list) for word in groups.get(":language", [])):
        raise ValueError("it has parentheses in its instruction (:language ...), which LIBERO cannot read")
    if len(groups["problem"]) != 1 or not isinstance(groups["problem"][0], str):
        raise ValueError("(problem ...) takes one name, such as (problem LIBERO_Tabletop_Manipulation)")
    language = re.search(r"\(:language\s+([^)]*)\)", text)
    return Problem(
        name=groups["problem"][0],
        instruction=" ".join(language.group(1).split()) if language else "",
        objects=_typed_names(":objects", groups[":objects"]),
        fixtures=_typed_names(":fixtures", groups[":fixtures"]),
        regions=tuple(_region(group) for group in groups[":regions"]),
        init=tuple(_atom(atom) for atom in groups[":init"]),
        goal=_goal(groups[":goal"]),
    )


def _parse(text: str) -> list[Any]:
    stack: list[list[Any]] = [[]]
    for token in _TOKEN.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError("it has a closing parenthesis without an opening one")
            group = stack.pop()
            stack[-1].append(group)
        else:
            stack[-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1 or stack[0][0][:1] != ["define"]:
        raise ValueError("it is not a single (define ...) expression")
    return stack[0][0][1:]


def _typed_names(section: str, tokens: list[Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read `a b - type_1 c - type_2`."""
    typed: dict[str, tuple[str, ...]] = {}
    names: list[str] = []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if not isinstance(token, str):
            raise ValueError(f"({section} ...) has {_show(token)} where a name is expected")
        if token != "-":
            names.append(token)
        elif names and tokens and isinstance(tokens[0], str) and tokens[0] != "-":
            if tokens[0] in typed:
                raise ValueError(
                    f"({section} ...) has the type {tokens[0]!r} twice, of which LIBERO reads one: join them"
                )
            typed[tokens.pop(0)] = tuple(names)
            names = []
        else:
            raise ValueError(
                f"({section} ...) has no {'type after' if names else 'name before'} a '-': write name - type"
            )
    if names:
        raise ValueError(f"({section} ...) tells no type of {', '.join(names)}: write {names[-1]} - type")
    return tuple(typed.items())


def _region(group: Any) -> Region:
    if not isinstance(group, list) or not group or not isinstance(group[0], str):
        raise ValueError(f"{_show(group)} in (:regions ...) is no region: write (name (:target ...) (:ranges (...)))")
    attributes: dict[str, Any] = {}
    for attribute in group[1:]:
        if not isinstance(attribute, list) or len(attribute) != 2 or attribute[0] not in _REGION_ATTRIBUTES:
            raise ValueError(
                f"region {group[0]!r} has {_show(attribute)} (valid: {' '.join(_REGION_ATTRIBUTES.values())})"
            )
        attributes[attribute[0]] = attribute[1]
    target = attributes.get(":target")
    if not isinstance(target, str):
        raise ValueError(f"region {group[0]!r} has no (:target thing)")
    ranges = [_numbers(group[0], ":ranges", rectangle, 4) for rectangle in _list(group[0], ":ranges", attributes)]
    yaw_ranges = [_numbers(group[0], ":yaw_rotation", pair, 2) for pair in _list(group[0], ":yaw_rotation", attributes)]
    for x_min, y_min, x_max, y_max in ranges:
        if x_min > x_max or y_min > y_max:
            raise ValueError(
                f"region {group[0]!r} has ({x_min} {y_min} {x_max} {y_max}) in (:ranges ...), whose smallest x or y is "
                "larger than its largest (expected: x_min y_min x_max y_max)"
            )
    return Region(
        name=f"{target}_{group[0]}",
        target=target,
        ranges=tuple(ranges),
        yaw_range=yaw_ranges[-1] if yaw_ranges else (0.0, 0.0),
        rgba=_numbers(group[0], ":rgba", attributes.get(":rgba", ["0", "0", "1", "0"]), 4),
    )


def _list(region: str, attribute: str, attributes: dict[str, Any]) -> list[Any]:
    values = attributes.get(attribute, [])
    if not isinstance(values, list):
        raise ValueError(f"region {region!r} has ({attribute} {values}) (valid: {_REGION_ATTRIBUTES[attribute]})")
    return values


def _numbers(region: str, attribute: str, words: Any, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in words)
    except (TypeError, ValueError):
        numbers = ()
    if isinstance(words, str) or len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"region {region!r} has {_show(words)} in ({attribute} ...), which is not {count} numbers "
            f"(valid: {_REGION_ATTRIBUTES[attribute]})"
        )
    return numbers


def _atom(group: Any) -> tuple[str, ...]:
    if not isinstance(group, list) or not group or not all(isinstance(word, str) for word in group):
        raise ValueError(f"{_show(group)} is no atom: write (On object region), (Open region) and so on")
    return tuple(group)


def _goal(section: list[Any]) -> tuple[tuple[str, ...], ...]:
    if len(section) != 1 or not isinstance(section[0], list) or section[0] in ([], ["and"]):
        raise ValueError("it has no goal: write (:goal (And (On object region) ...))")
    goal = section[0]
    for atom in (goal, *goal):
        if isinstance(atom, list) and atom and atom[0] in {"or", "not", "imply", "forall", "exists"}:
            raise ValueError(f"{_show(atom)} in its goal is not supported: a goal is one atom or (And ...) of several")
    return tuple(_atom(atom) for atom in (goal[1:] if goal[0] == "and" else [goal]))


def _show(words: Any) -> str:
    """Return an expression as BDDL writes it."""
    return f"({' '.join(map(_show, words))})" if isinstance(words, list) else str(words)
