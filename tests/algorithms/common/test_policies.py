"""Policies of one's own: what is executed of their chunks, by hand-computed numbers, and what is refused."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.common.evaluation import EpisodicPolicy, evaluate
from algorithms.common.policies import FirstSteps, OwnPolicy, TemporalEnsemble, WholeChunks, checked_chunk
from algorithms.common.policy_sources import check_address
from gr00t_agent.data_config import read_metadata
from gr00t_agent.loading import NANO_METADATA
from tests.algorithms.common.test_evaluation import JOBS, ManyStatesLine, MemoryLog
from tests.algorithms.tiny_agent import tiny_agent

W = math.exp(-0.01)


class Script:
    """Returns chunks that were written down: for each decision, the first element of each step, a row each."""

    def __init__(self, *decisions: Sequence[Sequence[float]]) -> None:
        self.decisions = list(decisions)
        self.told: list[tuple[str, list[int]]] = []

    def begin_episodes(self, env_ids: Sequence[int]) -> None:
        self.told.append(("begin", list(env_ids)))

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        self.told.append(("end", list(env_ids)))

    def predict(self, obs: Any, *, generator: Any) -> torch.Tensor:
        first = torch.tensor(self.decisions.pop(0))  # [N, H]
        return torch.cat([first[..., None], torch.zeros(*first.shape, 6)], dim=-1)


def executed(policy: Any, count: int) -> list[list[float]]:
    """The first element of each executed step [N, C], of one decision after another."""
    return [policy.predict({}, generator=[])[..., 0].tolist() for _ in range(count)]


def test_the_first_steps_are_executed():
    assert executed(FirstSteps(Script([[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]), 2), 2) == [[[1.0, 2.0]], [[4.0, 5.0]]]


def test_temporal_ensemble_by_hand():
    """Chunks of three steps, one a step: at the third, the first chunk says 3, the second 20, the third 100."""
    chunks = [[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]], [[100.0, 200.0, 300.0]], [[0.0, 0.0, 0.0]]
    steps = executed(TemporalEnsemble(Script(*chunks), 1, 0.01), 4)
    # The oldest has weight 1, the next exp(-0.01), the next exp(-0.02); zeros count as well.
    expected = [
        1.0,
        (2 + 10 * W) / (1 + W),
        (3 + 20 * W + 100 * W**2) / (1 + W + W**2),
        (30 + 200 * W + 0 * W**2) / (1 + W + W**2),
    ]
    assert [step[0][0] for step in steps] == pytest.approx(expected, rel=1e-6)
    assert steps[1][0][0] == pytest.approx(5.98000, abs=1e-4)
    assert steps[2][0][0] == pytest.approx(40.6770, abs=1e-3)


@pytest.mark.parametrize(("coefficient", "expected"), [(0.0, 41.0), (100.0, 3.0), (-100.0, 100.0)])
def test_the_coefficient_weighs_old_against_new(coefficient: float, expected: float):
    chunks = [[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]], [[100.0, 200.0, 300.0]]
    assert executed(TemporalEnsemble(Script(*chunks), 1, coefficient), 3)[2][0][0] == pytest.approx(expected)


@pytest.mark.parametrize("coefficient", [-50.0, 50.0, -1e308, 1e308])
def test_chunks_that_agree_are_executed_whatever_the_coefficient(coefficient: float):
    constant = [[0.25] * 20]
    steps = executed(TemporalEnsemble(Script(*[constant] * 20), 1, coefficient), 20)
    assert steps == [[[0.25]]] * 20


def test_chunks_that_are_several_steps_apart_are_averaged_where_they_overlap():
    chunks = [[1.0, 2.0, 3.0, 4.0, 5.0]], [[10.0, 20.0, 30.0, 40.0, 50.0]], [[6.0, 7.0, 8.0, 9.0, 10.0]]
    steps = executed(TemporalEnsemble(Script(*chunks), 2, 0.0), 3)
    assert steps[:2] == [[[1.0, 2.0]], [[6.5, 12.0]]]
    assert steps[2][0] == pytest.approx([(5 + 30 + 6) / 3, (40 + 7) / 2])


def test_an_episodes_chunks_are_forgotten_when_another_begins():
    source = Script([[1.0, 2.0], [1.0, 2.0]], [[10.0, 20.0], [10.0, 20.0]], [[6.0, 7.0], [6.0, 7.0]])
    ensemble = TemporalEnsemble(source, 1, 0.0)
    ensemble.begin_episodes([0, 1])
    assert executed(ensemble, 2)[1] == [[6.0], [6.0]]
    ensemble.end_episodes([1])
    ensemble.begin_episodes([1])
    assert executed(ensemble, 1) == [[[13.0], [6.0]]]
    assert source.told == [("begin", [0, 1]), ("end", [1]), ("begin", [1])]


def test_an_agent_of_ours_gives_its_whole_chunks():
    torch.manual_seed(0)
    agent = tiny_agent(read_metadata(NANO_METADATA, "libero_franka"), num_action_chunks=2).eval()
    rng = np.random.default_rng(0)
    obs: dict[str, Any] = {
        f"video.{name}": rng.integers(0, 256, (1, 32, 32, 3), np.uint8) for name in ("image", "wrist_image")
    }
    obs |= {f"state.{name}": np.zeros((1, 1), np.float32) for name in ("x", "y", "z", "roll", "pitch", "yaw")}
    obs |= {"state.gripper": np.zeros((1, 2), np.float32), "annotation.human.action.task_description": ["go"]}

    def noise() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(3)]

    whole = WholeChunks(agent).predict(obs, generator=noise())
    assert whole.shape == (1, 16, 7)
    assert torch.equal(whole[:, :2], agent.predict(obs, generator=noise()))
    with pytest.raises(ValueError, match=r"num_steps=17 is not in 1-16 \(the action horizon\)"):
        agent.predict(obs, generator=noise(), num_steps=17)


def test_a_coefficient_is_a_number():
    with pytest.raises(ValueError, match="temporal_ensemble=nan must be a finite number"):
        TemporalEnsemble(Script(), 1, math.nan)


# --- the evaluation tells of episodes ---


class Walker:
    """Moves towards the origin, a little less far with every decision of its episode."""

    image_size = 8
    num_action_chunks = 2

    def __init__(self) -> None:
        self.decisions: dict[int, int] = {}

    def reset(self, env_ids: list[int]) -> None:
        self.decisions |= dict.fromkeys(env_ids, 0)

    def predict(self, obs: Any, *, generator: Any) -> np.ndarray:
        x = obs["state.x"][:, 0]
        actions = np.zeros((len(x), 3, 7))
        for i in range(len(x)):
            count = self.decisions[i] = self.decisions.get(i, 0) + 1
            actions[i, :, 0] = (
                -np.sign(x[i]) * (0.9 - 0.3 * count) * (0.5 + torch.rand((), generator=generator[i]).item())
            )
        return actions


def walker_file(folder: Path) -> str:
    path = folder / "walker.py"
    path.write_text("from tests.algorithms.common.test_policies import Walker\n\n\ndef make():\n    return Walker()\n")
    return f"{path}:make"


def test_a_policy_that_remembers_is_evaluated_alike_whatever_the_number_of_environments(tmp_path: Path):
    def run(num_envs: int, log: Any = None) -> Any:
        policy = FirstSteps(OwnPolicy(walker_file(tmp_path), None), 2)
        assert isinstance(policy, EpisodicPolicy)
        return evaluate(policy, ManyStatesLine(num_envs), JOBS, seed=0, log=log)

    log = MemoryLog()
    whole = run(3, log)
    assert 0 < whole.success_rate < 1
    assert run(1).episodes == run(9).episodes == whole.episodes
    assert run(3, MemoryLog(log.episodes[:4])).episodes == whole.episodes


def test_episodes_begin_and_end_once_each():
    class Told(Script):
        def predict(self, obs: Any, *, generator: Any) -> torch.Tensor:
            return torch.zeros(len(generator), 2, 7)

    told = Told()
    evaluate(told, ManyStatesLine(2), JOBS[:3], seed=0)  # three episodes of six steps, two a decision
    events = [event for event in told.told if event[1]]
    assert events == [("begin", [0, 1]), ("end", [0, 1]), ("begin", [0]), ("end", [0])]


# --- what is refused ---


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 5, 6)), r"actions has shape \[2, 5, 6\]; expected numbers of shape \[2, H, 7\] with H >= 5"),
        (np.zeros((2, 4, 7)), r"actions has shape \[2, 4, 7\]; expected .* with H >= 5 \(num_action_chunks\)"),
        (np.zeros((3, 5, 7)), r"actions has shape \[3, 5, 7\]"),
        (np.zeros((5, 7)), r"actions has shape \[5, 7\]"),
        (torch.full((2, 5, 7), math.inf), r"actions\[0, 0, 0\] is inf; expected finite numbers"),
        (np.where(np.arange(70).reshape(2, 5, 7) == 38, np.nan, 0), r"me: actions\[1, 0, 3\] is nan; expected finite"),
        ([[0.0] * 7] * 5, r"actions is a list; expected an array of numbers"),
        (np.zeros((2, 5, 7), dtype=bool), r"actions is an array of bool; expected"),
        (torch.zeros(2, 5, 7, dtype=torch.bool), r"actions is an array of bool; expected"),
        (torch.zeros(2, 5, 7, dtype=torch.complex64), r"actions is an array of complex64; expected"),
        (np.full((2, 5, 7), -1e300), r"actions\[0, 0, 0\] is -1e\+300; expected finite .*, in float32"),
        (torch.full((2, 5, 7), 1e300, dtype=torch.float64), r"actions\[0, 0, 0\] is 1e\+300; expected finite"),
        (None, r"actions is a NoneType; expected"),
    ],
)
def test_what_is_no_chunk_is_refused(value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        checked_chunk(value, 5, "me", num_rows=2)


def test_chunks_of_any_number_type_are_taken():
    taken = checked_chunk(torch.ones(2, 6, 7, dtype=torch.bfloat16), 5, "me", num_rows=2)
    assert (taken.dtype, taken.shape) == (np.float32, (2, 6, 7))
    assert checked_chunk(np.ones((5, 7), dtype=np.int64), 5, "me").dtype == np.float32


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "class make:\n    num_action_chunks = 2\n    predict = print",
            r"make, whose image_size is None; give it a positive",
        ),
        ("class make:\n    image_size = 8\n    num_action_chunks = 0", r"make, whose num_action_chunks is 0; give it"),
        ("class make:\n    image_size = True", r"make, whose image_size is True; give it a positive whole number"),
        (
            "class make:\n    image_size = num_action_chunks = 8",
            r"make, which has no method predict\(obs, \*, generator\)",
        ),
        ("make = 3\ndef create(): ...", r"defines no function or class 'make' \(it has: create\)"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path: Path, body: str, message: str):
    (tmp_path / "own.py").write_text(body + "\n")
    with pytest.raises(ValueError, match=message):
        OwnPolicy(f"{tmp_path}/own.py:make", None)


def test_the_policys_own_chunks_may_be_changed(tmp_path: Path):
    assert OwnPolicy(walker_file(tmp_path), None).num_action_chunks == 2
    assert OwnPolicy(walker_file(tmp_path), 3).num_action_chunks == 3


@pytest.mark.parametrize(
    "address", ["localhost:8000", "http://a:1", "ws://", "ws://a", "zmq://a", "ws://a:99999", "zmq://:1"]
)
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(ValueError, match=r"is no address.*; give ws://host:port .* or zmq://host:port"):
        check_address(address)


@pytest.mark.parametrize("address", ["ws://a:1", "wss://policies.example/a", "zmq://10.0.0.1:5555", "ws://[::1]:8000"])
def test_addresses(address: str):
    check_address(address)
