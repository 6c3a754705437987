"""A policy of one's own, evaluated by the protocol of this project: report, intervals, films, resuming.

    pip install --editable ".[train]"
    python algorithms/eval_gr00t.py --policy examples/policy_to_evaluate.py:make --suite libero_spatial
        --episodes-per-task 1 --num-envs 10

`make` returns what `gr00t_agent.Policy` describes: NumPy is enough. This one goes to where it once saw the bowl of
libero_spatial's first task, closes the gripper and lifts; it solves nothing, but every number of it is used: pictures'
size, chunks, noise of its own, and what it remembers of an episode. Ten episodes take a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# End effector's positions, m, in the world frame: above the bowl, at its rim, and where it is lifted to.
WAYPOINTS = np.array([[-0.05, 0.15, 1.10], [-0.05, 0.15, 0.94], [-0.05, 0.15, 1.15]], dtype=np.float32)
REACHED_M = 0.02
# An action of 1 asks for a motion of 5 cm.
LARGEST_STEP_M = 0.05
HORIZON = 8


class Waypoints:
    """Goes from one waypoint to the next, with a little noise.

    Attributes:
        image_size: of the cameras, pixels; this policy does not look.
        num_action_chunks: steps that are executed of each decision.
    """

    image_size = 128
    num_action_chunks = 4

    def __init__(self) -> None:
        # Which waypoint each environment is on its way to.
        self._target: dict[int, int] = {}

    def reset(self, env_ids: Sequence[int]) -> None:
        """Begins anew in environments whose episode begins."""
        for env_id in env_ids:
            self._target[env_id] = 0

    def predict(self, obs: Mapping[str, Any], *, generator: Sequence[torch.Generator]) -> NDArray[np.float32]:
        """Returns actions [N, HORIZON, 7]."""
        position = np.concatenate([obs[f"state.{axis}"] for axis in "xyz"], axis=1)  # [N, 3]
        actions = np.zeros((len(position), HORIZON, 7), dtype=np.float32)
        for i in range(len(position)):
            target = self._target.get(i, 0)
            if np.linalg.norm(WAYPOINTS[target] - position[i]) < REACHED_M:
                target = self._target[i] = min(target + 1, len(WAYPOINTS) - 1)
            noise = 0.05 * torch.randn(3, generator=generator[i]).numpy()
            motion = (WAYPOINTS[target] - position[i]) / LARGEST_STEP_M / self.num_action_chunks + noise
            actions[i, :, :3] = np.clip(motion, -1, 1)
            actions[i, :, 6] = 1.0 if target == len(WAYPOINTS) - 1 else -1.0  # closed, open
        return actions


def make() -> Waypoints:
    """Returns the policy; `--policy` calls this."""
    return Waypoints()
