"""Going on with a run where it stopped: after a kill, a full disk, a fault or a request to stop.

    runs/<name>/checkpoints/iteration_50/     what `from_pretrained` loads (`step_50` in fine-tuning)
        training_state/
            weights.safetensors    trained parameters and buffers, as the optimiser has them
            optimizer.safetensors  its state by parameter name
            <further>.safetensors  what else the trainer keeps, such as averaged weights
            envs.npz               state of every environment, if environments can give it
            state.json             iteration, environment steps, score, step sizes, random number generators, and what
                                   tells whether the run goes on with what it began with, such as frozen weights

A checkpoint appears under its name only when it is whole. It describes the boundary between two iterations. What
belongs to a boundary besides weights and optimiser is taken there, in memory, at every iteration; as long as no
optimiser step was taken since, the boundary can still be saved, so a fault in a rollout loses no finished iteration.
Only the main process writes. The files are safetensors, JSON and arrays without objects.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self, cast
from zipfile import BadZipFile

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from algorithms.common.args import base_name
from algorithms.common.checkpoint_notes import can_be_evaluated
from algorithms.common.cluster_process import exit_status
from algorithms.common.processes import check_same_args, from_main, leave, over_processes, wait_for_main
from algorithms.common.run import RunFolder, choose_folder, lock, write_args
from algorithms.common.vector_envs import EnvState, StackedStates, merged_states
from algorithms.common.watch import Watch
from gr00t_agent.files import clean_up, json_ready, read_json, remove_folder, require, whole_folder, write_json

STATE_FOLDER = "training_state"
STATE_FILE = "state.json"
# Arguments of the reinforcement-learning trainers that may differ between a run and its continuation.
FREE_ARGS = {
    "preset", "resume", "output_dir", "run_name", "num_iterations", "save_interval", "keep_last", "keep_best",
    "eval_interval", "eval_episodes_per_task", "video_interval", "log_with", "tracker_project",
    "micro_batch_size", "feature_storage", "feature_memory_gb", "pipeline_stage_num", "env_timeout_s", "compile",
    "max_ratio_deviation",
}  # fmt: skip
_STATE_NAMES = {"iteration", "global_step", "score", "num_processes", "generators", "learning_rates"}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

EnvStates = Mapping[int, EnvState]


@dataclass(frozen=True, kw_only=True)
class RestoredState:
    """What a checkpoint says besides what `Checkpoints.restore` has put back.

    Attributes:
        iteration: iterations done.
        global_step: environment steps done by all processes.
        env_states: state of every environment by its number; None if none were saved.
        tensors: further named tensors, by the name they were saved under.
    """

    iteration: int
    global_step: int
    env_states: EnvStates | None
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Boundary(RestoredState):
    generators: Sequence[dict[str, Any]]


def generator_states() -> dict[str, Any]:
    """Returns the states of this process's global random number generators, ready for JSON."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002 (whoever still uses it is resumed too)
    cuda = torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": cuda,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Sets this process's global random number generators to what `generator_states` returned."""
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def checkpoints_in(run_path: Path) -> list[tuple[int, Path]]:
    """Returns (iteration, folder) of a run's whole checkpoints that training can go on from, oldest first."""
    return [(done, path) for done, path in _checkpoint_folders(run_path) if _is_saved(path)]


def _cut_checkpoints(run_path: Path) -> list[tuple[int, Path]]:
    """Returns (iteration, folder) of checkpoints that training cannot go on from, oldest first.

    They were written whole: what they lack was taken away afterwards.
    """
    return [(done, path) for done, path in _checkpoint_folders(run_path) if not _is_saved(path)]


def _checkpoint_folders(run_path: Path) -> list[tuple[int, Path]]:
    folder = run_path / "checkpoints"
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"(?:iteration|step)_(\d+)", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def check_origin(folder: Path, origin: Mapping[str, Any]) -> list[str]:
    """Checks that what a run began with is still there: a checkpoint does not hold it, and goes on with no other.

    Args:
        folder: the checkpoint.
        origin: what there is now: all that `Checkpoints` is given, or some of it.

    Returns:
        Names of what the checkpoint says nothing of, as one of an earlier version.

    Raises:
        ValueError: something is another, or the checkpoint is damaged.
    """
    before: Mapping[str, Any] = _read_state(folder).get("origin", {})
    for name, now in origin.items():
        if name in before and before[name] != now:
            raise ValueError(
                f"{folder} cannot go on: {name} was {before[name]!r:.200} when its run began, and is {now!r:.200} now; "
                "put back what was there, or start a new run"
            )
    return [name for name in origin if name not in before]


