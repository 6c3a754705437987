"""The vector environment: Gymnasium's contract, equality with single environments, chunks, autoreset, bad input."""

import inspect
import itertools
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import DictInfoToList, FilterObservation, FlattenObservation, NormalizeObservation

from libero_gym import register_suite
from libero_gym.env import LiberoEnv
from libero_gym.physics.simulation import PhysicsError
from libero_gym.physics.worlds import Steps
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.tasks import own_suites
from libero_gym.vector import Episodes, LiberoVectorEnv

SUITE = "libero_spatial"


def make(num_envs=2, **kwargs):
    return LiberoVectorEnv(SUITE, num_envs, **({"observe_images": False} | kwargs))


def no_motion(*lead):
    action = np.zeros((*lead, 7), np.float32)
    action[..., 6] = -1
    return action


def random_actions(num_steps, *lead, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, *lead, 7)).astype(np.float32)


def force_success(env, i):
    """Makes environment `i` succeed at its next step, whatever the physics does."""
    env.simulations[i].goal = lambda data: True


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[key])
        else:
            np.testing.assert_array_equal(value, right[key], err_msg=key)


def test_make_vec_by_id():
    env = gymnasium.make_vec(
        f"libero_gym/{SUITE}-v0", num_envs=2, vectorization_mode="vector_entry_point", image_size=16, num_threads=1
    )
    assert env.metadata["autoreset_mode"] is env.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    observation, infos = env.reset(seed=0, options={"task_id": np.array([2, 5]), "init_state_id": 3})
    assert env.observation_space.contains(observation)
    assert infos["task_id"].tolist() == [2, 5]
    assert infos["init_state_id"].tolist() == [3, 3]
    assert observation["images"].shape == (2, 16, 16, 3)
    observation, rewards, terminations, truncations, _ = env.step(no_motion(2))
    assert env.observation_space.contains(observation)
    assert (rewards.shape, terminations.dtype, truncations.dtype) == ((2,), np.bool_, np.bool_)
    env.close()
    env.close()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_equals_single_environments_step_by_step(num_threads):
    vector = make(3, num_threads=num_threads)
    singles = [LiberoEnv(SUITE, observe_images=False) for _ in range(3)]
    observation, infos = vector.reset(seed=7)
    expected = [env.reset(seed=7 + i) for i, env in enumerate(singles)]
    actions = random_actions(8, 3)
    for step in range(9):
        for i, (single, info) in enumerate(result[:1] + result[-1:] for result in expected):
            np.testing.assert_array_equal(observation["states"][i], single["states"])
            assert observation["task_descriptions"][i] == single["task_descriptions"]
            assert {key: infos[key][i] for key in info} == info
        if step < 8:
            observation, rewards, terminations, _, infos = vector.step(actions[step])
            expected = [env.step(action) for env, action in zip(singles, actions[step], strict=True)]
            np.testing.assert_array_equal(rewards, [result[1] for result in expected])
            np.testing.assert_array_equal(terminations, [result[2] for result in expected])


@pytest.mark.slow
@pytest.mark.parametrize("autoreset_mode", ["SAME_STEP", "DISABLED"])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_equals_single_environments_over_many_episodes(autoreset_mode, num_chunks):
    """For 120 steps, some twenty episodes; `LIBERO_GYM_SOAK=full` makes it 3,000."""
    num_steps = 3000 if os.environ.get("LIBERO_GYM_SOAK") == "full" else 120
    num_envs, num_calls, horizon = 4, num_steps // num_chunks, 23
    vector = make(
        num_envs, num_threads=2, num_action_chunks=num_chunks, horizon=horizon, autoreset_mode=autoreset_mode,
        reward="relative", observe_images=True, image_size=8, renderer="warp",
    )  # fmt: skip
    singles = [
        LiberoEnv(SUITE, horizon=horizon, reward="relative", image_size=8, renderer="warp") for _ in range(num_envs)
    ]
    observation, _ = vector.reset(seed=5)
    shown = [env.reset(seed=5 + i) for i, env in enumerate(singles)]
    is_done, rng, num_ends = np.zeros(num_envs, np.bool_), np.random.default_rng(1), np.zeros(2, np.int64)

    def assert_shows(observation, infos, i, expected, info):
        for key, value in expected.items():
            np.testing.assert_array_equal(observation[key][i], value, err_msg=key)
        assert {key: infos[key][i] for key in info} == info

    for call in range(num_calls):
        actions = rng.uniform(-1, 1, (num_envs, num_chunks, 7)).astype(np.float32)
        for i in np.flatnonzero(rng.random(num_envs) < 0.03):  # some succeed
            force_success(vector, i)
            singles[i].simulation.goal = lambda data: True
        observation, rewards, terminations, truncations, infos = vector.step(actions.reshape(vector.action_space.shape))
        for i, env in enumerate(singles):
            paid, ends, count = [], (False, False), 0
            while not is_done[i] and not any(ends) and count < num_chunks:
                states, reward, *ends, info = env.step(actions[i, count])
                shown[i] = states, info
                paid.append(reward)
                count += 1
            assert (rewards[i], infos["num_steps"][i]) == (sum(paid), count)
            assert infos["rewards"][i].tolist() == paid + [0] * (num_chunks - count)
            assert [terminations[i], truncations[i]] == list(ends)
            num_ends += ends
            if autoreset_mode == "DISABLED":
                is_done[i] |= any(ends)
            elif any(ends):
                assert infos["_final_obs"][i]
                assert infos["_final_info"][i]
                assert_shows(infos["final_obs"], infos["final_info"], i, *shown[i])
                shown[i] = env.reset()
            assert_shows(observation, infos, i, *shown[i])
        if is_done.all() or (is_done.any() and rng.random() < 0.3):
            observation, infos = vector.reset(options={"reset_mask": is_done})
            for i in np.flatnonzero(is_done):
                shown[i] = singles[i].reset()
            is_done[:] = False
            for i in range(num_envs):
                assert_shows(observation, infos, i, *shown[i])
        if call % 40 == 20:  # what is put back goes on the same way
            for i, state in enumerate(vector.get_states()):
                vector.set_state(i, state)
                singles[i].set_state(singles[i].get_state())
    assert num_ends.min() >= 2
    for env in (vector, *singles):
        env.close()


def test_images_equal_those_of_single_environments():
    vector = make(2, observe_images=True, image_size=24)
    observation, _ = vector.reset(seed=3)
    observation, *_ = vector.step(random_actions(1, 2)[0])
    for i in range(2):
        single = LiberoEnv(SUITE, image_size=24)
        single.reset(seed=3 + i)
        expected, *_ = single.step(random_actions(1, 2)[0, i])
        for key in ("images", "wrist_images"):
            np.testing.assert_array_equal(observation[key][i], expected[key])
        single.close()
    vector.close()


