"""Watch a task, or steer it: `python -m libero_gym.play --suite libero_spatial --task-id 3`.

    python -m libero_gym.play --task-id 3                                  # by its scripted expert, in a window
    python -m libero_gym.play --task-id 3 --policy keyboard                # by you
    python -m libero_gym.play --task-id 3 --policy path/to/file.py:make    # by a policy of your own
    python -m libero_gym.play --task-id 3 --video runs/films               # without a display: mp4, 20 frames a second

`path/to/file.py:make` names a function in a file, `package.module:make` one of a module in the current folder or what
is installed. The function takes no arguments and returns the policy: a function of the environment's observation (see
`libero_gym.LiberoEnv`) that returns actions [7] or [C, 7], or a policy as `algorithms/eval_gr00t.py` evaluates it
(`gr00t_agent.Policy`), whose noise is drawn from the episode's seed.

Keys: arrows move the hand over the table as the picture shows it, W and S up and down; J and L turn it, I and K tilt
it forth and back, U and O sideways; space closes the gripper while it is held; backspace starts anew, escape ends. A
window needs pygame, a film MoviePy: `pip install ".[watch]"`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import DependencyNotInstalled
from gymnasium.wrappers import RecordVideo

from libero_gym.conventions import ACTION_DIM
from libero_gym.env import LiberoEnv
from libero_gym.experts import HUMAN_LIKE, make_expert
from libero_gym.options import DEFAULT_IMAGE_SIZE, DEFAULT_RENDER_SIZE
from libero_gym.outputs import check_output_folder
from libero_gym.own_policies import EvaluatedPolicy, is_for_evaluations, load_factory
from libero_gym.tasks.suites import get_task
from libero_gym.window import Window, check_usable

Policy = Callable[[dict[str, Any]], npt.ArrayLike]

_POLICIES = ("expert", "keyboard", "random")

# Key -> (index of the action, its value). The agent view looks at the robot: x comes towards it, y goes to its right.
_KEYS = {
    "up": (0, -1.0),
    "down": (0, 1.0),
    "left": (1, -1.0),
    "right": (1, 1.0),
    "s": (2, -1.0),
    "w": (2, 1.0),
    "u": (3, -1.0),
    "o": (3, 1.0),
    "i": (4, -1.0),
    "k": (4, 1.0),
    "l": (5, -1.0),
    "j": (5, 1.0),
}
_KEY_SPEED = 0.5


def keyboard_action(keys: Collection[str]) -> npt.NDArray[np.float32]:
    """Return the action, float32 [7], of the keys that are held down."""
    action = np.zeros(ACTION_DIM, np.float32)
    for key in keys:
        if key in _KEYS:
            index, value = _KEYS[key]
            action[index] += _KEY_SPEED * value
    action[6] = 1.0 if "space" in keys else -1.0
    return action


def load_policy(name: str) -> Policy:
    """Return the policy of `package.module:make` or `path/to/file.py:make`.

    Raises:
        ValueError: there is no such module or function, or what it returns is no policy.
        FileNotFoundError: there is no such file.
        DependencyNotInstalled: it is one for evaluations, and there is no PyTorch.
    """
    if ":" not in name:
        nearest = difflib.get_close_matches(name, _POLICIES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        valid = ", ".join(map(repr, _POLICIES))
        raise ValueError(
            f"policy={name!r} is unknown{hint} (valid: {valid}, package.module:make, path/to/file.py:make)"
        )
    policy = load_factory(name)()
    if is_for_evaluations(policy):
        return EvaluatedPolicy(name, policy)
    if not callable(policy):
        raise ValueError(
            f"policy={name!r} returned {policy!r}; expected a function of the observation that returns actions "
            f"[{ACTION_DIM}] or [C, {ACTION_DIM}], or a policy for evaluations (gr00t_agent.Policy)"
        )
    return cast("Policy", policy)


def play(
    env: gymnasium.Env[Any, Any],
    policy: str | Policy,
    *,
    num_episodes: int,
    seed: int,
    init_state_id: int | None,
    window: Window | None,
) -> list[bool]:
    """Run episodes and return which of them succeeded; the keyboard may end early.

    Args:
        env: a `LiberoEnv`, wrapped or not.
        policy: "expert", "keyboard", "random", or what `load_policy` returned.
        num_episodes: how many.
        seed: of the first episode; each further one has the next. It decides the policy's noise, too.
        init_state_id: initial state of all; None samples one for each.
        window: shows each step; None where a film is made.

    Raises:
        ValueError: the policy's actions are of another shape.
    """
    world: LiberoEnv = env.unwrapped  # pyright: ignore[reportAssignmentType]
    successes: list[bool] = []
    while len(successes) < num_episodes:
        episode = len(successes)
        options = {} if init_state_id is None else {"init_state_id": init_state_id}
        observation, info = env.reset(seed=seed + episode, options=options)
        print(f"{world.task.suite} task {world.task.task_id}, state {info['init_state_id']}: {world.task.language}")
        env.action_space.seed(seed + episode)  # what the policy "random" draws from
        expert = None
        if policy == "expert":
            expert = make_expert(world.task, HUMAN_LIKE)
            expert.reset(world.simulation, np.random.default_rng(seed + episode))
        if isinstance(policy, EvaluatedPolicy):
            policy.begin_episode(seed + episode)
        is_over, actions = False, np.zeros((0, ACTION_DIM), np.float32)
        while not is_over:
            keys: list[str] = []
            if window is not None:
                frame = world.render()
                assert frame is not None
                window.show(frame)
                keys = window.pressed_keys()
            if "quit" in keys or "escape" in keys:
                return successes
            if "backspace" in keys:
                break
            if not len(actions):
                if not isinstance(policy, str):
                    chosen = policy(observation)
                elif expert is not None:
                    chosen = expert.act(world.simulation)
                else:
                    chosen = keyboard_action(keys) if policy == "keyboard" else env.action_space.sample()
                actions = _as_chunk(chosen)
            observation, _, terminated, truncated, info = env.step(actions[0])
            actions = actions[1:]
            is_over = bool(terminated or truncated)
        if is_over:
            successes.append(bool(info["success"]))
            print(f"  {'success' if successes[-1] else 'failure'} after {info['episode_length']} steps")
    return successes


def _as_chunk(chosen: npt.ArrayLike) -> npt.NDArray[np.float32]:
    actions = np.asarray(chosen, np.float32)
    if actions.ndim not in (1, 2) or actions.shape[-1] != ACTION_DIM or not actions.size:
        raise ValueError(
            f"the policy's actions have shape {actions.shape}; expected ({ACTION_DIM},) or (C, {ACTION_DIM})"
        )
    return actions.reshape(-1, ACTION_DIM)


def _tell(parser: argparse.ArgumentParser, error: Exception) -> NoReturn:
    """End the program with a message, or, by `python -X dev`, with the traceback."""
    if sys.flags.dev_mode:
        raise error
    parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> list[bool]:
    """Run what the command line asks for; return which episodes succeeded."""
    parser = argparse.ArgumentParser(
        prog="python -m libero_gym.play", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="libero_spatial", help="suite, see libero_gym.list_suites()")
    parser.add_argument("--task-id", type=int, default=0, help="task of the suite")
    parser.add_argument("--init-state-id", type=int, help="initial state; sampled if left out")
    parser.add_argument(
        "--policy", default="expert", help="expert, keyboard, random, or FILE.py:FUNCTION or MODULE:FUNCTION"
    )
    parser.add_argument("--num-episodes", type=int, default=1, help="how many episodes")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--horizon", type=int, help="steps until an episode is cut; the suite's if left out")
    parser.add_argument("--render-size", type=int, default=DEFAULT_RENDER_SIZE, help="height and width, pixels")
    parser.add_argument("--video", type=Path, metavar="FOLDER", help="write films there instead of opening a window")
    args = parser.parse_args(arguments)
    if args.num_episodes < 1:
        parser.error(f"--num-episodes {args.num_episodes} is not a positive number of episodes")
    if args.policy == "keyboard" and args.video is not None:
        parser.error("--policy keyboard needs a window; leave --video out")
    try:
        if args.video is not None:
            check_output_folder("video", args.video)
        get_task(args.suite, args.task_id)
    except (ValueError, OSError, ImportError) as error:
        _tell(parser, error)
    try:
        policy = args.policy if args.policy in _POLICIES else load_policy(args.policy)
    except (ValueError, OSError, DependencyNotInstalled) as error:
        _tell(parser, error)
    closing = contextlib.ExitStack()
    try:
        if args.video is None:
            check_usable()
        env: gymnasium.Env[Any, Any] = gymnasium.make(
            f"libero_gym/{args.suite}-v0",
            task_id=args.task_id,
            horizon=args.horizon,
            observe_images=not isinstance(policy, str),
            image_size=getattr(policy, "image_size", DEFAULT_IMAGE_SIZE),
            render_mode="rgb_array",
            render_size=args.render_size,
        )
        window = None
        if args.video is None:
            window = Window(args.render_size, fps=env.metadata["render_fps"], caption=f"{args.suite} {args.task_id}")
            closing.callback(window.close)
        else:
            name = f"{args.suite}-{args.task_id}"
            env = RecordVideo(env, str(args.video), episode_trigger=lambda episode: True, name_prefix=name)
        closing.callback(env.close)  # writes the last film
        successes = play(
            env, policy, num_episodes=args.num_episodes, seed=args.seed, init_state_id=args.init_state_id, window=window
        )
    except (ValueError, DependencyNotInstalled, RuntimeError, gymnasium.error.Error) as error:
        _tell(parser, error)
    finally:
        closing.close()
    if args.video is not None:
        print(f"films        {args.video}")
    return successes


if __name__ == "__main__":
    main()
