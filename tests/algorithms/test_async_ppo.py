"""The asynchronous trainer on a cluster of two nodes: equal to PPO in turns, staleness, and what is lost or stopped."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("ray", reason="Ray is not installed (pip install 'libero-gr00t[cluster]')")

import ray
from ray.cluster_utils import Cluster as Nodes

from algorithms import async_ppo_gr00t, dsrl_gr00t, grpo_gr00t, ppo_gr00t
from algorithms.common.args import base_name
from algorithms.common.checkpoint_notes import suite_of
from algorithms.common.cluster import connect
from algorithms.common.placement import Place
from algorithms.common.resume import checkpoints_in
from algorithms.common.rollouts import Cut, DecisionArrays, Rollout, from_store, join_rollouts, split_rollout, to_store
from algorithms.common.stages import EnvStep
from examples.own_agent_in_ppo import MLPAgent
from tests import preloaded
from tests.algorithms import cluster_trainer, line_trainer
from tests.algorithms.cluster_trainer import NAME, DyingAgent, DyingEnv, DyingTwiceEnv, MarkedAgent, MarkedEnv
from tests.algorithms.early_role import EarlyRole
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import logged
from tests.algorithms.test_launches import ROOT, wait_for
from tests.test_repository import help_texts

ADDED = {"rollout/staleness_mean", "rollout/workers_replaced", "rollout/episodes_discarded", "actor/importance_weight"}
OPTIONS: dict[str, Any] = dict(num_iterations=3, save_interval=1)
PLAIN_NAME = "ppo_libero_spatial_1"
OWN_ENVS = "env:0 rollout:0 actor:cpu"
OF_NODES: dict[str, Any] = dict(setup_worker_path=str(ROOT / "tests" / "ray_worker.py"), include_log_monitor=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A cluster of one node, whose workers start fast; tests add others."""
    quickly = dict(health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_failure_threshold=4)
    # Workers compete with the other tests on equal terms, and none starts that no actor has asked for.
    quickly |= dict(worker_niceness=0, prestart_worker_first_driver=False)
    head: dict[str, Any] = dict(num_cpus=2, include_dashboard=False, _system_config=quickly)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_WORKER_SERVER", str(preloaded.ray_server()))
        cluster = Nodes(initialize_head=True, head_node_args=head | OF_NODES)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of PPO."""
    folder = tmp_path_factory.mktemp("ppo")
    line_trainer.train("ppo", folder, **OPTIONS)
    return folder / PLAIN_NAME


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints_in(run)[-1][1] / "model.safetensors")


def assert_equals_ppo(run: Path, plain: Path) -> None:
    assert [{k: v for k, v in line.items() if k not in ADDED} for line in logged(run)] == logged(plain)
    assert all(torch.equal(w, final_weights(run)[name]) for name, w in final_weights(plain).items())


def kill(nodes: Nodes, node: Any) -> None:
    nodes.remove_node(node, allow_graceful=False)


def wait_for_one_node() -> None:
    """Nodes that were killed count for some time."""
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)


@contextmanager
def in_a_thread(folder: Path, **changes: Any) -> Iterator[Future[Any]]:
    """Trains with marks while the test, whose thread is the main one, does something to nodes."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(
            cluster_trainer.train, folder / "runs", agent=MarkedAgent, env=MarkedEnv, marks=folder, **changes
        )


