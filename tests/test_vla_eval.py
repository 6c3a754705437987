"""vla-eval's own client and benchmark, in a virtual environment of its own, asking our server; `make test-installs`."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr00t_agent import Gr00tAgent
from gr00t_agent.data_config import read_metadata
from gr00t_agent.loading import NANO_METADATA
from gr00t_agent.messages import pack_vla_eval
from gr00t_agent.policy_server import ServedPolicy, make_server
from tests.algorithms.tiny_agent import tiny_agent
from tests.test_installs import Environment

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]

# Plays two episodes of the harness's own LIBERO benchmark, whose simulator is replaced by recorded observations.
CLIENT = """
import asyncio, json, sys
import numpy as np
from vla_eval.benchmarks.libero.benchmark import LIBEROBenchmark
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import decode_ndarray
from vla_eval.runners import SyncEpisodeRunner
from vla_eval.specs import DimSpec, check_specs
import msgpack

raw = msgpack.unpackb(open(sys.argv[2], "rb").read(), object_hook=decode_ndarray)
executed = []

class Controller:
    ee_pos, ee_ori_mat = np.zeros(3), np.eye(3)

class Robot:
    controller = Controller()

class Simulator:
    robots = [Robot()]
    def reset(self): self.steps = 0
    def set_init_state(self, state): return raw[0]
    def step(self, action):
        self.steps += 1
        executed.append(action)
        return raw[self.steps], 0.0, False, {}
    def render(self): return None
    def close(self): pass

class Benchmark(LIBEROBenchmark):
    def reset(self, task):
        self._env = Simulator()
        self._env.reset()
        return raw[0]

async def main():
    connection = Connection("ws://127.0.0.1:" + sys.argv[1])
    await connection.connect(benchmark="libero")
    said = connection.server_info
    benchmark = Benchmark(num_steps_wait=0, **said["observation_params"])
    actions, observations = (
        {key: DimSpec.from_dict(spec) for key, spec in said[name].items()}
        for name in ("action_spec", "observation_spec")
    )
    warnings = check_specs(actions, benchmark.get_action_spec(), observations, benchmark.get_observation_spec())
    task = {"name": "open the drawer", "suite": "libero_goal", "task_id": 0}
    for _ in range(2):
        await SyncEpisodeRunner().run_episode(benchmark, task, connection, max_steps=5)
    try:
        await connection.act({"images": {}})
        error = None
    except RuntimeError as raised:
        error = str(raised)
    await connection.close()
    print(json.dumps({"warnings": warnings, "executed": executed, "error": error}))

asyncio.run(main())
"""


def test_vla_evals_libero_is_answered_by_our_server(tmp_path: Path):
    rng = np.random.default_rng(0)
    raw: list[dict[str, Any]] = [
        {
            f"{camera}_image": rng.integers(0, 256, (256, 256, 3), np.uint8)
            for camera in ("agentview", "robot0_eye_in_hand")
        }
        | {"robot0_eef_pos": rng.normal(size=3), "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0])}
        | {"robot0_gripper_qpos": rng.normal(size=2)}
        for _ in range(6)
    ]
    path = tmp_path / "raw"
    path.write_bytes(pack_vla_eval(raw))

    torch.manual_seed(0)
    agent: Gr00tAgent = tiny_agent(read_metadata(NANO_METADATA, "libero_franka"), num_action_chunks=3).eval()
    policy = ServedPolicy(agent, "tiny", seed=5, resize=True)
    generator = policy.generator()
    expected: list[np.ndarray] = []
    for i, length in ((0, 3), (3, 2)):
        seen = raw[i]
        state = np.concatenate([seen["robot0_eef_pos"], [np.pi, 0.0, 0.0], seen["robot0_gripper_qpos"]])
        request = {
            "observation/image": seen["agentview_image"][::-1, ::-1],  # LIBERO's pictures are upside down
            "observation/wrist_image": seen["robot0_eye_in_hand_image"][::-1, ::-1],
            "observation/state": state,
            "prompt": "open the drawer",
        }
        expected += list(policy.infer(request, generator)["actions"][:length])
    expected = [np.append(action[:6], -1.0 if action[6] < 0 else 1.0) for action in expected]  # the benchmark's doing

    fresh = Environment(tmp_path, "vla-eval==0.8.0")
    with make_server(policy, port=0, protocol="vla-eval") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            said = json.loads(fresh.run("-c", CLIENT, str(server.socket.getsockname()[1]), str(path)).splitlines()[-1])
        finally:
            server.shutdown()
            thread.join()
    assert said["warnings"] == []
    np.testing.assert_allclose(said["executed"], expected * 2, rtol=0, atol=1e-6)
    assert "the observation lacks images/agentview" in said["error"]
