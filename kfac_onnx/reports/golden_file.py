"""Reading a file of golden numbers: the inputs of a run of the original, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kfac_onnx.disk.npz import read_npz
from kfac_onnx.disk.records import parse
from kfac_onnx.errors import UserError, first_line
from kfac_onnx.fisher.settings import FactorSettings, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kfac_onnx.fisher.symbols import Array

__all__ = ["GoldenFile", "read_golden"]

_MATPOWER: Final = "matpower_"


@dataclass(frozen=True)
class GoldenFile:
    """One run: sizes, switches, the schedule of updates and evaluations, inputs and expected results.

    `schedule` holds (verb, argument) with verbs `cov` (batch number), `inv` and `eval` (tag). `vector` is
    dense float[V, D], or (indices[N], values[N, D]). `expected[tag][quantity]` are the results.
    """

    path: Path
    vocab_size: int
    embedding_dim: int
    num_towers: int
    num_sources: int
    num_uses: int | None
    damping: float
    damping_is_tensor: bool
    overrides: Mapping[str, float]
    ema_decay: float
    exponents: tuple[float, ...]
    settings: FactorSettings
    schedule: tuple[tuple[str, str], ...]
    arrays: Mapping[str, Array]
    vector: Array | tuple[Array, Array]
    expected: Mapping[str, Mapping[str, Array]]

    def ids(self, batch: str) -> list[list[Array]]:
        """Return the ids of a batch as [tower][use]."""
        return [
            [self._input(f"ids_b{batch}_t{tower}{use}") for use in self._uses()]
            for tower in range(self.num_towers)
        ]

    def gradients(self, batch: str) -> list[list[list[Array]]]:
        """Return the gradients of a batch as [source][tower][use]."""
        return [
            [
                [self._input(f"grads_b{batch}_s{source}_t{tower}{use}") for use in self._uses()]
                for tower in range(self.num_towers)
            ]
            for source in range(self.num_sources)
        ]

    def _uses(self) -> list[str]:
        return [""] if self.num_uses is None else [f"_u{use}" for use in range(self.num_uses)]

    def _input(self, name: str) -> Array:
        return _array(self.path, self.arrays, f"in.{name}")


def read_golden(path: str | Path) -> GoldenFile:
    """Read a golden file; raises UserError for one that is missing, broken or incomplete."""
    path = Path(path)
    arrays = read_npz(path)
    if "settings" not in arrays:
        raise UserError(f"'{path}' is not a golden file: it has no settings")
    try:
        settings: dict[str, Any] = parse(str(arrays["settings"]))
        return _build(path, settings, arrays)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"the settings of '{path}' have no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the settings of '{path}' cannot be read: {first_line(error)}") from error


def _build(path: Path, settings: dict[str, Any], arrays: dict[str, Array]) -> GoldenFile:
    expected = _expected(arrays)
    schedule = tuple(_action(path, str(entry)) for entry in settings["schedule"])
    for verb, tag in schedule:
        if verb == "eval" and tag not in expected:
            raise UserError(f"'{path}' evaluates '{tag}' but holds no results for it")
    uses = settings.get("num_uses")
    exponents = {float(e) for e in settings.get("exps") or ()} | _named_exponents(path, expected)
    override: dict[str, Any] = settings.get("session_override") or {}
    overrides = {str(tag): float(value) for tag, value in override.items()}
    golden = GoldenFile(
        path=path,
        vocab_size=int(settings["vocab_size"]),
        embedding_dim=int(settings["embed_dim"]),
        num_towers=int(settings["num_towers"]),
        num_sources=int(settings["num_sources"]),
        num_uses=None if uses is None else int(uses),
        damping=float(settings["damping"]),
        damping_is_tensor=settings.get("damping_as") == "tensor",
        overrides=overrides,
        ema_decay=float(settings["ema_decay"]),
        exponents=tuple(sorted(exponents)),
        settings=_switches(path, settings),
        schedule=schedule,
        arrays=arrays,
        vector=_vector(path, settings, arrays),
        expected=expected,
    )
    _check(golden)
    return golden


def _check(golden: GoldenFile) -> None:
    """Raise UserError unless all inputs that the schedule needs are there and fit together."""
    sizes = (
        golden.vocab_size,
        golden.embedding_dim,
        golden.num_towers,
        golden.num_sources,
        golden.num_uses or 1,
    )
    if min(sizes) < 1:
        raise UserError(f"the settings of '{golden.path}' have a size below 1")
    if not 0.0 <= golden.ema_decay <= 1.0:
        raise UserError(f"the settings of '{golden.path}' have a decay outside [0, 1]: {golden.ema_decay:g}")
    if any(not damping >= 0.0 for damping in (golden.damping, *golden.overrides.values())):
        raise UserError(f"the settings of '{golden.path}' have a negative damping")
    for verb, batch in golden.schedule:
        if verb != "cov":
            continue
        for ids in (use for tower in golden.ids(batch) for use in tower):
            if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
                raise UserError(
                    f"the ids of batch {batch} in '{golden.path}' are not integers of rank 1 or 2"
                )
        for grads in (use for source in golden.gradients(batch) for tower in source for use in tower):
            if grads.ndim != 2 or grads.shape[1] != golden.embedding_dim or grads.dtype.kind != "f":
                shape = f"float [rows, {golden.embedding_dim}]"
                raise UserError(f"the gradients of batch {batch} in '{golden.path}' are not {shape}")


def _switches(path: Path, settings: dict[str, Any]) -> FactorSettings:
    base = settings_of(str(settings["backend"]))
    if "pi_type" in settings:
        guard = "guarded" if base.pi == "guarded" else "tracenorm"
        match settings["pi_type"]:
            case "off" | "none" | None:
                base = replace(base, pi="off")
            case "tracenorm":
                base = replace(base, pi=guard)
            case other:
                raise UserError(f"'{path}' asks for an unknown pi_type '{other}'", help="off or tracenorm")
    if "tower_strategy" in settings:
        match settings["tower_strategy"]:
            case "concat" | "separate" as strategy:
                base = replace(base, towers=strategy)
            case other:
                raise UserError(
                    f"'{path}' asks for an unknown tower_strategy '{other}'", help="concat or separate"
                )
    if "init_covariances_at_zero" in settings:
        base = replace(base, start_at_zero=bool(settings["init_covariances_at_zero"]))
    if "zero_debias" in settings:
        debias = bool(settings["zero_debias"])
        base = replace(base, zero_debias=debias, unknown_before_first=base.unknown_before_first and debias)
    return base


def _action(path: Path, entry: str) -> tuple[str, str]:
    verb, _, argument = entry.partition(":")
    if verb not in ("cov", "inv", "eval") or (verb != "inv") != bool(argument):
        raise UserError(f"the schedule of '{path}' has an unknown step '{entry}'")
    return verb, argument


def _vector(path: Path, settings: dict[str, Any], arrays: dict[str, Array]) -> Array | tuple[Array, Array]:
    shape = (int(settings["vocab_size"]), int(settings["embed_dim"]))
    match settings["vector"]:
        case "dense":
            dense = _array(path, arrays, "in.vec_dense")
            if dense.shape != shape:
                raise UserError(f"the vector of '{path}' has shape {list(dense.shape)}, not {list(shape)}")
            return dense
        case "sparse":
            indices, values = _array(path, arrays, "in.vec_indices"), _array(path, arrays, "in.vec_values")
            if indices.ndim != 1 or values.shape != (len(indices), shape[1]):
                raise UserError(f"the indices and values of the vector of '{path}' do not fit together")
            if len(indices) and (indices.min() < 0 or indices.max() >= shape[0]):
                raise UserError(f"the vector of '{path}' has an index outside the table of {shape[0]} rows")
            return indices, values
        case other:
            raise UserError(f"'{path}' has an unknown kind of vector '{other}'", help="dense or sparse")


def _expected(arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    expected: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        if name.startswith("out."):
            tag, _, quantity = name.removeprefix("out.").partition(".")
            # A number in the quantity's name may hold a point of its own, so the tag ends at the first.
            expected.setdefault(tag, {})[quantity] = array
    return expected


def _named_exponents(path: Path, expected: Mapping[str, Mapping[str, Array]]) -> set[float]:
    named: set[float] = set()
    for quantity in (quantity for results in expected.values() for quantity in results):
        if quantity.startswith(_MATPOWER):
            number = quantity.removeprefix(_MATPOWER).partition("_")[0]
            try:
                named.add(float(number))
            except ValueError as error:
                raise UserError(f"'{path}' has a result '{quantity}' without an exponent") from error
    return named


def _array(path: Path, arrays: Mapping[str, Array], name: str) -> Array:
    if name not in arrays:
        raise UserError(f"the golden file '{path}' has no array '{name}'")
    return arrays[name]
