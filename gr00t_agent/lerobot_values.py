"""Values of a dataset's files, in whatever form their writer left them; what cannot be read right is an error.

LeRobot's own tools write vectors as fixed-size lists of float32, indices as int64 and images as encoded bytes in a
struct. Others leave lists of any length, indices as floats, booleans or lists of one element, texts as categories,
images as bare bytes or nested lists, and nulls. Every error names the file, the field, what it holds and what it must.

`where` is the start of an error's message: the file and the field.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

# How a file starts that was checked out without its content.
LFS_POINTER = b"version https://git-lfs"
# Characters of an image's path; no file system has longer names.
MAX_PATH = 1000
# Formats of image files that tables hold, and their modes whose conversion to RGB loses nothing.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_MODES = ("RGB", "L", "P")


# -- files -------------------------------------------------------------------------------------------------------------


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a parquet file's table, or some of its columns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or has not exactly one of each column.
    """
    existing_file(path)
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            absent = [name for name in columns or () if present.count(name) != 1]
            if absent:
                raise pa.ArrowInvalid(f"No match for one column {', '.join(absent)}; present: {', '.join(present)}")
            return file.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise damaged_file(path, error) from error


def damaged_file(path: Path, error: Exception) -> ValueError:
    """Return what to raise for a file that cannot be decoded."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return ValueError(f"{path} is a Git LFS pointer instead of the file; run `git lfs pull` in the dataset")
    reason = str(error).partition("\n")[0]
    return ValueError(f"{path} is damaged ({reason}); download or write it again")


def existing_file(path: Path) -> Path:
    """Return the path of a file that must be there.

    Raises:
        FileNotFoundError: it is not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the dataset is incomplete (download or write it again)")
    return path


def path_inside(folder: Path, given: str, where: str) -> Path:
    """Return the path of a file that a dataset names. Links are not followed: a hub's cache consists of them.

    Raises:
        ValueError: it is not inside the dataset's folder.
    """
    base = os.path.abspath(folder)  # noqa: PTH100 (resolve would follow links)
    path = Path(os.path.normpath(os.path.join(base, given)))  # noqa: PTH118
    if not path.is_relative_to(base):
        raise ValueError(f"{where} is {given!r}, which is not inside {folder}; a dataset's files lie in its folder")
    return folder / path.relative_to(base)


# -- values of JSON files, and of tables read as Python objects --------------------------------------------------------


def to_whole(value: Any, where: str) -> int:
    """Return a whole number, which may be given as a float.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value % 1:
        raise ValueError(f"{where} is {value!r}; it must be a whole number")
    return int(value)


def to_number(value: Any, where: str) -> float:
    """Return a finite number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}; it must be a finite number")
    return float(value)


def to_text(value: Any, where: str) -> str:
    """Return a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}; it must be a text")
    return value


def is_no_text(value: str) -> bool:
    """Return whether a text is empty, or what programs print of a number or of a missing value."""
    try:
        float(value)
    except ValueError:
        return value.strip().lower() in ("", "none", "null", "<na>")
    return True


# -- columns of tables -------------------------------------------------------------------------------------------------


def holds_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds texts: plain, as categories, or in lists."""
    if pa.types.is_dictionary(kind) or _is_list(kind):
        return holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def read_numbers(column: pa.ChunkedArray, where: str) -> NDArray[Any]:
    """Return a column of numbers, or of lists of them, as an array [rows, width]; lists in lists are flattened.

    Raises:
        ValueError: nulls, rows that differ in width, or no numbers.
    """
    array, width = _flat(column, where)
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{where} holds {column.type}; it must hold numbers")
    return array.to_numpy(zero_copy_only=False).reshape(-1, width)


def read_scalars(column: pa.ChunkedArray, where: str) -> NDArray[Any]:
    """Return a column of one number a row, or of lists of one, as an array [rows].

    Raises:
        ValueError: nulls, more or fewer numbers, or none.
    """
    values = read_numbers(column, where)
    if values.shape[1] != 1:
        raise ValueError(f"{where} has {values.shape[1]} elements a row; it must have 1")
    return values[:, 0]


def read_indices(column: pa.ChunkedArray, where: str) -> NDArray[np.int64]:
    """Return a column of whole numbers, which may be given as floats or booleans or in lists of one, as [rows].

    Raises:
        ValueError: nulls, fractions, negative numbers, more or fewer numbers a row, or none.
    """
    values = read_scalars(column, where)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
    # Beyond, floats are no longer exact, and unsigned numbers would turn negative.
    good = (values >= 0) & (values <= 2**53)
    if values.dtype.kind == "f":
        good &= values == np.floor(values)
    if not good.all():
        row = np.flatnonzero(~good)[0]
        raise ValueError(f"{where} is {values[row]} in row {row}; it must be a whole number of at least 0")
    return values.astype(np.int64)


