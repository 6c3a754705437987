"""Ray: the cluster that a run is on, the actors of its roles, and what is done when one of them is lost.

    with connect(args.ray_address) as cluster:
        placement = place_roles(cluster.nodes, ...)
        rollouts = RolloutGroup(cluster, placement, ...)      # env workers and rollout workers
        learners = LearnerGroup(cluster, placement.actor, ...)

Actors are put on the node, and shown the GPU, that the placement says. What they give each other goes by Ray's object
store; the driver passes on references only. An actor is lost when its process or its node is gone.
"""

from __future__ import annotations

import importlib.metadata
import socket
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from algorithms.common.batch import concatenate
from algorithms.common.env_worker import EnvWorker, Step
from algorithms.common.episodes import Episode
from algorithms.common.placement import Node, Place, Placement, check_versions, describe
from algorithms.common.provenance import git_commit
from algorithms.common.randomness import EPISODES, seed_of
from algorithms.common.stages import EnvState, EnvStep
from algorithms.common.stop_request import StopBell

# What has to be the same on all nodes, besides Python and the commit.
SAME_PACKAGES = ("libero-gr00t", "torch", "accelerate", "ray")
# Errors of a call whose actor, node or object is gone.
LOST = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, ActorUnschedulableError)
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

    A connection that this process has already is used, and left as it is.

    Raises:
        ConnectionError: nobody answers there.
        ValueError: no address, or a cluster of other versions.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        _init(address)
    try:
        yield Cluster()
    finally:
        if is_ours:
            ray.shutdown()


def _init(address: str | None) -> None:
    if address is None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
        return
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
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
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

    def start(self, actor: type, place: Place, *inputs: Any) -> Any:
        """Returns the handle of a new actor at `place`, which is given the place, the bell and `inputs`."""
        return self._start(actor, place, place, self.bell, *inputs)

    def _start(self, actor: type, place: Place, *inputs: Any) -> Any:
        node_id = self.nodes[place.node].node_id
        strategy = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        options = dict(num_cpus=0, num_gpus=0, scheduling_strategy=strategy)
        return ray.remote(actor).options(**options).remote(*inputs)

    def check(self) -> None:
        """Raises SystemExit if any process of the run was asked to stop."""
        if (status := self.asked_to_stop()) is not None:
            self.bell.ring.remote(status)
            raise SystemExit(status)
        if ray.wait([self._rung], timeout=0)[0]:
            raise SystemExit(ray.get(self._rung))

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
            if lost.node_id in alive:
                return place
            known = {node.node_id for node in self.nodes}
            joined = [node for node_id, node in alive.items() if node_id not in known]
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
                    f"{_ANSWER_S:.0f} s; "
                    f"there are {describe(left)}. Start one, or go on with --resume and another --placement"
                )
            time.sleep(1.0)


def _is_done(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0)[0])


def result(call: Any, timeout: float | None = None) -> Any:
    """Returns what a call returns, or raises what it raised, as it was raised there."""
    try:
        return ray.get(call, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error, LOST):
            raise
        raise cast(Any, error).cause from error


