"""PPO for a flow-matching vision-language-action policy on LIBERO.

One decision is one chunk: the agent denoises an action chunk, the environment executes its first C
actions, and the decision's log-probability is that of the one noised denoising step, summed over
the executed actions (the policy is the Gaussian of that step; see `gr00t_agent.sampler`). On
decisions this is PPO as published (Schulman et al. 2017, arXiv:1707.06347):

    delta_k = R_k + gamma * V(s_{k+1}) * (1 - terminal_k) - V(s_k)
    A_k     = delta_k + gamma * lambda * (1 - episode_end_k) * A_{k+1}
    L       = -E[min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)]
              + vf_coef * L_V - ent_coef * H + kl_coef * KL + imitation_coef * L_I

with L_V the larger of the Huber losses of the value and the clipped value, dual clipping for A < 0
on request (Ye et al. 2020, arXiv:1912.09729), H the entropy of the noised step in closed form, and
KL that from the policy training started from, by the estimator r' - 1 - log r' with r' = start
policy / policy on the rollout's actions ("k3", as in GRPO). L_I is self-imitation: flow matching's
error on the chunks of episodes that ended in success within the rollout, for which any noise, not
only the one drawn, is led to what succeeded. In the first `imitation_iterations` nothing but L_V
and L_I is trained. A truncated episode bootstraps from the value of its own last observation (or
counts as a failure, see `truncation`), a terminated one from zero, and no advantage crosses an
episode's end. E is the mean over decisions, or over trajectories, of all processes. With
`update_fraction` below 1 it is over those decisions of each group of environments whose |A| is
largest; advantages and their normalisation are still of all.

Launch:
    accelerate launch algorithms/ppo_gr00t.py --preset libero_spatial_nano
    accelerate launch --multi_gpu algorithms/ppo_gr00t.py --preset libero_spatial_rlinf
    accelerate launch algorithms/ppo_gr00t.py --preset libero_spatial_nano --resume auto
All sizes are global: they are divided over the processes, and a size that does not divide is an
error. Every draw is keyed by seed, iteration, decision and environment, and every minibatch takes
equally many decisions from each group of environments: the result does not depend on the number of
processes or stages, and a resumed run is the same run.

What differs from RLinf's recipe for the same model: one denoising step is noised per sample instead
of per batch; log-probabilities are fp32; an episode that ends makes room for the next; minibatches
are reshuffled every epoch; a number that is not finite stops the run.

Metrics: `actor/*` and `rollout/*` are means over an iteration's minibatches or decisions, `env/*`
over a cohort: the episodes that began in one iteration, as soon as all of them must have ended
(`env/success_once`: success at any step of the episode). `time/env_s` is spent stepping,
`time/env_wait_s` is the part of it that decisions did not overlap, `time/policy_s` the rest of the
rollout, and `charts/SPS` environment steps per second of the whole loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from algorithms.common import presets
from algorithms.common.args import (
    STATE_MODEL,
    LoraPart,
    check_agent_options,
    check_agent_takes,
    check_critic_warmup,
    check_folders,
    check_imitation,
    check_near_goal,
    check_physics,
    check_ranges,
    check_schedule,
    check_sizes,
    check_stages,
    check_state_model,
    check_value_bounds,
    exact_quotient,
    kept_minibatches,
    share_of_process,
)
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import check_starts, jobs_in_training


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it. Sizes are over all processes."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "ppo_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    resume: Path | None = None
    """Run folder (or its newest checkpoint) to go on with, or `auto`: the newest run of this name
    that has a checkpoint, else a new one. Give the same arguments as before."""
    seed: int = 1
    """Seed of the environments, the agent's initial weights and every random draw."""
    num_iterations: int = 400
    """Rollout-and-update rounds; schedules run over them."""
    dry_run: bool = False
    """Print sizes, memory and the time to the end, by one decision and one gradient, and end."""

    # --- environment ---
    suite: str = "libero_spatial"
    """LIBERO suite; `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to train on, each drawn as often as it is named; all of the suite if not given."""
    task_sampling: Literal["uniform", "adaptive"] = "uniform"
    """`adaptive` plays most the tasks that succeed about half of the time, and solved and hopeless
    ones now and then."""
    num_envs: int = 64
    """Parallel environments over all processes."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes (C)."""
    horizon: int | None = None
    """Environment steps before truncation; the suite's own if not given."""
    steps_before_success: tuple[int, ...] = ()
    """Begin episodes near their end, a reverse curriculum: where a scripted expert stands so many
    environment steps before it succeeds, each number in turn (`libero_gym.near_goal`). The tasks'
    own initial states if not given. Evaluations in training begin there too."""
    num_near_goal_states: int = 4
    """Initial states of a task from which experts run for steps_before_success, the first ones."""
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

    # --- agent ---
    model: str = "nano"
    """A preset's name (`nano`, `gr00t_n1d5`: random weights), the folder or hub id of a checkpoint,
    or `state`: a small network on the robot's state that learns in minutes on a CPU."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    noise_method: Literal["flow_sde", "flow_cps", "reinflow", "reinflow_joint"] = "flow_sde"
    """How the denoising chain is made stochastic for exploration."""
    noise_level: float = 0.5
    """Strength of the exploration noise (flow_sde and flow_cps)."""
    ignore_last: bool = False
    """Never noise the last denoising step (flow_sde): the network then still denoises all noise,
    and what is executed carries no fresh one."""
    final_noise: float = 1.0
    """Part of the exploration noise that is left at the end of training; it falls linearly from
    1."""
    logprob_level: Literal["chunk", "action", "token"] = "chunk"
    """What has one ratio to clip: the whole chunk (log-probabilities summed over C steps and their
    dimensions), each of its actions (summed over dimensions), or each dimension of each action."""
    joint_logprob: bool = False
    """Noise at every denoising step, and one log-probability of the whole chain; otherwise one step
    of each chain is noised and scored. With reinflow's noise and ent_coef 0.005 this is pi_RL's
    Flow-Noise."""
    critic_detach: bool = True
    """Keep the value loss's gradient out of the policy's trunk."""
    train_backbone: bool = False
    """Train the vision tower and the language model too; otherwise their features are computed once
    a decision."""
    train_vl_self_attention: bool = True
    """Train the VL self-attention, through which the action head reads those features. If not, it is
    computed once a decision, too: at the released size most of an update's work."""
    lora_rank: int = 0
    """Inner width of low-rank adapters, which are trained in place of the attention layers of
    lora_parts; 0 for none."""
    lora_alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    lora_parts: tuple[LoraPart, ...] = ("action_head",)
    """What gets adapters; all but action_head needs train_backbone."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrix products; the checkpoint's own if not given. Trained weights and
    log-probabilities are float32."""
    tf32: bool = False
    """Multiply float32 matrices by a GPU's TensorFloat-32 units: much faster, with 10 bits of their
    factors' fractions instead of 23."""
    compile: bool = False
    """Compile the network with torch.compile; the first iterations then take minutes longer."""

    # --- rollout and advantages ---
    num_steps: int = 48
    """Decisions per environment and iteration; 48 chunks of 5 steps are one LIBERO-Spatial
    horizon."""
    feature_storage: Literal["device", "host", "mixed", "none"] = "mixed"
    """Where encoded observations wait for the update. `device`, `host`: up to feature_memory_gb
    there, the rest is encoded anew in every epoch. `mixed`: up to feature_memory_gb on the device,
    the rest in host memory. `none`: all encoded anew."""
    feature_memory_gb: float = 16.0
    """Memory of a process for encoded observations, 10^9 bytes."""
    reward_scale: float = 1.0
    """Factor on rewards before advantages are computed."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    truncation: Literal["bootstrap", "failure"] = "bootstrap"
    """An episode cut at the horizon has the value of its last observation left, or 0: being late is
    a failure."""
    value_bounds: tuple[float, float] | None = None
    """Range of possible returns (0 and reward_scale where success ends an episode). Advantages see
    values clipped to it, so that an overestimate cannot feed itself."""
    norm_adv: bool = True
    """Normalise advantages over the iteration's decisions of all processes."""
    center_adv_by_task: bool = False
    """Subtract each task's own mean from its advantages. While the critic cannot tell tasks apart
    yet, every decision of one that often fails looks bad, and what succeeds there now and then would
    be forgotten."""

    # --- optimisation ---
    learning_rate: float = 5e-6
    """AdamW's step size for the policy."""
    value_learning_rate: float = 1e-4
    """AdamW's step size for the value head."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    adam_eps: float = 1e-8
    """AdamW's epsilon: gradients much smaller than it take smaller steps."""
    lr_schedule: Literal["constant", "linear", "adaptive"] = "constant"
    """Keep the step sizes, or let them fall to 0 over training, or let the policy's follow
    target_kl: 1.5 times smaller after an update that ended above it, 1.5 times larger after one
    that ended below half of it, up to 10 times either way."""
    lr_hold: float = 0.0
    """Part of training, in [0, 1), that keeps the step sizes before a linear schedule lets them
    fall."""
    target_kl: float | None = None
    """End an iteration's update when a minibatch's approximate KL from the rollout's policy exceeds
    this."""
    critic_warmup_iterations: int = 0
    """First iterations (after imitation_iterations), in which only the value head moves. The
    policy's gradients already enter AdamW's moments, so that its first real step is no larger than
    the next ones."""
    policy_warmup_iterations: int = 0
    """Iterations after those over which the policy's step size rises from 0, update by update: while
    weights rest, gradients agree with each other, and AdamW's first steps all go the same way. An
    adaptive step size follows only after them."""
    update_epochs: int = 4
    """Passes over each iteration's decisions."""
    update_fraction: float = 1.0
    """Part of each iteration's decisions, in (0, 1], that its update uses, and of the time that it
    takes: those whose advantages, as they enter the loss, are largest in absolute value. It has to
    leave whole minibatches. From the others the critic learns nothing either, and imitation_coef
    imitates none of them; iterations of imitation alone use all."""
    minibatch_size: int = 1024
    """Decisions per optimiser step over all processes."""
    micro_batch_size: int = 1024
    """Decisions per forward pass over all processes at most; smaller ones accumulate gradients."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""

    # --- loss ---
    loss_weighting: Literal["decision", "trajectory"] = "decision"
    """All decisions weigh the same, or all episodes do, as in RLinf: a decision's weight is one over
    the decisions of its whole episode."""
    clip_coef: float = 0.2
    """Lower clip of the ratio: 1 - clip_coef."""
    clip_coef_high: float = 0.2
    """Upper clip of the ratio: 1 + clip_coef_high."""
    dual_clip: float | None = None
    """Bound on ratio * |A| for A < 0 (usually 3); off if not given."""
    value_clip: float = 0.2
    """Clip of the value's change within an iteration."""
    huber_delta: float = 10.0
    """Where the value loss turns from quadratic to linear."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (closed form, in nats); the noise of reinflow alone can follow
    it. With logprob_level `chunk` the bonus is the entropy of the whole decision, with `action` and
    `token` the mean over its executed actions or over their elements."""
    imitation_coef: float = 0.0
    """Weight of flow matching on what the rollout's successful episodes did (self-imitation). A
    policy whose mean moves by it needs a smaller step size than PPO alone would bear. Only decisions
    whose episode ends within the rollout are imitated: give num_steps a horizon, or the beginnings
    of long episodes are never among them."""
    imitation_iterations: int = 0
    """First iterations, in which the policy learns by imitation alone, and the critic, if there is
    one, its values: a policy that few demonstrations have left half-trained gains most from what it
    does right already. target_kl ends none of their updates, and an adaptive step size follows only
    after them. Needs imitation_coef."""
    imitation_learning_rate: float = 2e-4
    """AdamW's step size for the policy in them, on which lr_schedule acts too: reached within their
    first tenth, from where it falls linearly to learning_rate."""
    imitation_epochs: int = 10
    """Passes over the decisions of each of them, in place of update_epochs."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy training started from; 0 keeps no copy of it."""
    max_ratio_deviation: float = 0.05
    """Stop if the first minibatch's ratio differs from 1 by more: old and new log-probabilities
    disagree."""

    # --- evaluation and saving ---
    eval_interval: int = 0
    """Iterations between evaluations; 0 evaluates only after the last."""
    eval_before: bool = False
    """Evaluate before training too, on the same episodes, and film both side by side."""
    eval_episodes_per_task: int = 50
    """Stored initial states evaluated per task (50 are stored); 0 skips evaluation."""
    eval_videos_per_task: int = 1
    """Episodes per task, from the first on, that an evaluation films."""
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

    @property
    def num_minibatches(self) -> int:
        """Minibatches of all decisions."""
        return exact_quotient(self, "num_decisions", "minibatch_size")

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimiser step."""
        return exact_quotient(self, "minibatch_size", "micro_batch_size")

    @property
    def num_warmup_iterations(self) -> int:
        """Iterations before the policy learns by PPO at its whole step size."""
        return (
            self.imitation_iterations
            + self.critic_warmup_iterations
            + self.policy_warmup_iterations
        )

    def only_imitates(self, iteration: int) -> bool:
        """Returns whether the policy learns by imitation alone in `iteration`."""
        return iteration <= self.imitation_iterations

    def num_epochs(self, iteration: int) -> int:
        """Returns the passes over the decisions of `iteration`."""
        return self.imitation_epochs if self.only_imitates(iteration) else self.update_epochs

    def num_epoch_minibatches(self, iteration: int) -> int:
        """Returns the minibatches of an epoch of `iteration`, of the decisions that it uses."""
        return self.num_minibatches if self.only_imitates(iteration) else kept_minibatches(self)

    def num_updates(self, iteration: int) -> int:
        """Returns the optimiser steps of `iteration`, unless target_kl ends them."""
        return self.num_epochs(iteration) * self.num_epoch_minibatches(iteration)

    def evaluates(self, iteration: int) -> bool:
        """Returns whether the policy is evaluated after `iteration`."""
        is_last = iteration == self.num_iterations
        is_due = self.eval_interval > 0 and iteration % self.eval_interval == 0
        return (is_last or is_due) and self.eval_episodes_per_task > 0

    def saves(self, iteration: int) -> bool:
        """Returns whether a checkpoint is saved after `iteration`."""
        is_last = iteration == self.num_iterations
        is_due = self.save_interval > 0 and iteration % self.save_interval == 0
        return is_last or is_due or (self.keep_best > 0 and self.evaluates(iteration))

    def policy_step_factor(self, iterations_updated: float) -> float:
        """Returns what the policy's step size is multiplied by after so many iterations' updates.

        While the policy only imitates it rises to `imitation_learning_rate` and falls to 1; then it
        is 0 while only the critic learns, and rises to 1 again.
        """
        if iterations_updated <= self.imitation_iterations:
            largest = self.imitation_learning_rate / self.learning_rate
            return imitation_step_factor(iterations_updated / self.imitation_iterations, largest)
        since = iterations_updated - self.imitation_iterations - self.critic_warmup_iterations
        if self.policy_warmup_iterations == 0:
            return float(since > 0)
        return min(max(since / self.policy_warmup_iterations, 0.0), 1.0)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Returns what the best checkpoints are chosen by; None where none was evaluated.

        Not the success of the training's own episodes, which explore and are of earlier weights.
        """
        return metrics.get("eval/success_once")


