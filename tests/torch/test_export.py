"""Exported training graphs against PyTorch's own autograd, also at another batch size."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import kfac_onnx as kx
import kfac_onnx.torch
from kfac_onnx.api import scan
from kfac_onnx.errors import UserError
from kfac_onnx.torch.export import export_training_graph

if TYPE_CHECKING:
    import onnx_ir as ir

# Float32 sums over tens of terms of order one: 1e-6 each; 1e-5 leaves room, and a factor 1.01 is 1e-2.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def run(model: ir.Model, feed: dict[str, Any]) -> dict[str, np.ndarray]:
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(
        zip(names, session.run(None, {key: np.asarray(value) for key, value in feed.items()}), strict=True)
    )


def check(model: ir.Model, module: Any, names: tuple[str, ...], inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Compare loss and every gradient of the graph with autograd; return what the graph gave."""
    module.zero_grad()
    loss = module(*inputs)
    loss.backward()
    got = run(model, dict(zip(names, inputs, strict=True)))
    np.testing.assert_allclose(got["loss"], loss.detach().numpy(), rtol=TOLERANCE)
    expected = {f"{name}_grad": p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    assert set(got) == {"loss", *expected}
    for name, gradient in expected.items():
        largest = float(np.abs(gradient).max())
        assert largest > 0, name
        np.testing.assert_allclose(got[name], gradient, rtol=0, atol=TOLERANCE * largest, err_msg=name)
    return got


def language_model(torch: Any, *, padding_idx: int | None = None, tied: bool = False) -> Any:
    class LanguageModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(30, 8, padding_idx=padding_idx)
            self.fc = torch.nn.Linear(24, 8)
            self.out = torch.nn.Linear(8, 30)
            if tied:
                self.out.weight = self.emb.weight

        def forward(self, ids: Any, labels: Any) -> Any:
            hidden = torch.tanh(self.fc(self.emb(ids).flatten(1)))
            return torch.nn.functional.cross_entropy(self.out(hidden), labels)

    return LanguageModel()


def batch(torch: Any, size: int, *, dtype: str = "int64") -> tuple[Any, Any]:
    ids = torch.randint(0, 30, (size, 3))
    ids[0] = torch.tensor([4, 4, 0])
    return ids.to(getattr(torch, dtype)), torch.randint(0, 30, (size,))


@pytest.mark.parametrize(("padding_idx", "dtype"), [(None, "int64"), (None, "int32"), (0, "int64")])
def test_language_model_equals_autograd_at_two_batch_sizes(
    torch: Any, padding_idx: int | None, dtype: str
) -> None:
    module = language_model(torch, padding_idx=padding_idx)
    model = export_training_graph(module, batch(torch, 5, dtype=dtype))
    assert [value.name for value in model.graph.inputs] == ["ids", "labels"]
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch,3]", "[batch]"]
    for size in (5, 11, 1):
        got = check(model, module, ("ids", "labels"), batch(torch, size, dtype=dtype))
        if padding_idx is not None:
            assert not got["emb.weight_grad"][padding_idx].any()


def test_tied_weights_are_one_parameter_with_the_sum_of_both_gradients(torch: Any) -> None:
    module = language_model(torch, tied=True)
    model = export_training_graph(module, batch(torch, 5))
    got = check(model, module, ("ids", "labels"), batch(torch, 7))
    (site,) = scan(model).sites
    assert (site.parameter, len(site.uses), len(site.dense_uses)) == ("emb.weight", 1, 1)
    assert sorted(got) == ["emb.weight_grad", "fc.bias_grad", "fc.weight_grad", "loss", "out.bias_grad"]


def test_parameters_as_inputs_leave_their_values_out(torch: Any) -> None:
    module = language_model(torch)
    model = export_training_graph(module, batch(torch, 5), parameters_as="inputs")
    names = [name for name, _ in module.named_parameters()]
    assert [value.name for value in model.graph.inputs] == ["ids", "labels", *names]
    ids, labels = batch(torch, 4)
    values = {name: value.detach().numpy() for name, value in module.named_parameters()}
    given = run(model, {"ids": ids, "labels": labels, **values})
    full = export_training_graph(module, batch(torch, 5))
    for name, array in check(full, module, ("ids", "labels"), (ids, labels)).items():
        np.testing.assert_array_equal(array, given[name])


