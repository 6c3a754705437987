"""LIBERO's own environment as a vector environment: the same episodes as ours, and loud when it breaks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from algorithms.collect_demos import Attempt, record
from algorithms.common.reference_env import ReferenceVectorEnv
from benchmarks.parity import make_actions
from libero_gym.experts import ExpertConfig
from libero_gym.physics.simulation import PhysicsError
from libero_gym.vector import LiberoVectorEnv

CHUNK = 5


def pair(suite: str, init_states: Any, horizon: int, num_envs: int = 1) -> tuple[LiberoVectorEnv, ReferenceVectorEnv]:
    options: dict[str, Any] = dict(
        num_action_chunks=CHUNK, observe_images=False, init_states=init_states, horizon=horizon
    )
    ours = LiberoVectorEnv(suite, num_envs, autoreset_mode=AutoresetMode.DISABLED, **options)
    return ours, ReferenceVectorEnv(suite, num_envs, **options)


def assert_equal_steps(ours: tuple[Any, ...], reference: tuple[Any, ...]) -> None:
    """Everything that a reset or step returned, to the last bit."""
    np.testing.assert_array_equal(reference[0]["states"], ours[0]["states"])
    assert reference[0]["task_descriptions"] == ours[0]["task_descriptions"]
    for theirs, mine in zip(reference[1:-1], ours[1:-1], strict=True):
        np.testing.assert_array_equal(theirs, mine)
        assert theirs.dtype == mine.dtype
    for name, value in reference[-1].items():
        np.testing.assert_array_equal(value, ours[-1][name], err_msg=name)
        assert value.dtype == ours[-1][name].dtype, name


@pytest.mark.slow
def test_original_states_and_success_equal_ours_to_the_last_bit():
    """Task 4 draws a drawer's position at each reset; the second episode differs if samplers pile up."""
    ours, reference = pair("libero_spatial", "original", horizon=2 * CHUNK, num_envs=2)
    assert reference.single_observation_space == ours.single_observation_space
    assert reference.observation_space == ours.observation_space
    assert reference.action_space == ours.action_space
    assert reference.single_action_space == ours.single_action_space
    for episode, mask in enumerate(([True, True], [False, True])):
        options = dict(task_id=np.array([0, 4]), init_state_id=np.array([3, 11]), reset_mask=np.array(mask))
        seeds = [episode, 7 + episode]
        assert_equal_steps(ours.reset(seed=seeds, options=options), reference.reset(seed=seeds, options=options))
        for _ in range(3):  # the last call finds both at the horizon, idle
            actions = np.stack([make_actions("random", CHUNK, i) for i in range(2)]).astype(np.float32)
            outcome = reference.step(actions)
            assert_equal_steps(ours.step(actions), outcome)
        assert not outcome[-1]["num_steps"].any()
    ours.close()
    reference.close()
    reference.close()


@pytest.mark.slow
def test_settled_states_and_success_equal_ours_to_the_last_bit():
    """An expert's actions, found in our environment, solve the task in LIBERO's at the same step."""
    attempt = Attempt(
        suite="libero_goal", task_id=6, attempt_id=0, init_state_id=2, seed=0, object_shift=0.0, horizon=120
    )
    actions = record(attempt, ExpertConfig(speed=1.25)).actions  # ends with success
    assert 20 < len(actions) < 120
    ours, reference = pair("libero_goal", "settled", horizon=120)
    options = dict(task_id=6, init_state_id=2)
    assert_equal_steps(ours.reset(seed=0, options=options), reference.reset(seed=0, options=options))
    padded = np.concatenate([actions, np.zeros((-len(actions) % CHUNK, 7), np.float32)])
    for chunk in padded.reshape(-1, 1, CHUNK, 7):
        outcome = reference.step(chunk)
        assert_equal_steps(ours.step(chunk), outcome)
    _, rewards, terminated, truncated, infos = outcome
    assert (rewards[0], terminated[0], truncated[0]) == (1.0, True, False)
    assert (infos["success"][0], infos["episode_length"][0]) == (True, len(actions))
    ours.close()
    reference.close()


def test_held_out_states_equal_ours_to_the_last_bit():
    ours, reference = pair("libero_spatial", "held_out", horizon=CHUNK)
    options = dict(task_id=5, init_state_id=49)
    assert_equal_steps(ours.reset(seed=0, options=options), reference.reset(seed=0, options=options))
    actions = make_actions("random", CHUNK, 0)[None].astype(np.float32)
    assert_equal_steps(ours.step(actions), reference.step(actions))
    ours.close()
    reference.close()


