"""Cut a training step where ranks must exchange: route, local and update.

A step of P ranks is the step of one process on the concatenated batch. With n_r what the loss of rank r
divides by and w_r = n_r / Σ n (1 for a summed loss), loss = Σ w_r loss_r, and so for every gradient.

| part   | reads                                           | leaves                                          |
|--------|-------------------------------------------------|-------------------------------------------------|
| route  | the batch                                       | ids of each lookup                              |
| local  | batch, dense parameters, the batch's distinct   | loss, dL/d(row) of each lookup, rowsᵀ·rows,     |
|        | rows float32[U, D] in place of the table        | dense gradients, divisor of the mean            |
| update | sums over ranks; the rank's own rows and counts | a step model: K-FAC, optimizers, finite flag    |

The update is an ordinary step model whose tables are one rank's shards. That is right only where it treats
each row by itself: `_check_rows` follows everything that differs between ranks through its nodes, and refuses
by name an operator that would mix rows, and a replicated state that would come to differ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx
from onnx import TensorProto, helper

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.operators import RANDOM
from kfac_onnx.metadata import Loss, Parameter, Phase, Site, State, Step
from kfac_onnx.ranks.update import Boundary, update_model
from kfac_onnx.readers import emit_divisor
from kfac_onnx.step.protos import Item, build_model, free_names, read_source
from kfac_onnx.step.slots import prune

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from kfac_onnx.step.protos import Source

__all__ = ["Cut", "cut_step"]

_ROWWISE: Final = frozenset(
    {
        "Add",
        "AddRows",
        "Cast",
        "GatherElements",
        "InputFactorUpdate",
        "MergeLookups",
        "Mul",
        "PreconditionRows",
        "RowWindowStep",
        "RowAdagradStep",
        "RowAdagrad",
        "RowElementAdagradStep",
        "RowElementAdagrad",
        "WriteRows",
    }
)
"""Operators that treat each row (or id) by itself."""
_INDEXED: Final = frozenset({"AddRows", "GatherElements", "InputFactorUpdate", "MergeLookups", "WriteRows"})
"""Those of them whose first input is indexed by ids."""
_FLAGS: Final = frozenset({"Sum", "IsNaN", "Not", "And"})


@dataclass(frozen=True)
class Cut:
    """The three parts of a step; `update` has whole tables still, see `shard`."""

    route: onnx.ModelProto | None
    local: onnx.ModelProto
    update: onnx.ModelProto
    tables: tuple[Boundary, ...]
    dense: dict[str, str]
    """Gradient value to its parameter, of what is replicated."""
    loss: str
    divisor: str
    summed: bool
    sharded: dict[str, str]
    """State with a row per row of a table, to that table."""


def _refused(subject: str, reason: str) -> UserError:
    return UserError(
        f"{subject} cannot be trained on several ranks: {reason}",
        help="train on one process; docs/how-to/machines.md says what can be cut",
    )


def cut_step(model: ir.Model) -> Cut:
    """Return the parts of a transformed model, which is left as it is.

    Raises UserError, with the reason, where the step of several ranks would not be that of one process.
    """
    step = metadata.read(model, "step", Step)
    if step is None:
        raise UserError("the model is not a training step", help="transform it first")
    loss = metadata.read(model, "loss", Loss)
    if loss is None or step.loss is None:
        raise _refused("the model", "its loss lies outside the graph")
    if loss.reduction == "unknown":
        raise _refused("the model", f"how the loss '{step.loss}' reduces over examples is unknown")
    if step.constants:
        raise _refused("the model", f"the input '{step.constants[0]}' is a constant that is given once")
    if step.shape != "rows":
        raise _refused("the model", "its step returns gradients (--shape dense)")
    if step.settings.g_every != 1:
        raise _refused("the model", "G takes in a batch only every few steps (g-every)")
    if step.settings.table_decay:
        raise _refused("the model", "its looked-up rows decay by the steps since (table-decay)")
    pipeline = model.metadata_props.get("kfac.pipeline", "")
    if "clip-gradients" in pipeline:
        raise _refused("the model", "gradients are clipped, which ranks would do before their sum")
    states = metadata.read_list(model, "state", State)
    sites = metadata.read_list(model, "sites", Site)
    parameters = metadata.read_list(model, "parameters", Parameter)
    model = model.clone()
    divisor = emit_divisor(model)
    if divisor is None or divisor.name is None:
        raise _refused("the model", "the graph does not show what its mean loss divides by")
    source = read_source(model)
    tables = tuple(_boundary(site, source) for site in sites)
    if not tables:
        raise _refused("the model", "it has no embedding table")
    dense = {
        p.gradient: p.name for p in parameters if p.gradient and p.name not in {t.parameter for t in tables}
    }
    local_items, tables = _local_items(source, tables)
    local = _local(source, local_items, tables, states, step.loss, dense, divisor.name)
    route = _route(source, tables, step)
    items = _update_items(source, tables, dense, step.loss)
    outputs = [step.ok, step.loss, *(s.output for s in states), *(s.candidate for s in states)]
    outputs += [name for s in states for name in s.aliases]
    outputs += [n for c in step.root_checks for n in (c.root, c.factor, c.damping, c.residual)]
    items = prune(items, [name for name in outputs if name not in {s.input for s in states}])
    sharded = {
        s.input: t.parameter
        for s in states
        for t in tables
        if s.parameter == t.parameter and s.update == "in-place" and s.shape[:1] == (t.rows,)
    }
    _check_reads(source, items, tables, dense, states, step)
    _check_rows(items, tables, states, sharded)
    update = update_model(model, source, items, tables, dense, states, step)
    return Cut(route, local, update, tables, dense, step.loss, divisor.name, loss.reduction == "sum", sharded)


def _boundary(site: Site, source: Source) -> Boundary:
    subject = f"the table '{site.parameter}'"
    if site.layout != "rows":
        raise _refused(subject, f"it is stored as {site.layout}, not as rows")
    if site.dtype != "float32":
        raise _refused(subject, f"its rows are {site.dtype}, not float32")
    if site.dense_uses or site.dense is not None:
        raise _refused(subject, "it is tied: its other use reads all of its rows")
    if site.penalties or site.penalty is not None or site.row_decay:
        raise _refused(subject, "a penalty of the loss reads all of its rows")
    if site.keep is not None:
        raise _refused(subject, "the graph drops rows of its gradient (padding)")
    if site.ids is None or site.rows is None:
        raise _refused(subject, "the model does not say where its ids are")
    kind = source.types.get(site.rows)
    if kind is not None and kind.type.tensor_type.elem_type != TensorProto.FLOAT:
        raise _refused(subject, "dL/d(row) is not float32")
    return Boundary(site.parameter, site.vocab_size, site.embedding_dim, site.ids, site.rows)


def _local_items(source: Source, tables: tuple[Boundary, ...]) -> tuple[list[Item], tuple[Boundary, ...]]:
    """Have every reading of a table read the fetched rows; return the nodes, and the tables with uses."""
    items = list(source.items)
    updated: list[Boundary] = []
    for table in tables:
        uses: list[tuple[str, str]] = []
        for index, item in enumerate(items):
            node = item.node
            if table.parameter not in item.reads or item.phase == Phase.COMMIT:
                continue
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if node.op_type != "Gather" or axis != 0 or node.input[0] != table.parameter:
                raise _refused(
                    f"the table '{table.parameter}'", f"it is read by {node.op_type}, not by Gather"
                )
            local = f"{table.prefix}/use_{len(uses)}"
            uses.append((node.input[1], local))
            items[index] = _replaced(item, {0: table.fetched, 1: local})
        updated.append(dataclasses.replace(table, uses=tuple(uses)))
    return items, tuple(updated)


def _replaced(item: Item, inputs: dict[int, str]) -> Item:
    node = onnx.NodeProto()
    node.CopyFrom(item.node)
    for index, name in inputs.items():
        node.input[index] = name
    return Item(node, free_names(node), item.makes, item.phase)


def _node(op: str, inputs: Sequence[str], output: str, **attributes: object) -> Item:
    node = helper.make_node(op, list(inputs), [output], name=output, **attributes)  # pyright: ignore[reportArgumentType]
    return Item(node, free_names(node), (output,), "gradients")


def _local(
    source: Source,
    items: list[Item],
    tables: Sequence[Boundary],
    states: Iterable[State],
    loss: str,
    dense: dict[str, str],
    divisor: str,
) -> onnx.ModelProto:
    products: list[Item] = []
    types = dict(source.types)
    for table in tables:
        p = table.prefix
        types[table.fetched] = helper.make_tensor_value_info(
            table.fetched, TensorProto.FLOAT, [None, table.columns]
        )
        for ids, local in table.uses:
            types[local] = _like(source, ids, local)
        for name in (table.lookups, table.first):
            types[name] = helper.make_tensor_value_info(name, TensorProto.INT64, [])
        sampled = _sample_of(items, table)
        rows = table.row_gradient
        if sampled is not None:
            # The sample is of the concatenated lookups: this rank has those from `first` on.
            sample = sampled.makes[0]
            items[items.index(sampled)] = _replaced(sampled, {0: table.lookups})
            rows = f"{p}/sampled"
            products += [
                _node("Shape", [table.row_gradient], f"{p}/number", start=0, end=1),
                _node("Add", [f"{p}/number", table.first], f"{p}/end"),
                _node("GreaterOrEqual", [sample, table.first], f"{p}/from"),
                _node("Less", [sample, f"{p}/end"], f"{p}/below"),
                _node("And", [f"{p}/from", f"{p}/below"], f"{p}/own"),
                _node("Compress", [sample, f"{p}/own"], f"{p}/chosen", axis=0),
                _node("Sub", [f"{p}/chosen", table.first], f"{p}/places"),
                _node("Gather", [table.row_gradient, f"{p}/places"], rows, axis=0),
            ]
        products += [
            _node("Transpose", [rows], f"{p}/transposed", perm=[1, 0]),
            _node("MatMul", [f"{p}/transposed", rows], table.product),
        ]
    wanted = [loss, divisor, *(t.row_gradient for t in tables), *(t.product for t in tables), *dense]
    wanted = list(dict.fromkeys(wanted))
    kept = prune([*items, *products], wanted)
    for item in kept:
        if item.node.op_type in RANDOM:
            raise _refused("the model", f"{item.node.op_type} '{item.node.name}' draws at random")
        if item.node.op_type == "BatchNormalization":
            raise _refused(
                "the model", f"BatchNormalization '{item.node.name}' couples the examples of a batch"
            )
    of_tables = {t.parameter for t in tables} | {
        s.input for s in states if s.shape[:1] in {(t.rows,) for t in tables}
    }
    reads = {name for item in kept for name in item.reads}
    wrong = sorted(
        reads & {s.input for s in states if s.parameter in {t.parameter for t in tables}} & of_tables
    )
    if wrong:
        raise _refused(f"the table '{wrong[0]}'", "the loss or a gradient reads all of it")
    as_inputs = {*source.inputs, *(state.input for state in states)}
    own = dataclasses.replace(source, types=types)
    return build_model(own, [item.node for item in kept], wanted, name="local", as_inputs=as_inputs)


def _like(source: Source, name: str, new: str) -> onnx.ValueInfoProto:
    info = helper.make_tensor_value_info(new, TensorProto.INT64, None)
    if name in source.types:
        info.CopyFrom(source.types[name])
        info.name = new
        info.type.tensor_type.elem_type = TensorProto.INT64
        for dim in info.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    return info


def _sample_of(items: Sequence[Item], table: Boundary) -> Item | None:
    """Return the node that chooses the lookups which G takes in; None where it takes all."""
    update = _output_update(items, table)
    rows = update.node.input[2]
    if rows == table.row_gradient:
        return None
    made = {name: item for item in items for name in item.makes}
    gather = made.get(rows)
    if gather is not None and gather.node.op_type == "Gather" and gather.node.input[0] == table.row_gradient:
        sample = made.get(gather.node.input[1])
        if sample is not None and sample.node.op_type == "SampleRows":
            return sample
    raise _refused(
        f"the table '{table.parameter}'", "its G takes in something other than rows of its gradient"
    )


def _output_update(items: Sequence[Item], table: Boundary) -> Item:
    prefix = f"kfac/{table.parameter}/G"
    for item in items:
        if item.node.op_type == "OutputFactorUpdate" and item.node.input[0] == prefix:
            return item
    raise _refused(f"the table '{table.parameter}'", "it has no output factor G of its own in the step")


def _route(source: Source, tables: Sequence[Boundary], step: Step) -> onnx.ModelProto | None:
    """Return the model of all ids that are computed, from the batch alone; None where the batch has them."""
    made = {name for item in source.items for name in item.makes}
    wanted = [name for t in tables for name in (*(ids for ids, _ in t.uses), t.ids)]
    wanted += [check.ids for check in step.id_checks]
    computed = list(dict.fromkeys(name for name in wanted if name in made))
    kept = prune(source.items, computed)
    depends = {name for item in kept for name in item.reads} - {name for item in kept for name in item.makes}
    other = sorted(depends - set(step.batch) - set(source.initializers))
    if other:
        raise _refused("the model", f"ids depend on '{other[0]}', not on the batch alone")
    by_value = [item for item in source.items if item.node.op_type not in ("Shape", "Size")]
    for table in tables:
        reads = {name for item in prune(by_value, [table.ids]) for name in item.reads} | {table.ids}
        if not reads & set(step.batch):
            raise _refused(
                f"the table '{table.parameter}'", "its ids are the same in every batch (positions)"
            )
    if not computed:
        return None
    as_inputs = set(source.inputs)
    return build_model(source, [item.node for item in kept], computed, name="route", as_inputs=as_inputs)


def _update_items(source: Source, tables: Sequence[Boundary], dense: dict[str, str], loss: str) -> list[Item]:
    """Return the nodes after the exchange: sums over ranks stand for what each rank made."""
    by_ids = {t.ids: t for t in tables}
    outside = {loss, *by_ids, *(t.row_gradient for t in tables), *dense}
    products = {_output_update(source.items, t).makes[0]: t for t in tables}
    samples = {id(s): t for t in tables if (s := _sample_of(source.items, t)) is not None}
    items: list[Item] = [_node("Identity", ["kfac/ranks/loss"], loss)]
    for item in source.items:
        node = item.node
        if outside.intersection(item.makes):
            continue
        if node.op_type == "OutputFactorUpdate" and item.makes[0] in products:
            items += _from_product(item, products[item.makes[0]])
        elif node.op_type == "InputFactorUpdate" and node.input[1] in by_ids:
            table = by_ids[node.input[1]]
            weighted = f"{table.prefix}/weighted"
            new = _node("Mul", [node.input[2], table.counts], weighted)
            items += [dataclasses.replace(new, phase=item.phase), _replaced(item, {2: weighted})]
        elif node.op_type == "Size" and node.input[0] in by_ids:
            # How many lookups there were, on all ranks.
            items.append(
                dataclasses.replace(_node("Identity", [by_ids[node.input[0]].lookups], item.makes[0]))
            )
        elif id(item) in samples:
            items.append(_replaced(item, {0: samples[id(item)].lookups}))
        else:
            items.append(item)
    return items


def _from_product(item: Item, table: Boundary) -> list[Item]:
    """G' = decay·G + (1 − decay)·scale·(P + Pᵀ)/(2M), P = Σ rowsᵀ·rows over ranks: as OutputFactorUpdate."""
    import numpy as np

    G, count, _, lookups, scale = item.node.input
    p = f"{table.prefix}/G"
    decay = np.float32(next(a.f for a in item.node.attribute if a.name == "decay"))
    fresh = np.float32((1.0 - np.float64(decay)) * 0.5)

    def constant(name: str, value: np.float32) -> Item:
        tensor = helper.make_tensor(f"{p}/{name}", TensorProto.FLOAT, [], [float(value)])
        return _node("Constant", [], f"{p}/{name}", value=tensor)

    any_lookup = _node("Greater", [lookups, f"{p}/zero"], f"{p}/any")
    return [
        constant("rho", decay),
        constant("fresh", fresh),
        constant("zero", np.float32(0)),
        any_lookup,
        _node("Div", [scale, lookups], f"{p}/share"),
        _node("Mul", [f"{p}/fresh", f"{p}/share"], f"{p}/taken"),
        _node("Transpose", [table.product], f"{p}/transposed", perm=[1, 0]),
        _node("Add", [table.product, f"{p}/transposed"], f"{p}/both"),
        _node("Mul", [f"{p}/taken", f"{p}/both"], f"{p}/batch"),
        _node("Mul", [f"{p}/rho", G], f"{p}/old"),
        _node("Add", [f"{p}/old", f"{p}/batch"], f"{p}/sum"),
        _node("Where", [f"{p}/any", f"{p}/sum", G], item.makes[0]),
        _node("Cast", [f"{p}/any"], f"{p}/one", to=TensorProto.INT64),
        _node("Add", [count, f"{p}/one"], item.node.output[1]),
    ]


