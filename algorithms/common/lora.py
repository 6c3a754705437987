"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in a GR00T agent, put in and merged with peft.

As in NVIDIA's fine-tuning script, the query, key and value projections of the attention layers get adapters. The
weights of a part with adapters are frozen; other parts are trained as the agent's tune flags say.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VL_SELF_ATTENTION = "action_head.vl_self_attention."
PARTS: dict[str, tuple[str, ...]] = {
    "action_head": ("action_head.model.", VL_SELF_ATTENTION),
    "language_model": ("backbone.eagle_model.language_model.",),
    "vision_model": ("backbone.eagle_model.vision_model.",),
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Size and place of the adapters.

    Attributes:
        rank: inner width.
        alpha: adapters are scaled by alpha / rank.
        dropout: probability on the adapters' inputs.
        parts: keys of `PARTS`.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.1
    parts: Sequence[str] = ("action_head",)


def add_lora(agent: nn.Module, settings: LoraSettings) -> int:
    """Puts adapters into `agent`, freezes the weights of the adapted parts, and returns the number of adapters.

    A VL self-attention that is not trained gets none.

    Raises:
        ValueError: an unknown part, a part without attention layers, or one that is computed without gradients.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and few runs have adapters

    unknown = sorted(set(settings.parts) - PARTS.keys())
    if unknown or not settings.parts:
        raise ValueError(f"lora parts {unknown or list(settings.parts)} are unknown (valid: {', '.join(PARTS)})")
    trainable = getattr(agent, "trainable", {})
    for part, flag in (("language_model", "tune_llm"), ("vision_model", "tune_visual")):
        if part in settings.parts and not trainable.get(flag, True):
            raise ValueError(
                f"lora parts {list(settings.parts)} hold {part}, which is frozen and computed without gradients; train "
                f"it (--{flag.replace('_', '-')} in fine-tuning, --train-backbone in PPO and GRPO), or leave it out"
            )
    prefixes = tuple(prefix for part in settings.parts for prefix in PARTS[part])
    if not trainable.get("tune_vl_self_attention", True):
        prefixes = tuple(prefix for prefix in prefixes if prefix != VL_SELF_ATTENTION)
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    targets = [
        name
        for name, module in agent.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and name.rpartition(".")[2] in PROJECTIONS
    ]
    if not targets:
        raise ValueError(f"lora parts {list(settings.parts)} hold no projections named {', '.join(PROJECTIONS)}")
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    inject_adapter_in_model(config, agent)
    for name, parameter in agent.named_parameters():
        is_adapter = ".lora_" in name
        parameter.requires_grad_(is_adapter or (name in trained and not name.startswith(prefixes)))
    return len(targets)


@contextmanager
def merged(agent: nn.Module) -> Generator[None]:
    """Gives `agent` the plain network's module tree for a while, the adapters' effect merged into its weights.

    Merged weights are float32, or wider if the adapted ones are: what adapters add is often less than half of the step
    from one bfloat16 number to the next. Afterwards the adapted weights are the tensors that they were.
    """
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any]] = [(name, m) for name, m in agent.named_modules() if isinstance(m, LoraLayer)]
    changed: list[tuple[str, Any, Tensor]] = []  # with the weights as they were
    try:
        for name, layer in found:
            base = layer.get_base_layer()
            weight = base.weight.data
            changed.append((name, layer, weight))
            base.weight.data = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            layer.merge()
            _replace(agent, name, base)
        yield
    finally:
        for name, layer, weight in changed:
            if layer.merged:
                layer.unmerge()
            layer.get_base_layer().weight.data = weight  # unmerging rounds
            _replace(agent, name, layer)


def save_merged(agent: Any, folder: Path) -> None:
    """Saves `agent` as the plain network that it is with its adapters merged, these weights in float32."""
    with merged(agent):
        agent.save_pretrained(folder)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
