"""What trainers repeat on purpose stays the same in their files, and bad arguments are refused."""

import ast
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from algorithms import collect_demos, dsrl_gr00t, grpo_gr00t, ppo_gr00t, sft_gr00t
from algorithms.common.args import RANGES, check_agent_options, check_agent_takes, check_ranges

FOLDER = Path(ppo_gr00t.__file__).parent
# What differs between the two on purpose.
OWN_DEFAULTS = {"run_name", "update_epochs", "clip_coef_high"}
OWN_HELP = {"imitation_coef"}
OWN_FUNCTIONS = {
    "check_args", "make_envs", "load_agent", "main", "dry_run", "policy_step_factor", "num_updates"
}  # fmt: skip


def args_class(trainer: str) -> ast.ClassDef:
    tree = ast.parse((FOLDER / f"{trainer}_gr00t.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    return found


def arguments(trainer: str) -> dict[str, tuple[str, str, str]]:
    """Type, default and help by name."""
    body = args_class(trainer).body
    return {
        ast.unparse(field.target): (
            ast.unparse(field.annotation),
            ast.unparse(field.value),
            re.sub(r"\s+", " ", ast.literal_eval(help_text.value)),
        )
        for field, help_text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
    }


def functions(trainer: str) -> dict[str, str]:
    """Source of functions and of methods of `Args` by name."""
    tree = ast.parse((FOLDER / f"{trainer}_gr00t.py").read_text())
    nodes = [*tree.body, *args_class(trainer).body]
    return {node.name: ast.unparse(node) for node in nodes if isinstance(node, ast.FunctionDef)}


def test_an_argument_of_both_trainers_means_the_same_in_both():
    ppo, grpo = arguments("ppo"), arguments("grpo")
    shared = [name for name in ppo if name in grpo]
    assert len(shared) > 40
    assert shared == [name for name in grpo if name in ppo]  # the order of --help
    for name in shared:
        (kind, default, help_text), (other_kind, other_default, other_help) = ppo[name], grpo[name]
        assert kind == other_kind, name
        assert (help_text != other_help) == (name in OWN_HELP), name
        assert (default != other_default) == (name in OWN_DEFAULTS), name


def test_a_function_of_both_trainers_is_the_same_in_both():
    ppo, grpo = functions("ppo"), functions("grpo")
    shared = ppo.keys() & grpo.keys()
    assert {
        "policy_loss",
        "k3_kl",
        "mask_unexecuted",
        "mean_of_executed",
        "sum_per_decision",
        "only_imitates",
        "num_epochs",
        "evaluates",
        "saves",
        "score",
    } <= shared
    assert {name for name in shared if ppo[name] != grpo[name]} == OWN_FUNCTIONS


def test_a_function_of_ppo_is_the_same_in_the_asynchronous_trainer():
    ppo, asynchronous = functions("ppo"), functions("async_ppo")
    different = {name for name in ppo if ppo[name] != asynchronous.get(name)}
    assert different == {"check_args", "make_envs", "main", "dry_run", "ppo_loss"}


@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_iterations=0), "num_iterations=0 must be at least 1"),
        (dict(denoising_steps=0), "denoising_steps=0 must be at least 1"),
        (dict(keep_last=0), "keep_last=0 must be at least 1"),
        (dict(eval_interval=-1), "eval_interval=-1 must be at least 0"),
        (dict(final_noise=1.5), r"final_noise=1.5 is not in \(0, 1\]"),
        (dict(suite="libero_spatial", eval_episodes_per_task=51), "episodes_per_task=51 is not possible"),
        (dict(suite="nope", eval_episodes_per_task=0), "suite='nope' is not installed"),
        (dict(task_ids=(12,), eval_episodes_per_task=0), "12"),
        (
            dict(num_near_goal_states=17, steps_before_success=(3, 6, 9)),
            "17 times 3 .* 50 .* --num-near-goal-states 16",
        ),
        (dict(pipeline_stage_num=48), "pipeline_stage_num=48 must divide the 64 .* --pipeline-stage-num 32"),
        (dict(task_ids=(), eval_episodes_per_task=0), r"task_ids=\(\) names no task of libero_spatial \(valid: 0-9\)"),
    ],
)
def test_arguments_that_would_fail_late_are_refused(trainer: Any, changes: dict[str, Any], message: str):
    trainer.check_args(trainer.Args())
    with pytest.raises(ValueError, match=message):
        trainer.check_args(trainer.Args(**changes))


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        (dict(imitation_coef=0.0), r"a positive imitation_coef \(given: 0\); give for example --imitation-coef 10, or"),
        (dict(learning_rate=0.0), "a positive learning_rate .* --learning-rate 5e-6, or --imitation-iterations 0"),
    ],
)
def test_imitation_alone_needs_something_to_move_by(trainer: str, lacking: dict[str, Any], message: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    imitating = dict(imitation_iterations=1, imitation_coef=10.0)
    module.check_args(module.Args(**imitating))
    module.check_args(module.Args(**(imitating | lacking | dict(imitation_iterations=0))))
    with pytest.raises(ValueError, match=f"imitation_iterations=1 needs {message}"):
        module.check_args(module.Args(**(imitating | lacking)))


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(noise_method="flow_cps", noise_level=1.5), r"noise_level=1.5 is more than .*\(0, 1\]"),
        (dict(ignore_last=True, joint_logprob=True), "ignore_last=True has no effect with .* joint_logprob=True"),
        (
            dict(ignore_last=True, noise_method="reinflow"),
            "ignore_last=True has no effect with noise_method='reinflow'",
        ),
        (dict(ent_coef=0.1), "ent_coef=0.1 has no effect with noise_method='flow_sde'"),
        (dict(lora_rank=4, lora_parts=("action_head", "language_model")), "language_model, .* --train-backbone too"),
    ],
)
def test_what_our_agents_have_not_is_refused_on_the_command_line(trainer: str, changes: dict[str, Any], message: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    args = module.Args(**changes)
    module.check_args(args)  # another agent may have it
    with pytest.raises(ValueError, match=message):
        check_agent_options(args)
    with pytest.raises(ValueError, match=message):
        module.load_agent(args)


TRAINERS = ("ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_starts_that_an_expert_comes_to_only_after_the_horizon_are_refused(trainer: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    module.check_args(module.Args(steps_before_success=(3, 240)))
    with pytest.raises(ValueError, match="hold 500, but episodes of task 0 of libero_spatial end after horizon=240"):
        module.check_args(module.Args(steps_before_success=(3, 500)))
    module.check_args(module.Args(steps_before_success=(3, 500), horizon=500))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_settings_of_what_is_not_asked_for_are_refused(trainer: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    with pytest.raises(ValueError, match="num_near_goal_states=9 has no effect: without --steps-before-success"):
        module.check_args(module.Args(num_near_goal_states=9))
    for setting in (dict(lora_alpha=3.0), dict(lora_parts=("action_head", "language_model"))):
        with pytest.raises(ValueError, match=r"lora_\w+=.* has no effect: without --lora-rank there are no adapters"):
            module.load_agent(module.Args(**setting))
        check_agent_options(module.Args(**setting, resume=FOLDER))  # a run that began so
        check_agent_options(module.Args(**setting, lora_rank=4, train_backbone=True))
    with pytest.raises(
        ValueError, match=r"lora_parts=\(\) names nothing .* one or more of action_head, language_model"
    ):
        check_agent_options(module.Args(lora_rank=4, lora_parts=()))


def test_what_a_preset_sets_may_be_left_without_effect():
    def chosen(preset: str, **changes: Any) -> ppo_gr00t.Args:
        return replace(ppo_gr00t.PRESETS[preset], preset=preset, **changes)

    from_the_start = chosen("libero_spatial_laptop", steps_before_success=())
    assert from_the_start.num_near_goal_states != ppo_gr00t.Args().num_near_goal_states
    ppo_gr00t.check_args(from_the_start)
    with pytest.raises(ValueError, match="num_near_goal_states=9 has no effect"):
        ppo_gr00t.check_args(replace(from_the_start, num_near_goal_states=9))

    without_adapters = chosen("libero_spatial_24gb", lora_rank=0)
    assert without_adapters.lora_alpha != ppo_gr00t.Args().lora_alpha
    check_agent_options(without_adapters, ppo_gr00t.PRESETS)
    with pytest.raises(ValueError, match=r"lora_alpha=3\.0 has no effect"):
        check_agent_options(replace(without_adapters, lora_alpha=3.0), ppo_gr00t.PRESETS)


class Bare:
    """An agent with nothing that an option asks for."""

    def forward(self, obs: Any, action: Any = None, *, generator: Any = None) -> None: ...


class Open(Bare):
    """An agent that takes whatever it is given."""

    def forward(self, obs: Any, action: Any = None, **options: Any) -> None: ...

    def compile_network(self) -> None: ...


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "grpo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(compile=True), r"compile=True needs an agent with a method compile_network\(\), which Bare has not"),
        (dict(final_noise=0.5), "final_noise=0.5 needs an agent whose forward takes noise_anneal, .* obs, action, gen"),
        (dict(imitation_coef=1.0), "imitation_coef=1.0 needs an agent whose forward takes flow_draws"),
    ],
)
def test_options_that_an_agent_cannot_follow_are_refused(trainer: str, changes: dict[str, Any], message: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    check_agent_takes(Bare(), module.Args())
    check_agent_takes(Open(), module.Args(**changes))
    with pytest.raises(ValueError, match=message):
        check_agent_takes(Bare(), module.Args(**changes))


@pytest.mark.parametrize("trainer", ["ppo_gr00t", "async_ppo_gr00t"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(critic_warmup_iterations=3, num_iterations=3), "leave none .* --critic-warmup-iterations 2"),
        (dict(value_bounds=(0.0, 1.0), reward_scale=5.0), "do not hold the rewards of a decision, 0 to 5"),
    ],
)
def test_runs_that_would_teach_nothing_are_refused(trainer: str, changes: dict[str, Any], message: str):
    module = pytest.importorskip(f"algorithms.{trainer}")  # the last one needs Ray
    with pytest.raises(ValueError, match=message):
        module.check_args(module.Args(**changes))


def test_groups_that_a_process_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="group_size=6 must divide the 64 environments of a process"):
        grpo_gr00t.check_args(grpo_gr00t.Args(group_size=6))


