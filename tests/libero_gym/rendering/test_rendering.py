"""The ray caster on hand-made scenes; the choice of renderer and device; OpenGL against LIBERO, where there is one."""

import ctypes
import importlib.util
import logging
import os
import subprocess
import sys
import types
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from libero_gym.physics.simulation import Simulation
from libero_gym.rendering import raycast
from libero_gym.rendering import renderers as rendering
from libero_gym.rendering.protocol import RendererUnavailableError
from libero_gym.rendering.ray_scene import build_ray_scene
from libero_gym.rendering.raycast import DeviceScene, SceneCaster, WarpRenderer
from libero_gym.rendering.renderers import GlRenderer, choose_egl_device, make_renderer
from libero_gym.tasks.cache import cache_dir
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

CAMERAS = ("agentview", "robot0_eye_in_hand")
DEVICE_CHOICE = {"requested": None, "cuda_device": None, "local_rank": 0}

# The camera looks down on a table from 2 m; the headlight shines along the view, so the centre is lit head-on.
TABLE = """
<mujoco>
  <visual>
    <headlight ambient=".1 .1 .1" diffuse=".4 .4 .4" specular=".5 .5 .5"/>
    <map znear="0.001"/>
    <quality numslices="28" numstacks="16" numquads="4"/>
  </visual>
  <statistic extent="1"/>
  <asset>
    <texture name="half" type="2d" builtin="flat" rgb1=".5 .5 .5" rgb2=".5 .5 .5" width="64" height="64"/>
    <hfield name="hills" nrow="2" ncol="2" size="1 1 1 1"/>
    <material name="matte" specular="0" shininess="0.5" rgba=".8 .6 .4 1"/>
    <material name="glossy" specular="1" shininess="0" rgba=".8 .6 .4 1"/>
    <material name="textured" specular="1" shininess="0" rgba=".8 .6 .4 1" texture="half"/>
    <material name="mirror" specular="0" shininess="0.5" rgba="0 0 0 1" reflectance="0.5"/>
  </asset>
  <worldbody>
    {lights}
    <camera name="top" pos="0 0 2" fovy="45"/>
    <geom name="table" type="box" size="2 2 .1" pos="0 0 -.1" material="{material}" group="1"/>
    {more}
  </worldbody>
</mujoco>
"""


def cast(*, material="matte", more="", lights="", size=15, antialiasing=False, camera="top", lit=(), lit_sites=()):
    """Returns (image of the true view [size, size, 3], model)."""
    model = mujoco.MjModel.from_xml_string(TABLE.format(material=material, more=more, lights=lights))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene = DeviceScene(build_ray_scene(model, (camera,), lit_sites=lit_sites), "cpu")
    caster = SceneCaster(scene, size, antialiasing=antialiasing)
    sites = np.array([lit], dtype=np.int32).reshape(1, -1)
    images = caster.render(data.xpos[None], data.xmat.reshape(1, -1, 3, 3), sites).numpy()
    assert images.shape == (1, size, size, 3)
    return images[0, :, ::-1].astype(int), model


def to_bytes(color):
    """Rounds colours in [0, 1] to bytes as the renderer does, halves upwards."""
    return np.floor(255 * color + 0.5 + 1e-4).astype(int)


def test_diffuse_and_ambient_light_by_hand():
    image, _ = cast()
    # (ambient 0.1 + diffuse 0.4 * cos 0) * colour
    np.testing.assert_array_equal(image[7, 7], to_bytes(0.5 * np.array([0.8, 0.6, 0.4])))


def test_specular_of_exponent_zero_is_constant():
    image, _ = cast(material="glossy")
    np.testing.assert_array_equal(image[7, 7], to_bytes(0.5 * np.array([0.8, 0.6, 0.4]) + 0.5))


def test_light_is_clamped_before_the_texture():
    light = '<light directional="true" dir="0 0 -1" diffuse="1 1 1" specular="1 1 1" castshadow="false"/>'
    image, model = cast(material="textured", lights=light)
    # More than enough light in every channel, so the texture's 0.5 remains.
    texel = model.tex_data[0]
    np.testing.assert_allclose(image[7, 7], texel, atol=1)


