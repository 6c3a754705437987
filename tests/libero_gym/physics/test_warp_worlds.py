"""GPU physics, run on the CPU device: against the CPU backend, LIBERO's predicates, and the vector contract."""

import dataclasses

import gymnasium
import mujoco
import numpy as np
import pytest

from benchmarks.env_warp import replay
from benchmarks.parity import _perturb
from libero_gym.experts import run_expert
from libero_gym.physics import warp_worlds
from libero_gym.physics.controller import ControllerState, axis_angle_from_quat, control_substep, creation_kinematics
from libero_gym.physics.cpu_worlds import CpuWorlds
from libero_gym.physics.simulation import PhysicsError, Simulation, load_task_data
from libero_gym.physics.warp_worlds import WarpOptions, WarpWorlds, axis_angles, choose_device
from libero_gym.rendering import raycast
from libero_gym.rendering.raycast import WarpRenderer, list_devices
from libero_gym.tasks.initial_states import EpisodeStart
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task, list_tasks
from libero_gym.vector import LiberoVectorEnv

# MuJoCo Warp's kernels compile once, for a minute; after that none of these takes ten seconds.
pytestmark = pytest.mark.slow

ALL = np.ones(2, np.bool_)
MANY = np.full(2, 1000)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    for module in (warp_worlds, raycast):
        monkeypatch.setattr(module, "default_device", lambda: "cpu")


def start(suite, task_id, init_state_id, placement_seed=0):
    return EpisodeStart(task=get_task(suite, task_id), init_state_id=init_state_id, placement_seed=placement_seed)


def make_worlds(suite, num_worlds, **options):
    tasks = list_tasks(suite)
    return WarpWorlds(load_scene(tasks[0]), tasks, num_worlds, device="cpu", **options)


def simulate(begin, init_states="settled"):
    simulation = Simulation(load_scene(begin.task))
    random_state = np.random.RandomState(begin.placement_seed)
    simulation.reset(begin.task, begin.init_state_id, random_state, init_states=init_states)
    return simulation


@pytest.fixture(scope="module")
def spatial():
    return make_worlds("libero_spatial", 2)


@pytest.fixture(scope="module")
def goal():
    return make_worlds("libero_goal", 10)


def upload(worlds, world, data):
    """Writes MuJoCo's derived quantities into world `world`."""
    live = worlds._live
    for name in ("qpos", "qvel", "qfrc_bias", "cdof", "subtree_com", "xpos", "xquat", "site_xpos"):
        getattr(live, name).numpy()[world] = getattr(data, name)  # on the CPU `numpy()` is a view
    live.inertia.numpy()[world] = data.M
    live.site_xmat.numpy()[world] = data.site_xmat.reshape(-1, 3, 3)


def test_controller_equals_the_reference(goal):
    scene, robot, count = goal.scene, goal.scene.robot, goal.num_worlds
    model = scene.physics_model
    creation, rng = creation_kinematics(model, robot), np.random.default_rng(0)
    data, state = mujoco.MjData(model), ControllerState()
    for sets_goal in (True, False, True):
        expected, memories = np.zeros((count, model.nu)), []
        actions = rng.uniform(-1.5, 1.5, (count, 7)).astype(np.float32)
        actions[::3, 3:6] = 0.0  # keeps the goal orientation
        actions[::4, 6] = 0.0  # holds the gripper
        for world in range(count):
            state.reset(creation)
            state.is_fresh[0] = world % 2
            state.gripper[:] = rng.uniform(-1, 1, 2)
            state.goal_pos[:] = creation.ee_pos + rng.uniform(-0.05, 0.05, 3)
            data.qpos[robot.arm_qpos_adr] = robot.init_qpos + rng.uniform(-0.4, 0.4, 7)
            data.qvel[robot.arm_dof_adr] = rng.uniform(-1, 1, 7)
            mujoco.mj_step1(model, data)
            upload(goal, world, data)
            memory = goal._memory
            for name in ("goal_pos", "goal_ori", "gripper", "is_fresh"):
                value = getattr(state, name)
                getattr(memory, name).numpy()[world] = value[0] if name == "is_fresh" else value
            control_substep(
                model=model,
                data=data,
                robot=robot,
                state=state,
                creation=creation,
                action=actions[world].astype(np.float64),
                sets_goal=sets_goal,
            )
            expected[world] = data.ctrl
            memories.append([state.goal_pos.copy(), state.goal_ori.copy(), state.gripper.copy()])
        goal._actions.assign(actions[:, None])
        goal._step.zero_()
        goal._is_active.fill_(1)
        goal._control(0 if sets_goal else 1)
        torques, limits = goal._live.ctrl.numpy()[:, robot.arm_actuator_ids], robot.torque_high
        wanted = expected[:, robot.arm_actuator_ids]
        assert np.mean(np.abs(wanted) < limits) > 0.5  # most are not clipped
        scale = np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.abs((torques - wanted) / scale).max() < 1e-4
        fingers = robot.gripper_actuator_ids
        np.testing.assert_allclose(goal._live.ctrl.numpy()[:, fingers], expected[:, fingers], atol=1e-6)
        for name, values in zip(("goal_pos", "goal_ori", "gripper"), zip(*memories, strict=True), strict=True):
            np.testing.assert_allclose(getattr(goal._memory, name).numpy(), np.array(values), atol=1e-6, err_msg=name)
        assert not goal._memory.is_fresh.numpy().any()


