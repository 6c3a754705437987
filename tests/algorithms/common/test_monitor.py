"""The terminal view: success by task, in a terminal and in a log."""

import pytest
from rich.console import Console

from algorithms.common.monitor import TrainingProgress, describe_iteration, describe_tasks


def test_many_tasks_show_those_that_fail_most():
    assert describe_tasks({0: 1.0, 3: 0.5}) == "by task: 0 100%  3 50%"
    rates = dict.fromkeys(range(90), 0.9) | {17: 0.0, 4: 0.25}
    text = describe_tasks(rates)
    assert text.startswith("lowest of 90 tasks: ")
    assert "17 0%" in text
    assert "4 25%" in text
    assert text.count("%") == 10


def test_an_iteration_is_told_by_what_it_has():
    metrics = {"env/success_once": 0.5, "charts/SPS": 123.4}
    assert describe_iteration(metrics) == "success 50.0%  no update  123 env-steps/s"
    metrics |= {"actor/loss": 0.1, "actor/value_loss": 0.25, "actor/approx_kl": 0.0123}
    ppo = "success 50.0%  loss 0.1000  value loss 0.2500  kl 0.012  123 env-steps/s"
    assert describe_iteration(metrics | {"actor/imitation_loss": 0.0}) == ppo
    imitating = ppo.replace("  kl", "  imitation loss 0.0500  kl")
    assert describe_iteration(metrics | {"actor/imitation_loss": 0.05}) == imitating
    del metrics["env/success_once"], metrics["actor/value_loss"]
    metrics["rollout/groups_kept"] = 0.75
    grpo = (
        "success - (not all of the first episodes have ended)  groups kept 75%  loss 0.1000  kl 0.012  123 env-steps/s"
    )
    assert describe_iteration(metrics) == grpo


def test_a_log_has_two_lines_an_iteration(capsys: pytest.CaptureFixture[str]):
    with TrainingProgress(1, [1, 1], enabled=True) as progress:
        progress.decision(100.0)
        progress.update()
        progress.end_iteration("success 50.0%", {"env/success_once_task_3": 0.5, "env/success_once": 0.5})
        progress.end_iteration("success - (not all of the first episodes have ended)", {})
    assert capsys.readouterr().out.splitlines() == [
        "iteration 1/2  success 50.0%",
        "  by task: 3 50%",
        "iteration 2/2  success - (not all of the first episodes have ended)",
    ]


def test_progress_counts_the_updates_of_each_iteration(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("algorithms.common.monitor.TOLD_EVERY_S", -1.0)
    console = Console(width=120, record=True, force_terminal=False)
    monkeypatch.setattr("algorithms.common.monitor.Console", lambda **_: console)
    progress = TrainingProgress(2, [6, 1, 1], enabled=True)
    (task,) = progress._bar.tasks
    assert task.total == 6 + 3 * 2 + 2
    progress.decision(100.0)
    progress.end_iteration("", {})
    assert task.completed == 8
    progress.decision(100.0)
    progress.skip(2)
    assert task.completed == 11
    text = console.export_text()
    assert "iteration 1/3 rollout 1/8" in text
    assert "iteration 2/3 rollout 1/3" in text


def test_a_terminal_shows_tasks_below_the_bar(monkeypatch: pytest.MonkeyPatch):
    terminal = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr("algorithms.common.monitor.Console", lambda **_: terminal)
    with TrainingProgress(2, [1, 1], enabled=True) as progress:
        rates = {"env/success_once_task_3": 0.5, "env/success_once_task_8": 0.0}
        progress.end_iteration("", {"env/success_once": 0.25} | rates)
        progress.decision(100.0)
    text = terminal.export_text()
    assert "success 25.0%  100 env-steps/s" in text
    assert "by task: 3 50%  8 0%" in text


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]):
    with TrainingProgress(1, [1], enabled=False) as progress:
        progress.decision(100.0)
        progress.end_iteration("success 50.0%", {"env/success_once_task_3": 0.5, "env/success_once": 0.5})
    assert capsys.readouterr().out == ""
