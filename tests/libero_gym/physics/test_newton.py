"""The kernel that solves constraints, on the CPU device: against MuJoCo's solver, MuJoCo Warp's, and the problem."""

import copy
import functools
import types

import mujoco
import mujoco_warp
import numpy as np
import pytest
import warp as wp

from libero_gym.physics.newton import NewtonSolver
from libero_gym.physics.warp_worlds import WarpWorlds
from libero_gym.rendering.raycast import list_devices
from libero_gym.tasks.initial_states import EpisodeStart
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

# MuJoCo Warp's kernels compile once, for a minute; after that none of these takes ten seconds.
pytestmark = pytest.mark.slow

_BALL = """
<body name="ball{i}" pos="{x} {y} 0.0495">
  <freejoint/>
  <geom name="ball{i}" type="sphere" size="0.05" mass="{mass}" condim="{condim}" friction="{friction} 0.01 0.002"/>
</body>"""
# A chain of four balls that touch (24 degrees of freedom), a pair of them (12), one alone (6), and an arm whose tip
# touches nothing (5): limits of a hinge, of a slide and of a ball joint, and friction of joints.
_BALLS = [
    {"i": 0, "x": 0.0, "y": 0.0, "condim": 1, "friction": 1.0, "mass": 0.1},
    {"i": 1, "x": 0.0995, "y": 0.0, "condim": 3, "friction": 0.5, "mass": 0.3},
    {"i": 2, "x": 0.199, "y": 0.0, "condim": 4, "friction": 0.8, "mass": 0.2},
    {"i": 3, "x": 0.2985, "y": 0.0, "condim": 6, "friction": 1.2, "mass": 0.5},
    {"i": 4, "x": 0.0, "y": 0.3, "condim": 6, "friction": 0.9, "mass": 0.2},
    {"i": 5, "x": 0.0995, "y": 0.3, "condim": 4, "friction": 0.3, "mass": 0.4},
    {"i": 6, "x": 0.3, "y": 0.3, "condim": 3, "friction": 1.0, "mass": 0.1},
]
_MODEL = f"""
<mujoco>
  <option cone="elliptic" impratio="20" solver="Newton" jacobian="sparse" timestep="0.002" tolerance="1e-12"/>
  <worldbody>
    <geom name="floor" type="plane" size="1 1 1" condim="1" friction="0.6 0.005 0.001"/>
    {"".join(_BALL.format(**ball) for ball in _BALLS)}
    <body pos="-0.3 0 0.4">
      <joint name="hinge" axis="0 1 0" limited="true" range="-0.5 0.5" frictionloss="0.2"/>
      <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01" mass="0.3" contype="0" conaffinity="0"/>
      <body pos="0.1 0 0">
        <joint name="slide" type="slide" axis="1 0 0" limited="true" range="-0.02 0.02" frictionloss="0.3"/>
        <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01" mass="0.2" contype="0" conaffinity="0"/>
        <body pos="0.1 0 0">
          <joint name="ball" type="ball" limited="true" range="0 0.6" frictionloss="0.01"/>
          <geom type="capsule" fromto="0 0 0 0.1 0 0" size="0.01" mass="0.1" contype="0" conaffinity="0"/>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
_NUM_STATES = 12
_CONTACT_KINDS = (mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS, mujoco.mjtConstraint.mjCNSTR_CONTACT_ELLIPTIC)


@functools.cache
def toy_model():
    return mujoco.MjModel.from_xml_string(_MODEL)


@functools.cache
def toy_states():
    """Positions and velocities of `_NUM_STATES` states: balls that press on each other, slide, roll and part."""
    model, rng = toy_model(), np.random.default_rng(0)
    qpos = np.tile(model.qpos0, (_NUM_STATES, 1))
    qvel = rng.normal(size=(_NUM_STATES, model.nv)) * 10 ** rng.uniform(-2, 0, (_NUM_STATES, 1))
    for ball in range(len(_BALLS)):
        address = 7 * ball
        qpos[:, address : address + 3] += rng.uniform(-4e-4, 4e-4, (_NUM_STATES, 3))
        qpos[:, address + 3 : address + 7] = rng.normal(size=(_NUM_STATES, 4))
    hinge, slide, ball_joint = (int(model.joint(name).qposadr[0]) for name in ("hinge", "slide", "ball"))
    qpos[:, hinge] = rng.uniform(-0.6, 0.6, _NUM_STATES)
    qpos[:, slide] = rng.uniform(-0.03, 0.03, _NUM_STATES)
    qpos[:, ball_joint : ball_joint + 4] = [1, 0, 0, 0] + rng.normal(size=(_NUM_STATES, 4)) * 0.3
    for address in [7 * ball + 3 for ball in range(len(_BALLS))] + [ball_joint]:
        qpos[:, address : address + 4] /= np.linalg.norm(qpos[:, address : address + 4], axis=1, keepdims=True)
    return qpos, qvel


def make_toy(qpos, qvel, *, device="cpu", njmax=128, iterations=100):
    """Return worlds at these states, as far computed as a solver needs."""
    mjm = copy.copy(toy_model())
    mjm.opt.iterations = iterations
    with wp.ScopedDevice(device):
        model = mujoco_warp.put_model(mjm)
        model.opt.graph_conditional = False
        model.opt.warn_overflow = 0
        data = mujoco_warp.make_data(mjm, nworld=len(qpos), nconmax=32, njmax=njmax)
        data.qpos.assign(qpos.astype(np.float32))
        data.qvel.assign(qvel.astype(np.float32))
        compute_problem(model, data)
    return types.SimpleNamespace(mjm=mjm, model=model, data=data, device=device)


def compute_problem(model, data):
    mujoco_warp.fwd_position(model, data, factorize=False)
    mujoco_warp.fwd_velocity(model, data)
    mujoco_warp.fwd_actuation(model, data)
    mujoco_warp.fwd_acceleration(model, data, factorize=True)


def make_solver(worlds):
    return NewtonSolver.of(worlds.mjm, worlds.model, worlds.data, device=worlds.device)


class Problem:
    """What one world's solver minimises, in float64 and by the letter of MuJoCo's documentation."""

    def __init__(self, mjm, data, world):
        num_rows = min(int(data.nefc.numpy()[world]), data.njmax)
        efc = data.efc
        self.mass = np.zeros((mjm.nv, mjm.nv))
        values = data.M.numpy()[world].astype(np.float64)
        for i in range(mjm.nv):
            for k in range(mjm.M_rowadr[i], mjm.M_rowadr[i] + mjm.M_rownnz[i]):
                self.mass[i, mjm.M_colind[k]] = self.mass[mjm.M_colind[k], i] = values[k]
        self.jacobian = np.zeros((num_rows, mjm.nv))
        entries, columns = efc.J.numpy()[world].ravel(), efc.J_colind.numpy()[world].ravel()
        for row in range(num_rows):
            first, count = efc.J_rowadr.numpy()[world, row], efc.J_rownnz.numpy()[world, row]
            self.jacobian[row, columns[first : first + count]] = entries[first : first + count]
        self.kinds = efc.type.numpy()[world, :num_rows]
        self.ids = efc.id.numpy()[world, :num_rows]
        self.D = efc.D.numpy()[world, :num_rows].astype(np.float64)
        self.aref = efc.aref.numpy()[world, :num_rows].astype(np.float64)
        self.loss = efc.frictionloss.numpy()[world, :num_rows].astype(np.float64)
        self.friction = data.contact.friction.numpy().astype(np.float64)
        self.dims = data.contact.dim.numpy()
        self.impratio = mjm.opt.impratio
        self.smooth = data.qacc_smooth.numpy()[world].astype(np.float64)

    def contacts(self):
        """Yield rows, mu of the regularised cone, and friction coefficients of the contacts with elliptic cones."""
        row = 0
        while row < len(self.kinds):
            if self.kinds[row] != mujoco.mjtConstraint.mjCNSTR_CONTACT_ELLIPTIC:
                row += 1
                continue
            dim = min(int(self.dims[self.ids[row]]), len(self.kinds) - row)
            friction = self.friction[self.ids[row]]
            yield slice(row, row + dim), friction[0] / np.sqrt(self.impratio), friction[: dim - 1]
            row += dim

    def cost(self, qacc):
        qacc = qacc.astype(np.float64)
        moved = qacc - self.smooth
        total = 0.5 * moved @ self.mass @ moved
        x = self.jacobian @ qacc - self.aref
        for row, kind in enumerate(self.kinds):
            if kind == mujoco.mjtConstraint.mjCNSTR_FRICTION_DOF:
                loss, width = self.loss[row], self.loss[row] / self.D[row]
                size = abs(x[row])
                total += 0.5 * self.D[row] * size**2 if size <= width else loss * (size - 0.5 * width)
            elif kind != mujoco.mjtConstraint.mjCNSTR_CONTACT_ELLIPTIC:
                total += 0.5 * self.D[row] * min(x[row], 0.0) ** 2
        for rows, mu, friction in self.contacts():
            normal, sliding = mu * x[rows][0], np.linalg.norm(friction * x[rows][1:])
            if normal >= mu * sliding:
                continue
            if mu * normal + sliding <= 0:
                total += 0.5 * self.D[rows] @ x[rows] ** 2
            else:
                weight = self.D[rows][0] / (mu**2 * (1 + mu**2))
                total += 0.5 * weight * (normal - mu * sliding) ** 2
        return total

    @property
    def resolution(self):
        """Difference of cost that the tolerance of 1e-6, relative to the trace of M, lets pass."""
        return 1e-6 * np.trace(self.mass)


def state_of(worlds):
    """What a solver writes, by name."""
    data = worlds.data
    arrays = {name: getattr(data, name) for name in ("qacc", "qfrc_constraint", "solver_niter")}
    arrays |= {name: getattr(data.efc, name) for name in ("Ma", "force", "state")}
    return {name: array.numpy().copy() for name, array in arrays.items()}


def reference_forces(data):
    """Forces of MuJoCo's constraints: (kind, what it belongs to, row in it) to force."""
    forces, seen = {}, {}
    for row in range(data.nefc):
        kind, owner = int(data.efc_type[row]), int(data.efc_id[row])
        if kind in _CONTACT_KINDS:
            owner = tuple(data.contact.geom[owner].tolist())
        index = seen[kind, owner] = seen.get((kind, owner), -1) + 1
        forces[kind, owner, index] = data.efc_force[row]
    return forces


