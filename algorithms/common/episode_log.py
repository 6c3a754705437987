"""An evaluation's finished episodes on disk, so that an interrupted one goes on.

A folder holds `protocol.json` (what decides the outcomes, and the package versions) and `episodes.jsonl`, a line per
finished episode in the order in which they ended, each with the seconds that the evaluation had then taken.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from algorithms.common.episodes import Episode
from algorithms.common.jobs import PROTOCOL_FILE, Key, check_evaluation_folder
from algorithms.common.provenance import describe_environment
from algorithms.common.run import lock
from gr00t_agent.files import json_ready, read_json, write_json

# Of `lock`, besides waiting for the other process.
OTHERWISE = "give another --output-dir"
# In a line, besides the episode.
SECONDS = "seconds"


@dataclass(frozen=True, kw_only=True)
class EvalEpisode(Episode):
    """An episode of an evaluation.

    Attributes:
        seed: seed of its initial noise and of its environment.
    """

    seed: int

    @property
    def key(self) -> Key:
        """What names it: (seed, task id, initial state id)."""
        return self.seed, self.task_id, self.init_state_id


class EpisodeStore(Protocol):
    """Where an evaluation keeps its finished episodes."""

    episodes: list[EvalEpisode]

    def append(self, episode: EvalEpisode) -> None:
        """Keeps one more."""
        ...


class EpisodeLog:
    """Keeps episodes on disk as they end; see the module.

    The folder is this process's from then on, until it ends or unlocks it (`algorithms.common.run.lock`).

    Args:
        folder: made if it does not exist.
        protocol: what decides the outcomes; JSON values.
        resume: go on with the evaluation that the folder holds, if it holds one.

    Attributes:
        episodes: all that are kept.
        seconds_before: that the evaluation had taken when its last episode ended before it was interrupted; 0 if it
            was not.

    Raises:
        RuntimeError: another process evaluates into the folder.
        FileExistsError: the folder holds an evaluation and `resume` is False.
        ValueError: it holds one of another protocol or other package versions, a line that is no episode, or two that
            differ in the outcome of one.
    """

    def __init__(self, folder: Path, protocol: Mapping[str, Any], *, resume: bool) -> None:
        protocol_path = folder / PROTOCOL_FILE
        self._path = folder / "episodes.jsonl"
        self._start = time.perf_counter()
        self.episodes: list[EvalEpisode] = []
        self.seconds_before = 0.0
        wanted = json_ready({**protocol, "versions": describe_environment()["versions"]})
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, OTHERWISE)
        check_evaluation_folder(folder, resume=resume)
        if not protocol_path.is_file():
            self._path.unlink(missing_ok=True)
            write_json(protocol_path, wanted)
            return
        differences = _differences(read_json(protocol_path), wanted)
        if differences:
            raise ValueError(
                f"{folder} holds an evaluation by another protocol ({', '.join(differences)}): "
                "give the same arguments, or another --output-dir"
            )
        if self._path.is_file():
            self.episodes, self.seconds_before = self._read()

    def append(self, episode: EvalEpisode) -> None:
        """Writes a finished episode."""
        seconds = self.seconds_before + time.perf_counter() - self._start
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(episode), SECONDS: round(seconds, 3)}) + "\n")
        self.episodes.append(episode)

    def _read(self) -> tuple[list[EvalEpisode], float]:
        """Returns the logged episodes, each once, and the seconds at the end of the last one.

        Cuts off a last line that was not written to its end.
        """
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        episodes: dict[Key, EvalEpisode] = {}
        first_line: dict[Key, int] = {}
        seconds = 0.0
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                episode, seconds = _read_line(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._path} line {number} is no episode ({error}): remove the line") from error
            first = first_line.setdefault(episode.key, number)
            if episodes.setdefault(episode.key, episode) != episode:
                raise ValueError(
                    f"{self._path} lines {first} and {number} differ in the outcome of (seed, task, initial state) "
                    f"{episode.key}, and an episode counts once: remove both lines, and it is played again"
                )
        return list(episodes.values()), seconds


def _read_line(line: str) -> tuple[EvalEpisode, float]:
    """Returns an episode and the evaluation's seconds at its end; raises ValueError or TypeError if it is none."""
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get(SECONDS), int | float):
        raise ValueError(f"it is no object with a number for {SECONDS}")
    seconds = float(content.pop(SECONDS))
    return EvalEpisode(**content), seconds


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns "name was OLD, now NEW" for every entry that differs."""
    found: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} was {before!r}, now {after!r}")
    return found
