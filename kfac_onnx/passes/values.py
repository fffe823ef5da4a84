"""Puts the user's values of parameters and constants into a canonical graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from kfac_onnx.errors import UserError, did_you_mean
from kfac_onnx.graph.values import static_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["give_values"]


def give_values(model: ir.Model, values: Mapping[str, Any]) -> None:
    """Store each array as the default value of the input or initializer of its name.

    Raises UserError for an unknown name, or an array whose shape or dtype is not the input's.
    """
    known = {str(value.name): value for value in model.graph.inputs} | dict(model.graph.initializers)
    for name, array in values.items():
        value = known.get(name)
        if value is None:
            raise UserError(
                f"the graph has no parameter or input '{name}'{did_you_mean(name, known)}",
                help="`scan MODEL` lists the parameters and the inputs",
            )
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        shape = static_shape(value)
        if shape is not None and tuple(np.shape(array)) != shape:
            raise UserError(
                f"the value of '{name}' has the shape {list(np.shape(array))}, the graph wants {list(shape)}"
            )
        if value.dtype is not None and tensor.dtype != value.dtype:
            raise UserError(
                f"the value of '{name}' is {tensor.dtype.numpy().name}, "
                f"the graph wants {value.dtype.numpy().name}"
            )
        value.const_value = tensor
        if name not in model.graph.initializers:
            model.graph.register_initializer(value)
