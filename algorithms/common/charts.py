"""Small charts for a page, as SVG by matplotlib that takes its colours and its font from the page.

They are drawn in stand-in colours, which become the CSS variables --accent, --good, --soft, --line and --card: so one
picture suits light and dark. What a test or a style sheet may look for has a class: curve, raw, point, interval, cells.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

MAX_POINTS = 400
MAX_COLUMNS = 60
MAX_DOTS = 25

ACCENT, GOOD, SOFT, LINE, CARD = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {ACCENT: "--accent", GOOD: "--good", SOFT: "--soft", LINE: "--line", CARD: "--card"}
# From nothing to a heatmap's full value, which of success is all solved.
_SHADES = LinearSegmentedColormap.from_list("solved", [to_rgba(GOOD, 0.06), to_rgba(GOOD, 1.0)])
# Of `curves`: colour and dashes; names for a legend beside them.
LINE_STYLES = ((ACCENT, "-"), (GOOD, "-"), (SOFT, "-"), (ACCENT, ":"), (GOOD, ":"), (SOFT, ":"))
LINE_NAMES = ("blue", "green", "grey", "blue, dotted", "green, dotted", "grey, dotted")
_CLASSES = {"curve", "raw", "point", "interval", "cells"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "chart",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def compact(value: float) -> str:
    """Returns a number in few characters: 12.3k, 0.042, 3e-05."""
    size = abs(value)
    if value == 0:
        return "0"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= factor:
            scaled = value / (1e3 if unit == "k" else factor)
            return f"{scaled:.3g}{unit}" if abs(scaled) < 1000 else f"{scaled:.0f}{unit}"
    return f"{value:.4g}" if size >= 1 else f"{value:.3g}"


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns at most `MAX_POINTS` points: means of equally many neighbours each."""
    size = math.ceil(len(x) / MAX_POINTS)
    starts = np.arange(0, len(x), size)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(np.asarray(x, float), starts) / counts, np.add.reduceat(
        np.asarray(y, float), starts
    ) / counts


def smoothed(y: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Returns a centred moving mean over a twentieth of the points, over fewer at the ends; None below forty points."""
    reach = len(y) // 40
    if not reach:
        return None
    window = np.ones(2 * reach + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")


def plot_curve(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    *,
    is_rate: bool = False,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Draws a curve, as points too if they are few; a long one thinned and smoothed, without its noise it is faint.

    Args:
        axes: where.
        x: environment steps, or iterations; ascending.
        y: finite values.
        is_rate: the axis goes from 0 to 100 %.
        intervals: (low, high) of each point.
    """
    if is_rate:
        axes.set_ylim(0.0, 1.0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    elif min(y) == max(y):
        margin = abs(y[0]) * 0.1 or 1.0
        axes.set_ylim(y[0] - margin, y[0] + margin)
    if intervals is not None:
        low, high = np.transpose(intervals)
        axes.vlines(x, low, high, color=ACCENT, linewidth=5, alpha=0.4, clip_on=False, gid="interval")
    points = thin(x, y)
    smooth = smoothed(points[1]) if intervals is None else None
    if smooth is not None:
        axes.plot(*points, color=ACCENT, linewidth=1, alpha=0.3, gid="raw")
        axes.plot(points[0], smooth, color=ACCENT, linewidth=2, clip_on=False, gid="curve")
    elif len(y) > 1:
        axes.plot(*points, color=ACCENT, linewidth=2, clip_on=False, gid="curve")
    if len(y) <= MAX_DOTS:
        axes.plot(*points, "o", color=ACCENT, markersize=6, markeredgewidth=0, clip_on=False, gid="point")


def curve(
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    *,
    axis_labels: tuple[str, str] = ("", ""),
    is_rate: bool = False,
    intervals: Sequence[tuple[float, float]] | None = None,
) -> Markup:
    """Returns a curve over steps; see `plot_curve`.

    Args:
        x: see there.
        y: see there.
        label: what is shown, for who cannot see it; unique on its page.
        axis_labels: what the horizontal and the vertical axis count.
        is_rate: see there.
        intervals: see there.
    """
    with rc_context(_STYLE):
        figure, axes = _labelled_axes(axis_labels, is_whole=all(float(value).is_integer() for value in y))
        plot_curve(axes, x, y, is_rate=is_rate, intervals=intervals)
        return _inline(figure, label)


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    *,
    axis_labels: tuple[str, str] = ("", ""),
    is_rate: bool = False,
) -> Markup:
    """Returns several curves in one picture, told apart by how they are drawn; see `curve`.

    Args:
        lines: steps and values by name, at most as many as there are `LINE_STYLES`.
        label: see `curve`.
        axis_labels: see there.
        is_rate: see `plot_curve`.
    """
    with rc_context(_STYLE):
        is_whole = all(float(value).is_integer() for _, y in lines.values() for value in y)
        figure, axes = _labelled_axes(axis_labels, is_whole=is_whole)
        if is_rate:
            axes.set_ylim(0.0, 1.0)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        for (x, y), (color, style) in zip(lines.values(), LINE_STYLES, strict=False):
            if x:  # what a run has not logged leaves its style unused
                axes.plot(*thin(x, y), color=color, linestyle=style, linewidth=2, clip_on=False, gid="curve")
        return _inline(figure, label)


def _labelled_axes(axis_labels: tuple[str, str], *, is_whole: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 2.9))
    axes = figure.add_axes((0.17, 0.21, 0.8, 0.74))
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=is_whole))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    return figure, axes


