"""Writes README.md, a model card, into each folder of `checkpoints/`, from its `evaluation.json` and what made it.

python tools/model_cards.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made a policy.

    Attributes:
        method: in one sentence without a full stop.
        script: the file in `benchmarks/runs` that makes it.
    """

    method: str
    script: str


def _fine_tuned(mistakes: str = "") -> str:
    return f"flow matching, from random weights, on 20 demonstrations of each task by scripted experts{mistakes}"


ORIGINS = {
    "libero_spatial_fewshot": Origin(method=_fine_tuned(), script="fewshot.sh"),
    "libero_object_fewshot": Origin(method=_fine_tuned(), script="fewshot.sh"),
    "libero_goal_fewshot": Origin(method=_fine_tuned(), script="fewshot.sh"),
    "libero_10_fewshot": Origin(method=_fine_tuned(), script="fewshot.sh"),
    "libero_40_fewshot": Origin(
        method=_fine_tuned(", half of which show how a mistake is made good"), script="forty.sh"
    ),
    "libero_spatial_rl": Origin(
        method="PPO with sparse rewards from `libero_spatial_fewshot`, in three runs", script="spatial_three_runs.sh"
    ),
    "libero_object_rl": Origin(method="PPO with sparse rewards from `libero_object_fewshot`", script="object_ppo.sh"),
    "libero_goal_rl": Origin(method="PPO with sparse rewards from `libero_goal_fewshot`", script="goal_ppo.sh"),
    "libero_40_rl": Origin(
        method="PPO with sparse rewards on the forty tasks from `libero_40_fewshot`, in two runs", script="forty.sh"
    ),
}
"""What made each policy, by its folder's name."""


def model_card(folder: Path) -> str:
    """Returns the model card of the policy in `folder`.

    Raises:
        KeyError: `ORIGINS` lacks the folder.
    """
    origin = ORIGINS[folder.name]
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    protocol, policy = evaluation["protocol"], evaluation["protocol"]["policy"]
    suite, chunk = protocol["suite"], policy["num_action_chunks"]
    return f"""---
license: mit
pipeline_tag: robotics
tags: [libero, robotics, flow-matching, reinforcement-learning]
---

# {folder.name}

A policy for the tasks of LIBERO's suite `{suite}`: GR00T-N1.5's architecture at the size `nano`, 7.7 million
parameters. NVIDIA has not made it, and it holds none of NVIDIA's weights.

- **Training:** {origin.method} (`benchmarks/runs/{origin.script}`).
- **Input:** two camera views of {protocol["image_size"]} pixels, the state of the arm and the instruction.
- **Output:** chunks of 16 actions, of which {chunk} are executed; {policy["denoising_steps"]} denoising steps.
- **Weights:** bfloat16, {_megabytes(folder):.1f} MB, SHA-256 `{protocol["weights_sha256"]}`.
- **Computed in:** {policy["compute_dtype"]}.

## Success

{_success(evaluation)} in simulation: {protocol["episodes_per_task"]} stored initial states of each task, seed \
{protocol["seeds"][0]}, horizon {_horizon(protocol["horizon"])}, success at any step before it
(`docs/evaluation.md`). Every episode is in `evaluation.json`.

| task | successes |
|---|---|
{_tasks(evaluation)}

## Use

From the root of the repository:

```
python algorithms/eval_gr00t.py --checkpoint checkpoints/{folder.name} --suite {suite}
```

```python
from gr00t_agent import Gr00tAgent

agent = Gr00tAgent.from_pretrained("checkpoints/{folder.name}")
```

It was trained on the instructions and the objects of these tasks alone. `docs/evaluation.md` has what such a policy
makes of other words, objects and initial states. License: MIT; LIBERO's assets carry their own (`NOTICE`).
"""


def _success(evaluation: dict[str, Any]) -> str:
    total = evaluation["table"][-1]
    low, high = 100 * total["low"], 100 * total["high"]
    return (
        f"**{total['successes']} of {total['episodes']} episodes, {100 * total['success_rate']:.1f} %** "
        f"(95 % interval {low:.1f}-{high:.1f})"
    )


def _tasks(evaluation: dict[str, Any]) -> str:
    rows = [row for row in evaluation["table"] if row["task"] != "all"]
    return "\n".join(f"| {row['description']} | {row['successes']}/{row['episodes']} |" for row in rows)


def _horizon(horizon: int | dict[str, int]) -> str:
    if isinstance(horizon, int):
        return f"of {horizon} steps"
    return "of " + ", ".join(f"{steps} steps ({suite})" for suite, steps in horizon.items())


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    """Writes all cards."""
    for folder in sorted(path.parent for path in CHECKPOINTS.glob("*/evaluation.json")):
        (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
        print(folder / "README.md")


if __name__ == "__main__":
    main()
