"""How every benchmark tells what it measured.

Rows of a table as they come (`Table`), the targets and whether they hold (`judge`), and at the end, on the last line,
one JSON document with the commit, the versions and the hardware, which `--output` also writes to a file (`publish`).
A benchmark whose rows take minutes writes that file after each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from algorithms.common.provenance import describe_environment


class Table:
    """A table whose rows are printed as soon as they are measured.

    Args:
        columns: by title, the format of a column's cells: alignment, width and, for numbers, how they are written, such
            as "<28" or ">9.2f". What a cell lacks to its width, or a title, is filled with blanks.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = list(columns.values())
        self._places: list[str] = []
        for title, format_spec in columns.items():
            place = re.match(r"[<>^]\d+", format_spec)
            if place is None:
                raise ValueError(f"format {format_spec!r} of {title!r} must begin with <, > or ^ and a width")
            self._places.append(place[0])
        print("".join(f"{title:{place}}" for title, place in zip(columns, self._places, strict=True)), flush=True)

    def add(self, *cells: Any) -> None:
        """Prints a row; text stands in a column of numbers as it is, and None is an empty cell."""
        shown: list[str] = []
        for cell, format_spec, place in zip(cells, self._formats, self._places, strict=True):
            if cell is None or isinstance(cell, str):
                shown.append(f"{cell or '':{place}}")
            else:
                shown.append(f"{cell:{format_spec}}")
        print("".join(shown), flush=True)


def judge(
    values: Mapping[str, float],
    *,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns {metric: {"value", "target", "holds"}} for each metric with a target.

    Raises:
        KeyError: a metric with a target was not measured.
    """
    lower, upper = at_least or {}, at_most or {}
    return {
        name: {"value": values[name], "target": target, "holds": values[name] >= target}
        for name, target in lower.items()
    } | {
        name: {"value": values[name], "target": target, "holds": values[name] <= target}
        for name, target in upper.items()
    }


def publish(
    benchmark: str,
    results: Any,
    *,
    settings: Mapping[str, Any] | None = None,
    targets: Mapping[str, Mapping[str, Any]] | None = None,
    output: Path | None = None,
    is_last: bool = True,
) -> dict[str, Any]:
    """Writes the JSON document to `output`, prints the targets and, as the last line, the document; returns it.

    Args:
        benchmark: its name.
        results: what was measured; JSON values.
        settings: what it was measured with; JSON values.
        targets: from `judge`; None or empty where there are none, or they do not speak of these settings.
        output: file that gets the document too; its folder is made.
        is_last: nothing is measured after this; otherwise nothing is printed.
    """
    document = {
        "benchmark": benchmark,
        **describe_environment(),
        "settings": dict(settings or {}),
        "results": results,
        "targets": dict(targets or {}),
    }
    line = json.dumps(document)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n", encoding="utf-8")
    if is_last:
        for name, target in (targets or {}).items():
            verdict = "holds" if target["holds"] else "missed"
            print(f"target {name}: {target['value']:.6g}, aimed at {target['target']:g}: {verdict}")
        print(line, flush=True)
    return document
