"""A pass: one frozen dataclass whose fields are its options and whose `run` edits a model in place."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from kfac_onnx.graph.changes import NO_CHANGES, Changes
from kfac_onnx.pipeline.options import check_value, format_value, options_of, plain_value

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["NO_CHANGES", "Changes", "Pass"]

_KEBAB: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step of a pipeline. A subclass is a frozen keyword-only dataclass with a `name`.

    Fields are options (`kfac_onnx.pipeline.options.opt`). `run` keeps nothing on `self`: running a
    pass twice, or on two models, does not matter. The verifier runs before and after it.
    """

    name: ClassVar[str]
    """kebab-case; how pipelines call the pass."""
    keeps_meaning: ClassVar[bool] = False
    """Whether the model computes the same outputs from the same inputs afterwards, up to rounding."""
    tells_shapes: ClassVar[bool] = False
    """Whether the shapes of all values are inferred when the pass has run."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = plain_value(getattr(self, option.field))  # NumPy's text is no text of a pipeline
            check_value(option, value, owner=self.name)
            object.__setattr__(self, option.field, value)

    @abstractmethod
    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place and return the number of changes, all of them."""

    def __str__(self) -> str:
        """Return the text form, with the options that are not at their default."""
        given = [
            f"{option.name}={format_value(value)}"
            for option in options_of(type(self))
            if (value := getattr(self, option.field)) != option.default
        ]
        return f"{self.name}{{{','.join(given)}}}" if given else self.name

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the pass's docstring."""
        return (cls.__doc__ or "").strip().split("\n", 1)[0]

    @classmethod
    def check_declaration(cls) -> None:
        """Raise TypeError when the class is not a well-made pass: a mistake of its author."""
        if not _KEBAB.fullmatch(getattr(cls, "name", "")):
            raise TypeError(f"{cls.__name__} needs a ClassVar `name` in kebab-case")
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} must be decorated with @dataclass(frozen=True, kw_only=True)")
        if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):
            raise TypeError(f"{cls.__name__} needs a docstring; its first line is the pass's help")
        options_of(cls)
