"""One environment step, 25 physics substeps at LIBERO's rate, in one native call that holds no Python lock.

The same computation as `libero_gym.physics.controller`, compiled by Numba, with MuJoCo's `mj_step1` and `mj_step2`
called through their addresses in the shared library. Two modes:

- exact: matrix inverses and pseudo-inverses through LAPACK, in the order and with the memory layouts of robosuite:
  bit-identical trajectories on one build of BLAS;
- fast: Cholesky factors and 3x3 adjugates written out. Equal to 1e-9 until the arm first touches something; contact
  then makes any rounding visible.

Compiled code is cached in the package's cache folder, and checked before it is used.
"""

# The natively compiled functions are typed by Numba, and intrinsics are called without their typing context.
# pyright: reportMissingParameterType=false, reportCallIssue=false

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import get_cython_function_address, intrinsic

from libero_gym.conventions import ACTION_DIM, ACTION_MODES, ActionMode
from libero_gym.fork import Uncopied
from libero_gym.physics.controller import (
    JOINT_SCALE,
    JOINT_STIFFNESS,
    NULLSPACE_STIFFNESS,
    SUBSTEPS,
    ArmKinematics,
    ControllerState,
    inertia_addresses,
    sparse_inertia,
)
from libero_gym.tasks.cache import cache_dir, checked_folder
from libero_gym.tasks.scenes import Robot

_DELTA_POSE, _ABSOLUTE_POSE, _DELTA_JOINT_POS, _ABSOLUTE_JOINT_POS = range(len(ACTION_MODES))


# Each copy of the package has a folder of its own, so that all that is in it can be compiled at once.
_CACHE_NAME = f"native/{hashlib.sha256(__file__.encode()).hexdigest()[:20]}"
# Native functions and, where it is given, their signature.
_functions: list[tuple[Any, str | None]] = []


def _native(
    signature: str | None = None, *, for_python: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate like `numba.njit(cache=True)`, with the cache in the package's folder instead of beside the source.

    Nothing is compiled before `_compile`. A `signature` keeps Numba from compiling one version for each combination of
    literal arguments. Without `for_python`, only native functions can call it, and it is compiled sooner.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        folder = cache_dir() / _CACHE_NAME
        folder.mkdir(parents=True, exist_ok=True)
        previous = config.CACHE_DIR
        config.CACHE_DIR = str(folder)
        try:
            wrappers = dict(no_cpython_wrapper=not for_python, no_cfunc_wrapper=True)
            compiled = numba.njit(cache=True, error_model="numpy", **wrappers, **options)(function)
        finally:
            config.CACHE_DIR = previous
        _functions.append((compiled, signature))
        return compiled

    return decorate


@functools.cache
def _compile(argument_types: tuple[Any, ...]) -> None:
    """Compile all functions, or read them from the cache, for `_run_substeps` of these types; once for all processes.

    Numba itself would load a cut file or fail at it at every start.
    """
    with checked_folder(_CACHE_NAME):
        for function, signature in _functions:
            if signature is not None and not function.signatures:
                function.compile(signature)
                function.disable_compile()
        _run_substeps.compile(argument_types)


@intrinsic
def _call(typing_context: Any, function: Any, arguments: Any) -> Any:  # pyright: ignore[reportUnusedParameter]
    """Call the C function at address `function` with a tuple of machine words; what it returns is dropped."""
    signature = types.void(function, arguments)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        words = cgutils.unpack_tuple(builder, values[1])
        prototype = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(words))
        builder.call(builder.inttoptr(values[0], prototype.as_pointer()), words)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _call_ddot(typing_context: Any, function: Any, arguments: Any) -> Any:  # pyright: ignore[reportUnusedParameter]
    """As `_call`, for a function that returns a double."""
    return types.float64(function, arguments), functools.partial(_generate_dot, ir.DoubleType())


@intrinsic
def _call_sdot(typing_context: Any, function: Any, arguments: Any) -> Any:  # pyright: ignore[reportUnusedParameter]
    """As `_call`, for a function that returns a float."""
    return types.float32(function, arguments), functools.partial(_generate_dot, ir.FloatType())


