"""Policies of one's own by name, and those for evaluations as functions of one environment's observation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from libero_gym.own_policies import EvaluatedPolicy, load_factory, policy_file

BODY = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Policy:
    name: str = "mine"

def make():
    return Policy()
"""


def test_a_policy_is_found_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.py").write_text(BODY)
    monkeypatch.chdir(tmp_path / "here")
    for name in (f"{tmp_path}/mine.py:make", "../mine.py:make", "./../mine.py:make"):
        assert policy_file(name).resolve() == tmp_path / "mine.py"
        assert load_factory(name)().name == "mine"
    (tmp_path / "bad.py").write_text("raise KeyError('of its own')")
    with pytest.raises(KeyError, match="of its own"):
        load_factory("../bad.py:make")
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere.py; give its path"):
        policy_file("nowhere.py:make")


def test_a_policy_is_found_in_a_module_here_or_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_factory("collections:OrderedDict")() == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy_that_lies_here.py").write_text(BODY)
    assert policy_file("policy_that_lies_here:make") == tmp_path / "policy_that_lies_here.py"
    assert load_factory("policy_that_lies_here:make")().name == "mine"
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import what_is_not_installed")
    with pytest.raises(ModuleNotFoundError, match="No module named 'what_is_not_installed'"):
        policy_file("lacking.policy:make")


@pytest.mark.parametrize("name", ["walker", "walker.py", "walker:", "walker:1", "..:make"])
def test_what_names_no_function_is_refused(name: str):
    with pytest.raises(ValueError, match=r"names no function; give package.module:make or path/to/file.py:make"):
        policy_file(name)


@pytest.mark.parametrize("name", ["no_such_module:make", "no.such.module:make", "math.sub:make"])
def test_what_is_not_there_is_refused(name: str):
    with pytest.raises(ValueError, match=r"there is no module .* here or installed; for a file elsewhere give path/to"):
        policy_file(name)
    with pytest.raises(ValueError, match=r"defines no function or class 'no_such' \(it has: "):
        load_factory("math:no_such")


class Recorder:
    """A policy for evaluations that returns noise and keeps what it is given."""

    image_size = 8
    num_action_chunks = 2

    def __init__(self, shape: tuple[int, ...] = (1, 3, 7)) -> None:
        self.shape, self.resets, self.seen = shape, [], []

    def reset(self, env_ids: Sequence[int]) -> None:
        self.resets.append(list(env_ids))

    def predict(self, obs: Mapping[str, Any], *, generator: Sequence[torch.Generator]) -> torch.Tensor:
        self.seen.append(obs)
        return torch.randn(self.shape, generator=generator[0])


def observation() -> dict[str, Any]:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    states = np.arange(8, dtype=np.float32)
    return {"images": image, "wrist_images": image[::-1], "states": states, "task_descriptions": "open it"}


def test_a_policy_for_evaluations_decides_for_one_environment():
    recorder = Recorder()
    policy = EvaluatedPolicy("own.py:make", recorder)
    assert policy.image_size == 8
    policy.begin_episode(5)
    first = policy(observation())
    assert (first.shape, first.dtype) == ((2, 7), np.float32)
    np.testing.assert_array_equal(first, torch.randn((1, 3, 7), generator=torch.Generator().manual_seed(5))[0, :2])
    (seen,) = recorder.seen
    assert seen["video.image"].shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(seen["state.y"], [[1.0]])
    assert seen["annotation.human.action.task_description"].tolist() == ["open it"]
    second = policy(observation())
    policy.begin_episode(5)
    np.testing.assert_array_equal(policy(observation()), first)
    assert not np.array_equal(first, second)
    assert recorder.resets == [[0], [0]]


@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 3, 6), (2, 3, 7), (3, 7)])
def test_chunks_of_another_shape_are_refused(shape: tuple[int, ...]):
    policy = EvaluatedPolicy("own.py:make", Recorder(shape))
    with pytest.raises(ValueError, match=r"own.py:make: actions have shape .*; expected \[1, H, 7\] with H >= 2"):
        policy(observation())


def test_a_policy_for_evaluations_without_a_size_is_refused():
    class Sizeless(Recorder):
        image_size = None

    with pytest.raises(ValueError, match=r"made a Sizeless, whose image_size is None; give it a positive whole number"):
        EvaluatedPolicy("own.py:make", Sizeless())