def test_chunk_equals_single_steps():
    plain, chunked = make(2), make(2, num_action_chunks=4)
    plain.reset(seed=1)
    chunked.reset(seed=1)
    actions = random_actions(4, 2)
    for step in range(4):
        expected, *_ = plain.step(actions[step])
    observation, rewards, _, _, infos = chunked.step(np.moveaxis(actions, 0, 1))
    np.testing.assert_array_equal(observation["states"], expected["states"])
    assert rewards.tolist() == [0, 0]
    assert infos["rewards"].shape == (2, 4)
    assert infos["num_steps"].tolist() == [4, 4]
    assert infos["episode_length"].tolist() == [4, 4]


def test_observations_do_not_share_memory():
    env = make(2, observe_images=True, image_size=8)
    first, _ = env.reset(seed=0)
    kept = {key: np.copy(value) for key, value in first.items() if key != "task_descriptions"}
    second, *_ = env.step(random_actions(1, 2)[0])
    for key, value in kept.items():
        assert not np.shares_memory(first[key], second[key])
        np.testing.assert_array_equal(first[key], value)
    second["states"][:] = 0
    assert env.observe()["states"].any()
    env.close()


def test_only_those_that_are_looked_at_are_drawn():
    env, twin = (make(3, observe_images=True, image_size=8, renderer="warp") for _ in range(2))
    env.draw_only([1])
    observation, _ = env.reset(seed=0)
    expected, _ = twin.reset(seed=0)
    np.testing.assert_array_equal(observation["states"], expected["states"])
    for key in ("images", "wrist_images"):
        assert observation[key].shape == expected[key].shape
        np.testing.assert_array_equal(observation[key][1], expected[key][1])
        assert not observation[key][[0, 2]].any()
    action = random_actions(1, 3)[0]
    env.draw_only([2])
    moved, *_ = env.step(action)
    expected, *_ = twin.step(action)
    for key in ("images", "wrist_images"):
        np.testing.assert_array_equal(moved[key][1], observation[key][1])  # as it was drawn last
        np.testing.assert_array_equal(moved[key][2], expected[key][2])
        assert (expected[key][1] != observation[key][1]).any()
    env.draw_only(None)  # what was left out is made up for, without a step
    assert_same(env.observe(), expected)
    with pytest.raises(ValueError, match=r"env_id=3 is out of range \(valid: 0-2\)"):
        env.draw_only([0, 3])
    blind = make(2, observe_images=True, image_size=8, renderer="warp")
    blind.draw_only([])
    observation, _ = blind.reset(seed=0)
    assert blind.observation_space.contains(observation)
    assert not observation["images"].any()
    for each in (env, twin, blind):
        each.close()


def test_finished_environment_idles_for_the_rest_of_its_chunk():
    env = make(2, num_action_chunks=5, horizon=7, autoreset_mode="DISABLED")
    env.reset(seed=0)
    _, _, terminations, truncations, infos = env.step(no_motion(2, 5))
    assert not (terminations | truncations).any()
    force_success(env, 1)
    _, rewards, terminations, truncations, infos = env.step(no_motion(2, 5))
    assert infos["num_steps"].tolist() == [2, 1]
    assert terminations.tolist() == [False, True]
    assert truncations.tolist() == [True, False]
    assert rewards.tolist() == [0, 1]
    np.testing.assert_array_equal(infos["rewards"], [[0] * 5, [1, 0, 0, 0, 0]])
    assert infos["episode_length"].tolist() == [7, 6]
    assert infos["episode_return"].tolist() == [0, 1]


def test_disabled_autoreset_idles_until_a_masked_reset():
    env = make(3, horizon=2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0, options={"task_id": 0, "init_state_id": np.arange(3)})
    env.step(no_motion(3))
    ended, _, _, truncations, _ = env.step(no_motion(3))
    assert truncations.all()
    idle, rewards, terminations, truncations, infos = env.step(random_actions(1, 3)[0])
    np.testing.assert_array_equal(idle["states"], ended["states"])
    assert infos["num_steps"].tolist() == [0, 0, 0]
    assert not (terminations | truncations).any()
    assert not rewards.any()
    mask = np.array([False, True, False])
    fresh, infos = env.reset(seed=[None, 5, None], options={"reset_mask": mask, "task_id": 4, "init_state_id": 9})
    np.testing.assert_array_equal(fresh["states"][~mask], ended["states"][~mask])
    assert (fresh["states"][1] != ended["states"][1]).any()
    assert infos["task_id"].tolist() == [0, 4, 0]
    assert infos["init_state_id"].tolist() == [0, 9, 2]
    assert infos["episode_length"].tolist() == [2, 0, 2]
    again = LiberoEnv(SUITE, task_id=4, observe_images=False)
    single, _ = again.reset(seed=5, options={"init_state_id": 9})
    assert single["task_descriptions"] == fresh["task_descriptions"][1]


def test_same_step_autoreset_gives_final_observation_and_info():
    env = make(2, horizon=2, observe_images=True, image_size=16, autoreset_mode="SAME_STEP")
    twin = make(2, horizon=2, observe_images=True, image_size=16, autoreset_mode="DISABLED")
    for environment in (env, twin):
        environment.reset(seed=0, options={"task_id": np.array([1, 2]), "init_state_id": 0})
        environment.step(no_motion(2))
    force_success(env, 0)
    force_success(twin, 0)
    before = env.step(no_motion(2))
    expected, _, _, _, expected_infos = twin.step(no_motion(2))
    observation, rewards, terminations, truncations, infos = before
    assert rewards.tolist() == [1, 0]
    assert terminations.tolist() == [True, False]
    assert truncations.tolist() == [True, True]
    assert infos["_final_obs"].tolist() == [True, True]
    assert_same(infos["final_obs"], expected)
    for key in ("success", "task_id", "init_state_id", "episode_length", "episode_return"):
        np.testing.assert_array_equal(infos["final_info"][key], expected_infos[key])
    assert infos["episode_length"].tolist() == [0, 0]
    assert infos["success"].tolist() == [False, False]
    assert (observation["images"] != expected["images"]).any()
    env.close()
    twin.close()


def test_next_step_autoreset_ignores_one_action():
    env = make(1, horizon=1, autoreset_mode="NEXT_STEP")
    env.reset(seed=0)
    ended, _, _, truncations, infos = env.step(no_motion(1))
    assert truncations.all()
    assert "final_obs" not in infos
    observation, rewards, terminations, truncations, infos = env.step(no_motion(1))
    assert (infos["num_steps"].item(), infos["episode_length"].item(), rewards.item()) == (0, 0, 0)
    assert not (terminations | truncations).any()
    assert (observation["states"] != ended["states"]).any()
    assert env.step(no_motion(1))[3].all()


