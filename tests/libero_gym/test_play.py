"""Watching and steering: `python -m libero_gym.play`."""

import sys
from pathlib import Path

import av
import pytest

from libero_gym import play
from libero_gym.env import LiberoEnv
from tests.preloaded import run_environments

OWN = """
import numpy as np
calls = []
def make():
    def policy(observation):
        calls.append(observation["images"].shape)
        return np.tile([0, 0, 0.5, 0, 0, 0, -1], (4, 1))
    return policy
"""


def test_a_policy_of_ones_own_is_filmed_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_lifting_policy.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    options = ["--task-id", "3", "--horizon", "5", "--render-size", "64", "--video", "films"]
    assert play.main([*options, "--policy", "own_lifting_policy:make", "--num-episodes", "2"]) == [False, False]
    assert sys.modules["own_lifting_policy"].calls == [(256, 256, 3)] * 4  # a chunk of four at a time
    films = sorted((tmp_path / "films").glob("*.mp4"))
    assert [film.name for film in films] == [f"libero_spatial-3-episode-{i}.mp4" for i in range(2)]
    with av.open(str(films[0])) as film:
        (stream,) = film.streams
        assert (stream.width, stream.height, float(stream.average_rate)) == (64, 64, 20.0)
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert len(frames) in (5, 6)  # the reset's and one a step; MoviePy rounds away the last of some lengths
    assert (frames[0] != frames[-1]).any()


def test_a_policy_for_evaluations_is_watched(tmp_path: Path):
    file = Path(__file__).resolve().parents[2] / "examples" / "policy_to_evaluate.py"
    options = ["--horizon", "6", "--render-size", "32", "--num-episodes", "2", "--video", str(tmp_path / "films")]
    assert play.main([*options, "--policy", f"{file}:make"]) == [False, False]
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 2


def test_a_seed_decides_what_the_random_policy_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(play, "make_expert", None)  # none is needed
    ends = []
    for seed, num_episodes in ((3, 2), (3, 2), (4, 1)):
        env = LiberoEnv("libero_goal", task_id=0, observe_images=False, horizon=5)
        play.play(env, "random", num_episodes=num_episodes, seed=seed, init_state_id=0, window=None)
        ends.append(env.observe()["states"].tolist())
    assert ends[0] == ends[1] == ends[2]  # the second episode of seed 3 is the first of seed 4


@pytest.mark.slow
def test_the_expert_solves_what_one_watches(tmp_path: Path):
    options = ["--task-id", "3", "--init-state-id", "0", "--render-size", "32", "--video", str(tmp_path / "films")]
    assert play.main(options) == [True]


def test_keys_move_the_hand_as_the_picture_shows():
    assert play.keyboard_action([]).tolist() == [0, 0, 0, 0, 0, 0, -1]
    assert play.keyboard_action(["up", "w", "space"]).tolist() == [-0.5, 0, 0.5, 0, 0, 0, 1]
    assert play.keyboard_action(["left", "right", "j"]).tolist() == [0, 0, 0, 0, 0, 0.5, -1]


STEERED = """
import numpy as np
from libero_gym import play, window
held = iter([["up", "w"]] * 6 + [["backspace"]] + [["w"]] * 2 + [["escape"]])
window.Window.pressed_keys = lambda self: next(held)
assert play.main(["--task-id", "3", "--policy", "keyboard", "--render-size", "32"]) == []
assert next(held, None) is None
"""


def test_the_keyboard_steers_in_a_window():
    pytest.importorskip("pygame", reason="pygame is an extra")
    run_environments(STEERED, SDL_VIDEODRIVER="dummy", PYGAME_HIDE_SUPPORT_PROMPT="1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "clever"], "policy='clever' is unknown (valid: 'expert', 'keyboard', 'random', package.module:m"),
        (["--policy", "expret"], "policy='expret' is unknown; did you mean 'expert'? (valid:"),
        (["--policy", "./policy.py"], "policy='./policy.py' is unknown (valid: 'expert', 'keyboard', 'random', packa"),
        (["--policy", "no_such_module:make"], "there is no module no_such_module here or installed"),
        (["--policy", "./no_such_file.py:make"], "there is no file no_such_file.py; give its path"),
        (["--policy", "math:no_such"], "defines no function or class 'no_such' (it has: "),
        (["--policy", "builtins:int"], "policy='builtins:int' returned 0; expected a function of the observation that"),
        (["--num-episodes", "0"], "--num-episodes 0 is not a positive number of episodes"),
        (["--policy", "keyboard"], "--policy keyboard needs a window; leave --video out"),
        (["--task-id", "12"], "task_id=12 is not in libero_spatial (valid: 0-9)"),
        (["--suite", "libero_spacial"], "libero_spatial"),
    ],
)
def test_bad_arguments_end_in_a_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        play.main([*arguments, "--video", str(tmp_path / "films")])
    assert message in capsys.readouterr().err


def test_what_a_policys_package_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lacking_package").mkdir()
    (tmp_path / "lacking_package" / "__init__.py").write_text("import what_is_not_installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'what_is_not_installed'"):
        play.load_policy("lacking_package.policy:make")


def test_without_a_display_it_says_how_to_film(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        play.main([])
    assert "--video FOLDER" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(play, "check_usable", lambda: None)  # as with a display
    with pytest.raises(SystemExit, match="2"):
        play.main(["--task-id", "99"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("task_id=99 is not in libero_spatial (valid: 0-9)")


def test_actions_of_another_width_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "short.py").write_text("make = lambda: lambda observation: [0] * 6")
    with pytest.raises(SystemExit):
        play.main(["--policy", f"{tmp_path}/short.py:make", "--horizon", "2", "--video", str(tmp_path / "films")])
    assert "the policy's actions have shape (6,); expected (7,) or (C, 7)" in capsys.readouterr().err
