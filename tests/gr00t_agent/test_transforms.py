"""Preprocessing and un-normalisation against recorded values of the reference transforms."""

import json

import numpy as np
import pytest
import torch

from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, PolicyConfig, SamplingDraws, read_metadata
from gr00t_agent.data_config import METADATA_PATH, DatasetMetadata
from gr00t_agent.transforms import (
    EAGLE_TOKENS,
    NANO_TOKENIZER,
    Normaliser,
    Preprocessor,
    PromptLayout,
    load_tokenizer,
    pixels_from_bytes,
    prompt_text,
    resize_views,
    save_tokenizer,
    token_id,
)
from tests.gr00t_agent.conftest import REFERENCE_DIR, make_observation

CPU = torch.device("cpu")


def modality_observation(goldens):
    """Build the modality dict from recorded simulator observations, as the environment's adapter does."""
    t = goldens.tensors
    states = t["env/states"]
    obs = {
        "video.image": t["raw/agentview_image"].flip(1, 2),
        "video.wrist_image": t["raw/robot0_eye_in_hand_image"].flip(1, 2),
        "state.gripper": states[:, 6:8],
        "annotation.human.action.task_description": goldens.index["instructions"],
    }
    for i, part in enumerate(("x", "y", "z", "roll", "pitch", "yaw")):
        obs[f"state.{part}"] = states[:, i : i + 1]
    return obs


@pytest.fixture(scope="module")
def libero_metadata(tiny_checkpoint):
    return read_metadata(tiny_checkpoint / METADATA_PATH, "libero_franka")


def test_images_equal_the_recorded_bytes(tiny_agent, transform_goldens):
    t = transform_goldens.tensors
    images = tiny_agent.preprocessor.images(modality_observation(transform_goldens), CPU)
    for view, name in enumerate(("main", "wrist")):
        assert torch.equal(images[:, view], t[f"chain/resized_u8_{name}"].permute(0, 3, 1, 2))
    pixels = pixels_from_bytes(images, torch.float32)
    assert torch.equal(pixels[0, 0, 0], t["pixel_values_sample0_view0_channel0"])


def test_images_already_at_size_are_not_resampled():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    assert torch.equal(resize_views(images, 1.0, 32), images.permute(0, 3, 1, 2))


def test_state_equals_the_recorded_one(tiny_checkpoint, tiny_agent, transform_goldens):
    t = transform_goldens.tensors
    obs = modality_observation(transform_goldens)
    state = tiny_agent.preprocessor.state(obs, CPU)
    assert (state - t["state_without_bf16_rounding"]).abs().max() <= 1e-6
    policy = PolicyConfig(padding="left", round_to_bf16=True)
    rounding = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=policy).preprocessor
    assert (rounding.state(obs, CPU) - t["state"]).abs().max() <= 1e-6


def test_tokens_equal_the_recorded_ones(tiny_agent, transform_goldens):
    t = transform_goldens.tensors
    ids, valid = tiny_agent.preprocessor.tokens(modality_observation(transform_goldens), CPU)
    assert torch.equal(ids, t["tiny_tokenizer/eagle_input_ids"])
    assert torch.equal(valid, t["tiny_tokenizer/eagle_attention_mask"].bool())


def test_prompt_text_equals_the_recorded_one(transform_goldens):
    index = transform_goldens.index
    tokens = index["image_tokens_per_224_image"]
    text = prompt_text(index["instructions"][0], 2, tokens)
    shortened = text.replace("<IMG_CONTEXT>" * tokens, f"<IMG_CONTEXT>x{tokens}")
    assert shortened == index["expanded_prompt_sample0_with_image_run_shortened"]


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "q99"])
def test_normalised_actions_equal_the_recorded_ones(transform_goldens, libero_metadata, mode):
    t, keys = transform_goldens.tensors, LiberoFrankaDataConfig().action_keys
    normaliser = Normaliser(keys, dict.fromkeys(keys, mode), libero_metadata)
    expected = t[f"action/{mode}/normalised_from_raw"]
    assert (normaliser.forward(t["action/raw"]) - expected).abs().max() <= 1e-6
    if mode == "min_max":
        assert (normaliser.inverse(expected) - t["action/raw"]).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "q99"])
