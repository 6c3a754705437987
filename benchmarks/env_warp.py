"""Throughput of the GPU physics, and whether it agrees with the CPU's on what succeeds.

    python -m benchmarks.env_warp --suite libero_spatial --output benchmarks/results/env_warp_h200.json
    python -m benchmarks.env_warp --num-worlds 2048 --image-sizes 118 256 --compare libero_object libero_40
    python -m benchmarks.env_warp --num-worlds 2048 --num-chunks 3 --num-episodes 10

Throughput: `LiberoVectorEnv(physics="warp")` under random actions, chunks of five, automatic resets; without images,
and with both views of each size at the end of each chunk, left on the GPU. An environment step is 25 substeps of 2 ms.
`--compare` measures suites of several scenes with as many worlds and views of the first size, and tells their rates as
parts of that of `--suite`. With `--horizon 25 --num-warmup-chunks 15`, resets, and with them worlds that go to other
scenes, are part of what is timed, far more of them than training has. With `--num-worlds 4 --num-chunks 1 --image-sizes
16` a CPU does all of it. A row's GPU memory is what its worlds, scenes and views hold of Warp's memory pool after the
timed chunks; Warp tells the most that was ever in use of a whole process only.

Agreement: the actions of scripted experts, recorded on the CPU's physics, are replayed open-loop on the GPU's, which
may take up to five steps longer; and, to tell what chaos alone does to pushes and slides, on the CPU's from a start
whose joints are a millionth of a radian off.

The first run compiles kernels, which takes minutes; later ones find them in the cache. Needs neither LIBERO nor
robosuite where `LIBERO_GYM_SCENES` names a scene archive. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import warp as wp

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, suite_name, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.experts import ExpertEpisode, run_expert
from libero_gym.physics.simulation import Simulation
from libero_gym.physics.warp_groups import GroupedWarpWorlds, make_warp_worlds
from libero_gym.physics.warp_worlds import WarpOptions, WarpWorlds
from libero_gym.rendering.raycast import default_device, load_device_scene
from libero_gym.tasks.initial_states import EpisodeStart, check_init_states, count_init_states
from libero_gym.tasks.scenes import load_scene, scene_key
from libero_gym.tasks.suites import TaskSpec, list_tasks
from libero_gym.vector import LiberoVectorEnv

CHUNK = 5
EXTRA_STEPS = 5
PERTURBATION = 1e-6
# On one H200; images are both views every fifth step.
TARGET_WORLDS = 2048
TARGETS = {
    f"env_steps_per_s_{TARGET_WORLDS}": 40_000.0,
    f"env_steps_per_s_{TARGET_WORLDS}_118px": 25_000.0,
    f"env_steps_per_s_{TARGET_WORLDS}_256px": 14_000.0,
}
NO_IMAGES = "env_steps_per_s"
# Of 2,048 worlds without images: the rate of 10 scenes, and of all 32, to that of one.
SCENE_TARGETS = {"libero_object": 0.6, "libero_130": 0.4}


def with_images(size: int) -> str:
    """Returns the name of the rate with views of so many pixels."""
    return f"{NO_IMAGES}_{size}px"


def pool_bytes_in_use(device: str) -> int:
    """Returns the bytes of Warp's memory pool that are in use now; 0 on a CPU, which has none."""
    return 0 if device == "cpu" else wp.get_mempool_used_mem_current(device)


def measure_rate(
    args: argparse.Namespace, suite: str, num_worlds: int, *, image_size: int | None = None
) -> dict[str, float]:
    """Return env-steps/s under random actions, seconds to open and to run the first chunks, GPU memory in GiB, rows.

    `image_size` None draws nothing.
    """
    load_device_scene.cache_clear()  # or a row's scenes would be there already, or count as the next row's
    gc.collect()
    device = default_device()
    memory_before = pool_bytes_in_use(device)
    images: dict[str, Any] = dict(observe_images=False)
    if image_size is not None:
        images = dict(images_as_torch=True, image_size=image_size)
    start = time.perf_counter()
    env = LiberoVectorEnv(
        suite,
        num_worlds,
        physics="warp",
        num_action_chunks=CHUNK,
        horizon=args.horizon,
        warp_options=WarpOptions(solver_iterations=args.solver_iterations),
        autoreset_mode="SAME_STEP",
        **images,
    )
    worlds = env.worlds
    if not isinstance(worlds, WarpWorlds | GroupedWarpWorlds):
        raise TypeError(f"physics='warp' made a {type(worlds).__name__}")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    shape = (num_worlds, CHUNK, 7)
    for _ in range(args.num_warmup_chunks):
        env.step(rng.uniform(-1, 1, shape).astype(np.float32))
    wp.synchronize_device(device)
    opening = time.perf_counter() - start
    start, steps = time.perf_counter(), 0
    for _ in range(args.num_chunks):
        *_, infos = env.step(rng.uniform(-1, 1, shape).astype(np.float32))
        steps += int(infos["num_steps"].sum())
    wp.synchronize_device(device)
    rate = steps / (time.perf_counter() - start)
    memory = (pool_bytes_in_use(device) - memory_before) / 2**30
    num_rows = sum(worlds.num_rows) if isinstance(worlds, GroupedWarpWorlds) else num_worlds
    env.close()
    return {"env_steps_per_s": rate, "open_s": opening, "gpu_memory_gib": memory, "num_rows": num_rows}