PRESETS = {name: Args(**settings) for name, settings in presets.PPO.items()}


def check_args(args: Args) -> None:
    """Raises ValueError for arguments that would otherwise fail late."""
    check_ranges(args)
    check_value_bounds(args)
    check_critic_warmup(args)
    check_sizes(args, "num_envs", "micro_batch_size")
    check_stages(args)
    exact_quotient(args, "num_decisions", "minibatch_size")
    exact_quotient(args, "minibatch_size", "micro_batch_size")
    kept_minibatches(args)
    check_folders(args, STATE_MODEL)
    check_state_model(args)
    check_near_goal(args, PRESETS)
    check_starts(args)
    check_schedule(args.lr_schedule, args.target_kl, args.lr_hold)
    check_imitation(args)
    if args.eval_before and args.eval_episodes_per_task == 0:
        raise ValueError("eval_before needs episodes; give --eval-episodes-per-task at least 1")
    if args.eval_episodes_per_task > 0:
        jobs_in_training(args)
    check_physics(args, "libero_spatial_laptop")


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = (
    parse_args(Args, __doc__, PRESETS, check_args, lambda args: check_agent_options(args, PRESETS))
    if __name__ == "__main__"
    else None
)

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor, nn

from algorithms.common.batch import concatenate, index, mean_of
from algorithms.common.checkpoint_notes import note_suite, tell_start
from algorithms.common.dry_run import measure_run
from algorithms.common.episodes import played_tasks
from algorithms.common.evaluation import compare_evaluations, evaluate_into, evaluation_file
from algorithms.common.features import FeatureStore
from algorithms.common.frozen import StartPolicy, origin_of, store_frozen_as
from algorithms.common.lora import LoraSettings, add_lora, save_merged
from algorithms.common.monitor import Monitor
from algorithms.common.processes import (
    clip_grad_norm,
    explained_variance,
    for_all,
    group_means,
    make_accelerator,
    mean_and_variance,
    over_processes,
    prepare,
)
from algorithms.common.randomness import (
    EPISODES,
    FLOW,
    MINIBATCHES,
    NOISE,
    flow_draws,
    generators_of,
    seed_of,
    stratified_minibatches,
)
from algorithms.common.resume import Checkpoints, StopSignal, missing_evaluation, open_run
from algorithms.common.stages import EnvStages, EnvStep
from algorithms.common.state_agent import StateFlowAgent
from algorithms.common.step_sizes import StepSizes, imitation_step_factor
from algorithms.common.task_sampling import TaskSampler
from algorithms.common.video import CONTROL_FREQUENCY_HZ, RolloutRecorder
from gr00t_agent import Gr00tAgent
from libero_gym import horizon
from libero_gym.adapters import ModalityVectorObservation, load_modality
from libero_gym.near_goal import NearGoalVectorEnv


