"""`--html` of inspect, diff and check: where pages are written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Outcome

NPLM = Path(__file__).parents[1] / "data" / "graphs" / "torchjoint_in__nplm.onnx"
SAYS = "wrote DIR/page.html, a page for any browser\n"


@pytest.fixture
def transformed(run: Callable[..., Outcome], tmp_path: Path) -> Path:
    path = tmp_path / "nplm.kfac.onnx"
    assert run("transform", NPLM, "-o", path, "-q").code == 0
    return path


def test_each_verb_writes_its_page_beside_what_it_prints(
    run: Callable[..., Outcome], transformed: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    for words in (
        ("inspect", transformed, "--provider", "cpu"),
        ("diff", NPLM, transformed),
        ("check", NPLM),
    ):
        plain = run(*words)
        outcome = run(*words, "--html", page)
        assert (outcome.code, outcome.out, outcome.err) == (plain.code, plain.out, plain.err + SAYS)
        text = page.read_text(encoding="utf-8")
        assert text.startswith("<!doctype html>")
        assert f"<h1>kfac-onnx {words[0]}</h1>" in text
        assert ('"placement":"CPU"' in text) == (words[0] == "inspect")


def test_a_page_never_replaces_an_input_nor_a_folder(
    run: Callable[..., Outcome], transformed: Path, tmp_path: Path
) -> None:
    before = transformed.read_bytes()
    for words in (("inspect", transformed), ("diff", NPLM, transformed), ("check", transformed)):
        outcome = run(*words, "--html", transformed)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "error: 'DIR/nplm.kfac.onnx' is the input and will not be overwritten\n  help: choose another name\n"
        )
        outcome = run(*words, "--html", tmp_path / "missing" / "page.html")
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "error: 'DIR/missing/page.html' cannot be written: its folder does not exist or is read-only\n"
        )
    assert transformed.read_bytes() == before
