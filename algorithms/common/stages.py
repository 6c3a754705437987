"""Environments in stages, each stepping in a thread of its own: one simulates while another is decided.

    stages = EnvStages(make, env_ids, num_stages=2, timeout_s=600)
    for stage in stages:
        stage.reset(seeds_of(stage.env_ids))
    ...
    stage.send(actions)      # returns at once
    ...                      # decide for another stage; stepping needs no GIL
    step = stage.receive()   # waits

With one stage this is the plain order of work. Results do not depend on the number of stages, because every
environment has its own generator.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from algorithms.common.processes import same_cuda_device
from algorithms.common.vector_envs import EnvState, can_restore, put_back, sampled_tasks


class EnvStep(NamedTuple):
    """What `gymnasium.vector.VectorEnv.step` returns."""

    obs: dict[str, Any]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    infos: dict[str, Any]


class EnvStage:
    """Some of the environments, and the thread that makes, steps and closes them.

    Args:
        make_envs: makes so many environments. It runs in the stage's thread, to which an OpenGL context then belongs.
        env_ids: [n] their numbers among the environments of all processes.
        offset: place of the first among this process's environments.
        timeout_s: seconds that a step may take.

    Attributes:
        obs: the last observation.
        waits: True between `send` and `receive`.
        busy_s: seconds of stepping so far.
        wait_s: seconds that `receive` waited so far.
        failed_actions: what the step was given that raised or did not end.
    """

    def __init__(
        self, make_envs: Callable[[int], gym.vector.VectorEnv], env_ids: NDArray[np.intp], offset: int, timeout_s: float
    ) -> None:
        self.env_ids, self.offset = env_ids, offset
        self.obs: dict[str, Any] = {}
        self.waits = False
        self.busy_s, self.wait_s = 0.0, 0.0
        self.failed_actions: NDArray[np.float32] | None = None
        self._actions = np.zeros(0, dtype=np.float32)
        self._timeout_s = timeout_s
        self._is_stuck = False
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # A daemon, so that a step that never ends cannot keep the program from ending.
        self._thread = threading.Thread(
            target=self._work, args=(same_cuda_device(),), name=f"envs-{offset}", daemon=True
        )
        self._thread.start()
        try:
            self.envs: gym.vector.VectorEnv = self._call(lambda: make_envs(len(env_ids)))
        except BaseException:
            self._tasks.put(None)
            raise

    @property
    def rows(self) -> slice:
        """Where these environments are among this process's."""
        return slice(self.offset, self.offset + len(self.env_ids))

    def reset(self, seed: Sequence[int], options: dict[str, Any] | None = None) -> None:
        """Starts episodes; see `VectorEnv.reset`. `seed` has one entry per environment."""
        self.obs, _ = self._call(lambda: self.envs.reset(seed=cast(Any, list(seed)), options=options))

    def send(self, actions: NDArray[np.float32], rows: NDArray[np.intp] | None = None) -> None:
        """Starts a step with `actions`, shaped as the environments' action space.

        Args:
            actions: one for each environment, or for those in `rows`.
            rows: [M] which environments act; the others, whose episodes have ended, are given zeros.
        """
        if rows is not None:
            given, actions = actions, np.zeros((len(self.env_ids), *actions.shape[1:]), dtype=np.float32)
            actions[rows] = given
            actions = actions.reshape(self.envs.action_space.shape or ())
        self._actions = actions
        self.waits = True
        self._tasks.put(self._step)

    def receive(self) -> EnvStep:
        """Returns the outcome of the step that `send` started.

        Raises:
            TimeoutError: the step has not ended in time. The stage cannot be used any more.
            Exception: whatever the environments raised.
        """
        start = time.perf_counter()
        self.waits = False
        try:
            step: EnvStep = self._result(self._timeout_s)
        except queue.Empty:
            self.failed_actions, self._is_stuck = self._actions, True
            raise TimeoutError(
                f"environments {self._names()} have not ended a step within env_timeout_s={self._timeout_s:g}; look "
                "for a hanging renderer or simulation, or raise env_timeout_s"
            ) from None
        except Exception as error:
            self.failed_actions = self._actions
            error.add_note(f"raised by a step of environments {self._names()}")
            raise
        self.wait_s += time.perf_counter() - start
        self.obs = step.obs
        return step

    @property
    def can_restore(self) -> bool:
        """True if the environments' states can be taken and put back."""
        return can_restore(self.envs)

    def states(self) -> dict[int, EnvState]:
        """Returns each environment's state by its number among all."""
        base = cast(Any, self.envs.unwrapped)
        return dict(zip(self.env_ids.tolist(), self._call(base.get_states), strict=True))

    def restore(self, states: Mapping[int, EnvState]) -> None:
        """Puts states back and observes.

        Raises:
            ValueError: an environment has no state there.
        """
        missing = sorted(set(self.env_ids.tolist()) - states.keys())
        if missing:
            raise ValueError(f"no states of environments {missing} were saved; resume with the same num_envs")
        own = [states[int(env_id)] for env_id in self.env_ids]
        self.obs = self._call(lambda: put_back(self.envs, own))

    @property
    def task_ids(self) -> Sequence[int]:
        """Tasks that the environments sample from.

        Raises:
            TypeError: tasks cannot be weighted in these environments.
        """
        return sampled_tasks(self.envs)

    def set_task_weights(self, weights: NDArray[np.float64]) -> None:
        """Says how often the episodes that start from now on are of each of `task_ids`, between steps."""
        cast(Any, self.envs.unwrapped).set_task_weights(weights)

    def close(self) -> None:
        """Closes the environments and ends the thread, unless a step never ended; a second call does nothing."""
        self._drop_step()
        if self._is_stuck:
            self._tasks.put(None)  # for when the step ends after all
        elif self._thread.is_alive():
            self._call(self.envs.close)
            self._tasks.put(None)
            self._thread.join()

    def _drop_step(self) -> None:
        """Waits for a step that nobody will receive, if there is one."""
        if self.waits:
            self.waits = False
            try:
                self._results.get(timeout=self._timeout_s)
            except queue.Empty:
                self._is_stuck = True

    def _names(self) -> str:
        return f"{self.env_ids[0]} to {self.env_ids[-1]}"

    def _step(self) -> EnvStep:
        start = time.perf_counter()
        try:
            return EnvStep(*cast(Any, self.envs.step(self._actions)))
        finally:
            self.busy_s += time.perf_counter() - start

    def _work(self, begin: Callable[[], None]) -> None:
        begin()
        while (task := self._tasks.get()) is not None:
            try:
                result = task(), None
            except BaseException as error:  # it is raised in the thread that asked
                result = None, error
            self._results.put(result)
            del task, result

    def _call(self, task: Callable[[], Any]) -> Any:
        self._tasks.put(task)
        return self._result(None)

    def _result(self, timeout_s: float | None) -> Any:
        value, error = self._results.get(timeout=timeout_s)
        if error is not None:
            raise error
        return value


