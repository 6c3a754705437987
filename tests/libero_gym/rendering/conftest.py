"""Recorded pictures, and which OpenGL there is, for all tests of rendering."""

import functools
import subprocess
import sys
import types
from pathlib import Path

import mujoco
import numpy as np
import pytest

from libero_gym.physics.simulation import RenderState
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

DATA = Path(__file__).parent / "data"


def read_recorded(scene_name, version):
    with np.load(DATA / f"mujoco_{version}.npz", allow_pickle=False) as archive:
        arrays = {name: archive[f"{scene_name}/{name}"] for name in (*RenderState._fields, "images")}
        assert str(archive["version"]) == version
    suite, task_id = scene_name.split("/")
    scene = load_scene(get_task(suite, int(task_id)))
    model = mujoco.MjModel.from_binary_path(str(scene.folder / "physics.mjb"))
    model.body_pos[scene.fixture_body_ids] = arrays["fixture_poses"][:, :3]
    model.body_quat[scene.fixture_body_ids] = arrays["fixture_poses"][:, 3:]
    state = RenderState(*(arrays[name] for name in RenderState._fields))
    return types.SimpleNamespace(scene=scene, model=model, render_state=lambda: state), arrays["images"]


@pytest.fixture
def recorded():
    """Return a function of (suite/task_id, MuJoCo version) to (stand-in for a simulation, images [K, 128, 128, 3])."""
    return read_recorded


@functools.cache
def works(kind):
    probe = f"from libero_gym.rendering.renderers import GlRenderer; GlRenderer({kind!r}, (), 8).describe_device()"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.fixture
def gl_kinds():
    """Return those of "osmesa" and "egl" that work here, each in a process of its own; skip the test without any."""
    kinds = [kind for kind in ("osmesa", "egl") if works(kind)]
    if not kinds:
        pytest.skip("no OpenGL here: neither OSMesa (Debian: libosmesa6) nor EGL works")
    return kinds


@pytest.fixture
def egl():
    """Skip the test where EGL does not work."""
    if not works("egl"):
        pytest.skip("no EGL here (Debian: libegl1)")
