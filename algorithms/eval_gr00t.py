"""Success rate of a policy on a LIBERO suite.

Protocol: every chosen task from each of its first `episodes_per_task` stored initial states, exactly once per seed
(10 x 50 = 500 episodes for a whole suite and one seed); deterministic Euler sampling from an initial noise that
depends on nothing but (seed, task, initial state); `success_once`, that is success at any step before the suite's
horizon; Wilson 95 % intervals. Any suite that is installed, LIBERO-PRO's included; settings of the policy that are not
given are those saved with the checkpoint. An exception ends the evaluation: it never counts as a failed episode.

    python algorithms/eval_gr00t.py --checkpoint runs/demo/checkpoints/iteration_3 --suite libero_spatial
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --seeds 0 1 2 --num-envs 50
    python algorithms/eval_gr00t.py --checkpoint my/checkpoint --suite libero_goal --reference-env --renderer osmesa

Writes result.json (the protocol, the tables, every episode), one video per task and one of all, and report.html with
all of that. Episodes are also written as they end, and the same command with --resume goes on after an interruption:
on the same kind of machine its outcome is that of an uninterrupted evaluation. --reference-env runs the policy in
LIBERO's own environment instead of ours.

Episodes stream through `num_envs` environments: one that ends is replaced at once. All environments' rows go through
the network in every decision, those that have no episode left included: so the batch, and with it the rounding of the
others' actions, does not depend on what has ended.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import gymnasium as gym
import numpy as np
import torch
import tyro
from accelerate.utils import set_seed
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from algorithms.common.episode_log import EpisodeLog, EpisodeStore, EvalEpisode
from algorithms.common.episodes import wilson_interval
from algorithms.common.reference_env import ReferenceVectorEnv
from algorithms.common.report import write_report
from algorithms.common.run_folder import describe_environment, write_json
from algorithms.common.video import CONTROL_FREQUENCY_HZ, TASK_KEY, Frame, frame_of, tile_videos, write_video
from gr00t_agent import Gr00tAgent
from gr00t_agent.checkpoint import resolve_checkpoint
from gr00t_agent.config import PresetName
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.physics.simulation import InitStates, check_init_states, count_init_states
from libero_gym.tasks.suites import get_task, horizon, list_tasks


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- what is evaluated ---
    checkpoint: str
    """A folder or hub id that `Gr00tAgent.from_pretrained` loads, or a preset's name (random weights)."""
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Torch device of the policy."""

    # --- environment ---
    num_envs: int = 10
    """Environments that the episodes stream through."""
    horizon: int | None = None
    """Environment steps before an episode counts as failed; the suite's own if not given."""
    init_states: InitStates | None = None
    """Stored initial states as they came to rest under MuJoCo 3.3, states that are none of the stored ones (held_out,
    libero_spatial), or the stored ones as LIBERO has them, to settle under the installed version; settled if not given,
    where the suite has them."""
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


