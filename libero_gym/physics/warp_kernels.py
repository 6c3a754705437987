# type: ignore
# ruff: noqa: UP018 - Warp takes float(0.0) for a variable that a loop changes, and 0.0 for a constant
"""Warp kernels around MuJoCo Warp's physics: controller, goals, observation, resets.

They serve `libero_gym.physics.warp_worlds`. Warp compiles these functions instead of running them, and annotates them
in its own way, so Python's type checkers have nothing to say about this file. Everything is float32; one thread per
world unless a kernel says otherwise.

Shape legend: N worlds, C steps of an action chunk, A goal atoms, T things that goals speak of, B bodies, G geoms.
"""

import warp as wp

# Kinds of goal atoms, see `libero_gym.physics.predicates`.
ON_OBJECT, ON_SITE, IN_SITE, JOINTS = 0, 1, 2, 3
# A value of this size means that the simulation has diverged (mjMAXVAL).
_MAX_VALUE = 1.0e10

mat77 = wp.types.matrix(shape=(7, 7), dtype=wp.float32)
mat67 = wp.types.matrix(shape=(6, 7), dtype=wp.float32)
vec7 = wp.types.vector(length=7, dtype=wp.float32)

wp.set_module_options({"enable_backward": False, "fast_math": False, "max_unroll": 3})


@wp.struct
class Arm:
    """`libero_gym.tasks.scenes.Robot`, and where MuJoCo Warp keeps what the controller reads."""

    qpos_adr: wp.array(dtype=int)
    dof_adr: wp.array(dtype=int)
    actuator_ids: wp.array(dtype=int)
    inertia_adr: wp.array2d(dtype=int)
    finger_qpos_adr: wp.array(dtype=int)
    finger_actuator_ids: wp.array(dtype=int)
    eef_site_id: int
    eef_body_id: int
    eef_root_id: int
    init_qpos: wp.array(dtype=float)
    torque_low: wp.array(dtype=float)
    torque_high: wp.array(dtype=float)
    kp: wp.array(dtype=float)
    kd: wp.array(dtype=float)
    position_scale: float
    rotation_scale: float
    gripper_speed: float
    gripper_bias: wp.array(dtype=float)
    gripper_weight: wp.array(dtype=float)
    nullspace_stiffness: float
    nullspace_damping: float


@wp.struct
class Creation:
    """Kinematics at which robosuite creates its controller; see `libero_gym.physics.controller.creation_kinematics`."""

    ee_pos: wp.vec3
    ee_ori: wp.mat33
    jac: mat67
    mass: mat77


@wp.struct
class Memory:
    """`libero_gym.physics.controller.ControllerState` of each world [N]; `is_fresh` is 1 until the first substep."""

    goal_pos: wp.array(dtype=wp.vec3)
    goal_ori: wp.array(dtype=wp.mat33)
    gripper: wp.array(dtype=wp.vec2)
    is_fresh: wp.array(dtype=int)


@wp.struct
class Live:
    """MuJoCo Warp's arrays, leading dimension N."""

    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    qacc_warmstart: wp.array2d(dtype=float)
    ctrl: wp.array2d(dtype=float)
    qfrc_bias: wp.array2d(dtype=float)
    inertia: wp.array2d(dtype=float)
    cdof: wp.array2d(dtype=wp.spatial_vector)
    subtree_com: wp.array2d(dtype=wp.vec3)
    xpos: wp.array2d(dtype=wp.vec3)
    xquat: wp.array2d(dtype=wp.quat)
    xmat: wp.array2d(dtype=wp.mat33)
    site_xpos: wp.array2d(dtype=wp.vec3)
    site_xmat: wp.array2d(dtype=wp.mat33)


@wp.struct
class Kinematics:
    """`libero_gym.physics.controller.ArmKinematics` of one world; `velocity` is linear, then angular."""

    ee_pos: wp.vec3
    ee_ori: wp.mat33
    velocity: wp.spatial_vector
    jac: mat67
    mass: mat77
    joint_pos: vec7
    joint_vel: vec7


