"""Any number of cameras, with poses and fields of view of one's own."""

import dataclasses
import re
from pathlib import Path

import mujoco
import numpy as np
import pytest

import libero_gym
from libero_gym.env import LiberoEnv
from libero_gym.rendering import cameras as cameras_module
from libero_gym.rendering.cameras import Camera, check_cameras, list_cameras, place_camera
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv
from tests.preloaded import run_environments

TASK = get_task("libero_90", 86)  # whose textures are few and small
ABOVE = Camera(name="above", pos=(0.0, 0.0, 2.2), look_at=(0.0, 0.0, 0.9), fovy_deg=40)
ON_HAND = Camera(name="on_hand", pos=(0.1, 0.0, 0.0), look_at=(0.0, 0.0, 0.2), body="robot0_right_hand")


def test_the_scenes_cameras_are_listed():
    cameras = list_cameras(TASK)
    assert {"agentview", "robot0_eye_in_hand", "frontview", "birdview"} <= set(cameras)
    assert cameras["robot0_eye_in_hand"].fovy_deg == 75
    assert libero_gym.list_cameras is list_cameras


def test_any_number_of_cameras_is_observed():
    names = ["frontview", "agentview", ABOVE]
    env = LiberoEnv(TASK, image_size=24, camera_names=names, renderer="warp")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    images = [key for key in observation if key.endswith("images")]
    assert images == ["images", "wrist_images", "above_images"]
    envs = LiberoVectorEnv(TASK, 2, image_size=24, camera_names=names, renderer="warp", task_id=None)
    batched, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(batched)
    for key in images:
        np.testing.assert_array_equal(batched[key][0], observation[key])
    one = LiberoEnv(TASK, image_size=24, camera_names=["agentview"], renderer="warp")
    alone, _ = one.reset(seed=0)
    assert "wrist_images" not in alone
    np.testing.assert_array_equal(alone["images"], observation["wrist_images"])
    for each in (env, envs, one):
        each.close()


def test_a_camera_of_ones_own_can_equal_the_scenes():
    model = load_scene(TASK).physics_model
    place = place_camera(model, "agentview")
    axes = np.empty(9)
    mujoco.mju_quat2Mat(axes, place.quat_wxyz)
    twin = Camera(
        name="twin", pos=tuple(place.pos), look_at=tuple(place.pos - axes.reshape(3, 3)[:, 2]), fovy_deg=place.fovy_deg
    )
    found = place_camera(model, twin)
    assert found.body_id == place.body_id
    np.testing.assert_allclose(abs(found.quat_wxyz @ place.quat_wxyz), 1.0, atol=1e-3)  # LIBERO's is rounded
    narrow = place_camera(model, Camera(name="agentview", fovy_deg=20))
    np.testing.assert_array_equal(narrow.quat_wxyz, place.quat_wxyz)
    assert narrow.fovy_deg == 20


def test_a_camera_that_looks_straight_down_has_x_up():
    place = place_camera(load_scene(TASK).physics_model, ABOVE)
    axes = np.empty(9)
    mujoco.mju_quat2Mat(axes, place.quat_wxyz)
    np.testing.assert_allclose(axes.reshape(3, 3).T, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)


DRAW = """
import sys
import numpy as np
from libero_gym.env import LiberoEnv
from libero_gym.rendering.cameras import Camera
kind = sys.argv[1]
cameras = [
    Camera(name="above", pos=(0.0, 0.0, 2.2), look_at=(0.0, 0.0, 0.9), fovy_deg=40),
    Camera(name="on_hand", pos=(0.1, 0.0, 0.0), look_at=(0.0, 0.0, 0.2), body="robot0_right_hand"),
    Camera(name="agentview", fovy_deg=25),
]
env = LiberoEnv("libero_90", task_id=86, image_size=96, camera_names=cameras, renderer=kind)
observation, _ = env.reset(seed=0)
np.savez(sys.argv[2], *[observation[key] for key in ("images", "wrist_images", "agentview_images")])
"""


def test_renderers_agree_on_cameras_of_ones_own(gl_kinds, tmp_path):
    pictures = []
    for kind in ("warp", gl_kinds[0]):
        path = tmp_path / f"{kind}.npz"
        run_environments(DRAW, kind, str(path))
        with np.load(path) as archive:
            pictures.append([archive[name].astype(float) for name in archive.files])
    for ray_cast, drawn in zip(*pictures, strict=True):
        assert drawn.std() > 10
        psnr = 10 * np.log10(255**2 / np.mean((ray_cast - drawn) ** 2))
        assert psnr > 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="my camera"), "is not an identifier"),
        (dict(name="a", pos=(0, 0, 1)), "needs pos and look_at, or neither"),
        (dict(name="a", pos=(0, 0, 1), look_at=(0, 0, 1)), "stands where it looks at"),
        (dict(name="a", pos=(0, 1), look_at=(0, 0, 1)), "expected three finite numbers"),
        (dict(name="a", pos="abc", look_at=(0, 0, 1)), "has pos='abc'; expected three finite numbers"),
        (dict(name="a", pos=(0, 0, 1), look_at=3), "has look_at=3; expected three finite numbers"),
        (dict(name="agentview", fovy_deg=180), r"fovy_deg=180 \(valid: above 0, below 180\)"),
    ],
)
def test_impossible_cameras_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Camera(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name=5), r"camera name=5 is a int, not a name"),
        (dict(name="a", pos=(0, 0, 1), look_at=(0, 0, 0), body=5), r"camera body=5 is a int, not a name"),
        (dict(name="a", fovy_deg="60"), r"camera 'a' has fovy_deg='60', which is no number \(valid: above 0"),
        (dict(name="a", fovy_deg=True), r"fovy_deg=True, which is no number"),
    ],
)
def test_cameras_have_names_and_numbers(arguments, message):
    with pytest.raises(TypeError, match=message):
        Camera(**arguments)


