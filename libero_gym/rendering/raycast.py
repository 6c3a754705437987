"""A ray caster on Warp that draws many worlds of one scene at once, on a CPU or a CUDA device.

It reproduces MuJoCo's classic OpenGL renderer rather than improving on it, since that is what LIBERO's data and
policies saw: fixed-function lighting at triangle corners, clamped before the texture is applied; a specular term
of exponent 0 that is constant; mipmaps; one mirror. Rays start at the near clipping plane and pass the backs of
triangles. Pixels whose neighbourhood shows an edge get four more samples in the usual multisampling pattern, of which
those on the surface at the pixel's centre have the colour there. Depth and segmentation are those of the ray through
the centre, as OpenGL's are without multisampling.

What rests as a camera sees it is looked for once: the room, the table and the robot's mount for a camera that rests
itself, the gripper's base for the one on the hand. A ray then asks only what moves, and nearer.

Not drawn: shadows (no LIBERO light casts any), haze, transparency.

Shape legend: N worlds, K cameras, H x W pixels, B bodies, P parts, L lights, F triangles.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
import warp as wp

from libero_gym.fork import Owner, Uncopied
from libero_gym.rendering import ray_kernels
from libero_gym.rendering.cameras import Camera
from libero_gym.rendering.protocol import (
    Drawable,
    Images,
    RendererKind,
    RendererUnavailableError,
    ViewKind,
    Views,
    check_view_kinds,
    only_images,
)
from libero_gym.rendering.ray_scene import RayScene, build_ray_scene
from libero_gym.rendering.small_textures import load_small_model
from libero_gym.rendering.textures import TextureColorspace, check_texture_colorspace
from libero_gym.tasks.cache import cache_dir, drop_damaged, file_lock, note_files
from libero_gym.tasks.scenes import Scene

# Worlds drawn by one kernel launch; bounds the memory for intermediate results (9 MB a world of 256 pixels).
_MAX_LAUNCH_WORLDS = 256
_DTYPES: dict[ViewKind, Any] = {"images": np.uint8, "depth": np.float32, "segmentation": np.int32}


def default_device() -> str:
    """The device that images are drawn on unless one is named: "cpu" without CUDA.

    Of several CUDA devices it is the one of this process's `LOCAL_RANK`, as launchers of distributed training set it.
    """
    _start_warp()
    if not wp.is_cuda_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{rank % wp.get_cuda_device_count()}"


def list_devices() -> list[str]:
    """Names of the devices that Warp can use."""
    _start_warp()
    return [str(device.alias) for device in wp.get_devices()]


def _start_warp() -> None:
    """Points Warp's compiled kernels at the package's cache folder and keeps it from printing."""
    with _start_lock:
        if not wp.config.kernel_cache_dir:
            wp.config.kernel_cache_dir = str(cache_dir() / "warp")
        if wp.config.log_level == wp.LOG_INFO:  # not if the user has asked for another one
            wp.config.log_level = wp.LOG_WARNING
        wp.init()
        global _warp_owner
        if _warp_owner is None:
            _warp_owner = Owner("CUDA")
            if (folder := _kernel_folder()) is not None:
                with file_lock("warp"):
                    drop_damaged(folder, keeps_unknown=True)
                atexit.register(note_kernels)


_start_lock = threading.Lock()
_warp_owner: Owner | None = None


def _kernel_folder() -> Path | None:
    """Where Warp keeps compiled kernels; None if the user has given it another folder than this package's."""
    folder = Path(str(wp.config.kernel_cache_dir))
    return folder if folder.is_relative_to(cache_dir()) and folder.is_dir() else None


def note_kernels() -> None:
    """Notes the kernels that Warp has compiled, for the next process to check before it loads them.

    Warp itself loads what is damaged, or fails at it at every start.
    """
    if (folder := _kernel_folder()) is not None:
        with file_lock("warp"):
            note_files(folder)


@functools.lru_cache(maxsize=16)
def _load_kernels(device: str) -> Future[None]:
    """Begins to compile the ray caster's kernels side by side, once for each device; wait for it before launching."""
    kernels: Any = ray_kernels.KERNELS
    modules = [kernel.module for kernel in kernels]

    def load() -> None:
        wp.force_load(device=device, modules=modules, max_workers=len(modules))
        note_kernels()

    pool = ThreadPoolExecutor(1, "warp-compile")
    loading = pool.submit(load)
    _loadings.append(loading)
    pool.shutdown(wait=False)
    return loading


