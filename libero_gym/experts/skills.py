"""Skills: closed-loop motions that a task is composed of.

A skill is a generator of `Command`s, one an environment step; it reads the world anew before each. What it returns
(by `yield from`) says whether it succeeded. Positions are in metres in the world frame, angles in rad.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.experts.geometry import Shapes
from libero_gym.experts.grasps import (
    HAND_HALF_LENGTH,
    PALM_HEIGHT,
    TIP_DEPTH,
    Grasp,
    about_vertical,
    choose_grasp,
    gripper_rotation,
    intrusion,
    lean_outwards,
)
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.scenes import Scene, SceneObject

FloatArray = npt.NDArray[np.float64]

OPEN, CLOSED = -1.0, 1.0

# Metres and rad, chosen by trial over the stored initial states.
_HOVER = 0.06
_MARGIN = 0.02
_FINGER_REACH = 0.065
_LIFT = 0.06
_MAX_FREE_STEPS = 6
_STALL_STEPS, _STALL_DISTANCE, _NEAR = 10, 0.002, 0.02
_OVERHANG_MARGIN = 0.02
_PRECISE = 0.01
_PARTLY = 1.0
_MAX_RISE = 0.1
_FREE, _WIDE_OPEN, _EVASION = 0.02, 0.08, 0.015
_MISS = (0.03, 0.07)


@dataclass(frozen=True, kw_only=True, eq=False)
class Command:
    """Where the gripper shall go.

    Attributes:
        position: float64 [3], target of the end-effector site.
        rotation: float64 [3, 3], world from gripper.
        gripper: `OPEN` or `CLOSED`.
        speed: fraction of the expert's cruising speed.
    """

    position: FloatArray
    rotation: FloatArray
    gripper: float
    speed: float = 1.0


Pose = tuple[FloatArray, FloatArray]
"""Position [3] and rotation [3, 3] of the gripper, before it leans where the arm has to stretch."""

Skill = Generator[Command, None, bool]


class World:
    """What skills read: the simulation's privileged state.

    Attributes:
        scene: the shared scene.
        model: physics model.
        data: simulation state.
        shapes: clouds of its bodies.
        random: source of via points.
        via_noise: standard deviation in metres of via points; 0 for none.
        missed_grasp: which of the objects that are grasped is missed at first, from 0; None for none.
        is_mistaken: whether a grasp that was missed on purpose has not been noticed yet.
        posture: float64 [3, 3], the rotation last commanded, before leaning.
    """

    def __init__(self, sim: Simulation, random: np.random.Generator, via_noise: float) -> None:
        """Look at `sim` from now on."""
        self.scene: Scene = sim.scene
        self.model: mujoco.MjModel = sim.model
        self.data: mujoco.MjData = sim.data
        self.shapes = Shapes(sim.model, sim.data)
        self.random = random
        self.via_noise = via_noise
        self.missed_grasp: int | None = None
        self.is_mistaken = False
        self._grasped: list[str] = []
        self.posture = gripper_rotation(0.0)
        parents = sim.model.body_parentid
        hand = int(sim.model.body_parentid[sim.model.site_bodyid[sim.scene.robot.eef_site_id]])
        self.robot_body_id = int(sim.model.body_rootid[hand])
        self._finger_bodies = [
            int(sim.model.jnt_bodyid[j])
            for address in sim.scene.robot.gripper_qpos_adr
            for j in range(sim.model.njnt)
            if sim.model.jnt_qposadr[j] == address
        ]
        self._finger_of_geom = np.full(sim.model.ngeom, -1)
        for geom in range(sim.model.ngeom):
            body = int(sim.model.geom_bodyid[geom])
            while body > 0:
                if body in self._finger_bodies:
                    self._finger_of_geom[geom] = self._finger_bodies.index(body)
                body = int(parents[body])

    @property
    def eef_pos(self) -> FloatArray:
        """Position of the end-effector site, [3] (copy)."""
        return self.data.site_xpos[self.scene.robot.eef_site_id].copy()

    @property
    def eef_rotation(self) -> FloatArray:
        """World from gripper, [3, 3] (copy)."""
        return self.data.site_xmat[self.scene.robot.eef_site_id].reshape(3, 3).copy()

    def leaning(self, pose: Pose) -> FloatArray:
        """Return the pose's rotation, leaning where the arm has to stretch."""
        return lean_outwards(pose[1], pose[0][:2] - self.data.xpos[self.robot_body_id, :2])

    @property
    def opening(self) -> float:
        """Distance between the finger pads in metres."""
        left, right = self.data.qpos[self.scene.robot.gripper_qpos_adr]
        return float(left - right)

    def position(self, thing: SceneObject) -> FloatArray:
        """Return the position of the object's root body, [3] (copy)."""
        return self.data.xpos[thing.body_id].copy()

    def base(self, thing: SceneObject) -> FloatArray:
        """Return the point of the object's lowest height below its root body, [3]."""
        return np.array([*self.data.xpos[thing.body_id, :2], float(self.shapes.cloud(thing.body_id)[:, 2].min())])

    def outward(self, finger: int) -> FloatArray:
        """Return the direction [3] in which a finger (0 or 1) opens."""
        axis = self.eef_rotation[:, 0]
        return axis if (self.data.xpos[self._finger_bodies[finger]] - self.eef_pos) @ axis > 0 else -axis

    def touching_fingers(self, thing: SceneObject) -> set[int]:
        """Return which fingers (0, 1) touch the object."""
        geoms = self.data.contact.geom[: self.data.ncon]
        touching: set[int] = set()
        for first, second in ((0, 1), (1, 0)):
            fingers = self._finger_of_geom[geoms[:, first]]
            hits = (fingers >= 0) & thing.contact_mask[geoms[:, second]]
            touching.update(int(f) for f in fingers[hits])
        return touching

    def is_held(self, thing: SceneObject) -> bool:
        """Return whether both fingers touch the object."""
        return len(self.touching_fingers(thing)) == 2

    def shall_miss(self, thing: SceneObject) -> bool:
        """Return whether the object, which is to be grasped now, is one to be missed, and is for the first time."""
        if thing.name in self._grasped:
            return False
        self._grasped.append(thing.name)
        return len(self._grasped) - 1 == self.missed_grasp


