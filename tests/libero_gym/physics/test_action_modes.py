"""Other controllers and rates: equal to robosuite's own run live, natively and in NumPy; what they mean, by hand."""

import mujoco
import numpy as np
import pytest

import libero_gym
from benchmarks.parity import compare_states
from libero_gym.conventions import ACTION_MODES, CONTROL_FREQUENCY_HZ, count_substeps
from libero_gym.env import LiberoEnv
from libero_gym.experts import make_expert
from libero_gym.options import make_action_space
from libero_gym.physics.simulation import PhysicsError, Simulation, load_dump
from libero_gym.tasks.scene_builder import reference_env
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task, load_init_states
from libero_gym.vector import LiberoVectorEnv

TASK = get_task("libero_goal", 0)
CONTROLLERS = {
    "delta_pose": "OSC_POSE",
    "absolute_pose": "OSC_POSE",
    "delta_joint_pos": "JOINT_POSITION",
    "absolute_joint_pos": "JOINT_POSITION",
}


def make_simulation(action_mode, control_freq=CONTROL_FREQUENCY_HZ, *, stepping="exact", num_settling_steps=0):
    simulation = Simulation(load_scene(TASK), action_mode=action_mode, control_freq=control_freq, stepping=stepping)
    simulation.reset(TASK, 3, np.random.RandomState(0), init_states="original", num_settling_steps=num_settling_steps)
    return simulation


