"""Collecting demonstrations: what is kept, that it is deterministic and goes on after an interruption, and replays."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from algorithms import collect_demos
from algorithms.collect_demos import Args, Attempt, Trajectory, make_attempt, record, start_episode
from algorithms.common.command_line import launch
from gr00t_agent.lerobot import LeRobotDataset
from libero_gym.experts import ExpertConfig
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.protocol import RendererUnavailableError, RenderState
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from tools import show_dataset


class BlankRenderer:
    name = "egl"

    def render(self, simulations: Any) -> np.ndarray:
        return np.full((len(simulations), 2, 16, 16, 3), 100, np.uint8)

    def close(self) -> None:
        pass


def fake_record(attempt: Attempt, config: ExpertConfig, make_demonstrator: Any) -> Trajectory:
    """Attempts 1 and 2 of each task fail; the rest takes 3 steps plus its number."""
    failure = "not solved within 240 steps" if attempt.attempt_id in (1, 2) else None
    length = 0 if failure else 3 + attempt.attempt_id
    rng = np.random.default_rng(attempt.seed)
    actions = rng.uniform(-1, 1, (length, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(length) % 2, 1.0, -1.0)
    view = RenderState(np.zeros(1), np.zeros((0, 7)), np.zeros(0))
    states = rng.normal(size=(length, 8)).astype(np.float32)
    return Trajectory(attempt=attempt, failure=failure, states=states, actions=actions, views=[view] * length)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(collect_demos, "record", fake_record)
    monkeypatch.setattr(collect_demos, "make_renderer", lambda *_, **__: BlankRenderer())
    monkeypatch.setattr(
        collect_demos, "render", lambda renderer, trajectory, _: renderer.render(trajectory.views).swapaxes(0, 1)
    )


def small_args(folder: Path, **changes: Any) -> Args:
    defaults: dict[str, Any] = dict(
        output=folder / "data", task_ids=(4, 7), episodes_per_task=3, image_size=16, storage="image"
    )
    return Args(**(defaults | changes))


def test_the_first_successes_of_each_task_are_kept(faked, tmp_path):
    report = collect_demos.main(small_args(tmp_path))["tasks"]
    for task_id in (4, 7):
        assert (report[task_id]["kept"], report[task_id]["discarded"]) == (3, 2)
        assert report[task_id]["reasons"] == {"not solved within 240 steps": 2}
        assert (report[task_id]["length_min"], report[task_id]["length_max"]) == (3, 7)
    dataset = LeRobotDataset(tmp_path / "data")
    assert [entry.length for entry in dataset.episodes] == [3, 6, 7, 3, 6, 7]
    assert [entry.instruction for entry in dataset.episodes][2:4] == [
        get_task("libero_spatial", i).language for i in (4, 7)
    ]
    assert dataset.episodes[1].info["init_state_id"] == 3
    # -1 open / +1 close became 1 open / 0 close.
    assert dataset.action[:3, 6].tolist() == [1.0, 0.0, 1.0]
    expected = fake_record(make_attempt(small_args(tmp_path), get_task("libero_spatial", 4), 0), ExpertConfig(), None)
    np.testing.assert_array_equal(dataset.action[:3, :6], expected.actions[:, :6])
    assert not (tmp_path / "data.staged").exists()
    collection = json.loads((tmp_path / "data" / "meta" / "collection.json").read_text())
    assert collection["args"]["seed"] == 0
    with pytest.raises(FileExistsError, match="give another output"):
        collect_demos.main(small_args(tmp_path))


def test_an_interrupted_collection_goes_on(faked, tmp_path, monkeypatch):
    made: list[tuple[int, int]] = []

    def counted(attempt: Attempt, config: ExpertConfig, make_demonstrator: Any) -> Trajectory:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((attempt.task_id, attempt.attempt_id))
        return fake_record(attempt, config, make_demonstrator)

    with monkeypatch.context() as patch:
        patch.setattr(collect_demos, "record", counted)
        with pytest.raises(KeyboardInterrupt):
            collect_demos.main(small_args(tmp_path))
        with pytest.raises(ValueError, match=r"was recorded otherwise \(seed was 0, now 1\)"):
            collect_demos.main(small_args(tmp_path, seed=1))
        first = list(made)
        made.clear()
        patch.setattr(
            collect_demos, "record", lambda *a: made.append((a[0].task_id, a[0].attempt_id)) or fake_record(*a)
        )
        collect_demos.main(small_args(tmp_path))
    assert not set(first) & set(made)
    collect_demos.main(small_args(tmp_path / "whole"))
    ours, whole = LeRobotDataset(tmp_path / "data"), LeRobotDataset(tmp_path / "whole" / "data")
    np.testing.assert_array_equal(ours.action, whole.action)
    np.testing.assert_array_equal(ours.state["state.x"], whole.state["state.x"])


def test_too_few_successes(faked, tmp_path, capsys):
    told = "tasks [4, 7] have only [1, 1] of 3 episodes after 3 attempts; raise --max-attempts-per-task"
    with pytest.raises(RuntimeError, match=re.escape(told)):
        collect_demos.main(small_args(tmp_path, max_attempts_per_task=3))
    with pytest.raises(SystemExit):
        launch(collect_demos.main, small_args(tmp_path, max_attempts_per_task=3))
    assert f"error: {told}" in capsys.readouterr().err
    report = collect_demos.main(small_args(tmp_path, max_attempts_per_task=3, allow_fewer=True))["tasks"]
    assert (report[4]["kept"], report[4]["discarded"]) == (1, 2)
    assert len(LeRobotDataset(tmp_path / "data").episodes) == 2


def test_what_cannot_begin_stages_nothing(faked, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"init_state_id=50 is not among the stored states of libero_spatial task 4"):
        collect_demos.main(small_args(tmp_path, init_state_ids=(0, 50)))

    def not_there(*inputs: Any, **options: Any) -> None:
        raise RendererUnavailableError

    with monkeypatch.context() as patch:
        patch.setattr(collect_demos, "make_renderer", not_there)
        with pytest.raises(RendererUnavailableError):
            collect_demos.main(small_args(tmp_path, init_state_ids=(0, 4)))
    collect_demos.main(small_args(tmp_path, init_state_ids=(0, 5)))


def test_staged_episodes_extend_a_dataset(faked, tmp_path):
    collect_demos.main(small_args(tmp_path, keep_staged=True))
    (tmp_path / "data").rename(tmp_path / "small")
    collect_demos.main(small_args(tmp_path, episodes_per_task=5, version="v3.0", allow_fewer=False))
    small, large = LeRobotDataset(tmp_path / "small"), LeRobotDataset(tmp_path / "data")
    assert [entry.length for entry in large.episodes][:5] == [3, 6, 7, 8, 9]
    assert large.info["codebase_version"] == "v3.0"
    np.testing.assert_array_equal(large.action[:16], small.action[:16])


def test_what_is_not_in_the_dataset_stays_staged(faked, tmp_path, capsys):
    collect_demos.main(small_args(tmp_path, episodes_per_task=4, keep_staged=True))
    (tmp_path / "data").rename(tmp_path / "both")
    staged = tmp_path / "data.staged"
    before = {path.name for path in staged.iterdir()}
    (staged / ".tmp-01234567-task_004_attempt_00009").mkdir()  # of a killed process

    collect_demos.main(small_args(tmp_path, task_ids=(4,)))
    assert f"7 more attempts are kept in {staged}" in capsys.readouterr().out
    # Of task 4 the fourth success, of task 7 everything.
    written = {f"task_004_attempt_{i:05d}{'.json' if i in (1, 2) else ''}" for i in range(5)}
    assert {path.name for path in staged.iterdir()} == before - written

    (tmp_path / "data").rename(tmp_path / "narrow")
    collect_demos.main(small_args(tmp_path, episodes_per_task=4))
    assert "are kept" not in capsys.readouterr().out
    assert not staged.exists()
    whole, again = LeRobotDataset(tmp_path / "both"), LeRobotDataset(tmp_path / "data")
    np.testing.assert_array_equal(again.action, whole.action)


def test_a_collection_goes_on_whether_a_preset_or_its_values_are_given(faked: None, tmp_path: Path):
    collect_demos.main(small_args(tmp_path, keep_staged=True))
    (tmp_path / "data").rename(tmp_path / "first")
    collect_demos.main(small_args(tmp_path, preset="fewshot"))
    first, again = LeRobotDataset(tmp_path / "first"), LeRobotDataset(tmp_path / "data")
    np.testing.assert_array_equal(again.action, first.action)


def test_a_collection_goes_on_under_its_renderer_and_mujoco(faked, tmp_path, monkeypatch):
    collect_demos.main(small_args(tmp_path, keep_staged=True))
    collection = json.loads((tmp_path / "data" / "meta" / "collection.json").read_text())
    assert collection["args"]["renderer"] == "egl"  # though none was asked for
    (tmp_path / "data").rename(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(BlankRenderer, "name", "warp")
        with pytest.raises(ValueError, match=r"was recorded otherwise \(renderer was 'egl', now 'warp'\); remove it"):
            collect_demos.main(small_args(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(collect_demos.mujoco, "__version__", "0.0")
        with pytest.raises(ValueError, match=r"was recorded otherwise \(mujoco was '.*', now '0.0'\)"):
            collect_demos.main(small_args(tmp_path))
    file = tmp_path / "data.staged" / collect_demos.SETTINGS_FILE
    settings = json.loads(file.read_text())
    del settings["renderer"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"was recorded otherwise \(renderer was not kept, now 'egl'\)"):
        collect_demos.main(small_args(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_attempts_per_task": 2},
            r"max_attempts_per_task=2 is less than episodes_per_task=3, .*: give --max-attempts-per-task 3 or more",
        ),
        (
            {"task_ids": (4, 7, 4)},
            r"task_ids=\(4, 7, 4\) names tasks \[4\] more than once, .*; name each task only once",
        ),
    ],
)
def test_what_cannot_be_collected_is_told_before_anything_is(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect_demos.check_args(small_args(tmp_path, **changes))


def test_fewer_attempts_than_episodes_are_for_whoever_takes_fewer(faked, tmp_path):
    collect_demos.main(small_args(tmp_path, max_attempts_per_task=2, allow_fewer=True))
    assert len(LeRobotDataset(tmp_path / "data").episodes) == 2


def test_attempts_differ_and_do_not_depend_on_each_other(tmp_path):
    task = get_task("libero_spatial", 4)
    args = small_args(tmp_path, init_state_ids=(5, 9))
    attempts = [make_attempt(args, task, i) for i in range(4)]
    assert [attempt.init_state_id for attempt in attempts] == [5, 9, 5, 9]
    assert len({attempt.seed for attempt in attempts}) == 4
    assert make_attempt(replace(args, seed=1), task, 0).seed != attempts[0].seed
    assert make_attempt(args, get_task("libero_spatial", 5), 0).seed != attempts[0].seed
    assert make_attempt(args, task, 2) == attempts[2]
    combined = make_attempt(replace(args, suite="libero_40"), get_task("libero_goal", 5), 0)
    assert (combined.suite, combined.task_id, combined.horizon) == ("libero_40", 25, 320)


@pytest.mark.slow
def test_an_experts_episode_is_rendered_recorded_and_replays(tmp_path):
    args = Args(
        output=tmp_path / "data", task_ids=(0,), episodes_per_task=1, image_size=32, storage="image",
        object_shift=0.01, renderer="warp", render_batch_size=16,
    )  # fmt: skip
    collect_demos.main(args)
    dataset = LeRobotDataset(tmp_path / "data")
    info = dataset.episodes[0].info
    task = get_task(info["suite"], info["task_id"])
    attempt = make_attempt(args, task, 0)
    assert (attempt.init_state_id, attempt.seed) == (info["init_state_id"], info["seed"])
    sim = Simulation(load_scene(task))
    start_episode(sim, task, attempt)
    moved = sim.data.qpos.copy()
    for i, action in enumerate(dataset.action):
        for key, value in zip(dataset.data_config.state_keys[:6], sim.states(), strict=False):
            assert dataset.state[key][i, 0] == value
        env_action = action.copy()
        env_action[6] = 1.0 - 2.0 * action[6]
        assert not sim.success()
        sim.step(env_action)
    assert sim.success()
    start_episode(sim, task, replace(attempt, object_shift=0.0))
    difference = np.abs(moved - sim.data.qpos)
    assert 1e-3 < difference.max() < 0.03
    images = dataset.images(np.arange(len(dataset))).numpy().astype(int)
    assert images.std() > 20
    changes = np.abs(np.diff(images, axis=0)).mean((2, 3, 4))  # [T - 1, 2]
    assert (changes.mean(0) > 0.5).all()  # both views move
    failed = record(replace(attempt, horizon=5), ExpertConfig())
    assert failed.failure == "not solved within 5 steps"
    assert len(failed.actions) == 0


class Resting:
    """A demonstrator that knows of no mistakes."""

    def reset(self, sim: Simulation, rng: np.random.Generator) -> None: ...

    def act(self, sim: Simulation) -> np.ndarray:
        return np.zeros(7, np.float32)


def test_who_makes_no_mistakes_is_not_asked_for_them():
    attempt = make_attempt(Args(output=Path("unused"), horizon=2), get_task("libero_spatial", 0), 0)
    assert record(attempt, ExpertConfig(), lambda task, config: Resting()).failure == "not solved within 2 steps"
    with pytest.raises(ValueError, match=r"expert.mistakes=0.5 is for a demonstrator .* and Resting has none"):
        record(attempt, ExpertConfig(mistakes=0.5), lambda task, config: Resting())


def test_a_collection_begun_before_a_setting_of_experts_was_there_goes_on(tmp_path):
    args = small_args(tmp_path)
    folder = tmp_path / "data.staged"
    collect_demos.Staging(folder, args)
    settings = json.loads((folder / collect_demos.SETTINGS_FILE).read_text())
    del settings["expert"]["mistakes"]
    (folder / collect_demos.SETTINGS_FILE).write_text(json.dumps(settings))
    collect_demos.Staging(folder, args)
    with pytest.raises(ValueError, match=r"expert was .*'mistakes': 0.0.*, now .*'mistakes': 0.5"):
        collect_demos.Staging(folder, replace(args, expert=ExpertConfig(mistakes=0.5)))


@pytest.mark.slow
def test_what_is_recorded_begins_after_a_mistake():
    task = get_task("libero_object", 0)
    args = Args(output=Path("unused"), suite="libero_object")
    attempts = [make_attempt(args, task, number) for number in range(4)]
    careless = ExpertConfig(mistakes=1.0)
    records = [record(attempt, careless) for attempt in attempts]
    attempt, mended = next(pair for pair in zip(attempts, records, strict=True) if pair[1].first_step > 0)
    whole = record(attempt, ExpertConfig())
    assert (whole.first_step, whole.failure, mended.failure) == (0, None, None)
    assert mended.first_step > 20
    assert len(mended.states) == len(mended.actions) == len(mended.views) > 20
    assert mended.actions[0, 6] == -1.0
    assert mended.states[0, 6] - mended.states[0, 7] < 0.02 < whole.states[0, 6] - whole.states[0, 7]
    again = record(attempt, careless)
    np.testing.assert_array_equal(again.actions, mended.actions)
    late = record(replace(attempt, horizon=mended.first_step + 5), careless)
    assert late.failure == f"not solved within {mended.first_step + 5} steps"
    images, cameras = np.zeros((1, len(mended.actions), 8, 8, 3), np.uint8), ["camera"]
    assert collect_demos.to_episode(mended, images, cameras, "language").info["first_step"] == mended.first_step


def test_a_dataset_is_shown(faked, tmp_path):
    collect_demos.main(small_args(tmp_path))
    options = dict(dataset=str(tmp_path / "data"), output=tmp_path / "shown", moments=3, view_size=20, videos=True)
    path = show_dataset.main(show_dataset.Args(**options))
    with Image.open(path) as sheet:
        assert sheet.size == (3 * 20, 2 * (16 + 2 * 20))
        assert sheet.getpixel((5, 30)) == (100, 100, 100)
    assert sorted(p.name for p in (tmp_path / "shown").glob("*.mp4")) == ["episode_000000.mp4", "episode_000003.mp4"]
    with pytest.raises(ValueError, match="moments=0"):
        show_dataset.main(show_dataset.Args(**(options | {"moments": 0})))


def test_what_stands_on_an_object_is_moved_with_it():
    scene = load_scene(get_task("libero_spatial", 5))  # the bowl on the ramekin, another on the cookies
    args = Args(output=Path("unused"), object_shift=0.02)
    shifts = collect_demos.object_shifts(
        scene, get_task("libero_spatial", 5), make_attempt(args, get_task("libero_spatial", 5), 0)
    )
    np.testing.assert_array_equal(shifts["akita_black_bowl_1"], shifts["glazed_rim_porcelain_ramekin_1"])
    np.testing.assert_array_equal(shifts["akita_black_bowl_2"], shifts["cookies_1"])
    assert np.abs(shifts["plate_1"] - shifts["cookies_1"]).min() > 0
    assert max(np.abs(shift).max() for shift in shifts.values()) <= 0.02
    drawer = get_task("libero_spatial", 4)
    np.testing.assert_array_equal(
        collect_demos.object_shifts(scene, drawer, make_attempt(args, drawer, 0))["akita_black_bowl_1"], 0
    )
