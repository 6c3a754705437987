"""PPO for a flow-matching vision-language-action policy on LIBERO.

One decision is one chunk: the agent denoises an action chunk, the environment executes its first C actions, and the
decision's log-probability is that of the one noised denoising step, summed over the executed actions (the policy
is the Gaussian of that step; see `gr00t_agent.sampler`). On decisions this is PPO as published (Schulman et al.
2017, arXiv:1707.06347):

    delta_k = R_k + gamma * V(s_{k+1}) * (1 - terminated_k) - V(s_k)
    A_k     = delta_k + gamma * lambda * (1 - episode_end_k) * A_{k+1}
    L       = -E[min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)] + vf_coef * L_V - ent_coef * H

with L_V the larger of the Huber losses of the value and the clipped value, and dual clipping for A < 0 on request
(Ye et al. 2020, arXiv:1912.09729). A truncated episode bootstraps from the value of its own last observation, a
terminated one from zero, and no advantage crosses an episode's end.

Launch:
    accelerate launch algorithms/ppo_gr00t.py --suite libero_spatial --model nano
    accelerate launch --num_processes 4 algorithms/ppo_gr00t.py --num-envs 256 --minibatch-size 1024
All sizes are global: they are divided over the processes, and a size that does not divide is an error.

What differs from RLinf's recipe for the same model: one denoising step is noised per sample instead of per batch;
log-probabilities are fp32; truncation bootstraps; minibatches are reshuffled every epoch; a non-finite gradient
stops the run.

Metrics: `actor/*` and `rollout/*` are means over an iteration's minibatches or decisions, `env/*` over the episodes
that ended in the iteration (`env/success_once`: success at any step of the episode), `time/*_s` seconds per phase,
`charts/SPS` environment steps per second of the whole loop.
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
from torch import Tensor, nn

from algorithms.arguments import exact_quotient, parse_args, share_of_process
from algorithms.batch import concatenate, index
from algorithms.episodes import Episode, episode_metrics, finished_episodes
from algorithms.eval_gr00t import evaluate_into
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
    run_name: str = "ppo_{suite}_{seed}"
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
    """Parallel environments over all processes."""
    num_steps: int = 48
    """Decisions per environment and iteration; 48 chunks of 5 steps are one LIBERO-Spatial horizon."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes (C)."""
    horizon: int | None = None
    """Environment steps before truncation; the suite's own if not given."""
    reward: Literal["sparse", "relative"] = "sparse"
    """Sparse: 1 at success. Relative: the change of success from the step before."""
    reward_scale: float = 1.0
    """Factor on rewards before advantages are computed."""
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
    critic_detach: bool = True
    """Keep the value loss's gradient out of the policy's trunk."""

    # --- optimisation ---
    learning_rate: float = 5e-6
    """AdamW's step size for the policy."""
    value_learning_rate: float = 1e-4
    """AdamW's step size for the value head."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    update_epochs: int = 4
    """Passes over each iteration's decisions."""
    minibatch_size: int = 1024
    """Decisions per optimiser step over all processes."""
    micro_batch_size: int = 1024
    """Decisions per forward pass over all processes; smaller ones accumulate gradients."""
    norm_adv: bool = True
    """Normalise advantages over the iteration's decisions of all processes."""
    clip_coef: float = 0.2
    """Lower clip of the ratio: 1 - clip_coef."""
    clip_coef_high: float | None = None
    """Upper clip of the ratio: 1 + clip_coef_high; clip_coef if not given."""
    dual_clip: float | None = None
    """Bound on ratio * |A| for A < 0 (usually 3); off if not given."""
    value_clip: float = 0.2
    """Clip of the value's change within an iteration."""
    huber_delta: float = 10.0
    """Where the value loss turns from quadratic to linear."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus (closed form)."""
    target_kl: float | None = None
    """End an iteration's update when the approximate KL exceeds this."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""
    max_ratio_deviation: float = 0.05
    """Stop if the first minibatch's ratio differs from 1 by more: old and new log-probabilities disagree."""

    @property
    def clip_high(self) -> float:
        """Upper clip of the ratio."""
        return self.clip_coef if self.clip_coef_high is None else self.clip_coef_high

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


PRESETS: dict[str, Args] = {
    "demo": Args(
        run_name="demo", num_iterations=3, num_envs=4, num_steps=24, horizon=120, minibatch_size=32,
        micro_batch_size=32, update_epochs=2, eval_episodes_per_task=1, learning_rate=3e-5,
    ),
}  # fmt: skip
METRICS = (
    "actor/loss", "actor/value_loss", "actor/entropy", "actor/approx_kl", "actor/pg_clipfrac",
    "actor/value_clip_ratio", "actor/grad_norm", "rollout/returns_mean", "rollout/advantages_mean",
)  # fmt: skip


