"""The table of rooms (docs/rooms.toml) and the imports of the package agree."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import kfac_onnx

ROOT = Path(kfac_onnx.__file__).parent
TABLE = Path(__file__).parents[1] / "docs" / "rooms.toml"
FLOORS = {item["name"]: item["floor"] for item in tomllib.loads(TABLE.read_text(encoding="utf-8"))["room"]}


def module_name(path: Path) -> str:
    parts = ["kfac_onnx", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports_of(path: Path) -> list[tuple[int, str, bool]]:
    """Return line and module of each import of the package, within functions too, and whether it runs on loading."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            late |= {id(inner) for inner in ast.walk(node)}
    imports: list[tuple[int, str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != "kfac_onnx":
                imports.append((node.lineno, name, id(node) not in late))
    return imports


def test_each_room_is_in_the_table() -> None:
    rooms = {name.split(".")[1] for name in MODULES if name != "kfac_onnx"} - {"__main__"}
    assert rooms == set(FLOORS)


def test_imports_go_down_only() -> None:
    climbs = [
        f"{path.relative_to(ROOT)}:{line}: {room} imports {other}"
        for name, path in MODULES.items()
        if (room := name.partition(".")[2].split(".")[0]) in FLOORS
        for line, other, _ in imports_of(path)
        if (target := other.split(".")[1]) != room and FLOORS[target] >= FLOORS[room]
    ]
    assert climbs == []


def test_no_module_imports_itself_through_others() -> None:
    """No circle at all, not even one that types or functions would close."""
    graph = {name: {other for _, other, _ in imports_of(path)} - {name} for name, path in MODULES.items()}
    state: dict[str, int] = {}
    circles: list[str] = []

    def visit(name: str, way: list[str]) -> None:
        state[name] = 1
        for other in sorted(graph[name]):
            if state.get(other) == 1:
                circles.append(" -> ".join([*way[way.index(other) :], other]))
            elif other not in state:
                visit(other, [*way, other])
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, [name])
    assert circles == []


HERE = Path(__file__).parent
OUTSIDE = {
    "benchmarks": "the programs in benchmarks/",
    "corpus": "all rooms together on the committed graphs",
    "cuda": "all rooms together on a GPU",
    "trust": "all rooms together under damage, kills, threads and time",
}
"""Folders of tests that are no room's, and what they are about."""
WIDER = {
    "autodiff": {
        "corpus": "whole graphs",
        "forward_graphs": "whole graphs",
        "operators": "rules of all operators",
        "rules": "rules of all operators",
    },
    "canonical/loops": {
        "exported_loops": "the folder on whole graphs",
        "open_loops": "the pass and its rules",
    },
    "canonical/lowering": {"lowering": "the folder's rules, from their registry"},
    "cli": {
        "atomic": "every verb that writes",
        "bad_input": "every verb that reads",
        "commands": "verbs one after another",
        "numbers": "several verbs",
        "resume": "two options of `train`, over several modules",
        "stdin": "every verb that reads",
        "trace": "several verbs",
        "train_data": "the data options of `train`, over several modules",
    },
    "device/placement": {"corpus": "whole graphs"},
    "dialect": {"device_bodies": "the second variant of all bodies"},
    "graph": {"vanishing": "a kind of value that several modules decide on"},
    "passes": {
        "every_pass": "the registry",
        "golden": "the golden files of all rooms",
        "insertion": "the folder",
    },
    "ranks": {"mpi": "processes under mpiexec", "ranks": "the room as a whole"},
    "readers": {"exported_graphs": "whole graphs", "transformed": "a kind of model that every reader meets"},
    "readers/optimizer_inside": {
        "cases": "the folder on whole graphs",
        "forms": "the folder on whole graphs",
    },
    "reports": {"sources": "every report"},
    "reports/checks": {"checks": "the folder's checks"},
    "reports/pages": {"pages": "the folder's pages in a browser"},
    "runtime": {
        "alone": "imports of the room",
        "faults": "sessions as a whole",
        "real_graphs": "sessions as a whole",
        "resume": "sessions as a whole",
    },
    "runtime/logs": {"logs": "the folder's logs"},
    "step": {"tied_plan": "a kind of graph that several modules plan"},
    "tables": {
        "architectures": "whole graphs",
        "clamped_ids": "a kind of lookup that several modules meet",
        "kinds_of_use": "kinds of uses that several modules meet",
    },
    "torch": {"kinds": "the room on whole models"},
}
"""Tests in a room's folder that are about more than one module, and about what."""


def test_tests_mirror_the_package() -> None:
    """`tests/ROOM/test_x.py` is about `kfac_onnx/ROOM/x.py`, or is listed above."""
    strangers: list[str] = []
    listed = {(folder, name) for folder, names in WIDER.items() for name in names}
    for path in HERE.rglob("test_*.py"):
        folder, name = path.parent.relative_to(HERE).as_posix(), path.stem.removeprefix("test_")
        if folder == "." or folder.split("/")[0] in OUTSIDE:
            continue
        mirrors = (ROOT / folder / f"{name}.py").exists()
        if mirrors == ((folder, name) in listed):  # neither, or listed without need
            strangers.append(f"tests/{folder}/{path.name}")
        listed.discard((folder, name))
    assert strangers == []
    assert listed == set(), "listed, but there is no such test"
