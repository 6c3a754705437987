"""The small policy on the robot's state: its checkpoints, and what of an evaluation goes with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms import eval_gr00t
from algorithms.common.state_agent import STATE_KEYS, StateFlowAgent, is_state_agent
from gr00t_agent.sampler import FlowSampler


@pytest.fixture
def agent() -> StateFlowAgent:
    torch.manual_seed(0)
    agent = StateFlowAgent(3, FlowSampler(num_steps=2, method="flow_cps", noise_level=0.7), width=8)
    torch.nn.init.normal_(agent.velocity[-1].weight)  # as if it were trained
    return agent


def predict(agent: StateFlowAgent) -> torch.Tensor:
    widths = {"state.gripper": 2}
    obs = {key: torch.full((2, widths.get(key, 1)), 0.1) for key in STATE_KEYS}
    return agent.predict(obs, generator=[torch.Generator().manual_seed(i) for i in range(2)])


def test_a_checkpoint_gives_the_agent_back(agent: StateFlowAgent, tmp_path: Path):
    assert not is_state_agent(tmp_path)
    agent.save_pretrained(tmp_path)
    assert is_state_agent(tmp_path)
    again = StateFlowAgent.from_pretrained(tmp_path)
    assert again.config == agent.config
    assert again.sampler == agent.sampler
    torch.testing.assert_close(predict(again), predict(agent), rtol=0, atol=0)
    assert (predict(again)[0] != predict(again)[1]).any()
    finer = StateFlowAgent.from_pretrained(tmp_path, denoising_steps=5)
    assert finer.config.denoising_steps == finer.sampler.num_steps == 5
    assert (predict(finer) != predict(agent)).any()


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize("ignore_last", [False, True])
def test_the_last_step_is_noised_unless_it_is_to_be_ignored(trainer: str, ignore_last: bool, tmp_path: Path):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    args = module.Args(model="state", noise_level=1.0, ignore_last=ignore_last, imitation_coef=0.0)
    agent = module.load_agent(args)
    rows = 64
    obs = {key: torch.zeros(rows, {"state.gripper": 2}.get(key, 1)) for key in STATE_KEYS}
    action, *_ = agent(obs, generator=[torch.Generator().manual_seed(i) for i in range(rows)])
    steps = range(args.denoising_steps - 1 if ignore_last else args.denoising_steps)
    assert action.denoise_index.unique().tolist() == list(steps)
    agent.save_pretrained(tmp_path)
    assert StateFlowAgent.from_pretrained(tmp_path).sampler == agent.sampler
    assert module.load_agent(module.Args(ignore_last=ignore_last)).policy.ignore_last == ignore_last


def test_a_checkpoint_keeps_what_it_was_trained_on(agent: StateFlowAgent, tmp_path: Path):
    agent.trained_on = {"suite": "libero_goal"}
    agent.save_pretrained(tmp_path)
    assert StateFlowAgent.from_pretrained(tmp_path).trained_on == {"suite": "libero_goal"}
    path = tmp_path / "state_agent.json"
    content = json.loads(path.read_text())
    assert content.pop("trained_on") == {"suite": "libero_goal"}
    path.write_text(json.dumps(content))  # of an earlier version
    assert StateFlowAgent.from_pretrained(tmp_path).trained_on is None


def test_what_is_damaged_is_refused(agent: StateFlowAgent, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"state_agent\.json does not exist"):
        StateFlowAgent.from_pretrained(tmp_path)
    agent.save_pretrained(tmp_path)
    path = tmp_path / "state_agent.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"width": 16}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not go with state_agent\.json beside it"):
        StateFlowAgent.from_pretrained(tmp_path)
    path.write_text(json.dumps(content | {"noise_method": "flow"}))
    with pytest.raises(ValueError, match=r"noise_method='flow' is not allowed here \(allowed: 'flow_sde', "):
        StateFlowAgent.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "setting", [dict(num_action_chunks=2), dict(temporal_ensemble=0.01), dict(compute_dtype="bfloat16")]
)
def test_an_evaluation_cannot_change_what_it_has_not(agent: StateFlowAgent, tmp_path: Path, setting: dict[str, Any]):
    agent.save_pretrained(tmp_path)
    args = eval_gr00t.Args(checkpoint=str(tmp_path), suite="libero_goal", output_dir=tmp_path / "evaluation", **setting)
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* is nothing that the policy on the robot's state"):
        eval_gr00t.main(args)


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            dict(noise_method="reinflow"),
            r"learns no noise \(valid: flow_sde, flow_cps\); leave it out, or take --model",
        ),
        (dict(joint_logprob=True), "has one noised step in a chain"),
        (dict(logprob_level="action"), "scores whole chunks"),
        (dict(critic_detach=False), "has no trunk that policy and critic share"),
        (dict(train_backbone=True), "has no backbone"),
        (dict(train_vl_self_attention=False), "has no VL self-attention"),
        (dict(lora_rank=4), "has no attention layers to adapt"),
        (dict(compute_dtype="bfloat16"), "computes in float32"),
        (dict(compile=True), "is not compiled"),
        (dict(imitation_coef=1.0), "has no flow error to imitate by"),
        (dict(imitation_iterations=1), "has no flow error to imitate by"),
        (dict(video_interval=1), "sees no images"),
    ],
)
def test_arguments_of_what_it_has_not_are_refused(trainer: str, setting: dict[str, Any], message: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    module.check_args(module.Args(model="state", compute_dtype="float32"))
    ((name, value),) = setting.items()
    if hasattr(module.Args, name):
        with pytest.raises(ValueError, match=f"{name}={value!r}: model='state' {message}"):
            module.check_args(module.Args(model="state", **setting))
        with pytest.raises(ValueError, match=f"{name}={value!r}: model='state' {message}"):
            module.load_agent(module.Args(model="state", **setting))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps_before_success=(3, 0)), r"steps_before_success=\(3, 0\) must be at least 1"),
        (dict(steps_before_success=(3,), reference_env=True), "reference_env=True is LIBERO's own"),
        (dict(num_near_goal_states=0), "num_near_goal_states=0"),
        (dict(num_near_goal_states=9), "num_near_goal_states=9 has no effect: without --steps-before-success"),
        (
            dict(steps_before_success=(3, 6), num_near_goal_states=40),
            "num_near_goal_states=40 times 2 .* than the 50 .* --num-near-goal-states 25 at most",
        ),
        (
            dict(steps_before_success=(3, 500)),
            "hold 500, but episodes of task 0 of libero_spatial end after horizon=240 steps, .* or a longer --horizon",
        ),
        (dict(steps_before_success=(3, 9), horizon=8), "hold 9, but episodes .* after horizon=8 steps"),
    ],
)
def test_starts_near_the_goal_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        eval_gr00t.check_args(
            eval_gr00t.Args(checkpoint="nano", suite="libero_spatial", output_dir=tmp_path, **options)
        )
