"""The trainers' terminal view: one bar with success rate, environment steps per second and time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """A progress bar over a whole training run; a silent one if not `enabled`.

    Where standard output is no terminal, a line is printed per finished iteration instead of a moving bar.

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
        self._bar = Progress(
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

    def decision(self, successes: Sequence[bool], sps: float) -> None:
        """Counts one decision of every environment.

        Args:
            successes: outcomes of the episodes that ended in this iteration so far.
            sps: environment steps per second in this rollout.
        """
        self._sps = sps
        if successes:
            self._success = f"{sum(successes) / len(successes):.0%}"
        self._advance("rollout")

    def update(self) -> None:
        """Counts one optimiser step."""
        self._advance("update")

    def end_iteration(self, line: str) -> None:
        """Prints `line` and counts what the iteration left out (an update that ended early)."""
        self._iteration += 1
        self._unit = 0
        self._bar.update(self._task, completed=self._iteration * self._units)
        self.print(f"iteration {self._iteration}/{self._num_iterations}  {line}")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _advance(self, phase: str) -> None:
        self._unit += 1
        numbers = f"success {self._success}  {self._sps:.0f} env-steps/s"
        description = f"iteration {self._iteration + 1}/{self._num_iterations} {phase}"
        self._bar.update(self._task, advance=1, description=description, numbers=numbers)
