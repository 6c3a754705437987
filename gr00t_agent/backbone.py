"""The Eagle vision-language backbone: SigLIP vision tower, linear connector, the first layers of Qwen3.

Shape legend: B batch, V camera views, P tokens of one view, L prompt tokens, D language width.

The layers are those of transformers; this module decides what runs and what may attend to what. Two readings of
padding exist:
    * `flash`: padded queries get a zero attention output, as with flash attention on un-padded sequences. That is
      what the released model was trained with, and padded rows do reach the action head there.
    * causal only: for prompts padded on the right, valid tokens never see a padded one, so no mask is needed, and
      the rows of padded tokens are meaningless and must be masked by whoever reads the features.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

from gr00t_agent.config import ModelConfig

_ATTENTION_NAME = "gr00t_sdpa"


def _sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' layers: boolean mask (True = may attend), or causal where the module says so.

    Queries that may attend to nothing get zeros, whatever kernel runs.
    """
    num_groups: int = getattr(module, "num_key_value_groups", 1)
    if num_groups > 1:
        key = key.repeat_interleave(num_groups, dim=1)
        value = value.repeat_interleave(num_groups, dim=1)
    causal = attention_mask is None and bool(getattr(module, "is_causal", False))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )  # [B, heads, L, head_dim]
    if attention_mask is not None:
        out = out.masked_fill(~attention_mask.any(dim=-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION_NAME, _sdpa_attention)


def flash_attention_mask(valid_mask: Tensor) -> Tensor:
    """Return who may attend to whom in the `flash` reading of padding.

    Args:
        valid_mask: bool [B, L], True at real tokens.

    Returns:
        bool [B, 1, L, L]: causal, valid queries to valid keys only.
    """
    length = valid_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid_mask.device).tril()
    return (causal & valid_mask[:, None, :] & valid_mask[:, :, None])[:, None]


class _LanguageModel(nn.Module):
    """Holds Qwen3 under the name that it has inside a causal language model; the tied output layer is unused."""

    def __init__(self, model: Qwen3Model) -> None:
        super().__init__()
        self.model = model


class EagleModel(nn.Module):
    """Vision tower, connector and language model, with the released parameter names (see `weights`).

    Args:
        config: Sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, text = SiglipVisionConfig(**config.vision), Qwen3Config(**config.text)
        text.num_hidden_layers = config.num_llm_layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(cast(Any, text.layer_types))[: config.num_llm_layers]
        self.vision_model = SiglipVisionModel(vision)
        self.language_model = _LanguageModel(Qwen3Model(text))
        self.mlp1 = nn.Sequential(nn.Linear(vision.hidden_size, text.hidden_size))
        for config_in_use in (self.vision_model.config, self.language_model.model.config):
            config_in_use._attn_implementation = _ATTENTION_NAME  # pyright: ignore[reportPrivateUsage]

    @property
    def vision_core(self) -> Any:
        """The module with `embeddings` and `encoder`: transformers 5 removed one level."""
        return getattr(self.vision_model, "vision_model", self.vision_model)


class Backbone(nn.Module):
    """Images and prompt to one feature vector per prompt position.

    Args:
        config: Sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eagle_model = EagleModel(config)
        projected, width = config.projected_width, config.text["hidden_size"]
        self.eagle_linear = nn.Identity() if projected is None else nn.Linear(width, projected)
        self.image_token_id = config.image_token_id
        self.num_vision_layers_run = config.num_vision_layers_run
        self.num_image_tokens = config.num_image_tokens

    @torch.no_grad()
    def reset_position_table(self) -> None:
        """Start the vision tower's position table from two-dimensional sines instead of noise.

        A tower that is trained from scratch on little data then knows which patches are neighbours. Half the
        channels hold x, half y, at wavelengths from 6 to 600 patches; the amplitude is that of the patch embedding.
        """
        table = self.eagle_model.vision_core.embeddings.position_embedding.weight  # [P, width]
        side = int(table.shape[0] ** 0.5)
        num_frequencies = table.shape[1] // 4
        index = torch.arange(num_frequencies, dtype=torch.float32, device=table.device)
        frequency = torch.exp(-math.log(100.0) * index / num_frequencies)
        y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float32, device=table.device)] * 2, indexing="ij")
        angles = torch.stack([x, y], dim=-1).reshape(-1, 2, 1) * frequency  # [P, 2, num_frequencies]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)  # [P, 4 * num_frequencies]
        table[:, : waves.shape[1]] = 0.5 * waves

    def unused_parameter_names(self) -> list[str]:
        """Names of parameters that no output depends on: SigLIP's last norm, pooling head and layers not run."""
        core = self.eagle_model.vision_core
        unused = {id(parameter) for parameter in core.post_layernorm.parameters()}
        if hasattr(core, "head"):
            unused |= {id(parameter) for parameter in core.head.parameters()}
        for layer in core.encoder.layers[self.num_vision_layers_run :]:
            unused |= {id(parameter) for parameter in layer.parameters()}
        return [name for name, parameter in self.named_parameters() if id(parameter) in unused]

    def vision_features(self, pixel_values: Tensor) -> Tensor:
        """Return SigLIP's features before its last norm.

        Args:
            pixel_values: float [B*V, 3, height, width] in [-1, 1].

        Returns:
            [B*V, P, vision width].
        """
        core = self.eagle_model.vision_core
        hidden = core.embeddings(pixel_values)
        for layer in core.encoder.layers[: self.num_vision_layers_run]:
            out = layer(hidden, None)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Return the connector's output, [B*V, P, D], for `pixel_values` as in `vision_features`."""
        return self.eagle_model.mlp1(self.vision_features(pixel_values))

    def embed_prompt(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Return prompt embeddings with the image features in place of the image tokens.

        Args:
            input_ids: int64 [B, L] with V*P image tokens per row.
            image_features: [B*V, P, D], the views of one row next to each other.

        Returns:
            [B, L, D].
        """
        embedded = self.eagle_model.language_model.model.embed_tokens(input_ids)
        is_image = (input_ids == self.image_token_id).unsqueeze(-1)  # [B, L, 1]
        # masked_scatter fills in row-major order, which is the order of the views, without asking for a count.
        return embedded.masked_scatter(is_image, image_features.reshape(-1, embedded.shape[-1]).to(embedded.dtype))

    def forward(self, pixel_values: Tensor, input_ids: Tensor, valid_mask: Tensor | None) -> Tensor:
        """Return backbone features.

        Args:
            pixel_values: float [B*V, 3, height, width] in [-1, 1], the views of one row next to each other.
            input_ids: int64 [B, L].
            valid_mask: bool [B, L], True at real tokens, for the `flash` reading of padding; None for the causal
                reading, which needs padding on the right.

        Returns:
            [B, L, features], after the language model's final norm.
        """
        hidden = self.embed_prompt(input_ids, self.image_features(pixel_values))
        llm = self.eagle_model.language_model.model
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position_embeddings = llm.rotary_emb(hidden, position_ids)
        mask = None if valid_mask is None else flash_attention_mask(valid_mask)
        for layer in llm.layers:
            out = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=position_embeddings)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.eagle_linear(llm.norm(hidden))
