"""Rows of a table for ids of any kind: texts, or integers of 64 bits.

    row(id) = first + rank(id)                 ids that were counted often enough, the most frequent first
            = first + n + hash(id) mod buckets other ids, where there are buckets
            = unknown                          other ids, where there are none

Ids of the same count are in the order of the ids. Integers are hashed by the finalizer of SplitMix64 (Steele,
Lea, Flood 2014, "Fast splittable pseudorandom number generators", fig. 14,
https://doi.org/10.1145/2660193.2660195), texts by the first 8 bytes of BLAKE2b (RFC 7693,
https://www.rfc-editor.org/rfc/rfc7693), both the same on every machine. Buckets are the hashing trick
(Weinberger et al. 2009, sec. 2, https://arxiv.org/abs/0902.2206).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.disk.atomic import atomic_path
from kfac_onnx.disk.records import RecordError, build, parse
from kfac_onnx.disk.stored import safetensors_arrays
from kfac_onnx.errors import UserError, first_line

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SUFFIX", "Counts", "Vocabulary", "read_vocabulary", "vocabularies_beside", "write_vocabulary"]

SUFFIX: Final = ".vocabulary"
_KEY: Final = "kfac_vocabulary"
_VERSION: Final = 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids that have a row of their own, and where all others go.

    Args:
        inputs: the batch inputs whose ids these are.
        keys: int64[n], or texts [n], in the order of their rows.
        counts: int64[n], how often each was seen.
        first: the row of the first key; rows before it are nobody's, such as one of padding.
        buckets: rows behind the keys that all other ids share by their hash.
        unknown: where there are no buckets, the row of all other ids; the one behind the keys if None.

    """

    inputs: tuple[str, ...]
    keys: np.ndarray
    counts: np.ndarray
    first: int = 0
    buckets: int = 0
    unknown: int | None = None

    @property
    def texts(self) -> bool:
        """Whether the ids are texts."""
        return self.keys.dtype.kind == "O"

    @property
    def unknown_row(self) -> int:
        """The row of ids that are no key; of buckets, the first."""
        return self.first + len(self.keys) if self.unknown is None else self.unknown

    @property
    def size(self) -> int:
        """How many rows a table needs."""
        rest = self.buckets if self.buckets else int(self.unknown is None)
        return self.first + len(self.keys) + rest

    @cached_property
    def content(self) -> int:
        """A number of 48 bits that tells it from others."""
        digest = hashlib.sha256(f"{self.first} {self.buckets} {self.unknown}\n".encode())
        keys = "\n".join(self.keys.tolist()).encode() if self.texts else self.keys.tobytes()
        digest.update(keys)
        return int.from_bytes(digest.digest()[:6], "big")

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.keys, kind="stable")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.keys[self._order]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {key: place for place, key in enumerate(self.keys.tolist())}

    def rows(self, ids: np.ndarray, what: str = "the ids") -> np.ndarray:
        """Return the row of each id, int64 in the shape of the ids.

        Raises UserError for ids of another kind than the keys; `what` is the subject of its sentence.
        """
        if self.texts != (ids.dtype.kind in "OU"):
            kinds = ("numbers", "texts") if self.texts else ("texts", "integers")
            raise UserError(f"{what} holds {kinds[0]}, and the keys of the vocabulary are {kinds[1]}")
        if self.texts:
            flat = ids.reshape(-1).tolist()
            places = np.fromiter((self._places.get(text, -1) for text in flat), np.int64, len(flat))
            rows = np.where(places < 0, self.unknown_row, places + self.first)
            for index in np.flatnonzero(places < 0) if self.buckets else ():
                rows[index] += _hash_of_text(flat[index]) % self.buckets
            return rows.reshape(ids.shape)
        if ids.dtype.kind not in "iu" or (ids.dtype == np.uint64 and (ids >> np.uint64(63)).any()):
            raise UserError(f"{what} holds {ids.dtype.name}, and the keys of the vocabulary are int64")
        flat = ids.reshape(-1).astype(np.int64)
        if len(self.keys):
            near = np.minimum(np.searchsorted(self._sorted, flat), len(self.keys) - 1)
            present = self._sorted[near] == flat
            rows = np.where(present, self._order[near] + self.first, self.unknown_row)
        else:
            present, rows = np.zeros(flat.shape, bool), np.full(flat.shape, self.unknown_row)
        if self.buckets:
            bucket = (_hash_of_integers(flat) % np.uint64(self.buckets)).astype(np.int64)
            rows = np.where(present, rows, self.unknown_row + bucket)
        return rows.astype(np.int64).reshape(ids.shape)


