"""Accelerate's trackers of a run: what each of them is told besides the metrics.

TensorBoard writes to `logs` in the run's folder, where `tensorboard --logdir runs` shows one run per folder. A tracker
that keeps runs elsewhere gets a project, and where its runs have names of their own, the folder's name and an id, which
`tracker.json` in the folder keeps, so that a resumed run is the same one there too.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from gr00t_agent.files import json_ready, read_json, require, write_json

TENSORBOARD_FOLDER = "logs"
ID_FILE = "tracker.json"
# What these trackers call a run's name. Both take an id and `resume`, by which a run goes on.
_NAME_OPTIONS = {"wandb": "name", "swanlab": "experiment_name"}
# SwanLab's earlier versions take no other length.
_ID_LENGTH = 21


class _TensorBoard(TensorBoardTracker):
    """TensorBoard in a run's folder, with the hyperparameters in the same event file as the metrics.

    Accelerate's would write them to a folder below, which TensorBoard shows as a second run, and again whenever the run
    is resumed.
    """

    def __init__(self, run_path: Path) -> None:
        super().__init__(TENSORBOARD_FOLDER, run_path)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Writes hyperparameters; those that are None are left out."""
        from torch.utils.tensorboard.summary import hparams

        _, session_start, _ = hparams(values, {})
        file_writer = self.writer.file_writer
        assert file_writer is not None, "the tracker has been started and not finished"
        file_writer.add_summary(session_start)
        self.writer.flush()


def start_trackers(accelerator: Accelerator, run_path: Path, args: Any) -> None:
    """Starts a run's trackers, with its arguments as hyperparameters.

    Args:
        accelerator: logs to them from now on, in the main process.
        run_path: the run's folder.
        args: a trainer's.
    """
    if not accelerator.is_main_process:
        return
    accelerator.project_configuration.logging_dir = str(run_path)
    names = [str(name) for name in accelerator.log_with]
    accelerator.log_with = cast(Any, [_TensorBoard(run_path) if name == "tensorboard" else name for name in names])
    options: dict[str, dict[str, str]] = {}
    for name in names:
        if name in _NAME_OPTIONS:
            options[name] = {_NAME_OPTIONS[name]: run_path.name, "id": _id_of(run_path), "resume": "allow"}
    accelerator.init_trackers(args.tracker_project, flat(json_ready(args)), options)


def _id_of(run_path: Path) -> str:
    """Returns the id of the run in `run_path`, a new one if it has none."""
    file = run_path / ID_FILE
    if not file.is_file():
        write_json(file, {"id": secrets.token_hex(_ID_LENGTH)[:_ID_LENGTH]})
    return require(read_json(file), "id", str(file))


def flat(values: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Returns a nested JSON object's values by names with dots; lists become what a command line has in their place."""
    plain: dict[str, bool | int | float | str | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            inner = flat(cast(dict[str, Any], value))
            plain |= {f"{name}.{inner_name}": inner_value for inner_name, inner_value in inner.items()}
        elif isinstance(value, list):
            plain[name] = " ".join(str(item) for item in cast(list[Any], value))
        else:
            plain[name] = value
    return plain
