"""What the trainers' arguments share: ranges, and sizes that divide. Needs no PyTorch, see `command_line`."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from gr00t_agent.config import PresetName
from gr00t_agent.files import is_hub_name
from libero_gym.outputs import check_output_folder

# How a steered policy's noise is made of what the actor chooses, see `algorithms.common.steering.NoiseSpace`.
NoiseForm = Literal["executed", "per_step", "repeated"]
# What can have low-rank adapters, see `algorithms.common.lora`.
LoraPart = Literal["action_head", "language_model", "vision_model"]
# A trainer's --model for a small policy on the robot's state, see `algorithms.common.state_agent`.
STATE_MODEL = "state"
# Environments that two cores simulate and draw beside a network, for advice.
CPU_ENVS = 8
# Of a script that has none.
NO_PRESETS: Mapping[str, Any] = MappingProxyType({})
# Why a setting of starts near the goal has no effect.
NOT_NEAR_GOAL = "without --steps-before-success episodes begin at the tasks' initial states"
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


# What only the trainers' own `make_agent` reads, and an agent of one's own perhaps not.
GR00T_OPTIONS = (
    "model",
    "denoising_steps",
    "noise_method",
    "noise_level",
    "joint_logprob",
    "ignore_last",
    "critic_detach",
    "train_backbone",
    "train_vl_self_attention",
    "lora_rank",
    "lora_alpha",
    "lora_parts",
    "compute_dtype",
)
# What the policy on the robot's state has not: of an argument, the values that it can have, and why no others.
_STATE_POLICY_HAS: dict[str, tuple[tuple[Any, ...], str]] = {
    "noise_method": (("flow_sde", "flow_cps"), "learns no noise"),
    "joint_logprob": ((False,), "has one noised step in a chain"),
    "logprob_level": (("chunk",), "scores whole chunks"),
    "critic_detach": ((True,), "has no trunk that policy and critic share"),
    "train_backbone": ((False,), "has no backbone"),
    "train_vl_self_attention": ((True,), "has no VL self-attention"),
    "lora_rank": ((0,), "has no attention layers to adapt"),
    "compute_dtype": ((None, "float32"), "computes in float32"),
    "compile": ((False,), "is not compiled"),
    "imitation_coef": ((0,), "has no flow error to imitate by"),
    "imitation_iterations": ((0,), "has no flow error to imitate by"),
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


# What numbers may be, in all scripts that have them, as intervals; a round bracket leaves the bound out.
RANGES = {
    # run and cluster
    "seed": "[0, 4294967295]",
    "seeds": "[0, 4294967295]",
    "num_iterations": "[1, inf)",
    "max_restarts": "[0, inf)",
    "env_workers": "[1, inf)",
    "rollout_gpus": "[1, inf)",
    "learner_gpus": "[1, inf)",
    "importance_cap": "(0, inf]",
    # environments and episodes
    "num_envs": "[1, inf)",
    "num_action_chunks": "[1, inf)",
    "horizon": "[1, inf)",
    "steps_before_success": "[1, inf)",
    "num_near_goal_states": "[1, inf)",
    "pipeline_stage_num": "[1, inf)",
    "env_timeout_s": "(0, inf)",
    "episodes_per_task": "[1, inf)",
    "init_state_ids": "[0, inf)",
    "max_attempts_per_task": "[1, inf)",
    "object_shift": "[0, inf)",
    "image_size": "[1, inf)",
    "render_batch_size": "[1, inf)",
    "crf": "[0, 51]",
    "num_workers": "[0, inf)",
    "num_writers": "[1, inf)",
    # data
    "train_image_size": "[1, inf)",
    "num_loader_threads": "[1, inf)",
    "num_batches_ahead": "[1, inf)",
    # agents
    "denoising_steps": "[1, inf)",
    "noise_level": "(0, inf)",
    "final_noise": "(0, 1]",
    "noise_bound": "(0, inf)",
    "lora_rank": "[0, inf)",
    "lora_alpha": "(0, inf)",
    "lora_dropout": "[0, 1)",
    "num_critics": "[1, inf)",
    "latent_dim": "[1, inf)",
    "hidden_dims": "[1, inf)",
    "policy_timeout": "(0, inf)",
    "temporal_ensemble": "(-inf, inf)",
    # rollouts
    "num_steps": "[1, inf)",
    "group_size": "[2, inf)",
    "min_group_success": "(-inf, inf)",
    "max_group_success": "(-inf, inf)",
    "num_groups": "[1, inf)",
    "max_rollouts": "[1, inf)",
    "feature_memory_gb": "[0, inf)",
    "warmup_iterations": "[1, inf)",
    "replay_capacity": "[1, inf)",
    "reward_scale": "(-inf, inf)",
    "reward_shift": "(-inf, inf)",
    "value_bounds": "(-inf, inf)",
    "gamma": "[0, 1]",
    "gae_lambda": "[0, 1]",
    # optimisation
    "learning_rate": "[0, inf)",
    "value_learning_rate": "[0, inf)",
    "critic_learning_rate": "(0, inf)",
    "alpha_learning_rate": "[0, inf)",
    "warmup_fraction": "[0, 1]",
    "weight_decay": "[0, inf)",
    "adam_eps": "(0, inf)",
    "betas": "[0, 1)",
    "lr_hold": "[0, 1)",
    "target_kl": "(0, inf)",
    "critic_warmup_iterations": "[0, inf)",
    "policy_warmup_iterations": "[0, inf)",
    "update_epochs": "[1, inf)",
    "update_fraction": "(0, 1]",
    "num_updates": "[1, inf)",
    "num_minibatches": "[1, inf)",
    "batch_size": "[1, inf)",
    "minibatch_size": "[1, inf)",
    "micro_batch_size": "[1, inf)",
    "max_grad_norm": "(0, inf]",
    "polyak": "(0, 1]",
    "ema_decay": "[0, 1)",
    # losses
    "clip_coef": "(0, 1]",
    "clip_coef_high": "(0, inf)",
    "dual_clip": "(1, inf)",
    "value_clip": "(0, inf]",
    "huber_delta": "(0, inf]",
    "vf_coef": "[0, inf)",
    "ent_coef": "[0, inf)",
    "imitation_coef": "[0, inf)",
    "imitation_iterations": "[0, inf)",
    "imitation_learning_rate": "[0, inf)",
    "imitation_epochs": "[1, inf)",
    "kl_coef": "[0, inf)",
    "initial_alpha": "(0, inf)",
    "target_entropy": "(-inf, inf)",
    "max_ratio_deviation": "(0, inf]",
    # evaluation, saving, logging
    "eval_interval": "[0, inf)",
    "eval_episodes_per_task": "[0, inf)",
    "eval_videos_per_task": "[1, inf)",
    "videos_per_task": "[0, inf)",
    "save_interval": "[0, inf)",
    "log_interval": "[1, inf)",
    "video_interval": "[0, inf)",
    "keep_last": "[1, inf)",
    "keep_best": "[0, inf)",
    # report
    "max_video_mb": "[0, inf]",
}


def check_ranges(args: Any) -> None:
    """Raises ValueError if an argument that is a number, or several, is not in its range.

    So it is if it holds several and is empty, unless that is its default.
    """
    for item in fields(args):
        given = getattr(args, item.name)
        if item.name not in RANGES or given is None:
            continue
        interval = RANGES[item.name]
        if given == () and item.default != ():
            raise ValueError(
                f"{item.name}=() names none (valid: one or more in {interval}); give some, or leave --"
                f"{item.name.replace('_', '-')} out"
            )
        low, high = (float(bound) for bound in interval[1:-1].split(", "))
        for value in given if isinstance(given, tuple) else (given,):
            is_above = low < value or (interval[0] == "[" and low == value)
            is_below = value < high or (interval[-1] == "]" and value == high)
            if not (is_above and is_below):  # not a number (NaN) is neither
                raise ValueError(f"{item.name}={given} {_in_words(interval, low, high, value)}")


def _in_words(interval: str, low: float, high: float, value: float) -> str:
    if math.isfinite(high):
        return f"is not in {interval}"
    if math.isinf(low):
        return "must be a finite number"
    least = f"must be at least {low:g}" if interval[0] == "[" else f"must be more than {low:g}"
    return least if math.isfinite(value) else f"{least}, and {'a number' if math.isnan(value) else 'finite'}"


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


def check_imitation(args: Any) -> None:
    """Raises ValueError if `args` ask for iterations of imitation alone in which the policy would not move."""
    for name, example in (("imitation_coef", "10"), ("learning_rate", "5e-6")):
        if args.imitation_iterations and getattr(args, name) == 0:
            raise ValueError(
                f"imitation_iterations={args.imitation_iterations} needs a positive {name} (given: 0); give for "
                f"example --{name.replace('_', '-')} {example}, or --imitation-iterations 0"
            )


def check_value_bounds(args: Any) -> None:
    """Raises ValueError if `args.value_bounds` are no range, or shut out what a decision can be worth."""
    if args.value_bounds is None:
        return
    low, high = args.value_bounds
    if low >= high:
        raise ValueError(f"value_bounds={low} {high} is no range: give the smaller number first")
    shift = getattr(args, "reward_shift", 0.0)
    worst, best = sorted((shift, args.reward_scale + shift))
    if worst < low or best > high:
        raise ValueError(
            f"value_bounds={low} {high} do not hold the rewards of a decision, {worst:g} to {best:g} "
            f"(reward_scale={args.reward_scale}, reward_shift={shift}), so that values could not be learnt: give the "
            "range of possible returns, or --value-bounds None"
        )


def check_critic_warmup(args: Any) -> None:
    """Raises ValueError if `args` leave no iteration in which the policy learns."""
    if args.imitation_iterations == 0 and args.critic_warmup_iterations >= args.num_iterations:
        raise ValueError(
            f"critic_warmup_iterations={args.critic_warmup_iterations} of num_iterations={args.num_iterations} leave "
            f"none in which the policy learns; give for example --critic-warmup-iterations {args.num_iterations - 1}"
        )


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
            f"fits two cores, or sizes that a CPU can simulate, for example {_cpu_sizes(args)}"
        )


def _cpu_sizes(args: Any) -> str:
    """Returns flags by which a trainer's other arguments are for a CPU."""
    sizes: dict[str, float] = {"num_envs": CPU_ENVS}
    if hasattr(args, "minibatch_size") and hasattr(args, "micro_batch_size"):  # pieces of a rollout
        decisions = CPU_ENVS * args.num_steps
        minibatch_size = largest_divisor(decisions, args.minibatch_size)
        sizes["minibatch_size"] = minibatch_size
        sizes["micro_batch_size"] = largest_divisor(minibatch_size, args.micro_batch_size)
        if args.update_fraction < 1:
            sizes["update_fraction"] = nearest_fraction(decisions // minibatch_size, args.update_fraction)
    if getattr(args, "imitation_iterations", 0):  # so few environments have too few successes to learn from alone
        sizes["imitation_iterations"] = 0
    return " ".join(["--physics cpu", *(f"--{name.replace('_', '-')} {size:g}" for name, size in sizes.items())])


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` that is at most `limit`; 1 if there is none."""
    return max((n for n in range(1, min(number, limit) + 1) if number % n == 0), default=1)


def check_agent_options(args: Any, presets: Mapping[str, Any] = NO_PRESETS) -> None:
    """Raises ValueError for what the trainers' own agents have not; others may have it.

    Args:
        args: a trainer's.
        presets: the trainer's, see `check_left_out`.
    """
    _check_noise(args)
    check_adapters(args, presets)
    _check_adapted_parts(args)


def check_agent_takes(agent: Any, args: Any) -> None:
    """Raises ValueError if `args` ask for what an agent, perhaps one of one's own, has no method or parameter for.

    What every agent has is not looked at, see `gr00t_agent.check_agent`.
    """
    if args.compile and not hasattr(agent, "compile_network"):
        raise ValueError(
            f"compile=True needs an agent with a method compile_network(), which {type(agent).__name__} has not; leave "
            "it out, or define it"
        )
    final_noise, imitation_coef = getattr(args, "final_noise", 1.0), getattr(args, "imitation_coef", 0.0)
    parameters = inspect.signature(agent.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option, is_asked, parameter in (
        (f"final_noise={final_noise}", final_noise < 1, "noise_anneal"),
        (f"imitation_coef={imitation_coef}", imitation_coef > 0, "flow_draws"),
    ):
        if is_asked and not takes_all and parameter not in parameters:
            raise ValueError(
                f"{option} needs an agent whose forward takes {parameter}, as gr00t_agent.protocol.Agent says; that of "
                f"{type(agent).__name__} takes {', '.join(parameters)}: leave the option out, or add the parameter"
            )


def check_left_out(args: Any, names: Collection[str], why: str, presets: Mapping[str, Any] = NO_PRESETS) -> None:
    """Raises ValueError if one of the arguments `names` is not its default: where it would have no effect.

    Args:
        args: a script's.
        names: of arguments that nothing reads; such that `args` has not are passed over.
        why: ends the message's "... has no effect: ".
        presets: arguments by the name that `args.preset` may have: what the chosen one sets was not asked for.
    """
    preset = presets.get(getattr(args, "preset", None) or "")
    for item in fields(args):
        if item.name not in names:
            continue
        given = getattr(args, item.name)
        is_preset = preset is not None and given == getattr(preset, item.name)
        if given != item.default and not is_preset:
            raise ValueError(f"{item.name}={given!r} has no effect: {why}; leave it out")


def names_run(args: Any) -> bool:
    """Returns whether a trainer's arguments name the run that it goes on with.

    They are to be those that the run began with: what has no effect among them is none to leave out.
    """
    return args.resume is not None and str(args.resume) != "auto"


def check_adapters(args: Any, presets: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of low-rank adapters where there are none, and for adapters of nothing.

    Args:
        args: a trainer's.
        presets: the trainer's, see `check_left_out`.
    """
    if args.lora_rank and not args.lora_parts:
        raise ValueError(
            f"lora_parts=() names nothing that could get the adapters of lora_rank={args.lora_rank} (valid: one or "
            f"more of {', '.join(get_args(LoraPart))}); give some, or --lora-rank 0"
        )
    if args.lora_rank == 0 and not names_run(args):
        settings = ("lora_alpha", "lora_dropout", "lora_parts")
        check_left_out(args, settings, "without --lora-rank there are no adapters", presets)


def _check_noise(args: Any) -> None:
    """Raises ValueError for a level that the noise cannot have, and for a bonus on noise that is not learned."""
    if args.noise_method == "flow_cps" and args.noise_level > 1:
        raise ValueError(f"noise_level={args.noise_level} is more than noise_method='flow_cps' has (valid: (0, 1])")
    if args.ignore_last and (args.joint_logprob or args.noise_method != "flow_sde"):
        raise ValueError(
            f"ignore_last=True has no effect with noise_method={args.noise_method!r} and joint_logprob="
            f"{args.joint_logprob}; leave it out, or take flow_sde with noise at one step"
        )
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
        fitting = {divisor: largest_divisor(a, b)}
        if divisor == "minibatch_size" and fitting[divisor] % args.micro_batch_size:  # which comes next
            fitting["micro_batch_size"] = largest_divisor(fitting[divisor], args.micro_batch_size)
        hint = " ".join(f"--{name.replace('_', '-')} {size}" for name, size in fitting.items())
        made_of = " (num_envs x num_steps)" if dividend == "num_decisions" else ""
        raise ValueError(
            f"{dividend}={a} must be a positive multiple of {divisor}={b}{made_of}; give for example {hint}"
        )
    return a // b


def kept_minibatches(args: Any) -> int:
    """Returns how many of `args.num_minibatches` are left by `args.update_fraction`.

    Raises:
        ValueError: none, or not a whole number of them to within a hundredth (0.333 of 3 is 1).
    """
    of_all = args.num_minibatches * args.update_fraction
    kept = round(of_all)
    if kept < 1 or abs(of_all - kept) > 0.01:
        fitting = nearest_fraction(args.num_minibatches, args.update_fraction)
        raise ValueError(
            f"update_fraction={args.update_fraction} of {args.num_minibatches} minibatch(es) of {args.minibatch_size} "
            f"must be a positive whole number of them; give for example --update-fraction {fitting:.6g}, or a smaller "
            "--minibatch-size"
        )
    return kept


def nearest_fraction(num_minibatches: int, fraction: float) -> float:
    """Returns the part nearest to `fraction` that is a positive whole number of `num_minibatches`."""
    return max(1, round(num_minibatches * fraction)) / num_minibatches


def _check_adapted_parts(args: Any) -> None:
    """Raises ValueError if `args.lora_parts` name a part of the backbone, and the backbone is frozen."""
    frozen = [part for part in args.lora_parts if part != "action_head"]
    if args.lora_rank and frozen and not args.train_backbone:
        raise ValueError(
            f"lora_parts={args.lora_parts} hold {frozen[0]}, which is frozen and computed without gradients; give "
            "--train-backbone too, or --lora-parts action_head"
        )


def check_stages(args: Any) -> None:
    """Raises ValueError unless the environments of a process can be split into `args.pipeline_stage_num` stages."""
    num_envs = share_of_process(args, "num_envs", launched_processes())
    if num_envs % args.pipeline_stage_num:
        raise ValueError(
            f"pipeline_stage_num={args.pipeline_stage_num} must divide the {num_envs} environments of a process; give "
            f"for example --pipeline-stage-num {largest_divisor(num_envs, args.pipeline_stage_num)}"
        )


def check_near_goal(args: Any, presets: Mapping[str, Any]) -> None:
    """Raises ValueError for starts near the goal that cannot be, and for settings of them where there are none.

    Args:
        args: a trainer's.
        presets: the trainer's, see `check_left_out`.
    """
    if not args.steps_before_success and not names_run(args):
        check_left_out(args, ("num_near_goal_states",), NOT_NEAR_GOAL, presets)
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
    """Checks where a run comes from and goes to.

    Args:
        args: a trainer's.
        other_models: names that its `model` may have besides presets', folders' and hub ids.

    Raises:
        FileNotFoundError: the model, or the run to go on with, is not there.
        OSError: `output_dir` cannot be made or written to.
        ValueError: `run_name` is none of a folder.
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
    if resume is None or str(resume) == "auto":
        check_output_folder("output_dir", args.output_dir)


def check_folder(name: str, value: str, hint: str) -> None:
    """Raises FileNotFoundError unless `value` is a folder or may be a hub id (owner/name)."""
    if not Path(value).is_dir() and not is_hub_name(value):
        raise FileNotFoundError(f"{name}={value!r} is no folder and no hub name (owner/name); {hint}")
