"""Images of simulations: one interface over OpenGL and the Warp ray caster.

Every renderer draws a batch of worlds and returns images in the convention of the public LIBERO clients and of
released checkpoints: LIBERO's raw image (OpenGL's row order, upside down) rotated by 180 degrees, which is the true
camera view mirrored left to right.

- "egl", "osmesa": MuJoCo's classic OpenGL renderer, set up as LIBERO's `OffScreenRenderEnv` sets it up and, with
  `texture_colorspace="auto"`, pixel-identical to that on the same machine. One context, worlds one after another. EGL
  draws on the GPU of the process's CUDA device, so that each rank of distributed training uses its own;
  `MUJOCO_EGL_DEVICE_ID` overrides that.
- "warp": needs nothing but pip, on a CPU or a CUDA device, all worlds at once; see `libero_gym.rendering.raycast`.

Textures have the colours of the public data sets by default, whatever the version of MuJoCo, see
`libero_gym.rendering.textures`.

A renderer works in the process that made it. In one that was forked from it, drawing raises an error; there, OpenGL and
CUDA cannot be used at all once the parent has.

Shape legend: N worlds, K cameras, H = W = `image_size` pixels.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ctypes.util
import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.fork import Owner, Uncopied
from libero_gym.rendering.cameras import Camera, CameraPlace, place_camera
from libero_gym.rendering.protocol import (
    Drawable,
    Images,
    Renderer,
    RendererKind,
    RendererUnavailableError,
    ViewKind,
    Views,
    check_renderer,
    check_view_kinds,
    only_images,
)
from libero_gym.rendering.ray_scene import MIN_ALPHA, VISIBLE_GROUPS
from libero_gym.rendering.textures import TextureColorspace, check_texture_colorspace, textures_in
from libero_gym.tasks.scenes import Scene

logger = logging.getLogger(__name__)

# Of the extension EGL_NV_device_cuda.
_EGL_CUDA_DEVICE_NV = 0x323A
# robosuite opens its contexts with this many geoms and this font scale.
_MAX_SCENE_GEOMS = 1000
# From this many worlds on, a CUDA device draws faster with Warp than with OpenGL, which takes 1.5 to 2 ms a view.
_BATCHED_FROM = 4

_REMEDIES = {
    "egl": "install the driver's EGL library (Debian: libegl1), or use renderer='warp'",
    "osmesa": "install OSMesa (Debian: libosmesa6), or use renderer='warp'",
    "warp": "install it with `pip install warp-lang`, or use renderer='egl' or 'osmesa'",
}


def make_renderer(
    kind: str | None = None,
    *,
    camera_names: Sequence[str | Camera],
    image_size: int,
    num_worlds: int = 1,
    antialiasing: bool = True,
    num_threads: int | None = None,
    texture_colorspace: TextureColorspace = "linear",
    view_kinds: Collection[ViewKind] = ("images",),
) -> Renderer:
    """Opens a renderer.

    Without `kind` the choice is: EGL if there is a GPU with EGL; else Warp; else OSMesa. Where many worlds are drawn
    at once and CUDA is there, Warp goes first: it draws them in parallel. The choice is logged once, at level INFO.

    Args:
        kind: "egl", "osmesa", "warp" or None.
        camera_names: Cameras of the scene, in the order of the images.
        image_size: Height and width of the images, pixels.
        num_worlds: How many worlds will usually be drawn at once.
        antialiasing: Whether Warp takes four samples of pixels at edges. OpenGL always does.
        num_threads: Threads of Warp on a CPU; None takes all cores that this process may use.
        texture_colorspace: "linear", colours as in the public data sets, or "auto", as the installed MuJoCo draws; see
            `libero_gym.rendering.textures`.
        view_kinds: What to draw, see `libero_gym.rendering.protocol.Views`; every renderer can draw all of it.

    Returns:
        The renderer.

    Raises:
        ValueError: An unknown kind, colour space or view, or a size or number that is not positive.
        RendererUnavailableError: The renderer cannot be used here; the message says what to install.
        RuntimeError: This process was forked from one that had opened a renderer on a GPU.
    """
    kind = check_renderer(kind)
    if image_size < 1:
        raise ValueError(f"image_size={image_size} is not a positive number of pixels")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads} must be at least 1, or None for all cores")
    check_texture_colorspace(texture_colorspace)
    chosen = kind or _choose(num_worlds)
    renderer: Renderer
    if chosen == "warp":
        try:
            from libero_gym.rendering.raycast import WarpRenderer  # imports Warp
        except ImportError as error:
            raise RendererUnavailableError(
                f"renderer 'warp' is not available ({error}): {_REMEDIES['warp']}"
            ) from error
        renderer = WarpRenderer(
            camera_names,
            image_size,
            antialiasing=antialiasing,
            num_threads=num_threads,
            texture_colorspace=texture_colorspace,
            view_kinds=view_kinds,
        )
    else:
        renderer = GlRenderer(
            chosen, camera_names, image_size, texture_colorspace=texture_colorspace, view_kinds=view_kinds
        )
    if kind is None:
        _log_choice(renderer.name)
    return renderer


_announced: set[str] = set()


def _log_choice(name: str) -> None:
    if name not in _announced:
        _announced.add(name)
        logger.info("renderer: %s (choose with renderer='egl', 'osmesa' or 'warp')", name)


def _choose(num_worlds: int) -> str:
    has_warp = importlib.util.find_spec("warp") is not None
    if has_warp and num_worlds >= _BATCHED_FROM and _has_nvidia():
        from libero_gym.rendering.raycast import default_device  # imports Warp

        if default_device() != "cpu":
            return "warp"
    if _has_gpu_with_egl():
        return "egl"
    if has_warp:
        return "warp"
    return "osmesa"


def _has_nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def _has_gpu_with_egl() -> bool:
    if os.environ.get("MUJOCO_GL", "egl").lower() != "egl" or ctypes.util.find_library("EGL") is None:
        return False
    if not _has_nvidia() and not any(Path("/dev/dri").glob("renderD*")):
        return False
    try:
        renderer = GlRenderer("egl", (), 64)
        description = renderer.describe_device()
    except RendererUnavailableError as error:
        logger.info("EGL is installed but does not work here: %s", error)
        return False
    renderer.close()
    return not any(name in description.lower() for name in ("llvmpipe", "softpipe", "swiftshader"))


def choose_egl_device(
    cuda_ordinals: Sequence[int | None], *, requested: str | None, cuda_device: int | None, local_rank: int
) -> int | None:
    """Chooses the EGL device that a process draws on.

    EGL and CUDA list the same GPUs in different orders, and `CUDA_VISIBLE_DEVICES` hides GPUs from CUDA alone.

    Args:
        cuda_ordinals: For each EGL device its CUDA device as this process counts them, None if it has none.
        requested: Value of `MUJOCO_EGL_DEVICE_ID`, if it is set; it decides.
        cuda_device: The process's current CUDA device, None if CUDA is not in use yet. Then the rank decides, as it
            does for the ray caster.
        local_rank: The process's rank on this machine.

    Returns:
        Index of the EGL device; None for the first that works, where no EGL device knows of CUDA.

    Raises:
        RendererUnavailableError: The device that was asked for is not there.
    """
    if requested is not None:
        if not requested.isdecimal() or int(requested) >= len(cuda_ordinals):
            raise RendererUnavailableError(
                f"MUJOCO_EGL_DEVICE_ID={requested!r} is not an EGL device of this machine "
                f"(valid: {list(range(len(cuda_ordinals)))})"
            )
        return int(requested)
    known = {ordinal: index for index, ordinal in enumerate(cuda_ordinals) if ordinal is not None}
    if not known:
        return None
    wanted = sorted(known)[local_rank % len(known)] if cuda_device is None else cuda_device
    if wanted not in known:
        raise RendererUnavailableError(
            f"no EGL device belongs to CUDA device {wanted} (EGL has those of CUDA devices {sorted(known)}): give the "
            "container the GPU's graphics capability, choose with MUJOCO_EGL_DEVICE_ID, or use renderer='warp'"
        )
    return known[wanted]


def _read_cuda_ordinals(egl: Any) -> list[int | None]:
    """Asks EGL (the module `mujoco.egl.egl_ext`) for the CUDA device of each of its devices."""
    address = egl.eglGetProcAddress("eglQueryDeviceAttribEXT")
    devices = egl.eglQueryDevicesEXT()
    if not address:
        return [None] * len(devices)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, egl.EGLDeviceEXT, ctypes.c_int, ctypes.POINTER(ctypes.c_ssize_t))(address)
    ordinals: list[int | None] = []
    for device in devices:
        value = ctypes.c_ssize_t(-1)
        is_known = bool(query(device, _EGL_CUDA_DEVICE_NV, ctypes.byref(value))) and value.value >= 0
        ordinals.append(int(value.value) if is_known else None)
    egl.eglGetError()  # devices without CUDA leave one behind, which the next call would be blamed for
    return ordinals


def _current_cuda_device() -> int | None:
    torch: Any = sys.modules.get("torch")  # not imported here: without it, no device has been chosen
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.current_device())


def _open_chosen_display(platform: Any) -> None:
    """Opens the process's one display, as `mujoco.egl` would, on the device of `choose_egl_device`.

    Left to `mujoco.egl` where the user or nobody has chosen. It is not told by `MUJOCO_EGL_DEVICE_ID`, since MuJoCo 3
    counts EGL devices by it and MuJoCo 4 those of CUDA.
    """
    egl = platform.EGL
    requested = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    index = choose_egl_device(
        _read_cuda_ordinals(egl),
        requested=requested,
        cuda_device=_current_cuda_device(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    if index is None or requested is not None:
        return
    device = egl.eglQueryDevicesEXT()[index]
    display = egl.eglGetPlatformDisplayEXT(egl.EGL_PLATFORM_DEVICE_EXT, device, None)
    egl.eglInitialize(display, None, None)  # raises if it fails, as PyOpenGL checks errors
    platform.EGL_DISPLAY = display
    atexit.register(egl.eglTerminate, display)


@functools.cache
def _load_triton_first() -> None:
    """Loads the library of Triton, if it is installed, before one of Mesa's.

    Both hold LLVM. PyOpenGL makes the symbols of Mesa's visible to all libraries loaded later, and Triton's, which
    PyTorch loads, would be bound to them and end the process without a word.
    """
    if "triton" in sys.modules:
        return
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        for library in Path(folder).glob("_C/libtriton*.so"):
            ctypes.CDLL(str(library))


# Renderers whose contexts are open. Left so, they are closed at exit, while the OpenGL library still works.
_open_renderers: weakref.WeakSet[GlRenderer] = weakref.WeakSet()
# Who opened OpenGL: its library has threads, and EGL's one display belongs to the process.
_opengl_owner: Owner | None = None


def _close_open_renderers() -> None:
    for renderer in list(_open_renderers):
        renderer.close()


def _close_at_exit(renderer: GlRenderer, platform: Any) -> None:
    """Has `renderer`, whose context was just created by `platform`, closed at exit if it is still open then.

    Exit handlers run last in, first out: this one comes before that which was registered with the process's first
    context, and which ends EGL.
    """
    global _opengl_owner
    if _opengl_owner is None:
        _opengl_owner = Owner("OpenGL")
        atexit.register(_close_open_renderers)
        os.register_at_fork(after_in_child=functools.partial(_abandon_opengl, platform))
    _open_renderers.add(renderer)


def _remember_current(kind: str, platform: Any) -> Callable[[], None]:
    """Returns what makes the OpenGL context current that is now, or none if none is."""
    if kind == "egl":
        egl = platform.EGL
        context, none = egl.eglGetCurrentContext(), egl.EGL_NO_SURFACE
        if context:
            surfaces = egl.eglGetCurrentSurface(egl.EGL_DRAW), egl.eglGetCurrentSurface(egl.EGL_READ)
            return functools.partial(egl.eglMakeCurrent, egl.eglGetCurrentDisplay(), *surfaces, context)

        def release() -> None:
            if platform.EGL_DISPLAY is not None:  # opened with the first context
                egl.eglMakeCurrent(platform.EGL_DISPLAY, none, none, egl.EGL_NO_CONTEXT)

        return release
    from OpenGL import GL, osmesa

    context = osmesa.OSMesaGetCurrentContext()
    if not context:
        return functools.partial(osmesa.OSMesaMakeCurrent, None, None, GL.GL_FLOAT, 0, 0)
    width, height, _, buffer = osmesa.OSMesaGetColorBuffer(context)
    kind_of_buffer = osmesa.OSMesaGetIntegerv(osmesa.OSMESA_TYPE)
    return functools.partial(osmesa.OSMesaMakeCurrent, context, buffer, kind_of_buffer, width, height)


def _abandon_opengl(platform: Any) -> None:
    """Keeps a forked child from freeing what its parent goes on using: that would wait for the parent's threads."""
    if hasattr(platform, "EGL"):
        atexit.unregister(platform.EGL.eglTerminate)
    for renderer in _open_renderers:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(renderer))


