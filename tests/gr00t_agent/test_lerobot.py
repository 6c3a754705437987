"""LeRobot datasets: round trips, files of lerobot, chunks at episode ends, the frame cache, statistics, bad input."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from gr00t_agent import Gr00tAgent, LiberoFrankaDataConfig, lerobot, read_metadata, write_metadata
from gr00t_agent.lerobot import LeRobotDataset, check_metadata, first_of_each_task
from gr00t_agent.lerobot_writer import Recording, assemble_dataset, stage_episode
from tests.gr00t_agent.lerobot_data import CAMERAS, LENGTHS, edit_json, make_episode, modality, write_dataset

LAYOUTS = [(version, storage) for version in ("v2.1", "v3.0") for storage in ("video", "image")]
TASK_KEY = "annotation.human.action.task_description"
# Four episodes of two tasks that lerobot recorded, 0.3.3 as v2.1 and 0.6.1 as v3.0, with its own AV1 encoder.
RECORDED = Path(__file__).parents[1] / "data" / "lerobot"
RECORDED_LENGTHS = (13, 20, 7, 30)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Folder of each (version, storage), and the episodes that all of them hold; do not change them."""
    base = tmp_path_factory.mktemp("datasets")
    folders = {(version, storage): base / f"{storage}_{version}" for version, storage in LAYOUTS}
    for (version, storage), folder in folders.items():
        episodes = write_dataset(folder, version, storage)
    return folders, episodes


@pytest.fixture
def copy(datasets, tmp_path):
    """A function that copies a dataset to be damaged."""

    def make(version="v2.1", storage="video") -> Path:
        return Path(shutil.copytree(datasets[0][version, storage], tmp_path / "copy"))

    return make


@pytest.mark.parametrize(("version", "storage"), LAYOUTS)
def test_what_is_written_is_read(datasets, version, storage):
    folders, episodes = datasets
    dataset = LeRobotDataset(folders[version, storage])
    assert len(dataset) == sum(LENGTHS)
    assert [entry.length for entry in dataset.episodes] == list(LENGTHS)
    assert [entry.instruction for entry in dataset.episodes] == [episode.instruction for episode in episodes]
    assert [entry.info["seed"] for entry in dataset.episodes] == [0, 1, 2, 3]
    obs, actions, _ = dataset.batch(np.arange(len(dataset)))
    states = np.concatenate([episode.states for episode in episodes])
    np.testing.assert_array_equal(obs["state.x"], states[:, :1])
    np.testing.assert_array_equal(obs["state.gripper"], states[:, 6:8])
    np.testing.assert_array_equal(actions[:, 0], np.concatenate([episode.actions for episode in episodes]))
    assert obs[TASK_KEY] == [episode.instruction for episode in episodes for _ in episode.actions]
    for key, column in zip(("video.image", "video.wrist_image"), CAMERAS, strict=True):
        written = np.concatenate([episode.frames[column] for episode in episodes]).astype(int)
        read = obs[key].numpy().astype(int)
        assert obs[key].dtype == torch.uint8
        if storage == "image":
            np.testing.assert_array_equal(read, written)
        else:
            # Each frame resembles the one that was written more than its neighbours.
            errors = [np.abs(read - np.roll(written, shift, axis=0)).mean((1, 2, 3)) for shift in (-1, 0, 1)]
            assert errors[1].max() < 4
            assert (np.argmin(errors, axis=0) == 1).all()