@pytest.mark.parametrize("make", [LiberoEnv, LiberoVectorEnv])
def test_cameras_are_a_sequence(make):
    for cameras in (None, 3, (name for name in ["agentview"]), {"agentview"}):
        with pytest.raises(
            TypeError, match=r"camera_names=.*, not a sequence of cameras: give a list, such as \['agentv"
        ):
            make(TASK, camera_names=cameras)


@pytest.mark.parametrize("make", [LiberoEnv, LiberoVectorEnv])
def test_a_camera_on_a_body_that_is_not_there_is_refused_before_a_world_changes(make):
    place = dict(pos=(0, 0, 0.1), look_at=(0, 0, 0))
    wrong = Camera(name="hand", body="robot0_rigth_hand", **place)
    message = (
        r"camera 'hand' is on body 'robot0_rigth_hand', .*; did you mean 'robot0_right_hand'\? \(valid: robot0_base"
    )
    with pytest.raises(ValueError, match=message):
        make("libero_spatial", observe_images=False, camera_names=[wrong])

    # A body of some scenes: known when these are opened.
    plate = Camera(name="plate", body="wooden_cabinet_1_main", **place)
    env = make("libero_40", task_ids=[0, 10], observe_images=False, camera_names=[plate])
    env.reset(seed=0, options={"task_id": 0})
    states = [env.get_state()] if isinstance(env, LiberoEnv) else env.get_states()
    other = make("libero_40", task_ids=[10], observe_images=False)
    other.reset(seed=0)
    with pytest.raises(ValueError, match=r"body 'wooden_cabinet_1_main' is not in the scene \(bodies: "):
        env.reset(seed=3, options={"task_id": 10})
    with pytest.raises(ValueError, match=r"body 'wooden_cabinet_1_main' is not in the scene \(bodies: "):
        env.set_state(other.get_state()) if isinstance(env, LiberoEnv) else env.set_state(0, other.get_state(0))
    after = [env.get_state()] if isinstance(env, LiberoEnv) else env.get_states()
    for state, expected in zip(after, states, strict=True):
        assert all(np.array_equal(state[name], value) for name, value in expected.items())


def test_the_robots_bodies_are_those_of_every_scene():
    for suite, task_id in PROBLEMS:
        model = load_scene(get_task(suite, task_id)).physics_model
        names = {model.body(i).name for i in range(model.nbody)}
        assert {name for name in names if name.startswith(cameras_module._ROBOT_PREFIXES)} == set(
            cameras_module._ROBOT_BODIES
        )


def test_unknown_cameras_and_bodies_name_the_known_ones():
    model = load_scene(TASK).physics_model
    with pytest.raises(ValueError, match=r"camera 'topview' is not in the scene \(cameras: .*'agentview'"):
        place_camera(model, "topview")
    with pytest.raises(ValueError, match=r"body 'hand' is not in the scene \(bodies: .*'robot0_right_hand'"):
        place_camera(model, Camera(name="a", pos=(0, 0, 1), look_at=(0, 0, 0), body="hand"))
    with pytest.raises(TypeError, match=r"is not a sequence \(for one camera: \['agentview'\]\)"):
        LiberoEnv(TASK, camera_names="agentview")
    with pytest.raises(
        TypeError, match=r"takes a task, such as .*get_task\('libero_spatial', 0\) \(given: 'libero_goal'"
    ):
        list_cameras("libero_goal")  # pyright: ignore[reportArgumentType]


# One of each of LIBERO's problems: table, floor, kitchen, living room, study.
PROBLEMS = [("libero_spatial", 0), ("libero_object", 0), ("libero_10", 2), ("libero_10", 0), ("libero_90", 86)]


@pytest.mark.parametrize(("suite", "task_id"), PROBLEMS)
def test_what_scenes_have_is_known_before_they_are_opened(suite: str, task_id: int):
    task = get_task(suite, task_id)
    names = list(list_cameras(task))
    assert check_cameras(names, [task]) == tuple(names)
    with pytest.raises(ValueError, match="camera 'no_such_view' is not in the scene") as refusal:
        check_cameras(["no_such_view"], [task])
    assert f"(valid: {', '.join(sorted(names))}, or a libero_gym.Camera" in str(refusal.value)


@pytest.mark.parametrize("make", [LiberoEnv, LiberoVectorEnv])
def test_environments_refuse_a_camera_that_a_scene_has_not(make: type):
    with pytest.raises(
        ValueError, match=r"'agentveiw' is not in .* libero_spatial task 0; did you mean 'agentview'\? \("
    ):
        make("libero_spatial", camera_names=["agentveiw"])
    with pytest.raises(ValueError, match="camera 'wrist' is not in the scene of libero_spatial task 3 "):
        make("libero_spatial", task_id=3, camera_names=[Camera(name="wrist", fovy_deg=60)])
    with pytest.raises(ValueError, match="camera 'paperview' is not in the scene of libero_spatial task 0; "):
        make("libero_40", camera_names=["paperview"], task_ids=[30, 0])
    make("libero_40", camera_names=["paperview", ABOVE], task_ids=[30], observe_images=False)


def test_scenes_of_other_problems_tell_when_they_are_opened(tmp_path: Path):
    text = TASK.bddl_file.read_text()
    bddl_file = tmp_path / "own.bddl"
    bddl_file.write_text(re.sub(r"\(problem \w+\)", "(problem own_manipulation)", text, flags=re.IGNORECASE))
    assert read_problem(bddl_file).name == "own_manipulation"
    assert check_cameras(["own_view"], [dataclasses.replace(TASK, bddl_file=bddl_file)]) == ("own_view",)
