"""Settled initial states: what rests, rests where the task says, under the installed MuJoCo."""

import re
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from libero_gym import settling
from libero_gym import simulation as simulation_module
from libero_gym.predicates import in_contact
from libero_gym.scenes import load_scene, load_scenes
from libero_gym.settling import OVERLAPPING, find_faults, has_settled_states, load_settled_states, record_suite
from libero_gym.simulation import Simulation
from libero_gym.suites import HORIZONS, get_task, list_tasks


def _reset(suite: str, task_id: int, init_state_id: int, **options) -> Simulation:
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task), stepping="fast")
    simulation.reset(task, init_state_id, np.random.RandomState(0), **options)
    return simulation


@pytest.mark.parametrize("suite", HORIZONS)
def test_every_task_has_one_settled_state_for_each_stored_one(suite: str):
    for task in list_tasks(suite):
        states = load_settled_states(task)
        assert len(states.physics) == len(states.fixture_poses) == len(states.controller) == 50
        assert np.isfinite(states.physics).all()
        assert np.unique(states.physics, axis=0).shape == states.physics.shape


@pytest.mark.slow
@pytest.mark.parametrize("suite", HORIZONS)
def test_every_tasks_premise_holds_and_lasts(suite: str):
    # All 50 states of each task, for three seconds: `python -m libero_gym.settling --suite ... --check`.
    tasks = list_tasks(suite)
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        simulation = Simulation(scene, stepping="fast")
        for state_id in {7, 7 + task.task_id % 40} - set(OVERLAPPING.get((suite, task.task_id), ())):
            assert find_faults(simulation, task, state_id, num_steps=40) == [], (task.name, state_id)


@pytest.mark.parametrize(
    ("suite", "task_id", "state_id", "fault"),
    [
        ("libero_spatial", 2, 18, r"akita_black_bowl_2 moves by \d+ mm"),
        ("libero_10", 0, 2, "not on cream_cheese_1 living_room_table_cream_cheese_init_region"),
    ],
)
def test_states_in_which_objects_overlap_are_known_and_found_at_fault(suite, task_id, state_id, fault):
    assert state_id in OVERLAPPING[suite, task_id]
    simulation = _reset(suite, task_id, state_id, init_states="original", num_settling_steps=0)
    movable = [thing.contact_mask for thing in simulation.scene.objects.values() if not thing.is_fixture]
    owners = np.argmax([*movable, np.ones(simulation.model.ngeom, np.bool_)], axis=0)  # the last: no object
    contact = simulation.data.contact
    pairs = owners[contact.geom]
    is_between_objects = (pairs < len(movable)).all(axis=1) & (pairs[:, 0] != pairs[:, 1])
    assert contact.dist[is_between_objects].min() < -0.0015
    (found,) = find_faults(simulation, get_task(suite, task_id), state_id)
    assert re.fullmatch(fault, found)


def test_premises_that_do_not_hold_are_found(monkeypatch: pytest.MonkeyPatch):
    task = get_task("libero_spatial", 9)  # the bowl is on the cabinet
    simulation = Simulation(load_scene(task), stepping="fast")
    assert find_faults(simulation, task, 0, num_steps=0) == []
    states = load_settled_states(task)
    physics = states.physics.copy()
    physics[0, simulation.scene.objects["akita_black_bowl_1"].joint_qpos_adr[-1] + 2] += 0.3
    monkeypatch.setattr(simulation_module, "load_settled_states", lambda _: replace(states, physics=physics))
    assert find_faults(simulation, task, 0, num_steps=10) == [
        "not on akita_black_bowl_1 wooden_cabinet_1_top_side",
        "akita_black_bowl_1 moves by 300 mm",
    ]


@pytest.mark.skipif(mujoco.__version__ != "3.3.7", reason="needs the version that recorded")
@pytest.mark.parametrize(
    ("suite", "task_id", "state_id"),
    [("libero_spatial", 5, 3), ("libero_goal", 9, 0), ("libero_10", 3, 19), ("libero_90", 26, 0)],
)
def test_recording_again_gives_the_shipped_state(suite, task_id, state_id):
    # In the last two, the fixtures of the first seed throw a bottle off.
    task = get_task(suite, task_id)
    outcome = settling._settle(Simulation(load_scene(task)), task, state_id)
    states = load_settled_states(task)
    np.testing.assert_array_equal(outcome["fixture_poses"], states.fixture_poses[state_id])
    # Processors round differently in BLAS.
    np.testing.assert_allclose(outcome["physics"], states.physics[state_id], rtol=0, atol=1e-11)


def test_the_bowl_stands_on_the_ramekin():
    simulation = _reset("libero_spatial", 5, 0)
    scene, data = simulation.scene, simulation.data
    bowl, ramekin = scene.objects["akita_black_bowl_1"], scene.objects["glazed_rim_porcelain_ramekin_1"]
    offset = np.linalg.norm(data.xpos[bowl.body_id, :2] - data.xpos[ramekin.body_id, :2])
    assert offset < 0.02  # it slides 6 cm off when it falls under MuJoCo 3.4 and later
    assert in_contact(data, bowl.contact_mask, ramekin.contact_mask)


def test_settled_reset_draws_nothing():
    task = get_task("libero_spatial", 2)
    simulation = Simulation(load_scene(task))
    random_state = np.random.RandomState(3)
    before = random_state.get_state()[1].copy()
    simulation.reset(task, 4, random_state)
    np.testing.assert_array_equal(random_state.get_state()[1], before)
    np.testing.assert_array_equal(simulation.render_state().fixture_poses, load_settled_states(task).fixture_poses[4])
    assert simulation.states()[6] > 0.035  # the gripper is open, as after ten steps that open it


def test_suites_without_settled_states():
    task = get_task("libero_spatial_swap", 0)
    assert not has_settled_states(task.suite)
    with pytest.raises(FileNotFoundError, match="recorded for libero_spatial_swap; use init_states='original'"):
        load_settled_states(task)


def test_a_task_that_got_another_id_keeps_its_states():
    task = get_task("libero_10", 2)
    moved = load_settled_states.__wrapped__(replace(task, task_id=0))
    np.testing.assert_array_equal(moved.physics, load_settled_states(task).physics)


def test_unknown_kind():
    message = r"init_states='fresh' is unknown \(valid: 'settled', 'original'\)"
    with pytest.raises(ValueError, match=message):
        _reset("libero_spatial", 0, 0, init_states="fresh")


def test_states_of_another_source_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settling, "_source_digest", lambda _: "0" * 16)
    with pytest.raises(ValueError, match="come from other initial states"):
        load_settled_states.__wrapped__(get_task("libero_spatial", 0))


@pytest.mark.skipif(mujoco.__version__ == "3.3.7", reason="recording is possible under this version")
def test_recording_needs_an_old_mujoco(tmp_path):
    with pytest.raises(RuntimeError, match=r"record with 3\.3\.7"):
        record_suite("libero_spatial", tmp_path)
