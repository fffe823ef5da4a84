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
