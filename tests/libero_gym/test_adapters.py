"""Modality keys and the gripper's convention, on hand-made observations."""

import dataclasses
import json
import re
from importlib import resources
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from libero_gym.adapters import (
    LeRobotVectorEnv,
    Modality,
    ModalityObservation,
    ModalityVectorObservation,
    action_from_modality,
    load_modality,
    observation_to_modality,
)
from libero_gym.conventions import gripper_to_data

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SPACE = spaces.Dict(
    {
        "images": spaces.Box(0, 255, (6, 6, 3), np.uint8),
        "wrist_images": spaces.Box(0, 255, (6, 6, 3), np.uint8),
        "states": spaces.Box(-np.inf, np.inf, (8,), np.float32),
        "task_descriptions": spaces.Text(64, charset="abcdefghijklmnopqrstuvwxyz 0123456789"),
    }
)


def make_observation(num_envs=None):
    rng = np.random.default_rng(0)
    lead = () if num_envs is None else (num_envs,)
    return {
        "images": rng.integers(0, 256, (*lead, 6, 6, 3), dtype=np.uint8),
        "wrist_images": rng.integers(0, 256, (*lead, 6, 6, 3), dtype=np.uint8),
        "states": rng.normal(size=(*lead, 8)).astype(np.float32),
        "task_descriptions": "open it" if num_envs is None else tuple(f"task {i}" for i in range(num_envs)),
    }


