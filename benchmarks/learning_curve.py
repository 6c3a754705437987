r"""The learning curve of LIBERO-Spatial as one SVG: success over environment steps, and by task before and after.

    python -m benchmarks.learning_curve --manifest benchmarks/results/spatial_ppo/curve.json \
        --output docs/media/libero_spatial_ppo.svg

Reads committed files only, prints the numbers that it draws, and draws the same bytes from the same files. The manifest
is a JSON object; its paths are relative to its own folder:

    title        above the picture
    machine      what the main run's minutes are minutes of, such as "one H100"
    start        where every run starts: {"label", and an evaluation's counts as below}
    reference    a published success rate, drawn as a line: {"label", "success_rate", "source"}
    runs         the main run first, up to three to compare with it:
      label                     in the legend
      iterations_per_horizon    iterations in which an episode that fails runs to its end; 1 where each plays whole ones
      stages                    in order; each one's steps, minutes and episodes add to those of the stages before
        name         what evaluations call it
        metrics      the metrics.jsonl of its trainer
        label        under its part of the curve; may be left out
        tasks_drawn  "evenly" (default), or "unevenly" if some tasks were played more often than others
        iterations   it ends after so many, whatever else the file holds (default: with the file); give it where the
                     next stage went on from an earlier checkpoint than the last
      evaluations               [{"stage", "iteration", and counts; "label", a word or two, may be left out}]; the last
                                one of the main run that has files is also shown by task
    notes        lines of text under the picture

    counts       "files": [evaluations by eval_gr00t.py, of different seeds, which are added up], or "successes",
                 "episodes" and "seeds": [...] where there is no file

Points are evaluations with Wilson 95 % intervals. Lines are the episodes of training, which explore, in the middle of
the steps that they cover. Episodes are cut where an iteration ends, and the environments of a stage begin together: in
its first iteration only those end that succeed early, and the next ones are biased in turn. So a line is the mean over
`iterations_per_horizon` successive iterations and leaves out the beginning of a stage, in which no episode can have
failed. How the mean is taken, `mean_success` says.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.common.episodes import wilson_interval
from algorithms.common.report import TASK_METRIC, nice_ticks, percent, read_metrics, tag, text

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


# --- what was measured ---


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Episodes of a policy that no longer learns.

    Attributes:
        label: what else is to be said of it; may be empty.
        steps: environment steps that the policy had learned from.
        successes, episodes: over all tasks and seeds.
        num_seeds: evaluations that were added up.
        by_task: successes and episodes by the description of the task; empty where they are not known.
    """

    label: str
    steps: float
    successes: int
    episodes: int
    num_seeds: int
    by_task: dict[str, tuple[int, int]]

    @property
    def rate(self) -> float:
        """Share of the episodes that succeeded."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson_interval(self.successes, self.episodes)

    @property
    def fraction(self) -> str:
        """Such as `449/500` or `1,350/1,500, 3 seeds`."""
        seeds = f", {self.num_seeds} seeds" if self.num_seeds > 1 else ""
        return f"{self.successes:,}/{self.episodes:,}{seeds}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a run under one set of arguments.

    Attributes:
        label: what was peculiar to it; empty if nothing.
        start, end: environment steps of the run.
        curve: environment steps and the success of exploring episodes.
    """

    label: str
    start: float
    end: float
    curve: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Training from the common start.

    Attributes:
        label: its name in the legend.
        stages: in order.
        evaluations: in the manifest's order.
        clock: environment steps, minutes and episodes after each iteration; begins with zeros.
    """

    label: str
    stages: list[Stage]
    evaluations: list[Evaluation]
    clock: list[tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """All that the picture shows; see the module's docstring."""

    title: str
    machine: str
    start: Evaluation
    reference_label: str
    reference_rate: float
    runs: list[Run]
    notes: list[str]