def reach(
    world: World,
    target: Callable[[], Pose],
    *,
    gripper: float,
    tolerance: float = 0.006,
    turn_tolerance: float | None = None,
    speed: float = 1.0,
    timeout: int = 80,
) -> Skill:
    """Move straight to the pose `target()`, asked anew each step; True once within tolerance.

    Also ends when something holds the gripper back: True if it is near the target.

    Args:
        world: state.
        target: pose, asked anew each step.
        gripper: command of the fingers.
        tolerance: metres.
        turn_tolerance: rad; None for 6 per metre of `tolerance`, at least 0.08.
        speed: fraction of the expert's cruising speed.
        timeout: steps.
    """
    turn_tolerance = max(0.08, 6.0 * tolerance) if turn_tolerance is None else turn_tolerance
    trail: deque[FloatArray] = deque(maxlen=_STALL_STEPS)
    for _ in range(timeout):
        position, world.posture = target()
        rotation = world.leaning((position, world.posture))
        distance = float(np.linalg.norm(position - world.eef_pos))
        misalignment = float(np.arccos(np.clip((np.trace(rotation @ world.eef_rotation.T) - 1) / 2, -1, 1)))
        if distance < tolerance and misalignment < turn_tolerance:
            return True
        is_stalled = len(trail) == _STALL_STEPS and float(np.linalg.norm(trail[0] - world.eef_pos)) < _STALL_DISTANCE
        if is_stalled and misalignment < 0.3:
            return distance < _NEAR
        trail.append(world.eef_pos)
        yield Command(position=position, rotation=rotation, gripper=gripper, speed=speed)
    return False


