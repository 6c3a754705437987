"""Success rate of a policy on a LIBERO suite.

Protocol: every chosen task from each of its first `episodes_per_task` stored initial states,
exactly once per seed (10 x 50 = 500 episodes for a whole suite and one seed); deterministic Euler
sampling from an initial noise that depends on nothing but (seed, task, initial state);
`success_once`, that is success at any step before the suite's horizon; Wilson 95 % intervals. Any
suite that is installed, LIBERO-PRO's included; the suite and settings of the policy that are not
given are those saved with the checkpoint. An exception ends the evaluation: it never counts as a
failed episode.
Anybody's policy is evaluated by the same protocol, but for the noise, which is its own: one in
Python by --policy, one behind openpi's or Isaac-GR00T's server by --policy-server.

    python algorithms/eval_gr00t.py --checkpoint checkpoints/libero_spatial_rl --num-envs 20
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --seeds 0 1 2
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --reference-env
    python algorithms/eval_gr00t.py --checkpoint runs/dsrl_libero_spatial_1/checkpoints/iteration_32
    python algorithms/eval_gr00t.py --checkpoint runs/demo/checkpoints/iteration_18
        --task-ids 0 --horizon 40 --steps-before-success 3 6 9
    python algorithms/eval_gr00t.py --policy my_policy.py:make --suite libero_goal
    python algorithms/eval_gr00t.py --policy-server ws://localhost:8000 --suite libero_goal

Writes result.json (the protocol, the tables, every episode), one video per task and one of all, and
report.html with all of that, into runs/eval_<policy>_<suite> if no --output-dir is given. Episodes
are also written as they end, and the same command with --resume goes on after an interruption: on
the same kind of machine its outcome is that of an uninterrupted evaluation. --reference-env runs
the policy in LIBERO's own environment instead of ours. How episodes stream through the environments
is in `algorithms.common.evaluation`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from algorithms.common.args import NOT_NEAR_GOAL, check_folder, check_left_out, check_ranges
from algorithms.common.checkpoint_notes import suite_to_play
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import (
    Job,
    check_evaluation_folder,
    check_starts,
    episode_keys,
    evaluation_jobs,
    stated_horizon,
)
from algorithms.common.policy_sources import check_address, server_name
from gr00t_agent.config import CHECKPOINT_NAME, PresetName
from libero_gym.outputs import check_output_folder
from libero_gym.own_policies import policy_file
from libero_gym.tasks.initial_states import InitStates, check_init_states


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- what is evaluated ---
    checkpoint: Annotated[str | None, tyro.conf.arg(aliases=("--model",))] = None
    """A folder or hub id that `Gr00tAgent.from_pretrained` loads, a preset's name (random weights),
    a checkpoint of a trainer's --model state, or one of dsrl_gr00t.py, which names the policy that
    it steers."""
    base_model: str | None = None
    """Folder or hub id of the policy that a checkpoint of dsrl_gr00t.py steers, if it is elsewhere
    than it was; its weights must be the same."""
    policy: str | None = None
    """Instead of a checkpoint, a policy of one's own: package.module:make or path/to/file.py:make,
    where make takes no arguments and returns what `gr00t_agent.Policy` describes."""
    policy_server: str | None = None
    """Instead of a checkpoint, the address of a server that decides: ws://host:port for openpi's
    protocol, zmq://host:port for Isaac-GR00T's."""
    suite: str | None = None
    """LIBERO suite; if not given, the one that the checkpoint was trained on, if it says so.
    `python -c "import libero_gym; print(libero_gym.list_suites())"` lists them."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to evaluate; all of the suite if not given."""
    episodes_per_task: int = 50
    """Stored initial states per task, from the first on."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial noise and of the environments; every episode is run once for each."""

    steps_before_success: tuple[int, ...] = ()
    """Begin episodes where a scripted expert stands so many environment steps before it succeeds,
    each number in turn (`libero_gym.near_goal`), as evaluations in training do; if not given, at
    the initial states."""
    num_near_goal_states: int = 4
    """Initial states per task that experts start from, with --steps-before-success."""

    # --- policy ---
    num_action_chunks: int | None = None
    """Environment steps per decision; if not given, 1 with --temporal-ensemble, otherwise the
    policy's own, or 5 of a server's."""
    temporal_ensemble: float | None = None
    """Execute the mean of all chunks that reach to a step, weighted by exp(-k i) from the oldest on,
    where k is this number (ACT's is 0.01); if not given, the newest chunk."""
    policy_timeout: float = 300.0
    """Seconds to wait for an answer of the policy server."""
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
    stored ones (held_out, not libero_90), or the stored ones as LIBERO has them, to settle under
    the installed version; settled if not given, where the suite has them."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has (egl for the reference environment)."""
    texture_colorspace: Literal["linear", "auto"] | None = None
    """Colours of textures: linear, as in public data sets, if not given, or auto, as the installed
    MuJoCo draws them, which is how LIBERO's own environment looks."""
    reference_env: bool = False
    """Run the policy in LIBERO's own environment, one process per environment, instead of ours."""

    # --- output ---
    videos_per_task: int = 1
    """Episodes per task, from the first on, that are recorded (of the first seed)."""
    output_dir: Path | None = None
    """Where the result and the videos are written; runs/eval_<policy>_<suite> if not given, where
    the policy is named by its checkpoint's folder (behind the run's, of a checkpoint of a trainer),
    the file or module of --policy, or the server's host and port."""
    resume: bool = False
    """Go on with the evaluation in that folder, if there is one; give the same arguments."""

    @cached_property
    def played_suite(self) -> str:
        """The suite that is played; raises ValueError if neither `suite` nor the checkpoint says it."""
        checkpoints = () if self.checkpoint is None else (self.checkpoint,)
        return suite_to_play(self.suite, *checkpoints)

    @property
    def folder(self) -> Path:
        """Where the result and the videos are written."""
        if self.output_dir is not None:
            return self.output_dir
        return Path("runs") / f"eval_{policy_name(self)}_{self.played_suite}"


