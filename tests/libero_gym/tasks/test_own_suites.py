"""Suites of one's own: a folder of BDDL files becomes an id that everything takes."""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import libero_gym
from libero_gym.env import LiberoEnv
from libero_gym.experts import make_expert
from libero_gym.tasks import own_suites
from libero_gym.tasks.assets import check_models, missing_assets, model_files
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.initial_states import count_init_states, load_recorded_states
from libero_gym.tasks.scenes import scene_key
from libero_gym.tasks.suites import libero_root, list_named_suites, list_tasks, load_init_states, load_problem
from libero_gym.tasks.vocabulary import check_vocabulary, joint_predicates, object_types, problem_names
from libero_gym.vector import LiberoVectorEnv

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "data" / "own_suite"


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(own_suites.VARIABLE, "")
    libero_gym.register_suite("mine", FOLDER)
    return "mine"


def test_files_become_tasks(mine: str):
    tasks = libero_gym.list_tasks(mine)
    assert [task.name for task in tasks] == ["put_the_cream_cheese_on_the_bowl", "put_the_cream_cheese_on_the_plate"]
    assert tasks[1].language == "Put the cream cheese on the plate, please"
    assert mine in libero_gym.list_suites()
    assert "libero_gym/mine-v0" in gymnasium.registry
    assert libero_gym.horizon(mine) == 480
    assert libero_gym.register_suite("mine", str(FOLDER)) == tasks  # once more changes nothing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_states_are_drawn_by_liberos_sampler_and_at_rest(mine: str):
    task = libero_gym.get_task(mine, 1)
    states, recorded = load_init_states(task), load_recorded_states(task, "settled")
    assert len(states) == len(recorded.physics) == 50
    assert len(np.unique(states, axis=0)) == 50
    env = gymnasium.make("libero_gym/mine-v0", task_id=1, observe_images=False)
    simulation = None
    for init_state_id in (0, 49):
        observation, info = env.reset(seed=0, options={"init_state_id": init_state_id})
        assert not info["success"]
        assert observation["task_descriptions"] == task.language
        simulation = env.unwrapped.simulation
        cheese = simulation.data.xpos[simulation.scene.objects["cream_cheese_1"].body_id].copy()
        x, y = cheese[:2] - simulation.scene.reference_pos[:2]
        assert -0.17 < x < -0.05  # the file's region, whose radius LIBERO keeps inside
        assert -0.13 < y < 0.03
        for _ in range(20):
            env.step(np.array([0, 0, 0, 0, 0, 0, -1], np.float32))
        moved = simulation.data.xpos[simulation.scene.objects["cream_cheese_1"].body_id] - cheese
        assert np.linalg.norm(moved) < 2e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_environments_and_experts_take_it(mine: str):
    envs = gymnasium.make_vec("libero_gym/mine-v0", num_envs=2, observe_images=False, task_id=1)
    _, infos = envs.reset(seed=0, options={"init_state_id": np.array([3, 4])})
    assert infos["task_id"].tolist() == [1, 1]
    state = envs.unwrapped.get_state(1)
    single = LiberoEnv(libero_gym.get_task(mine, 1), observe_images=False)  # a task stands for suite and number
    single.reset(seed=0, options={"init_state_id": 4})
    for name in ("physics", "fixture_poses"):
        np.testing.assert_array_equal(single.get_state()[name], state[name])
    expert = make_expert(single.task)
    expert.reset(single.simulation, np.random.default_rng(0))
    terminated = truncated = False
    while not (terminated or truncated):
        *_, terminated, truncated, info = single.step(expert.act(single.simulation))
    assert info["success"]
    envs.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_physics_takes_it(mine: str):
    pytest.importorskip("mujoco_warp", reason="the extra warp-physics is not installed")
    options = dict(observe_images=False, task_ids=[0, 1])
    warp, cpu = (LiberoVectorEnv(mine, 2, physics=physics, **options) for physics in ("warp", "cpu"))
    start = dict(seed=0, options={"task_id": np.array([0, 1]), "init_state_id": 2})
    for env in (warp, cpu):
        env.reset(**start)
    action = np.tile(np.array([0.2, 0, 0.1, 0, 0, 0, -1], np.float32), (2, 1))
    found, expected = warp.step(action)[0], cpu.step(action)[0]
    np.testing.assert_allclose(found["states"], expected["states"], atol=1e-5)
    warp.close()


