"""`clipper="auto"`, and the warning of a clip in front of Muon."""

import re
import warnings

import keras
import numpy as np
import pytest
from helpers import data, loss, needs_muon, net

import keras_gradclip as kgc
from keras_gradclip.__main__ import main

SUGGESTED = kgc.UpdateRatioClip(biases="unit", anneal="learning_rate")
LARGER = kgc.UpdateRatioClip(5e-3, biases="unit")
GUARD = kgc.PercentileClip(90, window=20, scope="layer")


def normalised():
    inputs = keras.Input((8, 8, 3))
    h = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(h)))


@pytest.mark.parametrize(
    "make, inner, want",
    [
        (net, {"class_name": "SGD", "config": {"momentum": 0.9}}, SUGGESTED),
        (net, "sgd", LARGER),
        (normalised, "sgd", GUARD),
        (net, "adamw", LARGER),
        (normalised, "adamw", GUARD),
    ],
)
def test_auto(make, inner, want, tmp_path, capsys):
    model = make()
    optimizer = kgc.ClippedOptimizer(inner, "auto")
    assert optimizer.get_config()["clipper"] == "auto"
    model.compile(optimizer, loss())
    x, y = data(32)
    model.fit(x, y, batch_size=16, verbose=0)
    assert optimizer.clipper == want
    assert set(optimizer.clip_hyperparameters) == set(want.hyperparameters())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.clipper == want
    assert main(["describe", str(tmp_path / "model.keras")]) == 0
    assert "The choice of clipper='auto'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("inner", "kernels", "ratio"),
    [
        *(("momentum", n, k) for n, k in ((1, 2e-3), (8, 2e-3), (12, 1.33e-3), (57, 1e-3))),
        *(("adamw", n, k) for n, k in ((8, 5e-3), (12, 2.93e-3), (16, 2e-3), (57, 2e-3))),
    ],
)
def test_auto_takes_a_smaller_share_of_a_deeper_network(inner, kernels, ratio):
    layers = [keras.layers.Dense(2) for _ in range(kernels)]
    for layer in layers:
        layer.build((None, 2))
    variables = [v for layer in layers for v in layer.trainable_variables]
    momentum = inner == "momentum"
    make = keras.optimizers.SGD(0.1, momentum=0.9) if momentum else "adamw"
    optimizer = kgc.ClippedOptimizer(make, "auto")
    optimizer.build(variables)
    anneal = "learning_rate" if momentum else None
    want = kgc.UpdateRatioClip(ratio, biases="unit", anneal=anneal)
    assert optimizer.clipper == want


def test_a_model_takes_auto():
    model = net()
    model.compile("sgd", loss(), clipper="auto")
    model.optimizer.build(model.trainable_variables)
    assert model.optimizer.clipper == LARGER


def step_of_muon(clipper, scale, heavy=False):
    """Muon's first step on one matrix; `heavy`: of a gradient with a few large elements."""
    rng = np.random.default_rng(0)
    start, g = rng.normal(size=(2, 64, 32)).astype("float32")
    if heavy:
        g = rng.standard_cauchy(size=g.shape).astype("float32")
    matrix = keras.Variable(start, name="kernel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = kgc.ClippedOptimizer(keras.optimizers.Muon(0.01, weight_decay=None), clipper)
        optimizer.apply([keras.ops.convert_to_tensor(scale * g)], [matrix])
    return keras.ops.convert_to_numpy(matrix) - start


def moved(clipper, scale):
    """The length of that step."""
    return np.linalg.norm(step_of_muon(clipper, scale))


def test_what_the_warning_says_is_so():
    """A clip bounds nothing in front of Muon; near its floor of 1e-7 it distorts the step."""
    needs_muon()
    plain = moved(None, 1.0)
    for c in (1.0, 1e-4):
        assert moved(kgc.NormClip(c), 100.0) == pytest.approx(plain, rel=1e-3)
    assert abs(moved(kgc.NormClip(1e-8), 1.0) / plain - 1) > 0.05


@pytest.mark.parametrize(
    "clipper, is_warned",
    [
        (kgc.NormClip(1.0), True),
        (kgc.RMSClip(0.1), True),
        (kgc.ZScoreClip(), True),
        (kgc.Chain([kgc.NormClip(1.0), kgc.RMSClip(0.1)]), True),
        (kgc.AbsoluteClip(0.1), False),
        (kgc.ExponentialClip(), False),
        (kgc.AdaptiveClip(0.01), False),
        (kgc.Chain([kgc.AbsoluteClip(0.1), kgc.NormClip(1.0)]), False),
        (kgc.ClipMap({"bias": kgc.NormClip(1.0)}, kgc.AbsoluteClip(1.0), True), False),
    ],
    ids=str,
)
def test_muon_is_warned_of_where_a_clip_is_one_factor_a_matrix(clipper, is_warned):
    needs_muon()
    variables = [
        keras.Variable(np.ones((64, 32), "float32"), name="kernel"),
        keras.Variable(np.ones(32, "float32"), name="bias"),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kgc.ClippedOptimizer(keras.optimizers.Muon(0.01), clipper).build(variables)
    assert ["Muon" in str(w.message) for w in caught] == [True] * is_warned
    steps = [step_of_muon(clip, 1.0, heavy=True) for clip in (clipper, None)]
    cosine = np.sum(steps[0] * steps[1]) / np.prod([np.linalg.norm(s) for s in steps])
    is_kept = cosine > 0.999  # of what is warned of, the clip does nothing
    assert is_kept or not is_warned


def test_a_bound_of_steps_bounds_muons():
    needs_muon()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to warn of
        optimizer = kgc.ClippedOptimizer(keras.optimizers.Muon(0.01), kgc.UpdateRatioClip())
        optimizer.build([keras.Variable(np.ones((64, 32), "float32"), name="kernel")])
    plain, size = moved(None, 1.0), np.sqrt(64 * 32)
    assert moved(kgc.UpdateRatioClip(1e-5), 1.0) == pytest.approx(1e-5 * size, rel=0.1)
    assert moved(kgc.UpdateRatioClip(1e-5), 1.0) < 0.1 * plain


def test_muon_is_warned_of_with_a_remedy_that_works():
    model = net()
    inner = keras.optimizers.Muon(0.01, exclude_layers=["stem"])
    with pytest.warns(UserWarning, match="bounds nothing on its 1 matrices") as caught:
        model.compile(kgc.ClippedOptimizer(inner, kgc.NormClip(1.0)), loss())
        model.optimizer.build(model.trainable_variables)
    remedy = re.search(r"alone: (ClipMap\(.*\))\.$", str(caught[0].message)).group(1)
    clipper = eval(remedy, vars(kgc))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = net()
        again.compile(kgc.ClippedOptimizer(keras.optimizers.Muon(0.01), clipper), loss())
        again.optimizer.build(again.trainable_variables)
    auto = kgc.ClippedOptimizer(keras.optimizers.Muon(0.01), "auto")
    auto.build(again.trainable_variables)
    rules = dict(
        zip(
            [v.path for v in again.trainable_variables],
            auto.clipper.rule_of(again.trainable_variables),
            strict=True,
        )
    )
    assert rules["head/kernel"][1] is None
    assert rules["stem/kernel"][1] == GUARD