def test_the_copies_of_arguments_and_formulas_agree():
    ours, theirs = (help_texts(module.Args) for module in (async_ppo_gr00t, ppo_gr00t))
    assert set(theirs) - set(ours) == {"dry_run"}
    defaults = [{f.name: f.default for f in dataclasses.fields(module.Args)} for module in (async_ppo_gr00t, ppo_gr00t)]
    for name in set(theirs) & set(ours):
        # Nothing is encoded anew here: rollout workers have done so.
        assert (ours[name] == theirs[name]) == (name != "feature_storage"), name
        assert (defaults[0][name] == defaults[1][name]) == (name != "run_name"), name
    for name, preset in ppo_gr00t.PRESETS.items():
        same = {f.name for f in dataclasses.fields(preset)} - {"run_name", "dry_run"}
        assert all(getattr(async_ppo_gr00t.PRESETS[name], f) == getattr(preset, f) for f in same)
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 6, 50, generator=generator)
    x, y = torch.rand(2, 6, 50, generator=generator) > 0.7
    tokens, executed = a.reshape(6, 5, 10), torch.arange(5) < torch.arange(1, 7)[:, None]
    calls: dict[str, tuple[Any, ...]] = {
        "compute_gae": (a, b, c, x, x | y, 0.9, 0.8),
        "trajectory_weights": (x, torch.full((6, 50), 5), 9),
        "won_decisions": (x, y),
        "select_decisions": (a.flatten(), np.repeat(np.arange(6), 50), 10),
        "policy_loss": (a.flatten(), b.flatten(), 0.2, 0.28, 3.0),
        "value_loss": (a.flatten(), b.flatten(), c.flatten(), 0.2, 1.0),
        "k3_kl": (a,),
        "mask_unexecuted": (tokens, executed, "chunk"),
        "mean_of_executed": (tokens, executed),
        "sum_per_decision": (tokens,),
    }
    for name, inputs in calls.items():
        results = [getattr(module, name)(*inputs) for module in (async_ppo_gr00t, ppo_gr00t)]
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_no_trainer_takes_the_run_of_another_for_its_own():
    """By `--resume auto`, that is, which finds a run by its name."""
    names = [
        {name for args in (*module.PRESETS.values(), module.Args()) for name in [base_name(args)]}
        for module in (ppo_gr00t, async_ppo_gr00t, grpo_gr00t, dsrl_gr00t)
    ]
    assert len(set.union(*names)) == sum(len(of_trainer) for of_trainer in names)


def test_importance_weights_by_hand():
    weights = async_ppo_gr00t.importance_weights(torch.tensor([0.0, math.log(2), 9.0]), torch.zeros(3), 5.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 5.0]))


