"""The Gymnasium environment's contract."""

import copy
import inspect
import pickle
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env

from libero_gym import window
from libero_gym.env import LiberoEnv
from libero_gym.options import VECTOR_ARGUMENTS, make_observation_space
from libero_gym.physics.simulation import PhysicsError, Simulation
from libero_gym.rendering.cameras import Camera
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task, list_suites, list_tasks
from libero_gym.vector import LiberoVectorEnv
from tests.preloaded import run_environments


def _make(suite="libero_goal", **options) -> LiberoEnv:
    return LiberoEnv(suite, **{"observe_images": False, **options})


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_goal"])
def test_conforms_to_gymnasium(suite: str):
    env = gymnasium.make(f"libero_gym/{suite}-v0", observe_images=False, render_size=32)
    check_env(env.unwrapped)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_object", "libero_10", "libero_90", "libero_130"])
def test_conforms_to_gymnasium_where_scenes_vary(suite: str):
    env = gymnasium.make(f"libero_gym/{suite}-v0", task_id=2, observe_images=False)
    check_env(env.unwrapped, skip_render_check=True)


def test_conforms_to_gymnasium_with_images():
    env = gymnasium.make("libero_gym/libero_goal-v0", image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped)


def test_images():
    env = LiberoEnv("libero_goal", task_id=1, image_size=48, render_mode="rgb_array")
    first, _ = env.reset(seed=0)
    second, *_ = env.step(np.ones(7, dtype=np.float32))
    for key in ("images", "wrist_images"):
        assert first[key].shape == (48, 48, 3)
        assert first[key].std() > 10  # something is to be seen
        assert not np.shares_memory(first[key], second[key])
        assert np.any(first[key] != second[key])
    assert np.any(first["images"] != first["wrist_images"])
    frame = env.render()
    assert frame is not None
    env.close()


@pytest.mark.parametrize("observe_images", [True, False])
def test_render_is_the_true_view_in_its_own_size(observe_images: bool):
    env = LiberoEnv(
        "libero_goal",
        task_id=1,
        image_size=48,
        observe_images=observe_images,
        render_mode="rgb_array",
        render_size=48,
        renderer="warp",
    )
    env.reset(seed=0)
    observation, *_ = env.step(np.ones(7, dtype=np.float32))
    frame = env.render()
    assert frame is not None
    plain = LiberoEnv("libero_goal", task_id=1, image_size=48, renderer="warp")
    plain.reset(seed=0)
    shown, *_ = plain.step(np.ones(7, dtype=np.float32))
    np.testing.assert_array_equal(frame, shown["images"][:, ::-1])  # observations are mirrored
    assert ("images" in observation) is observe_images
    state = env.get_state()
    env.step(np.ones(7, dtype=np.float32))
    assert (env.render() != frame).any()
    env.set_state(state)
    np.testing.assert_array_equal(env.render(), frame)
    assert LiberoEnv("libero_goal", observe_images=False).options.render_size == 512
    env.close()
    plain.close()


def test_human_rendering_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setitem(sys.modules, "pygame", None)
    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyNotInstalled, match="render_mode='human' needs pygame: install it with `pip install"):
        gymnasium.make("libero_gym/libero_goal-v0", observe_images=False, render_mode="human")
    assert _make().metadata["render_modes"] == ["rgb_array"]
    monkeypatch.setattr(window.importlib.util, "find_spec", lambda name: object())
    assert _make().metadata["render_modes"] == ["rgb_array", "human"]
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="render_mode='human' needs a display"):
        _make(render_mode="human")


HUMAN = """
import sys
import gymnasium, numpy as np, pygame
import libero_gym
env = gymnasium.make(
    "libero_gym/libero_goal-v0", task_id=1, observe_images=False, render_mode="human", render_size=64, renderer="warp"
)
env.reset(seed=0)
first = pygame.surfarray.array3d(pygame.display.get_surface())
env.step(np.ones(7, np.float32))
second = pygame.surfarray.array3d(pygame.display.get_surface())
assert env.render() is None
plain = gymnasium.make(
    "libero_gym/libero_goal-v0", task_id=1, observe_images=False, render_mode="rgb_array", render_size=64,
    renderer="warp",
)
plain.reset(seed=0)
assert (first == plain.render().swapaxes(0, 1)).all() and (first != second).any()
env.close()
"""