def test_book_keeping_by_hand():
    episodes = Episodes(4, reward="relative")
    episodes.begin(np.arange(4), np.array([False, False, True, False]), [5, 5, 5, 9])
    episodes.length[1] = 3
    ran = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], np.bool_)
    successes = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], np.bool_)
    rewards, terminations, truncations = episodes.advance(Steps(ran, successes))
    np.testing.assert_array_equal(rewards, [[0, 1, 0], [0, 0, 0], [-1, 0, 0], [0, 0, 0]])
    assert terminations.tolist() == [True, False, False, False]
    assert truncations.tolist() == [False, True, False, False]
    assert episodes.is_done.tolist() == [True, True, False, False]
    assert episodes.length.tolist() == [2, 5, 3, 0]
    assert episodes.steps_left.tolist() == [3, 0, 2, 9]
    assert episodes.last_value.tolist() == [1, 0, 0, 0]
    assert episodes.total_reward.tolist() == [1, 0, -1, 0]
    episodes.set_state(3, episodes.get_state(0), 7)
    assert {name: values[3] for name, values in vars(episodes).items() if isinstance(values, np.ndarray)} == {
        "length": 2, "horizon": 7, "total_reward": 1, "last_value": 1, "is_done": True,
    }  # fmt: skip
    sparse = Episodes(1, reward="sparse")
    sparse.begin(np.arange(1), np.array([True]), [2])
    rewards, terminations, truncations = sparse.advance(Steps(ran[:1], successes[:1]))
    np.testing.assert_array_equal(rewards, [[0, 1, 0]])
    assert terminations.tolist() == truncations.tolist() == [True]  # both at once


def test_a_combined_suite_plays_the_tasks_of_its_members():
    """Numbers are those of the combined suite; instruction, horizon and state are those of the task's own."""
    env = LiberoVectorEnv("libero_40", 3, observe_images=False, autoreset_mode="DISABLED", task_ids=[2, 25, 31])
    assert env.task_ids == (2, 25, 31)
    observation, infos = env.reset(seed=0, options={"task_id": np.array([2, 25, 31]), "init_state_id": 4})
    assert infos["task_id"].tolist() == [2, 25, 31]
    members = [("libero_spatial", 2, 240), ("libero_goal", 5, 320), ("libero_10", 1, 480)]
    states = env.get_states()
    for i, (suite, task_id, horizon) in enumerate(members):
        alone = LiberoVectorEnv(suite, 1, observe_images=False)
        expected, _ = alone.reset(seed=i, options={"task_id": task_id, "init_state_id": 4})
        np.testing.assert_array_equal(observation["states"][i], expected["states"][0])
        assert observation["task_descriptions"][i] == expected["task_descriptions"][0]
        assert (states[i]["suite"], states[i]["task_id"]) == (suite, task_id)
        own = alone.get_state(0)
        np.testing.assert_array_equal(states[i]["physics"], own["physics"])
        env.set_state(i, own | {"episode_length": np.array(horizon - 1)})
    for i in range(3):
        is_last = np.arange(3) == i
        for k in np.flatnonzero(~is_last):
            env.set_state(int(k), states[k] | {"episode_length": np.array(members[k][2] - 2)})
        env.set_state(i, states[i] | {"episode_length": np.array(members[i][2] - 1)})
        *_, truncations, infos = env.step(no_motion(3))
        assert truncations.tolist() == is_last.tolist()
        assert infos["task_id"].tolist() == [2, 25, 31]
    foreign = LiberoVectorEnv("libero_90", 1, observe_images=False)
    foreign.reset(seed=0)
    with pytest.raises(ValueError, match="the state belongs to suite libero_90, these environments to libero_40"):
        env.set_state(0, foreign.get_state(0))
    with pytest.raises(ValueError, match=r"task_id=3 of libero_40 is not among .*\(valid: \[2, 25, 31\]\)"):
        env.reset(options={"task_id": 3})
    with pytest.raises(FileNotFoundError, match="no held_out states are recorded for libero_90"):
        LiberoVectorEnv("libero_100", 1, observe_images=False, init_states="held_out")


def test_relative_reward_pays_the_change():
    env = make(1, num_action_chunks=2, reward="relative", autoreset_mode="DISABLED")
    env.reset(seed=0)
    env.set_state(0, env.get_state(0) | {"last_value": np.array(1.0)})  # as if the goal had just been lost
    _, rewards, _, _, infos = env.step(no_motion(1, 2))
    np.testing.assert_array_equal(infos["rewards"], [[-1, 0]])
    assert rewards.tolist() == [-1]


def test_state_restores_to_the_last_bit_and_branches():
    env = make(2, observe_images=True, image_size=16)
    env.reset(seed=0)
    env.step(random_actions(1, 2)[0])
    state = env.get_state(0)
    actions = random_actions(3, 2, seed=1)
    actions[:, 1] = actions[:, 0]
    expected = [env.step(action)[0]["states"][0] for action in actions]
    image = env.observe()["images"][0]
    for i in range(2):
        env.set_state(i, state)
    for action, states in zip(actions, expected, strict=True):
        observation, *_ = env.step(action)
        np.testing.assert_array_equal(observation["states"], [states, states])
    np.testing.assert_array_equal(observation["images"], [image, image])
    assert env.get_state(0)["rng"] == env.get_state(1)["rng"]
    with pytest.raises(ValueError, match=r"env_id=2 is out of range \(valid: 0-1\)"):
        env.get_state(2)
    env.close()


def test_states_go_between_single_and_vector_environments():
    env, single = (
        make(1, horizon=4, reward="relative"),
        LiberoEnv(SUITE, horizon=4, reward="relative", observe_images=False),
    )
    env.reset(seed=0)
    force_success(env, 0)
    actions = random_actions(4, 1)
    env.step(actions[0])
    state = env.get_state(0)
    single.set_state(state)
    assert_same(single.get_state(), state)
    assert (state["episode_return"], state["is_done"]) == (1, True)
    expected, reward, *_ = single.step(actions[1, 0])  # a single one goes on
    assert reward == -1
    env.set_state(0, single.get_state() | {"is_done": np.array(False)})
    assert_same(env.get_state(0), single.get_state() | {"is_done": np.array(False)})
    np.testing.assert_array_equal(env.observe()["states"][0], expected["states"])
    for action in actions[2:]:
        observation, _, _, (truncated,), infos = env.step(action)
        expected, _, _, is_cut, _ = single.step(action[0])
        np.testing.assert_array_equal(observation["states"][0], expected["states"])
        assert truncated == is_cut == (infos["episode_length"][0] == 4)
    assert_same(env.get_state(0), single.get_state())
    assert single.get_state()["episode_return"] == infos["episode_return"][0] == 0
    single.reset()
    assert [single.get_state()[name] for name in ("episode_length", "episode_return", "is_done")] == [0, 0, False]


