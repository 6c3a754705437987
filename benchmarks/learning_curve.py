r"""The learning curve of a suite as one SVG: success over environment steps, and by task before and after.

    python -m benchmarks.learning_curve --manifest benchmarks/results/spatial_ppo/curve.json \
        --output docs/media/libero_spatial_ppo.svg
    python -m benchmarks.learning_curve --manifest benchmarks/results/goal_ppo/curve.json \
        --output docs/media/libero_goal_ppo.svg
    python -m benchmarks.learning_curve --manifest benchmarks/results/object_ppo/curve.json \
        --output docs/media/libero_object_ppo.svg

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
        episodes     whose success a line of its metrics tells: those that "ended" in the iteration (default), or those
                     of the newest iteration whose episodes have all ended by then ("cohorts", as trainers do now)
        tasks_drawn  "evenly" (default), or "unevenly" if some tasks were played more often than others; not of cohorts,
                     whose success is a mean over tasks anyway
        iterations   it ends after so many, whatever else the file holds (default: with the file); give it where the
                     next stage went on from an earlier checkpoint than the last
      evaluations               [{"stage", "iteration", and counts; "label", a word or two, may be left out}]; the last
                                one of the main run that has files is also shown by task
    legend_at    [part of the width, success rate] of the legend's lower left corner; 0.45 and the start's if not given
    notes        lines of text under the picture

    counts       "files": [evaluations by eval_gr00t.py, of different seeds, which are added up], or "successes",
                 "episodes" and "seeds": [...] where there is no file

Points are evaluations with Wilson 95 % intervals. Lines are the episodes of training, which explore, in the middle of
the steps that they cover; cohorts where they began. Where a line tells those that ended, episodes are cut where an
iteration ends, and the environments of a stage begin together: in its first iteration only those end that succeed
early, and the next ones are biased in turn. So a line is the mean over `iterations_per_horizon` successive iterations
and leaves out the beginning of a stage, in which no episode can have failed. How the mean is taken, `mean_success`
says.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, PercentFormatter
from matplotlib.transforms import Bbox

from algorithms.common.episodes import wilson_interval
from algorithms.common.report import TASK_METRIC, percent, read_metrics
from benchmarks.command_line import launch_benchmark

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
        has_cohorts: the success is that of the episodes that began at these steps.
    """

    label: str
    start: float
    end: float
    curve: list[tuple[float, float]]
    has_cohorts: bool


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
    legend_at: tuple[float, float]
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


def cohort_curve(metrics: Sequence[Mapping[str, float]], *, iterations_per_horizon: int) -> list[tuple[float, float]]:
    """Returns steps and success of a stage's cohorts, in the middle of the steps of the iteration where they began.

    An iteration tells the success of the episodes that began `iterations_per_horizon` iterations before it, if all
    have ended then and there are any.
    """
    ends = [0.0, *(line["global_step"] for line in metrics)]
    return [
        ((ends[began] + ends[began + 1]) / 2, line["env/success_once"])
        for began, line in enumerate(metrics[iterations_per_horizon:])
        if "env/success_once" in line
    ]


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
    required = {"title", "machine", "start", "reference", "runs", "notes"}
    _check_names(content, "the manifest", required, {"legend_at"})
    start, reference = content["start"], content["reference"]
    _check_names(start, "start", {"label"}, COUNTS)
    _check_names(reference, "reference", {"label", "success_rate", "source"})
    if not 1 <= len(content["runs"]) <= len(COLORS):
        raise ValueError(f"{len(content['runs'])} runs are given (1 to {len(COLORS)} have a colour)")
    began = _read_evaluation(manifest.parent, start, steps=0.0, where="start")
    across, rate = content.get("legend_at", (0.45, began.rate))
    return Curve(
        title=content["title"],
        machine=content["machine"],
        notes=content["notes"],
        start=began,
        legend_at=(across, rate),
        reference_label=reference["label"],
        reference_rate=reference["success_rate"],
        runs=[_read_run(manifest.parent, run) for run in content["runs"]],
    )


COUNTS = frozenset({"files", "successes", "episodes", "seeds"})


