"""An evaluation's finished episodes on disk, so that an interrupted one goes on.

A folder holds `protocol.json` (what decides the outcomes, and the package versions) and `episodes.jsonl`, a line per
finished episode in the order in which they ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from algorithms.common.episodes import Episode
from algorithms.common.provenance import describe_environment
from gr00t_agent.files import json_ready, write_json


@dataclass(frozen=True, kw_only=True)
class EvalEpisode(Episode):
    """An episode of an evaluation.

    Attributes:
        seed: seed of its initial noise and of its environment.
    """

    seed: int

    @property
    def key(self) -> tuple[int, int, int]:
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

    Args:
        folder: made if it does not exist.
        protocol: what decides the outcomes; JSON values.
        resume: go on with the evaluation that the folder holds, if it holds one.

    Attributes:
        episodes: all that are kept.

    Raises:
        FileExistsError: the folder holds an evaluation and `resume` is False.
        ValueError: it holds one of another protocol or other package versions, or a line that is no episode.
    """

    def __init__(self, folder: Path, protocol: Mapping[str, Any], *, resume: bool) -> None:
        protocol_path = folder / "protocol.json"
        self._path = folder / "episodes.jsonl"
        self.episodes: list[EvalEpisode] = []
        wanted = json_ready({**protocol, "versions": describe_environment()["versions"]})
        if not protocol_path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            write_json(protocol_path, wanted)
            return
        if not resume:
            raise FileExistsError(
                f"{folder} holds an evaluation: go on with it by --resume, or give another --output-dir"
            )
        differences = _differences(json.loads(protocol_path.read_text(encoding="utf-8")), wanted)
        if differences:
            raise ValueError(
                f"{folder} holds an evaluation by another protocol ({', '.join(differences)}): "
                "give the same arguments, or another --output-dir"
            )
        if self._path.is_file():
            self.episodes = self._read()

    def append(self, episode: EvalEpisode) -> None:
        """Writes a finished episode."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(episode)) + "\n")
        self.episodes.append(episode)

    def _read(self) -> list[EvalEpisode]:
        """Returns the logged episodes; cuts off a last line that was not written to its end."""
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        episodes: list[EvalEpisode] = []
        for number, line in enumerate(whole.decode().splitlines(), 1):
            try:
                episodes.append(EvalEpisode(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{self._path} line {number} is no episode ({error}): remove the line") from error
        return episodes


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
