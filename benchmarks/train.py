"""How fast PPO trains end to end, and where the time goes: a table, then one JSON line.

    python -m benchmarks.train                        # the nano policy on LIBERO-Spatial
    python -m benchmarks.train --num-envs 64 --num-steps 48 --image-size 256

The same training three times, with `algorithms/ppo_gr00t.py`:
    * plain: the order of work of a straightforward trainer: images at every environment step, one environment step a
      call, observations stored and the backbone run again in every minibatch, deciding and simulating in turn;
    * cached: images once a decision, a chunk of steps in one native call, backbone features computed once;
    * overlapped: the same, with two stages of environments, one simulating while the other is decided.
Episodes, actions and losses are the same in all three, which is checked. The first iteration opens scenes and compiles
kernels and is not counted. Ratios are of one run.
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
from algorithms.ppo_gr00t import Args, make_agent
from benchmarks import iterations
from benchmarks.publish import Table, judge, make_parser, publish
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
        ppo_gr00t.main(replace(args, output_dir=Path(folder), run_name="run"), make_agent, make_envs)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines][1:]


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset's name or a checkpoint")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--num-iterations", type=int, default=3, help="counted ones; one more comes first")
    parser.add_argument("--update-epochs", type=int, default=2)
    parser.add_argument("--micro-batch-size", type=int, default=64)
    parser.add_argument("--renderer", choices=("egl", "osmesa", "warp"))
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    size = options.num_envs * options.num_steps // 2
    options.micro_batch_size = min(size, options.micro_batch_size)
    args = Args(
        model=options.model,
        suite=options.suite,
        num_envs=options.num_envs,
        num_steps=options.num_steps,
        num_iterations=options.num_iterations + 1,
        update_epochs=options.update_epochs,
        minibatch_size=size,
        micro_batch_size=options.micro_batch_size,
        renderer=options.renderer,
        compute_dtype=options.compute_dtype,
        eval_episodes_per_task=0,
        log_with=(),
        save_interval=10**6,
    )
    variants = {
        "plain": (replace(args, feature_storage="none"), make_plain_envs),
        "cached": (args, ppo_gr00t.make_envs),
        "overlapped": (replace(args, pipeline_stage_num=2), ppo_gr00t.make_envs),
    }
    results: list[dict[str, Any]] = []
    losses: list[list[float]] = []
    for name, (changed, make_envs) in variants.items():
        lines = measure(changed, make_envs)
        losses.append([line["actor/loss"] for line in lines])
        row: dict[str, Any] = {"order": name, **iterations.summarise(lines)}
        row["largest_loss_difference"] = float(np.abs(np.array(losses[-1]) - losses[0]).max())
        results.append(row)
    table = Table({"order of work": "<14", "env-steps/s": ">12.1f", "times plain": ">12.2f", **iterations.COLUMNS})
    for row in results:
        row["speedup"] = row["env_steps_per_s"] / results[0]["env_steps_per_s"]
        table.add(row["order"], row["env_steps_per_s"], row["speedup"], *iterations.cells(row))
    print("losses differ from plain by at most", *(f"{row['largest_loss_difference']:.2g}" for row in results[1:]))
    names = ("model", "suite", "num_envs", "num_steps", "update_epochs", "micro_batch_size", "renderer")
    settings = {name: getattr(options, name) for name in names}
    settings |= dict(
        num_iterations=options.num_iterations,
        num_action_chunks=args.num_action_chunks,
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
    main()
