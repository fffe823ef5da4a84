"""Cases of elementwise arithmetic."""

from __future__ import annotations

from autodiff_cases import Case, floats

SHAPES = {
    "same": ((3, 4), (3, 4)),
    "row": ((3, 4), (4,)),
    "column": ((3, 1), (3, 4)),
    "outer": ((3, 1), (1, 4)),
    "scalar": ((), (2, 3)),
    "both_ones": ((1, 3), (1, 1, 1)),
    "high": ((2, 3, 4), (3, 1)),
}

CASES = [
    *(
        Case(f"{op.lower()}_{name}", f"z = {op}(x, y)", f"x {sign} y", {"x": floats(*a), "y": floats(*b)})
        for op, sign in (("Add", "+"), ("Sub", "-"), ("Mul", "*"))
        for name, (a, b) in SHAPES.items()
    ),
    Case("mul_self", "z = Mul(x, x)", "x * x", {"x": floats(3, 4)}),
    Case("add_self", "z = Add(x, x)", "x + x", {"x": floats(3, 4)}),
    Case(
        "many_readers",
        "a = Identity(x) b = Mul(x, y) c = Add(a, b) d = Mul(c, x) z = Sub(d, x)",
        "(x + x * y) * x - x",
        {"x": floats(3, 4), "y": floats(4)},
    ),
]