def forces_of(worlds, world):
    """The same of a world of MuJoCo Warp."""
    data, forces, seen = worlds.data, {}, {}
    for row in range(int(data.nefc.numpy()[world])):
        kind, owner = int(data.efc.type.numpy()[world, row]), int(data.efc.id.numpy()[world, row])
        if kind in _CONTACT_KINDS:
            owner = tuple(data.contact.geom.numpy()[owner].tolist())
        index = seen[kind, owner] = seen.get((kind, owner), -1) + 1
        forces[kind, owner, index] = data.efc.force.numpy()[world, row]
    return forces


def test_toy_model_has_every_kind_of_constraint():
    """Or the comparisons below would not say what they seem to."""
    worlds = make_toy(*toy_states())
    make_solver(worlds).solve()
    kinds, states, dims = set(), set(), set()
    for world in range(_NUM_STATES):
        problem = Problem(worlds.mjm, worlds.data, world)
        kinds |= set(problem.kinds.tolist())
        states |= set(worlds.data.efc.state.numpy()[world, : len(problem.kinds)].tolist())
        dims |= {rows.stop - rows.start for rows, _, _ in problem.contacts()}
    kind, state = mujoco.mjtConstraint, mujoco.mjtConstraintState
    assert kinds == {
        kind.mjCNSTR_FRICTION_DOF,
        kind.mjCNSTR_LIMIT_JOINT,
        kind.mjCNSTR_CONTACT_FRICTIONLESS,
        kind.mjCNSTR_CONTACT_ELLIPTIC,
    }
    assert dims == {3, 4, 6}
    assert states >= {state.mjCNSTRSTATE_SATISFIED, state.mjCNSTRSTATE_QUADRATIC, state.mjCNSTRSTATE_CONE}
    assert states & {state.mjCNSTRSTATE_LINEARNEG, state.mjCNSTRSTATE_LINEARPOS}


