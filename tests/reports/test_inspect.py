from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from kfac_onnx.api import transform
from kfac_onnx.dialect import OPERATORS, Sizes
from kfac_onnx.disk.models import load_model
from kfac_onnx.errors import UserError
from kfac_onnx.reports.inspect import Inspection, LinearCost, SiteReport, inspect

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
V, D = 100, 16


@pytest.fixture(scope="module")
def half() -> Inspection:
    return inspect(transform(GRAPHS / "torchjoint_in__nplm.onnx", preset="half"))


@pytest.fixture(scope="module")
def site(half: Inspection) -> SiteReport:
    (found,) = half.sites
    return found


def test_sizes_and_state(site: SiteReport) -> None:
    assert (site.parameter, site.vocab_size, site.embedding_dim) == ("m.emb.weight", V, D)
    assert site.lookups == "batch*4"
    assert site.factors == {"kfac/m.emb.weight/A": (V,), "kfac/m.emb.weight/G": (D, D)}
    scalars = sum(shape == () for shape in site.states.values())
    # G and its root are float32; A, counters and the scale of A are 8 bytes each
    assert site.state_bytes == 8 * V + 2 * 4 * D * D + 8 * scalars
    assert site.adam_bytes == 2 * 4 * V * D


def test_costs_are_those_of_the_operators(site: SiteReport) -> None:
    groups = {group.operator: group for group in site.groups}
    for name in ("OutputFactorUpdate", "PreconditionRows", "AddRows"):
        for lookups in (0, 7, 1000):
            expected = OPERATORS[name].cost(Sizes(V, D, lookups))
            assert groups[name].cost.at(lookups) == (expected.flops, expected.bytes)
    # one looks at G and one at its root, D x D each, and one at the rows of the update
    finite = groups["AllFinite"].cost
    assert (finite.flops, finite.flops_per_lookup) == (2 * 2 * D * D, 2 * D)
    root = groups["FactorInverseRoot"]
    assert root.cost == site.refresh_cost
    assert root.phase == "refresh"
    # rows times root is 2·D² per lookup, gᵀg another 2·D²; the rest is at most 12 per entry
    assert 4 * D * D < site.step_cost.flops_per_lookup < 4 * D * D + 12 * D


def test_nothing_of_a_step_grows_with_the_vocabulary(site: SiteReport) -> None:
    model = transform(GRAPHS / "torchjoint_in__nplm.onnx", preset="half")
    wide = ir.from_proto(ir.to_proto(model))
    text = wide.metadata_props["kfac.sites"]
    wide.metadata_props["kfac.sites"] = text.replace(f'"vocab_size": {V}', f'"vocab_size": {1000 * V}')
    (other,) = inspect(wide).sites
    assert other.vocab_size == 1000 * V
    assert other.step_cost == site.step_cost
    assert other.refresh_cost == site.refresh_cost


def test_every_inserted_node_has_its_phase_and_its_group(half: Inspection, site: SiteReport) -> None:
    mine = [node for node in half.nodes if node.site == site.parameter]
    assert sum(len(group.nodes) for group in site.groups) == len(mine)
    phases = {node.phase for node in mine}
    assert {"gradients", "count", "refresh", "precondition", "commit"} <= phases
    assert sum(half.nodes_by_phase.values()) == len(half.nodes)
    assert next(iter(half.nodes_by_phase)) == "gradients"
    assert any(node.made_by is None for node in half.nodes)  # the exporter's own


def test_other_parameters_show_their_optimizer(half: Inspection) -> None:
    found = {item.name: item for item in half.others}
    assert set(found) == {"m.fc.weight", "m.fc.bias", "m.out.weight", "m.out.bias"}
    assert all(item.optimizer == "Adam" for item in found.values())
    assert found["m.fc.weight"].state_bytes == 2 * 4 * 16 * 64


def test_other_presets() -> None:
    source = GRAPHS / "torchjoint_in__nplm.onnx"
    (adagrad,) = inspect(transform(source, preset="adagrad")).sites
    assert "kfac/m.emb.weight/G" in adagrad.factors
    assert (V,) in adagrad.states.values()
    plain = inspect(transform(source, preset="plain-adam"))
    (table,) = plain.sites
    assert table.state_bytes >= table.adam_bytes


def test_it_is_json_and_names_the_pipeline(half: Inspection) -> None:
    data = json.loads(json.dumps(half.to_json()))
    assert data["pipeline"].startswith("find-embeddings,insert-embedding-kfac")
    assert data["sites"][0]["step_cost"]["flops_per_lookup"] > 0
    assert data["nodes_by_phase"]["commit"] >= 1


def test_costs_add_up() -> None:
    total = LinearCost(1, 2, 3, 4) + LinearCost(10, 20, 30, 40)
    assert total == LinearCost(11, 22, 33, 44)
    assert total.at(2) == (11 + 66, 22 + 88)
    assert LinearCost().at(5) == (0, 0)


def test_a_model_without_insertions_is_an_error() -> None:
    with pytest.raises(UserError) as caught:
        inspect(load_model(GRAPHS / "torchjoint_in__nplm.onnx"))
    assert str(caught.value) == (
        "the model has not been transformed, so there is nothing to inspect\n"
        "  help: run `kfac-onnx transform MODEL -o OUT` first, or `kfac-onnx scan MODEL`"
    )


def test_lookups_of_fixed_shapes_are_a_number() -> None:
    model = transform(GRAPHS / "torchjoint_in__nplm.onnx", preset="half")
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([6 if not isinstance(dim, int) else dim for dim in value.shape])
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                dims = [6 if not isinstance(dim, int) else dim for dim in value.shape]
                value.shape = ir.Shape(dims)
    (found,) = inspect(model).sites
    assert found.lookups == str(np.prod([6, 4]))


def test_partial_statistics_are_shown_and_priced(site: SiteReport) -> None:
    source = GRAPHS / "torchjoint_in__nplm.onnx"
    (few,) = inspect(transform(source, preset="half", g_rows=64)).sites
    (rare,) = inspect(transform(source, preset="half", g_rows=64, g_every=4)).sites
    (usual,) = inspect(transform(source, preset="half", g_every=4)).sites
    assert site.statistics == "lookups; G from at most 1024 rows"
    assert few.statistics == "lookups; G from at most 64 rows"
    assert rare.statistics == "lookups; G from at most 64 rows, in steps 1, 2, 4, 8 and multiples of 4"
    assert usual.statistics == "lookups; G from at most 1024 rows, in steps 1, 2, 4, 8 and multiples of 4"
    update, sample = (OPERATORS[name].cost(Sizes(V, D, 64)) for name in ("OutputFactorUpdate", "SampleRows"))
    assert rare.statistics_cost == LinearCost(update.flops + sample.flops, update.bytes + sample.bytes)
    assert few.statistics_cost == LinearCost() == site.statistics_cost
    assert few.step_cost == rare.step_cost + rare.statistics_cost  # paid at each step, at some steps
    assert few.step_cost.flops_per_lookup == site.step_cost.flops_per_lookup - 2 * D * D - 6  # the sample
    assert usual.statistics_cost.flops_per_lookup == 2 * D * D + 6  # the sample
