"""Every kind of bad input: one clear sentence on stderr, exit code 1, nothing written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kfac_onnx.api import save, transform

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
Arrays = dict[str, np.ndarray[Any, Any]]

LINEAR = """<ir_version: 10, opset_import: ["" : 18]>
linear (float[batch, 4] x, float[batch, 3] y, float[4, 3] w) => (float loss, float[4, 3] w_grad) {
  p = MatMul(x, w)
  e = Sub(p, y)
  s = Mul(e, e)
  loss = ReduceSum <keepdims = 0> (s)
  xt = Transpose <perm = [1, 0]> (x)
  half = MatMul(xt, e)
  w_grad = Add(half, half)
}
"""

OTHER_IDS = """<ir_version: 10, opset_import: ["" : 18]>
lookup (float[100, 4] emb, int64[n] ids, int64[n] others, float[n, 4] target) => (float loss, float[100, 4] emb_grad)
  <int64[2] shape = {100, 4}, int64[1] column = {-1}, float two = {2}> {
  rows = Gather <axis = 0> (emb, ids)
  error = Sub(rows, target)
  square = Mul(error, error)
  loss = ReduceSum <keepdims = 0> (square)
  d_rows = Mul(error, two)
  zeros = ConstantOfShape(shape)
  tall = Unsqueeze(others, column)
  size = Shape(rows)
  wide = Expand(tall, size)
  emb_grad = ScatterElements <axis = 0, reduction = "add"> (zeros, wide, d_rows)
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The training graph that a user has."""
    path = tmp_path / "train.onnx"
    path.write_bytes((GRAPHS / "torchjoint_in__nplm.onnx").read_bytes())
    return path


@pytest.fixture
def arrays(tmp_path: Path) -> Arrays:
    """Sound data and parameters, also as files data.npz and parameters.npz."""
    with np.load(GRAPHS / "torchjoint_in__nplm.npz") as file:
        found = {name[3:]: file[name] for name in file.files if name.startswith("in:")}
    np.savez(tmp_path / "parameters.npz", **{name: found[name] for name in found if name.startswith("m.")})
    data = {name: found[name] for name in ("ids", "labels")}
    np.savez(tmp_path / "data.npz", **data)
    return data


@pytest.fixture(scope="module")
def transformed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("transformed") / "step.onnx"
    save(transform(GRAPHS / "torchjoint_in__nplm.onnx"), path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path, source: Path, arrays: Arrays, transformed: bytes) -> Path:
    """A folder with a transformed model and all that it needs."""
    (tmp_path / "step.onnx").write_bytes(transformed)
    return tmp_path


def refused(outcome: Outcome, message: str, folder: Path, before: set[Path]) -> None:
    """Check the message word for word (after the progress bar, if there is one), and the folder."""
    assert outcome.err[outcome.err.index("error: ") :] == f"error: {message}\n"
    assert (outcome.code, outcome.out) == (1, "")
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("verb", ["scan", "transform", "inspect", "train", "verify", "opt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "'DIR/bad.onnx' is not an ONNX model"),
        (b"", "'DIR/bad.onnx' is not an ONNX model"),
        (None, "there is no file 'DIR/bad.onnx'"),
    ],
)
def test_not_an_onnx_file(
    run: Callable[..., Outcome],
    tmp_path: Path,
    arrays: Arrays,
    verb: str,
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    before = set(tmp_path.iterdir())
    rest = {
        "transform": ["-o", tmp_path / "out.onnx"],
        "train": ["--data", tmp_path / "data.npz", "--export", tmp_path / "out.onnx"],
        "verify": ["--data", tmp_path / "data.npz"],
        "opt": ["-p", "dce", "-o", tmp_path / "out.onnx"],
    }.get(verb, [])
    outcome = run(verb, path, *rest)
    assert outcome.err.splitlines()[0] == f"error: {message}"
    assert (outcome.code, outcome.out) == (1, "")
    assert set(tmp_path.iterdir()) == before


def test_a_graph_without_gradients(run: Callable[..., Outcome], tmp_path: Path, arrays: Arrays) -> None:
    path = tmp_path / "forward.onnx"
    path.write_bytes((GRAPHS.parent / "graphs_forward" / "fwd_dyncore__nplm.onnx").read_bytes())
    before = set(tmp_path.iterdir())
    message = (
        "the graph has no gradients of its parameters\n"
        "  --> DIR/forward.onnx\n"
        "  tried: optimizer-inside: none of its outputs is a scalar that could be the loss\n"
        "  tried: ort-artifacts: it has no InPlaceAccumulatorV2 nodes\n"
        "  tried: ort-module: it has no YieldOp\n"
        "  tried: named-gradients: none of its outputs is named <parameter>_grad after one of its parameters\n"
        "  tried: positional: it has fewer than two floating-point outputs, a loss and a gradient\n"
        "  help: append loss and gradients with `kfac-onnx differentiate`, export them as outputs, or name the pairs with --gradients PARAMETER=OUTPUT"
    )
    refused(run("transform", path, "-o", tmp_path / "out.onnx"), message, tmp_path, before)
    refused(run("train", path, "--data", tmp_path / "data.npz", "--quiet"), message, tmp_path, before)
    outcome = run("scan", path, "--json")  # its tables are listed all the same
    assert outcome.code == 0
    assert outcome.data["trainable"] is False
    assert [site["parameter"] for site in outcome.data["sites"]] == ["emb.weight"]
    assert outcome.data["sites"][0]["uses"][0]["output_gradient"] is None
    assert "parameters: 5" in run("scan", path).out


def test_a_graph_without_embeddings(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "linear.onnx"
    path.write_bytes(onnx.parser.parse_model(LINEAR).SerializeToString())
    refused(
        run("transform", path, "-o", tmp_path / "out.onnx"),
        "the graph has no embedding table: no operator looks up rows of a trained parameter\n"
        "  in:   insert-embedding-kfac\n"
        "  help: `scan MODEL` lists the trained parameters, `why MODEL PARAM` what was tried for one",
        tmp_path,
        {path},
    )
    outcome = run("scan", path)
    assert (outcome.code, outcome.out.splitlines()[0]) == (0, "no embedding tables")


def test_a_table_used_in_an_unsupported_way(run: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(onnx.parser.parse_model(OTHER_IDS).SerializeToString())
    why = (
        "no operator of its gradient 'emb_grad' scatters the rows of Gather 'rows', which looks rows up by the "
        "ids 'ids' (ScatterElements of 'd_rows' takes other ids than 'rows')"
    )
    refused(
        run("transform", path, "-o", tmp_path / "out.onnx"),
        f"parameter 'emb' is used in a way that no block covers: {why}\n"
        "  path: emb -> rows (Gather)\n"
        "  in:   insert-embedding-kfac\n"
        "  help: leave it to the ordinary optimizer (allow-fallback=emb), or see `why emb`",
        tmp_path,
        {path},
    )
    outcome = run("scan", path, "--json")
    assert outcome.code == 0  # a refusal is a result
    assert outcome.data["refused"][0]["reason"] == why
    assert (
        "not transformed"
        in run("transform", path, "-o", tmp_path / "out.onnx", "--allow-fallback", "emb").err
    )
    assert (tmp_path / "out.onnx").is_file()


BATCHES: list[tuple[str, Callable[[Arrays], Arrays], str]] = [
    (
        "unknown key",
        lambda data: {"idz": data["ids"], "labels": data["labels"]},
        "the batch has an unknown input 'idz'; did you mean 'ids'?\n"
        "  help: the graph's batch inputs are 'ids', 'labels'",
    ),
    (
        "missing key",
        lambda data: {"ids": data["ids"]},
        "the batch has no input 'labels'\n  help: the graph's batch inputs are 'ids', 'labels'",
    ),
    (
        "dtype",
        lambda data: data | {"ids": data["ids"].astype(np.float32)},
        "batch input 'ids' must be int64, got float32\n  help: convert it: array.astype('int64')",
    ),
    (
        "shape",
        lambda data: data | {"ids": data["ids"][:, :3]},
        "batch input 'ids' must have shape [batch, 4], got [6, 3]",
    ),
    (
        "rank",
        lambda data: data | {"ids": data["ids"][:, 0]},
        "batch input 'ids' must have shape [batch, 4], got [6]",
    ),
    (
        "id above",
        lambda data: data | {"ids": np.where(data["ids"] == data["ids"][2, 1], 100, data["ids"])},
        "id 100 in input 'ids' is not a row of parameter 'm.emb.weight', which has 100 rows\n"
        "  help: ids from 0 to 99 are allowed; nothing was written",
    ),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in BATCHES], ids=[row[0] for row in BATCHES])
def test_a_wrong_batch(
    run: Callable[..., Outcome],
    folder: Path,
    arrays: Arrays,
    change: Callable[[Arrays], Arrays],
    message: str,
) -> None:
    np.savez(folder / "wrong.npz", **change(arrays))
    before = set(folder.iterdir())
    refused(
        run(
            "train", folder / "step.onnx", "--data", folder / "wrong.npz", "--steps", 1, "--quiet",
            "--parameters", folder / "parameters.npz", "--export", folder / "out.onnx",
        ),
        message,
        folder,
        before,
    )  # fmt: skip


def test_arrays_of_different_length(run: Callable[..., Outcome], folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "wrong.npz", ids=arrays["ids"], labels=arrays["labels"][:5])
    refused(
        run(
            "train", folder / "step.onnx", "--data", folder / "wrong.npz", "--batch-size", 2,
            "--parameters", folder / "parameters.npz",
        ),
        "'DIR/wrong.npz' holds 6 examples of 'ids' and 5 of 'labels'\n"
        "  help: the first dimension of every array is the example",
        folder,
        set(folder.iterdir()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train step.onnx --data data.npz",
            "parameter 'm.emb.weight' has no value\n"
            "  help: the model file holds none: give it in parameters= (or --parameters FILE)",
        ),
        (
            "train step.onnx --data data.npz --parameters data.txt",
            "parameters cannot be read from 'DIR/data.txt'\n"
            "  help: give a file ending in .npz, .safetensors, .onnx, .checkpoint",
        ),
        (
            "train step.onnx --data data.npz --preset half",
            "'DIR/step.onnx' is already transformed, so --preset cannot change it\n"
            "  help: give the original training graph",
        ),
        (
            "train step.onnx --data data.npz --into step.onnx",
            "--into says where the weights go, but there is no --export to write",
        ),
        (
            "train step.onnx --data data.npz --resume",
            "--resume needs a checkpoint to go on from\n  help: give --resume PATH or --checkpoint PATH",
        ),
        (
            "train step.onnx --data data.npz --parameters parameters.npz --steps 0",
            "steps must be at least 1, got 0",
        ),
        (
            "train step.onnx --data data.npz --parameters parameters.npz --schedule cosin",
            "unknown schedule 'cosin'; did you mean 'cosine'?\n  help: schedules are constant, linear, cosine, wsd",
        ),
        (
            "train step.onnx --data data.npz --parameters parameters.npz --batch-size 0",
            "the batch size must be at least 1, got 0",
        ),
        (
            "train step.onnx --data data.npz --export none/out.onnx",
            "'DIR/none/out.onnx' cannot be written: its folder does not exist or is read-only",
        ),
        (
            "train step.onnx --data data.npz --parameters parameters.npz --metrics none/log",
            "metrics cannot be written to 'DIR/none/log': No such file or directory",
        ),
        (
            "transform train.onnx -o none/out.onnx",
            "'DIR/none/out.onnx' cannot be written: No such file or directory",
        ),
        (
            "transform train.onnx -o train.onnx",
            "'DIR/train.onnx' is the input and will not be overwritten\n  help: choose another name",
        ),
        (
            "transform train.onnx -o out.onnx --preset hlf",
            "unknown preset 'hlf'; did you mean 'half'?\n  help: the presets are: r1.7, half, adagrad, adaptive, "
            "plain-sgd, plain-momentum, plain-adam, plain-adagrad",
        ),
        (
            "transform train.onnx -o out.onnx --rest sdg",
            "unknown optimizer 'sdg'; did you mean 'sgd'?\n  help: the optimizers are: sgd, momentum, adam, adamw, adagrad, muon, kfac",
        ),
        (
            "transform train.onnx -o out.onnx --shape row",
            "option 'shape' of pass 'insert-embedding-kfac' cannot be 'row': it is one of rows, dense",
        ),
        (
            "transform train.onnx -o out.onnx --pipeline find-embeddings{axis=1}",
            "unknown option 'axis' of pass 'find-embeddings'\n  help: the options of 'find-embeddings' are: padding",
        ),
        (
            "transform train.onnx -o out.onnx --gradients emb",
            "--gradients wants PARAM=OUTPUT, not 'emb'",
        ),
        (
            "why train.onnx m.emb.wight",
            "the graph has no trained parameter 'm.emb.wight'; did you mean 'm.emb.weight'?\n"
            "  help: `scan MODEL` lists the trained parameters",
        ),
        (
            "inspect train.onnx",
            "the model has not been transformed, so there is nothing to inspect\n"
            "  help: run `kfac-onnx transform MODEL -o OUT` first, or `kfac-onnx scan MODEL`",
        ),
        (
            "verify train.onnx --data data.npz",
            "the parameter 'm.emb.weight' has no value\n  help: give it with --parameters FILE",
        ),
        ("verify --golden data.npz", "'DIR/data.npz' is not a golden file: it has no settings"),
        (
            "verify --golden train.onnx",
            "'DIR/train.onnx' is not a readable .npz file: File is not a zip file",
        ),
        (
            "train step.onnx --data train.onnx --parameters parameters.npz --quiet",
            "the format of 'DIR/train.onnx' cannot be told\n  help: what is read ends in .parquet, .pq, .arrow,"
            " .feather, .arrows, .npz, .npy, .csv, .tsv, .tab, .jsonl, .ndjson",
        ),
        (
            "train step.onnx --data data.npz --seed -1",
            "Invalid value for '--seed': -1 is not in the range x>=0.\n  help: run `kfac-onnx train --help`",
        ),
        (
            "train step.onnx --data data.npz --refresh-every 5",
            "'DIR/step.onnx' is already transformed, so --refresh-every cannot change it\n"
            "  help: give the original training graph",
        ),
        (
            "train train.onnx --data data.npz --parameters parameters.npz --preset plain-adam --decay-a 0",
            "preset 'plain-adam' has no K-FAC block, so decay_a cannot be set\n"
            "  help: the presets with a block are: r1.7, half, adagrad, adaptive",
        ),
        (
            "train step.onnx --data data.npz --export out.onnx --into none.onnx",
            "there is no file 'DIR/none.onnx'",
        ),
        (
            "train step.onnx --data data.npz --checkpoint data.npz",
            "nothing can be written into the folder 'DIR/data.npz': 'DIR/data.npz' is not a folder",
        ),
        (
            "train step.onnx --data data.npz --checkpoint new.folder --resume",
            "there is no checkpoint 'DIR/new.folder'",
        ),
        (
            "transform train.onnx -o out.onnx --decay-a 1",
            "option 'decay-a' of pass 'insert-embedding-kfac' cannot be 1.0: "
            "it is a number from 0 to 0.9999999, or none",
        ),
        (
            "transform train.onnx -o out.onnx --grad-scale 0",
            "option 'grad-scale' of pass 'insert-embedding-kfac' cannot be 0.0: "
            "it is a number from 1e-30 to 1000000, or none",
        ),
        (
            "transform train.onnx -o out.onnx --damping nan",
            "option 'damping' of pass 'insert-embedding-kfac' cannot be nan: "
            "it is a number from 1e-30 to 1000000, or none",
        ),
        (
            "transform train.onnx -o out.onnx --pipeline find-embeddings --rest-lr 1",
            "--pipeline says everything, so --rest-lr cannot be given with it\n"
            "  help: write it into the pipeline: `kfac-onnx opt --list` lists the passes and their options",
        ),
        (
            "verify train.onnx --data data.npz --provider warp",
            "there is no execution provider 'warp'\n  help: this onnxruntime has PROVIDERS",
        ),
        (
            "verify --golden data.npz --provider warp",
            "'DIR/data.npz' is not a golden file: it has no settings",
        ),
        (
            "demo --quick --threads 0",
            "threads must be at least 1, got 0",
        ),
    ],
)
def test_wrong_options_and_places(
    run: Callable[..., Outcome], folder: Path, words: str, message: str
) -> None:
    files = {word: folder / word for word in words.split() if "." in word and "=" not in word}
    files |= {"none/log": folder / "none" / "log"}
    given = [files.get(word, word) if not word.startswith("m.") else word for word in words.split()]
    before = set(folder.iterdir())
    message = message.replace("PROVIDERS", ", ".join(ort.get_available_providers()))
    refused(run(*given), message, folder, before)


def test_an_unknown_provider_for_golden_files(run: Callable[..., Outcome], tmp_path: Path) -> None:
    golden = GRAPHS.parent / "golden" / "01_basic.npz"
    available = ", ".join(ort.get_available_providers())
    refused(
        run("verify", "--golden", golden, "--provider", "warp"),
        f"there is no execution provider 'warp'\n  help: this onnxruntime has {available}",
        tmp_path,
        set(),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train step.onnx --data data.npz --parameters parameters.npz --quiet --metrics",
            "metrics cannot be written to '/dev/full': No space left on device",
        ),
        (
            "train step.onnx --data data.npz --export",
            "'/dev/full' cannot be written: it is not a regular file",
        ),
        ("transform train.onnx -o", "'/dev/full' cannot be written: it is not a regular file"),
        ("opt train.onnx -p dce -o", "'/dev/full' cannot be written: it is not a regular file"),
    ],
)
def test_a_full_disk_and_a_device(
    run: Callable[..., Outcome], folder: Path, words: str, message: str
) -> None:
    given = [folder / word if "." in word else word for word in words.split()]
    refused(run(*given, "/dev/full"), message, folder, set(folder.iterdir()))
    assert Path("/dev/full").is_char_device()


def test_a_disk_that_fills_while_a_model_is_written(
    run: Callable[..., Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(
        run("transform", folder / "train.onnx", "-o", folder / "out.onnx"),
        "'DIR/out.onnx' cannot be written: No space left on device",
        folder,
        set(folder.iterdir()),
    )


def test_held_out_data_is_looked_at_before_training(
    run: Callable[..., Outcome], folder: Path, arrays: Arrays
) -> None:
    np.savez(folder / "wrong.npz", ids=arrays["ids"] + 100, labels=arrays["labels"])
    before = set(folder.iterdir())
    refused(
        run(
            "train", folder / "step.onnx", "--data", folder / "data.npz", "--held-out", folder / "wrong.npz",
            "--parameters", folder / "parameters.npz", "--metrics", folder / "log",
        ),
        f"id {arrays['ids'].max() + 100} in input 'ids' is not a row of parameter 'm.emb.weight', which has 100 rows\n"
        "  help: ids from 0 to 99 are allowed; nothing was written",
        folder,
        before,
    )  # fmt: skip


def test_a_forward_model_is_looked_at_before_training(run: Callable[..., Outcome], folder: Path) -> None:
    (folder / "forward.onnx").write_bytes(onnx.parser.parse_model(LINEAR).SerializeToString())
    before = set(folder.iterdir())
    outcome = run(
        "train", folder / "step.onnx", "--data", folder / "data.npz", "--parameters", folder / "parameters.npz",
        "--metrics", folder / "log", "--export", folder / "out.onnx", "--into", folder / "forward.onnx",
    )  # fmt: skip
    message = "no trained parameter fits an initializer of 'DIR/forward.onnx' by name or shape\n" + "".join(
        outcome.err.splitlines(keepends=True)[1:]
    ).rstrip("\n")
    assert "help: trained parameters are 'm.emb.weight' [100, 16], " in message
    refused(outcome, message, folder, before)


def test_data_without_an_example(run: Callable[..., Outcome], folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "none.npz", **{name: array[:0] for name, array in arrays.items()})
    before = set(folder.iterdir())
    words = ["train", folder / "step.onnx", "--data", folder / "none.npz", "--parameters"]
    words += [folder / "parameters.npz", "--quiet"]
    refused(run(*words), "'DIR/none.npz' holds no examples", folder, before)
    refused(
        run(*words, "--batch-size", 2),
        "the data holds 0 examples, fewer than one batch of 2",
        folder,
        before,
    )


def test_verify_of_ids_that_are_no_rows(run: Callable[..., Outcome], folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "wrong.npz", ids=arrays["ids"] - 200, labels=arrays["labels"])
    refused(
        run(
            "verify", folder / "train.onnx", "--data", folder / "wrong.npz",
            "--parameters", folder / "parameters.npz",
        ),
        f"id {arrays['ids'].min() - 200} in input 'ids' is not a row of parameter 'm.emb.weight', which has 100 rows\n"
        "  help: ids from 0 to 99 are allowed; nothing was written",
        folder,
        set(folder.iterdir()),
    )  # fmt: skip
