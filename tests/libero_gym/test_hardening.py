"""Long runs, broken physics and killed processes: nothing grows, blocks or gets lost.

`LIBERO_GYM_SOAK=full` makes the test of long runs as long as it is meant to be: 1,000 resets and 100,000 steps, some
ten minutes on two cores. Without it, an eightieth of that runs.
"""

import copy
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from libero_gym.env import LiberoEnv
from libero_gym.physics.simulation import SETTLING_ACTION, PhysicsError, Simulation, load_dump
from libero_gym.tasks import scenes
from libero_gym.tasks.cache import file_lock
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv

NUM_RESETS, NUM_STEPS = (1000, 100_000) if os.environ.get("LIBERO_GYM_SOAK") == "full" else (24, 1200)


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def simulation():
    task = get_task("libero_goal", 2)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 5, np.random.RandomState(0))
    simulation.step([0.2, 0.1, -0.3, 0.0, 0.1, 0.0, 1.0])
    return simulation


def assert_dump_fails_again(error: PhysicsError, state: dict[str, np.ndarray], folder: Path) -> None:
    """Reload the dump of `error`: it is `state`, and its action fails there with the same reason."""
    assert error.dump is not None
    assert error.dump.parent == folder
    assert str(error.dump) in str(error)
    again, action = load_dump(error.dump)
    for name, value in again.get_state().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    with pytest.raises(PhysicsError) as repeated:
        again.step(action)
    assert str(repeated.value).split(" (state")[0] == str(error).split(" (state")[0]


def test_action_that_is_not_finite_leaves_a_dump(simulation, dumps_folder):
    before = simulation.get_state()
    with pytest.raises(PhysicsError, match="is not finite") as error:
        simulation.step([0, 0, 0, np.inf, 0, 0, 0])
    assert_dump_fails_again(error.value, before, dumps_folder)


def test_diverged_physics_leaves_a_dump_and_the_world_as_it_was(simulation, dumps_folder):
    simulation.data.qvel[:] = 1e12
    before = simulation.get_state()
    with pytest.raises(PhysicsError, match=r"MuJoCo reports \['mjWARN_BAD.*in the step from t=0\.\d+ s") as error:
        simulation.step(SETTLING_ACTION)
    for name, value in simulation.get_state().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert_dump_fails_again(error.value, before, dumps_folder)
    simulation.data.qvel[:] = 0.0
    simulation.step(SETTLING_ACTION)  # what was wrong is gone, and so is the warning


def test_dump_restores_in_another_simulation_and_needs_no_pickle(simulation, dumps_folder):
    with pytest.raises(PhysicsError):
        simulation.step(np.full(7, np.nan))
    (path,) = dumps_folder.iterdir()
    other = Simulation(simulation.scene, stepping="numpy")
    with np.load(path, allow_pickle=False) as dump:
        other.set_state(dump)
        assert np.isnan(dump["action"]).all()
        assert "is not finite" in str(dump["error"])
    np.testing.assert_array_equal(other.data.qpos, simulation.data.qpos)