def test_axis_angles_equal_the_reference():
    quats = np.random.default_rng(0).normal(size=(50, 4))
    quats[0], quats[1] = [1, 0, 0, 0], [-0.5, 0.5, 0.5, 0.5]
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    expected = [axis_angle_from_quat(quat[[1, 2, 3, 0]]) for quat in quats]
    np.testing.assert_allclose(axis_angles(quats.astype(np.float32)), expected, atol=2e-6)


def test_starts_and_steps_as_the_cpu_does(spatial):
    """Settled states with fixtures of their own; the arm moves in both worlds, and nothing is touched."""
    starts = [start("libero_spatial", 4, 20), start("libero_spatial", 5, 3)]
    simulations = [simulate(begin) for begin in starts]
    spatial.reset(np.arange(2), starts, init_states="settled")
    arm = spatial.scene.robot.arm_qpos_adr
    np.testing.assert_allclose(spatial.states(), [s.states() for s in simulations], atol=1e-6)
    # Fixtures are part of the world's model: their shapes must have moved too, though no joint moves them.
    for world, simulation in enumerate(simulations):
        geoms = spatial._data.geom_xpos.numpy()[world], spatial._data.geom_xmat.numpy()[world].reshape(-1, 9)
        np.testing.assert_allclose(geoms[0], simulation.data.geom_xpos, atol=1e-6)
        np.testing.assert_allclose(geoms[1], simulation.data.geom_xmat, atol=1e-6)
    assert np.abs(spatial._data.geom_xpos.numpy()[0] - spatial._data.geom_xpos.numpy()[1]).max() > 5e-3
    rng = np.random.default_rng(1)
    for _ in range(3):
        actions = rng.uniform(-1, 1, (2, 1, 7)).astype(np.float32)
        ran, successes = spatial.step(actions, ALL, MANY)
        assert ran.all()
        assert not successes.any()
        for simulation, action in zip(simulations, actions[:, 0], strict=True):
            simulation.step(action)
        expected = np.array([simulation.data.qpos for simulation in simulations])
        np.testing.assert_allclose(spatial.qpos()[:, arm], expected[:, arm], atol=1e-4)
        np.testing.assert_allclose(spatial.qpos(), expected, atol=1e-3)
        np.testing.assert_allclose(spatial.states(), [s.states() for s in simulations], atol=1e-4)


def test_held_out_states_start_as_on_the_cpu(spatial):
    starts = [start("libero_spatial", 4, 20), start("libero_spatial", 5, 3)]
    simulations = [simulate(begin, "held_out") for begin in starts]
    spatial.reset(np.arange(2), starts, init_states="held_out")
    np.testing.assert_allclose(spatial.qpos(), [s.data.qpos for s in simulations], atol=1e-6)
    geoms = [s.data.geom_xpos for s in simulations]  # those of fixtures too
    np.testing.assert_allclose(spatial._data.geom_xpos.numpy(), geoms, atol=1e-6)


