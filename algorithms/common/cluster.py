"""Ray: the cluster that a run is on, the actors of its roles, and what is done when one of them is lost.

    with connect(args.ray_address) as cluster:
        placement = cluster.place(args)
        learners = LearnerGroup(cluster, placement, Learner, ...)
        rollouts = RolloutGroup(cluster, placement, RolloutWorker, ...)  # with their env workers

Actors are put on the node, and shown the GPU, that the placement says. What they give each other goes by Ray's object
store; the driver passes on references only. An actor is lost when its process or its node is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayActorError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from algorithms.common.cluster_process import StopBell, process_of, versions
from algorithms.common.env_worker import EnvWorker
from algorithms.common.placement import Node, Place, Placement, check_shares, check_versions, describe, place_roles
from algorithms.common.processes import check_alone, refuse_sharding
from algorithms.common.randomness import EPISODES, seed_of
from algorithms.common.resume import RestoredState, checkpoints_in
from algorithms.common.roles import LOST, LearnerRole, Report, RolloutRole, refuse_unmade, result
from algorithms.common.run import RunFolder
from algorithms.common.vector_envs import EnvState, StackedStates, merged_states

# Errors of a task on a node that is gone or does nothing.
_SILENT = (*LOST, TaskUnschedulableError, GetTimeoutError)
_CONNECT_S = 10.0
# An actor that does not answer for so long counts as lost; so long too a new node may take to come.
_ANSWER_S = 120.0
# Within this time of an error of one learner it is known whether another one, whom it waited for, was lost.
_NEWS_S = 5.0


class LearnersLost(Exception):
    """A process of the learner group is gone; the group cannot go on."""


# --- the cluster ---


@contextmanager
def connect(address: str | None) -> Generator[Cluster]:
    """Gives the cluster at `address` (host:port), or a local one that lasts as long as the context.

    A connection that this process has already is used, and left as it is, if there is no address.

    Raises:
        ConnectionError: nobody answers there.
        ValueError: no address, a cluster of other versions, or a launch that this program does not do.
    """
    check_alone()
    refuse_sharding()
    is_ours = address is not None or not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM)
    if address is not None:
        _join(address)
    elif is_ours:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield Cluster()
    finally:
        if is_ours:
            ray.shutdown()
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray leaves its own behind


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(
            f"ray_address={address!r} is no host:port; give what `ray start --head` prints, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"ray_address={address}: nobody answers ({error}); start a cluster there by `ray start --head --port "
            f"{port}`, or leave --ray-address out for a local one"
        ) from None
    if ray.is_initialized():
        raise ValueError(f"ray_address={address}, and this process has a connection already; leave one of them out")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConnectionError(
            f"ray_address={address} answers and is no cluster that lets this process in ({error}); since Ray 2.60 "
            "`ray start` asks for a token: set RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN on all nodes and here"
        ) from None
    except RuntimeError as error:  # Ray compares its own version and Python's
        raise ValueError(f"ray_address={address} is a cluster of other versions: {error}") from None


class Cluster:
    """The nodes of the cluster that this process is connected to.

    Attributes:
        nodes: in order: the driver's, then by address.
        bell: rung by any process that is asked to stop.
        asked_to_stop: returns the exit status if this process was asked to stop, else None.
    """

    def __init__(self) -> None:
        here = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        alive.sort(key=lambda node: (node["NodeID"] != here, node["NodeManagerAddress"], node["NodeManagerPort"]))
        self.nodes = _described(alive)
        check_versions(self.nodes)
        self.asked_to_stop: Callable[[], int | None] = lambda: None
        self.bell = self._start(StopBell, Place(node=0, gpu=None, cpus=1))
        self._rung = self.bell.wait.remote()

    def place(self, args: Any) -> Placement:
        """Returns where the processes of each role run, as a trainer's arguments say.

        Raises:
            ValueError: the cluster has not what is asked for, or work cannot be shared exactly.
        """
        placement = place_roles(
            self.nodes,
            placement=args.placement,
            env_workers=args.env_workers,
            rollout_gpus=args.rollout_gpus,
            learner_gpus=args.learner_gpus,
            env_on_gpu=args.physics == "warp",
            num_stages=args.pipeline_stage_num,
        )
        check_shares(args, placement)
        return placement

    def start(self, role: type, place: Place, *inputs: Any) -> Any:
        """Returns the handle of a new actor at `place`, a `role` which is given the place, the bell and `inputs`."""
        made_of = [ray.put((role, inputs))]  # Ray fetches what is not in a list before it makes the actor
        return self._start(process_of(role), place, place, self.bell, made_of)

    def _start(self, actor: type, place: Place, *inputs: Any) -> Any:
        node_id = self.nodes[place.node].node_id
        strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        options = dict(num_cpus=0, num_gpus=0, scheduling_strategy=strategy)
        return ray.remote(actor).options(**options).remote(*inputs)

    def check(self) -> None:
        """Raises SystemExit if any process of the run was asked to stop."""
        self.pass_on_request()
        if self.asked_to_stop() is not None or ray.wait([self._rung], timeout=0)[0]:
            raise SystemExit(self.rung_status())

    def pass_on_request(self) -> None:
        """Rings the bell if this process was asked to stop."""
        if (status := self.asked_to_stop()) is not None:
            self.bell.ring.remote(status)

    def rung_status(self) -> int:
        """Returns the exit status that was asked for, as soon as the bell is rung."""
        try:
            return ray.get(self._rung)
        except RayActorError:  # its own process was asked to stop, or killed
            return os.EX_UNAVAILABLE

    def get(self, call: Any) -> Any:
        """Returns what a call of an actor returns, or raises what it raised.

        Raises:
            SystemExit: the run was asked to stop meanwhile.
        """
        while not ray.wait([call, self._rung], timeout=1.0)[0] or not _is_done(call):
            self.check()
        self.check()
        return result(call)

    def standing(self, place: Place) -> Place:
        """Returns `place`, or one that takes its part if its node is gone, as soon as there is one.

        A process without a GPU goes to the remaining node with most cores; one with a GPU to a node that has joined
        and has as many.

        Raises:
            RuntimeError: there is none.
        """
        deadline = time.monotonic() + _ANSWER_S
        while True:
            alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
            lost = self.nodes[place.node]
            # A node that has just been lost may still be listed; one that has just joined may not answer yet.
            if lost.node_id in alive and _answers(alive[lost.node_id]):
                return place
            alive.pop(lost.node_id, None)
            known = {node.node_id for node in self.nodes}
            joined = [node for node_id, node in alive.items() if node_id not in known and _answers(node)]
            for node in _described(joined):
                if node.gpus >= lost.gpus:
                    check_versions([self.nodes[0], node])
                    self.nodes[place.node] = node
                    return place
            remaining = [i for i, node in enumerate(self.nodes) if node.node_id in alive]
            if place.gpu is None and remaining:
                return replace(place, node=max(remaining, key=lambda i: self.nodes[i].cpus))
            if time.monotonic() > deadline:
                left = [node for node in self.nodes if node.node_id in alive]
                raise RuntimeError(
                    f"node {lost.address} with {lost.gpus} GPU(s) is gone and none has taken its part for "
                    f"{_ANSWER_S:.0f} s; there are {describe(left)}. Start one, or go on with --resume and another "
                    "--placement"
                )
            time.sleep(1.0)


def _is_done(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0)[0])


def _asked_for_versions(node: Mapping[str, Any]) -> Any:
    """Returns the call of a node that asks it for its versions."""
    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return ray.remote(versions).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote()


def _answers(node: Mapping[str, Any]) -> bool:
    """Returns whether a node that is listed as alive does what it is asked for."""
    try:
        result(_asked_for_versions(node), timeout=_ANSWER_S)
    except _SILENT:
        return False
    return True


def _described(nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Returns nodes as they say themselves what they are.

    Raises:
        ConnectionError: one of them does not answer.
        ValueError: this project cannot be imported on one of them.
    """
    calls = [_asked_for_versions(node) for node in nodes]
    described: list[Node] = []
    for node, call in zip(nodes, calls, strict=True):
        address, resources = node["NodeManagerAddress"], node["Resources"]
        try:
            found = result(call, timeout=_ANSWER_S)
        except _SILENT as error:
            raise ConnectionError(
                f"node {address} is listed by the cluster and does not answer ({error}); wait until it is listed no "
                "longer, or start it anew"
            ) from None
        except ImportError as error:
            raise ValueError(
                f"node {address} cannot import this project ({error}); install the same checkout at the same place on "
                "all nodes"
            ) from None
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        described.append(Node(node_id=node["NodeID"], address=address, cpus=cpus, gpus=gpus, versions=found))
    return described


