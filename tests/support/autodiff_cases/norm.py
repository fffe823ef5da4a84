"""Cases of normalizations."""

from __future__ import annotations

import numpy as np

from autodiff_cases import Case, floats, positive

RUNNING = {"m": floats(3), "v": positive(3)}


def affine(count: int) -> dict[str, object]:
    return {"s": floats(count), "b": floats(count)}


BATCHES = {"rows": (4, 3), "sequence": (2, 3, 5), "images": (2, 3, 4, 2), "one": (1, 3, 2, 2)}

CASES = [
    *(
        Case(
            f"layer_norm_{name}",
            f"z = LayerNormalization<axis = {axis}>(x, s, b)",
            f"R.layer_norm(x, s, b, {axis})",
            {"x": floats(2, 3, 4), "s": floats(*shape), "b": floats(*shape)},
        )
        for name, axis, shape in (
            ("last", -1, (4,)),
            ("positive_axis", 2, (4,)),
            ("two_axes", 1, (3, 4)),
            ("two_axes_from_the_end", -2, (3, 4)),
            ("all_axes", 0, (2, 3, 4)),
            ("one_scale", -1, (1,)),
            ("scale_repeated", 1, (3, 1)),
        )
    ),
    Case(
        "layer_norm_without_bias",
        "z = LayerNormalization<epsilon = 0.1>(x, s)",
        "R.layer_norm(x, s, epsilon=0.1)",
        {"x": floats(3, 4), "s": floats(4)},
        opset=20,
    ),
    Case(
        "layer_norm_statistics_written",
        "z, mean, inv = LayerNormalization(x, s, b)",
        "R.layer_norm(x, s, b)",
        {"x": floats(1, 4), "s": floats(4), "b": floats(4)},
    ),
    Case(
        "layer_norm_constant_scale",
        "z = LayerNormalization(x, s, b)",
        "F.layer_norm(x, (4,), s)",
        {"x": floats(3, 4)},
        {"s": np.array([1, 2, 3, 4], np.float32), "b": np.zeros(4, np.float32)},
    ),
    *(
        Case(
            f"rms_norm_{name}",
            f"z = RMSNormalization<axis = {axis}, epsilon = 0.01>(x, s)",
            f"R.rms_norm(x, s, {axis}, 0.01)",
            {"x": floats(2, 3, 4), "s": floats(*shape)},
            opset=23,
        )
        for name, axis, shape in (("last", -1, (4,)), ("two_axes", 1, (3, 4)), ("one_scale", -1, (1,)))
    ),
    *(
        Case(
            f"batch_norm_training_{name}",
            "z, rm, rv = BatchNormalization<training_mode = 1>(x, s, b, m, v)",
            "F.batch_norm(x, m.clone(), v.clone(), s, b, training=True)",
            {"x": floats(*shape, scale=2.0, shift=0.5), **affine(3), **RUNNING},
            frozen=("m", "v"),
        )
        for name, shape in BATCHES.items()
    ),
    *(
        Case(
            f"batch_norm_inference_{name}",
            "z = BatchNormalization<epsilon = 0.01>(x, s, b, m, v)",
            "R.batch_norm(x, s, b, m, v, 0.01)",
            {"x": floats(*shape), **affine(3), **RUNNING},
        )
        for name, shape in BATCHES.items()
    ),
    *(
        Case(
            f"instance_norm_{name}",
            "z = InstanceNormalization<epsilon = 0.001>(x, s, b)",
            "F.instance_norm(x, weight=s, bias=b, eps=0.001)",
            {"x": floats(*shape), **affine(3)},
        )
        for name, shape in BATCHES.items()
        if len(shape) > 2
    ),
    *(
        Case(
            f"group_norm_{name}",
            f"z = GroupNormalization<num_groups = {groups}, epsilon = 0.01>(x, s, b)",
            f"R.group_norm(x, s, b, {groups}, 0.01)",
            {"x": floats(*shape), **affine(shape[1])},
            opset=21,
        )
        for name, groups, shape in (
            ("images", 2, (2, 4, 3, 2)),
            ("sequence", 3, (2, 6, 5)),
            ("each", 4, (2, 4, 3)),
            ("all", 1, (1, 4, 3)),
        )
    ),
    *(
        Case(
            f"lp_norm_{p}_axis_{axis}",
            f"z = LpNormalization<p = {p}, axis = {axis}>(x)",
            f"F.normalize(x, p={p}, dim={axis})",
            {"x": floats(2, 3, 4)},
        )
        for p in (1, 2)
        for axis in (0, 1, -1)
    ),
    Case("lp_norm_default", "z = LpNormalization(x)", "F.normalize(x, dim=-1)", {"x": floats(2, 3)}),
    Case(
        "mvn_images",
        "z = MeanVarianceNormalization<axes = [0, 2, 3]>(x)",
        "R.mvn(x)",
        {"x": floats(2, 3, 4, 2)},
    ),
    Case("mvn_axes", "z = MeanVarianceNormalization<axes = [1]>(x)", "R.mvn(x, (1,))", {"x": floats(4, 3)}),
    *(
        Case(
            f"lrn_{size}",
            f"z = LRN<size = {size}, alpha = 0.5, beta = 0.6, bias = 1.5>(x)",
            f"R.lrn(x, {size}, 0.5, 0.6, 1.5)",
            {"x": floats(2, 7, 3, 2)},
        )
        for size in (3, 5, 1)
    ),
    Case("lrn_default", "z = LRN<size = 3>(x)", "R.lrn(x, 3)", {"x": floats(1, 4, 3, 2, scale=50.0)}),
    Case(
        "skip_layer_norm",
        "z = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(x, y, s, b, c)",
        "R.layer_norm(x + y + c, s, b)",
        {"x": floats(2, 3, 4), "y": floats(2, 3, 4), "s": floats(4), "b": floats(4), "c": floats(4)},
    ),
    Case(
        "skip_layer_norm_with_sum",
        "z, , , t = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(x, y, s, b)",
        "(R.layer_norm(x + y, s, b), x + y)",
        {"x": floats(2, 3, 4), "y": floats(2, 3, 4), "s": floats(4), "b": floats(4)},
        outputs=("z", "t"),
    ),
    Case(
        "simplified_layer_norm",
        "z = SimplifiedLayerNormalization<axis = -1, epsilon = 0.01>(x, s)",
        "R.rms_norm(x, s, -1, 0.01)",
        {"x": floats(2, 3, 4), "s": floats(4)},
    ),
    Case(
        "skip_simplified",
        "z, , , t = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.00001>(x, y, s, c)",
        "(R.rms_norm(x + y + c, s), x + y + c)",
        {"x": floats(2, 3, 4), "y": floats(2, 3, 4), "s": floats(4), "c": floats(4)},
        outputs=("z", "t"),
    ),
]
