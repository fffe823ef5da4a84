"""Write `<table>.npz` for the case tables of tests/support/autodiff_cases: the gradients of PyTorch's autograd.

    python tests/data/autodiff/make.py [TABLE ...]

Needs PyTorch (torch 2.13.0, CPU); the tests need only the files. Keys: `<case>/x/<input>` its value,
`<case>/z/<output>` what the operator computes, `<case>/w/<output>` a random dloss/doutput, and
`<case>/g/<input>` dloss/dinput. Gradients are computed in float64 and stored in the input's type.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "support"))

import numpy as np
import reference
import torch
from autodiff_cases import DATA, Case, tables
from torch.nn import functional

SKIPPED_IN_DOUBLE = ("int32", "int64", "bool", "uint8", "int8")


def results_of(case: Case) -> dict[str, np.ndarray]:
    """Return all arrays of one case."""
    arrays = case.arrays()
    found: dict[str, np.ndarray] = {f"x/{name}": array for name, array in arrays.items()}
    known = {name: torch.tensor(array) for name, array in {**arrays, **case.constants}.items()}
    known = {name: item.double() if item.is_floating_point() else item for name, item in known.items()}
    wrt = [
        name
        for name, array in arrays.items()
        if np.issubdtype(array.dtype, np.floating) and name not in case.frozen
    ]
    for name in wrt:
        known[name].requires_grad_()
    scope = {"torch": torch, "F": functional, "np": np, "R": reference, **known}
    results = eval(case.torch, scope)  # noqa: S307  the expressions stand in this repository
    results = results if isinstance(results, tuple) else (results,)
    if len(results) != len(case.outputs):
        raise ValueError(f"{case.name}: {len(results)} results for {len(case.outputs)} outputs")
    total = torch.zeros((), dtype=torch.float64)
    for name, result in zip(case.outputs, results, strict=True):
        found[f"z/{name}"] = narrow(result)
        if result.is_floating_point():
            rng = np.random.default_rng(zlib.crc32(f"{case.name}/{name}".encode()))
            weight = rng.standard_normal(tuple(result.shape)).astype(np.float32)
            found[f"w/{name}"] = weight
            total = total + (result * torch.tensor(weight).double()).sum()
    for name, gradient in zip(
        wrt, torch.autograd.grad(total, [known[name] for name in wrt], allow_unused=True), strict=True
    ):
        zeros = torch.zeros(arrays[name].shape, dtype=torch.float64)
        found[f"g/{name}"] = (zeros if gradient is None else gradient).numpy().astype(arrays[name].dtype)
    return found


def narrow(result: torch.Tensor) -> np.ndarray:
    """Return a result as the graph gives it: float32 instead of float64."""
    array = result.detach().numpy()
    return np.asarray(array, np.float32) if array.dtype == np.float64 else array


def main() -> None:
    chosen = sys.argv[1:]
    for table, cases in tables().items():
        if chosen and table not in chosen:
            continue
        arrays: dict[str, np.ndarray] = {}
        for case in cases:
            if any(key.startswith(f"{case.name}/") for key in arrays):
                raise ValueError(f"two cases are called {case.name}")
            arrays.update({f"{case.name}/{key}": value for key, value in results_of(case).items()})
        np.savez_compressed(DATA / f"{table}.npz", **arrays)
        print(f"{table}: {len(cases)} cases")  # noqa: T201


if __name__ == "__main__":
    main()
