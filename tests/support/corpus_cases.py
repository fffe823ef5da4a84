"""The committed training graphs with their sidecars, and the float64 reference of a whole step on them.

The reference knows nothing of how the product finds tables: ids and dL/d(rows) come from the marked
canonical graph run by ONNX Runtime at each step's weights, and are checked against the exporter's own dense
gradient and, at the first batch, against torch's numbers in the sidecar.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from shared_readings import read_once

from kfac_onnx import metadata
from kfac_onnx.metadata import Loss, Parameter, Site, State
from kfac_onnx.passes.find_embeddings import FindEmbeddings, values_by_name
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.reference import (
    AdagradReference,
    AdamReference,
    MomentumReference,
    SgdReference,
    TableReference,
)

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
OPTIMIZERS = {
    "adam": AdamReference,
    "sgd": SgdReference,
    "momentum": MomentumReference,
    "adagrad": AdagradReference,
}


@dataclass
class Case:
    """One exported graph: its file, its sidecar, and two feeds."""

    name: str
    folder: Path = GRAPHS
    sidecar: dict[str, Any] = field(init=False)
    arrays: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.sidecar = json.loads((self.folder / f"{self.name}.json").read_text())
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as data:
            self.arrays = {key: data[key] for key in data.files}
        for key, array in self.arrays.items():  # the sidecars store bfloat16 as uint16 bit patterns
            if array.dtype == np.uint16:
                self.arrays[key] = array.view(ml_dtypes.bfloat16)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.onnx"

    def feed(self, which: str = "in") -> dict[str, np.ndarray]:
        """Return a full feed, parameters included."""
        feed = {key.removeprefix("in:"): value for key, value in self.arrays.items() if key.startswith("in:")}
        prefix = f"{which}:"
        feed.update(
            (key.removeprefix(prefix), value) for key, value in self.arrays.items() if key.startswith(prefix)
        )
        return feed


def case_names(*prefixes: str) -> list[str]:
    """Return the committed graphs whose names start with one of these exporters."""
    names = sorted(path.stem for path in GRAPHS.glob("*.onnx"))
    return [name for name in names if name.startswith(prefixes)]


class MarkedGraph:
    """The canonical graph with the values of every site as outputs, run by plain ONNX Runtime."""

    def __init__(self, case: Case, padding: dict[str, int] | None = None) -> None:
        self.model = read_once(case.path)
        self.parameters = metadata.read_list(self.model, "parameters", Parameter)
        words = tuple(f"{name}={row}" for name, row in (padding or {}).items())
        parse_pipeline(str(FindEmbeddings(padding=words))).run(self.model)
        self.sites = metadata.read_list(self.model, "sites", Site)
        values = values_by_name(self.model)
        wanted = [name for site in self.sites for name in (site.ids, site.rows, site.keep) if name]
        products = [product for site in self.sites for product in site.projections]
        wanted += [name for product in products for name in (product.left, product.right)]
        loss = metadata.read(self.model, "loss", Loss) or Loss(None)
        self.loss, self.predictions = loss.value, loss.predictions
        wanted += [item.gradient for item in self.parameters if item.gradient]
        from kfac_onnx.readers import emit_divisor

        divisor = emit_divisor(self.model)
        self.divisor = None if divisor is None else str(divisor.name)
        values = values_by_name(self.model)
        if self.divisor is not None:
            wanted.append(self.divisor)
        outputs = self.model.graph.outputs
        outputs.clear()
        ends = [*self.predictions] if self.loss is None else [self.loss]
        self.names = list(dict.fromkeys([*ends, *wanted]))
        for name in self.names:  # bfloat16 has no NumPy dtype: read it as float32
            cast = (
                ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT}) if is_bf16(values[name]) else None
            )
            if cast is not None:
                self.model.graph.append(cast)
            outputs.append(values[name] if cast is None else cast.outputs[0])
        self.stored: dict[str, np.ndarray] = {}
        for item in self.parameters:  # the reference feeds every weight, also those stored in the file
            value = values[item.name]
            if not value.is_graph_input():
                self.model.graph.inputs.append(value)
            held = self.model.graph.initializers.pop(item.name, None)
            if held is not None:
                self.stored[item.name] = np.array(held.const_value.numpy())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        proto = ir.to_proto(self.model).SerializeToString()
        self.session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item.type for item in self.session.get_inputs()}

    @property
    def half(self) -> bool:
        """Whether any value of the graph is half precision."""
        values = (value for node in self.model.graph for value in node.outputs)
        return any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in values)

    def initial(self, case: Case) -> dict[str, np.ndarray]:
        """Return every parameter's starting value."""
        feed = case.feed()
        return {
            item.name: feed[item.name] if item.name in feed else self.stored[item.name]
            for item in self.parameters
        }

    def fed_back(self, case: Case) -> dict[str, np.ndarray]:
        """Return the sidecar's gradients of the predictions where the loss lies outside the graph."""
        given = {key.removeprefix("yield:"): a for key, a in case.arrays.items() if key.startswith("yield:")}
        return {fed: given[name] for name, fed in self.predictions.items() if fed is not None}

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every output as an array."""
        values = {}
        for name, array in feed.items():
            if name not in self.inputs:
                continue
            if array.dtype == ml_dtypes.bfloat16:
                bits = array.view(np.uint16)
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
            else:
                values[name] = ort.OrtValue.ortvalue_from_numpy(array)
        results = self.session.run_with_ort_values([item.name for item in self.session.get_outputs()], values)
        return {name: item.numpy() for name, item in zip(self.names, results, strict=True)}


@functools.cache
def marked(name: str) -> tuple[Case, MarkedGraph]:
    """Return a committed graph and its marked canonical form; made once."""
    case = Case(name)
    return case, MarkedGraph(case)


def is_bf16(value: ir.Value) -> bool:
    """Say whether a value is bfloat16."""
    return value.dtype == ir.DataType.BFLOAT16


class StepReference:
    """A whole training step in float64 from gradients that somebody else computed."""

    def __init__(
        self,
        graph: MarkedGraph,
        weights: dict[str, np.ndarray],
        preset: str,
        lr: float,
        rest: str,
        rest_lr: float,
        *,
        uses: str = "stack",
        tied: str = "auto",
        g_rows: int | None = None,
        g_every: int = 1,
        table_decay: float = 0.0,
    ) -> None:
        self.graph = graph
        self.tied = tied
        self.dtypes = {name: value.dtype for name, value in weights.items()}
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.tables = {
            site.parameter: TableReference(
                preset,
                site.vocab_size,
                site.embedding_dim,
                lr,
                num_uses=self.uses_of(site) if uses == "multi-indep" else 1,
                g_rows=g_rows,
                g_every=g_every,
                table_decay=table_decay,
            )
            for site in graph.sites
        }
        names = [item.name for item in graph.parameters if item.name not in self.tables]
        self.rest = {name: OPTIMIZERS[rest](lr=rest_lr) for name in names}

    def uses_of(self, site: Site) -> int:
        """Return how many uses of a table have statistics."""
        return len(site.uses) + (len(site.projections) if self.tied != "lookup" else 0)

    def projections(self, site: Site, out: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (δ[P, V], h[P, D]) of every projection that has statistics."""
        pairs = []
        for product in site.projections if self.tied != "lookup" else ():
            left = np.moveaxis(np.asarray(out[product.left], np.float64), product.left_axis, -1)
            right = np.moveaxis(np.asarray(out[product.right], np.float64), product.right_axis, -1)
            pairs.append((left.reshape(-1, site.vocab_size), right.reshape(-1, site.embedding_dim)))
        return pairs

    def feed(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a feed at this reference's weights, rounded to the graph's dtypes."""
        return {**batch, **{name: value.astype(self.dtypes[name]) for name, value in self.weights.items()}}

    def step(self, out: dict[str, np.ndarray]) -> None:
        """Advance by the gradients in `out`, which were computed at `feed`."""
        graph = self.graph
        gradients = {item.name: item.gradient for item in graph.parameters}
        scale = 1.0 if graph.divisor is None else float(out[graph.divisor])
        for site in graph.sites:
            ids, rows = out[site.ids], out[site.rows]
            keep = None if site.keep is None else out[site.keep]
            stored = np.asarray(out[gradients[site.parameter]], np.float64)
            table = to_table(self.weights[site.parameter], site)
            scattered = np.zeros((site.vocab_size, site.embedding_dim))
            np.add.at(scattered, ids, np.asarray(rows, np.float64))
            dense = None
            if site.dense is not None:
                dense = to_table(stored, site) - scattered
            pairs = self.projections(site, out)
            if pairs:  # what is counted is what the exporter's gradient is made of
                error = np.abs(sum(left.T @ right for left, right in pairs) - dense).max()
                assert error <= 1e-5 * np.abs(dense).max()
            new = self.tables[site.parameter].step(table, ids, rows, keep, scale, dense, pairs)
            self.weights[site.parameter] = from_table(new, site, self.weights[site.parameter].shape)
        for name, optimizer in self.rest.items():
            self.weights[name] = optimizer.step(
                self.weights[name], np.asarray(out[gradients[name]], np.float64)
            )


def to_table(stored: np.ndarray, site: Site) -> np.ndarray:
    """Return a stored tensor as [V, D]."""
    if site.layout == "columns":
        return stored.T
    return stored.reshape(site.vocab_size, site.embedding_dim)


def from_table(table: np.ndarray, site: Site, shape: tuple[int, ...]) -> np.ndarray:
    """Return [V, D] in the layout of the parameter."""
    return table.T if site.layout == "columns" else table.reshape(shape)


def initial_state(state: State, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Return a state's first value, as its declaration says."""
    match state.initial:
        case "parameter":
            return weights[str(state.parameter)]
        case "zeros":
            return np.zeros(state.shape, state.dtype)
        case "ones":
            return np.ones(state.shape, state.dtype)
        case "identity":
            return np.eye(state.shape[0], dtype=state.dtype)
        case number:
            return np.full(state.shape, float(number), state.dtype)
