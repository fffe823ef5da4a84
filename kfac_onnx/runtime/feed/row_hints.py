"""Which rows of tables in files a batch will read, told before its step: the disk is read meanwhile."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.runtime.step.tensors import open_session
from kfac_onnx.step.plan import extract

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.metadata import Site
    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.step.tensors import Device
    from kfac_onnx.step.plan import Plan

__all__ = ["RowHints", "mapped_parameters"]

_log = logging.getLogger(__name__)


def mapped_parameters(plan: Plan, sites: Sequence[Site], device: Device, problem: str | None) -> list[str]:
    """Return the tables that are trained in their files: all.

    Raises UserError where there is none, or one cannot be.
    """
    if not device.is_cpu or problem is not None:
        why = f"the device is '{device.name}'" if problem is None else problem
        raise UserError(
            f"tables cannot be trained in their files here: {why}", help="leave tables_in (--tables-in) out"
        )
    if not sites:
        raise UserError(
            "the model has no table that could be trained in a file", help="leave tables_in (--tables-in) out"
        )
    states = {state.input: state for state in plan.states}
    for site in sites:
        state = states.get(site.parameter)
        if site.dense is not None or state is None or state.update != "in-place":
            raise UserError(
                f"the table '{site.parameter}' cannot be trained in its file: a step writes the whole of it",
                help="untie it, let its decay be of looked-up rows, or leave tables_in (--tables-in) out",
            )
        if site.layout == "columns":
            raise UserError(
                f"the table '{site.parameter}' cannot be trained in its file: its rows lie in columns",
                help="export the model with the table as [V, D], or leave tables_in (--tables-in) out",
            )
    return [site.parameter for site in sites]


class RowHints:
    """Computes the ids that a batch looks up in each of some tables, where the batch alone decides them."""

    def __init__(
        self, plan: Plan, inputs: Sequence[BatchInput], tables: Collection[str], providers: Providers
    ) -> None:
        names = {item.name for item in inputs}
        self._given: list[tuple[str, str]] = []
        self._sessions: list[tuple[str, ort.InferenceSession, list[str]]] = []
        for check in plan.step.id_checks:
            if check.kind == "labels" or check.parameter not in tables:
                continue
            if check.ids in names:
                self._given.append((check.parameter, check.ids))
                continue
            try:
                model = extract(plan, [check.ids])
            except KeyError:
                continue
            needed = [value.name for value in model.graph.input]
            if names.issuperset(
                needed
            ):  # else the ids depend on parameters: rows are read when they are asked for
                self._sessions.append((check.parameter, open_session(model, providers, threads=1), needed))

    def rows(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the ids by table; what is wrong with a batch is left for its step to say."""
        ids: dict[str, list[np.ndarray]] = {}
        for parameter, name in self._given:
            if isinstance(array := batch.get(name), np.ndarray) and array.dtype.kind in "iu":
                ids.setdefault(parameter, []).append(array.reshape(-1))
        for parameter, session, needed in self._sessions:
            if not batch.keys() >= set(needed):
                continue
            try:
                (array,) = session.run(None, {name: batch[name] for name in needed})
            except Exception as e:
                if not from_onnxruntime(e):
                    raise
                _log.debug(
                    "no rows are read ahead for a batch: %s", first_line(e)
                )  # its step says what is wrong
                continue
            ids.setdefault(parameter, []).append(np.asarray(array).reshape(-1))
        return {name: np.concatenate(arrays) for name, arrays in ids.items()}
