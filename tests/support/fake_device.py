"""A CUDA device that is made of host memory, so that everything but the copying itself runs without a GPU.

It does what ONNX Runtime does with a real one, and tests can see it do it:

- values made for the device, and outputs that are bound to it, lie "there"; all else is the host's;
- a host value that is bound as an input is copied at that moment: what the host writes to it later is not seen;
- a bound device value is not copied: sessions read and write its memory; but where sessions have their
  `inputs_on_host`, as those of nodes that only the CPU runs, it is copied when it is bound, like all else;
- `copies` counts the bytes that went over the bus, each way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from kfac_onnx.runtime.step import tensors
from kfac_onnx.runtime.step.tensors import Device

if TYPE_CHECKING:
    import numpy as np
    import pytest

__all__ = ["FakeCuda"]


class FakeCuda:
    """Installs the device for one test; `device` is what sessions are opened on, with the CPU's kernels."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.device = Device("cuda", 0)
        self.there: set[int] = set()
        self.values: list[ort.OrtValue] = []
        self.copies = {"up": 0, "down": 0}
        self.uploads: list[int] = []
        self.bound: list[str] = []
        self.inputs_on_host = False
        self._patch = patch
        self._make()
        self._bind()

    def is_there(self, value: ort.OrtValue) -> bool:
        return value.data_ptr() in self.there

    def reset(self) -> None:
        """Count copies from here on."""
        self.copies.update(up=0, down=0)
        self.uploads.clear()
        self.bound.clear()

    def _keep(self, value: ort.OrtValue) -> ort.OrtValue:
        self.values.append(value)  # memory that is there stays there, so that an address means one thing
        self.there.add(value.data_ptr())
        return value

    def _make(self) -> None:
        make, name = ort.OrtValue.ortvalue_from_shape_and_type, ort.OrtValue.device_name
        numpy, update = ort.OrtValue.numpy, ort.OrtValue.update_inplace

        def made(shape: Any, element: Any, device: str = "cpu", index: int = 0) -> ort.OrtValue:
            value = make(shape, element, "cpu", 0)
            return self._keep(value) if device == "cuda" else value

        def read(value: ort.OrtValue) -> np.ndarray:
            array = numpy(value)
            if self.is_there(value):
                self.copies["down"] += array.nbytes
                return array.copy()
            return array

        def write(value: ort.OrtValue, array: np.ndarray) -> None:
            assert self.is_there(value), "only the device's memory is written this way"
            assert array.flags.c_contiguous
            self.copies["up"] += array.nbytes
            self.uploads.append(array.nbytes)
            update(value, array)

        self._patch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", staticmethod(made))
        self._patch.setattr(ort.OrtValue, "device_name", lambda v: "cuda" if self.is_there(v) else name(v))
        self._patch.setattr(ort.OrtValue, "numpy", read)
        self._patch.setattr(ort.OrtValue, "update_inplace", write)

    def _bind(self) -> None:
        given, bind_in, bind_out = (
            ort.IOBinding.bind_cpu_input, ort.IOBinding.bind_ortvalue_input, ort.IOBinding.bind_output
        )  # fmt: skip
        outputs = ort.IOBinding.get_outputs

        def bound_array(binding: ort.IOBinding, name: str, array: np.ndarray) -> None:
            self.copies["up"] += array.nbytes
            self.bound.append(name)
            given(binding, name, array.copy())

        def bound_value(binding: ort.IOBinding, name: str, value: ort.OrtValue) -> None:
            self.bound.append(name)
            stays = self.is_there(value) and not self.inputs_on_host
            bind_in(binding, name, value if stays else self._copied(value))

        def bound_output(binding: ort.IOBinding, name: str, device: str = "cpu", index: int = 0) -> None:
            sent = binding.__dict__.setdefault("_sent", {})
            sent[name] = device
            bind_out(binding, name, "cpu", 0)

        def made(binding: ort.IOBinding) -> list[ort.OrtValue]:
            values = outputs(binding)
            if "cuda" in binding.__dict__.get("_sent", {}).values():
                for value in values:
                    self._keep(value)
            return values

        self._patch.setattr(ort.IOBinding, "bind_cpu_input", bound_array)
        self._patch.setattr(ort.IOBinding, "bind_ortvalue_input", bound_value)
        self._patch.setattr(ort.IOBinding, "bind_output", bound_output)
        self._patch.setattr(ort.IOBinding, "get_outputs", made)

    def _copied(self, value: ort.OrtValue) -> ort.OrtValue:
        """Return a copy of a host value, as binding makes it."""
        element = value.element_type()
        if element == tensors.BFLOAT16:
            target = tensors.Buffer(tensors.read_value(value, element), element, Device("cpu", 0))
            self.values.append(target.value)
            self.copies["up"] += target.nbytes
            self.values.append(target)  # type: ignore[arg-type]
            return target.value
        array = value.numpy().copy()
        self.copies["up"] += array.nbytes
        return ort.OrtValue.ortvalue_from_numpy(array)