# --- env workers and rollout workers, as the driver sees them ---


class _Order(NamedTuple):
    """What a rollout is played by: inputs of `RolloutRole.rollout`."""

    iteration: int
    version: int
    weights: Any
    task_weights: NDArray[np.float64] | None


class _Share:
    """A rollout worker, its env workers, and the rollouts that it has been asked for.

    Environments on its own GPU are in its process, in as many parts as it has stages, and it has no env workers.
    """

    def __init__(
        self, number: int, place: Place, env_places: Sequence[Place], env_ids: NDArray[np.intp], num_stages: int
    ) -> None:
        self.number = number
        self.has_own_envs = all(env_place.shares_gpu(place) for env_place in env_places)
        self.num_parts = num_stages if self.has_own_envs else len(env_places)
        self.place, self.env_ids = place, env_ids
        self.env_places = [] if self.has_own_envs else list(env_places)
        self.worker: Any = None
        self.env_workers: list[Any] = []
        self.opening: Any = None  # the call that opens the environments, until they are
        self.has_begun = False  # they were opened, and may have been played with
        self.to_reset: dict[int, tuple[int, ...]] = {}  # parts that have no episodes yet: what keys theirs
        self.orders: dict[int, _Order] = {}
        self.calls: dict[int, list[Any]] = {}
        self.states: StackedStates | None = None  # at the last boundary
        self.task_weights: NDArray[np.float64] | None = None  # of the first rollout
        self.boundary = 0
        self.losses = 0  # since then


