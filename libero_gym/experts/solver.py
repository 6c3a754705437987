"""From a BDDL goal to a sequence of skills: the unmet atoms are achieved one after another, again if need be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from libero_gym.experts.articulation import find_joint, is_slide, pull_open, push, push_part, swing_open, turn
from libero_gym.experts.containers import fitting_turn, free_spot, is_too_tall, lay, spots_between_walls
from libero_gym.experts.grasps import HAND_HALF_LENGTH, MAX_WIDTH
from libero_gym.experts.insertion import blocking_door, find_opening, insert
from libero_gym.experts.skills import Command, Skill, World, pick, place, rest, retreat
from libero_gym.physics.predicates import Goal, in_contact
from libero_gym.tasks.scenes import SceneObject, SceneSite

FloatArray = npt.NDArray[np.float64]
Atom = tuple[str, ...]

# Metres and rad, chosen by trial over the stored initial states.
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

    What shall be filled is opened for that, and shut afterwards; what is only to be shut is shut at once, before it is
    in the way. What carries something is put in its place first.

    Raises:
        ValueError: an atom's predicate has no skill.
    """
    ranks = {"open": 1.0, "turnon": 2.0, "turnoff": 2.0, "on": 3.0, "in": 3.0, "close": 0.0}
    unknown = [atom for atom in goal if atom[0] not in ranks]
    if unknown:
        raise ValueError(f"goal atom {unknown[0]} has no skill (valid predicates: {sorted(ranks)})")
    support = {atom[1]: atom[2] for atom in goal if len(atom) == 3}
    filled = [atom[2] for atom in goal if atom[0] == "in"]

    def rank(atom: Atom) -> float:
        is_filled = atom[0] in {"open", "close"} and any(region.startswith(atom[1]) for region in filled)
        return 4.0 if is_filled else ranks[atom[0]]

    def height(name: str) -> int:
        """Return on how many things that are moved themselves an object stands in the end."""
        return 1 + height(support[name]) if name in support else 0

    return sorted(goal, key=lambda atom: (rank(atom), height(atom[1])))


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
    else:
        yield from _articulate(world, atom, test)


def _put(world: World, atom: Atom, attempt: int, test: Goal, slot: float) -> Iterator[Command]:
    thing, site = world.scene.objects[atom[1]], world.scene.sites.get(atom[2])
    if atom[0] == "in" and site is not None:
        yield from _put_in(world, thing, site, attempt, test)
    elif site is not None and _is_pushed(world, thing, site):
        yield from push(world, thing, world.data.site_xpos[site.site_id], lambda: test(world.data))
    else:
        spot, settled = _surface(world, thing, atom[2], test, slot)
        is_held = yield from pick(world, thing, attempt=attempt, goals=[spot()])
        if not is_held or not (yield from place(world, thing, spot, settled=settled)):
            yield from retreat(world)


def _put_in(world: World, thing: SceneObject, site: SceneSite, attempt: int, test: Goal) -> Skill:
    """Open the container as far as needed, then put the object into it, from above or from the front."""
    if _is_shut(world, site) or attempt > 0:
        yield from _clear_the_way(world, thing, site, _HAND_ROOM if attempt == 0 else HAND_HALF_LENGTH)
    if _is_shut(world, site) and not (yield from _articulate(world, ("open", site.name), None)):
        return False
    opening = find_opening(world, site)
    if opening is not None:
        while (hinge := blocking_door(world, site, opening)) is not None:
            sign = 1.0 if world.scene.objects[site.parent or ""].joint_tests["open"].above else -1.0
            yield from push_part(world, hinge, sign, lambda: blocking_door(world, site, opening) is None)
        yield from insert(world, thing, opening, attempt=attempt)
        return (yield from retreat(world))
    if not (yield from pick(world, thing, attempt=attempt, goals=spots_between_walls(world, thing, site))):
        return (yield from retreat(world))
    if is_too_tall(world, thing, site):
        return (yield from lay(world, thing, site))
    turn_by, is_tight = fitting_turn(world, thing, site)
    spot = free_spot(world, thing, site, turn_by)
    settled = functools.partial(test, world.data)
    if not (yield from place(world, thing, spot, settled=settled, turn_by=turn_by, is_tight=is_tight)):
        yield from retreat(world)
    return True


