"""Nothing that was inserted falls back to the CPU or makes a step copy a value: measured on a GPU.

Without one, what is predicted from the table of the provider's kernels; that table has tests of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from corpus_cases import marked
from preset_names import ALL

from kfac_onnx.api import transform
from kfac_onnx.bench.workloads import cases
from kfac_onnx.device.placement import measure, predict
from kfac_onnx.step.plan import partition

if TYPE_CHECKING:
    from conftest import Place

    from kfac_onnx.device.placement import Placement


def placed(place: Place, graph: Any, **options: Any) -> Placement:
    model = transform(graph, target="cuda", **options)
    stages = [(stage.name, stage.model) for stage in partition(model, sequential=False).stages]
    return measure(stages, "cuda") if place.is_gpu else predict(stages)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("preset", [*ALL, "plain-adam"])
@pytest.mark.parametrize("workload", ["mf", "lm"])
def test_what_was_inserted_is_on_the_gpu(
    place: Place, workload: str, preset: str, deterministic: bool
) -> None:
    (case,) = cases(workload, vocab_sizes=(1000,), widths=(16,))
    found = placed(place, case.graph(), preset=preset, deterministic=deterministic)
    assert found.measured == place.is_gpu
    assert found.fallbacks == ()
    assert found.own_copies == ()
    assert found.by_provider(inserted=True).get("CUDAExecutionProvider", 0) > 10


@pytest.mark.parametrize("options", [{"g_rows": 64}, {"g_every": 4}, {"uses": "multi-indep"}])
def test_options_stay_there_too(place: Place, options: dict[str, Any]) -> None:
    case, _ = marked("torchjoint_in__nplm_pad0")
    found = placed(place, case.path, **options)
    assert found.fallbacks == ()
    assert found.own_copies == ()


def test_what_is_lowered_for_the_cpu_is_noticed(place: Place) -> None:
    case, _ = marked("torchjoint_in__nplm_pad0")
    model = transform(case.path, preset="adagrad", shape="dense", target="cpu")
    stages = [(stage.name, stage.model) for stage in partition(model, sequential=False).stages]
    found = measure(stages, "cuda") if place.is_gpu else predict(stages)
    assert found.fallbacks + found.own_copies != ()
