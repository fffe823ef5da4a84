"""What ONNX Runtime will do with a model on a device: which node runs where, and what is copied.

Three steps of onnxruntime, in its order (versions 1.23 to 1.32):

1. A node gets the device if the provider has a kernel for its operator, opset and types.
2. A node that only reads what is on the host already, and small constants and inputs of the graph, is moved
   to the host, unless its kernel wants those inputs there (GetCpuPreferredNodes). `Shape` starts such chains.
3. Values that one side makes and the other reads get a Memcpy node (TransformerMemcpy). Of an input of the
   graph that lies on the device and is read on the host alone there is a copy without a node, and of an
   output that the host makes.

Before them functions are put in place, and what can be computed from constants and fixed shapes is.
Operators that ONNX defines by others and that neither side has a kernel for count as on the device: what
stands in their place is not followed, nor are optimizations that fuse nodes. Sub-graphs (`If`, `Loop`) are
looked at for kernels; copies within them are not foreseen. Sources, of onnxruntime:
core/framework/fallback_cpu_capability.cc, core/optimizer/transformer_memcpy.cc,
core/providers/cuda/cuda_execution_provider.cc.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Final

import onnx
import onnx.shape_inference

from kfac_onnx.device.placement.inlined import Origin, inline
from kfac_onnx.device.placement.kernels import KernelTable, cuda_kernels
from kfac_onnx.device.placement.records import CPU, Copy, Node, Placement

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["NOT_FOLDED", "predict"]

_SMALL: Final = 100
"""Entries up to which onnxruntime takes a constant for free on the host."""
_HALVES: Final = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
NOT_FOLDED: Final = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
"""Operators that give other entries each time; a Dropout is an Identity where it does not train."""
_SIZES: Final = "reads only sizes, which are on the host, so onnxruntime runs it there"


def predict(stages: Iterable[tuple[str, onnx.ModelProto]], table: KernelTable | None = None) -> Placement:
    """Return where the nodes of each stage, a name and a model, would run with the table's provider.

    Nodes that onnxruntime computes when it opens the model are left out.
    """
    table = table or cuda_kernels()
    whole = Placement(table.provider, False, table.onnxruntime, (), ())
    for name, model in stages:
        whole += _Stage(name, model, table).placement()
    return whole


class _Stage:
    """One model of a step on its way to a placement."""

    def __init__(self, name: str, model: onnx.ModelProto, table: KernelTable) -> None:
        self.name = name
        self.table = table
        inlined, self.origins = inline(model)
        self.model = onnx.shape_inference.infer_shapes(inlined, data_prop=True)
        graph = self.model.graph
        self.opsets = {opset.domain: opset.version for opset in self.model.opset_import}
        values = [*graph.input, *graph.output, *graph.value_info]
        self.types = {value.name: value.type.tensor_type for value in values}
        self.constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        for tensor in graph.initializer:
            kind = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
            self.types.setdefault(tensor.name, kind)
        self.inputs = [value.name for value in graph.input if value.name not in self.constants]
        self.outputs = {value.name for value in graph.output}
        self.nodes = [node for node in graph.node if not self._fold(node)]
        self.makers = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in dict.fromkeys([*node.input, *_captured(node)]):
                self.readers.setdefault(name, []).append(index)
        self.problems = {index: self._problem(node) for index, node in enumerate(self.nodes)}
        self.host = {index for index, problem in self.problems.items() if problem is not None}
        self.moved = self._preferred()
        self.harmless = {index for index in self.host if self._reads_host_alone(index)}

    # -- what is computed when the model is opened ---------------------------------------------------

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Say whether a node is a constant, of constants, or the shape of something of fixed shape."""
        if node.op_type in ("Shape", "Size"):
            known = self._has_fixed_dims(node)
        else:
            graphs = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
            known = not graphs and node.op_type not in NOT_FOLDED
            known = known and all(name in self.constants for name in node.input if name)
        if known:
            for name in node.output:
                self.constants[name] = self._entries(name)
        return known

    def _has_fixed_dims(self, node: onnx.NodeProto) -> bool:
        kind = self.types.get(node.input[0])
        if kind is None or not kind.HasField("shape"):
            return False
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        dims = list(kind.shape.dim)[bounds.get("start", 0) : bounds.get("end")]
        return all(dim.HasField("dim_value") for dim in dims)

    def _entries(self, name: str) -> int:
        kind = self.types.get(name)
        if kind is None or not kind.HasField("shape"):
            return 1
        return math.prod(dim.dim_value for dim in kind.shape.dim)

    # -- kernels -------------------------------------------------------------------------------------

    def _element(self, name: str) -> int:
        kind = self.types.get(name)
        return 0 if kind is None or not name else kind.elem_type

    def _problem(self, node: onnx.NodeProto) -> str | None:
        inputs = [self._element(name) for name in node.input]
        outputs = [self._element(name) for name in node.output]
        opset = self.opsets.get(node.domain, 1)
        if self.table.is_spelled_out(node.domain, node.op_type, opset):
            return None
        return self.table.problem(node.domain, node.op_type, opset, inputs, outputs)

    def _host_inputs(self, node: onnx.NodeProto) -> frozenset[int]:
        return self.table.host_inputs.get(node.op_type, frozenset()) if not node.domain else frozenset()

    def _host_outputs(self, node: onnx.NodeProto) -> frozenset[int]:
        return self.table.host_outputs.get(node.op_type, frozenset()) if not node.domain else frozenset()

    # -- what onnxruntime moves to the host by itself --------------------------------------------------

    def _preferred(self) -> set[int]:
        on_host: set[str] = set()
        queue: list[int] = []
        for index, node in enumerate(self.nodes):
            if index not in self.host:
                for place in self._host_outputs(node):
                    if place < len(node.output):
                        on_host.add(node.output[place])
                        queue += self.readers.get(node.output[place], [])
        heapq.heapify(queue)
        visited: set[int] = set()
        moved: set[int] = set()
        while queue:
            index = heapq.heappop(queue)
            if index in visited:
                continue
            visited.add(index)
            node = self.nodes[index]
            if index not in self.host:
                if not self._moves(node, on_host):
                    continue
                moved.add(index)
            for name in node.output:
                on_host.add(name)
                for reader in self.readers.get(name, []):
                    heapq.heappush(queue, reader)
        return moved

    def _moves(self, node: onnx.NodeProto, on_host: set[str]) -> bool:
        wanted = self._host_inputs(node)
        for place, name in enumerate(node.input):
            if not name:
                continue
            if self._element(name) in _HALVES:
                return False
            if self.constants.get(name, _SMALL + 1) <= _SMALL or name in self.inputs:
                continue
            if name not in on_host or place in wanted:
                return False
        return True

    def _reads_host_alone(self, index: int) -> bool:
        """Say whether a node without a kernel only handles sizes, which are on the host anyway."""
        names = [name for name in self.nodes[index].input if name and name not in self.constants]
        makers = [self.makers.get(name) for name in names]
        away = self.host | self.moved
        return bool(names) and all(
            maker is not None and self._made_on_host(maker, name, away)
            for name, maker in zip(names, makers, strict=True)
        )

    # -- copies ----------------------------------------------------------------------------------------

    def placement(self) -> Placement:
        """Return the nodes and the copies of this stage."""
        away = self.host | self.moved
        nodes = tuple(self._record(index, away) for index in range(len(self.nodes)))
        nodes += tuple(self._inner())
        return Placement(self.table.provider, False, self.table.onnxruntime, nodes, tuple(self._copies(away)))

    def _record(self, index: int, away: set[int]) -> Node:
        node = self.nodes[index]
        origin = self.origins[node.name]
        problem = self.problems[index]
        return Node(
            stage=self.name,
            name=node.name,
            op_type=node.op_type,
            provider=CPU if index in away else self.table.provider,
            inserted=origin.inserted,
            operator=origin.operator,
            missing=problem is not None and index not in self.harmless,
            reason=_SIZES if index in self.moved | self.harmless else problem,
        )

    def _inner(self) -> Iterator[Node]:
        """Return the nodes of sub-graphs, by their kernels alone; types that are not known fit."""
        for outer in self.nodes:
            for node in _inner_nodes(outer):
                problem = self._problem(node)
                origin = self.origins.get(node.name, Origin(False))
                yield Node(
                    stage=self.name,
                    name=node.name,
                    op_type=node.op_type,
                    provider=self.table.provider if problem is None else CPU,
                    inserted=origin.inserted,
                    operator=origin.operator,
                    missing=problem is not None,
                    reason=problem,
                )

    def _copies(self, away: set[int]) -> Iterator[Copy]:
        for name in [*self.inputs, *self.makers]:
            maker = self.makers.get(name)
            from_host = maker is not None and self._made_on_host(maker, name, away)
            host = [index for index in self.readers.get(name, []) if self._reads_on_host(index, name, away)]
            device = [
                index for index in self.readers.get(name, []) if self._reads_on_device(index, name, away)
            ]
            if maker is None:
                if host:
                    yield self._copy(name, "to host", host, implicit=not device)
            elif from_host and (device or name in self.outputs):
                yield self._copy(name, "to device", [maker], implicit=not device)
            elif host and not from_host:
                yield self._copy(name, "to host", host)

    def _made_on_host(self, maker: int, name: str, away: set[int]) -> bool:
        node = self.nodes[maker]
        return maker in away or list(node.output).index(name) in self._host_outputs(node)

    def _reads_on_host(self, index: int, name: str, away: set[int]) -> bool:
        node = self.nodes[index]
        wanted = self._host_inputs(node)
        places = [place for place, given in enumerate(node.input) if given == name]
        return bool(places) and (index in away or any(place in wanted for place in places))

    def _reads_on_device(self, index: int, name: str, away: set[int]) -> bool:
        node = self.nodes[index]
        wanted = self._host_inputs(node)
        places = [place for place, given in enumerate(node.input) if given == name]
        return index not in away and any(place not in wanted for place in places)

    def _copy(self, name: str, direction: str, because: list[int], *, implicit: bool = False) -> Copy:
        causes = [self.nodes[index].name for index in because]
        return Copy(
            stage=self.name,
            value=name,
            direction="to host" if direction == "to host" else "to device",
            inserted=any(self.origins[cause].inserted for cause in causes),
            because=tuple(causes),
            implicit=implicit,
        )


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for child in attribute.g.node:
                yield child
                yield from _inner_nodes(child)


def _captured(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node's sub-graphs may read from outside (their own are among them)."""
    return [name for child in _inner_nodes(node) for name in child.input if name]
