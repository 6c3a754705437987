"""Demonstrations of LIBERO tasks by scripted experts, as a LeRobot dataset.

Episodes are simulated without images, in parallel processes. Only those that succeed are rendered,
all frames of an episode in batches, and staged one by one beside the output; at the end the staged
episodes become a dataset. A collection that was broken off goes on where it was when the same
command runs again.

Episode k of a task is decided by (seed, task, k) alone: neither the number of processes nor the
batch size changes the data. A task's dataset is its first `episodes_per_task` successful attempts.
Every frame holds what the policy observes before an action, and that action, gripper 1 open /
0 close; an episode ends with the action that succeeds. Its `task_id`, `init_state_id`, `seed` and
`object_shift` are kept in `meta/`, so it can be simulated again. With `--expert.mistakes` some
episodes begin after `first_step` steps, in which the expert has missed an object on purpose.

    python algorithms/collect_demos.py --preset fewshot --output runs/data/libero_spatial
    python algorithms/collect_demos.py --suite libero_goal --output runs/data/libero_goal
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from algorithms.common.args import check_ranges
from algorithms.common.command_line import REQUIRED, launch, parse_args
from algorithms.common.jobs import chosen_tasks
from libero_gym.experts import ExpertConfig
from libero_gym.outputs import check_output_folder
from libero_gym.tasks.initial_states import check_init_state_id, check_init_states
from libero_gym.tasks.suites import TaskSpec, get_task


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    # --- what is recorded ---
    preset: str | None = None
    """Name of a set of defaults in `PRESETS`; every other argument overrides it."""
    output: Path
    """Folder of the new dataset; episodes are staged in `<output>.staged` first."""
    suite: str = "libero_spatial"
    """LIBERO suite."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to record, each once; all of the suite if not given."""
    episodes_per_task: int = 50
    """Successful episodes per task."""
    max_attempts_per_task: int | None = None
    """Attempts after which a task counts as too hard; 3 * episodes_per_task if not given."""
    allow_fewer: bool = False
    """Write the dataset even if a task has fewer episodes than asked for."""

    # --- what decides an episode ---
    seed: int = 0
    """Seed of fixture poses, object shifts and the expert's variety."""
    init_state_ids: tuple[int, ...] | None = None
    """Stored initial states that attempts take in turn; all if not given."""
    object_shift: float = 0.0
    """Metres by which objects may be moved along x and y from their stored places (0.02 varies the
    scene)."""
    horizon: int | None = None
    """Environment steps before an attempt counts as failed; the suite's own if not given."""
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    """How the expert moves."""

    # --- images ---
    image_size: int = 256
    """Height and width of both views, pixels."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""
    render_batch_size: int = 128
    """Frames that are rendered at once."""

    # --- dataset ---
    version: Literal["v2.1", "v3.0"] = "v2.1"
    """Layout of the dataset; GR00T's own tools read v2.1."""
    storage: Literal["video", "image"] = "video"
    """H.264 mp4 files, or lossless PNGs in the parquet files."""
    crf: int = 18
    """Quality of the videos, 0 (lossless) to 51."""
    keep_staged: bool = False
    """Keep the staged episodes, to write another version or to add episodes later. Those that are not
    in the dataset, of other tasks or of more episodes than asked for, are always kept."""

    # --- processes ---
    num_workers: int = 0
    """Simulating processes; 0 simulates, and encodes, in this one."""
    num_writers: int = 4
    """Processes that encode episodes; threads if num_workers is 0."""

    @property
    def max_attempts(self) -> int:
        """Attempts per task at most."""
        if self.max_attempts_per_task is None:
            return 3 * self.episodes_per_task
        return self.max_attempts_per_task


PRESETS: dict[str, Args] = {
    # What the policies in checkpoints/*_fewshot learned from, see benchmarks/runs/fewshot.sh.
    "fewshot": Args(
        output=REQUIRED,
        episodes_per_task=20,
        object_shift=0.02,
        expert=ExpertConfig(speed_spread=0.1, noise=0.06, via_noise=0.01),
        image_size=118,
        storage="image",
    ),
}


def tasks_of(args: Args) -> list[TaskSpec]:
    """Returns the tasks that are recorded."""
    return [task for _, task in chosen_tasks(args.suite, args.task_ids)]


