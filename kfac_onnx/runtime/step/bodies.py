"""The bodies of `ai.kfac` operators for the device that a session runs on, whatever the file was lowered for.

A file lowered for CUDA adds rows by ScatterND, which loses sums on the CPU when rows repeat and there are
several threads; one lowered for the CPU adds by ScatterElements, which on CUDA reads an index for each single
number. So the stages get the bodies of their device. A file's own stay where they are meant for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import onnx_ir as ir

from kfac_onnx import dialect

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

    from kfac_onnx.dialect.signature import Variant
    from kfac_onnx.step.plan import Stage

__all__ = ["use_bodies_for"]

_DOMAIN: Final = "ai.kfac"


def use_bodies_for(stages: Iterable[Stage], target: str | None, *, cpu: bool) -> bool:
    """Exchange the stages' bodies where `target` is not where they run; return whether that was so.

    A file that does not say its target gets the bodies of the session's device: they are right there.

    Stages of one thread keep theirs on the CPU: the partition gave them the sequential ones.
    """
    if target is not None and cpu == (target == "cpu"):
        return False
    variant: Variant = "safe" if cpu else "atomic"
    for stage in stages:
        if not (cpu and stage.one_thread):
            _exchange(stage.model, variant)
    return True


def _exchange(model: onnx.ModelProto, variant: Variant) -> None:
    own = [function for function in model.functions if function.domain == _DOMAIN]
    bodies = dialect.functions(variant, [function.name for function in own])
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    for function in own:
        body = bodies[function.name]
        if opset is not None:
            body.opset_imports[""] = opset
        function.CopyFrom(ir.serde.serialize_function(body))
        present = {entry.domain for entry in model.opset_import}
        for domain, version in body.opset_imports.items():
            if domain not in present:
                entry = model.opset_import.add()
                entry.domain, entry.version = domain, version
