"""The picture of the learning curve: its numbers are those of the files that its manifest names."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from algorithms.common.episodes import wilson_interval
from benchmarks.learning_curve import (
    cohort_curve,
    draw,
    exploring_curve,
    mean_success,
    read_curve,
    render,
    split_descriptions,
)

ROOT = Path(__file__).resolve().parents[1]
# Committed pictures, by suite, and what each one shows besides much else.
PICTURES = {
    "spatial": {"start-evaluations", "run-0-stage-2", "run-3-intervals", "task-9-after"},
    "object": {"start-evaluations", "run-0-stage-0", "run-0-intervals", "task-9-after"},
    "goal": {"start-evaluations", "run-0-stage-0", "run-1-intervals", "task-9-after"},
}
TASKS = ("pick up the bowl on the stove and stop", "pick up the bowl next to the plate and stop")


def manifest_of(suite: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{suite}_ppo" / "curve.json"


def line(iteration: int, rates: tuple[float, float], episodes: int, **more: float) -> dict[str, float]:
    tasks = {f"env/success_once_task_{task}": rate for task, rate in enumerate(rates)}
    counts = {"iteration": iteration, "global_step": 1e5 * iteration, "env/num_episodes": episodes}
    return counts | {"time/total_s": 30.0, "env/success_once": sum(rates) / 2} | tasks | more


def write_metrics(path: Path, lines: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))


def write_evaluation(path: Path, successes: tuple[int, int], seed: int) -> None:
    rows = [dict(task=str(i), description=TASKS[i], successes=n, episodes=10) for i, n in enumerate(successes)]
    rows.append(dict(task="all", description="all tasks", successes=sum(successes), episodes=20))
    path.write_text(json.dumps(dict(protocol={"seeds": [seed]}, table=rows)))


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest and its files; what is given replaces parts of it, named by their path."""
    first = [line(1, (1.0, 1.0), 5), line(2, (0.2, 0.4), 30), line(3, (0.6, 0.8), 10), line(4, (0.5, 0.7), 40)]
    write_metrics(tmp_path / "a.jsonl", first)
    write_metrics(tmp_path / "b.jsonl", [line(i + 1, (0.8, 0.9), 20) for i in range(3)])
    write_metrics(tmp_path / "c.jsonl", [line(1, (0.4, 0.6), 50), line(2, (0.5, 0.7), 50)])
    for name, successes, seed in (("start", (2, 6), 0), ("seed_0", (9, 7), 0), ("seed_1", (8, 8), 1)):
        write_evaluation(tmp_path / f"{name}.json", successes, seed)
    stages = [
        {"name": "a", "metrics": "a.jsonl", "iterations": 3},
        {"name": "b", "metrics": "b.jsonl", "tasks_drawn": "unevenly", "label": "the second leg"},
    ]
    evaluations = [
        {"stage": "a", "iteration": 2, "successes": 13, "episodes": 20, "seeds": [0]},
        {"stage": "b", "iteration": 3, "files": ["seed_0.json", "seed_1.json"], "label": "shipped"},
    ]
    main_run = dict(label="PPO", iterations_per_horizon=2, stages=stages, evaluations=evaluations)
    compared = dict(
        label="GRPO", iterations_per_horizon=1, stages=[{"name": "c", "metrics": "c.jsonl"}],
        evaluations=[{"stage": "c", "iteration": 2, "successes": 11, "episodes": 20, "seeds": [0]}],
    )  # fmt: skip
    content: dict[str, Any] = dict(
        title="A curve", machine="one GPU", start={"label": "start", "files": ["start.json"]},
        reference={"label": "theirs", "success_rate": 0.95, "source": "a page"}, runs=[main_run, compared],
        notes=["a & b"],
    )  # fmt: skip

    def write(**changes: Any) -> Path:
        for path, value in changes.items():
            *parents, last = (int(key) if key.isdigit() else key for key in path.split("__"))
            part: Any = content
            for key in parents:
                part = part[key]
            part[last] = value
        (tmp_path / "curve.json").write_text(json.dumps(content))
        return tmp_path / "curve.json"

    return write