def make_envs(
    args: Args, num_envs: int, image_size: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments whose observations carry GR00T's modality keys."""
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0", num_envs=num_envs, vectorization_mode="vector_entry_point",
        task_ids=args.task_ids, num_action_chunks=args.num_action_chunks, image_size=image_size,
        horizon=args.horizon, reward=args.reward, renderer=args.renderer, autoreset_mode=autoreset_mode,
    )  # fmt: skip
    return ModalityVectorObservation(envs)


def make_agent(args: Args) -> Gr00tAgent:
    """Returns the agent that `args` ask for, on the CPU."""
    return Gr00tAgent.load(
        args.model, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps,
        noise_method=args.noise_method, noise_level=args.noise_level, logprob_level=args.logprob_level,
        critic_detach=args.critic_detach, train_backbone=args.train_backbone,
    )  # fmt: skip


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


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float, huber_delta: float
) -> tuple[Tensor, Tensor]:
    """Returns the clipped Huber loss of each value [B] and a bool mask, True where the clipped branch was active."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    plain = nn.functional.huber_loss(values, returns, reduction="none", delta=huber_delta)
    clipped = nn.functional.huber_loss(clipped_values, returns, reduction="none", delta=huber_delta)
    return torch.maximum(plain, clipped), clipped > plain


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Returns 1 - Var[returns - values] / Var[returns]; NaN or -inf where the returns do not vary."""
    return (1 - (returns - values).var() / returns.var()).item()


