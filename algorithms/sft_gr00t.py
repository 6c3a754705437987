"""Supervised fine-tuning of a flow-matching vision-language-action policy on demonstrations.

Flow matching as GR00T-N1.5 is trained (NVIDIA 2025; Lipman et al. 2023, arXiv:2210.02747). With an
action chunk a, noise e ~ N(0, I) and a time tau between noise (0) and action (1):

    tau   = (s - b) / s,  b ~ Beta(alpha, 1)     (s = 0.999, alpha = 1.5: more noisy chunks)
    x_tau = (1 - tau) e + tau a
    L     = sum_i m_i (v(x_tau, tau, obs)_i - (a - e)_i)^2 / sum_i m_i

m is 1 for the valid dimensions of steps before the episode's end. The sums run over the batch of
all processes.

Launch:
    accelerate launch algorithms/sft_gr00t.py --preset nano --dataset runs/data/libero_spatial
    accelerate launch --multi_gpu algorithms/sft_gr00t.py --dataset runs/data/libero_spatial
    accelerate launch algorithms/sft_gr00t.py --dataset runs/data/libero_spatial --resume auto
All sizes are global: they are divided over the processes, and a size that does not divide is an
error.

All that is random in a step (frames, augmentation, noise, times, dropout) follows from the seed and
the step's number, so a resumed run equals an uninterrupted one, and the loss does not depend on the
number of processes or micro-batches (dropout excepted).

What differs from NVIDIA's script: steps past an episode's end do not count, where there the last
action is repeated; one learning rate for all that is trained; augmentation as
`algorithms/common/augmentation.py` says.

Metrics: `train/loss` and `train/grad_norm` are means since the last log, `time/data_fraction` is
the part of the time in which training waited for data, `charts/samples_per_s` counts frames of all
processes, `charts/epoch` passes over the data, `eval/success_once` success at any step of an
episode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from algorithms.common.args import (
    Augmentation,
    LoraPart,
    check_adapters,
    check_folder,
    check_folders,
    check_ranges,
    check_sizes,
    exact_quotient,
    names_run,
    share_of_process,
)
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import chosen_tasks, jobs_in_training
from gr00t_agent.config import PresetName

# What may differ between a run and its continuation.
FREE_ARGS = {
    "preset",
    "resume",
    "output_dir",
    "run_name",
    "save_interval",
    "keep_last",
    "keep_best",
    "eval_interval",
    "eval_episodes_per_task",
    "log_interval",
    "log_with",
    "tracker_project",
    "num_envs",
    "renderer",
    "frame_cache",
    "cache_dir",
    "num_loader_threads",
    "num_batches_ahead",
    "micro_batch_size",
    "compile",
}


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- run ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    run_name: str = "sft_{suite}_{seed}"
    """Name of the run's folder; may hold fields of these arguments in braces."""
    output_dir: Path = Path("runs")
    """Where run folders are made."""
    resume: Path | None = None
    """Run folder (or its newest checkpoint) to go on with, or `auto`: the newest run of this name
    that has a checkpoint, else a new one. Give the same arguments as before."""
    seed: int = 1
    """Seed of initial weights and every random draw."""
    num_steps: int = 20_000
    """Optimiser steps."""
    save_interval: int = 5_000
    """Steps between checkpoints; the last step is always saved, and while keep_best is not 0 every
    evaluated one. 0 saves no others."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints that are kept besides for their success rate."""
    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates only after the last."""
    eval_episodes_per_task: int = 50
    """Stored initial states evaluated per task (50 are stored); 0 skips evaluation."""
    log_interval: int = 50
    """Steps between logged metrics."""
    log_with: tuple[str, ...] = ("tensorboard",)
    """Accelerate trackers that receive the metrics."""
    tracker_project: str = "libero-gr00t"
    """Project that the run belongs to in trackers that have projects, such as `wandb`."""

    # --- data ---
    dataset: str = ""
    """Folder or hub id of a LeRobot dataset (v2.0, v2.1 or v3.0)."""
    modality_file: Path | None = None
    """A modality.json for datasets without one; LIBERO's is libero_gym/data/modality.json."""
    episodes_per_task: int | None = None
    """Use only the first so many episodes of each task; all if not given."""
    train_image_size: int | None = None
    """Resize frames to this many pixels as they are read (the environment then renders that size);
    as stored if not given."""
    frame_cache: Literal["none", "disk", "device"] = "disk"
    """Decode every frame when it is used; or all once into a file; or that file copied to each
    GPU's memory."""
    cache_dir: Path = Path("runs/frame_cache")
    """Where decoded frames are kept."""
    num_loader_threads: int = 4
    """Threads that decode and gather batches."""
    num_batches_ahead: int = 4
    """Batches prepared ahead."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Random crop and colour jitter."""

    # --- agent ---
    model: str = "nvidia/GR00T-N1.5-3B"
    """A preset's name (`nano`, `gr00t_n1d5`: random weights), or the folder or hub id of a
    checkpoint."""
    statistics: Literal["data", "checkpoint"] = "data"
    """Normalise states and actions by the dataset's statistics, or by those that the checkpoint
    has."""
    tune_visual: bool = False
    """Train the vision tower and its connector."""
    tune_llm: bool = False
    """Train the language model."""
    tune_projector: bool = True
    """Train state encoder, action encoder and decoder, and position embedding."""
    tune_diffusion_model: bool = True
    """Train the diffusion transformer."""
    lora_rank: int = 0
    """Inner width of low-rank adapters; 0 for none."""
    lora_alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    lora_dropout: float = 0.1
    """Dropout on the adapters' inputs."""
    lora_parts: tuple[LoraPart, ...] = ("action_head",)
    """What gets adapters."""
    dropout: bool = True
    """Train with the network's own dropout."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products in training; weights, optimiser and the saved policy's own type
    stay."""
    tf32: bool = False
    """Multiply float32 matrices by a GPU's TensorFloat-32 units: much faster, with 10 bits of their
    factors' fractions instead of 23."""
    compile: bool = False
    """Compile the network (takes minutes, then saves time)."""

    # --- optimisation ---
    batch_size: int = 128
    """Frames per optimiser step over all processes."""
    micro_batch_size: int = 128
    """Frames per forward pass over all processes; smaller ones accumulate gradients."""
    learning_rate: float = 1e-4
    """AdamW's largest step size."""
    warmup_fraction: float = 0.05
    """Part of the steps in which the step size rises; then it falls to 0 along a cosine."""
    weight_decay: float = 1e-5
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.95, 0.999)
    """AdamW's decay rates of the two moments."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped."""
    ema_decay: float = 0.0
    """Decay of the moving average of weights, which is then evaluated and saved; 0 for none."""

    # --- evaluation ---
    suite: str | None = None
    """LIBERO suite; the one that the demonstrations are of, if not given and they say so."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to evaluate; all of the suite if not given."""
    num_envs: int = 50
    """Environments that episodes stream through."""
    num_action_chunks: int = 5
    """Environment steps that one decision executes."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    horizon: int | None = None
    """Environment steps before an episode counts as failed; the suite's own if not given."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimiser step."""
        return exact_quotient(self, "batch_size", "micro_batch_size")

    def is_due(self, step: int, interval: int) -> bool:
        """Returns whether what is done every `interval` steps is done after `step`."""
        return step == self.num_steps or (interval > 0 and step % interval == 0)

    def evaluates(self, step: int) -> bool:
        """Returns whether the policy is evaluated after `step`."""
        return self.eval_episodes_per_task > 0 and self.is_due(step, self.eval_interval)

    def saves(self, step: int) -> bool:
        """Returns whether a checkpoint is saved after `step`."""
        is_candidate = self.keep_best > 0 and self.evaluates(step)
        return is_candidate or self.is_due(step, self.save_interval)

    def logs(self, step: int) -> bool:
        """Returns whether metrics are logged after `step`."""
        return self.evaluates(step) or self.is_due(step, self.log_interval)


