"""A film of two policies on the same tasks from the same initial states: the upper row before, the lower one after.

    python -m benchmarks.before_after --after CHECKPOINT --task-ids 3 5 8 9 --output docs/media/before_after.gif

A column is a task. Its two episodes begin in the same state with the same initial noise and follow the protocol of
`algorithms/eval_gr00t.py`; the pictures are drawn beside the smaller ones that the policies see. An episode that is
over keeps its last picture, framed in green if it succeeded and in red if not, until the longest is over. Every episode
that the arguments name is shown, and the film says which these are. An outcome can differ from that in a checkpoint's
evaluation.json, because rounding depends on how many episodes run together. Prints a line per episode, and one JSON
document on the last line.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast, get_args

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from algorithms.common.checkpoint_notes import suite_to_play
from algorithms.common.evaluation import evaluate
from algorithms.common.video import TASK_KEY, VIDEO_SUFFIXES, VIEW_SIZE, Frame, write_pictures
from algorithms.eval_gr00t import Args, make_envs, weights_digest
from benchmarks.command_line import LARGEST_SEED, integer, launch_benchmark, refusals, suite_name, tasks_of
from benchmarks.publish import publish
from gr00t_agent import Gr00tAgent
from libero_gym.conventions import CONTROL_FREQUENCY_HZ
from libero_gym.options import DEFAULT_CAMERAS
from libero_gym.rendering.renderers import make_renderer
from libero_gym.tasks.initial_states import InitStates, check_init_state_id, check_init_states

# Environment steps from one picture to the next, the film's speed by the robot's, and how long its last picture stays.
STRIDE, SPEED, FINAL_SECONDS = 5, 2, 2
LINE_HEIGHT, FONT_SIZE, MARGIN = 18, 12, 4
BLACK, GREEN, RED = (0, 0, 0), (26, 127, 55), (190, 40, 40)

Picture = NDArray[np.uint8]


class FilmedEnvs(gym.vector.VectorWrapper):
    """Keeps what each environment's first camera shows at its reset and after each step, until its episode ends.

    Attributes:
        frames: of each environment; one view of `VIEW_SIZE` pixels.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        self.frames: list[list[Frame]] = [[] for _ in range(env.num_envs)]
        kind, cameras = cast(Any, env.unwrapped).renderer_name, DEFAULT_CAMERAS[:1]
        self._renderer = make_renderer(kind, camera_names=cameras, image_size=VIEW_SIZE, num_worlds=env.num_envs)

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
        """Closes the environments and the renderer."""
        self._renderer.close()
        super().close(**kwargs)

    def _film(self, obs: Mapping[str, Any], infos: Mapping[str, Any], ended_mask: NDArray[np.bool_]) -> None:
        running = [i for i, frames in enumerate(self.frames) if not frames or not frames[-1].ended]
        worlds = cast(Any, self.env.unwrapped).simulations
        images = self._renderer.render([worlds[i] for i in running])  # [num_running, 1, H, W, 3]
        for i, views in zip(running, images, strict=True):
            told: dict[str, Any] = dict(task=str(obs[TASK_KEY][i]), step=int(infos["episode_length"][i]))
            told |= dict(reward=float(infos["episode_return"][i]), success=bool(infos["success"][i]))
            self.frames[i].append(Frame(views=views, ended=bool(ended_mask[i]), **told))


def film(args: Args, jobs: Sequence[tuple[int, int]]) -> list[list[Frame]]:
    """Runs the (task id, initial state id) of `jobs` side by side and returns the frames of each."""
    if args.checkpoint is None:
        raise ValueError("there is no checkpoint to film; give --checkpoint")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    agent = Gr00tAgent.load(args.checkpoint).to(device).eval()
    with closing(FilmedEnvs(make_envs(args, len(jobs), agent.policy.num_action_chunks, agent.image_size))) as envs:
        evaluate(agent, envs, jobs, seed=args.seeds)  # with an environment for each job, they start in this order
    return envs.frames


def draw_text(lines: Sequence[str], width: int, ground: tuple[int, int, int] = BLACK) -> Picture:
    """Returns lines of text on a ground `width` pixels wide."""
    picture = Image.new("RGB", (width, LINE_HEIGHT * len(lines)), ground)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=FONT_SIZE)
    for i, line in enumerate(lines):
        canvas.text((MARGIN, (i + 0.5) * LINE_HEIGHT), line, font=font, fill="white", anchor="lm")
    return np.asarray(picture)


def draw_tile(name: str, frame: Frame, size: int) -> Picture:
    """Returns a frame's view, `size` pixels high and wide, above a line that tells the policy, the step and the end."""
    end, color = ("success", GREEN) if frame.success else ("failure", RED) if frame.ended else ("", BLACK)
    view = Image.fromarray(frame.views[0]).resize((size, size), Image.Resampling.LANCZOS)
    if end:
        ImageDraw.Draw(view).rectangle((0, 0, size - 1, size - 1), outline=color, width=MARGIN)
    return np.concatenate([np.asarray(view), draw_text([f"{name}: step {frame.step} {end}"], size, color)])