@pytest.mark.parametrize("names", [("context", "neg"), ("neg", "mul")])
def test_arguments_and_parameters_called_like_operators(torch: Any, names: tuple[str, str]) -> None:
    class Scored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 3)
            self.sigmoid = torch.nn.Parameter(torch.ones(3))

        def forward(self, first: Any, second: Any) -> Any:
            rows = self.emb(first) * self.emb(second)
            return torch.sigmoid(-(rows * torch.sigmoid(self.sigmoid)).sum(1)).mean()

    module = Scored()
    inputs = torch.tensor([1, 2, 2]), torch.tensor([3, 3, 8])
    model = export_training_graph(module, inputs, input_names=names)
    check(model, module, names, inputs)
    (site,) = scan(model).sites
    assert (site.parameter, len(site.uses)) == ("emb.weight", 2)


@pytest.mark.parametrize("padded", [True, False])
def test_convolution_pooling_and_gates(torch: Any, padded: bool) -> None:
    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.conv = torch.nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
            self.average = torch.nn.AvgPool1d(2, 1, padding=1, count_include_pad=padded)
            self.most = torch.nn.MaxPool1d(3, 2, padding=1)

        def forward(self, ids: Any) -> Any:
            rows = torch.nn.functional.silu(self.conv(self.emb(ids).transpose(1, 2)))
            return self.most(self.average(rows)).square().mean()

    module = Text()
    model = export_training_graph(module, (torch.randint(0, 9, (4, 12)),))
    check(model, module, ("ids",), (torch.randint(0, 9, (7, 12)),))
    (site,) = scan(model).sites
    assert (site.parameter, site.vocab_size, site.embedding_dim) == ("emb.weight", 9, 4)