def check_args(args: Args) -> None:
    """Raises ValueError or OSError for arguments that would otherwise fail late."""
    check_output_folder("output", args.output)
    if args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} exists; give another output, or remove it first")
    check_ranges(args)
    if args.storage == "video" and args.image_size % 2:
        raise ValueError(
            f"image_size={args.image_size} is odd, and H.264 videos need even sizes: give "
            f"--image-size {args.image_size + 1}, or --storage image"
        )
    if args.max_attempts < args.episodes_per_task and not args.allow_fewer:
        raise ValueError(
            f"max_attempts_per_task={args.max_attempts} is less than "
            f"episodes_per_task={args.episodes_per_task}, so no task can have its episodes: give "
            f"--max-attempts-per-task {args.episodes_per_task} or more, or --allow-fewer to write "
            "what there is"
        )
    counts = Counter(args.task_ids or ())
    if repeated := sorted(task_id for task_id, count in counts.items() if count > 1):
        raise ValueError(
            f"task_ids={args.task_ids} names tasks {repeated} more than once, but a task's episodes "
            "are recorded once; name each task only once"
        )
    for task in tasks_of(args):
        kind = check_init_states(None, task.suite)
        for init_state_id in args.init_state_ids or ():
            check_init_state_id(init_state_id, task, kind)


# Before the rest is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, PRESETS, check_args) if __name__ == "__main__" else None

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from importlib import resources
from multiprocessing import get_context
from typing import Any, Protocol, cast

import mujoco
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from gr00t_agent.files import clean_up, json_ready, remove_folder, write_json
from gr00t_agent.lerobot_writer import (
    EPISODE_FILE,
    Episode,
    Recording,
    assemble_dataset,
    stage_episode,
)
from libero_gym.conventions import ACTION_DIM, CONTROL_FREQUENCY_HZ, STATE_DIM, gripper_to_data
from libero_gym.experts import make_expert
from libero_gym.options import DEFAULT_CAMERAS
from libero_gym.physics.simulation import (
    NUM_SETTLING_STEPS,
    SETTLING_ACTION,
    PhysicsError,
    Simulation,
)
from libero_gym.rendering.protocol import Renderer, RenderState
from libero_gym.rendering.renderers import make_renderer
from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.scenes import Scene, load_scene
from libero_gym.tasks.suites import horizon, load_init_states, task_number

SETTINGS_FILE = "settings.json"
# What may differ between a collection and its continuation.
FREE_SETTINGS = {
    "preset",
    "output",
    "task_ids",
    "episodes_per_task",
    "max_attempts_per_task",
    "allow_fewer",
    "render_batch_size",
    "version",
    "keep_staged",
    "num_workers",
    "num_writers",
}


# --- attempts ---


class Demonstrator(Protocol):
    """What acts: `libero_gym.experts.Expert`, or one's own."""

    def reset(self, sim: Simulation, rng: np.random.Generator) -> None:
        """Starts an episode."""
        ...

    def act(self, sim: Simulation) -> NDArray[np.float32]:
        """Returns the next environment action, float32 [7], gripper -1 open, +1 close."""
        ...

    # One that makes mistakes on purpose has a property `is_mistaken`: whether the last action, and all
    # before it, led to one that is not noticed yet. What is recorded begins after it.


MakeDemonstrator = Callable[[TaskSpec, ExpertConfig], Demonstrator]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a task, and all that decides it."""

    suite: str
    task_id: int
    attempt_id: int
    init_state_id: int
    seed: int
    object_shift: float
    horizon: int

    @property
    def name(self) -> str:
        """Name of its files; sorts by task, then attempt."""
        return f"task_{self.task_id:03d}_attempt_{self.attempt_id:05d}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """What happened in an attempt of T steps.

    Attributes:
        attempt: the attempt.
        failure: why it is of no use; None after success.
        states: float32 [T, 8], before each action.
        actions: float32 [T, 7], environment convention.
        first_step: actions before the first one, up to the end of a mistake that was made on purpose.
        views: what a renderer needs for the image before each action.
    """

    attempt: Attempt
    failure: str | None
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    views: Sequence[RenderState]
    first_step: int = 0


def make_attempt(args: Args, task: TaskSpec, attempt_id: int) -> Attempt:
    """Returns attempt number `attempt_id` at a task."""
    stored = args.init_state_ids or tuple(range(len(load_init_states(task))))
    entropy = (args.seed, task.task_id, attempt_id)
    return Attempt(
        suite=args.suite,
        task_id=task_number(args.suite, task),
        attempt_id=attempt_id,
        init_state_id=stored[attempt_id % len(stored)],
        seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
        object_shift=args.object_shift,
        horizon=args.horizon or horizon(task.suite),
    )


def start_episode(sim: Simulation, task: TaskSpec, attempt: Attempt) -> None:
    """Brings `sim` to the attempt's stored initial state, objects moved by up to `object_shift`."""
    random_state = np.random.RandomState(attempt.seed)
    if attempt.object_shift == 0:
        sim.reset(task, attempt.init_state_id, random_state)
        return
    sim.reset(task, attempt.init_state_id, random_state, num_settling_steps=0)
    for name, shift in object_shifts(sim.scene, task, attempt).items():
        address = sim.scene.objects[name].joint_qpos_adr[0]
        sim.data.qpos[address : address + 2] += shift
    mujoco.mj_forward(sim.model, sim.data)
    for _ in range(NUM_SETTLING_STEPS):
        sim.step(SETTLING_ACTION)


