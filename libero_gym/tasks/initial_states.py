"""Initial states: where episodes start, and what LIBERO's stored states become once objects have come to rest.

LIBERO stores states in which some objects hang in the air and lets them fall during the first ten steps. MuJoCo 3.4
corrected the contact of boxes, and since then some of them end elsewhere: the bowl "on the ramekin" of libero_spatial
task 5 slides to its rim. Objects that have come to rest under an older version stay where they are under every
version. The files in `data/settled/` therefore hold, for each stored state, the world after the settling steps under
MuJoCo 3.3.7: positions, velocities, fixture poses (which LIBERO samples, and on which things rest) and the
controller's memory.

The files in `data/held_out/` hold the same of states that are none of the stored ones, to measure how a policy does
from starts it has not seen: LIBERO's own reset samples them, from the distribution of the task's `:init`. Stored states
come from that distribution too, apart from the arm, to whose posture they add noise of 0.02 rad a joint; LIBERO's reset
adds none.

`tools/record_initial_states.py` recorded both, and checks them under the installed MuJoCo.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from libero_gym.tasks.archive import archive_root, has_archived_settled
from libero_gym.tasks.own_suites import is_drawn
from libero_gym.tasks.suites import TaskSpec, is_integer, load_init_states, member_suites, registered_suites

RecordedKind = Literal["settled", "held_out"]
InitStates = Literal["settled", "held_out", "original"]

FloatArray = npt.NDArray[np.float64]

_DATA = Path(__file__).resolve().parents[1] / "data"

OVERLAPPING: dict[tuple[str, int], tuple[int, ...]] = {
    ("libero_spatial", 2): (18,),
    ("libero_10", 0): (2, 45),
    ("libero_90", 0): (14,),
    ("libero_90", 3): (14,),
    ("libero_90", 4): (5, 8, 32, 42),
    ("libero_90", 5): (48,),
    ("libero_90", 50): (4, 22),
    ("libero_90", 53): (2,),
    ("libero_90", 54): (0, 11),
}
"""(suite, task_id) -> the 15 of LIBERO's 6,500 stored states whose premise cannot hold: two objects overlap by 2 to 11
mm and push each other away during and after settling, in three cases off the table or over, whatever the fixtures and
the version of MuJoCo. They are kept as they are, because published results hold them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedStates:
    """The recorded states of one kind of one task; S states.

    Attributes:
        physics: float64 [S, nq + nv], positions and velocities.
        fixture_poses: float64 [S, num_fixtures, 7], position (m) and quaternion wxyz.
        controller: float64 [S, 14], the controller's goal position (3), goal orientation (9) and gripper (2).
    """

    physics: FloatArray
    fixture_poses: FloatArray
    controller: FloatArray


@dataclass(frozen=True, kw_only=True)
class EpisodeStart:
    """Where an episode starts.

    Attributes:
        task: the task.
        init_state_id: index of the initial state among those of its kind.
        placement_seed: decides the fixtures of "original" states, which others hold.
    """

    task: TaskSpec
    init_state_id: int
    placement_seed: int


def sample_start(
    rng: np.random.Generator,
    tasks: Sequence[TaskSpec],
    kind: InitStates,
    *,
    task: TaskSpec | None = None,
    init_state_id: int | None = None,
    placement_seed: int | None = None,
    probabilities: npt.NDArray[np.float64] | None = None,
) -> EpisodeStart:
    """Sample what is not chosen, in this order: the task among `tasks`, the initial state, the seed of the fixtures.

    Args:
        rng: source of randomness.
        tasks: to choose from.
        kind: kind of initial states.
        task: the task, if it is chosen already.
        init_state_id: the initial state, if it is chosen already.
        placement_seed: the seed of the fixtures, 0 to 2^32 - 1, if it is chosen already.
        probabilities: of each of `tasks`; None draws all alike.

    Raises:
        ValueError: `init_state_id` is no integer or out of range, or a `placement_seed` is not or is given for states
            that hold their fixtures.
        FileNotFoundError: states of this kind are not recorded for the task's suite.
    """
    if placement_seed is not None:
        check_placement_seed(placement_seed, kind)
    if task is None:
        number = rng.integers(len(tasks)) if probabilities is None else rng.choice(len(tasks), p=probabilities)
        task = tasks[int(number)]
    if init_state_id is None:
        init_state_id = int(rng.integers(count_init_states(task, kind)))
    check_init_state_id(init_state_id, task, kind)
    sampled = int(rng.integers(2**32, dtype=np.uint64))
    chosen = sampled if placement_seed is None else int(placement_seed)
    return EpisodeStart(task=task, init_state_id=init_state_id, placement_seed=chosen)


def check_placement_seed(placement_seed: int, kind: InitStates) -> None:
    """Raise ValueError unless `placement_seed` can seed the fixtures of states of this kind."""
    if kind != "original":
        raise ValueError(
            f"placement_seed={placement_seed!r} chooses where fixtures stand, which {kind!r} states hold: make the "
            "environment with init_states='original', or leave it out"
        )
    if not is_integer(placement_seed) or not 0 <= placement_seed < 2**32:
        raise ValueError(
            f"placement_seed={placement_seed!r} is not a seed of NumPy's RandomState (valid: 0-4294967295)"
        )


