"""The report: what it shows is what the run's files say, in one file that needs nothing else."""

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from algorithms.common import charts, report
from algorithms.common.episode_log import EvalEpisode
from algorithms.common.evaluation import EvalResult
from algorithms.common.report import duration, read_metrics, write_report

pytestmark = pytest.mark.charts

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements are closed in order and collects texts and attributes."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag and attributes.items() <= a.items()]


def result(successes: int, seeds: tuple[int, ...] = (0,)) -> EvalResult:
    episodes = [
        EvalEpisode(seed=seed, task_id=task, init_state_id=state, success=task == 0 and state < successes, length=7)
        for seed in seeds for task in (0, 3) for state in range(10)
    ]  # fmt: skip
    return EvalResult(
        protocol=dict(suite="libero_goal", seeds=list(seeds), horizon=320, num_envs=10), episodes=episodes,
        task_descriptions={0: "open the <b>drawer</b>", 3: "push the plate"}, seconds=75.0,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "ppo_<1>"
    for folder in ("evaluations", "videos/iteration_2", "videos/iteration_10"):
        (path / folder).mkdir(parents=True)
    args = dict(suite="libero_goal", model="nano", num_iterations=50, task_ids=[0, 3], note="<script>alert(1)</script>")
    (path / "args.json").write_text(json.dumps(args))
    environment = dict(
        commit="0123456789abcdef", python="3.12.1", versions={"torch": "2.9.9", "warp-lang": None},
        hardware={"cpu": "a processor", "cores": 3, "gpus": ["one", "two"]},
    )  # fmt: skip
    (path / "environment.json").write_text(json.dumps(environment))
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(1, 11):
            line = {"iteration": i, "global_step": 100 * i, "actor/loss": 1.0 / i, "env/success_once": i / 10}
            line |= {"time/total_s": 366.0, "charts/SPS": 20.0, "actor/explained_variance": float("nan")}
            line |= {f"env/success_once_task_{task}": i / 10 if task == 0 else 0.0 for task in (0, 3)}
            line |= {"eval/success_once": 0.1} if i in (2, 10) else {}
            file.write(json.dumps(line) + "\n")
    for iteration, successes in ((2, 2), (10, 9)):
        result(successes).save(path / "evaluations" / f"iteration_{iteration}.json")
    for name, size in (("2/all_tasks", 3), ("10/all_tasks", 4), ("10/task_0_state_0_success", 5)):
        (path / "videos" / f"iteration_{name}.mp4").write_bytes(bytes(range(size)))
    (path / "videos" / "rollout_7.mp4").write_bytes(b"rollout")
    (path / "videos" / ".half.tmp.mp4").write_bytes(b"half")
    return path


def page(run: Path, **options: Any) -> Page:
    path = write_report(run, **options)
    assert path == run / "report.html"
    return Page(path.read_text())


def test_the_file_needs_nothing_else(run: Path):
    shown = page(run)
    content = (run / "report.html").read_text()
    assert not re.search(r"https?:|<script|@import|url\((?!#)", content)
    for _, attributes in shown.elements:
        assert "srcset" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
        assert str(attributes.get("src", "data:")).startswith("data:")
    assert shown.named("meta", name="viewport")
    assert "prefers-color-scheme: dark" in content
    assert sorted(p.name for p in run.iterdir() if p.is_file()) == [
        "args.json", "environment.json", "metrics.jsonl", "report.html"
    ]  # fmt: skip


def test_what_people_wrote_stays_text(run: Path):
    texts = page(run).texts
    assert "ppo_<1>" in texts
    assert "<script>alert(1)</script>" in texts
    assert any(t.endswith("open the <b>drawer</b>") for t in texts)


def test_the_headline_and_the_facts(run: Path):
    texts = page(run).texts
    for expected in (
        "45.0 %", "25.8 % to 65.8 % of 20",  # 9 of 20
        "55.0 %", "mean of the last 10 iterations", "of 50", "1000",
        "1 h 03 min", "20 env-steps/s, 2 min 30 s of it evaluations",
        "libero_goal · nano · commit 0123456789ab", "a processor", "one, two", "3.12.1", "2.9.9", "[0, 3]",
    ):  # fmt: skip
        assert expected in texts, expected
    assert "warp-lang" not in texts  # not installed


def test_horizons_of_a_combined_suite_are_told_by_member():
    evaluation = report.Evaluation(
        name="iteration_3",
        number=3,
        content={"protocol": {"suite": "libero_100", "horizon": {"libero_90": 400, "libero_10": 480}}},
    )
    sentence = report._protocol_sentence(evaluation)
    assert sentence == "iteration_3: libero_100, horizon 400 (libero_90), 480 (libero_10)"


def test_success_by_task_with_intervals_and_change(run: Path):
    shown = page(run)
    content = (run / "report.html").read_text()
    assert "since iteration_2" in shown.texts
    assert shown.texts.count("+70.0") == 1  # 2 of 10 became 9 of 10
    assert shown.texts.count("+0.0") == 1
    assert shown.texts.count("+35.0") == 1
    assert "width:90.0%" in content
    assert "left:59.6%;width:38.6%" in content  # Wilson: 9 of 10 is 59.58 to 98.21 %
    assert "59.6 to 98.2 %" in shown.texts
    assert any("iteration_10: libero_goal, horizon 320, seeds [0]" in t for t in shown.texts)
    (intervals,) = re.findall(r'<g class="interval">(.*?)</g>', content, re.DOTALL)
    assert intervals.count("<path") == 2


def test_curves_are_grouped_and_tasks_share_a_heatmap(run: Path):
    shown = page(run)
    titles = [t for t in shown.texts if t in report.GROUP_TITLES.values()]
    assert titles == ["Episodes of training", "Policy update", "Throughput", "Time (s)"]
    assert shown.texts.count("Constant") == 2  # what never changes has no picture
    assert {"SPS", "total_s", "366"} <= set(shown.texts)
    assert shown.texts.count("environment steps") == 4  # a tile, two curves, the heatmap
    assert "loss" in shown.texts
    assert "explained_variance" not in shown.texts  # never a number
    assert "success_once by task" in shown.texts
    assert not any("task_3" in t for t in shown.texts if "state" not in t)
    labels = [str(picture["aria-label"]) for picture in shown.named("svg")]
    assert "env/success_once by task" in labels
    assert len(set(labels)) == len(labels) == 4  # two curves, the evaluations, the heatmap


def test_videos_are_embedded_up_to_a_limit(run: Path):
    def embedded(shown: Page) -> list[bytes]:
        sources = [str(video["src"]) for video in shown.named("video")]
        return [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in sources]

    everything = page(run)
    assert sorted(embedded(everything)) == sorted([b"rollout", bytes(range(4)), bytes(range(5)), bytes(range(3))])
    assert "Earlier" in everything.texts
    small = page(run, max_video_mb=12e-6)  # bytes
    assert embedded(small) == [bytes(range(4)), b"rollout"]
    (note,) = [t for t in small.texts if t.startswith("Not embedded")]
    assert note.endswith("iteration_10/task_0_state_0_success.mp4, iteration_2/all_tasks.mp4")


def test_an_evaluation_alone(tmp_path: Path):
    result(8, seeds=(0, 4)).save(tmp_path / "result.json")
    shown = page(tmp_path)
    assert "40.0 %" in shown.texts
    assert "seed 4" in shown.texts
    assert "1 min 15 s" in shown.texts
    assert not any("since" in t for t in shown.texts)


def test_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "args.json").write_text('{"suite": "libero_goal"}')
    assert "libero_goal" in page(tmp_path).texts
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "global_step": 5, "env/a": 2}\n{"iteration": 2, "glo')
    page(tmp_path)
    content = (tmp_path / "report.html").read_text()
    (points,) = re.findall(r'<g class="point">(.*?)</g>\s*</g>', content, re.DOTALL)
    assert points.count("<use") == 1
    assert 'class="curve"' not in content


def test_the_speed_is_that_of_all_steps_over_all_of_their_time(run: Path):
    lines = [
        {"iteration": 1, "global_step": 1000, "time/total_s": 100.0, "charts/SPS": 10.0},
        {"iteration": 2, "global_step": 2000, "time/total_s": 1.0, "charts/SPS": 1000.0},
        {"iteration": 2, "global_step": 2000, "time/total_s": 50.0},  # tells no speed
        {"iteration": 2, "global_step": 2000, "charts/SPS": 7.0},  # tells no time
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert any(text.startswith("19.8 env-steps/s") for text in page(run).texts)  # 2000 in 101 s
    assert report.env_steps_per_s(lines[2:]) is None


@pytest.mark.parametrize(
    ("args", "line", "unit"),
    [
        (dict(num_iterations=50), dict(iteration=0, global_step=0), "environment steps"),  # evaluated before training
        (dict(num_iterations=50), dict(iteration=2, global_step=2), "environment steps"),
        (dict(num_steps=50), dict(iteration=20, global_step=20), "optimiser steps"),  # fine-tuning
    ],
)
def test_what_curves_are_over_follows_from_what_is_trained(
    run: Path, args: dict[str, int], line: dict[str, int], unit: str
):
    (run / "args.json").write_text(json.dumps(args))
    (run / "metrics.jsonl").write_text(f"{json.dumps({**line, 'eval/loss': 0.5})}\n")
    titles = {text.strip() for text in page(run).texts}
    assert titles & {"over environment steps", "over optimiser steps"} == {f"over {unit}"}
    tiles = {tile["title"] for tile in report.tiles_of(report.read_run(run))}
    assert ("environment steps" in tiles) == (unit == "environment steps")


def test_only_success_is_drawn_from_nothing_to_all_solved(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line |= {"env/weight_task_0": 0.25 * i, "env/weight_task_3": 1.0, "env/gone_task_3": math.nan}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    heatmaps = {chart["name"]: chart for group in report.groups_of(report.read_run(run)) for chart in group["heatmaps"]}
    notes = {name: chart["note"] for name, chart in heatmaps.items()}
    assert notes == {"success_once": "full colour: solved", "weight": "full colour: 2.25"}

    drawn: dict[str, float] = {}
    for name, chart in heatmaps.items():
        (cells,) = re.findall(r'<g class="cells">(.*?)</g>', chart["picture"], re.DOTALL)
        opacities = [float(opacity) for opacity in re.findall(r"fill-opacity: ([\d.]+)", cells)]
        drawn[name] = min(opacities[len(opacities) // 2 :])  # of task 3, which is drawn last
    assert drawn["success_once"] == pytest.approx(0.06, abs=0.005)
    assert drawn["weight"] == pytest.approx(0.06 + 0.94 / 2.25, abs=0.01)


@pytest.mark.parametrize("size", [-1.0, math.nan])
def test_a_size_of_videos_that_cannot_be_is_refused(run: Path, size: float):
    report.check_args(report.Args(run=(run,), max_video_mb=0.0))
    with pytest.raises(ValueError, match=rf"max_video_mb={size} must be at least 0"):
        report.check_args(report.Args(run=(run,), max_video_mb=size))


def test_what_is_no_run_and_what_is_broken(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is no folder of a run \(args.json\) or of an evaluation"):
        write_report(tmp_path)
    for name in ("protocol.json", "episodes.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"holds an evaluation that has not ended .*: wait for .* --resume"):
        write_report(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = '{"iteration": 1, "global_step": 5}\n'
    path.write_text(f"{whole}nonsense\n{whole}")
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is no JSON .*: remove the line"):
        read_metrics(path)
    for line in ("[1, 2]", "7", '{"iteration": 2}', '{"global_step": 9}', '{"iteration": 2, "global_step": NaN}'):
        path.write_text(f"{whole}{line}\n{whole}")
        message = rf"line 2 is {re.escape(repr(line[:40]))}, and must be an object with numbers for iteration and gl"
        with pytest.raises(ValueError, match=message):
            read_metrics(path)
    (tmp_path / "args.json").write_text('{"suite": ')
    with pytest.raises(ValueError, match=r"args.json is no JSON, or only a part of it"):
        write_report(tmp_path)


def test_names_inside_the_page_are_used_once(run: Path):
    shown = page(run)
    names = [str(attributes["id"]) for _, attributes in shown.elements if "id" in attributes]
    assert names
    assert len(set(names)) == len(names)
    content = (run / "report.html").read_text()
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', content)) == set(names)


def test_times_are_short():
    assert [duration(s) for s in (41.4, 200, 7500)] == ["41 s", "3 min 20 s", "2 h 05 min"]


def test_several_runs_are_one_page(run: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    args = json.loads((other / "args.json").read_text())
    (other / "args.json").write_text(json.dumps(args | {"learning_rate": 0.25}))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"charts/SPS": 40.0, "actor/loss": 2.0 / line["iteration"]} for line in lines[:5]]
    (other / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    path = report.main(report.Args(run=(run, other)))
    assert path == tmp_path / "comparison.html"
    shown = Page(path.read_text())
    assert {"2 runs", "ppo_<1>", "other", "line: blue", "line: green", "learning_rate", "0.25", "null"} <= set(
        shown.texts
    )
    assert "note" not in shown.texts  # the same in both
    assert "last 0.1, 0.4" in shown.texts
    labels = [str(picture["aria-label"]) for picture in shown.named("svg")]
    assert labels == ["env/success_once", "actor/loss", "charts/SPS"]  # constant, but not the same
    assert path.read_text().count('<g class="curve">') == 6

    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    result(8).save(evaluation / "result.json")  # it has no curve
    (other / "metrics.jsonl").write_text('{"iteration": 1, "global_step": 5, "env/a": 2}\n')
    path = report.main(report.Args(run=(run, other, evaluation)))
    shown = Page(path.read_text())
    assert [str(picture["aria-label"]) for picture in shown.named("svg")] == ["env/success_once", "actor/loss"]
    assert not any("optimiser steps" in text for text in shown.texts)  # an evaluation has no steps

    with pytest.raises(ValueError, match="names a folder twice"):
        report.main(report.Args(run=(run, run)))
    with pytest.raises(ValueError, match="is for several runs"):
        report.main(report.Args(run=(run,), output=tmp_path / "x.html"))


def test_counts_have_whole_ticks():
    texts = [
        t.strip() for t in re.findall(r"<text[^>]*>([^<]*)</text>", charts.curve([1, 2, 3], [1, 2, 2], "episodes"))
    ]
    assert "1.5" not in texts
    assert {"1", "2"} <= set(texts)
