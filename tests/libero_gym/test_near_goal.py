"""Episodes that begin near their end: where they begin, how many starts there are, what is refused."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from libero_gym.near_goal import NearGoalVectorEnv, states_of_expert
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv


def make(num_envs: int = 2, steps: tuple[int, ...] = (3, 6), **options: Any) -> NearGoalVectorEnv:
    options = {"autoreset_mode": AutoresetMode.SAME_STEP, **options}
    envs = LiberoVectorEnv("libero_goal", num_envs, task_ids=[0], observe_images=False, **options)
    return NearGoalVectorEnv(envs, steps_before_success=steps, num_init_states=2)


def test_episodes_begin_where_the_expert_stood_and_end_where_it_ended():
    envs = make(horizon=9)
    # Starts are numbered by initial state and then by steps: 0 and 3 are state 0 with 3 steps, state 1 with 6.
    _, infos = envs.reset(seed=0, options={"init_state_id": np.array([0, 3])})
    assert infos["init_state_id"].tolist() == [0, 1]
    for env_id, (init_state_id, steps) in enumerate(((0, 3), (1, 6))):
        passed = states_of_expert(get_task("libero_goal", 0), init_state_id, "settled")
        state = envs.unwrapped.get_state(env_id)
        assert np.array_equal(state["physics"], passed[-steps]["physics"])
        assert state["episode_length"] == 0
    assert not infos["success"].any()
    (observed, of_simulation) = envs.observe()["states"], envs.unwrapped.observe()["states"]
    assert np.array_equal(observed, of_simulation)


def test_a_new_episode_begins_near_the_goal_too_and_the_last_observation_is_its_own():
    envs = make(num_envs=1, horizon=2)
    envs.reset(seed=0)
    still = np.zeros((1, 7), np.float32)
    envs.step(still)
    obs, _, _, truncated, infos = envs.step(still)
    assert truncated.all()
    starts = [
        states_of_expert(get_task("libero_goal", 0), i, "settled")[-steps]["physics"]
        for i in (0, 1)
        for steps in (3, 6)
    ]
    now = envs.unwrapped.get_state(0)
    assert any(np.array_equal(now["physics"], start) for start in starts)
    assert infos["init_state_id"][0] == now["init_state_id"]
    assert not np.array_equal(infos["final_obs"]["states"], obs["states"])


def test_what_cannot_begin_near_the_goal_is_refused():
    with pytest.raises(ValueError, match=r"0 among steps_before_success and num_init_states is not a positive integer"):
        make(steps=(3, 0))
    with pytest.raises(ValueError, match="steps_before_success is empty"):
        make(steps=())
    with pytest.raises(ValueError, match=r"NEXT_STEP is not possible near the goal \(valid: SAME_STEP, DISABLED\)"):
        make(autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(TypeError, match="NearGoalVectorEnv is no LiberoVectorEnv"):
        NearGoalVectorEnv(make(), steps_before_success=(3,))
