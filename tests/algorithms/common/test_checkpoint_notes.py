"""What checkpoints say of themselves, and what trainers and evaluations make of it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from algorithms import compare_gr00t, dsrl_gr00t, grpo_gr00t, ppo_gr00t
from algorithms.common.checkpoint_notes import note_suite, settings_of, suite_of, suite_to_play, tell_start
from examples.own_agent_in_ppo import MLPAgent
from tests.algorithms.line_trainer import make_args

FILES = ("policy_config.json", "state_agent.json", "noise_actor.json")


def checkpoint(folder: Path, file: str = "policy_config.json", **content: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("file", FILES)
def test_the_suite_is_read_from_every_kind_of_policy(tmp_path: Path, file: str):
    assert suite_of(checkpoint(tmp_path, file, trained_on={"suite": "libero_goal"})) == "libero_goal"
    for says_nothing in ({}, {"trained_on": None}, {"trained_on": {}}, {"trained_on": {"data": "x"}}):
        assert suite_of(checkpoint(tmp_path, file, **says_nothing)) is None


def test_released_weights_and_presets_say_no_suite(tmp_path: Path):
    assert suite_of(str(tmp_path)) is None
    assert suite_of("nano") is None
    with pytest.raises(FileNotFoundError, match=r"checkpoint 'no/such/one' is no folder and no hub name"):
        suite_of("no/such/one")


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("libero_goal", r"policy_config\.json: trained_on='libero_goal' is not allowed here"),
        ({"suite": 3}, r"policy_config\.json: trained_on\.suite=3 is not allowed here"),
    ],
)
def test_a_damaged_note_is_refused(tmp_path: Path, note: Any, message: str):
    with pytest.raises(ValueError, match=message):
        suite_of(checkpoint(tmp_path, trained_on=note))


def test_the_given_suite_comes_first_then_that_of_the_checkpoints(tmp_path: Path):
    goal = checkpoint(tmp_path / "goal", trained_on={"suite": "libero_goal"})
    other_goal = checkpoint(tmp_path / "other_goal", trained_on={"suite": "libero_goal"})
    assert suite_to_play("libero_10", goal) == "libero_10"
    assert suite_to_play(None, goal) == "libero_goal"
    assert suite_to_play(None, goal, other_goal) == "libero_goal"


def test_without_a_suite_the_error_lists_them(tmp_path: Path):
    goal = checkpoint(tmp_path / "goal", trained_on={"suite": "libero_goal"})
    spatial = checkpoint(tmp_path / "spatial", trained_on={"suite": "libero_spatial"})
    silent = checkpoint(tmp_path / "silent")
    listed = r"give --suite \(valid: libero_spatial, libero_object, libero_goal, libero_10, .*libero_40"
    with pytest.raises(ValueError, match=rf"and such a policy does not say which one it was trained on: {listed}"):
        suite_to_play(None)
    with pytest.raises(ValueError, match=rf"suite is not given, and .*silent does not say which one .*{listed}"):
        suite_to_play(None, silent)
    with pytest.raises(ValueError, match=r"not all trained on the same \(.*goal: libero_goal; .*spatial: libero_spat"):
        suite_to_play(None, goal, spatial)
    with pytest.raises(ValueError, match=r"not all trained on the same \(.*goal: libero_goal; .*silent: does not say"):
        suite_to_play(None, goal, silent)


def test_a_comparison_plays_the_suite_of_all_its_checkpoints(tmp_path: Path):
    def args(*suites: str) -> compare_gr00t.Args:
        folders = [checkpoint(tmp_path / f"{i}_{suite}", trained_on={"suite": suite}) for i, suite in enumerate(suites)]
        return compare_gr00t.Args(checkpoints=tuple(folders), output_dir=tmp_path / "out")

    assert args("libero_goal", "libero_goal").played_suite == "libero_goal"
    with pytest.raises(ValueError, match="not all trained on the same"):
        compare_gr00t.check_args(args("libero_goal", "libero_10"))
    with pytest.raises(ValueError, match="suite='mine' is not installed"):
        compare_gr00t.check_args(args("mine", "mine"))


def test_only_agents_that_keep_notes_get_one():
    kept, other = SimpleNamespace(trained_on=None), SimpleNamespace()
    for agent in (kept, other):
        note_suite(agent, "libero_goal")
    assert kept.trained_on == {"suite": "libero_goal"}
    assert not vars(other)
    note_suite(kept, None)
    assert kept.trained_on is None


# --- what trainers tell at their start ---


def test_overridden_settings_are_told_in_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = {"num_action_chunks": 10, "denoising_steps": 8, "noise_level": 0.5}
    model = checkpoint(tmp_path, policy=policy, trained_on={"suite": "libero_10"})
    assert settings_of(model) == {"num_action_chunks": 10, "denoising_steps": 8}
    tell_start(ppo_gr00t.Args(model=model))
    assert capsys.readouterr().out.splitlines() == [
        f"num_action_chunks=5, but {model} says 10: --num-action-chunks 10 keeps what it was trained with",
        f"denoising_steps=4, but {model} says 8: --denoising-steps 8 keeps what it was trained with",
        f"suite=libero_spatial, but {model} says libero_10: --suite libero_10 keeps what it was trained with",
    ]
    for same in (
        ppo_gr00t.Args(model=model, num_action_chunks=10, denoising_steps=8, suite="libero_10"),
        dsrl_gr00t.Args(model=checkpoint(tmp_path)),  # says nothing
        ppo_gr00t.Args(model=model, resume=tmp_path),
    ):
        tell_start(same)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
def test_a_start_without_hope_is_told(trainer: str, capsys: pytest.CaptureFixture[str]):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    for changes, start in (
        (dict(), "libero_spatial"),
        (dict(suite="libero_goal", model="state"), "libero_goal"),
        (dict(suite="libero_90"), "libero_spatial"),
    ):
        tell_start(module.Args(**changes))
        (told,) = capsys.readouterr().out.splitlines()
        assert "starts from random weights" in told
        assert "--preset demo" in told
        assert f"--model checkpoints/{start}_fewshot" in told
    for hopeful in (module.Args(steps_before_success=(3,)), *module.PRESETS.values()):
        if not str(hopeful.model).startswith("RLinf/"):  # on the hub
            tell_start(hopeful)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("algorithm", "trainer"), [("ppo", ppo_gr00t), ("grpo", grpo_gr00t)])
def test_trainers_tell_it_before_they_begin_but_not_of_an_agent_of_ones_own(
    algorithm: str, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def open_run(*_: Any, **__: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(trainer, "open_run", open_run)
    with pytest.raises(InterruptedError):
        trainer.main(make_args(algorithm, tmp_path))
    assert "starts from random weights" in capsys.readouterr().out
    with pytest.raises(InterruptedError):
        trainer.main(make_args(algorithm, tmp_path), lambda args: MLPAgent(("state.x",), 1, 2))
    assert "starts from random weights" not in capsys.readouterr().out
