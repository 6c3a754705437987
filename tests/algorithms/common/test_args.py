"""What PPO and GRPO repeat on purpose stays the same in both files, and bad arguments are refused."""

import ast
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from algorithms import grpo_gr00t, ppo_gr00t
from algorithms.common.args import check_at_least

FOLDER = Path(ppo_gr00t.__file__).parent
# What differs between the two on purpose.
OWN_DEFAULTS = {"run_name", "update_epochs", "clip_coef_high"}
OWN_FUNCTIONS = {"check_args", "make_envs", "make_agent", "main"}


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
        assert help_text == other_help, name
        assert (default != other_default) == (name in OWN_DEFAULTS), name


def test_a_function_of_both_trainers_is_the_same_in_both():
    ppo, grpo = functions("ppo"), functions("grpo")
    shared = ppo.keys() & grpo.keys()
    assert {
        "policy_loss",
        "divergence",
        "of_executed",
        "mean_of_executed",
        "sum_per_decision",
        "evaluates",
        "saves",
        "score",
    } <= shared
    assert {name for name in shared if ppo[name] != grpo[name]} == OWN_FUNCTIONS


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
    ],
)
def test_arguments_that_would_fail_late_are_refused(trainer: Any, changes: dict[str, Any], message: str):
    trainer.check_args(trainer.Args())
    with pytest.raises(ValueError, match=message):
        trainer.check_args(trainer.Args(**changes))


def test_the_first_argument_out_of_range_is_named():
    check_at_least(ppo_gr00t.Args(), 1, "num_envs", "num_steps")
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        check_at_least(ppo_gr00t.Args(num_steps=0), 1, "num_envs", "num_steps")


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
