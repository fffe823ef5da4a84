"""Tables of graphs without gradients, also where rows are looked up in a view of the table."""

from __future__ import annotations

import onnx
import pytest

from kfac_onnx.api import scan


def tables(body: str, held: str) -> dict[str, tuple[int, int, str]]:
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (int64[B, 3] ids) => (float[B, N, D] y) <{held}> {{ {body} }}""")
    report = scan(model)
    assert report.trainable is False
    return {site.parameter: (site.vocab_size, site.embedding_dim, site.layout) for site in report.sites}


def zeros(name: str, *dims: int) -> str:
    size = 1
    for dim in dims:
        size *= dim
    return f"float[{', '.join(map(str, dims))}] {name} = {{{', '.join(['0'] * size)}}}"


START = "int64[1] start = {1}, int64[1] stop = {6}, int64[1] axis = {0}"
SHAPE = "int64[2] shape = {7, 2}"


@pytest.mark.parametrize(
    ("body", "held", "expected"),
    [
        ("h = Gather (W, ids) y = Tanh (h)", zeros("W", 7, 2), (7, 2, "rows")),
        ("v = Slice (W, start, stop, axis) h = Gather (v, ids) y = Tanh (h)",
         f"{zeros('W', 7, 2)}, {START}", (7, 2, "rows")),
        ("v = Slice (W, start, stop, axis) h = Gather (v, ids) y = Tanh (h)",
         f"{zeros('W', 7, 7)}, {START}", (7, 7, "rows")),
        ("v = Transpose (W) h = Gather (v, ids) y = Tanh (h)", zeros("W", 2, 7), (7, 2, "columns")),
        ("v = Transpose (W) h = Gather (v, ids) y = Tanh (h)", zeros("W", 7, 7), (7, 7, "columns")),
        ("v = Reshape (W, shape) h = Gather (v, ids) y = Tanh (h)",
         f"{zeros('W', 14)}, {SHAPE}", (7, 2, "flat")),
        ("v = Reshape (W, shape) h = Gather (v, ids) y = Tanh (h)",
         f"{zeros('W', 7, 2, 1)}, {SHAPE}", (7, 2, "flat")),
        ("v = Mul (W, gain) h = Gather (v, ids) y = Tanh (h)",
         f"{zeros('W', 7, 2)}, {zeros('gain', 2)}", (7, 2, "rows")),
    ],
)  # fmt: skip
def test_the_table_has_its_own_size(body: str, held: str, expected: tuple[int, int, str]) -> None:
    assert tables(body, held) == {"W": expected}


def test_parts_of_a_joined_table() -> None:
    held = f"{zeros('W', 3, 2)}, {zeros('U', 4, 2)}"
    found = tables("v = Concat <axis = 0> (W, U) h = Gather (v, ids) y = Tanh (h)", held)
    assert found == {"W": (3, 2, "rows"), "U": (4, 2, "rows")}


def test_columns_by_the_axis_of_the_lookup() -> None:
    held = zeros("W", 2, 7)
    found = tables("h = Gather <axis = 1> (W, ids) y = Transpose <perm = [1, 2, 0]> (h)", held)
    assert found == {"W": (7, 2, "columns")}