def test_what_no_rule_covers_is_said(torch: Any) -> None:
    class Up(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.up = torch.nn.ConvTranspose1d(4, 2, 3)

        def forward(self, ids: Any) -> Any:
            return self.up(self.emb(ids).transpose(1, 2)).square().mean()

    with pytest.raises(UserError, match="the gradient of a transposed convolution cannot be exported"):
        export_training_graph(Up(), (torch.randint(0, 9, (4, 5)),))


def test_parameters_with_equal_values_stay_apart(torch: Any) -> None:
    class TwoBiases(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users = torch.nn.Embedding(9, 2)
            self.items = torch.nn.Embedding(9, 2)
            torch.nn.init.ones_(self.users.weight)
            torch.nn.init.ones_(self.items.weight)

        def forward(self, user: Any, item: Any, rating: Any) -> Any:
            return ((self.users(user) * self.items(item)).sum(1) - rating).square().mean()

    module = TwoBiases()
    inputs = torch.tensor([1, 2, 2]), torch.tensor([3, 3, 3]), torch.tensor([0.5, 1.0, 4.0])
    model = export_training_graph(module, inputs)
    assert {"users.weight", "items.weight"} <= set(model.graph.initializers)
    check(model, module, ("user", "item", "rating"), inputs)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_bag_over_offsets(torch: Any, mode: str, padding_idx: int | None) -> None:
    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(12, 4, mode=mode, padding_idx=padding_idx, sparse=True)
            self.out = torch.nn.Linear(4, 1)

        def forward(self, ids: Any, offsets: Any) -> Any:
            return torch.sigmoid(self.out(self.bag(ids, offsets))).square().mean()

    module = Bags()
    ids, offsets = torch.tensor([1, 2, 2, 5, 7, 2, 1]), torch.tensor([0, 3, 3, 4])  # the second is empty
    model = export_training_graph(module, (ids, offsets))
    module.bag.sparse = False
    check(model, module, ("ids", "offsets"), (ids, offsets))
    check(model, module, ("ids", "offsets"), (torch.tensor([3, 3, 2]), torch.tensor([0, 2])))
    (site,) = scan(model).sites
    assert (site.parameter, site.vocab_size, site.embedding_dim) == ("bag.weight", 12, 4)
    assert site.padding_idx == padding_idx


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_of_one_length(torch: Any, mode: str) -> None:
    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(12, 4, mode=mode)

        def forward(self, ids: Any, target: Any) -> Any:
            return (self.bag(ids) - target).square().mean()

    module = Bags()
    model = export_training_graph(module, (torch.randint(0, 12, (4, 3)), torch.randn(4, 4)))
    check(model, module, ("ids", "target"), (torch.randint(0, 12, (6, 3)), torch.randn(6, 4)))


def test_embedding_bag_weights_each_sample(torch: Any) -> None:
    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(12, 4, mode="sum", include_last_offset=True)

        def forward(self, ids: Any, offsets: Any, weights: Any) -> Any:
            return self.bag(ids, offsets, weights).square().mean()

    module = Bags()
    inputs = torch.tensor([1, 2, 2, 5]), torch.tensor([0, 3, 4]), torch.tensor([0.5, 1.0, -2.0, 3.0])
    check(
        export_training_graph(module, inputs, dynamic_batch=False),
        module,
        ("ids", "offsets", "weights"),
        inputs,
    )


def test_buffers_frozen_and_unused_parameters_are_not_trained(torch: Any, caplog: Any) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.fixed = torch.nn.Embedding(9, 4).requires_grad_(False)
            self.unused = torch.nn.Linear(2, 2, bias=False)
            self.register_buffer("gain", torch.tensor([1.0, 2.0, 3.0, 4.0]))

        def forward(self, ids: Any) -> Any:
            return (self.emb(ids) * self.gain - self.fixed(ids)).square().mean()

    module = Mixed()
    model = export_training_graph(module, (torch.randint(0, 9, (5,)),))
    check(model, module, ("ids",), (torch.randint(0, 9, (8,)),))
    assert {"emb.weight", "fixed.weight", "gain"} <= set(model.graph.initializers)
    assert "parameter 'unused.weight' has no gradient of the loss and will not be trained" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_values_keep_their_type_and_bits(torch: Any, dtype: str) -> None:
    module = language_model(torch).to(getattr(torch, dtype))
    model = export_training_graph(module, batch(torch, 5))
    value = model.graph.initializers["emb.weight"].const_value
    assert value is not None
    assert value.dtype.name == dtype.upper()
    # Exact: every float16 and bfloat16 is a float32.
    np.testing.assert_array_equal(
        value.numpy().astype(np.float32), module.emb.weight.detach().float().numpy()
    )
    (site,) = scan(model).sites
    assert site.dtype == dtype


def complex_numbers(rows: Any) -> Any:
    import torch

    return torch.view_as_complex(rows.unflatten(1, (2, 2))).abs().sum()


def sparse_product(rows: Any) -> Any:
    import torch

    return torch.sparse.mm(torch.eye(5).to_sparse(), rows).sum()


def spectrum(rows: Any) -> Any:
    import torch

    return torch.fft.rfft(rows).abs().sum()


def exponential(rows: Any) -> Any:
    import torch

    return torch.linalg.matrix_exp(rows.T @ rows).sum()


def shared(torch: Any, last: Any) -> Any:
    """Return a module with one submodule under two names, statistics, a cache and an LSTM."""

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.first = torch.nn.Linear(4, 4)
            self.norm = torch.nn.BatchNorm1d(4)
            self.lstm = torch.nn.LSTM(4, 4, batch_first=True)
            self.second = torch.nn.Sequential(self.first, self.norm)
            self.cache: list[Any] = []
            self.mask: Any = None

        def forward(self, ids: Any) -> Any:
            self.mask = torch.ones(4)
            self.cache.append(self.mask)
            rows = self.second(self.emb(ids)) * self.mask
            return last(self.lstm(rows[:, None])[0][:, 0])

    return Shared()


def unable(rows: Any) -> Any:
    raise ValueError("unable")


FATES = {
    "success": (lambda rows: rows.square().mean(), None),
    "no loss": (lambda rows: rows, "not a scalar loss"),
    "forward fails": (unable, "forward fails on the example inputs"),
    "fixed batch": (lambda rows: rows.view(6, 4).square().mean(), "fixes dimension 0 of input 'ids' at 6"),
    "no onnx form": (exponential, "ONNX has no form of aten.linalg_matrix_exp"),
    "refused kind": (complex_numbers, "torch.view_as_complex works on complex numbers"),
    "no derivative": (lambda rows: rows.detach().square().mean(), "depends on no trained parameter"),
}


@pytest.mark.parametrize("fate", FATES)
def test_the_module_is_left_as_it_was(torch: Any, fate: str) -> None:
    last, message = FATES[fate]
    module = shared(torch, last)
    ids = torch.arange(6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {part: dict(vars(part)) for part in module.modules()}
    parameters = dict(module.named_parameters())
    rng = torch.get_rng_state()
    if message is None:
        export_training_graph(module, (ids,))
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            export_training_graph(module, (ids,))
    assert torch.equal(rng, torch.get_rng_state())
    assert module.training
    assert (module.cache, module.mask) == ([], None)
    assert all(value.grad is None and value.requires_grad for value in module.parameters())
    assert all(type(value) is torch.nn.Parameter for value in module.parameters())
    assert all(parameters[name] is value for name, value in module.named_parameters())
    assert all(type(value) is torch.Tensor for value in module.buffers())
    assert attributes == {part: dict(vars(part)) for part in module.modules()}
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], value) for name, value in after.items())
    twin = shared(torch, last)
    twin.load_state_dict(before)
    if message is None:
        assert torch.equal(module(ids), twin(ids))


