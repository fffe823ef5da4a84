"""Training graphs made from ONNX text: a forward graph whose parameters are inputs, and its gradients.

Parameters are inputs, so that a graph is small whatever the vocabulary; their values come from a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

__all__ = ["bags", "factorisation", "ratings", "training_graph"]


def training_graph(
    inputs: str, parameters: Mapping[str, tuple[int, ...]], body: str, constants: str = ""
) -> ir.Model:
    """Return the graph of a loss with the gradient `<parameter>_grad` of each parameter.

    `inputs` are the batch's and `constants` the graph's, as ONNX text; `body` computes the scalar `loss`.
    """
    import onnx.parser
    import onnx_ir as ir

    from kfac_onnx.autodiff import differentiate
    from kfac_onnx.graph.inference import inferred

    given = "".join(
        f", float[{','.join(map(str, shape))}] {name}" if shape else f", float {name}"
        for name, shape in parameters.items()
    )
    text = (
        f'<ir_version: 9, opset_import: ["" : 18]> step ({inputs}{given}) => (float loss)'
        f" <int64[1] last = {{-1}}{constants}> {{ {body} }}"
    )
    model = ir.serde.deserialize_model(inferred(onnx.parser.parse_model(text)))
    wanted = [value for value in model.graph.inputs if value.name in parameters]
    for value, gradient in differentiate(model, model.graph.outputs[0], wanted).items():
        gradient.name = f"{value.name}_grad"
        model.graph.outputs.append(gradient)
    return model


def factorisation(parameters: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Return matrix factorisation: rating = user[u] · item[i] + bias, mean squared error."""
    return training_graph(
        "int64[N] users, int64[N] items, float[N] ratings",
        parameters,
        """p = Gather(user, users)
        q = Gather(item, items)
        pq = Mul(p, q)
        dot = ReduceSum<keepdims=0>(pq, last)
        rating = Add(dot, bias)
        error = Sub(rating, ratings)
        square = Mul(error, error)
        loss = ReduceMean<keepdims=0>(square)""",
    )


def ratings(parameters: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Return matrix factorisation with a bias for each user and item, and a penalty on what was looked up.

    The loss is the mean of error² + penalty · (|user|² + |item|² + biases²), `penalty` float[N] of the batch.
    """
    return training_graph(
        "int64[N] users, int64[N] items, float[N] ratings, float[N] penalty",
        parameters,
        """p = Gather(user, users)
        q = Gather(item, items)
        pq = Mul(p, q)
        dot = ReduceSum<keepdims=0>(pq, last)
        bu = Gather(user_bias, users)
        bi = Gather(item_bias, items)
        both = Add(bu, bi)
        biases = ReduceSum<keepdims=0>(both, last)
        offset = Add(dot, biases)
        rating = Add(offset, bias)
        error = Sub(rating, ratings)
        square = Mul(error, error)
        rows = Concat<axis=1>(p, q, bu, bi)
        rows_square = Mul(rows, rows)
        size = ReduceSum<keepdims=0>(rows_square, last)
        penalized = Mul(size, penalty)
        each = Add(square, penalized)
        loss = ReduceMean<keepdims=0>(each)""",
    )


def bags(parameters: Mapping[str, tuple[int, ...]], tables: int, bag: int, dense: int) -> ir.Model:
    """Return a click model: summed bags of `bag` ids from each table and `dense` numbers, through an MLP.

    The ids of table k are `ids_k` int64[N, bag]; the loss is binary cross-entropy, from logits.
    """
    inputs = "".join(f"int64[N,{bag}] ids_{k}, " for k in range(tables))
    looked = "\n".join(
        f"rows_{k} = Gather(table_{k}, ids_{k}) bag_{k} = ReduceSum<keepdims=0>(rows_{k}, bag_axis)"
        for k in range(tables)
    )
    joined = ", ".join(f"bag_{k}" for k in range(tables))
    return training_graph(
        f"{inputs}float[N,{dense}] numbers, float[N] labels",
        parameters,
        f"""{looked}
        features = Concat<axis=1>({joined}, numbers)
        xw = Gemm<transB=1>(features, hidden_weight, hidden_bias)
        x = Relu(xw)
        logits = Gemm<transB=1>(x, output_weight, output_bias)
        z = Squeeze(logits, last)
        positive = Softplus(z)
        chosen = Mul(z, labels)
        each = Sub(positive, chosen)
        loss = ReduceMean<keepdims=0>(each)""",
        ", int64[1] bag_axis = {1}",
    )
