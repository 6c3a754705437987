"""From a BDDL goal to a sequence of skills: the unmet atoms are achieved one after another, again if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from libero_gym.experts.articulation import find_joint, is_slide, pull_open, push, push_part, turn
from libero_gym.experts.containers import fitting_turn, floor, free_spot, is_too_tall, lay, spots_between_walls
from libero_gym.experts.grasps import MAX_WIDTH
from libero_gym.experts.insertion import blocking_door, find_opening, insert
from libero_gym.experts.skills import Command, Skill, World, pick, place, rest, retreat
from libero_gym.predicates import Goal, in_contact
from libero_gym.scenes import SceneObject

FloatArray = npt.NDArray[np.float64]
Atom = tuple[str, ...]

_HAND_ROOM = 0.03


def solve(world: World, goal: tuple[Atom, ...]) -> Iterator[Command]:
    """Yield commands for ever: until the goal holds those that bring it about, then those that hold still.

    Raises:
        ValueError: an atom's predicate has no skill.
    """
    atoms = order(goal)
    tests = {atom: Goal(world.scene, (atom,)) for atom in atoms}
    attempts = dict.fromkeys(atoms, 0)
    while True:
        unmet = [atom for atom in atoms if not tests[atom](world.data)]
        if not unmet:
            yield from rest(world, 1)
            continue
        atom = unmet[0]
        yield from achieve(world, atom, attempts[atom], tests[atom], _slot(atoms, atom))
        attempts[atom] += 1


def _slot(atoms: list[Atom], atom: Atom) -> float:
    """Return the middle of the part of its region that belongs to this atom, -1..1."""
    rivals = [other for other in atoms if other[0] == "on" and other[0::2] == atom[0::2]]
    return (2 * rivals.index(atom) + 1) / len(rivals) - 1.0 if atom in rivals else 0.0


def order(goal: tuple[Atom, ...]) -> list[Atom]:
    """Return the atoms in the order in which to achieve them.

    Drawers are shut after they are filled, and what carries something is put in its place first.

    Raises:
        ValueError: an atom's predicate has no skill.
    """
    rank = {"open": 0, "turnon": 1, "turnoff": 1, "on": 2, "in": 2, "close": 3}
    unknown = [atom for atom in goal if atom[0] not in rank]
    if unknown:
        raise ValueError(f"goal atom {unknown[0]} has no skill (valid predicates: {sorted(rank)})")
    support = {atom[1]: atom[2] for atom in goal if rank[atom[0]] == 2}

    def height(name: str) -> int:
        """Return on how many things that are moved themselves an object stands in the end."""
        return 1 + height(support[name]) if name in support else 0

    return sorted(goal, key=lambda atom: (rank[atom[0]], height(atom[1])))


def achieve(world: World, atom: Atom, attempt: int, test: Goal, slot: float = 0.0) -> Iterator[Command]:
    """Yield one attempt's commands.

    Args:
        world: state.
        atom: what shall hold.
        attempt: how many attempts failed before.
        test: whether it holds.
        slot: where on its region an object goes, -1..1: several may share one.
    """
    if atom[0] in {"on", "in"}:
        yield from _put(world, atom, attempt, test, slot)
    elif atom[0] in {"open", "turnon", "turnoff", "close"}:
        yield from _articulate(world, atom, test)
    else:
        raise ValueError(f"goal atom {atom} has no skill yet")


def _put(world: World, atom: Atom, attempt: int, test: Goal, slot: float) -> Iterator[Command]:
    thing = world.scene.objects[atom[1]]
    door = _door(world, atom)
    if door is not None:
        yield from _clear_the_way(world, thing, door)
    if door is not None and not (yield from _articulate(world, door, None)):
        return
    if _is_pushed(world, thing, atom[2]):
        yield from push(
            world, thing, world.data.site_xpos[world.scene.sites[atom[2]].site_id], lambda: test(world.data)
        )
        return
    site = world.scene.sites.get(atom[2])
    container = site if atom[0] == "in" else None
    opening = None if container is None else find_opening(world, container)
    if container is not None and opening is not None:
        while (hinge := blocking_door(world, container, opening)) is not None:
            sign = 1.0 if world.scene.objects[container.parent or ""].joint_tests["open"].above else -1.0
            yield from push_part(world, hinge, sign, lambda: blocking_door(world, container, opening) is None)
        yield from insert(world, thing, opening, attempt=attempt)
        yield from retreat(world)
        return
    spot, settled = _destination(world, thing, atom[2], test, slot)
    goals = [spot()] if container is None else spots_between_walls(world, thing, container)
    if not (yield from pick(world, thing, attempt=attempt, goals=goals)):
        yield from retreat(world)
        return
    if container is not None and is_too_tall(world, thing, container):
        yield from lay(world, thing, container)
        return
    turn_by, is_tight = 0.0, False
    if container is not None:
        turn_by, is_tight = fitting_turn(world, thing, container)
        spot = free_spot(world, thing, container, turn_by)
    if not (yield from place(world, thing, spot, settled=settled, turn_by=turn_by, is_tight=is_tight)):
        yield from retreat(world)


def _door(world: World, atom: Atom) -> Atom | None:
    """Return the atom that the container be open, if it has a drawer or door that is less than half open."""
    site = world.scene.sites.get(atom[2])
    if atom[0] != "in" or site is None or not site.joint_qpos_adr:
        return None
    door = ("open", atom[2])
    threshold = world.scene.objects[site.parent or ""].joint_tests["open"].value
    position = float(world.data.qpos[site.joint_qpos_adr[0]])
    return None if position / threshold > 0.5 else door


def _clear_the_way(world: World, thing: SceneObject, door: Atom) -> Skill:
    """Push the object aside if the drawer, once open, would hang over it or be in the hand's way."""
    site = world.scene.sites[door[1]]
    joint = find_joint(world, site.joint_qpos_adr[0])
    if not is_slide(world, joint):
        return True
    threshold = world.scene.objects[site.parent or ""].joint_tests["open"].value
    path = (threshold - float(world.data.qpos[joint.qpos_adr])) * world.data.xaxis[joint.joint_id]
    shift = world.shapes.way_out(thing.body_id, world.shapes.cloud(joint.body_id) + path, _HAND_ROOM)
    if not shift.any():
        return True
    goal = world.position(thing)[:2] + shift
    return (yield from push(world, thing, goal, lambda: bool(_behind(world.position(thing)[:2], goal, shift))))


