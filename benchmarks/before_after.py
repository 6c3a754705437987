"""A film of two policies on the same tasks from the same initial states: the upper row before, the lower one after.

    python -m benchmarks.before_after --after CHECKPOINT --task-ids 3 5 8 9 --output docs/media/before_after.gif

A column is a task. Its two episodes start in the same state with the same initial noise and follow the protocol of
`algorithms/eval_gr00t.py`; the film's pictures are drawn besides what the policies see. An episode that is over keeps
its last picture, in a green frame if it succeeded and in a red one if it failed, until the longest is over. Nothing is
selected: every episode that the arguments name is shown, and the film says which these are. As everywhere, rounding
depends on the number of episodes run together, so that an episode can end otherwise than in a checkpoint's
evaluation.json. Prints a row per episode, and one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from algorithms.episode_log import EvalEpisode
from algorithms.eval_gr00t import Args, evaluate, make_envs, weights_digest
from algorithms.video import CONTROL_FREQUENCY_HZ, TASK_KEY, VIDEO_SUFFIXES, VIEW_SIZE, Frame, write_pictures
from benchmarks.hardware import describe_run
from gr00t_agent import Gr00tAgent
from libero_gym.env import DEFAULT_CAMERAS
from libero_gym.rendering import make_renderer
from libero_gym.simulation import check_init_states

LINE_HEIGHT, FONT_SIZE = 18, 12
BORDER = 4
BLACK, GREEN, RED = (0, 0, 0), (26, 127, 55), (190, 40, 40)
# Of the film, relative to the robot's time; and for how long its last picture stays.
SPEED, FINAL_SECONDS = 2.0, 2.0

Picture = NDArray[np.uint8]


class FilmedEnvs(gym.vector.VectorWrapper):
    """Keeps a picture of each environment's agent view at its reset and after each step until its episode ends.

    Attributes:
        frames: of each environment.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        self.frames: list[list[Frame]] = [[] for _ in range(env.num_envs)]
        self._renderer = make_renderer(
            cast(Any, env.unwrapped).renderer_name, camera_names=DEFAULT_CAMERAS[:1], image_size=VIEW_SIZE,
            num_worlds=env.num_envs,
        )  # fmt: skip

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environments; see the wrapped environment."""
        obs, infos = self.env.reset(seed=seed, options=options)
        self._film(obs, infos, np.zeros(self.num_envs, np.bool_))
        return obs, infos

    def step(self, actions: Any) -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Steps the environments; see the wrapped environment."""
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        self._film(obs, infos, terminated | truncated)
        return obs, rewards, terminated, truncated, infos

    def close(self, **kwargs: Any) -> None:
        """Closes the environments and what films them."""
        self._renderer.close()
        super().close(**kwargs)

    def _film(self, obs: Mapping[str, Any], infos: Mapping[str, Any], ended_mask: NDArray[np.bool_]) -> None:
        running = [i for i, frames in enumerate(self.frames) if not frames or not frames[-1].ended]
        worlds = cast(Any, self.env.unwrapped).simulations
        images = self._renderer.render([worlds[i] for i in running]) if running else ()
        for i, (image,) in zip(running, images, strict=True):  # one camera
            self.frames[i].append(
                Frame(
                    views=[image], task=str(obs[TASK_KEY][i]), step=int(infos["episode_length"][i]),
                    reward=float(infos["episode_return"][i]), success=bool(infos["success"][i]),
                    ended=bool(ended_mask[i]),
                )
            )  # fmt: skip


def film(args: Args, jobs: Sequence[tuple[int, int]]) -> tuple[list[EvalEpisode], list[list[Frame]]]:
    """Runs the (task id, initial state id) of `jobs` at once; returns their outcomes and frames in this order."""
    agent = Gr00tAgent.load(args.checkpoint).to(args.device).eval()
    with closing(FilmedEnvs(make_envs(args, len(jobs), agent.policy.num_action_chunks, agent.image_size))) as envs:
        episodes = evaluate(agent, envs, jobs, seed=args.seeds).episodes
    return sorted(episodes, key=lambda e: jobs.index((e.task_id, e.init_state_id))), envs.frames


def draw_text(lines: Sequence[str], width: int, ground: tuple[int, int, int] = BLACK) -> Picture:
    """Returns lines of text, `width` pixels wide."""
    picture = Image.new("RGB", (width, LINE_HEIGHT * len(lines)), ground)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    for i, line in enumerate(lines):
        canvas.text((BORDER, i * LINE_HEIGHT + 1), line, font=font, fill="white")
    return np.asarray(picture)


