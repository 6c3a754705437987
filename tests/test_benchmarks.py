"""What benchmarks refuse before they measure, what they compare, and what their documents tell of it."""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import env_reset, env_vector, env_warp, iterations, learning, parity, policy, train, update
from benchmarks.command_line import integer, launch_benchmark, positive_number, suite_name, tasks_of
from benchmarks.parity import Comparison
from libero_gym.physics.warp_worlds import WarpWorlds
from libero_gym.tasks.suites import get_task


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> Any:
    """What the program returns; raises SystemExit as it does."""
    name, *words = command.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    return importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "before_after --after x --suite libero_spatial --output a.gif --task-ids 10",
            r"task_id=10 is not in libero_spatial \(valid: 0-9\)",
        ),
        (
            "before_after --after x --suite libero_spatial --output a.gif --task-ids 0 --init-state-id 50",
            r"init_state_id=50 .*\(valid: 0-49\)",
        ),
        ("before_after --after nowhere --output a.gif --task-ids 0", "'nowhere' is no folder and no hub name"),
        ("env_reset --num-resets 0", r"--num-resets: 0 is out of range \(valid: 1 or more\)"),
        ("env_step --num-steps 0", r"--num-steps: 0 is out of range \(valid: 1 or more\)"),
        ("env_step --suites libero_goal libero_nope", r"--suites: invalid choice: 'libero_nope' \(choose from "),
        ("env_vector --num-chunks 0", r"--num-chunks: 0 is out of range \(valid: 1 or more\)"),
        ("env_vector --suite libero_nope", "suite='libero_nope' is not installed"),
        ("env_warp --compare libero_object --num-worlds", "--num-worlds: expected at least one argument"),
        ("env_warp --suite libero_object --compare libero_40", "libero_object has 10 scenes, .* libero_spatial or"),
        ("env_warp --num-episodes 501", "--num-episodes 501: libero_spatial has 500 stored initial states"),
        ("experts --suites libero_spatia", "is not installed; did you mean 'libero_spatial'"),
        ("experts --task-ids 10", r"task_id=10 is not in libero_spatial \(valid: 0-9\)"),
        ("experts --task-ids 0 --states 50", r"init_state_id=50 .* libero_spatial task 0 \(valid: 0-49\)"),
        ("experts --num-workers 0", r"--num-workers: 0 is out of range \(valid: 1 or more\)"),
        ("learning --num-iterations 3", r"--num-iterations: 3 is out of range \(valid: 4 or more\)"),
        ("parity --num-steps 0", r"--num-steps: 0 is out of range \(valid: 1 or more\)"),
        ("parity --num-predicate-states x", r"'x' is not an integer \(valid: 1 or more\)"),
        ("parity --tasks 42 --no-sample", r"task_id=42 is not in libero_spatial \(valid: 0-9\)"),
        ("policy --device nowhere", "device='nowhere' cannot be used here"),
        ("policy --compile-mode fast", r"--compile-mode: invalid choice: 'fast' \(choose from 'off', 'default', "),
        ("preset_loop --memory-cap-gb 0", r"--memory-cap-gb: 0 is out of range \(valid: above 0, finite\)"),
        ("render_fidelity --num-moments 0", r"--num-moments: 0 is out of range \(valid: 1 or more\)"),
        ("render_fidelity --contact-sheet sheet.txt", "--contact-sheet sheet.txt must end in .png"),
        ("scaling --processes 0", r"--processes: 0 is out of range \(valid: 1 or more\)"),
        ("scaling --processes 1 --timeout-s nan", r"--timeout-s: nan is out of range \(valid: above 0, finite\)"),
        ("train --num-envs 3 --num-steps 3", "--num-envs 3 cannot be decided in two stages: give an even number"),
        ("train --model nowhere", "model='nowhere' is no folder and no hub name"),
        ("update --device cpu --num-rows 10", "--num-envs 8 does not divide --num-rows 10: give .* --num-envs 5"),
        ("update --device cpu --num-rows 8", "--minibatch-size 32 does not divide --num-rows 8: give .*-size 8"),
        ("update --repeats 0", r"--repeats: 0 is out of range \(valid: 1 or more\)"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, command)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    with pytest.raises(ValueError, match=message):
        raise ValueError(printed.err)