def test_programs_and_children_are_told_by_the_environment(mine: str):
    command = "import libero_gym; print(*[task.name for task in libero_gym.list_tasks('mine')])"
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert process.stdout.split() == [task.name for task in libero_gym.list_tasks(mine)]
    by_hand = {**os.environ, own_suites.VARIABLE: f"mine={FOLDER}"}
    again = subprocess.run([sys.executable, "-c", command], env=by_hand, capture_output=True, text=True, check=True)
    assert again.stdout == process.stdout


def test_stored_states_are_taken_where_they_are_given(mine: str, tmp_path: Path):
    states = np.zeros((3, 1 + 30 + 28))
    for file in FOLDER.glob("*.bddl"):
        np.savez(tmp_path / f"{file.stem}.pruned_init.npz", states=states)
    tasks = libero_gym.register_suite("stored", FOLDER, tmp_path)
    assert load_init_states(tasks[0]).shape == states.shape
    assert LiberoEnv("stored", observe_images=False).options.init_states == "original"


def test_an_edited_file_is_another_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (FOLDER / "put_the_cream_cheese_on_the_plate.bddl").read_text("utf-8")
    file = tmp_path / "a.bddl"
    file.write_text(text, "utf-8")
    np.savez(tmp_path / "a.npz", states=np.ones((3, 59)))
    (before,) = libero_gym.register_suite("edited", tmp_path, tmp_path)
    key, goal = scene_key(before), load_problem(before).goal
    assert count_init_states(before, "original") == 3
    env = LiberoEnv("edited", observe_images=False)

    file.write_text(text.replace("(On cream_cheese_1 plate_1)", "(On plate_1 cream_cheese_1)"), "utf-8")  # as long
    (other_goal,) = libero_gym.list_tasks("edited")
    assert load_problem(other_goal).goal == (("on", "plate_1", "cream_cheese_1"),)
    assert (scene_key(other_goal), load_problem(before).goal) == (key, goal)  # what is running goes on as it was

    file.write_text(text.replace("0.02 -0.05", "0.03 -0.05").replace("please", "now"), "utf-8")
    np.savez(tmp_path / "a.npz", states=np.ones((4, 59)))
    (tmp_path / "b.bddl").write_text(text, "utf-8")
    np.savez(tmp_path / "b.npz", states=np.ones((2, 59)))
    after = libero_gym.register_suite("edited", tmp_path, tmp_path)
    assert [task.language[-6:] for task in after] == ["e, now", "please"]
    assert [count_init_states(task, "original") for task in after] == [4, 2]
    assert scene_key(after[0]) != key
    command = "import libero_gym; print([task.digest for task in libero_gym.list_tasks('edited')])"
    process = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == str([task.digest for task in after])  # a child sees the same

    unread = replace(before, language="what has not been read before it was edited")
    for read in (load_init_states, load_problem, scene_key):
        with pytest.raises(ValueError, match=r"a.bddl or its .*: take it anew by libero_gym.get_task\('edited', 0\),"):
            read(unread)
    assert env._known_task(0) == before  # by its number, whatever has become of the file


@pytest.mark.parametrize(
    ("name", "folder", "error", "message"),
    [
        ("my suite", FOLDER, ValueError, "name='my suite' cannot be part of an id"),
        ("libero_goal", FOLDER, ValueError, "is a suite of LIBERO's; give another name"),
        ("mine", FOLDER.parent, ValueError, "'mine' is registered already, as 'mine=.*own_suite'"),
        ("other", FOLDER / "no", FileNotFoundError, "no is not a folder"),
        ("other", FOLDER.parent, FileNotFoundError, "has no .bddl files for the suite 'other'"),
    ],
)
def test_what_cannot_be_registered_is_refused(mine: str, name: str, folder: Path, error: type, message: str):
    with pytest.raises(error, match=message):
        libero_gym.register_suite(name, folder)
    assert libero_gym.list_suites()[-1] == mine


