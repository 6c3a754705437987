"""Provenance: versions as the code that runs says them, the commit, and hardware without PyTorch as with it."""

import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms.common import provenance

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Versions and the commit are read once a process."""
    read_once = (provenance._version, provenance.git_commit)  # pyright: ignore[reportPrivateUsage]
    for read in read_once:
        read.cache_clear()
    yield
    for read in read_once:
        read.cache_clear()


def test_the_commit_is_asked_for_once_a_process(monkeypatch: pytest.MonkeyPatch):
    first = provenance.git_commit()
    monkeypatch.setattr(provenance.subprocess, "run", lambda *inputs, **options: pytest.fail("asked again"))
    assert provenance.git_commit() == first


@pytest.mark.parametrize("told", ["0123abc", ""])
def test_a_copy_without_git_is_told_its_commit(told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBERO_GR00T_COMMIT", told)
    monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
    assert provenance.git_commit() == (told or None)


def test_a_checkout_knows_its_commit_better(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LIBERO_GR00T_COMMIT", "0123abc")
    answer = subprocess.CompletedProcess[str]([], 0, stdout="4567def\n")
    monkeypatch.setattr(provenance.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(provenance.subprocess, "run", lambda *inputs, **options: answer)
    assert provenance.git_commit() == "4567def"


@pytest.mark.parametrize("installed_as", ["2.14.1", "2.14.1+cu130"])
def test_pytorch_s_version_names_the_build_whatever_the_distribution_is_called(
    installed_as: str, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed_as if name == "torch" else found(name))
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    versions = provenance.package_versions()
    assert versions["torch"] == "2.14.1+cu130"
    assert versions["numpy"] == found("numpy")


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    assert provenance.package_versions()["no-such-package"] is None


def test_the_description_is_json_and_names_the_checkout():
    described = provenance.describe_environment()
    assert json.loads(json.dumps(described)) == described
    assert described.keys() == {"commit", "python", "versions", "hardware"}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert described["commit"].removesuffix("-dirty") == head.stdout.strip()
    hardware = described["hardware"]
    assert hardware["cpu"]
    assert hardware["cores"] >= 1
    assert hardware["memory_gib"] > 0


def test_gpus_are_those_of_the_driver_where_pytorch_cannot_see_them(monkeypatch: pytest.MonkeyPatch):
    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout="NVIDIA H100\nNVIDIA H100\n")

    monkeypatch.setattr(provenance.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(provenance.subprocess, "run", answer)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert provenance.describe_hardware()["gpus"] == ["NVIDIA H100", "NVIDIA H100"]
    monkeypatch.setattr(provenance, "_torch_if_installed", lambda: None)
    assert provenance.describe_hardware()["gpus"] == ["NVIDIA H100", "NVIDIA H100"]
    monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
    assert provenance.describe_hardware()["gpus"] == []
    assert provenance.git_commit() is None
