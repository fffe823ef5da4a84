"""Optimizers written in every algebraic form that exporters leave: name -> (kind in the notes, form)."""

from __future__ import annotations

from update_graphs import Optimizer

LR = "float lr = {0.1}"
ONE = "float one = {1.0}"
ADAM = (
    "float beta1 = {0.9}, float beta2 = {0.999}, float rest1 = {0.1}, float rest2 = {0.001}, float eps = {0.00000001}, "
    "float lr = {0.01}, float one = {1.0}, float half = {0.5}"
)
MOMENTS = """
    a{n} = Mul(beta1, m{n})  d{n} = Mul(rest1, {g})  m{n}_ = Add(a{n}, d{n})
    q{n} = Mul({g}, {g})  f{n} = Mul(beta2, w{n})  k{n} = Mul(rest2, q{n})  w{n}_ = Add(f{n}, k{n})
"""
ADAM_STATE = {"inputs": ("m{n}", "w{n}"), "outputs": ("m{n}_", "w{n}_")}
CORRECT = """
    t_ = Add(t, one)  x1 = Pow(beta1, t_)  x2 = Pow(beta2, t_)  y1 = Sub(one, x1)  y2 = Sub(one, x2)
"""
COUNTED = {"shared": ("float t",), "results": ("float t_",)}

