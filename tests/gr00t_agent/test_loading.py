"""Loading and saving: released format, strictness, round trips."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, PolicyConfig, read_metadata
from gr00t_agent.data_config import METADATA_PATH
from gr00t_agent.lerobot import resolve_dataset
from gr00t_agent.loading import resolve_checkpoint
from gr00t_agent.transforms import load_tokenizer
from gr00t_agent.weights import EMBEDDINGS, OUTPUT_LAYER, read_weights, released_name, write_weights
from tests.gr00t_agent.conftest import make_observation, noise_of

SOME_TENSOR = "action_head.vlln.weight"


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A copy of the recorded checkpoint to damage."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    return folder


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_loaded_values_are_those_of_the_file(tiny_agent, tiny_checkpoint):
    stored = load_file(tiny_checkpoint / "model.safetensors")
    loaded = {released_name(name): tensor for name, tensor in tiny_agent.state_dict().items()}
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor.float()), name


def test_load_save_load_is_bit_identical(tiny_checkpoint, tmp_path):
    first = Gr00tAgent.from_pretrained(tiny_checkpoint)
    first.save_pretrained(tmp_path / "saved")
    second = Gr00tAgent.from_pretrained(tmp_path / "saved")
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    stored = set(load_file(tiny_checkpoint / "model.safetensors"))
    saved = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert stored <= saved
    assert all(name.startswith("action_head.value_head.") for name in saved - stored)
    for file in ("config.json", "experiment_cfg/metadata.json", "eagle2_hg_model/config.json"):
        original, copy = (json.loads((folder / file).read_text()) for folder in (tiny_checkpoint, tmp_path / "saved"))
        assert copy == original, file


def test_the_note_of_what_it_was_trained_on_survives_saving(tiny_checkpoint, tmp_path):
    agent = Gr00tAgent.from_pretrained(tiny_checkpoint)
    assert agent.trained_on is None
    agent.save_pretrained(tmp_path / "without")
    assert "trained_on" not in json.loads((tmp_path / "without" / "policy_config.json").read_text())
    agent.trained_on = {"suite": "libero_goal", "seed": 3}
    agent.save_pretrained(tmp_path / "with")
    for load in (Gr00tAgent.from_pretrained, Gr00tAgent.load):
        assert load(tmp_path / "without").trained_on is None
        assert load(tmp_path / "with").trained_on == {"suite": "libero_goal", "seed": 3}


def test_settings_survive_saving(tmp_path):
    policy = PolicyConfig(num_action_chunks=3, noise_method="reinflow", embodiment_id=0, noise_std_range=(0.05, 0.2))
    agent = Gr00tAgent.from_preset("nano", policy=policy).eval()
    agent.set_trainable(tune_visual=False, tune_llm=True, tune_value=False)
    agent.save_pretrained(tmp_path)
    loaded = Gr00tAgent.from_pretrained(tmp_path).eval()
    assert loaded.policy == policy
    assert not loaded.training
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in agent.parameters()]
    obs = make_observation(2)
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    with torch.no_grad():
        first, second = (
            a.get_action_and_value(obs, generator=g) for a, g in zip((agent, loaded), generator, strict=True)
        )
    assert torch.equal(first[0].chain, second[0].chain)
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[3], second[3], rtol=0, atol=1e-6)  # other weights' alignment, other rounding


def test_statistics_of_another_tag_are_saved_under_the_policys(tiny_checkpoint, tmp_path):
    metadata = read_metadata(tiny_checkpoint / METADATA_PATH, "libero_franka")
    config = LiberoFrankaDataConfig(embodiment_tag="new_embodiment")
    Gr00tAgent.from_pretrained(tiny_checkpoint, data_config=config, metadata=metadata).save_pretrained(tmp_path)
    loaded = Gr00tAgent.from_pretrained(tmp_path)
    assert loaded.preprocessor.metadata.embodiment_tag == "new_embodiment"
    assert loaded.preprocessor.metadata.statistics == metadata.statistics


def test_shards(tiny_agent, tiny_checkpoint, copied):
    (copied / "model.safetensors").unlink()
    write_weights(tiny_agent, copied, max_shard_bytes=1_000_000)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = Gr00tAgent.from_pretrained(copied)
    for name, tensor in tiny_agent.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    shard = sorted(copied.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
        read_weights(copied)


@pytest.mark.parametrize("kept", ["embeddings", "output layer", "both"])
def test_tied_output_layer_in_any_form(copied, tiny_agent, kept):
    def change(tensors):
        if kept != "embeddings":
            tensors[OUTPUT_LAYER] = tensors[EMBEDDINGS].clone()
        if kept == "output layer":
            del tensors[EMBEDDINGS]

    edit(copied, change)
    loaded = Gr00tAgent.from_pretrained(copied)
    assert torch.equal(loaded.state_dict()[EMBEDDINGS], tiny_agent.state_dict()[EMBEDDINGS])


def test_untied_output_layer_is_refused(copied):
    edit(copied, lambda tensors: tensors.update({OUTPUT_LAYER: tensors[EMBEDDINGS] + 1}))
    with pytest.raises(ValueError, match="the two are tied"):
        Gr00tAgent.from_pretrained(copied)


def test_mixed_types_and_missing_compute_dtype_load(copied, tiny_agent):
    edit(copied, lambda tensors: tensors.update({SOME_TENSOR: tensors[SOME_TENSOR].float()}))
    config = json.loads((copied / "config.json").read_text())
    del config["compute_dtype"]
    (copied / "config.json").write_text(json.dumps(config))
    loaded = Gr00tAgent.from_pretrained(copied)
    assert torch.equal(loaded.state_dict()[SOME_TENSOR], tiny_agent.state_dict()[SOME_TENSOR])


def test_problems_are_all_listed(copied):
    def change(tensors):
        tensors["action_head.extra.weight"] = torch.zeros(2)
        tensors[SOME_TENSOR] = torch.zeros(3)
        del tensors["action_head.vlln.bias"]

    tensor = load_file(copied / "model.safetensors")[SOME_TENSOR]
    edit(copied, change)
    with pytest.raises(ValueError, match="does not fit the network") as caught:
        Gr00tAgent.from_pretrained(copied)
    text = str(caught.value)
    assert "unknown tensors (1):\n  action_head.extra.weight" in text
    assert "missing tensors (1):\n  action_head.vlln.bias" in text
    assert f"misshapen tensors (1):\n  {SOME_TENSOR}: file (3,), network {tuple(tensor.shape)}" in text


def test_absent_rl_modules_are_initialised_and_reported_once(tiny_checkpoint, caplog):
    with caplog.at_level(logging.WARNING, logger="gr00t_agent"):
        agent = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=PolicyConfig(noise_method="reinflow"))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the checkpoint has no value head; it is initialised at random",
        "the checkpoint has no exploration-noise net; it is initialised at random",
    ]
    for tensor in agent.state_dict().values():
        assert torch.isfinite(tensor).all()
    value = agent.get_value(make_observation(1, image_size=256))
    assert torch.isfinite(value).all()
    hidden = torch.zeros(1, 2, agent.config.action_head.hidden_size)
    low, high = agent.action_head.reinflow_explore_noise_net(hidden).aminmax()
    assert 0.08 <= low <= high <= 0.16


def test_partial_value_head_is_refused(copied):
    edit(copied, lambda tensors: tensors.update({"action_head.value_head.mlp.6.bias": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"missing tensors \(7\)"):
        Gr00tAgent.from_pretrained(copied)


def test_non_finite_weights_are_refused(copied):
    edit(copied, lambda tensors: tensors[SOME_TENSOR].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{SOME_TENSOR} is not finite"):
        Gr00tAgent.from_pretrained(copied)


def test_missing_files_are_named(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder and no hub name"):
        Gr00tAgent.from_pretrained(tmp_path / "nowhere")
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors \(present: .*config\.json"):
        Gr00tAgent.from_pretrained(copied)
    (copied / "experiment_cfg" / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.json does not exist"):
        Gr00tAgent.from_pretrained(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        Gr00tAgent.from_pretrained(copied)


def test_a_run_in_place_of_its_checkpoint_is_told_which_to_take(tmp_path):
    for name in ("iteration_9", "iteration_10", ".tmp-0-iteration_11", "best_12"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    newest = tmp_path / "checkpoints" / "iteration_10"
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            FileNotFoundError, match=rf"{folder} has no config\.json; checkpoints .* inside: take {newest}$"
        ):
            Gr00tAgent.load(folder)
    (tmp_path / "checkpoints" / "step_200").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoints of a run lie inside: take .*/step_200$"):
        Gr00tAgent.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "kind"),
    [("state_agent.json", "a small policy on the robot's state"), ("noise_actor.json", "a noise actor")],
)
def test_another_kind_of_policy_is_told_apart(tmp_path, file, kind):
    (tmp_path / file).write_text("{}")
    message = rf"has no config\.json; by its {file} it is {kind}.*, which cannot be loaded as a GR00T; .*eval_gr00t\.py"
    with pytest.raises(FileNotFoundError, match=message):
        Gr00tAgent.load(tmp_path)


@pytest.mark.parametrize("build", [Gr00tAgent.from_preset, Gr00tAgent.from_pretrained])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, r"device='gpu' cannot be used here \(.*\); give one of cpu"),
        ({"device": "cuda:99"}, r"device='cuda:99' cannot be used here \(.*\); give one of cpu"),
        ({"device": None}, r"device='None' cannot be used here"),
        (
            {"dtype": "bf16"},
            r"dtype='bf16' is no type of parameters \(valid: float32, bfloat16, float16, float64, as nam",
        ),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 is no type of parameters"),
        ({"dtype": None}, "dtype=None is no type of parameters"),
    ],
)
def test_devices_and_types_that_there_are_not_are_refused(tiny_checkpoint, build, options, message):
    with pytest.raises(ValueError, match=message):
        build("nano" if build == Gr00tAgent.from_preset else tiny_checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"device='cuda' cannot be used here .* give one of cpu: PyTorch finds no CUDA"
    ):
        Gr00tAgent.from_preset("nano", device="cuda")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_types_go_by_their_names_too(tiny_checkpoint, name):
    for agent in (Gr00tAgent.from_preset("nano", dtype=name), Gr00tAgent.from_pretrained(tiny_checkpoint, dtype=name)):
        assert {parameter.dtype for parameter in agent.parameters()} == {getattr(torch, name)}


def test_loading_in_bf16(tiny_checkpoint, tiny_agent):
    policy = PolicyConfig(compute_dtype="bfloat16", padding="left")
    agent = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=policy, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in agent.parameters()} == {torch.bfloat16}
    obs = make_observation(1, image_size=256)
    noise = noise_of(tiny_agent, 1)
    difference = agent.predict_chunk(obs, noise=noise) - tiny_agent.predict_chunk(obs, noise=noise)
    assert difference.abs().max() < 0.2


def test_what_the_hub_does_not_give_is_named_with_where_was_looked(monkeypatch):
    def refuse(name, **options):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for call in (resolve_checkpoint, resolve_dataset):
        with pytest.raises(FileNotFoundError, match=r"'checkpoints/misspelt' is no folder below .*\(offline\)"):
            call("checkpoints/misspelt")
    with pytest.raises(FileNotFoundError, match=r"tokenizer '\./misspelt' is no folder and no hub name"):
        load_tokenizer("./misspelt")
