"""Goals by hand-made states; the comparison with LIBERO is in `test_simulation.py`."""

import mujoco
import numpy as np
import pytest

from libero_gym.physics.predicates import Goal
from libero_gym.physics.simulation import SETTLING_ACTION, Simulation
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scenes import load_scene, load_scenes
from libero_gym.tasks.suites import get_task, list_tasks, load_init_states


@pytest.fixture
def scene():
    return load_scene(get_task("libero_goal", 0))


@pytest.fixture
def simulation(scene):
    simulation = Simulation(scene)
    simulation.reset(
        get_task("libero_goal", 0), 0, np.random.RandomState(0), init_states="original", num_settling_steps=0
    )
    return simulation


@pytest.fixture
def data(simulation):
    return simulation.data


def _move(simulation, name: str, position, offset=(0.0, 0.0, 0.0)) -> None:
    address = simulation.scene.objects[name].joint_qpos_adr[-1]
    simulation.data.qpos[address : address + 3] = np.add(position, offset)
    mujoco.mj_forward(simulation.model, simulation.data)


def test_on_object_needs_height_contact_and_centre(scene, simulation, data):
    goal = Goal(scene, (("on", "akita_black_bowl_1", "plate_1"),))
    plate = data.xpos[scene.objects["plate_1"].body_id].copy()
    assert not goal(data)
    _move(simulation, "akita_black_bowl_1", plate)
    assert goal(data)
    _move(simulation, "akita_black_bowl_1", plate, [0.04, 0, 0])
    assert data.ncon > 0
    assert not goal(data)  # touches, off centre
    _move(simulation, "akita_black_bowl_1", plate, [0, 0, 0.3])
    assert not goal(data)  # does not touch


def test_on_site_of_a_fixture(scene, simulation, data):
    goal = Goal(scene, (("on", "akita_black_bowl_1", "wooden_cabinet_1_top_side"),))
    top = data.site_xpos[scene.sites["wooden_cabinet_1_top_side"].site_id].copy()
    assert not goal(data)
    _move(simulation, "akita_black_bowl_1", top, [0, 0, 0.03])
    for _ in range(20):
        simulation.step(SETTLING_ACTION)
    assert goal(data)
    _move(simulation, "akita_black_bowl_1", top, [0, 0, 0.09])
    assert not goal(data)  # within the region, but in the air


def test_in_site_ignores_contact(scene, simulation, data):
    goal = Goal(scene, (("in", "akita_black_bowl_1", "wooden_cabinet_1_top_region"),))
    assert not goal(data)
    _move(simulation, "akita_black_bowl_1", data.site_xpos[scene.sites["wooden_cabinet_1_top_region"].site_id])
    assert goal(data)


@pytest.mark.parametrize(("qpos", "is_open"), [(-0.16, True), (-0.1401, True), (-0.1399, False), (0.0, False)])
def test_open_drawer(scene, data, qpos, is_open):
    goal = Goal(scene, (("open", "wooden_cabinet_1_middle_region"),))
    (address,) = scene.sites["wooden_cabinet_1_middle_region"].joint_qpos_adr
    data.qpos[address] = qpos
    assert goal(data) is is_open


@pytest.mark.parametrize(("qpos", "is_on", "is_off"), [(0.5, True, False), (0.4, False, False), (-0.001, False, True)])
def test_stove(scene, data, qpos, is_on, is_off):
    (address,) = scene.objects["flat_stove_1"].joint_qpos_adr
    data.qpos[address] = qpos
    assert Goal(scene, (("turnon", "flat_stove_1"),))(data) is is_on
    assert Goal(scene, (("turnoff", "flat_stove_1"),))(data) is is_off


def test_goal_is_a_conjunction(scene, simulation, data):
    atoms = (("turnon", "flat_stove_1"), ("on", "akita_black_bowl_1", "plate_1"))
    (knob,) = scene.objects["flat_stove_1"].joint_qpos_adr
    data.qpos[knob] = 1.0
    assert not Goal(scene, atoms)(data)
    _move(simulation, "akita_black_bowl_1", data.xpos[scene.objects["plate_1"].body_id])
    assert Goal(scene, atoms)(data)
    data.qpos[knob] = 0.0
    assert not Goal(scene, atoms)(data)


@pytest.mark.parametrize(
    ("atom", "message"),
    [
        (("above", "plate_1", "plate_1"), r"goal atom .* is not supported \(valid: on object"),
        (("on", "cup_1", "plate_1"), r"'cup_1' in goal atom .* is not in the scene \(valid: .*'plate_1'"),
        (("open", "plate_1"), "'plate_1' cannot be asked for 'open'"),
    ],
)
def test_unsupported_goals(scene, atom, message):
    with pytest.raises(ValueError, match=message):
        Goal(scene, (atom,))


# Those of libero_90, whose twenty scenes take minutes to build, are judged in `test_initial_states.py`.
@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10"])
def test_all_goals_of_a_suite_compile_and_do_not_hold_yet(suite: str):
    tasks = list_tasks(suite)
    for task, scene in zip(tasks, load_scenes(tasks), strict=True):
        data = mujoco.MjData(scene.physics_model)
        state = load_init_states(task)[0]
        data.qpos[:] = state[1 : 1 + scene.physics_model.nq]
        mujoco.mj_forward(scene.physics_model, data)
        assert Goal(scene, read_problem(task.bddl_file).goal)(data) is False, task
        assert np.isfinite(data.qacc).all()
