"""Cases of Scan, Loop and If: the carried states, what is read and collected, and what bodies read from outside."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats

STATE = "float[m, n]"
RNN = """
    inner_w = MatMul(x, wx)
    inner_r = MatMul(s, wh)
    inner_a = Add(inner_w, inner_r)
    inner_n = Tanh(inner_a)
    inner_y = Mul(inner_n, c)
"""
CELL = "lambda s, x: (torch.tanh(x @ wx + s @ wh), torch.tanh(x @ wx + s @ wh) * c)"
NETWORK = {
    "h": floats(2, 3),
    "xs": floats(4, 2, 5),
    "wx": floats(5, 3, scale=0.5),
    "wh": floats(3, 3, scale=0.5),
    "c": floats(3),
}


def scan(settings: str, body: str = RNN, ends: str = f"{STATE} inner_n, {STATE} inner_y") -> str:
    """Return a Scan over xs from h."""
    return f"last, ys = Scan<{settings}, body = g ({STATE} s, {STATE} x) => ({ends}) {{ {body} }}>(h, xs)"


def loop(body: str, trip: str, starts: str, results: str, inputs: str, ends: str, cond: str = "") -> str:
    """Return a Loop; `starts` and `ends` are the inputs and outputs of its body after the condition."""
    return (
        f"{results} = Loop<body = g (int64 i, bool go, {starts}) => (bool on, {ends}) {{ {body} }}>"
        f"({trip}, {cond}, {inputs})"
    )


GOES_ON = "on = Identity(go)"
READS = f"""
    {GOES_ON}
    x = Gather<axis = 0>(xs, i)
    {RNN}
