"""Options of execution providers: which there are, what they must look like, and what is set unless given.

ONNX Runtime takes them as text. Of CUDA's, those that a training session sets itself cannot be given: streams
and allocators are addresses in memory, and graphs are captured for some stages only (`cuda_graph=True`).

Unless given, CUDA multiplies in float32 (`use_tf32` 0): TF32 keeps ten bits of the mantissa, which is less
than an inverse root needs, and PyTorch does not use it either by default. Arenas grow by what is asked for
(`arena_extend_strategy` kSameAsRequested), since tables take most of the memory and powers of two of them
would not fit.

Source: onnxruntime.ai, CUDA Execution Provider; the names are those in the wheel of onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kfac_onnx.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["CUDA", "checked_options", "option_pairs"]

CUDA: Final = "CUDAExecutionProvider"

_NUMBER: Final = "a whole number"
_SWITCH: Final = "0 or 1"
_CUDA_OPTIONS: Final[dict[str, str | tuple[str, ...]]] = {
    "device_id": _NUMBER,
    "gpu_mem_limit": _NUMBER,
    "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "do_copy_in_default_stream": _SWITCH,
    "cudnn_conv_use_max_workspace": _SWITCH,
    "cudnn_conv1d_pad_to_nc1d": _SWITCH,
    "tunable_op_enable": _SWITCH,
    "tunable_op_tuning_enable": _SWITCH,
    "tunable_op_max_tuning_duration_ms": _NUMBER,
    "enable_skip_layer_norm_strict_mode": _SWITCH,
    "prefer_nhwc": _SWITCH,
    "use_ep_level_unified_stream": _SWITCH,
    "use_tf32": _SWITCH,
    "fuse_conv_bias": _SWITCH,
    "sdpa_kernel": _NUMBER,
}
"""Each option that may be given: what its value is, or the values that there are."""
_OURS: Final = {
    "enable_cuda_graph": "give cuda_graph=True (--cuda-graph) instead: a stage that writes tables must not "
    "be captured, since capturing runs it several times",
    "has_user_compute_stream": "it is an address in memory: the session uses ONNX Runtime's own streams",
    "user_compute_stream": "it is an address in memory: the session uses ONNX Runtime's own streams",
    "gpu_external_alloc": "it is an address in memory: the session uses ONNX Runtime's own arena",
    "gpu_external_free": "it is an address in memory: the session uses ONNX Runtime's own arena",
    "gpu_external_empty_cache": "it is an address in memory: the session uses ONNX Runtime's own arena",
}
"""Options that ONNX Runtime has and that cannot be given here, with what to do."""
_DEFAULTS: Final = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
_SAME: Final = {"true": "1", "false": "0"}


def checked_options(provider: str, options: Mapping[str, object]) -> dict[str, str]:
    """Return a provider's options as ONNX Runtime takes them, those of CUDA checked and completed.

    Raises UserError for a name or a value that CUDA's provider does not have.
    """
    given = {name: _text(value) for name, value in options.items()}
    if provider != CUDA:
        return given
    for name, value in given.items():
        if name in _OURS:
            raise UserError(f"the option '{name}' of '{CUDA}' cannot be given", help=_OURS[name])
        if name not in _CUDA_OPTIONS:
            near = did_you_mean(name, _CUDA_OPTIONS)
            raise UserError(
                f"'{CUDA}' has no option '{name}'{near}", help=f"it has {', '.join(_CUDA_OPTIONS)}"
            )
        kind = _CUDA_OPTIONS[name]
        if not _fits(value, kind):
            wanted = kind if isinstance(kind, str) else f"one of {', '.join(kind)}"
            raise UserError(f"the option '{name}' of '{CUDA}' must be {wanted}, not '{value}'")
    return {**_DEFAULTS, **given}


def option_pairs(words: Iterable[str]) -> dict[str, str]:
    """Return `NAME=VALUE` words as a mapping.

    Raises UserError for a word without `=` or a name that is given twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or not name or not value:
            raise UserError(f"--provider-option wants NAME=VALUE, not '{word}'")
        if name in pairs:
            raise UserError(f"--provider-option names '{name}' twice")
        pairs[name] = value
    return pairs


def _text(value: object) -> str:
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return _SAME.get(text.lower(), text)


def _fits(value: str, kind: str | tuple[str, ...]) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    return value in ("0", "1") if kind == _SWITCH else value.isascii() and value.isdigit()
