"""What lies outside: folders and JSON files that are found whole or refused, and files that are written whole or not.

What is written lies beside its place under a name of its own until it is complete and on the disk; then it is renamed.

    .tmp-<random>-<name>    being written
    .old-<name>             a folder that is being replaced: put back if its successor is not there
    .gone-<name>            a folder that is being deleted

After a kill `clean_up` finishes the second and deletes the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import types
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

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


JsonDict = dict[str, Any]
DataclassT = TypeVar("DataclassT")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# The largest finite number of single precision, in which the network computes.
FLOAT32_MAX = 3.4028234663852886e38


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
    if not is_hub_name(name):
        raise FileNotFoundError(f"{what} {name!r} is no folder and no hub name (owner/name); {hint}")
    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{what} {name!r} is no folder below {Path.cwd()}, and the hub does not give it ({error}); {hint}"
        ) from error


def is_hub_name(name: str) -> bool:
    """Returns whether `name` is of the form `owner/name`."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def has_file(path: Path) -> bool:
    """Returns whether there is such a file, where nothing at all is allowed as well.

    Raises:
        FileNotFoundError: something else lies there: a folder, or a link to nothing; or a file lies where the folder
            should be.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise FileNotFoundError(
            f"{path} is no file but a folder, or a link to nothing; put the file there or delete it"
        )
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder, or a link to nothing; {path.name} belongs into a folder")
    return False


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if Git left a pointer of its large-file storage in place of a file's content."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git-LFS pointer, not the file that it points to; run `git lfs pull` there, or download "
                "it with `hf download`"
            )


def read_json(path: Path) -> JsonDict:
    """Read a JSON object.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A Git-LFS pointer, no JSON (damaged or cut), a name twice in one object, or no object.
    """
    if not has_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    refuse_lfs_pointer(path)
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is no JSON, or only a part of it ({error}); download or write it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; it must hold an object")
    return cast(JsonDict, data)


def _object(pairs: list[tuple[str, Any]]) -> JsonDict:
    """Return a JSON object; of a name that is there twice, Python would take the last value."""
    data = dict(pairs)
    if len(data) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} is there twice")
    return data


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Put the path in front of what is said about a file's content."""
    try:
        yield
    except KeyError as error:
        raise KeyError(f"{path}: {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def require(data: Mapping[str, Any], key: str, where: str) -> Any:
    """Return an entry.

    Raises:
        KeyError: It is missing.
    """
    if key not in data:
        raise KeyError(f"{where} has no key {key!r}; present: {', '.join(sorted(data)) or 'none'}")
    return data[key]


def is_number(value: Any) -> bool:
    """Returns whether a value from JSON is a number, and finite in single precision."""
    # Compared, not converted: integers of JSON have any size.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def is_whole(value: Any) -> bool:
    """Returns whether a value is an integer, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return a value from JSON as a field of this type takes it: lists become tuples.

    Raises:
        ValueError: It is of another type, or a number that is not finite.
    """
    origin, choices = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for choice in choices:
            with contextlib.suppress(ValueError):
                return typed(value, choice, where)
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
    elif origin is tuple:
        items = cast(list[Any], value) if isinstance(value, list) else []
        kinds = [choices[0]] * len(items) if choices[-1] is Ellipsis else list(choices)
        if isinstance(value, list) and len(items) == len(kinds):
            return tuple(typed(items[i], kind, f"{where}[{i}]") for i, kind in enumerate(kinds))
    elif origin is not None:  # a mapping from names
        if isinstance(value, dict):
            return {key: typed(item, choices[1], f"{where}.{key}") for key, item in cast(JsonDict, value).items()}
    elif hint is float:
        if is_number(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    names: dict[Any, str] = {float: "a finite number", dict: "an object"}
    if origin is Literal:
        allowed = ", ".join(map(repr, choices))
    else:
        allowed = names.get(hint) or (hint.__name__ if origin is None else str(hint))
    raise ValueError(f"{where}={value!r} is not allowed here (allowed: {allowed})")


def dataclass_from_json(cls: type[DataclassT], data: Any, where: str) -> DataclassT:
    """Build a dataclass from what its `asdict` gave to JSON; fields that are missing take their defaults.

    Raises:
        ValueError: Not an object, a field that the class does not have, a value of another type, or one that the class
            refuses.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a JSON {type(data).__name__}; it must be an object")
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cast(Any, cls))]
    given = cast(JsonDict, data)
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(
            f"{where} has the unknown field(s) {', '.join(unknown)} (known: {', '.join(names)}); a newer version of "
            "this package may have written them: update it, or delete them if they do not matter"
        )
    needed = [field.name for field in fields(cast(Any, cls)) if field.default is field.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; present: {', '.join(given) or 'nothing'}")
    return cls(**{name: typed(value, hints[name], f"{where}.{name}") for name, value in given.items()})
