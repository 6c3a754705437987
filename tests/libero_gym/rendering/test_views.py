"""Depth and segmentation: by hand, against MuJoCo's own rays and renderer, and as the environments observe them."""

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from libero_gym.env import LiberoEnv
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.cameras import Camera, place_camera
from libero_gym.rendering.ray_scene import VISIBLE_GROUPS, build_ray_scene
from libero_gym.rendering.raycast import DeviceScene, PixelBuffers, SceneCaster, WarpRenderer, list_devices
from libero_gym.rendering.renderers import make_renderer
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv
from tests.preloaded import run_environments

CAMERAS = ("agentview", "robot0_eye_in_hand")
KINDS = ("images", "depth", "segmentation")
TASK = get_task("libero_goal", 1)
OPTIONS = dict(image_size=32, renderer="warp", observe_depth=True, observe_segmentation=True)

# A camera 2 m above a table, a block of 0.1 m to its right; nothing beyond the table's edges.
BLOCK = """
<mujoco>
  <visual><map znear="0.001" zfar="30"/></visual>
  <statistic extent="2"/>
  <worldbody>
    <camera name="top" pos="0 0 2" fovy="90"/>
    <geom type="box" size="1 1 .1" pos="0 0 -.1" group="1"/>
    <body name="block" pos=".6 0 .05"><geom type="box" size=".2 .2 .05" group="1"/></body>
  </worldbody>
</mujoco>
"""


def test_depth_and_bodies_by_hand():
    model = mujoco.MjModel.from_xml_string(BLOCK)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    pixels = PixelBuffers("cpu", 40, antialiasing=True, view_kinds=KINDS)
    caster = SceneCaster(DeviceScene(build_ray_scene(model, ("top",)), "cpu"), 40, antialiasing=True, pixels=pixels)
    views = caster.views(data.xpos[None], data.xmat.reshape(1, -1, 3, 3), np.zeros((1, 0), np.int32))
    depth, bodies = views.depth.numpy()[0, ..., 0], views.segmentation.numpy()[0, ..., 0]
    # 40 pixels show 4 m at the table: a pixel is 0.1 m. Images are mirrored, so the block, at x = 0.6, is to the left.
    assert bodies[20, 14] == model.body("block").id
    assert bodies[20, 26] == 0
    assert bodies[2, 2] == -1
    np.testing.assert_allclose(depth[20, 14], 1.9, rtol=1e-6)
    np.testing.assert_allclose(depth[bodies == 0], 2.0, rtol=1e-6)  # along the axis: slanted rays are no longer
    np.testing.assert_allclose(depth[bodies == -1], 60.0, rtol=1e-6)  # zfar * extent
    assert (bodies == 0).sum() + (bodies == 1).sum() == 400


@pytest.fixture(scope="module")
def simulation():
    simulation = Simulation(load_scene(TASK))
    simulation.reset(TASK, 0, np.random.RandomState(0))
    for _ in range(5):
        simulation.step(np.array([0.5, 0.3, -0.5, 0.2, 0.0, 0.4, 1.0]))
    return simulation


def cast_rays(simulation, camera, size):
    """Returns depth (m, inf where nothing is) and body of each pixel, by MuJoCo's rays, mirrored as images are."""
    model, state = simulation.scene.render_model, simulation.render_state()
    data = mujoco.MjData(model)
    fixtures = simulation.scene.fixture_body_ids
    model.body_pos[fixtures], model.body_quat[fixtures] = state.fixture_poses[:, :3], state.fixture_poses[:, 3:]
    data.qpos[:] = state.qpos
    mujoco.mj_forward(model, data)
    place = place_camera(model, camera)
    body_mat, mat = data.xmat[place.body_id].reshape(3, 3), np.empty(9)
    mujoco.mju_quat2Mat(mat, place.quat_wxyz)
    eye, axes = data.xpos[place.body_id] + body_mat @ place.pos, body_mat @ mat.reshape(3, 3)
    groups = np.zeros(6, np.uint8)
    groups[list(VISIBLE_GROUPS)] = 1
    near = model.vis.map.znear * model.stat.extent
    depth, bodies, geom = np.full((size, size), np.inf), np.full((size, size), -1), np.zeros(1, np.int32)
    extra = (None,) if "normal" in str(mujoco.mj_ray.__doc__) else ()
    for row, column in np.ndindex(size, size):
        offset = (np.array([column, -row]) + np.array([0.5, -0.5]) - np.array([size, -size]) / 2) / (size / 2)
        ray = axes @ np.append(offset * np.tan(np.deg2rad(place.fovy_deg) / 2), -1.0)  # of depth 1
        distance = mujoco.mj_ray(model, data, eye + near * ray, ray / np.linalg.norm(ray), groups, 1, -1, geom, *extra)
        if distance >= 0:
            depth[row, column] = near + distance / np.linalg.norm(ray)
            bodies[row, column] = model.geom_bodyid[geom[0]]
    return depth[:, ::-1], bodies[:, ::-1]


