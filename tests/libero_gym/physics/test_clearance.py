"""What is proven never to touch, on small mechanisms and on the robot."""

import itertools

import mujoco
import numpy as np
import pytest

from libero_gym.physics import clearance
from libero_gym.physics.clearance import find_clear_pairs
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

_CUBE = " ".join(f"{x} {y} {z}" for x, y, z in itertools.product((-0.05, 0.05), repeat=3))
_BAR = " ".join(f"{x} {y} {z}" for x, y, z in itertools.product((0.0, 0.3), (-0.01, 0.01), (-0.01, 0.01)))
# A bar turns about an upright axis beside a cube, which it meets where it points to it.
_MECHANISM = """
<mujoco>
  <compiler angle="radian"/>
  <asset><mesh name="cube" vertex="{cube}"/><mesh name="bar" vertex="{bar}"/></asset>
  <worldbody>
    <body name="base">
      <geom name="cube" type="mesh" mesh="cube"/>
      <body name="carrier" pos="-0.25 0 0">
        {outer}
        <geom size="0.001" contype="0" conaffinity="0"/>
        <body name="arm">
          {inner}
          <geom name="bar" type="mesh" mesh="bar"/>
        </body>
      </body>
    </body>
    {more}
  </worldbody>
</mujoco>
"""
_HINGE = '<joint axis="0 0 1" pos="{pos}" limited="{limited}" range="{low} {high}"/>'


def hinge(low=0.0, high=1.0, *, limited="true", pos="0 0 0"):
    return _HINGE.format(low=low, high=high, limited=limited, pos=pos)


def make(*, inner="", outer="", more=""):
    text = _MECHANISM.format(cube=_CUBE, bar=_BAR, inner=inner, outer=outer, more=more)
    return mujoco.MjModel.from_xml_string(text)


def pair_of(model):
    return model.geom("cube").id, model.geom("bar").id


def is_clear(model, **arguments):
    return find_clear_pairs(model, [pair_of(model)], **arguments) == {pair_of(model)}


def distance(model, data, pair):
    mujoco.mj_kinematics(model, data)
    return mujoco.mj_geomDistance(model, data, *pair, 10.0, None)


@pytest.fixture(autouse=True)
def _nothing_proven_yet(monkeypatch):
    monkeypatch.setattr(clearance, "_proven", {})


@pytest.fixture(scope="module")
def touching_angle():
    """Angle down to which the bar can turn before it touches the cube, rad."""
    model = make(inner=hinge(0.0, 3.0))
    data = mujoco.MjData(model)
    apart, touching = 1.5, 0.0
    for _ in range(40):
        data.qpos[0] = middle = (apart + touching) / 2
        if distance(model, data, pair_of(model)) > 0:
            apart = middle
        else:
            touching = middle
    assert 0.1 < apart < 1.0
    return apart


def test_limits_decide_and_what_lies_a_tenth_of_a_radian_beyond(touching_angle):
    assert is_clear(make(inner=hinge(touching_angle + 0.11, 1.5)))
    assert not is_clear(make(inner=hinge(touching_angle + 0.09, 1.5)))
    assert not is_clear(make(inner=hinge(0.0, 1.5)))
    assert is_clear(make(inner=hinge(-1.5, -touching_angle - 0.11)))
    assert not is_clear(make(inner=hinge(-1.5, 1.5)))  # apart at both ends


def test_two_joints_are_proven_where_their_sum_stays_away(touching_angle):
    both = touching_angle + 0.2 + 0.02
    assert is_clear(make(outer=hinge(both, both + 0.5), inner=hinge(0.0, 0.5)))
    assert not is_clear(make(outer=hinge(both, both + 0.5), inner=hinge(-0.1, 0.5)))


def test_margins_count(touching_angle):
    model = make(inner=hinge(touching_angle + 0.11, 1.5))
    model.geom_margin[:] = 0.05
    assert not is_clear(model)


