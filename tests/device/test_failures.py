"""Which exceptions are onnxruntime's: those of its runs, and nothing that a signal handler or a caller raises."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest

from kfac_onnx.device.failures import from_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 3] x, int64[M] i) => (float[M, 3] y) { y = Gather(x, i) }"""
ROWS, IDS = np.zeros((2, 3), np.float32), np.array([0])


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(onnx.parser.parse_model(TEXT).SerializeToString(), options)


def bound(session: ort.InferenceSession, **arrays: np.ndarray) -> None:
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    session.run_with_iobinding(binding)


FAILURES: dict[str, Callable[[ort.InferenceSession], object]] = {
    "an id that is no row": lambda s: s.run(None, {"x": ROWS, "i": np.array([7])}),
    "an id that is no row, bound": lambda s: bound(s, x=ROWS, i=np.array([7])),
    "another dtype": lambda s: s.run(None, {"x": ROWS.astype(np.float64), "i": IDS}),
    "an input too few": lambda s: s.run(None, {"x": ROWS}),
    "another shape": lambda s: bound(s, x=np.zeros((2, 4), np.float32), i=IDS),
    "an unknown name": lambda s: bound(s, z=ROWS),
    "no model": lambda s: ort.InferenceSession(b"nothing"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_onnxruntime_raises(session: ort.InferenceSession, name: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever its class is
        FAILURES[name](session)
    assert from_onnxruntime(caught.value)


class WatchdogError(Exception):
    """What a watchdog of the user's raises."""


@pytest.mark.parametrize("error", [WatchdogError, RuntimeError, ValueError, TimeoutError, KeyboardInterrupt])
def test_what_a_signal_handler_raises_right_after_a_run(
    session: ort.InferenceSession, error: type[BaseException]
) -> None:
    def handler(*_: object) -> None:
        raise error("too slow")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(error) as caught:  # noqa: PT012  the signal comes right after the run
            session.run(None, {"x": ROWS, "i": IDS})
            signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not from_onnxruntime(caught.value)
