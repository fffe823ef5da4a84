"""A step takes strings where the graph only encodes them, and gives what it gives for the encoder's ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

import kfac_onnx as kx
from kfac_onnx.errors import UserError
from kfac_onnx.readers import read_training_graph
from kfac_onnx.runtime.gradcheck.verify import verify_gradients

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

NUMBERS = ", ".join(str(number / 10) for number in range(20))
WORDS = np.array([["b", "a"], ["nobody", "c"], ["a", "a"]])
IDS = np.array([[3, 1], [0, 4], [1, 1]])
LABELS = np.array([0, 3, 1])
ENCODER = """i = ai.onnx.ml.LabelEncoder<keys_strings: strings = ["a", "b", "c"],
    values_int64s: ints = [1, 3, 4], default_int64: int = 0>(words)"""


def model_of(encoder: str, inputs: str) -> ir.Model:
    return kx.differentiate(
        onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18, "ai.onnx.ml" : 3]>
        g ({inputs}) => (float[N, 4] z) <float[5, 4] table = {{{NUMBERS}}}, int64[1] one = {{1}}> {{
            {encoder} h = Gather(table, i) z = ReduceSum<keepdims: int = 0>(h, one)
        }}""")
    )


def stepped(model: ir.Model, batch: dict[str, np.ndarray]) -> tuple[float, float, np.ndarray]:
    with kx.TrainingSession(kx.transform(model, preset="plain-sgd", lr=0.5)) as session:
        loss = session.step(batch)["loss"]
        return loss, session.evaluate([batch]), session.parameters["table"].copy()


@pytest.mark.parametrize("kind", [str, object, np.bytes_], ids=["str", "object", "bytes"])
@pytest.mark.parametrize("views", [False, True], ids=["direct", "views"])
def test_strings_train_as_their_ids(kind: type, views: bool) -> None:
    encoder = ENCODER
    if views:
        encoder = "u = Unsqueeze(words, one) w = Squeeze(u, one) " + ENCODER.replace("(words)", "(w)")
    strings = model_of(encoder, "string[N, 2] words")
    ids = model_of("i = Identity(ids)", "int64[N, 2] ids")
    one = stepped(strings, {"words": WORDS.astype(kind), "labels": LABELS})
    other = stepped(ids, {"ids": IDS, "labels": LABELS})
    assert one[:2] == other[:2]
    np.testing.assert_array_equal(one[2], other[2])
    assert np.abs(one[2] - np.arange(20).reshape(5, 4) / 10).max() > 1e-2


def test_from_a_file_and_in_verify(tmp_path: Path) -> None:
    made = model_of(ENCODER, "string[N, 2] words")
    kx.save(kx.transform(made), tmp_path / "step.onnx")
    with kx.TrainingSession(tmp_path / "step.onnx") as session:
        assert np.isfinite(session.step({"words": WORDS, "labels": LABELS})["loss"])
        session.save(tmp_path / "run.ckpt")
    with kx.TrainingSession.resume(tmp_path / "run.ckpt") as session:
        assert np.isfinite(session.step({"words": WORDS, "labels": LABELS})["loss"])
        with pytest.raises(UserError) as error:
            session.step({"words": np.array([["a", 1.5]] * 3, object), "labels": LABELS})
        assert error.value.message == "batch input 'words' must hold strings, got float"
    verdicts = verify_gradients(read_training_graph(made), {"words": WORDS, "labels": LABELS})
    assert [(item.parameter, item.status) for item in verdicts] == [("table", "ok")]


def test_strings_that_something_else_reads_are_refused() -> None:
    joined = "n = Concat<axis: int = 1>(words, words) " + ENCODER.replace("(words)", "(n)")
    made = kx.transform(model_of(joined, "string[N, 2] words"))
    with pytest.raises(UserError) as error:
        kx.TrainingSession(made)
    assert error.value.message == (
        "the input 'words' holds strings, which a step cannot take: ONNX Runtime binds none"
    )
    assert error.value.help == (
        "give numbers: let a LabelEncoder be all that reads the strings, or export the graph from behind what "
        "does"
    )
