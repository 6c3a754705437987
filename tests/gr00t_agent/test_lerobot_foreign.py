"""Datasets of other writers: what they say is read right, or refused with file, field, found and expected."""

import json
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gr00t_agent import DataConfig
from gr00t_agent.lerobot import LeRobotDataset, VideoFile
from gr00t_agent.lerobot_writer import Recording, assemble_dataset, stage_episode
from tests.gr00t_agent.foreign_data import (
    HEIGHT,
    TASKS,
    WIDTH,
    Foreign,
    frame_of,
    instructions,
    picture,
    png,
    shown,
    write_video,
)
from tests.gr00t_agent.lerobot_data import CAMERAS, edit_json, make_episode, modality

VERSIONS = ("v2.1", "v3.0")
EVERY_ROW = [list(range(12)), list(range(9))]
LANGUAGE = "annotation.human.action.task_description"


def refused(folder: Path, message: str, *, error: type[Exception] = ValueError, frame: int | None = None) -> None:
    """Checks that a dataset, or one of its frames, is refused with this message, which names a file of it."""
    frames = np.array([] if frame is None else [frame], int)
    with pytest.raises(error, match=message) as caught:
        LeRobotDataset(folder).images(frames)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("storage", ["video", "image"])
def test_a_plain_dataset_is_read(version, storage, tmp_path):
    foreign = Foreign(version, storage=storage)
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == EVERY_ROW
    assert instructions(dataset) == list(TASKS)
    states = [row for columns in foreign.columns for row in columns["observation.state"].to_pylist()]
    np.testing.assert_array_equal(dataset.batch(np.arange(21)).obs["state.gripper"], np.float32(states)[:, 6:])


# -- frames belong to rows by their timestamps -------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kept", "shift"),
    [([0, 3, 4, 7, 8, 11], 0), ([0, 2, 4, 6, 8, 10], 0), ([3, 4, 5], 0), ([0, 1, 2, 3], 3), ([5], 0), ([2, 5], 0.2)],
)
def test_filtered_subsampled_and_shifted_rows_keep_their_frames(version, kept, shift, tmp_path):
    foreign = Foreign(version)
    foreign.keep(kept, shift=shift)
    expected = [[k + round(shift) for k in kept if k < length] for length in (12, 9)]
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == expected
    assert frame_of(dataset.images(np.array([len(dataset) - 1]))[0, 0].numpy()) == (1, expected[1][-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_out_of_order_are_read_by_frame_index(version, tmp_path):
    foreign = Foreign(version)
    for columns in foreign.columns:
        order = np.random.default_rng(0).permutation(len(columns["action"]))
        columns.update({name: column.take(order) for name, column in columns.items()})
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == EVERY_ROW
    assert dataset.batch(np.array([3])).actions[0, 0].tolist() == Foreign().columns[0]["action"][3].as_py()


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_at_half_the_rate_of_the_video(version, tmp_path):
    foreign = Foreign(version, fps=10, lengths=(6, 4), frames=(12, 8), video_fps=20)
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == [[0, 2, 4, 6, 8, 10], [0, 2, 4, 6]]


@pytest.mark.parametrize(("fps", "video_fps", "lengths"), [(10, 20, (12, 9)), (29, 30, (40, 40)), (20, 10, (12, 9))])
def test_rates_that_disagree_are_both_named(fps, video_fps, lengths, tmp_path):
    folder = Foreign(fps=fps, video_fps=video_fps, lengths=lengths).write(tmp_path / "d")
    for frame in (0, 3):
        refused(folder, rf"episode_000000.mp4 .* it has {video_fps} frames a second, .* fps={fps}", frame=frame)


@pytest.mark.parametrize(
    ("fps", "message"),
    [
        (7, r"'timestamp' has a row every 0.05 s in episode 0, .*info.json says fps=7"),
        (15, r"'timestamp' has a row every 0.05 s in episode 0, .*info.json says fps=15"),
        (25, r"mp4 has not the rate of its rows; it has 20 frames a second, the dataset's info.json says fps=25"),
        (40, r"mp4 has not the rate of its rows; it has 20 frames a second, the dataset's info.json says fps=40"),
    ],
)
def test_a_rate_that_is_neither_that_of_the_rows_nor_of_the_video(fps, message, tmp_path):
    foreign = Foreign()
    foreign.info["fps"] = fps
    refused(foreign.write(tmp_path / "d"), message, frame=0)


def test_rows_and_frames_at_uneven_times(tmp_path):
    foreign = Foreign()
    foreign.ticks = np.cumsum([0, 1, 3, 1, 2, 5, 1, 1, 4, 2, 1, 3]).tolist()
    for columns in foreign.columns:
        columns["timestamp"] = pa.array(np.array(foreign.ticks[: len(columns["action"])]) / 20)
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == EVERY_ROW


def test_timestamps_may_differ_a_little_from_their_frames(tmp_path):
    for offset, is_near in ((0.2, True), (-0.2, True), (0.3, False), (-0.4, False)):
        foreign = Foreign()
        foreign.set_column("timestamp", lambda times, by=offset: pa.array([t + by / 20 * (t > 0.22) for t in times]))
        folder = foreign.write(tmp_path / f"{offset}")
        if is_near:
            assert shown(LeRobotDataset(folder)) == EVERY_ROW
        else:
            refused(folder, r"episode_000000.mp4 has no frame 5 \(0.2.. s\), the nearest is at 0.250 s", frame=0)


def test_a_video_that_starts_late(tmp_path):
    foreign = Foreign()
    foreign.ticks = list(range(5, 17))
    refused(foreign.write(tmp_path / "d"), r"has no frame 0 \(0.000 s\)", frame=0)
    foreign.set_column("timestamp", lambda times: pa.array([t + 0.25 for t in times]))
    assert shown(LeRobotDataset(foreign.write(tmp_path / "late"))) == EVERY_ROW


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: pa.array([0.0] * len(t)), r"'timestamp' goes from 0.000 to 0.000 s in rows 0 and 1 of episode 0"),
        (lambda t: pa.array(t[::-1]), r"'timestamp' goes from .* must increase with frame_index"),
        (lambda t: pa.array([None, *t[1:]]), r"'timestamp' is null in row 0"),
        (lambda t: pa.array([*t[:2], float("nan"), *t[3:]]), r"'timestamp' is not finite in row 2"),
        (lambda t: pa.array([[x, x] for x in t]), r"'timestamp' has 2 elements a row; it must have 1"),
        (lambda t: pa.array([int(x * 1e6) for x in t], pa.timestamp("us")), r"'timestamp' holds timestamp\[us\]"),
        (lambda t: pa.array([1000 * x for x in t]), r"mp4 ends before frame 11 \(550.000 s\)"),
        (lambda t: pa.array([0, 0.01, *t[2:]]), r"shows one picture for frames 0 and 1 \(0.000 and 0.010 s\)"),
        (lambda t: pa.array([x - 0.3 for x in t]), r"'timestamp' is -0.300 s in row 0, which is at -0.300 s of"),
    ],
)
def test_timestamps_that_cannot_be_used(make, message, tmp_path):
    foreign = Foreign()
    foreign.set_column("timestamp", make)
    refused(foreign.write(tmp_path / "d"), message, frame=0)