@wp.func
def _read_kinematics(arm: Arm, live: Live, world: int) -> Kinematics:
    k = Kinematics()
    k.ee_pos = live.site_xpos[world, arm.eef_site_id]
    k.ee_ori = live.site_xmat[world, arm.eef_site_id]
    offset = k.ee_pos - live.subtree_com[world, arm.eef_root_id]
    linear = wp.vec3(0.0)
    angular = wp.vec3(0.0)
    for j in range(7):
        dof = arm.dof_adr[j]
        motion = live.cdof[world, dof]
        rotation = wp.vec3(motion[0], motion[1], motion[2])
        translation = wp.vec3(motion[3], motion[4], motion[5]) + wp.cross(rotation, offset)
        speed = live.qvel[world, dof]
        linear += translation * speed
        angular += rotation * speed
        for i in range(3):
            k.jac[i, j] = translation[i]
            k.jac[3 + i, j] = rotation[i]
        k.joint_pos[j] = live.qpos[world, arm.qpos_adr[j]]
        k.joint_vel[j] = speed
        for i in range(7):
            k.mass[i, j] = live.inertia[world, arm.inertia_adr[i, j]]
    k.velocity = wp.spatial_vector(linear, angular)
    return k


@wp.func
def _creation_kinematics(arm: Arm, creation: Creation) -> Kinematics:
    k = Kinematics()
    k.ee_pos = creation.ee_pos
    k.ee_ori = creation.ee_ori
    k.jac = creation.jac
    k.mass = creation.mass
    for j in range(7):
        k.joint_pos[j] = arm.init_qpos[j]
    return k


@wp.func
def _rotation_matrix(axis_angle: wp.vec3) -> wp.mat33:
    """Rotation by a nonzero axis-angle; `libero_gym.physics.controller.rotation_matrix` in float32."""
    angle = wp.length(axis_angle)
    xyz = axis_angle * (wp.sin(0.5 * angle) / angle)
    w = wp.cos(0.5 * angle)
    scale = wp.sqrt(2.0 / (w * w + wp.dot(xyz, xyz)))
    w = w * scale
    xyz = xyz * scale
    x = xyz[0]
    y = xyz[1]
    z = xyz[2]
    return wp.mat33(
        1.0 - y * y - z * z,
        x * y - z * w,
        x * z + y * w,
        x * y + z * w,
        1.0 - x * x - z * z,
        y * z - x * w,
        x * z - y * w,
        y * z + x * w,
        1.0 - x * x - y * y,
    )


@wp.func
def _orientation_error(desired: wp.mat33, current: wp.mat33) -> wp.vec3:
    error = wp.vec3(0.0)
    for axis in range(3):
        error += wp.cross(
            wp.vec3(current[0, axis], current[1, axis], current[2, axis]),
            wp.vec3(desired[0, axis], desired[1, axis], desired[2, axis]),
        )
    return error * 0.5


@wp.func
def _cholesky(a: mat77, first: int, n: int) -> mat77:
    """Lower factor of the symmetric positive definite block of `a` at rows and columns first..first+n-1."""
    factor = a
    for j in range(first, first + n):
        for i in range(j, first + n):
            value = factor[i, j]
            for k in range(first, j):
                value -= factor[i, k] * factor[j, k]
            if i == j:
                factor[i, j] = wp.sqrt(value)
            else:
                factor[i, j] = value / factor[j, j]
    return factor


@wp.func
def _solve_cholesky(factor: mat77, first: int, n: int, b: vec7) -> vec7:
    """Solution of L L^T x = b on the rows first..first+n-1; the others keep b's values."""
    x = b
    for i in range(first, first + n):
        for k in range(first, i):
            x[i] = x[i] - factor[i, k] * x[k]
        x[i] = x[i] / factor[i, i]
    for step in range(n):
        i = first + n - 1 - step
        for k in range(i + 1, first + n):
            x[i] = x[i] - factor[k, i] * x[k]
        x[i] = x[i] / factor[i, i]
    return x