def _read_run(folder: Path, content: Mapping[str, Any]) -> Run:
    _check_names(content, "a run", {"label", "iterations_per_horizon", "stages", "evaluations"})
    label = content["label"]
    stages: list[Stage] = []
    clock = [(0.0, 0.0, 0.0)]
    ends: dict[str, list[float]] = {}  # by stage, the run's steps before its first iteration and after each
    for entry in content["stages"]:
        optional = {"label", "episodes", "tasks_drawn", "iterations"}
        _check_names(entry, f"a stage of {label}", {"name", "metrics"}, optional)
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
        horizon = content["iterations_per_horizon"]
        shown = entry.get("episodes", "ended")
        match shown:
            case "ended":
                drawn = entry.get("tasks_drawn", "evenly")
                curve = exploring_curve(metrics, iterations_per_horizon=horizon, tasks_drawn=drawn)
            case "cohorts" if "tasks_drawn" not in entry:
                curve = cohort_curve(metrics, iterations_per_horizon=horizon)
            case other:
                raise ValueError(
                    f'stage {name} of {label} has episodes={other!r}: give "ended", or "cohorts" without tasks_drawn'
                )
        shifted = [(start + steps, rate) for steps, rate in curve]
        stages.append(
            Stage(
                label=entry.get("label", ""),
                start=start,
                end=clock[-1][0],
                curve=shifted,
                has_cohorts=shown == "cohorts",
            )
        )
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
            label=label,
            steps=steps,
            successes=content["successes"],
            episodes=content["episodes"],
            num_seeds=len(content["seeds"]),
            by_task={},
        )
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
        label=label,
        steps=steps,
        successes=sum(s for s, _ in by_task.values()),
        episodes=sum(n for _, n in by_task.values()),
        num_seeds=len(seeds),
        by_task=by_task,
    )


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
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # The same files give the same bytes.
    "svg.hashsalt": "learning_curve",
    "font.size": 12.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "xtick.color": SOFT,
    "xtick.major.size": 5,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
    "ytick.major.pad": 9,
}
# Pixels: of the picture, of the curve's axes from its left and upper edge, and how high a point's label may reach.
WIDTH, MARGIN = 880, 24
LEFT, RIGHT, TOP, BOTTOM, LABEL_TOP = 76, 852, 112, 452, 78
BARS_LEFT, BARS_RIGHT, BARS_TOP, ROW_HEIGHT, NOTE_HEIGHT = 300, 740, 604, 25, 17
LEGEND = (
    "Points and bars: evaluations, successes/episodes, with Wilson 95 % intervals.",
    "Lines: episodes of training, which explore; each value is {of_what}.",
)
OF_ENDED, OF_COHORTS = "the mean over an episode's horizon", "that of the episodes that began there"


def render(curve: Curve) -> str:
    """Returns the picture as SVG."""
    file = io.StringIO()
    metadata: dict[str, Any] = dict(Title=curve.title, Date=None, Creator=None)
    with rc_context(STYLE):
        draw(curve).savefig(file, format="svg", metadata=metadata)
    return file.getvalue()


@rc_context(STYLE)
def draw(curve: Curve) -> Figure:
    """Returns the picture; what shows data has an id: `start`, `run-0-stage-1`, `run-0-evaluations`, `task-2-after`."""
    num_tasks = len(curve.start.by_task)
    height = BARS_TOP + num_tasks * ROW_HEIGHT + 58 + len(curve.notes) * NOTE_HEIGHT + 20
    # A point is a pixel.
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor=PAPER, edgecolor=LINE, linewidth=2)

    def place(left: float, right: float, top: float, bottom: float) -> Axes:
        return figure.add_axes((left / WIDTH, 1 - bottom / height, (right - left) / WIDTH, (bottom - top) / height))

    def write(text: str, x: float, y: float, **style: Any) -> None:
        figure.text(x / WIDTH, 1 - y / height, text, **style)

    write(curve.title, MARGIN, 38, size=19, weight="bold")
    has_cohorts = all(stage.has_cohorts for run in curve.runs for stage in run.stages)
    for row, line in enumerate(LEGEND):
        text = line.format(of_what=OF_COHORTS if has_cohorts else OF_ENDED)
        write(text, MARGIN, 62 + 18 * row, color=SOFT)
    draw_curves(place(LEFT, RIGHT, TOP, BOTTOM), curve)

    shared = draw_tasks(place(BARS_LEFT, BARS_RIGHT, BARS_TOP, BARS_TOP + num_tasks * ROW_HEIGHT), curve)
    write("By task", MARGIN, BARS_TOP - 34, size=15, weight="bold")
    write(shared, MARGIN, BARS_TOP - 14, size=12, color=SOFT, style="italic")
    write("successes/episodes", WIDTH - MARGIN, BARS_TOP - 14, size=12, color=SOFT, ha="right")
    for row, note in enumerate(reversed(curve.notes)):
        write(note, MARGIN, height - 22 - NOTE_HEIGHT * row, size=12, color=SOFT)
    return figure