def test_mirror_adds_what_is_above_it():
    plate = '<geom type="box" size=".2 .2 .01" pos="0 0 3" rgba="1 1 1 1" group="1"/>'
    nothing, _ = cast(material="mirror")
    assert nothing.max() == 0
    image, _ = cast(material="mirror", more=plate)
    # The mirror shows the plate's underside, which the headlight does not reach: reflectance 0.5 * ambient 0.1.
    assert image[7, 7].tolist() == [13, 13, 13]
    assert image[0, 0].max() == 0


def test_image_is_the_mirror_image_of_the_true_view():
    block = '<geom type="box" size=".3 .3 .05" pos="{} 0 .1" rgba="1 0 0 1" group="1"/>'
    model = mujoco.MjModel.from_xml_string(TABLE.format(material="matte", more=block.format(0.5), lights=""))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    caster = SceneCaster(DeviceScene(build_ray_scene(model, ("top",)), "cpu"), 20, antialiasing=False)
    image = caster.render(data.xpos[None], data.xmat.reshape(1, -1, 3, 3), np.zeros((1, 0), np.int32)).numpy()[0]
    red = image[..., 1] < 20
    # The camera's right is +x, where the block stands.
    assert red[:, :10].any()
    assert not red[:, 10:].any()


def test_geoms_of_other_groups_are_hidden_and_sites_only_drawn_while_lit():
    cover = '<geom type="box" size="1 1 .1" pos="0 0 .2" rgba="0 0 1 1" group="0"/>'
    site = '<site name="burner" type="cylinder" size=".5 .01" pos="0 0 .1" rgba="0 1 0 1" group="0"/>'
    plain, _ = cast()
    dark, _ = cast(more=cover + site, lit_sites=(0,))
    np.testing.assert_array_equal(dark, plain)
    lit, _ = cast(more=cover + site, lit_sites=(0,), lit=(0,))
    assert lit[7, 7, 0] < lit[7, 7, 1]


