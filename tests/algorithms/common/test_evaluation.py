"""The evaluation: every episode exactly once, at once, interruptible without a trace, and told with its uncertainty."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from algorithms.common.episode_log import EpisodeLog, EvalEpisode
from algorithms.common.episodes import wilson_interval
from algorithms.common.evaluation import (
    OVERVIEW,
    EvalResult,
    compare_evaluations,
    episode_generator,
    evaluate,
    evaluate_into,
    evaluation_file,
)
from algorithms.common.jobs import evaluation_jobs, stated_horizon, stored_starts
from algorithms.common.run import unlock
from algorithms.common.video import CAPTION_HEIGHT, VIEW_SIZE, read_pictures
from libero_gym.physics.simulation import PhysicsError
from libero_gym.tasks.suites import horizon
from tests.algorithms.line_env import LineVectorEnv

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 2
JOBS = [(0, state) for state in range(9)]


class NoisyAgent:
    """Steps of random size towards the origin or past it: episodes of 1 to 6 steps, some of which fail.

    With `unclean`, a row's action depends on its place in the batch and on the batch's size, as rounding does.
    """

    def __init__(self, unclean: float = 0.0):
        self.unclean = unclean
        self.image_size = 32
        self.batches: list[int] = []

    def predict(self, obs: dict[str, Any], generator: Sequence[torch.Generator]) -> torch.Tensor:
        x = torch.as_tensor(obs["state.x"])  # [B, 1]
        self.batches.append(len(x))
        sizes = torch.stack([torch.rand(CHUNK, generator=one) for one in generator])  # [B, C]
        moves = -x.sign() * (1.7 * sizes - 0.55)
        moves = moves + self.unclean * torch.arange(len(x))[:, None] / len(x)
        return torch.cat([moves[..., None], torch.zeros(len(x), CHUNK, 6)], dim=-1)


class ManyStatesLine(LineVectorEnv):
    """Starts at as many places as there are initial states, and counts calls."""

    def __init__(self, num_envs: int, **options: Any):
        super().__init__(num_envs, CHUNK, horizon=6, autoreset=AutoresetMode.DISABLED, **options)
        self.num_step_calls = 0
        self.resets: list[list[tuple[int, int]]] = []

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None):
        assert options is not None
        mask = options["reset_mask"]
        pairs = zip(np.flatnonzero(mask).tolist(), options["init_state_id"][mask].tolist(), strict=True)
        self.resets.append(list(pairs))
        return super().reset(seed=seed, options=options)

    def restart(self, mask: np.ndarray, state_id: np.ndarray | None = None) -> None:
        super().restart(mask, state_id)
        self.x = np.where(mask, 0.5 + 0.05 * self.state_id, self.x).astype(np.float32)

    def step(self, actions: np.ndarray):
        self.num_step_calls += 1
        return super().step(actions)


def run(num_envs: int = 4, agent: Any = None, jobs: Any = JOBS, seed: Any = 0, **options: Any) -> EvalResult:
    return evaluate(agent or NoisyAgent(), ManyStatesLine(num_envs), jobs, seed=seed, **options)


def test_every_episode_is_run_once_for_each_seed_whatever_the_number_of_environments():
    result = run(num_envs=4, seed=(3, 0))
    assert [e.key for e in result.episodes] == [(seed, 0, state) for seed in (0, 3) for state in range(9)]
    assert 0.1 < result.success_rate < 0.9
    assert len({e.length for e in result.episodes}) > 3
    for num_envs in (1, 3, 18, 25):
        assert run(num_envs=num_envs, seed=(3, 0)).episodes == result.episodes
    assert [e for e in result.episodes if e.seed == 3] == run(seed=3).episodes
    assert result.task_descriptions == {0: "move to the origin"}
    assert result.protocol["seeds"] == [3, 0]


def test_noise_depends_on_the_episode_alone():
    draws = {key: torch.rand(3, generator=episode_generator(*key)) for key in ((0, 0, 1), (0, 1, 0), (1, 0, 0))}
    assert torch.equal(draws[0, 0, 1], torch.rand(3, generator=episode_generator(0, 0, 1)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 3


def test_a_free_environment_gets_the_next_episode_at_once():
    agent, envs = NoisyAgent(), ManyStatesLine(3)
    result = evaluate(agent, envs, JOBS, seed=0)
    decisions = {e.init_state_id: -(-e.length // CHUNK) for e in result.episodes}
    busy_until, starts = [0, 0, 0], []
    for state in range(9):
        first = min(range(3), key=lambda i: (busy_until[i], i))
        starts.append((busy_until[first], first, state))
        busy_until[first] += decisions[state]
    assert envs.num_step_calls == len(agent.batches) == max(busy_until)
    assert set(agent.batches) == {3}  # the batch's shape never changes
    by_time = [[(i, state) for when, i, state in starts if when == time] for time in sorted({s[0] for s in starts})]
    assert envs.resets == by_time


@dataclass
class MemoryLog:
    episodes: list[EvalEpisode] = field(default_factory=list)

    def append(self, episode: EvalEpisode) -> None:
        self.episodes.append(episode)


def test_an_interrupted_evaluation_goes_on_as_if_it_had_not_been():
    """The agent's actions depend on its rows' places, as floating-point sums do: all must keep theirs."""
    log = MemoryLog()
    whole = run(agent=NoisyAgent(unclean=0.2), seed=(0, 1), log=log)
    assert sorted(log.episodes, key=lambda e: e.key) == whole.episodes
    moved = run(num_envs=3, agent=NoisyAgent(unclean=0.2), seed=(0, 1))
    assert moved.episodes != whole.episodes
    for count in range(len(log.episodes) + 1):
        agent, rest = NoisyAgent(unclean=0.2), MemoryLog(log.episodes[:count])
        again = run(agent=agent, seed=(0, 1), log=rest)
        assert again.episodes == whole.episodes, count
        assert sorted(rest.episodes, key=lambda e: e.key) == whole.episodes
    assert not agent.batches  # nothing was left to do


def test_an_exception_ends_the_evaluation_and_is_no_failed_episode():
    class Diverges(ManyStatesLine):
        def step(self, actions: np.ndarray):
            if self.num_step_calls == 4:
                raise PhysicsError("diverged")
            return super().step(actions)

    log = MemoryLog()
    with pytest.raises(PhysicsError, match="diverged"):
        evaluate(NoisyAgent(), Diverges(4), JOBS, seed=0, log=log)
    whole = run(num_envs=4)
    assert 0 < len(log.episodes) < len(JOBS)
    assert all(e in whole.episodes for e in log.episodes)


def test_every_stored_state_is_a_start():
    starts = stored_starts("libero_spatial_with_milk", (3, 8, 8))  # 10 states a task
    assert starts == [(3, i) for i in range(10)] + 2 * [(8, i) for i in range(10)]
    assert len(stored_starts("libero_spatial", None)) == 500


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="jobs is empty"):
        run(jobs=[])
    with pytest.raises(ValueError, match=r"autoreset_mode=AutoresetMode\.SAME_STEP would restart episodes"):
        evaluate(NoisyAgent(), LineVectorEnv(2), JOBS, seed=0)
    with pytest.raises(ValueError, match=r"\[\(4, 0, 1\)\] are asked for twice"):
        run(jobs=[(0, 1), (0, 1), (0, 2)], seed=4)
    stranger = EvalEpisode(seed=7, task_id=0, init_state_id=0, success=True, length=2)
    with pytest.raises(ValueError, match=r"log holds .* \[\(7, 0, 0\)\], which are not among the jobs"):
        run(log=MemoryLog([stranger]))


def test_videos_of_the_first_seed(tmp_path: Path):
    result = run(seed=(1, 0), record=lambda task, state: state in (2, 5), video_dir=tmp_path)
    outcome = {e.init_state_id: "success" if e.success else "failure" for e in result.episodes if e.seed == 1}
    expected = [tmp_path / f"task_0_state_{state}_{outcome[state]}.mp4" for state in (2, 5)]
    assert result.videos == expected == sorted(tmp_path.iterdir())


def test_who_looks_at_no_images_has_only_those_drawn_that_are_filmed(tmp_path: Path):
    class Draws(ManyStatesLine):
        """Notes who is drawn at each step."""

        def __init__(self, num_envs: int):
            super().__init__(num_envs)
            self.chosen: list[list[int]] = []
            self.drawn: list[list[int]] = []

        def draw_only(self, env_ids: list[int]) -> None:
            self.chosen.append(env_ids)

        def step(self, actions: np.ndarray):
            self.drawn += self.chosen[-1:]
            return super().step(actions)

    class Blind(NoisyAgent):
        looks_at_images = False

    films: dict[str, Any] = dict(seed=0, record=lambda task, state: state in (1, 8))
    envs = Draws(4)
    result = evaluate(Blind(), envs, JOBS, video_dir=tmp_path / "blind", **films)
    decisions = {e.init_state_id: -(-e.length // CHUNK) for e in result.episodes}
    assert [1] in envs.drawn
    assert sum(len(ids) for ids in envs.drawn) >= decisions[1] + decisions[8]
    assert all(len(ids) <= 2 for ids in envs.drawn)
    evaluate(Blind(), unfilmed := Draws(4), JOBS, seed=0)
    assert not any(unfilmed.drawn)
    evaluate(NoisyAgent(), seeing := Draws(4), JOBS, video_dir=tmp_path / "seeing", **films)
    assert seeing.chosen == []


def test_all_tasks_are_shown_side_by_side_also_after_an_interruption(tmp_path: Path):
    jobs = [(task, state) for task in (0, 1, 2) for state in (0, 1)]
    log = MemoryLog()
    whole = run(jobs=jobs, video_dir=tmp_path / "whole", log=log)
    assert len(whole.videos) == len(jobs)
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == sorted([OVERVIEW, *(p.name for p in whole.videos)])
    shape = np.stack(list(read_pictures(tmp_path / "whole" / OVERVIEW))).shape
    longest = max(-(-e.length // CHUNK) for e in whole.episodes if e.init_state_id == 0)
    assert shape == (longest + 1, 2 * (256 + CAPTION_HEIGHT), 2 * 512, 3)  # three tiles in two rows
    (tmp_path / "whole" / OVERVIEW).unlink()
    again = run(jobs=jobs, video_dir=tmp_path / "whole", log=MemoryLog(log.episodes[:3]))
    assert again.videos == whole.videos
    assert np.stack(list(read_pictures(tmp_path / "whole" / OVERVIEW))).shape == shape


def episode(success: bool, task_id: int = 0, state: int = 0, seed: int = 0) -> EvalEpisode:
    return EvalEpisode(seed=seed, task_id=task_id, init_state_id=state, success=success, length=7)


def made_result() -> EvalResult:
    """Task 0: 8 of 10 in seed 0 and 9 of 10 in seed 1; task 4: 0 of 10 in both."""
    episodes = [episode(state < 8 + seed, 0, state, seed) for seed in (0, 1) for state in range(10)]
    episodes += [episode(False, 4, state, seed) for seed in (0, 1) for state in range(10)]
    return EvalResult(protocol={}, task_descriptions={0: "a", 4: "b"}, episodes=episodes, seconds=1.0)


def test_rates_and_intervals():
    first, second, everything = made_result().rows()
    assert (first["task"], first["description"], first["successes"], first["episodes"]) == ("0", "a", 17, 20)
    # (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96, by hand. Of ten states eight have
    # two successes, one has one and one none, 1.7 on average: n = 20 / 1.608, and 1.608 is (4.1 / 400) over
    # (0.85 * 0.15 / 20).
    assert first["success_rate"] == 0.85
    assert (first["low"], first["high"]) == (pytest.approx(0.5753, abs=1e-4), pytest.approx(0.9595, abs=1e-4))
    assert (second["low"], second["high"]) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert (everything["task"], everything["successes"], everything["episodes"]) == ("all", 17, 40)
    zero, one = made_result().seed_rows()
    assert (zero["seed"], zero["successes"], zero["episodes"], zero["success_rate"]) == (0, 8, 20, 0.4)
    assert (one["seed"], one["successes"], one["success_rate"]) == (1, 9, 0.45)
    assert (zero["low"], zero["high"]) == (pytest.approx(0.2188, abs=1e-4), pytest.approx(0.6134, abs=1e-4))


def test_episodes_near_the_goal_that_share_a_start_count_less():
    # Four starts, two states with two distances each, are played three times and always end alike.
    episodes = [episode(state % 4 < 3, 0, state) for state in range(12)]
    protocol: dict[str, Any] = dict(steps_before_success=(3, 6), num_near_goal_states=2)
    result = EvalResult(protocol=protocol, task_descriptions={0: "a"}, episodes=episodes, seconds=1.0)
    low, high = wilson_interval(3, 4)
    assert (result.rows()[0]["low"], result.rows()[0]["high"]) == pytest.approx((low, high), abs=1e-12)
    assert replace(result, protocol={}).rows()[0]["low"] == pytest.approx(wilson_interval(9, 12)[0], abs=1e-12)


def test_the_tables_are_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = made_result()
    result.print_table()
    printed = capsys.readouterr().out
    assert "17/20" in printed
    assert "42.5%" in printed
    assert "seed 1" in printed
    result.save(tmp_path / "new" / "result.json")
    saved = json.loads((tmp_path / "new" / "result.json").read_text())
    assert saved["success_once"] == 0.425
    assert saved["table"] == result.rows()
    assert saved["seeds"] == result.seed_rows()
    assert [EvalEpisode(**e) for e in saved["episodes"]] == result.episodes
    assert saved["environment"]["versions"]["torch"] == torch.__version__


def test_the_log_keeps_whole_episodes_only(tmp_path: Path):
    protocol = {"suite": "libero_goal", "seeds": [0, 1], "policy": {"denoising_steps": 4}}
    log = EpisodeLog(tmp_path / "eval", protocol, resume=True)  # nothing there yet
    log.append(episode(True))
    log.append(episode(False, state=1))
    with pytest.raises(FileExistsError, match=r"holds an evaluation: go on with it by --resume, or give another"):
        EpisodeLog(tmp_path / "eval", protocol, resume=False)
    path = tmp_path / "eval" / "episodes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task_id": 0, "init_st')  # killed while writing
    again = EpisodeLog(tmp_path / "eval", protocol, resume=True)
    assert again.episodes == [episode(True), episode(False, state=1)]
    again.append(episode(True, state=2))
    added = json.loads(path.read_bytes().removeprefix(whole))
    assert added.pop("seconds") >= 0
    assert added == asdict(episode(True, state=2))
    path.write_text('{"task_id": 0, "seconds": 1}\n')
    with pytest.raises(ValueError, match=r"episodes.jsonl line 1 is no episode \(.*missing"):
        EpisodeLog(tmp_path / "eval", protocol, resume=True)
    for line in ("[]", "3", json.dumps(asdict(episode(True)))):
        path.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"line 1 is no episode \(it is no object with a number for seconds\)"):
            EpisodeLog(tmp_path / "eval", protocol, resume=True)


def logged(episode: EvalEpisode, seconds: float) -> str:
    return json.dumps({**asdict(episode), "seconds": seconds}) + "\n"


def test_an_episode_that_was_logged_twice_counts_once_or_is_refused(tmp_path: Path):
    EpisodeLog(tmp_path, {}, resume=False)
    path = tmp_path / "episodes.jsonl"
    path.write_text(logged(episode(True), 2.0) + logged(episode(False, state=1), 3.0) + logged(episode(True), 4.0))
    assert EpisodeLog(tmp_path, {}, resume=True).episodes == [episode(True), episode(False, state=1)]
    path.write_text(logged(episode(True), 2.0) + logged(episode(False, state=1), 3.0) + logged(episode(False), 4.0))
    message = r"lines 1 and 3 differ in the outcome of .* \(0, 0, 0\), .* remove both lines, and it is played again"
    with pytest.raises(ValueError, match=message):
        EpisodeLog(tmp_path, {}, resume=True)


def test_the_time_of_all_parts_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr("algorithms.common.episode_log.time.perf_counter", lambda: now)
    log = EpisodeLog(tmp_path, {}, resume=False)
    assert log.seconds_before == 0.0
    now += 7.0
    log.append(episode(True))
    now += 50.0  # interrupted
    again = EpisodeLog(tmp_path, {}, resume=True)
    assert again.seconds_before == 7.0
    now += 3.0
    again.append(episode(True, state=1))
    assert EpisodeLog(tmp_path, {}, resume=True).seconds_before == 10.0


HOLDER = """
import sys
from pathlib import Path
from algorithms.common.episode_log import EpisodeLog

