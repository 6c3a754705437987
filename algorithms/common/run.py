"""What a run leaves behind: its arguments, versions, metrics, checkpoints and videos, in one folder.

    runs/<name>/
        args.json          every argument
        environment.json   git commit, package versions, hardware
        metrics.jsonl      one line per iteration
        logs/              TensorBoard
        tracker.json       the run's id in trackers that keep runs elsewhere, if it has such
        checkpoints/       what `from_pretrained` loads, and what training goes on from
        evaluations/       one JSON per evaluation
        videos/            mp4
        faults/            what a fault is reproduced from
        report.html        all of it on one page, written at the end

Only the main process writes; every process may call every function. A new run's folder in which a failed start has left
nothing but what every start writes is removed when the process ends: the corrected command gets its name.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from algorithms.common import presets
from algorithms.common.args import base_name
from algorithms.common.checkpoint_notes import can_be_evaluated, settings_of
from algorithms.common.processes import leave
from algorithms.common.provenance import describe_environment
from algorithms.common.stages import EnvStages
from algorithms.common.trackers import ID_FILE, TENSORBOARD_FOLDER, start_trackers
from gr00t_agent.files import remove_folder, whole_file, write_json, write_text

# Of the runs and evaluations that this process works on; closed files would unlock them.
_LOCKS: dict[Path, TextIO] = {}
# What a start of a run writes, besides TensorBoard.
_FIRST_FILES = {"args.json", "environment.json", ".lock", ID_FILE}


def choose_folder(args: Any) -> Path:
    """Makes `args.output_dir/args.run_name` (numbered if it exists), locks it, and writes its first files."""
    path = _make_new_folder(Path(args.output_dir), base_name(args))
    atexit.register(_remove_if_unused, path, path.resolve(), os.getpid())
    unlock(path)  # if it was there before and was deleted
    lock(path)
    write_args(path, args)
    write_json(path / "environment.json", describe_environment())
    return path


def _remove_if_unused(path: Path, place: Path, pid: int) -> None:
    """Removes the run's folder that the process `pid` has made, if it is this one and no work has come into it."""
    if os.getpid() != pid or not place.is_dir():
        return
    files = [file.relative_to(place) for file in place.rglob("*") if not file.is_dir()]
    if all(_is_of_a_start(file) for file in files):
        unlock(place)
        remove_folder(place)
        print(f"{path} is removed: the run ended before anything was trained", file=sys.stderr)


def _is_of_a_start(file: Path) -> bool:
    """Returns whether a start of a run writes `file`, a path in the run's folder."""
    is_of_tensorboard = file.parts[0] == TENSORBOARD_FOLDER and "tfevents" in file.name
    return is_of_tensorboard or str(file) in _FIRST_FILES


def write_args(path: Path, args: Any) -> None:
    """Writes the arguments of the run in `path`."""
    write_json(path / "args.json", args)


