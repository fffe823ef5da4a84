"""`len(x)` of a tensor, in the code of a module that is traced, is a size that may stay free.

Python's `len` must return an int, so PyTorch's trace fixes that size at the one of the example. While a
module is traced, its source files see a `len` that returns `x.shape[0]` of a tensor instead.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import builtins
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["free_lengths"]


@contextmanager
def free_lengths(module: torch.nn.Module) -> Generator[None]:
    """Give the source files of a module and its submodules, PyTorch's own apart, such a `len`."""
    files = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
    spaces = [
        vars(sys.modules[name])
        for name in files
        if name in sys.modules and name.partition(".")[0] not in ("builtins", "kfac_onnx", "torch")
    ]
    own = [space for space in spaces if "len" not in space]  # who has a `len` of his own keeps it
    for space in own:
        space["len"] = _length
    try:
        yield
    finally:
        for space in own:
            del space["len"]


def _length(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim:
        return value.shape[0]
    return builtins.len(value)
