"""Success rate of a policy on a LIBERO suite.

Protocol: every chosen task from each of its first `episodes_per_task` stored initial states,
exactly once per seed (10 x 50 = 500 episodes for a whole suite and one seed); deterministic Euler
sampling from an initial noise that depends on nothing but (seed, task, initial state);
`success_once`, that is success at any step before the suite's horizon; Wilson 95 % intervals. Any
suite that is installed, LIBERO-PRO's included; settings of the policy that are not given are those
saved with the checkpoint. An exception ends the evaluation: it never counts as a failed episode.

    python algorithms/eval_gr00t.py --checkpoint checkpoints/libero_spatial_rl --num-envs 20
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --seeds 0 1 2
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --reference-env
    python algorithms/eval_gr00t.py --checkpoint runs/dsrl_libero_spatial_1/checkpoints/iteration_65

Writes result.json (the protocol, the tables, every episode), one video per task and one of all, and
report.html with all of that. Episodes are also written as they end, and the same command with
--resume goes on after an interruption: on the same kind of machine its outcome is that of an
uninterrupted evaluation. --reference-env runs the policy in LIBERO's own environment instead of
ours. How episodes stream through the environments is in `algorithms.common.evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from algorithms.common.args import check_at_least, check_folder
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import Job, episode_keys, evaluation_jobs, stated_horizon
from gr00t_agent.config import PresetName
from libero_gym.tasks.initial_states import InitStates, check_init_states


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- what is evaluated ---
    checkpoint: str
    """A folder or hub id that `Gr00tAgent.from_pretrained` loads, a preset's name (random weights),
    or a checkpoint of dsrl_gr00t.py, which names the policy that it steers."""
    base_model: str | None = None
    """Folder or hub id of the policy that a checkpoint of dsrl_gr00t.py steers, if it is elsewhere
    than it was; its weights must be the same."""
    suite: str = "libero_spatial"
    """LIBERO suite; `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to evaluate; all of the suite if not given."""
    episodes_per_task: int = 50
    """Stored initial states per task, from the first on."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial noise and of the environments; every episode is run once for each."""

    # --- policy ---
    num_action_chunks: int | None = None
    """Environment steps per decision; the checkpoint's own if not given."""
    denoising_steps: int | None = None
    """Denoising steps from noise to action; the checkpoint's own if not given."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Type that the network computes in; the checkpoint's own if not given."""
    device: str | None = None
    """Torch device of the policy; a GPU if there is one, if not given."""

    # --- environment ---
    num_envs: int = 10
    """Environments that the episodes stream through."""
    horizon: int | None = None
    """Environment steps before an episode counts as failed; the suite's own if not given."""
    init_states: InitStates | None = None
    """Stored initial states as they came to rest under MuJoCo 3.3, states that are none of the
    stored ones (held_out, libero_spatial), or the stored ones as LIBERO has them, to settle under
    the installed version; settled if not given, where the suite has them."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has (egl for the reference environment)."""
    reference_env: bool = False
    """Run the policy in LIBERO's own environment, one process per environment, instead of ours."""

    # --- output ---
    videos_per_task: int = 1
    """Episodes per task, from the first on, that are recorded (of the first seed)."""
    output_dir: Path = Path("runs/eval")
    """Where the result and the videos are written."""
    resume: bool = False
    """Go on with the evaluation in output_dir, if there is one; give the same arguments."""


def check_args(args: Args) -> None:
    """Raises ValueError or FileNotFoundError for arguments that would otherwise fail late."""
    check_at_least(args, 1, "num_envs")
    check_at_least(args, 0, "videos_per_task")
    if args.checkpoint not in get_args(PresetName):
        check_folder("checkpoint", args.checkpoint, "for example checkpoints/libero_spatial_rl")
    if args.base_model is not None:
        check_folder("base_model", args.base_model, "give that of the policy that is steered")
    jobs = evaluation_jobs(args.suite, args.task_ids, args.episodes_per_task, args.init_states)
    episode_keys(args.seeds, jobs)


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, check=check_args) if __name__ == "__main__" else None

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from rich.console import Console

from algorithms.common.episode_log import EpisodeLog, EvalEpisode
from algorithms.common.evaluation import EvalResult, evaluate
from algorithms.common.processes import check_alone
from algorithms.common.reference_env import ReferenceVectorEnv
from algorithms.common.report import write_report
from algorithms.common.steering import (
    WEIGHTS_FILE,
    SteeredAgent,
    file_digest,
    is_noise_actor,
    load_steered,
    weights_digest,
)
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.tasks.suites import get_task

# --- policy and environments ---


def load_policy(args: Args) -> Gr00tAgent | SteeredAgent:
    """Returns the policy on its device: an agent, or one that is steered by its noise.

    Raises:
        FileNotFoundError: there is no such checkpoint, or not the policy that it steers.
        ValueError: `base_model` is given for a checkpoint that steers none, or has other weights.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = dict(
        num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps,
        compute_dtype=args.compute_dtype,
    )
    if is_noise_actor(args.checkpoint):
        return load_steered(args.checkpoint, base_model=args.base_model, device=device, **settings)
    if args.base_model is not None:
        raise ValueError(
            f"base_model={args.base_model!r} goes with a checkpoint of dsrl_gr00t.py, and "
            f"{args.checkpoint} is none; leave it out, or give such a checkpoint"
        )
    return Gr00tAgent.load(args.checkpoint, **settings).to(device).eval()


def make_envs(
    args: Args, num_envs: int, num_action_chunks: int, image_size: int
) -> ModalityVectorObservation:
    """Returns the environments, ours or LIBERO's own, with GR00T's modality keys."""
    options: dict[str, Any] = dict(
        num_action_chunks=num_action_chunks,
        image_size=image_size,
        horizon=args.horizon,
        init_states=args.init_states,
        renderer=args.renderer,
    )
    if args.reference_env:
        return ModalityVectorObservation(ReferenceVectorEnv(args.suite, num_envs, **options))
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.DISABLED,
        **options,
    )
    return ModalityVectorObservation(envs)


# --- protocol ---


def make_protocol(
    args: Args, agent: Gr00tAgent | SteeredAgent, envs: gym.vector.VectorEnv, jobs: Sequence[Job]
) -> dict[str, Any]:
    """Returns all that decides the outcomes, apart from package versions and hardware."""
    policy = agent.policy
    weights: dict[str, Any] = {"checkpoint": args.checkpoint}
    if isinstance(agent, SteeredAgent):
        weights["noise_actor_sha256"] = file_digest(Path(args.checkpoint) / WEIGHTS_FILE)
        weights["base_model"] = agent.model
        weights["weights_sha256"] = weights_digest(agent.model)
    else:
        weights["weights_sha256"] = weights_digest(args.checkpoint)
    return weights | {
        "suite": args.suite,
        "task_ids": sorted({task_id for task_id, _ in jobs}),
        "episodes_per_task": args.episodes_per_task,
        "seeds": list(args.seeds),
        "horizon": stated_horizon(args.suite, args.horizon),
        "environment": "LIBERO" if args.reference_env else "libero_gym",
        "init_states": check_init_states(args.init_states, args.suite),
        "renderer": cast(Any, envs.unwrapped).renderer_name,
        "texture_colorspace": cast(Any, envs.unwrapped).texture_colorspace,
        "image_size": agent.image_size,
        "num_envs": envs.num_envs,
        "policy": {
            "num_action_chunks": policy.num_action_chunks,
            "denoising_steps": policy.denoising_steps,
            "compute_dtype": policy.compute_dtype,
            "padding": policy.padding,
            "round_to_bf16": policy.round_to_bf16,
        },
    }


# --- terminal ---


class ShownEpisodeLog(EpisodeLog):
    """A log that tells each episode on the terminal, with the rate so far and the time left."""

    def __init__(self, folder: Path, protocol: dict[str, Any], *, resume: bool, total: int) -> None:
        super().__init__(folder, protocol, resume=resume)
        self.console = Console()
        self._total = total
        self._num_known = len(self.episodes)
        self._start = time.perf_counter()
        if self._num_known:
            self.console.print(f"going on after {self._num_known} of {total} episodes")

    def append(self, episode: EvalEpisode) -> None:
        """Writes and tells a finished episode."""
        super().append(episode)
        count = len(self.episodes)
        seconds_each = (time.perf_counter() - self._start) / (count - self._num_known)
        left_s = seconds_each * (self._total - count)
        outcome = "success" if episode.success else "failure"
        rate = np.mean([e.success for e in self.episodes])
        self.console.print(
            f"{count}/{self._total}  "
            f"seed {episode.seed} task {episode.task_id} state {episode.init_state_id}: "
            f"{outcome} after {episode.length} steps   "
            f"success so far {rate:.1%}   left {left_s:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def main(args: Args) -> EvalResult:
    """Evaluates, prints the tables, writes result.json and videos."""
    check_args(args)
    check_alone()

    # --- agent ---
    set_seed(args.seeds[0])  # a preset's random weights
    agent = load_policy(args)

    # --- environments ---
    jobs = evaluation_jobs(args.suite, args.task_ids, args.episodes_per_task, args.init_states)
    num_episodes = len(episode_keys(args.seeds, jobs))
    num_envs = min(args.num_envs, num_episodes)

    # --- evaluate ---
    chunks = agent.policy.num_action_chunks
    with closing(make_envs(args, num_envs, chunks, agent.image_size)) as envs:
        protocol = make_protocol(args, agent, envs, jobs)
        log = ShownEpisodeLog(args.output_dir, protocol, resume=args.resume, total=num_episodes)
        result = evaluate(
            agent,
            envs,
            jobs,
            seed=args.seeds,
            record=lambda _, init_state_id: init_state_id < args.videos_per_task,
            video_dir=args.output_dir / "videos",
            log=log,
        )

    # --- result and report ---
    texts = {task_id: get_task(args.suite, task_id).language for task_id in protocol["task_ids"]}
    result = replace(result, protocol=result.protocol | protocol, task_descriptions=texts)
    result.save(args.output_dir / "result.json")
    report_path = write_report(args.output_dir)

    result.print_table()
    phases = [f"{name.removesuffix('_s')} {s:.1f} s" for name, s in result.timing.items()]
    for name, shown in (
        ("time", "  ".join(phases)),
        ("result", args.output_dir / "result.json"),
        ("report", report_path),
    ):
        log.console.print(f"{name:7} {shown}", highlight=False, soft_wrap=True)
    return result


if ARGS is not None:
    launch(main, ARGS)
