"""Write `cases.json` and `cases.npz`: operators with inputs, and the results that PyTorch's autograd gives.

Needs PyTorch (CPU); the tests need only the two files. A case is an operator with its attributes, its inputs
(null where left out; `constant` lists those that are initializers) and its expected outputs (null where
not compared; with `shaped` the graph says their shapes). Arrays are stored under `<case>/x<i>` and `<case>/y<i>`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

HERE = Path(__file__).parent
torch.manual_seed(0)
rng = np.random.default_rng(0)
cases: list[dict[str, object]] = []
arrays: dict[str, np.ndarray] = {}


def case(name, op, inputs, outputs, constant=(), domain="com.microsoft", shaped=False, **attributes):
    if any(entry["name"] == name for entry in cases):
        raise ValueError(f"two cases are called {name}")
    for kind, values in (("x", inputs), ("y", outputs)):
        for index, value in enumerate(values):
            if value is not None:
                array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
                arrays[f"{name}/{kind}{index}"] = array
    cases.append(
        {
            "name": name,
            "op": op,
            "domain": domain,
            "attributes": attributes,
            "inputs": [value is not None for value in inputs],
            "outputs": [value is not None for value in outputs],
            "constant": list(constant),
            **({"shaped": True} if shaped else {}),
        }
    )


def normal(*shape, dtype=torch.float32):
    return torch.tensor(rng.standard_normal(shape)).to(dtype).requires_grad_()


def backward(output, *inputs):
    """Return a random dL/d(output) and the gradients of the inputs."""
    upstream = torch.tensor(rng.standard_normal(tuple(output.shape))).to(output.dtype)
    return upstream, *torch.autograd.grad(output, inputs, upstream)


def row_selection():
    table = normal(7, 3)
    ids = torch.tensor([[0, 6, 6], [2, 2, 2]])
    dy, grad = backward(table[ids], table)
    shape = np.array(table.shape)
    case("gather_rows", "GatherGrad", [shape, ids, dy], [grad], constant=[0])
    case("gather_rows_runtime_shape", "GatherGrad", [shape, ids, dy], [grad], axis=0)
    case("gather_rows_int32", "GatherGrad", [shape, ids.int(), dy], [grad], constant=[0])
    negative = torch.tensor([[-7, -1, 6], [2, -5, 2]])
    case("gather_rows_negative", "GatherGrad", [shape, negative, dy], [grad], constant=[0])
    for dtype in (torch.float16, torch.float64):
        wide = table.detach().to(dtype).requires_grad_()
        dy, grad = backward(wide[ids], wide)
        case(f"gather_rows_{str(dtype)[6:]}", "GatherGrad", [shape, ids, dy], [grad], constant=[0])
    one = torch.tensor(4)
    dy, grad = backward(table[one], table)
    case("gather_one_row", "GatherGrad", [shape, one, dy], [grad])
    columns = torch.tensor([2, 0, 2, 2])
    dy, grad = backward(table[:, columns], table)
    case("gather_columns", "GatherGrad", [shape, columns, dy], [grad], constant=[0], axis=1)
    case("gather_columns_runtime_shape", "GatherGrad", [shape, columns, dy], [grad], axis=1)
    case("gather_last_axis", "GatherGrad", [shape, columns, dy], [grad], axis=-1)
    cube = normal(2, 5, 3)
    middle = torch.tensor([[1, 1], [4, 1]])
    dy, grad = backward(cube[:, middle], cube)
    case("gather_middle_axis", "GatherGrad", [np.array(cube.shape), middle, dy], [grad], constant=[0], axis=1)
    case("gather_middle_axis_runtime_shape", "GatherGrad", [np.array(cube.shape), middle, dy], [grad], axis=1)

    rows = torch.tensor([[0], [6], [6], [-1]])
    dy, grad = backward(table[rows[:, 0]], table)
    case("gather_nd_rows", "GatherNDGrad", [shape, rows, dy], [grad], constant=[0])
    case("gather_nd_rows_runtime_shape", "GatherNDGrad", [shape, rows, dy], [grad], batch_dims=0)
    places = torch.tensor([[0, 1], [1, 4], [0, 1], [1, -1]])
    dy, grad = backward(cube[places[:, 0], places[:, 1]], cube)
    case("gather_nd_two_columns", "GatherNDGrad", [np.array(cube.shape), places, dy], [grad], constant=[0])
    case("gather_nd_two_columns_runtime_shape", "GatherNDGrad", [np.array(cube.shape), places, dy], [grad])

    index = torch.tensor([[0, 2, 2], [0, 6, 2]])
    dy, grad = backward(torch.gather(table, 0, index), table)
    case("gather_elements", "GatherElementsGrad", [dy, shape, index], [grad], constant=[1])
    index = torch.tensor([[0, 0], [2, 1], [1, 1], [0, 2], [2, 2], [0, 1], [1, 0]])
    dy, grad = backward(torch.gather(table, 1, index), table)
    case("gather_elements_columns", "GatherElementsGrad", [dy, shape, index], [grad], axis=1)

    def embedding(padding):
        dy, grad = backward(functional.embedding(ids, table, padding_idx=padding), table)
        pad = np.array(-1 if padding is None else padding)
        off = np.array(False)
        inputs = [dy, ids, np.array(7), pad, off, off]
        name = "aten_embedding_backward" + ("" if padding is None else "_padding")
        case(
            name, "ATen", inputs, [grad], [3, 4, 5], domain="org.pytorch.aten", operator="embedding_backward"
        )

    embedding(None)
    embedding(2)
    looked_up = [table, ids, np.array(-1), np.array(False), np.array(False)]
    case(
        "aten_embedding",
        "ATen",
        looked_up,
        [table[ids]],
        [2],
        domain="org.pytorch.aten",
        operator="embedding",
    )


def slices():
    x = normal(5, 4)
    shape = np.array(x.shape)

    def one(name, view, starts, ends, axes, steps, **options):
        dy, grad = backward(view, x)
        vectors = [None if item is None else np.array(item) for item in (starts, ends, axes, steps)]
        inputs = [dy, shape, *vectors]
        case(name, "SliceGrad", inputs, [grad], [2, 3, 4, 5], **options)
        case(name + "_runtime", "SliceGrad", inputs, [grad], **options)

    one("slice_start", x[:3], [0], [3], [0], [1])
    one("slice_middle", x[1:3], [1], [3], [0], [1])
    one("slice_to_the_end", x[2:], [2], [np.iinfo(np.int64).max], [0], [1])
    one("slice_negative", x[-4:-1], [-4], [-1], [0], [1])
    one("slice_beyond", x[-4:], [-4], [100], [-2], [1])
    one("slice_two_axes", x[1:, :3], [1, 0], [5, 3], [0, 1], [1, 1])
    one("slice_all_defaults", x[1:4, 2:3], [1, 2], [4, 3], None, None)
    one("slice_step", x[::2], [0], [5], [0], [2])
    one("slice_backwards", torch.flip(x, (0,))[::3], [-1], [-100], [0], [-3])


def activations():
    x = normal(3, 5)

    def one(name, op, function, saves, extra=(), **attributes):
        y = function(x)
        dy, grad = backward(y, x)
        case(name, op, [dy, y if saves == "output" else x, *extra], [grad], **attributes)

    one("tanh", "TanhGrad", torch.tanh, "output")
    one("sigmoid", "SigmoidGrad", torch.sigmoid, "output")
    one("relu", "ReluGrad", torch.relu, "output")
    one("leaky_relu", "LeakyReluGrad", lambda v: functional.leaky_relu(v, 0.2), "output", alpha=0.2)
    one("gelu", "GeluGrad", functional.gelu, "input")
    one("fast_gelu", "FastGeluGrad", lambda v: functional.gelu(v, approximate="tanh"), "input")
    one("quick_gelu", "QuickGeluGrad", lambda v: v * torch.sigmoid(1.702 * v), "input")
    one("quick_gelu_alpha", "QuickGeluGrad", lambda v: v * torch.sigmoid(1.25 * v), "input", alpha=1.25)
    bias = torch.tensor(rng.standard_normal(5)).float()
    one("bias_gelu", "BiasGeluGrad_dX", lambda v: functional.gelu(v + bias), "input", [bias])
    one(
        "bias_fast_gelu",
        "BiasFastGeluGrad_dX",
        lambda v: functional.gelu(v + bias, approximate="tanh"),
        "input",
        [bias],
    )
    half = x.detach().half().requires_grad_()
    y = torch.tanh(half)
    dy, grad = backward(y, half)
    case("tanh_float16", "TanhGrad", [dy, y], [grad])

    cube = normal(2, 3, 4)
    for axis in (1, -1):
        for name, function in (("SoftmaxGrad_13", torch.softmax), ("LogSoftmaxGrad_13", torch.log_softmax)):
            y = function(cube, axis)
            dy, grad = backward(y, cube)
            case(f"{name}_axis_{axis}", name, [dy, y], [grad], axis=axis)
    for name, function in (("SoftmaxGrad", torch.softmax), ("LogSoftmaxGrad", torch.log_softmax)):
        y = function(cube.reshape(2, 12), 1).reshape(2, 3, 4)  # before opset 13: one softmax per matrix row
        dy, grad = backward(y, cube)
        case(f"{name}_before_13", name, [dy, y], [grad], axis=1)


def normalization():
    def one(name, x, dims, axis):
        scale, bias = (normal(*x.shape[-dims:], dtype=x.dtype) for _ in range(2))
        along = tuple(range(-dims, 0))
        mean = x.float().mean(along, keepdim=True)
        invstd = torch.rsqrt(x.float().var(along, unbiased=False, keepdim=True) + 1e-5)
        y = functional.layer_norm(x, x.shape[-dims:], scale, bias, 1e-5)
        dy, *grads = backward(y, x, scale, bias)
        case(name, "LayerNormalizationGrad", [dy, x, scale, mean, invstd], grads, axis=axis)

    one("layer_norm", normal(2, 3, 6), 1, -1)
    one("layer_norm_two_axes", normal(2, 3, 6), 2, 1)
    one("layer_norm_float16", normal(4, 6, dtype=torch.float16), 1, -1)
    x, scale = normal(2, 3, 6), normal(6)
    invstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    dy, dx, dscale = backward(x * invstd * scale, x, scale)
    case("rms_norm", "SimplifiedLayerNormalizationGrad", [dy, x, scale, invstd], [dx, dscale], axis=-1)


def cross_entropy():
    def one(name, scores, label, *, reduction, ignore=None, weight=None, op="SoftmaxCrossEntropyLossGrad"):
        log_prob = torch.log_softmax(scores, 1)
        loss = functional.nll_loss(
            log_prob,
            label.long(),
            weight,
            ignore_index=-1000 if ignore is None else ignore,
            reduction=reduction,
        )
        dl, grad = backward(loss, scores)
        inputs = [dl, log_prob, label]
        if op.endswith("InternalGrad"):
            case(
                name,
                op,
                [*inputs, weight, None if ignore is None else np.array(ignore)],
                [grad],
                [4],
                reduction=reduction,
            )
            return
        attributes = {} if ignore is None else {"ignore_index": ignore}
        case(
            name,
            op,
            inputs if weight is None else [*inputs, weight],
            [grad],
            reduction=reduction,
            **attributes,
        )

    scores, label = normal(5, 7), torch.tensor([0, 6, 3, 3, 1])
    weight = torch.tensor(rng.random(7) + 0.5).float()
    for reduction in ("mean", "sum", "none"):
        one(f"cross_entropy_{reduction}", scores, label, reduction=reduction)
        one(f"cross_entropy_{reduction}_ignore", scores, label, reduction=reduction, ignore=3)
        one(f"cross_entropy_{reduction}_weight", scores, label, reduction=reduction, weight=weight)
        one(f"cross_entropy_{reduction}_both", scores, label, reduction=reduction, ignore=3, weight=weight)
    one("cross_entropy_int32", scores, label.int(), reduction="mean")
    one("cross_entropy_outside", scores, torch.tensor([0, -100, 3, -100, 1]), reduction="mean", ignore=-100)
    one(
        "cross_entropy_sequence",
        normal(2, 4, 3),
        torch.tensor([[0, 3, 2], [3, 1, 1]]),
        reduction="mean",
        ignore=3,
    )
    one(
        "cross_entropy_internal",
        scores,
        label,
        reduction="mean",
        ignore=3,
        op="SoftmaxCrossEntropyLossInternalGrad",
    )
    # Every label ignored: the mean is 0/0, but no score has any influence.
    log_prob = torch.log_softmax(scores, 1)
    case(
        "cross_entropy_all_ignored",
        "SoftmaxCrossEntropyLossGrad",
        [np.float32(1), log_prob, torch.full((5,), 3)],
        [torch.zeros(5, 7)],
        reduction="mean",
        ignore_index=3,
    )
    for reduction in ("mean", "sum"):
        loss = functional.cross_entropy(scores, label, ignore_index=3, reduction=reduction)
        case(
            f"cross_entropy_internal_loss_{reduction}",
            "SoftmaxCrossEntropyLossInternal",
            [scores, label, None, np.array(3)],
            [loss, log_prob],
            [3],
            reduction=reduction,
        )


def plumbing():
    a, b = normal(2, 3), normal(4, 3)
    case("concat", "ConcatTraining", [a, b], [torch.cat([a, b]), np.array([2, 4])], axis=0)
    case("concat_first_only", "ConcatTraining", [a, b], [torch.cat([a, b])], axis=0)
    pieces = torch.split(b, [1, 3])
    case("split", "SplitTraining", [b, np.array([1, 3])], list(pieces), [1], axis=0)
    case("split_runtime", "SplitTraining", [b, np.array([1, 3])], list(pieces), axis=0)
    case("scale_down", "Scale", [a, np.array(4)], [a / 4], scale_down=1)
    case("scale_up", "Scale", [a, np.array([3.0], np.float32)], [a * 3])
    mask = torch.tensor(rng.random((2, 3)) > 0.4)
    dy, grad = backward(a * mask / 0.7, a)
    ratio, on, off = np.float32(0.3), np.array(True), np.array(False)
    case("dropout", "DropoutGrad", [dy, mask, ratio, on], [grad], [2, 3])
    case("dropout_runtime", "DropoutGrad", [dy, mask, ratio, on], [grad])
    case("dropout_default_ratio", "DropoutGrad", [dy, mask], [dy * mask * 2])
    case("dropout_off", "DropoutGrad", [dy, torch.ones(2, 3, dtype=torch.bool), ratio, off], [dy], [2, 3])
    case("dropout_off_runtime", "DropoutGrad", [dy, torch.ones(2, 3, dtype=torch.bool), ratio, off], [dy])
    cube = normal(2, 3, 4)
    case("reduce_sum", "ReduceSumTraining", [cube, np.array([1])], [cube.sum(1)], [1], keepdims=0)
    # Axes over which autograd sums the gradient of each operand of a broadcast sum.
    for name, left, right, axes in (
        ("same", (2, 3), (2, 3), ([], [])),
        ("ones", (2, 1, 4), (1, 3, 4), ([1], [0])),
        ("missing", (3,), (2, 3), ([0], [])),
        ("both", (5, 1), (2, 1, 4), ([0, 2], [1])),
    ):
        case(
            f"broadcast_{name}",
            "BroadcastGradientArgs",
            [np.array(left), np.array(right)],
            [np.array(item, np.int64) for item in axes],
        )


def recurrent():
    steps, batch, width, hidden = 4, 3, 2, 5

    def order(weight, gates):
        """From torch's gate order to ONNX's, along the first axis."""
        parts = torch.chunk(weight, len(gates))
        return torch.cat([parts[index] for index in gates])

    def one(kind, gates, cell, with_bias, with_state, with_last):
        layer = cell(width, hidden, bias=with_bias)
        x = normal(steps, batch, width)
        h0 = normal(1, batch, hidden)
        c0 = normal(1, batch, hidden)
        state = ((h0, c0) if kind == "LSTM" else h0) if with_state else None
        y, last = layer(x, state)
        lasts = list(last) if kind == "LSTM" else [last]
        outputs = [y, *lasts] if with_last else [y]
        upstream = [torch.randn_like(item) for item in outputs]
        weights = list(layer.parameters())
        starts = ([h0, c0] if kind == "LSTM" else [h0]) if with_state else []
        grads = torch.autograd.grad(outputs, [x, *weights, *starts], upstream)
        dx, dw, dr = grads[:3]
        dbias = torch.cat([order(item, gates) for item in grads[3:5]])[None] if with_bias else None
        dstarts = list(grads[len(weights) + 1 :])
        w, r = (order(item, gates)[None] for item in weights[:2])
        bias = torch.cat([order(item, gates) for item in weights[2:4]])[None] if with_bias else None
        marks = {"_no_bias": not with_bias, "_no_state": not with_state, "_last": with_last}
        name = kind.lower() + "".join(mark for mark, holds in marks.items() if holds)
        first = [x, w, r, bias, None, *(([h0, c0] if kind == "LSTM" else [h0]) if with_state else [])]
        case(name, f"{kind}Training", first, [y[:, None], *lasts], hidden_size=hidden, **linear(kind))
        saved = _saved(
            kind, gates, x, weights, h0 if with_state else None, c0 if with_state else None, hidden
        )
        state_inputs = (
            ([h0, c0] if kind == "LSTM" else [h0]) if with_state else [None] * (2 if kind == "LSTM" else 1)
        )
        above = [upstream[0][:, None], *(upstream[1:] if with_last else [None] * len(lasts))]
        middle = [None] if kind == "LSTM" else [bias, None]
        inputs = [x, w, r, *middle, *state_inputs, y[:, None], *saved, *above]
        expected = [dx, order(dw, gates)[None], order(dr, gates)[None], dbias, *dstarts]
        case(f"{name}_grad", f"{kind}Grad", inputs, expected, hidden_size=hidden, **linear(kind))

    def linear(kind):
        return {"linear_before_reset": 1} if kind == "GRU" else {}

    for kind, gates, cell in (("LSTM", (0, 3, 1, 2), torch.nn.LSTM), ("GRU", (1, 0, 2), torch.nn.GRU)):
        one(kind, gates, cell, True, True, True)
        one(kind, gates, cell, True, True, False)
        one(kind, gates, cell, False, False, False)


def _saved(kind, gates, x, weights, h, c, hidden):
    """Run the recurrence in the open; return what the operators save: cell states (LSTM), gates."""
    w, r = weights[:2]
    b, d = weights[2:4] if len(weights) == 4 else (torch.zeros(w.shape[0]), torch.zeros(w.shape[0]))
    h = torch.zeros(x.shape[1], hidden) if h is None else h[0]
    c = torch.zeros(x.shape[1], hidden) if c is None else c[0]
    cells, saved = [], []
    for now in x:
        ax, ah = now @ w.T + b, h @ r.T + d
        if kind == "LSTM":
            i, f, g, o = torch.chunk(ax + ah, 4, 1)
            i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
            c = f * c + i * g
            h = o * torch.tanh(c)
            cells.append(c)
            saved.append(torch.cat([i, o, f, g], 1))
        else:
            (rx, zx, nx), (rh, zh, nh) = torch.chunk(ax, 3, 1), torch.chunk(ah, 3, 1)
            reset, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
            n = torch.tanh(nx + reset * nh)
            h = (1 - z) * n + z * h
            saved.append(torch.cat([z, reset, n], 1))
    stacked = [torch.stack(saved)[:, None]]
    return [torch.stack(cells)[:, None], *stacked] if kind == "LSTM" else stacked


def division():
    for name, left, right in (
        ("same", (2, 3), (2, 3)),
        ("ones", (2, 1, 4), (1, 3, 4)),
        ("missing", (3,), (2, 3)),
        ("scalar", (2, 3), ()),
    ):
        a = normal(*left)
        b = (torch.tensor(rng.random(right) + 0.5).float()).requires_grad_()
        dy, *grads = backward(a / b, a, b)
        case(f"div_{name}", "DivGrad", [dy, a, b], grads)
    a, b = normal(2, 3, dtype=torch.float16), (1 + torch.tensor(rng.random((2, 1)))).half().requires_grad_()
    dy, *grads = backward(a / b, a, b)
    case("div_float16", "DivGrad", [dy, a, b], grads)


def convolution():
    def one(name, x, weight, **options):
        bias = normal(weight.shape[0], dtype=x.dtype)
        convolve = functional.conv1d if x.ndim == 3 else functional.conv2d
        dy, *grads = backward(convolve(x, weight, bias, **options), x, weight, bias)
        spatial = x.ndim - 2
        attributes = {
            "kernel_shape": list(weight.shape[2:]),
            "strides": [options.get("stride", 1)] * spatial,
            "dilations": [options.get("dilation", 1)] * spatial,
            "pads": [options.get("padding", 0)] * 2 * spatial,
            "group": options.get("groups", 1),
        }
        case(name, "ConvGrad", [dy, x, weight], grads, **attributes)

    one("conv", normal(3, 4, 6), normal(5, 4, 3), padding=1)
    one("conv_strided", normal(3, 4, 8), normal(5, 4, 3), stride=3, padding=1)
    one("conv_left_over", normal(2, 4, 9), normal(2, 4, 2), stride=3, dilation=2)
    one("conv_groups", normal(2, 4, 7), normal(6, 2, 3), groups=2, padding=2, dilation=2)
    one("conv_plane", normal(2, 3, 5, 6), normal(4, 3, 3, 3), stride=2, padding=1)
    x, weight = normal(3, 2, 5), normal(4, 2, 2)
    dy, *grads = backward(functional.conv1d(x, weight), x, weight)
    case("conv_bare", "ConvGrad", [dy, x, weight], grads)


def pooling():
    x = normal(2, 3, 8)
    for name, options in (("", {"stride": 2}), ("_overlapping", {"stride": 1, "padding": 1})):
        y, index = functional.max_pool1d(x, 3, return_indices=True, **options)
        dy, grad = backward(y, x)
        whole = index + 8 * torch.arange(6).reshape(2, 3, 1)  # torch counts inside each channel
        case(f"max_pool{name}", "MaxPoolGrad", [dy, whole], [grad], domain="", shaped=True)
    for name, length, options in (
        ("", 8, {"stride": 2}),
        ("_left_over", 9, {"stride": 4}),
        ("_padded", 8, {"stride": 2, "padding": 1}),
        ("_without_padding", 8, {"stride": 2, "padding": 1, "count_include_pad": False}),
    ):
        x = normal(2, 3, length)
        dy, grad = backward(functional.avg_pool1d(x, 3, **options), x)
        case(
            f"average_pool{name}",
            "AveragePoolGrad",
            [dy],
            [grad],
            domain="",
            shaped=True,
            kernel_shape=[3],
            strides=[options["stride"]],
            pads=[options.get("padding", 0)] * 2,
            count_include_pad=int(options.get("count_include_pad", True)),
        )


def batch_norm():
    for name, x in (("", normal(6, 4)), ("_sequence", normal(3, 4, 5))):
        scale, bias = normal(4), normal(4)
        mean, variance = torch.tensor(rng.standard_normal(4)).float(), torch.tensor(rng.random(4)).float()
        y = functional.batch_norm(x, None, None, scale, bias, training=True, eps=1e-4)
        over = tuple(axis for axis in range(x.ndim) if axis != 1)
        batch, spread = x.mean(over), x.var(over, unbiased=False)
        invstd = torch.rsqrt(spread + 1e-4)
        results = [y, 0.8 * mean + 0.2 * batch, 0.8 * variance + 0.2 * spread, batch, invstd]
        inputs = [x, scale, bias, mean, variance]
        case(f"batch_norm{name}", "BatchNormInternal", inputs, results, epsilon=1e-4, momentum=0.8)
        dy, *grads = backward(y, x, scale, bias)
        case(f"batch_norm{name}_grad", "BatchNormalizationGrad", [dy, x, scale, batch, invstd], grads)


def directions():
    """The recurrent operators with time running backwards, and in both directions at once."""
    steps, batch, width, hidden = 4, 3, 2, 5
    for kind, gates, cell in (("LSTM", (0, 3, 1, 2), torch.nn.LSTM), ("GRU", (1, 0, 2), torch.nn.GRU)):
        for which, flips in (("reverse", (True,)), ("bidirectional", (False, True))):
            x = normal(steps, batch, width)
            starts = [normal(len(flips), batch, hidden) for _ in range(2 if kind == "LSTM" else 1)]
            layers = [cell(width, hidden) for _ in flips]
            every, lasts, saved = [], [], []
            for index, (layer, flip) in enumerate(zip(layers, flips, strict=True)):
                own = [start[index : index + 1] for start in starts]
                entering = x.flip(0) if flip else x
                y, last = layer(entering, tuple(own) if kind == "LSTM" else own[0])
                every.append(y.flip(0) if flip else y)
                lasts.append(last if kind == "LSTM" else (last,))
                state = [*own, None][:2]
                kept = _saved(kind, gates, entering, list(layer.parameters()), *state, hidden)
                saved.append([item.flip(0) if flip else item for item in kept])
            y = torch.stack(every, 1)
            ends = [torch.cat(items) for items in zip(*lasts, strict=True)]
            kept = [torch.cat(items, 1) for items in zip(*saved, strict=True)]
            weights = [list(layer.parameters()) for layer in layers]
            upstream = [torch.tensor(rng.standard_normal(item.shape)).float() for item in (y, *ends)]
            wanted = [x, *starts, *(weight for group in weights for weight in group)]
            dx, *rest = torch.autograd.grad([y, *ends], wanted, upstream)
            dstarts, flat = rest[: len(starts)], rest[len(starts) :]
            own, slopes = (_stored(gates, items) for items in (weights, torch_groups(flat, 4)))
            w, r, bias = own
            name = f"{kind.lower()}_{which}"
            options = {"hidden_size": hidden, "direction": which}
            if kind == "GRU":
                options["linear_before_reset"] = 1
            case(name, f"{kind}Training", [x, w, r, bias, None, *starts], [y, *ends], **options)
            middle = [None] if kind == "LSTM" else [bias, None]
            inputs = [x, w, r, *middle, *starts, y, *kept, *upstream]
            case(f"{name}_grad", f"{kind}Grad", inputs, [dx, *slopes, *dstarts], **options)


def torch_groups(items, size):
    return [items[at : at + size] for at in range(0, len(items), size)]


def _stored(gates, groups):
    """Return W, R and bias as ONNX stores them, directions first, from torch's four tensors of each."""

    def order(weight):
        parts = torch.chunk(weight, len(gates))
        return torch.cat([parts[index] for index in gates])

    stacked = [torch.stack([order(group[place]) for group in groups]) for place in range(4)]
    return stacked[0], stacked[1], torch.cat(stacked[2:], 1)


for group in (
    row_selection,
    slices,
    activations,
    normalization,
    cross_entropy,
    plumbing,
    recurrent,
    division,
    convolution,
    pooling,
    batch_norm,
    directions,
):
    group()
(HERE / "cases.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in cases) + "\n]\n")
np.savez_compressed(HERE / "cases.npz", **arrays)
