"""What a command line says, how soon, and which errors end in one message."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from algorithms.common import command_line
from algorithms.common.charts import thin
from algorithms.common.command_line import REQUIRED, launch, parse_args
from algorithms.common.resume import restore_generators
from gr00t_agent.files import require
from libero_gym import get_task
from libero_gym.fork import Owner
from libero_gym.rendering.renderers import choose_egl_device
from tests import preloaded

ROOT = Path(__file__).resolve().parents[3]
TRAINERS = ("ppo_gr00t", "grpo_gr00t", "dsrl_gr00t", "sft_gr00t")
SCRIPTS = (*TRAINERS, "eval_gr00t", "collect_demos")
NEEDED = {
    "sft_gr00t": ["--dataset", "a/b"],
    "eval_gr00t": ["--checkpoint", "nano"],
    "collect_demos": ["--output", "/tmp/none"],
}
# PyTorch alone takes two seconds of a processor and more; the rest of what a trainer imports four to six.
CPU_SECONDS = 2.0


def run(*command: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A program that ended, and the CPU-seconds that it took."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "100", **variables}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_at_once_in_blocks(script: str):
    ended, seconds = run(f"algorithms/{script}.py", "--help")
    assert ended.returncode == 0, ended.stderr
    assert seconds < CPU_SECONDS
    source = (ROOT / f"algorithms/{script}.py").read_text()
    titles = re.findall(r"^    # --- (.+) ---$", source[: source.index("\nARGS = ")], re.MULTILINE)
    assert len(titles) > 3
    assert [title for title in re.findall(r"╭─ (.+) options ─", ended.stdout) if title in titles] == titles
    assert max(map(len, ended.stdout.splitlines())) <= 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_told_at_once(script: str):
    given = ["--suite", "libero_spatia"]
    ended, seconds = run(f"algorithms/{script}.py", *NEEDED.get(script, []), *given)
    assert ended.returncode == 2
    assert seconds < CPU_SECONDS
    assert f"{script}.py: error: suite='libero_spatia' is not installed; did you mean 'libero_spatial'?" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("ppo_gr00t", "--preset demos", "error: preset='demos' is unknown; did you mean 'demo'? (valid: demo, libero_"),
        ("ppo_gr00t", "--preset demo --minibatch-size 7", "num_decisions=256 must be a positive multiple of minibatch"),
        ("ppo_gr00t", "--preset demo --dry-run --update-fraction 0.2", "give for example --update-fraction 0.25, or a"),
        ("ppo_gr00t", "--preset demo --model x/y/z", "model='x/y/z' is no folder and no hub name (owner/name); give a"),
        ("grpo_gr00t", "--task-ids 12", "error: task_id=12 is not in libero_spatial (valid: 0-9)"),
        ("grpo_gr00t", "--resume nowhere", "nowhere holds no checkpoint to go on from; give the folder of a run that"),
        ("dsrl_gr00t", "--run-name {sed}", "run_name='{sed}' cannot be filled in (KeyError('sed')); fields in braces"),
        ("sft_gr00t", "--dataset nowhere", "dataset='nowhere' is no folder and no hub name (owner/name); make one by"),
        ("sft_gr00t", "", "dataset is not given: name a LeRobot dataset with --dataset"),
        ("eval_gr00t", "--checkpoint nowhere", "checkpoint='nowhere' is no folder and no hub name (owner/name)"),
        ("eval_gr00t", "--num-envs 2", "give one of --checkpoint, --policy and --policy-server (given: none)"),
        ("eval_gr00t", "--checkpoint nano --policy a:b", "and --policy-server (given: checkpoint, policy)"),
        ("eval_gr00t", "--policy nowhere.py:make", "policy='nowhere.py:make': there is no file nowhere.py; give its"),
        ("eval_gr00t", "--policy-server localhost:80", "policy_server='localhost:80' is no address; give ws://host"),
        (
            "eval_gr00t",
            "--policy-server ws://a:1 --denoising-steps 3",
            "denoising_steps=3 is a setting of --checkpoint, and policy_server has its own; leave it out",
        ),
        ("eval_gr00t", "--checkpoint nano", "nano does not say which one it was trained on: give --suite (valid: libe"),
        ("eval_gr00t", "--policy-server ws://a:1", "such a policy does not say which one it was trained on: give --"),
        ("eval_gr00t", "--model nano --suite libero_1", "suite='libero_1' is not installed; did you mean 'libero_10'?"),
        ("eval_gr00t", "--checkpoint nano --temporal-ensemble nan", "temporal_ensemble=nan must be a finite number"),
        (
            "eval_gr00t",
            "--checkpoint nano --suite libero_10 --seeds 1 1",
            "are asked for twice, but an episode counts once",
        ),
        ("collect_demos", "--output docs", "docs exists; give another output, or remove it first"),
        ("report", "--run docs", "docs is no folder of a run (args.json) or of an evaluation (result.json)"),
    ],
)
def test_sizes_names_and_folders_are_checked_before_anything_else(script: str, given: str, message: str):
    ended, seconds = run(f"algorithms/{script}.py", *given.split())
    assert ended.returncode in (1, 2)
    assert seconds < CPU_SECONDS
    assert message in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("program", "given", "status", "message"),
    [
        (
            "tools.show_dataset",
            "--dataset nowhere",
            1,
            "show_dataset.py: error: dataset 'nowhere' is no folder and no hub na",
        ),
        (
            "tools.show_dataset",
            "--dataset nowhere --moments 0",
            1,
            "show_dataset.py: error: episodes_per_task=1, moments=0",
        ),
        (
            "examples.own_agent_in_ppo",
            "--run-name {sed}",
            2,
            "own_agent_in_ppo.py: error: run_name='{sed}' cannot be filled",
        ),
        ("examples.own_agent_in_ppo", "--preset demo", 2, "own_agent_in_ppo.py: error: preset='demo' has no effect"),
    ],
)
def test_tools_and_examples_tell_mistakes_too(program: str, given: str, status: int, message: str):
    process = preloaded.start("-m", program, *given.split())
    output, _ = process.communicate(timeout=100)
    assert process.returncode == status
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_heavy_is_imported_before_a_mistake_is_told(script: str):
    program = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate'}\n"
        "atexit.register(lambda: print('imported', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['{script}.py', '--no-such-flag']\n"
        f"runpy.run_module('algorithms.{script}', run_name='__main__', alter_sys=True)"
    )
    ended, _ = run("-c", program)
    assert ended.returncode == 2
    assert "Unrecognized options" in ended.stderr
    assert "imported []" in ended.stdout


def test_help_shows_the_values_of_the_chosen_preset():
    for preset in ("--preset demo", "--preset=demo"):
        ended, _ = run("algorithms/ppo_gr00t.py", *preset.split(), "--help")
        shown = re.sub(r"[│\s]+", " ", ended.stdout)
        assert "Rollout-and-update rounds; schedules run over them. (default: 18)" in shown
        assert "AdamW's decoupled weight decay. (default: 0.01)" in shown


def test_help_may_be_cut_off_by_a_pipe():
    program = subprocess.Popen(
        [sys.executable, "algorithms/ppo_gr00t.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()  # nobody reads
    assert program.stderr.read() == b""
    program.wait(timeout=60)
    program.stderr.close()


def test_of_two_processes_the_first_speaks():
    """The launcher ends the other as soon as the first has ended."""
    launch_two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    ended, _ = run(*launch_two, "algorithms/ppo_gr00t.py", "--suite", "x", OMP_NUM_THREADS="1")
    assert ended.returncode != 0
    assert ended.stderr.count("error: suite='x' is not installed") == 1


@dataclass(kw_only=True)
class Augmentation:
    hue: float = 0.1
    """Turn of colours."""


@dataclass(kw_only=True)
class Args:
    # --- run ---
    preset: str | None = None
    """Defaults."""
    seed: int = 1
    """Seed of `all` that
    is drawn."""

    # --- evaluation and saving ---
    name: str
    """Name."""
    kinds: tuple[Literal["a", "b"], ...] = ()
    """Kinds."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation."""


