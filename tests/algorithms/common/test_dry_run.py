"""What a dry run says that a run would take."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.common.dry_run import kept_features, measure
from examples.own_agent_in_ppo import MLPAgent
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import make_tiny_agent


@pytest.mark.parametrize(
    ("storage", "all_gb", "device_gb", "host_gb"),
    [
        ("device", 58.0, 16.0, 0.0),
        ("host", 58.0, 0.0, 16.0),
        ("mixed", 58.0, 16.0, 42.0),
        ("mixed", 3.0, 3.0, 0.0),
        ("none", 58.0, 0.0, 0.0),
    ],
)
def test_features_lie_where_their_storage_puts_them(storage: str, all_gb: float, device_gb: float, host_gb: float):
    assert kept_features(storage, 16.0, all_gb) == (device_gb, host_gb)


class WideAgent(MLPAgent):
    """Encodes a decision to 1 MB."""

    def encode(self, obs: Any) -> dict[str, Tensor]:
        if "state" in obs:
            return obs
        encoded = super().encode(obs)
        return encoded | {"wide": torch.zeros(len(encoded["state"]), 250_000)}


def test_memory_counts_features_and_the_observations_of_those_that_are_not_kept():
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, is_main_process=False, autocast=nullcontext
    )

    def make_envs(num_envs: int) -> LineVectorEnv:
        return LineVectorEnv(num_envs, image_size=64)

    observation_gb = sum(x.nbytes for x in make_envs(1).observe().values()) / 1e9
    assert 24_000 * observation_gb > 0.5
    measured = {}
    for storage in ("host", "mixed", "none"):
        args = SimpleNamespace(
            num_envs=4, seed=1, micro_batch_size=4, feature_storage=storage, feature_memory_gb=2.0, imitation_coef=0.0
        )
        agent = WideAgent(("state.x",), 1, 2)
        measured[storage] = measure(args, accelerator, agent, make_envs, sizes={}, decisions=24_000, passes=[1])
    features = {storage: told["features_gb"] for storage, told in measured.items()}
    assert features == pytest.approx(dict(host=2.0, mixed=24.0, none=0.0), rel=1e-4)
    rest = {storage: told["memory_gb"] - told["features_gb"] for storage, told in measured.items()}
    assert rest["host"] - rest["mixed"] == pytest.approx(22_000 * observation_gb, abs=0.02)
    assert rest["none"] - rest["mixed"] == pytest.approx(24_000 * observation_gb, abs=0.02)


def test_the_gradient_of_a_whole_micro_batch_is_measured_with_few_environments(capsys: pytest.CaptureFixture[str]):
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, is_main_process=True, autocast=nullcontext
    )
    args = SimpleNamespace(
        num_envs=4, seed=1, micro_batch_size=10, feature_storage="host", feature_memory_gb=2.0, imitation_coef=0.0
    )
    sizes: list[int] = []

    class CountingAgent(MLPAgent):
        def forward(self, obs: Any, *arguments: Any, **options: Any) -> Any:
            outputs = super().forward(obs, *arguments, **options)
            sizes.append(len(outputs[1]))
            return outputs

    agent = CountingAgent(("state.x",), 1, 2)
    measure(args, accelerator, agent, LineVectorEnv, sizes={}, decisions=100, passes=[1])
    assert sizes == [4, 4, 10, 10]  # two decisions, two gradients
    assert "from the gradient of 10 decisions" in capsys.readouterr().out


def test_the_time_is_that_of_all_iterations_whose_updates_differ(capsys: pytest.CaptureFixture[str]):
    """With imitation the gradient is that of the flow's error too."""
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, is_main_process=True, autocast=nullcontext
    )
    agent = make_tiny_agent(SimpleNamespace(num_action_chunks=2))
    scored: list[int] = []
    score = agent.score_with_flow_error

    def counted(obs: Any, action: Any, flow_draws: Any) -> Any:
        *rest, error = score(obs, action, flow_draws)
        scored.append(len(error))
        return *rest, error

    agent.score_with_flow_error = counted  # type: ignore[method-assign]
    args = SimpleNamespace(
        num_envs=4, seed=1, micro_batch_size=6, feature_storage="host", feature_memory_gb=2.0, imitation_coef=1.0
    )
    told = measure(args, accelerator, agent, LineVectorEnv, sizes={}, decisions=100, passes=[10, 2, 2])
    assert scored == [6, 6]
    assert told["total_s"] == pytest.approx(3 * told["rollout_s"] + 14 / 2 * told["update_s"])
    printed = dict(re.findall(r"^(\w+ update) +([\d.]+) s", capsys.readouterr().out, re.MULTILINE))
    assert float(printed["first update"]) == pytest.approx(5 * told["update_s"], abs=1e-3)
    assert float(printed["last update"]) == pytest.approx(told["update_s"], abs=1e-3)
