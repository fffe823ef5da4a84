"""What a bug leaves behind: one sentence on stderr and a file that lets somebody else see it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_onnx.cli.output import say
from kfac_onnx.version import environment

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["report"]


def report(error: Exception, arguments: Sequence[str], *, broken_pass: bool) -> None:
    """Write a bug report file and name it on stderr.

    The file holds the command, the versions, the traceback and the sizes and SHA-256 sums of the files
    that the command names; not their contents, which may be private.
    """
    versions = environment()
    details: dict[str, Any] = {
        "command": ["kfac-onnx", *arguments],
        "files": [_described(Path(word)) for word in arguments if os.path.isfile(word)],  # noqa: PTH113  it never raises
        "versions": {name: version or "not installed" for name, version in versions.items()},
        "python": versions["python"],
        "system": versions["system"],
        "traceback": traceback.format_exception(error),
    }
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kfac-onnx-bug-", suffix=".json", delete=False, encoding="utf-8"
        ) as file:
            json.dump(details, file, indent=2)
        remedy = f"report it with the file {file.name}"
    except OSError as e:  # no room, or no folder for temporary files
        say("".join(details["traceback"]), err=True)
        remedy = f"report it with the lines above; no file can be written for it: {e.strerror or e}"
    what = "a pass left a broken model behind" if broken_pass else "something went wrong inside kfac-onnx"
    say(f"error: {what}; this is a bug, not your mistake", err=True)
    for line in f"{type(error).__name__}: {error}".splitlines():
        say(f"  {line}", err=True)
    say(f"  help: {remedy}", err=True)


def _described(path: Path) -> dict[str, str | int]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": str(path), "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
