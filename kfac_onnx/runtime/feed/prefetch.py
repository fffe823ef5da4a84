"""The next batches, made in a background thread while ONNX Runtime works on this one.

ONNX Runtime releases Python's global lock while it runs, so a second thread can index, cast and load then.
What comes out is what would come out without it, in the same order, and an exception in making a batch is
raised where that batch is asked for. At most `depth` batches are made ahead of the one that was taken;
a run's position counts those taken.
"""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

__all__ = ["Ahead", "prefetched"]

T = TypeVar("T")
_END = object()


class Ahead(Generic[T]):
    """An iterator over `items`, each passed through `prepare`, that has `depth` of them made ahead.

    `close` ends its thread: it waits for the item that is being made and takes no other.
    """

    def __init__(self, items: Iterable[T], depth: int, prepare: Callable[[T], T]) -> None:
        self._items = iter(items)
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kfac-onnx-prefetch")
        self._ahead: deque[Future[T | object]] = deque()
        self._depth = depth
        self._open = True

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while self._open and len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(self._make))
        if not self._open:
            raise StopIteration
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        if self._open:
            self._ahead.append(self._pool.submit(self._make))
        return item  # pyright: ignore[reportReturnType]  the end was handled

    def _make(self) -> T | object:
        item = next(self._items, _END)
        return item if item is _END else self._prepare(item)  # pyright: ignore[reportArgumentType]  not the end

    def close(self) -> None:
        """End the thread; afterwards there are no more items."""
        self._open = False
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()


@contextlib.contextmanager
def prefetched(
    items: Iterable[T], depth: int, prepare: Callable[[T], T] = lambda item: item
) -> Generator[Iterator[T]]:
    """Yield the prepared items, made up to `depth` ahead in a thread that ends with the block.

    With a depth of 0 there is no thread: each item is made when it is asked for.
    """
    if depth == 0:
        yield map(prepare, items)
        return
    ahead = Ahead(items, depth, prepare)
    try:
        yield ahead
    finally:
        ahead.close()
