"""Sizes of a GR00T-N1.5 network, read from and written to the JSON files of released checkpoints.

A checkpoint has `config.json` (action head, number of language layers kept); the sizes of the vision tower and of
the language model stand in the Eagle config, which the released checkpoints do not hold. The full-size values ship in
`data/`; a folder `eagle2_hg_model/` beside `config.json` overrides them.

Keys that this package does not read are kept and written back unchanged.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

JsonDict = dict[str, Any]
PresetName = Literal["nano", "gr00t_n1d5"]

EAGLE_FOLDER = "eagle2_hg_model"

DATA = Path(__file__).parent / "data"


def _shipped(name: PresetName) -> tuple[JsonDict, JsonDict]:
    """Return the content of `config.json` and of the Eagle config that ship for a preset."""
    return (
        json.loads((DATA / f"{name}_config.json").read_text()),
        json.loads((DATA / f"{name}_eagle_config.json").read_text()),
    )


def _require(data: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise KeyError(f"{where} has no key {key!r}; present: {', '.join(sorted(data))}")
    return data[key]


def _only(data: Mapping[str, Any], key: str, allowed: Any, where: str) -> None:
    """Refuse a setting of the format that this implementation does not have."""
    if data.get(key, allowed) != allowed:
        raise ValueError(
            f"{where}.{key}={data[key]!r} is not supported (supported: {allowed!r}); "
            "released GR00T-N1.5 checkpoints use the supported value"
        )


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
    def from_json(cls, data: Mapping[str, Any], where: str) -> "TransformerConfig":
        """Read one of `diffusion_model_cfg`, `vl_self_attention_cfg`."""
        _only(data, "positional_embeddings", None, where)
        _only(data, "final_dropout", True, where)
        _only(data, "norm_type", "ada_norm", where)
        _only(data, "interleave_self_attention", True, where)
        return cls(
            num_layers=_require(data, "num_layers", where),
            num_attention_heads=_require(data, "num_attention_heads", where),
            attention_head_dim=_require(data, "attention_head_dim", where),
            dropout=_require(data, "dropout", where),
            output_dim=data.get("output_dim", 0),
            cross_attention_dim=data.get("cross_attention_dim", 0),
        )


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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ActionHeadConfig":
        """Read `action_head_cfg`."""
        where = "action_head_cfg"
        _only(data, "add_pos_embed", True, where)
        _only(data, "use_vlln", True, where)
        nested = {"diffusion_model": "diffusion_model_cfg", "vl_self_attention": "vl_self_attention_cfg"}
        values: JsonDict = {}
        for entry in fields(cls):
            if entry.name in nested:
                key = nested[entry.name]
                values[entry.name] = TransformerConfig.from_json(_require(data, key, where), f"{where}.{key}")
            elif entry.name in data:
                values[entry.name] = data[entry.name]
            elif entry.name in ("num_timestep_buckets", "noise_beta_alpha", "noise_beta_beta", "noise_s"):
                _require(data, entry.name, where)
        for required in ("action_dim", "action_horizon", "hidden_size", "input_embedding_dim", "max_state_dim"):
            _require(data, required, where)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole network. Build it with `from_json`, `from_folder` or `preset`.

    Attributes:
        action_head: Sizes of the action head.
        model_json: The content of `config.json`, written back on save.
        eagle_json: The content of the Eagle config, written back on save.
    """

    action_head: ActionHeadConfig
    model_json: JsonDict = field(repr=False)
    eagle_json: JsonDict = field(repr=False)

    @property
    def num_llm_layers(self) -> int:
        """Language layers kept (the reference deletes the rest)."""
        kept = self.model_json["backbone_cfg"]["select_layer"]
        return self.eagle_json["text_config"]["num_hidden_layers"] if kept < 0 else kept

    @property
    def image_size(self) -> int:
        """Height and width in pixels of one view at the network's input."""
        return self.eagle_json["vision_config"]["image_size"]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one view."""
        return (self.image_size // self.eagle_json["vision_config"]["patch_size"]) ** 2

    @property
    def num_vision_layers_run(self) -> int:
        """Vision layers whose output feeds the connector (the Eagle `select_layer`)."""
        num_layers = self.eagle_json["vision_config"]["num_hidden_layers"]
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
        head = ActionHeadConfig.from_json(_require(model_json, "action_head_cfg", "config.json"))
        backbone = _require(model_json, "backbone_cfg", "config.json")
        _require(backbone, "select_layer", "backbone_cfg")
        _only(eagle, "use_pixel_shuffle", False, "eagle config")
        _only(eagle, "mlp_connector_layers", 1, "eagle config")
        for part in ("text_config", "vision_config", "image_token_index", "select_layer"):
            _require(eagle, part, "eagle config")
        config = cls(action_head=head, model_json=copy.deepcopy(model_json), eagle_json=eagle)
        num_layers = eagle["text_config"]["num_hidden_layers"]
        if not 0 < config.num_llm_layers <= num_layers:
            raise ValueError(f"backbone_cfg.select_layer={config.num_llm_layers} is not in 1-{num_layers}")
        projected = backbone.get("project_to_dim")
        width = eagle["text_config"]["hidden_size"] if projected is None else projected
        if width != head.backbone_embedding_dim:
            raise ValueError(
                f"the backbone gives {width} features, but backbone_embedding_dim={head.backbone_embedding_dim}"
            )
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
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json; give a GR00T-N1.5 checkpoint folder (config.json, *.safetensors, "
                "experiment_cfg/metadata.json)"
            )
        eagle_path = (eagle_folder if eagle_folder is not None else folder / EAGLE_FOLDER) / "config.json"
        if eagle_folder is not None and not eagle_path.is_file():
            raise FileNotFoundError(f"eagle_folder={eagle_folder} has no config.json")
        eagle_json = json.loads(eagle_path.read_text()) if eagle_path.is_file() else None
        return cls.from_json(json.loads(path.read_text()), eagle_json)

    @classmethod
    def preset(cls, name: PresetName) -> "ModelConfig":
        """Return the released size (`gr00t_n1d5`, 2.4 G parameters) or `nano` (CPU size).

        Raises:
            ValueError: Unknown name.
        """
        if name in get_args(PresetName):
            return cls.from_json(*_shipped(name))
        raise ValueError(f"preset={name!r} is unknown (valid: {', '.join(get_args(PresetName))})")

    def write(self, folder: Path) -> None:
        """Write `config.json` and `eagle2_hg_model/config.json` under `folder`."""
        (folder / EAGLE_FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.model_json, indent=2) + "\n")
        (folder / EAGLE_FOLDER / "config.json").write_text(json.dumps(self.eagle_json, indent=2) + "\n")
