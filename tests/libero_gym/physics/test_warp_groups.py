"""GPU physics of several scenes, run on the CPU device: against worlds of one scene in the same rows, and the contract.

MuJoCo Warp adds up contacts in an order that depends on how many rows there are and which of them a world is in, and so
does its rounding. What is compared to the last bit is therefore in the same rows.
"""

import functools
import os
import weakref

import gymnasium
import mujoco_warp
import numpy as np
import pytest

from libero_gym.physics import warp_groups, warp_worlds
from libero_gym.physics.simulation import PhysicsError
from libero_gym.physics.warp_groups import GroupedWarpWorlds, make_warp_worlds
from libero_gym.physics.warp_stepping import Substep
from libero_gym.physics.warp_worlds import WarpWorlds
from libero_gym.rendering import raycast
from libero_gym.rendering.raycast import WarpRenderer
from libero_gym.tasks import initial_states
from libero_gym.tasks.initial_states import EpisodeStart
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import get_task, list_tasks
from libero_gym.vector import LiberoVectorEnv

# MuJoCo Warp's kernels compile once, for a minute; after that few of these take ten seconds.
pytestmark = pytest.mark.slow

GOAL, SPATIAL = "libero_goal", "libero_spatial"
TASKS = [*list_tasks(GOAL), *list_tasks(SPATIAL)]
CAMERAS = ("agentview", "robot0_eye_in_hand")
MANY = np.full(4, 1000)
ALL = np.ones(4, np.bool_)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    for module in (warp_worlds, raycast):
        monkeypatch.setattr(module, "default_device", lambda: "cpu")


def start(suite, task_id, init_state_id, placement_seed=0):
    return EpisodeStart(task=get_task(suite, task_id), init_state_id=init_state_id, placement_seed=placement_seed)


# Fixtures differ between the states of a task: what is left behind of a world shows.
MIXED = [start(GOAL, 1, 3), start(SPATIAL, 4, 20), start(GOAL, 7, 5), start(SPATIAL, 5, 3)]


@pytest.fixture(scope="module")
def shared():
    return GroupedWarpWorlds(TASKS, 4, num_action_chunks=2, device="cpu")


@pytest.fixture
def worlds(shared):
    """Worlds of two scenes, in turn."""
    shared.reset(np.arange(4), MIXED, init_states="settled")
    return shared


def group_of(worlds, suite):
    (group,) = (group for group in worlds._groups if group.tasks[0].suite == suite)
    return group


@functools.cache
def worlds_of_one_scene(suite, num_worlds):
    tasks = list_tasks(suite)
    return WarpWorlds(load_scene(tasks[0]), tasks, num_worlds, num_action_chunks=2, device="cpu")


def alone(worlds, suite):
    """Returns the worlds of a scene among `WarpWorlds`, in the rows that they are in, in their states."""
    group = group_of(worlds, suite)
    single = worlds_of_one_scene(suite, group.rows.num_worlds)
    for row, world_id in enumerate(group.world_ids):
        single.set_state(row, worlds.get_state(int(world_id)))
    return single, group.world_ids.copy()


