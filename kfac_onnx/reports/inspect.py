"""What was inserted into a model, what it holds and what it costs, read from the model file alone.

Costs come from the dialect's table of operators. They are linear in the number of lookups N, so a
report gives `fixed + per_lookup · N`; N itself is the graph's own expression, such as `batch*16`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes as _  # noqa: F401  gives NumPy the dtype bfloat16
import numpy as np

from kfac_onnx import dialect
from kfac_onnx.disk.models import as_model
from kfac_onnx.errors import UserError
from kfac_onnx.errors.signatures import checked
from kfac_onnx.graph.invalid import blames_the_graph
from kfac_onnx.graph.values import constant
from kfac_onnx.graph.verifier import require_sound
from kfac_onnx.markup import element, quantity, rows_table
from kfac_onnx.metadata import (
    Account,
    Parameter,
    Phase,
    Refusal,
    Site,
    State,
    Step,
    StepSettings,
    read,
    read_list,
)
from kfac_onnx.runtime.saved.saved_run import is_checkpoint, read_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx
    import onnx_ir as ir

__all__ = ["Group", "Inspection", "LinearCost", "NodeReport", "SiteReport", "inspect", "node_cost"]

_FLOAT: Final = 4
_PLUMBING: Final = "shape and copy values between the operators above"
_EACH_STEP: Final = (Phase.GRADIENTS, Phase.COUNT, Phase.PRECONDITION, Phase.COMMIT)
"""Phases that run at every step that is kept."""
_STATISTICS: Final = ("SampleRows", "OutputFactorUpdate")
"""Operators that run on the rows that G takes in, if it takes in this step."""
_PHASE_ORDER: Final = {str(phase): index for index, phase in enumerate(Phase)}


@dataclass(frozen=True)
class LinearCost:
    """Floating-point operations and bytes moved: a fixed part, and a part for each lookup."""

    flops: int = 0
    bytes: int = 0
    flops_per_lookup: int = 0
    bytes_per_lookup: int = 0

    def __add__(self, other: LinearCost) -> LinearCost:
        return LinearCost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.flops_per_lookup + other.flops_per_lookup,
            self.bytes_per_lookup + other.bytes_per_lookup,
        )

    def at(self, lookups: int) -> tuple[int, int]:
        """Return (FLOPs, bytes) for that many lookups."""
        return self.flops + self.flops_per_lookup * lookups, self.bytes + self.bytes_per_lookup * lookups

    def text(self, lookups: int | None = None) -> str:
        """Return the cost in words: of that many lookups, or the fixed part and that of each lookup."""
        if lookups is not None:
            flops, moved = self.at(lookups)
            return f"{quantity(flops, 'FLOP')}, {quantity(moved, 'B')}"
        parts: list[str] = []
        if self.flops or self.bytes:
            parts.append(f"{quantity(self.flops, 'FLOP')}, {quantity(self.bytes, 'B')}")
        if self.flops_per_lookup or self.bytes_per_lookup:
            each = f"{quantity(self.flops_per_lookup, 'FLOP')}, {quantity(self.bytes_per_lookup, 'B')}"
            parts.append(f"{each} per lookup")
        return " + ".join(parts) or "none"


@dataclass(frozen=True)
class Group:
    """Inserted nodes that do one thing in one phase."""

    phase: str
    operator: str
    meaning: str
    nodes: tuple[str, ...]
    cost: LinearCost


@dataclass(frozen=True)
class NodeReport:
    """One node of the graph: where it runs and who put it there (null: it came with the graph)."""

    name: str
    operator: str
    phase: str
    site: str | None
    made_by: str | None


@dataclass(frozen=True)
class SiteReport:
    """One table: sizes, state and cost.

    `uses` counts the operators that look rows up, `statistics` says what the factors take in; `decay` is the
    decoupled decay of its rows.
    `lookups` is the number of lookups per step as an expression in the graph's dimensions,
    `factors` maps each factor to its shape, `state_bytes` is everything kept for the table besides the
    table, `adam_bytes` what Adam would keep (two tables). `step_cost` is paid at each step,
    `refresh_cost` at refresh steps only, `statistics_cost` (part of neither) at steps that update G, where
    these are not all.
    """

    parameter: str
    vocab_size: int
    embedding_dim: int
    dtype: str
    layout: str
    tied: bool
    uses: int
    statistics: str
    lookups: str
    factors: Mapping[str, tuple[int, ...]]
    states: Mapping[str, tuple[int, ...]]
    state_bytes: int
    adam_bytes: int
    groups: tuple[Group, ...]
    step_cost: LinearCost
    refresh_cost: LinearCost
    statistics_cost: LinearCost = LinearCost()
    decay: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class ParameterReport:
    """One other trained parameter: its optimizer and the bytes that the optimizer keeps."""

    name: str
    shape: tuple[int, ...]
    optimizer: str | None
    state_bytes: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `kfac-onnx inspect` shows."""

    pipeline: str | None
    shape: str | None
    settings: StepSettings
    sites: tuple[SiteReport, ...]
    others: tuple[ParameterReport, ...]
    refused: tuple[Refusal, ...]
    accounts: tuple[Account, ...]
    nodes: tuple[NodeReport, ...]

    @property
    def nodes_by_phase(self) -> dict[str, int]:
        """Number of nodes in each phase, in the order in which phases run."""
        counts = Counter(node.phase for node in self.nodes)
        return dict(sorted(counts.items(), key=lambda item: _PHASE_ORDER.get(item[0], len(_PHASE_ORDER))))

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        sites = rows_table(
            ["table", "V x D", "dtype", "state ", "Adam's ", "each step", "each refresh"],
            [
                (s.parameter, f"{s.vocab_size} x {s.embedding_dim}", s.dtype, quantity(s.state_bytes, "B"),
                 quantity(s.adam_bytes, "B"), s.step_cost.text(), s.refresh_cost.text())
                for s in self.sites
            ],
            name=None,
        )  # fmt: skip
        others = rows_table(
            ["other parameter", "shape", "optimizer", "state "],
            [(p.name, list(p.shape), p.optimizer, quantity(p.state_bytes, "B")) for p in self.others],
            name=None,
        )
        return element("div", sites, others, element("p", f"pipeline: {self.pipeline}"))

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON data."""
        return asdict(self) | {"nodes_by_phase": self.nodes_by_phase}


@checked
@blames_the_graph
def inspect(source: str | Path | ir.Model | onnx.ModelProto) -> Inspection:
    """Return what was inserted into a model: a file, a checkpoint or a folder of them, or one in memory.

    Raises UserError for a model that no pipeline of this package has transformed, or that contradicts itself,
    and for a file that is none.
    """
    if isinstance(source, (str, Path)) and str(source) != "-" and is_checkpoint(source):
        model = read_run(source).model
    else:
        model = as_model(source)
    step = read(model, "step", Step)
    states = read_list(model, "state", State)
    if step is None and not states:
        raise UserError(
            "the model has not been transformed, so there is nothing to inspect",
            help="run `kfac-onnx transform MODEL -o OUT` first, or `kfac-onnx scan MODEL`",
        )
    require_sound(model, None)
    nodes = list(model.graph.all_nodes())
    sites = read_list(model, "sites", Site)
    tables = {site.parameter for site in sites}
    settings = StepSettings() if step is None else step.settings
    return Inspection(
        pipeline=model.metadata_props.get("kfac.pipeline"),
        shape=None if step is None else step.shape,
        settings=settings,
        sites=tuple(_site(site, model, nodes, states, settings) for site in sites),
        others=tuple(
            _other(parameter, nodes, states)
            for parameter in read_list(model, "parameters", Parameter)
            if parameter.name not in tables
        ),
        refused=tuple(read_list(model, "refused", Refusal)),
        accounts=tuple(read_list(model, "accounts", Account)),
        nodes=tuple(_node(node) for node in nodes),
    )


def _node(node: ir.Node) -> NodeReport:
    tags = node.metadata_props
    return NodeReport(
        name=_name(node),
        operator=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        phase=tags.get("kfac.phase", str(Phase.GRADIENTS)),
        site=tags.get("kfac.site"),
        made_by=tags.get("kfac.pass"),
    )


def _name(node: ir.Node) -> str:
    return node.name or next((str(value.name) for value in node.outputs if value.name), node.op_type)


def _statistics(site: Site, settings: StepSettings, nodes: Iterable[ir.Node]) -> str:
    """Return in words what the factors of a table take in, and how its uses are put together."""
    parts = (_uses(site, settings), _sample(_sample_size(nodes), settings.g_every))
    return "; ".join(part for part in parts if part)


def _sample_size(nodes: Iterable[ir.Node]) -> int | None:
    """Return how many rows of a batch a table's G takes at most, as its nodes say; None if all."""
    for node in nodes:
        if node.op_type != "SampleRows" or node.inputs[1] is None:
            continue
        wanted = node.inputs[1]
        gate = wanted.producer()  # TakeNow: so many in the steps that G takes, none in the others
        size = constant(wanted if gate is None else gate.inputs[0])
        if size is not None:
            return int(size)
    return None


