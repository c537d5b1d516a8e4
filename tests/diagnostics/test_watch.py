"""Watchers: several updates a batch, several watchers at once, and what is put back."""

import random

import keras
import numpy as np
import pytest

import keras_gradclip as kgc
from keras_gradclip.diagnostics.sampler import Sampler

tf = pytest.importorskip("tensorflow")

UPDATES = 6
X, Y = np.ones((8, 4), "float32"), np.ones((8, 1), "float32")


class Sixfold(keras.Model):
    """Six updates a batch, each with a gradient ten times the last."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, use_bias=False)
        self.calls = 0

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        self.calls += 1
        variable = self.trainable_variables[0]
        for power in range(UPDATES):
            self.optimizer.apply([tf.ones_like(variable) * 10.0**power], [variable])
        return {"loss": tf.zeros(())}


def sixfold(**kwargs):
    keras.utils.set_random_seed(0)
    model = Sixfold()
    model(X)
    model.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(1e-9)), **kwargs)
    return model


def test_calibrate_sees_every_update_of_a_batch():
    found = kgc.calibrate(sixfold(), (X, Y), steps=12, batch_size=4, percentile=50)
    norms = found.samples["global"]
    np.testing.assert_allclose(norms, [2 * 10.0**p for p in range(UPDATES)] * 2, rtol=1e-5)


def test_monitor_samples_by_updates_whatever_a_batch_is():
    monitor = kgc.ClipMonitor(every=5)
    sixfold().fit(X, Y, batch_size=1, epochs=2, verbose=0, callbacks=[monitor])
    # 96 updates; the first of the second epoch, 48, is always measured.
    assert monitor.history["step"] == sorted({*range(0, 96, 5), 48})


def stacked(model_class=kgc.ClippedModel):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = model_class(inputs, keras.layers.Dense(1)(keras.layers.Dense(3)(inputs)))
    model.compile(kgc.ClippedOptimizer("sgd", kgc.NormClip(0.5)), "mse")
    return model


def test_two_monitors_see_the_same():
    monitors = [kgc.ClipMonitor(every=1), kgc.ClipMonitor(every=2)]
    model = stacked()
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=monitors)
    one, two = (m.history["norm_before"] for m in monitors)
    np.testing.assert_array_equal(np.array(one)[::2], np.array(two))
    assert not model.optimizer.watchers


def test_a_monitor_inside_calibrate():
    monitor = kgc.ClipMonitor(every=1)
    found = kgc.calibrate(stacked(), (X, Y), steps=4, batch_size=2, callbacks=[monitor])
    watched = [np.linalg.norm(row) for row in monitor.history["norm_before"]]
    np.testing.assert_allclose(found.samples["global"], watched[:4], rtol=1e-5)


def test_calibrate_puts_back_a_second_optimizer_and_attributes():
    model = sixfold(run_eagerly=True)
    second = keras.optimizers.Adam()
    model.second = second
    second.build(model.trainable_variables)
    first_step = type(model).train_step

    def train_step(data):
        second.apply([tf.ones_like(v) for v in model.trainable_variables])
        random.random()
        return first_step(model, data)

    object.__setattr__(model, "train_step", train_step)
    before = [np.array(v) for v in (*second.variables, *model.variables)]
    state = random.getstate()
    kgc.calibrate(model, (X, Y), steps=12, batch_size=4)
    for value, variable in zip(before, (*second.variables, *model.variables), strict=True):
        np.testing.assert_array_equal(value, np.array(variable))
    assert model.calls == 0 and random.getstate() == state


class _Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("model_class", [kgc.ClippedModel, keras.Model])
def test_an_interrupted_fit_leaves_no_monitor(model_class):
    model, monitor = stacked(model_class), kgc.ClipMonitor(every=1)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0, callbacks=[monitor, _Interrupt()])
    if model_class is keras.Model:
        monitor.detach()
    model.fit(X, Y, verbose=0)
    assert not model.optimizer.watchers


@pytest.mark.parametrize("model_class", [kgc.ClippedModel, keras.Model])
def test_fit_calls_a_watcher_added_before(model_class):
    model = stacked(model_class)
    model.optimizer.build(model.trainable_variables)
    sampler = Sampler("toy", model.optimizer, {"norm": lambda v: v.norm_before}, batches=9)
    model.optimizer.watch(sampler)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0, callbacks=[_Interrupt()])
    assert model.optimizer.watchers == (sampler,)
    model.fit(X, Y, batch_size=len(X), verbose=0)
    assert len(sampler.fetch()) == 2


def test_updates_beyond_the_buffer_are_warned_of():
    model = sixfold()
    model.optimizer.build(model.trainable_variables)
    sampler = Sampler("toy", model.optimizer, {"norm": lambda v: v.norm_before}, batches=1)
    model.optimizer.watch(sampler)
    model.fit(X, Y, batch_size=2, verbose=0)
    with pytest.warns(UserWarning, match="toy: 4 of 24 updates .* room for 20"):
        samples = sampler.fetch()
    assert [sample.step for sample in samples] == list(range(4, 24))
    norms = [sample.figures["norm"].item() for sample in samples]
    np.testing.assert_allclose(norms, ([2 * 10.0**p for p in range(UPDATES)] * 4)[4:], rtol=1e-5)
    assert sampler.fetch() == []


LONG = 2**24 + 6  # no float32 has its successor


class _After(keras.callbacks.Callback):
    """Sets the counters of a watcher as after a long run."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:  # the watchers are built
            optimizer = self.model.optimizer
            watchers = [*optimizer.watchers, optimizer._telemetry]
            [counts] = [v for w in watchers for v in w.state if v.name == self.name]
            counts.assign(counts + np.full(counts.shape, LONG))


def test_shares_of_skipped_updates_after_a_long_run():
    """Two of four updates are not finite; 2^24 went before, as many of them not finite."""
    x = X.copy()
    x[4:] = np.nan
    model = stacked()
    inner = kgc.ClippedOptimizer("sgd", kgc.NormClip(0.5), skip_nonfinite=True)
    model.compile(inner, "mse")
    monitor = kgc.ClipMonitor(every=100)
    after = _After("sampler_counts")
    model.fit(x, Y, batch_size=2, shuffle=False, verbose=0, callbacks=[monitor, after])
    last = monitor.history["nonfinite"][-1]
    np.testing.assert_allclose(last, (LONG + 2) / (LONG + 3), rtol=1e-9)


def test_telemetry_after_a_long_run():
    model = stacked()
    after = _After("telemetry_counts")
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[after])
    figures = model.optimizer.read_telemetry()
    assert (figures["updates"], figures["skipped"]) == (LONG + 4, LONG)
    assert 0 < figures["grad_norm"] < 1e3