PRESETS: dict[str, Args] = {
    # Made checkpoints/libero_spatial_fewshot (step 400), and with other num_steps those of other
    # suites: benchmarks/runs/fewshot.sh.
    "nano": Args(
        model="nano",
        num_steps=1_200,
        save_interval=200,
        keep_last=8,
        tune_visual=True,
        tune_llm=True,
        dropout=False,
        batch_size=512,
        micro_batch_size=512,
        learning_rate=7e-4,
        weight_decay=1e-4,
        betas=(0.9, 0.95),
        ema_decay=0.999,
        augmentation=Augmentation(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02),
        frame_cache="device",
    ),
    "gr00t_n1d5": Args(),
    "gr00t_n1d5_lora": Args(
        lora_rank=64,
        batch_size=64,
        micro_batch_size=32,
    ),
}


def check_args(args: Args) -> None:
    """Raises ValueError for arguments that would otherwise fail late."""
    check_ranges(args)
    check_sizes(args, "batch_size", "micro_batch_size")
    exact_quotient(args, "batch_size", "micro_batch_size")
    if not args.dataset:
        raise ValueError("dataset is not given: name a LeRobot dataset with --dataset")
    check_folder("dataset", args.dataset, "make one by algorithms/collect_demos.py")
    check_folders(args)
    check_adapters(args, PRESETS)
    is_preset = args.model in get_args(PresetName)
    if is_preset and args.statistics == "checkpoint" and not names_run(args):
        raise ValueError(
            f"statistics='checkpoint' takes those of a checkpoint, and model={args.model!r} is a preset, which has "
            "random weights and none: leave it out, or give a checkpoint as --model"
        )
    if args.suite is not None:
        check_tasks(args, args.suite)


