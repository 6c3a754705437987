"""Supervised fine-tuning: what a step is made of, that it learns, resumes exactly, and exports what was trained."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from algorithms import sft_gr00t
from algorithms.common.augmentation import NUM_DRAWS, Augmentation, augment, hue_rotation, jitter
from algorithms.common.checkpoint_notes import suite_of
from algorithms.common.lora import LoraSettings, add_lora, merged
from algorithms.common.prefetch import Prefetch
from algorithms.common.resume import checkpoints_in
from algorithms.sft_gr00t import Args, flow_matching_draws, frames_at, learning_rate_at, make_average
from gr00t_agent import Gr00tAgent, read_metadata
from gr00t_agent.lerobot import LeRobotDataset
from gr00t_agent.lerobot_writer import Recording, assemble_dataset, stage_episode
from gr00t_agent.transforms import resize_views
from tests import preloaded
from tests.algorithms.line_env import LineVectorEnv
from tests.algorithms.sft_trainer import make_tiny, sft_args
from tests.algorithms.tiny_agent import tiny_agent
from tests.gr00t_agent.lerobot_data import make_episode, modality, write_dataset

ROOT = Path(__file__).resolve().parents[2]
STATE = "checkpoints/step_6/training_state"
PLAIN = Augmentation(random_crop=False, brightness=0, contrast=0, saturation=0, hue=0)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations") / "data"
    write_dataset(folder, "v3.0", "image", lengths=(12, 9))
    return folder


@pytest.fixture(scope="module")
def agent(demonstrations) -> Gr00tAgent:
    """Do not change it."""
    torch.manual_seed(0)
    return tiny_agent(LeRobotDataset(demonstrations).metadata()).eval()


# -- parts of a step ---------------------------------------------------------------------------------------------------


def test_without_strength_images_are_what_the_policy_sees():
    images = torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = augment(images, torch.rand(3, NUM_DRAWS), PLAIN, 0.95, 28)
    expected = resize_views(images.flatten(0, 1), 0.95, 28).unflatten(0, (3, 2))
    assert torch.equal(result, expected)


def test_random_crops_are_where_the_draws_say_and_alike_in_all_views():
    rows = torch.arange(40, dtype=torch.uint8)
    images = (rows[:, None, None] + torch.zeros(40, 40, 3, dtype=torch.uint8)).expand(3, 2, 40, 40, 3)
    draws = torch.zeros(3, NUM_DRAWS)
    draws[:, 0] = torch.tensor([0.0, 0.5, 0.999])
    only_crop = Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
    result = augment(images, draws, only_crop, 0.9, 36)  # [3, 2, 3, 36, 36]
    # A crop of 36 of 40 rows starts at 0 to 4; truncation to 8 bits may take 1 off.
    assert (result[:, 0, 0, 0, 0].int() - torch.tensor([0, 2, 4])).abs().max() <= 1
    assert torch.equal(result[:, 0], result[:, 1])


def test_jitter_by_hand():
    values = torch.tensor([0.5, 0.2, 0.1])[None, None, :, None, None].expand(1, 1, 3, 2, 2)
    highest, middle = torch.ones(1, 4), torch.full((1, 4), 0.5)
    settings = dict(random_crop=False, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)

    def changed(draws: torch.Tensor, **strength: float) -> torch.Tensor:
        return jitter(values, draws, Augmentation(**(settings | strength)))[0, 0, :, 0, 0]

    grey = 0.299 * 0.5 + 0.587 * 0.2 + 0.114 * 0.1
    colour = torch.tensor([0.5, 0.2, 0.1])
    torch.testing.assert_close(changed(highest, brightness=0.3), 1.3 * colour)
    torch.testing.assert_close(changed(highest, saturation=0.5), (grey + 1.5 * (colour - grey)).clamp(0, 1))
    torch.testing.assert_close(changed(highest, contrast=0.4), (grey + 1.4 * (colour - grey)).clamp(0, 1))
    for name in ("brightness", "contrast", "saturation", "hue"):
        torch.testing.assert_close(changed(middle, **{name: 0.5}), colour, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"hue=0.7 is not in 0-0.5"):
        Augmentation(hue=0.7)


def test_hue_turns_colours_and_leaves_brightness_and_greys():
    turn = hue_rotation(torch.tensor([0.0, 1.0, 2 * np.pi]))
    torch.testing.assert_close(turn[0], torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn[2], torch.eye(3), atol=1e-5, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114])
    red = torch.tensor([1.0, 0.0, 0.0])
    assert luma @ (turn[1] @ red) == pytest.approx(0.299, abs=1e-5)
    assert (turn[1] @ red - red).abs().max() > 0.3
    torch.testing.assert_close(turn[1] @ torch.ones(3), torch.ones(3), atol=2e-3, rtol=0)


def test_every_pass_over_the_data_takes_each_frame_once():
    steps = np.concatenate([frames_at(step, 4, 10, seed=3) for step in range(1, 6)])
    assert sorted(steps[:10]) == sorted(steps[10:]) == list(range(10))
    assert list(steps[:10]) != list(steps[10:])
    assert list(frames_at(2, 4, 10, seed=4)) != list(steps[4:8])
    assert len(frames_at(1, 25, 10, seed=3)) == 25  # a batch may be larger than the data


def test_step_size_rises_then_falls():
    args = Args(num_steps=100, warmup_fraction=0.1, learning_rate=1.0)
    sizes = [learning_rate_at(step, args) for step in range(1, 101)]
    assert sizes[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert sizes[10] == 1.0
    assert sizes[55] == pytest.approx(0.5, abs=0.01)
    assert 0 < sizes[-1] < 0.001
    assert learning_rate_at(1, Args(num_steps=10, warmup_fraction=0.0, learning_rate=1.0)) == 1.0


def test_noise_and_times_are_distributed_as_in_the_agent(agent):
    head = agent.config.action_head
    noise, tau = flow_matching_draws(head, 4096, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(noise, agent._initial_noise(4096, generator))
    assert torch.equal(tau, agent._training_time(4096, generator))
    # E[(s - b) / s] with E[b] = alpha / (alpha + 1).
    assert tau.mean() == pytest.approx(1 - 0.6 / 0.999, abs=0.02)


def test_prefetch_keeps_the_order_and_passes_errors_on():
    release = threading.Event()

    def load(key: int) -> int:
        if key == 0:
            assert release.wait(10)
        else:
            release.set()
        if key == 5:
            raise ValueError("frame 5 is damaged")
        return 10 * key

    batches = Prefetch(load, range(8), num_threads=2, num_ahead=3)
    received = []
    with pytest.raises(ValueError, match="frame 5"):
        received.extend(batches)
    assert received == [0, 10, 20, 30, 40] or received == []
    ordered = Prefetch(lambda key: key, range(20), num_threads=3, num_ahead=4)
    assert list(ordered) == list(range(20))
    assert ordered.wait_s > 0


def test_average_of_weights_by_hand():
    parameter = nn.Parameter(torch.zeros(2))
    average = make_average([parameter], decay=0.5)
    parameter.data.fill_(1.0)
    average.step([parameter])  # decay 2/11
    assert average.shadow_params[0].tolist() == pytest.approx([9 / 11] * 2)
    average.optimization_step = 99
    average.step([parameter])  # decay 0.5
    average.store([parameter])
    average.copy_to([parameter])
    assert parameter.tolist() == pytest.approx([10 / 11] * 2)
    average.restore([parameter])
    assert parameter.tolist() == [1.0, 1.0]


def test_the_average_of_rounded_weights_is_kept_in_float32():
    parameter = nn.Parameter(torch.full((1,), 1.0, dtype=torch.bfloat16))
    average = make_average([parameter], decay=0.999)
    average.optimization_step = 100_000
    parameter.data.fill_(2.0)
    for _ in range(10):
        average.step([parameter])
    # In bfloat16 a step of 0.001 from 1 would be lost.
    assert average.shadow_params[0].tolist() == pytest.approx([2 - 0.999**10], abs=1e-6)


def test_adapters_train_alone_in_their_part_and_merge_into_the_plain_network(demonstrations):
    torch.manual_seed(0)
    dataset = LeRobotDataset(demonstrations)
    agent = tiny_agent(dataset.metadata()).eval()
    names = set(agent.state_dict())
    obs, _, _ = dataset.batch(np.arange(3))
    noise = torch.randn(3, 16, 8)
    before = agent.predict_chunk(obs, noise=noise)
    assert add_lora(agent, LoraSettings(rank=2, dropout=0.0)) == 9  # 3 in each of 2 DiT blocks and 1 VL block
    agent.eval()
    torch.testing.assert_close(agent.predict_chunk(obs, noise=noise), before)
    trained = {name for name, parameter in agent.named_parameters() if parameter.requires_grad}
    assert not any("action_head.model." in name and ".lora_" not in name for name in trained)
    assert any(name.startswith("action_head.state_encoder") for name in trained)
    assert not any("value_head" in name for name in trained)
    for name, parameter in agent.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted = agent.predict_chunk(obs, noise=noise)
    assert (adapted - before).abs().max() > 0.01
    weights = {name: value.clone() for name, value in agent.state_dict().items()}
    with merged(agent):
        assert set(agent.state_dict()) == names
        torch.testing.assert_close(agent.predict_chunk(obs, noise=noise), adapted, atol=1e-5, rtol=1e-4)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, weights[name]), name
    with pytest.raises(
        ValueError, match=r"\['tail'\] are unknown \(valid: action_head, language_model, vision_model\)"
    ):
        add_lora(agent, LoraSettings(rank=2, parts=("tail",)))


# -- the trainer -------------------------------------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_few_samples_are_overfitted(tmp_path):
    demonstrations = tmp_path / "data"
    write_dataset(demonstrations, "v2.1", "image", lengths=(3, 3), has_constant_actions=True)
    args = sft_args(
        tmp_path, demonstrations, num_steps=100, batch_size=24, micro_batch_size=24, learning_rate=3e-3,
        save_interval=1000, log_interval=10, augmentation=PLAIN, betas=(0.9, 0.95), warmup_fraction=0.02,
    )  # fmt: skip
    metrics = sft_gr00t.main(args, make_tiny)
    history = losses(tmp_path / "run")
    assert history[-1] < 0.4 * history[0], history
    assert metrics["charts/samples_per_s"] > 0
    assert 0 <= metrics["time/data_fraction"] <= 1
    assert metrics["charts/epoch"] == 400
    # The exported policy does what was demonstrated.
    agent = Gr00tAgent.from_pretrained(tmp_path / "run" / "checkpoints" / "step_100").eval()
    obs, actions, step_mask = LeRobotDataset(demonstrations).batch(np.array([0, 3]))
    chunk = agent.predict_chunk(obs, noise=torch.zeros(2, 16, 8))
    predicted = agent.preprocessor.unnormalise_actions(chunk)
    error, swapped = ((predicted - a)[step_mask].abs().mean() for a in (actions, actions.flip(0)))
    assert error < 0.3 * swapped


def test_a_resumed_run_equals_an_uninterrupted_one(demonstrations, tmp_path, monkeypatch):
    options = dict(ema_decay=0.9, micro_batch_size=4)
    sft_gr00t.main(sft_args(tmp_path / "whole", demonstrations, **options), make_tiny)

    class Interrupted(Exception):
        pass

    def break_off(step: int, args: Args) -> float:
        if step == 5:
            raise Interrupted
        return learning_rate_at(step, args)

    broken = sft_args(tmp_path / "broken", demonstrations, **options)
    with monkeypatch.context() as patch:
        patch.setattr(sft_gr00t, "learning_rate_at", break_off)
        with pytest.raises(Interrupted):
            sft_gr00t.main(broken, make_tiny)
    run = tmp_path / "broken" / "run"
    assert len(losses(run)) == 4
    resumed = sft_args(tmp_path / "broken", demonstrations, **options, resume=run)
    sft_gr00t.main(resumed, make_tiny)
    whole = tmp_path / "whole" / "run"
    assert losses(run) == losses(whole)
    for file in (
        "checkpoints/step_6/model.safetensors",
        f"{STATE}/weights.safetensors",
        f"{STATE}/optimizer.safetensors",
    ):
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), (file, name)
    # With averaged weights the checkpoint is not the state.
    exported, state = (
        load_file(whole / f) for f in ("checkpoints/step_6/model.safetensors", f"{STATE}/weights.safetensors")
    )
    name = "action_head.action_decoder.layer1.W"
    assert not torch.equal(exported[name], state[name])
    with pytest.raises(ValueError, match=r"cannot go on with other arguments: batch_size=16 \(was 8\)"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations, **options, resume=run, batch_size=16), make_tiny)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint to go on from"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations, resume=tmp_path), make_tiny)


def test_a_dataset_that_was_replaced_is_refused_before_its_frames_are_decoded(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    write_dataset(folder, "v3.0", "image", lengths=(12, 9))
    args = sft_args(tmp_path, folder)
    sft_gr00t.main(args, make_tiny)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    resumed = replace(args, resume=Path("auto"))

    def replaced_by(lengths: tuple[int, ...], **options: Any) -> None:
        folder.rename(tmp_path / f"before_{len(list(tmp_path.iterdir()))}")
        shutil.rmtree(tmp_path / "data_staged")
        write_dataset(folder, "v3.0", "image", lengths=lengths, **options)

    for lengths, options, told in (
        ((12, 9, 5), {}, "number of episodes of dataset {} was 2 when its run began, and is 3 now"),
        ((12, 8), {}, "number of frames of dataset {} was 21 when its run began, and is 20 now"),
        ((9, 12), {}, "SHA-256 of the episodes' lengths of dataset {} was"),
        ((12, 9), {"has_constant_actions": True}, "SHA-256 of action.x of dataset {} was"),
    ):
        replaced_by(lengths, **options)
        with monkeypatch.context() as patch:
            patch.setattr(LeRobotDataset, "cache_frames", lambda *_, **__: pytest.fail("frames were decoded"))
            message = f"step_3 cannot go on: {told.format(folder)}"
            with pytest.raises(ValueError, match=message):
                sft_gr00t.main(resumed, make_tiny)

    replaced_by((12, 9))  # the same again, written anew
    sft_gr00t.main(resumed, make_tiny)
    assert len(losses(tmp_path / "run")) == 6


def test_frozen_weights_that_were_replaced_are_refused(demonstrations, tmp_path):
    def make_half_frozen(args: Args, metadata: Any, change: float = 0.0) -> Gr00tAgent:
        agent = make_tiny(args, metadata)
        agent.set_trainable(tune_visual=False, tune_llm=False, tune_value=False)
        next(agent.backbone.parameters()).data.view(-1)[0] += change
        return agent

    args = sft_args(tmp_path, demonstrations)
    sft_gr00t.main(args, make_half_frozen)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    resumed = replace(args, resume=Path("auto"))
    with pytest.raises(ValueError, match="step_3 cannot go on: SHA-256 of the agent's frozen weights was"):
        sft_gr00t.main(resumed, partial(make_half_frozen, change=1e-3))
    sft_gr00t.main(resumed, make_half_frozen)
    assert len(losses(tmp_path / "run")) == 6


def test_what_was_not_logged_is_kept_over_a_stop(demonstrations, tmp_path, monkeypatch):
    """Means since the last log, whatever step the run was stopped after, are those of an uninterrupted run."""
    options = dict(log_interval=4, save_interval=0, keep_best=0)
    sft_gr00t.main(sft_args(tmp_path / "whole", demonstrations, **options), make_tiny)

    def request_stop(step: int, args: Args) -> float:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate_at(step, args)

    stopped = sft_args(tmp_path / "parts", demonstrations, **options)
    with monkeypatch.context() as patch:
        patch.setattr(sft_gr00t, "learning_rate_at", request_stop)
        with pytest.raises(SystemExit) as caught:
            sft_gr00t.main(stopped, make_tiny)
    assert caught.value.code == 0
    run = tmp_path / "parts" / "run"
    assert [done for done, _ in checkpoints_in(run)] == [3]
    assert not (run / "metrics.jsonl").exists()
    sft_gr00t.main(replace(stopped, resume=Path("auto")), make_tiny)
    assert losses(run) == losses(tmp_path / "whole" / "run")
    assert len(losses(run)) == 2


def test_a_stop_during_an_evaluation_keeps_the_step(demonstrations, tmp_path, monkeypatch, capsys):
    def evaluate_into(path: Path, step: int, agent: Gr00tAgent, make_envs: Any, args: Args) -> float:
        envs = make_envs(2)
        envs.reset(seed=0)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            envs.step(np.zeros((2, 2, 7), np.float32))

    args = sft_args(tmp_path, demonstrations, num_steps=4, eval_interval=2, eval_episodes_per_task=1, ema_decay=0.9)
    weights: list[torch.Tensor] = []

    def make_agent(args: Args, metadata: Any) -> Gr00tAgent:
        agent = make_tiny(args, metadata)
        weights.append(agent.action_head.action_decoder.layer1.W)
        return agent

    with monkeypatch.context() as patch:
        patch.setattr(sft_gr00t, "evaluate_into", evaluate_into)
        with pytest.raises(SystemExit):
            sft_gr00t.main(args, make_agent, lambda args, num_envs, size: LineVectorEnv(num_envs, image_size=size))
    ((done, folder),) = checkpoints_in(tmp_path / "run")
    assert done == 2 == len(losses(tmp_path / "run"))
    # It was stopped with averaged weights in their place; the trained ones are back and saved.
    state = load_file(folder / "training_state" / "weights.safetensors")
    assert torch.equal(state["action_head.action_decoder.layer1.W"], weights[0])
    assert not torch.equal(load_file(folder / "model.safetensors")["action_head.action_decoder.layer1.W"], weights[0])
    monkeypatch.setattr(sft_gr00t, "evaluate_into", lambda *inputs: 0.5)
    sft_gr00t.main(replace(args, resume=Path("auto")), make_tiny)
    assert "the evaluation of" in capsys.readouterr().out


def test_the_newest_and_the_best_checkpoints_are_kept(demonstrations, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.1])
    monkeypatch.setattr(sft_gr00t, "evaluate_into", lambda *inputs: next(scores))
    args = sft_args(tmp_path, demonstrations, save_interval=1, keep_last=1, eval_interval=2, eval_episodes_per_task=1)
    sft_gr00t.main(args, make_tiny)
    assert [done for done, _ in checkpoints_in(tmp_path / "run")] == [2, 6]


def test_micro_batches_and_frame_caches_do_not_change_the_result(demonstrations, tmp_path):
    runs = {
        "whole": dict(),
        "parts": dict(micro_batch_size=2),
        "decoded": dict(frame_cache="none"),
        "device": dict(frame_cache="device"),
    }
    for name, changes in runs.items():
        sft_gr00t.main(sft_args(tmp_path / name, demonstrations, num_steps=2, **changes), make_tiny)
    reference = losses(tmp_path / "whole" / "run")
    assert losses(tmp_path / "decoded" / "run") == losses(tmp_path / "device" / "run") == reference
    # The masks of the parts differ, so plain means of means would not agree.
    assert losses(tmp_path / "parts" / "run") == pytest.approx(reference, rel=1e-5)


def test_sharded_weights_are_refused(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_gr00t, "make_accelerator", lambda *inputs: SimpleNamespace(is_fsdp2=True))
    with pytest.raises(ValueError, match="FSDP cannot be used for fine-tuning"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations), make_tiny)


@pytest.mark.slow
def test_two_processes_equal_one(demonstrations, tmp_path):
    options = dict(micro_batch_size=4, ema_decay=0.9, num_steps=4, save_interval=4)
    sft_gr00t.main(sft_args(tmp_path / "one", demonstrations, **options), make_tiny)
    program = (
        "import torch\nfrom pathlib import Path\nfrom algorithms import sft_gr00t\n"
        "from tests.algorithms.sft_trainer import make_tiny, sft_args\ntorch.set_num_threads(1)\n"
        f"args = sft_args(Path({str(tmp_path / 'two')!r}), Path({str(demonstrations)!r}), **{options!r})\n"
        "sft_gr00t.main(args, make_tiny)\n"
    )
    processes = preloaded.start_two("-c", program, CUDA_VISIBLE_DEVICES="")
    output = "".join(process.communicate(timeout=240)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], output
    assert output.count("step 4/4") == output.count("checkpoint   ") == 1
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for file in ("checkpoints/step_4/model.safetensors", "checkpoints/step_4/training_state/weights.safetensors"):
        weights, expected = load_file(two / file), load_file(one / file)
        assert weights.keys() == expected.keys()
        # Adam makes a gradient that is all rounding as large as any. That of a key's bias always is: it moves no
        # attention. Of others single elements are.
        for name in (name for name in expected if not name.endswith(("to_k.bias", "k_proj.bias"))):
            assert (weights[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_exports_statistics_and_flags(demonstrations, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_gr00t, "preset_policy", lambda name: tiny_agent(metadata).policy)
    metadata = LeRobotDataset(demonstrations).metadata()
    calls: list[Any] = []

    def evaluate_into(path: Path, step: int, agent: Gr00tAgent, make_envs: Any, args: Args) -> float:
        envs = make_envs(3)
        calls.append((step, agent.training, envs.num_envs, envs.unwrapped.image_size))
        return 0.25

    monkeypatch.setattr(sft_gr00t, "evaluate_into", evaluate_into)
    args = sft_args(tmp_path, demonstrations, num_steps=4, eval_interval=2, eval_episodes_per_task=1)
    metrics = sft_gr00t.main(args, make_tiny, lambda args, num_envs, size: LineVectorEnv(num_envs, image_size=size))
    assert calls == [(2, False, 3, 32), (4, False, 3, 32)]
    assert metrics["eval/success_once"] == 0.25
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    assert read_metadata(folder / "experiment_cfg" / "metadata.json", "libero_franka") == metadata
    saved = json.loads((folder / "policy_config.json").read_text())
    assert saved["trainable"]["tune_value"]
    # A second round on the checkpoint, with its own statistics and adapters only in the action head.
    again = sft_args(
        tmp_path / "again", demonstrations, model=str(folder), statistics="checkpoint", lora_rank=2, num_steps=1,
        dropout=False, tune_visual=False, tune_llm=False,
    )  # fmt: skip
    sft_gr00t.main(again)
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again/run/checkpoints/step_1"))
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert not any(name.startswith("backbone.") for name in changed)
    assert any(".to_q." in name for name in changed)
    assert not any(".to_out." in name for name in changed)


def test_bad_arguments_and_numbers_stop_the_run(demonstrations, tmp_path):
    with pytest.raises(ValueError, match="dataset is not given"):
        sft_gr00t.main(sft_args(tmp_path, Path(), dataset=""), make_tiny)
    with pytest.raises(ValueError, match="batch_size=8 must be a positive multiple of micro_batch_size=3"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations, micro_batch_size=3), make_tiny)

    def make_broken(args: Args, metadata: Any) -> Gr00tAgent:
        agent = make_tiny(args, metadata)
        agent.action_head.vlln.weight.data.fill_(float("nan"))
        return agent

    with pytest.raises(ValueError, match=r"ema_decay=1.0 is not in \[0, 1\)"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations, ema_decay=1.0), make_tiny)
    with pytest.raises(FloatingPointError, match="gradient norm is nan in iteration 1"):
        sft_gr00t.main(sft_args(tmp_path, demonstrations), make_broken)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_other_data_is_refused(demonstrations, tmp_path):
    metadata = LeRobotDataset(demonstrations).metadata()
    agent = tiny_agent(metadata)
    agent.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "experiment_cfg" / "metadata.json"
    stored = json.loads(path.read_text())

    def train(change: Callable[[dict[str, Any]], object]) -> None:
        content = json.loads(json.dumps(stored))
        change(content["libero_franka"])
        path.write_text(json.dumps(content))
        args = sft_args(
            tmp_path, demonstrations, model=str(tmp_path / "checkpoint"), statistics="checkpoint", num_steps=1,
            run_name=f"run_{len(list(tmp_path.iterdir()))}",
        )  # fmt: skip
        sft_gr00t.main(args)

    def narrow_gripper(content: dict[str, Any]) -> None:
        for values in content["statistics"]["state"]["gripper"].values():
            values.pop()
        content["modalities"]["state"]["gripper"]["shape"] = [1]

    train(lambda content: None)
    with pytest.raises(ValueError, match=r"state.gripper has 1 elements in the policy's statistics, 2 in"):
        train(narrow_gripper)
    with pytest.raises(KeyError, match=r"has no statistics for 'action.gripper' \(present: action.x, "):
        train(lambda content: content["statistics"]["action"].pop("gripper"))
    with pytest.raises(ValueError, match=r"video.image is \(64, 48\) pixels in the policy's metadata, \(32, 32\) in"):
        train(lambda content: content["modalities"]["video"]["image"].update(resolution=[48, 64]))


def test_a_checkpoint_keeps_its_action_horizon(demonstrations: Path, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    tiny_agent(LeRobotDataset(demonstrations).metadata()).save_pretrained(folder)
    config, policy = (json.loads((folder / name).read_text()) for name in ("config.json", "policy_config.json"))
    config["action_horizon"] = config["action_head_cfg"]["action_horizon"] = 8
    policy["data_config"]["action_horizon"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "policy_config.json").write_text(json.dumps(policy))
    sft_gr00t.main(sft_args(tmp_path, demonstrations, model=str(folder), num_steps=1))
    saved = json.loads((tmp_path / "run/checkpoints/step_1/policy_config.json").read_text())
    assert saved["data_config"]["action_horizon"] == 8
    agent = Gr00tAgent.from_pretrained(tmp_path / "run/checkpoints/step_1")
    assert agent.predict_chunk(LeRobotDataset(demonstrations).batch(np.arange(2)).obs).shape[1] == 8


# -- the suite ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_suites(tmp_path: Path) -> Callable[..., Path]:
    """Writes demonstrations that name these suites, an episode each."""

    def write(*suites: str) -> Path:
        folder = tmp_path / "_".join(suites)
        staged = [folder.with_name(f"{folder.name}_staged") / f"episode_{i}" for i in range(len(suites))]
        for i, (path, suite) in enumerate(zip(staged, suites, strict=True)):
            episode = make_episode(i, 9)
            stage_episode(path, replace(episode, info={"suite": suite}), Recording(storage="image"))
        assemble_dataset(folder, staged, Recording(storage="image"), version="v3.0", modality=modality())
        return folder

    return write


def suite_of_run(run: Path) -> tuple[str | None, str | None]:
    """Returns the suite of a run's arguments, and the one that its policy names."""
    args = json.loads((run / "args.json").read_text())
    return args["suite"], suite_of(str(run / "checkpoints" / "step_1"))