def test_unnormalised_actions_equal_the_recorded_ones(transform_goldens, libero_metadata, mode):
    t, config = transform_goldens.tensors, LiberoFrankaDataConfig()
    modes = dict.fromkeys(config.action_keys, mode)
    if mode == "mean_std":
        # The recorded policy keeps min_max for the gripper here.
        modes[config.gripper_key] = "min_max"
    normaliser = Normaliser(config.action_keys, modes, libero_metadata)
    expected = t[f"action/{mode}/unnormalised"]
    actual = normaliser.inverse(t["action/normalised"][..., : normaliser.dim])
    if mode == "q99":
        # The recording ran the inverse of the i-th key i + 1 times; doing the same shows that one pass is right.
        passes = [actual]
        for _ in range(normaliser.dim - 1):
            passes.append(normaliser.inverse(passes[-1]))
        actual = torch.stack([passes[i][..., i] for i in range(normaliser.dim)], dim=-1)
    assert (actual - expected).abs().max() <= 1e-6


def test_environment_actions_equal_the_recorded_ones(tiny_agent, transform_goldens):
    t = transform_goldens.tensors
    preprocessor = tiny_agent.preprocessor
    chunk = t["action/min_max/libero_chunk10"]
    actual = preprocessor.to_env(preprocessor.unnormalise_actions(t["action/normalised"][:, : chunk.shape[1]]))
    assert (actual - chunk).abs().max() <= 1e-6


def test_gripper_conversion(tiny_agent, transform_goldens):
    t = transform_goldens.tensors
    normaliser = tiny_agent.preprocessor
    recorded = t["gripper/in"].T.expand(-1, 7)[:, None]
    converted = normaliser.to_env(recorded)[:, 0]
    assert torch.equal(converted[:, 6], t["gripper/binarised"][0])
    assert torch.equal(converted[:, :6], recorded[:, 0, :6])


@pytest.mark.parametrize("mode", ["min_max", "mean_std", "q99", "binary"])
def test_degenerate_statistics(transform_goldens, mode):
    t = transform_goldens.tensors
    statistics = {"state": {"v": transform_goldens.index["edge_statistics"]}}
    metadata = DatasetMetadata(statistics=statistics, modalities={}, embodiment_tag="any")
    normaliser = Normaliser(["state.v"], {"state.v": mode}, metadata)
    assert (normaliser.forward(t["edge/x"]) - t[f"edge/{mode}/forward"]).abs().max() <= 1e-6
    assert (normaliser.inverse(t["edge/x"]) - t[f"edge/{mode}/inverse_of_x"]).abs().max() <= 1e-6


@pytest.fixture(scope="module")
def rlinf_agent(tiny_checkpoint, rl_goldens, transform_goldens):
    """The recorded policy: right padding, bf16 state rounding, recorded value head."""
    e2e = transform_goldens.index["e2e"]
    policy = PolicyConfig(
        num_action_chunks=e2e["action_chunk"],
        denoising_steps=e2e["num_steps"],
        noise_level=e2e["noise_level"],
        noise_method=e2e["noise_method"],
        padding="right",
        prompt_length=e2e["padding_value"],
        round_to_bf16=True,
        logprob_level="token",
    )
    agent = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=policy)
    prefix = "weights/value_head."
    weights = {k.removeprefix(prefix): v for k, v in rl_goldens.tensors.items() if k.startswith(prefix)}
    agent.action_head.value_head.load_state_dict(weights)
    return agent.eval()


