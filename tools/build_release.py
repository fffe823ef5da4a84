"""Build the source distribution and the wheel so that the same sources always give the same bytes.

    python tools/build_release.py dist            build both into a folder
    python tools/build_release.py --check dist    build twice, from copies of other ages, and compare

Times are those of SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch/), of the last
commit where it is not set, or 1 January 2020 outside a checkout. setuptools keeps to it in wheels; source
distributions are packed anew: files in the order of their names, without owner, with that time. The wheel is
built from the source distribution.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
OUTSIDE: Final = 1577836800
"""The time of sources that no commit dates: 1 January 2020."""
LEFT_OUT: Final = shutil.ignore_patterns("*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
"""What tools leave in any folder; `SKIPPED` lies at the root."""
SKIPPED: Final = ("build", "dist", ".git", "passes", "runtime")
"""Built things, and the two links."""


def epoch() -> int:
    """Return the time that everything in a release has, in seconds since 1970."""
    word = os.environ.get("SOURCE_DATE_EPOCH")
    if word is not None:
        return int(word)
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return OUTSIDE
    command = [git, "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else OUTSIDE


def copy(target: Path) -> None:
    """Copy the sources without what is no part of them."""
    target.mkdir()
    for item in ROOT.iterdir():
        if item.name in SKIPPED or LEFT_OUT(str(ROOT), [item.name]):
            continue
        if item.is_dir():
            shutil.copytree(item, target / item.name, ignore=LEFT_OUT)
        else:
            shutil.copy2(item, target / item.name)


def repack(archive: Path, when: int) -> None:
    """Pack a .tar.gz anew: the same files give the same bytes, whoever built it, and when."""
    packed = io.BytesIO()
    with (
        tarfile.open(archive) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.linkname, plain.mtime = (
                member.type,
                member.size,
                member.linkname,
                when,
            )
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, old.extractfile(member) if member.isfile() else None)
    archive.write_bytes(gzip.compress(packed.getvalue(), mtime=when))


def build(source: Path, target: Path, when: int) -> list[Path]:
    """Build both distributions of a folder of sources into another one; return their paths, wheel first."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(when), "PYTHONHASHSEED": "0"}
    environment.pop("PYTHONPATH", None)

    def run(*words: str | Path) -> None:
        command = [sys.executable, "-m", "build", "--no-isolation", *map(str, words), "--outdir", str(target)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    run("--sdist", source)
    (archive,) = target.glob("*.tar.gz")
    repack(archive, when)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        run("--wheel", unpacked)
    (wheel,) = target.glob("*.whl")
    return [wheel, archive]


def missing(wheel: Path, archive: Path) -> list[str]:
    """Return what the distributions lack of the sources, and what the wheel holds beside the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as files:
        held = {member.name.partition("/")[2] for member in files.getmembers()}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kfac_onnx").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    problems = [f"{wheel.name} lacks {name}" for name in sorted(package - names)]
    problems += [f"{archive.name} lacks {name}" for name in sorted(package - held)]
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "tests/conftest.py",
        "docs/index.md",
        ".ci/run",
        "Makefile",
    ):
        if name not in held:
            problems.append(f"{archive.name} lacks {name}")
    tops = {name.partition("/")[0] for name in names}
    other = sorted(top for top in tops if top != "kfac_onnx" and not top.endswith(".dist-info"))
    return problems + [f"{wheel.name} also holds {name}" for name in other]


def main() -> int:
    """Build, with `--check` twice; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the distributions go")
    parser.add_argument("--check", action="store_true", help="build twice and compare")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    when, sums = epoch(), list[dict[str, str]]()
    for age in (0, 86400) if options.check else (0,):
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / f"source{age}", Path(folder) / "dist"
            copy(source)
            for place in source.rglob("*"):
                os.utime(place, (OUTSIDE + age, OUTSIDE + age), follow_symlinks=False)
            products = build(source, target, when)
            sums.append({item.name: hashlib.sha256(item.read_bytes()).hexdigest() for item in products})
            problems = missing(*products)
            for item in products:
                shutil.copy(item, options.folder)
    if len(sums) == 2 and sums[0] != sums[1]:
        problems.append("two builds of the same sources differ")
    for name, digest in sums[0].items():
        print(f"{digest}  {name}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