def object_shifts(scene: Scene, task: TaskSpec, attempt: Attempt) -> dict[str, NDArray[np.float64]]:
    """Returns by how much each movable object is moved along x and y, float64 [2] in metres.

    What stands on another movable object moves with it, and what is inside a fixture stays where it
    is.
    """
    rng = np.random.default_rng((attempt.seed, 1))
    limit = attempt.object_shift
    movable = [name for name, thing in scene.objects.items() if not thing.is_fixture]
    shifts = {name: rng.uniform(-limit, limit, 2) for name in movable}
    for relation, *names in read_problem(task.bddl_file).init:
        if len(names) != 2 or names[0] not in shifts:
            continue
        site = scene.sites.get(names[1])
        carrier = names[1] if site is None else site.parent
        if carrier in shifts:
            shifts[names[0]] = shifts[carrier]
        elif relation == "in":
            shifts[names[0]] = np.zeros(2)
    return shifts


@functools.lru_cache(maxsize=64)
def simulation_of(scene: Scene) -> Simulation:
    """Returns this process's world of a scene."""
    return Simulation(scene)


def record(
    attempt: Attempt,
    config: ExpertConfig,
    make_demonstrator: MakeDemonstrator = make_expert,
) -> Trajectory:
    """Simulates an attempt until it succeeds or its horizon is reached.

    What leads to a mistake that the demonstrator makes on purpose, and the mistake, are played and not recorded.
    """
    task = get_task(attempt.suite, attempt.task_id)
    sim = simulation_of(load_scene(task))
    states: list[NDArray[np.float32]] = []
    actions: list[NDArray[np.float32]] = []
    views: list[RenderState] = []
    first_step = 0
    failure: str | None = None
    try:
        start_episode(sim, task, attempt)
        if sim.success():
            failure = "solved before the first action"
        else:
            demonstrator = make_demonstrator(task, config)
            if config.mistakes > 0 and not hasattr(demonstrator, "is_mistaken"):
                raise ValueError(
                    f"expert.mistakes={config.mistakes} is for a demonstrator that says which actions "
                    f"were mistakes by its property is_mistaken, and {type(demonstrator).__name__} "
                    "has none; leave it out"
                )
            rng = np.random.default_rng((attempt.seed, task.task_id, attempt.init_state_id))
            demonstrator.reset(sim, rng)
            while not sim.success() and first_step + len(actions) < attempt.horizon:
                states.append(sim.states())
                views.append(sim.render_state())
                # What is recorded is exactly what is executed.
                actions.append(np.clip(demonstrator.act(sim), -1.0, 1.0).astype(np.float32))
                sim.step(actions[-1])
                if getattr(demonstrator, "is_mistaken", False):
                    first_step += len(actions)
                    states, actions, views = [], [], []
            if not sim.success():
                failure = f"not solved within {attempt.horizon} steps"
            elif not actions:
                failure = "solved by a mistake"
    except PhysicsError as error:
        failure = f"physics: {error}"
    if failure is not None:
        states, actions, views = [], [], []
    return Trajectory(
        attempt=attempt,
        failure=failure,
        states=np.array(states, np.float32).reshape(-1, STATE_DIM),
        actions=np.array(actions, np.float32).reshape(-1, ACTION_DIM),
        views=views,
        first_step=first_step,
    )


