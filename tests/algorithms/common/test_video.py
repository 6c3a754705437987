"""Videos: what browsers play, the right picture at the right moment, and what a trainer's recorder films."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from algorithms.common.video import (
    CAPTION_HEIGHT,
    IMAGE_KEYS,
    TASK_KEY,
    VIEW_SIZE,
    Frame,
    RolloutRecorder,
    picture_of,
    read_pictures,
    write_pictures,
    write_tiled_video,
    write_video,
)  # fmt: skip

FAILURE_RED, SUCCESS_GREEN = 0, 1


def plain(value: int, size: int = 32, **changes: Any) -> Frame:
    """Two views of one grey."""
    views = [np.full((size, size, 3), value, np.uint8)] * 2
    return Frame(**(dict(views=views, task="open the drawer", step=5, reward=0.0, success=False) | changes))


def decode(path: Path) -> tuple[Any, np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        facts = (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate)
    return facts, frames


def greys(frames: np.ndarray, corners: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The grey at some places (y, x) of every frame, rounded to tens against compression."""
    return [[round(int(frame[y, x].mean()), -1) for y, x in corners] for frame in frames]


def test_an_episode_is_h264_that_browsers_play(tmp_path: Path):
    frames = [plain(value, step=5 * i) for i, value in enumerate((40, 90, 140))]
    write_video(tmp_path / "new" / "episode.mp4", frames, fps=4)
    facts, decoded = decode(tmp_path / "new" / "episode.mp4")
    assert facts == ("h264", "yuv420p", 4)
    assert decoded.shape == (3, VIEW_SIZE + CAPTION_HEIGHT, 2 * VIEW_SIZE, 3)
    assert greys(decoded, [(100, 100), (100, 400)]) == [[40, 40], [90, 90], [140, 140]]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["episode.mp4"]
    with pytest.raises(ValueError, match="at least one picture"):
        write_video(tmp_path / "none.mp4", [], fps=4)
    with pytest.raises(ValueError, match=r"of one size, but \(304, 512, 3\) is followed by \(304, 256, 3\)"):
        write_video(tmp_path / "none.mp4", [plain(0), plain(0, views=plain(0).views[:1])], fps=4)
    assert not (tmp_path / "none.mp4").exists()