def test_accelerations_and_forces_equal_mujoco():
    """MuJoCo solves in float64 and to 1e-12.

    float32 holds a penetration of 0.5 mm, whose reference acceleration a stiff contact multiplies, to 1e-5 of itself;
    accelerations come out as exactly. Forces are differences of them times weights that range over 1e4.
    """
    worlds = make_toy(*toy_states())
    make_solver(worlds).solve()
    reference = mujoco.MjData(toy_model())
    for world, (qpos, qvel) in enumerate(zip(*toy_states(), strict=True)):
        reference.qpos[:], reference.qvel[:], reference.qacc_warmstart[:] = qpos, qvel, 0
        mujoco.mj_forward(toy_model(), reference)
        for name, expected, tolerance in (
            ("qacc", reference.qacc, 3e-5),
            ("qfrc_constraint", reference.qfrc_constraint, 2e-3),
        ):
            found = getattr(worlds.data, name).numpy()[world]
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)
        expected, found = reference_forces(reference), forces_of(worlds, world)
        assert found.keys() == expected.keys()
        largest = max(map(abs, expected.values()))
        for key, force in expected.items():
            assert found[key] == pytest.approx(force, abs=2e-3 * largest), key
        problem = Problem(worlds.mjm, worlds.data, world)
        assert problem.cost(worlds.data.qacc.numpy()[world]) < problem.cost(reference.qacc) + 3 * problem.resolution


