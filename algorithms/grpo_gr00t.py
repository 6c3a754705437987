"""GRPO for a flow-matching vision-language-action policy on LIBERO: groups instead of a critic.

An iteration plays groups of G episodes, each group from one (task, stored initial state). With R_i
an episode's return, every decision of it has the advantage (Shao et al. 2024, arXiv:2402.03300)

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-6)        (population std)

or, with the baseline "alive", each decision k of it an advantage of its own, in which the mean is
over the other episodes of the group that are still running at their decision k (0 if none is):

    A_ik = (R_i - mean(R_j: j != i, n_j > k)) / (std(R_1..R_G) + 1e-6)        (n_j: j's decisions)

so that nothing counts any more once a group's last success is over. The loss is PPO's clipped
surrogate on decisions (one decision is one action chunk, its log-probability that of the one noised
denoising step; see `gr00t_agent.sampler`), minus an entropy bonus and plus a divergence from the
policy that training started from, both on request; the divergence by GRPO's estimator
r' - 1 - log r' with r' = start policy / policy. A group whose success rate lies outside
[min_group_success, max_group_success] says little or nothing: it is dropped before any update, and
more groups are played until `num_groups` informative ones are there or `max_rollouts` are spent
(dynamic sampling, Yu et al. 2025, arXiv:2503.14476).

With `imitation_coef` the loss has `ppo_gr00t.py`'s self-imitation besides: flow matching's error on
the chunks of successful episodes, with weights of mean 1 over the batch. Episodes are whole, so that
all successes are imitated, those of dropped groups too: a solved task has no other gradient that
would keep it from being forgotten. These decisions cost their passes in the update, and have no part
in the rest of the loss, which stays a mean over the decisions of informative groups. In the first
`imitation_iterations` nothing else is trained, and only what succeeded passes through the update;
which groups are played is decided as ever.

Launch:
    accelerate launch algorithms/grpo_gr00t.py --preset libero_spatial_nano
    accelerate launch --multi_gpu algorithms/grpo_gr00t.py --preset libero_spatial_rlinf
    accelerate launch algorithms/grpo_gr00t.py --preset libero_spatial_nano --resume auto
All sizes are global: they are divided over the processes, and a size that does not divide is an
error. A group lives on one process. Processes may keep different numbers of decisions: each epoch
has the same minibatches everywhere, and a minibatch's loss is the mean over its decisions of all
processes. Every draw is keyed by seed, iteration, rollout and environment, so that the result does
not depend on the number of processes or stages, and a resumed run is the same run. Sharded weights
(FSDP) are refused: episodes end at different times on different processes.

Metrics: those of `ppo_gr00t.py` that need no critic, and `rollout/groups_kept` (fraction of the
groups played), `rollout/num_rollouts`, `rollout/group_success_std`. An iteration without an
informative group updates nothing and logs no `actor/*` means (with imitation, one without any
success).
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
    check_folders,
    check_imitation,
    check_near_goal,
    check_physics,
    check_ranges,
    check_schedule,
    check_sizes,
    check_stages,
    check_state_model,
    launched_processes,
    share_of_process,
)
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import check_starts, jobs_in_training, stored_starts


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it. Sizes are over all processes."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "grpo_{suite}_{seed}"
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

    # --- rollouts: one episode in every environment ---
    group_size: int = 8
    """Episodes per group (G)."""
    num_groups: int = 64
    """Informative groups wanted per iteration over all processes."""
    max_rollouts: int = 16
    """Rollouts (one episode in every environment) spent on an iteration at most."""
    min_group_success: float = 0.1
    """Groups with a lower success rate are dropped."""
    max_group_success: float = 0.9
    """Groups with a higher success rate are dropped."""
    feature_storage: Literal["device", "host", "mixed", "none"] = "mixed"
    """Where encoded observations wait for the update. `device`, `host`: up to feature_memory_gb
    there, the rest is encoded anew in every epoch. `mixed`: up to feature_memory_gb on the device,
    the rest in host memory. `none`: all encoded anew."""
    feature_memory_gb: float = 16.0
    """Memory of a process for encoded observations, 10^9 bytes."""

    # --- optimisation ---
    learning_rate: float = 5e-6
    """AdamW's step size for the policy."""
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
    update_epochs: int = 2
    """Passes over each iteration's decisions."""
    num_minibatches: int = 8
    """Optimiser steps per epoch."""
    micro_batch_size: int = 1024
    """Decisions per forward pass over all processes at most; smaller ones accumulate gradients."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""

    # --- loss ---
    baseline: Literal["group", "alive"] = "group"
    """What a return is compared with: the mean of its group, or decision by decision that of the
    group's other episodes that are still running then."""
    loss_weighting: Literal["decision", "trajectory"] = "decision"
    """All decisions weigh the same, or all episodes do, as in RLinf: a decision's weight is one over
    the decisions of its whole episode."""
    clip_coef: float = 0.2
    """Lower clip of the ratio: 1 - clip_coef."""
    clip_coef_high: float = 0.28
    """Upper clip of the ratio: 1 + clip_coef_high."""
    dual_clip: float | None = None
    """Bound on ratio * |A| for A < 0 (usually 3); off if not given."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (closed form, in nats); the noise of reinflow alone can follow
    it. With logprob_level `chunk` the bonus is the entropy of the whole decision, with `action` and
    `token` the mean over its executed actions or over their elements."""
    imitation_coef: float = 0.0
    """Weight of flow matching on what the rollouts' successful episodes did (self-imitation). A
    policy whose mean moves by it needs a smaller step size than GRPO alone would bear. Successes of
    groups that are dropped are imitated too, and cost their passes in the update."""
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

    def only_imitates(self, iteration: int) -> bool:
        """Returns whether the policy learns by imitation alone in `iteration`."""
        return iteration <= self.imitation_iterations

    def num_epochs(self, iteration: int) -> int:
        """Returns the passes over the decisions of `iteration`."""
        return self.imitation_epochs if self.only_imitates(iteration) else self.update_epochs

    def num_updates(self, iteration: int) -> int:
        """Returns the optimiser steps of `iteration`, unless target_kl ends them."""
        return self.num_epochs(iteration) * self.num_minibatches

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

        While the policy only imitates it rises to `imitation_learning_rate` and falls to 1.
        """
        if iterations_updated > self.imitation_iterations:
            return 1.0
        largest = self.imitation_learning_rate / self.learning_rate
        return imitation_step_factor(iterations_updated / self.imitation_iterations, largest)

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Returns what the best checkpoints are chosen by; None where none was evaluated.

        Not the success of the training's own episodes, which explore and are of earlier weights.
        """
        return metrics.get("eval/success_once")