def test_evenly_drawn_tasks_are_pooled_by_episodes():
    first, second = line(1, (1.0, 1.0), 10), line(2, (0.4, 0.6), 30)
    assert mean_success([first, second], tasks_drawn="evenly") == pytest.approx((10 + 15) / 40)
    no_episode = {"iteration": 3, "global_step": 3e5}
    assert mean_success([no_episode, second], tasks_drawn="evenly") == pytest.approx(0.5)


def test_unevenly_drawn_tasks_count_alike():
    first, second = line(1, (1.0, 0.2), 10), line(2, (0.5, 0.4), 30)
    assert mean_success([first, second], tasks_drawn="unevenly") == pytest.approx((0.75 + 0.3) / 2)
    del first["env/success_once_task_0"]  # none of its episodes ended in the first iteration
    assert mean_success([first, second], tasks_drawn="unevenly") == pytest.approx((0.5 + 0.3) / 2)
    first |= {"env/num_episodes_task_1": 1}  # the second line does not count: no pooling
    assert mean_success([first, second], tasks_drawn="unevenly") == pytest.approx((0.5 + 0.3) / 2)
    second |= {"env/num_episodes_task_0": 6, "env/num_episodes_task_1": 3}
    assert mean_success([first, second], tasks_drawn="unevenly") == pytest.approx((0.5 + (0.2 + 1.2) / 4) / 2)


def test_curve_is_over_a_horizon_and_without_the_beginning_in_which_nothing_can_fail():
    metrics = [line(1, (1.0, 1.0), 5), line(2, (0.2, 0.4), 30), line(3, (0.6, 0.8), 10)]
    points = exploring_curve(metrics, iterations_per_horizon=2, tasks_drawn="evenly")
    assert points == [(2e5, pytest.approx((0.3 * 30 + 0.7 * 10) / 40))]
    points = exploring_curve(metrics, iterations_per_horizon=1, tasks_drawn="evenly")
    assert points == [(0.5e5, 1.0), (1.5e5, pytest.approx(0.3)), (2.5e5, pytest.approx(0.7))]


def test_cohorts_are_where_they_began(manifest: Callable[..., Path]):
    metrics = [line(1, (1.0, 1.0), 5), line(2, (0.2, 0.4), 30), line(3, (0.6, 0.8), 10), line(4, (0.5, 0.7), 10)]
    del metrics[2]["env/success_once"]  # none began in the first iteration
    assert cohort_curve(metrics, iterations_per_horizon=2) == [(1.5e5, pytest.approx(0.6))]
    run, _ = read_curve(manifest(runs__0__stages__0__episodes="cohorts")).runs
    assert run.stages[0].curve == [(0.5e5, pytest.approx(0.7))]
    with pytest.raises(ValueError, match=r"stage b .* give .ended., or .cohorts. without tasks_drawn"):
        read_curve(manifest(runs__0__stages__1__episodes="cohorts"))
    with pytest.raises(ValueError, match="has episodes='begun'"):
        read_curve(manifest(runs__0__stages__0__episodes="begun"))


def test_stages_go_on_where_the_one_before_ended(manifest: Callable[..., Path]):
    run, compared = read_curve(manifest()).runs
    assert [(stage.start, stage.end) for stage in run.stages] == [(0, 3e5), (3e5, 6e5)]
    assert run.stages[0].curve == [(2e5, pytest.approx(0.4))]  # the file's fourth iteration is none of the stage's
    assert run.stages[1].curve == [(5e5, pytest.approx(0.85))]
    assert run.clock[-1] == (6e5, pytest.approx(3.0), 5 + 30 + 10 + 3 * 20)
    assert [(e.steps, e.fraction, e.rate) for e in run.evaluations] == [
        (2e5, "13/20", 0.65),
        (6e5, "32/40, 2 seeds", 0.8),
    ]
    assert run.evaluations[1].by_task == {TASKS[0]: (17, 20), TASKS[1]: (15, 20)}
    assert [stage.curve for stage in compared.stages] == [[(0.5e5, 0.5), (1.5e5, pytest.approx(0.6))]]