@pytest.mark.parametrize("init_states", [None, "settled", "original"])
def test_groups_start_and_stay_in_equal_states(init_states):
    env = make(6, init_states=init_states)
    options = {"task_id": np.repeat([4, 7], 3), "init_state_id": np.repeat([8, 2], 3)}
    env.reset(seed=[11, 11, 11, 12, 12, 12], options=options)
    for step in range(3):
        states = env.get_states()
        for i in range(6):
            assert_same(states[i], states[i - i % 3])
        assert (states[0]["fixture_poses"] != states[3]["fixture_poses"]).any()
        actions = random_actions(1, 2, seed=step)[0]
        env.step(np.repeat(actions, 3, axis=0))


def test_initial_states_are_chosen_like_in_the_single_environment():
    starts = {}
    for kind in ("settled", "held_out", "original"):
        vector, single = make(1, init_states=kind), LiberoEnv(SUITE, observe_images=False, init_states=kind)
        options = {"task_id": 5, "init_state_id": 3}
        vector.reset(seed=2, options=options)
        single.reset(seed=2, options=options)
        for name, value in single.simulation.get_state().items():
            np.testing.assert_array_equal(vector.get_state(0)[name], value, err_msg=name)
        starts[kind] = vector.get_state(0)
    for first, second in itertools.combinations(starts.values(), 2):
        assert (first["fixture_poses"] != second["fixture_poses"]).any()


def test_a_task_named_more_often_is_drawn_more_often():
    env = make(8, task_ids=[0, 8, 8, 8])
    drawn = [task for seed in range(20) for task in env.reset(seed=8 * seed)[1]["task_id"]]
    assert set(drawn) == {0, 8}
    assert drawn.count(8) / len(drawn) == pytest.approx(0.75, abs=0.1)  # 0.035 is a standard deviation


def test_generators_tell_their_seeds_as_gymnasiums_do():
    make_one = lambda: LiberoEnv(SUITE, observe_images=False, horizon=1)  # noqa: E731
    envs = (make(2, horizon=1), SyncVectorEnv([make_one] * 2))
    for seed, expected in ((5, (5, 6)), (None, (5, 6)), ([8, None], (8, 6)), ([None, 2], (8, 2))):
        for env in envs:
            env.reset(seed=seed)
            assert env.np_random_seed == expected
    fresh = make(2)
    assert len({*fresh.np_random_seed}) == 2
    np.testing.assert_array_equal(  # the seed that was drawn seeds what is drawn
        fresh.np_random[0].random(3), np.random.Generator(np.random.PCG64(fresh.np_random_seed[0])).random(3)
    )
    envs[0].set_state(1, envs[0].get_state(0))
    assert envs[0].np_random_seed == (8, -1)


def test_all_tasks_of_a_suite_of_ones_own_have_one_observation_space(tmp_path, monkeypatch):
    monkeypatch.setenv(own_suites.VARIABLE, "")
    text = (Path(__file__).parents[1] / "data/own_suite/put_the_cream_cheese_on_the_bowl.bddl").read_text("utf-8")
    for name, end in (("asked", "?"), ("told", "!")):
        (tmp_path / f"{name}.bddl").write_text(text.replace(", please", end), "utf-8")
        np.savez(tmp_path / f"{name}.npz", states=np.zeros((3, 1 + 30 + 28)))
    register_suite("punctuated", tmp_path, tmp_path)
    singles = [LiberoEnv("punctuated", task_id=task_id, observe_images=False) for task_id in range(2)]
    vector = LiberoVectorEnv("punctuated", 2, task_id=1, observe_images=False)
    assert singles[0].observation_space == singles[1].observation_space == vector.single_observation_space
    assert vector.envs[0].observation_space == singles[0].observation_space
    assert (
        SyncVectorEnv([lambda: singles[0], lambda: singles[1]]).single_observation_space == singles[0].observation_space
    )


@pytest.mark.parametrize("num_action_chunks", [1, 3])
def test_the_action_space_is_a_batch_of_single_ones(num_action_chunks):
    env = make(2, num_action_chunks=num_action_chunks)
    assert env.action_space == batch_space(env.single_action_space, 2)
    assert env.single_action_space.shape == ((7,) if num_action_chunks == 1 else (3, 7))
    assert env.envs[0].action_space == LiberoEnv(SUITE, observe_images=False).action_space


def assert_start_is_refused(env, good, bad, task_id, message, before):
    """A bad state for the second environment is refused, and leaves both as they were."""
    states = iter((good, bad))
    env.set_start_states(lambda start: next(states))
    with pytest.raises((ValueError, TypeError), match=message):
        env.reset(seed=9, options={"task_id": task_id})
    for left, right in zip(env.get_states(), before, strict=True):
        assert_same(left, right)


def test_start_states_are_checked_before_any_world_is_touched():
    env = make(2, task_ids=[0, 5], num_threads=1)
    env.reset(seed=0, options={"task_id": 0})
    good, whole = env.simulations[0].get_state(), env.get_state(0)
    other = make(1, task_id=5)
    other.reset(seed=0)
    env.step(random_actions(1, 2)[0])
    before = env.get_states()
    bad = {
        r"it is of libero_spatial task 5; return what Simulation.get_state returned": other.simulations[0].get_state(),
        r"the state has \['episode_length', .* return what Simulation.get_state returned": whole,
        "the state is a NoneType; expected the dictionary": None,
        "physics of the state holds numbers that are not finite": good | {"physics": good["physics"] * np.nan},
    }
    for message, state in bad.items():
        assert_start_is_refused(
            env, good, state, 0, rf"state for environment 1 that cannot begin .*: {message}", before
        )
    with pytest.raises(TypeError, match="start_state=3 is no function; give one that takes an EpisodeStart"):
        env.set_start_states(3)
    env.set_start_states(lambda start: good if start.task.task_id == 0 else other.simulations[0].get_state())
    assert env.reset(options={"task_id": np.array([5, 0])})[1]["task_id"].tolist() == [5, 0]  # scenes change
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("task_ids", [[1], [1, 3]])  # one scene, two scenes
def test_start_states_of_gpu_physics_are_checked_before_any_world_is_touched(task_ids, monkeypatch):
    pytest.importorskip("mujoco_warp")
    from libero_gym.physics import warp_worlds

    monkeypatch.setattr(warp_worlds, "default_device", lambda: "cpu")
    env = LiberoVectorEnv("libero_goal", 2, task_ids=task_ids, observe_images=False, physics="warp")
    env.reset(seed=0, options={"task_id": 1})
    good, whole = env.worlds.get_state(0), env.get_state(0)
    env.step(random_actions(1, 2)[0])
    before = env.get_states()
    for state in (whole, None, good | {"qpos": good["qpos"] * np.nan}):
        assert_start_is_refused(env, good, state, 1, r"return what envs\.worlds\.get_state returned", before)
    env.set_start_states(lambda start: good)
    env.reset(options={"task_id": 1})
    assert_same(env.worlds.get_state(1), good)
    env.close()


