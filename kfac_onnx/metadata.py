"""What a model file says about itself: the `kfac.*` entries of `ModelProto.metadata_props`.

Every room reads and writes them through these classes, so the file's own words are the only thing
that passes from one tool to the next. Each entry is JSON that a person can read.

| key               | written by             | holds                                         |
|-------------------|------------------------|-----------------------------------------------|
| `kfac.frontend`   | frontends              | which reader understood the file              |
| `kfac.parameters` | frontends              | list of `Parameter`                           |
| `kfac.loss`       | frontends              | `Loss`                                        |
| `kfac.row_gradients` | frontends           | list of `RowGradient`                         |
| `kfac.notes`      | frontends, passes      | list of sentences: what was changed on import |
| `kfac.carried`    | exporters, frontends   | list of `Carried`                             |
| `kfac.unmerged`   | `kfac_onnx.torch`      | that no two parameters that started equal are one initializer |
| `kfac.orphans`    | frontends              | outputs that are gradients of nothing         |
| `kfac.sites`      | `find-embeddings`      | list of `Site`                                |
| `kfac.updates`    | frontends              | list of `HostUpdate`                          |
| `kfac.exported_outputs` | frontends        | the exporter's outputs, where `kfac.updates` is |
| `kfac.optimizer_states` | frontends        | list of `OptimizerState`                      |
| `kfac.refused`    | frontends, passes      | list of `Refusal`                             |
| `kfac.vocabularies` | `encode-strings`     | list of `Vocabulary`                          |
| `kfac.frozen`     | `differentiate`        | list of `Frozen`                              |
| `kfac.accounts`   | `find-embeddings`      | list of `Account`: every tensor, once         |
| `kfac.id_checks`  | `find-embeddings`      | list of `IdCheck`                             |
| `kfac.draft`      | inserting passes       | what `close-step` still has to assemble       |
| `kfac.state`      | `close-step`           | list of `State`                               |
| `kfac.step`       | `close-step`           | `Step`                                        |
| `kfac.reading`    | frontends              | the passes that the file went through when it was read |
| `kfac.pipeline`   | the pass manager       | the textual pipeline that made the model      |

On nodes: `kfac.pass`, `kfac.site` (the parameter) and `kfac.phase` (a `Phase`).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from kfac_onnx.disk.records import RecordError, build, names_of, parse
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

__all__ = [
    "Carried",
    "Frozen",
    "HostUpdate",
    "IdCheck",
    "LearningRate",
    "Loss",
    "OptimizerState",
    "Parameter",
    "Phase",
    "Projection",
    "Refusal",
    "Role",
    "RootCheck",
    "RowGradient",
    "Site",
    "State",
    "Step",
    "StepSettings",
    "Use",
    "Vocabulary",
    "read",
    "read_list",
    "read_strings",
    "unmerged",
    "write",
]

T = TypeVar("T")


class Phase(enum.StrEnum):
    """When a node of the training step runs (docs/architecture.md). Nodes without one are `GRADIENTS`."""

    GRADIENTS = "gradients"
    """Loss, gradients, rows, new G; reads tables. All threads."""
    RENORMALIZE = "renormalize"
    """Under an `If`, last, in a kept step: folds the running scale into the counts, once in a thousand."""
    COUNT = "count"
    """Adds the batch's counts to A in place. One thread."""
    REFRESH = "refresh"
    """Under an `If`: recomputes the inverse (root) of G."""
    PRECONDITION = "precondition"
    """Updates, dense optimizers, the finite flag. All threads."""
    COMMIT = "commit"
    """Writes tables and other row state in place. One thread; runs only if the step is kept."""
    UNDO = "undo"
    """Restores what `COUNT` wrote. One thread; runs only if the step is skipped."""
    SELECT = "select"
    """`Where(ok, new, old)`: keeps a skipped step out of the state. A host that decides itself skips it."""


