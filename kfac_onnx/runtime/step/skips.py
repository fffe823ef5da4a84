"""What was not finite in a step that was skipped, and where.

Looked for after the skip alone, so that kept steps pay nothing: what the step still holds (new factors,
roots, the loss, updates) is read from its buffers, the rest (gradients, looked-up rows) is computed once more
from the same batch and the parameters, which the skip left as they were. Random operators (Dropout) draw the
same values again; ONNX Runtime's own (see `stateless`) draw others, so what such a graph shows may differ in
detail; nothing found is said as such.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.random.random_nodes import KEYS
from kfac_onnx.runtime.random.stateless import make_stateless
from kfac_onnx.runtime.step.skip_causes import Cause, look_at, overflow
from kfac_onnx.runtime.step.tensors import BFLOAT16, numpy_dtype, open_session
from kfac_onnx.step.plan import extract

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import onnxruntime as ort

    from kfac_onnx.device.providers import Providers
    from kfac_onnx.metadata import Parameter, Site
    from kfac_onnx.runtime.feed.batches import BatchInput
    from kfac_onnx.runtime.random.stateless import RandomKeys, RandomOperator
    from kfac_onnx.runtime.step.engine import Engine
    from kfac_onnx.runtime.step.skip_causes import Kind
    from kfac_onnx.runtime.step.tensors import Buffer
    from kfac_onnx.step.plan import Plan
    from kfac_onnx.step.protos import Item

    Ready = Mapping[str, np.ndarray | ort.OrtValue]

__all__ = ["SkipFinder"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Probe:
    """A value to look at: `value` by name in the step, rows of it belong to the ids named `ids`.

    `flagged` says that the step's own check looks at it. What is wrong in an earlier value of the same
    `parameter` shows in a value that `follows` too, and is not said twice.
    """

    kind: Kind
    name: str
    value: str
    parameter: str = ""
    ids: str | None = None
    rows: bool = False
    flagged: bool = False

    @property
    def follows(self) -> bool:
        """Whether other values of the parameter come before it."""
        return self.kind in ("factor", "damping", "root", "update", "state")


class SkipFinder:
    """Finds the causes of a skipped step; it costs nothing before the first one.

    Args:
        plan, engine, constants, inputs, providers, random: those of the session.
        sites, parameters: what the model says of its tables and trained parameters.

    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        constants: Mapping[str, Buffer],
        inputs: Sequence[BatchInput],
        providers: Providers,
        random: RandomKeys,
        *,
        sites: Sequence[Site],
        parameters: Sequence[Parameter],
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._constants = constants
        self._inputs = inputs
        self._providers = providers
        self._sites = {site.parameter: site for site in sites}
        self._parameters = parameters
        self._probes: list[_Probe] | None = None
        self._constant_causes: list[Cause] | None = None
        self._random = random
        self._session: tuple[tuple[str, ...], ort.InferenceSession, list[RandomOperator]] | None = None

    def find(self, batch: Mapping[str, np.ndarray], ready: Ready) -> tuple[Cause, ...]:
        """Return what was not finite in the step that was just skipped, the earliest in the graph first.

        `batch` is what the caller gave, `ready` what the step ran on. Call it before the next step. Empty
        where nothing can be found again.
        """
        if self._probes is None:
            self._probes = list(_probes(self._plan, self._sites, self._parameters))
        causes = list(self._given(batch))
        values = self._values(self._probes, ready)
        blamed = {cause.name for cause in causes if cause.kind == "parameter"}
        for probe in self._probes:
            array = values.get(probe.value)
            if array is None or (probe.follows and probe.parameter in blamed):
                continue
            ids = None if probe.ids is None else values.get(probe.ids)
            flat = None if ids is None else ids.reshape(-1)
            cause = look_at(probe.kind, probe.name, array, ids=flat, rows=probe.rows and array.ndim > 1)
            if cause is not None:
                causes.append(cause)
                blamed.add(probe.parameter)
        if not causes:
            flagged = [probe for probe in self._probes if probe.flagged and probe.value in values]
            sums = (overflow(probe.kind, probe.name, values[probe.value]) for probe in flagged)
            causes = [cause for cause in sums if cause is not None]
        return tuple(causes)

    def _given(self, batch: Mapping[str, np.ndarray]) -> Iterator[Cause]:
        """Look at what does not come out of the step: the batch, constants, parameters without lookups."""
        for item in self._inputs:
            if item.name not in batch or not _is_float(item.element):
                continue
            array = np.asarray(batch[item.name])
            if item.element == BFLOAT16 and array.dtype == np.uint16:
                array = array.view(numpy_dtype(BFLOAT16))
            cause = look_at("input", item.name, array)
            if cause is not None:
                yield cause
        if self._constant_causes is None:  # they never change
            found = (
                look_at("constant", name, buffer.view())
                for name, buffer in self._constants.items()
                if _is_float(buffer.element)
            )
            self._constant_causes = [cause for cause in found if cause is not None]
        yield from self._constant_causes
        for state in self._plan.states:
            site = self._sites.get(state.input)
            if state.role == "parameter" and (site is None or site.dense_uses or site.layout != "rows"):
                cause = look_at("parameter", state.input, self._engine.buffer(state.input).view())
                if cause is not None:
                    yield cause

    def _values(self, probes: Sequence[_Probe], batch: Ready) -> dict[str, np.ndarray]:
        """Return the probed values: those the step still holds, and the others computed again."""
        names = dict.fromkeys(name for probe in probes for name in (probe.ids, probe.value) if name)
        values: dict[str, np.ndarray] = {}
        missing: list[str] = []
        for name in names:
            given = batch.get(name)
            if isinstance(given, np.ndarray):
                values[name] = given
                continue
            try:
                values[name] = self._engine.read(name)
            except (KeyError, RuntimeError):  # inside a stage; or a type that NumPy does not have
                missing.append(name)
        if missing:
            values.update(self._computed(tuple(missing), batch))
        return values

    def _computed(self, names: tuple[str, ...], batch: Ready) -> dict[str, np.ndarray]:
        """Compute values of the step again at the parameters as they are."""
        try:
            if self._session is None or self._session[0] != names:
                model = extract(self._plan, names, inference=False)
                drawn = make_stateless([model], self._plan.source.types) if len(self._random) else []
                self._session = (names, open_session(model, self._providers, threads=1), drawn)
            _, session, drawn = self._session
            batch = {**batch, KEYS: self._random.of(drawn)}
            binding = session.io_binding()
            for info in session.get_inputs():
                value = batch[info.name] if info.name in batch else self._engine.value(info.name)
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(info.name, value)
                else:
                    binding.bind_ortvalue_input(info.name, value)
            for name in names:
                binding.bind_output(name, "cpu", 0)
            session.run_with_iobinding(binding)
            made = zip(names, binding.get_outputs(), strict=True)
            return {name: value.numpy() for name, value in made if "bfloat16" not in value.data_type()}
        except Exception as e:  # the step is skipped all the same: it is only told with less detail
            if not (isinstance(e, UserError) or from_onnxruntime(e)):
                raise
            _log.debug("the skipped step could not be run again: %s", e)
            return {}


