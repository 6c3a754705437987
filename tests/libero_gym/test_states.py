"""States and actions that are refused: what they were given to stays as it was, to the last bit."""

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

from libero_gym.env import LiberoEnv
from libero_gym.physics.simulation import PhysicsError, Simulation, load_dump
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task
from libero_gym.vector import LiberoVectorEnv

State = dict[str, Any]


def spoil(state: State) -> Generator[tuple[str, State]]:
    """Give (part of the error's message, state with one thing wrong), for each entry all that can be wrong with it."""
    yield r"has \['more'\], which are no part of it", {**state, "more": np.zeros(2)}
    for name, value in state.items():
        array = np.asarray(value)
        if name != "judged_qpos":  # which version 0.1.0 did not save
            yield rf"lacks \['{name}'\]", {other: state[other] for other in state if other != name}
        wrong = np.zeros((*array.shape, 2), array.dtype)
        yield rf"{name} of the state is .*; expected", state | {name: wrong}
        other = (
            array.astype(np.float32)
            if array.dtype.kind in "fb" and array.dtype != np.float32
            else np.zeros(array.shape)
        )
        if array.dtype == np.float32:
            other = np.zeros(array.shape, np.float64)
        yield rf"{name} of the state is float", state | {name: other}
        if array.dtype.kind == "f":
            for bad in (np.nan, np.inf, -np.inf):
                spoiled = array.copy()
                spoiled.reshape(-1)[-1:] = bad
                if array.size:
                    yield rf"{name} of the state holds numbers that are not finite", state | {name: spoiled}
    yield "belongs to scene 0123", state | {"scene": np.array("0123")}
    yield r"task_id=99 is not in libero_", state | {"task_id": np.array(99)}
    yield "'libero_nothing' is not installed|belongs to suite", state | {"suite": np.array("libero_nothing")}
    yield "init_state_id=-1 of the state is negative", state | {"init_state_id": np.array(-1)}
    if "rng" in state:
        for text in ("", "{}", "[1]", '{"bit_generator": "MT19937"}', str(state["rng"]).replace(":", ": -", 1)):
            yield "rng of the state is", state | {"rng": np.array(text)}
        negative = str(state["rng"]).replace('"inc": ', '"inc": -')
        yield "rng of the state is", state | {"rng": np.array(negative)}
        yield "episode_length=-1 of the state is negative", state | {"episode_length": np.array(-1)}
        for value in (7.0, 0.5, -1.0):
            yield f"last_value={value} of the state is neither 0 nor 1", state | {"last_value": np.array(value)}


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


def assert_all_refused(state: State, set_state: Callable[[State], None], look: Callable[[], Any]) -> None:
    """Give all kinds of spoiled states to `set_state`: an error each, and `look` sees no change."""
    before, count = look(), 0
    for no_state in (None, [state]):
        with pytest.raises(
            TypeError, match=r"the state is a .*; expected the dictionary of arrays that get_state retu"
        ):
            set_state(no_state)  # pyright: ignore[reportArgumentType]
    for message, spoiled in spoil(state):
        with pytest.raises(ValueError, match=message):
            set_state(spoiled)
        assert_same(look(), before)
        count += 1
    assert count > 60
    set_state(state)  # and the whole one is taken
    with pytest.raises(AssertionError):
        assert_same(look(), before)


def step_randomly(env: Any, num_steps: int, *lead: int, seed: int = 0) -> None:
    for action in np.random.default_rng(seed).uniform(-1, 1, (num_steps, *lead, 7)).astype(np.float32):
        env.step(action)


def test_simulations_refuse_states_and_stay_as_they_were():
    task = get_task("libero_goal", 2)
    simulation, other = (Simulation(load_scene(task)) for _ in range(2))
    simulation.reset(task, 0, np.random.RandomState(0))
    other.reset(get_task("libero_goal", 5), 1, np.random.RandomState(1))
    step_randomly(other, 2)
    assert_all_refused(other.get_state(), simulation.set_state, simulation.get_state)


def test_simulations_that_were_never_reset_stay_so():
    task = get_task("libero_goal", 2)
    simulation, other = (Simulation(load_scene(task)) for _ in range(2))
    other.reset(task, 0, np.random.RandomState(0))
    for message, spoiled in spoil(other.get_state()):
        with pytest.raises(ValueError, match=message):
            simulation.set_state(spoiled)
        with pytest.raises(ValueError, match="reset"):
            simulation.get_state()