def texts_of(picture: str) -> list[str]:
    return [str(text.text) for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]


def data_of(picture: str) -> dict[str, list[float]]:
    """Coordinates of everything that shows data, by its id."""
    found: dict[str, list[float]] = {}
    for group in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g"):
        name = group.get("id", "")
        if re.match(r"(start|run|task)-", name):
            numbers: list[float] = []
            for shape in group.iter():
                if shape.tag.endswith("}path") and "id" not in shape.attrib:  # not the form of a marker
                    numbers += [float(number) for number in re.findall(r"[-\d.]+", shape.get("d", ""))]
                elif shape.tag.endswith("}use"):
                    numbers += [float(shape.get("x", "nan")), float(shape.get("y", "nan"))]
            found[name] = numbers
    return found


def test_picture_says_the_numbers(manifest: Callable[..., Path]):
    texts = texts_of(render(read_curve(manifest())))
    shown = ["80.0 %", "32/40, 2 seeds, shipped", "65.0 %", "13/20", "start: 40.0 % (8/20)", "theirs: 95.0 %"]
    shown += ["GRPO: 55.0 % (11/20) after 0.20 M steps", "the second leg", "a & b", "0.2 M steps", "1.0 min"]
    shown += ["on the stove", "next to the plate", "pick up the bowl … and stop", "2/10 → 17/20", "6/10 → 15/20"]
    assert [text for text in shown if text not in texts] == []


def test_picture_shows_the_numbers_where_its_axes_say(manifest: Callable[..., Path]):
    curves, tasks = draw(read_curve(manifest())).axes
    lines = {str(line.get_gid()): np.asarray(line.get_xydata()) for line in curves.lines if line.get_gid()}
    expected = {
        "start-evaluations": [(0, 0.4)],
        "run-0-stage-0": [(2e5, 0.4)],
        "run-0-stage-1": [(5e5, 0.85)],
        "run-0-evaluations": [(2e5, 0.65), (6e5, 0.8)],
        "run-1-stage-0": [(0.5e5, 0.5), (1.5e5, 0.6)],
        "run-1-evaluations": [(2e5 + 11 * 1.02 * 6e5 / 776, 0.55)],  # eleven pixels aside from the other at 2e5
    }
    assert lines.keys() == {str(gid) for gid in expected}
    for gid, places in expected.items():
        np.testing.assert_allclose(lines[gid], places, rtol=1e-6, err_msg=gid)
    (low, high), (left, right) = curves.get_ylim(), curves.get_xlim()
    assert (low, high, left) == (pytest.approx(0.3), 1, 0)
    assert right > 6e5
    intervals = {str(c.get_gid()): c.get_segments() for c in curves.collections if c.get_gid()}  # pyright: ignore
    np.testing.assert_allclose(intervals["run-0-intervals"][1][:, 1], wilson_interval(32, 40))
    bars = {str(bar.get_gid()): bar.get_width() for bar in tasks.patches}
    assert bars == {
        "task-0-before": 0.2, "task-0-after": 0.85, "task-1-before": pytest.approx(0.6), "task-1-after": 0.75
    }  # fmt: skip


