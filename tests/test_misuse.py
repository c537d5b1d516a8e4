"""Wrong arguments: a ValueError with the argument, the value and the remedy."""

import keras
import numpy as np
import pytest
from helpers import data, loss, net

import keras_gradclip as kgc

BAD_NUMBERS = [0, 0.0, -1, -0.1, float("nan"), float("inf"), None, "0.1", True, [0.1]]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda v: kgc.AbsoluteClip(v), "threshold"),
        (lambda v: kgc.ExponentialClip(beta=v), "beta"),
        (lambda v: kgc.ExponentialClip(gamma=v), "gamma"),
        (lambda v: kgc.NormClip(v), "max_norm"),
        (lambda v: kgc.ActivationGate(clip_value=v), "clip_value"),
        (lambda v: kgc.ActivationGate(gamma=v), "gamma"),
        (lambda v: kgc.ActivationGate(initial_learning_rate=v), "initial_learning_rate"),
    ],
)
def test_bad_number(make, name, value):
    with pytest.raises(ValueError) as error:
        make(value)
    text = str(error.value)
    assert name in text
    assert repr(value) in text or repr(float(value)) in text


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: kgc.AbsoluteClip(rescale="l2"), "'l2'"),
        (lambda: kgc.AbsoluteClip(rescale="alpha"), "ExponentialClip"),
        (lambda: kgc.NormClip(rescale="alpha"), "ExponentialClip"),
        (lambda: kgc.ExponentialClip(rescale="l2"), "'l2'"),
        (lambda: kgc.ExponentialClip(weight="mean"), "'mean'"),
        (lambda: kgc.NormClip(scope="tensor"), "'tensor'"),
        (lambda: kgc.get("absolut"), "did you mean 'absolute'"),
        (lambda: kgc.get({"class_name": "Absolut"}), "'Absolut'"),
        (lambda: kgc.get({"config": {}}), "class_name"),
        (lambda: kgc.get({"class_name": "absolute", "config": {"treshold": 1}}), "treshold"),
        (lambda: kgc.get(0.1), "0.1"),
        (lambda: kgc.get({"class_name": "absolute", "config": 5}), "must be a dict"),
        (lambda: kgc.AbsoluteClip(10**400), "inf"),
        (lambda: kgc.AbsoluteClip().describe(3), "built model"),
        (lambda: kgc.Chain([]), "empty"),
        (lambda: kgc.Chain([None]), "clippers[0]"),
        (lambda: kgc.Chain(kgc.AbsoluteClip()), "list"),
        (lambda: kgc.Chain(kgc.AbsoluteClip(), kgc.NormClip()), "Chain([first, second])"),
        (lambda: kgc.ActivationGate(layers="("), "regular expression"),
        (lambda: kgc.ActivationGate(layers=[]), "layers"),
        (lambda: kgc.serialize(3), "3"),
        (lambda: kgc.AbsoluteClip()([1.0], [2.0]), "each of `grads`"),
        (lambda: kgc.AbsoluteClip()([np.ones(3)], [keras.Variable([1.0, 2.0])]), "(2,)"),
        (lambda: kgc.UpdateRatioClip()([keras.Variable([1.0])], [np.ones(1)]), "(grads, var"),
        (lambda: kgc.unit_axes("model"), "'model'"),
        (lambda: kgc.ActivationGate().insert(keras.layers.Dense(1)), "keras.Model"),
        (lambda: kgc.ActivationGate().attach(None), "keras.Model"),
        (lambda: kgc.ClippedModel(net()), "model.inputs"),
        (lambda: kgc.report(3), "run_dir"),
    ],
)
def test_unknown_words(make, word):
    with pytest.raises(ValueError) as error:
        make()
    assert word in str(error.value)


def test_rescale_of_a_norm_clip_warns():
    with pytest.warns(UserWarning, match="rescale"):
        kgc.NormClip(rescale="norm")


@pytest.mark.parametrize("argument", ["clipvalue", "clipnorm", "global_clipnorm"])
def test_an_inner_optimizer_that_clips_is_refused(argument):
    inner = keras.optimizers.SGD(0.1, **{argument: 0.5})
    with pytest.raises(ValueError, match=f"{argument}=0.5.*Leave that out and use"):
        kgc.ClippedOptimizer(inner, "absolute")
    with pytest.raises(ValueError, match=argument):
        net().compile(keras.optimizers.SGD(0.1, **{argument: 0.5}), loss(), clipper="absolute")