def test_original_states_settle_as_the_cpu_lets_them(spatial):
    """The first substep works with the posture of the controller's creation; without that the arm ends 1e-2 off."""
    spatial.reset(np.arange(2), [start("libero_spatial", 0, 0)] * 2, init_states="settled")
    before = spatial.get_state(0)
    begin = start("libero_spatial", 3, 9, placement_seed=5)
    spatial.reset(np.array([1]), [begin], init_states="original")
    simulation = simulate(begin, "original")
    arm = spatial.scene.robot.arm_qpos_adr
    np.testing.assert_allclose(spatial.qpos()[1, arm], simulation.data.qpos[arm], atol=1e-4)
    np.testing.assert_allclose(spatial.qpos()[1], simulation.data.qpos, atol=5e-3)
    np.testing.assert_allclose(spatial.states()[1], simulation.states(), atol=1e-4)
    for name, value in spatial.get_state(0).items():  # the other world idled
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("suite", "task_ids"),
    [("libero_goal", range(10)), ("libero_10", (3,)), ("libero_90", (39,)), ("libero_object", (0,))],
)
def test_goals_equal_the_reference(suite, task_ids):
    """On objects, on parts of fixtures, on regions of the table, in, open, close, turned on and off."""
    tasks = [get_task(suite, task_id) for task_id in task_ids]
    scene = load_scene(tasks[0])
    worlds = WarpWorlds(scene, tasks, len(tasks), device="cpu", options=WarpOptions(contacts_per_world=2000))
    goals = [load_task_data(scene, task).goal for task in tasks]
    model, data, rng = scene.physics_model, mujoco.MjData(scene.physics_model), np.random.default_rng(0)
    starts = [load_task_data(scene, task).init_states[0, 1 : 1 + model.nq] for task in tasks]
    worlds._world_task.assign(np.arange(len(tasks)))
    worlds._is_active.fill_(1)
    contact, positives = worlds._data.contact, 0
    for _ in range(300 // len(tasks)):
        expected, geoms, owners = [], [], []
        for world, task_goal in enumerate(goals):
            qpos = starts[world].copy()
            for atom in task_goal.atoms:
                _perturb(scene, model, data, qpos, atom, rng)
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            upload(worlds, world, data)
            geoms.append(data.contact.geom.copy())
            owners += [world] * data.ncon
            expected.append(task_goal(data))
        touching = np.concatenate(geoms)
        contact.geom.numpy()[: len(touching)] = touching
        contact.worldid.numpy()[: len(touching)] = owners
        worlds._data.nacon.fill_(len(touching))
        worlds._judge()
        assert worlds.success().tolist() == expected
        positives += sum(expected)
    assert positives > 20


def test_recorded_expert_actions_succeed():
    """A bowl lifted from the table, one from a drawer; a drawer opened and a knob turned in the other scene."""
    for suite, cases in (("libero_spatial", ((0, 7), (4, 20))), ("libero_goal", ((0, 5), (7, 5)))):
        episodes = [run_expert(None, get_task(suite, task_id), state_id) for task_id, state_id in cases]
        assert all(episode.success for episode in episodes)
        still = dataclasses.replace(episodes[0], actions=0 * episodes[0].actions)
        assert replay([*episodes, still], WarpOptions()) == [True, True, False]


def test_captured_step_equals_its_launches(spatial):
    spatial.reset(np.arange(2), [start("libero_spatial", 0, 1), start("libero_spatial", 1, 2)], init_states="settled")
    state = [spatial.get_state(world) for world in range(2)]
    actions = np.random.default_rng(3).uniform(-1, 1, (2, 1, 7)).astype(np.float32)
    spatial.step(actions, ALL, MANY)
    expected = spatial.qpos(), spatial.states()
    for world in range(2):
        spatial.set_state(world, state[world])
    spatial._is_active.fill_(1)
    spatial._step.zero_()
    spatial._launch_step()
    np.testing.assert_array_equal(spatial.qpos(), expected[0])
    np.testing.assert_array_equal(spatial.states(), expected[1])


def test_images_equal_those_of_the_simulation(goal):
    """The renderer gets poses from the device; the stove's glow, an indicator, among them."""
    starts = [start("libero_goal", world, 0) for world in range(10)]
    goal.reset(np.arange(10), starts, init_states="settled")
    state = goal.get_state(4)
    (knob,) = goal.scene.objects["flat_stove_1"].joint_qpos_adr
    state["qpos"][knob] = 1.0
    goal.set_state(4, state)
    actions = np.zeros((10, 1, 7), np.float32)
    simulation = simulate(starts[4])
    simulation.data.qpos[knob] = 1.0
    for _ in range(2):  # the glow lags a step behind
        goal.step(actions, np.arange(10) == 4, np.full(10, 1000))
        simulation.step(actions[4, 0])
    renderer = WarpRenderer(("agentview", "robot0_eye_in_hand"), 48, device="cpu")
    expected = renderer.render([simulation])
    poses = goal.poses(np.array([4, 0]))
    assert (poses.lit_sites[0] >= 0).any()
    assert (poses.lit_sites[1] < 0).all()
    images = renderer.views_of_poses(poses).images
    assert np.mean(np.abs(images[:1].astype(np.int32) - expected) > 2) < 1e-3
    assert np.mean(np.abs(images[1:].astype(np.int32) - expected) > 2) > 1e-2
    renderer.close()


@pytest.mark.gpu
@pytest.mark.skipif(not any(name.startswith("cuda") for name in list_devices()), reason="needs a CUDA device")
def test_gpu_agrees_with_the_cpu():
    """Physics before contact, and images of poses that never left the GPU."""
    starts = [start("libero_spatial", 4, 20), start("libero_spatial", 5, 3)]
    results = []
    for device in ("cpu", "cuda:0"):
        worlds = WarpWorlds(load_scene(starts[0].task), list_tasks("libero_spatial"), 2, device=device)
        worlds.reset(np.arange(2), starts, init_states="settled")
        rng = np.random.default_rng(0)
        for _ in range(3):
            worlds.step(rng.uniform(-1, 1, (2, 1, 7)), ALL, MANY)
        renderer = WarpRenderer(("agentview", "robot0_eye_in_hand"), 64, device=device)
        images = renderer.views_of_poses(worlds.poses(np.arange(2)), as_torch=True).images
        assert images.device.type == device.partition(":")[0]
        results.append((worlds.states(), images.cpu().numpy().astype(np.int32)))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4)
    assert np.mean(np.abs(results[0][1] - results[1][1]) > 2) < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (WarpOptions(constraints_per_world=100), "more constraints than constraints_per_world in worlds \\[0, 1\\]"),
        (WarpOptions(contacts_per_world=16), "than contacts_per_world in worlds"),
    ],
)
def test_overflow_raises(options, message):
    worlds = make_worlds("libero_spatial", 2, options=options)
    worlds.reset(np.arange(2), [start("libero_spatial", 0, 0)] * 2, init_states="settled")
    with pytest.raises(PhysicsError, match=message):
        worlds.step(np.zeros((2, 1, 7)), ALL, MANY)