def read_texts(column: pa.ChunkedArray, where: str) -> list[str]:
    """Return a column of one text a row, or of lists of one.

    Raises:
        ValueError: nulls, more or fewer texts a row, or none.
    """
    array, width = _flat(column, where)
    if width != 1 or not holds_text(array.type):
        raise ValueError(f"{where} holds {column.type}; it must hold one text a row")
    return array.to_pylist()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array, without chunks, categories and extension types."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _flat(column: pa.ChunkedArray, where: str) -> tuple[pa.Array, int]:
    """Return a column's elements without nulls, and how many a row has."""
    array, width = _plain(column), 1
    _refuse_nulls(array, width, where)
    while _is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        if len(lengths) and (lengths != lengths[0]).any():
            row = int(np.flatnonzero(lengths != lengths[0])[0])
            raise ValueError(
                f"{where} has {lengths[row]} elements in row {row // width}, {lengths[0]} in row 0; all rows must have "
                "the same"
            )
        width *= int(lengths[0]) if len(lengths) else 1
        array = _plain(array.flatten())
        _refuse_nulls(array, max(width, 1), where)
    if width == 0:
        raise ValueError(f"{where} has rows without elements")
    return array, width


def _refuse_nulls(array: pa.Array, width: int, where: str) -> None:
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise ValueError(f"{where} is null in row {row}; every row must have a value")


# -- images in tables --------------------------------------------------------------------------------------------------


def decode_image(
    cell: pa.Scalar, shape: Sequence[int], axes: Sequence[int], folder: Path, where: str
) -> NDArray[np.uint8]:
    """Return the image of one cell as uint8 [H, W, 3].

    A cell is an encoded file (a struct of `bytes` and `path`, bare bytes, or a path inside the dataset), or the pixels
    themselves, 0 to 255, as nested lists or one flat list.

    Args:
        cell: of the image column.
        shape: what info.json says of the column.
        axes: which of `shape` are height, width and channels.
        folder: of the dataset.
        where: start of an error's message.

    Raises:
        FileNotFoundError: it names a file that is not there.
        ValueError: nothing that can be read as an RGB image.
    """
    value: Any = None
    if cell.is_valid and _is_list(cell.type):
        pixels = _pixels(cell, where)
        if pixels.ndim > 1 or pixels.size == math.prod(shape):
            if pixels.ndim > 1 and pixels.shape != tuple(shape):
                raise ValueError(f"{where} has pixels of shape {pixels.shape}, its info.json says {list(shape)}")
            return np.ascontiguousarray(pixels.reshape(tuple(shape)).transpose(tuple(axes)))
        value = pixels.tobytes()
    elif cell.is_valid:
        value = cell.as_py()
        if isinstance(value, Mapping):
            fields = cast("Mapping[str, Any]", value)
            value = fields.get("bytes") or fields.get("path")
            if isinstance(value, list) and pa.types.is_uint8(cell.type.field("bytes").type.value_type):
                value = bytes(cast("list[int]", value))
    if not value or not isinstance(value, str | bytes):
        raise ValueError(
            f"{where} is {'null' if value is None else cell.type}; it must hold an encoded image, a path or pixels"
        )
    if isinstance(value, str):
        path = path_inside(folder, value, where)
        if len(value) > MAX_PATH or not path.is_file():
            raise FileNotFoundError(
                f"{where} is in {str(path)[:MAX_PATH]}, which is no file; the dataset is incomplete"
            )
        return _decode_file(path, where)
    return _decode_file(io.BytesIO(value), where)


def _pixels(cell: pa.Scalar, where: str) -> NDArray[np.uint8]:
    """Return a nested list of whole numbers in 0-255 as an array of its shape."""
    array, shape = _plain(cell.values), [len(cell.values)]
    _refuse_nulls(array, 1, where)
    while _is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        if len(set(lengths.tolist())) > 1:
            raise ValueError(f"{where} has lists of {min(lengths)}-{max(lengths)} elements; its rows must be equal")
        shape.append(int(lengths[0]) if len(lengths) else 0)
        array = _plain(array.flatten())
        _refuse_nulls(array, max(math.prod(shape), 1), where)
    values = array.to_numpy(zero_copy_only=False) if pa.types.is_integer(array.type) else None
    if values is None or (values.size and not (values.min() >= 0 and values.max() <= 255)):
        found = array.type if values is None else f"{values.min()} to {values.max()}"
        raise ValueError(f"{where} has pixels of {found}; they must be whole numbers in 0-255")
    return values.astype(np.uint8).reshape(shape)


def _decode_file(source: Path | io.BytesIO, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(source, formats=IMAGE_FORMATS) as opened:
            mode, is_opaque = opened.mode, True
            if mode == "RGBA":
                is_opaque = opened.getchannel("A").getextrema() == (255, 255)
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} cannot be decoded: {error}") from error
    if mode not in IMAGE_MODES and not (mode == "RGBA" and is_opaque):
        raise ValueError(
            f"{where} is an image of mode {mode!r}{'' if is_opaque else ' that is partly transparent'}; it must be "
            f"opaque and RGB (or {', '.join(IMAGE_MODES[1:])})"
        )
    return pixels
