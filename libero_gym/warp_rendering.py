"""A ray caster on Warp that draws many worlds of one scene at once, on a CPU or a CUDA device.

It reproduces MuJoCo's classic OpenGL renderer rather than improving on it, since that is what LIBERO's data and
policies saw: fixed-function lighting at triangle corners, clamped before the texture is applied; a specular term
of exponent 0 that is constant; mipmaps; one mirror. Rays start at the near clipping plane and pass the backs of
triangles. Pixels whose neighbourhood shows an edge get four more samples in the usual multisampling pattern.

Not drawn: shadows (no LIBERO light casts any), haze, transparency.

Shape legend: N worlds, K cameras, H x W pixels, B bodies, P parts, L lights, F triangles.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
import numpy.typing as npt
import warp as wp

from libero_gym import ray_kernels
from libero_gym.cache import cache_dir
from libero_gym.ray_scene import RayScene, build_ray_scene
from libero_gym.rendering import Images, RendererKind, RendererUnavailableError
from libero_gym.scenes import Scene

if TYPE_CHECKING:
    import torch

    from libero_gym.simulation import Simulation

# Worlds drawn by one kernel launch; bounds the memory for intermediate results (8 MB a world of 256 pixels).
_MAX_LAUNCH_WORLDS = 256


def default_device() -> str:
    """The device that images are drawn on unless one is named: the first CUDA device, else "cpu"."""
    _start_warp()
    return "cuda:0" if wp.is_cuda_available() else "cpu"


def list_devices() -> list[str]:
    """Names of the devices that Warp can use."""
    _start_warp()
    return [str(device.alias) for device in wp.get_devices()]


def _fields(structure: Any) -> dict[str, Any]:
    """Names and Warp types of a struct's members."""
    return {name: variable.type for name, variable in structure.vars.items()}


def _start_warp() -> None:
    """Points Warp's compiled kernels at the package's cache folder and keeps it from printing."""
    with _start_lock:
        if not wp.config.kernel_cache_dir:
            wp.config.kernel_cache_dir = str(cache_dir() / "warp")
        if wp.config.log_level == wp.LOG_INFO:  # not if the user has asked for another one
            wp.config.log_level = wp.LOG_WARNING
        wp.init()


_start_lock = threading.Lock()


