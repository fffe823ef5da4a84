"""Every committed graph: `scan` finds exactly the sidecar's tables, or refuses with a true reason."""

from __future__ import annotations

import json

import pytest
from corpus_cases import Case, case_names

from kfac_onnx.api import scan

NAMES = case_names("ortart_", "torchjoint_")

GONE = {
    "torchjoint_initopt__bert_sum": {"m.pos.weight", "m.cls.weight", "m.fc.weight"},
    "torchjoint_initopt__gpt_tied": {
        "m.pos.weight",
        *(f"m.blk.{layer}.weight" for layer in ("qkv", "proj", "fc1", "fc2")),
        *(f"m.{layer}.{what}" for layer in ("blk.ln2", "lnf") for what in ("weight", "bias")),
    },
    "torchjoint_initopt__identical_init": {"m.emb_a.weight", "m.emb_b.weight", "m.fc.weight"},
}
"""Parameters that an exporter folded or merged away: refused, and rightly; only the gradient is left."""

RENAMED = {"ortart_dynoptcore__lookup_index": {"table": "val_1"}}
"""Parameters that an exporter stored under another name."""

TRUE_SIZES = {
    ("lookup_concat", "table_a"): (40, 16),  # the sidecar gives the size of both tables together
    ("lookup_concat", "table_b"): (80, 16),  # and leaves this one out
    ("lookup_axis1", "table"): (120, 16),  # the sidecar gives the stored [16, 120]
}


@pytest.mark.parametrize("name", NAMES)
def test_scan_finds_exactly_the_tables(name: str) -> None:
    case = Case(name)
    report = scan(case.path).to_json()
    model = case.sidecar["model"]
    expected = {item["weight"]: item for item in case.sidecar["embeddings"]}
    for old, new in RENAMED.get(name, {}).items():
        expected[new] = expected.pop(old)
    refused = {item["parameter"] for item in report["refused"]}
    assert refused == GONE.get(name, set())
    assert all(item["reason"] and item["remedy"] for item in report["refused"])
    sites = {item["parameter"]: item for item in report["sites"]}
    others = {"lookup_concat": {key for key in sites if key.endswith("table_b")}}.get(model, set())
    assert set(sites) == (set(expected) - refused) | others
    for parameter, site in sites.items():
        true = TRUE_SIZES.get((model, parameter.removeprefix("m.")))
        want = expected.get(parameter, {})
        assert (site["vocab_size"], site["embedding_dim"]) == (true or (want["V"], want["D"]))
        if want:
            _check_uses(site, want)
    assert report["loss"] == case.sidecar["loss_name"]
    assert report["trainable"] is True


def _check_uses(site: dict, want: dict) -> None:
    assert len(site["uses"]) == want["num_uses"]
    assert bool(site["dense_uses"]) == (want["ref_name"] == "tok.weight" and "MatMul" in _others(want))
    for use in want["uses"]:
        outputs = {use["gather_out"], *(use.get("gather_out_matches") or [])}
        found = [item for item in site["uses"] if item["output"] in outputs]
        assert len(found) == 1
        if use.get("ids") is not None:
            assert found[0]["ids"] == use["ids"]
        gradients = {use["grad_gather_out"], *(use.get("grad_gather_out_matches") or [])}
        assert found[0]["output_gradient"] in gradients


def _others(want: dict) -> set[str]:
    """Return MatMul for a table whose transpose or itself is an operand of the output projection."""
    tied = {"Transpose", "MatMul"} & set(want["other_consumers_of_weight"])
    lookups = {item["gather_op"] for item in want["uses"]}
    views = [item.get("weight_to_gather_chain") for item in want["uses"]]
    return {"MatMul"} if tied and "MatMul" not in lookups and not any(views) else set()


@pytest.mark.parametrize("name", NAMES)
def test_reduction_is_recognised(name: str) -> None:
    case = Case(name)
    said = case.sidecar["reduction"]
    reduction = scan(case.path).reduction
    assert reduction == ("sum" if said == "sum" else "mean")


def test_report_is_plain_json() -> None:
    report = scan(Case("torchjoint_in__nplm_pad0").path).to_json()
    assert json.loads(json.dumps(report)) == report
    (site,) = report["sites"]
    assert site["padding_idx"] == 0
    assert site["uses"] == [
        {"op": "Gather", "ids": "ids", "output": "embedding", "output_gradient": "view_3"}
    ]
    assert report["batch_inputs"] == ["ids", "labels"]
