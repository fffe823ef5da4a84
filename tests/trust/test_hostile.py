"""Hostile files through the command line: an error in a sentence, nothing written, nothing on the terminal."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save as safetensors

from kfac_onnx.api import save, transform
from kfac_onnx.cli.main import main
from kfac_onnx.disk import memory
from kfac_onnx.errors import UserError, safe, safe_line
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.runtime.saved.ort_checkpoint import read_ort_checkpoint
from kfac_onnx.runtime.saved.weights import stored_weights
from kfac_onnx.runtime.session import TrainingSession

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
GRAPH = ROOT / "tests" / "data" / "graphs" / "ortart_legcore__nplm.onnx"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
VERBS = ["scan", "check", "transform", "inspect", "differentiate", "opt", "diff", "why", "verify", "train"]


@pytest.fixture
def source() -> onnx.ModelProto:
    return onnx.load(GRAPH)


def give(verb: str, path: Path) -> list[str]:
    data = str(path.parent / "batch.npz")
    rest = {
        "transform": ["-o", str(path.parent / "out.onnx")],
        "differentiate": ["-o", str(path.parent / "out.onnx")],
        "opt": ["-p", "dce"],
        "diff": [str(GRAPH)],
        "why": ["emb.weight"],
        "verify": ["--data", data],
        "train": ["--data", data],
    }
    return [verb, str(path), *rest.get(verb, [])]


def refused(
    verb: str, model: onnx.ModelProto | bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the error of a verb on a model; it must be the user's, with nothing written."""
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    np.savez(folder / "batch.npz", ids=np.zeros((2, 4), np.int64), labels=np.zeros(2, np.int64))
    before = set(folder.iterdir())
    code = main(give(verb, path))
    out, err = capsys.readouterr()
    assert code == 1, err
    assert err.startswith("error: ")
    assert not out
    assert not RAW.search(err)
    assert set(folder.iterdir()) == before
    return err


def cycle(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if len(node.input) > 1 and node.op_type == "Gemm")
    later = next(item for item in model.graph.node if node.output[0] in item.input)
    node.input[0] = later.output[0]


def duplicate(model: onnx.ModelProto) -> None:
    model.graph.node.add().CopyFrom(model.graph.node[0])


def recursive(model: onnx.ModelProto) -> None:
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    opsets = [helper.make_opsetid("own", 1)]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], [call], opsets))
    model.opset_import.append(opsets[0])
    model.graph.node.append(helper.make_node("F", ["ids"], ["made"], domain="own"))


def huge(model: onnx.ModelProto) -> None:
    name = "enormous"
    model.graph.initializer.append(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2**31, 2**31]))
    model.graph.node.append(helper.make_node("Neg", [name], ["made"]))