@wp.func
def _arm_torques(arm: Arm, k: Kinematics, goal_pos: wp.vec3, goal_ori: wp.mat33) -> vec7:
    """`libero_gym.physics.controller.arm_torques` without gravity compensation, by Cholesky factors."""
    factor = _cholesky(k.mass, 0, 7)
    half = mat67()  # rows (L^-1 J^T)^T, so that J M^-1 J^T = half half^T
    for row in range(6):
        for i in range(7):
            value = k.jac[row, i]
            for j in range(i):
                value -= factor[i, j] * half[row, j]
            half[row, i] = value / factor[i, i]
    task = mat77()
    for i in range(6):
        for j in range(6):
            value = float(0.0)
            for n in range(7):
                value += half[i, n] * half[j, n]
            task[i, j] = value

    position_error = goal_pos - k.ee_pos
    orientation_error = _orientation_error(goal_ori, k.ee_ori)
    wrench = vec7()
    for i in range(3):
        wrench[i] = position_error[i] * arm.kp[i] - k.velocity[i] * arm.kd[i]
        wrench[3 + i] = orientation_error[i] * arm.kp[3 + i] - k.velocity[3 + i] * arm.kd[3 + i]
    wrench = _solve_cholesky(_cholesky(task, 0, 3), 0, 3, wrench)
    wrench = _solve_cholesky(_cholesky(task, 3, 3), 3, 3, wrench)

    # Null-space torques: (I - J^T lambda J M^-1) M posture = M posture - J^T lambda J posture.
    posture = vec7()
    for j in range(7):
        error = arm.init_qpos[j] - k.joint_pos[j]
        posture[j] = arm.nullspace_stiffness * error - arm.nullspace_damping * k.joint_vel[j]
    task_posture = vec7()
    for i in range(6):
        for j in range(7):
            task_posture[i] = task_posture[i] + k.jac[i, j] * posture[j]
    task_posture = _solve_cholesky(_cholesky(task, 0, 6), 0, 6, task_posture)

    torques = vec7()
    for i in range(7):
        value = float(0.0)
        for j in range(7):
            value += k.mass[i, j] * posture[j]
        for j in range(6):
            value += k.jac[j, i] * (wrench[j] - task_posture[j])
        torques[i] = value
    return torques


@wp.kernel
def control(
    arm: Arm,
    creation: Creation,
    memory: Memory,
    live: Live,
    actions: wp.array3d(dtype=float),
    step: wp.array(dtype=int),
    is_active: wp.array(dtype=wp.uint8),
    sets_goal: int,
):
    """Controls of one substep from positions, velocities and bias forces that are up to date; dim N.

    `libero_gym.physics.controller.control_substep`. Worlds that are not active get no controls and keep their memory.
    """
    world = wp.tid()
    if is_active[world] == wp.uint8(0):
        for i in range(live.ctrl.shape[1]):
            live.ctrl[world, i] = 0.0
        return
    k = Kinematics()
    if memory.is_fresh[world] == 1:
        k = _creation_kinematics(arm, creation)
        memory.is_fresh[world] = 0
    else:
        k = _read_kinematics(arm, live, world)
    now = step[0]
    if sets_goal == 1:
        shift = wp.vec3(0.0)
        rotation = wp.vec3(0.0)
        for i in range(3):
            shift[i] = wp.clamp(actions[world, now, i], -1.0, 1.0) * arm.position_scale
            rotation[i] = wp.clamp(actions[world, now, 3 + i], -1.0, 1.0) * arm.rotation_scale
        if rotation[0] != 0.0 or rotation[1] != 0.0 or rotation[2] != 0.0:
            memory.goal_ori[world] = _rotation_matrix(rotation) @ k.ee_ori
        memory.goal_pos[world] = k.ee_pos + shift
    torques = _arm_torques(arm, k, memory.goal_pos[world], memory.goal_ori[world])
    for j in range(7):
        torque = torques[j] + live.qfrc_bias[world, arm.dof_adr[j]]
        live.ctrl[world, arm.actuator_ids[j]] = wp.clamp(torque, arm.torque_low[j], arm.torque_high[j])
    grip = actions[world, now, 6]
    direction = float(0.0)
    if grip > 0.0:
        direction = arm.gripper_speed
    elif grip < 0.0:
        direction = -arm.gripper_speed
    gripper = memory.gripper[world]
    gripper = wp.vec2(wp.clamp(gripper[0] - direction, -1.0, 1.0), wp.clamp(gripper[1] + direction, -1.0, 1.0))
    memory.gripper[world] = gripper
    for i in range(2):
        live.ctrl[world, arm.finger_actuator_ids[i]] = arm.gripper_bias[i] + arm.gripper_weight[i] * gripper[i]


