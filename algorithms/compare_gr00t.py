"""Policies side by side: each plays the same episodes, and one film shows all of them.

    python algorithms/compare_gr00t.py --checkpoints checkpoints/libero_spatial_fewshot checkpoints/libero_spatial_rl

The protocol is that of eval_gr00t.py, over fewer episodes: every chosen task from each of its first
`episodes_per_task` stored initial states, without exploration, with the same initial noise for all
policies. Leaves comparison.json and comparison.mp4: a row for each policy in the order given, a
column for each task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from algorithms.common.args import check_folder, check_ranges
from algorithms.common.checkpoint_notes import suite_to_play
from algorithms.common.command_line import launch, parse_args
from algorithms.common.jobs import evaluation_jobs
from libero_gym.outputs import check_output_folder


@dataclass(kw_only=True)
class Args:
    """Command-line arguments; each one's help follows it."""

    checkpoints: tuple[str, ...]
    """Folders or hub ids of the policies, at least two."""
    suite: str | None = None
    """LIBERO suite; if not given, the one that all of them were trained on, if they say so."""
    task_ids: tuple[int, ...] | None = None
    """Tasks to play; all of the suite if not given."""
    episodes_per_task: int = 1
    """Stored initial states per task, from the first on."""
    seed: int = 0
    """Seed of the initial noise and of the environments."""
    num_envs: int = 10
    """Environments that the episodes stream through."""
    horizon: int | None = None
    """Environment steps before an episode counts as failed; the suite's own if not given."""
    renderer: Literal["egl", "osmesa", "warp"] | None = None
    """Renderer; if not given, the best that the machine has."""
    output_dir: Path = Path("runs/comparison")
    """Where the result and the film are written."""
    since: float | None = None
    """Seconds since 1970 from which the whole time is told; this program's start if not given."""

    @cached_property
    def played_suite(self) -> str:
        """The suite that is played; raises ValueError if neither `suite` nor the checkpoints say it."""
        return suite_to_play(self.suite, *self.checkpoints)


def check_args(args: Args) -> None:
    """Raises ValueError or OSError for arguments that would otherwise fail late."""
    check_ranges(args)
    check_output_folder("output_dir", args.output_dir)
    if len(args.checkpoints) < 2 or len(set(args.checkpoints)) < len(args.checkpoints):
        raise ValueError(f"checkpoints={args.checkpoints} must be two or more different ones")
    for checkpoint in args.checkpoints:
        check_folder("checkpoints", checkpoint, "for example checkpoints/libero_spatial_rl")
    evaluation_jobs(args.played_suite, args.task_ids, args.episodes_per_task)


# Before PyTorch is imported, which takes seconds: a mistake on the command line is told at once.
ARGS = parse_args(Args, __doc__, None, check_args) if __name__ == "__main__" else None

import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode

from algorithms.common.evaluation import (
    EvalResult,
    ToldEpisodes,
    evaluate,
    success_in_words,
    video_path,
)
from algorithms.common.report import duration
from algorithms.common.video import (
    CONTROL_FREQUENCY_HZ,
    Picture,
    read_pictures,
    titled,
    write_tiled_video,
)
from gr00t_agent import Gr00tAgent
from gr00t_agent.files import write_json
from gr00t_agent.loading import saved_data_config
from libero_gym.adapters import ModalityVectorObservation


def play(args: Args, checkpoint: str, video_dir: Path) -> tuple[EvalResult, float]:
    """Returns what the policy of `checkpoint` does, and how many decisions a second it makes in robot time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    agent = Gr00tAgent.load(checkpoint).to(device).eval()
    jobs = evaluation_jobs(args.played_suite, args.task_ids, args.episodes_per_task)
    chunk = agent.policy.num_action_chunks
    envs = gym.make_vec(
        f"libero_gym/{args.played_suite}-v0",
        num_envs=min(args.num_envs, len(jobs)),
        vectorization_mode="vector_entry_point",
        num_action_chunks=chunk,
        image_size=agent.image_size,
        horizon=args.horizon,
        renderer=args.renderer,
        autoreset_mode=AutoresetMode.DISABLED,
    )
    with closing(ModalityVectorObservation(envs)) as envs:
        result = evaluate(
            agent,
            envs,
            jobs,
            seed=args.seed,
            record=lambda _, init_state_id: init_state_id == 0,
            video_dir=video_dir,
            log=ToldEpisodes(len(jobs), f"{Path(checkpoint).name}: "),
        )
    return result, CONTROL_FREQUENCY_HZ / chunk


def main(args: Args) -> dict[str, EvalResult]:
    """Plays, prints the rates, writes comparison.json and comparison.mp4, returns results by checkpoint."""
    check_args(args)
    for checkpoint in args.checkpoints:
        saved_data_config(
            checkpoint
        )  # whether all can be read, before the first one plays for minutes
    start = time.time() if args.since is None else args.since
    results: dict[str, EvalResult] = {}
    films: list[Iterable[Picture]] = []
    fps, num_columns = 0.0, 0
    for i, checkpoint in enumerate(args.checkpoints):
        video_dir = args.output_dir / "videos" / str(i)
        results[checkpoint], fps = play(args, checkpoint, video_dir)
        filmed = [e for e in results[checkpoint].episodes if e.init_state_id == 0]
        num_columns = len(filmed)
        films += [
            titled(read_pictures(video_path(video_dir, episode)), Path(checkpoint).name)
            for episode in filmed
        ]

    film = args.output_dir / "comparison.mp4"
    write_tiled_video(film, films, fps, columns=num_columns)
    table = {checkpoint: result.rows() for checkpoint, result in results.items()}
    arguments = asdict(args) | {"suite": args.played_suite}
    write_json(args.output_dir / "comparison.json", {"arguments": arguments, "tables": table})

    num_episodes = len(next(iter(results.values())).episodes)
    print(f"{args.played_suite}: the same {num_episodes} episodes from the tasks' own starts")
    width = max(len(Path(checkpoint).name) for checkpoint in results)
    for checkpoint, rows in table.items():
        print(f"  {Path(checkpoint).name:{width}} {success_in_words(rows[-1])}")
    print(f"  film {film}")
    print(f"time {duration(time.time() - start)} in all")
    return results


if ARGS is not None:
    launch(main, ARGS)
