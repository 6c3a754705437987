"""Pictures look like those of MuJoCo 3.3.2, whatever is installed; the installed one's look is an option.

`data/mujoco_3.3.2.npz` and `data/mujoco_3.17.0.npz` hold what those versions draw themselves, recorded by
`tools/record_reference_pictures.py` with OSMesa.
"""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

import libero_gym  # noqa: F401 - registers the ids
from libero_gym.rendering.ray_scene import _halve, _halve_bytes, build_ray_scene
from libero_gym.rendering.raycast import DeviceScene, SceneCaster, WarpRenderer
from libero_gym.rendering.renderers import make_renderer
from libero_gym.rendering.textures import decoded_textures, installed_colorspace, textures_in
from tests.preloaded import run_environments

CAMERAS = ("agentview", "robot0_eye_in_hand")
LINEAR, SRGB = 1, 2

# A grey texture that fills the picture; nothing but ambient light of full strength.
GREY = """
<mujoco>
  <visual><headlight ambient="1 1 1" diffuse="0 0 0" specular="0 0 0"/></visual>
  <asset>
    <texture name="plain" type="2d" builtin="flat" rgb1="1 1 1" width="8" height="8"/>
    <texture name="tagged" type="2d" builtin="flat" rgb1=".5 .5 .5" width="8" height="8"/>
    <material name="grey" specular="0" texture="tagged"/>
  </asset>
  <worldbody>
    <camera name="top" pos="0 0 2"/>
    <geom type="plane" size="4 4 1" material="grey" group="1"/>
  </worldbody>
</mujoco>
"""

needs_tags = pytest.mark.skipif(installed_colorspace() == "linear", reason="MuJoCo before 3.3.3 tags no textures")


def psnr(images, reference):
    return 10 * np.log10(255**2 / max(np.mean((images.astype(np.float64) - reference) ** 2), 1e-12))


def tagged_model():
    model = mujoco.MjModel.from_xml_string(GREY)
    model.tex_colorspace[:] = LINEAR, SRGB
    return model


@needs_tags
def test_the_ray_caster_decodes_tagged_textures_only_where_asked():
    model = tagged_model()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    values = {}
    for colorspace in ("linear", "auto"):
        scene = DeviceScene(build_ray_scene(model, ("top",), texture_colorspace=colorspace), "cpu")
        image = SceneCaster(scene, 8, antialiasing=False).render(
            data.xpos[None], data.xmat.reshape(1, -1, 3, 3), np.zeros((1, 0), np.int32)
        )
        values[colorspace] = image.numpy()[0, 4, 4].tolist()
    texel = int(model.tex_data[-1])
    decoded = 255 * ((texel / 255 + 0.055) / 1.055) ** 2.4  # IEC 61966-2-1
    assert texel in (127, 128)
    assert values == {"linear": [texel] * 3, "auto": [round(decoded)] * 3}


@needs_tags
def test_textures_are_uploaded_as_asked_and_the_model_stays_as_compiled():
    model = tagged_model()
    assert decoded_textures(model, "auto").tolist() == [False, True]
    assert decoded_textures(model, "linear").tolist() == [False, False]
    with textures_in(model, "auto"):
        assert model.tex_colorspace.tolist() == [LINEAR, SRGB]
    with textures_in(model, "linear"):
        assert model.tex_colorspace.tolist() == [LINEAR, LINEAR]
    assert model.tex_colorspace.tolist() == [LINEAR, SRGB]


def test_mipmaps_of_odd_sizes_sample_between_texels():
    model = mujoco.MjModel.from_xml_string(GREY.replace('width="8" height="8"', 'width="5" height="5"'))
    columns = np.array([0, 40, 80, 120, 160], np.uint8)
    model.tex_data[-75:] = np.tile(columns[:, None], (5, 1, 3)).ravel()
    scene = build_ray_scene(model, ("top",))
    first = scene.texture_offset[1, 1]
    red = (scene.texels[first : first + 4] & 255).reshape(2, 2)
    # Two texels over five: their centres lie at 0.75 and 3.25, counted from the centre of the first.
    assert red.tolist() == [[30, 130]] * 2


# Thresholds are 1 dB below what was measured under MuJoCo 3.17; OpenGL itself agrees to 51 dB and more.
@pytest.mark.parametrize(
    ("scene", "agentview_db", "wrist_db"),
    [
        ("libero_spatial/0", 31.7, 31.7),
        ("libero_object/0", 30.2, 31.7),
        pytest.param("libero_goal/0", 32.4, 31.6, marks=pytest.mark.slow),
        pytest.param("libero_10/2", 30.8, 31.9, marks=pytest.mark.slow),
        pytest.param("libero_90/74", 31.9, 35.1, marks=pytest.mark.slow),
    ],
)
def test_the_ray_caster_looks_like_mujoco_3_3_2(recorded, scene, agentview_db, wrist_db):
    simulation, expected = recorded(scene, "3.3.2")
    renderer = WarpRenderer(CAMERAS, 128, num_threads=1)
    image = renderer.render([simulation])[0]
    assert psnr(image[0], expected[0]) >= agentview_db
    assert psnr(image[1], expected[1]) >= wrist_db
    renderer.close()


@needs_tags
def test_the_ray_caster_looks_like_the_installed_mujoco_where_asked(recorded):
    # Thresholds are 1 dB below what was measured.
    simulation, expected = recorded("libero_object/0", "3.17.0")
    renderer = WarpRenderer(CAMERAS, 128, num_threads=1, texture_colorspace="auto")
    image = renderer.render([simulation])[0]
    assert psnr(image[0], expected[0]) >= 30.4
    assert psnr(image[1], expected[1]) >= 32.6
    renderer.close()