def compose(rows: Mapping[str, Sequence[Sequence[Frame]]], caption: Sequence[str], size: int) -> Iterator[Picture]:
    """Yields the film's pictures, `STRIDE` environment steps apart, until the longest episode is over.

    Args:
        rows: by the policy's name, the frames of its episodes; a column each.
        caption: paragraphs below the rows.
        size: height and width of a view, pixels.
    """

    def wrapped(text: str, width: int) -> list[str]:
        return textwrap.wrap(text, 2 * width // FONT_SIZE)  # letters are half as wide as high

    tasks = [wrapped(episode[0].task, size) for episode in next(iter(rows.values()))]
    height, width = max(len(lines) for lines in tasks), size * len(tasks)
    header = np.concatenate([draw_text(lines + [""] * (height - len(lines)), size) for lines in tasks], axis=1)
    footer = draw_text([line for paragraph in caption for line in wrapped(paragraph, width)], width)
    for step in range(0, max(row[-1].step for episodes in rows.values() for row in episodes) + STRIDE, STRIDE):
        shown = {name: [[f for f in frames if f.step <= step][-1] for frames in row] for name, row in rows.items()}
        tiles = [np.concatenate([draw_tile(name, f, size) for f in row], axis=1) for name, row in shown.items()]
        yield np.concatenate([header, *tiles, footer])


def main(arguments: Sequence[str] | None = None) -> None:
    """Films what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="checkpoint of the upper row; default: checkpoints/<suite>_fewshot")
    parser.add_argument("--after", required=True, help="checkpoint of the lower row")
    parser.add_argument("--suite", type=suite_name, help="default: the one that both were trained on")
    parser.add_argument("--task-ids", type=integer(at_least=0), nargs="+", required=True, help="a column each")
    parser.add_argument("--init-state-id", type=integer(at_least=0), default=0, help="initial state of every episode")
    parser.add_argument("--init-states", choices=get_args(InitStates), help="default: the suite's own")
    parser.add_argument(
        "--seed",
        type=integer(at_least=0, at_most=LARGEST_SEED),
        default=0,
        help="of the initial noise and the environments",
    )
    parser.add_argument(
        "--horizon", type=integer(at_least=1), help="environment steps before an episode fails; default: the suite's"
    )
    parser.add_argument("--renderer", choices=["egl", "osmesa", "warp"], help="default: the best there is")
    parser.add_argument("--tile-size", type=int, default=192, help="height and width of a view, pixels, even")
    parser.add_argument("--output", type=Path, required=True, help=f"file that ends in {' or '.join(VIDEO_SUFFIXES)}")
    args = parser.parse_args(arguments)
    if args.output.suffix not in VIDEO_SUFFIXES or args.tile_size < 144 or args.tile_size % 2:
        parser.error(f"--output must end in {' or '.join(VIDEO_SUFFIXES)}, --tile-size be even and at least 144")
    with refusals(parser):
        known = (args.after,) if args.before is None else (args.before, args.after)
        args.suite = suite_to_play(args.suite, *known)
        args.before = args.before or f"checkpoints/{args.suite}_fewshot"
        kind = check_init_states(args.init_states, args.suite)
        for task in tasks_of(args.suite, args.task_ids):
            check_init_state_id(args.init_state_id, task, kind)
    jobs = [(task_id, args.init_state_id) for task_id in args.task_ids]
    settings: dict[str, Any] = dict(suite=args.suite, horizon=args.horizon, renderer=args.renderer, init_states=kind)
    checkpoints = {"before": args.before, "after": args.after}
    with refusals(parser):
        digests = {name: weights_digest(checkpoint) for name, checkpoint in checkpoints.items()}  # both are there
    rows: dict[str, list[list[Frame]]] = {}
    results: list[dict[str, Any]] = []
    for name, checkpoint in checkpoints.items():
        rows[name] = film(Args(checkpoint=checkpoint, seeds=(args.seed,), **settings), jobs)
        told = dict(row=name, checkpoint=checkpoint, weights_sha256=digests[name])
        for (task_id, state_id), (*_, last) in zip(jobs, rows[name], strict=True):
            results.append(told | dict(task_id=task_id, success=last.success, length=last.step))
            outcome = f"{'success' if last.success else 'failure'} after {last.step} steps"
            print(f"{name:6} task {task_id}, {kind} state {state_id}: {outcome}", flush=True)
    tasks = ", ".join(str(task_id) for task_id in args.task_ids)
    caption = [
        f"{args.suite}, tasks {tasks}, each from {kind} initial state {args.init_state_id}, seed {args.seed}, "
        f"{SPEED} x real time",
        f"before: {Path(args.before).name}, after: {Path(args.after).name}",
    ]
    pictures, fps = list(compose(rows, caption, args.tile_size)), SPEED * CONTROL_FREQUENCY_HZ / STRIDE
    write_pictures(args.output, [*pictures, *pictures[-1:] * round(FINAL_SECONDS * fps)], fps)
    height, width = pictures[0].shape[:2]
    print(f"{args.output}: {len(pictures)} pictures, {width} x {height}, {args.output.stat().st_size / 1e6:.2f} MB")
    protocol = settings | dict(init_state_id=args.init_state_id, seed=args.seed)
    publish("before_after", results, settings=protocol)


if __name__ == "__main__":
    launch_benchmark(main)
