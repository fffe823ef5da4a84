"""Cases of softmax and the losses that end in it."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, Draw, floats, integers

X = {"x": floats(2, 3, 4)}
WEIGHT = {"w": np.array([0.5, 2.0, 0.0, 1.25, 3.0], np.float32)}


def loss(
    name: str,
    attributes: str,
    torch: str,
    *,
    shape: tuple[int, ...] = (6, 5),
    weighted: bool = False,
    labels: Draw | np.ndarray | None = None,
    log_prob: bool = False,
) -> list[Case]:
    """Return both losses' cases; `torch` are the arguments of PyTorch's after scores and labels."""
    where = shape[:1] + shape[2:]
    inputs = {"x": floats(*shape, scale=2.0), "t": integers(*where, high=5) if labels is None else labels}
    names = "x, t, w" if weighted else "x, t"
    constants = WEIGHT if weighted else {}
    arguments = ", ".join(item for item in ("weight=w" if weighted else "", torch) if item)
    given = f"<{attributes}>" if attributes else ""
    outputs, entropy = ("z",), f"F.cross_entropy(x, t, {arguments})"
    if log_prob:
        outputs, entropy = ("z", "logp"), f"({entropy}, F.log_softmax(x, 1))"
    return [
        Case(
            f"cross_entropy_{name}",
            f"{', '.join(outputs)} = SoftmaxCrossEntropyLoss{given}({names})",
            entropy,
            inputs,
            constants,
            outputs=outputs,
        ),
        Case(
            f"likelihood_{name}",
            f"z = NegativeLogLikelihoodLoss{given}({names})",
            f"F.nll_loss(x, t, {arguments})",
            inputs,
            constants,
        ),
    ]


IGNORED = np.array([0, -100, 4, -100, 2, 1], np.int64)

CASES = [
    *(
        Case(f"{op.lower()}_axis_{axis}", f"z = {op}<axis = {axis}>(x)", f"{call}(x, {axis})", X)
        for op, call in (("Softmax", "F.softmax"), ("LogSoftmax", "F.log_softmax"))
        for axis in (0, 1, -1)
    ),
    Case("softmax_default", "z = Softmax(x)", "F.softmax(x, -1)", X),
    Case("softmax_of_one", "z = Softmax(x)", "F.softmax(x, -1)", {"x": floats(3, 1)}),
    Case(
        "softmax_masked",
        "y = Add(x, m) z = Softmax(y)",
        "F.softmax(x + m, -1)",
        {"x": floats(2, 3)},
        {"m": np.array([[0, -np.inf, 0], [-np.inf, 0, -np.inf]], np.float32)},
    ),
    Case("log_softmax_far", "z = LogSoftmax(x)", "F.log_softmax(x, -1)", {"x": floats(3, 4, scale=100.0)}),
    Case("hardmax", "h = Hardmax(x) z = Mul(h, x)", "x * (x == x.max(-1, keepdim=True)[0])", X),
    *loss("mean", 'reduction = "mean"', 'reduction="mean"'),
    *loss("default", "", ""),
    *loss("sum", 'reduction = "sum"', 'reduction="sum"'),
    *loss("none", 'reduction = "none"', 'reduction="none"'),
    *loss("batch_of_one", 'reduction = "mean"', "", shape=(1, 5)),
    *loss("images", 'reduction = "mean"', "", shape=(2, 5, 3, 2)),
    *loss("sequences", 'reduction = "none"', 'reduction="none"', shape=(2, 5, 3)),
    *loss("ignored", "ignore_index = -100", "ignore_index=-100", labels=IGNORED),
    *loss(
        "ignored_sum",
        'reduction = "sum", ignore_index = 2',
        'reduction="sum", ignore_index=2',
        shape=(2, 5, 3),
    ),
    *loss(
        "ignored_none",
        'reduction = "none", ignore_index = 0',
        'reduction="none", ignore_index=0',
        weighted=True,
    ),
    *loss("weighted", "", "", weighted=True),
    *loss("weighted_sum", 'reduction = "sum"', 'reduction="sum"', weighted=True),
    *loss("weighted_none", 'reduction = "none"', 'reduction="none"', weighted=True, shape=(2, 5, 3)),
    *loss("weighted_ignored", "ignore_index = -100", "ignore_index=-100", weighted=True, labels=IGNORED),
    *loss("with_log_prob", "", "", log_prob=True)[:1],
    *loss("with_log_prob_images", 'reduction = "sum"', 'reduction="sum"', shape=(2, 5, 3), log_prob=True)[:1],
    Case(
        "only_log_prob",
        "l, z = SoftmaxCrossEntropyLoss(x, t)",
        "F.log_softmax(x, 1)",
        {"x": floats(4, 5), "t": integers(4, high=5)},
    ),
    Case(
        "int32_labels",
        "z = SoftmaxCrossEntropyLoss(x, t)",
        "F.cross_entropy(x, t.long())",
        {"x": floats(4, 5), "t": integers(4, high=5, dtype="int32")},
    ),
]
