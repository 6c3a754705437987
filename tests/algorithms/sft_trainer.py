"""Fine-tuning of a tiny agent, in this process (`fine_tune`) or as a program of its own (`command`)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from algorithms import sft_gr00t
from algorithms.sft_gr00t import Args
from gr00t_agent import Gr00tAgent
from tests.algorithms.tiny_agent import tiny_agent


def make_tiny(args: Args, metadata: Any) -> Gr00tAgent:
    return tiny_agent(metadata)


def sft_args(folder: Path, demonstrations: Path, **changes: Any) -> Args:
    defaults: dict[str, Any] = dict(
        dataset=str(demonstrations), output_dir=folder, run_name="run", cache_dir=folder / "cache", num_steps=6,
        batch_size=8, micro_batch_size=8, learning_rate=2e-3, warmup_fraction=0.0, eval_episodes_per_task=0,
        save_interval=3, log_interval=1, log_with=(), compute_dtype="float32", num_loader_threads=2,
        suite="libero_spatial",
    )  # fmt: skip
    return Args(**(defaults | changes))


def fine_tune(folder: Path, demonstrations: Path, **changes: Any) -> dict[str, float]:
    return sft_gr00t.main(sft_args(folder, demonstrations, **changes), make_tiny)


def command(folder: Path, demonstrations: Path, **changes: Any) -> list[str]:
    """What runs `fine_tune` in a process of its own, and takes 0.1 s a step at least."""
    return ["-m", "tests.algorithms.sft_trainer", str(folder), str(demonstrations), json.dumps(changes)]


def main() -> None:
    folder, demonstrations, text = sys.argv[1:]
    torch.set_num_threads(1)
    learning_rate_at = sft_gr00t.learning_rate_at

    def slow(step: int, args: Args) -> float:
        time.sleep(0.1)
        return learning_rate_at(step, args)

    sft_gr00t.learning_rate_at = slow
    fine_tune(Path(folder), Path(demonstrations), **json.loads(text))


if __name__ == "__main__":
    main()