@pytest.mark.gpu
@pytest.mark.skipif(not any(name.startswith("cuda") for name in list_devices()), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [40, 118])
def test_a_gpu_sees_what_the_cpu_does(size):
    tasks = [TASK, get_task("libero_10", 2), get_task("libero_object", 0)]
    simulations = [Simulation(load_scene(task)) for task in tasks]
    for task, simulation in zip(tasks, simulations, strict=True):
        simulation.reset(task, 0, np.random.RandomState(0))
    seen = []
    for device in ("cpu", "cuda:0"):
        renderer = WarpRenderer(CAMERAS, size, device=device, view_kinds=KINDS)
        seen.append(renderer.views(simulations))
        renderer.close()
    on_cpu, on_gpu = seen
    same = on_cpu.segmentation == on_gpu.segmentation
    assert same.mean() > 0.999
    assert len(np.unique(on_gpu.segmentation)) > 10
    np.testing.assert_allclose(on_gpu.depth[same], on_cpu.depth[same], rtol=1e-4, atol=1e-4)
    difference = np.abs(on_gpu.images.astype(int) - on_cpu.images.astype(int))
    assert np.mean(difference > 2) < 1e-3


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_ray_caster_sees_what_mujocos_rays_do(simulation, camera):
    renderer = WarpRenderer((camera,), 40, device="cpu", view_kinds=KINDS)
    views = renderer.views([simulation])
    depth, bodies = views.depth[0, 0, ..., 0], views.segmentation[0, 0, ..., 0]
    expected_depth, expected_bodies = cast_rays(simulation, camera, 40)
    agrees = bodies == expected_bodies
    assert agrees.mean() > 0.98  # outlines: MuJoCo's cylinders are round, those of pictures have corners
    error = np.abs(depth - expected_depth)[agrees]
    assert np.quantile(error, 0.98) < 1e-3
    assert np.median(error) < 1e-5
    assert len(np.unique(bodies)) > 5
    renderer.close()