def _generate_dot(result: Any, context: Any, builder: Any, _: Any, values: Any) -> Any:  # pyright: ignore[reportUnusedParameter]
    words = cgutils.unpack_tuple(builder, values[1])
    prototype = ir.FunctionType(result, [ir.IntType(64)] * len(words))
    return builder.call(builder.inttoptr(values[0], prototype.as_pointer()), words)


# BLAS and LAPACK take every argument by address. Integers 0..1023, characters and the scalars 1 and 0 stand in
# constant tables; `tables` are the addresses of the three.
_INTEGERS = np.arange(1024, dtype=np.int32)
_CHARACTERS = np.frombuffer(b"ntS", dtype=np.uint8).copy()
_SCALARS = np.array([1.0, 0.0])
_N, _T, _S = 0, 1, 2

_BLAS, _TABLES = "UniTuple(intp, 7)", "UniTuple(intp, 3)"
_SVD = "Tuple((f8[::1], f8[::1], f8[::1], f8[::1], f8[::1], i4[::1], i4[::1]))"


def _words(count: int) -> str:
    return ", ".join(["intp"] * count)


@_native(f"void(intp, {_TABLES}, {_words(11)})")
def _gemm(dgemm, tables, trans_a, trans_b, m, n, k, a, lda, b, ldb, c, ldc):
    """C [m, n] = op(A) [m, k] op(B) [k, n]; column-major matrices at addresses a, b, c."""
    integers, characters, scalars = tables
    _call(
        dgemm,
        (
            characters + trans_a,
            characters + trans_b,
            integers + 4 * m,
            integers + 4 * n,
            integers + 4 * k,
            scalars,
            a,
            integers + 4 * lda,
            b,
            integers + 4 * ldb,
            scalars + 8,
            c,
            integers + 4 * ldc,
        ),
    )


@_native(f"void(intp, {_TABLES}, {_words(6)})")
def _gemv(dgemv, tables, trans, m, n, a, x, y):
    """Y = op(A) x for the column-major A [m, n] at address a."""
    integers, characters, scalars = tables
    one = integers + 4
    _call(
        dgemv,
        (
            characters + trans,
            integers + 4 * m,
            integers + 4 * n,
            scalars,
            a,
            integers + 4 * m,
            x,
            one,
            scalars + 8,
            y,
            one,
        ),
    )


@_native(f"void({_BLAS}, {_TABLES}, intp, f8[::1], f8[::1], {_SVD})")
def _pseudo_inverse(blas, tables, n, matrix, inverse, svd):
    """Invert the row-major `matrix` [n, n] into the column-major `inverse` through singular values, as Numba does."""
    integers, characters, _ = tables
    column_major, s, u, vt, work, iwork, info = svd
    for i in range(n):
        for j in range(n):
            column_major[i + n * j] = matrix[i * n + j]
    size = integers + 4 * n
    _call(
        blas[6],
        (
            characters + _S,
            size,
            size,
            column_major.ctypes.data,
            size,
            s.ctypes.data,
            u.ctypes.data,
            size,
            vt.ctypes.data,
            size,
            work.ctypes.data,
            integers + 4 * work.size,
            iwork.ctypes.data,
            info.ctypes.data,
        ),
    )
    cut = s[0] * 1e-15
    rank = 0
    for k in range(n):
        if s[k] > cut:
            s[k] = 1.0 / s[k]
            rank = k
    rank += 1
    for i in range(n):
        for k in range(rank):
            vt[i * n + k] *= s[k]
    _gemm(blas[0], tables, _T, _T, n, n, rank, vt.ctypes.data, n, u.ctypes.data, n, inverse.ctypes.data, n)


