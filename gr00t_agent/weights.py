"""Reads and writes network weights under the names of the released GR00T-N1.5 checkpoints. Safetensors only.

Two things differ between file and module tree:
    * transformers 5 keeps SigLIP's parts directly in `vision_model`, where the files (and transformers 4) have
      `vision_model.vision_model`;
    * the language model's output layer is tied to its embeddings. Files hold `embed_tokens.weight`, `lm_head.weight`
      or both; the module tree has only the embeddings, and that is what is written.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

VISION = "backbone.eagle_model.vision_model."
VISION_RELEASED = VISION + "vision_model."
EMBEDDINGS = "backbone.eagle_model.language_model.model.embed_tokens.weight"
OUTPUT_LAYER = "backbone.eagle_model.language_model.lm_head.weight"

# Modules that only reinforcement learning adds: prefix and what it is.
RL_ONLY = {"action_head.value_head.": "value head", "action_head.reinflow_explore_noise_net.": "exploration-noise net"}


def released_name(name: str) -> str:
    """Return the name that a module's tensor has in a file."""
    if name.startswith(VISION) and not name.startswith(VISION_RELEASED):
        return VISION_RELEASED + name.removeprefix(VISION)
    return name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint folder: one file, or the shards that the index names.

    Raises:
        FileNotFoundError: No weights, or a shard is missing.
    """
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        files = sorted({folder / name for name in index["weight_map"].values()})
    else:
        files = [folder / WEIGHTS_FILE]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)} (present: {present})")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118  (the reader is no mapping)
                tensors[name] = reader.get_tensor(name)
    return tensors


def _listing(title: str, names: Iterable[str], limit: int = 20) -> str:
    names = sorted(names)
    more = f"\n  ... and {len(names) - limit} more" if len(names) > limit else ""
    return f"{title} ({len(names)}):\n  " + "\n  ".join(names[:limit]) + more if names else ""


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> list[str]:
    """Put checkpoint tensors into a module, which may be on the meta device.

    Floating-point tensors are converted to `dtype`; mixtures in the file are fine.

    Args:
        module: The agent.
        tensors: From `read_weights`.
        dtype: Type of the parameters afterwards.
        device: Place of the parameters afterwards.

    Returns:
        Prefixes of RL-only modules that the checkpoint lacks and the module has; their tensors are untouched.

    Raises:
        ValueError: Unknown, missing or misshapen tensors, all listed; or an output layer that differs from the
            embeddings that it is tied to.
    """
    given = dict(tensors)
    output = given.pop(OUTPUT_LAYER, None)
    if output is not None:
        if EMBEDDINGS in given and not torch.equal(output, given[EMBEDDINGS]):
            raise ValueError(
                f"{OUTPUT_LAYER} differs from {EMBEDDINGS}; the two are tied, so the checkpoint is inconsistent"
            )
        given.setdefault(EMBEDDINGS, output)
    expected = {released_name(name): (name, tensor) for name, tensor in module.state_dict().items()}
    absent_modules: list[str] = []
    for prefix, title in RL_ONLY.items():
        wanted = {name for name in expected if name.startswith(prefix)}
        found = {name for name in given if name.startswith(prefix)}
        if wanted and not found:
            absent_modules.append(prefix)
            for name in wanted:
                del expected[name]
        elif found and not wanted:
            logger.info("the checkpoint has a %s, which this policy does not use; it is not loaded", title)
            for name in found:
                del given[name]
    problems = [
        _listing("unknown tensors", given.keys() - expected.keys()),
        _listing("missing tensors", expected.keys() - given.keys()),
        _listing(
            "misshapen tensors",
            [
                f"{name}: file {tuple(given[name].shape)}, network {tuple(tensor.shape)}"
                for name, (_, tensor) in expected.items()
                if name in given and given[name].shape != tensor.shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError("the checkpoint does not fit the network; " + "\n".join(filter(None, problems)))
    state: dict[str, Tensor] = {}
    for name, (module_name, own) in expected.items():
        # Buffers keep their own type: the noise bounds are float32 in a bfloat16 network as well.
        is_parameter = not name.endswith((".logvar_min", ".logvar_max"))
        target = dtype if own.is_floating_point() and is_parameter else own.dtype
        state[module_name] = given[name].to(device=device, dtype=target)
    module.load_state_dict(state, strict=False, assign=True)
    return absent_modules


def write_weights(
    module: nn.Module,
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a module's tensors under the released names, in shards with an index where they exceed one shard.

    Args:
        module: The agent.
        folder: Made if need be.
        max_shard_bytes: Size of a file.
        state_dict: The module's tensors, for one that does not hold them whole (sharded over processes).
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = module.state_dict() if state_dict is None else state_dict
    tensors = {released_name(name): tensor.detach().cpu() for name, tensor in state_dict.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_bytes)