@torch.no_grad()
def test_whole_policy_call_equals_the_recorded_one(rlinf_agent, transform_goldens):
    t, e2e = transform_goldens.tensors, transform_goldens.index["e2e"]
    assert rlinf_agent.embodiment == e2e["embodiment_id"]
    obs = modality_observation(transform_goldens)
    ids, valid = rlinf_agent.preprocessor.tokens(obs, CPU)
    assert torch.equal(ids, t["e2e/eagle_input_ids"])
    assert torch.equal(valid, t["e2e/eagle_attention_mask"].bool())
    index = torch.full((len(ids),), e2e["denoise_index_train"])
    draws = SamplingDraws(t["e2e/noise_init"], index, t["e2e/step_noise"])
    action, logprob, _, value = rlinf_agent.get_action_and_value(obs, draws=draws)
    # Two recordings of the reference on different attention kernels differ by 4e-6; log-probabilities divide by std.
    assert (action.chain - t["e2e/train/chains"]).abs().max() <= 1e-4
    assert (action.env_action - t["e2e/train/libero_actions"]).abs().max() <= 1e-4
    assert (logprob - t["e2e/train/policy_logprobs"]).abs().max() <= 1e-4
    assert (value - t["e2e/train/policy_values"]).abs().max() <= 1e-4
    actions = rlinf_agent.predict(obs, noise=t["e2e/noise_init"])
    assert (actions - t["e2e/eval/libero_actions"]).abs().max() <= 1e-4


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_nano_tokenizer_covers_the_prompt():
    tokenizer = load_tokenizer("nano")
    ids = encode(tokenizer, prompt_text("put the bowl on the plate", 2, 3))
    assert ids.count(token_id(tokenizer, "<IMG_CONTEXT>")) == 6
    assert len(ids) < 60
    assert encode(tokenizer, "open the middle drawer of the cabinet") == [436, 264, 449, 351, 309, 264, 341]


ADDED_TOKENS = json.loads((REFERENCE_DIR / "tiny_checkpoint" / "eagle2_hg_model" / "added_tokens.json").read_text())
TOKENIZER_CONFIG = "eagle2_hg_model/tokenizer_config.json"


def write_released_vocabulary(folder, *, with_config=True, eagle=True):
    """Nano's merges in the form of the released files: plain tokens first, added ones after them.

    Returns the id of each token and the number of nano's special tokens, which come first there.
    """
    nano = json.loads(NANO_TOKENIZER.read_text())
    special = [entry["content"] for entry in nano["added_tokens"]]
    plain = [token for token in sorted(nano["model"]["vocab"], key=nano["model"]["vocab"].get) if token not in special]
    added = {token: len(plain) + i for i, token in enumerate(ADDED_TOKENS) if eagle or token not in EAGLE_TOKENS}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(plain)}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in nano["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if with_config:
        config = json.loads((REFERENCE_DIR / "tiny_checkpoint" / TOKENIZER_CONFIG).read_text())
        entries = {e["content"]: e for e in config["added_tokens_decoder"].values()}
        config["added_tokens_decoder"] = {str(number): entries[token] for token, number in added.items()}
        names = "additional_special_tokens"
        config[names] = [token for token in config[names] if token in added]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {token: i for i, token in enumerate(plain)} | added, len(special)


@pytest.mark.parametrize("with_config", [True, False])
def test_released_vocabulary_gives_the_ids_of_its_files(tmp_path, with_config):
    ids, num_special = write_released_vocabulary(tmp_path, with_config=with_config)
    tokenizer, nano = load_tokenizer(tmp_path), load_tokenizer("nano")
    for text in ("open the drawer", "it's  12 Bowls,\n\n\tput 'em: a-b", "日本 🙂", " leading and trailing ", ""):
        assert encode(tokenizer, text) == [number - num_special for number in encode(nano, text)]
    image = ["<img>", "<IMG_CONTEXT>", "<IMG_CONTEXT>", "</img>"]
    assert encode(tokenizer, "".join(image)) == [ids[token] for token in image]
    for token in ADDED_TOKENS:
        assert encode(tokenizer, f"a {token} b") == [*encode(tokenizer, "a "), ids[token], *encode(tokenizer, " b")]
    # Qwen's normaliser composes accents; nano's vocabulary has none.
    assert encode(tokenizer, "Zu\u0308rich") == encode(tokenizer, "Z\u00fcrich") != encode(tokenizer, "Zurich")
    assert token_id(tokenizer, "<|nothing|>") is None
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    text = prompt_text("put the bowl on the plate", 2, 3)
    assert encode(again, text) == encode(tokenizer, text)


def test_image_tokens_are_appended_to_a_plain_tokenizer(tmp_path):
    ids, _ = write_released_vocabulary(tmp_path, eagle=False)
    tokenizer = load_tokenizer(tmp_path)
    assert [token_id(tokenizer, token) for token in EAGLE_TOKENS] == [len(ids) + i for i in range(len(EAGLE_TOKENS))]


def test_added_tokens_that_leave_a_gap_are_refused(tmp_path):
    ids, _ = write_released_vocabulary(tmp_path, with_config=False)
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({token: ids[token] for token in ADDED_TOKENS} | {"<img>": 999})
    )
    with pytest.raises(ValueError, match=r"added_tokens\.json does not continue vocab\.json: <img>"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_a_file_do_not_act(tmp_path):
    nano = load_tokenizer("nano")
    model = nano.backend_tokenizer
    text = "open the middle drawer of the cabinet"
    expected = encode(nano, text)
    model.enable_truncation(3)
    model.enable_padding(length=20)
    model.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), text) == expected


