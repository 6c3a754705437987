"""The flow-matching action head of GR00T-N1.5: VL self-attention, DiT, per-embodiment encoders and decoders.

Shape legend: B batch, S vision-language positions, T DiT tokens (1 state + F future + H action), H action horizon,
A padded action width, D width of a residual stream.

Parameter names are those of the released checkpoints. Attention, feed-forward, timestep projection and embedding are
diffusers', as in the reference; the blocks around them are not: the reference's adaptive norm scales before it shifts,
and it drops out twice after attention. Two modules exist only for reinforcement learning: the value head and the
exploration-noise net of ReinFlow.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from gr00t_agent.config import ActionHeadConfig, TransformerConfig

# What the reference hard-codes and config.json does not hold.
TIMESTEP_CHANNELS = 256
FEED_FORWARD_FACTOR = 4
NOISE_NET_HIDDEN = (128, 64)

# Either one embodiment for the whole batch, or an int64 [B].
Embodiment = int | Tensor


class CategoryLinear(nn.Module):
    """One linear layer per embodiment: y = x W[embodiment] + b[embodiment]; W is stored (embodiments, in, out)."""

    def __init__(self, num_categories: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(num_categories, in_dim, out_dim) * in_dim**-0.5)
        self.b = nn.Parameter(torch.zeros(num_categories, out_dim))

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """Map [B, n, in] to [B, n, out]."""
        if isinstance(embodiment, int):
            # No gather: the batch shares one matrix.
            return torch.matmul(x, self.W[embodiment]) + self.b[embodiment]
        return torch.bmm(x, self.W[embodiment]) + self.b[embodiment][:, None]


class CategoryMLP(nn.Module):
    """Linear, ReLU, Linear, each per embodiment."""

    def __init__(self, num_categories: int, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(num_categories, in_dim, hidden_dim)
        self.layer2 = CategoryLinear(num_categories, hidden_dim, out_dim)

    def forward(self, x: Tensor, embodiment: Embodiment) -> Tensor:
        """Map [B, n, in] to [B, n, out]."""
        return self.layer2(F.relu(self.layer1(x, embodiment)), embodiment)


class ActionEncoder(nn.Module):
    """Noisy actions and timestep bucket to DiT tokens, per embodiment."""

    def __init__(self, num_categories: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.W1 = CategoryLinear(num_categories, action_dim, width)
        self.W2 = CategoryLinear(num_categories, 2 * width, width)
        self.W3 = CategoryLinear(num_categories, width, width)

    def forward(self, actions: Tensor, bucket: Tensor, embodiment: Embodiment) -> Tensor:
        """Map actions [B, H, A] and int64 bucket [B] to [B, H, D]."""
        encoded = self.W1(actions, embodiment)
        # Not diffusers' `Timesteps`: its frequencies, rounded in another order, are farther from the reference's.
        index = torch.arange(self.width // 2, dtype=torch.float32, device=bucket.device)
        angle = bucket.float()[:, None] * torch.exp(index * (-math.log(10000.0) / (self.width // 2)))
        time = torch.cat([angle.sin(), angle.cos()], dim=-1).to(encoded.dtype)[:, None].expand_as(encoded)
        return self.W3(F.silu(self.W2(torch.cat([encoded, time], dim=-1), embodiment)), embodiment)


class SplitAttention(Attention):
    """diffusers' attention, with `attend` for keys and values that are made beforehand.

    Keys and values of a cross-attention block do not depend on the denoising step, but diffusers' call makes them from
    their source every time. `attend` of `keys_values` gives what that call gives to the last bit, without its look at
    the processor's signature and its division by a factor of one, which take about a tenth of it in small networks.
    """

    def __init__(self, config: TransformerConfig, key_dim: int) -> None:
        super().__init__(
            query_dim=config.width,
            cross_attention_dim=key_dim,
            heads=config.num_attention_heads,
            dim_head=config.attention_head_dim,
            dropout=config.dropout,
            bias=True,
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, n, head_dim]

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [B, heads, n, head_dim]."""
        to_k, to_v = cast(nn.Linear, self.to_k), cast(nn.Linear, self.to_v)
        return self._split(to_k(source)), self._split(to_v(source))

    def attend(self, x: Tensor, keys_values: tuple[Tensor, Tensor], key_mask: Tensor | None) -> Tensor:
        """Attend from x [B, T, D]; key_mask is bool [B, 1, 1, n], True at keys that may be read."""
        keys, values = keys_values
        out = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values, attn_mask=key_mask)
        linear, dropout = cast(nn.ModuleList, self.to_out)
        return dropout(linear(out.transpose(1, 2).flatten(-2)))


