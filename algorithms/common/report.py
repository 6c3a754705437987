"""A run as one HTML file: success rates, curves, videos, arguments, versions.

    python algorithms/common/report.py --run runs/ppo_libero_spatial_1

Reads what a trainer or eval_gr00t.py left in a folder and writes report.html into it, from the template
report.html.jinja. The file needs nothing else: pictures are inline SVG, videos are embedded up to a size. It reads well
on a phone, in light and in dark, and may be written while the run goes on.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich.console import Console

from algorithms.common.charts import compact, curve, heatmap
from algorithms.common.command_line import launch, parse_args
from gr00t_agent.files import write_text

TEMPLATE_NAME = "report.html.jinja"
MAX_VIDEO_MB = 30.0
MAX_VIDEOS = 24
MAX_NAMED_VIDEOS = 20
GROUP_TITLES = {
    "eval": "Evaluation",
    "env": "Episodes of training",
    "train": "Training",
    "actor": "Policy update",
    "critic": "Critics' update",
    "rollout": "Rollout",
    "charts": "Throughput",
    "time": "Time (s)",
}
CLOSED_GROUPS = ("charts", "time")
TASK_METRIC = re.compile(r"(.+)_task_(\d+)$")


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    run: Path
    """Folder of a run or of an evaluation."""
    max_video_mb: float = MAX_VIDEO_MB
    """Megabytes of videos that are embedded at most, the latest first; the others are named."""


# --- what the folder holds ---


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        name: file stem, such as `iteration_40`.
        number: iteration or step in the name; None without one.
        content: the JSON that `EvalResult.save` wrote.
    """

    name: str
    number: int | None
    content: dict[str, Any]

    @property
    def total(self) -> dict[str, Any]:
        """The row over all tasks."""
        return self.content["table"][-1]


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a report shows."""

    path: Path
    args: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    videos: list[Path]


def read_run(path: Path) -> Run:
    """Returns what `path` holds.

    Raises:
        FileNotFoundError: it holds neither a run nor an evaluation.
        ValueError: a line of metrics.jsonl, the last one excepted while it is being written, is no JSON.
    """
    results = [path / "result.json"] if (path / "result.json").is_file() else []
    if not results and not (path / "args.json").is_file():
        raise FileNotFoundError(
            f"{path} is no folder of a run (args.json) or of an evaluation (result.json): give one with --run"
        )
    files = [*sorted((path / "evaluations").glob("*.json"), key=_natural), *results]
    evaluations = [Evaluation(name=f.stem, number=_number(f.stem), content=_read_json(f)) for f in files]
    environment = _read_json(path / "environment.json")
    if not environment and evaluations:
        environment = evaluations[-1].content["environment"]
    args = _read_json(path / "args.json")
    return Run(
        path=path,
        args=args or evaluations[-1].content["protocol"],
        environment=environment,
        metrics=read_metrics(path / "metrics.jsonl"),
        evaluations=evaluations,
        videos=sorted((path / "videos").rglob("[!.]*.mp4"), key=_natural),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break  # still being written
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is no JSON ({error})") from error
    return metrics


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _natural(path: Path) -> list[Any]:
    """Sorts `iteration_9` before `iteration_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _number(name: str) -> int | None:
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else None


# --- what the page says ---


def percent(value: float) -> str:
    """Returns a rate as percent with one decimal."""
    return f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Returns a time as `2 h 05 min`, `3 min 20 s` or `41 s`."""
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 60} min {total % 60:02d} s" if total >= 60 else f"{total} s"


def series_of(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Returns environment steps (iterations where these are not logged), and a metric's finite values there."""
    points = [
        (line.get("global_step", line.get("iteration", i)), line[name])
        for i, line in enumerate(metrics)
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    return [x for x, _ in points], [y for _, y in points]


def tiles_of(run: Run) -> list[dict[str, str]]:
    """Returns what stands at the top: title, value and note of each tile."""
    tiles: list[dict[str, str]] = []

    def add(title: str, value: str, note: str = "") -> None:
        tiles.append(dict(title=title, value=value, note=note))

    if run.evaluations:
        total = run.evaluations[-1].total
        interval = f"{percent(total['low'])} to {percent(total['high'])} of {total['episodes']}"
        add("evaluated success", percent(total["success_rate"]), interval)
    _, in_training = series_of(run.metrics, "env/success_once")
    if in_training:
        tail = in_training[-10:]
        add("success in training", percent(sum(tail) / len(tail)), f"mean of the last {len(tail)} iterations")
    if run.metrics:
        last = run.metrics[-1]
        planned = run.args.get("num_iterations", run.args.get("num_steps"))
        add("iterations", compact(last["iteration"]), f"of {planned}" if planned else "")
        if last["global_step"] != last["iteration"]:
            add("environment steps", compact(last["global_step"]))
    seconds = sum(series_of(run.metrics, "time/total_s")[1])
    if seconds:
        _, speed = series_of(run.metrics, "charts/SPS")
        add("time", duration(seconds), f"{compact(sum(speed) / len(speed))} env-steps/s" if speed else "")
    elif run.evaluations and not run.metrics:
        content = run.evaluations[-1].content
        add("time", duration(content["seconds"]), f"{content['protocol']['num_envs']} environments")
    return tiles


def success_of(run: Run) -> dict[str, Any] | None:
    """Returns the last evaluation task by task, and all of them over time; None without any."""
    if not run.evaluations:
        return None
    last, first = run.evaluations[-1], run.evaluations[0]
    before = {row["task"]: row["success_rate"] for row in first.content["table"]} if first is not last else {}
    rows: list[dict[str, Any]] = []
    for row in last.content["table"]:
        rates = {"low": row["low"], "rate": row["success_rate"], "high": row["high"]}
        change = 100 * (row["success_rate"] - before[row["task"]]) if row["task"] in before else None
        rows.append(row | {name: 100 * rate for name, rate in rates.items()})
        rows[-1] |= {"is_total": row["task"] == "all", "change": change}
    over_time = [e for e in run.evaluations if e.number is not None]
    picture = None
    if len(over_time) > 1:
        picture = curve(
            [float(e.number or 0) for e in over_time],
            [e.total["success_rate"] for e in over_time],
            "success over iterations",
            is_rate=True,
            intervals=[(e.total["low"], e.total["high"]) for e in over_time],
        )
    seeds = last.content.get("seeds", [])
    counts = [(f"seed {s['seed']}", f"{percent(s['success_rate'])} ({s['successes']}/{s['episodes']})") for s in seeds]
    return {
        "protocol": _protocol_sentence(last),
        "curve": picture,
        "since": first.name if before else None,
        "rows": rows,
        "seeds": counts if len(counts) > 1 else [],
    }


def _protocol_sentence(evaluation: Evaluation) -> str:
    protocol = evaluation.content["protocol"]
    known = {
        "suite": "{}",
        "environment": "in {}",
        "init_states": "{} initial states",
        "horizon": "horizon {}",
        "seeds": "seeds {}",
        "metric": "{}",
        "sampling": "{} sampling",
    }
    values = dict(protocol)
    if isinstance(values.get("horizon"), dict):  # a combined suite's
        values["horizon"] = ", ".join(f"{steps} ({suite})" for suite, steps in values["horizon"].items())
    said = [pattern.format(values[name]) for name, pattern in known.items() if name in values]
    return f"{evaluation.name}: " + ", ".join(said)


def groups_of(run: Run) -> list[dict[str, Any]]:
    """Returns every metric's curve, grouped by the part of its name before the slash; tasks share a heatmap."""
    names = sorted({name for line in run.metrics for name in line if "/" in name})
    if len(run.evaluations) > 1 and "eval/success_once" in names:
        names.remove("eval/success_once")  # shown with its intervals
    by_group: dict[str, list[str]] = {}
    for name in names:
        by_group.setdefault(name.partition("/")[0], []).append(name)
    order = [*(g for g in GROUP_TITLES if g in by_group), *(g for g in by_group if g not in GROUP_TITLES)]
    return [
        {
            "title": GROUP_TITLES.get(group, group),
            "is_open": group not in CLOSED_GROUPS,
            "curves": _curves(run, [name for name in by_group[group] if not TASK_METRIC.match(name)]),
            "heatmaps": _heatmaps(run, by_group[group]),
        }
        for group in order
    ]


def _curves(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    for name in names:
        x, y = series_of(run.metrics, name)
        if not y:
            continue
        is_rate = "success" in name
        last = percent(y[-1]) if is_rate else compact(y[-1])
        picture = curve(x, y, name, is_rate=is_rate)
        charts.append(dict(name=name.partition("/")[2] or name, last=last, picture=picture))
    return charts


def _heatmaps(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a heatmap for each metric that is logged by task, such as env/success_once_task_3."""
    by_metric: dict[str, dict[int, str]] = {}
    for name in names:
        if match := TASK_METRIC.match(name):
            by_metric.setdefault(match[1], {})[int(match[2])] = name
    x = [float(line["global_step"]) for line in run.metrics]
    charts: list[dict[str, Any]] = []
    for metric, tasks in by_metric.items():
        rows = {task: [line.get(tasks[task]) for line in run.metrics] for task in sorted(tasks)}
        picture = heatmap(rows, x, f"{metric} by task")
        charts.append(dict(name=metric.partition("/")[2], picture=picture))
    return charts


def unit_of(run: Run) -> str:
    """Returns what curves are over."""
    counts_iterations = all(line.get("global_step") == line.get("iteration") for line in run.metrics)
    return "optimiser steps" if counts_iterations else "environment steps"


def videos_of(run: Run, max_video_mb: float) -> dict[str, Any] | None:
    """Returns the videos to embed, the latest and the earlier ones, and names those that exceed the limits."""
    if not run.videos:
        return None

    def moment(path: Path) -> tuple[bool, float]:
        """When it was filmed: by a trainer's rollout or in an evaluation, and in which iteration."""
        is_rollout = path.stem.startswith("rollout")
        number = _number(path.stem if is_rollout else path.parent.name)
        return is_rollout, math.inf if number is None else number

    moments = [moment(path) for path in run.videos]
    latest = {max((m for m in moments if m[0] == kind), default=None) for kind in (False, True)}
    is_overview = {path: path.stem.startswith(("all_tasks", "rollout")) for path in run.videos}
    ranked = sorted(run.videos, key=lambda p: (moment(p) not in latest, not is_overview[p], -moment(p)[1]))
    room = max_video_mb * 1e6
    shown: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    left_out: list[str] = []
    for path in ranked:
        name, size = path.relative_to(run.path / "videos").as_posix(), path.stat().st_size
        if size > room or len(shown[True]) + len(shown[False]) == MAX_VIDEOS:
            left_out.append(name)
            continue
        room -= size
        source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        video = dict(name=name.removesuffix(".mp4"), source=source, is_overview=is_overview[path])
        shown[moment(path) in latest].append(video)
    named = ", ".join(left_out[:MAX_NAMED_VIDEOS])
    if len(left_out) > MAX_NAMED_VIDEOS:
        named += f" and {len(left_out) - MAX_NAMED_VIDEOS} more"
    note = f"Not embedded (at most {MAX_VIDEOS} and {max_video_mb:g} MB are): {named}" if left_out else ""
    return {"latest": shown[True], "earlier": shown[False], "left_out": note}


def facts_of(run: Run) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Returns arguments, machine and versions as lists of names and values."""
    environment = run.environment
    machine = {"commit": environment.get("commit"), "python": environment.get("python")}
    for name, value in environment.get("hardware", {}).items():
        machine[name] = ", ".join(value) if isinstance(value, list) else value
    versions = {name: version for name, version in environment.get("versions", {}).items() if version}
    arguments = {
        name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in run.args.items()
    }
    blocks = {"Arguments": arguments, "Machine": machine, "Versions": versions}
    return [(title, list(block.items())) for title, block in blocks.items() if block]


# --- the page ---


@functools.cache
def template() -> Template:
    """Returns the page to fill in."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE_NAME)


def render(run: Run, max_video_mb: float = MAX_VIDEO_MB) -> str:
    """Returns the report as HTML."""
    commit = run.environment.get("commit")
    known = (run.args.get("suite"), run.args.get("model", run.args.get("checkpoint")))
    subtitle = (*known, f"commit {commit[:12]}" if commit else None)
    return template().render(
        name=run.path.resolve().name,
        subtitle=" · ".join(str(part) for part in subtitle if part),
        tiles=tiles_of(run),
        success=success_of(run),
        groups=groups_of(run),
        unit=unit_of(run),
        videos=videos_of(run, max_video_mb),
        facts=facts_of(run),
    )


def write_report(run_path: Path, *, max_video_mb: float = MAX_VIDEO_MB) -> Path:
    """Writes report.html into a run's folder, whole or not at all, and returns its path.

    Raises:
        FileNotFoundError: the folder holds neither a run nor an evaluation.
    """
    path = run_path / "report.html"
    write_text(path, render(read_run(run_path), max_video_mb))
    return path


def main(args: Args) -> Path:
    """Writes the report and says where."""
    path = write_report(args.run, max_video_mb=args.max_video_mb)
    Console().print(f"report  {path}  {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    return path


if __name__ == "__main__":
    launch(main, parse_args(Args, __doc__))