def _is_float(element: int) -> bool:
    return element == BFLOAT16 or numpy_dtype(element).kind == "f"


def _probes(plan: Plan, sites: Mapping[str, Site], parameters: Iterable[Parameter]) -> Iterator[_Probe]:
    """Yield what to look at in a step, in the order in which the graph computes it."""
    known = {name for item in plan.source.items for name in item.makes}
    values = {*known, *plan.source.inputs}
    flagged = _flagged(plan)
    for site in sites.values():
        for use in site.uses:
            if use.output in known and not site.dense_uses and site.layout == "rows":
                ids = use.ids if use.ids in values else None
                yield _Probe("parameter", site.parameter, use.output, site.parameter, ids, rows=True)
    for name in plan.step.ends:
        kind: Kind = "prediction" if plan.step.loss is None else "loss"
        yield _Probe(kind, name, name, flagged=flagged.pop(name, None) is not None)
    for parameter in parameters:
        site, name = sites.get(parameter.name), parameter.name
        whole = parameter.gradient in flagged  # a table that an ordinary optimizer takes as a whole
        if site is not None and site.rows is not None and site.rows in known and not whole:
            own = flagged.pop(site.rows, None) is not None
            ids = site.ids if site.ids in values else None
            yield _Probe("gradient", name, site.rows, name, ids, rows=True, flagged=own)
            if site.dense is not None and site.dense in known:
                own = flagged.pop(site.dense, None) is not None
                yield _Probe("gradient", name, site.dense, name, flagged=own)
        elif parameter.gradient is not None and parameter.gradient in known:
            own = flagged.pop(parameter.gradient, None) is not None
            yield _Probe("gradient", name, parameter.gradient, name, flagged=own)
    found = [_flagged_probe(plan, sites, value, name) for value, name in flagged.items()]
    order: tuple[Kind, ...] = ("factor", "damping", "root", "update", "state")
    yield from sorted(found, key=lambda probe: order.index(probe.kind))


def _flagged_probe(plan: Plan, sites: Mapping[str, Site], value: str, name: str) -> _Probe:
    """Return the probe of a value that the step's check looks at, inserted for the parameter `name`."""
    kinds: Mapping[str, Kind] = {"factor": "factor", "root": "root", "parameter": "update"}
    state = next((state for state in plan.states if state.candidate == value), None)
    if state is not None and state.role != "parameter":
        kind: Kind = kinds.get(state.role, "state")
        return _Probe(kind, state.input, value, state.parameter or state.input, flagged=True)
    if any(check.damping == value for check in plan.step.root_checks):
        return _Probe("damping", name, value, name, flagged=True)
    site = sites.get(name)
    rows = site is not None and site.dense is None and state is None
    ids = site.ids if site is not None and rows else None
    made = any(ids in item.makes for item in plan.source.items) or ids in plan.source.inputs
    return _Probe("update", name, value, name, ids if made else None, rows, flagged=True)


def _flagged(plan: Plan) -> dict[str, str]:
    """Return the tensors that the step's own check looks at, each with the parameter it belongs to.

    They are what the nodes AllFinite that lead to `ok` read.
    """
    makers: dict[str, Item] = {name: item for item in plan.source.items for name in item.makes}
    pending, seen = [plan.step.ok], {plan.step.ok}
    found: dict[str, str] = {}
    while pending:
        item = makers.get(pending.pop())
        if item is None:
            continue
        if item.node.domain != "ai.kfac" or item.node.op_type != "AllFinite":
            pending.extend(name for name in item.reads if name not in seen)
            seen.update(item.reads)
            continue
        value = item.node.input[0]
        found[value] = _site_of(item) or _site_of(makers.get(value)) or value
    return found


def _site_of(item: Item | None) -> str | None:
    """Return the parameter that a node was inserted for."""
    tags = () if item is None else item.node.metadata_props
    return next((str(entry.value) for entry in tags if entry.key == "kfac.site"), None)
