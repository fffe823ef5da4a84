"""Cases of activations and other elementwise functions, and of Dropout without randomness."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, Draw, floats

X = {"x": floats(3, 5, scale=2.0)}
KINKS = {"x": np.array([-4.0, -3.0, -1.0, -0.0, 0.0, 0.25, 1.0, 3.0, 4.0], np.float32)}
FAR = {"x": np.array([-200.0, -30.0, -1e-20, 0.0, 1e-20, 30.0, 200.0], np.float32)}
UNIT = {"x": np.array([[-0.9, -0.3], [0.0, 0.75]], np.float32)}

FORMULAS: dict[str, tuple[str, str]] = {
    "relu": ("Relu(x)", "F.relu(x)"),
    "leaky_relu": ("LeakyRelu<alpha = 0.2>(x)", "F.leaky_relu(x, 0.2)"),
    "leaky_relu_default": ("LeakyRelu(x)", "F.leaky_relu(x, 0.01)"),
    "leaky_relu_falling": ("LeakyRelu<alpha = -0.5>(x)", "F.leaky_relu(x, -0.5)"),
    "elu": ("Elu<alpha = 1.5>(x)", "F.elu(x, 1.5)"),
    "elu_default": ("Elu(x)", "F.elu(x)"),
    "selu": ("Selu(x)", "F.selu(x)"),
    "selu_other": (
        "Selu<alpha = 2.0, gamma = 0.5>(x)",
        "0.5 * torch.where(x > 0, x, 2 * (torch.exp(torch.clamp(x, max=0)) - 1))",
    ),
    "celu": ("Celu<alpha = 2.0>(x)", "F.celu(x, 2.0)"),
    "celu_default": ("Celu(x)", "F.celu(x)"),
    "thresholded_relu": ("ThresholdedRelu<alpha = 0.25>(x)", "F.threshold(x, 0.25, 0)"),
    "thresholded_relu_default": ("ThresholdedRelu(x)", "F.threshold(x, 1.0, 0)"),
    "hard_sigmoid": ("HardSigmoid<alpha = 0.16666667, beta = 0.5>(x)", "F.hardsigmoid(x)"),
    "hard_sigmoid_default": ("HardSigmoid(x)", "torch.clamp(0.2 * x + 0.5, 0, 1)"),
    "hard_swish": ("HardSwish(x)", "F.hardswish(x)"),
    "sigmoid": ("Sigmoid(x)", "torch.sigmoid(x)"),
    "tanh": ("Tanh(x)", "torch.tanh(x)"),
    "softplus": ("Softplus(x)", "F.softplus(x, threshold=1e9)"),
    "softsign": ("Softsign(x)", "F.softsign(x)"),
    "mish": ("Mish(x)", "F.mish(x)"),
    "gelu": ("Gelu(x)", "F.gelu(x)"),
    "gelu_tanh": ('Gelu<approximate = "tanh">(x)', 'F.gelu(x, approximate="tanh")'),
    "erf": ("Erf(x)", "torch.erf(x)"),
    "soft_shrink": ("Shrink<lambd = 0.3, bias = 0.3>(x)", "F.softshrink(x, 0.3)"),
    "hard_shrink": ("Shrink<lambd = 0.7>(x)", "F.hardshrink(x, 0.7)"),
    "atan": ("Atan(x)", "torch.atan(x)"),
    "asinh": ("Asinh(x)", "torch.asinh(x)"),
    "sinh": ("Sinh(x)", "torch.sinh(x)"),
    "cosh": ("Cosh(x)", "torch.cosh(x)"),
    "fast_gelu": ("com.microsoft.FastGelu(x)", 'F.gelu(x, approximate="tanh")'),
    "microsoft_gelu": ("com.microsoft.Gelu(x)", "F.gelu(x)"),
    "quick_gelu": ("com.microsoft.QuickGelu(x)", "x * torch.sigmoid(1.702 * x)"),
}
OVERFLOW = ("sinh", "cosh")
"""Functions that are infinite far from 0."""
KINKED = (
    "leaky_relu_falling",
    "hard_sigmoid_default",  # PyTorch's clamp passes the gradient on at its ends, its hardsigmoid does not
)


def opset(name: str) -> int:
    return 20 if name.startswith("gelu") else 18


CASES = [
    *(Case(name, f"z = {op}", torch, X, opset=opset(name)) for name, (op, torch) in FORMULAS.items()),
    *(
        Case(f"{name}_at_kinks", f"z = {op}", torch, KINKS, opset=opset(name))
        for name, (op, torch) in FORMULAS.items()
        if name not in KINKED
    ),
    *(
        Case(f"{name}_far", f"z = {op}", torch, FAR, opset=opset(name))
        for name, (op, torch) in FORMULAS.items()
        if name not in OVERFLOW
    ),
    *(
        Case(name, f"z = {name.capitalize()}(x)", f"torch.{name}(x)", UNIT)
        for name in ("asin", "acos", "atanh")
    ),
    Case("acosh", "z = Acosh(x)", "torch.acosh(x)", {"x": Draw((2, 3), positive=True, shift=1.5)}),
    Case("softplus_of_softplus", "y = Softplus(x) z = Softplus(y)", "F.softplus(F.softplus(x))", X),
    Case(
        "prelu_channels",
        "z = PRelu(x, slope)",
        "F.prelu(x, slope.reshape(-1))",
        {"x": floats(2, 3, 4), "slope": floats(3, 1)},
    ),
    Case("prelu_shared", "z = PRelu(x, slope)", "F.prelu(x, slope)", {"x": floats(2, 4), "slope": floats(1)}),
    Case(
        "prelu_at_zero",
        "z = PRelu(x, slope)",
        "F.prelu(x, slope)",
        {"x": np.array([[-1.0, 0.0, 2.0]], np.float32), "slope": floats(3)},
    ),
    Case(
        "bias_gelu",
        "z = com.microsoft.BiasGelu(x, b)",
        "F.gelu(x + b)",
        {"x": floats(2, 3, 4), "b": floats(4)},
    ),
    Case(
        "fast_gelu_with_bias",
        "z = com.microsoft.FastGelu(x, b)",
        'F.gelu(x + b, approximate="tanh")',
        {"x": floats(2, 3, 4), "b": floats(4)},
    ),
    Case("dropout_inference", "z = Dropout(x)", "x * 1", X),
    Case(
        "dropout_not_training",
        "z, mask = Dropout(x, ratio, training)",
        "(x * 1, torch.ones(x.shape, dtype=bool))",
        X,
        {"ratio": np.array(0.75, np.float32), "training": np.array(False)},
        outputs=("z", "mask"),
    ),
    Case(
        "dropout_of_nothing",
        "z, mask = Dropout(x, ratio, training)",
        "(x * 1, torch.ones(x.shape, dtype=bool))",
        X,
        {"ratio": np.array(0.0, np.float32), "training": np.array(True)},
        outputs=("z", "mask"),
    ),
    Case(
        "dropout_training_decided_at_run_time",
        "z = Dropout(x, ratio, training)",
        "x * 1",
        {**X, "training": np.array(False)},
        {"ratio": np.array(0.75, np.float32)},
    ),
]
