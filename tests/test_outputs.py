"""Results that cannot be written where they are asked for are refused before they are made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from libero_gym.outputs import check_output_file, check_output_folder

ROOT = Path(__file__).resolve().parents[1]
SPATIAL = ("checkpoints/libero_spatial_fewshot", "checkpoints/libero_spatial_rl")
# Up to the argument that says where to write.
FOLDERS = [
    "algorithms/ppo_gr00t.py --preset demo --output-dir",
    "algorithms/grpo_gr00t.py --preset demo --output-dir",
    "algorithms/dsrl_gr00t.py --preset demo --output-dir",
    "algorithms/async_ppo_gr00t.py --preset demo --output-dir",
    "algorithms/sft_gr00t.py --preset nano --dataset a/b --output-dir",
    "algorithms/eval_gr00t.py --policy examples/policy_to_evaluate.py:make --suite libero_goal --output-dir",
    f"algorithms/compare_gr00t.py --checkpoints {' '.join(SPATIAL)} --output-dir",
    "algorithms/collect_demos.py --output",
    "-m libero_gym.play --video",
]
FILES = ["algorithms/report.py --run a b --output", "-m libero_gym export --suite libero_spatial --out"]


def refused(command: str, place: str) -> str:
    """What a program says that ends by a mistake in its command line."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", *command.split(), place],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.search(r"\| +gymnasium$", ended.stderr, re.MULTILINE)  # so it would be seen of PyTorch, too
    assert not re.search(r"\| +torch$", ended.stderr, re.MULTILINE)
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", FOLDERS)
def test_programs_refuse_a_file_in_place_of_their_folder(command: str):
    name = command.split()[-1].removeprefix("--").replace("-", "_")
    assert refused(command, "README.md").endswith(
        f"error: {name}='README.md' cannot be a folder: it is a file; give another place"
    )


@pytest.mark.parametrize("command", FILES)
def test_programs_refuse_a_folder_in_place_of_their_file(command: str):
    assert refused(command, "docs").endswith("='docs' is a folder; give the path of a file")
    assert refused(command, "README.md/page").endswith("cannot be a folder: it is a file; give another place")


def test_where_nothing_can_be_made_is_told():
    message = refused(FOLDERS[0], "/proc/x")
    assert message.endswith(
        "output_dir='/proc/x' cannot be written: no folder can be made in /proc (No such file or directory); give a "
        "place that can be written to"
    )


def test_what_can_be_written_is_taken_and_left_as_it_is(tmp_path: Path):
    check_output_folder("output_dir", tmp_path)
    check_output_folder("output_dir", tmp_path / "a" / "b")
    check_output_file("output", tmp_path / "a" / "page.html")
    (tmp_path / "page.html").touch()
    check_output_file("output", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_what_lies_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        NotADirectoryError, match=r"output_dir='.*/file/b/c' cannot be a folder: .*/file is a file; give"
    ):
        check_output_folder("output_dir", tmp_path / "file" / "b" / "c")
    with pytest.raises(
        NotADirectoryError, match=r"output_dir='.*/link' cannot be a folder: it is a file; give another"
    ):
        check_output_folder("output_dir", tmp_path / "link")
