"""Object poses and the goal's parts, on the CPU and of GPU physics."""

import numpy as np
import pytest

from libero_gym.env import LiberoEnv
from libero_gym.experts import make_expert
from libero_gym.vector import LiberoVectorEnv

BOTH = "libero_10"  # task 0: two things in the basket


def test_poses_are_those_of_the_bodies():
    env = LiberoEnv("libero_goal", task_id=1, observe_images=False)
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        env.object_poses()
    env.reset(seed=0)
    poses = env.object_poses()
    assert set(poses) == set(env.simulation.scene.objects)
    bowl = env.data.body(env.simulation.scene.objects["akita_black_bowl_1"].body_id)
    np.testing.assert_array_equal(poses["akita_black_bowl_1"], [*bowl.xpos, *bowl.xquat])
    poses["akita_black_bowl_1"][:] = 0
    assert env.object_poses()["akita_black_bowl_1"].any()
    envs = LiberoVectorEnv("libero_goal", 2, task_id=1, observe_images=False)
    envs.reset(seed=0)
    for name, pose in env.object_poses().items():
        np.testing.assert_array_equal(envs.object_poses(0)[name], pose)
        np.testing.assert_array_equal(envs.call("object_poses")[0][name], pose)


def test_a_state_holds_what_they_tell():
    options = dict(task_id=1, observe_images=False, action_mode="absolute_pose")
    env, envs = LiberoEnv("libero_goal", **options), LiberoVectorEnv("libero_goal", 1, **options)
    env.reset(seed=0)
    action = env.hold_action()
    action[2] -= 0.05
    for _ in range(3):
        env.step(action)
    envs.set_state(0, env.get_state())
    np.testing.assert_array_equal(envs.hold_action(0), env.hold_action())
    assert envs.goal_state(0) == env.goal_state()
    for name, pose in env.object_poses().items():
        np.testing.assert_array_equal(envs.object_poses(0)[name], pose)
    envs.step(action[None])  # poses are of 2 ms before the step's end
    assert (envs.hold_action(0) != env.hold_action()).any()


@pytest.mark.slow
def test_parts_of_a_goal_come_true_one_by_one_and_all_are_success():
    env = LiberoEnv(BOTH, task_id=0, observe_images=False)
    env.reset(seed=0, options={"init_state_id": 0})
    atoms = ["in alphabet_soup_1 basket_1_contain_region", "in tomato_sauce_1 basket_1_contain_region"]
    assert env.goal_state() == dict.fromkeys(atoms, False)
    expert = make_expert(env.task)
    expert.reset(env.simulation, np.random.default_rng(0))
    counts = [0]
    terminated = truncated = False
    while not (terminated or truncated):
        *_, terminated, truncated, info = env.step(expert.act(env.simulation))
        counts.append(sum(env.goal_state().values()))
        assert info["success"] == (counts[-1] == 2)
    assert set(counts) == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_physics_tells_them_too():
    pytest.importorskip("mujoco_warp", reason="the extra warp-physics is not installed")
    warp = LiberoVectorEnv("libero_goal", 2, physics="warp", observe_images=False)
    single = LiberoEnv("libero_goal", observe_images=False)
    warp.reset(seed=0, options={"task_id": np.array([7, 1]), "init_state_id": 3})
    for env_id, task_id in enumerate((7, 1)):
        single.reset(seed=0, options={"task_id": task_id, "init_state_id": 3})
        assert warp.goal_state(env_id) == single.goal_state() == dict.fromkeys(single.goal_state(), False)
        for name, pose in single.object_poses().items():
            np.testing.assert_allclose(warp.object_poses(env_id)[name], pose, atol=1e-5, err_msg=name)
    state = warp.get_state(0)
    stove = single.simulation.scene.objects["flat_stove_1"]
    state["qpos"][list(stove.joint_qpos_adr)] = 1.0
    warp.set_state(0, state)
    assert warp.goal_state(0) == {"turnon flat_stove_1": True}
    warp.close()
