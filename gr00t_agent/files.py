"""Folders from outside: on this machine, or downloaded from the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub


def resolve_folder(what: str, path_or_hub_id: str | Path, hint: str, **options: Any) -> Path:
    """Return a folder, downloaded if it is a hub name.

    Args:
        what: What it holds, for the message.
        path_or_hub_id: A folder, or `owner/name`.
        hint: What could be given instead, for the message.
        options: Of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: Neither a folder nor of the form `owner/name`, or the hub does not give it.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{what} {name!r} is no folder and no hub name (owner/name); {hint}")
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{what} {name!r} is no folder below {Path.cwd()}, and the hub does not give it ({error}); {hint}"
        ) from error
