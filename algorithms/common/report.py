"""A run as one HTML file: success rates, curves, videos, arguments, versions.

    python algorithms/report.py --run runs/ppo_libero_spatial_1
    python algorithms/report.py --run runs/ppo_libero_spatial_1 runs/ppo_libero_spatial_2

The second command writes one page that compares the runs: what they came to, which arguments differ, and each
metric's curves in one picture. The first reads what a trainer or eval_gr00t.py left in a folder and writes report.html
into it. Both use the template report.html.jinja. A page needs nothing else: pictures are inline SVG, videos are
embedded up to a size. It reads well on a phone, in light and in dark, and may be written while the run goes on.
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

from algorithms.common.args import check_ranges
from algorithms.common.charts import LINE_NAMES, compact, curve, curves, heatmap
from algorithms.common.jobs import PROTOCOL_FILE
from gr00t_agent.files import read_json, write_text
from libero_gym.outputs import check_output_file

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
# In every line of metrics.jsonl.
COUNTERS = ("iteration", "global_step")
# What a run's steps may be.
ENV_STEPS = "environment steps"
OPTIMISER_STEPS = "optimiser steps"


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    run: tuple[Path, ...]
    """Folder of a run or of an evaluation, which gets a report.html; or several, for one page that
    compares them."""
    output: Path | None = None
    """The page of several; comparison.html beside the first of them if not given."""
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
        FileNotFoundError: it holds neither a run nor an evaluation that has ended.
        ValueError: a JSON file, or a line of metrics.jsonl (the last one excepted while it is being written), is none.
    """
    results = [path / "result.json"] if (path / "result.json").is_file() else []
    if not results and not (path / "args.json").is_file():
        if (path / PROTOCOL_FILE).is_file():
            raise FileNotFoundError(
                f"{path} holds an evaluation that has not ended ({PROTOCOL_FILE}, but no result.json): wait for its "
                "end, or go on with it by the command that began it and --resume"
            )
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
    """Returns the lines of metrics.jsonl; none if there is no such file.

    Raises:
        ValueError: a line, the last one excepted while it is being written, is no JSON object with `iteration` and
            `global_step`.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break  # still being written
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is no JSON ({error}): remove the line") from error
        if not isinstance(content, dict) or not all(_is_finite(content.get(name)) for name in COUNTERS):
            raise ValueError(
                f"{path} line {number} is {line.strip()[:40]!r}, and must be an object with numbers for "
                f"{' and '.join(COUNTERS)}: remove the line"
            )
        metrics.append(content)
    return metrics


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


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
    """Returns the steps, as `unit_of` names them, at which a metric has finite values, and these."""
    points = [(line["global_step"], line[name]) for line in metrics if _is_finite(line.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def env_steps_per_s(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns environment steps over the time that they took, of the lines that tell both; None without any.

    It is no mean of the lines' speeds, in which a short iteration would weigh as much as a long one.
    """
    told = [line for line in metrics if _is_finite(line.get("charts/SPS")) and _is_finite(line.get("time/total_s"))]
    seconds = sum(line["time/total_s"] for line in told)
    if not seconds:
        return None
    return sum(line["charts/SPS"] * line["time/total_s"] for line in told) / seconds


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
        if unit_of(run) == ENV_STEPS:
            add(ENV_STEPS, compact(last["global_step"]))
    seconds = sum(series_of(run.metrics, "time/total_s")[1])
    if seconds:
        speed = env_steps_per_s(run.metrics)
        evaluated = sum(evaluation.content["seconds"] for evaluation in run.evaluations)
        notes = [f"{compact(speed)} env-steps/s"] if speed is not None else []
        if evaluated:
            notes.append(f"{duration(evaluated)} of it evaluations")
        add("time", duration(seconds + evaluated), ", ".join(notes))
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
            axis_labels=("iterations", "success"),
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
            "constants": _constants(run, by_group[group]),
            "heatmaps": _heatmaps(run, by_group[group]),
        }
        for group in order
    ]