# A camera over the table and one on a hand that turns; a palm that rests as the latter sees it; a fixture without
# joints, moved in the model; a mirror in which all of it is seen.
RESTING = """
<mujoco>
  <visual><headlight ambient=".2 .2 .2" diffuse=".5 .5 .5" specular=".3 .3 .3"/></visual>
  <asset>
    <texture name="checks" type="2d" builtin="checker" rgb1=".9 .8 .2" rgb2=".1 .3 .7" width="64" height="64"/>
    <texture type="skybox" builtin="gradient" rgb1=".3 .5 .7" rgb2=".1 .1 .1" width="32" height="192"/>
    <material name="checked" texture="checks" specular=".5" shininess=".4"/>
    <material name="mirror" specular="0" rgba=".3 .3 .3 1" reflectance="0.5"/>
  </asset>
  <worldbody>
    <light pos="1 1 3" dir="-.3 -.3 -1" diffuse=".4 .4 .4" castshadow="false"/>
    <camera name="top" pos="0 -1.5 1.5" xyaxes="1 0 0 0 .7 .7"/>
    <geom type="box" size="1 1 .1" pos="0 0 -.1" material="checked" group="1"/>
    <geom type="box" size=".4 .3 .02" pos=".4 .2 .02" material="mirror" group="1"/>
    <body name="shelf" pos="-.7 .2 .1" euler="0 0 20">
      <geom type="box" size=".2 .1 .1" rgba="0 1 0 1" group="1"/>
      <body pos="0 0 .2"><geom type="box" size=".05 .1 .1" rgba="1 1 0 1" group="1"/></body>
    </body>
    <body name="fixture" pos=".2 -.4 .13"><geom type="box" size=".1 .1 .13" rgba="1 0 0 1" group="1"/></body>
    <body name="hand" pos="0 0 .6">
      <joint type="hinge" axis="0 0 1"/><joint type="slide" axis="1 0 0"/>
      <camera name="wrist" pos="0 -.1 .1" xyaxes="1 0 0 0 .9 .3"/>
      <geom type="cylinder" size=".05 .02" rgba=".8 .8 .8 1" group="1"/>
      <body pos="0 0 -.1" euler="30 0 0">
        <geom type="box" size=".1 .02 .05" material="checked" group="1"/>
        <body pos="0 .06 0"><joint type="slide" axis="1 0 0"/>
          <geom type="box" size=".02 .02 .1" rgba=".2 .2 .2 1" group="1"/></body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


def nothing_rests(ray_scene):
    parts, cameras = np.zeros_like(ray_scene.part_rests), np.zeros_like(ray_scene.camera_is_still)
    return replace(ray_scene, part_rests=parts, camera_is_still=cameras)


def test_what_rests_looks_as_if_it_were_looked_for_in_every_image():
    model = mujoco.MjModel.from_xml_string(RESTING)
    fixture = model.body("fixture").id
    ray_scene = build_ray_scene(model, ("top", "wrist"), moved_bodies=(fixture,))
    names = [model.body(int(body)).name for body in ray_scene.part_body]
    resting = [sorted(name for name, rests in zip(names, row, strict=True) if rests) for row in ray_scene.part_rests]
    assert resting == [["world"], ["hand"]]  # the shelf with the world, the palm with the hand
    assert sorted(names) == ["", "fixture", "hand", "world"]  # "" is the finger
    assert ray_scene.camera_is_still.tolist() == [1, 0]
    scenes = (ray_scene, nothing_rests(ray_scene))
    casters = [SceneCaster(DeviceScene(scene, "cpu"), 40, antialiasing=True) for scene in scenes]
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(4):
        data = mujoco.MjData(model)
        data.qpos[:] = rng.uniform(-0.4, 0.4, model.nq)
        model.body_pos[fixture, :2] = rng.uniform(-0.5, 0.5, 2)
        mujoco.mj_kinematics(model, data)
        poses = data.xpos[None], data.xmat.reshape(1, -1, 3, 3), np.zeros((1, 0), np.int32)
        images, expected = (caster.render(*poses).numpy().astype(int) for caster in casters)
        np.testing.assert_array_equal(images[0], expected[0])
        # What rests on the hand was looked for in another pose, which rounds differently.
        assert np.abs(images[1] - expected[1]).max() <= 1
        assert images[0].std() > 20
        assert images[1].std() > 20
        seen.append(images)
    assert all((seen[0][camera] != seen[1][camera]).any() for camera in range(2))


@pytest.mark.slow
def test_what_rests_in_a_scene_of_libero_looks_as_if_it_moved(monkeypatch):
    task = get_task("libero_10", 2)
    scene = load_scene(task)
    simulations = []
    for seed in range(2):  # the stove stands elsewhere
        simulation = Simulation(scene)
        simulation.reset(task, seed, np.random.RandomState(seed))
        for action in np.random.default_rng(seed).uniform(-1, 1, (10, 7)):
            simulation.step(action)
        simulations.append(simulation)
    assert (simulations[0].render_state().fixture_poses != simulations[1].render_state().fixture_poses).any()

    def draw():
        raycast.load_device_scene.cache_clear()
        renderer = WarpRenderer(CAMERAS, 48, device="cpu", num_threads=1)
        images = renderer.render(simulations).astype(int)  # [2, K, 48, 48, 3]
        renderer.close()
        return images

    def all_moves(*arguments, **options):
        ray_scene = build_ray_scene(*arguments, **options)
        assert ray_scene.part_rests.sum(axis=1).tolist() == [1, 1]  # the room, the hand
        return nothing_rests(ray_scene)

    images = draw()
    with monkeypatch.context() as patch:
        patch.setattr(raycast, "build_ray_scene", all_moves)
        expected = draw()
    raycast.load_device_scene.cache_clear()
    np.testing.assert_array_equal(images[:, 0], expected[:, 0])
    assert np.abs(images[:, 1] - expected[:, 1]).max() <= 1


def test_antialiasing_blends_edges_only():
    block = '<geom type="box" size=".3 .3 .05" pos=".1 .1 .1" euler="0 0 30" rgba="1 0 0 1" group="1"/>'
    hard, _ = cast(more=block, size=32)
    soft, _ = cast(more=block, size=32, antialiasing=True)
    changed = (hard != soft).any(axis=-1)
    assert 0.02 < changed.mean() < 0.25
    inside = (hard[..., 1] < 60) & ~changed
    assert inside.sum() > 20


def test_four_samples_tell_the_shares_of_an_edge():
    block = '<geom type="box" size=".3 .3 .05" pos=".1 .1 .1" euler="0 0 30" {} group="1"/>'
    flat = block.format('material="matte" rgba="0 .2 1 1"')
    image, _ = cast(more=flat, size=32, antialiasing=True)
    block_color, table_color = (to_bytes(0.5 * np.array(color)) for color in ([0, 0.2, 1], [0.8, 0.6, 0.4]))
    shares = (image - table_color) / (block_color - table_color)  # [32, 32, 3]
    quarters = np.rint(4 * shares[..., 2])
    assert set(quarters.ravel()) == {0, 1, 2, 3, 4}
    np.testing.assert_allclose(4 * shares, np.broadcast_to(quarters[..., None], shares.shape), atol=0.1)


ROUND = """
<mujoco>
  <asset>
    <texture name="checker" type="cube" builtin="checker" rgb1="1 0 0" rgb2="0 0 1" width="32" height="32"/>
    <material name="checker" texture="checker"/>
  </asset>
  <worldbody>
    <light pos="0 -2 3" dir="0 .5 -1" castshadow="false"/>
    <camera name="top" pos="0 -1.2 .8" xyaxes="1 0 0 0 .55 .83" fovy="45"/>
    <geom type="capsule" size=".12 .2" pos="-.2 0 0" euler="0 60 30" material="checker" group="1"/>
    <geom type="ellipsoid" size=".2 .1 .25" pos=".25 .1 .05" euler="20 40 30" material="checker" group="1"/>
    <geom type="sphere" size=".15" pos=".2 -.3 -.2" euler="70 20 0" material="checker" group="1"/>
    <geom type="ellipsoid" size=".06 .12 .06" pos="-.2 -.4 -.1" rgba=".2 .9 .3 1" group="1"/>
    <geom type="plane" size="2 2 .1" pos="0 0 -.5" rgba=".5 .5 .5 1" group="1"/>
  </worldbody>
