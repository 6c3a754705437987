"""Scene archives: all that suites need to run, in one file that can be carried to a machine without LIBERO.

`python -m libero_gym export --suite libero_spatial --out libero_spatial.tar.xz` writes one; where the environment
variable `LIBERO_GYM_SCENES` names it, the package runs the suites in it, whether or not `libero` and `robosuite` are
installed. It is unpacked into the cache once, and laid out like the `libero` package, so that the rest of this package
reads both alike:

    archive.json                            format, the versions that it was made with, the instruction of each task,
                                            the suites whose states are there at rest, the size of each other file
    benchmark/libero_suite_task_map.py      the suites in it and their tasks
    bddl_files/<suite>/<task>.bddl
    init_files/<suite>/<task>.pruned_init.npz  stored states, of suites of one's own at rest, too
    scenes/<layout>/scene.xml, scene.json   what LIBERO and robosuite generated; the reader compiles it
    assets/libero/, assets/robosuite/       the meshes and textures that the scenes name

Format 1, of version 0.1.0, has no instructions: those of LIBERO's suites follow from the tasks' names, and it holds no
others.

An archive may come from anywhere. Only plain files below the folder are unpacked, only those listed in `archive.json`,
which comes first, at the sizes listed there, and never more than a fixed multiple of the archive's own size.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt

from libero_gym.tasks.bddl import read_problem
from libero_gym.tasks.cache import cache_dir, file_lock, is_intact, note_files, publish_folder

ARCHIVE_VARIABLE = "LIBERO_GYM_SCENES"
INDEX_FILE = "archive.json"
_FORMAT = 2
_READABLE_FORMATS = (1, 2)
# How many times larger than the archive what is in it may be; of what the suites need it is 3 to 20 times.
_MAX_EXPANSION = 100
# Zeros at a tar file's end.
_TAR_END = 1 << 16
# What says nothing about an archive, only about the disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_ASSET_FILE = re.compile(r'file="@([^/"]+)/([^"]+)"')


@dataclass(frozen=True, kw_only=True, eq=False)
class ArchivedTask:
    """What an archive holds of one task.

    Attributes:
        name: file stem of the task.
        language: the instruction.
        bddl_file: task definition.
        init_states: float64 [num_states, 1 + nq + nv], stored initial states.
        settled: the same at rest, by the names in `libero_gym.tasks.initial_states.RecordedStates`; None where they are
            part of the package, or there are none.
        scene_folder: folder with `scene.xml` and `scene.json`; tasks of equal layout may share one.
    """

    name: str
    language: str
    bddl_file: Path
    init_states: npt.NDArray[np.float64]
    settled: Mapping[str, npt.NDArray[np.float64]] | None
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
    if not is_intact(target):
        with file_lock("archives"):
            if not is_intact(target):  # another process may have unpacked it while this one waited
                publish_folder(target, functools.partial(_extract, path))
    return target


def _extract(path: Path, target: Path) -> None:
    limit = _MAX_EXPANSION * path.stat().st_size
    try:
        with _decompressed(path, limit) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            index = _write_entries(archive, target, limit)
    except (tarfile.TarError, OSError, EOFError, TypeError, ValueError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise ValueError(f"{path} is not a scene archive ({error}); {_remedy()}") from error
    if index.get("format") not in _READABLE_FORMATS:
        readable = " and ".join(map(str, _READABLE_FORMATS))
        raise ValueError(f"{path} has format {index.get('format')}, this version reads {readable}; {_remedy()}")
    if index["format"] > 1 and not _tells_instructions(index):
        raise ValueError(f"{path} is not a scene archive (its {INDEX_FILE} tells no instructions); {_remedy()}")
    note_files(target)


def _tells_instructions(index: Mapping[str, Any]) -> bool:
    instructions = index.get("instructions")
    return (
        isinstance(instructions, dict)
        and all(isinstance(sentences, dict) for sentences in cast(dict[str, Any], instructions).values())
        and isinstance(index.get("settled"), list)
    )


def _write_entries(archive: tarfile.TarFile, folder: Path, limit: int) -> dict[str, Any]:
    """Write what an archive holds, one file after another, and return its index."""
    index: Any = None
    listed: dict[str, Any] | None = None  # archives made before there was a list have none
    for number, entry in enumerate(archive):
        if listed is not None and listed.pop(entry.name, None) != entry.size:
            raise ValueError(f"it holds {entry.name!r} of {entry.size} bytes, which {INDEX_FILE} does not list so")
        _write_entry(archive, entry, folder)
        if entry.name == INDEX_FILE:
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            if not isinstance(index, dict):
                raise ValueError(f"its {INDEX_FILE} holds no object")
            if number == 0 and "files" in index:
                listed = dict(index["files"])
                if not all(isinstance(size, int) and size >= 0 for size in listed.values()):
                    raise ValueError(f"the files in its {INDEX_FILE} are not sizes by name")
                if sum(listed.values()) > limit:
                    raise ValueError(f"it lists {sum(listed.values())} bytes of files; {_too_large(limit)}")
    if index is None:
        raise ValueError(f"it holds no {INDEX_FILE}")
    if listed:
        raise ValueError(f"it lacks {sorted(listed)[:3]}")
    return index


def _write_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> None:
    # Safe on every Python: extraction filters came with 3.11.4. A sparse file is larger than what is stored of it.
    name = PurePosixPath(entry.name)
    content = archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
    if content is None or name.is_absolute() or ".." in name.parts:
        raise ValueError(f"it holds {entry.name!r}, which is not a plain file below it")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with content, (folder / name).open("xb") as file:
        shutil.copyfileobj(content, file)


class _Bounded:
    """The beginning of a stream; reading more of it is an error."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._left = limit

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self._left -= len(block)
        if self._left < 0:
            raise ValueError(_too_large(self._limit))
        return block