def test_fixtures_of_original_states_follow_the_seed_and_settled_ones_do_not():
    options = {"task_id": 0, "init_state_id": 0}
    for kind, differs in (("original", True), ("settled", False)):
        env = make(2, init_states=kind)
        env.reset(seed=[0, 1], options=options)
        first, second = (env.get_state(i)["fixture_poses"] for i in range(2))
        assert bool((first != second).any()) is differs


def test_number_of_threads_changes_nothing():
    batches = []
    for num_threads in (1, 2, 5):
        env = make(5, num_threads=num_threads, horizon=3, num_action_chunks=2, autoreset_mode="SAME_STEP")
        results = [env.reset(seed=9)]
        results += [env.step(np.moveaxis(a, 0, 1)) for a in random_actions(8, 5).reshape(4, 2, 5, 7)]
        batches.append((results, [env.get_state(i) for i in range(5)]))
        env.close()
    (expected, expected_states), *others = batches
    assert any(infos.get("_final_obs", np.zeros(1)).any() for *_, infos in expected)
    for results, states in others:
        for result, reference in zip(results, expected, strict=True):
            for value, known in zip(result, reference, strict=True):
                assert_same({"value": value}, {"value": known})
        for state, known in zip(states, expected_states, strict=True):
            assert_same(state, known)


@pytest.mark.parametrize("autoreset_mode", ["SAME_STEP", "NEXT_STEP"])
def test_drawing_while_others_step_changes_nothing(autoreset_mode, monkeypatch):
    results, views = [], WarpRenderer.views
    for overlaps in (False, True):
        monkeypatch.setattr(WarpRenderer, "uses_all_cores", not overlaps)
        env = make(
            20, num_threads=2, horizon=3, num_action_chunks=2, observe_images=True, image_size=8, renderer="warp",
            autoreset_mode=autoreset_mode,
        )  # fmt: skip
        drawn = []
        monkeypatch.setattr(
            WarpRenderer, "views", lambda *args, n=drawn, **kwargs: (n.append(len(args[1])), views(*args, **kwargs))[1]
        )
        env.reset(seed=9)
        results.append([env.step(np.moveaxis(a, 0, 1)) for a in random_actions(6, 20).reshape(3, 2, 20, 7)])
        assert (10 in drawn) == overlaps  # in two parts
        env.close()
    for result, reference in zip(*results, strict=True):
        for value, known in zip(result, reference, strict=True):
            assert_same({"value": value}, {"value": known})


def test_few_environments_that_take_unequally_long_keep_their_images(monkeypatch):
    monkeypatch.setattr(WarpRenderer, "uses_all_cores", False)
    options = dict(observe_images=True, image_size=16, renderer="warp", num_action_chunks=4, horizon=200)
    env, again = make(4, num_threads=2, **options), make(4, **options)
    env.reset(seed=0)
    env.set_state(0, env.get_state(0) | {"episode_length": np.array(199)})  # its chunk ends after one step,
    env.step(no_motion(4, 4))
    observation, *_ = env.step(no_motion(4, 4))  # so that it is the last to be stepped, and all are drawn together
    for i, state in enumerate(env.get_states()):
        again.set_state(i, state)
    for key in ("images", "wrist_images"):
        np.testing.assert_array_equal(observation[key], again.observe()[key])
    for made in (env, again):
        made.close()


def test_an_error_while_others_are_drawn_names_its_environment(monkeypatch):
    monkeypatch.setattr(WarpRenderer, "uses_all_cores", False)
    env = make(20, num_threads=2, observe_images=True, image_size=8, renderer="warp")
    env.reset(seed=0)

    def fail(action):
        raise PhysicsError("diverged")

    monkeypatch.setattr(env.simulations[15], "step", fail)
    with pytest.raises(PhysicsError, match="diverged") as error:
        env.step(no_motion(20))
    assert error.value.__notes__ == ["raised by environment 15 of 20"]
    env.close()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_after_an_error_the_others_show_where_they_are_and_go_on(num_threads, monkeypatch):
    env = make(3, num_threads=num_threads, horizon=1, autoreset_mode="SAME_STEP")
    before, _ = env.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(env.simulations[2], "step", lambda action: (_ for _ in ()).throw(PhysicsError("diverged")))
        with pytest.raises(PhysicsError, match="diverged"):
            env.step(random_actions(1, 3)[0])
    observed = env.observe()
    after, _ = env.reset(options={"reset_mask": np.array([False, False, True])})
    for states in (observed["states"], after["states"]):
        np.testing.assert_array_equal(states[:2], [simulation.states() for simulation in env.simulations[:2]])
        assert not (states[:2] == before["states"][:2]).all(axis=1).any()
    # The ends of the first two were lost with the call: they begin anew instead of idling.
    _, _, terminated, truncated, infos = env.step(no_motion(3))
    assert (infos["num_steps"].tolist(), (terminated | truncated).tolist()) == ([0, 0, 1], [False, False, True])
    *_, infos = env.step(no_motion(3))
    assert infos["num_steps"].tolist() == [1, 1, 1]


def test_environments_that_fail_to_settle_are_left_finished(monkeypatch):
    env = make(2, init_states="original")
    env.reset(seed=0)
    generator = env.get_state(1)["rng"]
    with monkeypatch.context() as patch:
        patch.setattr(env.simulations[1], "_step", lambda *_: (_ for _ in ()).throw(PhysicsError("diverged")))
        with pytest.raises(PhysicsError, match="diverged") as error:
            env.reset(options={"reset_mask": np.array([False, True])})
    assert error.value.__notes__ == ["raised by environment 1 of 2"]
    assert env.get_state(1)["rng"] == generator
    assert [env.step(no_motion(2))[-1]["num_steps"].tolist() for _ in range(2)] == [[1, 0], [1, 1]]


