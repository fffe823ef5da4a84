"""The block on onnxruntime, and in float64, against the original's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.fisher import damping, output_factor
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.reference import BlockReference
from kfac_onnx.reports import golden
from kfac_onnx.reports.golden import relative_error, verify_golden

DATA = Path(__file__).parent.parent / "data" / "golden"
FILES = sorted(DATA.glob("*.npz"))
Maker = Callable[..., Path]

POWERS = [-0.5, 0.5, -1, 1, 2, -2, 0, -0.25, 1.5]

RUNS: dict[str, dict[str, Any]] = {
    "override": {"session_override": {"a": 0.7, "stale": 0.01}, "exps": POWERS},
    "override-uses": {"session_override": {"b": 0.7}, "num_uses": 3, "backend": "r1.10", "vector": "dense"},
    "tensor": {"damping_as": "tensor", "damping": 0.02},
    "powers-uses": {"exps": POWERS, "num_uses": 2, "backend": "r1.8", "batch_sizes": [5, 3]},
    "separate": {
        "backend": "r1.8",
        "batch_sizes": [7, 2],
        "tower_strategy": "separate",
        "switches": {"towers": "separate"},
    },
    "separate-uses": {
        "backend": "head",
        "batch_sizes": [7, 2],
        "num_uses": 2,
        "num_sources": 2,
        "exps": POWERS,
    },
    "concat-head": {"backend": "head", "tower_strategy": "concat", "switches": {"towers": "concat"}},
    "pi-off-head": {"backend": "head", "pi_type": "off", "switches": {"pi": "off"}, "vector": "dense"},
    "debias-ones": {"zero_debias": True, "switches": {"debias": True}, "ids_per_example": 3},
    "zero-start": {"init_covariances_at_zero": True, "switches": {"start_at_zero": True}, "ema_decay": 0.6},
    "decay-small": {"ema_decay": 0.2, "backend": "r1.10", "ids_per_example": 2, "vector": "dense"},
    "decay-zero-debias": {"ema_decay": 0.0, "backend": "r1.10"},
    "frozen": {"ema_decay": 1.0},
    "wide": {"embed_dim": 24, "batch_sizes": [64], "vocab_size": 40, "exps": [-0.5, 0.5]},
    "one": {"batch_sizes": [1], "embed_dim": 1, "vocab_size": 1, "exps": POWERS},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_numbers_are_reproduced(path: Path) -> None:
    rows = verify_golden([path])
    assert rows
    assert [row for row in rows if not row.ok] == []
    with np.load(path) as file:
        assert len(rows) == sum(name.startswith("out.") for name in file.files)


@pytest.mark.parametrize("label", list(RUNS))
def test_runs_that_were_never_seen_agree(label: str, tmp_path: Path, make_golden: Maker) -> None:
    for seed in range(2):
        path = make_golden(tmp_path / f"{label}{seed}.npz", seed=seed, **RUNS[label])
        assert [row for row in verify_golden([path]) if not row.ok] == []


def test_every_exponent_tells_its_path(tmp_path: Path, make_golden: Maker) -> None:
    path = make_golden(tmp_path / "paths.npz", exps=POWERS)
    paths = {row.quantity: row.path for row in verify_golden([path])}
    assert {e: paths[f"b.matpower_{e}_values"] for e in POWERS} == {
        -0.5: "onnx/newton-schulz",
        0.5: "onnx/newton-schulz",
        -1: "onnx/inverse",
        1: "onnx",
        2: "onnx/matmul",
        -2: "onnx/inverse",
        0: "onnx/matmul",
        -0.25: "host-eigh",
        1.5: "host-eigh",
    }
    assert paths["init.matpower_2_values"] == "initial"


def test_the_host_takes_over_where_the_root_is_not_exact(
    tmp_path: Path, make_golden: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_factor, "ITERATIONS", 3)
    path = make_golden(tmp_path / "few.npz", exps=[-0.5])
    rows = verify_golden([path])
    assert all(row.ok for row in rows)
    assert {row.path for row in rows if row.quantity == "b.matpower_-0.5_values"} == {"host-eigh"}


@pytest.mark.parametrize("name", ["01_basic", "L1_r18_matpower_sparse", "L4_r110_multi_indep_2t2s"])
def test_numbers_scaled_by_one_percent_fail(name: str, tmp_path: Path) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    scaled = {
        key: x * np.float32(1.01) if key.startswith("out.") and x.dtype == np.float32 else x
        for key, x in arrays.items()
    }
    np.savez(tmp_path / "scaled.npz", **scaled)
    rows = verify_golden([tmp_path / "scaled.npz"])
    assert all(not row.ok for row in rows if not row.quantity.endswith(("_indices", "_shape")))
    assert all(row.error_onnx > 5e-3 and row.error_reference > 5e-3 for row in rows if not row.ok)


def wrong(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    right = Emitter.node

    def mistaken(self: Emitter, op_type: str, inputs: Any, **options: Any) -> Any:
        if mistake == "decay" and op_type == "OutputFactorUpdate":
            options["attributes"] = {"decay": 1 - options["attributes"]["decay"]}
        if mistake == "not-averaged" and op_type == "OutputFactorUpdate":
            inputs = [*inputs[:3], self.constant(np.float32(1.0)), inputs[4]]
        if mistake == "undamped" and op_type == "FactorInverse":
            inputs = [inputs[2], *inputs[1:]]
        return right(self, op_type, inputs, **options)

    if mistake == "pi":
        monkeypatch.setattr(damping, "_MODES", {"tracenorm": 0, "guarded": 0, "off": 1})
    monkeypatch.setattr(Emitter, "node", mistaken)


@pytest.mark.parametrize("mistake", ["decay", "not-averaged", "undamped", "pi"])
def test_a_wrong_formula_in_the_graph_fails(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, mistake)
    rows = verify_golden([DATA / "01_basic.npz"])
    assert any(row.error_onnx > golden.TOLERANCE for row in rows)
    assert all(row.error_reference <= golden.TOLERANCE for row in rows)


def test_a_wrong_formula_in_the_reference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BlockReference.dampings
    monkeypatch.setattr(BlockReference, "dampings", lambda self, damping: right(self, 2 * damping))
    rows = verify_golden([DATA / "01_basic.npz"])
    assert any(row.error_reference > golden.TOLERANCE for row in rows)
    assert all(row.error_onnx <= golden.TOLERANCE for row in rows)


def test_relative_error() -> None:
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 4.0])) == 0.5
    assert relative_error(np.array([np.inf, np.nan]), np.array([np.inf, np.nan])) == 0.0
    assert relative_error(np.array([np.inf, 1.0]), np.array([-np.inf, 1.0])) == np.inf
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.zeros(2), np.zeros(3)) == np.inf
    assert relative_error(np.array([1e-9]), np.zeros(1)) == np.inf


def changed(tmp_path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    with np.load(DATA / "01_basic.npz") as file:
        arrays: dict[str, Any] = {key: file[key] for key in file.files}
    settings = json.loads(str(arrays["settings"]))
    edit(settings, arrays)
    if "settings" in arrays:
        arrays["settings"] = np.array(json.dumps(settings))
    path = tmp_path / "g.npz"
    np.savez(path, **arrays)
    return path


BROKEN: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (lambda s, a: a.pop("settings"), "'{}' is not a golden file: it has no settings"),
    (lambda s, a: s.pop("damping"), "the settings of '{}' have no 'damping'"),
    (lambda s, a: s.update(damping=-1), "the settings of '{}' have a negative damping"),
    (lambda s, a: s.update(ema_decay=2), "the settings of '{}' have a decay outside [0, 1]: 2"),
    (lambda s, a: s.update(num_towers=0), "the settings of '{}' have a size below 1"),
    (
        lambda s, a: s.update(backend="r1.9"),
        "unknown version 'r1.9' of the original; did you mean 'r1.8'?\n"
        "  help: use one of r1.7, r1.8, r1.10, head",
    ),
    (lambda s, a: s.update(schedule=["go"]), "the schedule of '{}' has an unknown step 'go'"),
    (lambda s, a: s.update(schedule=["eval:x"]), "'{}' evaluates 'x' but holds no results for it"),
    (lambda s, a: s.update(schedule=["cov:7"]), "the golden file '{}' has no array 'in.ids_b7_t0'"),
    (
        lambda s, a: s.update(pi_type="x"),
        "'{}' asks for an unknown pi_type 'x'\n  help: off or tracenorm",
    ),
    (
        lambda s, a: s.update(tower_strategy="x"),
        "'{}' asks for an unknown tower_strategy 'x'\n  help: concat or separate",
    ),
    (lambda s, a: s.update(vector="x"), "'{}' has an unknown kind of vector 'x'\n  help: dense or sparse"),
    (lambda s, a: a.pop("in.vec_values"), "the golden file '{}' has no array 'in.vec_values'"),
    (
        lambda s, a: a.update({"in.vec_indices": a["in.vec_indices"] + 5}),
        "the vector of '{}' has an index outside the table of 7 rows",
    ),
    (
        lambda s, a: a.update({"in.vec_indices": a["in.vec_indices"][1:]}),
        "the indices and values of the vector of '{}' do not fit together",
    ),
    (
        lambda s, a: a.update({"in.ids_b0_t0": a["in.ids_b0_t0"] * 1.0}),
        "the ids of batch 0 in '{}' are not integers of rank 1 or 2",
    ),
    (
        lambda s, a: a.update({"in.grads_b0_s0_t0": a["in.grads_b0_s0_t0"][:, 1:]}),
        "the gradients of batch 0 in '{}' are not float [rows, 3]",
    ),
    (lambda s, a: a.update({"out.init.x": np.ones(1)}), "'{}' has a result 'x' that is not known"),
    (
        lambda s, a: a.update({"out.init.matpower_x": np.ones(1)}),
        "'{}' has a result 'matpower_x' without an exponent",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_broken_file_is_told_in_a_sentence(edit: Any, message: str, tmp_path: Path) -> None:
    path = changed(tmp_path, edit)
    with pytest.raises(UserError) as caught:
        verify_golden([path])
    assert str(caught.value) == message.replace("{}", str(path))


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        verify_golden([tmp_path / "none.npz"])
    assert str(caught.value) == f"there is no file '{tmp_path / 'none.npz'}'"
    text = tmp_path / "text.npz"
    text.write_text("hello")
    cut = tmp_path / "cut.npz"
    cut.write_bytes((DATA / "01_basic.npz").read_bytes()[:3000])
    empty = tmp_path / "empty.npz"
    empty.write_bytes(b"")
    one = tmp_path / "one.npy"
    np.save(one, np.ones(3))
    objects = tmp_path / "objects.npz"
    np.savez(objects, settings=np.array([{}], dtype=object))
    for path in (text, cut, empty, objects):
        with pytest.raises(UserError) as caught:
            verify_golden([path])
        assert str(caught.value).startswith(f"'{path}' is not a readable .npz file: ")
    with pytest.raises(UserError) as caught:
        verify_golden([one])
    assert str(caught.value).startswith(f"'{one}' is a single array, and arrays are read from .npz files")
