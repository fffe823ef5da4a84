"""Files are whole or absent: what a write syncs, in which order, and what killed writes leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kfac_onnx.disk.atomic import atomic_path
from kfac_onnx.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from kfac_onnx.disk.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    {then}
"""


def program(then: str, target: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", KILLED.format(then=then), str(target)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)  # noqa: S603  our own


def write(target: Path, text: str) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(text)


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target, other = tmp_path / "run.ckpt", tmp_path / "run"
    write(target, "old")
    for place in (target, other):
        killed = program("os.kill(os.getpid(), signal.SIGKILL)", place)
        killed.communicate(timeout=30)
        assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".run.*.tmp"))) == 2
    assert target.read_text() == "old"
    write(target, "new")
    (left,) = tmp_path.glob(".run.*.tmp")  # that of the other name
    assert (left / "run").read_text() == "half"
    write(other, "new")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run", "run.ckpt"]


def test_the_folder_of_a_write_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "run.ckpt"
    running = program("print('ready', flush=True); sys.stdin.readline()", target)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    write(target, "ours")
    assert len(list(tmp_path.glob(".run.ckpt.*.tmp"))) == 1
    running.communicate("go on\n", timeout=30)
    assert running.returncode == 0
    assert target.read_text() == "half"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_of_the_users_is_not_taken_for_a_left_one(tmp_path: Path) -> None:
    names = [".a.txt.abcdefgh.tmp", ".a.txt.notes.tmp", ".a.txt.ABCDEFGH.tmp"]
    for name in names[1:]:
        (tmp_path / name).mkdir()
    (tmp_path / names[0]).write_text("a file, not a folder")
    write(tmp_path / "a.txt", "x")
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([*names, "a.txt"])


def test_everything_is_synced_before_and_after_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(place: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{place}")).name  # noqa: PTH115  no Path to read
        seen.append(("sync", name))
        fsync(place)

    def renamed(source: Path, target: Path) -> None:
        seen.append(("rename", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files have no names on this system")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_path(tmp_path / "m.onnx") as temporary:
        temporary.write_text("model")
        temporary.with_name("m.onnx.data").write_text("data")
    assert seen == [
        ("sync", "m.onnx.data"),
        ("sync", "m.onnx"),
        ("rename", "m.onnx.data"),
        ("rename", "m.onnx"),
        ("sync", tmp_path.name),
    ]


def test_a_sync_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a"
    write(target, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        write(target, "new")
    assert str(error.value) == f"'{target}' cannot be written: No space left on device"
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_removed_at_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove a temporary folder before its maker has locked it."""
    from kfac_onnx.disk import atomic

    lock, calls = atomic._lock, []

    def late(folder: Path) -> int | None:
        calls.append(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)
        return lock(folder)

    monkeypatch.setattr(atomic, "_lock", late)
    write(tmp_path / "a", "x")
    assert (len(calls), (tmp_path / "a").read_text()) == (2, "x")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o444, 0o755])
def test_what_is_replaced_keeps_its_rights(tmp_path: Path, rights: int) -> None:
    target = tmp_path / "private.onnx"
    target.write_text("old")
    target.chmod(rights)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        temporary.with_name("private.onnx.data").write_text("its weights")
    assert (target.read_text(), mode(target)) == ("new", rights)
    assert mode(tmp_path / "private.onnx.data") == rights, "what comes with it is no less private"


def test_a_new_file_has_the_rights_that_the_system_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write(tmp_path / "run.onnx", "new")
    assert mode(tmp_path / "run.onnx") == mode(tmp_path / "plain")


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_written_through(tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    target, link, other = tmp_path / "real" / "model.onnx", tmp_path / "link.onnx", tmp_path / "other.onnx"
    if there:
        target.write_text("old")
        target.chmod(0o600)
    link.symlink_to("other.onnx")
    other.symlink_to(target)
    write(link, "new")
    assert target.read_text() == "new"
    assert link.is_symlink()
    assert other.is_symlink()
    assert not there or mode(target) == 0o600
    assert sorted(item.name for item in tmp_path.rglob("*")) == [
        "link.onnx",
        "model.onnx",
        "other.onnx",
        "real",
    ]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError) as error:
        write(tmp_path / "a", "new")
    assert str(error.value) == f"'{tmp_path / 'a'}' cannot be written: it is a symbolic link in a circle"


def test_a_link_to_a_folder_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "none" / "a")
    with pytest.raises(UserError) as error:
        write(tmp_path / "a", "new")
    assert str(error.value) == f"'{tmp_path / 'a'}' cannot be written: No such file or directory"
