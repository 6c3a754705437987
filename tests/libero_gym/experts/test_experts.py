"""Scripted experts: they solve tasks by actions alone, the same way every time, and in LIBERO itself."""

import numpy as np
import pytest

from libero_gym.experts import HUMAN_LIKE, ExpertConfig, make_expert, run_expert
from libero_gym.experts.containers import fitting_turn, spots_between_walls
from libero_gym.experts.geometry import Shapes
from libero_gym.experts.grasps import (
    HAND_HALF_WIDTH,
    MAX_WIDTH,
    PALM_HEIGHT,
    about_vertical,
    choose_grasp,
    gripper_rotation,
    hand_room,
    lean_outwards,
)
from libero_gym.experts.insertion import find_opening, tilted
from libero_gym.experts.skills import World
from libero_gym.experts.solver import order
from libero_gym.physics.simulation import SETTLING_ACTION, Simulation
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import SceneObject, load_scene
from libero_gym.tasks.suites import get_task, load_init_states


@pytest.fixture(scope="module")
def goal_simulation() -> Simulation:
    task = get_task("libero_goal", 1)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    return simulation


def make_world(suite: str, task_id: int) -> World:
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    return World(simulation, np.random.default_rng(0), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task_id", "init_state_id"),
    [
        ("libero_spatial", 0, 7),  # from the table
        ("libero_spatial", 4, 20),  # out of a drawer
        ("libero_spatial", 9, 3),  # from the top of a cabinet
        ("libero_object", 6, 11),  # a flat box into a basket
        ("libero_object", 7, 49),  # a carton that hangs from a finger's edge until that moves away
        ("libero_goal", 0, 5),  # a drawer
        ("libero_goal", 2, 5),  # a bottle
        ("libero_goal", 7, 5),  # a knob
        ("libero_goal", 3, 0),  # a bowl out of the way of a drawer, then into it
        ("libero_10", 3, 2),  # into a drawer below the handles of others, which is shut then
        ("libero_10", 5, 16),  # a book between the walls of a caddy
        ("libero_10", 9, 18),  # a mug by its handle into a microwave, whose door is opened wider, then shut
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
@pytest.mark.parametrize(
    ("suite", "task_id", "init_state_id"), [("libero_object", 0, 2), ("libero_goal", 7, 1), ("libero_10", 5, 4)]
)
def test_recorded_actions_succeed_in_libero(suite: str, task_id: int, init_state_id: int):
    task, seed = get_task(suite, task_id), 3
    episode = run_expert(None, task, init_state_id, seed=seed, init_states="original")
    assert episode.success
    with reference_env(task, has_textures=False) as env:
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


def test_a_missed_grasp_is_noticed_and_made_good():
    """At most one in an episode, of either object; a grasp that holds in spite of it is none."""
    task = get_task("libero_10", 0)
    sim = Simulation(load_scene(task))
    outcomes: set[str] = set()
    for seed in range(8):
        sim.reset(task, 0, np.random.RandomState(0))
        expert = make_expert(task, ExpertConfig(mistakes=1.0))
        expert.reset(sim, np.random.default_rng(seed))
        things = [sim.scene.objects[name] for name in ("alphabet_soup_1", "tomato_sauce_1")]
        moments: list[bool] = []
        outcome = "none"
        while not sim.success() and len(moments) < 480:
            was_mistaken = expert.is_mistaken
            action = expert.act(sim)
            moments.append(expert.is_mistaken)
            if was_mistaken and not expert.is_mistaken:
                assert action[6] == -1.0
                opening = sim.states()[6] - sim.states()[7]
                assert opening < 0.02  # closed on nothing
                outcome = f"{sum(_is_in_basket(sim, thing) for thing in things)} was put away before"
            sim.step(action)
        assert sim.success()
        assert np.count_nonzero(np.diff(moments)) == (0 if outcome == "none" else 2)
        outcomes.add(outcome)
    assert outcomes >= {"0 was put away before", "1 was put away before"}
    plain = make_expert(task)
    sim.reset(task, 0, np.random.RandomState(0))
    plain.reset(sim, np.random.default_rng(0))
    sim.step(plain.act(sim))
    assert not plain.is_mistaken


@pytest.mark.parametrize(("task_id", "init_state_id"), [(6, 0), (9, 3), (0, 0)])
def test_what_is_held_in_spite_of_a_mistake_is_not_let_go(task_id: int, init_state_id: int):
    """A bowl that is held by its rim loses contact for some steps when it swings."""
    task = get_task("libero_spatial", task_id)
    sim = Simulation(load_scene(task))
    (bowl,) = {sim.scene.objects[atom[1]] for atom in read_problem(task.bddl_file).goal}
    for seed in range(3):
        sim.reset(task, init_state_id, np.random.RandomState(0))
        expert = make_expert(task, ExpertConfig(mistakes=1.0))
        expert.reset(sim, np.random.default_rng(seed))
        was_mistaken = False
        for _ in range(240):
            action = expert.act(sim)
            if was_mistaken and not expert.is_mistaken:
                is_held = World(sim, np.random.default_rng(0), 0.0).is_held(bowl)
                assert action[6] == (1.0 if is_held else -1.0)
            was_mistaken = expert.is_mistaken
            if sim.step(action):
                break
        assert sim.success()


def _is_in_basket(sim: Simulation, thing: SceneObject) -> bool:
    basket = sim.scene.objects["basket_1"]
    return float(np.linalg.norm(sim.data.xpos[thing.body_id, :2] - sim.data.xpos[basket.body_id, :2])) < 0.1


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


@pytest.mark.parametrize(
    "values", [{"speed": 0.0}, {"noise": 0.5}, {"via_noise": -0.01}, {"speed_spread": 1.0}, {"mistakes": 1.1}]
)
def test_config_names_the_valid_range(values: dict[str, float]):
    with pytest.raises(ValueError, match=r"is out of range \(valid: "):
        ExpertConfig(**values)


def test_goals_are_ordered_by_what_is_in_the_way_of_what():
    drawer = (("close", "cabinet_top"), ("open", "cabinet_top"), ("in", "bowl", "cabinet_top"))
    # The drawer is opened as part of filling it.
    assert [atom[0] for atom in order(drawer[1:])] == ["in", "open"]
    assert [atom[0] for atom in order((drawer[0], drawer[2]))] == ["in", "close"]
    door = (("close", "microwave"), ("in", "mug", "microwave_heating_region"))
    assert [atom[0] for atom in order(door)] == ["in", "close"]
    two_drawers = (("open", "cabinet_top"), ("close", "cabinet_bottom"))
    assert [atom[0] for atom in order(two_drawers)] == ["close", "open"]
    stack = (("on", "top", "middle"), ("in", "bottom", "tray"), ("on", "middle", "bottom"))
    assert [atom[1] for atom in order(stack)] == ["bottom", "middle", "top"]
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


def test_pans_are_held_at_the_handle_near_their_weight():
    world = make_world("libero_10", 2)
    pan = world.scene.objects["chefmate_8_frypan_1"].body_id
    weight, cloud = world.data.subtree_com[pan, :2], world.shapes.cloud(pan)
    grasp = choose_grasp(world.shapes, pan)
    away = grasp.position[:2] - weight
    handle = cloud[np.argmax(np.linalg.norm(cloud[:, :2] - weight, axis=1)), :2] - weight
    assert away @ handle > 0.95 * np.linalg.norm(away) * np.linalg.norm(handle)
    assert np.linalg.norm(away) < 0.6 * np.linalg.norm(handle)
    # The fingers close across the handle.
    assert abs(grasp.rotation[:2, 0] @ handle) < 0.1 * np.linalg.norm(handle)


def test_hand_rises_above_what_is_inside_it():
    position, down, stay = np.array([0.4, 0.1, 1.0]), gripper_rotation(0.0), np.zeros(3)
    beside, inside = np.array([[0.4 + HAND_HALF_WIDTH + 0.01, 0.1, 1.2]]), np.array([[0.4, 0.1, 1.2]])
    assert hand_room(beside, position, down, [stay]) <= 0.0
    rise = hand_room(inside, position, down, [stay])
    assert rise == pytest.approx(0.2 - PALM_HEIGHT, abs=0.02)
    assert hand_room(inside, position, down, [np.array([0.0, 0.0, rise])]) == pytest.approx(0.0, abs=1e-9)
    # The displacement that needs least counts.
    assert hand_room(inside, position, down, [stay, np.array([0.1, 0.0, 0.0])]) <= 0.0


def test_objects_are_grasped_for_where_they_go(goal_simulation: Simulation):
    """Right beside a cabinet, the hand must not be over it."""
    shapes, scene = Shapes(goal_simulation.model, goal_simulation.data), goal_simulation.scene
    bowl, cabinet = scene.objects["akita_black_bowl_1"].body_id, scene.objects["wooden_cabinet_1"].body_id
    cloud, wall = shapes.cloud(bowl), shapes.cloud(cabinet)
    # To the right (-y) of the cabinet, 1 cm from it: the left rim, which costs least, is next to it.
    carry = np.array([np.median(wall[:, 0]) - np.median(cloud[:, 0]), wall[:, 1].min() - cloud[:, 1].max() - 0.01, 0.0])
    free, near = choose_grasp(shapes, bowl), choose_grasp(shapes, bowl, carries=[carry])
    assert hand_room(wall, free.position, free.rotation, [carry]) > 0.1
    assert hand_room(wall, near.position, near.rotation, [carry]) <= 0.0


def test_compartments_with_a_roof_are_entered_from_the_front():
    world = make_world("libero_10", 9)
    opening = find_opening(world, world.scene.sites["microwave_1_heating_region"])
    assert opening is not None
    np.testing.assert_allclose(opening.inward, [0.0, 1.0, 0.0], atol=1e-6)
    cavity = world.data.site_xpos[world.scene.sites["microwave_1_heating_region"].site_id]
    assert opening.front < opening.reach[0] < opening.reach[1] == pytest.approx(cavity[1])
    assert cavity[2] - 0.1 < opening.floor < cavity[2] - 0.05
    fingers = tilted(opening.inward, 0.9)[:, 2]
    np.testing.assert_allclose(fingers, [0.0, np.sin(0.9), -np.cos(0.9)], atol=1e-6)
    for suite, task_id, region in (
        ("libero_object", 0, "basket_1_contain_region"),
        ("libero_goal", 0, "wooden_cabinet_1_top_region"),
    ):
        other = make_world(suite, task_id)
        assert find_opening(other, other.scene.sites[region]) is None


def test_books_are_turned_to_fit_between_walls():
    world = make_world("libero_10", 5)
    book, site = world.scene.objects["black_book_1"], world.scene.sites["desk_caddy_1_front_contain_region"]
    turn, is_tight = fitting_turn(world, book, site)
    assert is_tight
    width = 2 * np.abs(world.data.site_xmat[site.site_id].reshape(3, 3) @ site.size)[:2]
    turned = (world.shapes.cloud(book.body_id) - world.position(book)) @ about_vertical(turn).T
    assert np.all(np.ptp(turned[:, :2], axis=0) < width)
    assert np.any(np.ptp(world.shapes.cloud(book.body_id)[:, :2], axis=0) > width)
    # It also fits at each of the spots, walls included.
    for spot in spots_between_walls(world, book, site, turn):
        extent = turned[:, :2] + spot[:2] - world.data.site_xpos[site.site_id, :2]
        assert np.all(np.abs(extent) < width / 2 + 0.01)


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