FORMS: dict[str, tuple[str, Optimizer]] = {
    "sub of rate times gradient": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul(lr, {g}) {new} = Sub({p}, s{n})", constants=LR)),
    "gradient times rate": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul({g}, lr) {new} = Sub({p}, s{n})", constants=LR)),
    "add of the negative": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul(lr, {g}) u{n} = Neg(s{n}) {new} = Add({p}, u{n})", constants=LR)),
    "add, parameter second": ("sgd, learning rate 0.1", Optimizer("u{n} = Neg({g}) s{n} = Mul(u{n}, lr) {new} = Add(s{n}, {p})", constants=LR)),
    "negative rate": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul({g}, lr) {new} = Add({p}, s{n})", constants="float lr = {-0.1}")),
    "negative rate by Sum": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul({g}, lr) {new} = Sum(s{n}, {p})", constants="float lr = {-0.1}")),
    "divided": ("sgd, learning rate 0.1", Optimizer("s{n} = Div({g}, ten) {new} = Sub({p}, s{n})", constants="float ten = {10.0}")),
    "rate one": ("sgd", Optimizer("{new} = Sub({p}, {g})")),
    "rate one multiplied": ("sgd", Optimizer("s{n} = Mul({g}, one) {new} = Sub({p}, s{n})", constants=ONE)),
    "rate spread out": ("sgd, learning rate 0.1", Optimizer(
        "z{n} = Shape({p}) l{n} = Expand(lr, z{n}) s{n} = Mul({g}, l{n}) {new} = Sub({p}, s{n})", constants=LR)),
    "rate as a vector of one": ("sgd, learning rate 0.1", Optimizer("s{n} = Mul({g}, lr) {new} = Sub({p}, s{n})", constants="float[1] lr = {0.1}")),
    "rate is an input": ("sgd", Optimizer("s{n} = Mul(lr, {g}) {new} = Sub({p}, s{n})", shared=("float lr",))),
    "rate is an input, negated": ("sgd", Optimizer(
        "s{n} = Mul({g}, mlr) {new} = Add({p}, s{n})", shared=("float lr",), common="mlr = Neg(lr)")),
    "rate decays": ("sgd", Optimizer(
        "s{n} = Mul(rate, {g}) {new} = Sub({p}, s{n})", shared=("float t",), results=("float t_",), constants=f"{LR}, {ONE}",
        common="t_ = Add(t, one) rate = Div(lr, t_)")),
    "through views": ("sgd, learning rate 0.1", Optimizer(
        "i{n} = Identity({g}) s{n} = Mul(lr, i{n}) j{n} = Identity({p}) k{n} = Sub(j{n}, s{n}) {new} = Identity(k{n})", constants=LR)),
    "flat": ("sgd, learning rate 0.1", Optimizer(
        "x{n} = Reshape({g}, flat) s{n} = Mul(lr, x{n}) z{n} = Reshape({p}, flat) k{n} = Sub(z{n}, s{n}) "
        "o{n} = Shape({p}) {new} = Reshape(k{n}, o{n})", constants=f"{LR}, int64[1] flat = {{-1}}")),
    "weight decay in the gradient": ("sgd, learning rate 0.1, with weight decay", Optimizer(
        "d{n} = Mul(wd, {p}) a{n} = Add({g}, d{n}) s{n} = Mul(lr, a{n}) {new} = Sub({p}, s{n})", constants=f"{LR}, float wd = {{0.01}}")),
    "weight decay, added negative": ("sgd, learning rate 0.1, with weight decay", Optimizer(
        "d{n} = Mul({p}, wd) a{n} = Add(d{n}, {g}) s{n} = Mul(a{n}, lr) {new} = Add({p}, s{n})", constants="float lr = {-0.1}, float wd = {0.01}")),
    "weight decay beside": ("sgd, learning rate 0.1, with weight decay", Optimizer(
        "d{n} = Mul(wd, {p}) a{n} = Sub({p}, d{n}) s{n} = Mul(lr, {g}) {new} = Sub(a{n}, s{n})", constants=f"{LR}, float wd = {{0.001}}")),
    "weight decay as a factor": ("sgd, learning rate 0.1, with weight decay", Optimizer(
        "a{n} = Mul({p}, keep) s{n} = Mul(lr, {g}) {new} = Sub(a{n}, s{n})", constants=f"{LR}, float keep = {{0.999}}")),
    "weight decay as a factor of the rate": ("sgd, with weight decay", Optimizer(
        "a{n} = Mul({p}, keep) s{n} = Mul(lr, {g}) {new} = Sub(a{n}, s{n})", shared=("float lr",), constants=f"{ONE}, float wd = {{0.01}}",
        common="lw = Mul(lr, wd) keep = Sub(one, lw)")),
    "clipped by value": ("sgd, learning rate 0.1, with gradients clipped", Optimizer(
        "c{n} = Clip({g}, low, high) s{n} = Mul(lr, c{n}) {new} = Sub({p}, s{n})", constants=f"{LR}, float low = {{-1.0}}, float high = {{1.0}}")),
    "clipped by the norm of all": ("sgd, learning rate 0.1, with gradients clipped", Optimizer(
        "c{n} = Mul({g}, scale) s{n} = Mul(lr, c{n}) {new} = Sub({p}, s{n})", constants=f"{LR}, float most = {{1.0}}, float one = {{1.0}}",
        common="n1 = ReduceSumSquare<keepdims: int = 0>(dW) n2 = ReduceSumSquare<keepdims: int = 0>(dv) n3 = Add(n1, n2) "
        "norm = Sqrt(n3) ratio = Div(most, norm) scale = Min(ratio, one)")),
    "clipped if the norm is large": ("sgd, learning rate 0.1, with gradients clipped", Optimizer(
        "a{n} = Div({g}, norm) b{n} = Mul(a{n}, most) c{n} = Where(small, {g}, b{n}) s{n} = Mul(mlr, c{n}) {new} = Add({p}, s{n})",
        constants="float mlr = {-0.1}, float most = {1.0}",
        common="n1 = ReduceSumSquare<keepdims: int = 0>(dW) n2 = ReduceSumSquare<keepdims: int = 0>(dv) n3 = Add(n1, n2) "
        "norm = Sqrt(n3) small = Less(norm, most)")),
    "only if finite": ("sgd, learning rate 0.1", Optimizer(
        "s{n} = Mul(lr, {g}) k{n} = Sub({p}, s{n}) {new} = Where(fine, k{n}, {p})", constants=LR,
        common="n1 = ReduceSum<keepdims: int = 0>(dW) bad = IsNaN(n1) fine = Not(bad)")),
    "loss scale undone": ("sgd, learning rate 0.1", Optimizer(
        "x{n} = Mul({g}, loss_scale) i{n} = Div(x{n}, loss_scale) s{n} = Mul(lr, i{n}) {new} = Sub({p}, s{n})", shared=("float loss_scale",), constants=LR)),
    "sign": ("sgd, learning rate 0.1", Optimizer("c{n} = Sign({g}) s{n} = Mul(lr, c{n}) {new} = Sub({p}, s{n})", constants=LR)),
    "momentum": ("momentum", Optimizer(
        "a{n} = Mul(mu, m{n}) m{n}_ = Add(a{n}, {g}) s{n} = Mul(lr, m{n}_) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), constants=f"{LR}, float mu = {{0.9}}")),
    "momentum, gradient first": ("momentum", Optimizer(
        "a{n} = Mul(m{n}, mu) m{n}_ = Add({g}, a{n}) s{n} = Mul(m{n}_, lr) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), shared=("float lr",), constants="float mu = {0.9}")),
    "momentum of one": ("momentum", Optimizer(
        "m{n}_ = Add(m{n}, {g}) s{n} = Mul(lr, m{n}_) {new} = Sub({p}, s{n})", ("m{n}",), ("m{n}_",), constants=LR)),
    "momentum as an average": ("momentum", Optimizer(
        "a{n} = Mul(mu, m{n}) b{n} = Mul(nu, {g}) m{n}_ = Add(a{n}, b{n}) s{n} = Mul(lr, m{n}_) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), constants=f"{LR}, float mu = {{0.9}}, float nu = {{0.1}}")),
    "momentum with the rate inside": ("momentum", Optimizer(
        "a{n} = Mul(mu, m{n}) b{n} = Mul(lr, {g}) m{n}_ = Sub(a{n}, b{n}) {new} = Add({p}, m{n}_)",
        ("m{n}",), ("m{n}_",), shared=("float lr",), constants="float mu = {0.9}")),
    "nesterov": ("momentum", Optimizer(
        "a{n} = Mul(mu, m{n}) m{n}_ = Add(a{n}, {g}) b{n} = Mul(mu, m{n}_) c{n} = Add({g}, b{n}) s{n} = Mul(lr, c{n}) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), constants=f"{LR}, float mu = {{0.9}}")),
    "nesterov in two sums": ("momentum", Optimizer(
        "a{n} = Mul(mu, m{n}) b{n} = Mul(lr, {g}) m{n}_ = Sub(a{n}, b{n}) c{n} = Mul(mu, m{n}_) d{n} = Add({p}, c{n}) {new} = Sub(d{n}, b{n})",
        ("m{n}",), ("m{n}_",), shared=("float lr",), constants="float mu = {0.9}")),
    "momentum with weight decay": ("momentum, learning rate 0.1, with weight decay", Optimizer(
        "d{n} = Mul(wd, {p}) e{n} = Add({g}, d{n}) a{n} = Mul(mu, m{n}) m{n}_ = Add(a{n}, e{n}) s{n} = Mul(lr, m{n}_) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), constants=f"{LR}, float mu = {{0.9}}, float wd = {{0.01}}")),
    "adam": ("adam", Optimizer(
        MOMENTS + "i{n} = Div(m{n}_, y1) j{n} = Div(w{n}_, y2) z{n} = Sqrt(j{n}) o{n} = Add(z{n}, eps) u{n} = Div(i{n}, o{n}) s{n} = Mul(lr, u{n}) {new} = Sub({p}, s{n})",
        **ADAM_STATE, **COUNTED, common=CORRECT, constants=ADAM)),
    "adam, corrected rate": ("adam", Optimizer(
        MOMENTS + "z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) i{n} = Mul(rate, m{n}_) s{n} = Div(i{n}, o{n}) {new} = Sub({p}, s{n})",
        **ADAM_STATE, **COUNTED, common=CORRECT + "y3 = Sqrt(y2) y4 = Div(y3, y1) rate = Mul(lr, y4)", constants=ADAM)),
    "adam by powers": ("adam", Optimizer(
        MOMENTS + "z{n} = Pow(w{n}_, half) o{n} = Add(z{n}, eps) i{n} = Reciprocal(o{n}) u{n} = Mul(m{n}_, i{n}) s{n} = Mul(mlr, u{n}) {new} = Add({p}, s{n})",
        **ADAM_STATE, constants=ADAM, common="mlr = Neg(lr)")),
    "adam by differences": ("adam", Optimizer(
        "a{n} = Sub({g}, m{n}) b{n} = Mul(rest1, a{n}) m{n}_ = Add(m{n}, b{n}) q{n} = Mul({g}, {g}) f{n} = Sub(q{n}, w{n}) k{n} = Mul(rest2, f{n}) w{n}_ = Add(w{n}, k{n}) "
        "z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) u{n} = Div(m{n}_, o{n}) s{n} = Mul(lr, u{n}) {new} = Sub({p}, s{n})",
        **ADAM_STATE, constants=ADAM)),
    "adamw": ("adam, learning rate 0.01, with weight decay", Optimizer(
        MOMENTS + "z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) u{n} = Div(m{n}_, o{n}) r{n}_ = Mul(rest2, {p}) e{n} = Add(u{n}, r{n}_) s{n} = Mul(lr, e{n}) {new} = Sub({p}, s{n})",
        **ADAM_STATE, constants=ADAM)),
    "adamw as a factor": ("adam, learning rate 0.01, with weight decay", Optimizer(
        MOMENTS + "z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) u{n} = Div(m{n}_, o{n}) x{n}_ = Mul(keep, {p}) s{n} = Mul(lr, u{n}) {new} = Sub(x{n}_, s{n})",
        **ADAM_STATE, constants=ADAM + ", float keep = {0.9999}")),
    "adam, clipped": ("adam, learning rate 0.01, with gradients clipped", Optimizer(
        "g{n} = Mul({g}, scale)" + MOMENTS.replace("{g}", "g{n}")
        + "z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) u{n} = Div(m{n}_, o{n}) s{n} = Mul(lr, u{n}) {new} = Sub({p}, s{n})",
        **ADAM_STATE, constants=ADAM + ", float most = {1.0}",
        common="n1 = ReduceSumSquare<keepdims: int = 0>(dW) n2 = ReduceSumSquare<keepdims: int = 0>(dv) n3 = Add(n1, n2) "
        "norm = Sqrt(n3) ratio = Div(most, norm) scale = Min(ratio, one)")),
    "adagrad": ("adagrad or rmsprop", Optimizer(
        "q{n} = Mul({g}, {g}) w{n}_ = Add(w{n}, q{n}) z{n} = Sqrt(w{n}_) o{n} = Add(z{n}, eps) u{n} = Div({g}, o{n}) s{n} = Mul(lr, u{n}) {new} = Sub({p}, s{n})",
        ("w{n}",), ("w{n}_",), constants=ADAM)),
    "adagrad that spares zeros": ("adagrad or rmsprop", Optimizer(
        "q{n} = Mul({g}, {g}) w{n}_ = Add(q{n}, w{n}) x{n} = Add(w{n}_, eps) z{n} = Sqrt(x{n}) i{n} = Reciprocal(z{n}) b{n} = Greater(w{n}_, none) "
        "o{n} = Where(b{n}, i{n}, none) u{n} = Mul(o{n}, {g}) s{n} = Mul(mlr, u{n}) {new} = Add({p}, s{n})",
        ("w{n}",), ("w{n}_",), constants=ADAM + ", float none = {0.0}, float mlr = {-0.01}")),
    "rmsprop": ("adagrad or rmsprop", Optimizer(
        "q{n} = Pow({g}, two) f{n} = Mul(beta2, w{n}) k{n} = Mul(rest2, q{n}) w{n}_ = Add(f{n}, k{n}) x{n} = Add(w{n}_, eps) z{n} = Sqrt(x{n}) s{n} = Mul(lr, {g}) u{n} = Div(s{n}, z{n}) {new} = Sub({p}, u{n})",
        ("w{n}",), ("w{n}_",), constants=ADAM)),
    "lion": ("momentum", Optimizer(
        "a{n} = Mul(beta1, m{n}) d{n} = Mul(rest1, {g}) e{n} = Add(a{n}, d{n}) c{n} = Sign(e{n}) f{n} = Mul(beta2, m{n}) k{n} = Mul(rest2, {g}) m{n}_ = Add(f{n}, k{n}) s{n} = Mul(lr, c{n}) {new} = Sub({p}, s{n})",
        ("m{n}",), ("m{n}_",), constants=ADAM)),
    "rows scattered": ("sgd, learning rate 0.1", Optimizer(
        "s{n} = Mul(lr, {g}) {new} = Sub({p}, s{n})", constants=LR,
        tables='s{n} = Mul(lr, dh) u{n} = Neg(s{n}) {new} = ScatterND<reduction: string = "add">({p}, index, u{n})')),
    "rows scattered by elements": ("sgd, learning rate 0.1", Optimizer(
        "s{n} = Mul({g}, lr) {new} = Add({p}, s{n})", constants="float lr = {-0.1}",
        tables='s{n} = Mul(lr, dh) z{n} = Shape(dh) i{n} = Expand(index, z{n}) {new} = ScatterElements<axis: int = 0, reduction: string = "add">({p}, i{n}, s{n})')),
    "averaged parameters beside": ("sgd, learning rate 0.1", Optimizer(
        "s{n} = Mul(lr, {g}) {new} = Sub({p}, s{n}) a{n} = Mul(keep, m{n}) b{n} = Mul(rest, {new}) m{n}_ = Add(a{n}, b{n})",
        ("m{n}",), ("m{n}_",), constants=f"{LR}, float keep = {{0.9}}, float rest = {{0.1}}")),
}  # fmt: skip
