"""ONNX Runtime's execution providers as callers give them; open to every room, like `errors`.

A list of providers is an order of preference. With one provider, that one runs the model or there is an
error. What stands after it is what the caller wants to fall back on where it does not work, which is then
said in a warning. ONNX Runtime itself falls back on the CPU without being asked: a provider whose libraries
are missing is only logged. So each one is tried on a model of one node, and every session is asked which
providers it really has.

The plain wheel and the one for CUDA are two packages that install the same folder `onnxruntime`: of both, the
one that was installed last is there, and pip knows nothing of it. That too is found and said.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kfac_onnx.device.failures import from_onnxruntime
from kfac_onnx.device.provider_options import CUDA, checked_options
from kfac_onnx.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnxruntime as ort

    Provider = str | tuple[str, dict[str, str]]
    """A name, or a name with options, as ONNX Runtime takes it."""
    Providers = Sequence[Provider]
    GivenProviders = Sequence[str | tuple[str, Mapping[str, object]]]
    """As callers may give them: short names, options of any type."""

__all__ = ["SHORT_NAMES", "on_cuda", "provider_list", "require_providers"]

_log = logging.getLogger(__name__)

CPU: Final = "CPUExecutionProvider"
SHORT_NAMES: Final = {"cpu": CPU, "cuda": CUDA}
"""What people may write for the usual providers."""

_GPU: Final = "onnxruntime-gpu[cuda,cudnn]"
_WHEELS: Final = {
    CUDA: _GPU,
    "TensorrtExecutionProvider": _GPU,
    "DmlExecutionProvider": "onnxruntime-directml",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "CANNExecutionProvider": "onnxruntime-cann",
}
"""The package on PyPI that has a provider which the plain one lacks."""
_LIBRARIES: Final = {CUDA: "cuda", "TensorrtExecutionProvider": "tensorrt"}
"""Providers that live in a library of their own, which needs NVIDIA's."""


def provider_list(providers: GivenProviders) -> list[Provider]:
    """Return those of the execution providers that work here, in their order, as ONNX Runtime takes them.

    One that does not work is left out with a warning where another one follows it and works.

    Raises UserError for a name that ONNX Runtime does not know, for an option that CUDA does not have, and
    where the last provider does not work either; it says what to install.
    """
    import onnxruntime as ort

    available = ort.get_available_providers()
    given = [_plain(item) for item in providers]
    if not given:
        raise UserError("no execution provider is given", help=f"available are {', '.join(available)}")
    for item in given:
        _require_known(_name(item), available)
    problems = [_problem(item, available) for item in given]
    working = [item for item, problem in zip(given, problems, strict=True) if problem is None]
    for problem in (problem for problem in problems if problem is not None):
        if not working or given[-1] not in working:
            raise problem
        _log.warning("%s; '%s' is used instead", problem.message, _name(working[0]))
    return working


def on_cuda(providers: GivenProviders) -> bool:
    """Return whether the first of the providers is CUDA's, by its short or its full name."""
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    return SHORT_NAMES.get(first, first) == CUDA


def require_providers(session: ort.InferenceSession, providers: Providers) -> None:
    """Raise UserError where a session runs without one of the providers that it was opened with."""
    has = session.get_providers()
    for name in (_name(item) for item in providers):
        if name not in has:
            raise _cannot_be_created(name, "")


def _plain(item: str | tuple[str, Mapping[str, object]]) -> Provider:
    given = item if isinstance(item, str) else item[0]
    name = SHORT_NAMES.get(given, given)
    checked = checked_options(name, {} if isinstance(item, str) else item[1])
    return (name, checked) if checked or not isinstance(item, str) else name


def _name(item: Provider) -> str:
    return item if isinstance(item, str) else item[0]


def _require_known(name: str, available: Sequence[str]) -> None:
    import onnxruntime as ort

    every: Callable[[], list[str]] = vars(ort)["get_all_providers"]  # onnxruntime does not declare it
    known = [*available, *every()]
    if name not in known:
        near = did_you_mean(name, known) or did_you_mean(name.lower(), SHORT_NAMES)
        message = f"there is no execution provider '{name}'{near}"
        raise UserError(message, help=f"this onnxruntime has {', '.join(available)}")


def _problem(item: Provider, available: Sequence[str]) -> UserError | None:
    """Return why a provider does not work here, or None if it does."""
    name = _name(item)
    if name not in available:
        return _not_in_wheel(name, available)
    if name == CPU:
        return None
    if name in _LIBRARIES:
        _load_wheels()
    try:
        has = _tried(item).get_providers()
    except Exception as e:
        if not from_onnxruntime(e):
            raise
        return _cannot_be_created(name, first_line(e))
    return None if name in has else _cannot_be_created(name, "")


def _not_in_wheel(name: str, available: Sequence[str]) -> UserError:
    """Return the error for a provider that the onnxruntime which is imported was not built with."""
    message = f"this onnxruntime has no execution provider '{name}'"
    wheel = _WHEELS.get(name)
    if wheel is None:
        return UserError(message, help=f"it has {', '.join(available)}")
    package = wheel.partition("[")[0]
    if not {"onnxruntime", package} <= _installed():
        return UserError(
            message, help=f"it is in another wheel: pip uninstall onnxruntime && pip install '{wheel}'"
        )
    return UserError(
        f"{message}: the packages 'onnxruntime' and '{package}' are installed over each other",
        help=f"keep one: pip uninstall -y onnxruntime {package} && pip install '{wheel}'",
    )


def _installed() -> set[str]:
    """Return the names of the installed packages, in lower case."""
    import importlib.metadata

    return {str(each.name).lower().replace("_", "-") for each in importlib.metadata.distributions()}


def _load_wheels() -> None:
    """Load the CUDA and cuDNN that came as wheels, where ONNX Runtime can; what it prints is dropped."""
    import onnxruntime as ort

    preload = getattr(ort, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            preload()


def _tried(item: Provider) -> ort.InferenceSession:
    """Return a session of one node on one provider; ONNX Runtime may have left the provider out."""
    import onnx
    import onnxruntime as ort

    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value("x", kind, [1])], [value("y", kind, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=[item], enable_fallback=0)  # pyright: ignore[reportCallIssue]  typed in part


def _cannot_be_created(name: str, said: str) -> UserError:
    """Return the error for a provider that the installed wheel has and that cannot start here."""
    missing = _missing_library(name)
    reason = missing or said
    message = f"the execution provider '{name}' cannot be created here" + (f": {reason}" if reason else "")
    if missing is not None:
        packages = "TensorRT and CUDA" if name.startswith("Tensorrt") else "CUDA and cuDNN"
        advice = (
            f"it needs NVIDIA's {packages}: pip install '{_GPU}', or set LD_LIBRARY_PATH to where they are"
        )
    elif name in _LIBRARIES:
        advice = "is there a GPU with a driver for it? `nvidia-smi` says so"
    else:
        advice = "its driver or its libraries are missing: see its page at onnxruntime.ai"
    return UserError(message, help=advice)


def _missing_library(name: str) -> str | None:
    """Return what the system's loader says of a provider's own library, or None where it loads."""
    import onnxruntime as ort

    kind = _LIBRARIES.get(name)
    if kind is None or not sys.platform.startswith("linux"):
        return None
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{kind}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        return first_line(e)
    return None
