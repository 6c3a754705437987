"""PPO for a flow-matching vision-language-action policy on LIBERO.

One decision is one chunk: the agent denoises an action chunk, the environment executes its first C actions, and the
decision's log-probability is that of the one noised denoising step, summed over the executed actions (the policy
is the Gaussian of that step; see `gr00t_agent.sampler`). On decisions this is PPO as published (Schulman et al.
2017, arXiv:1707.06347):

    delta_k = R_k + gamma * V(s_{k+1}) * (1 - terminated_k) - V(s_k)
    A_k     = delta_k + gamma * lambda * (1 - episode_end_k) * A_{k+1}
    L       = -E[min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)] + vf_coef * L_V - ent_coef * H + kl_coef * KL

with L_V the larger of the Huber losses of the value and the clipped value, dual clipping for A < 0 on request (Ye et
al. 2020, arXiv:1912.09729), H the entropy of the noised step in closed form, and KL that from the policy training
started from, by the estimator r' - 1 - log r' with r' = start policy / policy on the rollout's actions ("k3", as in
GRPO). A truncated episode bootstraps from the value of its own last observation (or counts as a failure, see
`truncation`), a terminated one from zero, and no advantage crosses an episode's end. E is the mean over decisions, or
over trajectories, of all processes.

Launch:
    accelerate launch algorithms/ppo_gr00t.py --preset libero_spatial_nano
    accelerate launch --num_processes 4 --mixed_precision bf16 algorithms/ppo_gr00t.py --preset libero_spatial_rlinf
    accelerate launch algorithms/ppo_gr00t.py --preset libero_spatial_nano --resume auto
All sizes are global: they are divided over the processes, and a size that does not divide is an error. Every draw is
keyed by seed, iteration, decision and environment, and every minibatch takes equally many decisions from each group
of environments: the result does not depend on the number of processes or stages, and a resumed run is the same run.

What differs from RLinf's recipe for the same model: one denoising step is noised per sample instead of per batch;
log-probabilities are fp32; an episode that ends makes room for the next; minibatches are reshuffled every epoch; a
number that is not finite stops the run.

Metrics: `actor/*` and `rollout/*` are means over an iteration's minibatches or decisions, `env/*` over the episodes
that ended in the iteration (`env/success_once`: success at any step of the episode). `time/env_s` is spent stepping,
`time/env_wait_s` is the part of it that decisions did not overlap, `time/policy_s` the rest of the rollout, and
`charts/SPS` environment steps per second of the whole loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from algorithms.common import distributed, presets
from algorithms.common.arguments import RunArgs, check_entropy_bonus, exact_quotient, parse_args, share_of_process
from algorithms.common.batch import concatenate, index
from algorithms.common.checkpoints import Checkpoints, StopSignal, open_run
from algorithms.common.distributed import mean_and_variance, over_processes
from algorithms.common.episodes import Episode, episode_metrics, finished_episodes
from algorithms.common.evaluation import evaluate_into
from algorithms.common.feature_store import FeatureStore
from algorithms.common.frozen import frozen_copy, reference_log_probs, store_frozen_as
from algorithms.common.overlap import EnvStages
from algorithms.common.progress import TrainingProgress
from algorithms.common.randomness import MINIBATCHES, NOISE, deal, generators_of
from algorithms.common.step_sizes import StepSizes
from algorithms.common.video import CONTROL_FREQUENCY_HZ, RolloutRecorder
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation


@dataclass(kw_only=True)
class Args(RunArgs):
    """Command-line arguments besides those of every run; each one's help follows it."""

    run_name: str = "ppo_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    video_interval: int = 0
    """Iterations between films of what four environments do in a rollout; 0 films none."""

    # --- rollout ---
    num_steps: int = 48
    """Decisions per environment and iteration; 48 chunks of 5 steps are one LIBERO-Spatial horizon."""
    reward: Literal["sparse", "relative"] = "sparse"
    """Sparse: 1 at success. Relative: the change of success from the step before."""
    reward_scale: float = 1.0
    """Factor on rewards before advantages are computed."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    truncation: Literal["bootstrap", "failure"] = "bootstrap"
    """An episode cut at the horizon has the value of its last observation left, or 0: being late is a failure."""
    value_bounds: tuple[float, float] | None = None
    """Range of possible returns (0 and reward_scale where success ends an episode). Advantages see values clipped to
    it, so that an overestimate cannot feed itself."""
    norm_adv: bool = True
    """Normalise advantages over the iteration's decisions of all processes."""

    # --- optimisation ---
    learning_rate: float = 5e-6
    """AdamW's step size for the policy."""
    value_learning_rate: float = 1e-4
    """AdamW's step size for the value head."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    critic_warmup_iterations: int = 0
    """First iterations, in which only the value head is trained."""
    critic_detach: bool = True
    """Keep the value loss's gradient out of the policy's trunk."""
    update_epochs: int = 4
    """Passes over each iteration's decisions."""
    minibatch_size: int = 1024
    """Decisions per optimiser step over all processes."""
    micro_batch_size: int = 1024
    """Decisions per forward pass over all processes; smaller ones accumulate gradients."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""

    # --- loss ---
    loss_weighting: Literal["decision", "trajectory"] = "decision"
    """All decisions weigh the same, or all trajectories (episodes, cut where the rollout is) do, as in RLinf."""
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
    """Weight of the entropy bonus (closed form, nats per decision); the noise of reinflow alone can follow it."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy training started from; 0 keeps no copy of it."""
    max_ratio_deviation: float = 0.05
    """Stop if the first minibatch's ratio differs from 1 by more: old and new log-probabilities disagree."""

    @property
    def num_decisions(self) -> int:
        """Decisions per iteration over all processes."""
        return self.num_envs * self.num_steps

    @property
    def num_minibatches(self) -> int:
        """Optimiser steps per epoch."""
        return exact_quotient(self, "num_decisions", "minibatch_size")

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimiser step."""
        return exact_quotient(self, "minibatch_size", "micro_batch_size")


PRESETS = {name: Args(**settings) for name, settings in presets.PPO.items()}
METRICS = (
    "actor/loss", "actor/value_loss", "actor/entropy", "actor/reference_kl", "actor/approx_kl", "actor/pg_clipfrac",
    "actor/value_clip_ratio", "actor/grad_norm",
)  # fmt: skip
APPROX_KL = METRICS.index("actor/approx_kl")


def make_envs(
    args: Args, num_envs: int, image_size: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments whose observations carry GR00T's modality keys."""
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0", num_envs=num_envs, vectorization_mode="vector_entry_point",
        task_ids=args.task_ids, image_size=image_size, reward=args.reward, autoreset_mode=autoreset_mode,
        **args.simulation,
    )  # fmt: skip
    return ModalityVectorObservation(envs)


