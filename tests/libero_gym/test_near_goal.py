"""Episodes that begin near their end: where they begin, how many starts there are, what is refused."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from libero_gym import near_goal
from libero_gym.near_goal import NearGoalVectorEnv, states_of_expert
from libero_gym.physics.simulation import PhysicsError
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv


def make(num_envs: int = 2, steps: Any = (3, 6), num_init_states: Any = 2, **options: Any) -> NearGoalVectorEnv:
    options = {"autoreset_mode": AutoresetMode.SAME_STEP, **options}
    envs = LiberoVectorEnv("libero_goal", num_envs, task_ids=[0], observe_images=False, **options)
    return NearGoalVectorEnv(envs, steps_before_success=steps, num_init_states=num_init_states)


def number_of_start(envs: NearGoalVectorEnv, env_id: int) -> int:
    """Return which of the starts of `make` environment `env_id` stands at."""
    starts = [
        states_of_expert(get_task("libero_goal", 0), i, "settled")[-steps]["physics"]
        for i in (0, 1)
        for steps in (3, 6)
    ]
    physics = envs.unwrapped.get_state(env_id)["physics"]
    (number,) = [i for i, start in enumerate(starts) if np.array_equal(physics, start)]
    return number


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
    envs = make(num_envs=1, horizon=6)
    envs.reset(seed=0)
    still = np.zeros((1, 7), np.float32)
    for _ in range(5):
        envs.step(still)
    obs, _, _, truncated, infos = envs.step(still)
    assert truncated.all()
    assert infos["init_state_id"][0] == number_of_start(envs, 0) // 2
    assert not np.array_equal(infos["final_obs"]["states"], obs["states"])


@pytest.mark.parametrize("autoreset_mode", ["SAME_STEP", "NEXT_STEP"])
def test_an_environment_that_was_left_finished_begins_near_the_goal_too(autoreset_mode: str):
    envs = make(autoreset_mode=autoreset_mode, horizon=6)
    envs.reset(seed=0, options={"init_state_id": 3, "reset_mask": None})  # None is all of them
    assert [number_of_start(envs, i) for i in range(2)] == [3, 3]
    still = np.zeros((2, 7), np.float32)
    envs.step(still)
    envs.unwrapped.set_state(0, envs.unwrapped.get_state(0) | {"is_done": np.array(True)})
    *_, infos = envs.step(still)
    assert (infos["num_steps"].tolist(), infos["episode_length"].tolist()) == ([0, 1], [0, 2])
    assert infos["init_state_id"][0] == number_of_start(envs, 0) // 2


def test_an_environment_begins_near_the_goal_where_the_call_ends_in_anothers_error(monkeypatch: pytest.MonkeyPatch):
    envs = make()
    envs.reset(seed=0)
    envs.unwrapped.set_state(0, envs.unwrapped.get_state(0) | {"is_done": np.array(True)})

    def diverge(action: Any) -> bool:
        raise PhysicsError("diverged")

    monkeypatch.setattr(envs.unwrapped.simulations[1], "step", diverge)
    with pytest.raises(PhysicsError, match="diverged"):
        envs.step(np.zeros((2, 7), np.float32))
    assert number_of_start(envs, 0) in range(4)


def test_an_expert_that_fails_leaves_the_environments_as_they_were(monkeypatch: pytest.MonkeyPatch):
    envs = make()
    envs.reset(seed=0)
    before = envs.unwrapped.get_states()

    def fail(*_: Any) -> Any:
        raise RuntimeError("the expert does not solve task 0")

    monkeypatch.setattr(near_goal, "states_of_expert", fail)
    with pytest.raises(RuntimeError, match="does not solve"):
        envs.reset(seed=5)
    for state, expected in zip(envs.unwrapped.get_states(), before, strict=True):
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_more_steps_than_the_expert_needs_are_refused():
    length = len(states_of_expert(get_task("libero_goal", 0), 0, "settled"))
    envs = make(num_envs=1, steps=(length, length + 1), num_init_states=1)
    envs.reset(seed=0, options={"init_state_id": 0})  # the expert's own start
    before = envs.unwrapped.get_state(0)
    message = (
        f"steps_before_success has {length + 1}, but from initial state 0 of libero_goal task 0 the expert succeeds "
        f"after {length} steps: give at most so many, or leave this task or initial state out"
    )
    with pytest.raises(ValueError, match=message):
        envs.reset(options={"init_state_id": 1})
    np.testing.assert_array_equal(envs.unwrapped.get_state(0)["physics"], before["physics"])


def test_steps_may_be_an_array():
    envs = make(steps=np.array([3, 6]), num_init_states=np.int64(2))
    envs.reset(seed=0, options={"init_state_id": np.array([6, 9])})
    assert [number_of_start(envs, i) for i in range(2)] == [2, 1]


def test_what_cannot_begin_near_the_goal_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"0 among steps_before_success and num_init_states is not a positive integer"):
        make(steps=(3, 0))
    with pytest.raises(ValueError, match="steps_before_success is empty"):
        make(steps=())
    for steps in (5, "36", np.array([[3, 6]])):
        with pytest.raises(TypeError, match=r"is not a sequence of numbers of steps, such as \(3, 6\)"):
            make(steps=steps)
    make(steps=(3, 6), num_init_states=25)
    message = r"num_init_states=26 times 2 .* 52 starts, more than the 50 .* task 0.*: give num_init_states .* most 25"
    with pytest.raises(ValueError, match=message):
        make(steps=(3, 6), num_init_states=26)
    message = (
        r"steps_before_success has 6, but episodes of libero_goal task 0 are truncated after horizon=5 steps, .*"
        "give steps of at most the horizon, or make the environments with a longer one"
    )
    with pytest.raises(ValueError, match=message):
        make(horizon=5)
    make(horizon=6)
    envs = make(init_states="original")
    with pytest.raises(ValueError, match="placement_seed chooses where fixtures stand, which near the goal"):
        envs.reset(options={"placement_seed": 5})
    with pytest.raises(TypeError, match="NearGoalVectorEnv is no LiberoVectorEnv"):
        NearGoalVectorEnv(make(), steps_before_success=(3,))
    monkeypatch.setattr(LiberoVectorEnv, "worlds", None)  # those of a GPU
    with pytest.raises(ValueError, match="make the environments with physics='cpu'"):
        make()
