"""ClippedTrainStep and ClippedModel: ways to build them, and the logs of `fit`."""

import keras
import numpy as np
import pytest
from helpers import CLASSES, data, loss, net, train, weights

import keras_gradclip as kgc
from keras_gradclip.optimizer.clipped_optimizer import find


def layers():
    return [keras.layers.Flatten(), keras.layers.Dense(CLASSES)]


class Subclassed(kgc.ClippedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flatten, self.dense = layers()

    def call(self, x):
        return self.dense(self.flatten(x))


class FunctionalSubclass(kgc.ClippedModel):
    def __init__(self):
        inputs = keras.Input((8, 8, 3))
        flatten, dense = layers()
        super().__init__(inputs, dense(flatten(inputs)))


class Mixed(kgc.ClippedTrainStep, keras.Model):
    pass


class Stack(kgc.ClippedTrainStep, keras.Sequential):
    pass


def functional(cls):
    inputs = keras.Input((8, 8, 3))
    flatten, dense = layers()
    return cls(inputs, dense(flatten(inputs)))


def application(cls):
    body = keras.applications.MobileNet(
        alpha=0.25,
        weights=None,
        input_shape=(32, 32, 3),
        classes=CLASSES,
        classifier_activation=None,
    )
    return cls(body.inputs, body.outputs)


WAYS = {
    "ClippedModel(inputs, outputs)": lambda: functional(kgc.ClippedModel),
    "subclass": Subclassed,
    "functional subclass": FunctionalSubclass,
    "mixin, functional": lambda: functional(Mixed),
    "mixin, Sequential": lambda: Stack(layers()),
    "subclass again": Subclassed,  # building functional ones must not have changed the class
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_building_trains_and_logs(way):
    x, y = data(16)
    model = WAYS[way]()
    model.compile("adam", loss(), metrics=["accuracy"], clipper="absolute")
    assert isinstance(model.optimizer, kgc.ClippedOptimizer)
    history = model.fit(x, y, batch_size=8, verbose=0, validation_data=(x, y)).history
    assert set(history) == {
        *("accuracy", "loss", "grad_norm", "clip_fraction"),
        *("val_accuracy", "val_loss"),
    }
    assert history["grad_norm"][0] > 0
    assert 0 < history["clip_fraction"][0] <= 1
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"accuracy", "loss"}
    assert model.predict(x, verbose=0).shape == (16, CLASSES)


@pytest.mark.slow
def test_keras_applications_body():
    model = application(kgc.ClippedModel)
    assert isinstance(model, kgc.ClippedModel)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 32, 32, 3)).astype("float32"), np.array([0, 1, 2, 0])
    model.compile("adamw", loss(), clipper=kgc.NormClip(1.0))
    assert model.fit(x, y, verbose=0).history["grad_norm"][0] > 0


@pytest.mark.parametrize("telemetry, measured", [(True, [0, 1, 2, 3]), (3, [0, 3]), (False, [0])])
def test_grad_norm_and_clip_fraction_are_means_over_the_epoch(telemetry, measured):
    """By default, every 8th update is measured, from the first of the epoch."""
    x, y = data(32)
    model = net()
    inner, clipper = keras.optimizers.SGD(0.0), kgc.AbsoluteClip(0.05)
    model.compile(
        kgc.ClippedOptimizer(inner, clipper, telemetry=telemetry), loss(), loss_weights=30.0
    )
    history = model.fit(x, y, batch_size=8, shuffle=False, epochs=2, verbose=0).history

    import tensorflow as tf

    norms, fractions = [], []
    for i in (8 * n for n in measured):
        with tf.GradientTape() as tape:
            value = 30.0 * loss()(y[i : i + 8], model(x[i : i + 8]))
        flat = np.concatenate(
            [g.numpy().ravel() for g in tape.gradient(value, model.trainable_variables)]
        )
        norms.append(np.linalg.norm(flat))
        fractions.append(np.mean(np.abs(flat) > 0.05))
    for epoch in range(2):  # the second epoch starts anew
        assert history["grad_norm"][epoch] == pytest.approx(np.mean(norms), rel=1e-4)
        assert history["clip_fraction"][epoch] == pytest.approx(np.mean(fractions), rel=1e-4)
    assert model.optimizer.read_telemetry()["updates"] == 4


def test_without_a_clipper_grad_norm_is_still_logged():
    _, history, _ = train(0, lambda: keras.optimizers.SGD(0.01), steps=2)
    assert history["grad_norm"][0] > 0
    assert history["clip_fraction"] == [0.0]


def test_train_step_can_be_overridden():
    import tensorflow as tf

    class Own(kgc.ClippedModel):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                value = 1e3 * self.compute_loss(x, y, y_pred)
            grads = tape.gradient(value, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return self.compute_metrics(x, y, y_pred)

    x, y = data(16)
    model = net(Own)
    model.compile(keras.optimizers.SGD(1.0), loss(), clipper=kgc.AbsoluteClip(0.1))
    before = weights(model)
    history = model.fit(x, y, batch_size=16, verbose=0).history
    assert np.abs(weights(model) - before).max() == pytest.approx(0.1, rel=1e-3)
    assert history["grad_norm"][0] > 1 and history["clip_fraction"][0] > 0


@pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch"])
def test_on_batch(method):
    x, y = data(8)
    model = net()
    model.compile("sgd", loss(), clipper="absolute")
    logs = getattr(model, method)(x, y, return_dict=True)
    assert ("grad_norm" in logs) == (method == "train_on_batch")


def test_compile_again_changes_and_removes_the_clipper():
    x, y = data(16)
    model = net()
    for clipper in (kgc.AbsoluteClip(0.1), kgc.NormClip(1e9), None):
        model.compile(keras.optimizers.SGD(0.1), loss(), loss_weights=50.0, clipper=clipper)
        assert model.optimizer.clipper == clipper
        fraction = model.fit(x, y, verbose=0).history["clip_fraction"][0]
        assert (fraction > 0) == (clipper == kgc.AbsoluteClip(0.1))


def test_a_clipped_optimizer_may_be_given_instead_of_a_clipper():
    x, y = data(16)
    model = net()
    model.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), "norm"), loss())
    assert "clip_fraction" in model.fit(x, y, verbose=0).history


def test_an_evaluation_between_epochs_does_not_disturb_the_figures():
    x, y = data(32)
    histories = []
    for validation in (None, (x, y)):
        model = net()
        model.compile(keras.optimizers.SGD(0.05), loss(), clipper=kgc.AbsoluteClip(0.01))
        histories.append(
            model.fit(
                x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, validation_data=validation
            ).history
        )
    for key in ("loss", "grad_norm", "clip_fraction"):
        assert histories[0][key] == histories[1][key]


def test_find_looks_through_the_loss_scale():
    inner = kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), "norm")
    assert find(inner) is inner
    assert find(keras.optimizers.LossScaleOptimizer(inner)) is inner
    assert find(keras.optimizers.SGD(0.1)) is None
    assert find(None) is None