SCRIPTS = ("ppo", "async_ppo", "grpo", "dsrl", "sft", "eval", "compare")


@pytest.mark.parametrize("script", [*(f"{name}_gr00t" for name in SCRIPTS), "collect_demos", "report"])
def test_every_number_of_a_script_has_a_range_which_its_default_and_presets_are_in(script: str):
    module = pytest.importorskip(f"algorithms.{script}")  # async_ppo_gr00t needs Ray
    hints = get_type_hints(module.Args)
    numbers = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", str(hint))}
    of_others = {"task_ids", "since"}  # checked with the suite; a time
    literals = {name for name in numbers if "Literal" in str(hints[name])}
    assert numbers - literals - of_others <= RANGES.keys()
    for args in getattr(module, "PRESETS", {}).values():
        check_ranges(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_steps=0), "num_steps=0 must be at least 1$"),
        (dict(learning_rate=-1e-5), "learning_rate=-1e-05 must be at least 0$"),
        (dict(learning_rate=math.inf), "learning_rate=inf must be at least 0, and finite"),
        (dict(adam_eps=0.0), "adam_eps=0.0 must be more than 0$"),
        (dict(value_clip=0.0), "value_clip=0.0 must be more than 0$"),
        (dict(feature_memory_gb=math.nan), "feature_memory_gb=nan must be at least 0, and a number"),
        (dict(gamma=1.01), r"gamma=1.01 is not in \[0, 1\]"),
        (dict(gamma=math.nan), r"gamma=nan is not in \[0, 1\]"),
        (dict(lr_hold=1.0), r"lr_hold=1.0 is not in \[0, 1\)"),
        (dict(clip_coef=0.0), r"clip_coef=0.0 is not in \(0, 1\]"),
        (dict(dual_clip=1.0), "dual_clip=1.0 must be more than 1$"),
        (dict(update_fraction=0.0), r"update_fraction=0.0 is not in \(0, 1\]"),
        (dict(update_fraction=1.5), r"update_fraction=1.5 is not in \(0, 1\]"),
        (dict(seed=-1), r"seed=-1 is not in \[0, 4294967295\]"),
        (dict(reward_scale=math.inf), "reward_scale=inf must be a finite number"),
        (dict(value_bounds=(0.0, math.nan)), r"value_bounds=\(0.0, nan\) must be a finite number"),
    ],
)
def test_numbers_out_of_range_are_named(changes: dict[str, Any], message: str):
    at_the_bounds = dict(gamma=1.0, gae_lambda=0.0, lr_hold=0.0, clip_coef=1.0, horizon=None, dual_clip=None)
    at_the_bounds |= dict(value_clip=math.inf, max_grad_norm=math.inf, learning_rate=0.0)
    check_ranges(ppo_gr00t.Args(**at_the_bounds))
    with pytest.raises(ValueError, match=message):
        check_ranges(ppo_gr00t.Args(**changes))


