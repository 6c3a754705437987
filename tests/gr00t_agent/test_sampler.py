"""The sampler against recorded chains, and by hand-computed values."""

import math
import re

import pytest
import torch

from gr00t_agent.sampler import NOISE_METHODS, FlowSampler, Prediction, gaussian_entropy, gaussian_log_prob

METHODS = ("flow_sde", "flow_cps", "reinflow")
# float32 arithmetic over chains of a network; two correct codings of the formulas differ by 2e-6.
TOLERANCE = 1e-5


class RecordedPolicy:
    """The tiny network with the recorded RL weights and right-padded input."""

    def __init__(self, agent, rl, forward):
        self.t = rl.tensors
        head = agent.action_head
        net = type(head)(
            head.config,
            value_in_dim=self.t["weights/value_head.mlp.0.weight"].shape[1],
            noise_std_range=tuple(rl.index["noise_logvar_range"]),
        )
        weights = {k.removeprefix("weights/"): v.float() for k, v in self.t.items() if k.startswith("weights/")}
        self.vl_only_weight = weights.pop("value_head_vlm_only.mlp.0.weight")
        own = {k: v for k, v in head.state_dict().items() if not k.startswith("value_head.")}
        keys = net.load_state_dict(own | weights, strict=False)
        assert not keys.unexpected_keys
        assert set(keys.missing_keys) == {f"reinflow_explore_noise_net.logvar_{bound}" for bound in ("min", "max")}
        self.head = net.eval()
        pixels = (forward.tensors["eagle_pixel_values_u8"].float() - 128) / 128
        with torch.no_grad():
            features = agent.backbone(pixels, self.t["eagle_input_ids"], self.t["eagle_attention_mask"].bool())
        self.inputs = (features, None, forward.tensors["state"], forward.tensors["embodiment_id"])
        self.num_steps = rl.index["num_steps"]
        self.num_buckets = head.config.num_timestep_buckets

    def prepare(self):
        return self.head.prepare(*self.inputs)

    def velocity(self, context):
        def call(x, step):
            velocity, hidden = self.head.velocity(context, x, step * self.num_buckets // self.num_steps)
            return Prediction(velocity, self.head.reinflow_explore_noise_net(hidden))

        return call


@pytest.fixture(scope="module")
def recorded(tiny_agent, rl_goldens, forward_goldens):
    return RecordedPolicy(tiny_agent, rl_goldens, forward_goldens)


@pytest.fixture(scope="module")
def context(recorded):
    with torch.no_grad():
        return recorded.prepare()


def sampler_of(rl_goldens, method, **changes):
    index = rl_goldens.index
    return FlowSampler(num_steps=index["num_steps"], method=method, noise_level=index["noise_level"], **changes)


def close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


def sliced(elements, index):
    return elements[..., : index["action_chunk"], : index["valid_action_dim"]]


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_single_step_chains_equal_the_recorded_ones(recorded, context, rl_goldens, method):
    t, index = rl_goldens.tensors, rl_goldens.index
    sampler = sampler_of(rl_goldens, method)
    velocity = recorded.velocity(context)
    for k in range(index["num_steps"]):
        key = f"{method}/k{k}"
        drawn = torch.full((len(t["noise_init"]),), k)
        chain, scores = sampler.sample(velocity, t["noise_init"], drawn, step_noise=t["step_noise"])
        close(chain, t[f"{key}/chains"])
        close(scores.mean, t[f"{key}/mean"])
        std = t[f"{key}/std"]
        close(scores.std.expand_as(scores.mean), (std if std.ndim == 3 else std[0]).expand_as(scores.mean))
        close(scores.log_prob[:, 0], t[f"{key}/logprob"])
        close(sliced(scores.log_prob[:, 0], index), t[f"{key}/policy_logprobs"])
        again = sampler.evaluate(velocity, chain, drawn)
        assert torch.equal(again.log_prob, scores.log_prob)
        # Recorded chains too, so that an error that sampling and scoring share shows. Here the noise is not
        # ours, so an error of the mean counts |eps| / std times: up to 30 for the smallest std.
        foreign = sampler.evaluate(velocity, t[f"{key}/chains"], drawn).log_prob[:, 0]
        close(foreign, t[f"{key}/logprob"], 30 * TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_joint_chains_equal_the_recorded_ones(recorded, context, rl_goldens, method):
    t, index = rl_goldens.tensors, rl_goldens.index
    sampler = sampler_of(rl_goldens, method, joint=True)
    velocity = recorded.velocity(context)
    drawn = sampler.draw_index(len(t["noise_init"]), torch.device("cpu"))
    chain, scores = sampler.sample(velocity, t["noise_init"], drawn, step_noise=t["step_noise"])
    close(chain, t[f"{method}/joint/chains"])
    close(scores.mean, t[f"{method}/joint/mean"])
    close(scores.log_prob, t[f"{method}/joint/prev_logprobs"])
    close(sliced(scores.log_prob.mean(dim=1), index), t[f"{method}/joint/policy_logprobs"])
    assert torch.equal(sampler.evaluate(velocity, chain, drawn).log_prob, scores.log_prob)


@torch.no_grad()
def test_deterministic_chain_equals_the_recorded_one(recorded, context, rl_goldens):
    t = rl_goldens.tensors
    action = sampler_of(rl_goldens, "flow_sde").denoise(recorded.velocity(context), t["noise_init"])
    close(action, t["eval/chains"][:, -1])


@torch.no_grad()
def test_values_equal_the_recorded_ones(recorded, context, rl_goldens):
    t, head = rl_goldens.tensors, recorded.head
    for mode in ("mean_token", "last_token", "first_token"):
        pooled = head.pooled(context, mode)
        both = torch.cat([pooled, context.state_features.flatten(1)], dim=-1)
        close(head.value_head(both), t[f"value/vl_and_state/{mode}"])
        hidden_dims = tuple(len(v) for k, v in t.items() if k.startswith("weights/value_head.") and k.endswith(".bias"))
        vl_only = type(head.value_head)(pooled.shape[1], hidden_dims[:-1])
        weights = head.value_head.state_dict() | {"mlp.0.weight": recorded.vl_only_weight}
        vl_only.load_state_dict(weights)
        close(vl_only(pooled), t[f"value/vl_only/{mode}"])


@torch.no_grad()
def test_noise_net_equals_the_recorded_one(recorded, rl_goldens):
    t, net = rl_goldens.tensors, recorded.head.reinflow_explore_noise_net
    close(net(t["noise_net/in"]), t["noise_net/std"])
    close(net.logvar_min, t["noise_net/logvar_min"])
    close(net.logvar_max, t["noise_net/logvar_max"])


@pytest.mark.parametrize("method", ["flow_sde", "reinflow"])
def test_gradients_equal_the_recorded_ones(recorded, rl_goldens, method):
    t, index = rl_goldens.tensors, rl_goldens.index
    head = recorded.head
    head.zero_grad()
    context = recorded.prepare()
    found = [re.fullmatch(r"gradient_norms_k(\d+)", name) for name in index]
    k = next(int(match[1]) for match in found if match)
    drawn = torch.full((len(t["noise_init"]),), k)
    scores = sampler_of(rl_goldens, method).evaluate(recorded.velocity(context), t[f"{method}/k{k}/chains"], drawn)
    features = torch.cat([head.pooled(context), context.state_features.flatten(1)], dim=-1)
    loss = sliced(scores.log_prob, index).mean() + head.value_head(features).mean()
    loss.backward()
    close(loss.detach()[None], t[f"grad/{method}/scalar"])
    for name, parameter in head.named_parameters():
        norm = index[f"gradient_norms_k{k}"][method].get(name)
        if norm is not None and norm > 1e-5:
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    found = [re.fullmatch(rf"grad/{method}/action_decoder\.layer2\.W\[(\d+)\]", name) for name in t]
    name, embodiment = next((match[0], int(match[1])) for match in found if match)
    assert torch.allclose(head.action_decoder.layer2.W.grad[embodiment], t[name], rtol=1e-3, atol=1e-6)
    head.zero_grad()


def constant(velocity, std=None):
    def call(x, step):
        return Prediction(torch.full_like(x, velocity), None if std is None else torch.full_like(x, std))

    return call


def test_flow_sde_step_by_hand():
    sampler = FlowSampler(num_steps=4, method="flow_sde", noise_level=0.5)
    x = torch.tensor([[[0.2]]])
    stds = []
    for k in range(4):
        step = torch.tensor([k])
        mean, std = sampler.transition(x, Prediction(torch.tensor([[[2.0]]]), None), step, torch.tensor([True]))
        tau = k / 4
        sigma = 0.5 * math.sqrt((1 - tau) / max(tau, 0.25))
        x0, x1 = 0.2 - tau * 2, 0.2 + (1 - tau) * 2
        w0 = 1 - tau - 0.25 - sigma**2 * 0.25 / (2 * (1 - tau))
        assert mean.item() == pytest.approx((tau + 0.25) * x1 + w0 * x0, abs=1e-6)
        stds.append(std.item())
    assert stds == pytest.approx([0.5, 0.4330127, 0.25, 0.1443376], abs=1e-6)


def test_flow_cps_last_step_is_deterministic_and_never_drawn():
    sampler = FlowSampler(num_steps=4, method="flow_cps", noise_level=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = sampler.draw_index(500, torch.device("cpu"), generator)
    assert set(drawn.tolist()) == {0, 1, 2}
    last = torch.full((2,), 3)
    _, scores = sampler.sample(constant(1.0), torch.zeros(2, 3, 2), last)
    assert torch.all(scores.std == 0)
    assert torch.all(scores.log_prob == 0)
    assert torch.all(scores.entropy == 0)


def test_index_is_drawn_per_sample_or_for_the_whole_batch():
    sampler = FlowSampler(num_steps=4, method="flow_sde")
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    assert set(sampler.draw_index(500, device, generator).tolist()) == {0, 1, 2, 3}
    assert len(set(sampler.draw_index(500, device, generator, whole_batch=True).tolist())) == 1
    ignoring = FlowSampler(num_steps=4, method="flow_sde", ignore_last=True)
    assert set(ignoring.draw_index(500, device, generator).tolist()) == {0, 1, 2}


def test_only_the_drawn_step_of_each_sample_is_noisy():
    sampler = FlowSampler(num_steps=4, method="flow_sde")
    index = torch.tensor([0, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    chain, _ = sampler.sample(constant(1.0), torch.zeros(4, 5, 2), index, generator=generator)
    euler = (chain[:, 1:] - chain[:, :-1] - 0.25).abs().amax(dim=(2, 3)) < 1e-6
    assert torch.equal(~euler, torch.eye(4, dtype=torch.bool))


def test_entropy_and_log_prob_by_hand():
    std = torch.tensor([0.3])
    assert gaussian_entropy(std).item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.09), abs=1e-6)
    expected = torch.distributions.Normal(0.1, 0.3).log_prob(torch.tensor(0.5)).item()
    assert gaussian_log_prob(torch.tensor([0.5]), torch.tensor([0.1]), std).item() == pytest.approx(expected)


def test_entropy_is_the_mean_negative_log_prob():
    sampler = FlowSampler(num_steps=4, method="flow_sde", joint=True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 4, 2, generator=generator)
    index = sampler.draw_index(2000, torch.device("cpu"))
    _, scores = sampler.sample(constant(0.3), noise, index, generator=generator)
    estimate = -scores.log_prob.mean(dim=(0, 2, 3))
    assert torch.allclose(estimate, scores.entropy.mean(dim=(0, 2, 3)), atol=0.03)


def test_reinflow_joint_clips_the_means_and_scores_all_steps():
    sampler = FlowSampler(num_steps=3, method="reinflow_joint")
    generator = torch.Generator().manual_seed(0)
    index = sampler.draw_index(8, torch.device("cpu"))
    noise = torch.randn(8, 4, 2, generator=generator)
    chain, scores = sampler.sample(constant(4.0, std=0.1), noise, index, generator=generator)
    assert scores.mean.abs().max() == 1
    assert chain[:, 1:].abs().max() > 1  # the noise comes after
    assert scores.log_prob.shape == (8, 4, 4, 2)
    mean = (chain[:, 0] + 4.0 / 3).clamp(-1, 1)
    expected = torch.distributions.Normal(mean, 0.1).log_prob(chain[:, 1])
    assert torch.allclose(scores.log_prob[:, 1], expected, atol=1e-3)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", NOISE_METHODS)
@pytest.mark.parametrize("speed_of_chain", [0.3, 0.8, 8.0], ids=["interior", "around_bound", "beyond_bound"])
def test_the_score_has_mean_zero(method: str, joint: bool, speed_of_chain: float):
    """E[d log p / d velocity] = 0 wherever the chain ends; and log p averages to minus the entropy."""
    sampler = FlowSampler(num_steps=4, method=method, joint=joint)
    num_samples = 40_000
    generator = torch.Generator().manual_seed(0)
    # Every chain starts at 0.2; the velocity leads to 0.5, to 1, or pushes each step beyond 1.
    speed = torch.tensor(speed_of_chain, requires_grad=True)
    start = torch.full((num_samples, 1, 1), 0.2)

    def velocity(x: torch.Tensor, step: torch.Tensor) -> Prediction:
        std = torch.full_like(x, 0.1) if sampler.is_learned else None
        return Prediction(speed * torch.ones_like(x), std)

    index = sampler.draw_index(num_samples, torch.device("cpu"), generator)
    with torch.no_grad():
        chain, _ = sampler.sample(velocity, start, index, generator=generator)
    scores = sampler.evaluate(velocity, chain, index)
    first = 1 if sampler.is_joint else 0  # without the initial noise, which was not drawn here
    log_prob = scores.log_prob[:, first:].sum(dim=(1, 2, 3))
    entropy = scores.entropy.expand_as(scores.log_prob)[:, first:].sum(dim=(1, 2, 3))
    # The velocity acts on all samples alike: the variance of single scores is that of sums over blocks.
    blocks = log_prob.reshape(100, -1).sum(dim=1)
    gradients = torch.stack([torch.autograd.grad(block, speed, retain_graph=True)[0] for block in blocks])
    per_sample = gradients / (num_samples / 100)
    error = per_sample.std() / math.sqrt(100)
    assert per_sample.mean().abs() <= 4 * error + 1e-6
    deviation = log_prob.detach() + entropy.detach()
    assert deviation.mean().abs() <= 4 * deviation.std() / math.sqrt(num_samples) + 1e-6


@pytest.mark.parametrize("method", ["flow_sde", "flow_cps"])
def test_annealing_shrinks_the_noise(method):
    sampler = FlowSampler(num_steps=4, method=method, noise_level=0.5)
    x, step, noisy = torch.zeros(1, 1, 1), torch.tensor([1]), torch.tensor([True])
    prediction = Prediction(torch.ones(1, 1, 1), None)
    full = sampler.transition(x, prediction, step, noisy)[1]
    half = sampler.transition(x, prediction, step, noisy, 0.5)[1]
    level = FlowSampler(num_steps=4, method=method, noise_level=0.25)
    assert half < full
    assert torch.equal(half, level.transition(x, prediction, step, noisy)[1])


def test_one_seed_gives_one_chain():
    sampler = FlowSampler(num_steps=4)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        index = sampler.draw_index(3, torch.device("cpu"), generator)
        return sampler.sample(constant(1.0), torch.zeros(3, 4, 2), index, generator=generator)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sde"}, r"noise_method='sde' is unknown \(valid: flow_sde"),
        ({"num_steps": 0}, "denoising_steps=0 is below 1"),
        ({"num_steps": 1, "method": "flow_cps"}, "use at least 2 steps"),
        ({"noise_level": 0.0}, "noise_level=0.0 is out of range"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FlowSampler(**({"num_steps": 4} | changes))


def test_chain_of_another_length_is_refused():
    sampler = FlowSampler(num_steps=4)
    with pytest.raises(ValueError, match="chain has 2 steps, but denoising_steps=4"):
        sampler.evaluate(constant(1.0), torch.zeros(1, 3, 4, 2), torch.tensor([0]))


def test_learned_method_needs_a_learned_std():
    sampler = FlowSampler(num_steps=2, method="reinflow")
    with pytest.raises(ValueError, match="needs a velocity function that also returns a std"):
        sampler.sample(constant(1.0), torch.zeros(1, 4, 2), torch.tensor([0]))


@pytest.mark.parametrize("is_joint", [False, True])
def test_a_chain_with_noise_at_other_steps_is_refused(is_joint: bool):
    sampled, scoring = (FlowSampler(num_steps=2, method="flow_sde", joint=joint) for joint in (is_joint, not is_joint))

    def velocity(x: torch.Tensor, step: torch.Tensor) -> Prediction:
        return Prediction(torch.zeros_like(x), None)

    index = sampled.draw_index(3, torch.device("cpu"))
    chain, _ = sampled.sample(velocity, torch.zeros(3, 4, 2), index)
    sampled.evaluate(velocity, chain, index)
    with pytest.raises(ValueError, match="the chain was sampled with noise at"):
        scoring.evaluate(velocity, chain, index)


def test_ignoring_the_last_step_without_effect_is_refused():
    for options in (dict(method="reinflow"), dict(method="flow_sde", joint=True)):
        with pytest.raises(ValueError, match="ignore_last=True has no effect"):
            FlowSampler(num_steps=4, ignore_last=True, **options)
