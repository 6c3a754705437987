"""Going on after a kill, a request to stop, a full disk or a fault: the same run as without it."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file

from algorithms import eval_gr00t, ppo_gr00t
from algorithms.common import resume
from algorithms.common.command_line import parse_args
from algorithms.common.resume import FREE_ARGS, checkpoints_in, generator_states, restore_generators
from examples.own_agent_in_ppo import MLPAgent
from gr00t_agent import Gr00tAgent
from tests import preloaded
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.line_trainer import command, logged, make_tiny_agent, train
from tests.preloaded import Program

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = ("ppo", "grpo")


def run_folder(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def start(algorithm: str, **changes: Any) -> Program:
    return preloaded.start(*command(algorithm, **changes), CUDA_VISIBLE_DEVICES="")


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
        options |= dict(imitation_coef=1.0, imitation_iterations=3, imitation_epochs=2)
        options |= fewer if algorithm == "ppo" else dict(max_rollouts=1, task_sampling="adaptive", baseline="alive")
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


def without_environments(algorithm: str, folder: Path, **changes: Any) -> str:
    """What a program prints whose environments cannot be made; it writes `kept` into a folder of that name."""
    program = (
        "import json, sys; from pathlib import Path; from tests.algorithms.line_trainer import train\n"
        "changes = json.loads(sys.argv[3])\n"
        "kept = changes.pop('kept', None)\n"
        "def no_envs(*inputs, **options):\n"
        "    if kept is not None:\n"
        "        (Path(kept) / 'kept').touch()\n"
        "    raise ArithmeticError('no environments')\n"
        "train(sys.argv[1], Path(sys.argv[2]), env=no_envs, log_with=('tensorboard',), **changes)"
    )
    process = preloaded.start("-c", program, algorithm, str(folder), json.dumps(changes))
    output, _ = process.communicate(timeout=150)
    assert "ArithmeticError: no environments" in output
    return output


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dsrl"])
def test_a_start_that_fails_leaves_its_name_to_the_corrected_command(tmp_path: Path, algorithm: str):
    run = tmp_path / f"{algorithm}_libero_spatial_1"
    told = f"{run} is removed: the run ended before anything was trained"
    assert told in without_environments(algorithm, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "is removed" not in without_environments(algorithm, tmp_path, kept=str(run))
    assert {path.name for path in run.iterdir()} == {".lock", "args.json", "environment.json", "kept", "logs"}


def test_what_was_there_before_is_not_removed(tmp_path: Path):
    train("ppo", tmp_path, num_iterations=1)
    run = run_folder(tmp_path)
    (run / "metrics.jsonl").unlink()
    before = set(run.rglob("*"))
    assert "is removed" not in without_environments("ppo", tmp_path, resume="auto")
    assert set(run.rglob("*")) >= before
    (tmp_path / "ppo_libero_spatial_1-2").mkdir()
    assert "ppo_libero_spatial_1-3 is removed" in without_environments("ppo", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {run.name, f"{run.name}-2"}


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


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dsrl"])
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


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dsrl"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_request_to_stop_saves_and_ends(tmp_path: Path, algorithm: str, number: int, status: int):
    process = start(algorithm, output_dir=str(tmp_path), env="slow", num_iterations=1000)
    wait_for(lambda: list(tmp_path.glob("*/metrics.jsonl")) or process.poll() is not None)
    process.send_signal(number)
    process.send_signal(number)  # as a launcher does that got it too
    output, _ = process.communicate(timeout=150)
    assert process.returncode == status, output
    run = run_folder(tmp_path)
    (saved,) = checkpoints_in(run)
    assert saved[0] == len(logged(run)) >= 1
    assert f"the state is in {saved[1]}" in output
    train(algorithm, tmp_path, resume=run, num_iterations=saved[0] + 1)
    assert len(logged(run)) == saved[0] + 1


def test_a_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resume.StopSignal, "_ECHO_S", 0.0)
    before = signal.getsignal(signal.SIGINT)  # ignored by what a shell has started in the background
    with resume.StopSignal(Accelerator(cpu=True)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            stop.check()
        assert caught.value.code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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
    told = f"the evaluation of {run / 'checkpoints' / 'iteration_2'} was interrupted and is not done again"
    assert told in capsys.readouterr().out


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


def test_files_that_do_not_fit_are_named_as_a_full_disk_is(tmp_path: Path):
    """The system refuses the file in the middle, whoever writes it; safetensors then raises an error of its own."""
    train("ppo", tmp_path, num_iterations=1)
    run = run_folder(tmp_path)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
        "from pathlib import Path; from tests.algorithms.line_trainer import train; "
        "train('ppo', Path(sys.argv[1]), num_iterations=2, resume='auto')"
    )
    process = preloaded.start("-c", limited, str(tmp_path))
    output, _ = process.communicate()
    assert process.returncode == 1
    assert "OSError: [Errno 27] File too large" in output
    newest = run / "checkpoints" / "iteration_1"
    assert f"iteration_2 was not written; the newest checkpoint is {newest}" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_1"]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.2, 0.9, 0.9, 0.5, 0.1, 0.3])
    monkeypatch.setattr("algorithms.ppo_gr00t.Args.score", lambda self, metrics: next(scores))
    train("ppo", tmp_path, num_iterations=6, save_interval=1, keep_last=2, keep_best=1)
    kept = [iteration for iteration, _ in checkpoints_in(run_folder(tmp_path))]
    assert kept == [3, 5, 6]
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        train("ppo", tmp_path, keep_last=0)


def test_a_stop_keeps_what_was_saved_and_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Breaks(LineVectorEnv):
        def step(self, actions: Any) -> Any:
            raise ZeroDivisionError

    monkeypatch.setattr("algorithms.ppo_gr00t.evaluate_into", lambda *inputs: 0.7)
    evaluation = dict(eval_interval=1, eval_episodes_per_task=1)
    train("ppo", tmp_path, num_iterations=2, save_interval=1, **evaluation)
    run = run_folder(tmp_path)
    state_file = run / "checkpoints" / "iteration_2" / resume.STATE_FOLDER / resume.STATE_FILE
    saved, inode = state_file.read_bytes(), state_file.stat().st_ino
    assert json.loads(saved)["score"] == logged(run)[-1]["eval/success_once"] == 0.7
    with pytest.raises(ZeroDivisionError) as caught:
        train("ppo", tmp_path, num_iterations=3, save_interval=1, resume=run, env=Breaks, **evaluation)
    assert f"the state before this rollout is in {state_file.parents[1]}" in " ".join(caught.value.__notes__)
    # What is there is whole and the same, so it is not replaced.
    assert (state_file.read_bytes(), state_file.stat().st_ino) == (saved, inode)


def test_without_evaluations_no_checkpoint_is_the_best(tmp_path: Path):
    """An iteration shorter than a horizon sees successes end first: its rate is no score."""
    train("ppo", tmp_path, num_iterations=3, save_interval=1, keep_last=1)
    assert [iteration for iteration, _ in checkpoints_in(run_folder(tmp_path))] == [3]


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


def test_the_end_names_commands_only_for_checkpoints_that_they_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train("ppo", tmp_path / "own", num_iterations=1)
    told = capsys.readouterr().out
    assert f"run folder   {run_folder(tmp_path / 'own')}" in told
    assert "next:" not in told
    train("ppo", tmp_path / "ours", make_agent=make_tiny_agent, num_iterations=1, num_steps=4, update_epochs=1)
    weights = run_folder(tmp_path / "ours") / "checkpoints" / "iteration_1"
    told = capsys.readouterr().out.partition("next:")[2]
    assert f"eval_gr00t.py --checkpoint {weights} --suite libero_spatial" in told
    assert f"ppo_gr00t.py --model {weights} --suite libero_spatial --num-action-chunks 2 --denoising-steps 4" in told


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_checkpoint_says_the_suite_that_it_was_trained_on(tmp_path: Path, algorithm: str):
    def make_agent(args: Any) -> Gr00tAgent:
        agent = make_tiny_agent(args)
        agent.trained_on = {"suite": "libero_spatial"}  # before
        return agent

    train(algorithm, tmp_path, make_agent=make_agent, suite="libero_goal", num_iterations=1)
    (folder,) = tmp_path.glob("*/checkpoints/iteration_1")
    assert Gr00tAgent.from_pretrained(folder).trained_on == {"suite": "libero_goal"}


def test_the_command_for_a_missing_evaluation_plays_what_training_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    args = replace(ppo_gr00t.PRESETS["demo"], eval_episodes_per_task=12)
    folder = tmp_path / "my runs" / "checkpoints" / "iteration_3"
    folder.mkdir(parents=True)
    own = f"the evaluation of {folder} was interrupted and is not done again"
    assert resume.missing_evaluation(folder, args) == own
    (folder / "noise_actor.json").write_text('{"base": null}')  # steers an agent of one's own
    assert resume.missing_evaluation(folder, args) == own
    (folder / "noise_actor.json").unlink()
    (folder / "policy_config.json").write_text('{"policy": {}}')
    told = resume.missing_evaluation(folder, args)
    assert told.startswith(f"{own}: `python algorithms/eval_gr00t.py ")
    _, *words = shlex.split(told.split("`")[1])
    monkeypatch.setattr("sys.argv", words)
    assert parse_args(eval_gr00t.Args, None) == eval_gr00t.Args(
        checkpoint=str(folder), suite=args.suite, task_ids=args.task_ids, horizon=args.horizon,
        episodes_per_task=12, steps_before_success=args.steps_before_success,
        num_near_goal_states=args.num_near_goal_states,
    )  # fmt: skip


def test_what_cannot_be_resumed_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to go on from"):
        train("ppo", tmp_path, resume=tmp_path / "nothing")
    train("ppo", tmp_path, save_interval=1)
    run = run_folder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot go on with other arguments: gamma=0.5 \(was 0.99\)"):
        train("ppo", tmp_path, resume=run, gamma=0.5)
    with pytest.raises(ValueError, match=r"cannot go on with other arguments: renderer='warp' \(was None\)"):
        train("ppo", tmp_path, resume=run, renderer="warp")
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


def make_tiny_of_another_backbone(args: Any) -> Gr00tAgent:
    agent = make_tiny_agent(args)
    frozen = next(p for p in agent.backbone.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1e-3
    return agent


def make_tiny_of_other_statistics(args: Any) -> Gr00tAgent:
    agent = make_tiny_agent(args)
    agent.preprocessor.metadata.statistics["state"]["x"]["q01"][0] += 1e-3
    return agent


def make_tiny_of_another_policy(args: Any) -> Gr00tAgent:
    agent = make_tiny_agent(args)
    agent.policy_parameters()[0].data.view(-1)[0] += 1e-3
    return agent


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "dsrl"])
@pytest.mark.parametrize(
    ("make_agent", "what"),
    [
        (make_tiny_of_another_backbone, "SHA-256 of the agent's frozen weights"),
        (make_tiny_of_other_statistics, "SHA-256 of the agent's statistics"),
    ],
)
def test_a_base_that_was_replaced_is_refused(tmp_path: Path, algorithm: str, make_agent: Any, what: str):
    options: dict[str, Any] = {} if algorithm == "dsrl" else dict(update_epochs=1)
    options |= dict(num_steps=4, minibatch_size=16, micro_batch_size=16) if algorithm == "ppo" else {}
    train(algorithm, tmp_path, num_iterations=1, make_agent=make_tiny_agent, **options)
    run = run_folder(tmp_path)
    message = (
        rf"iteration_1 cannot go on: {what} was '\w+' when its run began, and is '\w+' now; put back what was there"
    )
    with pytest.raises(ValueError, match=message):
        train(algorithm, tmp_path, num_iterations=2, resume=run, make_agent=make_agent, **options)
    train(algorithm, tmp_path, num_iterations=2, resume=run, make_agent=make_tiny_agent, **options)
    assert len(logged(run)) == 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trained_weights_of_the_base_count_where_the_start_is_kept(tmp_path: Path, algorithm: str):
    options: dict[str, Any] = dict(update_epochs=1)
    options |= dict(num_steps=4, minibatch_size=16, micro_batch_size=16) if algorithm == "ppo" else {}
    for kl_coef in (0.0, 0.1):
        options |= dict(kl_coef=kl_coef, run_name=f"run_{kl_coef}")
        train(algorithm, tmp_path, num_iterations=1, make_agent=make_tiny_agent, **options)
    options |= dict(num_iterations=2, resume="auto", make_agent=make_tiny_of_another_policy)
    with pytest.raises(ValueError, match="SHA-256 of the weights that training started from was"):
        train(algorithm, tmp_path, **options)
    # They are restored, and without a distance from the start nothing else is made of them.
    train(algorithm, tmp_path, **(options | dict(kl_coef=0.0, run_name="run_0.0")))
    assert len(logged(tmp_path / "run_0.0")) == 2


def test_a_checkpoint_of_an_earlier_version_goes_on_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train("ppo", tmp_path, num_iterations=1)
    (_, folder), *_ = checkpoints_in(run_folder(tmp_path))
    file = folder / resume.STATE_FOLDER / resume.STATE_FILE
    content = json.loads(file.read_text())
    del content["origin"]
    file.write_text(json.dumps(content))
    train("ppo", tmp_path, num_iterations=2, resume="auto")
    told = capsys.readouterr().out
    assert f"{folder} is of an earlier version, so this is not compared with the start: SHA-256 of the agent's" in told


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.json", "cut"), ("state.json", "emptied"), ("weights.safetensors", "cut"),
        ("optimizer.safetensors", None), ("envs.npz", "cut"), ("envs.npz", "emptied"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_checkpoint_is_named_with_what_to_go_on_from(tmp_path: Path, name: str, change: str | None):
    train("ppo", tmp_path, num_iterations=2, save_interval=1)
    run = run_folder(tmp_path)
    newest = run / "checkpoints" / "iteration_2"
    file = newest / resume.STATE_FOLDER / name
    content = file.read_bytes()
    if change is None:
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2 if change == "cut" else 0])
    told = (
        re.escape(f"{file} is damaged (") + r".+\); " + re.escape(f"remove {newest}: then --resume {run} goes on from")
    )
    with pytest.raises(ValueError, match=f"{told} iteration_1"):
        train("ppo", tmp_path, num_iterations=3, resume="auto")
    shutil.rmtree(run / "checkpoints" / "iteration_1")
    with pytest.raises(ValueError, match=f"remove {newest}: it is the run's only checkpoint, so start a new run"):
        train("ppo", tmp_path, num_iterations=3, resume=run)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_arguments_that_are_lost_are_named(tmp_path: Path, content: str | None):
    train("ppo", tmp_path, num_iterations=1)
    run = run_folder(tmp_path)
    (run / "args.json").unlink()
    if content is not None:
        (run / "args.json").write_text(content)
    for going_on in ("auto", run):
        with pytest.raises(
            ValueError, match=rf"{run}/args\.json .*; {run} cannot go on without its arguments: restore"
        ):
            train("ppo", tmp_path, num_iterations=2, resume=going_on)


def test_a_checkpoint_without_its_state_is_not_passed_over_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train("ppo", tmp_path, num_iterations=2, save_interval=1)
    run = run_folder(tmp_path)
    newest = run / "checkpoints" / "iteration_2"
    shutil.rmtree(newest / resume.STATE_FOLDER)
    train("ppo", tmp_path, num_iterations=2, resume="auto")
    told = capsys.readouterr().out
    assert (
        f"{newest} is passed over: training_state/state.json is gone from it; the run goes on from iteration_1" in told
    )
    assert [line["iteration"] for line in logged(run)] == [1, 2]
    for _, folder in checkpoints_in(run):
        shutil.rmtree(folder / resume.STATE_FOLDER)
    for going_on in ("auto", run):
        with pytest.raises(
            FileNotFoundError, match=r"state\.json is gone from iteration_1, iteration_2; put it back, or"
        ):
            train("ppo", tmp_path, num_iterations=3, resume=going_on)
    assert run_folder(tmp_path) == run


def test_auto_tells_of_a_run_that_was_copied_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train("ppo", tmp_path, run_name="a1", num_iterations=1)
    copy = tmp_path / "c1"
    shutil.copytree(tmp_path / "a1", copy)
    train("ppo", tmp_path, run_name="c1", num_iterations=1, resume="auto")
    told = f"no checkpoint of a run c1 in {tmp_path} ({copy} is of a run a1, by its args.json: --resume {copy} goes on"
    assert told in capsys.readouterr().out
    train("ppo", tmp_path, run_name="c1", num_iterations=2, resume=copy)
    assert len(logged(copy)) == 2


def test_the_documentation_names_what_may_change():
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    told = page.partition("These may\n  change, and so may the number of processes: ")[2].partition(". So may")[0]
    assert {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)`", told)} == FREE_ARGS


def test_auto_begins_a_new_run_if_there_is_none_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train("ppo", tmp_path, resume="auto", num_iterations=1)
    assert "--resume auto: no checkpoint of a run ppo_libero_spatial_1" in capsys.readouterr().out
    train("ppo", tmp_path, num_iterations=2)
    train("ppo", tmp_path, resume="auto", num_iterations=3)
    assert len(logged(tmp_path / "ppo_libero_spatial_1")) == 1
    assert len(logged(tmp_path / "ppo_libero_spatial_1-2")) == 3


def test_auto_takes_a_name_as_it_is_written(tmp_path: Path):
    """Neither as a pattern nor as that of another run's second."""
    for name in ("exp1", "exp[1]", "exp*", "demo-2", "demo_1"):
        train("ppo", tmp_path, run_name=name, num_iterations=1)
    for name in ("exp[1]", "exp*", "demo", "demo-2"):
        train("ppo", tmp_path, run_name=name, num_iterations=2, resume="auto")
    done = {path.name: len(logged(path)) for path in tmp_path.iterdir()}
    # What is called demo-2 is not the second demo, but it takes its number.
    assert done == {"exp1": 1, "exp[1]": 2, "exp*": 2, "demo-2": 2, "demo_1": 1, "demo-3": 2}
    train("ppo", tmp_path, run_name="demo", num_iterations=3, resume="auto")
    assert len(logged(tmp_path / "demo-3")) == 3


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/tmp/x", "{nothing}", "{0}", "{"])
def test_a_name_that_is_none_of_a_folder_is_refused(tmp_path: Path, name: str):
    for going_on in (None, "auto"):
        with pytest.raises(ValueError, match="run_name="):
            train("ppo", tmp_path / "runs", run_name=name, resume=going_on)
    assert not list(tmp_path.rglob("*"))


def test_two_processes_do_not_work_on_one_run(tmp_path: Path):
    process = start("ppo", output_dir=str(tmp_path), env="slow", num_iterations=1000, save_interval=1)
    wait_for(lambda: list(tmp_path.glob("*/checkpoints/iteration_1")) or process.poll() is not None)
    run = run_folder(tmp_path)
    for going_on in ("auto", run):
        with pytest.raises(RuntimeError, match=rf"{run} is in use by process {process.pid} on .*; wait for its end"):
            train("ppo", tmp_path, num_iterations=1000, resume=going_on)
    assert json.loads((run / "args.json").read_text())["save_interval"] == 1
    process.kill()
    process.communicate()
    done = checkpoints_in(run)[-1][0]
    train("ppo", tmp_path, num_iterations=done + 1, resume=run)
    assert len(logged(run)) == done + 1


def test_a_critic_that_warms_up_is_resumed(tmp_path: Path):
    """The policy has not moved yet, and its moments go on where they were."""
    options: dict[str, Any] = dict(critic_warmup_iterations=2)
    train("ppo", tmp_path / "whole", num_iterations=4, **options)
    train("ppo", tmp_path / "parts", num_iterations=4, save_interval=1, keep_last=4, **options)
    checkpoints = run_folder(tmp_path / "parts") / "checkpoints"
    for iteration in (2, 3, 4):
        shutil.rmtree(checkpoints / f"iteration_{iteration}")
    state = checkpoints / "iteration_1" / resume.STATE_FOLDER
    saved = load_file(state / "optimizer.safetensors")
    assert {name.partition(".")[0].partition("/")[0] for name in saved} == {"actor", "critic", "log_std"}
    assert saved["log_std/exp_avg"].abs().max() > 0
    train("ppo", tmp_path / "parts", num_iterations=4, resume="auto", **options)
    assert logged(run_folder(tmp_path / "parts")) == logged(run_folder(tmp_path / "whole"))


def test_stopped_before_the_first_update_it_is_the_same_run(tmp_path: Path):
    """Nothing that saving does, such as asking the optimiser for its state, counts as a step."""

    class Breaks(LineVectorEnv):
        def step(self, actions: Any) -> Any:
            if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:  # not in an evaluation
                raise ZeroDivisionError
            return super().step(actions)

    options: dict[str, Any] = dict(task_ids=(0,), eval_before=True, eval_episodes_per_task=1)
    with pytest.raises(ZeroDivisionError):
        train("ppo", tmp_path / "parts", env=Breaks, **options)
    assert [done for done, _ in checkpoints_in(run_folder(tmp_path / "parts"))] == [0]
    train("ppo", tmp_path / "parts", resume="auto", **options)
    train("ppo", tmp_path / "whole", **options)
    assert [line["iteration"] for line in logged(run_folder(tmp_path / "parts"))] == [0, 1, 2]
    assert logged(run_folder(tmp_path / "parts")) == logged(run_folder(tmp_path / "whole"))


def test_without_environment_states_new_episodes_begin_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Stateless(LineVectorEnv):
        set_state = property()  # as if it were not there

    train("ppo", tmp_path, env=Stateless, num_iterations=1)
    train("ppo", tmp_path, env=Stateless, num_iterations=2, resume="auto")
    assert "holds no environment states: new episodes begin" in capsys.readouterr().out
    assert len(logged(run_folder(tmp_path))) == 2
