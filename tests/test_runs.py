"""The scripts in benchmarks/runs, without what they start: their commands parse, hand on to each other what there is,
and have the settings that the recorded runs had."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from algorithms import collect_demos, eval_gr00t, grpo_gr00t, ppo_gr00t, sft_gr00t
from algorithms.common.args import Augmentation
from algorithms.common.command_line import parse_args
from algorithms.common.step_sizes import StepSizes
from libero_gym.experts import ExpertConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
# What each script is called with.
ARGUMENTS = {
    "fewshot.sh": "libero_goal 600 600 --tf32",
    "forty.sh": "",
    "goal_ppo.sh": "",
    "goal_short_rollouts.sh": "",
    "held_out.sh": "",
    "long_grpo.sh": "",
    "object_grpo.sh": "",
    "object_ppo.sh": "",
    "spatial_equal_budget.sh": "",
    "spatial_generalisation.sh": "",
    "spatial_grpo.sh": "",
    "spatial_ppo.sh": "",
    "spatial_three_runs.sh": "",
}
CALLED_BY_OTHERS = {"round_and_evaluate.sh"}
# Where the metrics of a script's run are, by its name.
RECORDED = {
    "goal_first": "goal_ppo/first_metrics.jsonl",
    "goal_second": "goal_ppo/second_metrics.jsonl",
    "goal_third": "goal_ppo/third_metrics.jsonl",
    "long_grpo": "long_grpo/metrics.jsonl",
    "libero_40_ppo": "forty/second_ppo_metrics.jsonl",
    "libero_40_ppo_long": "forty/third_ppo_metrics.jsonl",
    "object_grpo": "object_grpo/metrics.jsonl",
    "object_ppo": "object_ppo/metrics.jsonl",
    "spatial_falling": "spatial_ppo/m_metrics.jsonl",
    "spatial_grpo": "spatial_grpo/y_metrics.jsonl",
    "spatial_plain_grpo": "spatial_ppo/j_metrics.jsonl",
    "spatial_ppo": "spatial_ppo/w_metrics.jsonl",
    "spatial_ppo_2": "spatial_ppo/w2_metrics.jsonl",
    "spatial_ppo_3": "spatial_ppo/w3_metrics.jsonl",
    "spatial_ppo_e": "spatial_ppo/e_metrics.jsonl",
    "spatial_ppo_h": "spatial_ppo/h_metrics.jsonl",
    "spatial_ppo_l": "spatial_ppo/l_metrics.jsonl",
    "spatial_reinflow": "spatial_ppo/k_metrics.jsonl",
}
TRAINERS = {"algorithms/ppo_gr00t.py": ppo_gr00t, "algorithms/grpo_gr00t.py": grpo_gr00t}
PROGRAMS: dict[str, Any] = {
    **TRAINERS,
    "algorithms/sft_gr00t.py": sft_gr00t,
    "algorithms/collect_demos.py": collect_demos,
    "algorithms/eval_gr00t.py": eval_gr00t,
}


STAND_IN = """#!{python}
import json, sys
if sys.argv[1] == "-":
    sys.stdin.read()
