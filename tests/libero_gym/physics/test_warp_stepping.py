"""A step in its own order of launches, on the CPU device: against MuJoCo Warp's step on the same states."""

import dataclasses
import functools
import importlib.metadata
import re
import tomllib
import types
from pathlib import Path

import mujoco
import mujoco_warp
import numpy as np
import pytest
import warp as wp

from libero_gym.physics.clearance import find_clear_pairs
from libero_gym.physics.warp_loading import MUJOCO_WARP_VERSIONS, check_mujoco_warp, find_modules
from libero_gym.physics.warp_stepping import Substep, _keep_memory
from libero_gym.physics.warp_worlds import WarpWorlds
from libero_gym.tasks.initial_states import EpisodeStart
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv

# MuJoCo Warp's kernels compile once, for a minute; after that none of these takes ten seconds.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
_NUM_WORLDS = 4
_SCENES = [("libero_spatial", 0), ("libero_object", 3), ("libero_10", 2)]
# What of a world decides its next step.
_STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl", "time")


@functools.cache
def make_scene(suite, task_id):
    """Worlds of a scene after random actions, which let objects touch the robot and each other, and their state."""
    task = get_task(suite, task_id)
    worlds = WarpWorlds(load_scene(task), [task], _NUM_WORLDS, num_action_chunks=5, device="cpu")
    starts = [EpisodeStart(task=task, init_state_id=i, placement_seed=0) for i in range(_NUM_WORLDS)]
    worlds.reset(np.arange(_NUM_WORLDS), starts, init_states="settled")
    rng = np.random.default_rng(0)
    for _ in range(3):
        actions = rng.uniform(-1, 1, (_NUM_WORLDS, 5, 7))
        actions[:, :, 2] = -1.0  # down, to what lies there
        worlds.step(actions, np.ones(_NUM_WORLDS, np.bool_), np.full(_NUM_WORLDS, 1000))
    worlds._model.opt.graph_conditional = False
    worlds._model.opt.iterations = 100
    solver = worlds._substep.solver
    worlds._substep.solver = dataclasses.replace(solver, settings=(solver.settings[0], 100, *solver.settings[2:]))
    state = {name: getattr(worlds._data, name).numpy().copy() for name in _STATE}
    state["qacc_warmstart"][:] = 0.0  # or solvers would begin where they end
    return types.SimpleNamespace(worlds=worlds, model=worlds._model, data=worlds._data, state=state)


def restore(scene):
    for name, value in scene.state.items():
        getattr(scene.data, name).assign(value)


def contacts_of(data):
    """Contacts as (world, geoms, distance in um), sorted."""
    count = int(data.nacon.numpy()[0])
    contact = data.contact
    columns = (contact.worldid.numpy(), contact.geom.numpy(), contact.dist.numpy())
    return sorted(
        (int(world), *map(int, geoms), float(distance))
        for world, geoms, distance in zip(*(column[:count] for column in columns), strict=True)
    )


def pairs_of(data, found):
    """Pairs of geoms, with their worlds, that the broad phase of `found` let pass."""
    count = int(data.ncollision.numpy()[0])
    assert count <= data.naconmax
    pairs = found.collision_pair.numpy()[:count].tolist()
    result = [
        (world, *pair) for world, pair in zip(found.collision_worldid.numpy()[:count].tolist(), pairs, strict=True)
    ]
    assert len(set(result)) == len(result)
    return set(result)


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_a_step_is_that_of_mujoco_warp(suite, task_id):
    """Contacts agree to the last bit, forces to the rounding of sums, what the solver adds to its tolerance."""
    scene = make_scene(suite, task_id)
    results = []
    for step in (lambda: mujoco_warp.step(scene.model, scene.data), lambda: scene.worlds._substep.run(lambda: None)):
        restore(scene)
        step()
        names = ("qpos", "qvel", "qacc_warmstart", "time", "qfrc_bias", "qfrc_actuator", "qacc_smooth")
        values = {name: getattr(scene.data, name).numpy().copy() for name in names}
        results.append((values, contacts_of(scene.data), scene.data.nefc.numpy().copy()))
    (expected, contacts, num_rows), (found, found_contacts, found_rows) = results
    assert len(contacts) > 10 * _NUM_WORLDS
    assert found_contacts == contacts
    np.testing.assert_array_equal(found_rows, num_rows)
    for name in ("time", "qfrc_bias", "qfrc_actuator", "qacc_smooth"):
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6 * largest, err_msg=name)
    largest = np.abs(expected["qacc_warmstart"]).max()
    np.testing.assert_allclose(found["qacc_warmstart"], expected["qacc_warmstart"], rtol=0, atol=1e-4 * largest)
    np.testing.assert_allclose(found["qvel"], expected["qvel"], rtol=0, atol=1e-5)  # 2 ms of these accelerations
    np.testing.assert_allclose(found["qpos"], expected["qpos"], rtol=0, atol=1e-7)
    assert np.abs(found["qvel"] - scene.state["qvel"]).max() > 1e-2
    restore(scene)


