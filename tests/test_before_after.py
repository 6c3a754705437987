"""The film of two policies: its size and length, what stays when an episode is over, and that rows begin alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from algorithms.common.video import Frame
from benchmarks.before_after import FINAL_SECONDS, GREEN, LINE_HEIGHT, MARGIN, RED, compose, main

ROOT = Path(__file__).resolve().parents[1]
SIZE = 144
TASK = "pick up the bowl next to the plate and place it on the stove"


def frame(grey: int, step: int, **changes: Any) -> Frame:
    return Frame(
        **(dict(views=[np.full((8, 8, 3), grey, np.uint8)], task=TASK, step=step, reward=0.0, success=False) | changes)
    )


def test_an_episode_that_is_over_keeps_its_last_picture_until_the_longest_is_over():
    first = [frame(40, 0), frame(60, 5), frame(80, 8, success=True, ended=True)]
    second = [frame(40, 0), frame(60, 5), frame(90, 10), frame(120, 15), frame(150, 16, ended=True)]
    pictures = list(compose({"before": [first, first], "after": [first, second]}, ["two tasks"], SIZE))
    assert len(pictures) == 5  # after 0, 5, 10, 15 and 20 steps
    header, tile = 3 * LINE_HEIGHT, SIZE + LINE_HEIGHT  # the task in three lines
    assert {p.shape for p in pictures} == {(header + 2 * tile + LINE_HEIGHT, 2 * SIZE, 3)}
    corners = [(y, x) for y in (header, header + tile) for x in (0, SIZE)]
    tiles = [[picture[y : y + tile, x : x + SIZE] for y, x in corners] for picture in pictures]
    middles = [[int(part[SIZE // 2, SIZE // 2, 0]) for part in parts] for parts in tiles]
    assert middles == [[40] * 4, [60] * 4, [80, 80, 80, 90], [80, 80, 80, 120], [80, 80, 80, 150]]
    for parts in tiles[3:]:
        for part, over in zip(parts[:3], tiles[2][:3], strict=True):
            np.testing.assert_array_equal(part, over)
    for i, colour in enumerate((GREEN, GREEN, GREEN, RED)):
        assert tiles[4][i][MARGIN - 1, MARGIN - 1].tolist() == list(colour)
        assert tiles[1][i][MARGIN - 1, MARGIN - 1].tolist() == [60] * 3


@pytest.mark.slow
def test_a_policy_beside_itself_does_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, path = str(ROOT / "checkpoints" / "libero_spatial_fewshot"), tmp_path / "film.gif"
    options = {"before": checkpoint, "after": checkpoint, "task-ids": 3, "init-state-id": 2, "horizon": 8}
    options |= {"renderer": "warp", "tile-size": SIZE, "output": path}
    main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    *lines, last = capsys.readouterr().out.splitlines()
    assert "before task 3, settled state 2: failure after 8 steps" in lines
    results = json.loads(last)["results"]
    assert [(r["row"], r["task_id"], r["success"], r["length"]) for r in results] == [
        ("before", 3, False, 8),
        ("after", 3, False, 8),
    ]
    with Image.open(path) as film:
        pictures = [np.asarray(picture.convert("RGB")) for picture in ImageSequence.Iterator(film)]
        assert len(pictures) == 3  # after 0, 5 and 8 steps; the last is kept
        assert film.info["duration"] >= 1000 * FINAL_SECONDS
    top, tile = next(y for y in range(len(pictures[0])) if pictures[0][y, -1].max() > 30), SIZE + LINE_HEIGHT
    before, after = ([picture[y : y + SIZE] for picture in pictures] for y in (top, top + tile))
    np.testing.assert_array_equal(before, after)
    assert len({view.tobytes() for view in before}) == 3


@pytest.mark.parametrize("wrong", [["--output", "film.avi"], ["--output", "film.gif", "--tile-size", "97"]])
def test_what_cannot_be_written_is_refused_before_anything_runs(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--after", "nowhere", "--task-ids", "0", *wrong])
    assert "--output must end in .mp4 or .gif, --tile-size be even and at least 144" in capsys.readouterr().err
