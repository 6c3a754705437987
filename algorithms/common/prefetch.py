"""Batches prepared ahead by threads, in order, with the time that the consumer waited for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from algorithms.common.processes import same_cuda_device

T = TypeVar("T")
K = TypeVar("K")


class Prefetch(Generic[K, T]):
    """An iterator over `load(key)` for each key, in the order of keys.

    Args:
        load: makes one batch; runs in threads.
        keys: what to load.
        num_threads: threads.
        num_ahead: batches that are prepared or being prepared at a time.

    Attributes:
        wait_s: seconds that the consumer has waited so far.
    """

    def __init__(self, load: Callable[[K], T], keys: Iterable[K], *, num_threads: int, num_ahead: int) -> None:
        if num_threads < 1 or num_ahead < 1:
            raise ValueError(f"num_threads={num_threads} and num_ahead={num_ahead} must be at least 1")
        self.wait_s = 0.0
        self._load, self._keys, self._num_ahead = load, iter(keys), num_ahead
        self._pool = ThreadPoolExecutor(num_threads, "prefetch", initializer=same_cuda_device())
        self._pending: deque[Future[T]] = deque()

    def __iter__(self) -> Iterator[T]:
        try:
            self._fill()
            while self._pending:
                start = time.perf_counter()
                batch = self._pending.popleft().result()
                self.wait_s += time.perf_counter() - start
                self._fill()
                yield batch
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while len(self._pending) < self._num_ahead:
            try:
                key = next(self._keys)
            except StopIteration:
                return
            self._pending.append(self._pool.submit(self._load, key))
