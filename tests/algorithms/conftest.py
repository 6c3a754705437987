"""What the trainers' tests share."""

from collections.abc import Iterator

import pytest
import torch
from markupsafe import Markup

from algorithms.common import report


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over several threads round otherwise than over one, and tests compare runs in processes of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a place for each chart of a run's report, but in tests marked `charts`: drawing takes longer than a run."""
    if request.node.get_closest_marker("charts") is None:
        for name in ("curve", "heatmap"):
            monkeypatch.setattr(report, name, lambda *values, **options: Markup("<svg></svg>"))
