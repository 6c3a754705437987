"""PPO and GRPO learn a real LIBERO task that begins near its end: success before and after, a table, one JSON line.

    python -m benchmarks.learning --seeds 1 2 3

The task is `libero_goal` task 0, "open the middle drawer of the cabinet", with LIBERO's own physics, controller and
goal. Episodes begin where a scripted expert stands some steps before success: the hand holds the handle and the drawer
is partly open; what is left is to go on pulling without letting go. The policy sees the proprioceptive state, no
images; it is a velocity network of two hidden layers under the flow sampler that the GR00T agent uses
(`algorithms.common.state_agent`), with random weights, so its first actions are noise. The trainers are those of
`algorithms/` with their `demo` presets, except for the number of iterations.

Before: success rate in the first iteration, when the policy is untouched. After: in the last three iterations, with
exploration noise. So there are four iterations at least.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common.episodes import wilson_interval
from benchmarks.command_line import LARGEST_SEED, integer, launch_benchmark, make_parser
from benchmarks.publish import Table, judge, publish

# Iterations that tell what was learned.
NUM_LAST = 3
# Of the seed that fares worst, for each algorithm.
AT_LEAST = {"after": 0.9}
AT_MOST = {"before": 0.5, "cpu_minutes": 10.0}

# The trainers' `demo` presets, longer, and looked at as they train.
PPO_ARGS = replace(
    ppo_gr00t.PRESETS["demo"], num_iterations=30, eval_before=False, eval_episodes_per_task=0, log_with=()
)
GRPO_ARGS = replace(
    grpo_gr00t.PRESETS["demo"], num_iterations=35, eval_before=False, eval_episodes_per_task=0, log_with=()
)


def train(algorithm: Literal["ppo", "grpo"], seed: int, folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Trains and returns the metrics of each iteration."""
    trainer, args = (ppo_gr00t, PPO_ARGS) if algorithm == "ppo" else (grpo_gr00t, GRPO_ARGS)
    args = replace(cast(Any, args), seed=seed, output_dir=folder, run_name="{seed}", **changes)
    trainer.main(args)
    lines = (folder / str(seed) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def success_of(lines: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """Returns successes and episodes of some iterations."""
    episodes = sum(line["env/num_episodes"] for line in lines)
    return round(sum(line["env/success_once"] * line["env/num_episodes"] for line in lines)), round(episodes)


def worst_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns each algorithm's targets with what its worst seed reached."""
    targets: dict[str, Any] = {}
    for algorithm in dict.fromkeys(row["algorithm"] for row in results):
        rows = [row for row in results if row["algorithm"] == algorithm]
        values = {
            "after": min(row["after"][0] / row["after"][1] for row in rows),
            "before": max(row["before"][0] / row["before"][1] for row in rows),
            "cpu_minutes": max(row["cpu_minutes"] for row in rows),
        }
        judged = judge(values, at_least=AT_LEAST, at_most=AT_MOST)
        targets |= {f"{algorithm}/{name}": target for name, target in judged.items()}
    return targets


def main() -> dict[str, Any]:
    """Trains with each algorithm and seed, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", choices=["ppo", "grpo"], default=["ppo", "grpo"])
    parser.add_argument("--seeds", type=integer(at_least=0, at_most=LARGEST_SEED), nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--num-iterations",
        type=integer(at_least=1 + NUM_LAST),
        help=f"default: {PPO_ARGS.num_iterations} of PPO, {GRPO_ARGS.num_iterations} of GRPO",
    )
    args = parser.parse_args()
    defaults = {"ppo": PPO_ARGS.num_iterations, "grpo": GRPO_ARGS.num_iterations}
    num_iterations = {algorithm: args.num_iterations or defaults[algorithm] for algorithm in args.algorithms}
    results: list[dict[str, Any]] = []
    for algorithm in args.algorithms:
        for seed in args.seeds:
            with TemporaryDirectory() as folder:
                start, cpu = time.perf_counter(), time.process_time()
                lines = train(algorithm, seed, Path(folder), num_iterations=num_iterations[algorithm])
                lines = [line for line in lines if "env/success_once" in line]
                wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
            good = (line["iteration"] for line in lines if line["env/success_once"] >= 0.9)
            results.append(
                dict(
                    algorithm=algorithm,
                    seed=seed,
                    before=success_of(lines[:1]),
                    after=success_of(lines[-NUM_LAST:]),
                    env_steps=lines[-1]["global_step"],
                    first_iteration_at_90_percent=next(good, None),
                    cpu_minutes=cpu_s / 60,
                    wall_minutes=wall_s / 60,
                    curve=[round(line["env/success_once"], 3) for line in lines],
                )
            )
    print()
    table = Table(
        {
            "": "<6",
            "seed": ">5",
            "before": ">18",
            "after": ">27",
            ">= 90 % at": ">12",
            "env-steps": ">11",
            "CPU min": ">9.1f",
        }
    )
    for row in results:
        (low, high), after = wilson_interval(*row["after"]), row["after"][0] / row["after"][1]
        table.add(
            row["algorithm"],
            row["seed"],
            f"{row['before'][0] / row['before'][1]:.1%} of {row['before'][1]}",
            f"{after:.1%} ({low:.1%} - {high:.1%})",
            row["first_iteration_at_90_percent"] or "never",
            row["env_steps"],
            row["cpu_minutes"],
        )
    names = ("suite", "task_ids", "steps_before_success", "num_near_goal_states", "horizon")
    settings = {name: getattr(PPO_ARGS, name) for name in names} | {"num_iterations": num_iterations}
    return publish("learning", results, settings=settings, targets=worst_seeds(results), output=args.output)


if __name__ == "__main__":
    launch_benchmark(main)