</mujoco>
"""
# OpenGL lives in a process of its own: PyOpenGL binds to one platform.
MUJOCO_PICTURE = """
import sys
import mujoco
import numpy as np
model = mujoco.MjModel.from_xml_path(sys.argv[1])
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 128, 128)
renderer.update_scene(data, "top")
np.save(sys.argv[2], renderer.render())
renderer.close()
"""


def test_round_geoms_look_like_mujocos(gl_kinds, tmp_path):
    (tmp_path / "round.xml").write_text(ROUND)
    model = mujoco.MjModel.from_xml_string(ROUND)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    caster = SceneCaster(DeviceScene(build_ray_scene(model, ("top",)), "cpu"), 128, antialiasing=True)
    image = caster.render(data.xpos[None], data.xmat.reshape(1, -1, 3, 3), np.zeros((1, 0), np.int32)).numpy()[0]
    image = image[:, ::-1].astype(float)
    for kind in gl_kinds:
        command = [sys.executable, "-c", MUJOCO_PICTURE, str(tmp_path / "round.xml"), str(tmp_path / f"{kind}.npy")]
        subprocess.run(command, check=True, env=os.environ | {"MUJOCO_GL": kind})
        error = np.mean((image - np.load(tmp_path / f"{kind}.npy")) ** 2)
        # Measured: 37.7; normals that are scaled as points are give 28.8.
        assert 10 * np.log10(255**2 / error) >= 35, kind


@pytest.mark.parametrize(("kind", "size"), [("capsule", ".1 .2"), ("sphere", ".1"), ("ellipsoid", ".1 .2 .3")])
def test_round_geoms_with_flat_textures_are_refused(kind, size):
    with pytest.raises(ValueError, match=f"is of type {kind} and has a flat or uniform texture"):
        cast(more=f'<geom type="{kind}" size="{size}" material="textured" group="1"/>')


def test_the_microwaves_handle_can_be_drawn():
    scene = load_scene(get_task("libero_10", 9))
    capsules = scene.render_model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    assert (capsules & (scene.render_model.geom_group == 1)).any()
    build_ray_scene(scene.render_model, CAMERAS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('<geom type="hfield" hfield="hills" group="1"/>', "mjGEOM_HFIELD, which the ray caster cannot draw"),
        ('<geom type="plane" size="0 0 1" group="1"/>', "infinite planes"),
        ('<light pos="0 0 3" castshadow="true"/>', "casts shadows"),
    ],
)
def test_scenes_that_cannot_be_drawn_faithfully_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        cast(more=more)


def test_unknown_camera_is_refused():
    with pytest.raises(ValueError, match=r"camera 'front' is not in the scene \(cameras: \['top'\]\)"):
        cast(camera="front")


def test_batches_threads_and_repetition_change_nothing():
    task = get_task("libero_spatial", 0)
    simulations = [Simulation(load_scene(task)) for _ in range(3)]
    for i, simulation in enumerate(simulations):
        simulation.reset(task, i, np.random.RandomState(i), num_settling_steps=0)
    one = WarpRenderer(CAMERAS, 24, num_threads=1)
    two = WarpRenderer(CAMERAS, 24, num_threads=2)
    batch = one.render(simulations)
    assert batch.shape == (3, 2, 24, 24, 3)
    np.testing.assert_array_equal(two.render(simulations), batch)
    for i in (2, 0):
        np.testing.assert_array_equal(one.render([simulations[i]])[0], batch[i])
    assert (batch[0] != batch[1]).any()
    if importlib.util.find_spec("torch") is not None:
        np.testing.assert_array_equal(two.views(simulations, as_torch=True).images.cpu().numpy(), batch)
    for renderer in (one, two):
        renderer.close()
        renderer.close()


def test_chosen_renderer_needs_no_gl_here(monkeypatch, caplog):
    monkeypatch.setattr(rendering, "_has_gpu_with_egl", lambda: False)
    monkeypatch.setattr(rendering, "_has_nvidia", lambda: False)
    monkeypatch.setattr(rendering, "_announced", set())
    with caplog.at_level(logging.INFO, logger="libero_gym.rendering.renderers"):
        for _ in range(2):
            renderer = make_renderer(camera_names=CAMERAS, image_size=8)
            assert renderer.name == "warp"
            renderer.close()
    assert [record.message for record in caplog.records] == [
        "renderer: warp (choose with renderer='egl', 'osmesa' or 'warp')"
    ]
    assert (cache_dir() / "warp").is_dir()


@pytest.mark.parametrize("kind", ["egl", "osmesa"])
def test_absent_gl_is_an_error_with_a_remedy(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, f"mujoco.{kind}", None)
    with pytest.raises(RendererUnavailableError, match=rf"'{kind}' is not available .*renderer='warp'"):
        make_renderer(kind, camera_names=CAMERAS, image_size=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "vulkan"}, r"renderer='vulkan' is unknown \(valid: None, 'egl', 'osmesa', 'warp'\)"),
        ({"image_size": 0}, "image_size=0 is not a positive number"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_renderer(**({"kind": "warp", "camera_names": CAMERAS, "image_size": 8} | arguments))


def test_absent_device_is_refused():
    with pytest.raises(RendererUnavailableError, match="Warp has no device 'cuda:99'"):
        WarpRenderer(CAMERAS, 8, device="cuda:99")


def test_camera_that_the_scene_lacks_is_refused(recorded):
    simulation, _ = recorded("libero_spatial/0", "3.3.2")
    renderer = WarpRenderer(("nowhere",), 8)
    with pytest.raises(ValueError, match="camera 'nowhere' is not in the scene"):
        renderer.render([simulation])
    renderer.close()


@pytest.mark.parametrize(
    ("cuda_ordinals", "choice", "expected"),
    [
        ([2, 0, 1, None], {"cuda_device": 0}, 1),  # EGL lists the GPUs in another order
        ([2, 0, 1, None], {"cuda_device": 2}, 0),
        ([2, 0, 1, None], {"local_rank": 1}, 2),  # CUDA is not in use yet: as the ray caster chooses
        ([2, 0, 1, None], {"local_rank": 3}, 1),  # two ranks share a GPU
        ([None, None, 0, None], {"local_rank": 3}, 2),  # each rank sees one GPU
        ([2, 0, 1, None], {"cuda_device": 0, "requested": "3"}, 3),
        ([None, None], {"local_rank": 1}, None),  # no GPU of NVIDIA's
        ([None], {"cuda_device": 1}, None),
        ([], {}, None),
    ],
)
def test_egl_device_is_that_of_the_cuda_device(cuda_ordinals, choice, expected):
    assert choose_egl_device(cuda_ordinals, **DEVICE_CHOICE | choice) == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"cuda_device": 2}, r"no EGL device belongs to CUDA device 2 \(EGL has those of CUDA devices \[0, 1\]\)"),
        ({"requested": "3"}, r"MUJOCO_EGL_DEVICE_ID='3' is not an EGL device of this machine \(valid: \[0, 1, 2\]\)"),
        ({"requested": "cuda:0"}, "MUJOCO_EGL_DEVICE_ID='cuda:0' is not an EGL device"),
    ],
)
def test_absent_egl_device_is_refused(choice, message):
    with pytest.raises(RendererUnavailableError, match=message):
        choose_egl_device([1, 0, None], **DEVICE_CHOICE | choice)


class FakeEgl:
    """Stands in for `mujoco.egl` on a machine whose second EGL device is CUDA device 0, the third device 1."""

    def __init__(self):
        self.EGL = self
        self.EGLDeviceEXT = ctypes.c_void_p
        self.EGL_PLATFORM_DEVICE_EXT = 0x313F
        self.EGL_DISPLAY = None
        self.EGL_NO_SURFACE = self.EGL_NO_CONTEXT = None
        self.opened_on = []
        signature = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))
        self.query = signature(self._query_device)

    def _query_device(self, device, attribute, value):
        assert attribute == 0x323A
        value[0] = device - 12
        return device > 11

    def eglGetProcAddress(self, name):
        assert name == "eglQueryDeviceAttribEXT"
        return ctypes.cast(self.query, ctypes.c_void_p).value

    def eglQueryDevicesEXT(self):
        return [11, 12, 13]

    def eglGetError(self):
        return 0

    def eglGetCurrentContext(self):
        return None

    def eglMakeCurrent(self, *context):
        self.current = context

    def eglGetPlatformDisplayEXT(self, platform, device, attributes):
        assert platform == self.EGL_PLATFORM_DEVICE_EXT
        return f"display of {device}"

    def eglInitialize(self, display, major, minor):
        self.opened_on.append(display)

    def eglTerminate(self, display):
        self.opened_on.remove(display)

    def GLContext(self, width, height):
        assert self.opened_on == [self.EGL_DISPLAY]
        return types.SimpleNamespace(make_current=lambda: None, free=lambda: None)


@pytest.mark.parametrize(("rank", "device"), [("0", 12), ("1", 13)])
def test_each_rank_opens_egl_on_its_own_gpu(monkeypatch, rank, device):
    platform = FakeEgl()
    monkeypatch.setitem(sys.modules, "mujoco.egl", platform)
    monkeypatch.setattr(rendering, "_current_cuda_device", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    renderer = GlRenderer("egl", CAMERAS, 8)
    renderer._make_current()
    assert platform.opened_on == [f"display of {device}"]
    renderer.close()


# LIBERO and OpenGL live in a process of their own: both leave traces in the one that imports them.
LIBERO_IMAGES = """
import sys
import numpy as np
from libero_gym.tasks.scene_builder import import_libero
from libero_gym.tasks.suites import get_task, load_init_states
task = get_task("libero_spatial", 0)
envs = import_libero()
env = envs.env_wrapper.OffScreenRenderEnv(bddl_file_name=str(task.bddl_file), camera_heights=64, camera_widths=64)
np.random.seed(0)
env.reset()
env.set_init_state(load_init_states(task)[3])
for _ in range(3):
    obs, *_ = env.step([0.3, -0.2, 0.1, 0, 0, 0.2, 1])
