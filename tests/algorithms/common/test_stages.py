"""Stages of environments: same results, overlapping work, and faults that stop the run with its state saved."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from algorithms.common.resume import checkpoints_in
from algorithms.common.stages import EnvStages
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import logged, make_mlp_agent, train, without_time

STEP_S = 0.05


class Sleeps(LineVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        time.sleep(STEP_S)  # like native stepping, this needs no interpreter lock
        return super().step(actions)


def slow_agent(args: Any) -> Any:
    agent = make_mlp_agent(args)
    forward = agent.forward

    def wait(obs: Any, action: Any = None, **options: Any) -> Any:
        if action is None:
            time.sleep(STEP_S)
        return forward(obs, action, **options)

    agent.forward = wait
    return agent


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("envs-")}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_results_do_not_depend_on_the_number_of_stages(tmp_path: Path, algorithm: str, num_stages: int):
    one = without_time(train(algorithm, tmp_path))
    several = without_time(train(algorithm, tmp_path, pipeline_stage_num=num_stages))
    assert several == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert not threads()


def test_environments_are_made_on_the_cuda_device_of_the_process(monkeypatch: pytest.MonkeyPatch):
    chosen: dict[str, int] = {}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda i: chosen.update({threading.current_thread().name: i}))
    made_in: list[tuple[str, int | None]] = []

    def make(num_envs: int) -> LineVectorEnv:
        name = threading.current_thread().name
        made_in.append((name, chosen.get(name)))
        return LineVectorEnv(num_envs)

    with EnvStages(make, np.arange(4), num_stages=2, timeout_s=10):
        assert made_in == [("envs-0", 3), ("envs-2", 3)]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_one_stage_simulates_while_another_is_decided(tmp_path: Path, algorithm: str):
    options = dict(env=Sleeps, make_agent=slow_agent, num_iterations=1, update_epochs=1)
    plain = train(algorithm, tmp_path, **options)
    overlapped = train(algorithm, tmp_path, pipeline_stage_num=2, **options)
    # On a busy machine waiting threads are woken late, so only what load cannot turn round is compared.
    assert plain["time/env_wait_s"] > 0.95 * plain["time/env_s"]
    assert overlapped["time/env_wait_s"] < 0.7 * overlapped["time/env_s"]


def test_numbers_of_stages_that_do_not_divide_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="pipeline_stage_num=3 must divide the 8 environments"):
        train("ppo", tmp_path, pipeline_stage_num=3)
    assert not threads()


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_an_environment_that_raises_stops_the_run_with_its_state_saved(tmp_path: Path, algorithm: str):
    class Broken(LineVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            if self.total_steps > 300:
                raise RuntimeError("the simulation diverged")
            return super().step(actions)

    with pytest.raises(RuntimeError, match="the simulation diverged") as caught:
        train(algorithm, tmp_path, env=Broken, num_iterations=9)
    notes = " ".join(caught.value.__notes__)
    assert "raised by a step of environments 0 to" in notes
    (run,) = tmp_path.iterdir()
    done, folder = checkpoints_in(run)[-1]
    assert done == len(logged(run)) > 0
    assert f"the state before this rollout is in {folder}" in notes
    (dump,) = (run / "faults").glob("failed_actions_rank_0.safetensors")
    assert load_file(dump)["actions_of_stage_0"].shape == (8 if algorithm == "ppo" else 16, 2, 7)
    assert not threads()
    # The saved state goes on where the fault was, once the environment works.
    train(algorithm, tmp_path, resume=run, num_iterations=done + 1)
    fresh = tmp_path / "fresh"
    train(algorithm, fresh, num_iterations=done + 1)
    assert logged(run) == logged(fresh / run.name)


def test_a_step_that_does_not_end_stops_the_run_with_its_state_saved(tmp_path: Path):
    release = threading.Event()
    hung: list[float] = []

    class Hangs(LineVectorEnv):
        def step(self, actions: np.ndarray) -> Any:
            if self.total_steps > 300:
                hung.append(time.perf_counter())
                release.wait(60)
            return super().step(actions)

    message = r"environments 0 to 7 have not ended a step within env_timeout_s=0\.5"
    try:
        with pytest.raises(TimeoutError, match=message) as error:
            train("ppo", tmp_path, env=Hangs, num_iterations=9, env_timeout_s=0.5)
        assert time.perf_counter() - hung[0] < 20
        (run,) = tmp_path.iterdir()
        assert checkpoints_in(run)[-1][0] == len(logged(run)) > 0
        assert "the state before this rollout is in" in " ".join(error.value.__notes__)
    finally:
        release.set()


def test_an_environment_that_cannot_be_made_is_an_error_and_leaves_no_thread():
    made: list[int] = []

    def make(num_envs: int) -> LineVectorEnv:
        made.append(num_envs)
        if len(made) == 2:
            raise OSError("no such asset")
        return LineVectorEnv(num_envs)

    with pytest.raises(OSError, match="no such asset"):
        EnvStages(make, np.arange(4), num_stages=2, timeout_s=1.0)
    deadline = time.perf_counter() + 5
    while threads() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_everything_that_touches_environments_runs_in_one_thread_a_stage():
    seen: set[tuple[int, str]] = set()

    class Watched(LineVectorEnv):
        def __init__(self, num_envs: int):
            self.note()
            super().__init__(num_envs)

        def note(self) -> None:
            seen.add((id(self), threading.current_thread().name))

        def reset(self, **options: Any) -> Any:
            self.note()
            return super().reset(**options)

        def step(self, actions: np.ndarray) -> Any:
            self.note()
            return super().step(actions)

        def close_extras(self, **options: Any) -> None:
            self.note()

    with EnvStages(Watched, np.arange(10, 14), num_stages=2, timeout_s=5.0) as stages:
        for stage in stages:
            stage.reset([1, 2])
            stage.send(np.zeros((2, 2, 7), np.float32))
        for stage in stages:
            assert stage.receive().reward.shape == (2,)
        assert sorted(stages.states() or {}) == [10, 11, 12, 13]
    assert len(seen) == 2