def scatter(scene, rng):
    """Put objects anywhere near others and the robot anywhere within its limits: many shapes touch or nearly do."""
    model = scene.worlds.scene.physics_model
    qpos = scene.state["qpos"].copy()
    free = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE]
    for address in free:
        qpos[:, address : address + 2] = rng.uniform(-0.25, 0.25, (_NUM_WORLDS, 2)) + qpos[:1, free[0] : free[0] + 2]
        qpos[:, address + 2] += rng.uniform(-0.02, 0.1, _NUM_WORLDS)
        quats = rng.normal(size=(_NUM_WORLDS, 4))
        qpos[:, address + 3 : address + 7] = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    limited = np.flatnonzero(model.jnt_limited)
    addresses = model.jnt_qposadr[limited]
    qpos[:, addresses] = rng.uniform(*model.jnt_range[limited].T, (_NUM_WORLDS, len(limited)))
    scene.data.qpos.assign(qpos)
    mujoco_warp.kinematics(scene.model, scene.data)


@pytest.mark.parametrize(("suite", "task_id"), _SCENES)
def test_pairs_that_touch_pass_the_broad_phase(suite, task_id):
    """They are among those of MuJoCo Warp's own broad phase, which compares no boxes along the world's axes."""
    scene = make_scene(suite, task_id)
    substep, data, mjm = scene.worlds._substep, scene.data, scene.worlds.scene.physics_model
    found = mujoco_warp._src.collision_core.create_collision_context(data.naconmax)
    possible = [tuple(pair) for pair in scene.model.nxn_geom_pair_filtered.numpy().tolist()]
    clear = find_clear_pairs(mjm, possible)
    assert len(clear) >= 5
    rng, planes, num_touching = np.random.default_rng(0), set(), 0
    for _ in range(10):
        scatter(scene, rng)
        data.ncollision.zero_()
        mujoco_warp.nxn_broadphase(scene.model, data, found)
        wanted = {pair for pair in pairs_of(data, found) if pair[1:] not in clear and pair[:0:-1] not in clear}
        substep._dynamics.place_bodies()
        substep._find_pairs()
        passed = pairs_of(data, substep._collisions)
        assert passed <= wanted
        assert 0.8 * len(wanted) < len(passed) < 0.2 * _NUM_WORLDS * len(possible)
        mujoco_warp.collision(scene.model, data)
        touching = {contact[:3] for contact in contacts_of(data)}
        assert touching <= passed
        num_touching += len(touching)
        planes |= {pair for pair in touching if mujoco.mjtGeom.mjGEOM_PLANE in mjm.geom_type[list(pair[1:])]}
    assert num_touching > 100
    assert (len(planes) > 0) == (suite == "libero_object")
    restore(scene)


def test_threads_of_a_block_find_the_pairs_that_one_finds(monkeypatch):
    scene = make_scene("libero_spatial", 0)
    substep, found = scene.worlds._substep, []
    scatter(scene, np.random.default_rng(0))
    for with_blocks in (False, True):
        monkeypatch.setattr(wp.config, "enable_cpu_blocks", with_blocks)
        substep._num_near.fill_(7)
        substep.place_bodies()
        substep._find_pairs()
        found.append(pairs_of(scene.data, substep._collisions))
    monkeypatch.undo()
    assert found[0] == found[1]
    assert len(found[0]) > 10 * _NUM_WORLDS
    restore(scene)


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [("naconmax", 20, mujoco_warp.OverflowType.BROADPHASE), ("naccdmax", 0, mujoco_warp.OverflowType.CCD)],
)
def test_overflow_of_contacts_is_reported_as_by_mujoco_warp(name, size, kind):
    scene = make_scene("libero_spatial", 0)
    data, full = scene.data, getattr(scene.data, name)
    reports = []
    for step in (mujoco_warp.step, lambda *args: scene.worlds._substep.for_rows(*args).run(lambda: None)):
        restore(scene)
        scatter(scene, np.random.default_rng(4))
        setattr(data, name, size)
        data.overflow.zero_()
        step(scene.model, data)
        setattr(data, name, full)
        reports.append((data.overflow.numpy() & int(kind)).tolist())
        data.overflow.zero_()
    assert reports[0] == reports[1]
    assert any(reports[0])
    restore(scene)


