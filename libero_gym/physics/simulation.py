"""One simulated world: reset, step, observe, judge. No rendering, no Gymnasium, no robosuite.

Timing, as in LIBERO: an environment step is 25 physics substeps of 2 ms (or as `control_freq` says). What is observed
(proprioception and images) is the world after the last substep but one, and its body and site poses are those of the
positions before that substep; what is judged (success) is the world after the last.
"""

from __future__ import annotations

import copy
import functools
import logging
import reprlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mujoco
import numpy as np
import numpy.typing as npt

from libero_gym.conventions import (
    CONTROL_FREQUENCY_HZ,
    PHYSICS_FREQUENCY_HZ,
    ActionMode,
    action_dim,
    check_action_mode,
    count_substeps,
)
from libero_gym.fork import Uncopied
from libero_gym.physics.controller import (
    SUBSTEPS,
    ArmKinematics,
    ControllerState,
    Observation,
    axis_angle_from_quat,
    creation_kinematics,
    step_numpy,
)
from libero_gym.physics.predicates import Goal
from libero_gym.physics.states import IDENTITY, Entry, check_entries, check_keys, check_scene, read_task
from libero_gym.rendering.protocol import RenderState
from libero_gym.tasks.cache import cache_dir
from libero_gym.tasks.initial_states import (
    InitStates,
    RecordedStates,
    check_init_state_id,
    check_init_states,
    load_recorded_states,
)
from libero_gym.tasks.placements import FixtureSampler, make_fixture_sampler
from libero_gym.tasks.scenes import Scene, load_scene
from libero_gym.tasks.suites import TaskSpec, load_init_states, load_problem

Stepping = Literal["exact", "fast", "numpy"]

NUM_SETTLING_STEPS = 10
SETTLING_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""No motion, gripper open: what LIBERO's public clients send while objects fall into place."""

FloatArray = npt.NDArray[np.float64]

_PHYSICS_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)


logger = logging.getLogger(__name__)

_DUMP_KEYS = ("action", "action_mode", "control_freq", "error")
_JUDGED = "judged_qpos"


class PhysicsError(RuntimeError):
    """The simulation diverged, ran out of space for contacts, or was given an action that is not finite.

    Attributes:
        dump: file with the state before the step that failed, and its action; `load_dump` opens it. None where none
            could be written, which the message explains.
    """

    def __init__(self, message: str, *, dump: Path | None = None) -> None:
        """Describe the failure."""
        super().__init__(message)
        self.dump = dump


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskData:
    """A task compiled against its scene: goal, fixture sampler, stored initial states [num_states, 1 + nq + nv]."""

    goal: Goal
    fixture_sampler: FixtureSampler
    init_states: FloatArray


