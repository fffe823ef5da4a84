"""Where ONNX Runtime itself puts the nodes of a step, on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.shape_inference

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.device.placement.kernels import cuda_kernels
from kfac_onnx.device.placement.reading import copies_of, operator_of
from kfac_onnx.device.placement.records import CPU, CUDA, Node, Placement, is_inserted
from kfac_onnx.disk.models import load_proto
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnxruntime as ort

    from kfac_onnx.device.providers import Provider

__all__ = ["measure"]

_RECORD = "session.record_ep_graph_assignment_info"


def measure(stages: Iterable[tuple[str, onnx.ModelProto]], provider: Provider) -> Placement:
    """Open a session for each stage, a name and a model, and return where its nodes were placed.

    Nothing is run. The names are those after onnxruntime put functions in place and before it fused nodes.

    Raises UserError where the provider does not work here, or this onnxruntime does not tell placements.
    """
    import onnxruntime as ort

    from kfac_onnx.device.providers import provider_list

    (chosen,) = provider_list([provider])
    if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        raise UserError(
            f"onnxruntime {ort.__version__} does not tell where it places nodes",
            help="a newer one does: pip install --upgrade onnxruntime",
        )
    name = chosen if isinstance(chosen, str) else chosen[0]
    whole = Placement(name, True, ort.__version__, (), ())
    with tempfile.TemporaryDirectory() as folder:
        for stage, model in stages:
            whole += _measured(stage, model, chosen, name, Path(folder) / "optimized.onnx")
    return whole


def _measured(stage: str, model: onnx.ModelProto, chosen: Provider, name: str, path: Path) -> Placement:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(_RECORD, "1")
    try:
        session = ort.InferenceSession(  # with the settings of the runtime's own sessions
            model.SerializeToString(),
            options,
            providers=[chosen],
            enable_fallback=0,  # pyright: ignore[reportCallIssue]  onnxruntime declares a part of them
            disabled_optimizers=["EliminateDropout"],
        )
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        raise UserError(f"onnxruntime cannot open the stage '{stage}': {first_line(e)}") from e
    optimized = load_proto(path)
    path.unlink()
    assigned = _assigned(session)
    providers = {item.name: where for item, where in assigned}
    problem_of = _Problems(optimized) if name == CUDA else None
    copies = copies_of(optimized, stage, providers)
    copying = {cause for copy in copies for cause in copy.because}
    nodes: list[Node] = []
    for item, where in assigned:
        problem = problem_of(item.name, item.op_type, item.domain) if problem_of and where == CPU else None
        nodes.append(
            Node(
                stage=stage,
                name=item.name,
                op_type=item.op_type,
                provider=where,
                inserted=is_inserted(item.name),
                operator=operator_of(item.name),
                missing=problem is not None and item.name in copying,  # else it only handles sizes
                reason=problem,
            )
        )
    return Placement(name, True, ort.__version__, tuple(nodes), copies)


def _assigned(session: ort.InferenceSession) -> list[tuple[Any, str]]:
    """Return every node as onnxruntime describes it, with its provider."""
    told: Any = session
    return [
        (node, str(part.ep_name))
        for part in told.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


class _Problems:
    """Tells why the CUDA provider did not take a node, from the types in the optimized model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        known = onnx.shape_inference.infer_shapes(model)
        graph = known.graph
        values = [*graph.input, *graph.output, *graph.value_info]
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
        self._nodes: Mapping[str, onnx.NodeProto] = {node.name: node for node in graph.node}
        self._opsets = {opset.domain: opset.version for opset in known.opset_import}

    def __call__(self, name: str, op_type: str, domain: str) -> str | None:
        node = self._nodes.get(name)
        inputs = [self._types.get(item, 0) for item in (node.input if node is not None else ())]
        outputs = [self._types.get(item, 0) for item in (node.output if node is not None else ())]
        opset = self._opsets.get(domain, 1)
        return cuda_kernels().problem(domain, op_type, opset, inputs, outputs)
