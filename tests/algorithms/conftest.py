"""What the trainers' tests share."""

from collections.abc import Iterator

import pytest
import torch

from tests.algorithms.plain_reports import leave_charts_out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads round otherwise than over one, and tests compare runs in processes of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave charts out, but in tests marked `charts`."""
    if request.node.get_closest_marker("charts") is None:
        leave_charts_out(monkeypatch)