def test_the_suite_is_that_of_the_demonstrations(of_suites, tmp_path, capsys):
    data = of_suites("libero_goal", "libero_goal")
    options: dict[str, Any] = dict(num_steps=1, run_name="of_{suite}")
    sft_gr00t.main(sft_args(tmp_path, data, suite=None, **options), make_tiny)
    assert suite_of_run(tmp_path / "of_libero_goal") == ("libero_goal", "libero_goal")
    assert "--suite libero_goal" in capsys.readouterr().out
    # It may be evaluated elsewhere; that does not change what it was trained on.
    sft_gr00t.main(sft_args(tmp_path, data, suite="libero_goal_lan", **options), make_tiny)
    assert suite_of_run(tmp_path / "of_libero_goal_lan") == ("libero_goal_lan", "libero_goal")


@pytest.mark.parametrize("suites", [("libero_goal", "libero_10"), ()])
def test_demonstrations_that_name_no_one_suite_need_it_given(of_suites, demonstrations, tmp_path, suites, capsys):
    data = of_suites(*suites) if suites else demonstrations
    with pytest.raises(
        ValueError, match=r"do not name one suite that all are of: give --suite \(valid: libero_spatial"
    ):
        sft_gr00t.main(sft_args(tmp_path, data, suite=None, eval_episodes_per_task=1), make_tiny)
    assert not (tmp_path / "run").exists()
    # Robots that are no simulation's have none: nothing is evaluated, and nothing is noted.
    sft_gr00t.main(sft_args(tmp_path, data, suite=None, num_steps=1), make_tiny)
    assert suite_of_run(tmp_path / "run") == (None, None)
    assert "next:" not in capsys.readouterr().out
    sft_gr00t.main(sft_args(tmp_path / "given", data, suite="libero_40", num_steps=1), make_tiny)
    assert suite_of_run(tmp_path / "given" / "run") == ("libero_40", "libero_40")


def test_a_suite_that_does_not_hold_the_demonstrations_is_not_noted(of_suites, tmp_path):
    data = of_suites("libero_goal", "libero_10")
    sft_gr00t.main(sft_args(tmp_path, data, suite="libero_goal", num_steps=1), make_tiny)
    assert suite_of_run(tmp_path / "run") == ("libero_goal", None)


def test_the_dataset_names_the_run_where_nothing_names_a_suite(of_suites, tmp_path):
    data = of_suites("libero_goal", "libero_10")
    sft_gr00t.main(sft_args(tmp_path, data, suite=None, num_steps=1, run_name="sft_{suite}"), make_tiny)
    assert (tmp_path / f"sft_{data.name}").is_dir()


def test_tasks_that_the_suite_of_the_demonstrations_has_not_are_refused(of_suites, tmp_path):
    args = sft_args(tmp_path, of_suites("libero_goal"), suite=None, task_ids=(12,))
    with pytest.raises(ValueError, match=r"task_id=12 is not in libero_goal \(valid: 0-9\)"):
        sft_gr00t.main(args, make_tiny)