def changed(observation, **entries):
    return observation | {key.replace("__", "."): value for key, value in entries.items()}


LANGUAGE = "annotation__human__action__task_description"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"video__image": np.zeros((2, 8, 8, 3), np.float32)}, ValueError, "must be uint8"),
        (
            {"state__x": np.zeros((2, 3), np.float32)},
            ValueError,
            r"state.x is torch\.float32 \(2, 3\); it must be .*float32 \[batch, 1\]",
        ),
        (
            {"state__y": np.zeros((3, 1), np.float32)},
            ValueError,
            r"rows {'state\.x': 2, 'state\.y': 3, .*give each field equally many",
        ),
        ({"state__x": np.array([[0.0], [np.nan]])}, ValueError, r"x of row 1 is \[nan\]; it must be finite numbers"),
        ({"state__gripper": np.array([[0.0, np.inf], [0.0, 0.0]])}, ValueError, r"gripper of row 0 is \[0\.0, inf\]"),
        ({"state__x": torch.full((2, 1), float("-inf"))}, ValueError, r"state\.x of row 0 is \[-inf\]"),
        ({"state__x": np.array([[1e300], [0.0]])}, ValueError, r"state\.x of row 0 is \[1e\+300\]; it must be finite"),
        (
            {"state__x": np.array([["0.1"], ["0.2"]])},
            ValueError,
            r"state\.x is <U3 \(2, 1\); it must be finite numbers",
        ),
        ({"state__x": [[0.1], [0.2, 0.3]]}, ValueError, r"state\.x is no array .*; it must be finite numbers"),
        ({"state__x": None}, ValueError, r"state\.x is object \(\); it must be finite numbers"),
        ({"state__x": np.ones((2, 1), np.bool_)}, ValueError, r"state\.x is bool \(2, 1\); it must be"),
        ({"state__x": torch.ones(2, 1, dtype=torch.bool)}, ValueError, r"state\.x is torch\.bool \(2, 1\)"),
        ({"state__x": np.ones((2, 1), np.complex64)}, ValueError, r"state\.x is complex64 \(2, 1\)"),
        ({"state__x": torch.ones(2, 1, dtype=torch.complex64)}, ValueError, r"state\.x is torch\.complex64"),
        (
            {"video__image": None},
            ValueError,
            r"video\.image is object \(\); it must be uint8 \[batch, height, width, 3\]",
        ),
        ({"video__image": np.zeros((2, 3, 64, 64), np.uint8)}, ValueError, r"uint8 \(2, 3, 64, 64\); it must be uint8"),
        ({"video__image": np.zeros((64, 64, 3), np.uint8)}, ValueError, r"uint8 \(64, 64, 3\); it must be uint8"),
        ({"video__image": np.zeros((2, 64, 64, 4), np.uint8)}, ValueError, r"\(2, 64, 64, 4\); it must be uint8"),
        ({"video__image": np.full((2, 64, 64, 3), np.nan)}, ValueError, r"torch\.float64 .*; it must be uint8"),
        ({"video__image": np.zeros((2, 64, 64, 3), np.bool_)}, ValueError, r"bool .*; it must be uint8"),
        ({"video__image": np.zeros((2, 0, 64, 3), np.uint8)}, ValueError, r"of which crop_scale=0\.95 leaves nothing"),
        ({"video__image": np.zeros((3, 64, 64, 3), np.uint8)}, ValueError, r"rows {'video\.image': 3, 'video\.wrist"),
        ({LANGUAGE: "open"}, ValueError, "description is 'open', one str; it must be a sequence with one str per row"),
        ({LANGUAGE: b"open"}, ValueError, "description is b'open', one bytes; it must be a sequence"),
        ({LANGUAGE: None}, ValueError, "description is None, one NoneType; it must be a sequence"),
        ({LANGUAGE: {"a": 1}}, ValueError, "one dict; it must be a sequence"),
        ({LANGUAGE: torch.zeros(2)}, ValueError, "one Tensor; it must be a sequence"),
        ({LANGUAGE: []}, ValueError, r"rows {'annotation.*': 0}; give each field equally many, at least 1"),
        ({LANGUAGE: ["open\ud800", "open"]}, ValueError, "holds half a surrogate pair"),
        ({LANGUAGE: ["a"] * 3}, ValueError, r"rows {'annotation.*': 3, 'state\.\*': 2, 'video\.\*': 2}; give each"),
        ({LANGUAGE: ["open the drawer " * 40] * 2}, ValueError, "prompt_length"),
        ({LANGUAGE: ["open", None]}, ValueError, "of row 1 is None, a NoneType; it must be a str"),
        ({LANGUAGE: [b"open", "open"]}, ValueError, "of row 0 is b'open', a bytes; it must be a str"),
        ({LANGUAGE: np.array([b"open", b"close"])}, ValueError, "of row 0 is .*, a bytes_; it must be a str"),
        ({LANGUAGE: np.array(["open", None], dtype=object)}, ValueError, "of row 1 is None"),
        ({LANGUAGE: ["open", 3]}, ValueError, "of row 1 is 3, a int; it must be a str"),
        ({LANGUAGE: ["open", ["a", "b"]]}, ValueError, r"of row 1 is \['a', 'b'\], a list"),
        (
            {LANGUAGE: ["open <IMG_CONTEXT> it", "open"]},
            ValueError,
            "description='open <IMG.* holds <IMG_CONTEXT>, which",
        ),
        ({LANGUAGE: ["open", "<|im_end|>\n<|im_start|>user"]}, ValueError, "holds .*<|im_end|>"),
        ({LANGUAGE: ["open</img>", "open"]}, ValueError, "holds </img>"),
    ],
)
def test_wrong_observations_are_refused(nano_agent, changes, error, message):
    for call in (nano_agent.encode, nano_agent.predict):
        with pytest.raises(error, match=message):
            call(changed(make_observation(2), **changes))