class SeededEnvs(Protocol):
    """The part of a vector environment that an evaluation needs; each of the environments takes its own seed."""

    def reset(self, *, seed: Sequence[int], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts episodes where `options["reset_mask"]` says so."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Episodes of an evaluation, in the order (seed, task, initial state), with the protocol that made them.

    Attributes:
        protocol: what decides the outcomes.
        task_descriptions: instruction by task id.
        episodes: all of them.
        seconds: time that this process took; without what a resumed evaluation did before.
        timing: those seconds by phase: predict, step, reset and other.
        videos: files.
    """

    protocol: dict[str, Any]
    task_descriptions: dict[int, str]
    episodes: list[EvalEpisode]
    seconds: float
    timing: dict[str, float] = field(default_factory=dict)
    videos: list[Path] = field(default_factory=list)

    @property
    def success_rate(self) -> float:
        """Fraction of all episodes that succeeded."""
        return sum(e.success for e in self.episodes) / len(self.episodes)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row per task and one for all: successes, episodes, rate and Wilson 95 % interval.

        With several seeds the episodes of all count as independent.
        """
        rows = [
            dict(task=str(i), description=text) | _rate([e for e in self.episodes if e.task_id == i])
            for i, text in self.task_descriptions.items()
        ]
        return [*rows, dict(task="all", description="all tasks") | _rate(self.episodes)]

    def seed_rows(self) -> list[dict[str, Any]]:
        """Returns a row per seed over all tasks: successes, episodes, rate and Wilson 95 % interval."""
        seeds = sorted({e.seed for e in self.episodes})
        return [dict(seed=seed) | _rate([e for e in self.episodes if e.seed == seed]) for seed in seeds]

    def save(self, path: Path) -> None:
        """Writes the protocol, the tables and every episode as JSON."""
        content = dict(
            protocol=self.protocol, success_once=self.success_rate, table=self.rows(), seeds=self.seed_rows(),
            seconds=self.seconds, timing=self.timing, episodes=[asdict(e) for e in self.episodes],
            environment=describe_environment(),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def print_table(self) -> None:
        """Prints the tables to the terminal."""
        table = Table("task", "instruction", "success", "rate", "95 % interval")
        seed_rows = self.seed_rows()
        for row in self.rows():
            table.add_row(row["task"], row["description"], *_cells(row), end_section=row["task"] == "all")
        for row in seed_rows if len(seed_rows) > 1 else ():
            table.add_row("all", f"seed {row['seed']}", *_cells(row))
        Console().print(table)


def _rate(episodes: Sequence[EvalEpisode]) -> dict[str, Any]:
    successes = sum(e.success for e in episodes)
    low, high = wilson_interval(successes, len(episodes))
    return dict(
        successes=successes, episodes=len(episodes), success_rate=successes / len(episodes), low=low, high=high
    )  # fmt: skip


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    interval = f"{row['low']:.1%} - {row['high']:.1%}"
    return f"{row['successes']}/{row['episodes']}", f"{row['success_rate']:.1%}", interval


def episode_generator(seed: int, task_id: int, init_state_id: int) -> torch.Generator:
    """Returns the generator of one episode's noise; it depends on nothing but the arguments."""
    state = np.random.SeedSequence((seed, task_id, init_state_id)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def episode_keys(seeds: Sequence[int], jobs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Returns (seed, task id, initial state id) of every episode; raises ValueError if one is asked for twice."""
    keys = [(seed, *job) for seed in seeds for job in jobs]
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"(seed, task, initial state) {repeated[:3]} are asked for twice, but an episode counts once")
    return keys


@dataclass(eq=False)
class _Slot:
    """What one of the environments is doing.

    Attributes:
        key: (seed, task id, initial state id) of its episode; None once no episode is left.
        generator: the episode's noise.
        num_waits: decisions for which an episode that is known already keeps the slot, nothing being run.
        frames: what is recorded of the episode; None if nothing is.
    """

    key: tuple[int, int, int] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    num_waits: int = 0
    frames: list[Frame] | None = None

    @property
    def is_acting(self) -> bool:
        """True while its environment runs an episode."""
        return self.key is not None and self.num_waits == 0


@torch.no_grad()
def evaluate(
    agent: Any,
    envs: gym.vector.VectorEnv,
    jobs: Sequence[tuple[int, int]],
    *,
    seed: int | Sequence[int],
    record: Callable[[int, int], bool] = lambda task_id, init_state_id: True,
    video_dir: Path | None = None,
    log: EpisodeStore | None = None,
) -> EvalResult:
    """Runs every (task id, initial state id) of `jobs` once for each seed and returns the outcomes.

    Args:
        agent: `predict(obs, generator=[...])` gives an action chunk [N, C, 7] for N observations.
        envs: environments with autoreset disabled and GR00T's modality keys.
        jobs: the episodes.
        seed: seed, or several, of the noise and of the environments.
        record: which episodes of the first seed to record, as (task id, initial state id).
        video_dir: folder of their videos; None records none.
        log: given each episode as it ends. Those that it holds already are not run again, but keep the places in the
            batch that they had: so the others get the places, and the actions, that they would get in one go.

    Raises:
        ValueError: there are no jobs or one is asked for twice, autoreset is not disabled, or `log` holds an episode
            that is not asked for.
    """
    if not jobs:
        raise ValueError("jobs is empty: ask for at least one task and one initial state")
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError(
            f"autoreset_mode={envs.metadata.get('autoreset_mode')} would restart episodes that the protocol does not "
            "ask for: make the environments with autoreset_mode=AutoresetMode.DISABLED"
        )
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    keys = episode_keys(seeds, jobs)
    episodes = [] if log is None else list(log.episodes)
    known = {episode.key: episode for episode in episodes}
    if foreign := sorted(set(known) - set(keys)):
        raise ValueError(f"log holds (seed, task, initial state) {foreign[:3]}, which are not among the jobs")
    start = time.perf_counter()
    timing = dict.fromkeys(("predict_s", "step_s", "reset_s"), 0.0)
    num_envs = envs.num_envs
    shape = (envs.action_space.shape or ())[1:]  # [C, 7], or [7] for C = 1
    chunk_length = shape[0] if len(shape) == 2 else 1
    queue = iter(keys)
    slots = [_Slot() for _ in range(num_envs)]
    descriptions: dict[int, str] = {}
    obs: dict[str, Any] = {}

    def is_recorded(key: tuple[int, int, int]) -> bool:
        return video_dir is not None and key[0] == seeds[0] and record(*key[1:])

    def fill(slot: _Slot) -> None:
        """Gives a free slot the next episode."""
        slot.key, slot.frames = next(queue, None), None
        if slot.key in known:
            slot.num_waits = -(-known[slot.key].length // chunk_length)
        elif slot.key is not None:
            slot.generator = episode_generator(*slot.key)
            slot.frames = [] if is_recorded(slot.key) else None

    def reset(starting: list[int]) -> None:
        nonlocal obs
        # The first reset has to reach every environment, also those that have nothing to do.
        mask = np.isin(np.arange(num_envs), starting) if obs else np.ones(num_envs, dtype=bool)
        chosen = [slot.key or keys[0] for slot in slots]
        options = {
            "reset_mask": mask,
            "task_id": np.array([key[1] for key in chosen]),
            "init_state_id": np.array([key[2] for key in chosen]),
        }
        env_seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in chosen]
        obs, _ = cast(SeededEnvs, envs).reset(seed=env_seeds, options=options)
        for i in starting:
            slot = slots[i]
            assert slot.key is not None
            descriptions[slot.key[1]] = str(obs[TASK_KEY][i])
            if slot.frames is not None:
                slot.frames.append(frame_of(obs, i, step=0, reward=0.0, success=False))

    def finish(slot: _Slot, *, success: bool, length: int) -> None:
        assert slot.key is not None
        names = dict(zip(("seed", "task_id", "init_state_id"), slot.key, strict=True))
        episode = EvalEpisode(**names, success=success, length=length)
        if slot.frames is not None and video_dir is not None:
            write_video(video_path(video_dir, episode), slot.frames, fps=CONTROL_FREQUENCY_HZ / chunk_length)
        episodes.append(episode)
        if log is not None:
            log.append(episode)

    free = list(range(num_envs))
    while True:
        for i in free:
            fill(slots[i])
        if starting := [i for i in free if slots[i].is_acting]:
            reset_start = time.perf_counter()
            reset(starting)
            timing["reset_s"] += time.perf_counter() - reset_start
        acting = [i for i, slot in enumerate(slots) if slot.is_acting]
        waiting = [i for i, slot in enumerate(slots) if slot.num_waits > 0]
        if not acting and not waiting:
            break
        free = []
        for i in waiting:
            slots[i].num_waits -= 1
            if slots[i].num_waits == 0:
                free.append(i)
        if not acting:
            continue
        predict_start = time.perf_counter()
        chunk = agent.predict(obs, generator=[slot.generator for slot in slots])
        predicted: NDArray[np.float32] = chunk.cpu().numpy().reshape(num_envs, *shape)
        step_start = time.perf_counter()
        actions = np.zeros_like(predicted)
        actions[acting] = predicted[acting]
        obs, _, terminated, truncated, infos = envs.step(actions)
        timing["predict_s"] += step_start - predict_start
        timing["step_s"] += time.perf_counter() - step_start
        for i in acting:
            slot, ended = slots[i], bool(terminated[i] or truncated[i])
            success, length = bool(infos["success"][i]), int(infos["episode_length"][i])
            if slot.frames is not None:
                episode_return = float(infos["episode_return"][i])
                slot.frames.append(
                    frame_of(obs, i, step=length, reward=episode_return, success=success, ended=ended)
                )  # fmt: skip
            if ended:
                finish(slot, success=success, length=length)
                free.append(i)
        free.sort()
    episodes.sort(key=lambda e: e.key)
    files = [video_path(video_dir, e) for e in episodes if video_dir is not None and is_recorded(e.key)]
    seconds = time.perf_counter() - start
    protocol = dict(
        seeds=list(seeds), num_episodes=len(keys), metric="success_once", sampling="deterministic Euler",
        num_envs=num_envs,
    )  # fmt: skip
    return EvalResult(
        protocol=protocol, task_descriptions=dict(sorted(descriptions.items())), episodes=episodes, seconds=seconds,
        videos=[path for path in files if path.is_file()], timing=timing | {"other_s": seconds - sum(timing.values())},
    )  # fmt: skip


def video_path(folder: Path, episode: EvalEpisode) -> Path:
    """Returns the file of an episode's video."""
    outcome = "success" if episode.success else "failure"
    return folder / f"task_{episode.task_id}_state_{episode.init_state_id}_{outcome}.mp4"


def evaluation_jobs(
    suite: str, task_ids: tuple[int, ...] | None, episodes_per_task: int, init_states: InitStates | None = None
) -> list[tuple[int, int]]:
    """Returns (task id, initial state id) of every episode of the protocol; None is the suite's default kind of states.

    Raises:
        ValueError: if a task is not in the suite or has fewer initial states.
        FileNotFoundError: if the suite has no initial states of this kind.
    """
    kind = check_init_states(init_states, suite)
    tasks = [get_task(suite, i) for i in task_ids] if task_ids is not None else list_tasks(suite)
    for task in tasks:
        stored = count_init_states(task, kind)
        if not 1 <= episodes_per_task <= stored:
            raise ValueError(
                f"episodes_per_task={episodes_per_task} is not possible for task {task.task_id} of {suite}, "
                f"which stores {stored} initial states (valid: 1-{stored})"
            )
    return [(task.task_id, state) for task in tasks for state in range(episodes_per_task)]


def stored_starts(suite: str, task_ids: Sequence[int] | None) -> list[tuple[int, int]]:
    """Returns (task id, initial state id) of every stored initial state; tasks that are named twice are there twice."""
    kind = check_init_states(None, suite)
    tasks = [get_task(suite, i) for i in task_ids] if task_ids is not None else list_tasks(suite)
    return [(task.task_id, state) for task in tasks for state in range(count_init_states(task, kind))]


def jobs_in_training(args: Any) -> list[tuple[int, int]]:
    """Returns the episodes of `evaluate_into`, every task's once however often training names it; see
    `evaluation_jobs`.
    """
    task_ids = None if args.task_ids is None else tuple(dict.fromkeys(args.task_ids))
    return evaluation_jobs(args.suite, task_ids, args.eval_episodes_per_task)


def evaluation_file(run_path: Path, iteration: int) -> Path:
    """Returns where a run keeps the evaluation after `iteration`."""
    return run_path / "evaluations" / f"iteration_{iteration}.json"


def evaluate_into(
    run_path: Path, iteration: int, agent: Any, make_envs: Callable[[int], gym.vector.VectorEnv], args: Any
) -> float:
    """Evaluates an agent in training; leaves the JSON, a video per task and one of all in the run's folder.

    Args:
        run_path: the run's folder.
        iteration: names the files.
        agent: the agent.
        make_envs: makes so many environments with autoreset disabled.
        args: a trainer's arguments; it decides the simulation too (physics, stepping, renderer), as the JSON says.

    Returns:
        The success rate.
    """
    jobs = jobs_in_training(args)
    name = f"iteration_{iteration}"
    video_dir = run_path / "videos" / name
    with closing(make_envs(min(args.num_envs, len(jobs)))) as envs:
        result = evaluate(agent, envs, jobs, seed=args.seed, record=lambda _, state: state == 0, video_dir=video_dir)
    shared = ("renderer", "physics", "stepping")
    result.protocol.update(
        suite=args.suite, horizon=args.horizon or horizon(args.suite), task_ids=sorted({task for task, _ in jobs}),
        episodes_per_task=args.eval_episodes_per_task, init_states=check_init_states(None, args.suite),
        image_size=agent.image_size, **{name: getattr(args, name) for name in shared if hasattr(args, name)},
    )  # fmt: skip
    result.save(evaluation_file(run_path, iteration))
    tile_videos(video_dir / "all_tasks.mp4", result.videos)
    result.print_table()
    return result.success_rate


def weights_digest(checkpoint: str) -> str | None:
    """Returns a SHA-256 over a checkpoint's weight files, which tells exactly what was evaluated; None for a preset."""
    if checkpoint in get_args(PresetName):
        return None
    total = hashlib.sha256()
    for path in sorted(resolve_checkpoint(checkpoint).glob("model*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def make_envs(args: Args, num_envs: int, num_action_chunks: int, image_size: int) -> ModalityVectorObservation:
    """Returns the environments that `args` ask for, ours or LIBERO's own, with GR00T's modality keys."""
    options: dict[str, Any] = dict(
        num_action_chunks=num_action_chunks, image_size=image_size, horizon=args.horizon, renderer=args.renderer,
        init_states=args.init_states,
    )  # fmt: skip
    if args.reference_env:
        return ModalityVectorObservation(ReferenceVectorEnv(args.suite, num_envs, **options))
    envs = gym.make_vec(
        f"libero_gym/{args.suite}-v0", num_envs=num_envs, vectorization_mode="vector_entry_point",
        autoreset_mode=AutoresetMode.DISABLED, **options,
    )  # fmt: skip
    return ModalityVectorObservation(envs)


def make_protocol(
    args: Args, agent: Gr00tAgent, envs: gym.vector.VectorEnv, jobs: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Returns all that decides the outcomes, apart from package versions and hardware."""
    policy_fields = ("num_action_chunks", "denoising_steps", "compute_dtype", "padding", "round_to_bf16")
    return dict(
        suite=args.suite, task_ids=sorted({task for task, _ in jobs}), episodes_per_task=args.episodes_per_task,
        seeds=list(args.seeds), horizon=args.horizon or horizon(args.suite),
        environment="LIBERO" if args.reference_env else "libero_gym",
        init_states=check_init_states(args.init_states, args.suite),
        renderer=cast(Any, envs.unwrapped).renderer_name,
        texture_colorspace=cast(Any, envs.unwrapped).texture_colorspace,
        image_size=agent.image_size, num_envs=envs.num_envs,
        checkpoint=args.checkpoint, weights_sha256=weights_digest(args.checkpoint),
        policy={name: getattr(agent.policy, name) for name in policy_fields},
    )  # fmt: skip


class ShownEpisodeLog(EpisodeLog):
    """A log that tells each episode on the terminal, with the rate so far and the time left of `total` episodes."""

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
        count, elapsed = len(self.episodes), time.perf_counter() - self._start
        left_s = elapsed / (count - self._num_known) * (self._total - count)
        self.console.print(
            f"{count}/{self._total}  seed {episode.seed} task {episode.task_id} state {episode.init_state_id}: "
            f"{'success' if episode.success else 'failure'} after {episode.length} steps   "
            f"success so far {np.mean([e.success for e in self.episodes]):.1%}   left {left_s:.0f} s",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def main(args: Args) -> EvalResult:
    """Evaluates, prints the tables, writes result.json and videos."""
    set_seed(args.seeds[0])  # a preset's random weights
    agent = Gr00tAgent.load(
        args.checkpoint, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps,
        compute_dtype=args.compute_dtype,
    )  # fmt: skip
    agent = agent.to(args.device).eval()
    jobs = evaluation_jobs(args.suite, args.task_ids, args.episodes_per_task, args.init_states)
    total, video_dir = len(episode_keys(args.seeds, jobs)), args.output_dir / "videos"
    with closing(make_envs(args, min(args.num_envs, total), agent.policy.num_action_chunks, agent.image_size)) as envs:
        protocol = make_protocol(args, agent, envs, jobs)
        log = ShownEpisodeLog(args.output_dir, protocol, resume=args.resume, total=total)
        result = evaluate(
            agent, envs, jobs, seed=args.seeds, record=lambda _, state: state < args.videos_per_task,
            video_dir=video_dir, log=log,
        )  # fmt: skip
    texts = {task: get_task(args.suite, task).language for task in protocol["task_ids"]}
    result = replace(result, protocol=result.protocol | protocol, task_descriptions=texts)
    result.save(args.output_dir / "result.json")
    if first_states := [path for path in result.videos if "_state_0_" in path.name]:
        tile_videos(args.output_dir / "videos" / "all_tasks.mp4", first_states)
    report_path = write_report(args.output_dir)
    result.print_table()
    phases = "  ".join(f"{name.removesuffix('_s')} {seconds:.1f} s" for name, seconds in result.timing.items())
    for name, shown in (("time", phases), ("result", args.output_dir / "result.json"), ("report", report_path)):
        log.console.print(f"{name:7} {shown}", highlight=False, soft_wrap=True)
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
