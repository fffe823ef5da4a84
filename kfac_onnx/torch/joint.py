"""The PyTorch half of `frontends.torch`: trace forward and backward into one ONNX program.

Imports PyTorch; only `export_training_graph` may import this module, and only when it is called. The joint
export is an experimental interface of PyTorch (`torch.export.experimental`), tried with 2.13.

Two exports: the first gives the forward, to which PyTorch appends the backward; the second takes that
joint graph as a function of data, parameters and constants, because PyTorch's ONNX exporter drops the
loss and gradient outputs of a joint program.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportReturnType=false

from __future__ import annotations

import inspect
import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.export.experimental
from torch.export.graph_signature import InputKind, OutputKind

from kfac_onnx.errors import UserError, first_line
from kfac_onnx.torch.backward import rewrite_backward
from kfac_onnx.torch.embeddings import ExportableEmbeddings

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = ["Joint", "export_joint"]

logger = logging.getLogger(__name__)

_CONSTANT = "kfac_constant_"
"""Prefix of the graph's names of buffers and frozen parameters, when the module's own names are lost."""


@dataclass(frozen=True)
class Joint:
    """A joint graph as the exporter gives it: parameters and constants are inputs; their values apart."""

    model: ir.Model
    parameters: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]


def export_joint(
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    *,
    dynamic_batch: bool,
    input_names: list[str] | None,
    loss_name: str,
    opset: int,
) -> Joint:
    """Return the joint graph of `module`, with outputs loss and `<parameter>_grad`; raises `UserError`."""
    _check_inputs(inputs, dynamic_batch=dynamic_batch)
    names = _input_names(module, len(inputs), input_names)
    trained, frozen = _split_parameters(module, inputs)
    taken = {*trained, *frozen}
    for name in (*names, loss_name):
        if name in taken:
            raise UserError(
                f"'{name}' would name two things in the graph",
                help="pass input_names and loss_name that differ from each other and from all parameters",
            )
        taken.add(name)
    free: list[Any] = [{0: torch.export.Dim.DYNAMIC} if dynamic_batch else None for _ in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside PyTorch, which no caller can mend
        try:
            return _trace(_Functional(module, trained, frozen), inputs, free, names, loss_name, opset)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"PyTorch cannot export forward and backward of {type(module).__name__} as one ONNX graph",
                tried=[f"{type(error).__name__}: {first_line(error)}"],
                help="rewrite the operator that is named above; dynamic_batch=False asks for less",
            ) from error


class _Functional(torch.nn.Module):
    """Owns each tensor of a module once and calls the module with them, which keeps tied tensors tied."""

    def __init__(
        self, module: torch.nn.Module, trained: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.trained_names = list(trained)
        self.frozen_names = list(frozen)
        self.trained = torch.nn.ParameterList(trained.values())
        for position, value in enumerate(frozen.values()):
            self.register_buffer(f"frozen_{position}", value.detach())
        # Not registered as a submodule: its tensors would count a second time.
        object.__setattr__(self, "inner", module)
        self.train(module.training)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        values = dict(zip(self.trained_names, self.trained, strict=True))
        for position, name in enumerate(self.frozen_names):
            values[name] = getattr(self, f"frozen_{position}")
        return torch.func.functional_call(self.inner, values, inputs)

    def name_of(self, target: str) -> str | None:
        """Return the module's name of a tensor that a program calls `trained.<k>` or `frozen_<k>`."""
        kind, _, position = target.replace(".", "_").rpartition("_")
        names = {"trained": self.trained_names, "frozen": self.frozen_names}.get(kind)
        return None if names is None else names[int(position)]


class _DataFirst(torch.nn.Module):
    """Calls a joint graph, which takes what the module holds before the data, with the data first."""

    def __init__(self, graph: torch.fx.GraphModule, held: int) -> None:
        super().__init__()
        self.graph = graph
        self.held = held

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        data = len(arguments) - self.held
        return self.graph(*arguments[data:], *arguments[:data])