@_native(f"void({_BLAS}, {_TABLES}, intp, f8[::1], f8[::1], f8[::1], f8[::1])")
def _task_inertia(blas, tables, rows, jac, mass_inv, product, result):
    """Result (row-major [rows, rows]) = J M^-1 J^T for the column-major J [rows, 7]."""
    _gemm(blas[0], tables, _T, _T, 7, rows, 7, mass_inv.ctypes.data, 7, jac.ctypes.data, rows, product.ctypes.data, 7)
    _gemm(
        blas[0], tables, _N, _N, rows, rows, 7, jac.ctypes.data, rows, product.ctypes.data, 7, result.ctypes.data, rows
    )


@_native("void(f8[:, ::1], f8[:, ::1], f8[::1])")
def _orientation_error(b, a, error):
    """Write the rotation from `a` to `b` as half the sum of the cross products of their columns."""
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        value = 0.0
        for axis in range(3):
            value += a[j, axis] * b[k, axis] - a[k, axis] * b[j, axis]
        error[i] = 0.5 * value


@_native()
def _set_goal_orientation(blas, tables, axis_angle, ee_ori, goal_ori, matrix, q):
    """goal_ori = R(axis_angle) ee_ori, rounded as in `libero_gym.physics.controller.rotation_matrix`."""
    one, three, four = tables[0] + 4, tables[0] + 12, tables[0] + 16
    vector = axis_angle.ctypes.data
    angle = math.sqrt(_call_ddot(blas[2], (three, vector, one, vector, one)))
    half_sine = math.sin(angle / 2.0)
    q[0] = math.cos(angle / 2.0)
    for i in range(3):
        q[i + 1] = axis_angle[i] / angle * half_sine
    norm = _call_sdot(blas[3], (four, q.ctypes.data, one, q.ctypes.data, one))
    scale = math.sqrt(2.0 / np.float64(norm))
    for i in range(4):
        q[i] = np.float64(q[i]) * scale
    w, x, y, z = q[0], q[1], q[2], q[3]
    matrix[0, 0] = 1.0 - np.float64(y * y) - np.float64(z * z)
    matrix[1, 1] = 1.0 - np.float64(x * x) - np.float64(z * z)
    matrix[2, 2] = 1.0 - np.float64(x * x) - np.float64(y * y)
    matrix[0, 1] = x * y - z * w
    matrix[0, 2] = x * z + y * w
    matrix[1, 0] = x * y + z * w
    matrix[1, 2] = y * z - x * w
    matrix[2, 0] = x * z - y * w
    matrix[2, 1] = y * z + x * w
    _gemm(blas[0], tables, _N, _N, 3, 3, 3, ee_ori.ctypes.data, 3, matrix.ctypes.data, 3, goal_ori.ctypes.data, 3)


@_native()
def _torques_exact(blas, tables, vectors, jacobians, mass, buffers, svd):
    """The reference's algebra, call by call: same BLAS routine, same storage order, same bits."""
    force, torque, posture, bias, torques = vectors
    jac, jac_pos, jac_ori = jacobians
    mass_inv, product, task, inverse, jac_bar, nullspace, wrench, posture_torques, null_torques, pivots, work = buffers
    integers = tables[0]
    seven = integers + 4 * 7
    info = svd[6].ctypes.data
    for i in range(49):
        mass_inv[i] = mass[i]
    _call(blas[4], (seven, seven, mass_inv.ctypes.data, seven, pivots.ctypes.data, info))
    _call(
        blas[5],
        (seven, mass_inv.ctypes.data, seven, pivots.ctypes.data, work.ctypes.data, integers + 4 * work.size, info),
    )
    _task_inertia(blas, tables, 3, jac_pos, mass_inv, product, task)
    _pseudo_inverse(blas, tables, 3, task, inverse, svd)
    _gemv(blas[1], tables, _N, 3, 3, inverse.ctypes.data, force.ctypes.data, wrench.ctypes.data)
    _task_inertia(blas, tables, 3, jac_ori, mass_inv, product, task)
    _pseudo_inverse(blas, tables, 3, task, inverse, svd)
    _gemv(blas[1], tables, _N, 3, 3, inverse.ctypes.data, torque.ctypes.data, wrench.ctypes.data + 24)
    _task_inertia(blas, tables, 6, jac, mass_inv, product, task)
    _pseudo_inverse(blas, tables, 6, task, inverse, svd)

    # Rows of 6: M^-1 J^T, then Jbar = M^-1 J^T lambda; rows of 7: Jbar J.
    j, p = jac.ctypes.data, product.ctypes.data
    _gemm(blas[0], tables, _N, _T, 6, 7, 7, j, 6, mass_inv.ctypes.data, 7, p, 6)
    _gemm(blas[0], tables, _T, _N, 6, 7, 6, inverse.ctypes.data, 6, p, 6, jac_bar.ctypes.data, 6)
    _gemm(blas[0], tables, _T, _N, 7, 7, 6, j, 6, jac_bar.ctypes.data, 6, nullspace.ctypes.data, 7)
    for i in range(7):
        for k in range(7):
            nullspace[i * 7 + k] = (1.0 if i == k else 0.0) - nullspace[i * 7 + k]

    _gemv(blas[1], tables, _N, 7, 7, mass.ctypes.data, posture.ctypes.data, posture_torques.ctypes.data)
    _gemv(blas[1], tables, _N, 7, 7, nullspace.ctypes.data, posture_torques.ctypes.data, null_torques.ctypes.data)
    _gemv(blas[1], tables, _T, 6, 7, j, wrench.ctypes.data, torques.ctypes.data)
    for i in range(7):
        torques[i] = (torques[i] + bias[i]) + null_torques[i]


