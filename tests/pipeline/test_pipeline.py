from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kfac_onnx.errors import UserError, VerifyError
from kfac_onnx.pipeline.base import NO_CHANGES, Changes, Pass
from kfac_onnx.pipeline.options import Option, opt, options_of
from kfac_onnx.pipeline.pipeline import Pipeline, parse_pipeline
from kfac_onnx.pipeline.registry import BUILT_IN, pass_class, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from kfac_onnx.pipeline.log import Log

RELU = "g (float[N] x) => (float[N] y) { y = Relu(x) }"


@register
@dataclass(frozen=True, kw_only=True)
class TestAddNegation(Pass):
    """Negate the first output, once or several times."""

    __test__ = False

    name: ClassVar[str] = "test-add-negation"
    times: int = opt(1, "how often", lo=0)
    broken: bool = opt(False, "leave a graph that uses a value of no graph")
    refuse: bool = opt(False, "raise a UserError")

    def run(self, model: ir.Model, log: Log) -> Changes:
        if self.refuse:
            raise UserError("this graph cannot be negated")
        for number in range(self.times):
            source = model.graph.outputs[0]
            if self.broken:
                source = ir.Value(name="from-nowhere")
            node = ir.Node("", "Neg", [source], name=f"negation_{number}")
            node.outputs[0].name = f"negated_{number}"
            model.graph.append(node)
            model.graph.outputs[0] = node.outputs[0]
        log.count("negations", self.times)
        return Changes(added=self.times, edited=self.times)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    if option.choices is not None:
        values: st.SearchStrategy[Any] = st.sampled_from(option.choices)
    elif option.kind == "int":
        low = -(2**63) if option.lo is None else int(option.lo)
        values = st.integers(low, 2**63 - 1 if option.hi is None else int(option.hi))
    elif option.kind == "float":
        values = st.floats(
            -3.4e38 if option.lo is None else option.lo,
            3.4e38 if option.hi is None else option.hi,
            allow_nan=False,
            allow_infinity=False,
        )
    elif option.kind == "bool":
        values = st.booleans()
    elif option.kind == "str":
        values = st.text()
    else:
        values = st.lists(st.text()).map(tuple)
    return st.none() | values if option.optional else values


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    chosen = draw(st.lists(st.sampled_from([*BUILT_IN, "test-add-negation"]), max_size=4))
    made: list[Pass] = []
    for name in chosen:
        cls = pass_class(name)
        made.append(cls(**{option.field: draw(values_of(option)) for option in options_of(cls)}))
    return Pipeline(tuple(made))


@given(pipelines())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_every_pipeline_survives_its_text(pipeline: Pipeline) -> None:
    assert parse_pipeline(str(pipeline)) == pipeline


def test_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline("find-embedings")
    assert caught.value.message == "unknown pass 'find-embedings'; did you mean 'find-embeddings'?"
    assert caught.value.help is not None
    assert caught.value.help.startswith("the passes are: inline-functions, sort-nodes, ")


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline("test-add-negation{time=2}")
    assert str(caught.value) == (
        "unknown option 'time' of pass 'test-add-negation'; did you mean 'times'?\n"
        "  help: the options of 'test-add-negation' are: times, broken, refuse"
    )
    with pytest.raises(UserError) as caught:
        parse_pipeline("dce{hard=true}")
    assert str(caught.value) == "unknown option 'hard' of pass 'dce'\n  help: the options of 'dce' are: none"


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline("test-add-negation{times=2,times=3}")
    assert caught.value.message == "option 'times' of pass 'test-add-negation' is given twice"


def test_run_reports_each_pass_and_records_its_text(parse_model: Callable[[str], ir.Model]) -> None:
    model = parse_model(RELU)
    report = parse_pipeline("test-add-negation{times=2},dce").run(model)
    assert report.changes == Changes(added=2, edited=2)
    data = json.loads(json.dumps(report.to_json()))["passes"]
    assert [item["pass"] for item in data] == ["test-add-negation{times=2}", "dce"]
    assert data[0]["statistics"] == {"negations": 2}
    assert data[1]["statistics"] == {}
    assert all(item["seconds"] >= 0 for item in data)
    assert model.metadata_props["kfac.pipeline"] == "test-add-negation{times=2},dce"
    parse_pipeline("dce").run(model)
    assert model.metadata_props["kfac.pipeline"] == "test-add-negation{times=2},dce,dce"


