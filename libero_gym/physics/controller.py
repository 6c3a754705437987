"""The arm's controllers and the gripper's, in plain NumPy: the readable reference.

Matches robosuite 1.4's OSC_POSE (fixed impedance, position and orientation uncoupled, delta or absolute actions), its
JOINT_POSITION and its Panda gripper to the last bit, quirks included; `libero_gym.physics.stepping` is the same in
native code. Shapes: arm of 7 joints, wrench of 6 (force 3, torque 3), action of A.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import mujoco
import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from libero_gym.conventions import CONTROL_FREQUENCY_HZ, PHYSICS_FREQUENCY_HZ, ActionMode
from libero_gym.tasks.scenes import Robot

SUBSTEPS = PHYSICS_FREQUENCY_HZ // CONTROL_FREQUENCY_HZ
"""Physics steps of 2 ms in one environment step of 50 ms, LIBERO's."""

NULLSPACE_STIFFNESS = 10.0
"""Proportional gain (1/s^2) that pulls the redundant joint to the initial posture; damping is critical."""

JOINT_STIFFNESS = 50.0
"""Proportional gain (1/s^2) of joint position control; damping is critical. robosuite's `joint_position.json`."""

JOINT_SCALE = 0.05
"""Radians per unit of a joint's delta action. robosuite's `joint_position.json`."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(kw_only=True, eq=False)
class ArmKinematics:
    """What the controller reads from the simulation.

    Attributes:
        ee_pos: float64 [3], m.
        ee_ori: float64 [3, 3], world from end effector.
        ee_pos_vel: float64 [3], m/s.
        ee_ori_vel: float64 [3], rad/s.
        jac_pos: float64 [3, 7], Fortran order: the order decides how BLAS rounds.
        jac_ori: float64 [3, 7], Fortran order.
        mass_matrix: float64 [7, 7], Fortran order.
        joint_pos: float64 [7], rad.
        joint_vel: float64 [7], rad/s.
    """

    ee_pos: FloatArray
    ee_ori: FloatArray
    ee_pos_vel: FloatArray
    ee_ori_vel: FloatArray
    jac_pos: FloatArray
    jac_ori: FloatArray
    mass_matrix: FloatArray
    joint_pos: FloatArray
    joint_vel: FloatArray


@dataclass(kw_only=True, eq=False)
class ControllerState:
    """All that the controller remembers between steps, and between the substeps of one.

    Attributes:
        goal_pos: float64 [3], m.
        goal_ori: float64 [3, 3]. Kept until an action rotates: a zero change of rotation does not re-set it.
        goal_qpos: float64 [7], rad, of joint position control; each step sets it anew.
        gripper: float64 [2], normalised commands of the fingers, integrated every substep.
        is_fresh: int64 [1], 1 until the first substep after a reset. That substep works with the kinematics of the
            posture at which robosuite created its controller, not with those of the initial state set afterwards.
    """

    goal_pos: FloatArray = field(default_factory=lambda: np.zeros(3))
    goal_ori: FloatArray = field(default_factory=lambda: np.eye(3))
    goal_qpos: FloatArray = field(default_factory=lambda: np.zeros(7))
    gripper: FloatArray = field(default_factory=lambda: np.zeros(2))
    is_fresh: npt.NDArray[np.int64] = field(default_factory=lambda: np.ones(1, dtype=np.int64))

    def reset(self, kinematics: ArmKinematics) -> None:
        """Start an episode with the kinematics at controller creation."""
        self.goal_pos[:] = kinematics.ee_pos
        self.goal_ori[:] = kinematics.ee_ori
        self.gripper[:] = 0.0
        self.is_fresh[:] = 1


@dataclass(kw_only=True, eq=False)
class Observation:
    """What is kept of the last step: sensor readings and positions.

    Attributes:
        qpos: float64 [nq], positions that its image shows, those before the last substep but one.
        eef_pos: float64 [3], m, as `qpos` has it.
        eef_quat_wxyz: float64 [4], as `qpos` has it.
        gripper_qpos: float64 [2], the fingers' positions after the last substep but one, m.
        judged_qpos: float64 [nq], positions before the last substep. The poses and contacts that MuJoCo's data hold
            after the step are of these, and by them success is judged.
    """

    qpos: FloatArray
    eef_pos: FloatArray
    eef_quat_wxyz: FloatArray
    gripper_qpos: FloatArray
    judged_qpos: FloatArray

    def read_sensors(self, data: mujoco.MjData, robot: Robot) -> None:
        """Copy the end effector's pose (m, quaternion wxyz) and the fingers' positions (m) from `data`."""
        self.eef_pos[:] = data.site_xpos[robot.eef_site_id]
        self.eef_quat_wxyz[:] = data.xquat[robot.eef_body_id]
        self.gripper_qpos[:] = data.qpos[robot.gripper_qpos_adr]


def read_kinematics(model: mujoco.MjModel, data: mujoco.MjData, robot: Robot) -> ArmKinematics:
    """Read the arm's kinematics from `data`, whose positions and velocities must be up to date (`mj_step1`)."""
    jac_pos, jac_ori = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    mujoco.mj_jacSite(model, data, jac_pos, jac_ori, robot.eef_site_id)
    return ArmKinematics(
        ee_pos=data.site_xpos[robot.eef_site_id].copy(),
        ee_ori=data.site_xmat[robot.eef_site_id].reshape(3, 3).copy(),
        ee_pos_vel=np.dot(jac_pos, data.qvel),
        ee_ori_vel=np.dot(jac_ori, data.qvel),
        jac_pos=np.asfortranarray(jac_pos[:, robot.arm_dof_adr]),
        jac_ori=np.asfortranarray(jac_ori[:, robot.arm_dof_adr]),
        mass_matrix=np.asfortranarray(sparse_inertia(model, data)[inertia_addresses(model, robot)]),
        joint_pos=data.qpos[robot.arm_qpos_adr],
        joint_vel=data.qvel[robot.arm_dof_adr],
    )


