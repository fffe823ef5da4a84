"""Pages in a real browser: they load quietly, can be searched and unfolded, and names stay text."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

import kfac_onnx as kx
from kfac_onnx.disk.models import load_model
from kfac_onnx.reports.pages import difference_page, findings_page, inspection_page
from kfac_onnx.reports.pages.page import write_page

if TYPE_CHECKING:
    from collections.abc import Callable

    from browser import Browser

GRAPHS = Path(__file__).parents[2] / "data" / "graphs"
NPLM = GRAPHS / "torchjoint_in__nplm.onnx"
EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"
DRAWN = "return Number(document.documentElement.dataset.drawn)"


@pytest.fixture(scope="module")
def transformed() -> ir.Model:
    return kx.transform(NPLM, preset="half")


def test_a_transformed_model(browser: Browser, transformed: ir.Model, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", inspection_page(transformed, "nplm.onnx"))
    browser.open(tmp_path / "page.html")
    assert browser.text("h1") == "kfac-onnx inspect"
    legend = browser.run("return [...document.querySelectorAll('#legend .key')].map(e => e.textContent)")
    assert legend == ["close-step", "find-embeddings", "insert-embedding-kfac", "insert-optimizer"]
    assert browser.colours(tmp_path / "page.png") > 50
    browser.find("preconditionrows")
    assert browser.text("#chosen h2") == "ai.kfac::PreconditionRows"
    facts = browser.text("#chosen .facts")
    assert "insert-embedding-kfac" in facts
    assert "FLOP" in facts
    body = "return kfacPage.views[0].selected.children.map(item => item.label)"
    assert browser.run(body) == []
    browser.driver.find_element("id", "unfold").click()
    function = transformed.functions["ai.kfac", "PreconditionRows", ""]
    expected = [str(value.name) for value in function.inputs] + [node.op_type for node in function]
    assert browser.run(body) == expected + [str(value.name) for value in function.outputs]
    browser.run("document.getElementById('colour').value = 'phase';"
                "document.getElementById('colour').dispatchEvent(new Event('change'))")  # fmt: skip
    assert "precondition" in browser.text("#legend")
    browser.require_quiet()


def test_every_node_is_in_the_page_folded_or_not(
    browser: Browser, transformed: ir.Model, tmp_path: Path
) -> None:
    write_page(tmp_path / "page.html", inspection_page(transformed, "nplm.onnx"))
    browser.open(tmp_path / "page.html")
    count = "let n = 0; kfacPage.views[0].scene.each(box => { n += box.kind === 'node' }); return n"
    folded = browser.run(count)
    browser.driver.find_element("id", "blocks").click()
    assert browser.run(count) == len(list(transformed.graph)) > folded
    overlaps = """
        const boxes = kfacPage.views[0].scene.root.children;
        return boxes.filter((a, i) => boxes.slice(i + 1).some(b => a.left < b.left + b.w && b.left < a.left + a.w
            && a.top < b.top + b.h && b.top < a.top + a.h)).length"""
    assert browser.run(overlaps) == 0
    browser.require_quiet()


def test_two_models_side_by_side(browser: Browser, transformed: ir.Model, tmp_path: Path) -> None:
    before = load_model(NPLM)
    report = kx.diff(before, transformed).sections["nodes"]
    write_page(tmp_path / "page.html", difference_page(before, transformed, ("a.onnx", "b.onnx")))
    browser.open(tmp_path / "page.html")
    marks = """return kfacPage.views.map(view => view.scene.graphs.main.nodes.reduce(
        (sums, node) => ({...sums, [node.status || 'same']: (sums[node.status || 'same'] || 0) + 1}), {}))"""
    left, right = browser.run(marks)
    assert left["removed"] == len(report.removed) > 0
    assert right["added"] == sum("." not in key or ": " not in key for key in report.added) > 0
    assert left["same"] == right["same"]
    browser.run("kfacPage.select(kfacPage.views[0], kfacPage.views[0].scene.find("
                "box => box.node && !box.node.status && box.node.op === 'Gather'))")  # fmt: skip
    names = browser.run("return kfacPage.views.map(view => view.selected.node.key)")
    assert names[0] == names[1]
    assert browser.colours(tmp_path / "page.png") > 50
    browser.require_quiet()


def test_findings_lead_to_their_nodes(browser: Browser, tmp_path: Path) -> None:
    model = load_model(GRAPHS / "torchjoint_in__nplm.onnx")
    report = kx.check(model)
    write_page(tmp_path / "page.html", findings_page(model, "nplm.onnx"))
    browser.open(tmp_path / "page.html")
    assert browser.text(".tag") == "0 errors"
    assert report.findings[0].what in browser.text("#findings")
    place = browser.driver.find_element("css selector", "#findings .link")
    assert place.text == report.findings[0].where[0] == "ScatterND 'm.emb.weight_grad'"
    place.click()
    node = browser.run("return kfacPage.views[0].selected.node")
    assert (node["op"], node["outputs"], node["status"]) == ("ScatterND", ["m.emb.weight_grad"], "warning")
    browser.require_quiet()


def test_markup_in_names_stays_text(
    browser: Browser, parse_model: Callable[[str], ir.Model], tmp_path: Path
) -> None:
    model = parse_model("g (float[2] x) => (float[2] y) { h = Abs(x)\n y = Neg(h) }")
    first, last = model.graph
    for place in (first, model.graph.inputs[0], first.outputs[0]):
        place.name = EVIL + str(place.name)
    model.graph.name = first.doc_string = EVIL
    last.attributes.add(ir.AttrString(EVIL, EVIL))
    text = difference_page(model, model, (EVIL, EVIL)) + ""
    assert text.count("<script>") == 5
    assert "<img" not in text
    write_page(tmp_path / "page.html", text)
    browser.open(tmp_path / "page.html")
    browser.find("abs")
    assert browser.text("#chosen .name").startswith(EVIL)
    browser.find("neg")
    assert EVIL in browser.text("#chosen")
    assert browser.run("return [window.hacked ?? null, document.images.length]") == [None, 0]
    browser.require_quiet()


def test_five_thousand_nodes_are_drawn_in_three_seconds(
    browser: Browser, parse_model: Callable[[str], ir.Model], tmp_path: Path
) -> None:
    lines = [f"v{i + 1} = Add(v{i}, v{max(0, i - i * i % 60)})" for i in range(5000)]
    model = parse_model("g (float[2] v0) => (float[2] v5000) {" + "\n".join(lines) + "}")
    write_page(tmp_path / "page.html", difference_page(model, model, ("a", "b")))
    browser.open(tmp_path / "page.html")
    milliseconds = browser.wait_for(DRAWN)
    assert 0 < milliseconds < 3000  # two drawings of 5,000
    browser.find("v4321")
    assert browser.run("return kfacPage.views[0].selected.node.outputs") == ["v4321"]
    browser.run("kfacPage.views[0].home(); kfacPage.views[0].draw()")
    assert browser.run("return kfacPage.views[0].lastDraw") < 300
    browser.require_quiet()


def test_a_page_runs_its_own_scripts_alone(transformed: ir.Model) -> None:
    text = inspection_page(transformed, "nplm.onnx")
    policy = re.findall(r'content="(default-src [^"]*)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 5
    assert re.findall(r"script-src ([^;]*);", policy[0])[0].split() == [f"'sha256-{code}'" for code in hashes]
    assert "Copyright (c) 2012-2014 Chris Pettitt" in scripts[0]  # the licence of dagre asks for it
    assert not re.search(r"""(?:src|href)=|@import|url\(|fetch\(""", text.replace(scripts[0], ""))