@wp.struct
class Observed:
    """What sensors and cameras hold [N]: quaternion wxyz, poses of all bodies [N, B], lit indicators [N, I]."""

    eef_pos: wp.array(dtype=wp.vec3)
    eef_quat: wp.array(dtype=wp.vec4)
    fingers: wp.array(dtype=wp.vec2)
    body_pos: wp.array2d(dtype=wp.vec3)
    body_mat: wp.array2d(dtype=wp.mat33)
    is_lit: wp.array2d(dtype=wp.uint8)


@wp.kernel
def observe_poses(arm: Arm, live: Live, is_active: wp.array(dtype=wp.uint8), observed: Observed):
    """Copies the poses of bodies and end effector; dim (N, B)."""
    world, body = wp.tid()
    if is_active[world] == wp.uint8(0):
        return
    observed.body_pos[world, body] = live.xpos[world, body]
    observed.body_mat[world, body] = live.xmat[world, body]
    if body == 0:
        observed.eef_pos[world] = live.site_xpos[world, arm.eef_site_id]
        quat = live.xquat[world, arm.eef_body_id]  # MuJoCo Warp stores w first
        observed.eef_quat[world] = wp.vec4(quat[0], quat[1], quat[2], quat[3])


@wp.kernel
def observe_fingers(arm: Arm, live: Live, is_active: wp.array(dtype=wp.uint8), observed: Observed):
    """Copies the fingers' positions; dim N."""
    world = wp.tid()
    if is_active[world] != wp.uint8(0):
        observed.fingers[world] = wp.vec2(
            live.qpos[world, arm.finger_qpos_adr[0]], live.qpos[world, arm.finger_qpos_adr[1]]
        )


@wp.struct
class Goals:
    """Goals of all tasks: task t has the atoms task_first[t] .. task_first[t + 1] - 1.

    `things` are the rows of `touching` [T, G] (which geoms a thing touches with) whose contact an atom wants, -1 if
    it wants none. Joint atom a has the entries joint_first[a] .. joint_first[a + 1] - 1 of `joint_adr`.
    """

    task_first: wp.array(dtype=int)
    kind: wp.array(dtype=int)
    bodies: wp.array(dtype=wp.vec2i)
    site: wp.array(dtype=int)
    size: wp.array(dtype=wp.vec3)
    things: wp.array(dtype=wp.vec2i)
    touching: wp.array2d(dtype=wp.uint8)
    joint_first: wp.array(dtype=int)
    joint_adr: wp.array(dtype=int)
    threshold: wp.array(dtype=float)
    is_above: wp.array(dtype=wp.uint8)
    is_inclusive: wp.array(dtype=wp.uint8)
    is_any: wp.array(dtype=wp.uint8)
    on_object_radius: float
    on_site_slack: float
    on_site_height: float
    in_site_slack: float


@wp.struct
class Indicators:
    """Sites that show that something is turned on: they are lit if a joint passes; see `Goals` for the joints."""

    joint_first: wp.array(dtype=int)
    joint_adr: wp.array(dtype=int)
    threshold: wp.array(dtype=float)
    is_above: wp.array(dtype=wp.uint8)
    is_inclusive: wp.array(dtype=wp.uint8)


@wp.func
def _passes(qpos: float, threshold: float, is_above: wp.uint8, is_inclusive: wp.uint8) -> bool:
    if is_inclusive != wp.uint8(0) and qpos == threshold:
        return True
    if is_above != wp.uint8(0):
        return qpos > threshold
    return qpos < threshold


