"""What trackers are told of a run, and where they write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]

from algorithms.common.run import _remove_if_unused  # pyright: ignore[reportPrivateUsage]
from algorithms.common.trackers import flat
from algorithms.sft_gr00t import Args
from gr00t_agent.files import json_ready, write_json
from tests.algorithms.line_trainer import train


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    return [json.loads(line)["global_step"] for line in lines]


class Config(dict[str, Any]):
    """Takes what the services' own take."""

    def update(self, values: dict[str, Any], *, allow_val_change: bool) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert allow_val_change
        super().update(values)


@pytest.mark.parametrize(("service", "name_option"), [("wandb", "name"), ("swanlab", "experiment_name")])
def test_a_service_gets_project_name_and_arguments_and_a_resumed_run_goes_on(
    service: str, name_option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[dict[str, Any]] = []
    logged: list[int] = []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(log=lambda values, step: logged.append(step), finish=lambda: None)

    config = Config()
    monkeypatch.setitem(sys.modules, service, SimpleNamespace(init=init, config=config))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType(service)])

    train("ppo", tmp_path, log_with=(service,), task_ids=(0, 3))
    assert config["learning_rate"] == 3e-3
    assert config["task_ids"] == "0 3"
    assert config["tracker_project"] == "libero-gr00t"
    train("ppo", tmp_path, log_with=(service,), task_ids=(0, 3), num_iterations=3, resume="auto")
    assert logged == steps_of(tmp_path / "ppo_libero_spatial_1")
    assert config["num_iterations"] == 3
    train("ppo", tmp_path, log_with=(service,), tracker_project="mine")

    first, resumed, second = started
    assert first == {
        "project": "libero-gr00t",
        name_option: "ppo_libero_spatial_1",
        "id": first["id"],
        "resume": "allow",
    }
    assert len(first["id"]) == 21
    assert resumed == first
    assert second["project"] == "mine"
    assert second[name_option] == "ppo_libero_spatial_1-2"
    assert second["id"] != first["id"]


def test_tensorboard_writes_to_one_folder_with_the_hyperparameters(tmp_path: Path):
    train("ppo", tmp_path, log_with=("tensorboard",), save_interval=1)
    train("ppo", tmp_path, log_with=("tensorboard",), num_iterations=3, resume="auto", tracker_project="another")

    run = tmp_path / "ppo_libero_spatial_1"
    events = list(run.rglob("*tfevents*"))
    assert len(events) == 2  # one of each start
    assert {path.parent for path in events} == {run / "logs"}
    assert not (run / "tracker.json").exists()
    shown = EventAccumulator(str(run / "logs")).Reload()
    assert [scalar.step for scalar in shown.Scalars("actor/lr")] == steps_of(run)
    content = shown.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyperparameters["learning_rate"].number_value == 3e-3
    assert hyperparameters["suite"].string_value == "libero_spatial"
    assert "task_ids" not in hyperparameters  # not given


def test_arguments_are_flat_and_plain():
    values = flat(json_ready(Args(dataset="x", task_ids=(1, 2), lora_parts=())))
    assert values["augmentation.hue"] == 0.08
    assert values["betas"] == "0.95 0.999"
    assert values["task_ids"] == "1 2"
    assert values["lora_parts"] == ""
    assert values["output_dir"] == "runs"
    assert values["compile"] is False
    assert values["horizon"] is None
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in values.values())


def test_an_id_does_not_keep_the_folder_of_a_start_that_failed(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "tracker.json", {"id": "x"})
    _remove_if_unused(run, run.resolve(), os.getpid())
    assert not run.exists()
