"""What the trainers' command lines share: how a run is kept, its environments and its agent; presets; exact sizes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from algorithms.common.evaluation import jobs_in_training
from algorithms.common.step_sizes import Schedule

ArgsT = TypeVar("ArgsT")
# Arguments of one trainer or another.
_POSITIVE = (
    "num_iterations", "num_steps", "num_action_chunks", "denoising_steps", "pipeline_stage_num", "update_epochs",
    "max_rollouts", "num_groups", "num_minibatches", "log_interval",
)  # fmt: skip


@dataclass(kw_only=True)
class RunArgs:
    """Arguments of a reinforcement-learning run that are not the algorithm's."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    resume: Path | None = None
    """Run folder (or its newest checkpoint) to go on with, or `auto`: the newest run of this name that has a
    checkpoint, else a new one. Give the same arguments as before."""
    seed: int = 1
    """Seed of the environments, the agent's initial weights and every random draw."""
    num_iterations: int = 400
    """Rollout-and-update rounds; schedules run over them."""
    save_interval: int = 50
    """Iterations between checkpoints; the last iteration is always saved, and while keep_best is not 0 every evaluated
    one. 0 saves no others."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints that are kept besides for their success rate (evaluated ones, if eval_interval is not 0)."""
    eval_interval: int = 0
    """Iterations between evaluations; 0 evaluates only after the last."""
    eval_episodes_per_task: int = 50
    """Stored initial states evaluated per task (50 are stored); 0 skips evaluation."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers that receive the metrics."""
    feature_storage: Literal["device", "host", "mixed", "none"] = "mixed"
    """Where encoded observations wait for the update. `device`, `host`: up to feature_memory_gb there, the rest is
    encoded anew in every epoch. `mixed`: up to feature_memory_gb on the device, the rest in host memory. `none`: all
    encoded anew."""
    feature_memory_gb: float = 16.0
    """Memory of a process for encoded observations, 10^9 bytes."""

    # --- environment ---
    suite: str = "libero_spatial"
    """LIBERO suite; `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to train on, each drawn as often as it is named; all of the suite if not given."""
    num_envs: int = 64
    """Parallel environments over all processes."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes (C)."""
    horizon: int | None = None
    """Environment steps before truncation; the suite's own if not given."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""
    physics: Literal["cpu", "warp"] = "cpu"
    """`warp` simulates on the GPU: much faster for a thousand environments and more, and not bit-identical."""
    stepping: Literal["exact", "fast"] = "exact"
    """`exact` repeats LIBERO's simulation bit by bit; `fast` takes a fifth less time and rounds differently. Without
    meaning for physics `warp`."""
    pipeline_stage_num: int = 1
    """Stages that a process's environments are split into; one simulates while another is decided."""
    env_timeout_s: float = 600.0
    """Stop the run if a decision's environment steps take longer."""

    # --- agent ---
    model: str = "nano"
    """A preset's name (`nano`, `gr00t_n1d5`: random weights), or the folder or hub id of a checkpoint."""
    noise_method: Literal["flow_sde", "flow_cps", "reinflow", "reinflow_joint"] = "flow_sde"
    """How the denoising chain is made stochastic for exploration."""
    noise_level: float = 0.5
    """Strength of the exploration noise (flow_sde and flow_cps)."""
    final_noise: float = 1.0
    """Part of the exploration noise that is left at the end of training; it falls linearly from 1."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    logprob_level: Literal["chunk", "action", "token"] = "chunk"
    """What has one ratio to clip: the whole chunk (log-probabilities summed over C steps and their dimensions), each
    of its actions (summed over dimensions), or each dimension of each action."""
    train_backbone: bool = False
    """Train the vision tower and the language model too; otherwise their features are computed once a decision."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of matrix products; the checkpoint's own if not given. Trained weights and log-probabilities are float32."""

    compile: bool = False
    """Compile the network with torch.compile; the first iterations then take minutes longer."""

    # --- step size ---
    lr_schedule: Schedule = "constant"
    """Keep the step sizes, or let them fall to 0 over training, or let the policy's follow target_kl: 1.5 times
    smaller after an update that ended above it, 1.5 times larger after one that ended below half of it, up to 10 times
    either way."""
    target_kl: float | None = None
    """End an iteration's update when a minibatch's approximate KL from the rollout's policy exceeds this."""

    @property
    def simulation(self) -> dict[str, Any]:
        """What to make environments with, besides suite, tasks and number."""
        options = dict(num_action_chunks=self.num_action_chunks, horizon=self.horizon, renderer=self.renderer)
        if self.physics == "warp":
            return options | dict(physics="warp")
        if self.pipeline_stage_num > 1:  # decisions need a core of their own, to launch what a GPU computes
            options |= dict(num_threads=max(1, len(os.sched_getaffinity(0)) - 1))
        return options | dict(stepping=self.stepping)

    def progress(self, iteration: int) -> float:
        """Returns the part of training that is done before `iteration` (from 1), in [0, 1)."""
        return (iteration - 1) / self.num_iterations

    def saves(self, iteration: int) -> bool:
        """Returns whether a checkpoint is saved after `iteration`."""
        due = iteration == self.num_iterations or bool(self.save_interval and iteration % self.save_interval == 0)
        return due or bool(self.keep_best and self.evaluates(iteration))

    def evaluates(self, iteration: int) -> bool:
        """Returns whether the policy is evaluated after `iteration`."""
        due = iteration == self.num_iterations or bool(self.eval_interval and iteration % self.eval_interval == 0)
        return due and self.eval_episodes_per_task > 0

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Returns what the best checkpoints are chosen by."""
        return metrics.get("eval/success_once" if self.eval_interval else "env/success_once")

    def noise_options(self, iteration: int) -> dict[str, float]:
        """Returns what to pass to the agent besides observation and action; nothing unless noise is annealed.

        Raises:
            ValueError: `final_noise` is not in (0, 1].
        """
        if not 0 < self.final_noise <= 1:
            raise ValueError(f"final_noise={self.final_noise} is not in (0, 1]; without noise there is no ratio")
        return {} if self.final_noise == 1 else {"noise_anneal": 1 - (1 - self.final_noise) * self.progress(iteration)}


def parse_args(args_class: type[ArgsT], presets: Mapping[str, ArgsT], description: str | None) -> ArgsT:
    """Parses the command line into `args_class`; `--preset NAME` sets the defaults that other arguments override.

    An unknown preset, like any other bad argument, ends the program with a message.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=[*presets, "None"], default="None")
    name = parser.parse_known_args()[0].preset
    return tyro.cli(args_class, default=presets.get(name, args_class()), description=description)


