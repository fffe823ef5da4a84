"""Does this onnxruntime really update a table in place? Tried on small copies when a session opens.

Binding one value as a scatter's input and output is not promised by ONNX Runtime's documentation. So
each scatter that a model's one-thread stages contain runs here on a small table bound that way: the
numbers must be right, with repeated rows and over several runs, and the output must be the input's memory.
Where either fails, the session holds such states in two buffers and copies.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx

from kfac_onnx.runtime.step.tensors import Buffer, Device, host_value, open_session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.step.plan import Plan

__all__ = ["in_place_problem", "plan_problem", "scatters_of"]

_log = logging.getLogger(__name__)

ROWS: Final = 257
"""Rows of the probe's table: more than one vector register, not a power of two."""
WIDTH: Final = 5
REPEATS: Final = 3


def scatters_of(models: Iterable[onnx.ModelProto]) -> set[tuple[str, str]]:
    """Return the (operator, reduction) of every scatter in the models and their functions."""
    found: set[tuple[str, str]] = set()
    for model in models:
        for nodes in (model.graph.node, *(function.node for function in model.functions)):
            for node in nodes:
                if node.op_type in ("ScatterND", "ScatterElements"):
                    reduction = next((a.s.decode() for a in node.attribute if a.name == "reduction"), "none")
                    found.add((node.op_type, reduction))
    return found


def plan_problem(
    plan: Plan,
    providers: Providers,
    device: Device,
) -> str | None:
    """Return why the plan's states cannot be held in place here, logged as a warning, or None."""
    models = [stage.model for stage in plan.stages if stage.one_thread and stage.writes]
    problem = in_place_problem(scatters_of(models), providers, device)
    if problem is not None:
        _log.warning("tables are copied at every step: %s", problem)
    return problem


def in_place_problem(
    scatters: Iterable[tuple[str, str]],
    providers: Providers,
    device: Device,
) -> str | None:
    """Return what goes wrong with in-place scatters here, in a sentence, or None if all is well."""
    for operator, reduction in sorted(scatters):
        if reduction not in ("none", "add"):
            return f"{operator} with reduction '{reduction}' was not tried in place"
        problem = _try(operator, reduction, providers, device)
        if problem is not None:
            return problem
    return None


def _model(operator: str, reduction: str) -> onnx.ModelProto:
    value, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    columns = WIDTH if operator == "ScatterElements" else 1
    node = onnx.helper.make_node(operator, ["table", "ids", "rows"], ["new"], reduction=reduction)
    graph = onnx.helper.make_graph(
        [node],
        "probe",
        [
            value("table", types.FLOAT, [ROWS, WIDTH]),
            value("ids", types.INT64, ["n", columns]),
            value("rows", types.FLOAT, ["n", WIDTH]),
        ],
        [value("new", types.FLOAT, [ROWS, WIDTH])],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def _try(
    operator: str,
    reduction: str,
    providers: Providers,
    device: Device,
) -> str | None:
    session = open_session(_model(operator, reduction), providers, threads=1)
    expected = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    table = Buffer(expected, int(onnx.TensorProto.FLOAT), device)
    ids = np.array([0, 3, 3, 256, 128, 3] if reduction == "add" else [0, 3, 256, 128], np.int64)
    rows = np.arange(ids.size * WIDTH, dtype=np.float32).reshape(ids.size, WIDTH) + 1
    index = np.repeat(ids[:, None], WIDTH, axis=1) if operator == "ScatterElements" else ids[:, None]
    binding = session.io_binding()
    binding.bind_ortvalue_input("table", table.value)
    binding.bind_ortvalue_output("new", table.value)
    binding.bind_ortvalue_input("ids", host_value(index, int(onnx.TensorProto.INT64)))
    binding.bind_ortvalue_input("rows", host_value(rows, int(onnx.TensorProto.FLOAT)))
    for _ in range(REPEATS):
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if reduction == "add":
            np.add.at(expected, ids, rows)
        else:
            expected[ids] = rows
    if binding.get_outputs()[0].data_ptr() != table.value.data_ptr():
        return f"{operator} with reduction '{reduction}' leaves its result in other memory"
    if not np.array_equal(table.read(), expected):  # small whole numbers: float32 sums are exact
        return f"{operator} with reduction '{reduction}' gives wrong numbers in place"
    return None