def creation_kinematics(model: mujoco.MjModel, robot: Robot) -> ArmKinematics:
    """Return the kinematics at which robosuite creates its controller: initial posture, fingers at 0, at rest.

    They depend on the arm alone, not on objects or fixtures: one computation serves all resets of a scene.
    """
    model = copy.copy(model)
    # Objects all stand at their default pose here, on top of one another: thousands of contacts that decide nothing.
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    data = mujoco.MjData(model)
    data.qpos[robot.arm_qpos_adr] = robot.init_qpos
    mujoco.mj_forward(model, data)
    return read_kinematics(model, data, robot)


def control_substep(
    *,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    robot: Robot,
    state: ControllerState,
    creation: ArmKinematics,
    action: FloatArray,
    sets_goal: bool,
    action_mode: ActionMode = "delta_pose",
) -> None:
    """Write the controls of one substep into `data.ctrl`; call between `mj_step1` and `mj_step2`.

    Args:
        model: physics model.
        data: simulation state after `mj_step1`.
        robot: indices and constants.
        state: the controller's memory, updated.
        creation: kinematics for the first substep of an episode.
        action: float64 [A], see `LiberoEnv`.
        sets_goal: True in the first substep of an environment step.
        action_mode: what the action's numbers mean.
    """
    kinematics = creation if state.is_fresh[0] else read_kinematics(model, data, robot)
    state.is_fresh[0] = 0
    if sets_goal:
        _set_goal(state, kinematics, robot, action, action_mode)
    gravity_compensation = data.qfrc_bias[robot.arm_dof_adr]
    if action_mode in ("delta_joint_pos", "absolute_joint_pos"):
        torques = joint_torques(kinematics, state.goal_qpos, gravity_compensation)
    else:
        torques = arm_torques(kinematics, state, robot, gravity_compensation)
    data.ctrl[robot.arm_actuator_ids] = np.clip(torques, robot.torque_low, robot.torque_high)
    state.gripper[:] = np.clip(
        state.gripper + np.array([-1.0, 1.0]) * robot.gripper_speed * np.sign(action[-1]), -1.0, 1.0
    )
    data.ctrl[robot.gripper_actuator_ids] = robot.gripper_bias + robot.gripper_weight * state.gripper


