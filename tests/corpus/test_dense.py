"""The drop-in shape on every graph: the exporter's interface, and the table's gradient preconditioned.

Any host may run the graph: here plain ONNX Runtime feeds states back and makes the optimizer's step itself. What
ONNX Runtime's artifacts and ORTModule have instead of an interface (`accumulators`, `YieldOp`) no plain
runtime can execute: there gradients are outputs named `<parameter>_grad`, and predictions and their gradients are
outputs and inputs, after all others.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from corpus_cases import StepReference, marked
from corpus_table import names
from plain_host import Host

from kfac_onnx import metadata
from kfac_onnx.api import transform
from kfac_onnx.metadata import RowGradient, State

NAMES = [name for name in names("trained") if not name.startswith(("traininginfo_", "tf2onnx_sgd_"))]
"""Graphs with gradient outputs; those that hold their optimizer have new parameters instead."""
# Relative to the largest entry of a gradient. Float32: sums in another order, and the root by iteration.
# Half precision: the exporter's own rounding, amplified by the root.
TOLERANCE = {np.float32: 5e-5, np.float16: 2e-2, ml_dtypes.bfloat16: 1e-1}

Port = tuple[str, int, tuple[int | str, ...]]


def ports(values: object) -> list[Port]:
    """Return names, dtypes and shapes; an unnamed dimension is ''."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
        found.append((value.name, kind.elem_type, dims))
    return found


def outside(original: onnx.ModelProto) -> tuple[list[Port], list[Port]]:
    """Return what the exporter's graph takes and gives, without what no plain runtime can execute."""
    graph = original.graph
    gone: set[str] = set()
    taken, given = [], []
    for node in graph.node:
        if node.op_type == "InPlaceAccumulatorV2":
            gone |= {node.input[0], *node.input[2:], *node.output}
            given.append(node.input[1])
    inputs = [item for item in ports(graph.input) if item[0] not in gone]
    outputs = [item for item in ports(graph.output) if item[0] not in gone]
    kinds = {name: (kind, dims) for name, kind, dims in (*ports(graph.input), *ports(graph.value_info))}
    for tensor in graph.initializer:
        kinds[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    for name in given:
        outputs.append((name, *kinds[name.removesuffix("_grad")]))
    return inputs + taken, outputs


@pytest.mark.parametrize("name", NAMES)
def test_the_interface_is_the_exporters(name: str) -> None:
    case, graph = marked(name)
    # Presets that square rows give out the rows of distinct ids, of which there are fewer.
    model = transform(case.path, preset="half", shape="dense")
    made = ir.to_proto(model).graph
    inputs, outputs = outside(onnx.load(case.path, load_external_data=False))
    states = metadata.read_list(model, "state", State)
    fed = [fed for fed in graph.predictions.values() if fed is not None]
    found_inputs, found_outputs = ports(made.input), ports(made.output)
    compare(found_inputs[: len(inputs)], inputs)
    compare(found_outputs[: len(outputs)], outputs)
    assert {item[0] for item in found_inputs[len(inputs) :]} == {*fed, *(state.input for state in states)}
    ours = {*graph.predictions, "kfac/ok", *(state.output for state in states)}
    assert {item[0] for item in found_outputs[len(outputs) :]} == ours
    pairs = {item.gradient for item in metadata.read_list(model, "row_gradients", RowGradient)}
    gradients = {item.gradient for item in graph.parameters}
    assert gradients - pairs <= {item[0] for item in found_outputs[: len(outputs)]}


def compare(found: list[Port], wanted: list[Port]) -> None:
    """Assert equal names, dtypes and shapes; where the exporter left a dimension unnamed, any name will do."""
    assert [item[0] for item in found] == [item[0] for item in wanted]
    for (name, kind, dims), (_, want_kind, want) in zip(found, wanted, strict=True):
        assert kind == want_kind, name
        assert len(dims) == len(want) or not want, name
        assert all(one == other or other == "" for one, other in zip(dims, want, strict=False)), name


@pytest.mark.parametrize("preset", ["half", "r1.7"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_a_host(name: str, preset: str) -> None:
    """Each gradient equals the reference's; the host makes steps of gradient descent with them."""
    case, graph = marked(name)
    weights = graph.initial(case)
    scale = 1.0 if preset == "r1.7" and graph.loss is None else None
    reference = StepReference(graph, weights, preset, 1.0, "sgd", 0.0)
    host = Host(transform(case.path, preset=preset, shape="dense", grad_scale=scale), weights)
    tables = {site.parameter for site in graph.sites}
    narrow = {array.dtype.type for array in weights.values()} & set(TOLERANCE)
    dtype = max(narrow, key=TOLERANCE.__getitem__)
    if dtype is np.float32 and graph.half:
        dtype = np.float16
    for t in range(3 if preset == "half" else 2):
        batch = case.feed("in2" if t % 2 else "in") | graph.fed_back(case)
        reference.weights = {key: np.asarray(value, np.float64) for key, value in weights.items()}
        out = graph.run(reference.feed(batch))
        reference.step(out)
        found = host.run({**batch, **weights})
        assert bool(found["kfac/ok"])
        for item in graph.parameters:
            got = np.asarray(found[str(item.gradient)], np.float64)
            want = np.asarray(out[item.gradient], np.float64)
            if item.name in tables:
                want = np.asarray(weights[item.name], np.float64) - reference.weights[item.name]
            error = np.abs(got - want).max()
            limit = TOLERANCE[dtype] * max(np.abs(want).max(), 1e-4)
            assert error <= limit, f"{name}, step {t + 1}, {item.name}: {error:.2e} > {limit:.2e}"
            weights[item.name] = (weights[item.name] - 0.01 * got).astype(weights[item.name].dtype)


def test_gradients_of_nothing_stay_in_the_drop_in_graph_alone() -> None:
    """An exporter folded the parameter away and left its gradient: nothing of a whole step needs it."""
    case, _ = marked("torchjoint_initopt__bert_sum")
    dense, rows = (transform(case.path, shape=shape) for shape in ("dense", "rows"))
    gone = metadata.read_strings(dense, "orphans")
    assert "m.pos.weight_grad" in gone
    assert set(gone) <= {value.name for value in dense.graph.outputs}
    assert not set(gone) & {value.name for node in rows.graph for value in node.outputs}