def test_divergence_raises_and_a_reset_clears_it(spatial):
    begin = start("libero_spatial", 0, 0)
    spatial.reset(np.arange(2), [begin] * 2, init_states="settled")
    state = spatial.get_state(1)
    state["qvel"][:] = 1e9
    spatial.set_state(1, state)
    with pytest.raises(PhysicsError, match=r"diverged in worlds \[1\]"):
        spatial.step(np.zeros((2, 1, 7)), ALL, MANY)
    spatial.reset(np.array([1]), [begin], init_states="settled")
    spatial.step(np.zeros((2, 1, 7)), ALL, MANY)
    np.testing.assert_allclose(spatial.states()[0], spatial.states()[1], atol=1e-3)


def test_bad_arguments_of_worlds(spatial):
    tasks = list_tasks("libero_spatial")
    with pytest.raises(ValueError, match=r"Warp has no device 'cuda:7' \(valid: .*'cpu'"):
        WarpWorlds(spatial.scene, tasks, 2, device="cuda:7")
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=f"solver_iterations={value} is not an integer of at least 1"):
            WarpOptions(solver_iterations=value)
    with pytest.raises(ValueError, match=r"\['libero_goal/0'\] are not among those of these worlds"):
        spatial.reset(np.array([0]), [start("libero_goal", 0, 0)], init_states="settled")
    fresh = WarpWorlds(spatial.scene, tasks, 2, device="cpu")
    fresh.reset(np.array([1]), [start("libero_spatial", 0, 0)], init_states="settled")
    ran, _ = fresh.step(np.zeros((2, 1, 7)), np.array([False, True]), MANY)
    assert ran[:, 0].tolist() == [False, True]
    with pytest.raises(ValueError, match=r"worlds \[0\] were never reset"):
        fresh.step(np.zeros((2, 1, 7)), ALL, MANY)


def make_env(num_envs=2, **options):
    return LiberoVectorEnv("libero_goal", num_envs, physics="warp", **({"observe_images": False} | options))


def no_motion(*lead):
    action = np.zeros((*lead, 7), np.float32)
    action[..., 6] = -1
    return action