def heat_cells(
    rows: Mapping[int, Sequence[float | None]], x: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns values [R, C] and the edges [C + 1] of their columns; more than `MAX_COLUMNS` are joined by their means.

    Args:
        rows: values by task; None, NaN in what is returned, where there is none.
        x: steps at the end of each column.
    """
    size = math.ceil(len(x) / MAX_COLUMNS)
    starts = range(0, len(x), size)
    values = np.array([list(row) for row in rows.values()], dtype=np.float64)  # [R, len(x)], None is NaN
    joined = np.full((len(rows), len(starts)), np.nan)
    for column, start in enumerate(starts):
        part = values[:, start : start + size]
        counts = np.isfinite(part).sum(axis=1)
        known = counts > 0
        joined[known, column] = np.nansum(part, axis=1)[known] / counts[known]
    edges = [0.0, *(x[min(start + size, len(x)) - 1] for start in starts)]
    return joined, np.array(edges)


def heatmap(
    rows: Mapping[int, Sequence[float | None]],
    x: Sequence[float],
    label: str,
    axis_labels: tuple[str, str] = ("", ""),
    *,
    full: float = 1.0,
) -> Markup:
    """Returns values by task (rows, by id) over steps (columns); see `heat_cells` and `curve`.

    `full` is the value that has the full colour; 0 has nearly none.
    """
    values, edges = heat_cells(rows, x)
    with rc_context(_STYLE):
        height = 18 * len(rows) + 42  # points, of 720
        figure = Figure(figsize=(10.0, height / 72))
        axes = figure.add_axes((0.07, 38 / height, 0.91, 1 - 38 / height))
        axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
        axes.spines[:].set_visible(False)
        mesh = axes.pcolormesh(
            edges, np.arange(len(rows) + 1), np.ma.masked_invalid(values), cmap=_SHADES, vmin=0.0, vmax=full
        )
        mesh.set(edgecolor=CARD, linewidth=1.0, gid="cells")
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(rows)) + 0.5, [str(task) for task in rows])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        return _inline(figure, label)


def _inline(figure: Figure, label: str) -> Markup:
    """Returns a figure as an element of a page: no names of others than its own, its colours and font the page's."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    content = file.getvalue()
    for color, variable in _VARIABLES.items():
        content = content.replace(color, f"var({variable})")
    root = ElementTree.fromstring(content)
    for style in root.findall("{*}defs[{*}style]"):
        root.remove(style)  # it would be the whole page's
    used = set(re.findall(r"#(\w+)", content))
    prefix = re.sub(r"\W+", "-", label)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            name = key.rpartition("}")[2]
            if name == "id" and value in _CLASSES:
                element.set("class", value)
            elif name != "id" or value in used:
                renamed = f"{prefix}-{value}" if name == "id" else re.sub(r"#(?=\w+\)?$)", f"#{prefix}-", value)
                element.set(name, renamed)
    view_box = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view_box, "role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))
