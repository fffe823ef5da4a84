"""Why PyTorch refused, in one sentence with the operator and the line of the user's code.

PyTorch says what happened somewhere in the middle of its messages, below banners with terminal colours; and
its exporter speaks of nodes of a graph that the user never saw.
"""

# PyTorch is an extra, absent where the types are checked (a neighbour of this file then answers to its name).
# pyright: basic, reportAttributeAccessIssue=false, reportMissingImports=false, reportInvalidTypeForm=false

from __future__ import annotations

import linecache
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["RefusedKinds", "fixed_dimension", "refusal", "useful_sentence", "user_line"]

_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FOREIGN: Final = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(re.__file__).parents[1]),
)
"""Folders whose code is not the user's: PyTorch, this package, Python's library."""
_BANNERS: Final = re.compile(
    r"^(This is step|Failed to |Next steps|- (Modify|Debug|Create)|For more information|Exception summary"
    r"|## |Traceback|<class|⬆️|\(Refer|While executing|Original traceback|The error above|Use tlparse"
    r"|Error when translating|To fix|If you)"
)
_OPERATORS: Final = (
    re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>"),
    re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'"),
    re.compile(r"target=torch\.ops\.((?:\w+\.)+\w+)"),
    re.compile(r"derivative for ((?:aten::)?[\w.:]+) is not implemented"),
    re.compile(r"Could not run '((?:aten|prims)::[\w.]+)'"),
    re.compile(r"\b((?:aten|prims)::\w+(?:\.\w+)?)\b"),
    re.compile(r"\b((?:aten|prims)\.\w+(?:\.\w+)?)\b"),
)
_DATA_DEPENDENT: Final = re.compile(
    r"data-dependent expression|DataDependentOutput|aten\._local_scalar_dense"
)
_SIZE: Final = re.compile(r"L\['\w+'\](?:\[\d+\])*\[(\d+)\]\.size\(\)\[(\d+)\]")


def _is_users(file: str) -> bool:
    return not file.startswith(("<", *_FOREIGN)) or (
        "site-packages" in file and not file.startswith(_FOREIGN[:2])
    )


def _shown_line(file: str, line: int, function: str) -> str:
    text = linecache.getline(file, line).strip()
    here = Path.cwd()
    path = Path(file)
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{shown}, line {line}, in {function}" + (f": {text}" if text else "")


def user_line(error: BaseException | None = None) -> str | None:
    """Return the innermost line of the user's code on the way to an error, or to here."""
    if error is not None:
        frames = [(each.filename, each.lineno or 0, each.name) for each in _frames(error)]
    else:
        frames = [
            (frame.f_code.co_filename, line, frame.f_code.co_name)
            for frame, line in traceback.walk_stack(sys._getframe(1))
        ][::-1]
    own = [frame for frame in frames if _is_users(frame[0])]
    return _shown_line(*own[-1]) if own else None


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    for each in reversed(list(_chain(error))):
        yield from traceback.extract_tb(each.__traceback__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the outermost first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def useful_sentence(error: BaseException) -> str:
    """Return the line of an exception's text that says what happened, without colours; never empty."""
    text = _COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _BANNERS.match(line)]
    return lines[0] if lines else type(error).__name__


def operator_of(error: BaseException) -> str | None:
    """Return the operator that an error of PyTorch is about, such as `aten.linalg_matrix_exp`."""
    texts = [_COLOURS.sub("", str(each)) for each in _chain(error)][::-1]
    for pattern in _OPERATORS:
        for text in texts:
            if (match := pattern.search(text)) is not None:
                name = match[1].replace("::", ".")
                return name.removesuffix(".default")
    return None


def refusal(
    module: torch.nn.Module, error: Exception, forward: torch.fx.GraphModule | None, names: Sequence[str]
) -> UserError:
    """Return the error that says why a module cannot be exported.

    `forward` is the traced forward pass, where there is one: its nodes know the user's lines.
    """
    if (fixed := fixed_dimension(error, names)) is not None:
        return fixed
    name = type(module).__name__
    if _DATA_DEPENDENT.search(_COLOURS.sub("", str(error))):
        return UserError(
            f"{name}.forward makes a Python number of a tensor, which a trace does not know",
            place=user_line(error),
            help="keep it a tensor: no item(), float() or int() of it, no `if` on it, no shape by it",
        )
    chain = list(_chain(error))
    operator = operator_of(error)
    place = line_of_operator(forward, operator) if operator is not None else None
    missing = "No ONNX function found" in "".join(str(each) for each in chain)
    what = "" if operator is None else f": {'ONNX has no form of ' if missing else 'it stops at '}{operator}"
    # The exporter's own errors wrap what happened; others are what happened, and what they wrap led there.
    told = chain[-1] if isinstance(error, torch.onnx.OnnxExporterError) else error
    return UserError(
        f"PyTorch cannot export forward and backward of {name} as one ONNX graph{what}",
        place=place or user_line(error),
        tried=[] if missing else [f"{type(told).__name__}: {useful_sentence(told)}"],
        help="rewrite this operator by others"
        if operator is not None
        else "rewrite what is named above; dynamic_batch=False asks for less",
    )