def make_agent(args: Args) -> Gr00tAgent:
    """Returns the agent that `args` ask for, on the CPU."""
    check_entropy_bonus(args)
    agent = Gr00tAgent.load(
        args.model, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps,
        noise_method=args.noise_method, noise_level=args.noise_level, logprob_level=args.logprob_level,
        critic_detach=args.critic_detach, train_backbone=args.train_backbone, compute_dtype=args.compute_dtype,
    )  # fmt: skip
    return store_frozen_as(agent, agent.policy.torch_dtype)


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns, each [K, N], of K decisions in N environments.

    Args:
        rewards: [K, N] reward of each decision.
        values: [K, N] value of the observation that each decision saw.
        next_values: [K, N] value of the observation that each decision led to, before any reset: at an episode's end
            that of its own last observation.
        terminated: [K, N] bool, True where the episode ended in success.
        ended: [K, N] bool, True where the episode ended (terminated or truncated).
        gamma: discount per decision.
        lam: lambda of GAE.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[0])
    for k in reversed(range(len(rewards))):
        carried = deltas[k] + gamma * lam * ~ended[k] * carried
        advantages[k] = carried
    return advantages, advantages + values


def trajectory_weights(ended: Tensor) -> Tensor:
    """Returns for each decision [K, N] one over the decisions of its trajectory, which ends where `ended` is True."""
    number = ended.long().cumsum(0) - ended.long()
    lengths = torch.zeros(ended.shape, device=ended.device).scatter_add_(0, number, torch.ones_like(number).float())
    return 1 / lengths.gather(0, number)