# OpenGL lives in a process of its own for each kind: PyOpenGL binds to one platform. All kinds draw one compiled model.
GL_PICTURES = """
import os, sys
import numpy as np
folder, has_tags, *kinds = sys.argv[1:]
sys.path.insert(0, folder)
from conftest import read_recorded
from libero_gym.rendering.renderers import GlRenderer
cameras = ("agentview", "robot0_eye_in_hand")
scenes = ("libero_spatial/0", "libero_goal/0", "libero_10/2", "libero_90/74", "libero_object/0")
pictures = [("linear", "3.3.2", scene) for scene in scenes]
if has_tags == "True":
    pictures.append(("auto", "3.17.0", "libero_object/0"))
for number, (colorspace, version, name) in enumerate(pictures):
    simulation, expected = read_recorded(name, version)
    simulation.scene.render_model
    for kind in kinds:
        if os.fork() == 0:
            renderer = GlRenderer(kind, cameras, 128, texture_colorspace=colorspace)
            images = renderer.render([simulation])[0]
            for camera, image, reference in zip(cameras, images, expected):
                error = np.mean((image.astype(float) - reference) ** 2)
                print(kind, colorspace, name, camera, 10 * np.log10(255**2 / max(error, 1e-12)), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0, (kind, name)
    if name not in [scene for *_, scene in pictures[number + 1 :]]:
        vars(simulation.scene).pop("render_model")
"""


@pytest.mark.slow
def test_opengl_looks_like_mujoco_3_3_2_and_like_the_installed_one_where_asked(gl_kinds):
    has_tags = installed_colorspace() == "auto"
    printed = run_environments(GL_PICTURES, str(Path(__file__).parent), str(has_tags), *gl_kinds)
    agreement = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in printed.splitlines()}
    assert len(agreement) == len(gl_kinds) * (10 + 2 * has_tags)
    assert min(agreement.values()) >= 40, agreement


def means(env):
    observation, _ = env.reset(seed=0, options={"init_state_id": 0, "task_id": 0})
    env.close()
    return [round(float(observation[key].mean())) for key in ("images", "wrist_images")]


def test_environments_have_the_public_look_by_default():
    options = {"renderer": "warp", "image_size": 32}
    single = gymnasium.make("libero_gym/libero_object-v0", **options)
    vector = gymnasium.make_vec(
        "libero_gym/libero_object-v0", num_envs=1, vectorization_mode="vector_entry_point", **options
    )
    assert vector.unwrapped.texture_colorspace == "linear"
    # OpenGL's pictures of this size have means of 142.7 and 141.4.
    assert means(single) == pytest.approx([143, 141], abs=2)
    assert means(vector) == pytest.approx([143, 141], abs=2)


@needs_tags
def test_environments_have_the_installed_look_where_asked():
    options = {"renderer": "warp", "image_size": 32, "texture_colorspace": "auto"}
    single = gymnasium.make("libero_gym/libero_object-v0", **options)
    vector = gymnasium.make_vec(
        "libero_gym/libero_object-v0", num_envs=1, vectorization_mode="vector_entry_point", **options
    )
    assert vector.unwrapped.texture_colorspace == "auto"
    # OpenGL's have 110.8 and 102.7.
    assert means(single) == pytest.approx([111, 103], abs=2)
    assert means(vector) == pytest.approx([111, 103], abs=2)


@pytest.mark.parametrize("has_images", [True, False])
def test_unknown_colorspaces_are_refused(has_images):
    message = (
        r"texture_colorspace='srgb' is unknown \(valid: 'linear', as in public data sets; 'auto', as the installed"
    )
    options = {"texture_colorspace": "srgb", "observe_images": has_images}
    with pytest.raises(ValueError, match=message):
        gymnasium.make("libero_gym/libero_object-v0", **options)
    with pytest.raises(ValueError, match=message):
        gymnasium.make_vec(
            "libero_gym/libero_object-v0", num_envs=1, vectorization_mode="vector_entry_point", **options
        )
    with pytest.raises(ValueError, match=message):
        make_renderer("warp", camera_names=CAMERAS, image_size=8, texture_colorspace="srgb")


def test_recorded_pictures_say_which_version_drew_them():
    data = Path(__file__).parent / "data"
    for version, num_scenes in (("3.3.2", 5), ("3.17.0", 1)):
        with np.load(data / f"mujoco_{version}.npz", allow_pickle=False) as archive:
            assert str(archive["version"]) == version
            images = [archive[name] for name in archive.files if name.endswith("/images")]
        assert len(images) == num_scenes
        assert all(image.shape == (2, 128, 128, 3) and image.dtype == np.uint8 for image in images)


def test_the_recorder_names_what_it_needs():
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    command = [sys.executable, "-m", "tools.record_reference_pictures", "--output", "unused.npz"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 2
    assert "MUJOCO_GL='' names no off-screen OpenGL (valid: 'egl', 'osmesa'" in process.stderr


@pytest.mark.parametrize("size", [(8, 6), (2, 2), (7, 4), (4, 5), (1, 6), (3, 1)])
def test_bytes_are_halved_as_numbers_are(size):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, *size), dtype=np.uint8)
    np.testing.assert_array_equal(_halve_bytes(pixels), np.rint(_halve(pixels)))


def test_sums_of_four_bytes_round_to_even():
    sums = np.arange(4 * 255 + 1)
    four = np.minimum(np.maximum(sums[:, None] - 255 * np.arange(4), 0), 255).astype(np.uint8)  # [1021, 4]
    pixels = four.reshape(1, -1, 2, 2)
    np.testing.assert_array_equal(_halve_bytes(pixels).ravel(), np.rint(sums / 4))
