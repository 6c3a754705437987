"""What comes before a physics step: the right version of MuJoCo Warp, and kernels compiled side by side on first use.

Warp compiles a kernel's module when the kernel is first launched, one after another; a physics step launches kernels
of more than a hundred modules. Which ones does not depend on what they compute, so the launches can be gone through
once without running anything, and the modules found then compiled by as many threads as there are cores.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import warp as wp

from libero_gym.rendering.raycast import note_kernels

# Kernels of `libero_gym.physics` call private functions of MuJoCo Warp and read its arrays, which change from one minor
# version to the next. Tests compare both for these; pyproject.toml says the same.
_MAJOR, _MINOR = 4, 0
MUJOCO_WARP_VERSIONS = f">={_MAJOR}.{_MINOR},<{_MAJOR}.{_MINOR + 1}"

# Seconds after which compiling is said to go on: cached kernels load faster than that.
_PATIENCE_S = 3.0


def check_mujoco_warp() -> None:
    """Raise unless there is a MuJoCo Warp that GPU physics is made for.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: it is another version.
    """
    install = f"pip install 'mujoco-warp{MUJOCO_WARP_VERSIONS}'"
    try:
        version = importlib.metadata.version("mujoco-warp")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"physics='warp' needs MuJoCo Warp, the extra warp-physics: {install}") from error
    if version.split(".")[:2] != [str(_MAJOR), str(_MINOR)]:
        raise ImportError(
            f"physics='warp' calls private functions of MuJoCo Warp as they are in mujoco-warp{MUJOCO_WARP_VERSIONS}; "
            f"mujoco-warp=={version} is installed: {install}"
        )


def find_modules(launch: Callable[[], Any]) -> list[tuple[Any, Any, int | None]]:
    """Return (module, device, block size) of the kernels that `launch` launches, without running any.

    `launch` must not depend on what kernels compute, as it does in a loop that waits for a condition.
    """
    found: dict[tuple[int, str, int | None], tuple[Any, Any, int | None]] = {}

    def note(module: Any, device: Any, block_dim: int | None = None) -> None:
        """Stand in for `Module.load`; a launch whose module is not loaded does nothing."""
        found[id(module), str(device), block_dim] = (module, device, block_dim)

    def suggest_block_size(kernel: Any, device: Any = None) -> tuple[int, int]:
        """Stand in for `get_suggested_block_size`, which would load the module to ask the device.

        What MuJoCo Warp makes of it is the size of a grid, which changes no module.
        """
        note(kernel.module, wp.get_device(device))
        return 256, 1

    with _replaced(wp.Module, "load", note), _replaced(wp, "get_suggested_block_size", suggest_block_size):
        launch()
    return list(found.values())


def load_modules(modules: Sequence[tuple[Any, Any, int | None]], num_threads: int | None = None) -> None:
    """Compile and load modules, side by side; says on standard error how far it is, if it takes long.

    Args:
        modules: from `find_modules`.
        num_threads: None takes all cores that the process may use.
    """
    num_threads = len(os.sched_getaffinity(0)) if num_threads is None else num_threads
    start, shown = time.perf_counter(), 0.0
    with ThreadPoolExecutor(max(1, num_threads), "warp-compile") as pool:
        futures = [pool.submit(module.load, device, block_dim) for module, device, block_dim in modules]
        for count, future in enumerate(as_completed(futures), 1):
            future.result()
            elapsed = time.perf_counter() - start
            if elapsed - shown > _PATIENCE_S:
                shown = elapsed
                print(
                    f"compiling physics kernels on first use: {count} of {len(futures)} ({elapsed:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
    note_kernels()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Any:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
