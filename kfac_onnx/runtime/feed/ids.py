"""Ids that are no row of their table: found and said in the user's own terms.

The id that counts is the one that reaches the reading operator, after the graph's own arithmetic. On the
CPU, ONNX Runtime's own bound check stops the step and this module then finds out which id it was; negative
ids that the exporter's backward does not wrap are looked for at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.step.tensors import open_session
from kfac_onnx.step.plan import extract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import onnxruntime as ort

    from kfac_onnx.metadata import IdCheck
    from kfac_onnx.step.plan import Plan

__all__ = ["check_given", "check_ids", "explain_failure", "origin_of"]


def check_ids(check: IdCheck, ids: np.ndarray, origin: Callable[[], str]) -> None:
    """Raise UserError when an id is no row, or a label no class; `origin` says where they come from."""
    if check.ignored is not None and ids.size:
        ids = ids[ids != check.ignored]
    if ids.size == 0:
        return
    lowest = 0 if check.negatives == "reject" else -check.vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low >= lowest and high < check.vocab_size:
        return
    wrong = low if low < lowest else high
    if check.kind == "labels":
        message = (
            f"label {wrong} in {origin()} is no class of the scores '{check.parameter}',"
            f" which have {check.vocab_size} classes"
        )
        more = "" if check.ignored is None else f", and {check.ignored}, which is ignored"
        allowed = f"labels from 0 to {check.vocab_size - 1} are allowed{more}"
        if low < 0 and check.ignored is None:
            allowed += "; --ignore-index of `differentiate` names a label that does not count"
        raise UserError(message, help=f"{allowed}; nothing was written")
    message = (
        f"id {wrong} in {origin()} is not a row of parameter '{check.parameter}',"
        f" which has {check.vocab_size} rows"
    )
    allowed = f"ids from {lowest} to {check.vocab_size - 1} are allowed"
    raise UserError(message, help=f"{allowed}; nothing was written")


def check_given(
    plan: Plan, checks: Iterable[IdCheck], batch: Mapping[str, np.ndarray | ort.OrtValue]
) -> None:
    """Raise UserError when ids that the batch itself holds are no rows; nothing need have run.

    A device's kernels do not fail for such ids: they read zeros, or another row.
    """
    for check in checks:
        given = batch.get(check.ids)
        if isinstance(given, np.ndarray):
            check_ids(check, given, lambda check=check: origin_of(plan, check, batch))


def origin_of(plan: Plan, check: IdCheck, batch: Mapping[str, object]) -> str:
    """Return `input 'x'`, or `inputs 'x' and 'y'`, that the ids are computed from."""
    if check.ids in batch:
        return f"input '{check.ids}'"
    try:
        inputs = [value.name for value in extract(plan, [check.ids]).graph.input]
    except KeyError:
        inputs = []
    names = [f"'{name}'" for name in inputs if name in batch]
    if not names:
        return f"value '{check.ids}'"
    return f"input {names[0]}" if len(names) == 1 else f"inputs {' and '.join(names)}"


def explain_failure(
    plan: Plan,
    batch: Mapping[str, np.ndarray | ort.OrtValue],
    values: Callable[[str], ort.OrtValue],
) -> None:
    """Evaluate the ids of every lookup for a batch that failed; raise UserError for the first wrong one.

    `values` gives the inputs that are not in the batch (parameters, constants). Returns where every id
    is a row, or where the ids themselves cannot be evaluated.
    """
    for check in plan.step.id_checks:
        if check.ids in batch:
            given = batch[check.ids]
            ids = given if isinstance(given, np.ndarray) else given.numpy()
        else:
            ids = _evaluate(plan, check.ids, batch, values)
        if ids is not None:
            check_ids(check, ids, lambda check=check: origin_of(plan, check, batch))
    empty = [name for name in batch if 0 in _shape(batch[name])]
    if empty:
        shape = ", ".join(map(str, _shape(batch[empty[0]])))
        raise UserError(
            f"the batch holds no examples: '{empty[0]}' has shape [{shape}]",
            help="leave such batches out; nothing was written",
        )


def _shape(value: np.ndarray | ort.OrtValue) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, np.ndarray) else value.shape())


def _evaluate(
    plan: Plan,
    name: str,
    batch: Mapping[str, np.ndarray | ort.OrtValue],
    values: Callable[[str], ort.OrtValue],
) -> np.ndarray | None:
    try:
        model = extract(plan, [name])
        session = open_session(model, ["CPUExecutionProvider"], threads=1)
        binding = session.io_binding()
        for info in session.get_inputs():
            value = batch[info.name] if info.name in batch else values(info.name)
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(info.name, value)
            else:
                binding.bind_ortvalue_input(info.name, value)
        binding.bind_output(name, "cpu", 0)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()
    except Exception as e:  # the caller reports the failure that led here
        if not (isinstance(e, UserError) or from_onnxruntime(e)):
            raise
        return None