def test_timestamps_are_needed_by_videos_only(tmp_path):
    foreign, images = Foreign(), Foreign(storage="image")
    for columns in (*foreign.columns, *images.columns):
        del columns["timestamp"]
    refused(foreign.write(tmp_path / "d"), r"episode_000000.parquet is damaged \(No match for one column timestamp")
    assert shown(LeRobotDataset(images.write(tmp_path / "images"))) == EVERY_ROW


def test_an_episodes_rows_do_not_reach_into_the_next_one(tmp_path):
    on_and_on, shifted = Foreign("v3.0"), Foreign("v3.0")
    # They go on from the episode before.
    on_and_on.columns[1]["timestamp"] = pa.array(np.arange(12, 21) / 20, pa.float32())
    refused(on_and_on.write(tmp_path / "on"), r"'timestamp' is 0.600 s in row 12, which is at 1.200 s of", frame=12)
    shifted.keep(list(range(12)), shift=1)
    message = (
        r"'timestamp' is 0.600 s in row 11, which is at 0.600 s of .* episode 0 has the frames from 0.000 to 0.600 s"
    )
    refused(shifted.write(tmp_path / "shifted"), message, frame=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"from_timestamp": 0.0, "to_timestamp": 0.6}, r"episode 0 \(12 .* 0.000 s\) and episode 1 .* same frames"),
        ({"from_timestamp": 0.0, "to_timestamp": None}, r"episode 0 .* and episode 1 \(from 0.000 s\) .* same"),
        ({"from_timestamp": float("nan")}, r"row 1: videos/.*/from_timestamp is nan; it must be a finite number"),
        ({"from_timestamp": None}, r"row 1: videos/.*/from_timestamp is None; it must be a finite number"),
        ({"from_timestamp": 0.6, "to_timestamp": 0.1}, r"is from 0.6 to 0.1 s, which is no span of a video"),
        ({"file_index": 0.5}, r"row 1: videos/.*/file_index is 0.5; it must be a whole number"),
    ],
)
def test_places_in_videos_that_cannot_be(edit, message, tmp_path):
    foreign = Foreign("v3.0")
    foreign.episodes[1] |= {f"videos/{camera}/{name}": value for camera in CAMERAS for name, value in edit.items()}
    refused(foreign.write(tmp_path / "d"), message)


