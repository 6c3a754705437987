"""What benchmarks of whole iterations have in common: sizes that fit, rows that fail, and rates."""

from collections.abc import Callable
from typing import Any

import pytest

from algorithms.ppo_gr00t import PRESETS, Args
from benchmarks.iterations import check_shares, describe_sizes, measure_rows, resized, summarise


@pytest.mark.parametrize(
    ("preset", "given", "minibatch_size", "micro_batch_size"),
    [
        ("libero_spatial_rlinf", dict(num_steps=24), 768, 64),  # of 1,536
        ("libero_spatial_rlinf", dict(num_steps=8), 512, 64),
        ("libero_spatial_rlinf", dict(), 1024, 64),
        ("libero_spatial_rlinf", dict(num_steps=24, micro_batch_size=100), 768, 96),
        ("libero_spatial_rlinf", dict(num_envs=128, num_steps=10, minibatch_size=300), 256, 64),
        ("libero_spatial_rlinf", dict(num_envs=9, num_steps=25), 225, 45),
        ("libero_spatial_nano", dict(num_envs=2048, num_steps=12), 4096, 4096),
        ("libero_spatial_nano", dict(num_envs=1024, num_steps=5), 2560, 2560),
        ("demo", dict(num_envs=7, num_steps=1), 7, 7),
    ],
)
def test_batches_are_the_largest_that_fit(
    preset: str, given: dict[str, int], minibatch_size: int, micro_batch_size: int
):
    args = resized(PRESETS[preset], **given)
    assert (args.minibatch_size, args.micro_batch_size) == (minibatch_size, micro_batch_size)
    assert args.num_minibatches * args.num_micro_batches * micro_batch_size == args.num_decisions
    assert args.update_epochs == PRESETS[preset].update_epochs


def test_sizes_are_told():
    told = describe_sizes(resized(PRESETS["libero_spatial_nano"], num_steps=24))
    assert told == "1,024 environments x 24 decisions, minibatches of 4,096, micro-batches of 4,096"


@pytest.mark.parametrize("name", ["num_envs", "num_steps", "micro_batch_size"])
def test_a_size_of_nothing_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        resized(PRESETS["demo"], **{name: 0})


def test_processes_and_stages_have_equal_shares():
    args = Args(num_envs=12, micro_batch_size=24, pipeline_stage_num=2)
    for number in (1, 2, 3, 6):
        check_shares(args, number)
    with pytest.raises(ValueError, match=r"num_envs=12 cannot be shared by 4 process\(es\) of 2 stages: give .* of 8"):
        check_shares(args, 4)
    with pytest.raises(ValueError, match="micro_batch_size=24 cannot be shared by 5"):
        check_shares(args, 5)


def raises(error: BaseException) -> Callable[[], dict[str, Any]]:
    def measure() -> dict[str, Any]:
        raise error

    return measure


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(130)])
def test_rows_are_kept_where_others_fail_or_are_interrupted(stop: BaseException, capsys: pytest.CaptureFixture[str]):
    rows: list[tuple[str, int]] = []
    failures = measure_rows(
        [
            ("a", lambda: {"value": 1}),
            ("b", raises(RuntimeError("out of memory"))),
            ("c", lambda: {"value": 3}),
            ("d", raises(stop)),
            ("e", lambda: {"value": 5}),
        ],
        lambda name, row: rows.append((name, row["value"])),
    )
    assert rows == [("a", 1), ("c", 3)]
    assert failures == ["b: out of memory", "interrupted in 'd'"]
    assert capsys.readouterr().out == "b: failed; out of memory\n"


def test_rates_are_of_all_counted_steps_and_seconds():
    lines = [{"time/total_s": 2.0, "charts/SPS": 100.0}, {"time/total_s": 6.0, "charts/SPS": 20.0, "time/env_s": 1.0}]
    summary = summarise(lines)
    assert summary["env_steps_per_s"] == (200 + 120) / 8
    assert summary["total_s"] == 4
    assert summary["env_s"] is None  # the trainer has it not
