"""Two processes give what one gives at the same global sizes, and only the main one writes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gr00t_agent import Gr00tAgent
from tests import preloaded
from tests.algorithms.line_trainer import command, logged, make_tiny_agent, train

ROOT = Path(__file__).resolve().parents[2]
# Adam with a small epsilon turns what rounding leaves of a gradient of 0 into whole steps of either sign.
OPTIONS: dict[str, Any] = dict(
    num_iterations=2, learning_rate=1e-3, loss_weighting="trajectory", kl_coef=0.1, ent_coef=0.001, update_epochs=1,
    adam_eps=1e-5,
)  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "ppo": dict(num_steps=8, minibatch_size=32, micro_batch_size=16, value_learning_rate=1e-3, pipeline_stage_num=2),
    "grpo": dict(max_rollouts=2, micro_batch_size=16, imitation_coef=1.0, task_sampling="adaptive", baseline="alive"),
}

# A process of a group of one, in which no thread gets the interpreter's lock from one that does not wait itself.
ENDING = """
import atexit, sys
from pathlib import Path
from types import SimpleNamespace
from torch import distributed, nn
from algorithms.common.run import RunFolder
from tests import preloaded
from tests.algorithms.line_trainer import print_gloo_threads

def main():
    distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
    cycle = [nn.parallel.DistributedDataParallel(nn.Linear(1, 1))]
    cycle.append(cycle)
    print_gloo_threads()
    sys.setswitchinterval(1000)
    distributed.barrier()
    accelerator = SimpleNamespace(is_main_process=False, end_training=distributed.destroy_process_group)
    RunFolder(Path(), accelerator).finish()

atexit.register(print_gloo_threads)
main()
"""


def output_of(*processes: Any) -> str:
    """What programs wrote that have ended well."""
    try:
        output = "".join(process.communicate(timeout=240)[0] for process in processes)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        raise AssertionError("".join(process.communicate()[0] for process in processes)) from None
    assert [process.returncode for process in processes] == [0] * len(processes), output
    return output


def run_two(algorithm: str, **changes: Any) -> str:
    output = output_of(*preloaded.start_two(*command(algorithm, **changes), CUDA_VISIBLE_DEVICES=""))
    assert output.count("Gloo threads: 0") == 2, output
    return output


def launch_two(algorithm: str, **changes: Any) -> str:
    """What `run_two` does, by PyTorch's launcher and in processes that import everything anew."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, *launcher, *command(algorithm, **changes)], cwd=ROOT, env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = output_of(process)
    assert output.count("Gloo threads: 0") == 2, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "agent"), [("ppo", "tiny"), ("grpo", "tiny")])
def test_two_processes_equal_one(tmp_path: Path, algorithm: str, agent: str):
    options = OPTIONS | SIZES[algorithm]
    # The noise's own weights have no gradient from imitation alone.
    options |= dict(imitation_coef=1.0, imitation_iterations=1, imitation_epochs=1, noise_method="reinflow")
    if algorithm == "ppo":  # the second iteration, then, has one minibatch
        options |= dict(update_fraction=0.5)
    train(algorithm, tmp_path / "one", make_agent=make_tiny_agent, **options)
    output = run_two(algorithm, agent=agent, output_dir=str(tmp_path / "two"), **options)
    assert output.count("iteration 2/2") == output.count("checkpoint   ") == 1
    name = f"{algorithm}_libero_spatial_1"
    runs = [tmp_path / number / name for number in ("one", "two")]
    lines = [logged(run) for run in runs]
    assert len(lines[0]) == len(lines[1]) == 2
    for single, double in zip(*lines, strict=True):
        assert double == pytest.approx(single, rel=1e-5, abs=1e-5)
    weights = [load_file(run / "checkpoints" / "iteration_2" / "model.safetensors") for run in runs]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-5)
    assert [path.name for path in (tmp_path / "two").iterdir()] == [name]


@pytest.mark.slow
def test_sharded_weights_train_save_and_resume_as_whole_ones(tmp_path: Path):
    """FSDP2 with Gloo: every process holds half of each weight, gradient and optimiser moment."""
    options = OPTIONS | SIZES["ppo"] | dict(num_iterations=1, num_steps=4, minibatch_size=16, micro_batch_size=8)
    sharded = dict(agent="tiny", output_dir=str(tmp_path / "sharded"), sharded=True)
    assert run_two("ppo", **options, **sharded).count("checkpoint   ") == 1
    options |= dict(num_iterations=2)
    run_two("ppo", **options, **sharded, resume="auto")
    train("ppo", tmp_path / "whole", make_agent=make_tiny_agent, **options)
    runs = [tmp_path / name / "ppo_libero_spatial_1" for name in ("sharded", "whole")]
    lines = [logged(run) for run in runs]
    assert len(lines[0]) == len(lines[1]) == 2
    for double, single in zip(*lines, strict=True):
        assert double == pytest.approx(single, rel=1e-4, abs=1e-4)
    agents = [Gr00tAgent.from_pretrained(run / "checkpoints" / "iteration_2") for run in runs]
    for name, value in agents[0].state_dict().items():
        torch.testing.assert_close(value, agents[1].state_dict()[name], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path: Path):
    options = OPTIONS | SIZES["ppo"]
    launch_two("ppo", output_dir=str(tmp_path / "parts"), **options)
    train("ppo", tmp_path / "parts", resume="auto", **(options | dict(num_iterations=4)))
    train("ppo", tmp_path / "whole", **(options | dict(num_iterations=4)))
    parts, whole = (logged(tmp_path / folder / "ppo_libero_spatial_1") for folder in ("parts", "whole"))
    assert len(parts) == len(whole) == 4
    for a, b in zip(parts, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_a_process_group_ends_before_the_interpreter(tmp_path: Path):
    before, after = output_of(preloaded.start("-c", ENDING, str(tmp_path / "store"))).splitlines()
    assert before != "Gloo threads: 0"
    assert after == "Gloo threads: 0"


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_bfloat16_keeps_first_ratios_at_one_and_weights_in_float32(tmp_path: Path, algorithm: str):
    options = dict(agent="tiny", output_dir=str(tmp_path), num_iterations=1, update_epochs=1)
    variables = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": ""}
    output_of(preloaded.start(*command(algorithm, **options), **variables))
    (folder,) = tmp_path.iterdir()
    (line,) = logged(folder)
    assert line["actor/ratio_first_minibatch_max_dev"] < 1e-3
    assert line["actor/loss"] != 0
    weights = load_file(folder / "checkpoints" / "iteration_1" / "model.safetensors")
    assert {value.dtype for name, value in weights.items() if name.startswith("action_head")} == {torch.float32}
