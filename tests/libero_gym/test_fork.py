"""Environments in forked processes, and copies of them: refused at once, and what the errors advise works."""

import copy
import pickle

import gymnasium
import numpy as np
import pytest

from libero_gym.env import LiberoEnv
from libero_gym.physics.cpu_worlds import CpuWorlds
from libero_gym.physics.simulation import Simulation
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.rendering.renderers import GlRenderer
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv
from tests.preloaded import run_environments

SPATIAL = "libero_gym/libero_spatial-v0"

# What a child inherits is refused without waiting for anything; what it makes itself works.
FORKED = """
import os, sys
import numpy as np
from libero_gym.env import LiberoEnv
from libero_gym.vector import LiberoVectorEnv

def single():
    return LiberoEnv("libero_spatial", task_id=0, image_size=16, {options})

def vector():
    return LiberoVectorEnv("libero_spatial", 2, image_size=16, num_threads=2, {options})

for make, shape, which in ((single, (7,), ()), (vector, (2, 7), (0,))):
    env = make()
    env.reset(seed=0)
    state = env.get_state(*which)
    actions = np.full((2, *shape), 0.5, np.float32)
    env.step(actions[0])
    if os.fork() == 0:
        calls = [env.reset, lambda: env.step(actions[1]), env.observe, lambda: env.get_state(*which)]
        calls += [lambda: env.set_state(*which, state), *([env.render] if env.render_mode else [])]
        if make is single:
            calls += [lambda: env.simulation, lambda: env.model]
        else:
            worlds = vars(env)["_worlds"]
            calls += [lambda: env.worlds, lambda: env.simulations, env.get_states]
            calls += [lambda: worlds.states(), lambda: worlds.get_state(0), lambda: worlds.set_state(0, {{}})]
            calls += [lambda: worlds.step(actions[:, None], np.ones(2, bool), np.ones(2, int))]
        for number, call in enumerate(calls):
            try:
                call()
                print("call", number, "was answered", flush=True)
            except RuntimeError as error:
                if "AsyncVectorEnv" not in str(error):
                    print("call", number, error, flush=True)
        env.close()
        env.close()
        own = make()
        own.reset(seed=0)
        own.step(actions[0])
        print(make.__name__, own.step(actions[1])[0]["states"].tobytes().hex(), flush=True)
        own.close()
        sys.exit(5)  # the interpreter's own way out
    print("exit code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    print(make.__name__, env.step(actions[1])[0]["states"].tobytes().hex(), flush=True)
    env.close()
"""


def assert_refused_in_a_child(options: str) -> None:
    lines = run_environments(FORKED.format(options=options)).splitlines()
    assert [line.split()[0] for line in lines] == ["single", "exit", "single", "vector", "exit", "vector"], lines
    assert lines[0] == lines[2]
    assert lines[3] == lines[5]
    assert lines[1] == lines[4] == "exit code 5"


def test_a_forked_environment_is_refused_and_a_new_one_works():
    assert_refused_in_a_child("observe_images=False")


@pytest.mark.slow
def test_a_forked_environment_with_images_is_refused_and_a_new_one_works():
    assert_refused_in_a_child('renderer="warp", render_mode="rgb_array"')


ASYNC = """
import gymnasium, libero_gym
env = gymnasium.make_vec(
    "libero_gym/libero_spatial-v0", 2, "async", dict(context="fork", shared_memory=False),
    image_size=16, renderer="warp", task_id=0,
)
print(env.reset(seed=0)[0]["images"].tobytes().hex())
env.close()
"""


@pytest.mark.slow
def test_processes_forked_while_kernels_compile_do_not_wait_for_ever():
    (images,) = run_environments(ASYNC).splitlines()
    own = LiberoVectorEnv("libero_spatial", 2, task_ids=[0], image_size=16, renderer="warp")
    assert own.reset(seed=0)[0]["images"].tobytes().hex() == images
    own.close()


@pytest.fixture(scope="module")
def uncopied():
    scene = load_scene(get_task("libero_spatial", 0))
    simulation = Simulation(scene)
    single = LiberoEnv("libero_spatial", image_size=8, renderer="warp")
    vector = LiberoVectorEnv("libero_spatial", 2, image_size=8, renderer="warp")
    single.reset(seed=0)
    vector.reset(seed=0)
    objects = {
        "LiberoEnv": single,
        "a wrapped LiberoEnv": gymnasium.make(SPATIAL, observe_images=False),
        "LiberoVectorEnv": vector,
        "Simulation": simulation,
        "NativeStepper": vars(simulation)["_advance"],
        "CpuWorlds": CpuWorlds(2),
        "WarpRenderer": WarpRenderer(("agentview",), 8),
        "SceneCaster": next(iter(vars(vars(single)["_renderer"])["_casters"].values())),
        "GlRenderer": GlRenderer.__new__(GlRenderer),
    }
    yield objects
    single.close()
    vector.close()
    objects["WarpRenderer"].close()


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(uncopied, make_copy):
    for name, value in uncopied.items():
        if name.startswith("a wrapped") and make_copy is copy.copy:
            continue  # another wrapper of the same environment
        with pytest.raises(TypeError, match=rf"^{name.split()[-1]} holds native memory.*: make (an)?other "):
            make_copy(value)


@pytest.mark.slow
def test_copies_of_gpu_worlds_are_refused():
    from libero_gym.physics.warp_groups import make_warp_worlds

    spatial, goal = get_task("libero_spatial", 0), get_task("libero_goal", 0)
    for tasks, name in (([spatial], "WarpWorlds"), ([spatial, goal], "GroupedWarpWorlds")):
        worlds = make_warp_worlds(tasks, 1, device="cpu")
        with pytest.raises(TypeError, match=rf"^{name} holds native memory.* set_state"):
            copy.deepcopy(worlds)


def test_what_the_error_advises_makes_an_independent_environment():
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7)).astype(np.float32)
    env = gymnasium.make(SPATIAL, image_size=16, renderer="warp", render_mode="rgb_array", horizon=50)
    env.reset(seed=3)
    for action in actions[:3]:
        env.step(action)
    assert env.spec is not None
    other = gymnasium.make(env.spec)
    other.reset(seed=8)
    base, twin = env.unwrapped, other.unwrapped
    assert isinstance(base, LiberoEnv)
    assert isinstance(twin, LiberoEnv)
    state = base.get_state()
    twin.set_state(state)
    for name, value in twin.get_state().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    np.testing.assert_array_equal(other.render(), env.render())
    for action in actions[3:]:
        moved, *rest = other.step(action)
    for name, value in base.get_state().items():  # it has not moved
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    for action in actions[3:]:
        observation, *expected = env.step(action)
    assert rest == expected
    for results in ((moved, observation), (other.reset()[0], env.reset()[0])):
        for key, value in results[0].items():
            np.testing.assert_array_equal(value, results[1][key], err_msg=key)
    assert other.reset()[1] == env.reset()[1]
    env.close()
    other.close()