def draw_curves(axes: Axes, curve: Curve) -> None:
    """Draws success over environment steps: lines of training, points of evaluations, what they compare with."""
    main_run = curve.runs[0]
    rates = [curve.start.rate, *(rate for run in curve.runs for stage in run.stages for _, rate in stage.curve)]
    rates += [evaluation.rate for run in curve.runs for evaluation in run.evaluations]
    # From a multiple of 10 % with room for the labels of stages.
    axes.set_ylim(max(0.0, math.floor(10 * min(rates) - 0.5) / 10), 1.0)
    axes.set_xlim(0.0, 1.02 * max(stage.end for run in curve.runs for stage in run.stages))
    label_axes(axes, curve)

    start, published = curve.start, curve.reference_rate
    axes.axhline(start.rate, color=BEFORE_COLOR, linewidth=1.5, dashes=(4, 2.5))
    axes.axhline(published, color=INK, linewidth=1.5, dashes=(4, 2.5))
    offset: dict[str, Any] = dict(textcoords="offset points", xycoords=axes.get_yaxis_transform())
    start_text = f"{start.label}: {percent(start.rate)} ({start.fraction})"
    axes.annotate(start_text, (1, start.rate), (0, -16), **offset, color=SOFT, ha="right")
    published_text = f"{curve.reference_label}: {percent(published)}"
    published_label = axes.annotate(published_text, (0, published), (8, 7), **offset)

    where: dict[str, Any] = dict(textcoords="offset points", xycoords=axes.get_xaxis_transform())
    for stage in main_run.stages:
        if stage.start:
            axes.axvline(stage.start, color=BEFORE_COLOR, linewidth=1, linestyle=(0, (1, 4)))
        axes.annotate(stage.label, (stage.start, 0), (8, 10), **where, size=12, color=COLORS[0])

    for number, (run, color) in reversed(list(enumerate(zip(curve.runs, COLORS, strict=False)))):
        for stage_number, stage in enumerate(run.stages):
            steps, success = np.reshape(stage.curve, (-1, 2)).T
            gid = f"run-{number}-stage-{stage_number}"
            axes.plot(steps, success, color=color, linewidth=2, alpha=0.75, solid_capstyle="round", gid=gid)

    draw_points(axes, [0.0], [start], INK, "start")
    placed: list[float] = []
    for number, (run, color) in enumerate(zip(curve.runs, COLORS, strict=False)):
        places = [aside(axes, evaluation.steps, placed) for evaluation in run.evaluations]
        draw_points(axes, places, run.evaluations, color, f"run-{number}")
        if run is main_run:
            reference = axes.transData.transform([(0, published), (axes.get_xlim()[1], published)])
            label_points(axes, places, run, [Bbox(reference).padded(1), published_label.get_window_extent()])
    draw_legend(axes, curve)


