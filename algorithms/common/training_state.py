"""Going on with a training run: trained weights, optimiser state and whatever else is given, and its run folder.

Safetensors and JSON only. Everything random in a step is expected to be derived from its number, so no generator is
saved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from algorithms.common.run_folder import RunFolder, json_ready, write_json

STATE_FILE = "state.json"


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that get gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save_state(
    folder: Path, module: nn.Module, optimizer: Any, step: int, extra: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Writes a state to `folder`, whole or not at all.

    Args:
        folder: is replaced if it exists.
        module: its trained parameters are saved.
        optimizer: one whose state is tensors, such as AdamW.
        step: steps done.
        extra: further named tensors, by the name of their file.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: parameter.detach() for name, parameter in trained_parameters(module).items()}
    moments = {
        f"{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    for name, tensors in {"weights": weights, "optimizer": moments, **extra}.items():
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
    (temporary / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.replace(old)
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, module: nn.Module, optimizer: Any) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Restores what `save_state` wrote.

    Returns:
        The steps done, and the extra tensors by file name.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: the state is of other parameters.
    """
    if not (folder / STATE_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE_FILE}; give the folder of a run that has saved its state")
    files = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    parameters, weights = trained_parameters(module), files.pop("weights")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        differing = sorted(set(shapes) ^ parameters.keys())[:5] or "shapes"
        raise ValueError(f"the state in {folder} is of another network or other tune flags (differing: {differing})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in files.pop("optimizer").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(json.loads((folder / STATE_FILE).read_text("utf-8"))["step"]), files


def reopen_run(path: Path, args: Any, accelerator: Accelerator, free: Collection[str]) -> RunFolder:
    """Returns the folder of a run that goes on, with its args.json as they are now.

    Args:
        path: the run's folder.
        args: dataclass of arguments.
        accelerator: its trackers log into the folder.
        free: names of arguments that may differ from the run's.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: the run had other arguments.
    """
    file = path / "args.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no args.json; give the folder of a run")
    found, given = json.loads(file.read_text("utf-8")), json_ready(args)
    changed = [f"{k}={given[k]!r} (was {found.get(k)!r})" for k in given if k not in free and given[k] != found.get(k)]
    if changed:
        raise ValueError(f"{path} cannot go on with other arguments: {', '.join(changed)}")
    if accelerator.is_main_process:
        write_json(file, args)
    accelerator.project_configuration.logging_dir = str(path)
    accelerator.init_trackers("logs")
    return RunFolder(path, accelerator)


def forget_metrics_after(path: Path, iteration: int) -> None:
    """Drops the lines of a metrics.jsonl that a resumed run is about to write again, and one that was not ended."""
    if path.is_file():
        whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
        lines = [line.rstrip("\n") for line in whole if json.loads(line)["iteration"] <= iteration]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
