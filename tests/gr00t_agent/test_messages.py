"""The messages of policy servers, byte by byte, and what is refused in them."""

import io
from typing import Any

import msgpack
import numpy as np
import pytest

from gr00t_agent.messages import pack, pack_npy, unpack, unpack_npy, unpack_vla_eval


def test_openpis_form_byte_by_byte():
    array = np.array([[1, -2, 3]], dtype=np.int16)
    # msgpack's own format: a map of one, the text "a", a map of four, its keys and values as bytes ("bin").
    key = {name: b"\xc4" + bytes([len(name)]) + name for name in (b"__ndarray__", b"data", b"dtype", b"shape")}
    expected = b"\x81\xa1a\x84" + key[b"__ndarray__"] + b"\xc3"
    expected += key[b"data"] + b"\xc4\x06" + bytes([1, 0, 0xFE, 0xFF, 3, 0])
    expected += key[b"dtype"] + b"\xa3<i2" + key[b"shape"] + b"\x92\x01\x03"
    assert pack({"a": array}) == expected
    scalar = msgpack.packb({b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"})
    assert pack(np.float32(0.5)) == scalar
    assert isinstance(unpack(scalar), np.float32)


@pytest.mark.parametrize(("write", "read"), [(pack, unpack), (pack_npy, unpack_npy)])
def test_a_message_comes_back(write: Any, read: Any):
    message = {
        "picture": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "state": [np.linspace(0, 1, 8), {"turned": np.arange(6.0).reshape(2, 3)[::-1].T}],
        "prompt": "pick up the bowl",
        "flag": None,
    }
    again = read(write(message))
    assert (again["prompt"], again["flag"], list(again)) == (message["prompt"], None, list(message))
    for new, old in (
        (again["picture"], message["picture"]),
        (again["state"][0], message["state"][0]),
        (again["state"][1]["turned"], message["state"][1]["turned"]),
    ):
        np.testing.assert_array_equal(new, old)
        assert new.dtype == old.dtype
        new += 1  # not a view of the message


def test_nothing_is_pickled_or_unpickled():
    objects = np.array([{"a": 1}, None], dtype=object)
    for write in (pack, pack_npy):
        with pytest.raises(ValueError, match=r"arrays of object are not sent|Object arrays cannot be saved"):
            write({"x": objects})
    file = io.BytesIO()
    np.save(file, objects, allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded when allow_pickle=False"):
        unpack_npy(msgpack.packb({"__ndarray_class__": True, "as_npy": file.getvalue()}))
    forged = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]}
    with pytest.raises(ValueError, match="arrays of object are not sent"):
        unpack(msgpack.packb(forged))
    with pytest.raises(TypeError, match="set cannot be sent"):
        pack({"x": {1, 2}})


@pytest.mark.parametrize(
    "entries",
    [
        {b"dtype": "<f4", b"shape": [3], b"data": b"\0" * 8},
        {b"dtype": "no type", b"shape": [2], b"data": b"\0" * 8},
        {b"dtype": "<f4", b"shape": [2]},
        {b"dtype": "<f4", b"shape": 2, b"data": b"\0" * 8},
    ],
)
def test_damaged_arrays_are_refused(entries: dict[bytes, Any]):
    with pytest.raises(ValueError, match="are no msgpack message with arrays"):
        unpack(msgpack.packb({b"__ndarray__": True, **entries}))


def test_damaged_scalars_and_names_are_refused():
    too_large = {b"__npgeneric__": True, b"data": 1000, b"dtype": "|i1"}
    unnamed = {"__ndarray__": True, b"data": b""}
    for read, message in ((unpack, too_large), (unpack_vla_eval, unnamed)):
        with pytest.raises(ValueError, match="are no msgpack message with arrays"):
            read(msgpack.packb(message))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1a", b"PK\x03\x04", pack({"a": 1}) + b"\0"])
def test_what_is_no_message_is_refused(data: bytes):
    for read in (unpack, unpack_npy):
        with pytest.raises(ValueError, match=rf"{len(data)} bytes that begin with .* are no msgpack message"):
            read(data)
