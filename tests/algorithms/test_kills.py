"""Killed at each of its file operations and resumed, a run is the run that was never killed."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from algorithms import sft_gr00t
from algorithms.common.resume import checkpoints_in
from tests.algorithms.line_trainer import logged, train
from tests.algorithms.sft_trainer import fine_tune
from tests.gr00t_agent.lerobot_data import write_dataset
from tests.kills import Killed, killed_at, states_at_kills

ALGORITHMS = ("ppo", "grpo", "dsrl", "sft")
# Every iteration is saved, and all but the last deleted.
SAVING: dict[str, Any] = dict(save_interval=1, keep_last=1, keep_best=0)
SMALL: dict[str, dict[str, Any]] = {
    "ppo": dict(num_envs=4, num_steps=2, minibatch_size=8, micro_batch_size=8, update_epochs=1),
    "grpo": dict(num_envs=4, group_size=2, num_groups=1, max_rollouts=1, num_minibatches=1, update_epochs=1),
    "dsrl": dict(num_envs=4, num_steps=2, replay_capacity=12, num_updates=2, minibatch_size=8),
    "sft": dict(num_steps=2, batch_size=2, micro_batch_size=2, log_interval=2, ema_decay=0.9),
}


class Interrupted(Exception):
    pass


class Run:
    """A run of three iterations, or two steps, that can be broken off after the first.

    Args:
        algorithm: of `ALGORITHMS`.
        data: where demonstrations are made.
    """

    def __init__(self, algorithm: str, data: Path) -> None:
        self._algorithm, self._data = algorithm, data
        if algorithm == "sft":
            write_dataset(data, "v3.0", "image", lengths=(3, 3))
            self.run(data.parent / "decoded", None)  # so that later ones find the frames

    def run(self, folder: Path, resume: Any) -> None:
        options = SAVING | SMALL[self._algorithm] | dict(resume=resume)
        if self._algorithm == "sft":
            fine_tune(folder, self._data, cache_dir=self._data.parent, **options)
        else:
            train(self._algorithm, folder, num_iterations=3, **options)

    def begin(self, folder: Path) -> None:
        if self._algorithm != "sft":
            train(self._algorithm, folder, num_iterations=1, **SAVING, **SMALL[self._algorithm])
            return
        learning_rate_at = sft_gr00t.learning_rate_at

        def break_off(step: int, args: Any) -> float:
            if step == 2:
                raise Interrupted
            return learning_rate_at(step, args)

        with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
            patch.setattr(sft_gr00t, "learning_rate_at", break_off)
            self.run(folder, None)


def runs_in(folder: Path) -> list[Path]:
    """The runs of a folder, oldest first."""
    paths = [path for path in folder.iterdir() if (path / "args.json").is_file()] if folder.is_dir() else []
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def assert_equal(run: Path, whole: Path) -> None:
    assert logged(run) == logged(whole)
    ((done, ours),), ((all_done, theirs),) = checkpoints_in(run), checkpoints_in(whole)
    assert done == all_done
    for file in theirs.rglob("*.safetensors"):
        values, expected = load_file(ours / file.relative_to(theirs)), load_file(file)
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], expected[name]) for name in expected), file
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_goes_on_is_killed_anywhere(tmp_path: Path, algorithm: str):
    """It drops metrics, writes arguments anew, saves and deletes checkpoints; at no moment is there none."""
    trainer = Run(algorithm, tmp_path / "data")
    trainer.run(tmp_path / "whole", None)
    (whole,) = runs_in(tmp_path / "whole")
    trainer.begin(tmp_path / "begun")
    with (tmp_path / "begun" / whole.name / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "env/succ')
    with states_at_kills(tmp_path / "begun", tmp_path / "killed") as states:
        trainer.run(tmp_path / "begun", "auto")
    assert_equal(tmp_path / "begun" / whole.name, whole)
    assert len(states) > 15
    for state in states:
        (run,) = runs_in(state)
        assert checkpoints_in(run), state
        trainer.run(state, "auto")
        assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_begins_is_killed_anywhere(tmp_path: Path, algorithm: str):
    """Until its first checkpoint is there another one begins in its place."""
    trainer = Run(algorithm, tmp_path / "data")
    trainer.run(tmp_path / "whole", None)
    (whole,) = runs_in(tmp_path / "whole")
    with states_at_kills(tmp_path / "begun", tmp_path / "killed") as states:
        trainer.begin(tmp_path / "begun")
    assert len(states) > 10
    for state in states:
        had_checkpoint = any(checkpoints_in(run) for run in runs_in(state))
        trainer.run(state, "auto")
        runs = runs_in(state)
        assert_equal(runs[-1], whole)
        assert not (had_checkpoint and len(runs) > 1)


@pytest.mark.parametrize("number", [1, 20, 45])
def test_what_is_kept_is_what_a_kill_leaves(tmp_path: Path, number: int):
    trainer = Run("ppo", tmp_path / "data")
    with states_at_kills(tmp_path / "kept", tmp_path / "states") as states:
        trainer.begin(tmp_path / "kept")
    with killed_at(number), pytest.raises(Killed):
        trainer.begin(tmp_path / "killed")

    def names_in(folder: Path) -> set[str]:
        """Without the random part of temporary names."""
        return {re.sub(r"\.tmp-[^-]+-", ".tmp-", str(path.relative_to(folder))) for path in folder.rglob("*")}

    assert names_in(tmp_path / "killed") in [names_in(state) for state in states]
