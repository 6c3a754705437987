"""DSRL for a flow-matching vision-language-action policy on LIBERO: soft actor-critic on its noise.

The policy is frozen and a black box: a deterministic sampler maps an observation and an initial
noise to an action chunk. What is learned is the noise (Wagenmaker et al. 2025, "Steering Your
Diffusion Policy with Latent Space Reinforcement Learning", arXiv:2506.15799, in the variant without
an action-space critic). One decision w is the noise of one chunk, of which the environment executes
the first C actions; their rewards are summed. On decisions this is SAC (Haarnoja et al. 2018,
arXiv:1812.05905) with an ensemble of critics Q_j and their Polyak averages Q'_j:

    w_k      = bound * tanh(mean(s_k) + std(s_k) * eps),  eps ~ N(0, 1)
    y_k      = R_k + gamma * (1 - terminal_k) * mean_j Q'_j(s_{k+1}, w'),  w' ~ pi(s_{k+1})
    L_Q      = E[mean_j (Q_j(s_k, w_k) - y_k)^2]
    L_pi     = E[alpha * log pi(w | s_k) - mean_j Q_j(s_k, w)],  w ~ pi(s_k)
    L_alpha  = alpha * (E[entropy] - target_entropy)

The smallest Q'_j and Q_j instead of the mean, and the entropy of w' in y_k, are options. s_k are the
features that the frozen policy's value head would see: the replay buffer holds these, not images. A
truncated episode bootstraps from its own last observation (or counts as a failure, see
`truncation`), a terminated one does not. The first iterations decide w ~ N(0, 1), as the policy was
trained, and nothing is learned until the last of them.

Launch:
    accelerate launch algorithms/dsrl_gr00t.py --preset libero_spatial_nano
    accelerate launch algorithms/dsrl_gr00t.py --preset libero_spatial_nano --resume auto
    accelerate launch --multi_gpu algorithms/dsrl_gr00t.py --preset libero_spatial_gr00t_24gb
All sizes are global: they are divided over the processes, and a size that does not divide is an
error. Every process holds the whole replay buffer. Every draw is keyed by seed, iteration, decision
and environment, or by seed, iteration and update: the result does not depend on the number of
processes or stages (rounding excepted), and a resumed run is the same run. Not under FSDP.

What differs from the paper's code for pi0 on LIBERO (github.com/nakamotoo/dsrl_pi0): the networks
see the policy's own pooled features instead of a small image encoder's; the executed steps of a
chunk have noise of their own, where theirs repeat one vector (`noise_form` repeated); many
environments play at once, so that fewer updates fall on a decision; success is worth 1 and all else
0, where they have 0 and -1 (`reward_shift` -1), and the temperature begins at 0.02 instead of 1, as
values span 1 instead of some 50; an evaluation takes the actor's mode, not a sample.

Metrics: `actor/*` (`actor/alpha`: the temperature) and `critic/*` are means over an iteration's
updates, `rollout/*` over its decisions, `env/*` over a cohort: the episodes that began in one
iteration, as soon as all of them must have ended (`env/success_once`: success at any step of the
episode; with exploration). `time/env_s` is spent stepping, `time/env_wait_s` is the part of it that
decisions did not overlap, `time/policy_s` the rest of the rollout, and `charts/SPS` environment
steps per second of the whole loop.

Shape legend: N environments of this process, K decisions of each in an iteration, M rows, F width of
the features, d width of a decision, E critics, H x A the noise of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from algorithms.common import presets
from algorithms.common.args import (
    NoiseForm,
    check_agent_takes,
    check_folders,
    check_physics,
    check_ranges,
    check_sizes,
    check_stages,
    check_value_bounds,
    share_of_process,
)
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import check_starts, jobs_in_training
from gr00t_agent.config import PresetName


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it. Sizes are over all processes."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "dsrl_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    resume: Path | None = None
    """Run folder (or its newest checkpoint) to go on with, or `auto`: the newest run of this name
    that has a checkpoint, else a new one. Give the same arguments as before."""
    seed: int = 1
    """Seed of the environments, the networks' initial weights and every random draw."""
    num_iterations: int = 400
    """Rollout-and-update rounds."""

    # --- environment ---
    suite: str = "libero_spatial"
    """LIBERO suite; `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to train on, each drawn as often as it is named; all of the suite if not given."""
    num_envs: int = 64
    """Parallel environments over all processes."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes (C)."""
    horizon: int | None = None
    """Environment steps before truncation; the suite's own if not given."""
    reward: Literal["sparse", "relative"] = "sparse"
    """Sparse: 1 at success. Relative: the change of success from the step before."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""
    physics: Literal["cpu", "warp"] = "cpu"
    """`warp` simulates on the GPU: much faster for a thousand environments and more, and not
    bit-identical."""
    stepping: Literal["exact", "fast"] = "exact"
    """`exact` repeats LIBERO's simulation bit by bit; `fast` takes a fifth less time and rounds
    differently. Without meaning for physics `warp`."""
    pipeline_stage_num: int = 1
    """Stages that a process's environments are split into; one simulates while another is
    decided."""
    env_timeout_s: float = 600.0
    """Stop the run if a decision's environment steps take longer."""

    # --- agent: frozen ---
    model: str = "nano"
    """The policy that is steered: the folder or hub id of a checkpoint."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the policy's matrix products; the checkpoint's own if not given. What is trained is
    float32."""
    compile: bool = False
    """Compile the network with torch.compile; the first iterations then take minutes longer."""

    # --- noise: the decision ---
    noise_form: NoiseForm = "executed"
    """One noise vector for each step that is executed (5 x 7 numbers; the other steps' noise is
    drawn from N(0, 1)), one for each step of the chunk (16 x 7), or one for all steps (7; the
    paper's for pi0). Only elements that become actions are decided; padding is drawn from
    N(0, 1)."""
    noise_bound: float = 1.0
    """Largest magnitude of a decided element; the policy was trained on N(0, 1)."""

    # --- networks ---
    num_critics: int = 10
    """Critics of the ensemble (E); 2 are SAC's twins."""
    critic_reduction: Literal["mean", "min"] = "mean"
    """What of the ensemble targets and the actor follow; SAC's twins take the smallest."""
    latent_dim: int = 64
    """Width that features are narrowed to before the hidden layers, once for the actor and once for
    all critics."""
    hidden_dims: tuple[int, ...] = (128, 128, 128)
    """Widths of the hidden layers of the actor and of each critic."""

    # --- rollout and replay ---
    num_steps: int = 4
    """Decisions per environment and iteration."""
    warmup_iterations: int = 4
    """First iterations whose noise is the policy's own, N(0, 1). The update of the last of them is
    the first; by its decisions features are standardised from then on."""
    replay_capacity: int = 200_000
    """Decisions that are kept; the oldest give way."""
    replay_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of features in the replay buffer: a decision takes twice their size."""
    reward_scale: float = 1.0
    """Factor on rewards."""
    reward_shift: float = 0.0
    """Added to each decision's scaled reward; -1 is the paper's: -1 a decision, 0 at success."""
    gamma: float = 0.99
    """Discount per decision."""
    truncation: Literal["bootstrap", "failure"] = "bootstrap"
    """An episode cut at the horizon has the value of its last observation left, or 0: being late is
    a failure."""
    value_bounds: tuple[float, float] | None = None
    """Range of possible returns (0 and reward_scale where success ends an episode). Targets see
    values clipped to it, so that an overestimate cannot feed itself."""

    # --- optimisation ---
    learning_rate: float = 1e-4
    """Adam's step size for the actor."""
    critic_learning_rate: float = 3e-4
    """Adam's step size for the critics."""
    alpha_learning_rate: float = 3e-4
    """Adam's step size for the logarithm of the temperature."""
    num_updates: int = 200
    """Updates per iteration: of the critics, then of the actor and the temperature."""
    minibatch_size: int = 256
    """Decisions per update over all processes, drawn with replacement."""
    max_grad_norm: float = 10.0
    """Norm to which gradients are clipped, those of the critics and of the actor each."""
    polyak: float = 0.005
    """Part of the critics that enters their targets at each update (SAC's tau)."""
    initial_alpha: float = 0.02
    """Temperature at the start: what a nat of entropy is worth, where success is worth
    reward_scale."""
    target_entropy: float | None = None
    """Entropy that the temperature is adapted to, nats per decision of the density of the noise
    itself; -d/2 for d decided numbers if not given, the paper's. A uniform density has d ln(2
    noise_bound)."""
    backup_entropy: bool = False
    """Count the entropy of later decisions in targets, as SAC does; the paper's code does not."""

    # --- evaluation and saving ---
    eval_interval: int = 0
    """Iterations between evaluations; 0 evaluates only after the last."""
    eval_episodes_per_task: int = 50
    """Stored initial states evaluated per task (50 are stored); 0 skips evaluation."""
    save_interval: int = 50
    """Iterations between checkpoints; the last iteration is always saved, and while keep_best is
    not 0 every evaluated one. 0 saves no others."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Evaluated checkpoints that are kept besides for their success rate."""

    # --- logging ---
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers that receive the metrics."""
    tracker_project: str = "libero-gr00t"
    """Project that the run belongs to in trackers that have projects, such as `wandb`."""
    video_interval: int = 0
    """Iterations between films of what four environments do in a rollout; 0 films none."""

    @property
    def num_decisions(self) -> int:
        """Decisions per iteration over all processes."""
        return self.num_envs * self.num_steps

    def is_warmup(self, iteration: int) -> bool:
        """Returns whether the noise of `iteration` is the policy's own."""
        return iteration <= self.warmup_iterations

    def has_update(self, iteration: int) -> bool:
        """Returns whether there is an update in `iteration`."""
        return iteration >= self.warmup_iterations

    def evaluates(self, iteration: int) -> bool:
        """Returns whether the policy is evaluated after `iteration`: not before it has learnt."""
        is_last = iteration == self.num_iterations
        is_due = self.eval_interval > 0 and iteration % self.eval_interval == 0
        is_wanted = (is_last or is_due) and self.eval_episodes_per_task > 0
        return is_wanted and self.has_update(iteration)

    def saves(self, iteration: int) -> bool:
        """Returns whether a checkpoint is saved after `iteration`."""
        is_last = iteration == self.num_iterations
        is_due = self.save_interval > 0 and iteration % self.save_interval == 0
        return is_last or is_due or (self.keep_best > 0 and self.evaluates(iteration))

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Returns what the best checkpoints are chosen by; None where none was evaluated.

        Not the success of the training's own episodes, which explore and are of earlier weights.
        """
        return metrics.get("eval/success_once")


PRESETS = {name: Args(**settings) for name, settings in presets.DSRL.items()}


def check_args(args: Args) -> None:
    """Raises ValueError for arguments that would otherwise fail late, or teach the wrong thing."""
    check_ranges(args)
    if args.replay_capacity < args.num_decisions:
        raise ValueError(
            f"replay_capacity={args.replay_capacity} does not hold the {args.num_decisions} "
            "decisions of an iteration; give at least as many"
        )
    if args.num_iterations < args.warmup_iterations:
        raise ValueError(
            f"num_iterations={args.num_iterations} end before warmup_iterations="
            f"{args.warmup_iterations} do, and nothing would be learnt; give at least as many"
        )
    check_value_bounds(args)
    if args.value_bounds is not None and args.backup_entropy:
        low, high = args.value_bounds
        raise ValueError(
            f"value_bounds={low:g} {high:g} are the range of returns, and with backup_entropy=True "
            "values hold the entropy to come besides, which would be clipped: give --value-bounds "
            "None, or --no-backup-entropy"
        )
    if args.truncation == "failure" and args.reward_shift < 0:
        raise ValueError(
            f"truncation='failure' gives a late episode the value 0 for its end, and with "
            f"reward_shift={args.reward_shift} nothing is worth more: give --truncation bootstrap, "
            "or --reward-shift 0"
        )
    check_sizes(args, "num_envs", "minibatch_size")
    check_stages(args)
    check_starts(args)
    check_folders(args)
    if args.eval_episodes_per_task > 0:
        jobs_in_training(args)
    check_physics(args, "demo")


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, PRESETS, check_args) if __name__ == "__main__" else None

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from algorithms.common.batch import index, mean_of
from algorithms.common.checkpoint_notes import tell_start, trained_on
from algorithms.common.evaluation import evaluate_into, evaluation_file
from algorithms.common.frozen import origin_of, store_frozen_as
from algorithms.common.monitor import Monitor
from algorithms.common.processes import (
    for_all,
    make_accelerator,
    mean_and_variance,
    over_processes,
)
from algorithms.common.randomness import (
    EPISODES,
    MINIBATCHES,
    NOISE,
    UPDATES,
    generators_of,
    seed_of,
)
from algorithms.common.resume import Checkpoints, StopSignal, missing_evaluation, open_run
from algorithms.common.stages import EnvStages
from algorithms.common.steering import (
    BasePolicy,
    NoiseActor,
    NoiseSpace,
    SteeredAgent,
    encoder,
    save_noise_actor,
)
from algorithms.common.video import CONTROL_FREQUENCY_HZ, RolloutRecorder
from gr00t_agent import Gr00tAgent
from libero_gym import horizon
from libero_gym.adapters import ModalityVectorObservation


def make_envs(
    args: Args,
    num_envs: int,
    image_size: int,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments whose observations carry GR00T's modality keys."""
    options: dict[str, Any] = dict(
        task_ids=args.task_ids,
        num_action_chunks=args.num_action_chunks,
        horizon=args.horizon,
        reward=args.reward,
        image_size=image_size,
        renderer=args.renderer,
        autoreset_mode=autoreset_mode,
    )
    if args.physics == "warp":
        # Images stay on the GPU, where the agent wants them.
        options |= dict(physics="warp", images_as_torch=True)
    else:
        options |= dict(stepping=args.stepping)
        if args.pipeline_stage_num > 1:
            # Decisions need a core of their own, to launch what a GPU computes.
            options |= dict(num_threads=max(1, len(os.sched_getaffinity(0)) - 1))
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        **options,
    )
    return ModalityVectorObservation(envs)


