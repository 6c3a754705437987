"""Observations to network inputs, and network outputs to environment actions. Batched, on any device.

Shape legend: B batch, V camera views, L prompt tokens, H action horizon, A padded action width, a valid action width.

The order of operations is that of NVIDIA's evaluation transforms: float, centre crop, antialiased bilinear resize,
truncation to 8 bits, (x - 127.5) / 127.5; state parts normalised one by one and zero-padded; chat prompt with one
image placeholder per view.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

from gr00t_agent.config import DATA, ModelConfig
from gr00t_agent.data_config import DataConfig, DatasetMetadata, NormalisationMode
from gr00t_agent.files import has_file, read_json, refuse_lfs_pointer, resolve_folder, typed

Observation = Mapping[str, Any]
PaddingMode = Literal["masked", "left", "right"]

IMAGE_OPEN, IMAGE_CONTEXT, IMAGE_CLOSE = "<img>", "<IMG_CONTEXT>", "</img>"
# Tokens that Eagle appends to Qwen3's vocabulary, in this order, from id 151669 on.
EAGLE_TOKENS = (
    IMAGE_CONTEXT,
    IMAGE_OPEN,
    IMAGE_CLOSE,
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<interval>",
    "</interval>",
)
PAD_TOKEN = "<|endoftext|>"
# Tokens of the chat prompt, each of which must be one token to the tokenizer.
PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>", IMAGE_OPEN, IMAGE_CONTEXT, IMAGE_CLOSE, PAD_TOKEN)
NANO_TOKENIZER = DATA / "nano_tokenizer.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    """Return the id of a token, None if the tokenizer does not have it."""
    found = cast(int | None, tokenizer.convert_tokens_to_ids(token))
    # Of a token that it does not have, a tokenizer may return the id of its unknown token.
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from files; no code of theirs runs.

    Args:
        source: `nano` for the one that ships with this package; a `tokenizer.json`; a folder with one, or with
            Qwen's `vocab.json` and `merges.txt`; or the hub name of such a folder, e.g. `Qwen/Qwen3-1.7B`. Eagle's
            image tokens are appended to a plain Qwen tokenizer.

    Raises:
        FileNotFoundError: A folder holds no tokenizer, or there is neither such a file or folder nor hub name.
        ValueError: A file is damaged, or `added_tokens.json` gives ids that do not follow those of `vocab.json`.
    """
    path = NANO_TOKENIZER if source == "nano" else Path(source)
    if not path.is_file():
        hint = "give a tokenizer.json, a folder with one, or for example Qwen/Qwen3-1.7B"
        path = resolve_folder("tokenizer", source, hint, allow_patterns=[*TOKENIZER_FILES, "merges.txt"])
    file = path / "tokenizer.json" if path.is_dir() else path
    tokenizer = _file_tokenizer(file) if has_file(file) else _qwen_tokenizer(path)
    if token_id(tokenizer, IMAGE_CONTEXT) is None:
        tokenizer.add_tokens(list(EAGLE_TOKENS), special_tokens=True)
    return tokenizer


def _file_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    read_json(path)  # names a damaged file, which the library does not
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"{path} is no tokenizer.json ({error}); download or write it again") from error


def _qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Build Qwen2's byte-level BPE from `vocab.json`, `merges.txt` and, where present, what adds tokens to them."""
    absent = [name for name in ("vocab.json", "merges.txt") if not has_file(folder / name)]
    if absent:
        raise FileNotFoundError(f"{folder} has no tokenizer.json, and no {' and '.join(absent)}")
    refuse_lfs_pointer(folder / "merges.txt")
    given = {name: read_json(folder / name) for name in TOKENIZER_FILES[1:] if has_file(folder / name)}
    try:
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"{folder} holds no tokenizer of Qwen2's kind ({error}); download its files again") from error
    added = typed(given.get("added_tokens.json", {}), Mapping[str, int], f"{folder}/added_tokens.json")
    wrong = [token for token, number in added.items() if token_id(tokenizer, token) != number]
    if wrong:
        raise ValueError(f"{folder}/added_tokens.json does not continue vocab.json: {', '.join(wrong)}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json`, which every version of transformers reads alike."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def prompt_text(instruction: str, num_views: int, num_image_tokens: int) -> str:
    """Return the chat prompt with its image placeholders written out."""
    images = "".join(
        f"<image {i + 1}>{IMAGE_OPEN}{IMAGE_CONTEXT * num_image_tokens}{IMAGE_CLOSE}" for i in range(num_views)
    )
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
    )


