"""Rules that give single parameters an optimizer of their own: `PATTERN=optimizer{option=value,...}`.

    emb_user*=adaptive{lr=0.02}      a preset of the block, for tables
    *.head.weight=adamw{weight-decay=0.1}
    blocks.*.weight=muon{lr=0.02}

The optimizers are the block's presets, those of `--rest`, `outrow` (for output tables), and `plain-sgd`,
`plain-adagrad`, ... (`adagrad` is the preset). Each rule becomes an inserting pass with `only=[PATTERN]` and
a learning rate of its own. A parameter is taken by the first pass that wants it, so the passes come in the
reverse of the rules: the last match wins.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kfac_onnx.pipeline.base import Pass

__all__ = ["LAYERS", "METHODS", "REST", "rule_passes"]

METHODS: Final = ("sgd", "momentum", "adam", "adamw", "adagrad")
"""Methods of `insert-optimizer`."""
LAYERS: Final = ("muon", "kfac")
"""What trains hidden matrices, with the block of output tables on those and adamw on all else."""
REST: Final = (*METHODS, *LAYERS)
"""What trains the other parameters."""
_SPECIAL: Final = {"muon": "insert-muon", "kfac": "insert-layer-kfac", "outrow": "insert-output-rows"}
"""Optimizers that are passes of their own: of matrices, and of output tables."""


def rule_passes(rules: Sequence[str]) -> list[Pass]:
    """Return the passes that the rules stand for, in the order in which they run.

    Raises UserError for a rule of another form, an unknown optimizer, or an option that it does not have.
    """
    return [_rule_pass(rule) for rule in reversed(rules)]


def _rule_pass(rule: str) -> Pass:
    from kfac_onnx.fisher.presets import PRESETS
    from kfac_onnx.pipeline.pipeline import parse_pipeline

    # A name may hold '='; an optimizer's options may too, but stand in braces.
    head, brace, options = rule.partition("{")
    pattern, equals, name = (part.strip() for part in head.rpartition("="))
    if not equals or not pattern or not name or (brace and not options.endswith("}")):
        raise UserError(
            f"a rule is PATTERN=optimizer{{option=value,...}}, not '{rule}'",
            help="such as 'emb_*=adaptive{lr=0.02}' or '*.bias=adamw'",
        )
    plain = {f"plain-{method}": method for method in METHODS}
    known = tuple(dict.fromkeys([*PRESETS, *METHODS, *_SPECIAL, *plain]))
    if name not in known:
        raise UserError(
            f"the rule '{rule}' names no optimizer: '{name}'{did_you_mean(name, known)}",
            help="the optimizers are: " + ", ".join(known),
        )
    inside = options[:-1].strip()
    if name in PRESETS:
        text = f"insert-embedding-kfac{{preset={name}{_after(inside)}}}"
    elif name in _SPECIAL:
        text = f"{_SPECIAL[name]}{{{inside}}}" if inside else _SPECIAL[name]
    else:
        text = f"insert-optimizer{{method={plain.get(name, name)},parameters=all{_after(inside)}}}"
    try:
        (made,) = parse_pipeline(text).passes
    except UserError as e:
        raise UserError(f"the rule '{rule}' does not hold: {e.message}", help=e.help) from e
    own: dict[str, Any] = {"only": (pattern,)}
    if not re.search(r"\brate *=", inside):  # then no other parameters share it
        own["rate"] = f"kfac/lr of {pattern}"
    return replace(cast("Any", made), **own)


def _after(options: str) -> str:
    return f",{options}" if options else ""
