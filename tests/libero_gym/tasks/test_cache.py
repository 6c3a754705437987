"""Caches of compiled code: what is damaged in them is found before it is used and made anew; folders that fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from libero_gym.physics import stepping
from libero_gym.tasks import scene_builder
from libero_gym.tasks.cache import cache_dir, checked_folder, drop_damaged, file_lock, is_intact, note_files
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """Change one bit, and leave size and time as they are."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two folders of two noted files each."""
    for name in ("a/one", "a/two", "b/one", "b/two"):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"what {name} holds")
    note_files(tmp_path / "cache")
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


ALL = ["a/one", "a/two", "b/one", "b/two", "manifest.json"]


@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
def test_files_of_a_folder_with_a_damaged_one_are_dropped(folder: Path, damage):
    damage(folder / "a" / "two")
    assert not is_intact(folder)
    drop_damaged(folder, keeps_unknown=True)
    assert files(folder) == ["b/one", "b/two", "manifest.json"]
    assert (folder / "a").is_dir()  # somebody may be about to write into it
    assert is_intact(folder)


def test_what_is_whole_stays(folder: Path):
    drop_damaged(folder, keeps_unknown=False)
    assert files(folder) == ALL
    assert is_intact(folder)


def test_what_was_never_noted_stays_where_compilers_write_at_any_time(folder: Path):
    (folder / "b" / "more").write_text("new")
    drop_damaged(folder, keeps_unknown=True)
    assert "b/more" in files(folder)
    drop_damaged(folder, keeps_unknown=False)
    assert files(folder) == ["a/one", "a/two", "manifest.json"]


@pytest.mark.parametrize("content", ["", "[", "[]", "3", '{"a/one": 1}', '{"a/one": [1, 2]}', '{"a/one": ["x", 1, 2]}'])
def test_a_damaged_manifest_knows_nothing(folder: Path, content: str):
    (folder / "manifest.json").write_text(content)
    assert not is_intact(folder)
    drop_damaged(folder, keeps_unknown=True)
    assert files(folder) == ALL
    note_files(folder)
    assert is_intact(folder)
    (folder / "manifest.json").write_text(content)
    drop_damaged(folder, keeps_unknown=False)
    assert files(folder) == ["manifest.json"]


def test_what_has_changed_is_noted_anew_and_the_rest_is_not_read_again(folder: Path, monkeypatch):
    (folder / "a" / "one").write_text("longer than before")
    read = []
    digest = "libero_gym.tasks.cache.digest_file"
    monkeypatch.setattr(digest, lambda path: read.append(path) or "digest")
    note_files(folder)
    assert read == [folder / "a" / "one"]
    assert json.loads((folder / "manifest.json").read_text())["a/one"][2] == "digest"


def test_a_compiler_that_fails_leaves_nothing_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))

    def compile_half(fails: bool) -> list[str]:
        with checked_folder("code/here") as folder:
            found = files(folder)
            (folder / "part").mkdir(exist_ok=True)
            (folder / "part" / "half").write_text("half")
            if fails:
                raise KeyboardInterrupt
            (folder / "part" / "rest").write_text("rest")
        return found

    with pytest.raises(KeyboardInterrupt):
        compile_half(fails=True)
    assert compile_half(fails=False) == []
    assert compile_half(fails=False) == ["manifest.json", "part/half", "part/rest"]


def test_cache_folders_that_cannot_be_used_name_the_remedy(tmp_path, monkeypatch):
    remedy = "set LIBERO_GYM_CACHE to a writable folder"
    (tmp_path / "file").write_text("no folder")
    for path in ("file", "file/below"):
        monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path / path))
        with pytest.raises(OSError, match=rf"cannot create the cache folder .*{path} \(.*\); {remedy}"):
            cache_dir()
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    (tmp_path / "locks").write_text("no folder")
    with pytest.raises(OSError, match=rf"cannot write .*scenes\.lock \(.*\); {remedy}"), file_lock("scenes"):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(OSError, match=rf"cannot write to the cache folder {tmp_path}; {remedy}"):
            cache_dir()
    for name in ("LIBERO_GYM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match=rf"there is none \(no home\); {remedy}"):
        cache_dir()


def test_a_damaged_configuration_of_libero_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    target = scene_builder._write_libero_config() / "config.yaml"
    whole = target.read_text()
    cut(target)
    assert scene_builder._write_libero_config() / "config.yaml" == target
    assert target.read_text() == whole


STEP = """
import sys
import numpy as np
from libero_gym.env import LiberoEnv
env = LiberoEnv("libero_spatial", task_id=0, image_size=16, observe_images={images}, renderer="warp")
env.reset(seed=0)
observation, *_ = env.step(np.full(7, 0.5, np.float32))
print(*(value.tobytes().hex() for name, value in sorted(observation.items()) if name != "task_descriptions"))
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds scenes, but no compiled physics."""
    built = load_scene(get_task("libero_spatial", 0)).folder
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / built.name).symlink_to(built)
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def warm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A copy of the cache that all tests share with what a step with images needs, and what it prints."""
    printed = result(start(images=True))
    for name in (stepping._CACHE_NAME, "warp"):
        shutil.copytree(cache_dir() / name, tmp_path / name)
    built = load_scene(get_task("libero_spatial", 0)).folder
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / built.name).symlink_to(built)
    monkeypatch.setenv("LIBERO_GYM_CACHE", str(tmp_path))
    return tmp_path, printed


def start(images: bool = False) -> subprocess.Popen[str]:
    code = STEP.format(images=images)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> str:
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    return printed


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_damaged_native_code_is_compiled_anew(warm_cache: tuple[Path, str]):
    own_cache, expected = warm_cache
    before = {path: time for name in ("native", "warp") for path, time in written(own_cache / name).items()}
    native = list(own_cache.glob("native/*/*/stepping._run_substeps-*.nbc"))
    kernels = list(own_cache.glob("warp/*/wp_place_*/*.o"))  # of other versions of the code too
    for path in (*native, *kernels):  # those of this version would be loaded as they are
        flip(path)
    assert result(start(images=True)) == expected
    # What another version compiled is dropped, and not made again.
    repaired = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    for damaged in (native, kernels):
        assert any(path in repaired and repaired[path] != before[path] for path in damaged)
    assert result(start(images=True)) == expected
    assert {path: path.stat().st_mtime_ns for path in repaired} == repaired  # nothing is compiled without need


@pytest.mark.slow
def test_a_process_killed_while_compiling_leaves_a_usable_cache_to_others_that_wait(own_cache: Path):
    killed = start()
    others: list[subprocess.Popen[str]] = []
    deadline = time.monotonic() + 120
    while (num_compiled := len(list(own_cache.glob("native/*/*/*.nbc")))) < 6:
        if num_compiled and not others:
            others = [start(), start()]
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    first, second = (result(process) for process in others)
    assert first == second
    before = written(own_cache / "native")
    assert result(start()) == first
    assert written(own_cache / "native") == before
