"""The table of all operators of `ai.kfac` version 1. One row, one operator; formulas are in `bodies`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from kfac_onnx.dialect.signature import Attribute, Cost, Operator, Sizes, Variant, ports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DOMAIN", "OPERATORS", "VERSION"]

DOMAIN: Final = "ai.kfac"
VERSION: Final = 1

Scatters = Literal["rows", "entries"]
"""What an operator adds at ids; for single entries ScatterElements is as fast as a sequential ScatterND."""

_DECAY = Attribute("decay", "float", 0.0, 1.0)
_DEBIAS = Attribute("debias", "int", 0, 1)
_VOCAB = Attribute("vocab_size", "int", 1, 2**62)
_EXPONENT = Attribute("exponent", "float", -64.0, 64.0)
_EPSILON = Attribute("epsilon", "float", 0.0, 1.0)
_BETAS = (Attribute("beta1", "float", 0.0, 1.0), Attribute("beta2", "float", 0.0, 1.0))


_DEVICE: Final[Mapping[str, Mapping[Variant, str]]] = {
    "merge_rows": {"atomic": "merge_rows_sorted", "ordered": "merge_rows_ordered"},
    "apply_flat": {"atomic": "apply_flat_device", "ordered": "apply_flat_ordered"},
    "sample_rows": {"atomic": "sample_rows_device", "ordered": "sample_rows_device"},
    "merge_lookups": {"atomic": "merge_lookups_device", "ordered": "merge_lookups_ordered"},
    "take_now": {"atomic": "take_now_device", "ordered": "take_now_device"},
    **{
        name: {"ordered": f"{name}_ordered"}
        for name in (
            "add_rows", "apply_columns", "apply_rows",
            "input_factor_average", "input_factor_update", "scatter_rows",
        )
    },
}  # fmt: skip
"""Bodies for devices, in `bodies.sorted_rows`, where the one for hosts does not do."""


def _bodies(module: str, name: str, scatters: Scatters | None) -> dict[Variant, tuple[str, str]]:
    slow, fast = (module, f"{name}_elements"), (module, f"{name}_nd")
    if scatters is None:
        slow = fast = (module, name)
    bodies: dict[Variant, tuple[str, str]] = {
        "safe": slow,
        "sequential": fast if scatters == "rows" else slow,
        "atomic": fast,
        "ordered": fast,
    }
    for variant, body in _DEVICE.get(name, {}).items():
        bodies[variant] = ("sorted_rows", body)
    return bodies


def _operator(
    name: str,
    meaning: str,
    body: str,
    signature: str,
    attributes: tuple[Attribute, ...] = (),
    *,
    cost: Callable[[Sizes], tuple[int, int]],
    scatters: Scatters | None = None,
) -> Operator:
    inputs, outputs = signature.split("->")
    module, function = body.split(".")

    def priced(sizes: Sizes) -> Cost:
        flops, moved = cost(sizes)
        return Cost(flops, moved)

    bodies = _bodies(module, function, scatters)
    return Operator(name, meaning, ports(inputs), ports(outputs), attributes, bodies, priced)


def _scalar(sizes: Sizes) -> tuple[int, int]:
    return 20, 64


_TABLE = (
    _operator(
        "InputFactorDecay",
        "advance the running scale of the input factor A by one batch",
        "input_factor.input_factor_decay",
        "scale:f64[] total:f64[] count:i64[] lookups:f32[] -> "
        "scale:f64[] total:f64[] count:i64[] increment:f32[] gain:f32[] total_a:f32[]",
        (Attribute("decay", "float", 0.0, 1.0, open_lo=True), _DEBIAS, Attribute("normalize", "int", 0, 1)),
        cost=_scalar,
    ),
    _operator(
        "InputFactorUpdate",
        "add each lookup's increment to A at the row it read",
        "input_factor.input_factor_update",
        "A:f64[V] ids:i64[N] increments:f64[N] -> A:f64[V]",
        cost=lambda s: (s.N, 32 * s.N),
        scatters="entries",
    ),
    _operator(
        "InputFactorAverage",
        "average the batch's counts into A over the whole vocabulary",
        "input_factor.input_factor_average",
        "A:f32[V] ids:i64[N] weights:f32[N] lookups:f32[] -> A:f32[V]",
        (_DECAY,),
        cost=lambda s: (5 * s.V + s.N, 24 * s.V + 20 * s.N),
    ),
    _operator(
        "OutputFactorUpdate",
        "average the batch's second moment of gradient rows into G",
        "output_factor.output_factor_update",
        "G:f32[D,D] count:i64[] rows:f32[N,D] lookups:f32[] scale:f32[] -> G:f32[D,D] count:i64[]",
        (_DECAY,),
        cost=lambda s: (2 * s.N * s.D**2 + 6 * s.D**2, 4 * s.N * s.D + 28 * s.D**2),
    ),
    _operator(
        "FactorDebias",
        "take the start out of a factor's average",
        "output_factor.factor_debias",
        "G:f32[D,D] count:i64[] -> Ghat:f32[D,D]",
        (_DECAY,),
        cost=lambda s: (s.D**2, 8 * s.D**2),
    ),
    _operator(
        "SampleRows",
        "choose rows of a batch, evenly spread and others each turn",
        "sample.sample_rows",
        "total:i64[] size:i64[] turn:i64[] -> index:i64[S]",
        cost=lambda s: (6 * s.N, 40 * s.N),
    ),
    _operator(
        "TakeNow",
        "how many rows to take in this step: as many as are wanted, or none",
        "sample.take_now",
        "wanted:i64[...] now:any[] -> number:i64[...]",
        cost=lambda s: (0, 0),
    ),
    _operator(
        "FactorTrace",
        "the trace of the output factor",
        "damping.factor_trace",
        "G:f32[D,D] -> trace:f32[]",
        cost=lambda s: (2 * s.D**2, 9 * s.D**2),
    ),
    _operator(
        "DampingRelative",
        "damp a factor by a share of its mean eigenvalue",
        "damping.damping_relative",
        "trace:f32[] -> damping:f32[]",
        (Attribute("rho", "float", 0.0, 1e6), Attribute("size", "int", 1, 2**62)),
        cost=_scalar,
    ),
    _operator(
        "DampingPi",
        "split one damping between the factors by the ratio pi of their mean eigenvalues",
        "damping.damping_pi",
        "total_a:f32[] Ghat:f32[D,D] -> damping_a:f32[] damping_g:f32[]",
        (Attribute("damping", "float", 0.0, 1e30), _VOCAB, Attribute("pi", "int", 0, 2)),
        cost=lambda s: (2 * s.D**2, 4 * s.D**2),
    ),
    _operator(
        "FactorInverse",
        "invert the damped output factor",
        "inverse.factor_inverse",
        "Ghat:f32[D,D] damping_g:f32[] previous:f32[D,D] -> inverse:f32[D,D] residual:f32[]",
        cost=lambda s: (8 * s.D**3, 80 * s.D**2),
    ),
    _operator(
        "FactorInverseRoot",
        "inverse square root of the damped output factor, by coupled Newton–Schulz",
        "inverse.factor_inverse_root",
        "Ghat:f32[D,D] damping_g:f32[] previous:f32[D,D] -> root:f32[D,D] residual:f32[]",
        (Attribute("iterations", "int", 1, 200),),
        cost=lambda s: ((6 * s.iterations + 4) * s.D**3, 36 * s.iterations * s.D**2),
    ),
    _operator(
        "PreconditionRows",
        "multiply gradient rows by powers of both damped factors",
        "precondition.precondition_rows",
        "rows:f32[N,D] a:f32[N] damping_a:f32[] root:f32[D,D] scale:f32[] -> update:f32[N,D]",
        (_EXPONENT,),
        cost=lambda s: (2 * s.N * s.D**2 + s.N * s.D + 9 * s.N, 16 * s.N * s.D + 4 * s.D**2),
    ),
    _operator(
        "PreconditionDense",
        "multiply a whole table's gradient by powers of both damped factors",
        "precondition.precondition_dense",
        "grad:f32[V,D] A:f32[V] gain:f32[] damping_a:f32[] root:f32[D,D] -> update:f32[V,D]",
        (_EXPONENT,),
        cost=lambda s: (2 * s.V * s.D**2 + s.V * s.D + 8 * s.V, 16 * s.V * s.D + 4 * s.D**2),
    ),
    _operator(
        "MergeRows",
        "sum the rows of each distinct id",
        "rows.merge_rows",
        "ids:i64[N] rows:f32[N,D] -> unique_ids:i64[U] sums:f32[U,D]",
        cost=lambda s: (s.N * s.D, 24 * s.N * s.D + 32 * s.N),
        scatters="rows",
    ),
    _operator(
        "MergeLookups",
        "sum the rows of each distinct id; some hosts put zeros between the sums",
        "rows.merge_lookups",
        "slot:i32[V] ids:i64[N] rows:f32[N,D] -> slot:i32[V] ids:i64[U] place:i64[U] merged:f32[U,D]",
        cost=lambda s: (s.N * s.D, 12 * s.N * s.D + 60 * s.N),
        scatters="rows",
    ),
    _operator(
        "RowAdagradStep",
        "scale merged lookups by the root of their row's summed mean squares",
        "row_scales.row_adagrad_step",
        "rows:f32[U,D] place:i64[U] acc:f32[U] scale:f32[] -> step:f32[U,D] acc:f32[U]",
        (_EPSILON,),
        cost=lambda s: (3 * s.N * s.D, 16 * s.N * s.D),
    ),
    _operator(
        "RowWindowStep",
        "scale merged lookups by the root of their row's mean squares over a widening window",
        "row_scales.row_window_step",
        "rows:f32[U,D] place:i64[U] r:f32[U] fresh:f32[] scale:f32[] -> step:f32[U,D] r:f32[U]",
        cost=lambda s: (3 * s.N * s.D, 16 * s.N * s.D),
    ),
    _operator(
        "RowElementAdagradStep",
        "Adagrad entry by entry on merged lookups",
        "row_scales.row_element_adagrad_step",
        "rows:f32[U,D] place:i64[U] acc:f32[U,D] -> update:f32[U,D] acc:f32[U,D]",
        (_EPSILON,),
        cost=lambda s: (6 * s.N * s.D, 24 * s.N * s.D),
    ),
    _operator(
        "RowAdagrad",
        "scale each row by the root of its summed mean squares",
        "row_scales.row_adagrad",
        "rows:f32[U,D] acc:f32[U] -> update:f32[U,D] acc:f32[U]",
        (_EPSILON,),
        cost=lambda s: (4 * s.N * s.D, 16 * s.N * s.D),
    ),
    _operator(
        "WindowDecay",
        "advance the widening window of the row scales by one step",
        "row_scales.window_decay",
        "scale:f64[] count:i64[] lookups:f32[] -> "
        "scale:f64[] count:i64[] retain:f32[] fresh:f32[] unscale:f32[]",
        (Attribute("power", "float", 0.0, 1.0, open_lo=True), Attribute("least", "float", 0.0, 1.0)),
        cost=_scalar,
    ),
    _operator(
        "RowWindow",
        "scale each row by the root of its mean squares over a widening window",
        "row_scales.row_window",
        "rows:f32[U,D] r:f32[U] fresh:f32[] -> update:f32[U,D] r:f32[U]",
        cost=lambda s: (4 * s.N * s.D, 16 * s.N * s.D),
    ),
    _operator(
        "RowElementAdagrad",
        "Adagrad entry by entry on merged rows",
        "row_scales.row_element_adagrad",
        "rows:f32[U,D] acc:f32[U,D] -> update:f32[U,D] acc:f32[U,D]",
        (_EPSILON,),
        cost=lambda s: (5 * s.N * s.D, 20 * s.N * s.D),
    ),
    _operator(
        "AddRows",
        "add rows to the table's rows",
        "rows.add_rows",
        "W:f32[V,D] ids:i64[N] rows:f32[N,D] -> W:f32[V,D]",
        cost=lambda s: (s.N * s.D, 12 * s.N * s.D),
        scatters="rows",
    ),
    _operator(
        "ApplyRows",
        "subtract lr times each update row from the table's row",
        "rows.apply_rows",
        "W:f32[V,D] ids:i64[N] update:f32[N,D] lr:f32[] -> W:f32[V,D]",
        cost=lambda s: (2 * s.N * s.D, 20 * s.N * s.D),
        scatters="rows",
    ),
    _operator(
        "ApplyColumns",
        "the same for a table stored as columns",
        "rows.apply_columns",
        "W:f32[D,V] ids:i64[N] update:f32[N,D] lr:f32[] -> W:f32[D,V]",
        cost=lambda s: (2 * s.N * s.D, 28 * s.N * s.D),
    ),
    _operator(
        "ApplyFlat",
        "the same for a table stored as one vector",
        "rows.apply_flat",
        "W:f32[F] ids:i64[N] update:f32[N,D] lr:f32[] -> W:f32[F]",
        cost=lambda s: (2 * s.N * s.D, 28 * s.N * s.D),
    ),
    _operator(
        "WriteRows",
        "overwrite rows of a table",
        "rows.write_rows",
        "table:any[V,...] ids:i64[N] values:any[N,...] -> table:any[V,...]",
        cost=lambda s: (0, 8 * s.N * s.D),
    ),
    _operator(
        "ScatterRows",
        "sum rows into the table's dense gradient",
        "rows.scatter_rows",
        "ids:i64[N] rows:f32[N,D] -> grad:f32[V,D]",
        (_VOCAB,),
        cost=lambda s: (s.N * s.D, 4 * s.V * s.D + 20 * s.N * s.D),
        scatters="rows",
    ),
    _operator(
        "AllFinite",
        "0 where every entry is finite, NaN otherwise",
        "rows.all_finite",
        "x:any[...] -> flag:f32[]",
        cost=lambda s: (2 * s.N * s.D, 12 * s.N * s.D),
    ),
    _operator(
        "MuonDirection",
        "Nesterov momentum of stacked matrices, each of norm 1",
        "muon.muon_direction",
        "g:f32[L,R,C] M:f32[L,R,C] -> X:f32[L,R,C] M:f32[L,R,C]",
        (Attribute("mu", "float", 0.0, 1.0),),
        cost=lambda s: (8 * s.V * s.D, 24 * s.V * s.D),
    ),
    _operator(
        "OrthogonalizeStep",
        "one quintic Newton–Schulz step towards the nearest orthogonal matrices",
        "muon.orthogonalize_step",
        "X:f32[L,R,C] -> X:f32[L,R,C]",
        cost=lambda s: (4 * s.V * s.D * min(s.V, s.D), 24 * s.V * s.D),
    ),
    _operator(
        "OutputRowScale",
        "momentum of an output table's rows over the root of their window",
        "output_rows.output_row_scale",
        "z:f32[R,C] M:f32[R,C] r:f32[R] t:i64[] -> update:f32[R,C] M:f32[R,C] r:f32[R]",
        (Attribute("beta", "float", 0.0, 1.0), Attribute("power", "float", 0.0, 1.0, open_lo=True)),
        cost=lambda s: (8 * s.V * s.D, 20 * s.V * s.D),
    ),
    _operator(
        "LayerMomentum",
        "debiased momentum of a layer's preconditioned gradient",
        "layer_momentum.layer_momentum",
        "z:f32[R,C] M:f32[R,C] t:i64[] -> update:f32[R,C] M:f32[R,C]",
        (Attribute("beta", "float", 0.0, 1.0),),
        cost=lambda s: (4 * s.V * s.D, 16 * s.V * s.D),
    ),
    _operator(
        "DecayWeights",
        "shrink weights by lr times their decay",
        "optimizers.decay_weights",
        "W:f32[...] lr:f32[] -> W:f32[...]",
        (_DECAY,),
        cost=lambda s: (s.V * s.D, 8 * s.V * s.D),
    ),
    _operator(
        "Sgd",
        "one step of gradient descent",
        "optimizers.sgd",
        "W:f32[...] g:f32[...] lr:f32[] -> W:f32[...]",
        cost=lambda s: (2 * s.V * s.D, 12 * s.V * s.D),
    ),
    _operator(
        "Momentum",
        "one step of gradient descent with momentum",
        "optimizers.momentum",
        "W:f32[...] g:f32[...] v:f32[...] lr:f32[] -> W:f32[...] v:f32[...]",
        (Attribute("mu", "float", 0.0, 1.0),),
        cost=lambda s: (4 * s.V * s.D, 20 * s.V * s.D),
    ),
    _operator(
        "Adam",
        "one step of Adam",
        "optimizers.adam",
        "W:f32[...] g:f32[...] m:f32[...] v:f32[...] t:i64[] lr:f32[] -> W:f32[...] m:f32[...] v:f32[...]",
        (*_BETAS, _EPSILON),
        cost=lambda s: (12 * s.V * s.D, 28 * s.V * s.D),
    ),
    _operator(
        "Adagrad",
        "one step of Adagrad",
        "optimizers.adagrad",
        "W:f32[...] g:f32[...] acc:f32[...] lr:f32[] -> W:f32[...] acc:f32[...]",
        (_EPSILON,),
        cost=lambda s: (6 * s.V * s.D, 20 * s.V * s.D),
    ),
)

OPERATORS: Final[Mapping[str, Operator]] = {operator.name: operator for operator in _TABLE}
"""Every operator by name. In `Sizes`, dense optimizers read V·D as the number of entries."""