def lock(path: Path, otherwise: str = "start a new run under another run_name") -> None:
    """Makes this process the only one that works on the run, or the evaluation, in `path`, until it ends or unlocks.

    Args:
        path: its folder.
        otherwise: what else there is to do than to wait for the other process.

    Raises:
        RuntimeError: another process does.
    """
    place = path.resolve()
    if place in _LOCKS:
        return
    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RuntimeError(f"{path} is in use by {holder}; wait for its end, stop it, or {otherwise}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _LOCKS[place] = file


def unlock(path: Path) -> None:
    """Lets other processes work on the run, or the evaluation, again."""
    if file := _LOCKS.pop(path.resolve(), None):
        file.close()


class RunFolder:
    """A run's folder; get it from `algorithms.common.resume.open_run`."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path = path
        self._accelerator = accelerator
        self._start = time.perf_counter()

    @classmethod
    def open(cls, path: Path, accelerator: Accelerator, args: Any) -> RunFolder:
        """Returns the folder of the run with arguments `args`, and starts its trackers."""
        start_trackers(accelerator, path, args)
        return cls(path, accelerator)

    def log(self, metrics: dict[str, float], global_step: int, iteration: int) -> None:
        """Sends metrics to the trackers at `global_step` environment steps, and appends them to metrics.jsonl."""
        self._accelerator.log(metrics, step=global_step)
        if self._accelerator.is_main_process:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, "global_step": global_step, **metrics}) + "\n")

    def forget_after(self, iteration: int) -> None:
        """Drops lines of metrics.jsonl that a resumed run is about to write again, and one that was not ended."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            ended = [line for line in path.read_text("utf-8").split("\n")[:-1] if line]
            kept = [line for line in ended if json.loads(line)["iteration"] <= iteration]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def dump(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Writes tensors and number arrays to faults/<name>_rank_<r>.safetensors, and returns the file."""
        path = self.path / "faults" / f"{name}_rank_{self._accelerator.process_index}.safetensors"
        tensors = {key: torch.as_tensor(value).detach().cpu().contiguous().clone() for key, value in arrays.items()}
        with whole_file(path) as temporary:
            save_file(tensors, temporary)
        return path

    @contextmanager
    def dumps_failed_actions(self, stages: EnvStages) -> Generator[None]:
        """Dumps the actions of an environment step that failed, if one did, and says so in the error."""
        try:
            yield
        except Exception as error:
            if stages.failed_actions:
                path = self.dump("failed_actions", stages.failed_actions)
                error.add_note(f"the actions of the step that failed are in {path}")
            raise

    def check_finite(self, grad_norm: Tensor, iteration: int, micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Raises FloatingPointError, and dumps the minibatch, if the gradient's norm or a loss in it is not finite.

        Args:
            grad_norm: scalar.
            iteration: names the file.
            micro_batches: the minibatch; they are joined along the rows, and scalars of each to a vector. `loss`, if
                there, must be finite as well.
        """
        losses = [part["loss"] for part in micro_batches if "loss" in part]
        if not all(torch.isfinite(values).all() for values in (grad_norm, *losses)):
            batch = {
                name: torch.cat([torch.atleast_1d(part[name]) for part in micro_batches]) for name in micro_batches[0]
            }
            dump = self.dump(f"non_finite_iteration_{iteration}", batch)
            culprits = [name for name, value in batch.items() if not torch.isfinite(value).all()]
            raise FloatingPointError(
                f"gradient norm is {grad_norm.item()} in iteration {iteration}, and not finite in the minibatch are "
                f"{culprits or 'no values'}; it is in {dump}. Lower the step sizes, or noise_level where there is "
                "one, and start from the last checkpoint."
            )

    def check_ratio(self, deviation: float, largest: float) -> None:
        """Raises RuntimeError if the first minibatch's ratios are off 1 by more than `largest`, or not a number."""
        if not deviation <= largest:
            raise RuntimeError(
                f"first minibatch's ratio is off 1 by {deviation:.3g} (max_ratio_deviation={largest}): "
                "log-probabilities at rollout and at update differ. An agent of one's own has dropout, or scores "
                "otherwise than it decides; in bfloat16 rounding alone comes to a tenth where many decisions are "
                "compared: give a larger --max-ratio-deviation, or --compute-dtype float32"
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

    def summary(
        self, checkpoint: str, suite: str | None, *, is_whole_policy: bool = True, is_state_policy: bool = False
    ) -> str:
        """Returns what to tell at the end of a run: where its files are and what to run next on such a machine.

        Args:
            checkpoint: name of the last one.
            suite: that it is evaluated on; None if nothing says it.
            is_whole_policy: the checkpoint is one that another training can start from.
            is_state_policy: it is that of --model state, which is for a task's end and no other trainer.
        """
        weights = self.path / "checkpoints" / checkpoint
        seconds = round(time.perf_counter() - self._start)
        files = {
            "checkpoint": weights,
            "videos": self.path / "videos",
            "TensorBoard": self.path / TENSORBOARD_FOLDER,
            "metrics": self.path / "metrics.jsonl",
            "report": self.path / "report.html",
        }
        return "\n".join(
            (
                "",
                f"time         {seconds // 60} min {seconds % 60:02d} s, evaluations included",
                f"run folder   {self.path}",
                *(f"{name:12} {path}" for name, path in files.items() if path.exists()),
                *self._next(weights, suite, is_whole_policy, is_state_policy),
            )
        )

    def _next(self, weights: Path, suite: str | None, is_whole_policy: bool, is_state_policy: bool) -> list[str]:
        """Returns commands that this machine can run in reasonable time, under a title, if there are any."""
        is_ours = can_be_evaluated(weights) and suite is not None
        has_gpu = torch.cuda.is_available()
        place = shlex.quote(str(weights))
        commands: list[str] = []
        if (self.path / TENSORBOARD_FOLDER).is_dir():
            commands.append(f"tensorboard --logdir {self.path.parent}")
        if is_state_policy:
            commands.append("accelerate launch algorithms/ppo_gr00t.py --preset libero_spatial_laptop")
            commands.append("python algorithms/eval_gr00t.py --checkpoint checkpoints/libero_spatial_rl")
        elif is_ours:
            size = "--num-envs 20" if has_gpu else "--episodes-per-task 5"
            commands.append(f"python algorithms/eval_gr00t.py --checkpoint {place} --suite {suite} {size}")
        if is_ours and is_whole_policy and not is_state_policy:
            sizes = "--num-envs 8 --num-steps 24 --minibatch-size 48 --micro-batch-size 48"
            if has_gpu:
                sizes = f"--preset {suite}_nano" if f"{suite}_nano" in presets.PPO else ""
            kept = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings_of(weights).items())
            commands.append(
                f"accelerate launch algorithms/ppo_gr00t.py --model {place} --suite {suite} {kept} {sizes}".rstrip()
            )
        return ["", "next:", *(f"  {command}" for command in commands)] if commands else []

    def finish(self) -> None:
        """Writes the report and closes the trackers and the process group, whose threads end when the program does."""
        leave(farewell=True)
        if self._accelerator.is_main_process:
            # An eighth of what a trainer imports, for charts that are drawn at its end.
            from algorithms.common.report import write_report

            write_report(self.path)
        if torch.distributed.is_initialized():
            atexit.register(_destroy, [torch.distributed.group.WORLD])
        self._accelerator.end_training()
        unlock(self.path)


def _destroy(process_groups: list[Any]) -> None:
    """Lets go of process groups; called when the program ends, after the models are gone and before the interpreter is.

    A thread of Gloo's that has just ended the last operation may still be waiting for the interpreter's lock to free
    what it holds. Letting go of the group joins it without the lock. DistributedDataParallel, if it let go last, would
    join it with the lock, and so wait for ever. If the group outlived the interpreter, the thread would get no lock but
    be ended in the middle of a destructor, which aborts the process.
    """
    gc.collect()  # a model in a reference cycle holds its group
    process_groups.clear()


def _make_new_folder(parent: Path, base: str) -> Path:
    """Makes and returns parent/base, or parent/base-2, -3, ..., the first number after those that are there."""
    pattern = re.compile(re.escape(base) + r"(?:-(\d+))?")
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        matches = [match for path in parent.iterdir() if (match := pattern.fullmatch(path.name))]
        number = 1 + max((int(match[1] or 1) for match in matches), default=0)
        path = parent / (base if number == 1 else f"{base}-{number}")
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return path
