"""The network against recorded outputs of the reference.

Two correct runs of the reference differ by 4e-6; the bound of 1e-4 leaves room for other CPUs' kernels.
"""

import json
import re

import pytest
import torch
from torch import Tensor, nn

from gr00t_agent.action_head import ActionHead, SplitAttention
from gr00t_agent.backbone import Backbone, flash_attention_mask
from gr00t_agent.config import ModelConfig, TransformerConfig
from gr00t_agent.weights import EMBEDDINGS, OUTPUT_LAYER, released_name
from tests.gr00t_agent.conftest import REFERENCE_DIR

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def inputs(forward_goldens):
    tensors = forward_goldens.tensors
    pixels = (tensors["eagle_pixel_values_u8"].float() - 128) / 128
    return pixels, tensors["eagle_input_ids"], tensors["eagle_attention_mask"].bool()


@pytest.fixture(scope="module")
def context(tiny_agent, forward_goldens, inputs):
    t = forward_goldens.tensors
    with torch.no_grad():
        features = tiny_agent.backbone(*inputs)
        return features, tiny_agent.action_head.prepare(features, None, t["state"], t["embodiment_id"])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max().item() <= tolerance


@torch.no_grad()
def test_vision_and_connector(tiny_agent, forward_goldens, inputs):
    t = forward_goldens.tensors
    assert_close(tiny_agent.backbone.vision_features(inputs[0]), t["vision_features"])
    expected = t["image_features_first2images"]
    features = tiny_agent.backbone.image_features(inputs[0][: len(expected)])
    assert_close(features, expected)
    assert_close(tiny_agent.backbone.embed_prompt(inputs[1][:1], features), t["inputs_embeds_sample0"])


def test_backbone_features_with_left_padding(forward_goldens, context):
    assert_close(context[0], forward_goldens.tensors["backbone_features"])


def test_vision_language_and_state_features(forward_goldens, context):
    assert_close(context[1].vl_embs, forward_goldens.tensors["vl_embs"])
    assert_close(context[1].state_features, forward_goldens.tensors["state_features"])


@pytest.mark.parametrize("name", ["0", "1"])
@torch.no_grad()
def test_velocity(tiny_agent, forward_goldens, context, name):
    t = forward_goldens.tensors
    found = re.search(r"timestep bucket (\d+)", forward_goldens.index["tensors"][f"vel{name}_velocity"]["meaning"])
    assert found is not None
    bucket = int(found[1])
    head = tiny_agent.action_head
    buckets = torch.full((len(t[f"vel_x{name}"]),), bucket)
    encoded = head.action_encoder(t[f"vel_x{name}"], buckets, t["embodiment_id"])
    assert_close(encoded, t[f"vel{name}_action_encoder_out"])
    assert_close(head.model.timestep_encoder(buckets, torch.float32), t[f"vel{name}_temb"])
    velocity, hidden = head.velocity(context[1], t[f"vel_x{name}"], buckets)
    assert_close(velocity, t[f"vel{name}_velocity"])
    assert_close(hidden, t[f"vel{name}_dit_out"][:, -hidden.shape[1] :])


@torch.no_grad()
def test_sampled_action(tiny_agent, forward_goldens, context):
    t = forward_goldens.tensors
    action = tiny_agent.sampler.denoise(lambda x, step: tiny_agent._predict(context[1], x, step, 1.0), t["noise_init"])
    assert_close(action, t[f"action_pred_{tiny_agent.policy.denoising_steps}steps"])


@torch.no_grad()
def test_training_loss(tiny_agent, forward_goldens, context):
    t = forward_goldens.tensors
    draws = (t["train_noise"], t["train_t"])
    loss = tiny_agent.flow_matching_loss(context[1], t["action"], t["action_mask"].float(), draws)
    assert_close(loss, t["train_loss"][0])