# OpenGL leaves traces in the process that imports it.
IMAGES = """
import sys
import numpy as np
from algorithms.common.reference_env import ReferenceVectorEnv
from libero_gym.vector import LiberoVectorEnv
options = dict(image_size=48, renderer=sys.argv[1], init_states="settled")
reference = ReferenceVectorEnv("libero_spatial", 1, **options)
ours = LiberoVectorEnv("libero_spatial", 1, texture_colorspace=reference.texture_colorspace, **options)
start = dict(seed=0, options=dict(task_id=2, init_state_id=3))
pairs = [(ours.reset(**start), reference.reset(**start))]
action = np.array([[0.3, -0.2, 0.1, 0, 0, 0.2, 1]], np.float32)
pairs += [(ours.step(action), reference.step(action)) for _ in range(2)]
for key in ("images", "wrist_images"):
    images = [[outcome[0][key] for outcome in pair] for pair in pairs]
    assert images[0][0].std() > 10 and (images[0][0] != images[2][0]).any()
    print(key, [int((mine != theirs).sum()) for mine, theirs in images])
reference.close()
"""


@pytest.mark.slow
def test_images_equal_ours_in_the_look_that_it_names():
    for kind in ("egl", "osmesa"):
        probe = f"from libero_gym.rendering.renderers import GlRenderer; GlRenderer({kind!r}, (), 8).describe_device()"
        if subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no OpenGL here: neither EGL nor OSMesa (Debian: libosmesa6) works")
    command = [sys.executable, "-c", IMAGES, kind]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines() == ["images [0, 0, 0]", "wrist_images [0, 0, 0]"]


def make_goal_env() -> ReferenceVectorEnv:
    return ReferenceVectorEnv("libero_goal", num_action_chunks=2, observe_images=False)


@pytest.fixture(scope="module")
def fresh_env() -> Iterator[ReferenceVectorEnv]:
    """One that is never reset."""
    with closing(make_goal_env()) as env:
        yield env


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (None, {"task_id": 0, "init_state_id": 0}, "reset needs seed=None"),
        (0, {"task_id": 0}, r"missing: \['init_state_id'\]"),
        (0, {"task_id": 0, "init_state_id": 0, "state": 1}, r"unknown: \['state'\]"),
        (0, {"task_id": 10, "init_state_id": 0}, r"task_id=10 is not in libero_goal \(valid: 0-9\)"),
        (0, {"task_id": 1, "init_state_id": 50}, r"init_state_id=50 .*libero_goal task 1 \(valid: 0-49\)"),
        (0, {"task_id": 1, "init_state_id": 0, "reset_mask": np.array([False])}, r"\[0\], which were never reset"),
        (0, {"task_id": 1, "init_state_id": 0, "reset_mask": [1]}, r"reset_mask is int64"),
    ],
)
def test_bad_resets(fresh_env: ReferenceVectorEnv, seed: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        fresh_env.reset(seed=seed, options=options)


def test_bad_steps():
    with closing(make_goal_env()) as env:
        with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
            env.step(np.zeros((1, 2, 7), np.float32))
        env.reset(seed=0, options={"task_id": 0, "init_state_id": 0})
        with pytest.raises(ValueError, match=r"actions have shape \(1, 7\); expected \(1, 2, 7\)"):
            env.step(np.zeros((1, 7), np.float32))
        nonsense = np.full((1, 2, 7), np.nan, np.float32)
        with pytest.raises(PhysicsError, match="actions are not finite"):
            env.step(nonsense)
        env._episodes[0]["is_over"] = True
        *_, infos = env.step(nonsense)  # what idles takes anything
        assert infos["num_steps"].tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renderer": "warp"}, r"renderer='warp' is none that LIBERO has \(valid: None, 'egl', 'osmesa'\)"),
        ({"num_envs": 0}, r"num_envs=0"),
        ({"horizon": 0}, r"horizon=0 is not a positive number"),
        ({"init_states": "fresh"}, r"init_states='fresh' is unknown"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ReferenceVectorEnv("libero_goal", **options)


def test_what_fails_in_a_process_is_raised_with_its_trace():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_GYM_CACHE", os.devnull)  # nothing can be written there
        env = ReferenceVectorEnv("libero_goal", observe_images=False)
        with pytest.raises(RuntimeError, match=r"environment 0 of 1 failed(.|\n)*/dev/null"):
            env.reset(seed=0, options={"task_id": 0, "init_state_id": 0})
        env.close()


def test_a_process_that_dies_is_an_error():
    env = ReferenceVectorEnv("libero_goal", observe_images=False)
    (worker,) = env._workers
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"environment 0 of 1 failed\n.* ended with code -9"):
        env.reset(seed=0, options={"task_id": 0, "init_state_id": 0})
    env.close()
