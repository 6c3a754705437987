"""A policy behind openpi's websocket protocol, or vla-eval's, which `python -m gr00t_agent.serve` starts.

openpi's client, and whatever speaks as it does, connects, gets the metadata, and sends one observation after another,
each answered by an action chunk. Messages are those of `gr00t_agent.messages`.

    metadata      on connecting: "model", "image_size" (height and width that cameras should have, pixels),
                  "action_horizon" H, "action_dim" a, "denoising_steps", "compute_dtype", "observation" (the keys
                  below), "takes_seed" True
    observation   "observation/<camera>" uint8 [height, width, 3] for each `video.<camera>`, "observation/state" [S]
                  (the state parts in the data config's order, for LIBERO end effector's position (3, m), axis-angle (3,
                  rad) and finger positions (2, m)), "prompt" str; if wanted, "seed" int
    answer        "actions" float32 [H, a], as the environment takes them; "server_timing" {"infer_ms": float}
    GET /healthz  "OK" once the model is loaded

Pictures are as openpi's LIBERO client sends them: turned upright, of both cameras. Actions are deterministic: the noise
that a chunk is denoised from depends on nothing but the observation's "seed", or, if it has none, on the server's seed
and on how many such observations came before it over the same connection.

What the client can mend, a key that is missing or a picture of another size, is told as a message of text, which
openpi's client raises; the connection is then closed, and the server goes on.

vla-eval's protocol is in `gr00t_agent.vla_eval_protocol`. Source of this one: openpi's `websocket_policy_server.py`,
`websocket_client_policy.py` and `examples/libero`. "seed" and the names of the metadata are ours. Needs the extras
`[agent,serve]`.
"""

from __future__ import annotations

import http
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection
from websockets.sync.server import serve as listen

from gr00t_agent.agent import Gr00tAgent
from gr00t_agent.config import MAX_SEED
from gr00t_agent.messages import pack, unpack
from gr00t_agent.vla_eval_protocol import Conversation

ServerProtocol = Literal["openpi", "vla-eval"]
CAMERA_PREFIX, STATE_KEY, PROMPT_KEY, SEED_KEY = "observation/", "observation/state", "prompt", "seed"


