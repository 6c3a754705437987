"""Stochastic flow sampling with known log-probabilities. Knows no network, only a velocity function.

tau runs from 0 (noise) to 1 (action); step k of N goes from tau = k/N to (k+1)/N. With velocity v at (x, tau), the
estimates of the two ends are x0 = x - tau v (noise) and x1 = x + (1 - tau) v (action), and every transition is

    mean = w1 x1 + w0 x0,    x_next = mean + std * eps,    eps ~ N(0, 1).

Methods, D = 1/N, a = noise level:
    * `euler`: w1 = tau + D, w0 = 1 - tau - D, std = 0.
    * `flow_sde` (Flow-GRPO, arXiv 2505.05470, tau reversed): s = a sqrt((1 - tau)/tau), the denominator replaced
      by D at tau = 0; w1 = tau + D, w0 = 1 - tau - D - s^2 D / (2 (1 - tau)), std = s sqrt(D).
    * `flow_cps` (arXiv 2509.05952): w1 = tau + D, w0 = (1 - tau - D) cos(pi a/2), std = (1 - tau - D) sin(pi a/2).
      The last step has std 0.
    * `reinflow` (Flow-Noise of pi_RL, arXiv 2510.25889, as in RLinf): Euler weights, std from a learned net.
    * `reinflow_joint` (ReinFlow, arXiv 2505.22094): as `reinflow`, with every step stochastic, the joint
      log-probability of the whole chain, and the mean of every step clipped to [-1, 1] before noise is added. What is
      scored is the density that the state was drawn from, so that the score has mean zero at the bounds too.

Except for `reinflow_joint` and `joint=True`, one step per sample is stochastic (its denoise index) and the others are
Euler steps. All arithmetic here is float32, whatever the network computes in.

Shape legend: B batch, N denoising steps, H action horizon, A padded action width, E scored entries: 1, or N + 1 for
joint sampling (the initial noise, then each step).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

NoiseMethod = Literal["flow_sde", "flow_cps", "reinflow", "reinflow_joint"]
NOISE_METHODS: tuple[str, ...] = get_args(NoiseMethod)

# denoise_index of a chain whose steps are all stochastic.
ALL_STEPS = -1

LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)


class Prediction(NamedTuple):
    """What the network says about a state of the chain: velocity [B, H, A], and the learned std or None."""

    velocity: Tensor
    std: Tensor | None


# (x [B, H, A], step int64 [B]) -> Prediction
VelocityFunction = Callable[[Tensor, Tensor], Prediction]


class ChainScores(NamedTuple):
    """Scores of a chain, element by element.

    Attributes:
        mean: [B, H, A] of the stochastic step; joint: [B, N, H, A].
        std: Like `mean`, broadcastable to it.
        log_prob: float32 [B, E, H, A].
        entropy: float32, broadcastable to `log_prob`.
    """

    mean: Tensor
    std: Tensor
    log_prob: Tensor
    entropy: Tensor


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return element-wise log N(x; mean, std), and 0 where std is 0 (a deterministic step has no density)."""
    stochastic = std > 0
    safe = torch.where(stochastic, std, 1.0)
    value = -safe.log() - LOG_SQRT_TWO_PI - 0.5 * ((x - mean) / safe).square()
    return torch.where(stochastic, value, 0.0)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Return element-wise entropy in nats of N(., std), and 0 where std is 0."""
    stochastic = std > 0
    value = torch.where(stochastic, std, 1.0).log() + LOG_SQRT_TWO_PI + 0.5
    return torch.where(stochastic, value, 0.0)


@lru_cache(maxsize=256)
def _step_table(method: str, num_steps: int, noise_level: float, device: torch.device) -> Tensor:
    """Return float32 [3, N]: w1, w0 and std of each step (std of learned methods is 0 here)."""
    delta = 1.0 / num_steps
    rows: list[tuple[float, float, float]] = []
    for k in range(num_steps):
        tau = k / num_steps
        rest = 1.0 - tau - delta
        w1, w0, std = tau + delta, rest, 0.0
        if method == "flow_sde":
            sigma = noise_level * math.sqrt((1 - tau) / max(tau, delta))
            w0 = rest - sigma**2 * delta / (2 * (1 - tau))
            std = sigma * math.sqrt(delta)
        elif method == "flow_cps":
            # The last remainder is rounding error, and a std of 1e-17 would be taken for noise.
            rest = 0.0 if k == num_steps - 1 else rest
            w0, std = rest * math.cos(math.pi * noise_level / 2), rest * math.sin(math.pi * noise_level / 2)
        rows.append((w1, w0, std))
    return torch.tensor(rows, dtype=torch.float32, device=device).T.contiguous()


@dataclass(frozen=True, kw_only=True)
class FlowSampler:
    """Samples and scores denoising chains.

    Attributes:
        num_steps: Denoising steps N.
        method: Noise method, see the module docstring.
        noise_level: The a of flow_sde and flow_cps; unused by the learned methods.
        joint: Make every step stochastic (always so for `reinflow_joint`).
        ignore_last: Never draw the last step of flow_sde, so that the executed action carries no fresh noise.
    """

    num_steps: int
    method: NoiseMethod = "flow_sde"
    noise_level: float = 0.5
    joint: bool = False
    ignore_last: bool = False

    def __post_init__(self) -> None:
        if self.method not in NOISE_METHODS:
            raise ValueError(f"noise_method={self.method!r} is unknown (valid: {', '.join(NOISE_METHODS)})")
        if self.num_steps < 1:
            raise ValueError(f"denoising_steps={self.num_steps} is below 1")
        if self.noise_level <= 0 or (self.method == "flow_cps" and self.noise_level > 1):
            raise ValueError(
                f"noise_level={self.noise_level} is out of range (valid: above 0, and at most 1 for flow_cps)"
            )
        if self.ignore_last and (self.is_joint or self.method != "flow_sde"):
            raise ValueError(
                f"ignore_last=True has no effect with noise_method={self.method!r} and joint_logprob={self.joint}; it "
                "goes with flow_sde and noise at one step only"
            )
        if self.num_stochastic_steps < 1:
            raise ValueError(
                f"denoising_steps={self.num_steps} leaves no stochastic step: the last step of {self.method} is "
                "deterministic here; use at least 2 steps"
            )

    @property
    def is_joint(self) -> bool:
        """True if every step is stochastic."""
        return self.joint or self.method == "reinflow_joint"

    @property
    def is_learned(self) -> bool:
        """True if the network has to give the standard deviation."""
        return self.method.startswith("reinflow")

    @property
    def num_stochastic_steps(self) -> int:
        """Steps that may be drawn as the stochastic one: 0 to this minus 1."""
        skip_last = self.method == "flow_cps" or self.ignore_last
        return self.num_steps - int(skip_last)

    def draw_index(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        *,
        whole_batch: bool = False,
    ) -> Tensor:
        """Draw the stochastic step of each sample, int64 [B]; `ALL_STEPS` for joint sampling.

        Args:
            batch_size: B.
            device: Where to put it.
            generator: Source of randomness, on any device.
            whole_batch: One index for all samples, as RLinf does.
        """
        if self.is_joint:
            return torch.full((batch_size,), ALL_STEPS, dtype=torch.int64, device=device)
        source = device if generator is None else generator.device
        drawn = torch.randint(
            self.num_stochastic_steps, (1 if whole_batch else batch_size,), generator=generator, device=source
        )
        return drawn.expand(batch_size).contiguous().to(device)

    def transition(
        self, x: Tensor, prediction: Prediction, step: Tensor, stochastic: Tensor, noise_anneal: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return mean and std of the next state.

        Args:
            x: float32 [B, H, A].
            prediction: At x and this step.
            step: int64 [B], k.
            stochastic: bool [B], True where the noise method applies; the other rows take an Euler step.
            noise_anneal: Factor on `noise_level`; the learned std is annealed by whoever computes it.

        Returns:
            mean [B, H, A]; std, [B, 1, 1] or [B, H, A], 0 in deterministic rows.
        """
        velocity = prediction.velocity.float()
        table_method = "euler" if self.is_learned else self.method
        euler = _step_table("euler", self.num_steps, 0.0, x.device)[:, step]  # [3, B]
        noisy = _step_table(table_method, self.num_steps, self.noise_level * noise_anneal, x.device)[:, step]
        w1, w0, std = torch.where(stochastic, noisy, euler)[:, :, None, None]  # [B, 1, 1] each
        tau = (step.to(torch.float32) / self.num_steps)[:, None, None]
        mean = self._clip(w1 * (x + (1 - tau) * velocity) + w0 * (x - tau * velocity))
        if self.is_learned:
            if prediction.std is None:
                raise ValueError(f"{self.method} needs a velocity function that also returns a std")
            std = torch.where(stochastic[:, None, None], prediction.std.float(), 0.0)
        return mean, std

    def _clip(self, mean: Tensor) -> Tensor:
        return mean.clamp(-1.0, 1.0) if self.method == "reinflow_joint" else mean

    def sample(
        self,
        velocity: VelocityFunction,
        noise: Tensor,
        denoise_index: Tensor,
        *,
        step_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise_anneal: float = 1.0,
    ) -> tuple[Tensor, ChainScores]:
        """Run the chain from noise to action and score it.

        Args:
            velocity: Network.
            noise: float32 [B, H, A], x at tau = 0.
            denoise_index: int64 [B], the stochastic step of each sample (`draw_index`).
            step_noise: Standard normal [N, B, H, A] to use instead of drawing.
            generator: Source of the step noise.
            noise_anneal: Fraction of the exploration noise left.

        Returns:
            chain [B, N+1, H, A] and its scores; `evaluate` gives the same scores for the same network.
        """
        single = None
        if step_noise is None and not self.is_joint:
            # One draw serves all steps, since each sample uses noise at one step only.
            single = _normal_like(noise, generator)
        chain, means, stds = [noise.float()], [], []
        for k in range(self.num_steps):
            step = torch.full_like(denoise_index, k)
            stochastic = torch.ones_like(step, dtype=torch.bool) if self.is_joint else denoise_index == k
            mean, std = self.transition(chain[-1], velocity(chain[-1], step), step, stochastic, noise_anneal)
            if step_noise is not None:
                eps = step_noise[k].float()
            else:
                eps = single if single is not None else _normal_like(noise, generator)
            chain.append(mean + std * eps)
            means.append(mean)
            stds.append(std)
        states = torch.stack(chain, dim=1)  # [B, N+1, H, A]
        mean, std = torch.stack(means, dim=1), torch.stack(stds, dim=1)
        if self.is_joint:
            return states, self._joint_scores(states, mean, std)
        row = torch.arange(len(denoise_index), device=denoise_index.device)
        return states, self._single_scores(states, denoise_index, mean[row, denoise_index], std[row, denoise_index])

    def evaluate(
        self, velocity: VelocityFunction, chain: Tensor, denoise_index: Tensor, *, noise_anneal: float = 1.0
    ) -> ChainScores:
        """Score a stored chain under the network as it is now.

        Args:
            velocity: Network.
            chain: [B, N+1, H, A] from `sample`.
            denoise_index: int64 [B] from `sample`.
            noise_anneal: The value used when sampling.

        Raises:
            ValueError: The chain has another number of steps than this sampler, or was sampled with noise at one step
                and this sampler has it at all, or the other way round.
        """
        if chain.shape[1] != self.num_steps + 1:
            raise ValueError(
                f"chain has {chain.shape[1] - 1} steps, but denoising_steps={self.num_steps}; re-evaluate with the "
                "number of steps that the rollout used"
            )
        if bool(((denoise_index == ALL_STEPS) != self.is_joint).any()):
            raise ValueError(
                f"the chain was sampled with noise at {'one step' if self.is_joint else 'all steps'}, but "
                f"joint_logprob={self.joint} with noise_method={self.method!r} scores the other kind; re-evaluate with "
                "the settings that the rollout used"
            )
        chain = chain.float()
        if self.is_joint:
            means, stds = [], []
            for k in range(self.num_steps):
                step = torch.full_like(denoise_index, k)
                x = chain[:, k]
                mean, std = self.transition(
                    x, velocity(x, step), step, torch.ones_like(step, dtype=torch.bool), noise_anneal
                )
                means.append(mean)
                stds.append(std)
            return self._joint_scores(chain, torch.stack(means, dim=1), torch.stack(stds, dim=1))
        row = torch.arange(len(denoise_index), device=denoise_index.device)
        x = chain[row, denoise_index]
        mean, std = self.transition(
            x, velocity(x, denoise_index), denoise_index, torch.ones_like(row, dtype=torch.bool), noise_anneal
        )
        return self._single_scores(chain, denoise_index, mean, std)

    def denoise(self, velocity: VelocityFunction, noise: Tensor) -> Tensor:
        """Return the action [B, H, A] at the end of the deterministic Euler chain from `noise`."""
        x = noise.float()
        for k in range(self.num_steps):
            step = torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
            x = self._clip(x + velocity(x, step).velocity.float() / self.num_steps)
        return x

    def _single_scores(self, chain: Tensor, denoise_index: Tensor, mean: Tensor, std: Tensor) -> ChainScores:
        row = torch.arange(len(denoise_index), device=denoise_index.device)
        log_prob = gaussian_log_prob(chain[row, denoise_index + 1], mean, std)
        return ChainScores(mean, std, log_prob[:, None], gaussian_entropy(std)[:, None])

    def _joint_scores(self, chain: Tensor, mean: Tensor, std: Tensor) -> ChainScores:
        first = gaussian_log_prob(chain[:, :1], torch.zeros_like(chain[:, :1]), torch.ones_like(chain[:, :1]))
        log_prob = torch.cat([first, gaussian_log_prob(chain[:, 1:], mean, std)], dim=1)
        entropy = gaussian_entropy(torch.cat([torch.ones_like(std[:, :1]), std], dim=1))
        return ChainScores(mean, std, log_prob, entropy)


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return float32 standard normal noise shaped like x; a generator of another device is allowed."""
    source = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=source, dtype=torch.float32).to(x.device)
