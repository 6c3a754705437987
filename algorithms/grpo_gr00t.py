"""GRPO for a flow-matching vision-language-action policy on LIBERO: no critic, groups that share an initial state.

An iteration plays groups of G episodes, each group from one (task, stored initial state). With R_i an episode's
return, every decision of it has the advantage (Shao et al. 2024, arXiv:2402.03300)

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-6)        (population std)

and the loss is PPO's clipped surrogate on decisions (one decision is one action chunk, its log-probability that of
the one noised denoising step; see `gr00t_agent.sampler`), minus an entropy bonus and plus a divergence from the policy
that training started from, both on request; the divergence by GRPO's estimator r' - 1 - log r' with r' = start policy
/ policy. A group whose success rate lies outside [min_group_success, max_group_success] says little or nothing: it is
dropped before any update, and more groups are played until `num_groups` informative ones are there or `max_rollouts`
are spent (dynamic sampling, Yu et al. 2025, arXiv:2503.14476).

Launch:
    accelerate launch algorithms/grpo_gr00t.py --preset libero_spatial_nano
    accelerate launch --num_processes 4 algorithms/grpo_gr00t.py --suite libero_goal --model <checkpoint> --resume auto
All sizes are global: they are divided over the processes, and a size that does not divide is an error. A group lives
on one process. Processes may keep different numbers of decisions: each epoch has the same minibatches everywhere, and
a minibatch's loss is the mean over its decisions of all processes. Every draw is keyed by seed, iteration, rollout and
environment, so that the result does not depend on the number of processes or stages, and a resumed run is the same
run. Sharded weights (FSDP) are refused: episodes end at different times on different processes.

Metrics: those of `ppo_gr00t.py` that need no critic, and `rollout/groups_kept` (fraction of the groups played),
`rollout/num_rollouts`, `rollout/group_success_std`. An iteration without an informative group updates nothing and logs
no `actor/*` means.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from algorithms.common import distributed, presets
from algorithms.common.arguments import RunArgs, check_entropy_bonus, parse_args, share_of_process
from algorithms.common.batch import concatenate, index
from algorithms.common.checkpoints import Checkpoints, StopSignal, open_run
from algorithms.common.distributed import mean_and_variance, over_processes
from algorithms.common.episodes import Episode, episode_metrics
from algorithms.common.evaluation import evaluate_into, stored_starts
from algorithms.common.feature_store import FeatureStore
from algorithms.common.frozen import frozen_copy, reference_log_probs, store_frozen_as
from algorithms.common.overlap import EnvStages
from algorithms.common.progress import TrainingProgress
from algorithms.common.randomness import EPISODES, GROUPS, MINIBATCHES, NOISE, deal, generators_of, seed_of
from algorithms.common.step_sizes import StepSizes
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation


@dataclass(kw_only=True)
class Args(RunArgs):
    """Command-line arguments besides those of every run; each one's help follows it."""

    run_name: str = "grpo_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""

    # --- rollout: one episode in every environment ---
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

    # --- optimisation ---
    learning_rate: float = 5e-6
    """AdamW's step size."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    update_epochs: int = 2
    """Passes over each iteration's decisions."""
    num_minibatches: int = 8
    """Optimiser steps per epoch."""
    micro_batch_size: int = 1024
    """Decisions per forward pass over all processes at most; larger minibatches accumulate gradients."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""

    # --- loss ---
    loss_weighting: Literal["decision", "trajectory"] = "decision"
    """All decisions weigh the same, or all episodes do, as in RLinf."""
    clip_coef: float = 0.2
    """Lower clip of the ratio: 1 - clip_coef."""
    clip_coef_high: float = 0.28
    """Upper clip of the ratio: 1 + clip_coef_high."""
    dual_clip: float | None = None
    """Bound on ratio * |A| for A < 0 (usually 3); off if not given."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (closed form, nats per decision); the noise of reinflow alone can follow it."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy training started from; 0 keeps no copy of it."""
    max_ratio_deviation: float = 0.05
    """Stop if the first minibatch's ratio differs from 1 by more: old and new log-probabilities disagree."""


