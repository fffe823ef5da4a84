"""The property: nothing that was inserted falls back to the host or makes a step copy a value.

Every inserted node of the training graphs, with every preset, by the table of the CUDA provider's kernels.
Where the provider works, the same as onnxruntime has it.
"""

from __future__ import annotations

from typing import Any

import pytest
from corpus_cases import GRAPHS, Case
from preset_names import ALL, PER_EXAMPLE

from kfac_onnx.api import transform
from kfac_onnx.device.placement import Placement, measure, predict
from kfac_onnx.device.placement.records import CUDA
from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
from kfac_onnx.step.plan import partition

PRESETS: dict[str, dict[str, Any]] = {
    DEFAULT_PRESET: {},
    "sampled": {"g_rows": 8, "g_every": 4},
    "every": {"g_every": 4},
    "short decay": {"preset": "half", "decay_a": 0.3},
    "dense": {"shape": "dense"},
    **{name: {"preset": name} for name in ALL if name != DEFAULT_PRESET},
    "plain-sgd": {"preset": "plain-sgd", "rest": "sgd"},
    "plain-momentum": {"preset": "plain-momentum", "rest": "momentum"},
    "plain-adam": {"preset": "plain-adam"},
    "plain-adagrad": {"preset": "plain-adagrad", "rest": "adagrad"},
}
CASES = [
    "torchjoint_in__nplm",
    "torchjoint_in__bert_sum",
    "torchjoint_in__decoys",
    "torchjoint_in__dlrm_mean",
    "torchjoint_in__dlrm_offsets_mean",
    "torchjoint_in__dlrm_offsets_sum",
    "torchjoint_in__nplm_pad0",
    "ortart_legcore__decoys",
    "ortart_legcore__lookup_reshape",
    "jax2onnx__bag_sum",
    "jax2onnx__nplm_f16",
    "jax2onnx__nplm_bf16",
]


def stages_of(name: str, options: dict[str, Any], **more: Any) -> list[tuple[str, Any]]:
    settings = {"target": "cuda"} | options | more
    if settings.get("preset") in PER_EXAMPLE and name == "ortart_legcore__lookup_reshape":
        settings["grad_scale"] = 4.0
    model = transform(Case(name).path, **settings)
    return [(stage.name, stage.model) for stage in partition(model, sequential=False).stages]


def check(found: Placement) -> None:
    away = [f"{node.stage}: {node.name} ({node.op_type}): {node.reason}" for node in found.fallbacks]
    copied = [
        f"{copy.stage}: {copy.value} {copy.direction} because of {copy.because}" for copy in found.own_copies
    ]
    assert away == []
    assert copied == []
    mine = [node for node in found.nodes if node.inserted]
    assert sum(node.provider == CUDA for node in mine) > 10
    # what is left on the host makes sizes of sizes
    assert all(node.provider == CUDA or not node.missing for node in mine)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_inserted_nodes_are_on_the_device(name: str, preset: str) -> None:
    check(predict(stages_of(name, PRESETS[preset])))


@pytest.mark.parametrize("preset", ["half", "adagrad", "dense", "short decay", "r1.7"])
@pytest.mark.parametrize(
    "name", ["torchjoint_in__nplm", "torchjoint_in__nplm_pad0", "ortart_legcore__lookup_reshape"]
)
def test_so_are_those_that_sum_in_one_order(name: str, preset: str) -> None:
    stages = stages_of(name, PRESETS[preset], deterministic=True)
    check(predict(stages))
    for _, model in stages:
        for function in model.functions:
            for node in function.node:
                assert "reduction" not in {
                    attribute.name for attribute in node.attribute if attribute.s != b"none"
                }


@pytest.mark.parametrize("preset", ["half", "adagrad"])
def test_the_check_notices_what_is_lowered_for_the_cpu(preset: str) -> None:
    found = predict(stages_of("torchjoint_in__nplm", PRESETS[preset], target="cpu"))
    assert found.own_copies
    assert not found.fallbacks
    with pytest.raises(AssertionError):
        check(found)


def test_what_the_user_computes_on_the_host_is_reported_apart() -> None:
    found = predict(stages_of("torchjoint_in__dlrm_offsets_sum", {}))
    assert [copy.value for copy in found.user_copies] == ["scalar_tensor_default_1"]
    assert found.own_copies == ()


@pytest.mark.cuda
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_places_them_so(name: str, preset: str) -> None:
    stages = stages_of(name, PRESETS[preset])
    found = measure(stages, CUDA)
    check(found)
    predicted = predict(stages)
    assert bool(found.user_copies) == bool(
        predicted.user_copies
    )  # equal nodes become one, so not their number


def test_the_graphs_are_there() -> None:
    assert all((GRAPHS / f"{name}.onnx").is_file() for name in CASES)