# A child that is forked meanwhile has no thread that would finish it: it would wait for its kernels for ever.
_loadings: list[Future[None]] = []
os.register_at_fork(before=lambda: wait(_loadings))


# Calls a function with first and last line, and number, of strips of so many image lines.
ForEachStrip = Callable[[Callable[[int, int, int], None], int], None]


class DeviceScene(Uncopied):
    """One scene on one device, without the state of any world; immutable, so renderers share it.

    Attributes:
        device: Warp's name of the device.
        part_site: int32 [P], see `RayScene`.
        num_cameras: K.
        num_lights: L.
        arrays: The kernels' struct.
    """

    def __init__(self, scene: RayScene, device: str):
        """Uploads a scene and builds the search trees of its meshes."""
        _start_warp()
        self.device = device
        self._part_rests = scene.part_rests
        self._camera_is_still = scene.camera_is_still
        self._rest_poses = scene.rest_pos[None], scene.rest_mat[None]
        self._resting: dict[int, Any] = {}
        self.part_site = scene.part_site
        self.num_cameras = len(scene.camera_body)
        self.num_lights = len(scene.light_body)
        self.arrays: Any = ray_kernels.Scene()
        for name, variable in ray_kernels.Scene.vars.items():
            value = getattr(scene, name, None)
            if isinstance(value, np.ndarray):
                setattr(self.arrays, name, wp.array(value, dtype=variable.type.dtype, device=device))
            elif value is not None:
                setattr(self.arrays, name, value)
        self.arrays.num_parts = len(scene.part_body)
        self.arrays.num_lights = self.num_lights
        self.arrays.num_cameras = self.num_cameras
        # Kept here because the kernels only hold their ids.
        self._meshes = [
            self._build_mesh(scene.points[3 * first : 3 * last])
            for first, last in zip(scene.part_first_face[:-1], scene.part_first_face[1:], strict=True)
        ]
        ids = np.array([mesh.id for mesh in self._meshes], dtype=np.uint64)
        self.arrays.part_mesh = wp.array(ids, dtype=wp.uint64, device=device)

    def _build_mesh(self, corners: npt.NDArray[Any]) -> Any:
        points = wp.array(corners, dtype=wp.vec3, device=self.device)
        indices = wp.array(np.arange(len(corners), dtype=np.int32), dtype=int, device=self.device)
        return wp.Mesh(points=points, indices=indices, bvh_constructor="sah", bvh_leaf_size=2)

    def resting(self, image_size: int, for_each_strip: ForEachStrip) -> Any:
        """Returns what the rays of images of a size meet of all that rests, the kernels' `Resting`.

        It is found once for each size, by the work of some dozen images.

        Args:
            image_size: Height and width of the images, pixels.
            for_each_strip: Divides the work.
        """
        # Without a lock, which a forked child could find locked for ever: whoever comes second finds the same.
        if image_size not in self._resting:
            self._resting[image_size] = self._find_resting(image_size, for_each_strip)
        return self._resting[image_size]

    def _find_resting(self, size: int, for_each_strip: ForEachStrip) -> Any:
        def array(values: Any, dtype: Any) -> Any:
            return wp.array(values, dtype=dtype, device=self.device)

        worlds = _new_worlds(self, 1)
        rest_pos, rest_mat = self._rest_poses
        visible = np.ones((1, len(self.part_site)), np.uint8)
        _place(self, array(rest_pos, wp.vec3), array(rest_mat, wp.mat33), array(visible, wp.uint8), worlds)

        # One tile for each camera, with the parts that rest as it sees them.
        tiles = ray_kernels.Tiles()
        tiles.num_parts = array(self._part_rests.sum(axis=1), int)
        tiles.parts = array(np.argsort(1 - self._part_rests, axis=1, kind="stable"), wp.int16)

        shape = (self.num_cameras * ray_kernels.NUM_RAYS, size, size)
        resting = ray_kernels.Resting()
        for name, dtype in dict[str, Any](faces=wp.vec2i, places=wp.vec3, colors=wp.vec3).items():
            setattr(resting, name, wp.empty(shape, dtype=dtype, device=self.device))
        is_still = array(self._camera_is_still, wp.uint8)

        def look(first: int, last: int, strip: int) -> None:
            wp.launch(
                ray_kernels.rest,
                dim=ray_kernels.num_threads(last - first, size),
                inputs=[self.arrays, worlds, tiles, is_still, first, last, resting],
                device=self.device,
            )

        for_each_strip(look, shape[0] * size)

        distances = resting.places.numpy()[..., 0].reshape(self.num_cameras, ray_kernels.NUM_RAYS, size, size)
        side = ray_kernels.TILE_SIZE
        padding = (0, -size % side)
        ends = np.pad(distances.max(axis=1), ((0, 0), padding, padding))
        num_tiles = ends.shape[1] // side
        ends = ends.reshape(self.num_cameras, num_tiles, side, num_tiles, side).max(axis=(2, 4))
        resting.tile_ends = array(ends, float)
        return resting