EpisodeLog(Path(sys.argv[1]), {}, resume=True)
print("holds it", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_evaluates_into_a_folder(tmp_path: Path):
    place = tmp_path / "eval"
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds it\n"
        for resume in (False, True):
            message = rf"eval is in use by process {holder.pid} on .*; wait for its end, .* give another --output-dir"
            with pytest.raises(RuntimeError, match=message):
                EpisodeLog(place, {}, resume=resume)
        holder.communicate()
    EpisodeLog(place, {}, resume=True)
    unlock(place)


def test_another_protocol_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = {"suite": "libero_goal", "seeds": (0, 1), "policy": {"denoising_steps": 4}}
    EpisodeLog(tmp_path, protocol, resume=False)
    EpisodeLog(tmp_path, protocol, resume=True)
    changed = protocol | {"seeds": (0,), "policy": {"denoising_steps": 8}, "horizon": 10}
    message = (
        r"another protocol \(horizon was None, now 10, policy.denoising_steps was 4, now 8, "
        r"seeds was \[0, 1\], now \[0\]\): give the same arguments"
    )
    with pytest.raises(ValueError, match=message):
        EpisodeLog(tmp_path, changed, resume=True)
    monkeypatch.setattr("algorithms.common.episode_log.describe_environment", lambda: {"versions": {"mujoco": "3.3.7"}})
    with pytest.raises(ValueError, match=r"versions.mujoco was '.*', now '3.3.7'"):
        EpisodeLog(tmp_path, protocol, resume=True)


def test_jobs_of_a_suite():
    assert evaluation_jobs("libero_spatial_swap", None, 2)[:3] == [(0, 0), (0, 1), (1, 0)]
    assert len(evaluation_jobs("libero_goal", None, 50)) == 500
    assert evaluation_jobs("libero_goal", (7, 2), 1) == [(7, 0), (2, 0)]
    assert evaluation_jobs("libero_spatial", (3,), 50, "held_out")[-1] == (3, 49)
    assert len(evaluation_jobs("libero_40", None, 50, "held_out")) == 2000
    assert evaluation_jobs("libero_40", None, 2)[::20] == [(0, 0), (10, 0), (20, 0), (30, 0)]
    assert evaluation_jobs("libero_40", (25,), 1) == [(25, 0)]
    assert stored_starts("libero_40", (25,))[-1] == (25, 49)
    with pytest.raises(FileNotFoundError, match="no held_out states are recorded for libero_90"):
        evaluation_jobs("libero_90", None, 1, "held_out")
    with pytest.raises(ValueError, match=r"episodes_per_task=51 .* task 0 of libero_goal, .* \(valid: 1-50\)"):
        evaluation_jobs("libero_goal", None, 51)
    with pytest.raises(ValueError, match=r"episodes_per_task=0"):
        evaluation_jobs("libero_goal", None, 0)
    for choose in (stored_starts, lambda suite, task_ids: evaluation_jobs(suite, task_ids, 1)):
        with pytest.raises(ValueError, match=r"task_ids=\(\) names no task of libero_40 \(valid: 0-39\); name one or"):
            choose("libero_40", ())


class TrainerArgs:
    suite, task_ids, eval_episodes_per_task, num_envs, seed, horizon = "libero_goal", (3, 5, 5), 2, 3, 1, None


def test_a_protocol_states_the_horizon_of_each_member_of_a_combined_suite():
    assert stated_horizon("libero_goal", None) == 320
    assert stated_horizon("libero_100", None) == {"libero_90": 400, "libero_10": 480}
    assert stated_horizon("libero_100", 7) == 7


def test_evaluation_in_training_leaves_its_files(tmp_path: Path):
    closed: list[bool] = []

    class Closes(ManyStatesLine):
        def close_extras(self, **kwargs: Any) -> None:
            closed.append(True)

    made: list[int] = []
    rate = evaluate_into(tmp_path, 12, NoisyAgent(), lambda n: made.append(n) or Closes(n), TrainerArgs)
    saved = json.loads((tmp_path / "evaluations" / "iteration_12.json").read_text())
    assert rate == saved["success_once"]
    (seed,) = saved["protocol"]["seeds"]
    assert 1000 < seed < 2**32  # the seeds of final evaluations are small
    assert (made, closed) == ([3], [True])
    assert [(e["task_id"], e["init_state_id"]) for e in saved["episodes"]] == [(3, 0), (3, 1), (5, 0), (5, 1)]
    assert (saved["protocol"]["suite"], saved["protocol"]["horizon"]) == ("libero_goal", horizon("libero_goal"))
    names = sorted(path.name.rsplit("_", 1)[0] for path in (tmp_path / "videos" / "iteration_12").iterdir())
    assert names == ["all", "task_3_state_0", "task_5_state_0"]


def test_evaluations_are_compared_where_both_are_of_the_same_episodes(tmp_path: Path):
    def evaluate_after(iteration: int, unclean: float = 0.0, **changes: Any) -> None:
        args: Any = type("Args", (TrainerArgs,), changes)
        evaluate_into(tmp_path, iteration, NoisyAgent(unclean), ManyStatesLine, args)

    (tmp_path / "args.json").write_text(json.dumps(dict(num_action_chunks=CHUNK)))
    evaluate_after(0)
    missing = evaluation_file(tmp_path, 3)
    assert compare_evaluations(tmp_path, 0, 3) == (
        f"before and after training are not compared: {missing} is missing, its evaluation was interrupted"
    )
    evaluate_after(3, eval_episodes_per_task=1)
    assert "is of 4 episodes, iteration_3.json of 2, and these are not the same (" in compare_evaluations(
        tmp_path, 0, 3
    )
    assert not (tmp_path / "videos" / "before_after.mp4").exists()

    # An episode that was filmed with another outcome before, as after an interruption, is shown as it is counted.
    evaluate_after(3, unclean=2.0)
    stale = tmp_path / "videos" / "iteration_3" / "task_3_state_0_other.mp4"
    stale.write_bytes(b"")
    text = compare_evaluations(tmp_path, 0, 3)
    assert text.startswith("the same 4 episodes, without exploration\n  before training ")
    assert text.endswith(f"\n  film                 {tmp_path / 'videos' / 'before_after.mp4'}")
    picture = next(read_pictures(tmp_path / "videos" / "before_after.mp4"))
    assert picture.shape[:2] == (2 * (VIEW_SIZE + CAPTION_HEIGHT), 2 * 2 * VIEW_SIZE)


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        ("algorithms.common.evaluation", ("algorithms.common.report", "matplotlib")),
        (
            "algorithms.ppo_gr00t, algorithms.grpo_gr00t, algorithms.dsrl_gr00t, algorithms.sft_gr00t",
            ("algorithms.eval_gr00t", "algorithms.common.reference_env", "algorithms.common.report", "matplotlib"),
        ),
    ],
)
def test_who_evaluates_imports_neither_scripts_nor_pages(imported: str, absent: tuple[str, ...]):
    code = f"import sys, {imported}; print(sorted(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
