"""`kfac-onnx check`: the text, the JSON and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

DATA = Path(__file__).parents[1] / "data" / "graphs"


def test_an_error_exits_2(run: Callable[..., Outcome]) -> None:
    outcome = run("check", DATA / "torchjoint_initopt__identical_init.onnx")
    assert outcome.code == 2
    assert outcome.err == ""
    assert outcome.out.startswith(
        "error: the gradient of 'm.emb_b.weight' is computed, but the parameter is not in the graph"
        " [parameter-gone]\n"
        "  where: m.emb_b.weight_grad\n"
        "  why:   the exporter folded it into a constant or merged it with one that started equal: nothing is"
        " left to train\n"
        "  help:  export with the parameters as inputs, or without optimization and constant folding"
        " (torch.onnx.export(..., optimize=False), do_constant_folding=False)\n"
    )
    assert outcome.out.endswith("\n2 errors, 4 warnings, 0 notes\n")


def test_warnings_exit_0_and_say_the_same_as_json(run: Callable[..., Outcome]) -> None:
    outcome = run("check", DATA / "torchjoint_in__nplm.onnx", "--json")
    assert outcome.code == 0
    assert {key: outcome.data[key] for key in ("errors", "warnings", "notes")} == {
        "errors": 0,
        "warnings": 1,
        "notes": 0,
    }
    (item,) = outcome.data["findings"]
    assert set(item) == {"id", "severity", "what", "where", "why", "remedy"}
    assert (item["id"], item["severity"]) == ("racing-scatter", "warning")
    assert "static-batch" in outcome.data["checks"]


def test_a_file_that_is_no_model_exits_1(run: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    outcome = run("check", tmp_path / "no.onnx")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")


def test_first_values_come_from_a_file(run: Callable[..., Outcome], tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "weights.npz", **{"m.emb.weight": np.full((100, 16), np.nan, np.float32)})
    outcome = run("check", DATA / "torchjoint_in__nplm.onnx", "--parameters", tmp_path / "weights.npz")
    assert outcome.code == 2
    assert "error: 1600 of 1600 first values of 'm.emb.weight' are not finite" in outcome.out