class RolloutGroup:
    """The rollout workers with their env workers. Those that are lost are replaced, and their rollout is played again.

    The environments of an env worker that was lost begin new episodes, and those that were under way are discarded and
    counted. The others go back to where they were before the rollout, if they can give and take states, and otherwise
    go on. A rollout worker that was lost leaves nothing behind: its environments go back, and it is the same rollout;
    those of its own process that cannot are lost with it.
    Before anything was played no episode is lost with a worker: its environments begin as they would have.

    Args:
        cluster: where they run.
        placement: of the roles.
        role: of rollout workers.
        args: the trainer's arguments.
        make_agent: makes the agent from them.
        make_envs: makes environments from them, their number, and the size of their images.
        run_path: folder of the run.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        role: type[RolloutRole],
        args: Any,
        make_agent: Callable[..., Any],
        make_envs: Callable[..., gym.vector.VectorEnv],
        run_path: Path,
    ) -> None:
        self._cluster, self._args, self._max_restarts = cluster, args, args.max_restarts
        self._role, self._inputs = role, (args, make_agent, run_path)
        self._make_envs = make_envs
        num_workers, self._num_learners = len(placement.rollout), len(placement.actor)
        self._num_parts = max(1, self._num_learners // num_workers)
        self._workers_replaced, self._episodes_discarded = 0, 0
        self._task_ids: Sequence[int] | None = None

        env_places = np.array_split(np.arange(len(placement.env)), num_workers)
        env_ids = np.split(np.arange(args.num_envs), num_workers)
        self._shares = [
            _Share(number, place, [placement.env[e] for e in mine], ids, args.pipeline_stage_num)
            for number, (place, mine, ids) in enumerate(zip(placement.rollout, env_places, env_ids, strict=True))
        ]
        for share in self._shares:
            share.worker = self._new_worker(share)
        first = self._shares[0]
        while (size := self._answer(first.worker.observed_size)) is None:
            self._count_loss(first, 1)
            self._replace_worker(first)
        self._observed_size = size
        for share in self._shares:
            share.env_workers = [self._new_env_worker(share, place) for place in share.env_places]

    def _new_worker(self, share: _Share) -> Any:
        make = partial(self._make_envs, self._args, num_threads=share.place.cpus) if share.has_own_envs else None
        return self._cluster.start(self._role, share.place, *self._inputs, share.number, share.env_ids, make)

    def _new_env_worker(self, share: _Share, place: Place) -> Any:
        num_envs = len(share.env_ids) // share.num_parts
        make = partial(self._make_envs, self._args, num_envs, self._observed_size, num_threads=place.cpus)
        return self._cluster.start(EnvWorker, place, make)

    def task_ids(self) -> Sequence[int]:
        """Returns the tasks that the environments sample from."""
        first = self._shares[0]
        while self._task_ids is None:
            steps = first.worker if first.has_own_envs else first.env_workers[0]
            self._task_ids = self._answer(steps.task_ids)
            if self._task_ids is None:
                self._count_loss(first, 1)
                if first.has_own_envs:
                    self._replace_worker(first)
                else:
                    self._replace_env_workers(first)
        return self._task_ids

    def _answer(self, method: Any) -> Any:
        """Returns what a worker's method returns; None if the worker was lost."""
        try:
            return self._cluster.get(method.remote())
        except LOST as error:
            refuse_unmade(error, "a worker")
            return None

    def begin(
        self,
        iterations: int,
        env_states: Mapping[int, EnvState] | None,
        task_weights: NDArray[np.float64] | None = None,
    ) -> StackedStates | None:
        """Puts environments where they were after so many iterations, or begins episodes; drops what was asked for.

        Args:
            iterations: done.
            env_states: after them; None begins episodes.
            task_weights: how often tasks are played; as the environments have it if not given.

        Returns:
            The environments' states; None if they cannot give any.

        Raises:
            ValueError: some environments have no state there.
        """
        for share in self._shares:
            self._cancel(share)
            share.orders.clear()
            share.boundary, share.losses, share.states, share.task_weights = iterations, 0, None, task_weights
            share.has_begun = False
            share.to_reset = dict.fromkeys(range(share.num_parts), ()) if env_states is None else {}
            if env_states is not None:
                missing = sorted(set(share.env_ids.tolist()) - env_states.keys())
                if missing:
                    raise ValueError(f"no states of environments {missing} were saved; resume with the same num_envs")
                share.states = StackedStates.of({env_id: env_states[env_id] for env_id in share.env_ids.tolist()})
            self._open(share)
        for share in self._shares:
            while not self._has_opened(share):
                self._replace(share, iterations + 1)
        return merged_states([share.states for share in self._shares])

    def submit(
        self, iteration: int, version: int, weights: Any, task_weights: NDArray[np.float64] | None = None
    ) -> None:
        """Asks for the rollout of an iteration, to be played after those that were asked for before.

        Args:
            iteration: from 1.
            version: of the weights: iterations whose updates they have had.
            weights: reference to them.
            task_weights: how often tasks are played; as before if not given.
        """
        for share in self._shares:
            share.orders[iteration] = _Order(iteration, version, weights, task_weights)
            self._ask(share, share.orders[iteration])

    def receive(self, iteration: int) -> tuple[list[Report], list[list[Any]]]:
        """Waits for the rollout of an iteration; returns the workers' reports, and references for each learner.

        Raises:
            RuntimeError: workers were lost too often.
            LearnersLost: the weights are gone that it was to be played by.
        """
        reports: list[Report] = []
        parts: list[Any] = []
        for share in self._shares:
            while (report := self._report(share, iteration)).is_lost:
                self._replace(share, iteration)
            share.boundary, share.losses, share.states = iteration, 0, report.env_states
            del share.orders[iteration]
            parts += share.calls.pop(iteration)[1:]
            reports.append(report)
        per_learner = len(parts) // self._num_learners
        return reports, [parts[i : i + per_learner] for i in range(0, len(parts), per_learner)]

    def losses(self) -> dict[str, float]:
        """Returns what was lost since the last call, as metrics."""
        lost = {
            "rollout/workers_replaced": float(self._workers_replaced),
            "rollout/episodes_discarded": float(self._episodes_discarded),
        }
        self._workers_replaced, self._episodes_discarded = 0, 0
        return lost

    def _ask(self, share: _Share, order: _Order) -> None:
        rollout = share.worker.rollout.options(num_returns=1 + self._num_parts)
        share.calls[order.iteration] = rollout.remote(*order, self._num_parts)

    def _report(self, share: _Share, iteration: int) -> Report:
        if not self._has_opened(share):
            return Report(is_lost=True)
        try:
            return self._cluster.get(share.calls[iteration][0])
        except LOST:
            return Report(is_lost=True)

    def _has_opened(self, share: _Share) -> bool:
        """Waits for the environments to be opened and takes their states."""
        if share.opening is None:
            return True
        try:
            is_open, states = self._cluster.get(share.opening)
        except LOST as error:
            refuse_unmade(error, f"rollout worker {share.number}")
            return False
        if not is_open:
            return False
        share.opening, share.has_begun, share.states = None, True, states
        share.to_reset.clear()
        return True

    def _cancel(self, share: _Share) -> None:
        for calls in share.calls.values():
            with suppress(*LOST):
                ray.cancel(calls[0], force=False)
        share.calls.clear()

    def _open(self, share: _Share) -> None:
        """Begins episodes where there are none, and puts other environments back where they were at the boundary.

        Environments that cannot be put back go on.
        """
        openings: list[tuple[str, tuple[Any, ...]]] = []
        for i, ids in enumerate(np.split(share.env_ids, share.num_parts)):
            if i in share.to_reset:
                key = (self._args.seed, EPISODES, share.boundary, *share.to_reset[i])
                openings.append(("reset", ([seed_of(*key, int(env_id)) for env_id in ids],)))
            elif share.states is not None:
                openings.append(("restore", ([share.states[env_id] for env_id in ids.tolist()],)))
            else:
                openings.append(("observe", ()))
        task_weights = next((order.task_weights for order in share.orders.values()), share.task_weights)
        share.opening = share.worker.open_envs.remote(share.env_workers, openings, task_weights)

    def _replace(self, share: _Share, iteration: int) -> None:
        """Replaces what was lost of a share, and asks for its rollouts again."""
        self._count_loss(share, iteration)
        self._cancel(share)
        has_replaced = self._replace_env_workers(share)
        if not is_there(share.worker):
            self._replace_worker(share)
        elif not has_replaced:  # nothing that the rollout is played with, but what it is played by
            raise LearnersLost(f"the weights for rollout {iteration} are gone with the learner that had them")
        self._open(share)
        for order in share.orders.values():
            self._ask(share, order)

    def _count_loss(self, share: _Share, iteration: int) -> None:
        share.losses += 1
        if share.losses > self._max_restarts:
            raise RuntimeError(
                f"rollout {iteration} lost workers of rollout worker {share.number} more than "
                f"max_restarts={self._max_restarts} times; look into the logs of the cluster's processes for what ends "
                "them, or raise max_restarts"
            )

    def _replace_env_workers(self, share: _Share) -> bool:
        """Replaces those of a share that were lost; returns whether there were any."""
        lost = [i for i, worker in enumerate(share.env_workers) if not is_there(worker)]
        for i in lost:
            share.env_places[i] = self._cluster.standing(share.env_places[i])
            share.env_workers[i] = self._new_env_worker(share, share.env_places[i])
            # One that is lost before it was opened takes no episodes with it: its place opens as it would have.
            if share.has_begun and i not in share.to_reset:
                share.to_reset[i] = (share.losses,)
                self._episodes_discarded += len(share.env_ids) // share.num_parts
        self._workers_replaced += len(lost)
        return bool(lost)

    def _replace_worker(self, share: _Share) -> None:
        share.place = self._cluster.standing(share.place)
        share.worker = self._new_worker(share)
        self._workers_replaced += 1
        can_go_back = share.states is not None or not share.has_begun or bool(share.to_reset)
        if share.has_own_envs and not can_go_back:
            share.to_reset = dict.fromkeys(range(share.num_parts), (share.losses,))
            self._episodes_discarded += len(share.env_ids)


