"""Functions that take the fields of a dataclass: what they are called with, what they say of themselves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields

import pytest

from kfac_onnx.options import function_with, method_with
from kfac_onnx.runtime import TrainingSession
from kfac_onnx.runtime.fitting import FitOptions


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large it is.

    Args:
        width: of a row.

    """

    width: int = 3
    height: int | None = None


@function_with(Size)
def area(name: str, options: Size) -> str:
    """Name an area."""
    return f"{name}: {options.width} x {options.height}"


class Shop:
    @method_with(Size)
    def buy(self, name: str, options: Size) -> tuple[str, int]:
        """Buy one."""
        return name, options.width


def test_keywords_become_options() -> None:
    assert area("a", height=2) == "a: 3 x 2"
    assert area(name="a", width=4) == "a: 4 x None"  # pyright: ignore[reportCallIssue]
    assert Shop().buy("b", width=5) == ("b", 5)


def test_an_unknown_keyword_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"^area\(\) has no argument 'widht'; did you mean 'width'\?$"):
        area("a", widht=1)  # pyright: ignore[reportCallIssue]


def test_the_signature_and_the_text_are_those_of_the_options() -> None:
    assert str(inspect.signature(area)) == "(name: 'str', *, width: 'int' = 3, height: 'int | None' = None)"
    assert (area.__doc__ or "").startswith("Name an area.\n\nHow large it is.\n\nArgs:\n    width: of a row.")


def test_fit_takes_what_its_options_are() -> None:
    parameters = list(inspect.signature(TrainingSession.fit).parameters.values())
    assert [parameter.name for parameter in parameters[2:]] == [field.name for field in fields(FitOptions)]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[2:])
