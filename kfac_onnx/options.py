"""Options as a frozen dataclass, and functions that take its fields as keyword arguments.

The dataclass is where names, types, defaults and checks stand; a function's signature comes from it:

    @method_with(FitOptions)
    def fit(self, batches, options): ...

    session.fit(batches, steps=3)        # fit(session, batches, FitOptions(steps=3))
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from kfac_onnx.errors import did_you_mean
from kfac_onnx.errors.signatures import require_types

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["function_with", "method_with"]

A = TypeVar("A")
B = TypeVar("B")
Options = TypeVar("Options")
P = ParamSpec("P")
R = TypeVar("R")


def function_with(
    cls: Callable[P, Options],
) -> Callable[[Callable[[A, Options], R]], Callable[Concatenate[A, P], R]]:
    """Give a function of one argument and options the fields of the options as keywords."""
    return functools.partial(_with, cls)


def method_with(
    cls: Callable[P, Options],
) -> Callable[[Callable[[A, B, Options], R]], Callable[Concatenate[A, B, P], R]]:
    """Give a method of one argument and options the fields of the options as keywords."""
    return functools.partial(_with, cls)


def _with(cls: Callable[..., Any], function: Callable[..., R]) -> Callable[..., R]:
    own = list(inspect.signature(function).parameters.values())[:-1]
    fields = list(inspect.signature(cls).parameters.values())
    names = {field.name for field in fields}
    allowed = names | {parameter.name for parameter in own}

    own_signature = inspect.Signature(own)
    annotations = {parameter.name: parameter.annotation for parameter in (*own, *fields)}

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> R:
        for name in keywords:
            if name not in allowed:
                near = did_you_mean(name, sorted(allowed))
                raise TypeError(f"{function.__name__}() has no argument '{name}'{near}")
        bound = own_signature.bind_partial(
            *arguments, **{k: v for k, v in keywords.items() if k not in names}
        )
        require_types(function.__qualname__, annotations, {**bound.arguments, **keywords})
        options = cls(**{name: value for name, value in keywords.items() if name in names})
        others = {name: value for name, value in keywords.items() if name not in names}
        return function(*arguments, **others, options=options)

    called.__dict__["__signature__"] = inspect.Signature([*own, *fields])
    called.__doc__ = f"{inspect.getdoc(function)}\n\n{inspect.getdoc(cls)}"
    return called