class GlRenderer(Uncopied):
    """MuJoCo's classic renderer in an off-screen context, as robosuite sets it up.

    The context is created by the first image. Create renderers after starting worker processes, and start those by
    spawning.
    """

    def __init__(
        self,
        kind: str,
        camera_names: Sequence[str | Camera],
        image_size: int,
        *,
        reflections: bool = True,
        texture_colorspace: TextureColorspace = "linear",
        view_kinds: Collection[ViewKind] = ("images",),
    ):
        """Loads the OpenGL bindings; see `make_renderer`.

        Args:
            kind: "egl" or "osmesa".
            camera_names: Cameras of the scene, in the order of the images.
            image_size: Height and width of the images, pixels.
            reflections: Whether reflective surfaces mirror, as LIBERO's do.
            texture_colorspace: See `libero_gym.rendering.textures`.
            view_kinds: What to draw, see `Views`.

        Raises:
            ValueError: An unknown colour space, or unknown views.
            RendererUnavailableError: There is no such OpenGL platform.
        """
        self._kind: Any = kind
        self._texture_colorspace: TextureColorspace = check_texture_colorspace(texture_colorspace)
        self._view_kinds = check_view_kinds(view_kinds)
        self._owner = Owner(f"the renderer {kind!r}")
        self._camera_names = tuple(camera_names)
        self._size = image_size
        self._reflections = reflections
        self._context: Any = None
        self._scenes: dict[str, _GlScene] = {}
        platform = os.environ.get("PYOPENGL_PLATFORM", kind)
        _load_triton_first()
        try:
            # Importing one of these fixes PyOpenGL's platform for the process.
            self._platform = importlib.import_module(f"mujoco.{kind}")
        except (ImportError, AttributeError, OSError) as error:
            if platform != kind:
                raise RendererUnavailableError(
                    f"renderer {kind!r} is not available: this process uses OpenGL by {platform!r} already (another "
                    f"renderer, robosuite, or the variable PYOPENGL_PLATFORM); use renderer={platform!r} or 'warp', or "
                    "a process of its own"
                ) from error
            raise RendererUnavailableError(
                f"renderer {kind!r} is not available ({error}): {_REMEDIES[kind]}"
            ) from error

    @property
    def name(self) -> RendererKind:
        """Kind of renderer."""
        return self._kind

    @property
    def uses_all_cores(self) -> bool:
        """Whether drawing occupies all cores; it takes one at most."""
        return False

    def describe_device(self) -> str:
        """The OpenGL implementation's name for what draws."""
        with self._current():
            from OpenGL import GL  # typed nowhere

            return GL.glGetString(GL.GL_RENDERER).decode()

    def render(self, simulations: Sequence[Drawable]) -> Images:
        """Draws the last observed state of each simulation; see `Renderer`.

        Raises:
            RendererUnavailableError: No context can be created.
            ValueError: A camera is not in the scene, or the renderer was not made for images.
            RuntimeError: This process was forked from the one that made the renderer, or that has used OpenGL.
        """
        return only_images(self.views(simulations))

    def views(self, simulations: Sequence[Drawable]) -> Views:
        """Draws all that the renderer was made for; see `Renderer`.

        Raises:
            RendererUnavailableError: No context can be created.
            ValueError: A camera is not in the scene.
            RuntimeError: This process was forked from the one that made the renderer, or that has used OpenGL.
        """
        shape = (len(simulations), len(self._camera_names), self._size, self._size)
        views = Views(
            images=np.empty((*shape, 3), np.uint8) if "images" in self._view_kinds else None,
            depth=np.empty((*shape, 1), np.float32) if "depth" in self._view_kinds else None,
            segmentation=np.empty((*shape, 1), np.int32) if "segmentation" in self._view_kinds else None,
        )
        with self._current():
            for index, simulation in enumerate(simulations):
                scene = simulation.scene
                if scene.key not in self._scenes:
                    self._scenes[scene.key] = _GlScene(
                        scene, self._camera_names, self._size, self._reflections, self._texture_colorspace
                    )
                out = Views(*(None if array is None else array[index] for array in views))
                self._scenes[scene.key].render(simulation, out)
        return views

    def close(self) -> None:
        """Releases the context, in the process that made it; a second call does nothing."""
        if not self._owner.is_this_process:
            return
        if self._context is not None:
            with self._current():
                for scene in self._scenes.values():
                    scene.close()
            self._context.free()
            self._context = None
        self._scenes.clear()
        _open_renderers.discard(self)

    @contextlib.contextmanager
    def _current(self) -> Generator[None]:
        """Has the context current, and afterwards the one that was.

        Whoever frees things of OpenGL without making its own context current, as robosuite does, would otherwise free
        what has the same numbers in ours, and our next pictures would be drawn without it.
        """
        self._owner.check()
        if _opengl_owner is not None:
            _opengl_owner.check()
        restore = _remember_current(self._kind, self._platform)
        try:
            self._make_current()
            yield
        finally:
            restore()

    def _make_current(self) -> None:
        self._owner.check()
        if self._context is None:
            if _opengl_owner is not None:
                _opengl_owner.check()
            is_first_on_egl = self._kind == "egl" and self._platform.EGL_DISPLAY is None
            try:
                if is_first_on_egl:
                    _open_chosen_display(self._platform)
                self._context = self._platform.GLContext(max(self._size, 640), max(self._size, 480))
            except RendererUnavailableError:
                raise
            except Exception as error:  # PyOpenGL raises its own, undocumented kinds
                raise RendererUnavailableError(
                    f"renderer {self._kind!r} cannot create a context ({error}): {_REMEDIES[self._kind]}"
                ) from error
            _close_at_exit(self, self._platform)
        self._context.make_current()


