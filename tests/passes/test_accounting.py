"""Every tensor of a training graph is in exactly one class, and the classes are the right ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfac_onnx as kx
from kfac_onnx import metadata
from kfac_onnx.cli.main import main

GRAPHS = [
    path
    for path in sorted((Path(__file__).parents[1] / "data" / "graphs").glob("*.onnx"))
    if path.stem != "jax2onnx__nplm_plainmatmul"  # which no runtime can run
]

# Each part reads h [b, 3], adds to it, and says in which classes its tensors are after `differentiate`.
PARTS: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, str]]] = {
    "plain": (
        "e = Gather(emb, ids) $out = Add($in, e)",
        {"emb": (7, 3)},
        {"emb": "table"},
    ),
    "matrix": ("p = MatMul($in, W) $out = Tanh(p)", {"W": (3, 3)}, {"W": "other"}),
    "tied": (
        "e = Gather(emb, ids) t = Transpose(emb) l = MatMul($in, t) w = MatMul(l, emb) s = Add(e, w) $out = Tanh(s)",
        {"emb": (7, 3)},
        {"emb": "table"},
    ),
    "computed": (
        "q = Mul(emb, emb) e = Gather(q, ids) $out = Add($in, e)",
        {"emb": (7, 3)},
        {"emb": "refused"},
    ),
    "rank3": (
        "m = Gather(rel, ids) u = Unsqueeze($in, one) v = MatMul(u, m) $out = Squeeze(v, one)",
        {"rel": (7, 3, 3)},
        {"rel": "other"},
    ),
    "quantized": (
        "q = QuantizeLinear(emb, sc, zp) d = DequantizeLinear(q, sc, zp) e = Gather(d, ids) $out = Add($in, e)",
        {"emb": (7, 3)},
        {"emb": "frozen"},
    ),
    "routed": (
        "g = MatMul($in, G) k = ArgMax<axis: int = 1, keepdims: int = 0>(g) e = Gather(emb, k) $out = Add($in, e)",
        {"G": (3, 7), "emb": (7, 3)},
        {"G": "frozen", "emb": "table"},
    ),
    "unread": ("$out = Tanh($in)", {"spare": (4, 3)}, {"spare": "frozen"}),
    "norms": (
        "a = LayerNormalization($in, gain, shift) b = MatMul(a, W) c = LayerNormalization(b, gain, shift) "
        "$out = Tanh(c)",
        {"gain": (3,), "shift": (3,), "W": (3, 3)},
        {"gain": "merged", "shift": "merged", "W": "other"},
    ),
}
CONSTANT = {"gain": 1.0, "shift": 0.0}


def made(parts: list[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a forward model of some parts, one after the other, and the class of each of its tensors."""
    rng = np.random.default_rng(0)
    nodes, classes, weights = "", {}, {}
    for place, part in enumerate(parts):
        text, shapes, kinds = PARTS[part]
        names = {name: f"{name}{place}" for name in shapes}
        words = (
            text.replace("$in", f"h{place}")
            .replace("$out", f"h{place + 1}")
            .replace("(", " ( ")
            .replace(")", " ) ")
        )
        own = {*names, *"eptlwsqmuvdgkabc"}
        nodes += (
            " ".join(
                f"{word.rstrip(',')}{place}" + ("," if word.endswith(",") else "")
                if word.rstrip(",") in own
                else word
                for word in words.split()
            )
            + "\n"
        )
        for name, shape in shapes.items():
            array = np.full(shape, CONSTANT[name]) if name in CONSTANT else rng.standard_normal(shape)
            weights[names[name]] = array.astype(np.float32)
            classes[names[name]] = kinds[name]
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (int64[b] ids, float[b, 3] h0) => (float[b, 5] z) '
        f"<int64[1] one = {{1}}, float sc = {{0.01}}, int8 zp = {{0}}> {{ {nodes} z = MatMul(h{len(parts)}, out) }}"
    )
    weights["out"] = rng.standard_normal((3, 5)).astype(np.float32)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return model, classes | {"out": "other"}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5))
def test_the_classes_partition_the_tensors(parts: list[str]) -> None:
    forward, classes = made(parts)
    graph = kx.differentiate(forward)
    report = kx.scan(graph)
    names = [item.name for item in report.accounts]
    assert sorted(names) == sorted(set(names))
    kinds = {item.name: item.kind for item in report.accounts}
    # What is at the end of nothing that is trained may be folded or frozen with it; the rest is as declared.
    assert kinds == {name: kind for name, kind in classes.items() if name in kinds}
    assert {name for name, kind in classes.items() if kind != "frozen"} <= kinds.keys()
    if "table" not in kinds.values():
        return  # there is nothing to transform
    refused = tuple(name for name, kind in kinds.items() if kind == "refused")
    model = kx.transform(graph, allow_fallback=refused, tied="both", rest="sgd")
    assert metadata.read_list(model, "accounts", metadata.Account) == list(report.accounts)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_every_tensor_of_a_real_graph_once(path: Path) -> None:
    report = kx.scan(path)
    kinds = {item.name: item.kind for item in report.accounts}
    assert len(kinds) == len(report.accounts)
    assert {name for name, kind in kinds.items() if kind == "table"} == {
        site.parameter for site in report.sites
    }
    assert {item.parameter for item in report.refused} <= {
        name for name, kind in kinds.items() if kind == "refused"
    }
    trained = {item.name for item in report.parameters} if report.trainable else set[str]()
    assert trained <= kinds.keys()
    assert not trained & {name for name, kind in kinds.items() if kind == "frozen"}
    held = {str(value.name): value for value in ir.load(path).graph.initializers.values()}
    large = {name for name, value in held.items() if len(value.shape or ()) > 1 and _is_float(value)}
    assert {item.name for item in report.parameters} & large <= kinds.keys()


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def test_the_command_line_says_what_is_no_table_frozen_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward, _ = made(["plain", "rank3", "routed", "norms"])
    kx.save(kx.differentiate(forward), tmp_path / "train.onnx")
    assert main(["scan", str(tmp_path / "train.onnx")]) == 0
    said = capsys.readouterr().out
    lines = [
        "tensors: 2 embedding tables, 3 other trained parameters, 2 that an exporter may have merged, 1 frozen",
        "other: rel1 (no table: Gather 'm1' looks rows up in it, and it is 7 x 3 x 3: a table has two dimensions)",
        "frozen: G2 (the loss depends on it only through ArgMax 'k2', which has no derivative)",
        "merged: gain3 ('gain3' starts at 1 everywhere and is read by 2 nodes (LayerNormalization): one parameter, "
        "or several of which an exporter kept one)",
    ]
    assert [line for line in lines if line not in said] == []
    assert main(["transform", str(tmp_path / "train.onnx"), "-o", str(tmp_path / "step.onnx"), "-q"]) == 0
    assert main(["inspect", str(tmp_path / "step.onnx")]) == 0
    said = capsys.readouterr().out
    assert [line for line in lines if line not in said] == []
    findings = {(item.id, item.what) for item in kx.check(tmp_path / "train.onnx").findings}
    assert (
        "no-table",
        "'rel1' is no embedding table: Gather 'm1' looks rows up in it, and it is 7 x 3 x 3: a table has two dimensions",
    ) in findings