def _feed_forward(config: TransformerConfig) -> FeedForward:
    return FeedForward(
        config.width,
        mult=FEED_FORWARD_FACTOR,
        dropout=config.dropout,
        activation_fn="gelu-approximate",
        final_dropout=True,
    )


class VLBlock(nn.Module):
    """Pre-norm self-attention block over the vision-language features."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-5)
        self.attn1 = SplitAttention(config, config.width)
        self.norm3 = nn.LayerNorm(config.width, eps=1e-5)
        self.ff = _feed_forward(config)
        self.final_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        normed = self.norm1(x)
        x = x + self.final_dropout(self.attn1.attend(normed, self.attn1.keys_values(normed), key_mask))
        return x + self.ff(self.norm3(x))


class VLSelfAttention(nn.Module):
    """A stack of `VLBlock`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([VLBlock(config) for _ in range(config.num_layers)])

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        for block in self.transformer_blocks:
            x = block(x, key_mask)
        return x


class _AdaLayerNorm(nn.Module):
    """LayerNorm without own parameters, scaled and shifted by the timestep embedding (scale first)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)  # [B, 1, D] each
        return F.layer_norm(x, (self.width,), eps=1e-5) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """AdaLN attention (cross or self), then an un-modulated norm and feed-forward."""

    def __init__(self, config: TransformerConfig, *, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.width = config.width
        self.norm1 = _AdaLayerNorm(config.width)
        self.attn1 = SplitAttention(config, config.cross_attention_dim if cross else config.width)
        self.ff = _feed_forward(config)
        self.final_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, temb: Tensor, keys_values: tuple[Tensor, Tensor] | None, key_mask: Tensor | None
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D]; keys_values are given to cross blocks only."""
        normed = self.norm1(x, temb)
        if keys_values is None:
            keys_values, key_mask = self.attn1.keys_values(normed), None
        x = x + self.final_dropout(self.attn1.attend(normed, keys_values, key_mask))
        return x + self.ff(F.layer_norm(x, (self.width,), eps=1e-5))


