"""A vector environment with the contract of `LiberoVectorEnv` and nothing to simulate: trainer tests take seconds.

A point on a line starts at +0.7 or -0.7 and moves by a quarter of the first action component each step; it has
succeeded when it is within 0.15 of the origin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

ARRAYS = ("x", "length", "state_id", "idle")


class LineVectorEnv(gym.vector.VectorEnv):
    def __init__(
        self,
        num_envs: int,
        num_action_chunks: int = 2,
        horizon: int = 12,
        autoreset: AutoresetMode = AutoresetMode.SAME_STEP,
        image_size: int = 8,
    ):
        self.num_envs, self.horizon, self.image_size = num_envs, horizon, image_size
        self.metadata = {"autoreset_mode": autoreset}
        self.single_observation_space = gym.spaces.Dict({"state.x": gym.spaces.Box(-10, 10, (1,), np.float32)})
        self.single_action_space = gym.spaces.Box(-1, 1, (num_action_chunks, 7), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.x = np.zeros(num_envs, np.float32)
        self.length = np.zeros(num_envs, np.int64)
        self.state_id = np.zeros(num_envs, np.int64)
        self.idle = np.zeros(num_envs, bool)
        self.rngs = [np.random.default_rng(0) for _ in range(num_envs)]
        self.total_steps = 0
        # A resized picture of one grey level lies on the edge between two levels at every pixel, and which one it is
        # truncated to depends on how a device rounds. This grain leaves nothing in the tests' runs on an edge.
        self.grain = np.random.default_rng(1).integers(-4, 5, (image_size, image_size, 3))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None):
        options = options or {}
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        for i in np.flatnonzero(mask):
            if seeds is not None:
                self.rngs[i] = np.random.default_rng(seeds[i])
        self.restart(mask, options.get("init_state_id"))
        return self.observe(), {}

    def restart(self, mask: np.ndarray, state_id: np.ndarray | None = None) -> None:
        if state_id is None:
            state_id = self.state_id.copy()
            state_id[mask] = [self.rngs[i].integers(0, 2) for i in np.flatnonzero(mask)]
        self.state_id = np.where(mask, state_id, self.state_id)
        self.x = np.where(mask, 0.7 - 1.4 * (self.state_id % 2), self.x).astype(np.float32)
        self.length = np.where(mask, 0, self.length)
        self.idle = self.idle & ~mask

    def get_states(self) -> list[dict[str, np.ndarray]]:
        return [
            {name: np.array(getattr(self, name)[i]) for name in ARRAYS}
            | {"rng": np.array(json.dumps(rng.bit_generator.state))}
            for i, rng in enumerate(self.rngs)
        ]

    def set_state(self, env_id: int, state: Mapping[str, np.ndarray]) -> None:
        for name in ARRAYS:
            getattr(self, name)[env_id] = state[name]
        self.rngs[env_id].bit_generator.state = json.loads(str(state["rng"]))

    def observe(self) -> dict[str, np.ndarray]:
        """What the tiny GR00T agent reads too: the position is also a grey level."""
        text = np.array(["move to the origin"] * self.num_envs)
        grey = np.clip(128 + 100 * self.x, 0, 255).astype(np.int64)
        picture = np.clip(grey[:, None, None, None] + self.grain, 0, 255).astype(np.uint8)
        states = {
            f"state.{name}": np.zeros((self.num_envs, 1), np.float32) for name in ("y", "z", "roll", "pitch", "yaw")
        }
        return {
            "state.x": self.x[:, None].copy(),
            **states,
            "state.gripper": np.zeros((self.num_envs, 2), np.float32),
            "video.image": picture,
            "video.wrist_image": picture,
            "annotation.human.action.task_description": text,
        }

    def step(self, actions: np.ndarray):
        chunks = actions.reshape(self.num_envs, -1, 7)
        reward = np.zeros(self.num_envs, np.float64)
        num_steps = np.zeros(self.num_envs, np.int64)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        for c in range(chunks.shape[1]):
            live = ~(terminated | truncated | self.idle)
            self.x = np.where(live, self.x + np.clip(chunks[:, c, 0], -1, 1) * 0.25, self.x).astype(np.float32)
            self.length += live
            num_steps += live
            success = live & (np.abs(self.x) < 0.15)
            reward += success
            terminated |= success
            truncated |= live & ~success & (self.length >= self.horizon)
        self.total_steps += int(num_steps.sum())
        info: dict[str, Any] = dict(
            num_steps=num_steps,
            success=terminated.copy(),
            task_id=np.zeros(self.num_envs, np.int64),
            init_state_id=self.state_id.copy(),
            episode_length=self.length.copy(),
            episode_return=reward.copy(),
        )
        ended = terminated | truncated
        if self.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            self.idle |= ended
        elif ended.any():
            info["final_info"] = dict(info)
            info["final_obs"] = self.observe()
            self.restart(ended)
        return self.observe(), reward, terminated, truncated, info
