"""Options that several verbs share."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from kfac_onnx.errors import UserError
from kfac_onnx.passes.standard import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kfac_onnx.device.providers import GivenProviders, Provider
    from kfac_onnx.pipeline.pipeline import Trace

__all__ = [
    "BLOCK_OPTIONS",
    "REST_OPTIONS",
    "block_options",
    "block_settings",
    "chosen_providers",
    "common",
    "given_options",
    "gradient_pairs",
    "is_given",
    "is_quiet",
    "json_option",
    "model_argument",
    "optimizer_options",
    "parameters_option",
    "provider_names",
    "provider_option",
    "reading_options",
    "target_of",
    "trace_of",
    "trace_options",
]

P = ParamSpec("P")
R = TypeVar("R")


def _set_level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            logging.getLogger("kfac_onnx").setLevel(level)

    return callback


def common(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--json`, `--verbose` and `--quiet`, which every verb has."""
    function = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, is_eager=True,
        callback=_set_level(logging.ERROR), help="Say nothing on stderr but errors.",
    )(function)  # fmt: skip
    function = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, is_eager=True,
        callback=_set_level(logging.DEBUG), help="Say more on stderr.",
    )(function)  # fmt: skip
    return json_option(function)


def is_quiet() -> bool:
    """Return whether `--quiet` was given."""
    return logging.getLogger("kfac_onnx").level >= logging.ERROR


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")

html_option = click.option(
    "--html", metavar="FILE", help="Also write a page to look at: one file, for any browser, without network."
)

model_argument = click.argument("model", metavar="MODEL")

parameters_option = click.option(
    "--parameters",
    metavar="FILE",
    help="Values of parameters and constants that the graph takes as inputs: .npz, .safetensors, "
    "an .onnx with initializers, or ONNX Runtime's .checkpoint.",
)


def reading_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--loss` and `--gradients`: what a training graph may leave to the user to say."""
    function = click.option(
        "--gradients",
        metavar="PARAM=OUTPUT",
        multiple=True,
        help="The graph output that is a parameter's gradient, or VALUES:INDICES where it is rows and "
        "their ids; may be given several times.",
    )(function)
    return click.option("--loss", metavar="NAME", help="The graph output that is the loss.")(function)


_TRACE: Final = "kfac_onnx.trace"


def trace_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--timing`, `--print-after-change` and `--verify-reading`; `trace_of` reads them."""
    for name, text in (
        ("--verify-reading", "Check the graph after each pass that reads it, not only at the end."),
        ("--print-after-change", "Log the model after each pass that changed it."),
        ("--timing", "Log seconds and counts of each pass."),
    ):
        add = click.option(name, is_flag=True, expose_value=False, callback=_keep_trace, help=text)
        function = add(function)
    return function


def _keep_trace(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    settings: dict[str, bool] = ctx.meta.setdefault(_TRACE, {})
    settings["verify" if parameter.name == "verify_reading" else str(parameter.name)] = value


def trace_of(ctx: click.Context) -> Trace:
    """Return what `trace_options` say is to be checked and shown between passes."""
    from kfac_onnx.pipeline.pipeline import Trace

    return Trace(**ctx.meta.get(_TRACE, {}))


def optimizer_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--preset`, `--lr`, `--rest`, `--rest-lr`: how tables and other parameters are trained.

    And `REST_OPTIONS`, which `block_settings` reads.
    """
    from kfac_onnx.fisher.presets import PRESETS
    from kfac_onnx.passes.insertion.defaults import DEFAULT_PRESET
    from kfac_onnx.passes.standard import PLAIN

    rates = ", ".join(f"{preset.lr:g} for {name}" for name, preset in PRESETS.items())
    for name, kind, metavar, help_text in reversed(_REST):
        function = click.option(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, expose_value=False,
            callback=_keep, help=help_text,
        )(function)  # fmt: skip
    function = click.option(
        "--rule",
        "rules",
        metavar="PATTERN=OPTIMIZER{...}",
        multiple=True,
        expose_value=False,
        callback=_keep_rules,
        help="An optimizer for single parameters, such as 'emb_*=adaptive{lr=0.02}'; the last "
        "match wins; may be given several times.",
    )(function)
    function = click.option(
        "--rest-lr", type=float, help="Learning rate of all other parameters (default 0.001)."
    )(function)
    function = click.option(
        "--rest",
        metavar="NAME",
        default="adam",
        show_default=True,
        help="Optimizer of all other parameters: sgd, momentum, adam, adamw, adagrad; or muon or kfac: "
        "Muon or K-FAC on hidden matrices, a block of their own for output tables, adamw on all else.",
    )(function)
    function = click.option(
        "--lr",
        type=float,
        help=f"Learning rate of the embedding tables (default: the preset's; {rates}).",
    )(function)
    return click.option(
        "--preset",
        metavar="NAME",
        default=DEFAULT_PRESET,
        show_default=True,
        help=f"How the embedding tables are trained: {', '.join(PRESETS)}, or plainly: {', '.join(PLAIN)}.",
    )(function)


