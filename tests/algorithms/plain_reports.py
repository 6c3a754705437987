"""Reports without charts: to draw them takes longer than most runs of the tests."""

import pytest
from markupsafe import Markup

from algorithms.common import report


def leave_charts_out(patch: pytest.MonkeyPatch) -> None:
    """Leaves a place for each chart of a report."""
    for name in ("curve", "heatmap"):
        patch.setattr(report, name, lambda *values, **options: Markup("<svg></svg>"))
