"""`kfac-onnx`: the list of verbs, and what each kind of error does to the exit code.

0 fine, 1 the user's input, 2 a check failed, 3 a bug. Results go to stdout, everything else to stderr.
A verb's module is imported when the verb is called, so that `--help` stays fast.
"""

from __future__ import annotations

import errno
import importlib
import logging
import sys
from typing import Final

import click

from kfac_onnx.cli.output import discard_output, print_json, say, show_every_sign
from kfac_onnx.errors import UserError, VerifyError, did_you_mean, safe_line

__all__ = ["VERBS", "cli", "main"]

FINE: Final = 0
USER: Final = 1
CHECK_FAILED: Final = 2
BUG: Final = 3
INTERRUPTED: Final = 130

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What writing to standard output may raise."""

VERBS: Final[dict[str, str]] = {
    "scan": "List the embedding tables of a training graph, and what was refused and why.",
    "differentiate": "Write a training graph: a forward-only model with loss and gradients.",
    "transform": "Write a model that trains its embedding tables with K-FAC.",
    "inspect": "Show what was inserted into a model: state, cost and phase of each part.",
    "train": "Train a training graph on a file of arrays.",
    "vocabulary": "Make rows of ids that are texts, or integers of 64 bits.",
    "verify": "Check a model's gradients against its loss, or the block against golden files.",
    "diff": "Show what a pipeline changed between two models.",
    "opt": "Run a textual pipeline of passes over a model.",
    "check": "Find what is wrong with a training graph, or probably not meant.",
    "why": "Explain why a parameter was taken as an embedding table, or was not.",
    "demo": "Train a small language model with Adam, Muon and K-FAC, and compare.",
    "bench": "Measure what a training step costs here, beside what else could be used.",
}
"""Verb to its one line of help. Its command is the function `command` in `kfac_onnx/cli/<verb>.py`."""


class LazyVerbs(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb's command, or None for an unknown verb."""
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"kfac_onnx.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; raises UserError with the nearest verb."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise UserError(
                f"unknown verb '{args[0]}'{did_you_mean(args[0], VERBS)}",
                help=f"the verbs are: {', '.join(VERBS)}",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of verbs without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=LazyVerbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    no_args_is_help=True,
)
@click.option("--version", is_flag=True, help="Show the version and exit.")
@click.option(
    "--json", "as_json", is_flag=True, help="With --version: all versions and the machine, as JSON."
)
@click.pass_context
def cli(ctx: click.Context, version: bool, as_json: bool) -> None:
    """K-FAC for embedding tables in ONNX training graphs.

    Start with `kfac-onnx demo`, or with `kfac-onnx scan MODEL` on your own training graph.
    """
    if version:
        from kfac_onnx.version import __version__, environment

        if as_json:
            print_json(environment())
        else:
            say(f"kfac-onnx {__version__}")
        ctx.exit()
    if as_json:
        raise UserError("--json before a verb is for --version", help="put it behind the verb")
    if ctx.invoked_subcommand is None:
        raise click.UsageError("Missing command.", ctx)


class _StderrHandler(logging.Handler):
    """Writes each log record as one line to whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(prefix + record.getMessage(), err=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code. The console script exits with it."""
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # what it says of a model, an error says
    logger = logging.getLogger("kfac_onnx")
    handler = _StderrHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return _run(arguments)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(arguments: list[str] | None) -> int:
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]  `>&-` in a shell
        say("error: standard output is closed, so that no result can be written", err=True)
        say("  help: `>/dev/null` takes what nobody wants to see", err=True)
        return USER
    show_every_sign()
    try:
        result = cli.main(arguments, prog_name="kfac-onnx", standalone_mode=False)
        sys.stdout.flush()
    except UserError as e:
        say(f"error: {e}", err=True)
        return USER
    except click.UsageError as e:
        say(f"error: {e.format_message()}", err=True)
        if e.ctx is not None:
            say(f"  help: run `{e.ctx.command_path} --help`", err=True)
        return USER
    except click.ClickException as e:
        say(f"error: {e.format_message()}", err=True)
        return USER
    except (click.Abort, KeyboardInterrupt):
        say("interrupted", err=True)
        return INTERRUPTED
    except SystemExit as e:
        # How click marks a broken pipe, and rich.
        marked = type(sys.stdout).__name__.endswith("PacifyFlushWrapper")
        if not (marked or isinstance(e.__context__, BrokenPipeError)):
            raise
        return FINE  # the reader of our output has seen enough
    except MemoryError:
        say("error: the memory ran out", err=True)
        say("  help: a smaller batch, or more memory; `inspect` says what a model's states take", err=True)
        return USER
    except OSError as e:
        if e.errno in _NO_ROOM and e.filename is None:  # files of ours have their own sentences
            discard_output()
            say(f"error: the result cannot be written to standard output: {e.strerror}", err=True)
            return USER
        if e.errno != errno.ENAMETOOLONG:
            return _bug(e, arguments)
        say(safe_line(f"error: '{e.filename}' is too long for the name of a file"), err=True)
        return USER
    except Exception as e:  # the outermost frame: whatever reaches it is a bug to report
        return _bug(e, arguments)
    return result if isinstance(result, int) else FINE


def _bug(error: Exception, arguments: list[str] | None) -> int:
    from kfac_onnx.cli.bug import report

    given = arguments if arguments is not None else sys.argv[1:]
    report(error, given, broken_pass=isinstance(error, VerifyError))
    return BUG
