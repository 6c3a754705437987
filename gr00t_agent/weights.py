"""Reads and writes network weights under the names of the released GR00T-N1.5 checkpoints. Safetensors only.

Two things differ between file and module tree:
    * transformers 5 keeps SigLIP's parts directly in `vision_model`, where the files (and transformers 4) have
      `vision_model.vision_model`;
    * the language model's output layer is tied to its embeddings. Files hold `embed_tokens.weight`, `lm_head.weight`
      or both; the module tree has only the embeddings, and that is what is written.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gr00t_agent.files import has_file, naming, read_json, refuse_lfs_pointer, require, typed

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

VISION = "backbone.eagle_model.vision_model."
VISION_RELEASED = VISION + "vision_model."
EMBEDDINGS = "backbone.eagle_model.language_model.model.embed_tokens.weight"
OUTPUT_LAYER = "backbone.eagle_model.language_model.lm_head.weight"

WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Modules that only reinforcement learning adds: prefix and what it is.
RL_ONLY = {"action_head.value_head.": "value head", "action_head.reinflow_explore_noise_net.": "exploration-noise net"}


def to_device(device: torch.device | str) -> torch.device:
    """Return a device that tensors can be put on.

    Raises:
        ValueError: PyTorch has no device of that name, or cannot use it here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({reason}); give one of {', '.join(known)}"
            + ("" if len(known) > 1 else ": PyTorch finds no CUDA GPU")
        ) from error
    return found


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a type that parameters may have, which may be given by its name, such as "bfloat16".

    Raises:
        ValueError: It is none of `WEIGHT_TYPES`.
    """
    names = {str(allowed).removeprefix("torch."): allowed for allowed in WEIGHT_TYPES}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found not in WEIGHT_TYPES:
        raise ValueError(
            f"dtype={dtype!r} is no type of parameters (valid: {', '.join(names)}, as names or PyTorch's own)"
        )
    return found


def released_name(name: str) -> str:
    """Return the name that a module's tensor has in a file."""
    if name.startswith(VISION) and not name.startswith(VISION_RELEASED):
        return VISION_RELEASED + name.removeprefix(VISION)
    return name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint folder: one file, or the shards that the index names.

    Raises:
        FileNotFoundError: No weights, or a shard is missing.
        ValueError: A file is damaged, the index leads out of the folder or does not fit its shards, or there are both a
            file and an index.
    """
    index_path = folder / INDEX_FILE
    if not has_file(index_path):
        return _read_file(folder, WEIGHTS_FILE)
    if has_file(folder / WEIGHTS_FILE):
        raise ValueError(f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}; delete the one that is out of date")
    index = read_json(index_path)
    with naming(index_path):
        weight_map: dict[str, str] = typed(require(index, "weight_map", "it"), Mapping[str, str], "weight_map")
        for file in set(weight_map.values()):
            # A name on its own: nothing above, below or beside the folder. (The hub's cache makes links of files.)
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise ValueError(f"weight_map names {file!r}; it must name .safetensors files in the folder itself")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        found = _read_file(folder, file)
        promised = {name for name, place in weight_map.items() if place == file}
        if promised != set(found):
            problems = [
                _listing("tensors that the index promises", promised - set(found)),
                _listing("tensors that it does not name", set(found) - promised),
            ]
            raise ValueError(f"{folder / file} does not fit {INDEX_FILE}; " + "\n".join(filter(None, problems)))
        tensors |= found
    return tensors


def _read_file(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not has_file(path):
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} lacks {name} (present: {present})")
    refuse_lfs_pointer(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or only a part of one ({error}); download or write it again"
        ) from error


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
            embeddings that it is tied to; or tensors of integers.
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
    odd = {name: given[name].dtype for name in expected if given[name].dtype not in WEIGHT_TYPES}
    if odd:
        name, kind = next(iter(odd.items()))
        raise ValueError(
            f"{name} and {len(odd) - 1} other tensors are {kind} and the like (allowed: "
            f"{', '.join(map(str, WEIGHT_TYPES))}); quantised weights are not supported"
        )
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