def test_groups_that_none_can_be_in_are_refused():
    with pytest.raises(ValueError, match=r"min_group_success=0.9 is more than max_group_success=0.1: no group would"):
        grpo_gr00t.check_args(grpo_gr00t.Args(min_group_success=0.9, max_group_success=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(keep_last=0), "keep_last=0 must be at least 1"),
        (dict(num_envs=0), "num_envs=0 must be at least 1"),
        (dict(num_loader_threads=0), "num_loader_threads=0 must be at least 1"),
        (dict(num_batches_ahead=0), "num_batches_ahead=0 must be at least 1"),
        (dict(lora_rank=-1), "lora_rank=-1 must be at least 0"),
        (dict(warmup_fraction=2.0), r"warmup_fraction=2.0 is not in \[0, 1\]"),
        (dict(learning_rate=-1.0), "learning_rate=-1.0 must be at least 0"),
        (dict(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\) is not in \[0, 1\)"),
        (dict(suite="libero_goal", task_ids=()), r"task_ids=\(\) names no task of libero_goal \(valid: 0-9\)"),
        (dict(suite="libero_10", task_ids=(), eval_episodes_per_task=0), r"task_ids=\(\) names no task of libero_10"),
        (dict(lora_alpha=3.0), "lora_alpha=3.0 has no effect: without --lora-rank there are no adapters"),
        (dict(lora_dropout=0.5), "lora_dropout=0.5 has no effect: without --lora-rank"),
        (dict(lora_rank=4, lora_parts=()), r"lora_parts=\(\) names nothing .* adapters of lora_rank=4"),
        (
            dict(model="nano", statistics="checkpoint"),
            "statistics='checkpoint' .* model='nano' is a preset, .* leave it out, or give a checkpoint as --model",
        ),
    ],
)
def test_fine_tuning_refuses_at_once_what_would_fail_late(changes: dict[str, Any], message: str):
    dataset = str(FOLDER)
    sft_gr00t.check_args(sft_gr00t.Args(dataset=dataset))
    with pytest.raises(ValueError, match=message):
        sft_gr00t.check_args(sft_gr00t.Args(dataset=dataset, **changes))