PRESETS = {name: Args(**settings) for name, settings in presets.GRPO.items()}
METRICS = (
    "actor/loss", "actor/entropy", "actor/reference_kl", "actor/approx_kl", "actor/pg_clipfrac", "actor/grad_norm",
)  # fmt: skip
APPROX_KL = METRICS.index("actor/approx_kl")


def make_envs(args: Args, num_envs: int, image_size: int) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments with GR00T's modality keys that rest when their episode has ended."""
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0", num_envs=num_envs, vectorization_mode="vector_entry_point",
        task_ids=args.task_ids, image_size=image_size, autoreset_mode=AutoresetMode.DISABLED, **args.simulation,
    )  # fmt: skip
    return ModalityVectorObservation(envs)


def make_agent(args: Args) -> Gr00tAgent:
    """Returns the agent that `args` ask for, on the CPU."""
    check_entropy_bonus(args)
    agent = Gr00tAgent.load(
        args.model, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps,
        noise_method=args.noise_method, noise_level=args.noise_level, logprob_level=args.logprob_level,
        train_backbone=args.train_backbone, compute_dtype=args.compute_dtype,
    )  # fmt: skip
    return store_frozen_as(agent, agent.policy.torch_dtype)


def group_advantages(returns: Tensor, group_size: int) -> Tensor:
    """Returns the group-normalised advantage of each episode [E]; episodes of a group are adjacent in `returns` [E].

    The advantages of a group whose returns are all equal are exactly zero.
    """
    groups = returns.unflatten(0, (-1, group_size))
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True, correction=0) + 1e-6)).flatten()


def informative_groups(success: Tensor, group_size: int, lowest: float, highest: float) -> Tensor:
    """Returns a bool mask over groups [E / G], True where the group's success rate lies in [lowest, highest]."""
    rate = success.float().unflatten(0, (-1, group_size)).mean(1)
    return (rate >= lowest) & (rate <= highest)


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


def divergence(logratio: Tensor) -> Tensor:
    """Returns r - 1 - log r of each element, an estimate of KL(p || q) if r = q / p at draws from p."""
    return logratio.exp() - 1 - logratio


def per_decision(reduce: Callable[..., Tensor], *elements: Tensor) -> list[Tensor]:
    """Returns each of `elements` [B, ...] reduced to one number per decision [B]."""
    return [reduce(x.float().reshape(len(x), -1), dim=1) for x in elements]


def sample_groups(
    key: tuple[int, ...], jobs: Sequence[tuple[int, int]], num_groups: int, group_size: int
) -> NDArray[np.int64]:
    """Returns task id, initial state id and seed [num_groups * group_size, 3] of episodes, those of a group adjacent.

    Groups' (task, state) are drawn from `jobs`, without replacement while they last. A group has one seed: fixtures
    stand alike, and only the policy's noise differs.
    """
    rng = np.random.default_rng(key)
    rounds = math.ceil(num_groups / len(jobs))
    order = np.concatenate([rng.permutation(len(jobs)) for _ in range(rounds)])[:num_groups]
    seeds = [seed_of(*key, EPISODES, group) for group in range(num_groups)]
    groups = np.array([(*jobs[job], seed) for job, seed in zip(order, seeds, strict=True)], dtype=np.int64)
    return np.repeat(groups, group_size, axis=0)


