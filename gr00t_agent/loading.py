"""Building a `Gr00tAgent` from sizes, from a preset or from a checkpoint's folder, and saving it to one."""

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from gr00t_agent.action_head import ActionHead
from gr00t_agent.backbone import Backbone
from gr00t_agent.config import DATA, EAGLE_FOLDER, POLICY_FILE, ModelConfig, PresetName
from gr00t_agent.data_config import (
    METADATA_PATH,
    DataConfig,
    DatasetMetadata,
    LiberoFrankaDataConfig,
    read_metadata,
    write_metadata,
)
from gr00t_agent.files import JsonDict, has_file, naming, read_json, require, resolve_folder, typed, write_json
from gr00t_agent.policy import PolicyConfig, preset_policy
from gr00t_agent.transforms import (
    TOKENIZER_FILES,
    Preprocessor,
    PromptLayout,
    load_tokenizer,
    prompt_text,
    save_tokenizer,
)
from gr00t_agent.weights import RL_ONLY, load_weights, read_weights, to_device, to_dtype, write_weights

logger = logging.getLogger(__name__)

NANO_METADATA = DATA / "nano_metadata.json"
RELEASED_TOKENIZER = "Qwen/Qwen3-1.7B"
# Flags of `Gr00tAgent.set_trainable`.
TUNE_FLAGS = (
    "tune_visual",
    "tune_llm",
    "tune_projector",
    "tune_diffusion_model",
    "tune_value",
    "tune_vl_self_attention",
)
# Room for the instruction in a prompt of default length; the longest of LIBERO has 25 tokens with Qwen's tokenizer.
INSTRUCTION_TOKENS = 32