@torch.no_grad()
def test_attention_equals_diffusers_own_call():
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, num_attention_heads=4, attention_head_dim=8, dropout=0.0)
    x, source = torch.randn(3, 5, 32), torch.randn(3, 7, 24)
    mask = torch.rand(3, 1, 1, 7) > 0.3
    mask[..., 0] = True
    cross, own = SplitAttention(config, 24), SplitAttention(config, 32)
    for key_mask in (None, mask):
        expected = cross(x, encoder_hidden_states=source, attention_mask=key_mask)
        assert torch.equal(cross.attend(x, cross.keys_values(source), key_mask), expected)
    assert torch.equal(own.attend(x, own.keys_values(x), None), own(x))


@torch.no_grad()
def test_shared_embodiment_equals_gathered_weights(tiny_agent, forward_goldens):
    state, embodiment = forward_goldens.tensors["state"], tiny_agent.embodiment
    encoder = tiny_agent.action_head.state_encoder
    assert_close(encoder(state, embodiment), encoder(state, torch.full((len(state),), embodiment)), 1e-6)


@torch.no_grad()
def test_right_padding_has_flash_attention_semantics(tiny_agent, rl_goldens, forward_goldens, inputs):
    t = rl_goldens.tensors
    features = tiny_agent.backbone(inputs[0], t["eagle_input_ids"], t["eagle_attention_mask"].bool())
    assert_close(features[:1], t["backbone_features_sample0"])
    assert_close(tiny_agent.action_head.process_backbone(features, None), t["vl_embs"])


def test_mask_lets_valid_queries_see_valid_earlier_keys_only():
    mask = flash_attention_mask(torch.tensor([[False, True, True, False]]))[0, 0]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 1] = expected[2, 1] = expected[2, 2] = True
    assert torch.equal(mask, expected)


def test_full_size_names_and_shapes():
    reference = json.loads((REFERENCE_DIR / "state_dict_shapes.json").read_text())
    config = ModelConfig.preset("gr00t_n1d5")
    model = nn.Module()
    with torch.device("meta"):
        model.backbone = Backbone(config)
        model.action_head = ActionHead(config.action_head)
    shapes = {released_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes[OUTPUT_LAYER] = shapes[EMBEDDINGS]  # tied: the recorded module tree has both
    assert shapes == reference["shapes"]
    total = sum(p.numel() for p in model.parameters())
    assert total == reference["parameter_counts"]["total_unique_parameters"]


def test_full_size_rl_only_shapes():
    extra = json.loads((REFERENCE_DIR / "state_dict_shapes.json").read_text())["rl_only_extra_parameters"]
    config = ModelConfig.preset("gr00t_n1d5").action_head
    for title, expected in extra.items():
        width = expected.get("action_head.value_head.mlp.0.weight", [0, 0])[1]
        with torch.device("meta"):
            head = ActionHead(config, value_in_dim=width, noise_std_range=None if width else (0.08, 0.16))
        part = "value_head." if width else "reinflow_explore_noise_net."
        shapes = {f"action_head.{n}": list(t.shape) for n, t in head.state_dict().items() if n.startswith(part)}
        assert shapes == expected, title


def test_shipped_configuration_is_the_released_one():
    released = json.loads((REFERENCE_DIR / "real_config.json").read_text())
    eagle = json.loads((REFERENCE_DIR / "real_eagle_config.json").read_text())
    shipped = ModelConfig.preset("gr00t_n1d5")
    assert {key: released[key] for key in shipped.model_json} == shipped.model_json
    for key, value in shipped.eagle_json.items():
        expected = {k: eagle[key][k] for k in value} if isinstance(value, dict) else eagle[key]
        assert value == expected, key


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("action_head_cfg", "diffusion_model_cfg", "norm_type"), "layer_norm", "ada_norm"),
        (("action_head_cfg", "hidden_size"), 999, "must equal hidden_size=999"),
        (("action_head_cfg", "input_embedding_dim"), 999, "input_embedding_dim=999"),
        (("backbone_cfg", "select_layer"), 99, "is not in 1-"),
    ],
)
def test_inconsistent_configuration_is_refused(path, value, message):
    changed = ModelConfig.preset("gr00t_n1d5").model_json
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(changed)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset='mini' is unknown \(valid: nano, gr00t_n1d5\)"):
        ModelConfig.preset("mini")
