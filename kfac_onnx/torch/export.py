"""From a PyTorch module that returns a loss to a training graph: forward and backward in one ONNX graph.

The graph that `export_training_graph` returns:

- inputs: the example inputs, under the names of `forward`'s arguments, with a dynamic first dimension;
- trained parameters under their names in `module.named_parameters()`; tied parameters once, under the
  first of their names;
- outputs: the loss, a float scalar, and `<parameter>_grad` for each trained parameter;
- buffers and frozen parameters as initializers.

Parameters travel through PyTorch's exporter as inputs, whose values it does not know: given as
initializers, its optimizer folds some away and merges those that start with equal values.

Needs PyTorch 2.9 or newer (extra `torch`), which is imported at the first call and not before.
"""

# PyTorch is an extra, absent where the types are checked (this file then answers to its name).
# pyright: basic, reportMissingImports=false, reportInvalidTypeForm=false, reportArgumentType=false

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from kfac_onnx import metadata
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

__all__ = ["export_training_graph"]

_EXTERNAL_DATA_FROM = 1 << 31
"""Bytes: no protobuf file can be larger, so the values of a larger model go into a file beside it."""


def export_training_graph(
    module: Callable[..., object],
    example_inputs: Sequence[object] | Mapping[str, object],
    path: str | Path | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Mapping[str, object] | Sequence[object] | None = None,
    input_names: Sequence[str] | None = None,
    loss_name: str = "loss",
    opset: int = 20,
    parameters_as: Literal["initializers", "inputs"] = "initializers",
) -> ir.Model:
    """Return the training graph of a `torch.nn.Module` whose forward computes a scalar loss.

    `example_inputs` are tensors on the CPU: a sequence for `forward(*example_inputs)`, or a mapping for
    `forward(**example_inputs)`, which may hold constants too. An argument may nest tensors in dicts and lists
    (then `batch.user` names an input). The loss is what forward returns, its entry `loss` where it returns a
    dict or an object (Hugging Face's models), or the first differentiable scalar of a tuple.

    With `dynamic_batch` the first dimension of each input stays free (at least two examples are needed to
    tell a batch from a constant); all other dimensions are fixed. `dynamic_shapes` says it per argument, as
    `torch.export.export` takes it: `{"edges": {1: torch.export.Dim.DYNAMIC}, "weight": None}`; an argument
    that it leaves out is as `dynamic_batch` has it.

    Buffers that forward changes, such as the running statistics of batch normalization in training mode,
    become state of the training step, declared in the graph as pairs of an initializer and an output
    `<buffer>.next`; they are trained, saved and exported along with the weights.

    With `parameters_as="inputs"` the graph holds no values of trained parameters and takes them as
    inputs. The module is exported in the mode (train or eval) that it is in, and stays as it was, also when
    the export fails. With `path` the model is also written there, its values beside it in `<name>.data` above
    2 GB.

    Raises `UserError` when PyTorch is missing, when the module does not return a differentiable scalar,
    when its forward changes a parameter, or when PyTorch cannot export it: then with the operator and the
    line.
    """
    try:
        from kfac_onnx.torch.arguments import call_of
        from kfac_onnx.torch.joint import export_joint
    except ImportError as error:
        raise UserError(
            "exporting a training graph from a PyTorch module needs PyTorch 2.9 or newer",
            tried=[f"import torch: {first_line(error)}"],
            help="pip install 'kfac-onnx[torch]'",
        ) from error
    if parameters_as not in ("initializers", "inputs"):
        raise UserError(f"parameters_as must be 'initializers' or 'inputs', not '{parameters_as}'")
    call = call_of(
        module,
        example_inputs,
        dynamic_batch=dynamic_batch,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
    )
    joint = export_joint(module, call, loss_name=loss_name, opset=opset)
    model = joint.model
    _inner_names_apart(model)
    _values_into_graph(model, joint.constants)
    if parameters_as == "initializers":
        _values_into_graph(model, joint.parameters)
    _tidy(model, call.symbols())
    if joint.carried:
        metadata.write(model, "carried", [metadata.Carried(*pair) for pair in joint.carried.items()])
    if path is not None:
        _write(model, Path(path))
    return model


def _inner_names_apart(model: ir.Model) -> None:
    """Rename inner values that have the name of an input or output, or of an earlier inner value.

    PyTorch names inner values after operators (`neg`, `add_3`), whatever the arguments of forward are called.
    """
    graph = model.graph
    ends = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    taken = {value.name for value in ends}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value in ends or not value.name:
                continue
            name, number = value.name, 1
            while name in taken:
                number += 1
                name = f"{value.name}_{number}"
            value.name = name
            taken.add(name)


def _values_into_graph(model: ir.Model, values: Mapping[str, np.ndarray]) -> None:
    """Turn graph inputs into initializers of the same names with these values."""
    graph = model.graph
    for value in list(graph.inputs):
        array = None if value.name is None else values.get(value.name)
        if array is not None:
            value.const_value = ir.Tensor(array, name=value.name)
            graph.inputs.remove(value)
            if value.uses():
                graph.register_initializer(value)


def _tidy(model: ir.Model, symbols: Mapping[tuple[str, int], str]) -> None:
    """Name dynamic dimensions, and drop the exporter's stack traces.

    A dimension has the caller's name in `symbols` (by input and axis); else a free first dimension is
    `batch`, others `batch_2`, ...
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = symbols.get((str(value.name), axis))
            if isinstance(size, ir.SymbolicDim) and size.value is not None and symbol is not None:
                names.setdefault(size.value, symbol)
    batches = 0
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape is not None and value.shape.rank() > 0 else None
        if isinstance(first, ir.SymbolicDim) and first.value is not None and first.value not in names:
            batches += 1
            names[first.value] = f"batch_{batches}" if batches > 1 else "batch"
    seen: set[int] = set()

    def rename(value: ir.Value | None) -> None:
        if value is None or id(value) in seen:
            return
        seen.add(id(value))
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dimension, names) for dimension in value.shape])

    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        rename(value)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            rename(value)
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props["kfac.unmerged"] = "true"  # each parameter is an initializer of its own
    model.graph.name = "training_graph"


def _renamed(dimension: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """Return a dimension with its symbols renamed, also inside an expression such as `4*s23`."""
    if isinstance(dimension, int):
        return dimension
    if dimension.value is None:
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), dimension.value)


def _write(model: ir.Model, path: Path) -> None:
    """Write the model through a temporary file, so that a failure leaves nothing half-written."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    beside = f"{path.name}.data" if size >= _EXTERNAL_DATA_FROM else None
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            ir.save(model, Path(folder) / path.name, external_data=beside)
            if beside is not None:
                (Path(folder) / beside).replace(path.with_name(beside))
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        raise UserError(
            f"the training graph cannot be written to {path}", tried=[first_line(error)]
        ) from error