# --- images ---


class RecordedWorld:
    """A moment of a trajectory, as renderers read a simulation."""

    def __init__(self, scene: Scene, model: mujoco.MjModel, view: RenderState) -> None:
        self.scene, self.model, self._view = scene, model, view

    def render_state(self) -> RenderState:
        """Returns what the image shows."""
        return self._view


def render(renderer: Renderer, trajectory: Trajectory, batch_size: int) -> NDArray[np.uint8]:
    """Returns the images of a trajectory, uint8 [K, T, H, W, 3] for K cameras."""
    scene = load_scene(get_task(trajectory.attempt.suite, trajectory.attempt.task_id))
    model, fixtures = simulation_of(scene).model, scene.fixture_body_ids
    parts: list[NDArray[np.uint8]] = []
    for start in range(0, len(trajectory.views), batch_size):
        views = trajectory.views[start : start + batch_size]
        poses = views[0].fixture_poses
        model.body_pos[fixtures], model.body_quat[fixtures] = poses[:, :3], poses[:, 3:]
        worlds = [RecordedWorld(scene, model, view) for view in views]
        parts.append(renderer.render(worlds))  # [n, K, H, W, 3]
    return np.moveaxis(np.concatenate(parts), 1, 0)


def to_episode(
    trajectory: Trajectory,
    images: NDArray[np.uint8],
    cameras: Sequence[str],
    language: str,
) -> Episode:
    """Returns a trajectory as it is written: the gripper in the convention of data sets."""
    attempt, actions = trajectory.attempt, trajectory.actions.copy()
    actions[:, -1] = gripper_to_data(actions[:, -1])
    return Episode(
        frames=dict(zip(cameras, images, strict=True)),
        states=trajectory.states,
        actions=actions,
        instruction=language,
        info={
            "task_id": attempt.task_id,
            "init_state_id": attempt.init_state_id,
            "seed": attempt.seed,
            "object_shift": attempt.object_shift,
            "suite": attempt.suite,
            "first_step": trajectory.first_step,
        },
    )


def libero_modality() -> dict[str, Any]:
    """Returns the content of LIBERO's `modality.json`."""
    return json.loads((resources.files("libero_gym") / "data" / "modality.json").read_text("utf-8"))


def camera_columns() -> list[str]:
    """Returns the columns of the cameras, in the order of `DEFAULT_CAMERAS`."""
    return [entry["original_key"] for entry in libero_modality()["video"].values()]


# --- staged episodes ---


class Staging:
    """The folder of staged episodes: a folder per success, a JSON file per failure.

    Args:
        folder: the folder.
        args: decide the data, with the installed MuJoCo; a folder made with others is refused. Their
            renderer is the one that draws.

    Raises:
        ValueError: the folder was made with other arguments, or another MuJoCo.
    """

    def __init__(self, folder: Path, args: Args) -> None:
        self.folder = folder
        given = json_ready(dataclasses.asdict(args))
        settings = {name: value for name, value in given.items() if name not in FREE_SETTINGS}
        settings["mujoco"] = mujoco.__version__
        path = folder / SETTINGS_FILE
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
            return
        found = json.loads(path.read_text("utf-8"))
        # Of a folder that was begun before there were some of them: how they were then.
        found["expert"] = json_ready(dataclasses.asdict(ExpertConfig())) | found.get("expert", {})
        changed: list[str] = []
        for name, value in settings.items():
            if name not in found:
                changed.append(f"{name} was not kept, now {value!r}")
            elif found[name] != value:
                changed.append(f"{name} was {found[name]!r}, now {value!r}")
        if changed:
            listing = ", ".join(changed)
            remedy = "remove it or give another output"
            raise ValueError(f"{folder} was recorded otherwise ({listing}); {remedy}")

    def outcome(self, attempt: Attempt) -> bool | None:
        """Returns True if the attempt is staged, False if it failed, None if it was not made."""
        if (self.folder / attempt.name / EPISODE_FILE).is_file():
            return True
        return False if self._failure_file(attempt).is_file() else None

    def add_failure(self, trajectory: Trajectory) -> None:
        """Notes that an attempt failed."""
        attempt = trajectory.attempt
        content = dataclasses.asdict(attempt) | {"failure": trajectory.failure}
        write_json(self._failure_file(attempt), content)

    def failures(self, attempts: Iterable[Attempt]) -> list[str]:
        """Returns the reasons of those attempts that failed."""
        files = [self._failure_file(attempt) for attempt in attempts]
        return [json.loads(file.read_text("utf-8"))["failure"] for file in files if file.is_file()]

    def length(self, attempt: Attempt) -> int:
        """Returns the steps of a staged attempt."""
        file = self.folder / attempt.name / EPISODE_FILE
        return json.loads(file.read_text("utf-8"))["length"]

    def remove(self, attempts: Iterable[Attempt]) -> list[str]:
        """Deletes what there is of attempts, and the folder if there is nothing else.

        Returns:
            Names of what is left: episodes and failures of other attempts.
        """
        for attempt in attempts:
            remove_folder(self.folder / attempt.name)
            self._failure_file(attempt).unlink(missing_ok=True)
        clean_up(self.folder)  # what a killed process was writing
        left = {path.name for path in self.folder.iterdir()} - {SETTINGS_FILE}
        if not left:
            remove_folder(self.folder)
        return sorted(left)

    def _failure_file(self, attempt: Attempt) -> Path:
        return self.folder / f"{attempt.name}.json"