def test_argument_types_take_their_bounds():
    assert integer(at_least=0)("0") == 0
    bounded = integer(at_least=1, at_most=3)
    assert (bounded("1"), bounded("3")) == (1, 3)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^4 is out of range \(valid: 1 to 3\)$"):
        bounded("4")
    assert positive_number("1e-3") == 0.001
    for word in ("0", "-1", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{word} is out of range"):
            positive_number(word)
    assert suite_name("libero_40") == "libero_40"
    assert tasks_of("libero_goal", [3, 1]) == [get_task("libero_goal", 3), get_task("libero_goal", 1)]


def test_a_target_speaks_of_the_released_size_on_a_gpu():
    applies = {(preset, device): policy.targets_apply(preset, torch.device(device))
               for preset in ("nano", "gr00t_n1d5") for device in ("cpu", "cuda")}  # fmt: skip
    assert [case for case, is_so in applies.items() if is_so] == [("gr00t_n1d5", "cuda")]


# --- losses ---


def test_losses_of_the_same_work_agree():
    assert iterations.check_losses("mixed", [1.0, 2.0], [1.0, 2.0005]) == pytest.approx(5e-4)
    for wrong in (2.002, math.nan):
        with pytest.raises(RuntimeError, match=r"^'mixed': losses differ by (0\.002|nan) .* \(at most 0\.001 is"):
            iterations.check_losses("mixed", [1.0, wrong], [1.0, 2.0])


def test_an_error_of_a_benchmark_itself_ends_it_with_a_message(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        launch_benchmark(lambda: iterations.check_losses("mixed", [1.0], [2.0]))
    assert ended.value.code == 1
    assert "error: 'mixed': losses differ by 1 from" in capsys.readouterr().err


@pytest.mark.slow
def test_an_update_with_rows_in_a_wrong_order_is_found(monkeypatch: pytest.MonkeyPatch):
    sizes = "--preset nano --device cpu --num-rows 4 --num-envs 2 --minibatch-size 2 --repeats 1"
    document = run(monkeypatch, f"update {sizes}")
    assert document["settings"]["largest_loss_difference"] <= iterations.LOSS_TOLERANCE
    assert document["settings"]["repeats"] == 1
    assert document["targets"] == {}

    class Shuffled(update.FeatureStore):
        def get(self, rows: Any) -> Any:
            kept = super().get(rows)
            return {name: value.roll(1, 0) for name, value in kept.items()} if self._num_kept else kept

    monkeypatch.setattr(update, "FeatureStore", Shuffled)
    with pytest.raises(RuntimeError, match=r"^'device': losses differ by 0\.\d+ from"):
        run(monkeypatch, f"update {sizes}")


def test_an_order_of_training_with_other_losses_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    phases = {f"time/{name}": 1.0 for name in iterations.PHASES}

    def measure(losses: dict[str, float]) -> Callable[[Any, Any], list[dict[str, float]]]:
        def measured(args: Any, make_envs: Any) -> list[dict[str, float]]:
            assert (args.minibatch_size, args.micro_batch_size) == (5, 5)  # of 10 decisions
            name = "plain" if args.feature_storage == "none" else ("cached", "overlapped")[args.pipeline_stage_num - 1]
            return [phases | {"charts/SPS": 1.0, "actor/loss": losses[name]}] * (args.num_iterations - 1)

        return measured

    output = tmp_path / "train.json"
    command = f"train --num-envs 2 --num-steps 5 --micro-batch-size 7 --compute-dtype float32 --output {output}"
    monkeypatch.setattr(train, "measure", measure({"plain": 0.1, "cached": 0.1, "overlapped": 0.1005}))
    document = run(monkeypatch, command)
    told = dict(minibatch_size=5, micro_batch_size=5, compute_dtype="float32", num_iterations=3, num_envs=2)
    assert document["settings"] == document["settings"] | told
    output.unlink()

    monkeypatch.setattr(train, "measure", measure({"plain": 0.1, "cached": 0.104, "overlapped": 0.1}))
    with pytest.raises(RuntimeError, match=r"^'cached': losses differ by 0\.004 from"):
        run(monkeypatch, command)
    assert not output.exists()


# --- parity ---


class OneStep:
    """What a run of LIBERO or of a simulation shows: the same at each step, and zeros unless said otherwise."""

    def __init__(self, **changed: float) -> None:
        place = np.zeros((2, 3))
        quat = np.zeros((2, 4))
        self.data = SimpleNamespace(qpos=place.copy(), qvel=place.copy(), ncon=1)
        self.model: Any = SimpleNamespace(body_pos=place.copy(), body_quat=quat)
        for name, value in changed.items():
            part = self.data if name in ("qpos", "qvel") else self.model
            vars(part)[name] = np.full_like(vars(part)[name], value)

    def reset(self, *_: Any, **__: Any) -> None:
        pass

    def step(self, action: Any) -> Any:
        return False


class LiberoStep(OneStep):
    def __init__(self, **changed: float) -> None:
        super().__init__(**changed)
        self.model = SimpleNamespace(_model=self.model)
        self.sim = self

    def set_init_state(self, state: Any) -> dict[str, Any]:
        return {}

    def step(self, action: Any) -> Any:
        return {}, 0.0, False, {}


@pytest.mark.parametrize("name", ["qpos", "qvel", "body_pos", "body_quat", "states", None])
def test_what_is_not_a_number_is_no_equality(name: str | None, monkeypatch: pytest.MonkeyPatch):
    changed = {} if name in ("states", None) else {name: math.nan}
    monkeypatch.setattr(parity, "compare_states", lambda *_: math.nan if name == "states" else 0.0)
    monkeypatch.setattr(parity, "Simulation", lambda *_, **__: OneStep())
    monkeypatch.setattr(parity, "load_scenes", lambda tasks: tasks)
    monkeypatch.setattr(parity, "reference_env", lambda task: nullcontext(LiberoStep(**changed)))
    monkeypatch.setattr(parity, "compare_predicates", lambda *_, **__: (0, 1))
    monkeypatch.setattr(parity, "predicate_kinds", lambda *_: set())
    document = run(monkeypatch, "parity --suites libero_goal --tasks 0 --num-steps 2 --no-sample")
    is_exact = name is None
    assert document["results"]["num_exact_runs"] == (3 if is_exact else 0)
    missed = {metric for metric, target in document["targets"].items() if not target["holds"]}
    differences = {"max_qpos", "max_qvel", "max_states", "max_fixture"}
    assert len(missed & differences) == (0 if is_exact else 1)
    told = dict(suites=["libero_goal"], tasks=[0], has_sample=False, num_steps=2, num_predicate_states=300)
    assert document["settings"] == told


def test_the_largest_difference_of_runs_is_not_a_number_where_one_is():
    zero: dict[str, Any] = dict(max_qpos=0.0, max_qvel=0.0, max_states=0.0, max_fixture=0.0)
    told: Any = dict(suite="libero_goal", task_id=0, sequence="random", num_steps=1)
    counts: Any = dict(num_success_mismatches=0, num_successes=0, max_contacts=0)
    rows: list[Any] = [told | counts | zero | {"max_qvel": value} for value in (0.0, math.nan, 0.0)]
    runs = [Comparison(**row) for row in rows]
    assert [run.is_exact() for run in runs] == [True, False, True]
    np.testing.assert_equal(parity.largest_differences(runs), zero | {"max_qvel": math.nan})


# --- environments ---


def test_resets_begin_again_where_the_stored_states_end(monkeypatch: pytest.MonkeyPatch):
    class Recorder:
        def reset(self, *given: Any, **options: Any) -> None:
            if given:
                chosen.append(given[1])

        def set_init_state(self, state: int) -> None:
            restored.append(state)

    chosen: list[int] = []
    restored: list[int] = []
    monkeypatch.setattr(env_reset, "load_scene", lambda task: None)
    monkeypatch.setattr(env_reset, "Simulation", lambda scene: Recorder())
    monkeypatch.setattr(env_reset, "reference_env", lambda task: nullcontext(Recorder()))
    monkeypatch.setattr(env_reset, "load_init_states", lambda task: [7, 8])
    env_reset.measure_task(get_task("libero_spatial", 0), num_resets=3)
    assert restored == [7, 7, 8, 7]  # the first is not timed
    assert chosen == 3 * [0, 0, 1, 0]


def test_all_sides_of_a_throughput_have_the_same_tasks(monkeypatch: pytest.MonkeyPatch):
    for counts, expected in (((8, 2), [0, 1]), ((64, 64), list(range(10))), ((3, 16), [0, 1, 2])):
        tasks = env_vector.shared_tasks("libero_spatial", *counts)
        assert [task.task_id for task in tasks] == expected
    assert len(env_vector.shared_tasks("libero_90", 64, 32)) == 32

    class Envs:
        renderer_name = "warp"

        def __init__(self, suite: str, num_envs: int, *, task_ids: range, **_: Any) -> None:
            seen["ours"] = list(task_ids)

        def reset(self, *, seed: int, options: dict[str, Any] | None = None) -> None:
            seen["begun"] = None if options is None else options["task_id"].tolist()

        def step(self, actions: Any) -> Any:
            return None, None, None, None, {"num_steps": np.ones(len(actions))}

        def close(self) -> None:
            pass

    def vectorised(factories: list[Any], context: str) -> Envs:
        seen["libero"] = [factory.args[0].task_id for factory in factories]
        return Envs("", len(factories), task_ids=range(0))

    seen: dict[str, Any] = {}
    tasks = env_vector.shared_tasks("libero_spatial", 5, 3)
    sizes = SimpleNamespace(
        suite="libero_spatial", num_envs=5, num_reference_envs=3, num_chunks=1, image_size=8, renderer=None
    )
    args: Any = sizes
    monkeypatch.setattr("gymnasium.vector.AsyncVectorEnv", vectorised)
    env_vector.measure_libero(args, tasks, "none")
    monkeypatch.setattr(env_vector, "LiberoVectorEnv", Envs)
    env_vector.measure_ours(args, len(tasks), num_threads=1)
    assert seen == {"libero": [0, 1, 2], "ours": [0, 1, 2], "begun": [0, 1, 2, 0, 1]}


def test_simulations_alone_take_turns_for_whole_chunks(monkeypatch: pytest.MonkeyPatch):
    class Turn:
        def __init__(self, scene: int) -> None:
            self.scene = scene

        def reset(self, *_: Any) -> None:
            pass

        def step(self, action: Any) -> None:
            stepped.append(self.scene)

    stepped: list[int] = []
    ticks = iter(range(10**6))
    monkeypatch.setattr(env_vector, "load_scene", lambda task: task.task_id)
    monkeypatch.setattr(env_vector, "Simulation", Turn)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) / 10)
    tasks = env_vector.shared_tasks("libero_spatial", 2)
    row = env_vector.measure_simulations(tasks, num_chunks=1, num_threads=1)
    assert row["env_steps_per_s"] > 0
    assert len(stepped) % env_vector.CHUNK == 0
    assert stepped[-15:] == [0] * 5 + [1] * 5 + [0] * 5 or stepped[-15:] == [1] * 5 + [0] * 5 + [1] * 5