def make_envs(
    args: Args,
    num_envs: int,
    image_size: int,
    autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments whose observations carry GR00T's modality keys.

    `image_size` 0 observes no images.
    """
    options: dict[str, Any] = dict(
        task_ids=args.task_ids,
        num_action_chunks=args.num_action_chunks,
        horizon=args.horizon,
        reward=args.reward,
        renderer=args.renderer,
        autoreset_mode=autoreset_mode,
    )
    options |= dict(image_size=image_size) if image_size else dict(observe_images=False)
    if args.physics == "warp":
        # Images stay on the GPU, where the agent wants them.
        options |= dict(physics="warp", images_as_torch=bool(image_size))
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
    if args.steps_before_success:
        envs = NearGoalVectorEnv(
            envs,
            steps_before_success=args.steps_before_success,
            num_init_states=args.num_near_goal_states,
        )
    modality = load_modality()
    return ModalityVectorObservation(envs, modality if image_size else replace(modality, video={}))


def load_agent(args: Args) -> Gr00tAgent | StateFlowAgent:
    """Returns the agent that `args` ask for, on the CPU."""
    check_agent_options(args, PRESETS)
    if args.model == STATE_MODEL:
        return StateFlowAgent.from_args(args)
    agent = Gr00tAgent.load(
        args.model,
        num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps,
        noise_method=args.noise_method,
        noise_level=args.noise_level,
        joint_logprob=args.joint_logprob,
        ignore_last=args.ignore_last,
        # Chunks are summed up here, where it is known which of their actions were executed.
        logprob_level="token" if args.logprob_level == "token" else "action",
        critic_detach=args.critic_detach,
        train_backbone=args.train_backbone,
        train_vl_self_attention=args.train_vl_self_attention,
        compute_dtype=args.compute_dtype,
    )
    if args.lora_rank:
        # Without dropout: a log-probability has to be a function of its arguments.
        settings = LoraSettings(
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=0.0,
            parts=args.lora_parts,
        )
        add_lora(agent, settings)
    return store_frozen_as(agent, agent.policy.torch_dtype)


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What each decision [K, N] of a rollout has led to.

    Attributes:
        rewards: float32.
        terminal: bool, True where nothing follows that is worth anything: no bootstrap.
        succeeded: bool, True where the episode ended in success.
        ended: bool, True where the episode ended (terminated or truncated).
        executed_steps: int64, actions of the chunk that were executed.
        episode_lengths: int64, environment steps of the episode that ended there, else 0.
        task_ids: int64, task of the episode; 0 without center_adv_by_task.
    """

    rewards: Tensor
    terminal: Tensor
    succeeded: Tensor
    ended: Tensor
    executed_steps: Tensor
    episode_lengths: Tensor
    task_ids: Tensor

    @classmethod
    def zeros(cls, num_steps: int, num_envs: int) -> Outcomes:
        """Returns room for a rollout, on the CPU."""
        shape = (num_steps, num_envs)
        return cls(
            rewards=torch.zeros(shape),
            terminal=torch.zeros(shape, dtype=torch.bool),
            succeeded=torch.zeros(shape, dtype=torch.bool),
            ended=torch.zeros(shape, dtype=torch.bool),
            executed_steps=torch.zeros(shape, dtype=torch.long),
            episode_lengths=torch.zeros(shape, dtype=torch.long),
            task_ids=torch.zeros(shape, dtype=torch.long),
        )

    def put(self, step: int, rows: slice, outcome: EnvStep, args: Args) -> None:
        """Enters what decision `step` of the environments `rows` has led to."""
        is_end = outcome.terminated | outcome.truncated
        is_terminal = outcome.terminated
        if args.truncation == "failure":  # nothing is left of a late episode
            is_terminal = is_end
        self.rewards[step, rows] = torch.from_numpy(outcome.reward).float()
        self.terminal[step, rows] = torch.from_numpy(is_terminal)
        self.succeeded[step, rows] = torch.from_numpy(outcome.terminated)
        self.ended[step, rows] = torch.from_numpy(is_end)
        self.executed_steps[step, rows] = torch.from_numpy(outcome.infos["num_steps"])
        if args.center_adv_by_task:
            self.task_ids[step, rows] = torch.from_numpy(played_tasks(outcome.infos, is_end))
        if is_end.any():
            lengths = outcome.infos["final_info"]["episode_length"]
            self.episode_lengths[step, rows] = torch.from_numpy(lengths)

    def to(self, device: torch.device) -> Outcomes:
        """Returns the same on a device."""
        return Outcomes(**{name: values.to(device) for name, values in vars(self).items()})


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminal: Tensor,
    ended: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns, each [K, N], of K decisions in N environments.

    Args:
        rewards: [K, N] reward of each decision.
        values: [K, N] value of the observation that each decision saw.
        next_values: [K, N] value of the observation that each decision led to, before any reset: at
            an episode's end that of its own last observation.
        terminal: [K, N] bool, True where nothing follows that is worth anything: no bootstrap.
        ended: [K, N] bool, True where the episode ended (terminated or truncated).
        gamma: discount per decision.
        lam: lambda of GAE.
    """
    deltas = rewards + gamma * next_values * ~terminal - values
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[0])
    for k in reversed(range(len(rewards))):
        carried = deltas[k] + gamma * lam * ~ended[k] * carried
        advantages[k] = carried
    return advantages, advantages + values


def trajectory_weights(ended: Tensor, lengths: Tensor, horizon: int) -> Tensor:
    """Returns for each decision [K, N] one over the decisions of its whole episode.

    An episode that the rollout cuts weighs no more than its part: what came before the rollout is
    counted, and one that goes on after it is taken to last to the horizon.

    Args:
        ended: [K, N] bool, True where the episode ended.
        lengths: [K, N] decisions of the whole episode that ended there.
        horizon: decisions of the longest episode.
    """
    weights = torch.zeros(ended.shape, device=ended.device)
    length = torch.full(ended.shape[1:], horizon, device=ended.device)
    for k in reversed(range(len(ended))):
        length = torch.where(ended[k], lengths[k], length)
        weights[k] = 1 / length
    return weights


def won_decisions(ended: Tensor, success: Tensor) -> Tensor:
    """Returns 1 for each decision [K, N] of an episode that ends in success within the rollout, else 0.

    Args:
        ended: [K, N] bool, True where the episode ended.
        success: [K, N] bool, True where it ended in success.
    """
    won = torch.zeros(ended.shape, device=ended.device)
    carried = torch.zeros(ended.shape[1:], device=ended.device)
    for k in reversed(range(len(ended))):
        carried = torch.where(ended[k], success[k].float(), carried)
        won[k] = carried
    return won


def select_decisions(
    advantages: Tensor, groups: NDArray[np.integer], num_selected: int
) -> NDArray[np.intp]:
    """Returns in order the rows with the largest |advantages|, equally many of each group.

    Of equal ones the first are taken. What is no number comes before all: it is to stop the run.

    Probabilistic Chunk Masking (arXiv:2605.16154) updates GRPO by less than a fifth of the chunks,
    drawn from where successes and failures act differently, since all chunks of its trajectories
    have the same advantage. Here a critic tells them apart, and nothing is drawn.

    Args:
        advantages: [B].
        groups: [B] number of each row's group of environments; all groups have equally many rows.
        num_selected: rows of each group to return.
    """
    sizes = advantages.abs().nan_to_num(nan=math.inf, posinf=math.inf).cpu().numpy()
    largest_first = np.lexsort((-sizes, groups))  # group by group; equal ones stay in order
    by_group = largest_first.reshape(len(np.unique(groups)), -1)
    return np.sort(by_group[:, :num_selected], axis=None)


def policy_loss(
    logratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns the clipped surrogate loss of each element and a mask, True where clipping acts.

    `logratio` is [B], [B, C] or [B, C, a] for log-probabilities of chunks, actions or tokens;
    `advantages` are [B].
    """
    advantages = advantages.reshape(-1, *[1] * (logratio.ndim - 1))
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if dual_clip is not None:
        largest = torch.where(advantages < 0, -advantages * dual_clip, math.inf)
        is_clipped |= loss > largest
        loss = torch.minimum(loss, largest)
    return loss, is_clipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float, huber_delta: float
) -> tuple[Tensor, Tensor]:
    """Returns the clipped Huber loss of each value [B] and a mask, True where clipping acts."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain = nn.functional.huber_loss(values, returns, reduction="none", delta=huber_delta)
    clipped = nn.functional.huber_loss(clipped_values, returns, reduction="none", delta=huber_delta)
    # Within the clip both are the same but for rounding.
    is_clipped = (clipped > plain) & ((values - old_values).abs() > value_clip)
    return torch.maximum(plain, clipped), is_clipped


def k3_kl(logratio: Tensor) -> Tensor:
    """Returns r - 1 - log r of each element, the estimator "k3" of KL(p || q).

    Args:
        logratio: log r, with r = q / p at draws from p.
    """
    return logratio.exp() - 1 - logratio


def mask_unexecuted(elements: Tensor, executed: Tensor, level: str) -> Tensor:
    """Returns log-probabilities or entropies of the actions that were executed, at `level`.

    An episode that ends within a chunk leaves the chunk's last actions unexecuted. These had no
    consequence, and their elements are 0 here. Their noise can have had one: noise at any but the
    last denoising step reaches the executed actions through the steps after it. It is treated as
    the environment's, as RLinf treats the noise of a chunk's steps beyond the first C. So
    log-probabilities are those of the executed entries at the noised step, given all entries of
    the step before.

    Args:
        elements: [B, C] or [B, C, a]; [B] of an agent that scores whole chunks only stays.
        executed: [B, C] bool, True where an action was executed.
        level: "chunk" sums over all actions to [B], "action" and "token" keep the shape.

    Raises:
        ValueError: `elements` have another shape.
    """
    if elements.ndim == 1:
        return elements
    if elements.shape[:2] != executed.shape:
        num_rows, num_steps = executed.shape
        raise ValueError(
            f"the agent's log-probabilities or entropies have shape {list(elements.shape)}; make it "
            f"[{num_rows}], or [{num_rows}, {num_steps}] or [{num_rows}, {num_steps}, a] by step or element"
        )
    mask = executed.reshape(*executed.shape, *[1] * (elements.ndim - 2))
    elements = torch.where(mask, elements, 0.0)
    return elements.flatten(1).sum(dim=1) if level == "chunk" else elements


def mean_of_executed(elements: Tensor, executed: Tensor) -> Tensor:
    """Returns the mean of each decision's elements [B], [B, C] or [B, C, a] that count, [B]."""
    if elements.ndim == 1:
        return elements.float()
    mask = executed.reshape(*executed.shape, *[1] * (elements.ndim - 2)).expand_as(elements)
    total = torch.where(mask, elements.float(), 0.0).flatten(1).sum(dim=1)
    return total / mask.flatten(1).sum(dim=1).clamp(min=1)


