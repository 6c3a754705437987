"""What benchmarks of whole iterations of PPO tell of them: environment steps a second, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PHASES = ("total_s", "env_s", "env_wait_s", "policy_s", "update_s")
# Of a table, for `cells`.
COLUMNS = {"iteration s": ">12.2f", "env s": ">8.2f", "wait s": ">8.2f", "policy s": ">10.2f", "update s": ">10.2f"}


def summarise(lines: Sequence[Mapping[str, float]], phases: Sequence[str] = PHASES) -> dict[str, float | None]:
    """Returns the environment steps a second of iterations, and each phase's mean.

    Args:
        lines: their metrics.
        phases: names below `time/`; one that a trainer has not is None.
    """
    seconds = sum(line["time/total_s"] for line in lines)
    steps = sum(line["charts/SPS"] * line["time/total_s"] for line in lines)
    means = {
        phase: float(np.mean([line[f"time/{phase}"] for line in lines])) if f"time/{phase}" in lines[0] else None
        for phase in phases
    }
    return {"env_steps_per_s": steps / seconds} | means


def cells(row: Mapping[str, Any]) -> list[Any]:
    """Returns what stands in `COLUMNS` of a row with what `summarise` returned."""
    return [row[phase] for phase in PHASES]
