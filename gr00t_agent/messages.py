"""Arrays in msgpack, as policy servers send them: openpi's form (`pack`, `unpack`), Isaac-GR00T's, vla-eval's.

openpi's is that of its `openpi_client.msgpack_numpy`, which pins NumPy 1; the package msgpack-numpy writes another one,
and pickles arrays of objects. Here as there such arrays are refused, on both ways: nothing is unpickled.

    openpi        {b"__ndarray__": True, b"data": bytes, b"dtype": str, b"shape": [int, ...]}; a scalar of NumPy
                  {b"__npgeneric__": True, b"data": value, b"dtype": str}
    Isaac-GR00T   {"__ndarray_class__": True, "as_npy": the bytes of a .npy file}
    vla-eval      {"__ndarray__": True, "data": bytes, "dtype": str, "shape": [int, ...]}; a picture, by default of PNG,
                  {"__image__": True, "format": "png", "data": bytes, "shape": [int, int, int]}

Needs msgpack, which the extra `[serve]` brings.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from PIL import Image

try:
    import msgpack
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "msgpack is not installed; policy servers need it: pip install 'libero-gr00t[serve]'", name=error.name
    ) from error

# NumPy's kinds of types whose bytes are no numbers or text: structures, objects, and complex numbers.
_REFUSED_KINDS = "VOc"
# What Python, NumPy and Pillow raise where a message says of an array or a picture what cannot be.
_DAMAGED = (
    ValueError, TypeError, KeyError, AttributeError, OverflowError, SyntaxError, EOFError, OSError,
    Image.DecompressionBombError,
)  # fmt: skip


def pack(message: Any) -> bytes:
    """Return a message in openpi's form; it may hold arrays and scalars of NumPy at any depth.

    Raises:
        ValueError: An array is of objects, structures or complex numbers.
        TypeError: Something is nothing that msgpack knows.
    """
    return cast(bytes, msgpack.packb(message, default=_array_to_map))


def unpack(data: bytes) -> Any:
    """Return the message that `pack`, or openpi's client, made; its arrays may be written to.

    Raises:
        ValueError: It is no such message.
    """
    return _unpacked(data, _map_to_array)


def pack_npy(message: Any) -> bytes:
    """Return a message in Isaac-GR00T's form; it may hold arrays of NumPy at any depth.

    Raises:
        ValueError: An array is of objects.
        TypeError: Something is nothing that msgpack knows.
    """
    return cast(bytes, msgpack.packb(message, default=_array_to_npy))


def unpack_npy(data: bytes) -> Any:
    """Return the message that `pack_npy`, or Isaac-GR00T, made; what is no array stays a dict.

    Raises:
        ValueError: It is no such message.
    """
    return _unpacked(data, _npy_to_array)


def pack_vla_eval(message: Any) -> bytes:
    """Return a message in vla-eval's form; its arrays, pictures among them, are sent as bytes.

    Raises:
        ValueError: An array is of objects, structures or complex numbers.
        TypeError: Something is nothing that msgpack knows.
    """
    return cast(bytes, msgpack.packb(message, default=_array_to_named_map))


def unpack_vla_eval(data: bytes) -> Any:
    """Return the message that `pack_vla_eval`, or vla-eval, made; its arrays may be written to.

    Raises:
        ValueError: It is no such message, or holds a picture that is none.
    """
    return _unpacked(data, _named_map_to_array)


def _unpacked(data: bytes, from_map: Callable[[dict[Any, Any]], Any]) -> Any:
    try:
        return msgpack.unpackb(data, object_hook=from_map)
    except _DAMAGED as error:
        raise ValueError(
            f"{len(data)} bytes that begin with {bytes(data[:8])!r} are no msgpack message with arrays "
            f"({type(error).__name__}: {error})"
        ) from error


def _array_to_map(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{type(value).__name__} cannot be sent; give numbers, text, lists, dicts and arrays")
    _check_kind(value.dtype)
    if isinstance(value, np.ndarray):
        shape = cast(tuple[int, ...], value.shape)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _map_to_array(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        dtype = _check_kind(np.dtype(entries[b"dtype"]))
        return np.ndarray(tuple(entries[b"shape"]), dtype, buffer=entries[b"data"]).copy()
    if b"__npgeneric__" in entries:
        return _check_kind(np.dtype(entries[b"dtype"])).type(entries[b"data"])
    return entries


def _array_to_npy(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} cannot be sent; give numbers, text, lists, dicts and arrays")
    file = io.BytesIO()
    np.lib.format.write_array(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def _npy_to_array(entries: dict[Any, Any]) -> Any:
    if "__ndarray_class__" in entries:
        return np.lib.format.read_array(io.BytesIO(entries["as_npy"]), allow_pickle=False)
    return entries


def _array_to_named_map(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return {key.decode(): entry for key, entry in _array_to_map(value).items()}


def _named_map_to_array(entries: dict[Any, Any]) -> Any:
    if "__image__" in entries:
        if entries["format"] == "raw":
            return _array_from(entries)
        return np.array(Image.open(io.BytesIO(entries["data"]), formats=("PNG", "JPEG")))
    return _array_from(entries) if "__ndarray__" in entries else entries


def _array_from(entries: dict[str, Any]) -> Any:
    return _map_to_array({b"__ndarray__": True} | {key.encode(): value for key, value in entries.items()})


def _check_kind(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind in _REFUSED_KINDS:
        raise ValueError(f"arrays of {dtype} are not sent; give numbers or text")
    return dtype