PRESETS = {name: Args(**settings) for name, settings in presets.GRPO.items()}


def check_args(args: Args) -> None:
    """Raises ValueError for arguments that would otherwise fail late."""
    check_ranges(args)
    if args.min_group_success > args.max_group_success:
        raise ValueError(
            f"min_group_success={args.min_group_success} is more than "
            f"max_group_success={args.max_group_success}: no group would be informative"
        )
    check_sizes(args, "num_envs", "micro_batch_size")
    check_stages(args)
    num_processes = launched_processes()
    num_envs = share_of_process(args, "num_envs", num_processes)
    if num_envs % args.group_size:
        raise ValueError(
            f"group_size={args.group_size} must divide the {num_envs} environments of a process "
            f"(num_envs={args.num_envs} over {num_processes} process(es))"
        )
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
from collections.abc import Callable, Sequence
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
from torch import Tensor

from algorithms.common.batch import concatenate, index, mean_of
from algorithms.common.checkpoint_notes import note_suite, tell_start
from algorithms.common.dry_run import measure_run
from algorithms.common.episodes import played_episodes
from algorithms.common.evaluation import compare_evaluations, evaluate_into, evaluation_file
from algorithms.common.features import FeatureStore
from algorithms.common.frozen import StartPolicy, origin_of, store_frozen_as
from algorithms.common.lora import LoraSettings, add_lora, save_merged
from algorithms.common.monitor import Monitor
from algorithms.common.processes import (
    clip_grad_norm,
    for_all,
    make_accelerator,
    mean_and_variance,
    over_processes,
    prepare,
)
from algorithms.common.randomness import (
    EPISODES,
    FLOW,
    GROUPS,
    MINIBATCHES,
    NOISE,
    flow_draws_of,
    generators_of,
    seed_of,
    stratified_minibatches,
)
from algorithms.common.resume import Checkpoints, StopSignal, missing_evaluation, open_run
from algorithms.common.stages import EnvStages
from algorithms.common.state_agent import StateFlowAgent
from algorithms.common.step_sizes import StepSizes, imitation_step_factor
from algorithms.common.task_sampling import TaskSampler
from gr00t_agent import Gr00tAgent
from libero_gym import horizon
from libero_gym.adapters import ModalityVectorObservation, load_modality
from libero_gym.near_goal import NearGoalVectorEnv