class Pretrained(nn.Module):
    """How an agent is built, loaded and saved: the part of `Gr00tAgent`, its one subclass, that is about files.

    Args:
        config: Network sizes.
        policy: How the network is used.
        preprocessor: Observations to inputs, outputs to actions.

    Attributes:
        trained_on: A note of what the weights were trained on, a JSON object such as `{"suite": "libero_goal"}`; None
            if there is none, as in released checkpoints. Whoever trains sets it; nothing in this package reads it, and
            `from_pretrained` and `save_pretrained` keep it.
    """

    # What `Gr00tAgent` adds and this class needs.
    backbone: Backbone
    action_head: ActionHead
    set_trainable: Callable[..., None]

    def __init__(self, config: ModelConfig, policy: PolicyConfig, preprocessor: Preprocessor) -> None:
        super().__init__()
        self.config = config
        self.policy = policy
        self.preprocessor = preprocessor
        self.trainable: dict[str, bool] = {}
        self.trained_on: JsonDict | None = None

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        policy: PolicyConfig,
        *,
        data_config: DataConfig,
        metadata: DatasetMetadata,
        tokenizer: PreTrainedTokenizerFast | str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> Self:
        """Build a network with random weights, all of it trainable.

        Args:
            config: Network sizes.
            policy: Settings.
            data_config: The robot.
            metadata: Statistics.
            tokenizer: Tokenizer, or what `load_tokenizer` takes.
            device: Where to build.
            dtype: Type of the parameters, PyTorch's or its name: float32, bfloat16, float16, float64.

        Raises:
            ValueError: The parts do not fit together, or there is no such device or type of parameters.
            KeyError: The statistics do not cover the data config.
        """
        device, dtype = to_device(device), to_dtype(dtype)
        preprocessor = make_preprocessor(config, policy, data_config, metadata, tokenizer)
        with torch.device(device):
            agent = cls(config, policy, preprocessor)
        agent.backbone.reset_position_table()
        agent.set_trainable(tune_visual=True, tune_llm=True)
        _cast(agent, dtype)
        return agent

    @classmethod
    def from_preset(
        cls,
        name: PresetName,
        *,
        policy: PolicyConfig | None = None,
        data_config: DataConfig | None = None,
        metadata: DatasetMetadata | None = None,
        tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> Self:
        """Build a network of a named size with random weights, all of it trainable.

        Args:
            name: `nano`, which ships with a tokenizer and LIBERO workspace statistics, or `gr00t_n1d5`.
            policy: Settings; None takes `preset_policy(name)`.
            data_config: The robot; None takes LIBERO's Franka with the network's action horizon.
            metadata: Statistics; None takes the ones that ship with `nano` (LIBERO's Franka only).
            tokenizer: Tokenizer, or what `load_tokenizer` takes; None takes the preset's own.
            device: Where to build.
            dtype: Type of the parameters, PyTorch's or its name: float32, bfloat16, float16, float64.

        Raises:
            ValueError: Unknown preset, device or type, or there are no statistics of the data config's embodiment.
            KeyError: The statistics do not cover the data config.
        """
        config = ModelConfig.preset(name)
        data_config = _default_data_config(config) if data_config is None else data_config
        if metadata is None:
            metadata = read_metadata(NANO_METADATA, data_config.embodiment_tag)
        if tokenizer is None:
            tokenizer = "nano" if name == "nano" else RELEASED_TOKENIZER
        return cls.from_config(
            config,
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
        tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
        eagle_folder: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
    ) -> Self:
        """Load a released checkpoint, or one that `save_pretrained` wrote.

        Args:
            path_or_hub_id: Folder, or hub name such as `nvidia/GR00T-N1.5-3B`.
            policy: Settings; None takes the saved ones, see `saved_policy`.
            data_config: The robot; None takes the saved one, or LIBERO's Franka with the network's action horizon.
            metadata: Statistics; None reads `experiment_cfg/metadata.json`.
            tokenizer: Tokenizer, or what `load_tokenizer` takes; None takes the checkpoint's, or Qwen3's.
            eagle_folder: Folder with the Eagle `config.json`, if not inside the checkpoint and not the released one.
            device: Where to put the weights.
            dtype: Type of the parameters, PyTorch's or its name: float32, bfloat16, float16, float64.

        Raises:
            FileNotFoundError: No such checkpoint, or a file of it is missing.
            KeyError: A JSON file lacks a key.
            ValueError: A file is damaged, of another format or says what is not supported; the parts do not fit
                together; tensors are unknown, missing or misshapen (all are listed), or not finite; there is no such
                device or type of parameters.
        """
        device, dtype = to_device(device), to_dtype(dtype)
        folder = resolve_checkpoint(path_or_hub_id)
        config = ModelConfig.from_folder(folder, eagle_folder)
        saved = _read_settings(folder, config)
        if policy is None:
            policy = _default_policy(config) if saved is None else saved.policy
        if data_config is None:
            data_config = _default_data_config(config) if saved is None else saved.data_config
        if metadata is None:
            metadata = read_metadata(folder / METADATA_PATH, data_config.embodiment_tag)
        if tokenizer is None:
            own = folder / EAGLE_FOLDER
            has_own = any(has_file(own / file) for file in (*TOKENIZER_FILES, "merges.txt"))
            tokenizer = own if has_own else RELEASED_TOKENIZER
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        with naming(folder):
            preprocessor = make_preprocessor(config, policy, data_config, metadata, tokenizer)
            with torch.device("meta"):
                agent = cls(config, policy, preprocessor)
        tensors = read_weights(folder)
        with naming(folder):
            absent = load_weights(agent, tensors, dtype, device)
            _materialise(agent, absent, device, dtype)
            noise_net = agent.action_head.reinflow_explore_noise_net
            if noise_net is not None:
                noise_net.check_std_range(policy.noise_std_range)
        if saved is not None:
            agent.set_trainable(**saved.trainable)
            agent.trained_on = saved.trained_on
        return agent

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        train_backbone: bool | None = None,
        train_vl_self_attention: bool | None = None,
        **changes: Any,
    ) -> Self:
        """Build from a preset's name, a checkpoint folder or a hub name, with some settings changed.

        Args:
            source: `nano`, `gr00t_n1d5`, or what `from_pretrained` takes.
            train_backbone: Train vision tower, connector and language model; None leaves it as it is.
            train_vl_self_attention: Train the VL self-attention; None leaves it as it is.
            changes: Fields of `PolicyConfig`; None leaves a field as it is.

        Raises:
            TypeError: A field that `PolicyConfig` does not have; the message lists those that it has.
        """
        _check_changes(changes)
        given = {name: value for name, value in changes.items() if value is not None}
        preset = _preset_name(source)
        if preset is not None:
            agent = cls.from_preset(preset, policy=replace(preset_policy(preset), **given))
        else:
            policy = saved_policy(resolve_checkpoint(source))
            agent = cls.from_pretrained(source, policy=replace(policy, **given))
        flags = {
            "tune_visual": train_backbone,
            "tune_llm": train_backbone,
            "tune_vl_self_attention": train_vl_self_attention,
        }
        chosen = {name: flag for name, flag in flags.items() if flag is not None}
        if chosen:
            agent.set_trainable(**(agent.trainable | chosen))
        return agent

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
        self.config.write(folder, denoising_steps=self.policy.denoising_steps)
        save_tokenizer(self.preprocessor.tokenizer, folder / EAGLE_FOLDER)
        # Under the tag that loading looks for; statistics of a dataset come with the tag of its own data config.
        tag = self.preprocessor.data_config.embodiment_tag
        write_metadata(folder / METADATA_PATH, replace(self.preprocessor.metadata, embodiment_tag=tag))
        write_weights(self, folder, state_dict=state_dict)
        saved: JsonDict = {
            "policy": asdict(self.policy),
            "data_config": self.preprocessor.data_config.to_json(),
            "trainable": self.trainable,
        }
        if self.trained_on is not None:
            saved["trained_on"] = self.trained_on
        write_json(folder / POLICY_FILE, saved)


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """Return the folder of a checkpoint, downloaded if it is a hub name.

    Raises:
        FileNotFoundError: Neither a folder nor of the form `owner/name`, or the hub does not give it.
    """
    patterns = ["*.json", "*.safetensors", "*.txt"]
    return resolve_folder("checkpoint", path_or_hub_id, "for example nvidia/GR00T-N1.5-3B", allow_patterns=patterns)


