"""Experts act through the environment's own actions: 7 numbers within -1..1, 20 times a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.conventions import ACTION_DIM, CONTROL_FREQUENCY_HZ
from libero_gym.experts.skills import Command, World
from libero_gym.experts.solver import order, solve
from libero_gym.physics.simulation import Simulation
from libero_gym.tasks.initial_states import InitStates
from libero_gym.tasks.scenes import load_scene
from libero_gym.tasks.suites import TaskSpec, horizon, load_problem

FloatArray = npt.NDArray[np.float64]

# The controller moves by about a quarter of what is asked for in one step (it lags by 0.16 s), so asking for the
# whole remaining distance is well damped.
_POSITION_GAIN = 1.6
_ROTATION_GAIN = 1.0
_CRUISE = 0.8
_TURN = 0.7
_ACCELERATION = 0.2
_NOISE_MEMORY = 0.8


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """How an expert moves. The default is the same for all episodes: one mode of behaviour, no noise.

    Attributes:
        speed: multiple of the cruising speed (0.21 m/s at 1).
        speed_spread: the speed of an episode is sampled uniformly from `speed * (1 -+ speed_spread)`.
        noise: standard deviation of the (correlated) noise on the six motion actions, in units of actions.
        via_noise: standard deviation in metres of points passed on the way.
        mistakes: part of the episodes in which the expert grasps 3 to 7 cm beside one of the objects. If it does not
            hold it then, it notices that at once or on the way to the object's goal, and goes back;
            `Expert.is_mistaken` says up to which action there is nothing to learn from.
    """

    speed: float = 1.0
    speed_spread: float = 0.0
    noise: float = 0.0
    via_noise: float = 0.0
    mistakes: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name, low, high in (
            ("speed", 0.2, 1.25),
            ("speed_spread", 0.0, 0.5),
            ("noise", 0.0, 0.3),
            ("via_noise", 0.0, 0.1),
            ("mistakes", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value} is out of range (valid: {low}-{high})")


HUMAN_LIKE = ExpertConfig(speed=0.9, speed_spread=0.2, noise=0.06, via_noise=0.02)
"""Episodes that differ as those of a careful person do."""


class Expert:
    """A scripted policy for one task, which reads the simulation's privileged state.

    `reset` once an episode, after the simulation's own; then `act` before each step.
    """

    def __init__(self, task: TaskSpec, config: ExpertConfig) -> None:
        """Read the task's goal.

        Raises:
            ValueError: the goal has a predicate without a skill.
        """
        self.task = task
        self.config = config
        self._goal = load_problem(task).goal
        order(self._goal)
        self._commands: Iterator[Command] | None = None
        self._random = np.random.default_rng(0)
        self._previous = np.zeros(6)
        self._noise = np.zeros(6)
        self._speed = config.speed
        self._world: World | None = None

    def reset(self, sim: Simulation, rng: np.random.Generator) -> None:
        """Start an episode in `sim`, which must have been reset to this expert's task.

        Raises:
            ValueError: the simulation is at another task, or takes other actions than experts give.
        """
        if sim.task != self.task:
            raise ValueError(f"sim is at {sim.task}, the expert is for {self.task}; reset the simulation to that task")
        if sim.action_mode != "delta_pose" or sim.control_freq != CONTROL_FREQUENCY_HZ:
            raise ValueError(
                f"experts act by action_mode='delta_pose' at {CONTROL_FREQUENCY_HZ} Hz; this simulation has "
                f"{sim.action_mode!r} at {sim.control_freq} Hz"
            )
        self._random = rng
        self._speed = self.config.speed * (1.0 + self.config.speed_spread * rng.uniform(-1.0, 1.0))
        self._world = World(sim, rng, self.config.via_noise)
        if self.config.mistakes > 0 and rng.random() < self.config.mistakes:
            num_grasped = len({atom[1] for atom in self._goal if atom[0] in {"on", "in"}})
            self._world.missed_grasp = int(rng.integers(max(1, num_grasped)))
        self._commands = solve(self._world, self._goal)
        self._previous = np.zeros(6)
        self._noise = np.zeros(6)

    def act(self, sim: Simulation) -> npt.NDArray[np.float32]:
        """Return the next action, float32 [7] within -1..1.

        Raises:
            ValueError: `reset` was not called with this simulation.
        """
        if self._commands is None or self._world is None or self._world.data is not sim.data:
            raise ValueError("reset(sim, rng) must be called with the same simulation before act(sim)")
        command = next(self._commands)
        action = np.empty(ACTION_DIM, dtype=np.float32)
        action[:6] = self._motion(command, self._world)
        action[6] = command.gripper
        return action

    @property
    def is_mistaken(self) -> bool:
        """Whether the last action, and all before it, led to a mistake that has not been noticed yet."""
        return self._world is not None and self._world.is_mistaken

    def _motion(self, command: Command, world: World) -> FloatArray:
        robot = world.scene.robot
        speed = self._speed * command.speed
        shift = _POSITION_GAIN * (command.position - world.eef_pos) / robot.position_scale
        turn = _ROTATION_GAIN * _axis_angle(command.rotation @ world.eef_rotation.T) / robot.rotation_scale
        # Speeds build up over some steps; the controller's lag smooths the rest.
        limit = min(_CRUISE * speed, float(np.linalg.norm(self._previous[:3])) + _ACCELERATION)
        turn_limit = min(_TURN * speed, float(np.linalg.norm(self._previous[3:])) + _ACCELERATION)
        motion = np.concatenate([_clip_norm(shift, limit), _clip_norm(turn, turn_limit)])
        self._previous = motion
        if self.config.noise > 0:
            fresh = self._random.normal(0.0, self.config.noise, 6) * np.array([1.0, 1.0, 1.0, 0.3, 0.3, 0.3])
            self._noise = _NOISE_MEMORY * self._noise + np.sqrt(1.0 - _NOISE_MEMORY**2) * fresh
            motion = motion + self._noise
        return np.clip(motion, -1.0, 1.0)


def make_expert(task: TaskSpec, config: ExpertConfig | None = None) -> Expert:
    """Return an expert for `task`.

    Raises:
        ValueError: the task's goal has a predicate without a skill.
    """
    return Expert(task, config or ExpertConfig())


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertEpisode:
    """One episode.

    Attributes:
        task: the task.
        init_state_id: stored initial state.
        seed: decides the expert's variety and, with original initial states, the fixtures' poses as LIBERO's does.
        actions: float32 [length, 7], those after the settling steps.
        success: whether the goal held at the end.
        length: number of actions.
    """

    task: TaskSpec
    init_state_id: int
    seed: int
    actions: npt.NDArray[np.float32]
    success: bool
    length: int


def run_expert(
    sim: Simulation | None,
    task: TaskSpec,
    init_state_id: int,
    *,
    seed: int = 0,
    config: ExpertConfig | None = None,
    max_steps: int | None = None,
    init_states: InitStates | None = None,
) -> ExpertEpisode:
    """Run one episode from a stored initial state, until success or `max_steps`.

    Args:
        sim: a simulation of the task's scene to be used; None for a new one.
        task: the task.
        init_state_id: stored initial state.
        seed: decides the expert's variety, and the fixtures' poses where initial states are original.
        config: how the expert moves.
        max_steps: None for the suite's horizon.
        init_states: "settled", "held_out", "original" or None for the suite's default, see `Simulation.reset`.
    """
    sim = Simulation(load_scene(task)) if sim is None else sim
    limit = horizon(task.suite) if max_steps is None else max_steps
    sim.reset(task, init_state_id, np.random.RandomState(seed), init_states=init_states)
    expert = make_expert(task, config)
    expert.reset(sim, np.random.default_rng([seed, task.task_id, init_state_id]))
    actions: list[npt.NDArray[np.float32]] = []
    success = sim.success()
    while not success and len(actions) < limit:
        actions.append(expert.act(sim))
        success = sim.step(actions[-1])
    return ExpertEpisode(
        task=task,
        init_state_id=init_state_id,
        seed=seed,
        actions=np.array(actions, dtype=np.float32).reshape(-1, ACTION_DIM),
        success=success,
        length=len(actions),
    )


def _clip_norm(vector: FloatArray, limit: float) -> FloatArray:
    norm = float(np.linalg.norm(vector))
    return vector if norm <= limit else vector * (limit / norm)


def _axis_angle(rotation: FloatArray) -> FloatArray:
    quat, result = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(rotation).reshape(9))
    mujoco.mju_quat2Vel(result, quat, 1.0)
    return result