# Each kind of OpenGL draws in a process of its own, forked from one that has the model with visuals.
AGAINST_MUJOCO = """
import importlib
import os
import sys
import mujoco
import numpy as np
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.ray_scene import VISIBLE_GROUPS
from libero_gym.rendering.renderers import make_renderer
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

folder, *gl_kinds = sys.argv[1:]
cameras, size = ("agentview", "robot0_eye_in_hand"), 96
kinds = ("images", "depth", "segmentation")
task = get_task("libero_goal", 1)
simulation = Simulation(load_scene(task))
simulation.reset(task, 0, np.random.RandomState(0))
simulation.step(np.array([0.5, 0.3, -0.5, 0.2, 0.0, 0.4, 1.0]))
scene, state = simulation.scene, simulation.render_state()
model = scene.render_model


def against_mujoco(kind):
    views = make_renderer(kind, camera_names=cameras, image_size=size, view_kinds=kinds).views([simulation])
    plain = make_renderer(kind, camera_names=cameras, image_size=size)
    assert (plain.render([simulation]) == views.images).all()  # what else is drawn leaves images as they were
    part = make_renderer(kind, camera_names=cameras, image_size=size, view_kinds=("depth",)).views([simulation])
    assert part.images is None and part.segmentation is None and (part.depth == views.depth).all()

    data = mujoco.MjData(model)
    model.body_pos[scene.fixture_body_ids] = state.fixture_poses[:, :3]
    model.body_quat[scene.fixture_body_ids] = state.fixture_poses[:, 3:]
    data.qpos[:] = state.qpos
    mujoco.mj_forward(model, data)
    model.geom("wine_rack_1_g3").group = 3  # a pane of alpha 0.1, which is left out
    options = mujoco.MjvOption()
    options.geomgroup[:] = 0
    options.sitegroup[:] = 0  # hidden by a negative alpha, which mujoco.Renderer shows as ids all the same
    options.geomgroup[list(VISIBLE_GROUPS)] = 1
    # mujoco.Renderer takes the same library only if it is told to.
    sys.modules[mujoco.Renderer.__module__].gl_context.GLContext = importlib.import_module(f"mujoco.{kind}").GLContext
    theirs = mujoco.Renderer(model, size, size)
    for camera, name in enumerate(cameras):
        theirs.update_scene(data, name, options)
        theirs.enable_depth_rendering()
        depth = theirs.render()[:, ::-1]
        np.testing.assert_allclose(views.depth[0, camera, ..., 0], depth, rtol=1e-5)
        theirs.disable_depth_rendering()
        theirs.enable_segmentation_rendering()
        ids, types = np.moveaxis(theirs.render()[:, ::-1], -1, 0)
        theirs.disable_segmentation_rendering()
        is_geom = types == mujoco.mjtObj.mjOBJ_GEOM
        assert is_geom.mean() > 0.9 and set(types[~is_geom]) <= {-1}
        expected = np.where(is_geom, model.geom_bodyid[ids], -1)
        np.testing.assert_array_equal(views.segmentation[0, camera, ..., 0], expected)
    np.savez(f"{folder}/{kind}.npz", depth=views.depth, segmentation=views.segmentation)


for kind in gl_kinds:
    if os.fork() == 0:
        against_mujoco(kind)
        os._exit(0)
    assert os.wait()[1] == 0, kind

cast = make_renderer("warp", camera_names=cameras, image_size=size, view_kinds=kinds).views([simulation])
for kind in gl_kinds:
    drawn = np.load(f"{folder}/{kind}.npz")
    agrees = cast.segmentation == drawn["segmentation"]
    assert agrees.mean() > 0.995, (kind, agrees.mean())
    relative = np.abs(cast.depth / drawn["depth"] - 1)[agrees]
    assert np.quantile(relative, 0.99) < 1e-3 and np.median(relative) < 1e-4, (kind, np.quantile(relative, [0.5, 0.99]))
    print(kind)
"""


def test_opengl_equals_mujocos_renderer_and_the_ray_caster_agrees(gl_kinds, tmp_path):
    assert run_environments(AGAINST_MUJOCO, str(tmp_path), *gl_kinds).split() == gl_kinds


def test_environments_observe_them():
    upwards = Camera(name="upwards", pos=(0.0, 0.0, 9.0), look_at=(0.0, 0.0, 10.0))
    env = LiberoEnv(TASK, camera_names=(*CAMERAS, upwards), **OPTIONS)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert (observation["upwards_segmentation"] == -1).all()
    (far,) = np.unique(observation["upwards_depth"])
    assert f"({far:.0f} m," in " ".join(str(LiberoEnv.__doc__).split())
    assert observation["depth"].shape == observation["wrist_segmentation"].shape == (32, 32, 1)
    labels = env.segmentation_labels()
    seen = {labels[body].object for body in np.unique(observation["segmentation"]).tolist() if body >= 0}
    assert {"plate_1", "wooden_cabinet_1", "flat_stove_1", "robot0_base", "table", "world"} <= seen
    assert labels[env.model.body("wooden_cabinet_1_cabinet_top").id] == (
        "wooden_cabinet_1_cabinet_top",
        "wooden_cabinet_1",
    )
    hand = {label.object for body, label in labels.items() if (observation["wrist_segmentation"] == body).any()}
    assert "robot0_base" in hand
    before = {key: observation[key].copy() for key in ("depth", "segmentation")}
    later, *_ = env.step(np.array([1, 1, -1, 0, 0, 0, 1], np.float32))
    assert (later["depth"] != observation["depth"]).any()
    for key, value in before.items():
        np.testing.assert_array_equal(observation[key], value)  # no two observations share memory
    env.close()


