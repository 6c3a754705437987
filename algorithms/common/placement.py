"""Which process of a cluster does what: roles on the GPUs of its nodes, or on processors alone.

    "env:0-3 rollout:4-7 actor:0-7"       GPUs by number, counted over the nodes in their order
    "env:cpu*16 rollout:0-1 actor:0-1"    sixteen processes on processors step environments
    "rollout:cpu actor:cpu*2"             no GPU at all

Every GPU named is a process of the role; several roles may share a GPU. Pure functions of a description of the cluster:
what cannot be is one `ValueError`, before anything is started. Needs no PyTorch and no Ray.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

ROLES = ("env", "rollout", "actor")
_ROLE = re.compile(r"(?P<role>[^:\s]+):(?P<places>\S*)")
_CPUS = re.compile(r"cpu(?:\*(\d+))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_NOTATION = "write for example 'env:0-3 rollout:4-7 actor:0-7' or 'env:cpu*16 rollout:0 actor:0'"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster.

    Attributes:
        node_id: the cluster's name of it.
        address: its host.
        cpus: cores that it offers.
        gpus: GPUs that it offers.
        versions: of what has to be the same everywhere, by name.
    """

    node_id: str
    address: str
    cpus: int
    gpus: int = 0
    versions: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one process runs.

    Attributes:
        node: number of the node.
        gpu: number of the GPU among those that the node offers; None for processors alone.
        cpus: cores that the process may count as its own.
    """

    node: int
    gpu: int | None
    cpus: int

    def shares_gpu(self, other: Place) -> bool:
        """Returns whether both are on the same GPU."""
        return self.gpu is not None and (self.node, self.gpu) == (other.node, other.gpu)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The processes of each role, in order."""

    env: tuple[Place, ...]
    rollout: tuple[Place, ...]
    actor: tuple[Place, ...]

    @property
    def has_envs_in_rollout(self) -> bool:
        """True if each process that decides has its environments on its own GPU, and so in itself."""
        return len(self.env) == len(self.rollout) and all(
            env.shares_gpu(rollout) for env, rollout in zip(self.env, self.rollout, strict=True)
        )

    def __str__(self) -> str:
        words = {role: _role_in_words(role, getattr(self, role)) for role in ROLES}
        if self.has_envs_in_rollout:
            words["env"] = "env in the processes of rollout"
        return ", ".join(words.values())


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one role asks for: GPUs by their numbers in the cluster, or a number of processes on processors."""

    gpus: tuple[int, ...] = ()
    cpu_processes: int = 0


def parse_placement(text: str) -> dict[str, Wanted]:
    """Returns what each role in `text` asks for.

    Raises:
        ValueError: it is not in the notation, names a role twice or an unknown one, or a role is empty or names a GPU
            twice.
    """
    wanted: dict[str, Wanted] = {}
    for part in text.split():
        match = _ROLE.fullmatch(part)
        if match is None or match["role"] not in ROLES:
            raise ValueError(
                f"placement={text!r}: {part!r} is none of {', '.join(f'{r}:...' for r in ROLES)}; {_NOTATION}"
            )
        role, places = match["role"], match["places"]
        if role in wanted:
            raise ValueError(f"placement={text!r} names the role {role} twice; name it once, as in {role}:0-1,3")
        wanted[role] = _parse_places(text, role, places)
    missing = [role for role in ("rollout", "actor") if role not in wanted]
    if missing:
        raise ValueError(f"placement={text!r} gives {' and '.join(missing)} no place; {_NOTATION}")
    return wanted


def _parse_places(text: str, role: str, places: str) -> Wanted:
    if match := _CPUS.fullmatch(places):
        number = int(match[1] or 1)
        if number < 1:
            raise ValueError(f"placement={text!r}: {role}:{places} is empty; give at least one process")
        return Wanted(cpu_processes=number)
    gpus: list[int] = []
    for item in places.split(","):
        match = _RANGE.fullmatch(item)
        if match is None and places:
            raise ValueError(
                f"placement={text!r}: {item!r} in {role}:{places} is no GPU number, range or cpu*N; {_NOTATION}"
            )
        if match is not None:
            gpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not gpus:
        raise ValueError(f"placement={text!r}: {role}:{places} is empty; name at least one GPU, or cpu")
    if twice := sorted({gpu for gpu in gpus if gpus.count(gpu) > 1}):
        raise ValueError(
            f"placement={text!r}: {role}:{places} names GPU {_listed(twice)} twice; roles may share a GPU, processes "
            "of one may not"
        )
    return Wanted(gpus=tuple(gpus))


def place_roles(
    nodes: Sequence[Node],
    *,
    placement: str | None = None,
    env_workers: int | None = None,
    rollout_gpus: int | None = None,
    learner_gpus: int | None = None,
    env_on_gpu: bool = False,
    num_stages: int = 1,
) -> Placement:
    """Returns where the processes of each role run.

    Without `placement`, the first `rollout_gpus` GPUs of the cluster decide and the last `learner_gpus` learn: all of
    them do both if neither is given. A cluster without GPUs has one process for each.

    Args:
        nodes: in order, the driver's first.
        placement: in the notation of this module.
        env_workers: processes on processors that step environments; if not given, `num_stages` for each rollout worker.
        rollout_gpus: GPUs that decide.
        learner_gpus: GPUs that learn.
        env_on_gpu: environments are simulated on GPUs: those of `env` in the placement, or those that decide.
        num_stages: stages that a rollout worker's environments are split into.

    Raises:
        ValueError: the cluster has not what is asked for, or two arguments say the same thing.
    """
    gpus = [(node, gpu) for node, description in enumerate(nodes) for gpu in range(description.gpus)]
    if placement is not None:
        given = dict(env_workers=env_workers, rollout_gpus=rollout_gpus, learner_gpus=learner_gpus)
        given = {name: value for name, value in given.items() if value is not None}
        wanted = parse_placement(placement)
        if "env" not in wanted:
            given.pop("env_workers", None)
        if given:
            named = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"placement={placement!r} and {named} both say where processes run; give one of them")
        asked = f"placement={placement!r}"
    else:
        rollout, learner = (
            _some_gpus(name, number, len(gpus), nodes)
            for name, number in (("rollout_gpus", rollout_gpus), ("learner_gpus", learner_gpus))
        )
        all_gpus = range(len(gpus))
        wanted = {
            "rollout": Wanted(gpus=tuple(all_gpus[:rollout])) if gpus else Wanted(cpu_processes=1),
            "actor": Wanted(gpus=tuple(all_gpus[len(gpus) - learner :])) if gpus else Wanted(cpu_processes=1),
        }
        asked = "what is asked for"
    if "env" not in wanted:
        wanted["env"] = _default_env(wanted["rollout"], env_workers, env_on_gpu, num_stages)
    if env_on_gpu and not wanted["env"].gpus:
        raise ValueError(
            f"physics='warp' simulates on GPUs, and env has {wanted['env'].cpu_processes} processes without one; name "
            "GPUs for env in --placement, or give --physics cpu"
        )
    for role, want in wanted.items():
        if absent := [gpu for gpu in want.gpus if gpu >= len(gpus)]:
            raise ValueError(
                f"{asked} puts {role} on GPU {_listed(absent)}, and the cluster has {describe(nodes)}; GPUs are "
                "numbered from 0 over the nodes in this order"
            )
    return Placement(**{role: _places(wanted[role], gpus, nodes) for role in ROLES})


def _some_gpus(name: str, number: int | None, there: int, nodes: Sequence[Node]) -> int:
    if number is None:
        return there
    if not 1 <= number <= there:
        hint = (
            "give --placement 'rollout:cpu actor:cpu' for processes without one" if there == 0 else f"give 1 to {there}"
        )
        raise ValueError(f"{name}={number}, and the cluster has {describe(nodes)}; {hint}")
    return number


def _default_env(rollout: Wanted, env_workers: int | None, env_on_gpu: bool, num_stages: int) -> Wanted:
    if env_workers is not None:
        if env_workers < 1:
            raise ValueError(f"env_workers={env_workers} must be at least 1")
        return Wanted(cpu_processes=env_workers)
    if env_on_gpu and rollout.gpus:
        return Wanted(gpus=rollout.gpus)
    return Wanted(cpu_processes=num_stages * (len(rollout.gpus) or rollout.cpu_processes))


def _places(want: Wanted, gpus: Sequence[tuple[int, int]], nodes: Sequence[Node]) -> tuple[Place, ...]:
    """Returns a place for each process: on its GPU, or spread over the nodes by their cores, neighbours together."""
    places = [gpus[gpu] for gpu in want.gpus]
    on_node = [sum(node == at for at, _ in places) for node in range(len(nodes))]
    for _ in range(want.cpu_processes):
        roomiest = max(range(len(nodes)), key=lambda node: (nodes[node].cpus / (on_node[node] + 1), -node))
        on_node[roomiest] += 1
    cpus = [max(1, node.cpus // max(1, number)) for node, number in zip(nodes, on_node, strict=True)]
    if want.cpu_processes:
        return tuple(
            Place(node=node, gpu=None, cpus=cpus[node]) for node, number in enumerate(on_node) for _ in range(number)
        )
    return tuple(Place(node=node, gpu=gpu, cpus=cpus[node]) for node, gpu in places)


def check_shares(args: object, placement: Placement) -> None:
    """Raises ValueError unless environments and batches can be shared exactly by the processes of `placement`.

    Args:
        args: with num_envs, micro_batch_size and pipeline_stage_num.
        placement: of the roles.
    """
    num_envs, micro = getattr(args, "num_envs"), getattr(args, "micro_batch_size")  # noqa: B009
    stages = getattr(args, "pipeline_stage_num")  # noqa: B009
    envs, rollouts, learners = len(placement.env), len(placement.rollout), len(placement.actor)
    divided, number = "the number of env workers", envs
    if placement.has_envs_in_rollout:
        divided, number = "num_envs", num_envs
    rules = (
        ("num_envs", num_envs, envs, f"{envs} env worker(s)"),
        ("num_envs", num_envs, learners, f"{learners} learner(s)"),
        ("micro_batch_size", micro, learners, f"{learners} learner(s)"),
        (divided, number, rollouts * stages, f"{rollouts} rollout worker(s) x {stages} stage(s)"),
        ("the larger number of rollout workers and learners", max(rollouts, learners), min(rollouts, learners),
         f"{min(rollouts, learners)} of the other"),
    )  # fmt: skip
    for name, value, parts, what in rules:
        if value < 1 or value % parts:
            raise ValueError(
                f"{name} ({value}) cannot be shared by {what}: it must be a positive multiple; the placement is "
                f"{placement}"
            )


def check_versions(nodes: Sequence[Node]) -> None:
    """Raises ValueError if a node has other versions than the first, the driver's.

    A commit counts only where both know theirs.
    """
    first, *others = nodes
    for node in others:
        differing = [
            f"{name} {node.versions.get(name)} ({first.address} has {version})"
            for name, version in first.versions.items()
            if node.versions.get(name) != version
            and not (name == "commit" and None in (version, node.versions.get(name)))
        ]
        if differing:
            raise ValueError(
                f"node {node.address} has other versions than the driver's: {', '.join(differing)}; install the same "
                "on all nodes"
            )


def describe(nodes: Sequence[Node]) -> str:
    """Returns the nodes of a cluster, their GPUs and cores, in words."""
    total = sum(node.gpus for node in nodes)
    each = ", ".join(f"{node.address}: {node.gpus} GPU(s) and {node.cpus} core(s)" for node in nodes)
    return f"{total} GPU(s) on {len(nodes)} node(s) ({each})"


def _role_in_words(role: str, places: Sequence[Place]) -> str:
    number = len(places)
    kind = "process(es) without GPU" if places[0].gpu is None else "process(es) on a GPU each"
    return f"{role} {number} {kind}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def check_installed() -> None:
    """Raises ValueError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ValueError("this trainer runs on Ray, which is not installed: pip install 'libero-gr00t[cluster]'")