def test_a_collection_of_no_task_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"task_ids=\(\) names no task of libero_spatial \(valid: 0-9\)"):
        collect_demos.check_args(collect_demos.Args(output=tmp_path, task_ids=()))
    with pytest.raises(ValueError, match=r"init_state_ids=\(\) names none .* or leave --init-state-ids out"):
        collect_demos.check_args(collect_demos.Args(output=tmp_path, init_state_ids=()))


def test_videos_of_an_odd_size_are_refused_before_any_is_recorded(tmp_path: Path):
    collect_demos.check_args(collect_demos.Args(output=tmp_path, image_size=127, storage="image"))
    with pytest.raises(
        ValueError, match=r"image_size=127 is odd, and H\.264 videos need even sizes: give --image-size 128"
    ):
        collect_demos.check_args(collect_demos.Args(output=tmp_path, image_size=127))


@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t])
def test_what_is_due_after_an_iteration(trainer: Any):
    args = trainer.Args(num_iterations=10, save_interval=4, eval_interval=3, keep_best=0)
    iterations = range(1, 11)
    assert [i for i in iterations if args.saves(i)] == [4, 8, 10]
    assert [i for i in iterations if args.evaluates(i)] == [3, 6, 9, 10]
    args.keep_best = 1  # an evaluated iteration may be the best
    assert [i for i in iterations if args.saves(i)] == [3, 4, 6, 8, 9, 10]
    args.save_interval = args.eval_interval = 0
    assert [i for i in iterations if args.saves(i) or args.evaluates(i)] == [10]
    args.eval_episodes_per_task = 0
    assert not args.evaluates(10)


@pytest.mark.parametrize("trainer", [ppo_gr00t, grpo_gr00t, dsrl_gr00t])
def test_what_is_advised_without_a_gpu_is_enough(trainer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    presets = [preset for preset in trainer.PRESETS.values() if preset.physics == "warp"]
    assert presets
    for preset in presets:
        with pytest.raises(ValueError, match=r"finds no CUDA device; .*for example --physics cpu") as raised:
            trainer.check_args(preset)
        advised = re.findall(r"--([a-z-]+) (\d+)", str(raised.value))
        sizes = {name.replace("-", "_"): int(size) for name, size in advised}
        trainer.check_args(replace(preset, physics="cpu", **sizes))


def test_a_fraction_of_the_minibatches_is_advised_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = replace(ppo_gr00t.PRESETS["libero_spatial_nano"], minibatch_size=192, micro_batch_size=192)
    with pytest.raises(ValueError, match=r"--minibatch-size 192 --micro-batch-size 192 --update-fraction 0\.5 --imit"):
        ppo_gr00t.check_args(replace(args, update_fraction=0.25))


def test_a_minibatch_is_advised_with_micro_batches_that_fit_it():
    args = ppo_gr00t.Args(num_envs=8, num_steps=24, minibatch_size=4096, micro_batch_size=128)
    with pytest.raises(ValueError, match=r"--minibatch-size 192 --micro-batch-size 96$"):
        ppo_gr00t.check_args(args)
    ppo_gr00t.check_args(replace(args, minibatch_size=192, micro_batch_size=96))