def test_a_reset_that_is_refused_touches_nothing():
    env = LiberoVectorEnv("libero_object", 2, observe_images=False)
    env.reset(seed=0, options={"task_id": np.array([3, 1])})
    env.reset(options={"task_id": np.array([0, 1])})  # keeps the scene of task 3
    states = [env.get_state(i) for i in range(2)]
    with pytest.raises(ValueError, match="init_state_id=99 is not among"):
        env.reset(seed=7, options={"task_id": np.array([3, 4]), "init_state_id": np.array([0, 99])})
    with pytest.raises(ValueError, match=r"the state lacks \['episode_length'"):
        env.set_state(0, env.simulations[1].get_state())
    assert [simulation.task.task_id for simulation in env.simulations] == [0, 1]
    for i, state in enumerate(states):
        assert_same(env.get_state(i), state)


def test_tasks_that_it_was_not_made_for_are_refused():
    env = make(2, task_ids=[0, 1])
    with pytest.raises(ValueError, match=r"task_id=5 of libero_spatial is not among .*\(valid: \[0, 1\]\)"):
        env.reset(options={"task_id": 5})
    with pytest.raises(ValueError, match=r"task_ids=3 is not a sequence of tasks \(for one task: task_ids=\[3\]\)"):
        make(2, task_ids=3)


def test_gymnasium_runs_single_environments_in_processes_too():
    options = dict(num_envs=2, observe_images=False, task_id=3)
    kwargs = dict(shared_memory=False)
    env = gymnasium.make_vec(f"libero_gym/{SUITE}-v0", vectorization_mode="async", vector_kwargs=kwargs, **options)
    own = make(2, task_ids=[3])
    observation, expected = env.reset(seed=0)[0], own.reset(seed=0)[0]
    assert observation["task_descriptions"] == expected["task_descriptions"]
    np.testing.assert_array_equal(observation["states"], expected["states"])
    env.close()


def test_a_closed_environment_says_so():
    env = make(2)
    env.reset(seed=0)
    state = env.get_state(0)
    env.close()
    for call in (
        env.reset,
        env.observe,
        lambda: env.simulations,
        lambda: env.step(no_motion(2)),
        lambda: env.set_state(0, state),
    ):
        with pytest.raises(ValueError, match="the environment is closed; make a new one"):
            call()


def test_a_fresh_batch_made_of_states_draws_all_of_it(monkeypatch):
    monkeypatch.setattr(WarpRenderer, "uses_all_cores", False)
    options = dict(num_threads=2, observe_images=True, image_size=8, renderer="warp")
    known, fresh = make(16, **options), make(16, **options)
    known.reset(seed=0)
    for i, state in enumerate(known.get_states()):
        fresh.set_state(i, state)
    expected, found = (env.step(no_motion(16))[0] for env in (known, fresh))
    assert_same(found, expected)
    for env in (known, fresh):
        env.close()


def test_a_finished_state_begins_anew_where_episodes_follow_each_other():
    ended = make(1, autoreset_mode="DISABLED", horizon=1)
    ended.reset(seed=0)
    ended.step(no_motion(1))
    env = make(1, horizon=5)
    env.reset(seed=1)
    env.set_state(0, ended.get_state(0))
    assert [env.step(no_motion(1))[-1]["num_steps"][0] for _ in range(3)] == [0, 1, 1]


def test_state_moves_between_environments_of_different_scenes():
    env = LiberoVectorEnv("libero_object", 2, observe_images=False)
    env.reset(seed=0, options={"task_id": np.array([0, 1]), "init_state_id": np.array([4, 5])})
    actions = random_actions(6, 2, seed=3)
    actions[:, 1] = actions[:, 0]
    for action in actions[:3]:
        env.step(action)
    state = env.get_state(0)
    env.set_state(1, state)
    assert_same(env.get_state(1), state)
    for action in actions[3:]:
        observation, *_ = env.step(action)
        np.testing.assert_array_equal(observation["states"][0], observation["states"][1])
    assert observation["task_descriptions"][0] == observation["task_descriptions"][1]
    assert_same(env.get_state(0), env.get_state(1))


def test_mixed_scenes_in_one_batch():
    env = LiberoVectorEnv("libero_object", 2, image_size=24)
    observation, _ = env.reset(seed=0, options={"task_id": np.array([0, 1])})
    assert len({simulation.scene.key for simulation in env.simulations}) == 2
    assert (observation["images"][0] != observation["images"][1]).any()
    swapped, _ = env.reset(seed=0, options={"task_id": np.array([1, 0])})
    assert swapped["task_descriptions"] == observation["task_descriptions"][::-1]
    env.close()


@pytest.mark.parametrize("observe_images", [True, False])
def test_render_is_the_true_view_of_the_first_camera(observe_images):
    env = make(2, observe_images=observe_images, image_size=8, render_mode="rgb_array", render_size=24, renderer="warp")
    env.reset(seed=0)
    frames = env.render()
    assert frames is not None
    for i, frame in enumerate(frames):
        single = LiberoEnv(SUITE, observe_images=False, render_mode="rgb_array", render_size=24, renderer="warp")
        single.reset(seed=i)
        np.testing.assert_array_equal(frame, single.render())
        np.testing.assert_array_equal(frame, env.call("render")[i])
        single.close()
    env.close()


def test_text_can_be_left_out():
    env = make(2, observe_text=False, autoreset_mode="SAME_STEP", horizon=1)
    observation, _ = env.reset(seed=0)
    assert set(observation) == set(env.observation_space.spaces) == {"states"}
    assert set(env.step(no_motion(2))[-1]["final_obs"]) == {"states"}


def test_members_are_what_users_of_gymnasium_expect():
    of_many = dict(max_episode_steps=3, num_action_chunks=4, autoreset_mode="SAME_STEP", num_threads=1, physics="cpu")
    env = gymnasium.make_vec(
        f"libero_gym/{SUITE}-v0", num_envs=2, observe_images=False, horizon=9, reward="relative", **of_many
    ).unwrapped
    assert env.spec.max_episode_steps == 3
    assert env.call("_max_episode_steps") == (3, 3)
    assert tuple(spec.max_episode_steps for spec in env.get_attr("spec")) == (3, 3)
    single = gymnasium.make(env.get_attr("spec")[0])
    assert single.unwrapped.options == env.options
    assert set(env.get_attr("spec")[0].kwargs) == {"suite", "observe_images", "horizon", "reward"}
    assert env.get_attr("metadata")[0]["render_fps"] == env.metadata["render_fps"] == 5  # a frame of every fourth step
    assert make(num_action_chunks=64).metadata["render_fps"] == 1
    assert make(control_freq=10).metadata["render_fps"] == 10
    assert env.get_attr("action_space") == (single.action_space,) * 2
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        env.get_attr("task_description")
    observation, infos = env.reset(seed=3)
    assert env.call("task_description") == observation["task_descriptions"]
    assert [task.task_id for task in env.get_attr("task")] == infos["task_id"].tolist()
    assert env.get_attr("simulation") == env.simulations
    assert env.get_attr("np_random") == env.np_random == env.generators
    assert env.get_attr("np_random_seed") == env.np_random_seed == (3, 4)
    np.testing.assert_array_equal([each["states"] for each in env.call("observe")], observation["states"])
    with pytest.raises(AttributeError, match="no attribute 'states'"):
        env.get_attr("states")
    with pytest.raises(AttributeError, match="no attribute 'reset'; call reset of the vector environment"):
        env.call("reset")
    single.reset(seed=3)
    actions = random_actions(4, 2)
    *_, infos = env.step(np.moveaxis(actions, 0, 1))
    for action in actions[:3, 0]:
        expected, _, _, truncated, _ = single.step(action)
    assert truncated
    np.testing.assert_array_equal(infos["final_obs"]["states"][0], expected["states"])