def force_success(env, env_id):
    """Turns the goal of environment `env_id` into one that holds: its knob is past the threshold."""
    (knob,) = env.worlds.scene.objects["flat_stove_1"].joint_qpos_adr
    state = env.worlds.get_state(env_id)
    state["qpos"][knob] = 1.0
    env.worlds.set_state(env_id, state)


STOVE = 7  # "turn on the stove"


def test_chunks_equal_single_steps_and_end_with_the_episode():
    plain, chunked = make_env(), make_env(num_action_chunks=4, horizon=6, autoreset_mode="DISABLED")
    choice = {"task_id": np.array([1, STOVE]), "init_state_id": 3}
    first, infos = plain.reset(seed=0, options=choice)
    assert plain.observation_space.contains(first)
    assert infos["task_id"].tolist() == [1, STOVE]
    chunked.reset(seed=0, options=choice)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 2, 7)).astype(np.float32)
    for action in actions:
        expected, *_ = plain.step(action)
    observation, rewards, *_, infos = chunked.step(np.moveaxis(actions, 0, 1))
    np.testing.assert_array_equal(observation["states"], expected["states"])
    assert infos["num_steps"].tolist() == [4, 4]
    force_success(chunked, 1)
    observation, rewards, terminations, truncations, infos = chunked.step(no_motion(2, 4))
    assert infos["num_steps"].tolist() == [2, 1]
    np.testing.assert_array_equal(infos["rewards"], [[0, 0, 0, 0], [1, 0, 0, 0]])
    assert (rewards.tolist(), rewards.dtype) == ([0, 1], np.float64)
    assert terminations.tolist() == [False, True]
    assert truncations.tolist() == [True, False]
    assert infos["success"].tolist() == [False, True]
    assert infos["episode_length"].tolist() == [6, 5]
    idle, rewards, terminations, truncations, infos = chunked.step(no_motion(2, 4))
    np.testing.assert_array_equal(idle["states"], observation["states"])
    assert not any(values.any() for values in (rewards, terminations, truncations, infos["num_steps"]))
    mask = np.array([False, True])
    fresh, infos = chunked.reset(options={"reset_mask": mask, "task_id": 2, "init_state_id": 1})
    np.testing.assert_array_equal(fresh["states"][0], observation["states"][0])
    assert (fresh["states"][1] != observation["states"][1]).any()
    assert infos["task_id"].tolist() == [1, 2]
    assert infos["episode_length"].tolist() == [6, 0]
    plain.close()
    chunked.close()
    chunked.close()


def test_same_step_autoreset_gives_final_observation_and_info():
    pytest.importorskip("torch", reason="torch is no part of this environment")
    env = make_env(
        horizon=2,
        observe_images=True,
        image_size=16,
        reward="relative",
        images_as_torch=True,
        autoreset_mode="SAME_STEP",
    )
    env.reset(seed=0, options={"task_id": np.array([STOVE, 2]), "init_state_id": 0})
    env.step(no_motion(2))
    force_success(env, 0)
    before = env.observe()
    observation, rewards, terminations, truncations, infos = env.step(no_motion(2))
    assert rewards.tolist() == [1, 0]
    assert terminations.tolist() == [True, False]
    assert truncations.tolist() == [True, True]
    assert infos["_final_obs"].tolist() == [True, True]
    final = infos["final_obs"]
    np.testing.assert_allclose(final["states"], before["states"], atol=0.02)
    assert (final["states"] != observation["states"]).any(axis=1).all()
    assert (final["images"] != observation["images"]).any()
    assert tuple(final["task_descriptions"]) == before["task_descriptions"]
    assert infos["final_info"]["episode_length"].tolist() == [2, 2]
    assert infos["final_info"]["success"].tolist() == [True, False]
    assert infos["episode_length"].tolist() == [0, 0]
    assert infos["success"].tolist() == [False, False]
    assert observation["images"].shape == (2, 16, 16, 3)
    env.close()


def test_next_step_autoreset_ignores_one_action():
    env = make_env(1, horizon=1, autoreset_mode="NEXT_STEP")
    env.reset(seed=0)
    ended, _, _, truncations, infos = env.step(no_motion(1))
    assert truncations.all()
    assert "final_obs" not in infos
    observation, rewards, terminations, truncations, infos = env.step(no_motion(1))
    assert (infos["num_steps"].item(), infos["episode_length"].item(), rewards.item()) == (0, 0, 0)
    assert not (terminations | truncations).any()
    assert (observation["states"] != ended["states"]).any()
    assert env.step(no_motion(1))[3].all()
    env.close()


