"""Which tasks are played how often."""

import numpy as np
import pytest

from algorithms.common.task_sampling import FLOOR, TaskSampler


def tallies(**by_task: tuple[int, int]) -> np.ndarray:
    table = np.zeros((8, 3))
    for task, (episodes, successes) in by_task.items():
        table[int(task[1:])] = episodes, successes, 0
    return table


def test_what_succeeds_half_of_the_time_is_played_most_and_what_is_solved_now_and_then():
    sampler = TaskSampler([0, 3, 5])
    assert sampler.weights.tolist() == [1, 1, 1]
    sampler.update(tallies(t0=(998, 499), t3=(998, 998), t5=(998, 0)))
    raw = np.sqrt([0.25, 0.999 * 0.001, 0.001 * 0.999]) + FLOOR
    assert sampler.weights == pytest.approx(3 * raw / raw.sum())
    names = [f"env/weight_task_{task}" for task in (0, 3, 5)]
    assert sampler.metrics() == dict(zip(names, sampler.weights, strict=True))


def test_a_task_without_episodes_counts_as_one_that_succeeds_half_of_the_time():
    sampler = TaskSampler([0, 7])
    sampler.update(tallies(t0=(2, 1)))
    assert sampler.weights.tolist() == [1, 1]
    sampler.update(np.zeros((1, 3)))  # nothing has ended: all stays
    assert sampler.weights.tolist() == [1, 1]


def test_a_task_named_twice_weighs_twice():
    sampler = TaskSampler([0, 0, 1])
    sampler.update(tallies(t0=(10, 5), t1=(10, 5)))
    assert sampler.weights.tolist() == [1, 1, 1]
    # Of three episodes two are of task 0: 4/3 of what it would have if both were played alike.
    assert sampler.metrics() == pytest.approx({"env/weight_task_0": 4 / 3, "env/weight_task_1": 2 / 3})


def test_a_continued_run_goes_on_with_the_same_weights():
    sampler, other = TaskSampler([0, 1]), TaskSampler([0, 1])
    sampler.update(tallies(t0=(10, 9), t1=(10, 5)))
    other.load_state_dict(sampler.state_dict())
    assert other.weights.tolist() == sampler.weights.tolist()
