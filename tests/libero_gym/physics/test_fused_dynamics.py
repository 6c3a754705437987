"""Kernels that share a world among a block's threads, on the CPU device: against MuJoCo Warp's own functions.

A CPU gives a block one thread. Warp can have it take turns with the threads of a block between barriers, so that one
which is missing shows.
"""

import functools
import re
import types

import mujoco
import mujoco_warp
import numpy as np
import pytest
import warp as wp

from libero_gym.physics.blocks import collect_arrays
from libero_gym.physics.fused_dynamics import FusedDynamics, Placement, find_unsupported
from libero_gym.physics.warp_stepping import Substep
from libero_gym.physics.warp_worlds import WarpWorlds
from libero_gym.tasks.initial_states import load_recorded_states
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

# MuJoCo Warp's kernels compile once, for a minute; after that none of these takes ten seconds.
pytestmark = pytest.mark.slow

_NUM_WORLDS = 3
# Of each suite one, among them cabinets with drawers, stoves, and a microwave.
_SCENES = [("libero_spatial", 0), ("libero_object", 3), ("libero_goal", 0), ("libero_10", 9), ("libero_90", 20)]
_POSITIONS = (
    *("xpos", "xquat", "xmat", "xanchor", "xaxis", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos"),
    *("site_xmat", "subtree_com", "cinert", "cdof"),
)
_FORCES = (
    *("crb", "M", "actuator_length", "actuator_velocity", "cvel", "cdof_dot", "cacc", "cfrc_int", "qfrc_bias"),
    *("qfrc_damper", "qfrc_fluid", "qfrc_passive"),
)
_ACCELERATIONS = ("actuator_force", "qfrc_actuator", "qfrc_smooth", "qacc_smooth")
_STATE = ("qpos", "qvel", "ctrl", "time", "qacc_warmstart")
_ROWS = ("type", "id", "pos", "margin", "D", "vel", "aref", "frictionloss")


@functools.cache
def make_scene(suite, task_id):
    """Worlds with objects where they come to rest, joints anywhere about their limits, and anything moving."""
    task = get_task(suite, task_id)
    scene = load_scene(task)
    worlds = WarpWorlds(scene, [task], _NUM_WORLDS, device="cpu", loads_kernels=False)
    mjm, model, data = scene.physics_model, worlds._model, worlds._data
    recorded, rng = load_recorded_states(task, "settled"), np.random.default_rng(0)
    qpos, poses = recorded.physics[:_NUM_WORLDS, : mjm.nq].copy(), recorded.fixture_poses[:_NUM_WORLDS]
    limited = np.flatnonzero(mjm.jnt_limited)
    low, high = mjm.jnt_range[limited].T
    qpos[1:, mjm.jnt_qposadr[limited]] = rng.uniform(low - 0.02, high + 0.02, (_NUM_WORLDS - 1, len(limited)))
    for array, values in ((model.body_pos, poses[..., :3]), (model.body_quat, poses[..., 3:])):
        value = array.numpy()
        value[:, scene.fixture_body_ids] = values
        array.assign(value)
    data.qpos.assign(qpos)
    substep = worlds._substep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substep, "_collide", lambda: None)
        worlds._forward()  # places what stands still
    state = {
        "qpos": qpos,
        "qvel": rng.normal(size=(_NUM_WORLDS, mjm.nv)),
        "ctrl": rng.normal(size=(_NUM_WORLDS, mjm.nu)) * 20,
        "time": np.full(_NUM_WORLDS, 0.5),
        "qacc_warmstart": np.zeros((_NUM_WORLDS, mjm.nv)),
    }
    dynamics = FusedDynamics(mjm, model, data, device="cpu")
    made = types.SimpleNamespace(
        mjm=mjm, model=model, data=data, dynamics=dynamics, state=state, substep=substep, solver=substep.solver
    )
    restore(made)
    run_mujoco_warp(made)
    mujoco_warp.make_constraint(model, data)
    return made


def restore(scene):
    for name, value in scene.state.items():
        getattr(scene.data, name).assign(value)
    scene.data.overflow.zero_()


def run_mujoco_warp(scene):
    """All of a step before constraints; contacts are those of planes, boxes and the like: others compile for long."""
    model, data, substep = scene.model, scene.data, scene.substep
    substep.place_bodies()  # boxes of the broad phase
    for launch in (
        *(mujoco_warp.kinematics, mujoco_warp.com_pos, mujoco_warp.crb, mujoco_warp.transmission),
        *(mujoco_warp.fwd_velocity, mujoco_warp.fwd_actuation),
    ):
        launch(model, data)
    substep._find_pairs()
    mujoco_warp.primitive_narrowphase(model, data, substep._collisions, substep._primitive_pairs)
    mujoco_warp.fwd_acceleration(model, data, factorize=True)


