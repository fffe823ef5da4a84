"""Compare what two revisions make of the same training graphs.

    python tools/compare_transforms.py REVISION MODEL_OR_FOLDER...

Each graph is transformed by the package of this checkout and by that of REVISION (checked out for the time
of the run), with each of `SETTINGS`. Two models are equal if they agree up to names, the order of nodes, and
Identity: the same inputs and outputs, the same states and initial values, the same computation behind each
output. What differs is printed, one line a graph and setting; the exit code is 2 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "half": {"preset": "half"},
    "adaptive-dense": {"preset": "adaptive", "shape": "dense"},
    "adagrad": {"preset": "adagrad", "rest": "adam"},
    "r1.7": {"preset": "r1.7", "grad_scale": 8.0},
    "plain": {"preset": "plain-adam"},
}
"""Options of `transform`, one set per line; what one revision refuses the other must refuse too."""


def fingerprint(model: Any) -> dict[str, str]:
    """Return for each output of a model a hash of the whole computation behind it, free of inner names."""
    import onnx_ir as ir

    def of_tensor(tensor: Any) -> str:
        array = tensor.numpy()
        return hashlib.sha256(f"{tensor.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()

    def of_graph(graph: Any, outer: dict[Any, str]) -> str:
        known = dict(outer)
        for index, value in enumerate(graph.inputs):
            known[value] = f"input {index}"
        return hashlib.sha256("|".join(of_value(v, known) for v in graph.outputs).encode()).hexdigest()

    def of_attribute(attribute: Any, known: dict[Any, str]) -> str:
        if attribute.type == ir.AttributeType.GRAPH:
            return of_graph(attribute.as_graph(), known)
        if attribute.type == ir.AttributeType.TENSOR:
            return of_tensor(attribute.as_tensor())
        return repr(attribute.value)

    def of_value(value: Any, known: dict[Any, str]) -> str:
        waiting = [value]
        while waiting:
            current = waiting[-1]
            if current in known:
                waiting.pop()
                continue
            node = current.producer()
            if node is None:
                constant = current.const_value
                known[current] = current.name if constant is None else of_tensor(constant)
                continue
            if node.op_type == "Constant" and "value" in node.attributes:
                # The same as an initializer with these contents.
                known[node.outputs[0]] = of_tensor(node.attributes["value"].as_tensor())
                continue
            inner = [
                value
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.GRAPH
                for step in attribute.as_graph().all_nodes()
                for value in step.inputs
                if value is not None and value.graph is node.graph
            ]
            missing = [v for v in (*node.inputs, *inner) if v is not None and v not in known]
            if missing:
                waiting += missing
                continue
            if node.op_type == "Identity" and not node.domain:  # it computes nothing
                known[current] = known[node.inputs[0]]
                continue
            if node.op_type == "Constant" and "value" in node.attributes:
                known[current] = of_tensor(node.attributes["value"].as_tensor())
                continue
            parts = [f"{node.domain}::{node.op_type}"]
            parts += ["-" if v is None else known[v] for v in node.inputs]
            parts += [f"{k}={of_attribute(a, known)}" for k, a in sorted(node.attributes.items())]
            digest = hashlib.sha256("|".join(parts).encode()).hexdigest()
            for index, output in enumerate(node.outputs):
                known[output] = f"{digest}:{index}"
        return known[value]

    known: dict[Any, str] = {}
    for value in model.graph.inputs:
        constant = value.const_value
        known[value] = f"{value.name}" + ("" if constant is None else of_tensor(constant))
    prints = {str(value.name): of_value(value, known) for value in model.graph.outputs}
    states = json.loads(model.metadata_props.get("kfac.state", "[]"))
    for state in states:
        text = json.dumps({key: state.get(key) for key in ("shape", "dtype", "initial")}, sort_keys=True)
        prints[f"state {state.get('input')}"] = text
    prints["inputs"] = ", ".join(sorted(str(value.name) for value in model.graph.inputs))
    return prints


def work(paths: list[str]) -> None:
    """Print a JSON line per graph and setting: the fingerprints, or the first line of the refusal."""
    import kfac_onnx as kx

    for path in paths:
        for name, options in SETTINGS.items():
            try:
                line: dict[str, Any] = fingerprint(kx.transform(path, **options))
            except kx.UserError as e:
                line = {"refused": e.message}
            except Exception as e:
                line = {"crash": f"{type(e).__name__}: {e}"}
            sys.stdout.write(json.dumps({"graph": path, "setting": name, "prints": line}) + "\n")


def results(package: Path, paths: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Run `work` with the package found in a folder."""
    program = [sys.executable, __file__, "--work", *paths]
    done = subprocess.run(
        program,
        env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["graph"], line["setting"]): line["prints"] for line in lines}


def main() -> int:
    """Return 0 if both revisions agree on everything, 2 if not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision")
    parser.add_argument("paths", nargs="+", type=Path)
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
        return 0
    options = parser.parse_args()
    paths = [
        str(file.resolve())
        for path in options.paths
        for file in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])
    ]
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), options.revision], check=True)
        try:
            with ThreadPoolExecutor(2) as pool:
                before, after = pool.map(lambda package: results(package, paths), (old, ROOT))
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    different = 0
    for key, prints in before.items():
        keys = [name for name in {**prints, **after[key]} if prints.get(name) != after[key].get(name)]
        if not keys and "crash" in prints:  # alike, and nothing was compared
            keys = ["crash"]
        if keys:
            different += 1
            print(f"{Path(key[0]).name} {key[1]}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}")
            for name in keys[:2]:
                if name in ("refused", "crash", "inputs"):
                    print(f"    before: {prints.get(name)}\n    after:  {after[key].get(name)}")
    print(f"{len(before) - different} of {len(before)} equal")
    return 2 if different else 0


if __name__ == "__main__":
    sys.exit(main())