def load_agent(args: Args) -> Gr00tAgent:
    """Returns the policy that `args` ask for, on the CPU, frozen.

    Raises:
        ValueError: it would have random weights.
    """
    if args.model in get_args(PresetName):
        raise ValueError(
            f"model={args.model!r} has random weights, which steering does not change: give the "
            "folder or hub id of a policy, for example --model checkpoints/libero_spatial_fewshot"
        )
    agent = Gr00tAgent.load(
        args.model,
        num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps,
        compute_dtype=args.compute_dtype,
        train_backbone=False,
    )
    return store_frozen_as(agent.requires_grad_(False), agent.policy.torch_dtype)


# --- networks ---


class EnsembleLinear(nn.Module):
    """E linear layers side by side, each initialised as `nn.Linear` is.

    Args:
        num_critics: E.
        width_in: of each layer's input.
        width_out: of its output.
    """

    def __init__(self, num_critics: int, width_in: int, width_out: int) -> None:
        super().__init__()
        largest = 1 / math.sqrt(width_in)
        weight = torch.empty(num_critics, width_in, width_out).uniform_(-largest, largest)
        bias = torch.empty(num_critics, 1, width_out).uniform_(-largest, largest)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [E, M, width_out] of inputs [E, M, width_in]."""
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """An ensemble of values of decisions, which share what narrows the features.

    Args:
        feature_dim: F.
        decision_dim: d.
        num_critics: E.
        latent_dim: width that features are narrowed to.
        hidden_dims: widths of the hidden layers of each critic.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        decision_dim: int,
        num_critics: int,
        latent_dim: int,
        hidden_dims: Sequence[int],
    ) -> None:
        super().__init__()
        self.num_critics = num_critics
        self.encoder = encoder(feature_dim, latent_dim)
        layers: list[nn.Module] = []
        width = latent_dim + decision_dim
        for hidden in hidden_dims:
            layers += [EnsembleLinear(num_critics, width, hidden), nn.ReLU()]
            width = hidden
        self.heads = nn.Sequential(*layers, EnsembleLinear(num_critics, width, 1))

    def forward(self, z: Tensor, decision: Tensor) -> Tensor:
        """Returns the values of decisions [M, d] at standardised features [M, F], [E, M]."""
        x = torch.cat([self.encoder(z), decision], dim=-1)  # [M, latent_dim + d]
        x = x.expand(self.num_critics, -1, -1)  # [E, M, latent_dim + d]
        return self.heads(x)[..., 0]


