"""Files and folders are whole or not there, whatever happens to the writer."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gr00t_agent import files
from gr00t_agent.files import clean_up, remove_folder, whole_file, whole_folder, write_json, write_text
from tests.kills import Killed, killed_at

# A file of 40 kB where 20 kB fit.
FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from gr00t_agent.files import whole_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    with whole_folder(Path(sys.argv[1]) / "new") as temporary:
        save_file({"x": torch.zeros(10_000)}, temporary / "x.safetensors")
except OSError as error:
    print(type(error).__name__, error.errno, list(Path(sys.argv[1]).iterdir()))
"""


def content(folder: Path) -> dict[str, str]:
    """The texts of all files below a folder."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write_two(folder: Path, text: str) -> None:
    with whole_folder(folder) as temporary:
        (temporary / "below").mkdir()
        (temporary / "a").write_text(text)
        (temporary / "below" / "b").write_text(text)


def test_what_is_written_appears_when_it_is_complete(tmp_path: Path):
    with whole_file(tmp_path / "deep" / "file") as temporary:
        temporary.write_text("one")
        assert not (tmp_path / "deep" / "file").exists()
    write_two(tmp_path / "folder", "two")
    write_json(tmp_path / "x.json", {"path": tmp_path, "tuple": (1, 2)})
    assert content(tmp_path) == {
        "deep/file": "one",
        "folder/a": "two",
        "folder/below/b": "two",
        "x.json": f'{{\n  "path": "{tmp_path}",\n  "tuple": [\n    1,\n    2\n  ]\n}}\n',
    }


def test_an_error_leaves_what_was_there(tmp_path: Path):
    write_text(tmp_path / "file", "old")
    write_two(tmp_path / "folder", "old")
    before = content(tmp_path)

    def break_off(file: Path, error: type[BaseException]) -> None:
        file.write_text("new")
        raise error

    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as temporary:
        break_off(temporary, ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder") as temporary:
        break_off(temporary / "a", KeyboardInterrupt)
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_whose_successor_cannot_take_its_place_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_two(tmp_path / "folder", "old")
    before = content(tmp_path)
    rename = os.replace

    def fail(source: Any, target: Any) -> None:
        if ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_two(tmp_path / "folder", "new")
    assert content(tmp_path) == before


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "file": lambda folder: write_text(folder / "file", "new"),
    "folder": lambda folder: write_two(folder / "folder", "new"),
    "removal": lambda folder: remove_folder(folder / "folder"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_anywhere_it_is_the_old_or_the_new_after_cleaning_up(tmp_path: Path, name: str):
    def prepare(folder: Path) -> dict[str, str]:
        write_text(folder / "file", "old")
        write_two(folder / "folder", "old")
        return content(folder)

    old = prepare(tmp_path / "counted")
    with killed_at(None) as kill:
        OPERATIONS[name](tmp_path / "counted")
    new, outcomes = content(tmp_path / "counted"), []
    assert new != old
    for number in range(1, kill.count + 1):
        folder = tmp_path / str(number)
        prepare(folder)
        with killed_at(number), pytest.raises(Killed):
            OPERATIONS[name](folder)
        if number % 3 == 0:  # cleaning up may be killed too
            with killed_at(number // 3), suppress(Killed):
                clean_up(folder)
        clean_up(folder)
        outcomes.append(content(folder))
        assert outcomes[-1] in (old, new)
        assert sorted(path.name for path in folder.iterdir()) == sorted({Path(p).parts[0] for p in outcomes[-1]})
    # Once the new is there it stays.
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome == new)
    assert outcomes[0] == old


def test_a_full_disk_is_an_os_error_also_where_safetensors_writes(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout == "OSError 27 []\n"


def test_a_file_that_is_no_tensors_is_not_called_a_full_disk(tmp_path: Path):
    shared = torch.zeros(2)
    with pytest.raises(RuntimeError, match="share memory"), whole_file(tmp_path / "x") as temporary:
        save_file({"a": shared, "b": shared}, temporary)
    with pytest.raises(files.SafetensorError), whole_file(tmp_path / "x"):
        raise files.SafetensorError("header too large")
