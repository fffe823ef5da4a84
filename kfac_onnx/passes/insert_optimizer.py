"""The pass that gives the other parameters an ordinary optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.fisher.place import Place
from kfac_onnx.fisher.row_scales import RowUpdate, merge_lookups
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.metadata import Parameter, Phase, Site
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.defaults import TABLE_DECAY
from kfac_onnx.passes.insertion.table_decay import with_decay
from kfac_onnx.passes.insertion.writing import as_float32, drop_gradient, keep_parameter, write_table
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.patterns import chosen
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, Draft

if TYPE_CHECKING:
    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["InsertOptimizer"]


@register
@dataclass(frozen=True, kw_only=True)
class InsertOptimizer(Pass):
    """Insert sgd, momentum, adam, adamw or adagrad for every parameter that has no optimizer yet.

    Reads   `kfac.parameters`, and what earlier passes already update.
    Adds    per parameter its new value and the optimizer's state, float32 of the parameter's shape
    Tables  with `parameters=tables` or `all`, embedding tables too, for comparison: sgd and adagrad on
            the looked-up rows (repeated rows merged), momentum and adam on the whole table.
    Decay   decoupled: W ← W·(1 − lr·decay) before the optimizer's own step, of tensors of two or more
            dimensions alone (biases and gains are left); of tables `table-decay`.
    Source  Kingma & Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter 2019,
            algorithm 2, https://arxiv.org/abs/1711.05101; Duchi et al. 2011, section 1.1,
            https://jmlr.org/papers/v12/duchi11a.html
    """

    name: ClassVar[str] = "insert-optimizer"
    method: Literal["sgd", "momentum", "adam", "adamw", "adagrad"] = opt(
        "adam", "the optimizer; adamw is adam with decay"
    )
    parameters: Literal["rest", "tables", "all"] = opt("rest", "which parameters get it")
    only: tuple[str, ...] = opt((), "patterns of the parameters that get it; all of that kind if none")
    lr: float = opt(1e-3, "learning rate", lo=0.0)
    rate: str | None = opt(None, "name of the learning-rate input: kfac/lr of tables, kfac/rest_lr if none")
    weight_decay: float | None = opt(
        None, "decoupled decay of matrices: 0.01 for adamw, otherwise 0 if none", lo=0.0, hi=1.0
    )
    decay_vectors: bool = opt(False, "decay biases and gains (tensors of one dimension) too")
    table_decay: float = opt(0.0, TABLE_DECAY, lo=0.0, hi=1.0)
    momentum: float = opt(0.9, "weight kept from the old velocity (momentum)", lo=0.0, hi=1.0)
    beta1: float = opt(0.9, "weight kept from the old first moment (adam, adamw)", lo=0.0, hi=1.0)
    beta2: float = opt(0.999, "weight kept from the old second moment (adam, adamw)", lo=0.0, hi=1.0)
    epsilon: float | None = opt(
        None, "added to the root: 1e-8 for adam, 1e-10 for adagrad if none", lo=0.0, hi=1.0
    )

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError for a pattern that no trained parameter matches, and for a decay of tables where
        there can be none.
        """
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        sites = {site.parameter: site for site in metadata.read_list(model, "sites", Site)}
        parameters = metadata.read_list(model, "parameters", Parameter)
        only = chosen([item.name for item in parameters], self.only, context=self.name)
        if self.table_decay and (self.parameters == "rest" or (self.only and not only & sites.keys())):
            raise UserError(
                "table-decay is set, and this optimizer gets no embedding table",
                context=self.name,
                help="weight-decay is that of other parameters; `scan MODEL` lists the tables",
            )
        for parameter in parameters:
            if parameter.name in done or parameter.gradient is None or parameter.name not in draft.values:
                continue
            site = sites.get(parameter.name)
            if self.only and parameter.name not in only:
                continue
            if (self.parameters == "rest" and site is not None) or (
                self.parameters == "tables" and site is None
            ):
                continue
            usual = "kfac/lr" if self.parameters == "tables" else "kfac/rest_lr"
            rate = draft.learning_rate(self.rate or usual, self.lr)
            with draft.at(emitter.derive(site=parameter.name)):
                drop_gradient(draft, parameter.gradient)
                if site is not None and self.table_decay:
                    draft.set_decay(site.parameter, self.table_decay)
                whole = site is None or site.dense is not None or site.penalty is not None
                if site is not None and not whole and self.method in ("sgd", "adagrad"):
                    self._rows(site, rate, draft)
                else:
                    self._dense(
                        parameter.name, draft.value(parameter.gradient), rate, draft, table=site is not None
                    )
            log.count("parameters")
        draft.set_optimizer(self.parameters, self.method)
        draft.save()
        return emitter.changes

    def _epsilon(self) -> float:
        if self.epsilon is not None:
            return self.epsilon
        return 1e-10 if self.method == "adagrad" else 1e-8

    def _rows(self, site: Site, rate: ir.Value, draft: Draft) -> None:
        """Plain sgd or adagrad on a table's looked-up rows."""
        if site.ids is None or site.rows is None:
            raise AssertionError("find-embeddings marks the ids and rows of every site")
        ids, rows = draft.value(site.ids), draft.value(site.rows)
        draft.flag(rows)
        if self.method == "sgd":
            self._write(site, RowUpdate(ids, rows, unique=False), rate, draft)
            return
        V, D = site.vocab_size, site.embedding_dim
        table = Place(draft, f"kfac/{site.parameter}", site.parameter)
        ids, places, rows = merge_lookups(ids, rows, V, table)
        old = draft.state(
            f"kfac/{site.parameter}/acc", FLOAT, [V, D], "zeros", "optimizer", parameter=site.parameter
        )
        held = draft.emitter.node(
            "Gather", [old, ids], name="acc_before", phase=Phase.PRECONDITION, dtype=FLOAT, shape=[None, D]
        )
        draft.remember(held)
        outs = [Out("update", FLOAT, [None, D]), Out("acc", FLOAT, [None, D])]
        update, new = draft.op(
            "RowElementAdagradStep", [rows, places, held], outs, Phase.PRECONDITION, epsilon=self._epsilon()
        )
        draft.flag(update, new)
        (written,) = draft.op("WriteRows", [old, ids, new], [Out("acc", FLOAT, [V, D])], Phase.COMMIT)
        node = written.producer()
        if node is not None:
            draft.guard(node, 2, held)
        draft.write(old, written, Phase.COMMIT)
        self._write(site, RowUpdate(ids, update, unique=False), rate, draft)

    def _write(self, site: Site, result: RowUpdate, rate: ir.Value, draft: Draft) -> None:
        if self.table_decay:
            result, rate = with_decay(site, result, rate, self.table_decay, draft)
        write_table(site, result, rate, draft)

    def _decay(self, shape: list[int]) -> float:
        """Return the decay of a tensor that is no table."""
        if len(shape) < 2 and not self.decay_vectors:
            return 0.0
        return (0.01 if self.method == "adamw" else 0.0) if self.weight_decay is None else self.weight_decay

    def _dense(self, name: str, gradient: ir.Value, rate: ir.Value, draft: Draft, *, table: bool) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        weight = draft.parameter(name)
        weights, g = as_float32(emit, weight, "W"), as_float32(emit, gradient, "g")
        shape = [int(dim) for dim in (weight.shape or ()) if isinstance(dim, int)]
        draft.flag(g)
        decay = self.table_decay if table else self._decay(shape)
        if decay:
            outs = [Out("decayed", FLOAT, shape)]
            (decayed,) = draft.op("DecayWeights", [weights, rate], outs, Phase.PRECONDITION, decay=decay)
            weights = decayed

        def moment(what: str) -> ir.Value:
            return draft.state(f"kfac/{name}/{what}", FLOAT, shape, "zeros", "optimizer", parameter=name)

        def made(*names: str) -> list[Out]:
            return [Out(item, FLOAT, shape) for item in names]

        phase = Phase.PRECONDITION
        match self.method:
            case "sgd":
                (new,) = draft.op("Sgd", [weights, g, rate], made("new"), phase)
            case "momentum":
                v = moment("velocity")
                new, new_v = draft.op(
                    "Momentum", [weights, g, v, rate], made("new", "velocity"), phase, mu=self.momentum
                )
                draft.keep(v, new_v, phase)
            case "adam" | "adamw":
                m, v = moment("m"), moment("v")
                inputs = [weights, g, m, v, draft.step_number(), rate]
                betas = {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self._epsilon()}
                new, new_m, new_v = draft.op("Adam", inputs, made("new", "m", "v"), phase, **betas)
                draft.keep(m, new_m, phase)
                draft.keep(v, new_v, phase)
                draft.flag(new_v)
            case "adagrad":
                acc = moment("acc")
                inputs = [weights, g, acc, rate]
                new, new_acc = draft.op("Adagrad", inputs, made("new", "acc"), phase, epsilon=self._epsilon())
                draft.keep(acc, new_acc, phase)
                draft.flag(new_acc)
        draft.flag(new)
        keep_parameter(draft, weight, new)