def test_gpu_memory_of_a_row_is_its_own(monkeypatch: pytest.MonkeyPatch):
    """A row that needs less than the one before it tells less, and what others have in use is not counted."""
    pool = 5 * 2**30
    opened: list[int] = []

    class Envs:
        def __init__(self, suite: str, num_worlds: int, **_: Any) -> None:
            nonlocal pool
            pool += num_worlds * 2**30
            opened.append(num_worlds)
            self.worlds = object.__new__(WarpWorlds)

        def reset(self, *, seed: int) -> None:
            pass

        def step(self, actions: Any) -> Any:
            return None, None, None, None, {"num_steps": np.ones(len(actions))}

        def close(self) -> None:
            nonlocal pool
            pool -= opened.pop() * 2**30

    monkeypatch.setattr(env_warp, "LiberoVectorEnv", Envs)
    monkeypatch.setattr(env_warp, "default_device", lambda: "cuda:0")
    monkeypatch.setattr("warp.synchronize_device", lambda device: None)
    monkeypatch.setattr("warp.get_mempool_used_mem_current", lambda device: pool)
    args: Any = SimpleNamespace(horizon=None, solver_iterations=1, num_warmup_chunks=1, num_chunks=1)
    rows = [env_warp.measure_rate(args, "libero_spatial", num_worlds) for num_worlds in (3, 1, 2)]
    assert [row["gpu_memory_gib"] for row in rows] == [3.0, 1.0, 2.0]


# --- learning ---


def test_the_number_of_iterations_is_told(monkeypatch: pytest.MonkeyPatch):
    def trained(algorithm: str, seed: int, folder: Path, *, num_iterations: int) -> list[dict[str, float]]:
        line = {"env/success_once": 0.5, "env/num_episodes": 4.0, "global_step": 8.0}
        return [line | {"iteration": i + 1} for i in range(num_iterations)]

    monkeypatch.setattr(learning, "train", trained)
    assert run(monkeypatch, "learning --seeds 1")["settings"]["num_iterations"] == {"ppo": 30, "grpo": 35}
    document = run(monkeypatch, "learning --seeds 1 --algorithms ppo --num-iterations 4")
    assert document["settings"]["num_iterations"] == {"ppo": 4}