def _new_worlds(scene: DeviceScene, num_worlds: int) -> Any:
    """Returns the kernels' `Worlds`, not filled."""

    def empty(num: int, dtype: Any) -> Any:
        return wp.empty((num_worlds, num), dtype=dtype, device=scene.device)

    worlds = ray_kernels.Worlds()
    num_parts = len(scene.part_site)
    worlds.part_pos = empty(num_parts, wp.vec3)
    worlds.part_mat = empty(num_parts, wp.mat33)
    worlds.part_sphere = empty(num_parts, wp.vec4)
    worlds.camera_pos = empty(scene.num_cameras, wp.vec3)
    worlds.camera_mat = empty(scene.num_cameras, wp.mat33)
    worlds.light_pos = empty(scene.num_lights, wp.vec3)
    worlds.light_dir = empty(scene.num_lights, wp.vec3)
    return worlds


def _place(scene: DeviceScene, body_pos: Any, body_mat: Any, part_visible: Any, worlds: Any) -> None:
    """Fills the kernels' `Worlds`."""
    wp.launch(
        ray_kernels.place,
        dim=(len(body_pos), max(len(scene.part_site), scene.num_cameras, scene.num_lights)),
        inputs=[scene.arrays, body_pos, body_mat, part_visible, worlds],
        device=scene.device,
    )


@functools.lru_cache(maxsize=64)
def load_device_scene(
    scene: Scene,
    camera_names: tuple[str | Camera, ...],
    device: str,
    *,
    reflections: bool = True,
    texture_colorspace: TextureColorspace = "linear",
) -> DeviceScene:
    """Returns a scene on a device; equal arguments share one object (some 100 MB).

    Raises:
        ValueError: A camera is not in the scene, or the scene has something that cannot be drawn.
    """
    lit_sites = tuple(int(site) for site in scene.indicator_site_ids)
    ray_scene = build_ray_scene(
        load_small_model(scene),
        camera_names,
        moved_bodies=scene.fixture_body_ids.tolist(),
        lit_sites=lit_sites,
        reflections=reflections,
        texture_colorspace=texture_colorspace,
    )
    # The model with visuals (130 to 310 MB) has served its purpose; it is compiled again should OpenGL want it.
    vars(scene).pop("render_model", None)
    return DeviceScene(ray_scene, device)


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePoses:
    """What images of N worlds of one scene show, poses on the renderer's device.

    Attributes:
        scene: The scene.
        body_pos: Warp array [N, B] of `vec3`, positions of the bodies, m.
        body_mat: Warp array [N, B] of `mat33`, their rotations.
        lit_sites: [N, num] ids of sites that are lit, -1 for none.
        places: int64 [N], indices of the images among all that are drawn with them.
    """

    scene: Scene
    body_pos: Any
    body_mat: Any
    lit_sites: npt.NDArray[np.int32]
    places: npt.NDArray[np.int64]


