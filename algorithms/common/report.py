"""A run as one HTML file: success rates, curves, videos, arguments, versions.

    python algorithms/common/report.py --run runs/ppo_libero_spatial_1

Reads what a trainer or eval_gr00t.py left in a folder (see `algorithms.common.run_folder`) and writes report.html into it. The
file needs nothing else: pictures are inline SVG, videos are embedded up to a size. It reads well on a phone, in light
and in dark, and may be written while the run goes on.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

REPORT_NAME = "report.html"
MAX_VIDEO_MB = 30.0
GROUP_TITLES = {
    "eval": "Evaluation", "env": "Episodes of training", "train": "Training", "actor": "Policy update",
    "rollout": "Rollout", "charts": "Throughput", "time": "Time (s)",
}  # fmt: skip
TASK_METRIC = re.compile(r"(.+)_task_(\d+)$")
MAX_POINTS = 400
MAX_COLUMNS = 60
MAX_VIDEOS = 24


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
        path=path, args=args or evaluations[-1].content["protocol"], environment=environment,
        metrics=read_metrics(path / "metrics.jsonl"), evaluations=evaluations,
        videos=sorted((path / "videos").rglob("[!.]*.mp4"), key=_natural),
    )  # fmt: skip


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


# --- HTML and SVG ---


def tag(name: str, *children: str, **attributes: Any) -> str:
    """Returns an element; attribute values are escaped, children are not. A trailing underscore in a name is cut."""
    parts = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{parts}>{''.join(children)}</{name}>"


def text(value: Any) -> str:
    """Returns `value` as escaped text."""
    return html.escape(str(value))


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


def percent(value: float) -> str:
    """Returns a rate as percent with one decimal."""
    return f"{100 * value:.1f} %"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not low < high:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of a curve, finite and in ascending x.

    Attributes:
        x: environment steps, or iterations.
        y: values.
        intervals: (low, high) of each point, drawn as a whisker; None draws a line without.
    """

    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] | None = None


WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 26


def chart(series: Series, label: str, *, is_rate: bool = False) -> str:
    """Returns a curve as SVG with axes; rates get an axis from 0 to 100 %."""
    low, high = (0.0, 1.0) if is_rate else (min(series.y), max(series.y))
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    x_low, x_high = series.x[0], series.x[-1]

    def to_x(value: float) -> float:
        share = 0.5 if x_low == x_high else (value - x_low) / (x_high - x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def to_y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts: list[str] = []
    for tick in nice_ticks(low, high):
        name = f"{100 * tick:.0f} %" if is_rate else compact(tick)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=to_y(tick), y2=to_y(tick)))
        parts.append(tag("text", text(name), class_="end", x=LEFT - 6, y=to_y(tick) + 4))
    for tick in nice_ticks(x_low, x_high, 4):
        parts.append(tag("text", text(compact(tick)), class_="mid", x=to_x(tick), y=HEIGHT - 8))
    x, y = thin(series.x, series.y)
    points = [(to_x(a), to_y(b)) for a, b in zip(x, y, strict=True)]
    path = " ".join(f"{a},{b}" for a, b in points)
    smooth = smoothed(y)
    if series.intervals is None and smooth is not None:
        parts.append(tag("polyline", class_="faint", points=path))
        path = " ".join(f"{to_x(a)},{to_y(b)}" for a, b in zip(x, smooth, strict=True))
    for a, (below, above) in zip(series.x, series.intervals or (), strict=False):
        parts.append(tag("line", class_="whisker", x1=to_x(a), x2=to_x(a), y1=to_y(below), y2=to_y(above)))
    if len(points) > 1:
        parts.append(tag("polyline", class_="curve", points=path))
    if len(points) <= 25:
        for (a, b), value in zip(points, y, strict=True):
            name = percent(value) if is_rate else compact(value)
            parts.append(tag("circle", tag("title", text(name)), class_="dot", cx=a, cy=b, r=3.5))
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns at most `MAX_POINTS` points: means of equally many neighbours each."""
    size = math.ceil(len(x) / MAX_POINTS)
    groups = [slice(i, i + size) for i in range(0, len(x), size)]
    return [_mean(x[group]) for group in groups], [_mean(y[group]) for group in groups]


def smoothed(y: Sequence[float]) -> list[float] | None:
    """Returns a centred moving mean over a twentieth of the points; None for fewer than forty."""
    reach = len(y) // 40
    return [_mean(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))] if reach else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def heatmap(rows: Mapping[int, Sequence[float | None]], x: Sequence[float]) -> str:
    """Returns rates by task (rows) and time (columns) as SVG; None leaves a cell empty.

    More than `MAX_COLUMNS` columns are joined by their means.
    """
    size = math.ceil(len(x) / MAX_COLUMNS)
    starts = range(0, len(x), size)
    row_height, left, width = 18, 34, 720
    cell = (width - left) / len(starts)
    parts: list[str] = []
    for row, (task, values) in enumerate(rows.items()):
        parts.append(tag("text", text(task), class_="end", x=left - 8, y=row * row_height + 13))
        for column, start in enumerate(starts):
            known = [value for value in values[start : start + size] if value is not None]
            if known:
                place = dict(x=round(left + column * cell, 2), y=row * row_height, width=round(cell, 2) + 0.3)
                name = f"task {task}, {compact(x[start])}: {percent(_mean(known))}"
                style = dict(height=row_height - 2, fill_opacity=round(0.06 + 0.94 * _mean(known), 3))
                parts.append(tag("rect", tag("title", text(name)), class_="cell", **place, **style))
    bottom = len(rows) * row_height + 14
    for tick in nice_ticks(x[0], x[-1], 6):
        place = left + (0.5 if x[0] == x[-1] else (tick - x[0]) / (x[-1] - x[0])) * (width - left - 20)
        parts.append(tag("text", text(compact(tick)), x=round(place, 1), y=bottom))
    return tag("svg", *parts, viewBox=f"0 0 {width} {bottom + 6}", role="img", aria_label="success by task over time")


# --- sections ---


def series_of(metrics: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Returns a metric's finite values over environment steps (over iterations where these are not logged)."""
    points = [
        (line.get("global_step", line.get("iteration", i)), line[name])
        for i, line in enumerate(metrics)
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    ]
    return Series(x=[x for x, _ in points], y=[y for _, y in points])