def assert_same_states(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def random_actions(seed, num_worlds=4, num_steps=2):
    return np.random.default_rng(seed).uniform(-1, 1, (num_worlds, num_steps, 7)).astype(np.float32)


def assert_moves_as_alone(worlds, suites=(GOAL, SPATIAL), is_active=ALL, steps_left=MANY, seed=0):
    """Steps twice, and asserts that each scene's worlds end where they do without the others, to the last bit."""
    references = [alone(worlds, suite) for suite in suites]
    for chunk in range(2):
        actions = random_actions(seed + chunk)
        steps = worlds.step(actions, is_active, steps_left)
        success, states = worlds.success(), worlds.states()
        for single, ids in references:
            idle = np.zeros(single.num_worlds - len(ids), np.int64)
            rows = np.concatenate([ids, idle])  # rows besides idle, whatever they are given
            is_row_active = np.arange(len(rows)) < len(ids)
            expected = single.step(actions[rows], is_active[rows] & is_row_active, steps_left[rows])
            np.testing.assert_array_equal(steps.ran[ids], expected.ran[: len(ids)])
            np.testing.assert_array_equal(steps.successes[ids], expected.successes[: len(ids)])
            np.testing.assert_array_equal(success[ids], single.success()[: len(ids)])
            np.testing.assert_array_equal(states[ids], single.states()[: len(ids)])
            for row, world_id in enumerate(ids.tolist()):
                assert_same_states(worlds.get_state(world_id), single.get_state(row))


def test_each_scene_starts_and_moves_as_it_does_alone(worlds):
    for suite, ids in ((GOAL, [0, 2]), (SPATIAL, [1, 3])):
        single = worlds_of_one_scene(suite, group_of(worlds, suite).rows.num_worlds)
        single.reset(np.arange(2), [MIXED[i] for i in ids], init_states="settled")
        for row, world_id in enumerate(ids):
            assert_same_states(worlds.get_state(world_id), single.get_state(row))
    assert_moves_as_alone(worlds)
    assert_moves_as_alone(worlds, is_active=np.array([True, False, True, True]), steps_left=np.array([1, 9, 9, 1]))


def test_original_states_settle_as_they_do_alone(worlds):
    starts = [start(SPATIAL, 3, 9, placement_seed=5), start(GOAL, 0, 2, placement_seed=6)]
    before = [worlds.get_state(world_id) for world_id in (2, 3)]
    worlds.reset(np.array([0, 1]), starts, init_states="original")
    assert [task.suite for task in worlds.current_tasks] == [SPATIAL, GOAL, GOAL, SPATIAL]
    for state, world_id in zip(before, (2, 3), strict=True):  # they idled
        assert_same_states(worlds.get_state(world_id), state)
    for begin, world_id in zip(starts, (0, 1), strict=True):
        single, ids = alone(worlds, begin.task.suite)
        row = np.flatnonzero(ids == world_id)
        single.reset(row, [begin], init_states="original")
        assert_same_states(worlds.get_state(world_id), single.get_state(int(row[0])))


def test_worlds_change_scenes_and_the_others_stay_what_they_are(worlds):
    worlds.step(random_actions(5), ALL, MANY)
    worlds.reset(np.array([1]), [start(GOAL, 2, 8)], init_states="settled")
    first, second, last = group_of(worlds, GOAL).world_ids.tolist()
    assert last == 1
    before = worlds.get_states()
    worlds.reset(np.array([first]), [start(SPATIAL, 6, 2)], init_states="settled")  # the last row takes its place
    assert group_of(worlds, GOAL).world_ids.tolist() == [last, second]
    assert group_of(worlds, SPATIAL).world_ids.tolist() == [3, first]
    for world_id in (last, second, 3):
        assert_same_states(worlds.get_state(world_id), before[world_id])
    assert [task.suite for task in worlds.current_tasks] == [
        {first: SPATIAL, 3: SPATIAL}.get(world_id, GOAL) for world_id in range(4)
    ]
    assert (worlds.init_state_ids[[first, last]]).tolist() == [2, 8]
    assert_moves_as_alone(worlds)
    # All but one change scenes at once: who leaves makes room for who comes.
    worlds.reset(np.array([3, 0, 1]), [MIXED[0], MIXED[2], MIXED[1]], init_states="settled")
    assert [task.suite for task in worlds.current_tasks] == [GOAL, SPATIAL, GOAL, GOAL]
    assert_moves_as_alone(worlds)


def test_scenes_that_worlds_have_left_cost_nothing(worlds):
    worlds.reset(np.arange(4), [start(GOAL, task_id, 0) for task_id in range(4)], init_states="settled")
    assert group_of(worlds, SPATIAL).count == 0
    assert worlds.num_rows == (4, 0)
    assert_moves_as_alone(worlds, suites=(GOAL,))


def test_rows_grow_with_the_worlds_of_a_scene(monkeypatch):
    monkeypatch.setattr(warp_groups, "_RESERVE_STEP", 1)
    monkeypatch.setattr(warp_groups, "_ROWS_STEP", 1)
    monkeypatch.setattr(warp_groups, "_MAX_GRAPHS", 2)
    for_rows, parts, num_parts = Substep.for_rows, weakref.WeakSet(), 0

    def note_part(*args):
        nonlocal num_parts
        num_parts += 1
        part = for_rows(*args)
        parts.add(part)
        return part

    monkeypatch.setattr(Substep, "for_rows", note_part)
    worlds = GroupedWarpWorlds(TASKS, 4, num_action_chunks=2, device="cpu")
    worlds.reset(np.arange(4), [MIXED[0], MIXED[1], MIXED[3], MIXED[3]], init_states="settled")
    assert [group.worlds.num_worlds for group in worlds._groups] == [2, 4]
    worlds.step(random_actions(1), ALL, MANY)
    before = worlds.get_states()
    worlds.reset(np.array([1, 2]), [MIXED[2], MIXED[2]], init_states="settled")
    assert [group.worlds.num_worlds for group in worlds._groups] == [4, 4]
    assert worlds.num_rows == (4, 2)
    for world_id in (0, 3):
        assert_same_states(worlds.get_state(world_id), before[world_id])
    assert_moves_as_alone(worlds)
    sizes = []
    for starts in (MIXED, [MIXED[1]] * 3 + [MIXED[0]], MIXED):  # graphs are captured anew, and taken again
        worlds.reset(np.arange(4), starts, init_states="settled")
        worlds.step(random_actions(2), ALL, MANY)
        sizes.append(worlds.num_rows)
    assert sizes == [(3, 2), (2, 4), (2, 2)]
    assert_moves_as_alone(worlds)
    assert num_parts > 2 * len(worlds._groups) >= len(parts)  # memory of sizes that are no longer kept has gone
    worlds.close()
    worlds.close()
    assert not parts


def test_rows_are_those_in_use_and_contents_move_along(monkeypatch):
    """Random traffic through one group, memory being an array of names."""
    rng = np.random.default_rng(0)
    group = warp_groups._Group(None, (), 50, device="cpu")
    memory = np.full(50, -1)
    group._table, group._resting = memory, np.array([-1])

    def copy(source, source_rows, target_rows):
        assert not set(source_rows) & set(target_rows) or source is not memory
        memory[target_rows] = source[source_rows]

    monkeypatch.setattr(group, "_copy", copy)
    inside = np.zeros(50, np.bool_)
    for _ in range(300):
        leaves = inside & (rng.random(50) < rng.random())
        joins = ~inside & (rng.random(50) < rng.random())
        row_of = {world: row for row, world in enumerate(group.world_ids.tolist())}
        freed = np.array([row_of[world] for world in np.flatnonzero(leaves)], np.int64)
        group.exchange(freed, np.flatnonzero(joins))
        inside = inside & ~leaves | joins
        assert group.count == inside.sum()
        assert sorted(group.world_ids.tolist()) == np.flatnonzero(inside).tolist()
        newcomers = np.isin(group.world_ids, np.flatnonzero(joins))
        memory[: group.count][newcomers] = group.world_ids[newcomers]  # as a reset writes them
        np.testing.assert_array_equal(memory[: group.count], group.world_ids)
        assert (memory[group.count :] == -1).all()


def test_states_go_to_worlds_of_other_scenes(worlds):
    worlds.step(random_actions(2), ALL, MANY)
    states = worlds.get_states()
    for world_id in range(4):
        assert_same_states(states[world_id], worlds.get_state(world_id))
    worlds.set_state(0, states[3])  # a world of the other scene takes part in it
    worlds.set_state(2, states[0])  # one of the same
    assert [task.task_id for task in worlds.current_tasks] == [5, 4, 1, 5]
    assert worlds.init_state_ids.tolist() == [3, 20, 3, 3]
    for world_id, source in enumerate((3, 1, 0, 3)):
        assert_same_states(worlds.get_state(world_id), states[source])
    actions = random_actions(3)
    actions[3] = actions[0]
    worlds.step(actions, ALL, MANY)
    np.testing.assert_allclose(worlds.states()[3], worlds.states()[0], atol=1e-5)  # in other rows

    untouched = worlds.get_states()
    scene = group_of(worlds, SPATIAL).scene.key
    for change, message in (
        ({"scene": np.array(scene)}, f"the state belongs to scene {scene}, this simulation to"),
        ({"suite": np.array("libero_object")}, r"tasks \['libero_object/1'\] are not among"),
        ({"qpos": states[0]["qpos"][:-1]}, "qpos of the state is"),
        ({"qpos": states[0]["qpos"] * np.nan}, "not finite"),
        ({"surplus": np.zeros(1)}, r"the state has \['surplus'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            worlds.set_state(1, states[0] | change)
    for world_id, state in enumerate(untouched):
        assert_same_states(worlds.get_state(world_id), state)


def test_images_are_those_of_each_scene_in_the_order_of_the_worlds(worlds):
    renderer = WarpRenderer(CAMERAS, 24, device="cpu")
    expected = np.empty((4, 2, 24, 24, 3), np.uint8)
    for suite in (GOAL, SPATIAL):
        single, ids = alone(worlds, suite)
        expected[ids] = single.views(renderer, np.arange(len(ids)), as_torch=False).images
    assert (expected[0] != expected[1]).any()
    for chosen in (np.arange(4), np.array([3, 0, 2])):
        np.testing.assert_array_equal(worlds.views(renderer, chosen, as_torch=False).images, expected[chosen])
    torch = pytest.importorskip("torch", reason="torch is no part of this environment")
    images = worlds.views(renderer, np.array([2, 1, 0]), as_torch=True).images
    assert torch.equal(images, torch.from_numpy(expected[[2, 1, 0]]))
    poses = worlds.poses(np.array([3, 0, 2]))
    assert [part.places.tolist() for part in poses] == [[1, 2], [0]]
    renderer.close()


def test_divergence_names_the_world_and_the_others_have_moved(worlds):
    state = worlds.get_state(3)
    state["qvel"][:] = 1e9
    worlds.set_state(3, state)
    before = worlds.states()
    with pytest.raises(PhysicsError, match=r"diverged in worlds \[3\]"):
        worlds.step(random_actions(4), ALL, MANY)
    assert (worlds.states()[:3] != before[:3]).any(axis=1).all()
    with pytest.raises(PhysicsError, match=r"diverged in worlds \[3\]"):  # until it is reset
        worlds.step(random_actions(4), ALL, MANY)
    worlds.reset(np.array([3]), [MIXED[0]], init_states="settled")  # and leaves nothing behind in its scene
    spatial = group_of(worlds, SPATIAL)
    assert np.isfinite(spatial.worlds.qpos()).all()
    assert not spatial.worlds.read_faults()[0].any()
    worlds.step(random_actions(4), ALL, MANY)
    assert np.isfinite(worlds.states()).all()


def test_faults_move_along_with_their_rows(worlds):
    worlds.reset(np.array([1]), [MIXED[0]], init_states="settled")
    group = group_of(worlds, GOAL)
    first, second, last = group.world_ids.tolist()
    rows = group.worlds  # on the CPU `numpy()` is a view
    rows._data.overflow.numpy()[2] = int(mujoco_warp.OverflowType.NARROWPHASE)
    rows._has_diverged.numpy()[1] = 1
    worlds.reset(np.array([first]), [MIXED[3]], init_states="settled")
    assert group.world_ids.tolist() == [last, second]
    with pytest.raises(PhysicsError, match=rf"diverged in worlds \[{second}\]"):
        worlds.step(random_actions(4), ALL, MANY)
    worlds.reset(np.array([second]), [MIXED[2]], init_states="settled")
    with pytest.raises(PhysicsError, match=rf"more contacts than contacts_per_world in worlds \[{last}\]"):
        worlds.step(random_actions(4), ALL, MANY)


def test_refusals_leave_the_worlds_as_they_were(worlds, monkeypatch: pytest.MonkeyPatch):
    before = worlds.get_states()
    with pytest.raises(ValueError, match=r"\['libero_object/0'\] are not among those of these worlds"):
        worlds.reset(np.array([0, 1]), [MIXED[1], start("libero_object", 0, 0)], init_states="settled")
    monkeypatch.setattr(initial_states, "has_recorded_states", lambda _, kind: kind == "settled")
    initial_states.load_recorded_states.cache_clear()
    initial_states.count_init_states.cache_clear()
    with pytest.raises(FileNotFoundError, match="no held_out states are recorded for libero_goal"):
        worlds.reset(np.array([0, 1]), [MIXED[1], MIXED[0]], init_states="held_out")
    for world_id, state in enumerate(before):
        assert_same_states(worlds.get_state(world_id), state)
    assert_moves_as_alone(worlds)


def test_worlds_that_were_never_reset():
    worlds = GroupedWarpWorlds(TASKS, 3, device="cpu")
    assert worlds.current_tasks == [None] * 3
    assert worlds.num_rows == (0, 0)
    assert not worlds.success().any()
    worlds.reset(np.array([2]), [MIXED[1]], init_states="settled")
    ran, _ = worlds.step(np.zeros((3, 1, 7)), np.array([False, False, True]), MANY[:3])
    assert ran[:, 0].tolist() == [False, False, True]
    assert worlds.init_state_ids.tolist() == [-1, -1, 20]
    with pytest.raises(ValueError, match=r"worlds \[0, 1\] were never reset"):
        worlds.step(np.zeros((3, 1, 7)), ALL[:3], MANY[:3])
    with pytest.raises(ValueError, match=r"worlds \[1\] were never reset"):
        worlds.states(np.array([2, 1]))
    with pytest.raises(ValueError, match=r"reset\(\) must be called first"):
        worlds.get_states()
    with pytest.raises(ValueError, match=r"Warp has no device 'cuda:7' \(valid: .*'cpu'"):
        GroupedWarpWorlds(TASKS, 2, device="cuda:7")


def test_scenes_without_indicators():
    """Nothing glows in libero_object: arrays without elements are states like others."""
    worlds = make_warp_worlds(list_tasks("libero_object")[:2], 2, device="cpu")
    worlds.reset(np.arange(2), [start("libero_object", task_id, 0) for task_id in range(2)], init_states="settled")
    states = worlds.get_states()
    assert states[0]["scene"] != states[1]["scene"]
    worlds.set_state(1, states[0])
    assert_same_states(worlds.get_state(1), states[0])
    worlds.step(np.zeros((2, 1, 7)), ALL[:2], MANY[:2])
    np.testing.assert_allclose(*worlds.states(), atol=1e-5)


def test_one_scene_takes_no_groups():
    assert isinstance(make_warp_worlds(TASKS[:10], 2, device="cpu"), WarpWorlds)


def test_a_forked_child_is_refused(worlds):
    child = os.fork()
    if child == 0:
        calls = [worlds.success, worlds.states, worlds.get_states, lambda: worlds.get_state(0)]
        calls += [lambda: worlds.step(random_actions(0), ALL, MANY), lambda: worlds.set_state(0, {})]
        calls += [lambda: worlds.reset(np.arange(4), MIXED, init_states="settled"), lambda: worlds.poses(np.arange(4))]
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += "the simulated worlds was opened by process" in str(error)
        worlds.close()
        os._exit(0 if refused == len(calls) else 1)
    assert os.waitpid(child, 0)[1] == 0
    worlds.step(random_actions(0), ALL, MANY)


def no_motion(*lead):
    action = np.zeros((*lead, 7), np.float32)
    action[..., 6] = -1
    return action


def make_env(num_envs=4, **options):
    options = {"observe_images": False, "task_ids": [2, 4, 21, 27]} | options
    return LiberoVectorEnv("libero_40", num_envs, physics="warp", **options)


def test_made_by_id_for_several_suites():
    env = gymnasium.make_vec(
        "libero_gym/libero_40-v0",
        num_envs=2,
        vectorization_mode="vector_entry_point",
        physics="warp",
        image_size=16,
        task_ids=[3, 22],
    )
    observation, infos = env.reset(seed=0, options={"task_id": np.array([22, 3])})
    assert isinstance(env.unwrapped.worlds, GroupedWarpWorlds)
    assert env.observation_space.contains(observation)
    assert infos["task_id"].tolist() == [22, 3]
    states = env.unwrapped.get_states()
    assert [(str(state["suite"]), int(state["task_id"])) for state in states] == [(GOAL, 2), (SPATIAL, 3)]
    env.close()


def test_draws_are_those_of_the_cpu_environments():
    env = make_env()
    cpu = LiberoVectorEnv("libero_40", 4, observe_images=False, task_ids=env.task_ids)
    observation, infos = env.reset(seed=11)
    expected, expected_infos = cpu.reset(seed=11)
    for key, values in expected_infos.items():
        np.testing.assert_array_equal(infos[key], values, err_msg=key)
        assert infos[key].dtype == values.dtype, key
    np.testing.assert_allclose(observation["states"], expected["states"], atol=1e-6)
    assert observation["task_descriptions"] == expected["task_descriptions"]
    env.close()


def test_starts_are_those_of_the_cpu_however_worlds_change_scenes(monkeypatch):
    monkeypatch.setattr(warp_groups, "_RESERVE_STEP", 1)
    monkeypatch.setattr(warp_groups, "_ROWS_STEP", 1)
    num_envs, task_ids = 7, [2, 4, 10, 11, 21, 27]  # four scenes
    env = make_env(num_envs, task_ids=task_ids)
    cpu = LiberoVectorEnv("libero_40", num_envs, observe_images=False, task_ids=task_ids)
    rng = np.random.default_rng(0)
    mask = np.ones(num_envs, np.bool_)
    seen = set()
    for seed in range(12):
        observation, infos = env.reset(seed=seed, options={"reset_mask": mask})
        expected, expected_infos = cpu.reset(seed=seed, options={"reset_mask": mask})
        np.testing.assert_allclose(observation["states"], expected["states"], atol=1e-6)
        assert observation["task_descriptions"] == expected["task_descriptions"]
        for key in ("task_id", "init_state_id"):
            assert infos[key].tolist() == expected_infos[key].tolist()
        seen.add(env.worlds.num_rows)
        mask = rng.random(num_envs) < rng.random()
        mask[rng.integers(num_envs)] = True
    assert len(seen) > 3
    env.close()


def test_groups_of_equal_starts_in_several_scenes():
    env = make_env(horizon=3)
    choice = {"task_id": np.repeat([4, 21], 2), "init_state_id": np.repeat([1, 2], 2)}
    observation, _ = env.reset(seed=[5, 5, 6, 6], options=choice)
    actions = np.repeat(random_actions(0, 2, 1)[:, 0], 2, axis=0)
    for _ in range(3):
        np.testing.assert_allclose(observation["states"][::2], observation["states"][1::2], atol=1e-5)
        observation, *_ = env.step(actions)
    env.close()


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP", "DISABLED"])
def test_autoreset_follows_task_weights_into_other_scenes(mode):
    env = make_env(horizon=1, autoreset_mode=mode)
    env.reset(seed=0, options={"task_id": np.array([2, 21, 27, 4])})
    env.set_task_weights([0, 0, 1, 1])  # the second scene's
    observation, _, _, truncations, infos = env.step(no_motion(4))
    assert truncations.all()
    if mode == "SAME_STEP":
        assert infos["final_info"]["task_id"].tolist() == [2, 21, 27, 4]
    elif mode == "NEXT_STEP":
        assert infos["task_id"].tolist() == [2, 21, 27, 4]
        observation, _, _, truncations, infos = env.step(no_motion(4))
        assert not truncations.any()
    else:
        mask = np.array([True, True, False, True])
        kept = observation["states"][2]
        observation, infos = env.reset(options={"reset_mask": mask})
        np.testing.assert_array_equal(observation["states"][2], kept)
    assert set(infos["task_id"].tolist()) <= {21, 27}
    assert infos["episode_length"].tolist() == ([0, 0, 1, 0] if mode == "DISABLED" else [0] * 4)
    assert env.worlds.num_rows == (0, 4)
    env.set_task_weights([1, 1, 0, 0])
    if mode == "DISABLED":
        env.reset()
    else:
        for _ in range(2):
            *_, infos = env.step(no_motion(4))
        assert set(infos["task_id"].tolist()) <= {2, 4}
    assert env.worlds.num_rows == (4, 0)
    env.close()
    env.close()


def test_states_of_environments_go_on_in_other_scenes():
    env = make_env(2)
    env.reset(seed=0, options={"task_id": np.array([2, 27])})
    env.step(no_motion(2))
    states = env.get_states()
    env.set_state(0, states[1])
    assert env.observe()["task_descriptions"][0] == env.observe()["task_descriptions"][1]
    *_, infos = env.step(no_motion(2))
    assert infos["task_id"].tolist() == [27, 27]
    assert infos["episode_length"].tolist() == [2, 2]
    foreign = states[0] | {"task_id": np.array(7), "suite": np.array("libero_object")}
    with pytest.raises(ValueError, match=r"tasks \['libero_object/7'\] are not among"):
        env.set_state(0, foreign)
    env.close()