@wp.kernel
def mark_touching(
    goals: Goals,
    world_task: wp.array(dtype=int),
    num_contacts: wp.array(dtype=int),
    contact_geoms: wp.array(dtype=wp.vec2i),
    contact_world: wp.array(dtype=int),
    touched: wp.array2d(dtype=wp.uint8),
):
    """Sets touched [N, atoms of a task] where a contact is one that the atom wants; dim of the contact buffer."""
    contact = wp.tid()
    if contact >= wp.min(num_contacts[0], contact_geoms.shape[0]):
        return
    world = contact_world[contact]
    task = world_task[world]
    if task < 0:
        return
    geoms = contact_geoms[contact]
    for atom in range(goals.task_first[task], goals.task_first[task + 1]):
        things = goals.things[atom]
        if things[0] >= 0:
            ahead = goals.touching[things[0], geoms[0]] & goals.touching[things[1], geoms[1]]
            back = goals.touching[things[1], geoms[0]] & goals.touching[things[0], geoms[1]]
            if (ahead | back) != wp.uint8(0):
                touched[world, atom - goals.task_first[task]] = wp.uint8(1)


@wp.func
def _holds(goals: Goals, live: Live, world: int, atom: int, is_touching: wp.uint8) -> bool:
    kind = goals.kind[atom]
    if kind == wp.static(JOINTS):
        has_any = bool(False)
        has_all = bool(True)
        for j in range(goals.joint_first[atom], goals.joint_first[atom + 1]):
            qpos = live.qpos[world, goals.joint_adr[j]]
            passes = _passes(qpos, goals.threshold[atom], goals.is_above[atom], goals.is_inclusive[atom])
            has_any = has_any or passes
            has_all = has_all and passes
        if goals.is_any[atom] != wp.uint8(0):
            return has_any
        return has_all
    if goals.things[atom][0] >= 0 and is_touching == wp.uint8(0):
        return False
    thing_pos = live.xpos[world, goals.bodies[atom][0]]
    if kind == wp.static(ON_OBJECT):
        base_pos = live.xpos[world, goals.bodies[atom][1]]
        apart = wp.length(wp.vec2(base_pos[0] - thing_pos[0], base_pos[1] - thing_pos[1]))
        return base_pos[2] <= thing_pos[2] and apart < goals.on_object_radius
    size = goals.size[atom]
    site_pos = live.site_xpos[world, goals.site[atom]]
    site_mat = live.site_xmat[world, goals.site[atom]]
    if kind == wp.static(ON_SITE):
        # LIBERO rotates by the site's matrix where its transpose would give site coordinates.
        offset = site_mat @ (thing_pos - site_pos)
        is_above = size[2] - goals.on_site_slack < offset[2] and offset[2] < size[2] + goals.on_site_height
        return is_above and wp.abs(offset[0]) < size[0] and wp.abs(offset[1]) < size[1]
    extent = site_mat @ size
    is_inside = bool(True)
    for i in range(3):
        low = site_pos[i] - wp.abs(extent[i])
        if i == 2:
            low -= goals.in_site_slack
        is_inside = is_inside and thing_pos[i] > low and thing_pos[i] < site_pos[i] + wp.abs(extent[i])
    return is_inside


@wp.func
def _success(goals: Goals, live: Live, world: int, task: int, touched: wp.array2d(dtype=wp.uint8)) -> bool:
    first = goals.task_first[task]
    holds = bool(True)
    for atom in range(first, goals.task_first[task + 1]):
        holds = holds and _holds(goals, live, world, atom, touched[world, atom - first])
    return holds


@wp.kernel
def judge(
    goals: Goals,
    indicators: Indicators,
    live: Live,
    world_task: wp.array(dtype=int),
    touched: wp.array2d(dtype=wp.uint8),
    is_active: wp.array(dtype=wp.uint8),
    is_success: wp.array(dtype=wp.uint8),
    is_lit: wp.array2d(dtype=wp.uint8),
):
    """Whether the goal holds in each active world, and which of its indicators are lit; dim N."""
    world = wp.tid()
    if is_active[world] == wp.uint8(0):
        return
    is_success[world] = wp.uint8(_success(goals, live, world, world_task[world], touched))
    for i in range(is_lit.shape[1]):
        passes = bool(False)
        for j in range(indicators.joint_first[i], indicators.joint_first[i + 1]):
            qpos = live.qpos[world, indicators.joint_adr[j]]
            passes = passes or _passes(
                qpos, indicators.threshold[i], indicators.is_above[i], indicators.is_inclusive[i]
            )
        is_lit[world, i] = wp.uint8(passes)


