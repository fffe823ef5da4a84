"""What is trained: a training graph, its parameters and a stream of batches for each workload and vocabulary.

| workload    | model                                                          | ids                    |
|-------------|----------------------------------------------------------------|------------------------|
| `mf`        | matrix factorisation, two tables V x D                         | uniform, or Zipf       |
| `lm`        | the demo's language model, 12,762 x 64, 256 examples a step    | text                   |
| `dlrm`      | 8 tables of mixed D, bags of 4 summed, 13 numbers, a small MLP | Zipf, exponent 1       |
| `movielens` | rating prediction with biases on MovieLens-100k                | the data's             |
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from kfac_onnx.bench import graphs
from kfac_onnx.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

    from kfac_onnx.bench.movielens import Ratings

__all__ = ["WORKLOADS", "Case", "cases", "stream_of", "write_parameters"]

WORKLOADS: Final = ("mf", "lm", "dlrm", "movielens")

DLRM_WIDTHS: Final = (4, 8, 16, 16, 32, 32, 64, 128)
DLRM_BAG: Final = 4
DLRM_NUMBERS: Final = 13
DLRM_EXAMPLES: Final = 512
DLRM_HIDDEN: Final = 64
LM_EXAMPLES: Final = 256
MOVIELENS_EXAMPLES: Final = 1_024
MOVIELENS_WIDTH: Final = 32

Batch = dict[str, np.ndarray]
_PIECE: Final = 1 << 22
"""Entries of a parameter drawn at once."""
_DRAWN: Final = 16
"""Pieces that are drawn: drawing takes longer than all else about a table of billions."""


@dataclass(frozen=True)
class Case:
    """One training task.

    `tables` maps a table to (V, D), `lookups` to its lookups per step; `others` are the shapes of all other
    parameters. Initial values are uniform within ±`scales[name]`. `batches(seed)` yields batches without end.
    """

    workload: str
    name: str
    vocab_size: int
    graph: Callable[[], ir.Model | onnx.ModelProto]
    tables: Mapping[str, tuple[int, int]]
    lookups: Mapping[str, int]
    others: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float] = field(repr=False)
    batches: Callable[[int], Iterator[Batch]] = field(repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, tables first."""
        return {**self.tables, **self.others}

    @property
    def table_bytes(self) -> int:
        """Size of all tables."""
        return sum(4 * rows * width for rows, width in self.tables.values())


def cases(
    workload: str,
    *,
    vocab_sizes: tuple[int, ...],
    widths: tuple[int, ...] = (64,),
    lookups: tuple[int, ...] = (4_096,),
    data: Ratings | None = None,
    lm_examples: int = LM_EXAMPLES,
    zipf: float | None = None,
) -> list[Case]:
    """Return the cases of a workload; those with a vocabulary of their own are one.

    Raises UserError for an unknown workload, and for `movielens` without its data.
    """
    match workload:
        case "mf":
            return [_mf(V, D, N, zipf) for D in widths for N in lookups for V in vocab_sizes]
        case "dlrm":
            return [_dlrm(V) for V in vocab_sizes]
        case "lm":
            return [_lm(lm_examples)]
        case "movielens":
            if data is None:
                raise UserError(
                    "the workload movielens needs the ratings, which are not part of this package",
                    help="give them with --movielens FILE: u.data, or ml-100k.inter of the recbole wheel",
                )
            return [_movielens(data)]
        case _:
            raise UserError(
                f"unknown workload '{workload}'{did_you_mean(workload, WORKLOADS)}",
                help=f"the workloads are: {', '.join(WORKLOADS)}",
            )


def stream_of(seed: int) -> np.random.Generator:
    """Return the generator that batches of a seed are drawn from."""
    return np.random.default_rng([seed, 1])


def _mf(V: int, D: int, N: int, zipf: float | None) -> Case:
    def batches(seed: int) -> Iterator[Batch]:
        random = stream_of(seed)
        while True:
            users, items = (
                random.integers(0, V, (2, N)) if zipf is None else zipf_ids(random, V, (2, N), zipf)
            )
            # Part of the rating depends on the user, so that there is something to learn.
            noise = np.float32(0.1) * random.standard_normal(N, dtype=np.float32)
            yield {"users": users, "items": items, "ratings": (users % 2).astype(np.float32) + 1 + noise}

    tables = {"user": (V, D), "item": (V, D)}
    others: dict[str, tuple[int, ...]] = {"bias": ()}
    return Case(
        workload="mf",
        name=f"mf D={D} N={N}" + ("" if zipf is None else f" Zipf {zipf:g}"),
        vocab_size=V,
        graph=lambda: graphs.factorisation({**tables, **others}),
        tables=tables,
        lookups=dict.fromkeys(tables, N),
        others=others,
        scales={"user": D**-0.5, "item": D**-0.5},
        batches=batches,
    )


