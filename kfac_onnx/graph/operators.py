"""The table of operators: one row per operator, with what every pass may ask of it.

A pass that treats some operators alike asks this table (`having`, `keeping`) and lists none itself, so that
an operator has to be weighed in one place. Where a pass wants another set than a trait has, the difference
and its reason stand at that line. Operators of ONNX without a row are listed in `tests/graph/no_row.txt`.

Rows are found by name: an operator of `com.microsoft` with the name of a standard one has its traits.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BODIES",
    "COMPARISONS",
    "ELEMENTWISE",
    "LOOKUPS",
    "NO_GRADIENT",
    "ORDERED_VIEWS",
    "PRODUCTS",
    "RANDOM",
    "REDUCTIONS",
    "SCATTERS",
    "SIZES",
    "TABLE",
    "VIEWS",
    "Keeps",
    "Operator",
    "Trait",
    "having",
    "keeping",
]


class Trait(enum.Flag):
    """What is true of an operator, whatever its attributes."""

    ELEMENTWISE = enum.auto()
    """One result, whose entries depend on the operands' entries at the same place, broadcast."""
    BROADCASTS = enum.auto()
    """Operands whose dimensions are equal, or 1."""
    SAME_TYPE = enum.auto()
    """Operands (of a Where: the last two) of one type."""
    LINEAR = enum.auto()
    """The result is linear in its float operands together."""
    SCALES = enum.auto()
    """The result is linear in each operand while the other stays (a divisor never is)."""
    ADDS = enum.auto()
    """A sum of its operands, some perhaps negated."""
    BOUNDS = enum.auto()
    """Each entry of the result is that of one operand: the larger, the smaller, what a bound lets pass."""
    KEEPS_SIGN = enum.auto()
    """Entries have the sign of the first operand's."""
    UNSIGNED = enum.auto()
    """Entries are never negative, and say nothing of the sign of the operand's."""
    STEEP_AT_ZERO = enum.auto()
    """The derivative grows without bound towards 0."""
    STEEP = enum.auto()
    """The derivative grows without bound towards a number other than 0."""
    COMPARES = enum.auto()
    """Compares two operands."""
    BOOLEAN = enum.auto()
    """The result is a tensor of bool."""
    INT64 = enum.auto()
    """The result is a tensor of int64, whatever the operands are."""
    NO_GRADIENT = enum.auto()
    """The loss has no gradient through the result: it is constant between jumps, or of integers, or drawn."""
    RANDOM = enum.auto()
    """Other entries each time."""
    LOOKUP = enum.auto()
    """Reads entries of its first input at places that its second input names."""
    SCATTER = enum.auto()
    """Its first input with entries of the third written or added at the places of the second."""
    REDUCTION = enum.auto()
    """Reduces its first input over axes: its second input, since opset 18 (ReduceSum: 13)."""
    TOTAL = enum.auto()
    """A reduction that adds the entries up, or their squares or absolute values."""
    PRODUCT = enum.auto()
    """A matrix product, alone or with sums."""
    WEIGHTED = enum.auto()
    """Multiplies activations with a matrix of weights."""
    SOFTMAX = enum.auto()
    """Normalizes scores to shares of one, or is a part of it that exporters write alone."""
    RECURRENT = enum.auto()
    """A recurrent layer over a sequence."""
    SIZES = enum.auto()
    """Reads the shape of its operand and nothing else."""
    BODIES = enum.auto()
    """Holds graphs."""
    SEQUENCE = enum.auto()
    """The result is a sequence of tensors."""
    VARYING = enum.auto()
    """The shape of the result depends on what is in the operands."""
    DISTINCT = enum.auto()
    """The first result never names one place twice."""
    SETTINGS = enum.auto()
    """Inputs after the first are sizes, axes or counts, which kernels of every device read on the host."""
    HOST = enum.auto()
    """Run by ONNX Runtime on the host, also beside a device, where all that it reads is there."""
    BFLOAT16 = enum.auto()
    """Has a bfloat16 CPU kernel: found by opening a one-node session for each in onnxruntime 1.32."""
    NO_FLOAT64 = enum.auto()
    """Has no float64 CPU kernel there."""
    BINARY = ELEMENTWISE | BROADCASTS
    TEST = ELEMENTWISE | BOOLEAN | NO_GRADIENT


class Keeps(enum.Enum):
    """What is left of an operator's first input in its result: how it is a view of it."""

    PLACES = "every entry at its place, perhaps in another type"
    ORDER = "every entry, in the same order, in another shape"
    ENTRIES = "every entry once, in another order"
    SOME = "some of the entries"
    REPEATS = "every entry once or more"
    JOINS = "every entry, beside those of the other inputs"


