"""Scene archives: all that suites need to run, in one file that can be carried to a machine without LIBERO.

`python -m libero_gym export --suite libero_spatial --out libero_spatial.tar.xz` writes one; where the environment
variable `LIBERO_GYM_SCENES` names it, the package runs the suites in it, whether or not `libero` and `robosuite` are
installed. It is unpacked into the cache once, and laid out like the `libero` package, so that the rest of this package
reads both alike:

    archive.json                            format and the versions that it was made with
    benchmark/libero_suite_task_map.py      the suites in it and their tasks
    bddl_files/<suite>/<task>.bddl
    init_files/<suite>/<task>.pruned_init.npz
    scenes/<layout>/scene.xml, scene.json   what LIBERO and robosuite generated; the reader compiles it
    assets/libero/, assets/robosuite/       the meshes and textures that the scenes name
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt

from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.cache import cache_dir, file_lock, publish_folder

ARCHIVE_VARIABLE = "LIBERO_GYM_SCENES"
INDEX_FILE = "archive.json"
_FORMAT = 1
_ASSET_FILE = re.compile(r'file="@([^/"]+)/([^"]+)"')


@dataclass(frozen=True, kw_only=True, eq=False)
class ArchivedTask:
    """What an archive holds of one task.

    Attributes:
        name: file stem of the task.
        bddl_file: task definition.
        init_states: float64 [num_states, 1 + nq + nv], stored initial states.
        scene_folder: folder with `scene.xml` and `scene.json`; tasks of equal layout may share one.
    """

    name: str
    bddl_file: Path
    init_states: npt.NDArray[np.float64]
    scene_folder: Path


def archive_root() -> Path | None:
    """Return the folder of the unpacked archive that `LIBERO_GYM_SCENES` names, or None if the variable is not set.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a scene archive of this format.
    """
    configured = os.environ.get(ARCHIVE_VARIABLE)
    return _unpack(Path(configured).expanduser().resolve()) if configured else None


@functools.cache
def _unpack(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{ARCHIVE_VARIABLE}={path} does not exist; {_remedy()}")
    target = cache_dir() / "archives" / _digest(path)
    with file_lock("archives"):
        if not (target / INDEX_FILE).is_file():
            publish_folder(target, functools.partial(_extract, path))
    return target


def _extract(path: Path, target: Path) -> None:
    try:
        with tarfile.open(path, "r:*") as archive:
            for entry in archive:
                _write_entry(archive, entry, target)
        index = json.loads((target / INDEX_FILE).read_text(encoding="utf-8"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a scene archive ({error}); {_remedy()}") from error
    if index.get("format") != _FORMAT:
        raise ValueError(f"{path} has format {index.get('format')}, this version reads {_FORMAT}; {_remedy()}")


def _write_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> None:
    # Safe on every Python: extraction filters came with 3.11.4.
    name = PurePosixPath(entry.name)
    content = archive.extractfile(entry) if entry.isreg() else None
    if content is None or name.is_absolute() or ".." in name.parts:
        raise ValueError(f"it holds {entry.name!r}, which is not a plain file below it")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with content, (folder / name).open("wb") as file:
        shutil.copyfileobj(content, file)


def _remedy() -> str:
    return "make one with `python -m libero_gym export --suite SUITE --out FILE`, or unset the variable"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:20]


def layout_key(bddl_file: Path) -> str:
    """Return the name of a task's scene in an archive: tasks of equal layout share one."""
    return hashlib.sha256(json.dumps(read_problem(bddl_file).layout()).encode()).hexdigest()[:20]


def read_archived_scene(root: Path, bddl_file: Path, folder: Path) -> None:
    """Write a task's `scene.xml` and `scene.json` into `folder`, as building it from LIBERO would.

    Raises:
        FileNotFoundError: the archive does not hold the scene.
    """
    source = root / "scenes" / layout_key(bddl_file)
    if not source.is_dir():
        raise FileNotFoundError(f"the scene archive in {root} does not hold the scene of {bddl_file.name}; {_remedy()}")
    description = json.loads((source / "scene.json").read_text(encoding="utf-8"))
    description["asset_roots"] = {name: str(root / "assets" / name) for name in description["asset_roots"]}
    (folder / "scene.json").write_text(json.dumps(description), encoding="utf-8")
    (folder / "scene.xml").write_bytes((source / "scene.xml").read_bytes())


def write_archive(
    path: Path,
    suites: Mapping[str, Sequence[ArchivedTask]],
    versions: Mapping[str, str],
    *,
    preset: Literal[0, 6, 9] = 6,
) -> None:
    """Write an archive, whole or not at all; equal inputs give equal bytes.

    Args:
        path: the file, compressed with xz.
        suites: the tasks of each suite.
        versions: noted in the archive.
        preset: effort of the compression.
    """
    scenes = {layout_key(task.bddl_file): task.scene_folder for tasks in suites.values() for task in tasks}
    names = {suite: [task.name for task in tasks] for suite, tasks in suites.items()}
    content: dict[str, bytes | Path] = {
        INDEX_FILE: json.dumps({"format": _FORMAT, "suites": list(names), "versions": dict(versions)}).encode(),
        "benchmark/libero_suite_task_map.py": f"libero_task_map = {json.dumps(names, indent=4)}\n".encode(),
    }
    for suite, tasks in suites.items():
        for task in tasks:
            content[f"bddl_files/{suite}/{task.name}.bddl"] = task.bddl_file
            states = io.BytesIO()
            np.savez_compressed(states, states=task.init_states)
            content[f"init_files/{suite}/{task.name}.pruned_init.npz"] = states.getvalue()
    for key, folder in scenes.items():
        xml = (folder / "scene.xml").read_text(encoding="utf-8")
        roots = json.loads((folder / "scene.json").read_text(encoding="utf-8"))["asset_roots"]
        content[f"scenes/{key}/scene.xml"] = folder / "scene.xml"
        content[f"scenes/{key}/scene.json"] = folder / "scene.json"
        for root, file in _ASSET_FILE.findall(xml):
            content[f"assets/{root}/{file}"] = Path(roots[root]) / file
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:xz", preset=preset) as archive:
            # Files of one kind side by side compress better.
            for name in sorted(content, key=lambda name: (Path(name).suffix, name)):
                item = content[name]
                data = item.read_bytes() if isinstance(item, Path) else item
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