def _sample(rows: int | None, every: int) -> str:
    """Return in words which rows G takes in, and when; empty where it is all rows of each step."""
    if rows is None and every == 1:
        return ""
    of = "G from all rows" if rows is None else f"G from at most {rows} rows"
    return of if every == 1 else f"{of}, in steps 1, 2, 4, 8 and multiples of {every}"


def _uses(site: Site, settings: StepSettings) -> str:
    both = settings.tied in ("auto", "both") and bool(site.projections)
    count = len(site.uses) + (len(site.projections) if both else 0)
    of = "lookups and projection" if both else "lookups"
    if settings.uses != "multi-indep" or count == 1:
        return of if count == 1 else f"{of}, {count} uses stacked"
    return f"{of}, {count} independent uses: damping λ/{count}, coefficient {count}"


def _site(
    site: Site,
    model: ir.Model,
    nodes: Iterable[ir.Node],
    states: Iterable[State],
    settings: StepSettings,
) -> SiteReport:
    mine = [state for state in states if state.parameter == site.parameter and state.role != "parameter"]
    own = [node for node in nodes if node.metadata_props.get("kfac.site") == site.parameter]
    # Priced by the lookup, as batches below the default bound are; `g-rows` is meant to be below.
    groups = _groups(own, site, settings.g_rows)
    rare = _STATISTICS if settings.g_every > 1 else ()
    return SiteReport(
        parameter=site.parameter,
        vocab_size=site.vocab_size,
        embedding_dim=site.embedding_dim,
        dtype=site.dtype,
        layout=site.layout,
        tied=bool(site.dense_uses),
        uses=len(site.uses),
        statistics=_statistics(site, settings, own) if settings.preset is not None else "none",
        lookups=_lookups(site, model),
        factors={state.input: state.shape for state in mine if state.role == "factor"},
        states={state.input: state.shape for state in mine},
        state_bytes=_bytes(mine),
        adam_bytes=2 * _FLOAT * site.vocab_size * site.embedding_dim,
        groups=groups,
        step_cost=sum(
            (g.cost for g in groups if g.phase in _EACH_STEP and g.operator not in rare), LinearCost()
        ),
        refresh_cost=sum((group.cost for group in groups if group.phase == Phase.REFRESH), LinearCost()),
        statistics_cost=sum((group.cost for group in groups if group.operator in rare), LinearCost()),
        decay=settings.table_decay.get(site.parameter, 0.0),
    )


