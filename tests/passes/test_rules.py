"""Rules: what they become, which one wins, and rules that are none."""

from __future__ import annotations

import pytest
from corpus_cases import GRAPHS

from kfac_onnx import UserError, metadata, transform
from kfac_onnx.fisher.presets import PRESETS
from kfac_onnx.metadata import State, Step
from kfac_onnx.passes.rules import REST, rule_passes
from kfac_onnx.passes.standard import PLAIN, TransformOptions

NPLM = GRAPHS / "torchjoint_in__nplm.onnx"


def test_the_last_rule_comes_first() -> None:
    made = rule_passes(["*=sgd", "m.fc.*=adamw{lr=0.5,weight-decay=0.1}", "a=b.weight=muon{lr=0.25}"])
    assert [str(item) for item in made] == [
        'insert-muon{lr=0.25,only=["a=b.weight"],rate="kfac/lr of a=b.weight"}',
        'insert-optimizer{method=adamw,parameters=all,only=[m.fc.*],lr=0.5,rate="kfac/lr of m.fc.*",weight-decay=0.1}',
        'insert-optimizer{method=sgd,parameters=all,only=[*],rate="kfac/lr of *"}',
    ]


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_can_be_a_rule(name: str) -> None:
    model = transform(NPLM, preset="plain-sgd", rules=(f"m.emb.*={name}{{lr=0.125}}",))
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert ("kfac/lr of m.emb.*", 0.125) in {(rate.input, rate.default) for rate in step.learning_rates}
    assert step.settings.preset == name
    states = {state.input for state in metadata.read_list(model, "state", State)}
    assert "kfac/m.emb.weight/G" in states


def test_a_ruled_table_is_left_alone_by_the_others_preset() -> None:
    model = transform(GRAPHS / "ortart_legcore__twotower.onnx", preset="half", rules=("user_emb.*=adagrad",))
    states = {state.input for state in metadata.read_list(model, "state", State)}
    assert "kfac/user_emb.weight/squares" in states
    assert "kfac/user_emb.weight/A" not in states
    assert "kfac/item_emb.weight/A" in states


def test_a_preset_for_what_is_no_table() -> None:
    with pytest.raises(UserError) as caught:
        transform(NPLM, rules=("m.fc.*=adaptive",))
    assert caught.value.message == "'m.fc.bias' is no embedding table, and preset 'adaptive' is for tables"


@pytest.mark.parametrize("name", [*(name for name in REST if name not in PRESETS), *PLAIN, "outrow"])
def test_every_optimizer_can_be_a_rule(name: str) -> None:
    model = transform(NPLM, rules=(f"m.out.weight={name}{{lr=0.125}}",))
    step = metadata.read(model, "step", Step)
    assert step is not None
    assert ("kfac/lr of m.out.weight", 0.125) in {(rate.input, rate.default) for rate in step.learning_rates}


def test_the_last_match_wins() -> None:
    model = transform(NPLM, rules=("m.fc.*=momentum", "m.fc.bias=sgd"))
    states = {state.input for state in metadata.read_list(model, "state", State)}
    assert "kfac/m.fc.weight/velocity" in states
    assert not any("m.fc.bias/" in name for name in states)
    assert "kfac/m.out.bias/m" in states  # the rest is Adam's


def test_a_rate_that_was_named_stays() -> None:
    (made,) = rule_passes(["*.bias=adam{rate=kfac/biases}"])
    assert str(made) == "insert-optimizer{parameters=all,only=[*.bias],rate=kfac/biases}"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "emb=adamm",
            "the rule 'emb=adamm' names no optimizer: 'adamm'; did you mean 'adam'?",
        ),
        ("emb", "a rule is PATTERN=optimizer{option=value,...}, not 'emb'"),
        ("emb=adam{lr=1", "a rule is PATTERN=optimizer{option=value,...}, not 'emb=adam{lr=1'"),
        (
            "emb=adam{ls=1}",
            "the rule 'emb=adam{ls=1}' does not hold: unknown option 'ls' of pass 'insert-optimizer'",
        ),
    ],
)
def test_what_is_no_rule(rule: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        rule_passes([rule])
    assert caught.value.message == message


def test_a_rule_for_nobody() -> None:
    with pytest.raises(UserError) as caught:
        transform(NPLM, rules=("m.fc.wieght=sgd",))
    assert caught.value.message == "'m.fc.wieght' matches no trained parameter; did you mean 'm.fc.weight'?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest": "muonn"}, "unknown optimizer 'muonn'; did you mean 'muon'?"),
        ({"hidden_lr": 0.1}, "hidden_lr belongs to rest=muon and rest=kfac, and the rest is trained by adam"),
        (
            {"shape": "dense", "weight_decay": 0.1},
            "shape=dense inserts no optimizer, so weight_decay cannot be set",
        ),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TransformOptions(**options)  # type: ignore[arg-type]
    assert caught.value.message == message


def test_the_options_are_in_the_pipeline() -> None:
    options = TransformOptions(
        rest="muon",
        hidden_lr=0.25,
        rest_lr=0.5,
        weight_decay=0.125,
        beta2=0.75,
        clip_norm=1.0,
        clip_value=2.0,
    )
    assert options.text == (
        "find-embeddings,clip-gradients{norm=1.0,value=2.0},classify,insert-embedding-kfac,insert-muon{lr=0.25},"
        "insert-output-rows,insert-optimizer{method=adamw,lr=0.5,weight-decay=0.125,beta2=0.75},close-step,dce,lower"
    )
