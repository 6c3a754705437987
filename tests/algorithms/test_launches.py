"""Several processes that are launched wrongly, fall silent, or lose their launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from algorithms.common.resume import checkpoints_in
from tests import preloaded
from tests.algorithms import sft_trainer
from tests.algorithms.line_trainer import command, logged, train
from tests.gr00t_agent.lerobot_data import write_dataset
from tests.preloaded import Program

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# A process among two that trains by PPO; lines of the program may change what it does.
RANK = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from datetime import timedelta
from algorithms import ppo_gr00t
from algorithms.common import processes, watch
from tests.algorithms.line_trainer import SlowLineEnv, train
rank = int(os.environ["RANK"])
options = json.loads(sys.argv[1])
there = Path(options["output_dir"]).with_name("there")
{changes}
train("ppo", Path(options.pop("output_dir")), env=SlowLineEnv, **options)
"""


def environment(**variables: str) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | threads | variables


def start(program: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program], cwd=ROOT, env=environment(**variables), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_two(folder: Path, changes: str, **options: Any) -> list[Program]:
    program = ["-c", RANK.format(changes=changes), json.dumps(options | dict(output_dir=str(folder)))]
    return preloaded.start_two(*program, CUDA_VISIBLE_DEVICES="")


def ended(process: Any, seconds: float = 150) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()[0]) from None