def draw_tile(name: str, frame: Frame, size: int) -> Picture:
    """Returns a frame's view, `size` pixels high and wide, over a line that says which policy, which step, and how."""
    outcome, color = ("success", GREEN) if frame.success else ("failure", RED) if frame.ended else ("", BLACK)
    view = Image.fromarray(frame.views[0]).resize((size, size), Image.Resampling.LANCZOS)
    if outcome:
        ImageDraw.Draw(view).rectangle((0, 0, size - 1, size - 1), outline=color, width=BORDER)
    return np.concatenate([np.asarray(view), draw_text([f"{name}: step {frame.step} {outcome}"], size, color)])


def compose(rows: Mapping[str, Sequence[Sequence[Frame]]], caption: str, stride: int, size: int) -> Iterator[Picture]:
    """Yields the pictures of the film, `stride` environment steps apart, until the longest episode is over.

    Args:
        rows: by name of the policy, the frames of its episodes, a column each.
        caption: text below the rows.
        stride: environment steps from one picture to the next.
        size: height and width of a tile's view, pixels.
    """
    episodes = [episode for row in rows.values() for episode in row]
    columns = [textwrap.wrap(episode[0].task, size // 6) for episode in next(iter(rows.values()))]
    height = max(len(lines) for lines in columns)
    header = np.concatenate([draw_text(lines + [""] * (height - len(lines)), size) for lines in columns], axis=1)
    footer = draw_text(textwrap.wrap(caption, header.shape[1] // 6), header.shape[1])
    for step in range(0, max(episode[-1].step for episode in episodes) + stride, stride):
        tiles = [
            [draw_tile(name, [f for f in episode if f.step <= step][-1], size) for episode in row]
            for name, row in rows.items()
        ]
        yield np.concatenate([header, *(np.concatenate(row, axis=1) for row in tiles), footer])


def main(arguments: Sequence[str] | None = None) -> None:
    """Films what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="checkpoints/libero_spatial_fewshot", help="checkpoint of the upper row")
    parser.add_argument("--after", required=True, help="checkpoint of the lower row")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task-ids", type=int, nargs="+", required=True, help="a column each")
    parser.add_argument("--init-state-id", type=int, default=0, help="initial state of every episode")
    parser.add_argument("--init-states", choices=["settled", "held_out", "original"], help="default: the suite's own")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise and the environments")
    parser.add_argument("--horizon", type=int, help="environment steps before an episode fails; default: the suite's")
    parser.add_argument("--renderer", choices=["egl", "osmesa", "warp"], help="default: the best there is")
    parser.add_argument("--tile-size", type=int, default=192, help="height and width of a view, pixels, even")
    parser.add_argument("--output", type=Path, required=True, help=f"a file that ends in {' or '.join(VIDEO_SUFFIXES)}")
    args = parser.parse_args(arguments)
    if args.output.suffix not in VIDEO_SUFFIXES or args.tile_size < 64 or args.tile_size % 2:
        parser.error(f"--output must end in {' or '.join(VIDEO_SUFFIXES)}, --tile-size be even and at least 64")
    jobs = [(task_id, args.init_state_id) for task_id in args.task_ids]
    kind = check_init_states(args.init_states, args.suite)
    protocol = {"suite": args.suite, "init_states": kind, "init_state_id": args.init_state_id, "seed": args.seed}
    rows: dict[str, list[list[Frame]]] = {}
    results: list[dict[str, Any]] = []
    for name, checkpoint in (("before", args.before), ("after", args.after)):
        options = Args(
            checkpoint=checkpoint, suite=args.suite, seeds=(args.seed,), horizon=args.horizon, renderer=args.renderer,
            init_states=kind,
        )  # fmt: skip
        episodes, rows[name] = film(options, jobs)
        results.append({"row": name, "checkpoint": checkpoint, "weights_sha256": weights_digest(checkpoint)})
        results[-1]["episodes"] = [asdict(episode) for episode in episodes]
        for e in episodes:
            outcome = f"{'success' if e.success else 'failure'} after {e.length} steps"
            print(f"{name:7} task {e.task_id}, {kind} state {e.init_state_id}: {outcome}", flush=True)
    tasks = ", ".join(str(task_id) for task_id in args.task_ids)
    caption = (
        f"{args.suite}, tasks {tasks}, each from {kind} initial state {args.init_state_id}, seed {args.seed}; "
        f"{SPEED:g} times as fast as the robot. Before: {Path(args.before).name}. After: {Path(args.after).name}."
    )
    stride = min(np.diff([frame.step for frame in episode])[0] for row in rows.values() for episode in row)
    pictures = list(compose(rows, caption, int(stride), args.tile_size))
    fps = SPEED * CONTROL_FREQUENCY_HZ / stride
    write_pictures(args.output, [*pictures, *pictures[-1:] * round(FINAL_SECONDS * fps)], fps)
    height, width = pictures[0].shape[:2]
    print(f"{args.output}: {len(pictures)} pictures, {width} x {height}, {args.output.stat().st_size / 1e6:.2f} MB")
    print(json.dumps({"benchmark": "before_after", **describe_run(), "protocol": protocol, "results": results}))


if __name__ == "__main__":
    main()
