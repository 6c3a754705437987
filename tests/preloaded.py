"""Programs of the tests that start without importing PyTorch and the trainers, or the environments, each time.

A server imports them once and forks for each program, before any thread is there. Its child is as good as a new
interpreter: it has its own environment, folder, output and arguments, runs as `__main__`, and ends as an interpreter
does. Trainers' reports have no charts. What a launcher starts, and what is about imports, starts anew all the same.

    process = start("-m", "tests.algorithms.line_trainer", "ppo", "{}", RANK="0")
    output, _ = process.communicate(timeout=60)
    lines = run_environments("from libero_gym.env import LiberoEnv; print(LiberoEnv())").splitlines()

Environments have a server of their own, which imports no PyTorch.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "trainers": ("tests.algorithms.line_trainer", "tests.algorithms.sft_trainer"),
    "environments": (
        "libero_gym.env",
        "libero_gym.vector",
        "libero_gym.physics.stepping",
        "libero_gym.rendering.raycast",
    ),
}
MESSAGE_BYTES = 1 << 20


class Program:
    """A program that was started, with the methods of `subprocess.Popen` that tests use.

    Attributes:
        pid: of the process.
        returncode: exit status, minus the signal that ended it; None before it is known.
    """

    def __init__(
        self, arguments: list[str], environment: dict[str, str], *, server: str, own_group: bool, own_errors: bool
    ) -> None:
        self.returncode: int | None = None
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart
        pipes = [os.pipe() for _ in range(1 + own_errors)]
        ends = [end for _, end in pipes]
        request = dict(arguments=arguments, environment=environment, own_group=own_group)
        socket.send_fds(_server(server), [json.dumps(request).encode()], [status.fileno(), *ends])
        for end in ends:
            os.close(end)
        status.close()
        answer = self._status.recv(64)
        assert answer, "the server has ended; its output tells why"
        self.pid = int(answer)
        self._readers = [Reader(output) for output, _ in pipes]

    def poll(self) -> int | None:
        """Returns the exit status, None while the program runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.recv(64)))
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        """Waits for the end and returns what was written to stdout and, if it has not gone there too, to stderr.

        Raises:
            subprocess.TimeoutExpired: it takes longer.
        """
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        self.poll()
        output, *errors = (reader.read() for reader in self._readers)
        return output, errors[0] if errors else None

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Reader:
    """Reads a pipe to its end, in a thread."""

    def __init__(self, pipe: int) -> None:
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._collect, args=(pipe,), daemon=True)
        self._thread.start()

    def read(self) -> str:
        """Waits for the end and returns all that was written."""
        self._thread.join()
        return b"".join(self._parts).decode()

    def _collect(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as stream:
            self._parts.extend(iter(lambda: stream.read1(), b""))


def start(*arguments: str, own_group: bool = False, **variables: str) -> Program:
    """Starts what `python *arguments` would: `-m MODULE ...` or `-c CODE ...`, with variables added to ours."""
    environment = os.environ | variables
    return Program(list(arguments), environment, server="trainers", own_group=own_group, own_errors=False)


def run_environments(code: str, *arguments: str, timeout: float = 200, **variables: str) -> str:
    """Runs what `python -W ignore -c CODE ...` would, where environments are imported; returns what it printed.

    If it fails, or takes more than `timeout` seconds, so does the test; its children end with it in the second case.
    """
    command = ["-c", f"import warnings; warnings.simplefilter('ignore')\n{code}", *arguments]
    environment = os.environ | variables
    program = Program(command, environment, server="environments", own_group=True, own_errors=True)
    try:
        output, errors = program.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        raise AssertionError(f"it hangs after {program.communicate()}") from None
    assert program.returncode == 0, (errors or "")[-2000:]
    return output


def start_two(*arguments: str, **variables: str) -> list[Program]:
    """Starts a program as both processes of a run, as a launcher does, but nothing ends one if the other has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    return [start(*arguments, RANK=rank, LOCAL_RANK=rank, **variables) for rank in "01"]


@functools.cache
def ray_server() -> Path:
    """Returns the socket to which `tests/ray_worker.py`, as RAY_WORKER_SERVER, hands what Ray starts as a worker."""
    folder = Path(tempfile.mkdtemp(prefix="preloaded-"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "server"))
    listener.listen()
    atexit.register(shutil.rmtree, folder)
    server = _server("trainers")

    def pass_on() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                message, descriptors, *_ = socket.recv_fds(connection, MESSAGE_BYTES, 2)
                socket.send_fds(server, [message], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    threading.Thread(target=pass_on, name="ray-workers", daemon=True).start()
    return folder / "server"


@functools.cache
def _server(kind: str) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Arrow's own allocator would begin a thread.
    variables = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-m", "tests.preloaded", kind, str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


# --- the server ---


def serve(requests: socket.socket) -> list[str]:
    """Forks for each request; returns in the child, with the arguments of its program, and ends in the server."""
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            return _child(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _child(request: dict[str, Any], status: int, output: int, errors: int | None = None) -> list[str]:
    """Waits, for the server, for a child of its own, which returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        os.write(status, str(pid).encode())
        _, ended = os.waitpid(pid, 0)
        os.write(status, str(ended).encode())
        os._exit(0)
    os.close(status)
    if request["own_group"]:
        os.setsid()
    os.dup2(output, 1)
    os.dup2(output if errors is None else errors, 2)
    for pipe in {output, errors} - {None}:
        os.close(pipe)
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["arguments"]


def _run(kind: str, program: str, *arguments: str) -> None:
    """Does what `python -m`, `python -c` or, for the kind "path", `python PROGRAM` does."""
    sys.argv = [program if kind == "path" else kind, *arguments]
    sys.modules.pop(program, None)
    if kind == "path":
        runpy.run_path(program, run_name="__main__")
    elif kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(program, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    import importlib

    kind, requests = sys.argv[1:]
    for name in MODULES[kind]:
        importlib.import_module(name)
    if kind == "trainers":
        import pytest

        from tests.algorithms.plain_reports import leave_charts_out

        leave_charts_out(pytest.MonkeyPatch())
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    _run(*serve(socket.socket(fileno=int(requests))))
