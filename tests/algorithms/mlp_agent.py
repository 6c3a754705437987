"""A Gaussian MLP policy in forty lines: what an agent must offer to be trained by `ppo_gr00t.py`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class MLPAction(NamedTuple):
    env_action: Tensor  # [B, C, 7]


class MLPAgent(nn.Module):
    image_size = 8

    def __init__(self, keys: tuple[str, ...], state_dim: int, num_action_chunks: int):
        super().__init__()
        self.keys, self.chunk_shape = keys, (num_action_chunks, 7)
        self.actor = nn.Sequential(nn.Linear(state_dim, 64), nn.Tanh(), nn.Linear(64, num_action_chunks * 7))
        self.critic = nn.Sequential(nn.Linear(state_dim, 64), nn.Tanh(), nn.Linear(64, 1))
        self.log_std = nn.Parameter(torch.full((num_action_chunks * 7,), -0.7))

    def encode(self, obs: dict[str, Any]) -> dict[str, Tensor]:
        return {"state": torch.cat([torch.as_tensor(obs[key]) for key in self.keys], -1)}

    def forward(
        self, obs: dict[str, Any], action: MLPAction | None = None, *, generator: Any = None
    ) -> tuple[MLPAction, Tensor, Tensor, Tensor]:
        state = obs["state"] if "state" in obs else self.encode(obs)["state"]
        policy = torch.distributions.Normal(self.actor(state), self.log_std.exp())
        if action is None:  # one generator per row
            flat = policy.mean + policy.stddev * torch.stack(
                [torch.randn(self.log_std.shape, generator=g) for g in generator]
            )
        else:
            flat = action.env_action.flatten(1)
        logprob, entropy = policy.log_prob(flat).sum(-1), policy.entropy().sum(-1)
        return MLPAction(flat.unflatten(1, self.chunk_shape)), logprob, entropy, self.critic(state)[:, 0]

    get_action_and_value = forward

    def get_value(self, obs: dict[str, Any]) -> Tensor:
        return self.critic(obs["state"] if "state" in obs else self.encode(obs)["state"])[:, 0]

    def predict(self, obs: dict[str, Any], generator: Any = None) -> Tensor:
        return self.actor(self.encode(obs)["state"]).unflatten(1, self.chunk_shape)

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        policy, value = [*self.actor.parameters(), self.log_std], [*self.critic.parameters()]
        return [{"name": "policy", "params": policy, "lr": lr}, {"name": "value", "params": value, "lr": value_lr}]

    def save_pretrained(self, folder: Path) -> None:
        save_file(dict(self.state_dict()), Path(folder) / "model.safetensors")