def wait_for(condition: Any, *needed: Any, seconds: float = 150) -> None:
    deadline = time.perf_counter() + seconds
    while not condition():
        for process in needed:
            assert process.poll() is None, process.communicate()[0]
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_gradients_are_not_divided_by_a_variable_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = train("ppo", tmp_path, num_iterations=1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=4 would divide every gradient by 4; unset"):
        train("ppo", tmp_path, num_iterations=1)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert train("ppo", tmp_path, num_iterations=1)["actor/grad_norm"] == whole["actor/grad_norm"]


def test_two_processes_that_know_nothing_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `torchrun` makes them on a CPU without ACCELERATE_USE_CPU."""
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes were launched, but Accelerate runs 1 here"):
        train("ppo", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_processes_with_different_arguments_are_refused(tmp_path: Path):
    both = start_two(tmp_path / "runs", "options['seed'] = 1 + rank; options['kl_coef'] = 0.1 * rank")
    for process in both:
        output = ended(process)
        assert process.returncode == 1
        assert (
            "process 1 has other arguments than process 0: kl_coef=0.1 (process 0: 0.0), seed=2 (process 0: 1)"
            in output
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_stopped_process_is_named_and_does_not_hold_the_other(tmp_path: Path):
    both = start_two(tmp_path, "watch.BEAT_S, watch.SILENCE_S = 0.5, 4.0", num_iterations=1000, save_interval=1)
    wait_for(lambda: list(tmp_path.glob("*/checkpoints/iteration_1")), *both)
    both[1].send_signal(signal.SIGSTOP)
    output = ended(both[0])
    assert both[0].returncode == os.EX_UNAVAILABLE
    name = re.escape(f"process 1 (pid {both[1].pid} on ")
    assert re.search(name + r".*\) has not been heard of for 4 s: it is stopped or cut off", output)
    both[1].kill()
    ended(both[1])


@pytest.mark.slow
def test_work_of_one_process_may_last_longer_than_a_collective_operation(tmp_path: Path):
    changes = (
        "processes.COLLECTIVE_TIMEOUT = timedelta(seconds=5)\n"
        "ppo_gr00t.evaluate_into = lambda *inputs: (time.sleep(7.5), 0.5)[1]"
    )
    both = start_two(tmp_path, changes, num_iterations=1, eval_episodes_per_task=1)
    outputs = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (run,) = tmp_path.iterdir()
    assert logged(run)[0]["eval/success_once"] == 0.5


@pytest.mark.slow
def test_processes_end_with_their_launcher_and_save(tmp_path: Path):
    """In fine-tuning, where they must end after the same step."""
    write_dataset(tmp_path / "data", "v3.0", "image", lengths=(3, 3))
    program = sft_trainer.command(tmp_path, tmp_path / "data", num_steps=10_000)
    launcher = start([*TORCHRUN, *program], ACCELERATE_USE_CPU="true")
    wait_for(lambda: list(tmp_path.glob("run/metrics.jsonl")), launcher)
    workers = children_of(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    wait_for(lambda: not any(is_alive(worker) for worker in workers))
    done, saved = checkpoints_in(tmp_path / "run")[-1]
    output = ended(launcher)
    assert output.count(f"stopped; the state is in {saved}") == 1
    assert "Traceback" not in output
    assert done == len(logged(tmp_path / "run"))


@pytest.mark.slow
def test_a_request_to_stop_reaches_through_accelerate_launch(tmp_path: Path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    program = command("ppo", output_dir=str(tmp_path), env="slow", num_iterations=1000)
    launcher = start([*launch, *settings, *program])
    wait_for(lambda: list(tmp_path.glob("*/metrics.jsonl")), launcher)
    (worker,) = children_of(launcher.pid)
    launcher.terminate()
    wait_for(lambda: not is_alive(worker))
    (run,) = tmp_path.iterdir()
    assert f"the state is in {checkpoints_in(run)[-1][1]}" in ended(launcher)


# What makes the process that is asked to stop wait for the other one, or be waited for, where it says so by a file.
WHERE = {
    "in its update": """
loss = ppo_gr00t.policy_loss
def policy_loss(*inputs):
    if rank == {rank}:
        there.touch()
    time.sleep(0.05)
    return loss(*inputs)
ppo_gr00t.policy_loss = policy_loss
""",
    "waiting for the other one's rollout": """
if rank != {rank}:
    SlowLineEnv.step = lambda self, actions, step=SlowLineEnv.step: (time.sleep(1), step(self, actions))[1]
else:
    together = StopSignal.check_together
    def check_together(self):
        there.touch()
        together(self)
    StopSignal.check_together = check_together
""",
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", WHERE)
def test_a_request_to_stop_one_process_saves_and_ends_both(tmp_path: Path, where: str, rank: int):
    changes = "from algorithms.common.resume import StopSignal\n" + WHERE[where].format(rank=rank)
    both = start_two(tmp_path / "runs", changes, num_iterations=1000, num_steps=32)
    wait_for((tmp_path / "there").exists, *both)
    both[rank].terminate()
    started = time.perf_counter()
    outputs = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert time.perf_counter() - started < 15  # a rollout of the slower process is longer
    (run,) = (tmp_path / "runs").iterdir()
    ((done, saved),) = checkpoints_in(run)
    lines = logged(run) if (run / "metrics.jsonl").exists() else []
    assert done == len(lines) == (1 if where == "in its update" else 0)
    assert "".join(outputs).count(f"stopped; the state is in {saved}") == 1


@pytest.mark.parametrize("algorithm", ["grpo", "dsrl", "sft"])
def test_a_request_to_stop_the_second_process_saves_and_ends_both(tmp_path: Path, algorithm: str):
    if algorithm == "sft":
        write_dataset(tmp_path / "data", "v3.0", "image", lengths=(3, 3))
        program = sft_trainer.command(tmp_path / "runs", tmp_path / "data", num_steps=10_000)
    else:
        program = command(algorithm, output_dir=str(tmp_path / "runs"), env="slow", num_iterations=1000)
    both = preloaded.start_two(*program, CUDA_VISIBLE_DEVICES="")
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")), *both)
    both[1].terminate()
    outputs = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (run,) = [path.parent for path in tmp_path.glob("runs/*/metrics.jsonl")]
    done, saved = checkpoints_in(run)[-1]
    assert done == len(logged(run)) >= 1
    assert outputs[0].count(f"stopped; the state is in {saved}") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_during_an_evaluation_ends_both(tmp_path: Path, rank: int):
    changes = """
import numpy as np
def evaluate(folder, iteration, agent, make_envs, args):
    envs = make_envs(2)
    envs.reset(seed=0)
    there.touch()
    while True:
        envs.step(np.zeros((2, 2, 7), np.float32))
ppo_gr00t.evaluate_into = evaluate
"""
    both = start_two(tmp_path / "runs", changes, num_iterations=3, eval_interval=1, eval_episodes_per_task=1)
    wait_for((tmp_path / "there").exists, *both)
    both[rank].terminate()
    outputs = [ended(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (run,) = (tmp_path / "runs").iterdir()
    assert [done for done, _ in checkpoints_in(run)] == [len(logged(run))] == [1]
