"""The server over real sockets: what it answers, by value, and what it says to clients that do wrong."""

import io
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from gr00t_agent import Gr00tAgent, serve
from gr00t_agent.data_config import read_metadata
from gr00t_agent.loading import NANO_METADATA
from gr00t_agent.messages import pack, pack_vla_eval, unpack, unpack_vla_eval
from gr00t_agent.policy_server import ServedPolicy, make_server
from tests.algorithms.tiny_agent import tiny_agent

ROOT = Path(__file__).resolve().parents[2]
H = 16


@pytest.fixture(scope="module")
def agent() -> Gr00tAgent:
    torch.manual_seed(0)
    return tiny_agent(read_metadata(NANO_METADATA, "libero_franka"), num_action_chunks=3).eval()


@pytest.fixture(scope="module")
def port(agent: Gr00tAgent) -> Iterator[int]:
    server = make_server(ServedPolicy(agent, "tiny", seed=7), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.socket.getsockname()[1]
    server.shutdown()
    thread.join()


def open_at(port: int) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)


def observation(number: int = 0, /, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {
        "observation/image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=8),
        "prompt": "open the drawer",
    } | changes


def ask(connection: ClientConnection, request: dict[str, Any]) -> dict[str, Any]:
    connection.send(pack(request))
    answer = connection.recv(timeout=60)
    assert isinstance(answer, bytes), answer
    return unpack(answer)


def predicted(agent: Gr00tAgent, request: dict[str, Any], generator: torch.Generator) -> np.ndarray:
    state = request["observation/state"].astype(np.float32)
    names = ("x", "y", "z", "roll", "pitch", "yaw")
    obs = {f"state.{name}": state[None, i : i + 1] for i, name in enumerate(names)}
    obs |= {"state.gripper": state[None, 6:], "annotation.human.action.task_description": [request["prompt"]]}
    obs |= {f"video.{name}": request[f"observation/{name}"][None] for name in ("image", "wrist_image")}
    return agent.predict(obs, generator=[generator], num_steps=H)[0].numpy()


def test_the_metadata_say_what_is_wanted(port: int):
    with open_at(port) as connection:
        metadata = unpack(connection.recv())  # pyright: ignore[reportArgumentType]
    assert metadata == {
        "model": "tiny",
        "image_size": 32,
        "action_horizon": H,
        "action_dim": 7,
        "denoising_steps": 4,
        "compute_dtype": "float32",
        "observation": ["observation/image", "observation/wrist_image", "observation/state", "prompt"],
        "takes_seed": True,
    }


def test_answers_are_the_agents_whole_chunks_and_depend_on_the_seed_alone(agent: Gr00tAgent, port: int):
    generator = torch.Generator().manual_seed(7)
    expected = [predicted(agent, observation(i), generator) for i in range(3)]
    assert expected[0].shape == (H, 7)
    for _ in range(2):  # a new connection begins anew
        with open_at(port) as connection:
            connection.recv()
            for i in range(3):
                answer = ask(connection, observation(i))
                np.testing.assert_array_equal(answer["actions"], expected[i])
                assert answer["server_timing"]["infer_ms"] > 0
                # One with a seed of its own takes nothing from the others' noise; openpi's client may send NumPy's.
                with_seed = ask(connection, observation(i, seed=np.int64(99) if i else 99))["actions"]
                np.testing.assert_array_equal(
                    with_seed, predicted(agent, observation(i), torch.Generator().manual_seed(99))
                )
                assert not np.array_equal(with_seed, expected[i])


def test_it_is_healthy(port: int):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "prompt is 3; it must be the instruction, a str"),
        (
            {"observation/image": np.zeros((3, 32, 32), np.uint8)},
            "observation/image is uint8 (3, 32, 32); it must be uint8 (height, width, 3) of at least one pixel",
        ),
        (
            {"observation/state": np.zeros(7)},
            "observation/state is float64 (7,); it must be numbers (8,): state.x (1), state.y (1)",
        ),
        ({"observation/state": np.full(8, np.nan)}, "state.x of row 0 is [nan]; it must be finite numbers"),
        (
            {"observation/image": np.zeros((0, 5, 3), np.uint8)},
            "observation/image is uint8 (0, 5, 3); it must be uint8 (height, width, 3) of at least one pixel",
        ),
        ({"seed": -1}, "seed is -1; it must be a whole number in 0 to 2^63 - 1"),
        ({"seed": np.uint64(2**63)}, "it must be a whole number in 0 to 2^63 - 1"),
        ({"seed": np.float32(3)}, "it must be a whole number in 0 to 2^63 - 1"),
        ({"seed": True}, "seed is True; it must be a whole number in 0 to 2^63 - 1"),
    ],
)
def test_a_wrong_observation_is_told_and_the_server_goes_on(port: int, changes: dict[str, Any], message: str):
    with open_at(port) as connection:
        connection.recv()
        connection.send(pack(observation(**changes)))
        answer = connection.recv(timeout=60)
        assert isinstance(answer, str)
        assert message in answer
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=60)
    with open_at(port) as connection:
        connection.recv()
        assert ask(connection, observation())["actions"].shape == (H, 7)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("hello", "the message is text, 'hello'; send an observation in msgpack"),
        (b"\xc1", "1 bytes that begin with b'\\xc1' are no msgpack message"),
        (pack([1]), "the observation has list; it must have observation/image, observation/wrist_image"),
        (pack({"prompt": "a"}), "the observation has ['prompt']; it must have observation/image"),
    ],
)
def test_what_is_no_observation_is_told(port: int, sent: str | bytes, message: str):
    with open_at(port) as connection:
        connection.recv()
        connection.send(sent)
        answer = connection.recv(timeout=60)
        assert isinstance(answer, str)
        assert message in answer


