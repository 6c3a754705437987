"""The feature store: what is put comes back, wherever it was kept, and training does not notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.common.features import FeatureStore
from gr00t_agent import Gr00tAgent
from tests.algorithms.line_trainer import make_mlp_agent, make_tiny_agent, train, without_time

CPU = torch.device("cpu")
ROW_BYTES = 3 * 4 + 8


def encode(obs: dict[str, Any]) -> dict[str, torch.Tensor]:
    x = torch.as_tensor(obs["x"])
    return {"features": torch.stack([x, 10 * x, x**2], 1), "mask": (x > 0).long()}


def observation(first: int, count: int) -> dict[str, Any]:
    return {"x": np.arange(first, first + count, dtype=np.float32), "text": np.array(["a"] * count)}


def put(store: FeatureStore, first: int, count: int) -> np.ndarray:
    obs = observation(first, count)
    return store.put(obs, encode(obs))


@pytest.mark.parametrize(
    ("placement", "rows_that_fit", "encoded_again"),
    [("device", 1e9, 0), ("device", 5, 7), ("device", 0, 12), ("host", 5, 7), ("mixed", 5, 0), ("none", 1e9, 12)],
)
def test_rows_come_back_and_the_budget_is_kept(placement: Any, rows_that_fit: float, encoded_again: int):
    store = FeatureStore(encode, CPU, placement, rows_that_fit * ROW_BYTES / 1e9)
    rows = np.concatenate([put(store, first, 4) for first in (0, 4, 8)])
    order = np.random.default_rng(0).permutation(12)
    got, expected = store.get(rows[order]), encode(observation(0, 12))
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor[order])
    assert store.num_encoded_again == encoded_again


def test_more_rows_than_a_block():
    store = FeatureStore(encode, CPU, "mixed", 1500 * ROW_BYTES / 1e9)
    rows = np.concatenate([put(store, first, 700) for first in range(0, 3500, 700)])
    inds = np.random.default_rng(0).integers(0, 3500, 200)
    assert torch.equal(store.get(rows[inds])["features"][:, 0], torch.from_numpy(inds).float())


def test_freed_and_cleared_rows_are_used_again():
    store = FeatureStore(encode, CPU, "device", 6 * ROW_BYTES / 1e9)
    first, second = put(store, 0, 3), put(store, 3, 3)
    store.free(first)
    third = put(store, 6, 3)
    assert sorted(third) == sorted(first)
    assert store.get(np.concatenate([third, second]))["features"][:, 0].tolist() == [6, 7, 8, 3, 4, 5]
    store.clear()
    again = put(store, 9, 6)
    assert store.get(again)["features"][:, 0].tolist() == [9, 10, 11, 12, 13, 14]
    assert store.num_encoded_again == 0


def test_what_is_kept_is_a_copy():
    store = FeatureStore(encode, CPU, "device", 1.0)
    encoded = encode(observation(0, 2))
    rows = store.put(observation(0, 2), encoded)
    encoded["features"].zero_()
    assert store.get(rows)["features"][1, 0] == 1
    store.get(rows)["features"].zero_()
    assert store.get(rows)["features"][1, 0] == 1


@pytest.mark.parametrize(("placement", "memory"), [("disk", 1.0), ("host", -1.0)])
def test_bad_settings_are_refused(placement: Any, memory: float):
    with pytest.raises(ValueError, match="storage must be device, host, mixed or none"):
        FeatureStore(encode, CPU, placement, memory)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_losses_are_the_same_with_and_without_kept_features(tmp_path: Path, algorithm: str):
    """A frozen GR00T backbone; 50 kB keep some rows, so that minibatches mix kept and recomputed ones."""
    fewer = dict(num_steps=8) if algorithm == "ppo" else dict(max_rollouts=1)
    settings = [("mixed", 16.0), ("mixed", 5e-5), ("device", 5e-5), ("host", 5e-5), ("none", 0.0)]
    runs = [
        without_time(
            train(
                algorithm, tmp_path, make_agent=make_tiny_agent, num_iterations=1, update_epochs=1,
                feature_storage=storage, feature_memory_gb=memory, **fewer,
            )
        )
        for storage, memory in settings
    ]  # fmt: skip
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_frozen_vl_self_attention_is_kept_with_the_backbone(tmp_path: Path, algorithm: str):
    made: list[Gr00tAgent] = []

    def make_agent(args: Any) -> Gr00tAgent:
        made.append(make_tiny_agent(args))
        return made[-1]

    fewer = dict(num_steps=8) if algorithm == "ppo" else dict(max_rollouts=1)
    options = dict(make_agent=make_agent, num_iterations=1, update_epochs=1, train_vl_self_attention=False, **fewer)
    kept = without_time(train(algorithm, tmp_path, **options))
    again = without_time(train(algorithm, tmp_path, feature_storage="none", **options))
    assert kept == pytest.approx(again, rel=1e-5, abs=1e-6)
    assert kept["actor/ratio_first_minibatch_max_dev"] < 1e-5
    start = make_tiny_agent(type("Args", (), {"num_action_chunks": 2})).state_dict()
    moved = {name for name, value in made[0].state_dict().items() if not torch.equal(value, start[name])}
    assert any(name.startswith("action_head.model.") for name in moved)
    assert not [name for name in moved if name.startswith(("action_head.vl", "backbone."))]


def test_a_trained_backbone_is_encoded_up_to_what_is_not_trained(tmp_path: Path):
    options = dict(num_iterations=1, num_steps=4, update_epochs=1, train_backbone=True)
    kept = without_time(train("ppo", tmp_path, make_agent=make_tiny_agent, **options))
    again = without_time(train("ppo", tmp_path, make_agent=make_tiny_agent, feature_storage="none", **options))
    assert kept == pytest.approx(again, rel=1e-5, abs=1e-6)
    plain = make_mlp_agent(type("Args", (), {"num_action_chunks": 2}))
    assert set(plain.encode({"state.x": np.zeros((1, 1), np.float32)})) == {"state"}