def test_ends_of_episodes_may_be_missing_or_the_last_frames(tmp_path):
    for name, end_s in (("missing", (None, None)), ("last", (11 / 20, 20 / 20))):
        foreign = Foreign("v3.0")
        for row, end in zip(foreign.episodes, end_s, strict=True):
            row |= {f"videos/{camera}/to_timestamp": end for camera in CAMERAS}
        assert shown(LeRobotDataset(foreign.write(tmp_path / name))) == EVERY_ROW


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {}),
        ("libx264", {"x264-params": "open-gop=1:keyint=6:bframes=3:b-adapt=0"}),
        ("libsvtav1", {"g": "2", "crf": "20"}),
        ("libvpx-vp9", {"g": "10", "deadline": "realtime"}),
        ("mpeg4", {"bf": "2", "g": "5"}),
    ],
)
def test_frames_of_other_encoders_are_found_at_random(codec, options, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    path = tmp_path / "video.mp4"
    rng = np.random.default_rng(0)
    write_video(path, rng.integers(0, 255, (40, 48, 64, 3), dtype=np.uint8), 30000 / 1001, codec=codec, options=options)
    with av.open(str(path)) as container:
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = VideoFile(path, 30000 / 1001)
    stamps = video.find(np.arange(40) * 1001 / 30000)
    for k in rng.permutation(40):
        np.testing.assert_array_equal(video.read([stamps[k]])[0], in_order[k])
    np.testing.assert_array_equal(video.read(stamps), in_order)
    for k in (0, 17, 39):  # a file that was not read from yet
        np.testing.assert_array_equal(VideoFile(path, 30000 / 1001).find(np.array([k * 1001 / 30000])), stamps[k])


def test_frames_before_a_cut_without_encoding_are_not_counted(tmp_path):
    write_video(
        tmp_path / "whole.mp4", [picture(0, k) for k in range(20)], 20, options={"g": "10", "bf": "2", "crf": "4"}
    )
    with (
        av.open(str(tmp_path / "whole.mp4")) as given,
        av.open(str(tmp_path / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as cut,
    ):
        source = given.streams.video[0]
        target = cut.add_stream_from_template(source)
        for packet in given.demux(source):
            if packet.pts is not None:
                packet.pts, packet.dts = (n - round(3 / 20 / source.time_base) for n in (packet.pts, packet.dts))
                packet.stream = target
                cut.mux(packet)
    video = VideoFile(tmp_path / "cut.mp4", 20)
    assert [frame_of(image)[1] for image in video.read(video.find(np.arange(17) / 20))] == list(range(3, 20))
    with pytest.raises(ValueError, match=r"ends before frame 17 \(0.850 s\)"):
        video.find(np.arange(18) / 20)


# -- columns -----------------------------------------------------------------------------------------------------------

INDEX_FORMS = {
    "float64": lambda rows: pa.array(rows, pa.float64()),
    "float32": lambda rows: pa.array(rows, pa.float32()),
    "uint8": lambda rows: pa.array(rows, pa.uint8()),
    "list": lambda rows: pa.array([[row] for row in rows]),
    "float list": lambda rows: pa.array([[float(row)] for row in rows]),
    "fixed list": lambda rows: pa.array([[row] for row in rows], pa.list_(pa.int32(), 1)),
    "large list": lambda rows: pa.array([[row] for row in rows], pa.large_list(pa.int64())),
    "category": lambda rows: pa.array(rows).dictionary_encode(),
}


@pytest.mark.parametrize("form", INDEX_FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_index_columns_in_other_forms(version, form, tmp_path):
    foreign = Foreign(version)
    for name in ("episode_index", "frame_index", "task_index"):
        foreign.set_column(name, INDEX_FORMS[form])
    foreign.set_column("timestamp", lambda times: pa.array([[t] for t in times]) if "list" in form else pa.array(times))
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == EVERY_ROW
    assert instructions(dataset) == list(TASKS)


def test_booleans_as_indices(tmp_path):
    foreign = Foreign("v3.0")
    for name in ("episode_index", "task_index"):
        foreign.set_column(name, lambda rows: pa.array([bool(row) for row in rows]))
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == EVERY_ROW
    assert instructions(dataset) == list(TASKS)
    # A column that is a flag by info.json's own word names no tasks.
    foreign.info["features"]["task_index"]["dtype"] = "bool"
    refused(foreign.write(tmp_path / "flag"), r"'task_index' holds bool, info.json says bool; it must name tasks")


@pytest.mark.parametrize("name", ["episode_index", "frame_index", "task_index"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: pa.array([None, *rows[1:]]), "is null in row 0; every row must have a value"),
        (
            lambda rows: pa.array([[None], *([row] for row in rows[1:])]),
            "is null in row 0; every row must have a value",
        ),
        (lambda rows: pa.array([row + 0.5 for row in rows]), "is .*5 in row 0; it must be a whole number"),
        (lambda rows: pa.array([float("nan"), *map(float, rows[1:])]), "is nan in row 0; it must be a whole number"),
        (lambda rows: pa.array([1e30, *map(float, rows[1:])]), r"is 1e\+30 in row 0; it must be a whole number"),
        (lambda rows: pa.array([float("-inf"), *map(float, rows[1:])]), "is -inf in row 0; it must be a whole number"),
        (lambda rows: pa.array([-1, *rows[1:]]), "is -1 in row 0; it must be a whole number of at least 0"),
        (lambda rows: pa.array([2**63, *rows[1:]], pa.uint64()), "is 9223372036854775808 in row 0; it must be"),
        (lambda rows: pa.array([[row, row] for row in rows]), "has 2 elements a row; it must have 1"),
        (lambda rows: pa.array([[row] * (1 + (i == 4)) for i, row in enumerate(rows)]), "2 elements in row 4, 1 in"),
    ],
)
def test_index_columns_that_are_none(name, make, message, tmp_path):
    foreign = Foreign()
    foreign.set_column(name, make)
    refused(foreign.write(tmp_path / "d"), rf"episode_000000.parquet: column '{name}' .*{message}")


def test_a_frame_that_is_there_twice(tmp_path):
    foreign = Foreign()
    foreign.set_column("frame_index", lambda rows: pa.array([0, *range(len(rows) - 1)]))
    refused(foreign.write(tmp_path / "d"), r"column 'frame_index' has 0 twice in episode 0")


@pytest.mark.parametrize(
    ("dtype", "make"),
    [
        ("int64", lambda i, n: pa.array([float(i)] * n)),
        ("float64", lambda i, n: pa.array([float(i)] * n)),
        ("int64", lambda i, n: pa.array([[i]] * n)),
        ("int64", lambda i, n: pa.array([bool(i)] * n)),
        ("string", lambda i, n: pa.array([TASKS[i]] * n)),
        ("string", lambda i, n: pa.array([TASKS[i]] * n, pa.large_string())),
        ("string", lambda i, n: pa.array([TASKS[i]] * n).dictionary_encode()),
        ("string", lambda i, n: pa.array([[TASKS[i]]] * n)),
        ("int64", lambda i, n: pa.array([TASKS[i]] * n)),
    ],
)
def test_instructions_in_a_column_of_their_own(dtype, make, tmp_path):
    foreign = Foreign()
    foreign.modality["annotation"] = {"human.action.task_description": {}}
    foreign.info["features"][LANGUAGE] = {"dtype": dtype}
    for i, columns in enumerate(foreign.columns):
        columns[LANGUAGE] = make(i, len(columns["action"]))
    assert instructions(LeRobotDataset(foreign.write(tmp_path / "d"))) == list(TASKS)
    assert instructions(LeRobotDataset(tmp_path / "d", episodes_per_task=1)) == list(TASKS)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([None] * 12, r"is null in row 0"),
        (["pick up the bowl", None] * 6, r"is null in row 1"),
        (["0"] * 12, r"has the instruction '0'; it must be a sentence, or name a task by number"),
        (["1.0"] * 12, r"has the instruction '1.0'"),
        (["nan"] * 12, r"has the instruction 'nan'"),
        (["None"] * 12, r"has the instruction 'None'"),
        ([""] * 12, r"has the instruction ''; it must be a sentence, or name a task by number"),
        (["pick up the bowl", " \n"] * 6, r"has the instruction ' \\n'; it must be a sentence"),
        ([["a", "b"]] * 12, r"holds list<.*string.*>; it must hold one text a row"),
        ([b"pick"] * 12, r"holds binary; it must hold numbers"),
        ([5] * 12, r"names tasks \[5\], which meta/ does not list \(it lists 0, 1\)"),
    ],
)
def test_instructions_that_are_none(cells, message, tmp_path):
    foreign = Foreign(lengths=(12,))
    foreign.columns[0]["task_index"] = pa.array(cells, pa.string() if cells[0] is None else None)
    refused(foreign.write(tmp_path / "d"), rf"episode_000000.parquet: column 'task_index' {message}")


def test_a_task_that_is_a_missing_value(tmp_path):
    foreign = Foreign()
    for task in ("nan", "", " "):
        foreign.tasks[1]["task"] = task
        message = rf"episode_000001.parquet: column 'task_index' has the instruction '{task}'"
        refused(foreign.write(tmp_path / f"d{task}"), message)


def rows_of(width: int):
    return lambda rows: pa.array([(row * 2)[:width] for row in rows], pa.list_(pa.float32()))


@pytest.mark.parametrize("name", ["observation.state", "action"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (rows_of(6), r"has 6 elements a row, info.json says {width}"),
        (rows_of(9), r"has 9 elements a row, info.json says {width}"),
        (lambda rows: pa.array([rows[0][:-1], rows[1] + [0.0], *rows[2:]]), r"has \d elements in row \d, \d in row 0"),
        (lambda rows: pa.array([*rows[:3], None, *rows[4:]]), r"is null in row 3; every row must have a value"),
        (lambda rows: pa.array([*rows[:3], [None, *rows[3][1:]], *rows[4:]]), r"is null in row 3; every row must"),
        (lambda rows: pa.array([[] for _ in rows], pa.list_(pa.float32())), r"has rows without elements"),
        (lambda rows: pa.array([[str(x) for x in row] for row in rows]), r"holds list<.*>; it must hold numbers"),
    ],
)
def test_vectors_that_contradict_info(name, make, message, tmp_path):
    foreign = Foreign(lengths=(12, 12))
    width = len(foreign.columns[0][name][0])
    foreign.set_column(name, make)
    pattern = message.format(width=width) if "{width}" in message else message
    refused(foreign.write(tmp_path / "d"), rf"episode_000000.parquet: column '{name}' {pattern}")


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: pa.array(rows, pa.list_(pa.float64())),
        lambda rows: pa.array(rows, pa.large_list(pa.float32())),
        lambda rows: pa.array(rows, pa.list_(pa.float32(), 8)),
        lambda rows: pa.array([[row[:4], row[4:]] for row in rows]),
        lambda rows: pa.FixedShapeTensorArray.from_numpy_ndarray(np.array(rows).reshape(-1, 2, 4)),
    ],
)
def test_vectors_in_other_forms(make, tmp_path):
    foreign = Foreign()
    expected = np.concatenate([np.array(columns["observation.state"].to_pylist()) for columns in foreign.columns])
    foreign.set_column("observation.state", make)
    foreign.info["features"]["observation.state"]["shape"] = [2, 4]
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    state = np.concatenate([dataset.state[key] for key in dataset.data_config.state_keys], axis=1)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state, expected.astype(np.float32))


