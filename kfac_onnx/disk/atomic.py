"""Files that are whole or absent, also after `kill -9` or a power cut.

A file is written in a folder of its own beside its place (`.<name>.<random>.tmp`), synced, renamed into its
place, and then the folder that holds the name is synced. Its writer holds a lock on that temporary folder as
long as it lives, so that the next write of the same name knows the folder of a killed run, and removes it.

What is replaced gives its rights to what takes its place, and to the files that come with it: private weights
stay private. A symbolic link is written through: the file that it leads to is replaced, or made.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the folders of killed runs stay
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["atomic_path", "link_target", "remove_stale", "require_file", "sync", "unwritable"]

_TRIES: Final = 10
"""How often a temporary folder is made anew that another process took for that of a killed run."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an error.

    Whatever else the block writes beside the temporary path moves too, and before it.

    Raises UserError when `path` is something else than a file (a device would be replaced), or links in a
    circle, or its folder is missing or cannot be written, or the disk is full; then nothing is left behind
    and `path` is as it was.
    """
    target = link_target(path)
    require_file(target)
    try:
        remove_stale(target.parent, re.escape(target.name))
        folder, lock = _locked_folder(target)
    except OSError as e:
        raise unwritable(path, e) from e
    try:
        yield folder / target.name
        items = sorted(folder.iterdir(), key=lambda item: item.name == target.name)  # the data first
        for item in items:
            sync(item)  # before it has its rights: it may be one that nobody may read
            if (rights := _rights(item, target)) is not None:
                item.chmod(rights)
        for item in items:
            os.replace(item, target.parent / item.name)  # noqa: PTH105  as the module says
        sync(target.parent)
    except OSError as e:
        raise unwritable(path, e) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def link_target(path: str | Path) -> Path:
    """Return the file that a symbolic link leads to, also one that is not there yet; else the path itself.

    Raises UserError for links in a circle.
    """
    place = Path(path)
    if not place.is_symlink():
        return place
    target = Path(os.path.realpath(place))
    if target.is_symlink():
        raise UserError(f"'{path}' cannot be written: it is a symbolic link in a circle")
    return target


def _rights(item: Path, target: Path) -> int | None:
    """Return the rights of the file that a new one replaces, or of the target that it comes with."""
    for old in (target.parent / item.name, target):
        with contextlib.suppress(FileNotFoundError):
            return stat.S_IMODE(old.stat().st_mode)
    return None


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Raises OSError where that fails; a file system that cannot sync folders is taken as it is.
    """
    folder = path.is_dir()
    try:
        place = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
    except OSError:
        if not folder:
            raise


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Return a new temporary folder for a target, and the descriptor that holds its lock."""
    for _ in range(_TRIES):
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            lock = _lock(folder)
        except FileNotFoundError:
            continue
        if lock is None or folder.exists():
            return folder, lock
        os.close(lock)  # removed between its making and its locking
    raise FileNotFoundError(None, "its temporary folder is removed at once")


def _lock(folder: Path) -> int | None:
    """Return the descriptor of a folder that this process alone has locked; None where it cannot be had."""
    if fcntl is None:
        return None
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process has it, or the file system has no locks
        os.close(place)
        return None
    return place


def remove_stale(folder: Path, names: str) -> None:
    """Remove what killed runs left in a folder while they wrote files whose names match a regular expression.

    A folder that cannot be listed is left as it is: it may still take a file.
    """
    if fcntl is None:
        return
    pattern = re.compile(rf"\.(?:{names})\.[a-z0-9_]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for item in [item for item in folder.iterdir() if pattern.fullmatch(item.name)]:
            if item.is_symlink() or not item.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                lock = _lock(item)
                if lock is not None:
                    shutil.rmtree(item, ignore_errors=True)
                    os.close(lock)


def require_file(target: Path) -> None:
    """Raise UserError for a place where something else than a regular file is."""
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "not a regular file"
        raise UserError(f"'{target}' cannot be written: it is {what}")


def unwritable(path: str | Path, error: OSError) -> UserError:
    """Return the sentence about a file that cannot be written."""
    return UserError(f"'{path}' cannot be written: {error.strerror or error}")