@dataclass(frozen=True)
class Parameter:
    """A trained parameter: its name in the graph, shape, dtype and the value that is its gradient."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    gradient: str | None


@dataclass(frozen=True)
class Loss:
    """The scalar loss and how it reduces over examples.

    A graph whose loss lies outside has `value` null and `predictions`: what it hands out, each with the input
    that takes dL/d(prediction), or null where the loss does not depend on it.
    """

    value: str | None
    reduction: Literal["mean", "sum", "unknown"] = "unknown"
    predictions: dict[str, str | None] = field(default_factory=dict[str, "str | None"])


@dataclass(frozen=True)
class Refusal:
    """Why a parameter is left to the ordinary optimizer, and what to do about it."""

    parameter: str
    path: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Frozen:
    """A tensor that could be a weight and is not trained, and why, as a clause."""

    name: str
    reason: str


@dataclass(frozen=True)
class Account:
    """In which class a tensor of a training graph is, and why, as a clause."""

    name: str
    kind: Literal["table", "other", "refused", "frozen", "merged"]
    reason: str


@dataclass(frozen=True)
class Vocabulary:
    """The strings that a host gives an input of numbers for: the i-th key is i, any other their count."""

    input: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class RowGradient:
    """A gradient that the exporter's graph gives as two outputs: rows float[N, D] and their ids int[N].

    `gradient` is the tensor that they were scattered into when the graph was read.
    """

    parameter: str
    values: str
    indices: str
    gradient: str = ""


@dataclass(frozen=True)
class HostUpdate:
    """How the graph's own optimizer updates a parameter, where it is kept: `output` is the new value.

    `source` is the value that the optimizer takes as the gradient: `scale` times it (negated if `negative`)
    is the parameter's gradient, after `views` (operators, applied in order). With `rows` it holds rows that
    are scattered into the parameter after the operators `steps`, which are named by their results.
    `problem` says why it cannot be given another gradient, null if it can.
    """

    parameter: str
    output: str
    source: str
    scale: float = 1.0
    negative: bool = False
    views: tuple[str, ...] = ()
    rows: bool = False
    steps: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class OptimizerState:
    """A state of the graph's own optimizer, where it is kept: it enters as `input`, leaves as `output`."""

    input: str
    output: str


@dataclass(frozen=True)
class Carried:
    """A state that the graph itself changes at each step: it enters as `input`, leaves as `output`.

    Such as the running statistics of batch normalization. Any exporter may declare its own: the input is an
    initializer or a graph input, the output a graph output of the same shape and dtype.
    """

    input: str
    output: str


@dataclass(frozen=True)
class Use:
    """One reading of a table: operator, ids as that operator reads them, looked-up rows, dL/d(rows)."""

    op: str
    ids: str | None
    output: str
    output_gradient: str | None


@dataclass(frozen=True)
class Projection:
    """A dense part of a table's gradient, Σ over positions of left·rightᵀ.

    `left` holds an entry per vocabulary row along `left_axis`, `right` one per embedding column along
    `right_axis`; all their other axes are positions, in the same order.
    """

    left: str
    left_axis: int
    right: str
    right_axis: int


@dataclass(frozen=True)
class Site:
    """A trained table and all its uses.

    `layout` says how the parameter stores the table: `rows` [V, D], `columns` [D, V], `flat` [V·D].
    After the pass `find-embeddings`, `ids` (int64[N]), `rows` (float32[N, D], dL/d(table row) of each
    lookup) and `keep` (float32[N], 0 where the graph drops the row; null when it drops none) name the
    values that hold all uses together, and `dense` names the dense part of the gradient (null
    unless the table is tied).
    """

    parameter: str
    vocab_size: int
    embedding_dim: int
    dtype: str
    layout: Literal["rows", "columns", "flat"]
    padding_idx: int | None
    uses: tuple[Use, ...]
    dense_uses: tuple[Use, ...] = ()
    gradient: str | None = None
    ids: str | None = None
    rows: str | None = None
    keep: str | None = None
    dense: str | None = None
    projections: tuple[Projection, ...] = ()
    """The dense part of the gradient as products; empty where there is none, or where it is no product."""
    dead_ends: tuple[Use, ...] = ()
    """Uses through which no gradient passes."""
    penalties: tuple[Use, ...] = ()
    """Uses of the whole table that are no projection, or terms that are added to its gradient."""
    row_decay: bool = False
    """Whether the gradient of the penalties is a number times the table."""
    penalty: str | None = None
    """After `find-embeddings`: their gradient, as the parameter is stored."""
    decay: str | None = None
    """After `find-embeddings`: that number, float32."""


