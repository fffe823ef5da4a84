"""The cases of the fuzz harness: a damaged file, what lies around it, and the commands that are given it.

Case `n` of seed `s` is a function of these two numbers alone. Every case starts from a real graph of
`tests/data`, or from what `transform` makes of one.
"""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import mutations
import numpy as np
import onnx

from kfac_onnx.api import transform
from kfac_onnx.disk import models as files

__all__ = ["LEVELS", "SECRET", "Case", "make_case"]

DATA: Final = Path(__file__).parents[1] / "data"
SECRET: Final = b"the-secret-outside-the-folder!!!"
"""What stands in the file outside of the model's folder; no output may hold it."""

TRAINING: Final = (
    "graphs/ortart_legcore__lookup_int32",
    "graphs/ortart_legcore__nplm",
    "graphs/ortart_dyncore__nplm_dropout",
    "graphs/ortart_dyncore__lookup_transpose",
    "graphs/ortart_legloss__lookup_onehot",
    "graphs/ortgrad_aten__nplm_pad0",
    "graphs/ortmodule_leg__nplm",
    "graphs/tf2onnx_in__nplm",
    "graphs/tf2onnx_in__onehot",
    "graphs/tf2onnx_sgd__nplm",
    "graphs/torchjoint_in__nplm",
    "graphs/torchjoint_in__lookup_onehot",
    "graphs/torchmakefx__nplm_pad0",
    "graphs_more/info21__ranking",
    "graphs_more/jax_in18__columns",
)
FORWARD: Final = (
    "graphs/fwd_dyncore__nplm",
    "graphs/fwd_dyncore__scan_rnn",
    "graphs_loops/bag_dynamo_sum_weighted",
    "graphs_forward/gru_legacy_15",
)
STEPS: Final = (
    ("graphs/ortart_legcore__lookup_int32", {}),
    ("graphs/ortgrad_aten__nplm_pad0", {"preset": "adagrad"}),
    ("graphs/torchjoint_in__nplm", {"shape": "dense"}),
    ("graphs/torchmakefx__nplm_pad0", {"preset": "plain-adam"}),
    ("graphs/tf2onnx_in__nplm", {"preset": "r1.7"}),
)
LEVELS: Final = {"bytes": 30, "graph": 30, "tensor": 18, "metadata": 12, "text": 4, "arrays": 6}
"""Level -> its share of the cases in hundredths."""

PIPELINES: Final = (
    "find-embeddings,insert-embedding-kfac{preset=half,lr=0.01},insert-optimizer{method=adam},close-step,lower,dce",
    "dce",
    "lower{target=cpu},dce",
    'find-embeddings{padding=["emb.weight=0"]}',
    "differentiate{loss=cross-entropy}",
)


@dataclass
class Case:
    """Files by name (a str is a link to that place), and the commands in the order that they run.

    A command that begins with `?` runs only if the one before it succeeded.
    """

    number: int
    level: str
    source: str
    what: str
    files: dict[str, bytes | str] = field(default_factory=dict[str, "bytes | str"])
    commands: list[list[str]] = field(default_factory=list[list[str]])


@dataclass(frozen=True)
class _Source:
    """A sound model, its first table, and its batch and parameters as `.npz` files."""

    name: str
    kind: str
    model: bytes
    parameter: str
    batch: bytes
    parameters: bytes


