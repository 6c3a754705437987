"""What the driver of a cluster asks of workers when some are lost, without a cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install 'libero-gr00t[cluster]')")

from ray.exceptions import ActorDiedError, RayActorError

from algorithms.common import cluster
from algorithms.common.cluster import LearnerGroup, RolloutGroup
from algorithms.common.placement import Node, Place, place_roles
from algorithms.common.randomness import EPISODES, seed_of
from algorithms.common.roles import LearnerRole, Report, RolloutRole
from algorithms.common.vector_envs import StackedStates

SEED = 7
NODES = [Node(node_id="a", address="10.0.0.1", cpus=4, gpus=1)]


class FakeWorker:
    """An actor whose methods answer what the test has prepared, at once."""

    def __init__(self, answers: dict[str, list[Any]], asked: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.answers, self.asked, self.is_there = answers, asked, True

    def __getattr__(self, name: str) -> Any:
        def remote(*inputs: Any) -> Any:
            self.asked.append((name, inputs))
            return self.answers[name].pop(0)

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class FakeCluster:
    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.are_there: list[bool] = []  # of the workers that start next; the others all are

    def start(self, actor: type, place: Place, *inputs: Any) -> FakeWorker:
        worker = FakeWorker(self.answers, self.asked)
        worker.is_there = self.are_there.pop(0) if self.are_there else True
        return worker

    def standing(self, place: Place) -> Place:
        return place

    def get(self, call: Any) -> Any:
        if isinstance(call, Exception):
            raise call
        return call

    def pass_on_request(self) -> None: ...

    def openings(self) -> list[list[tuple[str, Any]]]:
        """What each opening asked of each env worker: the method, and its input if there is one."""
        calls = [inputs[1] for name, inputs in self.asked if name == "open_envs"]
        return [[(name, *inputs) for name, inputs in openings] for openings in calls]


def states_of(moment: str) -> StackedStates:
    return StackedStates.of({env_id: {"state": np.array(f"{moment} {env_id}")} for env_id in range(4)})


def seeds(*key: int, env_ids: range) -> list[int]:
    return [seed_of(SEED, EPISODES, *key, env_id) for env_id in env_ids]


def make_group(
    monkeypatch: pytest.MonkeyPatch,
    placed: str = "env:cpu*2 rollout:cpu actor:cpu",
    num_stages: int = 1,
    **answers: list[Any],
) -> tuple[RolloutGroup, FakeCluster, Any]:
    """A group of one rollout worker with four environments, of two env workers unless they are `placed` elsewhere."""
    monkeypatch.setattr(cluster, "is_there", lambda worker: worker.is_there)
    monkeypatch.setattr(cluster.ray, "cancel", lambda call, force: None)
    fake: Any = FakeCluster({"observed_size": [0]} | answers)
    args = SimpleNamespace(seed=SEED, num_envs=4, max_restarts=3, pipeline_stage_num=num_stages)
    placement = place_roles(NODES, placement=placed)
    inputs: Any = (lambda *_, **__: None, lambda *_, **__: None)
    group = RolloutGroup(fake, placement, RolloutRole, args, *inputs, Path("run"))
    return group, fake, group._shares[0]


def test_an_env_worker_that_is_lost_while_environments_open_takes_no_episode_with_it(monkeypatch: pytest.MonkeyPatch):
    group, fake, share = make_group(monkeypatch, open_envs=[(False, None), (True, states_of("start"))])
    share.env_workers[1].is_there = False
    assert group.begin(5, None) == states_of("start")
    first = [("reset", seeds(5, env_ids=range(2))), ("reset", seeds(5, env_ids=range(2, 4)))]
    assert fake.openings() == [first, first]
    assert group.losses() == {"rollout/workers_replaced": 1, "rollout/episodes_discarded": 0}


def test_where_states_are_known_all_go_back_to_them(monkeypatch: pytest.MonkeyPatch):
    group, fake, share = make_group(monkeypatch, open_envs=[(False, None), (True, states_of("saved"))])
    share.env_workers[0].is_there = False
    group.begin(5, states_of("saved"))
    saved = states_of("saved")
    assert fake.openings() == [[("restore", [saved[0], saved[1]]), ("restore", [saved[2], saved[3]])]] * 2
    assert group.losses()["rollout/episodes_discarded"] == 0


@pytest.mark.parametrize("can_restore", [True, False])
def test_one_that_is_lost_again_while_environments_open_leaves_the_boundary_to_the_others(
    monkeypatch: pytest.MonkeyPatch, can_restore: bool
):
    start, again = (states_of(moment) if can_restore else None for moment in ("start", "again"))
    group, fake, share = make_group(
        monkeypatch,
        open_envs=[(True, start), (False, None), (True, again)],
        rollout=[[Report(is_lost=True), None], [None, None], [Report(env_steps=3), "part"]],
    )
    group.begin(0, None)
    group.submit(1, 0, "weights")
    share.env_workers[1].is_there = False
    fake.are_there = [False]  # and what takes its place
    reports, parts = group.receive(1)
    assert (reports[0].env_steps, parts) == (3, [["part"]])
    kept = ("restore", [states_of("start")[0], states_of("start")[1]]) if can_restore else ("observe",)
    assert fake.openings()[1:] == [[kept, ("reset", seeds(0, 1, env_ids=range(2, 4)))]] * 2
    assert group.losses() == {"rollout/workers_replaced": 2, "rollout/episodes_discarded": 2}


@pytest.mark.parametrize("can_restore", [True, False])
def test_environments_of_a_rollout_worker_s_own_process_are_replaced_with_it(
    monkeypatch: pytest.MonkeyPatch, can_restore: bool
):
    start, again = (states_of(moment) if can_restore else None for moment in ("start", "again"))
    group, fake, share = make_group(
        monkeypatch,
        "env:0 rollout:0 actor:0",
        num_stages=2,
        open_envs=[RayActorError(), (True, start), RayActorError(), (True, again)],
        rollout=[[RayActorError(), None], [RayActorError(), None], [Report(env_steps=3), "part"]],
        task_ids=[RayActorError(), [0, 3]],
    )
    share.worker.is_there = False
    fake.are_there = [False, False, False]  # what takes its place, twice and once more
    assert group.task_ids() == [0, 3]
    group.begin(0, None)
    group.submit(1, 0, "weights")
    reports, parts = group.receive(1)
    assert (reports[0].env_steps, parts) == (3, [["part"]])
    assert share.env_workers == []
    both = range(2), range(2, 4)
    first = [("reset", seeds(0, env_ids=ids)) for ids in both]
    then = [("reset", seeds(0, 2, env_ids=ids)) for ids in both]  # the second loss since the boundary
    if can_restore:
        then = [("restore", [states_of("start")[i] for i in ids]) for ids in both]
    assert fake.openings() == [first, first, then, then]
    lost = 0 if can_restore else 4
    assert group.losses() == {"rollout/workers_replaced": 4, "rollout/episodes_discarded": lost}


def test_tasks_are_weighted_before_episodes_begin(monkeypatch: pytest.MonkeyPatch):
    group, fake, share = make_group(
        monkeypatch, open_envs=[(True, None), (True, None)], rollout=[[Report(is_lost=True), None], [Report(), "part"]]
    )
    group.begin(3, None, np.array([1.5, 0.5]))
    group.submit(4, 3, "weights", np.array([0.2, 1.8]))
    share.env_workers[0].is_there = False
    group.receive(4)
    weights = [inputs[2].tolist() for name, inputs in fake.asked if name == "open_envs"]
    assert weights == [[1.5, 0.5], [0.2, 1.8]]


def test_workers_that_are_lost_before_the_first_rollout_are_replaced(monkeypatch: pytest.MonkeyPatch):
    def start(self: FakeCluster, actor: type, place: Place, *inputs: Any) -> FakeWorker:
        worker = FakeWorker(self.answers, self.asked)
        worker.is_there = False
        return worker

    monkeypatch.setattr(FakeCluster, "start", start)
    lost = RayActorError()
    answers: dict[str, list[Any]] = dict(observed_size=[lost, 64], task_ids=[lost, [0, 3]])
    group, _, share = make_group(monkeypatch, **answers)
    assert group.task_ids() == group.task_ids() == [0, 3]  # asked for once, also after learners start again
    assert (group._observed_size, share.losses) == (64, 2)
    assert group.losses() == {"rollout/workers_replaced": 3, "rollout/episodes_discarded": 0}


def test_losses_before_the_first_rollout_are_limited_and_an_error_is_none(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match="lost workers of rollout worker 0 more than max_restarts=3 times"):
        make_group(monkeypatch, observed_size=[RayActorError() for _ in range(4)])
    wrong = ActorDiedError()
    wrong._actor_init_failed = True
    with pytest.raises(RuntimeError, match="a worker could not be made"):
        make_group(monkeypatch, observed_size=[wrong])
    group, *_ = make_group(monkeypatch, open_envs=[wrong])
    with pytest.raises(RuntimeError, match="rollout worker 0 could not be made"):
        group.begin(0, None)


def test_a_learner_that_is_lost_as_the_group_starts_has_all_start_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(cluster.ray, "wait", lambda calls, num_returns, timeout: (calls[:1], calls[1:]))
    monkeypatch.setattr(cluster.ray, "kill", lambda worker: None)
    monkeypatch.setattr(cluster, "result", lambda call: call)
    wrong = ActorDiedError()
    wrong._actor_init_failed = True
    fake: Any = FakeCluster(dict(free_address=[RayActorError(), "host:1", wrong], join=[None]))
    placement = place_roles(NODES, placement="rollout:cpu actor:cpu")
    run: Any = SimpleNamespace(path=tmp_path, forget_after=lambda iteration: None)
    inputs: Any = (lambda *_: None, lambda *_: None)
    learners = LearnerGroup(fake, placement, LearnerRole, SimpleNamespace(max_restarts=1), *inputs, run)
    told: list[str] = []
    assert learners.train(lambda checkpoint: {"done": 1.0}, None, told.append) == {"done": 1.0}
    assert told == ["a learner was lost; all start again from the start"]
    assert [name for name, _ in fake.asked] == ["free_address", "free_address", "join"]
    with pytest.raises(RuntimeError, match="a learner could not be made"):
        learners.train(lambda checkpoint: {}, None, told.append)
    assert len(told) == 1
