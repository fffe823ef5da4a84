"""Write the table of the CUDA provider's kernels: kfac_onnx/device/placement/cuda_kernels.json.

    python tools/cuda_kernels.py            with onnxruntime-gpu, and a GPU or tools/cuda_stand_in.py

Kernels, their opsets and element types come from the registry of the installed wheel
(`get_all_opkernel_def`, which onnxruntime's own docs/OperatorKernels.md is made from). Which inputs and
outputs a kernel keeps on the host is not in there: ONNX's test cases of each operator are opened as
sessions, and the copies that onnxruntime inserts tell. Kernels for opsets below 18 are left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnx.backend.test.case.node import collect_testcases
from onnxruntime.capi import onnxruntime_pybind11_state

OUT = Path(__file__).parents[1] / "kfac_onnx" / "placement" / "cuda_kernels.json"
CUDA = "CUDAExecutionProvider"
LOWEST, NEWEST, ENDLESS = 18, 24, 2**31 - 1


def registered() -> dict[str, list[list[Any]]]:
    """Return [first opset, last or null, {type letter: element types}] by operator."""
    kernels: dict[str, list[list[Any]]] = {}
    for kernel in onnxruntime_pybind11_state.get_all_opkernel_def():
        first, last = kernel.version_range
        if kernel.provider != CUDA or (kernel.domain == "" and last < LOWEST):
            continue
        types = {
            letter: sorted(
                name.removeprefix("tensor(").removesuffix(")") for name in names if name.startswith("tensor(")
            )
            for letter, names in kernel.type_constraints.items()
        }
        name = f"{kernel.domain}::{kernel.op_name}" if kernel.domain else kernel.op_name
        kernels.setdefault(name, []).append([first, None if last == ENDLESS else last, types])
    return {name: joined(sorted(rows, key=json.dumps)) for name, rows in sorted(kernels.items())}


def joined(rows: list[list[Any]]) -> list[list[Any]]:
    """Join rows that differ in the types of one letter only."""
    done: list[list[Any]] = []
    for first, last, types in rows:
        for row in done:
            other = [letter for letter in types if row[2].get(letter) != types[letter]]
            if row[:2] == [first, last] and row[2].keys() == types.keys() and len(other) <= 1:
                for letter in other:
                    row[2][letter] = sorted({*row[2][letter], *types[letter]})
                break
        else:
            done.append([first, last, dict(types)])
    return done


def on_host(model: onnx.ModelProto, path: Path) -> tuple[list[int], list[int]] | None:
    """Return which inputs and outputs of a model's one node are on the host; None if it is not on CUDA."""
    made, node = onnx.ModelProto(), onnx.NodeProto()
    made.CopyFrom(model)
    node.CopyFrom(model.graph.node[0])
    node.name = "the"
    before, after = [], []
    for index, name in enumerate(node.input):
        if name:
            node.input[index] = f"in_{index}"
            before.append(onnx.helper.make_node("Identity", [name], [f"in_{index}"]))
    for index, name in enumerate(node.output):
        if name:
            node.output[index] = f"out_{index}"
            after.append(onnx.helper.make_node("Identity", [f"out_{index}"], [name], name=f"after_{index}"))
    del made.graph.node[:]
    made.graph.node.extend([*before, node, *after])
    for opset in made.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = min(opset.version, NEWEST)
    made.ir_version = min(made.ir_version, 11)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.optimized_model_filepath = str(path)
    session = ort.InferenceSession(made.SerializeToString(), options, providers=[CUDA])
    parts = session.get_provider_graph_assignment_info()
    where = {item.name: part.ep_name for part in parts for item in part.get_nodes()}
    if where.get("the") != CUDA:
        return None
    nodes = onnx.load(path).graph.node
    makers = {name: item for item in nodes for name in item.output}
    the = next(item for item in nodes if item.name == "the")
    inputs = [
        i for i, name in enumerate(the.input) if name in makers and makers[name].op_type == "MemcpyToHost"
    ]
    outputs = [
        i
        for i, name in enumerate(the.output)
        if any(
            item.op_type == "MemcpyFromHost" or (item.name.startswith("after") and where[item.name] != CUDA)
            for item in nodes
            if name in item.input
        )
    ]
    return inputs, outputs


def one_hot() -> onnx.ModelProto:
    """Return a model of OneHot on integers: ONNX's cases have floats, for which there is no kernel."""
    value, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    node = onnx.helper.make_node("OneHot", ["ids", "depth", "values"], ["y"])
    inputs = [
        value("ids", types.INT64, [3]),
        value("depth", types.INT64, []),
        value("values", types.FLOAT, [2]),
    ]
    graph = onnx.helper.make_graph([node], "one-hot", inputs, [value("y", types.FLOAT, None)])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", LOWEST)], ir_version=9)


def host_operators() -> list[str]:
    """Return the standard operators that have a kernel on the CPU."""
    kernels = onnxruntime_pybind11_state.get_all_opkernel_def()
    return sorted({k.op_name for k in kernels if k.provider == "CPUExecutionProvider" and k.domain == ""})


def host_memory() -> dict[str, list[list[int]]]:
    """Return [inputs, outputs] on the host by operator, for those that have any."""
    found: dict[str, tuple[set[int], set[int]]] = {}
    path = Path(tempfile.mkdtemp()) / "optimized.onnx"
    for model in [one_hot(), *(case.model for case in collect_testcases(None))]:
        if model is None or len(model.graph.node) != 1 or model.graph.node[0].domain not in ("", "ai.onnx"):
            continue
        try:
            places = on_host(model, path)
        except Exception:  # noqa: S112  a case that this onnxruntime cannot open tells nothing
            continue
        if places is not None:
            for known, seen in zip(
                found.setdefault(model.graph.node[0].op_type, (set(), set())), places, strict=True
            ):
                known.update(seen)
    return {name: [sorted(ins), sorted(outs)] for name, (ins, outs) in sorted(found.items()) if ins or outs}


def main() -> None:
    """Write the table."""
    table = {
        "provider": CUDA,
        "onnxruntime": ort.__version__,
        "source": "kernel registry of the onnxruntime-gpu wheel, read by tools/cuda_kernels.py",
        "lowest_opset": LOWEST,
        "host_operators": host_operators(),
        "host_memory": host_memory(),
        "kernels": registered(),
    }
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in table.items() if not isinstance(value, dict)]
    for key in ("host_memory", "kernels"):
        rows = ",\n".join(f'    "{name}": {json.dumps(row)}' for name, row in table[key].items())
        lines.append(f'  "{key}": {{\n{rows}\n  }}')
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.stderr.write(f"{OUT.name}: {len(table['kernels'])} operators\n")


if __name__ == "__main__":
    main()
