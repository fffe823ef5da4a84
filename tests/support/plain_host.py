"""A host that knows nothing of this package: it runs the model and feeds its states back."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from corpus_cases import initial_state

from kfac_onnx import metadata
from kfac_onnx.metadata import RowGradient, State

__all__ = ["Host"]


class Host:
    """Plain ONNX Runtime around a drop-in graph, with its states."""

    def __init__(self, model: ir.Model, weights: dict[str, np.ndarray]) -> None:
        self.states = metadata.read_list(model, "state", State)
        self.pairs = metadata.read_list(model, "row_gradients", RowGradient)
        self.held = {state.input: initial_state(state, weights) for state in self.states}
        for name in weights:  # those stored in the file may be fed too
            held = model.graph.initializers.get(name)
            if held is not None and not held.is_graph_input():
                model.graph.inputs.append(held)
        proto = ir.to_proto(model)
        self.names = [value.name for value in proto.graph.output]
        for index, value in enumerate(proto.graph.output):  # bfloat16 has no NumPy form
            if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
                wide = f"{value.name}/float32"
                node = onnx.helper.make_node("Cast", [value.name], [wide], to=onnx.TensorProto.FLOAT)
                proto.graph.node.append(node)
                proto.graph.output[index].CopyFrom(onnx.helper.make_tensor_value_info(wide, 1, None))
        self.session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        overridable = self.session.get_overridable_initializers()
        self.inputs = {item.name for item in (*self.session.get_inputs(), *overridable)}

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step and keep the states."""
        values = {}
        for name, array in {**feed, **self.held}.items():
            if name not in self.inputs:
                continue
            if array.dtype == ml_dtypes.bfloat16:
                bits = np.ascontiguousarray(array).view(np.uint16)
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
            else:
                values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        results = self.session.run_with_ort_values([item.name for item in self.session.get_outputs()], values)
        out = {name: value.numpy() for name, value in zip(self.names, results, strict=True)}
        for pair in self.pairs:  # rows with their ids: repeated ids add up
            out[pair.gradient] = np.zeros_like(feed[pair.parameter], np.float64)
            np.add.at(out[pair.gradient], out[pair.indices], out[pair.values])
        self.held = {state.input: out[state.output] for state in self.states}
        return out