class SingleEnv(gymnasium.Env):
    observation_space = SPACE
    action_space = spaces.Box(-1, 1, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return make_observation(), {}

    def step(self, action):
        return make_observation(), 0.0, False, False, {}


class VectorEnv(gymnasium.vector.VectorEnv):
    metadata: ClassVar = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(self):
        self.num_envs = 3
        self.single_observation_space = SPACE
        self.observation_space = gymnasium.vector.utils.batch_space(SPACE, 3)
        self.single_action_space = SingleEnv.action_space
        self.action_space = gymnasium.vector.utils.batch_space(SingleEnv.action_space, 3)

    def reset(self, *, seed=None, options=None):
        return make_observation(3), {}

    def step(self, actions):
        done = np.array([True, False, False])
        return (
            make_observation(3),
            np.zeros(3),
            done,
            ~done & False,
            {"final_obs": make_observation(3), "_final_obs": done},
        )


def test_keys_and_slices_of_a_batch():
    observation = make_observation(4)
    result = observation_to_modality(observation)
    assert result["video.image"] is observation["images"]
    assert result["video.wrist_image"] is observation["wrist_images"]
    for i, name in enumerate(("x", "y", "z", "roll", "pitch", "yaw")):
        np.testing.assert_array_equal(result[f"state.{name}"], observation["states"][:, i : i + 1])
    np.testing.assert_array_equal(result["state.gripper"], observation["states"][:, 6:])
    text = result["annotation.human.action.task_description"]
    assert text.dtype.kind == "U"
    assert text.tolist() == ["task 0", "task 1", "task 2", "task 3"]
    assert len(result) == 10


def test_gripper_open_is_one_in_data_and_minus_one_in_the_environment():
    parts = {f"action.{n}": np.full((2, 1), 0.25) for n in ("x", "y", "z", "roll", "pitch", "yaw")}
    action = action_from_modality(parts | {"action.gripper": np.array([[1.0], [0.0]])})
    np.testing.assert_array_equal(action[:, 6], [-1.0, 1.0])
    np.testing.assert_array_equal(action[:, :6], np.full((2, 6), 0.25, np.float32))
    between = action_from_modality(parts | {"action.gripper": np.array([[0.9], [0.5]])})
    np.testing.assert_array_equal(between[:, 6], [-1.0, 0.0])


def test_leading_dimensions_are_kept_and_data_round_trips():
    action = np.random.default_rng(1).uniform(-1, 1, (3, 5, 7)).astype(np.float32)
    action[..., 6] = np.sign(action[..., 6])
    parts = {f"action.{name}": action[..., i : i + 1] for i, name in enumerate(NAMES)}
    parts["action.gripper"] = gripper_to_data(action[..., 6:])
    np.testing.assert_array_equal(action_from_modality(parts), action)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action.x": None}, r"lacks \['action.x'\]"),
        ({"action.y": np.zeros(2)}, r"action.y has shape \(2,\), expected \(2, 1\)"),
        ({"action.z": np.full((2, 1), np.nan)}, "action.z holds values that are not finite"),
    ],
)
def test_bad_actions_are_refused(change, message):
    parts = {f"action.{name}": np.zeros((2, 1), np.float32) for name in NAMES} | change
    parts = {key: value for key, value in parts.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        action_from_modality(parts)


def test_user_modality_file(tmp_path):
    path = tmp_path / "modality.json"
    content = {
        "video": {"front": {"original_key": "observation.images.image"}},
        "state": {"eef": {"start": 0, "end": 6}},
        "action": {"arm": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 7}},
    }
    path.write_text(json.dumps(content))
    observation = make_observation(2)
    result = observation_to_modality(observation, load_modality(path))
    assert set(result) == {"video.front", "state.eef"}
    np.testing.assert_array_equal(result["state.eef"], observation["states"][:, :6])
    parts = {"action.arm": np.full((2, 6), 0.5), "action.gripper": np.ones((2, 1))}
    np.testing.assert_array_equal(action_from_modality(parts, load_modality(path)), [[0.5] * 6 + [-1.0]] * 2)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({}, r"numbers \[0, 1, 2, 3, 4, 5, 6\] belong to no key and \[\] to several; each of 0-6 must belong to one"),
        ({"x": (0, 3)}, r"numbers \[3, 4, 5, 6\] belong to no key"),
        ({"arm": (0, 7), "gripper": (6, 7)}, r"belong to no key and \[6\] to several"),
        ({"eef": (0, 7)}, "number 6 is not that of a key `gripper`; give it one of its own, with start 6 and end 7"),
        ({"arm": (0, 6), "gripper_open": (6, 7)}, "number 6 is not that of a key `gripper`"),
        ({"gripper": (0, 1), "arm": (1, 7)}, "number 6 is not that of a key `gripper`"),
        ({"x": (0, 9)}, r"action.x is \[0, 9\), which is not within \[0, 7\)"),
    ],
)
def test_each_number_of_an_action_has_one_key_and_the_gripper_its_own(tmp_path, action, message):
    with pytest.raises(ValueError, match=message):
        Modality(video={}, state={}, action=action, annotation=())
    path = tmp_path / "modality.json"
    entries = {name: {"start": start, "end": end} for name, (start, end) in action.items()}
    path.write_text(json.dumps({"video": {}, "state": {}, "action": entries}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        load_modality(path)


@pytest.mark.parametrize("bounds", [(4, 12), (3, 3), (-1, 2), (0.0, 1), 3, (1, 2, 3), "01"])
def test_a_slice_lies_within_the_states(bounds):
    with pytest.raises(ValueError, match=r"state.x is .*(not within \[0, 8\)|expected \(start, end\), whole numbers)"):
        dataclasses.replace(load_modality(), state={"x": bounds})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", r"lacks \['action', 'state', 'video'\]"),
        ('{"video": {}, "state": {"x": {"start": 7, "end": 9}}, "action": {}}', r"state.x is \[7, 9\)"),
        ('{"video": {}, "state": {"x": {"start": 7}}, "action": {}}', "needs `start` and `end`"),
    ],
)
def test_bad_modality_files_are_refused(tmp_path, text, message):
    path = tmp_path / "modality.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_modality(path)


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("state", [1], r'state is \[1\]; it must be an object, such as {"x": {"start": 0, "end": 1}}'),
        ("state", {"x": None}, r'state.x is None; it must be an object, as in {"x": {"start": 0, "end": 1}}'),
        ("state", {"x": {"start": "a", "end": 1}}, "state.x has start 'a'; it must be a whole number from 0 to 8"),
        ("state", {"x": {"start": 0.5, "end": 1}}, "state.x has start 0.5; it must be a whole number from 0 to 8"),
        ("action", {"x": {"start": 0, "end": True}}, "action.x has end True; it must be a whole number from 0 to 7"),
        ("video", ["image"], r"video is \['image'\]; it must be an object, such as {\"image\": {\"original_key\": "),
        ("video", {"image": "images"}, "video.image is 'images'; it must be an object, as in"),
        ("video", {"image": {"original_key": 3}}, "video.image has original_key 3; it must name a camera's column"),
        ("annotation", "foo", "annotation is 'foo'; it must be an object, such as {\"human.action.task_description\""),
    ],
)
def test_sections_of_another_form_are_refused_by_file_and_key(tmp_path, section, content, message):
    path = tmp_path / "modality.json"
    path.write_text(json.dumps({"video": {}, "state": {}, "action": {}} | {section: content}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {message}"):
        load_modality(path)


@pytest.mark.parametrize("wrap", [load_modality, lambda given: ModalityVectorObservation(VectorEnv(), given)])
def test_a_modality_is_a_path_and_no_dictionary(wrap):
    with pytest.raises(
        TypeError, match=r"modality={'video': {}} is a dict \(valid: a path to a modality.json, a Modality"
    ):
        wrap({"video": {}})


def test_single_wrapper_space_holds_its_observations():
    env = ModalityObservation(SingleEnv())
    assert isinstance(env, ModalityObservation)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.step(env.action_space.sample())[0].keys() == observation.keys()


def test_vector_wrapper_converts_final_observations_too():
    env = ModalityObservation(VectorEnv())
    assert isinstance(env, ModalityVectorObservation)
    observation, _ = env.reset()
    assert observation["state.gripper"].shape == (3, 2)
    assert env.observation_space["video.image"].shape == (3, 6, 6, 3)
    _, _, _, _, infos = env.step(np.zeros((3, 7), np.float32))
    assert set(infos["final_obs"]) == set(observation)


class MarkedEnv(SingleEnv):
    """Ends each episode after a step, whose observation holds the episode's number."""

    def __init__(self, number):
        self.number = number

    def reset(self, *, seed=None, options=None):
        self.number += 10
        return {**make_observation(), "states": np.full(8, self.number, np.float32)}, {}

    def step(self, action):
        ended = {**make_observation(), "states": np.full(8, self.number + 0.5, np.float32)}
        return ended, 0.0, False, self.number % 2 == 0, {"success": self.number > 10}


def test_gymnasiums_own_vector_environments_are_converted_too():
    """Whose `final_obs` is an array of dicts."""

    def make():
        fns = [lambda number=number: MarkedEnv(number) for number in range(2)]
        return SyncVectorEnv(fns, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)

    env = ModalityVectorObservation(make())
    env.reset(seed=0)
    observation, *_, infos = env.step(np.zeros((2, 7), np.float32))
    assert observation["state.x"].tolist() == [[20], [11.5]]
    ended, going = infos["final_obs"]
    assert going is None
    assert ended["state.x"].tolist() == [10.5]
    assert ended["annotation.human.action.task_description"] == "open it"

    env = LeRobotVectorEnv(make())
    env.reset(seed=0)
    *_, infos = env.step(np.zeros((2, 7), np.float32))
    assert infos["final_obs"][0]["agent_pos"].tolist() == [10.5] * 8
    assert infos["final_obs"][1] is None
    assert infos["final_info"]["is_success"].tolist() == [False, False]


class ObservableEnv(VectorEnv):
    def observe(self):
        return {**make_observation(3), "states": np.ones((3, 8), np.float32)}


class ObservableNextStep(ObservableEnv):
    metadata: ClassVar = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # for Gymnasium's wrappers


def test_it_observes_through_other_wrappers():
    assert ModalityVectorObservation(ObservableEnv()).observe()["state.x"].tolist() == [[1.0]] * 3
    through = ModalityVectorObservation(RecordEpisodeStatistics(ObservableEnv()))
    assert through.observe()["state.x"].tolist() == [[1.0]] * 3

    class Doubled(gymnasium.vector.VectorObservationWrapper):
        def observations(self, observations):
            return {**observations, "states": 2 * observations["states"]}

    through = ModalityVectorObservation(Doubled(RecordEpisodeStatistics(ObservableNextStep())))
    assert through.observe()["state.x"].tolist() == [[2.0]] * 3
    with pytest.raises(
        AttributeError, match=r"SyncVectorEnv cannot observe without stepping; make .* gymnasium.make_vec"
    ):
        ModalityVectorObservation(SyncVectorEnv([SingleEnv])).observe()


def test_an_environment_is_made_anew_with_its_wrapper(tmp_path):
    path = tmp_path / "modality.json"
    path.write_text(
        (resources.files("libero_gym") / "data" / "modality.json").read_text("utf-8").replace("yaw", "turn")
    )
    for modality in (None, path, load_modality(path)):
        env = ModalityObservation(gymnasium.make("libero_gym/libero_goal-v0", task_id=3, image_size=8), modality)
        again = gymnasium.make(env.spec)
        assert isinstance(again, ModalityObservation)
        assert again.modality == env.modality
        assert again.unwrapped.task_ids == (3,)
        for made in (env, again):
            made.close()


def test_unobserved_camera_is_refused(tmp_path):
    path = tmp_path / "modality.json"
    action = {"arm": {"start": 0, "end": 6}, "gripper": {"start": 6, "end": 7}}
    path.write_text(json.dumps({"video": {"top": {}}, "state": {}, "action": action}))
    with pytest.raises(ValueError, match=r"video\.top reads 'tops', which is not observed"):
        ModalityObservation(SingleEnv(), path)