def test_the_policy_loss_alone_is_weighted_by_importance():
    """With weights of 1 the loss is PPO's."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    executed = torch.arange(3) < torch.tensor([[3], [2], [1], [3]])
    logprobs = torch.where(executed, draw(4, 3), 0.0)
    batch = ppo_gr00t.Batch(
        executed=executed,
        logprobs=logprobs,
        start_logprobs=0.5 * logprobs,
        values=draw(4),
        advantages=draw(4),
        returns=draw(4),
        weights=draw(4).abs(),
        imitation_weights=draw(4).abs(),
    )
    outputs = (logprobs + 0.1 * draw(4, 3), draw(4, 3), draw(4), draw(4, 3, 7).abs())
    coefficients: dict[str, Any] = dict(logprob_level="action", ent_coef=0.1, kl_coef=0.5, imitation_coef=0.25)
    args, own_args = ppo_gr00t.Args(**coefficients), async_ppo_gr00t.Args(**coefficients)

    def weighted(importance: float, only_imitates: bool) -> Any:
        own_batch = async_ppo_gr00t.Batch(**vars(batch), importance=torch.full((4, 3), importance))
        return async_ppo_gr00t.ppo_loss(*outputs, own_batch, own_args, only_imitates)

    for only_imitates in (False, True):
        loss, terms, logratio = ppo_gr00t.ppo_loss(*outputs, batch, args, only_imitates)
        own_loss, own_terms, own_logratio = weighted(1.0, only_imitates)
        assert torch.equal(own_loss, loss)
        assert torch.equal(own_logratio, logratio)
        assert set(own_terms) - set(terms) == {"actor/importance_weight"}
        assert all(torch.equal(own_terms[name], term) for name, term in terms.items())

        twice, twice_terms, _ = weighted(2.0, only_imitates)
        torch.testing.assert_close(twice_terms["actor/loss"], 2 * terms["actor/loss"])
        added = 0.0 if only_imitates else (batch.weights * terms["actor/loss"]).mean()
        torch.testing.assert_close(twice, loss + added)


def test_a_rollout_that_is_split_and_joined_is_the_same():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    def features(*shape: int) -> dict[str, Any]:
        return {"half": draw(*shape, 3).bfloat16(), "whole": draw(*shape)}

    names = [name for name in Rollout._fields if name not in ("features", "last_features", "cut")]
    cut = [Cut(2, torch.tensor([0, 3]), features(2)), Cut(4, torch.tensor([1]), features(1))]
    whole = Rollout(features=features(5, 4), last_features=features(4), cut=[], **{name: draw(5, 4) for name in names})
    stored = to_store(whole)._replace(cut=[to_store(c)._replace(rows=c.rows.numpy()) for c in cut])
    parts = [from_store(part) for part in split_rollout(stored, 2)]
    assert parts[1].rewards.shape == (5, 2)
    torch.testing.assert_close(parts[1].features["half"], whole.features["half"][:, 2:], rtol=0, atol=0)
    joined = join_rollouts(parts, torch.device("cpu"))
    for name in (*names, "last_features"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=0, atol=0)
    rows = [(c.decision, int(row), c.features["half"][i]) for c in joined.cut for i, row in enumerate(c.rows)]
    wanted = [(c.decision, int(row), c.features["half"][i]) for c in cut for i, row in enumerate(c.rows)]
    assert len(rows) == len(wanted) == 3
    for k, row, value in wanted:
        assert any(k == other_k and row == other_row and torch.equal(value, v) for other_k, other_row, v in rows)


def test_decisions_of_stages_are_put_side_by_side():
    draw = torch.Generator().manual_seed(0)
    whole = {"half": torch.randn(3, 4, 2, generator=draw).bfloat16(), "whole": torch.randn(3, 4, generator=draw)}
    kept = DecisionArrays(3, 4)
    for step in range(3):
        for rows in (slice(0, 1), slice(1, 4)):
            part = {name: leaf[step, rows].clone() for name, leaf in whole.items()}
            kept.put(step, rows, part)
            part["whole"].zero_()  # what was put is a copy
    for name, leaf in from_store(kept.arrays).items():
        torch.testing.assert_close(leaf, whole[name], rtol=0, atol=0)


def test_the_next_rollout_takes_the_memory_of_the_last():
    kept = DecisionArrays(2, 1)
    memory: list[np.ndarray] = []
    for values in ([1.0, 2.0], [3.0, 4.0]):
        for step, value in enumerate(values):
            kept.put(step, slice(0, 1), torch.tensor([value]))
        memory.append(kept.arrays)
        assert memory[-1][:, 0].tolist() == values
    assert np.shares_memory(*memory)


def test_a_rollout_worker_keeps_no_features_of_past_decisions_on_its_device():
    alive: list[int] = []
    encoded: list[weakref.ref[torch.Tensor]] = []

    class WatchedAgent(MLPAgent):
        def encode(self, obs: Any) -> dict[str, torch.Tensor]:
            features = super().encode(obs)
            if features is not obs:
                encoded.append(weakref.ref(features["state"]))
            alive.append(sum(ref() is not None for ref in encoded))
            return features

    class Stage:
        env_ids, rows, offset = np.arange(4), slice(0, 4), 0

        def __init__(self) -> None:
            self.envs = LineVectorEnv(4)
            self.obs = self.envs.observe()

        def send(self, actions: Any) -> None:
            self.outcome = EnvStep(*self.envs.step(actions))

        def receive(self) -> EnvStep:
            return self.outcome

    worker = object.__new__(async_ppo_gr00t.RolloutWorker)
    worker.args = async_ppo_gr00t.Args(num_steps=12, num_action_chunks=2, truncation="failure")
    worker.agent, worker.env_ids = WatchedAgent(("state.x",), 1, 2), np.arange(4)
    worker.accelerator = cast(Any, SimpleNamespace(autocast=nullcontext))
    worker.run = cast(Any, SimpleNamespace(check_actions=lambda *_, **__: None))
    worker.add_step = lambda *_: None  # type: ignore[method-assign]
    worker.stages = [cast(Any, Stage())]
    for name in ("features", "actions", "logprobs", "values"):
        setattr(worker, name, DecisionArrays(12, 4))
    rollout = worker.play(1, 0)
    assert rollout.features["state"].shape == (12, 4, 1)
    assert len(encoded) == 13
    assert max(alive) <= 2


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:1", ConnectionError, r"ray_address=127.0.0.1:1: nobody answers .*`ray start --head --port 1`"),
        ("ray://127.0.0.1", ValueError, "is no host:port; give what `ray start --head` prints"),
        ("here", ValueError, "ray_address='here' is no host:port"),
    ],
)
def test_an_address_where_there_is_no_cluster_is_refused(address: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message), connect(address):
        pass


def test_sharding_and_several_drivers_are_refused(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="FSDP is not supported here"), connect(None):
            pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched"), connect(None):
        pass


@pytest.mark.slow
def test_in_turns_it_is_ppo_also_after_a_rollout_worker_and_a_learner_were_killed(
    nodes: Nodes, tmp_path: Path, plain: Path
):
    """And after an env worker and a rollout worker were, while environments were opened."""
    cluster_trainer.train(tmp_path / "runs", agent=DyingAgent, env=DyingEnv, marks=tmp_path, **OPTIONS)
    for name in ("env worker", "killed rollout worker", "rollout worker", "learner"):
        assert (tmp_path / name).exists()
    run = tmp_path / "runs" / NAME
    assert_equals_ppo(run, plain)
    assert logged(run)[0]["rollout/workers_replaced"] == 2
    assert sum(line["rollout/episodes_discarded"] for line in logged(run)) == 0


def test_a_process_is_shown_its_gpu_before_its_role_is_imported(nodes: Nodes):
    added = nodes.add_node(num_cpus=1, num_gpus=2, **OF_NODES)
    with connect(None) as cluster:
        (number,) = (i for i, node in enumerate(cluster.nodes) if node.gpus == 2)
        for gpu in (0, 1):
            actor = cluster.start(EarlyRole, Place(node=number, gpu=gpu, cpus=1), "role")
            assert ray.get(actor.shown.remote("of")) == f"of role {gpu}"
    kill(nodes, added)
    wait_for_one_node()


@pytest.mark.slow
def test_environments_on_the_gpu_that_decides_are_of_its_process_and_lost_with_it(
    nodes: Nodes, tmp_path: Path, plain: Path
):
    """The GPU is one in name only. The process dies as it opens its environments, once more as it does so again, and
    in its second rollout.
    """
    added = nodes.add_node(num_cpus=2, num_gpus=1, **OF_NODES)
    inputs: dict[str, Any] = dict(agent=DyingAgent, env=DyingTwiceEnv, marks=tmp_path, placement=OWN_ENVS)
    cluster_trainer.train(tmp_path / "runs", **inputs, **OPTIONS)
    kill(nodes, added)
    wait_for_one_node()
    for name in ("first reset", "second reset", "rollout worker", "learner"):
        assert (tmp_path / name).exists()
    run = tmp_path / "runs" / NAME
    assert_equals_ppo(run, plain)
    assert logged(run)[0]["rollout/workers_replaced"] == 2
    assert sum(line["rollout/episodes_discarded"] for line in logged(run)) == 0


@pytest.mark.slow
def test_in_turns_it_begins_by_imitation_as_ppo_does_and_with_old_weights_too(nodes: Nodes, tmp_path: Path):
    options: dict[str, Any] = dict(make_agent=line_trainer.make_tiny_agent, num_iterations=3, num_steps=12)
    options |= dict(imitation_coef=1.0, imitation_iterations=1, imitation_epochs=2, critic_warmup_iterations=1)
    options |= dict(lr_schedule="adaptive", target_kl=1e-3, learning_rate=1e-4, adam_eps=1e-5, update_fraction=1 / 3)
    line_trainer.train("ppo", tmp_path / "plain", **options)
    cluster_trainer.train(tmp_path / "turns", **options)
    plain, run = tmp_path / "plain" / PLAIN_NAME, tmp_path / "turns" / NAME
    for line, other in zip(logged(plain), logged(run), strict=True):  # up to rounding, as below
        assert {k: v for k, v in other.items() if k not in ADDED} == pytest.approx(line, rel=1e-4, abs=1e-5)
    for name, value in final_weights(plain).items():
        torch.testing.assert_close(final_weights(run)[name], value, rtol=1e-4, atol=1e-6)
    assert suite_of(str(run / "checkpoints" / "iteration_3")) == "libero_spatial"
    imitating, resting, _ = logged(plain)
    assert (imitating["actor/num_updates"], resting["actor/num_updates"]) == (6, 4)
    assert imitating["actor/imitation_loss"] > 0
    assert imitating["actor/lr"] > resting["actor/lr"] == 0

    # The second rollout is played by the weights from before imitation.
    options |= dict(imitation_iterations=2, num_iterations=2)
    cluster_trainer.train(tmp_path / "old", max_staleness=1, **options)
    lines = logged(tmp_path / "old" / NAME)
    assert [line["rollout/staleness_mean"] for line in lines] == [0, 1]
    assert [line["actor/num_updates"] for line in lines] == [6, 6]
    assert lines[1]["actor/importance_weight"] != 1
    assert all(line["actor/ratio_first_minibatch_max_dev"] < 1e-4 for line in lines)


@pytest.mark.slow
def test_weights_are_as_old_as_allowed_and_a_killed_node_leaves_its_environments_to_the_others(
    nodes: Nodes, tmp_path: Path
):
    lost = nodes.add_node(num_cpus=2, **OF_NODES)
    with in_a_thread(tmp_path, num_iterations=3, max_staleness=1, env_workers=2) as training:
        wait_for(lambda: (tmp_path / "rollout worker").exists() or training.done())
        kill(nodes, lost)
        training.result()
    wait_for_one_node()
    lines = logged(tmp_path / "runs" / NAME)
    assert [line["rollout/staleness_mean"] for line in lines] == [0, 1, 1]
    assert sum(line["rollout/workers_replaced"] for line in lines) == 1
    assert sum(line["rollout/episodes_discarded"] for line in lines) == 4
    assert lines[0]["actor/importance_weight"] == 1.0 != lines[1]["actor/importance_weight"]
    assert all(line["actor/ratio_first_minibatch_max_dev"] < 1e-4 for line in lines)


@pytest.mark.slow
def test_a_node_that_is_killed_is_replaced_by_one_that_joins(nodes: Nodes, tmp_path: Path, plain: Path):
    """The rollout worker is on the node's GPU, one in name only; its environments and the learner are elsewhere."""
    lost = nodes.add_node(num_cpus=1, num_gpus=1, **OF_NODES)
    with in_a_thread(tmp_path, placement="env:cpu rollout:0 actor:cpu", **OPTIONS) as training:
        wait_for(lambda: (tmp_path / "rollout worker").exists() or training.done())
        kill(nodes, lost)
        joined = nodes.add_node(num_cpus=1, num_gpus=1, **OF_NODES)
        training.result()
    kill(nodes, joined)
    wait_for_one_node()
    run = tmp_path / "runs" / NAME
    assert sum(line["rollout/workers_replaced"] for line in logged(run)) == 1
    assert_equals_ppo(run, plain)


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_by_resume_auto(nodes: Nodes, tmp_path: Path, plain: Path):
    program = cluster_trainer.command(tmp_path, ray_address=nodes.address, **OPTIONS)
    driver = preloaded.start(*program)
    wait_for(lambda: list(tmp_path.glob("*/checkpoints/iteration_1")), driver)
    driver.kill()
    driver.communicate()
    assert len(logged(tmp_path / NAME)) < 3
    cluster_trainer.train(tmp_path, resume=Path("auto"), **OPTIONS)
    assert_equals_ppo(tmp_path / NAME, plain)


