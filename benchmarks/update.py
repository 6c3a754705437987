"""How fast PPO's update is with cached backbone features and without: a table, then one JSON line.

    python -m benchmarks.update                          # released size on a GPU, nano on a CPU
    python -m benchmarks.update --preset nano --num-rows 64

An update goes once over a rollout's decisions in minibatches: fetch the observations from the feature store, score the
stored chains, PPO's loss, backward, clip, AdamW. What differs is where the store keeps the frozen backbone's features:
    * none: nowhere; every minibatch runs the backbone (the order of work of a trainer that stores observations);
    * device, host: all in the device's memory, or all in (pinned) host memory;
    * mixed: half on the device, half in host memory;
    * device, VL: all on the device, and with them what the VL self-attention makes of them, which is not trained then.
Step sizes are 0, so that all see the same weights: losses that do not agree (`benchmarks.iterations.check_losses`) end
it. Weights are random; the time does not depend on them. Ratios are of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from algorithms.common.args import largest_divisor
from algorithms.common.batch import concatenate, index
from algorithms.common.features import FeatureStore, Placement
from algorithms.common.frozen import store_frozen_as
from algorithms.ppo_gr00t import policy_loss, value_loss
from benchmarks import iterations
from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals
from benchmarks.policy import make_agent, make_observation, seconds, targets_apply
from benchmarks.publish import Table, judge, publish
from gr00t_agent import Gr00tAgent, preset_policy
from gr00t_agent.config import PresetName
from gr00t_agent.weights import to_device

# Where features are kept, and whether the VL self-attention is trained.
VARIANTS: dict[str, tuple[Placement, bool]] = {
    "none": ("none", True),
    "device": ("device", True),
    "host": ("host", True),
    "mixed": ("mixed", True),
    "device, VL": ("device", False),
}
# For the released size on a GPU, see `benchmarks.policy.targets_apply`.
TARGETS = {"cached_speedup": 2.0}


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Stored decisions: rows of the store, and actions, log-probabilities, values and advantages of each."""

    store: FeatureStore
    batch: dict[str, Any]


def collect(
    agent: Gr00tAgent, placement: Placement, memory_gb: float, num_rows: int, num_envs: int
) -> tuple[Rollout, float]:
    """Returns a rollout of random observations, and the bytes that one decision takes in the store."""
    encode = torch.no_grad()(agent.encode)
    store = FeatureStore(encode, agent.device, placement, memory_gb)
    generator = torch.Generator().manual_seed(0)
    decisions: list[dict[str, Any]] = []
    row_bytes = 0.0
    for decision in range(num_rows // num_envs):
        obs = make_observation(num_envs, agent.image_size, seed=decision)  # rows in each other's place show
        encoded = encode(obs)
        row_bytes = sum(value[0].nbytes for value in encoded.values())
        with torch.no_grad():
            action, logprob, _, value = agent(encoded, generator=[generator] * num_envs)
        decisions.append(dict(row=store.put(obs, encoded), action=action, logprob=logprob, value=value))
    batch = concatenate(decisions)
    batch["advantage"] = torch.randn(num_rows, generator=generator).to(agent.device)
    return Rollout(store=store, batch=batch), row_bytes


def make_update(agent: Gr00tAgent, rollout: Rollout, minibatch_size: int) -> tuple[Callable[[], None], list[float]]:
    """Returns a function that makes an update, and the list to which it adds the loss of each minibatch."""
    groups = agent.param_groups(0.0, 0.0)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    rows = np.random.default_rng(0).permutation(len(rollout.batch["row"]))
    losses: list[float] = []

    def update() -> None:
        for part in cast("list[NDArray[np.intp]]", np.split(rows, len(rows) // minibatch_size)):
            b = index(rollout.batch, part)
            _, logprob, _, value = agent(rollout.store.get(b["row"]), b["action"])
            pg, _ = policy_loss(logprob - b["logprob"], b["advantage"], 0.2, 0.2, None)
            vf, _ = value_loss(value, b["value"], b["value"] + b["advantage"], 0.2, 10.0)
            loss = pg.mean() + vf.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())

    return update, losses


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=["nano", "gr00t_n1d5"], help="default: by device")
    parser.add_argument(
        "--num-rows", type=integer(at_least=1), help="decisions of the rollout (default: 1024 on a GPU, else 128)"
    )
    parser.add_argument("--num-envs", type=integer(at_least=1), help="environments (default: 64 on a GPU, else 8)")
    parser.add_argument("--minibatch-size", type=integer(at_least=1), help="default: 64 on a GPU, else 32")
    parser.add_argument("--repeats", type=integer(at_least=1), default=3)
    args = parser.parse_args()
    with refusals(parser):
        device = to_device(args.device)
    on_gpu = device.type == "cuda"
    preset: PresetName = args.preset or ("gr00t_n1d5" if on_gpu else "nano")
    num_rows = args.num_rows or (1024 if on_gpu else 128)
    num_envs = args.num_envs or (64 if on_gpu else 8)
    minibatch_size = args.minibatch_size or (64 if on_gpu else 32)
    for name, part in (("--num-envs", num_envs), ("--minibatch-size", minibatch_size)):
        if num_rows % part:
            parser.error(
                f"{name} {part} does not divide --num-rows {num_rows}: give for example "
                f"{name} {largest_divisor(num_rows, part)}"
            )
    policy = replace(preset_policy(preset), embodiment_id=0, compute_dtype="bfloat16" if on_gpu else "float32")
    agent = make_agent(preset, policy, device, torch.float32)
    results: list[dict[str, Any]] = []
    losses_of: dict[str, list[float]] = {}
    difference = row_bytes = 0.0
    for name, (placement, trains_vl) in VARIANTS.items():
        agent.set_trainable(**(agent.trainable | {"tune_vl_self_attention": trains_vl}))
        store_frozen_as(agent, policy.torch_dtype)
        # Half of the rows fit where the store is mixed.
        memory_gb = num_rows * row_bytes / 2e9 if placement == "mixed" else 1e3
        rollout, row_bytes = collect(agent, placement, memory_gb, num_rows, num_envs)
        update, losses_of[name] = make_update(agent, rollout, minibatch_size)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        update_s = seconds(update, device, args.repeats, warmup=1)
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        difference = max(difference, iterations.check_losses(name, losses_of[name], losses_of["none"]))
        results.append(dict(kept=name, samples_per_s=num_rows / update_s, peak_memory_gb=peak_gb))
        del rollout, update
    table = Table({"features kept": "<16", "samples/s": ">12.1f", "times none": ">12.2f", "peak GB": ">10.1f"})
    for row in results:
        row["speedup"] = row["samples_per_s"] / results[0]["samples_per_s"]
        table.add(row["kept"], row["samples_per_s"], row["speedup"], row["peak_memory_gb"])
    print(f"{row_bytes / 1e6:.2f} MB a decision; losses differ by at most {difference:.2g}")
    settings = dict(
        preset=preset,
        device=args.device,
        num_rows=num_rows,
        num_envs=num_envs,
        minibatch_size=minibatch_size,
        repeats=args.repeats,
        compute_dtype=policy.compute_dtype,
        num_threads=torch.get_num_threads(),
        row_bytes=row_bytes,
        largest_loss_difference=difference,
    )
    speedup = {"cached_speedup": max(row["speedup"] for row in results[:-1])}  # the same computation
    targets = judge(speedup, at_least=TARGETS) if targets_apply(preset, device) else {}
    return publish("update", results, settings=settings, targets=targets, output=args.output)


if __name__ == "__main__":
    launch_benchmark(main)
