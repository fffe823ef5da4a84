"""Files of other formats: what a file is, and the line that makes an `.npz` file of it.

Training data and weights are read from few formats, and people have them in many. A file is recognised by
its first bytes, or by its name where its format has none.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kfac_onnx.errors import UserError

__all__ = ["conversion_of", "refuse_other_format"]


@dataclass(frozen=True)
class Format:
    """A format: its name, the module that reads it, and an expression for its arrays by name.

    `reading` are the statements that come before `arrays`; the file is `sys.argv[1]`.
    """

    name: str
    modules: str
    reading: str
    arrays: str

    def line(self, path: Path) -> str:
        """Return the command that converts a file: one line for a shell."""
        program = (
            f"import sys, numpy as np{self.modules}; {self.reading}; np.savez(sys.argv[2], **{self.arrays})"
        )
        target = path.with_name(f"{path.stem or 'data'}.npz")
        return f'python -c "{program}" {shlex.quote(str(path))} {shlex.quote(str(target))}'


_TABLE: Final = "{n: np.array(t[n].to_pylist()) for n in t.column_names}"
_LINES: Final = "{n: np.array([r[n] for r in rows]) for n in rows[0]}"
_HF: Final = "{n: np.array(d[:][n]) for n in d.column_names}"
_WEIGHTS: Final = "{n: w.numpy() for n, w in weights.items()}"


def _text_table(name: str, delimiter: str) -> Format:
    reading = (
        f"t = np.atleast_1d(np.genfromtxt(sys.argv[1], delimiter='{delimiter}', names=True, dtype=None,"
        " encoding='utf-8'))"
    )
    return Format(name, "", reading, "{n: t[n] for n in t.dtype.names}")


_CSV: Final = _text_table("a table of comma-separated values", ",")
_TSV: Final = _text_table("a table of tab-separated values", r"\t")
_JSONL: Final = Format(
    "a file of JSON lines",
    ", json",
    "rows = [json.loads(x) for x in open(sys.argv[1], encoding='utf-8')]",
    _LINES,
)
_JSON: Final = Format(
    "a JSON file", ", json", "rows = json.load(open(sys.argv[1], encoding='utf-8'))", _LINES
)
_PARQUET: Final = Format("a Parquet file", ", pyarrow.parquet as q", "t = q.read_table(sys.argv[1])", _TABLE)
_ARROW: Final = Format("an Arrow file", ", pyarrow.feather as f", "t = f.read_table(sys.argv[1])", _TABLE)
_STREAM: Final = Format(
    "an Arrow stream", ", pyarrow as pa", "t = pa.ipc.open_stream(sys.argv[1]).read_all()", _TABLE
)
_DATASET: Final = Format(
    "a Hugging Face dataset", ", datasets", "d = datasets.load_from_disk(sys.argv[1])", _HF
)
_SPLITS: Final = Format(
    "a folder of Hugging Face datasets",
    ", datasets",
    "d = datasets.load_from_disk(sys.argv[1])['train']",
    _HF,
)
_NPY: Final = Format("a single array", "", "a = np.load(sys.argv[1])", "{'NAME': a}")
_TORCH: Final = Format(
    "a file of PyTorch's", ", torch", "weights = torch.load(sys.argv[1], map_location='cpu')", _WEIGHTS
)
_HDF5: Final = Format("an HDF5 file", ", h5py", "h = h5py.File(sys.argv[1])", "{n: h[n][:] for n in h}")
_SAFETENSORS: Final = Format(
    "a .safetensors file", ", safetensors.numpy as s", "t = s.load_file(sys.argv[1])", "t"
)

_BEGINNINGS: Final = (
    (b"PAR1", _PARQUET),
    (b"ARROW1", _ARROW),
    (b"\xff\xff\xff\xff", _STREAM),
    (b"\x93NUMPY", _NPY),
    (b"\x89HDF\r\n\x1a\n", _HDF5),
)
_NAMES: Final = {
    ".csv": _CSV,
    ".tsv": _TSV,
    ".tab": _TSV,
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".json": _JSON,
    ".parquet": _PARQUET,
    ".pq": _PARQUET,
    ".arrow": _ARROW,
    ".feather": _ARROW,
    ".npy": _NPY,
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".ckpt": _TORCH,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".safetensors": _SAFETENSORS,
}
_IN_FOLDERS: Final = (
    ("dataset_dict.json", _SPLITS),
    ("state.json", _DATASET),
    ("dataset_info.json", _DATASET),
)
"""Files by which the folder of a dataset is known."""


def _format_of(path: Path) -> Format | None:
    if path.is_dir():
        return next((form for name, form in _IN_FOLDERS if (path / name).is_file()), None)
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return None
    by_content = next((form for magic, form in _BEGINNINGS if start.startswith(magic)), None)
    return by_content or _NAMES.get(path.suffix.lower())


def conversion_of(path: str | Path) -> tuple[str, str] | None:
    """Return what a file or folder of another format is, in words, and the line that converts it.

    A folder of such files is one of its first file; None where nothing is recognised.
    """
    place = Path(path)
    form = _format_of(place)
    if form is None and place.is_dir():
        files = sorted(item for item in place.iterdir() if item.is_file())
        for file in files:
            form = _format_of(file)
            if form is not None:
                return f"a folder with {form.name}, '{file.name}'", form.line(file)
    return None if form is None else (form.name, form.line(place))


def refuse_other_format(path: str | Path, what: str) -> None:
    """Raise UserError for a file or folder of another format than `.npz`, with the line that converts it.

    `what` is the subject of the sentence, in the plural, such as `training data`.
    """
    found = conversion_of(path)
    if found is not None:
        name, line = found
        raise UserError(
            f"'{path}' is {name}, and {what} are read from .npz files: one array per input, by its name",
            help=f"convert it: {line}",
        )