def missing_evaluation(folder: Path, args: Any) -> str:
    """Returns what to tell if the checkpoint in `folder` was to be evaluated and was not.

    Args:
        folder: the checkpoint.
        args: the trainer's, which say what its evaluations play.
    """
    told = f"the evaluation of {folder} was interrupted and is not done again"
    return f"{told}: `{_evaluation_command(folder, args)}` does it" if can_be_evaluated(folder) else told


def _evaluation_command(folder: Path, args: Any) -> str:
    """Returns the command that plays a checkpoint's episodes as training does, up to their noise."""
    words = ["python", "algorithms/eval_gr00t.py", "--checkpoint", str(folder), "--suite", args.suite]
    words += ["--episodes-per-task", str(args.eval_episodes_per_task)]
    if args.task_ids is not None:
        words += ["--task-ids", *(str(task_id) for task_id in dict.fromkeys(args.task_ids))]
    if args.horizon is not None:
        words += ["--horizon", str(args.horizon)]
    if getattr(args, "steps_before_success", ()):
        words += ["--steps-before-success", *(str(steps) for steps in args.steps_before_success)]
        words += ["--num-near-goal-states", str(args.num_near_goal_states)]
    return shlex.join(words)


def open_run(
    args: Any, accelerator: Accelerator, *, num_iterations: int, free_args: Collection[str] = FREE_ARGS
) -> tuple[RunFolder, Path | None]:
    """Returns the run's folder, and the checkpoint to go on from if `args.resume` asks for one.

    Args:
        args: a trainer's arguments. `resume` is None (a new run), `auto` (the newest run of this name, or a new one if
            there is none with a checkpoint), or the path of a run or of its newest checkpoint.
        accelerator: its trackers log into the folder.
        num_iterations: iterations that the run shall have done in the end.
        free_args: names of arguments that may differ from the run's.

    Raises:
        FileNotFoundError: there is no checkpoint at the path, or none of the newest run's is whole.
        ValueError: processes have different arguments, the run had others or has done more iterations than are asked
            for, or its arguments are lost, the checkpoint is not its newest, or the name is none of a folder.
        RuntimeError: another process works on the run.
    """
    check_same_args(accelerator, args)
    path, checkpoint = from_main(accelerator, lambda: _choose(args, num_iterations, free_args))
    return RunFolder.open(path, accelerator, args), checkpoint


def _choose(args: Any, num_iterations: int, free_args: Collection[str]) -> tuple[Path, Path | None]:
    if args.resume is None:
        return choose_folder(args), None
    wanted: Path | None = None
    if str(args.resume) == "auto":
        path = _newest_run(Path(args.output_dir), base_name(args))
        if path is None:
            print(f"--resume auto: {_nothing_of(Path(args.output_dir), base_name(args))}; a new run begins")
            return choose_folder(args), None
    else:
        path = Path(args.resume)
        if (path / STATE_FOLDER / STATE_FILE).is_file():
            path, wanted = path.parent.parent, path
    cut = _cut_checkpoints(path)
    if cut and not checkpoints_in(path):
        raise FileNotFoundError(
            f"{path} holds no checkpoint to go on from: {STATE_FOLDER}/{STATE_FILE} is gone from "
            f"{', '.join(folder.name for _, folder in cut)}; put it back, or start a new run without --resume"
        )
    if not checkpoints_in(path):
        raise FileNotFoundError(
            f"{path} holds no checkpoint to go on from; give the folder of a run that has saved one, or start a new "
            "run with --model"
        )
    lock(path)
    for folder in (path, *(folder for folder in path.iterdir() if folder.is_dir())):
        clean_up(folder)
    done, newest = checkpoints_in(path)[-1]
    for _, folder in (item for item in cut if item[0] > done):
        print(
            f"{folder} is passed over: {STATE_FOLDER}/{STATE_FILE} is gone from it; the run goes on from {newest.name}"
        )
    if done > num_iterations:
        raise ValueError(
            f"num_iterations={num_iterations}, but {path} has done {done}: give {done} or more, or start a new "
            f"run with --model {newest}"
        )
    if wanted is not None and wanted.resolve() != newest.resolve():
        raise ValueError(
            f"{wanted} is not the newest checkpoint of its run ({newest.name} is); resume the run, or start a new "
            f"one with --model {wanted}"
        )
    before, now = _read_args(path), json_ready(args)
    changed = [f"{k}={now[k]!r} (was {before.get(k)!r})" for k in now if k not in free_args and now[k] != before.get(k)]
    if changed:
        raise ValueError(f"{path} cannot go on with other arguments: {', '.join(changed)}")
    write_args(path, args)
    return path, newest