def make_actions(action_mode, num_steps, start):
    """Returns slow sines about `start`, which holds the arm; they reach the table, and the gripper closes."""
    rng = np.random.default_rng(0)
    actions = np.zeros((num_steps, len(start)))
    phases = np.linspace(0, 5, num_steps)[:, None] * rng.uniform(0.5, 2, len(start) - 1)
    size = {"absolute_pose": np.array([0.1] * 3 + [0.3] * 3), "absolute_joint_pos": 0.3}.get(action_mode, 1.3)
    actions[:, :-1] = start[:-1] + size * np.sin(phases)
    if action_mode == "absolute_pose":
        actions[num_steps // 2 :, 2] = 0.85  # in the table
    actions[:, -1] = np.where(np.arange(num_steps) < num_steps // 3, -1, 1)
    return actions


def set_absolute(env, action_mode):
    """Has robosuite's controller take absolute numbers."""
    controller = env.robots[0].controller
    if action_mode == "absolute_pose":
        controller.use_delta = False  # what `control_delta: false` in its configuration does
    elif action_mode == "absolute_joint_pos":
        # Its own `set_qpos`, which no configuration passes on.
        set_goal = controller.set_goal
        controller.set_goal = lambda action: set_goal(np.zeros(7), set_qpos=np.array(action))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(mujoco.MjModel, "M_rowadr"), reason="before 3.3.6 LIBERO's extra passes matter")
@pytest.mark.parametrize(
    ("action_mode", "control_freq"),
    [
        ("delta_pose", 10),
        ("delta_pose", 50),
        ("absolute_pose", 20),
        ("absolute_pose", 10),
        ("delta_joint_pos", 20),
        ("delta_joint_pos", 50),
        ("absolute_joint_pos", 20),
    ],
)
def test_equals_robosuite_to_the_last_bit(action_mode, control_freq):
    simulation = make_simulation(action_mode, control_freq)
    with reference_env(TASK, has_textures=False, controller=CONTROLLERS[action_mode], control_freq=control_freq) as env:
        np.random.seed(0)  # noqa: NPY002 - LIBERO draws from the global stream
        env.reset()
        observation = env.set_init_state(load_init_states(TASK)[3])
        set_absolute(env, action_mode)
        assert compare_states(observation, simulation) == 0
        num_contacts = 0
        for action in make_actions(action_mode, 2 * control_freq, simulation.hold_action()):
            observation, _, is_success, _ = env.step(action)
            assert simulation.step(action) == is_success
            np.testing.assert_array_equal(simulation.data.qpos, env.sim.data.qpos)
            np.testing.assert_array_equal(simulation.data.qvel, env.sim.data.qvel)
            assert compare_states(observation, simulation) == 0
            num_contacts = max(num_contacts, simulation.data.ncon)
        assert simulation.data.time == pytest.approx(env.sim.data.time)
        assert num_contacts > 0


@pytest.mark.parametrize(("action_mode", "control_freq"), [(mode, 25) for mode in ACTION_MODES])
def test_native_equals_numpy_to_the_last_bit(action_mode, control_freq):
    simulations = [make_simulation(action_mode, control_freq, stepping=s) for s in ("exact", "numpy")]
    for action in make_actions(action_mode, 30, simulations[0].hold_action()):
        for simulation in simulations:
            simulation.step(action)
        np.testing.assert_array_equal(simulations[0].data.qpos, simulations[1].data.qpos)
        np.testing.assert_array_equal(simulations[0].states(), simulations[1].states())


@pytest.mark.parametrize("action_mode", ACTION_MODES)
def test_fast_stepping_equals_exact_to_rounding_until_the_first_contact(action_mode):
    simulations = [make_simulation(action_mode, 50, stepping=s) for s in ("exact", "fast")]
    for action in make_actions(action_mode, 30, simulations[0].hold_action())[:8]:
        for simulation in simulations:
            simulation.step(action)
    np.testing.assert_allclose(simulations[1].data.qpos, simulations[0].data.qpos, atol=1e-9)
    assert (simulations[0].data.qvel[:7] != 0).all()


def test_an_absolute_pose_is_reached():
    simulation = make_simulation("absolute_pose", num_settling_steps=10)
    goal = simulation.hold_action()
    goal[:3] += [0.05, -0.04, 0.03]
    for _ in range(40):
        simulation.step(goal)
    reached = simulation.hold_action()
    np.testing.assert_allclose(reached[:3], goal[:3], atol=5e-3)
    np.testing.assert_allclose(reached[3:], goal[3:], atol=2e-2)
    np.testing.assert_allclose(simulation.states()[:3], goal[:3], atol=5e-3)


def test_the_grip_site_is_turned_from_the_hand():
    """By -90 degrees about z, as the class says."""
    simulation = make_simulation("absolute_pose")
    robot = simulation.scene.robot
    hand = simulation.data.xmat[robot.eef_body_id].reshape(3, 3)
    site = simulation.data.site_xmat[robot.eef_site_id].reshape(3, 3)
    np.testing.assert_allclose(hand.T @ site, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-3)


@pytest.mark.parametrize("action_mode", ["absolute_joint_pos", "delta_joint_pos"])
def test_joints_go_where_they_are_told(action_mode):
    simulation = make_simulation(action_mode, num_settling_steps=10)
    joints = simulation.data.qpos[simulation.scene.robot.arm_qpos_adr].copy()
    action = simulation.hold_action()
    change = np.array([0.2, -0.1, 0.1, 0.2, -0.2, 0.1, 0.3])
    action[:7] += change if action_mode == "absolute_joint_pos" else change / 0.05 / 40
    for _ in range(40):
        simulation.step(action)
    moved = simulation.data.qpos[simulation.scene.robot.arm_qpos_adr] - joints
    if action_mode == "absolute_joint_pos":
        np.testing.assert_allclose(moved, change, atol=2e-2)
    else:  # each step's goal starts from where the joint is by then, so it lags
        assert (np.sign(moved) == np.sign(change)).all()
        assert (np.abs(moved) < np.abs(change)).all()


@pytest.mark.parametrize("action_mode", ACTION_MODES)
def test_holding_holds(action_mode):
    env = LiberoEnv(TASK, observe_images=False, action_mode=action_mode)
    start, _ = env.reset(seed=0, options={"init_state_id": 0})
    held = env.hold_action()
    for _ in range(20):
        observation, *_ = env.step(held)
    assert env.action_space.contains(held)
    np.testing.assert_allclose(observation["states"], start["states"], atol=1e-2)


@pytest.mark.parametrize("control_freq", [10, 50])
def test_a_step_lasts_as_long_as_it_says(control_freq):
    env = LiberoEnv(TASK, observe_images=False, control_freq=control_freq)
    env.reset(seed=0)
    started = env.data.time
    env.step(np.zeros(7, np.float32))
    assert env.data.time - started == pytest.approx(1 / control_freq)
    assert env.metadata["render_fps"] == control_freq
    assert LiberoEnv.metadata["render_fps"] == 20


def test_starts_are_the_same_for_all_modes_and_rates():
    for init_states in ("settled", "original"):
        states = []
        for options in ({}, {"action_mode": "absolute_joint_pos", "control_freq": 100}):
            env = LiberoEnv(TASK, observe_images=False, init_states=init_states, **options)
            states.append(env.reset(seed=3)[0]["states"])
            states.append(env.data.qpos.copy())
        np.testing.assert_array_equal(states[0], states[2])
        np.testing.assert_array_equal(states[1], states[3])


@pytest.mark.parametrize("action_mode", ACTION_MODES)
def test_vectors_equal_single_environments(action_mode):
    options = dict(observe_images=False, action_mode=action_mode, control_freq=50)
    envs = LiberoVectorEnv(TASK, 2, num_action_chunks=3, num_threads=1, **options)
    batch, _ = envs.reset(seed=4)
    single = LiberoEnv(TASK, **options)
    actions = np.stack([np.stack([envs.hold_action(i)] * 3) for i in range(2)]) + np.float32(0.02)
    assert actions.shape == envs.action_space.shape
    assert envs.action_space.contains(actions)
    batch, *_ = envs.step(actions)
    for i in range(2):
        single.reset(seed=4 + i)
        for action in actions[i]:
            observation, *_ = single.step(action)
        np.testing.assert_array_equal(batch["states"][i], observation["states"])
    np.testing.assert_array_equal(envs.envs[0].hold_action(), envs.hold_action(0))
    # A state says where a world is, whatever moves it from there.
    other = LiberoVectorEnv(TASK, 1, observe_images=False)
    other.reset(seed=0)
    other.set_state(0, envs.get_state(1))
    np.testing.assert_array_equal(other.observe()["states"][0], batch["states"][1])


def test_joint_limits_are_the_models():
    scene = load_scene(TASK)
    joints = [
        j for j in range(scene.physics_model.njnt) if scene.physics_model.jnt_qposadr[j] in scene.robot.arm_qpos_adr
    ]
    limits = scene.physics_model.jnt_range[joints]
    space = make_action_space("absolute_joint_pos")
    np.testing.assert_allclose(np.stack([space.low[:7], space.high[:7]], 1), limits, atol=1e-6)
    assert (space.low[7], space.high[7]) == (-1, 1)


def test_a_fault_is_dumped_with_the_action_mode():
    simulation = make_simulation("delta_joint_pos", 50)
    with pytest.raises(PhysicsError) as raised:
        simulation.step(np.full(8, np.nan))
    again, action = load_dump(raised.value.dump)
    assert (again.action_mode, again.control_freq, action.shape) == ("delta_joint_pos", 50, (8,))


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"action_mode='joint' is unknown \(valid: 'delta_pose', 'absolute_pose', 'delta_"
    ):
        LiberoEnv(TASK, observe_images=False, action_mode="joint")
    for frequency in (40, 500, 0, 12.5, True):  # robosuite makes 12 substeps of 12.5 at 40 Hz
        with pytest.raises(
            ValueError, match=r"does not divide the physics' 500 Hz \(valid: 1, 2, 4, 5, 10, 20, 25, 50, 1"
        ):
            LiberoVectorEnv(TASK, 1, observe_images=False, control_freq=frequency)
    assert [count_substeps(f) for f in (1, 20, 250)] == [500, 25, 2]
    for options in ({"action_mode": "absolute_pose"}, {"control_freq": 10}):
        with pytest.raises(ValueError, match="physics='warp' has action_mode='delta_pose' and control_freq=20 only"):
            LiberoVectorEnv(TASK, 1, observe_images=False, physics="warp", **options)
    env = libero_gym.LiberoEnv(TASK, observe_images=False, action_mode="delta_joint_pos")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action has shape \(7,\); expected \(8,\) with 'delta_joint_pos'"):
        env.step(np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="experts act by action_mode='delta_pose' at 20 Hz"):
        make_expert(TASK).reset(env.simulation, np.random.default_rng(0))
