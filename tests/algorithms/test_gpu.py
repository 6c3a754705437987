"""The trainers on CUDA devices: pinned memory, bfloat16, NCCL, and weights sharded as `accelerate launch` does it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms.common.features import FeatureStore
from algorithms.common.placement import Place
from algorithms.common.presets import SPATIAL_START
from algorithms.common.resume import checkpoints_in
from benchmarks.policy import make_observation
from examples.own_agent_in_ppo import STATE_DIM, STATE_KEYS, MLPAgent
from gr00t_agent import Gr00tAgent, check_agent
from tests.algorithms.line_trainer import command, logged, make_tiny_agent, train
from tests.algorithms.test_launches import TORCHRUN, children_of, ended, wait_for

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "ppo": dict(num_iterations=2, num_steps=4, minibatch_size=16, micro_batch_size=8, update_epochs=2, kl_coef=0.1),
    "grpo": dict(num_iterations=2, max_rollouts=2, micro_batch_size=16, update_epochs=1),
    "dsrl": dict(num_iterations=2, num_updates=2),
}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class GpuRole:
    """A process of a cluster that says on which GPU it computes."""

    def __init__(self, place: Place, bell: Any) -> None:
        self.sum = torch.ones(2, device="cuda").sum()

    def uuid(self) -> str:
        return str(torch.cuda.get_device_properties(self.sum.device).uuid)


def launch(num_processes: int, *launcher_arguments: str, algorithm: str = "ppo", **changes: Any) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    launcher += ["--num_processes", str(num_processes), *launcher_arguments]
    launcher += [] if num_processes == 1 else ["--multi_gpu"] if "--use_fsdp" not in launcher else []
    program = [sys.executable, *launcher, *command(algorithm, **changes)]
    result = subprocess.run(program, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


@pytest.mark.parametrize("placement", ["device", "host", "mixed"])
def test_rows_come_back_from_pinned_memory(placement: Any):
    def encode(obs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"features": obs["x"].cuda().half()[:, None].expand(-1, 1000)}

    store = FeatureStore(encode, torch.device("cuda"), placement, 700 * 2000 / 1e9)
    rows = [store.put(obs, encode(obs)) for obs in ({"x": torch.arange(i, i + 300.0)} for i in range(0, 2100, 300))]
    order = torch.randperm(2100)
    got = store.get(torch.tensor([row for part in rows for row in part.tolist()])[order].numpy())
    assert got["features"].is_cuda
    assert torch.equal(got["features"][:, 7].cpu(), order.half())


def test_the_example_of_an_own_agent_works_on_a_gpu():
    check_agent(MLPAgent(STATE_KEYS, STATE_DIM, 5).cuda(), make_observation(3, 8))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dsrl"])
def test_one_gpu_gives_what_a_cpu_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else patches are embedded to 3 digits
    # Gradients that are nothing but rounding stay small steps; with 1e-8 Adam makes whole ones of them.
    options = SMALL[algorithm] | ({} if algorithm == "dsrl" else {"adam_eps": 1e-5})
    train(algorithm, tmp_path / "gpu", make_agent=make_tiny_agent, **options)
    launch(1, "--cpu", algorithm=algorithm, agent="tiny", output_dir=str(tmp_path / "cpu"), **options)
    on_gpu, on_cpu = (logged(next((tmp_path / name).iterdir())) for name in ("gpu", "cpu"))
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert gpu == pytest.approx(cpu, rel=0.01, abs=0.01)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("storage", ["mixed", "host", "none"])
def test_bfloat16_keeps_the_first_ratios_at_one(tmp_path: Path, algorithm: str, storage: str):
    options = SMALL[algorithm] | dict(agent="tiny", output_dir=str(tmp_path), feature_storage=storage)
    launch(1, "--mixed_precision", "bf16", algorithm=algorithm, feature_memory_gb=5e-5, **options)
    (run,) = tmp_path.iterdir()
    deviations = [line["actor/ratio_first_minibatch_max_dev"] for line in logged(run)]
    print(f"{algorithm} {storage}: ratios off 1 by {deviations}")
    assert max(deviations) < 0.05


@pytest.mark.filterwarnings("default")  # PyTorch's compiler imports modules of its own that warn
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_networks_agree_and_features_outlive_later_calls(mode: str | None):
    agent = Gr00tAgent.load(SPATIAL_START).cuda().eval()
    observations = [make_observation(3, agent.image_size) for _ in range(2)]
    observations[1]["video.image"] = observations[1]["video.image"][::-1].copy()
    noise = torch.randn(3, 16, agent.config.action_head.action_dim)

    def decide() -> list[torch.Tensor]:
        encoded = [agent.encode(obs) for obs in observations]
        return [agent.predict_chunk(features, noise=noise) for features in [*encoded, encoded[0]]]

    plain = decide()
    agent.compile_network(mode)
    for _ in range(3):  # the first calls of a graph are warm-up and capture
        first, second, again = decide()
        torch.testing.assert_close(first, plain[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(second, plain[1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_compiled_network_trains(tmp_path: Path, algorithm: str):
    options = SMALL[algorithm] | dict(agent="tiny")
    for name, compiled in (("plain", False), ("compiled", True)):
        launch(1, algorithm=algorithm, output_dir=str(tmp_path / name), compile=compiled, **options)
    plain, compiled = (logged(next((tmp_path / name).iterdir()))[-1] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=0.02, abs=0.02)


@two_gpus
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_two_gpus_equal_one(tmp_path: Path, algorithm: str):
    # As above: sums of half as many rows round otherwise.
    options = SMALL[algorithm] | dict(agent="tiny", adam_eps=1e-5)
    for count in (1, 2):
        launch(count, algorithm=algorithm, output_dir=str(tmp_path / str(count)), **options)
    one, two = (logged(next((tmp_path / str(count)).iterdir())) for count in (1, 2))
    for single, double in zip(one, two, strict=True):
        assert double == pytest.approx(single, rel=2e-3, abs=2e-3)


@two_gpus
def test_sharded_weights_train_save_and_resume_as_whole_ones(tmp_path: Path):
    options = SMALL["ppo"] | dict(agent="tiny")
    fsdp = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "NO_WRAP")
    launch(2, *fsdp, output_dir=str(tmp_path / "sharded"), **options)
    launch(2, *fsdp, output_dir=str(tmp_path / "sharded"), **(options | dict(num_iterations=3, resume="auto")))
    launch(2, output_dir=str(tmp_path / "whole"), **(options | dict(num_iterations=3)))
    runs = [next((tmp_path / name).iterdir()) for name in ("sharded", "whole")]
    for sharded, whole in zip(*(logged(run) for run in runs), strict=True):
        assert sharded == pytest.approx(whole, rel=2e-3, abs=2e-3)
    agents = [Gr00tAgent.from_pretrained(run / "checkpoints" / "iteration_3") for run in runs]
    for name, value in agents[0].state_dict().items():
        torch.testing.assert_close(value, agents[1].state_dict()[name], atol=1e-3, rtol=1e-3)


@two_gpus
def test_each_process_of_a_cluster_computes_on_its_own_gpu():
    cluster = pytest.importorskip("algorithms.common.cluster", reason="needs Ray")
    with cluster.connect(None) as connected:
        places = [Place(node=0, gpu=gpu, cpus=1) for gpu in (0, 1)]
        actors = [connected.start(GpuRole, place) for place in places]
        found = [connected.get(actor.uuid.remote()) for actor in actors]
    assert found == [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in (0, 1)]


@two_gpus
@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_one_process_saves_and_ends_both(tmp_path: Path, rank: int):
    """Under NCCL, whose collective operations a signal does not interrupt."""
    program = command("ppo", agent="tiny", env="slow", output_dir=str(tmp_path), num_iterations=1000)
    launcher = subprocess.Popen(
        [sys.executable, *TORCHRUN, *program], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for(lambda: list(tmp_path.glob("*/metrics.jsonl")), launcher)
    (worker,) = [pid for pid in children_of(launcher.pid) if f"\0RANK={rank}\0" in environment_of(pid)]
    os.kill(worker, signal.SIGTERM)
    output = ended(launcher)
    assert launcher.returncode == 0, output
    (run,) = tmp_path.iterdir()
    done, saved = checkpoints_in(run)[-1]
    assert done == len(logged(run)) >= 1
    assert output.count(f"stopped; the state is in {saved}") == 1
