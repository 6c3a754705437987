"""openpi's own client package, in a virtual environment of its own (it pins NumPy 1); `make test-installs`."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.common.policy_clients import connect, openpi_observation
from gr00t_agent import Gr00tAgent
from gr00t_agent.data_config import read_metadata
from gr00t_agent.loading import NANO_METADATA
from gr00t_agent.messages import pack, unpack
from gr00t_agent.policy_server import ServedPolicy, make_server
from tests.algorithms.tiny_agent import tiny_agent

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]

# typing-extensions is imported by openpi-client 0.1.2, which does not ask for it.
PACKAGES = ("openpi-client==0.1.2", "typing-extensions")

# Reads one observation and asks a server of ours twice, over two connections.
CLIENT = """
import json, sys
import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
port, path = int(sys.argv[1]), sys.argv[2]
request = msgpack_numpy.unpackb(open(path, "rb").read())
answers = []
for _ in range(2):
    client = WebsocketClientPolicy("127.0.0.1", port)
    answers.append([client.infer(request)["actions"].tolist() for _ in range(2)])
try:
    client.infer({"prompt": "nothing else"})
    error = None
except RuntimeError as raised:
    error = str(raised)
print(json.dumps({"metadata": client.get_server_metadata(), "answers": answers, "error": error}))
"""
# Forms an observation as openpi's LIBERO client does, and packs it.
FORM = """
import sys
import numpy as np
from openpi_client import image_tools, msgpack_numpy
raw = msgpack_numpy.unpackb(open(sys.argv[1], "rb").read())
element = {}
for key in ("image", "wrist_image"):
    turned = np.ascontiguousarray(raw[key][::-1, ::-1])  # LIBERO's pictures are upside down
    element["observation/" + key] = image_tools.convert_to_uint8(image_tools.resize_with_pad(turned, 224, 224))
element["observation/state"] = raw["state"]
element["prompt"] = raw["prompt"]
sys.stdout.buffer.write(msgpack_numpy.packb(element))
"""
# A server of the package's own messages, as openpi's is made.
SERVER = """
import sys
import numpy as np
from openpi_client import msgpack_numpy
from websockets.sync.server import serve
def converse(connection):
    connection.send(msgpack_numpy.packb({"reset_pose": np.zeros(2), "name": "pi"}))
    for message in connection:
        obs = msgpack_numpy.unpackb(message)
        value = obs["observation/state"].sum() + obs["observation/image"].mean() + len(obs["prompt"])
        connection.send(msgpack_numpy.packb({"actions": np.full((10, 7), value), "server_timing": {"infer_ms": 1.0}}))
with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
    print(server.socket.getsockname()[1], flush=True)
    server.serve_forever()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openpi") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def agent() -> Gr00tAgent:
    torch.manual_seed(0)
    return tiny_agent(read_metadata(NANO_METADATA, "libero_franka")).eval()


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(python: Path, code: str, *arguments: Any) -> bytes:
    command = [python, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, env=clean_environment(), capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout


@pytest.fixture
def obs() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {
        f"video.{n}": rng.integers(0, 256, (1, 256, 256, 3), np.uint8) for n in ("image", "wrist_image")
    }
    made |= {f"state.{n}": rng.normal(size=(1, 1)).astype(np.float32) for n in ("x", "y", "z", "roll", "pitch", "yaw")}
    made["state.gripper"] = rng.normal(size=(1, 2)).astype(np.float32)
    return made | {"annotation.human.action.task_description": np.array(["open the drawer"])}


def test_our_client_sends_what_openpis_libero_client_sends(python: Path, obs: dict[str, Any], tmp_path: Path):
    ours = openpi_observation(obs, 0, 224)
    raw = {key: obs[f"video.{key}"][0][::-1, ::-1] for key in ("image", "wrist_image")}
    path = tmp_path / "raw"
    path.write_bytes(pack(raw | {"state": ours["observation/state"], "prompt": ours["prompt"]}))
    assert run(python, FORM, path) == pack(ours)  # to the last bit of the resized pictures


def test_openpis_client_is_answered_by_our_server(python: Path, agent: Gr00tAgent, obs: dict[str, Any], tmp_path: Path):
    request = openpi_observation(obs, 0, 32)
    path = tmp_path / "request"
    path.write_bytes(pack(request))
    policy = ServedPolicy(agent, "tiny", seed=5)
    with make_server(policy, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        said = json.loads(run(python, CLIENT, server.socket.getsockname()[1], path))
        server.shutdown()
        thread.join()
    generator = policy.generator()
    expected = [policy.infer(unpack(path.read_bytes()), generator)["actions"] for _ in range(2)]
    assert not np.array_equal(*expected)
    for answers in said["answers"]:
        np.testing.assert_array_equal(np.array(answers, np.float32), expected)
    assert said["metadata"] == policy.metadata
    assert "the observation has ['prompt']; it must have observation/image" in said["error"]


@pytest.fixture
def address(python: Path) -> Iterator[str]:
    command = [python, "-c", SERVER]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"ws://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def test_our_client_understands_openpis_messages(address: str, obs: dict[str, Any]):
    with closing(connect(address, 5)) as client:
        assert client.description == {"reset_pose": [0.0, 0.0], "name": "pi"}
        client.begin_episodes([0])  # pyright: ignore[reportAttributeAccessIssue]
        chunks = client.predict(obs, generator=[torch.Generator()])
    sent = openpi_observation(obs, 0, 224)
    value = sent["observation/state"].sum() + sent["observation/image"].mean() + len("open the drawer")
    np.testing.assert_allclose(chunks.numpy(), np.full((1, 10, 7), value), rtol=1e-6)
