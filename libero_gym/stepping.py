"""One environment step of 25 physics substeps in one native call that holds no Python lock.

The same computation as `libero_gym.controller`, compiled by Numba, with MuJoCo's `mj_step1` and `mj_step2` called
through their addresses in the shared library. Two modes:

- exact: matrix inverses and pseudo-inverses through LAPACK, in the order and with the memory layouts of robosuite:
  bit-identical trajectories on one build of BLAS;
- fast: Cholesky factors and 3x3 adjugates written out. Equal to 1e-9 until the arm first touches something; contact
  then makes any rounding visible.

Compiled code is cached in the package's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

from libero_gym.cache import cache_dir
from libero_gym.controller import NULLSPACE_STIFFNESS, SUBSTEPS, ArmKinematics, ControllerState, inertia_addresses
from libero_gym.scenes import Robot

_OBSERVED_SUBSTEP = SUBSTEPS - 2


def _native(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate like `numba.njit(cache=True)`, with the cache in the package's folder instead of beside the source."""

    def decorate(function: Callable[..., Any]) -> Any:
        folder = cache_dir() / "native"
        folder.mkdir(exist_ok=True)
        previous = config.CACHE_DIR
        config.CACHE_DIR = str(folder)
        try:
            return numba.njit(cache=True, error_model="numpy", **options)(function)
        finally:
            config.CACHE_DIR = previous

    return decorate


