"""Throughput of the vector environment against LIBERO's own environments in worker processes.

    python -m benchmarks.env_vector --num-envs 8 --num-threads 1 2

Ours: `LiberoVectorEnv`, chunks of 5 actions, both images at the end of a chunk. LIBERO's: one
`OffScreenRenderEnv` a process under `gymnasium.vector.AsyncVectorEnv`, which draws both images at every step since it
cannot do otherwise. Without OpenGL (`--gl none`, or nothing found) LIBERO's environment runs without images, and the
ratio says so: it then compares our images with none. Random actions. Both deal the same tasks to their environments in
turn, the suite's first ones: as many as there are, or as the side with fewer environments can hold. Prints a table,
then one JSON line.

Cores do not all run at the pace of one: clock, caches and memory are shared, and a virtual machine's cores may be
threads of fewer. "Simulations alone" is what as many threads reach in two seconds, each of which steps simulations of
its own, one of each task, a chunk of each in turn, without images or waiting for each other; `thread_efficiency` is
ours over equal pace, `machine_efficiency` is theirs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from benchmarks.command_line import integer, launch_benchmark, make_parser, refusals, suite_name, tasks_of
from benchmarks.publish import Table, judge, publish
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, list_tasks
from libero_gym.vector import LiberoVectorEnv

CHUNK = 5
GL_KINDS = ("egl", "osmesa")
# On one H100 with 16 cores, against LIBERO with EGL, in these sizes.
TARGET_SIZES = {"num_envs": 64, "image_size": 256}
TARGETS = {"env_steps_per_s": 2000.0, "ratio": 6.0, "thread_efficiency": 0.85}


class LiberoReference(gymnasium.Env[dict[str, Any], npt.NDArray[np.float32]]):
    """LIBERO's environment of one task, with images ("osmesa", "egl") or without ("none")."""

    def __init__(self, task: TaskSpec, image_size: int, gl: str) -> None:
        """Import LIBERO, which must happen in the worker's own process."""
        os.environ["MUJOCO_GL"] = "disabled" if gl == "none" else gl
        from libero_gym.tasks.scene_builder import import_libero, make_reference_env

        spaces: dict[str, gymnasium.spaces.Space[Any]] = {
            "states": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        }
        if gl == "none":
            self._env = make_reference_env(task.bddl_file)
        else:
            self._env = import_libero().env_wrapper.OffScreenRenderEnv(
                bddl_file_name=str(task.bddl_file), camera_heights=image_size, camera_widths=image_size
            )
            image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
            spaces |= {"agentview_image": image, "robot0_eye_in_hand_image": image}
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self._env.seed(0 if seed is None else seed)
        return self._select(self._env.reset()), {}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advance; success does not end the episode, so that the work is the same throughout."""
        observation, reward, _, _ = self._env.step(action)
        return self._select(observation), float(reward), False, False, {}

    def close(self) -> None:
        """Release LIBERO's environment."""
        self._env.close()

    def _select(self, observation: dict[str, Any]) -> dict[str, Any]:
        names = {"states": "robot0_eef_pos"}
        return {key: observation[names.get(key, key)] for key in self.observation_space}  # pyright: ignore


def has_gl(kind: str) -> bool:
    """Return whether "egl" or "osmesa" opens a context, in a process of its own."""
    probe = f"from libero_gym.rendering.renderers import GlRenderer; GlRenderer({kind!r}, (), 8).describe_device()"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def find_gl() -> str:
    """Return "egl" or "osmesa", whichever opens a context, else "none"."""
    return next(filter(has_gl, GL_KINDS), "none")


def shared_tasks(suite: str, *counts: int) -> list[TaskSpec]:
    """Return the tasks that sides of so many environments can all have: a suite's first ones.

    Raises:
        ValueError: no such suite, or one of these tasks needs assets that are not installed.
    """
    num_tasks = min(len(list_tasks(suite)), *counts)
    return tasks_of(suite, range(num_tasks))


def measure_ours(args: argparse.Namespace, num_tasks: int, num_threads: int) -> dict[str, Any]:
    """Return env-steps/s of the vector environment, and the seconds to open and reset it."""
    start = time.perf_counter()
    env = LiberoVectorEnv(
        args.suite,
        args.num_envs,
        task_ids=range(num_tasks),
        num_action_chunks=CHUNK,
        image_size=args.image_size,
        num_threads=num_threads,
        renderer=args.renderer,
        autoreset_mode="SAME_STEP",
    )
    env.reset(seed=0, options={"task_id": np.arange(args.num_envs) % num_tasks})
    opening = time.perf_counter() - start
    rng = np.random.default_rng(0)
    shape = (args.num_envs, CHUNK, 7)
    env.step(rng.uniform(-1, 1, shape).astype(np.float32))
    start, steps = time.perf_counter(), 0
    for _ in range(args.num_chunks):
        *_, infos = env.step(rng.uniform(-1, 1, shape).astype(np.float32))
        steps += int(infos["num_steps"].sum())
    rate = steps / (time.perf_counter() - start)
    result = {"env": "ours", "renderer": env.renderer_name, "num_threads": num_threads}
    env.close()
    return {**result, "env_steps_per_s": rate, "open_and_reset_s": opening}


