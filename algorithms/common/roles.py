"""The roles of a cluster that compute: processes that decide, and the group that learns.

What is here is the same for every trainer: places, env workers, versions of weights, checkpoints, requests to stop. How
a policy is made, played and updated says the trainer, in one subclass for each role. A method of a role runs in a
process of its own, on the call of `algorithms.common.cluster`.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import ray
import torch
from accelerate import Accelerator
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from algorithms.common.args import STATE_MODEL
from algorithms.common.batch import concatenate
from algorithms.common.cluster_process import Bell
from algorithms.common.env_worker import Step
from algorithms.common.episodes import Episode, finished_episodes, iterations_ago
from algorithms.common.evaluation import evaluate_into
from algorithms.common.placement import Place
from algorithms.common.processes import for_all, make_accelerator, refuse_sharding
from algorithms.common.resume import Checkpoints, RestoredState, checked_every_step
from algorithms.common.rollouts import Rollout, from_store, split_rollout, to_store
from algorithms.common.run import RunFolder
from algorithms.common.stages import EnvStage, EnvStep
from algorithms.common.vector_envs import StackedStates, merged_states
from algorithms.common.video import RolloutRecorder

# Errors of a call whose actor, node or object is gone.
LOST = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, ActorUnschedulableError)


def result(call: Any, timeout: float | None = None) -> Any:
    """Returns what a call returns, or raises what it raised, as it was raised there."""
    try:
        return ray.get(call, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error, LOST):
            raise
        raise cast(Any, error).cause from error


def refuse_unmade(error: Exception, what: str) -> None:
    """Raises RuntimeError if an actor was not lost, but raised an error as it was made: so would the next one."""
    if getattr(error, "actor_init_failed", False):
        raise RuntimeError(f"{what} could not be made: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rollout worker tells the driver of a rollout.

    Attributes:
        is_lost: an env worker was lost; the rest is empty.
        ended: episodes that ended, each with the number of iterations ago in which it began.
        env_steps: environment steps.
        seconds: of stepping (`env_s`) and waiting for it (`env_wait_s`), each summed over stages, the rest
            (`policy_s`), and in which environments did nothing since the last rollout ended (`env_idle_s`), a mean
            over stages.
        env_states: states of its environments after it; None if they cannot give any.
    """

    is_lost: bool = False
    ended: Sequence[tuple[Episode, int]] = ()
    env_steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    env_states: StackedStates | None = None


def mean_seconds(reports: Sequence[Report]) -> dict[str, float]:
    """Returns `time/*` of a rollout, means over the processes that reported."""
    names = reports[0].seconds
    return {f"time/{name}": float(np.mean([report.seconds[name] for report in reports])) for name in names}


# --- environments, as a rollout worker sees them ---