def test_file_holds_the_same_graph(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.onnx"
    model = export_training_graph(language_model(torch), batch(torch, 5), path, opset=18, loss_name="cost")
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.onnx"]
    written = onnx.load(path)
    assert written.opset_import[0].version == 18
    assert [output.name for output in written.graph.output] == [value.name for value in model.graph.outputs]
    assert written.graph.output[0].name == "cost"
    assert not any(node.metadata_props for node in written.graph.node)


def place(text: str, function: str) -> str:
    """Return how an error names the line of this file that holds `text`."""
    path = Path(__file__)
    lines = path.read_text().splitlines()
    number, line = next((i, line) for i, line in enumerate(lines, 1) if text in line and "place(" not in line)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}, line {number}, in {function}: {line.strip()}"


def failing(torch: Any, result: Any) -> Any:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)

        def forward(self, ids: Any) -> Any:
            return result(self.emb(ids))

    return Module()


WRAP = "\n  help: wrap it in a module whose forward takes inputs and labels and returns the mean loss"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda rows: rows, "Module.forward returns a tensor of shape [5, 4], not a scalar loss" + WRAP),
        (
            lambda rows: {"score": rows.sum()},
            "Module.forward returns a dict without an entry 'loss'\n"
            "  help: name the loss 'loss'; its entries are 'score'",
        ),
        (
            lambda rows: {"loss": None},
            "the entry 'loss' of what Module.forward returns is None\n"
            "  help: pass the labels too: models that compute their own loss do so when they get labels",
        ),
        (
            lambda rows: (rows, rows[0]),
            "Module.forward returns a tuple, not a scalar loss" + WRAP,
        ),
        (
            lambda rows: rows.detach().sum(),
            "the loss that Module.forward returns depends on no trained parameter\n"
            "  help: check requires_grad of the parameters, and that nothing detaches the loss",
        ),
        (
            lambda rows: rows[1000].sum(),
            "Module.forward fails on the example inputs\n"
            f"  --> {place('lambda rows: rows[1000]', '<lambda>')}\n"
            "  tried: IndexError: index 1000 is out of bounds for dimension 0 with size 5",
        ),
    ],
)
def test_a_module_without_a_loss_is_refused(torch: Any, result: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        export_training_graph(failing(torch, result), (torch.arange(5),))
    assert str(caught.value) == message


def test_a_row_norm_bound_is_refused(torch: Any) -> None:
    class Bounded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4, max_norm=0.1)

        def forward(self, ids: Any) -> Any:
            return self.emb(ids).square().mean()

    with pytest.raises(UserError) as caught:
        export_training_graph(Bounded(), (torch.arange(5),))
    assert str(caught.value) == (
        "forward changes the parameter 'emb.weight', which a training graph cannot hold\n"
        "  help: switch off max_norm of embeddings"
    )