def _bytes(states: Iterable[State]) -> int:
    """Return the bytes of states that hold something from step to step."""
    return sum(
        math.prod(state.shape) * np.dtype(state.dtype).itemsize for state in states if state.role != "scratch"
    )


def _lookups(site: Site, model: ir.Model) -> str:
    """Return the number of lookups per step as text: a number, or a sum of products of dimensions."""
    shapes: dict[str, ir.Shape] = {}
    for node in model.graph:
        shapes.update((str(value.name), value.shape) for value in node.outputs if value.shape is not None)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.shape is not None:
            shapes[str(value.name)] = value.shape
    terms: list[str] = []
    for use in site.uses:
        shape = shapes.get(use.output)
        dims = None if shape is None else list(shape)[: -1 if len(shape) > 1 else None]
        if dims is None or any(not isinstance(dim, int) and dim.value is None for dim in dims):
            terms.append(f"rows({use.output})")
            continue
        number = math.prod(dim for dim in dims if isinstance(dim, int))
        symbols = [str(dim.value) for dim in dims if not isinstance(dim, int)]
        terms.append("*".join([*symbols, *([str(number)] if number != 1 or not symbols else [])]))
    if all(term.isdecimal() for term in terms):
        return str(sum(int(term) for term in terms))
    return " + ".join(f"{count}*{term}" if count > 1 else term for term, count in Counter(terms).items())


