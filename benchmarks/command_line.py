"""The command line of a benchmark: a mistake in it is told, with what is valid, before anything is measured.

    parser.add_argument("--suite", type=suite_name, default="libero_spatial")
    parser.add_argument("--num-envs", type=integer(at_least=1), default=8)
    args = parser.parse_args()
    with refusals(parser):
        tasks = tasks_of(args.suite)

Argument types refuse a word by itself; what only several options tell together, or what is installed, raises ValueError
within `refusals`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from libero_gym.tasks.suites import TaskSpec, check_assets, get_task, list_tasks

LARGEST_SEED = 2**31 - 1
"""Episodes add an initial state's number to a seed, and NumPy's RandomState takes less than 2**32."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows a module's docstring as it is written and takes `--output`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="file for the JSON document")
    return parser


def launch_benchmark(main: Callable[[], object]) -> None:
    """Calls a benchmark's `main`; what only the run tells and the user can mend ends it with a message, status 1.

    Imports tyro late: tests of the environment compare by a benchmark's functions where only the environment is
    installed.
    """
    from algorithms.common.command_line import launch

    launch(lambda _: main(), None)


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Generator[None]:
    """Ends the program with a message and status 2 where what is checked within raises ValueError or OSError."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(str(error))


def integer(*, at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """Returns an argument type: integers from `at_least` to `at_most`, both included; None is no bound."""
    valid = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"

    def parse(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not an integer (valid: {valid})") from None
        if value < at_least or (at_most is not None and value > at_most):
            raise argparse.ArgumentTypeError(f"{value} is out of range (valid: {valid})")
        return value

    return parse


def positive_number(word: str) -> float:
    """An argument type: finite numbers above 0."""
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number (valid: above 0)") from None
    if not 0 < value < math.inf:  # not a number (NaN) is neither
        raise argparse.ArgumentTypeError(f"{word} is out of range (valid: above 0, finite)")
    return value


def suite_name(word: str) -> str:
    """An argument type: names of suites that are installed."""
    try:
        list_tasks(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word


def tasks_of(suite: str, task_ids: Iterable[int] | None = None) -> list[TaskSpec]:
    """Returns tasks of a suite, all of them if `task_ids` is None.

    Raises:
        ValueError: no such suite or task, or one needs assets that are not installed.
    """
    tasks = list_tasks(suite) if task_ids is None else [get_task(suite, task_id) for task_id in task_ids]
    check_assets(tasks)
    return tasks
