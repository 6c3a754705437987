"""How fast a preset of PPO trains, and what its parts are worth: a table, then one JSON line.

    python -m benchmarks.preset_loop --preset libero_goal_nano
    python -m benchmarks.preset_loop --preset libero_goal_nano --num-envs 2048
    python -m benchmarks.preset_loop --num-envs 4 --num-steps 4 --physics cpu     # where there is no GPU
    python -m benchmarks.preset_loop --preset libero_spatial_24gb --random-weights --memory-cap-gb 24
    python -m benchmarks.preset_loop --preset libero_spatial_rlinf --random-weights --num-steps 24 --recipes

Whole iterations of `algorithms/ppo_gr00t.py`, rollout and update, without evaluations and imitation alone. With the
GPU's physics:
    * host, float32: images go through host memory from the renderer to the policy;
    * device, float32: they stay on the GPU (what the trainer does with the GPU's physics);
    * device, TF32: and matrices are multiplied in TF32 (what the nano presets do).
With physics on the CPU, the preset as it is. With --recipes, the preset; what makes the same updates sooner; and what
makes cheaper ones: fewer epochs, fewer weights, or a fifth of the decisions, see `recipes_of`. With other sizes than
the preset's, minibatches are the largest that fit and are not larger than its own or what is asked for. The first
iteration opens scenes and loads kernels and is not counted. Episodes differ from row to row as soon as rounding does;
the amount of work does not. Ratios are to the first row that was measured, of one run each. Memory is what PyTorch has
reserved of the GPU, 10^9 bytes; the simulation's and CUDA's own is not counted. Interrupted (SIGINT), or if a row
fails, it tells the rows that it has, and ends with status 1; --output has each row as soon as it was measured.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import tempfile
import traceback
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode

from algorithms import ppo_gr00t
from algorithms.common.args import nearest_fraction
from algorithms.common.env_worker import on_host
from algorithms.ppo_gr00t import PRESETS, Args
from benchmarks import iterations
from benchmarks.command_line import integer, launch_benchmark, make_parser, positive_number, refusals
from benchmarks.policy import make_agent as make_stand_in
from benchmarks.publish import Table, judge, publish
from gr00t_agent import Gr00tAgent
from gr00t_agent.policy import preset_policy

# Of a nano preset on one H200, with its physics.
TARGETS = {"env_steps_per_s": 10_000.0}


class ImagesOnHost(gym.vector.VectorWrapper):
    """Environments whose images arrive as NumPy arrays."""

    def step(self, actions: Any) -> Any:
        """Steps the environments."""
        obs, *rest = self.env.step(actions)
        return on_host(obs), *rest

    def reset(self, **options: Any) -> Any:
        """Resets the environments."""
        obs, infos = self.env.reset(**options)
        return on_host(obs), infos

    def observe(self) -> dict[str, Any]:
        """Observes without stepping."""
        return on_host(cast(Any, self.env).observe())


def make_host_envs(
    args: Args, num_envs: int, image_size: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> gym.vector.VectorEnv:
    """Returns the trainer's environments with images in host memory."""
    return ImagesOnHost(ppo_gr00t.make_envs(args, num_envs, image_size, autoreset_mode))


def make_random_agent(args: Args) -> Gr00tAgent:
    """Returns GR00T-N1.5 with random weights, as the trainer prepares it, and a tokenizer that needs no download."""

    def load(source: str, *, train_backbone: bool, train_vl_self_attention: bool, **settings: Any) -> Gr00tAgent:
        given = {name: value for name, value in settings.items() if value is not None}
        policy = replace(preset_policy("gr00t_n1d5"), **given)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # 3e9 numbers are drawn sooner there
        agent = make_stand_in("gr00t_n1d5", policy, device, torch.float32)
        flags = {"tune_visual": train_backbone, "tune_llm": train_backbone}
        agent.set_trainable(**(agent.trainable | flags | {"tune_vl_self_attention": train_vl_self_attention}))
        return agent

    with mock.patch.object(Gr00tAgent, "load", load):
        return cast(Gr00tAgent, ppo_gr00t.load_agent(args))


def recipes_of(args: Args) -> dict[str, Args]:
    """Returns the preset and what could be trained in its place, by what changes.

    One updates by a fifth of the decisions, or the nearest part that whole minibatches make, which it is then named
    by; with a single minibatch there is none. The last one is compiled, which takes minutes before its first iteration.
    """
    overlapped = replace(args, pipeline_stage_num=2)
    recipes = {
        "as it is": args,
        "2 stages": overlapped,
        "and 1 epoch": replace(overlapped, update_epochs=1),
        "and VL frozen": replace(overlapped, train_vl_self_attention=False),
        "and both": replace(overlapped, train_vl_self_attention=False, update_epochs=1),
        "and adapters": replace(overlapped, lora_rank=32, lora_alpha=32.0),
    }
    part = nearest_fraction(args.num_minibatches, 0.2)
    if part < 1:
        exact = Fraction(round(part * args.num_minibatches), args.num_minibatches)
        name = "and a fifth" if exact == Fraction(1, 5) else f"and {exact}"
        recipes[name] = replace(overlapped, update_fraction=part)
    return recipes | {"and compiled": replace(overlapped, compile=True)}