def read(data, names):
    return {name: getattr(data, name).numpy().copy() for name in names}


def rows_of(data):
    """Constraint rows of each world with their Jacobians, sorted: which comes first depends on threads."""
    efc = {name: getattr(data.efc, name).numpy() for name in (*_ROWS, "J_rownnz", "J_rowadr")}
    entries, columns = data.efc.J.numpy()[:, 0], data.efc.J_colind.numpy()[:, 0]
    rows = []
    for world, count in enumerate(np.minimum(data.nefc.numpy(), data.njmax)):
        found = []
        for row in range(count):
            jacobian = np.zeros(data.qvel.shape[1])
            begin = efc["J_rowadr"][world, row]
            part = slice(begin, begin + efc["J_rownnz"][world, row])
            jacobian[columns[world, part]] = entries[world, part]
            found.append([*(float(efc[name][world, row]) for name in _ROWS), *jacobian])
        # Rows of a contact share type and id, and keep their order.
        rows.append(np.array(sorted(found, key=lambda row: row[:2])))
    return rows


def blocks_of(data):
    """Pairs (first row, number of rows) of limits and contacts of each world, sorted."""
    efc = data.efc
    return [
        sorted(zip(efc.jtdaj_adr.numpy()[i, :count], efc.jtdaj_nrow.numpy()[i, :count], strict=True))
        for i, count in enumerate(efc.jtdaj_nblock.numpy())
    ]


def assert_close(found, expected, tolerance=1e-6):
    for name, value in expected.items():
        largest = np.abs(value).max()
        assert largest > 0, name
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * largest, err_msg=name)


