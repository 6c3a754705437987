"""The trainers' terminal view: a bar with success rate, environment steps per second and time left; success by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from algorithms.common.episodes import SUCCESS_OF_TASK, Episode, success_by_task

MAX_TASKS = 10


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
