"""The controller three times: plain NumPy, native exact, native fast; and the native step among threads."""

import sys
import threading

import numpy as np
import pytest

from libero_gym.physics.controller import axis_angle_from_quat, rotation_matrix
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task


def _run(stepping, actions, *, suite="libero_goal", task_id=0, init_state_id=3):
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task), stepping=stepping)
    simulation.reset(task, init_state_id, np.random.RandomState(0), init_states="original", num_settling_steps=2)
    trajectory = []
    for action in actions:
        simulation.step(action)
        trajectory.append(np.concatenate([simulation.data.qpos, simulation.data.qvel, simulation.states()]))
    return np.array(trajectory)


def test_exact_equals_numpy_to_the_last_bit():
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, (30, 7))
    actions[10:20, 3:6] = 0.0  # the goal orientation is kept
    actions[15:, 2] = -1.0  # down on the table
    actions[25, 6] = 0.0  # the gripper holds
    np.testing.assert_array_equal(_run("exact", actions), _run("numpy", actions))


def test_fast_agrees_before_contact():
    actions = np.random.default_rng(1).uniform(-0.5, 0.5, (30, 7))
    actions[:, 2] = np.abs(actions[:, 2])
    np.testing.assert_allclose(_run("fast", actions), _run("exact", actions), rtol=0, atol=1e-9)


def test_actions_are_clipped():
    actions = np.random.default_rng(2).choice([-1.0, 1.0], (8, 7))
    np.testing.assert_array_equal(_run("exact", actions), _run("exact", 3.0 * actions))


def test_threads_do_not_disturb_each_other():
    actions = np.random.default_rng(3).uniform(-1, 1, (4, 25, 7))
    alone = [_run("exact", a, init_state_id=i) for i, a in enumerate(actions)]
    together: list[np.ndarray] = [np.empty(0)] * 4

    def work(i: int) -> None:
        together[i] = _run("exact", actions[i], init_state_id=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, result in zip(alone, together, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_step_releases_the_interpreter_lock():
    task = get_task("libero_goal", 0)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    num_done = 0

    def work() -> None:
        nonlocal num_done
        for _ in range(200):
            simulation.step(np.zeros(7))
            num_done += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100.0)  # the main thread runs only if the worker lets go by itself
    try:
        thread = threading.Thread(target=work)
        thread.start()
        seen = num_done
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert num_done == 200
    assert seen < 10


def test_rotation_matrix_is_a_rotation_in_single_precision():
    for axis_angle in np.random.default_rng(4).uniform(-0.5, 0.5, (20, 3)):
        matrix = rotation_matrix(axis_angle)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=3e-7)
        np.testing.assert_allclose(matrix @ axis_angle, axis_angle, atol=3e-7)


@pytest.mark.parametrize(
    ("quat_xyzw", "expected"),
    [
        ([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 1.0, 0.0], [0.0, 0.0, np.pi]),
        ([np.sin(0.2), 0.0, 0.0, np.cos(0.2)], [0.4, 0.0, 0.0]),
        ([0.0, -np.sin(2.0), 0.0, np.cos(2.0)], [0.0, -4.0, 0.0]),  # angles up to 2 pi, not wrapped
        ([0.0, 0.0, 0.0, 1.0 + 1e-12], [0.0, 0.0, 0.0]),
    ],
)
def test_axis_angle_by_hand(quat_xyzw, expected):
    np.testing.assert_allclose(axis_angle_from_quat(np.array(quat_xyzw)), expected, atol=1e-7)
