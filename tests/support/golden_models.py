"""Golden files: readable models with what to run on them and what must come out.

A file `golden/<pass>.onnxtxt` of any folder of tests has one or more parts, each under a heading
`# ----- What the pass does.` A part is a model as text, and comments:

    # RUN: kfac-onnx opt %s -p dce     the command; the file's first one is for all parts that have none
    # CHECK: %y = Mul(%x, %w)          the language of LLVM's FileCheck, on what the command prints
    # RANGE: ids 0 9                   whole numbers that the input `ids` may hold (default: 0 and 1)
    # DIMS: batch=3                    sizes of named dimensions (default: 3)
    # NUMBERS: no, because ...         the model cannot be run as it is

`%s` is the part's model; with `-o %t` the checks are on the text of the model that was written. Where every
pass that is run keeps the meaning of a model, both models are run in ONNX Runtime on random inputs, and their
outputs must agree.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import filecheck.main
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kfac_onnx.pipeline.pipeline import Pipeline, parse_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Part", "golden_files", "parts_of", "run_model"]

HEADING: Final = re.compile(r"^# ----- (.*)$", re.MULTILINE)
RUN: Final = "# RUN: kfac-onnx "


@dataclass(frozen=True)
class Part:
    """One behaviour of a golden file: its heading, its text, and the words of its command."""

    file: Path
    heading: str
    text: str
    words: tuple[str, ...]
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    dims: dict[str, int] = field(default_factory=dict[str, int])
    numbers: bool = True

    @property
    def pipeline(self) -> Pipeline:
        """The passes that the command runs."""
        return parse_pipeline(self.words[self.words.index("-p") + 1])

    def __str__(self) -> str:
        return f"{self.file.stem}: {self.heading}"

    def write(self, folder: Path) -> Path:
        """Write the part's model as a file of its own."""
        path = folder / f"{self.file.stem}.onnxtxt"
        path.write_text(self.text, encoding="utf-8")
        return path

    def check(self, output: str, folder: Path) -> int:
        """Return FileCheck's exit code for an output: 0 where all CHECK lines match."""
        printed, checks = folder / "output.txt", folder / "checks.txt"
        printed.write_text(output, encoding="utf-8")
        checks.write_text(self.text, encoding="utf-8")
        with pytest.raises(SystemExit) as left:
            filecheck.main.main(["filecheck", str(checks), "--input-file", str(printed)])
        return int(left.value.code or 0)

    def feeds(self, model: onnx.ModelProto) -> dict[str, np.ndarray]:
        """Return random values for the inputs of a model, of their declared shapes and the part's ranges."""
        rng = np.random.default_rng(0)
        held = {item.name for item in model.graph.initializer}
        return {item.name: self._array(item, rng) for item in model.graph.input if item.name not in held}

    def _array(self, item: onnx.ValueInfoProto, rng: np.random.Generator) -> np.ndarray:
        tensor = item.type.tensor_type
        shape = [dim.dim_value or self.dims.get(dim.dim_param, 3) for dim in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype.kind in "iub" or item.name in self.ranges:
            low, high = self.ranges.get(item.name, (0, 1))
            return rng.integers(low, high + 1, shape).astype(dtype)
        return rng.standard_normal(shape).astype(dtype)


def golden_files() -> list[Path]:
    """Return all golden files of all folders of tests."""
    return sorted((Path(__file__).parents[1]).glob("*/golden/*.onnxtxt"))


def parts_of(path: Path) -> Iterator[Part]:
    """Yield the parts of a golden file; one without headings is one part."""
    text = path.read_text(encoding="utf-8")
    pieces = HEADING.split(text)
    default = _command(pieces[0])
    assert default is not None or len(pieces) > 1, f"{path.name} must have a line '{RUN}...'"
    if len(pieces) == 1:
        yield _part(path, path.stem, text, default)
    for heading, body in zip(pieces[1::2], pieces[2::2], strict=True):
        yield _part(path, heading, body, _command(body) or default)


def _command(text: str) -> tuple[str, ...] | None:
    line = next((line for line in text.splitlines() if line.startswith(RUN)), None)
    return None if line is None else tuple(shlex.split(line.removeprefix(RUN)))


def _part(path: Path, heading: str, text: str, words: tuple[str, ...] | None) -> Part:
    assert words is not None, f"{path.name}, '{heading}': there is no line '{RUN}...'"
    assert "# CHECK" in text, f"{path.name}, '{heading}': it checks nothing"
    ranges = {
        name: (int(low), int(high))
        for name, low, high in re.findall(r"^# RANGE: (\S+) (\S+) (\S+)$", text, re.M)
    }
    dims = {
        name: int(size)
        for line in re.findall(r"^# DIMS: (.*)$", text, re.MULTILINE)
        for name, size in (word.split("=") for word in line.split())
    }
    return Part(path, heading, text, words, ranges, dims, "# NUMBERS: no" not in text)


def run_model(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Run a model in ONNX Runtime, without its optimizations, and return its outputs by name."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))
