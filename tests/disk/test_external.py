"""External data: beside the model or below it, whole, and nowhere else; replaced as a pair with its model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from kfac_onnx.disk import atomic, memory
from kfac_onnx.disk import models as files
from kfac_onnx.disk.external import belonging, data_names
from kfac_onnx.disk.models import load_model, load_proto, refuse_overwrite, save_model
from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = np.arange(6, dtype=np.float32)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with data of six numbers, one outside of it, and links."""
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    for place in (home / "w.bin", home / "inner" / "w.bin", tmp_path / "outside.bin"):
        place.write_bytes(NUMBERS.tobytes())
    (home / "inside.link").symlink_to("w.bin")
    (home / "outside.link").symlink_to(tmp_path / "outside.bin")
    (home / "folder.link").symlink_to(tmp_path)
    (home / "circle.link").symlink_to("circle.link")
    return home


def write(home: Path, dims: list[int] | None = None, dtype: int = TensorProto.FLOAT, **entries: str) -> Path:
    tensor = TensorProto(name="w", data_type=dtype, dims=[2, 3] if dims is None else dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", dtype, None)],
        [tensor],
    )
    path = home / "m.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
    )
    return path


def refusal(path: Path, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_proto(path)
    return caught.value.message.replace(str(root), "DIR")


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "inner/w.bin", "inner/../w.bin"])
def test_what_lies_in_the_folder_is_read(home: Path, location: str) -> None:
    held = load_proto(write(home, location=location)).graph.initializer[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(held).reshape(-1), NUMBERS)


@pytest.mark.parametrize(
    "location",
    ["../outside.bin", "outside.link", "folder.link/outside.bin", "inner/../../outside.bin", "ABSOLUTE", ""],
)
def test_what_leaves_the_folder_is_refused(home: Path, tmp_path: Path, location: str) -> None:
    location = location.replace("ABSOLUTE", str(tmp_path / "outside.bin"))
    assert refusal(write(home, location=location), tmp_path) == (
        "tensor 'w' of 'DIR/home/m.onnx' keeps its data outside the model's folder"
    )


def test_links_are_refused_even_into_the_folder(home: Path, tmp_path: Path) -> None:
    assert "it is a symbolic link" in refusal(write(home, location="inside.link"), tmp_path)


def test_an_absolute_path_is_refused_even_into_the_folder(home: Path, tmp_path: Path) -> None:
    assert "outside the model's folder" in refusal(write(home, location=str(home / "w.bin")), tmp_path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "none.bin"}, "is missing: there is no file 'none.bin'"),
        ({"location": "inner"}, "is missing: there is no file 'inner'"),
        ({"location": "nul\0byte"}, "cannot be read: embedded null byte"),
        ({"location": "x" * 5000}, "cannot be read: "),
        ({"location": "circle.link"}, "cannot be read: "),
        ({"location": "w.bin", "offset": "4"}, "is damaged: it takes 24 bytes of 'w.bin'"),
        ({"location": "w.bin", "offset": "-4"}, "is damaged: its offset is '-4', which is no number"),
        ({"location": "w.bin", "offset": "٣"}, "is damaged: its offset is '٣', which is no number"),
        ({"location": "w.bin", "offset": "9" * 19}, "is damaged: it takes 24 bytes of 'w.bin'"),
        ({"location": "w.bin", "length": "1e3"}, "is damaged: its length is '1e3', which is no number"),
        ({"location": "w.bin", "length": "23"}, "is damaged: it takes 24 bytes of 'w.bin'"),
        ({"location": "w.bin", "length": "9" * 30}, "is damaged: its length is"),
    ],
)
def test_what_is_missing_or_cut_is_refused(
    home: Path, tmp_path: Path, entries: dict[str, str], said: str
) -> None:
    assert refusal(write(home, **entries), tmp_path).startswith(
        f"the data of tensor 'w' of 'DIR/home/m.onnx' {said}"
    )


def test_huge_declared_sizes_are_refused_before_anything_is_made(home: Path, tmp_path: Path) -> None:
    assert "takes 4611686018427387904 bytes" in refusal(
        write(home, [2**30, 2**30], location="w.bin"), tmp_path
    )