def record_episodes(tasks: Sequence[TaskSpec], num_episodes: int, num_threads: int) -> list[ExpertEpisode]:
    """Run experts on the CPU's physics: tasks in turn, stored states 0, 1, 2 and so on."""
    choices = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(num_episodes)]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda choice: run_expert(Simulation(load_scene(choice[0])), *choice), choices))


def extend_actions(episode: ExpertEpisode) -> npt.NDArray[np.float32]:
    """Return the actions of an episode and a few more that stand still and hold what is held."""
    still = np.zeros((EXTRA_STEPS, 7), np.float32)
    still[:, 6] = episode.actions[-1, 6]
    return np.concatenate([episode.actions, still])


def replay_on_cpu(episode: ExpertEpisode) -> bool:
    """Return whether an episode's actions reach the goal on the CPU's physics from a start that is hardly another."""
    sim = Simulation(load_scene(episode.task))
    sim.reset(episode.task, episode.init_state_id, np.random.RandomState(episode.seed))
    noise = np.random.default_rng(episode.init_state_id).normal(0.0, PERTURBATION, 7)
    sim.data.qpos[sim.scene.robot.arm_qpos_adr] += noise
    return any(sim.step(action) for action in extend_actions(episode))


def replay(episodes: Sequence[ExpertEpisode], options: WarpOptions) -> list[bool]:
    """Return whether each episode's actions reach the goal on the GPU's physics, from the same state."""
    count = len(episodes)
    tasks = sorted({episode.task for episode in episodes}, key=lambda task: (task.suite, task.task_id))
    worlds = make_warp_worlds(tasks, count, options=options)
    starts = [EpisodeStart(task=e.task, init_state_id=e.init_state_id, placement_seed=e.seed) for e in episodes]
    worlds.reset(np.arange(count), starts, init_states="settled")
    actions = [extend_actions(episode) for episode in episodes]
    steps_left = np.array([len(sequence) for sequence in actions])
    is_active, has_succeeded = np.ones(count, np.bool_), np.zeros(count, np.bool_)
    for step in range(int(steps_left.max())):
        is_active &= ~has_succeeded & (step < steps_left)
        if not is_active.any():
            break
        now = np.stack([sequence[min(step, len(sequence) - 1)] for sequence in actions])
        has_succeeded |= worlds.step(now[:, None], is_active, steps_left)[1][:, 0]
    return has_succeeded.tolist()


def compare_outcomes(args: argparse.Namespace) -> dict[str, Any]:
    """Returns how many expert episodes succeed on the CPU's physics, on the GPU's, and on the CPU's from close by."""
    episodes = record_episodes(list_tasks(args.suite), args.num_episodes, args.num_threads)
    with ThreadPoolExecutor(args.num_threads) as pool:
        num_perturbed = sum(pool.map(replay_on_cpu, episodes))
    on_warp = replay(episodes, WarpOptions(solver_iterations=args.solver_iterations))
    agrees = [episode.success == success for episode, success in zip(episodes, on_warp, strict=True)]
    return {
        "num_episodes": len(episodes),
        "num_cpu_successes": sum(episode.success for episode in episodes),
        "num_warp_successes": sum(on_warp),
        "num_perturbed_cpu_successes": num_perturbed,
        "share": round(float(np.mean(agrees)), 4),
        "differing": [
            {"task_id": episode.task.task_id, "init_state_id": episode.init_state_id}
            for episode, is_same in zip(episodes, agrees, strict=True)
            if not is_same
        ],
    }