def _groups(nodes: list[ir.Node], site: Site, g_rows: int | None) -> tuple[Group, ...]:
    members: dict[tuple[str, str, str], list[ir.Node]] = {}
    for node in nodes:
        phase = node.metadata_props.get("kfac.phase", str(Phase.GRADIENTS))
        if node.domain == dialect.DOMAIN and node.op_type in dialect.OPERATORS:
            key = (phase, node.op_type, dialect.OPERATORS[node.op_type].meaning)
        else:
            key = (phase, "standard operators", _PLUMBING)
        members.setdefault(key, []).append(node)
    ordered = sorted(
        members.items(),
        key=lambda item: (_PHASE_ORDER.get(item[0][0], len(_PHASE_ORDER)), item[0][2] == _PLUMBING),
    )
    return tuple(
        Group(
            *key,
            tuple(_name(node) for node in found),
            sum((node_cost(node, site, g_rows) for node in found), LinearCost()),
        )
        for key, found in ordered
    )


def node_cost(node: ir.Node, site: Site, g_rows: int | None) -> LinearCost:
    """Return a dialect node's cost on this table; standard operators around it count as free.

    What sees a sample of at most `g_rows` rows is priced for that many.
    """
    operator = dialect.OPERATORS.get(node.op_type) if node.domain == dialect.DOMAIN else None
    if operator is None:
        return LinearCost()
    shape = node.inputs[0].shape if operator.name == "AllFinite" and node.inputs[0] is not None else None
    if shape is not None and shape.is_static():  # a factor or a loss: its own size, whatever the table's
        fixed = operator.cost(dialect.Sizes(V=1, D=math.prod(shape.numpy()), N=1))
        return LinearCost(fixed.flops, fixed.bytes)
    iterations = node.attributes.get("iterations")
    count = 15 if iterations is None else iterations.as_int()
    if g_rows is not None and operator.name in _STATISTICS:
        most = operator.cost(dialect.Sizes(site.vocab_size, site.embedding_dim, g_rows, count))
        return LinearCost(most.flops, most.bytes)
    none, one = (
        operator.cost(dialect.Sizes(site.vocab_size, site.embedding_dim, lookups, count))
        for lookups in (0, 1)
    )
    return LinearCost(none.flops, none.bytes, one.flops - none.flops, one.bytes - none.bytes)


_OPTIMIZERS: Final = {
    "MuonDirection": "Muon",
    "OutputRowScale": "OutputRows",
    "LayerMomentum": "LayerKfac",
    "Momentum": "Momentum",
    "Adam": "Adam",
    "Adagrad": "Adagrad",
    "Sgd": "Sgd",
}
"""Operators that tell an optimizer; the last step of the first ones is an Sgd."""


def _other(parameter: Parameter, nodes: Iterable[ir.Node], states: Iterable[State]) -> ParameterReport:
    operators = {
        node.op_type
        for node in nodes
        if node.metadata_props.get("kfac.site") == parameter.name and node.domain == dialect.DOMAIN
    }
    optimizers = [name for operator, name in _OPTIMIZERS.items() if operator in operators]
    mine = [state for state in states if state.parameter == parameter.name and state.role == "optimizer"]
    return ParameterReport(
        parameter.name, parameter.shape, optimizers[0] if optimizers else None, _bytes(mine)
    )