def mean_success(iterations: Sequence[Mapping[str, float]], *, tasks_drawn: str) -> float:
    """Returns the success rate over lines of metrics.jsonl.

    "evenly": of all their episodes. "unevenly": the unweighted mean of the tasks' rates, so that a task does not count
    for more because it was played more. A task's rate is that of its episodes if each line counts them
    (`env/num_episodes_task_k`), otherwise the plain mean of the lines that have one.

    Raises:
        ValueError: no episode ended, or `tasks_drawn` is neither.
    """
    if tasks_drawn == "evenly":
        parts = [
            (line["env/success_once"], line["env/num_episodes"]) for line in iterations if "env/success_once" in line
        ]
        return _weighted_mean(parts)
    if tasks_drawn != "unevenly":
        raise ValueError(f'tasks_drawn={tasks_drawn!r} is neither "evenly" nor "unevenly"')
    rates: dict[str, list[tuple[float, float]]] = {}
    for line in iterations:
        for name in line:
            if (match := TASK_METRIC.match(name)) and match[1] == "env/success_once":
                rates.setdefault(match[2], []).append(
                    (line[name], line.get(f"env/num_episodes_task_{match[2]}", math.nan))
                )
    task_rates = [
        _weighted_mean(parts) if all(math.isfinite(count) for _, count in parts) else _mean([rate for rate, _ in parts])
        for parts in rates.values()
    ]
    return _mean(task_rates)


def _weighted_mean(parts: Sequence[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in parts)
    if not total:
        raise ValueError("no episode ended in these iterations")
    return sum(value * weight for value, weight in parts) / total


def _mean(values: Sequence[float]) -> float:
    return _weighted_mean([(value, 1.0) for value in values])


def exploring_curve(
    metrics: Sequence[Mapping[str, float]], *, iterations_per_horizon: int, tasks_drawn: str
) -> list[tuple[float, float]]:
    """Returns steps and success of a stage's exploring episodes; steps from the stage's beginning.

    Each point is `mean_success` over `iterations_per_horizon` successive iterations, in the middle of their steps. The
    first iterations, in which no episode that fails can have ended, take part in none.
    """
    ends = [0.0, *(line["global_step"] for line in metrics)]
    points: list[tuple[float, float]] = []
    for first in range(iterations_per_horizon - 1, len(metrics) - iterations_per_horizon + 1):
        last = first + iterations_per_horizon
        rate = mean_success(metrics[first:last], tasks_drawn=tasks_drawn)
        points.append(((ends[first] + ends[last]) / 2, rate))
    return points


# --- the manifest ---


def read_curve(manifest: Path) -> Curve:
    """Returns what a manifest and its files say.

    Raises:
        FileNotFoundError: the manifest, or a file that it names, is not there.
        ValueError: a name is missing, unknown or given twice, or an iteration lies outside its stage.
    """
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest} is not there: give the manifest with --manifest")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    _check_names(content, "the manifest", {"title", "machine", "start", "reference", "runs", "notes"})
    start, reference = content["start"], content["reference"]
    _check_names(start, "start", {"label"}, COUNTS)
    _check_names(reference, "reference", {"label", "success_rate", "source"})
    if not 1 <= len(content["runs"]) <= len(COLORS):
        raise ValueError(f"{len(content['runs'])} runs are given (1 to {len(COLORS)} have a colour)")
    return Curve(
        title=content["title"], machine=content["machine"], notes=content["notes"],
        start=_read_evaluation(manifest.parent, start, steps=0.0, where="start"),
        reference_label=reference["label"], reference_rate=reference["success_rate"],
        runs=[_read_run(manifest.parent, run) for run in content["runs"]],
    )  # fmt: skip


COUNTS = frozenset({"files", "successes", "episodes", "seeds"})