def test_numbers_and_flags_as_states(tmp_path):
    foreign = Foreign()
    for columns in foreign.columns:
        n = len(columns["action"])
        columns["height"], columns["is_closed"] = pa.array(np.arange(n) / 8), pa.array([k % 2 == 0 for k in range(n)])
    foreign.info["features"] |= {
        "height": {"dtype": "float64", "shape": []},
        "is_closed": {"dtype": "bool", "shape": [1]},
    }
    foreign.modality["state"]["x"] = {"start": 0, "end": 1, "original_key": "height"}
    foreign.modality["state"]["y"] = {"start": 0, "end": 1, "original_key": "is_closed"}
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert dataset.state["state.x"][:3, 0].tolist() == [0, 0.125, 0.25]
    assert dataset.state["state.y"][:3, 0].tolist() == [1, 0, 1]


# -- meta/ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tasks", ["absent", None, lambda task: task, lambda task: ["valid", task], lambda _: []])
def test_instructions_do_not_come_from_the_list_of_episodes(version, tasks, tmp_path):
    foreign = Foreign(version, lengths=(4, 4, 4, 4))
    for i, row in enumerate(foreign.episodes):
        row["tasks"] = tasks(TASKS[i % 2]) if callable(tasks) else None
        if tasks == "absent":
            del row["tasks"]
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"), episodes_per_task=1)
    assert [entry.episode_id for entry in dataset.episodes] == [0, 1]
    assert instructions(dataset) == list(TASKS)
    assert instructions(LeRobotDataset(tmp_path / "d", episode_ids=[3, 2])) == list(TASKS[::-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_an_episode_that_is_listed_twice(version, tmp_path):
    foreign = Foreign(version)
    foreign.episodes.append(dict(foreign.episodes[0]))
    dataset = LeRobotDataset(foreign.write(tmp_path / "same"))
    assert [entry.episode_id for entry in dataset.episodes] == [0, 1]
    assert shown(dataset) == EVERY_ROW
    foreign.episodes[2]["length"] = 11
    where = "row 2" if version == "v3.0" else "line 3"
    refused(foreign.write(tmp_path / "other"), rf"{where} lists episode 0 again, with other values")


def test_an_episode_that_is_listed_in_two_files(tmp_path):
    folder = Foreign("v3.0").write(tmp_path / "d")
    file = folder / "meta/episodes/chunk-000/file-000.parquet"
    shutil.copyfile(file, file.with_name("file-001.parquet"))
    assert shown(LeRobotDataset(folder)) == EVERY_ROW


@pytest.mark.parametrize("version", VERSIONS)
def test_a_list_of_episodes_that_was_cut(version, tmp_path):
    foreign = Foreign(version)
    del foreign.episodes[1]
    refused(foreign.write(tmp_path / "d"), r"/meta lists 1 episodes, .*info.json says total_episodes=2")
    foreign.info["total_episodes"] = 1
    assert shown(LeRobotDataset(foreign.write(tmp_path / "e"))) == EVERY_ROW[:1]


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (1, r"/meta lists 2 episodes, .*info.json says total_episodes=1; download or write the list again, or correct"),
        ("2", r"info.json: total_episodes is '2'; it must be a whole number"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_number_of_episodes_that_is_not_the_lists(version, total, message, tmp_path):
    foreign = Foreign(version)
    foreign.info["total_episodes"] = total
    refused(foreign.write(tmp_path / "d"), message)


def test_a_table_without_rows(tmp_path):
    foreign = Foreign()
    foreign.columns[1] = {name: column.slice(0, 0) for name, column in foreign.columns[1].items()}
    refused(
        foreign.write(tmp_path / "d"), r"episode_000001.parquet has no rows, and meta/ says that episodes lie there"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", None, "length is None; it must be a whole number"),
        ("length", 0, "episode 0 has length 0"),
        ("length", "12", "length is '12'; it must be a whole number"),
        ("episode_index", True, "episode_index is True; it must be a whole number"),
        ("episode_index", "absent", r"has no 'episode_index' \(present: "),
        ("length", "absent", r"has no 'length' \(present: "),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_episodes_without_what_they_need(version, field, value, message, tmp_path):
    foreign = Foreign(version, lengths=(12,))
    foreign.episodes[0][field] = value
    if value == "absent":
        del foreign.episodes[0][field]
    where = r"file-000.parquet: row 0" if version == "v3.0" else r"episodes.jsonl: line 1"
    refused(foreign.write(tmp_path / "d"), f"{where}.*{message}")


def test_places_in_other_forms(tmp_path):
    foreign = Foreign("v3.0")
    for row in foreign.episodes:
        row |= {"episode_index": [row["episode_index"]], "length": float(row["length"]), "data/file_index": 0.0}
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == EVERY_ROW
    del foreign.episodes[0]["data/file_index"], foreign.episodes[1]["data/file_index"]
    refused(foreign.write(tmp_path / "absent"), r"file-000.parquet: row 0 has no 'data/file_index' \(present: ")


def pandas_table(columns: dict, index: str) -> pa.Table:
    described = [{"name": name, "field_name": name, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
                 for name in columns]  # fmt: skip
    content = {"index_columns": [index], "columns": described, "column_indexes": [], "pandas_version": "2.2"}
    return pa.table(columns).replace_schema_metadata({b"pandas": json.dumps(content).encode()})


NUMBERS = pa.array([0, 1])
BOTH = pa.array(TASKS)
OTHER = pa.array(["bowl", "drawer"])


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"task_index": NUMBERS, "task": BOTH, "description": OTHER}),
        pa.table({"description": OTHER, "task": BOTH, "task_index": pa.array([0.0, 1.0])}),
        pa.table({"task_index": NUMBERS, "task": BOTH, "__index_level_0__": NUMBERS}),
        pa.table({"task_index": NUMBERS, "task": BOTH, "category": OTHER.dictionary_encode()}),
        pa.table({"task_index": NUMBERS, "task": BOTH.dictionary_encode(), "weight": pa.array([0.1, 0.9])}),
        pa.table({"task_index": NUMBERS, "__index_level_0__": BOTH, "title": OTHER}),
        pa.table({"task_index": NUMBERS, "instruction": BOTH}),
        pandas_table({"task_index": NUMBERS, "sentence": BOTH, "title": OTHER}, "sentence"),
        pa.table({"task_index": pa.array([[1], [0]]), "task": pa.array(TASKS[::-1])}),
        pa.table({"task_index": pa.array([0, 1, 2]), "task": pa.array([*TASKS, "close it"], pa.large_string())}),
    ],
)
def test_tasks_in_tables_of_other_columns(table, tmp_path):
    foreign = Foreign("v3.0")
    foreign.tasks = table
    assert instructions(LeRobotDataset(foreign.write(tmp_path / "d"))) == list(TASKS)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"task": BOTH}), r"has no column 'task_index' \(present: task\)"),
        (pa.table({"task_index": NUMBERS, "title": BOTH, "text": OTHER}), r"has the columns task_index, title, text"),
        (pa.table({"task_index": NUMBERS}), r"has the columns task_index; one of them must be a text"),
        (pandas_table({"task_index": NUMBERS, "task": BOTH, "key": OTHER}, "key"), r"columns 'key' and 'task' are"),
        (pa.table({"task_index": pa.array([0, 0]), "task": BOTH}), r"row 1 gives task_index 0 the text 'open"),
        (pa.table({"task_index": NUMBERS, "task": pa.array(["a", None])}), r"column 'task' is null in row 1"),
        (pa.table({"task_index": pa.array([0, None]), "task": BOTH}), r"column 'task_index' is null in row 1"),
    ],
)
def test_tables_of_tasks_that_are_none(table, message, tmp_path):
    foreign = Foreign("v3.0")
    foreign.tasks = table
    refused(foreign.write(tmp_path / "d"), rf"tasks.parquet.*{message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_index": 1}, r"line 2: task is None; it must be a text"),
        ({"task_index": 1, "task": 5}, r"line 2: task is 5; it must be a text"),
        ({"task": "x"}, r"line 2: task_index is None; it must be a whole number"),
        ({"task_index": 0, "task": "x"}, r"line 2 gives task_index 0 the text 'x', another the text 'pick"),
        ([1, "x"], r"line 2 is \[1, 'x'\]; it must be an object"),
    ],
)
def test_lines_of_tasks_that_are_none(row, message, tmp_path):
    foreign = Foreign()
    foreign.tasks[1] = row
    refused(foreign.write(tmp_path / "d"), rf"tasks.jsonl: {message}")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_separators_in_texts_are_no_line_ends(separator, tmp_path):
    foreign = Foreign()
    texts = [f"{separator}pick{separator}it {i}" for i in range(2)]
    foreign.tasks = [{"task_index": i, "task": text} for i, text in enumerate(texts)]
    folder = foreign.write(tmp_path / "d")
    if separator < " ":  # JSON spells control characters
        assert separator not in (folder / "meta/tasks.jsonl").read_text("utf-8")
    assert instructions(LeRobotDataset(folder)) == texts
    # Also in what we write.
    stage_episode(tmp_path / "staged", make_episode(0, 3), Recording())
    edit_json(tmp_path / "staged/episode.json", instruction=texts[0])
    for version in VERSIONS:
        assemble_dataset(tmp_path / version, [tmp_path / "staged"], Recording(), version=version, modality=modality())
        assert instructions(LeRobotDataset(tmp_path / version)) == texts[:1]


