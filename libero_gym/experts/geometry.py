"""Shapes of bodies as clouds of surface points, taken from the collision geometry.

Clouds serve objects of any class alike: how high something is, how wide it is at some height, what stands in the
way of a straight path. All positions are in metres in the world frame; a cloud is float64 [num_points, 3].
"""

from __future__ import annotations

import functools
import itertools

import mujoco
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

SPACING = 0.008
"""Largest distance in metres between neighbouring points of a cloud: half the width of a finger."""


_SIDES = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)))


class Shapes:
    """Surface points of the collision geoms of one model, posed by its data.

    Attributes:
        model: physics model.
        data: simulation state, whose geom poses are read on each call.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Sample the geoms' surfaces."""
        self.model = model
        self.data = data
        # Planes have no extent; the floor is below everything that matters.
        solid = (model.geom_contype | model.geom_conaffinity).astype(bool) & (
            model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
        )
        self._geoms = np.flatnonzero(solid)
        self._local = {int(geom): _sample(model, int(geom)) for geom in self._geoms}
        self._body_geoms: dict[int, list[int]] = {}
        for geom in self._geoms:
            body: int = int(model.geom_bodyid[geom])
            while body > 0:
                self._body_geoms.setdefault(body, []).append(int(geom))
                body = int(model.body_parentid[body])

    def cloud(self, body_id: int) -> FloatArray:
        """Return the points of a body and all bodies attached to it."""
        return self._pose(self._body_geoms.get(body_id, []))

    def obstacles(self, ignored_body_ids: tuple[int, ...], near: FloatArray, radius: float) -> FloatArray:
        """Return the points, of all but the ignored bodies' trees, within a horizontal `radius` of `near` [2]."""
        ignored = {geom for body in ignored_body_ids for geom in self._body_geoms.get(body, [])}
        reach = self.model.geom_rbound[self._geoms] + radius
        distance = np.linalg.norm(self.data.geom_xpos[self._geoms, :2] - near, axis=1)
        cloud = self._pose([int(g) for g in self._geoms[distance <= reach] if int(g) not in ignored])
        return cloud[np.linalg.norm(cloud[:, :2] - near, axis=1) <= radius]

    def top_along(self, start: FloatArray, end: FloatArray, radius: float, ignored_body_ids: tuple[int, ...]) -> float:
        """Return the height of the highest point within a horizontal `radius` of the segment `start`-`end`.

        Points of the ignored bodies' trees do not count. -inf if there is none.
        """
        middle = (start[:2] + end[:2]) / 2
        half = float(np.linalg.norm(end[:2] - start[:2])) / 2
        cloud = self.obstacles(ignored_body_ids, middle, half + radius)
        along = (end[:2] - start[:2]) / max(2 * half, 1e-9)
        offset = cloud[:, :2] - start[:2]
        projection = np.clip(offset @ along, 0.0, 2 * half)
        distance = np.linalg.norm(offset - projection[:, None] * along, axis=1)
        heights = cloud[distance < radius, 2]
        return float(heights.max()) if heights.size else -np.inf

    def way_out(self, body_id: int, obstacles: FloatArray, margin: float) -> FloatArray:
        """Return the shortest horizontal shift [2] after which nothing hangs over the body; zero if nothing does.

        Args:
            body_id: the body to be shifted.
            obstacles: float64 [n, 3]; those of its own height and lower do not count.
            margin: metres to be kept.
        """
        cloud = self.cloud(body_id)
        overhang = obstacles[obstacles[:, 2] > float(cloud[:, 2].max()) + 0.02, :2]
        above = set[tuple[int, int]]().union(*(_cells(overhang + margin * side) for side in _SIDES))
        for distance in np.arange(0.0, 0.2, 0.01):
            # Towards the robot first: there the arm reaches best.
            for angle in np.pi + np.deg2rad(np.array([0, 30, -30, 60, -60, 90, -90, 120, -120, 150, -150, 180])):
                shift = distance * np.array([np.cos(angle), np.sin(angle)])
                if above.isdisjoint(_cells(cloud[:, :2] + shift)):
                    return shift
        return np.zeros(2)

    def _pose(self, geoms: list[int]) -> FloatArray:
        clouds = [
            self.data.geom_xpos[geom] + self._local[geom] @ self.data.geom_xmat[geom].reshape(3, 3).T for geom in geoms
        ]
        return np.concatenate(clouds) if clouds else np.zeros((0, 3))


def _cells(points: FloatArray) -> set[tuple[int, int]]:
    """Return the squares of 1 cm that contain points [n, 2]."""
    return {(int(x), int(y)) for x, y in np.unique(np.floor(points / 0.01).astype(np.int64), axis=0)}


def _sample(model: mujoco.MjModel, geom: int) -> FloatArray:
    size = np.asarray(model.geom_size[geom], dtype=np.float64)
    kind = int(model.geom_type[geom])
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return _box_points(*(float(s) for s in size))
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        return _tube_points(float(size[0]), float(size[1]))
    if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return _tube_points(float(size[0]), float(size[1] + size[0]))
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = int(model.geom_dataid[geom])
        start = int(model.mesh_vertadr[mesh])
        return np.asarray(model.mesh_vert[start : start + int(model.mesh_vertnum[mesh])], dtype=np.float64)
    half = np.asarray(model.geom_aabb[geom][3:], dtype=np.float64)
    return _box_points(*(float(s) for s in half))


@functools.lru_cache(maxsize=4096)
def _box_points(*half: float) -> FloatArray:
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / SPACING)) + 1)) for h in half]
    faces: list[FloatArray] = []
    for normal, side in itertools.product(range(3), (-1.0, 1.0)):
        grid = [axes[i] if i != normal else np.array([side * half[normal]]) for i in range(3)]
        faces.append(np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, 3))
    return np.unique(np.concatenate(faces).round(6), axis=0)


@functools.lru_cache(maxsize=4096)
def _tube_points(radius: float, half_length: float) -> FloatArray:
    angles = np.linspace(0.0, 2 * np.pi, max(8, int(np.ceil(2 * np.pi * radius / SPACING))), endpoint=False)
    heights = np.linspace(-half_length, half_length, max(2, int(np.ceil(2 * half_length / SPACING)) + 1))
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    wall = [np.column_stack([radius * ring, np.full(len(ring), z)]) for z in heights]
    radii = np.linspace(0.0, radius, max(2, int(np.ceil(radius / SPACING)) + 1))
    caps = [np.column_stack([r * ring, np.full(len(ring), z)]) for r in radii for z in (-half_length, half_length)]
    return np.unique(np.concatenate(wall + caps).round(6), axis=0)
