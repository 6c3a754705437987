"""Success rate of a policy on a LIBERO suite.

Protocol: every chosen task from each of its first `episodes_per_task` stored initial states, exactly once (10 x 50 =
500 episodes for a whole suite); deterministic Euler sampling from an initial noise that depends on nothing but
(seed, task, initial state); `success_once`, that is success at any step before the suite's horizon; Wilson 95 %
interval. Episodes stream through `num_envs` environments. An exception ends the evaluation: it never counts as a
failed episode.

    python algorithms/eval_gr00t.py --checkpoint runs/demo/checkpoints/iteration_3 --suite libero_spatial

Writes result.json (the protocol, every episode, the table) and one video per task.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from algorithms.batch import index
from algorithms.episodes import Episode, wilson_interval
from algorithms.run_folder import describe_environment, write_json
from algorithms.video import Frame, write_video
from gr00t_agent import Gr00tAgent
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.suites import get_task, horizon, list_tasks, load_init_states

TASK_KEY = "annotation.human.action.task_description"
CONTROL_FREQUENCY_HZ = 20


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    checkpoint: str
    """A folder or hub id that `Gr00tAgent.from_pretrained` loads, or a preset's name (random weights)."""
    suite: str = "libero_spatial"
    """LIBERO suite."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to evaluate; all of the suite if not given."""
    episodes_per_task: int = 50
    """Stored initial states per task, from the first on."""
    num_envs: int = 10
    """Environments that the episodes stream through."""
    num_action_chunks: int = 5
    """Environment steps per decision."""
    denoising_steps: int = 4
    """Denoising steps from noise to action."""
    horizon: int | None = None
    """Environment steps before an episode counts as failed; the suite's own if not given."""
    seed: int = 0
    """Seed of the initial noise and of the environments."""
    videos_per_task: int = 1
    """Episodes per task that are recorded."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Torch device of the policy."""
    output_dir: Path = Path("runs/eval")
    """Where the result and the videos are written."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Episodes of an evaluation, in the order (task, initial state), with the protocol that made them."""

    protocol: dict[str, Any]
    task_descriptions: dict[int, str]
    episodes: list[Episode]
    seconds: float
    videos: list[Path] = field(default_factory=list)

    @property
    def success_rate(self) -> float:
        """Fraction of all episodes that succeeded."""
        return sum(e.success for e in self.episodes) / len(self.episodes)

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row per task and one for all: successes, episodes, rate and Wilson 95 % interval."""
        groups = [
            (str(i), text, [e for e in self.episodes if e.task_id == i]) for i, text in self.task_descriptions.items()
        ]
        rows: list[dict[str, Any]] = []
        for name, text, episodes in [*groups, ("all", "all tasks", self.episodes)]:
            successes = sum(e.success for e in episodes)
            low, high = wilson_interval(successes, len(episodes))
            rows.append(
                dict(
                    task=name, description=text, successes=successes, episodes=len(episodes),
                    success_rate=successes / len(episodes), low=low, high=high,
                )
            )  # fmt: skip
        return rows

    def save(self, path: Path) -> None:
        """Writes the protocol, the table and every episode as JSON."""
        content = dict(
            protocol=self.protocol, success_once=self.success_rate, table=self.rows(), seconds=self.seconds,
            episodes=[asdict(e) for e in self.episodes], environment=describe_environment(),
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def print_table(self) -> None:
        """Prints the table to the terminal."""
        table = Table("task", "instruction", "success", "rate", "95 % interval")
        for row in self.rows():
            count, interval = f"{row['successes']}/{row['episodes']}", f"{row['low']:.1%} - {row['high']:.1%}"
            table.add_row(row["task"], row["description"], count, f"{row['success_rate']:.1%}", interval)
        Console().print(table)


def episode_generator(seed: int, task_id: int, init_state_id: int) -> torch.Generator:
    """Returns the generator of one episode's noise; it depends on nothing but the arguments."""
    state = np.random.SeedSequence((seed, task_id, init_state_id)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


@torch.no_grad()
def evaluate(
    agent: Any,
    envs: gym.vector.VectorEnv,
    jobs: list[tuple[int, int]],
    *,
    seed: int,
    record: Callable[[int, int], bool] = lambda task_id, init_state_id: False,
    video_dir: Path | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> EvalResult:
    """Runs every (task id, initial state id) of `jobs` once and returns the outcomes.

    Args:
        agent: `predict(obs, generator=[...])` gives an action chunk [B, C, 7] for B observations.
        envs: environments with autoreset disabled and GR00T's modality keys.
        jobs: the episodes.
        seed: seed of the noise and of the environments.
        record: which episodes to record as videos in `video_dir`.
        video_dir: folder of the videos.
        on_episode: called as each episode ends.

    Raises:
        ValueError: if there are no jobs or autoreset is not disabled.
    """
    if not jobs:
        raise ValueError("jobs is empty: ask for at least one task and one initial state")
    if envs.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
        raise ValueError(
            f"autoreset_mode={envs.metadata.get('autoreset_mode')} would restart episodes that the protocol does not "
            "ask for: make the environments with autoreset_mode=AutoresetMode.DISABLED"
        )
    start = time.perf_counter()
    num_envs = envs.num_envs
    pending = iter(jobs)
    running: list[tuple[int, int] | None] = [None] * num_envs
    generators: list[torch.Generator] = [torch.Generator() for _ in range(num_envs)]
    frames: dict[int, list[Frame]] = {}
    episodes: list[Episode] = []
    descriptions: dict[int, str] = {}
    videos: list[Path] = []
    chunk_shape = (envs.action_space.shape or ())[1:]
    obs: dict[str, Any] = {}

    def assign(free: NDArray[np.intp]) -> NDArray[np.bool_]:
        mask = np.zeros(num_envs, dtype=bool)
        for i in free:
            running[i] = next(pending, None)
            job = running[i]
            if job is not None:
                mask[i] = True
                generators[i] = episode_generator(seed, *job)
        return mask

    def reset(mask: NDArray[np.bool_]) -> None:
        nonlocal obs
        task_ids, init_state_ids = (np.array([job[part] if job else 0 for job in running]) for part in (0, 1))
        seeds = [
            int(np.random.SeedSequence((seed, t, i)).generate_state(1)[0])
            for t, i in zip(task_ids, init_state_ids, strict=True)
        ]
        obs, _ = envs.reset(
            seed=seeds, options={"reset_mask": mask, "task_id": task_ids, "init_state_id": init_state_ids}
        )
        for i in np.flatnonzero(mask):
            job = running[i]
            assert job is not None
            descriptions[job[0]] = str(obs[TASK_KEY][i])
            if record(*job):
                frames[i] = []
                add_frame(int(i), 0, 0.0, False)

    def add_frame(i: int, step: int, reward: float, success: bool) -> None:
        if i in frames:
            views = [to_image(obs[key][i]) for key in ("video.image", "video.wrist_image")]
            frames[i].append(Frame(views=views, task=str(obs[TASK_KEY][i]), step=step, reward=reward, success=success))

    reset(assign(np.arange(num_envs)))
    while any(job is not None for job in running):
        active = np.flatnonzero([job is not None for job in running])
        chunk = agent.predict(index(obs, active), generator=[generators[i] for i in active])
        actions = np.zeros((num_envs, *chunk_shape), dtype=np.float32)
        actions[active] = np.asarray(chunk.cpu()).reshape(len(active), *chunk_shape)
        obs, _, terminated, truncated, infos = envs.step(actions)
        for i in active:
            success, length = bool(infos["success"][i]), int(infos["episode_length"][i])
            add_frame(int(i), length, float(infos["episode_return"][i]), success)
            if terminated[i] or truncated[i]:
                job = running[i]
                assert job is not None
                episode = Episode(task_id=job[0], init_state_id=job[1], success=success, length=length)
                episodes.append(episode)
                on_episode(episode)
                if i in frames:
                    assert video_dir is not None, "record needs a video_dir"
                    outcome = "success" if success else "failure"
                    path = video_dir / f"task_{job[0]}_state_{job[1]}_{outcome}.mp4"
                    steps_per_frame = chunk_shape[0] if len(chunk_shape) == 2 else 1
                    write_video(path, frames.pop(i), fps=CONTROL_FREQUENCY_HZ / steps_per_frame)
                    videos.append(path)
        free = np.flatnonzero(terminated | truncated)
        mask = assign(free)
        if mask.any():
            reset(mask)
    episodes.sort(key=lambda e: (e.task_id, e.init_state_id))
    protocol = dict(seed=seed, num_episodes=len(episodes), metric="success_once", sampling="deterministic Euler")
    return EvalResult(
        protocol=protocol, task_descriptions=dict(sorted(descriptions.items())), episodes=episodes,
        seconds=time.perf_counter() - start, videos=sorted(videos),
    )  # fmt: skip


def to_image(image: Any) -> NDArray[np.uint8]:
    """Returns an image as a NumPy array wherever it lies."""
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


def evaluation_jobs(suite: str, task_ids: tuple[int, ...] | None, episodes_per_task: int) -> list[tuple[int, int]]:
    """Returns (task id, initial state id) of every episode of the protocol.

    Raises:
        ValueError: if a task is not in the suite or has fewer stored initial states.
    """
    tasks = [get_task(suite, i) for i in task_ids] if task_ids is not None else list_tasks(suite)
    for task in tasks:
        stored = len(load_init_states(task))
        if not 1 <= episodes_per_task <= stored:
            raise ValueError(
                f"episodes_per_task={episodes_per_task} is not possible for task {task.task_id} of {suite}, "
                f"which stores {stored} initial states (valid: 1-{stored})"
            )
    return [(task.task_id, state) for task in tasks for state in range(episodes_per_task)]


def evaluate_into(
    run_path: Path, iteration: int, agent: Any, make_envs: Callable[[int], gym.vector.VectorEnv], args: Any
) -> float:
    """Evaluates an agent in training; leaves the JSON and a video per task in the run's folder.

    Args:
        run_path: the run's folder.
        iteration: names the files.
        agent: the agent.
        make_envs: makes so many environments with autoreset disabled.
        args: a trainer's arguments: suite, task_ids, eval_episodes_per_task, num_envs, seed.

    Returns:
        The success rate.
    """
    jobs = evaluation_jobs(args.suite, args.task_ids, args.eval_episodes_per_task)
    envs = make_envs(min(args.num_envs, len(jobs)))
    name = f"iteration_{iteration}"
    result = evaluate(
        agent, envs, jobs, seed=args.seed, record=lambda _, state: state == 0, video_dir=run_path / "videos" / name
    )
    envs.close()
    result.protocol.update(suite=args.suite, horizon=args.horizon or horizon(args.suite))
    result.save(run_path / "evaluations" / f"{name}.json")
    result.print_table()
    return result.success_rate


def main(args: Args) -> EvalResult:
    """Evaluates, prints the table, writes result.json and videos."""
    agent = Gr00tAgent.load(
        args.checkpoint, num_action_chunks=args.num_action_chunks, denoising_steps=args.denoising_steps
    )
    agent = agent.to(args.device).eval()
    jobs = evaluation_jobs(args.suite, args.task_ids, args.episodes_per_task)
    envs = ModalityVectorObservation(
        gym.make_vec(
            f"libero_gym/{args.suite}-v0", num_envs=min(args.num_envs, len(jobs)),
            vectorization_mode="vector_entry_point", num_action_chunks=args.num_action_chunks,
            image_size=agent.image_size, horizon=args.horizon, renderer=args.renderer,
            autoreset_mode=AutoresetMode.DISABLED,
        )
    )  # fmt: skip
    console = Console()
    outcomes: list[bool] = []

    def report(episode: Episode) -> None:
        outcomes.append(episode.success)
        console.print(
            f"{len(outcomes)}/{len(jobs)}  task {episode.task_id} state {episode.init_state_id}: "
            f"{'success' if episode.success else 'failure'} after {episode.length} steps   "
            f"success so far {np.mean(outcomes):.1%}"
        )

    result = evaluate(
        agent, envs, jobs, seed=args.seed, record=lambda _, state: state < args.videos_per_task,
        video_dir=args.output_dir / "videos", on_episode=report,
    )  # fmt: skip
    envs.close()
    result.protocol.update(
        suite=args.suite, episodes_per_task=args.episodes_per_task, checkpoint=args.checkpoint,
        horizon=args.horizon or horizon(args.suite), num_action_chunks=args.num_action_chunks,
        denoising_steps=args.denoising_steps, image_size=agent.image_size,
    )  # fmt: skip
    result.save(args.output_dir / "result.json")
    result.print_table()
    console.print(f"result: {args.output_dir / 'result.json'}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
