"""GRPO for a flow-matching vision-language-action policy on LIBERO: no critic, groups that share an initial state.

An iteration plays groups of G episodes, each group from one (task, stored initial state). With R_i an episode's
return, every decision of it has the advantage (Shao et al. 2024, arXiv:2402.03300)

    A_i = (R_i - mean(R_1..R_G)) / (std(R_1..R_G) + 1e-6)        (population std)

and the loss is PPO's clipped surrogate on decisions (one decision is one action chunk, its log-probability that of
the one noised denoising step; see `gr00t_agent.sampler`). A group whose success rate lies outside
[min_group_success, max_group_success] says little or nothing: it is dropped before any forward pass, and more groups
are played until `num_groups` informative ones are there or `max_rollouts` are spent (dynamic sampling, Yu et al. 2025,
arXiv:2503.14476).

Launch:
    accelerate launch algorithms/grpo_gr00t.py --suite libero_spatial --model <checkpoint>
All sizes are global: they are divided over the processes, and a size that does not divide is an error. A group lives
on one process. Processes may keep different numbers of decisions: each epoch has the same number of minibatches
everywhere, and a minibatch's loss is the mean over its decisions of all processes.

Metrics: those of `ppo_gr00t.py` that need no critic, and `rollout/groups_kept` (fraction of the groups played),
`rollout/num_rollouts`, `rollout/group_success_std`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from algorithms.arguments import parse_args, share_of_process
from algorithms.batch import concatenate, index
from algorithms.episodes import Episode, episode_metrics
from algorithms.eval_gr00t import evaluate_into, evaluation_jobs
from algorithms.progress import TrainingProgress
from algorithms.run_folder import RunFolder
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "grpo_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    seed: int = 1
    """Seed of the environments, the agent's initial weights and every random draw."""
    num_iterations: int = 400
    """Rollout-and-update rounds."""
    save_interval: int = 50
    """Iterations between checkpoints; the last iteration is always saved."""
    eval_interval: int = 0
    """Iterations between evaluations; 0 evaluates only after the last."""
    eval_episodes_per_task: int = 50
    """Stored initial states evaluated per task (50 are stored); 0 skips evaluation."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers that receive the metrics."""

    # --- environment ---
    suite: str = "libero_spatial"
    """LIBERO suite; `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to train on; all of the suite if not given."""
    num_envs: int = 64
    """Parallel environments over all processes; one rollout plays one episode in each."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes (C)."""
    horizon: int | None = None
    """Environment steps before truncation; the suite's own if not given."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""

    # --- agent ---
    model: str = "nano"
    """A preset's name (`nano`, `gr00t_n1d5`: random weights), or the folder or hub id of a checkpoint."""
    noise_method: Literal["flow_sde", "flow_cps", "reinflow", "reinflow_joint"] = "flow_sde"
    """How the denoising chain is made stochastic for exploration."""
    noise_level: float = 0.5
    """Strength of the exploration noise (flow_sde and flow_cps)."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    logprob_level: Literal["chunk", "action"] = "chunk"
    """Clip the ratio of a whole chunk, or of each of its actions."""
    train_backbone: bool = False
    """Train the vision tower and the language model too; otherwise their features are computed once a decision."""

    # --- optimisation ---
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
    learning_rate: float = 5e-6
    """AdamW's step size."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    update_epochs: int = 2
    """Passes over each iteration's decisions."""
    num_minibatches: int = 8
    """Optimiser steps per epoch."""
    micro_batch_size: int = 1024
    """Decisions per forward pass and process at most; larger minibatches accumulate gradients."""
    clip_coef: float = 0.2
    """Lower clip of the ratio: 1 - clip_coef."""
    clip_coef_high: float = 0.28
    """Upper clip of the ratio: 1 + clip_coef_high."""
    dual_clip: float | None = None
    """Bound on ratio * |A| for A < 0 (usually 3); off if not given."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (closed form)."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""
    max_ratio_deviation: float = 0.05
    """Stop if the first minibatch's ratio differs from 1 by more: old and new log-probabilities disagree."""


