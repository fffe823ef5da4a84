"""Which of a module's outputs is the loss."""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kfac_onnx.errors import UserError

__all__ = ["loss_of"]

_WRAP = "wrap it in a module whose forward takes inputs and labels and returns the mean loss"


def loss_of(name: str, output: object) -> torch.Tensor:
    """Return the loss among the outputs of module class `name`, a differentiable scalar, as shape [].

    The output is the loss itself; a mapping, named tuple or object with an entry `loss` (what Hugging Face's
    models return); or a tuple or list whose first scalar with a gradient is the loss. A loss of one element
    is taken as a scalar, whatever its shape. Raises `UserError` where there is none.
    """
    loss = _entry(name, output)
    if not isinstance(loss, torch.Tensor):
        raise UserError(f"{name}.forward returns a {type(output).__name__}, not a scalar loss", help=_WRAP)
    if any(size != 1 for size in loss.shape):
        shape = list(loss.shape)
        raise UserError(f"{name}.forward returns a tensor of shape {shape}, not a scalar loss", help=_WRAP)
    if not loss.requires_grad:
        raise UserError(
            f"the loss that {name}.forward returns depends on no trained parameter",
            help="check requires_grad of the parameters, and that nothing detaches the loss",
        )
    return loss.reshape(())


def _entry(name: str, output: Any) -> object:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        loss = output["loss"]
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)):
        # A shape is asked for only where a loss could be: the others may have symbolic sizes.
        scalars = [
            value
            for value in output
            if isinstance(value, torch.Tensor) and value.requires_grad and not value.ndim
        ]
        single = [value for value in output if isinstance(value, torch.Tensor)]
        return scalars[0] if scalars else single[0] if len(single) == 1 else None
    elif isinstance(output, Mapping):
        raise UserError(
            f"{name}.forward returns a {type(output).__name__} without an entry 'loss'",
            help=f"name the loss 'loss'; its entries are {', '.join(repr(str(key)) for key in output)}",
        )
    else:
        return None
    if loss is None:
        raise UserError(
            f"the entry 'loss' of what {name}.forward returns is None",
            help="pass the labels too: models that compute their own loss do so when they get labels",
        )
    return loss
