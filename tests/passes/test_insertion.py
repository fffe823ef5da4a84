"""What the inserting passes add, and what they refuse: full sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from corpus_cases import Case
from preset_names import ALL, COUNTING, PER_EXAMPLE, SQUARING
from small_graphs import model_of, training_graph

from kfac_onnx import metadata
from kfac_onnx.api import TransformOptions, save, transform
from kfac_onnx.errors import UserError
from kfac_onnx.graph.emit import Emitter
from kfac_onnx.metadata import Phase, State, Step
from kfac_onnx.passes.find_embeddings import FindEmbeddings
from kfac_onnx.pipeline.log import Log
from kfac_onnx.pipeline.pipeline import parse_pipeline
from kfac_onnx.reports.checks import check
from kfac_onnx.step.draft import Draft

if TYPE_CHECKING:
    from pathlib import Path

NPLM = Case("torchjoint_in__nplm")


def states(model: ir.Model) -> dict[str, State]:
    return {state.input: state for state in metadata.read_list(model, "state", State)}


def test_default_pipeline_is_written_into_the_model() -> None:
    model = transform(NPLM.path, lr=0.02, rest_lr=0.003)
    text = model.metadata_props["kfac.pipeline"]
    assert text == TransformOptions(lr=0.02, rest_lr=0.003).text
    assert text == (
        "find-embeddings,insert-embedding-kfac{lr=0.02},insert-optimizer{lr=0.003},close-step,dce,lower"
    )
    assert str(parse_pipeline(text)) == text


def test_states_of_the_default_preset() -> None:
    found = states(transform(NPLM.path))
    table = {
        name.removeprefix("kfac/m.emb.weight/"): state for name, state in found.items() if "/m.emb." in name
    }
    window = {"window", "window.scale", "window.count", "slot"}
    assert set(table) == {"G", "G.count", "root"} | window
    assert (table["window"].shape, table["window"].update) == ((100,), "in-place")
    assert (table["window"].phase, table["slot"].phase) == (Phase.COMMIT, Phase.COUNT)
    assert (table["G"].shape, table["root"].shape) == ((16, 16), (16, 16))
    assert (table["root"].initial, table["root"].phase) == ("identity", Phase.REFRESH)
    weight = found["m.emb.weight"]
    assert (weight.role, weight.initial, weight.update, weight.phase) == (
        "parameter",
        "parameter",
        "in-place",
        Phase.COMMIT,
    )
    assert weight.output == "m.emb.weight.next"
    # V + 2·D² floats and a few scalars, where Adam keeps 2·V·D; slots need not be kept
    kept = [state for state in table.values() if state.shape and state.role != "scratch"]
    floats = sum(int(np.prod(state.shape)) for state in kept)
    assert floats == 100 + 2 * 16 * 16


@pytest.mark.parametrize(
    ("preset", "kept"),
    [("adagrad", {"squares"}), ("adaptive", {"window", "window.scale", "window.count"})],
)
def test_states_of_the_presets_without_counts(preset: str, kept: set[str]) -> None:
    found = states(transform(NPLM.path, preset=preset))
    table = {name.removeprefix("kfac/m.emb.weight/") for name in found if "/m.emb." in name}
    assert table == kept | {"G", "G.count", "root", "slot"}


def test_no_dense_gradient_of_a_table_is_left() -> None:
    """On the sparse path nothing but the table itself and A has an extent of V."""
    case = Case("torchjoint_in__dlrm_offsets_sum")
    model = transform(case.path)
    sizes = {50, 100, 150}
    held = {name for state in states(model).values() for name in (*state.aliases, state.input, state.output)}
    for node in model.graph:
        for value in node.outputs:
            shape = [] if value.shape is None else list(value.shape)
            assert not sizes & {dim for dim in shape if isinstance(dim, int)} or value.name in held, value


def test_skipped_states_and_inputs_are_declared() -> None:
    model = transform(NPLM.path)
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert step.batch == ("ids", "labels")
    assert {rate.input: rate.default for rate in step.learning_rates} == {
        "kfac/lr": 0.01,
        "kfac/rest_lr": 1e-3,
    }
    assert (step.loss, step.ok, step.shape) == ("loss", "kfac/ok", "rows")
    outputs = {value.name for value in model.graph.outputs}
    assert {state.output for state in states(model).values()} | {"loss", "kfac/ok"} == outputs


def test_every_inserted_node_says_who_made_it() -> None:
    model = transform(NPLM.path)
    added = [node for node in model.graph if "kfac.pass" in node.metadata_props]
    assert added
    assert all("kfac.phase" in node.metadata_props for node in added)
    assert all(node.metadata_props.get("kfac.phase") for node in model.graph if node.domain == "ai.kfac")


def test_exporters_racing_scatters_are_gone() -> None:
    for name in ("torchjoint_in__decoys", "torchjoint_in__lookup_scale", "ortart_legcore__decoys"):
        model = transform(Case(name).path)
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        for graph in graphs:
            for node in graph:
                reduction = node.attributes.get("reduction")
                assert node.op_type != "ScatterND" or reduction is None or reduction.as_string() == "none"


def test_cuda_target_adds_with_scatter_nd() -> None:
    model = transform(NPLM.path, target="cuda")
    body = model.functions[("ai.kfac", "AddRows", "")].graph
    assert [node.op_type for node in body][-1] == "ScatterND"


def test_deterministic_cuda_target_adds_nothing_atomically(caplog: pytest.LogCaptureFixture) -> None:
    model = transform(NPLM.path, target="cuda", deterministic=True)
    text = model.metadata_props["kfac.pipeline"]
    assert text.endswith(",lower{target=cuda,deterministic=true}")
    for function in model.functions.values():
        for node in function:
            assert node.attributes.get_string("reduction", "none") == "none"
    assert "atomically" not in caplog.text


def test_what_the_graph_itself_adds_atomically_is_told(caplog: pytest.LogCaptureFixture) -> None:
    path = Case("torchjoint_in__dlrm_offsets_sum").path
    transform(path, target="cuda")
    assert "atomically" not in caplog.text
    transform(path, target="cuda", deterministic=True)
    assert "scatters of the graph itself add atomically on CUDA, so that runs may differ" in caplog.text


@pytest.mark.parametrize("preset", ["plain-sgd", "plain-momentum", "plain-adam", "plain-adagrad"])
def test_plain_optimizers_on_the_tables(preset: str) -> None:
    model = transform(NPLM.path, preset=preset, lr=0.5, rest="sgd")
    operators = {
        node.op_type for node in model.graph if node.metadata_props.get("kfac.site") == "m.emb.weight"
    }
    expected = {
        "plain-sgd": "ApplyRows",
        "plain-momentum": "Momentum",
        "plain-adam": "Adam",
        "plain-adagrad": "RowElementAdagradStep",
    }
    assert expected[preset] in operators
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert step.learning_rates[0].default == 0.5


def test_running_twice_does_not_matter() -> None:
    first, second = (ir.to_proto(transform(NPLM.path)).SerializeToString() for _ in range(2))
    assert first == second


def test_find_embeddings_does_not_touch_the_exporters_values() -> None:
    model = training_graph()
    before = [value.name for node in model.graph for value in node.outputs]
    FindEmbeddings().run(model, Log())
    after = [value.name for node in model.graph for value in node.outputs]
    assert after[: len(before)] == before


def message_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_graph_without_a_table() -> None:
    text = """
    plain (float[N, 3] x, float[3] w) => (float loss, float[3] w_grad)
    <int64[1] rows = {0}>
    {
        y = Mul(x, w)
        loss = ReduceSum<keepdims: int = 0>(y)
        w_grad = ReduceSum<keepdims: int = 0>(x, rows)
    }
    """
    model = model_of(text, {"w": "w_grad"})
    assert message_of(lambda: parse_pipeline("find-embeddings,insert-embedding-kfac").run(model)) == (
        "the graph has no embedding table: no operator looks up rows of a trained parameter\n"
        "  in:   insert-embedding-kfac\n"
        "  help: `scan MODEL` lists the trained parameters, `why MODEL PARAM` what was tried for one"
    )


def test_refused_table_stops_the_transformation() -> None:
    case = Case("torchjoint_initopt__identical_init")
    text = message_of(lambda: transform(case.path))
    assert text == (
        "parameter 'm.emb_a.weight' is used in a way that no block covers: Gather 'embedding_1' looks rows up "
        "by the ids 'b', but its gradient 'm.emb_a.weight_grad' holds no rows of that lookup: the exporter "
        "merged two tables that started equal, or the lookup is detached\n"
        "  path: m.emb_a.weight -> node_embedding_1 (Gather)\n"
        "  in:   insert-embedding-kfac\n"
        "  help: export with the parameters as inputs, or with different starting values, and without "
        "optimization"
    )


def test_fallback_is_allowed_by_name_only() -> None:
    case = Case("torchjoint_initopt__identical_init")
    model = transform(case.path, allow_fallback=("m.emb_a.weight",))
    adam = [node for node in model.graph if node.op_type == "Adam"]
    assert "m.emb_a.weight" in {node.metadata_props["kfac.site"] for node in adam}
    assert message_of(lambda: transform(case.path, allow_fallback=("m.emb_a.weigth",))) == (
        "allow-fallback names 'm.emb_a.weigth', which was not refused; did you mean 'm.emb_a.weight'?\n"
        "  in:   insert-embedding-kfac, pass 2 of 6\n"
        "  help: `scan MODEL` lists the refused parameters"
    )


def test_r17_needs_the_divisor_of_the_loss() -> None:
    odd = "total = ReduceSum<keepdims: int = 0>(hg)\n loss = Sqrt(total)"
    call = parse_pipeline("find-embeddings,insert-embedding-kfac{preset=r1.7}")
    assert message_of(lambda: call.run(training_graph(loss=odd))) == (
        "preset r1.7 needs the number of examples that the loss 'loss' divides by, "
        "and the graph does not show it\n"
        "  in:   insert-embedding-kfac\n"
        "  help: give it: grad-scale=N, or 1 for a loss that is a sum"
    )
    given = parse_pipeline("find-embeddings,insert-embedding-kfac{preset=r1.7,grad-scale=6}")
    given.run(training_graph(loss=odd))


def test_unknown_preset_and_optimizer_name_the_nearest() -> None:
    assert message_of(lambda: transform(NPLM.path, preset="haf")) == (
        "unknown preset 'haf'; did you mean 'half'?\n"
        "  help: the presets are: r1.7, half, adagrad, adaptive, plain-sgd, plain-momentum, plain-adam, "
        "plain-adagrad"
    )
    assert message_of(lambda: transform(NPLM.path, rest="adm")).splitlines()[0] == (
        "unknown optimizer 'adm'; did you mean 'adam'?"
    )


def test_values_given_to_transform_are_stored_and_constants_leave_the_batch() -> None:
    case = Case("torchjoint_in__bert_sum")
    feed = case.feed()
    given = {"m.tok.weight": feed["m.tok.weight"], "m.pos_ids": feed["m.pos_ids"]}
    model = transform(case.path, parameters=given)
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert step.constants == ("m.pos_ids",)
    assert "m.pos_ids" not in step.batch
    stored = model.graph.initializers["m.tok.weight"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), given["m.tok.weight"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"m.emb.wieght": np.zeros((100, 16), np.float32)},
            "the graph has no parameter or input 'm.emb.wieght'; did you mean 'm.emb.weight'?\n"
            "  help: `scan MODEL` lists the parameters and the inputs",
        ),
        (
            {"m.emb.weight": np.zeros((16, 100), np.float32)},
            "the value of 'm.emb.weight' has the shape [16, 100], the graph wants [100, 16]",
        ),
        (
            {"m.emb.weight": np.zeros((100, 16), np.float64)},
            "the value of 'm.emb.weight' is float64, the graph wants float32",
        ),
    ],
)
def test_values_that_do_not_fit(values: dict[str, np.ndarray], message: str) -> None:
    assert message_of(lambda: transform(NPLM.path, parameters=values)) == message


def test_grad_scale_is_refused_where_it_means_nothing() -> None:
    assert message_of(lambda: transform(NPLM.path, grad_scale=4.0)) == (
        "grad-scale has no meaning for preset 'adaptive', whose update does not depend on it\n"
        "  in:   insert-embedding-kfac, pass 2 of 6\n"
        "  help: leave it out, or take preset r1.7"
    )


def test_a_state_has_a_number_for_each_dimension() -> None:
    """A dimension with a name was left out of the shape: the table came out with one dimension less."""
    model = model_of("g (float[V, 3] w) => (float[V, 3] w_new) { w_new = Neg (w) }", {}, None)
    (table,), (new,) = model.graph.inputs, model.graph.outputs
    draft = Draft(model, Emitter(model, "test"), {})
    with pytest.raises(UserError, match="the parameter 'w' has dimensions without a number"):
        draft.write(table, new, Phase.COMMIT)
    assert draft.states == []
    table.shape = ir.Shape([5, 3])
    draft.write(table, new, Phase.COMMIT)
    assert draft.states[0].shape == (5, 3)


@pytest.mark.parametrize("preset", ALL)
def test_a_preset_that_diverges_on_tied_tables_is_warned_of(
    preset: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    scale = {"grad_scale": 4.0} if preset in PER_EXAMPLE else {}
    model = transform(Case("ortart_legloss__gpt_tied").path, preset=preset, tied="lookup", **scale)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    steady = " or ".join(SQUARING)
    assert warnings == (
        [
            "'m.tok.weight' is tied to MatMul '/m/head/MatMul_output_0', and preset "
            f"'{preset}' can diverge on tied tables, as its steps follow the size of gradients: "
            f"use preset {steady}"
        ]
        if preset in COUNTING
        else []
    )
    save(model, tmp_path / "step.onnx")
    findings = {finding.id: finding for finding in check(tmp_path / "step.onnx").findings}
    assert ("diverging-preset" in findings) == (preset in COUNTING)
    if preset in COUNTING:
        finding = findings["diverging-preset"]
        assert (finding.severity, finding.where) == ("warning", ("m.tok.weight",))
        assert finding.what == f"preset '{preset}' trains 1 tied table"
        assert finding.remedy == f"transform the graph with preset {steady}"