@functools.cache
def make_scene(suite, task_id):
    """Worlds of a scene after half a second of random actions, with as many iterations as they like."""
    task = get_task(suite, task_id)
    count = 4
    worlds = WarpWorlds(load_scene(task), [task], count, num_action_chunks=5, device="cpu")
    starts = [EpisodeStart(task=task, init_state_id=i, placement_seed=0) for i in range(count)]
    worlds.reset(np.arange(count), starts, init_states="settled")
    rng = np.random.default_rng(0)
    for _ in range(2):
        worlds.step(rng.uniform(-1, 1, (count, 5, 7)), np.ones(count, np.bool_), np.full(count, 1000))
    model = worlds._model
    model.opt.graph_conditional = False
    model.opt.iterations = 100
    mjm = copy.copy(worlds.scene.physics_model)
    mjm.opt.iterations, mjm.opt.ls_iterations = 100, 50
    return types.SimpleNamespace(mjm=mjm, model=model, data=worlds._data, device="cpu")


@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 0), ("libero_10", 0)])
def test_scenes_are_solved_as_well_as_by_mujoco_warp(suite, task_id):
    """Both stop where a step lowers the cost, relative to the trace of M, by less than 1e-6."""
    worlds = make_scene(suite, task_id)
    data, solver, rng = worlds.data, make_solver(worlds), np.random.default_rng(1)
    start = data.qacc_warmstart.numpy().copy()
    iterations = {"own": [], "reference": []}
    for perturbation in (0.0, 1.0, 30.0):
        compute_problem(worlds.model, data)
        problems = [Problem(worlds.mjm, data, world) for world in range(data.nworld)]
        assert min(len(problem.kinds) for problem in problems) > 50
        perturbed = start + perturbation * rng.standard_normal(start.shape).astype(np.float32)
        data.qacc_warmstart.assign(perturbed)
        mujoco_warp.solve(worlds.model, data)
        reference = state_of(worlds)
        for array in (data.qacc, data.qfrc_constraint, data.efc.Ma, data.efc.force, data.solver_niter):
            array.zero_()
        solver.solve()
        found = state_of(worlds)
        iterations["own"].append(found["solver_niter"])
        iterations["reference"].append(reference["solver_niter"])
        for world, problem in enumerate(problems):
            cost, expected = problem.cost(found["qacc"][world]), problem.cost(reference["qacc"][world])
            assert cost <= expected + problem.resolution + 1e-6 * abs(expected)
            assert problem.cost(perturbed[world]) > cost - problem.resolution
            inertial = problem.mass @ found["qacc"][world]
            np.testing.assert_allclose(found["Ma"][world], inertial, rtol=0, atol=1e-5 * np.abs(inertial).max())
    data.qacc_warmstart.assign(start)
    own, reference = (np.concatenate(iterations[name]) for name in ("own", "reference"))
    assert own.max() < 100
    assert own.mean() <= reference.mean() + 1