def test_other_line_ends_and_byte_order_marks(tmp_path):
    folder = Foreign().write(tmp_path / "d")
    for name in ("episodes.jsonl", "tasks.jsonl"):
        content = (folder / "meta" / name).read_bytes()
        (folder / "meta" / name).write_bytes(b"\r\n" + content.replace(b"\n", b"\r\n").rstrip() + b"\r\n\r\n")
    for name in ("info.json", "modality.json"):
        content = (folder / "meta" / name).read_bytes()
        (folder / "meta" / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert shown(LeRobotDataset(folder)) == EVERY_ROW


def change(*path, to):
    def edit(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return edit


CAMERA = ("features", CAMERAS[0])
STATE = ("features", "observation.state")


@pytest.mark.parametrize(
    ("version", "edit", "message"),
    [
        (
            "v2.1",
            change("data_path", to=Foreign("v3.0").info["data_path"]),
            r"data_path .* v2.1 cannot fill in \('chunk",
        ),
        (
            "v3.0",
            change("data_path", to=Foreign("v2.1").info["data_path"]),
            r"data_path .* v3.0 cannot fill in \('epis",
        ),
        ("v2.1", change("data_path", to="data/{episode_index:x.parquet"), r"data_path is .* cannot fill in"),
        ("v2.1", change("data_path", to="data/{episode_index.parquet}"), r"data_path is .* cannot fill in"),
        ("v2.1", change("data_path", to="data/{}.parquet"), r"data_path is .* cannot fill in"),
        ("v2.1", change("data_path", to=None), r"data_path is None; it must be a text"),
        ("v2.1", change("video_path", to=None), r"video_path is None; it must be a text"),
        ("v3.0", lambda info: info.pop("video_path"), r"video_path is None; it must be a text"),
        ("v2.1", change("video_path", to="{video_key}.mp4"), r"episode 0 .* and episode 1 .* on the same frames of"),
        ("v2.1", change("video_path", to="{episode_index}.mp4"), r"video_path gives several cameras the file"),
        ("v2.1", lambda info: info.pop("chunks_size"), r"chunks_size is None; it must be a whole number"),
        ("v2.1", change("chunks_size", to=0), r"chunks_size is 0; it must be at least 1"),
        ("v2.1", change("chunks_size", to="1000"), r"chunks_size is '1000'; it must be a whole number"),
        ("v2.1", change("fps", to=None), r"fps is None; it must be a finite number"),
        ("v2.1", change("fps", to=0), r"fps is 0; it must be above 0"),
        ("v2.1", change("fps", to=-20), r"fps is -20; it must be above 0"),
        ("v2.1", change("fps", to=float("nan")), r"fps is nan; it must be a finite number"),
        ("v2.1", change("fps", to="20"), r"fps is '20'; it must be a finite number"),
        ("v2.1", change("fps", to=[20]), r"fps is \[20\]; it must be a finite number"),
        ("v2.1", change("fps", to=True), r"fps is True; it must be a finite number"),
        ("v2.1", change("features", to=["action"]), r"features is a list; it must map columns to their types"),
        ("v2.1", change(*CAMERA, to="video"), r"features\['observation.images.image'\] is 'video'; it must have dtype"),
        ("v2.1", change(*CAMERA, "dtype", to=None), r"features\['observation.images.image'\] dtype is None"),
        ("v2.1", change(*CAMERA, "shape", to=None), r"shape is None; it must be a list of whole numbers"),
        ("v2.1", lambda info: info["features"][CAMERAS[0]].pop("shape"), r"shape is None; it must be a list"),
        ("v2.1", change(*CAMERA, "shape", to=[32, None, 3]), r"shape \[32, None, 3\] is None; it must be a whole"),
        ("v2.1", change(*CAMERA, "shape", to=[32, 48]), r"has shape \[32, 48\]; an image has height, width"),
        ("v2.1", change(*CAMERA, "shape", to=[32, 48, 1]), r"has 1 channels \(shape \[32, 48, 1\]"),
        ("v2.1", change(*STATE, "shape", to=None), r"features\['observation.state'\] shape is None"),
        ("v2.1", change(*STATE, "shape", to=[0]), r"shape is \[0\]; its sizes must be at least 1"),
        ("v2.1", change(*STATE, "shape", to=[9]), r"column 'observation.state' has 8 elements a row, info.json says 9"),
        ("v2.1", change("codebase_version", to=None), r"codebase_version='None' is not supported"),
    ],
)
def test_info_that_is_none(version, edit, message, tmp_path):
    foreign = Foreign(version)
    edit(foreign.info)
    refused(foreign.write(tmp_path / "d"), message)


def test_info_may_lack_what_is_not_needed(tmp_path):
    foreign = Foreign()
    for name in ("total_episodes", "chunks_size"):
        del foreign.info[name]
    foreign.info["data_path"] = "data/chunk-000/episode_{episode_index:06d}.parquet"
    foreign.info["video_path"] = "videos/chunk-000/{video_key}/episode_{episode_index:06d}.mp4"
    foreign.info |= {"_comment": "by hand", "total_frames": None, "splits": None}
    foreign.info["features"] |= {"_comment": "by hand", "next.reward": None, "notes": {"dtype": "string"}}
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == EVERY_ROW
    (tmp_path / "d/meta/info.json").write_text("[]")
    refused(tmp_path / "d", "info.json holds a list; it must hold an object")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("feature", [{"dtype": "video", "shape": [80, 128, 3], "names": None}, {"dtype": "video"}])
def test_cameras_that_no_config_reads(version, feature, tmp_path):
    foreign = Foreign(version)
    foreign.info["features"]["observation.images.ego"] = feature
    foreign.modality["video"]["ego"] = {"original_key": "observation.images.ego"}
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == EVERY_ROW


@pytest.mark.parametrize(
    "edit",
    [
        change("_comment", to="by hand"),
        change("version", to=3),
        change("rewards", to={"next": {"original_key": "next.reward"}}),
        change("state", "_comment", to="metres"),
        change("state", "x", to={"start": 0.0, "end": 1.0, "original_key": None, "dtype": "float32", "absolute": True}),
        change("annotation", "human.validity", to={"original_key": None}),
    ],
)
def test_modality_with_more_entries(edit, tmp_path):
    foreign = Foreign()
    edit(foreign.modality)
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert shown(dataset) == EVERY_ROW
    assert dataset.state["state.x"].shape == (21, 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("state", "gripper", "end", to=None), r"state.gripper has end None; it must be a whole number"),
        (change("state", "x", "start", to="0"), r"state.x has start '0'; it must be a whole number"),
        (change("state", "x", "end", to=0.5), r"state.x has end 0.5; it must be a whole number"),
        (change("state", "x", "start", to=float("nan")), r"state.x has start nan; it must be a whole number"),
        (change("action", "x", "start", to=False), r"action.x has start False; it must be a whole number"),
        (change("video", "image", "original_key", to=5), r"video.image has original_key 5; it must name a column"),
        (change("state", "x", "original_key", to=["a"]), r"state.x has original_key \['a'\]; it must name a column"),
    ],
)
def test_modality_that_is_none(edit, message, tmp_path):
    foreign = Foreign()
    edit(foreign.modality)
    refused(foreign.write(tmp_path / "d"), rf"modality.json: {message}")
    (tmp_path / "d/meta/modality.json").write_text("[]")
    refused(tmp_path / "d", "modality.json holds a list; it must hold an object")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("video", "wrist_image", "original_key", to=CAMERAS[0]),
            r"video.image and video.wrist_image are both column 'observation.images.image' of .*; correct the modality",
        ),
        (
            change("state", "y", to={"start": 0, "end": 1}),
            r"state.x and state.y are both \[0, 1\) of column 'observation.state'",
        ),
        (
            change("action", "yaw", to={"start": 4, "end": 5}),
            r"action.pitch and action.yaw are both \[4, 5\) of column 'action'",
        ),
    ],
)
def test_two_keys_of_one_place(edit, message, tmp_path):
    foreign = Foreign()
    edit(foreign.modality)
    refused(foreign.write(tmp_path / "d"), message)


