"""What benchmarks of PPO have in common: sizes that fit, rows, losses that agree, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from algorithms.common.args import check_ranges, largest_divisor, share_of_process
from algorithms.ppo_gr00t import Args

PHASES = ("total_s", "env_s", "env_wait_s", "policy_s", "update_s")
# By how much the losses of the same work in two orders may differ. In benchmarks/results, rounding makes 2.4e-4 of it,
# in training on an H100; the episodes of another seed make 4e-3, features of wrong rows 1e-2 (nano, on a CPU).
LOSS_TOLERANCE = 1e-3
# Of a table, for `cells`.
COLUMNS = {"iteration s": ">12.2f", "env s": ">8.2f", "wait s": ">8.2f", "policy s": ">10.2f", "update s": ">10.2f"}


def resized(
    preset: Args,
    *,
    num_envs: int | None = None,
    num_steps: int | None = None,
    minibatch_size: int | None = None,
    micro_batch_size: int | None = None,
) -> Args:
    """Returns a preset's arguments in other sizes, None for its own, with batches that fit these.

    The minibatch is the largest that is at most `minibatch_size` and divides the decisions of an iteration. The
    micro-batch is the largest that is at most `micro_batch_size` and divides the minibatch.

    Raises:
        ValueError: a size is less than 1.
    """
    given = dict(
        num_envs=num_envs, num_steps=num_steps, minibatch_size=minibatch_size, micro_batch_size=micro_batch_size
    )
    args = replace(preset, **{name: size for name, size in given.items() if size is not None})
    check_ranges(args)
    fitting = largest_divisor(args.num_decisions, args.minibatch_size)
    return replace(args, minibatch_size=fitting, micro_batch_size=largest_divisor(fitting, args.micro_batch_size))


def shared(args: Args, num_processes: int) -> Args:
    """Returns arguments whose micro-batch, until now that of one process, is the whole of so many.

    Each one's is the largest that is at most `args.micro_batch_size` and divides its share of the minibatch.

    Raises:
        ValueError: there are no processes, or they cannot share the minibatch.
    """
    if num_processes < 1:
        raise ValueError(f"{num_processes} processes can learn nothing: give at least 1")
    share = share_of_process(args, "minibatch_size", num_processes)
    return replace(args, micro_batch_size=num_processes * largest_divisor(share, args.micro_batch_size))


def describe_sizes(args: Args) -> str:
    """Returns the sizes of an iteration in a line."""
    return (
        f"{args.num_envs:,} environments x {args.num_steps} decisions, minibatches of {args.minibatch_size:,}, "
        f"micro-batches of {args.micro_batch_size:,}"
    )


def check_shares(args: Args, num_processes: int) -> None:
    """Raises ValueError unless so many processes, and the stages of each, have equal shares of the global sizes."""
    if num_processes < 1:
        raise ValueError(f"{num_processes} processes can do nothing: give at least 1")
    share_of_process(args, "micro_batch_size", num_processes)
    num_envs = share_of_process(args, "num_envs", num_processes)
    if num_envs % args.pipeline_stage_num:
        raise ValueError(
            f"num_envs={args.num_envs} cannot be shared by {num_processes} process(es) of {args.pipeline_stage_num} "
            f"stages: give a multiple of {num_processes * args.pipeline_stage_num}"
        )


def check_losses(variant: str, losses: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the largest difference between a variant's losses and those of the reference, one by one.

    Raises:
        RuntimeError: it is more than `LOSS_TOLERANCE`, or not a number: the variant does other work.
    """
    difference = float(np.abs(np.array(losses) - np.array(reference)).max())
    if not difference <= LOSS_TOLERANCE:  # nor is NaN
        raise RuntimeError(
            f"{variant!r}: losses differ by {difference:.2g} from those of the same work in another order (at most "
            f"{LOSS_TOLERANCE:g} is rounding in float32): measure with --compute-dtype float32 where there is this "
            "option; if they still differ, one of the two orders is wrong"
        )
    return difference


def measure_rows(
    rows: Iterable[tuple[str, Callable[[], dict[str, Any]]]], add: Callable[[str, dict[str, Any]], None]
) -> list[str]:
    """Measures rows one after another, and returns what went wrong with those that are missing.

    A row that fails is passed over; an interruption (SIGINT) ends the measurement.

    Args:
        rows: of each the name, and what measures it and raises RuntimeError, with what there is to tell, if it fails.
        add: takes a row's name and what was measured.
    """
    failures: list[str] = []
    running = ""
    try:
        for name, measure in rows:
            running = name
            try:
                row = measure()
            except RuntimeError as failure:
                failures.append(f"{name}: {failure}")
                print(f"{name}: failed; {failure}", flush=True)
            else:
                add(name, row)
    except (KeyboardInterrupt, SystemExit):  # a trainer that runs in this process makes the latter of a signal
        failures.append(f"interrupted in {running!r}")
    return failures


def summarise(lines: Sequence[Mapping[str, float]], phases: Sequence[str] = PHASES) -> dict[str, float | None]:
    """Returns the environment steps a second of iterations, and each phase's mean.

    Args:
        lines: their metrics.
        phases: names below `time/`; one that a trainer has not is None.
    """
    seconds = sum(line["time/total_s"] for line in lines)
    steps = sum(line["charts/SPS"] * line["time/total_s"] for line in lines)
    means = {
        phase: float(np.mean([line[f"time/{phase}"] for line in lines])) if f"time/{phase}" in lines[0] else None
        for phase in phases
    }
    return {"env_steps_per_s": steps / seconds} | means


def cells(row: Mapping[str, Any]) -> list[Any]:
    """Returns what stands in `COLUMNS` of a row with what `summarise` returned."""
    return [row[phase] for phase in PHASES]