def _check_reads(
    source: Source,
    items: Sequence[Item],
    tables: Sequence[Boundary],
    dense: dict[str, str],
    states: Sequence[State],
    step: Step,
) -> None:
    makes = {name for item in items for name in item.makes}
    reads = {name for item in items for name in item.reads} - makes
    exchanged = {"kfac/ranks/loss", *dense, *(name for t in tables for name in t.exchanged)}
    rates = {rate.input for rate in step.learning_rates}
    other = sorted(reads - exchanged - {s.input for s in states} - rates - set(source.initializers))
    if other:
        raise _refused(
            "the model", f"its update reads '{other[0]}', which each rank has of its own batch alone"
        )


def _check_rows(
    items: Sequence[Item], tables: Sequence[Boundary], states: Sequence[State], sharded: dict[str, str]
) -> None:
    """Raise UserError where the update would mix rows, or let a replicated state differ between ranks."""
    rows = {*sharded, *(name for t in tables for name in (t.ids, t.row_gradient, t.counts))}
    flags: set[str] = set()
    for item in items:
        node = item.node
        own = rows.intersection(item.reads)
        if item.phase in (Phase.SELECT, Phase.UNDO) and node.op_type == "Where":
            own = rows.intersection(node.input[1:])  # the host decides by everybody's flag
            if flags.intersection(node.input[1:]):
                raise _mixes(node)
            rows.update(item.makes if own else ())
            continue
        if flags.intersection(item.reads):
            conditional = node.op_type == "If" and item.phase == Phase.RENORMALIZE and own
            if not (conditional or (node.op_type in _FLAGS and not own)):
                raise _mixes(node)
            (rows if conditional else flags).update(item.makes)
        elif own and node.op_type == "AllFinite":
            flags.update(item.makes)
        elif own:
            rotates = node.op_type == "MatMul" and node.input[1] not in rows
            if node.op_type in _INDEXED and node.input[0] not in rows:
                raise _mixes(node)  # numbers of one rank's rows would index what is whole
            decays = node.op_type == "If" and item.phase == Phase.RENORMALIZE
            if not (node.op_type in _ROWWISE or rotates or decays):
                raise _mixes(node)
            rows.update(item.makes)
    for state in states:
        if state.input not in sharded and (state.candidate in rows | flags):
            raise _refused("the model", f"the state '{state.input}' would differ between ranks")


def _mixes(node: onnx.NodeProto) -> UserError:
    return _refused("the model", f"{node.op_type} '{node.name}' takes in all rows of a table at once")
