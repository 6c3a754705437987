"""Reads LIBERO's BDDL task files: objects, fixtures, regions, initial state, goal and instruction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"[()]|[^\s()]+")


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
    groups = {group[0]: group[1:] for group in _parse(text.lower(), path) if isinstance(group, list)}
    missing = {"problem", ":regions", ":objects", ":fixtures", ":init", ":goal"} - groups.keys()
    if missing:
        raise ValueError(f"{path} lacks the sections {sorted(missing)}; is it a LIBERO task file?")
    if any(isinstance(word, list) for word in groups.get(":language", [])):
        raise ValueError(f"{path} has parentheses in its instruction (:language ...), which LIBERO cannot read")
    language = re.search(r"\(:language\s+([^)]*)\)", text)
    goal = groups[":goal"][0]
    return Problem(
        name=groups["problem"][0],
        instruction=" ".join(language.group(1).split()) if language else "",
        objects=_typed_names(groups[":objects"]),
        fixtures=_typed_names(groups[":fixtures"]),
        regions=tuple(_region(group) for group in groups[":regions"]),
        init=tuple(tuple(atom) for atom in groups[":init"]),
        goal=tuple(tuple(atom) for atom in (goal[1:] if goal[0] == "and" else [goal])),
    )


def _parse(text: str, path: Path) -> list[Any]:
    stack: list[list[Any]] = [[]]
    for token in _TOKEN.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise ValueError(f"{path}: closing parenthesis without an opening one")
            group = stack.pop()
            stack[-1].append(group)
        else:
            stack[-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1 or stack[0][0][:1] != ["define"]:
        raise ValueError(f"{path}: not a single (define ...) expression")
    return stack[0][0][1:]


def _typed_names(tokens: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Read `a b - type_1 c - type_2`. A type that occurs twice keeps its last names, as in LIBERO's parser."""
    typed: dict[str, tuple[str, ...]] = {}
    names: list[str] = []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if token == "-":
            typed[tokens.pop(0)] = tuple(names)
            names = []
        else:
            names.append(token)
    return tuple(typed.items())


def _region(group: list[Any]) -> Region:
    attributes = {attribute[0]: attribute[1] for attribute in group[1:]}
    target = attributes[":target"]
    yaw_ranges = attributes.get(":yaw_rotation", [["0", "0"]])
    return Region(
        name=f"{target}_{group[0]}",
        target=target,
        ranges=tuple(tuple(float(x) for x in rectangle) for rectangle in attributes.get(":ranges", [])),
        yaw_range=tuple(float(x) for x in yaw_ranges[-1]),
        rgba=tuple(float(x) for x in attributes.get(":rgba", (0, 0, 1, 0))),
    )