@pytest.mark.parametrize(
    ("word", "other", "message"),
    [
        (
            "- akita_black_bowl",
            "- akita_black_bowll",
            "'akita_black_bowll' is no type .*did you mean 'akita_black_bowl'",
        ),
        (
            "- akita_black_bowl",
            "- zzz",
            r"'zzz' is no type of LIBERO's objects \(valid: akita_black_bowl, alphabet_soup",
        ),
        ("- table", "- kitchen_table", r"'kitchen_table' is no type of fixtures of libero_tabletop_manipulation \("),
        ("LIBERO_Tabletop", "LIBERO_Table", r"'libero_table_manipulation' is none of LIBERO's problems \(did you mean"),
        (
            "(On plate_1 ",
            "(On plate_2 ",
            r"'plate_2' is neither an object, a fixture nor a region of the file \(did you",
        ),
        (
            "plate_1 - plate",
            "plate_1 - red_box",
            r"'red_box' is an object whose model .*/custom_objects/red_box/red_box.xml the installed LIBERO has not",
        ),
        ("(And (On cream_cheese_1", "(And (On cheese_1", r"'cheese_1' is neither .*did you mean 'cream_cheese_1'"),
        (
            "main_table_plate_region",
            "main_table_plate",
            r"'main_table_plate' is neither .*did you mean 'main_table_plat",
        ),
    ],
)
def test_words_that_there_are_not_are_refused_at_once(
    word: str, other: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (FOLDER / "put_the_cream_cheese_on_the_bowl.bddl").read_text("utf-8")
    assert word in text
    (tmp_path / "typo.bddl").write_text(text.replace(word, other), "utf-8")
    with pytest.raises(ValueError, match=rf"typo.bddl: {message}"):
        libero_gym.register_suite("typo", tmp_path)
    assert "typo" not in libero_gym.list_suites()
    monkeypatch.setenv(own_suites.VARIABLE, f"typo={tmp_path}")
    with pytest.raises(ValueError, match=rf"typo.bddl: {message}"):
        libero_gym.get_task("typo", 0)


GOAL = "(And (On cream_cheese_1 akita_black_bowl_1))"
GOALS = {
    "(And (Onn cream_cheese_1 plate_1))": r"'onn' is no predicate in \(:goal ...\) \(did you mean 'on'\?\)",
    "(And (Up cream_cheese_1))": r"'up' is no predicate in \(:goal ...\) \(valid: close, in, on, open, turno",
    "(And (In cream_cheese_1 plate_1))": r"\(in .*\) in \(:goal ...\): 'plate_1' is no region \(valid: \(In obj",
    "(And (On cream_cheese_1))": r"'on' takes two names \(valid: \(On object object-or-region\)\)",
    "(And (Open plate_1 cream_cheese_1))": r"'open' takes one name",
    "(And (Open plate_1))": r"'plate' is no type that can be asked for 'open', as microwave, .*, yellow_cabinet can",
    "(And (Open main_table_plate_region))": r"'table' is no type that can be asked for 'open'",
    "(And (On cream_cheese_1 main_table))": r"'main_table' is the workspace; name a region of it",
    "(And (On main_table_plate_region plate_1))": r"'main_table_plate_region' is a region, not an object",
    "(Or (On cream_cheese_1 plate_1))": r"\(or \(on .*\)\) in its goal is not supported: a goal is one atom or \(And ",
    "(And (Not (On cream_cheese_1 plate_1)))": r"\(not \(on .*\)\) in its goal is not supported",
    "(And (On (plate_1) cream_cheese_1))": r"\(on \(plate_1\) cream_cheese_1\) is no atom: write \(On object region\)",
    "(And)": r"it has no goal: write \(:goal \(And \(On object region\) ...\)\)",
    "()": "it has no goal",
    "": "it has no goal",
}
FORMS = [
    ("(problem LIBERO_Tabletop_Manipulation)", "(problem)", r"\(problem ...\) takes one name, such as \(problem LIB"),
    ("(:domain robosuite)", "()", r"\(\) is no section, such as \(:objects ...\)"),
    ("(:domain robosuite)", "(:objects)", r"it has the section \(:objects ...\) twice"),
    ("(:target main_table)", "", r"region 'plate_region' has no \(:target thing\)"),
    ("(:target main_table)", "(:target)", r"region 'plate_region' has \(:target\) \(valid: \(:target thing\)"),
    ("(:target main_table)", "(:targets main_table)", r"region 'plate_region' has \(:targets main_table\) \(valid"),
    ("(plate_region", "((plate_region)", r"\(\(plate_region\) .* in \(:regions ...\) is no region: write \(name"),
    ("0.02 -0.05", "0.02x -0.05", r"'plate_region' has \(0.02x .*\) in \(:ranges ...\), which is not 4 numbers"),
    ("0.02 -0.05", "nan -0.05", r"'plate_region' has \(nan .*\) in \(:ranges ...\), which is not 4 numbers"),
    ("0.02 -0.05 0.08", "0.02 -0.05", r"has \(0.02 -0.05 0.01\) in \(:ranges ...\), which is not 4 numbers"),
    ("((0.02 -0.05 0.08 0.01))", "(0.02 -0.05 0.08 0.01)", r"has 0.02 in \(:ranges ...\), which is not 4 numbers"),
    ("((0.02 -0.05 0.08 0.01))", "0.02", r"region 'plate_region' has \(:ranges 0.02\) \(valid: \(:ranges \(\(x_min"),
    ("0.02 -0.05 0.08", "0.12 -0.05 0.08", r"\(0.12 -0.05 0.08 0.01\) .* whose smallest x or y is larger than its l"),
    ("((0.02 -0.05 0.08 0.01))", "()", r"'main_table_plate_region' has no \(:ranges ...\), so that nothing can be"),
    ("plate_1 - plate\n", "plate_1 -\n", r"\(:objects ...\) has no type after a '-': write name - type"),
    ("plate_1 - plate\n", "- plate\n", r"\(:objects ...\) has no name before a '-': write name - type"),
    ("plate_1 - plate\n", "plate_1\n", r"\(:objects ...\) tells no type of plate_1: write plate_1 - type"),
    ("plate_1 - plate\n", "(plate_1) - plate\n", r"\(:objects ...\) has \(plate_1\) where a name is expected"),
    ("plate_1 - plate\n", "plate_1 - plate plate_2 - plate\n", r"\(:objects ...\) has the type 'plate' twice"),
    ("plate_1 - plate\n", "plate_1 plate_1 - plate\n", r"'plate_1' is declared twice; give one of the two ano"),
    ("(On plate_1 main", "(Onn plate_1 main", r"'onn' is no predicate in \(:init ...\)"),
    ("(On plate_1 main_table_plate_region)", "plate_1", r"plate_1 is no atom: write \(On object region\)"),
]


@pytest.mark.parametrize(("word", "other", "message"), [*((GOAL, *goal) for goal in GOALS.items()), *FORMS])
def test_what_is_no_task_of_liberos_form_is_refused_at_once(word: str, other: str, message: str, tmp_path, monkeypatch):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (FOLDER / "put_the_cream_cheese_on_the_bowl.bddl").read_text("utf-8")
    assert word in text
    (tmp_path / "broken.bddl").write_text(text.replace(word, other, 1), "utf-8")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/broken.bddl: .*{message}"):
        libero_gym.register_suite("broken", tmp_path)
    assert "broken" not in libero_gym.list_suites()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("akita_black_bowl", r"'top' is no region of 'akita_black_bowl' \(valid: none\)"),
        ("wooden_cabinet", r"'top' is no region of 'wooden_cabinet' \(valid: bottom_region, .*top_region, top_side\)"),
    ],
)
def test_regions_that_a_model_has_not_are_refused_at_once(target: str, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (FOLDER / "put_the_cream_cheese_on_the_bowl.bddl").read_text("utf-8")
    text = text.replace("- akita_black_bowl", f"- {target}").replace(GOAL, GOAL.replace("bowl_1", "bowl_1_top"))
    text = text.replace("(:regions", "(:regions (top (:target akita_black_bowl_1))")
    (tmp_path / "region.bddl").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=rf"region.bddl: {message}"):
        libero_gym.register_suite("region", tmp_path)