@dataclass(frozen=True)
class Role:
    """What a trained parameter is for, and why.

    For a matrix `rows` are the axes of its outputs, `columns` those of its inputs and `stack` those that
    number matrices of their own, as it is stored: a kernel [out, in, h, w] has rows (0,), columns (1, 2, 3).
    """

    parameter: str
    kind: Literal["table", "output", "head", "hidden", "vector", "other"]
    reason: str
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    activations: str | None = None
    """What the matrix multiplies, its features along axis `features`; None where several products read it."""
    features: int = -1
    bias: str | None = None
    """The trained vector that is added to its products alone."""


@dataclass(frozen=True)
class State:
    """One tensor that a step reads under `input` and leaves under `output`.

    `initial` is `parameter` (the user's value), `zeros`, `ones`, `identity` or a number. `update` says how
    a host may hold it: `in-place` (one buffer, the model's writes go through it; `aliases` lists every
    value name that is this buffer) or `double` (read one buffer, write the other, swap when the step is
    kept; then `candidate` is the new value before the `Where(ok, new, old)` that a self-deciding host
    leaves out). `phase` is the phase that writes it.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str
    initial: str | float
    phase: Phase
    update: Literal["in-place", "double"]
    candidate: str
    role: Literal["parameter", "statistic", "factor", "root", "counter", "optimizer", "scratch"]
    parameter: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearningRate:
    """A learning-rate input of the step, float32 scalar, with its default."""

    input: str
    default: float


@dataclass(frozen=True)
class IdCheck:
    """The ids of one lookup after the graph's own arithmetic, or the labels of a loss, and what is allowed.

    `negatives` is `wrap` (an id in [−V, −1] means id + V, in the lookup and in the gradient) or `reject`.
    Of labels `parameter` names the scores and `vocab_size` is the number of classes; `ignored` is the label
    of examples that do not count.
    """

    parameter: str
    ids: str
    vocab_size: int
    negatives: Literal["wrap", "reject"]
    kind: Literal["ids", "labels"] = "ids"
    ignored: int | None = None


@dataclass(frozen=True)
class RootCheck:
    """An inverse (root) whose residual a host checks at each refresh, to take over by `eigh` if it fails.

    `root` names the refreshed value, `factor` the factor (float32[D, D]), `damping` the scalar added to
    its diagonal, `residual` the scalar to compare with `tolerance`.
    """

    parameter: str
    root: str
    factor: str
    damping: str
    residual: str
    exponent: float
    tolerance: float


@dataclass(frozen=True)
class StepSettings:
    """What the inserting passes were told, for people and reports; null where no pass said so.

    `g_rows` and `g_every` are those of `insert-embedding-kfac`; `optimizer` holds the method of
    `insert-optimizer` by which parameters got it (`rest`, `tables`, `all`), `table_decay` the decay of the
    tables that have one.
    """

    preset: str | None = None
    uses: str | None = None
    tied: str | None = None
    g_rows: int | None = None
    g_every: int = 1
    optimizer: dict[str, str] = field(default_factory=dict[str, str])
    table_decay: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Step:
    """Everything a host needs to run the training step that the model is.

    `ok` is a bool scalar: false where a gradient, factor or update is not finite. `constants` are
    inputs that the user supplies once; `batch` those given at every step. Where the loss lies outside the
    graph, `loss` is null and `predictions` are those of `Loss`: a step then has two halves, between which the
    host computes dL/d(predictions). `target` is the device that the operators' bodies are for, null where
    `lower` has not run (or did in a version that did not say so).
    """

    loss: str | None
    ok: str
    batch: tuple[str, ...]
    learning_rates: tuple[LearningRate, ...]
    constants: tuple[str, ...] = ()
    id_checks: tuple[IdCheck, ...] = ()
    root_checks: tuple[RootCheck, ...] = ()
    shape: Literal["rows", "dense"] = "rows"
    settings: StepSettings = field(default_factory=StepSettings)
    predictions: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    target: Literal["cpu", "cuda"] | None = None

    @property
    def ends(self) -> tuple[str, ...]:
        """Where the forward part ends: at the loss, or at the predictions."""
        return tuple(self.predictions) if self.loss is None else (self.loss,)


def unmerged(model: ir.Model) -> bool:
    """Say whether the exporter vouches that parameters were neither merged nor folded into constants.

    A gradient without its parameter says that another tool did so afterwards.
    """
    return "kfac.unmerged" in model.metadata_props and not read_strings(model, "orphans")


def _plain(value: object) -> object:
    """Return dataclasses as mappings, alone or in a list, and anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in names_of(type(value))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Iterable[object]", value)]
    return value


