"""Golden files of all rooms: what a pass makes of a readable model, and that the numbers stay.

`tests/support/golden_models.py` says what such a file may hold. To write one, copy a file of
`tests/canonical/golden/` and change it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from golden_models import Part, golden_files, parts_of, run_model

from kfac_onnx.cli.main import main
from kfac_onnx.disk.models import load_model, load_proto
from kfac_onnx.pipeline.registry import BUILT_IN

if TYPE_CHECKING:
    from pathlib import Path

PARTS = [part for path in golden_files() for part in parts_of(path)]
TOLERANCE = 1e-5  # sums of a few float32 terms in another order


def output_of(part: Part, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a part's command and return what it prints, or the text that it writes."""
    source, target = part.write(folder), folder / "written.onnxtxt"
    target.unlink(missing_ok=True)
    words = [{"%s": str(source), "%t": str(target)}.get(word, word) for word in part.words]
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return target.read_text(encoding="utf-8") if target.exists() else out


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_golden(part: Part, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of(part, tmp_path, capsys)
    assert part.check(output, tmp_path) == 0, f"{capsys.readouterr()}\n{output}"


@pytest.mark.parametrize(
    "part",
    [part for part in PARTS if part.numbers and all(item.keeps_meaning for item in part.pipeline)],
    ids=str,
)
def test_the_numbers_stay(part: Part, tmp_path: Path) -> None:
    source = part.write(tmp_path)
    before, model = load_proto(source), load_model(source)
    part.pipeline.run(model, verify=False, key=None)
    from onnx_ir import to_proto

    after = to_proto(model)
    feeds = part.feeds(before)
    expected, found = run_model(before, feeds), run_model(after, feeds)
    assert any(np.any(array) for array in expected.values()), "all outputs are zero: nothing is compared"
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


def test_every_pass_has_a_golden_file() -> None:
    shown = {item.name for part in PARTS for item in part.pipeline if part.file.stem.startswith(item.name)}
    assert sorted(set(BUILT_IN) - shown) == []
    assert len(PARTS) >= 40


def test_a_golden_file_that_does_not_hold_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = next(part for part in PARTS if part.file.stem == "dce")
    output = output_of(part, tmp_path, capsys)
    assert part.check(output.replace("%y = Mul(%x, %w)", "%y = Div(%x, %w)"), tmp_path) != 0


def test_numbers_that_change_are_found(tmp_path: Path) -> None:
    part = next(part for part in PARTS if part.file.stem == "raise-segment-sums")
    before = load_proto(part.write(tmp_path))
    wrong = onnx.ModelProto()
    wrong.CopyFrom(before)
    wrong.graph.node[-1].output[0] = "sum"
    wrong.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "scale"))
    wrong.graph.node.append(onnx.helper.make_node("Mul", ["sum", "scale"], ["y"]))
    feeds = part.feeds(before)
    expected, found = run_model(before, feeds)["y"], run_model(wrong, feeds)["y"]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
