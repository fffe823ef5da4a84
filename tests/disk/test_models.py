from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from kfac_onnx.disk import models as files
from kfac_onnx.disk.models import atomic_path, load_model, load_proto, refuse_overwrite, save_model
from kfac_onnx.errors import UserError

TEXT = """# a comment
<ir_version: 10, opset_import: ["" : 18]>
g (float[1] x) => (float[1] y) <float[2] w = {1, 2}> { y = Neg(x) }
"""


def proto() -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT)


def message(error: pytest.ExceptionInfo[UserError], folder: Path) -> str:
    return str(error.value).replace(str(folder), "DIR")


def test_protobuf_text_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(proto().SerializeToString())
    (tmp_path / "m.onnxtxt").write_text(TEXT)
    assert load_proto(tmp_path / "m.onnx") == load_proto(tmp_path / "m.onnxtxt") == proto()
    for data in (proto().SerializeToString(), TEXT.encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert load_proto("-") == proto()
    assert load_model(tmp_path / "m.onnx").graph.num_nodes() == 1


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x00\xff" * 100, b"PK\x03\x04", onnx.TensorProto().SerializeToString()]
)
def test_what_is_not_a_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m.onnx")
    assert message(caught, tmp_path).splitlines()[0] == "'DIR/m.onnx' is not an ONNX model"


def test_what_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "none.onnx")
    assert message(caught, tmp_path) == "there is no file 'DIR/none.onnx'"
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert message(caught, tmp_path) == "'DIR' cannot be read: Is a directory"


def test_a_damaged_text_says_where(tmp_path: Path) -> None:
    (tmp_path / "m.onnxtxt").write_text(TEXT.replace("Neg", "%"))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m.onnxtxt")
    assert message(caught, tmp_path) == (
        "'DIR/m.onnxtxt' is not an ONNX model: "
        "ParseError at position (line: 3 column: 60), Expected character ( not found."
    )


def external(folder: Path, location: str) -> Path:
    model = proto()
    tensor = numpy_helper.from_array(np.arange(2, dtype=np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer[0].CopyFrom(tensor)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())  # longer is no fault
    weight = load_model(external(tmp_path, "w.data")).graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), np.arange(2, dtype=np.float32))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", ""])
def test_external_data_may_not_leave_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    with pytest.raises(UserError) as caught:
        load_model(external(folder, location))
    assert message(caught, tmp_path) == (
        "tensor 'w' of 'DIR/model/m.onnx' keeps its data outside the model's folder\n"
        f"  --> location '{location}'\n"
        "  help: put the data file beside the model"
    )


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external(tmp_path, "w.data")
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert message(caught, tmp_path) == (
        "the data of tensor 'w' of 'DIR/m.onnx' is missing: there is no file 'w.data'"
    )
    (tmp_path / "w.data").write_bytes(bytes(7))
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert message(caught, tmp_path) == (
        "the data of tensor 'w' of 'DIR/m.onnx' is damaged: it takes 8 bytes of 'w.data'\n"
        "  help: copy the model and its data file again"
    )


def test_saving_is_whole_and_reading_gives_it_back(tmp_path: Path) -> None:
    model = ir.from_onnx_text(TEXT)
    for name in ("out.onnx", "out.onnxtxt"):
        save_model(model, tmp_path / name)
        assert load_model(tmp_path / name).graph.num_nodes() == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.onnx", "out.onnxtxt"]


def test_large_models_keep_their_tensors_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_FILE", 1000)
    model = proto()
    weight = np.arange(1000, dtype=np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    save_model(ir.from_proto(model), tmp_path / "big.onnx")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert (tmp_path / "big.onnx").stat().st_size < 1000
    found = load_model(tmp_path / "big.onnx").graph.initializers["w"].const_value
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), weight)


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert target.read_text() == "old"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        save_model(ir.from_onnx_text(TEXT), tmp_path / "none" / "out.onnx")
    assert message(caught, tmp_path) == "'DIR/none/out.onnx' cannot be written: No such file or directory"
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError) as caught:
        save_model(ir.from_onnx_text(TEXT), tmp_path / "taken")
    assert message(caught, tmp_path) == "'DIR/taken' cannot be written: it is a folder"
    with pytest.raises(UserError) as caught:  # a device would be replaced by a file
        save_model(ir.from_onnx_text(TEXT), "/dev/null")
    assert message(caught, tmp_path) == "'/dev/null' cannot be written: it is not a regular file"
    assert Path("/dev/null").is_char_device()
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source, link = tmp_path / "a.onnx", tmp_path / "b.onnx"
    source.write_bytes(b"x")
    link.symlink_to(source)
    refuse_overwrite(tmp_path / "c.onnx", source, "-")
    with pytest.raises(UserError) as caught:
        refuse_overwrite(link, source)
    assert message(caught, tmp_path) == (
        "'DIR/b.onnx' is the input and will not be overwritten\n  help: choose another name"
    )


def test_a_large_model_is_written_and_read_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data lie beside the file itself, and reading the link finds them there."""
    import onnx_ir as ir

    (tmp_path / "real").mkdir()
    link = tmp_path / "link.onnx"
    link.symlink_to(Path("real") / "model.onnx")
    monkeypatch.setattr(files, "LARGEST_FILE", 10)
    weights = np.arange(600, dtype=np.float32)  # small tensors stay in the model
    graph = ir.Graph([], [], nodes=[], initializers=[], opset_imports={"": 18}, name="g")
    graph.register_initializer(ir.Value(name="w", const_value=ir.tensor(weights, name="w")))
    for values in (weights, weights + 1):  # the second pair takes the other name
        graph.initializers["w"].const_value = ir.tensor(values, name="w")
        save_model(ir.Model(graph, ir_version=10), link)
        assert link.is_symlink()
        for place in (link, tmp_path / "real" / "model.onnx"):
            tensor = load_model(place).graph.initializers["w"].const_value
            assert tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), values)
        assert [item.name for item in tmp_path.iterdir() if item.is_file() and not item.is_symlink()] == []
    (data,) = (item for item in (tmp_path / "real").iterdir() if item.name != "model.onnx")
    assert data.name == "model.onnx.data2"
    with pytest.raises(UserError, match=r"belongs to the input '.*link.onnx' and will not be overwritten"):
        refuse_overwrite(data, link)