def test_pictures_of_another_size_are_refused_or_resized(agent: Gr00tAgent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(agent.preprocessor.metadata), "resolution", lambda self, key: (32, 32))
    large = observation(1, **{"observation/image": np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)})
    with pytest.raises(ValueError, match=r"observation/image is 64x64 pixels, and the model saw 32x32: .* --resize$"):
        ServedPolicy(agent, "tiny").infer(large, torch.Generator())
    picture = Image.fromarray(large["observation/image"]).resize((32, 32), Image.Resampling.BILINEAR)
    small = large | {"observation/image": np.asarray(picture)}
    resizing = ServedPolicy(agent, "tiny", resize=True)
    one, two = (resizing.infer(request, torch.Generator().manual_seed(1))["actions"] for request in (large, small))
    np.testing.assert_array_equal(one, two)
    empty = large | {"observation/image": np.zeros((0, 5, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"observation/image is uint8 \(0, 5, 3\); it must be .* at least one pixel"):
        resizing.infer(empty, torch.Generator())


def test_a_mistake_on_the_command_line_is_told_before_torch_is_imported():
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.argv = ['serve', '--model', 'nowhere']\n"
        "runpy.run_module('gr00t_agent.serve', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert "--model nowhere is no folder, no hub id (owner/name) and no preset (nano, gr00t_n1d5)" in ended.stderr


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_ports_that_there_are_not_are_refused(port: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--model", "nano", "--port", port])
    assert ended.value.code == 2
    assert f"error: --port {port} is no TCP port (valid: 0-65535; 0 takes a free one)" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_seeds_that_there_are_not_are_refused(seed: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--model", "nano", "--seed", seed])
    assert ended.value.code == 2
    assert f"error: --seed {seed} is no seed (valid: 0-9223372036854775807)" in capsys.readouterr().err


def test_a_checkpoint_without_a_statistic_is_told_in_one_line(
    agent: Gr00tAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    agent.save_pretrained(tmp_path)
    file = tmp_path / "experiment_cfg" / "metadata.json"
    metadata = json.loads(file.read_text())
    del metadata["libero_franka"]["statistics"]["state"]["x"]["q01"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(SystemExit) as ended:
        serve.main(["--model", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}")
    assert "q01" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_there_is_not_is_told_in_one_message(device: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve.main(["--model", "nano", "--device", device])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: device='{device}' cannot be used here (")


@pytest.mark.slow
def test_the_program_serves_a_checkpoint(agent: Gr00tAgent, tmp_path: Path):
    agent.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "gr00t_agent.serve", "--model", str(tmp_path), "--port", "0", "--seed", "7"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            assert line.startswith(f"serving {tmp_path} at ws://127.0.0.1:")
            with open_at(int(line.rpartition(":")[2])) as connection:
                connection.recv()
                actions = ask(connection, observation())["actions"]
        finally:
            process.terminate()
    expected = predicted(agent, observation(), torch.Generator().manual_seed(7))
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)  # this process may compute with other threads


# vla-eval's protocol; its own client is in tests/test_vla_eval.py.


@pytest.fixture(scope="module")
def vla_eval_port(agent: Gr00tAgent) -> Iterator[int]:
    server = make_server(ServedPolicy(agent, "tiny", seed=7), port=0, protocol="vla-eval")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.socket.getsockname()[1]
    server.shutdown()
    thread.join()


def say(connection: ClientConnection, kind: str, payload: dict[str, Any], seq: int = 5) -> None:
    connection.send(pack_vla_eval({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}))


def hear(connection: ClientConnection) -> tuple[str, dict[str, Any], int]:
    answer = connection.recv(timeout=60)
    assert isinstance(answer, bytes)
    message = unpack_vla_eval(answer)
    return message["type"], message["payload"], message["seq"]


def vla_eval_observation(number: int = 0, /) -> dict[str, Any]:
    known = observation(number)
    file = io.BytesIO()
    Image.fromarray(known["observation/image"]).save(file, format="PNG")
    encoded = {"__image__": True, "format": "png", "data": file.getvalue(), "shape": [32, 32, 3]}
    images = {"agentview": encoded, "wrist": known["observation/wrist_image"]}
    return {"images": images, "states": known["observation/state"], "task_description": known["prompt"]}


def test_vla_eval_gets_one_step_of_a_chunk_after_another(agent: Gr00tAgent, vla_eval_port: int):
    generator = torch.Generator().manual_seed(7)
    chunks = [predicted(agent, observation(i), generator) for i in (0, 3)]
    expected = [*chunks[0][:3], *chunks[1][:1]]  # three steps of a chunk are executed
    with open_at(vla_eval_port) as connection:
        say(connection, "hello", {"protocol_version": 1, "harness_version": "0.8.0"})
        kind, payload, seq = hear(connection)
        assert (kind, seq, payload["model_server"]) == ("hello", 5, "tiny")
        assert payload["observation_params"] == {"send_wrist_image": True, "send_state": True}
        for _ in range(2):  # an episode begins anew
            say(connection, "episode_start", {"task": {"name": "open the drawer"}})
            for i, action in enumerate(expected):
                say(connection, "observation", vla_eval_observation(i), seq=i)
                kind, payload, seq = hear(connection)
                assert (kind, seq) == ("action", i)
                assert payload["actions"].dtype == np.float32
                np.testing.assert_array_equal(payload["actions"], action)
            say(connection, "episode_end", {"success": False})
    with urllib.request.urlopen(f"http://127.0.0.1:{vla_eval_port}/health") as answer:
        assert answer.status == 200


def test_vla_eval_is_told_what_it_does_wrong(vla_eval_port: int):
    without_wrist = vla_eval_observation() | {"images": {"agentview": np.zeros((32, 32, 3), np.uint8)}}
    short_state = vla_eval_observation() | {"states": np.zeros(7)}
    with open_at(vla_eval_port) as connection:
        for kind, payload, message in (
            (
                "hello",
                {"protocol_version": 2},
                "the client speaks version 2 of the protocol, and this server version 1",
            ),
            (
                "observation",
                without_wrist,
                "the observation lacks images/wrist (it has: images/agentview, images, states",
            ),
            ("observation", short_state, "observation/state is float64 (7,); it must be numbers (8,)"),
            ("observation", {}, "the observation lacks images/agentview"),
            ("observe", {}, "type='observe' is no message to a server (valid: hello, episode_start, observation, "),
        ):
            say(connection, kind, payload)
            kind, payload, seq = hear(connection)
            assert (kind, seq) == ("error", 5)
            assert message in payload["error"]
        say(connection, "observation", vla_eval_observation())
        assert hear(connection)[0] == "action"  # the connection is still open
        connection.send(pack_vla_eval([1, 2]))
        kind, payload, _ = hear(connection)
        assert kind == "error"
        assert "a message is a msgpack map of type, payload, seq, timestamp" in payload["error"]
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=60)


@pytest.mark.parametrize("seq", [None, [1], "5", 1.5, True])
def test_vla_eval_is_told_that_a_message_has_no_number(vla_eval_port: int, seq: Any):
    with open_at(vla_eval_port) as connection:
        say(connection, "hello", {"protocol_version": 1}, seq=seq)
        kind, payload, _ = hear(connection)
        assert (kind, payload["error"]) == (
            "error",
            f"seq is {seq!r}; it must be a whole number, which the answer has too",
        )
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=60)


def test_vla_eval_asks_no_policy_of_another_robot(agent: Gr00tAgent):
    policy = ServedPolicy(agent, "tiny")
    policy.metadata["action_dim"] = 32
    with pytest.raises(ValueError, match=r"gives 32 numbers; vla-eval's LIBERO sends .* serve it by --protocol openpi"):
        make_server(policy, port=0, protocol="vla-eval")


def test_damaged_pictures_are_no_message():
    broken = {"__image__": True, "format": "png", "data": b"nothing", "shape": [2, 2, 3]}
    with pytest.raises(ValueError, match="are no msgpack message with arrays"):
        unpack_vla_eval(pack_vla_eval(broken))
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, format="PNG")  # 400 million pixels in 50 kB
    bomb = broken | {"data": file.getvalue()}
    with pytest.raises(ValueError, match=r"are no msgpack message with arrays .*exceeds limit"):
        unpack_vla_eval(pack_vla_eval(bomb))
    raw = {"__image__": True, "format": "raw", "data": bytes(range(12)), "dtype": "|u1", "shape": [2, 2, 3]}
    np.testing.assert_array_equal(unpack_vla_eval(pack_vla_eval(raw)), np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert unpack_vla_eval(pack_vla_eval({"a": np.float32(0.5), "b": np.int64(3)})) == {"a": 0.5, "b": 3}