def check_tasks(args: Args, suite: str) -> None:
    """Raises ValueError or FileNotFoundError for tasks and episodes that the suite has not."""
    if args.task_ids is not None:
        chosen_tasks(suite, args.task_ids)
    if args.eval_episodes_per_task > 0:
        jobs_in_training(args)


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, PRESETS, check_args) if __name__ == "__main__" else None

import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from algorithms.common.augmentation import NUM_DRAWS, augment
from algorithms.common.checkpoint_notes import note_suite, tell_start
from algorithms.common.evaluation import evaluate_into, evaluation_file
from algorithms.common.frozen import origin_of
from algorithms.common.lora import LoraSettings, add_lora, merged
from algorithms.common.prefetch import Prefetch
from algorithms.common.processes import for_all, from_main, main_first, make_accelerator
from algorithms.common.randomness import seed_of
from algorithms.common.resume import (
    Checkpoints,
    StopSignal,
    check_origin,
    missing_evaluation,
    open_run,
)
from gr00t_agent import DataConfig, DatasetMetadata, Gr00tAgent, preset_policy
from gr00t_agent.lerobot import Batch, LeRobotDataset, check_metadata
from gr00t_agent.loading import resolve_checkpoint, saved_data_config, saved_policy
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.tasks.suites import list_suites, member_suites


def make_dataset(args: Args, data_config: DataConfig | None = None) -> LeRobotDataset:
    """Returns the demonstrations that `args` ask for, of the robot of `data_config` (None: LIBERO's)."""
    return LeRobotDataset(
        args.dataset,
        data_config=data_config,
        modality_file=args.modality_file,
        image_size=args.train_image_size,
        episodes_per_task=args.episodes_per_task,
    )


def suites_of_data(dataset: LeRobotDataset) -> set[str | None]:
    """Returns the suites that demonstrations are of, with None if one does not say its own."""
    return {episode.info.get("suite") for episode in dataset.episodes}