def test_slides_may_go_five_millimetres_beyond():
    """The bar's end, at x = 0.05 from the carrier, moves towards the cube's face, which is at 0.20."""
    slide = '<joint type="slide" axis="1 0 0" limited="true" range="-0.2 {}"/>'
    model = make(inner=slide.format(-0.106))
    assert is_clear(model)
    assert not is_clear(make(inner=slide.format(-0.104)))


@pytest.mark.parametrize(
    "joints",
    [
        {"inner": hinge(0.8, 1.5, limited="false")},
        {"inner": hinge(0.8, 1.5), "outer": hinge(limited="false")},
        {"inner": '<joint type="ball" limited="true" range="0 0.001"/>'},
        {"inner": hinge(0.8, 1.5) + '<joint axis="1 0 0" limited="true" range="0 1e-3"/>', "outer": hinge(0, 1e-3)},
    ],
)
def test_unlimited_joints_balls_and_more_than_two_joints_are_not_proven(joints):
    model = make(**joints)
    data = mujoco.MjData(model)
    data.qpos[:] = model.qpos0
    data.qpos[-1] = 0.9
    assert is_clear(make(inner=hinge(0.8, 1.5)))  # the same bar at the same place, but for the joints
    assert not is_clear(model)


def test_free_bodies_and_other_shapes_are_not_proven():
    free = '<body name="far" pos="0 0 5"><freejoint/><geom name="far" type="mesh" mesh="bar"/></body>'
    joint = '<joint range="0 1" limited="true"/>'
    box = f'<body name="box" pos="0 0 5">{joint}<geom name="box" type="box" size="1 1 1"/></body>'
    model = make(inner=hinge(0.8, 1.5), more=free + box)
    cube, bar = pair_of(model)
    pairs = [(cube, bar), (cube, model.geom("far").id), (cube, model.geom("box").id)]
    assert find_clear_pairs(model, pairs) == {(cube, bar)}


def test_bodies_that_are_placed_anew_are_not_proven():
    model = make(inner=hinge(0.8, 1.5))
    base, carrier, arm = (model.body(name).id for name in ("base", "carrier", "arm"))
    assert is_clear(model, placed_bodies=[base])  # both are placed with it
    assert not is_clear(model, placed_bodies=[carrier])
    assert not is_clear(model, placed_bodies=[arm])


def test_what_was_proven_is_remembered_until_something_moves(monkeypatch):
    model = make(inner=hinge(0.8, 1.5))
    blocked = make(inner=hinge(0.0, 1.5))
    found = [is_clear(model), is_clear(blocked)]
    assert found == [True, False]
    measure = mujoco.mj_geomDistance

    def refuse(*_arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(mujoco, "mj_geomDistance", refuse)
    assert [is_clear(model), is_clear(blocked)] == found
    assert is_clear(make(inner=hinge(0.8, 1.5)))
    monkeypatch.setattr(mujoco, "mj_geomDistance", measure)
    bar, turned = model.geom("bar").id, np.empty(4)
    mujoco.mju_mulQuat(turned, [np.cos(0.6), 0.0, 0.0, -np.sin(0.6)], model.geom_quat[bar])
    changes = {
        "geom_pos": (bar, [0.25 * np.cos(1.0), -0.25 * np.sin(1.0), 0.0]),
        "geom_quat": (bar, turned),
        "body_pos": (model.body("carrier").id, [0.0, 0.0, 0.0]),
        "body_quat": (model.body("carrier").id, [np.cos(0.5), 0.0, 0.0, -np.sin(0.5)]),
        "jnt_axis": (0, [1.0, 0.0, 0.0]),
        "jnt_range": (0, [0.0, 1.5]),
        "qpos0": (0, 0.9),
        "geom_margin": (bar, 0.2),
        "geom_gap": (bar, 0.2),
    }
    for name, (index, value) in changes.items():
        moved = make(inner=hinge(0.8, 1.5))
        moved.geom_sameframe[bar] = 0  # or MuJoCo reads the body's inertial frame in place of the geom's
        getattr(moved, name)[index] = value
        assert not is_clear(moved), name


def test_measured_distances_do_not_depend_on_the_collision_algorithm_of_the_model(touching_angle):
    """GPU physics sets this flag for its boxes; MuJoCo then measures meshes less exactly."""
    model = make(inner=hinge(touching_angle + 0.101, 1.5))
    model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_NATIVECCD)
    assert is_clear(model)
    assert model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_NATIVECCD)


