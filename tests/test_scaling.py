"""The benchmark of where PPO's parts run: what it launches, and what it makes of runs that end, fail or hang."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from algorithms.ppo_gr00t import PRESETS
from benchmarks import iterations, scaling
from benchmarks.scaling import Layout, layouts_of, measure

# Writes the metrics of two iterations where a trainer would: after --output-dir FOLDER --run-name run.
RUN = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1]) / sys.argv[sys.argv.index("--run-name") + 1]
folder.mkdir()
lines = [{"time/total_s": s, "charts/SPS": 100.0, "time/env_s": s / 2} for s in (9.0, 2.0, 6.0)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


def python(code: str) -> Layout:
    return Layout(name="a run", command=(sys.executable, "-c", code), micro_batch_size=8)


def test_layouts_are_launched_as_a_user_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("algorithms.common.placement.check_installed", lambda: None)
    asked = [("processes", 1), ("processes", 2), ("fsdp", 2), ("placements", "env:0 rollout:0 actor:1")]
    options: Any = SimpleNamespace(asked=asked, staleness=[0, 1])
    args = iterations.resized(PRESETS["libero_spatial_nano"], num_envs=64, num_steps=12, micro_batch_size=300)
    assert (args.minibatch_size, args.micro_batch_size) == (768, 256)
    one, two, sharded, in_turns, ahead = layouts = layouts_of(options, args, tmp_path)
    assert [layout.micro_batch_size for layout in layouts] == [256, 2 * 192, 2 * 192, 256, 256]
    assert [layout.name for layout in (one, two, sharded)] == ["1 process", "2 processes", "2 processes, FSDP2"]
    assert ("--multi_gpu" in one.command, "--multi_gpu" in two.command) == (False, True)
    config = yaml.safe_load(Path(sharded.command[sharded.command.index("--config_file") + 1]).read_text())
    assert (config["distributed_type"], config["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert in_turns.arguments == ("--placement", "env:0 rollout:0 actor:1", "--max-staleness", "0")
    assert ahead.arguments[-1] == "1"
    assert (in_turns.uncounted, ahead.uncounted) == (1, 2)


def test_the_first_iteration_is_not_counted(tmp_path: Path):
    row = measure(python(RUN), ["--preset", "demo"], tmp_path, timeout_s=60)
    assert (row["total_s"], row["env_s"], row["learner_idle_s"]) == (4.0, 2.0, None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('no such preset'); sys.exit(3)", "^ended with code 3; .*\nno such preset"),
        ("import time; time.sleep(60)", "^ended with code none within 2 s; "),
    ],
)
def test_a_run_that_fails_or_hangs_says_the_end_of_its_output(tmp_path: Path, code: str, message: str):
    with pytest.raises(RuntimeError, match=message):
        measure(python(code), [], tmp_path, timeout_s=2 if "sleep" in code else 60)


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """What the program returns, on a machine without a GPU; raises SystemExit as it does."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    return scaling.main()


def test_rows_are_told_in_the_order_asked_for_up_to_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = tmp_path / "result.json"

    def measured(layout: Layout, shared: list[str], folder: Path, timeout_s: float) -> dict[str, Any]:
        seen.append(layout.name)
        given = dict(zip(shared[::2], shared[1::2], strict=False))
        assert given["--minibatch-size"] == "48"
        assert layout.micro_batch_size == {"1 process": 16, "2 processes": 24}.get(layout.name.split(",")[0], 48)
        if len(seen) > 1:  # the row before is in the file, whatever becomes of this one
            assert json.loads(output.read_text())["results"]["layouts"][0]["where"] == "2 processes, FSDP2"
        if layout.name == "4 processes":
            raise RuntimeError("ended with code 1")
        if layout.name == "1 process":
            raise KeyboardInterrupt
        return dict.fromkeys(("total_s", *scaling.PHASES), 1.0) | dict(env_steps_per_s=10.0 * len(seen), memory_gb=None)

    seen: list[str] = []
    monkeypatch.setattr(scaling, "measure", measured)
    sizes = (
        "--preset",
        "demo",
        "--num-envs",
        "12",
        "--num-steps",
        "4",
        "--micro-batch-size",
        "20",
        "--output",
        str(output),
    )
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *sizes, "--fsdp", "2", "--processes", "4", "2", "1", "--fsdp", "3")
    assert seen == ["2 processes, FSDP2", "4 processes", "2 processes", "1 process"]
    assert ended.value.code == "4 processes: ended with code 1\n\ninterrupted in '1 process'"
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "12 environments x 4 decisions, minibatches of 48, micro-batches of 16 a process"
    document = json.loads(last)
    assert document["settings"]["minibatch-size"] == 48
    assert document["settings"]["micro-batch-size-of-a-process"] == 16
    rows = [(row["where"], row["speedup"]) for row in document["results"]["layouts"]]
    assert rows == [("2 processes, FSDP2", 1.0), ("2 processes", 3.0)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset demo", "nothing to measure: give --processes, --fsdp or --placements"),
        ("--preset demo --processes 1 --num-envs 0", "--num-envs: 0 is out of range"),
        ("--preset demo --processes 1 --num-iterations 0", "--num-iterations: 0 is out of range"),
        ("--preset demo --processes 1 --micro-batch-size 0", "--micro-batch-size: 0 is out of range"),
        ("--preset demo --processes 0", "--processes: 0 is out of range"),
        ("--preset demo --processes 1 2 --num-envs 9", "num_envs=9 cannot be shared by 2 process(es)"),
        ("--preset demo --fsdp 4 --num-envs 12 --num-steps 7", "minibatch_size=42 cannot be shared by 4 process(es)"),
        ("--preset demo --placements env:cpu*3", "gives rollout and actor no place"),
        ("--preset demo --placements rollout:cpu*3", "gives actor no place"),
        ("--processes 1", "physics='warp' simulates on a GPU, and PyTorch finds no CUDA device"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, message: str
):
    monkeypatch.setattr(scaling, "measure", None)
    monkeypatch.setattr("algorithms.common.placement.check_installed", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_placement_whose_roles_cannot_share_the_sizes_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("algorithms.common.placement.check_installed", lambda: None)
    for placement, message in (
        ("env:cpu rollout:cpu actor:cpu*5", "minibatch_size=64 cannot be shared by 5 process(es)"),
        ("env:cpu rollout:0 actor:cpu", "puts rollout on GPU 0, and the cluster has 0 GPU(s)"),
    ):
        with pytest.raises(SystemExit):
            main(monkeypatch, "--preset", "demo", "--placements", placement)
        assert message in capsys.readouterr().err
