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


def test_python_dash_m_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kfac_onnx", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"kfac-onnx {kfac_onnx.__version__}")