def check_args(args: Any) -> None:
    """Checks arguments of any trainer that would otherwise fail late.

    Raises:
        ValueError: one is out of its range, or needs what is not there.
        FileNotFoundError: the suite stores no initial states to evaluate from.
    """
    for name in _POSITIVE:
        if (value := getattr(args, name, 1)) < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name in ("save_interval", "eval_interval", "eval_episodes_per_task", "video_interval"):
        if (value := getattr(args, name, 0)) < 0:
            raise ValueError(f"{name}={value} must be at least 0 (0: never)")
    low, high = getattr(args, "value_bounds", None) or (0.0, 1.0)
    if low >= high:
        raise ValueError(f"value_bounds={low} {high} is no range; the first number must be below the second")
    if getattr(args, "physics", "cpu") == "warp" and not torch.cuda.is_available():
        raise ValueError(
            "physics='warp' simulates on a GPU, and PyTorch finds no CUDA device; give --physics cpu and as many "
            "environments as a CPU can simulate, for example --num-envs 8"
        )
    if args.eval_episodes_per_task > 0:
        jobs_in_training(args)


def check_entropy_bonus(args: Any) -> None:
    """Raises ValueError if `args.ent_coef` would have no effect: only the noise of reinflow is learned."""
    if args.ent_coef and not args.noise_method.startswith("reinflow"):
        raise ValueError(
            f"ent_coef={args.ent_coef} has no effect with noise_method={args.noise_method!r}, whose noise is fixed; "
            "set it to 0, or take noise_method reinflow or reinflow_joint"
        )


def share_of_process(args: Any, name: str, num_processes: int) -> int:
    """Returns one process's share of the global size `args.name`; raises ValueError unless it divides exactly."""
    value = getattr(args, name)
    if value < 1 or value % num_processes:
        raise ValueError(
            f"{name}={value} cannot be shared by {num_processes} process(es): "
            f"give a positive multiple of {num_processes}"
        )
    return value // num_processes


def exact_quotient(args: Any, dividend: str, divisor: str) -> int:
    """Returns args.dividend / args.divisor; raises ValueError unless it is a positive whole number."""
    a, b = getattr(args, dividend), getattr(args, divisor)
    if a < 1 or b < 1 or a % b:
        raise ValueError(f"{dividend}={a} must be a positive multiple of {divisor}={b}")
    return a // b
