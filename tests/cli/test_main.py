from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import kfac_onnx
from kfac_onnx.cli import main as main_module
from kfac_onnx.cli.main import VERBS, cli
from kfac_onnx.errors import UserError, VerifyError
from kfac_onnx.version import PACKAGES

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from kfac_onnx.cli.main import main; code = main(['--help']); "
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich'} & set(sys.modules); "
        "sys.exit(code or bool(heavy))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603  our own interpreter
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    assert seconds < 2  # 0.1 s alone; the promise of 0.5 s needs an idle machine, the imports do not


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_json_and_one_line(run: Callable[..., Outcome], verb: str) -> None:
    outcome = run(verb, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out
    assert outcome.err == ""


def test_usage_errors_are_the_users(run: Callable[..., Outcome]) -> None:
    assert run("scna", "x").err == (
        "error: unknown verb 'scna'; did you mean 'scan'?\n  help: the verbs are: " + ", ".join(VERBS) + "\n"
    )
    outcome = run("scan")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: Missing argument 'MODEL|FOLDER'.\n  help: run `kfac-onnx scan --help`\n"
    assert run("scan", "x", "--nonsense").code == 1


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def install(error: BaseException) -> None:
        @click.command("scan")
        def command() -> None:
            raise error

        monkeypatch.setattr(cli, "get_command", lambda ctx, name: command)

    return install


def test_each_kind_of_error_has_its_exit_code(
    run: Callable[..., Outcome], failing: Callable[[BaseException], None]
) -> None:
    failing(UserError("the table 'emb' is upside down", place="train.onnx", help="turn it over"))
    outcome = run("scan")
    assert outcome.code == 1
    assert outcome.err == ("error: the table 'emb' is upside down\n  --> train.onnx\n  help: turn it over\n")
    failing(KeyboardInterrupt())
    assert run("scan").code == 130
    failing(click.exceptions.Exit(2))
    assert run("scan").code == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (VerifyError("the model is broken after dce"), "a pass left a broken model behind"),
        (ZeroDivisionError("division by zero"), "something went wrong inside kfac-onnx"),
    ],
)
def test_a_bug_leaves_a_report(
    run: Callable[..., Outcome],
    failing: Callable[[BaseException], None],
    relu: Path,
    error: Exception,
    sentence: str,
) -> None:
    failing(error)
    outcome = run("scan")
    assert outcome.code == 3
    first, detail, remedy = outcome.err.splitlines()
    assert first == f"error: {sentence}; this is a bug, not your mistake"
    assert detail == f"  {type(error).__name__}: {error}"
    report = Path(remedy.removeprefix("  help: report it with the file ").replace("DIR", str(relu.parent)))
    data = json.loads(report.read_text())
    report.unlink()
    assert data["command"] == ["kfac-onnx", "scan"]
    assert data["versions"]["onnx-ir"]
    assert any("main.py" in line for line in data["traceback"])


def test_versions_for_reports(run: Callable[..., Outcome]) -> None:
    outcome = run("--version", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert set(outcome.data) == {"kfac-onnx", "python", "system", "machine", "cpus", *PACKAGES}
    assert outcome.data["kfac-onnx"] == kfac_onnx.__version__
    assert outcome.data["onnxruntime"] == importlib.metadata.version("onnxruntime")
    outcome = run("--json", "scan", "x")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: --json before a verb is for --version\n  help: put it behind the verb\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_and_options(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            main_module.main([])
        return capsys.readouterr().out

    monkeypatch.setenv("_KFAC_ONNX_COMPLETE", f"{shell}_source")
    monkeypatch.setattr("click.shell_completion.BashComplete._check_version", lambda *_: None)
    assert "kfac-onnx" in said()
    monkeypatch.setenv("_KFAC_ONNX_COMPLETE", f"{shell}_complete")
    for words, word, expected in (
        ("kfac-onnx ins", "ins", "inspect"), ("kfac-onnx inspect --look", "--look", "--lookups"),
    ):  # fmt: skip
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", word if shell == "fish" else str(len(words.split()) - 1))
        assert expected in said()


def test_results_go_to_stdout_and_words_to_stderr(run: Callable[..., Outcome], relu: Path) -> None:
    outcome = run("opt", relu, "-p", "dce", "--timing", "--json")
    assert outcome.code == 0
    assert outcome.data["passes"][0]["removed"] == 2
    assert outcome.err.endswith(" ms  dce: +0 -2 ~0, 1 nodes removed, 1 initializers removed\n")
    assert run("opt", relu, "-p", "dce", "--timing", "--json", "--quiet").err == ""


def test_verbs_and_files_agree() -> None:
    folder = Path(main_module.__file__).parent
    others = {
        "__init__",
        "main",
        "bug",
        "config",
        "data_options",
        "options",
        "output",
        "placement",
        "resumed",
        "train_ranks",
    }
    others |= {"measuring", "pages", "rows", "scan_folder"}
    assert {path.stem for path in folder.glob("*.py")} - others == set(VERBS)
