"""Processes that know of each other whether they are there.

A process that is stopped or cut off lets the others wait in a collective operation, whose time-out names nobody. So the
main process and each of the others tell each other every few seconds that they are there, over a connection of their
own that needs no collective operation. The same connection says that work is done for which the others wait patiently,
and that a process was asked to stop, also by one whose main thread waits in a collective operation.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

# A process tells that it is there every BEAT_S seconds. SILENCE_S after its last word it counts as stopped, longer than
# a write to a slow disk keeps Python from saying so; GRACE_S after its end without a farewell the others end too, if
# their launcher has not ended them.
BEAT_S, SILENCE_S, GRACE_S = 10.0, 600.0, 120.0


@dataclass
class _Peer:
    """The other end of a connection between the main process and another one."""

    connection: socket.socket
    name: str
    last_word: float = field(default_factory=time.monotonic)
    ended: float | None = None


class Watch:
    """Tells the main process and the others of each other's being there, and of work that is done.

    A thread says so for each process; whether its main thread gets on, the time-outs of collective operations and of
    environments watch over. If a process is not heard of, this one is ended, because its main thread waits where
    nothing can reach it.

    Attributes:
        stop_signal: SIGTERM or SIGINT once any process has got it, else None.
        thread: what works.
        signals: the end of a socket at which it reads numbers of signals.
        wakeup: the other end, where Python writes them as soon as they come (`signal.set_wakeup_fd`).
    """

    _BEAT, _DONE, _FAREWELL = b".", b"d", b"f"
    _STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # told by their number, a byte that is none of the words
    current: Watch | None = None

    def __init__(self, peers: Sequence[_Peer]) -> None:
        self.stop_signal: int | None = None
        self.signals, self.wakeup = socket.socketpair()
        self.wakeup.setblocking(False)
        self._peers = list(peers)
        self._done = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._is_over = False
        self.thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self.thread.start()

    @classmethod
    def start(cls, accelerator: Accelerator) -> None:
        """Connects all processes with the main one; collective."""
        rank, secret = accelerator.process_index, secrets.token_hex(16)
        if rank == 0:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            is_dual = family == socket.AF_INET6
            with socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual) as server:
                broadcast_object_list([server.getsockname()[1], secret])
                server.settimeout(SILENCE_S)
                cls.current = cls(_accept(server, secret, accelerator.num_processes - 1))
        else:
            port, secret = broadcast_object_list([None, None])
            address = os.environ["MASTER_ADDR"], cast(int, port)
            connection = socket.create_connection(address, timeout=SILENCE_S)
            name = f"process {rank} (pid {os.getpid()} on {socket.gethostname()})"
            connection.sendall(f"{secret} {name}\n".encode())
            cls.current = cls([_Peer(connection, f"process 0 (the main one, at {address[0]})")])

    def say_done(self) -> None:
        """Lets the others' `wait` return."""
        self._send(self._DONE)

    def wait(self) -> None:
        """Waits for the main process's `say_done`.

        Raises:
            RuntimeError: the main process has ended.
        """
        while not self._done.acquire(timeout=1.0):
            if any(peer.ended is not None for peer in self._peers):
                raise RuntimeError(f"{self._peers[0].name} has ended; its output tells why")

    def leave(self, *, farewell: bool) -> None:
        """Waits for nobody any more; with a farewell the others may go on without this process."""
        self._is_over = True
        if farewell:
            self._send(self._FAREWELL)

    def _send(self, word: bytes) -> None:
        with self._lock:
            for peer in self._peers:
                if peer.ended is None:
                    with contextlib.suppress(OSError):  # it has ended, as reading will tell
                        peer.connection.sendall(word)

    def _work(self) -> None:
        selector, beat = selectors.DefaultSelector(), 0.0
        selector.register(self.signals, selectors.EVENT_READ)
        for peer in self._peers:
            selector.register(peer.connection, selectors.EVENT_READ, peer)
        while not self._is_over or len(selector.get_map()) > 1:
            for key, _ in selector.select(timeout=BEAT_S / 10):
                if key.data is None:
                    self._pass_on(self.signals.recv(4096))
                elif not self._hear(key.data):
                    selector.unregister(key.fileobj)
                    key.data.connection.close()
            if time.monotonic() - beat > BEAT_S:
                self._send(self._BEAT)
                beat = time.monotonic()
            if not self._is_over:
                self._judge()

    def _pass_on(self, words: bytes) -> None:
        """Tells the others of the first request to stop, if there is one."""
        for word in words:
            if word in self._STOP_SIGNALS and self.stop_signal is None:
                self.stop_signal = word
                self._send(bytes([word]))

    def _hear(self, peer: _Peer) -> bool:
        """Takes in what a process says and returns whether it may say more."""
        try:
            words = peer.connection.recv(4096)
        except OSError:
            words = b""
        peer.last_word = time.monotonic()
        for _ in range(words.count(self._DONE)):
            self._done.release()
        self._pass_on(words)
        if self._FAREWELL in words:
            with self._lock:
                self._peers.remove(peer)
            return False
        if not words:
            peer.ended = time.monotonic()
        return bool(words)

    def _judge(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if peer.ended is None and now - peer.last_word > SILENCE_S:
                self._end(f"{peer.name} has not been heard of for {SILENCE_S:.0f} s: it is stopped or cut off")
            if peer.ended is not None and now - peer.ended > GRACE_S:
                self._end(f"{peer.name} has ended before the run has")

    def _end(self, reason: str) -> NoReturn:
        print(f"{reason}. This process cannot go on without it and ends; go on with --resume", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(os.EX_UNAVAILABLE)


def _accept(server: socket.socket, secret: str, number: int) -> list[_Peer]:
    peers: list[_Peer] = []
    while len(peers) < number:
        connection, _ = server.accept()
        connection.settimeout(SILENCE_S)
        with connection.makefile("rb") as lines:
            line = lines.readline(1000)
        given, _, name = line.decode("utf-8", "replace").strip().partition(" ")
        if secrets.compare_digest(given.encode(), secret.encode()):
            peers.append(_Peer(connection, name))
        else:  # somebody else's program found the port
            connection.close()
    return peers
