"""Comparing the block with golden numbers of the original: by ONNX on onnxruntime, and in float64.

Each number of a golden file is computed twice, by a `FisherSession` in float32 and by
`reference.BlockReference` in float64, and both must be within 1e-5 of the array's largest finite entry,
with inf and NaN in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx_ir as ir

from kfac_onnx.errors import UserError
from kfac_onnx.fisher.layer_collection import LayerCollection
from kfac_onnx.fisher.session import FisherSession
from kfac_onnx.fisher.symbols import placeholder
from kfac_onnx.reference import BlockReference, BlockSettings
from kfac_onnx.reports.golden_file import GoldenFile, read_golden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from kfac_onnx.device.providers import GivenProviders
    from kfac_onnx.fisher.blocks import EmbeddingKFACFB
    from kfac_onnx.fisher.symbols import Array

__all__ = ["TOLERANCE", "GoldenRow", "relative_error", "verify_golden"]

TOLERANCE: Final = 1e-5
"""Largest difference, relative to the array's largest finite entry: float32 rounding of the original."""


@dataclass(frozen=True)
class GoldenRow:
    """One compared number: `quantity` is `<tag>.<name>`, `path` how ONNX made it."""

    file: str
    quantity: str
    path: str
    error_onnx: float
    error_reference: float
    ok: bool


def verify_golden(
    paths: Iterable[str | Path],
    *,
    providers: GivenProviders = ("CPUExecutionProvider",),
) -> list[GoldenRow]:
    """Return a row for every number of every file, by ONNX on these execution providers and in float64.

    Raises UserError for a file that cannot be used, and for a provider that onnxruntime does not have.
    """
    return [row for path in paths for row in _verify_file(read_golden(path), providers)]


def relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference over the largest finite entry; inf where shapes, inf or NaN disagree."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        return float("inf")
    finite = np.isfinite(expected)
    same_special = np.array_equal(found[~finite], expected[~finite], equal_nan=True)
    if not same_special or not np.isfinite(found[finite]).all():
        return float("inf")
    difference = float(np.abs(found[finite] - expected[finite]).max(initial=0.0))
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    return 0.0 if difference == 0 else float(np.divide(difference, largest)) if largest > 0 else float("inf")


