"""Every committed graph: `check` finds what the exporters are known to do to it, and nothing else."""

from __future__ import annotations

import onnx
import pytest
from corpus_cases import Case, case_names

from kfac_onnx.api import scan
from kfac_onnx.reports.checks import check

NAMES = case_names("")

GONE = {
    "torchjoint_initopt__bert_sum": {"m.pos.weight", "m.cls.weight", "m.fc.weight"},
    "torchjoint_initopt__gpt_tied": {
        "m.pos.weight",
        *(f"m.blk.{layer}.weight" for layer in ("qkv", "proj", "fc1", "fc2")),
        *(f"m.{layer}.{what}" for layer in ("blk.ln2", "lnf") for what in ("weight", "bias")),
    },
    "torchjoint_initopt__identical_init": {"m.emb_b.weight", "m.fc.weight"},
}
"""Parameters that the exporter folded or merged away."""

OTHERS = {
    "fwd_dynoptcore__bert_sum": {"warning:folded-parameter", "warning:folded-lookup"},
    "fwd_eval__bert_sum": {"warning:folded-parameter"},
    "fwd_eval__gpt_tied": {"warning:folded-parameter", "warning:merged-parameter"},
    "fwd_dynoptcore__identical_init": {"note:shared-table"},
    "fwd_eval__identical_init": {"warning:shared-table"},  # read under the name of the other table
    "jax2onnx__nplm_f16": {"note:no-kernel"},
    "jax2onnx__nplm_plainmatmul": {"error:invalid-shapes", "error:unreadable"},
    "tf2onnx_var__nplm_prim": {"warning:stale-copy"},
    "ortart_dyncore__bert_sum": {"warning:padding-lost"},
    "ortart_legcore__bert_sum": {"warning:padding-lost"},
    "ortart_leg14loss__nplm_pad0": {"warning:padding-lost"},
    "traininginfo_legcore__nplm_pad0_adam": {"warning:padding-lost"},
    "ortart_dynoptcore__lookup_index": {"warning:renamed-parameter"},
    "ortart_legcore__decoys": {"note:frozen-parameter"},
    "ortart_legcore__identical_init": {"note:equal-parameters"},
    "ortmodule_leg__nplm": {"note:loss-outside"},
    "torchjoint_initopt__bert_sum": {"error:parameter-gone", "warning:folded-parameter"},
    "torchjoint_initopt__gpt_tied": {
        "error:parameter-gone",
        "warning:stale-copy",
        "warning:folded-parameter",
        "warning:merged-parameter",
    },
    "torchjoint_initopt__identical_init": {
        "error:parameter-gone",
        "warning:folded-parameter",
        "warning:shared-table",
        "warning:refused-table",
    },
}
"""What is particular to one graph."""

SHARED = ("siamese",)
"""Models whose one table is read by ids of two inputs, as it is meant."""


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_what_is_known_of_the_graph(name: str) -> None:
    case = Case(name)
    report = check(case.path, parameters=case.feed())
    found = {f"{item.severity}:{item.id}" for item in report.findings}
    assert found - {"warning:refused-table"} == _expected(case) - {"warning:refused-table"}
    assert "warning:refused-table" in found or "warning:refused-table" not in OTHERS.get(name, set())
    assert all(item.what and item.why and item.remedy for item in report.findings)
    gone = {item.what.split("'")[1] for item in report.findings if item.id == "parameter-gone"}
    assert gone == GONE.get(name, set())


def _expected(case: Case) -> set[str]:
    """Return what follows from the sidecar, and what is particular to this graph."""
    expected = set(OTHERS.get(case.name, set()))
    model = onnx.load(case.path, load_external_data=False)
    if _adds_racing(model.graph):
        expected.add("warning:racing-scatter")
    runs = case.sidecar["runs_on_plain_ort"] and not case.sidecar["missing_ops"]
    if not runs and not case.name.startswith(("traininginfo", "fwd")) and "plainmatmul" not in case.name:
        expected.add("note:no-kernel")
    if "error:unreadable" in expected:  # what needs the canonical graph is not tried
        return expected
    if not scan(case.path).trainable:
        expected.add("warning:no-gradients")
    inputs = [
        item for item in model.graph.input if item.name not in {i.name for i in model.graph.initializer}
    ]
    dims = [dim for item in inputs for dim in item.type.tensor_type.shape.dim]
    if not any(dim.dim_param for dim in dims):
        expected.add("note:static-batch")
    if any(case.name.split("__")[1].startswith(shared) for shared in SHARED):
        expected.add("note:shared-table")
    return expected


def _adds_racing(graph: onnx.GraphProto) -> bool:
    for node in graph.node:
        attributes = {item.name: item for item in node.attribute}
        if node.op_type == "ScatterND" and "reduction" in attributes and attributes["reduction"].s == b"add":
            return True
        if any(_adds_racing(item.g) for item in node.attribute if item.type == onnx.AttributeProto.GRAPH):
            return True
    return False


def test_clean_graphs_have_no_findings() -> None:
    for name in (
        "tf2onnx_in__bag_sum",
        "tf2onnx_in__onehot",
        "jax2onnx__nplm_onehot",
        "torchjoint_in__lookup_onehot",
    ):
        case = Case(name)
        assert check(case.path, parameters=case.feed()).findings == ()
