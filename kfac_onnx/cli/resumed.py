"""What `train --resume` says of options that a run was begun with: nothing where they are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from kfac_onnx.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
    from kfac_onnx.runtime import TrainingSession

__all__ = ["changed_options"]


def changed_options(session: TrainingSession, given: Mapping[str, Any]) -> list[str]:
    """Return a clause for each given option that is not the resumed run's, such as `--lr 0.1 (it is 0.01)`.

    `given` are parameters of the command by name. Values of parameters are not compared: the run has its own.
    """
    run = _settings(session)
    changed: list[str] = []
    for name, value in given.items():
        if name == "parameters":
            continue
        if name in ("lr", "rest_lr"):
            own, same = _rate(session, name, float(value))
        elif name == "schedule":
            own, same = _schedule(session, str(value))
        elif name in run:
            own = run[name]
            same = own == value or _same_block(run.get("block"), name, value)
        else:
            own, same = "another", _has_effect_of(session, given, name)
        if not same:
            said = "the default" if own is None else own
            changed.append(f"--{name.replace('_', '-')} {_word(value)} (it is {said})")
    return changed


def _word(value: object) -> str:
    return " ".join(map(str, cast("tuple[object, ...]", value))) if isinstance(value, tuple) else str(value)


def _has_effect_of(session: TrainingSession, given: Mapping[str, Any], name: str) -> bool:
    """Say whether a run's passes have everything in them that an option puts into those of a new run."""
    from kfac_onnx.passes.standard import TransformOptions

    options = {key: value for key, value in given.items() if key not in ("schedule", "parameters")}
    others = {key: value for key, value in options.items() if key != name}
    effect = _entries(TransformOptions(**options).text) - _entries(TransformOptions(**others).text)
    return effect <= _entries(session.pipeline or "dce")


def _entries(text: str) -> set[tuple[str, str, str]]:
    """Return each option of each pass with its value."""
    from kfac_onnx.pipeline.options import format_value, options_of
    from kfac_onnx.pipeline.pipeline import parse_pipeline

    return {
        (item.name, option.name, format_value(getattr(item, option.field)))
        for item in parse_pipeline(text).passes
        for option in options_of(type(item))
    }


def _rate(session: TrainingSession, name: str, value: float) -> tuple[float | None, bool]:
    """Return the rate of the run that an option is for, and whether it is that."""
    wanted = session.rates_with(**{name: value})
    names = [rate for rate in wanted if wanted[rate] != session.learning_rates[rate]]
    return (session.learning_rates[names[0]], False) if names else (value, True)


def _schedule(session: TrainingSession, text: str) -> tuple[str, bool]:
    from kfac_onnx.runtime.schedules import Schedule, parse

    own, wanted = session.schedule or Schedule(), parse(text)
    if wanted.steps is None:  # the run has got its horizon from its steps
        own = replace(own, steps=None)
    return str(own), own == wanted


def _settings(session: TrainingSession) -> dict[str, Any]:
    """Return the options of `transform` that a run's model was made with; empty where they cannot be read."""
    from kfac_onnx.passes.find_embeddings import FindEmbeddings
    from kfac_onnx.passes.insert_embedding_kfac import InsertEmbeddingKfac
    from kfac_onnx.passes.insert_optimizer import InsertOptimizer
    from kfac_onnx.passes.standard import BLOCK
    from kfac_onnx.pipeline.pipeline import parse_pipeline
    from kfac_onnx.tables.padding import padding_rows

    try:
        passes = parse_pipeline(session.pipeline or "dce").passes
    except UserError:  # of another version: then nothing is known to be the same
        return {}
    settings: dict[str, Any] = {}
    for item in passes:
        match item:
            case FindEmbeddings():
                settings["padding_idx"] = padding_rows(item.padding)
            case InsertEmbeddingKfac():
                settings |= {"preset": item.preset, "block": item, **{n: getattr(item, n) for n in BLOCK}}
            case InsertOptimizer(parameters="tables"):
                settings["preset"] = f"plain-{item.method}"
            case InsertOptimizer():
                settings["rest"] = item.method
            case _:
                pass
    return settings


def _same_block(block: InsertEmbeddingKfac | None, name: str, value: object) -> bool:
    """Say whether an option of the block, given in words, makes the block that there is."""
    from kfac_onnx.passes.standard import BLOCK

    if block is None or name not in BLOCK:
        return False
    other = replace(block, **{name: value})
    return other.settings() == block.settings() and (other.uses, other.tied) == (block.uses, block.tied)
