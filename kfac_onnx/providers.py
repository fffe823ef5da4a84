"""ONNX Runtime's execution providers as callers give them; open to every room, like `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Providers = Sequence[str | tuple[str, dict[str, str]]]
    """Names, or names with options, as ONNX Runtime takes them."""

__all__ = ["provider_list"]


def provider_list(
    providers: Sequence[str | tuple[str, Mapping[str, object]]],
) -> list[str | tuple[str, dict[str, str]]]:
    """Return the execution providers as ONNX Runtime takes them.

    Raises UserError for a provider that the installed onnxruntime does not have.
    """
    import onnxruntime as ort

    available = ort.get_available_providers()
    result: list[str | tuple[str, dict[str, str]]] = []
    for item in providers:
        name = item if isinstance(item, str) else item[0]
        if name not in available:
            message = f"this onnxruntime has no execution provider '{name}'"
            raise UserError(message, help=f"available are {', '.join(available)}")
        if isinstance(item, str):
            result.append(item)
        else:
            result.append((name, {key: str(value) for key, value in item[1].items()}))
    if not result:
        raise UserError("no execution provider is given", help=f"available are {', '.join(available)}")
    return result