images = [obs[f"{name}_image"][::-1, ::-1] for name in ("agentview", "robot0_eye_in_hand")]
from libero_gym.rendering.renderers import GlRenderer
from libero_gym.rendering.textures import installed_colorspace
from libero_gym.tasks.scenes import load_scene
from libero_gym.physics.simulation import Simulation
simulation = Simulation(load_scene(task))
simulation.reset(task, 3, np.random.RandomState(0), init_states="original", num_settling_steps=0)
for _ in range(3):
    simulation.step([0.3, -0.2, 0.1, 0, 0, 0.2, 1])
cameras = ("agentview", "robot0_eye_in_hand")
ours = GlRenderer(sys.argv[1], cameras, 64, texture_colorspace=installed_colorspace()).render([simulation])[0]
print("differing bytes:", int((np.stack(images) != ours).sum()))
"""


@pytest.mark.slow
def test_gl_images_are_those_of_libero(gl_kinds):
    kind = gl_kinds[0]
    process = subprocess.run(
        [sys.executable, "-c", LIBERO_IMAGES, kind],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MUJOCO_GL": kind},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.splitlines()[-1] == "differing bytes: 0"


@pytest.mark.usefixtures("egl")
def test_egl_device_that_this_machine_lacks():
    code = "from libero_gym.rendering.renderers import GlRenderer; GlRenderer('egl', (), 8).describe_device()"
    environment = {**os.environ, "MUJOCO_EGL_DEVICE_ID": "77"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "RendererUnavailableError: MUJOCO_EGL_DEVICE_ID='77' is not an EGL device" in process.stderr