def test_a_member_draws_by_the_renderer_of_all():
    env = gymnasium.make_vec(f"libero_gym/{SUITE}-v0", num_envs=1, image_size=16, images_as_torch=True).unwrapped
    single = gymnasium.make(env.envs[0].spec)
    assert single.unwrapped.options == env.options
    assert "images_as_torch" not in single.spec.kwargs
    for made in (env, single):
        made.close()


def test_one_task_or_several_and_either_name_of_the_horizon():
    assert make(task_id=3).task_ids == (3,)
    assert make(horizon=9, max_episode_steps=4).options.horizon == 4
    assert make(max_episode_steps=4).options.longest_horizon == 4
    again = gymnasium.make_vec(gymnasium.make_vec(f"libero_gym/{SUITE}-v0", observe_images=False, horizon=9).spec)
    assert again.unwrapped.options.horizon == 9
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'num_env'; did you mean 'num_envs'\?"):
        make(num_env=3)
    with pytest.raises(TypeError, match=r"images_as_torch='no' is not a boolean \(valid: True, False\)"):
        make(images_as_torch="no")


def test_gymnasiums_limit_shortens_episodes_of_each_task_and_lengthens_none():
    """As Gymnasium's TimeLimit does around single environments, which end episodes after the horizon by themselves."""
    combined = LiberoVectorEnv("libero_40", task_ids=[3, 25, 39], observe_images=False, max_episode_steps=300)
    assert [combined.options.horizon_of(task) for task in combined.options.tasks] == [240, 300, 300]
    env = gymnasium.make_vec("libero_gym/libero_40-v0", task_ids=[3, 39], observe_images=False)
    again = gymnasium.make_vec(env.spec).unwrapped
    assert [again.options.horizon_of(task) for task in again.options.tasks] == [240, 480]
    assert env.spec.max_episode_steps == again.spec.max_episode_steps == 480
    assert gymnasium.make_vec("libero_gym/libero_40-v0", task_id=3, observe_images=False).spec.max_episode_steps == 240
    with pytest.raises(ValueError, match=r"max_episode_steps=500 makes no episode longer: .* 240 .*; give horizon=500"):
        make(max_episode_steps=500)
    assert make(horizon=600, max_episode_steps=500).options.longest_horizon == 500
    with pytest.raises(ValueError, match=r"max_episode_steps=0 is not a positive number of steps \(default: 240\)"):
        make(max_episode_steps=0)


def test_options_of_gpu_physics_are_of_their_own_kind():
    pytest.importorskip("mujoco_warp")
    with pytest.raises(
        TypeError, match=r"warp_options={'a': 1} is a dict; expected .*WarpOptions\(contacts_per_world="
    ):
        make(physics="warp", warp_options={"a": 1})


def test_it_takes_what_a_single_one_takes_and_what_the_page_names():
    of_one, of_many = (set(inspect.signature(kind.__init__).parameters) for kind in (LiberoEnv, LiberoVectorEnv))
    assert of_one < of_many
    page = (Path(__file__).resolve().parents[2] / "docs" / "libraries.md").read_text("utf-8")
    # gymnasium.make takes `max_episode_steps` itself.
    assert all(f"`{name}`" in page for name in of_many - of_one - {"max_episode_steps"})


