"""Policies whose servers decide, as an evaluation takes them: openpi's websocket protocol and Isaac-GR00T's over ZMQ.

    connect("ws://localhost:8000", num_action_chunks=5)      openpi's `serve_policy.py`, or `gr00t_agent.serve`
    connect("zmq://localhost:5555", num_action_chunks=8)     NVIDIA's `inference_service.py`, `run_gr00t_server.py`

Whatever a server does wrong, it is not there, answers something else than finite actions of the right shape, or goes
away, ends in one error that names its address, what it gave and what was expected.

openpi's server gets one observation at a time, formed as openpi's LIBERO client forms it (`examples/libero/main.py`):
pictures of 256 pixels, turned upright (as our environments show them), resized to 224 by Pillow's bilinear filter, the
state of 8 numbers and the instruction. Its `resize_with_pad` has nothing to pad on a square. A server that says
"image_size" in its metadata, as ours does, gets pictures that were drawn at that size, and one that says "takes_seed" a
seed from the episode's generator with each observation. Actions go to the environment as they come.

Isaac-GR00T's server gets GR00T's modality keys, pictures of 256 pixels, and answers with `action.*`, whose gripper is
turned round as its LIBERO client does (`libero_gym.adapters.action_from_modality`). What it speaks tells its answer to
`get_modality_config`: GR00T-N1.5's gets one observation at a time [T = 1, ...], N1.6's and N1.7's, started with
`--use-sim-policy-wrapper`, all environments at once [B, T = 1, ...]. The instruction goes under the key that the answer
names. The first releases of N1.5 sent torch.save's pickles, which run whatever code they hold: they are recognised and
refused.

Shape legend: N environments, C executed steps of a chunk of H steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, cast

import numpy as np
import torch
import zmq
import zmq.utils.monitor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from algorithms.common.policies import check_is_numbers, checked_chunk
from algorithms.common.policy_sources import check_address
from algorithms.common.video import IMAGE_KEYS, TASK_KEY
from gr00t_agent.messages import pack, pack_npy, unpack, unpack_npy
from libero_gym.adapters import action_from_modality
from libero_gym.options import MAX_IMAGE_SIZE
from libero_gym.tasks.suites import is_integer

# openpi's LIBERO client: LIBERO_ENV_RESOLUTION and resize_size; its keys of the two cameras.
CAMERA_SIZE, SENT_SIZE = 256, 224
CAMERAS = dict(zip(("observation/image", "observation/wrist_image"), IMAGE_KEYS, strict=True))
STATE_KEYS = tuple(f"state.{name}" for name in ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))
# A server that is there accepts at once; the first answer may wait for a model to compile.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 300.0
_POLL_MS = 200
_ZIP = b"PK\x03\x04"


class PolicyClient(Protocol):
    """A policy whose server decides; also an `EpisodicPolicy`.

    Attributes:
        address: of the server.
        image_size: of the cameras, pixels.
        description: what the server says of itself, JSON values.
    """

    address: str
    image_size: int
    description: dict[str, Any]

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns whole chunks, float32 [N, H, 7]; zeros where no episode is.

        Raises:
            ConnectionError: the server is gone, or does not answer in time.
            ValueError: it answers with an error, or with no finite actions of this shape.
        """
        ...

    def close(self) -> None:
        """Ends the connection; a second call does nothing."""
        ...


def connect(address: str, num_action_chunks: int, *, timeout_s: float = ANSWER_TIMEOUT_S) -> PolicyClient:
    """Returns a policy whose server listens at `address`.

    Args:
        address: see `algorithms.common.policy_sources`.
        num_action_chunks: C; shorter chunks are refused.
        timeout_s: seconds to wait for an answer.

    Raises:
        ConnectionError: nobody is there, or does not answer in time.
        ValueError: it is no address, or the server speaks otherwise.
    """
    check_address(address)
    client = IsaacClient if address.startswith("zmq://") else OpenpiClient
    return client(address, num_action_chunks, timeout_s)