class _TimestepEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(TIMESTEP_CHANNELS, width)

    def forward(self, bucket: Tensor, dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(self.time_proj(bucket).to(dtype))


class DiT(nn.Module):
    """Diffusion transformer: even blocks read the vision-language features, odd blocks attend to themselves."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.timestep_encoder = _TimestepEncoder(config.width)
        self.transformer_blocks = nn.ModuleList([DiTBlock(config, cross=i % 2 == 0) for i in range(config.num_layers)])
        self.proj_out_1 = nn.Linear(config.width, 2 * config.width)
        self.proj_out_2 = nn.Linear(config.width, config.output_dim)

    def cross_keys_values(self, vl_embs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of every cross-attention block; they do not depend on the denoising step."""
        blocks = cast(Sequence[DiTBlock], self.transformer_blocks)
        return [block.attn1.keys_values(vl_embs) for block in blocks if block.cross]

    def forward(
        self, x: Tensor, bucket: Tensor, keys_values: Sequence[tuple[Tensor, Tensor]], key_mask: Tensor | None
    ) -> Tensor:
        """Map tokens [B, T, D] at int64 timestep bucket [B] to [B, T, output_dim]."""
        temb = self.timestep_encoder(bucket, x.dtype)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, temb, keys_values[i // 2] if i % 2 == 0 else None, key_mask)
        # In the output projection the shift comes first, unlike in the blocks.
        shift, scale = self.proj_out_1(F.silu(temb))[:, None].chunk(2, dim=-1)
        x = F.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift
        return self.proj_out_2(x)


class ValueHead(nn.Module):
    """MLP from pooled features to a state value; layer names as in RLinf."""

    def __init__(self, in_dim: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for hidden in hidden_dims:
            layers += [nn.Linear(in_dim, hidden), nn.ReLU()]
            in_dim = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(in_dim, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as RLinf does: Kaiming (fan out), last layer normal with std 0.02, biases zero."""
        linears = [module for module in self.mlp if isinstance(module, nn.Linear)]
        for linear in linears[:-1]:
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(linears[-1].weight, std=0.02)
        for linear in linears:
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, in] to float32 [B]."""
        return self.mlp(features).squeeze(-1).float()


class _NoiseNetLayer(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_1(x)


class _NoiseNetMLP(nn.Module):
    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.moduleList = nn.ModuleList([_NoiseNetLayer(a, b) for a, b in itertools.pairwise(dims)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.moduleList[:-1]:
            x = torch.tanh(layer(x))
        return self.moduleList[-1](x)


class ExploreNoiseNet(nn.Module):
    """Learned exploration noise of ReinFlow (arXiv 2505.22094), with RLinf's parametrisation and names.

    The log-variance is squashed by tanh into [ln min_std^2, ln max_std^2].

    Args:
        in_dim: Width of the DiT output.
        out_dim: Padded action width.
        std_range: Smallest and largest standard deviation.
    """

    logvar_min: Tensor
    logvar_max: Tensor

    def __init__(self, in_dim: int, out_dim: int, std_range: tuple[float, float]) -> None:
        super().__init__()
        low, high = (math.log(std**2) for std in std_range)
        self.register_buffer("logvar_min", torch.tensor([low], dtype=torch.float32))
        self.register_buffer("logvar_max", torch.tensor([high], dtype=torch.float32))
        self.mlp_logvar = _NoiseNetMLP((in_dim, *NOISE_NET_HIDDEN, out_dim))

    def check_std_range(self, std_range: tuple[float, float]) -> None:
        """Check the bounds that a checkpoint brought along, to 2 %: files in bfloat16 hold them rounded.

        Raises:
            ValueError: They are not these.
        """
        low, high = (math.exp(bound.item() / 2) for bound in (self.logvar_min, self.logvar_max))
        if any(abs(own / given - 1) > 0.02 for own, given in zip((low, high), std_range, strict=True)):
            raise ValueError(
                f"noise_std_range={std_range}, but the exploration-noise net was trained with ({low:.4g}, {high:.4g}); "
                "give PolicyConfig that range"
            )

    def forward(self, hidden: Tensor, noise_anneal: float = 1.0) -> Tensor:
        """Return the standard deviation, float32 [B, H, A].

        Args:
            hidden: DiT output at the action tokens, [B, H, D].
            noise_anneal: Fraction of the range of log-variances that is left, in [0, 1]; the lower bound stays.
        """
        low = self.logvar_min.float()
        span = (self.logvar_max.float() - low) * noise_anneal
        squashed = (torch.tanh(self.mlp_logvar(hidden).float()) + 1) / 2
        return torch.exp(0.5 * (low + span * squashed))


class HeadContext(NamedTuple):
    """What all denoising steps of one decision share.

    Attributes:
        vl_embs: [B, S, D] after `vlln` and the VL self-attention.
        valid_mask: bool [B, S], True at positions that may be read; None: all.
        state_features: [B, 1, D'].
        keys_values: Keys and values of the DiT's cross-attention blocks.
        embodiment: Index of the per-embodiment weights.
    """

    vl_embs: Tensor
    valid_mask: Tensor | None
    state_features: Tensor
    keys_values: list[tuple[Tensor, Tensor]]
    embodiment: Embodiment


class ActionHead(nn.Module):
    """Vision-language features, state and a noisy action chunk to a flow velocity.

    Args:
        config: Sizes.
        value_in_dim: Input width of the value head; 0 leaves the value head out.
        value_hidden_dims: Hidden widths of the value head.
        noise_std_range: Bounds of the exploration-noise net; None leaves the net out.
    """

    def __init__(
        self,
        config: ActionHeadConfig,
        *,
        value_in_dim: int = 0,
        value_hidden_dims: Sequence[int] = (1024, 512, 256),
        noise_std_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        num, width, hidden = config.max_num_embodiments, config.input_embedding_dim, config.hidden_size
        self.model = DiT(config.diffusion_model)
        self.state_encoder = CategoryMLP(num, config.max_state_dim, hidden, width)
        self.action_encoder = ActionEncoder(num, config.action_dim, width)
        self.action_decoder = CategoryMLP(num, hidden, hidden, config.action_dim)
        self.future_tokens = nn.Embedding(config.num_target_vision_tokens, width)
        self.vlln = nn.LayerNorm(config.backbone_embedding_dim, eps=1e-5)
        self.vl_self_attention = VLSelfAttention(config.vl_self_attention)
        self.position_embedding = nn.Embedding(config.max_seq_len, width)
        self._value_dims = (value_in_dim, tuple(value_hidden_dims))
        self._noise_std_range = noise_std_range
        self.value_head = self.build_value_head() if value_in_dim else None
        self.reinflow_explore_noise_net = self.build_noise_net() if noise_std_range is not None else None
        self.reset_parameters()

    def build_value_head(self) -> ValueHead:
        """Return a freshly initialised value head of this network's sizes."""
        return ValueHead(*self._value_dims)

    def build_noise_net(self) -> ExploreNoiseNet:
        """Return a freshly initialised exploration-noise net of this network's sizes."""
        if self._noise_std_range is None:
            raise ValueError("this network was built without an exploration-noise net")
        return ExploreNoiseNet(self.config.hidden_size, self.config.action_dim, self._noise_std_range)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise for training from scratch.

        Timestep modulation starts at the identity, residual branches are scaled down with depth, and the decoder
        starts near a zero velocity, but not at it, so that every parameter gets a gradient from the first step on.
        """
        nn.init.normal_(self.future_tokens.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.action_decoder.layer2.W.mul_(0.1)
        dit_blocks = cast(Sequence[DiTBlock], self.model.transformer_blocks)
        vl_blocks = cast(Sequence[VLBlock], self.vl_self_attention.transformer_blocks)
        for stack in (dit_blocks, vl_blocks):
            for block in stack:
                for linear in block.modules():
                    if isinstance(linear, nn.Linear):
                        nn.init.xavier_uniform_(linear.weight)
                        nn.init.zeros_(linear.bias)
                for residual in (cast(nn.ModuleList, block.attn1.to_out)[0], block.ff.net[2]):
                    cast(nn.Linear, residual).weight.mul_((2 * len(stack)) ** -0.5)
        for block in dit_blocks:
            nn.init.normal_(block.norm1.linear.weight, std=1e-3)
        nn.init.normal_(self.model.proj_out_1.weight, std=1e-3)
        nn.init.zeros_(self.model.proj_out_1.bias)

    def process_backbone(self, features: Tensor, valid_mask: Tensor | None) -> Tensor:
        """Return `vl_embs` [B, S, D] from backbone features [B, S, D]."""
        key_mask = None if valid_mask is None else valid_mask[:, None, None, :]
        return self.vl_self_attention(self.vlln(features), key_mask)

    def prepare(
        self, features: Tensor, valid_mask: Tensor | None, state: Tensor, embodiment: Embodiment
    ) -> HeadContext:
        """Compute all that does not depend on the denoising step.

        Args:
            features: Backbone features [B, S, D].
            valid_mask: bool [B, S], True at positions that may be read; None: all.
            state: Normalised, zero-padded state [B, 1, max_state_dim].
            embodiment: One index, or int64 [B].
        """
        return self.context(self.process_backbone(features, valid_mask), valid_mask, state, embodiment)

    def context(self, vl_embs: Tensor, valid_mask: Tensor | None, state: Tensor, embodiment: Embodiment) -> HeadContext:
        """Return what `prepare` does, from what `process_backbone` returns."""
        return HeadContext(
            vl_embs=vl_embs,
            valid_mask=valid_mask,
            state_features=self.state_encoder(state, embodiment),
            keys_values=self.model.cross_keys_values(vl_embs),
            embodiment=embodiment,
        )

    def velocity(self, context: HeadContext, actions: Tensor, bucket: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flow velocity at noisy actions.

        Args:
            context: From `prepare`.
            actions: [B, H, A].
            bucket: int64 [B], timestep bucket (0 = noise).

        Returns:
            velocity [B, H, A] and the DiT output at the action tokens [B, H, hidden].
        """
        num = actions.shape[1]
        encoded = self.action_encoder(actions, bucket, context.embodiment)
        encoded = encoded + self.position_embedding.weight[:num]
        future = self.future_tokens.weight.expand(actions.shape[0], -1, -1)
        state = context.state_features
        tokens = torch.cat([state, future.to(state.dtype), encoded.to(state.dtype)], dim=1)  # [B, T, D]
        key_mask = None if context.valid_mask is None else context.valid_mask[:, None, None, :]
        hidden = self.model(tokens, bucket, context.keys_values, key_mask)[:, -num:]
        return self.action_decoder(hidden, context.embodiment), hidden

    def pooled(self, context: HeadContext, mode: str = "mean_token") -> Tensor:
        """Return one vector per row [B, D]: the mean of the readable positions, or the first or last position."""
        if mode == "last_token":
            return context.vl_embs[:, -1]
        if mode == "first_token":
            return context.vl_embs[:, 0]
        if context.valid_mask is None:
            return context.vl_embs.mean(dim=1)
        weight = context.valid_mask.to(context.vl_embs.dtype).unsqueeze(-1)
        return (context.vl_embs * weight).sum(dim=1) / weight.sum(dim=1)
