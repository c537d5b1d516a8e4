"""ClipMap: which rule hits which variable, and what is refused."""

import keras
import numpy as np
import pytest
from helpers import gradients, net, to64, variables

import keras_gradclip as kgc


def test_each_variable_is_clipped_by_its_rule():
    vs = variables()
    gs, g64 = gradients(vs)
    clipper = kgc.ClipMap(
        {"conv/kernel": kgc.AbsoluteClip(0.01), ".*/bias": None}, kgc.AbsoluteClip(0.2)
    )
    got = [to64(g) for g in clipper(gs, vs)]
    np.testing.assert_allclose(got[0], np.clip(g64[0], -0.01, 0.01), rtol=1e-6)
    np.testing.assert_array_equal(got[1], g64[1])
    np.testing.assert_allclose(got[2], np.clip(g64[2], -0.2, 0.2), rtol=1e-6)
    np.testing.assert_array_equal(got[4], g64[4])


def test_a_norm_rule_sees_its_own_variables_only():
    vs = variables()
    gs, g64 = gradients(vs)
    got = kgc.ClipMap({"dense/.*": kgc.NormClip(1.0, "global")})(gs, vs)
    norm = np.sqrt((g64[3] ** 2).sum() + (g64[4] ** 2).sum())
    np.testing.assert_allclose(to64(got[3]), g64[3] / norm, rtol=1e-6)
    np.testing.assert_array_equal(to64(got[0]), g64[0])


def test_a_match_must_be_full():
    with pytest.raises(ValueError, match="matches none"):
        kgc.ClipMap({"conv": kgc.AbsoluteClip(0.1)})(gradients(variables())[0], variables())


def test_two_rules_on_one_variable_collide_in_a_dict_and_not_in_a_list():
    vs = variables()
    rules = {"conv/.*": None, ".*/kernel": kgc.AbsoluteClip(0.1)}
    with pytest.raises(ValueError, match=r"conv/\.\*.*\.\*/kernel.*conv/kernel"):
        kgc.ClipMap(rules)(gradients(vs)[0], vs)
    gs, g64 = gradients(vs)
    got = kgc.ClipMap(list(rules.items()))(gs, vs)
    np.testing.assert_array_equal(to64(got[0]), g64[0])  # conv/.* came first
    assert np.abs(to64(got[3])).max() <= 0.1 + 1e-6


def test_a_rule_that_matches_nothing_names_itself_and_what_comes_near():
    with pytest.raises(ValueError, match=r"'covn/\.\*'.*conv/"):
        kgc.ClipMap({"covn/.*": None}).check_variables(variables())
    kgc.ClipMap({"covn/.*": None}, allow_unmatched=True).check_variables(variables())


@pytest.mark.parametrize(
    "rules, message",
    [
        ({}, "empty"),
        ("conv", "dict or a list"),
        ({"(": None}, "no regular expression"),
        ({"a": 0.1}, "a clipper, its name, or a config"),
        ([("a", None), ("a", None)], "twice"),
        (["a"], "pair"),
        ({1: None}, "pair"),
    ],
)
def test_broken_rules_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        kgc.ClipMap(rules)


def test_describe_shows_every_variable_and_its_rule():
    model = net()
    text = kgc.ClipMap({"head/.*": None}, kgc.AbsoluteClip(0.1)).describe(model)
    lines = text.splitlines()
    assert len(lines) == 2 + len(model.trainable_variables)
    assert lines[-1].split()[-2:] == ["head/.*", "off"]
    assert "stem/kernel" in lines[2] and "AbsoluteClip(threshold=0.1)" in lines[2]
    assert kgc.NormClip(1.0).describe(model).count("NormClip") == len(model.trainable_variables)
    with pytest.raises(ValueError, match="Build it first"):
        kgc.NormClip(1.0).describe(keras.Sequential([keras.layers.Dense(1)]))


