"""What a checkpoint says of itself beside its weights: the suite that it was trained on, and how it decides.

Needs no PyTorch, so that what is missing is told at once. Of a hub id only the small files that say it are downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from algorithms.common.args import STATE_MODEL, names_run
from algorithms.common.presets import CHECKPOINTS
from gr00t_agent.config import OTHER_POLICIES, POLICY_FILE, PresetName
from gr00t_agent.files import has_file, naming, read_json, resolve_folder, typed
from libero_gym.tasks.suites import list_suites

# One of them lies in every checkpoint that a trainer has saved; released ones have none.
POLICY_FILES = (POLICY_FILE, *OTHER_POLICIES)
# Settings that a trainer's arguments set whatever the checkpoint says.
OVERRIDDEN = ("num_action_chunks", "denoising_steps")


def trained_on(suite: str | None) -> dict[str, Any] | None:
    """Returns the note that goes with weights that were trained on a suite (None: on nobody knows which)."""
    return None if suite is None else {"suite": suite}


def note_suite(agent: Any, suite: str | None) -> None:
    """Notes in an agent what it is trained on, for its checkpoints; one of one's own need not keep such notes."""
    if hasattr(agent, "trained_on"):
        agent.trained_on = trained_on(suite)


def can_be_evaluated(folder: Path) -> bool:
    """Returns whether eval_gr00t.py loads a trainer's checkpoint: not an agent of one's own, or what steers one."""
    if not folder.is_dir():
        return False
    _, content = _policy_file(str(folder))
    return bool(content) and content.get("base", "not steered") is not None


def suite_of(checkpoint: str) -> str | None:
    """Returns the suite that a checkpoint was trained on; None if it does not say, as released ones and presets.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: what it says is damaged.
    """
    path, content = _policy_file(checkpoint)
    with naming(path):
        note = typed(content.get("trained_on"), dict | None, "trained_on") or {}
        return typed(note.get("suite"), str | None, "trained_on.suite")


def suite_to_play(suite: str | None, *checkpoints: str) -> str:
    """Returns the suite that an evaluation plays: the given one, or the one that all checkpoints were trained on.

    Args:
        suite: `--suite`.
        checkpoints: what is evaluated; none for policies that know no suite.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: neither the arguments nor the checkpoints say it, or these say different ones.
    """
    if suite is not None:
        return suite
    known = {checkpoint: suite_of(checkpoint) for checkpoint in checkpoints}
    suites = set(known.values())
    if len(suites) == 1 and None not in suites:
        return str(suites.pop())
    if suites - {None}:
        told = "; ".join(f"{checkpoint}: {name or 'does not say'}" for checkpoint, name in known.items())
        why = f"the checkpoints were not all trained on the same ({told})"
    elif checkpoints:
        why = f"{', '.join(checkpoints)} does not say which one it was trained on"
    else:
        why = "such a policy does not say which one it was trained on"
    raise ValueError(f"suite is not given, and {why}: give --suite (valid: {', '.join(list_suites())})")


def tell_start(args: Any) -> None:
    """Prints what is easily overlooked in a trainer's arguments, a line for each.

    It is an argument that is not what the checkpoint says, and random weights that begin where they will not succeed.
    Nothing is told of a run that is named to be gone on with.
    """
    if names_run(args):
        return
    if args.model not in (*get_args(PresetName), STATE_MODEL):
        _tell_differences(args)
    elif hasattr(args, "steps_before_success") and not args.steps_before_success:
        name = f"{args.suite}_fewshot"
        start = name if (CHECKPOINTS / name).is_dir() else "libero_spatial_fewshot"
        print(
            f"model={args.model!r} starts from random weights, which hardly ever succeed from the tasks' initial "
            "states: there is no reward to learn from. Take --preset demo, which starts near a goal, or --model "
            f"checkpoints/{start}"
        )


def settings_of(checkpoint: str | Path) -> dict[str, Any]:
    """Returns which of the `OVERRIDDEN` settings a checkpoint says, and their values."""
    path, content = _policy_file(str(checkpoint))
    policy: dict[str, Any] = typed(content.get("policy", {}), dict, f"{path}: policy")
    return {name: policy[name] for name in OVERRIDDEN if name in policy}


def _tell_differences(args: Any) -> None:
    saved = settings_of(args.model) | {"suite": suite_of(args.model)}
    for name, value in saved.items():
        given = getattr(args, name)
        if None not in (value, given) and value != given:
            flag = name.replace("_", "-")
            print(f"{name}={given}, but {args.model} says {value}: --{flag} {value} keeps what it was trained with")


def _policy_file(checkpoint: str) -> tuple[Path, dict[str, Any]]:
    """Returns the file that tells how a checkpoint is used, and its content, {} where there is none."""
    if checkpoint in get_args(PresetName):
        return Path(checkpoint), {}
    hint = "for example checkpoints/libero_spatial_rl"
    folder = resolve_folder("checkpoint", checkpoint, hint, allow_patterns=list(POLICY_FILES))
    for name in POLICY_FILES:
        if has_file(folder / name):
            return folder / name, read_json(folder / name)
    return folder, {}