def _behind(position: FloatArray, goal: FloatArray, direction: FloatArray) -> bool:
    """Return whether `position` has passed `goal` in `direction`, all [2], to 5 mm."""
    return float((goal - position) @ direction) < 0.005 * float(np.linalg.norm(direction))


def _is_pushed(world: World, thing: SceneObject, name: str) -> bool:
    """Return whether the object is pushed: flat and too wide for the gripper, and its goal is on the table."""
    site = world.scene.sites.get(name)
    extent = np.ptp(world.shapes.cloud(thing.body_id), axis=0)
    return site is not None and site.parent is None and extent[2] < 0.03 and float(extent[:2].min()) > MAX_WIDTH


def _articulate(world: World, atom: Atom, test: Goal | None) -> Skill:
    """Open or shut a drawer or door, or turn a knob: until the test passes, or with some margin if there is none."""
    scene = world.scene
    site = scene.sites.get(atom[1])
    owner = scene.objects[(site.parent if site is not None else None) or atom[1]]
    addresses = owner.joint_qpos_adr if site is None else site.joint_qpos_adr
    joint = find_joint(world, addresses[0])
    threshold = owner.joint_tests[atom[0]]
    sign = 1.0 if threshold.above else -1.0

    def is_done() -> bool:
        if test is not None:
            return test(world.data)
        return threshold(float(world.data.qpos[joint.qpos_adr]) - 0.07 * threshold.value)

    if atom[0] == "open" and is_slide(world, joint):
        return (yield from pull_open(world, joint, sign, is_done))
    if atom[0] in {"turnon", "turnoff"}:
        return (yield from turn(world, joint, sign, is_done))
    if atom[0] == "close":
        return (yield from push_part(world, joint, sign, is_done))
    raise ValueError(f"goal atom {atom} has no skill for a joint of this kind")


def _destination(
    world: World, thing: SceneObject, name: str, test: Goal, slot: float
) -> tuple[Callable[[], FloatArray], Callable[[], bool]]:
    """Return where to put the object and how to tell that it is there."""
    scene = world.scene
    if name in scene.objects:
        base = scene.objects[name]
        return (
            lambda: _on(world, world.position(base), base),
            lambda: test(world.data) or in_contact(world.data, base.contact_mask, thing.contact_mask),
        )
    site = scene.sites[name]
    parent = None if site.parent is None else scene.objects[site.parent]
    if test.atoms[0][0] == "on":
        # Side by side along x: the fingers open along y.
        shift = np.array([1.5 * slot * float(site.size[0]), 0.0, 0.0])
        return lambda: _on(world, world.data.site_xpos[site.site_id] + shift, parent), lambda: test(world.data)
    return lambda: floor(world, site), lambda: test(world.data)


def _on(world: World, position: FloatArray, base: SceneObject | None) -> FloatArray:
    """Return the spot on a surface: at the position, as high as the base (a table if None) within 2 cm of it."""
    if base is None:
        return position.copy()
    cloud = world.shapes.cloud(base.body_id)
    near = cloud[np.linalg.norm(cloud[:, :2] - position[:2], axis=1) < 0.02]
    return np.array([*position[:2], float(near[:, 2].max())])