class PixelBuffers:
    """Memory for images and what they are made of; casters that draw one after another share it.

    Attributes:
        samples: what the ray of each pixel met, [num * H, W] of `vec3`, of `vec4` and of int; edges are found by it.
        edges: how many pixels of each strip are at edges, and which they are.
        images: uint8 [num, H, W, 3].
        depths: float32 [num, H, W], m; empty without depth.
        bodies: int32 [num, H, W]; empty without segmentation.
    """

    def __init__(
        self, device: str, image_size: int, *, antialiasing: bool, view_kinds: Collection[ViewKind] = ("images",)
    ):
        """Allocates nothing yet."""
        self._device = device
        self._size = image_size
        self.view_kinds = check_view_kinds(view_kinds)
        self.antialiases = antialiasing and "images" in self.view_kinds
        self.measures = not self.view_kinds <= {"images"}
        self._capacity = 0
        self.samples: tuple[Any, Any, Any] = (None, None, None)
        self.edges: tuple[Any, Any] = (None, None)
        self.images: Any = None
        self.depths: Any = None
        self.bodies: Any = None

    def reserve(self, num_images: int) -> None:
        """Allocates memory for so many images, if there is less."""
        if num_images <= self._capacity:
            return

        def empty(shape: tuple[int, ...], dtype: Any) -> Any:
            return wp.empty(shape, dtype=dtype, device=self._device)

        size, kinds = self._size, self.view_kinds
        rows = num_images * size if self.antialiases or self.measures else 0
        self.samples = (empty((rows, size), wp.vec3), empty((rows, size), wp.vec4), empty((rows, size), int))
        rows = num_images * size if self.antialiases else 0
        self.edges = (empty((rows,), int), empty((rows * size,), int))  # at most one strip a line
        self.images = empty((num_images, size, size, 3), wp.uint8)
        self.depths = empty((num_images if "depth" in kinds else 0, size, size), float)
        self.bodies = empty((num_images if "segmentation" in kinds else 0, size, size), int)
        self._capacity = num_images


