"""Scripted experts: they solve tasks by actions alone, the same way every time, and in LIBERO itself."""

import numpy as np
import pytest

from benchmarks.parity import reference_env
from libero_gym.experts import HUMAN_LIKE, ExpertConfig, make_expert, run_expert
from libero_gym.experts.geometry import Shapes
from libero_gym.experts.grasps import MAX_WIDTH, choose_grasp, gripper_rotation, lean_outwards
from libero_gym.experts.solver import order
from libero_gym.scenes import load_scene
from libero_gym.simulation import SETTLING_ACTION, Simulation
from libero_gym.suites import get_task, load_init_states


@pytest.fixture(scope="module")
def goal_simulation() -> Simulation:
    task = get_task("libero_goal", 1)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    return simulation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task_id", "init_state_id"),
    [
        ("libero_spatial", 0, 7),  # from the table
        ("libero_spatial", 4, 20),  # out of a drawer
        ("libero_spatial", 9, 3),  # from the top of a cabinet
        ("libero_object", 6, 11),  # a flat box into a basket
        ("libero_goal", 0, 5),  # a drawer
        ("libero_goal", 2, 5),  # a bottle
        ("libero_goal", 7, 5),  # a knob
    ],
)
def test_reaches_goal_within_the_horizon(suite: str, task_id: int, init_state_id: int):
    task = get_task(suite, task_id)
    episode = run_expert(None, task, init_state_id)
    assert episode.success
    assert episode.actions.shape == (episode.length, 7)
    assert episode.actions.dtype == np.float32
    assert np.abs(episode.actions).max() <= 1.0
    # What a policy has to learn is mostly inside the action space, and the arm does not stand still for long.
    assert np.mean(np.abs(episode.actions[:, :6]) > 0.95) < 0.01
    is_moving = np.linalg.norm(episode.actions[:, :6], axis=1) > 0.1
    assert np.mean(is_moving) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id", "init_state_id"), [("libero_object", 0, 2), ("libero_goal", 7, 1)])
def test_recorded_actions_succeed_in_libero(suite: str, task_id: int, init_state_id: int):
    task, seed = get_task(suite, task_id), 3
    episode = run_expert(None, task, init_state_id, seed=seed)
    assert episode.success
    with reference_env(task) as env:
        np.random.seed(seed)  # noqa: NPY002 - LIBERO draws from the global stream
        env.reset()
        env.set_init_state(load_init_states(task)[init_state_id])
        is_success = False
        for action in [SETTLING_ACTION] * 10 + list(episode.actions[:-1]):
            is_success = env.step(action)[2]
        assert not is_success
        assert env.step(episode.actions[-1])[2]


def test_same_seed_same_actions_and_variety_on_request():
    task = get_task("libero_object", 1)
    simulation = Simulation(load_scene(task))
    plain = [run_expert(simulation, task, 4, seed=seed, max_steps=25).actions for seed in (0, 0, 1)]
    np.testing.assert_array_equal(plain[0], plain[1])
    # libero_object has no fixtures: without variety nothing depends on the seed.
    np.testing.assert_array_equal(plain[0], plain[2])
    human = [run_expert(simulation, task, 4, seed=seed, config=HUMAN_LIKE, max_steps=25).actions for seed in (0, 0, 1)]
    np.testing.assert_array_equal(human[0], human[1])
    assert np.abs(human[0] - human[2]).max() > 0.02


def test_expert_leaves_the_simulation_to_its_actions(goal_simulation: Simulation):
    """`act` reads: it changes neither positions nor velocities, nor what the next step computes."""
    expert = make_expert(get_task("libero_goal", 1))
    expert.reset(goal_simulation, np.random.default_rng(0))
    before = {name: getattr(goal_simulation.data, name).copy() for name in ("qpos", "qvel", "ctrl", "qacc_warmstart")}
    expert.act(goal_simulation)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(goal_simulation.data, name), value)


def test_refuses_another_task_and_use_before_reset(goal_simulation: Simulation):
    expert = make_expert(get_task("libero_goal", 8))
    with pytest.raises(ValueError, match="reset the simulation to that task"):
        expert.reset(goal_simulation, np.random.default_rng(0))
    with pytest.raises(ValueError, match="must be called with the same simulation"):
        expert.act(goal_simulation)


@pytest.mark.parametrize("values", [{"speed": 0.0}, {"noise": 0.5}, {"via_noise": -0.01}, {"speed_spread": 1.0}])
def test_config_names_the_valid_range(values: dict[str, float]):
    with pytest.raises(ValueError, match=r"is out of range \(valid: "):
        ExpertConfig(**values)


def test_goal_is_ordered_so_that_drawers_are_filled_before_they_are_closed():
    goal = (("close", "cabinet"), ("in", "bowl", "cabinet"), ("open", "cabinet"))
    assert [atom[0] for atom in order(goal)] == ["open", "in", "close"]
    with pytest.raises(ValueError, match="has no skill"):
        order((("up", "bowl"),))


def test_gripper_points_down_and_leans_away_from_the_robot():
    for yaw in np.linspace(-3.0, 3.0, 7):
        rotation = gripper_rotation(float(yaw))
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1.0)
        np.testing.assert_allclose(rotation[:, 2], [0.0, 0.0, -1.0])
    np.testing.assert_array_equal(lean_outwards(gripper_rotation(0.3), np.array([0.5, 0.0])), gripper_rotation(0.3))
    for direction in ([1.0, 0.0], [0.0, 1.0], [0.6, -0.8]):
        leaning = lean_outwards(gripper_rotation(0.3), 0.8 * np.array(direction))
        assert leaning[:2, 2] @ np.array(direction) > 0.2
        np.testing.assert_allclose(leaning @ leaning.T, np.eye(3), atol=1e-12)


def test_bowls_are_held_at_the_rim_and_narrow_things_across(goal_simulation: Simulation):
    objects = goal_simulation.scene.objects
    shapes = Shapes(goal_simulation.model, goal_simulation.data)
    bowl, bottle = objects["akita_black_bowl_1"].body_id, objects["wine_bottle_1"].body_id
    rim, body = choose_grasp(shapes, bowl), choose_grasp(shapes, bottle)
    assert (rim.kind, body.kind) == ("rim", "across")
    cloud = shapes.cloud(bowl)
    assert np.ptp(cloud[:, 0]) > MAX_WIDTH
    wall = np.linalg.norm(cloud - rim.position, axis=1).min()
    assert wall < 0.015
    # Always on the left: demonstrations of one task look alike.
    assert rim.position[1] > goal_simulation.data.xpos[bowl, 1] + 0.03
    assert np.linalg.norm(body.position[:2] - goal_simulation.data.xpos[bottle, :2]) < 0.01


def test_clouds_follow_the_geometry(goal_simulation: Simulation):
    shapes, scene = Shapes(goal_simulation.model, goal_simulation.data), goal_simulation.scene
    bowl = scene.objects["akita_black_bowl_1"]
    position = goal_simulation.data.xpos[bowl.body_id]
    cloud = shapes.cloud(bowl.body_id)
    np.testing.assert_allclose((cloud.max(axis=0) + cloud.min(axis=0))[:2] / 2, position[:2], atol=0.005)
    assert np.ptp(cloud[:, 2]) == pytest.approx(0.05, abs=0.005)
    top = shapes.top_along(position, position, 0.03, ())
    assert cloud[:, 2].min() < top <= shapes.top_along(position, position, 0.08, ())
    assert shapes.top_along(position, position, 0.03, (bowl.body_id,)) < top