@pytest.mark.parametrize("name", ["clipvalue", "weight_decay", "use_ema", "momentum"])
def test_settings_of_the_inner_optimizer_are_refused_on_the_wrapper(name):
    optimizer = kgc.ClippedOptimizer("sgd", "absolute")
    with pytest.raises(AttributeError, match=f"`{name}`.*`inner_optimizer`"):
        setattr(optimizer, name, 0.5)


def inner():
    return keras.optimizers.SGD(0.1)


@pytest.mark.parametrize(
    "make, word",
    [
        (
            lambda: kgc.ClippedOptimizer(keras.optimizers.LossScaleOptimizer(inner())),
            "other way round",
        ),
        (lambda: kgc.ClippedOptimizer(kgc.ClippedOptimizer(inner())), "Chain"),
        (
            lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=4)),
            "ClippedOptimizer(..., gradient_accumulation_steps=4)",
        ),
        (lambda: kgc.ClippedOptimizer(3), "keras.optimizers.Optimizer"),
        (lambda: kgc.ClippedOptimizer(inner(), 0.1), "0.1"),
        (
            lambda: kgc.ClippedOptimizer(inner(), "absolute", gradient_accumulation_steps=0),
            "gradient_accumulation_steps",
        ),
        (lambda: kgc.ClippedOptimizer(inner(), "absolute", gradient_accumulation_steps=2.5), "2.5"),
        (lambda: kgc.ClippedOptimizer(inner(), "absolute", skip_nonfinite=1), "skip_nonfinite"),
        (
            lambda: net().compile(
                kgc.ClippedOptimizer(inner(), "absolute"), loss(), clipper="norm"
            ),
            "one place",
        ),
        (lambda: net().compile("sgd", loss(), activation_gate=0.1), "activation_gate"),
        (
            lambda: net().compile(
                "sgd", loss(), activation_gate=kgc.ActivationGate(layers="conv9")
            ),
            "selects no layer",
        ),
    ],
)
def test_wrong_combinations(make, word):
    with pytest.raises(ValueError) as error:
        make()
    assert word in str(error.value)


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras before 3.15 has none"
)
def test_a_multi_optimizer_goes_outside():
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(inner()))
    with pytest.raises(ValueError, match="MultiOptimizer around ClippedOptimizers"):
        kgc.ClippedOptimizer(multi, "absolute")


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match="must come before"):

        class Wrong(keras.Model, kgc.ClippedTrainStep):
            pass


def test_a_clipper_needs_an_optimizer():
    with pytest.raises(ValueError, match="needs an optimizer"):
        net().compile(None, loss(), clipper="absolute")


def test_an_optimizer_from_outside_the_scope_is_refused():
    strategy = pytest.importorskip("helpers").strategy
    outside = kgc.ClippedOptimizer(inner(), "absolute")
    with strategy(2).scope():
        model = net()
        model.compile(outside, loss())
    with pytest.raises(ValueError, match=r"inside `strategy\.scope\(\)`"):
        model.fit(*data(16), batch_size=8, verbose=0)


def test_a_map_is_checked_when_the_variables_are_known():
    model = net()
    model.compile("sgd", loss(), clipper=kgc.ClipMap({"haed/.*": None}))
    with pytest.raises(ValueError, match=r"haed.*matches none"):
        model.optimizer.build(model.trainable_variables)


def test_live_thresholds_refuse_what_the_constructor_refuses():
    optimizer = kgc.ClippedOptimizer(inner(), kgc.AbsoluteClip(0.1))
    for value in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            optimizer.clip_hyperparameters["threshold"] = value
    with pytest.raises(KeyError, match="treshold"):
        optimizer.clip_hyperparameters["treshold"] = 0.1
    chain = kgc.ClippedOptimizer(inner(), kgc.Chain([kgc.PercentileClip(90.0)]))
    with pytest.raises(ValueError, match="`percentile` must be above 0 and at most 100"):
        chain.clip_hyperparameters["0/percentile"] = 150
    with pytest.raises(TypeError, match="cannot be deleted"):
        del optimizer.clip_hyperparameters["threshold"]
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    scheduled = kgc.ClippedOptimizer(inner(), kgc.AbsoluteClip(schedule))
    with pytest.raises(TypeError, match="schedule"):
        scheduled.clip_hyperparameters["threshold"] = 0.1