def policy_loss(
    logratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Returns the clipped surrogate loss of each element and a bool mask, True where the clip was active.

    `logratio` is [B], [B, C] or [B, C, a] for log-probabilities of chunks, actions or tokens; advantages are [B].
    """
    advantages = advantages.reshape(-1, *[1] * (logratio.ndim - 1))
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, clipped > unclipped


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float, huber_delta: float
) -> tuple[Tensor, Tensor]:
    """Returns the clipped Huber loss of each value [B] and a bool mask, True where the clipped branch was active."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain = nn.functional.huber_loss(values, returns, reduction="none", delta=huber_delta)
    clipped = nn.functional.huber_loss(clipped_values, returns, reduction="none", delta=huber_delta)
    # Within the clip both are the same but for rounding.
    return torch.maximum(plain, clipped), (clipped > plain) & ((values - old_values).abs() > value_clip)


def divergence(logratio: Tensor) -> Tensor:
    """Returns r - 1 - log r of each element, an estimate of KL(p || q) if r = q / p at draws from p."""
    return logratio.exp() - 1 - logratio


def per_decision(reduce: Callable[..., Tensor], *elements: Tensor) -> list[Tensor]:
    """Returns each of `elements` [B, ...] reduced to one number per decision [B]."""
    return [reduce(x.float().reshape(len(x), -1), dim=1) for x in elements]


def main(
    args: Args, make_agent: Callable[..., Any] = make_agent, make_envs: Callable[..., Any] = make_envs
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else. An agent is a module with
    `forward(obs, action=None, *, generator=None)` -> action, logprob, entropy, value, where `generator` is one
    generator per row, `get_value`, `predict`, `param_groups` (the value head's named "value"), `image_size`,
    `save_pretrained`, and `encode`, which turns an observation into what is stored of it (a frozen backbone's
    features); with --compile `compile_network` too. Its action is a NamedTuple of tensors that has an `env_action`.
    """
    accelerator = distributed.make_accelerator(args.log_with, args.output_dir)
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    num_envs, _ = (share_of_process(args, name, num_processes) for name in ("num_envs", "micro_batch_size"))
    num_minibatches, num_micro_batches = args.num_minibatches, args.num_micro_batches
    env_ids = rank * num_envs + np.arange(num_envs)
    # Each of these groups of environments gives every minibatch equally many decisions.
    strata = np.tile(env_ids // (args.num_envs // math.gcd(args.num_envs, args.minibatch_size)), args.num_steps)
    run, checkpoint = open_run(args, accelerator)
    set_seed(args.seed)
    agent = make_agent(args).to(device).eval()
    reference = frozen_copy(agent, share_frozen=not accelerator.is_fsdp2) if args.kl_coef else None
    if args.compile:  # the copy is not: a copied compiled network would keep the weights of this one
        agent.compile_network()
    groups = agent.param_groups(args.learning_rate, args.value_learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=args.weight_decay)
    model, optimizer = distributed.prepare(accelerator, agent, optimizer)
    step_sizes = StepSizes(optimizer, args.lr_schedule, args.target_kl)
    policy = [p for group in optimizer.param_groups if group.get("name") != "value" for p in group["params"]]
    set_seed(args.seed, device_specific=True)
    frozen = distributed.without_gradients(accelerator)
    store = FeatureStore(lambda obs: frozen(agent.encode, obs), device, args.feature_storage, args.feature_memory_gb)
    fps, film = CONTROL_FREQUENCY_HZ / args.num_action_chunks, args.video_interval if accelerator.is_main_process else 0
    recorder = RolloutRecorder(run.path / "videos", num_envs=4, interval=film, fps=fps)
    num_updates, show = args.update_epochs * num_minibatches, accelerator.is_main_process
    metrics: dict[str, float] = {}

    def make_stage(num_envs: int) -> gym.vector.VectorEnv:
        return make_envs(args, num_envs, agent.image_size)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_envs(args, num_envs, agent.image_size, AutoresetMode.DISABLED))

    with (
        StopSignal(accelerator) as stop,
        EnvStages(make_stage, env_ids, num_stages=args.pipeline_stage_num, timeout_s=args.env_timeout_s) as stages,
        Checkpoints(run, accelerator, model, optimizer, stages, args, episodes_go_on=True) as checkpoints,
        TrainingProgress(args.num_iterations, args.num_steps, num_updates, enabled=show) as progress,
    ):
        done, global_step = checkpoints.start(checkpoint)
        progress.skip(done)
        encoded = [frozen(agent.encode, stage.obs) for stage in stages]
        for iteration in range(done + 1, args.num_iterations + 1):
            # --- rollout: K decisions in N environments, one stage simulating while another is decided ---
            rollout_start, busy_s, wait_s = time.perf_counter(), stages.busy_s, stages.wait_s
            noise, env_steps, episodes = args.noise_options(iteration), 0, list[Episode]()
            decisions, outcomes, final = list[dict[str, Any]](), list[dict[str, Any]](), list[tuple[Any, Any]]()
            store.clear()
            for k in range(args.num_steps + 1):
                for i, stage in enumerate(stages):
                    if k > 0:  # what decision k - 1 led to
                        step = stage.receive()
                        ended = step.terminated | step.truncated
                        rows = np.flatnonzero(step.truncated & ~step.terminated)
                        if args.truncation == "bootstrap" and len(rows):
                            place = num_envs * (k - 1) + stage.offset + rows
                            final.append((place, index(step.infos["final_obs"], rows)))
                        worthless = ended if args.truncation == "failure" else step.terminated
                        outcomes.append(dict(reward=step.reward, terminated=worthless, ended=ended))
                        episodes += finished_episodes(step.infos, ended)
                        env_steps += int(step.infos["num_steps"].sum())
                        encoded[i] = frozen(agent.encode, step.obs)
                        if i == 0:
                            recorder.add(iteration, step.obs, step.infos, ended)
                    if k < args.num_steps:
                        stop.check()
                        generators = generators_of((args.seed, NOISE, iteration, k), stage.env_ids)
                        action, logprob, _, value = frozen(agent, encoded[i], generator=generators, **noise)
                        env_action = action.env_action.cpu().numpy()
                        run.check_actions(env_action, iteration, logprob=logprob, value=value)
                        stage.send(env_action)
                        row = store.put(stage.obs, encoded[i])
                        decisions.append(dict(row=row, action=action, logprob=logprob, value=value))
                progress.decision(episodes, env_steps / (time.perf_counter() - rollout_start))
            recorder.write(iteration)

            # --- advantages ---
            batch, outcome = concatenate(decisions), concatenate(outcomes)  # [K * N], decision by decision
            grid = {name: torch.from_numpy(x).to(device).view(-1, num_envs) for name, x in outcome.items()}
            values, rewards = batch["value"].view(-1, num_envs), grid["reward"].float() * args.reward_scale
            last_value = torch.cat([frozen(agent.get_value, features) for features in encoded])
            next_values = torch.cat([values[1:], last_value[None]])
            num_final = int(over_processes(accelerator, torch.tensor(len(final), device=device), "max"))
            nothing = (np.zeros(0, dtype=np.intp), encoded[0])  # every process makes as many calls
            for place, obs in final + [nothing] * (num_final - len(final)):
                next_values.view(-1)[torch.from_numpy(place).to(device)] = frozen(agent.get_value, obs)[: len(place)]
            if args.value_bounds is not None:
                values, next_values = values.clamp(*args.value_bounds), next_values.clamp(*args.value_bounds)
            ends = grid["terminated"], grid["ended"]
            advantages, returns = compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
            mean, variance = mean_and_variance(accelerator, advantages)
            rollout_means = {"rollout/advantages_mean": mean.item()}
            rollout_means["rollout/returns_mean"] = mean_and_variance(accelerator, returns)[0].item()
            if args.norm_adv:
                advantages = ((advantages - mean) / (variance.sqrt() + 1e-5)).float()
            weights = trajectory_weights(ends[1]) if args.loss_weighting == "trajectory" else torch.ones_like(returns)
            weights = (weights / mean_and_variance(accelerator, weights)[0]).float()
            batch |= dict(advantage=advantages.flatten(), ret=returns.flatten(), weight=weights.flatten())
            if reference is not None:
                num_passes = num_minibatches * num_micro_batches
                batch["reference"] = reference_log_probs(frozen, reference, store, batch, num_passes, **noise)

            # --- update ---
            checkpoints.begin_update()
            update_start, history, ratio_deviation = time.perf_counter(), list[Tensor](), 0.0
            step_sizes.begin(args.progress(iteration))
            keys = [(args.seed, MINIBATCHES, iteration, epoch) for epoch in range(args.update_epochs)]
            for minibatch in (part for key in keys for part in deal(strata, num_minibatches, key)):
                stats: list[Tensor] = []
                b: dict[str, Any] = {}
                for micro, part in enumerate(np.split(minibatch, num_micro_batches)):
                    b = index(batch, part)
                    with nullcontext() if micro == num_micro_batches - 1 else accelerator.no_sync(model):
                        with accelerator.autocast():
                            _, logprob, entropy, value = model(store.get(b["row"]), b["action"], **noise)
                        logratio = logprob - b["logprob"]
                        clips = args.clip_coef, args.clip_coef_high, args.dual_clip
                        pg, pg_clipped = per_decision(torch.mean, *policy_loss(logratio, b["advantage"], *clips))
                        vf, vf_clipped = value_loss(value, b["value"], b["ret"], args.value_clip, args.huber_delta)
                        entropy, kl = per_decision(torch.sum, entropy, divergence(logratio))
                        from_start = divergence(b["reference"] - logprob) if reference is not None else 0 * logprob
                        (start_kl,) = per_decision(torch.sum, from_start)
                        total = pg + args.vf_coef * vf - args.ent_coef * entropy + args.kl_coef * start_kl
                        loss = (b["weight"] * total).mean()
                        accelerator.backward(loss / num_micro_batches)
                    b |= dict(loss=loss, logratio=logratio, new_value=value)
                    terms = (pg, vf, entropy, start_kl, kl, pg_clipped, vf_clipped.float())
                    stats.append(torch.stack([term.detach().mean() for term in terms]))
                    if not history:
                        deviation = over_processes(accelerator, (logratio.detach().exp() - 1).abs().max(), "max")
                        ratio_deviation = max(ratio_deviation, deviation.item())
                run.check_ratio(ratio_deviation, args.max_ratio_deviation)
                for parameter in policy if iteration <= args.critic_warmup_iterations else ():
                    parameter.grad = None
                grad_norm = distributed.clip_grad_norm(accelerator, agent.parameters(), args.max_grad_norm)
                run.check_finite(grad_norm, iteration, **{k: v for k, v in b.items() if isinstance(v, Tensor)})
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                means = torch.cat([torch.stack(stats).mean(0), grad_norm[None]])
                history.append(over_processes(accelerator, means, "mean"))
                progress.update()
                if step_sizes.exceeds(history[-1][APPROX_KL]):
                    break

            # --- log, evaluate, save ---
            total_s, waited_s = time.perf_counter() - rollout_start, stages.wait_s - wait_s
            env_steps = int(over_processes(accelerator, torch.tensor(env_steps, device=device), "sum"))
            global_step += env_steps
            metrics = dict(zip(METRICS, torch.stack(history).mean(0).tolist(), strict=True)) | rollout_means | {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation, "actor/num_updates": float(len(history)),
                "actor/explained_variance": distributed.explained_variance(accelerator, values, returns),
                "actor/lr": optimizer.param_groups[0]["lr"], "actor/noise_anneal": noise.get("noise_anneal", 1.0),
                "time/env_s": stages.busy_s - busy_s, "time/env_wait_s": waited_s,
                "time/policy_s": update_start - rollout_start - waited_s,
                "time/update_s": time.perf_counter() - update_start, "time/total_s": total_s,
                "charts/SPS": env_steps / total_s,
            } | episode_metrics(episodes, accelerator)  # fmt: skip
            if iteration > args.critic_warmup_iterations:
                step_sizes.follow(history[-1][APPROX_KL])
            checkpoints.take(iteration, global_step)
            try:
                if args.evaluates(iteration):
                    progress.print("evaluating")
                    work = partial(frozen, evaluate_into)
                    inputs = run.path, iteration, agent, make_eval_envs, args
                    metrics["eval/success_once"] = distributed.for_all(accelerator, work, *inputs)
            finally:
                run.log(metrics, global_step, iteration)
            if args.saves(iteration):
                checkpoints.save(args.score(metrics))
            success = f"{metrics['env/success_once']:.1%}" if "env/success_once" in metrics else "- (no episode ended)"
            progress.end_iteration(
                f"success {success}  loss {metrics['actor/loss']:.4f}  value loss {metrics['actor/value_loss']:.4f}  "
                f"kl {metrics['actor/approx_kl']:.2g}  {metrics['charts/SPS']:.0f} env-steps/s", metrics,
            )  # fmt: skip
    run.finish()
    if accelerator.is_main_process:
        print(run.summary(f"iteration_{args.num_iterations}", args.suite))
    return metrics


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__))
