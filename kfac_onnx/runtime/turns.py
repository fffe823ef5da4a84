"""One thread at a time is in a session; a checkpoint may be written in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

__all__ = ["Turns", "Writing"]


PATIENCE: Final = 60.0
"""Seconds that a thread waits for another one's method to end."""


class Turns:
    """Gives a session to one thread at a time, in the order in which they come.

    A thread waits for another one's step, save or evaluation to end, so that each of them is whole. Where the
    other one is in `fit`, or takes longer than `PATIENCE`, it gets a sentence. A thread that has the session
    may call any method within another: `fit` calls `step`, a user's function that `fit` calls may save.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: int | None = None
        self._work: list[str] = []
        self._waiting: list[int] = []

    @contextlib.contextmanager
    def turn(self, work: str) -> Generator[None]:
        """Have the session to oneself for a method of this name.

        Raises UserError where another thread keeps it.
        """
        me = threading.get_ident()
        with self._free:
            if self._owner != me:
                self._wait(me, work)
            self._owner = me
            self._work.append(work)
        try:
            yield
        finally:
            with self._free:
                self._work.pop()
                if not self._work:
                    self._owner = None
                    self._free.notify_all()

    def _wait(self, me: int, work: str) -> None:
        """Wait until the session is free and no other thread has waited longer."""
        deadline = time.monotonic() + PATIENCE
        self._waiting.append(me)
        try:
            while self._owner is not None or self._waiting[0] != me:
                left = deadline - time.monotonic()
                other = next(iter(self._work), work)
                if other == "fit" or left <= 0:
                    raise UserError(
                        f"`{work}` was called while another thread is in `{other}` of the same"
                        " training session",
                        help="use a session from one thread; `save(path, background=True)` between two steps"
                        " writes a checkpoint in a thread of its own",
                    )
                self._free.wait(left)
        finally:
            self._waiting.remove(me)
            self._free.notify_all()


class Writing:
    """A checkpoint that a thread is writing; the interpreter does not end before it is there."""

    def __init__(self, path: Path, write: Callable[[], None]) -> None:
        self.path = path
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=False)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as e:
            self._error = e

    @property
    def failed(self) -> bool:
        """Whether the thread has ended with an error."""
        return self._error is not None

    def wait(self) -> Path:
        """Wait for the file and return it; raises what the thread met (UserError as `save`)."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.path