def line_of_operator(forward: torch.fx.GraphModule | None, operator: str) -> str | None:
    """Return the user's line that calls an operator, or whose derivative is the operator."""
    if forward is None:
        return None
    wanted = _stem(operator)
    best: str | None = None
    for node in forward.graph.nodes:
        trace = node.meta.get("stack_trace")
        if node.op != "call_function" or not trace or not hasattr(node.target, "_schema"):
            continue
        if _stem(str(node.target)) == wanted:
            best = line_of_trace(trace) or best
            if str(node.target).startswith(operator):
                return best
    return best


def _stem(operator: str) -> str:
    """Return what an operator and its derivative have in common: `grid_sampler_2d` of its `_backward`."""
    name = operator.removeprefix("aten.").removeprefix("prims.").split(".")[0].strip("_")
    for ending in ("_backward_data", "_backward", "_with_indices", "_forward", "_interface", "_impl"):
        name = name.removesuffix(ending)
    return name.strip("_")


def line_of_trace(trace: str) -> str | None:
    """Return the innermost line of the user's code in a stack trace that PyTorch keeps as text."""
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    own = [(file, int(line), function) for file, line, function in places if _is_users(file)]
    return _shown_line(*own[-1]) if own else None


def fixed_dimension(error: Exception, names: Sequence[str]) -> UserError | None:
    """Return the error for a dimension that was to stay free and that the module fixes, if it is one."""
    text = _COLOURS.sub("", str(error))
    if "Constraints violated" not in text and "ConstraintViolation" not in type(error).__name__:
        return None
    details = [line.strip()[2:].strip() for line in text.splitlines() if line.strip().startswith("- ")]
    plain = [_SIZE.sub(lambda match: _dimension(match, names), line) for line in details]
    fixed = [
        match
        for line in details
        if (match := re.search(_SIZE.pattern + r".*?(?:constant|specialized).*?\((\d+)\)", line)) is not None
    ]
    if not fixed:
        return UserError(
            "dimensions that were to stay free depend on each other",
            tried=plain or [useful_sentence(error)],
            help="give the dimensions that must agree one torch.export.Dim in dynamic_shapes",
        )
    name, axis, size = _name(fixed[0], names), int(fixed[0][2]), fixed[0][3]
    place = next((line for line in map(line_of_trace, text.split("\n\n")) if line is not None), None)
    return UserError(
        f"the module fixes dimension {axis} of input '{name}' at {size}, which was to stay free",
        place=place,
        help=f"dynamic_shapes={{'{name}': None}} fixes it, "
        f"{{'{name}': {{1: torch.export.Dim.DYNAMIC}}}} frees another axis; or write the module for any size",
    )


def _name(match: re.Match[str], names: Sequence[str]) -> str:
    place = int(match[1])
    return names[place] if place < len(names) else f"input {place}"


def _dimension(match: re.Match[str], names: Sequence[str]) -> str:
    return f"dimension {match[2]} of '{_name(match, names)}'"


class RefusedKinds(TorchFunctionMode):
    """While active, the first operator that takes or makes complex or sparse tensors is refused by name."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("__get__", "detach", "clone", "requires_grad_"):
            return result
        for value in _tensors((result, *args, *(kwargs or {}).values())):
            complex_numbers = value.dtype.is_complex
            if complex_numbers or value.layout != torch.strided:
                kind = "complex numbers" if complex_numbers else "sparse tensors"
                remedy = (
                    "keep real and imaginary parts as two tensors, and write their arithmetic out"
                    if complex_numbers
                    else "keep rows, columns and values as tensors: index the rows, add them by index_add"
                )
                raise UserError(
                    f"{_public_name(func)} works on {kind}, which ONNX graphs do not have",
                    place=user_line(),
                    help=remedy,
                )
        return result


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _public_name(func: Callable[..., Any]) -> str:
    """Return the name under which users call a function of PyTorch."""
    name = getattr(func, "__name__", str(func))
    if getattr(torch, name, None) is func:
        return f"torch.{name}"
    if name.startswith("_sparse_"):
        return f"torch.sparse.{name.removeprefix('_sparse_')}"
    return resolve_name(func) or name