def _hash_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _hash_of_integers(ids: np.ndarray) -> np.ndarray:
    z = ids.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Counts:
    """How often each id was seen: what is in memory are the distinct ids."""

    def __init__(self) -> None:
        self._texts: Counter[str] = Counter()
        self._integers: list[tuple[np.ndarray, np.ndarray]] = []
        self._pending = 0
        self.seen = 0

    def add(self, ids: np.ndarray, what: str) -> None:
        """Count ids; raises UserError for what is no id, or of another kind than those before."""
        self.seen += ids.size
        if ids.dtype.kind in "OU":
            self._texts.update(ids.reshape(-1).tolist())
        elif ids.dtype.kind in "iu" and not (ids.dtype == np.uint64 and (ids >> np.uint64(63)).any()):
            keys, counts = np.unique(ids.astype(np.int64), return_counts=True)
            self._integers.append((keys, counts.astype(np.int64)))
            self._pending += len(keys)
            if self._pending > 2 * len(self._integers[0][0]) + (1 << 20):
                self._merge()
        else:
            raise UserError(f"{what} holds {ids.dtype.name}, and ids are texts or integers of 64 bits")
        if self._texts and self._integers:
            raise UserError(f"{what} holds ids of another kind than before: texts and integers")

    def _merge(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._integers:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys, inverse = np.unique(np.concatenate([part[0] for part in self._integers]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, inverse, np.concatenate([part[1] for part in self._integers]))
        self._integers, self._pending = [(keys, counts)], 0
        return keys, counts

    def vocabulary(
        self,
        inputs: tuple[str, ...],
        *,
        minimum: int = 1,
        first: int = 0,
        buckets: int = 0,
        unknown: int | None = None,
        rows: int | None = None,
    ) -> Vocabulary:
        """Return the vocabulary of the ids that were seen at least `minimum` times, in at most `rows` rows.

        Raises UserError where no row is left for a key, or `unknown` is none of the rows before `first`.
        """
        if unknown is not None and buckets:
            raise UserError("ids that are no key go to buckets or to one row, not to both")
        if unknown is not None and not 0 <= unknown < first:
            raise UserError(
                f"row {unknown} cannot be that of unknown ids: rows before the first key are 0 to {first - 1}"
                if first
                else f"row {unknown} cannot be that of unknown ids: it is a key's, or behind them",
                help=f"begin the keys behind it: --first-row {max(unknown, 0) + 1}",
            )
        keys: np.ndarray
        if self._texts:
            ordered = sorted(self._texts.items(), key=lambda entry: (-entry[1], entry[0]))
            keys = np.empty(len(ordered), object)
            keys[:] = [key for key, _ in ordered]
            counts = np.array([count for _, count in ordered], np.int64)
        else:
            keys, counts = self._merge()
            order = np.argsort(-counts, kind="stable")
            keys, counts = keys[order], counts[order]
        number = int(np.count_nonzero(counts >= minimum))
        if rows is not None:
            room = rows - first - (buckets if buckets else int(unknown is None))
            if room < 1:
                raise UserError(f"{rows} rows leave none for a key: {rows - room} are those of others")
            number = min(number, room)
        return Vocabulary(inputs, keys[:number], counts[:number], first, buckets, unknown)


@dataclass(frozen=True)
class _Header:
    version: int
    inputs: tuple[str, ...]
    first: int
    buckets: int
    unknown: int | None
    texts: bool


def write_vocabulary(path: str | Path, vocabulary: Vocabulary) -> None:
    """Write the file, whole or not at all: safetensors with `keys` (or `texts` and `ends`) and `counts`.

    Raises UserError where the place cannot be written.
    """
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]  bare PathLike

    tensors: dict[str, np.ndarray] = {"counts": np.asarray(vocabulary.counts, np.int64)}
    if vocabulary.texts:
        parts = [text.encode("utf-8", "surrogatepass") for text in vocabulary.keys.tolist()]
        tensors["texts"] = np.frombuffer(b"".join(parts), np.uint8)
        tensors["ends"] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    else:
        tensors["keys"] = np.asarray(vocabulary.keys, np.int64)
    header = _Header(
        _VERSION,
        vocabulary.inputs,
        vocabulary.first,
        vocabulary.buckets,
        vocabulary.unknown,
        vocabulary.texts,
    )
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={_KEY: json.dumps(dataclasses.asdict(header))})


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Return the vocabulary in a file; raises UserError where it is none, or damaged."""
    try:
        tensors, entries = safetensors_arrays(path)
    except (OSError, ValueError) as e:
        raise UserError(f"the vocabulary '{path}' cannot be read: {first_line(e)}") from e
    try:
        header = build(_Header, parse(entries[_KEY]))
        if header.version != _VERSION:
            raise UserError(
                f"the vocabulary '{path}' has version {header.version}, this program reads {_VERSION}"
            )
        counts = np.asarray(tensors["counts"])
        keys = _texts(tensors) if header.texts else np.asarray(tensors["keys"])
    except (KeyError, RecordError, UnicodeDecodeError, ValueError) as e:
        raise UserError(f"'{path}' is no vocabulary, or a damaged one") from e
    fits = len(keys) == len(counts) and keys.ndim == counts.ndim == 1 and counts.dtype == np.int64
    distinct = len(set(keys.tolist())) == len(keys)
    if not (fits and distinct and (header.texts or keys.dtype == np.int64)):
        raise UserError(f"'{path}' is no vocabulary, or a damaged one")
    if header.first < 0 or header.buckets < 0 or not 0 <= (header.unknown or 0) <= header.first:
        raise UserError(f"'{path}' is no vocabulary, or a damaged one")
    return Vocabulary(header.inputs, keys, counts, header.first, header.buckets, header.unknown)


def _texts(tensors: dict[str, Any]) -> np.ndarray:
    blob, ends = np.asarray(tensors["texts"]).tobytes(), np.asarray(tensors["ends"]).tolist()
    keys = np.empty(len(ends), object)
    starts = [0, *ends[:-1]]
    if ends and (ends[-1] != len(blob) or starts != sorted(starts)):
        raise ValueError
    keys[:] = [blob[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]
    return keys


def vocabularies_beside(model: Path) -> dict[str, tuple[Path, Vocabulary]]:
    """Return the vocabularies that were saved beside a model, by the input that they are for.

    Raises UserError where two are for the same input.
    """
    found: dict[str, tuple[Path, Vocabulary]] = {}
    for path in sorted(model.parent.glob(f"*{SUFFIX}")):
        if not path.name.startswith(f"{model.stem}."):
            continue
        vocabulary = read_vocabulary(path)
        for name in vocabulary.inputs:
            if name in found:
                raise UserError(
                    f"'{found[name][0]}' and '{path}' are both vocabularies of input '{name}'",
                    help=f"take one away, or say which: --vocabulary {name}={path}",
                )
            found[name] = path, vocabulary
    return found