@_native("void(f8[:, ::1], intp, intp)")
def _cholesky(a, first, n):
    """Factor in place the symmetric positive definite block of `a` at rows and columns first..first+n-1."""
    for j in range(first, first + n):
        for i in range(j, first + n):
            value = a[i, j]
            for k in range(first, j):
                value -= a[i, k] * a[j, k]
            a[i, j] = math.sqrt(value) if i == j else value / a[j, j]


@_native("void(f8[:, ::1], intp, intp, f8[::1])")
def _solve_cholesky(factor, first, n, b):
    """Solve L L^T x = b in place on the rows first..first+n-1, L from `_cholesky`."""
    for i in range(first, first + n):
        for k in range(first, i):
            b[i] -= factor[i, k] * b[k]
        b[i] /= factor[i, i]
    for i in range(first + n - 1, first - 1, -1):
        for k in range(i + 1, first + n):
            b[i] -= factor[k, i] * b[k]
        b[i] /= factor[i, i]


@_native()
def _torques_fast(vectors, jac, mass, fast):
    """The same torques from two Cholesky factors (7x7 and 6x6) and two 3x3 solves."""
    force, torque, posture, bias, torques = vectors
    factor, half, task, blocks, wrench, task_posture = fast
    for i in range(7):
        for k in range(7):
            factor[i, k] = mass[i + 7 * k]
    _cholesky(factor, 0, 7)
    # Rows L^-1 J^T, so that J M^-1 J^T = half half^T.
    for row in range(6):
        for i in range(7):
            value = jac[row + 6 * i]
            for k in range(i):
                value -= factor[i, k] * half[row, k]
            half[row, i] = value / factor[i, i]
    for i in range(6):
        wrench[i] = force[i] if i < 3 else torque[i - 3]
        task_posture[i] = 0.0
        for k in range(7):
            task_posture[i] += jac[i + 6 * k] * posture[k]
        for j in range(6):
            value = 0.0
            for k in range(7):
                value += half[i, k] * half[j, k]
            task[i, j] = value
            blocks[i, j] = value
    for first in (0, 3):
        _cholesky(blocks, first, 3)
        _solve_cholesky(blocks, first, 3, wrench)
    # Null-space torques: (I - J^T lambda J M^-1) M posture = M posture - J^T lambda J posture.
    _cholesky(task, 0, 6)
    _solve_cholesky(task, 0, 6, task_posture)
    for i in range(7):
        value = bias[i]
        for k in range(7):
            value += mass[i + 7 * k] * posture[k]
        for k in range(6):
            value += jac[k + 6 * i] * (wrench[k] - task_posture[k])
        torques[i] = value