def parse(monkeypatch: pytest.MonkeyPatch, *given: str, presets: Any = None, checks: Any = ()) -> Args:
    monkeypatch.setattr(sys, "argv", ["program.py", *given])
    return parse_args(Args, "Text.", presets, *checks)


def test_arguments_override_a_preset_which_overrides_defaults(monkeypatch: pytest.MonkeyPatch):
    presets = {"big": Args(name="big", seed=7, augmentation=Augmentation(hue=0.3))}
    plain = Args(name="x", kinds=("b", "a"), augmentation=Augmentation(hue=0.2))
    given = ["--name", "x", "--kinds", "b", "a", "--augmentation.hue", "0.2"]
    assert parse(monkeypatch, *given, presets=presets) == plain
    big = Args(preset="big", name="big", seed=8, augmentation=Augmentation(hue=0.3))
    assert parse(monkeypatch, "--preset", "big", "--seed", "8", presets=presets) == big


@pytest.mark.parametrize("given", [["--seed", "3"], ["--preset", "unnamed"]])
def test_what_has_no_default_must_be_given(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    presets = {"unnamed": Args(name=REQUIRED, seed=3)}
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, *given, presets=presets)
    assert ended.value.code == 2
    assert "--name" in capsys.readouterr().err
    assert parse(monkeypatch, *given, "--name", "x", presets=presets).seed == 3