def test_full_disk_does_not_hide_the_error(simulation, dumps_folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    message = r"is not finite.*\(the state could not be dumped: .*No space left"
    with pytest.raises(PhysicsError, match=message) as error:
        simulation.step(np.full(7, np.nan))
    assert error.value.dump is None


def test_environments_leave_dumps(monkeypatch, tmp_path, dumps_folder):
    monkeypatch.chdir(tmp_path)
    single = LiberoEnv("libero_goal", observe_images=False)
    single.reset(seed=0)
    with pytest.raises(PhysicsError) as error:
        single.step(np.full(7, np.nan, np.float32))
    assert_dump_fails_again(error.value, single.simulation.get_state(), dumps_folder)
    vector = LiberoVectorEnv("libero_goal", 3, observe_images=False, num_threads=2, num_action_chunks=2)
    vector.reset(seed=0)
    actions = np.zeros((3, 2, 7), np.float32)
    actions[1, 1, 4] = np.nan
    actions[2] = np.nan
    with pytest.raises(PhysicsError, match=r"environments \[1, 2\] are not finite") as error:
        vector.step(actions)
    assert error.value.dump is not None
    state, action = load_dump(error.value.dump)
    np.testing.assert_array_equal(state.data.qpos, vector.simulations[1].data.qpos)
    np.testing.assert_array_equal(action, actions[1, 1])
    vector.simulations[2].data.qvel[:] = 1e12
    before = vector.simulations[2].get_state()
    with pytest.raises(PhysicsError, match="MuJoCo reports") as error:
        vector.step(np.zeros((3, 2, 7), np.float32))
    assert error.value.__notes__ == ["raised by environment 2 of 3"]
    assert_dump_fails_again(error.value, before, dumps_folder)
    assert not list(tmp_path.iterdir())  # MuJoCo's own MUJOCO_LOG.TXT, of warnings in any thread


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_resets_and_steps_do_not_make_memory_grow():
    # Ten scenes, so that environments also change scenes; every scene is loaded before counting starts.
    env = LiberoVectorEnv("libero_object", 10, observe_images=False, horizon=10**9, num_threads=2)
    rng = np.random.default_rng(0)

    def run(num_resets: int, num_steps: int) -> None:
        for _ in range(num_resets):
            env.reset(options={"task_id": rng.integers(10, size=10)})
            for _ in range(num_steps // num_resets // 10):
                env.step(rng.uniform(-1, 1, (10, 7)).astype(np.float32))

    run(20, 400)
    before = resident_mb()
    run(NUM_RESETS, NUM_STEPS)
    after = resident_mb()
    print(f"{NUM_RESETS} resets of 10 environments, {NUM_STEPS} steps: {before:.1f} MB before, {after:.1f} MB after")
    # One environment's data is 5 MB: losing one at every tenth reset would be 20 MB in the short run.
    assert after - before < 15
    env.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_states_errors_copies_and_environments_do_not_make_memory_grow():
    env = LiberoEnv("libero_goal", task_id=3, image_size=16, renderer="warp")
    env.reset(seed=0)
    states, action = [env.get_state()], np.zeros(7, np.float32)

    def run(num_rounds: int) -> None:
        for _ in range(num_rounds):
            env.reset()
            for _ in range(5):
                env.step(env.action_space.sample())
            states[:] = [env.get_state()]
            env.set_state(states[0])
            env.observe()
            with pytest.raises(ValueError, match="lacks"):
                env.set_state({})
            with pytest.raises(TypeError, match="native memory"):
                copy.deepcopy(env)

    def make(num_environments: int) -> None:
        for _ in range(num_environments):
            other = LiberoVectorEnv("libero_goal", 2, image_size=16, renderer="warp", num_threads=2)
            other.reset(seed=0)
            other.step(other.action_space.sample())
            other.close()
            single = LiberoEnv("libero_goal", task_id=3, image_size=16, renderer="warp")
            single.reset(seed=0)
            single.step(action)
            single.close()

    for work, count in ((run, NUM_STEPS // 20), (make, NUM_RESETS)):
        work(max(count // 5, 10))
        before, threads = resident_mb(), threading.active_count()
        work(count)
        after = resident_mb()
        print(f"{work.__name__} {count}: {before:.1f} MB before, {after:.1f} MB after")
        # A simulation is 5 MB: losing one at every tenth reset would be 30 MB, at every tenth environment 36.
        assert after - before < 15
        assert threading.active_count() <= threads
    env.close()


def test_a_further_environment_takes_little_memory():
    first = LiberoVectorEnv("libero_spatial", 1, observe_images=False)
    first.reset(seed=0)
    first.step(np.zeros((1, 7), np.float32))
    before = resident_mb()
    env = LiberoVectorEnv("libero_spatial", 64, observe_images=False)
    env.reset(seed=0)
    for _ in range(3):
        env.step(env.action_space.sample())
    assert (resident_mb() - before) / 64 < 20  # it is 4 to 6
    env.close()


def test_environments_that_change_scenes_keep_at_most_one_spare_simulation_each():
    env = LiberoVectorEnv("libero_object", 3, observe_images=False)
    for task_id in (*range(10), 9, 8):
        env.reset(seed=0, options={"task_id": task_id})
        simulations = {*env.simulations, *env.worlds._spare}
        assert len(simulations) <= 6
    np.testing.assert_array_equal([s.task.task_id for s in env.simulations], [8, 8, 8])
    env.close()


BUILD = """
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
print(load_scene(get_task("libero_90", 86)).physics_model.nq)
"""


@pytest.mark.slow
def test_process_killed_while_building_a_scene_leaves_a_usable_cache(tmp_path):
    environment = {**os.environ, "LIBERO_GYM_CACHE": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".build-*/request.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("scenes/*/manifest.json"))
    again = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert again.stdout.split() == [str(load_scene(get_task("libero_90", 86)).physics_model.nq)]
    assert not list(tmp_path.glob("numba_robosuite/**/*.nbc"))  # nothing is compiled for it


KILLED_IN_PUBLISHING = """
import os, shutil, signal
from libero_gym.tasks import scenes
from libero_gym.tasks.suites import get_task

def copy(requests, _):
    for request in requests:
        for name in ("scene.xml", "scene.json"):
            shutil.copy(os.path.join({source!r}, name), request["folder"])

scenes._run_builder = copy
scenes._compile_physics = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
scenes.load_scene(get_task("libero_goal", 0))
"""


def test_process_killed_while_publishing_a_scene_blocks_nobody(tmp_path, monkeypatch):
    built = load_scene(get_task("libero_goal", 0))
    code = KILLED_IN_PUBLISHING.format(source=str(built.folder))
    environment = {**os.environ, "LIBERO_GYM_CACHE": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("scenes/.*/scene.xml"))  # it died with half a scene written and the lock held
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "_loaded", {})
    monkeypatch.setattr(
        scenes,
        "_run_builder",
        lambda requests, _: [
            shutil.copy(built.folder / name, request["folder"])
            for request in requests
            for name in ("scene.xml", "scene.json")
        ],
    )
    again = load_scene(get_task("libero_goal", 0))
    assert again.folder.parent == tmp_path / "scenes"
    np.testing.assert_array_equal(again.physics_model.body_mass, built.physics_model.body_mass)


STEP = """
import numpy as np
from libero_gym.vector import LiberoVectorEnv
env = LiberoVectorEnv("libero_goal", 4, observe_images=False, num_threads=2)
env.reset(seed=0)
actions = np.random.default_rng(0).uniform(-1, 1, (10**6, 4, 7))
for step, action in enumerate(actions):
    observation, *_ = env.step(action)
    print(step, *observation["states"][:, 0], flush=True)
"""


def test_process_killed_while_stepping_disturbs_nobody():
    folder = load_scene(get_task("libero_goal", 0)).folder
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines: list[str] = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", STEP], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("3 "):
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    assert lines[:4] == lines[4:8]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    started = time.monotonic()
    with file_lock("scenes"):
        assert time.monotonic() - started < 60  # others may be building