def policy_name(args: Args) -> str:
    """Returns what names the policy in the name of a folder."""
    if args.policy_server is not None:
        name = server_name(args.policy_server)
    elif args.policy is not None:
        place = args.policy.rpartition(":")[0]
        name = Path(place).stem if place.endswith(".py") else place
    else:
        name = checkpoint_name(str(args.checkpoint))
    return re.sub(r"[^\w.-]+", "_", name)


def checkpoint_name(checkpoint: str) -> str:
    """Returns the name of a checkpoint's folder, behind that of the run in which a trainer saved it."""
    if not Path(checkpoint).is_dir():  # a preset's name, or a hub id
        return checkpoint.rpartition("/")[2]
    folder = Path(checkpoint).resolve()
    if not CHECKPOINT_NAME.fullmatch(folder.name):
        return folder.name
    is_in_run = folder.parent.name == "checkpoints"
    run = folder.parents[1] if is_in_run else folder.parent
    return f"{run.name}_{folder.name}"


def check_args(args: Args) -> None:
    """Raises ValueError or OSError for arguments that would otherwise fail late."""
    check_ranges(args)
    check_source(args)
    check_output_folder("output_dir", args.folder)
    check_evaluation_folder(args.folder, resume=args.resume)
    if args.base_model is not None:
        check_folder("base_model", args.base_model, "give that of the policy that is steered")
    if not args.steps_before_success:
        check_left_out(args, ("num_near_goal_states",), NOT_NEAR_GOAL)
    check_reference_env(args)
    check_starts(replace(args, suite=args.played_suite))
    jobs = evaluation_jobs(
        args.played_suite, args.task_ids, args.episodes_per_task, args.init_states
    )
    episode_keys(args.seeds, jobs)
    if args.videos_per_task > args.episodes_per_task:
        raise ValueError(
            f"videos_per_task={args.videos_per_task} is more than episodes_per_task="
            f"{args.episodes_per_task}, and only episodes that are played are recorded (valid: "
            f"0-{args.episodes_per_task})"
        )


def check_reference_env(args: Args) -> None:
    """Raises ValueError for what LIBERO's own environment has not, if it is to be taken."""
    if not args.reference_env:
        return
    from algorithms.common.reference_env import check_reference_renderer  # MuJoCo takes a second

    check_reference_renderer(args.renderer)
    if args.steps_before_success:
        raise ValueError(
            "steps_before_success sets the state of our environment, and reference_env=True is "
            "LIBERO's own; leave one of them out"
        )
    if args.texture_colorspace is not None:
        raise ValueError(
            f"texture_colorspace={args.texture_colorspace!r} is a choice of our environment, and "
            "reference_env=True is LIBERO's own, which looks as the installed MuJoCo draws; leave "
            "one of them out"
        )