@pytest.mark.parametrize("which", ["toy", "scene"])
def test_forces_satisfy_their_limits(which):
    worlds = make_toy(*toy_states()) if which == "toy" else make_scene("libero_spatial", 0)
    make_solver(worlds).solve()
    kind = mujoco.mjtConstraint
    num_forces = 0
    for world in range(worlds.data.nworld):
        problem = Problem(worlds.mjm, worlds.data, world)
        force = worlds.data.efc.force.numpy()[world, : len(problem.kinds)].astype(np.float64)
        is_friction = problem.kinds == kind.mjCNSTR_FRICTION_DOF
        assert (np.abs(force[is_friction]) <= problem.loss[is_friction] * (1 + 1e-6)).all()
        is_push = (problem.kinds == kind.mjCNSTR_LIMIT_JOINT) | (problem.kinds == kind.mjCNSTR_CONTACT_FRICTIONLESS)
        assert (force[is_push] >= 0).all()
        for rows, _, friction in problem.contacts():
            normal, sliding = force[rows][0], np.linalg.norm(force[rows][1:] / friction)
            assert sliding <= normal * (1 + 1e-5) + 1e-9
            num_forces += normal > 0
        expected = problem.jacobian.T @ force
        np.testing.assert_allclose(
            worlds.data.qfrc_constraint.numpy()[world], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
        )
    assert num_forces > 20


def test_iterations_are_counted_and_limited():
    limited, free = make_toy(*toy_states(), iterations=3), make_toy(*toy_states())
    costs = []
    for worlds in (limited, free):
        make_solver(worlds).solve()
        qacc = worlds.data.qacc.numpy()
        costs.append([Problem(worlds.mjm, worlds.data, world).cost(qacc[world]) for world in range(_NUM_STATES)])
    counts = free.data.solver_niter.numpy()
    assert counts.min() > 3
    assert counts.max() < 30
    assert (limited.data.solver_niter.numpy() == 3).all()
    assert (np.array(costs[0]) > np.array(costs[1])).any()
    assert (np.array(costs[0]) >= np.array(costs[1]) * (1 - 1e-6)).all()
    # From the solution there is nothing left to do but to find that out.
    free.data.qacc_warmstart.assign(free.data.qacc.numpy())
    make_solver(free).solve()
    assert free.data.solver_niter.numpy().max() <= 2


def test_iterations_equal_those_of_a_lower_limit():
    """A world that took k iterations comes to the same with a limit of k, and not with k - 1."""
    free = make_toy(*toy_states())
    make_solver(free).solve()
    count = int(free.data.solver_niter.numpy()[0])
    for limit, is_same in ((count, True), (count - 1, False)):
        worlds = make_toy(*toy_states(), iterations=limit)
        make_solver(worlds).solve()
        assert np.array_equal(worlds.data.qacc.numpy()[0], free.data.qacc.numpy()[0]) == is_same