def with_suite(args: Args, data_suites: set[str | None]) -> Args:
    """Returns the arguments with the suite that is evaluated on: if none is given, that of the data.

    Where neither says it, the dataset's name takes its place in the run's.

    Raises:
        ValueError: there is to be an evaluation, and neither says the suite; or it has not these tasks or episodes.
        FileNotFoundError: it has no initial states.
    """
    suite = args.suite
    if suite is None and len(data_suites) == 1:
        (suite,) = data_suites
    if suite is not None:
        args = replace(args, suite=suite)
        check_tasks(args, suite)
    elif args.eval_episodes_per_task > 0:
        raise ValueError(
            f"suite is not given, and the episodes of dataset {args.dataset} do not name one suite that all are of: "
            f"give --suite (valid: {', '.join(list_suites())}), or --eval-episodes-per-task 0"
        )
    else:
        args = replace(args, run_name=args.run_name.replace("{suite}", Path(args.dataset).name))
    return args


def suite_learned(args: Args, data_suites: set[str | None]) -> str | None:
    """Returns the suite to note in checkpoints: that of the data, or `suite` if it holds theirs or they name none."""
    if len(data_suites) == 1 and None not in data_suites:
        return next(iter(data_suites))
    if args.suite is not None and data_suites <= {None, *member_suites(args.suite)}:
        return args.suite
    return None


def load_agent(args: Args, metadata: DatasetMetadata) -> Gr00tAgent:
    """Returns the agent that `args` ask for, on the CPU, with what is not trained frozen."""
    changes: dict[str, Any] = dict(
        num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps,
        disable_dropout=not args.dropout,
    )
    if args.model in ("nano", "gr00t_n1d5"):
        policy = replace(preset_policy(args.model), **changes)
        agent = Gr00tAgent.from_preset(args.model, policy=policy, metadata=metadata)
    else:
        folder = resolve_checkpoint(args.model)
        policy = replace(saved_policy(folder), **changes)
        given = metadata if args.statistics == "data" else None
        agent = Gr00tAgent.from_pretrained(folder, policy=policy, metadata=given)

    agent.set_trainable(
        tune_visual=args.tune_visual,
        tune_llm=args.tune_llm,
        tune_projector=args.tune_projector,
        tune_diffusion_model=args.tune_diffusion_model,
    )
    # The loss reaches neither. Freezing them here leaves the saved policy's flags as reinforcement
    # learning wants them.
    for part in (agent.action_head.value_head, agent.action_head.reinflow_explore_noise_net):
        if part is not None:
            part.requires_grad_(False)

    if args.lora_rank:
        settings = LoraSettings(
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            parts=args.lora_parts,
        )
        add_lora(agent, settings)
    return agent


def make_envs(args: Args, num_envs: int, image_size: int) -> gym.vector.VectorEnv:
    """Returns `num_envs` environments for evaluation."""
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        task_ids=args.task_ids,
        num_action_chunks=args.num_action_chunks,
        image_size=image_size,
        horizon=args.horizon,
        renderer=args.renderer,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    return ModalityVectorObservation(envs)


def make_average(parameters: Iterable[nn.Parameter], decay: float) -> EMAModel:
    """Returns an average of `parameters` in float32 that takes them in at each `step`.

    At its step n (from 1) the past has the weight min(decay, (1 + n) / (10 + n)), so that the
    initial weights are soon forgotten.
    """
    # Without the shift the first step would count as step 0 and forget the start at once.
    average = EMAModel(parameters, decay=decay, update_after_step=-1, foreach=True)
    average.to(dtype=torch.float32)
    return average


def learning_rate_at(step: int, args: Args) -> float:
    """Returns the step size of optimiser step `step` (from 1)."""
    warmup = round(args.warmup_fraction * args.num_steps)
    if step <= warmup:
        return args.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, args.num_steps - warmup)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def frames_at(step: int, batch_size: int, num_frames: int, seed: int) -> NDArray[np.int64]:
    """Returns the frames [batch_size] of optimiser step `step` (from 1).

    They are shuffled passes over the data, end to end.
    """
    positions = np.arange((step - 1) * batch_size, step * batch_size)
    frames = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // num_frames):
        of_epoch = positions // num_frames == epoch
        order = np.random.default_rng((seed, int(epoch))).permutation(num_frames)
        frames[of_epoch] = order[positions[of_epoch] % num_frames]
    return frames


