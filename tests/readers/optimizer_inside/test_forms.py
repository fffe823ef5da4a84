"""Every algebraic form of an update: the optimizer is taken out, and the gradients are those of the loss."""

from __future__ import annotations

import pytest
from update_forms import FORMS
from update_graphs import check, model_of

from kfac_onnx import metadata


@pytest.mark.parametrize("order", [("W", "v"), ("v", "W")])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_loss(name: str, order: tuple[str, str]) -> None:
    kind, optimizer = FORMS[name]
    model = check(model_of(optimizer, order))
    assert model.metadata_props["kfac.frontend"] == "optimizer-inside"
    notes = metadata.read_strings(model, "notes")
    assert any(note.startswith(f"the graph's own optimizer is taken out ({kind}") for note in notes), notes
    assert {value.name for value in model.graph.inputs} == {"ids", "y", "W", "v"}
    assert model.graph.outputs[0].name == "loss"
    assert len(model.graph.outputs) == 3


def test_comparison_notices_one_percent() -> None:
    with pytest.raises(AssertionError):
        check(model_of(FORMS["adam"][1]), scaled=1.01)