def test_one_rule_may_begin_like_another():
    """`.*` and `.*/bias`: each keeps its own thresholds, saved and live."""
    vs = variables()
    gs, g64 = gradients(vs)
    clipper = kgc.ClipMap([(".*/bias", kgc.AbsoluteClip(0.1)), (".*", kgc.AbsoluteClip(0.2))])
    got = [to64(g) for g in clipper(gs, vs)]
    for v, a, g in zip(vs, got, g64, strict=True):
        limit = 0.1 if v.name == "bias" else 0.2
        np.testing.assert_allclose(a, np.clip(g, -limit, limit), rtol=1e-6)
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), clipper)
    optimizer.clip_hyperparameters[".*/threshold"] = 0.25
    assert optimizer.clipper.rules[0][1] == kgc.AbsoluteClip(0.1)
    assert optimizer.clipper.rules[1][1] == kgc.AbsoluteClip(0.25)
    assert kgc.get(kgc.serialize(optimizer.clipper)) == optimizer.clipper


def test_rules_written_by_hand():
    config = {"class_name": "clip_map", "config": {"rules": {"a": "norm", "b": None}}}
    assert kgc.get(config) == kgc.ClipMap({"a": kgc.NormClip(), "b": None})


def test_live_hyperparameters_are_named_by_rule():
    clipper = kgc.ClipMap({"head/.*": kgc.AbsoluteClip(0.3)}, kgc.ExponentialClip(0.6, 0.2))
    assert clipper.hyperparameters() == {
        "head/.*/threshold": 0.3,
        "default/beta": 0.6,
        "default/gamma": 0.2,
    }
    changed = clipper.with_hyperparameters({**clipper.hyperparameters(), "default/beta": 0.9})
    assert changed.default == kgc.ExponentialClip(0.9, 0.2)
    assert changed.rules == clipper.rules


def two_networks():
    """An actor and a critic, with layers of the same names."""
    models = []
    for _ in range(2):
        inputs = keras.Input((3,))
        h = keras.layers.Dense(4, name="body")(inputs)
        models.append(keras.Model(inputs, keras.layers.Dense(2, name="out")(h)))
    return models, [v for model in models for v in model.trainable_variables]


@pytest.mark.parametrize(
    "rules, want",
    [
        ({"out/.*": 1}, "..11..11"),  # by the path, which both have
        ({"out/.*": 1, "out#2/.*": 2}, "..11..22"),
        ({"out#2/.*": 2}, "......22"),
        ([("out/kernel", 1), ("out#2/.*", 2)], "..1...22"),
        ({r"[^#]*": 1, ".*#2.*": 2}, "11112222"),
        ([(".*/kernel", 1), ("out#2/.*", 2)], "1.1.1.12"),
    ],
)
def test_the_second_of_one_path_has_a_name_of_its_own(rules, want):
    _, vs = two_networks()
    pairs = rules.items() if isinstance(rules, dict) else rules
    made = [(pattern, kgc.AbsoluteClip(float(n))) for pattern, n in pairs]
    clipper = kgc.ClipMap(dict(made) if isinstance(rules, dict) else made)
    clipper.check_variables(vs)
    got = [c for _, c in clipper.rule_of(vs)]
    assert "".join("." if c is None else str(int(c.threshold)) for c in got) == want


def test_a_rule_for_a_second_layer_that_is_not_there():
    _, vs = two_networks()
    with pytest.raises(ValueError, match=r"'out#3/\.\*' matches none.*out#2"):
        kgc.ClipMap({"out#3/.*": None}).check_variables(vs)


class Stack(kgc.ClippedTrainStep, keras.Sequential):
    """Built by its first batch."""


@pytest.mark.parametrize("make", [Stack, keras.Sequential], ids=["ours", "plain"])
@pytest.mark.parametrize("is_built", [True, False])
def test_a_rule_may_name_a_frozen_layer(make, is_built):
    body = keras.layers.Dense(4, name="body", trainable=False)
    inputs = [keras.Input((3,))] if is_built else []
    model = make([*inputs, body, keras.layers.Dense(2, name="head")])
    clipper = kgc.ClipMap({".*body/.*": None, ".*head/.*": kgc.NormClip(1.0)})
    model.compile(kgc.ClippedOptimizer("sgd", clipper), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    assert "body" not in clipper.describe(model)
    wrong = make([*inputs, body, keras.layers.Dense(2, name="head")])
    wrong.compile(kgc.ClippedOptimizer("sgd", kgc.ClipMap({"bodi/.*": None})), "mse")
    with pytest.raises(ValueError, match="matches none"):
        wrong.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
