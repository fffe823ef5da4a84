"""The logs that there are: `tensorboard:DIR`, `mlflow:URI`, `wandb`, `csv:FILE`, or a function.

The libraries are optional and loaded where they are used. Sources: TensorBoard's event files,
https://www.tensorflow.org/tensorboard; MLflow's tracking API, https://mlflow.org/docs/latest/tracking.html;
Weights & Biases, https://docs.wandb.ai/ref/python (offline with WANDB_MODE=offline).
"""

from __future__ import annotations

import csv
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kfac_onnx.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kfac_onnx.runtime.logs.protocol import Log

__all__ = ["LOGS", "CallbackLog", "LogKind", "log_of"]

BINS: Final = 64
"""Of a histogram."""


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(
            f"'--log {name}' needs the package {name}, which is not installed", help=f"pip install {name}"
        ) from e


class TensorBoardLog:
    """An event file in a folder."""

    def __init__(self, folder: str) -> None:
        self._summary = _library("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._event = _library("tensorboard.compat.proto.event_pb2", "tensorboard")
        writers = _library("tensorboard.summary.writer.event_file_writer", "tensorboard")
        try:
            self._writer = writers.EventFileWriter(folder)
        except OSError as e:
            raise _unwritable(folder, e) from e

    def _add(self, values: list[Any], position: int) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=position, summary=summary))

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write numbers."""
        value = self._summary.Summary.Value
        self._add([value(tag=name, simple_value=number) for name, number in values.items()], position)

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Write a distribution."""
        counts, edges = np.histogram(values, BINS)
        histogram = self._summary.HistogramProto(
            min=float(values.min()),
            max=float(values.max()),
            num=values.size,
            sum=float(values.sum()),
            sum_squares=float(np.square(values).sum()),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._add([self._summary.Summary.Value(tag=name, histo=histogram)], position)

    def settings(self, text: str) -> None:
        """Write the settings."""
        tensors = _library("tensorboard.compat.proto.tensor_pb2", "tensorboard")
        types = _library("tensorboard.compat.proto.types_pb2", "tensorboard")
        lines = "".join(f"    {line}\n" for line in text.splitlines())  # as code in Markdown
        tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[lines.encode()])
        tensor.tensor_shape.dim.add(size=1)
        metadata = self._summary.SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        self._add([self._summary.Summary.Value(tag="settings", metadata=metadata, tensor=tensor)], 0)

    def close(self) -> None:
        """End the run of the log."""
        self._writer.close()


class MlflowLog:
    """A run of MLflow's, on a server or in a folder."""

    def __init__(self, uri: str) -> None:
        client = _library("mlflow.tracking", "mlflow")
        try:
            self._client = client.MlflowClient(tracking_uri=uri)
            experiment = self._client.get_experiment_by_name("kfac-onnx")
            number = (
                self._client.create_experiment("kfac-onnx")
                if experiment is None
                else experiment.experiment_id
            )
            self._run: str = self._client.create_run(number).info.run_id
        except Exception as e:  # MLflow raises whatever its store raises
            raise UserError(f"MLflow cannot write to '{uri}': {first_line(e)}") from e

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write numbers."""
        for name, number in values.items():
            self._client.log_metric(self._run, name.replace("@", "_at_"), number, step=position)

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Write a distribution."""
        raise AssertionError("MLflow has no histograms")

    def settings(self, text: str) -> None:
        """Write the settings."""
        self._client.log_text(self._run, text, "run.toml")

    def close(self) -> None:
        """End the run of the log."""
        self._client.set_terminated(self._run)


class WandbLog:
    """A run of Weights & Biases."""

    def __init__(self, project: str) -> None:
        self._library = _library("wandb", "wandb")
        try:
            self._run = self._library.init(project=project or "kfac-onnx")
        except Exception as e:  # a wrong name, no key, no network
            raise UserError(
                f"Weights & Biases cannot begin a run: {first_line(e)}",
                help="run `wandb login`, or set WANDB_MODE=offline",
            ) from e

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write numbers."""
        self._run.log(dict(values), step=position)

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Write a distribution."""
        self._run.log({name: self._library.Histogram(values)}, step=position)

    def settings(self, text: str) -> None:
        """Write the settings."""
        self._run.config.update({"settings": text})

    def close(self) -> None:
        """End the run of the log."""
        self._run.finish()


class CsvLog:
    """A file of rows: position, name, value. Lines that are there stay."""

    def __init__(self, path: str) -> None:
        try:
            self._file = Path(path).open("a", newline="", encoding="utf-8")  # noqa: SIM115  closed by close
        except OSError as e:
            raise _unwritable(path, e) from e
        self._path = path
        self._rows = csv.writer(self._file)
        if self._file.tell() == 0:
            self._rows.writerow(["position", "name", "value"])

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write numbers."""
        try:
            self._rows.writerows([position, name, repr(float(number))] for name, number in values.items())
            self._file.flush()
        except OSError as e:
            raise _unwritable(self._path, e) from e

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Write a distribution."""
        raise AssertionError("a table of numbers has no histograms")

    def settings(self, text: str) -> None:
        """Leave them out: the rows are numbers."""

    def close(self) -> None:
        """End the run of the log."""
        self._file.close()


class CallbackLog:
    """A function of the user's, called with the numbers by name and the position."""

    def __init__(self, function: Callable[[Mapping[str, float], int], object]) -> None:
        self._function = function

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write numbers."""
        self._function(values, position)

    def histogram(self, name: str, values: np.ndarray, position: int) -> None:
        """Write a distribution."""
        raise AssertionError("a function takes numbers alone")

    def settings(self, text: str) -> None:
        """Leave them out: whoever gives a function knows them."""

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class LogKind:
    """A kind of log: how it is opened, what stands behind its colon, and whether it takes histograms."""

    open: Callable[[str], Log]
    argument: str
    required: bool
    histograms: bool


LOGS: Final[dict[str, LogKind]] = {
    "tensorboard": LogKind(TensorBoardLog, "DIR", required=True, histograms=True),
    "mlflow": LogKind(MlflowLog, "URI", required=True, histograms=False),
    "wandb": LogKind(WandbLog, "PROJECT", required=False, histograms=True),
    "csv": LogKind(CsvLog, "FILE", required=True, histograms=False),
}


def log_of(text: str) -> tuple[LogKind, str]:
    """Return the kind of log that a text names, and what stands behind its colon.

    Raises UserError for an unknown one, and where its place is missing.
    """
    name, _, argument = text.partition(":")
    kind = LOGS.get(name)
    if kind is None:
        forms = ", ".join(
            f"{key}:{item.argument}" if item.required else f"{key}[:{item.argument}]"
            for key, item in LOGS.items()
        )
        raise UserError(f"unknown log '{name}'{did_you_mean(name, LOGS)}", help=f"logs are {forms}")
    if kind.required and not argument:
        raise UserError(f"the log '{name}' needs a place", help=f"such as --log {name}:{kind.argument}")
    return kind, argument


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(f"the log '{path}' cannot be written: {error.strerror or error}")
