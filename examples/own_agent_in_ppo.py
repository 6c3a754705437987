"""Another agent in our PPO: a Gaussian MLP policy on proprioception, and all that a trainer asks of an agent.

    accelerate launch examples/own_agent_in_ppo.py --output-dir runs --num-iterations 20

`ppo_gr00t.main` takes the agent from a function. The trainer's arguments work (`--help` lists them), except those of
GR00T's own network and noise. Twenty iterations take three minutes on two cores. Without eyes the policy learns nothing
of LIBERO; the point is the surface.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from algorithms import ppo_gr00t
from algorithms.common.args import GR00T_OPTIONS, check_left_out
from algorithms.common.command_line import launch, parse_args

STATE_KEYS = tuple(f"state.{part}" for part in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))
STATE_DIM = 8
ACTION_DIM = 7


class MLPAction(NamedTuple):
    """What a trainer stores of a decision: any tensors with a leading batch dimension, `env_action` among them.

    Attributes:
        env_action: float32 [B, C, 7], what the environment takes.
    """

    env_action: Tensor


class MLPAgent(nn.Module):
    """A diagonal Gaussian over a chunk of actions, and a value, both from the robot's own state.

    Args:
        keys: parts of the observation that are read, each [B, width].
        state_dim: sum of their widths.
        num_action_chunks: actions of one decision, C.
    """

    image_size = 8
    """Height and width of the images that environments shall draw; this agent does not look at them."""

    def __init__(self, keys: tuple[str, ...], state_dim: int, num_action_chunks: int) -> None:
        super().__init__()
        self.keys, self.chunk_shape = keys, (num_action_chunks, ACTION_DIM)
        width = num_action_chunks * ACTION_DIM
        self.actor = nn.Sequential(nn.Linear(state_dim, 64), nn.Tanh(), nn.Linear(64, width))
        self.critic = nn.Sequential(nn.Linear(state_dim, 64), nn.Tanh(), nn.Linear(64, 1))
        self.log_std = nn.Parameter(torch.full((width,), -0.7))

    def encode(self, obs: dict[str, Any]) -> dict[str, Tensor]:
        """Returns what is stored of an observation; wherever an observation is taken, this is taken as well.

        Observations come from the environment as arrays, and go to the device that the trainer has moved the agent to.
        """
        if "state" in obs:
            return obs
        state = torch.cat([torch.as_tensor(obs[key]) for key in self.keys], -1)  # [B, state_dim]
        return {"state": state.to(self.log_std.device)}

    def forward(
        self, obs: dict[str, Any], action: MLPAction | None = None, *, generator: Any = None
    ) -> tuple[MLPAction, Tensor, Tensor, Tensor]:
        """Samples an action (one CPU generator per row), or scores a stored one.

        Returns:
            The action, and its log-probability, entropy and value, each [B].
        """
        state = self.encode(obs)["state"]
        policy = torch.distributions.Normal(self.actor(state), self.log_std.exp())
        if action is None:
            noise = torch.stack([torch.randn(self.log_std.shape, generator=g) for g in generator])  # [B, C * 7]
            flat = policy.mean + policy.stddev * noise.to(policy.mean.device)
        else:
            flat = action.env_action.flatten(1)
        logprob, entropy = policy.log_prob(flat).sum(-1), policy.entropy().sum(-1)
        return MLPAction(flat.unflatten(1, self.chunk_shape)), logprob, entropy, self.critic(state)[:, 0]

    get_action_and_value = forward

    def get_value(self, obs: dict[str, Any]) -> Tensor:
        """Returns the values of observations [B]."""
        return self.critic(self.encode(obs)["state"])[:, 0]

    def predict(self, obs: dict[str, Any], generator: Any = None) -> Tensor:
        """Returns actions [B, C, 7] without exploration, for evaluation."""
        return self.actor(self.encode(obs)["state"]).unflatten(1, self.chunk_shape)

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Returns the optimiser's groups; the value function's is named "value"."""
        policy, value = [*self.actor.parameters(), self.log_std], [*self.critic.parameters()]
        return [{"name": "policy", "params": policy, "lr": lr}, {"name": "value", "params": value, "lr": value_lr}]

    def save_pretrained(self, folder: Path) -> None:
        """Writes the weights."""
        save_file(dict(self.state_dict()), Path(folder) / "model.safetensors")


def make_agent(args: ppo_gr00t.Args) -> MLPAgent:
    """Returns the agent that is trained, on the CPU."""
    return MLPAgent(STATE_KEYS, STATE_DIM, args.num_action_chunks)


@dataclass(kw_only=True)
class Args(ppo_gr00t.Args):
    """PPO's arguments, with sizes that fit a small network on two cores."""

    run_name: str = "own_agent_{suite}_{seed}"
    num_iterations: int = 20
    num_envs: int = 8
    num_steps: int = 12
    minibatch_size: int = 48
    micro_batch_size: int = 48
    learning_rate: float = 3e-4
    value_learning_rate: float = 3e-4
    horizon: int | None = 60
    eval_episodes_per_task: int = 1


def check_options(args: Args) -> None:
    """Raises ValueError for what this agent does not read."""
    check_left_out(args, ("preset", *GR00T_OPTIONS), "examples/own_agent_in_ppo.py trains an agent of its own")


def main(args: Args) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics."""
    check_options(args)
    return ppo_gr00t.main(args, make_agent=make_agent)


if __name__ == "__main__":
    launch(main, parse_args(Args, __doc__, None, ppo_gr00t.check_args, check_options))
