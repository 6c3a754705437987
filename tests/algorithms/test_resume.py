"""Going on after a kill, a request to stop, a full disk or a fault: the same run as without it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from algorithms import ppo_gr00t
from algorithms.common import resume
from algorithms.common.resume import checkpoints_in, generator_states, restore_generators
from gr00t_agent import Gr00tAgent
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import command, logged, make_tiny_agent, train
from tests.algorithms.mlp_agent import MLPAgent

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = ("ppo", "grpo")


def run_folder(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def start(algorithm: str, **changes: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command(algorithm, **changes)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition: Any, seconds: float = 150) -> None:
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("make_agent", [None, make_tiny_agent])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, algorithm: str, make_agent: Any):
    options: dict[str, Any] = dict(update_epochs=1, lr_schedule="adaptive", target_kl=0.01)
    if make_agent is not None:
        options |= dict(make_agent=make_agent, kl_coef=0.1, num_envs=8)
        fewer = dict(num_steps=4, minibatch_size=16, micro_batch_size=16)
        options |= fewer if algorithm == "ppo" else dict(max_rollouts=1)
    train(algorithm, tmp_path / "whole", num_iterations=4, **options)
    train(algorithm, tmp_path / "parts", num_iterations=2, **options)
    train(algorithm, tmp_path / "parts", num_iterations=4, resume="auto", **options)
    whole, parts = run_folder(tmp_path / "whole"), run_folder(tmp_path / "parts")
    assert logged(parts) == logged(whole)
    weights = [load_file(run / "checkpoints" / "iteration_4" / "model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_libero_episodes_go_on_where_they_were(tmp_path: Path):
    """Two environments in the middle of an episode, their physics, their images and the policy's features."""
    args = ppo_gr00t.Args(
        model="nano", num_envs=2, num_steps=3, num_iterations=2, horizon=40, minibatch_size=6, micro_batch_size=6,
        update_epochs=1, eval_episodes_per_task=0, save_interval=1, log_with=(), output_dir=tmp_path / "whole",
    )  # fmt: skip
    ppo_gr00t.main(args)
    ppo_gr00t.main(replace(args, output_dir=tmp_path / "parts", num_iterations=1))
    ppo_gr00t.main(replace(args, output_dir=tmp_path / "parts", resume=Path("auto")))
    assert logged(run_folder(tmp_path / "parts")) == logged(run_folder(tmp_path / "whole"))


def test_whoever_uses_global_random_numbers_is_resumed_too(tmp_path: Path):
    class Global(MLPAgent):
        def forward(self, obs: Any, action: Any = None, *, generator: Any = None) -> Any:
            if action is None:
                noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
                generator = [torch.Generator().manual_seed(int(1e6 * noise)) for _ in generator]
            return super().forward(obs, action, generator=generator)

    options = dict(make_agent=lambda args: Global(("state.x",), 1, 2))
    train("ppo", tmp_path / "whole", num_iterations=3, **options)
    train("ppo", tmp_path / "parts", num_iterations=1, **options)
    random.seed(99)
    torch.manual_seed(99)
    train("ppo", tmp_path / "parts", num_iterations=3, resume="auto", **options)
    assert logged(run_folder(tmp_path / "parts")) == logged(run_folder(tmp_path / "whole"))