def make_envs(args: Args, num_envs: int, image_size: int) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments with GR00T's modality keys that rest after their episode.

    `image_size` 0 observes no images.
    """
    options: dict[str, Any] = dict(
        task_ids=args.task_ids,
        num_action_chunks=args.num_action_chunks,
        horizon=args.horizon,
        renderer=args.renderer,
        autoreset_mode=AutoresetMode.DISABLED,
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


def group_advantages(returns: Tensor, group_size: int) -> Tensor:
    """Returns the group-normalised advantage of each episode [E].

    Episodes of a group are adjacent in `returns` [E]. The advantages of a group whose returns are
    all equal are exactly zero.
    """
    groups = returns.unflatten(0, (-1, group_size))
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True, correction=0) + 1e-6)).flatten()


def alive_advantages(returns: Tensor, num_decisions: Tensor, group_size: int) -> Tensor:
    """Returns the advantage [E, K] of each episode's K decisions, 0 where there is none any more.

    A return is compared with the mean of the group's other episodes that are still running at the
    same decision; an episode that runs alone has the advantage 0. As in `group_advantages` the scale
    is the deviation of the whole group, so that only the baseline differs: as long as all episodes
    run, advantages are G / (G - 1) times those. A deviation of the few that are left at a decision
    would make the most of the decisions that say the least.

    Args:
        returns: [E], episodes of a group are adjacent.
        num_decisions: int [E], decisions of each episode; K is the largest.
        group_size: G.
    """
    groups = returns.unflatten(0, (-1, group_size))
    times = torch.arange(int(num_decisions.max()))
    alive = (times < num_decisions[:, None]).float().unflatten(0, (-1, group_size))  # [g, G, K]
    differences = groups[:, :, None] - groups[:, None, :]  # [g, G, G]
    num_others = (alive.sum(1, keepdim=True) - 1).clamp(min=1)
    advantages = alive * (differences @ alive) / num_others  # [g, G, K]
    deviations = groups.std(1, keepdim=True, correction=0)[..., None]
    return (advantages / (deviations + 1e-6)).flatten(0, 1)


def informative_groups(success: Tensor, group_size: int, lowest: float, highest: float) -> Tensor:
    """Returns a bool mask over groups [E / G], True where success lies in [lowest, highest]."""
    rate = success.float().unflatten(0, (-1, group_size)).mean(1)
    return (rate >= lowest) & (rate <= highest)


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
        start_logprobs: the same of the policy that training started from; of the rollout's without
            kl_coef.
        advantages: [B].
        weights: [B] weights of the decisions, with mean 1; 0 for those that are only imitated.
        imitation_weights: [B] the same for imitation, 0 where nothing is imitated.
        is_measured: [B] bool, True for those of which terms are logged, all but the imitation loss,
            which is of all.
    """

    executed: Tensor
    logprobs: Tensor
    start_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    imitation_weights: Tensor
    is_measured: Tensor

    def at(self, inds: NDArray[np.intp]) -> Batch:
        """Returns decisions `inds` [M] of these."""
        rows = torch.from_numpy(inds).to(self.weights.device)
        return Batch(**{name: values[rows] for name, values in vars(self).items()})