def flow_matching_draws(
    head: Any,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Returns noise [B, h, A] and times tau [B] for the loss above.

    Args:
        head: the action head's configuration.
        batch_size: B.
        generator: decides the draws.
    """
    noise = torch.randn(batch_size, head.action_horizon, head.action_dim, generator=generator)
    # The inverse of Beta(alpha, 1)'s distribution function.
    b = torch.rand(batch_size, generator=generator) ** (1 / head.noise_beta_alpha)
    return noise, (head.noise_s - b) / head.noise_s


def encode(
    agent: Gr00tAgent,
    obs: dict[str, Any],
    draws: Tensor,
    augmentation: Augmentation,
) -> dict[str, Tensor]:
    """Returns an observation as the agent encodes it, but augmented; see `Gr00tAgent.encode`."""
    preprocessor, device = agent.preprocessor, agent.device
    config = preprocessor.data_config
    views = [obs[key].to(device, non_blocking=True) for key in config.video_keys]
    images = torch.stack(views, dim=1)  # [B, V, H, W, 3]
    input_ids, valid_mask = preprocessor.tokens(obs, device)
    return {
        "pixels": augment(images, draws, augmentation, config.crop_scale, agent.config.image_size),
        "state": preprocessor.state(obs, device),
        "input_ids": input_ids,
        "valid_mask": valid_mask,
    }


def take(batch: Batch, rows: slice) -> Batch:
    """Returns some rows of a batch."""
    obs = {key: value[rows] for key, value in batch.obs.items()}
    return Batch(obs, batch.actions[rows], batch.step_mask[rows])


def pinned(batch: Batch) -> Batch:
    """Returns a batch in memory from which it is copied to a GPU while the program goes on."""
    obs = dict(batch.obs)
    for key, value in obs.items():
        if isinstance(value, Tensor) and not value.is_cuda:
            obs[key] = value.pin_memory()
    return Batch(obs, batch.actions.pin_memory(), batch.step_mask.pin_memory())


def main(
    args: Args,
    make_agent: Callable[[Args, DatasetMetadata], Gr00tAgent] | None = None,
    make_envs: Callable[[Args, int, int], gym.vector.VectorEnv] = make_envs,
) -> dict[str, float]:
    """Trains, evaluates, and returns the last logged metrics.

    `make_agent` and `make_envs` are the two places to plug in something else. An agent of one's own
    has LIBERO's data configuration, and not that of the checkpoint that `model` names.
    """
    check_args(args)
    accelerator = make_accelerator(args.log_with, args.output_dir)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if accelerator.is_fsdp2:
        raise ValueError(
            "FSDP cannot be used for fine-tuning: averages and adapters need whole weights; use DDP",
        )
    device, num_processes = accelerator.device, accelerator.num_processes
    rank, is_main = accelerator.process_index, accelerator.is_main_process
    console = Console(quiet=not is_main, highlight=False, soft_wrap=True)

    local_size = share_of_process(args, "batch_size", num_processes)
    micro_size = share_of_process(args, "micro_batch_size", num_processes)
    num_micro_batches = args.num_micro_batches

    if is_main and make_agent is None:
        tell_start(args)

    # --- data ---
    # An agent of one's own is LIBERO's, whatever model is named.
    data_config = saved_data_config(args.model) if make_agent is None else None
    dataset = make_dataset(args, data_config)
    data_suites = suites_of_data(dataset)
    args = with_suite(args, data_suites)
    metadata = dataset.metadata()
    image_size = dataset.image_size[0]
    run, checkpoint = open_run(
        args,
        accelerator,
        num_iterations=args.num_steps,
        free_args=FREE_ARGS,
    )
    facts = {f"{name} of dataset {args.dataset}": fact for name, fact in dataset.facts().items()}
    if checkpoint is not None:  # before frames are decoded
        from_main(accelerator, partial(check_origin, checkpoint, facts))
    num_episodes = len(dataset.episodes)
    console.print(f"{num_episodes} episodes, {len(dataset)} frames of {dataset.image_size} pixels")

    def show_decoding(done: int, total: int) -> None:
        if done % 50 == 0:
            console.print(f"decoded {done}/{total}")

    if args.frame_cache != "none":
        with main_first(accelerator):
            dataset.cache_frames(
                args.cache_dir,
                num_threads=args.num_loader_threads,
                device=device if args.frame_cache == "device" else "cpu",
                on_episode=show_decoding,
            )

    def load(step: int) -> Batch:
        """Returns this process's part of a step's batch."""
        frames = frames_at(step, args.batch_size, len(dataset), args.seed)
        batch = dataset.batch(frames[rank * local_size : (rank + 1) * local_size])
        return pinned(batch) if device.type == "cuda" else batch

    # --- agent, optimiser, average ---
    set_seed(args.seed)  # the same weights on every process
    agent = load_agent(args, metadata) if make_agent is None else make_agent(args, metadata)
    agent = agent.to(device)
    check_metadata(agent.preprocessor.metadata, metadata, dataset.data_config)
    note_suite(agent, suite_learned(args, data_suites))
    origin = facts | origin_of(accelerator, agent)
    if args.compile:
        agent.compile_network()

    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    num_trained = sum(p.numel() for p in trained.values())
    num_parameters = sum(p.numel() for p in agent.parameters())
    console.print(f"{num_trained:,} of {num_parameters:,} parameters are trained")

    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=args.learning_rate,
        betas=args.betas,
        weight_decay=args.weight_decay,
    )
    average = None
    if args.ema_decay > 0:
        average = make_average(trained.values(), args.ema_decay)
    model, optimizer = accelerator.prepare(agent, optimizer)
    model.train()
    autocast = partial(
        torch.autocast,
        device.type,
        torch.bfloat16,
        enabled=args.compute_dtype == "bfloat16",
    )

    @contextmanager
    def as_policy() -> Generator[None]:
        """The agent as it is evaluated and saved: averaged, adapters merged, in eval mode."""
        if average is not None:
            average.store(trained.values())
            average.copy_to(trained.values())
        try:
            with merged(agent) if args.lora_rank else nullcontext():
                agent.eval()
                yield
        finally:
            agent.train()
            if average is not None:
                average.restore(trained.values())

    def write_agent(folder: Path) -> None:
        with as_policy():
            agent.save_pretrained(folder)

    def make_eval_envs(num_envs: int) -> gym.vector.VectorEnv:
        return stop.watched(make_envs(args, num_envs, image_size))

    def evaluate(folder: Path, step: int) -> float:
        with as_policy():
            return evaluate_into(folder, step, agent, make_eval_envs, args)

    metrics: dict[str, float] = {}
    history: list[Tensor] = []  # loss and gradient norm of each step since the last log

    def more_state() -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides weights and optimiser."""
        unlogged = torch.stack(history) if history else torch.zeros(0, 2)
        state = {"history": {"loss_and_grad_norm": unlogged}}
        if average is not None:
            state["ema"] = dict(zip(trained, average.shadow_params, strict=True))
        return state

    with (
        StopSignal(accelerator) as stop,
        Checkpoints(
            run,
            accelerator,
            model,
            optimizer,
            keep_last=args.keep_last,
            keep_best=args.keep_best,
            origin=origin,
            unit="step",
            write_agent=write_agent,
            generators=False,
        ) as checkpoints,
    ):
        # --- start, or go on where a checkpoint was taken ---
        done = 0
        if checkpoint is not None:
            restored = checkpoints.restore(checkpoint)
            done = restored.iteration
            unlogged = restored.tensors["history"]["loss_and_grad_norm"]
            history = list(unlogged.to(device))
            if average is not None:
                averages = restored.tensors["ema"]
                average.shadow_params = [averages[name].to(device) for name in trained]
                average.optimization_step = done
            is_missing = args.evaluates(done) and not evaluation_file(run.path, done).is_file()
            if is_missing and is_main:
                print(missing_evaluation(checkpoint, args))
        checkpoints.take(done, done, tensors=more_state())

        batches = Prefetch(
            load,
            range(done + 1, args.num_steps + 1),
            num_threads=args.num_loader_threads,
            num_ahead=args.num_batches_ahead,
        )
        logged_at = time.perf_counter()
        logged_step = done
        logged_wait_s = 0.0

        for step, batch in enumerate(batches, done + 1):
            stop.check_together()
            checkpoints.begin_update()

            # --- what is random, for the batch of all processes ---
            generator = torch.Generator().manual_seed(seed_of(args.seed, step, 0))
            noise, tau = flow_matching_draws(agent.config.action_head, args.batch_size, generator)
            augment_draws = torch.rand(args.batch_size, NUM_DRAWS, generator=generator)
            torch.manual_seed(seed_of(args.seed, step, 1 + rank))  # dropout

            # --- loss: each micro-batch's share of the mean over the whole batch ---
            num_valid = batch.step_mask.sum().to(device)
            num_valid = cast(Tensor, accelerator.reduce(num_valid, "sum"))
            losses: list[Tensor] = []
            for micro in range(num_micro_batches):
                rows = slice(micro * micro_size, (micro + 1) * micro_size)
                first = rank * local_size + rows.start
                overall = slice(first, first + micro_size)

                part = take(batch, rows)
                obs = encode(agent, part.obs, augment_draws[overall], args.augmentation)
                draws = noise[overall].to(device), tau[overall].to(device)
                share = part.step_mask.sum().to(device) / num_valid

                # Processes exchange gradients with the last micro-batch.
                is_last = micro == num_micro_batches - 1
                with nullcontext() if is_last else accelerator.no_sync(model):
                    with autocast():
                        loss = model(
                            obs,
                            sft_actions=part.actions,
                            step_mask=part.step_mask,
                            draws=draws,
                        )
                    loss = loss * share
                    # Times their number, because processes' gradients are averaged.
                    accelerator.backward(loss * num_processes)
                losses.append(loss.detach())

            # --- update ---
            learning_rate = learning_rate_at(step, args)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            grad_norm = cast(
                Tensor,
                accelerator.clip_grad_norm_(trained.values(), args.max_grad_norm),
            )
            run.check_finite(
                grad_norm, step, [dict(losses=torch.stack(losses), actions=batch.actions)]
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.step(trained.values())
            loss_sum = cast(Tensor, accelerator.reduce(torch.stack(losses).sum(), "sum"))
            history.append(torch.stack([loss_sum, grad_norm]))

            # --- log, evaluate, save ---
            success = None
            if args.logs(step):
                seconds = time.perf_counter() - logged_at
                num_steps = step - logged_step
                loss_mean, norm_mean = torch.stack(history).mean(0).tolist()
                metrics = {
                    "train/loss": loss_mean,
                    "train/grad_norm": norm_mean,
                    "train/lr": learning_rate,
                    "time/data_fraction": (batches.wait_s - logged_wait_s) / seconds,
                    "charts/samples_per_s": num_steps * args.batch_size / seconds,
                    "charts/epoch": step * args.batch_size / len(dataset),
                }
                left_s = (args.num_steps - step) * seconds / num_steps
                console.print(
                    f"step {step}/{args.num_steps}  loss {loss_mean:.4f}  "
                    f"grad norm {norm_mean:.2f}  "
                    f"{metrics['charts/samples_per_s']:.0f} samples/s  "
                    f"waiting for data {metrics['time/data_fraction']:.1%}  left {left_s:.0f} s"
                )
                history = []
            checkpoints.take(step, step, tensors=more_state())

            if args.logs(step):
                try:
                    if args.evaluates(step):
                        success = for_all(accelerator, evaluate, run.path, step)
                        metrics["eval/success_once"] = success
                finally:  # also if a request to stop ends the evaluation
                    run.log(metrics, step, step)
            if args.saves(step):
                checkpoints.save(success)
            if args.logs(step):
                logged_at = time.perf_counter()
                logged_step = step
                logged_wait_s = batches.wait_s

    run.finish()
    if is_main:
        print(run.summary(f"step_{args.num_steps}", args.suite))
    return metrics


if ARGS is not None:
    launch(main, ARGS)