class Networks(nn.Module):
    """All that is trained: the actor, the critics, and the temperature's logarithm.

    Args:
        args: the trainer's arguments.
        space: what is decided.
        feature_dim: F.
    """

    def __init__(self, args: Args, space: NoiseSpace, feature_dim: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = dict(
            feature_dim=feature_dim,
            latent_dim=args.latent_dim,
            hidden_dims=args.hidden_dims,
        )
        self.actor = NoiseActor(space, **sizes)
        self.critics = Critics(decision_dim=space.dim, num_critics=args.num_critics, **sizes)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_alpha)))

    def param_groups(self, args: Args) -> list[dict[str, Any]]:
        """Returns the optimiser's groups."""
        return [
            {"name": "actor", "params": [*self.actor.parameters()], "lr": args.learning_rate},
            {
                "name": "critic",
                "params": [*self.critics.parameters()],
                "lr": args.critic_learning_rate,
            },
            {"name": "alpha", "params": [self.log_alpha], "lr": args.alpha_learning_rate},
        ]


# --- replay ---


class Transitions(NamedTuple):
    """Decisions and what they led to.

    Attributes:
        features: [M, F] of the observation that each decision saw.
        decision: float32 [M, d].
        reward: float32 [M], scaled and shifted.
        next_features: [M, F] of the observation that it led to, before any reset.
        terminal: bool [M], True where nothing follows.
    """

    features: Tensor
    decision: Tensor
    reward: Tensor
    next_features: Tensor
    terminal: Tensor