def test_worlds_without_constraints_accelerate_freely():
    mjm = mujoco.MjModel.from_xml_string(_MODEL.replace(' frictionloss="', ' damping="'))
    qpos, qvel = np.tile(mjm.qpos0, (2, 1)), np.random.default_rng(0).normal(size=(2, mjm.nv))
    for ball in range(len(_BALLS)):
        qpos[0, 7 * ball + 2] += 0.1 * (1 + ball)  # falls
    model = mujoco_warp.put_model(mjm)
    data = mujoco_warp.make_data(mjm, nworld=2, nconmax=32, njmax=128)
    data.qpos.assign(qpos.astype(np.float32))
    data.qvel.assign(qvel.astype(np.float32))
    data.qacc_warmstart.fill_(100.0)
    compute_problem(model, data)
    NewtonSolver.of(mjm, model, data, device="cpu").solve()
    assert data.nefc.numpy()[0] == 0
    assert data.nefc.numpy()[1] > 0
    np.testing.assert_array_equal(data.qacc.numpy()[0], data.qacc_smooth.numpy()[0])
    assert np.abs(data.qacc.numpy()[1] - data.qacc_smooth.numpy()[1]).max() > 1
    assert data.solver_niter.numpy()[0] == 0
    smooth = data.qfrc_smooth.numpy()[0]
    np.testing.assert_allclose(data.qfrc_constraint.numpy()[0], 0, atol=1e-4 * np.abs(smooth).max())


@pytest.mark.parametrize("njmax", [10, 23, 24, 25, 26, 40])
def test_surplus_constraints_are_reported_and_nothing_lies_beyond_the_buffers(njmax):
    """Contacts cut in two among them. The next world's rows, of which it has few, begin where the first's end."""
    qpos, qvel = (array[:2].copy() for array in toy_states())
    for ball in range(len(_BALLS)):
        qpos[1, 7 * ball + 2] += 0.2 * (1 + ball)
    worlds = make_toy(qpos, qvel, njmax=njmax)
    data, solver = worlds.data, make_solver(worlds)
    num_rows = data.nefc.numpy()
    assert num_rows[0] > njmax > num_rows[1]
    rows = (data.efc.force, data.efc.state, solver.problem.residual, solver.problem.motion)
    for array in (*rows, solver.problem.curvature):
        array.fill_(-77)
    solver.solve()
    for array in rows:
        assert (array.numpy()[1, num_rows[1] :] == -77).all()
    max_rows = solver.problem.curvature.shape[1] // njmax
    assert (solver.problem.curvature.numpy()[1, max_rows * num_rows[1] :] == -77).all()
    assert np.isfinite(data.qacc.numpy()).all()
    alone = make_toy(qpos[1:], qvel[1:])
    make_solver(alone).solve()
    np.testing.assert_array_equal(data.qacc.numpy()[1], alone.data.qacc.numpy()[0])
    mujoco_warp.euler(worlds.model, data)  # reports
    assert (data.overflow.numpy() & int(mujoco_warp.OverflowType.NEFC) > 0).tolist() == [True, False]


_EQUALITY = '<equality><joint joint1="hinge" joint2="slide"/></equality></mujoco>'
_TENDON = '<tendon><fixed><joint joint="hinge" coef="1"/></fixed></tendon></mujoco>'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</mujoco>", _EQUALITY, "equality constraints"),
        ("</mujoco>", _TENDON, "tendons"),
        ('cone="elliptic"', 'cone="pyramidal"', "pyramidal friction cones"),
        ('solver="Newton"', 'solver="CG"', "a solver other than Newton"),
        ("<option ", '<option noslip_iterations="3" ', "iterations of the noslip solver"),
        ('jacobian="sparse"', 'jacobian="dense"', "a dense constraint Jacobian"),
        ("<worldbody>", '<option><flag warmstart="disable"/></option><worldbody>', "no warm start"),
    ],
)
def test_models_with_other_constraints_are_refused(old, new, message):
    mjm = mujoco.MjModel.from_xml_string(_MODEL.replace(old, new, 1))
    model, data = mujoco_warp.put_model(mjm), mujoco_warp.make_data(mjm)
    with pytest.raises(ValueError, match=f"this model has {message}$"):
        NewtonSolver.of(mjm, model, data, device="cpu")


def model_of_free_balls(count):
    ball = '<body pos="{0} 0 1"><freejoint/><geom size="0.05"/></body>'
    bodies = "".join(ball.format(0.2 * i) for i in range(count))
    option = '<option cone="elliptic" jacobian="sparse"/>'
    return mujoco.MjModel.from_xml_string(f"<mujoco>{option}<worldbody>{bodies}</worldbody></mujoco>")


