"""Steering a frozen flow policy by the noise that it denoises: the actor, the steered policy, and its files.

    <folder>/noise_actor.json           sizes, form and bound of the noise; which base policy, and how it is used; what
                                        the actor was trained on
    <folder>/noise_actor.safetensors    weights of the actor

The base policy is not copied. It is named, and its weights' digest tells whether what is loaded is what was steered.

Shape legend: B batch, F width of the features, H steps of a chunk, A their padded width, a valid action width, C
executed steps, S steps that are decided, d = S * a width of a decision.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.common.args import NoiseForm
from gr00t_agent import Gr00tAgent
from gr00t_agent.config import PresetName
from gr00t_agent.files import dataclass_from_json, naming, read_json, require, whole_file, write_json
from gr00t_agent.loading import resolve_checkpoint

CONFIG_FILE, WEIGHTS_FILE = "noise_actor.json", "noise_actor.safetensors"
# Bounds of the standard deviation's logarithm, before squashing.
LOG_STD_RANGE = (-20.0, 2.0)
# Standardised features are clipped to this many deviations.
MAX_DEVIATIONS = 10.0


# --- the space of decisions ---


@dataclass(frozen=True, kw_only=True)
class NoiseSpace:
    """What is decided: the part of the noise [H, A] that becomes actions, as a vector of width d.

    Attributes:
        num_steps: H.
        num_executed: C, the leading steps that are executed.
        padded_dim: A.
        action_dim: a, the leading elements of a step that become an action. The others are always drawn from N(0, 1),
            as the base policy does.
        form: `executed` has one vector for each step that is executed, and draws the others from N(0, 1); `per_step`
            has one for each step; `repeated` has one for all.
        bound: largest magnitude of a decided element.

    Raises:
        ValueError: `form` is unknown, `bound` is not positive, or the sizes do not fit.
    """

    num_steps: int
    num_executed: int
    padded_dim: int
    action_dim: int
    form: NoiseForm
    bound: float

    def __post_init__(self) -> None:
        if self.form not in get_args(NoiseForm):
            raise ValueError(f"form={self.form!r} is unknown (valid: {', '.join(get_args(NoiseForm))})")
        if self.bound <= 0:
            raise ValueError(f"bound={self.bound} must be positive")
        if not (1 <= self.action_dim <= self.padded_dim and 1 <= self.num_executed <= self.num_steps):
            raise ValueError(
                f"action_dim={self.action_dim} must be in 1-{self.padded_dim} (padded_dim), and "
                f"num_executed={self.num_executed} in 1-{self.num_steps} (num_steps)"
            )

    @property
    def num_decided(self) -> int:
        """Vectors S of a decision."""
        return {"executed": self.num_executed, "per_step": self.num_steps, "repeated": 1}[self.form]

    @property
    def dim(self) -> int:
        """Width d of a decision."""
        return self.num_decided * self.action_dim

    def of_base_policy(self, normal: Tensor) -> Tensor:
        """Returns decisions [B, d] distributed as the base policy's noise, N(0, 1), from `normal` [B, H, A]."""
        return normal[:, : self.num_decided, : self.action_dim].flatten(1)

    def chunk_noise(self, decision: Tensor, normal: Tensor) -> Tensor:
        """Returns what a chunk is denoised from, [B, H, A]: `decision` [B, d], and elsewhere `normal` [B, H, A]."""
        noise = normal.clone()
        decided = decision.unflatten(1, (self.num_decided, self.action_dim))  # [B, S, a]
        until = self.num_steps if self.form == "repeated" else self.num_decided
        noise[:, :until, : self.action_dim] = decided
        return noise

    def draw(self, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Returns standard normal draws of each row's own generator, [B, H, A] and [B, d], in this order."""
        normal = [torch.randn((self.num_steps, self.padded_dim), generator=one) for one in generators]
        eps = [torch.randn(self.dim, generator=one) for one in generators]
        return torch.stack(normal), torch.stack(eps)


# --- networks ---


def encoder(feature_dim: int, latent_dim: int) -> nn.Sequential:
    """Returns what narrows features [B, F] to [B, latent_dim] in (-1, 1)."""
    return nn.Sequential(nn.Linear(feature_dim, latent_dim), nn.LayerNorm(latent_dim), nn.Tanh())


class NoiseActor(nn.Module):
    """A Gaussian over decisions, squashed by tanh to the bound of the noise.

    Features are standardised first, by the mean and deviation that `set_statistics` was given: pooled features of one
    scene differ little from one another beside their size.

    Args:
        space: what is decided.
        feature_dim: F.
        latent_dim: width that features are narrowed to.
        hidden_dims: widths of the hidden layers that follow.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, space: NoiseSpace, *, feature_dim: int, latent_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        self.space = space
        self.sizes = dict(feature_dim=feature_dim, latent_dim=latent_dim, hidden_dims=tuple(hidden_dims))
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        layers: list[nn.Module] = [encoder(feature_dim, latent_dim)]
        widths = [latent_dim, *hidden_dims]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.mean = nn.Linear(widths[-1], space.dim)
        self.log_std = nn.Linear(widths[-1], space.dim)
        for head in (self.mean, self.log_std):  # begins near N(0, 1) before squashing, for every observation
            nn.init.orthogonal_(head.weight, 0.01)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets by what features are standardised, each [F].

        Deviations below a thousandth of their mean over the features count as that: what hardly varies is not blown up.
        """
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp(min=max(1e-3 * std.mean().item(), 1e-8)))

    def standardise(self, features: Tensor) -> Tensor:
        """Returns features [B, F] as the networks take them, float32."""
        z = (features.float() - self.feature_mean) / self.feature_std
        return z.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation before squashing, each [B, d], for standardised features [B, F]."""
        hidden = self.trunk(z)
        return self.mean(hidden), self.log_std(hidden).clamp(*LOG_STD_RANGE).exp()

    def mode(self, z: Tensor) -> Tensor:
        """Returns the decisions without exploration, [B, d]: the squashed mean."""
        return self.space.bound * torch.tanh(self(z)[0])

    def sample(self, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns decisions [B, d] and their log-density [B], in nats.

        Source: Haarnoja et al. 2018 (arXiv:1812.05905), appendix C, with the logarithm of the bound for the scaling.

        Args:
            z: standardised features [B, F].
            eps: [B, d], standard normal.
        """
        mean, std = self(z)
        u = mean + std * eps
        logprob = -0.5 * eps.square() - std.log() - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2), which rounds to -inf if it is computed as it stands.
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        logprob = logprob - log_slope - math.log(self.space.bound)
        return self.space.bound * torch.tanh(u), logprob.sum(dim=-1)


