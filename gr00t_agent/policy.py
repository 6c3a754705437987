"""What a policy is asked to do, what it answers with, and how the network is used for it.

Shape legend: B batch, N denoising steps, H action horizon, A padded action width, C executed steps of a chunk
(`num_action_chunks`), a valid action width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gr00t_agent.config import PresetName
from gr00t_agent.data_config import EMBODIMENT_IDS
from gr00t_agent.files import dataclass_from_json, is_whole
from gr00t_agent.sampler import FlowSampler, NoiseMethod
from gr00t_agent.transforms import PaddingMode

# Nothing, one generator, or one per row.
NoiseSource = torch.Generator | Sequence[torch.Generator] | None


class FlowAction(NamedTuple):
    """What a trainer stores as `action`; index and concatenate it field by field.

    Attributes:
        chain: float32 [B, N+1, H, A], from noise to action, in the network's normalised units.
        denoise_index: int64 [B], the stochastic step of each sample; -1 if all steps are.
        env_action: float32 [B, C, a], what the environment takes.
    """

    chain: Tensor
    denoise_index: Tensor
    env_action: Tensor


class SamplingDraws(NamedTuple):
    """Random numbers given from outside, for comparisons; None is drawn.

    Attributes:
        noise: [B, H, A], the chain's start.
        denoise_index: int64 [B].
        step_noise: [N, B, H, A].
    """

    noise: Tensor | None = None
    denoise_index: Tensor | None = None
    step_noise: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """How the network is used as a policy. Saved beside the weights.

    Attributes:
        num_action_chunks: Steps C of a predicted chunk that are executed and scored.
        denoising_steps: Denoising steps N.
        noise_method: `flow_sde`, `flow_cps`, `reinflow` or `reinflow_joint`, see `sampler`.
        noise_level: Exploration level of flow_sde and flow_cps.
        noise_std_range: Smallest and largest learned standard deviation of the reinflow methods.
        ignore_last: Never make the last step of flow_sde the stochastic one.
        joint_logprob: Make every step stochastic and score the whole chain.
        joint_reduction: How the N + 1 entries of a joint log-probability become one: `sum` is the log-probability
            of the chain, `mean` is what RLinf uses.
        logprob_level: `chunk` sums log-probability and entropy over C steps and a dims to [B], `action` over dims
            to [B, C], `token` keeps [B, C, a].
        padding: `masked` lets nothing read padding, so a sample's result does not depend on its batch mates (equal
            to the reference at batch size 1); `left` and `right` are NVIDIA's and RLinf's, see `PromptLayout`.
        prompt_length: Tokens of a prompt row; None leaves room for 32 instruction tokens.
        value_head: Have a value head.
        value_inputs: Pooled vision-language features, with or without the state features.
        value_pooling: Mean of the readable positions, or the first or last position.
        value_hidden_dims: Hidden widths of the value head.
        critic_detach: Keep value gradients out of everything but the value head.
        disable_dropout: No dropout at all; otherwise dropout acts in `sft_loss` only, never on log-probabilities.
        embodiment_table: Table that turns the data config's tag into an index: `rlinf` or `nvidia`.
        embodiment_id: That index, given directly.
        round_to_bf16: Round raw states, normalised states and pixel values to bfloat16, as RLinf does.
        compute_dtype: Type that the network computes in; sampling and log-probabilities are float32 always.
    """

    num_action_chunks: int = 5
    denoising_steps: int = 4
    noise_method: NoiseMethod = "flow_sde"
    noise_level: float = 0.5
    noise_std_range: tuple[float, float] = (0.08, 0.16)
    ignore_last: bool = False
    joint_logprob: bool = False
    joint_reduction: Literal["sum", "mean"] = "sum"
    logprob_level: Literal["chunk", "action", "token"] = "chunk"
    padding: PaddingMode = "masked"
    prompt_length: int | None = None
    value_head: bool = True
    value_inputs: Literal["vl_and_state", "vl"] = "vl_and_state"
    value_pooling: Literal["mean_token", "last_token", "first_token"] = "mean_token"
    value_hidden_dims: tuple[int, ...] = (1024, 512, 256)
    critic_detach: bool = True
    disable_dropout: bool = True
    embodiment_table: Literal["rlinf", "nvidia"] = "rlinf"
    embodiment_id: int | None = None
    round_to_bf16: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        allowed = {
            "joint_reduction": ("sum", "mean"),
            "logprob_level": ("chunk", "action", "token"),
            "padding": ("masked", "left", "right"),
            "value_inputs": ("vl_and_state", "vl"),
            "value_pooling": ("mean_token", "last_token", "first_token"),
            "embodiment_table": tuple(EMBODIMENT_IDS),
            "compute_dtype": ("float32", "bfloat16"),
        }
        for entry in fields(self):
            _check_plain_type(entry.name, getattr(self, entry.name), entry.type)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown (valid: {', '.join(values)})")
        if self.value_pooling != "mean_token" and self.padding == "masked":
            raise ValueError(
                f"value_pooling={self.value_pooling!r} reads padding and goes with padding='left' or 'right' only; "
                "use value_pooling='mean_token'"
            )
        low, high = self.noise_std_range
        if not 0 < low <= high < math.inf:
            raise ValueError(f"noise_std_range={self.noise_std_range} must be positive and ascending")
        if not math.isfinite(self.noise_level):
            raise ValueError(f"noise_level={self.noise_level} must be a finite number")
        _ = self.sampler  # refuses what does not go together
        if self.num_action_chunks < 1:
            raise ValueError(f"num_action_chunks={self.num_action_chunks} is below 1")
        if self.prompt_length is not None and self.prompt_length < 1:
            raise ValueError(f"prompt_length={self.prompt_length} is below 1; None leaves room for any instruction")
        if self.value_head and not all(width > 0 for width in self.value_hidden_dims):
            raise ValueError(f"value_hidden_dims={self.value_hidden_dims} must be positive")

    @property
    def sampler(self) -> FlowSampler:
        """The sampler that these settings describe."""
        return FlowSampler(
            num_steps=self.denoising_steps,
            method=self.noise_method,
            noise_level=self.noise_level,
            joint=self.joint_logprob,
            ignore_last=self.ignore_last,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`compute_dtype` as torch names it."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.compute_dtype]

    @staticmethod
    def from_json(data: Any) -> "PolicyConfig":
        """Rebuild from what `asdict` gave to JSON.

        Raises:
            ValueError: Something is unknown, of another type, or not allowed.
        """
        return dataclass_from_json(PolicyConfig, data, "policy")


def _check_plain_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a setting that is a whole number, or True or False, is one."""
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither True nor False")
    if hint in (int, int | None) and not (is_whole(value) or (value is None and hint is not int)):
        raise ValueError(f"{name}={value!r} is not an int; give a whole number")


# The settings of each preset of network sizes; change some with `dataclasses.replace`.
POLICY_PRESETS: dict[PresetName, PolicyConfig] = {
    "gr00t_n1d5": PolicyConfig(),
    "nano": PolicyConfig(embodiment_id=0, value_hidden_dims=(256, 128)),
}


def preset_policy(name: PresetName) -> PolicyConfig:
    """Return the settings of a preset; change some with `dataclasses.replace`.

    Raises:
        ValueError: Unknown preset.
    """
    if name not in POLICY_PRESETS:
        raise ValueError(f"preset={name!r} is unknown (valid: {', '.join(POLICY_PRESETS)})")
    return POLICY_PRESETS[name]