class _Settings(NamedTuple):
    """What `save_pretrained` keeps beside weights and sizes."""

    policy: PolicyConfig
    data_config: DataConfig
    trainable: dict[str, bool]
    trained_on: JsonDict | None


def _read_settings(folder: Path, config: ModelConfig) -> _Settings | None:
    """Return what `policy_config.json` holds, None if the checkpoint has none; `config` is what `config.json` holds."""
    path = folder / POLICY_FILE
    if not has_file(path):
        return None
    saved = read_json(path)
    *needed, noted = _Settings._fields
    if not set(needed) <= set(saved) <= {*needed, noted}:
        raise ValueError(
            f"{path} has the entries {', '.join(saved) or 'none'}, but this package writes {', '.join(needed)} and "
            f"perhaps {noted}; another program or a newer version wrote it. Delete it to load the checkpoint with "
            "default settings"
        )
    with naming(path):
        trainable = typed(saved["trainable"], Mapping[str, bool], "trainable")
        if unknown := sorted(set(trainable) - set(TUNE_FLAGS)):
            raise ValueError(f"trainable has the unknown flag(s) {', '.join(unknown)} (known: {', '.join(TUNE_FLAGS)})")
        for flag in ("tune_visual", "tune_llm"):
            require(trainable, flag, "trainable")
        policy, data_config = PolicyConfig.from_json(saved["policy"]), DataConfig.from_json(saved["data_config"])
        head = config.action_head
        for name, value, other, expected in (
            ("policy.denoising_steps", policy.denoising_steps, "num_inference_timesteps", head.num_inference_timesteps),
            ("data_config.action_horizon", data_config.action_horizon, "action_horizon", head.action_horizon),
        ):
            if value != expected:
                raise ValueError(f"{name}={value}, but {other}={expected} in config.json; make them equal")
        trained_on = typed(saved[noted], dict, noted) if noted in saved else None
        return _Settings(policy, data_config, trainable, trained_on)


def _default_policy(config: ModelConfig) -> PolicyConfig:
    return PolicyConfig(denoising_steps=config.action_head.num_inference_timesteps)


def _default_data_config(config: ModelConfig) -> DataConfig:
    return LiberoFrankaDataConfig(action_horizon=config.action_head.action_horizon)


