"""The film of two policies: what is on it at which step, and that it ends with all episodes over."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from algorithms.video import Frame, write_pictures
from benchmarks.before_after import BORDER, GREEN, LINE_HEIGHT, RED, compose, main

SIZE = 64


def episode(length: int, *, success: bool) -> list[Frame]:
    """Frames five steps apart, whose grey level is their step."""
    return [
        Frame(
            views=[np.full((8, 8, 3), step, np.uint8)], task="move", step=step, reward=0.0,
            success=success and step == length, ended=step == length,
        )
        for step in range(0, length + 1, 5)
    ]  # fmt: skip


def test_an_episode_that_is_over_keeps_its_last_picture_in_a_frame():
    rows = {"before": [episode(20, success=False)], "after": [episode(10, success=True)]}
    pictures = list(compose(rows, "a film", 5, SIZE))
    assert len(pictures) == 5
    tops = {"before": LINE_HEIGHT, "after": 2 * LINE_HEIGHT + SIZE}

    def seen(step: int, name: str) -> tuple[int, tuple[int, ...]]:
        tile = pictures[step // 5][tops[name] : tops[name] + SIZE]
        return int(tile[SIZE // 2, SIZE // 2, 0]), tuple(tile[BORDER // 2, SIZE // 2].tolist())

    assert seen(5, "before") == (5, (5, 5, 5))
    assert seen(5, "after") == (5, (5, 5, 5))
    assert seen(10, "after") == seen(20, "after") == (10, GREEN)
    assert seen(15, "before") == (15, (15, 15, 15))
    assert seen(20, "before") == (20, RED)


def test_a_gif_keeps_time_and_colours(tmp_path: Path):
    levels = (0, 200, 40, 250)
    pictures = [np.full((16, 24, 3), level, np.uint8) for level in levels]
    write_pictures(tmp_path / "film.gif", pictures, fps=8)
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.size, film.info["loop"]) == (4, (24, 16), 0)  # pyright: ignore
        for i, level in enumerate(levels):
            film.seek(i)
            assert film.info["duration"] == 120  # hundredths of a second are whole
            np.testing.assert_allclose(np.asarray(film.convert("RGB"))[8, 12], level, atol=4)
    with pytest.raises(ValueError, match="at least one picture"):
        write_pictures(tmp_path / "empty.gif", [], fps=8)
    with pytest.raises(ValueError, match=r"film.webm ends in '.webm' \(valid: .mp4, .gif\)"):
        write_pictures(tmp_path / "film.webm", pictures, fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif"]


@pytest.mark.slow
def test_both_policies_play_the_same_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--task-ids", "5", "--horizon", "10", "--init-state-id", "3", "--tile-size", str(SIZE)]
    main(["--after", "checkpoints/libero_spatial_rl", *options, "--output", str(tmp_path / "film.gif")])
    output = capsys.readouterr().out.splitlines()
    document = json.loads(output[-1])
    assert document["protocol"]["init_states"] == "settled"
    for result in document["results"]:
        (played,) = result["episodes"]
        assert (played["task_id"], played["init_state_id"], played["length"]) == (5, 3, 10)
    before, after = (result["weights_sha256"] for result in document["results"])
    assert before != after
    with Image.open(tmp_path / "film.gif") as film:
        assert film.size[0] == SIZE
        assert film.n_frames >= 3  # pyright: ignore
