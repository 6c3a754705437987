"""Numbers that are not finite stop a run, name themselves, and leave what is needed to look into it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.own_agent_in_ppo import MLPAgent
from libero_gym.physics.simulation import PhysicsError
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import train

ALGORITHMS = ("ppo", "grpo")


def faulty(alter: Any) -> Any:
    """An agent whose outputs are altered in the update (`scoring` True) or the rollout (False)."""

    class Faulty(MLPAgent):
        def forward(self, obs: Any, action: Any = None, **options: Any) -> Any:
            return alter(super().forward(obs, action, **options), action is not None)

    return lambda args: Faulty(("state.x",), 1, 2)


def dump_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*/faults/*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(tmp_path: Path, algorithm: str, bad: float):
    def alter(outputs: Any, scoring: bool) -> Any:
        action, logprob, entropy, value = outputs
        return action, logprob, entropy * (bad if scoring else 1.0), value

    with pytest.raises(FloatingPointError, match=r"not finite in the minibatch are \['loss'\]"):
        train(algorithm, tmp_path, make_agent=faulty(alter), ent_coef=0.01)
    dump = dump_of(tmp_path)
    assert not torch.isfinite(dump["loss"]).any()
    assert {"logratio", "logprobs", "advantages", "weights", "executed"} <= set(dump)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_whole_minibatch_is_dumped_wherever_in_it_the_fault_is(tmp_path: Path, algorithm: str):
    passes = 0

    def alter(outputs: Any, scoring: bool) -> Any:
        nonlocal passes
        passes += scoring
        action, logprob, entropy, value = outputs
        return action, logprob * (float("nan") if scoring and passes == 2 else 1.0), entropy, value

    with pytest.raises(FloatingPointError, match=r"not finite in the minibatch are \['loss', 'logratio'\]"):
        train(algorithm, tmp_path, make_agent=faulty(alter), micro_batch_size=8)
    dump = dump_of(tmp_path)
    bad = ~torch.isfinite(dump["logratio"])
    micro_batches = np.array_split(bad.numpy(), len(dump["loss"]))
    assert len(micro_batches) > 2
    assert len(bad) == len(dump["logprobs"])
    for number, rows in enumerate(micro_batches):
        assert (rows == (number == 1)).all()
        assert torch.isfinite(dump["loss"][number]) == (number != 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_gradient_that_is_not_finite_though_the_loss_is(tmp_path: Path, algorithm: str):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * float("nan")

    def alter(outputs: Any, scoring: bool) -> Any:
        action, logprob, entropy, value = outputs
        return action, Poison.apply(logprob) if scoring else logprob, entropy, value

    with pytest.raises(FloatingPointError, match=r"gradient norm is nan in iteration 1, .* are no values"):
        train(algorithm, tmp_path, make_agent=faulty(alter))
    assert torch.isfinite(dump_of(tmp_path)["logratio"]).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_action_that_is_not_finite_never_reaches_the_environment(tmp_path: Path, algorithm: str):
    def alter(outputs: Any, scoring: bool) -> Any:
        action, *rest = outputs
        if not scoring:
            action.env_action[3, 0, 1] = float("nan")
        return action, *rest

    with pytest.raises(FloatingPointError, match=r"actions that are not finite in rows \[3\] of iteration 1"):
        train(algorithm, tmp_path, make_agent=faulty(alter))
    dump = dump_of(tmp_path)
    assert torch.isnan(dump["actions"]).sum() == 1
    assert "logprob" in dump


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dsrl"])
def test_physics_that_diverge(tmp_path: Path, algorithm: str):
    class Diverges(LineVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            if self.total_steps > 20:
                raise PhysicsError("MuJoCo reports ['mjWARN_BADQACC']")
            return super().step(actions)

    with pytest.raises(PhysicsError, match="BADQACC") as caught:
        train(algorithm, tmp_path, env=Diverges)
    dump = dump_of(tmp_path)
    assert torch.isfinite(dump["actions_of_stage_0"]).all()
    assert "the state before this rollout is in" in " ".join(caught.value.__notes__)