@dataclass(frozen=True, slots=True)
class Operator:
    """One row: the name, what is true of the operator, and what it keeps of its first input.

    `lists` are the inputs that are lists of integers: a shape, axes, bounds, lengths or repeats.
    """

    name: str
    traits: Trait
    keeps: Keeps | None = None
    lists: tuple[int, ...] = ()
    domain: str = ""


T = Trait
_MICROSOFT: Final = "com.microsoft"
_ARITHMETIC: Final = T.BINARY | T.SAME_TYPE
_COMPARISON: Final = T.BINARY | T.TEST | T.COMPARES
_STEP: Final = T.ELEMENTWISE | T.NO_GRADIENT
_REDUCES: Final = T.REDUCTION | T.SETTINGS
_DRAWS: Final = T.RANDOM | T.NO_GRADIENT

TABLE: Final = (
    # views
    Operator("Identity", T.ELEMENTWISE | T.LINEAR | T.HOST | T.BFLOAT16, Keeps.PLACES),
    Operator("Cast", T.ELEMENTWISE | T.LINEAR | T.HOST | T.BFLOAT16, Keeps.PLACES),
    Operator("CastLike", T.ELEMENTWISE | T.LINEAR | T.BFLOAT16, Keeps.PLACES),
    Operator("Reshape", T.LINEAR | T.SETTINGS | T.HOST | T.BFLOAT16, Keeps.ORDER, lists=(1,)),
    Operator("Squeeze", T.LINEAR | T.SETTINGS | T.HOST | T.BFLOAT16, Keeps.ORDER, lists=(1,)),
    Operator("Unsqueeze", T.LINEAR | T.SETTINGS | T.HOST | T.BFLOAT16, Keeps.ORDER, lists=(1,)),
    Operator("Flatten", T.LINEAR | T.BFLOAT16, Keeps.ORDER),
    Operator("Transpose", T.LINEAR | T.BFLOAT16, Keeps.ENTRIES),
    Operator("Slice", T.LINEAR | T.SETTINGS | T.HOST | T.BFLOAT16, Keeps.SOME, lists=(1, 2, 3, 4)),
    Operator("Split", T.LINEAR | T.SETTINGS | T.BFLOAT16, Keeps.SOME, lists=(1,)),
    Operator("Expand", T.LINEAR | T.SETTINGS, Keeps.REPEATS, lists=(1,)),
    Operator("Tile", T.LINEAR | T.SETTINGS, Keeps.REPEATS, lists=(1,)),
    Operator("Concat", T.LINEAR | T.HOST | T.BFLOAT16, Keeps.JOINS),
    # sums, products, bounds
    Operator("Add", _ARITHMETIC | T.LINEAR | T.ADDS | T.HOST),
    Operator("Sub", _ARITHMETIC | T.LINEAR | T.ADDS | T.HOST),
    Operator("Sum", _ARITHMETIC | T.LINEAR | T.ADDS),
    Operator("Mean", _ARITHMETIC | T.LINEAR | T.NO_FLOAT64),
    Operator("Neg", T.ELEMENTWISE | T.LINEAR),
    Operator("Mul", _ARITHMETIC | T.SCALES | T.HOST),
    Operator("Div", _ARITHMETIC | T.SCALES | T.HOST),
    Operator("Mod", T.BINARY),
    Operator("Pow", T.BINARY | T.STEEP_AT_ZERO),
    Operator("Max", _ARITHMETIC | T.BOUNDS | T.HOST),
    Operator("Min", _ARITHMETIC | T.BOUNDS | T.HOST),
    Operator("Clip", T.ELEMENTWISE | T.BOUNDS | T.KEEPS_SIGN),
    Operator("Where", _ARITHMETIC | T.LINEAR),
    # functions of one number
    Operator("Abs", T.ELEMENTWISE | T.UNSIGNED),
    Operator("Acos", T.ELEMENTWISE | T.STEEP | T.NO_FLOAT64),
    Operator("Acosh", T.ELEMENTWISE | T.STEEP),
    Operator("Asin", T.ELEMENTWISE | T.STEEP | T.KEEPS_SIGN | T.NO_FLOAT64),
    Operator("Asinh", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Atan", T.ELEMENTWISE | T.KEEPS_SIGN | T.NO_FLOAT64),
    Operator("Atanh", T.ELEMENTWISE | T.STEEP | T.KEEPS_SIGN),
    Operator("Celu", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Cos", T.ELEMENTWISE),
    Operator("Cosh", T.ELEMENTWISE),
    Operator("Elu", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Erf", T.ELEMENTWISE | T.KEEPS_SIGN | T.NO_FLOAT64),
    Operator("Exp", T.ELEMENTWISE | T.SOFTMAX),
    Operator("Gelu", T.ELEMENTWISE | T.NO_FLOAT64),
    Operator("HardSigmoid", T.ELEMENTWISE),
    Operator("HardSwish", T.ELEMENTWISE),
    Operator("LeakyRelu", T.ELEMENTWISE),
    Operator("Log", T.ELEMENTWISE | T.STEEP_AT_ZERO),
    Operator("Mish", T.ELEMENTWISE),
    Operator("PRelu", T.ELEMENTWISE | T.SAME_TYPE),
    Operator("Reciprocal", T.ELEMENTWISE | T.STEEP_AT_ZERO | T.KEEPS_SIGN),
    Operator("Relu", T.ELEMENTWISE),
    Operator("Selu", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Shrink", T.ELEMENTWISE),
    Operator("Sigmoid", T.ELEMENTWISE),
    Operator("Sin", T.ELEMENTWISE),
    Operator("Sinh", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Softplus", T.ELEMENTWISE),
    Operator("Softsign", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("Sqrt", T.ELEMENTWISE | T.UNSIGNED | T.STEEP_AT_ZERO),
    Operator("Swish", T.ELEMENTWISE),
    Operator("Tan", T.ELEMENTWISE | T.STEEP | T.NO_FLOAT64),
    Operator("Tanh", T.ELEMENTWISE | T.KEEPS_SIGN),
    Operator("ThresholdedRelu", T.ELEMENTWISE),
    # steps: constant between jumps
    Operator("Ceil", _STEP),
    Operator("Floor", _STEP),
    Operator("Round", _STEP),
    Operator("Sign", _STEP | T.KEEPS_SIGN),
    # conditions
    Operator("Equal", _COMPARISON),
    Operator("Less", _COMPARISON),
    Operator("LessOrEqual", _COMPARISON),
    Operator("Greater", _COMPARISON),
    Operator("GreaterOrEqual", _COMPARISON),
    Operator("And", T.BINARY | T.TEST),
    Operator("Or", T.BINARY | T.TEST),
    Operator("Xor", T.BINARY | T.TEST),
    Operator("Not", T.TEST),
    Operator("IsNaN", T.TEST),
    Operator("IsInf", T.TEST),
    # random numbers
    Operator("Bernoulli", _DRAWS),
    Operator("Multinomial", _DRAWS),
    Operator("RandomNormal", _DRAWS),
    Operator("RandomNormalLike", _DRAWS),
    Operator("RandomUniform", _DRAWS),
    Operator("RandomUniformLike", _DRAWS),
    Operator("Dropout", T.RANDOM),
    # rows and places
    Operator("Gather", T.LOOKUP | T.HOST | T.BFLOAT16),
    Operator("GatherElements", T.LOOKUP | T.BFLOAT16),
    Operator("GatherND", T.LOOKUP | T.BFLOAT16),
    Operator("ScatterElements", T.SCATTER | T.BFLOAT16),
    Operator("ScatterND", T.SCATTER | T.BFLOAT16),
    Operator("OneHot", T.SETTINGS | T.NO_FLOAT64),
    Operator("ArgMax", T.INT64 | T.NO_GRADIENT),
    Operator("ArgMin", T.INT64 | T.NO_GRADIENT),
    Operator("NonZero", T.INT64 | T.NO_GRADIENT | T.VARYING | T.DISTINCT),
    Operator("Unique", T.VARYING | T.DISTINCT),
    Operator("Compress", T.VARYING),
    Operator("NonMaxSuppression", T.VARYING | T.NO_GRADIENT),
    Operator("StringSplit", T.VARYING | T.NO_GRADIENT),
    Operator("TopK", T.SETTINGS),
    Operator("Hardmax", T.NO_GRADIENT),
    # sizes, and tensors made of them
    Operator("Shape", T.SIZES | T.INT64 | T.NO_GRADIENT | T.BFLOAT16),
    Operator("Size", T.SIZES | T.INT64 | T.NO_GRADIENT),
    Operator("Constant", T.NO_GRADIENT | T.BFLOAT16),
    Operator("ConstantOfShape", T.NO_GRADIENT | T.BFLOAT16, lists=(0,)),
    Operator("EyeLike", T.NO_GRADIENT),
    Operator("Range", T.DISTINCT),
    Operator("Pad", T.LINEAR | T.SETTINGS, lists=(1,)),
    Operator("Resize", T.SETTINGS),
    Operator("Trilu", T.LINEAR | T.SETTINGS),
    # reductions
    Operator("ReduceL1", _REDUCES | T.TOTAL, lists=(1,)),
    Operator("ReduceL2", _REDUCES, lists=(1,)),
    Operator("ReduceLogSum", _REDUCES, lists=(1,)),
    Operator("ReduceLogSumExp", _REDUCES | T.SOFTMAX, lists=(1,)),
    Operator("ReduceMax", _REDUCES, lists=(1,)),
    Operator("ReduceMean", _REDUCES | T.LINEAR, lists=(1,)),
    Operator("ReduceMin", _REDUCES, lists=(1,)),
    Operator("ReduceProd", _REDUCES | T.HOST, lists=(1,)),
    Operator("ReduceSum", _REDUCES | T.LINEAR | T.TOTAL, lists=(1,)),
    Operator("ReduceSumSquare", _REDUCES | T.TOTAL, lists=(1,)),
    Operator("CumSum", T.LINEAR | T.SETTINGS),
    # matrices of weights
    Operator("MatMul", T.PRODUCT | T.WEIGHTED | T.SAME_TYPE),
    Operator("Gemm", T.PRODUCT | T.WEIGHTED | T.SAME_TYPE),
    Operator("Einsum", T.PRODUCT | T.WEIGHTED),
    Operator("FusedMatMul", T.PRODUCT | T.WEIGHTED, domain=_MICROSOFT),
    Operator("Conv", T.WEIGHTED),
    Operator("ConvTranspose", T.WEIGHTED),
    Operator("LSTM", T.WEIGHTED | T.RECURRENT),
    Operator("GRU", T.WEIGHTED | T.RECURRENT),
    Operator("RNN", T.WEIGHTED | T.RECURRENT),
    Operator("LSTMTraining", T.WEIGHTED | T.RECURRENT, domain=_MICROSOFT),
    Operator("GRUTraining", T.WEIGHTED | T.RECURRENT, domain=_MICROSOFT),
    # activations of ONNX Runtime
    Operator("BiasGelu", T.NO_FLOAT64, domain=_MICROSOFT),
    # losses over classes
    Operator("Softmax", T.SOFTMAX),
    Operator("LogSoftmax", T.SOFTMAX),
    Operator("SoftmaxCrossEntropyLoss", T.SOFTMAX),
    Operator("NegativeLogLikelihoodLoss", T.SOFTMAX),
    # graphs and sequences
    Operator("If", T.BODIES | T.BFLOAT16),
    Operator("Loop", T.BODIES | T.BFLOAT16),
    Operator("Scan", T.BODIES | T.BFLOAT16),
    Operator("SequenceMap", T.BODIES | T.SEQUENCE),
    Operator("SequenceConstruct", T.SEQUENCE),
    Operator("SequenceEmpty", T.SEQUENCE),
    Operator("SequenceErase", T.SEQUENCE),
    Operator("SequenceInsert", T.SEQUENCE),
    Operator("SplitToSequence", T.SEQUENCE),
)


@functools.cache
def having(traits: Trait) -> frozenset[str]:
    """Return the names of the operators that have every one of these traits."""
    return frozenset(row.name for row in TABLE if traits in row.traits)


@functools.cache
def keeping(*parts: Keeps) -> frozenset[str]:
    """Return the names of the operators that are views of their first input in one of these ways."""
    return frozenset(row.name for row in TABLE if row.keeps in parts)


ELEMENTWISE: Final = having(T.ELEMENTWISE)
"""One result, whose entries depend on the operands' entries at the same place, broadcast."""
COMPARISONS: Final = having(T.COMPARES)
RANDOM: Final = having(T.RANDOM)
LOOKUPS: Final = having(T.LOOKUP)
SCATTERS: Final = having(T.SCATTER)
REDUCTIONS: Final = having(T.REDUCTION)
PRODUCTS: Final = having(T.PRODUCT)
SIZES: Final = having(T.SIZES)
BODIES: Final = having(T.BODIES)
NO_GRADIENT: Final = having(T.NO_GRADIENT)
"""Operators through whose result no gradient passes; of a Cast to integers its type says so."""
ORDERED_VIEWS: Final = keeping(Keeps.PLACES, Keeps.ORDER)
"""Operators whose result has the entries of their first input, in the same order."""
VIEWS: Final = ORDERED_VIEWS | keeping(Keeps.ENTRIES)
"""Operators whose result has the entries of their first input, each once."""
