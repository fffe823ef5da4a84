"""A session is for one thread at a time, and says so; a checkpoint may be written in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

__all__ = ["Turns", "Writing"]


class Turns:
    """Gives a session to the thread that is in one of its methods; another one gets a sentence, no wait.

    A thread that has the session may call any method within another: `fit` calls `step`, a user's function
    that `fit` calls may save.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._work: list[str] = []

    @contextlib.contextmanager
    def turn(self, work: str) -> Generator[None]:
        """Have the session to oneself for a method of this name.

        Raises UserError where another thread has it.
        """
        if not self._lock.acquire(blocking=False):
            other = next(iter(self._work), "another method")
            raise UserError(
                f"`{work}` was called while another thread is in `{other}` of the same training session",
                help="use a session from one thread at a time;"
                " `save(path, background=True)` between two steps writes a checkpoint in a thread of its own",
            )
        self._work.append(work)
        try:
            yield
        finally:
            self._work.pop()
            self._lock.release()


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
