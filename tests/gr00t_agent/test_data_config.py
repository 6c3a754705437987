"""Modality configuration, embodiments, and a robot that nobody foresaw."""

import json

import numpy as np
import pytest
import torch

from gr00t_agent import (
    DataConfig,
    DatasetMetadata,
    Gr00tAgent,
    LiberoFrankaDataConfig,
    PolicyConfig,
    load_data_config,
    read_metadata,
    write_metadata,
)
from gr00t_agent.config import ModelConfig
from gr00t_agent.data_config import METADATA_PATH, embodiment_id, read_modality

CUSTOM_FILE = """
from gr00t_agent import DataConfig

TwoArms = DataConfig(
    embodiment_tag="two_arms",
    video_keys=("video.head",),
    state_keys=("state.arms", "state.fingers"),
    action_keys=("action.arms",),
    state_modes={"state.arms": "mean_std", "state.fingers": "q99"},
    crop_scale=1.0,
)
"""


def test_embodiment_tables():
    assert embodiment_id("libero_franka") == 31
    assert embodiment_id("new_embodiment", "rlinf") == 10
    assert embodiment_id("new_embodiment", "nvidia") == 31
    with pytest.raises(ValueError, match=r"embodiment_tag='libero_franka' is not in the nvidia table \(valid: gr1"):
        embodiment_id("libero_franka", "nvidia")
    with pytest.raises(ValueError, match=r"table 'mine' is unknown \(valid: nvidia, rlinf\)"):
        embodiment_id("gr1", "mine")


def test_metadata_round_trip_keeps_other_embodiments(tiny_checkpoint, tmp_path):
    metadata = read_metadata(tiny_checkpoint / METADATA_PATH, "libero_franka")
    path = tmp_path / "metadata.json"
    other = DatasetMetadata(statistics={}, modalities={}, embodiment_tag="other")
    write_metadata(path, other)
    write_metadata(path, metadata)
    assert read_metadata(path, "libero_franka") == metadata
    assert read_metadata(path, "other") == other
    assert metadata.resolution("video.image") == (256, 256)
    message = (
        r"no entry for embodiment_tag='gr1' \(present: other, libero_franka\); take the data config of one that is "
        "present, give its statistics as metadata=, or fine-tune on its data first"
    )
    with pytest.raises(ValueError, match=message):
        read_metadata(path, "gr1")
    with pytest.raises(KeyError, match=r"no statistics for 'state\.elbow'"):
        metadata.part("state.elbow")


def test_modality_file(tmp_path):
    path = tmp_path / "modality.json"
    path.write_text(
        json.dumps(
            {
                "state": {"x": {"start": 0, "end": 1}, "gripper": {"start": 6, "end": 8, "original_key": "q"}},
                "video": {"image": {"original_key": "observation.images.image"}},
                "annotation": {"human.action.task_description": {"original_key": "task_index"}},
            }
        )
    )
    parsed = read_modality(path)
    assert parsed["state.gripper"].start == 6
    assert parsed["state.gripper"].original_key == "q"
    assert parsed["video.image"] == "observation.images.image"
    assert parsed["annotation.human.action.task_description"] == "task_index"
    path.write_text('{"state": {"x": {"start": 0}}}')
    with pytest.raises(ValueError, match=r"modality\.json: state\.x lacks end; it must have start and end"):
        read_modality(path)


def test_data_config_by_name_or_file(tmp_path):
    assert load_data_config("libero_franka") == LiberoFrankaDataConfig()
    path = tmp_path / "robots.py"
    path.write_text(CUSTOM_FILE)
    config = load_data_config(f"{path}:TwoArms")
    assert DataConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="defines no DataConfig called 'Missing'"):
        load_data_config(f"{path}:Missing")
    with pytest.raises(ValueError, match=r"data_config='gr2' is unknown \(valid: libero_franka"):
        load_data_config("gr2")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_data_config("nowhere.py:Robot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embodiment_tag": ""}, "embodiment_tag='' is no name; give the one that the statistics file has"),
        ({"embodiment_tag": None}, "embodiment_tag=None is no name"),
        ({"action_horizon": 2.5}, "action_horizon=2.5 is not an int; give a whole number"),
        ({"video_keys": ()}, "video_keys is empty"),
        ({"state_keys": ("x",)}, "start with 'state.'"),
        ({"state_modes": {"state.y": "min_max"}}, "not among"),
        ({"state_modes": {"state.x": "max"}}, "normalisation 'max' is unknown"),
        ({"gripper_key": "action.hand"}, "gripper_key='action.hand' is not among"),
        ({"crop_scale": 1.5}, "crop_scale=1.5"),
    ],
)
def test_wrong_data_config_is_refused(changes, message):
    fields = {
        "embodiment_tag": "any",
        "video_keys": ("video.a",),
        "state_keys": ("state.x",),
        "action_keys": ("action.x",),
    }
    with pytest.raises(ValueError, match=message):
        DataConfig(**(fields | changes))