with open({called!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


class Command(NamedTuple):
    program: str
    args: Any  # as the program parses them; the two folders of the one that rounds a policy


@functools.cache
def calls_of(script: str) -> list[list[str]]:
    """Runs a script with a `python` that only writes down how it is called."""
    with TemporaryDirectory() as folder:
        called, stand_in = Path(folder, "called.jsonl"), Path(folder, "python")
        stand_in.write_text(STAND_IN.format(python=sys.executable, called=str(called)))
        stand_in.chmod(0o755)
        environment = os.environ | dict(PATH=f"{folder}:{os.environ['PATH']}")
        path = ROOT / "benchmarks/runs" / script
        subprocess.run([str(path), *shlex.split(ARGUMENTS[script])], env=environment, check=True, timeout=60)
        return [json.loads(line) for line in called.read_text().splitlines()]


def commands_of(script: str, monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """Returns what a script starts."""
    commands = []
    for program, *given in calls_of(script):
        if program == "-":
            commands.append(Command(program, given))
            continue
        monkeypatch.setattr("sys.argv", [program, *given])
        module = PROGRAMS[program]
        commands.append(Command(program, parse_args(module.Args, None, getattr(module, "PRESETS", None))))
    return commands


def test_every_script_is_tested():
    assert {path.name for path in (ROOT / "benchmarks/runs").iterdir()} == set(ARGUMENTS) | CALLED_BY_OTHERS


@pytest.mark.parametrize("script", ARGUMENTS)
def test_commands_are_those_of_the_programs(script: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    made: set[str] = set()
    for program, args in commands_of(script, monkeypatch):
        if program == "-":
            source, target = args
            assert source in made
            made.add(target)
        elif program == "algorithms/eval_gr00t.py":
            assert args.checkpoint in made or (ROOT / args.checkpoint).is_dir()
            assert args.resume
        elif program == "algorithms/collect_demos.py":
            made.add(str(args.output))
        elif program == "algorithms/sft_gr00t.py":
            assert str(args.dataset) in made or (ROOT / args.dataset).is_dir()
            assert str(args.resume) == "auto"
            made |= saved(args, args.num_steps, "step")
        else:
            assert args.model in made or Path(args.model).is_dir()
            assert str(args.resume) == "auto"
            PROGRAMS[program].check_args(replace(args, model=PROGRAMS[program].PRESETS[args.preset].model))
            made |= saved(args, args.num_iterations, "iteration")


def saved(args: Any, last: int, unit: str) -> set[str]:
    """Returns the checkpoints that a run leaves behind, if no evaluation keeps one more."""
    numbers = [n for n in range(1, last) if args.save_interval and n % args.save_interval == 0] + [last]
    return {f"runs/{args.run_name}/checkpoints/{unit}_{n}" for n in numbers[-args.keep_last :]}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_settings_are_those_of_the_recorded_runs(script: str, monkeypatch: pytest.MonkeyPatch):
    for program, args in commands_of(script, monkeypatch):
        if program not in TRAINERS:
            continue
        lines = [json.loads(line) for line in (RESULTS / RECORDED[args.run_name]).read_text().splitlines()]
        last = lines[-1]
        assert last["iteration"] <= args.num_iterations
        assert last["actor/num_updates"] == args.update_epochs * args.num_minibatches
        optimizer = SimpleNamespace(param_groups=[dict(lr=args.learning_rate)])
        StepSizes(optimizer, args.lr_schedule, args.target_kl, args.lr_hold).begin(
            (last["iteration"] - 1) / args.num_iterations
        )
        assert last["actor/lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        # Nothing but imitation at first, if anything.
        assert (lines[0]["actor/num_updates"] > last["actor/num_updates"]) == (args.imitation_iterations > 0)


# What the few-shot policies were collected and fine-tuned with; the programs' own presets say it too.
FEWSHOT_DEMONSTRATIONS: dict[str, Any] = dict(
    episodes_per_task=20, seed=0, object_shift=0.02, image_size=118, storage="image", horizon=None, init_state_ids=None,
    expert=ExpertConfig(speed=1.0, speed_spread=0.1, noise=0.06, via_noise=0.01, mistakes=0.0),
)  # fmt: skip
FEWSHOT_TRAINING: dict[str, Any] = dict(
    model="nano", seed=1, batch_size=512, micro_batch_size=512, learning_rate=7e-4, warmup_fraction=0.05,
    weight_decay=1e-4, betas=(0.9, 0.95), ema_decay=0.999, dropout=False, compute_dtype="bfloat16", save_interval=200,
    augmentation=Augmentation(random_crop=True, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02),
)  # fmt: skip


@pytest.mark.parametrize(
    ("script", "mistakes", "num_steps", "tf32"), [("fewshot.sh", 0.0, 600, True), ("forty.sh", 0.5, 4400, True)]
)
def test_fewshot_policies_are_made_as_the_shipped_ones_were(
    script: str, mistakes: float, num_steps: int, tf32: bool, monkeypatch: pytest.MonkeyPatch
):
    made = dict(commands_of(script, monkeypatch))
    demonstrations, training = made["algorithms/collect_demos.py"], made["algorithms/sft_gr00t.py"]
    expert = replace(FEWSHOT_DEMONSTRATIONS["expert"], mistakes=mistakes)
    assert vars(demonstrations).items() >= (FEWSHOT_DEMONSTRATIONS | dict(expert=expert)).items()
    assert vars(training).items() >= (FEWSHOT_TRAINING | dict(num_steps=num_steps, tf32=tf32)).items()


def test_the_first_commands_of_the_readme_make_the_shipped_policy(monkeypatch: pytest.MonkeyPatch):
    readme = (ROOT / "README.md").read_text("utf-8")
    for program, settings in (
        ("algorithms/collect_demos.py", FEWSHOT_DEMONSTRATIONS | dict(suite="libero_spatial")),
        # Evaluated on the suite of the demonstrations.
        ("algorithms/sft_gr00t.py", FEWSHOT_TRAINING | dict(suite=None, num_steps=1200, tf32=False)),
    ):
        (command,) = re.findall(rf"^(?:python|accelerate launch) {program} (.+)$", readme, re.MULTILINE)
        monkeypatch.setattr("sys.argv", [program, *command.split()])
        args = parse_args(PROGRAMS[program].Args, None, PROGRAMS[program].PRESETS)
        assert vars(args).items() >= settings.items()