def check_source(args: Args) -> None:
    """Raises ValueError or FileNotFoundError unless exactly one policy is named, with its settings."""
    sources = {name: getattr(args, name) for name in ("checkpoint", "policy", "policy_server")}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            "give one of --checkpoint, --policy and --policy-server "
            f"(given: {', '.join(given) or 'none'})"
        )
    if args.policy_server is None:
        why = f"with --{given[0]} there is no server to wait for"
        check_left_out(args, ("policy_timeout",), why)
    if args.checkpoint is not None:
        if args.checkpoint not in get_args(PresetName):
            hint = "for example checkpoints/libero_spatial_rl"
            check_folder("checkpoint", args.checkpoint, hint)
        return
    for name in ("base_model", "denoising_steps", "compute_dtype", "device"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(
                f"{name}={value!r} is a setting of --checkpoint, and {given[0]} has its own; leave it out"
            )
    if args.policy is not None:
        policy_file(args.policy)
    if args.policy_server is not None:
        check_address(args.policy_server)


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, None, check_args) if __name__ == "__main__" else None

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from rich.console import Console

from algorithms.common.episode_log import OTHERWISE, EpisodeLog, EvalEpisode
from algorithms.common.evaluation import EvalResult, appearance_of, evaluate
from algorithms.common.policies import (
    ChunkSource,
    FirstSteps,
    OwnPolicy,
    TemporalEnsemble,
    WholeChunks,
)
from algorithms.common.policy_clients import connect
from algorithms.common.processes import check_alone
from algorithms.common.reference_env import ReferenceVectorEnv
from algorithms.common.report import write_report
from algorithms.common.run import lock, unlock
from algorithms.common.state_agent import StateFlowAgent, is_state_agent
from algorithms.common.steering import (
    WEIGHTS_FILE,
    SteeredAgent,
    file_digest,
    is_noise_actor,
    load_steered,
    weights_digest,
)
from gr00t_agent import Gr00tAgent
from gr00t_agent.weights import to_device
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.near_goal import NearGoalVectorEnv
from libero_gym.tasks.suites import get_task

# Environment steps per decision of a policy behind a server: openpi's LIBERO client replans so often.
SERVER_ACTION_CHUNKS = 5


