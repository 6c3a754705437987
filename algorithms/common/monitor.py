"""What a run shows while it trains: episodes, environment steps and time, as metrics, films and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from algorithms.common.episodes import (
    SUCCESS_OF_TASK,
    Cohorts,
    Episode,
    cohort_metrics,
    finished_episodes,
    iterations_ago,
)
from algorithms.common.processes import over_processes
from algorithms.common.stages import EnvStage, EnvStages, EnvStep
from algorithms.common.video import RolloutRecorder

MAX_TASKS = 10
# Seconds without a word after which progress is told in a line, where standard output is no terminal.
TOLD_EVERY_S = 10.0


class Monitor:
    """Follows the iterations of a run: what happened in the environments, and how long it took.

        with Monitor(accelerator, stages, decisions=..., updates=...) as monitor:
            monitor.start(iterations_done)
            for iteration in ...:
                monitor.begin_rollout(iteration)
                ...
                    monitor.add_step(stage, stage.receive())  # or add_episodes(...)
                    monitor.end_decision()
                monitor.begin_update()
                ...
                    monitor.end_minibatch()
                env_steps = monitor.end_update()
                metrics = {...} | monitor.metrics()
                monitor.end_iteration(metrics)

    Args:
        accelerator: of this process.
        stages: the environments.
        decisions: decisions per environment in a rollout.
        updates: optimiser steps in each iteration of the run.
        longest_episode: decisions of the longest episode; 0 if a rollout is whole episodes.
        num_action_chunks: environment steps of a decision.
        recorder: films rollouts; None films none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stages: EnvStages,
        *,
        decisions: int,
        updates: Sequence[int],
        longest_episode: int = 0,
        num_action_chunks: int = 1,
        recorder: RolloutRecorder | None = None,
    ) -> None:
        self._accelerator, self._stages, self._recorder = accelerator, stages, recorder
        self._progress = TrainingProgress(decisions, updates, enabled=accelerator.is_main_process)
        self._cohorts = Cohorts(decisions, longest_episode)
        self._decisions, self._num_action_chunks = decisions, num_action_chunks
        self._iteration = 0
        self._decision = 0
        self._ended: list[tuple[Episode, int]] = []  # and how many iterations ago it began
        self._env_steps = 0
        self._busy_s, self._wait_s = 0.0, 0.0
        self._rollout_start, self._update_start, self._update_end = 0.0, 0.0, 0.0

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def start(self, iterations: int) -> None:
        """Counts iterations that were done before the program was started."""
        self._progress.skip(iterations)

    def begin_rollout(self, iteration: int) -> None:
        """Starts the clocks of an iteration (from 1)."""
        self._iteration = iteration
        self._decision, self._ended, self._env_steps = 0, [], 0
        self._cohorts.begin_iteration()
        self._busy_s, self._wait_s = self._stages.busy_s, self._stages.wait_s
        self._rollout_start = time.perf_counter()

    def add_step(self, stage: EnvStage, step: EnvStep) -> None:
        """Takes in a step of environments that reset themselves: finished episodes, frames of the first stage."""
        ended = step.terminated | step.truncated
        for episode in finished_episodes(step.infos, ended):
            ago = iterations_ago(
                episode.length, self._decision, num_action_chunks=self._num_action_chunks, decisions=self._decisions
            )
            self._ended.append((episode, ago))
        self._env_steps += int(step.infos["num_steps"].sum())
        if self._recorder is not None and stage.offset == 0:
            self._recorder.add(self._iteration, step.obs, step.infos, ended)

    def add_episodes(self, episodes: Sequence[Episode]) -> None:
        """Takes in whole episodes."""
        self._ended += [(episode, 0) for episode in episodes]
        self._env_steps += sum(episode.length for episode in episodes)

    def end_decision(self) -> None:
        """Counts one decision of every environment (or one rollout of whole episodes) in the terminal."""
        self._decision += 1
        elapsed = time.perf_counter() - self._rollout_start
        self._progress.decision(self._env_steps / elapsed)

    def begin_update(self) -> None:
        """Ends the rollout, whose film is written."""
        if self._recorder is not None:
            self._recorder.write(self._iteration)
        self._update_start = time.perf_counter()

    def end_minibatch(self) -> None:
        """Counts one optimiser step in the terminal."""
        self._progress.update()

    def end_update(self) -> int:
        """Stops the clocks and returns the environment steps of the iteration over all processes; collective."""
        self._update_end = time.perf_counter()
        steps = torch.tensor(self._env_steps, device=self._accelerator.device)
        self._env_steps = int(over_processes(self._accelerator, steps, "sum"))
        return self._env_steps

    def metrics(self) -> dict[str, float]:
        """Returns `time/*` and `charts/SPS` of the iteration and `env/*` of the newest complete cohort; collective.

        Once an iteration, after `end_update`.
        """
        ended = self._ended
        if self._accelerator.num_processes > 1:
            ended = gather_object(ended)
        self._cohorts.add(ended)
        total_s = self._update_end - self._rollout_start
        waited_s = self._stages.wait_s - self._wait_s
        return {
            "time/env_s": self._stages.busy_s - self._busy_s,
            "time/env_wait_s": waited_s,
            "time/policy_s": self._update_start - self._rollout_start - waited_s,
            "time/update_s": self._update_end - self._update_start,
            "time/total_s": total_s,
            "charts/SPS": self._env_steps / total_s,
        } | cohort_metrics(self._cohorts.complete())

    def tallies(self) -> NDArray[np.float64]:
        """Returns episodes, successes and steps by task [T, 3] of the newest complete cohort."""
        return self._cohorts.complete()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what a continued run needs to count on."""
        return self._cohorts.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Counts on from `state_dict`."""
        self._cohorts.load_state_dict(state)

    def end_iteration(self, metrics: Mapping[str, float]) -> None:
        """Prints what an iteration has come to."""
        self._progress.end_iteration(describe_iteration(metrics), metrics)

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.print(text)