def sum_per_decision(elements: Tensor) -> Tensor:
    """Returns the sum of each decision's elements [B, ...], [B]."""
    return elements.float().reshape(len(elements), -1).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the loss has to know of B decisions, besides what the policy now says of them.

    Attributes:
        executed: [B, C] bool, True where an action was executed.
        logprobs: log-probabilities of the rollout's policy, [B], [B, C] or [B, C, a] by
            `logprob_level`, 0 where not executed.
        start_logprobs: the same of the policy that training started from, 0 without kl_coef.
        values: [B] what the critic said before the update.
        advantages: [B].
        returns: [B].
        weights: [B] weights of the decisions, with mean 1.
        imitation_weights: [B] the same for imitation, 0 where nothing is imitated.
    """

    executed: Tensor
    logprobs: Tensor
    start_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    imitation_weights: Tensor

    def at(self, inds: NDArray[np.intp]) -> Batch:
        """Returns decisions `inds` [M] of these."""
        rows = torch.from_numpy(inds).to(self.weights.device)
        return Batch(**{name: values[rows] for name, values in vars(self).items()})


def ppo_loss(
    newlogprob: Tensor,
    entropy: Tensor,
    newvalue: Tensor,
    flow_error: Tensor | None,
    batch: Batch,
    args: Args,
    only_imitates: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns the loss of some decisions, a scalar, what is logged of them, and their log-ratios.

    Args:
        newlogprob: log-probabilities of all actions by the policy's present weights, [B], or
            [B, C] or [B, C, a] by step or element.
        entropy: of the same shape.
        newvalue: [B] what the critic now says.
        flow_error: [B, C, a] flow matching's error; None without imitation_coef.
        batch: the decisions.
        args: coefficients and clips.
        only_imitates: train the critic, and the policy by imitation alone.

    Returns:
        The loss; by name the terms that are logged, [B] each; and the log-ratios, 0 where an action
        was not executed. All but the loss have no gradient.
    """
    executed = batch.executed
    newlogprob = mask_unexecuted(newlogprob, executed, args.logprob_level)
    entropy = mask_unexecuted(entropy, executed, args.logprob_level)
    logratio = newlogprob - batch.logprobs

    pg_loss, pg_clipped = policy_loss(
        logratio,
        batch.advantages,
        args.clip_coef,
        args.clip_coef_high,
        args.dual_clip,
    )
    pg_loss = mean_of_executed(pg_loss, executed)
    pg_clipped = mean_of_executed(pg_clipped, executed)

    v_loss, v_clipped = value_loss(
        newvalue,
        batch.values,
        batch.returns,
        args.value_clip,
        args.huber_delta,
    )

    approx_kl = k3_kl(logratio)
    start_kl = torch.zeros_like(logratio)
    if args.kl_coef:
        start_kl = k3_kl(batch.start_logprobs - newlogprob)

    if only_imitates:
        # Learned noise stays in the graph, where DDP looks for all weights.
        loss = 0 * mean_of_executed(entropy, executed)
    else:
        # At every level these weigh against the policy loss alike.
        loss = pg_loss - args.ent_coef * mean_of_executed(entropy, executed)
        loss = loss + args.kl_coef * mean_of_executed(start_kl, executed)
    loss = loss + args.vf_coef * v_loss
    loss = (batch.weights * loss).mean()

    imitation_loss = torch.zeros_like(newvalue)
    if flow_error is not None:
        imitation_loss = batch.imitation_weights * mean_of_executed(flow_error, executed)
        loss = loss + args.imitation_coef * imitation_loss.mean()

    terms = {
        "actor/loss": pg_loss,
        "actor/value_loss": v_loss,
        "actor/imitation_loss": imitation_loss,
        "actor/entropy": sum_per_decision(entropy),
        "actor/reference_kl": sum_per_decision(start_kl),
        "actor/approx_kl": sum_per_decision(approx_kl),
        "actor/pg_clipfrac": pg_clipped,
        "actor/value_clip_ratio": v_clipped.float(),
    }
    return loss, {name: term.detach() for name, term in terms.items()}, logratio.detach()


