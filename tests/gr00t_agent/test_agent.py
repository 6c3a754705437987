"""Gr00tAgent as a trainer uses it."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from gr00t_agent import FlowAction, Gr00tAgent, PolicyConfig, SamplingDraws, preset_policy
from gr00t_agent.action_head import ActionHead
from gr00t_agent.backbone import Backbone
from gr00t_agent.config import ModelConfig
from gr00t_agent.weights import released_name
from tests.gr00t_agent.conftest import REFERENCE_DIR, make_observation, noise_of

NANO = preset_policy("nano")


def build(**changes) -> Gr00tAgent:
    torch.manual_seed(0)
    return Gr00tAgent.from_preset("nano", policy=replace(NANO, **changes))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(action: FlowAction, index) -> FlowAction:
    return FlowAction(*(field[index] for field in action))


def test_shapes_and_types(nano_agent):
    with torch.no_grad():
        action, logprob, entropy, value = nano_agent.get_action_and_value(make_observation(3), generator=seeded())
    head, policy = nano_agent.config.action_head, nano_agent.policy
    steps = policy.denoising_steps
    assert action.chain.shape == (3, steps + 1, head.action_horizon, head.action_dim)
    assert action.denoise_index.shape == (3,)
    assert action.denoise_index.dtype == torch.int64
    assert action.env_action.shape == (3, policy.num_action_chunks, 7)
    assert set(action.env_action[..., 6].flatten().tolist()) <= {-1.0, 1.0}
    for tensor in (logprob, entropy, value):
        assert tensor.shape == (3,)
        assert tensor.dtype == torch.float32
    assert nano_agent.predict(make_observation(3), generator=seeded()).shape == action.env_action.shape


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps", "reinflow", "reinflow_joint"])
@pytest.mark.parametrize("joint", [False, True])
def test_reevaluation_is_bitwise_the_rollout(method, joint):
    agent = build(noise_method=method, joint_logprob=joint).train()
    obs = make_observation(4)
    with torch.no_grad():
        action, old, entropy, value = agent.get_action_and_value(obs, generator=seeded())
    same, new, new_entropy, new_value = agent.get_action_and_value(obs, action)
    assert same is action
    assert torch.equal(new, old)
    assert torch.equal(new_entropy, entropy)
    assert torch.equal(new_value, value)
    assert torch.equal(agent.get_value(obs), value)
    new.sum().backward()
    assert agent.action_head.action_decoder.layer2.W.grad.abs().max() > 0


def test_reevaluation_depends_on_the_weights():
    agent = build()
    obs = make_observation(2)
    with torch.no_grad():
        action, old, _, _ = agent.get_action_and_value(obs, generator=seeded())
        agent.action_head.action_decoder.layer2.b += 0.01
        assert not torch.equal(agent.get_action_and_value(obs, action)[1], old)


def test_encoded_observation_gives_the_same_results():
    agent = build()
    obs = make_observation(4)
    for frozen in (False, True):
        agent.set_trainable(tune_visual=not frozen, tune_llm=not frozen)
        encoded = agent.encode(obs)
        assert ("backbone_features" in encoded) == frozen
        assert not any(tensor.requires_grad for tensor in encoded.values())
        with torch.no_grad():
            action, logprob, _, value = agent.get_action_and_value(obs, generator=seeded())
            again = agent.get_action_and_value(encoded, action)
        assert torch.equal(again[1], logprob)
        assert torch.equal(again[3], value)
        assert torch.equal(agent.get_value(encoded), agent.get_value(obs))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_frozen_vl_self_attention_is_computed_once_and_gives_the_same_results(compute_dtype):
    agent = build(compute_dtype=compute_dtype)
    obs = make_observation(4)
    agent.set_trainable(tune_visual=False, tune_llm=False)
    with torch.no_grad():
        action, logprob, _, value = agent.get_action_and_value(obs, generator=seeded())

    agent.set_trainable(tune_visual=False, tune_llm=False, tune_vl_self_attention=False)
    agent.train()
    head = agent.action_head
    assert not head.vl_self_attention.training
    encoded = agent.encode(obs)
    assert set(encoded) == {"state", "valid_mask", "vl_embs"}
    assert encoded["vl_embs"].dtype == agent.policy.torch_dtype
    head.vlln.register_forward_hook(lambda *_: pytest.fail("computed again"))
    with torch.no_grad():
        again = agent.get_action_and_value(encoded, action)
        state_value = agent.get_value(encoded)
    exact = compute_dtype == "float32"
    for found, expected in ((again[1], logprob), (again[3], value), (state_value, value)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if exact else 0.05)

    agent.get_action_and_value(encoded, action)[1].sum().backward()
    frozen = {name for name, p in head.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in frozen} == {"vlln", "vl_self_attention", "value_head"}
    agent.set_trainable(tune_visual=False, tune_llm=False)
    with pytest.raises(ValueError, match="cached vl_embs, but what computes them is trained; encode it again"):
        agent.get_action_and_value(encoded, action)


def test_encodings_of_different_prompts_can_be_concatenated(nano_agent):
    first, second = make_observation(2), make_observation(2, seed=1)
    second["annotation.human.action.task_description"] = ["close it"] * 2
    encoded = [nano_agent.encode(obs) for obs in (first, second)]
    joined = {key: torch.cat([e[key] for e in encoded]) for key in encoded[0]}
    values = torch.cat([nano_agent.get_value(e) for e in encoded])
    assert torch.allclose(nano_agent.get_value(joined), values, atol=1e-5)


def test_results_do_not_depend_on_batch_mates(nano_agent):
    obs = make_observation(4)
    with torch.no_grad():
        action, logprob, _, value = nano_agent.get_action_and_value(obs, generator=seeded())
    for row in range(4):
        alone = {key: entry[row : row + 1] for key, entry in obs.items()}
        again = nano_agent.get_action_and_value(alone, rows(action, slice(row, row + 1)))
        # Only the order of additions inside the kernels differs.
        assert torch.allclose(again[1], logprob[row], atol=2e-4)
        assert torch.allclose(again[3], value[row], atol=1e-5)


def test_masked_padding_equals_the_reference_for_one_sample(tiny_agent, tiny_checkpoint):
    obs = make_observation(1, image_size=256)
    masked = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=PolicyConfig(padding="masked")).eval()
    noise = noise_of(tiny_agent, 1)
    assert torch.allclose(masked.predict_chunk(obs, noise=noise), tiny_agent.predict_chunk(obs, noise=noise), atol=1e-5)


def test_left_padding_depends_on_batch_mates_as_in_the_reference(tiny_agent):
    obs = make_observation(2, image_size=256)
    noise = noise_of(tiny_agent, 2)
    both = tiny_agent.predict_chunk(obs, noise=noise)[:1]
    alone = tiny_agent.predict_chunk({k: v[:1] for k, v in obs.items()}, noise=noise[:1])
    assert (both - alone).abs().max() > 1e-3


def test_logprob_levels_are_sums_of_each_other():
    levels = {}
    for level in ("chunk", "action", "token"):
        agent = build(logprob_level=level).eval()
        with torch.no_grad():
            levels[level] = agent.get_action_and_value(make_observation(2), generator=seeded())[1:3]
    for k in range(2):
        token = levels["token"][k]
        assert token.shape == (2, 5, 7)
        assert torch.allclose(levels["action"][k], token.sum(dim=-1))
        assert torch.allclose(levels["chunk"][k], token.sum(dim=(-2, -1)), atol=1e-5)


def test_entropy_of_flow_sde_by_hand():
    agent = build()
    index = torch.tensor([2, 0])
    draws = SamplingDraws(denoise_index=index)
    _, _, entropy, _ = agent.get_action_and_value(make_observation(2), draws=draws, generator=seeded())
    std = torch.tensor([0.25, 0.5])
    expected = 35 * (0.5 * torch.log(2 * torch.pi * torch.e * std**2))
    assert torch.allclose(entropy, expected, atol=1e-4)


def test_joint_reduction():
    results = {}
    for reduction in ("sum", "mean"):
        agent = build(joint_logprob=True, joint_reduction=reduction).eval()
        with torch.no_grad():
            results[reduction] = agent.get_action_and_value(make_observation(2), generator=seeded())[1]
    entries = NANO.denoising_steps + 1
    assert torch.allclose(results["sum"] / entries, results["mean"], atol=1e-4)


def test_critic_detach():
    obs = make_observation(2)
    for detach in (True, False):
        agent = build(critic_detach=detach)
        agent.get_value(obs).sum().backward()
        reached = [n for n, p in agent.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
        outside = [name for name in reached if not name.startswith("action_head.value_head.")]
        assert reached
        assert bool(outside) != detach


@pytest.mark.parametrize("inputs", ["vl_and_state", "vl"])
def test_value_inputs(inputs):
    agent = build(value_inputs=inputs).eval()
    obs = make_observation(2)
    other = obs | {"state.x": obs["state.x"] + 0.3}
    changed = not torch.equal(agent.get_value(obs), agent.get_value(other))
    assert changed == (inputs == "vl_and_state")


@pytest.mark.parametrize("inputs", ["vl_and_state", "vl"])
def test_value_features_are_what_the_value_head_sees(inputs):
    agent, obs = build(value_inputs=inputs).eval(), make_observation(3)
    features = agent.value_features(obs)
    assert features.shape == (3, agent.value_feature_dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.equal(agent.action_head.value_head(features), agent.get_value(obs))
    assert torch.equal(agent.value_features(agent.encode(obs)), features)
    headless = build(value_inputs=inputs, value_head=False).eval()
    assert headless.value_features(obs).shape == features.shape


def test_the_noise_that_decides_a_chunk_has_the_shape_that_is_told(nano_agent):
    obs, (num_steps, padded_dim) = make_observation(2), nano_agent.noise_shape
    noise = torch.randn((2, num_steps, padded_dim), generator=seeded())
    first = nano_agent.predict_chunk(obs, noise=noise)
    assert first.shape == noise.shape
    assert torch.equal(nano_agent.predict_chunk(obs, noise=noise), first)
    assert nano_agent.action_dim == nano_agent.predict(obs, noise=noise).shape[-1] == 7
    noise[1, :, : nano_agent.action_dim] += 1
    moved = (nano_agent.predict_chunk(obs, noise=noise) - first).abs().amax((1, 2))
    assert moved[0] == 0
    assert moved[1] > 0.01


def test_gradients_reach_the_backbone_when_it_is_trained():
    agent = build()
    obs = make_observation(2)
    with torch.no_grad():
        action = agent.get_action_and_value(obs, generator=seeded())[0]
    agent.get_action_and_value(obs, action)[1].sum().backward()
    unused = {f"backbone.{name}" for name in agent.backbone.unused_parameter_names()}
    without = {
        name
        for name, p in agent.named_parameters()
        if name not in unused and (p.grad is None or p.grad.abs().max() == 0)
    }
    # Key biases cancel in a softmax; the value head is not in this loss.
    assert {n for n in without if not n.endswith("to_k.bias") and "value_head" not in n} == set()
    assert all(agent.get_parameter(name).grad is None for name in unused)


def test_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode():
    agent = build()
    agent.set_trainable(tune_visual=False, tune_llm=False)
    agent.train()
    assert not agent.backbone.eagle_model.vision_model.training
    assert not agent.backbone.eagle_model.language_model.training
    assert agent.action_head.model.training
    obs = make_observation(2)
    agent.sft_loss(obs, torch.zeros(2, 16, 7)).backward()
    assert all(p.grad is None for p in agent.backbone.parameters())
    assert agent.backbone_parameters() == []
    groups = agent.param_groups(1e-5, 1e-4)
    assert [group["lr"] for group in groups] == [1e-5, 1e-4]
    trained = [p for p in agent.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_cached_features_are_refused_while_the_backbone_is_trained():
    agent = build()
    agent.set_trainable(tune_visual=False, tune_llm=False)
    encoded = agent.encode(make_observation(2))
    agent.set_trainable(tune_visual=True, tune_llm=False)
    with pytest.raises(ValueError, match="encode it again"):
        agent.get_value(encoded)


def test_trainable_counts_of_the_released_size():
    reference = json.loads((REFERENCE_DIR / "state_dict_shapes.json").read_text())
    config = ModelConfig.preset("gr00t_n1d5")
    agent = Gr00tAgent.__new__(Gr00tAgent)
    nn.Module.__init__(agent)
    with torch.device("meta"):
        agent.backbone, agent.action_head = Backbone(config), ActionHead(config.action_head)
    agent.trainable = {}

    def count(module):
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    for title, expected in reference["trainable_parameter_counts_by_flags"].items():
        part, *flags = title.split()
        given = {name: value == "True" for name, value in (flag.split("=") for flag in flags)}
        agent.set_trainable(**({"tune_visual": False, "tune_llm": False} | given))
        assert count(getattr(agent, part)) == expected, title


def test_dropout_never_touches_log_probabilities(tiny_checkpoint):
    policy = PolicyConfig(disable_dropout=False)
    agent = Gr00tAgent.from_pretrained(tiny_checkpoint, policy=policy).train()
    assert any(isinstance(m, nn.Dropout) and m.p == 0.2 for m in agent.modules())
    obs = make_observation(1, image_size=256)
    with torch.no_grad():
        action, old, _, value = agent.get_action_and_value(obs, generator=seeded())
        _, new, _, new_value = agent.get_action_and_value(obs, action)
        assert torch.equal(new, old)
        assert torch.equal(new_value, value)
        actions = torch.zeros(1, agent.config.action_head.action_horizon, agent.preprocessor.action_dim)
        draws = (noise_of(agent, 1), torch.full((1,), 0.5))
        losses = {agent.sft_loss(obs, actions, draws=draws).item() for _ in range(3)}
        assert len(losses) == 3
    off = Gr00tAgent.from_pretrained(tiny_checkpoint).train()
    with torch.no_grad():
        losses = {off.sft_loss(obs, actions, draws=draws).item() for _ in range(3)}
    assert len(losses) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_bf16_network_keeps_the_sampling_in_float32(whole):
    """`whole`: bf16 weights; otherwise float32 weights and bf16 arithmetic."""
    torch.manual_seed(0)
    policy = replace(NANO, compute_dtype="bfloat16")
    dtype = torch.bfloat16 if whole else torch.float32
    agent = Gr00tAgent.from_preset("nano", policy=policy, dtype=dtype)
    obs = make_observation(4)
    with torch.no_grad():
        action, old, _, value = agent.get_action_and_value(obs, generator=seeded())
    _, new, entropy, _ = agent.get_action_and_value(obs, action)
    assert {t.dtype for t in (action.chain, old, entropy, value, action.env_action)} == {torch.float32}
    assert ((new - old).exp() - 1).abs().max() <= 1e-3
    reference = build().get_action_and_value(obs, generator=seeded())[0]
    assert (action.chain - reference.chain).abs().max() < 0.1


def test_noise_anneal_is_an_argument_of_both_directions():
    agent = build(noise_method="reinflow").eval()
    obs = make_observation(2)
    with torch.no_grad():
        action, old, entropy, _ = agent.get_action_and_value(obs, generator=seeded(), noise_anneal=0.0)
        assert torch.equal(agent.get_action_and_value(obs, action, noise_anneal=0.0)[1], old)
        assert not torch.equal(agent.get_action_and_value(obs, action)[1], old)
    low = 35 * torch.log(torch.tensor(0.08)) + 35 * 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e))
    assert torch.allclose(entropy, low.expand(2), atol=1e-3)


def test_shared_keys_and_values_equal_computing_them_at_every_step(nano_agent):
    head = nano_agent.action_head
    obs = make_observation(2)
    noise = torch.randn(2, 16, 8, generator=seeded())
    with torch.no_grad():
        context = nano_agent._context(obs)

        def recompute(x, step):
            fresh = context._replace(keys_values=head.model.cross_keys_values(context.vl_embs))
            return nano_agent._predict(fresh, x, step, 1.0)

        plain = nano_agent.sampler.denoise(recompute, noise)
    assert torch.equal(nano_agent.predict_chunk(obs, noise=noise), plain)


@pytest.mark.slow
# torch's own imports warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_network_agrees_with_the_plain_one():
    agent = build().eval()
    obs = make_observation(2)
    noise = torch.randn(2, 16, 8, generator=seeded())
    plain = agent.predict_chunk(obs, noise=noise)
    # Captures the graphs as inductor would, and needs no C++ compiler.
    agent.compile_network(backend="aot_eager")
    assert torch.allclose(agent.predict_chunk(obs, noise=noise), plain, atol=1e-4)
    agent.set_trainable(tune_visual=False, tune_llm=False, tune_vl_self_attention=False)
    assert torch.allclose(agent.predict_chunk(obs, noise=noise), plain, atol=1e-4)


def test_seeds_and_given_noise():
    agent = build().eval()
    obs = make_observation(2)
    with torch.no_grad():
        first, second, other = (agent.get_action_and_value(obs, generator=seeded(seed))[0].chain for seed in (1, 1, 2))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        noise = torch.randn(2, 16, 8, generator=seeded(3))
        assert torch.equal(agent.predict(obs, generator=seeded(3)), agent.predict(obs, noise=noise))


def test_a_generator_per_row_makes_rows_independent(nano_agent):
    obs = make_observation(3)
    both = nano_agent.predict_chunk(obs, generator=[seeded(i) for i in range(3)])
    last = nano_agent.predict_chunk({k: v[2:] for k, v in obs.items()}, generator=[seeded(2)])
    assert torch.allclose(both[2:], last, atol=1e-5)
    with pytest.raises(ValueError, match="2 generators were given for 3 rows"):
        nano_agent.predict(obs, generator=[seeded(0), seeded(1)])


def test_image_size_is_the_metadata_or_enough_for_the_crop(nano_agent, tiny_agent):
    assert tiny_agent.image_size == 256
    assert nano_agent.image_size == 128


def test_load_changes_settings(tmp_path):
    agent = Gr00tAgent.load("nano", num_action_chunks=3, noise_level=None, train_backbone=False)
    assert agent.policy == replace(NANO, num_action_chunks=3)
    assert agent.backbone_is_frozen
    agent.save_pretrained(tmp_path)
    again = Gr00tAgent.load(tmp_path, denoising_steps=2)
    assert again.policy == replace(agent.policy, denoising_steps=2)
    assert again.backbone_is_frozen
    assert not Gr00tAgent.load(tmp_path, train_backbone=True).backbone_is_frozen
    assert not again.context_is_frozen
    frozen = Gr00tAgent.load(tmp_path, train_backbone=False, train_vl_self_attention=False)
    assert frozen.context_is_frozen
    frozen.save_pretrained(tmp_path / "frozen")
    assert Gr00tAgent.from_pretrained(tmp_path / "frozen").context_is_frozen
    message = (
        r"keyword argument 'denoise_steps'; did you mean 'denoising_steps'\? "
        r"\(valid: train_backbone, train_vl_self_attention, num_action_chunks, denoising_steps, "
    )
    with pytest.raises(TypeError, match=message):
        Gr00tAgent.load(tmp_path, denoise_steps=3)
    with pytest.raises(TypeError, match=r"keyword argument 'film' \(valid: "):
        Gr00tAgent.load("nano", film=None)


def test_forward_dispatches():
    agent = build()
    obs = make_observation(2)
    action, logprob, _, _ = agent(obs, generator=seeded())
    assert torch.equal(agent(obs, action)[1], logprob)
    loss = agent(obs, sft_actions=torch.zeros(2, 16, 7), generator=seeded())
    assert torch.equal(loss, agent.sft_loss(obs, torch.zeros(2, 16, 7), generator=seeded()))


@pytest.mark.parametrize("given", [torch.zeros(1, 5, 7), (torch.zeros(1), torch.zeros(1), torch.zeros(1))])
def test_what_scores_an_action_takes_only_flow_actions(nano_agent, given):
    obs = nano_agent.encode(make_observation(1))
    draws = [noise_of(nano_agent, 1), torch.zeros(1, dtype=torch.long)]
    message = rf"the action is a {type(given).__name__}, .*; pass the FlowAction that was returned with it"
    for score in (nano_agent, nano_agent.get_action_and_value, lambda *args: nano_agent(*args, flow_draws=draws)):
        with pytest.raises(TypeError, match=message):
            score(obs, given)


def test_sft_masks():
    agent = build().eval()
    obs = make_observation(2)
    draws = (torch.zeros(2, 16, 8), torch.full((2,), 0.5))
    actions = torch.zeros(2, 16, 7)
    changed = actions.clone()
    changed[:, 8:] = 0.7
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 8:] = False

    def error(target, step_mask):
        # The velocity sees the masked steps as input; with tau = 0 it sees only noise.
        at_noise = (draws[0], torch.zeros(2))
        return agent.sft_loss(obs, target, step_mask=step_mask, draws=at_noise).item()

    assert error(actions, mask) == error(changed, mask)
    assert error(actions, None) != error(changed, None)


def test_overfits_two_samples():
    agent = build().train()
    obs, generator = make_observation(2), seeded()
    actions = torch.rand(2, 16, 7, generator=generator) * 2 - 1
    draws = (torch.randn(2, 16, 8, generator=generator), torch.tensor([0.2, 0.7]))
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = agent.sft_loss(obs, actions, draws=draws)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_works_under_ddp(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        agent = build()
        plain = copy.deepcopy(agent)
        wrapped = nn.parallel.DistributedDataParallel(agent)
        obs = make_observation(2)
        with torch.no_grad():
            action = agent.get_action_and_value(obs, generator=seeded())[0]
        for _ in range(2):  # unused parameters show in the second round
            _, logprob, _, value = wrapped(obs, action)
            (logprob.sum() + value.sum()).backward()
        for _ in range(2):
            _, logprob, _, value = plain(obs, action)
            (logprob.sum() + value.sum()).backward()
        for (name, p), q in zip(agent.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-4, rtol=1e-4), name
    finally:
        torch.distributed.destroy_process_group()


def test_nano_is_small():
    agent = build()
    assert sum(p.numel() for p in agent.parameters()) <= 15_000_000
    assert agent.config.image_size == 112
    assert agent.config.num_image_tokens == 64


def test_policy_without_value_head():
    agent = build(value_head=False)
    with pytest.raises(ValueError, match="value_head=True"):
        agent.get_value(make_observation(1))
    assert agent.predict(make_observation(1)).shape == (1, 5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": "centre"}, r"padding='centre' is unknown \(valid: masked, left, right\)"),
        ({"num_action_chunks": 17}, "num_action_chunks=17 is not in 1-16"),
        ({"embodiment_id": 5}, "embodiment_id=5 is not in 0-0"),
        ({"value_pooling": "last_token"}, "goes with padding='left' or 'right'"),
        ({"noise_std_range": (0.2, 0.1)}, "must be positive and ascending"),
        ({"num_action_chunks": 2.5}, "num_action_chunks=2.5 is not an int; give a whole number"),
        ({"denoising_steps": True}, "denoising_steps=True is not an int; give a whole number"),
        ({"prompt_length": 64.0}, "prompt_length=64.0 is not an int; give a whole number"),
        ({"value_head": "yes"}, "value_head='yes' is neither True nor False"),
        ({"critic_detach": 1}, "critic_detach=1 is neither True nor False"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_released_names_do_not_depend_on_the_transformers_version():
    new = "backbone.eagle_model.vision_model.encoder.layers.0.mlp.fc1.bias"
    old = "backbone.eagle_model.vision_model.vision_model.encoder.layers.0.mlp.fc1.bias"
    assert released_name(new) == released_name(old) == old


def test_flow_error_is_that_of_the_velocity_on_the_straight_line_to_what_was_decided(nano_agent):
    """Against a sum over scalars, for the velocity that the network gives at the point in question."""
    obs, policy = make_observation(3), nano_agent.policy
    with torch.no_grad():
        action = nano_agent.get_action_and_value(obs, generator=seeded())[0]
        noise, steps = torch.randn(action.chain[:, 0].shape, generator=seeded(1)), torch.tensor([0, 2, 3])
        *scored, error = nano_agent(obs, action, flow_draws=(noise, steps))
        for ours, alone in zip(scored[1:], nano_agent(obs, action)[1:], strict=True):
            assert torch.equal(ours, alone)
        assert error.shape == (3, policy.num_action_chunks, 7)
        for row, step in enumerate(steps.tolist()):
            part = step / policy.denoising_steps
            target = action.chain[row, -1]
            point = (1 - part) * noise[row] + part * target
            one = {name: value[row : row + 1] for name, value in obs.items()}
            # An Euler step of the sampler tells the velocity: it moves by velocity / N.
            context = nano_agent._context(one)
            velocity = nano_agent._predict(context, point[None], torch.tensor([step]), 1.0).velocity[0]
            for c, a in ((0, 0), (policy.num_action_chunks - 1, 6)):
                wanted = (velocity[c, a] - (target[c, a] - noise[row, c, a])).item() ** 2
                assert error[row, c, a].item() == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_imitation_reaches_the_policy_and_not_the_value_head(nano_agent):
    obs = make_observation(2)
    action = nano_agent.get_action_and_value(obs, generator=seeded())[0]
    draws = torch.randn_like(action.chain[:, 0]), torch.tensor([0, 1])
    nano_agent(obs, action, flow_draws=draws)[-1].sum().backward()
    assert all(p.grad is None for p in nano_agent.value_parameters())
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in nano_agent.policy_parameters())
    nano_agent.zero_grad()