@intrinsic
def _call_step(typing_context: Any, function: Any, model: Any, data: Any) -> Any:  # pyright: ignore[reportUnusedParameter]
    """Call `void function(model, data)` given three addresses."""
    signature = types.void(types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [word, word]).as_pointer())
        builder.call(pointer, list(arguments[1:]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _call_jacobian(
    typing_context: Any,  # pyright: ignore[reportUnusedParameter]
    function: Any,
    model: Any,
    data: Any,
    jac_pos: Any,
    jac_ori: Any,
    site: Any,
) -> Any:
    """Call `void mj_jacSite(model, data, jac_pos, jac_ori, site)` given addresses and a site id."""
    signature = types.void(types.intp, types.intp, types.intp, types.intp, types.intp, types.int32)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        word, integer = ir.IntType(64), ir.IntType(32)
        prototype = ir.FunctionType(ir.VoidType(), [word, word, word, word, integer])
        builder.call(builder.inttoptr(arguments[0], prototype.as_pointer()), list(arguments[1:]))
        return context.get_dummy_value()

    return signature, generate


@_native()
def _orientation_error(desired, current):
    error = np.zeros(3)
    for axis in range(3):
        a, b = current[:, axis], desired[:, axis]
        error[0] += a[1] * b[2] - a[2] * b[1]
        error[1] += a[2] * b[0] - a[0] * b[2]
        error[2] += a[0] * b[1] - a[1] * b[0]
    return 0.5 * error


@_native()
def _rotation_matrix(axis_angle):
    angle = np.linalg.norm(axis_angle)
    if angle == 0.0:
        return np.eye(3)
    half_sine = np.sin(angle / 2.0)
    q = np.empty(4, dtype=np.float32)
    q[0] = np.cos(angle / 2.0)
    for i in range(3):
        q[i + 1] = axis_angle[i] / angle * half_sine
    scale = math.sqrt(2.0 / np.float64(np.dot(q, q)))
    for i in range(4):
        q[i] = np.float64(q[i]) * scale
    s = np.outer(q, q)
    matrix = np.empty((3, 3))
    matrix[0, 0] = 1.0 - np.float64(s[2, 2]) - np.float64(s[3, 3])
    matrix[1, 1] = 1.0 - np.float64(s[1, 1]) - np.float64(s[3, 3])
    matrix[2, 2] = 1.0 - np.float64(s[1, 1]) - np.float64(s[2, 2])
    matrix[0, 1] = s[1, 2] - s[3, 0]
    matrix[0, 2] = s[1, 3] + s[2, 0]
    matrix[1, 0] = s[1, 2] + s[3, 0]
    matrix[1, 2] = s[2, 3] - s[1, 0]
    matrix[2, 0] = s[1, 3] - s[2, 0]
    matrix[2, 1] = s[2, 3] + s[1, 0]
    return matrix


@_native()
def _torques_exact(force, torque, posture, jac_pos, jac_ori, jac, mass, bias):
    mass_inv = np.linalg.inv(mass)
    lambda_full = np.linalg.pinv(np.dot(np.dot(jac, mass_inv), jac.transpose()))
    lambda_pos = np.linalg.pinv(np.dot(np.dot(jac_pos, mass_inv), jac_pos.transpose()))
    lambda_ori = np.linalg.pinv(np.dot(np.dot(jac_ori, mass_inv), jac_ori.transpose()))
    jac_bar = np.dot(mass_inv, jac.transpose()).dot(lambda_full)
    nullspace = np.eye(7) - np.dot(jac_bar, jac)
    wrench = np.empty(6)
    wrench[:3] = np.dot(lambda_pos, force)
    wrench[3:] = np.dot(lambda_ori, torque)
    posture_torques = np.dot(nullspace.transpose(), np.dot(mass, posture))
    return (np.dot(jac.transpose(), wrench) + bias) + posture_torques


@_native()
def _cholesky(a, n):
    """Factor the symmetric positive definite `a` [n, n] in place: lower triangle L with L L^T = a."""
    for j in range(n):
        diagonal = a[j, j]
        for k in range(j):
            diagonal -= a[j, k] * a[j, k]
        a[j, j] = math.sqrt(diagonal)
        for i in range(j + 1, n):
            value = a[i, j]
            for k in range(j):
                value -= a[i, k] * a[j, k]
            a[i, j] = value / a[j, j]


@_native()
def _solve_cholesky(factor, n, b):
    """Solve L L^T x = b in place."""
    for i in range(n):
        for k in range(i):
            b[i] -= factor[i, k] * b[k]
        b[i] /= factor[i, i]
    for i in range(n - 1, -1, -1):
        for k in range(i + 1, n):
            b[i] -= factor[k, i] * b[k]
        b[i] /= factor[i, i]


@_native()
def _torques_fast(force, torque, posture, jac, mass, bias):
    """The same torques from two Cholesky factors (7x7 and 6x6) and two 3x3 solves."""
    factor = mass.copy()
    _cholesky(factor, 7)
    half = np.empty((6, 7))  # rows L^-1 J^T: J M^-1 J^T = half half^T
    for row in range(6):
        for i in range(7):
            value = jac[row, i]
            for k in range(i):
                value -= factor[i, k] * half[row, k]
            half[row, i] = value / factor[i, i]
    task = np.empty((6, 6))
    for i in range(6):
        for j in range(i + 1):
            value = 0.0
            for k in range(7):
                value += half[i, k] * half[j, k]
            task[i, j] = value
            task[j, i] = value
    wrench = np.empty(6)
    block = task[:3, :3].copy()
    wrench[:3] = force
    _cholesky(block, 3)
    _solve_cholesky(block, 3, wrench[:3])
    block = task[3:, 3:].copy()
    wrench[3:] = torque
    _cholesky(block, 3)
    _solve_cholesky(block, 3, wrench[3:])

    # Null-space torques: (I - J^T lambda J M^-1) M posture = M posture - J^T lambda J posture.
    task_posture = np.empty(6)
    for i in range(6):
        value = 0.0
        for k in range(7):
            value += jac[i, k] * posture[k]
        task_posture[i] = value
    _cholesky(task, 6)
    _solve_cholesky(task, 6, task_posture)
    torques = np.empty(7)
    for i in range(7):
        value = bias[i]
        for k in range(7):
            value += mass[i, k] * posture[k]
        for k in range(6):
            value += jac[k, i] * (wrench[k] - task_posture[k])
        torques[i] = value
    return torques


@_native(nogil=True)
def _run_substeps(
    functions,
    handles,
    is_exact,
    action,
    live,
    robot_ids,
    robot_values,
    goal_pos,
    goal_ori,
    gripper,
    is_fresh,
    creation,
    observation,
):
    step1, step2, jac_site = functions
    model, data = handles
    qpos, qvel, ctrl, qfrc_bias, inertia, site_xpos, site_xmat, xquat = live
    arm_qpos, arm_dof, arm_ctrl, finger_qpos, finger_ctrl, inertia_adr, eef_site, eef_body = robot_ids
    init_qpos, torque_low, torque_high, kp, kd, finger_bias, finger_weight, scales = robot_values
    (
        creation_pos,
        creation_ori,
        creation_pos_vel,
        creation_ori_vel,
        creation_jac,
        creation_mass,
        creation_q,
        creation_v,
    ) = creation
    observed_qpos, observed_pos, observed_quat, observed_fingers = observation

    nv = qvel.size
    all_jac_pos = np.empty((3, nv))
    all_jac_ori = np.empty((3, nv))
    # Fortran order throughout: BLAS rounds differently otherwise.
    jac = np.empty((7, 6)).T
    jac_pos = np.empty((7, 3)).T
    jac_ori = np.empty((7, 3)).T
    mass = np.empty((7, 7)).T
    ee_pos = np.empty(3)
    ee_ori = np.empty((3, 3))
    joint_pos = np.empty(7)
    joint_vel = np.empty(7)
    bias = np.empty(7)
    damping = 2.0 * math.sqrt(NULLSPACE_STIFFNESS)
    finger_direction = np.sign(action[6]) * scales[2]

    for substep in range(SUBSTEPS):
        if substep == _OBSERVED_SUBSTEP:
            observed_qpos[:] = qpos
        _call_step(step1, model, data)

        if is_fresh[0]:
            is_fresh[0] = 0
            ee_pos[:] = creation_pos
            ee_ori[:] = creation_ori
            ee_pos_vel = creation_pos_vel.copy()
            ee_ori_vel = creation_ori_vel.copy()
            jac[:] = creation_jac
            mass[:] = creation_mass
            joint_pos[:] = creation_q
            joint_vel[:] = creation_v
        else:
            _call_jacobian(jac_site, model, data, all_jac_pos.ctypes.data, all_jac_ori.ctypes.data, np.int32(eef_site))
            ee_pos_vel = np.dot(all_jac_pos, qvel)
            ee_ori_vel = np.dot(all_jac_ori, qvel)
            for i in range(3):
                ee_pos[i] = site_xpos[eef_site, i]
                for j in range(3):
                    ee_ori[i, j] = site_xmat[eef_site, 3 * i + j]
            for j in range(7):
                joint_pos[j] = qpos[arm_qpos[j]]
                joint_vel[j] = qvel[arm_dof[j]]
                for i in range(3):
                    jac[i, j] = all_jac_pos[i, arm_dof[j]]
                    jac[i + 3, j] = all_jac_ori[i, arm_dof[j]]
                for i in range(7):
                    mass[i, j] = inertia[inertia_adr[i, j]]
        jac_pos[:] = jac[:3]
        jac_ori[:] = jac[3:]
        for j in range(7):
            bias[j] = qfrc_bias[arm_dof[j]]

        if substep == 0:
            rotation = np.empty(3)
            rotates = False
            for i in range(3):
                rotation[i] = min(max(action[3 + i], -1.0), 1.0) * scales[1]
                rotates |= rotation[i] != 0.0
                goal_pos[i] = ee_pos[i] + min(max(action[i], -1.0), 1.0) * scales[0]
            if rotates:
                goal_ori[:] = np.dot(_rotation_matrix(rotation), ee_ori)

        ori_error = _orientation_error(goal_ori, ee_ori)
        force = np.empty(3)
        torque = np.empty(3)
        for i in range(3):
            force[i] = (goal_pos[i] - ee_pos[i]) * kp[i] + -ee_pos_vel[i] * kd[i]
            torque[i] = ori_error[i] * kp[3 + i] + -ee_ori_vel[i] * kd[3 + i]
        posture = NULLSPACE_STIFFNESS * (init_qpos - joint_pos) - damping * joint_vel
        if is_exact:
            torques = _torques_exact(force, torque, posture, jac_pos, jac_ori, jac, mass, bias)
        else:
            torques = _torques_fast(force, torque, posture, jac, mass, bias)
        for i in range(7):
            ctrl[arm_ctrl[i]] = min(max(torques[i], torque_low[i]), torque_high[i])
        gripper[0] = min(max(gripper[0] - finger_direction, -1.0), 1.0)
        gripper[1] = min(max(gripper[1] + finger_direction, -1.0), 1.0)
        for i in range(2):
            ctrl[finger_ctrl[i]] = finger_bias[i] + finger_weight[i] * gripper[i]

        _call_step(step2, model, data)
        if substep == _OBSERVED_SUBSTEP:
            observed_pos[:] = site_xpos[eef_site]
            observed_quat[:] = xquat[eef_body]
            for i in range(2):
                observed_fingers[i] = qpos[finger_qpos[i]]


@functools.cache
def _mujoco_functions() -> tuple[int, int, int]:
    folder = Path(mujoco.__file__).parent
    libraries = sorted(path for path in folder.glob("libmujoco*") if ".so" in path.name or path.suffix == ".dylib")
    if not libraries:
        raise ImportError(f"no MuJoCo shared library in {folder}; reinstall the package `mujoco`")
    library = ctypes.CDLL(str(libraries[0]))
    names = ("mj_step1", "mj_step2", "mj_jacSite")
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    return addresses[0], addresses[1], addresses[2]


class NativeStepper:
    """Binds the native step to one model, data and controller state. Distinct ones may run in distinct threads."""

    def __init__(
        self,
        *,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        robot: Robot,
        state: ControllerState,
        creation: ArmKinematics,
        observation: Any,
        is_exact: bool,
    ) -> None:
        """Bind; `state` and `observation` are written by each call."""
        # MjData's arrays are views of memory that lives and stays in place as long as the data does.
        self._keep = (model, data)
        self._bound = (_mujoco_functions(), (model._address, data._address), is_exact)
        self._state = (
            (data.qpos, data.qvel, data.ctrl, data.qfrc_bias, data.M, data.site_xpos, data.site_xmat, data.xquat),
            (
                robot.arm_qpos_adr,
                robot.arm_dof_adr,
                robot.arm_actuator_ids,
                robot.gripper_qpos_adr,
                robot.gripper_actuator_ids,
                inertia_addresses(model, robot),
                robot.eef_site_id,
                robot.eef_body_id,
            ),
            (
                robot.init_qpos,
                robot.torque_low,
                robot.torque_high,
                robot.kp,
                robot.kd,
                robot.gripper_bias,
                robot.gripper_weight,
                np.array([robot.position_scale, robot.rotation_scale, robot.gripper_speed]),
            ),
            state.goal_pos,
            state.goal_ori,
            state.gripper,
            state.is_fresh,
            (
                creation.ee_pos,
                creation.ee_ori,
                creation.ee_pos_vel,
                creation.ee_ori_vel,
                np.asfortranarray(np.vstack([creation.jac_pos, creation.jac_ori])),
                creation.mass_matrix,
                creation.joint_pos,
                creation.joint_vel,
            ),
            (observation.qpos, observation.eef_pos, observation.eef_quat_wxyz, observation.gripper_qpos),
        )

    def __call__(self, action: npt.NDArray[np.float64]) -> None:
        """Advance by one environment step under `action`, float64 [7]."""
        _run_substeps(*self._bound, action, *self._state)
