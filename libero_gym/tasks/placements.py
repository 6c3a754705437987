"""Fixture poses: LIBERO's placement samplers, replayed from a seeded stream.

Every reset of LIBERO samples where objects and fixtures stand. Setting a stored initial state then overwrites the
objects, but fixtures have no joints: they keep what was sampled, and the stored states do not hold it. Here the same
samplers run on the same kind of stream (`numpy.random.RandomState`), so that a seed gives the fixture poses that
`numpy.random.seed(seed); env.reset()` gives in LIBERO. Samplers that come after the last fixture are not run: a
stream serves one reset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from libero_gym.tasks.bddl import Problem
from libero_gym.tasks.scenes import Scene, SceneObject

_MAX_TRIES = 5000
_OBJECT_Z_OFFSET = 0.01
_OBJECTS_STAY_INSIDE = {"libero_tabletop_manipulation", "libero_floor_manipulation", "libero_coffee_table_manipulation"}

FloatArray = npt.NDArray[np.float64]


class PlacementError(RuntimeError):
    """A sampler found no free place; LIBERO then starts its reset anew from where the stream stands."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementSampler:
    """Places one object or fixture in one of the rectangles of its table region.

    Attributes:
        thing: what is placed.
        x_ranges: (low, high) of each rectangle, m.
        y_ranges: (low, high) of each rectangle, m.
        yaw_range: (low, high) rad for fixtures; objects use their own rotation.
        z_offset: m.
        stays_inside: whether the object's radius is kept inside the rectangle.
        avoids_others: whether places that overlap with earlier ones are rejected.
    """

    thing: SceneObject
    x_ranges: tuple[tuple[float, float], ...]
    y_ranges: tuple[tuple[float, float], ...]
    yaw_range: tuple[float, ...]
    z_offset: float
    stays_inside: bool
    avoids_others: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class FixtureSampler:
    """Samples the poses of a task's fixtures.

    Attributes:
        placements: in the order in which LIBERO samples them.
        property_ranges: range of each joint position that the initial state samples (drawers, stoves).
        reference_pos: float64 [3], m.
        fixture_index: row of each fixture in the returned arrays.
    """

    placements: tuple[PlacementSampler, ...]
    property_ranges: tuple[tuple[float, float], ...]
    reference_pos: FloatArray
    fixture_index: dict[str, int]

    def sample(
        self, random_state: np.random.RandomState, default_pose: FloatArray, *, num_resets: int = 1
    ) -> FloatArray:
        """Return poses float64 [num_fixtures, 7]: position (m), quaternion wxyz.

        Args:
            random_state: stream in the state in which LIBERO's `reset()` starts.
            default_pose: float64 [num_fixtures, 7] for fixtures that the initial state does not place.
            num_resets: how many times LIBERO's environment has been reset, this time included. LIBERO appends the
                samplers of joint positions anew at its construction and at each reset, and calls all of them.

        Raises:
            PlacementError: an object found no free place within 5,000 tries, a hundred times over.
        """
        for _ in range(100):
            try:
                return self._sample_once(random_state, default_pose, num_resets)
            except PlacementError:
                num_resets += 1
        raise PlacementError(f"no free place for the objects of {[p.thing.name for p in self.placements]}")

    def _sample_once(
        self, random_state: np.random.RandomState, default_pose: FloatArray, num_resets: int
    ) -> FloatArray:
        random_state.randn(7)  # robosuite's noise on the arm's posture, which LIBERO multiplies by zero
        for low, high in self.property_ranges * (num_resets + 1):
            random_state.uniform(low=low, high=high)
        poses = default_pose.copy()
        placed: list[tuple[SceneObject, tuple[float, float, float]]] = []
        last = max((i for i, p in enumerate(self.placements) if p.thing.is_fixture), default=-1)
        for placement in self.placements[: last + 1]:
            position = self._sample_position(placement, placed, random_state)
            quaternion = _sample_quaternion(placement, random_state)
            placed.append((placement.thing, position))
            if placement.thing.is_fixture:
                poses[self.fixture_index[placement.thing.name]] = [*position, *quaternion]
        return poses

    def _sample_position(
        self,
        placement: PlacementSampler,
        placed: Sequence[tuple[SceneObject, tuple[float, float, float]]],
        random_state: np.random.RandomState,
    ) -> tuple[float, float, float]:
        thing = placement.thing
        margin = thing.horizontal_radius if placement.stays_inside else 0.0
        z = placement.z_offset + self.reference_pos[2] - thing.bottom_offset_z
        for _ in range(_MAX_TRIES):
            rectangle = random_state.randint(len(placement.x_ranges))
            (x_low, x_high), (y_low, y_high) = placement.x_ranges[rectangle], placement.y_ranges[rectangle]
            x = random_state.uniform(low=x_low + margin, high=x_high - margin) + self.reference_pos[0]
            y = random_state.uniform(low=y_low + margin, high=y_high - margin) + self.reference_pos[1]
            if not placement.avoids_others or not any(
                np.linalg.norm((x - other_x, y - other_y)) <= other.horizontal_radius + thing.horizontal_radius
                and z - other_z <= other.top_offset_z - thing.bottom_offset_z
                for other, (other_x, other_y, other_z) in placed
            ):
                return x, y, z
        raise PlacementError(f"no free place for {thing.name}")