def _set_goal(
    state: ControllerState, kinematics: ArmKinematics, robot: Robot, action: FloatArray, action_mode: ActionMode
) -> None:
    if action_mode == "delta_pose":
        delta = np.clip(action[:6], -1.0, 1.0)
        rotation = delta[3:] * robot.rotation_scale
        if np.any(rotation != 0.0):
            state.goal_ori[:] = np.dot(rotation_matrix(rotation), kinematics.ee_ori)
        state.goal_pos[:] = kinematics.ee_pos + delta[:3] * robot.position_scale
    elif action_mode == "absolute_pose":
        state.goal_pos[:] = action[:3]
        state.goal_ori[:] = rotation_matrix(action[3:6])
    elif action_mode == "delta_joint_pos":
        state.goal_qpos[:] = kinematics.joint_pos + np.clip(action[:7], -1.0, 1.0) * JOINT_SCALE
    else:
        state.goal_qpos[:] = action[:7]


def joint_torques(k: ArmKinematics, goal_qpos: FloatArray, gravity_compensation: FloatArray) -> FloatArray:
    """Return the joint torques, float64 [7] in N m, before clipping: a spring and a damper for each joint's inertia."""
    damping = 2.0 * math.sqrt(JOINT_STIFFNESS)
    acceleration = (goal_qpos - k.joint_pos) * JOINT_STIFFNESS + -k.joint_vel * damping
    return np.dot(k.mass_matrix, acceleration) + gravity_compensation


def arm_torques(
    kinematics: ArmKinematics, state: ControllerState, robot: Robot, gravity_compensation: FloatArray
) -> FloatArray:
    """Return the joint torques, float64 [7] in N m, before clipping.

    Khatib (1987), with lambda = (J M^-1 J^T)^-1 for force and torque apart, and null-space torques towards the
    initial posture.
    """
    k = kinematics
    position_error = state.goal_pos - k.ee_pos
    force = position_error * robot.kp[:3] + -k.ee_pos_vel * robot.kd[:3]
    torque = orientation_error(state.goal_ori, k.ee_ori) * robot.kp[3:] + -k.ee_ori_vel * robot.kd[3:]

    jac = np.asfortranarray(np.vstack([k.jac_pos, k.jac_ori]))  # [6, 7]
    mass_inv = _inverse(k.mass_matrix)
    lambda_full = _pseudo_inverse(np.dot(np.dot(jac, mass_inv), jac.T))
    lambda_pos = _pseudo_inverse(np.dot(np.dot(k.jac_pos, mass_inv), k.jac_pos.T))
    lambda_ori = _pseudo_inverse(np.dot(np.dot(k.jac_ori, mass_inv), k.jac_ori.T))
    jac_bar = np.dot(np.dot(mass_inv, jac.T), lambda_full)
    nullspace = np.eye(7) - np.dot(jac_bar, jac)

    wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
    damping = 2.0 * math.sqrt(NULLSPACE_STIFFNESS)
    posture = NULLSPACE_STIFFNESS * (robot.init_qpos - k.joint_pos) - damping * k.joint_vel
    posture_torques = np.dot(nullspace.T, np.dot(k.mass_matrix, posture))
    return np.dot(jac.T, wrench) + gravity_compensation + posture_torques


def _inverse(matrix: FloatArray) -> FloatArray:
    """Invert through an LU factorisation followed by an explicit inversion, as Numba does.

    `numpy.linalg.inv` solves for the identity instead, and rounds differently.
    """
    factors, pivots, _ = lapack.dgetrf(matrix)
    return lapack.dgetri(factors, pivots)[0]


def _pseudo_inverse(matrix: FloatArray) -> FloatArray:
    """Invert through singular values, scaling the right singular vectors first, as Numba does.

    `numpy.linalg.svd` rounds differently from NumPy 2.5 on.
    """
    u, s, vt, _ = lapack.dgesdd(matrix, full_matrices=0)
    inverse = np.where(s > 1e-15 * s[0], 1.0 / s, 0.0)
    return np.asfortranarray(np.dot(vt.T * inverse, u.T))


def orientation_error(desired: FloatArray, current: FloatArray) -> FloatArray:
    """Return the rotation from `current` to `desired` ([3, 3] each) as half the sum of the axes' cross products."""
    crosses = np.cross(current.T, desired.T)
    return 0.5 * (crosses[0] + crosses[1] + crosses[2])


