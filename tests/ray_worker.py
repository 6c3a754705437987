"""What Ray starts for a worker: hands the command to the server of `tests.preloaded`, which forks for it.

A worker then starts without importing PyTorch and the trainers, which takes seconds each time. Nodes that are made
with `setup_worker_path` run `python tests/ray_worker.py default_worker.py ...`; a runtime environment would have Ray
imported first. The variable RAY_WORKER_SERVER names the server's socket.
"""

import json
import os
import socket
import sys


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--language=")]  # of whoever sets up
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = dict(arguments=["path", *arguments], environment=dict(os.environ), own_group=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ["RAY_WORKER_SERVER"])
        socket.send_fds(server, [json.dumps(request).encode()], [theirs.fileno(), 1])
    theirs.close()
    status.recv(64)  # its process id
    ended = status.recv(64)
    sys.exit(os.waitstatus_to_exitcode(int(ended)) if ended else 1)


main()