class _Runs:
    """The same run by ONNX and in float64, kept in step."""

    def __init__(self, golden: GoldenFile, providers: GivenProviders) -> None:
        self.golden = golden
        self.uses = 1 if golden.num_uses is None else golden.num_uses
        self.fed_damping = golden.damping_is_tensor or bool(golden.overrides)
        self.block = self._make_block()
        self.session = FisherSession(self.collection, threads=1, providers=providers)
        settings = golden.settings
        self.reference = BlockReference(
            golden.vocab_size,
            golden.embedding_dim,
            BlockSettings(
                start_at_zero=settings.start_at_zero,
                debias=settings.zero_debias,
                unknown_before_first=settings.unknown_before_first,
                pi=settings.pi,
                towers=settings.towers,
                inverse_starts_at_zero=settings.inverse_starts_at_zero,
            ),
            num_uses=self.uses,
            exponents=golden.exponents,
        )

    def _make_block(self) -> EmbeddingKFACFB:
        golden = self.golden
        self.collection = LayerCollection(replace(golden.settings, decay=golden.ema_decay))
        table = placeholder("table", ir.DataType.FLOAT, [golden.vocab_size, golden.embedding_dim])
        block: EmbeddingKFACFB | None = None
        first = next((batch for verb, batch in golden.schedule if verb == "cov"), "0")
        ids = golden.ids(first)
        for tower in range(golden.num_towers):
            inputs = [
                placeholder(
                    f"ids/{tower}/{use}", ir.DataType.from_numpy(array.dtype), [None, *array.shape[1:]]
                )
                for use, array in enumerate(ids[tower])
            ]
            outputs = [self._rows(f"outputs/{tower}/{use}") for use in range(self.uses)]
            if golden.num_uses is None:
                block = self.collection.register_embedding(table, inputs[0], outputs[0], reuse="auto")
            else:
                block = self.collection.register_embedding_multi(table, inputs, outputs, reuse="auto")
        if block is None:
            raise UserError(f"the settings of '{golden.path}' have no tower")
        grads = [
            [
                tuple(self._rows(f"grads/{source}/{tower}/{use}") for use in range(self.uses))
                for tower in range(golden.num_towers)
            ]
            for source in range(golden.num_sources)
        ]
        damping = placeholder("damping", ir.DataType.FLOAT, []) if self.fed_damping else golden.damping
        block.instantiate_factors(grads, damping)
        for exponent in golden.exponents:
            block.register_matpower(exponent)
        return block

    def _rows(self, name: str) -> ir.Value:
        return placeholder(name, ir.DataType.FLOAT, [None, self.golden.embedding_dim])

    def damping_feed(self, damping: float) -> dict[str, Array]:
        return {"damping": np.array(damping, np.float32)} if self.fed_damping else {}

    def covariance_update(self, batch: str) -> None:
        ids, grads = self.golden.ids(batch), self.golden.gradients(batch)
        feeds: dict[str, Array] = {}
        for tower, uses in enumerate(ids):
            feeds |= {f"ids/{tower}/{use}": array for use, array in enumerate(uses)}
        for source, towers in enumerate(grads):
            for tower, uses in enumerate(towers):
                for use, array in enumerate(uses):
                    feeds[f"grads/{source}/{tower}/{use}"] = array.astype(np.float32)
        self.session.covariance_update(feeds)
        self.reference.covariance_update(ids, grads, self.golden.ema_decay)

    def inverse_update(self) -> None:
        self.session.inverse_update(self.damping_feed(self.golden.damping))
        self.reference.inverse_update(self.golden.damping)

    def quantity(self, name: str, damping: float) -> tuple[Array, Array, str]:
        """Return a named number by ONNX and in float64, and the path that made the first."""
        feeds, block, reference = self.damping_feed(damping), self.block, self.reference

        def one(value: ir.Value) -> Array:
            return self.session.run([value], feeds)[0]

        dampings = reference.dampings(damping)
        live: dict[str, Callable[[], tuple[Array, Array, str]]] = {
            "input_cov": lambda: (one(block.input_factor.get_cov_var()), reference.input_factor, "onnx"),
            "output_cov": lambda: (one(block.output_factor.get_cov_var()), reference.output_factor, "onnx"),
            "input_damping": lambda: (one(block.dampings[0]), np.array(dampings[0]), "onnx"),
            "output_damping": lambda: (one(block.dampings[1]), np.array(dampings[1]), "onnx"),
            "pi": lambda: (one(block.pi()), np.array(reference.pi()), "onnx"),
            "output_inverse": lambda: (
                one(block.output_factor.get_damped_inverse(block.output_damping)),
                reference.stored[-1.0],
                self._stored_path(-1.0),
            ),
            "full_fisher_block": lambda: (
                self.session.full_fisher_block(block, feeds),
                reference.full_fisher_block(),
                "onnx",
            ),
        }
        if name in live:
            return live[name]()
        return self._product(name, damping, feeds)

    def _product(self, name: str, damping: float, feeds: dict[str, Array]) -> tuple[Array, Array, str]:
        operation, part = name, "values" if isinstance(self.golden.vector, tuple) else ""
        for suffix in ("values", "indices", "dense_shape"):
            if name.endswith(f"_{suffix}"):
                operation, part = name.removesuffix(f"_{suffix}"), suffix
        exponent = {"multiply": 1.0, "multiply_inverse": -1.0}.get(operation)
        if exponent is None and operation.startswith("matpower_"):
            exponent = float(operation.removeprefix("matpower_"))
        if exponent is None:
            raise UserError(f"'{self.golden.path}' has a result '{name}' that is not known")
        vector = self.golden.vector
        if part == "indices" and isinstance(vector, tuple):
            return vector[0], vector[0], "given"
        if part == "dense_shape":
            shape = np.array(self.block.parameter_shape)
            return shape, shape, "given"
        found = self.session.multiply_matpower(self.block, vector, exponent, feeds)
        indices, values = vector if isinstance(vector, tuple) else (None, vector)
        expected = self.reference.multiply_matpower(values, indices, damping, exponent)
        return found, expected, self._stored_path(exponent)

    def _stored_path(self, exponent: float) -> str:
        if exponent == 1:
            return "onnx"
        stored = self.block.output_factor.get_matpower(exponent, self.block.output_damping)
        return self.session.paths.get(stored.name or "", "initial")


def _verify_file(golden: GoldenFile, providers: GivenProviders) -> list[GoldenRow]:
    runs = _Runs(golden, providers)
    rows: list[GoldenRow] = []
    for verb, argument in golden.schedule:
        match verb:
            case "cov":
                runs.covariance_update(argument)
            case "inv":
                runs.inverse_update()
            case _:
                damping = golden.overrides.get(argument, golden.damping)
                for name, expected in golden.expected[argument].items():
                    found, exact, path = runs.quantity(name, damping)
                    errors = relative_error(found, expected), relative_error(exact, expected)
                    ok = max(errors) <= TOLERANCE
                    rows.append(GoldenRow(golden.path.name, f"{argument}.{name}", path, *errors, ok))
    return rows