def play(
    decide: Callable[..., dict[str, Any]], stages: EnvStages, starts: NDArray[np.int64]
) -> tuple[dict[str, Any], NDArray[np.bool_], NDArray[np.int64]]:
    """Plays one episode in every environment, one stage simulating while another is decided.

    Args:
        decide: from observations of some environments and their rows [M] among this process's to `env_action` [M, C, a]
            and whatever else is kept of the decisions.
        stages: the environments.
        starts: [N, 3] task id, initial state id and seed of each.

    Returns:
        What was kept of all decisions, joined, with `episode`, the row of each one's environment; success [N]; length
        [N] in environment steps.
    """
    for stage in stages:
        tasks, states, seeds = starts[stage.rows].T
        mask = np.ones(len(seeds), dtype=bool)
        stage.reset(seeds.tolist(), {"reset_mask": mask, "task_id": tasks, "init_state_id": states})
    live = [np.arange(len(stage.env_ids)) for stage in stages]
    success, length = np.zeros(len(starts), dtype=bool), np.zeros(len(starts), dtype=np.int64)
    decisions: list[dict[str, Any]] = []
    while any(len(rows) for rows in live):
        for i, stage in enumerate(stages):
            if stage.waits:  # what the last decision led to
                step, rows = stage.receive(), live[i]
                success[stage.offset + rows] |= step.infos["success"][rows]
                length[stage.offset + rows] = step.infos["episode_length"][rows]
                live[i] = rows[~(step.terminated | step.truncated)[rows]]
            if len(live[i]):
                chosen = decide(index(stage.obs, live[i]), stage.offset + live[i])
                env_action = np.zeros((len(stage.env_ids), *chosen["env_action"].shape[1:]), dtype=np.float32)
                env_action[live[i]] = chosen.pop("env_action")
                stage.send(env_action.reshape(stage.envs.action_space.shape or ()))
                decisions.append(chosen | dict(episode=stage.offset + live[i]))
    return concatenate(decisions), success, length