@pytest.mark.slow
def test_a_start_that_was_replaced_is_refused(nodes: Nodes, tmp_path: Path):
    options: dict[str, Any] = dict(kl_coef=0.1)
    cluster_trainer.train(tmp_path, num_iterations=1, **options)
    options |= dict(resume=Path("auto"), num_iterations=2, agent=cluster_trainer.LouderAgent, marks=tmp_path)
    with pytest.raises(ValueError, match="SHA-256 of the weights that training started from was"):
        cluster_trainer.train(tmp_path, **options)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["driver", "env worker", "learner"])
def test_a_request_to_stop_any_process_saves_and_ends_all(nodes: Nodes, tmp_path: Path, role: str):
    def ask() -> None:
        wait_for((tmp_path / "learner").exists)
        wait_for((tmp_path / "rollout worker").exists)
        pid = os.getpid() if role == "driver" else int((tmp_path / role).read_text())
        os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    inputs: dict[str, Any] = dict(agent=MarkedAgent, env=MarkedEnv, marks=tmp_path)
    with pytest.raises(SystemExit) as caught:
        cluster_trainer.train(tmp_path / "runs", num_iterations=100, **inputs)
    thread.join()
    assert caught.value.code == 0
    run = tmp_path / "runs" / NAME
    ((done, _),) = checkpoints_in(run)
    assert 1 <= done == len(logged(run)) < 50