# --- policy and environments ---


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy that is evaluated.

    Attributes:
        agent: decides, as `evaluate` takes it.
        num_action_chunks: environment steps per decision.
        image_size: height and width of the cameras, pixels.
        protocol: what it is, and how it is used.
    """

    agent: Any
    num_action_chunks: int
    image_size: int
    protocol: dict[str, Any]


def make_candidate(args: Args, resources: ExitStack) -> Candidate:
    """Returns the policy that the arguments name.

    Args:
        args: the arguments.
        resources: closes the connection to a server.

    Raises:
        FileNotFoundError: it is not there.
        ConnectionError: its server is not there.
        ValueError: its device is not there, it goes with other arguments, or lacks something of a policy.
    """
    if args.policy is not None:
        return own_candidate(args, args.policy)
    if args.policy_server is not None:
        return server_candidate(args, args.policy_server, resources)
    if is_state_agent(str(args.checkpoint)):
        return state_candidate(args, str(args.checkpoint))
    return checkpoint_candidate(args)


def checkpoint_candidate(args: Args) -> Candidate:
    """Returns the policy of a checkpoint."""
    agent = load_policy(args)
    policy = agent.policy
    what: dict[str, Any] = {"checkpoint": args.checkpoint}
    if isinstance(agent, SteeredAgent):
        what["noise_actor_sha256"] = file_digest(Path(str(args.checkpoint)) / WEIGHTS_FILE)
        what["base_model"] = agent.model
        what["weights_sha256"] = weights_digest(agent.model)
    else:
        what["weights_sha256"] = weights_digest(str(args.checkpoint))
    settings = {
        "num_action_chunks": policy.num_action_chunks,
        "denoising_steps": policy.denoising_steps,
        "compute_dtype": policy.compute_dtype,
        "padding": policy.padding,
        "round_to_bf16": policy.round_to_bf16,
    }
    if args.temporal_ensemble is None:
        chunks, decides = policy.num_action_chunks, agent
    elif isinstance(agent, SteeredAgent):
        raise ValueError(
            f"temporal_ensemble={args.temporal_ensemble} averages whole chunks, and {args.checkpoint} "
            "decides the noise of the steps that are executed alone; leave it out"
        )
    else:
        chunks = args.num_action_chunks or 1
        decides = TemporalEnsemble(WholeChunks(agent), chunks, args.temporal_ensemble)
        settings |= {"num_action_chunks": chunks, "temporal_ensemble": args.temporal_ensemble}
    return Candidate(
        agent=decides,
        num_action_chunks=chunks,
        image_size=agent.image_size,
        protocol=what | {"policy": settings},
    )


def state_candidate(args: Args, checkpoint: str) -> Candidate:
    """Returns the policy of a checkpoint of --model state."""
    for name in ("base_model", "num_action_chunks", "temporal_ensemble", "compute_dtype"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(
                f"{name}={value!r} is nothing that the policy on the robot's state in {checkpoint} "
                "can change; leave it out"
            )
    agent = StateFlowAgent.from_pretrained(checkpoint, denoising_steps=args.denoising_steps)
    settings = {
        "num_action_chunks": agent.config.num_action_chunks,
        "denoising_steps": agent.config.denoising_steps,
    }
    return Candidate(
        agent=agent.to(policy_device(args)).eval(),
        num_action_chunks=agent.config.num_action_chunks,
        image_size=agent.image_size,
        protocol={
            "checkpoint": checkpoint,
            "weights_sha256": weights_digest(checkpoint),
            "policy": settings,
        },
    )


def own_candidate(args: Args, name: str) -> Candidate:
    """Returns a policy of one's own."""
    chunks = 1 if args.temporal_ensemble is not None else None
    source = OwnPolicy(name, args.num_action_chunks or chunks)
    what = {"own_policy": name, "file_sha256": file_digest(policy_file(name))}
    return chunked(args, source, source.num_action_chunks, source.image_size, what)


def server_candidate(args: Args, address: str, resources: ExitStack) -> Candidate:
    """Returns a policy whose server decides."""
    default = 1 if args.temporal_ensemble is not None else SERVER_ACTION_CHUNKS
    chunks = args.num_action_chunks or default
    source = connect(address, chunks, timeout_s=args.policy_timeout)
    resources.enter_context(closing(source))
    what = {"policy_server": address, "server": source.description}
    return chunked(args, source, chunks, source.image_size, what)


def chunked(
    args: Args, source: ChunkSource, num_action_chunks: int, image_size: int, what: dict[str, Any]
) -> Candidate:
    """Returns a source of whole chunks as it is executed."""
    settings: dict[str, Any] = {"num_action_chunks": num_action_chunks}
    if args.temporal_ensemble is None:
        agent = FirstSteps(source, num_action_chunks)
    else:
        agent = TemporalEnsemble(source, num_action_chunks, args.temporal_ensemble)
        settings["temporal_ensemble"] = args.temporal_ensemble
    return Candidate(
        agent=agent,
        num_action_chunks=num_action_chunks,
        image_size=image_size,
        protocol=what | {"policy": settings, "sampling": "the policy's own"},
    )