def _described(nodes: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Returns nodes as they say themselves what they are.

    Raises:
        ValueError: this project cannot be imported on one of them.
    """
    strategies = [NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False) for node in nodes]
    calls = [ray.remote(versions).options(num_cpus=0, scheduling_strategy=s).remote() for s in strategies]
    described: list[Node] = []
    for node, call in zip(nodes, calls, strict=True):
        address, resources = node["NodeManagerAddress"], node["Resources"]
        try:
            found = result(call, timeout=_ANSWER_S)
        except ImportError as error:
            raise ValueError(
                f"node {address} cannot import this project ({error}); install the same checkout at the same place on "
                "all nodes"
            ) from None
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        described.append(Node(node_id=node["NodeID"], address=address, cpus=cpus, gpus=gpus, versions=found))
    return described


def versions() -> dict[str, str | None]:
    """Returns what has to be the same on all nodes, of this one; None of what is not installed."""
    import platform

    found: dict[str, str | None] = {"Python": platform.python_version()}
    for package in SAME_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"commit": git_commit()}


# --- tensors in the object store ---


class _Bfloat16(NamedTuple):
    """A tensor of a type that NumPy has not, as 16-bit integers."""

    bits: NDArray[np.int16]


def to_store(tree: Any) -> Any:
    """Returns nested tensors as arrays in host memory, which the object store keeps without a copy."""
    if isinstance(tree, Mapping):
        return {name: to_store(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return cast(Any, type(tree))._make(to_store(leaf) for leaf in tree)
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach().cpu().contiguous()
        return _Bfloat16(tensor.view(torch.int16).numpy()) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return tree


def from_store(tree: Any) -> Any:
    """Returns what `to_store` was given, tensors in host memory that must not be written to."""
    if isinstance(tree, _Bfloat16):
        return from_store(tree.bits).view(torch.bfloat16)
    if isinstance(tree, Mapping):
        return {name: from_store(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return cast(Any, type(tree))._make(from_store(leaf) for leaf in tree)
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biuf":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(tree)
    return tree


# --- environments, as a rollout worker sees them ---


class EnvWorkerLost(Exception):
    """An env worker is gone."""


class RemoteStage:
    """Some of a rollout worker's environments, on one or more env workers, with the methods of `EnvStage`.

    Args:
        workers: handles of `EnvWorker`s, each with equally many environments.
        env_ids: [n] numbers of the environments among all.
        offset: place of the first among the rollout worker's environments.
        timeout_s: seconds that a step may take.

    Attributes:
        obs: the last observation.
        wait_s: seconds that `receive` waited so far.
        busy_s: seconds of stepping so far, a mean over the workers.
        failed_actions: what the step was given that raised or did not end.
    """

    def __init__(self, workers: Sequence[Any], env_ids: NDArray[np.intp], offset: int, timeout_s: float) -> None:
        self.workers, self.env_ids, self.offset = list(workers), env_ids, offset
        self.obs: dict[str, Any] = {}
        self.wait_s, self.busy_s = 0.0, 0.0
        self.failed_actions: NDArray[np.float32] | None = None
        self._actions = np.zeros(0, dtype=np.float32)
        self._timeout_s = timeout_s
        self._calls: list[Any] = []

    @property
    def rows(self) -> slice:
        """Where these environments are among the rollout worker's."""
        return slice(self.offset, self.offset + len(self.env_ids))

    def open(self, openings: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Observes: each worker by a method with its inputs (`reset`, `restore` or `observe`)."""
        pairs = zip(self.workers, openings, strict=True)
        observed = self._results([getattr(worker, name).remote(*inputs) for worker, (name, inputs) in pairs])
        self.obs = concatenate(observed)

    def send(self, actions: NDArray[np.float32]) -> None:
        """Starts a step with `actions`, one for each environment."""
        self._actions = actions
        parts = np.split(actions, len(self.workers))
        self._calls = [worker.step.remote(part) for worker, part in zip(self.workers, parts, strict=True)]

    def receive(self) -> EnvStep:
        """Returns the outcome of the step that `send` started.

        Raises:
            EnvWorkerLost: a worker is gone.
            TimeoutError: the step has not ended in time.
            Exception: whatever the environments raised.
        """
        start = time.perf_counter()
        try:
            results = self._results(self._calls)
        except GetTimeoutError:
            self.failed_actions = self._actions
            raise TimeoutError(
                f"environments {self.env_ids[0]} to {self.env_ids[-1]} have not ended a step within "
                f"env_timeout_s={self._timeout_s:g}; look for a hanging renderer or simulation, or raise env_timeout_s"
            ) from None
        except EnvWorkerLost:
            raise
        except Exception as error:
            self.failed_actions = self._actions
            error.add_note(f"raised by a step of environments {self.env_ids[0]} to {self.env_ids[-1]}")
            raise
        self.wait_s += time.perf_counter() - start
        self.busy_s += float(np.mean([seconds for _, seconds in results]))
        step = join_steps([step for step, _ in results])
        self.obs = step.obs
        return step

    def states(self) -> dict[int, EnvState] | None:
        """Returns the environments' states by their number among all; None if they cannot give any."""
        parts = self._results([worker.states.remote() for worker in self.workers])
        if any(part is None for part in parts):
            return None
        return dict(zip(self.env_ids.tolist(), [state for part in parts for state in part], strict=True))

    def set_task_weights(self, weights: NDArray[np.float64]) -> None:
        """Says how often the episodes that start from now on are of which task."""
        self._results([worker.set_task_weights.remote(weights) for worker in self.workers])

    def _results(self, calls: Sequence[Any]) -> list[Any]:
        try:
            return [result(call, self._timeout_s) for call in calls]
        except LOST as error:
            raise EnvWorkerLost(str(error)) from None


def join_steps(steps: Sequence[Step]) -> EnvStep:
    """Returns the steps of several env workers as one of all their environments.

    Where episodes have ended on some workers only, the rows of the others in `final_obs` and `final_info` hold the last
    observation and zeros.
    """
    obs, rewards, terminated, truncated, infos = zip(*steps, strict=True)
    with_final = next((info for info in infos if "final_info" in info), None)
    joined: dict[str, Any] = {"num_steps": np.concatenate([info["num_steps"] for info in infos])}
    if with_final is not None:
        finals: list[dict[str, Any]] = []
        for info, reward in zip(infos, rewards, strict=True):
            empty = {
                name: np.zeros((len(reward), *np.shape(a)[1:]), np.asarray(a).dtype)
                for name, a in with_final["final_info"].items()
            }
            finals.append(info.get("final_info", empty))
        joined["final_info"] = concatenate(finals)
        joined["final_obs"] = concatenate([info.get("final_obs", o) for info, o in zip(infos, obs, strict=True)])
    return EnvStep(concatenate(obs), *(np.concatenate(x) for x in (rewards, terminated, truncated)), joined)


# --- env workers and rollout workers, as the driver sees them ---


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rollout worker tells the driver of a rollout.

    Attributes:
        is_lost: an env worker was lost; the rest is empty.
        ended: episodes that ended, each with the number of iterations ago in which it began.
        env_steps: environment steps.
        seconds: of stepping (`env_s`), waiting for it (`env_wait_s`), the rest (`policy_s`), and in which environments
            did nothing since the last rollout ended (`env_idle_s`).
        env_states: states of its environments after it; None if they cannot give any.
    """

    is_lost: bool = False
    ended: Sequence[tuple[Episode, int]] = ()
    env_steps: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    env_states: Mapping[int, EnvState] | None = None


class _Order(NamedTuple):
    """What a rollout is played by: inputs of `RolloutWorker.rollout`."""

    iteration: int
    version: int
    weights: Any
    task_weights: NDArray[np.float64] | None


class _Share:
    """A rollout worker, its env workers, and the rollouts that it has been asked for."""

    def __init__(self, place: Place, env_places: Sequence[Place], env_ids: NDArray[np.intp]) -> None:
        self.place, self.env_places, self.env_ids = place, list(env_places), env_ids
        self.worker: Any = None
        self.env_workers: list[Any] = []
        self.opening: Any = None  # the call that opened the environments
        self.orders: dict[int, _Order] = {}
        self.calls: dict[int, list[Any]] = {}
        self.states: Mapping[int, EnvState] | None = None  # at the last boundary
        self.boundary = 0
        self.losses = 0  # since then


class RolloutGroup:
    """The rollout workers with their env workers. Those that are lost are replaced, and their rollout is played again.

    The environments of an env worker that was lost begin new episodes, and those that were under way are discarded and
    counted. The others go back to where they were before the rollout, if they can give and take states, and otherwise
    go on. A rollout worker that was lost leaves nothing behind: its environments go back, and it is the same rollout.

    Args:
        cluster: where they run.
        placement: of the roles.
        env_ids: [N] numbers of all environments.
        seed: of the run.
        num_learners: learners, among whom each rollout's environments are divided.
        max_restarts: times that a rollout is played again.
        start_worker: from the place, the number of the rollout worker and its environments, a new `RolloutWorker`.
        start_env_worker: from the place and the number of environments, a new `EnvWorker`.

    Attributes:
        workers_replaced: workers that were replaced so far.
        episodes_discarded: episodes that were under way in env workers that were lost so far.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        env_ids: NDArray[np.intp],
        *,
        seed: int,
        num_learners: int,
        max_restarts: int,
        start_worker: Callable[[Place, int, NDArray[np.intp]], Any],
        start_env_worker: Callable[[Place, int, int], Any],
    ) -> None:
        self._cluster, self._seed, self._max_restarts = cluster, seed, max_restarts
        self._start_worker, self._start_env_worker = start_worker, start_env_worker
        num_workers = len(placement.rollout)
        self._num_parts = max(1, num_learners // num_workers)
        self._num_learners = num_learners
        self.workers_replaced, self.episodes_discarded = 0, 0
        places = np.array_split(np.arange(len(placement.env)), num_workers)
        self._shares = [
            _Share(place, [placement.env[e] for e in mine], ids)
            for place, mine, ids in zip(placement.rollout, places, np.split(env_ids, num_workers), strict=True)
        ]
        for number, share in enumerate(self._shares):
            share.worker = start_worker(share.place, number, share.env_ids)
        size = cluster.get(self._shares[0].worker.observed_size.remote())
        self._observed_size = size
        for share in self._shares:
            share.env_workers = [self._new_env_worker(share, place) for place in share.env_places]

    def _new_env_worker(self, share: _Share, place: Place) -> Any:
        num_envs = len(share.env_ids) // len(share.env_places)
        return self._start_env_worker(place, num_envs, self._observed_size)

    def task_ids(self) -> Sequence[int]:
        """Returns the tasks that the environments sample from."""
        return self._cluster.get(self._shares[0].env_workers[0].task_ids.remote())

    def begin(self, iterations: int, env_states: Mapping[int, EnvState] | None) -> Mapping[int, EnvState] | None:
        """Puts environments where they were after so many iterations, or begins episodes; drops what was asked for.

        Returns:
            The environments' states; None if they cannot give any.

        Raises:
            ValueError: some environments have no state there.
        """
        for share in self._shares:
            self._cancel(share)
            share.orders.clear()
            share.boundary, share.losses, share.states = iterations, 0, None
            if env_states is not None:
                missing = sorted(set(share.env_ids.tolist()) - env_states.keys())
                if missing:
                    raise ValueError(f"no states of environments {missing} were saved; resume with the same num_envs")
                share.states = {env_id: env_states[env_id] for env_id in share.env_ids.tolist()}
            self._open(share, set(range(len(share.env_workers))))
        for number, share in enumerate(self._shares):
            while not self._has_opened(share):
                self._replace(number, share, iterations + 1)
        return merged([share.states for share in self._shares])

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
        """Waits for the rollout of an iteration; returns the workers' reports, and references for each learner."""
        reports: list[Report] = []
        parts: list[Any] = []
        for number, share in enumerate(self._shares):
            while (report := self._report(share, iteration)).is_lost:
                self._replace(number, share, iteration)
            share.boundary, share.losses, share.states = iteration, 0, report.env_states
            del share.orders[iteration]
            parts += share.calls.pop(iteration)[1:]
            reports.append(report)
        per_learner = len(parts) // self._num_learners
        return reports, [parts[i : i + per_learner] for i in range(0, len(parts), per_learner)]

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
        if share.opening is not None:
            try:
                has_opened, share.states = self._cluster.get(share.opening)
            except LOST:
                has_opened = False
            if not has_opened:
                return False
            share.opening = None
        return True

    def _cancel(self, share: _Share) -> None:
        for calls in share.calls.values():
            with suppress(*LOST):
                ray.cancel(calls[0], force=False)
        share.calls.clear()

    def _open(self, share: _Share, fresh: set[int]) -> None:
        """Begins episodes in the env workers `fresh`, unless they have states that are older than they are."""
        openings: list[tuple[str, tuple[Any, ...]]] = []
        for i, ids in enumerate(np.split(share.env_ids, len(share.env_workers))):
            if share.states is not None and (i not in fresh or share.losses == 0):
                openings.append(("restore", ([share.states[env_id] for env_id in ids.tolist()],)))
            elif i in fresh:
                key = (self._seed, EPISODES, share.boundary, *([share.losses] if share.losses else []))
                openings.append(("reset", ([seed_of(*key, int(env_id)) for env_id in ids],)))
            else:
                openings.append(("observe", ()))
        share.opening = share.worker.open_envs.remote(share.env_workers, openings)

    def _replace(self, number: int, share: _Share, iteration: int) -> None:
        """Replaces what was lost of a share, and asks for its rollouts again."""
        share.losses += 1
        if share.losses > self._max_restarts:
            raise RuntimeError(
                f"rollout {iteration} lost workers of rollout worker {number} more than "
                f"max_restarts={self._max_restarts} "
                "times; look into the logs of the cluster's processes for what ends them, or raise max_restarts"
            )
        self._cancel(share)
        fresh = {i for i, worker in enumerate(share.env_workers) if not is_there(worker)}
        for i in fresh:
            share.env_places[i] = self._cluster.standing(share.env_places[i])
            share.env_workers[i] = self._new_env_worker(share, share.env_places[i])
            self.episodes_discarded += len(share.env_ids) // len(share.env_workers)
        self.workers_replaced += len(fresh)
        if not is_there(share.worker):
            share.place = self._cluster.standing(share.place)
            share.worker = self._start_worker(share.place, number, share.env_ids)
            self.workers_replaced += 1
        self._open(share, fresh)
        for order in share.orders.values():
            self._ask(share, order)


def merged(parts: Sequence[Mapping[int, EnvState] | None]) -> Mapping[int, EnvState] | None:
    """Returns the states of all parts; None if one has none."""
    states: dict[int, EnvState] = {}
    for part in parts:
        if part is None:
            return None
        states |= part
    return states


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
        places: of each.
        start_learner: from the place, a new `Learner`.
    """

    def __init__(self, cluster: Cluster, places: Sequence[Place], start_learner: Callable[[Place], Any]) -> None:
        self._cluster, self._places, self._start_learner = cluster, list(places), start_learner
        self._learners: list[Any] = []
        self.start()

    def start(self) -> None:
        """Starts the group, in place of one that has lost a process."""
        for learner in self._learners:
            ray.kill(learner)
        self._places = [self._cluster.standing(place) for place in self._places]
        self._learners = [self._start_learner(place) for place in self._places]
        address = self._cluster.get(self._learners[0].free_address.remote())
        size = len(self._learners)
        self._results([learner.join.remote(rank, size, address) for rank, learner in enumerate(self._learners)])

    def call(self, method: str, *inputs: Any, first: Sequence[Any] = (), each: Sequence[Any] | None = None) -> Any:
        """Has all learners call a method, and returns what the first one's returns.

        Args:
            method: name of the method.
            inputs: its inputs.
            first: further ones, for the first learner only; None for the others.
            each: a further one for each learner, a list of references.

        Raises:
            LearnersLost: one of them is gone.
        """
        calls: list[Any] = []
        for rank, learner in enumerate(self._learners):
            own = first if rank == 0 else [None] * len(first)
            calls.append(getattr(learner, method).remote(*inputs, *own, *(each[rank] if each is not None else ())))
        return self._results(calls)[0]

    def weights(self) -> Any:
        """Returns a reference to the first learner's trained weights."""
        return self._learners[0].weights.remote()

    def _results(self, calls: Sequence[Any]) -> list[Any]:
        waiting = list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            try:
                result(ready[0])
            except LOST as error:
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


def free_address() -> str:
    """Returns this node's address and a port that is free on it, host:port."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def start_env_workers(cluster: Cluster, make_envs: Callable[[int, int, int], Any]) -> Callable[[Place, int, int], Any]:
    """Returns what starts an env worker, from its place, its number of environments and the size of their images.

    Args:
        cluster: where it runs.
        make_envs: makes so many environments with images of a size, for so many threads.
    """

    def start(place: Place, num_envs: int, image_size: int) -> Any:
        def make(num_envs: int, num_threads: int) -> Any:
            return make_envs(num_envs, image_size, num_threads)

        return cluster.start(EnvWorker, place, make, num_envs)

    return start
