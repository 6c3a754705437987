"""What LIBERO fixes of the interface between policy and robot: its rate, its widths, the gripper's signs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CONTROL_FREQUENCY_HZ = 20
"""Environment steps a second: LIBERO's `control_freq`. Each is `controller.SUBSTEPS` physics steps of 2 ms."""

ACTION_DIM = 7
"""End effector's change of position (3) and of rotation (3), gripper (1); see `LiberoEnv`."""

STATE_DIM = 8
"""End effector's position (3) and axis-angle (3), finger positions (2); see `LiberoEnv`."""


def gripper_to_data(command: NDArray[Any]) -> NDArray[Any]:
    """Return the gripper's actions as data sets hold them, 1 open and 0 closed, from the environment's -1 and 1."""
    return (1.0 - command) / 2.0


def gripper_from_data(opening: NDArray[Any]) -> NDArray[Any]:
    """Return the environment's gripper actions, -1 open and 1 close, from those of data sets (1 open, 0 closed).

    By the sign of 1 - 2 g, as RLinf's and NVIDIA's LIBERO clients do; 0.5 becomes 0, which holds the gripper.
    """
    return np.sign(1.0 - 2.0 * opening)