class Replay:
    """The last decisions, on the device.

    Args:
        capacity: decisions that are kept.

    Attributes:
        size: decisions that are there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._position = 0  # of the next decision
        self._rows: Transitions | None = None

    def add(self, new: Transitions) -> None:
        """Keeps decisions [M], at most the capacity; the oldest give way.

        Raises:
            FloatingPointError: a value is not finite, or too large for the type of the features.
        """
        for name, values in zip(new._fields, new, strict=True):
            if not torch.isfinite(values).all():
                raise FloatingPointError(
                    f"{name} of a decision is not finite in {values.dtype}; if float32 holds it, "
                    "give --replay-dtype bfloat16 or float32, else look at the policy's weights"
                )
        if self._rows is None:
            shapes = [(self.capacity, *values.shape[1:]) for values in new]
            self._rows = Transitions(
                *(values.new_zeros(shape) for values, shape in zip(new, shapes, strict=True))
            )
        num_new = len(new.reward)
        at = (self._position + torch.arange(num_new, device=new.reward.device)) % self.capacity
        for rows, values in zip(self._rows, new, strict=True):
            rows[at] = values
        self._position = (self._position + num_new) % self.capacity
        self.size = min(self.size + num_new, self.capacity)

    def get(self, inds: Tensor) -> Transitions:
        """Returns rows `inds` [M], features as they are stored."""
        return Transitions(*(rows[inds] for rows in self.filled()))

    def filled(self) -> Transitions:
        """Returns all decisions that are there, without a copy.

        Raises:
            ValueError: there are none.
        """
        if self._rows is None:
            raise ValueError("the replay buffer is empty; add decisions first")
        return Transitions(*(rows[: self.size] for rows in self._rows))

    def state(self) -> dict[str, Tensor]:
        """Returns what `load_state` takes, without a copy."""
        if self._rows is None:
            return {}
        return self.filled()._asdict() | {"position": torch.tensor([self._position])}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Puts back what `state` returned."""
        if not state:
            return
        self._rows, self._position, self.size = None, 0, 0
        self.add(Transitions(*(state[name].to(device) for name in Transitions._fields)))
        self._position = int(state["position"])


