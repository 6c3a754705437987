"""Tiles: images whose rays meet only the parts listed for their tile equal those whose rays meet all that move."""

import copy
import types

import mujoco
import numpy as np
import pytest
import warp as wp

from libero_gym.physics.simulation import RenderState
from libero_gym.rendering import ray_kernels
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.tasks.initial_states import load_recorded_states
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task

CAMERAS = ("agentview", "robot0_eye_in_hand")


@wp.kernel(module="unique", enable_backward=False)
def list_all(
    scene: ray_kernels.Scene,
    worlds: ray_kernels.Worlds,
    resting: ray_kernels.Resting,
    width: int,
    height: int,
    tiles: ray_kernels.Tiles,
):
    """Stands in for `ray_kernels.cull`: every tile lists every part that does not rest."""
    tile = wp.tid()
    camera = tile / (tiles.num_columns * tiles.num_rows) % scene.num_cameras
    count = int(0)  # noqa: UP018, RUF046 - as in ray_kernels
    for part in range(scene.num_parts):
        if scene.part_rests[camera, part] == wp.uint8(0):
            tiles.parts[tile, count] = wp.int16(part)
            count += 1
    tiles.num_parts[tile] = count


def drawables(suite, task_id):
    """Two worlds as they start, and two in which objects are close to the camera in the hand, or all around it."""
    task = get_task(suite, task_id)
    scene = load_scene(task)
    recorded = load_recorded_states(task, "settled")
    model = copy.copy(scene.physics_model)
    model.body_pos[scene.fixture_body_ids] = recorded.fixture_poses[0][:, :3]
    model.body_quat[scene.fixture_body_ids] = recorded.fixture_poses[0][:, 3:]
    data = mujoco.MjData(model)
    free = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)
    result = []
    for index, distance in ((0, None), (1, None), (2, 0.1), (3, 0.01)):
        qpos = recorded.physics[index, : model.nq].copy()
        if distance is not None:
            data.qpos[:] = qpos
            mujoco.mj_forward(model, data)
            camera = model.camera(CAMERAS[1]).id
            position, axes = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3)
            for number, joint in enumerate(free):
                address = model.jnt_qposadr[joint]
                side = 0.5 * distance * np.array([np.cos(number), np.sin(number)])
                qpos[address : address + 3] = position + axes @ [*side, -distance * (1 + number)]
        state = RenderState(
            qpos=qpos, fixture_poses=recorded.fixture_poses[0], indicator_alpha=np.zeros(len(scene.indicator_site_ids))
        )
        result.append(types.SimpleNamespace(scene=scene, model=model, render_state=lambda state=state: state))
    return result


def num_listed(renderer):
    """Parts that tiles list, of how many."""
    (caster,) = renderer._casters.values()
    return caster._tiles.num_parts.numpy(), caster._num_parts


@pytest.mark.parametrize("antialiasing", [True, False])
@pytest.mark.parametrize("size", [118, 64, 21])
def test_parts_outside_of_tiles_are_not_seen_in_them(monkeypatch, size, antialiasing):
    simulations = drawables("libero_spatial", 0)
    renderer = WarpRenderer(CAMERAS, size, device="cpu", antialiasing=antialiasing)
    images = renderer.render(simulations)
    counts, num_parts = num_listed(renderer)
    assert counts.max() <= num_parts
    assert counts.mean() < 0.5 * num_parts
    with monkeypatch.context() as patch:
        patch.setattr(ray_kernels, "cull", list_all)
        expected = renderer.render(simulations)
        assert (num_listed(renderer)[0] == num_parts - 1).all()  # the room, or the gripper's base
    np.testing.assert_array_equal(images, expected)
    # The objects before the camera in the hand fill its image.
    assert np.mean(images[2:, 1] != images[:2, 1]) > 0.5
    renderer.close()


def test_lit_parts_are_listed_and_dark_ones_not(monkeypatch):
    """A stove's glow is a part that is there only at times."""
    simulations = drawables("libero_goal", 0)[:1]
    state = simulations[0].render_state()
    lit = types.SimpleNamespace(**vars(simulations[0]))
    lit.render_state = lambda: state._replace(indicator_alpha=np.ones_like(state.indicator_alpha))
    renderer = WarpRenderer(CAMERAS[:1], 64, device="cpu")
    counts, images = [], []
    for simulation in (simulations[0], lit):
        images.append(renderer.render([simulation]))
        counts.append(num_listed(renderer)[0].sum())
    assert counts[1] > counts[0]
    monkeypatch.setattr(ray_kernels, "cull", list_all)
    for simulation, image in zip((simulations[0], lit), images, strict=True):
        np.testing.assert_array_equal(renderer.render([simulation]), image)
    assert (images[0] != images[1]).any()
    renderer.close()