@_native(for_python=True, nogil=True)
def _run_substeps(
    functions,
    handles,
    blas,
    tables,
    is_exact,
    action,
    action_mode,
    num_substeps,
    live,
    robot_ids,
    robot_values,
    goals,
    gripper,
    is_fresh,
    creation,
    observation,
    small,
    vectors,
    jacobians,
    mass,
    buffers,
    svd,
    fast,
):
    step1, step2, jac_site = functions
    model, data = handles
    qpos, qvel, ctrl, qfrc_bias, inertia, site_xpos, site_xmat, xquat = live
    arm_qpos, arm_dof, arm_ctrl, finger_qpos, finger_ctrl, inertia_adr, eef_ids = robot_ids
    init_qpos, torque_low, torque_high, kp, kd, finger_bias, finger_weight, scales = robot_values
    goal_pos, goal_ori, goal_qpos = goals
    creation_pos, creation_ori, creation_jac, creation_mass, creation_joint_pos = creation
    observed_qpos, observed_pos, observed_quat, observed_fingers, judged_qpos = observation
    ee_pos, ee_ori, ee_vel, ori_error, rotation, matrix, joint_state, all_jac, quaternion, identity = small
    force, torque, posture, bias, torques = vectors
    jac, jac_pos, jac_ori = jacobians
    eef_site, eef_body = eef_ids[0], eef_ids[1]
    nv = qvel.size
    damping = 2.0 * math.sqrt(NULLSPACE_STIFFNESS)
    joint_damping = 2.0 * math.sqrt(JOINT_STIFFNESS)
    controls_joints = action_mode in (_DELTA_JOINT_POS, _ABSOLUTE_JOINT_POS)
    finger_direction = np.sign(action[action.size - 1]) * scales[2]

    for substep in range(num_substeps):
        if substep == num_substeps - 2:
            for i in range(qpos.size):
                observed_qpos[i] = qpos[i]
        if substep == num_substeps - 1:
            for i in range(qpos.size):
                judged_qpos[i] = qpos[i]
        _call(step1, (model, data))

        if is_fresh[0]:
            is_fresh[0] = 0
            for i in range(3):
                ee_pos[i] = creation_pos[i]
                for j in range(3):
                    ee_ori[i, j] = creation_ori[i, j]
            for i in range(42):
                jac[i] = creation_jac[i]
            for i in range(49):
                mass[i] = creation_mass[i]
            for i in range(6):
                ee_vel[i] = 0.0
            for j in range(7):
                joint_state[j] = creation_joint_pos[j]
                joint_state[7 + j] = 0.0
        else:
            jac_address = all_jac.ctypes.data
            _call(jac_site, (model, data, jac_address, jac_address + 24 * nv, eef_site))
            _gemv(blas[1], tables, _T, nv, 3, jac_address, qvel.ctypes.data, ee_vel.ctypes.data)
            _gemv(blas[1], tables, _T, nv, 3, jac_address + 24 * nv, qvel.ctypes.data, ee_vel.ctypes.data + 24)
            for i in range(3):
                ee_pos[i] = site_xpos[eef_site, i]
                for j in range(3):
                    ee_ori[i, j] = site_xmat[eef_site, 3 * i + j]
            for j in range(7):
                joint_state[j] = qpos[arm_qpos[j]]
                joint_state[7 + j] = qvel[arm_dof[j]]
                for i in range(6):
                    jac[i + 6 * j] = all_jac[i, arm_dof[j]]
                for i in range(7):
                    mass[i + 7 * j] = inertia[inertia_adr[i, j]]
        for j in range(7):
            bias[j] = qfrc_bias[arm_dof[j]]
            for i in range(3):
                jac_pos[i + 3 * j] = jac[i + 6 * j]
                jac_ori[i + 3 * j] = jac[i + 3 + 6 * j]

        if substep == 0:
            if action_mode == _DELTA_POSE:
                rotates = False
                for i in range(3):
                    rotation[i] = min(max(action[3 + i], -1.0), 1.0) * scales[1]
                    rotates |= rotation[i] != 0.0
                    goal_pos[i] = ee_pos[i] + min(max(action[i], -1.0), 1.0) * scales[0]
                if rotates:
                    _set_goal_orientation(blas, tables, rotation, ee_ori, goal_ori, matrix, quaternion)
            elif action_mode == _ABSOLUTE_POSE:
                rotates = False
                for i in range(3):
                    rotation[i] = action[3 + i]
                    rotates |= rotation[i] != 0.0
                    goal_pos[i] = action[i]
                if rotates:
                    _set_goal_orientation(blas, tables, rotation, identity, goal_ori, matrix, quaternion)
                else:
                    # An array assigned as a whole would bring in text for an error: 4 s of compilation.
                    for i in range(3):
                        for j in range(3):
                            goal_ori[i, j] = identity[i, j]
            elif action_mode == _DELTA_JOINT_POS:
                for j in range(7):
                    goal_qpos[j] = joint_state[j] + min(max(action[j], -1.0), 1.0) * JOINT_SCALE
            else:
                for j in range(7):
                    goal_qpos[j] = action[j]

        if controls_joints:
            for j in range(7):  # the joints' accelerations
                posture[j] = (goal_qpos[j] - joint_state[j]) * JOINT_STIFFNESS + -joint_state[7 + j] * joint_damping
            _gemv(blas[1], tables, _N, 7, 7, mass.ctypes.data, posture.ctypes.data, torques.ctypes.data)
            for j in range(7):
                torques[j] += bias[j]
        else:
            _orientation_error(goal_ori, ee_ori, ori_error)
            for i in range(3):
                force[i] = (goal_pos[i] - ee_pos[i]) * kp[i] + -ee_vel[i] * kd[i]
                torque[i] = ori_error[i] * kp[3 + i] + -ee_vel[3 + i] * kd[3 + i]
            for j in range(7):
                posture[j] = NULLSPACE_STIFFNESS * (init_qpos[j] - joint_state[j]) - damping * joint_state[7 + j]
            if is_exact:
                _torques_exact(blas, tables, vectors, jacobians, mass, buffers, svd)
            else:
                _torques_fast(vectors, jac, mass, fast)
        for i in range(7):
            ctrl[arm_ctrl[i]] = min(max(torques[i], torque_low[i]), torque_high[i])
        gripper[0] = min(max(gripper[0] - finger_direction, -1.0), 1.0)
        gripper[1] = min(max(gripper[1] + finger_direction, -1.0), 1.0)
        for i in range(2):
            ctrl[finger_ctrl[i]] = finger_bias[i] + finger_weight[i] * gripper[i]

        _call(step2, (model, data))
        if substep == num_substeps - 2:
            for i in range(3):
                observed_pos[i] = site_xpos[eef_site, i]
            for i in range(4):
                observed_quat[i] = xquat[eef_body, i]
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