def label_axes(axes: Axes, curve: Curve) -> None:
    """Says what the axes mean; minutes and episodes are those of the main run."""
    steps, minutes, episodes = zip(*curve.runs[0].clock, strict=True)

    def describe(tick: float, _: int) -> str:
        if not 0 < tick <= steps[-1]:
            return f"{tick / 1e6:g} M steps" if tick else "0"
        time = f"{np.interp(tick, steps, minutes):.1f} min"
        return f"{tick / 1e6:g} M steps\n{time}\n{np.interp(tick, steps, episodes):,.0f} episodes"

    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(describe))
    axes.yaxis.set_major_locator(MultipleLocator(0.1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y")
    clock = f"minutes of training on {curve.machine} and episodes played, both of the main run"
    axes.set_xlabel(f"environment steps; {clock}", labelpad=8)
    axes.set_ylabel("success rate, mean of all tasks", labelpad=10)


def draw_points(axes: Axes, x: Sequence[float], evaluations: Sequence[Evaluation], color: str, gid: str) -> None:
    """Draws evaluations with their intervals."""
    rates = np.array([evaluation.rate for evaluation in evaluations])
    low, high = np.array([evaluation.interval for evaluation in evaluations]).reshape(-1, 2).T
    points, _, (intervals,) = axes.errorbar(
        x,
        rates,
        yerr=(rates - low, high - rates),
        fmt="o",
        color=color,
        markersize=10,
        markeredgecolor=PAPER,
        markeredgewidth=1.5,
        elinewidth=1.5,
        capsize=4,
        capthick=1.5,
        clip_on=False,
        zorder=3,
    )
    points.set_gid(f"{gid}-evaluations")
    intervals.set_gid(f"{gid}-intervals")


def aside(axes: Axes, steps: float, placed: list[float]) -> float:
    """Returns where to draw a point so that it is not on top of one in `placed`, to which it is added."""
    pixel = axes.get_xlim()[1] / (RIGHT - LEFT)
    while any(abs(steps - other) < 10 * pixel for other in placed):
        steps += 11 * pixel
    placed.append(steps)
    return steps


def label_points(axes: Axes, x: Sequence[float], run: Run, taken: list[Bbox]) -> None:
    """Writes rates and counts at a run's points, above or below them, clear of its lines and of what is `taken`."""
    to_pixels = axes.transData.transform
    curve = [place for stage in run.stages for place in stage.curve]
    taken += [Bbox(to_pixels([place, place])).padded(4) for place in curve]
    points = list(zip(x, run.evaluations, strict=True))
    for steps, evaluation in points:
        low, high = evaluation.interval
        taken.append(Bbox(to_pixels([(steps, low), (steps, high)])).padded(5))
    highest = axes.bbox.y1 + TOP - LABEL_TOP
    for steps, evaluation in reversed(points):  # the last one's is placed best
        low, high = evaluation.interval
        style: dict[str, Any] = dict(xycoords="data", textcoords="offset points", ha="center")
        rate = axes.annotate(
            percent(evaluation.rate), (steps, high), (0, 0), **style, color=COLORS[0], size=15, weight="bold"
        )
        counts = axes.annotate(caption(evaluation), (steps, high), (0, 0), **style, color=SOFT, size=11.5)
        for anchor, offset in ((high, 9), (low, -33), (high, 27), (low, -51), (high, 45), (low, -69), (high, 63)):
            counts.xy = rate.xy = (steps, anchor)
            counts.xyann, rate.xyann = (0, offset), (0, offset + 14)
            overhang = max(0, counts.get_window_extent().x1 - (WIDTH - 8))
            counts.xyann, rate.xyann = (-overhang, offset), (-overhang, offset + 14)
            box = Bbox.union([rate.get_window_extent(), counts.get_window_extent()])
            if box.y1 <= highest and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def caption(evaluation: Evaluation) -> str:
    """Returns what stands under a point's rate."""
    return f"{evaluation.fraction}, {evaluation.label}" if evaluation.label else evaluation.fraction


def draw_legend(axes: Axes, curve: Curve) -> None:
    """Names the runs, the compared ones with their last evaluation."""
    handles: list[Line2D] = []
    for run, color in zip(curve.runs, COLORS, strict=False):
        name = run.label
        if run is not curve.runs[0] and run.evaluations:
            last = run.evaluations[-1]
            name += f": {percent(last.rate)} ({caption(last)}) after {last.steps / 1e6:.2f} M steps"
        style: dict[str, Any] = dict(color=color, linewidth=2, marker="o", markersize=10, markeredgecolor=PAPER)
        handles.append(Line2D([], [], label=name, **style))
    place: dict[str, Any] = dict(
        loc="lower left", bbox_to_anchor=curve.legend_at, bbox_transform=axes.get_yaxis_transform()
    )
    axes.legend(handles=handles, **place, labelcolor="linecolor", frameon=False, fontsize=12.5)


def draw_tasks(axes: Axes, curve: Curve) -> str:
    """Draws each task at the start and at the main run's last evaluation with files; returns what all tasks share."""
    last = next((e for e in reversed(curve.runs[0].evaluations) if e.by_task), None)
    if last is None or last.by_task.keys() != curve.start.by_task.keys():
        raise ValueError("start and the main run's last evaluation with files must be of the same tasks")
    prefix, names, suffix = split_descriptions(list(last.by_task))
    before_text = f"{curve.start.label}, {percent(curve.start.rate)}"
    after_text = f"{curve.runs[0].label}, {last.steps / 1e6:.2f} M steps, {percent(last.rate)}"
    shown = ((curve.start, BEFORE_COLOR, before_text, "before"), (last, COLORS[0], after_text, "after"))
    for number, (evaluation, color, label, gid) in enumerate(shown):
        counts = [evaluation.by_task[description] for description in last.by_task]
        rates = np.array([successes / episodes for successes, episodes in counts])
        low, high = np.array([wilson_interval(*pair) for pair in counts]).T
        bars = axes.barh(
            np.arange(len(counts)) + 0.36 * (number - 0.5),
            rates,
            height=0.32,
            color=color,
            label=label,
            xerr=(rates - low, high - rates),
            error_kw=dict(ecolor=INK, elinewidth=1),
        )
        for task, bar in enumerate(bars):
            bar.set_gid(f"task-{task}-{gid}")
    for row, description in enumerate(last.by_task):
        pair = (evaluation.by_task[description] for evaluation, *_ in shown)
        counts_text = " → ".join(f"{successes}/{episodes}" for successes, episodes in pair)
        at: dict[str, Any] = dict(
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center", ha="right"
        )
        axes.annotate(counts_text, (1, row), (WIDTH - MARGIN - BARS_RIGHT, 0), **at)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xlabel("success rate, with Wilson 95 % intervals", labelpad=4)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1 + 30 / (ROW_HEIGHT * len(names))),
        borderaxespad=0,
        ncols=2,
        frameon=False,
        handlelength=1.1,
        fontsize=12.5,
    )
    return f"{prefix} … {suffix}".strip() if prefix or suffix else ""


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
    launch_benchmark(main)