def measure_simulations(tasks: Sequence[TaskSpec], num_chunks: int, num_threads: int) -> dict[str, Any]:
    """Return env-steps/s of threads that each step simulations of their own, one a task, for two seconds."""
    actions = np.random.default_rng(0).uniform(-1, 1, (num_threads, num_chunks, CHUNK, 7))
    simulations: list[list[Simulation]] = []
    for i in range(num_threads):
        own = [Simulation(load_scene(task)) for task in tasks]
        for task, simulation in zip(tasks, own, strict=True):
            simulation.reset(task, 0, np.random.RandomState(i))
        simulations.append(own)

    def step_until(end: float, own: list[Simulation], actions: npt.NDArray[np.float64]) -> int:
        num_turns = 0
        while time.perf_counter() < end:
            simulation = own[num_turns % len(own)]
            for action in actions[num_turns % len(actions)]:
                simulation.step(action)
            num_turns += 1
        return num_turns * CHUNK

    with ThreadPoolExecutor(num_threads) as pool:
        for seconds in (0.2, 2.0):  # the first is warm-up
            start = time.perf_counter()
            steps = sum(pool.map(partial(step_until, start + seconds), simulations, actions))
            rate = steps / (time.perf_counter() - start)
    return {"env": "simulations alone", "num_threads": num_threads, "env_steps_per_s": rate}


def measure_libero(args: argparse.Namespace, tasks: Sequence[TaskSpec], gl: str) -> dict[str, Any]:
    """Return env-steps/s of LIBERO's environments, one in a process."""
    start = time.perf_counter()
    factories = [
        partial(LiberoReference, tasks[i % len(tasks)], args.image_size, gl) for i in range(args.num_reference_envs)
    ]
    env = gymnasium.vector.AsyncVectorEnv(factories, context="spawn")
    env.reset(seed=0)
    opening = time.perf_counter() - start
    rng = np.random.default_rng(0)
    shape = (args.num_reference_envs, 7)
    env.step(rng.uniform(-1, 1, shape).astype(np.float32))
    start = time.perf_counter()
    for _ in range(args.num_chunks * CHUNK):
        env.step(rng.uniform(-1, 1, shape).astype(np.float32))
    rate = args.num_chunks * CHUNK * args.num_reference_envs / (time.perf_counter() - start)
    env.close()
    result = {"env": "LIBERO", "renderer": gl, "num_processes": args.num_reference_envs}
    return {**result, "env_steps_per_s": rate, "open_and_reset_s": opening}


def efficiency(results: list[dict[str, Any]]) -> float:
    """Return the speed-up from the first to the last of `results`, over that of their number of threads."""
    first, last = results[0], results[-1]
    return last["env_steps_per_s"] / first["env_steps_per_s"] * first["num_threads"] / last["num_threads"]


def main() -> dict[str, Any]:
    """Measures, prints, returns the document."""
    parser = make_parser(__doc__)
    count = integer(at_least=1)
    parser.add_argument("--suite", type=suite_name, default="libero_spatial")
    parser.add_argument("--num-envs", type=count, default=8)
    parser.add_argument("--num-reference-envs", type=count, help="default: one a core, at most num-envs")
    parser.add_argument("--num-threads", type=count, nargs="+", help="default: 1, 2, 4 .. all cores")
    parser.add_argument("--num-chunks", type=count, default=10)
    parser.add_argument("--image-size", type=count, default=256)
    parser.add_argument("--renderer", choices=(*GL_KINDS, "warp"), help="ours")
    parser.add_argument("--gl", choices=(*GL_KINDS, "none"), help="LIBERO's; default: what is found")
    args = parser.parse_args()
    for option, kind in (("--renderer", args.renderer), ("--gl", args.gl)):
        if kind in GL_KINDS and not has_gl(kind):
            parser.error(f"{option} {kind} opens no context here (found: {find_gl()}); leave it out to take what is")
    cores = len(os.sched_getaffinity(0))
    args.num_reference_envs = args.num_reference_envs or min(cores, args.num_envs)
    threads = args.num_threads or sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})
    gl = args.gl or find_gl()
    with refusals(parser):
        tasks = shared_tasks(args.suite, args.num_envs, args.num_reference_envs)

    table = Table(
        {"environment": "<34", "threads or processes": ">22", "env-steps/s": ">13.1f", "open + reset s": ">16.1f"}
    )
    theirs = measure_libero(args, tasks, gl)
    name = "LIBERO WITHOUT IMAGES (no OpenGL)" if gl == "none" else f"LIBERO ({gl})"
    table.add(name, args.num_reference_envs, theirs["env_steps_per_s"], theirs["open_and_reset_s"])
    ours: list[dict[str, Any]] = []
    for num_threads in threads:
        ours.append(row := measure_ours(args, len(tasks), num_threads))
        table.add(f"ours ({row['renderer']})", num_threads, row["env_steps_per_s"], row["open_and_reset_s"])
    alone: list[dict[str, Any]] = []
    for num_threads in threads:
        alone.append(row := measure_simulations(tasks, args.num_chunks, num_threads))
        table.add("simulations alone", num_threads, row["env_steps_per_s"], None)

    best = max(row["env_steps_per_s"] for row in ours)
    ratio = best / theirs["env_steps_per_s"]
    print(f"ratio: {ratio:.2f}" + (" (our images against none)" if gl == "none" else ""))
    values = {"env_steps_per_s": best, "ratio": ratio, "thread_efficiency": efficiency(ours)}
    settings = {key: getattr(args, key) for key in ("suite", "num_envs", "num_chunks", "image_size")}
    settings |= {"num_tasks": len(tasks), "action_chunk": CHUNK, "reference_has_images": gl != "none"}
    is_aimed_at = gl == "egl" and all(settings[name] == size for name, size in TARGET_SIZES.items())
    return publish(
        "env_vector",
        {"rates": [theirs, *ours, *alone], **values, "machine_efficiency": efficiency(alone)},
        settings=settings,
        targets=judge(values, at_least=TARGETS) if is_aimed_at else None,
        output=args.output,
    )


if __name__ == "__main__":
    launch_benchmark(main)
