"""Files of other formats: named for what they are, with a line that converts them; the lines are run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kfac_onnx.disk.conversions import _BEGINNINGS, _IN_FOLDERS, _NAMES, conversion_of
from kfac_onnx.disk.npz import read_npz
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.file_batches import FileBatches

IDS, LABELS = [[3, 1], [2, 7], [0, 5]], [0.5, 1.5, 2.5]
ROWS = [{"ids": ids, "label": label} for ids, label in zip(IDS, LABELS, strict=True)]


def run(line: str) -> None:
    """Run a line as a shell would, with this interpreter for `python`."""
    words = shlex.split(line)
    assert words[0] == "python"
    subprocess.run(  # noqa: S603  our own line
        [sys.executable, *words[1:]], check=True, timeout=60
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my data.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
        ("d.ndjson", "\n".join(json.dumps(row) for row in ROWS)),
        ("it's.json", json.dumps(ROWS)),
    ],
)
def test_a_line_for_json_does_what_it_says(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_npz(path)
    assert caught.value.help is not None
    run(caught.value.help.removeprefix("convert it: "))
    arrays = read_npz(path.with_suffix(".npz"))
    np.testing.assert_array_equal(arrays["ids"], IDS)
    np.testing.assert_array_equal(arrays["label"], LABELS)


@pytest.mark.parametrize(("name", "mark"), [("d.csv", ","), ("d.tsv", "\t")])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_line_for_a_table_does_what_it_says(tmp_path: Path, name: str, mark: str, rows: int) -> None:
    path = tmp_path / name
    lines = [mark.join(map(str, (ids[0], label))) for ids, label in zip(IDS[:rows], LABELS, strict=False)]
    path.write_text("\n".join([f"ids{mark}label", *lines]))
    conversion = conversion_of(path)
    assert conversion is not None
    run(conversion[1])
    arrays = read_npz(tmp_path / "d.npz")
    assert (arrays["ids"].dtype, arrays["label"].dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(arrays["ids"], [3, 2, 0][:rows])
    np.testing.assert_array_equal(arrays["label"], LABELS[:rows])


@pytest.mark.parametrize(
    "open_data", [read_npz, lambda path: Batches(path, 1), lambda path: next(iter(FileBatches(path)))]
)
def test_the_whole_sentence(tmp_path: Path, open_data: object) -> None:
    path = tmp_path / "d.csv"
    path.write_text("ids,labels\n1,2\n")
    with pytest.raises(UserError) as caught:
        open_data(path)  # type: ignore[operator]
    assert str(caught.value) == (
        f"'{path}' is a table of comma-separated values, and arrays are read from .npz files: one array per input,"
        " by its name\n"
        '  help: convert it: python -c "import sys, numpy as np; t = np.atleast_1d(np.genfromtxt(sys.argv[1],'
        " delimiter=',', names=True, dtype=None, encoding='utf-8')); np.savez(sys.argv[2],"
        f' **{{n: t[n] for n in t.dtype.names}})" {path} {path.with_suffix(".npz")}'
    )


@pytest.mark.parametrize("open_data", [lambda path: Batches(path, 1), FileBatches])
@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("state.json", "data-00000-of-00001.arrow"), "a Hugging Face dataset"),
        (("dataset_dict.json",), "a folder of Hugging Face datasets"),
        (("readme.txt", "part-0.parquet"), "a folder with a Parquet file, 'part-0.parquet'"),
        (("a.csv", "b.csv"), "a folder with a table of comma-separated values, 'a.csv'"),
    ],
)
def test_folders_of_other_formats(
    tmp_path: Path, open_data: object, files: tuple[str, ...], name: str
) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"PAR1" if file.endswith("parquet") else b"x")
    with pytest.raises(UserError) as caught:
        open_data(tmp_path)  # type: ignore[operator]
    assert caught.value.message == (
        f"'{tmp_path}' is {name}, and training data are read from .npz files: one array per input, by its name"
    )
    assert caught.value.help is not None
    assert caught.value.help.startswith('convert it: python -c "import sys, numpy as np')


def test_each_line_is_a_program() -> None:
    formats = {form for _, form in (*_BEGINNINGS, *_IN_FOLDERS)} | set(_NAMES.values())
    assert len(formats) > 10
    for form in formats:
        words = shlex.split(form.line(Path("a b.x")))
        assert words[:2] == ["python", "-c"]
        compile(words[2], form.name, "exec")
        assert words[3:] == ["a b.x", "a b.npz"]


def test_what_is_recognised_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"PAR1....")
    assert (conversion_of(tmp_path / "data") or ("",))[0] == "a Parquet file"
    (tmp_path / "text").write_text("anything")
    assert conversion_of(tmp_path / "text") is None
    assert conversion_of(tmp_path / "none") is None