def travel(
    world: World,
    target: Callable[[], Pose],
    *,
    gripper: float,
    thing: SceneObject | None = None,
    tolerance: float = 0.02,
) -> Skill:
    """Move to a pose above whatever stands in the way.

    Args:
        world: state.
        target: pose, asked anew each step.
        gripper: command of the fingers.
        thing: an object that does not count as an obstacle; if it is held, its extent counts as the gripper's.
        tolerance: metres; below 1 cm it also holds above the pose, before the gripper comes down.
    """
    start, rotation = world.eef_pos, target()[1]
    below, around = TIP_DEPTH, _FINGER_REACH
    ignored = [world.robot_body_id]
    if thing is not None:
        ignored.append(thing.body_id)
        if gripper == CLOSED:
            cloud = world.shapes.cloud(thing.body_id)
            below = max(below, float(start[2] - cloud[:, 2].min()))
            around_it = world.shapes.obstacles(tuple(ignored), cloud[:, :2].mean(axis=0), 0.35)
            escape = world.shapes.way_out(thing.body_id, around_it, _OVERHANG_MARGIN)
            if escape.any():
                aside = start + np.array([*escape, 0.01])
                yield from reach(
                    world, lambda: (aside, rotation), gripper=gripper, tolerance=0.01, speed=0.8, timeout=40
                )
                start = world.eef_pos
            around = max(0.03, float(np.linalg.norm(cloud[:, :2] - start[:2], axis=1).max())) + 0.01
    goal = target()[0]
    safe = _MARGIN + max(
        world.shapes.top_along(start, goal, around, tuple(ignored)) + below,
        world.shapes.top_along(start, goal, HAND_HALF_LENGTH, tuple(ignored)) - PALM_HEIGHT,
    )
    if start[2] < safe - 0.01:
        above = np.array([*(start[:2] + 0.02 * _direction(goal[:2] - start[:2])), safe])
        yield from reach(world, lambda: (above, rotation), gripper=gripper, tolerance=0.03, turn_tolerance=_PARTLY)
    if safe > goal[2] + 0.01:

        def over() -> Pose:
            position, rotation = target()
            return np.array([*position[:2], safe]), rotation

        if tolerance >= _PRECISE:
            yield from reach(world, over, gripper=gripper, tolerance=0.035)
        else:
            yield from reach(world, over, gripper=gripper, tolerance=tolerance, turn_tolerance=0.04)
    elif world.via_noise > 0 and np.linalg.norm(goal - start) > 0.1:
        via = (start + goal) / 2 + world.random.normal(0.0, world.via_noise, 3)
        via[2] = max(via[2], safe)
        yield from reach(world, lambda: (via, rotation), gripper=gripper, tolerance=0.05)
    return (yield from reach(world, target, gripper=gripper, tolerance=max(tolerance, 0.02)))


def grip(world: World) -> Skill:
    """Close the fingers in place until they stop; True always."""
    position, rotation = world.eef_pos, world.eef_rotation
    previous, num_still = world.opening, 0
    for step in range(16):
        yield Command(position=position, rotation=rotation, gripper=CLOSED)
        num_still = num_still + 1 if abs(world.opening - previous) < 0.0005 else 0
        if step >= 5 and num_still >= 2:
            break
        previous = world.opening
    return True


def release(world: World, thing: SceneObject | None = None) -> Skill:
    """Open the fingers in place until they have let go; True always.

    The fingers' command passes from closed to open over 8 steps: those that hold something wide move late. A finger
    that `thing` still leans on, or hangs from by its edge, moves away from it.
    """
    position, rotation = world.eef_pos, world.eef_rotation
    free = world.opening + min(_FREE, 0.8 * (_WIDE_OPEN - world.opening))
    for _ in range(20):
        touching = set[int]() if thing is None else world.touching_fingers(thing)
        if world.opening > free and not touching:
            break
        if world.opening > free:
            position = world.eef_pos + _EVASION * sum((world.outward(finger) for finger in touching), np.zeros(3))
        yield Command(position=position, rotation=rotation, gripper=OPEN)
    return True


