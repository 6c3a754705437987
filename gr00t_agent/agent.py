"""`Gr00tAgent`: GR00T-N1.5 behind the surface of a CleanRL agent.

Shape legend: B batch, V views, L prompt tokens, N denoising steps, H action horizon, A padded action width,
C executed steps of a chunk (`num_action_chunks`), a valid action width.
"""

import contextlib
import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from gr00t_agent.action_head import ActionHead, HeadContext
from gr00t_agent.backbone import Backbone
from gr00t_agent.checkpoint import RL_ONLY, load_weights, read_weights, resolve_checkpoint, write_weights
from gr00t_agent.config import EAGLE_FOLDER, ModelConfig, PresetName
from gr00t_agent.data_config import (
    METADATA_PATH,
    DataConfig,
    DatasetMetadata,
    LiberoFrankaDataConfig,
    embodiment_id,
    read_metadata,
    write_metadata,
)
from gr00t_agent.sampler import FlowSampler, NoiseMethod, Prediction
from gr00t_agent.transforms import (
    Observation,
    PaddingMode,
    Preprocessor,
    PromptLayout,
    PromptTokenizer,
    load_tokenizer,
    pixels_from_bytes,
    prompt_text,
)

logger = logging.getLogger(__name__)

POLICY_FILE = "policy_config.json"
NANO_METADATA = Path(__file__).parent / "data" / "nano_metadata.json"
RELEASED_TOKENIZER = "Qwen/Qwen3-1.7B"
# Room for the instruction in a prompt of default length; the longest of LIBERO has 25 tokens with Qwen's tokenizer.
INSTRUCTION_TOKENS = 32


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
            "compute_dtype": ("float32", "bfloat16"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown (valid: {', '.join(values)})")
        if self.value_pooling != "mean_token" and self.padding == "masked":
            raise ValueError(
                f"value_pooling={self.value_pooling!r} reads padding and goes with padding='left' or 'right' only; "
                "use value_pooling='mean_token'"
            )
        low, high = self.noise_std_range
        if not 0 < low <= high:
            raise ValueError(f"noise_std_range={self.noise_std_range} must be positive and ascending")

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
    def from_json(data: Mapping[str, Any]) -> "PolicyConfig":
        """Rebuild from JSON data."""
        fields: dict[str, Any] = {k: tuple(cast(list[Any], v)) if isinstance(v, list) else v for k, v in data.items()}
        return PolicyConfig(**fields)


class Gr00tAgent(nn.Module):
    """A GR00T-N1.5 policy with a value function.

    Observations are dicts with GR00T's modality keys: `video.*` uint8 [B, height, width, 3], `state.*` float32
    [B, width], and one instruction per row under the data config's language key; arrays or tensors. Wherever an
    observation is taken, the result of `encode` is taken as well.

    Build it with `from_preset` or `from_pretrained`.

    Args:
        config: Network sizes.
        policy: How the network is used.
        preprocessor: Observations to inputs, outputs to actions.
    """

    def __init__(self, config: ModelConfig, policy: PolicyConfig, preprocessor: Preprocessor) -> None:
        super().__init__()
        head = config.action_head
        if not 0 < policy.num_action_chunks <= head.action_horizon:
            raise ValueError(
                f"num_action_chunks={policy.num_action_chunks} is not in 1-{head.action_horizon} (the action horizon)"
            )
        self.config = config
        self.policy = policy
        self.preprocessor = preprocessor
        self.sampler = policy.sampler
        tag = preprocessor.data_config.embodiment_tag
        given = policy.embodiment_id
        self.embodiment = embodiment_id(tag, policy.embodiment_table) if given is None else given
        if not 0 <= self.embodiment < head.max_num_embodiments:
            raise ValueError(
                f"embodiment_id={self.embodiment} is not in 0-{head.max_num_embodiments - 1}; "
                "set PolicyConfig.embodiment_id"
            )
        self.backbone = Backbone(config)
        value_in = head.backbone_embedding_dim
        value_in += head.input_embedding_dim if policy.value_inputs == "vl_and_state" else 0
        self.action_head = ActionHead(
            head,
            value_in_dim=value_in if policy.value_head else 0,
            value_hidden_dims=policy.value_hidden_dims,
            noise_std_range=policy.noise_std_range if self.sampler.is_learned else None,
        )
        self._trainable: dict[str, bool] = {}
        self._dropouts = [module for module in self.modules() if isinstance(module, nn.Dropout)]
        if policy.disable_dropout:
            for module in self._dropouts:
                module.p = 0.0
        # DistributedDataParallel waits for gradients of every parameter but these, which no output depends on.
        self._ddp_params_and_buffers_to_ignore = [f"backbone.{name}" for name in self.backbone.unused_parameter_names()]
        self._run_backbone: Any = self.backbone.forward
        self._run_prepare: Any = self.action_head.prepare
        self._run_velocity: Any = self.action_head.velocity
        self._uses_cuda_graphs = False
        self.set_trainable(tune_visual=False, tune_llm=False, tune_projector=True, tune_diffusion_model=True)

    # -- building, saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        policy: PolicyConfig,
        *,
        data_config: DataConfig,
        metadata: DatasetMetadata,
        tokenizer: PromptTokenizer | str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Gr00tAgent":
        """Build a network with random weights, all of it trainable.

        Args:
            config: Network sizes.
            policy: Settings.
            data_config: The robot.
            metadata: Statistics.
            tokenizer: Tokenizer, or what `load_tokenizer` takes.
            device: Where to build.
            dtype: Type of the parameters.

        Raises:
            ValueError: The parts do not fit together.
            KeyError: The statistics do not cover the data config.
        """
        preprocessor = _preprocessor(config, policy, data_config, metadata, tokenizer)
        with torch.device(device):
            agent = cls(config, policy, preprocessor)
        agent.backbone.reset_position_table()
        agent.set_trainable(tune_visual=True, tune_llm=True)
        return agent._cast(dtype)

    @classmethod
    def from_preset(
        cls,
        name: PresetName,
        *,
        policy: PolicyConfig | None = None,
        data_config: DataConfig | None = None,
        metadata: DatasetMetadata | None = None,
        tokenizer: PromptTokenizer | str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Gr00tAgent":
        """Build a network of a named size with random weights, all of it trainable.

        Args:
            name: `nano`, which ships with a tokenizer and LIBERO workspace statistics, or `gr00t_n1d5`.
            policy: Settings; None takes `preset_policy(name)`.
            data_config: The robot; None takes LIBERO's Franka.
            metadata: Statistics; None takes the ones that ship with `nano` (LIBERO's Franka only).
            tokenizer: Tokenizer, or what `load_tokenizer` takes; None takes the preset's own.
            device: Where to build.
            dtype: Type of the parameters.

        Raises:
            ValueError: Unknown preset.
            KeyError: The statistics do not cover the data config.
        """
        data_config = LiberoFrankaDataConfig() if data_config is None else data_config
        if metadata is None:
            metadata = read_metadata(NANO_METADATA, data_config.embodiment_tag)
        if tokenizer is None:
            tokenizer = "nano" if name == "nano" else RELEASED_TOKENIZER
        return cls.from_config(
            ModelConfig.preset(name),
            preset_policy(name) if policy is None else policy,
            data_config=data_config,
            metadata=metadata,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        policy: PolicyConfig | None = None,
        data_config: DataConfig | None = None,
        metadata: DatasetMetadata | None = None,
        tokenizer: PromptTokenizer | str | Path | None = None,
        eagle_folder: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Gr00tAgent":
        """Load a released checkpoint, or one that `save_pretrained` wrote.

        Args:
            path_or_hub_id: Folder, or hub name such as `nvidia/GR00T-N1.5-3B`.
            policy: Settings; None takes the saved ones, or the defaults where there are none.
            data_config: The robot; None takes the saved one, or LIBERO's Franka.
            metadata: Statistics; None reads `experiment_cfg/metadata.json`.
            tokenizer: Tokenizer, or what `load_tokenizer` takes; None takes the checkpoint's, or Qwen3's.
            eagle_folder: Folder with the Eagle `config.json`, if not inside the checkpoint and not the released one.
            device: Where to put the weights.
            dtype: Type of the parameters.

        Raises:
            FileNotFoundError: No such checkpoint, or a file of it is missing.
            ValueError: Tensors are unknown, missing or misshapen (all are listed), or not finite.
        """
        folder = resolve_checkpoint(path_or_hub_id)
        config = ModelConfig.from_folder(folder, eagle_folder)
        saved: dict[str, Any] = {}
        if (folder / POLICY_FILE).is_file():
            saved = json.loads((folder / POLICY_FILE).read_text())
        if policy is None:
            policy = saved_policy(folder)
        if data_config is None:
            data_config = DataConfig.from_json(saved["data_config"]) if saved else LiberoFrankaDataConfig()
        if metadata is None:
            metadata = read_metadata(folder / METADATA_PATH, data_config.embodiment_tag)
        if tokenizer is None:
            own = folder / EAGLE_FOLDER
            has_own = any((own / file).is_file() for file in ("tokenizer.json", "vocab.json"))
            tokenizer = own if has_own else RELEASED_TOKENIZER
        preprocessor = _preprocessor(config, policy, data_config, metadata, tokenizer)
        with torch.device("meta"):
            agent = cls(config, policy, preprocessor)
        device = torch.device(device)
        absent = load_weights(agent, read_weights(folder), dtype, device)
        agent._materialise(absent, device, dtype)
        if saved:
            agent.set_trainable(**saved["trainable"])
        return agent

    @classmethod
    def load(cls, source: str | Path, *, train_backbone: bool | None = None, **changes: Any) -> "Gr00tAgent":
        """Build from a preset's name, a checkpoint folder or a hub name, with some settings changed.

        Args:
            source: `nano`, `gr00t_n1d5`, or what `from_pretrained` takes.
            train_backbone: Train vision tower, connector and language model; None leaves it as it is.
            changes: Fields of `PolicyConfig`; None leaves a field as it is.

        Raises:
            TypeError: A field that `PolicyConfig` does not have.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        preset = next((name for name in get_args(PresetName) if name == str(source)), None)
        if preset is not None:
            agent = cls.from_preset(preset, policy=replace(preset_policy(preset), **given))
        else:
            policy = saved_policy(resolve_checkpoint(source))
            agent = cls.from_pretrained(source, policy=replace(policy, **given))
        if train_backbone is not None:
            agent.set_trainable(**(agent._trainable | {"tune_visual": train_backbone, "tune_llm": train_backbone}))
        return agent

    def _materialise(self, absent: list[str], device: torch.device, dtype: torch.dtype) -> None:
        """Finish a network that was built on the meta device: buffers, and RL-only modules without weights."""
        eagle = self.backbone.eagle_model
        embeddings = eagle.vision_core.embeddings
        with torch.device(device):
            embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
            llm = eagle.language_model.model
            llm.rotary_emb = type(llm.rotary_emb)(config=llm.config)
            for prefix in absent:
                name = prefix.split(".")[1]
                fresh = (
                    self.action_head.build_value_head() if name == "value_head" else self.action_head.build_noise_net()
                )
                setattr(self.action_head, name, fresh.to(dtype))
                logger.warning("the checkpoint has no %s; it is initialised at random", RL_ONLY[prefix])
        self._cast(dtype)
        self.set_trainable(**self._trainable)
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is not finite after loading")

    def _cast(self, dtype: torch.dtype) -> "Gr00tAgent":
        """Convert the parameters, not the buffers: rotary frequencies and noise bounds stay float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def save_pretrained(self, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint in the released format, with this policy's settings beside it.

        Files: `config.json`, `model.safetensors` (or shards with an index), `experiment_cfg/metadata.json`,
        `eagle2_hg_model/` (sizes and tokenizer) and `policy_config.json`.

        Args:
            folder: Made if need be.
            state_dict: The weights, where this process holds only shards of them (`accelerator.get_state_dict`).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write(folder)
        self.preprocessor.tokenizer.save(folder / EAGLE_FOLDER)
        # Under the tag that loading looks for; statistics of a dataset come with the tag of its own data config.
        tag = self.preprocessor.data_config.embodiment_tag
        write_metadata(folder / METADATA_PATH, replace(self.preprocessor.metadata, embodiment_tag=tag))
        write_weights(self, folder, state_dict=state_dict)
        saved = {
            "policy": asdict(self.policy),
            "data_config": self.preprocessor.data_config.to_json(),
            "trainable": self._trainable,
        }
        (folder / POLICY_FILE).write_text(json.dumps(saved, indent=2) + "\n")

    # -- what is trained -------------------------------------------------------------------------------------------

    def set_trainable(
        self,
        *,
        tune_visual: bool,
        tune_llm: bool,
        tune_projector: bool = True,
        tune_diffusion_model: bool = True,
        tune_value: bool = True,
    ) -> None:
        """Choose what is trained; the rest gets no gradient and stays in eval mode.

        As in the reference, `vlln`, the VL self-attention and the future tokens are trained whatever the flags say.

        Args:
            tune_visual: Vision tower and connector.
            tune_llm: Language model.
            tune_projector: State encoder, action encoder and decoder, position embedding.
            tune_diffusion_model: DiT.
            tune_value: Value head; turn it off where the loss does not use it (supervised fine-tuning under DDP).
        """
        self._trainable = {
            "tune_visual": tune_visual,
            "tune_llm": tune_llm,
            "tune_projector": tune_projector,
            "tune_diffusion_model": tune_diffusion_model,
            "tune_value": tune_value,
        }
        self.requires_grad_(True)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen_parts(self) -> Iterator[nn.Module]:
        eagle, head = self.backbone.eagle_model, self.action_head
        flags = self._trainable
        if not flags["tune_visual"]:
            yield from (eagle.vision_model, eagle.mlp1)
        if not flags["tune_llm"]:
            yield from (eagle.language_model, self.backbone.eagle_linear)
        if not flags["tune_projector"]:
            yield from (head.state_encoder, head.action_encoder, head.action_decoder, head.position_embedding)
        if not flags["tune_diffusion_model"]:
            yield head.model
        if not flags["tune_value"] and head.value_head is not None:
            yield head.value_head

    @property
    def backbone_is_frozen(self) -> bool:
        """True if no parameter of the backbone is trained, so that its features can be cached."""
        return not (self._trainable["tune_visual"] or self._trainable["tune_llm"])

    def train(self, mode: bool = True) -> "Gr00tAgent":
        """Set training mode; frozen parts stay in eval mode."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                part.eval()
        return self

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the backbone."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the value head."""
        head = self.action_head.value_head
        return [] if head is None else [p for p in head.parameters() if p.requires_grad]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the action head without the value head."""
        value = {id(p) for p in self.value_parameters()}
        return [p for p in self.action_head.parameters() if p.requires_grad and id(p) not in value]

    def param_groups(self, lr: float, value_lr: float) -> list[dict[str, Any]]:
        """Return optimiser groups named `policy` (backbone included where trained) and `value`."""
        groups = [
            {"name": "policy", "params": self.policy_parameters() + self.backbone_parameters(), "lr": lr},
            {"name": "value", "params": self.value_parameters(), "lr": value_lr},
        ]
        return [group for group in groups if group["params"]]

    # -- the agent -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.action_head.vlln.weight.device

    @property
    def image_size(self) -> int:
        """Height and width in pixels that cameras should have: the metadata's, or just enough for the centre crop.

        Raises:
            ValueError: The cameras of the metadata are not square or differ.
        """
        data_config = self.preprocessor.data_config
        known = {self.preprocessor.metadata.resolution(key) for key in data_config.video_keys}
        if known == {None}:
            return -(-int(self.config.image_size / data_config.crop_scale) // 16) * 16
        sides = {side for resolution in known if resolution is not None for side in resolution}
        if len(sides) != 1 or None in known:
            raise ValueError(f"the cameras have no common square size: {known} (height, width)")
        return sides.pop()

    def encode(self, obs: Observation) -> dict[str, Tensor]:
        """Return what of an observation does not depend on trained parameters, for storing and reuse.

        Args:
            obs: Observation.

        Returns:
            `state` float32 [B, 1, state], `valid_mask` bool [B, L], and with a frozen backbone
            `backbone_features` [B, L, D], detached; otherwise `pixels` uint8 [B, V, 3, size, size] and `input_ids`
            int64 [B, L]. The shapes are the same for every observation, except with `padding="left"`. Rows can be
            concatenated and indexed.
        """
        if "valid_mask" in obs:
            return dict(cast(Mapping[str, Tensor], obs))
        with torch.no_grad():
            input_ids, valid_mask = self.preprocessor.tokens(obs, self.device)
            encoded = {
                "state": self.preprocessor.state(obs, self.device),
                "valid_mask": valid_mask,
                "pixels": self.preprocessor.images(obs, self.device),
                "input_ids": input_ids,
            }
            rows = {name: len(tensor) for name, tensor in encoded.items()}
            if len(set(rows.values())) > 1:
                raise ValueError(f"the observation's parts differ in batch size: {rows}")
            if self.backbone_is_frozen:
                encoded["backbone_features"] = self._features(encoded)
                del encoded["pixels"], encoded["input_ids"]
        return encoded

    def forward(
        self, obs: Observation, action: FlowAction | None = None, *, sft_actions: Tensor | None = None, **options: Any
    ) -> Any:
        """Dispatch to `get_action_and_value`, or to `sft_loss` if `sft_actions` is given.

        DistributedDataParallel synchronises gradients only for calls through the wrapper, that is, through here.
        """
        if sft_actions is not None:
            return self.sft_loss(obs, sft_actions, **options)
        return self.get_action_and_value(obs, action, **options)

    def get_action_and_value(
        self,
        obs: Observation,
        action: FlowAction | None = None,
        *,
        generator: NoiseSource = None,
        noise_anneal: float = 1.0,
        draws: SamplingDraws | None = None,
    ) -> tuple[FlowAction, Tensor, Tensor, Tensor]:
        """Sample an action chunk with exploration noise, or score a stored one.

        Scoring with unchanged weights gives the rollout's log-probability bitwise in float32, on the same device and
        for the same rows in a batch.

        Args:
            obs: Observation, or `encode`'s result.
            action: Stored action to score; None samples.
            generator: Source of randomness for sampling; a sequence gives every row its own, so that what a row draws
                does not depend on its batch mates.
            noise_anneal: Fraction of the exploration noise left; scoring needs the value used when sampling.
            draws: Random numbers from outside; `generator`, a single one, draws what they leave out.

        Returns:
            action, log-probability, entropy, value [B]. Log-probability and entropy (nats, closed form) are [B],
            [B, C] or [B, C, a] by `logprob_level`, float32.

        Raises:
            ValueError: The policy has no value head, a stored chain has another number of steps or noise at others,
                or both a generator for each row and `draws` are given.
        """
        with self._without_dropout():
            context = self._context(obs)
            value = self._value(context)

            def velocity(x: Tensor, step: Tensor) -> Prediction:
                return self._predict(context, x, step, noise_anneal)

            if action is None:
                batch = context.state_features.shape[0]
                if isinstance(generator, Sequence):
                    if draws is not None:
                        raise ValueError("a generator for each row and draws exclude each other; give one of them")
                    draws, generator = self._draws_of_rows(generator, batch), None
                draws = SamplingDraws() if draws is None else draws
                noise = self._initial_noise(batch, generator) if draws.noise is None else draws.noise.to(self.device)
                index = draws.denoise_index
                if index is None:
                    index = self.sampler.draw_index(batch, self.device, generator)
                chain, scores = self.sampler.sample(
                    velocity,
                    noise,
                    index.to(self.device),
                    step_noise=draws.step_noise,
                    generator=generator,
                    noise_anneal=noise_anneal,
                )
                chain = chain.detach()
                action = FlowAction(chain, index, self.env_action(chain[:, -1]))
            else:
                scores = self.sampler.evaluate(velocity, action.chain, action.denoise_index, noise_anneal=noise_anneal)
        entropy = scores.entropy.expand_as(scores.log_prob)
        return action, self._reduce(scores.log_prob), self._reduce(entropy), value

    def get_value(self, obs: Observation) -> Tensor:
        """Return state values, float32 [B]."""
        with self._without_dropout(), self._autocast():
            features, valid_mask, state = self._inputs(obs)
            vl_embs = self.action_head.process_backbone(features, valid_mask)
            state_features = self.action_head.state_encoder(state, self.embodiment)
        return self._value(HeadContext(vl_embs, valid_mask, state_features, [], self.embodiment))

    @torch.no_grad()
    def predict(self, obs: Observation, *, generator: NoiseSource = None, noise: Tensor | None = None) -> Tensor:
        """Return the deterministic action chunk for the environment, float32 [B, C, a].

        Args:
            obs: Observation, or `encode`'s result.
            generator: Source of the initial noise; a sequence gives every row its own, so that a row's action does
                not depend on its batch mates' noise.
            noise: Initial noise [B, H, A] instead.
        """
        return self.env_action(self.predict_chunk(obs, generator=generator, noise=noise))

    @torch.no_grad()
    def predict_chunk(self, obs: Observation, *, generator: NoiseSource = None, noise: Tensor | None = None) -> Tensor:
        """Return the deterministic chunk in the network's normalised units, float32 [B, H, A]."""
        with self._without_dropout():
            context = self._context(obs)
            if noise is None:
                noise = self._initial_noise(context.state_features.shape[0], generator)
            return self.sampler.denoise(
                lambda x, step: self._predict(context, x, step, 1.0, learned_std=False), noise.to(self.device)
            )

    def sft_loss(
        self,
        obs: Observation,
        actions: Tensor,
        *,
        step_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the flow-matching loss of demonstrated actions, a scalar.

        Args:
            obs: Observation, or `encode`'s result.
            actions: [B, H, a] in the data convention: environment units, gripper 1 open, 0 close.
            step_mask: bool [B, H], True at steps that count (False past the end of an episode).
            generator: Source of noise and time.
            draws: Noise [B, H, A] and time [B] from outside.
        """
        target = self.preprocessor.normalise_actions(torch.as_tensor(actions).to(self.device))
        mask = torch.zeros_like(target)
        mask[..., : self.preprocessor.action_dim] = 1.0
        if step_mask is not None:
            mask = mask * step_mask.to(self.device)[..., None]
        if draws is None:
            draws = self._initial_noise(len(target), generator), self._training_time(len(target), generator)
        return self.flow_matching_loss(self._context(obs), target, mask, draws)

    def flow_matching_loss(
        self, context: HeadContext, target: Tensor, mask: Tensor, draws: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return sum(mask * error^2) / sum(mask) of the velocity at a random point between noise and `target`.

        Args:
            context: From `ActionHead.prepare`.
            target: Normalised actions [B, H, A].
            mask: [B, H, A], 1 where an element counts.
            draws: Noise [B, H, A] and time [B] in [0, 1].
        """
        noise, tau = draws
        point = (1 - tau[:, None, None]) * noise + tau[:, None, None] * target
        bucket = (tau * self.config.action_head.num_timestep_buckets).long()
        with self._autocast():
            velocity = self._run_velocity(context, point.to(context.state_features.dtype), bucket)[0]
        error = (velocity.float() - (target - noise)).square() * mask
        return error.sum() / mask.sum()

    def env_action(self, chunk: Tensor) -> Tensor:
        """Map a chunk [B, H, A] in normalised units to the executed environment actions, float32 [B, C, a]."""
        actions = self.preprocessor.unnormalise_actions(chunk[:, : self.policy.num_action_chunks])
        return self.preprocessor.to_env(actions)

    def compile_network(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile backbone and action head with torch.compile; results agree with the plain path to rounding.

        Log-probabilities of rollout and update then stay equal only if both run the compiled network.

        Args:
            mode: torch.compile's mode. `reduce-overhead` and `max-autotune` replay CUDA graphs: for small batches of
                one size, which launching kernels one by one holds up.
            backend: torch.compile's backend; `inductor` needs a C++ compiler on a CPU.
        """
        self._run_backbone = torch.compile(self.backbone.forward, mode=mode, backend=backend)
        self._run_prepare = torch.compile(self.action_head.prepare, mode=mode, backend=backend)
        self._run_velocity = torch.compile(self.action_head.velocity, mode=mode, backend=backend)
        self._uses_cuda_graphs = mode in ("reduce-overhead", "max-autotune")

    def _begin_call(self) -> None:
        """Let CUDA graphs overwrite what they returned in earlier calls."""
        if self._uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    # -- parts -----------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in `compute_dtype` where the parameters are kept in float32."""
        dtype = self.policy.torch_dtype
        needed = dtype != self.action_head.vlln.weight.dtype and dtype != torch.float32
        # Not autocast(enabled=False), which would switch off an autocast of the caller's.
        return torch.autocast(self.device.type, dtype=dtype) if needed else contextlib.nullcontext()

    @contextlib.contextmanager
    def _without_dropout(self) -> Generator[None]:
        """Turn dropout off: a log-probability has to be a function of its arguments."""
        active = [module for module in self._dropouts if module.training and module.p > 0]
        for module in active:
            module.training = False
        try:
            yield
        finally:
            for module in active:
                module.training = True

    def _features(self, encoded: Mapping[str, Tensor]) -> Tensor:
        pixels = pixels_from_bytes(encoded["pixels"].flatten(0, 1), self.action_head.vlln.weight.dtype)
        if self.policy.round_to_bf16:
            pixels = pixels.to(torch.bfloat16).to(pixels.dtype)
        mask = None if self.policy.padding == "masked" else encoded["valid_mask"]
        self._begin_call()
        with self._autocast():
            features = self._run_backbone(pixels, encoded["input_ids"], mask)
        return features.clone() if self._uses_cuda_graphs else features  # callers keep features over calls

    def _inputs(self, obs: Observation) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return backbone features, the mask of readable positions and the state, in the network's type."""
        encoded = self.encode(obs)
        if "backbone_features" in encoded:
            if not self.backbone_is_frozen and torch.is_grad_enabled():
                raise ValueError(
                    "the observation holds cached backbone features, but the backbone is trained; encode it again"
                )
            features = encoded["backbone_features"].to(self.device)
        else:
            features = self._features({name: tensor.to(self.device) for name, tensor in encoded.items()})
        readable = encoded["valid_mask"].to(self.device) if self.policy.padding == "masked" else None
        dtype = self.action_head.vlln.weight.dtype
        state = encoded["state"].to(self.device)
        if self.policy.round_to_bf16:
            state = state.to(torch.bfloat16)
        return features.to(dtype), readable, state.to(dtype)

    def _context(self, obs: Observation) -> HeadContext:
        features, readable, state = self._inputs(obs)
        self._begin_call()
        with self._autocast():
            return self._run_prepare(features, readable, state, self.embodiment)

    def _predict(
        self, context: HeadContext, x: Tensor, step: Tensor, noise_anneal: float, *, learned_std: bool = True
    ) -> Prediction:
        num_buckets, num_steps = self.config.action_head.num_timestep_buckets, self.policy.denoising_steps
        bucket = step * num_buckets // num_steps
        with self._autocast():
            velocity, hidden = self._run_velocity(context, x.to(context.state_features.dtype), bucket)
            net = self.action_head.reinflow_explore_noise_net
            std = net(hidden, noise_anneal) if net is not None and learned_std else None
        return Prediction(velocity.float(), std)

    def _value(self, context: HeadContext) -> Tensor:
        head = self.action_head.value_head
        if head is None:
            raise ValueError("this policy has no value head; build it with PolicyConfig(value_head=True)")
        with self._autocast():
            features = self.action_head.pooled(context, self.policy.value_pooling)
            if self.policy.value_inputs == "vl_and_state":
                features = torch.cat([features, context.state_features.flatten(1).to(features.dtype)], dim=-1)
            return head(features.detach() if self.policy.critic_detach else features)

    def _initial_noise(self, batch: int, generator: NoiseSource) -> Tensor:
        if isinstance(generator, Sequence):
            if len(generator) != batch:
                raise ValueError(f"{len(generator)} generators were given for {batch} rows; give one per row")
            return torch.cat([self._initial_noise(1, one) for one in generator])
        head = self.config.action_head
        source = self.device if generator is None else generator.device
        shape = (batch, head.action_horizon, head.action_dim)
        return torch.randn(shape, generator=generator, device=source).to(self.device)

    def _draws_of_rows(self, generators: Sequence[torch.Generator], batch: int) -> SamplingDraws:
        """Return what each row draws from a generator of its own."""
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators were given for {batch} rows; give one per row")
        head, sampler, num_steps = self.config.action_head, self.sampler, self.policy.denoising_steps
        shape = (1 + (num_steps if sampler.is_joint else 1), head.action_horizon, head.action_dim)
        rows = [torch.randn(shape, generator=one, device=one.device) for one in generators]
        index = [sampler.draw_index(1, one.device, one) for one in generators]
        normal = torch.stack(rows, dim=1).to(self.device)  # [1 + draws, B, H, A]
        # A chain with one stochastic step uses one draw, whichever step that is.
        return SamplingDraws(normal[0], torch.cat(index).to(self.device), normal[1:].expand(num_steps, -1, -1, -1))

    def _training_time(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """Draw tau = (s - b) / s, b ~ Beta(alpha, beta), float32 [B]."""
        head = self.config.action_head
        source = self.device if generator is None else generator.device
        # torch.distributions takes no generator. With beta = 1, the inverse of the distribution function is
        # u^(1/alpha); the released configuration has no other beta.
        if head.noise_beta_beta != 1.0:
            raise ValueError(f"noise_beta_beta={head.noise_beta_beta} is not supported (supported: 1.0)")
        uniform = torch.rand(batch, generator=generator, device=source).to(self.device)
        return (head.noise_s - uniform ** (1 / head.noise_beta_alpha)) / head.noise_s

    def _reduce(self, elements: Tensor) -> Tensor:
        """Reduce [B, E, H, A] to the executed, valid elements at the configured level."""
        executed = elements[:, :, : self.policy.num_action_chunks, : self.preprocessor.action_dim]
        joined = executed.sum(dim=1) if self.policy.joint_reduction == "sum" else executed.mean(dim=1)  # [B, C, a]
        if self.policy.logprob_level == "token":
            return joined
        return joined.sum(dim=-1) if self.policy.logprob_level == "action" else joined.sum(dim=(-2, -1))


def saved_policy(folder: Path) -> PolicyConfig:
    """Return the settings saved with a checkpoint, or the defaults for one that has none."""
    path = folder / POLICY_FILE
    return PolicyConfig.from_json(json.loads(path.read_text())["policy"]) if path.is_file() else PolicyConfig()


def preset_policy(name: PresetName) -> PolicyConfig:
    """Return the default settings of a preset; change some with `dataclasses.replace`."""
    policy = PolicyConfig()
    if name == "nano":
        policy = replace(policy, embodiment_id=0, value_hidden_dims=(256, 128))
    return policy


def _preprocessor(
    config: ModelConfig,
    policy: PolicyConfig,
    data_config: DataConfig,
    metadata: DatasetMetadata,
    tokenizer: PromptTokenizer | str | Path,
) -> Preprocessor:
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    length = policy.prompt_length
    if length is None:
        empty = prompt_text("", len(data_config.video_keys), config.num_image_tokens)
        # Rows of a multiple of 8 suit the matrix units.
        length = -(-(len(tokenizer.encode(empty)) + INSTRUCTION_TOKENS) // 8) * 8
    return Preprocessor(
        config,
        data_config,
        metadata,
        tokenizer,
        PromptLayout(padding=policy.padding, length=length),
        round_to_bf16=policy.round_to_bf16,
    )
