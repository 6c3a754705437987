"""Servers that are asked for decisions, over real sockets: what they get and give, by value, and how they fail."""

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import zmq
from PIL import Image
from websockets.sync.server import serve

from algorithms.common.policy_clients import CAMERA_SIZE, connect
from gr00t_agent.messages import pack, pack_npy, unpack, unpack_npy

N, H = 3, 6
PARTS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
TASK_KEY = "annotation.human.action.task_description"


def observation(size: int = 256) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    obs = {f"video.{name}": rng.integers(0, 256, (N, size, size, 3), np.uint8) for name in ("image", "wrist_image")}
    obs |= {f"state.{name}": rng.normal(size=(N, 1)).astype(np.float32) for name in PARTS[:-1]}
    obs["state.gripper"] = rng.normal(size=(N, 2)).astype(np.float32)
    obs[TASK_KEY] = np.array([f"task {i}" for i in range(N)])
    return obs


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(N)]


def ask(client: Any, obs: Any = None, rows: Any = (0, 2)) -> torch.Tensor:
    client.begin_episodes(list(rows))
    return client.predict(observation() if obs is None else obs, generator=generators())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- openpi's protocol ---


@contextmanager
def openpi_server(answer: Callable[[Any], Any], metadata: Any = None) -> Iterator[str]:
    """Serves what `answer` makes of each observation; bytes and text are sent as they are, None ends the connection."""

    def converse(connection: Any) -> None:
        connection.send(metadata if isinstance(metadata, str | bytes) else pack(metadata or {}))
        for message in connection:
            reply = answer(unpack(message))
            if reply is None:
                return
            connection.send(reply if isinstance(reply, str | bytes) else pack(reply))

    with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def openpi_client(answer: Callable[[Any], Any], metadata: Any = None, **options: Any) -> Iterator[Any]:
    with openpi_server(answer, metadata) as address, closing(connect(address, 5, **options)) as client:
        yield client


def chunk(value: float = 0.0) -> np.ndarray:
    return np.full((H, 7), value) + np.arange(H)[:, None]


def test_openpis_server_gets_what_its_own_client_sends_and_its_actions_are_taken():
    requests: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return {"actions": chunk(10.0 * len(requests)), "policy_timing": {}}

    obs = observation()
    with openpi_client(answer, {"action_norm": np.ones(2), "name": "pi"}) as client:
        assert client.image_size == 256 == CAMERA_SIZE
        assert client.description == {"action_norm": [1.0, 1.0], "name": "pi"}
        chunks = ask(client, obs)
    # Only environments with an episode are asked for.
    np.testing.assert_array_equal(chunks.numpy(), np.stack([chunk(10), 0 * chunk(), chunk(20)]).astype(np.float32))
    assert chunks.dtype == torch.float32
    assert len(requests) == 2
    for request, i in zip(requests, (0, 2), strict=True):
        assert list(request) == ["observation/image", "observation/wrist_image", "observation/state", "prompt"]
        for key, name in (("observation/image", "video.image"), ("observation/wrist_image", "video.wrist_image")):
            expected = Image.fromarray(obs[name][i]).resize((224, 224), Image.Resampling.BILINEAR)
            assert request[key].dtype == np.uint8
            np.testing.assert_array_equal(request[key], np.asarray(expected))
        np.testing.assert_array_equal(
            request["observation/state"], np.concatenate([obs[f"state.{n}"][i] for n in PARTS])
        )
        assert request["observation/state"].dtype == np.float64
        assert request["prompt"] == f"task {i}"