def test_human_rendering_shows_each_step():
    pytest.importorskip("pygame", reason="pygame is an extra")
    run_environments(HUMAN, SDL_VIDEODRIVER="dummy", PYGAME_HIDE_SUPPORT_PROMPT="1")


def test_text_can_be_left_out():
    env = _make(observe_text=False)
    observation, _ = env.reset(seed=0)
    assert set(observation) == set(env.observation_space.spaces) == {"states"}
    assert env.task_description == env.task.language


def test_one_task_or_several():
    assert _make(task_id=3).task_ids == (3,)
    env = _make(task_ids=[2, 5])
    assert {env.reset(seed=seed)[1]["task_id"] for seed in range(8)} == {2, 5}
    with pytest.raises(ValueError, match=r"task_id=3 was asked of an environment made for task_ids=\[2, 5\]"):
        env.reset(options={"task_id": 3})
    with pytest.raises(ValueError, match=r"task_id=1 and task_ids=\[2\] are both given; leave one of them out"):
        _make(task_id=1, task_ids=[2])
    message = r"task_ids=<gen.* is a generator, not a sequence of tasks: give a list, such as \[0, 3\]"
    with pytest.raises(ValueError, match=message):
        _make(task_ids=(task_id for task_id in range(3)))  # pyright: ignore[reportArgumentType]


def test_steps_after_the_end_go_on():
    env = _make(task_id=0, horizon=2)
    env.reset(seed=0)
    steps = [env.step(np.zeros(7, np.float32)) for _ in range(3)]
    assert [step[2:4] for step in steps] == [(False, False), (False, True), (False, True)]
    assert [step[4]["episode_length"] for step in steps] == [1, 2, 3]