def test_blocks_fit_into_shared_memory():
    """LIBERO's largest scene has 57 degrees of freedom. A GPU's compiler refuses more than 48 KiB a block."""
    sizes = {}
    for count in (8, 10, 12, 14, 18, 24):
        mjm = model_of_free_balls(count)
        model, data = mujoco_warp.put_model(mjm), mujoco_warp.make_data(mjm)
        sizes[mjm.nv] = NewtonSolver.of(mjm, model, data, device="cpu").block_size
    assert sizes == {48: 128, 60: 128, 72: 128, 84: 64, 108: 32, 144: 32}
    mjm = model_of_free_balls(25)
    model, data = mujoco_warp.put_model(mjm), mujoco_warp.make_data(mjm)
    with pytest.raises(ValueError, match="at most 144 degrees of freedom; this model has 150"):
        NewtonSolver.of(mjm, model, data, device="cpu")


def part_sizes(problem):
    """Numbers of degrees of freedom of the parts into which the Hessian falls."""
    is_coupled = (problem.mass != 0) | ((problem.jacobian != 0).T @ (problem.jacobian != 0))
    reach = [np.flatnonzero(row).max() for row in is_coupled]
    ends = [i + 1 for i in range(len(reach)) if max(reach[: i + 1]) == i]
    return np.diff([0, *ends]).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not any(name.startswith("cuda") for name in list_devices()), reason="needs a CUDA device")
def test_gpu_solves_as_the_cpu_does():
    """Many blocks at once; parts for half a warp each, an odd number of them too, and parts for a whole one."""
    qpos, qvel = (np.tile(array, (40, 1)) for array in toy_states())
    for ball in range(4, 7):
        qpos[1::3, 7 * ball + 2] += 0.2 * ball  # flies: another number of parts
    on_cpu, on_gpu = (make_toy(qpos, qvel, device=device) for device in ("cpu", "cuda:0"))
    sizes = [part_sizes(Problem(on_cpu.mjm, on_cpu.data, world)) for world in range(2)]
    assert max(map(max, sizes)) > 16 > 6 >= min(map(min, sizes))
    assert {sum(size <= 16 for size in world) % 2 for world in sizes} == {0, 1}
    for worlds in (on_cpu, on_gpu):
        make_solver(worlds).solve()
    for name, tolerance in (("qacc", 3e-5), ("qfrc_constraint", 2e-3)):
        found, expected = (getattr(worlds.data, name).numpy() for worlds in (on_gpu, on_cpu))
        scale = np.abs(expected).max(axis=1, keepdims=True)
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance, err_msg=name)
    assert on_gpu.data.solver_niter.numpy().max() < 30


@pytest.mark.gpu
@pytest.mark.skipif(not any(name.startswith("cuda") for name in list_devices()), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [3, 10, 14, 18])
def test_gpu_solves_with_blocks_of_every_size(count):
    """Balls in a row that touch: one part of all degrees of freedom, in blocks of 128, 64 and 32 threads."""
    ball = '<body pos="{0} 0 0.0495"><freejoint/><geom size="0.05" mass="0.1"/></body>'
    bodies = "".join(ball.format(0.0995 * i) for i in range(count))
    floor = '<geom type="plane" size="1 1 1"/>'
    option = '<option cone="elliptic" jacobian="sparse"/>'
    mjm = mujoco.MjModel.from_xml_string(f"<mujoco>{option}<worldbody>{floor}{bodies}</worldbody></mujoco>")
    results = []
    for device in ("cpu", "cuda:0"):
        with wp.ScopedDevice(device):
            model = mujoco_warp.put_model(mjm)
            data = mujoco_warp.make_data(mjm, nworld=20, nconmax=64, njmax=256)
            data.qvel.assign(np.random.default_rng(0).normal(size=(20, mjm.nv)).astype(np.float32))
            compute_problem(model, data)
            NewtonSolver.of(mjm, model, data, device=device).solve()
        results.append(data.qacc.numpy())
    scale = np.abs(results[0]).max(axis=1, keepdims=True)
    np.testing.assert_allclose(results[1] / scale, results[0] / scale, rtol=0, atol=3e-5)