def no_such_task(args: Args) -> None:
    get_task("libero_spatial", 12)


def test_a_check_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, "--name", "x", checks=[no_such_task])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "program.py: error: task_id=12 is not in libero_spatial (valid: 0-9)\n"


def test_what_only_the_run_tells_is_told_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(SystemExit) as ended:
        launch(no_such_task, Args(name="x"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "program.py: error: task_id=12 is not in libero_spatial (valid: 0-9)\n"


def no_such_device(args: Args) -> None:
    choose_egl_device([0], requested="7", cuda_device=None, local_rank=0)


def no_such_key(args: Args) -> None:
    require({"b": 1}, "a", "x.json")


def opened_elsewhere(args: Args) -> None:
    owner = Owner("a world")
    owner._pid = 0  # pyright: ignore[reportPrivateUsage]
    owner.check()


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (no_such_device, "MUJOCO_EGL_DEVICE_ID='7' is not an EGL device of this machine"),
        (no_such_key, "x.json has no key 'a'; present: b\n"),
        (opened_elsewhere, "a world was opened by process 0 and does not work in process"),
    ],
)
def test_what_the_project_raises_by_name_is_told(
    main: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(SystemExit) as ended:
        launch(main, Args(name="x"))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"program.py: error: {message}")


def test_notes_of_an_error_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def main(args: Args) -> None:
        try:
            no_such_task(args)
        except ValueError as error:
            error.add_note("go on with --resume runs/x")
            raise

    monkeypatch.setattr(sys, "argv", ["program.py"])
    with pytest.raises(SystemExit):
        launch(main, Args(name="x"))
    assert capsys.readouterr().err.endswith("(valid: 0-9)\ngo on with --resume runs/x\n")


def test_faults_of_libraries_keep_their_traceback():
    def of_torch(args: Args) -> None:
        restore_generators({"torch": "00"})

    def of_a_dict(args: Args) -> None:
        restore_generators({})

    for main, kind in ((of_torch, RuntimeError), (of_a_dict, KeyError)):
        with pytest.raises(kind):
            launch(main, Args(name="x"))


def test_faults_of_a_program_keep_their_traceback():
    def own_fault(args: Args) -> None:
        raise ValueError("of somebody else's code")

    def fault_within(args: Args) -> None:
        thin(["x"], [1.0])  # pyright: ignore[reportArgumentType]

    for main, message in ((own_fault, "somebody else's"), (fault_within, "could not convert string to float")):
        with pytest.raises(ValueError, match=message):
            launch(main, Args(name="x"))


def test_another_process_of_the_host_speaks_only_if_its_launcher_lets_it_live(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds))
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--name", "x", checks=[no_such_task])
    assert waited == [command_line._GRACE_S]  # pyright: ignore[reportPrivateUsage]
    assert "task_id=12" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--name", "x", "--sed", "1")
    assert len(waited) == 2
    assert "Unrecognized options: --sed, 1" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t"])
def test_a_dry_run_tells_sizes_and_time_and_leaves_nothing(trainer: str, tmp_path: Path):
    given = ("--preset", "demo", "--dry-run", "--num-envs", "8", "--output-dir", str(tmp_path / "runs"))
    process = preloaded.start("-m", f"algorithms.{trainer}", *given, COLUMNS="100")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    told = dict(re.findall(r"^(\S.*?)  +([\d.,]+)", output, re.MULTILINE))
    assert told["environments"] == "8"
    assert told["iterations"] == {"ppo_gr00t": "18", "grpo_gr00t": "22"}[trainer]
    assert (
        told["env-steps of an iteration" if trainer == "ppo_gr00t" else "env-steps at most"]
        == ({"ppo_gr00t": "640", "grpo_gr00t": "1,280"}[trainer])
    )
    for measured in ("parameters", "env-steps/s in a rollout", "memory of a process", "rollout", "update"):
        assert float(told[measured].replace(",", "")) > 0
    assert re.search(r"time to the end +\d+ h \d\d min", output)
    assert not (tmp_path / "runs").exists()


def test_a_preset_for_a_gpu_names_the_one_that_fits():
    ended, _ = run("algorithms/ppo_gr00t.py", "--preset", "libero_spatial_nano", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 2
    assert "take --preset libero_spatial_laptop, which fits two cores" in ended.stderr
    assert "--imitation-iterations 0" in ended.stderr
    ended, _ = run("algorithms/ppo_gr00t.py", "--num-envs", "8", "--num-steps", "24")
    assert "--minibatch-size 192 --micro-batch-size 192" in ended.stderr
