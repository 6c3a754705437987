"""The evaluation script: from a checkpoint to its files, interrupted and resumed, in both environments."""

import fcntl
import json
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms import eval_gr00t
from algorithms.collect_demos import Attempt, record
from algorithms.common.command_line import parse_args
from algorithms.common.evaluation import evaluate
from algorithms.common.policies import TemporalEnsemble
from algorithms.common.reference_env import ReferenceVectorEnv
from algorithms.eval_gr00t import Args
from gr00t_agent import Gr00tAgent
from gr00t_agent.data_config import read_metadata
from gr00t_agent.loading import NANO_METADATA
from gr00t_agent.policy_server import ServedPolicy, make_server
from libero_gym.experts import ExpertConfig
from libero_gym.rendering.textures import installed_colorspace
from libero_gym.tasks.suites import get_task
from tests.algorithms.tiny_agent import tiny_agent


@pytest.mark.slow
def test_solving_a_task_of_libero_counts(tmp_path: Path):
    """An expert's recorded actions, played back through the whole path, solve the task where the expert did."""
    attempt = Attempt(
        suite="libero_goal", task_id=6, attempt_id=0, init_state_id=2, seed=0, object_shift=0.0, horizon=120
    )
    actions = record(attempt, ExpertConfig(speed=1.25)).actions  # ends with success
    chunks = torch.from_numpy(np.concatenate([actions, np.zeros((-len(actions) % 5, 7), np.float32)])).split(5)

    class Player:
        count = 0

        def predict(self, obs: dict[str, Any], generator: Any) -> torch.Tensor:
            self.count += 1
            return torch.stack([chunks[self.count - 1], torch.zeros(5, 7)])

    args = Args(checkpoint="", suite="libero_goal", renderer="warp", horizon=len(actions) + 10)
    envs = eval_gr00t.make_envs(args, 2, 5, 32)
    result = evaluate(Player(), envs, [(6, 2)], seed=0, video_dir=tmp_path)
    envs.close()
    (solved,) = result.episodes
    assert (solved.success, solved.length, result.success_rate) == (True, len(actions), 1.0)
    assert [path.name for path in result.videos] == ["task_6_state_2_success.mp4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    metadata = read_metadata(NANO_METADATA, "libero_franka")
    tiny_agent(metadata, num_action_chunks=3, denoising_steps=2).save_pretrained(folder)
    return folder


def small_args(checkpoint: Path, folder: Path, **changes: Any) -> Args:
    defaults = dict(
        checkpoint=str(checkpoint), suite="libero_goal", task_ids=(0, 6), episodes_per_task=1, horizon=6, num_envs=2,
        seeds=(0, 1), renderer="warp", device="cpu", output_dir=folder,
    )  # fmt: skip
    return Args(**(defaults | changes))


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_interrupted_and_resumed(checkpoint: Path, tmp_path: Path):
    whole = eval_gr00t.main(small_args(checkpoint, tmp_path / "whole"))
    assert [e.key for e in whole.episodes] == [(seed, task, 0) for seed in (0, 1) for task in (0, 6)]
    assert {e.length for e in whole.episodes} == {6}
    policy = dict(
        num_action_chunks=3, denoising_steps=2, compute_dtype="float32", padding="masked", round_to_bf16=False
    )
    assert whole.protocol["policy"] == policy  # the checkpoint's own
    assert whole.protocol["init_states"] == "settled"
    assert len(whole.protocol["weights_sha256"]) == 64
    assert [path.name for path in whole.videos] == ["task_0_state_0_failure.mp4", "task_6_state_0_failure.mp4"]
    log = tmp_path / "whole" / "episodes.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"seconds": 1000.0}
    log.write_bytes(json.dumps(first).encode() + b"\n" + lines[1][:9])
    again = eval_gr00t.main(small_args(checkpoint, tmp_path / "whole", resume=True))
    assert replace(again, seconds=0, timing={}) == replace(whole, seconds=0, timing={})
    assert len(log.read_bytes().splitlines()) == 4
    assert again.timing["before_s"] == 1000.0
    assert again.seconds == pytest.approx(sum(again.timing.values()))
    assert (tmp_path / "whole" / "videos" / "all_tasks.mp4").is_file()
    assert "turn on the stove" not in (report := (tmp_path / "whole" / "report.html").read_text())
    assert get_task("libero_goal", 6).language in report
    with pytest.raises(ValueError, match=r"policy.denoising_steps was 2, now 3"):
        eval_gr00t.main(small_args(checkpoint, tmp_path / "whole", resume=True, denoising_steps=3))
    with pytest.raises(FileExistsError, match="--resume"):
        eval_gr00t.main(small_args(checkpoint, tmp_path / "whole"))


OWN_POLICY = """
import numpy as np

class Mover:
    image_size, num_action_chunks = 32, 3

    def predict(self, obs, *, generator):
        assert obs["video.image"].shape[1:] == (32, 32, 3)
        return np.full((len(generator), 4, 7), 0.1)

def make():
    return Mover()
"""


@pytest.mark.slow
def test_ones_own_policy_is_evaluated_interrupted_and_resumed(tmp_path: Path):
    file = tmp_path / "mover.py"
    file.write_text(OWN_POLICY)

    def args(**changes: Any) -> Args:
        named = small_args(tmp_path, tmp_path / "eval", policy=f"{file}:make", device=None)
        return replace(named, checkpoint=None, **changes)

    whole = eval_gr00t.main(args())
    assert whole.protocol["own_policy"] == f"{file}:make"
    assert whole.protocol["policy"] == {"num_action_chunks": 3}
    assert whole.protocol["sampling"] == "the policy's own"
    assert [e.key for e in whole.episodes] == [(seed, task, 0) for seed in (0, 1) for task in (0, 6)]
    log = tmp_path / "eval" / "episodes.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    again = eval_gr00t.main(args(resume=True))
    assert replace(again, seconds=0, timing={}) == replace(whole, seconds=0, timing={})
    for name in ("result.json", "report.html", "videos/all_tasks.mp4"):
        assert (tmp_path / "eval" / name).is_file()
    with pytest.raises(ValueError, match=r"policy.temporal_ensemble was None, now 0.01"):
        eval_gr00t.main(args(resume=True, temporal_ensemble=0.01, num_action_chunks=3))
    file.write_text(OWN_POLICY + "# changed\n")
    with pytest.raises(ValueError, match=r"file_sha256 was '\w+', now '\w+'"):
        eval_gr00t.main(args(resume=True))


@pytest.mark.slow
def test_a_server_gives_what_the_checkpoint_gives(checkpoint: Path, tmp_path: Path):
    """An episode behind a server is that of the same actions here, to the last pixel of its film."""
    agent = Gr00tAgent.load(checkpoint).eval()
    server = make_server(ServedPolicy(agent, "tiny"), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"

    class Here:
        """What the client and the server do, without them."""

        def predict(self, obs: Any, generator: Any) -> torch.Tensor:
            (noise,) = generator
            seed = int(torch.randint(2**62, (), generator=noise))
            return agent.predict(obs, generator=[torch.Generator().manual_seed(seed)], num_steps=3)

    named: dict[str, Any] = dict(policy_server=address, device=None, seeds=(0,), task_ids=(6,), num_envs=1, horizon=9)
    args = replace(small_args(tmp_path, tmp_path / "served", num_action_chunks=3, **named), checkpoint=None)
    pictures: dict[str, bytes] = {}
    try:
        served = eval_gr00t.main(args)
        pictures["served"] = served.videos[0].read_bytes()
    finally:
        server.shutdown()
        thread.join()
    assert served.protocol["server"]["image_size"] == agent.image_size
    assert served.protocol["policy_server"] == address
    envs = eval_gr00t.make_envs(args, 1, 3, agent.image_size)
    here = evaluate(Here(), envs, [(6, 0)], seed=0, video_dir=tmp_path / "here")
    envs.close()
    assert here.episodes == served.episodes
    assert here.videos[0].read_bytes() == pictures["served"]
    with pytest.raises(ConnectionError, match=f"policy server {address} cannot be reached"):
        eval_gr00t.main(replace(args, resume=True))


def test_what_is_executed_with_temporal_ensembling(checkpoint: Path, tmp_path: Path):
    args = small_args(checkpoint, tmp_path, temporal_ensemble=0.01)
    candidate = eval_gr00t.make_candidate(args, ExitStack())
    assert (candidate.num_action_chunks, candidate.protocol["policy"]["num_action_chunks"]) == (1, 1)
    assert candidate.protocol["policy"]["temporal_ensemble"] == 0.01
    assert isinstance(candidate.agent, TemporalEnsemble)
    candidate = eval_gr00t.make_candidate(replace(args, num_action_chunks=4), ExitStack())
    assert candidate.num_action_chunks == 4


def test_the_policy_settings_of_the_command_line_win(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    agents: list[Gr00tAgent] = []

    def fake_envs(args: Args, num_envs: int, num_action_chunks: int, image_size: int) -> Any:
        assert (num_envs, num_action_chunks) == (2, 4)
        raise KeyboardInterrupt

    load = Gr00tAgent.load
    monkeypatch.setattr(Gr00tAgent, "load", lambda *a, **k: agents.append(load(*a, **k)) or agents[-1])
    monkeypatch.setattr(eval_gr00t, "make_envs", fake_envs)
    with pytest.raises(KeyboardInterrupt):
        eval_gr00t.main(
            small_args(checkpoint, tmp_path, num_action_chunks=4, denoising_steps=1, compute_dtype="bfloat16")
        )
    policy = agents[0].policy
    assert (policy.num_action_chunks, policy.denoising_steps, policy.compute_dtype) == (4, 1, "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu"])
def test_a_device_that_is_not_there_is_told(checkpoint: Path, tmp_path: Path, device: str):
    with pytest.raises(ValueError, match=rf"device='{device}' cannot be used here .*; give one of cpu"):
        eval_gr00t.main(small_args(checkpoint, tmp_path, device=device))


def test_what_is_not_played_or_played_twice_is_refused(checkpoint: Path, tmp_path: Path):
    args = small_args(checkpoint, tmp_path, episodes_per_task=2)
    with pytest.raises(ValueError, match=r"videos_per_task=3 is more than episodes_per_task=2, .*\(valid: 0-2\)"):
        eval_gr00t.check_args(replace(args, videos_per_task=3))
    with pytest.raises(ValueError, match=r"are asked for twice, .*; name each seed and each task only once"):
        eval_gr00t.check_args(replace(args, task_ids=(1, 1)))
    eval_gr00t.check_args(replace(args, videos_per_task=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(seeds=()),
            r"seeds=\(\) names none \(valid: one or more in \[0, 4294967295\]\); give some, or leave --seeds",
        ),
        (dict(seeds=(0, 2**32)), r"seeds=\(0, 4294967296\) is not in \[0, 4294967295\]"),
        (dict(task_ids=()), r"task_ids=\(\) names no task of libero_goal \(valid: 0-9\)"),
        (
            dict(policy_timeout=3.0),
            "policy_timeout=3.0 has no effect: with --checkpoint there is no server to wait for",
        ),
        (dict(reference_env=True), "renderer='warp' is none that LIBERO has"),
    ],
)
def test_what_cannot_be_is_refused_before_a_policy_is_loaded(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    eval_gr00t.check_args(small_args(checkpoint, tmp_path))
    with pytest.raises(ValueError, match=message):
        eval_gr00t.check_args(small_args(checkpoint, tmp_path, **changes))


def test_a_folder_that_holds_an_evaluation_is_refused_before_a_policy_is_loaded(checkpoint: Path, tmp_path: Path):
    (tmp_path / "protocol.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds an evaluation: go on with it by --resume, or give another"):
        eval_gr00t.check_args(small_args(checkpoint, tmp_path))
    eval_gr00t.check_args(small_args(checkpoint, tmp_path, resume=True))


def test_an_evaluation_that_is_under_way_is_told_before_a_policy_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(eval_gr00t, "make_candidate", lambda *_: pytest.fail("a policy was loaded"))
    with (tmp_path / ".lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=r"is in use by another process; .* or give another --output-dir"):
            eval_gr00t.main(small_args(checkpoint, tmp_path, resume=True))


def test_a_folder_is_named_after_the_policy_and_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def named(**source: str) -> str:
        folder = Args(**source, suite="libero_goal").folder
        assert folder.parent == Path("runs")
        return folder.name

    monkeypatch.chdir(tmp_path)
    for folder in (
        "kept/my policy",
        "runs/demo/checkpoints/iteration_18",
        "runs/sft/checkpoints/step_5",
        "copy/step_5",
    ):
        Path(folder).mkdir(parents=True)
    assert named(checkpoint="kept/my policy/") == "eval_my_policy_libero_goal"
    assert named(checkpoint="runs/demo/checkpoints/iteration_18") == "eval_demo_iteration_18_libero_goal"
    assert named(checkpoint="runs/sft/checkpoints/step_5") == "eval_sft_step_5_libero_goal"
    assert named(checkpoint="copy/step_5") == "eval_copy_step_5_libero_goal"
    assert named(checkpoint="nano") == "eval_nano_libero_goal"
    assert named(checkpoint="RLinf/RLinf-Gr00t-SFT-Goal") == "eval_RLinf-Gr00t-SFT-Goal_libero_goal"
    assert named(policy="path/to/mover.py:make") == "eval_mover_libero_goal"
    assert named(policy="package.module:make") == "eval_package.module_libero_goal"
    assert named(policy_server="ws://localhost:8000") == "eval_localhost_8000_libero_goal"
    assert named(policy_server="wss://policies.org/pi0") == "eval_policies.org_libero_goal"
    assert named(policy_server="zmq://[::1]:5555") == "eval__1_5555_libero_goal"
    assert Args(checkpoint="nano", output_dir=tmp_path).folder == tmp_path


def test_the_suite_is_the_one_that_the_checkpoint_was_trained_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(eval_gr00t, "make_candidate", lambda *_: pytest.fail("a policy was loaded"))
    with pytest.raises(ValueError, match=rf"{checkpoint} does not say which one it was trained on: give --suite"):
        eval_gr00t.main(small_args(checkpoint, tmp_path / "evaluation", suite=None))

    agent = Gr00tAgent.from_pretrained(checkpoint)
    agent.trained_on = {"suite": "libero_goal"}
    agent.save_pretrained(tmp_path / "goal")
    args = small_args(tmp_path / "goal", tmp_path / "evaluation", suite=None)
    assert args.played_suite == "libero_goal"
    assert replace(args, suite="libero_10").played_suite == "libero_10"
    assert replace(args, output_dir=None).folder == Path("runs/eval_goal_libero_goal")
    for suite, told in ((None, "libero_goal, which it was trained on"), ("libero_10", "libero_10")):
        with pytest.raises(pytest.fail.Exception):
            eval_gr00t.main(replace(args, suite=suite))
        assert capsys.readouterr().out == f"{tmp_path / 'goal'} plays 4 episodes of {told}\n"


def test_a_checkpoint_may_be_called_model_as_trainers_do(monkeypatch: pytest.MonkeyPatch):
    for name in ("--checkpoint", "--model"):
        monkeypatch.setattr("sys.argv", ["eval_gr00t.py", name, "nano", "--suite", "libero_goal"])
        assert parse_args(Args, None) == Args(checkpoint="nano", suite="libero_goal")


def test_the_reference_environment_is_chosen(checkpoint: Path, tmp_path: Path):
    args = small_args(checkpoint, tmp_path, reference_env=True, renderer="osmesa", init_states="original")
    envs = eval_gr00t.make_envs(args, 1, 3, 32)
    assert isinstance(envs.unwrapped, ReferenceVectorEnv)
    assert envs.unwrapped.renderer_name == "osmesa"
    assert envs.action_space.shape == (1, 3, 7)
    assert "video.wrist_image" in envs.observation_space.spaces  # pyright: ignore
    envs.close()
    with pytest.raises(ValueError, match="renderer='warp' is none that LIBERO has"):
        eval_gr00t.make_envs(replace(args, renderer="warp"), 1, 3, 32)
    with pytest.raises(ValueError, match="texture_colorspace='auto' is a choice of our environment"):
        eval_gr00t.check_args(replace(args, texture_colorspace="auto"))


@pytest.mark.skipif(installed_colorspace() == "linear", reason="this MuJoCo knows one look only")
def test_textures_look_as_asked_for(checkpoint: Path, tmp_path: Path):
    images = {}
    for look in (None, "linear", "auto"):
        args = small_args(checkpoint, tmp_path, suite="libero_object", texture_colorspace=look)
        envs = eval_gr00t.make_envs(args, 1, 3, 64)
        candidate = eval_gr00t.Candidate(agent=None, num_action_chunks=3, image_size=64, protocol={})
        protocol = eval_gr00t.make_protocol(args, candidate, envs, [(0, 0)])
        assert protocol["texture_colorspace"] == (look or "linear")
        images[look] = envs.reset(seed=0)[0]["video.image"]
        envs.close()
    assert np.array_equal(images[None], images["linear"])
    assert not np.array_equal(images[None], images["auto"])