def _read_run(folder: Path, content: Mapping[str, Any]) -> Run:
    _check_names(content, "a run", {"label", "iterations_per_horizon", "stages", "evaluations"})
    label = content["label"]
    stages: list[Stage] = []
    clock = [(0.0, 0.0, 0.0)]
    ends: dict[str, list[float]] = {}  # by stage, the run's steps before its first iteration and after each
    for entry in content["stages"]:
        _check_names(entry, f"a stage of {label}", {"name", "metrics"}, {"label", "tasks_drawn", "iterations"})
        name, metrics = entry["name"], read_metrics(_existing(folder, entry["metrics"], f"stage {entry['name']}"))
        length = entry.get("iterations", len(metrics))
        if name in ends or not 1 <= length <= len(metrics):
            raise ValueError(
                f"stage {name} of {label} has {length} iterations (its file has {len(metrics)}; a name is used once)"
            )
        if metrics[0]["iteration"] != 1:
            raise ValueError(f"stage {name} of {label} begins with iteration {metrics[0]['iteration']}, which is not 1")
        metrics = metrics[:length]
        start = clock[-1][0]
        for line in metrics:
            _, minutes, episodes = clock[-1]
            steps = start + line["global_step"]
            clock.append((steps, minutes + line["time/total_s"] / 60, episodes + line.get("env/num_episodes", 0)))
        ends[name] = [steps for steps, _, _ in clock[-length - 1 :]]
        curve = exploring_curve(
            metrics, iterations_per_horizon=content["iterations_per_horizon"],
            tasks_drawn=entry.get("tasks_drawn", "evenly"),
        )  # fmt: skip
        shifted = [(start + steps, rate) for steps, rate in curve]
        stages.append(Stage(label=entry.get("label", ""), start=start, end=clock[-1][0], curve=shifted))
    evaluations: list[Evaluation] = []
    for entry in content["evaluations"]:
        _check_names(entry, f"an evaluation of {label}", {"stage", "iteration"}, {"label", *COUNTS})
        stage, iteration = entry["stage"], entry["iteration"]
        if stage not in ends or not 1 <= iteration < len(ends[stage]):
            known = ", ".join(f"{name}: 1-{len(steps) - 1}" for name, steps in ends.items())
            raise ValueError(f"{label} has no iteration {iteration} of stage {stage} to evaluate ({known})")
        where = f"the evaluation of {label}, stage {stage}, iteration {iteration}"
        evaluations.append(_read_evaluation(folder, entry, steps=ends[stage][iteration], where=where))
    return Run(label=label, stages=stages, evaluations=evaluations, clock=clock)


def _read_evaluation(folder: Path, content: Mapping[str, Any], *, steps: float, where: str) -> Evaluation:
    label, given = content.get("label", ""), sorted(COUNTS & content.keys())
    if given == ["episodes", "seeds", "successes"]:
        return Evaluation(
            label=label, steps=steps, successes=content["successes"], episodes=content["episodes"],
            num_seeds=len(content["seeds"]), by_task={},
        )  # fmt: skip
    if given != ["files"]:
        raise ValueError(f"{where} gives {given}: give files, or successes, episodes and seeds")
    by_task: dict[str, tuple[int, int]] = {}
    seeds: list[int] = []
    for name in content["files"]:
        result = json.loads(_existing(folder, name, where).read_text(encoding="utf-8"))
        seeds += result["protocol"]["seeds"]
        for row in result["table"]:
            if row["task"] != "all":
                successes, episodes = by_task.get(row["description"], (0, 0))
                by_task[row["description"]] = (successes + row["successes"], episodes + row["episodes"])
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{where} counts a seed twice: its files are of seeds {seeds}")
    return Evaluation(
        label=label, steps=steps, successes=sum(s for s, _ in by_task.values()),
        episodes=sum(n for _, n in by_task.values()), num_seeds=len(seeds), by_task=by_task,
    )  # fmt: skip