def test_unknown_arguments_name_the_valid_ones():
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'imagesize'; did you mean 'image_size'\? \(valid: suite"
    ):
        gymnasium.make("libero_gym/libero_goal-v0", imagesize=3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'horizn'; did you mean 'horizon'\? \(valid:"):
        _make(horizn=3)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'film' \(valid: suite"):
        _make(film=3)


def test_what_vector_environments_alone_take_is_said_to_be_theirs():
    single, vector = (set(inspect.signature(cls.__init__).parameters) for cls in (LiberoEnv, LiberoVectorEnv))
    assert vector - single == set(VECTOR_ARGUMENTS)
    with pytest.raises(
        TypeError, match=r"'physics', which vector environments have: make one by gymnasium.make_vec \("
    ):
        gymnasium.make("libero_gym/libero_goal-v0", physics="warp")


@pytest.mark.parametrize("name", ["observe_images", "observe_depth", "observe_segmentation", "observe_text"])
def test_what_is_true_or_false_takes_nothing_else(name: str):
    for make in (LiberoEnv, LiberoVectorEnv):
        with pytest.raises(TypeError, match=rf"{name}='no' is not a boolean \(valid: True, False\)"):
            make("libero_goal", **{name: "no"})
    _make(**{name: np.False_})


def test_the_specification_says_the_horizon():
    env = gymnasium.make("libero_gym/libero_goal-v0", observe_images=False, horizon=7)
    assert env.spec is not None
    assert env.spec.max_episode_steps == env.unwrapped._max_episode_steps == 7
    assert gymnasium.make(env.spec).spec.max_episode_steps == 7
    assert (
        gymnasium.make("libero_gym/libero_goal-v0", observe_images=False, max_episode_steps=5).spec.max_episode_steps
        == 5
    )


@pytest.mark.parametrize(("options", "end"), [({}, 240), ({"horizon": 600}, 500), ({"horizon": 3}, 3)])
def test_gymnasiums_limit_only_shortens_episodes_and_the_specification_says_where_they_end(options, end):
    env = gymnasium.make(
        "libero_gym/libero_spatial-v0", task_id=3, observe_images=False, max_episode_steps=500, **options
    )
    assert env.spec is not None
    assert env.spec.max_episode_steps == end
    assert env.unwrapped.options.longest_horizon == options.get("horizon", 240)


def test_the_specification_is_one_of_gymnasiums():
    spec = gymnasium.make("libero_gym/libero_goal-v0", observe_images=False, max_episode_steps=5).spec
    assert spec is not None
    again = (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec), EnvSpec.from_json(spec.to_json()))
    assert all(other == spec and spec == other and other.max_episode_steps == 5 for other in again)
    assert gymnasium.make(spec).spec == spec != gymnasium.spec("libero_gym/libero_goal-v0")


def test_the_specification_of_a_combined_suite_says_the_horizon_of_its_tasks():
    horizons = {3: 240, 25: 320, (3, 25): 320, (3, 39): 480}
    for tasks, horizon in horizons.items():
        chosen = {"task_ids": tasks} if isinstance(tasks, tuple) else {"task_id": tasks}
        env = gymnasium.make("libero_gym/libero_40-v0", observe_images=False, **chosen)
        assert env.spec is not None
        assert env.spec.max_episode_steps == env.unwrapped._max_episode_steps == horizon


def test_placement_seed_equals_liberos_seed():
    """What LIBERO's own sampler places from `numpy.random.seed(5)` is tested in test_simulation.py."""
    env = _make(task_id=3, init_states="original")
    env.reset(seed=1, options={"init_state_id": 7, "placement_seed": 5})
    expected = Simulation(env.simulation.scene)
    expected.reset(env.task, 7, np.random.RandomState(5), init_states="original")
    np.testing.assert_array_equal(env.model.body_pos, expected.model.body_pos)
    np.testing.assert_array_equal(env.data.qpos, expected.data.qpos)
    env.reset(seed=5, options={"init_state_id": 7})
    assert (env.model.body_pos != expected.model.body_pos).any()
    with pytest.raises(ValueError, match="placement_seed=5 chooses where fixtures stand, which 'settled' states hold"):
        _make().reset(options={"placement_seed": 5})
    with pytest.raises(ValueError, match=r"placement_seed=-1 is not a seed .* \(valid: 0-4294967295\)"):
        env.reset(options={"placement_seed": -1})


def test_module_prefix_registers_the_ids():
    code = (
        "import gymnasium; env = gymnasium.make('libero_gym:libero_gym/libero_spatial-v0', task_id=3, "
        "observe_images=False); print(env.unwrapped.reset(seed=0)[1]['task_id'])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "3"


def test_same_seed_same_episode():
    episodes = []
    for seed in (4, 4, 5):
        env = _make()
        observation, info = env.reset(seed=seed)
        states = [observation["states"]]
        env.action_space.seed(0)
        states += [env.step(env.action_space.sample())[0]["states"] for _ in range(5)]
        episodes.append((info["task_id"], info["init_state_id"], np.array(states), env.model.body_pos.copy()))
    first, again, other = episodes
    assert first[:2] == again[:2] != other[:2]
    np.testing.assert_array_equal(first[2], again[2])
    np.testing.assert_array_equal(first[3], again[3])
    assert np.any(first[2] != other[2])


def test_resets_differ_without_a_new_seed():
    env = _make()
    env.reset(seed=0)
    drawn = {tuple(env.reset()[1][key] for key in ("task_id", "init_state_id")) for _ in range(8)}
    assert len(drawn) > 4


def test_reset_options_choose():
    env = _make()
    _, info = env.reset(seed=0, options={"task_id": 6, "init_state_id": 31})
    assert (info["task_id"], info["init_state_id"], info["episode_length"]) == (6, 31, 0)
    observation, *_, info = env.step(np.zeros(7, dtype=np.float32))
    assert observation["task_descriptions"] == get_task("libero_goal", 6).language
    assert (info["task_id"], info["init_state_id"], info["episode_length"]) == (6, 31, 1)


def test_observations_share_no_memory_and_no_element_is_constant():
    env = _make()
    observation, _ = env.reset(seed=1)
    states = [observation["states"]]
    rng = np.random.default_rng(0)
    for _ in range(10):
        states.append(env.step(rng.uniform(-1, 1, 7).astype(np.float32))[0]["states"])
        assert not np.shares_memory(states[-1], states[-2])
    assert np.all(np.ptp(np.array(states), axis=0) > 0)


def test_truncates_at_the_horizon():
    env = _make(horizon=3)
    env.reset(seed=0)
    flags = [env.step(np.zeros(7, dtype=np.float32))[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize(("suite", "task_id", "horizon"), [("libero_10", 1, 480), ("libero_40", 25, 320)])
def test_default_horizon_is_that_of_the_tasks_own_suite(suite, task_id, horizon):
    env = _make(suite, task_id=task_id)
    _, info = env.reset(seed=0)
    assert info["task_id"] == task_id
    env.set_state(env.get_state() | {"episode_length": np.array(horizon - 2)})
    assert [env.step(np.zeros(7, np.float32))[3] for _ in range(2)] == [False, True]


def test_tasks_of_a_combined_suite_are_numbered_in_it():
    env = _make("libero_40", task_ids=[25, 39])
    assert env.task_ids == (25, 39)
    with pytest.raises(ValueError, match=r"task_id=5 was asked of an environment made for task_ids=\[25, 39\]"):
        env.reset(options={"task_id": 5})


@pytest.mark.parametrize(
    ("reward", "expected"), [("sparse", [0.0, 1.0, 1.0, 0.0]), ("relative", [0.0, 1.0, 0.0, -1.0])]
)
def test_success_rewards_and_terminates(reward: str, expected: list[float]):
    env = _make(task_id=7, reward=reward)
    env.reset(seed=0)
    (knob,) = env.simulation.scene.objects["flat_stove_1"].joint_qpos_adr
    rewards, terminated, success = [], [], []
    for position in (0.0, 1.0, 1.0, 0.0):
        env.data.qpos[knob] = position
        env.data.qvel[:] = 0.0
        _, value, is_over, _, info = env.step(np.zeros(7, dtype=np.float32))
        rewards.append(value)
        terminated.append(is_over)
        success.append(info["success"])
    assert rewards == expected
    assert terminated == success == [False, True, True, False]


def test_model_and_data_are_live():
    env = _make()
    env.reset(seed=0)
    assert isinstance(env.model, mujoco.MjModel)
    before = env.data.time
    env.step(np.zeros(7, dtype=np.float32))
    assert env.data.time == pytest.approx(before + 0.05)


def test_close_twice():
    env = _make()
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(ValueError, match=r"the environment is closed; make a new one"):
        env.step(np.zeros(7, dtype=np.float32))


def test_every_instruction_is_in_the_observation_space():
    space = make_observation_space(8)["task_descriptions"]
    for suite in list_suites():
        for task in list_tasks(suite):
            assert space.contains(task.language), (suite, task.task_id)


@pytest.mark.parametrize("init_state_id", [7.9, "7", True, [3]])
def test_initial_states_are_chosen_by_integers(init_state_id):
    env = LiberoEnv("libero_spatial", observe_images=False)
    with pytest.raises(ValueError, match=r"is not an integer \(valid: 0-49\)"):
        env.reset(options={"init_state_id": init_state_id})
    simulation = Simulation(load_scene(get_task("libero_spatial", 0)))
    with pytest.raises(ValueError, match=r"is not an integer \(valid: 0-49\)"):
        simulation.reset(get_task("libero_spatial", 0), init_state_id, np.random.RandomState(0))


@pytest.mark.parametrize("seed", [1.7, True, "3", -1, [3]])
def test_seeds_are_integers(seed):
    with pytest.raises(ValueError, match=r"is not a seed \(valid: None, or an integer from 0 on\)"):
        _make().reset(seed=seed)


def test_a_reset_that_is_refused_touches_nothing():
    env, twin = _make(), _make()
    for each in (env, twin):
        each.reset(seed=0)
    for options in ({"init_state_id": 99}, {"task_id": 10}, {"placement_seed": 1}, {"nonsense": 1}):
        with pytest.raises(ValueError, match=r"is not|chooses|unknown"):
            env.reset(seed=7, options=options)
    assert env.np_random_seed == 0
    assert env.get_state()["rng"] == twin.get_state()["rng"]
    assert env.reset(seed=np.int64(3))[1] == twin.reset(seed=3)[1]


def test_nan_action():
    env = _make()
    env.reset(seed=0)
    with pytest.raises(PhysicsError, match="is not finite"):
        env.step(np.full(7, np.nan, dtype=np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"image_size=0 is not a positive number of pixels"),
        ({"image_size": -5}, r"image_size=-5 is not"),
        ({"image_size": 2.5}, r"image_size=2.5 is not"),
        ({"reward": "dense"}, r"reward='dense' is unknown \(valid: 'sparse', 'relative'\)"),
        (
            {"image_size": 100_000},
            r"image_size=100000 is too many pixels a side \(valid: 1-4096, usual: 128, 224, 256\)",
        ),
        ({"render_size": 4097}, r"render_size=4097 is too many pixels a side \(valid: 1-4096"),
        ({"horizon": 0}, r"horizon=0 is not a positive number of steps \(default: 320\)"),
        ({"task_id": 10}, r"task_id=10 is not in libero_goal \(valid: 0-9\)"),
        ({"render_mode": "film"}, r"render_mode='film' is unknown \(valid: None, 'rgb_array', 'human'\)"),
        ({"render_size": 0}, "render_size=0 is not a positive number"),
        ({"stepping": "slow"}, r"stepping='slow' is unknown"),
        ({"camera_names": ()}, r"camera_names=\[\] must name at least one camera, and none twice"),
        ({"camera_names": ("agentview",) * 2}, r"must name at least one camera, and none twice"),
        (
            {"camera_names": ("agentview", "robot0_eye_in_hand", Camera(name="wrist", fovy_deg=60))},
            r"camera 'wrist' would be observed as 'wrist_images', as 'robot0_eye_in_hand' is; give it another name",
        ),
        ({"renderer": "vulkan"}, r"renderer='vulkan' is unknown \(valid: None, 'egl', 'osmesa', 'warp'\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        _make(**options)


@pytest.mark.parametrize("make", [LiberoEnv, LiberoVectorEnv])
@pytest.mark.parametrize("suite", [None, 3, ["libero_goal"]])
def test_a_suite_is_a_name_or_a_task(make, suite):
    with pytest.raises(
        TypeError, match=r"suite=.* neither the name of a suite \(libero_gym.list_suites\(\)\) nor a task"
    ):
        make(suite)


def test_actions_are_numbers():
    env = _make(task_id=0)
    env.reset(seed=0)
    for action in ("a", {}, [[0], [0, 1]]):
        with pytest.raises(ValueError, match=r"is no array of numbers .*; expected \(7,\) with 'delta_pose'"):
            env.step(action)


def test_unknown_suite():
    with pytest.raises(ValueError, match=r"did you mean 'libero_object'\?"):
        _make("libero_objet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_id": 10}, r"task_id=10 is not in libero_goal"),
        ({"init_state_id": 50}, r"init_state_id=50 is not among the stored states"),
        ({"state": 1}, r"unknown reset options \['state'\] \(valid: 'task_id', 'init_state_id', 'placement_seed'\)"),
    ],
)
def test_bad_reset_options(options, message):
    env = _make()
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options=options)


def test_fixed_task_cannot_be_changed_at_reset():
    env = _make(task_id=1)
    with pytest.raises(ValueError, match="was asked of an environment made for task_id=1"):
        env.reset(options={"task_id": 2})
