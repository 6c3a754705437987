"""Scenes: the cache under corruption and concurrency, and the two models of a scene."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import mujoco
import numpy as np
import pytest

from libero_gym.conventions import CONTROL_FREQUENCY_HZ
from libero_gym.physics.controller import SUBSTEPS
from libero_gym.tasks import scene_builder, scenes
from libero_gym.tasks.cache import cache_dir
from libero_gym.tasks.scenes import load_scene, load_scenes
from libero_gym.tasks.suites import get_task, list_tasks


@pytest.fixture
def built_scene():
    return load_scene(get_task("libero_spatial", 0))


@pytest.fixture
def fresh_cache(built_scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache in which building copies from the real one; returns the folders that were built."""
    built: list[Path] = []

    def copy_instead_of_building(requests, _):
        for request in requests:
            for name in ("scene.xml", "scene.json"):
                shutil.copy(built_scene.folder / name, request["folder"])
            built.append(Path(request["folder"]))

    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "_run_builder", copy_instead_of_building)
    monkeypatch.setattr(scenes, "_loaded", {})
    return built


def test_all_tasks_of_spatial_share_one_scene(built_scene):
    assert all(scene is built_scene for scene in load_scenes(list_tasks("libero_spatial")))


def test_number_of_distinct_scenes():
    counts = {
        suite: len({scenes.scene_key(task) for task in list_tasks(suite)})
        for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    }
    assert counts == {"libero_spatial": 1, "libero_object": 10, "libero_goal": 1, "libero_10": 9, "libero_90": 20}


def test_physics_model_is_small_and_has_the_ids_of_the_render_model(built_scene):
    physics, full = built_scene.physics_model, built_scene.render_model
    assert (built_scene.folder / "physics.mjb").stat().st_size < 5e6
    assert physics.ntex == 0 < full.ntex
    for kind, count in (
        ("body", "nbody"),
        ("joint", "njnt"),
        ("site", "nsite"),
        ("actuator", "nu"),
        ("camera", "ncam"),
    ):
        assert getattr(physics, count) == getattr(full, count)
        names = [[getattr(m, kind)(i).name for i in range(getattr(m, count))] for m in (physics, full)]
        assert names[0] == names[1]
    np.testing.assert_array_equal(physics.body_mass, full.body_mass)
    np.testing.assert_array_equal(physics.body_inertia, full.body_inertia)


def test_render_model_hides_what_libero_hides(built_scene):
    model = built_scene.render_model
    assert model.site("gripper0_grip_site").rgba[3] < 0
    assert np.all(model.site_rgba[built_scene.indicator_site_ids, 3] < 0)


def test_data_of_the_scene(built_scene):
    model, robot = built_scene.physics_model, built_scene.robot
    assert [model.joint(f"robot0_joint{i}").qposadr[0] for i in range(1, 8)] == robot.arm_qpos_adr.tolist()
    assert [model.body(i).name for i in built_scene.fixture_body_ids] == ["wooden_cabinet_1_main", "flat_stove_1_main"]
    stove = built_scene.objects["flat_stove_1"]
    assert stove.joint_tests["turnon"](0.5)
    assert not stove.joint_tests["turnon"](0.4999)
    assert stove.joint_tests["turnoff"](-1e-9)
    assert not stove.joint_tests["turnoff"](0.0)
    bowl = built_scene.objects["akita_black_bowl_1"]
    touched = {model.geom(int(i)).name for i in np.flatnonzero(bowl.contact_mask)}
    assert len(touched) == 40
    assert all(name.startswith("akita_black_bowl_1_") for name in touched)


def test_rates_are_those_of_the_scene(built_scene):
    step = SUBSTEPS * built_scene.physics_model.opt.timestep
    assert step * CONTROL_FREQUENCY_HZ == pytest.approx(1.0)


def test_scene_is_read_from_the_cache(fresh_cache):
    task = get_task("libero_spatial", 0)
    first = load_scene(task)
    assert len(fresh_cache) == 1
    scenes._loaded.clear()
    second = load_scene(task)
    assert len(fresh_cache) == 1
    assert first is not second
    np.testing.assert_array_equal(first.physics_model.body_pos, second.physics_model.body_pos)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_damaged_cache_is_rebuilt(fresh_cache, damage: str):
    task = get_task("libero_spatial", 0)
    folder = load_scene(task).folder
    scenes._loaded.clear()
    model_file = folder / "physics.mjb"
    content = bytearray(model_file.read_bytes())
    if damage == "truncate":
        model_file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        model_file.write_bytes(content)
    elif damage == "delete":
        (folder / "scene.json").unlink()
    else:
        (folder / "manifest.json").write_text("[")
    assert load_scene(task).physics_model.nq == 48
    assert len(fresh_cache) == 2
    assert not list(cache_dir().glob("**/.*"))  # nothing half-built stays


def test_key_follows_versions(monkeypatch: pytest.MonkeyPatch):
    task = get_task("libero_spatial", 0)
    before = scenes.scene_key.__wrapped__(task)
    monkeypatch.setattr(mujoco, "__version__", "0.0")
    assert scenes.scene_key.__wrapped__(task) != before


def test_failed_build_shows_its_output(fresh_cache, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"building the scene with LIBERO failed \(exit 1\)(.|\n)*nonexistent.bddl does not exist"
    ):
        scenes._run_builder([{"bddl_file": "/nonexistent.bddl", "folder": str(tmp_path)}], tmp_path)


def test_a_scene_is_built_where_opencv_cannot_be_loaded(built_scene, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Its wheel needs libraries that a bare machine lacks."""
    (tmp_path / "cv2.py").write_text('raise ImportError("libGL.so.1: cannot open shared object file")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "built"
    folder.mkdir()
    scenes._run_builder([{"bddl_file": str(get_task("libero_spatial", 0).bddl_file), "folder": str(folder)}], tmp_path)
    assert (folder / "scene.xml").read_text() == (built_scene.folder / "scene.xml").read_text()


def test_two_processes_build_once(built_scene, tmp_path):
    code = textwrap.dedent(
        f"""
        import pathlib, shutil, sys, time
        from libero_gym.tasks import scenes
        from libero_gym.tasks.suites import get_task
        def build(requests, _):
            pathlib.Path({str(tmp_path)!r}, 'builds.txt').open('a').write('x')
            time.sleep(1.0)
            for request in requests:
                for name in ('scene.xml', 'scene.json'):
                    shutil.copy(pathlib.Path({str(built_scene.folder)!r}) / name, request['folder'])
        scenes._run_builder = build
        print(scenes.load_scene(get_task('libero_spatial', 5)).physics_model.nq)
        """
    )
    environment = {**__import__("os").environ, "LIBERO_GYM_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["48", "48"]
    assert (tmp_path / "builds.txt").read_text() == "x"


def test_installations_that_share_a_cache_keep_a_configuration_each(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    folders = []
    for assets in ("first", "second", "first"):
        monkeypatch.setattr(scene_builder, "assets_root", lambda _, assets=assets: tmp_path / assets)
        folders.append(scene_builder._write_libero_config())
    assert folders[0] == folders[2] != folders[1]
    for folder, assets in zip(folders, ("first", "second"), strict=False):
        assert f'assets: "{tmp_path / assets}"' in (folder / "config.yaml").read_text()


def test_scene_files_hold_no_absolute_asset_path(built_scene):
    xml = (built_scene.folder / "scene.xml").read_text()
    roots = json.loads((built_scene.folder / "scene.json").read_text())["asset_roots"]
    assert 'file="@libero/' in xml
    assert 'file="@robosuite/' in xml
    assert not any(root in xml for root in roots.values())