class _Client:
    """What both have in common: who decides for whom, and how errors begin."""

    def __init__(self, address: str, num_action_chunks: int, timeout_s: float) -> None:
        self.address = address
        self._num_steps, self._timeout_s = num_action_chunks, timeout_s
        self._acting: set[int] = set()
        self._who = f"policy server {address}"

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        """Asks for decisions for these environments from now on."""
        self._acting.update(env_ids)

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        """Asks for no more decisions for these environments."""
        self._acting.difference_update(env_ids)

    def predict(self, obs: Any, *, generator: Sequence[torch.Generator]) -> Tensor:
        """Returns whole chunks, see `PolicyClient`."""
        acting = sorted(self._acting)
        answers = self._decide(obs, acting, generator)
        lengths = {len(answer) for answer in answers}
        if len(lengths) != 1:
            raise ValueError(
                f"{self._who}: chunks of {sorted(lengths)} steps came in one decision; expected equally many in each"
            )
        chunks = np.zeros((len(generator), *answers[0].shape), np.float32)
        chunks[acting] = answers
        return torch.from_numpy(chunks)

    def _decide(
        self, obs: Any, acting: Sequence[int], generator: Sequence[torch.Generator]
    ) -> Sequence[NDArray[np.float32]]:
        """Returns a chunk [H, 7] for each environment of `acting`."""
        raise NotImplementedError

    def _not_there(self, reason: Any) -> ConnectionError:
        return ConnectionError(
            f"{self._who} cannot be reached ({reason}); start it, wait until it has loaded its model, or give another "
            "address by --policy-server"
        )

    def _silent(self) -> ConnectionError:
        return ConnectionError(
            f"{self._who} has not answered for {self._timeout_s:g} s; look at what it prints, or give more time by "
            "--policy-timeout. Episodes that ended are kept: --resume goes on"
        )

    def _gone(self, reason: Any) -> ConnectionError:
        return ConnectionError(
            f"{self._who} went away before it answered ({reason}); start it again. Episodes that ended are kept: "
            "--resume goes on"
        )