def _is_shut(world: World, site: SceneSite) -> bool:
    """Return whether the container has a drawer or door that is less than half open."""
    if not site.joint_qpos_adr:
        return False
    threshold = world.scene.objects[site.parent or ""].joint_tests["open"].value
    return float(world.data.qpos[site.joint_qpos_adr[0]]) / threshold <= 0.5


def _clear_the_way(world: World, thing: SceneObject, site: SceneSite, margin: float) -> Skill:
    """Push the object aside if the container's drawer, once open, is within `margin` metres of being above it."""
    if not site.joint_qpos_adr:
        return True
    joint = find_joint(world, site.joint_qpos_adr[0])
    if not is_slide(world, joint):
        return True
    threshold = world.scene.objects[site.parent or ""].joint_tests["open"].value
    rest = threshold - float(world.data.qpos[joint.qpos_adr])
    path = rest * world.data.xaxis[joint.joint_id] if rest * threshold > 0 else np.zeros(3)
    shift = world.shapes.way_out(thing.body_id, world.shapes.cloud(joint.body_id) + path, margin)
    if not shift.any():
        return True
    goal = world.position(thing)[:2] + shift
    return (yield from push(world, thing, goal, lambda: bool(_behind(world.position(thing)[:2], goal, shift))))


def _behind(position: FloatArray, goal: FloatArray, direction: FloatArray) -> bool:
    """Return whether `position` has passed `goal` in `direction`, all [2], to 5 mm."""
    return float((goal - position) @ direction) < 0.005 * float(np.linalg.norm(direction))


def _is_pushed(world: World, thing: SceneObject, site: SceneSite) -> bool:
    """Return whether the object is pushed: flat and too wide for the gripper, and its goal is on the table."""
    extent = np.ptp(world.shapes.cloud(thing.body_id), axis=0)
    return site.parent is None and extent[2] < 0.03 and float(extent[:2].min()) > MAX_WIDTH


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

    if atom[0] == "open":
        open_it = pull_open if is_slide(world, joint) else swing_open
        return (yield from open_it(world, joint, sign, is_done))
    if atom[0] in {"turnon", "turnoff"}:
        return (yield from turn(world, joint, sign, is_done))
    return (yield from push_part(world, joint, sign, is_done))


def _surface(
    world: World, thing: SceneObject, name: str, test: Goal, slot: float
) -> tuple[Callable[[], FloatArray], Callable[[], bool]]:
    """Return where to put the object on another or on a region, and how to tell that it is there."""
    scene = world.scene
    if name in scene.objects:
        base = scene.objects[name]
        return (
            lambda: _on(world, world.position(base), base),
            lambda: test(world.data) or in_contact(world.data, base.contact_mask, thing.contact_mask),
        )
    site = scene.sites[name]
    parent = None if site.parent is None else scene.objects[site.parent]
    # Side by side along x: the fingers open along y.
    shift = np.array([1.5 * slot * float(site.size[0]), 0.0, 0.0])
    return lambda: _on(world, world.data.site_xpos[site.site_id] + shift, parent), lambda: test(world.data)


def _on(world: World, position: FloatArray, base: SceneObject | None) -> FloatArray:
    """Return the spot on a surface: at the position, as high as the base (a table if None) within 2 cm of it."""
    if base is None:
        return position.copy()
    cloud = world.shapes.cloud(base.body_id)
    near = cloud[np.linalg.norm(cloud[:, :2] - position[:2], axis=1) < 0.02]
    return np.array([*position[:2], float(near[:, 2].max())])
