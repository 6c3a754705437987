"""What Ray starts as Python for a worker: hands the command to the server of `tests.preloaded`, which forks for it.

A worker then starts without importing PyTorch and the trainers, which takes seconds each time. Run by a bare
interpreter: `python -S tests/ray_worker.py SOCKET default_worker.py ...`.
"""

import json
import os
import socket
import sys


def main() -> None:
    path, *arguments = sys.argv[1:]
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = dict(arguments=["path", *arguments], environment=dict(os.environ), own_group=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps(request).encode()], [theirs.fileno(), 1])
    theirs.close()
    status.recv(64)  # its process id
    ended = status.recv(64)
    sys.exit(os.waitstatus_to_exitcode(int(ended)) if ended else 1)


main()