@wp.struct
class Saved:
    """State of worlds that idle while others step [N, ...]."""

    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    qacc_warmstart: wp.array2d(dtype=float)
    overflow: wp.array(dtype=int)


@wp.kernel
def begin_step(
    live: Live,
    overflow: wp.array(dtype=int),
    saved: Saved,
    is_active: wp.array(dtype=wp.uint8),
    is_lit: wp.array2d(dtype=wp.uint8),
    observed: Observed,
):
    """Saves idle worlds; in active ones the image will show the indicators as they are now; dim N."""
    world = wp.tid()
    if is_active[world] != wp.uint8(0):
        for i in range(is_lit.shape[1]):
            observed.is_lit[world, i] = is_lit[world, i]
        return
    saved.overflow[world] = overflow[world]
    for i in range(live.qpos.shape[1]):
        saved.qpos[world, i] = live.qpos[world, i]
    for i in range(live.qvel.shape[1]):
        saved.qvel[world, i] = live.qvel[world, i]
        saved.qacc_warmstart[world, i] = live.qacc_warmstart[world, i]


@wp.kernel
def end_step(
    live: Live,
    overflow: wp.array(dtype=int),
    saved: Saved,
    step: wp.array(dtype=int),
    is_active: wp.array(dtype=wp.uint8),
    is_success: wp.array(dtype=wp.uint8),
    steps_left: wp.array(dtype=int),
    has_diverged: wp.array(dtype=wp.uint8),
    ran: wp.array2d(dtype=wp.uint8),
    successes: wp.array2d(dtype=wp.uint8),
):
    """Restores idle worlds; records the step [N, C] of active ones and stops those whose episode ends; dim N."""
    world = wp.tid()
    if is_active[world] == wp.uint8(0):
        overflow[world] = saved.overflow[world]
        for i in range(live.qpos.shape[1]):
            live.qpos[world, i] = saved.qpos[world, i]
        for i in range(live.qvel.shape[1]):
            live.qvel[world, i] = saved.qvel[world, i]
            live.qacc_warmstart[world, i] = saved.qacc_warmstart[world, i]
        return
    for i in range(live.qpos.shape[1]):
        if not wp.abs(live.qpos[world, i]) < wp.static(_MAX_VALUE):
            has_diverged[world] = wp.uint8(1)
    for i in range(live.qvel.shape[1]):
        # The positions of the next step depend on the acceleration, which the warm start is a copy of.
        if not (
            wp.abs(live.qvel[world, i]) < wp.static(_MAX_VALUE)
            and wp.abs(live.qacc_warmstart[world, i]) < wp.static(_MAX_VALUE)
        ):
            has_diverged[world] = wp.uint8(1)
    ran[world, step[0]] = wp.uint8(1)
    successes[world, step[0]] = is_success[world]
    left = steps_left[world] - 1
    steps_left[world] = left
    if is_success[world] != wp.uint8(0) or left <= 0:
        is_active[world] = wp.uint8(0)


@wp.kernel
def begin_settling_step(
    is_reset: wp.array(dtype=wp.uint8), is_active: wp.array(dtype=wp.uint8), step: wp.array(dtype=int)
):
    """Has all worlds that are reset take the first action of the chunk, also where the goal held; dim N."""
    world = wp.tid()
    is_active[world] = is_reset[world]
    if world == 0:
        step[0] = 0


@wp.kernel
def next_step(step: wp.array(dtype=int)):
    """Moves on to the next action of the chunk; dim 1."""
    step[0] = step[0] + 1


@wp.struct
class Start:
    """States to be written [R, ...] into R worlds: `world` [R], fixture poses [R, F, 7] with quaternions wxyz."""

    world: wp.array(dtype=int)
    task: wp.array(dtype=int)
    qpos: wp.array2d(dtype=float)
    qvel: wp.array2d(dtype=float)
    qacc_warmstart: wp.array2d(dtype=float)
    fixture_poses: wp.array3d(dtype=float)
    goal_pos: wp.array(dtype=wp.vec3)
    goal_ori: wp.array(dtype=wp.mat33)
    gripper: wp.array(dtype=wp.vec2)
    is_fresh: wp.array(dtype=int)


