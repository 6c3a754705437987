"""What all tests share."""

import gc
import os
from collections.abc import Iterator

import pytest


def pytest_collection_finish() -> None:
    """Keeps the collector, which libraries call when they close a file, from a million objects that imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk() -> Iterator[None]:
    """No test survives a power cut, for which files are flushed; a thousand checkpoints would wait minutes for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
