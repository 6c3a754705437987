"""What every benchmark prints and writes: a table, verdicts on targets, one JSON document on the last line."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks.command_line import make_parser
from benchmarks.publish import Table, judge, publish

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in p.read_text())


def test_rows_stand_under_their_titles(capsys: pytest.CaptureFixture[str]):
    table = Table({"task": "<8", "ms": ">7.2f", "count": ">6"})
    table.add("a", 1.234, 12)
    table.add("longer", "-", None)
    assert capsys.readouterr().out.splitlines() == [
        "task         ms count",
        "a          1.23    12",
        "longer        -      ",
    ]
    with pytest.raises(ValueError, match="format '8' of 'task' must begin with <, > or"):
        Table({"task": "8"})
    with pytest.raises(ValueError, match="longer than"):
        table.add("a", 1.0)


def test_targets_hold_at_their_bounds():
    values = {"speedup": 2.0, "ms": 5.0, "slow": 6.0, "untouched": 1.0}
    judged = judge(values, at_least={"speedup": 2.0}, at_most={"ms": 5.0, "slow": 5.0})
    assert judged == {
        "speedup": {"value": 2.0, "target": 2.0, "holds": True},
        "ms": {"value": 5.0, "target": 5.0, "holds": True},
        "slow": {"value": 6.0, "target": 5.0, "holds": False},
    }
    assert not judge({"speedup": 1.9}, at_least={"speedup": 2.0})["speedup"]["holds"]
    with pytest.raises(KeyError, match="speed"):
        judge({}, at_least={"speed": 1.0})


def test_the_last_line_and_the_file_are_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "result.json"
    targets = judge({"ms": 6.0, "speedup": 2.5}, at_least={"speedup": 2.0}, at_most={"ms": 5.0})
    document = publish("some", {"ms": 6.0}, settings={"size": 3}, targets=targets, output=path)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == ["target speedup: 2.5, aimed at 2: holds", "target ms: 6, aimed at 5: missed"]
    assert json.loads(last) == json.loads(path.read_text()) == document
    assert list(document) == ["benchmark", "commit", "python", "versions", "hardware", "settings", "results", "targets"]
    assert (document["benchmark"], document["settings"], document["targets"]) == ("some", {"size": 3}, targets)


def test_every_parser_takes_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = make_parser("What it does:\n    in two lines")
    assert parser.parse_args(["--output", str(tmp_path)]).output == tmp_path
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "What it does:\n    in two lines" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_benchmark(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    module = importlib.import_module(f"benchmarks.{script}")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out
