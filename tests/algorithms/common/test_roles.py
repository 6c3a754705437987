"""Environments of env workers, as a rollout worker sees them, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install 'libero-gr00t[cluster]')")

from ray.exceptions import GetTimeoutError, RayActorError

from algorithms.common import roles
from algorithms.common.env_worker import EnvWorker
from algorithms.common.roles import EnvWorkerLost, RemoteStage
from tests.algorithms.line_env import LineVectorEnv


class LocalWorker:
    """An env worker in this process, as `RemoteStage` calls it; a slow call does not end in limited time."""

    def __init__(self, num_envs: int, slow: tuple[str, ...] = ()) -> None:
        self.worker = object.__new__(EnvWorker)
        self.worker._envs, self.worker._obs = LineVectorEnv(num_envs), {}
        self.slow = slow

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *inputs: (name in self.slow, getattr(self.worker, name), inputs))


@pytest.fixture(autouse=True)
def calls_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(call: Any, timeout: float | None = None) -> Any:
        is_slow, method, inputs = call
        if is_slow and timeout is not None:
            raise GetTimeoutError
        return method(*inputs)

    monkeypatch.setattr(roles, "result", result)


def make_stage(*workers: LocalWorker, timeout_s: float = 5.0) -> RemoteStage:
    stage = RemoteStage(workers, np.arange(4, 4 + 2 * len(workers)), 0, timeout_s)
    stage.open([("reset", ([1, 2],)) for _ in workers])
    return stage


def test_only_a_step_is_limited_in_time_and_says_what_to_do():
    stage = make_stage(LocalWorker(2), LocalWorker(2, slow=("reset", "states", "restore", "step")))
    states = stage.states()
    assert states is not None
    stage.open([("restore", ([states[i], states[i + 1]],)) for i in (4, 6)])
    actions = np.zeros((4, 2, 7), np.float32)
    stage.send(actions)
    with pytest.raises(
        TimeoutError, match="environments 4 to 7 have not ended a step within env_timeout_s=5; look for"
    ):
        stage.receive()
    assert stage.failed_actions is actions


def test_a_step_of_all_workers_has_the_time_of_one(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(roles.time, "monotonic", lambda: now[0])
    stage = make_stage(LocalWorker(2), LocalWorker(2))
    given: list[float | None] = []

    def result(call: Any, timeout: float | None = None) -> Any:
        given.append(timeout)
        now[0] += 2
        return call[1](*call[2])

    monkeypatch.setattr(roles, "result", result)
    stage.send(np.zeros((4, 2, 7), np.float32))
    stage.receive()
    assert given == [5.0, 3.0]


def test_a_worker_that_is_gone_is_told_from_one_that_could_not_be_made(monkeypatch: pytest.MonkeyPatch):
    stage = make_stage(LocalWorker(2))
    error = RayActorError(error_msg="no renderer")

    def result(call: Any, timeout: float | None = None) -> Any:
        raise error

    monkeypatch.setattr(roles, "result", result)
    with pytest.raises(EnvWorkerLost):
        stage.states()
    error._actor_init_failed = True
    with pytest.raises(RuntimeError, match="environments 4 to 5 could not be made: no renderer"):
        stage.states()
