from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kfac_onnx

ROOT = Path(kfac_onnx.__file__).parent


def test_every_public_name_is_there() -> None:
    for name in kfac_onnx.__all__:
        assert getattr(kfac_onnx, name) is not None
        assert name in dir(kfac_onnx)
    with pytest.raises(AttributeError, match="module 'kfac_onnx' has no attribute 'scna'"):
        kfac_onnx.scna  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]  the mistake under test


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, kfac_onnx; "
        "sys.exit(bool({'numpy', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0  # noqa: S603  our own interpreter


ROOMS = [
    "reference",
    "dialect",
    "fisher",
    "frontends",
    "passes",
    "placement",
    "runtime",
    "demo",
    "bench",
    "cli",
]
"""The lowest first: a room may import those before it (but the dialect not the reference)."""


def imported_rooms(path: Path) -> set[tuple[int, str]]:
    """Return the line and the room of each import of a module of the package, within functions too."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "kfac_onnx":
                found.add((node.lineno, rest.split(".")[0]))
    return found


def test_rooms_import_only_downwards() -> None:
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)
    wrong: list[str] = []
    for level, room in enumerate(ROOMS):
        above = {*ROOMS[level + 1 :], *(["reference"] if room == "dialect" else [])}
        for path in (ROOT / room).rglob("*.py"):
            wrong += [
                f"{path.relative_to(ROOT)}:{line}: imports {other}"
                for line, other in sorted(imported_rooms(path))
                if other in above
            ]
    assert wrong == []


def test_python_dash_m_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kfac_onnx", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"kfac-onnx {kfac_onnx.__version__}")
