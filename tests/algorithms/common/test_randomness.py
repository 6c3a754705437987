"""Randomness by key: nothing depends on batch mates, processes or who draws."""

import numpy as np
import pytest
import torch

from algorithms.common.randomness import flow_draws, flow_draws_of, generators_of, seed_of, stratified_minibatches
from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, read_metadata
from gr00t_agent.loading import NANO_METADATA
from tests.algorithms.tiny_agent import tiny_agent


def make_tiny_agent(**policy_changes) -> Gr00tAgent:
    torch.manual_seed(0)
    return tiny_agent(read_metadata(NANO_METADATA, LiberoFrankaDataConfig().embodiment_tag), **policy_changes).eval()


def observation(agent: Gr00tAgent, num_rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    config, size = agent.preprocessor.data_config, agent.image_size
    obs = {
        key: rng.uniform(-0.1, 0.1, (num_rows, 2 if key.endswith("gripper") else 1)).astype(np.float32)
        for key in config.state_keys
    }
    obs |= {key: rng.integers(0, 255, (num_rows, size, size, 3), dtype=np.uint8) for key in config.video_keys}
    return obs | {config.language_key: np.array(["open the drawer"] * num_rows)}


def test_seeds_depend_on_every_part_of_the_key():
    assert len({seed_of(1, 2, 3), seed_of(1, 2), seed_of(3, 2, 1), seed_of(1, 2, 4)}) == 4
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) < 2**63


@pytest.mark.parametrize("changes", [{}, {"joint_logprob": True}, {"noise_method": "flow_cps"}])
def test_a_row_draws_the_same_whatever_its_batch(changes):
    agent = make_tiny_agent(**changes)
    obs = observation(agent, 4)
    with torch.no_grad():
        whole, logprob, *_ = agent(obs, generator=generators_of((1, 2), range(4)))
        part, part_logprob, *_ = agent({k: v[2:] for k, v in obs.items()}, generator=generators_of((1, 2), (2, 3)))
        _, again, *_ = agent(obs, whole)
    assert torch.equal(whole.denoise_index[2:], part.denoise_index)
    torch.testing.assert_close(whole.chain[2:], part.chain, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprob[2:], part_logprob, atol=1e-4, rtol=0)
    assert torch.equal(again, logprob)
    assert not torch.equal(whole.chain[0, 0], whole.chain[1, 0])


def test_one_generator_per_row_is_required():
    agent = make_tiny_agent()
    with pytest.raises(ValueError, match="3 generators were given for 4 rows"):
        agent(observation(agent, 4), generator=generators_of((1,), range(3)))


def test_flow_draws_of_decisions_depend_on_their_environment_alone():
    env_ids = np.array([3, 9, 3, 4, 9, 3])
    noise, steps = flow_draws_of((1, 2), env_ids, 4, (16, 8))
    assert noise.shape == (6, 16, 8)
    assert len(torch.unique(noise)) > 700  # of 768 float32, some of which may be equal
    for env_id in (3, 4, 9):
        rows = np.flatnonzero(env_ids == env_id)
        alone = flow_draws((1, 2), [env_id], len(rows), 4, (16, 8))
        assert torch.equal(noise[rows], alone[0])
        assert torch.equal(steps[rows], alone[1])
    assert flow_draws_of((1, 2), env_ids[:0], 4, (16, 8))[0].shape == (0, 16, 8)


def test_dealt_parts_are_equal_shares_of_each_stratum():
    strata = np.repeat([5, 7], 12)
    parts = stratified_minibatches(strata, 4, (1,))
    assert sorted(np.concatenate(parts)) == list(range(24))
    assert all((strata[part] == 5).sum() == 3 for part in parts)
    assert not all((np.diff(part) > 0).all() for part in parts)
    assert any(not np.array_equal(a, b) for a, b in zip(parts, stratified_minibatches(strata, 4, (2,)), strict=True))


def test_ragged_strata_are_dealt_to_within_one():
    parts = stratified_minibatches(np.zeros(10, dtype=np.int64), 4, (1,))
    assert sorted(map(len, parts)) == [2, 2, 3, 3]


def test_dealing_does_not_depend_on_the_number_of_processes():
    strata = np.tile(np.arange(4), 6)
    whole = stratified_minibatches(strata, 3, (9,))
    for of_process in ((0, 1), (2, 3)):
        mine = np.flatnonzero(np.isin(strata, of_process))
        for part, all_rows in zip(stratified_minibatches(strata[mine], 3, (9,)), whole, strict=True):
            assert set(mine[part]) == set(all_rows) & set(mine)