@pytest.mark.parametrize(
    "joints",
    [
        {"inner": hinge(-1, 1), "outer": hinge(-1, 1)},
        {"inner": hinge(-3, 3, pos="0.2 0.1 0"), "outer": hinge(-3, 3)},
        {"inner": hinge(-3, 3, pos="0.2 0.1 0"), "outer": hinge(-3, 3, pos="0 -0.3 0")},
        {"inner": hinge(-3, 3) + hinge(-3, 3, pos="0.3 0 0")},
        {"inner": hinge(-3, 3, pos="0.3 0 0") + hinge(-3, 3)},
        {"outer": hinge(-3, 3) + '<joint type="slide" axis="0 1 0" ref="0.3" range="-0.1 0.1" limited="true"/>'},
    ],
)
def test_no_point_moves_further_than_the_bound_says(joints):
    """Between any two positions, near each other or not."""
    model = make(**joints)
    cube, bar = pair_of(model)
    reaches = clearance._joints_between(model, cube, bar)
    assert len(reaches) == 2
    ids = list(reaches)
    is_hinge = model.jnt_type[ids] == mujoco.mjtJoint.mjJNT_HINGE
    bound = np.where(is_hinge, list(reaches.values()), 1.0)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    corners = model.mesh_vert[model.mesh_vertadr[1] : model.mesh_vertadr[1] + model.mesh_vertnum[1]]

    def points(qpos):
        data.qpos[:] = qpos
        mujoco.mj_kinematics(model, data)
        return corners @ data.geom_xmat[bar].reshape(3, 3).T + data.geom_xpos[bar]

    largest = 0.0
    for _ in range(500):
        begin, end = rng.uniform(model.jnt_range[:, 0], model.jnt_range[:, 1], (2, 2))
        end = begin + (end - begin) * 10 ** rng.uniform(-3, 0)
        moved = np.linalg.norm(points(end) - points(begin), axis=1).max()
        ratio = moved / (bound @ np.abs(end - begin))
        assert ratio <= 1 + 1e-9
        largest = max(largest, ratio)
    assert largest > 0.2


def test_links_of_the_robot_never_touch_where_it_is_proven():
    """Joints go up to a tenth of a radian beyond their limits; the fingers' slides by 5 mm."""
    model = load_scene(get_task("libero_spatial", 0)).physics_model
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    shapes = np.flatnonzero(is_mesh & ((model.geom_contype | model.geom_conaffinity) > 0)).tolist()
    pairs = [pair for pair in itertools.combinations(shapes, 2) if np.diff(model.geom_bodyid[list(pair)])[0]]
    clear = find_clear_pairs(model, pairs)
    assert len(clear) >= 8
    assert len(pairs) > 2 * len(clear)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    limited = np.flatnonzero(model.jnt_limited)
    beyond = np.where(model.jnt_type[limited] == mujoco.mjtJoint.mjJNT_HINGE, 0.1, 0.005)
    low, high = model.jnt_range[limited, 0] - beyond, model.jnt_range[limited, 1] + beyond
    closest = {}
    for draw in range(1500):
        # Half of the draws are at ends of ranges, where links come closest.
        share = rng.uniform(size=len(limited)) if draw % 2 else rng.choice([0.0, 0.5, 1.0], len(limited))
        data.qpos[:] = model.qpos0
        data.qpos[model.jnt_qposadr[limited]] = low + share * (high - low)
        mujoco.mj_kinematics(model, data)
        for pair in clear:
            closest[pair] = min(closest.get(pair, 1.0), mujoco.mj_geomDistance(model, data, *pair, 1.0, None))
    assert min(closest.values()) > 0
    assert min(closest.values()) < 0.05  # close enough for the test to mean something
