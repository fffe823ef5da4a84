"""Which passes there are. Built-in ones load when they are asked for, so that listing them is fast."""

from __future__ import annotations

import importlib
from typing import Final, TypeVar

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.pipeline.base import Pass

__all__ = ["BUILT_IN", "pass_class", "pass_names", "register"]

P = TypeVar("P", bound=type[Pass])

BUILT_IN: Final[dict[str, str]] = {
    "inline-functions": "kfac_onnx.canonical.upgrade",
    "sort-nodes": "kfac_onnx.canonical.upgrade",
    "lift-constants": "kfac_onnx.canonical.lift_constants",
    "require-optional-inputs": "kfac_onnx.canonical.optional_inputs",
    "encode-strings": "kfac_onnx.canonical.encoded_strings",
    "upgrade-opset": "kfac_onnx.canonical.upgrade",
    "infer-shapes": "kfac_onnx.canonical.infer_shapes",
    "fold-constants": "kfac_onnx.canonical.fold_constants",
    "expand-gradients": "kfac_onnx.autodiff.gradient_nodes",
    "scatter-row-gradients": "kfac_onnx.canonical.row_gradients",
    "lower-training-operators": "kfac_onnx.canonical.lowering",
    "raise-window-scatters": "kfac_onnx.canonical.window_scatters",
    "mask-dropped-rows": "kfac_onnx.canonical.dropped_rows",
    "open-loops": "kfac_onnx.canonical.loops",
    "widen": "kfac_onnx.canonical.widen",
    "settle-summed-axes": "kfac_onnx.canonical.summed_axes",
    "raise-segment-sums": "kfac_onnx.canonical.segment_sums",
    "race-free-scatters": "kfac_onnx.canonical.race_free_scatters",
    "clean-imports": "kfac_onnx.canonical.upgrade",
    "undo-stale-copies": "kfac_onnx.canonical.folded_copies",
    "dce": "kfac_onnx.canonical.dce",
    "differentiate": "kfac_onnx.passes.differentiate",
    "find-embeddings": "kfac_onnx.passes.find_embeddings",
    "classify": "kfac_onnx.passes.classify",
    "clip-gradients": "kfac_onnx.passes.clip_gradients",
    "insert-embedding-kfac": "kfac_onnx.passes.insert_embedding_kfac",
    "insert-optimizer": "kfac_onnx.passes.insert_optimizer",
    "insert-layer-kfac": "kfac_onnx.passes.insert_layer_kfac",
    "insert-muon": "kfac_onnx.passes.insert_muon",
    "insert-output-rows": "kfac_onnx.passes.insert_output_rows",
    "close-step": "kfac_onnx.passes.close_step",
    "lower": "kfac_onnx.passes.lower",
}
"""Pass name to the module that registers it, in the order in which they usually run. One line per pass."""

_REGISTERED: Final[dict[str, type[Pass]]] = {}


def register(cls: P) -> P:
    """Class decorator: make a pass known to pipelines under its `name`.

    Raises TypeError for a badly declared pass or for a name that another class has.
    """
    cls.check_declaration()
    known = _REGISTERED.get(cls.name)
    if known is not None and _place(known) != _place(cls):
        raise TypeError(f"{_place(cls)} and {_place(known)} both claim the pass name '{cls.name}'")
    _REGISTERED[cls.name] = cls
    return cls


def _place(cls: type[Pass]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def pass_names() -> list[str]:
    """Return the names of all passes, built-in ones first, without loading any."""
    return list(dict.fromkeys([*BUILT_IN, *_REGISTERED]))


def pass_class(name: str) -> type[Pass]:
    """Return the class of a pass by its name.

    Raises UserError for an unknown name; TypeError where the module of a built-in pass does not register it.
    """
    if name not in _REGISTERED and name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
        if name not in _REGISTERED:
            raise TypeError(
                f"{BUILT_IN[name]} does not register '{name}': its class needs @register and that name"
            )
    try:
        return _REGISTERED[name]
    except KeyError as e:
        near = did_you_mean(name, pass_names())
        raise UserError(
            f"unknown pass '{name}'{near}", help="the passes are: " + ", ".join(pass_names())
        ) from e
