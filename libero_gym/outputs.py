"""Whether results can be written where they are asked for, told before they are made."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_output_folder(name: str, path: Path) -> None:
    """Return if a folder can be made at `path`, or is one that can be written to; nothing is left there.

    Args:
        name: the argument that gives it.
        path: the folder.

    Raises:
        NotADirectoryError: it, or what it should lie in, is a file.
        OSError: it cannot be made or written to.
    """
    place = path
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = "it" if place == path else str(place)
        raise NotADirectoryError(f"{name}={str(path)!r} cannot be a folder: {what} is a file; give another place")
    try:
        # What is allowed to this user, and possible on this file system, only trying tells.
        Path(tempfile.mkdtemp(prefix=".probe-", dir=place)).rmdir()
    except OSError as error:
        raise OSError(
            f"{name}={str(path)!r} cannot be written: no folder can be made in {place} ({error.strerror}); give a "
            "place that can be written to"
        ) from None


def check_output_file(name: str, path: Path) -> None:
    """Return if a file can be written at `path`, its folder made where there is none; nothing is left there.

    Args:
        name: the argument that gives it.
        path: the file.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: as `check_output_folder` of the folder that it lies in.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{name}={str(path)!r} is a folder; give the path of a file")
    check_output_folder(name, path.parent)
