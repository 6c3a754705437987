"""Checkpoints whose files are damaged, foreign or out of date: one error each, which names the file and the cause."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, PolicyConfig
from gr00t_agent.loading import POLICY_FILE, saved_data_config, saved_policy
from gr00t_agent.transforms import load_tokenizer
from gr00t_agent.weights import INDEX_FILE, WEIGHTS_FILE, write_weights
from tests.gr00t_agent.conftest import make_observation

CONFIG, METADATA, EAGLE = "config.json", "experiment_cfg/metadata.json", "eagle2_hg_model/config.json"
TAG = "libero_franka"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n"
SETTINGS = {
    "policy": {"num_action_chunks": 5},
    "data_config": LiberoFrankaDataConfig().to_json(),
    "trainable": {"tune_visual": False, "tune_llm": False},
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, copied)
    return copied


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change parsed JSON in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def put(*keys: str, **values: Any) -> Callable[[Any], None]:
    """Return a change that sets `values` in the section that `keys` lead to."""

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data.update(values)

    return change


def drop(*keys: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def statistics(modality: str = "action", part: str = "x", **values: Any) -> Callable[[Any], None]:
    return put(TAG, "statistics", modality, part, **values)


def refused(folder: Path, error: type[Exception], message: str, file: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Gr00tAgent.from_pretrained(folder)
    named = str(folder) if file in (CONFIG, EAGLE) else str(folder / file)
    assert named in str(caught.value)


FILES = [
    CONFIG,
    METADATA,
    EAGLE,
    "model.safetensors",
    "eagle2_hg_model/vocab.json",
    "eagle2_hg_model/merges.txt",
    "eagle2_hg_model/added_tokens.json",
    "eagle2_hg_model/tokenizer_config.json",
    POLICY_FILE,
    "eagle2_hg_model/tokenizer.json",
]


def complete(folder: Path) -> None:
    """Add the files that only this package writes."""
    (folder / POLICY_FILE).write_text(json.dumps(SETTINGS))
    load_tokenizer(folder / "eagle2_hg_model").backend_tokenizer.save(str(folder / "eagle2_hg_model/tokenizer.json"))


def read_alone(folder: Path, file: str) -> None:
    """A tokenizer.json hides the files that it was made of."""
    if "eagle2_hg_model" in file and not file.endswith("tokenizer.json"):
        (folder / "eagle2_hg_model/tokenizer.json").unlink()


@pytest.mark.parametrize("file", FILES)
def test_pointers_of_git_lfs_are_named(folder: Path, file: str):
    complete(folder)
    read_alone(folder, file)
    (folder / file).write_text(LFS_POINTER)
    refused(folder, ValueError, "is a Git-LFS pointer, .*; run `git lfs pull` there", file)


@pytest.mark.parametrize("file", [file for file in FILES if not file.endswith("merges.txt")])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_files_that_were_cut_are_named(folder: Path, file: str, kept: float):
    complete(folder)
    read_alone(folder, file)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(kept * len(content))])
    refused(folder, ValueError, "is no .*, or only a part of", file)


@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"\xff\xfe{}"])
@pytest.mark.parametrize("file", [CONFIG, METADATA, EAGLE, POLICY_FILE])
def test_files_that_hold_no_object_are_named(folder: Path, file: str, content: bytes):
    (folder / file).write_bytes(content)
    refused(folder, ValueError, "holds a JSON .*; it must hold an object|is no JSON", file)


INDEX = f"{WEIGHTS_FILE}.index.json"


@pytest.mark.parametrize("file", [*FILES, INDEX])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_lies_in_a_files_place_is_named(folder: Path, file: str, is_link: bool):
    complete(folder)
    read_alone(folder, file)
    (folder / file).unlink(missing_ok=True)
    if is_link:
        (folder / file).symlink_to(folder / "nowhere")
    else:
        (folder / file).mkdir()
    refused(folder, FileNotFoundError, "is no file but a folder, or a link to nothing; put the file there", file)


@pytest.mark.parametrize("name", ["experiment_cfg", "eagle2_hg_model"])
def test_a_file_in_a_folders_place_is_named(folder: Path, name: str):
    shutil.rmtree(folder / name)
    (folder / name).write_text("{}")
    refused(folder, FileNotFoundError, "is no folder, or a link to nothing; .* belongs into a folder", name)


def test_links_to_files_elsewhere_are_followed(folder: Path, tmp_path: Path):
    for file in (CONFIG, METADATA, "model.safetensors"):
        (folder / file).rename(tmp_path / "blob")
        (folder / file).symlink_to((tmp_path / "blob").rename(tmp_path / Path(file).name))
    Gr00tAgent.from_pretrained(folder)


def test_a_tokenizer_of_which_a_file_is_missing_is_not_replaced(folder: Path):
    (folder / "eagle2_hg_model/vocab.json").unlink()
    refused(folder, FileNotFoundError, "has no tokenizer.json, and no vocab.json", "eagle2_hg_model")


@pytest.mark.parametrize(
    ("file", "key"), [(CONFIG, "action_dim"), (METADATA, "min"), (EAGLE, "select_layer"), (POLICY_FILE, "padding")]
)
def test_names_that_are_there_twice_are_refused(folder: Path, file: str, key: str):
    (folder / POLICY_FILE).write_text(json.dumps(SETTINGS | {"policy": {"padding": "left"}}))
    text = json.dumps(json.loads((folder / file).read_text()))
    (folder / file).write_text(text.replace(f'"{key}": ', f'"{key}": 1, "{key}": ', 1))
    refused(folder, ValueError, f"'{key}' is there twice", file)


@pytest.mark.parametrize("file", [CONFIG, METADATA, EAGLE, POLICY_FILE])
def test_endless_nesting_is_refused(folder: Path, file: str):
    (folder / file).write_text("[" * 100_000)
    refused(folder, ValueError, "is no JSON, or only a part of it", file)


def test_json_that_is_no_tokenizer_is_named(folder: Path):
    (folder / "eagle2_hg_model/tokenizer.json").write_text('{"model": {}}')
    refused(folder, ValueError, "is no tokenizer.json", "eagle2_hg_model/tokenizer.json")


NAN, INF = float("nan"), float("inf")
FINITE = "action.x: {} is .*; it must be a list of finite numbers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (statistics(max=[NAN]), FINITE.format("max")),
        (statistics(min=[-INF]), FINITE.format("min")),
        (statistics(mean=[None]), FINITE.format("mean")),
        (statistics(std=["0.5"]), FINITE.format("std")),
        (statistics(q01=[True]), FINITE.format("q01")),
        (statistics(q99=0.9), FINITE.format("q99")),
        (statistics(max=[]), FINITE.format("max")),
        (statistics(max=[1e39]), FINITE.format("max")),
        (statistics(max=[10**400]), FINITE.format("max")),
        (statistics(max=[[0.9]]), FINITE.format("max")),
        (statistics(max=[3e38], min=[-3e38]), r"max\[0\] - min\[0\] is 3e\+38 - -3e\+38, beyond single precision"),
        (statistics(max="1"), FINITE.format("max")),
        (statistics(max=[-1.0], min=[1.0]), r"action\.x: min\[0\]=1\.0 is above max\[0\]=-1\.0; compute"),
        (statistics(q01=[9.0]), r"action\.x: q01\[0\]=9\.0 is above q99"),
        (statistics(std=[-0.1]), r"action\.x: std is \[-0\.1\], which is negative"),
        (drop(TAG, "statistics", "action", "x", "q01"), r"action\.x lack q01 \(needed: max, min"),
        (statistics("state", "gripper", min=[0.0]), r"state\.gripper have different lengths: .*'min': 1"),
        (statistics("state", "x", min=[-0.4, -0.9]), r"state\.x have different lengths"),
        (put(TAG, "statistics", "action", x=None), r"statistics\.action\.x=None is not allowed here"),
        (put(TAG, "statistics", action=[1]), r"statistics\.action=\[1\] is not allowed here"),
        (put(TAG, statistics=None), r"statistics=None is not allowed here"),
        (drop(TAG, "statistics"), r"libero_franka has no key 'statistics'"),
        (drop(TAG, "modalities"), r"libero_franka has no key 'modalities'"),
        (put(TAG, modalities=[]), r"modalities=\[\] is not allowed here"),
        (put(**{TAG: None}), r"libero_franka=None is not allowed here"),
        (drop(TAG, "modalities", "video", "image", "resolution"), r"video\.image has no key 'resolution'"),
        (put(TAG, "modalities", "video", "image", resolution=[256]), r"resolution=\[256\] is not allowed"),
        (put(TAG, "modalities", "video", "image", resolution=[256, 0]), "must be width and height in pixels"),
        (put(TAG, "modalities", "video", "image", resolution=[256, "256"]), "is not allowed here"),
        (put(TAG, "modalities", "video", "image", channels=4), r"image\.channels=4 is not supported \(supported: 3\)"),
        (put(TAG, "modalities", "video", "image", channels=True), r"image\.channels=True is not allowed here"),
        (put(TAG, "modalities", "state", "x", shape=[2]), r"state\.x have 1 elements, but modalities say shape=\[2\]"),
        (put(TAG, "modalities", "state", "x", shape=[-1, -1]), r"modalities say shape=\[-1, -1\]; they must fit"),
        (put(TAG, "modalities", "state", "x", shape="1"), r"modalities\.state\.x\.shape='1' is not allowed here"),
    ],
)
def test_statistics_that_are_none_are_refused(folder: Path, change: Callable[[Any], None], message: str):
    edit(folder / METADATA, change)
    refused(folder, (KeyError, ValueError), message, METADATA)


def test_a_camera_that_the_modalities_lack_is_named(folder: Path):
    edit(folder / METADATA, drop(TAG, "modalities", "video", "image"))
    refused(folder, KeyError, r"modalities lack video\.image \(present: video\.wrist_image\)", "")


def test_statistics_given_in_code_are_checked_too(tiny_agent: Gr00tAgent, tiny_checkpoint: Path):
    metadata = tiny_agent.preprocessor.metadata
    spoilt = json.loads(json.dumps({"s": metadata.statistics}))["s"]
    spoilt["state"]["yaw"]["max"] = [NAN]
    metadata = type(metadata)(statistics=spoilt, modalities=metadata.modalities, embodiment_tag=TAG)
    with pytest.raises(ValueError, match=r"statistics of 'state\.yaw': max is \[nan\]"):
        Gr00tAgent.from_pretrained(tiny_checkpoint, metadata=metadata)


HEAD, DIT, VL = "action_head_cfg", "diffusion_model_cfg", "vl_self_attention_cfg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(model_type="gr00t_n1"), r"'gr00t_n1' is GR00T N1, another network; only N1\.5 is supported"),
        (put(model_type="Gr00tN1d6", architectures=["Gr00tN1d6"]), r"is GR00T N1\.6, another network"),
        (put(model_type="Gr00tN1d7"), r"is GR00T N1\.7, another network"),
        (put(architectures=["GR00T_N1"]), "is GR00T N1, another network"),
        (put(architectures="Gr00tN1d6"), r"is GR00T N1\.6, another network"),
        (put(architectures=["GR00T_N1_6"]), r"is GR00T N1\.6, another network"),
        (put(model_type="gr00t_n1_7"), r"is GR00T N1\.7, another network"),
        (put(model_type="gr00t_n2"), "is GR00T N2, another network"),
        (put(model_type="Gr00tN1d5"), r"model_type='Gr00tN1d5' is not GR00T-N1\.5"),
        (put(attn_implementation="owner/repo"), r"config\.json\.attn_implementation='owner/repo' is no attention"),
        (put("backbone_cfg", _attn_implementation="owner/repo"), r"backbone_cfg\._attn_implementation='owner/repo' is"),
        (put(quantization_config={"quant_method": "x"}), r"config\.json\.quantization_config=.* is not supported"),
        (put(model_type="pi0"), r"model_type='pi0' is not GR00T-N1\.5 \(supported: 'gr00t_n1_5'\)"),
        (put(model_type=None), r"model_type=None is not GR00T-N1\.5"),
        (put(action_horizon=8), r"action_horizon=8, but action_head_cfg\.action_horizon=\d+; they must be equal"),
        (put(action_dim=7), r"action_dim=7, but action_head_cfg\.action_dim=\d+"),
        (put(hidden_size=7), r"hidden_size=7, but text_config\.hidden_size="),
        (put(HEAD, action_horizon="16"), r"action_head_cfg\.action_horizon='16' is not allowed here \(allowed: int\)"),
        (put(HEAD, max_state_dim=True), r"action_head_cfg\.max_state_dim=True is not allowed here"),
        (put(HEAD, num_inference_timesteps=0), r"num_inference_timesteps=0 must be positive"),
        (put(HEAD, num_timestep_buckets=-1), r"num_timestep_buckets=-1 must be positive"),
        (put(HEAD, noise_s=NAN), r"noise_s=nan is not allowed here \(allowed: a finite number\)"),
        (put(HEAD, noise_s=10**400), r"noise_s=1000.* is not allowed here"),
        (put(HEAD, noise_beta_alpha="1.5"), r"noise_beta_alpha='1\.5' is not allowed here"),
        (put(HEAD, action_horizon=16.0), r"action_horizon=16\.0 is not allowed here"),
        (put(HEAD, num_timestep_buckets=3), r"num_inference_timesteps=\d+ exceeds num_timestep_buckets=3"),
        (put(HEAD, num_inference_timesteps=10**30), r"num_inference_timesteps=1000.* is above 10000000"),
        (put(HEAD, max_action_dim=7), r"max_action_dim=7 is not supported"),
        (put(HEAD, use_vlln=1), r"use_vlln=1 is not supported \(supported: True\)"),
        (put(HEAD, DIT, dropout=1.5), r"diffusion_model_cfg\.dropout=1\.5 is not in \[0, 1\)"),
        (put(HEAD, DIT, num_layers=10**9), r"diffusion_model_cfg\.num_layers=1000000000 is above 1000"),
        (put(HEAD, DIT, norm_elementwise_affine=True), r"norm_elementwise_affine=True is not supported"),
        (put(HEAD, DIT, interleave_self_attention=1), r"interleave_self_attention=1 is not supported"),
        (drop(HEAD, DIT, "interleave_self_attention"), "diffusion_model_cfg has no key 'interleave_self_attention'"),
        (drop(HEAD, DIT, "positional_embeddings"), "diffusion_model_cfg has no key 'positional_embeddings'"),
        (drop(HEAD, VL, "positional_embeddings"), "vl_self_attention_cfg has no key 'positional_embeddings'"),
        (drop(HEAD, DIT, "cross_attention_dim"), "diffusion_model_cfg has no key 'cross_attention_dim'"),
        (put(HEAD, VL, norm_type="ada_norm"), r"norm_type='ada_norm' is not supported \(supported: 'layer_norm'\)"),
        (put(HEAD, noise_beta_beta=2.0), r"noise_beta_beta=2\.0 is not supported \(supported: 1\.0\)"),
        (put(HEAD, add_pos_embed=False), r"add_pos_embed=False is not supported"),
        (put(HEAD, use_vlln=False), r"use_vlln=False is not supported"),
        (put(HEAD, DIT, activation_fn="geglu"), r"diffusion_model_cfg\.activation_fn='geglu' is not supported"),
        (put(HEAD, DIT, attention_bias=False), r"diffusion_model_cfg\.attention_bias=False is not supported"),
        (put(HEAD, DIT, dropout=None), r"diffusion_model_cfg\.dropout=None is not allowed here"),
        (put(HEAD, VL, num_layers=2.5), r"vl_self_attention_cfg\.num_layers=2\.5 is not allowed here"),
        (put(HEAD, **{DIT: None}), r"action_head_cfg\.diffusion_model_cfg=None is not allowed here"),
        (put(**{HEAD: "n1.5"}), r"action_head_cfg='n1\.5' is not allowed here"),
        (drop(HEAD), r"config\.json has no key 'action_head_cfg'"),
        (drop(HEAD, "num_inference_timesteps"), r"action_head_cfg has no key 'num_inference_timesteps'"),
        (drop("backbone_cfg", "select_layer"), r"backbone_cfg has no key 'select_layer'"),
        (put("backbone_cfg", reproject_vision=True), r"reproject_vision=True is not supported"),
        (put("backbone_cfg", project_to_dim="64"), r"project_to_dim='64' is not allowed here"),
        (put("backbone_cfg", project_to_dim=0), r"project_to_dim=0 must be positive"),
        (put("backbone_cfg", select_layer=-5), r"backbone_cfg\.select_layer selects layer -5, which is not in 1-\d"),
        (put("backbone_cfg", select_layer=0), r"backbone_cfg\.select_layer selects layer 0, which is not in 1-\d"),
    ],
)
def test_configurations_that_are_not_supported_are_refused(folder: Path, change: Callable[[Any], None], message: str):
    edit(folder / CONFIG, change)
    refused(folder, (KeyError, ValueError), message, CONFIG)


def test_a_policy_of_lerobots_is_told_apart(folder: Path):
    (folder / CONFIG).write_text(
        json.dumps({"type": "groot", "n_obs_steps": 1, "base_model_path": "nvidia/GR00T-N1.5-3B"})
    )
    refused(folder, ValueError, r"LeRobot's description of a policy \(type='groot'\)", CONFIG)


TEXT, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(_attn_implementation="owner/repo"), r"_attn_implementation='owner/repo' is no attention of transformers'"),
        (put(TEXT, _attn_implementation="owner/repo"), r"text_config\._attn_implementation='owner/repo' is no"),
        (put(VISION, attn_implementation="owner/repo:x"), r"vision_config\.attn_implementation='owner/repo:x' is no"),
        (put(VISION, _attn_implementation={"": "owner/repo"}), "is no attention of transformers' own"),
        (put(model_type="eagle_2"), r"eagle config\.model_type='eagle_2' is not supported"),
        (put(TEXT, model_type="llama"), r"text_config\.model_type='llama' is not supported"),
        (put(VISION, model_type="clip"), r"vision_config\.model_type='clip' is not supported"),
        (put(TEXT, rope_scaling={"type": "yarn"}), r"rope_scaling=.* is not supported"),
        (put(TEXT, rope_parameters={"rope_theta": 1.0}), r"rope_parameters=.* is not supported"),
        (put(TEXT, use_sliding_window=True), r"use_sliding_window=True is not supported"),
        (put(TEXT, attention_dropout=0.1), r"text_config\.attention_dropout=0\.1 is not supported"),
        (put(TEXT, hidden_act="gelu"), r"text_config\.hidden_act='gelu' is not supported"),
        (put(VISION, hidden_act="gelu"), r"vision_config\.hidden_act='gelu' is not supported"),
        (put(VISION, num_channels=4), r"num_channels=4 is not supported"),
        (put(TEXT, vocab_size="304"), r"text_config\.vocab_size='304' is not allowed here"),
        (put(TEXT, num_key_value_heads=0), r"num_key_value_heads=0 must be positive"),
        (put(force_image_size=448), r"force_image_size=448 is not supported \(supported: \d+\)"),
        (put(VISION, patch_size=15), r"image_size=\d+ is no multiple of patch_size=15"),
        (put(select_layer=9), r"eagle config select_layer selects layer 9, which is not in 1-\d"),
        (drop(TEXT, "rope_theta"), r"text_config has no key 'rope_theta'"),
        (put(TEXT, rope_theta=10**400), r"text_config\.rope_theta=1000.* is not allowed here"),
        (put(TEXT, _attn_implementation_internal="owner/repo"), "_attn_implementation_internal='owner/repo' is no"),
        (put(quantization_config={}), r"eagle config\.quantization_config=\{\} is not supported"),
        (put(mlp_connector_layers=True), r"mlp_connector_layers=True is not supported \(supported: 1\)"),
        (put(use_pixel_shuffle=0), r"use_pixel_shuffle=0 is not supported \(supported: False\)"),
        (put(TEXT, attention_dropout=False), r"attention_dropout=False is not supported"),
        (put(TEXT, num_hidden_layers=10**9), r"num_hidden_layers=1000000000 is above 1000, which no network reaches"),
        (put(TEXT, layer_types=["sliding_attention"]), r"layer_types=.* is not allowed here"),
        (put(TEXT, num_key_value_heads=3), r"num_attention_heads=\d is no multiple of num_key_value_heads=3"),
        (put(TEXT, head_dim=7), r"head_dim=7 is odd"),
        (put(VISION, num_attention_heads=7), r"vision_config\.hidden_size=\d+ is no multiple of num_attention_heads=7"),
        (put(image_token_index=-1), r"image_token_index=-1 is no token: vocab_size=\d+"),
        (drop(VISION), r"eagle config has no key 'vision_config'"),
        (put(image_token_index="282"), r"image_token_index='282' is not allowed here"),
    ],
)
def test_eagle_configurations_that_are_not_supported_are_refused(
    folder: Path, change: Callable[[Any], None], message: str
):
    edit(folder / EAGLE, change)
    refused(folder, (KeyError, ValueError), message, EAGLE)


def test_known_names_of_attention_pass_and_none_is_used(folder: Path):
    for section in (put(), put(TEXT), put(VISION)):
        edit(folder / EAGLE, section)
    edit(folder / EAGLE, put(_attn_implementation="flash_attention_2"))
    edit(folder / EAGLE, put(TEXT, _attn_implementation="sdpa", _experts_implementation="owner/repo"))
    eagle = Gr00tAgent.from_pretrained(folder).backbone.eagle_model
    for config in (eagle.vision_model.config, eagle.language_model.model.config):
        assert config._attn_implementation == "gr00t_sdpa"
    assert getattr(eagle.language_model.model.config, "_experts_implementation", None) != "owner/repo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("policy", new=1), r"policy has the unknown field\(s\) new \(known: num_action_chunks, .*newer version"),
        (put("data_config", new=1), r"data_config has the unknown field\(s\) new"),
        (put("trainable", tune_all=True), r"trainable has the unknown flag\(s\) tune_all \(known: tune_visual"),
        (put(version=2), r"has the entries policy, data_config, trainable, version, but this package writes policy"),
        (drop("trainable"), r"has the entries policy, data_config, but this package writes"),
        (put(trained_on="libero_goal"), r"trained_on='libero_goal' is not allowed here \(allowed: an object\)"),
        (drop("trainable", "tune_llm"), r"trainable has no key 'tune_llm'"),
        (put("trainable", tune_llm="yes"), r"trainable\.tune_llm='yes' is not allowed here \(allowed: bool\)"),
        (put("policy", num_action_chunks="5"), r"policy\.num_action_chunks='5' is not allowed here \(allowed: int\)"),
        (put("policy", num_action_chunks=True), r"policy\.num_action_chunks=True is not allowed here"),
        (put("policy", denoising_steps=2.5), r"policy\.denoising_steps=2\.5 is not allowed here"),
        (put("policy", noise_level=NAN), r"policy\.noise_level=nan is not allowed here"),
        (put("policy", noise_std_range=[0.1]), r"policy\.noise_std_range=\[0\.1\] is not allowed here"),
        (put("policy", padding=None), r"policy\.padding=None is not allowed here \(allowed: 'masked', 'left'"),
        (put("policy", noise_method="ddpm"), r"policy\.noise_method='ddpm' is not allowed here \(allowed: 'flow_sde'"),
        (put("policy", prompt_length=0), r"prompt_length=0 is below 1"),
        (put("policy", value_hidden_dims=[0]), r"value_hidden_dims=\(0,\) must be positive"),
        (put(policy=None), r"policy is a JSON NoneType; it must be an object"),
        (drop("data_config", "state_keys"), r"data_config lacks state_keys; present"),
        (put("data_config", state_keys="state.x"), r"data_config\.state_keys='state\.x' is not allowed here"),
        (put("data_config", state_modes={"state.x": "max"}), r"state_modes\.state\.x='max' is not allowed here"),
        (put("data_config", action_horizon=0), r"action_horizon=0 is below 1"),
        (
            put("data_config", action_horizon=8),
            r"data_config\.action_horizon=8, but action_horizon=\d+ in config\.json",
        ),
        (put("data_config", state_keys=["state.x"] * 2), r"state_keys has 'state\.x' twice"),
        (put("policy", denoising_steps=8), r"denoising_steps=8, but num_inference_timesteps=\d+ in config\.json; make"),
        (put("policy", denoising_steps=0), r"denoising_steps=0 is below 1"),
        (put("policy", num_action_chunks=0), r"num_action_chunks=0 is below 1"),
        (put("policy", noise_level=-1), r"noise_level=-1\.0 is out of range"),
        (put("policy", noise_level=10**400), r"policy\.noise_level=1000.* is not allowed here"),
        (put("policy", ignore_last=1), r"policy\.ignore_last=1 is not allowed here"),
    ],
)
def test_settings_that_are_not_this_versions_are_refused(folder: Path, change: Callable[[Any], None], message: str):
    (folder / POLICY_FILE).write_text(json.dumps(SETTINGS))
    assert Gr00tAgent.from_pretrained(folder).policy == PolicyConfig()
    edit(folder / POLICY_FILE, change)
    refused(folder, (KeyError, ValueError), message, POLICY_FILE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_action_chunks": 99}, r"num_action_chunks=99 is not in 1-\d+"),
        ({"embodiment_id": 99}, r"embodiment_id=99 is not in 0-\d+"),
        ({"prompt_length": 3}, r"prompt_length=3 leaves no room for an instruction; give more than \d+ tokens"),
        ({"prompt_length": 10**9}, r"prompt_length=1000000000 exceeds .* max_position_embeddings=\d+"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(folder: Path, values: dict[str, int], message: str):
    (folder / POLICY_FILE).write_text(json.dumps(SETTINGS | {"policy": values}))
    refused(folder, ValueError, message, "")


def test_more_denoising_steps_than_times_are_refused(tiny_checkpoint: Path):
    with pytest.raises(ValueError, match=r"denoising_steps=1000001 exceeds num_timestep_buckets=\d+; give fewer"):
        Gr00tAgent.load(tiny_checkpoint, denoising_steps=1000001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_of_the_noise_net_are_those_of_the_policy(folder: Path, tmp_path: Path, dtype: torch.dtype):
    policy = PolicyConfig(noise_method="reinflow", noise_std_range=(0.05, 0.2))
    Gr00tAgent.from_pretrained(folder, policy=policy, dtype=dtype).save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / WEIGHTS_FILE)
    for bound in ("logvar_min", "logvar_max"):
        name = f"action_head.reinflow_explore_noise_net.{bound}"
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "saved" / WEIGHTS_FILE)
    assert Gr00tAgent.from_pretrained(tmp_path / "saved").policy == policy
    with pytest.raises(
        ValueError, match=r"noise_std_range=\(0\.05, 0\.1\), but the .* trained with \(0\.0[45]\d*, 0\.[12]"
    ):
        Gr00tAgent.load(tmp_path / "saved", noise_std_range=(0.05, 0.1))


def test_settings_of_another_program_are_refused(folder: Path):
    (folder / POLICY_FILE).write_text('{"type": "groot"}')
    refused(folder, ValueError, "has the entries type, but this package writes .*Delete it", POLICY_FILE)
    for read in (saved_policy, saved_data_config):
        with pytest.raises(ValueError, match="has the entries type"):
            read(folder)


@pytest.fixture
def shards(folder: Path, tiny_agent: Gr00tAgent) -> Path:
    (folder / WEIGHTS_FILE).unlink()
    write_weights(tiny_agent, folder, max_shard_bytes=1_000_000)
    return folder


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/m.safetensors", "a\\b.safetensors", "..", "m.bin"]
)
def test_an_index_stays_in_its_folder(shards: Path, name: str):
    outside = shards.parent / "model.safetensors"
    save_file({"action_head.vlln.bias": torch.zeros(1)}, outside)
    edit(shards / INDEX_FILE, put("weight_map", **{"action_head.vlln.bias": name}))
    refused(shards, ValueError, "weight_map names .*; it must name .safetensors files in the folder itself", INDEX_FILE)


def test_an_index_that_does_not_fit_its_shards_is_refused(shards: Path):
    index = json.loads((shards / INDEX_FILE).read_text())
    first, other = sorted(set(index["weight_map"].values()))[:2]
    edit(shards / INDEX_FILE, put("weight_map", **{"action_head.vlln.bias": first, "action_head.vlln.weight": other}))
    with pytest.raises(ValueError, match=rf"does not fit {INDEX_FILE}; tensors that"):
        Gr00tAgent.from_pretrained(shards)
    (shards / INDEX_FILE).write_text("{}")
    refused(shards, KeyError, "it has no key 'weight_map'", INDEX_FILE)
    (shards / INDEX_FILE).write_text('{"weight_map": ["model.safetensors"]}')
    refused(shards, ValueError, "weight_map=.* is not allowed here", INDEX_FILE)
    (shards / INDEX_FILE).write_text(json.dumps(index))
    Gr00tAgent.from_pretrained(shards)
    save_file({"action_head.vlln.bias": torch.zeros(1)}, shards / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"has both {WEIGHTS_FILE} and {INDEX_FILE}; delete the one"):
        Gr00tAgent.from_pretrained(shards)


@pytest.mark.parametrize("value", [3, None, "", "a\0.safetensors", "./m.safetensors", "~/m.safetensors"])
def test_an_index_names_files(shards: Path, value: Any):
    edit(shards / INDEX_FILE, put("weight_map", **{"action_head.vlln.bias": value}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"weight_map|lacks a"):
        Gr00tAgent.from_pretrained(shards)


@pytest.mark.parametrize("spoil", ["pointer", "folder", "cut", "absent"])
def test_shards_that_are_not_whole_are_named(shards: Path, spoil: str):
    shard = sorted(shards.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if spoil == "folder":
        shard.mkdir()
    elif spoil != "absent":
        shard.write_bytes(LFS_POINTER.encode() if spoil == "pointer" else content[:-9])
    with pytest.raises((ValueError, FileNotFoundError), match=shard.name):
        Gr00tAgent.from_pretrained(shards)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<|endoftext|>"])
def test_tokenizers_without_the_prompts_tokens_are_refused(folder: Path, token: str):
    complete(folder)

    def make_text(tokenizer: Any) -> None:
        for entry in [entry for entry in tokenizer["added_tokens"] if entry["content"] == token]:
            tokenizer["added_tokens"].remove(entry)
            tokenizer["model"]["vocab"][token] = entry["id"]

    edit(folder / "eagle2_hg_model/tokenizer.json", make_text)
    refused(
        folder,
        ValueError,
        r"takes <.*> for text \(ids \[.*\]\), not|gives <IMG_CONTEXT> the id \d+, the network expects \d+",
        "",
    )


def test_tokenizers_with_more_tokens_than_the_network_are_refused(folder: Path):
    edit(folder / EAGLE, put(TEXT, vocab_size=len(load_tokenizer(folder / "eagle2_hg_model")) - 1))
    refused(folder, ValueError, r"has ids up to \d+, but the network's vocab_size=\d+; use the tokenizer that", "")


def test_quantised_weights_are_refused(folder: Path):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["action_head.vlln.bias"] = tensors["action_head.vlln.bias"].to(torch.int8)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"vlln\.bias .* torch\.int8 .*quantised weights are not supported"):
        Gr00tAgent.from_pretrained(folder)


def test_denoising_steps_of_the_file_are_used(folder: Path, tmp_path: Path):
    edit(folder / CONFIG, put(HEAD, num_inference_timesteps=6))
    assert Gr00tAgent.from_pretrained(folder).policy == PolicyConfig(denoising_steps=6)
    assert Gr00tAgent.load(folder).policy.denoising_steps == saved_policy(folder).denoising_steps == 6
    agent = Gr00tAgent.load(folder, denoising_steps=3)
    agent.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert saved[HEAD]["num_inference_timesteps"] == 3
    assert Gr00tAgent.from_pretrained(tmp_path / "saved").policy.denoising_steps == 3


def test_another_action_horizon_predicts_and_trains(folder: Path, tmp_path: Path):
    edit(folder / CONFIG, put(action_horizon=8))
    edit(folder / CONFIG, put(HEAD, action_horizon=8))
    agent = Gr00tAgent.from_pretrained(folder)
    assert agent.preprocessor.data_config == saved_data_config(folder) == LiberoFrankaDataConfig(action_horizon=8)
    obs = make_observation(2, image_size=256) | {"annotation.human.action.task_description": ["open it"] * 2}
    assert agent.predict(obs).shape == (2, 5, 7)
    agent.sft_loss(obs, torch.zeros(2, 8, 7)).backward()
    with pytest.raises(ValueError, match=r"actions are \[2, 16, 7\]; they must be \[batch, 8, 7\]"):
        agent.sft_loss(obs, torch.zeros(2, 16, 7))
    agent.save_pretrained(tmp_path / "saved")
    assert Gr00tAgent.from_pretrained(tmp_path / "saved").preprocessor.data_config.action_horizon == 8
    with pytest.raises(ValueError, match=r"action_horizon=16, the network 8; give a data config with action_horizon=8"):
        Gr00tAgent.from_pretrained(folder, data_config=LiberoFrankaDataConfig())