def plan(args: Args, task: TaskSpec, staging: Staging) -> tuple[list[Attempt], list[Attempt]]:
    """Returns a task's successful attempts so far, and those to make next.

    As many are made next as successes are missing. Attempts are numbered without gaps, so what is
    kept does not depend on the order in which they end.
    """
    kept: list[Attempt] = []
    missing: list[Attempt] = []
    for attempt_id in range(args.max_attempts):
        if len(kept) + len(missing) == args.episodes_per_task:
            break
        attempt = make_attempt(args, task, attempt_id)
        outcome = staging.outcome(attempt)
        if outcome:
            kept.append(attempt)
        elif outcome is None:
            missing.append(attempt)
    return kept, missing


# --- collecting ---


def simulate(
    attempts: Sequence[Attempt],
    args: Args,
    make_demonstrator: MakeDemonstrator,
    pool: ProcessPoolExecutor | None,
) -> Iterator[Trajectory]:
    """Yields the trajectories of attempts, in their order, as they are simulated."""
    if pool is None:
        for attempt in attempts:
            yield record(attempt, args.expert, make_demonstrator)
    else:
        count = len(attempts)
        yield from pool.map(record, attempts, [args.expert] * count, [make_demonstrator] * count)


def collect(
    args: Args,
    tasks: Sequence[TaskSpec],
    staging: Staging,
    renderer: Renderer,
    make_demonstrator: MakeDemonstrator,
) -> None:
    """Makes attempts until every task has its episodes, or no attempts are left."""
    console, start, num_frames = Console(), time.perf_counter(), 0
    recording, cameras = make_recording(args), camera_columns()
    language = {task_number(args.suite, task): task.language for task in tasks}

    context = get_context("spawn")  # renderers and threads do not survive a fork
    if args.num_workers:
        pool = ProcessPoolExecutor(args.num_workers, mp_context=context)
        writers = ProcessPoolExecutor(args.num_writers, mp_context=context)
    else:
        pool = None
        writers = ThreadPoolExecutor(args.num_writers)

    with writers:
        while attempts := [attempt for task in tasks for attempt in plan(args, task, staging)[1]]:
            # A collection broken off has all tasks alike.
            attempts.sort(key=lambda attempt: attempt.attempt_id)
            writing: list[Future[None]] = []
            trajectories = simulate(attempts, args, make_demonstrator, pool)
            for count, trajectory in enumerate(trajectories, 1):
                attempt = trajectory.attempt
                if trajectory.failure is not None:
                    staging.add_failure(trajectory)
                    outcome = trajectory.failure
                else:
                    images = render(renderer, trajectory, args.render_batch_size)
                    episode = to_episode(trajectory, images, cameras, language[attempt.task_id])
                    if len(writing) >= 2 * args.num_writers:  # bounds the images in memory
                        writing.pop(0).result()
                    folder = staging.folder / attempt.name
                    writing.append(writers.submit(stage_episode, folder, episode, recording))
                    num_frames += len(episode.actions)
                    outcome = f"success after {len(trajectory.actions)} steps"
                rate = num_frames / (time.perf_counter() - start)
                console.print(
                    f"{count}/{len(attempts)}  "
                    f"task {attempt.task_id} attempt {attempt.attempt_id}: {outcome}   "
                    f"{rate:.0f} frames/s",
                    highlight=False,
                )
            for future in writing:
                future.result()
    if pool is not None:
        pool.shutdown()