@pytest.mark.parametrize("far", [1e6, 1e13, np.inf, np.nan])
def test_a_world_that_diverged_takes_no_space_from_others(far):
    """Numbers so large are so coarse that all shapes touch; the space for contacts is shared."""
    scene = make_scene("libero_spatial", 0)
    restore(scene)
    scene.worlds._substep.run(lambda: None)
    before = [contact for contact in contacts_of(scene.data) if contact[0] != 1]
    free = scene.worlds.scene.physics_model.jnt_type == mujoco.mjtJoint.mjJNT_FREE
    addresses = scene.worlds.scene.physics_model.jnt_qposadr[free]
    restore(scene)
    qpos = scene.state["qpos"].copy()
    qpos[1, addresses] = far
    scene.data.qpos.assign(qpos)
    scene.data.overflow.zero_()
    scene.worlds._substep.run(lambda: None)
    contacts = contacts_of(scene.data)
    assert [contact for contact in contacts if contact[0] != 1] == before
    assert len(contacts) < len(before) + 10
    assert not scene.data.overflow.numpy().any()
    restore(scene)


def test_control_comes_between_velocities_and_actuators():
    """What `control` writes acts in this step, and it may read the velocities' bias."""
    scene = make_scene("libero_spatial", 0)
    restore(scene)
    seen = []

    def control():
        seen.append(scene.data.qfrc_bias.numpy().copy())
        scene.data.ctrl.fill_(0.5)

    scene.data.qfrc_bias.zero_()
    scene.worlds._substep.run(control)
    assert len(seen) == 1
    assert np.abs(seen[0]).max() > 1
    np.testing.assert_array_equal(seen[0], scene.data.qfrc_bias.numpy())
    expected = scene.data.qfrc_actuator.numpy().copy()
    restore(scene)
    scene.data.ctrl.fill_(0.5)
    mujoco_warp.forward(scene.model, scene.data)
    np.testing.assert_array_equal(scene.data.qfrc_actuator.numpy(), expected)
    restore(scene)


def test_memory_is_kept_and_suffices_for_later_calls_with_more_worlds():
    given = []

    def function(num_rows, scale):
        given.append(wp.zeros(4, dtype=int))
        given.append(wp.empty(shape=(num_rows, 3), dtype=float))
        given.append(wp.empty(shape=(num_rows,), dtype=scale(wp.vec3)))

    function.__wrapped__ = function
    counters = wp.zeros(4, dtype=int, device="cpu")
    with wp.ScopedDevice("cpu"):
        keeping = _keep_memory(function, 8)
        for num_rows in (2, 8):
            keeping(counters, num_rows, lambda dtype: dtype)
    assert given[0] is counters
    assert given[3] is counters
    assert given[4] is given[1]
    assert given[5] is given[2]
    assert given[1].shape == (8, 3)
    assert given[2].dtype == wp.vec3


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        (lambda wp, rows: (wp.zeros(4, dtype=int), wp.zeros(4, dtype=int)), "wp.zeros(shape=4, dtype=int)"),
        (lambda wp, rows: wp.zeros(5, dtype=int), "wp.zeros(shape=5, dtype=int)"),
        (lambda wp, rows: wp.zeros(4, dtype=float), "wp.zeros(shape=4, dtype=float)"),
        (lambda wp, rows: wp.empty(shape=(9, 3), dtype=float), "wp.empty(shape=(9, 3), dtype=float)"),
        (lambda wp, rows: wp.empty(shape=8, dtype=float), "wp.empty(shape=8, dtype=float)"),
        (lambda wp, rows: wp.empty(shape=(rows, rows), dtype=float), "wp.empty(shape=(7, 7), dtype=float)"),
        (lambda wp, rows: wp.empty(shape=(4,), dtype=float if rows == 8 else int), "wp.empty(shape=(4,), dtype=int)"),
    ],
)
def test_a_function_that_allocates_otherwise_than_known_is_an_error(allocate, message):
    """One of another version would be given memory of the wrong size, or counters that are not its own."""

    def function(rows):
        allocate(wp, rows)

    def call_twice():
        for rows in (8, 7):
            keeping(counters, rows)

    function.__wrapped__ = function
    counters, keeping = wp.zeros(4, dtype=int, device="cpu"), _keep_memory(function, 8)
    with wp.ScopedDevice("cpu"), pytest.raises(RuntimeError, match=re.escape(message)) as raised:
        call_twice()
    assert f"install mujoco-warp{MUJOCO_WARP_VERSIONS}" in str(raised.value)


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [
        ("4.1.0", ImportError, "mujoco-warp==4.1.0 is installed: pip install 'mujoco-warp>=4.0,<4.1'"),
        ("3.17.0", ImportError, "as they are in mujoco-warp>=4.0,<4.1; mujoco-warp==3.17.0 is installed"),
        ("40.0", ImportError, "mujoco-warp==40.0 is installed"),
        (None, ModuleNotFoundError, "the extra warp-physics: pip install 'mujoco-warp>=4.0,<4.1'"),
    ],
)
def test_another_version_of_mujoco_warp_is_refused(monkeypatch, version, error, message):
    def tell(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", tell)
    scene, tasks = load_scene(get_task("libero_spatial", 0)), [get_task("libero_spatial", 0)]
    for make in (
        lambda: WarpWorlds(scene, tasks, 1, device="cpu"),
        lambda: LiberoVectorEnv("libero_spatial", 1, physics="warp", observe_images=False),
    ):
        with pytest.raises(error, match=re.escape(message)):
            make()


def test_pyproject_asks_for_the_version_that_is_checked():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["warp-physics"] == [f"mujoco-warp{MUJOCO_WARP_VERSIONS}"]
    check_mujoco_warp()


def test_a_captured_step_is_a_dozen_kernels_and_nothing_else():
    """What it allocates, copies and clears would be nodes of the graph too."""
    scene = make_scene("libero_spatial", 0)
    restore(scene)
    scene.worlds._substep.run(lambda: None)
    num_launches = 0

    def count(launch, *args, **kwargs):
        nonlocal num_launches
        num_launches += 1
        return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "zeros", "clone", "copy", "empty_like", "zeros_like"):
            patch.setattr(wp, name, lambda *_, name=name, **__: pytest.fail(f"wp.{name} was called"))
        for name in ("zero_", "fill_", "assign"):
            patch.setattr(wp.array, name, lambda *_, name=name, **__: pytest.fail(f"wp.array.{name} was called"))
        for name in ("launch", "launch_tiled"):
            patch.setattr(wp, name, functools.partial(count, getattr(wp, name)))
        scene.worlds._substep.run(lambda: None)
    assert num_launches == 8 + 4  # one for each kind of pairs with a cylinder or a mesh
    restore(scene)


