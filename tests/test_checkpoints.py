"""The checkpoints in the repository: whole, small, and those that their evaluations are of."""

import json
from pathlib import Path

import pytest

from algorithms.eval_gr00t import weights_digest
from gr00t_agent import Gr00tAgent

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "checkpoints").glob("*/config.json"))


def test_checkpoints_are_shipped():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_evaluation_is_of_these_weights(folder: Path):
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["protocol"]["weights_sha256"] == weights_digest(str(folder))
    successes = [episode["success"] for episode in result["episodes"]]
    assert result["protocol"]["num_episodes"] == len(successes) == 500
    assert result["success_once"] == sum(successes) / len(successes)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_loads_and_fits_in_16_megabytes(folder: Path):
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 16e6
    agent = Gr00tAgent.from_pretrained(folder)
    assert agent.policy.compute_dtype == "float32"
    assert agent.image_size == 118