@wp.kernel
def write_start(
    start: Start,
    fixture_body_ids: wp.array(dtype=int),
    live: Live,
    memory: Memory,
    body_pos: wp.array2d(dtype=wp.vec3),
    body_quat: wp.array2d(dtype=wp.quat),
    world_task: wp.array(dtype=int),
    has_diverged: wp.array(dtype=wp.uint8),
    overflow: wp.array(dtype=int),
):
    """Writes states into worlds; dim R."""
    row = wp.tid()
    world = start.world[row]
    for i in range(live.qpos.shape[1]):
        live.qpos[world, i] = start.qpos[row, i]
    for i in range(live.qvel.shape[1]):
        live.qvel[world, i] = start.qvel[row, i]
        live.qacc_warmstart[world, i] = start.qacc_warmstart[row, i]
    for i in range(live.ctrl.shape[1]):
        live.ctrl[world, i] = 0.0
    for i in range(fixture_body_ids.shape[0]):
        body_pos[world, fixture_body_ids[i]] = wp.vec3(
            start.fixture_poses[row, i, 0], start.fixture_poses[row, i, 1], start.fixture_poses[row, i, 2]
        )
        body_quat[world, fixture_body_ids[i]] = wp.quat(
            start.fixture_poses[row, i, 3],
            start.fixture_poses[row, i, 4],
            start.fixture_poses[row, i, 5],
            start.fixture_poses[row, i, 6],
        )
    memory.goal_pos[world] = start.goal_pos[row]
    memory.goal_ori[world] = start.goal_ori[row]
    memory.gripper[world] = start.gripper[row]
    memory.is_fresh[world] = start.is_fresh[row]
    world_task[world] = start.task[row]
    has_diverged[world] = wp.uint8(0)
    overflow[world] = 0


@wp.struct
class Rows:
    """An array with a row for each world, as bytes [N, bytes of a row]."""

    data: wp.array2d(dtype=wp.uint8)


@wp.kernel
def copy_rows(
    sources: wp.array(dtype=Rows),
    source_rows: wp.array(dtype=int),
    targets: wp.array(dtype=Rows),
    target_rows: wp.array(dtype=int),
    num_lanes: int,
):
    """Copies rows of arrays into rows of others, none of which is read; dim (number of rows, arrays, lanes)."""
    i, array, lane = wp.tid()
    source = sources[array].data
    target = targets[array].data
    for byte in range(lane, source.shape[1], num_lanes):
        target[target_rows[i], byte] = source[source_rows[i], byte]


@wp.func
def _rotate(quat: wp.quat, vector: wp.vec3) -> wp.vec3:
    """Rotation by a quaternion that is stored w first."""
    xyz = wp.vec3(quat[1], quat[2], quat[3])
    return vector + 2.0 * wp.cross(xyz, wp.cross(xyz, vector) + quat[0] * vector)


@wp.kernel
def place_static_geoms(
    geom_ids: wp.array(dtype=int),
    geom_bodyid: wp.array(dtype=int),
    geom_pos: wp.array2d(dtype=wp.vec3),
    geom_mat: wp.array(dtype=wp.mat33),
    live: Live,
    geom_xpos: wp.array2d(dtype=wp.vec3),
    geom_xmat: wp.array2d(dtype=wp.mat33),
):
    """Poses of geoms whose bodies have no joints, which MuJoCo Warp takes to be the same for ever; dim (N, static)."""
    world, i = wp.tid()
    geom = geom_ids[i]
    body = geom_bodyid[geom]
    geom_xpos[world, geom] = live.xpos[world, body] + _rotate(live.xquat[world, body], geom_pos[0, geom])
    geom_xmat[world, geom] = live.xmat[world, body] @ geom_mat[geom]


@wp.kernel
def gather_poses(
    worlds: wp.array(dtype=int),
    observed: Observed,
    body_pos: wp.array2d(dtype=wp.vec3),
    body_mat: wp.array2d(dtype=wp.mat33),
):
    """Observed body poses of some worlds in a row; dim (number of them, B)."""
    row, body = wp.tid()
    body_pos[row, body] = observed.body_pos[worlds[row], body]
    body_mat[row, body] = observed.body_mat[worlds[row], body]