def _curves(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    for name in names:
        x, y = series_of(run.metrics, name)
        if not y or _is_constant(y):
            continue
        short = name.partition("/")[2] or name
        picture = curve(x, y, name, axis_labels=(unit_of(run), short), is_rate=_is_rate(name))
        charts.append(dict(name=short, last=f"last {_value(name, y[-1])}", picture=picture))
    return charts


def _is_rate(name: str) -> bool:
    """Returns whether a metric is a rate of success, from 0 to 1."""
    return "success" in name


def _value(name: str, value: float) -> str:
    return percent(value) if _is_rate(name) else compact(value)


def _is_constant(y: Sequence[float]) -> bool:
    """Returns whether values, at least two, are all the same."""
    return len(y) > 1 and min(y) == max(y)


def _constants(run: Run, names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the metrics that never change, with their value."""
    series = {name: series_of(run.metrics, name)[1] for name in names if not TASK_METRIC.match(name)}
    return [(name.partition("/")[2], _value(name, y[0])) for name, y in series.items() if _is_constant(y)]


def _heatmaps(run: Run, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a heatmap for each metric that is logged by task, such as env/success_once_task_3.

    Success is drawn from 0 to 1; others, such as the weights of adaptive task sampling, up to their largest value.
    """
    by_metric: dict[str, dict[int, str]] = {}
    for name in names:
        if match := TASK_METRIC.match(name):
            by_metric.setdefault(match[1], {})[int(match[2])] = name
    x = [float(line["global_step"]) for line in run.metrics]
    charts: list[dict[str, Any]] = []
    for metric, tasks in by_metric.items():
        rows = {
            task: [line[tasks[task]] if _is_finite(line.get(tasks[task])) else None for line in run.metrics]
            for task in sorted(tasks)
        }
        values = [value for row in rows.values() for value in row if value is not None]
        if not values:
            continue
        full = 1.0 if _is_rate(metric) else max(values)
        picture = heatmap(rows, x, f"{metric} by task", (unit_of(run), "task"), full=full)
        note = "full colour: solved" if _is_rate(metric) else f"full colour: {compact(full)}"
        charts.append(dict(name=metric.partition("/")[2], note=note, picture=picture))
    return charts


def unit_of(run: Run) -> str:
    """Returns what curves are over.

    Only fine-tuning counts optimiser steps, and has no iterations. Other trainers begin at step 0 of both, too.
    """
    counts_steps = all(line["global_step"] == line["iteration"] for line in run.metrics)
    return OPTIMISER_STEPS if counts_steps and "num_iterations" not in run.args else ENV_STEPS


def _units(runs: Mapping[str, Run]) -> str:
    """Returns what curves of several runs are over; an evaluation has none."""
    return " or ".join(sorted({unit_of(run) for run in runs.values() if run.metrics}))


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


# --- several runs ---


def comparison_rows(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Returns for each run its name, its line in the pictures, its tiles and the arguments that differ."""
    names = sorted({name for run in runs.values() for name in run.args})
    differing = [name for name in names if len({json.dumps(run.args.get(name)) for run in runs.values()}) > 1]
    return [
        dict(
            name=name,
            line=line,
            tiles=tiles_of(run),
            differing=[(key, json.dumps(run.args.get(key))) for key in differing],
        )
        for (name, run), line in zip(runs.items(), LINE_NAMES, strict=False)
    ]


def comparison_groups(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Returns a picture for each metric that changes in a run or differs between them, in groups as `groups_of`."""
    names = sorted({name for run in runs.values() for line in run.metrics for name in line if "/" in name})
    by_group: dict[str, list[dict[str, Any]]] = {}
    unit = _units(runs)
    for name in names:
        lines = {run_name: series_of(run.metrics, name) for run_name, run in runs.items()}
        values = {value for _, y in lines.values() for value in y}
        if TASK_METRIC.match(name) or len(values) < 2:
            continue
        group, _, short = name.partition("/")
        last = ", ".join(_value(name, y[-1]) if y else "-" for _, y in lines.values())
        picture = curves(lines, name, axis_labels=(unit, short), is_rate=_is_rate(name))
        by_group.setdefault(group, []).append(dict(name=short, last=f"last {last}", picture=picture))
    order = [*(g for g in GROUP_TITLES if g in by_group), *(g for g in by_group if g not in GROUP_TITLES)]
    return [
        dict(
            title=GROUP_TITLES.get(group, group),
            is_open=group not in CLOSED_GROUPS,
            curves=by_group[group],
            constants=[],
            heatmaps=[],
        )
        for group in order
    ]


def write_comparison(paths: Sequence[Path], output: Path) -> None:
    """Writes a page that shows several runs side by side, whole or not at all.

    Raises:
        FileNotFoundError: a folder holds neither a run nor an evaluation that has ended.
    """
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = {name: read_run(path) for name, path in zip(names, paths, strict=True)}
    page = template().render(
        name=f"{len(runs)} runs",
        subtitle=" · ".join(runs),
        tiles=[],
        runs=comparison_rows(runs),
        success=None,
        groups=comparison_groups(runs),
        unit=_units(runs),
        videos=None,
        facts=[],
    )
    write_text(output, page)


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
        runs=[],
        success=success_of(run),
        groups=groups_of(run),
        unit=unit_of(run),
        videos=videos_of(run, max_video_mb),
        facts=facts_of(run),
    )


def write_report(run_path: Path, *, max_video_mb: float = MAX_VIDEO_MB) -> Path:
    """Writes report.html into a run's folder, whole or not at all, and returns its path.

    Raises:
        FileNotFoundError: the folder holds neither a run nor an evaluation that has ended.
    """
    path = run_path / "report.html"
    write_text(path, render(read_run(run_path), max_video_mb))
    return path


def check_args(args: Args) -> None:
    """Checks what is shown, and where.

    Raises:
        ValueError: more runs than a picture can tell apart, one twice, a place for a page that has its own, or a number
            that is not in its range.
        OSError: `output` cannot be written.
    """
    check_ranges(args)
    if not 1 <= len(args.run) <= len(LINE_NAMES):
        raise ValueError(f"run names {len(args.run)} folders (valid: 1-{len(LINE_NAMES)})")
    if len({path.resolve() for path in args.run}) < len(args.run):
        raise ValueError(f"run={[str(path) for path in args.run]} names a folder twice")
    if args.output is not None and len(args.run) == 1:
        raise ValueError(f"output={args.output} is for several runs; the report of one is in its folder")
    if args.output is not None:
        check_output_file("output", args.output)


def main(args: Args) -> Path:
    """Writes the report, or the page of several runs, and says where."""
    check_args(args)
    if len(args.run) == 1:
        path = write_report(args.run[0], max_video_mb=args.max_video_mb)
    else:
        path = args.output or args.run[0].resolve().parent / "comparison.html"
        write_comparison(args.run, path)
    Console().print(f"report  {path}  {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    return path
