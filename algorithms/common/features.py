"""Where a rollout's encoded observations wait for the update: on the device, in host memory, or encoded once more.

A frozen backbone gives the same features in every epoch, so they are computed once per decision and kept. They are
large (GR00T-N1.5: two megabytes a decision in bfloat16), hence a budget: what does not fit is kept as the observation
it came from, 0.3 MB, and encoded anew whenever it is asked for. Both ways give the same losses.

Shape legend: M rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from algorithms.common.batch import concatenate, index

Placement = Literal["device", "host", "mixed", "none"]

_BLOCK_ROWS = 1024


class _Tier:
    """Blocks of rows in one memory, made as they are needed and kept until the run ends."""

    def __init__(self, device: torch.device, capacity: int, *, pin: bool) -> None:
        self._device, self._pin = device, pin
        self.capacity = capacity
        self._blocks: list[dict[str, Tensor]] = []
        self._is_written = True

    def put(self, rows: NDArray[np.intp], values: Mapping[str, Tensor]) -> None:
        """Stores `values`, one per row; rows are numbered from 0 within the tier."""
        while len(self._blocks) * _BLOCK_ROWS <= rows.max():
            size = min(_BLOCK_ROWS, self.capacity - len(self._blocks) * _BLOCK_ROWS)
            self._blocks.append({name: self._empty(size, value) for name, value in values.items()})
        for block_id, places, inside in self._by_block(rows):
            block, at = self._blocks[block_id], torch.from_numpy(places)
            is_run = bool((np.diff(inside) == 1).all())
            for name, value in values.items():
                source = value if len(places) == len(rows) else value[at.to(value.device)]
                if is_run:
                    block[name][inside[0] : inside[-1] + 1].copy_(source, non_blocking=self._pin)
                else:
                    block[name][torch.from_numpy(inside).to(self._device)] = source.to(self._device)
        self._is_written = False

    def get(self, rows: NDArray[np.intp], places: NDArray[np.intp], out: dict[str, Tensor]) -> None:
        """Writes rows into `places` of each tensor of `out`."""
        if self._pin and not self._is_written:
            torch.cuda.synchronize()  # copies from the device may still be running
        self._is_written = True
        for block_id, within, inside in self._by_block(rows):
            picked = torch.from_numpy(inside).to(self._device)
            for name, block in self._blocks[block_id].items():
                # Gathered in pinned memory, rows are copied to the device while the host goes on.
                gathered = self._empty(len(inside), block)
                torch.index_select(block, 0, picked, out=gathered)
                target = out[name]
                at = torch.from_numpy(places[within]).to(target.device)
                target[at] = gathered.to(target.device, non_blocking=self._pin)

    def _empty(self, num_rows: int, like: Tensor) -> Tensor:
        shape = (num_rows, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, device=self._device, pin_memory=self._pin)

    @staticmethod
    def _by_block(rows: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.intp]]]:
        """Yields (block, places in `rows`, rows within the block) of each block that rows are in."""
        blocks = rows // _BLOCK_ROWS
        for block_id in np.unique(blocks):
            places = np.flatnonzero(blocks == block_id)
            yield int(block_id), places, rows[places] - block_id * _BLOCK_ROWS


class FeatureStore:
    """Encoded observations by row number.

    Args:
        encode: from an observation of B environments to a dict of tensors [B, ...] that the agent takes in its place.
        device: where rows are wanted.
        placement: `device` and `host` (pinned) keep so much there and encode the rest anew; `mixed` keeps so much on
            the device and the rest in host memory; `none` encodes everything anew.
        memory_gb: the budget of this process, 10^9 bytes.

    Attributes:
        num_encoded_again: rows that had to be encoded anew so far.

    Raises:
        ValueError: `placement` is unknown or `memory_gb` negative.
    """

    def __init__(
        self,
        encode: Callable[[dict[str, Any]], dict[str, Tensor]],
        device: torch.device,
        placement: Placement,
        memory_gb: float,
    ) -> None:
        if placement not in ("device", "host", "mixed", "none") or memory_gb < 0:
            raise ValueError(
                f"feature_storage={placement!r}, feature_memory_gb={memory_gb}: storage must be device, host, mixed or "
                "none, and memory at least 0"
            )
        self._encode, self._device, self._placement = encode, device, placement
        self._budget = round(memory_gb * 1e9)
        self._tiers: list[_Tier] = []
        self._likeness: dict[str, Tensor] = {}
        self._observations: dict[int, tuple[dict[str, Any], int]] = {}
        self._free: list[int] = []
        self._num_rows = 0
        self.num_encoded_again = 0

    def put(self, obs: dict[str, Any], encoded: dict[str, Tensor]) -> NDArray[np.intp]:
        """Keeps observations [B] that `encode` has turned into `encoded`, and returns their row numbers [B]."""
        count = len(next(iter(encoded.values())))
        if not self._likeness:
            self._likeness = {name: value[:0] for name, value in encoded.items()}
            self._tiers = self._make_tiers(sum(value[0].nbytes for value in encoded.values()))
        fresh = max(0, count - len(self._free))
        taken = [self._free.pop() for _ in range(count - fresh)]
        rows = np.array([*taken, *range(self._num_rows, self._num_rows + fresh)], dtype=np.intp)
        self._num_rows += fresh
        for tier, start in self._starts():
            mine = np.flatnonzero((rows >= start) & (rows < start + tier.capacity))
            if len(mine):
                tier.put(rows[mine] - start, encoded if len(mine) == count else index(encoded, mine))
        for i in np.flatnonzero(rows >= self._num_kept):
            self._observations[int(rows[i])] = (obs, int(i))
        return rows

    def get(self, rows: NDArray[np.intp]) -> dict[str, Tensor]:
        """Returns rows [M] as `encode` gave them, on the device."""
        out = {
            name: torch.empty((len(rows), *like.shape[1:]), dtype=like.dtype, device=self._device)
            for name, like in self._likeness.items()
        }
        for tier, start in self._starts():
            mine = np.flatnonzero((rows >= start) & (rows < start + tier.capacity))
            if len(mine):
                tier.get(rows[mine] - start, mine, out)
        rest = np.flatnonzero(rows >= self._num_kept)
        if len(rest):
            found = [self._observations[int(rows[i])] for i in rest]
            encoded = self._encode(concatenate([index(obs, np.array([i])) for obs, i in found]))
            self.num_encoded_again += len(rest)
            for name, value in encoded.items():
                out[name][torch.from_numpy(rest).to(self._device)] = value.to(self._device)
        return out

    def free(self, rows: NDArray[np.intp]) -> None:
        """Forgets rows, whose places are then used again."""
        self._free += sorted(rows.tolist(), reverse=True)
        for row in rows:
            self._observations.pop(int(row), None)

    def clear(self) -> None:
        """Forgets all rows; the memory is kept for the next ones."""
        self._observations.clear()
        self._free.clear()
        self._num_rows = 0

    @property
    def _num_kept(self) -> int:
        return sum(tier.capacity for tier in self._tiers)

    def _starts(self) -> list[tuple[_Tier, int]]:
        """Returns each tier with the number of its first row."""
        starts = np.cumsum([0, *(tier.capacity for tier in self._tiers)])
        return list(zip(self._tiers, starts.tolist(), strict=False))

    def _make_tiers(self, row_bytes: int) -> list[_Tier]:
        within_budget, unlimited = self._budget // max(1, row_bytes), 2**40
        pin = self._device.type == "cuda"
        on_device = _Tier(self._device, within_budget, pin=False)
        if self._placement == "device":
            return [on_device]
        if self._placement == "host":
            return [_Tier(torch.device("cpu"), within_budget, pin=pin)]
        if self._placement == "mixed":
            return [on_device, _Tier(torch.device("cpu"), unlimited, pin=pin)]
        return []