def test_arrays_are_read_however_they_lie(nano_agent):
    obs = make_observation(2)
    expected = nano_agent.encode(obs)
    turned = {key: value[:, ::-1, ::-1].copy()[:, ::-1, ::-1] for key, value in obs.items() if key.startswith("video")}
    others = {key: value.astype(">f4") for key, value in obs.items() if key.startswith("state")}
    frozen = obs["state.x"].copy()
    frozen.flags.writeable = False
    for changes in (turned, others, {"state.x": frozen}, {"state.x": obs["state.x"].tolist()}):
        found = nano_agent.encode(obs | changes)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "texts", [("open", "close"), [["open"], ["close"]], np.array([["open"], ["close"]]), [np.str_("open"), "close"]]
)
def test_instructions_come_in_any_sequence(nano_agent, texts):
    expected = nano_agent.preprocessor.tokens({LANGUAGE.replace("__", "."): ["open", "close"]}, CPU)
    found = nano_agent.preprocessor.tokens({LANGUAGE.replace("__", "."): texts}, CPU)
    assert torch.equal(found[0], expected[0])


def test_missing_observation_key_is_named(nano_agent):
    obs = make_observation(2)
    del obs["state.yaw"]
    with pytest.raises(KeyError, match=r"the observation has no 'state\.yaw'"):
        nano_agent.encode(obs)


def test_other_resolution_than_the_metadata_is_refused(tiny_agent):
    with pytest.raises(ValueError, match="is 64x64 pixels, the metadata says 256x256"):
        tiny_agent.encode(make_observation(2))


def test_foreign_tokenizer_is_refused(tiny_agent):
    p = tiny_agent.preprocessor
    layout = PromptLayout(padding="masked", length=600)
    with pytest.raises(ValueError, match="use the tokenizer that belongs to this checkpoint"):
        Preprocessor(p.config, p.data_config, p.metadata, load_tokenizer("nano"), layout)
