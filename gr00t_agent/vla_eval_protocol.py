"""vla-eval's websocket protocol, by which its benchmarks ask a policy: one observation, one action.

A message is a msgpack map {"type", "payload", "seq", "timestamp"}; an answer has the seq of what it answers.

    hello           {"protocol_version": 1, ...} -> the same, with what the benchmark has to send ("observation_params":
                    wrist picture and state) and how both sides compose it ("action_spec", "observation_spec")
    episode_start   begins an episode; no answer
    observation     {"images": {"agentview": uint8 [height, width, 3], "wrist": the same}, "states" [8] (as
                    "observation/state" of `gr00t_agent.policy_server`), "task_description": str}
                    -> action {"actions": float32 [7]}: of a chunk, its steps one after another, as many as the policy
                    executes of one
    episode_end     no answer
    error           {"error": str}, in answer to what the client can mend, and to other types: the connection stays open
                    (to what is no such message it has seq 0, and the connection is closed)

An episode's noise depends on the server's seed and on nothing else, so that an episode that is played again is the
same, whatever was played before it and beside it.

Source: vla-eval 0.8.0, `protocol/messages.py`, `model_servers/serve.py`, `benchmarks/libero`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection

from gr00t_agent.files import is_whole
from gr00t_agent.messages import pack_vla_eval, unpack_vla_eval

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PROTOCOL_VERSION = 1
KEYS = ("type", "payload", "seq", "timestamp")
ASKED = ("hello", "episode_start", "observation", "episode_end")
CAMERAS = {"agentview": "observation/image", "wrist": "observation/wrist_image"}
OBSERVATION_PARAMS = {"send_wrist_image": True, "send_state": True}
ACTION_DIM = 7
ACTION_SPEC: dict[str, dict[str, Any]] = {
    "position": {"name": "position", "dims": 3, "format": "delta_xyz", "range": [-1, 1]},
    "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle", "range": [-3.15, 3.15]},
    "gripper": {"name": "gripper", "dims": 1, "format": "binary_close_positive", "range": [-1, 1]},
}
OBSERVATION_SPEC: dict[str, dict[str, Any]] = {
    "agentview": {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"},
    "wrist": {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"},
    "state": {"name": "state", "dims": 8, "format": "eef_pos3_axisangle3_gripper2"},
    "language": {"name": "language", "dims": 0, "format": "language"},
}


class Answering(Protocol):
    """What is asked of a policy; `gr00t_agent.policy_server.ServedPolicy` is one, and says what they are."""

    metadata: dict[str, Any]
    num_action_chunks: int

    def generator(self) -> torch.Generator:
        """Return an episode's source of noise."""
        ...

    def infer(self, request: Any, generator: torch.Generator) -> dict[str, Any]:
        """Return the answer to an observation in openpi's keys."""
        ...


class Conversation:
    """What is said over one connection.

    Args:
        policy: What decides.
    """

    def __init__(self, policy: Answering) -> None:
        self._policy = policy
        self._begin_episode()

    @staticmethod
    def check(policy: Answering) -> None:
        """Raise a ValueError unless the policy sees and does what vla-eval's LIBERO asks for."""
        expected, seen = [*CAMERAS.values(), "observation/state", "prompt"], policy.metadata["observation"]
        if seen != expected or policy.metadata["action_dim"] != ACTION_DIM:
            raise ValueError(
                f"the policy takes {', '.join(seen)} and gives {policy.metadata['action_dim']} numbers; vla-eval's "
                f"LIBERO sends {', '.join(expected)} and takes {ACTION_DIM}: serve it by --protocol openpi"
            )

    def run(self, connection: ServerConnection) -> None:
        """Answer until the client goes away."""
        try:
            for data in connection:
                kind, payload, seq = _read(data)
                if answer := self._answer(kind, payload):
                    connection.send(_message(*answer, seq))
        except ValueError as error:  # no message of the protocol's
            connection.send(_message("error", {"error": str(error)}, 0))
            connection.close()
        except ConnectionClosed:
            return

    def _answer(self, kind: str, payload: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        try:
            if kind == "hello":
                return "hello", self._hello(payload)
            if kind == "observation":
                return "action", {"actions": self._act(payload)}
        except ValueError as error:
            return "error", {"error": str(error)}
        if kind == "episode_start":
            self._begin_episode()
            return None
        if kind == "episode_end":
            return None
        return "error", {"error": f"type={kind!r} is no message to a server (valid: {', '.join(ASKED)})"}

    def _hello(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        if (version := payload.get("protocol_version")) != PROTOCOL_VERSION:
            raise ValueError(
                f"the client speaks version {version!r} of the protocol, and this server version {PROTOCOL_VERSION}; "
                "vla-eval 0.8 speaks that"
            )
        return {
            "harness_version": "libero-gr00t",
            "protocol_version": PROTOCOL_VERSION,
            "model_server": self._policy.metadata["model"],
            "capabilities": {},
            "observation_params": OBSERVATION_PARAMS,
            "action_spec": ACTION_SPEC,
            "observation_spec": OBSERVATION_SPEC,
        }

    def _begin_episode(self) -> None:
        self._generator = self._policy.generator()
        self._left: list[NDArray[np.float32]] = []  # of the chunk, the next step first

    def _act(self, payload: Mapping[str, Any]) -> NDArray[np.float32]:
        request = _request(payload)
        if not self._left:
            chunk = self._policy.infer(request, self._generator)["actions"]  # [H, 7]
            self._left = list(chunk[: self._policy.num_action_chunks])
        return self._left.pop(0)


def _request(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return an observation in openpi's keys."""
    images = payload.get("images")
    given: dict[str, Any] = (
        {f"images/{key}": value for key, value in images.items()} if isinstance(images, dict) else {}
    )
    given |= payload
    names = {f"images/{camera}": key for camera, key in CAMERAS.items()}
    names |= {"states": "observation/state", "task_description": "prompt"}
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"the observation lacks {', '.join(missing)} (it has: {', '.join(map(str, given)) or 'nothing'}); give the "
            "benchmark send_wrist_image and send_state, which vla-eval does of itself where it is told to"
        )
    return {key: given[name] for name, key in names.items()}


def _read(data: str | bytes) -> tuple[str, Mapping[str, Any], int]:
    message = unpack_vla_eval(data) if isinstance(data, bytes) else data
    if not isinstance(message, dict) or any(key not in message for key in KEYS):
        raise ValueError(f"a message is a msgpack map of {', '.join(KEYS)}; this one is another")
    if not isinstance(message["payload"], dict):
        raise ValueError(f"payload is {type(message['payload']).__name__}; it must be a map")
    if not is_whole(message["seq"]):
        raise ValueError(f"seq is {message['seq']!r:.80}; it must be a whole number, which the answer has too")
    found = cast(dict[str, Any], message)
    return str(found["type"]), found["payload"], found["seq"]


def _message(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    return pack_vla_eval({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})