def rotation_matrix(axis_angle: FloatArray) -> FloatArray:
    """Return the rotation matrix [3, 3] of a nonzero `axis_angle` [3] in rad, rounded where robosuite rounds.

    The quaternion is squared in single precision and the sums are double: 1e-8 of error that a bit-exact
    controller must share.
    """
    angle = np.linalg.norm(axis_angle)
    if angle == 0.0:
        return np.eye(3)
    xyz = axis_angle / angle * np.sin(angle / 2.0)
    q = np.array([np.cos(angle / 2.0), *xyz], dtype=np.float32)
    norm = np.dot(q, q)
    q = (q.astype(np.float64) * math.sqrt(2.0 / np.float64(norm))).astype(np.float32)
    single = np.outer(q, q)
    double = single.astype(np.float64)
    matrix = np.empty((3, 3))
    matrix[0, 0] = 1.0 - double[2, 2] - double[3, 3]
    matrix[1, 1] = 1.0 - double[1, 1] - double[3, 3]
    matrix[2, 2] = 1.0 - double[1, 1] - double[2, 2]
    matrix[0, 1] = single[1, 2] - single[3, 0]
    matrix[0, 2] = single[1, 3] + single[2, 0]
    matrix[1, 0] = single[1, 2] + single[3, 0]
    matrix[1, 2] = single[2, 3] - single[1, 0]
    matrix[2, 0] = single[1, 3] - single[2, 0]
    matrix[2, 1] = single[2, 3] + single[1, 0]
    return matrix


def axis_angle_from_quat(quat_xyzw: FloatArray) -> FloatArray:
    """Return the axis-angle [3] in rad of a unit quaternion `quat_xyzw` [4], as LIBERO's clients compute it."""
    w = min(max(float(quat_xyzw[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if sine == 0.0:
        return np.zeros(3)
    return quat_xyzw[:3] * 2.0 * math.acos(w) / sine


def step_numpy(
    *,
    model: mujoco.MjModel,
    data: mujoco.MjData,
    robot: Robot,
    state: ControllerState,
    creation: ArmKinematics,
    action: FloatArray,
    observation: Observation,
    action_mode: ActionMode = "delta_pose",
    num_substeps: int = SUBSTEPS,
) -> None:
    """Advance by one environment step; the reference for `libero_gym.physics.stepping`.

    `observation` receives what robosuite's sensors hold afterwards: the values after the last substep but one, whose
    body and site poses are those of the positions before that substep.
    """
    for substep in range(num_substeps):
        if substep == num_substeps - 2:
            observation.qpos[:] = data.qpos
        if substep == num_substeps - 1:
            observation.judged_qpos[:] = data.qpos
        mujoco.mj_step1(model, data)
        control_substep(
            model=model,
            data=data,
            robot=robot,
            state=state,
            creation=creation,
            action=action,
            sets_goal=substep == 0,
            action_mode=action_mode,
        )
        mujoco.mj_step2(model, data)
        if substep == num_substeps - 2:
            observation.read_sensors(data, robot)


def sparse_inertia(model: mujoco.MjModel, data: mujoco.MjData) -> FloatArray:
    """Return the live array of the joint-space inertia; before MuJoCo 3.3.6 it is kept in another order."""
    return data.M if hasattr(model, "M_rowadr") else data.qM


def inertia_addresses(model: mujoco.MjModel, robot: Robot) -> IntArray:
    """Return where `sparse_inertia` holds the arm's, int64 [7, 7]: the block of a sparse lower triangle, mirrored."""
    if not hasattr(model, "M_rowadr"):
        # Each joint's row starts at the diagonal and goes up the tree; the arm is one chain.
        joint = np.arange(7)
        return model.dof_Madr[robot.arm_dof_adr][np.maximum.outer(joint, joint)] + abs(np.subtract.outer(joint, joint))
    addresses = np.empty((7, 7), dtype=np.int64)
    for i, row in enumerate(robot.arm_dof_adr):
        start = int(model.M_rowadr[row])
        columns = model.M_colind[start : start + int(model.M_rownnz[row])]
        for j, column in enumerate(robot.arm_dof_adr[: i + 1]):
            # The arm is one chain: each joint's row holds all joints before it.
            addresses[i, j] = addresses[j, i] = start + int(np.flatnonzero(columns == column)[0])
    return addresses