# Fixture poses are part of the model, and the model with visuals is shared by all renderers of a scene.
_render_model_lock = threading.Lock()


class _GlScene(Uncopied):
    """OpenGL resources of one scene."""

    def __init__(
        self,
        scene: Scene,
        camera_names: tuple[str | Camera, ...],
        size: int,
        reflections: bool,
        texture_colorspace: TextureColorspace,
    ):
        model = scene.render_model
        self._scene = scene
        self._model = model
        self._data = mujoco.MjData(model)
        self._places = [place_camera(model, camera) for camera in camera_names]
        # The scene's first camera is put where each of ours is, for as long as it draws.
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[list(VISIBLE_GROUPS)] = 1
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        with _render_model_lock:
            model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
            model.vis.global_.offheight = max(model.vis.global_.offheight, size)
            with textures_in(model, texture_colorspace):
                self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._drawing = mujoco.MjvScene(model, maxgeom=_MAX_SCENE_GEOMS)
        self._drawing.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = reflections

    def render(self, simulation: Drawable, out: Views) -> None:
        """Draws all cameras of one world into `out`, arrays [K, H, W, channels]."""
        state, model, data = simulation.render_state(), self._model, self._data
        fixtures = self._scene.fixture_body_ids
        perturbation = mujoco.MjvPerturb()
        with _render_model_lock:
            model.body_pos[fixtures] = state.fixture_poses[:, :3]
            model.body_quat[fixtures] = state.fixture_poses[:, 3:]
            model.site_rgba[self._scene.indicator_site_ids, 3] = state.indicator_alpha
            data.qpos[:] = state.qpos
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            for camera, place in enumerate(self._places):
                with _camera_at(model, place):
                    mujoco.mj_camlight(model, data)
                    mujoco.mjv_updateScene(
                        model,
                        data,
                        self._options,
                        perturbation,
                        self._camera,
                        mujoco.mjtCatBit.mjCAT_ALL.value,
                        self._drawing,
                    )
                if out.images is not None:
                    out.images[camera] = self._draw_pixels()
                if out.depth is not None or out.segmentation is not None:
                    self._measure(camera, out)

    def _draw_pixels(self) -> npt.NDArray[np.uint8]:
        """Draws the scene as it is set up and returns it, [H, W, 3], in the convention of images."""
        raw = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_render(self._viewport, self._drawing, self._context)
        mujoco.mjr_readPixels(raw, None, self._viewport, self._context)
        return raw[::-1, ::-1]

    def _measure(self, camera: int, out: Views) -> None:
        """Draws every geom in a colour of its own, without light, blending and multisampling, and reads both buffers.

        So does `mujoco.Renderer` for depth and for segmentation, but it shows sites of a negative alpha too, by which
        robosuite hides them. What the ray caster leaves out as not opaque is left out here.
        """
        flags = self._drawing.flags
        known = flags.copy()
        for geom in self._drawing.geoms[: self._drawing.ngeom]:
            if geom.rgba[3] < MIN_ALPHA:
                geom.segid = -1  # not shown
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = True
        colors = self._draw_pixels().astype(np.int32)
        flags[:] = known
        if out.segmentation is not None:
            numbers = colors[..., 0] + (colors[..., 1] << 8) + (colors[..., 2] << 16)  # 0: nothing
            out.segmentation[camera, ..., 0] = self._bodies_by_number()[numbers]
        if out.depth is not None:
            raw = np.empty((self._viewport.height, self._viewport.width), np.float32)
            mujoco.mjr_readPixels(None, raw, self._viewport, self._context)
            near, far = (
                float(distance * self._model.stat.extent)
                for distance in (self._model.vis.map.znear, self._model.vis.map.zfar)
            )
            # The buffer holds 1 at the near plane and 0 at the far one, linear in 1 / depth.
            depth = near * far / (near + raw.astype(np.float64) * (far - near))
            out.depth[camera, ..., 0] = depth[::-1, ::-1]

    def _bodies_by_number(self) -> npt.NDArray[np.int32]:
        """The body of what MuJoCo draws in the colour of each number; -1 for nothing, and for what belongs to none."""
        model, geoms = self._model, self._drawing.geoms[: self._drawing.ngeom]
        bodies = np.full(len(geoms) + 1, -1, np.int32)
        for geom in geoms:
            if geom.segid < 0:
                continue
            if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                bodies[geom.segid + 1] = model.geom_bodyid[geom.objid]
            elif geom.objtype == mujoco.mjtObj.mjOBJ_SITE:
                bodies[geom.segid + 1] = model.site_bodyid[geom.objid]
        return bodies

    def close(self) -> None:
        """Frees the context's resources."""
        self._context.free()


@contextlib.contextmanager
def _camera_at(model: mujoco.MjModel, place: CameraPlace) -> Generator[None]:
    """Has the model's first camera be at `place`; call this under the model's lock."""
    arrays = (model.cam_mode, model.cam_bodyid, model.cam_pos, model.cam_quat, model.cam_fovy)
    known = [array[0].copy() for array in arrays]
    values = (mujoco.mjtCamLight.mjCAMLIGHT_FIXED.value, *place)
    try:
        for array, value in zip(arrays, values, strict=True):
            array[0] = value
        yield
    finally:
        for array, value in zip(arrays, known, strict=True):
            array[0] = value