@pytest.mark.parametrize(
    "edit", [change("state", "x", to="0:1"), change("state", to=None), change("video", to=["image"])]
)
def test_modality_without_what_is_read(edit, tmp_path):
    foreign = Foreign()
    edit(foreign.modality)
    refused(foreign.write(tmp_path / "d"), r"modality.json has no (state.x|video.image)")


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "names", "more"),
    [
        ([WIDTH, HEIGHT, 3], ["width", "height", "channel"], {}),
        ([3, HEIGHT, WIDTH], ["channels", "height", "width"], {}),
        ([3, WIDTH, HEIGHT], ["channel", "width", "height"], {}),
        ([HEIGHT, WIDTH, 3], ["height", "width", "rgb"], {}),
        ([WIDTH, HEIGHT, 3], {"axes": ["width", "height", "channels"]}, {}),
        ([WIDTH, HEIGHT, 3], ["w", "h", "c"], {}),
        ([HEIGHT, WIDTH, 3], None, {}),
        ([3, HEIGHT, WIDTH], None, {}),
        ([WIDTH, HEIGHT, 3], None, {"info": {"video.height": HEIGHT, "video.width": WIDTH}}),
        ([3, WIDTH, HEIGHT], None, {"video_info": {"video.height": HEIGHT, "video.width": WIDTH}}),
    ],
)
@pytest.mark.parametrize("storage", ["video", "image"])
def test_sizes_by_their_names(storage, shape, names, more, tmp_path):
    foreign = Foreign(storage=storage, lengths=(2,))
    for camera in CAMERAS:
        foreign.info["features"][camera] |= {"shape": shape, "names": names, **more}
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    assert dataset.image_size == (HEIGHT, WIDTH)
    assert dataset.metadata().modalities["video"]["image"]["resolution"] == [WIDTH, HEIGHT]
    assert shown(dataset) == [[0, 1]]