def test_a_server_that_says_so_gets_its_own_size_and_seeds_of_the_episodes():
    requests: list[dict[str, Any]] = []
    obs = observation(32)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return {"actions": chunk()}

    with openpi_client(answer, {"image_size": 32, "takes_seed": True}) as client:
        assert client.image_size == 32
        noise = generators()
        client.begin_episodes([0, 2])
        client.predict(obs, generator=noise)
        client.end_episodes([0])
        client.predict(obs, generator=noise)
    np.testing.assert_array_equal(requests[1]["observation/image"], obs["video.image"][2])
    drawn = [torch.randint(2**62, (2,), generator=generator).tolist() for generator in generators()]
    assert [request["seed"] for request in requests] == [drawn[0][0], drawn[2][0], drawn[2][1]]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"actions": np.zeros((4, 7))}, r"actions has shape \[4, 7\]; expected numbers of shape \[H, 7\] with H >= 5"),
        ({"actions": np.zeros(7)}, r"actions has shape \[7\]; expected"),
        ({"actions": np.full((5, 7), np.nan)}, r"actions\[0, 0\] is nan; expected finite numbers"),
        ({"actions": [[0.0] * 7] * 5}, "actions is a list; expected an array"),
        ({"action": np.zeros((5, 7))}, r"the answer is the keys \['action'\]; expected a dict with 'actions'"),
        (pack([1, 2]), r"the answer is \[1, 2\]; expected a dict with 'actions'"),
        (b"\xc1", r"1 bytes that begin with b'\\xc1' are no msgpack message"),
        ("Traceback ...\nKeyError: 'prompt'\n", r"answers with an error:\nTraceback \.\.\.\nKeyError: 'prompt'$"),
    ],
)
def test_a_wrong_answer_names_address_given_and_expected(reply: Any, message: str):
    with openpi_client(lambda request: reply) as client, pytest.raises(ValueError, match=message) as error:
        ask(client)
    assert str(error.value).startswith(f"policy server {client.address}")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (pack([1]), r"metadata are \[1\]; expected a dict"),
        (pack({"image_size": "large"}), "image_size is 'large'; expected pixels, a whole number in 1-4096"),
        (pack({"image_size": True}), "image_size is True; expected pixels"),
        (pack({"image_size": 10_000_000}), "image_size is 10000000; expected pixels, a whole number in 1-4096"),
        ("no model is loaded", "answers with an error:\nno model is loaded"),
    ],
)
def test_metadata_of_another_kind_are_refused(metadata: Any, message: str):
    with openpi_server(lambda request: None, metadata) as address, pytest.raises(ValueError, match=message):
        connect(address, 5)


def test_metadata_may_hold_what_json_cannot():
    metadata = {"image_size": np.int64(32), "trained": msgpack.Timestamp(0), "digest": b"\x01"}
    with openpi_client(lambda request: None, pack(metadata)) as client:
        assert client.image_size == 32
        assert json.loads(json.dumps(client.description))["digest"] == "01"


def test_a_server_that_dies_or_hangs_midway_is_told():
    count = 0

    def answer(request: Any) -> Any:
        nonlocal count
        count += 1
        return {"actions": chunk()} if count < 3 else None

    with openpi_client(answer) as client:
        ask(client)
        who = rf"policy server {client.address} went away before it answered .* --resume"
        for _ in range(2):
            with pytest.raises(ConnectionError, match=who):
                ask(client)
    is_over = threading.Event()
    with openpi_client(lambda request: is_over.wait(30) and None, timeout_s=0.2) as client:
        with pytest.raises(ConnectionError, match=rf"policy server {client.address} has not answered for 0.2 s"):
            ask(client)
        is_over.set()


def test_chunks_of_different_lengths_in_one_decision_are_refused():
    lengths = iter((5, 6))
    message = r"chunks of \[5, 6\] steps came in one decision"

    def answer(request: Any) -> dict[str, Any]:
        return {"actions": np.zeros((next(lengths), 7))}

    with openpi_client(answer) as client, pytest.raises(ValueError, match=message):
        ask(client)


@pytest.mark.parametrize("scheme", ["ws", "zmq"])
def test_a_server_that_is_not_there_is_told_at_once(scheme: str):
    address = f"{scheme}://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError, match=rf"policy server {address} cannot be reached \(.*\); start it"):
        connect(address, 5)


@pytest.mark.parametrize("scheme", ["ws", "zmq"])
def test_what_speaks_neither_protocol_is_told(scheme: str):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(64)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=rf"policy server {address} cannot be reached"):
            connect(address, 5)
        thread.join()


# --- Isaac-GR00T's protocol ---


def modality_config(version: str, **changes: Any) -> dict[str, Any]:
    """What the public servers answer: N1.5's keys have the modality's name before them, and its configs are texts."""
    is_n1d5 = version == "n1.5"
    entries = {
        "video": {"delta_indices": [0], "modality_keys": ["image", "wrist_image"]},
        "state": {"delta_indices": [0], "modality_keys": list(PARTS)},
        "action": {"delta_indices": list(range(H)), "modality_keys": list(PARTS)},
        "language": {"delta_indices": [0], "modality_keys": [TASK_KEY]},
    } | changes
    if is_n1d5:
        for name in ("video", "state", "action"):
            entries[name]["modality_keys"] = [f"{name}.{key}" for key in entries[name]["modality_keys"]]
    return {
        name: {"__ModalityConfig_class__": True, "as_json": json.dumps(entry) if is_n1d5 else entry}
        for name, entry in entries.items()
    }


@contextmanager
def isaac_server(answer: Callable[[Any], Any], config: Any) -> Iterator[str]:
    """Serves as a REP socket; an answer of bytes is sent as it is, None ends the server without an answer."""
    context = zmq.Context()
    rep = context.socket(zmq.REP)
    rep.linger = 0
    port = rep.bind_to_random_port("tcp://127.0.0.1")
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            if not rep.poll(50):
                continue
            request = unpack_npy(rep.recv())
            reply = config if request["endpoint"] == "get_modality_config" else answer(request["data"])
            if reply is None:
                break
            rep.send(reply if isinstance(reply, bytes) else pack_npy(reply))
        rep.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield f"zmq://127.0.0.1:{port}"
    finally:
        stopped.set()
        thread.join()
        context.term()