def _npz(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@cache
def _source(name: str, kind: str, options: tuple[tuple[str, str], ...] = ()) -> _Source:
    proto = files.load_proto(DATA / f"{name}.onnx")
    inputs: dict[str, Any] = {}
    if (DATA / f"{name}.npz").exists():
        with np.load(DATA / f"{name}.npz") as archive:
            inputs = {key[3:]: archive[key] for key in archive.files if key.startswith("in:")}
    known = {item.name for item in proto.graph.input}
    inputs = {key: value for key, value in inputs.items() if key in known}
    batch = {key: value for key, value in inputs.items() if not np.issubdtype(value.dtype, np.floating)}
    rest = {key: value for key, value in inputs.items() if key not in batch}
    tables = [item.name for item in proto.graph.initializer if len(item.dims) == 2]
    parameter = next(iter([*(key for key, value in rest.items() if value.ndim == 2), *tables]), "emb.weight")
    data = proto.SerializeToString()
    if kind == "step":
        import onnx_ir as ir

        data = ir.to_proto(transform(proto, **dict(options))).SerializeToString()
    label = name.rpartition("/")[2] + "".join(f" {key}={value}" for key, value in options)
    return _Source(label, kind, data, parameter, _npz(batch), _npz(rest))


def _any_source(rng: random.Random, *, step: float) -> _Source:
    chance = rng.random()
    if chance < step:
        name, options = rng.choice(STEPS)
        return _source(name, "step", tuple(options.items()))
    if chance < step + (1 - step) * 0.2:
        return _source(rng.choice(FORWARD), "forward")
    return _source(rng.choice(TRAINING), "training")


_TRAIN: Final = [
    "--data",
    "batch.npz",
    "--batch-size",
    "4",
    "--steps",
    "1",
    "--quiet",
    "--parameters",
    "parameters.npz",
]


def _commands(rng: random.Random, source: _Source) -> list[list[str]]:
    model = "model.onnx"
    if source.kind == "step":
        choices = [
            ([["inspect", model]], 3),
            ([["inspect", model, "--json", "--nodes"]], 2),
            ([["train", model, *_TRAIN]], 4),
            ([["opt", model, "-p", "lower,dce", "-o", "out.onnx"]], 2),
            ([["scan", model]], 1),
            ([["diff", "sound.onnx", model]], 1),
        ]
    else:
        shape = rng.choice(("rows", "rows", "dense"))
        choices = [
            ([["scan", model, *rng.choice(([], ["--json"]))]], 8),
            ([["why", model, source.parameter]], 3),
            ([["check", model, *rng.choice(([], ["--json"]))]], 3),
            ([["transform", model, "-o", "out.onnx", "--shape", shape]], 4),
            ([["transform", model, "-o", "out.onnx"], ["?train", "out.onnx", *_TRAIN]], 2),
            ([["transform", model, "-o", "out.onnx", "--shape", shape], ["?inspect", "out.onnx"]], 1),
            ([["opt", model, "-p", "dce"]], 1),
            ([["opt", model, "--canonical", "-p", "find-embeddings,dce", "-o", "out.onnx"]], 2),
            ([["differentiate", model, "-o", "out.onnx"]], 10 if source.kind == "forward" else 1),
            ([["diff", "sound.onnx", model]], 1),
            ([["verify", model, *_TRAIN[:4], *_TRAIN[-2:]]], 1),
            ([["inspect", model]], 1),
        ]
    return [list(words) for words in rng.choices([c[0] for c in choices], [c[1] for c in choices])[0]]


def _add_files(case: Case, source: _Source, model: bytes) -> None:
    case.files = {
        "model.onnx": model,
        "batch.npz": source.batch,
        "parameters.npz": source.parameters,
    }
    if any("sound.onnx" in words for words in case.commands):
        case.files["sound.onnx"] = source.model


def _protobuf_case(rng: random.Random, number: int) -> Case:
    source = _any_source(rng, step=0.25)
    model, what = mutations.damaged_bytes(rng, source.model)
    case = Case(number, "bytes", source.name, what, commands=_commands(rng, source))
    _add_files(case, source, model)
    return case


def _edited_case(rng: random.Random, number: int, level: str) -> Case:
    kinds = {"graph": mutations.GRAPH, "tensor": mutations.TENSOR, "metadata": mutations.METADATA}[level]
    source = _any_source(rng, step={"graph": 0.2, "tensor": 0.2, "metadata": 0.95}[level])
    proto = onnx.ModelProto.FromString(source.model)
    names: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(kinds)
        change(rng, proto)
        names.append(change.__name__)
    case = Case(number, level, source.name, "+".join(names), commands=_commands(rng, source))
    _add_files(case, source, proto.SerializeToString())
    if "external" in names:
        case.files |= {
            "weights.bin": rng.randbytes(rng.choice((0, 16, 20_000))),
            "link.bin": "../outside.bin",
            "folder/link": "../..",
            "OUTSIDE": b"",
        }
    return case


def _text_case(rng: random.Random, number: int) -> Case:
    source = _any_source(rng, step=0.0)
    damaged = mutations.damaged_text(rng, rng.choice((*PIPELINES, source.parameter)))
    words = rng.choice(
        (
            ["opt", "model.onnx", "-p", damaged],
            ["transform", "model.onnx", "-o", "out.onnx", "--pipeline", damaged],
            ["why", "model.onnx", damaged],
            ["scan", "model.onnx", "--loss", damaged],
            ["scan", "model.onnx", "--gradients", f"{source.parameter}={damaged}"],
            ["scan", damaged],
            ["transform", "model.onnx", "-o", "out.onnx", "--padding-idx", damaged],
            ["transform", "model.onnx", "-o", damaged.replace("/", "_")],
            ["transform", "model.onnx", "-o", "out.onnx", "--preset", damaged],
            ["opt", "text.onnxtxt", "-p", "dce"],
        )
    )
    # An operating system refuses a NUL in an argument before any program sees it.
    case = Case(number, "text", source.name, words[0], commands=[[word.replace("\0", "") for word in words]])
    _add_files(case, source, source.model)
    if "text.onnxtxt" in words:
        text = onnx.printer.to_text(onnx.ModelProto.FromString(source.model))
        case.files["text.onnxtxt"] = mutations.damaged_text(rng, text).encode()
    return case


def _safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in arrays.items()})