@pytest.mark.parametrize("names", [None, ["height", "width", "channels"]])
@pytest.mark.parametrize("storage", ["video", "image"])
def test_sizes_that_are_not_those_of_the_frames(storage, names, tmp_path):
    foreign = Foreign(storage=storage, lengths=(2,))
    for camera in CAMERAS:
        foreign.info["features"][camera] |= {"shape": [WIDTH, HEIGHT, 3], "names": names}
    folder = foreign.write(tmp_path / "d")
    for size in (None, 16):
        with pytest.raises(ValueError, match=r"has frames of \(32, 48, 3\), its info.json says \[48, 32, 3\]"):
            LeRobotDataset(folder, image_size=size).images(np.array([0]))


def file_cell(image: np.ndarray, folder: Path, k: int) -> str:
    path = folder / "images" / f"{k}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image))
    return f"images/{k}.png"


def png_of(mode: str):
    return lambda image, *_: png(Image.fromarray(image).convert(mode))


CELLS = {
    "bytes": (lambda image, *_: png(image), None),
    "large bytes": (lambda image, *_: png(image), pa.large_binary()),
    "only bytes in a struct": (lambda image, *_: {"bytes": png(image)}, None),
    "bytes in a list in a struct": (
        lambda image, *_: {"bytes": list(png(image)), "path": None},
        pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.string())]),
    ),
    "bytes in a list": (lambda image, *_: list(png(image)), pa.list_(pa.uint8())),
    "path": (file_cell, None),
    "path in a struct": (lambda *a: {"bytes": None, "path": file_cell(*a)}, None),
    "only path in a struct": (lambda *a: {"path": file_cell(*a)}, None),
    "pixels": (lambda image, *_: image.tolist(), None),
    "pixels of uint8": (lambda image, *_: image.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    "pixels of fixed lists": (
        lambda image, *_: image.tolist(),
        pa.list_(pa.list_(pa.list_(pa.uint8(), 3), WIDTH), HEIGHT),
    ),
    "flat pixels": (lambda image, *_: image.ravel().tolist(), pa.large_list(pa.int16())),
    "palette": (png_of("P"), None),
    "grey": (png_of("L"), None),
    "opaque": (png_of("RGBA"), None),
}


@pytest.mark.parametrize("form", CELLS)
def test_image_cells_in_other_forms(form, tmp_path):
    make, kind = CELLS[form]
    foreign = Foreign(storage="image", lengths=(3, 2))
    for i, columns in enumerate(foreign.columns):
        cells = [make(picture(i, k), tmp_path / "d", 10 * i + k) for k in range(len(columns["action"]))]
        columns |= {camera: pa.array(cells, kind) for camera in CAMERAS}
    dataset = LeRobotDataset(foreign.write(tmp_path / "d"))
    images = dataset.images(np.arange(5)).numpy()
    assert shown(dataset) == [[0, 1, 2], [0, 1]]
    if form not in ("palette",):
        np.testing.assert_array_equal(images[1, 0], picture(0, 1))
    copied = Path(shutil.copytree(tmp_path / "d", tmp_path / "elsewhere"))
    np.testing.assert_array_equal(LeRobotDataset(copied).images(np.arange(5)).numpy(), images)


def test_pixels_with_channels_first(tmp_path):
    foreign = Foreign(storage="image", lengths=(2,))
    for camera in CAMERAS:
        foreign.info["features"][camera] |= {"shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]}
        foreign.columns[0][camera] = pa.array([picture(0, k).transpose(2, 0, 1).tolist() for k in range(2)])
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"))) == [[0, 1]]


TRANSPARENT = Image.new("RGBA", (WIDTH, HEIGHT), (10, 20, 30, 100))
DEPTH = np.full((HEIGHT, WIDTH), 3000, np.uint16)


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        (None, pa.binary(), r"is null; it must hold an encoded image, a path or pixels"),
        (
            {"bytes": None, "path": None},
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            r"is null; it must",
        ),
        ({"bytes": b"", "path": ""}, None, r"it must hold an encoded image, a path or pixels"),
        ({"data": b"x"}, None, r"is null; it must hold an encoded image, a path or pixels"),
        (3, None, r"is int64; it must hold an encoded image, a path or pixels"),
        (b"raw pixels", None, r"cannot be decoded"),
        (png(picture(0, 0))[:60], None, r"cannot be decoded"),
        ([1, 2, 3], None, r"cannot be decoded"),
        (np.zeros((4, 4, 3), int).tolist(), None, r"has pixels of shape \(4, 4, 3\), its info.json says \[32, 48"),
        (np.zeros((HEIGHT, WIDTH, 3)).tolist(), None, r"has pixels of double; they must be whole numbers in 0-255"),
        (
            np.full((HEIGHT, WIDTH, 3), 256).tolist(),
            None,
            r"has pixels of 256 to 256; they must be whole numbers in 0-255",
        ),
        ([[[1, 2, 3]] * WIDTH, [[1, 2, 3]]], None, r"has lists of 1-48 elements; its rows must be equal"),
        ([[[1, 2, None]] * WIDTH] * HEIGHT, None, r"is null"),
        (png(TRANSPARENT), None, r"mode 'RGBA' that is partly transparent; it must be opaque and RGB"),
        (png(DEPTH), None, r"is an image of mode 'I;16'; it must be opaque and RGB"),
        ("../outside.png", None, r"is '../outside.png', which is not inside .*; a dataset's files lie in its folder"),
        ("A" * 100000, None, r"is in .*AAA, which is no file"),
        ("/etc/hostname", None, r"is '/etc/hostname', which is not inside"),
        ({"path": "images/../../outside.png"}, None, r"which is not inside"),
    ],
)
def test_image_cells_that_are_none(cell, kind, message, tmp_path):
    error = FileNotFoundError if "no file" in message else ValueError
    foreign = Foreign(storage="image", lengths=(2,))
    foreign.columns[0][CAMERAS[1]] = pa.array([cell] * 2, kind)
    folder = foreign.write(tmp_path / "d")
    (tmp_path / "outside.png").write_bytes(png(picture(0, 0)))
    refused(
        folder,
        rf"episode_000000.parquet: image 1 of 'observation.images.wrist_image' .*{message}",
        frame=1,
        error=error,
    )


def test_image_files_and_columns_that_are_absent(tmp_path):
    foreign = Foreign(storage="image", lengths=(2,))
    foreign.columns[0][CAMERAS[1]] = pa.array(["images/0.png"] * 2)
    message = r"image 0 of .* is in .*images/0.png, which is no file; the dataset is incomplete"
    refused(foreign.write(tmp_path / "d"), message, error=FileNotFoundError, frame=0)
    del foreign.columns[0][CAMERAS[1]]
    refused(foreign.write(tmp_path / "e"), r"has no column 'observation.images.wrist_image', whose images", frame=0)


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["data_path", "video_path"])
@pytest.mark.parametrize("version", VERSIONS)
def test_files_outside_of_the_folder_are_not_read(version, field, tmp_path):
    foreign = Foreign(version)
    other = Foreign(version).write(tmp_path / "other")
    template = foreign.info[field]
    for given in (f"../other/{template}", f"{other}/{template}", f"meta/../../other/{template}"):
        foreign.info[field] = given
        folder = foreign.write(tmp_path / f"d{len(list(tmp_path.iterdir()))}")
        refused(folder, rf"info.json: {field} is '.*', which is not inside .*; a dataset's files lie in its folder")


