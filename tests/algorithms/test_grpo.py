"""The GRPO trainer: its formulas by hand, its loop, and that it learns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from algorithms import grpo_gr00t
from algorithms.grpo_gr00t import Args, group_advantages, informative_groups, policy_loss, sample_groups
from algorithms.ppo_gr00t import policy_loss as ppo_policy_loss
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.mlp_agent import MLPAgent


def make_agent(args: Args) -> MLPAgent:
    return MLPAgent(("state.x",), 1, args.num_action_chunks)


def make_envs(args: Args, num_envs: int, image_size: int) -> LineVectorEnv:
    return LineVectorEnv(num_envs, args.num_action_chunks, autoreset=AutoresetMode.DISABLED)


def train(folder: Path, make_envs: Any = make_envs, **changes: Any) -> dict[str, float]:
    defaults = dict(
        output_dir=folder, num_iterations=2, num_envs=16, group_size=8, num_groups=4, max_rollouts=4,
        num_action_chunks=2, num_minibatches=4, update_epochs=4, learning_rate=3e-3, eval_episodes_per_task=0,
        log_with=(),
    )  # fmt: skip
    return grpo_gr00t.main(Args(**(defaults | changes)), make_agent, make_envs)


def test_group_advantages_by_hand():
    # group (1, 0, 0, 1): mean 1/2, population std 1/2
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), 4)
    torch.testing.assert_close(advantages[:4], torch.tensor([1.0, -1, -1, 1]), atol=1e-5, rtol=0)
    assert torch.equal(advantages[4:], torch.zeros(4))


def test_informative_groups_drop_the_all_equal_ones():
    success = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]).bool()
    assert informative_groups(success, 4, 0.1, 0.9).tolist() == [False, False, True]


def test_the_copies_of_the_policy_loss_agree():
    generator = torch.Generator().manual_seed(0)
    logratio, advantages = torch.randn(2, 1000, generator=generator)
    for dual_clip in (None, 3.0):
        ours = policy_loss(logratio, advantages, 0.2, 0.28, dual_clip)
        theirs = ppo_policy_loss(logratio, advantages, 0.2, 0.28, dual_clip)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_groups_are_drawn_without_replacement_while_there_are_enough():
    jobs = [(task, state) for task in range(2) for state in range(3)]
    drawn = sample_groups(np.random.default_rng(0), jobs, 6)
    assert sorted(map(tuple, drawn.tolist())) == jobs
    assert len(sample_groups(np.random.default_rng(0), jobs, 14)) == 14


@pytest.mark.parametrize("group_size", [1, 3])
def test_group_sizes_that_do_not_fit_are_refused(tmp_path: Path, group_size: int):
    with pytest.raises(ValueError, match=f"group_size={group_size} must be at least 2 and divide the 16"):
        train(tmp_path, group_size=group_size)


def test_members_of_a_group_start_alike_and_a_finished_episode_costs_nothing(tmp_path: Path):
    made: list[LineVectorEnv] = []

    def keep(args: Args, num_envs: int, image_size: int) -> LineVectorEnv:
        made.append(make_envs(args, num_envs, image_size))
        return made[-1]

    starts: list[np.ndarray] = []
    restart = LineVectorEnv.restart

    def spy(self: LineVectorEnv, mask: np.ndarray, state_id: np.ndarray | None = None) -> None:
        restart(self, mask, state_id)
        starts.append(self.x.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineVectorEnv, "restart", spy)
        metrics = train(tmp_path, keep, num_iterations=1, max_rollouts=1)
    assert all(len(np.unique(group)) == 1 for group in starts[0].reshape(-1, 8))
    assert made[0].total_steps == pytest.approx(metrics["env/episode_len"] * 16)


def test_it_stops_sampling_at_enough_groups_and_never_exceeds_max_rollouts(tmp_path: Path):
    hopeless = train(tmp_path, num_iterations=1, min_group_success=1.1, max_group_success=2.0)
    assert hopeless["rollout/num_rollouts"] == 4
    assert hopeless["rollout/groups_kept"] == 0
    assert np.isnan(hopeless["actor/loss"])
    easy = train(tmp_path, num_iterations=1, min_group_success=-1.0, max_group_success=2.0, num_groups=2)
    assert easy["rollout/num_rollouts"] == 1
    assert easy["rollout/groups_kept"] == 1


def test_first_minibatch_ratio_is_one_and_the_seed_decides_everything(tmp_path: Path):
    first, again = train(tmp_path), train(tmp_path)
    assert first["actor/ratio_first_minibatch_max_dev"] < 1e-5
    timeless = {k: v for k, v in first.items() if not k.startswith(("time/", "charts/"))}
    assert timeless == {k: again[k] for k in timeless}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns(tmp_path: Path, seed: int):
    train(tmp_path, seed=seed, num_iterations=40, ent_coef=0.003)
    lines = (tmp_path / f"grpo_libero_spatial_{seed}" / "metrics.jsonl").read_text().splitlines()
    success = [json.loads(line)["env/success_once"] for line in lines]
    assert success[0] <= 0.85
    assert np.mean(success[-5:]) >= 0.95