@functools.cache
def _linear_algebra_functions() -> tuple[int, ...]:
    """Addresses of the BLAS and LAPACK routines that SciPy ships, which are those that Numba and robosuite call."""
    blas = ("dgemm", "dgemv", "ddot", "sdot")
    lapack = ("dgetrf", "dgetri", "dgesdd")
    return tuple(
        get_cython_function_address(f"scipy.linalg.cython_{library}", name)
        for library, names in (("blas", blas), ("lapack", lapack))
        for name in names
    )


class NativeStepper(Uncopied):
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
        """Bind; `state` and `observation` are written by each call.

        Raises:
            ValueError: the model has more than 1,023 degrees of freedom.
        """
        if model.nv >= _INTEGERS.size:
            raise ValueError(f"the model has {model.nv} degrees of freedom (valid: up to {_INTEGERS.size - 1})")
        # MjData's arrays are views of memory that lives and stays in place as long as the data does.
        self._keep = (model, data)
        self._functions = (
            _mujoco_functions(),
            (model._address, data._address),
            _linear_algebra_functions(),
            (_INTEGERS.ctypes.data, _CHARACTERS.ctypes.data, _SCALARS.ctypes.data),
            is_exact,
        )
        inertia = sparse_inertia(model, data)
        live = (data.qpos, data.qvel, data.ctrl, data.qfrc_bias, inertia, data.site_xpos, data.site_xmat, data.xquat)
        robot_ids = (
            robot.arm_qpos_adr,
            robot.arm_dof_adr,
            robot.arm_actuator_ids,
            robot.gripper_qpos_adr,
            robot.gripper_actuator_ids,
            inertia_addresses(model, robot),
            np.array([robot.eef_site_id, robot.eef_body_id]),
        )
        robot_values = (
            robot.init_qpos,
            robot.torque_low,
            robot.torque_high,
            robot.kp,
            robot.kd,
            robot.gripper_bias,
            robot.gripper_weight,
            np.array([robot.position_scale, robot.rotation_scale, robot.gripper_speed]),
        )
        creation_values = (
            creation.ee_pos,
            creation.ee_ori,
            np.vstack([creation.jac_pos, creation.jac_ori]).ravel(order="F"),
            creation.mass_matrix.ravel(order="F"),
            creation.joint_pos,
        )
        observed = (
            observation.qpos,
            observation.eef_pos,
            observation.eef_quat_wxyz,
            observation.gripper_qpos,
            observation.judged_qpos,
        )
        self._arguments = (
            live,
            robot_ids,
            robot_values,
            (state.goal_pos, state.goal_ori, state.goal_qpos),
            state.gripper,
            state.is_fresh,
            creation_values,
            observed,
            *_workspace(model.nv),
        )

        example = (np.zeros(ACTION_DIM), _DELTA_POSE, SUBSTEPS)
        _compile(tuple(numba.typeof(value) for value in (*self._functions, *example, *self._arguments)))

    def __call__(self, action: npt.NDArray[np.float64], action_mode: ActionMode, num_substeps: int) -> None:
        """Advance by one environment step of so many substeps under `action`, float64 [A]."""
        _run_substeps(*self._functions, action, ACTION_MODES.index(action_mode), num_substeps, *self._arguments)


