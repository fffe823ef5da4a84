"""A model that is a whole step already: it can be scanned and checked as a graph, and is not transformed again."""

from __future__ import annotations

import pytest
from corpus_cases import GRAPHS

import kfac_onnx as kx


def test_scan_and_check_read_it_and_transform_refuses_it() -> None:
    step = kx.transform(GRAPHS / "torchjoint_in__nplm.onnx")
    assert [site.parameter for site in kx.scan(step).sites] == ["m.emb.weight"]
    assert kx.check(step).count("error") == 0
    with pytest.raises(kx.UserError, match="is already transformed, so it cannot be transformed again"):
        kx.transform(step)
