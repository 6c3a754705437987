"""Kept textures: the same ray scene as that of decoded files, each decoded once, damage found."""

import os
import struct
import types
import zlib
from pathlib import Path

import mujoco
import numpy as np
import pytest

from libero_gym.rendering import small_textures
from libero_gym.rendering.ray_scene import build_ray_scene
from libero_gym.rendering.small_textures import load_small_model
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

XML = """
<mujoco>
  <asset>
    <texture name="large" type="2d" file="{folder}/large.png"/>
    <texture name="cube" type="cube" file="{folder}/small.png"/>
    <texture name="built" type="2d" builtin="flat" rgb1=".2 .4 .6" width="8" height="8"/>
    <material name="large" texture="large"/>
    <material name="cube" texture="cube"/>
    <material name="built" texture="built"/>
  </asset>
  <worldbody>
    <camera name="top" pos="0 0 2"/>
    <site name="hidden" rgba="1 0 0 1"/>
    <geom type="plane" size="4 4 1" material="large" group="1"/>
    <geom type="box" size=".1 .1 .1" material="cube" group="1"/>
    <geom type="box" size=".1 .1 .1" material="built" group="1"/>
  </worldbody>
</mujoco>
"""


def write_png(path: Path, pixels: np.ndarray, *, is_srgb: bool = False) -> None:
    """Writes [height, width, 3] as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    parts += [chunk(b"sRGB", b"\0")] if is_srgb else []
    path.write_bytes(b"".join([*parts, chunk(b"IDAT", zlib.compress(lines.tobytes(), 1)), chunk(b"IEND", b"")]))


class FakeScene:
    """What the function needs of a scene; counts how often the full model is compiled."""

    def __init__(self, folder: Path) -> None:
        self.num_compiled = 0
        self._xml = XML.format(folder=folder)

    @property
    def render_model(self) -> mujoco.MjModel:
        self.num_compiled += 1
        model = self.visual_spec().compile()
        self.hide_sites(model)
        return model

    def visual_spec(self) -> mujoco.MjSpec:
        return mujoco.MjSpec.from_string(self._xml)

    def hide_sites(self, model: mujoco.MjModel) -> None:
        model.site("hidden").rgba[3] = -1.0


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeScene:
    rng = np.random.default_rng(0)
    write_png(tmp_path / "large.png", rng.integers(0, 256, (64, 32, 3), dtype=np.uint8), is_srgb=True)
    write_png(tmp_path / "small.png", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(small_textures, "MAX_TEXTURE_SIZE", 16)
    return FakeScene(tmp_path)


def kept() -> list[Path]:
    return sorted((small_textures.cache_dir() / "textures").iterdir())


def assert_same_ray_scene(model: mujoco.MjModel, full: mujoco.MjModel, cameras: tuple[str, ...], size: int) -> None:
    for colorspace in ("linear", "auto"):
        ours, expected = (
            build_ray_scene(m, cameras, max_texture_size=size, texture_colorspace=colorspace) for m in (model, full)
        )
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


def test_a_model_with_kept_textures_has_the_ray_scene_of_the_full_one(scene):
    first = load_small_model(scene)
    second = load_small_model(scene)
    assert scene.num_compiled > 0
    assert first.tex_width.tolist() == [32, 8, 8]
    assert second.tex_width.tolist() == [8, 8, 8]
    assert second.site("hidden").rgba[3] == -1
    assert_same_ray_scene(second, first, ("top",), 16)


def test_each_file_is_decoded_once_until_it_changes(scene, tmp_path: Path):
    load_small_model(scene)
    assert len(kept()) == 2
    before = scene.num_compiled
    load_small_model(scene)
    assert scene.num_compiled == before
    write_png(tmp_path / "small.png", np.full((8, 8, 3), 77, np.uint8))
    os.utime(tmp_path / "small.png", (0, 0))  # MuJoCo keeps decoded files too, by their times
    assert (load_small_model(scene).texture("cube").data == 77).all()
    assert scene.num_compiled > before
    assert len(kept()) == 3
    assert (load_small_model(scene).texture("cube").data == 77).all()


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other arrays"])
def test_what_is_damaged_is_made_anew(scene, damage: str):
    load_small_model(scene)
    whole = load_small_model(scene)
    file = max(kept(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "changed":
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    else:
        np.savez(file, pixels=np.zeros(3))
    before = scene.num_compiled
    load_small_model(scene)
    assert scene.num_compiled > before
    assert len(kept()) == 2
    again = scene.num_compiled
    np.testing.assert_array_equal(load_small_model(scene).tex_data, whole.tex_data)
    assert scene.num_compiled == again


@pytest.mark.parametrize("task", [("libero_object", 0), pytest.param(("libero_10", 2), marks=pytest.mark.slow)])
def test_scenes_of_libero_look_the_same(task):
    """The floor of libero_object is tagged as sRGB."""
    scene = load_scene(get_task(*task))
    load_small_model(scene)
    model = load_small_model(types.SimpleNamespace(visual_spec=scene.visual_spec, hide_sites=scene.hide_sites))
    assert model.tex_data.nbytes < 0.8 * scene.render_model.tex_data.nbytes
    assert_same_ray_scene(model, scene.render_model, ("agentview", "robot0_eye_in_hand"), 1024)
    vars(scene).pop("render_model")