def write(model: ir.Model, key: str, value: object) -> None:
    """Store a dataclass, a list of dataclasses, or plain JSON data under `kfac.<key>`."""
    data = _plain(value)
    model.metadata_props[f"kfac.{key}"] = data if isinstance(data, str) else json.dumps(data)


def read(model: ir.Model, key: str, cls: type[T]) -> T | None:
    """Return the dataclass stored under `kfac.<key>`, or None when the model has no such entry.

    Raises UserError where the entry is not what a writer of this package writes.
    """
    text = model.metadata_props.get(f"kfac.{key}")
    if text is None:
        return None
    try:
        return build(cls, parse(text))
    except RecordError as e:
        raise _damaged(key, e) from e


def read_list(model: ir.Model, key: str, cls: type[T]) -> list[T]:
    """Return the dataclasses stored under `kfac.<key>`, empty when the model has no such entry.

    Raises UserError as `read`.
    """
    text = model.metadata_props.get(f"kfac.{key}")
    return [] if text is None else cast("list[T]", list(_records(key, cls, text)))


@functools.lru_cache(maxsize=8)
def _records(key: str, cls: type[Any], text: str) -> tuple[object, ...]:
    """Return the dataclasses of a text: passes and the verifier read the same one many times."""
    return tuple(_built(key, cls, item, f"[{index}]") for index, item in enumerate(_listed(key, text)))


def read_strings(model: ir.Model, key: str) -> list[str]:
    """Return the list of sentences stored under `kfac.<key>`, empty when the model has no such entry.

    Raises UserError as `read`.
    """
    return [_sentence(key, item) for item in _listed(key, model.metadata_props.get(f"kfac.{key}", "[]"))]


def _listed(key: str, text: str) -> list[Any]:
    try:
        found = parse(text)
    except RecordError as e:
        raise _damaged(key, e) from e
    if not isinstance(found, list):
        raise _damaged(key, "it is no list")
    return cast("list[Any]", found)


def _built(key: str, cls: type[T], data: Any, where: str) -> T:
    try:
        return build(cls, data, where)
    except RecordError as e:
        raise _damaged(key, e) from e


def _sentence(key: str, item: Any) -> str:
    if not isinstance(item, str):
        raise _damaged(key, "it is no list of texts")
    return item


def _damaged(key: str, why: object) -> UserError:
    return UserError(
        f"the entry 'kfac.{key}' of the model's metadata is damaged: {why}", help="make the model again"
    )
