"""Which servers an evaluation's policy may be behind; needs no PyTorch, so that mistakes are told at once.

--policy-server ws://localhost:8000     a server that speaks as openpi's does (wss:// with encryption)
--policy-server zmq://localhost:5555    NVIDIA's Isaac-GR00T server
"""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = ("ws", "wss", "zmq")


def server_name(address: str) -> str:
    """Returns the host of an address, and its port if it names one."""
    parts = urlsplit(address)
    return str(parts.hostname) if parts.port is None else f"{parts.hostname}_{parts.port}"


def check_address(address: str) -> None:
    """Raises ValueError unless `address` names a protocol, a host and a port."""
    remedy = "give ws://host:port (openpi's protocol) or zmq://host:port (Isaac-GR00T's)"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"policy_server={address!r} is no address ({error}); {remedy}") from error
    if parts.scheme not in SCHEMES or not parts.hostname or (port is None and parts.scheme != "wss"):
        raise ValueError(f"policy_server={address!r} is no address; {remedy}")