"""
COUNT = {"trip": np.array(4, np.int64)}

CASES = [
    Case("scan", scan("num_scan_inputs = 1"), f"R.scan({CELL}, h, xs)", NETWORK, outputs=("last", "ys")),
    Case(
        "scan_last_state_alone",
        scan("num_scan_inputs = 1"),
        f"R.scan({CELL}, h, xs)[0]",
        NETWORK,
        outputs=("last",),
    ),
    Case(
        "scan_collects_the_states",
        scan("num_scan_inputs = 1", RNN + "inner_z = Identity(inner_n)", f"{STATE} inner_n, {STATE} inner_z"),
        "R.scan(lambda s, x: (torch.tanh(x @ wx + s @ wh),) * 2, h, xs)",
        {key: value for key, value in NETWORK.items() if key != "c"} | {"c": floats(3)},
        outputs=("last", "ys"),
    ),
    Case(
        "scan_backwards_along_axis_1",
        scan(
            "num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],"
            " scan_output_axes = [2], scan_output_directions = [1]"
        ),
        f"R.scan({CELL}, h, xs, axis=1, reverse=True, out_axis=2, out_reverse=True)",
        NETWORK | {"xs": floats(2, 4, 5)},
        outputs=("last", "ys"),
    ),
    Case(
        "scan_of_two_states_and_inputs",
        f"""last_s, last_t, ys = Scan<num_scan_inputs = 2, scan_input_directions = [0, 1],
            body = g ({STATE} s, {STATE} t, {STATE} x, {STATE} z) =>
                ({STATE} s_n, {STATE} t_n, {STATE} y) {{
                g_t = Mul(t, x)
                s_n = Add(s, g_t)
                t_a = Mul(t, w)
                t_b = Mul(s, z)
                t_n = Sub(t_a, t_b)
                y = Identity(s)
            }}>(h, k, xs, zs)""",
        "R.scan_two(lambda s, t, x, z: (s + t * x, t * w - s * z, s), h, k, xs, zs)",
        {
            "h": floats(2, 3),
            "k": floats(2, 3),
            "xs": floats(3, 2, 3),
            "zs": floats(3, 2, 3),
            "w": floats(1, 3),
        },
        outputs=("last_s", "last_t", "ys"),
    ),
    Case(
        "loop_reads_by_number",
        loop(READS, "trip", f"{STATE} s", "last, ys", "h", f"{STATE} inner_n, {STATE} inner_y"),
        f"R.scan({CELL}, h, xs)",
        NETWORK,
        COUNT,
        outputs=("last", "ys"),
    ),
    Case(
        "loop_reads_the_first_entries",
        loop(READS, "trip", f"{STATE} s", "last, ys", "h", f"{STATE} inner_n, {STATE} inner_y"),
        f"R.scan({CELL}, h, xs[:3])",
        NETWORK,
        {"trip": np.array(3, np.int64)},
        outputs=("last", "ys"),
    ),
    Case(
        "loop_of_so_many_iterations_as_given",
        loop(READS, "trip", f"{STATE} s", "last, ys", "h", f"{STATE} inner_n, {STATE} inner_y"),
        f"R.scan({CELL}, h, xs[:2])",
        NETWORK | {"trip": np.array(2, np.int64)},
        outputs=("last", "ys"),
    ),
    Case(
        "loop_reads_backwards_and_counts",
        loop(
            f"""{GOES_ON}
            back = Sub(three, i)
            x = Gather<axis = 0>(xs, back)
            k = Cast<to = 1>(i)
            kx = Mul(k, x)
            kw = Mul(kx, w)
            s_n = Add(s, kw)
            t_n = Add(t, one)""",
            "trip",
            f"{STATE} s, int64 t",
            "last, count",
            "h, one",
            f"{STATE} s_n, int64 t_n",
        ),
        "h + sum(i * xs[3 - i] * w for i in range(4))",
        {"h": floats(2, 3), "xs": floats(4, 2, 3), "w": floats(2, 1)},
        COUNT | {"three": np.array(3, np.int64), "one": np.array(1, np.int64)},
        outputs=("last",),
    ),
    Case(
        "loop_stops_early",
        loop(
            """s_n = Mul(s, w)
            y = Mul(s, s)
            size = ReduceMax<keepdims = 0>(s_n)
            on = Less(size, limit)""",
            "trip",
            f"{STATE} s",
            "last, ys",
            "h",
            f"{STATE} s_n, {STATE} y",
            cond="yes",
        ),
        "R.doubled(h, w, 20.0)",
        {"h": floats(2, 3, positive=True, scale=0.1, shift=1.0), "w": floats(2, 3, scale=0.1, shift=2.0)},
        {"trip": np.array(50, np.int64), "yes": np.array(True), "limit": np.array(20.0, np.float32)},
        outputs=("last", "ys"),
    ),
    Case(
        "scan_in_a_loop",
        loop(
            f"""{GOES_ON}
            row = Gather<axis = 0>(xs, i)
            s_n, parts = Scan<num_scan_inputs = 1, body = h (float[n] a, float[n] b) =>
                (float[n] a_n, float[n] c) {{
                    ab = Mul(a, b)
                    a_w = Mul(a, w)
                    a_n = Sub(a_w, ab)
                    c = Mul(ab, b)
                }}>(s, row)""",
            "trip",
            "float[n] s",
            "last, ys",
            "h",
            "float[n] s_n, float[m, n] parts",
        ),
        "R.nested(h, xs, w)",
        {"h": floats(3), "xs": floats(4, 2, 3, scale=0.5), "w": floats(3, shift=1.0, scale=0.2)},
        COUNT,
        outputs=("last", "ys"),
    ),
    *(
        Case(
            f"if_{name}",
            f"""z = If<then_branch = g () => ({STATE} p) {{ q = Mul(x, y)
                    p = Add(q, x) }},
                else_branch = g () => ({STATE} p) {{ p = Mul(y, w) }}>(flag)""",
            "x * y + x" if flag else "y * w",
            {"x": floats(2, 3), "y": floats(2, 3), "w": floats(3), "flag": np.array(flag)},
        )
        for name, flag in (("taken", True), ("not_taken", False))
    ),
    Case(
        "if_in_a_scan",
        scan(
            "num_scan_inputs = 1",
            f"""top = ReduceMax<keepdims = 0>(s)
            high = Greater(top, one)
            n = If<then_branch = g () => ({STATE} p) {{ p = Mul(s, x) }},
                else_branch = g () => ({STATE} p) {{ q = Mul(x, w)
                    p = Add(q, s) }}>(high)
            y = Mul(n, n)""",
            f"{STATE} n, {STATE} y",
        ),
        "R.scan(lambda s, x: (lambda n: (n, n * n))(s * x if s.max() > 1.0 else s + x * w), h, xs)",
        {"h": floats(2, 3), "xs": floats(5, 2, 3), "w": floats(3)},
        {"one": np.array(1.0, np.float32)},
        outputs=("last", "ys"),
    ),
]