class SceneCaster(Uncopied):
    """Draws worlds of one scene. Not for concurrent use."""

    def __init__(
        self,
        scene: DeviceScene,
        image_size: int,
        *,
        antialiasing: bool,
        pool: ThreadPoolExecutor | None = None,
        pixels: PixelBuffers | None = None,
    ):
        """Prepares to draw.

        Args:
            scene: What to draw.
            image_size: Height and width of the images, pixels.
            antialiasing: Whether edges get four samples per pixel, where `pixels` is None.
            pool: Threads among which a CPU's work is divided; None draws in the calling thread.
            pixels: Where to draw, and what; None makes buffers of its own, for images.
        """
        self._scene = scene
        self._device = scene.device
        self._size = image_size
        self._pool = pool if scene.device == "cpu" else None
        self._num_parts = len(scene.part_site)
        self._num_cameras = scene.num_cameras
        self._part_site = scene.part_site
        self._capacity = 0
        self._worlds: Any = None
        self._tiles: Any = None
        self._pixels = pixels or PixelBuffers(scene.device, image_size, antialiasing=antialiasing)

    def render(self, body_pos: Any, body_mat: Any, lit_sites: npt.NDArray[np.int32]) -> Any:
        """Draws worlds and returns `views(...).images`; see there."""
        return self.views(body_pos, body_mat, lit_sites).images

    def views(self, body_pos: Any, body_mat: Any, lit_sites: npt.NDArray[np.int32]) -> Views:
        """Draws worlds.

        Args:
            body_pos: [N, B, 3] positions of the bodies, m; an array, or a Warp array [N, B] of `vec3` on the device.
            body_mat: [N, B, 3, 3] their rotations; an array, or a Warp array [N, B] of `mat33` on the device.
            lit_sites: [N, num] ids of sites that are lit, -1 for none.

        Returns:
            Warp arrays on the device: images uint8 [K * N, H, W, 3], depth float32 and segmentation int32
            [K * N, H, W, 1], those of camera 0 first, each mirrored left to right with respect to the true view. The
            next call overwrites them, also that of a caster with these pixels.
        """
        _load_kernels(self._device).result()
        num_worlds, pixels = len(body_pos), self._pixels
        pixels.reserve(num_worlds * self._num_cameras)
        self._reserve(num_worlds)
        visible = np.ones((num_worlds, self._num_parts), dtype=np.uint8)
        for part in np.nonzero(self._part_site >= 0)[0]:
            visible[:, part] = (lit_sites == self._part_site[part]).any(axis=1)
        _place(
            self._scene,
            self._on_device(body_pos, wp.vec3),
            self._on_device(body_mat, wp.mat33),
            wp.array(visible, dtype=wp.uint8, device=self._device),
            self._worlds,
        )
        scene = self._scene.arrays
        resting = self._scene.resting(self._size, self._for_each_strip)
        num_tiles = num_worlds * self._num_cameras * self._tiles.num_rows * self._tiles.num_columns
        wp.launch(
            ray_kernels.cull,
            dim=num_tiles,
            inputs=[scene, self._worlds, resting, self._size, self._size, self._tiles],
            device=self._device,
        )
        num_rows = num_worlds * self._num_cameras * self._size

        def cast(first: int, last: int, _: int) -> None:
            rows = [first, last]
            inputs = [scene, self._worlds, self._tiles, resting, num_worlds, *rows, *pixels.samples, pixels.images]
            self._launch(ray_kernels.render, ray_kernels.num_threads(last - first, self._size), inputs)
            if pixels.measures:
                inputs = [scene, num_worlds, *rows, *pixels.samples[1:], pixels.depths, pixels.bodies]
                self._launch(ray_kernels.measure, ray_kernels.num_threads(last - first, self._size), inputs)

        def smooth(first: int, last: int, strip: int) -> None:
            inputs = [first, last, strip, self._size, *pixels.samples, *pixels.edges]
            self._launch(ray_kernels.find_edges, ray_kernels.num_threads(last - first, self._size), inputs)
            samples_per_thread = 4 if self._device == "cpu" else 1
            at = [num_worlds, first, strip, samples_per_thread]
            inputs = [scene, self._worlds, self._tiles, resting, *at, *pixels.samples, *pixels.edges, pixels.images]
            num_pixels = (last - first) * self._size
            self._launch(ray_kernels.smooth_edges, num_pixels * 4 // samples_per_thread, inputs)

        self._for_each_strip(cast, num_rows)
        if pixels.antialiases:
            pixels.edges[0].zero_()
            self._for_each_strip(smooth, num_rows)
        num_images, side = self._num_cameras * num_worlds, self._size

        def drawn(kind: ViewKind, array: Any, channels: int) -> Any:
            return array[:num_images].reshape((num_images, side, side, channels)) if kind in pixels.view_kinds else None

        return Views(
            images=drawn("images", pixels.images, 3),
            depth=drawn("depth", pixels.depths, 1),
            segmentation=drawn("segmentation", pixels.bodies, 1),
        )

    def _on_device(self, values: Any, dtype: Any) -> Any:
        if isinstance(values, wp.array):
            return values
        return wp.array(np.ascontiguousarray(values, dtype=np.float32), dtype=dtype, device=self._device)

    def _reserve(self, num_worlds: int) -> None:
        if num_worlds <= self._capacity:
            return
        n, size, cameras = num_worlds, self._size, self._num_cameras

        def empty(shape: tuple[int, ...], dtype: Any) -> Any:
            return wp.empty(shape, dtype=dtype, device=self._device)

        self._worlds = _new_worlds(self._scene, n)
        self._tiles = ray_kernels.Tiles()
        self._tiles.num_rows = self._tiles.num_columns = -(-size // ray_kernels.TILE_SIZE)
        num_tiles = n * cameras * self._tiles.num_rows * self._tiles.num_columns
        self._tiles.num_parts = empty((num_tiles,), int)
        self._tiles.parts = empty((num_tiles, self._num_parts), wp.int16)
        self._capacity = n

    def _for_each_strip(self, job: Callable[[int, int, int], None], num_rows: int) -> None:
        """Calls `job(first, last, strip)` for strips of image lines, side by side."""
        if self._pool is None:
            job(0, num_rows, 0)
            return
        # Strips much smaller than a thread's share, because empty sky costs less than a robot.
        height = max(8, min(self._size // 4, num_rows // 8))
        firsts = range(0, num_rows, height)
        jobs = [self._pool.submit(job, at, min(at + height, num_rows), i) for i, at in enumerate(firsts)]
        for future in jobs:
            future.result()

    def _launch(self, kernel: Any, num_threads: int, inputs: list[Any]) -> None:
        wp.launch(kernel, dim=num_threads, inputs=inputs, device=self._device)


def _as_views(arrays: Mapping[ViewKind, Any]) -> Views:
    return Views(arrays.get("images"), arrays.get("depth"), arrays.get("segmentation"))


class WarpRenderer(Uncopied):
    """Ray caster that draws all worlds of a scene at once.

    On a CUDA device `views(..., as_torch=True)` leaves what it has drawn there.
    """

    def __init__(
        self,
        camera_names: Sequence[str | Camera],
        image_size: int,
        *,
        device: str | None = None,
        antialiasing: bool = True,
        reflections: bool = True,
        num_threads: int | None = None,
        texture_colorspace: TextureColorspace = "linear",
        view_kinds: Collection[ViewKind] = ("images",),
    ):
        """Starts Warp; see `make_renderer`.

        Args:
            camera_names: Cameras of the scene, in the order of the images.
            image_size: Height and width of the images, pixels.
            device: "cpu" or a CUDA device such as "cuda:0"; None takes CUDA if it is there.
            antialiasing: Whether pixels at edges get four samples.
            reflections: Whether reflective surfaces mirror, as LIBERO's do.
            num_threads: Threads on a CPU; None takes all cores that this process may use.
            texture_colorspace: See `libero_gym.rendering.textures`.
            view_kinds: What to draw, see `Views`.

        Raises:
            ValueError: An unknown colour space, or unknown views.
            RendererUnavailableError: Warp has no such device.
            RuntimeError: The device is a GPU, and this process was forked from one that had started Warp.
        """
        self._texture_colorspace: TextureColorspace = check_texture_colorspace(texture_colorspace)
        self._owner = Owner("the renderer 'warp'")
        self._device = default_device() if device is None else device
        if self._device not in list_devices():
            raise RendererUnavailableError(f"Warp has no device {self._device!r} (valid: {list_devices()})")
        if self._device != "cpu" and _warp_owner is not None:
            _warp_owner.check()
        self._camera_names = tuple(camera_names)
        self._size = image_size
        self._antialiasing = antialiasing
        self._reflections = reflections
        threads = num_threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads, "libero-render") if threads > 1 else None
        _load_kernels(self._device)
        self._casters: dict[str, SceneCaster] = {}
        self._view_kinds = check_view_kinds(view_kinds)
        self._pixels = self._new_pixels()
        self._scratch: dict[str, mujoco.MjData] = {}

    @property
    def name(self) -> RendererKind:
        """Kind of renderer."""
        return "warp"

    @property
    def device(self) -> str:
        """Warp's name of the device."""
        return self._device

    @property
    def uses_all_cores(self) -> bool:
        """Whether drawing occupies all cores."""
        return self._device == "cpu"

    def render(self, simulations: Sequence[Drawable]) -> Images:
        """Draws the last observed state of each simulation; see `Renderer`.

        Raises:
            ValueError: A camera is not in the scene, the scene has something that cannot be drawn, or the renderer was
                not made for images.
            RuntimeError: This process was forked from the one that made the renderer.
        """
        return only_images(self.views(simulations))

    def views(self, simulations: Sequence[Drawable], *, as_torch: bool = False) -> Views:
        """Draws all that the renderer was made for; see `Renderer`.

        Args:
            simulations: N worlds.
            as_torch: Whether as torch tensors on the renderer's device; what is on a GPU does not leave it.

        Raises:
            ValueError: A camera is not in the scene, or the scene has something that cannot be drawn.
            RuntimeError: This process was forked from the one that made the renderer.
            ModuleNotFoundError: `as_torch` without PyTorch.
        """
        collect = self._collect_torch if as_torch else self._collect
        return collect(len(simulations), self._draw(simulations))

    def views_of_poses(self, *poses: DevicePoses, as_torch: bool = False) -> Views:
        """Like `views`, of worlds whose poses are on the device already, of one scene or several."""
        collect = self._collect_torch if as_torch else self._collect
        return collect(sum(len(part.places) for part in poses), self._draw_poses(poses))

    def close(self) -> None:
        """Releases threads and buffers, in the process that made them; a second call does nothing."""
        if not self._owner.is_this_process:
            return
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._casters.clear()
        self._pixels = self._new_pixels()
        self._scratch.clear()

    def _new_pixels(self) -> PixelBuffers:
        return PixelBuffers(self._device, self._size, antialiasing=self._antialiasing, view_kinds=self._view_kinds)

    def _shape(self, kind: ViewKind, num_worlds: int) -> tuple[int, ...]:
        channels = 3 if kind == "images" else 1
        return len(self._camera_names), num_worlds, self._size, self._size, channels  # each camera's are contiguous

    def _collect(self, num_worlds: int, batches: Iterator[tuple[list[int], Views]]) -> Views:
        arrays: dict[ViewKind, Any] = {
            kind: np.empty(self._shape(kind, num_worlds), _DTYPES[kind]) for kind in self._view_kinds
        }
        for indices, batch in batches:
            for kind, array in arrays.items():
                array[:, indices] = getattr(batch, kind).numpy().reshape(self._shape(kind, len(indices)))
        return _as_views({kind: np.moveaxis(array, 0, 1) for kind, array in arrays.items()})

    def _collect_torch(self, num_worlds: int, batches: Iterator[tuple[list[int], Views]]) -> Views:
        try:
            import torch  # not needed by any other path
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "images_as_torch=True needs PyTorch; install it with `pip install torch`, or leave the images in NumPy"
            ) from error

        arrays: dict[ViewKind, Any] = {
            kind: torch.empty(
                self._shape(kind, num_worlds), dtype=getattr(torch, np.dtype(_DTYPES[kind]).name), device=self._device
            )
            for kind in self._view_kinds
        }
        # Batch after batch as they come: to upload their indices in between would wait for each to be drawn.
        drawn: list[int] = []
        for indices, batch in batches:
            places = slice(len(drawn), len(drawn) + len(indices))
            for kind, array in arrays.items():
                array[:, places] = wp.to_torch(getattr(batch, kind)).reshape(self._shape(kind, len(indices)))
            drawn += indices
        if drawn != sorted(drawn):
            order = torch.as_tensor(np.argsort(drawn), device=self._device)
            arrays = {kind: array[:, order] for kind, array in arrays.items()}
        return _as_views({kind: array.movedim(0, 1) for kind, array in arrays.items()})

    def _draw(self, simulations: Sequence[Drawable]) -> Iterator[tuple[list[int], Views]]:
        """Yields (indices of simulations, Warp arrays [K * num, H, W, channels]) scene by scene."""
        by_scene: dict[str, list[int]] = {}
        for index, simulation in enumerate(simulations):
            by_scene.setdefault(simulation.scene.key, []).append(index)
        for members in by_scene.values():
            for first in range(0, len(members), _MAX_LAUNCH_WORLDS):
                indices = members[first : first + _MAX_LAUNCH_WORLDS]
                yield indices, self._draw_scene([simulations[index] for index in indices])

    def _draw_poses(self, poses: Sequence[DevicePoses]) -> Iterator[tuple[list[int], Views]]:
        """Yields as `_draw` does."""
        for of_scene in poses:
            caster = self._caster(of_scene.scene)
            for first in range(0, len(of_scene.places), _MAX_LAUNCH_WORLDS):
                part = slice(first, min(first + _MAX_LAUNCH_WORLDS, len(of_scene.places)))
                batch = caster.views(of_scene.body_pos[part], of_scene.body_mat[part], of_scene.lit_sites[part])
                yield of_scene.places[part].tolist(), batch

    def _caster(self, scene: Scene) -> SceneCaster:
        self._owner.check()
        if scene.key not in self._casters:
            device_scene = load_device_scene(
                scene,
                self._camera_names,
                self._device,
                reflections=self._reflections,
                texture_colorspace=self._texture_colorspace,
            )
            self._casters[scene.key] = SceneCaster(
                device_scene, self._size, antialiasing=self._antialiasing, pool=self._pool, pixels=self._pixels
            )
        return self._casters[scene.key]

    def _draw_scene(self, simulations: list[Drawable]) -> Views:
        scene = simulations[0].scene
        caster = self._caster(scene)
        if scene.key not in self._scratch:
            self._scratch[scene.key] = mujoco.MjData(scene.physics_model)
        data = self._scratch[scene.key]
        num_bodies = scene.physics_model.nbody
        body_pos = np.empty((len(simulations), num_bodies, 3), dtype=np.float32)
        body_mat = np.empty((len(simulations), num_bodies, 3, 3), dtype=np.float32)
        lit = np.full((len(simulations), len(scene.indicator_site_ids)), -1, dtype=np.int32)
        for i, simulation in enumerate(simulations):
            state = simulation.render_state()
            data.qpos[:] = state.qpos
            mujoco.mj_kinematics(simulation.model, data)
            body_pos[i] = data.xpos
            body_mat[i] = data.xmat.reshape(-1, 3, 3)
            lit[i] = np.where(state.indicator_alpha > 0, scene.indicator_site_ids, -1)
        return caster.views(body_pos, body_mat, lit)