_REST: Final = (
    (
        "hidden_lr",
        float,
        "X",
        "Learning rate of hidden matrices, with --rest muon (default 0.01) or kfac (0.003).",
    ),
    ("output_lr", float, "X", "Learning rate of output tables, with --rest muon or kfac (default 0.016)."),
    (
        "weight_decay",
        float,
        "X",
        "Decoupled decay of other matrices (default: 0.01 for adamw, muon and kfac, else 0).",
    ),
    ("table_decay", float, "X", "Decoupled decay of the tables' looked-up rows (default 0)."),
    ("beta1", float, "X", "Weight kept from the old first moment of --rest (default 0.9)."),
    ("beta2", float, "X", "Weight kept from the old second moment of --rest (default 0.999)."),
    ("epsilon", float, "X", "What --rest adds to its root (default 1e-8; 1e-10 for adagrad)."),
    ("clip_norm", float, "X", "Largest global norm of all gradients; beyond it they are scaled down."),
    ("clip_value", float, "X", "Largest absolute entry of a gradient; beyond it entries are cut."),
)
REST_OPTIONS: Final = (*(name for name, *_ in _REST), "rules")
"""What `optimizer_options` adds besides preset and rates."""

BLOCK_OPTIONS: Final = (*BLOCK, "padding_idx")
"""What `block_options` adds."""

_BLOCK: Final = "kfac_onnx.block"


