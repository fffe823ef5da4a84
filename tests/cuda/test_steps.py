"""One step at a time on exporters' graphs: equal to the float64 reference, on a GPU too.

Tolerances are those of the CPU (`corpus_steps`), 8 times those on a GPU: for float32 3e-5 of a parameter's
largest entry plus 1e-4 of the step. Rows are added atomically, or in one order (`deterministic`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from corpus_steps import compare, rest_of
from corpus_table import names
from preset_names import ALL as ALL_PRESETS

if TYPE_CHECKING:
    from conftest import Place

ALL = names("trained")
SOME = [
    "torchjoint_in__nplm", "torchjoint_in__nplm_pad0", "torchjoint_in__gpt_tied", "ortart_legcore__nplm",
    "ortart_dyncore__bert_sum", "tf2onnx_in__nplm", "jax2onnx__nplm_onehot", "ortart_legcore__siamese",
]  # fmt: skip
"""One of each kind, for what every machine runs."""
PRESETS = ALL_PRESETS


def check(place: Place, name: str, preset: str, **lowered: Any) -> None:
    compare(
        name,
        preset,
        threads=1,
        steps=4,
        rest=rest_of(name),
        lowered={"target": "cuda", **lowered},
        opened=place.opened,
        looser=place.looser,
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [name for name in SOME if name in ALL])
def test_one_of_each_kind(place: Place, name: str, preset: str) -> None:
    check(place, name, preset)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [name for name in SOME[:5] if name in ALL])
def test_rows_in_one_order(place: Place, name: str, preset: str) -> None:
    check(place, name, preset, deterministic=True)


@pytest.mark.cuda
@pytest.mark.parametrize("preset", PRESETS)
def test_every_graph(place: Place, preset: str) -> None:
    """All of the corpus; one test for each preset, since most machines skip it."""
    if not place.is_gpu:
        pytest.skip("the CPU's own tests run every graph")
    for name in ALL:
        check(place, name, preset)


def test_one_percent_is_noticed(place: Place) -> None:
    with pytest.raises(AssertionError, match="step 1"):
        compare(
            "torchjoint_in__nplm", "half", threads=1, steps=1, scaled=1.01,
            lowered={"target": "cuda"}, opened=place.opened, looser=place.looser,
        )  # fmt: skip
