"""The PyTorch half of the exporter: trace forward and backward into one ONNX program.

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

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.export.experimental
from onnxscript import opset18
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_onnx.errors import UserError
from kfac_onnx.torch.backward import rewrite_backward
from kfac_onnx.torch.embeddings import ExportableEmbeddings
from kfac_onnx.torch.lending import lent, untouched
from kfac_onnx.torch.lengths import free_lengths
from kfac_onnx.torch.losses import loss_of
from kfac_onnx.torch.refusals import refusal
from kfac_onnx.torch.survey import Tensors, survey

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import numpy as np
    import onnx_ir as ir

    from kfac_onnx.torch.arguments import Call

__all__ = ["Joint", "export_joint"]

_CONSTANT: Final = "kfac_constant_"
"""Prefix of the graph's names of tensors that the trace itself found, which have no name in the module."""
_NEXT: Final = ".next"
"""What the output that holds a carried buffer after the step has behind the buffer's name."""
_LOUD: Final = (
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
    "torch.__trace",
    "onnxscript",
    "onnx_ir",
)
"""Loggers that speak of the exporter's own matters, which no caller can mend."""


@dataclass(frozen=True)
class Joint:
    """A joint graph as the exporter gives it: parameters and constants are inputs; their values apart.

    `carried` maps the input that is a buffer before the step to the output that is it afterwards.
    """

    model: ir.Model
    parameters: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    carried: dict[str, str]


def export_joint(module: torch.nn.Module, call: Call, *, loss_name: str, opset: int) -> Joint:
    """Return the joint graph of a call of `module`: its loss, `<parameter>_grad` and `<buffer>.next`.

    Raises `UserError` as `survey` and `loss_of`, for names that stand for two things, and where PyTorch
    cannot export the module. The module is as it was afterwards in each case.
    """
    with untouched(module), _quiet(), sdpa_kernel(SDPBackend.MATH), _slow_attention():
        tensors = survey(module, call)
        _check_names(call, tensors, loss_name)
        functional = _Functional(module, tensors, call)
        traced: list[torch.fx.GraphModule] = []
        try:
            return _trace(functional, call, loss_name, opset, traced)
        except UserError:
            raise
        except Exception as error:
            raise refusal(module, error, traced[0] if traced else None, call.names) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Keep deprecations inside PyTorch and its exporter's log to itself."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def _slow_attention() -> Generator[None]:
    """Trace `nn.MultiheadAttention` through its parts: its fused form has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _check_names(call: Call, tensors: Tensors, loss_name: str) -> None:
    names = {*tensors.trained, *tensors.constants, *tensors.carried}
    for name in (*call.names, loss_name):
        if name in names:
            raise UserError(
                f"'{name}' would name two things in the graph",
                help="pass input_names and loss_name that differ from each other and from all parameters",
            )
        names.add(name)


class _Functional(torch.nn.Module):
    """Owns each tensor of a module once and calls the module with them, which keeps tied tensors tied.

    Takes the flat tensors of a call; returns the loss, then each carried buffer's new value.
    """

    def __init__(self, module: torch.nn.Module, tensors: Tensors, call: Call) -> None:
        super().__init__()
        self.trained_names = list(tensors.trained)
        self.frozen_names = [*tensors.constants, *tensors.carried]
        self.trained = torch.nn.ParameterList(tensors.trained.values())
        frozen = [*tensors.constants.values(), *tensors.carried.values()]
        for position, value in enumerate(frozen):
            self.register_buffer(f"frozen_{position}", value.detach())
        self.places = [id(value) for value in (*tensors.trained.values(), *frozen)]
        self.carried = {name: id(value) for name, value in tensors.carried.items()}
        self.call = call
        # In a tuple, which makes it no submodule: its tensors would count a second time.
        self.module = (module,)
        self.train(module.training)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        frozen = [getattr(self, f"frozen_{position}") for position in range(len(self.frozen_names))]
        values = dict(zip(self.places, [*self.trained, *frozen], strict=True))
        for place in self.carried.values():
            values[place] = values[place].clone()  # forward writes into it
        arguments, keywords = self.call.filled(inputs)
        (module,) = self.module
        with lent(module, values):
            output = module(*arguments, **keywords)
            buffers = dict(module.named_buffers())
        loss = loss_of(type(module).__name__, output)
        return loss, *(buffers[name].detach() for name in self.carried)

    def name_of(self, target: str | None) -> str | None:
        """Return the module's name of a tensor that a program calls `trained.<k>` or `frozen_<k>`."""
        kind, _, position = (target or "").replace(".", "_").rpartition("_")
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
    functional: _Functional, call: Call, loss_name: str, opset: int, traced: list[torch.fx.GraphModule]
) -> Joint:
    """Return the joint graph; `traced` gets the forward pass as soon as there is one."""
    inputs = tuple(call.tensors)
    (module,) = functional.module
    with ExportableEmbeddings(), free_lengths(module):
        forward = torch.export.export(functional, inputs, dynamic_shapes=(tuple(call.free),))
    traced.append(forward.graph_module)
    joint = torch.export.experimental._export_forward_backward(forward)
    rewrite_backward(joint.graph_module)
    held: dict[str, torch.Tensor] = {}
    for spec in joint.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            values = joint.state_dict if spec.target in joint.state_dict else joint.constants
            name = functional.name_of(spec.target) or f"{_CONSTANT}{len(held)}"
            held[name] = values[str(spec.target)].detach()
    carried = {name: f"{name}{_NEXT}" for name in functional.carried}
    after = iter(carried.values())
    outputs: list[str] = []
    for spec in joint.graph_signature.output_specs:
        if spec.kind == OutputKind.LOSS_OUTPUT:
            outputs.append(loss_name)
        elif spec.kind == OutputKind.GRADIENT_TO_PARAMETER:
            outputs.append(f"{functional.name_of(spec.target)}_grad")
        else:
            outputs.append(next(after))
    again = torch.export.export(
        _DataFirst(joint.graph_module, len(held)),
        (*inputs, *held.values()),
        dynamic_shapes=((*_still_free(joint, len(inputs)), *[None] * len(held)),),
    )
    program = torch.onnx.export(
        again,
        dynamo=True,
        opset_version=opset,
        input_names=[*call.names, *held],
        output_names=outputs,
        verbose=False,
        # What a squeeze of nothing becomes, inside the exporter.
        custom_translation_table={torch.ops.prims.view_of.default: opset18.Identity},
    )
    if program is None:
        raise AssertionError("torch.onnx.export of an exported program returns the ONNX program")
    arrays = {name: _array(value) for name, value in held.items()}
    trained = set(functional.trained_names)
    return Joint(
        model=program.model,
        parameters={name: value for name, value in arrays.items() if name in trained},
        constants={name: value for name, value in arrays.items() if name not in trained},
        carried=carried,
    )


def _still_free(joint: torch.export.ExportedProgram, count: int) -> Iterable[dict[int, Any]]:
    """Return the axes of each input that the first export left free: the graph has the others as numbers."""
    data = [node for node in joint.graph.nodes if node.op == "placeholder"][-count:]
    return [
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt)
        }
        for node in data
    ]


def _array(value: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor as an array, of ml_dtypes' bfloat16 where it is bfloat16."""
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return value.cpu().numpy().copy()
