from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
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


def test_extras_are_those_of_the_page_on_installing() -> None:
    extras = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT.parent / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z]+)` \| .* \| .* \|$", page, re.MULTILINE)) == set(extras)


def test_a_source_distribution_packed_anew_has_the_same_bytes(tmp_path: Path) -> None:
    repack = runpy.run_path(str(ROOT.parent / "tools" / "build_release.py"))["repack"]
    archives: list[bytes] = []
    for number, names in enumerate((("b", "a"), ("a", "b"))):
        archive = tmp_path / f"{number}.tar.gz"
        with tarfile.open(archive, "w:gz") as files:
            for name in names:
                member = tarfile.TarInfo(f"x-1/{name}")
                member.size, member.mtime, member.uid, member.mode = 1, number, number, 0o600 + 0o40 * number
                files.addfile(member, io.BytesIO(name.encode()))
        repack(archive, 7)
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]
    with tarfile.open(tmp_path / "1.tar.gz") as files:
        assert [(m.name, m.mtime, m.uid, m.mode) for m in files] == [
            ("x-1/a", 7, 0, 0o644),
            ("x-1/b", 7, 0, 0o644),
        ]


def test_the_lowest_versions_are_those_that_are_allowed() -> None:
    """What .ci/run tests with is the lower bound of each package, but for those whose version is fixed."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    allowed: dict[str, str] = {}
    for word in (*project["dependencies"], *extras["data"], *extras["plot"], *extras["dev"]):
        bound = re.fullmatch(r"([a-z-]+)(?:\[.*\])?>=([0-9.]+),<.*", word)
        if bound is not None:
            allowed[bound[1]] = bound[2]
    listed: dict[str, str] = {}
    for line in (ROOT.parent / ".ci" / "lowest.txt").read_text().splitlines():
        pinned = re.fullmatch(r"([a-z-]+)==([0-9.]+?)(?:; python_version < .*)?", line)
        if pinned is not None:
            listed[pinned[1]] = pinned[2]

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in f"{version}.0.0".split(".")[:3])

    assert {name: release(version) for name, version in listed.items()} == {
        name: release(version) for name, version in allowed.items()
    }
