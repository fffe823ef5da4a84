"""Roles in graphs of well-known architectures, which `tools/make_role_graphs.py` exported, and what follows."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from kfac_onnx import metadata, scan, transform, why
from kfac_onnx.metadata import Role, State
from kfac_onnx.reports.inspect import inspect

GRAPHS = Path(__file__).parents[1] / "data" / "roles"
KINDS = {
    "gpt2": {
        "table": ["*.wte.*", "*.wpe.*"],
        "hidden": ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"],
    },
    "gpt2_untied": {
        "table": ["*.wte.*", "*.wpe.*"],
        "hidden": ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"],
        "output": ["lm_head.weight"],
    },
    "bert": {
        "table": ["*_embeddings.weight"],
        "hidden": ["*.query.weight", "*.key.weight", "*.value.weight", "*.dense.weight"],
        "head": ["classifier.weight"],
    },
    "dlrm": {"table": ["tables.*"], "hidden": ["bottom.?.weight", "top.0.weight"]},
    "sasrec": {
        "table": ["items.weight", "positions.weight"],
        "hidden": ["attention.in_proj_weight", "attention.out_proj.weight", "conv?.weight"],
    },
    "resnet": {
        "table": ["camera.weight"],
        "hidden": ["stem.weight", "first.weight", "second.weight", "shortcut.weight"],
        "other": ["depthwise.weight"],
        "head": ["fc.weight"],
    },
}
"""Patterns of the parameters of each role, as their authors use them; all others are vectors."""
OPTIMIZERS = {"hidden": "Muon", "output": "OutputRows"}
"""What `rest=muon` gives a role; AdamW the others, and tables their block."""


def kind_of(graph: str, parameter: str) -> str:
    kinds = KINDS[graph].items()
    return next(
        (kind for kind, patterns in kinds if any(fnmatch.fnmatch(parameter, item) for item in patterns)),
        "vector",
    )


@pytest.mark.parametrize("name", list(KINDS))
def test_every_parameter_has_its_role_and_the_optimizer_of_it(name: str) -> None:
    model = transform(GRAPHS / f"{name}.onnx", rest="muon")
    roles = {role.parameter: role.kind for role in metadata.read_list(model, "roles", Role)}
    assert roles == {parameter: kind_of(name, parameter) for parameter in roles}
    assert set(KINDS[name]) <= set(roles.values())
    optimizers = {item.name: item.optimizer for item in inspect(model).others}
    assert optimizers == {
        parameter: OPTIMIZERS.get(kind, "Adam") for parameter, kind in roles.items() if kind != "table"
    }


def test_scan_and_why_say_the_same() -> None:
    path = GRAPHS / "gpt2_untied.onnx"
    report = scan(path)
    reasons = {role.parameter: (role.kind, role.reason) for role in report.roles}
    assert reasons["lm_head.weight"] == (
        "output",
        "MatMul 'mm' makes the logits of a softmax over 300 classes",
    )
    assert {
        item["name"]: (item["role"], item["reason"]) for item in report.to_json()["parameters"]
    } == reasons
    role = why(path, "lm_head.weight").role
    assert role is not None
    assert (role.kind, role.reason) == reasons["lm_head.weight"]


def test_a_rule_overrides_what_the_role_would_get() -> None:
    rules = ("lm_head.weight=muon{lr=0.125}", "*.c_fc.weight=adamw", "*.c_attn.weight=outrow")
    model = transform(GRAPHS / "gpt2_untied.onnx", rest="muon", rules=rules)
    optimizers = {item.name: item.optimizer for item in inspect(model).others}
    block = "transformer.h.0"
    assert optimizers["lm_head.weight"] == "Muon"
    assert optimizers[f"{block}.mlp.c_fc.weight"] == "Adam"
    assert optimizers[f"{block}.attn.c_attn.weight"] == "OutputRows"
    assert optimizers[f"{block}.mlp.c_proj.weight"] == "Muon"
    states = {state.input for state in metadata.read_list(model, "state", State)}
    assert "kfac/lm_head.weight/A" not in states