def saved_policy(folder: Path) -> PolicyConfig:
    """Return the settings saved with a checkpoint; for one that has none, the defaults with its own denoising steps.

    Raises:
        FileNotFoundError, KeyError, ValueError: As in `Pretrained.from_pretrained`.
    """
    config = ModelConfig.from_folder(folder)
    saved = _read_settings(folder, config)
    return _default_policy(config) if saved is None else saved.policy


def saved_data_config(source: str | Path) -> DataConfig:
    """Return the data config that `Pretrained.load` of a preset's name, a folder or a hub name gives an agent.

    Raises:
        FileNotFoundError, KeyError, ValueError: As in `Pretrained.from_pretrained`.
    """
    preset = _preset_name(source)
    if preset is not None:
        return _default_data_config(ModelConfig.preset(preset))
    folder = resolve_checkpoint(source)
    config = ModelConfig.from_folder(folder)
    saved = _read_settings(folder, config)
    return _default_data_config(config) if saved is None else saved.data_config


def _preset_name(source: str | Path) -> PresetName | None:
    return next((name for name in get_args(PresetName) if name == str(source)), None)


def _check_changes(changes: Mapping[str, Any]) -> None:
    """Raise TypeError unless all are fields of `PolicyConfig`."""
    valid = ["train_backbone", "train_vl_self_attention", *(field.name for field in fields(PolicyConfig))]
    for name in changes:
        if name not in valid:
            nearest = difflib.get_close_matches(name, valid, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"load() got an unexpected keyword argument {name!r}{hint} (valid: {', '.join(valid)})")


def make_preprocessor(
    config: ModelConfig,
    policy: PolicyConfig,
    data_config: DataConfig,
    metadata: DatasetMetadata,
    tokenizer: PreTrainedTokenizerFast | str | Path,
) -> Preprocessor:
    """Return the preprocessor of a network of these sizes, used as `policy` says.

    Args:
        config: Network sizes.
        policy: Settings.
        data_config: The robot.
        metadata: Statistics.
        tokenizer: Tokenizer, or what `load_tokenizer` takes.

    Raises:
        ValueError: The parts do not fit together.
        KeyError: The statistics do not cover the data config.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    length, limit = policy.prompt_length, config.text.get("max_position_embeddings")
    if length is not None and limit is not None and length > limit:
        raise ValueError(f"prompt_length={length} exceeds the language model's max_position_embeddings={limit}")
    empty = prompt_text("", len(data_config.video_keys), config.num_image_tokens)
    needed = len(tokenizer.encode(empty, add_special_tokens=False))
    if length is None:
        # Rows of a multiple of 8 suit the matrix units.
        length = -(-(needed + INSTRUCTION_TOKENS) // 8) * 8
    elif length <= needed:
        raise ValueError(f"prompt_length={length} leaves no room for an instruction; give more than {needed} tokens")
    return Preprocessor(
        config,
        data_config,
        metadata,
        tokenizer,
        PromptLayout(padding=policy.padding, length=length),
        round_to_bf16=policy.round_to_bf16,
    )


def _materialise(agent: Pretrained, absent: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Finish a network that was built on the meta device: buffers, and RL-only modules without weights."""
    eagle, head = agent.backbone.eagle_model, agent.action_head
    embeddings = eagle.vision_core.embeddings
    with torch.device(device):
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand((1, -1))
        llm = eagle.language_model.model
        llm.rotary_emb = type(llm.rotary_emb)(config=llm.config)
        for prefix in absent:
            name = prefix.split(".")[1]
            fresh = head.build_value_head() if name == "value_head" else head.build_noise_net()
            setattr(head, name, fresh.to(dtype))
            logger.warning("the checkpoint has no %s; it is initialised at random", RL_ONLY[prefix])
    _cast(agent, dtype)
    agent.set_trainable(**agent.trainable)
    for name, tensor in agent.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite after loading")


def _cast(agent: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters, not the buffers: rotary frequencies and noise bounds stay float32."""
    for parameter in agent.parameters():
        parameter.data = parameter.data.to(dtype)