class SceneCaster:
    """Device copies of one scene and the buffers to draw up to `capacity` worlds of it at once.

    Not for concurrent use.
    """

    def __init__(
        self, scene: RayScene, image_size: int, device: str, *, antialiasing: bool, pool: ThreadPoolExecutor | None
    ):
        """Uploads the scene.

        Args:
            scene: What to draw.
            image_size: Height and width of the images, pixels.
            device: "cpu" or a CUDA device such as "cuda:0".
            antialiasing: Whether edges get four samples per pixel.
            pool: Threads among which a CPU's work is divided; None draws in the calling thread.
        """
        self._device = device
        self._size = image_size
        self._antialiasing = antialiasing
        self._pool = pool
        self._num_parts = len(scene.part_body)
        self._num_cameras = len(scene.camera_body)
        self._part_site = scene.part_site
        self._scene: Any = ray_kernels.Scene()
        for name, kind in _fields(ray_kernels.Scene).items():
            if name == "part_mesh":
                continue
            value = getattr(scene, name, None)
            if isinstance(value, np.ndarray):
                setattr(self._scene, name, wp.array(value, dtype=kind.dtype, device=device))
            elif value is not None:
                setattr(self._scene, name, value)
        self._scene.num_parts = self._num_parts
        self._scene.num_lights = len(scene.light_body)
        self._scene.num_cameras = self._num_cameras
        self._meshes = [
            self._build_mesh(scene, first, last)
            for first, last in zip(scene.part_first_face[:-1], scene.part_first_face[1:], strict=True)
        ]
        ids = np.array([mesh.id for mesh in self._meshes], dtype=np.uint64)
        self._scene.part_mesh = wp.array(ids, dtype=wp.uint64, device=device)
        self._num_places = max(self._num_parts, self._num_cameras, self._scene.num_lights)
        self._capacity = 0
        self._worlds: Any = None
        self._buffers: tuple[Any, Any, Any] = (None, None, None)
        self._images: Any = None

    def _build_mesh(self, scene: RayScene, first: int, last: int) -> Any:
        points = wp.array(scene.points[3 * first : 3 * last], dtype=wp.vec3, device=self._device)
        indices = wp.array(np.arange(3 * (last - first), dtype=np.int32), dtype=int, device=self._device)
        return wp.Mesh(points=points, indices=indices, bvh_constructor="sah", bvh_leaf_size=2)

    def render(self, body_pos: npt.NDArray[Any], body_mat: npt.NDArray[Any], lit_sites: npt.NDArray[np.int32]) -> Any:
        """Draws worlds.

        Args:
            body_pos: [N, B, 3] positions of the bodies, m.
            body_mat: [N, B, 3, 3] their rotations.
            lit_sites: [N, num] ids of sites that are lit, -1 for none.

        Returns:
            A Warp array [K * N, H, W, 3] of uint8 on the device, images of camera 0 first, each mirrored left to
            right with respect to the true view. The next call overwrites it.
        """
        num_worlds = len(body_pos)
        self._reserve(num_worlds)
        visible = np.ones((num_worlds, self._num_parts), dtype=np.uint8)
        for part in np.nonzero(self._part_site >= 0)[0]:
            visible[:, part] = (lit_sites == self._part_site[part]).any(axis=1)
        arrays = [
            wp.array(np.ascontiguousarray(body_pos, dtype=np.float32), dtype=wp.vec3, device=self._device),
            wp.array(np.ascontiguousarray(body_mat, dtype=np.float32), dtype=wp.mat33, device=self._device),
            wp.array(visible, dtype=wp.uint8, device=self._device),
        ]
        wp.launch(
            ray_kernels.place,
            dim=(num_worlds, self._num_places),
            inputs=[self._scene, *arrays, self._worlds],
            device=self._device,
        )
        self._launch(ray_kernels.render, num_worlds)
        if self._antialiasing:
            self._launch(ray_kernels.smooth_edges, num_worlds)
        return self._images[: self._num_cameras * num_worlds]

    def _reserve(self, num_worlds: int) -> None:
        if num_worlds <= self._capacity:
            return
        n, size, cameras = num_worlds, self._size, self._num_cameras
        num_lights = self._scene.num_lights

        def empty(shape: tuple[int, ...], dtype: Any) -> Any:
            return wp.empty(shape, dtype=dtype, device=self._device)

        self._worlds = ray_kernels.Worlds()
        self._worlds.part_pos = empty((n, self._num_parts), wp.vec3)
        self._worlds.part_mat = empty((n, self._num_parts), wp.mat33)
        self._worlds.part_sphere = empty((n, self._num_parts), wp.vec4)
        self._worlds.camera_pos = empty((n, cameras), wp.vec3)
        self._worlds.camera_mat = empty((n, cameras), wp.mat33)
        self._worlds.light_pos = empty((n, num_lights), wp.vec3)
        self._worlds.light_dir = empty((n, num_lights), wp.vec3)
        rows = n * cameras * size if self._antialiasing else 0
        self._buffers = (empty((rows, size), wp.vec3), empty((rows, size), wp.vec4), empty((rows, size), int))
        self._images = empty((cameras * n, size, size, 3), wp.uint8)
        self._capacity = n

    def _launch(self, kernel: Any, num_worlds: int) -> None:
        rows = num_worlds * self._num_cameras * self._size

        def launch(first: int, last: int) -> None:
            inputs = [
                self._scene,
                self._worlds,
                num_worlds,
                first,
                self._size,
                self._size,
                *self._buffers,
                self._images,
            ]
            wp.launch(kernel, dim=(last - first, self._size), inputs=inputs, device=self._device)

        if self._pool is None:
            launch(0, rows)
            return
        # Strips much smaller than a thread's share, because empty sky costs less than a robot.
        strip = max(8, min(self._size // 4, rows // 8))
        futures = [self._pool.submit(launch, first, min(first + strip, rows)) for first in range(0, rows, strip)]
        for future in futures:
            future.result()


class WarpRenderer:
    """Ray caster that draws all worlds of a scene at once.

    On a CUDA device `render_torch` leaves the images there.
    """

    def __init__(
        self,
        camera_names: Sequence[str],
        image_size: int,
        *,
        device: str | None = None,
        antialiasing: bool = True,
        num_threads: int | None = None,
    ):
        """Starts Warp; see `make_renderer`.

        Args:
            camera_names: Cameras of the scene, in the order of the images.
            image_size: Height and width of the images, pixels.
            device: "cpu" or a CUDA device such as "cuda:0"; None takes CUDA if it is there.
            antialiasing: Whether pixels at edges get four samples.
            num_threads: Threads on a CPU; None takes all cores that this process may use.

        Raises:
            RendererUnavailableError: Warp has no such device.
        """
        self._device = default_device() if device is None else device
        if self._device not in list_devices():
            raise RendererUnavailableError(f"Warp has no device {self._device!r} (valid: {list_devices()})")
        self._camera_names = tuple(camera_names)
        self._size = image_size
        self._antialiasing = antialiasing
        threads = num_threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(threads, "libero-render") if threads > 1 else None
        self._casters: dict[str, SceneCaster] = {}
        self._scratch: dict[str, mujoco.MjData] = {}

    @property
    def name(self) -> RendererKind:
        """Kind of renderer."""
        return "warp"

    @property
    def device(self) -> str:
        """Warp's name of the device."""
        return self._device

    def render(self, simulations: Sequence[Simulation]) -> Images:
        """Draws the last observed state of each simulation; see `Renderer`.

        Raises:
            ValueError: A camera is not in the scene, or the scene has something that cannot be drawn.
        """
        shape = (len(self._camera_names), len(simulations), self._size, self._size, 3)
        images = np.empty(shape, dtype=np.uint8)
        for indices, batch in self._draw(simulations):
            images[:, indices] = batch.numpy().reshape(shape[0], len(indices), *shape[2:])
        return np.moveaxis(images, 0, 1)  # [N, K, H, W, 3]; each camera's images are contiguous

    def render_torch(self, simulations: Sequence[Simulation]) -> torch.Tensor:
        """Like `render`, as a torch tensor on the renderer's device; images on a GPU do not leave it."""
        import torch  # not needed by any other path

        shape = (len(self._camera_names), len(simulations), self._size, self._size, 3)
        images = torch.empty(shape, dtype=torch.uint8, device=self._device)
        for indices, batch in self._draw(simulations):
            part = wp.to_torch(batch).reshape(shape[0], len(indices), *shape[2:])
            images[:, torch.as_tensor(indices, device=self._device)] = part
        return images.movedim(0, 1)

    def close(self) -> None:
        """Releases threads and buffers; a second call does nothing."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._casters.clear()
        self._scratch.clear()

    def _draw(self, simulations: Sequence[Simulation]) -> Iterator[tuple[list[int], Any]]:
        """Yields (indices of simulations, Warp array [K * num, H, W, 3]) scene by scene."""
        by_scene: dict[str, list[int]] = {}
        for index, simulation in enumerate(simulations):
            by_scene.setdefault(simulation.scene.key, []).append(index)
        for members in by_scene.values():
            for first in range(0, len(members), _MAX_LAUNCH_WORLDS):
                indices = members[first : first + _MAX_LAUNCH_WORLDS]
                yield indices, self._draw_scene([simulations[index] for index in indices])

    def _draw_scene(self, simulations: list[Simulation]) -> Any:
        scene = simulations[0].scene
        if scene.key not in self._casters:
            self._casters[scene.key] = self._open_scene(scene)
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
        return self._casters[scene.key].render(body_pos, body_mat, lit)

    def _open_scene(self, scene: Scene) -> SceneCaster:
        lit_sites = tuple(int(site) for site in scene.indicator_site_ids)
        ray_scene = build_ray_scene(scene.render_model, self._camera_names, lit_sites=lit_sites)
        return SceneCaster(ray_scene, self._size, self._device, antialiasing=self._antialiasing, pool=self._pool)
