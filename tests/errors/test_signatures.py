"""Arguments held against the types of a signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence  # noqa: TC003  annotations of the function under test
from pathlib import Path

import numpy as np
import pytest

from kfac_onnx.errors import UserError
from kfac_onnx.errors.signatures import checked


@checked
def train(
    source: str | Path,
    *,
    steps: int | None = None,
    rate: float = 1.0,
    quiet: bool = False,
    values: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] = (),
    batches: Iterable[Mapping[str, np.ndarray]] = (),
    providers: Sequence[str | tuple[str, Mapping[str, object]]] = (),
    tables: tuple[str, ...] = (),
) -> tuple[object, ...]:
    return source, steps, rate, quiet, values, names, batches, providers, tables


def test_what_fits_goes_through() -> None:
    assert train("m.onnx", steps=np.int64(3), rate=2, quiet=np.bool_(True))[1:3] == (3, 2)  # type: ignore[arg-type]
    train(Path("m.onnx"), values={"w": np.zeros(3)}, names=["a"], batches=iter([{}]))
    train("m.onnx", providers=["cpu", ("cuda", {"device_id": 0})], tables=("a", "b", "c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": 3}, "source of train must be a text or a path, got 3"),
        ({"steps": True}, "steps of train must be a whole number or None, got True"),
        ({"rate": "1"}, "rate of train must be a number, got '1'"),
        ({"quiet": 1}, "quiet of train must be True or False, got 1"),
        ({"names": "abc"}, "names of train must be a list (Sequence[str]), got 'abc'"),
        ({"names": ["a", 5]}, "names of train must be a list (Sequence[str]), got ['a', 5]"),
        (
            {"batches": {"ids": 1}},
            "batches of train must be several of them (Iterable[Mapping[str, np.ndarray]]), got {'ids': 1}",
        ),
        (
            {"values": {1: 2}},
            "values of train must be a mapping (Mapping[str, np.ndarray]) or None, got {1: 2}",
        ),
        (
            {"providers": [("cuda", {}, 3)]},
            "providers of train must be a list (Sequence[str | tuple[str, Mapping[str, object]]]), "
            "got [('cuda', {}, 3)]",
        ),
        (
            {"providers": [("cuda", "device_id")]},
            "providers of train must be a list (Sequence[str | tuple[str, Mapping[str, object]]]), "
            "got [('cuda', 'device_id')]",
        ),
        ({"tables": ("a", 5)}, "tables of train must be a tuple or a list (tuple[str, ...]), got ('a', 5)"),
        ({"source": "a\0b"}, "source of train cannot be the name of a file: there is a zero byte in it"),
        ({"source": "\ud800"}, "source of train cannot be the name of a file: it holds half a character"),
        ({"source": "x" * 300}, "source of train is too long for the name of a file"),
    ],
)
def test_what_does_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        train(**{"source": "m.onnx", **arguments})  # type: ignore[arg-type]
    assert caught.value.message == message


def test_python_refuses_what_it_always_did() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'source'"):
        train()  # type: ignore[call-arg]
