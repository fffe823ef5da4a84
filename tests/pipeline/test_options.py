from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_onnx.errors import UserError
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import Text, format_value, opt, options_of, read_value
from kfac_onnx.pipeline.text import read_calls

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log


@dataclass(frozen=True, kw_only=True)
class Knobs(Pass):
    """Do nothing, with every kind of option."""

    name: ClassVar[str] = "knobs"
    decay: float = opt(0.99, "weight kept from the old counts", lo=0.0, hi=1.0)
    every: int = opt(1, "update once in this many steps", lo=1)
    debias: bool = opt(True, "divide by the weight given so far")
    target: Literal["cpu", "cuda"] = opt("cpu", "where the model will run")
    label: str = opt("x", "any name")
    limit: int | None = opt(None, "at most this many")
    only: tuple[str, ...] = opt((), "these parameters")

    def run(self, model: ir.Model, log: Log) -> Changes:
        return NO_CHANGES


OPTIONS = {option.name: option for option in options_of(Knobs)}


def read(name: str, text: str) -> object:
    ((_, value),) = read_calls(f"knobs{{{name}={text}}}")[0].options
    return read_value(OPTIONS[name], value, owner="knobs")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("decay", "0.5", 0.5),
        ("decay", "1e-3", 1e-3),
        ("decay", "1", 1.0),
        ("every", "1_000", 1000),
        ("debias", "false", False),
        ("target", "cuda", "cuda"),
        ("label", '"two words"', "two words"),
        ("label", '"none"', "none"),
        ("label", "none", "none"),
        ("limit", "none", None),
        ("limit", "3", 3),
        ("only", "[]", ()),
        ("only", '[emb.weight,"a,b"]', ("emb.weight", "a,b")),
    ],
)
def test_text_becomes_a_typed_value(name: str, text: str, value: object) -> None:
    found = read(name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("decay", "fast", "cannot be 'fast': it is a number from 0 to 1"),
        ("decay", "1.5", "cannot be 1.5: it is a number from 0 to 1"),
        ("decay", "nan", "cannot be nan: it is a number from 0 to 1"),
        ("decay", '"0.5"', "cannot be '0.5': it is a number from 0 to 1"),
        ("decay", "[1]", "cannot be [1]: it is a number from 0 to 1"),
        ("every", "0", "cannot be 0: it is a whole number, at least 1"),
        ("every", "2.0", "cannot be '2.0': it is a whole number, at least 1"),
        ("debias", "yes", "cannot be 'yes': it is true or false"),
        ("target", "cdua", "cannot be 'cdua': it is one of cpu, cuda; did you mean 'cuda'?"),
        ("limit", "many", "cannot be 'many': it is a whole number, or none"),
        ("only", "a", "cannot be 'a': it is a list of names in brackets"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(name, text)
    assert caught.value.message.removeprefix(f"option '{name}' of pass 'knobs' ") == message


def test_values_given_in_python_are_checked_too() -> None:
    with pytest.raises(UserError) as caught:
        Knobs(every=True)
    assert caught.value.message == (
        "option 'every' of pass 'knobs' cannot be True: it is a whole number, at least 1"
    )
    with pytest.raises(UserError) as caught:
        Knobs(decay=float("inf"))
    assert caught.value.message == "option 'decay' of pass 'knobs' cannot be inf: it is a number from 0 to 1"


def test_only_options_off_their_default_are_printed() -> None:
    assert str(Knobs()) == "knobs"
    assert str(Knobs(decay=0.5, only=("a b", "c"))) == 'knobs{decay=0.5,only=["a b",c]}'


@given(
    st.one_of(
        st.text(), st.floats(0, 1), st.integers(1, 2**63 - 1), st.booleans(), st.lists(st.text()).map(tuple)
    )
)
def test_every_value_survives_its_text(value: str | float | bool | tuple[str, ...]) -> None:
    kinds = {str: "label", float: "decay", int: "every", bool: "debias", tuple: "only"}
    found = read(kinds[type(value)], format_value(value))
    assert found == value
    assert type(found) is type(value)


def test_none_as_a_word_needs_quotes_only_where_none_is_a_value() -> None:
    assert format_value("none") == '"none"'
    assert read_value(OPTIONS["limit"], Text("none"), owner="knobs") is None


def test_a_field_without_text_form_is_the_authors_mistake() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bad(Pass):
        """A pass with an option that no text can give."""

        name: ClassVar[str] = "bad"
        table: dict[str, int] | None = opt(None, "no text form")  # noqa: RUF009  the mistake under test

        def run(self, model: ir.Model, log: Log) -> Changes:
            return NO_CHANGES

    with pytest.raises(TypeError, match=r"Bad\.table: an option cannot have the type"):
        Bad()

    @dataclass(frozen=True, kw_only=True)
    class Plain(Pass):
        """A pass with a field that is not an option."""

        name: ClassVar[str] = "plain"
        number: int = 3

        def run(self, model: ir.Model, log: Log) -> Changes:
            return NO_CHANGES

    with pytest.raises(TypeError, match=r"Plain\.number must be declared with opt\(default, help\)"):
        Plain()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 1e30}, "cannot be 1e+30: it is a number from 1e-30 to 1000000, or none"),
        (
            {"refresh_every": 10**20},
            f"cannot be {10**20}: the largest whole number of a model is {2**63 - 1}",
        ),
        ({"g_rows": 2**63}, f"cannot be {2**63}: the largest whole number of a model is {2**63 - 1}"),
        ({"g_every": 2**63}, f"cannot be {2**63}: the largest whole number of a model is {2**63 - 1}"),
        ({"lr": 1e39}, "cannot be 1e+39: the largest number of a model is 3.4028235e+38"),
        ({"lr": 10**400}, "cannot be a value of type int: the largest number of a model is 3.4028235e+38"),
    ],
)
def test_numbers_that_no_model_can_hold(settings: dict[str, float], message: str) -> None:
    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac

    (name,) = settings
    with pytest.raises(UserError) as error:
        InsertEmbeddingKfac(**settings)  # type: ignore[arg-type]
    assert str(error.value) == f"option '{name.replace('_', '-')}' of pass 'insert-embedding-kfac' {message}"


def test_numbers_of_numpy_have_the_text_of_pythons() -> None:
    import numpy as np

    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac

    step = InsertEmbeddingKfac(lr=np.float64(0.25), refresh_every=np.int32(7))  # type: ignore[arg-type]
    assert str(step) == "insert-embedding-kfac{lr=0.25,refresh-every=7}"