class TrainingProgress:
    """A progress bar over a whole training run; a silent one if not `enabled`.

    Each finished iteration prints two lines, what was achieved and success by task. While the next one is going on,
    the same is shown in and below the bar. Where standard output is no terminal there is no bar; a line tells the
    progress every `TOLD_EVERY_S` seconds in which nothing else does.

    Args:
        decisions: decisions per environment in a rollout.
        updates: optimiser steps in each iteration of the run.
        enabled: False on every process but the main one.
    """

    def __init__(self, decisions: int, updates: Sequence[int], *, enabled: bool) -> None:
        self._num_iterations = len(updates)
        self._units = [decisions + of_iteration for of_iteration in updates]
        self._iteration = 0
        self._unit = 0
        self._success = "-"
        self._sps = 0.0
        self._told_at = time.monotonic()
        self._console = Console(quiet=not enabled)
        self._bar = _Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=sum(self._units), numbers="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def skip(self, iterations: int) -> None:
        """Counts iterations that were done before the program was started."""
        self._iteration = iterations
        self._bar.update(self._task, completed=sum(self._units[:iterations]))

    def decision(self, sps: float) -> None:
        """Counts one decision of every environment; `sps` is environment steps per second in this rollout."""
        self._sps = sps
        self._advance("rollout")

    def update(self) -> None:
        """Counts one optimiser step."""
        self._advance("update")

    def end_iteration(self, line: str, metrics: Mapping[str, float]) -> None:
        """Prints `line` and success by task, and counts what the iteration left out (an update that ended early)."""
        self._iteration += 1
        self._unit = 0
        self._bar.update(self._task, completed=sum(self._units[: self._iteration]))
        self.print(f"iteration {self._iteration}/{self._num_iterations}  {line}")
        names = [name for name in metrics if name.startswith(SUCCESS_OF_TASK)]
        rates = {int(name.removeprefix(SUCCESS_OF_TASK)): metrics[name] for name in names}
        if rates:
            self._success = f"{metrics['env/success_once']:.1%}"
            self._bar.by_task = describe_tasks(rates)
            self.print(f"  {self._bar.by_task}")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._told_at = time.monotonic()
        self._console.print(text, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def _advance(self, phase: str) -> None:
        self._unit += 1
        numbers = f"success {self._success}  {self._sps:.0f} env-steps/s"
        description = f"iteration {self._iteration + 1}/{self._num_iterations} {phase}"
        self._bar.update(self._task, advance=1, description=description, numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told_at > TOLD_EVERY_S:
            self.print(f"  {description} {self._unit}/{self._units[self._iteration]}  {self._sps:.0f} env-steps/s")


class _Bar(Progress):
    """A progress bar with a line below it."""

    by_task = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.by_task)


def describe_tasks(rates: Mapping[int, float]) -> str:
    """Returns success by task in a line; of more than `MAX_TASKS` tasks those that fail most."""
    shown = sorted(sorted(rates, key=lambda task: rates[task])[:MAX_TASKS])
    title = "by task" if len(shown) == len(rates) else f"lowest of {len(rates)} tasks"
    return f"{title}: " + "  ".join(f"{task} {rates[task]:.0%}" for task in shown)


def describe_iteration(metrics: Mapping[str, float]) -> str:
    """Returns an iteration's success, losses and speed in a line."""
    success = metrics.get("env/success_once")
    parts = ["success - (not all of the first episodes have ended)" if success is None else f"success {success:.1%}"]
    if "rollout/groups_kept" in metrics:
        parts.append(f"groups kept {metrics['rollout/groups_kept']:.0%}")
    parts.append(f"loss {metrics['actor/loss']:.4f}" if "actor/loss" in metrics else "no update")
    if "actor/value_loss" in metrics:
        parts.append(f"value loss {metrics['actor/value_loss']:.4f}")
    if metrics.get("actor/imitation_loss"):
        parts.append(f"imitation loss {metrics['actor/imitation_loss']:.4f}")
    if "critic/loss" in metrics:
        parts.append(f"critic loss {metrics['critic/loss']:.4f}  value {metrics['critic/value']:.3f}")
    if "actor/approx_kl" in metrics:
        parts.append(f"kl {metrics['actor/approx_kl']:.2g}")
    parts.append(f"{metrics['charts/SPS']:.0f} env-steps/s")
    return "  ".join(parts)