def test_one_file_may_not_be_read_until_memory_is_full(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(home, location="w.bin")
    load_proto(path)
    monkeypatch.setattr(memory, "machine_memory", lambda: 23)
    assert refusal(path, tmp_path) == (
        "the external data of 'DIR/home/m.onnx' needs 24 bytes of memory, and this machine has 23"
    )


def test_strings_may_not_lie_outside(home: Path, tmp_path: Path) -> None:
    said = refusal(write(home, [1], TensorProto.STRING, location="w.bin"), tmp_path)
    assert said.endswith("keeps strings in another file, which the format does not allow")


@pytest.mark.parametrize("where", ["attribute", "branch", "function"])
def test_tensors_anywhere_in_the_model_are_looked_at(home: Path, tmp_path: Path, where: str) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[6], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../outside.bin")
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    y = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph, functions = helper.make_graph([node], "g", [], y), []
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    if where == "branch":
        branch = helper.make_graph([helper.make_node("Constant", [], ["z"], value=tensor)], "b", [], [])
        branch.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
        yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
        choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([choice], "g", [], y, [yes])
    elif where == "function":
        functions = [helper.make_function("own", "F", [], ["y"], [node], imports)]
        graph = helper.make_graph([helper.make_node("F", [], ["y"], domain="own")], "g", [], y)
    model = helper.make_model(graph, opset_imports=imports, functions=functions)
    (home / "m.onnx").write_bytes(model.SerializeToString())
    assert "outside the model's folder" in refusal(home / "m.onnx", tmp_path)


def model(value: float) -> ir.Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1000] x) => (float[1000] y) <float[1000] w> { y = Add(x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.full(1000, value, np.float32), "w")
    del proto.graph.initializer[:], proto.graph.input[1:]
    proto.graph.initializer.append(weight)
    return ir.from_proto(proto)


def weight_of(path: Path) -> float:
    tensor = load_model(path).graph.initializers["w"].const_value
    assert tensor is not None
    (value,) = set(tensor.numpy().tolist())
    return value


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "LARGEST_FILE", 1000)
    return tmp_path / "big.onnx"


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_pairs_take_turns(big: Path) -> None:
    for number, data in enumerate(["big.onnx.data", "big.onnx.data2", "big.onnx.data"]):
        save_model(model(number), big)
        assert weight_of(big) == number
        assert names(big.parent) == ["big.onnx", data]
        assert data_names(big) == {data}


def test_a_small_model_takes_the_place_of_a_pair(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model(1), big)
    monkeypatch.setattr(files, "LARGEST_FILE", 10_000)
    save_model(model(2), big)
    assert weight_of(big) == 2
    assert names(big.parent) == ["big.onnx"]


@pytest.mark.parametrize("moves", [0, 1])
def test_whenever_it_is_killed_there_is_a_whole_pair(
    big: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """The renames are all that happens in the folder: stop before each of them."""
    save_model(model(1), big)
    replace, done = os.replace, list[object]()

    def stops(source: object, target: object) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic.os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        save_model(model(2), big)
    monkeypatch.setattr(atomic.os, "replace", replace)
    assert weight_of(big) == 1
    save_model(model(3), big)
    assert weight_of(big) == 3
    assert data_names(big) <= {*names(big.parent)}


def test_data_of_others_is_not_deleted(big: Path) -> None:
    proto = ir.to_proto(model(1))
    onnx.save_model(proto, str(big), save_as_external_data=True, location="weights.bin", size_threshold=0)
    save_model(model(2), big)
    assert weight_of(big) == 2
    assert names(big.parent) == ["big.onnx", "big.onnx.data", "weights.bin"]


def test_the_data_of_an_input_is_an_input(big: Path) -> None:
    save_model(model(1), big)
    data = big.with_name("big.onnx.data")
    assert belonging(big) == {data}
    before = data.read_bytes()
    link = big.with_name("link")
    link.symlink_to(data)
    hard = big.with_name("hard.onnx.data")
    hard.hardlink_to(data)
    for output in (data, link, big.parent / "." / "big.onnx.data", hard, big.with_name("hard.onnx")):
        with pytest.raises(
            UserError, match=r"belongs to the input '.*big\.onnx' and will not be overwritten"
        ):
            refuse_overwrite(output, big)
    refuse_overwrite(big.with_name("other.onnx"), big)
    assert data.read_bytes() == before


def test_a_file_of_an_input_folder_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    with pytest.raises(UserError, match=r"belongs to the input"):
        refuse_overwrite(tmp_path / "a.npz", tmp_path)
    refuse_overwrite(tmp_path / "b.onnx", tmp_path)
    refuse_overwrite(tmp_path / "a.npz", "-")


def test_the_data_of_a_training_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "p.checkpoint").write_bytes(b"x")
    assert belonging(tmp_path / "p.checkpoint") == set()
    (tmp_path / "p.checkpoint.data").write_bytes(b"x")
    assert belonging(tmp_path / "p.checkpoint") == {tmp_path / "p.checkpoint.data"}
    assert belonging(tmp_path / "none.onnx") == set()
