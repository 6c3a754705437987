"""Folders from outside, and files and folders that appear whole or not at all, whatever kills the writer.

What is written lies beside its place under a name of its own until it is complete and on the disk; then it is renamed.

    .tmp-<random>-<name>    being written
    .old-<name>             a folder that is being replaced: put back if its successor is not there
    .gone-<name>            a folder that is being deleted

After a kill `clean_up` finishes the second and deletes the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError

_WRITING, _OLD, _GONE = ".tmp-", ".old-", ".gone-"


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Gives the path of a file to write, which replaces `path` if the context is left without an error.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    temporary = _temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _removed_on_error(temporary):
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    _flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Gives an empty folder to write into, which replaces `path` if the context is left without an error.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    temporary, old = _temporary(path), path.with_name(_OLD + path.name)
    temporary.mkdir(parents=True)
    with _removed_on_error(temporary):
        yield temporary
        for written in temporary.rglob("*"):
            _flush(written)
        _flush(temporary)
        if path.exists():
            remove_folder(old)
            path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                old.replace(path)
                raise
        else:
            temporary.replace(path)
    _flush(path.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Deletes a folder, if it is there; under its own name it is at no time half deleted."""
    gone = path.with_name(_GONE + path.name)
    if path.exists():
        shutil.rmtree(gone, ignore_errors=True)
        path.replace(gone)
        shutil.rmtree(gone)


def clean_up(folder: Path) -> None:
    """Finishes or deletes what killed writers left in `folder`, not below it; nobody may be writing there."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(_OLD):
            place = path.with_name(path.name.removeprefix(_OLD))
            if place.exists():
                remove_folder(path)
            else:
                path.replace(place)
        elif path.name.startswith((_WRITING, _GONE)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def json_ready(value: Any) -> Any:
    """Returns a dataclass, path, tuple or mapping as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_ready(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(json_ready(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_WRITING}{secrets.token_hex(4)}-{path.name}")


@contextmanager
def _removed_on_error(temporary: Path) -> Generator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
            # Safetensors tells of a full disk by an error of its own.
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def _flush(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