def test_environments_refuse_states_and_stay_as_they_were():
    env, other = (LiberoEnv("libero_goal", observe_images=False) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=1)
    step_randomly(other, 2)
    state = other.get_state()
    assert_all_refused(state, env.set_state, lambda: [env.get_state(), env.observe(), env.task.__dict__])
    older = {name: state[name] for name in state if name not in ("episode_return", "is_done", "judged_qpos")}
    env.set_state(older)
    np.testing.assert_array_equal(env.observe()["states"], other.observe()["states"])
    assert (env.get_state()["episode_return"], env.get_state()["is_done"]) == (0.0, False)
    fixed = LiberoEnv("libero_goal", task_id=(int(state["task_id"]) + 1) % 10, observe_images=False)
    fixed.reset(seed=0)
    with pytest.raises(ValueError, match="was asked of an environment made for task_id="):
        fixed.set_state(state)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_vector_environments_refuse_states_and_stay_as_they_were(num_threads: int):
    env = LiberoVectorEnv("libero_object", 3, observe_images=False, num_threads=num_threads)
    env.reset(seed=0, options={"task_id": np.array([0, 1, 2])})
    env.reset(seed=0, options={"task_id": np.array([0, 1, 1])})
    other = LiberoVectorEnv("libero_object", 1, observe_images=False)
    other.reset(seed=4, options={"task_id": 2})
    step_randomly(other, 2, 1)
    state = other.get_state(0)

    def look() -> list[State]:
        tasks = {"tasks": [simulation.task for simulation in env.simulations]}
        return [*env.get_states(), env.observe(), tasks, {"spare": len(env.worlds._spare)}]

    before = look()
    with pytest.raises(ValueError, match="belongs to scene"):  # each of the two is right, but not together
        env.set_state(1, state | {"task_id": np.array(3)})
    with pytest.raises(ValueError, match=r"env_id=3 is out of range"):
        env.set_state(3, state)
    assert_same(look(), before)
    assert_all_refused(state, lambda spoiled: env.set_state(1, spoiled), look)
    assert [simulation.task.task_id for simulation in env.simulations] == [0, 2, 1]
    env.close()


@pytest.mark.slow
def test_gpu_environments_refuse_states_and_stay_as_they_were(monkeypatch: pytest.MonkeyPatch):
    from libero_gym.physics import warp_worlds

    monkeypatch.setattr(warp_worlds, "default_device", lambda: "cpu")
    env = LiberoVectorEnv("libero_goal", 2, observe_images=False, physics="warp", task_ids=[1, 3])
    env.reset(seed=0)
    state = env.get_state(1)
    env.reset(seed=7)
    before = env.get_states()
    with pytest.raises(ValueError, match="are not among those of these worlds"):
        env.set_state(0, state | {"task_id": np.array(2)})
    assert_same(env.get_states(), before)
    assert_all_refused(state, lambda spoiled: env.set_state(0, spoiled), lambda: [*env.get_states(), env.observe()])
    env.close()


def test_a_dump_of_what_is_not_finite_can_be_loaded_but_not_restored(dumps_folder):
    task = get_task("libero_goal", 2)
    simulation = Simulation(load_scene(task))
    simulation.reset(task, 0, np.random.RandomState(0))
    simulation.data.qpos[9] = np.nan
    with pytest.raises(PhysicsError, match="MuJoCo reports") as error:
        simulation.step(np.zeros(7))
    assert error.value.dump is not None
    again, action = load_dump(error.value.dump)
    assert np.isnan(again.data.qpos[9])
    with pytest.raises(PhysicsError, match="MuJoCo reports"):
        again.step(action)
    with pytest.raises(ValueError, match=r"physics of the state holds numbers that are not finite, at \[\[10\]"):
        Simulation(simulation.scene).set_state(again.get_state())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_environments_refuse_actions_and_stay_as_they_were(bad: float):
    env = LiberoEnv("libero_goal", observe_images=False)
    env.reset(seed=0)
    env.step(np.zeros(7, np.float32))
    before = env.get_state()
    for place in range(7):
        action = np.zeros(7, np.float32)
        action[place] = bad
        with pytest.raises(PhysicsError, match="is not finite; check the policy's output"):
            env.step(action)
        assert_same(env.get_state(), before)


@pytest.mark.parametrize("autoreset_mode", ["SAME_STEP", "NEXT_STEP", "DISABLED"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_vector_environments_refuse_actions_and_stay_as_they_were(autoreset_mode: str, num_threads: int):
    env = LiberoVectorEnv(
        "libero_goal", 4, observe_images=False, num_action_chunks=3, horizon=6, autoreset_mode=autoreset_mode,
        num_threads=num_threads,
    )  # fmt: skip
    env.reset(seed=0)
    env.step(np.zeros((4, 3, 7), np.float32))
    ended = env.get_state(2) | {"is_done": np.array(True)}
    env.set_state(2, ended)  # a step would reset it, and ignores its action
    before = env.get_states()
    for env_ids in ([0], [3], [1, 3]):
        for bad in (np.nan, np.inf, -np.inf):
            actions = np.zeros((4, 3, 7), np.float32)
            actions[[2, *env_ids], -1, 6] = bad
            with pytest.raises(
                PhysicsError, match=rf"actions of environments \[{', '.join(map(str, env_ids))}\] are not"
            ):
                env.step(actions)
            assert_same(env.get_states(), before)
    given = np.zeros((4, 3, 7))
    given[2] = np.nan
    *_, infos = env.step(given)
    assert infos["num_steps"].tolist() == [3, 3, 0, 3]
    assert np.isnan(given[2]).all()
    env.close()