def _lying_npy(rng: random.Random) -> bytes:
    """Return an array file whose header promises what does not follow, or what nobody may load."""
    header = rng.choice(
        (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (1099511627776, 4), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }",
            "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
            "{'descr': '<f4', 'shape': (2,), }",
            "__import__('os').system('true')",
            "{" * 500,
            "(" * 9000,
        )
    ).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x80\x04K\x01." + b"\0" * 64


def _bomb(rng: random.Random) -> bytes:
    """Return an archive of a few kilobytes that unpacks to much more, or lies about it."""
    import zipfile

    file = io.BytesIO()
    member = _lying_npy(rng) if rng.random() < 0.7 else b"\0" * 30_000_000
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            rng.choice(("ids.npy", "../ids.npy", "\x1b[2J.npy", "labels.npy", "emb.weight.npy")), member
        )
    data = bytearray(file.getvalue())
    if rng.random() < 0.3:  # the directory's own sizes
        place = data.rfind(b"PK\x01\x02")
        data[place + 20 : place + 28] = struct.pack(
            "<II", *(rng.choice((0, 5, 2**31, 2**32 - 2)) for _ in range(2))
        )
    return bytes(data)


def _arrays_case(rng: random.Random, number: int) -> Case:
    name, options = STEPS[rng.choice((0, 1))]
    source = _source(name, "step", tuple(options.items()))
    with np.load(io.BytesIO(source.parameters)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    suffix = rng.choice(("npz", "npz", "safetensors", "onnx"))
    whole = {
        "npz": source.parameters,
        "safetensors": _safetensors(arrays),
        "onnx": onnx.helper.make_model(
            onnx.helper.make_graph(
                [],
                "weights",
                [],
                [],
                [onnx.numpy_helper.from_array(value, key) for key, value in arrays.items()],
            )
        ).SerializeToString(),
    }[suffix]
    what = rng.choice(("bytes", "header", "bomb", "odd"))
    if what == "bomb" and suffix == "npz":
        broken = _bomb(rng)
    elif what == "header" and suffix == "safetensors":
        end = 8 + struct.unpack("<Q", whole[:8])[0]
        text = mutations.damaged_text(rng, whole[8:end].decode()).encode()
        broken = struct.pack("<Q", rng.choice((len(text), len(text), 2**63, 3))) + text + whole[end:]
    elif what == "odd" and suffix == "npz":
        odd = rng.choice(
            (np.array(["text"]), np.zeros((3, 0)), np.array(1j), np.zeros(2, ml_dtypes.bfloat16))
        )
        broken = _npz({**arrays, next(iter(arrays)): odd})
    else:
        broken, _ = mutations.damaged_bytes(rng, whole)
    train = ["train", "model.onnx", *_TRAIN[:-2]]
    if rng.random() < 0.5:
        case = Case(number, "arrays", source.name, f"parameters {suffix} {what}")
        case.commands = [[*train, "--parameters", f"broken.{suffix}"]]
    else:
        case = Case(number, "arrays", source.name, f"data {what}")
        broken = _bomb(rng) if what == "bomb" else mutations.damaged_bytes(rng, source.batch)[0]
        suffix = "npz"
        case.commands = [[*train, "--parameters", "parameters.npz"]]
        case.commands[0][3] = rng.choice(("broken.npz", "shards"))
    _add_files(case, source, source.model)
    case.files[f"broken.{suffix}"] = broken
    case.files["shards/0.npz"] = broken
    return case


def make_case(seed: int, number: int) -> Case:
    """Return case `number` of a seed."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311  not for secrets
    level = rng.choices(list(LEVELS), list(LEVELS.values()))[0]
    match level:
        case "bytes":
            return _protobuf_case(rng, number)
        case "text":
            return _text_case(rng, number)
        case "arrays":
            return _arrays_case(rng, number)
        case _:
            return _edited_case(rng, number, level)
