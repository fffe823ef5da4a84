"""Cases of elementwise arithmetic."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, Draw, floats, integers, positive

SHAPES = {
    "same": ((3, 4), (3, 4)),
    "row": ((3, 4), (4,)),
    "column": ((3, 1), (3, 4)),
    "outer": ((3, 1), (1, 4)),
    "scalar": ((), (2, 3)),
    "both_ones": ((1, 3), (1, 1, 1)),
    "high": ((2, 3, 4), (3, 1)),
}
UNARY = {
    "Neg": "-x",
    "Abs": "x.abs()",
    "Sqrt": "x.sqrt()",
    "Reciprocal": "1 / x",
    "Exp": "x.exp()",
    "Log": "x.log()",
    "Sin": "x.sin()",
    "Cos": "x.cos()",
    "Tan": "x.tan()",
    "Identity": "x",
}
ZERO = {"Floor": "x.floor()", "Ceil": "x.ceil()", "Sign": "x.sign()", "Round": "x.round()"}
SMALL = Draw((2, 6), high=3, dtype="float32")
"""Whole numbers with many ties."""
TIES = {"x": np.array([1.0, 2.0, 3.0, -1.0], np.float32), "y": np.array([1.0, 3.0, 2.0, -1.0], np.float32)}
LIMITS = {"low": np.float32(-0.5), "high": np.float32(0.7)}
EDGES = np.array([-0.5, 0.7, 0.0, -0.6, 0.8, 2.0], np.float32)

CASES = [
    *(
        Case(f"{op.lower()}_{name}", f"z = {op}(x, y)", f"x {sign} y", {"x": floats(*a), "y": positive(*b)})
        for op, sign in (("Add", "+"), ("Sub", "-"), ("Mul", "*"), ("Div", "/"))
        for name, (a, b) in SHAPES.items()
    ),
    *(
        Case(f"{op.lower()}_{name}", f"z = {op}(x, y)", f"torch.{torch}(x, y)", {"x": floats(*a), "y": floats(*b)})
        for op, torch in (("Max", "maximum"), ("Min", "minimum"))
        for name, (a, b) in SHAPES.items()
    ),
    *(
        Case(f"pow_{name}", "z = Pow(x, y)", "x ** y", {"x": positive(*a), "y": floats(*b)})
        for name, (a, b) in SHAPES.items()
    ),
    *(
        Case(f"where_{name}", "z = Where(c, x, y)", "torch.where(c, x, y)",
             {"c": Draw((3, 4), "bool", high=2), "x": floats(*a), "y": floats(*b)})
        for name, (a, b) in SHAPES.items() if name in ("same", "row", "column", "outer")
    ),
    *(Case(f"{op.lower()}", f"z = {op}(x)", torch, {"x": positive(3, 4)}) for op, torch in UNARY.items()),
    *(
        Case(f"{op.lower()}_zero", f"a = {op}(x) b = Mul(a, y) z = Add(b, x)", f"{torch} * y + x",
             {"x": floats(3, 4, scale=3.0), "y": floats(4)})
        for op, torch in ZERO.items()
    ),
    Case("abs_at_zero", "z = Abs(x)", "x.abs()", {"x": np.array([-1.0, 0.0, 2.0], np.float32)}),
    Case("max_ties", "z = Max(x, y)", "torch.maximum(x, y)", TIES),
    Case("min_ties", "z = Min(x, y)", "torch.minimum(x, y)", TIES),
    Case(
        "max_three_ties", "z = Max(x, y, w)",
        "torch.stack(torch.broadcast_tensors(x, y, w)).amax(0)",
        {"x": SMALL, "y": SMALL, "w": Draw((6,), high=3, dtype="float32")},
    ),
    Case("max_one", "a = Max(x) z = Mul(a, a)", "x * x", {"x": floats(3)}),
    Case("sum_three", "z = Sum(x, y, w)", "x + y + w", {"x": floats(2, 3), "y": floats(3), "w": floats(2, 1)}),
    Case("mean_three", "z = Mean(x, y, w)", "(x + y + w) / 3", {"x": floats(2, 3), "y": floats(3), "w": floats(2, 1)}),
    *(
        Case(f"pow_constant_{name}", "z = Pow(x, e)", f"x ** {value}", {"x": positive(3, 4)},
             {"e": np.array(value, kind)})
        for name, value, kind in (
            ("two", 2.0, np.float32), ("half", 0.5, np.float32), ("one", 1.0, np.float32),
            ("none", 0.0, np.float32), ("minus", -1.5, np.float32), ("int", 3, np.int64),
        )
    ),
    Case("pow_two_of_negative", "z = Pow(x, e)", "x ** 2.0", {"x": floats(3, 4)}, {"e": np.array([2.0], np.float32)}),
    Case("pow_int_tensor", "z = Pow(x, e)", "x ** e", {"x": floats(3, 4), "e": integers(4, high=4)}),
    Case(
        "pow_at_zero", "z = Pow(x, y)", "x ** y",
        {"x": np.array([0.0, 0.0, 2.0, 0.0], np.float32), "y": np.array([0.0, 2.0, 0.0, 1.0], np.float32)},
    ),
    Case("pow_high_exponent", "z = Pow(x, y)", "x ** y", {"x": positive(4), "y": floats(2, 3, 4)}),
    Case("clip", "z = Clip(x, low, high)", "x.clamp(-0.5, 0.7)", {"x": floats(4, 5)}, LIMITS),
    Case("clip_edges", "z = Clip(x, low, high)", "x.clamp(low.item(), high.item())", {"x": EDGES}, LIMITS),
    Case("clip_low", "z = Clip(x, low)", "x.clamp(min=-0.5)", {"x": floats(4, 5)}, LIMITS),
    Case("clip_high", "z = Clip(x, , high)", "x.clamp(max=high)", {"x": floats(4, 5)}, LIMITS),
    Case("clip_none", "a = Clip(x) z = Mul(a, x)", "x * x", {"x": floats(4)}),
    Case(
        "clip_limits", "z = Clip(x, low, high)", "torch.clamp(x, low, high)",
        {"x": floats(4, 5), "low": np.float32(-0.5), "high": np.float32(0.7)},
    ),
    Case(
        "clip_crossed", "z = Clip(x, low, high)", "torch.clamp(x, low, high)",
        {"x": floats(4, 5), "low": np.float32(0.5), "high": np.float32(-0.7)},
    ),
    Case("cast_double", "a = Cast<to: int = 11>(x) b = Mul(a, a) z = Cast<to: int = 1>(b)", "x * x", {"x": floats(3, 4)}),
    Case("cast_int", "a = Cast<to: int = 7>(x) b = Cast<to: int = 1>(a) z = Mul(b, x)", "x.trunc() * x",
         {"x": floats(3, 4, scale=4.0)}),
    Case("cast_half", "a = Cast<to: int = 10>(x) z = Cast<to: int = 1>(a)", "x.half().double()", {"x": floats(3, 4)},
         tolerance=1e-3),
    Case("cast_like", "a = CastLike(x, d) b = Mul(a, d) z = CastLike(b, x)", "x * d",
         {"x": floats(3, 4), "d": floats(4, dtype="float64")}, frozen=("d",)),
    Case("fmod", "z = Mod<fmod: int = 1>(x, y)", "torch.fmod(x, y)", {"x": floats(3, 4, scale=4.0), "y": positive(4)}),
    Case("mul_self", "z = Mul(x, x)", "x * x", {"x": floats(3, 4)}),
    Case("add_self", "z = Add(x, x)", "x + x", {"x": floats(3, 4)}),
    Case("sub_self", "a = Sub(x, x) z = Add(a, x)", "x", {"x": floats(3, 4)}),
    Case(
        "many_readers",
        "a = Identity(x) b = Mul(x, y) c = Add(a, b) d = Mul(c, x) z = Sub(d, x)",
        "(x + x * y) * x - x",
        {"x": floats(3, 4), "y": floats(4)},
    ),
    Case("unused_input", "z = Mul(x, x)", "x * x", {"x": floats(3), "y": floats(2)}),
    Case(
        "comparison", "c = Less(x, y) f = Cast<to: int = 1>(c) a = Mul(f, x) z = Add(a, y)",
        "(x < y).double() * x + y", {"x": floats(3, 4), "y": floats(4)},
    ),
]  # fmt: skip