def pick(world: World, thing: SceneObject, *, attempt: int = 0, goals: Sequence[FloatArray] = ()) -> Skill:
    """Grasp an object from above and lift it a little; True if it is held afterwards.

    Args:
        world: state.
        thing: the object.
        attempt: how many attempts failed before.
        goals: where the object's base may be put at last, each [3]; it is grasped so that the hand fits at one of them.
    """
    if world.shall_miss(thing) and (yield from miss(world, thing, goals)):
        return True
    for _ in range(3):
        before = _orientation(world, thing)
        carries = [goal - world.base(thing) for goal in goals]
        grasp = choose_grasp(
            world.shapes, thing.body_id, ignored_body_ids=(world.robot_body_id,), attempt=attempt, carries=carries
        )
        pose = _attached(world, thing, grasp)

        def hover(pose: Callable[[], Pose] = pose) -> Pose:
            position, rotation = pose()
            return position + np.array([0.0, 0.0, _HOVER]), rotation

        yield from travel(world, hover, gripper=OPEN, thing=thing)
        # An object that was still tumbling has to be grasped otherwise than it seemed.
        if float(np.sum(before * _orientation(world, thing))) > 2.97:
            break
    else:
        return False
    yield from reach(world, lambda: _funnel(world, *pose()), gripper=OPEN, tolerance=0.006, speed=0.8, timeout=40)
    yield from grip(world)
    lifted = world.eef_pos + np.array([0.0, 0.0, _LIFT])
    yield from reach(world, lambda: (lifted, grasp.rotation), gripper=CLOSED, tolerance=0.03, timeout=25)
    return world.is_held(thing)


def miss(world: World, thing: SceneObject, goals: Sequence[FloatArray] = ()) -> Skill:
    """Grasp beside an object, and notice it at once or on the way to its goal; True if it is held all the same.

    Args:
        world: state.
        thing: the object.
        goals: see `pick`.
    """
    carries = [goal - world.base(thing) for goal in goals]
    grasp = choose_grasp(world.shapes, thing.body_id, ignored_body_ids=(world.robot_body_id,), carries=carries)
    angle, distance = world.random.uniform(0.0, 2.0 * np.pi), world.random.uniform(*_MISS)
    aside = grasp.position + distance * np.array([np.cos(angle), np.sin(angle), 0.0])
    above = aside + np.array([0.0, 0.0, _HOVER])
    yield from travel(world, lambda: (above, grasp.rotation), gripper=OPEN, thing=thing)
    yield from reach(world, lambda: _funnel(world, aside, grasp.rotation), gripper=OPEN, speed=0.8, timeout=40)
    yield from grip(world)
    yield from reach(world, lambda: (above, grasp.rotation), gripper=CLOSED, tolerance=0.03, timeout=25)
    if world.is_held(thing):
        return True
    unnoticed = world.random.uniform(-1.0, 1.0)
    halfway = above + max(0.0, unnoticed) * (carries[0] if carries else np.zeros(3))
    has_slipped = _slip_detector(world, thing)
    world.is_mistaken = True
    for command in _hold_then_carry(world, (halfway, grasp.rotation), has_slipped):
        yield command
        if world.is_held(thing):
            break
    world.is_mistaken = False
    return world.is_held(thing)


def _hold_then_carry(world: World, goal: Pose, has_slipped: Callable[[], bool]) -> Iterator[Command]:
    """Close on what may be in the hand until it is known that there is nothing, then go on as if there were."""
    position, rotation = world.eef_pos, world.eef_rotation
    while not has_slipped():
        yield Command(position=position, rotation=rotation, gripper=CLOSED)
    yield from travel(world, lambda: goal, gripper=CLOSED)