def is_there(worker: Any) -> bool:
    """Returns whether an actor answers; one that does not is ended."""
    try:
        ray.get(worker.ping.remote(), timeout=_ANSWER_S)
    except (*LOST, GetTimeoutError):
        ray.kill(worker)
        return False
    return True


# --- learners, as the driver sees them ---


class LearnerGroup:
    """The processes of a `torch.distributed` group.

    Args:
        cluster: where they run.
        placement: of the roles.
        role: of learners.
        args: the trainer's arguments.
        make_agent: makes the agent from them.
        make_envs: makes environments for evaluations.
        run: the run's folder.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        role: type[LearnerRole],
        args: Any,
        make_agent: Callable[..., Any],
        make_envs: Callable[..., gym.vector.VectorEnv],
        run: RunFolder,
    ) -> None:
        self._cluster, self._places, self._role, self._run = cluster, list(placement.actor), role, run
        self._inputs = (args, make_agent, make_envs, run.path.resolve())
        self._max_restarts = args.max_restarts
        self._learners: list[Any] = []
        self._has_boundary = False

    def train(
        self, train: Callable[[Path | None], dict[str, float]], checkpoint: Path | None, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Starts the learners, and returns what `train` returns, called with the checkpoint to go on from.

        It is None for the start. If a learner is lost meanwhile, all start again and `train` is called with the newest
        checkpoint. If the run is stopped or fails between updates, the last boundary is saved.

        Raises:
            RuntimeError: learners were lost too often without getting further.
        """
        restarts = 0
        while True:
            try:
                self._start()
                return train(checkpoint)
            except LearnersLost as lost:
                newest = checkpoints_in(self._run.path)
                done, last = newest[-1] if newest else (0, None)
                restarts = restarts + 1 if last == checkpoint else 1
                if restarts > self._max_restarts:
                    raise RuntimeError(
                        f"learners were lost {restarts} times without getting further ({lost}); look into the logs of "
                        "the cluster's processes, or raise max_restarts"
                    ) from None
                checkpoint = last
                say(f"a learner was lost; all start again from {checkpoint or 'the start'}")
                self._run.forget_after(done)
            except SystemExit:
                if self._has_boundary:
                    print(f"stopped; the state is in {self.save()}. Go on with --resume {self._run.path}")
                raise
            except Exception as error:
                if self._has_boundary:
                    error.add_note(
                        f"the state before this rollout is in {self.save()}; go on with --resume {self._run.path}"
                    )
                raise

    def _start(self) -> None:
        """Starts the group, in place of one that has lost a process if there is one."""
        for learner in self._learners:
            ray.kill(learner)
        self._has_boundary = False
        self._places = [self._cluster.standing(place) for place in self._places]
        self._learners = [self._cluster.start(self._role, place, *self._inputs) for place in self._places]
        try:
            address = self._cluster.get(self._learners[0].free_address.remote())
        except LOST as error:
            refuse_unmade(error, "a learner")
            raise LearnersLost(str(error)) from None
        size = len(self._learners)
        self._results([learner.join.remote(rank, size, address) for rank, learner in enumerate(self._learners)])

    def restore(self, checkpoint: Path, say: Callable[[str], None]) -> RestoredState:
        """Puts weights and optimiser back, and returns what else a checkpoint says."""
        restored, told = self._call("restore", checkpoint)
        say(told.rstrip())
        return restored

    def take_boundary(self, iteration: int, global_step: int, tensors: Mapping[str, Any], env_states: Any) -> None:
        """Takes the present moment as the boundary after `iteration`; see `Checkpoints.take`."""
        calls = [
            learner.take.remote(iteration, global_step, tensors, env_states if rank == 0 else None)
            for rank, learner in enumerate(self._learners)
        ]
        self._results(calls)
        self._has_boundary = True

    def update(self, iteration: int, parts: Sequence[Sequence[Any]]) -> dict[str, float]:
        """Updates by references to the rollouts of each learner, and returns metrics."""
        self._has_boundary = False
        pairs = zip(self._learners, parts, strict=True)
        return self._results([learner.update.remote(iteration, *mine) for learner, mine in pairs])[0]

    def weights(self) -> Any:
        """Returns a reference to the first learner's trained weights."""
        return self._learners[0].weights.remote()

    def evaluate(self, iteration: int) -> float:
        """Evaluates, and returns the success rate.

        Raises:
            SystemExit: the run was asked to stop meanwhile.
        """
        rate, told = self._call("evaluate", iteration)
        print(told, end="", flush=True)
        if rate is None:
            raise SystemExit(self._cluster.rung_status())
        return rate

    def save(self, score: float | None = None) -> Path:
        """Writes the last boundary, and returns the checkpoint."""
        return self._call("save", score)

    def _call(self, method: str, *inputs: Any) -> Any:
        """Has all learners call a method, and returns what the first one's returns.

        Raises:
            LearnersLost: one of them is gone.
        """
        return self._results([getattr(learner, method).remote(*inputs) for learner in self._learners])[0]

    def _results(self, calls: Sequence[Any]) -> list[Any]:
        waiting = list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            self._cluster.pass_on_request()  # an evaluation ends by it
            if not ready:
                continue
            try:
                result(ready[0])
            except LOST as error:
                refuse_unmade(error, "a learner")
                raise LearnersLost(str(error)) from None
            except Exception:  # perhaps because another one was lost
                for call in ray.wait(waiting, num_returns=len(waiting), timeout=_NEWS_S)[0] if waiting else ():
                    try:
                        result(call)
                    except LOST as error:
                        raise LearnersLost(str(error)) from None
                    except Exception:
                        continue
                raise
        return [result(call) for call in calls]