def test_states_that_cannot_be_drawn_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    shutil.copy(FOLDER / "put_the_cream_cheese_on_the_bowl.bddl", tmp_path / "a.bddl")
    with pytest.raises(ModuleNotFoundError, match=r"drawing initial states of .*a.bddl needs mujoco, .*give stored"):
        libero_gym.register_suite("undrawn", tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"state": np.ones((2, 59))}, r"has no array 'states' \(it has: state\); rename it"),
        ({"states": np.ones((0, 59))}, r"holds an array of shape \(0, 59\); expected numbers \[num_states, 1 \+ nq"),
        ({"states": np.ones(59)}, r"holds an array of shape \(59,\)"),
        ({"states": np.array([["a"]])}, "holds values of type <U1"),
        ({"states": np.array([[0.0], [np.nan]])}, "holds values that are not finite, such as in row 1"),
        (None, "is no .npz file; write it by numpy.savez"),
    ],
)
def test_stored_states_that_are_none_are_refused_at_once(arrays, message: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    shutil.copy(FOLDER / "put_the_cream_cheese_on_the_bowl.bddl", tmp_path / "a.bddl")
    if arrays is None:
        (tmp_path / "a.npz").write_bytes(b"")
    else:
        np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"{tmp_path}/a.npz {message}"):
        libero_gym.register_suite("stateless", tmp_path, tmp_path)