def test_a_number_that_only_the_data_has_is_refused_by_line(torch: Any) -> None:
    class Cumulative(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.norm = torch.nn.BatchNorm1d(4, momentum=None)

        def forward(self, ids: Any) -> Any:
            return self.norm(self.emb(ids) + 1).square().mean()

    with pytest.raises(UserError) as caught:
        export_training_graph(Cumulative(), (torch.arange(5),))
    assert str(caught.value) == (
        "Cumulative.forward makes a Python number of a tensor, which a trace does not know\n"
        f"  --> {place('self.norm(self.emb(ids) + 1)', 'forward')}\n"
        "  help: keep it a tensor: no item(), float() or int() of it, no `if` on it, no shape by it"
    )


def test_a_tensor_that_is_no_buffer_may_not_change(torch: Any) -> None:
    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.count = torch.zeros(1)

        def forward(self, ids: Any) -> Any:
            self.count += 1
            return self.emb(ids).square().mean() / self.count

    with pytest.raises(UserError) as caught:
        export_training_graph(Counted(), (torch.arange(5),))
    assert str(caught.value) == (
        "forward changes the tensor 'count', which a training graph cannot hold\n"
        "  help: make it a buffer: buffers that forward changes are state of the training step"
    )


COMPLEX = "  help: keep real and imaginary parts as two tensors, and write their arithmetic out"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            complex_numbers,
            "torch.view_as_complex works on complex numbers, which ONNX graphs do not have\n"
            f"  --> {place('return torch.view_as_complex', 'complex_numbers')}\n" + COMPLEX,
        ),
        (
            sparse_product,
            "torch.Tensor.to_sparse works on sparse tensors, which ONNX graphs do not have\n"
            f"  --> {place('return torch.sparse.mm', 'sparse_product')}\n"
            "  help: keep rows, columns and values as tensors: index the rows, add them by index_add",
        ),
        (
            spectrum,
            "torch.fft.rfft works on complex numbers, which ONNX graphs do not have\n"
            f"  --> {place('return torch.fft.rfft', 'spectrum')}\n" + COMPLEX,
        ),
        (
            exponential,
            "PyTorch cannot export forward and backward of Module as one ONNX graph: "
            "ONNX has no form of aten.linalg_matrix_exp\n"
            f"  --> {place('return result(self.emb(ids))', 'forward')}\n"
            "  help: rewrite this operator by others",
        ),
    ],
)
def test_what_onnx_has_no_form_of_is_refused_by_name_and_line(torch: Any, result: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        export_training_graph(failing(torch, result), (torch.arange(5),))
    assert str(caught.value) == message


def edges(torch: Any) -> Any:
    class Edges(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(9, 4)
            self.first = self.second = torch.nn.Linear(4, 4)

        def forward(self, nodes: Any, edges: Any) -> Any:
            rows = self.second(self.emb(nodes))
            i, j = edges
            return (rows[i] * rows[j]).square().mean()

    return Edges()


def test_an_axis_that_the_module_fixes_is_named(torch: Any) -> None:
    inputs = torch.arange(5), torch.tensor([[0, 1, 2], [3, 3, 4]])
    with pytest.raises(UserError) as caught:
        export_training_graph(edges(torch), inputs)
    assert str(caught.value) == (
        "the module fixes dimension 0 of input 'edges' at 2, which was to stay free\n"
        "  help: dynamic_shapes={'edges': None} fixes it, {'edges': {1: torch.export.Dim.DYNAMIC}} frees "
        "another axis; or write the module for any size"
    )


def test_one_tensor_for_two_arguments_is_two_inputs(torch: Any) -> None:
    class Pairs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(30, 6)

        def forward(self, left: Any, right: Any) -> Any:
            return (self.emb(left) * self.emb(right)).square().mean()

    module = Pairs()
    same = torch.tensor([3, 4, 4])
    model = export_training_graph(module, (same, same))
    assert [value.name for value in model.graph.inputs] == ["left", "right"]
    check(model, module, ("left", "right"), (torch.tensor([1, 2]), torch.tensor([2, 9])))


def test_the_length_of_a_tensor_leaves_its_axis_free(torch: Any) -> None:
    class Lengths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(30, 6)
            self.start = torch.nn.Parameter(torch.randn(1, 6))

        def forward(self, ids: Any, labels: Any) -> Any:
            rows = torch.cat([self.start.expand(len(ids), 1, 6), self.emb(ids)], 1)
            scores = rows.mean(1).reshape(len(ids), len(self.start) * 6)
            return torch.nn.functional.cross_entropy(scores, labels % 6)

    module = Lengths()
    model = export_training_graph(module, batch(torch, 5))
    for size in (5, 11, 1):
        check(model, module, ("ids", "labels"), batch(torch, size))
    assert "len" not in globals()


def test_a_view_of_what_was_contiguous_when_it_was_traced(torch: Any) -> None:
    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = torch.nn.Embedding(30, 8)
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.out = torch.nn.Linear(24, 30)

        def forward(self, ids: Any, labels: Any) -> Any:
            rows = self.emb(ids)
            hidden, _ = self.attention(rows.transpose(0, 1), rows.transpose(0, 1), rows.transpose(0, 1))
            hidden = hidden.transpose(0, 1)
            hidden += rows
            return torch.nn.functional.cross_entropy(self.out(hidden.contiguous().view(-1, 24)), labels)

    module = Turned()
    model = export_training_graph(module, batch(torch, 5))
    for size in (5, 11, 1):
        check(model, module, ("ids", "labels"), batch(torch, size))


def test_dynamic_shapes_per_argument(torch: Any) -> None:
    module = edges(torch)
    inputs = {"nodes": torch.arange(5), "edges": torch.tensor([[0, 1, 2], [3, 3, 4]])}
    shapes = {"edges": {1: torch.export.Dim("count")}}
    model = export_training_graph(module, inputs, dynamic_shapes=shapes)
    assert [str(value.shape) for value in model.graph.inputs] == ["[batch]", "[2,count]"]
    others = torch.tensor([3, 0, 0, 8]), torch.tensor([[0], [2]])
    loss = module(*others)
    got = run(model, dict(zip(("nodes", "edges"), others, strict=True)))
    np.testing.assert_allclose(got["loss"], loss.detach(), rtol=TOLERANCE)


def test_bad_dynamic_shapes_are_refused(torch: Any) -> None:
    inputs = {"nodes": torch.arange(5), "edges": torch.tensor([[0, 1, 2], [3, 3, 4]])}

    def message(shapes: Any) -> str:
        with pytest.raises(UserError) as caught:
            export_training_graph(edges(torch), inputs, dynamic_shapes=shapes)
        return str(caught.value)

    assert message({"edge": None}) == (
        "dynamic_shapes names 'edge', which is no example input; did you mean 'edges'?\n"
        "  help: example inputs are 'nodes', 'edges'"
    )
    assert message((None,)) == "dynamic_shapes has 1 entries for 2 example inputs"
    assert message({"edges": {2: torch.export.Dim.DYNAMIC}}) == (
        "dynamic_shapes names axis 2 of 'edges', which has 2\n  help: axes are counted from 0"
    )
    assert message({"edges": "batch"}) == (
        "the entry of dynamic_shapes for 'edges' is no mapping of axes to dimensions\n"
        "  help: such as {0: torch.export.Dim.DYNAMIC}, or None where all dimensions are fixed"
    )


@pytest.mark.parametrize("padding", [None, 3], ids=["all", "padding"])
@pytest.mark.parametrize("flat", [True, False], ids=["offsets", "matrix"])
def test_max_bags_are_those_of_torch(torch: Any, flat: bool, padding: int | None) -> None:
    from kfac_onnx.torch.embeddings import embedding_bag

    torch.manual_seed(1)
    table = torch.randn(12, 4).round().requires_grad_()  # rounded, so that rows tie
    ids = torch.randint(0, 12, (9,))
    ids[2] = 3
    places = (ids, table, torch.tensor([0, 3, 3, 7])) if flat else (ids.reshape(3, 3), table)
    ours = embedding_bag(*places, mode="max", padding_idx=padding)
    theirs = torch.nn.functional.embedding_bag(*places, mode="max", padding_idx=padding)
    np.testing.assert_array_equal(ours.detach(), theirs.detach())
    above = torch.randn_like(ours)
    gradients = [torch.autograd.grad(value, table, above)[0] for value in (ours, theirs)]
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize("padding", [None, 3], ids=["all", "padding"])
def test_max_bags_over_offsets_train_as_torch_trains_them(torch: Any, padding: int | None) -> None:
    class Bags(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = torch.nn.EmbeddingBag(12, 4, mode="max", padding_idx=padding)
            self.out = torch.nn.Linear(4, 3)

        def forward(self, ids: Any, offsets: Any, labels: Any) -> Any:
            return torch.nn.functional.cross_entropy(self.out(self.bag(ids, offsets)), labels)

    torch.manual_seed(0)
    module = Bags()
    inputs = (torch.tensor([1, 3, 3, 5, 1, 0, 11, 7]), torch.tensor([0, 3, 5]), torch.tensor([0, 2, 1]))
    graph = export_training_graph(module, inputs)
    assert [site.parameter for site in kx.scan(graph).sites] == ["bag.weight"]
    step = kx.transform(graph, preset="plain-sgd", lr=0.5, rest="sgd", rest_lr=0.5)
    values = {name: value.detach().numpy().copy() for name, value in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    with kx.TrainingSession(step, parameters=values) as session:
        names = [item.name for item in session.batch_inputs]
        for _ in range(20):
            loss = module(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ours = session.step({name: value.numpy() for name, value in zip(names, inputs, strict=True)})
            np.testing.assert_allclose(ours["loss"], loss.item(), rtol=1e-5)  # float32, 20 steps
        for name, value in module.named_parameters():
            np.testing.assert_allclose(session.parameters[name], value.detach(), atol=1e-5)


def test_max_norm_is_refused_by_name(torch: Any) -> None:
    class Norms(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(12, 4, max_norm=1.0)

        def forward(self, ids: Any) -> Any:
            return self.table(ids).square().mean()

    with pytest.raises(UserError) as caught:
        export_training_graph(Norms(), (torch.arange(5),))
    assert str(caught.value) == (
        "forward changes the parameter 'table.weight', which a training graph cannot hold\n"
        "  help: switch off max_norm of embeddings"
    )


def test_bad_arguments_are_refused(torch: Any, tmp_path: Path) -> None:
    module = language_model(torch)
    ids, labels = batch(torch, 5)

    def message(*arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            export_training_graph(module, *arguments, **options)
        return str(caught.value)

    assert message((ids[:1], labels[:1])) == (
        "example input 0 has 1 along its first dimension, which would fix the batch\n"
        "  help: pass two examples or more, or dynamic_batch=False"
    )
    assert message((ids, 3)) == (
        "example input 1 is of type int, not a tensor\n"
        "  help: pass tensors, and let the module hold whatever is constant"
    )
    assert message((ids, labels[0])) == (
        "example input 1 is a scalar, which has no batch dimension\n"
        "  help: give it a first dimension, or pass dynamic_batch=False"
    )
    assert message((ids, labels), input_names=["x"]) == "there are 1 input_names for 2 example inputs"
    assert message((ids, labels), input_names=["x", "loss"]) == (
        "'loss' would name two things in the graph\n"
        "  help: pass input_names and loss_name that differ from each other and from all parameters"
    )
    assert message((ids, labels), parameters_as="files") == (
        "parameters_as must be 'initializers' or 'inputs', not 'files'"
    )
    absent = tmp_path / "absent" / "train.onnx"
    assert message((ids, labels), absent).startswith(f"the training graph cannot be written to {absent}")


def test_without_pytorch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("joint", "embeddings"):
        monkeypatch.delitem(sys.modules, f"kfac_onnx.torch.{name}", raising=False)
        monkeypatch.delattr(kfac_onnx.torch, name, raising=False)
    with pytest.raises(UserError) as caught:
        export_training_graph(object(), ())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "exporting a training graph from a PyTorch module needs PyTorch 2.9 or newer\n"
        "  tried: import torch: import of torch halted; None in sys.modules\n"
        "  help: pip install 'kfac-onnx[torch]'"
    )