def check_init_states(init_states: InitStates | None, suite: str) -> InitStates:
    """Return the kind of initial states to use; None is the suite's default.

    The default is "settled" for the suites that the package has them for (the base suites), "original" for others.

    Raises:
        ValueError: unknown kind.
        FileNotFoundError: states of this kind are not recorded for the suite.
    """
    if init_states is None:
        return "settled" if has_recorded_states(suite, "settled") else "original"
    if init_states not in get_args(InitStates):
        valid = ", ".join(repr(kind) for kind in get_args(InitStates))
        raise ValueError(f"init_states={init_states!r} is unknown (valid: {valid})")
    if init_states != "original":
        for member in member_suites(suite):
            recorded_file(member, init_states)
    return init_states


def check_init_state_id(init_state_id: int, task: TaskSpec, kind: InitStates) -> None:
    """Raise ValueError unless `task` has an initial state of this number and kind."""
    num_states = count_init_states(task, kind)
    if not is_integer(init_state_id):
        raise ValueError(f"init_state_id={init_state_id!r} is not an integer (valid: 0-{num_states - 1})")
    if not 0 <= init_state_id < num_states:
        raise ValueError(
            f"init_state_id={init_state_id} is not among the stored states of {task.suite} task {task.task_id} "
            f"(valid: 0-{num_states - 1})"
        )


@functools.lru_cache(maxsize=512)
def count_init_states(task: TaskSpec, init_states: InitStates) -> int:
    """Return how many initial states of a kind `task` has.

    Raises:
        FileNotFoundError: states of this kind are not recorded for its suite.
    """
    if init_states == "original":
        return len(load_init_states(task))
    return len(load_recorded_states(task, init_states).physics)


def has_recorded_states(suite: str, kind: RecordedKind) -> bool:
    """Return whether states of `kind` are part of the package, or drawn for a suite of one's own, archived or not.

    Of a combined suite all members' must be.
    """
    if suite in (own := registered_suites()):
        return kind == "settled" and own[suite].states_folder is None
    if kind == "settled" and _is_archived(suite):
        return True
    return all((_DATA / kind / f"{member}.npz").is_file() for member in member_suites(suite))


def _is_archived(suite: str) -> bool:
    root = archive_root()
    return root is not None and has_archived_settled(root, suite)


def recorded_file(suite: str, kind: RecordedKind) -> Path:
    """Return the file that holds the states of `kind` of `suite`.

    Raises:
        FileNotFoundError: none are recorded for the suite; the message names the kinds that it has, its default first,
            and the suites that have them.
    """
    if not has_recorded_states(suite, kind):
        suites = ", ".join(sorted(path.stem for path in (_DATA / kind).glob("*.npz")))
        kinds = [other for other in get_args(RecordedKind) if has_recorded_states(suite, other)]
        others = " or ".join(repr(other) for other in (*kinds, "original"))
        raise FileNotFoundError(
            f"no {kind} states are recorded for {suite}; use init_states={others} (recorded for: {suites})"
        )
    return _DATA / kind / f"{suite}.npz"


@functools.lru_cache(maxsize=256)
def load_recorded_states(task: TaskSpec, kind: RecordedKind) -> RecordedStates:
    """Return the recorded states of `task`, found by its content: a task may have another id than it had then.

    Raises:
        FileNotFoundError: none are recorded for its suite.
        ValueError: they were recorded for a task with another BDDL file or other stored states than the installed one.
    """
    if has_own_settled(task) and kind == "settled":
        load_init_states(task)  # draws them the first time
        with np.load(task.init_states_file, allow_pickle=False) as archive:
            return RecordedStates(**{name: archive[name] for name in ("physics", "fixture_poses", "controller")})
    with np.load(recorded_file(task.suite, kind), allow_pickle=False) as archive:
        sources = {str(archive[name]): name for name in archive.files if name.endswith("_source")}
        digest = source_digest(task)
        if digest not in sources:
            raise ValueError(
                f"the {kind} states of {task.suite} task {task.task_id} were recorded for another task than the "
                f"installed one: {task.bddl_file} or {task.init_states_file} differs; use init_states='original'"
            )
        recorded_id = sources[digest].removesuffix("_source")
        return RecordedStates(
            physics=archive[f"{recorded_id}_physics"],
            fixture_poses=archive[f"{recorded_id}_fixture_poses"],
            controller=archive[f"{recorded_id}_controller"],
        )


def has_own_settled(task: TaskSpec) -> bool:
    """Return whether the states of `task` at rest are in the file of its stored ones, not in the package."""
    return is_drawn(task.init_states_file) or _is_archived(task.suite)


def source_digest(task: TaskSpec) -> str:
    """Return what tells tasks apart by content: a digest of the stored states and the BDDL file."""
    content = np.ascontiguousarray(load_init_states(task)).tobytes() + task.bddl_file.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]
