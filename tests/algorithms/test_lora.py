"""Low-rank adapters in reinforcement learning: what is trained, saved and gone on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common.frozen import store_frozen_as
from algorithms.common.lora import LoraSettings, add_lora, merged, save_merged
from gr00t_agent import Gr00tAgent
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import logged, make_tiny_agent, train

ADAPTED = ("action_head.model.", "action_head.vl_self_attention.")
FEWER: dict[str, dict[str, Any]] = {
    "ppo": dict(num_steps=8, minibatch_size=32, micro_batch_size=16, update_epochs=2, imitation_coef=1.0),
    "grpo": dict(max_rollouts=1, update_epochs=2),
}


def make_adapted(args: Any) -> Gr00tAgent:
    agent = make_tiny_agent(args)
    add_lora(agent, LoraSettings(rank=args.lora_rank, dropout=0.0))
    return agent


@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t])
def test_the_trainers_adapt_what_they_are_told_to(trainer: Any):
    agent = trainer.load_agent(trainer.Args(lora_rank=4))
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {agent.get_parameter(name).shape[0] for name in adapters if ".lora_A" in name} == {4}
    assert not [name for name in trained - adapters if name.startswith(ADAPTED)]
    assert all(name.startswith(ADAPTED) for name in adapters)
    assert any(name.startswith("action_head.value_head.") for name in trained)
    grouped = {id(p) for group in agent.param_groups(1e-3, 1e-3) for p in group["params"]}
    assert grouped == {id(agent.get_parameter(name)) for name in trained}

    with pytest.raises(ValueError, match="language_model, which is frozen and computed without gradients"):
        trainer.load_agent(trainer.Args(lora_rank=4, lora_parts=("language_model",)))
    whole = trainer.load_agent(trainer.Args(lora_rank=4, lora_parts=("language_model",), train_backbone=True))
    assert any(".lora_" in name for name, _ in whole.backbone.named_parameters())
    part = trainer.load_agent(trainer.Args(lora_rank=4, train_vl_self_attention=False))
    adapted = {name.split(".")[1] for name, _ in part.named_parameters() if ".lora_" in name}
    assert adapted == {"model"}
    assert not any(p.requires_grad for p in part.action_head.vl_self_attention.parameters())
    with pytest.raises(ValueError, match="lora_rank=4: model='state' has no attention layers"):
        trainer.check_args(trainer.Args(lora_rank=4, model="state"))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_adapters_are_trained_and_saved_as_a_plain_policy(tmp_path: Path, algorithm: str):
    made: list[Gr00tAgent] = []
    start: dict[str, torch.Tensor] = {}

    def make_agent(args: Any) -> Gr00tAgent:
        made.append(make_adapted(args))
        start.update({name: value.clone() for name, value in made[0].state_dict().items()})
        return made[0]

    options: dict[str, Any] = dict(make_agent=make_agent, lora_rank=2, num_iterations=3, **FEWER[algorithm])
    train(algorithm, tmp_path, **options)
    (run,) = tmp_path.iterdir()
    assert logged(run)[0]["actor/ratio_first_minibatch_max_dev"] < 1e-5

    agent = made[0]
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, start[name])}
    assert any(".lora_B" in name for name in moved)
    assert not [name for name in moved if name.startswith(ADAPTED) and ".lora_" not in name]

    folder = run / "checkpoints" / "iteration_3"
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name or "base_layer" in name]
    loaded = Gr00tAgent.from_pretrained(folder)
    obs = LineVectorEnv(3).observe()
    noise = torch.randn(3, *agent.noise_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(obs, noise=noise), agent.predict(obs, noise=noise))


def test_adapters_of_bfloat16_weights_are_saved_with_all_that_they_add(tmp_path: Path):
    """What they add here is far less than half of the step from one bfloat16 number to the next."""
    agent = make_adapted(ppo_gr00t.Args(lora_rank=2))
    store_frozen_as(agent, torch.bfloat16)
    layers = {name: layer for name, layer in agent.named_modules() if hasattr(layer, "get_base_layer")}
    before = {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-5, generator=generator)

    save_merged(agent, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, layer in layers.items():
        weight = saved[f"{name}.weight"]
        added = layer.get_delta_weight("default")
        assert weight.dtype == torch.float32
        assert 0 < added.abs().mean() < 1e-3 * weight.abs().mean()
        torch.testing.assert_close(weight - before[name].float(), added, rtol=0.01, atol=1e-7)

    with pytest.raises(OSError, match="no space"), merged(agent):
        raise OSError("no space")
    assert layers.keys() == {name for name, layer in agent.named_modules() if hasattr(layer, "get_base_layer")}
    for name, layer in layers.items():
        assert not layer.merged
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        assert layer.get_base_layer().weight.data_ptr() == before[name].data_ptr()


def test_adapters_that_cannot_be_merged_leave_the_agent_as_it_was(monkeypatch: pytest.MonkeyPatch):
    agent = make_adapted(ppo_gr00t.Args(lora_rank=2))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    layers = [layer for layer in agent.modules() if hasattr(layer, "get_base_layer")]

    def fail() -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(layers[1], "merge", fail)
    with pytest.raises(MemoryError, match="no memory"), merged(agent):
        pass
    after = agent.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_resumed_run_with_adapters_is_the_same_run(tmp_path: Path, algorithm: str):
    options: dict[str, Any] = dict(make_agent=make_adapted, lora_rank=2, **FEWER[algorithm])
    train(algorithm, tmp_path / "whole", num_iterations=3, **options)
    train(algorithm, tmp_path / "parts", num_iterations=1, **options)
    train(algorithm, tmp_path / "parts", num_iterations=3, resume="auto", **options)
    whole, parts = (next((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert logged(parts) == logged(whole)
    weights = [load_file(run / "checkpoints" / "iteration_3" / "model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def make_another(args: Any) -> Gr00tAgent:
        agent = make_adapted(args)
        name = next(name for name, _ in agent.named_parameters() if name.endswith("base_layer.weight"))
        agent.get_parameter(name).data[0, 0] += 1e-3
        return agent

    with pytest.raises(ValueError, match="iteration_3 cannot go on: SHA-256 of the agent's frozen weights was"):
        train(algorithm, tmp_path / "parts", resume="auto", **options | dict(num_iterations=4, make_agent=make_another))