# --- the steered policy ---


class SteeredAgent:
    """A frozen agent whose noise an actor decides, as the evaluation takes it.

    Args:
        agent: the base policy, see `gr00t_agent.SteerableAgent`.
        actor: decides the noise.
        model: where the base policy was loaded from, or what it is called.
    """

    def __init__(self, agent: Any, actor: NoiseActor, model: str) -> None:
        self.agent, self.actor, self.model = agent, actor, model

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the environment's cameras shall have."""
        return self.agent.image_size

    @property
    def policy(self) -> Any:
        """How the base policy is used."""
        return self.agent.policy

    @property
    def num_action_chunks(self) -> int:
        """Environment steps that are executed of each decision."""
        return self.actor.space.num_executed

    @torch.no_grad()
    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns the action chunks of the actor's mode, float32 [B, C, a].

        Args:
            obs: observation.
            generator: one CPU generator per row, for the noise that is not decided.
        """
        encoded = self.agent.encode(obs)
        features = self.agent.value_features(encoded)
        with torch.autocast(features.device.type, enabled=False):  # what is trained is float32
            decision = self.actor.mode(self.actor.standardise(features))
        normal, _ = self.actor.space.draw(generator)
        noise = self.actor.space.chunk_noise(decision, normal.to(decision.device))
        return self.agent.predict(encoded, noise=noise)


# --- files ---


@dataclass(frozen=True, kw_only=True)
class BasePolicy:
    """Which policy is steered, and the settings that it was steered with.

    Attributes:
        model: absolute path of a folder, hub id, or a preset's name.
        weights_sha256: see `weights_digest`.
        num_action_chunks: environment steps per decision.
        denoising_steps: denoising steps from noise to action.
        compute_dtype: type that the network computes in; None is the checkpoint's own.
    """

    model: str
    weights_sha256: str | None
    num_action_chunks: int
    denoising_steps: int
    compute_dtype: str | None

    @classmethod
    def of(cls, args: Any) -> BasePolicy:
        """Returns the base policy of a trainer's arguments; reads all of its weights."""
        is_folder = Path(args.model).is_dir()
        return cls(
            model=str(Path(args.model).resolve()) if is_folder else args.model,
            weights_sha256=weights_digest(args.model),
            num_action_chunks=args.num_action_chunks,
            denoising_steps=args.denoising_steps,
            compute_dtype=args.compute_dtype,
        )