@contextlib.contextmanager
def _decompressed(path: Path, limit: int) -> Generator[Any]:
    """Open a tar file, compressed or not, of which no more is read than files of `limit` bytes can take."""
    openers = {b"\xfd7zXZ\x00": lzma.open, b"\x1f\x8b": gzip.open, b"BZh": bz2.open}
    with path.open("rb") as file:
        start = file.read(6)
    opener: Any = next((opener for magic, opener in openers.items() if start.startswith(magic)), open)
    with opener(path, "rb") as stream:
        yield _Bounded(stream, limit + _TAR_END)


def _too_large(limit: int) -> str:
    return f"no more than {limit} bytes are unpacked from it, {_MAX_EXPANSION} times its size"


def _remedy() -> str:
    return "make one with `python -m libero_gym export --suite SUITE --out FILE`, or unset the variable"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:20]


def archived_instruction(root: Path, suite: str, name: str) -> str | None:
    """Return the instruction of a task of the archive at `root`, None where it follows from the name, as LIBERO's do.

    Raises:
        ValueError: the archive does not tell it, and the suite is none of LIBERO's.
    """
    index = _read_index(root)
    sentence = index.get("instructions", {}).get(suite, {}).get(name)
    if sentence is None and (index["format"] > 1 or not suite.startswith("libero_")):
        raise ValueError(
            f"{ARCHIVE_VARIABLE}={os.environ.get(ARCHIVE_VARIABLE)} does not tell the instruction of {name} in "
            f"{suite!r}, which is none of LIBERO's suites: it was written by an older version; {_remedy()}"
        )
    return sentence


def has_archived_settled(root: Path, suite: str) -> bool:
    """Return whether the archive at `root` holds the states of `suite` at rest, too."""
    return suite in _read_index(root).get("settled", [])


@functools.cache
def _read_index(root: Path) -> dict[str, Any]:
    return json.loads((root / INDEX_FILE).read_text(encoding="utf-8"))


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
        path: the file, compressed with xz; its folder is made where there is none.
        suites: the tasks of each suite.
        versions: noted in the archive.
        preset: effort of the compression.
    """
    scenes = {layout_key(task.bddl_file): task.scene_folder for tasks in suites.values() for task in tasks}
    names = {suite: [task.name for task in tasks] for suite, tasks in suites.items()}
    content: dict[str, bytes | Path] = {
        "benchmark/libero_suite_task_map.py": f"libero_task_map = {json.dumps(names, indent=4)}\n".encode()
    }
    for suite, tasks in suites.items():
        for task in tasks:
            content[f"bddl_files/{suite}/{task.name}.bddl"] = task.bddl_file
            states = io.BytesIO()
            arrays: dict[str, Any] = {"states": task.init_states, **(task.settled or {})}
            np.savez_compressed(states, **arrays)
            content[f"init_files/{suite}/{task.name}.pruned_init.npz"] = states.getvalue()
    for key, folder in scenes.items():
        xml = (folder / "scene.xml").read_text(encoding="utf-8")
        roots = json.loads((folder / "scene.json").read_text(encoding="utf-8"))["asset_roots"]
        content[f"scenes/{key}/scene.xml"] = folder / "scene.xml"
        content[f"scenes/{key}/scene.json"] = folder / "scene.json"
        for root, file in _ASSET_FILE.findall(xml):
            content[f"assets/{root}/{file}"] = Path(roots[root]) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:xz", preset=preset) as archive:
            # Files of one kind side by side compress better.
            order = sorted(content, key=lambda name: (Path(name).suffix, name))
            sizes = {name: _size(content[name]) for name in order}
            index = {
                "format": _FORMAT,
                "suites": list(names),
                "versions": dict(versions),
                "instructions": {
                    suite: {task.name: task.language for task in tasks} for suite, tasks in suites.items()
                },
                "settled": [
                    suite for suite, tasks in suites.items() if all(task.settled is not None for task in tasks)
                ],
                "files": sizes,
            }
            for name, item in ((INDEX_FILE, json.dumps(index).encode()), *((name, content[name]) for name in order)):
                data = item.read_bytes() if isinstance(item, Path) else item
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _size(item: bytes | Path) -> int:
    return item.stat().st_size if isinstance(item, Path) else len(item)