def headline(run: Run) -> str:
    """Returns the tiles at the top."""
    tiles: list[tuple[str, str, str]] = []
    if run.evaluations:
        total = run.evaluations[-1].total
        low, high = percent(total["low"]), percent(total["high"])
        tiles.append(("evaluated success", percent(total["success_rate"]), f"{low} to {high} of {total['episodes']}"))
    training = series_of(run.metrics, "env/success_once")
    if training.y:
        tail = training.y[-10:]
        tiles.append(("success in training", percent(_mean(tail)), f"mean of the last {len(tail)} iterations"))
    if run.metrics:
        last = run.metrics[-1]
        planned = run.args.get("num_iterations", run.args.get("num_steps"))
        tiles.append(("iterations", compact(last["iteration"]), f"of {planned}" if planned else ""))
        if last["global_step"] != last["iteration"]:
            tiles.append(("environment steps", compact(last["global_step"]), ""))
    seconds = sum(series_of(run.metrics, "time/total_s").y)
    if seconds:
        speed = series_of(run.metrics, "charts/SPS").y
        tiles.append(("time", duration(seconds), f"{compact(_mean(speed))} env-steps/s" if speed else ""))
    elif run.evaluations and not run.metrics:
        content = run.evaluations[-1].content
        tiles.append(("time", duration(content["seconds"]), f"{content['protocol']['num_envs']} environments"))
    return tag(
        "div", *(tag("div", tag("span", text(a)), tag("strong", text(b)), tag("span", text(c))) for a, b, c in tiles),
        class_="tiles",
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Returns a time as `2 h 05 min`, `3 min 20 s` or `41 s`."""
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 60} min {total % 60:02d} s" if total >= 60 else f"{total} s"


def success_section(run: Run) -> str:
    """Returns the last evaluation task by task, and all of them over time."""
    if not run.evaluations:
        return ""
    last, first = run.evaluations[-1], run.evaluations[0]
    before = {row["task"]: row["success_rate"] for row in first.content["table"]} if first is not last else {}
    rows = [_task_row(row, before.get(row["task"])) for row in last.content["table"]]
    parts = [tag("h2", "Success"), tag("p", text(_protocol_sentence(last)), class_="note")]
    over_time = [e for e in run.evaluations if e.number is not None]
    if len(over_time) > 1:
        totals = [e.total for e in over_time]
        series = Series(
            x=[float(e.number or 0) for e in over_time], y=[t["success_rate"] for t in totals],
            intervals=[(t["low"], t["high"]) for t in totals],
        )  # fmt: skip
        caption = tag("figcaption", tag("b", "success over iterations"), tag("span", "Wilson 95 %"))
        parts.append(tag("figure", caption, chart(series, "success over iterations", is_rate=True), class_="medium"))
    titles = ["task", "success", "Wilson 95 %", *([f"since {first.name}"] if before else [])]
    head = tag("tr", *(tag("th", text(title)) for title in titles))
    parts.append(tag("table", tag("thead", head), tag("tbody", *rows), class_="tasks"))
    if len(seeds := last.content.get("seeds", [])) > 1:
        cells = [
            (f"seed {s['seed']}", f"{percent(s['success_rate'])} ({s['successes']}/{s['episodes']})") for s in seeds
        ]
        parts += [tag("h3", "By seed"), pairs(cells)]
    return tag("section", *parts)


def _task_row(row: Mapping[str, Any], before: float | None) -> str:
    low, rate, high = (100 * row[key] for key in ("low", "success_rate", "high"))
    bar = tag(
        "div", tag("i", style=f"width:{rate:.1f}%"), tag("b", style=f"left:{low:.1f}%;width:{high - low:.1f}%"),
        class_="bar",
    )  # fmt: skip
    is_total = row["task"] == "all"
    name = text(row["description"]) if is_total else tag("small", text(row["task"])) + " " + text(row["description"])
    counts = tag("strong", percent(row["success_rate"])) + tag("small", f" {row['successes']}/{row['episodes']}")
    cells = [tag("th", name), tag("td", bar, counts), tag("td", f"{low:.1f} to {high:.1f} %", class_="interval")]
    if before is not None:
        change = 100 * (row["success_rate"] - before)
        kind = "up" if change > 0 else "down" if change < 0 else ""
        cells.append(tag("td", f"{change:+.1f}", class_=f"change {kind}"))
    return tag("tr", *cells, class_="total" if is_total else "")


def _protocol_sentence(evaluation: Evaluation) -> str:
    protocol = evaluation.content["protocol"]
    known = {
        "suite": "{}", "environment": "in {}", "init_states": "{} initial states", "horizon": "horizon {}",
        "seeds": "seeds {}", "metric": "{}", "sampling": "{} sampling",
    }  # fmt: skip
    said = [pattern.format(protocol[name]) for name, pattern in known.items() if name in protocol]
    return f"{evaluation.name}: " + ", ".join(said)


def curves_section(run: Run) -> str:
    """Returns every metric's curve, grouped by the part of its name before the slash."""
    names = sorted({name for line in run.metrics for name in line if "/" in name})
    if len(run.evaluations) > 1 and "eval/success_once" in names:
        names.remove("eval/success_once")  # shown with its intervals
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    order = [*(group for group in GROUP_TITLES if group in groups), *(g for g in groups if g not in GROUP_TITLES)]
    counts_iterations = all(line.get("global_step") == line.get("iteration") for line in run.metrics)
    unit = "optimiser steps" if counts_iterations else "environment steps"
    parts: list[str] = []
    for group in order:
        plain = [name for name in groups[group] if not TASK_METRIC.match(name)]
        figures = [figure for name in plain if (figure := _figure(run, name))]
        content = tag("div", *figures, class_="grid-of-charts") + _task_heatmaps(run, groups[group])
        title = tag("summary", tag("h2", text(GROUP_TITLES.get(group, group))), tag("span", text(f" over {unit}")))
        options = {} if group in ("charts", "time") else {"open": "open"}
        parts.append(tag("details", title, content, **options))
    return "".join(parts)


def _figure(run: Run, name: str) -> str:
    series = series_of(run.metrics, name)
    if not series.y:
        return ""
    is_rate = "success" in name
    last = percent(series.y[-1]) if is_rate else compact(series.y[-1])
    caption = tag("figcaption", tag("b", text(name.partition("/")[2])), tag("span", text(last)))
    return tag("figure", caption, chart(series, name, is_rate=is_rate))


def _task_heatmaps(run: Run, names: Iterable[str]) -> str:
    """Returns a heatmap for each metric that is logged by task, such as env/success_once_task_3."""
    by_metric: dict[str, dict[int, str]] = {}
    for name in names:
        if match := TASK_METRIC.match(name):
            by_metric.setdefault(match[1], {})[int(match[2])] = name
    parts: list[str] = []
    for metric, tasks in by_metric.items():
        rows = {task: [line.get(tasks[task]) for line in run.metrics] for task in sorted(tasks)}
        x = [float(line["global_step"]) for line in run.metrics]
        caption = tag("figcaption", tag("b", text(f"{metric.partition('/')[2]} by task")), tag("span", "dark: solved"))
        parts.append(tag("figure", caption, heatmap(rows, x), class_="wide"))
    return "".join(parts)


def videos_section(run: Run, max_video_mb: float) -> str:
    """Returns the videos, embedded, the latest ones in sight; what exceeds the limits is named."""
    if not run.videos:
        return ""

    def moment(path: Path) -> tuple[bool, float]:
        """When it was filmed: by a trainer's rollout or in an evaluation, and in which iteration."""
        is_rollout = path.stem.startswith("rollout")
        number = _number(path.stem if is_rollout else path.parent.name)
        return is_rollout, math.inf if number is None else number

    latest = {max((moment(p) for p in run.videos if moment(p)[0] == kind), default=None) for kind in (False, True)}
    is_overview = {path: path.stem.startswith(("all_tasks", "rollout")) for path in run.videos}
    ranked = sorted(run.videos, key=lambda p: (moment(p) not in latest, not is_overview[p], -moment(p)[1]))
    room = max_video_mb * 1e6
    figures: dict[bool, list[str]] = {True: [], False: []}
    left_out: list[str] = []
    for path in ranked:
        name, size = path.relative_to(run.path / "videos").as_posix(), path.stat().st_size
        if size > room or sum(map(len, figures.values())) == MAX_VIDEOS:
            left_out.append(name)
            continue
        room -= size
        source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        options = dict(controls="", loop="", muted="", playsinline="", preload="metadata", src=source)
        video = tag("video", **options, aria_label=name)
        caption = tag("figcaption", tag("b", text(name.removesuffix(".mp4"))))
        figures[moment(path) in latest].append(
            tag("figure", caption, video, class_="wide" if is_overview[path] else "")
        )
    parts = [tag("summary", tag("h2", "Videos")), tag("div", *figures[True], class_="grid-of-charts")]
    if figures[False]:
        earlier = tag("div", *figures[False], class_="grid-of-charts")
        parts.append(tag("details", tag("summary", tag("h3", "Earlier")), earlier))
    if left_out:
        names = ", ".join(left_out[:20]) + (f" and {len(left_out) - 20} more" if len(left_out) > 20 else "")
        parts.append(
            tag("p", text(f"Not embedded (at most {MAX_VIDEOS} and {max_video_mb:g} MB are): {names}"), class_="note")
        )
    return tag("details", *parts, open="open")


def facts_section(run: Run) -> str:
    """Returns arguments, commit, versions and hardware."""
    environment = run.environment
    hardware = environment.get("hardware", {})
    machine = [("commit", environment.get("commit")), ("python", environment.get("python"))]
    machine += [(name, ", ".join(v) if isinstance(v, list) else v) for name, v in hardware.items()]
    versions = [(name, version) for name, version in environment.get("versions", {}).items() if version]
    blocks = (("Arguments", run.args.items()), ("Machine", machine), ("Versions", versions))
    return "".join(
        tag("details", tag("summary", tag("h2", title)), pairs(list(content))) for title, content in blocks if content
    )


def pairs(items: Iterable[tuple[str, Any]]) -> str:
    """Returns names and values as a list in columns."""
    shown = ((name, json.dumps(value) if isinstance(value, dict | list) else value) for name, value in items)
    return tag("dl", *(tag("div", tag("dt", text(name)), tag("dd", text(value))) for name, value in shown))


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2128; --soft: #626d7a; --line: #e1e5ea;
  --accent: #1f6feb; --good: #1a7f37; --bad: #c03030; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --card: #181d24; --ink: #e4e8ed; --soft: #96a1ae;
  --line: #2b323b; --accent: #58a6ff; --good: #4cc26a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0; } h3 { font-size: 1rem; margin: 20px 0 8px; }
.note { color: var(--soft); margin: 6px 0 16px; overflow-wrap: anywhere; }
section, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  margin-top: 16px; }
summary { cursor: pointer; } summary span { color: var(--soft); font-size: .86rem; }
summary h2, summary h3 { display: inline; }
details details { border: 0; padding: 0; } details[open] > summary { margin-bottom: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin-top: 20px; }
.tiles > div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px;
  display: flex; flex-direction: column; }