def variants_of(args: Args, *, with_recipes: bool) -> dict[str, tuple[Args, Any]]:
    """Returns what is measured, by the name of its row: arguments, and what makes environments."""
    if with_recipes:
        return {name: (recipe, ppo_gr00t.make_envs) for name, recipe in recipes_of(args).items()}
    if args.physics == "warp":
        return {
            "host, float32": (replace(args, tf32=False), make_host_envs),
            "device, float32": (replace(args, tf32=False), ppo_gr00t.make_envs),
            "device, TF32": (replace(args, tf32=True), ppo_gr00t.make_envs),
        }
    return {"as it is": (args, ppo_gr00t.make_envs)}


def measure(args: Args, make_envs: Any, make_agent: Any) -> dict[str, float | None]:
    """Trains one iteration more than asked for, and returns means over all but the first, and the largest memory.

    Raises:
        RuntimeError: training failed; tells where, and why.
    """
    if torch.cuda.is_available():
        gc.collect()  # what a row before has left, too, if it failed
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = replace(args, num_iterations=args.num_iterations + 1, output_dir=Path(folder), run_name="run")
        try:
            ppo_gr00t.main(args, make_agent, make_envs)
        except Exception:  # whatever it is, the rows before it are worth telling
            raise RuntimeError(traceback.format_exc().rstrip()) from None
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    memory = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None
    return iterations.summarise(lines) | {"memory_gb": memory}


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="libero_spatial_nano")
    count = integer(at_least=1)
    parser.add_argument("--num-envs", type=count, help="default: the preset's")
    parser.add_argument("--num-steps", type=count, help="decisions of each, default: the preset's")
    parser.add_argument("--minibatch-size", type=count, help="at most, default: the preset's")
    parser.add_argument("--physics", choices=("cpu", "warp"), help="default: the preset's")
    parser.add_argument("--num-iterations", type=count, default=3, help="counted ones; one more comes first")
    parser.add_argument("--random-weights", action="store_true", help="GR00T-N1.5 with them, nothing downloaded")
    parser.add_argument("--recipes", action="store_true", help="measure what could be trained in its place")
    parser.add_argument("--memory-cap-gb", type=positive_number, help="of the GPU's memory, as if it had no more")
    options = parser.parse_args()
    if options.memory_cap_gb is not None:
        if not torch.cuda.is_available():
            parser.error("--memory-cap-gb needs a GPU")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_cap_gb * 1e9 / total))
    settings: dict[str, Any] = dict(
        num_iterations=options.num_iterations,
        imitation_iterations=0,  # whose updates are longer than the others
        critic_warmup_iterations=0,
        eval_before=False,
        eval_interval=0,
        eval_episodes_per_task=0,
        save_interval=0,
        keep_best=0,
        log_with=(),
        output_dir=Path(tempfile.gettempdir()),
    )
    if options.physics:
        settings |= dict(physics=options.physics)
    if options.random_weights:
        settings |= dict(model="gr00t_n1d5")
    with refusals(parser):
        preset = replace(PRESETS[options.preset], **settings)
        args = iterations.resized(
            preset, num_envs=options.num_envs, num_steps=options.num_steps, minibatch_size=options.minibatch_size
        )
        variants = variants_of(args, with_recipes=options.recipes)
        for changed, _ in variants.values():
            ppo_gr00t.check_args(changed)

    print(iterations.describe_sizes(args))
    table = Table(
        {"variant": "<20", "env-steps/s": ">12.1f", "times first": ">12.2f", **iterations.COLUMNS, "GPU GB": ">8.1f"}
    )
    sizes = ("num_envs", "num_steps", "physics", "update_epochs", "minibatch_size", "micro_batch_size", "model")
    told = {name: getattr(args, name) for name in sizes}
    given = ("preset", "num_iterations", "random_weights", "recipes", "memory_cap_gb")
    told |= {name: getattr(options, name) for name in given}
    rows: list[dict[str, Any]] = []

    def add(name: str, row: dict[str, Any]) -> None:
        rows.append({"variant": name, **row})
        speedup = rows[-1]["speedup"] = row["env_steps_per_s"] / rows[0]["env_steps_per_s"]
        table.add(name, row["env_steps_per_s"], speedup, *iterations.cells(row), row["memory_gb"])
        publish("preset_loop", {"variants": rows}, settings=told, output=options.output, is_last=False)

    make_agent = make_random_agent if options.random_weights else ppo_gr00t.load_agent
    failures = iterations.measure_rows(
        [(name, partial(measure, changed, make_envs, make_agent)) for name, (changed, make_envs) in variants.items()],
        add,
    )

    targets: dict[str, Any] = {}
    if options.preset.endswith("_nano") and args.physics == "warp" and not options.recipes and not failures:
        targets = judge({"env_steps_per_s": rows[-1]["env_steps_per_s"]}, at_least=TARGETS)
    document = publish("preset_loop", {"variants": rows}, settings=told, targets=targets, output=options.output)
    if failures:
        sys.exit("\n\n".join(failures))
    return document


if __name__ == "__main__":
    launch_benchmark(main)
