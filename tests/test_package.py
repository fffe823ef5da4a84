from __future__ import annotations

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


def test_rooms_import_only_downwards() -> None:
    # kfac_onnx.cli > demo > runtime > passes > frontends > fisher > dialect, reference
    order = ["reference", "dialect", "fisher", "frontends", "passes", "runtime", "demo", "cli"]
    wrong: list[str] = []
    for level, room in enumerate(order):
        above = order[level + 1 :] + (["reference"] if room == "dialect" else [])
        for path in (ROOT / room).rglob("*.py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                words = line.split()
                if words[:1] in (["from"], ["import"]) and len(words) > 1:
                    parts = words[1].split(".")
                    if parts[0] == "kfac_onnx" and len(parts) > 1 and parts[1] in above:
                        wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []


def test_python_dash_m_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kfac_onnx", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"kfac-onnx {kfac_onnx.__version__}")