def test_a_vector_environment_observes_what_single_ones_do():
    options = {**OPTIONS, "observe_images": False, "image_size": 16}
    envs = LiberoVectorEnv("libero_goal", 2, num_threads=1, autoreset_mode="DISABLED", **options)
    starts = {"task_id": np.array([1, 3]), "init_state_id": np.array([0, 4])}
    envs.reset(seed=0, options=starts)
    batch, *_ = envs.step(np.full((2, 7), 0.3, np.float32))
    assert envs.observation_space.contains(batch)
    assert [key for key in batch if "images" in key] == []
    single = LiberoEnv("libero_goal", **options)
    for i in range(2):
        single.reset(seed=i, options={key: int(value[i]) for key, value in starts.items()})
        observation, *_ = single.step(np.full(7, 0.3, np.float32))
        for key in ("depth", "wrist_depth", "segmentation", "wrist_segmentation"):
            np.testing.assert_array_equal(batch[key][i], observation[key])
        assert envs.segmentation_labels(i) == envs.envs[i].segmentation_labels() == single.segmentation_labels()
    # Only one of them is reset, and drawn, anew.
    again, _ = envs.reset(seed=0, options={**starts, "reset_mask": np.array([True, False])})
    assert (again["depth"][0] != batch["depth"][0]).any()
    np.testing.assert_array_equal(again["depth"][1], batch["depth"][1])
    envs.close()
    single.close()


def test_gpu_physics_and_tensors_have_them_too():
    torch = pytest.importorskip("torch", reason="torch is no part of this environment")
    pytest.importorskip("mujoco_warp", reason="MuJoCo Warp is no part of this environment")
    arrays = []
    for as_torch in (False, True):
        envs = LiberoVectorEnv(TASK, 2, physics="warp", images_as_torch=as_torch, **{**OPTIONS, "image_size": 16})
        observation, _ = envs.reset(seed=0, options={"init_state_id": 0})
        arrays.append({key: observation[key] for key in ("images", "depth", "wrist_segmentation")})
        assert envs.segmentation_labels(1)[0].object == "world"
        envs.close()
    single = LiberoEnv(TASK, **{**OPTIONS, "image_size": 16})
    expected, _ = single.reset(seed=0, options={"init_state_id": 0})
    for key, array in arrays[0].items():
        assert torch.equal(arrays[1][key].cpu(), torch.from_numpy(array))
        assert array.dtype == expected[key].dtype
    np.testing.assert_allclose(arrays[0]["depth"][0], expected["depth"], atol=1e-3)
    assert (arrays[0]["wrist_segmentation"][1] == expected["wrist_segmentation"]).mean() > 0.99
    single.close()


def test_they_go_through_gymnasiums_checker():
    env = gymnasium.make("libero_gym/libero_goal-v0", task_id=1, observe_text=False, **{**OPTIONS, "image_size": 8})
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_what_cannot_be_is_refused(simulation):
    with pytest.raises(
        ValueError, match=r"view_kinds=\('normals',\) must be some of \('images', 'depth', 'segmentation'\)"
    ):
        make_renderer("warp", camera_names=CAMERAS, image_size=8, view_kinds=("normals",))
    renderer = WarpRenderer(CAMERAS, 8, device="cpu", view_kinds=("depth",))
    with pytest.raises(ValueError, match="made without 'images' among its view_kinds"):
        renderer.render([simulation])
    renderer.close()
    env = LiberoEnv(TASK, observe_images=False)
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        env.segmentation_labels()
    with pytest.raises(TypeError, match=r"'observe_depths'; did you mean 'observe_depth'\?"):
        LiberoEnv(TASK, observe_depths=True)
    with pytest.raises(ValueError, match="images_as_torch=True needs observe_images=True, or depth or segmentation"):
        LiberoVectorEnv(TASK, 1, observe_images=False, images_as_torch=True)


def test_what_was_never_drawn_is_blank():
    envs = LiberoVectorEnv(TASK, 2, num_threads=1, **{**OPTIONS, "image_size": 8})
    envs.draw_only([1])
    observation, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(observation)
    for key, blank in (("images", 0), ("wrist_depth", 0), ("segmentation", -1)):
        assert (observation[key][0] == blank).all()
        assert (observation[key][1] != blank).any()
    envs.draw_only(None)
    drawn = envs.observe()
    assert (drawn["segmentation"][0] != -1).any()
    np.testing.assert_array_equal(drawn["segmentation"][1], observation["segmentation"][1])
    envs.close()