def test_films_leave_no_threads_and_the_collector_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A collection takes half a second of a trainer, whose imports made a million objects."""

    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    monkeypatch.setattr(gc, "collect", lambda *generation: pytest.fail("the collector was called"))
    before = num_threads()
    write_video(tmp_path / "episode.mp4", [plain(40), plain(90)], fps=4)
    assert len(list(read_pictures(tmp_path / "episode.mp4"))) == 2
    assert num_threads() == before


def test_an_interrupted_encoding_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "episode.mp4"
    write_video(path, [plain(40)], fps=4)
    before = path.read_bytes()
    broken = plain(40, views=[np.zeros((4, 4, 3), np.complex64)] * 2)
    with pytest.raises(TypeError, match="Cannot handle this data type"):
        write_video(path, [plain(90), broken], fps=4)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_gif_shows_every_picture_for_its_time_in_its_colours(tmp_path: Path):
    path = tmp_path / "new" / "film.gif"
    colours = [(200, 30, 30), (30, 160, 60), (20, 20, 20)]
    pictures = [np.full((21, 33, 3), 128, np.uint8) for _ in colours]  # odd sizes, which mp4 could not have
    for picture, colour in zip(pictures, colours, strict=True):
        picture[:, :10] = colour
    write_pictures(path, pictures, fps=8)
    with Image.open(path) as film:
        assert (film.size, film.n_frames, film.info["loop"]) == ((33, 21), 3, 0)
        for frame, picture in zip(ImageSequence.Iterator(film), pictures, strict=True):
            np.testing.assert_allclose(np.asarray(frame.convert("RGB"), np.int64), picture, atol=4)
            assert frame.info["duration"] == 120  # hundredths of a second, of 125 ms
    assert [file.name for file in path.parent.iterdir()] == ["film.gif"]
    with pytest.raises(ValueError, match=r"'.avi' \(valid: .mp4, .gif\)"):
        write_pictures(tmp_path / "film.avi", pictures, fps=8)
    with pytest.raises(ValueError, match="at least one picture"):
        write_pictures(tmp_path / "film.gif", [], fps=8)


def film(*values: int, view_size: int = 64) -> list[np.ndarray]:
    """Pictures of plain greys with two views."""
    return [picture_of(plain(value), view_size) for value in values]


def test_tiles_of_a_gif_change_with_time(tmp_path: Path):
    write_tiled_video(tmp_path / "tiles.gif", [film(40, 90, 140), film(200)], fps=4, columns=2)
    with Image.open(tmp_path / "tiles.gif") as shown:
        pictures = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(shown)]
    assert greys(np.stack(pictures), [(30, 30), (30, 128 + 30)]) == [[40, 200], [90, 200], [140, 200]]


def test_captions_tell_the_outcome_and_fit():
    def ground(frame: Frame) -> np.ndarray:
        return picture_of(frame, 64)[-1, 0]

    assert not ground(plain(0)).any()
    assert ground(plain(0, success=True)).argmax() == SUCCESS_GREEN
    assert ground(plain(0, ended=True)).argmax() == FAILURE_RED
    assert ground(plain(0, ended=True, success=True)).argmax() == SUCCESS_GREEN
    written = [
        picture_of(plain(0, **text)) for text in ({}, {"step": 6}, {"reward": 1.0}, {"task": "close the drawer"})
    ]
    assert all((written[0] != other).any() for other in written[1:])
    long = picture_of(plain(0, task="put both the alphabet soup and the tomato sauce in the basket " * 3))
    assert not long[VIEW_SIZE:, -4:].any()  # the instruction is cut before the picture's edge


def test_tiles_start_together_and_keep_their_last_frame(tmp_path: Path):
    films = [film(40, 60, 80), film(200), film(120, 140)]
    write_tiled_video(tmp_path / "tiles.mp4", films, fps=2, columns=2)
    facts, decoded = decode(tmp_path / "tiles.mp4")
    height = 64 + CAPTION_HEIGHT
    assert facts == ("h264", "yuv420p", 2)
    assert decoded.shape == (3, 2 * height, 2 * 128, 3)
    corners = [(20, 20), (20, 148), (height + 20, 20), (height + 20, 148)]
    assert greys(decoded, corners) == [[40, 200, 120, 0], [60, 200, 140, 0], [80, 200, 140, 0]]


def test_films_of_other_days_are_tiled_with_new_ones_and_shrunk(tmp_path: Path):
    write_video(tmp_path / "old.mp4", [plain(200)], fps=2.5)
    films = [film(40, 60, view_size=256), read_pictures(tmp_path / "old.mp4"), film(120, 140, 160, view_size=256)]
    write_tiled_video(tmp_path / "tiles.mp4", films, fps=2.5, columns=3, width=768)
    facts, decoded = decode(tmp_path / "tiles.mp4")
    assert facts == ("h264", "yuv420p", 2.5)
    assert decoded.shape == (3, 152, 768, 3)
    assert greys(decoded, [(50, 50), (50, 306), (50, 562)]) == [[40, 200, 120], [60, 200, 140], [60, 200, 160]]


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (2, 2), (4, 2), (6, 3), (10, 4), (16, 4)])
def test_tiles_fill_about_16_by_9(tmp_path: Path, number: int, columns: int):
    write_tiled_video(tmp_path / "tiles.mp4", [film(0, view_size=192)] * number, fps=2)
    _, decoded = decode(tmp_path / "tiles.mp4")
    assert decoded.shape[1:3] == (-(-number // columns) * 240, columns * 384)


@pytest.mark.parametrize(
    ("films", "options", "message"),
    [
        ([], {}, r"at least one picture"),
        ([film(0), []], {}, r"at least one each \(given: \[\(112, 128, 3\), None\]\)"),
        ([film(0), film(0, view_size=32)], {}, r"given: \[\(112, 128, 3\), \(80, 64, 3\)\]"),
        ([film(0, 1), [*film(0), *film(0, view_size=32)]], {}, r"given: \[\(112, 128, 3\), \(80, 64, 3\)\]"),
        ([film(0)], {"columns": 0}, r"columns=0 must be at least 1"),
    ],
)
def test_tiles_that_cannot_be(tmp_path: Path, films: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        write_tiled_video(tmp_path / "tiles.mp4", films, fps=2, **options)
    assert not list(tmp_path.iterdir())


def step_of(values: Sequence[int], lengths: Sequence[int], *, as_torch: bool = False) -> tuple[Any, Any]:
    """Observation and infos of len(values) environments that show plain greys."""
    images: Any = np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])
    images = torch.from_numpy(images) if as_torch else images
    obs = dict.fromkeys(IMAGE_KEYS, images) | {TASK_KEY: np.array(["open the drawer"] * len(values))}
    count = len(values)
    infos = dict(
        episode_length=np.array(lengths), episode_return=np.zeros(count), success=np.zeros(count, bool)
    )  # fmt: skip
    return obs, infos


@pytest.mark.parametrize("as_torch", [False, True])
def test_a_rollout_is_filmed_across_automatic_resets(tmp_path: Path, as_torch: bool):
    recorder = RolloutRecorder(tmp_path, num_envs=2, interval=3, fps=4)
    running = np.zeros(3, bool)
    recorder.add(1, *step_of((50, 100, 0), (5, 5, 5), as_torch=as_torch), running)
    obs, infos = step_of((60, 10, 0), (10, 0, 10), as_torch=as_torch)  # the second began anew in the same step
    infos["final_obs"], infos["final_info"] = step_of((60, 150, 0), (10, 10, 10), as_torch=as_torch)
    infos["final_info"]["success"][1] = True
    recorder.add(1, obs, infos, np.array([False, True, False]))
    recorder.add(1, *step_of((70, 20, 0), (15, 5, 15), as_torch=as_torch), running)
    path = recorder.write(1)
    assert path == tmp_path / "rollout_1.mp4"
    _, decoded = decode(path)
    assert greys(decoded, [(50, 50), (50, 384 + 50)]) == [[50, 100], [60, 150], [70, 20]]
    caption = decoded[:, -2, 384].astype(int)
    assert [int(colour.argmax()) for colour in caption if colour.max() > 40] == [SUCCESS_GREEN]
    assert recorder.write(1) is None


def test_only_every_so_many_iterations_are_filmed(tmp_path: Path):
    recorder = RolloutRecorder(tmp_path, num_envs=8, interval=3, fps=4)  # more than there are: all
    never = RolloutRecorder(tmp_path / "never", num_envs=1, interval=0, fps=4)
    for iteration in range(1, 8):
        for film in (recorder, never):
            film.add(iteration, *step_of((50, 60), (5, 5)), np.zeros(2, bool))
            film.write(iteration)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rollout_{i}.mp4" for i in (1, 4, 7)]


def test_recorder_refuses_bad_numbers(tmp_path: Path):
    with pytest.raises(ValueError, match=r"num_envs=0 must be at least 1"):
        RolloutRecorder(tmp_path, num_envs=0, interval=1, fps=4)
    with pytest.raises(ValueError, match=r"interval=-1 at least 0"):
        RolloutRecorder(tmp_path, num_envs=1, interval=-1, fps=4)


def test_frames_do_not_change_with_the_environments_memory(tmp_path: Path):
    recorder = RolloutRecorder(tmp_path, num_envs=1, interval=1, fps=4)
    obs, infos = step_of((50,), (5,))
    recorder.add(1, obs, infos, np.zeros(1, bool))
    obs[IMAGE_KEYS[0]][:] = 200
    path = recorder.write(1)
    assert path is not None
    assert greys(decode(path)[1], [(50, 50)]) == [[50]]
