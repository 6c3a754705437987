"""What is not trained: how it is stored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from algorithms import ppo_gr00t
from algorithms.common.frozen import store_frozen_as
from algorithms.common.lora import LoraSettings, add_lora
from gr00t_agent import Gr00tAgent
from tests.algorithms.line_trainer import logged, make_tiny_agent, train


def make_in_bfloat16(args: Any) -> Gr00tAgent:
    """An agent as PPO's own is made: computes in bfloat16, and stores in it what is frozen."""
    agent = make_tiny_agent(args)
    agent.policy = replace(agent.policy, compute_dtype="bfloat16")
    if args.lora_rank:
        add_lora(agent, LoraSettings(rank=args.lora_rank, dropout=0.0))
    return store_frozen_as(agent, torch.bfloat16)


@pytest.mark.parametrize("changes", [dict(), dict(train_vl_self_attention=False), dict(lora_rank=2)])
def test_frozen_layers_in_bfloat16_take_what_trained_ones_give_them_in_float32(tmp_path: Path, changes: dict[str, Any]):
    """PyTorch's layer norm on a CPU takes no weights of a smaller type than its input's."""
    train("ppo", tmp_path, make_agent=make_in_bfloat16, num_iterations=1, run_name="run", **changes)
    (line,) = logged(tmp_path / "run")
    assert line["actor/num_updates"] > 0
    assert line["actor/ratio_first_minibatch_max_dev"] < 0.2  # rounding in bfloat16


def test_only_frozen_weights_change_their_type_and_layer_norms_keep_theirs():
    agent = store_frozen_as(make_tiny_agent(ppo_gr00t.Args(train_vl_self_attention=False)), torch.bfloat16)
    norms = {
        f"{name}.{part}"
        for name, module in agent.named_modules()
        if isinstance(module, nn.LayerNorm)
        for part, _ in module.named_parameters()
    }
    assert any(name.startswith("action_head.vlln") for name in norms)
    kept = {name for name, parameter in agent.named_parameters() if parameter.dtype == torch.float32}
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    assert kept == trained | norms