@contextmanager
def isaac_client(
    answer: Callable[[Any], Any], config: Any, num_action_chunks: int = 5, **options: Any
) -> Iterator[Any]:
    with isaac_server(answer, config) as address, closing(connect(address, num_action_chunks, **options)) as client:
        yield client


def parts_of(rows: Any, gripper: float) -> dict[str, np.ndarray]:
    """Actions whose part number p is p / 10 + step / 100 in row 0, one more in each further row."""
    steps = np.arange(H)[None, :, None] / 100 + np.arange(rows)[:, None, None]
    parts = {f"action.{name}": (p / 10 + steps).astype(np.float32) for p, name in enumerate(PARTS)}
    return parts | {"action.gripper": np.full((rows, H, 1), gripper, np.float32)}


def test_n1d5_gets_one_observation_at_a_time_and_its_squeezed_actions_are_taken():
    requests: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return {key: np.squeeze(part) for key, part in parts_of(1, gripper=0.9 if len(requests) == 1 else 0.2).items()}

    obs = observation()
    with isaac_client(answer, modality_config("n1.5")) as client:
        assert client.description["server"] == "Isaac-GR00T N1.5"
        assert client.image_size == 256
        chunks = ask(client, obs).numpy()
    assert len(requests) == 2
    assert set(requests[1]) == {TASK_KEY, "video.image", "video.wrist_image", *(f"state.{name}" for name in PARTS)}
    assert requests[1][TASK_KEY] == ["task 2"]
    np.testing.assert_array_equal(requests[1]["video.image"], obs["video.image"][2][None])
    np.testing.assert_array_equal(requests[1]["state.gripper"], obs["state.gripper"][2][None])
    assert requests[1]["state.x"].shape == (1, 1)
    assert chunks.shape == (N, H, 7)
    np.testing.assert_allclose(chunks[0, 2, :6], [0.02, 0.12, 0.22, 0.32, 0.42, 0.52], rtol=1e-6)
    # 0.9 is open in the data, which the environment calls -1; 0.2 is closed.
    assert (set(chunks[0, :, 6]), set(chunks[2, :, 6])) == ({-1.0}, {1.0})
    assert not chunks[1].any()


def test_n1d6_gets_all_environments_at_once():
    requests: list[Any] = []

    def answer(request: Any) -> Any:
        requests.append(request)
        return [parts_of(2, gripper=0.0), {}]

    obs = observation()
    named = {"language": {"delta_indices": [0], "modality_keys": ["task"]}}
    with isaac_client(answer, modality_config("n1.6", **named)) as client:
        assert client.description["server"] == "Isaac-GR00T N1.6 or N1.7"
        chunks = ask(client, obs).numpy()
    ((given),) = requests
    assert set(given) == {"observation", "options"}
    sent = given["observation"]
    assert sent["task"] == ["task 0", "task 2"]
    np.testing.assert_array_equal(sent["video.wrist_image"], obs["video.wrist_image"][[0, 2]][:, None])
    np.testing.assert_array_equal(sent["state.gripper"], obs["state.gripper"][[0, 2]][:, None])
    assert (sent["state.x"].shape, sent["state.x"].dtype) == ((2, 1, 1), np.float32)
    np.testing.assert_allclose(chunks[2, 1], [1.01, 1.11, 1.21, 1.31, 1.41, 1.51, 1.0], rtol=1e-6)
    assert not chunks[1].any()


@pytest.mark.parametrize("version", ["n1.5", "n1.6"])
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"action.x": None}, r"the action lacks \['action.x'\]"),
        ({"action.yaw": np.full((1, H, 1), np.inf)}, r"action.yaw holds values that are not finite"),
        ({"action.yaw": np.zeros((1, H, 2))}, r"action.yaw has shape \((1, )?6, 2\), expected"),
        ({"action.yaw": "text"}, r"(?s)the action is .*; expected a dict of arrays"),
        ({"action.yaw": np.ones((1, H, 1), complex)}, "action.yaw is an array of complex128; expected an array of num"),
        ({"action.yaw": np.ones((1, H, 1), bool)}, "action.yaw is an array of bool; expected an array of numbers"),
        ({"action.yaw": np.ones((1, H, 1), "M8[s]")}, r"action.yaw is an array of datetime64\[s\]; expected an array"),
        ({"action.yaw": np.full((1, H, 1), 1e300)}, "action.yaw holds values that are not finite"),
    ],
)
def test_wrong_actions_of_isaac_are_told(version: str, action: dict[str, Any], message: str):
    parts = {key: value for key, value in (parts_of(1, 0.0) | action).items() if value is not None}
    if version == "n1.5":
        parts = {key: part[0] if isinstance(part, np.ndarray) else part for key, part in parts.items()}
    reply = parts if version == "n1.5" else [parts, {}]
    config = modality_config(version)
    with isaac_client(lambda request: reply, config) as client, pytest.raises(ValueError, match=message) as error:
        ask(client, rows=[0])
    assert str(error.value).startswith(f"policy server {client.address}: ")