def main(
    args: Args, make_agent: Callable[..., Any] = make_agent, make_envs: Callable[..., Any] = make_envs
) -> dict[str, float]:
    """Trains, evaluates, and returns the last iteration's metrics.

    `make_agent` and `make_envs` are the two places to plug in something else. An agent is a module with
    `forward(obs, action=None)` and `get_action_and_value` alike `-> action, logprob, entropy, value`, `get_value`,
    `predict`, `param_groups`, `image_size`, `save_pretrained`, and `encode`, which turns an observation into what is
    stored of it (a frozen backbone's features). Its action is a NamedTuple of tensors that has an `env_action`.
    """
    accelerator = Accelerator(log_with=list(args.log_with) or None, project_dir=str(args.output_dir))
    device, num_processes = accelerator.device, accelerator.num_processes
    num_envs, micro_batch_size = (share_of_process(args, n, num_processes) for n in ("num_envs", "micro_batch_size"))
    num_micro_batches = args.num_micro_batches
    run = RunFolder.create(args, accelerator)
    set_seed(args.seed)
    agent = make_agent(args).to(device).eval()
    envs = make_envs(args, num_envs, agent.image_size)
    set_seed(args.seed, device_specific=True)
    generator = np.random.default_rng((args.seed, accelerator.process_index))
    groups = agent.param_groups(args.learning_rate, args.value_learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(agent, optimizer)
    num_updates, show = args.update_epochs * args.num_minibatches, accelerator.is_main_process
    progress = TrainingProgress(args.num_iterations, args.num_steps, num_updates, enabled=show)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return make_envs(args, num_envs, agent.image_size, AutoresetMode.DISABLED)

    obs, _ = envs.reset(seed=args.seed + 1_000_003 * accelerator.process_index)
    with accelerator.autocast():
        next_obs = agent.encode(obs)
    metrics: dict[str, float] = {}
    global_step = 0
    with progress:
        for iteration in range(1, args.num_iterations + 1):
            # --- rollout: K decisions in N environments ---
            rollout_start = time.perf_counter()
            env_s, env_steps = 0.0, 0
            episodes: list[Episode] = []
            storage: dict[str, list[Any]] = {}
            for _ in range(args.num_steps):
                with torch.no_grad(), accelerator.autocast():
                    action, logprob, _, value = agent.get_action_and_value(next_obs)
                env_action = action.env_action.cpu().numpy()
                env_start = time.perf_counter()
                obs, reward, terminated, truncated, infos = envs.step(env_action)
                env_s += time.perf_counter() - env_start
                env_steps += int(infos["num_steps"].sum())
                final_value = torch.zeros_like(value)
                if truncated.any():
                    rows = np.flatnonzero(truncated)
                    with torch.no_grad(), accelerator.autocast():
                        final_value[rows] = agent.get_value(index(infos["final_obs"], rows))
                step = dict(obs=next_obs, action=action, logprob=logprob, value=value, final_value=final_value)
                for name, array in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
                    step[name] = torch.as_tensor(array, device=device)
                for name, item in step.items():
                    storage.setdefault(name, []).append(item)
                with accelerator.autocast():
                    next_obs = agent.encode(obs)
                episodes += finished_episodes(infos, terminated | truncated)
                progress.decision([e.success for e in episodes], env_steps / (time.perf_counter() - rollout_start))
            global_step += env_steps * num_processes

            # --- advantages ---
            with torch.no_grad(), accelerator.autocast():
                last_value = agent.get_value(next_obs)
            values = torch.stack(storage["value"])  # [K, N]
            rewards = torch.stack(storage["reward"]).float() * args.reward_scale
            terminated, truncated = torch.stack(storage["terminated"]), torch.stack(storage["truncated"])
            next_values = torch.cat([values[1:], last_value[None]])
            next_values = torch.where(truncated, torch.stack(storage["final_value"]), next_values)
            advantages, returns = compute_gae(
                rewards, values, next_values, terminated, terminated | truncated, args.gamma, args.gae_lambda
            )
            b_obs, b_actions, b_logprobs = (concatenate(storage[name]) for name in ("obs", "action", "logprob"))
            b_values, b_returns, b_advantages = values.flatten(), returns.flatten(), advantages.flatten()
            if args.norm_adv:
                moments = torch.stack([b_advantages.mean(), b_advantages.square().mean()])
                mean, square = accelerator.reduce(moments, "mean")
                b_advantages = (b_advantages - mean) / ((square - mean**2).clamp(min=0).sqrt() + 1e-5)

            # --- update ---
            update_start = time.perf_counter()
            orders = [generator.permutation(len(b_values)) for _ in range(args.update_epochs)]
            minibatches = np.concatenate(orders).reshape(-1, num_micro_batches, micro_batch_size)
            history: list[Tensor] = []
            ratio_deviation = 0.0
            for minibatch in minibatches:
                stats: list[Tensor] = []
                for micro, inds in enumerate(minibatch):
                    adv, ret, old_value = (index(x, inds) for x in (b_advantages, b_returns, b_values))
                    with nullcontext() if micro == num_micro_batches - 1 else accelerator.no_sync(model):
                        with accelerator.autocast():
                            _, logprob, entropy, value = model(index(b_obs, inds), index(b_actions, inds))
                        logratio = logprob - index(b_logprobs, inds)
                        pg, pg_clipped = policy_loss(logratio, adv, args.clip_coef, args.clip_high, args.dual_clip)
                        vf, vf_clipped = value_loss(value, old_value, ret, args.value_clip, args.huber_delta)
                        loss = pg.mean() + args.vf_coef * vf.mean() - args.ent_coef * entropy.mean()
                        accelerator.backward(loss / num_micro_batches)
                    ratio = logratio.detach().exp()
                    terms = (pg, vf, entropy, (ratio - 1) - logratio, pg_clipped.float(), vf_clipped.float())
                    stats.append(torch.stack([term.detach().mean() for term in terms]))
                    if not history:
                        ratio_deviation = max(ratio_deviation, accelerator.gather((ratio - 1).abs().max()).max().item())
                if not ratio_deviation <= args.max_ratio_deviation:
                    raise RuntimeError(
                        f"first minibatch's ratio is off 1 by {ratio_deviation:.3g} (max {args.max_ratio_deviation}): "
                        "log-probabilities at rollout and at update differ; check dropout, dtype and noise settings"
                    )
                grad_norm = accelerator.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                run.check_finite(grad_norm, iteration, logratio=logratio, advantages=adv, returns=ret, values=value)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.append(accelerator.reduce(torch.cat([torch.stack(stats).mean(0), grad_norm[None]]), "mean"))
                progress.update()
                if args.target_kl is not None and history[-1][METRICS.index("actor/approx_kl")] > args.target_kl:
                    break

            # --- log, save, evaluate ---
            total_s = time.perf_counter() - rollout_start
            rollout_means = accelerator.reduce(torch.stack([returns.mean(), advantages.mean()]), "mean").tolist()
            means = [*torch.stack(history).mean(0).tolist(), *rollout_means]
            metrics = dict(zip(METRICS, means, strict=True)) | {
                "actor/ratio_first_minibatch_max_dev": ratio_deviation,
                "actor/explained_variance": explained_variance(b_values, b_returns),
                "actor/lr": optimizer.param_groups[0]["lr"],
                "time/env_s": env_s, "time/policy_s": update_start - rollout_start - env_s,
                "time/update_s": time.perf_counter() - update_start, "time/total_s": total_s,
                "charts/SPS": env_steps * num_processes / total_s,
            } | episode_metrics(episodes, accelerator)  # fmt: skip
            last = iteration == args.num_iterations
            if last or iteration % args.save_interval == 0:
                run.save_agent(agent, f"iteration_{iteration}")
            if args.eval_episodes_per_task and (last or (args.eval_interval and iteration % args.eval_interval == 0)):
                progress.print("evaluating")
                metrics["eval/success_once"] = evaluate_into(run.path, iteration, agent, make_eval_envs, args)
            run.log(metrics, global_step, iteration)
            progress.end_iteration(
                f"success {metrics.get('env/success_once', math.nan):.1%}  loss {metrics['actor/loss']:.4f}  "
                f"value loss {metrics['actor/value_loss']:.4f}  kl {metrics['actor/approx_kl']:.2g}  "
                f"{metrics['charts/SPS']:.0f} env-steps/s"
            )
    envs.close()
    run.finish()
    if accelerator.is_main_process:
        print(run.summary(f"iteration_{args.num_iterations}", args.suite))
    return metrics


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__))
