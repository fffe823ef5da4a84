"""Every format that is read gives the same batches, in the same order, from any row on."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from table_files import FORMATS, HAVE_LISTS, HAVE_TEXTS, REFUSING, WRITERS, arrow

from kfac_onnx.data.formats import chunks
from kfac_onnx.data.formats.chunks import chunks_of
from kfac_onnx.data.readers import READERS, files_of, open_files
from kfac_onnx.data.vocabulary import Counts
from kfac_onnx.errors import UserError
from kfac_onnx.runtime.feed.batches import BatchInput
from kfac_onnx.runtime.feed.table_batches import batches_of

if TYPE_CHECKING:
    from pathlib import Path

    from kfac_onnx.runtime.feed.data import Batches

INT, FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
IDS, LABELS = BatchInput("ids", INT, ("B",)), BatchInput("labels", FLOAT, ("B",))
ROWS = 40
TABLE = {"user": list(range(ROWS)), "labels": [row / 4 for row in range(ROWS)], "other": ["x"] * ROWS}
NUMBERS = {name: values for name, values in TABLE.items() if name != "other"}


def opened(path: Path, inputs: list[BatchInput] | None = None, size: int = 6, **options: Any) -> Batches:
    options.setdefault("columns", "user=ids")
    return batches_of(str(path), inputs or [IDS, LABELS], size, **options)  # type: ignore[return-value]  of files


def test_there_is_a_writer_for_each_reader() -> None:
    assert set(WRITERS) == {reader.name for reader in READERS} - REFUSING


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_its_rows_in_order_and_in_the_types_of_the_inputs(
    tmp_path: Path, name: str
) -> None:
    data = opened(WRITERS[name](tmp_path, TABLE if name in HAVE_TEXTS else NUMBERS))
    batches = list(data)
    assert [len(batch["ids"]) for batch in batches] == [6] * 6 + [4]
    assert {(batch["ids"].dtype.name, batch["labels"].dtype.name) for batch in batches} == {
        ("int64", "float32")
    }
    np.testing.assert_array_equal(np.concatenate([batch["ids"] for batch in batches]), TABLE["user"])
    np.testing.assert_array_equal(np.concatenate([batch["labels"] for batch in batches]), TABLE["labels"])


@pytest.mark.parametrize("name", FORMATS)
def test_shuffling_is_by_the_seed_and_goes_on_at_any_batch(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path, NUMBERS)
    data = opened(path, seed=3, window=11)
    first = [batch["ids"].tolist() for batch in data.epoch(0)]
    flat = [row for batch in first for row in batch]
    assert sorted(flat) == TABLE["user"]
    assert flat != TABLE["user"]
    assert [batch["ids"].tolist() for batch in opened(path, seed=3, window=11).epoch(0)] == first
    assert [batch["ids"].tolist() for batch in data.epoch(1)] != first
    for skip in range(len(data) + 1):
        assert [batch["ids"].tolist() for batch in data.epoch(0, skip=skip)] == first[skip:]
    for batch in data:
        np.testing.assert_array_equal(batch["labels"], batch["ids"] / 4)


@pytest.mark.parametrize("name", HAVE_LISTS)
def test_lists_are_padded_or_become_bags(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path, {"user": [[1], [2, 3, 4], [], [5, 6]], "labels": [0.0, 1.0, 2.0, 3.0]})
    matrix = BatchInput("ids", INT, ("B", "L"))
    (batch,) = opened(path, [matrix, LABELS], 4, columns="user=ids{pad=9}")
    np.testing.assert_array_equal(batch["ids"], [[1, 9, 9], [2, 3, 4], [9, 9, 9], [5, 6, 9]])
    (batch,) = opened(path, [matrix, LABELS], 4, columns="user=ids{pad=9,length=2,keep=last}")
    np.testing.assert_array_equal(batch["ids"], [[1, 9], [3, 4], [9, 9], [5, 6]])
    (batch,) = opened(
        path, [BatchInput("ids", INT, ("B", 2)), LABELS], 4, columns="user=ids{pad=9,keep=first}"
    )
    np.testing.assert_array_equal(batch["ids"], [[1, 9], [2, 3], [9, 9], [5, 6]])
    bags = [BatchInput("values", INT, ("N",)), BatchInput("starts", INT, ("B",)), LABELS]
    (batch,) = opened(path, bags, 4, columns="user=values+starts")
    np.testing.assert_array_equal(batch["values"], [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(batch["starts"], [0, 1, 4, 4])
    assert batch.examples == 4  # type: ignore[attr-defined]
    (batch,) = opened(path, bags, 4, columns="user=values+starts{last=true}")
    np.testing.assert_array_equal(batch["starts"], [0, 1, 4, 4, 6])
    shuffled = opened(path, bags, 2, columns="user=values+starts", seed=1, window=3)
    lists = {0.0: [1], 1.0: [2, 3, 4], 2.0: [], 3.0: [5, 6]}
    for batch in shuffled:
        ends = [*batch["starts"].tolist(), len(batch["values"])]
        assert [batch["values"][a:b].tolist() for a, b in pairwise(ends)] == [
            lists[label] for label in batch["labels"].tolist()
        ]


@pytest.mark.parametrize("name", HAVE_TEXTS)
def test_texts_become_rows_by_a_vocabulary(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path, {"user": ["ann", "bob", "ann", "zoe"], "labels": [0.0, 1.0, 2.0, 3.0]})
    counts = Counts()
    counts.add(np.array(["ann", "bob", "ann", "eve"], object), "")
    word = counts.vocabulary(("ids",), first=1)
    (batch,) = opened(path, size=4, vocabularies={"ids": word})
    np.testing.assert_array_equal(batch["ids"], [1, 2, 1, 4])
    with pytest.raises(UserError) as caught:
        list(opened(path))
    text = str(caught.value)
    assert "'user'" in text or "cannot be read" in text


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_of_files_and_a_pattern(tmp_path: Path, name: str) -> None:
    if name in ("a Hugging Face data set", "a folder of .npy files"):
        pytest.skip("each of these is a folder")
    half = {key: values[:20] for key, values in NUMBERS.items()}
    rest = {key: values[20:] for key, values in NUMBERS.items()}
    first = WRITERS[name](tmp_path, half)
    (tmp_path / "part").mkdir()
    first = first.rename(tmp_path / "part" / f"0{first.suffix}")
    second = WRITERS[name](tmp_path, rest)
    second.rename(tmp_path / "part" / f"1{second.suffix}")
    (tmp_path / "part" / "_SUCCESS").touch()
    for place in (tmp_path / "part", tmp_path / "part" / f"*{first.suffix}", tmp_path / "part" / "?.*"):
        np.testing.assert_array_equal(
            np.concatenate([batch["ids"] for batch in opened(place)]), TABLE["user"]
        )


@pytest.mark.parametrize("name", ["an .npz file", "a file of JSON lines", "a folder of .npy files"])
def test_these_need_no_further_library(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS[name](tmp_path, NUMBERS)
    monkeypatch.setattr("kfac_onnx.data.arrow.importlib.import_module", _missing)
    assert sum(len(batch["ids"]) for batch in opened(path)) == ROWS


def _missing(name: str) -> None:
    raise ImportError(name)


def test_what_is_not_installed_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.csv").write_text("user,labels\n1,2\n")
    monkeypatch.setattr("kfac_onnx.data.arrow.importlib.import_module", _missing)
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "t.csv")
    assert str(caught.value) == (
        "Parquet, Arrow and CSV files are read by pyarrow, which is not installed\n"
        "  help: pip install 'kfac-onnx[data]'"
    )


def test_records_of_lines_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes, carriage returns, empty lines and a last line without an end, cut at any byte."""
    text = b'a,"x\ny"\r\n\r\nb,"""\n"\n\nc,d\n"e\n\n\n",f'
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    records = [b'a,"x\ny"', b'b,"""\n"', b"c,d", b'"e\n\n\n",f']
    for size in range(1, len(text) + 1):
        monkeypatch.setattr(chunks, "SIZE", size)
        pieces = chunks_of(path, quoted=True)
        assert sum(piece.rows for piece in pieces) == 4
        assert all(piece.rows for piece in pieces)
        for before, piece in pairwise(pieces):
            assert before.end <= piece.start
        for piece in pieces:
            part = text[piece.start : piece.end]
            assert [record for record in records if record in part and part.count(record)] == records[
                sum(p.rows for p in pieces if p.start < piece.start) :
            ][: piece.rows]
            assert piece.line == 1 + text[: piece.start].count(b"\n")