def test_files_inside_of_the_folder_by_any_path(tmp_path, monkeypatch):
    foreign = Foreign()
    foreign.info["data_path"] = "meta/../" + foreign.info["data_path"]
    foreign.info["video_path"] = f"{tmp_path}/d/" + foreign.info["video_path"]
    folder = foreign.write(tmp_path / "d")
    assert shown(LeRobotDataset(folder)) == EVERY_ROW
    monkeypatch.chdir(folder)
    assert shown(LeRobotDataset(Path())) == EVERY_ROW
    # A hub's cache holds links.
    linked = tmp_path / "linked"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        place = linked / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    edit_json(folder / "meta/info.json", video_path=Foreign().info["video_path"])
    assert shown(LeRobotDataset(linked)) == EVERY_ROW


def test_folders_whose_names_look_like_partitions(tmp_path):
    assert shown(LeRobotDataset(Foreign().write(tmp_path / "action=1" / "episode_index=x"))) == EVERY_ROW


# -- what is written ---------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(where: float):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(where * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [cut, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, path.stat().st_size - 1),
     lambda path: os.truncate(path, path.stat().st_size + 1), flip(0), flip(0.003), flip(0.5), flip(0.97), flip(1),
     lambda path: path.write_bytes(bytes(path.stat().st_size))],
)  # fmt: skip
def test_damaged_frame_caches_are_written_anew(damage, tmp_path, monkeypatch):
    folder = Foreign(lengths=(5, 4)).write(tmp_path / "d")
    path = LeRobotDataset(folder).cache_frames(tmp_path / "cache")
    content = path.read_bytes()
    damage(path)
    assert path.read_bytes() != content
    dataset = LeRobotDataset(folder)
    assert dataset.cache_frames(tmp_path / "cache", num_threads=2) == path
    assert path.read_bytes() == content
    assert shown(dataset) == [list(range(5)), list(range(4))]
    monkeypatch.setattr(LeRobotDataset, "_decode", lambda *_: pytest.fail("decoded although a whole cache exists"))
    again = LeRobotDataset(folder)
    again.cache_frames(tmp_path / "cache")
    assert shown(again) == [list(range(5)), list(range(4))]
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_caches_are_numpy_files(tmp_path):
    dataset = LeRobotDataset(Foreign(lengths=(5, 4)).write(tmp_path / "d"))
    frames = np.load(dataset.cache_frames(tmp_path), mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(frames, dataset.images(np.arange(9)).numpy())


def test_moved_timestamps_get_another_cache(tmp_path):
    for version in VERSIONS:
        foreign = Foreign(version)
        foreign.keep([0, 1, 2, 3])
        folder = foreign.write(tmp_path / version)
        first = LeRobotDataset(folder).cache_frames(tmp_path / "cache")
        file = min((folder / "data").rglob("*.parquet"))
        table = pq.read_table(file)
        times = pa.array(table["timestamp"].to_numpy() + np.float32(0.1))
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), file)
        moved = LeRobotDataset(folder)
        assert moved.cache_frames(tmp_path / "cache") != first
        assert shown(moved)[0] == [2, 3, 4, 5]


@contextmanager
def full_disk(size: int):
    """Lets no file grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_caching(tmp_path):
    dataset = LeRobotDataset(Foreign(lengths=(5, 4)).write(tmp_path / "d"))
    for size in (0, 100, 20000, dataset.frame_bytes):
        with full_disk(size), pytest.raises(OSError, match="File too large"):
            dataset.cache_frames(tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []
    assert shown(dataset) == [list(range(5)), list(range(4))]
    dataset.cache_frames(tmp_path / "cache")
    assert shown(dataset) == [list(range(5)), list(range(4))]


@pytest.mark.parametrize("storage", ["video", "image"])
def test_a_full_disk_while_recording(storage, tmp_path):
    recording, episode = Recording(storage=storage), make_episode(0, 6)
    stage_episode(tmp_path / "staged", episode, recording)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "staged").iterdir()}
    sizes = sorted(len(content) for content in whole.values())
    for size in (0, sizes[0] - 1, sizes[-1] // 2, sizes[-1] - 1):
        with full_disk(size), pytest.raises(OSError, match="File too large"):
            stage_episode(tmp_path / "staged", episode, recording)
        assert {path.name: path.read_bytes() for path in (tmp_path / "staged").iterdir()} == whole
        for version in VERSIONS:
            with full_disk(min(size, 3000)), pytest.raises(OSError, match="File too large"):
                assemble_dataset(
                    tmp_path / "made", [tmp_path / "staged"], recording, version=version, modality=modality()
                )
        assert [path.name for path in tmp_path.iterdir()] == ["staged"]


def test_an_episode_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    recording = Recording()
    stage_episode(tmp_path / "staged", make_episode(0, 3), recording)
    before = {path.name: path.read_bytes() for path in (tmp_path / "staged").iterdir()}
    replace = Path.replace

    def refuse(source: Path, target: Path) -> Path:
        if (source / "episode.json").exists() and source.name != "staged" and not source.name.startswith(".old-"):
            raise OSError("no room")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no room"):
        stage_episode(tmp_path / "staged", make_episode(1, 4), recording)
    assert {path.name: path.read_bytes() for path in (tmp_path / "staged").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["staged"]


def test_names_that_a_dataset_needs_itself(tmp_path):
    episode = make_episode(0, 3)
    for name in ("length", "tasks", "episode_index", "videos/x"):
        named = type(episode)(**{**episode.__dict__, "info": {name: 1}})
        with pytest.raises(ValueError, match=re.escape(f"info has {name}; its names hold no '/' and are none of")):
            stage_episode(tmp_path / "staged", named, Recording())


def test_a_config_of_one_camera(tmp_path):
    config = DataConfig(
        embodiment_tag="own", video_keys=("video.wrist_image",), state_keys=("state.x",), action_keys=("action.x",)
    )
    foreign = Foreign("v3.0")
    for row in foreign.episodes:
        for name in [name for name in row if name.startswith(f"videos/{CAMERAS[0]}/")]:
            del row[name]
    assert shown(LeRobotDataset(foreign.write(tmp_path / "d"), data_config=config)) == EVERY_ROW
