"""Every example runs, with small arguments, and does what it says."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from algorithms import eval_gr00t
from examples import (
    env,
    gr00t_in_cleanrl,
    lerobot_policy,
    own_agent_in_ppo,
    own_policy,
    own_robot,
    policy_to_evaluate,
    record_video,
)
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import LeRobotVectorEnv
from libero_gym.vector import LiberoVectorEnv

EXAMPLES = Path(own_policy.__file__).parent
COVERED = {
    env, gr00t_in_cleanrl, lerobot_policy, own_agent_in_ppo, own_policy, own_robot, policy_to_evaluate, record_video
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_each_example_has_a_test_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"}
    assert names == {Path(str(module.__file__)).stem for module in COVERED}


def test_record_video_films_each_episode(tmp_path: Path):
    folder = tmp_path / "films"  # RecordVideo warns of a folder that is there
    successes = record_video.record("libero_spatial", 3, num_episodes=2, image_size=64, output=folder, max_steps=12)
    assert successes == [False, False]  # a demonstration takes some hundred steps
    films = sorted(folder.glob("libero_spatial-3-episode-*.mp4"))
    assert len(films) == 2
    with av.open(str(films[0])) as film:
        (stream,) = film.streams
        assert (stream.width, stream.height, float(stream.average_rate)) == (64, 64, 20.0)
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert len(pictures) == 13  # the reset's and one a step
    assert pictures[0].std() > 10


def test_lerobot_policys_environment_speaks_as_lerobot_does():
    """`eval_policy` itself runs in tests/test_libraries.py, where LeRobot is installed."""
    envs = lerobot_policy.make_envs("libero_spatial", 3, 2, image_size=16, horizon=20)
    observation, _ = envs.reset(seed=[0, 1])
    assert {name: view.shape for name, view in observation["pixels"].items()} == {
        "image": (2, 16, 16, 3), "wrist_image": (2, 16, 16, 3)
    }  # fmt: skip
    assert observation["agent_pos"].shape == (2, 8)
    assert envs.call("_max_episode_steps")[0] == 20
    assert envs.call("task_description")[1] == envs.envs[0].task_description
    actions = np.zeros((2, 7))
    actions[:, 6] = [1, 0]  # open, closed
    for _ in range(20):
        *_, info = envs.step(actions)
    assert info["final_info"]["is_success"].tolist() == [False, False]
    openness = np.abs(info["final_obs"]["agent_pos"][:, 6:]).mean(axis=1)
    assert openness[0] > 0.035
    assert openness[1] < 0.01
    envs.close()


def test_the_hubs_environment_is_one_of_each_task():
    """LeRobot itself loads it in tests/test_libraries.py."""
    made = env.make_env(n_envs=2, cfg=SimpleNamespace(task="libero_goal"))
    assert list(made) == ["libero_goal"]
    assert list(made["libero_goal"]) == list(range(10))
    envs = made["libero_goal"][4]
    observation, info = envs.reset(seed=[0, 1])
    assert envs.observation_space.contains(observation)
    assert {name: view.shape for name, view in observation["pixels"].items()} == {
        "image": (2, 256, 256, 3), "image2": (2, 256, 256, 3)
    }  # fmt: skip
    assert info["task_id"].tolist() == [4, 4]
    assert envs.call("task_description") == ("put the bowl on top of the cabinet",) * 2
    actions = np.zeros((2, 7))
    actions[:, 6] = [-1, 1]  # open, closed
    for _ in range(10):
        observation, *_ = envs.step(actions)
    openness = np.abs(observation["agent_pos"][:, 6:]).mean(axis=1)
    assert openness[0] > 0.035
    assert openness[1] < 0.01
    for task_envs in made["libero_goal"].values():
        task_envs.close()


@pytest.mark.parametrize(
    ("options", "convention", "message"),
    [
        ({}, "gr00t", r"convention='gr00t' is unknown \(valid: 'demonstrations', 'lerobot'\)"),
        (dict(autoreset_mode="NEXT_STEP"), "lerobot", "LeRobot needs autoreset_mode='SAME_STEP'"),
        (dict(camera_names=("agentview",)), "lerobot", r"does not observe \['wrist_images'\]"),
        (dict(num_action_chunks=5), "demonstrations", r"takes \(1, 5, 7\), of .* with action_mode='delta_pose'"),
        (dict(action_mode="delta_joint_pos"), "demonstrations", r"takes \(1, 8\), of Box\(-1.0, 1.0, \(8,\)"),
        (dict(action_mode="absolute_pose"), "lerobot", r"takes \(1, 7\), of Box\(\[-2. .*\(7,\), float32\)"),
    ],
)
def test_what_lerobot_cannot_take_is_refused(options: dict[str, Any], convention: Any, message: str):
    given: dict[str, Any] = {"autoreset_mode": "SAME_STEP", "image_size": 8} | options
    envs = LiberoVectorEnv("libero_goal", 1, **given)
    with pytest.raises(ValueError, match=message):
        LeRobotVectorEnv(envs, convention=convention)
    envs.close()


def test_own_policy_moves_the_gripper_where_it_says():
    result = own_policy.main(["--num-envs", "2", "--horizon", "60", "--image-size", "32"])
    assert result["episode_length"].tolist() == [60, 60]
    assert not result["success"].any()
    np.testing.assert_allclose(result["states"][:, :3], [[0.0, 0.1, 1.1]] * 2, atol=0.02)
    fingers = result["states"][:, 6:]
    assert (np.abs(fingers) < 0.01).all()  # closed: they start 4 cm apart


@pytest.mark.slow
def test_policy_to_evaluate_goes_to_its_waypoints(tmp_path: Path):
    policy, noise = policy_to_evaluate.make(), [torch.Generator().manual_seed(0)]
    above, rim, _ = policy_to_evaluate.WAYPOINTS
    obs = {f"state.{axis}": np.array([[value]]) for axis, value in zip("xyz", above, strict=True)}
    policy.reset([0])
    actions = policy.predict(obs, generator=noise)
    assert actions.shape == (1, policy_to_evaluate.HORIZON, 7)
    down = (rim - above)[2] / policy_to_evaluate.LARGEST_STEP_M / policy.num_action_chunks
    np.testing.assert_allclose(actions[0, :, 2], down, atol=0.2)  # within the noise
    np.testing.assert_array_equal(actions[0, :, 6], -1)
    args = eval_gr00t.Args(
        policy=f"{policy_to_evaluate.__file__}:make", suite="libero_spatial", task_ids=(0,), episodes_per_task=1,
        num_envs=1, horizon=60, renderer="warp", output_dir=tmp_path,
    )  # fmt: skip
    result = eval_gr00t.main(args)
    assert [(e.success, e.length) for e in result.episodes] == [(False, 60)]
    assert result.protocol["image_size"] == policy.image_size


@pytest.mark.slow
def test_gr00t_agent_in_cleanrl():
    args = gr00t_in_cleanrl.Args(
        train_backbone=True, task_id=3, horizon=10, total_timesteps=30, num_envs=2, num_steps=3, num_minibatches=3,
        learning_rate=1e-3,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    before = dict(Gr00tAgent.load("nano").named_parameters())
    agent, metrics = gr00t_in_cleanrl.main(args)
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["first_ratio_deviation"] < 1e-5  # what was stored is scored as it was sampled
    assert metrics["approx_kl"] > 0
    moved = [name for name, p in agent.named_parameters() if not torch.equal(p, before[name])]
    for part in ("value_head", "action_decoder", "vision_model"):
        assert any(part in name for name in moved), part
    with pytest.raises(ValueError, match=r"num_envs \* num_steps = 6 must be a multiple of num_minibatches=4"):
        gr00t_in_cleanrl.main(gr00t_in_cleanrl.Args(num_envs=2, num_steps=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_envs=2, num_steps=2), "num_steps = 4 makes minibatches of one decision.* at least 8, twice"),
        (dict(num_envs=0), "num_envs=0 must be at least 1"),
        (dict(total_timesteps=0), "total_timesteps=0 must be at least 1"),
        (dict(gamma=1.5), "gamma=1.5 is not in"),
        (dict(env_id="CartPole-v1"), "env_id='CartPole-v1' is no environment of LIBERO: give libero_gym/SUITE-v0"),
        (dict(task_id=10), r"task_id=10 is not in libero_spatial \(valid: 0-9\)"),
    ],
)
def test_gr00t_agent_in_cleanrl_refuses_what_would_fail_late(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
):
    monkeypatch.setattr(Gr00tAgent, "load", None)  # it is told before
    with pytest.raises(ValueError, match=message):
        gr00t_in_cleanrl.main(gr00t_in_cleanrl.Args(**given))


def test_own_agent_takes_observations_to_its_weights():
    keys, dim = own_agent_in_ppo.STATE_KEYS, own_agent_in_ppo.STATE_DIM
    agent = own_agent_in_ppo.MLPAgent(keys, dim, 5).to("meta")
    encoded = agent.encode({key: np.zeros((3, 2 if key == "state.gripper" else 1), np.float32) for key in keys})
    assert encoded["state"].device.type == "meta"
    assert agent.get_value(encoded).shape == (3,)


def test_own_agent_refuses_options_that_it_does_not_read():
    for option in (dict(preset="libero_spatial_nano"), dict(noise_level=0.9), dict(lora_rank=32)):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect: .*an agent of its own; leave it out"):
            own_agent_in_ppo.main(own_agent_in_ppo.Args(**option))


@pytest.mark.slow
def test_own_agent_in_ppo(tmp_path: Path):
    args = dataclasses.replace(
        own_agent_in_ppo.Args(), output_dir=tmp_path, task_ids=(0,), num_iterations=2, num_envs=2, num_steps=4,
        num_action_chunks=3, horizon=9, minibatch_size=4, micro_batch_size=4, update_epochs=1, log_with=(),
    )  # fmt: skip
    metrics = own_agent_in_ppo.main(args)
    # Four decisions of three steps, truncated after nine: every environment ends an episode in each iteration.
    assert metrics["env/episode_len"] == 9
    assert metrics["actor/ratio_first_minibatch_max_dev"] < 1e-5
    assert metrics["eval/success_once"] == 0.0
    run = tmp_path / "own_agent_libero_spatial_1"
    protocol = json.loads((run / "evaluations" / "iteration_2.json").read_text())["protocol"]
    assert protocol["renderer"] in ("warp", "egl", "osmesa")  # what drew, not what was asked for
    assert protocol["texture_colorspace"] == "linear"
    assert len(list((run / "videos" / "iteration_2").glob("task_0_state_0_failure.mp4"))) == 1


def test_own_robot_learns_and_is_saved(tmp_path: Path):
    losses = own_robot.main(own_robot.Args(num_steps=12, batch_size=8, output=tmp_path))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FIRST_HOUR_ITERATIONS", "1")
    monkeypatch.setenv("FIRST_HOUR_RUNS", str(tmp_path))
    cells = json.loads((EXAMPLES / "first_hour.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # kept out of the repository
            exec("".join(cell["source"]), names)
    assert len(names["states"]) > 30
    assert 0 <= names["before"] <= 0.5
    assert (tmp_path / "first_hour" / "videos" / "before_after.mp4").is_file()
    assert (tmp_path / "first_hour" / "report.html").is_file()