def compare_suites(args: argparse.Namespace, one_scene: dict[str, float]) -> list[dict[str, Any]]:
    """Measures suites of several scenes beside the last row of the table of one scene; prints and returns rows."""
    num_worlds = int(one_scene["num_worlds"])
    print()
    table = Table(
        {
            "suite": "<16",
            "scenes": ">7",
            "worlds": ">8",
            "rows": ">7",
            "env-steps/s": ">13.0f",
            "share": ">8.2f",
            f"{args.image_sizes[0]} px": ">13.0f",
            "share ": ">8.2f",
            "open s": ">9.1f",
            "GPU GiB": ">9.2f",
        }
    )
    size = args.image_sizes[0]
    images = with_images(size)
    table.add(args.suite, 1, num_worlds, num_worlds, one_scene[NO_IMAGES], 1.0, one_scene[images], 1.0, None, None)
    rows: list[dict[str, Any]] = []
    for suite in args.compare:
        plain = measure_rate(args, suite, num_worlds)
        drawn = measure_rate(args, suite, num_worlds, image_size=size)
        shares = [plain["env_steps_per_s"] / one_scene[NO_IMAGES], drawn["env_steps_per_s"] / one_scene[images]]
        rows.append(
            {
                "suite": suite,
                "num_scenes": len({scene_key(task) for task in list_tasks(suite)}),
                "num_worlds": num_worlds,
                "num_rows": plain["num_rows"],
                NO_IMAGES: round(plain["env_steps_per_s"], 1),
                "share": round(shares[0], 3),
                images: round(drawn["env_steps_per_s"], 1),
                "share_with_images": round(shares[1], 3),
                "open_s": round(plain["open_s"], 1),
                "gpu_memory_gib": round(drawn["gpu_memory_gib"], 2),
            }
        )
        table.add(*rows[-1].values())
    return rows


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for suites that cannot be compared, tasks that cannot run, and episodes that there are not."""
    tasks = tasks_of(args.suite)
    for suite in args.compare:
        tasks_of(suite)
    num_scenes = len({scene_key(task) for task in tasks})
    if args.compare and num_scenes > 1:
        raise ValueError(
            f"--suite {args.suite} has {num_scenes} scenes, and --compare needs one of a single scene, such as "
            "libero_spatial or libero_goal"
        )
    kind = check_init_states(None, args.suite)
    num_stored = len(tasks) * min(count_init_states(task, kind) for task in tasks)
    if args.num_episodes > num_stored:
        raise ValueError(f"--num-episodes {args.num_episodes}: {args.suite} has {num_stored} stored initial states")


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--suite",
        type=suite_name,
        default="libero_spatial",
        help="whose tasks; libero_spatial and libero_goal are of one scene",
    )
    parser.add_argument(
        "--compare",
        type=suite_name,
        nargs="+",
        default=[],
        help="suites of several scenes, at the last of --num-worlds",
    )
    count = integer(at_least=1)
    parser.add_argument("--num-worlds", type=count, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--num-chunks", type=count, default=6, help="chunks of five steps that are timed")
    parser.add_argument("--num-warmup-chunks", type=integer(at_least=0), default=1, help="chunks before these")
    parser.add_argument(
        "--horizon", type=count, help="steps of an episode; a suite's own is too long to reset within them"
    )
    parser.add_argument("--image-sizes", type=count, nargs="+", default=[256], help="pixels of both views")
    parser.add_argument(
        "--num-episodes", type=integer(at_least=0), default=50, help="replayed expert episodes; 0 for none"
    )
    parser.add_argument("--num-threads", type=count, default=len(os.sched_getaffinity(0)), help="to record them")
    parser.add_argument("--solver-iterations", type=count, default=WarpOptions().solver_iterations)
    args = parser.parse_args()
    with refusals(parser):
        check_options(args)

    columns = {"worlds": ">7", "env-steps/s": ">13.0f"} | {f"{size} px": ">13.0f" for size in args.image_sizes}
    table = Table(columns | {"open s": ">9.1f", "with images": ">13.1f", "GPU GiB": ">9.2f"})
    rates: list[dict[str, float]] = []
    for num_worlds in args.num_worlds:
        plain = measure_rate(args, args.suite, num_worlds)
        drawn = [measure_rate(args, args.suite, num_worlds, image_size=size) for size in args.image_sizes]
        rates.append(
            {
                "num_worlds": num_worlds,
                NO_IMAGES: round(plain["env_steps_per_s"], 1),
                **{
                    with_images(size): round(row["env_steps_per_s"], 1)
                    for size, row in zip(args.image_sizes, drawn, strict=True)
                },
                "open_s": round(plain["open_s"], 1),
                "open_with_images_s": round(drawn[0]["open_s"], 1),
                "gpu_memory_gib": round(max(row["gpu_memory_gib"] for row in drawn), 2),
            }
        )
        table.add(*rates[-1].values())
    scenes = compare_suites(args, rates[-1]) if args.compare else []
    agreement = compare_outcomes(args) if args.num_episodes else None
    if agreement is not None:
        print(
            f"expert episodes: {agreement['num_episodes']}; successes on the CPU {agreement['num_cpu_successes']}, "
            f"there from {PERTURBATION} rad off {agreement['num_perturbed_cpu_successes']}, "
            f"on the GPU {agreement['num_warp_successes']}; same outcome: {agreement['share']:.1%}"
        )

    values = {
        name.replace(NO_IMAGES, f"{NO_IMAGES}_{row['num_worlds']}"): rate
        for row in rates
        for name, rate in row.items()
        if name.startswith(NO_IMAGES)
    }
    wanted = {name: target for name, target in TARGETS.items() if name in values}
    for row in scenes:
        if (target := SCENE_TARGETS.get(row["suite"])) is not None and row["num_worlds"] == TARGET_WORLDS:
            name = f"{row['suite']}_share_of_one_scene"
            values[name], wanted[name] = row["share"], target
    names = ("suite", "num_chunks", "num_warmup_chunks", "horizon", "image_sizes", "solver_iterations")
    settings = {name: getattr(args, name) for name in names}
    return publish(
        "env_warp",
        {"rates": rates, "scenes": scenes, "agreement": agreement},
        settings=settings | {"action_chunk": CHUNK, "num_cameras": 2},
        targets=judge(values, at_least=wanted),
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