class Simulation(Uncopied):
    """One world of a scene, which can be reset to any state of any of the scene's tasks.

    Simulations share the scene and own a copy of its physics model, because fixture poses live in the model (3 MB;
    plus the data). Distinct simulations may be used from distinct threads at the same time; `step` releases the GIL.

    Attributes:
        scene: the shared scene.
        model: own copy of the physics model.
        data: simulation state.
        task: task of the last reset.
        init_state_id: index of the stored state of the last reset.
        action_mode: what the numbers of an action mean.
        control_freq: environment steps a second.
        goal: decides from `data` after each step whether the goal holds. `reset` and `set_state` make it the task's
            (`libero_gym.physics.predicates.Goal`); another one may be put in its place until then.
    """

    _HOW_TO_MAKE_ANOTHER = (
        "make another one by Simulation(simulation.scene), and give it simulation.get_state() by set_state"
    )

    def __init__(
        self,
        scene: Scene,
        *,
        stepping: Stepping = "exact",
        action_mode: ActionMode = "delta_pose",
        control_freq: int = CONTROL_FREQUENCY_HZ,
    ) -> None:
        """Create a world; call `reset` before `step`.

        Args:
            scene: from `libero_gym.tasks.scenes.load_scene`.
            stepping: "exact" is LIBERO to the last bit from MuJoCo 3.3.6 on (to 1e-6 rad or m after 80 steps with
                contacts before: LIBERO computes forward dynamics three times a substep, and these versions start the
                solver from the result of the last); "fast" has hand-written controller algebra, equal to 1e-9
                until the first contact; "numpy" is the readable reference of "exact".
            action_mode: see `LiberoEnv`.
            control_freq: environment steps a second, see `LiberoEnv`.

        Raises:
            ValueError: unknown `stepping` or `action_mode`, or a frequency that is not possible.
        """
        if stepping not in ("exact", "fast", "numpy"):
            raise ValueError(f"stepping={stepping!r} is unknown (valid: 'exact', 'fast', 'numpy')")
        self.action_mode: ActionMode = check_action_mode(action_mode)
        self._num_substeps = count_substeps(control_freq)
        self.control_freq = int(control_freq)
        _divert_warnings()
        self.scene = scene
        self.model = copy.copy(scene.physics_model)
        self.data = mujoco.MjData(self.model)
        self.task: TaskSpec | None = None
        self.init_state_id = -1
        self._creation = _creation_kinematics(scene)
        self._controller = ControllerState()
        self._observation = Observation(
            qpos=np.zeros(self.model.nq),
            eef_pos=np.zeros(3),
            eef_quat_wxyz=np.zeros(4),
            gripper_qpos=np.zeros(2),
            judged_qpos=np.zeros(self.model.nq),
        )
        self._advance = self._make_stepper(stepping)
        self._default_fixture_poses = self._fixture_poses()
        self._indicators = _find_indicators(scene)
        self._indicator_alpha = np.zeros(len(self._indicators))
        self._observed_indicator_alpha = np.zeros(len(self._indicators))
        # What the next step and what is shown depend on besides MuJoCo's state; a step that fails is undone by it.
        self._memory = (
            self._controller.goal_pos,
            self._controller.goal_ori,
            self._controller.gripper,
            self._controller.is_fresh,
            self._observation.qpos,
            self._observation.eef_pos,
            self._observation.eef_quat_wxyz,
            self._observation.gripper_qpos,
            self._observation.judged_qpos,
            self._observed_indicator_alpha,
        )
        self.goal: Callable[[mujoco.MjData], bool] | None = None
        self._success = False
        self._layout = IDENTITY | {name: Entry.of(value) for name, value in self._state_arrays().items()}

    def reset(
        self,
        task: TaskSpec,
        init_state_id: int,
        random_state: np.random.RandomState,
        *,
        init_states: InitStates | None = None,
        num_settling_steps: int = NUM_SETTLING_STEPS,
        num_libero_resets: int = 1,
    ) -> None:
        """Start an episode from an initial state, objects at rest.

        Original states: equal to LIBERO's `numpy.random.seed(s); env.reset(); env.set_init_state(states[i])` with
        `random_state = numpy.random.RandomState(s)`, followed by `num_settling_steps` steps without motion. Where
        objects come to rest then depends on MuJoCo's version, see `libero_gym.tasks.initial_states`.

        Settled states: the outcome of that under MuJoCo 3.3.7, with the fixture poses that it had there;
        `random_state` and the arguments after `init_states` have no part in it.

        Held-out states: the same of states that LIBERO's reset samples and that are none of the stored ones.

        Args:
            task: one of the scene's tasks.
            init_state_id: index of the state among those of its kind.
            random_state: consumed for the fixture poses of original states.
            init_states: "settled", "held_out" or "original"; None is "settled" for the suites that the package has
                them for (the base suites), "original" for others.
            num_settling_steps: 0 for the bare original state.
            num_libero_resets: how often the LIBERO environment to be matched has been reset, this time included: each
                reset of it takes more random numbers (see `libero_gym.tasks.placements.FixtureSampler.sample`).

        Raises:
            ValueError: `init_state_id` is no integer or out of range, or `init_states` is unknown.
            FileNotFoundError: "settled" or "held_out" was asked of a suite for which none are recorded.
            PhysicsError: the simulation diverged while settling.
        """
        task_data = load_task_data(self.scene, task)
        kind = check_init_states(init_states, task.suite)
        check_init_state_id(init_state_id, task, kind)
        self.task = task
        self.init_state_id = int(init_state_id)
        self.goal = task_data.goal
        mujoco.mj_resetData(self.model, self.data)
        self._controller.reset(self._creation)
        if kind != "original":
            self._set_recorded_state(load_recorded_states(task, kind), init_state_id)
        else:
            self._set_fixture_poses(
                task_data.fixture_sampler.sample(
                    random_state, self._default_fixture_poses, num_resets=num_libero_resets
                )
            )
            state = task_data.init_states[init_state_id]
            self.data.time = state[0]
            self.data.qpos[:] = state[1 : 1 + self.model.nq]
            self.data.qvel[:] = state[1 + self.model.nq :]
        mujoco.mj_forward(self.model, self.data)
        self._observation.qpos[:] = self.data.qpos
        self._observation.judged_qpos[:] = self.data.qpos
        self._observation.read_sensors(self.data, self.scene.robot)
        self._update_indicators()
        self._observed_indicator_alpha[:] = self._indicator_alpha
        self._success = bool(self.goal(self.data))
        if kind == "original":
            for _ in range(num_settling_steps):
                self._step(SETTLING_ACTION, "delta_pose", SUBSTEPS)

    def step(self, action: npt.ArrayLike) -> bool:
        """Advance by one environment step, 50 ms at LIBERO's rate, and return whether the goal holds.

        Args:
            action: float [A], see `LiberoEnv`. With "delta_pose" float [7]: end effector's change of position (units of
                5 cm) and of rotation (axis-angle, units of 0.5 rad), clipped to -1..1, and the gripper (< 0 opens,
                > 0 closes, 0 holds).

        Raises:
            ValueError: wrong shape, or `reset` was not called.
            PhysicsError: the action is not finite, the simulation diverged, or a buffer overflowed. The world is then
                as it was before the step, and so is the error's `dump`.
        """
        expected = (action_dim(self.action_mode),)
        try:
            values = np.ascontiguousarray(action, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"action={reprlib.repr(action)} is no array of numbers ({error}); expected {expected} with "
                f"{self.action_mode!r}"
            ) from error
        if values.shape != expected:
            raise ValueError(f"action has shape {values.shape}; expected {expected} with {self.action_mode!r}")
        if self.goal is None:
            raise ValueError("reset() must be called before step()")
        if not np.isfinite(values).all():
            raise self.physics_error(f"action {values} is not finite; check the policy's output for NaN", values)
        return self._step(values, self.action_mode, self._num_substeps)

    def _step(self, values: FloatArray, action_mode: ActionMode, num_substeps: int) -> bool:
        assert self.goal is not None
        started = self.data.time
        physics, memory = self._physics_state(), [array.copy() for array in self._memory]
        self._observed_indicator_alpha[:] = self._indicator_alpha
        self._advance(values, action_mode, num_substeps)
        counts = np.asarray(self.data.warning.number)
        if counts.any():
            names = [mujoco.mjtWarning(int(i)).name for i in np.flatnonzero(counts)]
            for array, value in zip(self._memory, memory, strict=True):
                array[:] = value
            self._restore_physics(physics, self._observation.judged_qpos)
            raise self._dumped_error(
                f"MuJoCo reports {names} in the step from t={started:.3f} s of {self.task}: reset the environment, and "
                "check that nothing but its actions moves it",
                values,
                action_mode,
                num_substeps,
            )
        self._update_indicators()
        self._success = bool(self.goal(self.data))
        return self._success

    def hold_action(self) -> FloatArray:
        """Return the action that keeps the arm where it is and the gripper as it is, float64 [A].

        With the absolute modes that is where the arm is, what such actions mean: the grip site's pose 2 ms before the
        step's end, or the joints' positions at it.
        """
        held = np.zeros(action_dim(self.action_mode))
        robot = self.scene.robot
        if self.action_mode == "absolute_pose":
            quat_wxyz = np.empty(4)
            mujoco.mju_mat2Quat(quat_wxyz, self.data.site_xmat[robot.eef_site_id])
            held[:3] = self.data.site_xpos[robot.eef_site_id]
            held[3:6] = axis_angle_from_quat(quat_wxyz[[1, 2, 3, 0]])
        elif self.action_mode == "absolute_joint_pos":
            held[:7] = self.data.qpos[robot.arm_qpos_adr]
        return held

    def success(self) -> bool:
        """Return whether the goal held at the end of the last step."""
        return self._success

    def states(self) -> npt.NDArray[np.float32]:
        """Return the observed proprioception, float32 [8]: eef position (m), axis-angle (rad), fingers (m)."""
        o = self._observation
        axis_angle = axis_angle_from_quat(o.eef_quat_wxyz[[1, 2, 3, 0]])
        return np.concatenate([o.eef_pos, axis_angle, o.gripper_qpos]).astype(np.float32)

    def render_state(self) -> RenderState:
        """Return what a renderer needs to show the last step."""
        return RenderState(
            qpos=self._observation.qpos.copy(),
            fixture_poses=self._fixture_poses(),
            indicator_alpha=self._observed_indicator_alpha.copy(),
        )

    def get_state(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything that decides the future and the present observation, as a dict of arrays (copies).

        `set_state` restores it to the last bit in any simulation of the same scene. No entry needs pickle.

        Raises:
            ValueError: `reset` was not called.
        """
        if self.task is None:
            raise ValueError("reset() must be called before get_state()")
        identity = {
            "scene": np.array(self.scene.key),
            "suite": np.array(self.task.suite),
            "task_id": np.array(self.task.task_id),
            "init_state_id": np.array(self.init_state_id),
        }
        return identity | self._state_arrays()

    def _state_arrays(self) -> dict[str, npt.NDArray[Any]]:
        observation = self._observation
        return {
            "physics": self._physics_state(),
            "fixture_poses": self._fixture_poses(),
            "goal_pos": self._controller.goal_pos.copy(),
            "goal_ori": self._controller.goal_ori.copy(),
            "gripper": self._controller.gripper.copy(),
            "is_fresh": self._controller.is_fresh.copy(),
            "observed_qpos": observation.qpos.copy(),
            "observed_eef_pos": observation.eef_pos.copy(),
            "observed_eef_quat_wxyz": observation.eef_quat_wxyz.copy(),
            "observed_gripper_qpos": observation.gripper_qpos.copy(),
            _JUDGED: observation.judged_qpos.copy(),
            "indicator_alpha": self._indicator_alpha.copy(),
            "observed_indicator_alpha": self._observed_indicator_alpha.copy(),
            "success": np.array(self._success),
        }

    def check_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Return if `set_state` would take a state; the simulation is not touched.

        Raises:
            ValueError: as `set_state`.
        """
        self._read_state(state, must_be_finite=True)

    def _read_state(
        self, state: Mapping[str, npt.NDArray[Any]], *, must_be_finite: bool
    ) -> tuple[TaskSpec, dict[str, npt.NDArray[Any]]]:
        """Return the task and the entries of a state that may be restored."""
        check_keys(state, self._layout.keys() - {_JUDGED}, optional=(_JUDGED, *_DUMP_KEYS))
        task = check_scene(state, self.scene)
        load_task_data(self.scene, task)  # what it raises, it raises here
        layout = {name: entry for name, entry in self._layout.items() if name in state}
        return task, check_entries(state, layout, must_be_finite=must_be_finite)

    def set_state(self, state: Mapping[str, npt.NDArray[Any]], *, must_be_finite: bool = True) -> None:
        """Restore what `get_state` returned, and with it the poses and contacts that `data` held.

        Args:
            state: the state. One that version 0.1.0 saved lacks `judged_qpos`; poses and contacts are then those of the
                step's end, 2 ms later, as they were there.
            must_be_finite: False takes numbers that are not finite, as the dump of a fault may hold.

        Raises:
            ValueError: an entry is missing, surplus, of another type or shape, or not finite, or the state belongs to
                another scene or to a task of another scene. The simulation has not been touched.
        """
        task, state = self._read_state(state, must_be_finite=must_be_finite)
        self.task, self.goal = task, load_task_data(self.scene, task).goal
        self.init_state_id = int(state["init_state_id"])
        self._set_fixture_poses(state["fixture_poses"])
        self._restore_physics(state["physics"], state.get(_JUDGED))
        self._controller.goal_pos[:] = state["goal_pos"]
        self._controller.goal_ori[:] = state["goal_ori"]
        self._controller.gripper[:] = state["gripper"]
        self._controller.is_fresh[:] = state["is_fresh"]
        self._observation.qpos[:] = state["observed_qpos"]
        self._observation.eef_pos[:] = state["observed_eef_pos"]
        self._observation.eef_quat_wxyz[:] = state["observed_eef_quat_wxyz"]
        self._observation.gripper_qpos[:] = state["observed_gripper_qpos"]
        self._indicator_alpha[:] = state["indicator_alpha"]
        self._observed_indicator_alpha[:] = state["observed_indicator_alpha"]
        self._success = bool(state["success"])

    def physics_error(self, reason: str, action: FloatArray) -> PhysicsError:
        """Return the error to raise for `action`, float64 [A], having dumped the present state and the action.

        Raises:
            ValueError: `reset` was not called.
        """
        return self._dumped_error(reason, action, self.action_mode, self._num_substeps)

    def _dumped_error(
        self, reason: str, action: FloatArray, action_mode: ActionMode, num_substeps: int
    ) -> PhysicsError:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}.npz"
        control = {"action_mode": np.array(action_mode), "control_freq": np.array(PHYSICS_FREQUENCY_HZ // num_substeps)}
        content: dict[str, Any] = {**self.get_state(), **control, "action": action, "error": np.array(reason)}
        try:
            folder = cache_dir() / "dumps"
            folder.mkdir(exist_ok=True)
            np.savez(folder / name, **content)
        except OSError as error:  # a full disk must not hide what went wrong
            return PhysicsError(f"{reason} (the state could not be dumped: {error})")
        return PhysicsError(
            f"{reason} (state and action: libero_gym.physics.simulation.load_dump('{folder / name}'))",
            dump=folder / name,
        )

    def _restore_physics(self, physics: FloatArray, judged_qpos: FloatArray | None) -> None:
        """Put `data` where a step left it: its poses and contacts are of `judged_qpos`, None for the positions'."""
        mujoco.mj_resetData(self.model, self.data)
        mujoco.mj_setState(self.model, self.data, physics, _PHYSICS_STATE)
        self._observation.judged_qpos[:] = self.data.qpos if judged_qpos is None else judged_qpos
        self.data.qpos[:] = self._observation.judged_qpos
        mujoco.mj_forward(self.model, self.data)
        # The positions themselves, and the solver's warm start, which some versions of MuJoCo overwrite.
        mujoco.mj_setState(self.model, self.data, physics, _PHYSICS_STATE)

    def _physics_state(self) -> FloatArray:
        state = np.empty(mujoco.mj_stateSize(self.model, _PHYSICS_STATE))
        mujoco.mj_getState(self.model, self.data, state, _PHYSICS_STATE)
        return state

    def _make_stepper(self, stepping: Stepping) -> Callable[[FloatArray, ActionMode, int], None]:
        bound: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "robot": self.scene.robot,
            "state": self._controller,
            "creation": self._creation,
            "observation": self._observation,
        }
        if stepping == "numpy":
            return lambda action, action_mode, num_substeps: step_numpy(
                action=action, action_mode=action_mode, num_substeps=num_substeps, **bound
            )
        from libero_gym.physics.stepping import NativeStepper  # imports Numba

        return NativeStepper(is_exact=stepping == "exact", **bound)

    def _set_recorded_state(self, states: RecordedStates, index: int) -> None:
        self._set_fixture_poses(states.fixture_poses[index])
        self.data.qpos[:] = states.physics[index, : self.model.nq]
        self.data.qvel[:] = states.physics[index, self.model.nq :]
        controller = states.controller[index]
        self._controller.goal_pos[:] = controller[:3]
        self._controller.goal_ori[:] = controller[3:12].reshape(3, 3)
        self._controller.gripper[:] = controller[12:]
        self._controller.is_fresh[:] = 0

    def _fixture_poses(self) -> FloatArray:
        ids = self.scene.fixture_body_ids
        return np.concatenate([self.model.body_pos[ids], self.model.body_quat[ids]], axis=1)

    def _set_fixture_poses(self, poses: FloatArray) -> None:
        ids = self.scene.fixture_body_ids
        self.model.body_pos[ids] = poses[:, :3]
        self.model.body_quat[ids] = poses[:, 3:]

    def _update_indicators(self) -> None:
        for index, (addresses, test, alphas) in enumerate(self._indicators):
            is_on = any(test(float(self.data.qpos[address])) for address in addresses)
            self._indicator_alpha[index] = alphas[is_on]


def load_dump(path: str | Path) -> tuple[Simulation, FloatArray]:
    """Return (simulation in the dumped state, action float64 [A]); `simulation.step(action)` fails as it did then.

    `Simulation.set_state` restores a dump too, if its numbers are finite: it is what `get_state` returns, in a `.npz`
    file without pickle, with "action", "action_mode", "control_freq" and "error" (the message) added.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the state belongs to other versions of LIBERO, robosuite or MuJoCo than the installed ones.
    """
    with np.load(path, allow_pickle=False) as archive:
        state = dict(archive)
    control: Any = {"action_mode": str(state["action_mode"]), "control_freq": int(state["control_freq"])}
    simulation = Simulation(load_scene(read_task(state)), **control)
    simulation.set_state(state, must_be_finite=False)
    return simulation, state["action"]


def _divert_warnings() -> None:
    """Have MuJoCo's warnings logged, unless the program has seen to them; MuJoCo writes a file where the program runs.

    MuJoCo calls the function from whatever thread steps, having taken Python's lock; once for a step that fails.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_log_warning)


def _log_warning(message: str) -> None:
    logger.warning("MuJoCo: %s", message)


@functools.cache
def _creation_kinematics(scene: Scene) -> ArmKinematics:
    return creation_kinematics(scene.physics_model, scene.robot)


@functools.lru_cache(maxsize=512)
def load_task_data(scene: Scene, task: TaskSpec) -> TaskData:
    """Return the compiled task; equal arguments share one object.

    Raises:
        ValueError: the stored states do not fit the scene's model.
    """
    problem = load_problem(task)
    states = load_init_states(task)
    width = 1 + scene.physics_model.nq + scene.physics_model.nv
    if states.shape[1] != width:
        raise ValueError(f"{task.init_states_file} has {states.shape[1]} columns; {task.name} needs {width}")
    return TaskData(
        goal=Goal(scene, problem.goal), fixture_sampler=make_fixture_sampler(scene, problem), init_states=states
    )


def _find_indicators(scene: Scene) -> list[tuple[tuple[int, ...], Any, tuple[float, float]]]:
    """Return for each indicator site: joint addresses, test of being on, (alpha when off, alpha when on)."""
    indicators: list[tuple[tuple[int, ...], Any, tuple[float, float]]] = []
    for thing in scene.objects.values():
        for site_id in thing.indicator_site_ids:
            off = scene.hidden_site_alpha[scene.physics_model.site(site_id).name]
            # LIBERO shows a site by alpha = 1 - alpha; robosuite has hidden it by a negative alpha before.
            indicators.append((thing.joint_qpos_adr, thing.joint_tests["turnon"], (off, 1.0 - off)))
    return indicators
