"""What comes from outside: folders, JSON files, and dataclasses that JSON data fill. Found and whole, or refused."""

import contextlib
import json
import math
import types
from collections.abc import Generator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import huggingface_hub

JsonDict = dict[str, Any]
DataclassT = TypeVar("DataclassT")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        ValueError: A Git-LFS pointer, no JSON (damaged or cut), or no object.
    """
    refuse_lfs_pointer(path)
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is no JSON, or only a part of it ({error}); download or write it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; it must hold an object")
    return cast(JsonDict, data)


@contextlib.contextmanager
def naming(path: Path) -> Generator[None]:
    """Put the path in front of what is said about a file's content."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise type(error)(f"{path}: {error.args[0]}") from error


def require(data: Mapping[str, Any], key: str, where: str) -> Any:
    """Return an entry.

    Raises:
        KeyError: It is missing.
    """
    if key not in data:
        raise KeyError(f"{where} has no key {key!r}; present: {', '.join(sorted(data)) or 'none'}")
    return data[key]


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
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    allowed = ", ".join(map(repr, choices)) if origin is Literal else getattr(hint, "__name__", str(hint))
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
