"""The checkpoints in the repository: whole, small, and those that their evaluations are of."""

import json
from pathlib import Path

import pytest

from algorithms.common.checkpoint_notes import suite_of
from algorithms.eval_gr00t import weights_digest
from gr00t_agent import Gr00tAgent
from libero_gym import list_tasks
from tools.model_cards import model_card

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "checkpoints").glob("*/config.json"))


def test_checkpoints_are_shipped():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_evaluation_is_of_these_weights(folder: Path):
    result = json.loads((folder / "evaluation.json").read_text())
    protocol = result["protocol"]
    assert protocol["weights_sha256"] == weights_digest(str(folder))
    assert protocol["suite"] == suite_of(str(folder))
    assert protocol["task_ids"] == list(range(len(list_tasks(protocol["suite"]))))
    successes = [episode["success"] for episode in result["episodes"]]
    assert len(successes) == len(protocol["task_ids"]) * protocol["episodes_per_task"] >= 500
    assert protocol["num_episodes"] == len(successes)
    assert result["success_once"] == sum(successes) / len(successes)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_model_card_tells_the_evaluation(folder: Path):
    # `python tools/model_cards.py` writes it.
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_and_fits_in_16_megabytes(folder: Path):
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 16e6
    agent = Gr00tAgent.from_pretrained(folder)
    assert agent.policy.compute_dtype == "float32"
    assert agent.image_size == 118
