"""What the trainers' arguments share: ranges, and sizes that divide. Needs no PyTorch, see `command_line`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from gr00t_agent.config import PresetName
from gr00t_agent.files import is_hub_name

# How a steered policy's noise is made of what the actor chooses, see `algorithms.common.steering.NoiseSpace`.
NoiseForm = Literal["executed", "per_step", "repeated"]
# What can have low-rank adapters, see `algorithms.common.lora`.
LoraPart = Literal["action_head", "language_model", "vision_model"]
# A trainer's --model for a small policy on the robot's state, see `algorithms.common.state_agent`.
STATE_MODEL = "state"
# Where Accelerate reads the number of processes.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How strongly images are changed; zeros, and no random crop, give what the policy sees when it acts.

    Attributes:
        random_crop: crop at a random place instead of the centre.
        brightness: images are multiplied by a factor from 1 -+ brightness.
        contrast: differences from the mean grey are multiplied by a factor from 1 -+ contrast.
        saturation: differences from grey are multiplied by a factor from 1 -+ saturation.
        hue: colours turn by up to this fraction of the full circle either way.
    """

    random_crop: bool = True
    brightness: float = 0.3
    contrast: float = 0.4
    saturation: float = 0.5
    hue: float = 0.08

    def __post_init__(self) -> None:
        for name, high in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is not in 0-{high}")


# What the policy on the robot's state has not: of an argument, the values that it can have, and why no others.
_STATE_POLICY_HAS: dict[str, tuple[tuple[Any, ...], str]] = {
    "noise_method": (("flow_sde", "flow_cps"), "learns no noise"),
    "joint_logprob": ((False,), "has one noised step in a chain"),
    "logprob_level": (("chunk",), "scores whole chunks"),
    "critic_detach": ((True,), "has no trunk that policy and critic share"),
    "train_backbone": ((False,), "has no backbone"),
    "lora_rank": ((0,), "has no attention layers to adapt"),
    "compute_dtype": ((None, "float32"), "computes in float32"),
    "compile": ((False,), "is not compiled"),
    "imitation_coef": ((0,), "has no flow error to imitate by"),
    "video_interval": ((0,), "sees no images that could be filmed"),
}


def check_state_model(args: Any) -> None:
    """Raises ValueError if `args.model` is the policy on the robot's state and others ask for what it has not."""
    if args.model != STATE_MODEL:
        return
    for name, (possible, why) in _STATE_POLICY_HAS.items():
        if hasattr(args, name) and (value := getattr(args, name)) not in possible:
            raise ValueError(
                f"{name}={value!r}: model='{STATE_MODEL}' {why} (valid: {', '.join(map(str, possible))}); leave it "
                "out, or take --model nano"
            )


def check_at_least(args: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the arguments `names` is smaller than `least`."""
    for name in names:
        if (value := getattr(args, name)) < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def check_schedule(schedule: str, target_kl: float | None, hold: float) -> None:
    """Raises ValueError if a schedule of step sizes lacks what it follows, or is given what it has no use for.

    Args:
        schedule: `lr_schedule`.
        target_kl: What an adaptive one follows.
        hold: `lr_hold`, the part of training before a linear one falls.
    """
    if schedule == "adaptive" and (target_kl is None or target_kl <= 0):
        raise ValueError(f"lr_schedule='adaptive' needs a positive target_kl to follow, e.g. 0.1 (given: {target_kl})")
    if not 0 <= hold < 1:
        raise ValueError(f"lr_hold={hold} is not in [0, 1): some of training must be left to fall in")
    if hold > 0 and schedule != "linear":
        raise ValueError(f"lr_hold={hold} goes with --lr-schedule linear only (given: {schedule}); leave it at 0")


def check_physics(args: Any, cpu_preset: str) -> None:
    """Raises ValueError if `args.physics` is to run on a GPU and there is none.

    Args:
        args: a trainer's.
        cpu_preset: the preset to take without a GPU.
    """
    if args.physics != "warp":
        return
    import torch  # which takes seconds

    if not torch.cuda.is_available():
        raise ValueError(
            f"physics='warp' simulates on a GPU, and PyTorch finds no CUDA device; take --preset {cpu_preset}, which "
            "fits two cores, or give --physics cpu and sizes that a CPU can simulate, for example --num-envs 8"
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
        fitting = max((n for n in range(1, min(max(a, 1), max(b, 1)) + 1) if a % n == 0), default=1)
        made_of = " (num_envs x num_steps)" if dividend == "num_decisions" else ""
        raise ValueError(
            f"{dividend}={a} must be a positive multiple of {divisor}={b}{made_of}; give for example "
            f"--{divisor.replace('_', '-')} {fitting}"
        )
    return a // b


def check_near_goal(args: Any) -> None:
    """Raises ValueError for starts near the goal that cannot be."""
    if any(steps < 1 for steps in args.steps_before_success):
        raise ValueError(f"steps_before_success={args.steps_before_success}: each must be at least 1")
    check_at_least(args, 1, "num_near_goal_states", "eval_videos_per_task")
    if args.steps_before_success and args.physics != "cpu":
        raise ValueError(f"steps_before_success needs --physics cpu (given: {args.physics!r}), where experts run")


def launched_processes() -> int:
    """Returns how many processes the launcher says it has started."""
    return next((int(os.environ[name]) for name in WORLD_SIZES if os.environ.get(name)), 1)


def check_sizes(args: Any, *names: str) -> None:
    """Raises ValueError if the processes that were launched cannot share the global sizes `names` exactly."""
    for name in names:
        share_of_process(args, name, launched_processes())


def base_name(args: Any) -> str:
    """Returns `args.run_name` with the fields in braces filled in.

    Raises:
        ValueError: it has unknown fields, or is none of a folder.
    """
    values = {f.name: getattr(args, f.name) for f in fields(args)}
    try:
        name = args.run_name.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"run_name={args.run_name!r} cannot be filled in ({error!r}); fields in braces are names of arguments: "
            f"{', '.join(values)}"
        ) from None
    if not name or name.startswith(".") or Path(name).name != name or "\0" in name:
        raise ValueError(
            f"run_name={name!r} is no name of a folder: it must not be empty, begin with a dot or hold a slash; give "
            "the place by --output-dir"
        )
    return name


def check_folders(args: Any, *other_models: str) -> None:
    """Raises FileNotFoundError if the model, or the run to go on with, is not there, ValueError for a bad run_name.

    Args:
        args: a trainer's.
        other_models: names that its `model` may have besides presets', folders' and hub ids.
    """
    base_name(args)
    model, resume = getattr(args, "model", None), getattr(args, "resume", None)
    names = (*get_args(PresetName), *other_models)
    if model is not None and model not in names:
        check_folder("model", model, f"give a preset's name ({', '.join(names)}), a folder or a hub id")
    if resume is not None and str(resume) != "auto" and not resume.is_dir():
        raise FileNotFoundError(
            f"{resume} holds no checkpoint to go on from; give the folder of a run that has saved one, or start a new "
            "run with --model"
        )


def check_folder(name: str, value: str, hint: str) -> None:
    """Raises FileNotFoundError unless `value` is a folder or may be a hub id (owner/name)."""
    if not Path(value).is_dir() and not is_hub_name(value):
        raise FileNotFoundError(f"{name}={value!r} is no folder and no hub name (owner/name); {hint}")
