"""Processes notice each other's silence and end; here the other one is the test."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from algorithms.common import watch
from algorithms.common.watch import Watch, _accept, _Peer  # pyright: ignore[reportPrivateUsage]


class Watched(Watch):
    """Tells why it would end the process."""

    reason = ""

    def _end(self, reason: str):  # pyright: ignore
        self.reason = reason
        self.leave(farewell=False)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, Watched]]:
    """The other end of a connection, and what watches this one."""
    monkeypatch.setattr(watch, "BEAT_S", 0.05)
    monkeypatch.setattr(watch, "SILENCE_S", 0.6)
    monkeypatch.setattr(watch, "GRACE_S", 0.3)
    here, there = socket.socketpair()
    watched = Watched([_Peer(there, "process 7")])
    yield here, watched
    watched.leave(farewell=False)
    here.close()
    watched.thread.join()
    watched.signals.close()
    watched.wakeup.close()


def reason_within(watched: Watched, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not watched.reason and time.monotonic() < deadline:
        time.sleep(0.02)
    return watched.reason


def test_silence_is_named(other: tuple[socket.socket, Watched]):
    here, watched = other
    for _ in range(20):
        here.sendall(b".")
        time.sleep(0.05)
    assert not watched.reason  # it has spoken for longer than it may be silent
    assert reason_within(watched, 5) == "process 7 has not been heard of for 1 s: it is stopped or cut off"
    assert here.recv(1) == b"."


def test_an_end_without_a_farewell_is_named_after_a_while(other: tuple[socket.socket, Watched]):
    here, watched = other
    started = time.monotonic()
    here.close()
    assert reason_within(watched, 5) == "process 7 has ended before the run has"
    assert time.monotonic() - started > 0.3


def test_after_a_farewell_nobody_is_waited_for(other: tuple[socket.socket, Watched]):
    here, watched = other
    here.sendall(b".f")
    here.close()
    assert not reason_within(watched, 1.0)


def test_who_leaves_judges_nobody(other: tuple[socket.socket, Watched]):
    here, watched = other
    watched.leave(farewell=True)
    assert not reason_within(watched, 1.0)
    assert b"f" in here.recv(100)


def test_waiting_ends_with_the_work_or_with_who_does_it(other: tuple[socket.socket, Watched]):
    here, watched = other
    timer = threading.Timer(0.3, here.sendall, [b"d"])
    timer.start()
    watched.wait()
    timer.join()
    here.sendall(b"dd")
    watched.wait()
    watched.wait()
    here.close()
    with pytest.raises(RuntimeError, match="process 7 has ended; its output tells why"):
        watched.wait()


def test_a_request_to_stop_is_heard_and_passed_on_once(other: tuple[socket.socket, Watched]):
    here, watched = other
    here.sendall(b".\x0f.")
    time.sleep(0.3)
    assert watched.stop_signal == signal.SIGTERM
    watched.wakeup.send(bytes([signal.SIGCHLD, signal.SIGINT]))
    time.sleep(0.3)
    assert watched.stop_signal == signal.SIGTERM
    assert here.recv(1000).replace(b".", b"") == bytes([signal.SIGTERM])


def test_a_signal_is_passed_on_while_the_main_thread_waits(other: tuple[socket.socket, Watched]):
    here, watched = other
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    before = signal.set_wakeup_fd(watched.wakeup.fileno())
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, previous)
    assert here.recv(1000).replace(b".", b"") == bytes([signal.SIGTERM])


def test_only_who_knows_the_secret_is_let_in():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        stranger, friend = (socket.create_connection(server.getsockname()) for _ in range(2))
        with stranger, friend:
            stranger.sendall(b"GET / HTTP/1.1\n")
            friend.sendall(b"hush process 1 (pid 2 on host)\n")
            (peer,) = _accept(server, "hush", 1)
            assert peer.name == "process 1 (pid 2 on host)"
            assert stranger.recv(1) == b""
            peer.connection.close()