def make_fixture_sampler(scene: Scene, problem: Problem) -> FixtureSampler:
    """Return the sampler of the fixture poses of `problem`, one of the tasks of `scene`."""
    regions = {region.name: region for region in problem.regions}
    placements: list[PlacementSampler] = []
    property_ranges: list[tuple[float, float]] = []
    for predicate, name, *rest in problem.init:
        region = regions.get(rest[0]) if predicate == "on" and rest else None
        if region is not None and region.target not in scene.objects:
            thing = scene.objects[name]
            placements.append(
                PlacementSampler(
                    thing=thing,
                    x_ranges=tuple((r[0], r[2]) for r in region.ranges),
                    y_ranges=tuple((r[1], r[3]) for r in region.ranges),
                    yaw_range=region.yaw_range,
                    z_offset=scene.fixture_z_offset if thing.is_fixture else _OBJECT_Z_OFFSET,
                    stays_inside=not thing.is_fixture and scene.problem in _OBJECTS_STAY_INSIDE,
                    avoids_others=not thing.is_fixture,
                )
            )
        elif predicate in {"open", "close", "turnon", "turnoff"}:
            owner = scene.objects[scene.sites[name].parent or ""] if name in scene.sites else scene.objects[name]
            low, high = owner.joint_ranges[f"default_{predicate}_ranges"]
            property_ranges.append((low, high))
    fixtures = [thing.name for thing in scene.objects.values() if thing.is_fixture]
    return FixtureSampler(
        placements=tuple(placements),
        property_ranges=tuple(property_ranges),
        reference_pos=scene.reference_pos,
        fixture_index={name: index for index, name in enumerate(fixtures)},
    )


def _sample_quaternion(placement: PlacementSampler, random_state: np.random.RandomState) -> FloatArray:
    """Sample the rotation; only those of fixtures (wxyz) matter, those of objects keep the stream in step."""
    thing = placement.thing
    if thing.is_fixture:
        angle = random_state.uniform(low=min(placement.yaw_range), high=max(placement.yaw_range))
        quaternion = np.array([math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)])
        return quaternion if thing.init_quat is None else _multiply_as_xyzw(quaternion, thing.init_quat)
    if thing.rotation_kind == "axes":
        for _, bounds in thing.rotation:
            random_state.uniform(low=min(bounds), high=max(bounds))
    elif thing.rotation_kind == "range":
        random_state.uniform(low=min(thing.rotation), high=max(thing.rotation))
    elif thing.rotation is None:
        random_state.uniform(low=0.0, high=2 * math.pi)
    return np.array([1.0, 0.0, 0.0, 0.0])


def _multiply_as_xyzw(first: FloatArray, second: FloatArray) -> FloatArray:
    """Multiply as robosuite does, which reads the sampler's wxyz quaternion as xyzw and rounds to single precision."""
    x0, y0, z0, w0 = second
    x1, y1, z1, w1 = first
    product = [
        x1 * w0 + y1 * z0 - z1 * y0 + w1 * x0,
        -x1 * z0 + y1 * w0 + z1 * x0 + w1 * y0,
        x1 * y0 - y1 * x0 + z1 * w0 + w1 * z0,
        -x1 * x0 - y1 * y0 - z1 * z0 + w1 * w0,
    ]
    return np.array(product, dtype=np.float32).astype(np.float64)
