"""Checkpoints of a run that goes on where it stopped: after a kill, a full disk, a fault or a request to stop.

    runs/<name>/checkpoints/iteration_50/     what `from_pretrained` loads
        training_state/
            weights.safetensors    trained parameters and buffers
            optimizer.safetensors  its state by parameter name
            envs.npz               state of every environment, if environments can give it
            state.json             iteration, environment steps, score, step sizes, random number generators

A checkpoint appears under its name only when it is whole. It describes the boundary between two iterations. What
belongs to a boundary besides weights and optimiser is taken there, in memory, at every iteration; as long as no
optimiser step was taken since, the boundary can still be saved, so a fault in a rollout loses no finished iteration.
Only the main process writes. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, cast

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.common.arguments import RunArgs, check_args
from algorithms.common.distributed import assign, over_processes, sharded_like, whole, whole_weights
from algorithms.common.evaluation import evaluation_file
from algorithms.common.overlap import EnvStages, EnvState
from algorithms.common.randomness import EPISODES, seed_of
from algorithms.common.run_folder import RunFolder, base_name, write_json
from algorithms.common.training_state import forget_metrics_after, reopen_run, trained_parameters

STATE_FOLDER = "training_state"
STATE_FILE = "state.json"
# Arguments that every trainer lets differ between a run and its continuation.
FREE_ARGS = {
    "preset", "resume", "output_dir", "run_name", "num_iterations", "save_interval", "keep_last", "keep_best",
    "eval_interval", "eval_episodes_per_task", "video_interval", "log_with", "renderer", "micro_batch_size",
    "feature_storage", "feature_memory_gb", "pipeline_stage_num", "env_timeout_s", "compile", "max_ratio_deviation",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """What belongs to the boundary after an iteration, besides weights and optimiser.

    Attributes:
        iteration: iterations done.
        global_step: environment steps done by all processes.
        generators: state of torch's, NumPy's and Python's global generators on each process.
        env_states: state of every environment by its number; None if environments cannot give any.
    """

    iteration: int
    global_step: int
    generators: Sequence[dict[str, Any]]
    env_states: Mapping[int, EnvState] | None


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
    found: list[tuple[int, Path]] = []
    for path in (run_path / "checkpoints").glob("iteration_*"):
        match = re.fullmatch(r"iteration_(\d+)", path.name)
        if match and (path / STATE_FOLDER / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def open_run(args: Any, accelerator: Accelerator) -> tuple[RunFolder, Path | None]:
    """Returns the run's folder, and the checkpoint to go on from if `args.resume` asks for one.

    Args:
        args: a trainer's arguments. `resume` is None (a new run), `auto` (the newest run of this name, or a new one if
            there is none with a checkpoint), or the path of a run or of its newest checkpoint.
        accelerator: its trackers log into the folder.

    Raises:
        FileNotFoundError: there is no checkpoint at the path.
        ValueError: an argument is out of its range, the run had other arguments or has done more iterations than are
            asked for, or the checkpoint is not its newest.
    """
    check_args(args)
    if args.resume is None:
        return RunFolder.create(args, accelerator), None
    checkpoint: Path | None = None
    if str(args.resume) == "auto":
        path, name = _newest_run(Path(args.output_dir), base_name(args)), base_name(args)
        if path is None:
            if accelerator.is_main_process:
                print(f"--resume auto: no checkpoint of a run {name} in {args.output_dir}; a new run begins")
            return RunFolder.create(args, accelerator), None
    else:
        path = Path(args.resume)
        if (path / STATE_FOLDER / STATE_FILE).is_file():
            path, checkpoint = path.parent.parent, path
    found = checkpoints_in(path)
    if not found:
        raise FileNotFoundError(
            f"{path} holds no checkpoint to go on from; give the folder of a run that has saved one, or start a new "
            "run with --model"
        )
    done, newest = found[-1]
    if done > args.num_iterations:
        raise ValueError(
            f"num_iterations={args.num_iterations}, but {path} has done {done}: give {done} or more, or start a new "
            f"run with --model {newest}"
        )
    if checkpoint is not None and checkpoint.resolve() != newest.resolve():
        raise ValueError(
            f"{checkpoint} is not the newest checkpoint of its run ({newest.name} is); resume the run, or start a new "
            f"one with --model {checkpoint}"
        )
    return reopen_run(path, args, accelerator, FREE_ARGS), newest


def _newest_run(output_dir: Path, name: str) -> Path | None:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    numbered: list[tuple[int, Path]] = []
    for path in output_dir.glob(f"{name}*"):
        match = pattern.fullmatch(path.name)
        if match and checkpoints_in(path):
            numbered.append((int(match[1] or 1), path))
    return max(numbered)[1] if numbered else None


class Checkpoints:
    """Takes, saves and restores the boundaries of a run.

    As a context, it saves the last boundary when the run is stopped or fails before an optimiser step was taken.

    Args:
        run: its folder.
        accelerator: of this process.
        model: the prepared model.
        optimizer: the prepared optimiser, one whose state is tensors, such as AdamW.
        stages: the environments.
        args: of the run: `keep_last` newest checkpoints are kept, and the `keep_best` with the best score; with `seed`,
            an environment's number decides its episodes.
        episodes_go_on: True if episodes go on over boundaries, so that environments' states belong to them.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        stages: EnvStages,
        args: RunArgs,
        *,
        episodes_go_on: bool,
    ) -> None:
        if args.keep_last < 1 or args.keep_best < 0:
            raise ValueError(f"keep_last={args.keep_last} must be at least 1 and keep_best={args.keep_best} at least 0")
        self._run, self._accelerator = run, accelerator
        self._model, self._agent = model, accelerator.unwrap_model(model)
        self._optimizer, self._stages = optimizer, stages
        self._keep_last, self._keep_best, self._seed = args.keep_last, args.keep_best, args.seed
        self._episodes_go_on, self._evaluates = episodes_go_on, args.evaluates
        self._folder = run.path / "checkpoints"
        self._boundary: Boundary | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_main = self._accelerator.is_main_process
        if isinstance(error, SystemExit):
            if self._boundary is not None:
                folder = self.save()
                if is_main:
                    print(f"stopped; the state is in {folder}. Go on with --resume {self._run.path}")
        elif isinstance(error, Exception):
            if self._stages.failed_actions:
                path = self._run.dump("failed_actions", self._stages.failed_actions)
                error.add_note(f"the actions of the step that failed are in {path}")
            # Other processes are elsewhere, so that sharded weights cannot be gathered.
            if self._boundary is not None and is_main and not self._accelerator.is_fsdp2:
                folder = self.save()
                error.add_note(f"the state before this rollout is in {folder}; go on with --resume {self._run.path}")
            else:
                error.add_note(self._newest())

    def start(self, folder: Path | None) -> tuple[int, int]:
        """Begins with new episodes, or goes on from the checkpoint in `folder`, and takes the boundary.

        Returns:
            The iterations and environment steps done before.

        Raises:
            ValueError: the checkpoint is of another network or other environments.
        """
        iteration, global_step = (0, 0) if folder is None else self._restore(folder)
        for stage in self._stages:
            if self._episodes_go_on and not stage.obs:
                stage.reset([seed_of(self._seed, EPISODES, iteration, int(env_id)) for env_id in stage.env_ids])
        self.take(iteration, global_step)
        return iteration, global_step

    def take(self, iteration: int, global_step: int) -> None:
        """Takes the present moment as the boundary after `iteration`; every process must call it."""
        generators, env_states = [generator_states()], [self._stages.states() if self._episodes_go_on else None]
        if self._accelerator.num_processes > 1:
            generators, env_states = cast(Any, gather_object(generators)), cast(Any, gather_object(env_states))
        states = None
        if all(part is not None for part in env_states):
            states = {env_id: state for part in env_states if part is not None for env_id, state in part.items()}
        self._boundary = Boundary(
            iteration=iteration, global_step=global_step, generators=generators, env_states=states
        )

    def begin_update(self) -> None:
        """Says that weights are about to change: the boundary cannot be saved any more."""
        self._boundary = None

    def save(self, score: float | None = None) -> Path:
        """Writes the boundary, whole or not at all, deletes old checkpoints, and returns the folder.

        Collective if the weights are sharded.

        Args:
            score: what the best checkpoints are chosen by; None keeps that of a checkpoint that was there, if any.

        Raises:
            OSError: it cannot be written; checkpoints that were there still are.
            RuntimeError: weights have changed since the boundary.
        """
        boundary = self._boundary
        if boundary is None:
            raise RuntimeError("weights have changed since the last boundary; take() one before save()")
        folder = self._folder / f"iteration_{boundary.iteration}"
        score = _score_of(folder) if score is None else score
        state_dict = whole_weights(self._accelerator, self._model)
        tensors = {"weights": self._weights(), "optimizer": self._optimizer_state()}
        if not self._accelerator.is_main_process:
            return folder
        try:
            with self._run.written_whole(folder) as temporary:
                self._agent.save_pretrained(temporary, **({} if state_dict is None else {"state_dict": state_dict}))
                state_folder = temporary / STATE_FOLDER
                state_folder.mkdir()
                for name, values in tensors.items():
                    save_file(values, state_folder / f"{name}.safetensors")
                if boundary.env_states is not None:
                    arrays = {
                        f"{env_id}/{name}": array
                        for env_id, state in boundary.env_states.items()
                        for name, array in state.items()
                    }
                    np.savez(state_folder / "envs.npz", **cast(Any, arrays))
                content = dict(
                    iteration=boundary.iteration, global_step=boundary.global_step, score=score,
                    num_processes=self._accelerator.num_processes, generators=list(boundary.generators),
                    learning_rates=[group["lr"] for group in self._optimizer.param_groups],
                )  # fmt: skip
                write_json(state_folder / STATE_FILE, content)
        except OSError as error:
            error.add_note(f"{folder} was not written; {self._newest()}")
            raise
        self._delete_old()
        return folder

    def _restore(self, folder: Path) -> tuple[int, int]:
        state_folder = folder / STATE_FOLDER
        content = json.loads((state_folder / STATE_FILE).read_text("utf-8"))
        self._put_weights(load_file(state_folder / "weights.safetensors"), folder)
        self._put_optimizer_state(load_file(state_folder / "optimizer.safetensors"))
        for group, rate in zip(self._optimizer.param_groups, content["learning_rates"], strict=True):
            group["lr"] = rate
        rank, num_processes = self._accelerator.process_index, self._accelerator.num_processes
        notes: list[str] = []
        if (state_folder / "envs.npz").is_file():
            states = _read_env_states(state_folder / "envs.npz")
            for stage in self._stages:
                stage.restore(states)
        elif self._episodes_go_on:
            notes.append(f"{folder} holds no environment states: new episodes begin")
        if content["num_processes"] == num_processes:
            restore_generators(content["generators"][rank])
        else:
            notes.append(
                f"{folder} was saved by {content['num_processes']} processes, these are {num_processes}: the global "
                "random number generators, which the trainers do not use, begin anew"
            )
        done = content["iteration"]
        if self._evaluates(done) and not evaluation_file(self._run.path, done).is_file():
            notes.append(
                f"the evaluation of {folder} was interrupted and is not done again: `python algorithms/eval_gr00t.py "
                f"--checkpoint {folder}` does it"
            )
        if self._accelerator.is_main_process:
            print("\n".join([f"going on from {folder}", *notes]))
            forget_metrics_after(self._run.path / "metrics.jsonl", content["iteration"])
        return content["iteration"], content["global_step"]

    def _newest(self) -> str:
        found = checkpoints_in(self._run.path)
        return f"the newest checkpoint is {found[-1][1]}" if found else "there is no checkpoint yet"

    def _weights(self) -> dict[str, Tensor]:
        """Returns trained parameters and buffers, whole and on the CPU; empty on other processes than the main one."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._trained().items():
            value = whole(tensor.detach())
            if self._accelerator.is_main_process:
                tensors[name] = value.to("cpu", copy=True).contiguous()
        return tensors

    def _trained(self) -> dict[str, Tensor]:
        parameters = dict(self._agent.named_parameters())
        buffers = {name: value for name, value in self._agent.state_dict().items() if name not in parameters}
        return {**trained_parameters(self._agent), **buffers}

    def _put_weights(self, weights: dict[str, Tensor], folder: Path) -> None:
        targets = self._trained()
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if shapes != {name: tuple(value.shape) for name, value in targets.items()}:
            differing = sorted(set(shapes) ^ targets.keys())[:5] or "shapes"
            raise ValueError(f"{folder} is of another network or trains other parts of it (differing: {differing})")
        for name, target in targets.items():
            assign(target, weights[name])

    def _optimizer_state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(self._agent).items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                value = whole(value)
                if self._accelerator.is_main_process:
                    tensors[f"{name}/{key}"] = value.to("cpu", copy=True).contiguous()
        return tensors

    def _put_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = trained_parameters(self._agent)
        self._optimizer.state.clear()
        for label, value in tensors.items():
            name, _, key = label.rpartition("/")
            state = self._optimizer.state.setdefault(parameters[name], {})
            # AdamW counts steps on the CPU.
            state[key] = value if value.ndim == 0 else sharded_like(parameters[name], value)

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
                # Renamed first: a checkpoint under its own name is whole.
                doomed = path.with_name(f".{path.name}.old")
                path.replace(doomed)
                shutil.rmtree(doomed)


def _score_of(folder: Path) -> float | None:
    file = folder / STATE_FOLDER / STATE_FILE
    return json.loads(file.read_text("utf-8"))["score"] if file.is_file() else None


def _read_env_states(path: Path) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for label in arrays.files:
            env_id, _, name = label.partition("/")
            states.setdefault(int(env_id), {})[name] = arrays[label]
    return states


class StopSignal:
    """SIGTERM as a request to save and end: `check` then ends the program with exit status 0.

    Used as a context, and only in the main thread; elsewhere SIGTERM keeps its meaning.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._is_requested = False
        self._previous: Any = None
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)

    def watched(self, envs: gym.vector.VectorEnv) -> gym.vector.VectorEnv:
        """Returns environments that `check` at every step."""
        return _Watched(envs, self.check)

    def check(self) -> None:
        """Raises SystemExit if SIGTERM has come; where weights are sharded, on all processes at the same call."""
        requested = self._is_requested
        if self._accelerator.is_fsdp2:
            flag = torch.tensor(float(requested), device=self._accelerator.device)
            requested = bool(over_processes(self._accelerator, flag, "max"))
        if requested:
            raise SystemExit(os.EX_OK)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._is_requested = True


class _Watched(gym.vector.VectorWrapper):
    """Calls `check` before every step."""

    def __init__(self, envs: gym.vector.VectorEnv, check: Callable[[], None]) -> None:
        super().__init__(envs)
        self._check = check

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self._check()
        return super().step(actions)
