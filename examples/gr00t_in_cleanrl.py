"""Our agent in somebody else's PPO: CleanRL's continuous-action loop with `Gr00tAgent` in the agent's place.

    python examples/gr00t_in_cleanrl.py --total-timesteps 4000

The loop is laid out as in CleanRL and knows three things of the agent: `get_action_and_value(obs)` explores,
`get_action_and_value(obs, action)` scores what was stored, `get_value(obs)` is the critic. Two differences come from
what the agent reads and decides: observations are dicts, and an action is a NamedTuple that carries the denoising chain
besides the `env_action` that the environment takes. So both are kept as lists of what they are, not as one tensor.

One decision is a chunk of five environment steps. The randomly initialised nano network (7.7 million parameters, its
backbone included) takes two minutes for 4,000 environment steps on two cores; it shows the loop and learns nothing in
that time. For training that does, see `algorithms/ppo_gr00t.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import libero_gym  # which registers the ids
from algorithms.common.args import check_ranges
from algorithms.common.command_line import launch, parse_args
from gr00t_agent import FlowAction, Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.tasks.suites import check_assets, get_task


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    seed: int = 1
    """Seed of the environments, the agent's weights and its exploration."""
    model: str = "nano"
    """`nano` (random weights), or the folder or hub id of a checkpoint."""
    train_backbone: bool = False
    """Train the vision tower and the language model too."""
    env_id: str = "libero_gym/libero_spatial-v0"
    """Gymnasium id of the environment."""
    task_id: int = 0
    """Task of the suite."""
    horizon: int = 60
    """Environment steps before truncation."""
    total_timesteps: int = 4000
    """Environment steps of the whole run."""
    learning_rate: float = 3e-5
    """Adam's step size."""
    num_envs: int = 8
    """Parallel environments."""
    num_steps: int = 8
    """Decisions per environment and rollout."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    num_minibatches: int = 4
    """Optimiser steps per epoch."""
    update_epochs: int = 2
    """Passes over each rollout."""
    clip_coef: float = 0.2
    """Clip of the ratio."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm to which gradients are clipped."""


def concatenate(observations: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns observations of several decisions as one batch."""
    return {key: np.concatenate([obs[key] for obs in observations]) for key in observations[0]}


def index(values: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Returns some rows of a batch of observations."""
    return {key: value[rows.numpy()] for key, value in values.items()}


def check_args(args: Args) -> None:
    """Raises ValueError for arguments that would otherwise fail late."""
    check_ranges(args)
    if args.total_timesteps < 1:
        raise ValueError(f"total_timesteps={args.total_timesteps} must be at least 1")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches:
        raise ValueError(
            f"num_envs * num_steps = {batch_size} must be a multiple of num_minibatches={args.num_minibatches}"
        )
    if batch_size < 2 * args.num_minibatches:
        raise ValueError(
            f"num_envs * num_steps = {batch_size} makes minibatches of one decision, and one advantage has no standard "
            f"deviation: give a product of at least {2 * args.num_minibatches}, twice "
            f"num_minibatches={args.num_minibatches}"
        )
    if args.env_id not in gym.registry or "suite" not in gym.spec(args.env_id).kwargs:
        raise ValueError(
            f"env_id={args.env_id!r} is no environment of LIBERO: give libero_gym/SUITE-v0, where SUITE is one of "
            f"{', '.join(libero_gym.list_suites())}"
        )
    suite = gym.spec(args.env_id).kwargs["suite"]
    check_assets([get_task(suite, args.task_id)])


def main(args: Args) -> tuple[Gr00tAgent, dict[str, float]]:
    """Trains, and returns the agent and the metrics of the last update."""
    check_args(args)
    batch_size = args.num_envs * args.num_steps
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    # agent and environments
    agent = Gr00tAgent.load(
        args.model, train_backbone=args.train_backbone
    ).eval()  # as everywhere, dropout would spoil the ratio
    parameters = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)
    envs = gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        vectorization_mode="vector_entry_point",
        task_ids=[args.task_id],
        num_action_chunks=agent.policy.num_action_chunks,
        image_size=agent.image_size,
        horizon=args.horizon,
        autoreset_mode="SAME_STEP",
    )
    envs = ModalityVectorObservation(envs)  # to the keys that the agent reads: video.image, state.x, ...

    metrics: dict[str, float] = {}
    global_step, start_time = 0, time.time()
    next_obs, _ = envs.reset(seed=args.seed)
    next_done = torch.zeros(args.num_envs)
    while global_step < args.total_timesteps:
        # rollout
        obs, actions, logprobs, values, rewards, dones = [], [], [], [], [], []
        for _ in range(args.num_steps):
            obs.append(next_obs)
            dones.append(next_done)
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
            actions.append(action)
            logprobs.append(logprob)
            values.append(value)
            next_obs, reward, terminations, truncations, infos = envs.step(action.env_action.numpy())
            rewards.append(torch.as_tensor(reward, dtype=torch.float32))
            next_done = torch.as_tensor(terminations | truncations, dtype=torch.float32)
            global_step += int(infos["num_steps"].sum())

        # advantages; like CleanRL's loop, this one takes a truncated episode for a terminated one
        with torch.no_grad():
            next_value = agent.get_value(next_obs)
        following = [*values[1:], next_value]  # value after decision t
        goes_on = [1 - done for done in [*dones[1:], next_done]]  # 0 where the episode ended with decision t
        advantages, carried = list[Tensor](), torch.zeros(args.num_envs)
        for t in reversed(range(args.num_steps)):
            delta = rewards[t] + args.gamma * goes_on[t] * following[t] - values[t]
            carried = delta + args.gamma * args.gae_lambda * goes_on[t] * carried
            advantages.insert(0, carried)

        # flatten the batch
        b_obs = concatenate(obs)
        b_actions = FlowAction(*(torch.cat(field) for field in zip(*actions, strict=True)))
        b_logprobs, b_values, b_advantages = torch.cat(logprobs), torch.cat(values), torch.cat(advantages)
        b_returns = b_advantages + b_values

        # update
        clipfracs, approx_kl, first_ratio = [], torch.zeros(()), torch.ones(())
        pg_loss, v_loss = torch.zeros(()), torch.zeros(())
        for epoch in range(args.update_epochs):
            b_inds = torch.from_numpy(rng.permutation(batch_size))
            for minibatch, mb_inds in enumerate(b_inds.chunk(args.num_minibatches)):
                stored = FlowAction(*(field[mb_inds] for field in b_actions))
                _, newlogprob, _, newvalue = agent.get_action_and_value(index(b_obs, mb_inds), stored)
                logratio = newlogprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()
                    clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean().item())
                    if epoch == minibatch == 0:
                        first_ratio = ratio  # 1, or old and new log-probabilities disagree

                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = -torch.min(ratio * mb_advantages, clipped * mb_advantages).mean()
                v_loss = 0.5 * (newvalue - b_returns[mb_inds]).square().mean()
                loss = pg_loss + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()

        metrics = {
            "policy_loss": pg_loss.item(),
            "value_loss": v_loss.item(),
            "approx_kl": approx_kl.item(),
            "clipfrac": float(np.mean(clipfracs)),
            "first_ratio_deviation": (first_ratio - 1).abs().max().item(),
            "mean_reward": torch.stack(rewards).mean().item(),
            "SPS": global_step / (time.time() - start_time),
        }
        print(f"step {global_step}: " + "  ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
    envs.close()
    return agent, metrics


if __name__ == "__main__":
    launch(main, parse_args(Args, __doc__, None, check_args))
