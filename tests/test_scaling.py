"""The benchmark of where PPO's parts run: what it launches, and what it makes of runs that end, fail or hang."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from benchmarks.iterations import summarise
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
    return Layout(name="a run", command=(sys.executable, "-c", code))


def test_layouts_are_launched_as_a_user_does(tmp_path: Path):
    options: Any = SimpleNamespace(processes=[1, 2], fsdp=[2], placements=["env:0 rollout:0 actor:1"], staleness=[0, 1])
    one, two, sharded, in_turns, ahead = layouts_of(options, tmp_path)
    assert [layout.name for layout in (one, two, sharded)] == ["1 process", "2 processes", "2 processes, FSDP2"]
    assert ("--multi_gpu" in one.command, "--multi_gpu" in two.command) == (False, True)
    config = yaml.safe_load(Path(sharded.command[sharded.command.index("--config_file") + 1]).read_text())
    assert (config["distributed_type"], config["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
    assert in_turns.arguments == ("--placement", "env:0 rollout:0 actor:1", "--max-staleness", "0")
    assert ahead.arguments[-1] == "1"
    assert (in_turns.uncounted, ahead.uncounted) == (1, 2)


def test_rates_are_of_all_counted_steps_and_seconds():
    lines = [{"time/total_s": 2.0, "charts/SPS": 100.0}, {"time/total_s": 6.0, "charts/SPS": 20.0, "time/env_s": 1.0}]
    summary = summarise(lines)
    assert summary["env_steps_per_s"] == (200 + 120) / 8
    assert summary["total_s"] == 4
    assert summary["env_s"] is None  # the trainer has it not


def test_the_first_iteration_is_not_counted(tmp_path: Path):
    row = measure(python(RUN), ["--preset", "demo"], tmp_path, timeout_s=60)
    assert (row["total_s"], row["env_s"], row["learner_idle_s"]) == (4.0, 2.0, None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('no such preset'); sys.exit(3)", "a run ended with code 3; .*\nno such preset"),
        ("import time; time.sleep(60)", "a run ended with code none within 2 s; "),
    ],
)
def test_a_run_that_fails_or_hangs_says_the_end_of_its_output(tmp_path: Path, code: str, message: str):
    with pytest.raises(RuntimeError, match=message):
        measure(python(code), [], tmp_path, timeout_s=2 if "sleep" in code else 60)
