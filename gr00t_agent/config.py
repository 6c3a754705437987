"""Sizes of a GR00T-N1.5 network, read from and written to the JSON files of released checkpoints.

A checkpoint has `config.json` (action head, number of language layers kept); the sizes of the vision tower and of
the language model stand in the Eagle config, which the released checkpoints do not hold. The full-size values ship in
`data/`; a folder `eagle2_hg_model/` beside `config.json` overrides them.

Keys that this package does not read are kept and written back unchanged.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from gr00t_agent.files import JsonDict, has_file, naming, read_json, require, typed, write_json

PresetName = Literal["nano", "gr00t_n1d5"]

# Seeds of a served policy's noise; an observation's seed too.
MAX_SEED = 2**63 - 1

EAGLE_FOLDER = "eagle2_hg_model"
# Settings of the policy, which this package keeps beside weights and sizes; released checkpoints have none.
POLICY_FILE = "policy_config.json"

DATA = Path(__file__).parent / "data"

MODEL_TYPE = "gr00t_n1_5"
# `model_type` and architecture in config.json: gr00t_n1 and GR00T_N1 of N1, gr00t_n1_5 and GR00T_N1_5, Gr00tN1d6 ...
GENERATION = re.compile(r"gr00t_?n(\d+)(?:[_d.](\d+))?", re.IGNORECASE)

# Files by which the checkpoints of trainers' other policies are known.
OTHER_POLICIES = {
    "state_agent.json": "a small policy on the robot's state",
    "noise_actor.json": "a noise actor of DSRL, which steers a GR00T",
}
# A run's checkpoints, by iterations of RL or steps of fine-tuning.
CHECKPOINT_NAME = re.compile(r"(?:iteration|step)_(\d+)")

# What of the Eagle config's two sections reaches the network, and of which type it is; nothing else does. What is
# absent and not required has transformers' default, as where transformers writes such files.
TEXT_FIELDS: dict[str, type] = {
    "attention_bias": bool,
    "head_dim": int,
    "hidden_act": str,
    "hidden_size": int,
    "initializer_range": float,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "vocab_size": int,
}
VISION_FIELDS: dict[str, type] = {
    "hidden_act": str,
    "hidden_size": int,
    "image_size": int,
    "intermediate_size": int,
    "layer_norm_eps": float,
    "num_attention_heads": int,
    "num_channels": int,
    "num_hidden_layers": int,
    "patch_size": int,
}
EAGLE_REQUIRED = (
    "head_dim",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "patch_size",
    "rope_theta",
    "vocab_size",
)
# Far above those of any network: a number beyond is damage, of which a network could be built for hours.
MAX_LAYERS, MAX_SIZE = 1000, 10_000_000
# Names of attention kernels that files of this format carry. None is used: see `backbone`.
ATTENTION_KEYS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
ATTENTION_NAMES = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _shipped(name: PresetName) -> tuple[JsonDict, JsonDict]:
    """Return the content of `config.json` and of the Eagle config that ship for a preset."""
    return (
        json.loads((DATA / f"{name}_config.json").read_text()),
        json.loads((DATA / f"{name}_eagle_config.json").read_text()),
    )


def _what_to_give(folder: Path) -> str:
    """Return what to do about a folder that is no checkpoint of a GR00T."""
    for file, kind in OTHER_POLICIES.items():
        if (folder / file).is_file():
            return (
                f"by its {file} it is {kind}, which cannot be loaded as a GR00T; algorithms/eval_gr00t.py evaluates it"
            )
    found = [path for parent in (folder / "checkpoints", folder) for path in parent.glob("*_*") if path.is_dir()]
    numbered = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in found}
    saved = {path: int(match[1]) for path, match in numbered.items() if match}
    if saved:
        return f"checkpoints of a run lie inside: take {max(saved, key=lambda path: saved[path])}"
    return "give a GR00T-N1.5 checkpoint folder (config.json, *.safetensors, experiment_cfg/metadata.json)"


def _only(data: Mapping[str, Any], key: str, allowed: Any, where: str) -> None:
    """Refuse a setting of the format that this implementation does not have."""
    value = data.get(key, allowed)
    # To Python, True is 1.
    if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
        raise ValueError(
            f"{where}.{key}={value!r} is not supported (supported: {allowed!r}); "
            "released GR00T-N1.5 checkpoints use the supported value"
        )


def _check_generation(model_json: Mapping[str, Any]) -> None:
    """Refuse the `config.json` of another generation of GR00T, or of another program's policy."""
    kind = model_json.get("model_type", MODEL_TYPE)
    architectures: Any = model_json.get("architectures")
    for name in [kind, *(architectures if isinstance(architectures, list) else [architectures])]:
        found = GENERATION.search(name) if isinstance(name, str) else None
        if found and found.groups() != ("1", "5"):
            generation = "N" + ".".join(filter(None, found.groups()))
            raise ValueError(
                f"{name!r} is GR00T {generation}, another network; only N1.5 is supported (model_type {MODEL_TYPE!r}), "
                "for example nvidia/GR00T-N1.5-3B"
            )
    if "type" in model_json and "action_head_cfg" not in model_json:
        raise ValueError(
            f"config.json is LeRobot's description of a policy (type={model_json['type']!r}); give a checkpoint in "
            "NVIDIA's format, whose config.json has action_head_cfg"
        )
    if kind != MODEL_TYPE:
        raise ValueError(f"model_type={kind!r} is not GR00T-N1.5 (supported: {MODEL_TYPE!r})")


