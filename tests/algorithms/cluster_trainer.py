"""The asynchronous trainer on the line environment, in this process (`train`) or as a program (`command`)."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gymnasium.vector import AutoresetMode

from algorithms import async_ppo_gr00t
from examples.own_agent_in_ppo import MLPAgent
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import DEFAULTS, SlowLineEnv, make_mlp_agent

NAME = "async_ppo_libero_spatial_1"


class Marks:
    """Files by which the processes of a run, and the test, tell each other what has happened; each holds an id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, name: str) -> bool:
        """Returns whether it was not set before."""
        written = self.folder / f".{os.getpid()}"
        if not written.exists():  # a mark that is set already is this file, and is read while others are set
            written.write_text(str(os.getpid()))
        try:
            os.link(written, self.folder / name)
        except FileExistsError:
            return False
        return True

    def kill(self, name: str) -> None:
        """Ends this process, once among all."""
        if self.set(name):
            os.kill(os.getpid(), signal.SIGKILL)


class MarkedEnv(SlowLineEnv):
    marks: Marks

    def step(self, actions: Any) -> Any:
        self.marks.set("env worker")
        return super().step(actions)


class DyingEnv(LineVectorEnv):
    """Dies as it is first reset, and has the rollout worker killed as it is reset again."""

    marks: Marks

    def reset(self, **options: Any) -> Any:
        self.marks.kill("env worker")
        if self.marks.set("killed rollout worker"):
            os.kill(int((self.marks.folder / "decider").read_text()), signal.SIGKILL)
        return super().reset(**options)


class DyingTwiceEnv(LineVectorEnv):
    """Dies as it is reset the first and the second time."""

    marks: Marks

    def reset(self, **options: Any) -> Any:
        self.marks.kill("first reset")
        self.marks.kill("second reset")
        return super().reset(**options)


class DyingAgent(MLPAgent):
    """Dies while it decides the second rollout, and while it learns from the second."""

    marks: Marks
    calls = 0

    @property
    def image_size(self) -> int:  # type: ignore[override]
        """Only rollout workers are asked for it."""
        self.marks.set("decider")
        return MLPAgent.image_size

    def forward(self, obs: Any, action: Any = None, *, generator: Any = None) -> Any:
        self.calls += 1
        if self.calls > 24:
            self.marks.kill("rollout worker" if action is None else "learner")
        return super().forward(obs, action, generator=generator)


class MarkedAgent(MLPAgent):
    """Says where it is while it decides the second rollout, and while it learns from the first."""

    marks: Marks
    calls = 0

    def forward(self, obs: Any, action: Any = None, *, generator: Any = None) -> Any:
        self.calls += 1
        if action is not None or self.calls > 16:
            self.marks.set("rollout worker" if action is None else "learner")
        return super().forward(obs, action, generator=generator)


class LouderAgent(MLPAgent):
    """Explores more from the start."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        self.log_std.data += 0.1


def make_line_envs(
    args: Any,
    num_envs: int,
    image_size: int,
    autoreset: Any = AutoresetMode.SAME_STEP,
    num_threads: int | None = None,
    kind: type[LineVectorEnv] = LineVectorEnv,
    folder: Path | None = None,
) -> LineVectorEnv:
    envs = kind(num_envs, args.num_action_chunks, autoreset=autoreset, image_size=image_size)
    if folder is not None:
        envs.marks = Marks(folder)  # type: ignore[attr-defined]
    return envs


def make_marked_agent(args: Any, kind: type[MLPAgent], folder: Path) -> MLPAgent:
    agent = kind(("state.x",), 1, args.num_action_chunks)
    agent.marks = Marks(folder)  # type: ignore[assignment]
    return agent


def train(
    folder: Path,
    *,
    agent: Any = None,
    env: Any = LineVectorEnv,
    marks: Path | None = None,
    make_agent: Any = make_mlp_agent,
    **changes: Any,
) -> Any:
    """Trains in `folder`; an agent or environment of another class keeps its marks in the folder `marks`."""
    args = async_ppo_gr00t.Args(**(DEFAULTS["ppo"] | dict(output_dir=Path(folder)) | changes))
    if agent is not None:
        make_agent = partial(make_marked_agent, kind=agent, folder=marks)
    make_envs = partial(make_line_envs, kind=env, folder=None if env is LineVectorEnv else marks)
    return async_ppo_gr00t.main(args, make_agent, make_envs)


def command(folder: Path, **changes: Any) -> list[str]:
    """What runs `train`, with environments that take their time, in a process of its own."""
    return ["-m", "tests.algorithms.cluster_trainer", str(folder), json.dumps(changes)]


if __name__ == "__main__":
    train(Path(sys.argv[1]), env=SlowLineEnv, **json.loads(sys.argv[2]))
