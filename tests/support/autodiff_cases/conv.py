"""Cases of convolution and pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from autodiff_cases import Case, floats


def conv(name: str, attributes: str, torch: str, x: tuple[int, ...], w: tuple[int, ...], **more: Any) -> Case:
    """Return a convolution with a bias; `torch` are the arguments after weight and bias."""
    given = f"<{attributes}>" if attributes else ""
    dims = len(x) - 2
    return Case(
        f"conv_{name}",
        f"z = Conv{given}(x, w, b)",
        f"F.conv{dims}d({more.pop('padded', 'x')}, w, b, {torch})",
        {"x": floats(*x), "w": floats(*w), "b": floats(w[0])},
        static=("w", "b"),
        **more,
    )


def transposed(
    name: str, attributes: str, torch: str, x: tuple[int, ...], w: tuple[int, ...], group: int = 1
) -> Case:
    """Return a transposed convolution with a bias."""
    given = f"<{attributes}>" if attributes else ""
    return Case(
        f"conv_transpose_{name}",
        f"z = ConvTranspose{given}(x, w, b)",
        f"F.conv_transpose{len(x) - 2}d(x, w, b, {torch})",
        {"x": floats(*x), "w": floats(*w), "b": floats(w[1] * group)},
        static=("w", "b"),
        symbolic="output_shape" not in attributes and "SAME" not in attributes,
    )


def pool(name: str, op: str, torch: str, x: tuple[int, ...] = (2, 3, 7, 6), **more: Any) -> Case:
    return Case(name, f"z = {op}(x)", torch, {"x": floats(*x)}, **more)


CASES = [
    conv("line", "", "", (2, 3, 8), (4, 3, 3)),
    conv("one", "pads = [1, 1]", "padding=1", (1, 2, 5), (1, 2, 3)),
    conv("stride", "strides = [2], pads = [1, 1]", "stride=2, padding=1", (2, 3, 9), (4, 3, 3)),
    conv("stride_left_over", "strides = [3]", "stride=3", (2, 3, 10), (4, 3, 2)),
    conv("dilated", "dilations = [2], pads = [2, 2]", "dilation=2, padding=2", (2, 3, 9), (4, 3, 3)),
    conv("kernel_of_one", "", "", (2, 3, 4, 4), (5, 3, 1, 1)),
    conv("groups", "group = 2, pads = [1, 1]", "groups=2, padding=1", (2, 4, 6), (6, 2, 3)),
    conv(
        "depthwise",
        "group = 3, strides = [2, 1], pads = [1, 0, 1, 0]",
        "groups=3, stride=(2, 1), padding=(1, 0)",
        (2, 3, 6, 5),
        (3, 1, 3, 2),
    ),
    conv(
        "plane",
        "strides = [2, 1], dilations = [1, 2], pads = [1, 2, 1, 2]",
        "stride=(2, 1), dilation=(1, 2), padding=(1, 2)",
        (2, 3, 6, 7),
        (4, 3, 3, 2),
    ),
    conv(
        "uneven_pads", "pads = [0, 1, 2, 3]", "", (2, 2, 4, 5), (3, 2, 3, 3), padded="F.pad(x, (1, 3, 0, 2))"
    ),
    conv(
        "volume",
        "strides = [1, 2, 1], pads = [1, 0, 0, 1, 0, 0]",
        "stride=(1, 2, 1), padding=(1, 0, 0)",
        (1, 2, 3, 5, 4),
        (3, 2, 2, 3, 2),
    ),
    conv("valid", 'auto_pad = "VALID", strides = [2]', "stride=2", (2, 3, 8), (4, 3, 3)),
    conv(
        "same_upper",
        'auto_pad = "SAME_UPPER", strides = [2, 1]',
        "stride=(2, 1)",
        (2, 3, 6, 5),
        (4, 3, 3, 2),
        padded="F.pad(x, (0, 1, 0, 1))",
        symbolic=False,
    ),
    conv(
        "same_lower",
        'auto_pad = "SAME_LOWER"',
        "",
        (2, 3, 6),
        (4, 3, 4),
        padded="F.pad(x, (2, 1))",
        symbolic=False,
    ),
    Case(
        "conv_without_bias",
        "z = Conv<kernel_shape = [3]>(x, w)",
        "F.conv1d(x, w)",
        {"x": floats(2, 3, 8), "w": floats(4, 3, 3)},
    ),
    Case(
        "conv_of_constant_kernel",
        "z = Conv(x, w)",
        "F.conv1d(x, w)",
        {"x": floats(2, 2, 5)},
        {"w": np.ones((1, 2, 3), np.float32)},
    ),
    transposed("line", "", "", (2, 3, 5), (3, 4, 3)),
    transposed("stride", "strides = [2], pads = [1, 1]", "stride=2, padding=1", (2, 3, 5), (3, 4, 3)),
    transposed(
        "output_padding",
        "strides = [3, 2], pads = [1, 0, 1, 0], output_padding = [2, 1]",
        "stride=(3, 2), padding=(1, 0), output_padding=(2, 1)",
        (2, 3, 4, 3),
        (3, 2, 3, 2),
    ),
    transposed("groups", "group = 2, dilations = [2]", "groups=2, dilation=2", (2, 4, 5), (4, 3, 3), 2),
    transposed(
        "output_shape",
        "strides = [2], output_shape = [10]",
        "stride=2, padding=1, output_padding=1",
        (2, 3, 5),
        (3, 4, 3),
    ),
    transposed(
        "same_upper", 'strides = [2], auto_pad = "SAME_UPPER"', "stride=2, padding=1", (2, 3, 5), (3, 4, 4)
    ),
    transposed("wide_stride", "strides = [3]", "stride=3", (2, 3, 4), (3, 2, 2)),
    pool("max_pool", "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>", "F.max_pool2d(x, 2)"),
    pool(
        "max_pool_overlapping",
        "MaxPool<kernel_shape = [3, 2], strides = [1, 2], pads = [1, 0, 1, 0], dilations = [2, 1]>",
        "F.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1))",
    ),
    pool(
        "max_pool_ceil",
        "MaxPool<kernel_shape = [2, 4], strides = [2, 4], ceil_mode = 1>",
        "F.max_pool2d(x, (2, 4), ceil_mode=True)",
    ),
    pool("max_pool_line", "MaxPool<kernel_shape = [3]>", "F.max_pool1d(x, 3, 1)", (2, 3, 8)),
    pool("max_pool_volume", "MaxPool<kernel_shape = [2, 2, 2]>", "F.max_pool3d(x, 2, 1)", (1, 2, 3, 4, 3)),
    pool(
        "max_pool_same",
        'MaxPool<kernel_shape = [3], auto_pad = "SAME_UPPER", strides = [2]>',
        "F.max_pool1d(F.pad(x, (0, 1), value=-1e9), 3, 2)",
        (2, 3, 8),
    ),
    Case(
        "max_pool_ties",
        "z = MaxPool<kernel_shape = [3], strides = [1]>(x)",
        "F.max_pool1d(x, 3, 1)",
        {"x": np.array([[[1, 1, 1, 0, 2, 2, 0, 0, 0]]], np.float32)},
    ),
    Case(
        "max_pool_with_indices",
        "z, i = MaxPool<kernel_shape = [2], strides = [2]>(x)",
        "F.max_pool1d(x, 2)",
        {"x": floats(2, 3, 6)},
    ),
    Case(
        "max_pool_other_order",
        "z, i = MaxPool<kernel_shape = [2, 2], storage_order = 1>(x)",
        "F.max_pool2d(x, 2, 1)",
        {"x": floats(2, 3, 4, 3)},
    ),
    pool(
        "average_pool",
        "AveragePool<kernel_shape = [2, 3], strides = [2, 1]>",
        "F.avg_pool2d(x, (2, 3), (2, 1))",
    ),
    pool(
        "average_pool_padded",
        "AveragePool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>",
        "F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)",
    ),
    pool(
        "average_pool_counting_pads",
        "AveragePool<kernel_shape = [3, 3], strides = [2, 3], pads = [1, 1, 1, 1], count_include_pad = 1>",
        "F.avg_pool2d(x, 3, (2, 3), 1)",
    ),
    pool(
        "average_pool_line", "AveragePool<kernel_shape = [2], strides = [2]>", "F.avg_pool1d(x, 2)", (1, 3, 7)
    ),
    pool(
        "average_pool_volume",
        "AveragePool<kernel_shape = [2, 2, 2]>",
        "F.avg_pool3d(x, 2, 1)",
        (1, 2, 3, 4, 3),
    ),
    pool(
        "average_pool_same",
        'AveragePool<kernel_shape = [2], auto_pad = "SAME_UPPER">',
        "torch.cat([F.avg_pool1d(x, 2, 1), x[..., -1:]], -1)",
        (2, 3, 5),
        symbolic=False,
    ),
    *(
        pool(f"global_{name}", f"Global{op}Pool", call, shape)
        for shape in ((2, 3, 4, 5), (1, 3, 6))
        for name, op, call in (
            (f"average_{len(shape)}", "Average", f"x.mean({tuple(range(2, len(shape)))}, keepdim=True)"),
            (f"max_{len(shape)}", "Max", f"x.amax({tuple(range(2, len(shape)))}, keepdim=True)"),
        )
    ),
]