def _eagle_section(eagle: JsonDict, name: str, kinds: Mapping[str, type], model_type: str) -> JsonDict:
    """Return what of a section of the Eagle config reaches the network."""
    where = f"eagle config {name}"
    section = typed(require(eagle, name, "eagle config"), dict, where)
    _only(section, "model_type", model_type, where)
    _only(section, "attention_dropout", 0, where)
    _check_attention_name(section, where)
    found: JsonDict = {}
    for key, kind in kinds.items():
        if key not in section and key not in EAGLE_REQUIRED:
            continue
        found[key] = typed(require(section, key, where), kind, f"{where}.{key}")
        if kind is not bool and kind is not str:
            _check_size(key, found[key], where)
    return found


def _check_size(name: str, value: float, where: str) -> None:
    limit = MAX_LAYERS if name in ("num_layers", "num_hidden_layers") else MAX_SIZE
    if value <= 0:
        raise ValueError(f"{where}.{name}={value} must be positive")
    if isinstance(value, int) and value > limit:
        raise ValueError(f"{where}.{name}={value} is above {limit}, which no network reaches; the file is damaged")


def _check_multiple(data: Mapping[str, Any], key: str, divisor: str, where: str) -> None:
    if data[key] % data[divisor]:
        raise ValueError(f"{where}.{key}={data[key]} is no multiple of {divisor}={data[divisor]}")


def _check_attention_name(data: Mapping[str, Any], where: str) -> None:
    for key in ATTENTION_KEYS:
        if data.get(key) not in ATTENTION_NAMES:
            raise ValueError(
                f"{where}.{key}={data[key]!r} is no attention of transformers' own (allowed: "
                f"{', '.join(map(str, ATTENTION_NAMES))}); another name would make transformers load code of that name"
            )


def _typed_fields(cls: type, data: Mapping[str, Any], where: str) -> JsonDict:
    """Return the entries that are fields of a dataclass, of the right type and in range."""
    hints = get_type_hints(cls)
    found = {f.name: typed(data[f.name], hints[f.name], f"{where}.{f.name}") for f in fields(cls) if f.name in data}
    for name, value in found.items():
        if name != "dropout":
            _check_size(name, value, where)
        elif not 0 <= value < 1:
            raise ValueError(f"{where}.{name}={value} is not in [0, 1)")
    return found


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One transformer of the action head: the DiT or the vision-language self-attention.

    Attributes:
        num_layers: Number of blocks.
        num_attention_heads: Heads per attention.
        attention_head_dim: Width of a head; heads x width is the width of the residual stream.
        dropout: Probability of the four dropouts of a block.
        output_dim: Width after the output projection (DiT only, otherwise 0).
        cross_attention_dim: Width of the keys' source (DiT only, otherwise 0).
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    dropout: float
    output_dim: int = 0
    cross_attention_dim: int = 0

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str, *, is_dit: bool) -> "TransformerConfig":
        """Read `diffusion_model_cfg` (`is_dit`) or `vl_self_attention_cfg`."""
        needed = ["num_layers", "num_attention_heads", "attention_head_dim", "dropout", "positional_embeddings"]
        supported: JsonDict = {"positional_embeddings": None, "final_dropout": True}
        # What the reference's code takes as well, and released files leave at its defaults.
        supported |= {"activation_fn": "gelu-approximate", "attention_bias": True, "upcast_attention": False}
        supported |= {"norm_eps": 1e-5, "norm_elementwise_affine": not is_dit}
        supported["norm_type"] = "ada_norm" if is_dit else "layer_norm"
        if is_dit:
            needed += ["interleave_self_attention", "output_dim", "cross_attention_dim"]
            supported["interleave_self_attention"] = True
        else:  # has no such thing, and the reference ignores the entries
            data = {key: value for key, value in data.items() if key not in ("output_dim", "cross_attention_dim")}
        # Where the reference's default is another one, the entry is needed.
        for key in needed:
            require(data, key, where)
        for key, allowed in supported.items():
            _only(data, key, allowed, where)
        return cls(**_typed_fields(cls, data, where))