def test_kernels_are_found_without_running_them():
    scene = make_scene("libero_spatial", 0)
    restore(scene)
    names = ("qpos", "qvel", "qacc", "xpos", "ncollision", "nacon", "solver_niter")
    before = {name: getattr(scene.data, name).numpy().copy() for name in names}
    modules = find_modules(lambda: scene.worlds._substep.run(lambda: None))
    for name in ("qpos", "qvel", "qacc", "xpos", "solver_niter"):
        np.testing.assert_array_equal(getattr(scene.data, name).numpy(), before[name], err_msg=name)
    found = {module.name for module, _, _ in modules}
    launched = set()
    load = wp.Module.load

    def note(module, device, block_dim=None):
        launched.add(module.name)
        return load(module, device, block_dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wp.Module, "load", note)
        scene.worlds._substep.run(lambda: None)
    assert launched <= found
    for name in ("_make_kernel", "fused_dynamics", "fused_constraints", "_make_tree_kernels", "_make_broad_phase"):
        assert any(name in module for module in found), name
    restore(scene)


_MODEL = """
<mujoco>
  <option cone="elliptic" jacobian="sparse"/>
  <worldbody>
    <geom name="floor" type="plane" size="1 1 1"/>
    <body pos="0 0 0.05"><freejoint/><geom name="ball" size="0.05"/></body>
  </worldbody>
</mujoco>
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<option ", '<option integrator="implicitfast" ', "an integrator other than Euler's"),
        ("<worldbody>", '<option><flag contact="disable"/></option><worldbody>', "contacts switched off"),
        ("<worldbody>", '<contact><pair geom1="floor" geom2="ball"/></contact><worldbody>', "explicit pairs of shapes"),
        ('cone="elliptic"', 'cone="pyramidal"', "pyramidal friction cones"),
    ],
)
def test_models_that_step_otherwise_are_refused(old, new, message):
    mjm = mujoco.MjModel.from_xml_string(_MODEL.replace(old, new, 1))
    model, data = mujoco_warp.put_model(mjm), mujoco_warp.make_data(mjm)
    with pytest.raises(ValueError, match=re.escape(f"this model has {message}")):
        Substep(mjm, model, data, device="cpu")