def _newest_run(output_dir: Path, name: str) -> Path | None:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    numbered: list[tuple[int, Path]] = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and _checkpoint_folders(path) and _had_name(path, name):
            numbered.append((int(match[1] or 1), path))
    return max(numbered)[1] if numbered else None


def _nothing_of(output_dir: Path, name: str) -> str:
    """Returns what `--resume auto` has not found, and which folder only looks like it."""
    told, path = f"no checkpoint of a run {name} in {output_dir}", output_dir / name
    if _checkpoint_folders(path):
        told += f" ({path} is of a run {_given_name(path)}, by its args.json: --resume {path} goes on with it)"
    return told


def _had_name(path: Path, name: str) -> bool:
    """Returns whether a run was given this name; `demo-2` may be the second `demo`, or a name of its own."""
    return _given_name(path) == name


def _given_name(path: Path) -> str:
    args = _read_args(path)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in args.items()}
    return args["run_name"].format(**fields)


def _read_args(path: Path) -> dict[str, Any]:
    """Returns the arguments of the run in `path`, which has checkpoints."""
    file = path / "args.json"
    try:
        args = read_json(file)
        require(args, "run_name", str(file))
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(
            f"{error.args[0]}; {path} cannot go on without its arguments: restore them, or start a new run without "
            "--resume"
        ) from error
    return args


