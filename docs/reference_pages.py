"""The reference pages of the site, made from the code when it is built: a hook of MkDocs, see mkdocs.yml."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click

import kfac_onnx
from kfac_onnx import metadata
from kfac_onnx.cli.main import VERBS, cli
from kfac_onnx.dialect.operators import DOMAIN, OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.dialect.signature import Port

BENCHMARKS: Final = Path(__file__).parents[1] / "benchmarks"

COMMANDS: Final = """# Commands

Every verb takes `--json`. Results go to stdout and everything else to stderr; the exit code is 0 when all is
well, 1 when the input is at fault, 2 when a check failed, 3 for a bug of ours. `-` as a model is standard
input.
"""
DIALECT: Final = """# The dialect `ai.kfac`

What the passes insert are functions of standard operators, whose bodies are in the model file; ONNX Runtime
inlines them. Letters in the shapes: `V` vocabulary, `D` width, `N` lookups, `U` distinct ids, `S` sampled
rows, `L` matrices of `R` rows and `C` columns; `[]` is a scalar, `...` leaves the further dimensions open.
The formulas are in [mathematics](../mathematics.md).
"""
PYTHON: Final = """# Python

What `import kfac_onnx` offers. Names load when they are first used. The PyTorch exporter is
`kfac_onnx.torch.export_training_graph`.
"""
WIDTH: Final = 100


def commands_page() -> str:
    """Return every verb with its usage and its options, as `--help` has them."""
    parts = [COMMANDS]
    context = click.Context(cli, info_name="kfac-onnx")
    for verb in VERBS:
        parts += [f"## {verb}\n", *_command(*_inside(cli, context, verb), verb)]
    return "\n".join(parts)


def _inside(group: click.Group, context: click.Context, name: str) -> tuple[click.Command, click.Context]:
    """Return a command of a group, and the context in which it tells its usage."""
    command = group.get_command(context, name)
    if command is None:
        raise KeyError(name)
    return command, click.Context(command, context, info_name=name)


def _command(command: click.Command, context: click.Context, title: str) -> list[str]:
    """Return the help of one command and, under headings of their own, of those in it."""
    usage = command.get_usage(context).removeprefix("Usage: ")
    parts = [f"```text\n{' '.join(usage.split())}\n```\n", inspect.cleandoc(command.help or "") + "\n"]
    rows: list[str] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if parameter.opts else None
        if record is not None:
            rows.append(f"| `{_cell(record[0])}` | {_cell(record[1]).replace('<', '&lt;')} |")
    if rows:
        parts.append("| option | |\n|---|---|\n" + "\n".join(rows) + "\n")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = f"{title} {name}"
            parts += [f"### {below}\n", *_command(*_inside(command, context, name), below)]
    return parts


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def dialect_page() -> str:
    """Return every operator of `ai.kfac` with its signature and attributes."""
    parts = [DIALECT]
    for operator in OPERATORS.values():
        meaning = operator.meaning[0].upper() + operator.meaning[1:]
        signature = f"{_ports(operator.inputs)} -> {_ports(operator.outputs)}"
        parts.append(f"## {operator.name}\n\n{meaning}.\n\n```text\n{DOMAIN}::{signature}\n```\n")
        rows = "".join(
            f"| `{item.name}` | {item.kind} | {'(' if item.open_lo else '['}{item.lo:g}, {item.hi:g}] |\n"
            for item in operator.attributes
        )
        if rows:
            parts.append(f"| attribute | kind | range |\n|---|---|---|\n{rows}")
    return "\n".join(parts)


def _ports(ports: tuple[Port, ...]) -> str:
    return " ".join(f"{port.name}:{port.dtype}[{','.join(port.shape)}]" for port in ports)


def python_page() -> str:
    """Return what `import kfac_onnx` offers: signatures and docstrings."""
    parts = [PYTHON]
    for name in kfac_onnx.__all__:
        thing: Any = getattr(kfac_onnx, name)
        if not callable(thing):
            continue
        parts += [f"## {name}\n", _described(name, thing)]
        if inspect.isclass(thing):
            for key in vars(thing):
                if not key.startswith("_"):
                    parts += _member(f"{name}.{key}", inspect.getattr_static(thing, key), getattr(thing, key))
    return "\n".join(parts)


def _member(name: str, static: object, member: object) -> list[str]:
    if isinstance(static, property):
        return [f"### {name}\n", f"````text\n{inspect.getdoc(static)}\n````\n"]
    return (
        [f"### {name}\n", _described(name, cast("Callable[..., object]", member))] if callable(member) else []
    )


def _described(name: str, thing: Callable[..., object]) -> str:
    """Return signature and docstring, each as one block: docstrings are written to be read as they are."""
    if thing is kfac_onnx.VerifyError:  # an exception without arguments of its own
        return f"````text\n{inspect.getdoc(thing) or ''}\n````\n"
    signature = inspect.signature(thing)
    text = str(signature).replace("'", "")
    if len(name) + len(text) > WIDTH:
        parameters = [
            str(item).replace("'", "") for item in signature.parameters.values() if item.name != "self"
        ]
        result = text.rpartition(" -> ")[2]
        inside = "".join(f"\n    {item}," for item in parameters)
        text = f"({inside}\n) -> {result}"
    return f"````python\n{name}{text}\n````\n\n````text\n{inspect.getdoc(thing) or ''}\n````\n"


def metadata_page() -> str:
    """Return what a model file says of itself."""
    return f"# Metadata keys\n\n{inspect.cleandoc(metadata.__doc__ or '')}\n"


def benchmarks_page() -> str:
    """Return the benchmarks with the first sentence of each."""
    rows: list[str] = []
    for path in sorted(BENCHMARKS.glob("*/README.md")):
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        first = " ".join(rest.strip().split("\n\n")[0].split())
        rows.append(
            f"## {title.removeprefix('# ')}\n\n{first} (`benchmarks/{path.parent.name}` in the repository)\n"
        )
    return "# Benchmarks\n\nWhat is claimed is measured, and what was measured is committed.\n\n" + "\n".join(
        rows
    )


PAGES: Final = {
    "reference/commands.md": commands_page,
    "reference/dialect.md": dialect_page,
    "reference/python.md": python_page,
    "reference/metadata.md": metadata_page,
    "reference/benchmarks.md": benchmarks_page,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those that MkDocs has found in the folder."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files
