"""What a run leaves behind: its arguments, versions, metrics, checkpoints and videos, in one folder.

    runs/<name>/
        args.json          every argument
        environment.json   git commit, package versions, hardware
        metrics.jsonl      one line per iteration
        logs/              TensorBoard or whatever else Accelerate's trackers write
        checkpoints/       what `from_pretrained` loads, and what training goes on from
        evaluations/       one JSON per evaluation
        videos/            mp4
        faults/            what a fault is reproduced from
        report.html        all of it on one page, written at the end

Only the main process writes; every process may call every function.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from algorithms.common.provenance import describe_environment
from algorithms.common.report import REPORT_NAME, write_report

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


def base_name(args: Any) -> str:
    """Returns `args.run_name` with the fields in braces filled in."""
    return args.run_name.format(**{f.name: getattr(args, f.name) for f in dataclasses.fields(args)})


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
            names = [_make_new_folder(args.output_dir, base_name(args))]
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

    @contextmanager
    def written_whole(self, folder: Path) -> Generator[Path]:
        """Gives a folder to write into, which becomes `folder` if all goes well and is deleted otherwise."""
        temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _flush(temporary)
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.replace(old)
            temporary.replace(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def save_agent(self, agent: SavesPretrained, name: str) -> Path:
        """Writes the agent to checkpoints/<name>, whole or not at all, and returns the folder."""
        folder = self.path / "checkpoints" / name
        if self._accelerator.is_main_process:
            with self.written_whole(folder) as temporary:
                agent.save_pretrained(temporary)
        self._accelerator.wait_for_everyone()
        return folder

    def dump(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Writes tensors and number arrays to faults/<name>_rank_<r>.safetensors, and returns the file."""
        path = self.path / "faults" / f"{name}_rank_{self._accelerator.process_index}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors = {key: torch.as_tensor(value).detach().cpu().contiguous().clone() for key, value in arrays.items()}
        save_file(tensors, path)
        return path

    def check_finite(self, grad_norm: Tensor, iteration: int, **batch: Tensor) -> None:
        """Raises FloatingPointError, and dumps `batch`, if the gradient's norm or a loss in `batch` is not finite.

        Args:
            grad_norm: scalar.
            iteration: names the file.
            batch: the minibatch; `loss`, if there, must be finite as well.
        """
        if not torch.isfinite(grad_norm) or ("loss" in batch and not torch.isfinite(batch["loss"]).all()):
            dump = self.dump(f"non_finite_iteration_{iteration}", batch)
            culprits = [name for name, value in batch.items() if not torch.isfinite(value).all()]
            raise FloatingPointError(
                f"gradient norm is {grad_norm.item()} in iteration {iteration}, and not finite in the minibatch are "
                f"{culprits or 'no values'}; it is in {dump}. Lower learning_rate or noise_level and start from the "
                "last checkpoint."
            )

    def check_ratio(self, deviation: float, largest: float) -> None:
        """Raises RuntimeError if the first minibatch's ratios are off 1 by more than `largest`, or not a number."""
        if not deviation <= largest:
            raise RuntimeError(
                f"first minibatch's ratio is off 1 by {deviation:.3g} (max_ratio_deviation={largest}): "
                "log-probabilities at rollout and at update differ; check dropout, dtype and noise settings"
            )

    def check_actions(self, actions: NDArray[np.float32], iteration: int, **decision: Tensor) -> None:
        """Raises FloatingPointError, and dumps `decision`, if an action [B, C, a] is not finite."""
        is_bad = ~np.isfinite(actions).reshape(len(actions), -1).all(axis=1)
        if is_bad.any():
            dump = self.dump(f"non_finite_actions_iteration_{iteration}", {"actions": actions, **decision})
            raise FloatingPointError(
                f"the policy chose actions that are not finite in rows {np.flatnonzero(is_bad).tolist()} of iteration "
                f"{iteration}; the decision is in {dump}. Look at the weights and the observation's normalisation."
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
                f"report       {self.path / REPORT_NAME}",
                "",
                "next:",
                f"  tensorboard --logdir {self.path.parent}",
                f"  python algorithms/eval_gr00t.py --checkpoint {weights} --suite {suite}",
                f"  accelerate launch algorithms/ppo_gr00t.py --model {weights} --suite {suite}",
            )
        )

    def finish(self) -> None:
        """Writes the report and closes the trackers and the process group, whose threads end when the program does."""
        if self._accelerator.is_main_process:
            write_report(self.path)
        if torch.distributed.is_initialized():
            atexit.register(_destroy, [torch.distributed.group.WORLD])
        self._accelerator.end_training()


def _destroy(process_groups: list[Any]) -> None:
    """Lets go of process groups; called when the program ends, after the models are gone and before the interpreter is.

    A thread of Gloo's that has just ended the last operation may still be waiting for the interpreter's lock to free
    what it holds. Letting go of the group joins it without the lock. DistributedDataParallel, if it let go last, would
    join it with the lock, and so wait for ever. If the group outlived the interpreter, the thread would get no lock but
    be ended in the middle of a destructor, which aborts the process.
    """
    gc.collect()  # a model in a reference cycle holds its group
    process_groups.clear()


def _flush(folder: Path) -> None:
    """Makes a folder's files survive a loss of power."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
