"""How fast PPO trains end to end, and where the time goes: a table, then one JSON line.

    python -m benchmarks.train                        # the nano policy on LIBERO-Spatial
    python -m benchmarks.train --num-envs 128 --num-steps 12 --num-iterations 2

The same training three times, with `algorithms/ppo_gr00t.py`:
    * plain: the order of work of a straightforward trainer: images at every environment step, one environment step a
      call, observations stored and the backbone run again in every minibatch, deciding and simulating in turn;
    * cached: images once a decision, a chunk of steps in one native call, backbone features computed once;
    * overlapped: the same, with two stages of environments, one simulating while the other is decided.
Episodes, actions and losses are the same in all three; losses that are not (`benchmarks.iterations.check_losses`) end
it. The first iteration opens scenes and compiles kernels and is not counted. Minibatches are half of an iteration's
decisions, or the largest part that divides them. Ratios are of one run.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from algorithms import ppo_gr00t
from algorithms.ppo_gr00t import Args
from benchmarks import iterations
from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, suite_name
from benchmarks.publish import Table, judge, publish
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.vector import LiberoVectorEnv

TARGETS = {"best_speedup_over_plain": 2.0}
# Of a rollout's time over the longer of simulating and deciding alone, where a GPU decides.
OVERLAP_TARGETS = {"overlapped_over_longer_phase": 1.15}


class ImagesEveryStep(gym.vector.VectorWrapper):
    """A `LiberoVectorEnv` of single steps as one of chunks: every step is a call that draws every camera."""

    def __init__(self, args: Args, num_envs: int, image_size: int) -> None:
        self._base = LiberoVectorEnv(
            args.suite,
            num_envs,
            task_ids=args.task_ids,
            image_size=image_size,
            horizon=args.horizon,
            reward=args.reward,
            renderer=args.renderer,
            autoreset_mode=AutoresetMode.DISABLED,
        )
        super().__init__(self._base)
        shape = (num_envs, args.num_action_chunks, 7)
        self.action_space = gym.spaces.Box(-1.0, 1.0, shape, np.float32)

    def observe(self) -> dict[str, Any]:
        """Observes without stepping."""
        return self._base.observe()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Runs a chunk step by step, then starts the next episode where one has ended."""
        reward, num_steps = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        obs: dict[str, Any] = {}
        infos: dict[str, Any] = {}
        for action in np.moveaxis(actions, 1, 0):
            obs, r, te, tr, infos = self._base.step(action)
            reward, num_steps = reward + r, num_steps + infos["num_steps"]
            terminated, truncated = terminated | te, truncated | tr
        ended = terminated | truncated
        final: dict[str, Any] = {}
        if ended.any():
            final = {"final_obs": obs, "final_info": infos}
            obs, infos = self._base.reset(options={"reset_mask": ended})
        return obs, reward, terminated, truncated, infos | {"num_steps": num_steps} | final


def make_plain_envs(
    args: Args, num_envs: int, image_size: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> gym.vector.VectorEnv:
    """Returns environments that draw images at every step."""
    return ModalityVectorObservation(ImagesEveryStep(args, num_envs, image_size))


def measure(args: Args, make_envs: Any) -> list[dict[str, float]]:
    """Trains and returns the metrics of all iterations but the first."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ppo_gr00t.main(replace(args, output_dir=Path(folder), run_name="run"), make_envs=make_envs)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset's name or a checkpoint")
    count = integer(at_least=1)
    parser.add_argument("--suite", type=suite_name, default="libero_spatial")
    parser.add_argument("--num-envs", type=count, default=4, help="an even number: they are decided in two stages")
    parser.add_argument("--num-steps", type=count, default=8, help="decisions of each")
    parser.add_argument("--num-iterations", type=count, default=3, help="counted ones; one more comes first")
    parser.add_argument("--update-epochs", type=count, default=2)
    parser.add_argument("--micro-batch-size", type=count, default=64, help="at most")
    parser.add_argument("--renderer", choices=("egl", "osmesa", "warp"))
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    if options.num_envs % 2:
        parser.error(f"--num-envs {options.num_envs} cannot be decided in two stages: give an even number")
    with refusals(parser):
        args = iterations.resized(
            Args(
                model=options.model,
                suite=options.suite,
                num_iterations=options.num_iterations + 1,
                update_epochs=options.update_epochs,
                renderer=options.renderer,
                compute_dtype=options.compute_dtype,
                eval_episodes_per_task=0,
                log_with=(),
                save_interval=10**6,
                output_dir=Path(tempfile.gettempdir()),
            ),
            num_envs=options.num_envs,
            num_steps=options.num_steps,
            minibatch_size=options.num_envs * options.num_steps // 2,
            micro_batch_size=options.micro_batch_size,
        )
        variants = {
            "plain": (replace(args, feature_storage="none"), make_plain_envs),
            "cached": (args, ppo_gr00t.make_envs),
            "overlapped": (replace(args, pipeline_stage_num=2), ppo_gr00t.make_envs),
        }
        for changed, _ in variants.values():
            ppo_gr00t.check_args(changed)
    results: list[dict[str, Any]] = []
    losses: list[list[float]] = []
    for name, (changed, make_envs) in variants.items():
        lines = measure(changed, make_envs)
        losses.append([line["actor/loss"] for line in lines])
        row: dict[str, Any] = {"order": name, **iterations.summarise(lines)}
        row["largest_loss_difference"] = iterations.check_losses(name, losses[-1], losses[0])
        results.append(row)
    table = Table({"order of work": "<14", "env-steps/s": ">12.1f", "times plain": ">12.2f", **iterations.COLUMNS})
    for row in results:
        row["speedup"] = row["env_steps_per_s"] / results[0]["env_steps_per_s"]
        table.add(row["order"], row["env_steps_per_s"], row["speedup"], *iterations.cells(row))
    print("losses differ from plain by at most", *(f"{row['largest_loss_difference']:.2g}" for row in results[1:]))
    settings: dict[str, Any] = dict(
        model=args.model,
        suite=args.suite,
        num_envs=args.num_envs,
        num_steps=args.num_steps,
        num_action_chunks=args.num_action_chunks,
        num_iterations=options.num_iterations,
        update_epochs=args.update_epochs,
        minibatch_size=args.minibatch_size,
        micro_batch_size=args.micro_batch_size,
        renderer=args.renderer,
        compute_dtype=args.compute_dtype,
        num_threads=torch.get_num_threads(),
    )
    speedup = max(row["speedup"] for row in results)
    _, cached, overlapped = results
    overlap = (overlapped["total_s"] - overlapped["update_s"]) / max(cached["env_s"], cached["policy_s"])
    print(f"overlapped rollout over the longer of its phases alone: {overlap:.2f}")
    values = {"best_speedup_over_plain": speedup, "overlapped_over_longer_phase": overlap}
    targets = judge(values, at_least=TARGETS, at_most=OVERLAP_TARGETS)
    return publish("train", {"orders": results, **values}, settings=settings, targets=targets, output=options.output)


if __name__ == "__main__":
    launch_benchmark(main)
