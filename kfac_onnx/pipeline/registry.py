"""Which passes there are. Built-in ones load when they are asked for, so that listing them is fast."""

from __future__ import annotations

import importlib
from typing import Final, TypeVar

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.pipeline.base import Pass

__all__ = ["BUILT_IN", "pass_class", "pass_names", "register"]

P = TypeVar("P", bound=type[Pass])

BUILT_IN: Final[dict[str, str]] = {
    "differentiate": "kfac_onnx.passes.differentiate",
    "find-embeddings": "kfac_onnx.passes.find_embeddings",
    "classify": "kfac_onnx.passes.classify",
    "clip-gradients": "kfac_onnx.passes.clip_gradients",
    "insert-embedding-kfac": "kfac_onnx.passes.insert_embedding_kfac",
    "insert-optimizer": "kfac_onnx.passes.insert_optimizer",
    "insert-muon": "kfac_onnx.passes.insert_muon",
    "close-step": "kfac_onnx.passes.close_step",
    "lower": "kfac_onnx.passes.lower",
    "dce": "kfac_onnx.passes.dce",
}
"""Pass name to the module that registers it. One line per pass."""

_REGISTERED: Final[dict[str, type[Pass]]] = {}


def register(cls: P) -> P:
    """Class decorator: make a pass known to pipelines under its `name`.

    Raises TypeError for a badly declared pass or for a name that another class has.
    """
    cls.check_declaration()
    known = _REGISTERED.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise TypeError(f"{cls.__name__} and {known.__name__} both claim the pass name '{cls.name}'")
    _REGISTERED[cls.name] = cls
    return cls


def pass_names() -> list[str]:
    """Return the names of all passes, built-in ones first, without loading any."""
    return list(dict.fromkeys([*BUILT_IN, *_REGISTERED]))


def pass_class(name: str) -> type[Pass]:
    """Return the class of a pass by its name.

    Raises UserError for an unknown name.
    """
    if name not in _REGISTERED and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    try:
        return _REGISTERED[name]
    except KeyError as e:
        near = did_you_mean(name, pass_names())
        raise UserError(
            f"unknown pass '{name}'{near}", help="the passes are: " + ", ".join(pass_names())
        ) from e
