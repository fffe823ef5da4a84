"""Batches on a device: copied once, read where they lie, never over one that a step still reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from fake_device import FakeCuda

from kfac_onnx.runtime.feed.batches import BatchInput, checked_batch
from kfac_onnx.runtime.feed.feeding import Fed, Feeder, on_device
from kfac_onnx.runtime.feed.prefetch import prefetched
from kfac_onnx.runtime.step.tensors import read_value

if TYPE_CHECKING:
    from collections.abc import Iterator

INT64, FLOAT, BFLOAT16 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
INPUTS = (BatchInput("ids", INT64, ("n",)), BatchInput("y", FLOAT, ("n", 2)))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def batch(number: int, size: int = 4) -> dict[str, np.ndarray]:
    ids = np.arange(size, dtype=np.int64) + 100 * number
    return {"ids": ids, "y": np.full((size, 2), number, np.float32)}


def there(fed: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in fed.on_device.items()}


def test_a_batch_goes_up_once(cuda: FakeCuda) -> None:
    feeder = Feeder(cuda.device, INPUTS)
    given = batch(1)
    fed = feeder.fed(given, checked_batch(given, INPUTS))
    assert isinstance(fed, Fed)
    assert cuda.uploads == [32, 32]
    for name, array in there(fed).items():
        np.testing.assert_array_equal(array, given[name])
    assert set(fed) == {"ids", "y"}
    assert all(isinstance(value, np.ndarray) for value in fed.values()), "the host's checks look at arrays"
    assert cuda.is_there(on_device(fed, "ids"))  # type: ignore[arg-type]


def test_what_was_copied_ahead_is_not_copied_again(cuda: FakeCuda) -> None:
    feeder = Feeder(cuda.device, INPUTS)
    ahead = feeder.ahead(batch(1))
    cuda.reset()
    fed = feeder.fed(ahead, checked_batch(ahead, INPUTS))
    assert cuda.uploads == []
    np.testing.assert_array_equal(there(fed)["ids"], batch(1)["ids"])


def test_another_sessions_copies_are_not_taken(cuda: FakeCuda) -> None:
    ahead = Feeder(cuda.device, INPUTS).ahead(batch(1))
    cuda.reset()
    Feeder(cuda.device, INPUTS).fed(ahead, checked_batch(ahead, INPUTS))
    assert cuda.uploads == [32, 32]


def test_a_batch_that_does_not_fit_waits_for_the_step_to_say_so(cuda: FakeCuda) -> None:
    feeder = Feeder(cuda.device, INPUTS)
    for wrong in ({"ids": batch(1)["ids"]}, {**batch(1), "y": np.zeros((4, 2))}, {**batch(1), "ids": [1]}):
        assert feeder.ahead(wrong) is wrong  # type: ignore[arg-type]
    assert cuda.uploads == []


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_a_batch_that_is_being_read_is_not_written_over(cuda: FakeCuda, depth: int) -> None:
    """What a step reads is that of its own batch until the next one is asked for."""
    feeder = Feeder(cuda.device, INPUTS)
    feeder.reserve(depth)

    def some() -> Iterator[dict[str, np.ndarray]]:
        for number in range(20):
            yield batch(number, size=3 + number % 2)

    with prefetched(some(), depth, feeder.ahead) as ready:  # type: ignore[type-var]
        for number, given in enumerate(ready):
            for _ in range(2):
                np.testing.assert_array_equal(there(given)["ids"], batch(number, 3 + number % 2)["ids"])
                np.testing.assert_array_equal(there(given)["y"], batch(number, 3 + number % 2)["y"])
    assert number == 19


def test_places_are_taken_in_turn(cuda: FakeCuda) -> None:
    """Graphs are captured for addresses: few of them, the same ones again and again."""
    feeder = Feeder(cuda.device, INPUTS)
    feeder.reserve(2)
    seen = [feeder.ahead(batch(n)).on_device["ids"].data_ptr() for n in range(12)]  # type: ignore[attr-defined]
    assert seen[:4] * 3 == seen
    assert len(set(seen)) == 4


def test_other_shapes_get_other_memory(cuda: FakeCuda) -> None:
    feeder = Feeder(cuda.device, INPUTS)
    for size in (4, 4, 5, 0, 5, 1):
        fed = feeder.ahead(batch(size, size=size))
        np.testing.assert_array_equal(there(fed)["y"], batch(size, size=size)["y"])


def test_bfloat16_goes_up_as_its_bits(cuda: FakeCuda) -> None:
    inputs = (BatchInput("x", BFLOAT16, ("n",)),)
    feeder = Feeder(cuda.device, inputs)
    values = np.array([1.5, -2.0, 3.0], ml_dtypes.bfloat16)
    for given in ({"x": values}, {"x": values.view(np.uint16)}):
        fed = feeder.fed(given, checked_batch(given, inputs))
        value = fed.on_device["x"]  # type: ignore[attr-defined]
        np.testing.assert_array_equal(read_value(value, BFLOAT16), values)
    ahead = feeder.ahead({"x": values})
    np.testing.assert_array_equal(read_value(ahead.on_device["x"], BFLOAT16), values)  # type: ignore[attr-defined]


def test_columns_and_single_numbers(cuda: FakeCuda) -> None:
    inputs = (BatchInput("x", FLOAT, ("n",)), BatchInput("rate", FLOAT, ()))
    given = {"x": np.arange(8, dtype=np.float32).reshape(4, 2)[:, 0], "rate": np.array(0.5, np.float32)}
    fed = there(Feeder(cuda.device, inputs).ahead(given))
    np.testing.assert_array_equal(fed["x"], [0, 2, 4, 6])
    assert fed["rate"].shape == ()
    assert float(fed["rate"]) == 0.5


def test_without_a_copy_there_the_array_is_bound() -> None:
    given = batch(1)
    assert on_device(given, "ids") is given["ids"]
    assert on_device(Fed(given, {}, None), "ids") is given["ids"]


def test_ordinary_memory_is_said(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        feeder = Feeder(cuda.device, INPUTS)
    assert feeder.problem == "the CUDA runtime library is not loaded"
    assert caplog.messages == [f"batches go to the device from ordinary memory: {feeder.problem}"]