def main(
    args: Args, make_agent: Callable[..., Any] = make_agent, make_envs: Callable[..., Any] = make_envs
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else, on the terms of `ppo_gr00t.main`.
    """
    accelerator = distributed.make_accelerator(args.log_with, args.output_dir)
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    num_envs, micro_size = (share_of_process(args, n, num_processes) for n in ("num_envs", "micro_batch_size"))
    if args.group_size < 2 or num_envs % args.group_size:
        raise ValueError(
            f"group_size={args.group_size} must be at least 2 and divide the {num_envs} environments of a process "
            f"(num_envs={args.num_envs} over {num_processes} process(es))"
        )
    if accelerator.is_fsdp2:
        raise ValueError("FSDP cannot be used: episodes end at different times on different processes; use DDP")
    env_ids = rank * num_envs + np.arange(num_envs)
    run, checkpoint = open_run(args, accelerator)
    set_seed(args.seed)
    agent = make_agent(args).to(device).eval()
    groups = agent.param_groups(args.learning_rate, 0.0)
    for parameter in (p for group in groups if group.get("name") == "value" for p in group["params"]):
        parameter.requires_grad_(False)  # no critic
    groups = [group for group in groups if group.get("name") != "value"]
    reference = frozen_copy(agent, share_frozen=True) if args.kl_coef else None
    if args.compile:  # the copy is not: a copied compiled network would keep the weights of this one
        agent.compile_network()
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=args.weight_decay)
    model, optimizer = distributed.prepare(accelerator, agent, optimizer)
    step_sizes = StepSizes(optimizer, args.lr_schedule, args.target_kl)
    set_seed(args.seed, device_specific=True)
    frozen = distributed.without_gradients(accelerator)
    store = FeatureStore(lambda obs: frozen(agent.encode, obs), device, args.feature_storage, args.feature_memory_gb)
    num_updates, show = args.update_epochs * args.num_minibatches, accelerator.is_main_process
    jobs = stored_starts(args.suite, args.task_ids)
    metrics: dict[str, float] = {}

    def make_stage(num_envs: int) -> gym.vector.VectorEnv:
        return make_envs(args, num_envs, agent.image_size)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_stage(num_envs))

    def decide(
        generators: Sequence[torch.Generator], iteration: int, obs: dict[str, Any], rows: NDArray[np.intp]
    ) -> dict[str, Any]:
        stop.check()
        encoded = frozen(agent.encode, obs)
        own, noise = [generators[row] for row in rows], args.noise_options(iteration)
        action, logprob, *_ = frozen(agent, encoded, generator=own, **noise)
        env_action = action.env_action.cpu().numpy()
        run.check_actions(env_action, iteration, logprob=logprob)
        return dict(row=store.put(obs, encoded), action=action, logprob=logprob, env_action=env_action)

    with (
        StopSignal(accelerator) as stop,
        EnvStages(make_stage, env_ids, num_stages=args.pipeline_stage_num, timeout_s=args.env_timeout_s) as stages,
        Checkpoints(run, accelerator, model, optimizer, stages, args, episodes_go_on=False) as checkpoints,
        TrainingProgress(args.num_iterations, args.max_rollouts, num_updates, enabled=show) as progress,
    ):
        done, global_step = checkpoints.start(checkpoint)
        progress.skip(done)
        for iteration in range(done + 1, args.num_iterations + 1):
            # --- rollouts until there are enough informative groups ---
            rollout_start, busy_s, wait_s = time.perf_counter(), stages.busy_s, stages.wait_s
            noise, env_steps, num_kept, num_rollouts = args.noise_options(iteration), 0, 0, 0
            episodes, kept, group_stds = list[Episode](), list[dict[str, Any]](), list[Tensor]()
            spare: dict[str, Any] = {}
            store.clear()
            while num_rollouts < args.max_rollouts and num_kept < args.num_groups:
                key = (args.seed, GROUPS, iteration, num_rollouts)
                starts = sample_groups(key, jobs, args.num_envs // args.group_size, args.group_size)[env_ids]
                generators = generators_of((args.seed, NOISE, iteration, num_rollouts), env_ids)
                played, success, length = play(partial(decide, generators, iteration), stages, starts)
                num_rollouts += 1
                env_steps += int(length.sum())
                episodes += [
                    Episode(task_id=int(t), init_state_id=int(i), success=bool(s), length=int(n))
                    for (t, i, _), s, n in zip(starts, success, length, strict=True)
                ]
                returns = torch.from_numpy(success).float()
                group_stds.append(returns.unflatten(0, (-1, args.group_size)).std(1, correction=0))
                informative = informative_groups(
                    returns, args.group_size, args.min_group_success, args.max_group_success
                )
                num_kept += int(over_processes(accelerator, informative.sum().to(device), "sum"))
                is_kept = informative.repeat_interleave(args.group_size).numpy()[played["episode"]]
                # One decision serves where a process has none in a minibatch.
                spare = spare or index(played, np.zeros(1, dtype=np.intp))
                store.free(np.setdiff1d(played["row"][~is_kept], spare["row"]))
                decisions = np.bincount(played["episode"])
                played |= dict(
                    advantage=group_advantages(returns, args.group_size)[played["episode"]].to(device),
                    weight=torch.from_numpy(1 / decisions[played["episode"]]).float().to(device),
                )
                kept.append(index(played, np.flatnonzero(is_kept)))
                progress.decision(episodes, env_steps / (time.perf_counter() - rollout_start))
            global_step += (
                env_steps := int(over_processes(accelerator, torch.tensor(env_steps, device=device), "sum"))
            )
            # The spare decision is the last row and weighs nothing.
            spare |= dict(advantage=torch.zeros(1, device=device), weight=torch.zeros(1, device=device))
            batch = concatenate([*kept, spare])
            num_rows = len(batch["row"]) - 1
            num_decisions = over_processes(accelerator, torch.tensor(float(num_rows), device=device), "sum")
            if args.loss_weighting == "decision":
                batch["weight"][:-1] = 1.0
            batch["weight"] *= num_decisions / over_processes(accelerator, batch["weight"].sum(), "sum").clamp(min=1e-9)
            if reference is not None:
                num_passes = num_rows // micro_size + 1
                batch["reference"] = reference_log_probs(frozen, reference, store, batch, num_passes, **noise)

            # --- update ---
            checkpoints.begin_update()
            update_start, history, ratio_deviation = time.perf_counter(), list[Tensor](), 0.0
            step_sizes.begin(args.progress(iteration))
            strata = env_ids[batch["episode"][:-1]]
            keys = [(args.seed, MINIBATCHES, iteration, epoch) for epoch in range(args.update_epochs)]
            for minibatch in (part for key in keys for part in deal(strata, args.num_minibatches, key)):
                count = over_processes(accelerator, torch.tensor(float(len(minibatch)), device=device), "sum")
                if not count:
                    continue
                minibatch = minibatch if len(minibatch) else np.array([num_rows])
                stats, b = torch.zeros(len(METRICS) - 1, device=device), dict[str, Any]()
                parts = np.array_split(minibatch, math.ceil(len(minibatch) / micro_size))
                for micro, part in enumerate(parts):
                    b = index(batch, part)
                    with nullcontext() if micro == len(parts) - 1 else accelerator.no_sync(model):
                        with accelerator.autocast():
                            _, logprob, entropy, _ = model(store.get(b["row"]), b["action"], **noise)
                        logratio = logprob - b["logprob"]
                        clips = args.clip_coef, args.clip_coef_high, args.dual_clip
                        pg, pg_clipped = per_decision(torch.mean, *policy_loss(logratio, b["advantage"], *clips))
                        entropy, kl = per_decision(torch.sum, entropy, divergence(logratio))
                        from_start = divergence(b["reference"] - logprob) if reference is not None else 0 * logprob
                        (start_kl,) = per_decision(torch.sum, from_start)
                        total = pg - args.ent_coef * entropy + args.kl_coef * start_kl
                        loss = (b["weight"] * total).sum() / count
                        # DDP averages over processes, but the mean is over all decisions.
                        accelerator.backward(loss * num_processes)
                    b |= dict(loss=loss, logratio=logratio)
                    is_counted = (torch.from_numpy(part) < num_rows).float().to(device)
                    terms = (pg, entropy, start_kl, kl, pg_clipped)
                    stats += torch.stack([(is_counted * term.detach()).sum() / count for term in terms])
                    if not history:
                        ratio_deviation = max(ratio_deviation, (logratio.detach().exp() - 1).abs().max().item())
                deviation = over_processes(accelerator, torch.tensor(ratio_deviation, device=device), "max").item()
                ratio_deviation = max(ratio_deviation, deviation)
                run.check_ratio(ratio_deviation, args.max_ratio_deviation)
                grad_norm = distributed.clip_grad_norm(accelerator, agent.parameters(), args.max_grad_norm)
                run.check_finite(grad_norm, iteration, **{k: v for k, v in b.items() if isinstance(v, Tensor)})
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.append(torch.cat([over_processes(accelerator, stats, "sum"), grad_norm[None]]))
                progress.update()
                if step_sizes.exceeds(history[-1][APPROX_KL]):
                    break

            # --- log, evaluate, save ---
            total_s, waited_s = time.perf_counter() - rollout_start, stages.wait_s - wait_s
            means = torch.stack(history).mean(0).tolist() if history else []
            success_std = mean_and_variance(accelerator, torch.cat(group_stds).to(device))[0].item()
            advantage = over_processes(accelerator, batch["advantage"].sum(), "sum") / num_decisions.clamp(min=1)
            of_episodes = episode_metrics(episodes, accelerator)
            metrics = dict(zip(METRICS, means, strict=False)) | {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation, "actor/num_updates": float(len(history)),
                "actor/lr": optimizer.param_groups[0]["lr"], "actor/noise_anneal": noise.get("noise_anneal", 1.0),
                "rollout/groups_kept": num_kept / (num_rollouts * (args.num_envs // args.group_size)),
                "rollout/num_rollouts": float(num_rollouts), "rollout/group_success_std": success_std,
                "rollout/returns_mean": of_episodes["env/success_once"], "rollout/advantages_mean": advantage.item(),
                "time/env_s": stages.busy_s - busy_s, "time/env_wait_s": waited_s,
                "time/policy_s": update_start - rollout_start - waited_s,
                "time/update_s": time.perf_counter() - update_start, "time/total_s": total_s,
                "charts/SPS": env_steps / total_s,
            } | of_episodes  # fmt: skip
            if history:
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
            updated = (
                f"loss {metrics['actor/loss']:.4f}  kl {metrics['actor/approx_kl']:.2g}" if history else "no update"
            )
            progress.end_iteration(
                f"success {metrics['env/success_once']:.1%}  groups kept {metrics['rollout/groups_kept']:.0%}  "
                f"{updated}  {metrics['charts/SPS']:.0f} env-steps/s",
                metrics,
            )
    run.finish()
    if accelerator.is_main_process:
        print(run.summary(f"iteration_{args.num_iterations}", args.suite))
    return metrics


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__))
