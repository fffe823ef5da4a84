"""The pass that gives hidden matrices Muon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kfac_onnx import metadata
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Emitter, Out
from kfac_onnx.graph.values import static_shape
from kfac_onnx.metadata import Parameter, Phase, Role
from kfac_onnx.passes.find_embeddings import values_by_name
from kfac_onnx.passes.insertion.writing import as_float32, drop_gradient, keep_parameter
from kfac_onnx.pipeline.base import Changes, Pass
from kfac_onnx.pipeline.options import opt
from kfac_onnx.pipeline.patterns import chosen
from kfac_onnx.pipeline.registry import register
from kfac_onnx.step.draft import FLOAT, Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from kfac_onnx.pipeline.log import Log

__all__ = ["InsertMuon"]


@dataclass(frozen=True)
class _Matrix:
    """A parameter as matrices float32[stack, rows, columns], rows ≤ columns, and the way there."""

    name: str
    weight: ir.Value
    gradient: ir.Value
    order: tuple[int, ...]
    """The stored axes in the order stack, rows, columns, columns before rows if rows are more."""
    size: tuple[int, int, int]
    stretch: float
    """√max(1, outputs/inputs): how much longer the step of a matrix is than that of a square one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's stored shape."""
        return static_shape(self.weight) or ()


@register
@dataclass(frozen=True, kw_only=True)
class InsertMuon(Pass):
    """Insert Muon for every hidden matrix that has no optimizer yet.

    Reads   the roles left by `classify`, and what earlier passes already update.
    Adds    per matrix its new value and state kfac/<matrix>/momentum, float32 of its shape
    Does    W ← (1 − lr·decay)·W − lr·√max(1, m/n)·X for W [m outputs, n inputs], X the orthogonalized
            momentum; matrices of one shape are stacked, so that they are one batched product. Kernels are
            [out, in·height·width], a fused query, key and value is one matrix.
    Source  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    name: ClassVar[str] = "insert-muon"
    lr: float = opt(0.01, "learning rate: near 1 to 2 times the matrices' tuned Adam rate", lo=0.0)
    momentum: float = opt(0.95, "weight kept from the old momentum", lo=0.0, hi=0.9999999)
    iterations: int = opt(5, "Newton–Schulz iterations", lo=1, hi=20)
    weight_decay: float = opt(0.0, "decoupled decay", lo=0.0, hi=1.0)
    only: tuple[str, ...] = opt((), "patterns of the matrices that get it; the hidden ones if none")
    rate: str = opt("kfac/hidden_lr", "name of the learning-rate input")

    def run(self, model: ir.Model, log: Log) -> Changes:
        """Edit `model` in place.

        Raises UserError where `classify` has not run, for a pattern that matches no parameter, and for a
        parameter asked for by pattern that is no matrix.
        """
        if "kfac.roles" not in model.metadata_props:
            raise UserError(
                "insert-muon needs to know which matrices are hidden",
                context=self.name,
                help="put classify before it: find-embeddings,classify,...,insert-muon",
            )
        emitter = Emitter(model, self.name)
        draft = Draft(model, emitter, values_by_name(model))
        matrices = self._matrices(model, draft)
        if not matrices:
            draft.save()
            return emitter.changes
        rate = draft.learning_rate(self.rate, self.lr)
        stacks: dict[tuple[int, int], list[_Matrix]] = {}
        for matrix in matrices:
            drop_gradient(draft, str(matrix.gradient.name))
            stacks.setdefault(matrix.size[1:], []).append(matrix)
            log.count("matrices")
        for stack in stacks.values():
            self._stack(stack, rate, draft)
            log.count("batched products")
        draft.set_optimizer("hidden", "muon")
        draft.save()
        return emitter.changes

    def _matrices(self, model: ir.Model, draft: Draft) -> list[_Matrix]:
        done = {state.parameter for state in draft.states if state.role == "parameter"}
        gradients = {item.name: item.gradient for item in metadata.read_list(model, "parameters", Parameter)}
        roles = metadata.read_list(model, "roles", Role)
        only = chosen([role.parameter for role in roles], self.only, context=self.name)
        matrices: list[_Matrix] = []
        for role in roles:
            gradient = gradients.get(role.parameter)
            if role.parameter in done or gradient is None:
                continue
            if role.parameter in only and not role.rows:
                raise UserError(
                    f"'{role.parameter}' cannot have Muon: it is no matrix, but of the role '{role.kind}': "
                    f"{role.reason}",
                    context=self.name,
                    help="leave it to another optimizer: `scan MODEL` lists the roles",
                )
            if role.parameter in only or (not self.only and role.kind == "hidden"):
                matrices.append(_matrix(role, draft.value(role.parameter), draft.value(gradient)))
        return matrices

    def _stack(self, stack: Sequence[_Matrix], rate: ir.Value, draft: Draft) -> None:
        """Orthogonalize matrices of one shape together."""
        phase = Phase.PRECONDITION
        rows, columns = stack[0].size[1:]
        directions: list[ir.Value] = []
        for matrix in stack:
            emit = draft.emitter.derive(site=matrix.name, phase=phase)
            with draft.at(emit):
                gradient = as_float32(emit, matrix.gradient, "g")
                draft.flag(gradient)
                old = draft.state(
                    f"kfac/{matrix.name}/momentum",
                    FLOAT,
                    matrix.shape,
                    "zeros",
                    "optimizer",
                    parameter=matrix.name,
                )
                outs = [Out("direction", FLOAT, matrix.size), Out("momentum", FLOAT, matrix.size)]
                direction, momentum = draft.op(
                    "MuonDirection",
                    [_to_matrices(emit, gradient, matrix), _to_matrices(emit, old, matrix)],
                    outs,
                    phase,
                    mu=self.momentum,
                )
                draft.keep(old, _from_matrices(emit, momentum, matrix, "momentum"), phase)
                directions.append(direction)
        emit = draft.emitter.derive(phase=phase)
        total = sum(matrix.size[0] for matrix in stack)
        shape = [total, rows, columns]
        value = directions[0]
        if len(stack) > 1:
            axis = {"axis": 0}
            value = emit.node("Concat", directions, attributes=axis, name="stack", dtype=FLOAT, shape=shape)
        for _ in range(self.iterations):
            (value,) = draft.op("OrthogonalizeStep", [value], [Out("orthogonal", FLOAT, shape)], phase)
        parts: Sequence[ir.Value] = [value]
        if len(stack) > 1:
            sizes = emit.constant(np.asarray([matrix.size[0] for matrix in stack], np.int64), "sizes")
            outs = [Out("orthogonal", FLOAT, matrix.size) for matrix in stack]
            parts = emit.node("Split", [value, sizes], attributes={"axis": 0}, outputs=outs)
        for matrix, part in zip(stack, parts, strict=True):
            with draft.at(draft.emitter.derive(site=matrix.name, phase=phase)):
                self._write(matrix, part, rate, draft)

    def _write(self, matrix: _Matrix, orthogonal: ir.Value, rate: ir.Value, draft: Draft) -> None:
        emit = draft.emitter.derive(phase=Phase.PRECONDITION)
        update = _from_matrices(emit, orthogonal, matrix, "update")
        if matrix.stretch != 1.0:
            stretch = emit.constant(np.float32(matrix.stretch), "stretch")
            update = emit.node("Mul", [update, stretch], name="update", dtype=FLOAT, shape=matrix.shape)
        weights = as_float32(emit, matrix.weight, "W")
        outs = [Out("decayed", FLOAT, matrix.shape)]
        if self.weight_decay:
            (weights,) = draft.op(
                "DecayWeights", [weights, rate], outs, Phase.PRECONDITION, decay=self.weight_decay
            )
        (new,) = draft.op(
            "Sgd", [weights, update, rate], [Out("new", FLOAT, matrix.shape)], Phase.PRECONDITION
        )
        draft.flag(new)
        keep_parameter(draft, draft.parameter(matrix.name), new)


def _matrix(role: Role, weight: ir.Value, gradient: ir.Value) -> _Matrix:
    shape = static_shape(weight) or ()
    stack, rows, columns = (
        math.prod(shape[axis] for axis in axes) for axes in (role.stack, role.rows, role.columns)
    )
    stretch = math.sqrt(max(1.0, rows / columns))
    small, large = (role.rows, role.columns) if rows <= columns else (role.columns, role.rows)
    size = (stack, min(rows, columns), max(rows, columns))
    return _Matrix(role.parameter, weight, gradient, (*role.stack, *small, *large), size, stretch)


def _to_matrices(emit: Emitter, value: ir.Value, matrix: _Matrix) -> ir.Value:
    """Return a tensor of the parameter's shape as float32[stack, rows, columns]."""
    ordered = [matrix.shape[axis] for axis in matrix.order]
    if matrix.order != tuple(range(len(matrix.order))):
        perm = {"perm": list(matrix.order)}
        value = emit.node("Transpose", [value], attributes=perm, name="matrix", dtype=FLOAT, shape=ordered)
    if tuple(ordered) != matrix.size:
        target = emit.constant(np.asarray(matrix.size, np.int64), "matrix_shape")
        value = emit.node("Reshape", [value, target], name="matrix", dtype=FLOAT, shape=matrix.size)
    return value


def _from_matrices(emit: Emitter, value: ir.Value, matrix: _Matrix, name: str) -> ir.Value:
    """Return float32[stack, rows, columns] as a tensor of the parameter's shape."""
    ordered = [matrix.shape[axis] for axis in matrix.order]
    if tuple(ordered) != matrix.size:
        target = emit.constant(np.asarray(ordered, np.int64), "ordered_shape")
        value = emit.node("Reshape", [value, target], name=name, dtype=FLOAT, shape=ordered)
    if matrix.order != tuple(range(len(matrix.order))):
        perm = {"perm": [matrix.order.index(axis) for axis in range(len(matrix.order))]}
        value = emit.node("Transpose", [value], attributes=perm, name=name, dtype=FLOAT, shape=matrix.shape)
    return value