def test_a_table_of_values_in_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS["a table of comma-separated values"](tmp_path, TABLE)
    monkeypatch.setattr(chunks, "SIZE", 50)
    data = opened(path, seed=1, window=8)
    assert len(data._source.rows) > 5  # type: ignore[attr-defined]
    assert sorted(np.concatenate([batch["ids"] for batch in data]).tolist()) == TABLE["user"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "1,2\n3,4\n", "the first line of 'DIR/t.csv' holds the number 1, not the name of a column"),
        ("t.csv", "user,user\n3,4\n", "the first line of 'DIR/t.csv' does not name each column once"),
        ("t.csv", "user,labels\n3\n", "'DIR/t.csv', lines from 2 on cannot be read: CSV parse error..."),
        ("t.csv", "user,labels\nx,1\n", "'DIR/t.csv', lines from 2 on cannot be read: In CSV column #0..."),
        ("t.csv", 'user,labels\n"x,1\n', "a quote that opens in 'DIR/t.csv' never closes"),
        ("t.jsonl", '{"user": 1, "labels": 2}\n{"user": 1}\n', "line 2 of 'DIR/t.jsonl' has no value of 'labels'"),
        ("t.jsonl", '{"user": 1, "labels": 2}\n[]\n', "line 2 of 'DIR/t.jsonl' holds no object with a value per column"),
        ("t.jsonl", '{"user": 1.5, "labels": 2}\n', "column 'user' of 'DIR/t.jsonl' holds 1.5, which is no int64 of input 'ids'"),
        ("t.jsonl", '{"user": 9223372036854775808, "labels": 2}\n', "column 'user' of 'DIR/t.jsonl' holds 9223372036854775808, which is no int64 of input 'ids'"),
        ("t.jsonl", '{"user": 1, "labels": 1e39}\n', "column 'labels' of 'DIR/t.jsonl' holds 1e+39, which is no float32 of input 'labels'"),
        ("t.jsonl", '{"user": 1}\n', "'DIR/t.jsonl' has no column 'labels', and no other fills that input"),
        ("t.jsonl", '{"usr": 1, "labels": 1}\n', "'DIR/t.jsonl' has no column 'user'; did you mean 'usr'?"),
        ("t.parquet", "PAR1 and no more", "'DIR/t.parquet' is not a readable Parquet file: ..."),
        ("t.jsonl", "{}\n", "'DIR/t.jsonl' holds no columns"),
        ("t.jsonl", "\n", "'DIR/t.jsonl' holds no rows"),
        ("t.h5", "\x89HDF", "the format of 'DIR/t.h5' cannot be told"),
        ("t.npy", "\x93NUMPY", "'DIR/t.npy' is a single array, which does not say whose it is"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name in ("t.csv", "t.parquet"):
        arrow()
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    if name == "t.h5":
        path.write_bytes(b"whatever")
        path = path.rename(tmp_path / "t.xyz")
        message = message.replace("h5", "xyz")
    with pytest.raises(UserError) as caught:
        list(opened(path))
    said = caught.value.message.replace(str(tmp_path), "DIR")
    if message.endswith("..."):  # the rest is pyarrow's, and changes with its version
        assert said.startswith(message.removesuffix("..."))
    else:
        assert said == message


@pytest.mark.parametrize(
    ("columns", "message", "remedy"),
    [
        ("user", "--columns wants COLUMN=INPUT, not 'user'", "such as user_id=users,history=items{pad=0},bag=values+offsets"),
        ("user=ids,labels=ids", "--columns fills the input 'ids' twice", None),
        ("user=id", "--columns fills 'id', which is no batch input; did you mean 'ids'?", "the graph's batch inputs are 'ids', 'labels'"),
        ("user=ids{pda=0}", "unknown option 'pda' of column 'user'; did you mean 'pad'?", "options are pad, length, keep"),
        ("user=ids{keep=all}", "option 'keep' of column 'user' is first or last, not 'all'", None),
        ("user=ids{length=0}", "option 'length' of column 'user' is a number of entries, not '0'", None),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_read(tmp_path: Path, columns: str, message: str, remedy: str | None) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, NUMBERS)
    with pytest.raises(UserError) as caught:
        opened(path, columns=columns)
    assert (caught.value.message, caught.value.help) == (message, remedy)


@pytest.mark.parametrize(
    ("columns", "dims", "message", "remedy"),
    [
        ("user=ids", ("B", "L"), "column 'user' of 'DIR' holds lists of different lengths, and what fills them up is not said",
         "name the row of padding: --columns 'user=ids{pad=0}'"),
        ("user=ids{pad=0}", ("B", 2), "column 'user' of 'DIR' holds a list of 3 entries, and input 'ids' takes 2",
         "say which are kept: --columns 'user=ids{pad=0,keep=last}', or keep=first"),
        ("user=ids", ("B",), "column 'user' of 'DIR' holds lists, and input 'ids' has rank 1",
         "of bags name both inputs: --columns 'user=ids+OFFSETS'"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit(
    tmp_path: Path, columns: str, dims: tuple[str | int, ...], message: str, remedy: str
) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, {"user": [[1], [2, 3, 4]], "labels": [0.0, 1.0]})
    with pytest.raises(UserError) as caught:
        list(opened(path, [BatchInput("ids", INT, dims), LABELS], 2, columns=columns))
    assert (caught.value.message.replace(str(path), "DIR"), caught.value.help) == (message, remedy)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    def sentence(path: Path) -> tuple[str, str | None]:
        with pytest.raises(UserError) as caught:
            open_files(files_of(path), {})
        text = caught.value.message.replace(str(tmp_path), "DIR")
        return text, caught.value.help and caught.value.help.replace(str(tmp_path), "DIR")

    assert sentence(tmp_path / "none.csv") == ("there is no file 'DIR/none.csv'", None)
    splits = tmp_path / "splits"
    (splits / "train").mkdir(parents=True)
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (splits / "train" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    assert sentence(splits) == (
        "'DIR/splits' is a folder of data sets ('train')", "name one of them: --data DIR/splits/train",
    )  # fmt: skip
    assert sentence(splits / "train")[0] == (
        "'DIR/splits/train/state.json' names a file outside of its folder: '../x.arrow'"
    )
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.jsonl").write_text('{"x": 1}\n')
    (mixed / "b.csv").write_text("x\n1\n")
    assert sentence(mixed) == (
        "'DIR/mixed/a.jsonl' is a file of JSON lines and 'DIR/mixed/b.csv' is a table of comma-separated values:"
        " data are of one format",
        "give a pattern: --data 'DIR/mixed/*.jsonl'",
    )
    (mixed / "b.csv").unlink()
    (mixed / "b.jsonl").write_text('{"y": 1}\n')
    assert sentence(mixed)[0] == "column 'x' is in 'DIR/mixed/a.jsonl' and not in 'DIR/mixed/b.jsonl'"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.txt").touch()
    assert sentence(empty)[0] == "the folder 'DIR/empty' holds no file of a format that is read"


def test_values_that_are_missing_are_said(tmp_path: Path) -> None:
    pa = arrow()
    path = tmp_path / "t.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"user": [1, None], "labels": [0.0, 1.0]}), path
    )
    with pytest.raises(UserError) as caught:
        list(opened(path))
    assert str(caught.value) == (
        f"column 'user' of '{path}' has no value in 1 rows: they are null\n"
        "  help: leave such rows out, or write the value that is meant"
    )
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"user": pa.array([1, 2], pa.timestamp("ms")), "labels": [0.0, 1.0]}), path
    )
    with pytest.raises(UserError, match="holds timestamp\\[ms\\], which no input takes"):
        list(opened(path))


def test_columns_of_arrow_s_other_types(tmp_path: Path) -> None:
    pa = arrow()
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "user": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
            "labels": pa.array([True, False]),
            "word.x": pa.array(["a", "b"]).dictionary_encode(),
        }
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    (batch,) = opened(path, [BatchInput("ids", INT, ("B", 2)), LABELS], 2)
    np.testing.assert_array_equal(batch["ids"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(batch["labels"], [1, 0])
    texts = BatchInput("ids", INT, ("B",), keys=("b", "a"))
    (batch,) = opened(path, [texts, LABELS], 2, columns="word.x=ids")
    assert batch["ids"].tolist() == ["a", "b"]


def test_damaged_files_are_said_or_read(tmp_path: Path) -> None:
    """Bytes that are others, at random: an error of ours, or rows."""
    random = np.random.default_rng(0)
    said = 0
    for name in ("a Parquet file", "an Arrow file", "an Arrow stream"):
        path = WRITERS[name](tmp_path, {"user": [[1, 2], [3]] * 5, "labels": [0.0, 1.0] * 5})
        whole = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), 4).tolist():
                damaged[place] = int(random.integers(256))
            path.write_bytes(damaged)
            try:
                list(opened(path, [BatchInput("ids", INT, ("B", "L")), LABELS], columns="user=ids{pad=0}"))
            except UserError:
                said += 1
    assert said > 12


def test_a_folder_that_hugging_face_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(NUMBERS).save_to_disk(tmp_path / "set", num_shards=3)
    np.testing.assert_array_equal(
        np.concatenate([batch["ids"] for batch in opened(tmp_path / "set")]), TABLE["user"]
    )


def test_other_rows_are_another_content(tmp_path: Path) -> None:
    path = WRITERS["a file of JSON lines"](tmp_path, NUMBERS)
    one = opened(path).describe()
    assert opened(path).describe() == one
    other = opened(path, columns="labels=ids,user=labels")
    assert other.describe()["content"] != one["content"]
    path.write_text(path.read_text().replace('"user": 7', '"user": 8'))
    assert opened(path).describe()["content"] != one["content"]
    assert json.loads(json.dumps(one)) == one
