"""A role of a cluster that says what its process was shown when this was imported, as libraries look for GPUs then."""

import os
from typing import Any

SHOWN = os.environ.get("CUDA_VISIBLE_DEVICES")


class EarlyRole:
    def __init__(self, place: Any, bell: Any, name: str) -> None:
        self.name = name

    def shown(self, greeting: str) -> str:
        return f"{greeting} {self.name} {SHOWN}"
