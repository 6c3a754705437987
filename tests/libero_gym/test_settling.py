"""Settled initial states: what rests, rests where the task says, under the installed MuJoCo."""

import mujoco
import numpy as np
import pytest

from libero_gym import settling
from libero_gym.predicates import in_contact
from libero_gym.scenes import load_scene
from libero_gym.settling import has_settled_states, load_settled_states, record_suite
from libero_gym.simulation import SETTLING_ACTION, Simulation
from libero_gym.suites import get_task, list_suites, list_tasks

SUITES = [suite for suite in list_suites() if has_settled_states(suite)]


def _reset(suite: str, task_id: int, init_state_id: int, **options) -> Simulation:
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task), stepping="fast")
    simulation.reset(task, init_state_id, np.random.RandomState(0), **options)
    return simulation


def _object_positions(simulation: Simulation) -> np.ndarray:
    return simulation.data.xpos[[thing.body_id for thing in simulation.scene.objects.values()]].copy()


def test_spatial_has_settled_states():
    assert "libero_spatial" in SUITES


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_has_one_settled_state_for_each_stored_one(suite: str):
    for task in list_tasks(suite):
        states = load_settled_states(task)
        assert len(states.physics) == len(states.fixture_poses) == len(states.controller) == 50
        assert np.isfinite(states.physics).all()
        assert np.unique(states.physics, axis=0).shape == states.physics.shape


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_settled_objects_stay_where_they_are(suite: str):
    for task in list_tasks(suite)[::3]:
        simulation = _reset(suite, task.task_id, 17)
        before = _object_positions(simulation)
        for _ in range(10):
            simulation.step(SETTLING_ACTION)
        moved = np.linalg.norm(_object_positions(simulation) - before, axis=1)
        assert moved.max() < 2e-3, (task.name, moved)
        assert not simulation.success()


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


def test_unknown_kind():
    message = r"init_states='fresh' is unknown \(valid: 'settled', 'original'\)"
    with pytest.raises(ValueError, match=message):
        _reset("libero_spatial", 0, 0, init_states="fresh")


def test_states_of_another_source_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settling, "_source_digest", lambda _: "0" * 16)
    with pytest.raises(ValueError, match="come from other initial states"):
        load_settled_states.__wrapped__(get_task("libero_spatial", 0))


@pytest.mark.skipif(mujoco.__version__.startswith("3.3."), reason="recording is possible under this version")
def test_recording_needs_an_old_mujoco(tmp_path):
    with pytest.raises(RuntimeError, match=r"record with 3\.3\.x"):
        record_suite("libero_spatial", tmp_path)