@pytest.mark.parametrize("suite", PICTURES)
def test_labels_are_clear_of_each_other_and_of_points(suite: str):
    curve = read_curve(manifest_of(suite))
    curves, _ = draw(curve).axes
    rates = [t for t in curves.texts if re.fullmatch(r"\d+\.\d %", t.get_text())]
    counts = [t for t in curves.texts if re.fullmatch(r"[\d,]+/[\d,]+(, .*)?", t.get_text())]
    assert len(rates) == len(counts) == len(curve.runs[0].evaluations)
    boxes = [text.get_window_extent() for text in (*rates, *counts)]
    (points,) = [line for line in curves.lines if line.get_gid() == "run-0-evaluations"]
    boxes += [Bbox([place, place]).padded(5) for place in curves.transData.transform(points.get_xydata())]
    overlapping = [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert all(i - j == len(rates) and i < 2 * len(rates) for i, j in overlapping)  # a label's two lines touch
    assert max(box.x1 for box in boxes) <= 880


def test_words_that_all_descriptions_share_are_said_once():
    assert split_descriptions(TASKS) == ("pick up the bowl", ["on the stove", "next to the plate"], "and stop")
    assert split_descriptions(["a b", "a b b"]) == ("a", ["b", "b b"], "")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"runs__0__stages__1__metrics": "d.jsonl"}, FileNotFoundError, r"d\.jsonl is not there.*stage b"),
        ({"start__files": ["gone.json"]}, FileNotFoundError, r"gone\.json is not there.*start"),
        ({"runs__0__evaluations__1__files": ["seed_0.json"] * 2}, ValueError, r"counts a seed twice.*\[0, 0\]"),
        ({"runs__0__evaluations__1__iteration": 4}, ValueError, r"no iteration 4 of stage b.*a: 1-3, b: 1-3"),
        ({"runs__0__evaluations__0__stage": "c"}, ValueError, r"no iteration 2 of stage c"),
        ({"runs__0__evaluations__0__files": []}, ValueError, "give files, or successes, episodes and seeds"),
        ({"runs__0__stages__1__name": "a"}, ValueError, "a name is used once"),
        ({"runs__0__stages__0__iterations": 5}, ValueError, r"5 iterations \(its file has 4"),
        ({"runs__0__stages__0__tasks_drawn": "oddly"}, ValueError, "'oddly'.*evenly"),
        ({"runs__0__stages__0__offset": 3}, ValueError, r"a stage of PPO has \['offset'\]"),
        ({"runs": []}, ValueError, "0 runs are given"),
    ],
)  # fmt: skip
def test_what_a_manifest_gets_wrong_is_said(
    manifest: Callable[..., Path], change: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        read_curve(manifest(**change))


def test_metrics_that_begin_in_the_middle_of_a_run_are_refused(manifest: Callable[..., Path], tmp_path: Path):
    path = manifest()
    write_metrics(tmp_path / "b.jsonl", [line(i, (0.8, 0.9), 20) for i in (4, 5, 6)])
    with pytest.raises(ValueError, match="stage b of PPO begins with iteration 4"):
        read_curve(path)


def test_picture_is_the_same_bytes_every_time(manifest: Callable[..., Path]):
    first, second = (render(read_curve(manifest())) for _ in range(2))
    assert first == second
    assert "date" not in first.lower().replace("update", "")


@pytest.mark.parametrize("suite", PICTURES)
def test_committed_picture_is_what_its_manifest_draws(suite: str):
    """What it says and where its data lie; bytes are for one version of matplotlib."""
    committed = (ROOT / "docs" / "media" / f"libero_{suite}_ppo.svg").read_text(encoding="utf-8")
    drawn = render(read_curve(manifest_of(suite)))
    remedy = "draw it again with python -m benchmarks.learning_curve, see its --help"
    assert sorted(texts_of(committed)) == sorted(texts_of(drawn)), remedy
    data, expected = data_of(committed), data_of(drawn)
    assert data.keys() == expected.keys(), remedy
    assert PICTURES[suite] <= data.keys()
    for name, numbers in expected.items():
        assert numbers, name
        np.testing.assert_allclose(data[name], numbers, atol=0.1, err_msg=f"{name}: {remedy}")
