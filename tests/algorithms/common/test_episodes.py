"""Success by the iteration in which episodes began: right where episodes that end within an iteration would flatter."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from algorithms.common.episodes import Cohorts, Episode, cohort_metrics
from algorithms.common.monitor import Monitor

HORIZON, DECISIONS, CHUNK = 12, 3, 2  # 6 decisions an episode at most, 3 an iteration


def episode(task_id: int, *, success: bool, length: int) -> Episode:
    return Episode(task_id=task_id, init_state_id=0, success=success, length=length)


def make_monitor() -> Monitor:
    stages: Any = SimpleNamespace(busy_s=0.0, wait_s=0.0)
    accelerator: Any = SimpleNamespace(
        num_processes=1, is_main_process=False, device="cpu", reduce=lambda value, how: value
    )
    return Monitor(
        accelerator, stages, decisions=DECISIONS, updates=[1] * 99, longest_episode=HORIZON // CHUNK,
        num_action_chunks=CHUNK,
    )  # fmt: skip


def play(monitor: Monitor, iteration: int, rng: np.random.Generator, left: dict[int, tuple[int, bool, int]]) -> Any:
    """Play an iteration of `left`, environment -> (decisions left, success, length), and return its metrics.

    Half of the episodes succeed after one to three decisions, the others run to the horizon.
    """
    monitor.begin_rollout(iteration)
    for _ in range(DECISIONS):
        final: dict[str, list[Any]] = {n: [] for n in ("task_id", "init_state_id", "success", "episode_length")}
        ended = np.zeros(len(left), np.bool_)
        for env, (decisions, success, length) in left.items():
            ended[env] = decisions == 1
            left[env] = (decisions - 1, success, length)
            for name, value in zip(final, (0, 0, success, length), strict=True):
                final[name].append(value)
            if ended[env]:
                left[env] = begin(rng)
        infos = {"final_info": {n: np.array(v) for n, v in final.items()}, "num_steps": np.full(len(left), CHUNK)}
        step: Any = SimpleNamespace(terminated=ended, truncated=ended, infos=infos, obs={})
        monitor.add_step(SimpleNamespace(offset=0), step)  # pyright: ignore[reportArgumentType]
        monitor.end_decision()
    monitor.begin_update()
    monitor.end_update()
    return monitor.metrics()


def begin(rng: np.random.Generator) -> tuple[int, bool, int]:
    success = bool(rng.random() < 0.5)
    decisions = int(rng.integers(1, 4)) if success else HORIZON // CHUNK
    return decisions, success, decisions * CHUNK - (1 if success else 0)  # success within the last chunk


def test_success_is_that_of_all_episodes_that_began_in_an_iteration():
    rng, monitor = np.random.default_rng(0), make_monitor()
    left = {env: begin(rng) for env in range(2000)}
    first, second, third = (play(monitor, iteration, rng, left) for iteration in (1, 2, 3))
    # All that end in the first iteration have succeeded: nothing is reported before its cohort is complete.
    assert "env/success_once" not in first
    assert "env/success_once" not in second
    assert third["env/success_once"] == pytest.approx(0.5, abs=0.03)
    assert third["env/num_episodes"] > 2000


def test_a_continued_run_counts_on_to_the_same_numbers():
    rng, monitor = np.random.default_rng(0), make_monitor()
    left = {env: begin(rng) for env in range(50)}
    for iteration in (1, 2):
        play(monitor, iteration, rng, left)
    saved, rng_state, left_before = monitor.state_dict(), rng.bit_generator.state, dict(left)
    expected = [play(monitor, iteration, rng, left) for iteration in (3, 4)]

    other, rng.bit_generator.state = make_monitor(), rng_state
    other.load_state_dict(saved)
    for iteration, wanted in zip((3, 4), expected, strict=True):
        got = play(other, iteration, rng, left_before)
        assert {k: v for k, v in got.items() if k[:4] == "env/"} == {k: v for k, v in wanted.items() if k[:4] == "env/"}


@pytest.mark.parametrize(
    ("decisions", "longest", "lag"), [(3, 6, 2), (3, 3, 1), (3, 1, 0), (24, 48, 2), (48, 48, 1), (96, 48, 1), (5, 0, 0)]
)
def test_a_cohort_is_complete_when_its_last_episode_must_have_ended(decisions: int, longest: int, lag: int):
    # One that begins with an iteration's last decision has `longest` - 1 decisions left in the next iterations.
    assert Cohorts(decisions, longest).lag == lag


def test_tasks_weigh_alike_however_often_they_are_played():
    cohorts = Cohorts(1, 0)
    cohorts.begin_iteration()
    cohorts.add([(episode(1, success=True, length=4), 0)] * 3 + [(episode(4, success=False, length=8), 0)])
    assert cohort_metrics(cohorts.complete()) == {
        "env/success_once": 0.5, "env/episode_len": 6.0, "env/num_episodes": 4.0, "env/success_once_task_1": 1.0,
        "env/success_once_task_4": 0.0,
    }  # fmt: skip


def test_without_episodes_there_is_nothing_to_report():
    assert cohort_metrics(Cohorts(3, 6).complete()) == {}
