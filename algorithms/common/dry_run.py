"""What a run would be and how long it would take, by one decision and one piece of an update: `--dry-run`."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from algorithms.common.args import STATE_MODEL, check_agent_takes
from algorithms.common.batch import index
from algorithms.common.randomness import EPISODES, NOISE, generators_of, seed_of

# Decisions of the piece of an update that is measured on a CPU, at most. A GPU computes a few decisions hardly faster
# than a whole micro-batch, and it is the micro-batch that has to fit into its memory.
MAX_ON_CPU = 64


def measure_run(
    args: Any, accelerator: Accelerator, make_agent: Callable[..., Any], make_envs: Callable[..., Any], **plan: Any
) -> dict[str, float]:
    """Makes agent and environments as a trainer does, and measures its run.

    Args:
        args: a trainer's arguments.
        accelerator: of this process.
        make_agent: the trainer's, or one's own.
        make_envs: likewise.
        plan: `sizes`, `decisions` and `passes` of `measure`.

    Raises:
        ValueError: as `measure`, or `args` ask for what the agent cannot do.
    """
    set_seed(args.seed)
    agent = make_agent(args).to(accelerator.device).eval()
    check_agent_takes(agent, args)
    observed_size = 0 if args.model == STATE_MODEL else agent.image_size
    return measure(args, accelerator, agent, lambda num_envs: make_envs(args, num_envs, observed_size), **plan)


def measure(
    args: Any,
    accelerator: Accelerator,
    agent: Any,
    make_stage: Callable[[int], gym.vector.VectorEnv],
    *,
    sizes: Mapping[str, int],
    decisions: int,
    passes: Sequence[float],
) -> dict[str, float]:
    """Prints the sizes of a run, its memory and its time, and returns what was measured of the latter two.

    Environments and agent are made as the run makes them, and take one decision to warm up (scenes are opened and
    kernels compiled) and one whose time is taken. Then the gradient of one micro-batch, on a CPU of `MAX_ON_CPU`
    decisions at most, is computed twice, and the second time taken; where it has more decisions than there are
    environments, these are repeated. Nothing is trained or written. Evaluations are left out, and so is what stages
    overlap.

    Args:
        args: a trainer's arguments.
        accelerator: of this process.
        agent: on its device.
        make_stage: makes so many environments.
        sizes: what to print, by name.
        decisions: of an iteration over all processes, at most.
        passes: how often each iteration's decisions go through the network in its update, at most.

    Returns:
        `env_steps_per_s` and `decision_s` of one decision in all environments, `rollout_s` of an iteration, `update_s`
        of the last one, `total_s` of the run; of a process, 10^9 bytes, `memory_gb` of its GPU, and `features_gb` of
        that for encoded observations, and `host_memory_gb` and `host_features_gb`. Without a GPU the former two are of
        the host.

    Raises:
        ValueError: a micro-batch does not fit into the GPU's memory.
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

    count = args.micro_batch_size // num_processes
    if device.type == "cpu":
        count = min(count, MAX_ON_CPU)
    inds = np.arange(count) % num_envs
    update_s = 0.0
    try:
        for _ in range(2):
            start = _now(device)
            scored = index(action, inds)
            options: dict[str, Any] = {}
            if args.imitation_coef:  # any draws take as long
                steps = torch.zeros(count, dtype=torch.int64, device=device)
                options["flow_draws"] = [torch.zeros_like(scored.chain[:, -1]), steps]
            with accelerator.autocast():
                _, logprob, _, value, *flow_errors = agent(index(features, inds), scored, **options)
            loss = torch.stack([x.float().sum() for x in (logprob, value, *flow_errors)]).sum()
            loss.backward()
            agent.zero_grad(set_to_none=True)
            update_s = _now(device) - start
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"micro_batch_size={args.micro_batch_size}: the gradient of {count} decisions does not fit into the memory "
            f"of {device} ({error}); give a smaller --micro-batch-size, which makes the same minibatches"
        ) from error

    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    feature_bytes = sum(x.nbytes for x in features.values() if isinstance(x, Tensor)) / num_envs
    all_gb = feature_bytes * decisions / num_processes / 1e9
    features_gb, host_features_gb = kept_features(args.feature_storage, args.feature_memory_gb, all_gb)
    # What is not kept waits as the observation that it came from, where the environments have left it.
    encoded_anew = 1 - (features_gb + host_features_gb) / all_gb if all_gb else 0.0
    waiting_gb, host_waiting_gb = (
        encoded_anew * num_bytes / num_envs * decisions / num_processes / 1e9 for num_bytes in _bytes_of(obs)
    )
    # Gradients and AdamW's two moments, float32, are added to what decisions have taken.
    memory_gb = max(memory, _memory_gb(device)) + 12 * trained / 1e9 + features_gb + waiting_gb
    host_memory_gb = _memory_gb(torch.device("cpu")) + host_features_gb + host_waiting_gb
    if device.type == "cpu":
        memory_gb += host_features_gb + host_waiting_gb
        features_gb += host_features_gb
        host_memory_gb, host_features_gb = memory_gb, features_gb
    pass_s = update_s / count * decisions / num_processes
    measured = {
        "env_steps_per_s": num_processes * env_steps / (decision_s + env_s),
        "decision_s": decision_s,
        "rollout_s": (decision_s + env_s) * math.ceil(decisions / args.num_envs),
        "update_s": passes[-1] * pass_s,
        "features_gb": features_gb,
        "memory_gb": memory_gb,
        "host_features_gb": host_features_gb,
        "host_memory_gb": host_memory_gb,
    }
    measured["total_s"] = len(passes) * measured["rollout_s"] + sum(passes) * pass_s
    if accelerator.is_main_process:
        parameters = {"parameters": sum(p.numel() for p in agent.parameters()), "of these trained": trained}
        for name, size in {"processes": num_processes, **sizes, **parameters}.items():
            print(f"{name:28} {size:>14,}")
        places = {"memory": ""} if device.type == "cpu" else {"GPU memory": "", "host memory": "host_"}
        for place, prefix in places.items():
            gb, of_features = measured[f"{prefix}memory_gb"], measured[f"{prefix}features_gb"]
            print(f"{place + ' of a process':28} {gb:>11.2f} GB  estimated, features {of_features:.2f} GB")
        print(f"{'env-steps/s in a rollout':28} {measured['env_steps_per_s']:>14,.0f}  measured over one decision")
        print(f"{'decision of all environments':28} {1000 * decision_s:>11.0f} ms  and {1000 * env_s:.0f} ms stepping")
        print(f"{'rollout':28} {measured['rollout_s']:>12.3f} s")
        updates = {"update": passes[-1]}
        if passes[0] != passes[-1]:
            updates = {"first update": passes[0], "last update": passes[-1]}
        for name, times in updates.items():
            print(f"{name:28} {times * pass_s:>12.3f} s  from the gradient of {count} decisions")
        print(f"{'time to the end':28} {_clock(measured['total_s']):>14}  without evaluations")
    return measured


def kept_features(storage: str, budget_gb: float, all_gb: float) -> tuple[float, float]:
    """Returns how much of `all_gb` of encoded observations lies on the device, and how much in host memory.

    Args:
        storage: `feature_storage`.
        budget_gb: `feature_memory_gb`.
        all_gb: of an iteration's decisions.
    """
    within = min(all_gb, budget_gb)
    kept = {"device": (within, 0.0), "host": (0.0, within), "mixed": (within, all_gb - within), "none": (0.0, 0.0)}
    return kept[storage]


def _bytes_of(obs: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the bytes of an observation on a GPU, and in host memory."""
    on_gpu = [isinstance(x, Tensor) and x.device.type != "cpu" for x in obs.values()]
    sizes = list(zip(on_gpu, (x.nbytes for x in obs.values()), strict=True))
    return sum(size for is_on_gpu, size in sizes if is_on_gpu), sum(size for is_on_gpu, size in sizes if not is_on_gpu)


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