def _trace(
    functional: _Functional,
    inputs: tuple[torch.Tensor, ...],
    free: list[Any],
    names: list[str],
    loss_name: str,
    opset: int,
) -> Joint:
    with ExportableEmbeddings():
        forward = torch.export.export(functional, inputs, dynamic_shapes=(tuple(free),))
    joint = torch.export.experimental._export_forward_backward(forward)
    rewrite_backward(joint.graph_module)
    held: dict[str, torch.Tensor] = {}
    for spec in joint.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            values = joint.state_dict if spec.target in joint.state_dict else joint.constants
            held[functional.name_of(spec.target) or f"{_CONSTANT}{len(held)}"] = values[spec.target].detach()
    outputs = [
        loss_name if spec.kind == OutputKind.LOSS_OUTPUT else f"{functional.name_of(spec.target)}_grad"
        for spec in joint.graph_signature.output_specs
    ]
    again = torch.export.export(
        _DataFirst(joint.graph_module, len(held)),
        (*inputs, *held.values()),
        dynamic_shapes=((*free, *[None] * len(held)),),
    )
    program = torch.onnx.export(
        again,
        dynamo=True,
        opset_version=opset,
        input_names=[*names, *held],
        output_names=outputs,
        verbose=False,
    )
    arrays = {name: _array(value) for name, value in held.items()}
    trained = set(functional.trained_names)
    return Joint(
        model=program.model,
        parameters={name: value for name, value in arrays.items() if name in trained},
        constants={name: value for name, value in arrays.items() if name not in trained},
    )


def _array(value: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor as an array, of ml_dtypes' bfloat16 where it is bfloat16."""
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return value.cpu().numpy().copy()


def _check_inputs(inputs: tuple[torch.Tensor, ...], *, dynamic_batch: bool) -> None:
    for position, tensor in enumerate(inputs):
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"example input {position} is of type {type(tensor).__name__}, not a tensor",
                help="pass tensors, and let the module hold whatever is constant",
            )
        if dynamic_batch and tensor.ndim == 0:
            raise UserError(
                f"example input {position} is a scalar, which has no batch dimension",
                help="give it a first dimension, or pass dynamic_batch=False",
            )
        if dynamic_batch and tensor.shape[0] < 2:
            raise UserError(
                f"example input {position} has {tensor.shape[0]} along its first dimension, "
                "which would fix the batch",
                help="pass two examples or more, or dynamic_batch=False",
            )


def _input_names(module: torch.nn.Module, count: int, given: list[str] | None) -> list[str]:
    """Return one name per example input: the caller's, or those of the arguments of `forward`."""
    if given is None:
        arguments = inspect.signature(module.forward).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = [argument.name for argument in arguments if argument.kind in plain][:count]
        given += [f"input_{position}" for position in range(len(given), count)]
    if len(given) != count:
        raise UserError(f"there are {len(given)} input_names for {count} example inputs")
    return given


def _split_parameters(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run the module once on copies; return (trained parameters, all its other tensors) by name."""
    values = dict(module.named_parameters())
    copies = {name: value.detach().clone() for name, value in module.named_buffers()}
    wanted = {
        name: value.detach().clone().requires_grad_() for name, value in values.items() if value.requires_grad
    }
    copies |= {name: value.detach().clone() for name, value in values.items() if name not in wanted}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            loss: object = torch.func.functional_call(module, {**wanted, **copies}, inputs)
        except Exception as error:
            raise UserError(
                f"{type(module).__name__}.forward fails on the example inputs",
                tried=[f"{type(error).__name__}: {first_line(error)}"],
            ) from error
        gradients = torch.autograd.grad(
            _checked_loss(module, loss), list(wanted.values()), allow_unused=True, materialize_grads=False
        )
    originals = {**values, **dict(module.named_buffers())}
    for name, value in {**copies, **wanted}.items():
        if not torch.equal(value.nan_to_num(), originals[name].nan_to_num()):
            raise UserError(
                f"forward changes '{name}', which a training graph cannot hold",
                help="switch off running statistics (track_running_stats=False, or eval()) and max_norm",
            )
    unused = [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None]
    for name in unused:
        logger.warning("parameter '%s' has no gradient of the loss and will not be trained", name)
    trained = {name: values[name] for name in wanted if name not in unused}
    frozen = {name: value for name, value in values.items() if name not in trained}
    return trained, {**frozen, **dict(module.named_buffers())}


def _checked_loss(module: torch.nn.Module, loss: object) -> torch.Tensor:
    name = type(module).__name__
    remedy = "wrap it in a module whose forward takes inputs and labels and returns the mean loss"
    if not isinstance(loss, torch.Tensor):
        raise UserError(f"{name}.forward returns a {type(loss).__name__}, not a scalar loss", help=remedy)
    if loss.ndim != 0:
        shape = list(loss.shape)
        raise UserError(f"{name}.forward returns a tensor of shape {shape}, not a scalar loss", help=remedy)
    if not loss.requires_grad:
        raise UserError(
            f"the loss that {name}.forward returns depends on no trained parameter",
            help="check requires_grad of the parameters, and that nothing detaches the loss",
        )
    return loss
