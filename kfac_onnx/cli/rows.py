"""How a verb reads data: the columns and vocabularies that its options and the model's folder say."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_onnx.cli.data_options import chosen_columns, chosen_vocabularies
from kfac_onnx.data.vocabulary import Vocabulary, read_vocabulary, vocabularies_beside
from kfac_onnx.runtime.feed.data import Batches
from kfac_onnx.runtime.feed.table_batches import WINDOW

if TYPE_CHECKING:
    import click

    from kfac_onnx.ranks import RankSession
    from kfac_onnx.runtime import TrainingSession

__all__ = ["Rows"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The session whose inputs are filled, the text of `--columns`, and the vocabularies by input."""

    session: TrainingSession | RankSession
    columns: str
    vocabularies: dict[str, Vocabulary]

    @classmethod
    def chosen(cls, ctx: click.Context, model: str, session: TrainingSession | RankSession) -> Rows:
        """Return what the options say, and the vocabularies beside the model that they do not speak of.

        Raises UserError for a vocabulary that cannot be read.
        """
        named = chosen_vocabularies(ctx)
        words = {name: read_vocabulary(path) for name, path in named.items() if path is not None}
        beside = {} if model == "-" else vocabularies_beside(Path(model))
        inputs = {item.name for item in session.batch_inputs}
        for name, (path, vocabulary) in beside.items():
            if name in inputs and name not in named:
                _log.info("the ids of '%s' become rows by '%s'", name, path)
                words[name] = vocabulary
        return cls(session, chosen_columns(ctx), words)

    def batches(
        self, data: str, size: int | None, *, seed: int | None = None, full: bool, window: int | None = None
    ) -> Batches:
        """Return the batches of data; raises UserError as `TrainingSession.batches`."""
        made = self.session.batches(
            data,
            size,
            columns=self.columns,
            vocabularies=self.vocabularies or None,
            seed=seed,
            drop_last=full,
            window=WINDOW if window is None else window,
        )
        if not isinstance(made, Batches):
            raise AssertionError("files are no stream")
        return made