def statistics(width: int) -> dict[str, list[float]]:
    bounds = {"max": 1.0, "min": -1.0, "mean": 0.1, "std": 0.5, "q01": -0.9, "q99": 0.9}
    return {name: [value] * width for name, value in bounds.items()}


def test_fine_tunes_and_runs_a_robot_of_ones_own(tmp_path):
    """One camera, 14 actions, 30 state dimensions, another resolution, no gripper convention."""
    path = tmp_path / "robots.py"
    path.write_text(CUSTOM_FILE)
    data_config = load_data_config(f"{path}:TwoArms")
    metadata = DatasetMetadata(
        statistics={"state": {"arms": statistics(24), "fingers": statistics(6)}, "action": {"arms": statistics(14)}},
        modalities={"video": {"head": {"resolution": [80, 60], "channels": 3, "fps": 10.0}}},
        embodiment_tag="two_arms",
    )
    nano = ModelConfig.preset("nano")
    model = nano.model_json
    model["action_dim"] = model["action_head_cfg"]["action_dim"] = 14
    model["action_head_cfg"]["max_action_dim"] = 14
    model["action_head_cfg"]["max_state_dim"] = 32
    torch.manual_seed(0)
    policy = PolicyConfig(num_action_chunks=8, embodiment_id=0, value_hidden_dims=(32,))
    agent = Gr00tAgent.from_config(
        ModelConfig.from_json(model, nano.eagle_json),
        policy,
        data_config=data_config,
        metadata=metadata,
        tokenizer="nano",
    )
    rng = np.random.default_rng(0)
    obs = {
        "video.head": rng.integers(0, 255, (3, 60, 80, 3), dtype=np.uint8),
        "state.arms": rng.normal(size=(3, 24)).astype(np.float32),
        "state.fingers": rng.normal(size=(3, 6)).astype(np.float32),
        data_config.language_key: ["fold the towel", "fold the towel", "hand it over"],
    }
    actions = torch.from_numpy(rng.uniform(-1, 1, (3, 16, 14)).astype(np.float32))
    draws = (torch.randn(3, 16, 14), torch.tensor([0.1, 0.4, 0.8]))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-4)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = agent.sft_loss(obs, actions, draws=draws)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert agent.predict(obs).shape == (3, 8, 14)
    action, logprob, _, value = agent.get_action_and_value(obs)
    assert torch.equal(agent.get_action_and_value(obs, action)[1], logprob)
    agent.save_pretrained(tmp_path / "saved")
    loaded = Gr00tAgent.from_pretrained(tmp_path / "saved").eval()
    assert loaded.preprocessor.data_config == data_config
    torch.testing.assert_close(loaded.get_value(obs), agent.eval().get_value(obs), rtol=0, atol=1e-6)
    assert value.shape == (3,)


def test_robot_wider_than_the_network_is_refused():
    metadata = DatasetMetadata(
        statistics={"state": {"x": statistics(9)}, "action": {"x": statistics(2)}}, modalities={}, embodiment_tag="wide"
    )
    config = DataConfig(
        embodiment_tag="wide", video_keys=("video.a",), state_keys=("state.x",), action_keys=("action.x",)
    )
    with pytest.raises(ValueError, match="state has 9 dimensions, but the network takes at most 8"):
        Gr00tAgent.from_preset("nano", data_config=config, metadata=metadata)
