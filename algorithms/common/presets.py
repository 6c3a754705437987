"""Settings of whole runs: RLinf's published ones for the same models and suites, and ours for one GPU.

What a preset does not name is a trainer's default. RLinf's are those of its repository (0.3-0.4): PPO for GR00T-N1.5
(`examples/embodiment/config/libero_*_ppo_gr00t.yaml`), where 64 environments play 8 horizons an iteration, 512
episodes; and GRPO for pi0 (`libero_*_grpo_openpi.yaml`), applied here to GR00T-N1.5. Their forward passes take 128
decisions; 64 here fit a GPU of 80 GB, and gradients accumulate to the same minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A nano policy fine-tuned on 20 demonstrations of each task of libero_spatial, which ships with the repository.
SPATIAL_START = str(Path(__file__).resolve().parents[2] / "checkpoints" / "libero_spatial_fewshot")


@dataclass(frozen=True, kw_only=True)
class _Suite:
    """A suite in RLinf's recipes.

    Attributes:
        name: the suite.
        start: the few-shot fine-tuned checkpoint that reinforcement learning starts from.
        chunk: environment steps per decision.
        decisions: decisions of a horizon.
        epochs: passes over an iteration's decisions (PPO).
        rate, value_rate: step sizes of policy and value head (PPO).
        iterations: to the published score (PPO).
    """

    name: str
    start: str
    chunk: int
    decisions: int
    epochs: int
    rate: float
    value_rate: float
    iterations: int


_SUITES = (
    _Suite(
        name="libero_spatial", start="RLinf/RLinf-Gr00t-SFT-Spatial", chunk=5, decisions=48, epochs=4, rate=5e-6,
        value_rate=1e-4, iterations=400,
    ),
    _Suite(
        name="libero_object", start="RLinf/RLinf-Gr00t-SFT-Object", chunk=5, decisions=48, epochs=1, rate=2e-5,
        value_rate=2e-5, iterations=400,
    ),
    _Suite(
        name="libero_goal", start="RLinf/RLinf-Gr00t-SFT-Goal", chunk=5, decisions=64, epochs=1, rate=2e-5,
        value_rate=2e-5, iterations=500,
    ),
    _Suite(
        name="libero_10", start="RLinf/RLinf-Gr00t-SFT-10", chunk=10, decisions=48, epochs=1, rate=2e-5,
        value_rate=2e-5, iterations=300,
    ),
)  # fmt: skip

PPO: dict[str, dict[str, Any]] = {
    "demo": dict(
        run_name="demo", model=SPATIAL_START, num_iterations=3, num_envs=4, num_steps=24, minibatch_size=32,
        micro_batch_size=32, update_epochs=2, eval_episodes_per_task=1, learning_rate=1e-5,
    ),
}  # fmt: skip
GRPO: dict[str, dict[str, Any]] = {
    "demo": dict(
        run_name="demo_grpo", model=SPATIAL_START, num_iterations=3, num_envs=4, group_size=2, num_groups=2,
        max_rollouts=1, num_minibatches=2, eval_episodes_per_task=1, learning_rate=1e-5,
    ),
}  # fmt: skip
for _suite in _SUITES:
    _common: dict[str, Any] = dict(
        suite=_suite.name, num_action_chunks=_suite.chunk, save_interval=25, eval_interval=50
    )
    _rlinf = _common | dict(model=_suite.start, compute_dtype="bfloat16", loss_weighting="trajectory", dual_clip=3.0)
    # Other suites start from random weights, which sparse rewards cannot teach: fine-tune first and give --model.
    _start = SPATIAL_START if _suite.name == "libero_spatial" else "nano"
    _nano = _common | dict(model=_start, num_iterations=300, dual_clip=3.0)
    # All tasks of libero_spatial are of one scene, which a GPU simulates faster than the cores beside it.
    _envs: dict[str, Any] = (
        dict(num_envs=1024, physics="warp") if _suite.name == "libero_spatial" else dict(num_envs=512)
    )
    PPO[f"{_suite.name}_rlinf"] = _rlinf | dict(
        num_steps=8 * _suite.decisions, update_epochs=_suite.epochs, learning_rate=_suite.rate,
        value_learning_rate=_suite.value_rate, num_iterations=_suite.iterations, reward="relative",
        truncation="failure", minibatch_size=1024, micro_batch_size=64,
    )  # fmt: skip
    PPO[f"{_suite.name}_nano"] = _nano | _envs | dict(
        num_steps=24, update_epochs=3, minibatch_size=4096, micro_batch_size=4096, learning_rate=4e-5,
        value_learning_rate=1e-3, critic_warmup_iterations=2, logprob_level="action", reward="relative",
        truncation="failure", value_bounds=(0.0, 1.0),
    )  # fmt: skip
    GRPO[f"{_suite.name}_rlinf"] = _rlinf | dict(
        learning_rate=5e-6, update_epochs=2, group_size=8, num_groups=64, max_rollouts=8, clip_coef_high=0.2,
        num_minibatches=12, micro_batch_size=64,
    )  # fmt: skip
    GRPO[f"{_suite.name}_nano"] = _nano | _envs | dict(
        learning_rate=4e-5, update_epochs=3, group_size=8, num_groups=64,
        max_rollouts=1024 // _envs["num_envs"], num_minibatches=6, micro_batch_size=4096, logprob_level="action",
    )  # fmt: skip