.tiles strong { font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .82rem; }
.grid-of-charts { display: grid; gap: 18px 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
figure { margin: 0; min-width: 0; } figure.medium { max-width: 460px; margin-bottom: 20px; }
figure.wide { grid-column: 1 / -1; max-width: 820px; overflow-x: auto; } figure.wide svg { min-width: 560px; }
.grid-of-charts + figure.wide { margin-top: 18px; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: .86rem; margin-bottom: 4px; }
figcaption b { font-weight: 600; overflow-wrap: anywhere; }
figcaption span { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--line); } .whisker { stroke: var(--accent); stroke-width: 5; opacity: .4; }
.curve, .faint { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .3; } .dot { fill: var(--accent); } .cell { fill: var(--good); }
video { width: 100%; display: block; border-radius: 8px; background: #000; }
.tasks { width: 100%; border-collapse: collapse; }
.tasks th, .tasks td { text-align: left; padding: 8px 12px 8px 0; border-top: 1px solid var(--line); font-weight: 400; }
.tasks thead th { border: 0; color: var(--soft); font-size: .82rem; padding-top: 0; }
.tasks td { white-space: nowrap; font-variant-numeric: tabular-nums; } .tasks small { color: var(--soft); }
.tasks td:nth-child(2) { width: 42%; } .total th { font-weight: 600; } .interval { color: var(--soft); }
.change { text-align: right; padding-right: 0; } .up { color: var(--good); } .down { color: var(--bad); }
.bar { display: inline-block; vertical-align: middle; position: relative; width: calc(100% - 134px); height: 14px;
  margin-right: 12px; border-radius: 4px; background: var(--line); }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.bar b { position: absolute; top: 6px; height: 2px; background: var(--ink); opacity: .75; }
.bar b::before, .bar b::after { content: ""; position: absolute; top: -3px; width: 2px; height: 8px;
  background: var(--ink); } .bar b::before { left: 0; } .bar b::after { right: 0; }
dl { margin: 0; columns: 2; column-gap: 32px; }
dl div { display: flex; justify-content: space-between; gap: 16px; padding: 4px 0; border-top: 1px solid var(--line);
  break-inside: avoid; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 640px) { dl { columns: 1; } main { padding: 16px 10px 32px; } section, details { padding: 14px; }
  .tasks thead { display: none; } .tasks tr { display: grid; grid-template-columns: 1fr auto; padding: 8px 0;
  border-top: 1px solid var(--line); } .tasks th, .tasks td { border: 0; padding: 2px 0; }
  .tasks th { grid-column: 1 / -1; } .tasks td:nth-child(2) { width: auto; grid-column: 1 / -1; } }
"""


def render(run: Run, max_video_mb: float = MAX_VIDEO_MB) -> str:
    """Returns the report as HTML."""
    name = run.path.resolve().name
    known = (run.args.get("suite"), run.args.get("model", run.args.get("checkpoint")))
    commit = run.environment.get("commit")
    subtitle = " · ".join(str(part) for part in (*known, f"commit {commit[:12]}" if commit else None) if part)
    body = tag(
        "main", tag("h1", text(name)), tag("p", text(subtitle), class_="note"), headline(run), success_section(run),
        curves_section(run), videos_section(run, max_video_mb), facts_section(run),
    )  # fmt: skip
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        + tag("title", text(name))
        + tag("style", STYLE)
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_report(run_path: Path, *, max_video_mb: float = MAX_VIDEO_MB) -> Path:
    """Writes report.html into a run's folder, replacing it in one step, and returns its path.

    Raises:
        FileNotFoundError: the folder holds neither a run nor an evaluation.
    """
    path = run_path / REPORT_NAME
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(read_run(run_path), max_video_mb), encoding="utf-8")
    temporary.replace(path)
    return path


def main(args: Args) -> Path:
    """Writes the report and says where."""
    path = write_report(args.run, max_video_mb=args.max_video_mb)
    Console().print(f"report  {path}  {path.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    return path


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
