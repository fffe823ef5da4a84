"""The update of a step as a step model of its own, whole and as the shard of one rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kfac_onnx.metadata import State, Step
    from kfac_onnx.step.protos import Item, Source

__all__ = ["Boundary", "shard", "update_model"]

_OWN: Final = ("kfac.step", "kfac.state", "kfac.pipeline", "kfac.reading", "kfac.frontend")
"""What the metadata of an update keep: the rest speaks of values that it does not have."""


@dataclass(frozen=True)
class Boundary:
    """Where the step of a table is cut; names of values.

    `ids` int64[N] and `row_gradient` float32[N, D] are those of all lookups before the exchange, and of
    distinct ids with their summed rows after it. `uses` pairs the ids that each Gather reads with the input
    of the local part that takes their places among the fetched rows.
    """

    parameter: str
    rows: int
    columns: int
    ids: str
    row_gradient: str
    uses: tuple[tuple[str, str], ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of exchanged values begin with."""
        return f"kfac/ranks/{self.parameter}"

    @property
    def fetched(self) -> str:
        """The distinct rows of a batch, float32[U, D]."""
        return f"{self.prefix}/fetched"

    @property
    def product(self) -> str:
        """Σ over lookups of g gᵀ, float32[D, D]."""
        return f"{self.prefix}/product"

    @property
    def counts(self) -> str:
        """How often each distinct id was looked up, float64[U]."""
        return f"{self.prefix}/counts"

    @property
    def lookups(self) -> str:
        """How many lookups all ranks had, int64 scalar."""
        return f"{self.prefix}/lookups"

    @property
    def first(self) -> str:
        """How many lookups the ranks before this one had, int64 scalar."""
        return f"{self.prefix}/first"

    @property
    def exchanged(self) -> tuple[str, ...]:
        """The inputs of the update."""
        return self.ids, self.row_gradient, self.counts, self.lookups, self.product


def update_model(
    model: ir.Model,
    source: Source,
    items: Sequence[Item],
    tables: Sequence[Boundary],
    dense: Mapping[str, str],
    states: Sequence[State],
    step: Step,
) -> onnx.ModelProto:
    """Return the step model of these nodes; its batch is what ranks exchange."""
    proto = onnx.ModelProto(ir_version=source.ir_version, producer_name="kfac-onnx")
    graph = proto.graph
    graph.name = "update"
    for item in items:
        node = graph.node.add()
        node.CopyFrom(item.node)
        del node.metadata_props[:]
        node.metadata_props.add(key="kfac.phase", value=item.phase)
    # In order: ranks compare the bytes of what they made.
    makes = dict.fromkeys(name for item in items for name in item.makes)
    reads = dict.fromkeys(name for item in items for name in item.reads if name not in makes)
    rates = [rate.input for rate in step.learning_rates]
    batch = [name for name in _exchange_types(source, tables, dense) if name in reads]
    types = _exchange_types(source, tables, dense)
    own = {state.input for state in states}
    graph.input.extend(source.types[name] for name in (*(s.input for s in states), *rates))
    graph.input.extend(types[name] for name in batch)
    for name in dict.fromkeys([*reads, *rates]):
        if name in source.initializers and name not in own:
            tensor = ir.serde.serialize_tensor(source.initializers[name])
            tensor.name = name
            graph.initializer.append(tensor)
    for name in (*(s.output for s in states), step.loss, step.ok):
        if name is not None:
            graph.output.append(source.types.get(name) or onnx.ValueInfoProto(name=name))
    outer = {value.name for value in (*graph.input, *graph.output)}
    graph.value_info.extend(_unsized(source.types[n]) for n in makes if n in source.types and n not in outer)
    proto.functions.extend(source.functions.values())
    proto.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in source.opsets)
    for key, value in model.metadata_props.items():
        if key in _OWN:
            proto.metadata_props.add(key=key, value=value)
    entry = next(entry for entry in proto.metadata_props if entry.key == "kfac.step")
    data = json.loads(entry.value)
    data["batch"], data["id_checks"] = batch, []
    entry.value = json.dumps(data)
    return proto


def _unsized(info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Return the type of a value, with no names of dimensions: they were those of one rank's batch."""
    result = onnx.ValueInfoProto()
    result.CopyFrom(info)
    for dim in result.type.tensor_type.shape.dim:
        dim.ClearField("dim_param")
    return result


def _exchange_types(
    source: Source, tables: Sequence[Boundary], dense: Iterable[str]
) -> dict[str, onnx.ValueInfoProto]:
    info = helper.make_tensor_value_info
    types = {"kfac/ranks/loss": info("kfac/ranks/loss", TensorProto.FLOAT, [])}
    for name in dense:
        types[name] = _unsized(source.types[name])
    for number, table in enumerate(tables):
        size = f"distinct_{number}"
        types[table.ids] = info(table.ids, TensorProto.INT64, [size])
        types[table.row_gradient] = info(table.row_gradient, TensorProto.FLOAT, [size, table.columns])
        types[table.counts] = info(table.counts, TensorProto.DOUBLE, [size])
        types[table.lookups] = info(table.lookups, TensorProto.INT64, [])
        types[table.product] = info(table.product, TensorProto.FLOAT, [table.columns, table.columns])
    return types


def shard(update: onnx.ModelProto, sharded: Mapping[str, str], rows: Mapping[str, int]) -> ir.Model:
    """Return the update of one rank: `rows` says how many rows of each table it holds."""
    proto = onnx.ModelProto()
    proto.CopyFrom(update)
    entry = next(entry for entry in proto.metadata_props if entry.key == "kfac.state")
    states = json.loads(entry.value)
    sizes: dict[str, int] = {}
    for state in states:
        if state["input"] in sharded:
            own = rows[sharded[state["input"]]]
            state["shape"][0] = own
            names = (state["input"], state["output"], state["candidate"], *state["aliases"])
            sizes.update(dict.fromkeys(names, own))
    entry.value = json.dumps(states)
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        dims = info.type.tensor_type.shape.dim
        if info.name in sizes and dims:
            dims[0].dim_value = sizes[info.name]
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                # Values inside that have a row per row of the table would say how many the whole one has.
                del attribute.g.value_info[:]
                for info in attribute.g.output:
                    info.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)
