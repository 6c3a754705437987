"""Targets of the benchmarks: what was measured, what was aimed at, and whether it holds."""

from collections.abc import Mapping
from typing import Any


def judge(
    values: Mapping[str, float],
    *,
    at_least: Mapping[str, float] | None = None,
    at_most: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {metric: {"value", "target", "holds"}} for each metric with a target.

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
