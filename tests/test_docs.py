"""The documents tell the truth: their examples run, their commands and options exist."""

from __future__ import annotations

import re
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import click
import pytest
from golden_models import parts_of

from kfac_onnx.api import scan
from kfac_onnx.cli.main import VERBS, cli, main
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.pipeline import registry
from kfac_onnx.pipeline.registry import BUILT_IN

ROOT = Path(__file__).parents[1]
GRAPHS = [
    ROOT / "tests" / "data" / "graphs" / f"{name}.onnx"
    for name in (
        "fwd_dyncore__nplm",
        "jax2onnx__nplm_take",
        "ortart_legcore__nplm",
        "ortgrad_leg__siamese",
        "ortmodule_leg__nplm",
        "tf2onnx_sgd__nplm",
        "torchjoint_in__nplm",
        "torchmakefx__nplm",
        "traininginfo_handnplm__nplm_adam",
    )
]


def blocks(name: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_your_first_pass_works_as_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = next(block for block in blocks("CONTRIBUTING.md") if block.startswith("# RUN:"))
    source = next(block for block in blocks("CONTRIBUTING.md") if "class DropIdentity(Pass)" in block)
    module = types.ModuleType("drop_identity_of_the_guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # Whoever follows the guide has registered the pass already.
    others = {name: cls for name, cls in registry._REGISTERED.items() if name != "drop-identity"}
    monkeypatch.setattr(registry, "_REGISTERED", others)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)  # noqa: S102  our own document
    path = tmp_path / "drop-identity.onnxtxt"
    path.write_text(golden)
    (part,) = parts_of(path)
    for pipeline in ("drop-identity", "drop-identity{limit=1}"):
        assert main(["opt", str(path), "-p", pipeline]) == 0
        output = capsys.readouterr().out
        assert part.check(output, tmp_path) == 0, output


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/passes.md",
        "docs/patterns.md",
        "docs/mathematics.md",
        "docs/extending.md",
        "docs/how-to/data.md",
    ],
)
def test_commands_in_the_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    context = click.Context(cli)
    found = re.findall(r"kfac-onnx (\w[\w-]*)([^`\n]*)", text)
    for verb, rest in found:
        assert verb in VERBS, verb
        command: Any = cli.get_command(context, verb)
        if isinstance(command, click.Group):
            command = command.commands[rest.split()[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in rest.split() if word.startswith("--")} <= known, (verb, rest)


def test_tables_of_the_documents_are_complete() -> None:
    passes = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}`" in passes for name in BUILT_IN)
    rates = (ROOT / "docs" / "how-to" / "rates.md").read_text(encoding="utf-8")
    assert all(f"| `{name}`" in rates for name in PRESETS)
    mathematics = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in mathematics for name in PRESETS)
    rooms = {path.name for path in (ROOT / "kfac_onnx").iterdir() if (path / "__init__.py").is_file()}
    assert all(f"`kfac_onnx/{room}/`" in readme for room in rooms)
    commands = "pip install . && kfac-onnx demo", "pip install -e '.[dev]' && pytest"
    assert all(f"\n{command}\n" in readme for command in commands)


def test_the_page_of_patterns_lists_every_finding_and_frontend() -> None:
    page = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")
    folder = ROOT / "kfac_onnx" / "reports" / "checks"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    found = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    found |= {"ambiguous-copy", "refused-table", "zero-table", "constant-weights"}  # chosen by a condition
    assert found == set(re.findall(r"^\| `([a-z-]+)` +\| (?:error|warning|note)", page, re.MULTILINE))
    readers = set(re.findall(r"^\| `([a-z-]+)` +\| (?!error|warning|note)", page, re.MULTILINE))
    assert {scan(path).frontend for path in GRAPHS} <= readers


GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("name", ["docs/passes.md", "docs/architecture.md", "README.md", "CONTRIBUTING.md"])
def test_generated_parts_are_those_of_the_code_and_the_table_of_rooms(name: str) -> None:
    pages = GENERATED["pages"]()
    assert (ROOT / name).read_text(encoding="utf-8") == pages[ROOT / name], "run `make docs`"


def test_each_room_and_floor_is_drawn() -> None:
    rooms = {path.stem for path in (ROOT / "kfac_onnx").iterdir() if path.suffix in ("", ".py")} - {
        "__init__", "__main__", "__pycache__",
    }  # fmt: skip
    for name in ("README.md", "docs/architecture.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"^\| `kfac_onnx/(\w+)(?:/|\.py)` \|", text, re.MULTILINE)) == rooms
    for name in ("CONTRIBUTING.md", "docs/architecture.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        drawn = re.findall(r"^ ?\d+  ([a-z ]+)$", text, re.MULTILINE)
        assert {room for line in drawn for room in line.split()} == rooms


def test_what_architecture_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:kfac_onnx|tests|docs|benchmarks)/[\w/.]+)`", text)
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_makefile_prints_its_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", text, re.MULTILINE)
    assert set(targets) == set(re.findall(r"^([a-z]+):.*## ", text, re.MULTILINE))
