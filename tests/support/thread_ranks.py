"""Ranks that are threads of one process: what MPI does, with a barrier and a list."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class ThreadRank:
    def __init__(self, rank: int, size: int, board: list[object], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def _post(self, value: object) -> list[object]:
        self._board[self.rank] = value
        self._barrier.wait(20)
        values = list(self._board)
        self._barrier.wait(20)
        return values

    def gather(self, array: np.ndarray) -> np.ndarray:
        return np.stack(self._post(array.copy()))

    def exchange(self, parts: Sequence[np.ndarray], lengths: Sequence[int]) -> list[np.ndarray]:
        received = [parts[self.rank] for parts in self._post([part.copy() for part in parts])]
        assert [len(part) for part in received] == list(lengths)
        return received

    def sum(self, array: np.ndarray) -> np.ndarray:
        return np.sum(self._post(array.copy()), axis=0)

    def abort(self, error: BaseException) -> None:
        self._barrier.abort()


def on_ranks(size: int, work: Callable[[ThreadRank], T]) -> list[T]:
    """Return what each rank's work returns; its error ends the others."""
    board: list[object] = [None] * size
    barrier = threading.Barrier(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadRank(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