class Checkpoints:
    """Takes, saves and restores the boundaries of a run.

    As a context, it saves the last boundary when the run is stopped or fails before an optimiser step was taken.

    Args:
        run: its folder.
        accelerator: of this process.
        model: the prepared model.
        optimizer: the prepared optimiser, one whose state is tensors, such as AdamW.
        keep_last: newest checkpoints that are kept.
        keep_best: checkpoints that are kept besides for their score.
        origin: what the run takes from outside whenever it is resumed, JSON values by name, such as digests of frozen
            weights (`algorithms.common.frozen.origin_of`); the main process's counts.
        unit: what a checkpoint's name counts.
        write_agent: writes into a folder what `from_pretrained` loads; `save_pretrained` of the agent if not given.
        generators: take the global random number generators too, for which processes exchange them at every boundary;
            without them all that is random must follow from the iteration's number.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        *,
        keep_last: int,
        keep_best: int,
        origin: Mapping[str, Any],
        unit: Literal["iteration", "step"] = "iteration",
        write_agent: Callable[[Path], None] | None = None,
        generators: bool = True,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
        self._run, self._accelerator = run, accelerator
        self._model, self._agent = model, accelerator.unwrap_model(model)
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._keep_last, self._keep_best = keep_last, keep_best
        self._origin = origin
        self._unit, self._write_agent, self._generators = unit, write_agent, generators
        self._boundary: _Boundary | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_main = self._accelerator.is_main_process
        if error is not None:
            leave(farewell=False)
        if isinstance(error, SystemExit):
            if self._boundary is not None:
                folder = self._save(None)
                if is_main:
                    print(f"stopped; the state is in {folder}. Go on with --resume {self._run.path}")
        elif isinstance(error, Exception):
            # Other processes are elsewhere, so that sharded weights cannot be gathered.
            if self._boundary is not None and is_main and not self._accelerator.is_fsdp2:
                folder = self._save(None)
                phase = "rollout" if self._unit == "iteration" else "step"
                error.add_note(f"the state before this {phase} is in {folder}; go on with --resume {self._run.path}")
            else:
                error.add_note(self._newest())

    def take(
        self,
        iteration: int,
        global_step: int,
        env_states: EnvStates | None = None,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Takes the present moment as the boundary after `iteration`; every process must call it.

        Args:
            iteration: iterations done.
            global_step: environment steps done by all processes.
            env_states: states of this process's environments by their number among all; None if they have none.
            tensors: further named tensors, by the name of their file; not changed until `begin_update`.
        """
        generators = [generator_states()] if self._generators else []
        states = env_states
        if self._accelerator.num_processes > 1 and self._generators:
            generators = cast(Any, gather_object(generators))
            stacked = None if env_states is None else StackedStates.of(env_states)
            states = merged_states(cast(Any, gather_object([stacked])))
        self._boundary = _Boundary(
            iteration=iteration,
            global_step=global_step,
            env_states=states,
            tensors=tensors or {},
            generators=generators,
        )

    def begin_update(self) -> None:
        """Says that weights are about to change: the boundary cannot be saved any more."""
        self._boundary = None

    def save(self, score: float | None = None) -> Path:
        """Writes the boundary, whole or not at all, deletes old checkpoints, and returns the folder.

        A boundary that was saved before is not written again. Collective: the others wait for the main process.

        Args:
            score: what the best checkpoints are chosen by, if there is one.

        Raises:
            OSError: it cannot be written; checkpoints that were there still are.
            RuntimeError: weights have changed since the boundary.
        """
        folder = self._save(score)
        wait_for_main(self._accelerator)
        return folder

    def _save(self, score: float | None) -> Path:
        boundary = self._boundary
        if boundary is None:
            raise RuntimeError("weights have changed since the last boundary; take() one before save()")
        folder = self._run.path / "checkpoints" / f"{self._unit}_{boundary.iteration}"
        is_sharded, is_main = (self._accelerator.is_fsdp2, self._accelerator.is_main_process)
        if is_sharded or (is_main and not _is_saved(folder)):
            tensors = {"weights": self._weights(), "optimizer": self._optimizer_state(), **boundary.tensors}
            write_agent = self._write_agent or self._agent_writer()
            if is_main and not _is_saved(folder):
                self._write(folder, boundary, score, tensors, write_agent)
                self._delete_old()
        return folder

    def _write(
        self,
        folder: Path,
        boundary: _Boundary,
        score: float | None,
        tensors: Mapping[str, Mapping[str, Tensor]],
        write_agent: Callable[[Path], None],
    ) -> None:
        content = {
            "iteration": boundary.iteration,
            "global_step": boundary.global_step,
            "score": score,
            "origin": self._origin,
            "num_processes": self._accelerator.num_processes,
            "generators": list(boundary.generators),
            "learning_rates": [group["lr"] for group in self._optimizer.param_groups],
        }
        try:
            with whole_folder(folder) as temporary:
                write_agent(temporary)
                state_folder = temporary / STATE_FOLDER
                state_folder.mkdir()
                for name, values in tensors.items():
                    on_cpu = {key: value.detach().cpu().contiguous() for key, value in values.items()}
                    save_file(on_cpu, state_folder / f"{name}.safetensors")
                if boundary.env_states is not None:
                    _write_env_states(state_folder / "envs.npz", boundary.env_states)
                write_json(state_folder / STATE_FILE, content)
        except OSError as error:
            error.add_note(f"{folder} was not written; {self._newest()}")
            raise

    def restore(self, folder: Path) -> RestoredState:
        """Puts weights, optimiser state, step sizes and generators back, and returns what else the checkpoint says.

        Metrics of later iterations, which are about to be written again, are dropped, and old checkpoints deleted.

        Raises:
            ValueError: the checkpoint is of another network, the run began with something else than what is there now
                (`check_origin`), or a file of it is damaged.
        """
        content, files = _read_state(folder), _read_tensors(folder)
        env_states = _read_env_states(folder)
        self._put_weights(files.pop("weights"), folder)
        unknown = from_main(self._accelerator, lambda: check_origin(folder, self._origin))
        self._put_optimizer_state(files.pop("optimizer"), content["learning_rates"])
        notes = [f"going on from {folder}"]
        if unknown:
            notes.append(
                f"{folder} is of an earlier version, so this is not compared with the start: {', '.join(unknown)}"
            )
        rank, num_processes = (self._accelerator.process_index, self._accelerator.num_processes)
        if self._generators and content["num_processes"] == num_processes:
            restore_generators(content["generators"][rank])
        elif self._generators:
            notes.append(
                f"{folder} was saved by {content['num_processes']} processes, these are {num_processes}: the global "
                "random number generators, which the trainers do not use, begin anew"
            )
        if self._accelerator.is_main_process:
            print("\n".join(notes))
            self._run.forget_after(content["iteration"])
            self._delete_old()
        return RestoredState(
            iteration=content["iteration"], global_step=content["global_step"], env_states=env_states, tensors=files
        )

    def _newest(self) -> str:
        found = checkpoints_in(self._run.path)
        return f"the newest checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"

    def _weights(self) -> Mapping[str, Tensor]:
        """Returns trained parameters and buffers, whole; empty on other processes than the main one."""
        return cast(Any, get_model_state_dict(self._model, options=_WHOLE))

    def _put_weights(self, weights: dict[str, Tensor], folder: Path) -> None:
        targets = get_model_state_dict(self._model, options=StateDictOptions(ignore_frozen_params=True))
        found, wanted = ({k: tuple(v.shape) for k, v in tensors.items()} for tensors in (weights, cast(Any, targets)))
        if found != wanted:
            differing = sorted(found.keys() ^ wanted.keys())[:5] or "shapes"
            raise ValueError(f"{folder} is of another network or trains other parts of it (differing: {differing})")
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self._model, cast(Any, weights), options=options)

    def _optimizer_state(self) -> dict[str, Tensor]:
        if not self._optimizer.state:  # asking for it would take a first step of zero
            return {}
        whole = get_optimizer_state_dict(self._model, self._optimizer, options=_WHOLE)
        states = cast(Mapping[str, Mapping[str, Tensor]], whole.get("state") or {})
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def _put_optimizer_state(self, tensors: Mapping[str, Tensor], learning_rates: Sequence[float]) -> None:
        self._optimizer.state.clear()
        states: dict[str, dict[str, Tensor]] = {}
        for label, value in tensors.items():
            name, _, key = label.rpartition("/")
            states.setdefault(name, {})[key] = value
        if states:
            whole = cast(Any, get_optimizer_state_dict(self._model, self._optimizer))
            for name, state in whole["state"].items():  # of zeros, and in shards where the weights are
                zeros = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
                whole["state"][name] = states.get(name, zeros)
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self._model, self._optimizer, whole, options=options)
        for name, parameter in self._agent.named_parameters():
            if name not in states:  # had no gradient yet
                self._optimizer.state.pop(parameter, None)
        for group, rate in zip(self._optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate

    def _agent_writer(self) -> Callable[[Path], None]:
        if not self._accelerator.is_fsdp2:
            return self._agent.save_pretrained
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self._model, options=options)
        return lambda folder: self._agent.save_pretrained(folder, state_dict=weights)

    def _delete_old(self) -> None:
        found = checkpoints_in(self._run.path)
        scores: list[tuple[float, int]] = []
        for iteration, path in found:
            if (score := _score_of(path)) is not None:
                scores.append((score, iteration))
        kept = {iteration for iteration, _ in found[-self._keep_last :]}
        kept |= {iteration for _, iteration in sorted(scores, reverse=True)[: self._keep_best]}
        for iteration, path in found:
            if iteration not in kept:
                remove_folder(path)