@pytest.fixture(params=[False, True], ids=["thread", "block"])
def with_blocks(request, monkeypatch):
    """Has kernels under test run by one thread for a world, and by a block of threads."""

    def run(*launches):
        with monkeypatch.context() as patch:
            patch.setattr(wp.config, "enable_cpu_blocks", request.param)
            for launch in launches:
                launch()

    return run


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_kinematics_and_forces_are_those_of_mujoco_warp(suite, task_id, with_blocks):
    scene = make_scene(suite, task_id)
    data, dynamics, names = scene.data, scene.dynamics, (*_POSITIONS, *_FORCES, *_ACCELERATIONS)
    restore(scene)
    run_mujoco_warp(scene)
    expected = read(data, names)
    moves = np.flatnonzero(scene.mjm.body_weldid[scene.mjm.geom_bodyid])
    for name in names:
        value = getattr(data, name).numpy()
        if name.startswith("geom"):
            value[:, moves] = -7.0
        else:
            value[:, name.startswith("x") and name in ("xpos", "xquat", "xmat") :] = -7.0  # the world stays
        getattr(data, name).assign(value)
    for memory in (dynamics._motion.body_force, dynamics._motion.body_drag, dynamics._motion.subtree_drag):
        memory.fill_(-7.0)
    with_blocks(dynamics.place_bodies, dynamics.find_forces, dynamics.find_accelerations)
    assert_close(read(data, names), expected)


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_boxes_contain_shapes_and_little_else(suite, task_id, with_blocks):
    """Boxes of bodies are those around their geoms' boxes, which have the size of the geoms' own boxes, turned."""
    scene = make_scene(suite, task_id)
    mjm, data, dynamics = scene.mjm, scene.data, scene.dynamics
    restore(scene)
    with_blocks(dynamics.place_bodies)
    bounds, bodies = dynamics.geom_bounds.numpy(), dynamics.body_bounds.numpy()
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    corners = mjm.geom_aabb[:, None, :3] + signs * mjm.geom_aabb[:, None, 3:]  # [geoms, 8, 3]
    corners = np.einsum("ngij,gcj->ngci", data.geom_xmat.numpy(), corners) + data.geom_xpos.numpy()[:, :, None]
    has_box = mjm.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    margin = (mjm.geom_margin + mjm.geom_gap)[has_box, None]
    np.testing.assert_allclose(bounds[:, has_box, 0], corners.min(axis=2)[:, has_box] - margin, atol=1e-6)
    np.testing.assert_allclose(bounds[:, has_box, 1], corners.max(axis=2)[:, has_box] + margin, atol=1e-6)
    for body in np.unique(mjm.geom_bodyid):
        its = mjm.geom_bodyid == body
        np.testing.assert_array_equal(bodies[:, body, 0], bounds[:, its, 0].min(axis=1))
        np.testing.assert_array_equal(bodies[:, body, 1], bounds[:, its, 1].max(axis=1))


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_constraints_are_those_of_mujoco_warp(suite, task_id, with_blocks):
    scene = make_scene(suite, task_id)
    data, dynamics, names = scene.data, scene.dynamics, ("nefc", "nf", "nl")
    restore(scene)
    run_mujoco_warp(scene)
    found = read(data, ("nacon", "ncollision"))
    mujoco_warp.make_constraint(scene.model, data)
    expected, expected_rows, expected_blocks = read(data, names), rows_of(data), blocks_of(data)
    assert expected["nl"].sum() > 0
    assert found["nacon"][0] > 30
    for array in (*(getattr(data.efc, name) for name in _ROWS), data.efc.J, data.efc.J_colind, data.efc.J_rownnz):
        array.fill_(-7)
    data.contact.efc_address.fill_(-1)

    def restore_contacts():
        for name, value in found.items():
            getattr(data, name).assign(value)

    with_blocks(dynamics.place_bodies, restore_contacts, dynamics.add_contacts)
    for name, value in read(data, names).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert blocks_of(data) == expected_blocks
    for rows, wanted in zip(rows_of(data), expected_rows, strict=True):
        largest = np.maximum(np.abs(wanted).max(axis=0), 1e-3)
        np.testing.assert_allclose(rows / largest, wanted / largest, rtol=0, atol=1e-6)
    for world, count in enumerate(expected["nf"]):  # the solver finds them there
        types_of_rows = data.efc.type.numpy()[world]
        assert (types_of_rows[:count] == mujoco.mjtConstraint.mjCNSTR_FRICTION_DOF).all()


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_integration_is_that_of_mujoco_warp(suite, task_id, with_blocks):
    scene = make_scene(suite, task_id)
    data, names = scene.data, ("qpos", "qvel", "qacc_warmstart", "time", "overflow")
    restore(scene)
    run_mujoco_warp(scene)
    mujoco_warp.make_constraint(scene.model, data)
    scene.solver.solve()
    mujoco_warp.euler(scene.model, data)
    expected = read(data, names)
    restore(scene)
    with_blocks(scene.dynamics.integrate)
    found = read(data, names)
    np.testing.assert_array_equal(found.pop("overflow"), expected.pop("overflow"))
    assert_close(found, expected, 3e-7)
    assert np.abs(expected["qvel"] - scene.state["qvel"]).max() > 0.1


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [
        ("njmax", 60, mujoco_warp.OverflowType.NEFC),
        ("njmax", 5, mujoco_warp.OverflowType.NEFC),
        ("njmax_nnz", 200, mujoco_warp.OverflowType.NJMAX_NNZ),
        ("njmax_nnz", 5, mujoco_warp.OverflowType.NJMAX_NNZ),
    ],
)
def test_rows_without_room_are_dropped_and_reported_as_by_mujoco_warp(name, size, kind):
    scene = make_scene("libero_spatial", 0)
    data, full = scene.data, getattr(scene.data, name)
    setattr(data, name, size)
    try:
        restore(scene)
        run_mujoco_warp(scene)
        found = read(data, ("nacon", "ncollision"))
        mujoco_warp.make_constraint(scene.model, data)
        expected, expected_rows = read(data, ("nefc",)), rows_of(data)
        scene.solver.solve()
        mujoco_warp.euler(scene.model, data)
        expected |= read(data, ("overflow",))
        restore(scene)
        dynamics = FusedDynamics(scene.mjm, scene.model, data, device="cpu")
        dynamics.place_bodies()
        for counter, value in found.items():
            getattr(data, counter).assign(value)
        data.contact.efc_address.fill_(-1)
        dynamics.add_contacts()
        dynamics.integrate()
        rows = rows_of(data)
    finally:
        setattr(data, name, full)
    for counter, value in expected.items():
        np.testing.assert_array_equal(getattr(data, counter).numpy(), value, err_msg=counter)
    assert (expected["overflow"] & int(kind)).any()
    for some, wanted in zip(rows, expected_rows, strict=True):
        np.testing.assert_allclose(some, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.timeout(60)
def test_a_tree_of_many_degrees_of_freedom_takes_no_minutes_to_compile():
    num_bodies = 48
    body = '<body pos="0.1 0 0"><joint axis="0 1 0" armature="0.1"/><geom size="0.02"/>'
    bodies = body * num_bodies + "</body>" * num_bodies
    mjm = mujoco.MjModel.from_xml_string(
        f'<mujoco><option cone="elliptic" jacobian="sparse"/><worldbody>{bodies}</worldbody></mujoco>'
    )
    with wp.ScopedDevice("cpu"):
        model, data = mujoco_warp.put_model(mjm), mujoco_warp.make_data(mjm)
    reference = mujoco.MjData(mjm)
    reference.qpos[:] = np.random.default_rng(0).uniform(-1, 1, num_bodies)
    mujoco.mj_forward(mjm, reference)
    data.qpos.assign(reference.qpos[None])
    dynamics = FusedDynamics(mjm, model, data, device="cpu")
    for launch in (dynamics.place_bodies, dynamics.find_forces, dynamics.find_accelerations):
        launch()
    assert_close({"qacc": data.qacc_smooth.numpy()[0]}, {"qacc": reference.qacc_smooth}, 1e-4)


def test_an_array_that_is_not_there_is_named():
    scene = make_scene("libero_spatial", 0)
    with pytest.raises(AttributeError, match="neither MuJoCo Warp's data nor its model has 'qpos'"):
        collect_arrays(Placement, vars(scene.model), scene.model)


def test_values_that_differ_between_worlds_are_refused():
    scene = make_scene("libero_spatial", 0)
    with wp.ScopedDevice("cpu"):
        model = mujoco_warp.put_model(scene.mjm, batch_sizes={"body_mass": _NUM_WORLDS})
    with pytest.raises(ValueError, match="body_mass differs between worlds"):
        FusedDynamics(scene.mjm, model, scene.data, device="cpu")


_MODEL = """
<mujoco>
  <option cone="elliptic" jacobian="sparse"/>
  <worldbody>
    <geom name="floor" type="plane" size="1 1 1"/>
    <body pos="0 0 1"><freejoint name="free"/><geom size="0.05"/></body>
    <body name="arm" pos="1 0 1"><joint name="hinge" axis="0 1 0" damping="1"/><geom size="0.05" pos="0.1 0 0"/></body>
  </worldbody>
  <actuator><motor name="motor" joint="hinge"/></actuator>
</mujoco>
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('<freejoint name="free"/>', '<joint type="ball"/>', "ball joints"),
        ('<body name="arm"', '<body mocap="true"/><body name="arm"', "mocap bodies"),
        ('damping="1"', 'stiffness="1"', "springs"),
        ('name="arm"', 'name="arm" gravcomp="1"', "compensated gravity"),
        ("<option", '<option wind="1 0 0"', "wind"),
        ('pos="0.1 0 0"', 'pos="0.1 0 0" fluidshape="ellipsoid"', "drag of ellipsoids"),
        ("<worldbody>", '<option><flag gravity="disable"/></option><worldbody>', "parts of the physics switched off"),
        ('<motor name="motor" joint="hinge"/>', '<intvelocity joint="hinge" kp="1" actrange="0 1"/>', "actuators with"),
        ('<motor name="motor" joint="hinge"/>', '<motor body="arm"/>', "actuators of other than hinges and slides"),
        (
            '<motor name="motor" joint="hinge"/>',
            '<damper joint="hinge" kv="1" ctrlrange="0 1"/>',
            "actuators of another gain",
        ),
        ('damping="1"', 'actuatorfrcrange="-1 1"', "limits of actuators' forces at joints"),
        (
            '<motor name="motor" joint="hinge"/>',
            '<motor joint="free" gear="0 0 1 0 0 0"/>',
            "actuators of other than hinges and slides",
        ),
        ("<option", '<option actuatorgroupdisable="0"', "groups of actuators switched off"),
    ],
)
def test_what_the_kernels_do_not_compute_is_named(old, new, message):
    mjm = mujoco.MjModel.from_xml_string(
        _MODEL.replace(old, new.replace("<motor body", "<adhesion gain='1' ctrlrange='0 1' body"), 1)
    )
    with wp.ScopedDevice("cpu"):
        model = mujoco_warp.put_model(mjm)
        data = mujoco_warp.make_data(mjm)
    assert any(message in name for name in find_unsupported(mjm, model))
    with pytest.raises(ValueError, match=re.escape(message)):
        Substep(mjm, model, data, device="cpu")


def test_a_model_with_none_of_that_is_not_refused():
    mjm = mujoco.MjModel.from_xml_string(_MODEL)
    with wp.ScopedDevice("cpu"):
        assert find_unsupported(mjm, mujoco_warp.put_model(mjm)) == []