class OpenpiClient(_Client):
    """A policy behind openpi's websocket protocol; see the module and `connect`."""

    def __init__(self, address: str, num_action_chunks: int, timeout_s: float) -> None:
        super().__init__(address, num_action_chunks, timeout_s)
        self._resources = ExitStack()
        try:
            # Servers that answer in the thread that reads, as openpi's, are deaf to pings meanwhile.
            connection = open_websocket(
                address, compression=None, max_size=None, open_timeout=CONNECT_TIMEOUT_S, ping_interval=None
            )
            self._socket: ClientConnection = self._resources.enter_context(connection)
        except (OSError, InvalidHandshake, InvalidURI, EOFError) as error:
            raise self._not_there(error) from error
        try:
            self._read_metadata(self._receive())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection; a second call does nothing."""
        self._resources.close()

    def _read_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, Mapping):
            raise ValueError(f"{self._who}: metadata are {metadata!r:.200}; expected a dict, as openpi's servers send")
        self.description: dict[str, Any] = _json_values(metadata)
        size = metadata.get("image_size")
        if size is not None and (not is_integer(size) or not 1 <= size <= MAX_IMAGE_SIZE):
            raise ValueError(
                f"{self._who}: image_size is {size!r}; expected pixels, a whole number in 1-{MAX_IMAGE_SIZE}"
            )
        self._is_resized = size is None
        self.image_size = CAMERA_SIZE if size is None else int(size)
        self._takes_seed = metadata.get("takes_seed") is True

    def _decide(
        self, obs: Any, acting: Sequence[int], generator: Sequence[torch.Generator]
    ) -> Sequence[NDArray[np.float32]]:
        chunks: list[NDArray[np.float32]] = []
        for i in acting:
            request = openpi_observation(obs, i, SENT_SIZE if self._is_resized else None)
            if self._takes_seed:
                request["seed"] = int(torch.randint(2**62, (), generator=generator[i]))
            try:
                self._socket.send(pack(request))
            except ConnectionClosed as error:
                raise self._gone(error) from error
            answer = self._receive()
            if not isinstance(answer, Mapping) or "actions" not in answer:
                given = f"the keys {sorted(map(str, answer))}" if isinstance(answer, Mapping) else repr(answer)[:200]
                raise ValueError(f"{self._who}: the answer is {given}; expected a dict with 'actions'")
            chunks.append(checked_chunk(answer["actions"], self._num_steps, self._who))
        return chunks

    def _receive(self) -> Any:
        try:
            message = self._socket.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            raise self._silent() from error
        except ConnectionClosed as error:
            raise self._gone(error) from error
        if isinstance(message, str):
            raise ValueError(f"{self._who} answers with an error:\n{message.strip()}")
        try:
            return unpack(message)
        except ValueError as error:
            raise ValueError(f"{self._who}: {error}; expected openpi's messages") from error


def openpi_observation(obs: Any, env_id: int, resized_to: int | None) -> dict[str, Any]:
    """Returns what openpi's LIBERO client would send of an environment.

    Args:
        obs: observation with GR00T's modality keys.
        env_id: which row of it.
        resized_to: height and width of the pictures that are sent; None sends them as they are.
    """
    request: dict[str, Any] = {key: _picture(obs[name][env_id], resized_to) for key, name in CAMERAS.items()}
    parts = [np.asarray(obs[key][env_id], np.float64) for key in STATE_KEYS]
    return request | {"observation/state": np.concatenate(parts), "prompt": str(obs[TASK_KEY][env_id])}


def _picture(picture: Any, resized_to: int | None) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = np.ascontiguousarray(picture)
    if resized_to is None or array.shape[:2] == (resized_to, resized_to):
        return array
    return np.asarray(Image.fromarray(array).resize((resized_to, resized_to), Image.Resampling.BILINEAR))


class IsaacClient(_Client):
    """A policy behind Isaac-GR00T's ZMQ server; see the module and `connect`."""

    image_size = CAMERA_SIZE

    def __init__(self, address: str, num_action_chunks: int, timeout_s: float) -> None:
        super().__init__(address, num_action_chunks, timeout_s)
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._events: Any = self._socket.get_monitor_socket()
        self._socket.connect(address.replace("zmq://", "tcp://", 1))
        try:
            self._wait_for_connection()
            config = self._call("get_modality_config")
            self._has_batches, self._language_keys = _dialect(self._who, config)
        except BaseException:
            self.close()
            raise
        self.description: dict[str, Any] = {
            "server": "Isaac-GR00T N1.6 or N1.7" if self._has_batches else "Isaac-GR00T N1.5",
            "modality_config": _json_values(config),
        }

    def close(self) -> None:
        """Ends the connection; a second call does nothing."""
        if not self._context.closed:
            self._socket.disable_monitor()
            self._context.destroy(linger=0)

    def _decide(
        self, obs: Any, acting: Sequence[int], generator: Sequence[torch.Generator]
    ) -> Sequence[NDArray[np.float32]]:
        if not self._has_batches:
            return [self._chunk(self._call("get_action", self._rows(obs, i)), None) for i in acting]
        request = {"observation": self._rows(obs, list(acting)), "options": None}
        answer = self._call("get_action", request)
        if not isinstance(answer, list) or not answer:
            raise ValueError(f"{self._who}: the answer is {answer!r:.200}; expected [action, info]")
        return list(self._chunk(cast(list[Any], answer)[0], len(acting)))

    def _rows(self, obs: Any, rows: int | list[int]) -> dict[str, Any]:
        """Returns rows of an observation, [B, T = 1, ...] and B instructions; of a number [T = 1, ...] and one."""
        is_single = isinstance(rows, int)
        texts = [str(obs[TASK_KEY][i]) for i in ([rows] if is_single else rows)]
        picked: dict[str, Any] = dict.fromkeys(self._language_keys, texts)
        for key in (*IMAGE_KEYS, *STATE_KEYS):
            array = np.asarray(obs[key])[rows]
            picked[key] = array[None] if is_single else array[:, None]
        return picked

    def _chunk(self, action: Any, num_rows: int | None) -> NDArray[np.float32]:
        """Returns chunks [B, H, 7] of a batch of `num_rows`, [H, 7] if it is None."""
        if not isinstance(action, Mapping) or not all(isinstance(part, np.ndarray) for part in action.values()):
            raise ValueError(f"{self._who}: the action is {action!r:.200}; expected a dict of arrays action.x, ...")
        parts = cast(Mapping[str, NDArray[Any]], action)
        for key, part in parts.items():
            check_is_numbers(part, f"{self._who}: {key}", "numbers")
        # N1.5 leaves out every axis of one element: action.x of a single observation is [H].
        widened = {key: part[:, None] if num_rows is None and part.ndim == 1 else part for key, part in parts.items()}
        try:
            actions = action_from_modality(widened)
        except ValueError as error:
            raise ValueError(f"{self._who}: {error}") from error
        return checked_chunk(actions, self._num_steps, self._who, num_rows=num_rows)

    def _call(self, endpoint: str, data: Any = None) -> Any:
        request = {"endpoint": endpoint} | ({} if data is None else {"data": data})
        self._socket.send(pack_npy(request))
        message = self._wait_for_answer()
        if message.startswith(_ZIP):
            raise ValueError(
                f"{self._who} answers with torch.save's pickle, as Isaac-GR00T did before it took msgpack; pickles are "
                "never loaded, because they run code: update the server"
            )
        try:
            answer = unpack_npy(message)
        except ValueError as error:
            raise ValueError(f"{self._who}: {error}; expected Isaac-GR00T's messages") from error
        if isinstance(answer, Mapping) and "error" in answer:
            raise ValueError(
                f"{self._who} answers {endpoint} with an error: {answer['error']}\n(expected: GR00T's modality keys of "
                "LIBERO; start N1.6 and N1.7 with --use-sim-policy-wrapper)"
            )
        return answer

    def _wait_for_connection(self) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        failed = (zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_CLOSED, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        failed = (*failed, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_DISCONNECTED)
        while time.monotonic() < deadline:
            if not self._events.poll(_POLL_MS):
                continue
            event = zmq.utils.monitor.recv_monitor_message(self._events)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if event in failed:
                raise self._not_there("nobody who speaks ZMQ listens there")
        raise self._not_there(f"nobody has answered for {CONNECT_TIMEOUT_S:g} s")

    def _wait_for_answer(self) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if self._socket.poll(_POLL_MS):
                return self._socket.recv()
            while self._events.poll(0):
                event = zmq.utils.monitor.recv_monitor_message(self._events)["event"]
                if event == zmq.EVENT_DISCONNECTED:
                    raise self._gone("the connection was closed")
        raise self._silent()


def _dialect(who: str, config: Any) -> tuple[bool, tuple[str, ...]]:
    """Returns whether modality configs are those of N1.6 or N1.7, not of N1.5, and the keys of the instruction.

    Raises:
        ValueError: they are neither, or ask for what LIBERO's environments do not show, or for no instruction.
    """
    configs = {name: entry.get("as_json") for name, entry in config.items()} if _has_configs(config) else {}
    if not {"video", "state", "language"} <= set(configs):
        raise ValueError(
            f"{who}: the answer to get_modality_config is {config!r:.200}; expected the configs of video, state, "
            "language and action of Isaac-GR00T N1.5, N1.6 or N1.7"
        )
    is_n1d5 = all(isinstance(given, str) for given in configs.values())
    entries: dict[str, Mapping[str, Any]] = {}
    for name, given in configs.items():
        entry = _from_json(given) if is_n1d5 else given
        if not _is_modality_config(entry):
            raise ValueError(
                f"{who}: its modality config of {name} is {given!r:.200}; expected modality_keys, a list of names, "
                "and delta_indices, a list of whole numbers"
            )
        entries[name] = entry
    for name, keys in (("video", IMAGE_KEYS), ("state", STATE_KEYS)):
        wanted = [f"{name}.{key.removeprefix(f'{name}.')}" for key in entries[name]["modality_keys"]]
        if unknown := sorted(set(wanted) - set(keys)):
            raise ValueError(f"{who}: its model reads {', '.join(unknown)}; expected of {name}: {', '.join(keys)}")
        if entries[name]["delta_indices"] != [0]:
            raise ValueError(
                f"{who}: its model reads {name} at the steps {entries[name]['delta_indices']}; expected the present "
                "alone, [0]"
            )
    language_keys = tuple(entries["language"]["modality_keys"])
    if not language_keys:
        raise ValueError(
            f"{who}: its model reads no instruction, for the modality_keys of language are []; expected the key that "
            f"an instruction goes under, such as {TASK_KEY}"
        )
    return not is_n1d5, language_keys


def _has_configs(config: Any) -> bool:
    return isinstance(config, Mapping) and all(isinstance(entry, Mapping) for entry in config.values())


def _from_json(text: str) -> Any:
    """Returns what a text says in JSON; None, which is no config, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_modality_config(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    keys, indices = entry.get("modality_keys"), entry.get("delta_indices")
    if not isinstance(keys, list) or not isinstance(indices, list):
        return False
    return all(isinstance(key, str) for key in keys) and all(is_integer(index) for index in indices)


def _json_values(value: Any) -> Any:
    """Returns what a message holds as JSON can hold it: arrays as lists, bytes in hexadecimal digits, dates as text."""
    if isinstance(value, Mapping):
        return {str(key): _json_values(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in cast(Sequence[Any], value)]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else str(value)
