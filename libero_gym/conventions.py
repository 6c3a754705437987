"""What LIBERO fixes of the interface between policy and robot: its rate, its widths, the gripper's signs."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

CONTROL_FREQUENCY_HZ = 20
"""Environment steps a second: LIBERO's `control_freq`. Each is `controller.SUBSTEPS` physics steps of 2 ms."""

PHYSICS_FREQUENCY_HZ = 500
"""Physics steps a second."""

ACTION_DIM = 7
"""End effector's change of position (3) and of rotation (3), gripper (1); see `LiberoEnv`."""

ActionMode = Literal["delta_pose", "absolute_pose", "delta_joint_pos", "absolute_joint_pos"]
"""What the numbers of an action before the gripper's are; see `LiberoEnv`."""

ACTION_MODES: tuple[ActionMode, ...] = get_args(ActionMode)

STATE_DIM = 8
"""End effector's position (3) and axis-angle (3), finger positions (2); see `LiberoEnv`."""


def check_action_mode(action_mode: Any) -> ActionMode:
    """Return `action_mode`.

    Raises:
        ValueError: it is unknown.
    """
    if action_mode not in ACTION_MODES:
        raise ValueError(f"action_mode={action_mode!r} is unknown (valid: {', '.join(map(repr, ACTION_MODES))})")
    return action_mode


def action_dim(action_mode: ActionMode) -> int:
    """Return the width of actions: pose (6) or joints (7), and gripper (1)."""
    return 8 if action_mode in ("delta_joint_pos", "absolute_joint_pos") else ACTION_DIM


def count_substeps(control_freq: Any) -> int:
    """Return the physics steps of 2 ms in one environment step.

    An observation is of the last but one of them, so that there must be two.

    Raises:
        ValueError: the frequency, in Hz, is not a whole number of physics steps, or fewer than two.
    """
    valid = [f for f in range(1, PHYSICS_FREQUENCY_HZ // 2 + 1) if PHYSICS_FREQUENCY_HZ % f == 0]
    if isinstance(control_freq, bool) or control_freq not in valid:
        raise ValueError(
            f"control_freq={control_freq!r} Hz does not divide the physics' {PHYSICS_FREQUENCY_HZ} Hz "
            f"(valid: {', '.join(map(str, valid))})"
        )
    return PHYSICS_FREQUENCY_HZ // int(control_freq)


def gripper_to_data(command: NDArray[Any]) -> NDArray[Any]:
    """Return the gripper's actions as data sets hold them, 1 open and 0 closed, from the environment's -1 and 1."""
    return (1.0 - command) / 2.0


def gripper_from_data(opening: NDArray[Any]) -> NDArray[Any]:
    """Return the environment's gripper actions, -1 open and 1 close, from those of data sets (1 open, 0 closed).

    By the sign of 1 - 2 g, as RLinf's and NVIDIA's LIBERO clients do; 0.5 becomes 0, which holds the gripper.
    """
    return np.sign(1.0 - 2.0 * opening)
