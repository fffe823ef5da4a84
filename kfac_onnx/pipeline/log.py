"""What passes tell while they run: sentences for people, numbers for the report, notes for the model.

Sentences go to the standard library's logger `kfac_onnx` (the command line shows it on stderr);
numbers are summed per pass and appear in the pipeline's report; notes are what a reader of training graphs
writes into the model (`kfac.notes`).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

__all__ = ["LOGGER", "Log"]

LOGGER: Final = logging.getLogger("kfac_onnx")


class Log:
    """Receives what one run of a pipeline has to say.

    `statistics` belongs to the pass that runs now, `notes` to all passes. `stale` says that a pass changed
    the model since shapes were inferred by one; until then `inferred` is the proto that ONNX made of it.
    """

    def __init__(self, logger: logging.Logger = LOGGER) -> None:
        self._logger = logger
        self.statistics: Counter[str] = Counter()
        self.notes: list[str] = []
        self.stale = True
        self.inferred: onnx.ModelProto | None = None

    def debug(self, sentence: str) -> None:
        """Say something that only somebody who follows a pass step by step wants to read."""
        self._logger.debug("%s", sentence)

    def info(self, sentence: str) -> None:
        """Say what was done."""
        self._logger.info("%s", sentence)

    def warning(self, sentence: str) -> None:
        """Say what the user should know although it went well."""
        self._logger.warning("%s", sentence)

    def note(self, sentence: str) -> None:
        """Say what whoever looks at the model later should know: reading a file writes it to `kfac.notes`."""
        self.notes.append(sentence)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a statistic of the running pass, such as `tables` or `lookups claimed`."""
        if number:
            self.statistics[what] += number