def _is_saved(folder: Path) -> bool:
    return (folder / STATE_FOLDER / STATE_FILE).is_file()


def _score_of(folder: Path) -> float | None:
    return _read_state(folder)["score"]


@contextmanager
def _whole(file: Path) -> Generator[None]:
    """Raises ValueError, which names the file and what else there is to go on from, if it cannot be read."""
    try:
        yield
    except (ValueError, TypeError, EOFError, BadZipFile, SafetensorError) as error:
        folder, run_path = file.parents[1], file.parents[3]
        others = [path for _, path in checkpoints_in(run_path) if path.name != folder.name]
        remedy = "it is the run's only checkpoint, so start a new run"
        if others:
            remedy = f"then --resume {run_path} goes on from {others[-1].name}"
        raise ValueError(f"{file} is damaged ({error}); remove {folder}: {remedy}") from error


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / STATE_FOLDER / STATE_FILE
    with _whole(file):
        content = json.loads(file.read_text("utf-8"))
        if absent := sorted(name for name in _STATE_NAMES if name not in content):
            raise ValueError(f"it lacks {', '.join(absent)}")
    return content


def _read_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each file by its name; `weights` and `optimizer` are among them."""
    paths = {path.stem: path for path in (folder / STATE_FOLDER).glob("*.safetensors")}
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in sorted({"weights", "optimizer", *paths}):
        file = folder / STATE_FOLDER / f"{name}.safetensors"
        with _whole(file):
            if name not in paths:
                raise ValueError("it is gone")
            tensors[name] = load_file(file)
    return tensors


def _write_env_states(path: Path, states: EnvStates) -> None:
    arrays = {f"{env_id}/{name}": array for env_id, state in states.items() for name, array in state.items()}
    objects = sorted(label for label, array in arrays.items() if array.dtype.hasobject)
    if objects:
        raise TypeError(f"states of environments must be arrays without objects; these have some: {objects[:5]}")
    np.savez(path, **cast(Any, arrays))


def _read_env_states(folder: Path) -> dict[int, dict[str, Any]] | None:
    """Returns the environments' states by their numbers; None if none were saved."""
    file = folder / STATE_FOLDER / "envs.npz"
    if not file.is_file():
        return None
    states: dict[int, dict[str, Any]] = {}
    with _whole(file), file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        for label in arrays.files:
            env_id, _, name = label.partition("/")
            states.setdefault(int(env_id), {})[name] = arrays[label]
    return states