@pytest.mark.parametrize("autoreset_mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_infos_become_lists_in_every_mode(autoreset_mode):
    env = DictInfoToList(make(2, horizon=1, observe_images=True, image_size=8, autoreset_mode=autoreset_mode))
    _, infos = env.reset(seed=0)
    task_ids = [info["task_id"] for info in infos]
    *_, infos = env.step(no_motion(2))
    assert len(infos) == 2
    if autoreset_mode == "SAME_STEP":
        assert [info["final_info"]["task_id"] for info in infos] == task_ids
        assert infos[1]["final_obs"]["images"].shape == (8, 8, 3)
        assert isinstance(infos[1]["final_obs"]["task_descriptions"], str)
    env.close()


def test_gymnasiums_wrappers_of_observations_take_the_default():
    env = make(2, observe_text=False, horizon=2)
    env = FilterObservation(env, ["states"])
    env = NormalizeObservation(FlattenObservation(env))
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        observation, *_ = env.step(no_motion(2))
    assert observation.shape == (2, 8)
    assert env.observation_space.contains(observation.astype(np.float32))


def test_observations_are_normalised_once_they_are_one_array():
    with_text = FlattenObservation(make(2))
    assert with_text.reset(seed=0)[0].shape == (2, 512 + 8)
    without = make(2, observe_text=False)
    assert NormalizeObservation(FlattenObservation(without)).reset(seed=0)[0].shape == (2, 8)
    with pytest.raises(np.exceptions.AxisError):
        NormalizeObservation(make(2, observe_text=False)).reset(seed=0)  # a dict


def test_placement_seeds_are_those_of_single_environments():
    env = make(2, init_states="original", task_id=3)
    env.reset(seed=1, options={"init_state_id": 7, "placement_seed": np.array([5, 6])})
    for i, simulation in enumerate(env.simulations):
        single = LiberoEnv(SUITE, observe_images=False, init_states="original", task_id=3)
        single.reset(seed=9, options={"init_state_id": 7, "placement_seed": 5 + i})
        np.testing.assert_array_equal(simulation.data.qpos, single.data.qpos)
        np.testing.assert_array_equal(simulation.model.body_pos, single.model.body_pos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs=0 is not a positive integer"),
        ({"num_action_chunks": 0}, "num_action_chunks=0 is not a positive integer"),
        ({"num_threads": -1}, "num_threads=-1 is not a positive integer"),
        ({"task_ids": [10]}, r"task_id=10 is not in libero_spatial \(valid: 0-9\)"),
        ({"task_ids": []}, "task_ids is empty"),
        ({"image_size": 0, "observe_images": True}, "image_size=0 is not a positive number"),
        ({"renderer": "vulkan"}, r"renderer='vulkan' is unknown \(valid: None, 'egl', 'osmesa', 'warp'\)"),
        ({"reward": "dense"}, "reward='dense' is unknown"),
        ({"horizon": 0}, "horizon=0 is not a positive number"),
        ({"stepping": "slow"}, "stepping='slow' is unknown"),
        ({"init_states": "fresh"}, r"init_states='fresh' is unknown \(valid: 'settled', 'held_out', 'original'\)"),
        ({"autoreset_mode": "SOMETIMES"}, "autoreset_mode='SOMETIMES' is unknown"),
        ({"autoreset_mode": [1]}, r"autoreset_mode=\[1\] is unknown \(valid: \['DISABLED', 'NEXT_STEP', 'SAME_STEP'\]"),
        ({"camera_names": []}, r"camera_names=\[\] must name at least one camera"),
        ({"render_mode": "human"}, "'human' shows one environment in a window, and these are many; take gymn"),
        ({"render_mode": "film"}, r"render_mode='film' is unknown \(valid: None, 'rgb_array'\)"),
        ({"images_as_torch": True}, "images_as_torch=True needs observe_images=True"),
        (
            {"images_as_torch": True, "renderer": "egl", "observe_images": True},
            r"draws with renderer='warp' \(given: 'egl'\)",
        ),
        ({"render_size": -1}, "render_size=-1 is not a positive number"),
        ({"physics": "gpu"}, r"physics='gpu' is unknown \(valid: 'cpu', 'warp'\)"),
        ({"warp_options": "larger"}, "leave warp_options out with physics='cpu'"),
        ({"physics": "warp", "stepping": "fast"}, "stepping='fast' chooses among CPU steppers"),
        ({"physics": "warp", "renderer": "osmesa"}, r"physics='warp' draws with renderer='warp' \(given: 'osmesa'\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**({"num_envs": 1} | arguments))


@pytest.fixture(scope="module")
def pair():
    env = make(2)
    env.reset(seed=0)
    return env


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"options": {"task": 1}}, r"unknown reset options \['task'\]"),
        ({"options": {"task_id": 11}}, "task_id=11 is not in libero_spatial"),
        ({"options": {"task_id": np.array([1.0, 2.0])}}, "expected an int, or int"),
        ({"options": {"task_id": np.array([1, 2, 3])}}, "expected an int, or int"),
        ({"options": {"init_state_id": 50}}, r"init_state_id=50 is not among .*\(valid: 0-49\)"),
        ({"options": {"reset_mask": np.array([0, 1])}}, "expected bool"),
        ({"options": {"reset_mask": np.zeros(2, np.bool_)}}, "False everywhere"),
        ({"options": {"init_state_id": True}}, "init_state_id is bool"),
        ({"seed": [1, 2, 3]}, "seed has 3 entries"),
        ({"seed": [1.7, 2.9]}, r"seed=1.7 is not a seed \(valid: None, or an integer from 0 on\)"),
        ({"seed": True}, "seed=True is not a seed"),
        ({"seed": [3, True]}, "seed=True is not a seed"),
        ({"seed": 1.0}, "seed=1.0 is not a seed"),
        ({"seed": [3, -1]}, "seed=-1 is not a seed"),
    ],
)
def test_bad_resets_are_refused(pair, keywords, message):
    with pytest.raises(ValueError, match=message):
        pair.reset(**keywords)


@pytest.mark.parametrize("env_id", [1.0, "1", True, None, np.bool_(True)])
def test_environments_are_numbered_by_integers(pair, env_id):
    for ask in (pair.get_state, pair.object_poses, lambda i: pair.draw_only([i]), lambda i: pair.render_some([i])):
        with pytest.raises(ValueError, match=r"env_id=.* is not an integer \(valid: 0-1\)"):
            ask(env_id)
    with pytest.raises(ValueError, match=r"numpy.flatnonzero\(mask\) gives those of a mask"):
        pair.draw_only(np.array([False, True]))


@pytest.mark.parametrize("env_ids", [3, "01", {0, 1}])
def test_several_environments_are_a_sequence(pair, env_ids):
    for ask in (pair.draw_only, pair.render_some):
        with pytest.raises(TypeError, match=r"env_ids=.* is not a sequence of environments \(for one: \["):
            ask(env_ids)


@pytest.mark.parametrize("options", [[1], "reset_mask", 3])
def test_reset_options_are_a_dictionary(pair, options):
    for env in (pair, LiberoEnv(SUITE, observe_images=False)):
        with pytest.raises(TypeError, match=r"options=.* is a \w+, not a dictionary \(of: .*'init_state_id'"):
            env.reset(options=options)


def test_bad_actions_are_refused(pair):
    for bad in ([[0] * 7, [0] * 6], [["a"] * 7] * 2, {}):
        with pytest.raises(ValueError, match=r"are no array of numbers .*; expected \(2, 7\)"):
            pair.step(bad)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 6\); expected \(2, 7\)"):
        pair.step(np.zeros((2, 6), np.float32))
    pair.step(no_motion(2, 1))  # what a policy of one-step chunks gives
    before = pair.observe()["states"]
    bad = no_motion(2)
    bad[1, 3] = np.nan
    with pytest.raises(PhysicsError, match=r"environments \[1\] are not finite"):
        pair.step(bad)
    np.testing.assert_array_equal(pair.observe()["states"], before)


def test_stepping_before_reset_is_refused():
    env = make(2)
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        env.step(no_motion(2))
    with pytest.raises(ValueError, match="never reset"):
        env.reset(options={"reset_mask": np.array([True, False])})


def test_images_as_torch_without_torch_say_what_to_install(monkeypatch):
    env = make(1, observe_images=True, image_size=16, images_as_torch=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="images_as_torch=True needs PyTorch; install it with"):
        env.reset(seed=0)
    env.close()


def test_images_as_torch_equal_the_arrays():
    pytest.importorskip("torch", reason="torch is no part of this environment")
    options = dict(observe_images=True, image_size=16, horizon=1, autoreset_mode="SAME_STEP")
    arrays = make(2, renderer="warp", **options)
    tensors = make(2, images_as_torch=True, **options)
    for env in (arrays, tensors):
        env.reset(seed=0)
    expected, *_, expected_infos = arrays.step(no_motion(2))
    observation, *_, infos = tensors.step(no_motion(2))
    assert observation["images"].shape == (2, 16, 16, 3)
    for key in ("images", "wrist_images"):
        np.testing.assert_array_equal(observation[key].cpu().numpy(), expected[key])
        np.testing.assert_array_equal(infos["final_obs"][key].cpu().numpy(), expected_infos["final_obs"][key])
    for env in (arrays, tensors):
        env.close()