def grpo_loss(
    newlogprob: Tensor,
    entropy: Tensor,
    flow_error: Tensor | None,
    batch: Batch,
    mb_size: Tensor,
    args: Args,
    only_imitates: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns the loss of some decisions, a scalar, what is logged of them, and their log-ratios.

    Args:
        newlogprob: log-probabilities of all actions by the policy's present weights, [B], or
            [B, C] or [B, C, a] by step or element.
        entropy: of the same shape.
        flow_error: [B, C, a] flow matching's error; None without imitation_coef.
        batch: the decisions.
        mb_size: decisions of the whole minibatch, a scalar: the loss is their part of its mean.
        args: coefficients and clips.
        only_imitates: train the policy by imitation alone.

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
    loss = (batch.weights * loss).sum() / mb_size

    imitation_loss = torch.zeros_like(pg_loss)
    if flow_error is not None:
        imitation_loss = batch.imitation_weights * mean_of_executed(flow_error, executed)
        loss = loss + args.imitation_coef * imitation_loss.sum() / mb_size

    terms = {
        "actor/loss": pg_loss,
        "actor/entropy": sum_per_decision(entropy),
        "actor/reference_kl": sum_per_decision(start_kl),
        "actor/approx_kl": sum_per_decision(approx_kl),
        "actor/pg_clipfrac": pg_clipped,
        "actor/imitation_loss": imitation_loss,
    }
    return loss, {name: term.detach() for name, term in terms.items()}, logratio.detach()


def sample_groups(
    key: tuple[int, ...],
    jobs: Sequence[tuple[int, int]],
    num_groups: int,
    group_size: int,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Returns task id, initial state id and seed of episodes, those of a group adjacent.

    Groups' (task, state) are drawn from `jobs`, without replacement while they last. A group has
    one seed: fixtures stand alike, and only the policy's noise differs.

    Args:
        key: decides the draw.
        jobs: (task, state) to draw from.
        num_groups: groups.
        group_size: episodes of a group.
        weights: how often to draw each job, relative to the others; all alike if not given. Each
            job and each task is drawn its expected number of times, rounded up or down (systematic
            sampling).

    Returns:
        [num_groups * group_size, 3].
    """
    rng = np.random.default_rng(key)
    if weights is None:
        rounds = math.ceil(num_groups / len(jobs))
        order = np.concatenate([rng.permutation(len(jobs)) for _ in range(rounds)])[:num_groups]
    else:
        shuffled = rng.permutation(len(jobs))
        tasks = [jobs[job][0] for job in shuffled]
        by_task = shuffled[np.argsort(tasks, kind="stable")]
        ends = np.cumsum(weights[by_task]) / weights.sum() * num_groups
        points = rng.random() + np.arange(num_groups)
        drawn = np.searchsorted(ends, points, side="right").clip(max=len(jobs) - 1)  # by rounding
        order = rng.permutation(by_task[drawn])
    seeds = [seed_of(*key, EPISODES, group) for group in range(num_groups)]
    groups = [(*jobs[job], seed) for job, seed in zip(order, seeds, strict=True)]
    return np.repeat(np.array(groups, dtype=np.int64), group_size, axis=0)


def dry_run(
    args: Args,
    accelerator: Accelerator,
    make_agent: Callable[..., Any],
    make_envs: Callable[..., Any],
) -> dict[str, float]:
    """Prints the sizes of a run, and what memory and time it takes; nothing is trained or written."""
    epochs = [args.num_epochs(i) for i in range(1, args.num_iterations + 1)]
    longest = -(-(args.horizon or horizon(args.suite)) // args.num_action_chunks)  # rounded up
    most_decisions = args.num_envs * args.max_rollouts * longest
    return measure_run(
        args,
        accelerator,
        make_agent,
        make_envs,
        sizes={
            "environments": args.num_envs,
            "groups wanted": args.num_groups,
            "rollouts at most": args.max_rollouts,
            "decisions at most": most_decisions,
            "env-steps at most": most_decisions * args.num_action_chunks,
            "iterations": args.num_iterations,
            "updates of all iterations": sum(epochs) * args.num_minibatches,
        },
        decisions=most_decisions,
        passes=epochs,
    )


def main(
    args: Args,
    make_agent: Callable[..., Any] | None = None,
    make_envs: Callable[..., Any] = make_envs,
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else, on the terms of
    `ppo_gr00t.main`.
    """
    check_args(args)
    accelerator = make_accelerator(args.log_with, args.output_dir)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    device, num_processes = accelerator.device, accelerator.num_processes
    is_main = accelerator.is_main_process
    num_envs = share_of_process(args, "num_envs", num_processes)
    micro_batch_size = share_of_process(args, "micro_batch_size", num_processes)
    if accelerator.is_fsdp2:
        raise ValueError("FSDP cannot be used: processes end episodes at different times; use DDP")
    if make_agent is None:
        make_agent = load_agent
        if is_main:
            tell_start(args)
    if args.dry_run:
        return dry_run(args, accelerator, make_agent, make_envs)
    run, checkpoint = open_run(args, accelerator, num_iterations=args.num_iterations)

    # Environments are numbered over all processes; adjacent ones are a group.
    env_ids = accelerator.process_index * num_envs + np.arange(num_envs)
    groups_per_rollout = args.num_envs // args.group_size
    all_starts = stored_starts(args.suite, args.task_ids)
    action_numbers = np.arange(args.num_action_chunks)

    # --- agent and optimiser ---
    set_seed(args.seed)  # the same weights on every process
    agent = make_agent(args).to(device).eval()
    check_agent_takes(agent, args)
    note_suite(agent, args.suite)
    param_groups = agent.param_groups(args.learning_rate, 0.0)
    for group in param_groups:
        if group.get("name") == "value":  # there is no critic
            for parameter in group["params"]:
                parameter.requires_grad_(False)
    param_groups = [group for group in param_groups if group.get("name") != "value"]
    origin = origin_of(accelerator, agent, with_trained=bool(args.kl_coef))
    start_policy = None
    if args.kl_coef:
        start_policy = StartPolicy(agent, share_frozen=True)
    if args.compile:  # after the copy, which would go on computing with this network's weights
        agent.compile_network()

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

    def make_stage(num_envs: int) -> gym.vector.VectorEnv:
        observed_size = 0 if args.model == STATE_MODEL else agent.image_size
        return make_envs(args, num_envs, observed_size)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_envs(args, num_envs, agent.image_size))

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
            decisions=args.max_rollouts,
            updates=[args.num_updates(i) for i in range(1, args.num_iterations + 1)],
        ) as monitor,
    ):
        # --- start, or go on where a checkpoint was taken ---
        task_sampler = None
        if args.task_sampling == "adaptive":
            task_sampler = TaskSampler([task_id for task_id, _ in all_starts])
        done, global_step = 0, 0
        if checkpoint is not None:
            restored = checkpoints.restore(checkpoint)
            done, global_step = restored.iteration, restored.global_step
            if task_sampler is not None:
                task_sampler.load_state_dict(restored.tensors["tasks"])
            if args.evaluates(done) and not evaluation_file(run.path, done).is_file() and is_main:
                print(missing_evaluation(checkpoint, args))

        def take_boundary(iteration: int) -> None:
            tensors = {} if task_sampler is None else {"tasks": task_sampler.state_dict()}
            checkpoints.take(iteration, global_step, tensors=tensors)

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

            only_imitates = args.only_imitates(iteration)

            # --- rollouts until there are enough informative groups ---
            monitor.begin_rollout(iteration)
            store.clear()
            num_rollouts, num_kept = 0, 0
            kept: list[dict[str, Any]] = []
            padding_decision: dict[str, Any] = {}
            group_stds: list[Tensor] = []

            while num_rollouts < args.max_rollouts and num_kept < args.num_groups:
                key = (args.seed, GROUPS, iteration, num_rollouts)
                starts = sample_groups(
                    key,
                    all_starts,
                    groups_per_rollout,
                    args.group_size,
                    None if task_sampler is None else task_sampler.weights,
                )
                starts = starts[env_ids]  # this process's
                generators = generators_of((args.seed, NOISE, iteration, num_rollouts), env_ids)
                for stage in stages:
                    task_id, init_state_id, seed = starts[stage.rows].T
                    options = {
                        "reset_mask": np.ones(len(seed), dtype=bool),
                        "task_id": task_id,
                        "init_state_id": init_state_id,
                    }
                    stage.reset(seed.tolist(), options)

                # One episode in every environment: where it has ended, the environment rests. One
                # stage of environments simulates while another is decided.
                live = [np.arange(len(stage.env_ids)) for stage in stages]
                success = np.zeros(num_envs, dtype=bool)
                length = np.zeros(num_envs, dtype=np.int64)  # environment steps
                decisions: list[dict[str, Any]] = []
                latest: dict[int, dict[str, Any]] = {}  # the last decision of each stage
                step = 0  # decisions of an episode that runs so far

                while any(len(rows) for rows in live):
                    for i, stage in enumerate(stages):
                        if stage.waits:  # what the decision before has led to
                            outcome = stage.receive()
                            rows = live[i]
                            num_executed = outcome.infos["num_steps"][rows]
                            latest[i]["executed"] = num_executed[:, None] > action_numbers
                            is_end = outcome.terminated | outcome.truncated
                            success[stage.offset + rows] |= outcome.infos["success"][rows]
                            length[stage.offset + rows] = outcome.infos["episode_length"][rows]
                            live[i] = rows[~is_end[rows]]

                        rows = live[i]
                        if len(rows):  # the next decision
                            stop.check()
                            obs = index(stage.obs, rows)
                            features = encode(obs)
                            episode = stage.offset + rows
                            with torch.no_grad(), accelerator.autocast():
                                action, logprob, *_ = agent(
                                    features,
                                    generator=[generators[e] for e in episode],
                                    **noise,
                                )
                            env_action = action.env_action.cpu().numpy()
                            run.check_actions(env_action, iteration, logprob=logprob)
                            stage.send(env_action, rows)

                            row = store.put(obs, features)
                            latest[i] = dict(
                                obs=row,
                                action=action,
                                logprob=logprob,
                                episode=episode,
                                step=np.full(len(rows), step),
                            )
                            decisions.append(latest[i])
                    step += 1

                stop.check_together()
                num_rollouts += 1
                monitor.add_episodes(played_episodes(starts[:, :2], success, length))
                monitor.end_decision()

                # --- advantages, and which groups are worth an update ---
                played = concatenate(decisions)
                episode = played["episode"]  # of each decision
                returns = torch.from_numpy(success).float()
                decisions_made = torch.from_numpy(np.bincount(episode))  # of each episode
                if args.baseline == "alive":
                    advantages = alive_advantages(returns, decisions_made, args.group_size)
                    advantages = advantages[episode, played["step"]]
                else:
                    advantages = group_advantages(returns, args.group_size)[episode]

                is_informative = informative_groups(
                    returns,
                    args.group_size,
                    args.min_group_success,
                    args.max_group_success,
                )
                num_kept += int(over_processes(accelerator, is_informative.sum().to(device), "sum"))
                is_compared = is_informative.repeat_interleave(args.group_size)[episode]
                if only_imitates:
                    is_compared = torch.zeros_like(is_compared)
                is_won = torch.from_numpy(success)[episode]
                # What is imitated only has no part in the rest of the loss.
                played["advantage"] = (advantages * is_compared).to(device)
                played["weight"] = (is_compared / decisions_made[episode]).to(device)
                played["won"] = is_won.float().to(device)

                is_kept = (is_compared | is_won if args.imitation_coef else is_compared).numpy()
                kept.append(index(played, np.flatnonzero(is_kept)))
                if not padding_decision:
                    padding_decision = index(played, np.zeros(1, dtype=np.intp))
                store.free(np.setdiff1d(played["obs"][~is_kept], padding_decision["obs"]))
                group_returns = returns.unflatten(0, (-1, args.group_size))
                group_stds.append(group_returns.std(1, correction=0))

            # --- the batch: the decisions of informative groups, and others to imitate ---
            # The last row is a padding decision, which weighs nothing and serves where this process
            # has none in a minibatch.
            padding_decision["advantage"] = torch.zeros(1, device=device)
            padding_decision["weight"] = torch.zeros(1, device=device)
            padding_decision["won"] = torch.zeros(1, device=device)
            joined = concatenate([*kept, padding_decision])
            b_obs = joined["obs"]  # row numbers in the store
            b_actions = joined["action"]
            b_executed = torch.from_numpy(joined["executed"]).to(device)
            b_logprobs = mask_unexecuted(joined["logprob"], b_executed, args.logprob_level)
            b_weights = joined["weight"]
            b_env_ids = env_ids[joined["episode"][:-1]]
            padding_ind = len(b_obs) - 1

            num_decisions = torch.tensor(float(padding_ind), device=device)
            num_decisions = over_processes(accelerator, num_decisions, "sum")
            if args.loss_weighting == "decision":
                b_weights = (b_weights > 0).float()
            sum_of_weights = over_processes(accelerator, b_weights.sum(), "sum")
            b_weights *= num_decisions / sum_of_weights.clamp(min=1e-9)
            b_imitation_weights = joined["won"]
            num_won = over_processes(accelerator, b_imitation_weights.sum(), "sum")
            b_imitation_weights *= num_decisions / num_won.clamp(min=1)  # with mean 1, if any

            b_start_logprobs = b_logprobs
            if start_policy is not None:
                with accelerator.autocast():
                    b_start_logprobs = start_policy.logprobs(
                        store,
                        b_obs,
                        b_actions,
                        np.arange(len(b_obs)),
                        num_passes=padding_ind // micro_batch_size + 1,
                        **noise,
                    )
                b_start_logprobs = mask_unexecuted(b_start_logprobs, b_executed, args.logprob_level)

            batch = Batch(
                executed=b_executed,
                logprobs=b_logprobs,
                start_logprobs=b_start_logprobs,
                advantages=joined["advantage"],
                weights=b_weights,
                imitation_weights=b_imitation_weights,
                # What is logged of the update, and what the step size follows, is of these.
                is_measured=(b_imitation_weights if only_imitates else b_weights) > 0,
            )

            # --- update ---
            checkpoints.begin_update()
            monitor.begin_update()
            step_sizes.begin(progress)
            minibatch_means: list[dict[str, Tensor]] = []
            ratio_deviation = 0.0
            policy_lr = optimizer.param_groups[0]["lr"]
            kl_exceeded = False
            num_epochs = args.num_epochs(iteration)

            for epoch in range(num_epochs):
                b_flow_noise: Tensor | None = None  # [B, H, A], drawn anew in every epoch
                b_flow_steps: Tensor | None = None  # [B], at which the flow's error is taken
                if args.imitation_coef:
                    draws = flow_draws_of(
                        (args.seed, FLOW, iteration, epoch),
                        b_env_ids,
                        args.denoising_steps,
                        tuple(b_actions.chain.shape[2:]),
                    )
                    # Nothing is drawn for the padding decision, whose error does not count.
                    b_flow_noise, b_flow_steps = (
                        torch.cat([x, torch.zeros_like(x[:1])]).to(device) for x in draws
                    )
                key = (args.seed, MINIBATCHES, iteration, epoch)
                for mb_inds in stratified_minibatches(b_env_ids, args.num_minibatches, key):
                    mb_size = torch.tensor(float(len(mb_inds)), device=device)
                    mb_size = over_processes(accelerator, mb_size, "sum")
                    if mb_size == 0:
                        continue
                    if len(mb_inds) == 0:
                        mb_inds = np.array([padding_ind])
                    is_measured = index(batch.is_measured, mb_inds)
                    num_measured = over_processes(accelerator, is_measured.sum(), "sum")
                    num_micro_batches = math.ceil(len(mb_inds) / micro_batch_size)
                    stats: dict[str, Tensor] = {}  # this process's part of the minibatch's means
                    micro_batches: list[dict[str, Tensor]] = []  # for a dump

                    for micro, inds in enumerate(np.array_split(mb_inds, num_micro_batches)):
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
                                    _, newlogprob, entropy, _, flow_error = model(
                                        features, decided, flow_draws=flow, **noise
                                    )
                                else:
                                    _, newlogprob, entropy, _ = model(features, decided, **noise)
                            loss, terms, logratio = grpo_loss(
                                newlogprob,
                                entropy,
                                flow_error,
                                mb,
                                mb_size,
                                args,
                                only_imitates,
                            )
                            # DDP averages over processes, but the mean is over all decisions.
                            accelerator.backward(loss * num_processes)

                        imitation_loss = terms.pop("actor/imitation_loss")
                        sums = {
                            name: (mb.is_measured * term).sum() / num_measured.clamp(min=1)
                            for name, term in terms.items()
                        }
                        sums["actor/imitation_loss"] = imitation_loss.sum() / mb_size
                        for name, part in sums.items():
                            stats[name] = stats.get(name, 0.0) + part
                        micro_batches.append(dict(vars(mb), loss=loss.detach(), logratio=logratio))
                        if not minibatch_means:  # no update yet: ratios are 1
                            deviation = (logratio.exp() - 1).abs().max()
                            ratio_deviation = max(ratio_deviation, deviation.item())

                    if not minibatch_means:
                        deviation = torch.tensor(ratio_deviation, device=device)
                        ratio_deviation = over_processes(accelerator, deviation, "max").item()
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

                    means = cast(dict[str, Tensor], accelerator.reduce(stats, "sum"))
                    minibatch_means.append(means | {"actor/grad_norm": grad_norm})
                    if not only_imitates:
                        kl_exceeded = step_sizes.exceeds(means["actor/approx_kl"])
                    if kl_exceeded:
                        break
                if kl_exceeded:
                    break

            # --- log, evaluate, save ---
            global_step += monitor.end_update()
            success_std, _ = mean_and_variance(accelerator, torch.cat(group_stds).to(device))
            advantages_sum = over_processes(accelerator, batch.advantages.sum(), "sum")
            num_compared = over_processes(accelerator, (batch.weights > 0).sum(), "sum")
            metrics = {}
            if minibatch_means:
                metrics |= {name: x.item() for name, x in mean_of(minibatch_means).items()}
            metrics |= {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation,
                "actor/num_updates": float(len(minibatch_means)),
                "actor/lr": policy_lr,
                "actor/noise_anneal": noise.get("noise_anneal", 1.0),
                "rollout/groups_kept": num_kept / (num_rollouts * groups_per_rollout),
                "rollout/num_rollouts": float(num_rollouts),
                "rollout/group_success_std": success_std.item(),
                "rollout/advantages_mean": (advantages_sum / num_compared.clamp(min=1)).item(),
            }
            metrics |= monitor.metrics()
            num_episodes, num_successes, _ = monitor.tallies().sum(axis=0)
            metrics["rollout/returns_mean"] = num_successes / num_episodes
            if minibatch_means and not only_imitates:
                step_sizes.follow(minibatch_means[-1]["actor/approx_kl"])
            if task_sampler is not None:
                metrics |= task_sampler.metrics()
                task_sampler.update(monitor.tallies())
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