def test_both_versions_hold_the_same_video_pixels(datasets):
    images = [
        LeRobotDataset(datasets[0][version, "video"]).images(np.arange(sum(LENGTHS))) for version in ("v2.1", "v3.0")
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_what_lerobot_wrote_is_read(version, tmp_path):
    (tmp_path / "modality.json").write_text(json.dumps(modality()))
    config = LiberoFrankaDataConfig(gripper_key=None)  # its gripper is any number
    dataset = LeRobotDataset(RECORDED / version, data_config=config, modality_file=tmp_path / "modality.json")
    assert tuple(entry.length for entry in dataset.episodes) == RECORDED_LENGTHS
    obs, actions, step_mask = dataset.batch(np.arange(70))
    with np.load(RECORDED / "numbers.npz") as truth:
        np.testing.assert_array_equal(np.concatenate([obs[key] for key in config.state_keys], 1), truth["state"])
        np.testing.assert_array_equal(actions[:, 0], truth["action"])
    np.testing.assert_array_equal(actions[12], np.tile(actions[12, :1], (16, 1)))
    assert step_mask[12].sum() == 1
    tasks = ("open the drawer", "close the drawer")
    assert obs[TASK_KEY] == [tasks[i % 2] for i, length in enumerate(RECORDED_LENGTHS) for _ in range(length)]
    y, x = np.mgrid[:64, :64]
    written = np.array([
        np.stack([2 * x + 3 * k, 2 * y + 3 * k, np.full_like(x, 40 * i + 2 * k)], -1).clip(0, 255)
        for i, length in enumerate(RECORDED_LENGTHS) for k in range(length)
    ])  # fmt: skip
    for key, images in (("video.image", written), ("video.wrist_image", written[:, :, ::-1])):
        errors = [np.abs(obs[key].numpy() - np.roll(images, shift, axis=0)).mean((1, 2, 3)) for shift in (-1, 0, 1)]
        assert errors[1].max() < 3
        # Its videos have a key frame every two frames; those between hardly differ from them.
        key_frames = np.concatenate([np.arange(length) % 2 == 0 for length in RECORDED_LENGTHS])
        assert (np.argmin(errors, axis=0)[key_frames] == 1).all()


def test_tables_have_the_columns_and_types_of_lerobots(datasets):
    for version, files in (
        ("v2.1", ["data/chunk-000/episode_000000.parquet"]),
        ("v3.0", [f"{name}/chunk-000/file-000.parquet" for name in ("data", "meta/episodes")] + ["meta/tasks.parquet"]),
    ):
        for file in files:
            ours, theirs = (
                pq.read_schema(folder / file) for folder in (datasets[0][version, "video"], RECORDED / version)
            )
            own_info = {"seed"} & set(ours.names)
            assert set(ours.names) - own_info == set(theirs.names), file
            assert {name: ours.field(name).type for name in theirs.names} == dict(
                zip(theirs.names, theirs.types, strict=True)
            ), file


@pytest.mark.parametrize(("version", "storage"), LAYOUTS)
def test_random_access_equals_reading_in_order(datasets, version, storage):
    dataset = LeRobotDataset(datasets[0][version, storage])
    in_order = dataset.images(np.arange(len(dataset)))
    frames = np.random.default_rng(0).integers(0, len(dataset), 50)
    assert torch.equal(dataset.images(frames), in_order[frames])
    sample = dataset[7]
    assert torch.equal(sample["video.image"], in_order[7, 0])
    assert sample["actions"].shape == (16, 7)


def test_samples_collate_in_worker_processes(datasets):
    dataset = LeRobotDataset(datasets[0]["v3.0", "video"])
    dataset.images(np.array([0]))  # open files do not travel
    copied = pickle.loads(pickle.dumps(dataset))
    batch = next(iter(DataLoader(copied, batch_size=4)))
    expected = dataset.batch(np.arange(4))
    assert torch.equal(batch["video.wrist_image"], expected.obs["video.wrist_image"])
    assert torch.equal(batch["actions"], expected.actions)
    assert batch[TASK_KEY] == expected.obs[TASK_KEY]


def test_chunks_end_with_their_episode(datasets):
    folders, episodes = datasets
    dataset = LeRobotDataset(folders["v2.1", "image"])
    # Frame 4 of episode 0 is 16 before its end, frame 5 is 15 before it; episode 1 is shorter than a chunk.
    _, actions, step_mask = dataset.batch(np.array([4, 5, 20, 24, 25]))
    assert step_mask.sum(1).tolist() == [16, 15, 5, 1, 16]
    np.testing.assert_array_equal(actions[1, :15], episodes[0].actions[5:])
    np.testing.assert_array_equal(actions[1, 15], episodes[0].actions[-1])
    np.testing.assert_array_equal(actions[2, 4:], np.tile(episodes[1].actions[-1], (12, 1)))
    np.testing.assert_array_equal(actions[4], episodes[2].actions[:16])
    assert step_mask[2].tolist() == [True] * 5 + [False] * 11


def test_episodes_can_be_chosen(datasets):
    folder, episodes = datasets[0]["v3.0", "video"], datasets[1]
    dataset = LeRobotDataset(folder, episode_ids=[2, 1])
    assert len(dataset) == 17 + 5
    np.testing.assert_array_equal(dataset.batch(np.array([17])).actions[0, 0], episodes[1].actions[0])
    reference = LeRobotDataset(folder)
    assert torch.equal(dataset.images(np.array([17, 3])), reference.images(np.array([20, 28])))
    assert [e.episode_id for e in LeRobotDataset(folder, episodes_per_task=1).episodes] == [0, 1]
    with pytest.raises(ValueError, match=r"episodes_per_task=3 .* has 2 episodes \(valid: 1-2\)"):
        first_of_each_task(reference.episodes, 3)
    with pytest.raises(ValueError, match=r"\[9\] are not in .* \(valid: 0-3\)"):
        LeRobotDataset(folder, episode_ids=[0, 9])
    with pytest.raises(IndexError, match="not all in 0-59"):
        reference.batch(np.array([60]))


def test_frame_cache_holds_what_decoding_gives(datasets, tmp_path, monkeypatch):
    folder = datasets[0]["v3.0", "video"]
    plain, cached = LeRobotDataset(folder), LeRobotDataset(folder)
    frames = np.array([41, 3, 3, 59, 20])
    progress = []
    path = cached.cache_frames(tmp_path, num_threads=2, on_episode=lambda done, total: progress.append((done, total)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(cached.images(frames), plain.images(frames))
    assert path.stat().st_size >= cached.frame_bytes == 60 * 2 * 32 * 32 * 3
    again = LeRobotDataset(folder)
    monkeypatch.setattr(LeRobotDataset, "_decode", lambda *_: pytest.fail("decoded although a cache exists"))
    assert again.cache_frames(tmp_path) == path
    assert torch.equal(again.images(frames), cached.images(frames))
    assert sorted(tmp_path.iterdir()) == [path]


def test_facts_tell_datasets_apart_and_are_the_same_wherever_they_lie(datasets, copy):
    original = LeRobotDataset(datasets[0]["v2.1", "image"])
    folder = copy(storage="image")
    facts = original.facts()
    assert LeRobotDataset(folder).facts() == facts == json.loads(json.dumps(facts))
    assert (facts["number of episodes"], facts["number of frames"]) == (4, 60)
    assert facts["instructions"] == ["close the drawer", "open the drawer"]

    def differing(dataset: LeRobotDataset) -> list[str]:
        return [name for name, value in dataset.facts().items() if value != facts[name]]

    assert differing(LeRobotDataset(folder, image_size=16)) == ["size of the pictures"]
    file = min((folder / "data").rglob("*.parquet"))
    edit_column(file, "observation.state", lambda rows: rows[2].__setitem__(1, 5.0))
    assert differing(LeRobotDataset(folder))[0] == "SHA-256 of state.y"
    tasks = folder / "meta" / "tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("open the drawer", "open it"))
    assert differing(LeRobotDataset(folder))[0] == "instructions"


def test_a_changed_dataset_gets_another_cache(copy, tmp_path):
    folder = copy()
    first = LeRobotDataset(folder).cache_frames(tmp_path / "cache")
    video = next(folder.rglob("*.mp4"))
    os.utime(video, (1, 1))
    assert LeRobotDataset(folder).cache_frames(tmp_path / "cache") != first
    assert LeRobotDataset(folder, image_size=16).cache_frames(tmp_path / "cache") != first


def test_frames_are_resized_on_request(datasets):
    dataset = LeRobotDataset(datasets[0]["v2.1", "image"], image_size=16)
    images = dataset.images(np.array([0]))
    assert images.shape == (1, 2, 16, 16, 3)
    original = LeRobotDataset(datasets[0]["v2.1", "image"]).images(np.array([0])).float()
    # Away from the edge, halving a linear ramp is averaging pairs.
    pairs = original.unflatten(2, (16, 2)).mean(3).unflatten(3, (16, 2)).mean(4)
    assert (images.float() - pairs)[:, :, 2:-2, 2:-2].abs().max() <= 1
    assert dataset.metadata().resolution("video.image") == (16, 16)


def test_few_files_are_open_at_a_time(datasets, monkeypatch):
    monkeypatch.setattr(lerobot, "MAX_OPEN_FILES", 2)
    open_files: set[int] = set()
    most = 0

    class Counted(lerobot.VideoFile):
        def __init__(self, path, fps):
            nonlocal most
            super().__init__(path, fps)
            open_files.add(id(self))
            most = max(most, len(open_files))

        def close(self):
            super().close()
            open_files.discard(id(self))

    monkeypatch.setattr(lerobot, "VideoFile", Counted)
    dataset = LeRobotDataset(datasets[0]["v2.1", "video"])
    dataset.images(np.arange(len(dataset)))
    assert most == 2


def test_metadata_are_the_statistics_of_the_data(datasets, tmp_path):
    folders, episodes = datasets
    metadata = LeRobotDataset(folders["v2.1", "video"]).metadata()
    states = np.concatenate([episode.states for episode in episodes]).astype(np.float64)
    part = metadata.part("state.gripper")
    for name, expected in (
        ("min", states.min(0)), ("max", states.max(0)), ("mean", states.mean(0)), ("std", states.std(0)),
        ("q01", np.quantile(states, 0.01, axis=0)), ("q99", np.quantile(states, 0.99, axis=0)),
    ):  # fmt: skip
        np.testing.assert_allclose(part[name], expected[6:8], rtol=1e-6)
    assert metadata.part("action.gripper")["min"] == [0.0]
    assert metadata.part("action.gripper")["max"] == [1.0]
    assert metadata.modalities["video"]["image"] == {"resolution": [32, 32], "channels": 3, "fps": 20.0}
    write_metadata(tmp_path / "metadata.json", metadata)
    assert read_metadata(tmp_path / "metadata.json", "libero_franka") == metadata


def test_batches_feed_the_agent(datasets):
    dataset = LeRobotDataset(datasets[0]["v3.0", "image"])
    torch.manual_seed(0)
    agent = Gr00tAgent.from_preset("nano", metadata=dataset.metadata())
    obs, actions, step_mask = dataset.batch(np.array([0, 19]))
    loss = agent(obs, sft_actions=actions, step_mask=step_mask)
    assert torch.isfinite(loss)
    normalised = agent.preprocessor.normalise_actions(torch.from_numpy(dataset.action))[:, :7]
    assert normalised.min() == -1
    assert normalised.max() == 1


def test_stats_json_agrees_with_the_arrays(datasets):
    folders, episodes = datasets
    images = np.concatenate([episode.frames[CAMERAS[0]] for episode in episodes]) / 255.0
    for version in ("v2.1", "v3.0"):
        stats = json.loads((folders[version, "image"] / "meta" / "stats.json").read_text())
        states = np.concatenate([episode.states for episode in episodes]).astype(np.float64)
        np.testing.assert_allclose(stats["observation.state"]["std"], states.std(0), rtol=1e-6)
        np.testing.assert_allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0), rtol=1e-6)
        assert stats["index"]["max"] == [59]
        # All frames of these short episodes enter.
        np.testing.assert_allclose(np.ravel(stats[CAMERAS[0]]["mean"]), images.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(np.ravel(stats[CAMERAS[0]]["std"]), images.std((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(np.ravel(stats[CAMERAS[0]]["max"]), images.max((0, 1, 2)))
        assert np.shape(stats[CAMERAS[0]]["q01"]) == (3, 1, 1)


def test_layouts_have_the_files_that_lerobot_expects(datasets):
    old, new = datasets[0]["v2.1", "video"], datasets[0]["v3.0", "video"]
    for name in ("episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl", "info.json", "modality.json", "stats.json"):
        assert (old / "meta" / name).is_file()
    assert (old / "data/chunk-000/episode_000003.parquet").is_file()
    assert (old / f"videos/chunk-000/{CAMERAS[0]}/episode_000003.mp4").is_file()
    rows = pq.read_table(new / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [
        (0, 20),
        (20, 25),
        (25, 42),
        (42, 60),
    ]
    assert rows[2][f"videos/{CAMERAS[1]}/from_timestamp"] == 25 / 20
    assert len(rows[2]["stats/observation.state/mean"]) == 8
    tasks = pq.read_schema(new / "meta/tasks.parquet")
    assert tasks.pandas_metadata["index_columns"] == ["task"]
    with av.open(str(new / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4")) as video:
        times = [float(frame.pts * frame.time_base) for frame in video.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(60) / 20, atol=1e-9)


def test_large_datasets_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("gr00t_agent.lerobot_writer.VIDEO_FILE_MB", 0)
    monkeypatch.setattr("gr00t_agent.lerobot_writer.DATA_FILE_MB", 0)
    episodes = write_dataset(tmp_path / "split", "v3.0", "video", lengths=(3, 4))
    assert len(list((tmp_path / "split").rglob("file-001.mp4"))) == 2
    dataset = LeRobotDataset(tmp_path / "split")
    np.testing.assert_array_equal(dataset.batch(np.array([3])).actions[0, 0], episodes[1].actions[0])
    assert dataset.images(np.arange(7)).shape == (7, 2, 32, 32, 3)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder and no hub name"):
        LeRobotDataset(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no meta/info.json"):
        LeRobotDataset(tmp_path)


def test_empty_dataset(copy):
    folder = copy()
    edit_json(folder / "meta" / "info.json", total_episodes=0)
    with pytest.raises(ValueError, match="is empty"):
        LeRobotDataset(folder)


def test_no_episodes_are_listed(copy):
    folder = copy()
    (folder / "meta" / "episodes.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty: its meta/ lists no episodes"):
        LeRobotDataset(folder)
    (folder / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"episodes.jsonl does not exist; the dataset is incomplete"):
        LeRobotDataset(folder)


def test_no_episodes_are_listed_in_v3(copy):
    folder = copy("v3.0")
    shutil.rmtree(folder / "meta" / "episodes")
    with pytest.raises(FileNotFoundError, match=r"meta/episodes holds no parquet file; the dataset is incomplete"):
        LeRobotDataset(folder)


def test_info_without_what_every_dataset_states(copy):
    folder = copy()
    info = json.loads((folder / "meta" / "info.json").read_text())
    del info["fps"], info["features"]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"info.json has no fps, features \(present: codebase_version, "):
        LeRobotDataset(folder)


@pytest.mark.parametrize(
    ("version", "file"),
    [
        ("v2.1", "meta/info.json"),
        ("v2.1", "meta/modality.json"),
        ("v2.1", "meta/episodes.jsonl"),
        ("v2.1", "meta/tasks.jsonl"),
        ("v2.1", "data/chunk-000/episode_000001.parquet"),
        ("v3.0", "meta/tasks.parquet"),
        ("v3.0", "meta/episodes/chunk-000/file-000.parquet"),
        ("v3.0", f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"),
    ],
)
def test_damaged_files_are_named(copy, version, file):
    path = copy(version) / file

    def use() -> None:
        LeRobotDataset(path.parents[len(Path(file).parts) - 1]).images(np.array([0]))

    use()
    path.write_bytes(path.read_bytes()[20:-20])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.*; download or write it again"):
        use()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=rf"{path.name} is a Git LFS pointer instead of the file; run `git lfs pull`"):
        use()


def test_unknown_version(copy):
    folder = copy()
    edit_json(folder / "meta" / "info.json", codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"'v1.6' is not supported \(valid: v2.0, v2.1, v3.0\)"):
        LeRobotDataset(folder)


def test_without_modality_json_another_one_can_be_given(copy, tmp_path):
    folder = copy()
    (folder / "meta" / "modality.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match=r"modality.json does not exist.*libero_gym/data/modality.json"):
        LeRobotDataset(folder)
    assert len(LeRobotDataset(folder, modality_file=tmp_path / "elsewhere.json")) == 60


def test_missing_keys_and_columns(copy):
    folder = copy()
    content = modality()
    del content["state"]["yaw"], content["video"]["image"]
    edit_json(folder / "meta" / "modality.json", **content)
    with pytest.raises(
        ValueError, match=r"modality.json has no video.image, state.yaw \(present: .*\); add what the data"
    ):
        LeRobotDataset(folder)
    content = modality()
    content["video"]["image"]["original_key"] = "observation.images.front"
    edit_json(folder / "meta" / "modality.json", **content)
    with pytest.raises(
        ValueError, match=r"video.image is column 'observation.images.front'.*does not have \(present: "
    ):
        LeRobotDataset(folder)


def test_slices_beyond_the_column(copy):
    folder = copy()
    content = modality()
    content["action"]["gripper"] = {"start": 6, "end": 8}
    edit_json(folder / "meta" / "modality.json", **content)
    with pytest.raises(ValueError, match=r"action.gripper is \[6, 8\) of column 'action', which has 7 elements"):
        LeRobotDataset(folder)


def edit_column(file: Path, name: str, change) -> None:
    """Writes a parquet file anew with `change` applied to the list of one column's values."""
    table = pq.read_table(file)
    values = table[name].to_pylist()
    change(values)
    index = table.column_names.index(name)
    field = table.schema.field(index)
    pq.write_table(table.set_column(index, field, pa.array(values, field.type)), file)


def test_a_camera_that_holds_no_images(copy):
    folder = copy()
    content = modality()
    content["video"]["image"]["original_key"] = "observation.state"
    edit_json(folder / "meta" / "modality.json", **content)
    with pytest.raises(ValueError, match=r"video.image is column 'observation.state', which holds no images"):
        LeRobotDataset(folder)


def test_a_gripper_of_another_convention(copy):
    folder = copy()
    # LIBERO's own: -1 open, +1 close.
    for file in (folder / "data").rglob("*.parquet"):
        edit_column(file, "action", lambda rows: [row.__setitem__(6, 1 - 2 * row[6]) for row in rows])
    with pytest.raises(ValueError, match=r"action.gripper of .* is in \[-1, 1\]; it must be 1 open, 0 close"):
        LeRobotDataset(folder)
    dataset = LeRobotDataset(folder, data_config=LiberoFrankaDataConfig(gripper_key=None))
    assert dataset.metadata().part("action.gripper")["min"] == [-1.0]


def test_tasks_and_numbers_that_are_not_there(copy):
    folder = copy()
    file = sorted((folder / "data").rglob("*.parquet"))[1]
    edit_column(file, "task_index", lambda rows: rows.__setitem__(0, 7))
    with pytest.raises(ValueError, match=r"column 'task_index' names tasks \[7\], which meta/ does not list"):
        LeRobotDataset(folder)
    edit_column(file, "observation.state", lambda rows: rows[2].__setitem__(1, float("nan")))
    with pytest.raises(ValueError, match=r"state.y of .* is not finite in frame 22"):
        LeRobotDataset(folder)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["action"]), file)
    with pytest.raises(ValueError, match=r"episode_000001.parquet is damaged \(No match for .*action"):
        LeRobotDataset(folder)


def test_columns_may_have_other_names(datasets, copy, tmp_path):
    folder = copy(storage="image")
    names = dict(
        zip((*CAMERAS, "observation.state", "action"), ("image", "wrist_image", "state", "actions"), strict=True)
    )
    for file in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), file)
    info = json.loads((folder / "meta" / "info.json").read_text())
    features = {names.get(name, name): feature for name, feature in info["features"].items()}
    edit_json(folder / "meta" / "info.json", codebase_version="v2.0", fps=10, features=features)
    (folder / "meta" / "episodes_stats.jsonl").unlink()
    with pytest.raises(ValueError, match=r"video.image is column 'observation.images.image', which .* does not have"):
        LeRobotDataset(folder)
    content = modality()
    for modality_name, column in (("state", "state"), ("action", "actions")):
        for entry in content[modality_name].values():
            entry["original_key"] = column
    for name, entry in content["video"].items():
        entry["original_key"] = name
    (tmp_path / "openpi.json").write_text(json.dumps(content))
    dataset = LeRobotDataset(folder, modality_file=tmp_path / "openpi.json")
    reference = LeRobotDataset(datasets[0]["v2.1", "image"])
    frames = np.array([59, 3, 20])
    assert torch.equal(dataset.images(frames), reference.images(frames))
    np.testing.assert_array_equal(dataset.action, reference.action)
    np.testing.assert_array_equal(dataset.state["state.gripper"], reference.state["state.gripper"])
    assert dataset.metadata().modalities["video"]["image"]["fps"] == 10


def test_mixed_resolutions(copy):
    folder = copy()
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"][CAMERAS[1]]["shape"] = [64, 64, 3]
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"mixes resolutions \(video.image 32x32, video.wrist_image 64x64\)"):
        LeRobotDataset(folder)
    dataset = LeRobotDataset(folder, image_size=16)
    with pytest.raises(ValueError, match=r"has frames of \(32, 32, 3\), its info.json says \[64, 64, 3\]"):
        dataset[0]


def test_corrupt_short_and_absent_videos(copy):
    folder = copy()
    dataset = LeRobotDataset(folder)
    videos = sorted((folder / "videos/chunk-000" / CAMERAS[0]).iterdir())
    content = bytearray(videos[0].read_bytes())
    start = content.index(b"mdat") + 700  # behind the encoder's own message
    content[start : start + 200] = bytes(200)
    videos[0].write_bytes(content)
    videos[1].write_bytes(b"no video at all")
    videos[2].unlink()
    for frames, message in (
        (np.arange(20), r"episode_000000.mp4 is damaged"),
        (np.array([20]), r"episode_000001.mp4 is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset.images(frames)
    with pytest.raises(FileNotFoundError, match=r"episode_000002.mp4 does not exist"):
        dataset.images(np.array([25]))
    shutil.copyfile(videos[3], videos[0])  # 18 frames instead of 20
    with pytest.raises(ValueError, match=r"ends before frame 19 \(0.950 s\)"):
        LeRobotDataset(folder).images(np.array([19]))


def test_damaged_tables(copy):
    folder = copy()
    files = sorted((folder / "data").rglob("*.parquet"))
    shutil.copyfile(files[0], files[2])
    with pytest.raises(ValueError, match=r"has 0 rows of episode 2, whose length is 17"):
        LeRobotDataset(folder)
    files[2].write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="is damaged"):
        LeRobotDataset(folder)
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match="the dataset is incomplete"):
        LeRobotDataset(folder)


def test_corrupt_and_misshapen_pngs(copy):
    folder = copy(storage="image")
    file = sorted((folder / "data").rglob("*.parquet"))[0]
    small = io.BytesIO()
    Image.new("RGB", (24, 32)).save(small, format="PNG")

    def damage(cells: list[dict]) -> None:
        cells[3]["bytes"] = b"\x89PNG" + cells[3]["bytes"][40:]
        cells[5]["bytes"] = small.getvalue()

    edit_column(file, CAMERAS[0], damage)
    dataset = LeRobotDataset(folder)
    dataset.images(np.array([2]))
    with pytest.raises(ValueError, match=r"image 3 of 'observation.images.image' cannot be decoded"):
        dataset.images(np.array([3]))
    with pytest.raises(
        ValueError, match=r"observation.images.image of .* mixes resolutions: \[\(32, 24, 3\), \(32, 32, 3\)"
    ):
        dataset.images(np.array([4, 5]))
    with pytest.raises(ValueError, match=r"has frames of \(32, 24, 3\), its info.json says \[32, 32, 3\]"):
        dataset.images(np.array([5]))


def test_statistics_of_other_widths_or_resolutions(datasets):
    dataset = LeRobotDataset(datasets[0]["v2.1", "video"])
    metadata = dataset.metadata()
    check_metadata(metadata, metadata, dataset.data_config)
    narrow = LeRobotDataset(datasets[0]["v2.1", "video"]).metadata()
    narrow.statistics["state"]["gripper"] = narrow.statistics["state"]["x"]
    with pytest.raises(ValueError, match=r"state.gripper has 1 elements in the policy's statistics, 2 in the dataset"):
        check_metadata(narrow, metadata, dataset.data_config)
    small = LeRobotDataset(datasets[0]["v2.1", "video"], image_size=16).metadata()
    with pytest.raises(ValueError, match=r"video.image is \(16, 16\) pixels in the policy's metadata"):
        check_metadata(small, metadata, dataset.data_config)


def test_bad_episodes_are_not_staged(tmp_path):
    episode = make_episode(0, 4)
    fields = dict(frames=episode.frames, states=episode.states, actions=episode.actions, instruction="go")
    for change, message in (
        ({"states": episode.states[:3]}, "one length"),
        ({"actions": episode.actions[:, :6]}, r"actions has shape \(4, 6\), expected \(4, 7\)"),
        ({"states": episode.states * np.nan}, "states is not finite in frame 0"),
        ({"actions": np.full((4, 7), 1e300)}, r"actions is not finite in frame 0: \[1e\+300, .*, written as float32"),
        ({"actions": episode.actions * 1j}, "actions is complex64; it must hold numbers"),
        ({"instruction": ""}, "instruction is ''; it must be a sentence"),
        ({"instruction": " "}, "instruction is ' '; it must be a sentence"),
        ({"instruction": "None"}, "instruction is 'None'; it must be a sentence"),
        ({"frames": {"a": np.zeros((4, 31, 32, 3), np.uint8)}}, "videos need even sizes"),
        ({"frames": {"a": np.zeros((4, 32, 32, 3), np.float32)}}, "must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            stage_episode(tmp_path / "bad", type(episode)(**(fields | change)), Recording())
    assert list(tmp_path.iterdir()) == []


def test_bad_assemblies(tmp_path):
    recording = Recording(storage="image")
    staged = [tmp_path / "staged" / f"{i}" for i in range(3)]
    for i, size in enumerate((32, 32, 48)):
        stage_episode(staged[i], make_episode(i, 2, size), recording)
    options = dict(version="v2.1", modality=modality())
    with pytest.raises(ValueError, match="one dataset has one resolution"):
        assemble_dataset(tmp_path / "out", staged, recording, **options)
    with pytest.raises(ValueError, match="one dataset has one resolution and storage"):
        assemble_dataset(tmp_path / "out", staged[:2], Recording(storage="video"), **options)
    with pytest.raises(ValueError, match="no staged episodes"):
        assemble_dataset(tmp_path / "out", [], recording, **options)
    with pytest.raises(ValueError, match=r"cannot be written \(valid: v2.1, v3.0\)"):
        assemble_dataset(tmp_path / "out", staged[:2], recording, **(options | {"version": "v2.0"}))
    assert not (tmp_path / "out").exists()
    assemble_dataset(tmp_path / "out", staged[:2], recording, **options)
    with pytest.raises(FileExistsError, match="is not empty"):
        assemble_dataset(tmp_path / "out", staged[:2], recording, **options)