def policy_device(args: Args) -> str:
    """Returns the torch device of a checkpoint's policy; raises ValueError if it cannot be used."""
    return str(to_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def load_policy(args: Args) -> Gr00tAgent | SteeredAgent:
    """Returns the policy of a checkpoint on its device: an agent, or one that is steered by its noise.

    Raises:
        FileNotFoundError: there is no such checkpoint, or not the policy that it steers.
        ValueError: `base_model` is given for a checkpoint that steers none, or has other weights.
    """
    device = policy_device(args)
    settings: dict[str, Any] = dict(
        num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps,
        compute_dtype=args.compute_dtype,
    )
    checkpoint = str(args.checkpoint)
    if is_noise_actor(checkpoint):
        return load_steered(checkpoint, base_model=args.base_model, device=device, **settings)
    if args.base_model is not None:
        raise ValueError(
            f"base_model={args.base_model!r} goes with a checkpoint of dsrl_gr00t.py, and "
            f"{checkpoint} is none; leave it out, or give such a checkpoint"
        )
    return Gr00tAgent.load(checkpoint, **settings).to(device).eval()


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
        return ModalityVectorObservation(ReferenceVectorEnv(args.played_suite, num_envs, **options))
    envs = gym.make_vec(
        f"libero_gym/{args.played_suite}-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.DISABLED,
        texture_colorspace=args.texture_colorspace or "linear",
        **options,
    )
    if args.steps_before_success:
        envs = NearGoalVectorEnv(
            envs,
            steps_before_success=args.steps_before_success,
            num_init_states=args.num_near_goal_states,
        )
    return ModalityVectorObservation(envs)


# --- protocol ---


def make_protocol(
    args: Args, candidate: Candidate, envs: gym.vector.VectorEnv, jobs: Sequence[Job]
) -> dict[str, Any]:
    """Returns all that decides the outcomes, apart from package versions and hardware."""
    near_goal = {
        "steps_before_success": list(args.steps_before_success),
        "num_near_goal_states": args.num_near_goal_states,
    }
    starts = near_goal if args.steps_before_success else {}
    return (
        candidate.protocol
        | starts
        | appearance_of(envs)
        | {
            "suite": args.played_suite,
            "task_ids": sorted({task_id for task_id, _ in jobs}),
            "episodes_per_task": args.episodes_per_task,
            "seeds": list(args.seeds),
            "horizon": stated_horizon(args.played_suite, args.horizon),
            "environment": "LIBERO" if args.reference_env else "libero_gym",
            "init_states": check_init_states(args.init_states, args.played_suite),
            "image_size": candidate.image_size,
            "num_envs": envs.num_envs,
        }
    )


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
    jobs = evaluation_jobs(
        args.played_suite, args.task_ids, args.episodes_per_task, args.init_states
    )
    num_episodes = len(episode_keys(args.seeds, jobs))
    num_envs = min(args.num_envs, num_episodes)
    folder = args.folder
    policy = args.checkpoint or args.policy or args.policy_server
    reason = ", which it was trained on" if args.suite is None else ""
    print(f"{policy} plays {num_episodes} episodes of {args.played_suite}{reason}")

    with ExitStack() as resources:
        resources.callback(unlock, folder)
        # That it is in use is told at once; a new one is made, and locked, by the log.
        if folder.is_dir():
            lock(folder, OTHERWISE)

        # --- policy and environments ---
        set_seed(args.seeds[0])  # a preset's random weights
        candidate = make_candidate(args, resources)
        chunks, image_size = candidate.num_action_chunks, candidate.image_size
        envs = resources.enter_context(closing(make_envs(args, num_envs, chunks, image_size)))

        # --- evaluate ---
        protocol = make_protocol(args, candidate, envs, jobs)
        log = ShownEpisodeLog(folder, protocol, resume=args.resume, total=num_episodes)
        result = evaluate(
            candidate.agent,
            envs,
            jobs,
            seed=args.seeds,
            record=lambda _, init_state_id: init_state_id < args.videos_per_task,
            video_dir=folder / "videos",
            log=log,
        )

        # --- result and report ---
        task_ids = protocol["task_ids"]
        texts = {task_id: get_task(args.played_suite, task_id).language for task_id in task_ids}
        before = {"before_s": log.seconds_before} if log.seconds_before else {}
        result = replace(
            result,
            protocol=result.protocol | protocol,
            task_descriptions=texts,
            seconds=log.seconds_before + result.seconds,
            timing=before | result.timing,
        )
        result.save(folder / "result.json")
        report_path = write_report(folder)

    result.print_table()
    phases = [f"{name.removesuffix('_s')} {s:.1f} s" for name, s in result.timing.items()]
    for name, shown in (
        ("time", "  ".join(phases)),
        ("result", folder / "result.json"),
        ("report", report_path),
    ):
        log.console.print(f"{name:7} {shown}", highlight=False, soft_wrap=True)
    return result


if ARGS is not None:
    launch(main, ARGS)
