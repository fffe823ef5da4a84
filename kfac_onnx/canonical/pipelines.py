"""The pipelines that bring a graph to the canonical form: what a reader of training graphs runs, as text.

Canonical means: opset 18 or newer, standard operators, no functions, nodes in order, shapes as far as ONNX
can tell them, lookups of a table outside of loops, and scatters that any number of threads may run.
"""

from __future__ import annotations

from typing import Final

__all__ = ["CANONICAL", "FINISH", "KERNELS", "PLAIN", "PREPARE", "STANDARD"]

PLAIN: Final = "inline-functions,sort-nodes,lift-constants,require-optional-inputs,encode-strings"
"""What comes first: afterwards every input is a tensor, or the graph is refused."""

PREPARE: Final = "upgrade-opset,infer-shapes,fold-constants,infer-shapes{when=changed}"
"""What comes before anybody looks at operators."""

STANDARD: Final = (
    "lower-training-operators,infer-shapes{when=missing},raise-window-scatters,mask-dropped-rows,open-loops,"
    "widen,settle-summed-axes,raise-segment-sums,race-free-scatters,infer-shapes{when=missing},clean-imports"
)
"""From exporters' operators and forms to standard ones; the rules look at shapes."""

FINISH: Final = "undo-stale-copies,dce"
"""What comes when the trained parameters are known."""

CANONICAL: Final = f"{PLAIN},{PREPARE},{STANDARD}"
"""All that a graph without gradients goes through."""

KERNELS: Final = "infer-shapes,widen,infer-shapes{when=changed},clean-imports"
"""For nodes that were added to a canonical graph."""
