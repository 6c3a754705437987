"""Shows in seconds that an installation works: resets a task, steps it, draws it, and lets a policy decide.

    python tools/smoke.py                                                # the environment, without PyTorch
    python tools/smoke.py --policy checkpoints/libero_spatial_fewshot
    python tools/smoke.py --policy checkpoints/libero_spatial_fewshot --device cuda --renderer egl    # on a GPU

Prints one line of JSON, or ends in the error of what does not work. The health check of this project's containers. The
first run on a machine builds the scene and compiles kernels, which takes a minute.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from typing import Any, cast, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from libero_gym import LiberoVectorEnv
from libero_gym.adapters import ModalityVectorObservation
from libero_gym.rendering.protocol import RendererKind

SUITE = "libero_spatial"
NUM_ENVS = 2
NUM_ACTION_CHUNKS = 5
NUM_DECISIONS = 2
# A blank picture has no deviation; one of a task has 40 and more of 255.
MIN_DEVIATION = 10.0

Observation = dict[str, Any]
Policy = Callable[[Observation], NDArray[np.float32]]


def load_policy(folder: str, device: str) -> tuple[Policy, int]:
    """Returns the policy of a checkpoint as a function of the observation, and the size of the pictures it sees."""
    torch: Any = importlib.import_module("torch")
    agent: Any = importlib.import_module("gr00t_agent").Gr00tAgent.from_pretrained(folder).to(device).eval()
    if agent.policy.num_action_chunks != NUM_ACTION_CHUNKS:
        raise ValueError(
            f"policy={folder} executes {agent.policy.num_action_chunks} steps of a decision; give one that executes "
            f"{NUM_ACTION_CHUNKS}"
        )
    generator = torch.Generator(device).manual_seed(0)

    def decide(obs: Observation) -> NDArray[np.float32]:
        return agent.predict(obs, generator=generator).cpu().numpy()

    return decide, agent.image_size


def random_policy(seed: int = 0) -> Policy:
    """Returns a policy that moves at random."""
    rng = np.random.default_rng(seed)
    return lambda obs: rng.uniform(-1, 1, (NUM_ENVS, NUM_ACTION_CHUNKS, 7)).astype(np.float32)


def check_pictures(before: Observation, after: Observation) -> None:
    """Raises RuntimeError if pictures are blank, or show the same before and after steps."""
    for key in (key for key in before if key.startswith("video.")):
        for picture in (*before[key], *after[key]):
            if picture.std() < MIN_DEVIATION:
                raise RuntimeError(f"{key} is blank: its deviation is {picture.std():.1f} of 255")
        if np.array_equal(before[key], after[key]):
            raise RuntimeError(f"{key} shows the same after {NUM_DECISIONS * NUM_ACTION_CHUNKS} steps")


def check(policy: str | None, device: str, renderer: RendererKind | None) -> dict[str, Any]:
    """Plays the beginning of two episodes and returns what they were played with.

    Args:
        policy: folder of a checkpoint; None moves at random, and needs no PyTorch.
        device: of the policy.
        renderer: None takes the best that the machine has.

    Raises:
        RuntimeError: pictures are blank or stand still, actions are not finite, or the hand has not moved.
    """
    start = time.perf_counter()
    decide, image_size = load_policy(policy, device) if policy else (random_policy(), 128)
    envs = gym.make_vec(
        f"libero_gym/{SUITE}-v0",
        num_envs=NUM_ENVS,
        vectorization_mode="vector_entry_point",
        num_action_chunks=NUM_ACTION_CHUNKS,
        image_size=image_size,
        renderer=renderer,
    )
    envs = ModalityVectorObservation(envs)
    first, _ = envs.reset(seed=0)
    obs = first
    for _ in range(NUM_DECISIONS):
        action = decide(obs)
        if not np.isfinite(action).all():
            raise RuntimeError(f"the policy decided for actions that are not finite: {action}")
        obs, *_ = envs.step(action)

    check_pictures(first, obs)
    moved = [float(np.abs(obs[f"state.{axis}"] - first[f"state.{axis}"]).max()) for axis in "xyz"]
    if max(moved) < 1e-3:
        raise RuntimeError(f"the hand has not moved: {moved} m in {NUM_DECISIONS * NUM_ACTION_CHUNKS} steps")
    drawn_by = cast(LiberoVectorEnv, envs.unwrapped).renderer_name
    envs.close()
    return {
        "suite": SUITE,
        "env_steps": NUM_ENVS * NUM_DECISIONS * NUM_ACTION_CHUNKS,
        "renderer": drawn_by,
        "policy": policy,
        "device": device if policy else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="folder of a checkpoint; random actions, without PyTorch, if not given")
    parser.add_argument("--device", default="cpu", help="of the policy: cpu, cuda or cuda:N")
    parser.add_argument("--renderer", choices=get_args(RendererKind), help="the best that the machine has if not given")
    args = parser.parse_args(arguments)
    print(json.dumps(check(args.policy, args.device, args.renderer)))


if __name__ == "__main__":
    main()