# --- losses ---


def ensemble_value(values: Tensor, how: Literal["mean", "min"]) -> Tensor:
    """Returns the value [M] that an ensemble's values [E, M] stand for."""
    return values.mean(dim=0) if how == "mean" else values.amin(dim=0)


def td_target(rewards: Tensor, next_values: Tensor, terminal: Tensor, gamma: float) -> Tensor:
    """Returns what the critics are drawn to, [M].

    Args:
        rewards: [M].
        next_values: [M] of the observations that the decisions led to.
        terminal: bool [M], True where nothing follows.
        gamma: discount per decision.
    """
    return rewards + gamma * torch.where(terminal, 0.0, next_values)


def critic_loss(values: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over critics and decisions of squared errors of [E, M] from [M]."""
    return (values - target).square().mean()


def actor_loss(logprob: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Returns the mean of alpha * log-density - value, of fresh decisions, both [M]."""
    return (alpha * logprob - values).mean()


def temperature_loss(log_alpha: Tensor, logprob: Tensor, target_entropy: float) -> Tensor:
    """Returns alpha * (entropy - target_entropy); its gradient does not enter `logprob` [M]."""
    return log_alpha.exp() * (-logprob.detach().mean() - target_entropy)


def clipped_step(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float,
) -> Tensor:
    """Takes a step of `parameters` alone down the mean loss of all processes; collective.

    Args:
        accelerator: of this process.
        optimizer: has these parameters, and perhaps others.
        loss: scalar, this process's.
        parameters: what is moved.
        max_grad_norm: norm to which the mean gradient is clipped.

    Returns:
        The gradient's norm before it was clipped, a scalar. A step whose gradient is not finite is
        not taken.
    """
    gradients = torch.autograd.grad(loss, parameters)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = over_processes(accelerator, flat, "mean")
    norm = flat.norm()
    if not torch.isfinite(norm):
        return norm
    flat = flat * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter, gradient in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def polyak_update(targets: nn.Module, source: nn.Module, part: float) -> None:
    """Moves the parameters of `targets` towards those of `source` by `part` of the way."""
    pairs = zip(targets.parameters(), source.parameters(), strict=True)
    for target, parameter in pairs:
        target.lerp_(parameter, part)


def of_all_processes(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Returns values [K, N, ...] of all processes' environments as rows [K * all N, ...]."""
    gathered = cast(Tensor, accelerator.gather(values.transpose(0, 1).contiguous()))
    return gathered.transpose(0, 1).flatten(0, 1)


def main(
    args: Args,
    make_agent: Callable[..., Any] | None = None,
    make_envs: Callable[..., Any] = make_envs,
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else. An agent is a module
    with the methods of `gr00t_agent.protocol.SteerableAgent`, where the shape of every argument and
    result is said. With --compile it has `compile_network` too. Checkpoints do not name the policy
    that is steered if `make_agent` is given, since `model` does not say which it is.
    """
    check_args(args)
    accelerator = make_accelerator(args.log_with, args.output_dir)
    if accelerator.is_fsdp2:
        raise ValueError(
            "DSRL does not run under FSDP: the policy is frozen and what is trained is small; "
            "launch with DDP (accelerate launch --multi_gpu)"
        )
    device, num_processes = accelerator.device, accelerator.num_processes
    is_main = accelerator.is_main_process
    num_envs = share_of_process(args, "num_envs", num_processes)
    minibatch_share = share_of_process(args, "minibatch_size", num_processes)
    is_own_agent = make_agent is not None
    if is_main and not is_own_agent:
        tell_start(args)
    run, checkpoint = open_run(args, accelerator, num_iterations=args.num_iterations)

    # Environments are numbered over all processes. Every process draws the whole of a minibatch
    # from the same decisions and computes its own part of it.
    env_ids = accelerator.process_index * num_envs + np.arange(num_envs)
    mine = slice(
        accelerator.process_index * minibatch_share,
        (accelerator.process_index + 1) * minibatch_share,
    )

    longest_episode = args.horizon or horizon(args.suite)
    horizon_decisions = -(-longest_episode // args.num_action_chunks)  # rounded up

    # --- the frozen agent ---
    set_seed(args.seed)  # the same weights on every process
    agent = load_agent(args) if make_agent is None else make_agent(args)
    agent = agent.to(device).eval().requires_grad_(False)
    check_agent_takes(agent, args)
    origin = origin_of(accelerator, agent)
    if args.compile:
        agent.compile_network()
    base = BasePolicy.of(args) if is_main and not is_own_agent else None

    # --- what steers it, and the optimiser ---
    num_chunk_steps, padded_dim = agent.noise_shape
    space = NoiseSpace(
        num_steps=num_chunk_steps,
        num_executed=args.num_action_chunks,
        padded_dim=padded_dim,
        action_dim=agent.action_dim,
        form=args.noise_form,
        bound=args.noise_bound,
    )
    target_entropy = args.target_entropy
    if target_entropy is None:
        target_entropy = -space.dim / 2

    networks = Networks(args, space, agent.value_feature_dim).to(device)
    actor, critics = networks.actor, networks.critics
    targets = copy.deepcopy(critics).requires_grad_(False)
    optimizer = torch.optim.Adam(networks.param_groups(args))
    actor_parameters = [*actor.parameters(), networks.log_alpha]
    critic_parameters = [*critics.parameters()]
    steered = SteeredAgent(agent, actor, args.model)
    set_seed(args.seed, device_specific=True)

    # --- observations: seen by the agent once a decision, and kept as features ---
    @torch.no_grad()
    def encode(obs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the agent's encoding, and features [B, F] in float32."""
        with accelerator.autocast():
            encoded = agent.encode(obs)
            return encoded, agent.value_features(encoded)

    replay = Replay(args.replay_capacity)
    replay_dtype = getattr(torch, args.replay_dtype)
    recorder = RolloutRecorder(
        run.path / "videos",
        num_envs=4,
        interval=args.video_interval if is_main else 0,
        fps=CONTROL_FREQUENCY_HZ / args.num_action_chunks,
    )

    def make_stage(num_envs: int) -> gym.vector.VectorEnv:
        return make_envs(args, num_envs, agent.image_size)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_envs(args, num_envs, agent.image_size, AutoresetMode.DISABLED))

    def write_agent(folder: Path) -> None:
        save_noise_actor(folder, actor, base, trained_on(args.suite))

    def kept_tensors() -> dict[str, Mapping[str, Tensor]]:
        """Returns what belongs to a checkpoint besides weights and optimiser."""
        return {
            "targets": targets.state_dict(),
            "replay": replay.state(),
            "episodes": monitor.state_dict(),
        }

    metrics: dict[str, float] = {}
    with (
        StopSignal(accelerator) as stop,
        EnvStages(
            make_stage,
            env_ids,
            num_stages=args.pipeline_stage_num,
            timeout_s=args.env_timeout_s,
        ) as stages,
        run.dumps_failed_actions(stages),
        Checkpoints(
            run,
            accelerator,
            networks,
            optimizer,
            keep_last=args.keep_last,
            keep_best=args.keep_best,
            origin=origin,
            write_agent=write_agent,
        ) as checkpoints,
        Monitor(
            accelerator,
            stages,
            decisions=args.num_steps,
            updates=[args.num_updates] * args.num_iterations,
            longest_episode=horizon_decisions,
            num_action_chunks=args.num_action_chunks,
            recorder=recorder,
        ) as monitor,
    ):
        num_trained = sum(p.numel() for p in networks.parameters())
        num_of_actor = sum(p.numel() for p in actor.parameters())
        monitor.print(
            f"{num_trained:,} parameters are trained, {num_of_actor:,} of them the actor's, on "
            f"{agent.value_feature_dim} features; a decision has {space.dim} numbers"
        )

        # --- start, or go on where a checkpoint was taken ---
        done, global_step = 0, 0
        env_states = None
        if checkpoint is not None:
            restored = checkpoints.restore(checkpoint)
            done, global_step = restored.iteration, restored.global_step
            env_states = restored.env_states
            targets.load_state_dict(restored.tensors["targets"])
            replay.load_state(restored.tensors["replay"], device)
            if env_states is not None:
                monitor.load_state_dict(restored.tensors["episodes"])
            elif is_main:
                print(f"{checkpoint} holds no environment states: new episodes begin")
            if args.evaluates(done) and not evaluation_file(run.path, done).is_file() and is_main:
                print(missing_evaluation(checkpoint, args))
        for stage in stages:
            if env_states is None:
                key = (args.seed, EPISODES, done)
                stage.reset([seed_of(*key, int(env_id)) for env_id in stage.env_ids])
            else:
                stage.restore(env_states)
        next_obs = [encode(stage.obs) for stage in stages]
        checkpoints.take(done, global_step, stages.states(), kept_tensors())
        monitor.start(done)

        for iteration in range(done + 1, args.num_iterations + 1):
            # --- rollout: one stage of environments simulates while another is decided ---
            monitor.begin_rollout(iteration)
            shape = (args.num_steps, num_envs)
            features = torch.zeros((*shape, agent.value_feature_dim), device=device)
            next_features = torch.zeros_like(features)
            decisions = torch.zeros((*shape, space.dim), device=device)
            rewards = torch.zeros(shape)
            terminal = torch.zeros(shape, dtype=torch.bool)

            for step in range(args.num_steps + 1):
                for i, stage in enumerate(stages):
                    if step > 0:  # what the decision before has led to
                        outcome = stage.receive()
                        next_obs[i] = encode(outcome.obs)
                        next_features[step - 1, stage.rows] = next_obs[i][1]

                        # A truncated episode goes on in the value of its own last observation.
                        is_cut = outcome.truncated & ~outcome.terminated
                        cut = np.flatnonzero(is_cut)
                        if args.truncation == "bootstrap" and len(cut):
                            cut_obs = index(outcome.infos["final_obs"], cut)
                            at = torch.from_numpy(stage.offset + cut).to(device)
                            next_features[step - 1, at] = encode(cut_obs)[1]

                        is_terminal = outcome.terminated
                        if args.truncation == "failure":  # nothing is left of a late episode
                            is_terminal = outcome.terminated | is_cut
                        terminal[step - 1, stage.rows] = torch.from_numpy(is_terminal)
                        rewards[step - 1, stage.rows] = torch.from_numpy(outcome.reward).float()
                        monitor.add_step(stage, outcome)

                    if step < args.num_steps:  # the next decision
                        stop.check()
                        key = (args.seed, NOISE, iteration, step)
                        generators = generators_of(key, stage.env_ids)
                        normal, eps = (x.to(device) for x in space.draw(generators))
                        encoded, seen = next_obs[i]
                        with torch.no_grad():
                            if args.is_warmup(iteration):
                                decision = space.of_base_policy(normal)
                            else:
                                decision, _ = actor.sample(actor.standardise(seen), eps)
                            with accelerator.autocast():
                                noise = space.chunk_noise(decision, normal)
                                action = agent.predict(encoded, noise=noise)
                        env_action = action.cpu().numpy()
                        run.check_actions(env_action, iteration, decision=decision, features=seen)
                        stage.send(env_action)

                        features[step, stage.rows] = seen
                        decisions[step, stage.rows] = decision
                if step > 0:
                    monitor.end_decision()

            stop.check_together()

            # --- replay: the decisions [K * N] of all processes, step by step ---
            checkpoints.begin_update()
            monitor.begin_update()
            rewards, terminal = rewards.to(device), terminal.to(device)
            rewards = args.reward_scale * rewards + args.reward_shift
            replay.add(
                Transitions(
                    features=of_all_processes(accelerator, features.to(replay_dtype)),
                    decision=of_all_processes(accelerator, decisions),
                    reward=of_all_processes(accelerator, rewards),
                    next_features=of_all_processes(accelerator, next_features.to(replay_dtype)),
                    terminal=of_all_processes(accelerator, terminal),
                )
            )
            if iteration == args.warmup_iterations:
                seen_so_far = replay.filled().features.double()
                std, mean = torch.std_mean(seen_so_far, dim=0, correction=0)
                actor.set_statistics(mean, std)

            # --- update ---
            history: list[dict[str, Tensor]] = []  # means of each update
            for update in range(args.num_updates if args.has_update(iteration) else 0):
                key = (args.seed, MINIBATCHES, iteration, update)
                inds = np.random.default_rng(key).integers(replay.size, size=args.minibatch_size)
                batch = replay.get(torch.from_numpy(inds[mine]).to(device))
                generator = torch.Generator()
                generator.manual_seed(seed_of(args.seed, UPDATES, iteration, update))
                eps = torch.randn((2, args.minibatch_size, space.dim), generator=generator)
                next_eps, eps = eps[:, mine].to(device)  # [M, d] each

                z, next_z = (
                    actor.standardise(batch.features),
                    actor.standardise(batch.next_features),
                )
                alpha = networks.log_alpha.detach().exp()

                # The critics, towards their targets.
                with torch.no_grad():
                    next_decision, next_logprob = actor.sample(next_z, next_eps)
                    next_values = ensemble_value(
                        targets(next_z, next_decision), args.critic_reduction
                    )
                    if args.backup_entropy:
                        next_values = next_values - alpha * next_logprob
                    if args.value_bounds is not None:
                        next_values = next_values.clamp(*args.value_bounds)
                    target = td_target(batch.reward, next_values, batch.terminal, args.gamma)

                values = critics(z, batch.decision)  # [E, M]
                q_loss = critic_loss(values, target)
                critic_norm = clipped_step(
                    accelerator, optimizer, q_loss, critic_parameters, args.max_grad_norm
                )
                dump = dict(batch._asdict(), loss=q_loss, values=values, target=target)
                run.check_finite(critic_norm, iteration, [dump])

                # The actor, towards what the critics value, and the temperature.
                decision, logprob = actor.sample(z, eps)
                decided_values = ensemble_value(critics(z, decision), args.critic_reduction)
                pi_loss = actor_loss(logprob, decided_values, alpha)
                alpha_loss = temperature_loss(networks.log_alpha, logprob, target_entropy)
                actor_norm = clipped_step(
                    accelerator,
                    optimizer,
                    pi_loss + alpha_loss,
                    actor_parameters,
                    args.max_grad_norm,
                )
                dump |= dict(loss=pi_loss, logprob=logprob, decided_values=decided_values)
                run.check_finite(actor_norm, iteration, [dump])

                polyak_update(targets, critics, args.polyak)
                monitor.end_minibatch()

                terms = {
                    "actor/loss": pi_loss,
                    "actor/entropy": -logprob,
                    "actor/noise_magnitude": decision.abs(),
                    "critic/loss": q_loss,
                    "critic/value": values,
                    "critic/value_std": values.std(dim=0, correction=0),
                    "critic/target": target,
                    "actor/alpha": alpha,
                }
                means = {name: x.detach().mean() for name, x in terms.items()}
                norms = {"actor/grad_norm": actor_norm, "critic/grad_norm": critic_norm}
                history.append(means | norms)

            # --- log, evaluate, save ---
            global_step += monitor.end_update()
            rewards_mean, _ = mean_and_variance(accelerator, rewards)
            magnitude_mean, _ = mean_and_variance(accelerator, decisions.abs())
            metrics = {}
            if history:
                means = cast(dict[str, Tensor], accelerator.reduce(mean_of(history), "mean"))
                metrics = {name: x.item() for name, x in means.items()}
                metrics["actor/lr"] = args.learning_rate
            metrics |= {
                "actor/num_updates": float(len(history)),
                "rollout/rewards_mean": rewards_mean.item(),
                "rollout/noise_magnitude": magnitude_mean.item(),
                "rollout/replay_size": float(replay.size),
            }
            metrics |= monitor.metrics()
            checkpoints.take(iteration, global_step, stages.states(), kept_tensors())

            try:
                if args.evaluates(iteration):
                    monitor.print("evaluating")
                    with torch.no_grad(), accelerator.autocast():
                        metrics["eval/success_once"] = for_all(
                            accelerator,
                            evaluate_into,
                            run.path,
                            iteration,
                            steered,
                            make_eval_envs,
                            args,
                        )
            finally:  # also if a request to stop ends the evaluation
                run.log(metrics, global_step, iteration)
            if args.saves(iteration):
                checkpoints.save(args.score(metrics))
            monitor.end_iteration(metrics)

    run.finish()
    if is_main:
        summary = run.summary(
            f"iteration_{args.num_iterations}",
            args.suite,
            is_whole_policy=False,
        )
        print(summary)
    return metrics


if ARGS is not None:
    launch(main, ARGS)