def gone(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "nobody makes this"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (duplicate, "has the name of another value"),
        (recursive, "function own::F calls itself"),
        (huge, "tensor 'enormous' is of no shape that an array can have"),
        (gone, "reads 'nobody makes this', which nothing makes"),
    ],
)
def test_every_verb_refuses_what_is_no_model(
    verb: str,
    change: Callable[[onnx.ModelProto], None],
    said: str,
    source: onnx.ModelProto,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(source)
    assert said in refused(verb, source, tmp_path, capsys)


@pytest.mark.parametrize("verb", ["scan", "check", "transform", "train", "verify", "why"])
def test_a_cycle(
    verb: str, source: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cycle(source)
    assert "malformed" in refused(verb, source, tmp_path, capsys)


def sequence(model: onnx.ModelProto) -> None:
    kind = model.graph.input[0].type
    kind.sequence_type.elem_type.tensor_type.elem_type = TensorProto.INT64


@pytest.mark.parametrize("verb", ["scan", "transform", "verify"])
def test_inputs_that_are_no_tensors(
    verb: str, source: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence(source)
    said = f"error: the input '{source.graph.input[0].name}' is a sequence; training graphs take tensors only"
    assert refused(verb, source, tmp_path, capsys).startswith(said)


def test_sizes_of_a_table_that_only_its_data_says(tmp_path: Path) -> None:
    """A declared size that is a name was left out of the state's shape: `transform` reported a bug."""
    path = ROOT / "tests" / "data" / "graphs_more" / "info21__ranking.onnx"
    model = onnx.load(path)
    for item in model.graph.value_info:
        if item.name == "words":
            item.type.tensor_type.shape.dim[1].dim_param = "odd"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    made = [ir.to_proto(transform(place)) for place in (path, tmp_path / "model.onnx")]
    assert made[0].SerializeToString() == made[1].SerializeToString()


@pytest.mark.parametrize("size", [2**31 - 1, 2**62])
def test_vectors_as_long_as_no_memory(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of that many examples took all memory as soon as shapes were inferred."""
    run = onnx.shape_inference.infer_shapes

    def watched(proto: onnx.ModelProto, *, data_prop: bool = False, **options: bool) -> onnx.ModelProto:
        listed = [node for node in proto.graph.node if not node.domain and node.op_type in ("Cast", "Gather")]
        assert not (data_prop and any("item" in node.input for node in listed))
        return run(proto, data_prop=data_prop, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", watched)
    model = onnx.load(ROOT / "tests" / "data" / "graphs_more" / "info21__ranking.onnx")
    item = next(item for item in model.graph.input if item.name == "item")
    item.type.tensor_type.shape.dim[0].dim_value = size
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert main(["scan", str(path)]) in (0, 1)
    assert "this is a bug" not in capsys.readouterr().err


def _nested(depth: int) -> bytes:
    """Return bytes that a parser merges into a graph: a loop in a loop, `depth` deep."""

    def field(tag: int, content: bytes) -> bytes:
        size, length = bytearray(), len(content)
        while length > 0x7F:
            size.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes([tag, *size, length]) + content

    body = b""
    for _ in range(depth):
        attribute = field(0x0A, b"body") + field(0x32, body) + b"\xa0\x01\x05"
        body = field(
            0x0A, field(0x12, b"out") + field(0x22, b"Mine") + field(0x3A, b"own") + field(0x2A, attribute)
        )
    return field(0x3A, body)


@pytest.mark.parametrize("depth", [20, 60, 5000])
@pytest.mark.parametrize("verb", ["scan", "transform", "opt"])
def test_deep_nesting(
    depth: int, verb: str, source: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(source.SerializeToString() + _nested(depth))
    code = main(give(verb, path))
    err = capsys.readouterr().err
    assert code == 1, err
    assert ("is not an ONNX model" in err) == (depth > 40)


@pytest.mark.parametrize("verb", VERBS)
def test_odd_names_do_not_reach_the_terminal(
    verb: str, source: onnx.ModelProto, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "emb.weight"
    text = source.SerializeToString()
    assert old.encode() in text
    for graph in (source.graph,):
        for item in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            item.name = item.name.replace(old, ESCAPES)
        for node in graph.node:
            node.input[:] = [name.replace(old, ESCAPES) for name in node.input]
            node.output[:] = [name.replace(old, ESCAPES) for name in node.output]
            node.name = node.name + ESCAPES
    source.producer_name = ESCAPES
    source.graph.doc_string = ESCAPES
    path = tmp_path / "model.onnx"
    path.write_bytes(source.SerializeToString())
    for extra in ([], ["--json"]):
        assert main([*give(verb, path), *extra]) in (0, 1)
        out, err = capsys.readouterr()
        assert not RAW.search(out + err)
        if extra and out:
            json.loads(out)


def test_an_error_is_one_line_per_part_and_of_bounded_length() -> None:
    error = UserError("a\nb\x1b[2J", place="\x00" * 3, tried=["c\nd", "x" * 100_000], help="e\tf")
    lines = str(error).split("\n")
    assert lines[:3] == [r"a\nb\x1b[2J", r"  --> \x00\x00\x00", r"  tried: c\nd"]
    assert lines[4] == r"  help: e\tf"
    assert len(lines[3]) < 4100
    assert "more characters" in lines[3]
    assert safe("a\nb\tc\x7f\x85\ud800é") == "a\nb\tc\\x7f\\x85\\ud800é"
    assert safe_line("short") == "short"


@pytest.mark.parametrize(
    "text",
    [
        "{" * 10_000,
        "[" * 10_000,
        "dce," * 5000 + "\x1b[2J",
        'find-embeddings{padding="\\ud800"}',
        "dce{\x00=1}",
        "\u202edce",
        'find-embeddings{padding="' + "x" * 100_000 + '"}}',
        "lower{target=__import__('os')}",
        "insert-embedding-kfac{lr=1e999}",
        "insert-embedding-kfac{refresh-every=" + "9" * 5000 + "}",
    ],
)
def test_pipelines_with_odd_text(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        parse_pipeline(text)
    assert main(["opt", str(GRAPH), "-p", text]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert not RAW.search(err)
    assert len(err) < 20_000


HEADERS = {
    "beyond the file": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
    "before the file": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    "another size": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "a huge shape": {"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}},
    "a negative shape": {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "an unknown type": {"a": {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}},
    "infinite": {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}},
    "a list": [1, 2],
    "odd notes": {"__metadata__": [1, 2, 3]},
}


@pytest.mark.parametrize("header", list(HEADERS.values()), ids=list(HEADERS))
def test_safetensors_that_lie(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match=r"is not a readable \.safetensors file"):
        stored_weights(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 60_000) + b"[" * 60_000]
)
def test_safetensors_without_a_header(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"is not a readable \.safetensors file"):
        stored_weights(tmp_path / "w.safetensors")


def test_checkpoints_of_onnxruntime_that_lie(tmp_path: Path) -> None:
    """Every position of a small flatbuffer set to extremes: an error or values, at once."""
    path = tmp_path / "run.checkpoint"
    table = struct.pack("<I4sHHi", 16, b"ODTC", 8, 8, 0) + struct.pack("<iIII", 8, 4, 0, 0) + bytes(64)
    for place in range(8, len(table), 2):
        for value in (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00", b"\x00\x00\x00\x80"):
            data = bytearray(table)
            data[place : place + 4] = value
            path.write_bytes(data)
            with contextlib.suppress(UserError):
                read_ort_checkpoint(path)


def test_checkpoints_that_lie(tmp_path: Path) -> None:
    for number, data in enumerate(
        (
            b"",
            safetensors({"a": np.zeros(2, np.float32)}),
            safetensors({"a": np.zeros(2, np.float32)}, {"kfac": "{" * 10_000}),
            safetensors({"model": np.zeros(9, np.uint8)}, {"kfac": "[]", "header": "[]"}),
            b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        )
    ):
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(data)
        with pytest.raises(UserError):
            TrainingSession.resume(path)


def test_states_larger_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(transform(GRAPH, preset="half"), tmp_path / "step.onnx")
    with np.load(GRAPH.with_suffix(".npz")) as file:
        values = {name[3:]: file[name] for name in file.files if name.startswith("in:") and "." in name}
    monkeypatch.setattr(memory, "machine_memory", lambda: 799)
    with pytest.raises(UserError, match=r"the state 'kfac/emb.weight/A' needs 800 bytes of memory"):
        TrainingSession(tmp_path / "step.onnx", parameters=values)


def test_a_transformed_model_is_not_transformed_again(tmp_path: Path) -> None:
    save(transform(GRAPH), tmp_path / "step.onnx")
    with pytest.raises(UserError, match="already transformed"):
        transform(tmp_path / "step.onnx")


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}


def _faults(tree: ast.AST) -> list[str]:
    """Return what in a module could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            given = {item.arg: item.value for item in node.keywords}
            if isinstance(node.func, ast.Name) and name in FORBIDDEN:
                found.append(name)
            if (owner, name) in {("os", "system"), ("os", "popen")}:
                found.append(f"{owner}.{name}")
            if (owner, name) == ("np", "load") and not _is(given.get("allow_pickle"), value=False):
                found.append("np.load without allow_pickle=False")
            if (owner, name) == ("torch", "load") and not _is(given.get("weights_only"), value=True):
                found.append("torch.load without weights_only=True")
            if _is(given.get("allow_pickle"), value=True):
                found.append("allow_pickle=True")
            if "shell" in given and not _is(given["shell"], value=False):
                found.append("shell")
    return found


def _is(node: ast.expr | None, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_in_the_package_runs_what_a_file_says() -> None:
    files = sorted((ROOT / "kfac_onnx").rglob("*.py"))
    assert len(files) > 150
    faults = {str(path): found for path in files if (found := _faults(ast.parse(path.read_text())))}
    assert faults == {}


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "os.system('x')",
        "subprocess.run('x', shell=True)",
        "torch.load(path)",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert _faults(ast.parse(code))


def test_the_search_leaves_the_rest() -> None:
    assert not _faults(
        ast.parse("np.load(p, allow_pickle=False); re.compile('x'); torch.load(p, weights_only=True)")
    )