def test_all_of_liberos_files_pass():
    root = libero_root()
    tasks = [task for suite in list_named_suites() for task in list_tasks(suite)]
    assert len(tasks) > 800
    for task in tasks:
        problem = read_problem(task.bddl_file)
        check_vocabulary(problem, task.bddl_file, root)
        if not missing_assets(problem, root):
            check_models(problem, task.bddl_file, root)


LIVE = """
import json, os
from libero_gym.tasks.assets import assets_root
from libero_gym.tasks.scene_builder import import_libero
from libero_gym.tasks.suites import libero_root
envs = import_libero()
from robosuite.models.objects import MujocoXMLObject

class Read(Exception):
    pass

def read(self, path, **_):
    raise Read(os.path.relpath(path, assets_root(libero_root())))

MujocoXMLObject.__init__ = read
models = {}
for name, make in envs.OBJECTS_DICT.items():
    try:
        make(name="thing")
    except Read as file:
        models[name] = str(file)

def knows(make, method):
    try:
        getattr(make, method)(None, 0.0)
    except (AttributeError, TypeError):  # of what it is made without
        return hasattr(make, method)
    except NotImplementedError:
        return False

methods = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}
joints = {name: [p for p, m in methods.items() if knows(make, m)] for name, make in envs.OBJECTS_DICT.items()}
print(json.dumps([list(envs.OBJECTS_DICT), list(envs.bddl_base_domain.TASK_MAPPING), models, joints]))
"""


