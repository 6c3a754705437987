"""Environments of env workers, as a rollout worker sees them, without a cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed (pip install 'libero-gr00t[cluster]')")

from ray.exceptions import GetTimeoutError, RayActorError

from algorithms.common import processes, roles
from algorithms.common.env_worker import EnvWorker, Step
from algorithms.common.placement import Place
from algorithms.common.roles import EnvWorkerLost, OwnStage, RemoteStage, RolloutRole, join_steps
from algorithms.common.video import RolloutRecorder, read_pictures
from tests.algorithms.line_env import LineVectorEnv


class TimedWorker(EnvWorker):
    """Whose steps take one and a half seconds, as it says."""

    def __init__(self, num_envs: int) -> None:
        self._envs, self._obs = LineVectorEnv(num_envs), {}
        self.weights_at_reset: Any = None
        self.weights: Any = None

    def set_task_weights(self, weights: Any) -> None:
        self.weights = weights

    def reset(self, seeds: Any) -> dict[str, Any]:
        self.weights_at_reset = self.weights
        return super().reset(seeds)

    def step(self, actions: Any) -> tuple[Step, float]:
        return super().step(actions)[0], 1.5


class LocalWorker:
    """An env worker in this process, as `RemoteStage` calls it; a slow call does not end in limited time."""

    def __init__(self, num_envs: int, slow: tuple[str, ...] = ()) -> None:
        self.worker, self.slow = TimedWorker(num_envs), slow

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


class TensorEnv(LineVectorEnv):
    """Observes tensors, as environments do whose images stay on a GPU."""

    def observe(self) -> Any:
        obs = super().observe()
        return obs | {"state.x": torch.from_numpy(obs["state.x"])}


def make_stage(*workers: LocalWorker, timeout_s: float = 5.0) -> RemoteStage:
    stage = RemoteStage(workers, np.arange(4, 4 + 2 * len(workers)), 0, timeout_s)
    stage.open([("reset", ([1, 2],)) for _ in workers])
    return stage


def test_only_a_step_is_limited_in_time_and_says_what_to_do():
    stage = make_stage(LocalWorker(2), LocalWorker(2, slow=("reset", "states", "restore", "step")))
    states = stage.stacked_states()
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
        stage.stacked_states()
    error._actor_init_failed = True
    with pytest.raises(RuntimeError, match="environments 4 to 5 could not be made: no renderer"):
        stage.stacked_states()


class TwoSteps(RolloutRole):
    """A rollout of two decisions, after the first of which an env worker is lost if it is told so."""

    loses = False

    def build(self) -> None: ...

    def play(self, iteration: int, version: int) -> Any:
        for step in range(2):
            for stage in self.stages:
                stage.send(np.zeros((2, 2, 7), np.float32))
                self.add_step(step, stage, stage.receive())
                if self.loses:
                    raise EnvWorkerLost
        return "rollout"


def test_a_launch_that_is_refused_is_refused_to_workers_that_decide_too(monkeypatch: pytest.MonkeyPatch):
    def refuse(accelerator: Any) -> None:
        raise ValueError("mixed_precision=fp16 is not supported")

    monkeypatch.setattr(roles, "_limit_threads", lambda place: None)
    inputs: Any = (SimpleNamespace(output_dir=Path("runs")), None, Path("runs"), 0, np.arange(2))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_check_launch", refuse)
        with pytest.raises(ValueError, match="mixed_precision=fp16 is not supported"):
            TwoSteps(Place(node=0, gpu=None, cpus=1), None, *inputs)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        TwoSteps(Place(node=0, gpu=None, cpus=1), None, *inputs)


def make_role(folder: Path, *stages: RemoteStage) -> TwoSteps:
    role = object.__new__(TwoSteps)
    role.args = SimpleNamespace(num_action_chunks=2, num_steps=2)
    role.stages, role.recorder = list(stages), RolloutRecorder(folder, num_envs=1, interval=1, fps=4)
    role._trained, role._has_lost_envs, role._ended_at, role._own_stages = {}, False, 0.0, []
    return role


def test_seconds_of_stepping_are_summed_over_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roles, "split_rollout", lambda rollout, num_parts: [rollout])
    monkeypatch.setattr(roles.time, "perf_counter", lambda: 100.0)
    stages = [make_stage(LocalWorker(2)) for _ in range(2)]
    role = make_role(tmp_path, *stages)
    role._ended_at = 90.0
    seconds = role.rollout(1, 0, {}, None, 1)[0].seconds
    assert seconds == dict(env_s=2 * 2 * 1.5, env_wait_s=0, policy_s=0, env_idle_s=10 - 2 * 1.5)


def test_steps_of_workers_are_joined_also_where_episodes_end_on_one_alone(monkeypatch: pytest.MonkeyPatch):
    first, second = LineVectorEnv(2, image_size=64), LineVectorEnv(1, image_size=64)
    for envs in (first, second):
        envs.reset(seed=1)
    first.length[1] = 11  # of 12
    steps = [envs.step(np.zeros((envs.num_envs, 2, 7), np.float32)) for envs in (first, second)]
    made: list[tuple[int, ...]] = []
    zeros = np.zeros
    monkeypatch.setattr(roles.np, "zeros", lambda shape, *options: made.append(shape) or zeros(shape, *options))
    joined = join_steps(steps)
    assert joined.truncated.tolist() == [False, True, False]
    assert joined.infos["final_info"]["episode_length"].tolist() == [2, 12, 0]
    final, rest = joined.infos["final_obs"], steps[1][0]
    np.testing.assert_array_equal(final["video.image"][:2], steps[0][4]["final_obs"]["video.image"])
    np.testing.assert_array_equal(final["video.image"][2:], rest["video.image"])
    assert made
    assert max(len(shape) for shape in made) < 4  # no pictures, which the last observation stands for


def test_tasks_are_weighted_before_episodes_begin(tmp_path: Path):
    role, worker = make_role(tmp_path), LocalWorker(2)
    role.env_ids, weights = np.arange(2), np.array([1.5, 0.5])
    role.args.pipeline_stage_num, role.args.env_timeout_s = 1, 5.0
    is_open, states = role.open_envs([worker], [("reset", ([1, 2],))], weights)
    assert is_open
    assert states.keys() == {0, 1}
    assert worker.worker.weights_at_reset is weights


def test_the_film_of_a_rollout_that_is_played_again_is_of_that_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roles, "split_rollout", lambda rollout, num_parts: [rollout])
    role = make_role(tmp_path, make_stage(LocalWorker(2)))
    role.loses = True
    assert role.rollout(1, 0, {}, None, 1)[0].is_lost
    role.loses = role._has_lost_envs = False  # its environments were opened again
    report, part = role.rollout(1, 0, {}, None, 1)
    assert (report.env_steps, part) == (8, "rollout")
    assert len(list(read_pictures(tmp_path / "rollout_1.mp4"))) == 2


def test_an_env_worker_gives_other_processes_arrays_in_host_memory():
    worker = TimedWorker(2)
    plain = TimedWorker(2)
    worker._envs = TensorEnv(2)
    assert torch.is_tensor(worker._envs.observe()["state.x"])
    assert worker.reset([1, 2])["state.x"].tolist() == plain.reset([1, 2])["state.x"].tolist()
    had_final = False
    for _ in range(8):
        (obs, _, _, _, infos), _ = worker.step(np.ones((2, 2, 7), np.float32))
        assert isinstance(obs["state.x"], np.ndarray)
        if "final_obs" in infos:
            had_final = True
            assert isinstance(infos["final_obs"]["state.x"], np.ndarray)
    assert had_final
    assert isinstance(worker.restore(list(worker._envs.get_states()))["state.x"], np.ndarray)


def test_a_stage_in_the_process_that_decides_is_as_one_of_an_env_worker():
    ids = np.arange(4, 6)
    own = OwnStage(LineVectorEnv, ids, 0, 5.0)
    remote = RemoteStage([LocalWorker(2)], ids, 0, 5.0)
    actions = np.ones((2, 2, 7), np.float32)

    def play(stage: Any, *openings: tuple[str, tuple[Any, ...]]) -> list[Any]:
        stage.open(openings)
        seen = [stage.obs["state.x"].tolist()]
        for _ in range(3):
            stage.send(actions)
            seen.append(stage.receive().reward.tolist())
        return seen

    reset = ("reset", ([1, 2],))
    assert play(own, reset) == play(remote, reset)
    states = own.stacked_states()
    assert states is not None
    assert sorted(states) == [4, 5]
    after = play(own, ("observe", ()))
    restore = ("restore", ([states[4], states[5]],))
    assert play(own, restore) == play(remote, restore) == after
    own.close()


class StepsOfBoth(TwoSteps):
    """Has both stages step at once, and raises in the middle of it."""

    def play(self, iteration: int, version: int) -> Any:
        for stage in self.stages:
            stage.send(np.ones((2, 2, 7), np.float32))
        self.stages[0].receive()
        raise FloatingPointError("not finite")


def test_an_error_in_the_middle_of_a_step_leaves_stages_that_can_be_opened_again(tmp_path: Path):
    """As they are where a learner is lost meanwhile: the workers go on with their environments."""
    stages: Any = [OwnStage(LineVectorEnv, np.arange(i, i + 2), i, 5.0) for i in (0, 2)]
    role = make_role(tmp_path, *stages)
    role.__class__, role._own_stages = StepsOfBoth, stages
    role.env_ids, role.run = np.arange(4), cast(Any, SimpleNamespace(dump=lambda *_: tmp_path))
    openings = [("reset", ([1, 2],)), ("reset", ([3, 4],))]
    is_open, states = role.open_envs([], openings)
    first = [stage.obs["state.x"].tolist() for stage in stages]
    with pytest.raises(FloatingPointError):
        role.rollout(1, 0, {}, None, 1)
    assert role.rollout(2, 0, {}, None, 1)[0].is_lost  # it was asked for before the error was known
    stages[1].failed_actions = np.zeros(1, np.float32)
    back = [("restore", ([states[i], states[i + 1]],)) for i in (0, 2)]
    for again in (back, openings):
        is_open, there = role.open_envs([], again)
        assert is_open
        assert [stage.obs["state.x"].tolist() for stage in stages] == first
        assert all(np.array_equal(there[i][name], states[i][name]) for i in range(4) for name in states[i])
    assert stages[1].failed_actions is None
    for stage in stages:
        stage.close()


def test_stages_whose_step_does_not_end_are_not_opened_again():
    goes_on = threading.Event()

    class HangingEnv(LineVectorEnv):
        def step(self, actions: Any) -> Any:
            goes_on.wait()
            return super().step(actions)

    stage = OwnStage(HangingEnv, np.arange(2), 0, 0.05)
    stage.open([("reset", ([1, 2],))])
    stage.send(np.ones((2, 2, 7), np.float32))
    for _ in range(2):
        with pytest.raises(TimeoutError, match="environments 0 to 1 are in a step that does not end"):
            stage.settle()
    stage.close()
    goes_on.set()
    stage._thread.join()
