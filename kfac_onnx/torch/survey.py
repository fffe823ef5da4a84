"""Which of a module's tensors are trained, which stay, which its forward changes: seen by a run on copies."""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kfac_onnx.errors import UserError
from kfac_onnx.torch.lending import lent, loose_tensors
from kfac_onnx.torch.losses import loss_of
from kfac_onnx.torch.refusals import RefusedKinds, useful_sentence, user_line

if TYPE_CHECKING:
    from kfac_onnx.torch.arguments import Call

__all__ = ["Tensors", "survey"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a module by name, each once; `carried` are buffers that forward changes."""

    trained: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    carried: dict[str, torch.Tensor]


def survey(module: torch.nn.Module, call: Call) -> Tensors:
    """Run a module once on copies of its tensors, and say what it does with each.

    A trained parameter has a gradient of the loss. A carried buffer is one that forward writes or replaces
    (running statistics, moving averages of a codebook): its new value is a result of the step. Raises
    `UserError` where the run fails, where there is no differentiable loss, and where forward changes a
    parameter or a tensor that is no buffer.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    loose = dict(loose_tensors(module))
    for name, value in {**parameters, **buffers}.items():
        if torch.nn.parameter.is_lazy(value):
            raise UserError(
                f"'{name}' has no shape yet", help="run the lazy module once on an example before the export"
            )
    copies = {id(value): value.detach().clone() for value in (*buffers.values(), *loose.values())}
    for value in parameters.values():
        copies[id(value)] = torch.nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    wanted = {name: copies[id(value)] for name, value in parameters.items() if value.requires_grad}
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), lent(module, copies):
        try:
            with RefusedKinds():
                # Copies, so that a forward that writes into its inputs does not change the caller's.
                arguments, keywords = call.filled([value.detach().clone() for value in call.tensors])
                output: object = module(*arguments, **keywords)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(module).__name__}.forward fails on the example inputs",
                place=user_line(error),
                tried=[f"{type(error).__name__}: {useful_sentence(error)}"],
            ) from error
        loss = loss_of(type(module).__name__, output)
        after = dict(module.named_buffers())
        try:
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        except RuntimeError as error:
            raise UserError(
                f"PyTorch cannot differentiate the loss of {type(module).__name__}",
                tried=[f"{type(error).__name__}: {useful_sentence(error)}"],
            ) from error
    for name, value in {**parameters, **loose}.items():
        if _changed(value, copies[id(value)]):
            kind = "the parameter" if name in parameters else "the tensor"
            raise UserError(
                f"forward changes {kind} '{name}', which a training graph cannot hold",
                help="switch off max_norm of embeddings"
                if name in parameters
                else "make it a buffer: buffers that forward changes are state of the training step",
            )
    carried = {
        name: value
        for name, value in buffers.items()
        if after.get(name) is not copies[id(value)] or _changed(value, copies[id(value)])
    }
    unused = [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None]
    for name in unused:
        logger.warning("parameter '%s' has no gradient of the loss and will not be trained", name)
    trained: dict[str, torch.Tensor] = {}
    constants: dict[str, torch.Tensor] = {}
    for name, value in parameters.items():
        (trained if name in wanted and name not in unused else constants)[name] = value
    for name, value in buffers.items():
        if name not in carried:
            constants[name] = value
    return Tensors(trained, constants, carried)


def _changed(before: torch.Tensor, after: torch.Tensor) -> bool:
    # A write through `.data` leaves the version as it was.
    written = after._version > 0 or before.shape != after.shape
    return written or not torch.equal(before.detach().nan_to_num(), after.detach().nan_to_num())