def _workspace(nv: int) -> tuple[Any, ...]:
    """Allocate what a step writes, so that the native code allocates nothing in exact mode."""
    small = (
        np.empty(3),  # ee_pos
        np.empty((3, 3)),  # ee_ori
        np.empty(6),  # ee_vel
        np.empty(3),  # ori_error
        np.empty(3),  # rotation
        np.empty((3, 3)),  # rotation matrix
        np.empty(14),  # joint positions, joint velocities
        np.empty((6, nv)),  # all_jac
        np.empty(4, dtype=np.float32),  # quaternion
        np.eye(3),  # identity
    )
    vectors = (np.empty(3), np.empty(3), np.empty(7), np.empty(7), np.empty(7))
    jacobians = (np.empty(42), np.empty(21), np.empty(21))
    pivots, lapack_work = np.empty(7, dtype=np.int32), np.empty(7 * 64)
    buffers = (
        np.empty(49),  # mass_inv
        np.empty(42),  # product
        np.empty(36),  # task
        np.empty(36),  # inverse
        np.empty(42),  # jac_bar
        np.empty(49),  # nullspace
        np.empty(6),  # wrench
        np.empty(7),  # posture_torques
        np.empty(7),  # null_torques
        pivots,
        lapack_work,
    )
    svd = (
        np.empty(36),  # column_major
        np.empty(6),  # s
        np.empty(36),  # u
        np.empty(36),  # vt
        np.empty(1000),  # work
        np.empty(48, dtype=np.int32),  # iwork
        np.empty(1, dtype=np.int32),  # info
    )
    fast = (
        np.empty((7, 7)),  # factor
        np.empty((6, 7)),  # half
        np.empty((6, 6)),  # task
        np.empty((6, 6)),  # blocks
        np.empty(6),  # wrench
        np.empty(6),  # task_posture
    )
    return small, vectors, jacobians, np.empty(49), buffers, svd, fast