class EnvStages:
    """This process's environments, in stages of equal size; iterate over it. Leaving the context closes them.

    Args:
        make_envs: makes so many environments.
        env_ids: [N] numbers of this process's environments among those of all processes.
        num_stages: stages.
        timeout_s: seconds that a step may take.

    Raises:
        ValueError: N is not a multiple of `num_stages`.
    """

    def __init__(
        self,
        make_envs: Callable[[int], gym.vector.VectorEnv],
        env_ids: NDArray[np.intp],
        *,
        num_stages: int,
        timeout_s: float,
    ) -> None:
        if num_stages < 1 or len(env_ids) % num_stages:
            raise ValueError(
                f"pipeline_stage_num={num_stages} must be positive and divide the {len(env_ids)} environments of a "
                "process"
            )
        self.stages: list[EnvStage] = []
        try:
            for ids in np.split(env_ids, num_stages):
                self.stages.append(EnvStage(make_envs, ids, int(ids[0] - env_ids[0]), timeout_s))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[EnvStage]:
        return iter(self.stages)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def busy_s(self) -> float:
        """Seconds of stepping so far, summed over stages; more than `wait_s` where stages overlap with decisions."""
        return sum(stage.busy_s for stage in self)

    @property
    def wait_s(self) -> float:
        """Seconds that `receive` waited so far."""
        return sum(stage.wait_s for stage in self)

    @property
    def failed_actions(self) -> dict[str, NDArray[np.float32]]:
        """Actions of the steps that raised or did not end, by stage."""
        return {f"actions_of_stage_{i}": s.failed_actions for i, s in enumerate(self) if s.failed_actions is not None}

    def states(self) -> dict[int, EnvState] | None:
        """Returns the states of all environments by their number; None if they cannot give any."""
        if not all(stage.can_restore for stage in self):
            return None
        return {env_id: state for stage in self for env_id, state in stage.states().items()}

    def close(self) -> None:
        """Closes all environments."""
        for stage in self.stages:
            stage.close()
