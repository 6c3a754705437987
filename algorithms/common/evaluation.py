"""Success rates of a policy: which episodes, how they stream through environments, what is made of the outcomes.

Protocol: every chosen task from each of its first stored initial states, exactly once per seed; deterministic sampling
from an initial noise that depends on nothing but (seed, task, initial state); `success_once`, that is success at any
step before the horizon; Wilson 95 % intervals. An exception ends the evaluation: it never counts as a failed episode.

Episodes stream through the environments: one that ends is replaced at once. All environments' rows go through the
network in every decision, those that have no episode left included: so the batch, and with it the rounding of the
others' actions, does not depend on what has ended.

Jobs and keys are those of `algorithms.common.jobs`. Shape legend: N environments, C steps of an action chunk.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from algorithms.common.episode_log import EpisodeStore, EvalEpisode
from algorithms.common.episodes import clustered_interval
from algorithms.common.jobs import Job, Key, episode_keys, jobs_in_training, stated_horizon
from algorithms.common.provenance import describe_environment
from algorithms.common.randomness import EVALUATIONS, seed_of
from algorithms.common.video import (
    TASK_KEY,
    Frame,
    Picture,
    frame_of,
    picture_of,
    read_pictures,
    titled,
    write_tiled_video,
    write_video,
)
from gr00t_agent.files import read_json, write_json
from libero_gym.conventions import CONTROL_FREQUENCY_HZ
from libero_gym.near_goal import near_goal_start
from libero_gym.tasks.initial_states import check_init_states

# Seconds between lines that tell how far an evaluation is.
TOLD_EVERY_S = 5.0
# Beside the videos of single episodes.
OVERVIEW = "all_tasks.mp4"


# --- what comes out ---


def episode_generator(seed: int, task_id: int, init_state_id: int) -> torch.Generator:
    """Returns the generator of one episode's noise; it depends on nothing but the arguments."""
    state = np.random.SeedSequence((seed, task_id, init_state_id)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Episodes of an evaluation, in the order of their keys, with the protocol that made them.

    Attributes:
        protocol: what decides the outcomes.
        task_descriptions: instruction by task id.
        episodes: all of them.
        seconds: time that it took; of an evaluation that was resumed, with what it had taken before.
        timing: those seconds by phase: predict, step, reset and other, and if it was resumed what it had taken before.
        videos: files of single episodes.
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
        """Returns a row per task and one for all: successes, episodes, rate and 95 % interval.

        The interval is Wilson's, of fewer episodes the more alike those of one start end (`clustered_interval`): with
        several seeds, or near the goal, where episodes share their starts.
        """
        rows: list[dict[str, Any]] = []
        for task_id, description in self.task_descriptions.items():
            of_task = [e for e in self.episodes if e.task_id == task_id]
            rows.append(dict(task=str(task_id), description=description) | self._rate(of_task))
        return [*rows, dict(task="all", description="all tasks") | self._rate(self.episodes)]

    def seed_rows(self) -> list[dict[str, Any]]:
        """Returns a row per seed over all tasks: successes, episodes, rate and 95 % interval."""
        seeds = sorted({e.seed for e in self.episodes})
        return [dict(seed=seed) | self._rate([e for e in self.episodes if e.seed == seed]) for seed in seeds]

    def _rate(self, episodes: Sequence[EvalEpisode]) -> dict[str, Any]:
        of_starts: defaultdict[tuple[int, int], list[bool]] = defaultdict(list)
        for episode in episodes:
            of_starts[episode.task_id, self._start_of(episode)].append(episode.success)
        low, high = clustered_interval(list(of_starts.values()))
        successes, total = sum(e.success for e in episodes), len(episodes)
        return dict(successes=successes, episodes=total, success_rate=successes / total, low=low, high=high)

    def _start_of(self, episode: EvalEpisode) -> int:
        """Returns the number of an episode's start: its initial state, of which few stand for all near the goal."""
        steps = self.protocol.get("steps_before_success") or ()
        if not steps:
            return episode.init_state_id
        return near_goal_start(episode.init_state_id, self.protocol["num_near_goal_states"], steps)

    def save(self, path: Path) -> None:
        """Writes the protocol, the tables and every episode as JSON."""
        content = {
            "protocol": self.protocol,
            "success_once": self.success_rate,
            "table": self.rows(),
            "seeds": self.seed_rows(),
            "seconds": self.seconds,
            "timing": self.timing,
            "episodes": [asdict(e) for e in self.episodes],
            "environment": describe_environment(),
        }
        write_json(path, content)

    def print_table(self) -> None:
        """Prints the tables to the terminal."""
        table = Table("task", "instruction", "success", "rate", "95 % interval")
        for row in self.rows():
            table.add_row(row["task"], row["description"], *_cells(row), end_section=row["task"] == "all")
        seed_rows = self.seed_rows()
        if len(seed_rows) > 1:
            for row in seed_rows:
                table.add_row("all", f"seed {row['seed']}", *_cells(row))
        Console().print(table)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    interval = f"{row['low']:.1%} - {row['high']:.1%}"
    return f"{row['successes']}/{row['episodes']}", f"{row['success_rate']:.1%}", interval


# --- the stream of episodes ---


class SeededEnvs(Protocol):
    """The part of a vector environment that an evaluation needs; each environment takes its own seed."""

    def reset(self, *, seed: Sequence[int], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts episodes where `options["reset_mask"]` says so."""
        ...


@runtime_checkable
class EpisodicPolicy(Protocol):
    """What an agent has that remembers something of an episode, or that need not decide where there is none."""

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        """Episodes begin in these environments: the next decision is on their first observation."""
        ...

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        """The episodes of these environments are over: decisions for them are not executed until others begin."""
        ...


@dataclass(eq=False)
class _Slot:
    """What one of the environments is doing.

    Attributes:
        key: that of its episode; None once no episode is left.
        generator: the episode's noise.
        num_waits: decisions for which an episode that is known already keeps the slot, nothing being run.
        frames: what is recorded of the episode; None if nothing is.
    """

    key: Key | None = None
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
    jobs: Sequence[Job],
    *,
    seed: int | Sequence[int],
    record: Callable[[int, int], bool] = lambda task_id, init_state_id: True,
    video_dir: Path | None = None,
    log: EpisodeStore | None = None,
) -> EvalResult:
    """Runs every job once for each seed and returns the outcomes.

    Args:
        agent: `predict(obs, generator=[...])` gives an action chunk [N, C, 7] for N observations. An `EpisodicPolicy`
            is told of episodes. For one whose `looks_at_images` is False only what is recorded is drawn, where the
            environments can do so.
        envs: environments with autoreset disabled and GR00T's modality keys.
        jobs: the episodes.
        seed: seed, or several, of the noise and of the environments.
        record: which episodes of the first seed to record, as (task id, initial state id).
        video_dir: folder of their videos, one an episode, and in `OVERVIEW` those from each task's first initial state
            side by side; None records none.
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

    episodic = _episodic(agent)
    num_envs = envs.num_envs
    action_shape = (envs.action_space.shape or ())[1:]  # [C, 7], or [7] for C = 1
    chunk_length = action_shape[0] if len(action_shape) == 2 else 1
    fps = CONTROL_FREQUENCY_HZ / chunk_length
    recorded = {key for key in keys if key[0] == seeds[0] and record(*key[1:])} if video_dir else set()
    draw_only = None if getattr(agent, "looks_at_images", True) else getattr(envs.unwrapped, "draw_only", None)
    queue = iter(keys)
    slots = [_Slot() for _ in range(num_envs)]
    free = list(range(num_envs))
    films: dict[Key, list[Frame]] = {}
    descriptions: dict[int, str] = {}
    obs: dict[str, Any] = {}
    timing = dict.fromkeys(("predict_s", "step_s", "reset_s"), 0.0)
    start = time.perf_counter()

    while True:
        # Every free environment gets the next episode.
        for i in free:
            slot = slots[i]
            slot.key = next(queue, None)
            slot.frames = [] if slot.key in recorded and slot.key not in known else None
            if slot.key in known:
                slot.num_waits = -(-known[slot.key].length // chunk_length)
            elif slot.key is not None:
                slot.generator = episode_generator(*slot.key)
        starting = [i for i in free if slots[i].is_acting]
        if free and draw_only is not None:
            draw_only([i for i, slot in enumerate(slots) if slot.frames is not None])
        if starting:
            reset_start = time.perf_counter()
            # The first reset has to reach every environment, also those that have nothing to do.
            reset_ids = starting if obs else list(range(num_envs))
            obs = _reset(envs, [slot.key or keys[0] for slot in slots], reset_ids)
            for i in starting:
                slot = slots[i]
                if slot.key is not None:
                    descriptions[slot.key[1]] = str(obs[TASK_KEY][i])
                if slot.frames is not None:
                    slot.frames.append(frame_of(obs, i, step=0, reward=0.0, success=False))
            if episodic is not None:
                episodic.begin_episodes(starting)
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

        # One decision for all, and its chunk of steps.
        predict_start = time.perf_counter()
        chunk = agent.predict(obs, generator=[slot.generator for slot in slots])
        predicted: NDArray[np.float32] = chunk.cpu().numpy().reshape(num_envs, *action_shape)
        step_start = time.perf_counter()
        actions = np.zeros_like(predicted)
        actions[acting] = predicted[acting]
        obs, _, terminated, truncated, infos = envs.step(actions)
        timing["predict_s"] += step_start - predict_start
        timing["step_s"] += time.perf_counter() - step_start
        if episodic is not None:
            episodic.end_episodes([i for i in acting if terminated[i] or truncated[i]])

        for i in acting:
            slot, ended = slots[i], bool(terminated[i] or truncated[i])
            success, length = bool(infos["success"][i]), int(infos["episode_length"][i])
            if slot.frames is not None:
                reward = float(infos["episode_return"][i])
                slot.frames.append(frame_of(obs, i, step=length, reward=reward, success=success, ended=ended))
            if not ended or slot.key is None:
                continue
            episode_seed, task_id, state_id = slot.key
            episode = EvalEpisode(
                seed=episode_seed, task_id=task_id, init_state_id=state_id, success=success, length=length
            )
            if slot.frames is not None and video_dir is not None:
                write_video(video_path(video_dir, episode), slot.frames, fps)
                if state_id == 0:
                    films[slot.key] = slot.frames
            episodes.append(episode)
            if log is not None:
                log.append(episode)
            free.append(i)
        free.sort()

    seconds = time.perf_counter() - start
    episodes.sort(key=lambda e: e.key)
    videos: dict[Key, Path] = {}
    if video_dir is not None:
        paths = {e.key: video_path(video_dir, e) for e in episodes if e.key in recorded}
        videos = {key: path for key, path in paths.items() if path.is_file()}
        _write_overview(video_dir / OVERVIEW, videos, films, fps)
    return EvalResult(
        protocol={
            "seeds": list(seeds),
            "num_episodes": len(keys),
            "metric": "success_once",
            "sampling": "deterministic Euler",
            "num_envs": num_envs,
        },
        task_descriptions=dict(sorted(descriptions.items())),
        episodes=episodes,
        seconds=seconds,
        timing=timing | {"other_s": seconds - sum(timing.values())},
        videos=list(videos.values()),
    )


def _episodic(agent: Any) -> EpisodicPolicy | None:
    return agent if isinstance(agent, EpisodicPolicy) else None


def _reset(envs: gym.vector.VectorEnv, keys: Sequence[Key], reset_ids: Sequence[int]) -> dict[str, Any]:
    """Starts the episodes of `keys` in the environments `reset_ids`; returns all environments' observation."""
    options = {
        "reset_mask": np.isin(np.arange(len(keys)), reset_ids),
        "task_id": np.array([task_id for _, task_id, _ in keys]),
        "init_state_id": np.array([state_id for _, _, state_id in keys]),
    }
    env_seeds = [int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys]
    obs, _ = cast(SeededEnvs, envs).reset(seed=env_seeds, options=options)
    return obs


class ToldEpisodes:
    """Keeps episodes in memory and prints how far the evaluation is, every few seconds.

    Args:
        total: episodes of the evaluation.
        title: what is evaluated.
    """

    def __init__(self, total: int, title: str = "") -> None:
        self.episodes: list[EvalEpisode] = []
        self._total, self._title = total, title
        self._told_at = time.monotonic()

    def append(self, episode: EvalEpisode) -> None:
        """Keeps one more."""
        self.episodes.append(episode)
        now, count = time.monotonic(), len(self.episodes)
        if now - self._told_at > TOLD_EVERY_S and count < self._total:
            self._told_at = now
            successes = sum(e.success for e in self.episodes)
            print(f"  {self._title}{count} of {self._total} episodes, {successes} successes so far", flush=True)


# --- files ---


def _write_overview(path: Path, videos: dict[Key, Path], films: dict[Key, list[Frame]], fps: float) -> None:
    """Writes the videos from each task's first initial state as one; those that are not in `films` from their files."""
    pictures: list[Iterable[Picture]] = []
    for key, video in videos.items():
        if key in films:
            pictures.append(picture_of(frame) for frame in films[key])
        elif key[2] == 0:  # of an evaluation that goes on: filmed before
            pictures.append(read_pictures(video))
    if pictures:
        write_tiled_video(path, pictures, fps)


def video_path(folder: Path, episode: EvalEpisode) -> Path:
    """Returns the file of an episode's video."""
    outcome = "success" if episode.success else "failure"
    return folder / f"task_{episode.task_id}_state_{episode.init_state_id}_{outcome}.mp4"


def evaluation_file(run_path: Path, iteration: int) -> Path:
    """Returns where a run keeps the evaluation after `iteration`."""
    return run_path / "evaluations" / f"iteration_{iteration}.json"


def appearance_of(envs: gym.vector.VectorEnv) -> dict[str, Any]:
    """Returns which renderer draws and in which look, as far as environments, perhaps of one's own, tell it."""
    told = {"renderer": "renderer_name", "texture_colorspace": "texture_colorspace"}
    return {key: getattr(envs.unwrapped, name) for key, name in told.items() if hasattr(envs.unwrapped, name)}


def evaluate_into(
    run_path: Path, iteration: int, agent: Any, make_envs: Callable[[int], gym.vector.VectorEnv], args: Any
) -> float:
    """Evaluates an agent in training; leaves the JSON, a video per task and one of all in the run's folder.

    All evaluations of a run have the same initial noise, which is none that `eval_gr00t.py --seeds 0 1 2` draws: the
    best of several checkpoints has not been chosen by the episodes that it is then judged by.

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
    video_dir = run_path / "videos" / f"iteration_{iteration}"
    num_filmed = getattr(args, "eval_videos_per_task", 1)
    with closing(make_envs(min(args.num_envs, len(jobs)))) as envs:
        appearance = appearance_of(envs)
        result = evaluate(
            agent,
            envs,
            jobs,
            seed=seed_of(args.seed, EVALUATIONS) % 2**32,
            record=lambda _, state_id: state_id < num_filmed,
            video_dir=video_dir,
            log=ToldEpisodes(len(jobs)),
        )
    result.protocol.update(
        appearance,
        suite=args.suite,
        horizon=stated_horizon(args.suite, args.horizon),
        task_ids=sorted({task_id for task_id, _ in jobs}),
        episodes_per_task=args.eval_episodes_per_task,
        init_states=check_init_states(None, args.suite),
        image_size=agent.image_size,
    )
    for name in ("physics", "stepping", "steps_before_success", "num_near_goal_states"):
        if hasattr(args, name):
            result.protocol[name] = getattr(args, name)
    result.save(evaluation_file(run_path, iteration))
    result.print_table()
    return result.success_rate


def success_in_words(row: Mapping[str, Any]) -> str:
    """Returns a row of `EvalResult.rows` as `5 of 24, 20.8 % (95 %: 9.2-40.5)`."""
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{row['successes']} of {row['episodes']}, {100 * row['success_rate']:.1f} % (95 %: {low:.1f}-{high:.1f})"


def compare_evaluations(run_path: Path, before: int, after: int) -> str:
    """Returns what two evaluations of a run say of the same episodes; their films, if any, become one.

    Where one of them is missing, because a request to stop ended it, or they are of other episodes, it says so instead.
    The film is videos/before_after.mp4: a column for each filmed episode, the earlier evaluation above.
    """
    files = [evaluation_file(run_path, iteration) for iteration in (before, after)]
    if missing := [file for file in files if not file.is_file()]:
        return f"before and after training are not compared: {missing[0]} is missing, its evaluation was interrupted"
    contents = [read_json(file) for file in files]
    episodes = [[EvalEpisode(**episode) for episode in content["episodes"]] for content in contents]
    if [e.key for e in episodes[0]] != [e.key for e in episodes[1]]:
        return (
            f"before and after training are not compared: {files[0]} is of {len(episodes[0])} episodes, "
            f"{files[1].name} of {len(episodes[1])}, and these are not the same (eval_episodes_per_task has changed)"
        )
    rows = [content["table"][-1] for content in contents]
    text = (
        f"the same {rows[0]['episodes']} episodes, without exploration\n"
        f"  before training      {success_in_words(rows[0])}\n"
        f"  after {after:4d} iterations {success_in_words(rows[1])}"
    )
    folders = [run_path / "videos" / f"iteration_{iteration}" for iteration in (before, after)]
    pairs = [
        [video_path(folder, e) for folder, e in zip(folders, both, strict=True)] for both in zip(*episodes, strict=True)
    ]
    filmed = [pair for pair in pairs if all(film.is_file() for film in pair)]
    if filmed:
        path = run_path / "videos" / "before_after.mp4"
        pictures = [
            titled(read_pictures(film), title)
            for title, row in zip(("before", "after"), zip(*filmed, strict=True), strict=True)
            for film in row
        ]
        chunk = read_json(run_path / "args.json")["num_action_chunks"]
        write_tiled_video(path, pictures, CONTROL_FREQUENCY_HZ / chunk, columns=len(filmed))
        text += f"\n  film                 {path}"
    return text
