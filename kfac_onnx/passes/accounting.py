"""What becomes of each tensor of a training graph: every one is in exactly one class.

| class     | is                                                                                 |
|-----------|------------------------------------------------------------------------------------|
| `table`   | an embedding table                                                                 |
| `other`   | another trained parameter; if rows of it are looked up, with why it is no table    |
| `refused` | a table that no block covers, or a parameter that is gone while its gradient stays |
| `frozen`  | a float tensor of two or more dimensions that has no gradient                      |
| `merged`  | a trained parameter that starts at one number everywhere and that several layers   |
|           | read: an exporter may have kept one of several                                     |

Counted are the trained parameters, the gradients that belong to none, and the float constants of two or more
dimensions that came with the graph. A parameter that is both refused and merged is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx import metadata
from kfac_onnx.autodiff.blocked import blocking_nodes
from kfac_onnx.autodiff.merged import merged_parameters
from kfac_onnx.graph.values import is_float, label, rank_of
from kfac_onnx.metadata import Account, Frozen, Loss, Parameter, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import onnx_ir as ir

    from kfac_onnx.tables.facts import Facts
    from kfac_onnx.tables.matching import Verdict

__all__ = ["accounts_of"]

OWN: Final = "kfac/"
"""What reading the graph added has names that begin so."""


def accounts_of(
    model: ir.Model,
    verdicts: Iterable[Verdict],
    values: Mapping[str, ir.Value],
    facts: Facts,
    *,
    tables: Iterable[str] = (),
) -> list[Account]:
    """Return the class of each tensor of a canonical graph, with the reason; edits nothing.

    `verdicts` are those of `find_tables`, `values` the model's by name. Of a graph without gradients there
    are no verdicts: its tensors are the `tables` that are looked up, and frozen ones.
    """
    trainable = model.metadata_props.get("kfac.frontend") != "forward"
    trained = [item.name for item in metadata.read_list(model, "parameters", Parameter) if trainable]
    accounts: dict[str, Account] = {}
    for item in metadata.read_list(model, "refused", Refusal):
        accounts.setdefault(item.parameter, Account(item.parameter, "refused", item.reason))
    by_name = {str(verdict.weight.name): verdict for verdict in verdicts}
    suspects = [] if metadata.unmerged(model) else [values[name] for name in trained if name in values]
    merged = merged_parameters(suspects, _array, facts.is_forward)
    layers = {str(item.parameter.name): str(item) for item in merged if not item.layers_shared}
    for name in trained:
        accounts.setdefault(name, _trained(name, by_name.get(name), layers.get(name)))
    for name in tables:
        accounts.setdefault(name, Account(name, "table", "rows of it are looked up"))
    reasons = {item.name: item.reason for item in metadata.read_list(model, "frozen", Frozen)}
    frozen = _Frozen(model, values, facts) if trainable else None
    for value in _constants(model):
        name = str(value.name)
        if name not in accounts:
            reason = reasons.get(name) or (
                "the graph has no gradients" if frozen is None else frozen.reason(value)
            )
            accounts[name] = Account(name, "frozen", reason)
    return list(accounts.values())


def _trained(name: str, verdict: Verdict | None, merged: str | None) -> Account:
    if verdict is not None and verdict.site is not None:
        uses = len(verdict.site.uses)
        return Account(name, "table", f"{uses} lookup{'s' * (uses != 1)} of its rows")
    if verdict is not None and verdict.refusal is not None:
        return Account(name, "refused", verdict.refusal.reason)
    if merged is not None:
        return Account(name, "merged", f"{merged}: one parameter, or several of which an exporter kept one")
    if verdict is not None and verdict.aside is not None:
        return Account(name, "other", f"no table: {verdict.aside.reason}")
    return Account(name, "other", "no rows of it are looked up")


def _constants(model: ir.Model) -> list[ir.Value]:
    """Return the float constants with two or more dimensions that came with the graph."""
    return [
        value
        for value in model.graph.initializers.values()
        if is_float(value) and (rank_of(value) or 0) > 1 and not str(value.name).startswith(OWN)
    ]


class _Frozen:
    """Why tensors of a graph with gradients have none."""

    def __init__(self, model: ir.Model, values: Mapping[str, ir.Value], facts: Facts) -> None:
        loss = metadata.read(model, "loss", Loss)
        self.facts = facts
        self.loss = None if loss is None else values.get(loss.value or "")
        self.nodes = [node for node in model.graph if facts.is_forward(node)]

    def reason(self, value: ir.Value) -> str:
        """Return it as a clause."""
        if value not in self.facts.forward:
            return "the loss does not depend on it"
        if self.loss is not None and not self.facts.is_carrying(value):
            blocking = blocking_nodes(value, self.loss, self.nodes)
            if blocking:
                return f"the loss depends on it only through {label(blocking[0])}, which has no derivative"
        return "no output of the graph is its gradient"


def _array(value: ir.Value) -> np.ndarray | None:
    return None if value.const_value is None else value.const_value.numpy()