def weights_digest(checkpoint: str) -> str | None:
    """Returns a SHA-256 over a checkpoint's weight files; None for a preset's random weights."""
    if checkpoint in get_args(PresetName):
        return None
    total = hashlib.sha256()
    for path in sorted(resolve_checkpoint(checkpoint).glob("model*.safetensors")):
        total.update(bytes.fromhex(file_digest(path)))
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Returns a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_noise_actor(
    folder: Path, actor: NoiseActor, base: BasePolicy | None, trained_on: Mapping[str, Any] | None
) -> None:
    """Writes the actor into `folder`.

    Args:
        folder: where it is written.
        actor: decides the noise.
        base: which policy it steers; None for one of one's own.
        trained_on: what the actor was trained on, as in `gr00t_agent.loading.Pretrained`.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in actor.state_dict().items()}
    with whole_file(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary)
    config = {
        "space": asdict(actor.space),
        "sizes": actor.sizes,
        "base": None if base is None else asdict(base),
        "trained_on": trained_on,
    }
    write_json(folder / CONFIG_FILE, config)


def is_noise_actor(folder: str | Path) -> bool:
    """Returns whether `save_noise_actor` has written into `folder`."""
    return (Path(folder) / CONFIG_FILE).is_file()


def load_noise_actor(folder: str | Path) -> tuple[NoiseActor, BasePolicy | None]:
    """Returns the actor in `folder`, on the CPU, and the base policy that it steers (None: one of one's own)."""
    path = Path(folder) / CONFIG_FILE
    content = read_json(path)
    with naming(path):
        space, sizes, base = (require(content, name, "the file") for name in ("space", "sizes", "base"))
        actor = NoiseActor(dataclass_from_json(NoiseSpace, space, "space"), **sizes)
        base_policy = None if base is None else dataclass_from_json(BasePolicy, base, "base")
    actor.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    return actor.eval(), base_policy


def load_steered(
    folder: str | Path, *, base_model: str | None = None, device: str = "cpu", **changes: Any
) -> SteeredAgent:
    """Returns a steered policy.

    Args:
        folder: what `save_noise_actor` has written into.
        base_model: where the base policy is now; None takes the place where it was.
        device: where the networks are put.
        changes: settings of the base policy (`PolicyConfig`) that differ from those it was steered with; None of one
            leaves it.

    Raises:
        FileNotFoundError: there is no base policy at its place.
        ValueError: it has other weights than the one that was steered, or is an agent of one's own.
    """
    actor, base = load_noise_actor(folder)
    if base is None:
        raise ValueError(
            f"{folder} steers an agent of one's own, which no name tells how to load; give eval_gr00t.py --policy a "
            "function that returns SteeredAgent(agent, load_noise_actor(folder)[0], name) of algorithms.common.steering"
        )
    model = base.model if base_model is None else base_model
    remedy = "give the folder or hub id of the policy that was steered by --base-model"
    try:
        digest = weights_digest(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the base policy of {folder} is not at {model!r}; {remedy}") from error
    if digest is None or digest != base.weights_sha256:
        raise ValueError(
            f"{model} has weights of SHA-256 {digest}, but {folder} steers those of {base.weights_sha256}; {remedy}"
        )
    settings: dict[str, Any] = {
        name: getattr(base, name) for name in ("num_action_chunks", "denoising_steps", "compute_dtype")
    }
    settings |= {name: value for name, value in changes.items() if value is not None}
    agent = Gr00tAgent.load(model, **settings).to(device).eval()
    return SteeredAgent(agent, actor.to(device), model)