class ServedPolicy:
    """Answers observations in openpi's keys, one at a time.

    Args:
        agent: The policy, in eval mode.
        name: What the metadata call it.
        seed: Of the noise of observations that bring no seed.
        resize: Resize pictures of another size than the model's, instead of refusing them.

    Attributes:
        metadata: What openpi's clients are told on connecting.
        num_action_chunks: Steps of a chunk that are executed before the next decision; openpi's clients choose them.
    """

    def __init__(self, agent: Gr00tAgent, name: str, *, seed: int = 0, resize: bool = False) -> None:
        self._agent, self._seed, self._resize = agent, seed, resize
        self._lock = threading.Lock()
        preprocessor = agent.preprocessor
        config = preprocessor.data_config
        self._language_key = config.language_key
        self._cameras = {f"{CAMERA_PREFIX}{key.partition('.')[2]}": key for key in config.video_keys}
        self._state_widths = preprocessor.state_normaliser.widths
        self._sizes = {key: preprocessor.metadata.resolution(key) for key in config.video_keys}
        self.num_action_chunks = agent.policy.num_action_chunks
        self._horizon = agent.config.action_head.action_horizon
        self.metadata: dict[str, Any] = {
            "model": name,
            "image_size": agent.image_size,
            "action_horizon": self._horizon,
            "action_dim": agent.action_dim,
            "denoising_steps": agent.policy.denoising_steps,
            "compute_dtype": agent.policy.compute_dtype,
            "observation": [*self._cameras, STATE_KEY, PROMPT_KEY],
            "takes_seed": True,
        }

    def generator(self) -> torch.Generator:
        """Return a new connection's source of noise."""
        return torch.Generator().manual_seed(self._seed)

    def infer(self, request: Any, generator: torch.Generator) -> dict[str, Any]:
        """Return the answer to an observation.

        Args:
            request: The observation, see the module.
            generator: Its noise, unless it brings a seed.

        Raises:
            ValueError: A key is missing, or holds what it must not.
        """
        obs = self._observation(request)
        if SEED_KEY in request:
            generator = torch.Generator().manual_seed(_seed_of(request[SEED_KEY]))
        start = time.perf_counter()
        with self._lock:
            actions = self._agent.predict(obs, generator=[generator], num_steps=self._horizon)  # [1, H, a]
        milliseconds = 1000 * (time.perf_counter() - start)
        return {"actions": actions[0].cpu().numpy(), "server_timing": {"infer_ms": milliseconds}}

    def _observation(self, request: Any) -> dict[str, Any]:
        expected = self.metadata["observation"]
        given = sorted(map(str, request)) if isinstance(request, Mapping) else type(request).__name__
        if not isinstance(request, Mapping) or any(key not in request for key in expected):
            raise ValueError(f"the observation has {given}; it must have {', '.join(expected)}")
        obs: dict[str, Any] = {}
        for key, name in self._cameras.items():
            obs[name] = self._picture(key, request[key], self._sizes[name])[None]
        obs |= self._state(request[STATE_KEY])
        if not isinstance(request[PROMPT_KEY], str):
            raise ValueError(f"{PROMPT_KEY} is {request[PROMPT_KEY]!r}; it must be the instruction, a str")
        obs[self._language_key] = [request[PROMPT_KEY]]
        return obs

    def _picture(self, key: str, value: Any, size: tuple[int, int] | None) -> NDArray[np.uint8]:
        picture = np.asarray(value)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
            raise ValueError(
                f"{key} is {picture.dtype} {picture.shape}; it must be uint8 (height, width, 3) of at least one pixel"
            )
        if size is None or picture.shape[:2] == size:
            return picture
        if not self._resize:
            raise ValueError(
                f"{key} is {picture.shape[0]}x{picture.shape[1]} pixels, and the model saw {size[0]}x{size[1]}: send "
                "such pictures (openpi's LIBERO client: --args.resize_size), or start the server with --resize"
            )
        return np.asarray(Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR))

    def _state(self, value: Any) -> dict[str, NDArray[np.float32]]:
        """Return the state's parts, each [1, width]; whether they are finite the preprocessor checks."""
        state, width = np.asarray(value), sum(self._state_widths.values())
        if state.dtype.kind not in "iuf" or state.shape != (width,):
            expected = ", ".join(f"{key} ({size})" for key, size in self._state_widths.items())
            raise ValueError(f"{STATE_KEY} is {state.dtype} {state.shape}; it must be numbers ({width},): {expected}")
        parts: dict[str, NDArray[np.float32]] = {}
        start = 0
        for key, size in self._state_widths.items():
            parts[key] = state[None, start : start + size].astype(np.float32)
            start += size
        return parts


def _seed_of(value: Any) -> int:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not 0 <= value <= MAX_SEED:
        raise ValueError(f"{SEED_KEY} is {value!r}; it must be a whole number in 0 to 2^63 - 1")
    return int(value)


def make_server(
    policy: ServedPolicy, host: str = "127.0.0.1", port: int = 8000, *, protocol: ServerProtocol = "openpi"
) -> Server:
    """Return a server that listens; its `serve_forever` answers until another thread calls its `shutdown`.

    Args:
        policy: What answers.
        host: Address to listen at; "0.0.0.0" is reached from other machines too.
        port: TCP port; 0 takes a free one, which `server.socket.getsockname()` tells.
        protocol: What clients speak.

    Raises:
        ValueError: The policy is not for LIBERO's robot and two cameras, and the protocol is vla-eval's.
        OSError: The port is taken, or the address is none of this machine's.
    """
    if protocol == "vla-eval":
        Conversation.check(policy)

    def converse(connection: ServerConnection) -> None:
        if protocol == "vla-eval":
            Conversation(policy).run(connection)
            return
        generator = policy.generator()
        try:
            connection.send(pack(policy.metadata))
            for message in connection:
                connection.send(pack(_answer(policy, message, generator)))
        except ValueError as error:
            connection.send(str(error))
            connection.close(CloseCode.INTERNAL_ERROR, "the message before says what is wrong")
        except ConnectionClosed:
            return

    # A client that simulates may answer no ping for a while.
    options: dict[str, Any] = dict(compression=None, max_size=None, ping_timeout=None)
    return listen(converse, host, port, process_request=_answer_health, **options)


def _answer(policy: ServedPolicy, message: str | bytes, generator: torch.Generator) -> dict[str, Any]:
    if isinstance(message, str):
        raise ValueError(f"the message is text, {message[:40]!r}; send an observation in msgpack")
    return policy.infer(unpack(message), generator)


def _answer_health(connection: ServerConnection, request: Request) -> Response | None:
    paths = ("/healthz", "/health")  # openpi's, vla-eval's
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path in paths else None
