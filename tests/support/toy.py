"""A hand-written whole-step model in the runtime's contract, and the same step in NumPy.

A lookup model with a linear readout, V rows of width D, batch of B examples:

    h = emb.weight[ids + offset·0],  p = Σ_D h · readout,  loss = mean (p − y)²

The table's gradient rows are preconditioned with counts (decay 0.99) and the inverse root of G (decay 0.95),
refreshed at steps 1, 2 and multiples of three; the readout takes momentum steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from kfac_onnx import dialect, metadata
from kfac_onnx.metadata import IdCheck, LearningRate, Phase, RootCheck, State, Step

V, D, B = 23, 4, 6
RHO = 0.01
DECAY_A, DECAY_G = 0.99, 0.95


def parameters(seed: int = 0, vocab: int = V) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "emb.weight": rng.normal(size=(vocab, D)).astype(np.float32),
        "readout": rng.normal(size=D).astype(np.float32),
    }


def batches(count: int, seed: int = 1, vocab: int = V, size: int = B) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "ids": rng.integers(0, vocab, size).astype(np.int64),
            "y": rng.normal(size=size).astype(np.float32),
        }
        for _ in range(count)
    ]


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.phase = Phase.GRADIENTS

    def add(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object
    ) -> str:
        node = helper.make_node(op, inputs, outputs, name=f"{op}_{outputs[0]}", domain=domain, **attributes)
        self.tag(node)
        self.nodes.append(node)
        return outputs[0]

    def kfac(self, op: str, inputs: list[str], outputs: list[str], **attributes: object) -> str:
        return self.add(op, inputs, outputs, "ai.kfac", **attributes)

    def tag(self, node: onnx.NodeProto) -> None:
        entry = node.metadata_props.add()
        entry.key, entry.value = "kfac.phase", self.phase.value

    def select(self, new: str, old: str, output: str) -> str:
        before, self.phase = self.phase, Phase.SELECT
        self.add("Where", ["ok", new, old], [output])
        self.phase = before
        return output


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(value, name)


def _value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


F, I64, F64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.BOOL


def whole_step(
    *,
    vocab: int = V,
    negatives: str = "wrap",
    tolerance: float = 1e-2,
    with_values: bool = False,
    kfac: bool = True,
    renormalize_below: float = 0.0,
    dropout: bool = False,
    ordered: bool = False,
    due_by: str = "t/new",
) -> ir.Model:
    """Build the model; without `kfac` both parameters take plain steps (gradients and commit only).

    `ordered` makes the counts depend on what they were; `due_by` is what the refresh is computed from.
    """
    g = _Graph()
    g.add("Add", ["ids", "zero_i"], ["row_ids"])
    g.add("Gather", ["emb.weight", "row_ids"], ["h0"], axis=0)
    g.add("Dropout", ["h0", "half", "true"] if dropout else ["h0"], ["h"])
    g.add("Mul", ["h", "readout"], ["hw"])
    g.add("ReduceSum", ["hw", "axis1"], ["p"], keepdims=0)
    g.add("Sub", ["p", "y"], ["e"])
    g.add("Mul", ["e", "e"], ["ee"])
    g.add("ReduceMean", ["ee"], ["loss"], keepdims=0)
    g.add("Shape", ["row_ids"], ["ids_shape"])
    g.add("Size", ["row_ids"], ["n_i"])
    g.add("Cast", ["n_i"], ["n"], to=F)
    g.add("Div", ["two", "n"], ["two_n"])
    g.add("Mul", ["e", "two_n"], ["de"])
    g.add("Unsqueeze", ["de", "axis1"], ["de1"])
    g.add("Mul", ["de1", "readout"], ["rows"])
    g.add("Mul", ["de1", "h"], ["dw"])
    g.add("ReduceSum", ["dw", "axis0"], ["readout_grad"], keepdims=0)
    states = [
        State(
            "emb.weight",
            "emb.weight/next",
            (vocab, D),
            "float32",
            "parameter",
            Phase.COMMIT,
            "in-place",
            "emb.weight/written",
            "parameter",
            "emb.weight",
            ("emb.weight", "emb.weight/written"),
        ),
        State(
            "readout",
            "readout/next",
            (D,),
            "float32",
            "parameter",
            Phase.PRECONDITION,
            "double",
            "readout/new",
            "parameter",
            "readout",
        ),
        State(
            "readout/v",
            "readout/v/next",
            (D,),
            "float32",
            "zeros",
            Phase.PRECONDITION,
            "double",
            "readout/v/new",
            "optimizer",
            "readout",
        ),
        State("t", "t/next", (), "int64", 0.0, Phase.GRADIENTS, "double", "t/new", "counter"),
    ]
    g.add("Add", ["t", "one_i"], ["t/new"])
    checks: tuple[RootCheck, ...] = ()
    if kfac:
        states += _kfac_nodes(g, vocab, renormalize_below, ordered=ordered, due_by=due_by)
        checks = (RootCheck("emb.weight", "root/now", "G/hat", "damping_g", "residual", -0.5, tolerance),)
    g.phase = Phase.PRECONDITION
    update = "update" if kfac else "rows"
    if kfac:
        g.add("Gather", ["A/counted", "row_ids"], ["a_raw64"], axis=0)
        g.add("Cast", ["a_raw64"], ["a_raw"], to=F)
        g.add("Mul", ["a_raw", "gain"], ["a"])
        g.kfac("PreconditionRows", ["rows", "a", "damping_a", "root/now", "one"], ["update"], exponent=-0.5)
    g.kfac(
        "Momentum",
        ["readout", "readout_grad", "readout/v", "kfac/rest_lr"],
        ["readout/new", "readout/v/new"],
        mu=0.9,
    )
    flags = [update, "readout/new", *(["G/new", "root/now"] if kfac else [])]
    for index, name in enumerate(flags):
        g.kfac("AllFinite", [name], [f"flag{index}"])
    g.add("Sum", [f"flag{index}" for index in range(len(flags))], ["flags"])
    g.add("Equal", ["flags", "zero"], ["ok"])
    g.select(update, "zero", "update/kept")
    g.phase = Phase.COMMIT
    g.kfac("ApplyRows", ["emb.weight", "row_ids", "update/kept", "kfac/lr"], ["emb.weight/written"])
    if kfac:
        g.phase = Phase.UNDO
        g.kfac("WriteRows", ["A/counted", "row_ids", "A/before"], ["A/undone"])
        g.select("A/counted", "A/undone", "A/kept")
        if renormalize_below:
            g.phase = Phase.RENORMALIZE
            _renormalize(g)
    for state in states:
        if state.input == "emb.weight":
            g.phase = Phase.SELECT
            g.add("Identity", [state.candidate], [state.output])
        elif state.input == "A":
            g.phase = Phase.SELECT
            g.add("Identity", ["A/kept" if not renormalize_below else "A/renormalized"], [state.output])
        else:
            g.select(state.candidate, state.input, state.output)
    return _finish(g, states, checks, vocab=vocab, negatives=negatives, with_values=with_values)


def _kfac_nodes(
    g: _Graph, vocab: int, renormalize_below: float, *, ordered: bool, due_by: str
) -> list[State]:
    g.kfac(
        "InputFactorDecay",
        ["A.scale", "A.total", "A.count", "n"],
        ["A.scale/new", "A.total/new", "A.count/new", "increment", "gain", "total_a"],
        decay=DECAY_A,
        debias=1,
        normalize=1,
    )
    scale = "A.scale/new"
    if renormalize_below:
        g.add("Less", ["A.scale/new", "least"], ["renormalize"])
        g.add("Where", ["renormalize", "one64", "A.scale/new"], ["A.scale/kept"])
        scale = "A.scale/kept"
    g.add("Gather", ["A", "row_ids"], ["A/before"], axis=0)
    g.add("Cast", ["increment"], ["increment64"], to=TensorProto.DOUBLE)
    if ordered:
        g.add("Sub", ["A/before", "A/before"], ["nothing"])
        g.add("Add", ["nothing", "increment64"], ["increments"])
    else:
        g.add("Expand", ["increment64", "ids_shape"], ["increments"])
    g.kfac(
        "OutputFactorUpdate",
        ["G", "G.count", "rows", "n", "one"],
        ["G/new", "G.count/new"],
        decay=DECAY_G,
    )
    g.kfac("FactorDebias", ["G/new", "G.count/new"], ["G/hat"], decay=DECAY_G)
    g.kfac("FactorTrace", ["G/hat"], ["trace"])
    g.kfac("DampingRelative", ["total_a"], ["damping_a"], rho=RHO, size=vocab)
    g.kfac("DampingRelative", ["trace"], ["damping_g"], rho=RHO, size=D)
    g.add("Mod", [due_by, "three"], ["t3"])
    g.add("Equal", ["t3", "zero_i"], ["due"])
    g.add("LessOrEqual", ["t/new", "two_i"], ["early"])
    g.add("Or", ["due", "early"], ["refresh"])
    g.phase = Phase.COUNT
    g.kfac("InputFactorUpdate", ["A", "row_ids", "increments"], ["A/counted"])
    g.phase = Phase.REFRESH
    then = helper.make_graph(
        [
            helper.make_node(
                "FactorInverseRoot",
                ["G/hat", "damping_g", "root"],
                ["r", "s"],
                domain="ai.kfac",
                iterations=20,
            )
        ],
        "then",
        [],
        [_value("r", F, [D, D]), _value("s", F, [])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["root"], ["r"]), helper.make_node("Identity", ["zero"], ["s"])],
        "else",
        [],
        [_value("r", F, [D, D]), _value("s", F, [])],
    )
    g.add("If", ["refresh"], ["root/now", "residual"], then_branch=then, else_branch=other)
    g.phase = Phase.GRADIENTS
    aliases = ("A", "A/counted", "A/undone", "A/kept", *(("A/renormalized",) if renormalize_below else ()))

    def double(name: str, dtype: str, shape: tuple[int, ...], initial: str | float, candidate: str) -> State:
        return State(
            name,
            f"{name}/next",
            shape,
            dtype,
            initial,
            Phase.GRADIENTS,
            "double",
            candidate,
            "factor",
            "emb.weight",
        )

    return [
        State(
            "A",
            "A/next",
            (vocab,),
            "float64",
            "zeros",
            Phase.COUNT,
            "in-place",
            "A/counted",
            "factor",
            "emb.weight",
            aliases,
        ),
        double("A.scale", "float64", (), 1.0, scale),
        double("A.total", "float64", (), 0.0, "A.total/new"),
        double("A.count", "int64", (), 0.0, "A.count/new"),
        double("G", "float32", (D, D), "zeros", "G/new"),
        double("G.count", "int64", (), 0.0, "G.count/new"),
        double("root", "float32", (D, D), "identity", "root/now"),
    ]


def _renormalize(g: _Graph) -> None:
    then = helper.make_graph(
        [helper.make_node("Mul", ["A/kept", "A.scale/new"], ["x"])],
        "then",
        [],
        [_value("x", TensorProto.DOUBLE, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["A/kept"], ["x"])], "else", [], [_value("x", TensorProto.DOUBLE, None)]
    )
    g.add("If", ["renormalize"], ["A/renormalized"], then_branch=then, else_branch=other)


def _finish(
    g: _Graph,
    states: list[State],
    checks: tuple[RootCheck, ...],
    *,
    vocab: int,
    negatives: str,
    with_values: bool,
) -> ir.Model:
    kinds = {"float32": F, "float64": F64, "int64": I64}
    inputs = [_value("ids", I64, ["batch"]), _value("y", F, ["batch"])]
    inputs += [_value(s.input, kinds[s.dtype], list(s.shape)) for s in states]
    inputs += [_value("kfac/lr", F, []), _value("kfac/rest_lr", F, [])]
    outputs = [_value("loss", F, [])] + [_value(s.output, kinds[s.dtype], list(s.shape)) for s in states]
    constants = {
        "zero_i": np.array(0, np.int64),
        "one_i": np.array(1, np.int64),
        "two_i": np.array(2, np.int64),
        "three": np.array(3, np.int64),
        "axis0": np.array([0], np.int64),
        "axis1": np.array([1], np.int64),
        "two": np.array(2, np.float32),
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.float32),
        "half": np.array(0.5, np.float32),
        "true": np.array(True),
        "one64": np.array(1.0),
        "least": np.array(0.9),
        "kfac/lr": np.array(0.05, np.float32),
        "kfac/rest_lr": np.array(0.01, np.float32),
    }
    if with_values:
        constants |= parameters(vocab=vocab)
    graph = helper.make_graph(
        g.nodes, "toy", inputs, outputs, [_constant(k, v) for k, v in constants.items()]
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("ai.kfac", 1)],
        ir_version=10,
    )
    model = ir.from_proto(proto)
    dialect.attach(model, "safe")
    step = Step(
        loss="loss",
        ok="ok",
        batch=("ids", "y"),
        learning_rates=(LearningRate("kfac/lr", 0.05), LearningRate("kfac/rest_lr", 0.01)),
        id_checks=(IdCheck("emb.weight", "row_ids", vocab, negatives),),
        root_checks=checks,
    )
    metadata.write(model, "state", states)
    metadata.write(model, "step", step)
    metadata.write(model, "loss", metadata.Loss("loss", "mean"))
    return model


@dataclass
class Twin:
    """The same training in float64."""

    emb: np.ndarray
    readout: np.ndarray
    lr: float = 0.05
    rest_lr: float = 0.01
    kfac: bool = True
    t: int = 0
    a: np.ndarray = field(default_factory=lambda: np.zeros(0))
    G: np.ndarray = field(default_factory=lambda: np.zeros((D, D)))
    v: np.ndarray = field(default_factory=lambda: np.zeros(D))
    root: np.ndarray = field(default_factory=lambda: np.eye(D))

    @classmethod
    def start(cls, values: dict[str, np.ndarray], **settings: object) -> Twin:
        emb = values["emb.weight"].astype(np.float64)
        return cls(emb, values["readout"].astype(np.float64), a=np.zeros(len(emb)), **settings)  # type: ignore[arg-type]

    def step(self, batch: dict[str, np.ndarray], factor: float = 1.0) -> float:
        ids, y = batch["ids"], batch["y"].astype(np.float64)
        self.t += 1
        h = self.emb[ids]
        e = h @ self.readout - y
        de = 2 * e / len(ids)
        rows, grad = de[:, None] * self.readout, (de[:, None] * h).sum(0)
        update = rows
        if self.kfac:
            counts = np.bincount(ids, minlength=len(self.emb)) / len(ids)
            self.a = DECAY_A * self.a + (1 - DECAY_A) * counts
            self.G = DECAY_G * self.G + (1 - DECAY_G) * rows.T @ rows / len(ids)
            a, G = self.a / (1 - DECAY_A**self.t), self.G / (1 - DECAY_G**self.t)
            if self.t <= 2 or self.t % 3 == 0:
                w, Q = np.linalg.eigh(G + RHO * np.trace(G) / D * np.eye(D))
                self.root = (Q / np.sqrt(w)) @ Q.T
            update = (a[ids] + RHO * a.mean())[:, None] ** -0.5 * (rows @ self.root)
        np.subtract.at(self.emb, ids, self.lr * factor * update)
        self.v = 0.9 * self.v + grad
        self.readout = self.readout - self.rest_lr * factor * self.v
        return float(np.mean(e**2))
