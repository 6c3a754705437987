"""What the command lines share: presets, ranges, sizes that divide."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import tyro

ArgsT = TypeVar("ArgsT")


def parse_args(args_class: type[ArgsT], presets: Mapping[str, ArgsT], description: str | None) -> ArgsT:
    """Parses the command line into `args_class`; `--preset NAME` sets the defaults that other arguments override.

    An unknown preset, like any other bad argument, ends the program with a message.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=[*presets, "None"], default="None")
    name = parser.parse_known_args()[0].preset
    return tyro.cli(args_class, default=presets.get(name, args_class()), description=description)


def check_at_least(args: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the arguments `names` is smaller than `least`."""
    for name in names:
        if (value := getattr(args, name)) < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_physics(args: Any) -> None:
    """Raises ValueError if `args.physics` is to run on a GPU and there is none."""
    if args.physics == "warp" and not torch.cuda.is_available():
        raise ValueError(
            "physics='warp' simulates on a GPU, and PyTorch finds no CUDA device; give --physics cpu and as many "
            "environments as a CPU can simulate, for example --num-envs 8"
        )


def check_entropy_bonus(args: Any) -> None:
    """Raises ValueError if `args.ent_coef` would have no effect: only the noise of reinflow is learned."""
    if args.ent_coef and not args.noise_method.startswith("reinflow"):
        raise ValueError(
            f"ent_coef={args.ent_coef} has no effect with noise_method={args.noise_method!r}, whose noise is fixed; "
            "set it to 0, or take noise_method reinflow or reinflow_joint"
        )


def share_of_process(args: Any, name: str, num_processes: int) -> int:
    """Returns one process's share of the global size `args.name`; raises ValueError unless it divides exactly."""
    value = getattr(args, name)
    if value < 1 or value % num_processes:
        raise ValueError(
            f"{name}={value} cannot be shared by {num_processes} process(es): "
            f"give a positive multiple of {num_processes}"
        )
    return value // num_processes


def exact_quotient(args: Any, dividend: str, divisor: str) -> int:
    """Returns args.dividend / args.divisor; raises ValueError unless it is a positive whole number."""
    a, b = getattr(args, dividend), getattr(args, divisor)
    if a < 1 or b < 1 or a % b:
        raise ValueError(f"{dividend}={a} must be a positive multiple of {divisor}={b}")
    return a // b