class OwnStage(EnvStage):
    """Some of a rollout worker's environments, in its own process: what they observe may stay on its GPU."""

    def settle(self) -> None:
        """Forgets a rollout that an error has ended, perhaps in the middle of a step.

        Raises:
            TimeoutError: the step does not end.
        """
        self._drop_step()
        self.failed_actions = None
        if self._is_stuck:
            raise TimeoutError(f"environments {self._names()} are in a step that does not end, and cannot be opened")

    def open(self, openings: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Observes by one of the methods of `EnvWorker` that do, with its inputs."""
        ((method, inputs),) = openings
        if method == "reset":
            self.reset(*inputs)
        elif method == "restore":
            self.restore(dict(zip(self.env_ids.tolist(), *inputs, strict=True)))
        else:
            assert method == "observe", method

    def stacked_states(self) -> StackedStates | None:
        """Returns the environments' states by their number among all; None if they cannot give any."""
        return StackedStates.of(self.states()) if self.can_restore else None


class EnvWorkerLost(Exception):
    """An env worker is gone."""


class RemoteStage:
    """Some of a rollout worker's environments, on one or more env workers, with the methods of `OwnStage`.

    Args:
        workers: handles of `EnvWorker`s, each with equally many environments.
        env_ids: [n] numbers of the environments among all.
        offset: place of the first among the rollout worker's environments.
        timeout_s: seconds that a step may take; making, resetting and restoring environments may take any.

    Attributes:
        obs: the last observation.
        wait_s: seconds that `receive` waited so far.
        busy_s: seconds of stepping so far, a mean over the workers.
        failed_actions: what the step was given that raised or did not end.
    """

    def __init__(self, workers: Sequence[Any], env_ids: NDArray[np.intp], offset: int, timeout_s: float) -> None:
        self.workers, self.env_ids, self.offset = list(workers), env_ids, offset
        self.obs: dict[str, Any] = {}
        self.wait_s, self.busy_s = 0.0, 0.0
        self.failed_actions: NDArray[np.float32] | None = None
        self._actions = np.zeros(0, dtype=np.float32)
        self._timeout_s = timeout_s
        self._calls: list[Any] = []

    @property
    def rows(self) -> slice:
        """Where these environments are among the rollout worker's."""
        return slice(self.offset, self.offset + len(self.env_ids))

    def open(self, openings: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Observes: each worker by a method with its inputs (`reset`, `restore` or `observe`)."""
        pairs = zip(self.workers, openings, strict=True)
        observed = self._results([getattr(worker, name).remote(*inputs) for worker, (name, inputs) in pairs])
        self.obs = concatenate(observed)

    def send(self, actions: NDArray[np.float32]) -> None:
        """Starts a step with `actions`, one for each environment."""
        self._actions = actions
        parts = np.split(actions, len(self.workers))
        self._calls = [worker.step.remote(part) for worker, part in zip(self.workers, parts, strict=True)]

    def receive(self) -> EnvStep:
        """Returns the outcome of the step that `send` started.

        Raises:
            EnvWorkerLost: a worker is gone.
            TimeoutError: the step has not ended in time.
            Exception: whatever the environments raised.
        """
        start = time.perf_counter()
        try:
            results = self._results(self._calls, self._timeout_s)
        except GetTimeoutError:
            self.failed_actions = self._actions
            raise TimeoutError(
                f"environments {self.env_ids[0]} to {self.env_ids[-1]} have not ended a step within "
                f"env_timeout_s={self._timeout_s:g}; look for a hanging renderer or simulation, or raise env_timeout_s"
            ) from None
        except EnvWorkerLost:
            raise
        except Exception as error:
            self.failed_actions = self._actions
            error.add_note(f"raised by a step of environments {self.env_ids[0]} to {self.env_ids[-1]}")
            raise
        self.wait_s += time.perf_counter() - start
        self.busy_s += float(np.mean([seconds for _, seconds in results]))
        step = join_steps([step for step, _ in results])
        self.obs = step.obs
        return step

    def stacked_states(self) -> StackedStates | None:
        """Returns the environments' states by their number among all; None if they cannot give any."""
        parts = self._results([worker.states.remote() for worker in self.workers])
        ids = np.split(self.env_ids, len(self.workers))
        return merged_states(
            [None if part is None else part.renumbered(own) for part, own in zip(parts, ids, strict=True)]
        )

    def set_task_weights(self, weights: NDArray[np.float64]) -> None:
        """Says how often the episodes that start from now on are of which task."""
        self._results([worker.set_task_weights.remote(weights) for worker in self.workers])

    def _results(self, calls: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
        """Returns what calls return, all within so many seconds if they are limited."""
        start = time.monotonic()
        try:
            return [
                result(call, None if timeout_s is None else max(0.0, start + timeout_s - time.monotonic()))
                for call in calls
            ]
        except LOST as error:
            refuse_unmade(error, f"environments {self.env_ids[0]} to {self.env_ids[-1]}")
            raise EnvWorkerLost(str(error)) from None


def join_steps(steps: Sequence[Step]) -> EnvStep:
    """Returns the steps of several env workers as one of all their environments.

    Where episodes have ended on some workers only, the rows of the others in `final_obs` hold the last observation,
    those in `final_info` zeros, and those in masks False.
    """
    obs, rewards, terminated, truncated, infos = zip(*steps, strict=True)
    with_final = next((info for info in infos if "final_info" in info), None)
    if with_final is not None:
        added = with_final.keys() & {"final_info", "_final_info", "_final_obs"}
        infos = [
            info
            if "final_info" in info
            else info | _zeros({name: with_final[name] for name in added}, len(of_worker)) | {"final_obs": last}
            for info, of_worker, last in zip(infos, rewards, obs, strict=True)
        ]
    reward, terminal, truncation = (np.concatenate(x) for x in (rewards, terminated, truncated))
    return EnvStep(concatenate(obs), reward, terminal, truncation, concatenate(infos))


def _zeros(tree: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns arrays of `count` zeros that are nested, shaped and typed as `tree`."""
    return {
        name: _zeros(leaf, count)
        if isinstance(leaf, Mapping)
        else np.zeros((count, *np.shape(leaf)[1:]), np.asarray(leaf).dtype)
        for name, leaf in tree.items()
    }


# --- the role that decides ---


class RolloutRole:
    """A process that decides for some of the environments, with weights that learners have published.

    A subclass makes `agent` in `build`, and says in `play` how a rollout is played.

    Args:
        place: where it runs.
        bell: of the run.
        args: the trainer's arguments.
        make_agent: makes the agent from them.
        run_path: folder of the run.
        number: of this process among those of its role.
        env_ids: [n] numbers of its environments among all.
        make_envs: makes so many environments with images of a size, for this process; None if env workers step them.

    Attributes:
        accelerator: of this process, a group of its own.
        run: the run's folder.
        agent: the agent.
        stages: its environments, in stages.
        recorder: films the first environments.
    """

    agent: Any
    recorder: RolloutRecorder

    def __init__(
        self,
        place: Place,
        bell: Bell,
        args: Any,
        make_agent: Callable[..., Any],
        run_path: Path,
        number: int,
        env_ids: NDArray[np.intp],
        make_envs: Callable[[int, int], gym.vector.VectorEnv] | None = None,
    ) -> None:
        _limit_threads(place)
        refuse_sharding()
        self.args, self.make_agent, self.number, self.env_ids = args, make_agent, number, env_ids
        self.accelerator = make_accelerator((), args.output_dir)
        self.run = RunFolder(run_path, self.accelerator)
        self.stages: list[RemoteStage] | list[OwnStage] = []
        self.build()
        self._own_stages: list[OwnStage] = []
        if make_envs is not None:
            self._own_stages = self._make_stages(make_envs)
        self._trained = dict(self.agent.named_parameters()) | dict(self.agent.named_buffers())
        self._has_lost_envs = True  # none are there yet
        self._ended: list[tuple[Episode, int]] = []
        self._env_steps = 0
        self._ended_at = time.perf_counter()

    def build(self) -> None:
        """Makes the agent."""
        raise NotImplementedError

    def play(self, iteration: int, version: int) -> Rollout:
        """Returns the rollout of an iteration, played by weights of a version; tells `add_step` of each step."""
        raise NotImplementedError

    def add_step(self, step: int, stage: RemoteStage | OwnStage, outcome: EnvStep) -> None:
        """Takes in what the decision `step` of an iteration, from 0, has led to in a stage."""
        is_end = outcome.terminated | outcome.truncated
        sizes = dict(num_action_chunks=self.args.num_action_chunks, decisions=self.args.num_steps)
        for episode in finished_episodes(outcome.infos, is_end):
            self._ended.append((episode, iterations_ago(episode.length, step, **sizes)))
        self._env_steps += int(outcome.infos["num_steps"].sum())
        if stage.offset == 0:
            self.recorder.add(self._iteration, outcome.obs, outcome.infos, is_end)

    def observed_size(self) -> int:
        """Returns the size of the images that environments shall draw; 0 for none."""
        return 0 if self.args.model == STATE_MODEL else self.agent.image_size

    def ping(self) -> None:
        """Returns when the calls before it are done."""

    def task_ids(self) -> Sequence[int]:
        """Returns the tasks that the environments in this process sample from.

        Raises:
            TypeError: tasks cannot be weighted in these environments.
        """
        return self._own_stages[0].task_ids

    def open_envs(self, workers: Sequence[Any], openings: Sequence[Any], task_weights: Any = None) -> tuple[bool, Any]:
        """Takes the environments of env workers, or its own, and observes; returns whether none was lost, and states.

        Args:
            workers: handles of `EnvWorker`s; none if the environments are in this process.
            openings: of each worker, or of each stage of environments here, the method that observes, and its inputs.
            task_weights: how often tasks are played, from the episodes on that begin here; as before if not given.
        """
        self._has_lost_envs = True
        for stage in self._own_stages:
            stage.settle()
        self.stages = self._own_stages or self._remote_stages(workers)
        per_stage = np.split(np.arange(len(openings)), len(self.stages))
        try:
            for stage, mine in zip(self.stages, per_stage, strict=True):
                if task_weights is not None:
                    stage.set_task_weights(task_weights)
                stage.open([openings[i] for i in mine])
            states = merged_states([stage.stacked_states() for stage in self.stages])
        except EnvWorkerLost:
            return False, None
        self._has_lost_envs = False
        return True, states

    def rollout(self, iteration: int, version: int, weights: Any, task_weights: Any, num_parts: int) -> list[Any]:
        """Returns a report, and the rollout of an iteration in parts of equally many environments.

        Args:
            iteration: from 1.
            version: of the weights.
            weights: what `LearnerRole.weights` returned.
            task_weights: how often tasks are played; as before if not given.
            num_parts: parts.
        """
        lost = [Report(is_lost=True), *[None] * num_parts]
        if self._has_lost_envs:
            return lost
        self._iteration, self._ended, self._env_steps = iteration, [], 0
        self.recorder.forget()
        with torch.no_grad():
            for name, value in from_store(weights).items():
                self._trained[name].copy_(value)
        start = time.perf_counter()
        busy_s, wait_s = self._clocks()
        try:
            if task_weights is not None:
                for stage in self.stages:
                    stage.set_task_weights(task_weights)
            rollout = self.play(iteration, version)
            states = merged_states([stage.stacked_states() for stage in self.stages])
        except EnvWorkerLost:
            self._has_lost_envs = True
            return lost
        except Exception as error:
            self._has_lost_envs = True  # what was asked for next would begin in the middle of this rollout
            self._dump_failed_actions(error)
            raise
        self.recorder.write(iteration)
        now = time.perf_counter()
        busy_s, wait_s = (after - before for after, before in zip(self._clocks(), (busy_s, wait_s), strict=True))
        seconds = dict(
            env_s=busy_s,
            env_wait_s=wait_s,
            policy_s=now - start - wait_s,
            env_idle_s=now - self._ended_at - busy_s / len(self.stages),
        )
        self._ended_at = now
        report = Report(ended=self._ended, env_steps=self._env_steps, seconds=seconds, env_states=states)
        return [report, *split_rollout(rollout, num_parts)]

    def _make_stages(self, make_envs: Callable[[int, int], gym.vector.VectorEnv]) -> list[OwnStage]:
        """Returns stages of environments in this process."""
        size, timeout_s = self.observed_size(), self.args.env_timeout_s
        return [
            OwnStage(lambda num_envs: make_envs(num_envs, size), ids, int(ids[0] - self.env_ids[0]), timeout_s)
            for ids in np.split(self.env_ids, self.args.pipeline_stage_num)
        ]

    def _remote_stages(self, workers: Sequence[Any]) -> list[RemoteStage]:
        """Returns stages of environments that env workers step."""
        num_stages = self.args.pipeline_stage_num
        ids_of_stages = np.split(self.env_ids, num_stages)
        workers_of_stages = np.split(np.arange(len(workers)), num_stages)
        return [
            RemoteStage([workers[w] for w in mine], ids, int(ids[0] - self.env_ids[0]), self.args.env_timeout_s)
            for ids, mine in zip(ids_of_stages, workers_of_stages, strict=True)
        ]

    def _clocks(self) -> tuple[float, float]:
        """Returns seconds of stepping and of waiting for it so far, each summed over stages."""
        return sum(stage.busy_s for stage in self.stages), sum(stage.wait_s for stage in self.stages)

    def _dump_failed_actions(self, error: Exception) -> None:
        stages = enumerate(self.stages)
        failed = {f"actions_of_stage_{i}": s.failed_actions for i, s in stages if s.failed_actions is not None}
        if failed:
            path = self.run.dump(f"failed_actions_of_rollout_worker_{self.number}", failed)
            error.add_note(f"the actions of the step that failed are in {path}")


# --- the role that learns ---


class LearnerRole:
    """A process of the group that learns.

    A subclass makes `agent`, `model`, `optimizer` and `checkpoints` in `build`, and updates them.

    Args:
        place: where it runs.
        bell: of the run.
        args: the trainer's arguments.
        make_agent: makes the agent from them.
        make_envs: makes environments for evaluations.
        run_path: folder of the run.

    Attributes:
        accelerator: of this process.
        run: the run's folder.
        agent: the agent.
        checkpoints: of the run.
    """

    accelerator: Accelerator
    run: RunFolder
    agent: Any
    checkpoints: Checkpoints

    def __init__(
        self,
        place: Place,
        bell: Bell,
        args: Any,
        make_agent: Callable[..., Any],
        make_envs: Callable[..., gym.vector.VectorEnv],
        run_path: Path,
    ) -> None:
        _limit_threads(place)
        self.args, self.make_agent = args, make_agent
        self._make_envs, self._run_path = make_envs, run_path
        self._rung = bell.wait.remote()

    def build(self) -> None:
        """Makes the agent, what updates it, and its checkpoints; collective."""
        raise NotImplementedError

    def update(self, iteration: int, *parts: Rollout) -> dict[str, float]:
        """Updates the agent by the rollouts of an iteration, and returns metrics; collective."""
        raise NotImplementedError

    def free_address(self) -> str:
        """Returns this node's address and a port that is free on it, host:port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, rank: int, size: int, address: str) -> None:
        """Makes the group and builds; collective, as are the following."""
        refuse_sharding()
        if size > 1:
            host, _, port = address.rpartition(":")
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0")
            os.environ |= dict(MASTER_ADDR=host, MASTER_PORT=port)
        self.accelerator = make_accelerator((), self.args.output_dir)
        self.run = RunFolder(self._run_path, self.accelerator)
        self.build()

    def weights(self) -> Any:
        """Returns what training changes, by name."""
        trained = {name: p for name, p in self.agent.named_parameters() if p.requires_grad}
        return to_store(trained | dict(self.agent.named_buffers()))

    def restore(self, checkpoint: Path) -> tuple[RestoredState, str]:
        """Goes on from a checkpoint; returns what it says, and what was printed."""
        with contextlib.redirect_stdout(io.StringIO()) as told:
            restored = self.checkpoints.restore(checkpoint)
        return restored, told.getvalue()

    def take(self, iteration: int, global_step: int, tensors: Any, env_states: Any) -> None:
        """Takes the boundary after an iteration; the first learner is given the environments' states."""
        if env_states is None and not self.accelerator.is_main_process:
            env_states = {}
        self.checkpoints.take(iteration, global_step, env_states, tensors)

    def save(self, score: float | None = None) -> Path:
        """Writes the boundary."""
        return self.checkpoints.save(score)

    def evaluate(self, iteration: int) -> tuple[float | None, str]:
        """Returns the success rate, None if the run was asked to stop, and what was printed."""

        def make_envs(num_envs: int) -> gym.vector.VectorEnv:
            envs = self._make_envs(self.args, num_envs, self.agent.image_size, AutoresetMode.DISABLED)
            return checked_every_step(envs, self._check)

        inputs = (self._run_path, iteration, self.agent, make_envs, self.args)
        rate = None
        with (
            contextlib.redirect_stdout(io.StringIO()) as told,
            contextlib.suppress(SystemExit),
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            rate = for_all(self.accelerator, evaluate_into, *inputs)
        return rate, told.getvalue()

    def _check(self) -> None:
        """Raises SystemExit if the run was asked to stop."""
        if ray.wait([self._rung], timeout=0)[0]:
            raise SystemExit(ray.get(self._rung))


def _limit_threads(place: Place) -> None:
    if place.gpu is None:
        torch.set_num_threads(place.cpus)
