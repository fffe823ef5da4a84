"""Embedding functions of PyTorch in a form whose backward has an ONNX equivalent.

`embedding_bag` has none for its backward, so a bag becomes a lookup and a sum over each bag; a lookup that
asks for a sparse gradient gets the dense one, of which the passes keep the rows anyway. Used while a
module is traced; imports PyTorch, so only `torch_joint` may import it.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingImports=false, reportInvalidTypeForm=false, reportReturnType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["ExportableEmbeddings", "embedding_bag"]


class ExportableEmbeddings(TorchFunctionMode):
    """While active, `torch.nn.functional.embedding` and `embedding_bag` trace into exportable operators."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.embedding:
            return _dense_embedding(*args, **(kwargs or {}))
        if func is functional.embedding_bag:
            return embedding_bag(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dense_embedding(
    input: torch.Tensor,  # noqa: A002  the arguments of torch.nn.functional.embedding
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    del sparse
    return functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def embedding_bag(
    input: torch.Tensor,  # noqa: A002  the arguments of torch.nn.functional.embedding_bag
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Return one row per bag, float[bags, D]: what `torch.nn.functional.embedding_bag` computes.

    `input` is int[bags, length], or int[N] with `offsets` int[bags] where each bag starts. Raises
    `UserError` for max_norm and scale_grad_by_freq.
    """
    del norm_type, sparse
    if max_norm is not None or scale_grad_by_freq:
        raise UserError(
            "an embedding bag with max_norm or scale_grad_by_freq cannot be exported as a training graph",
            help="leave both at their defaults",
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    rows = functional.embedding(input, weight, padding_idx)
    # Written as a difference, so that the exporter does not merge it with the mask of the backward, which
    # tells readers of the graph that the table drops these rows.
    kept = None if padding_idx is None else (input - padding_idx).ne(0).to(rows.dtype).unsqueeze(-1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if input.ndim == 2:
        if mode == "max":
            number, length = input.shape
            bag = torch.arange(number * length, device=input.device) // length
            return _largest(rows.flatten(0, 1), bag, number, None if kept is None else kept.flatten(0, 1))
        total = (rows if kept is None else rows * kept).sum(1)
        if mode == "sum":
            return total
        return total / (input.shape[1] if kept is None else kept.sum(1).clamp_min(1))
    if offsets is None:
        raise UserError(
            "an embedding bag of a 1-D input needs offsets, which say where each bag starts",
            help="give offsets, or bags of one length as a 2-D input",
        )
    starts = offsets[:-1] if include_last_offset else offsets
    position = torch.arange(input.shape[0], device=input.device, dtype=starts.dtype)
    bag = (position[:, None] >= starts[None, :]).sum(1) - 1
    if mode == "max":
        return _largest(rows, bag, starts.shape[0], kept)
    ones = rows.new_ones((input.shape[0], 1)) if kept is None else kept
    total = rows.new_zeros((starts.shape[0], weight.shape[1]))
    total = total.index_add(0, bag, rows if kept is None else rows * kept)
    if mode == "sum":
        return total
    count = rows.new_zeros((starts.shape[0], 1)).index_add(0, bag, ones)
    return total / count.clamp_min(1)


def _largest(rows: torch.Tensor, bag: torch.Tensor, bags: int, kept: torch.Tensor | None) -> torch.Tensor:
    """Return the largest entry of each column over the rows of each bag, float[bags, D]; 0 for an empty bag.

    `bag` int[N] says where each row of `rows` float[N, D] belongs; of equal entries the first wins, and it
    alone has a gradient, as in PyTorch. Which row wins is found without a derivative, by a maximum and then
    by the least position that attains it.
    """
    with torch.no_grad():
        numbers = rows.detach()
        if kept is not None:  # padding never wins
            numbers = torch.where(kept > 0, numbers, torch.full_like(numbers, -torch.inf))
        place = bag[:, None].expand(numbers.shape)
        most = torch.full((bags, rows.shape[1]), -torch.inf, dtype=rows.dtype, device=rows.device)
        most = most.scatter_reduce(0, place, numbers, "amax")
        count = rows.shape[0]
        position = torch.arange(count, device=rows.device)[:, None].expand(numbers.shape)
        attains = (numbers == most.gather(0, place)) & (numbers > -torch.inf)
        position = torch.where(attains, position, torch.full_like(position, count))
        first = torch.full((bags, rows.shape[1]), count, dtype=position.dtype, device=rows.device)
        first = first.scatter_reduce(0, place, position, "amin")
        empty = first == count
        winner = torch.where(empty, torch.zeros_like(first), first)
    return torch.where(empty, torch.zeros_like(most), rows.gather(0, winner))
