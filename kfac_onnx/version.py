"""The version of the package, and of everything beside it that decides what a run does.

Importing this module imports nothing else.
"""

__all__ = ["PACKAGES", "__version__", "environment"]

__version__ = "0.1.0"

PACKAGES = (
    "click", "ml-dtypes", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript",
    "pandas", "plotext", "pyarrow", "rich", "safetensors", "torch",
)  # fmt: skip
"""The packages that this one needs or can use."""


def environment() -> dict[str, str | None]:
    """Return versions and machine as a report wants them: `kfac-onnx`, `python`, `system`, `machine`, `cpus`.

    Each of `PACKAGES` is there under its name, None where it is not installed; nothing is imported to tell.
    """
    import importlib.metadata
    import os
    import platform

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "kfac-onnx": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": str(os.cpu_count()),
        **{package: version(package) for package in PACKAGES},
    }
