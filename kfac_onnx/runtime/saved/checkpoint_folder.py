"""A folder of checkpoints: `step-0000000040.ckpt` and the like, the newest few of one run.

The number is the data position (batches consumed, skipped ones too). A new checkpoint is complete and synced
before an old one is deleted. Reading takes the newest that is whole; a damaged one is passed over with a
warning, and set aside (`.damaged`) when the run that went on without it has saved again. A folder belongs to
one run: what another run left there is neither deleted nor mixed with.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.disk.atomic import remove_stale
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.saved.checkpoint import DamagedError, read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Collection

    from kfac_onnx.runtime.saved.checkpoint import Checkpoint

__all__ = ["KEEP", "checkpoint_name", "is_folder", "numbered", "read_newest", "require_own", "tidy"]

KEEP: Final = 3
"""How many checkpoints a folder keeps unless another number is asked for."""
SUFFIXES: Final = (".ckpt", ".safetensors")
"""What marks a path as that of one file."""

_NAME: Final = re.compile(r"step-(\d{10,})\.ckpt")
_log = logging.getLogger(__name__)


def is_folder(path: str | Path) -> bool:
    """Say whether a place is a folder for checkpoints: it is one, or its name does not end as a file's."""
    place = Path(path)
    return place.is_dir() or place.suffix not in SUFFIXES


def checkpoint_name(position: int) -> str:
    """Return the name of the checkpoint at a data position."""
    return f"step-{position:010d}.ckpt"


def numbered(folder: str | Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder with their numbers, the newest first.

    Raises UserError when the folder cannot be read; one that does not exist holds none.
    """
    try:
        names = [(_NAME.fullmatch(item.name), item) for item in Path(folder).iterdir()]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"the folder '{folder}' cannot be read: {e.strerror or e}") from e
    return sorted(((int(found[1]), item) for found, item in names if found), reverse=True)


def read_newest(folder: str | Path) -> tuple[Path, Checkpoint, tuple[Path, ...]]:
    """Return the newest whole checkpoint of a folder, its file, and the damaged files that are newer.

    Raises UserError when there is none, when the newest that is whole is of another version, or when the
    system does not let a newer one be read: what it holds is not lost, and nothing may take its place.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for _, path in numbered(folder):
        try:
            found = read_checkpoint(path)
        except DamagedError as e:
            damaged.append((path, e))
            continue
        for _, error in damaged:
            _log.warning("%s; '%s' is taken instead", error.message, path.name)
        return path, found, tuple(path for path, _ in damaged)
    if damaged:
        raise UserError(
            f"no checkpoint in '{folder}' is whole",
            tried=[error.message for _, error in damaged],
            help="start anew in another folder",
        )
    raise UserError(f"there is no checkpoint in '{folder}'")


def require_own(folder: str | Path, position: int, damaged: Collection[Path], *, own: bool) -> None:
    """Raise UserError where saving would mix this run's checkpoints with others.

    `own` says that the run came out of this folder, `damaged` which files it passed over.
    """
    found = [(number, path) for number, path in numbered(folder) if path not in damaged]
    if found and not own:
        raise UserError(
            f"the folder '{folder}' holds checkpoints of another run",
            help="go on from them (resume, `train --resume`), or give another folder",
        )
    for number, path in found:
        if number > position:
            raise UserError(
                f"the folder '{folder}' holds checkpoints of later steps: '{path.name}' is newer than"
                f" batch {position}, where this run is",
                help="go on from the newest, or save into another folder",
            )


def tidy(folder: str | Path, saved: Path, keep: int, damaged: Collection[Path]) -> None:
    """Delete all but the newest `keep` checkpoints, and set damaged ones aside.

    Only for the folder of a run that has just saved. What cannot be deleted stays, with a warning.
    """
    remove_stale(Path(folder), r"step-\d+\.ckpt")
    older = [path for _, path in numbered(folder) if path != saved and path not in damaged]
    try:
        for path in damaged:
            if path != saved and path.exists():
                path.replace(path.with_name(f"{path.name}.damaged"))
        for path in older[max(0, keep - 1) :]:
            path.unlink(missing_ok=True)
    except OSError as e:
        _log.warning("an old checkpoint cannot be deleted: %s", e)