@dataclass(frozen=True, kw_only=True)
class ActionHeadConfig:
    """Sizes of the flow-matching action head (`action_head_cfg`), under the names of the released file."""

    action_dim: int
    action_horizon: int
    backbone_embedding_dim: int
    hidden_size: int
    input_embedding_dim: int
    max_state_dim: int
    num_target_vision_tokens: int
    num_inference_timesteps: int
    diffusion_model: TransformerConfig
    vl_self_attention: TransformerConfig
    num_timestep_buckets: int = 1000
    noise_beta_alpha: float = 1.5
    noise_beta_beta: float = 1.0
    noise_s: float = 0.999
    # The released config.json has neither of the next two; these are the reference code's defaults.
    max_num_embodiments: int = 32
    max_seq_len: int = 1024

    def __post_init__(self) -> None:
        if self.diffusion_model.width != self.input_embedding_dim:
            raise ValueError(
                f"heads x head width of the DiT is {self.diffusion_model.width}, "
                f"but input_embedding_dim={self.input_embedding_dim}; they must be equal"
            )
        if self.diffusion_model.output_dim != self.hidden_size:
            raise ValueError(
                f"DiT output_dim={self.diffusion_model.output_dim} must equal hidden_size={self.hidden_size}"
            )
        for name, width in (
            ("heads x head width of vl_self_attention_cfg", self.vl_self_attention.width),
            ("cross_attention_dim", self.diffusion_model.cross_attention_dim),
        ):
            if width != self.backbone_embedding_dim:
                raise ValueError(
                    f"{name} is {width}, but backbone_embedding_dim={self.backbone_embedding_dim}; they must be equal"
                )
        if self.action_horizon > self.max_seq_len:
            raise ValueError(f"action_horizon={self.action_horizon} exceeds max_seq_len={self.max_seq_len}")
        if self.num_inference_timesteps > self.num_timestep_buckets:
            raise ValueError(
                f"num_inference_timesteps={self.num_inference_timesteps} exceeds "
                f"num_timestep_buckets={self.num_timestep_buckets}; steps need times of their own"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ActionHeadConfig":
        """Read `action_head_cfg`."""
        where = "action_head_cfg"
        _only(data, "add_pos_embed", True, where)
        _only(data, "use_vlln", True, where)
        # Times are drawn from Beta(alpha, 1), by the inverse of its distribution function.
        _only(data, "noise_beta_beta", 1.0, where)
        # The last two are in no released file.
        optional = ("max_num_embodiments", "max_seq_len")
        nested = {"diffusion_model": "diffusion_model_cfg", "vl_self_attention": "vl_self_attention_cfg"}
        for entry in fields(cls):
            if entry.name not in optional:
                require(data, nested.get(entry.name, entry.name), where)
        transformers = {
            name: TransformerConfig.from_json(
                typed(data[key], dict, f"{where}.{key}"), f"{where}.{key}", is_dit=name == "diffusion_model"
            )
            for name, key in nested.items()
        }
        plain = {key: value for key, value in data.items() if key not in nested}
        head = cls(**transformers, **_typed_fields(cls, plain, where))
        _only(data, "max_action_dim", head.action_dim, where)
        return head


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole network. Build it with `from_json`, `from_folder` or `preset`.

    Attributes:
        action_head: Sizes of the action head.
        text: Arguments of transformers' `Qwen3Config`, with all layers.
        vision: Arguments of transformers' `SiglipVisionConfig`.
        model_json: The content of `config.json`, written back on save.
        eagle_json: The content of the Eagle config, written back on save.
    """

    action_head: ActionHeadConfig
    text: JsonDict = field(repr=False)
    vision: JsonDict = field(repr=False)
    model_json: JsonDict = field(repr=False)
    eagle_json: JsonDict = field(repr=False)

    @property
    def num_llm_layers(self) -> int:
        """Language layers kept (the reference deletes the rest)."""
        kept = self.model_json["backbone_cfg"]["select_layer"]
        return self.text["num_hidden_layers"] if kept == -1 else kept

    @property
    def projected_width(self) -> int | None:
        """Width to which backbone features are projected, None if they are not."""
        return self.model_json["backbone_cfg"].get("project_to_dim")

    @property
    def image_size(self) -> int:
        """Height and width in pixels of one view at the network's input."""
        return self.vision["image_size"]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one view."""
        return (self.image_size // self.vision["patch_size"]) ** 2

    @property
    def num_vision_layers_run(self) -> int:
        """Vision layers whose output feeds the connector (the Eagle `select_layer`)."""
        num_layers = self.vision["num_hidden_layers"]
        select = self.eagle_json["select_layer"]
        # hidden_states has one entry more than there are layers; index -1 is the last layer's output.
        return num_layers + 1 + select if select < 0 else select

    @property
    def image_token_id(self) -> int:
        """Token id whose embedding the image features replace."""
        return self.eagle_json["image_token_index"]

    @classmethod
    def from_json(cls, model_json: JsonDict, eagle_json: JsonDict | None = None) -> "ModelConfig":
        """Build from parsed JSON.

        Args:
            model_json: Content of `config.json`.
            eagle_json: Content of the Eagle config; None takes the released one.

        Raises:
            KeyError: A needed key is missing.
            ValueError: A setting is inconsistent or not supported.
        """
        eagle = _shipped("gr00t_n1d5")[1] if eagle_json is None else copy.deepcopy(eagle_json)
        _check_generation(model_json)
        head_json = typed(require(model_json, "action_head_cfg", "config.json"), dict, "action_head_cfg")
        head = ActionHeadConfig.from_json(head_json)
        for key in ("action_dim", "action_horizon"):
            if model_json.get(key, getattr(head, key)) != getattr(head, key):
                raise ValueError(
                    f"{key}={model_json[key]!r}, but action_head_cfg.{key}={getattr(head, key)}; they must be equal"
                )
        backbone = typed(require(model_json, "backbone_cfg", "config.json"), dict, "backbone_cfg")
        typed(require(backbone, "select_layer", "backbone_cfg"), int, "backbone_cfg.select_layer")
        _only(backbone, "reproject_vision", False, "backbone_cfg")
        projected = typed(backbone.get("project_to_dim"), int | None, "backbone_cfg.project_to_dim")
        if projected is not None:
            _check_size("project_to_dim", projected, "backbone_cfg")
        for data, where in ((model_json, "config.json"), (backbone, "backbone_cfg"), (eagle, "eagle config")):
            _check_attention_name(data, where)
            _only(data, "quantization_config", None, where)
        _only(eagle, "model_type", "eagle_2_5_vl", "eagle config")
        _only(eagle, "use_pixel_shuffle", False, "eagle config")
        _only(eagle, "mlp_connector_layers", 1, "eagle config")
        for key in ("image_token_index", "select_layer"):
            typed(require(eagle, key, "eagle config"), int, f"eagle config {key}")
        text = _eagle_section(eagle, "text_config", TEXT_FIELDS, "qwen3")
        supported: JsonDict = {"hidden_act": "silu", "use_sliding_window": False}
        supported |= dict.fromkeys(("rope_parameters", "rope_scaling", "sliding_window"))
        for key, allowed in supported.items():
            _only(eagle["text_config"], key, allowed, "eagle config text_config")
        layer_types = eagle["text_config"].get("layer_types")
        typed(layer_types, tuple[Literal["full_attention"], ...] | None, "eagle config text_config.layer_types")
        _check_multiple(text, "num_attention_heads", "num_key_value_heads", "eagle config text_config")
        if text["head_dim"] % 2:
            raise ValueError(
                f"eagle config text_config.head_dim={text['head_dim']} is odd; rotary embeddings need pairs"
            )
        if not 0 <= eagle["image_token_index"] < text["vocab_size"]:
            raise ValueError(
                f"eagle config image_token_index={eagle['image_token_index']} is no token: vocab_size="
                f"{text['vocab_size']}"
            )
        vision = _eagle_section(eagle, "vision_config", VISION_FIELDS, "siglip_vision_model")
        for key, allowed in {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}.items():
            _only(vision, key, allowed, "eagle config vision_config")
        # A pooling head, which nothing reads, is there unless the file says otherwise.
        has_head = typed(eagle["vision_config"].get("vision_use_head", True), bool, "vision_config.vision_use_head")
        vision["vision_use_head"] = has_head
        _only(eagle, "force_image_size", vision["image_size"], "eagle config")
        _check_multiple(vision, "image_size", "patch_size", "eagle config vision_config")
        _check_multiple(vision, "hidden_size", "num_attention_heads", "eagle config vision_config")
        config = cls(action_head=head, text=text, vision=vision, model_json=copy.deepcopy(model_json), eagle_json=eagle)
        for where, value, limit in (
            ("backbone_cfg.select_layer", config.num_llm_layers, text["num_hidden_layers"]),
            ("eagle config select_layer", config.num_vision_layers_run, vision["num_hidden_layers"]),
        ):
            if not 0 < value <= limit:
                raise ValueError(f"{where} selects layer {value}, which is not in 1-{limit}")
        width = text["hidden_size"]
        if (projected or width) != head.backbone_embedding_dim:
            raise ValueError(
                f"the backbone gives {projected or width} features, but "
                f"backbone_embedding_dim={head.backbone_embedding_dim}"
            )
        if model_json.get("hidden_size", width) != width:
            raise ValueError(f"hidden_size={model_json['hidden_size']!r}, but text_config.hidden_size={width}")
        return config

    @classmethod
    def from_folder(cls, folder: Path, eagle_folder: Path | None = None) -> "ModelConfig":
        """Read `config.json` of a checkpoint folder.

        Args:
            folder: Checkpoint folder.
            eagle_folder: Folder with the Eagle `config.json`; None takes `<folder>/eagle2_hg_model` where it exists,
                otherwise the released sizes.

        Raises:
            FileNotFoundError: `config.json` is missing.
            KeyError: A needed key is missing.
            ValueError: A file is damaged or another generation's, or a setting is inconsistent or not supported.
        """
        path = folder / "config.json"
        if not has_file(path):
            raise FileNotFoundError(f"{folder} has no config.json; {_what_to_give(folder)}")
        eagle_path = (eagle_folder if eagle_folder is not None else folder / EAGLE_FOLDER) / "config.json"
        has_eagle = has_file(eagle_path)
        if eagle_folder is not None and not has_eagle:
            raise FileNotFoundError(f"eagle_folder={eagle_folder} has no config.json")
        model_json = read_json(path)
        eagle_json = read_json(eagle_path) if has_eagle else None
        with naming(folder):
            return cls.from_json(model_json, eagle_json)

    @classmethod
    def preset(cls, name: PresetName) -> "ModelConfig":
        """Return the released size (`gr00t_n1d5`, 2.4 G parameters) or `nano` (CPU size).

        Raises:
            ValueError: Unknown name.
        """
        if name in get_args(PresetName):
            return cls.from_json(*_shipped(name))
        raise ValueError(f"preset={name!r} is unknown (valid: {', '.join(get_args(PresetName))})")

    def write(self, folder: Path, *, denoising_steps: int) -> None:
        """Write `config.json`, which tells others the number of denoising steps too, and the Eagle config."""
        (folder / EAGLE_FOLDER).mkdir(parents=True, exist_ok=True)
        head = self.model_json["action_head_cfg"] | {"num_inference_timesteps": denoising_steps}
        for path, data in (
            (folder / "config.json", self.model_json | {"action_head_cfg": head}),
            (folder / EAGLE_FOLDER / "config.json", self.eagle_json),
        ):
            write_json(path, data)
