"""The two ways of swapping, on real LIBERO: another agent in our trainer, our agent in another trainer."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from algorithms import ppo_gr00t
from gr00t_agent import FlowAction, Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation
from tests.algorithms.mlp_agent import MLPAgent

STATE_KEYS = tuple(f"state.{name}" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))


@pytest.mark.slow
def test_mlp_agent_in_ppo_gr00t(tmp_path: Path):
    args = ppo_gr00t.Args(
        output_dir=tmp_path, suite="libero_spatial", task_ids=(0,), num_iterations=2, num_envs=2, num_steps=4,
        num_action_chunks=3, horizon=9, minibatch_size=4, micro_batch_size=4, update_epochs=1,
        eval_episodes_per_task=1, log_with=(),
    )  # fmt: skip
    metrics = ppo_gr00t.main(args, make_agent=lambda args: MLPAgent(STATE_KEYS, 8, args.num_action_chunks))
    # Four decisions of three steps, truncated after nine: every environment ends an episode in each iteration.
    assert metrics["env/episode_len"] == 9
    assert metrics["actor/ratio_first_minibatch_max_dev"] < 1e-5
    assert metrics["eval/success_once"] == 0.0
    run = tmp_path / "ppo_libero_spatial_1"
    assert (run / "evaluations" / "iteration_2.json").is_file()
    assert len(list((run / "videos" / "iteration_2").glob("task_0_state_0_failure.mp4"))) == 1


def generic_ppo(
    agent: torch.nn.Module, envs: gym.vector.VectorEnv, *, steps: int, epochs: int, lr: float
) -> list[float]:
    """PPO as anybody would write it, knowing of the agent only `get_action_and_value` and `get_value`."""
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr)
    obs, _ = envs.reset(seed=0)
    observations, actions, logprobs, values, rewards, dones = [], [], [], [], [], []
    for _ in range(steps):
        with torch.no_grad():
            action, logprob, _, value = agent.get_action_and_value(obs)
        observations.append(obs)
        actions.append(action)
        logprobs.append(logprob)
        values.append(value)
        obs, reward, terminated, truncated, _ = envs.step(action.env_action.numpy())
        rewards.append(torch.from_numpy(reward))
        dones.append(torch.from_numpy(terminated | truncated))
    with torch.no_grad():
        next_value = agent.get_value(obs)
    advantages, carried = [], torch.zeros_like(next_value)
    for t in reversed(range(steps)):
        following = next_value if t == steps - 1 else values[t + 1]
        delta = rewards[t] + 0.99 * following * ~dones[t] - values[t]
        carried = delta + 0.99 * 0.95 * ~dones[t] * carried
        advantages.insert(0, carried)
    losses = []
    for _ in range(epochs):
        for t in np.random.default_rng(0).permutation(steps):
            _, logprob, entropy, value = agent.get_action_and_value(observations[t], actions[t])
            ratio = (logprob - logprobs[t]).exp()
            surrogate = torch.min(ratio * advantages[t], ratio.clamp(0.8, 1.2) * advantages[t])
            target = advantages[t] + values[t]
            loss = -surrogate.mean() + 0.5 * (value - target).square().mean() - 0.001 * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_gr00t_agent_in_a_generic_ppo_loop():
    torch.manual_seed(0)
    agent = Gr00tAgent.from_preset("nano").eval()
    envs = ModalityVectorObservation(
        gym.make_vec(
            "libero_gym/libero_spatial-v0", num_envs=2, vectorization_mode="vector_entry_point", task_ids=[3],
            num_action_chunks=agent.policy.num_action_chunks, image_size=agent.image_size, horizon=10,
        )
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in agent.named_parameters() if p.requires_grad}
    losses = generic_ppo(agent, envs, steps=3, epochs=2, lr=1e-3)
    envs.close()
    assert np.isfinite(losses).all()
    moved = [name for name, p in agent.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert any("value_head" in name for name in moved)
    assert any("action_decoder" in name for name in moved)
    assert any("vision_model" in name for name in moved)
    assert isinstance(agent.get_action_and_value(agent_obs(agent))[0], FlowAction)


def agent_obs(agent: Gr00tAgent) -> dict[str, np.ndarray]:
    size = agent.image_size
    obs: dict[str, np.ndarray] = {
        key: np.zeros((1, 2 if key.endswith("gripper") else 1), np.float32) for key in STATE_KEYS
    }
    obs |= {key: np.zeros((1, size, size, 3), np.uint8) for key in ("video.image", "video.wrist_image")}
    return obs | {"annotation.human.action.task_description": np.array(["open the drawer"])}