def make_recording(args: Args) -> Recording:
    """Returns how the dataset stores its frames."""
    return Recording(fps=CONTROL_FREQUENCY_HZ, storage=args.storage, crf=args.crf)


def counted_attempts(args: Args, task: TaskSpec, kept: Sequence[Attempt]) -> list[Attempt]:
    """Returns the attempts that the kept ones were chosen from."""
    is_complete = len(kept) == args.episodes_per_task
    last = kept[-1].attempt_id if is_complete else args.max_attempts - 1
    return [make_attempt(args, task, attempt_id) for attempt_id in range(last + 1)]


def count_outcomes(
    args: Args,
    task: TaskSpec,
    staging: Staging,
    kept: Sequence[Attempt],
) -> dict[str, Any]:
    """Returns how many attempts were kept and discarded, and why, and the kept ones' lengths."""
    reasons = staging.failures(counted_attempts(args, task, kept))
    lengths = [staging.length(attempt) for attempt in kept]
    return {
        "instruction": task.language,
        "kept": len(kept),
        "discarded": len(reasons),
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "length_min": min(lengths, default=0),
        "length_max": max(lengths, default=0),
        "length_mean": float(np.mean(lengths)) if lengths else 0.0,
    }


def print_report(report: dict[int, dict[str, Any]]) -> None:
    """Prints a table of the tasks."""
    table = Table("task", "instruction", "kept", "discarded", "steps (min / mean / max)")
    for task_id, row in report.items():
        steps = f"{row['length_min']} / {row['length_mean']:.0f} / {row['length_max']}"
        counts = str(row["kept"]), str(row["discarded"])
        table.add_row(str(task_id), row["instruction"], *counts, steps)
    Console().print(table)


def main(args: Args, make_demonstrator: MakeDemonstrator = make_expert) -> dict[str, Any]:
    """Records, writes the dataset and returns the counts of each task.

    Raises:
        FileExistsError: the output exists.
        RuntimeError: a task has too few successful attempts.
    """
    check_args(args)

    # --- simulate, render, stage ---
    tasks = tasks_of(args)
    renderer = make_renderer(
        args.renderer,
        camera_names=DEFAULT_CAMERAS,
        image_size=args.image_size,
        num_worlds=args.render_batch_size,
    )
    # Without a name it is the machine's best, and another one draws other pixels.
    args = dataclasses.replace(args, renderer=cast(Any, renderer.name))
    try:
        staging = Staging(args.output.with_name(f"{args.output.name}.staged"), args)
        collect(args, tasks, staging, renderer, make_demonstrator)
    finally:
        renderer.close()

    # --- count ---
    numbered = {task_number(args.suite, task): task for task in tasks}
    kept = {number: plan(args, task, staging)[0] for number, task in numbered.items()}
    report: dict[int, dict[str, Any]] = {}
    for number, task in numbered.items():
        report[number] = count_outcomes(args, task, staging, kept[number])
    print_report(report)
    wanted = args.episodes_per_task
    short = {task_id: len(found) for task_id, found in kept.items() if len(found) < wanted}
    if short and not args.allow_fewer:
        raise RuntimeError(
            f"tasks {sorted(short)} have only {list(short.values())} of {wanted} episodes after "
            f"{args.max_attempts} attempts; raise --max-attempts-per-task, or write what there is "
            "with --allow-fewer"
        )

    # --- dataset ---
    assemble_dataset(
        args.output,
        [staging.folder / attempt.name for attempts in kept.values() for attempt in attempts],
        make_recording(args),
        version=args.version,
        modality=libero_modality(),
    )
    write_json(args.output / "meta" / "collection.json", {"args": args, "tasks": report})
    print(f"\ndataset      {args.output}")
    if not args.keep_staged:
        written = [
            attempt
            for number, task in numbered.items()
            for attempt in counted_attempts(args, task, kept[number])
        ]
        if left := staging.remove(written):
            print(f"staged       {len(left)} more attempts are kept in {staging.folder}")
    print(f"inspect      python tools/show_dataset.py --dataset {args.output}")
    return {"tasks": report}


if ARGS is not None:
    launch(main, ARGS)
