"""A small flow policy on the robot's state, for what has to run in minutes on a CPU: `--model state`.

It sees no images and no instruction, but acts, explores and is scored by the flow sampler that the GR00T agent uses:
the trainers' code is the same to the last line. Shape legend: B observations, C executed actions, N denoising steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.common.args import check_state_model
from gr00t_agent.files import dataclass_from_json, read_json, whole_file, write_json
from gr00t_agent.sampler import FlowSampler, NoiseMethod, Prediction
from libero_gym.conventions import ACTION_DIM

CONFIG_FILE = "state_agent.json"
WEIGHTS_FILE = "model.safetensors"
STATE_KEYS = tuple(f"state.{name}" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))


class ChainAction(NamedTuple):
    """A denoising chain [B, N+1, C, 7], its stochastic step [B], and what the environment takes [B, C, 7]."""

    chain: Tensor
    denoise_index: Tensor
    env_action: Tensor


@dataclass(frozen=True, kw_only=True)
class StateAgentConfig:
    """What a checkpoint says beside weights; see `StateFlowAgent` and `FlowSampler`.

    `trained_on` is None in checkpoints of earlier versions.
    """

    num_action_chunks: int
    width: int
    denoising_steps: int
    noise_method: NoiseMethod
    noise_level: float
    ignore_last: bool = False
    trained_on: Mapping[str, Any] | None = None


class StateFlowAgent(nn.Module):
    """A velocity network of two hidden layers on proprioception under the flow sampler, and a value network.

    Untrained, its velocity draws the chain towards holding still with a closed hand.

    Args:
        num_action_chunks: C.
        sampler: that of the GR00T agent.
        width: of the hidden layers.

    Attributes:
        config: sizes and sampler, as a checkpoint keeps them.
        image_size: of the images that an evaluation films.
        looks_at_images: the agent needs none, so that an evaluation draws only what it films.
        trained_on: see `gr00t_agent.loading.Pretrained`.
    """

    image_size = 128
    looks_at_images = False
    # Position (m), axis-angle (rad) and fingers (m), brought to about unit size round where the task is done.
    state_scale = (10.0, 10.0, 10.0, 1.0, 1.0, 1.0, 50.0, 50.0)

    def __init__(self, num_action_chunks: int, sampler: FlowSampler, width: int = 64) -> None:
        super().__init__()
        self.sampler, self.chunk_shape = sampler, (num_action_chunks, ACTION_DIM)
        self.trained_on: Mapping[str, Any] | None = None
        self.config = StateAgentConfig(
            num_action_chunks=num_action_chunks,
            width=width,
            denoising_steps=sampler.num_steps,
            noise_method=sampler.method,
            noise_level=sampler.noise_level,
            ignore_last=sampler.ignore_last,
        )
        size, state_dim = num_action_chunks * ACTION_DIM, len(self.state_scale)
        self.velocity = nn.Sequential(
            nn.Linear(size + state_dim + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        self.value = nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(cast(nn.Linear, self.velocity[-1]).weight)
        nn.init.zeros_(cast(nn.Linear, self.velocity[-1]).bias)
        rest = torch.zeros(self.chunk_shape)
        rest[:, -1] = 1.0  # the hand closed
        self.register_buffer("rest", rest)
        self.register_buffer("scale", torch.tensor(self.state_scale))

    @classmethod
    def from_args(cls, args: Any) -> StateFlowAgent:
        """Returns the agent that a trainer's `args` ask for, with random weights.

        Raises:
            ValueError: they ask for what it has not; see `check_state_model`.
        """
        check_state_model(args)
        sampler = FlowSampler(
            num_steps=args.denoising_steps,
            method=args.noise_method,
            noise_level=args.noise_level,
            ignore_last=args.ignore_last,
        )
        return cls(args.num_action_chunks, sampler)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, denoising_steps: int | None = None) -> StateFlowAgent:
        """Returns the agent that `save_pretrained` wrote, with so many denoising steps if they are given.

        Raises:
            FileNotFoundError: there is none in `folder`.
            ValueError: its configuration is not one, or its weights are not of that size.
        """
        path = Path(folder)
        config = dataclass_from_json(StateAgentConfig, read_json(path / CONFIG_FILE), str(path / CONFIG_FILE))
        sampler = FlowSampler(
            num_steps=denoising_steps or config.denoising_steps,
            method=config.noise_method,
            noise_level=config.noise_level,
            ignore_last=config.ignore_last,
        )
        agent = cls(config.num_action_chunks, sampler, config.width)
        try:
            agent.load_state_dict(load_file(path / WEIGHTS_FILE))
        except RuntimeError as error:
            raise ValueError(f"{path / WEIGHTS_FILE} does not go with {CONFIG_FILE} beside it: {error}") from error
        agent.trained_on = config.trained_on
        return agent

    def encode(self, obs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the scaled state, float32 [B, 8], of an observation with modality keys or of an encoded one."""
        if "state" in obs:
            return dict(obs)
        scale = cast(Tensor, self.scale)
        state = torch.cat([torch.as_tensor(obs[key]) for key in STATE_KEYS], dim=-1)
        return {"state": state.to(scale.device) * scale}

    def forward(
        self,
        obs: Mapping[str, Any],
        action: ChainAction | None = None,
        *,
        generator: Sequence[torch.Generator] = (),
        noise_anneal: float = 1.0,
    ) -> tuple[ChainAction, Tensor, Tensor, Tensor]:
        """Samples a chunk, or scores a stored one; see `gr00t_agent.protocol.Agent`."""
        velocity = self._velocity(obs)
        if action is None:
            normal = torch.stack([torch.randn((2, *self.chunk_shape), generator=one) for one in generator])
            normal = normal.to(self._device)  # [B, 2, C, 7]
            index = torch.cat([self.sampler.draw_index(1, self._device, one) for one in generator])
            noise = normal[:, 1].expand(self.sampler.num_steps, *normal[:, 1].shape)
            chain, scores = self.sampler.sample(
                velocity, normal[:, 0], index, step_noise=noise, noise_anneal=noise_anneal
            )
            action = ChainAction(chain, index, chain[:, -1].clamp(-1, 1))
        else:
            scores = self.sampler.evaluate(velocity, action.chain, action.denoise_index, noise_anneal=noise_anneal)
        entropy = scores.entropy.expand_as(scores.log_prob).flatten(1).sum(1)
        return action, scores.log_prob.flatten(1).sum(1), entropy, self.get_value(obs)

    @torch.no_grad()
    def predict(self, obs: Mapping[str, Any], *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns chunks [B, C, 7] without exploration; a generator a row draws the noise that they begin with."""
        noise = torch.stack([torch.randn(self.chunk_shape, generator=one) for one in generator]).to(self._device)
        return self.sampler.denoise(self._velocity(obs), noise).clamp(-1, 1)

    def get_value(self, obs: Mapping[str, Any]) -> Tensor:
        """Returns state values [B]."""
        return self.value(self.encode(obs)["state"])[:, 0]

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Returns optimiser groups."""
        policy, value = list(self.velocity.parameters()), list(self.value.parameters())
        return [{"name": "policy", "params": policy, "lr": lr}, {"name": "value", "params": value, "lr": value_lr}]

    def save_pretrained(self, folder: Path) -> None:
        """Writes weights, sizes and sampler, and what it was trained on."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS_FILE) as temporary:
            save_file(dict(self.state_dict()), temporary)
        config = replace(self.config, trained_on=self.trained_on)
        write_json(folder / CONFIG_FILE, asdict(config))

    @property
    def _device(self) -> torch.device:
        return cast(Tensor, self.rest).device

    def _velocity(self, obs: Mapping[str, Any]) -> Any:
        state, num_steps = self.encode(obs)["state"], self.sampler.num_steps

        def velocity(x: Tensor, step: Tensor) -> Prediction:
            tau = (step / num_steps)[:, None]
            learned = self.velocity(torch.cat([x.flatten(1), state, tau], 1)).view_as(x)
            return Prediction(cast(Tensor, self.rest) - x + learned, None)

        return velocity


def is_state_agent(folder: str | Path) -> bool:
    """Returns whether `StateFlowAgent.save_pretrained` has written into `folder`."""
    return (Path(folder) / CONFIG_FILE).is_file()
