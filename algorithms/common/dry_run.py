"""What a run would be and how long it would take, by one decision and one piece of an update: `--dry-run`."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from algorithms.common.batch import index
from algorithms.common.randomness import EPISODES, NOISE, generators_of, seed_of

# Decisions of the piece of an update that is measured, at most.
MAX_MEASURED = 64


def measure(
    args: Any,
    accelerator: Accelerator,
    agent: Any,
    make_stage: Callable[[int], gym.vector.VectorEnv],
    *,
    sizes: Mapping[str, int],
    decisions: int,
    passes: int,
) -> dict[str, float]:
    """Prints the sizes of a run, its memory and its time, and returns what was measured of the latter two.

    Environments and agent are made as the run makes them, and take one decision to warm up (scenes are opened and
    kernels compiled) and one whose time is taken. Then the gradient of one micro-batch, of `MAX_MEASURED` decisions at
    most, is computed twice, and the second time taken. Nothing is trained or written. Evaluations are left out, and so
    is what stages overlap.

    Args:
        args: a trainer's arguments.
        accelerator: of this process.
        agent: on its device.
        make_stage: makes so many environments.
        sizes: what to print, by name.
        decisions: of an iteration over all processes, at most.
        passes: how often an iteration's decisions go through the network in its update, at most.

    Returns:
        `env_steps_per_s` and `decision_s` of one decision in all environments, `rollout_s`, `update_s` of an iteration,
        `total_s` of the run, `memory_gb` and `features_gb`, 10^9 bytes, of a process.
    """
    device, num_processes = accelerator.device, accelerator.num_processes
    num_envs, env_ids = args.num_envs // num_processes, range(args.num_envs // num_processes)
    with closing(make_stage(num_envs)) as envs:
        seeds: Any = [seed_of(args.seed, EPISODES, 0, env_id) for env_id in env_ids]
        obs, _ = envs.reset(seed=seeds)
        features: Any = None
        action: Any = None
        env_steps, env_s, decision_s = 0, 0.0, 0.0
        for step in range(2):
            generators = generators_of((args.seed, NOISE, 0, step), env_ids)
            start = _now(device)
            with torch.no_grad(), accelerator.autocast():
                features = agent.encode(obs)
                action, *_ = agent(features, generator=generators)
            chosen = action.env_action.cpu().numpy()
            middle = _now(device)
            obs, _, _, _, infos = envs.step(chosen)
            decision_s, env_s = middle - start, _now(device) - middle
            env_steps = int(infos["num_steps"].sum())
    memory = _memory_gb(device)

    count = min(num_envs, args.micro_batch_size // num_processes, MAX_MEASURED)
    inds = np.arange(count)
    update_s = 0.0
    for _ in range(2):
        start = _now(device)
        with accelerator.autocast():
            _, logprob, _, value = agent(index(features, inds), index(action, inds))
        loss = logprob.float().sum() + value.float().sum()
        loss.backward()
        agent.zero_grad(set_to_none=True)
        update_s = _now(device) - start

    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    feature_bytes = sum(x.nbytes for x in features.values() if isinstance(x, Tensor)) / num_envs
    features_gb = feature_bytes * decisions / num_processes / 1e9
    if args.feature_storage == "none":
        features_gb = 0.0
    elif args.feature_storage != "mixed":
        features_gb = min(features_gb, args.feature_memory_gb)
    measured = {
        "env_steps_per_s": num_processes * env_steps / (decision_s + env_s),
        "decision_s": decision_s,
        "rollout_s": (decision_s + env_s) * math.ceil(decisions / args.num_envs),
        "update_s": update_s / count * decisions / num_processes * passes,
        "features_gb": features_gb,
        # Gradients and AdamW's two moments, float32, are added to what decisions have taken.
        "memory_gb": max(memory, _memory_gb(device)) + 12 * trained / 1e9 + features_gb,
    }
    measured["total_s"] = args.num_iterations * (measured["rollout_s"] + measured["update_s"])
    if accelerator.is_main_process:
        parameters = {"parameters": sum(p.numel() for p in agent.parameters()), "of these trained": trained}
        for name, size in {"processes": num_processes, **sizes, **parameters}.items():
            print(f"{name:28} {size:>14,}")
        place = "GPU memory" if device.type == "cuda" else "memory"
        print(
            f"{place + ' of a process':28} {measured['memory_gb']:>11.2f} GB  estimated, features {features_gb:.2f} GB"
        )
        print(f"{'env-steps/s in a rollout':28} {measured['env_steps_per_s']:>14,.0f}  measured over one decision")
        print(f"{'decision of all environments':28} {1000 * decision_s:>11.0f} ms  and {1000 * env_s:.0f} ms stepping")
        print(f"{'rollout':28} {measured['rollout_s']:>12.1f} s")
        print(f"{'update':28} {measured['update_s']:>12.1f} s  from the gradient of {count} decisions")
        print(f"{'time to the end':28} {_clock(measured['total_s']):>14}  without evaluations")
    return measured


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory_gb(device: torch.device) -> float:
    """Returns the largest memory that the process has taken: of the GPU's, if it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
