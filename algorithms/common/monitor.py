"""What a run shows while it trains: episodes, environment steps and time, as metrics, films and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from accelerate import Accelerator
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from algorithms.common.episodes import SUCCESS_OF_TASK, Episode, episode_metrics, finished_episodes, success_by_task
from algorithms.common.processes import over_processes
from algorithms.common.stages import EnvStage, EnvStages, EnvStep
from algorithms.common.video import RolloutRecorder

MAX_TASKS = 10


class Monitor:
    """Follows the iterations of a run: what happened in the environments, and how long it took.

        with Monitor(accelerator, stages, num_iterations=..., decisions=..., updates=...) as monitor:
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
        num_iterations: iterations of the run.
        decisions: decisions per environment in a rollout.
        updates: optimiser steps in an iteration.
        recorder: films rollouts; None films none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stages: EnvStages,
        *,
        num_iterations: int,
        decisions: int,
        updates: int,
        recorder: RolloutRecorder | None = None,
    ) -> None:
        self._accelerator, self._stages, self._recorder = accelerator, stages, recorder
        self._progress = TrainingProgress(num_iterations, decisions, updates, enabled=accelerator.is_main_process)
        self._iteration = 0
        self._episodes: list[Episode] = []
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
        self._episodes, self._env_steps = [], 0
        self._busy_s, self._wait_s = self._stages.busy_s, self._stages.wait_s
        self._rollout_start = time.perf_counter()

    def add_step(self, stage: EnvStage, step: EnvStep) -> None:
        """Takes in a step of environments that reset themselves: finished episodes, frames of the first stage."""
        ended = step.terminated | step.truncated
        self._episodes += finished_episodes(step.infos, ended)
        self._env_steps += int(step.infos["num_steps"].sum())
        if self._recorder is not None and stage.offset == 0:
            self._recorder.add(self._iteration, step.obs, step.infos, ended)

    def add_episodes(self, episodes: Sequence[Episode]) -> None:
        """Takes in whole episodes."""
        self._episodes += episodes
        self._env_steps += sum(episode.length for episode in episodes)

    def end_decision(self) -> None:
        """Counts one decision of every environment (or one rollout of whole episodes) in the terminal."""
        elapsed = time.perf_counter() - self._rollout_start
        self._progress.decision(self._episodes, self._env_steps / elapsed)

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
        """Returns `time/*`, `charts/SPS` and `env/*` of the iteration, after `end_update`; collective."""
        total_s = self._update_end - self._rollout_start
        waited_s = self._stages.wait_s - self._wait_s
        return {
            "time/env_s": self._stages.busy_s - self._busy_s,
            "time/env_wait_s": waited_s,
            "time/policy_s": self._update_start - self._rollout_start - waited_s,
            "time/update_s": self._update_end - self._update_start,
            "time/total_s": total_s,
            "charts/SPS": self._env_steps / total_s,
        } | episode_metrics(self._episodes, self._accelerator)

    def end_iteration(self, metrics: Mapping[str, float]) -> None:
        """Prints what an iteration has come to."""
        self._progress.end_iteration(describe_iteration(metrics), metrics)

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.print(text)


class TrainingProgress:
    """A progress bar over a whole training run; a silent one if not `enabled`.

    Each finished iteration prints two lines, what was achieved and success by task. While one is going on, the same is
    shown in and below the bar, of this process's episodes so far. Where standard output is no terminal there is no bar.

    Args:
        num_iterations: iterations of the run.
        decisions: decisions per environment in a rollout.
        updates: optimiser steps in an iteration.
        enabled: False on every process but the main one.
    """

    def __init__(self, num_iterations: int, decisions: int, updates: int, *, enabled: bool) -> None:
        self._num_iterations = num_iterations
        self._units = decisions + updates
        self._iteration = 0
        self._unit = 0
        self._success = "-"
        self._sps = 0.0
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
        self._task = self._bar.add_task("starting", total=num_iterations * self._units, numbers="")

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
        self._bar.update(self._task, completed=iterations * self._units)

    def decision(self, episodes: Sequence[Episode], sps: float) -> None:
        """Counts one decision of every environment.

        Args:
            episodes: those that ended in this iteration so far.
            sps: environment steps per second in this rollout.
        """
        self._sps = sps
        if episodes:
            self._success = f"{sum(e.success for e in episodes) / len(episodes):.0%}"
            self._bar.by_task = describe_tasks(success_by_task(episodes))
        self._advance("rollout")

    def update(self) -> None:
        """Counts one optimiser step."""
        self._advance("update")

    def end_iteration(self, line: str, metrics: Mapping[str, float]) -> None:
        """Prints `line` and success by task, and counts what the iteration left out (an update that ended early)."""
        self._iteration += 1
        self._unit = 0
        self._bar.update(self._task, completed=self._iteration * self._units)
        self.print(f"iteration {self._iteration}/{self._num_iterations}  {line}")
        names = [name for name in metrics if name.startswith(SUCCESS_OF_TASK)]
        rates = {int(name.removeprefix(SUCCESS_OF_TASK)): metrics[name] for name in names}
        if rates:
            self.print(f"  {describe_tasks(rates)}")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _advance(self, phase: str) -> None:
        self._unit += 1
        numbers = f"success {self._success}  {self._sps:.0f} env-steps/s"
        description = f"iteration {self._iteration + 1}/{self._num_iterations} {phase}"
        self._bar.update(self._task, advance=1, description=description, numbers=numbers)


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
    parts = ["success - (no episode ended)" if success is None else f"success {success:.1%}"]
    if "rollout/groups_kept" in metrics:
        parts.append(f"groups kept {metrics['rollout/groups_kept']:.0%}")
    parts.append(f"loss {metrics['actor/loss']:.4f}" if "actor/loss" in metrics else "no update")
    if "actor/value_loss" in metrics:
        parts.append(f"value loss {metrics['actor/value_loss']:.4f}")
    if "critic/loss" in metrics:
        parts.append(f"critic loss {metrics['critic/loss']:.4f}  value {metrics['critic/value']:.3f}")
    if "actor/approx_kl" in metrics:
        parts.append(f"kl {metrics['actor/approx_kl']:.2g}")
    parts.append(f"{metrics['charts/SPS']:.0f} env-steps/s")
    return "  ".join(parts)