def test_generator_states_survive_json():
    states = json.loads(json.dumps(generator_states()))
    drawn = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(3)]  # noqa: NPY002
    restore_generators(states)
    again = [(random.random(), np.random.rand(), torch.rand(()).item()) for _ in range(3)]  # noqa: NPY002
    assert again == drawn


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tmp_path: Path, algorithm: str):
    options = dict(num_iterations=5, save_interval=1, keep_last=2)
    train(algorithm, tmp_path / "whole", **options)
    changes = options | dict(output_dir=str(tmp_path / "killed"), env="slow")
    process = start(algorithm, **changes)
    wait_for(lambda: list((tmp_path / "killed").glob("*/checkpoints/iteration_2")) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]
    time.sleep(random.SystemRandom().uniform(0, 0.5))
    process.kill()
    process.communicate()
    run = run_folder(tmp_path / "killed")
    assert len(logged(run)) < 5
    train(algorithm, tmp_path / "killed", resume="auto", **options)
    assert logged(run) == logged(run_folder(tmp_path / "whole"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sigterm_saves_and_ends_with_status_0(tmp_path: Path, algorithm: str):
    process = start(algorithm, output_dir=str(tmp_path), env="slow", num_iterations=1000)
    wait_for(lambda: list(tmp_path.glob("*/metrics.jsonl")) or process.poll() is not None)
    process.terminate()
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    run = run_folder(tmp_path)
    (saved,) = checkpoints_in(run)
    assert saved[0] == len(logged(run)) >= 1
    assert f"the state is in {saved[1]}" in output
    train(algorithm, tmp_path, resume=run, num_iterations=saved[0] + 1)
    assert len(logged(run)) == saved[0] + 1


def test_sigterm_during_an_evaluation_keeps_the_iteration_and_the_continuation_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def evaluate(folder: Path, iteration: int, agent: Any, make_envs: Any, args: Any) -> float:
        envs = make_envs(2)
        envs.reset(seed=0)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            envs.step(np.zeros((2, 2, 7), np.float32))

    monkeypatch.setattr("algorithms.ppo_gr00t.evaluate_into", evaluate)
    with pytest.raises(SystemExit) as caught:
        train("ppo", tmp_path, num_iterations=5, eval_interval=2, eval_episodes_per_task=1)
    assert caught.value.code == 0
    run = run_folder(tmp_path)
    assert [line["iteration"] for line in logged(run)] == [1, 2]
    assert [iteration for iteration, _ in checkpoints_in(run)] == [2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train("ppo", tmp_path, num_iterations=2, resume="auto", eval_interval=2, eval_episodes_per_task=1)
    assert "the evaluation of" in (told := capsys.readouterr().out)
    assert f"--checkpoint {run / 'checkpoints' / 'iteration_2'}` does it" in told


@pytest.mark.parametrize("failing", ["save_file", "np.savez", "write_json"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    train("ppo", tmp_path, num_iterations=1)
    run = run_folder(tmp_path)

    def full(*inputs: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"algorithms.common.resume.{failing}", full)
        with pytest.raises(OSError, match="No space left") as caught:
            train("ppo", tmp_path, num_iterations=2, resume=run)
    assert f"the newest checkpoint is {run / 'checkpoints' / 'iteration_1'}" in " ".join(caught.value.__notes__)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_1"]
    train("ppo", tmp_path, num_iterations=3, resume=run)
    train("ppo", tmp_path / "whole", num_iterations=3)
    assert logged(run) == logged(run_folder(tmp_path / "whole"))


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.2, 0.9, 0.9, 0.5, 0.1, 0.3])
    monkeypatch.setattr("algorithms.ppo_gr00t.Args.score", lambda self, metrics: next(scores))
    train("ppo", tmp_path, num_iterations=6, save_interval=1, keep_last=2, keep_best=1)
    kept = [iteration for iteration, _ in checkpoints_in(run_folder(tmp_path))]
    assert kept == [3, 5, 6]
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        train("ppo", tmp_path, keep_last=0)


def test_a_stop_keeps_what_was_saved_and_its_score(tmp_path: Path):
    class Breaks(LineVectorEnv):
        def step(self, actions: Any) -> Any:
            raise ZeroDivisionError

    train("ppo", tmp_path, num_iterations=2, save_interval=1)
    run = run_folder(tmp_path)
    state_file = run / "checkpoints" / "iteration_2" / resume.STATE_FOLDER / resume.STATE_FILE
    saved, inode = state_file.read_bytes(), state_file.stat().st_ino
    assert json.loads(saved)["score"] == logged(run)[-1]["env/success_once"]
    with pytest.raises(ZeroDivisionError) as caught:
        train("ppo", tmp_path, num_iterations=3, save_interval=1, resume=run, env=Breaks)
    assert f"the state before this rollout is in {state_file.parents[1]}" in " ".join(caught.value.__notes__)
    # What is there is whole and the same, so it is not replaced.
    assert (state_file.read_bytes(), state_file.stat().st_ino) == (saved, inode)


def test_evaluated_iterations_are_saved_while_the_best_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.9, 0.1, 0.2])
    monkeypatch.setattr("algorithms.ppo_gr00t.evaluate_into", lambda *inputs: next(scores))
    train("ppo", tmp_path, num_iterations=6, save_interval=0, keep_last=1, eval_interval=2, eval_episodes_per_task=1)
    assert [iteration for iteration, _ in checkpoints_in(run_folder(tmp_path))] == [2, 6]


def test_a_checkpoint_is_what_from_pretrained_loads(tmp_path: Path):
    train("ppo", tmp_path, make_agent=make_tiny_agent, num_iterations=1, num_steps=4, update_epochs=1)
    folder = run_folder(tmp_path) / "checkpoints" / "iteration_1"
    agent = Gr00tAgent.from_pretrained(folder)
    trained = load_file(folder / resume.STATE_FOLDER / "weights.safetensors")
    assert any(name.startswith("action_head") for name in trained)
    assert not any(name.startswith("backbone") and name in dict(agent.named_parameters()) for name in trained)
    assert all(torch.equal(agent.state_dict()[name], value) for name, value in trained.items())


def test_what_cannot_be_resumed_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to go on from"):
        train("ppo", tmp_path, resume=tmp_path / "nothing")
    train("ppo", tmp_path, save_interval=1)
    run = run_folder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot go on with other arguments: gamma=0.5 \(was 0.99\)"):
        train("ppo", tmp_path, resume=run, gamma=0.5)
    with pytest.raises(ValueError, match="iteration_1 is not the newest checkpoint of its run"):
        train("ppo", tmp_path, resume=run / "checkpoints" / "iteration_1")
    with pytest.raises(ValueError, match="is of another network"):
        train("ppo", tmp_path, resume=run, make_agent=lambda args: MLPAgent(("state.x", "state.y"), 2, 2))
    with pytest.raises(ValueError, match=r"num_iterations=1, but .* has done 2: give 2 or more"):
        train("ppo", tmp_path, resume=run, num_iterations=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "env/succ')  # as a full disk leaves it
    train("ppo", tmp_path, resume=run / "checkpoints" / "iteration_2", num_iterations=3)
    assert [line["iteration"] for line in logged(run)] == [1, 2, 3]
    assert json.loads((run / "args.json").read_text())["num_iterations"] == 3


def test_auto_begins_a_new_run_if_there_is_none_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train("ppo", tmp_path, resume="auto", num_iterations=1)
    assert "--resume auto: no checkpoint of a run ppo_libero_spatial_1" in capsys.readouterr().out
    train("ppo", tmp_path, num_iterations=2)
    train("ppo", tmp_path, resume="auto", num_iterations=3)
    assert len(logged(tmp_path / "ppo_libero_spatial_1")) == 1
    assert len(logged(tmp_path / "ppo_libero_spatial_1-2")) == 3


def test_without_environment_states_new_episodes_begin_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Stateless(LineVectorEnv):
        set_state = property()  # as if it were not there

    train("ppo", tmp_path, env=Stateless, num_iterations=1)
    train("ppo", tmp_path, env=Stateless, num_iterations=2, resume="auto")
    assert "holds no environment states: new episodes begin" in capsys.readouterr().out
    assert len(logged(run_folder(tmp_path))) == 2
