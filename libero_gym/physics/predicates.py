"""Success: LIBERO's goal predicates, evaluated on MuJoCo's data.

A goal is a conjunction of atoms such as `(on akita_black_bowl_1 plate_1)`. Poses and contacts are those that the
last physics substep computed, one substep behind `qpos`, as in LIBERO.
"""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.tasks.scenes import JointTest, Scene, SceneObject, SceneSite

Atom = Callable[[mujoco.MjData], bool]

# LIBERO's tolerances, m.
ON_OBJECT_RADIUS = 0.03
ON_SITE_SLACK = 0.005
ON_SITE_HEIGHT = 0.10
IN_SITE_SLACK = 0.01


class Goal:
    """The conjunction of a task's goal atoms, compiled against one scene."""

    def __init__(self, scene: Scene, atoms: tuple[tuple[str, ...], ...]) -> None:
        """Compile `atoms` (lower case, as in the BDDL file).

        Raises:
            ValueError: an unknown predicate, or a name that is not in the scene.
        """
        self.atoms = atoms
        self._tests = [_compile_atom(scene, atom) for atom in atoms]

    def atom_values(self, data: mujoco.MjData) -> dict[str, bool]:
        """Return which atoms hold in `data`, by their text, such as "on akita_black_bowl_1 plate_1"."""
        return {" ".join(atom): bool(test(data)) for atom, test in zip(self.atoms, self._tests, strict=True)}

    def __call__(self, data: mujoco.MjData) -> bool:
        """Return whether all atoms hold in `data`."""
        return all(test(data) for test in self._tests)


def _compile_atom(scene: Scene, atom: tuple[str, ...]) -> Atom:
    predicate, *names = atom
    if predicate == "on" and len(names) == 2:
        return _compile_on(scene, _object(scene, names[0], atom), names[1], atom)
    if predicate == "in" and len(names) == 2 and names[1] in scene.sites:
        return _compile_in(_object(scene, names[0], atom), scene.sites[names[1]])
    if predicate in {"open", "close", "turnon", "turnoff"} and len(names) == 1:
        return _compile_joints(scene, predicate, names[0], atom)
    raise ValueError(
        f"goal atom {atom} is not supported (valid: on object object-or-region, in object region, "
        "open/close object-or-region, turnon/turnoff object)"
    )


def _object(scene: Scene, name: str, atom: tuple[str, ...]) -> SceneObject:
    if name not in scene.objects:
        raise ValueError(f"{name!r} in goal atom {atom} is not in the scene (valid: {sorted(scene.objects)})")
    return scene.objects[name]


def _compile_on(scene: Scene, thing: SceneObject, support: str, atom: tuple[str, ...]) -> Atom:
    if support in scene.sites:
        return _compile_on_site(scene, thing, scene.sites[support])
    base = _object(scene, support, atom)

    def is_on_object(data: mujoco.MjData) -> bool:
        thing_pos, base_pos = data.xpos[thing.body_id], data.xpos[base.body_id]
        return (
            bool(base_pos[2] <= thing_pos[2])
            and bool(np.linalg.norm(base_pos[:2] - thing_pos[:2]) < ON_OBJECT_RADIUS)
            and in_contact(data, base.contact_mask, thing.contact_mask)
        )

    return is_on_object


def _compile_on_site(scene: Scene, thing: SceneObject, site: SceneSite) -> Atom:
    parent = None if site.parent is None else scene.objects[site.parent]

    def is_on_site(data: mujoco.MjData) -> bool:
        # LIBERO rotates by the site's matrix where its transpose would give site coordinates.
        offset = data.site_xmat[site.site_id].reshape(3, 3) @ (data.xpos[thing.body_id] - data.site_xpos[site.site_id])
        return (
            bool(site.size[2] - ON_SITE_SLACK < offset[2] < site.size[2] + ON_SITE_HEIGHT)
            and bool(np.all(np.abs(offset[:2]) < site.size[:2]))
            and (parent is None or in_contact(data, parent.contact_mask, thing.contact_mask))
        )

    return is_on_site


def _compile_in(thing: SceneObject, site: SceneSite) -> Atom:
    slack = np.array([0.0, 0.0, IN_SITE_SLACK])

    def is_in_site(data: mujoco.MjData) -> bool:
        centre, position = data.site_xpos[site.site_id], data.xpos[thing.body_id]
        extent = np.abs(data.site_xmat[site.site_id].reshape(3, 3) @ site.size)
        return bool(np.all(position > centre - extent - slack)) and bool(np.all(position < centre + extent))

    return is_in_site


def _compile_joints(scene: Scene, predicate: str, name: str, atom: tuple[str, ...]) -> Atom:
    if name in scene.sites:
        site = scene.sites[name]
        owner = scene.objects.get(site.parent or "")
        addresses = site.joint_qpos_adr
    else:
        owner = _object(scene, name, atom)
        addresses = owner.joint_qpos_adr
    if owner is None or predicate not in owner.joint_tests:
        raise ValueError(f"goal atom {atom}: {name!r} cannot be asked for {predicate!r}")
    test: JointTest = owner.joint_tests[predicate]
    combine = any if predicate in {"open", "turnon"} else all

    def passes(data: mujoco.MjData) -> bool:
        return combine(test(float(data.qpos[address])) for address in addresses)

    return passes


def in_contact(data: mujoco.MjData, mask_a: npt.NDArray[np.bool_], mask_b: npt.NDArray[np.bool_]) -> bool:
    """Return whether a geom of `mask_a` touches one of `mask_b` (bool [ngeom] each)."""
    geoms = data.contact.geom[: data.ncon]
    first, second = geoms[:, 0], geoms[:, 1]
    return bool(np.any((mask_a[first] & mask_b[second]) | (mask_b[first] & mask_a[second])))
