"""What all tests of the environment share."""

from pathlib import Path

import pytest

from libero_gym.physics import simulation


@pytest.fixture(autouse=True)
def dumps_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the states that provoked errors dump out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(simulation, "cache_dir", lambda: folder)
    return folder / "dumps"
