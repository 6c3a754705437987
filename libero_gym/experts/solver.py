"""From a BDDL goal to a sequence of skills: the unmet atoms are achieved one after another, again if need be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from libero_gym.experts.skills import Command, World, pick, place, rest, retreat
from libero_gym.predicates import Goal, in_contact
from libero_gym.scenes import SceneObject

FloatArray = npt.NDArray[np.float64]
Atom = tuple[str, ...]


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
        yield from achieve(world, atom, attempts[atom], tests[atom])
        attempts[atom] += 1


def order(goal: tuple[Atom, ...]) -> list[Atom]:
    """Return the atoms in the order in which to achieve them: closing a drawer comes after filling it."""
    rank = {"open": 0, "turnon": 1, "turnoff": 1, "on": 2, "in": 2, "close": 3}
    unknown = [atom for atom in goal if atom[0] not in rank]
    if unknown:
        raise ValueError(f"goal atom {unknown[0]} has no skill (valid predicates: {sorted(rank)})")
    return sorted(goal, key=lambda atom: rank[atom[0]])


def achieve(world: World, atom: Atom, attempt: int, test: Goal) -> Iterator[Command]:
    """Yield one attempt's commands."""
    if atom[0] in {"on", "in"}:
        yield from _put(world, atom, attempt, test)
    else:
        raise ValueError(f"goal atom {atom} has no skill yet")


def _put(world: World, atom: Atom, attempt: int, test: Goal) -> Iterator[Command]:
    thing = world.scene.objects[atom[1]]
    if not (yield from pick(world, thing, attempt=attempt)):
        yield from retreat(world)
        return
    if atom[2] in world.scene.objects:
        base = world.scene.objects[atom[2]]

        def settled() -> bool:
            return test(world.data) or in_contact(world.data, base.contact_mask, thing.contact_mask)

        if not (yield from place(world, thing, lambda: _top_of(world, base), settled=settled)):
            yield from retreat(world)


def _top_of(world: World, base: SceneObject) -> FloatArray:
    """Return the spot on a plate, bowl or tray: above its root body, on the surface within 2 cm of it."""
    position = world.position(base)
    cloud = world.shapes.cloud(base.body_id)
    near = cloud[np.linalg.norm(cloud[:, :2] - position[:2], axis=1) < 0.02]
    return np.array([*position[:2], float(near[:, 2].max())])