def _existing(folder: Path, name: str, where: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there, which the manifest names for {where}")
    return path


def _check_names(content: Mapping[str, Any], where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    required, allowed = set(required), {*required, *optional}
    if missing := required - content.keys():
        raise ValueError(f"{where} lacks {sorted(missing)}")
    if unknown := content.keys() - allowed:
        raise ValueError(f"{where} has {sorted(unknown)}, which mean nothing (allowed: {sorted(allowed)})")


# --- the picture ---

# A background of its own makes one set of colours readable on light and on dark pages alike.
PAPER, INK, SOFT, LINE = "#ffffff", "#1f2328", "#59636e", "#dde2e8"
COLORS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37")
BEFORE_COLOR = "#8c959f"
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
WIDTH, MARGIN = 880, 24
LEFT, RIGHT, TOP, BOTTOM = 76, 852, 112, 452  # of the curve's axes
LABEL_HEIGHT, LABEL_TOP = 32, 84  # of the text at a point, and how high it may reach
LEGEND = (
    "Points and bars: evaluations, successes/episodes, with Wilson 95 % intervals.",
    "Lines: episodes of training, which explore; each value is the mean over an episode's horizon.",
)
BARS_LEFT, BARS_RIGHT, ROW_HEIGHT, BAR_HEIGHT = 300, 740, 25, 8


def write(content: Any, x: float, y: float, *, size: float = 12.5, fill: str = INK, **attributes: Any) -> str:
    """Returns a line of text that begins (or ends, or is centred: `text_anchor`) at x, on the baseline y."""
    return tag("text", text(content), x=round(x, 1), y=round(y, 1), font_size=size, fill=fill, **attributes)


def rule(x1: float, y1: float, x2: float, y2: float, *, stroke: str = LINE, **attributes: Any) -> str:
    """Returns a straight line."""
    place = dict(x1=round(x1, 1), y1=round(y1, 1), x2=round(x2, 1), y2=round(y2, 1))
    return tag("line", **place, stroke=stroke, **attributes)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Where a number of steps and a success rate stand in the picture.

    Attributes:
        steps: at the right end; the left one is 0.
        low: rate at the bottom; the top one is 1.
    """

    steps: float
    low: float

    def x(self, steps: float) -> float:
        """Pixels from the left."""
        return LEFT + steps / self.steps * (RIGHT - LEFT)

    def y(self, rate: float) -> float:
        """Pixels from the top."""
        return TOP + (1 - rate) / (1 - self.low) * (BOTTOM - TOP)


def axes_of(curve: Curve) -> Axes:
    """Returns axes that hold all of it, from a multiple of 10 % with room for the labels of stages."""
    rates = [curve.start.rate, *(rate for run in curve.runs for stage in run.stages for _, rate in stage.curve)]
    rates += [evaluation.rate for run in curve.runs for evaluation in run.evaluations]
    steps = max(stage.end for run in curve.runs for stage in run.stages)
    return Axes(steps=1.02 * steps, low=max(0, math.floor(10 * min(rates) - 0.5) / 10))


def render(curve: Curve) -> str:
    """Returns the picture."""
    axes = axes_of(curve)
    parts = [
        write(curve.title, MARGIN, 38, size=19, font_weight=600),
        *(write(line, MARGIN, 62 + 18 * row, fill=SOFT) for row, line in enumerate(LEGEND)),
        *grid(axes, curve), *references(axes, curve), *stage_marks(axes, curve.runs[0]),
    ]  # fmt: skip
    for run, color in reversed(list(zip(curve.runs, COLORS, strict=False))):
        parts += [polyline(axes, stage.curve, color) for stage in run.stages]
    parts += [*points(axes, curve), *legend(axes, curve)]
    bars, bottom = by_task(curve, BOTTOM + 118)
    parts += bars
    for note in curve.notes:
        parts.append(write(note, MARGIN, bottom + 20, size=12, fill=SOFT))
        bottom += 17
    height = bottom + 24
    paper = tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=height - 1, rx=10, fill=PAPER, stroke=LINE)
    title = tag("title", text(curve.title))
    frame = dict(xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=WIDTH, height=height)
    return tag("svg", title, paper, *parts, **frame, role="img", font_family=FONT) + "\n"


def grid(axes: Axes, curve: Curve) -> list[str]:
    """Returns the axes with their labels; minutes and episodes are those of the main run."""
    parts: list[str] = []
    for rate in nice_ticks(axes.low, 1.0, 6):
        parts.append(rule(LEFT, axes.y(rate), RIGHT, axes.y(rate)))
        parts.append(write(f"{100 * rate:.0f} %", LEFT - 9, axes.y(rate) + 4.5, fill=SOFT, text_anchor="end"))
    middle = (TOP + BOTTOM) / 2
    turned = f"rotate(-90 {MARGIN} {middle})"
    name = "success rate, mean of all tasks"
    parts.append(write(name, MARGIN, middle, fill=SOFT, text_anchor="middle", transform=turned))
    steps, minutes, episodes = zip(*curve.runs[0].clock, strict=True)
    for tick in nice_ticks(0.0, axes.steps, 7):
        x = axes.x(tick)
        parts.append(rule(x, BOTTOM, x, BOTTOM + 5, stroke=SOFT))
        parts.append(write(f"{tick / 1e6:g} M steps" if tick else "0", x, BOTTOM + 21, text_anchor="middle"))
        if 0 < tick <= steps[-1]:
            below = f"{np.interp(tick, steps, minutes):.1f} min", f"{np.interp(tick, steps, episodes):,.0f} episodes"
            for row, content in enumerate(below):
                parts.append(write(content, x, BOTTOM + 38 + 16 * row, fill=SOFT, size=12, text_anchor="middle"))
    parts.append(rule(LEFT, BOTTOM, RIGHT, BOTTOM, stroke=SOFT))
    explanation = f"environment steps; minutes of training on {curve.machine} and episodes played, both of the main run"
    parts.append(write(explanation, (LEFT + RIGHT) / 2, BOTTOM + 76, fill=SOFT, text_anchor="middle"))
    return parts


def references(axes: Axes, curve: Curve) -> list[str]:
    """Returns the lines of the common start and of the published result."""
    start, published = axes.y(curve.start.rate), axes.y(curve.reference_rate)
    dashes = dict(stroke_width=1.5, stroke_dasharray="6 4")
    start_text = f"{curve.start.label}: {percent(curve.start.rate)} ({curve.start.fraction})"
    published_text = f"{curve.reference_label}: {percent(curve.reference_rate)}"
    return [
        rule(LEFT, start, RIGHT, start, stroke=BEFORE_COLOR, **dashes),
        write(start_text, RIGHT, start + 16, fill=SOFT, text_anchor="end"),
        rule(LEFT, published, RIGHT, published, stroke=INK, **dashes),
        write(published_text, LEFT + 8, published - 7),
    ]


def stage_marks(axes: Axes, run: Run) -> list[str]:
    """Returns a line between stages and their labels at the bottom."""
    parts: list[str] = []
    for number, stage in enumerate(run.stages):
        x = axes.x(stage.start)
        if number:
            parts.append(rule(x, TOP, x, BOTTOM, stroke=BEFORE_COLOR, stroke_dasharray="1 4"))
        parts.append(write(stage.label, x + 8, BOTTOM - 10, size=12, fill=COLORS[0]))
    return parts


def polyline(axes: Axes, curve: Sequence[tuple[float, float]], color: str) -> str:
    """Returns a curve."""
    path = " ".join(f"{axes.x(steps):.1f},{axes.y(rate):.1f}" for steps, rate in curve)
    style = dict(stroke=color, stroke_width=2, stroke_linejoin="round", stroke_linecap="round", stroke_opacity=0.75)
    return tag("polyline", points=path, fill="none", **style)


def points(axes: Axes, curve: Curve) -> list[str]:
    """Returns the evaluations, those of the main run with their numbers; points on top of each other move aside."""
    parts = point(axes.x(0), axes, curve.start, INK)
    placed: list[tuple[float, Evaluation]] = []
    for run, color in zip(curve.runs, COLORS, strict=False):
        for evaluation in run.evaluations:
            x = axes.x(evaluation.steps)
            while any(abs(x - other) < 10 for other, _ in placed):
                x += 11
            placed.append((x, evaluation))
            parts += point(x, axes, evaluation, color)
    published = axes.y(curve.reference_rate)
    boxes = [(LEFT, published - 1, RIGHT, published + 1), (LEFT, published - 18, LEFT + 330, published)]
    boxes += [(x - 5, axes.y(e.interval[1]), x + 5, axes.y(e.interval[0])) for x, e in placed]
    curves = [place for stage in curve.runs[0].stages for place in stage.curve]
    boxes += [(axes.x(a) - 4, axes.y(b) - 4, axes.x(a) + 4, axes.y(b) + 4) for a, b in curves]
    for x, evaluation in reversed(placed[: len(curve.runs[0].evaluations)]):  # the last one's is placed best
        boxes.append(label_box(axes, x, evaluation, boxes))
        left, _, right, bottom = boxes[-1]
        x, rate = (left + right) / 2, percent(evaluation.rate)
        parts.append(write(rate, x, bottom - 17, size=15, fill=COLORS[0], font_weight=700, text_anchor="middle"))
        parts.append(write(caption(evaluation), x, bottom - 3, size=11.5, fill=SOFT, text_anchor="middle"))
    return parts


def caption(evaluation: Evaluation) -> str:
    """Returns what stands under a point's rate."""
    return f"{evaluation.fraction}, {evaluation.label}" if evaluation.label else evaluation.fraction


def label_box(axes: Axes, x: float, evaluation: Evaluation, others: Sequence[Box]) -> Box:
    """Returns where a point's label stands: above its interval, or below it, clear of the other boxes."""
    low, high = (axes.y(rate) for rate in evaluation.interval)
    width = max(76.0, 7.0 * len(caption(evaluation)))  # generously
    left = min(x - width / 2, WIDTH - 8 - width)

    def box_at(top: float) -> Box:
        return left, top, left + width, top + LABEL_HEIGHT

    above, below = box_at(high - 4 - LABEL_HEIGHT), box_at(low + 4)
    while hit := next((other for other in others if overlap(above, other)), None):
        above = box_at(hit[1] - 1 - LABEL_HEIGHT)
    while hit := next((other for other in others if overlap(below, other)), None):
        below = box_at(hit[3] + 1)
    return above if above[1] >= LABEL_TOP else below


def overlap(a: Box, b: Box) -> bool:
    """Returns whether two boxes have an area in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def point(x: float, axes: Axes, evaluation: Evaluation, color: str) -> list[str]:
    """Returns an evaluation with its interval."""
    low, high = (axes.y(rate) for rate in evaluation.interval)
    whisker = [rule(x - 4, y, x + 4, y, stroke=color, stroke_width=1.5) for y in (low, high)]
    place = dict(cx=round(x, 1), cy=round(axes.y(evaluation.rate), 1), r=5)
    circle = tag("circle", **place, fill=color, stroke=PAPER, stroke_width=1.5)
    return [rule(x, low, x, high, stroke=color, stroke_width=1.5), *whisker, circle]


def legend(axes: Axes, curve: Curve) -> list[str]:
    """Returns the runs' colours and names above the line of the start, with the last evaluation of compared ones."""
    rows = list(zip(curve.runs, COLORS, strict=False))
    y = axes.y(curve.start.rate) - 12 - 21 * (len(rows) - 1)
    parts: list[str] = []
    for run, color in rows:
        x = RIGHT - 420
        parts.append(rule(x, y - 4, x + 34, y - 4, stroke=color, stroke_width=2))
        parts.append(tag("circle", cx=x + 17, cy=round(y - 4, 1), r=5, fill=color, stroke=PAPER, stroke_width=1.5))
        name = run.label
        if run is not curve.runs[0] and run.evaluations:
            last = run.evaluations[-1]
            name += f": {percent(last.rate)} ({caption(last)}) after {last.steps / 1e6:.2f} M steps"
        parts.append(write(name, x + 44, y, fill=color))
        y += 21
    return parts


def by_task(curve: Curve, top: float) -> tuple[list[str], float]:
    """Returns the bars of each task at the start and at the main run's last evaluation with files, and their bottom."""
    last = next((e for e in reversed(curve.runs[0].evaluations) if e.by_task), None)
    if last is None or last.by_task.keys() != curve.start.by_task.keys():
        raise ValueError("start and the main run's last evaluation with files must be of the same tasks")
    prefix, names, suffix = split_descriptions(list(last.by_task))
    steps = f"{last.steps / 1e6:.2f} M steps"
    parts = [
        write("By task", MARGIN, top, size=15, font_weight=600),
        tag("rect", x=BARS_LEFT, y=top - 10, width=14, height=10, fill=BEFORE_COLOR),
        write(f"{curve.start.label}, {percent(curve.start.rate)}", BARS_LEFT + 20, top),
        tag("rect", x=BARS_LEFT + 190, y=top - 10, width=14, height=10, fill=COLORS[0]),
        write(f"{curve.runs[0].label}, {steps}, {percent(last.rate)}", BARS_LEFT + 210, top),
        write(f"{prefix} … {suffix}".strip(), MARGIN, top + 20, size=12, fill=SOFT, font_style="italic"),
        write("successes/episodes", WIDTH - MARGIN, top + 20, size=12, fill=SOFT, text_anchor="end"),
    ]
    top += 34
    bottom = top + ROW_HEIGHT * len(names)

    def to_x(rate: float) -> float:
        return BARS_LEFT + rate * (BARS_RIGHT - BARS_LEFT)

    for rate in nice_ticks(0.0, 1.0, 5):
        parts.append(rule(to_x(rate), top, to_x(rate), bottom))
        parts.append(write(f"{100 * rate:.0f} %", to_x(rate), bottom + 17, fill=SOFT, text_anchor="middle"))
    for row, (name, description) in enumerate(zip(names, last.by_task, strict=True)):
        y = top + ROW_HEIGHT * row
        pair = curve.start.by_task[description], last.by_task[description]
        parts.append(write(name, BARS_LEFT - 10, y + 17, text_anchor="end"))
        for number, ((successes, episodes), color) in enumerate(zip(pair, (BEFORE_COLOR, COLORS[0]), strict=True)):
            bar = y + 4 + number * (BAR_HEIGHT + 1)
            low, high = wilson_interval(successes, episodes)
            size = dict(width=round(to_x(successes / episodes) - BARS_LEFT, 1), height=BAR_HEIGHT, fill=color)
            parts.append(tag("rect", x=BARS_LEFT, y=bar, **size))
            parts.append(rule(to_x(low), bar + BAR_HEIGHT / 2, to_x(high), bar + BAR_HEIGHT / 2, stroke=INK))
        counts = " → ".join(f"{successes}/{episodes}" for successes, episodes in pair)
        parts.append(write(counts, WIDTH - MARGIN, y + 17, text_anchor="end"))
    return parts, bottom + 24


def split_descriptions(descriptions: Sequence[str]) -> tuple[str, list[str], str]:
    """Returns the words that all begin with, what is peculiar to each, and the words that all end with."""
    words = [re.split(r"\s+", description.strip()) for description in descriptions]
    shortest = min(map(len, words)) - 1
    begin = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest)
    room = shortest - begin
    end = next((i for i in range(room) if len({w[-1 - i] for w in words}) > 1), room)
    names = [" ".join(w[begin : len(w) - end]) for w in words]
    return " ".join(words[0][:begin]), names, " ".join(words[0][len(words[0]) - end :])


def main() -> None:
    """Draws, and prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="JSON file, see above")
    parser.add_argument("--output", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    curve = read_curve(args.manifest)
    for run in curve.runs:
        steps, minutes, episodes = zip(*run.clock, strict=True)
        print(f"{run.label}: {steps[-1]:,.0f} env-steps, {minutes[-1]:.1f} min, {episodes[-1]:,.0f} episodes")
        for e in (curve.start, *run.evaluations):
            low, high = e.interval
            at = f"{np.interp(e.steps, steps, minutes):5.1f} min {np.interp(e.steps, steps, episodes):8,.0f} episodes"
            print(f"  {e.steps:11,.0f} env-steps {at}  {e.rate:.1%} ({e.fraction}, {low:.1%} - {high:.1%})")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(render(curve), encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
