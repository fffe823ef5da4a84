"""One run at a time in a place of checkpoints: two of them would delete and overwrite each other's files.

A lock file lies in the folder (`.lock`), or beside a single file (`.run.ckpt.lock`), and says who has it:
host, process and since when. The operating system's lock on it (flock) ends with its process, however that
ends, so a lock file that nobody holds is stale and is taken over. Where a file system lacks them, that of
this host is stale when its process is gone; one of another host has to be deleted by hand.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import weakref
from pathlib import Path
from typing import Any, Final

from kfac_onnx.disk.records import RecordError, parse
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.saved.checkpoint_folder import is_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["RunLock", "lock_of"]

_TRIES: Final = 10
"""How often a lock file is opened anew that its holder removed in the meantime."""

_log = logging.getLogger(__name__)


def lock_of(place: str | Path) -> Path:
    """Return the lock file of a folder of checkpoints, or of a single checkpoint."""
    path = Path(place)
    return path / ".lock" if is_folder(path) else path.with_name(f".{path.name}.lock")


class RunLock:
    """Keeps other runs out of a place until `release`, or until nothing refers to it any more.

    Where no lock file can be made there is none: writing the checkpoint will say what is wrong.

    Raises UserError where another run has the place.
    """

    def __init__(self, place: str | Path) -> None:
        path = lock_of(place)
        for _ in range(_TRIES):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError:
                self._release = None
                return
            try:
                if _taken(descriptor, path, place):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        else:
            raise UserError(f"the lock '{path}' is removed again and again", help="give another place")
        _describe(descriptor)
        self._release = weakref.finalize(self, _give_back, descriptor, path, os.getpid())

    def release(self) -> None:
        """Let other runs in."""
        if self._release is not None:
            self._release()


def _taken(descriptor: int, path: Path, place: str | Path) -> bool:
    """Lock an open lock file; False where it is no longer the one at its path.

    Raises UserError where another run has it.
    """
    holder = _holder(descriptor)
    locked = _flock(descriptor)
    if locked is False or (locked is None and holder and _alive(holder)):
        raise _in_use(place, path, holder, certain=locked is False)
    try:
        same = os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    if same and holder:
        _log.warning(
            "the lock of '%s' was left by %s, which is gone; it is taken over", place, _named(holder)
        )
    return same


def _flock(descriptor: int) -> bool | None:
    """Return whether the system's lock was had; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return False if e.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _describe(descriptor: int) -> None:
    """Write into the lock file who has it."""
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "born": _birth(os.getpid()),
    }
    with contextlib.suppress(OSError):  # a full disk: the system's lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(about)}\n".encode(), 0)


def _holder(descriptor: int) -> dict[str, Any]:
    """Return what a lock file says; nothing where it is new, or not of our making."""
    with contextlib.suppress(OSError, RecordError, UnicodeDecodeError):
        about = parse(os.pread(descriptor, 4096, 0))
        if isinstance(about, dict):
            return about  # pyright: ignore[reportUnknownVariableType]  JSON
    return {}


def _birth(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None where that cannot be told.

    Source: proc_pid_stat(5), field 22, https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _alive(holder: dict[str, Any]) -> bool:
    """Say whether the process that a lock file names may still run."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return True  # nobody can tell from here
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return holder.get("born") in (None, _birth(pid))  # else another process has its number


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on '{holder.get('host')}', begun {holder.get('start')}"


def _in_use(place: str | Path, path: Path, holder: dict[str, Any], *, certain: bool) -> UserError:
    own = holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname()
    who = "another session of this process" if own else f"another run: {_named(holder)}"
    remedy = "close that session" if own else "wait for its end"
    if not certain and not own:
        remedy += f", or delete '{path}' if it is gone"
    return UserError(f"'{place}' is used by {who}", help=f"{remedy}, or give another place for checkpoints")


def _give_back(descriptor: int, path: Path, pid: int) -> None:
    """Remove a lock file, and then unlock it; a process forked from its holder does neither."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                path.unlink()
    with contextlib.suppress(OSError):
        os.close(descriptor)
