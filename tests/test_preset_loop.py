"""The benchmark of a preset of PPO: rows that fail or are interrupted, and sizes that cannot work."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from algorithms.common.resume import StopSignal
from algorithms.ppo_gr00t import Args
from benchmarks import preset_loop

SMALL = ("--preset", "libero_spatial_24gb", "--random-weights", "--recipes", "--num-envs", "4", "--num-steps", "6")


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """What the program returns; raises SystemExit as it does."""
    monkeypatch.setattr(sys, "argv", ["preset_loop.py", *words])
    return preset_loop.main()


def write_metrics(args: Args) -> None:
    """What a trainer writes; the first line is of the iteration that is not counted."""
    run = args.output_dir / args.run_name
    run.mkdir()
    names = ("time/total_s", "time/env_s", "time/env_wait_s", "time/policy_s", "time/update_s")
    lines = [dict.fromkeys(names, s) | {"charts/SPS": 10.0 * args.update_epochs} for s in (9.0, 2.0, 2.0)]
    assert len(lines) == args.num_iterations
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rows_before_an_interruption_and_beside_a_failure_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The trainer itself catches the signal, and ends by SystemExit as soon as it can."""

    def train(args: Args, make_agent: Any, make_envs: Any) -> None:
        trained.append(args)
        if len(trained) > 1:  # the rows before are in the file, whatever becomes of this one
            written = json.loads(output.read_text())["results"]["variants"]
            assert [row["variant"] for row in written] == ["as it is", "and 1 epoch"][: 1 + (len(trained) > 3)]
        if len(trained) == 2:
            raise FloatingPointError("not finite")
        if len(trained) == 4:
            with StopSignal(Accelerator()) as stop:
                os.kill(os.getpid(), signal.SIGINT)
                stop.check()
        write_metrics(args)

    trained: list[Args] = []
    monkeypatch.setattr("algorithms.ppo_gr00t.main", train)
    output = tmp_path / "result.json"
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *SMALL, "--num-iterations", "2", "--output", str(output))
    failed, interrupted = str(ended.value.code).split("\n\n")
    assert failed.startswith("2 stages: Traceback")
    assert "FloatingPointError: not finite" in failed
    assert interrupted == "interrupted in 'and VL frozen'"
    printed = capsys.readouterr().out
    assert "\n2 stages: failed; Traceback" in printed
    assert "\nFloatingPointError: not finite\n" in printed
    *_, last = printed.splitlines()
    document = json.loads(last)
    assert document == json.loads(output.read_text())
    rows = [(row["variant"], row["env_steps_per_s"], row["speedup"]) for row in document["results"]["variants"]]
    assert rows == [("as it is", 20.0, 1.0), ("and 1 epoch", 10.0, 0.5)]
    assert document["settings"] | dict(minibatch_size=24, micro_batch_size=12) == document["settings"]


@pytest.mark.parametrize(
    ("num_steps", "name", "num_kept"),
    [(5, "and a fifth", 1), (15, "and a fifth", 3), (2, "and 1/2", 1), (8, "and 1/4", 2), (24, "and 5/24", 5)],
)
def test_a_recipe_updates_by_a_fifth_or_the_nearest_part_that_there_is(num_steps: int, name: str, num_kept: int):
    args = Args(num_envs=8, num_steps=num_steps, minibatch_size=8, micro_batch_size=8)
    recipes = preset_loop.recipes_of(args)
    assert list(recipes)[-1] == "and compiled"
    assert recipes.pop(name).num_epoch_minibatches(1) == num_kept
    assert all(recipe.update_fraction == 1 for recipe in recipes.values())


def test_of_a_single_minibatch_no_part_is_a_recipe():
    args = Args(num_envs=8, num_steps=1, minibatch_size=8, micro_batch_size=8)
    assert all(recipe.update_fraction == 1 for recipe in preset_loop.recipes_of(args).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-envs", "0"), "--num-envs: 0 is out of range (valid: 1 or more)"),
        (("--num-iterations", "0"), "--num-iterations: 0 is out of range (valid: 1 or more)"),
        (("--minibatch-size", "0"), "--minibatch-size: 0 is out of range (valid: 1 or more)"),
        (("--num-envs", "5"), "pipeline_stage_num=2 must divide the 5 environments of a process"),
        (("--physics", "warp"), "physics='warp' simulates on a GPU, and PyTorch finds no CUDA device"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("algorithms.ppo_gr00t.main", None)
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *SMALL, *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
