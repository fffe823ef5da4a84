"""Every real exported graph of the test data: the canonical form gives the reference's loss and gradients."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kfac_onnx import metadata
from kfac_onnx.canonical.lowering import runs
from kfac_onnx.canonical.race_free_scatters import provably_unique
from kfac_onnx.readers import emit_divisor, read_training_graph

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = Path(__file__).parent.parent / "data"
EXPORTERS = ("ortart_", "ortgrad_", "ortmodule_", "torchjoint_", "torchmakefx_", "tf2onnx_", "jax2onnx_")
INVALID = {"jax2onnx__nplm_plainmatmul"}
GRAPHS = {
    path.stem: path
    for path in sorted((DATA / "graphs").glob("*.onnx"))
    if path.stem.startswith(EXPORTERS) and path.stem not in INVALID
}
# Measured worst errors relative to the largest entry: float32 5e-7, float16 1e-3, bfloat16 5.3e-3: the
# exporter's own graph rounds each operator to 2⁻¹¹ (2⁻⁸) of its result.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 8e-3}


@cache
def sidecar(name: str) -> dict[str, Any]:
    return json.loads(GRAPHS[name].with_suffix(".json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GRAPHS[name].with_suffix(".npz")) as found:
        loaded = {key: found[key] for key in found}
    return {
        key: value.view(ml_dtypes.bfloat16) if value.dtype == np.uint16 else value
        for key, value in loaded.items()
    }


@cache
def canonical(name: str) -> ir.Model:
    return read_training_graph(GRAPHS[name])


def parameters(model: ir.Model) -> list[metadata.Parameter]:
    return metadata.read_list(model, "parameters", metadata.Parameter)


def feed(name: str, model: ir.Model, which: str) -> dict[str, np.ndarray]:
    known = arrays(name)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        keys = (f"{which}:{value.name}", f"in:{value.name}", "yield:pred")
        found[str(value.name)] = known[next(key for key in keys if key in known)]
    return found


@cache
def dtypes(name: str) -> set[str]:
    """Return the element types of all values of the graph, in NumPy's words."""
    found = {
        value.dtype for node in canonical(name).graph for value in (*node.inputs, *node.outputs) if value
    }
    return {str(dtype.numpy()) for dtype in found if dtype is not None}


def tolerance(name: str, array: np.ndarray) -> float:
    """Return the tolerance for an array of a graph: that of the coarsest type in the graph."""
    coarsest = next((kind for kind in ("bfloat16", "float16") if kind in dtypes(name)), str(array.dtype))
    return TOLERANCE[coarsest]


def is_random(name: str) -> bool:
    return any(node.op_type == "Dropout" and len(node.inputs) > 2 for node in canonical(name).graph)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("threads", [1, 4])
def test_loss_and_gradients_are_the_references(
    name: str,
    threads: int,
    run: Callable[..., dict[str, np.ndarray]],
    check: Callable[[np.ndarray, np.ndarray, float], None],
) -> None:
    model, known, side = canonical(name), arrays(name), sidecar(name)
    loss = metadata.read(model, "loss", metadata.Loss)
    assert loss is not None
    results = run(model, feed(name, model, "in"), threads)
    if is_random(name):  # torch drew other numbers: all that can be said is that it runs
        assert all(np.isfinite(results[str(item.gradient)]).all() for item in parameters(model))
        return
    if loss.value is not None:
        check(results[loss.value], known["ref:loss"], tolerance(name, known["ref:loss"]))
    compared = 0
    for item in parameters(model):
        reference = reference_of(side, item)
        if reference is None:
            continue
        expected, actual = known[f"ref:grad:{reference}"], results[str(item.gradient)]
        dropped = side["param_grads"].get(reference, {}).get("bad_rows", [])
        rows = np.setdiff1d(np.arange(len(expected)), dropped) if expected.ndim else ...
        check(actual[rows], np.asarray(expected[rows]), tolerance(name, expected))
        for row in dropped:  # the exporter loses padding_idx: it gives this row a gradient, torch none
            assert not expected[row].any()
            assert actual[row].any()
        compared += 1
    assert compared == len(parameters(model))
    if threads == 1 and "ref2:loss" in known and loss.value is not None:
        second = run(model, feed(name, model, "in2"), threads)
        check(second[loss.value], known["ref2:loss"], tolerance(name, known["ref2:loss"]))


def reference_of(side: dict[str, Any], item: metadata.Parameter) -> str | None:
    """Return the name that the reference uses for a parameter of the graph."""
    for reference, found in side["param_grads"].items():
        if item.gradient == found.get("value") or item.name == side["param_map"].get(reference):
            return reference
    return None


@pytest.mark.parametrize("name", GRAPHS)
def test_parameters_are_all_found_or_refused(name: str) -> None:
    model, side = canonical(name), sidecar(name)
    found = {reference_of(side, item) for item in parameters(model)}
    refused = {item.parameter for item in metadata.read_list(model, "refused", metadata.Refusal)}
    frozen = {side["param_map"].get(item, item) for item in side.get("frozen", [])} | set(
        side.get("frozen", [])
    )
    missing = {own for reference, own in side["param_map"].items() if reference not in found}
    assert missing - frozen == refused
    inputs = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for item in parameters(model):
        assert item.name in inputs
        assert item.gradient in {value.name for value in model.graph.outputs}
    assert not frozen & {item.name for item in parameters(model)}