@pytest.mark.slow
def test_two_learners_equal_one_and_two_rollout_workers_one(nodes: Nodes, tmp_path: Path):
    """Two learners add what one adds, in another order, and so do matrix products of half of the rows."""
    options: dict[str, Any] = dict(num_iterations=4, max_staleness=2, adam_eps=1e-5)
    cluster_trainer.train(tmp_path / "one", placement="env:cpu*2 rollout:cpu*2 actor:cpu", **options)
    options |= dict(placement="env:cpu*2 rollout:cpu actor:cpu*2", pipeline_stage_num=2)
    cluster_trainer.train(tmp_path / "two", **options)
    one, two = tmp_path / "one" / NAME, tmp_path / "two" / NAME
    assert [line["rollout/staleness_mean"] for line in logged(one)] == [0, 1, 2, 2]
    for a, b in zip(logged(one), logged(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    for name, value in final_weights(one).items():
        torch.testing.assert_close(final_weights(two)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_libero_and_gr00t_give_what_ppo_gives(nodes: Nodes, tmp_path: Path):
    """Up to rounding, which depends on how many observations are encoded together."""
    sizes = dict(num_envs=2, num_steps=2, minibatch_size=4, micro_batch_size=4, num_iterations=1, update_epochs=1)
    options: dict[str, Any] = dict(model="nano", task_ids=(0,), horizon=10, log_with=(), eval_episodes_per_task=1)
    options |= sizes | dict(video_interval=1, critic_detach=False, adam_eps=1e-5)  # or it steps by what rounding leaves
    # As many as the roles have: some processors round sums by it, and a pixel of the next picture changes with them.
    torch.set_num_threads(2)
    ppo_gr00t.main(ppo_gr00t.Args(output_dir=tmp_path / "ppo", **options))
    args = async_ppo_gr00t.Args(output_dir=tmp_path / "async", env_workers=2, pipeline_stage_num=2, **options)
    async_ppo_gr00t.main(args)
    plain, run = tmp_path / "ppo" / PLAIN_NAME, tmp_path / "async" / NAME
    (line,), (other,) = logged(plain), logged(run)
    # Four returns that hardly differ stand below the fraction in it: rounding counts ten times as much.
    explained = [of_run.pop("actor/explained_variance") for of_run in (line, other)]
    assert explained[1] == pytest.approx(explained[0], rel=1e-3)
    assert {k: v for k, v in other.items() if k not in ADDED} == pytest.approx(line, rel=1e-4, abs=1e-5)
    for name, value in final_weights(plain).items():
        torch.testing.assert_close(final_weights(run)[name], value, rtol=1e-4, atol=1e-6)
    films = [sorted(path.name for path in (folder / "videos").rglob("*.mp4")) for folder in (plain, run)]
    assert films[0] == films[1] != []