def _funnel(world: World, position: FloatArray, rotation: FloatArray) -> Pose:
    """Return the pose raised by as much as the gripper is beside it: it comes down only where it is meant to."""
    beside = float(np.linalg.norm(position[:2] - world.eef_pos[:2]))
    return position + np.array([0.0, 0.0, min(_HOVER, 3.0 * max(0.0, beside - 0.006))]), rotation


def place(
    world: World,
    thing: SceneObject,
    spot: Callable[[], FloatArray],
    *,
    settled: Callable[[], bool],
    turn_by: float = 0.0,
    is_tight: bool = False,
) -> Skill:
    """Carry the held object to a spot, lower it, let go and back off; False if it slipped on the way.

    Args:
        world: state.
        thing: the held object.
        spot: where the object's bottom shall be, float64 [3]; its root body is aligned with the spot's x and y.
        settled: tells when the object stands there; lowering ends then.
        turn_by: rad by which the object is turned about the vertical on the way.
        is_tight: whether walls are so near that the object has to be right above the spot before it is lowered.
    """
    rotation = about_vertical(turn_by) @ world.posture
    bottom = float((world.position(thing) - world.base(thing))[2])

    def at(height: float) -> Pose:
        goal = spot() + np.array([0.0, 0.0, bottom + height])
        return world.eef_pos + goal - world.position(thing), rotation

    has_slipped = _slip_detector(world, thing)
    for command in travel(world, lambda: at(0.05), gripper=CLOSED, thing=thing, tolerance=0.005 if is_tight else 0.02):
        yield command
        if has_slipped():
            return False
    lowering = reach(world, lambda: at(-0.012), gripper=CLOSED, tolerance=0.004, speed=0.6, timeout=40)
    for command in lowering:
        yield command
        if settled() or has_slipped():
            break
    yield from release(world, thing)
    yield from retreat(world)
    return True


def _slip_detector(world: World, thing: SceneObject) -> Callable[[], bool]:
    """Return a function, to be called once a step, that tells whether the held object is lost.

    A held object loses contact for a step or two when it swings.
    """
    num_free = 0

    def has_slipped() -> bool:
        nonlocal num_free
        num_free = 0 if world.is_held(thing) else num_free + 1
        return num_free >= _MAX_FREE_STEPS

    return has_slipped


def retreat(world: World, height: float = 0.08) -> Skill:
    """Back off upwards with open fingers."""
    goal, rotation = world.eef_pos + np.array([0.0, 0.0, height]), world.posture
    return (yield from reach(world, lambda: (goal, rotation), gripper=OPEN, tolerance=0.02, timeout=25))


def rest(world: World, num_steps: int) -> Iterator[Command]:
    """Hold still with open fingers."""
    position = world.eef_pos
    rotation = world.leaning((position, world.posture))
    for _ in range(num_steps):
        yield Command(position=position, rotation=rotation, gripper=OPEN)


def rise_until_free(world: World, thing: SceneObject, pose: Pose) -> float:
    """Return by how much the hand at a pose, holding the object, has to rise in metres so that it touches nothing."""
    position, rotation = pose
    obstacles = world.shapes.obstacles((world.robot_body_id, thing.body_id), position[:2], 0.3)
    heights = np.arange(0.0, _MAX_RISE, 0.01)
    hits = [intrusion(obstacles, position + np.array([0.0, 0.0, height]), rotation) for height in heights]
    return float(heights[int(np.argmin(hits))])


def _attached(world: World, thing: SceneObject, grasp: Grasp) -> Callable[[], Pose]:
    """Return a function that gives the grasp's pose as the object moves over its support."""
    offset = grasp.position - world.position(thing)

    def pose() -> Pose:
        return world.position(thing) + offset, grasp.rotation

    return pose


def _orientation(world: World, thing: SceneObject) -> FloatArray:
    return world.data.xmat[thing.body_id].reshape(3, 3).copy()


def _direction(vector: FloatArray) -> FloatArray:
    norm = float(np.linalg.norm(vector))
    return vector / norm if norm > 1e-6 else np.zeros_like(vector)
