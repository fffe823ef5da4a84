"""Cases of operators that move, repeat or cut entries."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


X = {"x": floats(2, 3, 4)}
SLICES = {
    "first": ("x[:, 1:]", [1], [2**62], [1], None),
    "both": ("x[:1, 1:3]", [0, 1], [1, 3], [0, 1], None),
    "negative_start": ("x[:, :, -2:]", [-2], [2**62], [2], None),
    "negative_end": ("x[:, :, :-1]", [0], [-1], [-1], None),
    "step": ("x[:, :, ::2]", [0], [100], [2], [2]),
    "step_offset": ("x[:, 1::2, ::3]", [1, 0], [100, 100], [1, 2], [2, 3]),
    "reversed": ("x.flip(2)", [-1], [-(2**62)], [2], [-1]),
    "reversed_two": ("x.flip(0, 2)", [2**62, 3], [-(2**62), -5], [0, 2], [-1, -1]),
    "reversed_part": ("x[:, :, 1:3].flip(2)", [2], [0], [2], [-1]),
    "reversed_step": ("x.flip(2)[:, :, ::2]", [-1], [-(2**62)], [2], [-2]),
    "empty": ("x[:, 3:]", [3], [3], [1], None),
    "beyond": ("x[:, 1:]", [1], [100], [-2], [1]),
}


def slice_case(
    name: str, torch: str, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None
) -> Case:
    constants = {"s": ints(*starts), "e": ints(*ends)}
    arguments = "x, s, e"
    if axes is not None:
        constants["a"], arguments = ints(*axes), f"{arguments}, a"
    if steps is not None:
        constants["t"], arguments = ints(*steps), f"{arguments}, t"
    return Case(f"slice_{name}", f"z = Slice({arguments})", torch, X, constants)


PADS = {
    "last": ("F.pad(x, (1, 2))", [0, 0, 1, 0, 0, 2], None),
    "two": ("F.pad(x, (0, 1, 2, 0))", [0, 2, 0, 0, 0, 1], None),
    "crop": ("F.pad(x, (-1, 2))", [0, 0, -1, 0, 0, 2], None),
    "crop_both": ("F.pad(x, (-1, -1))", [0, 0, -1, 0, 0, -1], None),
    "axes": ("F.pad(x, (1, 2))", [1, 2], [2]),
    "negative_axes": ("F.pad(x, (0, 1, 2, 0))", [2, 0, 0, 1], [-2, -1]),
}
CASES = [
    Case("reshape", "z = Reshape(x, s)", "x.reshape(4, 6)", X, {"s": ints(4, 6)}),
    Case("reshape_copy", "z = Reshape(x, s)", "x.reshape(2, 12)", X, {"s": ints(0, -1)}),
    Case("flatten", "z = Flatten(x)", "x.reshape(2, 12)", X),
    Case("flatten_all", "z = Flatten<axis: int = 0>(x)", "x.reshape(1, 24)", X),
    Case("flatten_last", "z = Flatten<axis: int = -1>(x)", "x.reshape(6, 4)", X),
    Case("squeeze", "z = Squeeze(x, a)", "x.squeeze(1)", {"x": floats(3, 1, 2)}, {"a": ints(1)}),
    Case("squeeze_all", "z = Squeeze(x)", "x.squeeze()", {"x": floats(1, 3, 1)}, static=("x",)),
    Case("unsqueeze", "z = Unsqueeze(x, a)", "x[None, :, None]", {"x": floats(3)}, {"a": ints(0, -1)}),
    Case("transpose", "z = Transpose<perm: ints = [1, 2, 0]>(x)", "x.permute(1, 2, 0)", X),
    Case("transpose_back", "z = Transpose<perm: ints = [2, 0, 1]>(x)", "x.permute(2, 0, 1)", X),
    Case("transpose_default", "z = Transpose(x)", "x.permute(2, 1, 0)", X),
    Case("expand", "z = Expand(x, s)", "x.expand(2, 3, 4)", {"x": floats(3, 1)}, {"s": ints(2, 3, 4)}),
    Case("expand_ones", "z = Expand(x, s)", "x.expand(2, 3, 4)", {"x": floats(3, 4)}, {"s": ints(2, 1, 1)}),
    Case("expand_scalar", "z = Expand(x, s)", "x.expand(2, 3)", {"x": floats()}, {"s": ints(2, 3)}),
    Case("expand_run_time", "s = Shape(y) e = Expand(x, s) z = Mul(e, y)", "x.expand(2, 3, 4) * y",
         {"x": floats(3, 1), "y": floats(2, 3, 4)}),
    Case("tile", "z = Tile(x, r)", "x.repeat(1, 2, 3)", X, {"r": ints(1, 2, 3)}),
    Case("tile_one", "z = Tile(x, r)", "x.repeat(2)", {"x": floats(3)}, {"r": ints(2)}),
    *(
        Case(f"concat_{axis}".replace("-", "m"), f"z = Concat<axis: int = {axis}>(x, y, x)", f"torch.cat([x, y, x], {axis})",
             {"x": floats(2, 3, 4), "y": floats(*shape)})
        for axis, shape in ((0, (1, 3, 4)), (1, (2, 2, 4)), (-1, (2, 3, 1)), (-2, (2, 5, 4)))
    ),
    Case("concat_frozen", "z = Concat<axis: int = 0>(x, y)", "torch.cat([x, y])", {"x": floats(2, 3), "y": floats(1, 3)}, frozen=("x",)),
    Case("concat_one", "a = Concat<axis: int = 0>(x) z = Mul(a, x)", "x * x", {"x": floats(2, 3)}),
    Case("split_sizes", "a, b = Split<axis: int = 1>(x, s) z = Mul(a, c) y = Mul(b, b)", "(x[:, :1] * c, x[:, 1:] ** 2)",
         {"x": floats(2, 3), "c": floats(2, 1)}, {"s": ints(1, 2)}, outputs=("z", "y")),
    Case("split_equal", "a, b = Split<axis: int = -1, num_outputs: int = 2>(x) z = Mul(a, b)", "x[..., :2] * x[..., 2:]", X, static=("x",)),
    Case("split_partly_used", "a, z, b = Split<axis: int = 0>(x, s)", "x[1:3]", {"x": floats(4, 3)}, {"s": ints(1, 2, 1)}),
    *(slice_case(name, *settings) for name, settings in SLICES.items()),
    Case("slice_default_axes", "z = Slice(x, s, e)", "x[:1, 1:]", X, {"s": ints(0, 1), "e": ints(1, 9)}),
    Case("slice_run_time", "n = Shape(y) e = Gather<axis: int = 0>(n, i) z = Slice(x, s, e, i)", "x[:2]",
         {"x": floats(3, 4), "y": floats(2)}, {"s": ints(0), "i": ints(0)}),
    Case("slice_run_time_start", "n = Shape(y) s = Gather<axis: int = 0>(n, i) z = Slice(x, s, e, i)", "x[2:]",
         {"x": floats(3, 4), "y": floats(2)}, {"e": ints(9), "i": ints(0)}),
    *(
        Case(f"pad_{name}", "z = Pad(x, p)" if axes is None else "z = Pad(x, p, , a)", torch, X,
             {"p": ints(*pads), **({} if axes is None else {"a": ints(*axes)})})
        for name, (torch, pads, axes) in PADS.items()
    ),
    Case("pad_value", "z = Pad(x, p, v)", "torch.cat([v.expand(2, 3, 1), x, v.expand(2, 3, 2)], 2)",
         {**X, "v": floats()}, {"p": ints(0, 0, 1, 0, 0, 2)}),
    Case("pad_reflect", 'z = Pad<mode: string = "reflect">(x, p)', 'F.pad(x, (2, 1), mode="reflect")', X,
         {"p": ints(0, 0, 2, 0, 0, 1)}),
    Case("pad_edge", 'z = Pad<mode: string = "edge">(x, p)', 'F.pad(x, (2, 3), mode="replicate")', X,
         {"p": ints(0, 0, 2, 0, 0, 3)}),
    Case("pad_wrap", 'z = Pad<mode: string = "wrap">(x, p)', 'F.pad(x, (2, 1), mode="circular")', X,
         {"p": ints(0, 0, 2, 0, 0, 1)}, opset=19),
    Case("pad_run_time", "z = Pad(x, p)", "F.pad(x, (1, 2))", {**X, "p": ints(0, 0, 1, 0, 0, 2)}),
    Case("depth_to_space_crd", 'z = DepthToSpace<blocksize: int = 2, mode: string = "CRD">(x)', "F.pixel_shuffle(x, 2)", {"x": floats(2, 8, 3, 2)}),
    Case("depth_to_space_dcr", "z = DepthToSpace<blocksize: int = 2>(x)",
         "x.reshape(2, 2, 2, 2, 3, 2).permute(0, 3, 4, 1, 5, 2).reshape(2, 2, 6, 4)", {"x": floats(2, 8, 3, 2)}),
    Case("space_to_depth", "z = SpaceToDepth<blocksize: int = 2>(x)",
         "x.reshape(2, 3, 2, 2, 3, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 12, 2, 3)", {"x": floats(2, 3, 4, 6)}),
    Case("trilu_lower", "z = Trilu<upper: int = 0>(x)", "x.tril()", {"x": floats(2, 4, 4)}),
    Case("trilu_upper", "z = Trilu(x, k)", "x.triu(1)", {"x": floats(3, 4)}, {"k": np.array(1, np.int64)}),
    Case("reverse_sequence", "z = ReverseSequence<time_axis: int = 1, batch_axis: int = 0>(x, n)",
         "torch.stack([torch.cat([x[i, :k].flip(0), x[i, k:]]) for i, k in enumerate((3, 2))])", X, {"n": ints(3, 2)}),
    Case("range", "r = Range(a, b, c) z = Mul(r, r)", "(a + torch.arange(4) * c) ** 2",
         {"a": np.float32(1.0), "b": np.float32(3.1), "c": np.float32(0.6)}),
]  # fmt: skip