@pytest.mark.parametrize("name", GRAPHS)
def test_reduction_and_divisor(name: str, run: Callable[..., dict[str, np.ndarray]]) -> None:
    model, side = canonical(name).clone(), sidecar(name)
    loss = metadata.read(model, "loss", metadata.Loss)
    assert loss is not None
    assert loss.value == side["loss_name"]
    if loss.value is None:
        assert loss.reduction == "unknown"
        assert emit_divisor(model) is None
        return
    assert loss.reduction == ("sum" if side["reduction"] == "sum" else "mean")
    divisor = emit_divisor(model)
    assert divisor is not None
    model.graph.outputs.append(divisor)
    for which in ("in", "in2"):
        if which == "in2" and "in2:labels" not in arrays(name):
            continue
        value = run(model, feed(name, model, which))[str(divisor.name)]
        assert value.dtype == np.float32
        assert value.shape == ()
        assert float(value) == examples(name, which)


def examples(name: str, which: str) -> float:
    """Return how many examples the reference's loss averages."""
    if sidecar(name)["reduction"] == "sum":
        return 1.0
    known = arrays(name)
    targets = [known[f"{which}:{key}"] for key in sidecar(name)["label_inputs"] if f"{which}:{key}" in known]
    if not targets:  # make_fx graphs have nameless inputs; the labels come last
        last = max(key for key in known if key.startswith(f"{which}:arg"))
        targets = [known[last]]
    ignored = -100 if targets[0].dtype == np.int64 else np.nan
    return float(np.sum(targets[0] != ignored))


@pytest.mark.parametrize("name", GRAPHS)
def test_canonical_form(name: str) -> None:
    model = canonical(name)
    original = onnx.load(GRAPHS[name])
    assert model.opset_imports[""] >= 18
    assert not model.functions
    graph = model.graph
    for node in graph:
        assert node.domain == "" or runs(node.domain, node.op_type)
        assert not (
            node.op_type == "ScatterND" and "reduction" in node.attributes and not provably_unique(node)
        )
    assert set(model.opset_imports) == {"", *(node.domain for node in graph)}
    assert not any("accumulation" in str(value.name) for value in (*graph.inputs, *graph.outputs))
    assert "lazy_reset_grad" not in {value.name for value in graph.inputs}
    seen = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        assert all(value is None or value in seen for value in node.inputs), "nodes are sorted"
        seen.update(node.outputs)
    kept = {name for node in original.graph.node for name in node.output}
    kept |= {tensor.name for tensor in original.graph.initializer}  # undone copies keep their names
    added = {value.name for node in graph for value in node.outputs} - kept
    added -= {item.gradient for item in parameters(model)}  # that of rows and ids is called <p>_grad
    assert all(str(value).startswith("kfac/") for value in added), "the exporter's names stay"
    loss = metadata.read(model, "loss", metadata.Loss)
    assert loss is not None
    if loss.value is not None:
        assert loss.value in {value.name for value in graph.outputs}


def test_reading_twice_gives_the_same_bytes_and_leaves_the_source_alone() -> None:
    path = GRAPHS["ortart_legloss__gpt_tied"]
    source = ir.load(path)
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    first, second = read_training_graph(source), read_training_graph(path)
    texts = [ir.to_proto(model).SerializeToString(deterministic=True) for model in (first, second)]
    assert texts[0] == texts[1]
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before


def test_a_bfloat16_table_is_read_directly() -> None:
    for name in (
        "ortart_dyncore__nplm_bf16",
        "torchjoint_in__nplm_bf16",
        "torchjoint_in__nplm_mixed_bf16emb",
    ):
        (lookup,) = [node for node in canonical(name).graph if node.op_type == "Gather" and is_table(node)]
        assert lookup.outputs[0].dtype == ir.DataType.BFLOAT16


def is_table(node: ir.Node) -> bool:
    table = node.inputs[0]
    return table is not None and table.is_graph_input() and table.dtype == ir.DataType.BFLOAT16


def test_order_of_nodes_and_names_of_inner_values_do_not_matter(
    run: Callable[..., dict[str, np.ndarray]], check: Callable[[np.ndarray, np.ndarray, float], None]
) -> None:
    """Reversed nodes and renamed inner values give the same pairs and numbers."""
    for name in ("ortart_legcore__siamese", "torchjoint_in__nplm"):
        proto = onnx.load(GRAPHS[name])
        interface = {value.name for value in (*proto.graph.input, *proto.graph.output)}
        nodes = list(proto.graph.node)[::-1]
        for node in nodes:
            for names in (node.input, node.output):
                for index, old in enumerate(names):
                    names[index] = (
                        f"v/{old}" if old and old not in interface and not is_initializer(proto, old) else old
                    )
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        del proto.graph.value_info[:]
        model = read_training_graph(proto)
        known = canonical(name)
        assert [item.name for item in parameters(model)] == [item.name for item in parameters(known)]
        results, expected = (run(item, feed(name, item, "in")) for item in (model, known))
        for mine, theirs in zip(parameters(model), parameters(known), strict=True):
            check(results[str(mine.gradient)], expected[str(theirs.gradient)], 2e-6)


def is_initializer(proto: onnx.ModelProto, name: str) -> bool:
    return any(tensor.name == name for tensor in proto.graph.initializer)