def test_state_restores_and_branches():
    env = make_env()
    env.reset(seed=0)
    env.step(no_motion(2))
    state = env.get_state(0)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 2, 7)).astype(np.float32)
    actions[:, 1] = actions[:, 0]
    expected = [env.step(action)[0]["states"][0] for action in actions]
    for env_id in range(2):
        env.set_state(env_id, state)
    for action, states in zip(actions, expected, strict=True):
        observation, *_, infos = env.step(action)
        np.testing.assert_allclose(observation["states"], [states, states], atol=1e-6)
    assert infos["episode_length"].tolist() == [3, 3]
    assert env.get_state(0)["rng"] == env.get_state(1)["rng"]
    for at_once, alone in zip(env.get_states(), (env.get_state(i) for i in range(env.num_envs)), strict=True):
        assert at_once.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_array_equal(at_once[name], value, err_msg=name)
    env.close()


def test_made_by_id_or_by_the_physics_of_the_vector_environment():
    options = {"num_envs": 2, "physics": "warp", "observe_images": False}
    made = gymnasium.make_vec("libero_gym/libero_goal-v0", vectorization_mode="vector_entry_point", **options)
    for env in (made.unwrapped, LiberoVectorEnv("libero_goal", **options)):
        assert isinstance(env.worlds, WarpWorlds)
        env.close()
    assert isinstance(LiberoVectorEnv("libero_goal", observe_images=False).worlds, CpuWorlds)


def test_draws_are_those_of_the_cpu_environments():
    env, cpu = make_env(), LiberoVectorEnv("libero_goal", 2, observe_images=False)
    observation, infos = env.reset(seed=11)
    expected, expected_infos = cpu.reset(seed=11)
    for key, values in expected_infos.items():
        np.testing.assert_array_equal(infos[key], values, err_msg=key)
        assert infos[key].dtype == values.dtype, key
    np.testing.assert_allclose(observation["states"], expected["states"], atol=1e-6)
    assert observation["task_descriptions"] == expected["task_descriptions"]
    results, expected_results = env.step(no_motion(2)), cpu.step(no_motion(2))
    for values, expected_values in zip(results[1:4], expected_results[1:4], strict=True):
        np.testing.assert_array_equal(values, expected_values)
        assert values.dtype == expected_values.dtype
    assert results[4].keys() == expected_results[4].keys()
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stepping": "fast"}, "stepping='fast' chooses among CPU steppers"),
        ({"renderer": "egl", "observe_images": True}, "draws with renderer='warp'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiberoVectorEnv(
            **({"suite": "libero_goal", "num_envs": 2, "observe_images": False, "physics": "warp"} | arguments)
        )


def test_bad_calls_are_refused():
    env = make_env(task_ids=[1, 3])
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        env.step(no_motion(2))
    with pytest.raises(ValueError, match=r"never reset"):
        env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match=r"task_id=2 of libero_goal is not among .*\(valid: \[1, 3\]\)"):
        env.reset(options={"task_id": 2})
    with pytest.raises(ValueError, match=r"init_state_id=50 is not among .*\(valid: 0-49\)"):
        env.reset(options={"init_state_id": 50})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 6\); expected \(2, 7\)"):
        env.step(np.zeros((2, 6), np.float32))
    bad = no_motion(2)
    bad[1, 3] = np.nan
    with pytest.raises(PhysicsError, match=r"environments \[1\] are not finite"):
        env.step(bad)
    with pytest.raises(AttributeError, match="no simulation for each environment"):
        env.call("simulation")
    state = env.get_state(0)
    for change, message in (
        ({"suite": np.array("libero_10")}, "belongs to suite libero_10, these environments to libero_goal"),
        ({"scene": np.array("other")}, "belongs to scene other"),
        ({"task_id": np.array(2)}, r"tasks \['libero_goal/2'\] are not among"),
    ):
        with pytest.raises(ValueError, match=message):
            env.set_state(1, state | change)
    env.close()
    with pytest.raises(ValueError, match="is closed"):
        env.observe()


def test_a_cpu_in_place_of_a_gpu_is_told(caplog):
    assert choose_device("cpu") == "cpu"
    assert not caplog.records  # as asked for
    assert choose_device(None) == "cpu"
    assert "finds no CUDA device and simulates on the CPU" in caplog.text