class Normaliser:
    """Normalises concatenated parts, each in its own mode.

    Modes: `min_max` maps [min, max] to [-1, 1] without clipping; `mean_std` standardises; `q99` maps [q01, q99] to
    [-1, 1] and clips; `binary` is x > 0.5. Degenerate statistics, going forward: min = max gives 0, std = 0 passes
    the value, q01 = q99 clips it only. Going back, they give the constant; nothing is clipped.

    Args:
        keys: Full keys, in the order of concatenation.
        modes: Mode per key; keys not named use `min_max`.
        metadata: Statistics.
    """

    def __init__(self, keys: Sequence[str], modes: Mapping[str, NormalisationMode], metadata: DatasetMetadata) -> None:
        columns: dict[str, list[float]] = {name: [] for name in ("max", "min", "mean", "std", "q01", "q99")}
        names: list[str] = []
        self.widths: dict[str, int] = {}
        for key in keys:
            part = metadata.part(key)
            self.widths[key] = len(part["max"])
            for name, column in columns.items():
                column.extend(part[name])
            names += [modes.get(key, "min_max")] * len(part["max"])
        self.dim = len(names)
        self._host = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
        for mode in ("min_max", "mean_std", "q99", "binary"):
            self._host[f"is_{mode}"] = torch.tensor([name == mode for name in names])
        self._on: dict[torch.device, dict[str, Tensor]] = {torch.device("cpu"): self._host}

    def _tensors(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._on:
            self._on[device] = {name: tensor.to(device) for name, tensor in self._host.items()}
        return self._on[device]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise float32 [..., dim]."""
        t = self._tensors(x.device)
        span, quantiles = t["max"] - t["min"], t["q99"] - t["q01"]
        min_max = torch.where(span != 0, 2 * ((x - t["min"]) / torch.where(span != 0, span, 1.0)) - 1, 0.0)
        mean_std = torch.where(t["std"] != 0, (x - t["mean"]) / torch.where(t["std"] != 0, t["std"], 1.0), x)
        q99 = torch.where(
            quantiles != 0, 2 * ((x - t["q01"]) / torch.where(quantiles != 0, quantiles, 1.0)) - 1, x
        ).clamp(-1, 1)
        return self._select(t, min_max, mean_std, q99, (x > 0.5).to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward` on float32 [..., dim]."""
        t = self._tensors(x.device)
        min_max = (x + 1) / 2 * (t["max"] - t["min"]) + t["min"]
        mean_std = x * t["std"] + t["mean"]
        q99 = (x + 1) / 2 * (t["q99"] - t["q01"]) + t["q01"]
        return self._select(t, min_max, mean_std, q99, (x > 0.5).to(x.dtype))

    @staticmethod
    def _select(t: Mapping[str, Tensor], min_max: Tensor, mean_std: Tensor, q99: Tensor, binary: Tensor) -> Tensor:
        out = torch.where(t["is_min_max"], min_max, binary)
        out = torch.where(t["is_mean_std"], mean_std, out)
        return torch.where(t["is_q99"], q99, out)


def resize_views(images: Tensor, crop_scale: float, image_size: int) -> Tensor:
    """Crop, resize and truncate to 8 bits.

    Args:
        images: uint8 [n, height, width, 3].
        crop_scale: Fraction of each side that the centre crop keeps.
        image_size: Height and width in pixels of the result.

    Returns:
        uint8 [n, 3, image_size, image_size].
    """
    height, width = images.shape[1:3]
    crop_h, crop_w = int(height * crop_scale), int(width * crop_scale)
    # Python rounds half to even, as the reference does: 6 for 256 pixels and scale 0.95.
    top, left = round((height - crop_h) / 2.0), round((width - crop_w) / 2.0)
    cropped = images[:, top : top + crop_h, left : left + crop_w].permute(0, 3, 1, 2)
    values = cropped.to(torch.float32) / 255.0
    if (crop_h, crop_w) != (image_size, image_size):
        values = F.interpolate(
            values, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=True
        )
    return (values * 255.0).to(torch.uint8)


def pixels_from_bytes(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Map uint8 images to [-1, 1]."""
    return ((images.to(torch.float32) - 127.5) / 127.5).to(dtype)


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """How prompts become rows of equal length.

    Attributes:
        padding: `masked`: padded on the right to `length`, padding read by nothing. `left`: padded on the left to
            the longest prompt of the batch and read by the action head, as in NVIDIA's code. `right`: like `left`,
            then padded on the right to `length` with id 0, as in RLinf.
        length: Tokens of a row; unused by `left`.
    """

    padding: PaddingMode
    length: int


def check_rows(counts: Mapping[str, int]) -> None:
    """Check that fields of an observation have equally many rows.

    Raises:
        ValueError: They do not, or have none.
    """
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"the observation has rows {dict(counts)}; give each field equally many, at least 1")


class Preprocessor:
    """Turns observations into network inputs and network actions into environment actions.

    Args:
        config: Network sizes.
        data_config: What the observations hold.
        metadata: Statistics.
        tokenizer: Tokenizer of the network.
        layout: Padding.
        round_to_bf16: Round the raw state to bfloat16 before normalising, as RLinf does.

    Raises:
        ValueError: State or action parts are wider than the network, or the tokenizer is another one's.
    """

    def __init__(
        self,
        config: ModelConfig,
        data_config: DataConfig,
        metadata: DatasetMetadata,
        tokenizer: PreTrainedTokenizerFast,
        layout: PromptLayout,
        *,
        round_to_bf16: bool = False,
    ) -> None:
        self.config = config
        self.data_config = data_config
        self.metadata = metadata
        self.tokenizer = tokenizer
        self.layout = layout
        self.round_to_bf16 = round_to_bf16
        self.state_normaliser = Normaliser(data_config.state_keys, data_config.state_modes, metadata)
        self.action_normaliser = Normaliser(data_config.action_keys, data_config.action_modes, metadata)
        for name, dim, limit in (
            ("state", self.state_normaliser.dim, config.action_head.max_state_dim),
            ("action", self.action_normaliser.dim, config.action_head.action_dim),
        ):
            if dim > limit:
                raise ValueError(f"{name} has {dim} dimensions, but the network takes at most {limit}")
        horizon = config.action_head.action_horizon
        if data_config.action_horizon != horizon:
            raise ValueError(
                f"the data config has action_horizon={data_config.action_horizon}, the network {horizon}; give a data "
                f"config with action_horizon={horizon}"
            )
        cameras = [f"video.{name}" for name in metadata.modalities.get("video", {})]
        absent = [key for key in data_config.video_keys if key not in cameras]
        if cameras and absent:
            raise KeyError(f"the metadata's modalities lack {', '.join(absent)} (present: {', '.join(cameras)})")
        self.pad_id = self._check_tokenizer()
        self._prompt_ids: dict[str, list[int]] = {}
        self._gripper = self._gripper_mask()

    @property
    def action_dim(self) -> int:
        """Valid action width a."""
        return self.action_normaliser.dim

    def _check_tokenizer(self) -> int:
        """Refuse a tokenizer that is not the network's, and return the id that pads prompts."""
        remedy = "use the tokenizer that belongs to this checkpoint"
        image_id, expected = token_id(self.tokenizer, IMAGE_CONTEXT), self.config.image_token_id
        if image_id != expected:
            raise ValueError(
                f"the tokenizer gives {IMAGE_CONTEXT} the id {image_id}, the network expects {expected}; {remedy}"
            )
        for token in PROMPT_TOKENS:
            ids = self.tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1 or ids[0] != token_id(self.tokenizer, token):
                raise ValueError(f"the tokenizer takes {token} for text (ids {ids}), not for a token; {remedy}")
        largest, size = max(self.tokenizer.get_vocab().values()), self.config.text["vocab_size"]
        if largest >= size:
            raise ValueError(f"the tokenizer has ids up to {largest}, but the network's vocab_size={size}; {remedy}")
        return cast(int, token_id(self.tokenizer, PAD_TOKEN))

    def _gripper_mask(self) -> Tensor | None:
        key = self.data_config.gripper_key
        if key is None:
            return None
        flags: list[bool] = []
        for name, width in self.action_normaliser.widths.items():
            flags += [name == key] * width
        return torch.tensor(flags)

    def _entry(self, obs: Observation, key: str) -> Any:
        if key not in obs:
            raise KeyError(f"the observation has no {key!r} (present: {', '.join(map(str, obs))})")
        return obs[key]

    def _numbers(self, obs: Observation, key: str, allowed: str) -> Tensor:
        """Return an entry of numbers as a tensor, where it lies."""
        value = self._entry(obs, key)
        if isinstance(value, Tensor):
            return value
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise ValueError(f"{key} is no array ({error}); it must be {allowed}") from error
        if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
            raise ValueError(f"{key} is {array.dtype} {array.shape}; it must be {allowed}")
        # Torch takes neither steps backwards, as in a picture that was turned, nor other machines' order of bytes.
        if not (array.flags.c_contiguous and array.flags.writeable and array.dtype.isnative):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)

    def images(self, obs: Observation, device: torch.device) -> Tensor:
        """Return uint8 [B, V, 3, image_size, image_size].

        Raises:
            KeyError: A camera is missing.
            ValueError: An image is not uint8 [B, height, width, 3], or not of the resolution in the metadata.
        """
        views: list[Tensor] = []
        allowed, scale = "uint8 [batch, height, width, 3]", self.data_config.crop_scale
        for key in self.data_config.video_keys:
            value = self._numbers(obs, key, allowed)
            if value.dtype != torch.uint8 or value.ndim != 4 or value.shape[-1] != 3:
                raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}; it must be {allowed}")
            if int(min(value.shape[1:3]) * scale) < 1:
                raise ValueError(f"{key} is {tuple(value.shape)}, of which crop_scale={scale} leaves nothing")
            expected = self.metadata.resolution(key)
            if expected is not None and tuple(value.shape[1:3]) != expected:
                raise ValueError(
                    f"{key} is {value.shape[1]}x{value.shape[2]} pixels, the metadata says "
                    f"{expected[0]}x{expected[1]}; make the environment render that size"
                )
            views.append(value.to(device, non_blocking=True))
        check_rows({key: len(view) for key, view in zip(self.data_config.video_keys, views, strict=True)})
        size = self.config.image_size
        if all(view.shape == views[0].shape for view in views):
            # One call for all views: [B, V, h, w, 3] in the order of the prompt's placeholders.
            stacked = torch.stack(views, dim=1)
            return resize_views(stacked.flatten(0, 1), scale, size).unflatten(0, stacked.shape[:2])
        return torch.stack([resize_views(view, scale, size) for view in views], dim=1)

    def state(self, obs: Observation, device: torch.device) -> Tensor:
        """Return the normalised, zero-padded state, float32 [B, 1, max_state_dim].

        Raises:
            KeyError: A part is missing.
            ValueError: A part is not of numbers, not [B, width], or not finite.
        """
        parts: list[Tensor] = []
        for key, width in self.state_normaliser.widths.items():
            allowed = f"finite numbers, float32 [batch, {width}]"
            given = self._numbers(obs, key, allowed)
            if given.ndim != 2 or given.shape[1] != width or given.is_complex() or given.dtype == torch.bool:
                raise ValueError(f"{key} is {given.dtype} {tuple(given.shape)}; it must be {allowed}")
            parts.append(given.to(torch.float32))
        widths = self.state_normaliser.widths
        check_rows({key: len(part) for key, part in zip(widths, parts, strict=True)})
        raw = torch.cat(parts, dim=1)
        # Checked where they lie: states of an environment and of a dataset lie in the host's memory.
        if not bool(torch.isfinite(raw).all()):
            row, column = (int(i) for i in (~torch.isfinite(raw)).nonzero()[0])
            keys = [key for key, width in widths.items() for _ in range(width)]
            value = torch.as_tensor(self._entry(obs, keys[column]))[row].tolist()
            raise ValueError(
                f"{keys[column]} of row {row} is {value}; it must be finite numbers, float32 [batch, "
                f"{widths[keys[column]]}]"
            )
        raw = raw.to(device, non_blocking=True)
        if self.round_to_bf16:
            raw = raw.to(torch.bfloat16).to(torch.float32)
        normalised = self.state_normaliser.forward(raw)
        return F.pad(normalised, (0, self.config.action_head.max_state_dim - normalised.shape[1]))[:, None]

    def prompt_ids(self, instruction: str) -> list[int]:
        """Return the token ids of the whole prompt for one instruction.

        Raises:
            ValueError: The instruction holds a token with a meaning of its own, such as `<IMG_CONTEXT>`.
        """
        if instruction not in self._prompt_ids:
            where = f"{self.data_config.language_key}={instruction!r}"
            if special := [token for token in self.tokenizer.get_added_vocab() if token in instruction]:
                raise ValueError(
                    f"{where} holds {', '.join(special)}, which the tokenizer takes for more than text; leave it out"
                )
            if any("\ud800" <= letter <= "\udfff" for letter in instruction):
                raise ValueError(f"{where} holds half a surrogate pair, which is no text; decode it as UTF-8")
            text = prompt_text(instruction, len(self.data_config.video_keys), self.config.num_image_tokens)
            self._prompt_ids[instruction] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._prompt_ids[instruction]

    def _instructions(self, obs: Observation) -> list[str]:
        """Return the instruction of each row."""
        key = self.data_config.language_key
        value = self._entry(obs, key)
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
            raise ValueError(
                f"{key} is {value!r}, one {type(value).__name__}; it must be a sequence with one str per row"
            )
        rows: list[Any] = list(value.reshape(-1)) if isinstance(value, np.ndarray) else list(cast(Sequence[Any], value))
        # NVIDIA's clients wrap the instruction of a row in a list.
        rows = [row[0] if isinstance(row, list | tuple | np.ndarray) and len(row) == 1 else row for row in rows]
        for i, text in enumerate(rows):
            if not isinstance(text, str):
                raise ValueError(f"{key} of row {i} is {text!r}, a {type(text).__name__}; it must be a str")
        return [str(text) for text in rows]

    def tokens(self, obs: Observation, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return token ids, int64 [B, L], and bool [B, L], True at real tokens.

        Raises:
            KeyError: The instruction is missing.
            ValueError: An instruction is no text of its own, or a prompt is longer than the layout's length.
        """
        instructions = self._instructions(obs)
        check_rows({self.data_config.language_key: len(instructions)})
        unique = sorted(set(instructions))
        rows = [self.prompt_ids(text) for text in unique]
        longest = max(len(row) for row in rows)
        padding, length = self.layout.padding, self.layout.length
        if padding != "left" and longest > length:
            text = unique[[len(row) for row in rows].index(longest)]
            raise ValueError(
                f"the prompt of instruction {text!r} has {longest} tokens, but prompt_length={length}; "
                f"raise PolicyConfig.prompt_length to at least {longest}"
            )
        total = longest if padding == "left" else length
        ids = np.full((len(rows), total), 0 if padding == "right" else self.pad_id, dtype=np.int64)
        valid = np.zeros((len(rows), total), dtype=np.bool_)
        for i, row in enumerate(rows):
            start = 0 if padding == "masked" else longest - len(row)
            ids[i, :start] = self.pad_id
            ids[i, start : start + len(row)] = row
            valid[i, start : start + len(row)] = True
        index = [unique.index(text) for text in instructions]
        return (
            torch.from_numpy(ids[index]).to(device, non_blocking=True),
            torch.from_numpy(valid[index]).to(device, non_blocking=True),
        )

    def normalise_actions(self, actions: Tensor) -> Tensor:
        """Map data actions float32 [B, H, a] to network actions [B, H, A], zero-padded.

        Raises:
            ValueError: They are of another width.
        """
        if actions.shape[-1] != self.action_dim:
            raise ValueError(f"actions have width {actions.shape[-1]}, the data config says {self.action_dim}")
        normalised = self.action_normaliser.forward(actions.to(torch.float32))
        return F.pad(normalised, (0, self.config.action_head.action_dim - self.action_dim))

    def unnormalise_actions(self, actions: Tensor) -> Tensor:
        """Map network actions [B, H, A] to data actions float32 [B, H, a]."""
        return self.action_normaliser.inverse(actions[..., : self.action_dim].to(torch.float32))

    def to_env(self, actions: Tensor) -> Tensor:
        """Map data actions to environment actions; the gripper changes its convention (`DataConfig.gripper_key`)."""
        if self._gripper is None:
            return actions
        return torch.where(self._gripper.to(actions.device), torch.sign(1 - 2 * actions), actions)