@pytest.mark.parametrize(("least", "rows", "expected"), [(7, [0], r".*H >= 7"), (5, [0, 2], r".*\[2, H, 7\]")])
def test_short_chunks_and_a_wrong_number_of_rows_are_told(least: int, rows: list[int], expected: str):
    reply = [parts_of(1, 0.0), {}]
    message = rf"actions has shape \[1, 6, 7\]; {expected}"
    config = modality_config("n1.6")
    with isaac_client(lambda request: reply, config, least) as client, pytest.raises(ValueError, match=message):
        ask(client, rows=rows)


def test_a_pickle_is_recognised_and_never_loaded():
    file = io.BytesIO()
    torch.save({"error": "invalid load key"}, file)  # what a server of the first releases answers
    with isaac_server(lambda request: None, file.getvalue()) as address:
        message = rf"policy server {address} answers with torch.save's pickle, .* update the server"
        with pytest.raises(ValueError, match=message):
            connect(address, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"the answer to get_modality_config is \{\}; expected the configs of video, state, language"),
        ({"error": "Unknown endpoint"}, "answers get_modality_config with an error: Unknown endpoint"),
        (
            modality_config("n1.6", video={"delta_indices": [0], "modality_keys": ["ego_view"]}),
            r"its model reads video.ego_view; expected of video: video.image, video.wrist_image",
        ),
        (
            modality_config("n1.5", state={"delta_indices": [-1, 0], "modality_keys": ["x"]}),
            r"its model reads state at the steps \[-1, 0\]; expected the present alone, \[0\]",
        ),
        (
            modality_config("n1.6", video={"delta_indices": [5], "modality_keys": ["image"]}),
            r"its model reads video at the steps \[5\]; expected the present alone, \[0\]",
        ),
        (
            modality_config("n1.6", language={"delta_indices": [0], "modality_keys": []}),
            r"its model reads no instruction, for the modality_keys of language are \[\]; expected .*annotation",
        ),
        *(
            (
                modality_config("n1.6", **{name: {"delta_indices": [0], "modality_keys": [TASK_KEY]} | wrong}),
                f"its modality config of {name} is .*; expected modality_keys, a list of names, and delta_indices, a l",
            )
            for name, wrong in (
                ("video", {"modality_keys": 5}),
                ("state", {"modality_keys": [5]}),
                ("state", {"delta_indices": 0}),
                ("state", {"delta_indices": ["0"]}),
                ("language", {"modality_keys": TASK_KEY}),
            )
        ),
        (
            modality_config("n1.5") | {"state": {"as_json": "not json"}},
            r"its modality config of state is 'not json'; expected modality_keys",
        ),
        (msgpack.packb(3), "the answer to get_modality_config is 3; expected"),
        (b"\xc1", "are no msgpack message .*; expected Isaac-GR00T's messages"),
    ],
)
def test_a_server_of_another_robot_is_refused(config: Any, message: str):
    with isaac_server(lambda request: None, config) as address:
        with pytest.raises(ValueError, match=message) as error:
            connect(address, 5)
        assert str(error.value).startswith(f"policy server {address}")


def test_errors_of_isaac_are_told():
    reply = {"error": "Video key 'video.image' must be in observation"}
    message = r"(?s)answers get_action with an error: Video key .*--use-sim-policy-wrapper"
    config = modality_config("n1.6")
    with isaac_client(lambda request: reply, config) as client, pytest.raises(ValueError, match=message):
        ask(client)


def test_an_isaac_server_that_dies_or_hangs_midway_is_told():
    config, message = modality_config("n1.6"), r"policy server zmq://.* went away before it answered .* --resume"
    with isaac_client(lambda request: None, config) as client, pytest.raises(ConnectionError, match=message):
        ask(client)
    is_over, reply = threading.Event(), [parts_of(2, 0.0), {}]
    with isaac_client(lambda request: is_over.wait(30) and reply, config, timeout_s=0.3) as client:
        with pytest.raises(ConnectionError, match=rf"policy server {client.address} has not answered for 0.3 s"):
            ask(client)
        is_over.set()