def block_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add `BLOCK_OPTIONS`, most with the types and help of the pass; `block_settings` reads them."""
    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
    from kfac_onnx.pipeline.options import options_of

    function = click.option(
        "--padding-idx",
        metavar="PARAM=ROW",
        multiple=True,
        expose_value=False,
        callback=_keep_padding,
        help="A row that is padding, where the exporter lost it; may be given several times.",
    )(function)
    options = {option.field: option for option in options_of(InsertEmbeddingKfac)}
    for option in (options[name] for name in reversed(BLOCK)):
        function = click.option(
            f"--{option.name}",
            type={"int": int, "float": float}.get(option.kind, str),
            metavar="|".join(option.choices) if option.choices else "N" if option.kind == "int" else "X",
            expose_value=False,
            callback=_keep,
            help=f"{option.help[0].upper()}{option.help[1:].replace('if none', 'if not given')}.",
        )(function)
    return function


def _keep(ctx: click.Context, parameter: click.Parameter, value: float | str | None) -> None:
    if value is not None:
        settings: dict[str, float | str] = ctx.meta.setdefault(_BLOCK, {})
        settings[str(parameter.name)] = value


def _keep_rules(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> None:
    if words:
        settings: dict[str, object] = ctx.meta.setdefault(_BLOCK, {})
        settings["rules"] = words


def _keep_padding(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> None:
    from kfac_onnx.tables.padding import padding_rows

    if words:
        settings: dict[str, object] = ctx.meta.setdefault(_BLOCK, {})
        settings[str(parameter.name)] = padding_rows(words)


def block_settings(ctx: click.Context) -> dict[str, Any]:
    """Return what was given of `block_options` and `REST_OPTIONS`, by the names that `transform` takes."""
    return dict(ctx.meta.get(_BLOCK, {}))


def given_options(ctx: click.Context, names: Iterable[str]) -> list[str]:
    """Return which of these parameters are given (see `is_given`), as they are written: `--rest-lr`."""
    return [f"--{name.replace('_', '-')}" for name in names if is_given(ctx, name)]


def is_given(ctx: click.Context, name: str) -> bool:
    """Say whether a parameter is on the command line, or in a file of settings and not the default."""
    source = ctx.get_parameter_source(name)
    if source == click.core.ParameterSource.DEFAULT_MAP:
        value: object = (ctx.default_map or {}).get(name)
        default = next(item.default for item in ctx.command.params if item.name == name)
        if value is False or value == []:  # a flag, or an option of several words, that says nothing
            return False
        return value != default
    return source == click.core.ParameterSource.COMMANDLINE


def provider_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add `--provider` and `--provider-option`; `chosen_providers` reads them."""
    function = click.option(
        "--provider-option",
        metavar="NAME=VALUE",
        multiple=True,
        expose_value=False,
        callback=_keep_provider_options,
        help="An option of that provider, such as device_id=1 or gpu_mem_limit=8000000000 (bytes, of each "
        "stage's arena); may be given several times.",
    )(function)
    return click.option(
        "--provider",
        metavar="NAME",
        multiple=True,
        help="ONNX Runtime's execution provider: cpu (default), cuda, or its full name. 'cuda,cpu' falls "
        "back, with a warning, where CUDA does not work.",
    )(function)


_PROVIDER: Final = "kfac_onnx.provider"


def _keep_provider_options(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> None:
    from kfac_onnx.device.provider_options import option_pairs

    ctx.meta[_PROVIDER] = option_pairs(words)


def chosen_providers(ctx: click.Context, words: tuple[str, ...]) -> list[Provider]:
    """Return the execution providers of `--provider`, the first with what `--provider-option` says.

    Raises UserError for an option without a provider that has any.
    """
    names = provider_names(words)
    options: dict[str, str] = ctx.meta.get(_PROVIDER, {})
    if not options:
        return [*names]
    if names[0] == provider_names(())[0]:
        raise UserError(
            "--provider-option is given, but the CPU has no options", help="name a provider: --provider cuda"
        )
    return [(names[0], options), *names[1:]]


def target_of(providers: GivenProviders) -> str:
    """Return what a graph that is transformed on the fly is lowered for."""
    from kfac_onnx.device.providers import on_cuda

    return "cuda" if on_cuda(providers) else "cpu"


def provider_names(words: tuple[str, ...]) -> list[str]:
    """Return the execution providers of `--provider` by their full names: `cuda` is `CUDAExecutionProvider`.

    They are in order of preference, as several options or as one with commas; the CPU if there are none.
    """
    from kfac_onnx.device.providers import SHORT_NAMES

    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    return [SHORT_NAMES.get(name, name) for name in names] or [SHORT_NAMES["cpu"]]


def gradient_pairs(words: tuple[str, ...]) -> dict[str, str] | None:
    """Return `--gradients` as a mapping from parameter to output; None when not given.

    Raises UserError for a word without `=` or a parameter named twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        parameter, equals, output = word.rpartition("=")
        if not equals or not parameter or not output:
            raise UserError(f"--gradients wants PARAM=OUTPUT, not '{word}'")
        if parameter in pairs:
            raise UserError(f"--gradients names the parameter '{parameter}' twice")
        pairs[parameter] = output
    return pairs or None