class StopSignal:
    """SIGTERM or SIGINT (Ctrl-C) to any process of a run as a request to save and end all of them.

    The exit status is 0 after SIGTERM and 130 after SIGINT. A second SIGINT ends the program at once. Used as a
    context, and only in the main thread; elsewhere signals keep their meaning.

    All processes end at the same `check_together`, because one that ended elsewhere would leave the others waiting in
    a collective operation. Between two of them, where no other collective operation is, `check` lets those that know
    of a request go to the next one at once.

    Args:
        accelerator: of this process.
    """

    # A launcher passes on a signal that the terminal has sent to all; it is no second one.
    _ECHO_S = 2.0

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._status: int | None = None
        self._requested_at = 0.0
        self._previous: dict[int, Any] = {}
        self._previous_wakeup = -1
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._handles:
            self._previous = {n: signal.signal(n, self._request) for n in (signal.SIGTERM, signal.SIGINT)}
            if Watch.current is not None:
                self._previous_wakeup = signal.set_wakeup_fd(Watch.current.wakeup.fileno())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles and Watch.current is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int | None:
        """Exit status if this process was asked to end, or has heard that another one was, else None."""
        heard = None if Watch.current is None else Watch.current.stop_signal
        if self._status is None and heard is not None:
            return exit_status(heard)
        return self._status

    def watched(self, envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
        """Returns environments for an evaluation that ends at the next step if it is asked to."""
        return checked_every_step(envs, self._check_evaluation)

    def check(self) -> None:
        """Raises SystemExit if the program was asked to end, as far as this process knows."""
        if self.status is not None or self._accelerator.is_fsdp2:
            self.check_together()

    def check_together(self) -> None:
        """Raises SystemExit on all processes if one was asked to end; collective."""
        status = self.status
        if self._accelerator.num_processes > 1:
            flag = torch.tensor(-1 if status is None else status, device=self._accelerator.device)
            largest = int(over_processes(self._accelerator, flag, "max"))
            status = largest if largest >= 0 else None
        if status is not None:
            raise SystemExit(status)

    def _check_evaluation(self) -> None:
        """Raises SystemExit, which `for_all` passes on to those that wait."""
        if self._accelerator.is_fsdp2:  # all do the same
            self.check_together()
        elif self.status is not None:
            raise SystemExit(self.status)

    def _request(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._status is None:
            self._status = exit_status(number)
            self._requested_at = now
            if number == signal.SIGINT:
                os.write(2, b"\nstopping at the next chance to save; once more ends at once, and saves nothing\n")
        elif number == signal.SIGINT and now - self._requested_at > self._ECHO_S:
            raise KeyboardInterrupt


def checked_every_step(envs: gym.vector.VectorEnv, check: Callable[[], None]) -> gym.vector.VectorEnv:
    """Returns `envs` calling `check` before every step."""
    return _Checked(envs, check)


class _Checked(gym.vector.VectorWrapper):
    def __init__(self, envs: gym.vector.VectorEnv, check: Callable[[], None]) -> None:
        super().__init__(envs)
        self._check = check

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._check()
        return super().step(actions)