def test_the_words_are_those_that_libero_registers():
    ended = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, text=True, check=True)
    types, problems, models, joints = json.loads(ended.stdout.splitlines()[-1])
    assert object_types(libero_root()) == set(types)
    assert problem_names(libero_root()) == set(problems)
    assert {name: set(known) for name, known in joint_predicates(libero_root()).items()} == {
        name: set(known) for name, known in joints.items()
    }
    assert model_files(libero_root()) == models
    assert set(types) - set(models) == {"target_zone"}  # the only one that is made of no file


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("libero_spatial=FOLDER", ValueError, "SUITES: name='libero_spatial' is a suite of LIBERO's; give another"),
        ("libero_40=FOLDER", ValueError, "SUITES: name='libero_40' is a suite of LIBERO's; give another name"),
        ("my suite=FOLDER", ValueError, "SUITES holds 'my suite=.*': name='my suite' cannot be part of an id"),
        ("mine=/no/such", FileNotFoundError, "SUITES holds 'mine=/no/such': /no/such is not a folder"),
        ("mine=FOLDER=/no/such", FileNotFoundError, "SUITES holds 'mine=.*': /no/such is not a folder"),
        ("mine=FOLDER/..", FileNotFoundError, "SUITES holds 'mine=.*': .* has no .bddl files"),
        ("mine=BINARY", ValueError, "SUITES holds 'mine=.*': .*/._a.bddl is no BDDL file in UTF-8"),
        ("mine", ValueError, "SUITES holds 'mine': expected name=folder or name=folder=states"),
        ("mine=FOLDER:mine=FOLDER=FOLDER", ValueError, "SUITES has 'mine' twice, with different folders"),
    ],
)
def test_the_environments_entries_are_checked_alike(
    value: str, error: type, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "._a.bddl").write_bytes(b"\x00\x05\x16\x07\xff")  # as another system leaves beside a file
    folders = value.replace("FOLDER", str(FOLDER)).replace("BINARY", str(tmp_path))
    monkeypatch.setenv(own_suites.VARIABLE, folders)
    libero_gym.register_envs()
    asking = [libero_gym.list_suites, lambda: libero_gym.get_task("libero_spatial", 0)]
    suites = {"libero_spatial", *(["mine"] if value.startswith("mine") else [])}  # whose ids are registered
    asking += [functools.partial(gymnasium.make, f"libero_gym/{suite}-v0") for suite in suites]
    for ask in asking:
        with pytest.raises(error, match=message) as refusal:
            ask()
        assert "direct cause" not in "".join(traceback.format_exception(refusal.value))


@pytest.mark.parametrize(
    "command",
    [
        "algorithms/ppo_gr00t.py --preset demo",
        "algorithms/grpo_gr00t.py --preset demo",
        "algorithms/dsrl_gr00t.py --preset libero_spatial_nano",
        "algorithms/async_ppo_gr00t.py --preset libero_spatial_nano",
        "algorithms/sft_gr00t.py --preset nano --dataset a/b --suite libero_spatial",
        "algorithms/eval_gr00t.py --checkpoint nano",
        "algorithms/compare_gr00t.py --checkpoints checkpoints/libero_spatial_fewshot checkpoints/libero_spatial_rl",
        "algorithms/collect_demos.py --output no_such_folder",
        "-m libero_gym.play --video no_such_folder",
        "-m libero_gym export --suite libero_spatial --out no_such_folder/suite.tar.xz",
    ],
)
def test_programs_tell_a_bad_entry_in_one_message(command: str):
    environment = {**os.environ, own_suites.VARIABLE: "mine=/no/such", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert ended.stderr.endswith("error: LIBERO_GYM_SUITES holds 'mine=/no/such': /no/such is not a folder\n")
    assert not (ROOT / "no_such_folder").exists()


def test_any_sentence_is_in_the_observation_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (FOLDER / "put_the_cream_cheese_on_the_plate.bddl").read_text("utf-8")
    sentence = 'Räum auf! Cheese/plate: "please"? ' + "Now. " * 110
    (tmp_path / "tidy.bddl").write_text(text.replace("Put the cream cheese on the plate, please", sentence), "utf-8")
    np.savez(tmp_path / "tidy.npz", states=np.zeros((3, 1 + 30 + 28)))
    libero_gym.register_suite("tidy", tmp_path, tmp_path)
    (task,) = libero_gym.list_tasks("tidy")
    assert task.language == sentence.strip()
    for env in (LiberoEnv(task, observe_images=False), LiberoVectorEnv(task, 1, observe_images=False).envs[0]):
        assert env.observation_space["task_descriptions"].contains(task.language)
    liberos = LiberoEnv("libero_goal", observe_images=False).observation_space
    assert not liberos["task_descriptions"].contains(task.language)


def test_a_task_that_is_no_suites_is_refused(mine: str):
    task = libero_gym.get_task(mine, 0)
    with pytest.raises(ValueError, match="make a suite of your own BDDL files by"):
        LiberoEnv(libero_gym.TaskSpec(**{**vars(task), "language": "Do something else"}), observe_images=False)
    with pytest.raises(ValueError, match="were given with one task"):
        LiberoEnv(task, task_id=1, observe_images=False)