PRESETS: dict[str, Args] = {
    "demo": Args(
        run_name="demo_grpo", num_iterations=3, num_envs=4, group_size=2, num_groups=2, max_rollouts=1, horizon=60,
        num_minibatches=2, eval_episodes_per_task=1, learning_rate=3e-5,
    ),
}  # fmt: skip
METRICS = ("actor/loss", "actor/entropy", "actor/approx_kl", "actor/pg_clipfrac", "actor/grad_norm")


def make_envs(args: Args, num_envs: int, image_size: int) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments with GR00T's modality keys that rest when their episode has ended."""
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0", num_envs=num_envs, vectorization_mode="vector_entry_point",
        task_ids=args.task_ids, num_action_chunks=args.num_action_chunks, image_size=image_size,
        horizon=args.horizon, renderer=args.renderer, autoreset_mode=AutoresetMode.DISABLED,
    )  # fmt: skip
    return ModalityVectorObservation(envs)


def make_agent(args: Args) -> Gr00tAgent:
    """Returns the agent that `args` ask for, on the CPU."""
    return Gr00tAgent.load(
        args.model, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps,
        noise_method=args.noise_method, noise_level=args.noise_level, logprob_level=args.logprob_level,
        train_backbone=args.train_backbone,
    )  # fmt: skip


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

    `logratio` is [B] for chunk-level log-probabilities or [B, C] for action-level ones; advantages are [B].
    """
    advantages = advantages.reshape(-1, *[1] * (logratio.ndim - 1))
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, clipped > unclipped


def sample_groups(generator: np.random.Generator, jobs: list[tuple[int, int]], num_groups: int) -> NDArray[np.intp]:
    """Returns (task id, initial state id) [num_groups, 2] of groups, drawn without replacement while jobs last."""
    rounds = math.ceil(num_groups / len(jobs))
    order = np.concatenate([generator.permutation(len(jobs)) for _ in range(rounds)])[:num_groups]
    return np.asarray(jobs, dtype=np.intp)[order]


@torch.no_grad()
def play(agent: Any, envs: gym.vector.VectorEnv, groups: NDArray[np.intp], args: Args, seed: int) -> dict[str, Any]:
    """Plays one episode in every environment, groups side by side.

    Returns:
        obs, action, logprob: of the decisions of all episodes, joined; `episode` [B] the environment of each.
        success [N] bool, length [N], env_s (seconds in the environments), decisions.
    """
    task_ids, state_ids = np.repeat(groups, args.group_size, axis=0).T
    # A group's environments get one seed: fixtures stand alike, and only the policy's noise differs.
    seeds = [int(s) for s in np.repeat(np.random.SeedSequence(seed).generate_state(len(groups)), args.group_size)]
    mask = np.ones(envs.num_envs, dtype=bool)
    obs, _ = envs.reset(seed=seeds, options={"reset_mask": mask, "task_id": task_ids, "init_state_id": state_ids})
    live = np.arange(envs.num_envs)
    chunk_shape = (envs.action_space.shape or ())[1:]
    success, length = np.zeros(envs.num_envs, dtype=bool), np.zeros(envs.num_envs, dtype=np.int64)
    stored: list[tuple[Any, Any, Tensor, NDArray[np.intp]]] = []
    env_s = 0.0
    while len(live):
        encoded = agent.encode(index(obs, live))
        action, logprob, _, _ = agent.get_action_and_value(encoded)
        stored.append((encoded, action, logprob, live))
        env_action = np.zeros((envs.num_envs, *chunk_shape), dtype=np.float32)
        env_action[live] = action.env_action.cpu().numpy().reshape(len(live), *chunk_shape)
        start = time.perf_counter()
        obs, _, terminated, truncated, infos = envs.step(env_action)
        env_s += time.perf_counter() - start
        success[live] |= infos["success"][live]
        length[live] = infos["episode_length"][live]
        live = live[~(terminated | truncated)[live]]
    names = ("obs", "action", "logprob", "episode")
    joined = {name: concatenate(list(items)) for name, items in zip(names, zip(*stored, strict=True), strict=True)}
    return joined | dict(success=success, length=length, env_s=env_s, task_ids=task_ids, state_ids=state_ids)


def main(
    args: Args, make_agent: Callable[..., Any] = make_agent, make_envs: Callable[..., Any] = make_envs
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else, on the terms of `ppo_gr00t.main`.
    """
    accelerator = Accelerator(log_with=list(args.log_with) or None, project_dir=str(args.output_dir))
    device, num_processes = accelerator.device, accelerator.num_processes
    num_envs, num_groups = (share_of_process(args, name, num_processes) for name in ("num_envs", "num_groups"))
    if args.group_size < 2 or num_envs % args.group_size:
        raise ValueError(
            f"group_size={args.group_size} must be at least 2 and divide the {num_envs} environments of a process "
            f"(num_envs={args.num_envs} over {num_processes} process(es))"
        )
    run = RunFolder.create(args, accelerator)
    set_seed(args.seed)
    agent = make_agent(args).to(device).eval()
    envs = make_envs(args, num_envs, agent.image_size)
    set_seed(args.seed, device_specific=True)
    generator = np.random.default_rng((args.seed, accelerator.process_index))
    groups = agent.param_groups(args.learning_rate, 0.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(agent, optimizer)
    num_updates, show = args.update_epochs * args.num_minibatches, accelerator.is_main_process
    progress = TrainingProgress(args.num_iterations, args.max_rollouts, num_updates, enabled=show)
    jobs = evaluation_jobs(args.suite, args.task_ids, 50)
    metrics: dict[str, float] = {}
    global_step = 0
    with progress:
        for iteration in range(1, args.num_iterations + 1):
            # --- rollouts until there are enough informative groups ---
            rollout_start = time.perf_counter()
            env_s, env_steps, num_kept, num_rollouts = 0.0, 0, 0, 0
            episodes: list[Episode] = []
            kept: list[dict[str, Any]] = []
            group_stds: list[Tensor] = []
            while num_rollouts < args.max_rollouts:
                chosen = sample_groups(generator, jobs, num_envs // args.group_size)
                with accelerator.autocast():
                    played = play(agent, envs, chosen, args, seed=int(generator.integers(2**31)))
                num_rollouts += 1
                env_s += played["env_s"]
                env_steps += int(played["length"].sum())
                episodes += [
                    Episode(task_id=int(t), init_state_id=int(i), success=bool(s), length=int(n))
                    for t, i, s, n in zip(
                        played["task_ids"], played["state_ids"], played["success"], played["length"], strict=True
                    )
                ]
                success = torch.from_numpy(played["success"])
                group_stds.append(success.float().unflatten(0, (-1, args.group_size)).std(1, correction=0).mean())
                informative = informative_groups(
                    success, args.group_size, args.min_group_success, args.max_group_success
                )
                num_kept += int(informative.sum())
                keep_episode = informative.repeat_interleave(args.group_size).numpy()
                rows = np.flatnonzero(keep_episode[played["episode"]])
                if len(rows):
                    advantages = group_advantages(success.float(), args.group_size)[played["episode"][rows]]
                    batch = {name: index(played[name], rows) for name in ("obs", "action", "logprob")}
                    kept.append(batch | dict(advantage=advantages.to(device)))
                progress.decision([e.success for e in episodes], env_steps / (time.perf_counter() - rollout_start))
                enough = torch.tensor(num_kept >= num_groups, device=device)
                if accelerator.reduce(enough.int(), "sum") == num_processes:
                    break
            global_step += int(accelerator.reduce(torch.tensor(env_steps, device=device), "sum"))
            fewest = int(
                accelerator.gather(torch.tensor([sum(len(b["advantage"]) for b in kept)], device=device)).min()
            )

            # --- update ---
            update_start = time.perf_counter()
            history: list[Tensor] = []
            ratio_deviation = 0.0
            if fewest >= args.num_minibatches:
                batch = {name: concatenate([b[name] for b in kept]) for name in kept[0]}
                for _ in range(args.update_epochs):
                    order = generator.permutation(len(batch["advantage"]))
                    for minibatch in np.array_split(order, args.num_minibatches):
                        count = accelerator.reduce(torch.tensor(float(len(minibatch)), device=device), "sum")
                        stats = torch.zeros(4, device=device)
                        for start in range(0, len(minibatch), args.micro_batch_size):
                            inds = minibatch[start : start + args.micro_batch_size]
                            is_last = start + args.micro_batch_size >= len(minibatch)
                            adv = index(batch["advantage"], inds)
                            with nullcontext() if is_last else accelerator.no_sync(model):
                                with accelerator.autocast():
                                    row = index(batch["obs"], inds), index(batch["action"], inds)
                                    _, logprob, entropy, _ = model(*row)
                                logratio = logprob - index(batch["logprob"], inds)
                                pg, clipped = policy_loss(
                                    logratio, adv, args.clip_coef, args.clip_coef_high, args.dual_clip
                                )
                                loss = pg.mean() - args.ent_coef * entropy.mean()
                                # DDP averages over processes; times their number, the mean is over all decisions.
                                share = len(inds) / count
                                accelerator.backward(loss * share * num_processes)
                            ratio = logratio.detach().exp()
                            terms = (pg, entropy, (ratio - 1) - logratio, clipped.float())
                            stats += share * torch.stack([term.detach().mean() for term in terms])
                            if not history:
                                ratio_deviation = max(ratio_deviation, (ratio - 1).abs().max().item())
                        if not ratio_deviation <= args.max_ratio_deviation:
                            raise RuntimeError(
                                f"first minibatch's ratio is off 1 by {ratio_deviation:.3g} (max "
                                f"{args.max_ratio_deviation}): log-probabilities at rollout and at update differ; "
                                "check dropout, dtype and noise settings"
                            )
                        grad_norm = accelerator.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                        run.check_finite(grad_norm, iteration, logratio=logratio, advantages=adv)
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                        history.append(torch.cat([accelerator.reduce(stats, "sum"), grad_norm[None]]))
                        progress.update()

            # --- log, save, evaluate ---
            total_s = time.perf_counter() - rollout_start
            means = torch.stack(history).mean(0).tolist() if history else [math.nan] * len(METRICS)
            metrics = dict(zip(METRICS, means, strict=True)) | {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation,
                "actor/lr": optimizer.param_groups[0]["lr"],
                "rollout/groups_kept": num_kept / (num_rollouts * (num_envs // args.group_size)),
                "rollout/num_rollouts": float(num_rollouts),
                "rollout/group_success_std": torch.stack(group_stds).mean().item(),
                "time/env_s": env_s, "time/policy_s": update_start - rollout_start - env_s,
                "time/update_s": time.perf_counter() - update_start, "time/total_s": total_s,
                "charts/SPS": env_steps * num_processes / total_s,
            } | episode_metrics(episodes, accelerator)  # fmt: skip
            last = iteration == args.num_iterations
            if last or iteration % args.save_interval == 0:
                run.save_agent(agent, f"iteration_{iteration}")
            if args.eval_episodes_per_task and (last or (args.eval_interval and iteration % args.eval_interval == 0)):
                progress.print("evaluating")
                metrics["eval/success_once"] = evaluate_into(
                    run.path, iteration, agent, lambda n: make_envs(args, n, agent.image_size), args
                )
            run.log(metrics, global_step, iteration)
            progress.end_iteration(
                f"success {metrics['env/success_once']:.1%}  groups kept {metrics['rollout/groups_kept']:.0%}  "
                f"loss {metrics['actor/loss']:.4f}  kl {metrics['actor/approx_kl']:.2g}  "
                f"{metrics['charts/SPS']:.0f} env-steps/s"
            )
    envs.close()
    run.finish()
    if accelerator.is_main_process:
        print(run.summary(f"iteration_{args.num_iterations}", args.suite))
    return metrics


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__))
