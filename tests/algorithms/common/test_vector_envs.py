"""States of environments, stacked to be sent to other processes."""

import pickle
import time

import numpy as np
import pytest

from algorithms.common.vector_envs import EnvState, StackedStates, merged_states


def states_of(env_ids: range, width: int) -> dict[int, EnvState]:
    return {
        i: {
            "qpos": np.arange(i, i + width, dtype=np.float64),
            "task_id": np.array(i),
            "suite": np.array(f"libero_{'x' * width}"),
        }
        for i in env_ids
    }


def assert_same(found: EnvState, expected: EnvState) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray)
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name], array)


def test_states_come_back_as_they_were_also_where_scenes_differ():
    states = states_of(range(4, 7), 3) | states_of(range(1, 3), 5)
    stacked = pickle.loads(pickle.dumps(StackedStates.of(states)))
    assert len(stacked.blocks) == 2
    assert len(stacked) == 5
    assert sorted(stacked) == [1, 2, 4, 5, 6]
    for env_id, state in states.items():
        assert_same(stacked[env_id], state)
    states[4]["qpos"][0] = -1  # it is a copy
    assert stacked[4]["qpos"][0] == 4
    with pytest.raises(KeyError, match="3"):
        stacked[3]
    assert 3 not in stacked


def test_parts_are_numbered_anew_and_put_together():
    parts = [StackedStates.of(states_of(range(2), 3)), StackedStates.of(states_of(range(2), 4))]
    numbers = (np.array([8, 6]), np.array([7, 9]))
    whole = merged_states([part.renumbered(ids) for part, ids in zip(parts, numbers, strict=True)])
    assert whole is not None
    assert sorted(whole) == [6, 7, 8, 9]
    assert [int(whole[i]["task_id"]) for i in (8, 6, 7, 9)] == [0, 1, 0, 1]
    assert merged_states([parts[0], None]) is None
    assert merged_states([]) == StackedStates(())


def test_many_states_are_sent_faster_stacked():
    states = states_of(range(1000), 20)
    stacked = StackedStates.of(states)

    def seconds(content: object) -> float:
        start = time.perf_counter()
        pickle.loads(pickle.dumps(content, 5))
        return time.perf_counter() - start

    assert min(seconds(stacked) for _ in range(5)) < 0.5 * min(seconds(states) for _ in range(5))