def _dlrm(V: int) -> Case:
    tables = {f"table_{k}": (V, D) for k, D in enumerate(DLRM_WIDTHS)}
    features = sum(DLRM_WIDTHS) + DLRM_NUMBERS
    others: dict[str, tuple[int, ...]] = {
        "hidden_weight": (DLRM_HIDDEN, features),
        "hidden_bias": (DLRM_HIDDEN,),
        "output_weight": (1, DLRM_HIDDEN),
        "output_bias": (1,),
    }

    def batches(seed: int) -> Iterator[Batch]:
        random = stream_of(seed)
        while True:
            batch: Batch = {
                f"ids_{k}": zipf_ids(random, V, (DLRM_EXAMPLES, DLRM_BAG)) for k in range(len(tables))
            }
            numbers = random.standard_normal((DLRM_EXAMPLES, DLRM_NUMBERS), dtype=np.float32)
            clicked = numbers[:, 0] + (batch["ids_7"][:, 0] % 2) > 0.5
            yield {**batch, "numbers": numbers, "labels": clicked.astype(np.float32)}

    return Case(
        workload="dlrm",
        name=f"dlrm {len(tables)} tables",
        vocab_size=V,
        graph=lambda: graphs.bags({**tables, **others}, len(tables), DLRM_BAG, DLRM_NUMBERS),
        tables=tables,
        lookups=dict.fromkeys(tables, DLRM_EXAMPLES * DLRM_BAG),
        others=others,
        scales={
            **dict.fromkeys(tables, 0.1),
            "hidden_weight": features**-0.5,
            "hidden_bias": features**-0.5,
            "output_weight": DLRM_HIDDEN**-0.5,
            "output_bias": DLRM_HIDDEN**-0.5,
        },
        batches=batches,
    )


def zipf_ids(
    random: np.random.Generator, V: int, shape: tuple[int, ...], exponent: float = 1.0
) -> np.ndarray:
    """Return int64 ids whose frequency falls as rank^−exponent; ranks are spread over the table.

    The rank is floor(x) − 1 for x of the continuous law with that density on [1, V+1): for exponent 1 it is
    (V+1)^u, u uniform in [0, 1), so that a rank up to k has probability log(k+2)/log(V+1).
    """
    u, last = random.random(shape), V + 1.0
    power = 1.0 - exponent
    drawn = last**u if power == 0.0 else (1.0 + u * (last**power - 1.0)) ** (1.0 / power)
    rank = np.minimum(np.floor(drawn).astype(np.int64) - 1, V - 1)
    return rank * 2_654_435_761 % V  # a large prime: ranks that are near lie far apart


@cache
def _text() -> Callable[[int, int], Iterator[Batch]]:
    from kfac_onnx.demo.corpus import load_corpus

    return load_corpus().batches  # pyright: ignore[reportReturnType]  its arrays are int64


def _lm(examples: int) -> Case:
    from kfac_onnx.demo.corpus import CONTEXT
    from kfac_onnx.demo.model import EMBEDDING, SHAPES, model_bytes

    def graph() -> onnx.ModelProto:
        import onnx

        return onnx.load_from_string(model_bytes())

    V, D = SHAPES[EMBEDDING]
    others = {name: shape for name, shape in SHAPES.items() if name != EMBEDDING}
    inputs = {name: SHAPES[name.replace("bias", "weight")][1] for name in others}
    return Case(
        workload="lm",
        name=f"lm D={D}" + ("" if examples == LM_EXAMPLES else f" batch {examples:,}"),
        vocab_size=V,
        graph=graph,
        tables={EMBEDDING: (V, D)},
        lookups={EMBEDDING: examples * CONTEXT},
        others=others,
        scales={EMBEDDING: 0.17, **{name: width**-0.5 for name, width in inputs.items()}},
        batches=lambda seed: _text()(examples, seed),
    )


def _movielens(data: Ratings) -> Case:
    D = MOVIELENS_WIDTH
    tables = {
        "user": (data.users, D),
        "item": (data.items, D),
        "user_bias": (data.users, 1),
        "item_bias": (data.items, 1),
    }
    others: dict[str, tuple[int, ...]] = {"bias": ()}
    return Case(
        workload="movielens",
        name=f"movielens D={D}",
        vocab_size=data.users + data.items,
        graph=lambda: graphs.ratings({**tables, **others}),
        tables=tables,
        lookups=dict.fromkeys(tables, MOVIELENS_EXAMPLES),
        others=others,
        scales={"user": 0.1, "item": 0.1},
        batches=lambda seed: data.batches(MOVIELENS_EXAMPLES, seed),
    )


def write_parameters(case: Case, path: Path, seed: int = 0) -> None:
    """Write a case's initial values as safetensors, in pieces: a table need not fit beside the sessions.

    Of a parameter with more than `_DRAWN` pieces, they come round again.

    Raises UserError when the file cannot be written.
    """
    random = np.random.default_rng([seed, 0])
    header: dict[str, object] = {}
    end = 0
    for name, shape in case.shapes.items():
        start, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for name, shape in case.shapes.items():
                size, scale = int(np.prod(shape, dtype=np.int64)), case.scales.get(name, 0.0)
                pieces: list[np.ndarray] = []
                for number, start in enumerate(range(0, size, _PIECE)):
                    if number < _DRAWN:
                        piece = random.random(min(size - start, _PIECE), dtype=np.float32)
                        piece -= np.float32(0.5)
                        piece *= np.float32(2 * scale)
                        pieces.append(piece)
                    file.write(pieces[number % _DRAWN][: size - start].data)
    except OSError as e:
        raise UserError(
            f"the initial values of {case.name} cannot be written: {first_line(e)}",
            help="give a folder with room for the tables with --scratch",
        ) from e