def test_an_empty_pipeline_leaves_the_bytes_alone(
    parse_model: Callable[[str], ir.Model], model_bytes: Callable[[ir.Model], bytes]
) -> None:
    model = parse_model(RELU)
    before = model_bytes(model)
    assert Pipeline(()).run(model).passes == ()
    assert model_bytes(model) == before


def test_printing_and_timing_go_to_the_log(
    parse_model: Callable[[str], ir.Model], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kfac_onnx")
    parse_pipeline("test-add-negation,dce").run(parse_model(RELU), print_after_change=True, timing=True)
    timing, printed, second = caplog.messages
    assert timing.endswith(" ms  test-add-negation: +1 -0 ~1, 1 negations")
    assert printed.startswith("after test-add-negation, pass 1 of 2:\n")
    assert "%negated_0 = Neg(%y)" in printed
    assert second.endswith(" ms  dce: +0 -0 ~0")


def test_a_pass_that_breaks_the_model_is_named(parse_model: Callable[[str], ir.Model]) -> None:
    with pytest.raises(VerifyError) as caught:
        parse_pipeline("dce,test-add-negation{broken=true}").run(parse_model(RELU))
    assert str(caught.value) == (
        "the model is broken after test-add-negation, pass 2 of 2:\n"
        "  node 'negation_0' (Neg), input 0: 'from-nowhere' "
        "is not an input, not an initializer and no node makes it"
    )
    parse_pipeline("test-add-negation{broken=true}").run(parse_model(RELU), verify=False)


def test_a_users_error_says_in_which_pass(parse_model: Callable[[str], ir.Model]) -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline("dce,test-add-negation{refuse=true}").run(parse_model(RELU))
    assert str(caught.value) == ("this graph cannot be negated\n  in:   test-add-negation, pass 2 of 2")


def test_register_refuses_a_second_class_of_the_same_name() -> None:
    with pytest.raises(
        TypeError, match=r"Other and .*TestAddNegation both claim the pass name 'test-add-negation'"
    ):

        @register
        @dataclass(frozen=True, kw_only=True)
        class Other(Pass):
            """Do nothing."""

            name: ClassVar[str] = "test-add-negation"

            def run(self, model: ir.Model, log: Log) -> Changes:
                return NO_CHANGES


def test_a_class_of_the_same_name_in_another_module_is_a_second_class() -> None:
    names = {"__module__": "elsewhere", "__qualname__": TestAddNegation.__qualname__}
    body = {"__doc__": "Do nothing.", "name": "test-add-negation", "run": TestAddNegation.run, **names}
    other = dataclass(frozen=True, kw_only=True)(type("TestAddNegation", (Pass,), body))
    with pytest.raises(TypeError) as caught:
        register(other)
    assert str(caught.value) == (
        f"elsewhere.TestAddNegation and {TestAddNegation.__module__}.TestAddNegation both claim the pass name "
        "'test-add-negation'"
    )
    assert pass_class("test-add-negation") is TestAddNegation


def test_a_module_that_does_not_register_its_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "forgotten", "kfac_onnx.pipeline.text")
    with pytest.raises(TypeError) as caught:
        parse_pipeline("forgotten")
    assert str(caught.value) == (
        "kfac_onnx.pipeline.text does not register 'forgotten': its class needs @register and that name"
    )


def test_register_wants_a_name_and_a_docstring() -> None:
    class Nameless(Pass):
        """Do nothing."""

        def run(self, model: ir.Model, log: Log) -> Changes:
            return NO_CHANGES

    with pytest.raises(TypeError, match="Nameless needs a ClassVar `name` in kebab-case"):
        register(Nameless)

    @dataclass(frozen=True, kw_only=True)
    class Undocumented(Pass):
        name: ClassVar[str] = "undocumented"

        def run(self, model: ir.Model, log: Log) -> Changes:
            return NO_CHANGES

    with pytest.raises(TypeError, match="Undocumented needs a docstring"):
        register(Undocumented)

    class Undecorated(Pass):
        """Do nothing."""

        name: ClassVar[str] = "undecorated"

        def run(self, model: ir.Model, log: Log) -> Changes:
            return NO_CHANGES

    with pytest.raises(TypeError, match="Undecorated must be decorated with @dataclass"):
        register(Undecorated)


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_built_in_pass_loads_and_explains_itself(name: str) -> None:
    cls = pass_class(name)
    assert cls.name == name
    assert cls.__module__ == BUILT_IN[name]
    assert cls.summary().endswith(".")
    assert all(option.help for option in options_of(cls))
