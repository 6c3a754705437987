"""Renderers at the end of a process, and in one that was forked."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from libero_gym.rendering import raycast
from libero_gym.rendering.raycast import WarpRenderer

LEFT_OPEN = """
from libero_gym.rendering.renderers import GlRenderer
renderers = [GlRenderer({kind!r}, (), 8) for _ in range(2)]
for renderer in renderers:
    renderer.describe_device()
"""


def test_opengl_that_is_left_open_ends_silently(gl_kinds):
    for kind in gl_kinds:
        process = subprocess.run(
            [sys.executable, "-c", LEFT_OPEN.format(kind=kind)], capture_output=True, text=True, check=False
        )
        assert (process.returncode, process.stderr) == (0, "")


# Each line is one that the child could wait for ever in. Here as below, the scene is one of few and small textures.
FORKED = """
import multiprocessing
import os
import sys
sys.path.insert(0, {folder!r})
from conftest import read_recorded
from libero_gym.rendering.renderers import make_renderer

def make():
    return make_renderer({kind!r}, camera_names=("agentview",), image_size=16, num_threads=2)

world, _ = read_recorded("libero_10/2", "3.3.2")
renderer = make()
images = renderer.render([world])

def use():
    try:
        renderer.render([world])
    except RuntimeError as error:
        print(error, flush=True)
    try:
        print("a new one draws alike:", (make().render([world]) == images).all(), flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    renderer.close()

child = multiprocessing.get_context("fork").Process(target=use)
child.start()
child.join()
print("exit code", child.exitcode, flush=True)
if {kind!r} != "osmesa":  # whose library itself crashes at such an exit
    if os.fork() == 0:
        sys.exit(5)  # the interpreter's own way out, with exit handlers
    print("exit code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
print("the parent draws on:", (renderer.render([world]) == images).all())
"""


def run_forked(kind):
    code = FORKED.format(folder=str(Path(__file__).parent), kind=kind)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert process.returncode == 0, process.stderr[-2000:]
    exits = ["exit code 0"] if kind == "osmesa" else ["exit code 0", "exit code 5"]
    refused, new, *rest = process.stdout.splitlines()
    assert rest == [*exits, "the parent draws on: True"]
    return refused, new


@pytest.mark.slow
def test_a_forked_ray_caster_is_refused_and_a_new_one_works():
    refused, drawn = run_forked("warp")
    assert refused.startswith("the renderer 'warp' was opened by process ")
    assert "which was forked from it: start processes with multiprocessing.get_context('spawn')" in refused
    assert drawn == "a new one draws alike: True"


@pytest.mark.slow
def test_opengl_is_refused_in_a_forked_process(gl_kinds):
    for kind in gl_kinds:
        refused, new = run_forked(kind)
        assert refused.startswith(f"the renderer {kind!r} was opened by process ")
        assert new.startswith("OpenGL was opened by process ")


ENVIRONMENT = """
import os, sys
import numpy as np
from libero_gym.env import LiberoEnv
env = LiberoEnv("libero_90", task_id=86, image_size=16, renderer={kind!r}, render_mode="rgb_array")
env.reset(seed=0)
if os.fork() == 0:
    for call in (env.reset, lambda: env.step(np.zeros(7)), env.observe, env.render):
        try:
            call()
        except RuntimeError as error:
            print("AsyncVectorEnv" in str(error), flush=True)
    env.close()
    os._exit(0)
print("exit code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
env.step(np.zeros(7))
env.close()
"""


@pytest.mark.slow
def test_a_forked_environment_with_opengl_is_refused(gl_kinds):
    for kind in gl_kinds:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", ENVIRONMENT.format(kind=kind)]
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert process.returncode == 0, process.stderr[-2000:]
        assert process.stdout.split("\n") == [*["True"] * 4, "exit code 0", ""]


# Stands in for EGL: a context that is used after its display was closed raises an error that cannot be printed.
FAKE = """
import atexit, sys, types
import mujoco

class EGLError(Exception):
    def __str__(self):
        raise RuntimeError

is_open = False

def open_display():
    global is_open
    if not is_open:
        is_open = True
        atexit.register(terminate)

def terminate():
    global is_open
    is_open = False
    print("terminated")

class GLContext:
    def __init__(self, width, height):
        open_display()

    def make_current(self):
        if not is_open:
            raise EGLError

    def free(self):
        self.make_current()
        print("freed")

egl = types.SimpleNamespace(
    eglTerminate=terminate, eglGetCurrentContext=lambda: None, eglMakeCurrent=lambda *context: None,
    EGL_NO_SURFACE=None, EGL_NO_CONTEXT=None,
)
sys.modules["mujoco.egl"] = types.SimpleNamespace(GLContext=GLContext, EGL=egl, EGL_DISPLAY="open")
from libero_gym.rendering.renderers import GlRenderer
renderers = [GlRenderer("egl", (), 8) for _ in range(3)]
for renderer in renderers:
    renderer._make_current()
renderers[0].close()
"""


def test_contexts_that_are_left_open_are_freed_before_their_display_is_closed():
    process = subprocess.run([sys.executable, "-c", FAKE], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split() == ["freed", "freed", "freed", "terminated"]


def test_a_gpu_is_refused_in_a_forked_process(monkeypatch):
    WarpRenderer(("agentview",), 8).close()  # starts Warp in this process
    monkeypatch.setattr(raycast, "list_devices", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr("libero_gym.fork.os.getpid", lambda: 1)
    with pytest.raises(RuntimeError, match=r"CUDA was opened by process \d+ and does not work in process 1"):
        WarpRenderer(("agentview",), 8, device="cuda:0")
    WarpRenderer(("agentview",), 8, device="cpu").close()


# Triton holds a copy of LLVM, as Mesa does; any library can stand in for it where only the order matters.
WITH_TRITON = """
import sys
sys.path.insert(0, {folder!r})
def is_loaded(name):
    return name in open("/proc/self/maps").read()
from libero_gym.rendering.renderers import GlRenderer
import mujoco
print(is_loaded("libtriton"))
GlRenderer({kind!r}, (), 8)
print(is_loaded("libtriton"))
"""


def test_triton_is_loaded_before_opengl(gl_kinds, tmp_path: Path):
    library = tmp_path / "triton" / "_C" / "libtriton.so"
    library.parent.mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('this imports much')")
    library.write_bytes(Path(importlib.util.find_spec("_ctypes").origin).read_bytes())
    for kind in gl_kinds:
        code = WITH_TRITON.format(folder=str(tmp_path), kind=kind)
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert process.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(("first", "second"), [("egl", "osmesa"), ("osmesa", "egl")])
def test_two_kinds_of_opengl_in_one_process_are_refused_by_name(gl_kinds, first: str, second: str):
    if not {first, second} <= set(gl_kinds):
        pytest.skip("EGL and OSMesa are not both here")
    code = (
        f"from libero_gym.rendering.renderers import GlRenderer\nfor kind in {(first, second)}: GlRenderer(kind, (), 8)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = f"renderer '{second}' is not available: this process uses OpenGL by '{first}' already"
    assert message in process.stderr.splitlines()[-1]


# LIBERO's own environment and ours in one process, in both orders and taking turns.
BESIDE_LIBERO = """
import hashlib, os, sys
import numpy as np
from libero_gym import get_task
from libero_gym.env import LiberoEnv
order, kind = sys.argv[1:]
os.environ["MUJOCO_GL"] = kind

def libero():
    from libero.libero.envs import OffScreenRenderEnv
    bddl_file = str(get_task("libero_90", 86).bddl_file)
    env = OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=64, camera_widths=64)
    env.reset()
    return env

def draw(env):
    env.reset(seed=0, options={"init_state_id": 3})
    print(*(hashlib.sha256(env.observe()[key].tobytes()).hexdigest() for key in ("images", "wrist_images")), flush=True)

theirs = libero() if order == "theirs first" else None
ours = LiberoEnv("libero_90", task_id=86, image_size=64, renderer=kind)
draw(ours)
if order == "ours first":
    theirs = libero()
    theirs.step(np.zeros(7))
    draw(ours)
    theirs.close()
    draw(ours)
os._exit(0)
"""


@pytest.mark.slow
def test_libero_beside_us_changes_no_picture(gl_kinds):
    # The first picture of "ours first" is drawn before LIBERO's environment is made.
    orders = {kind: ["ours first"] for kind in gl_kinds}
    orders[gl_kinds[0]].append("theirs first")
    for kind in gl_kinds:
        pictures = []
        for order in orders[kind]:
            command = [sys.executable, "-W", "ignore", "-c", BESIDE_LIBERO, order, kind]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stderr[-2000:]
            pictures += [line for line in process.stdout.splitlines() if len(line) == 129]
        assert len(pictures) == 3 + len(orders[kind]) - 1
        assert len(set(pictures)) == 1