def dry_run(
    args: Args,
    accelerator: Accelerator,
    make_agent: Callable[..., Any],
    make_envs: Callable[..., Any],
) -> dict[str, float]:
    """Prints the sizes of a run, and what memory and time it takes; nothing is trained or written."""
    updates = [args.num_updates(i) for i in range(1, args.num_iterations + 1)]
    return measure_run(
        args,
        accelerator,
        make_agent,
        make_envs,
        sizes={
            "environments": args.num_envs,
            "decisions of each": args.num_steps,
            "decisions of an iteration": args.num_decisions,
            "env-steps of an iteration": args.num_decisions * args.num_action_chunks,
            "minibatches of an epoch": args.num_epoch_minibatches(args.num_iterations),
            "iterations": args.num_iterations,
            "updates of all iterations": sum(updates),
        },
        decisions=args.num_decisions,
        passes=[num_updates / args.num_minibatches for num_updates in updates],
    )


def main(
    args: Args,
    make_agent: Callable[..., Any] | None = None,
    make_envs: Callable[..., Any] = make_envs,
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else. An agent is a module
    with the methods of `gr00t_agent.protocol.Agent`, where the shape of every argument and result
    is said, with what --compile, --final-noise and --imitation-coef ask of it besides;
    `gr00t_agent.check_agent` tries one out.
    """
    check_args(args)
    accelerator = make_accelerator(args.log_with, args.output_dir)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device, num_processes = accelerator.device, accelerator.num_processes
    is_main = accelerator.is_main_process
    if accelerator.is_fsdp2 and args.lora_rank:
        raise ValueError("FSDP cannot be used with lora_rank: merging adapters needs whole weights")
    num_envs = share_of_process(args, "num_envs", num_processes)
    share_of_process(args, "micro_batch_size", num_processes)
    num_micro_batches = args.num_micro_batches
    if make_agent is None:
        make_agent = load_agent
        if is_main:
            tell_start(args)
    if args.dry_run:
        return dry_run(args, accelerator, make_agent, make_envs)
    run, checkpoint = open_run(args, accelerator, num_iterations=args.num_iterations)

    # Environments are numbered over all processes. Each group of them gives every minibatch equally
    # many decisions, and lies on one process: so minibatches do not depend on the processes.
    env_ids = accelerator.process_index * num_envs + np.arange(num_envs)
    num_groups = math.gcd(args.num_envs, args.minibatch_size)
    b_groups = np.tile(env_ids // (args.num_envs // num_groups), args.num_steps)
    minibatch_share = args.minibatch_size // num_groups  # decisions of each group
    longest_episode = args.horizon or horizon(args.suite)
    horizon_decisions = -(-longest_episode // args.num_action_chunks)  # rounded up

    # --- agent and optimiser ---
    set_seed(args.seed)  # the same weights on every process
    agent = make_agent(args).to(device).eval()
    check_agent_takes(agent, args)
    note_suite(agent, args.suite)
    origin = origin_of(accelerator, agent, with_trained=bool(args.kl_coef))
    start_policy = None
    if args.kl_coef:
        start_policy = StartPolicy(agent, share_frozen=not accelerator.is_fsdp2)
    if args.compile:  # after the copy, which would go on computing with this network's weights
        agent.compile_network()

    param_groups = agent.param_groups(args.learning_rate, args.value_learning_rate)
    optimizer = torch.optim.AdamW(
        param_groups,
        betas=(0.9, 0.95),  # as RLinf
        eps=args.adam_eps,
        weight_decay=args.weight_decay,
    )
    model, optimizer = prepare(accelerator, agent, optimizer)
    step_sizes = StepSizes(optimizer, args.lr_schedule, args.target_kl, args.lr_hold)
    set_seed(args.seed, device_specific=True)

    # --- observations: encoded once a decision, and kept for all epochs ---
    @torch.no_grad()
    def encode(obs: dict[str, Any]) -> dict[str, Tensor]:
        with accelerator.autocast():
            return agent.encode(obs)

    store = FeatureStore(encode, device, args.feature_storage, args.feature_memory_gb)
    recorder = RolloutRecorder(
        run.path / "videos",
        num_envs=4,
        interval=args.video_interval if is_main else 0,
        fps=CONTROL_FREQUENCY_HZ / args.num_action_chunks,
    )

    def make_stage(num_envs: int) -> gym.vector.VectorEnv:
        observed_size = 0 if args.model == STATE_MODEL else agent.image_size
        return make_envs(args, num_envs, observed_size)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_envs(args, num_envs, agent.image_size, AutoresetMode.DISABLED))

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
            model,
            optimizer,
            keep_last=args.keep_last,
            keep_best=args.keep_best,
            origin=origin,
            write_agent=partial(save_merged, agent) if args.lora_rank else None,
        ) as checkpoints,
        Monitor(
            accelerator,
            stages,
            decisions=args.num_steps,
            updates=[args.num_updates(i) for i in range(1, args.num_iterations + 1)],
            longest_episode=horizon_decisions,
            num_action_chunks=args.num_action_chunks,
            recorder=recorder,
        ) as monitor,
    ):
        # --- start, or go on where a checkpoint was taken ---
        task_sampler = None
        if args.task_sampling == "adaptive":
            task_sampler = TaskSampler(stages.stages[0].task_ids)
        done, global_step = 0, 0
        env_states = None
        if checkpoint is not None:
            restored = checkpoints.restore(checkpoint)
            done, global_step = restored.iteration, restored.global_step
            env_states = restored.env_states
            if env_states is not None:
                monitor.load_state_dict(restored.tensors["episodes"])
            elif is_main:
                print(f"{checkpoint} holds no environment states: new episodes begin")
            if task_sampler is not None:
                task_sampler.load_state_dict(restored.tensors["episodes"])
            if args.evaluates(done) and not evaluation_file(run.path, done).is_file() and is_main:
                print(missing_evaluation(checkpoint, args))
        for stage in stages:
            if task_sampler is not None:
                stage.set_task_weights(task_sampler.weights)
            if env_states is None:
                key = (args.seed, EPISODES, done)
                stage.reset([seed_of(*key, int(env_id)) for env_id in stage.env_ids])
            else:
                stage.restore(env_states)
        next_obs = [encode(stage.obs) for stage in stages]

        def take_boundary(iteration: int) -> None:
            tallies = monitor.state_dict()
            if task_sampler is not None:
                tallies |= task_sampler.state_dict()
            checkpoints.take(iteration, global_step, stages.states(), {"episodes": tallies})

        take_boundary(done)
        monitor.start(done)

        def evaluate_after(iteration: int) -> float:
            monitor.print("evaluating")
            with torch.no_grad(), accelerator.autocast():
                return for_all(
                    accelerator,
                    evaluate_into,
                    run.path,
                    iteration,
                    agent,
                    make_eval_envs,
                    args,
                )

        if args.eval_before and done == 0:
            run.forget_after(-1)  # if all starts again
            run.log({"eval/success_once": evaluate_after(0)}, global_step, 0)

        for iteration in range(done + 1, args.num_iterations + 1):
            progress = (iteration - 1) / args.num_iterations
            noise: dict[str, float] = {}
            if args.final_noise < 1:
                noise["noise_anneal"] = 1 - (1 - args.final_noise) * progress

            # --- rollout: one stage of environments simulates while another is decided ---
            monitor.begin_rollout(iteration)
            store.clear()
            obs: list[NDArray[np.intp]] = []  # row numbers in the store
            actions: list[Any] = []
            logprobs: list[Tensor] = []
            values = torch.zeros((args.num_steps, num_envs), device=device)
            outcomes = Outcomes.zeros(args.num_steps, num_envs)
            final_obs: list[tuple[int, NDArray[np.intp], dict[str, Any]]] = []

            for step in range(args.num_steps + 1):
                for i, stage in enumerate(stages):
                    if step > 0:  # what the decision before has led to
                        outcome = stage.receive()
                        outcomes.put(step - 1, stage.rows, outcome, args)

                        cut = np.flatnonzero(outcome.truncated & ~outcome.terminated)
                        if args.truncation == "bootstrap" and len(cut):
                            cut_obs = index(outcome.infos["final_obs"], cut)
                            final_obs.append((step - 1, stage.offset + cut, cut_obs))

                        next_obs[i] = encode(outcome.obs)
                        monitor.add_step(stage, outcome)

                    if step < args.num_steps:  # the next decision
                        stop.check()
                        key = (args.seed, NOISE, iteration, step)
                        generators = generators_of(key, stage.env_ids)
                        with torch.no_grad(), accelerator.autocast():
                            action, logprob, _, value = agent(
                                next_obs[i],
                                generator=generators,
                                **noise,
                            )
                        env_action = action.env_action.cpu().numpy()
                        run.check_actions(env_action, iteration, logprob=logprob, value=value)
                        stage.send(env_action)

                        obs.append(store.put(stage.obs, next_obs[i]))
                        actions.append(action)
                        logprobs.append(logprob)
                        values[step, stage.rows] = value
                if step > 0:
                    monitor.end_decision()

            stop.check_together()

            # --- advantages ---
            outcomes = outcomes.to(device)
            # A truncated episode goes on in the value of its own last observation. Every process
            # makes as many calls, which are collective where weights are sharded.
            num_calls = torch.tensor(len(final_obs), device=device)
            num_calls = int(over_processes(accelerator, num_calls, "max"))
            with torch.no_grad(), accelerator.autocast():
                last_values = torch.cat([agent.get_value(features) for features in next_obs])
                next_values = torch.cat([values[1:], last_values[None]])
                for call in range(num_calls):
                    if call < len(final_obs):
                        k, cut, cut_obs = final_obs[call]
                        next_values[k, cut] = agent.get_value(cut_obs)
                    else:
                        agent.get_value(next_obs[0])

            bounded_values = values
            if args.value_bounds is not None:
                bounded_values = values.clamp(*args.value_bounds)
                next_values = next_values.clamp(*args.value_bounds)
            advantages, returns = compute_gae(
                outcomes.rewards * args.reward_scale,
                bounded_values,
                next_values,
                outcomes.terminal,
                outcomes.ended,
                args.gamma,
                args.gae_lambda,
            )
            returns_mean, _ = mean_and_variance(accelerator, returns)
            advantages_mean, _ = mean_and_variance(accelerator, advantages)
            if args.center_adv_by_task:
                advantages = advantages - group_means(accelerator, advantages, outcomes.task_ids)
            if args.norm_adv:
                center, variance = mean_and_variance(accelerator, advantages)
                advantages = ((advantages - center) / (variance.sqrt() + 1e-5)).float()

            # --- the decisions of the update, over which weights have mean 1 ---
            num_minibatches = args.num_epoch_minibatches(iteration)
            num_selected = num_minibatches * minibatch_share
            selected = select_decisions(advantages.flatten(), b_groups, num_selected)

            weights = torch.ones_like(returns)
            if args.loss_weighting == "trajectory":
                decisions = -(-outcomes.episode_lengths // args.num_action_chunks)  # rounded up
                weights = trajectory_weights(outcomes.ended, decisions, horizon_decisions)
            weights_mean, _ = mean_and_variance(accelerator, index(weights.flatten(), selected))
            weights = (weights / weights_mean).float()

            # --- the batch: all decisions [K * N], step by step ---
            b_obs = np.concatenate(obs)
            b_actions = concatenate(actions)
            b_executed = (
                torch.arange(args.num_action_chunks, device=device)
                < outcomes.executed_steps[..., None]
            ).flatten(0, 1)  # [K * N, C]
            b_logprobs = mask_unexecuted(torch.cat(logprobs), b_executed, args.logprob_level)
            b_imitation_weights = torch.zeros_like(returns).flatten()
            if args.imitation_coef:
                won = won_decisions(outcomes.ended, outcomes.succeeded)
                won_mean, _ = mean_and_variance(accelerator, index(won.flatten(), selected))
                won = won / won_mean.clamp(min=1e-6)  # with mean 1, if any
                b_imitation_weights = won.float().flatten()
            b_start_logprobs = torch.zeros_like(b_logprobs)  # of decisions that are not selected
            if start_policy is not None:
                with accelerator.autocast():
                    start_logprobs = start_policy.logprobs(
                        store,
                        b_obs,
                        b_actions,
                        selected,
                        num_passes=num_minibatches * num_micro_batches,
                        **noise,
                    )
                b_start_logprobs[torch.from_numpy(selected).to(device)] = mask_unexecuted(
                    start_logprobs,
                    index(b_executed, selected),
                    args.logprob_level,
                )

            batch = Batch(
                executed=b_executed,
                logprobs=b_logprobs,
                start_logprobs=b_start_logprobs,
                values=values.flatten(),
                advantages=advantages.flatten(),
                returns=returns.flatten(),
                weights=weights.flatten(),
                imitation_weights=b_imitation_weights,
            )

            # --- update ---
            checkpoints.begin_update()
            monitor.begin_update()
            step_sizes.begin(progress)
            minibatch_means: list[dict[str, Tensor]] = []
            ratio_deviation = 0.0
            policy_lr = 0.0
            kl_exceeded = False
            only_imitates = args.only_imitates(iteration)
            num_epochs = args.num_epochs(iteration)

            for epoch in range(num_epochs):
                b_flow_noise: Tensor | None = None  # [K * N, H, A], drawn anew in every epoch
                b_flow_steps: Tensor | None = None  # [K * N], at which the flow's error is taken
                if args.imitation_coef:
                    draws = flow_draws(
                        (args.seed, FLOW, iteration, epoch),
                        env_ids,
                        args.num_steps,
                        args.denoising_steps,
                        tuple(b_actions.chain.shape[2:]),
                    )
                    b_flow_noise, b_flow_steps = (x.to(device) for x in draws)
                key = (args.seed, MINIBATCHES, iteration, epoch)
                for part in stratified_minibatches(b_groups[selected], num_minibatches, key):
                    mb_inds = selected[part]
                    stats: list[dict[str, Tensor]] = []  # means of each micro-batch
                    micro_batches: list[dict[str, Tensor]] = []  # for a dump

                    for micro, inds in enumerate(np.split(mb_inds, num_micro_batches)):
                        # Processes exchange gradients with the last micro-batch.
                        is_last = micro == num_micro_batches - 1
                        mb = batch.at(inds)
                        with nullcontext() if is_last else accelerator.no_sync(model):
                            features = store.get(b_obs[inds])
                            decided = index(b_actions, inds)
                            flow_error = None
                            with accelerator.autocast():
                                if args.imitation_coef:
                                    flow = [index(x, inds) for x in (b_flow_noise, b_flow_steps)]
                                    _, newlogprob, entropy, newvalue, flow_error = model(
                                        features, decided, flow_draws=flow, **noise
                                    )
                                else:
                                    _, newlogprob, entropy, newvalue = model(
                                        features, decided, **noise
                                    )
                            loss, terms, logratio = ppo_loss(
                                newlogprob,
                                entropy,
                                newvalue,
                                flow_error,
                                mb,
                                args,
                                only_imitates,
                            )
                            accelerator.backward(loss / num_micro_batches)

                        stats.append({name: term.mean() for name, term in terms.items()})
                        micro_batches.append(
                            dict(
                                vars(mb),
                                loss=loss.detach(),
                                logratio=logratio,
                                new_value=newvalue.detach(),
                            )
                        )
                        if not minibatch_means:  # no update yet: ratios are 1
                            deviation = (logratio.exp() - 1).abs().max()
                            deviation = over_processes(accelerator, deviation, "max").item()
                            ratio_deviation = max(ratio_deviation, deviation)

                    if not minibatch_means:
                        run.check_ratio(ratio_deviation, args.max_ratio_deviation)
                    grad_norm = clip_grad_norm(accelerator, agent.parameters(), args.max_grad_norm)
                    run.check_finite(grad_norm, iteration, micro_batches)
                    update_progress = (len(minibatch_means) + 1) / args.num_updates(iteration)
                    iterations_updated = iteration - 1 + update_progress
                    with step_sizes.policy_scaled(args.policy_step_factor(iterations_updated)):
                        optimizer.step()
                        policy_lr = optimizer.param_groups[0]["lr"]
                    optimizer.zero_grad(set_to_none=True)
                    monitor.end_minibatch()

                    means = cast(dict[str, Tensor], accelerator.reduce(mean_of(stats), "mean"))
                    minibatch_means.append(means | {"actor/grad_norm": grad_norm})
                    if not only_imitates:
                        kl_exceeded = step_sizes.exceeds(means["actor/approx_kl"])
                    if kl_exceeded:
                        break
                if kl_exceeded:
                    break

            # --- log, evaluate, save ---
            global_step += monitor.end_update()
            explained_var = explained_variance(accelerator, bounded_values, returns)
            metrics = {name: x.item() for name, x in mean_of(minibatch_means).items()}
            metrics |= {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation,
                "actor/explained_variance": explained_var,
                "actor/num_updates": float(len(minibatch_means)),
                "actor/lr": policy_lr,
                "actor/noise_anneal": noise.get("noise_anneal", 1.0),
                "rollout/returns_mean": returns_mean.item(),
                "rollout/advantages_mean": advantages_mean.item(),
            }
            metrics |= monitor.metrics()
            if iteration > args.num_warmup_iterations:
                step_sizes.follow(minibatch_means[-1]["actor/approx_kl"])
            if task_sampler is not None:
                metrics |= task_sampler.metrics()
                task_sampler.update(monitor.tallies())
                for stage in stages:
                    stage.set_task_weights(task_sampler.weights)
            take_boundary(iteration)

            try:
                if args.evaluates(iteration):
                    metrics["eval/success_once"] = evaluate_after(iteration)
            finally:  # also if a request to stop ends the evaluation
                run.log(metrics, global_step, iteration)
            if args.saves(iteration):
                checkpoints.save(args.score(metrics))
            monitor.end_iteration(metrics)

    change = ""
    try:
        if args.eval_before and is_main:
            change = compare_evaluations(run.path, 0, args.num_iterations)
    finally:
        run.finish()
    if is_main:
        print(change)
        print(
            run.summary(
                f"iteration_{args.num_iterations}",
                args.suite,
                is_state_policy=args.model == STATE_MODEL,
            )
        )
    return metrics


if ARGS is not None:
    launch(main, ARGS)
