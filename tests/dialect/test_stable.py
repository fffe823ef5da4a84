"""Bodies have the same bytes in every process, whatever the order of Python's sets."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import hashlib
import onnx_ir as ir
from kfac_onnx.dialect import OPERATORS, functions
for name in OPERATORS:
    for variant in OPERATORS[name].bodies:
        proto = ir.serde.serialize_function(functions(variant, [name])[name])
        print(variant, name, hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest())
"""


def printed(seed: int) -> list[str]:
    done = subprocess.run(  # noqa: S603  our own program
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_hash_seeds_do_not_matter() -> None:
    first = printed(1)
    assert len(first) > 10
    assert first == printed(3)  # onnxscript gives the loop of the root another order there
