"""`ClipMonitor` and `calibrate` with several optimizers, some not the model's, or built late."""

import csv

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradclip as kgc

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
Y = 3 * X.sum(1, keepdims=True)
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}
with_several = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras 3.15 brought MultiOptimizer"
)


def stacked(optimizer, model_class=keras.Model, **compile_args):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    h = layers.Dense(3, name="one", activation="tanh")(inputs)
    model = model_class(inputs, layers.Dense(1, name="two")(h))
    model.compile(optimizer, "mse", **compile_args)
    return model


def clipped(inner, max_norm=0.5, **arguments):
    return kgc.ClippedOptimizer(inner, max_norm and kgc.NormClip(max_norm), **arguments)


def several(kind="map"):
    """An optimizer for layer "one" and one for "two"; a third has no variables."""
    first, second = clipped(keras.optimizers.SGD(0.01), 0.5), clipped("adam", 2.0)
    if kind != "function":
        rules = {"one/.*": first, "nothing/.*": clipped("rmsprop")}
        how = keras.optimizers.OptimizerMap(second, rules)
    else:
        how = lambda variable: first if variable.path.startswith("one/") else second  # noqa: E731
    outer = keras.optimizers.MultiOptimizer(how)
    return keras.optimizers.LossScaleOptimizer(outer) if kind == "scaled" else outer


def alone(part):
    """A part of the figures of the same run with a single optimizer."""
    monitor = kgc.ClipMonitor(every=1)
    stacked(clipped(keras.optimizers.SGD(0.01))).fit(X, Y, callbacks=[monitor], **FIT)
    return np.array([row[part] for row in monitor.history["norm_before"]])


@with_several
@pytest.mark.parametrize("kind", ["map", "function", "scaled"])
def test_a_monitor_of_several_optimizers(kind, tmp_path):
    monitor = kgc.ClipMonitor(tmp_path, every=2)
    history = stacked(several(kind)).fit(X, Y, epochs=2, callbacks=[monitor], **FIT).history
    assert sorted(monitor.variables) == ["one/bias", "one/kernel", "two/bias", "two/kernel"]
    assert monitor.history["step"] == [0, 2, 4, 6, 8, 10]
    norms = np.array(monitor.history["norm_before"])
    assert np.isfinite(norms).all()
    first = [i for i, name in enumerate(monitor.variables) if name.startswith("one/")]
    np.testing.assert_allclose(norms[0][first], alone(slice(2))[0], rtol=1e-4)
    after = np.linalg.norm(np.array(monitor.history["norm_after"])[:, first], axis=1)
    assert after.max() == pytest.approx(0.5, rel=1e-3)
    whole = np.linalg.norm(norms, axis=1)
    assert history["grad_norm"][0] == pytest.approx(whole[:3].mean(), rel=1e-4)
    names = [name.rpartition("/") for name in monitor.history["thresholds"][0]]
    assert sorted(name[:3] for name, _, _ in names) == ["ada", "sgd"]
    assert {tail for _, _, tail in names} == {"max_norm"}


@with_several
def test_calibrate_of_several_optimizers():
    model = stacked(several())
    before = model.get_weights()
    found = kgc.calibrate(model, (X, Y), steps=6, batch_size=8)
    by_layer = {tuple(one.layers): label for label, one in found.items()}
    assert by_layer[("one",)].startswith("sgd") and by_layer[("two",)].startswith("adam")
    for label, one in found.items():
        assert one.updates == 6 and label in str(found)
        one.clip_map("norm")
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@with_several
def test_a_report_says_which_optimizer_has_which_layer(tmp_path):
    pytest.importorskip("matplotlib")
    model = stacked(several())
    model.fit(X, Y, callbacks=[kgc.ClipMonitor(tmp_path, every=1)], **FIT)
    page = kgc.report(tmp_path).read_text(encoding="utf-8")
    assert "NormClip(max_norm=0.5" in page and "NormClip(max_norm=2" in page
    assert page.count("sgd") >= 3 and page.count("adam") >= 3


class Late(keras.Model):
    """Built by `fit`."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize(
    ("bases", "eager"),
    [
        ((), True),
        ((kgc.ClippedTrainStep,), False),
        pytest.param((), False, marks=pytest.mark.slow),
        pytest.param((kgc.ClippedTrainStep,), True, marks=pytest.mark.slow),
    ],
)
def test_a_model_that_fit_builds(eager, bases, tmp_path):
    if eager and BACKEND == "jax":
        pytest.skip("eager steps on JAX are another matter")

    class Mine(*bases, Late):
        pass

    def run(folder):
        keras.utils.set_random_seed(1)
        model, monitor = Mine(), kgc.ClipMonitor(folder, every=1)
        model.compile(clipped("sgd", skip_nonfinite=True), "mse", run_eagerly=eager)
        history = model.fit(X, Y, epochs=2, callbacks=[monitor], **FIT).history
        assert not model.optimizer.watchers
        return monitor, history

    monitor, history = run(tmp_path)
    assert monitor.history["step"] == list(range(12))
    assert np.isfinite(monitor.history["norm_before"]).all()
    assert len(history["grad_norm_after"]) == 2 and np.isfinite(history["grad_norm_after"]).all()
    keras.utils.set_random_seed(1)
    built, same = Mine(), kgc.ClipMonitor(every=1)
    built.compile(clipped("sgd", skip_nonfinite=True), "mse", run_eagerly=eager)
    built(X[:1])
    built.fit(X, Y, epochs=2, callbacks=[same], **FIT)
    np.testing.assert_allclose(
        monitor.history["norm_before"], same.history["norm_before"], rtol=1e-5
    )
    run(tmp_path)  # a fresh run begins anew
    with (tmp_path / "monitor.csv").open(newline="", encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [step for step in range(12) for _ in monitor.variables]


class Pair(keras.Model):
    """Two networks with an optimizer each, as a GAN has; the second trains every other batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(1), layers.Dense(1)
        self.batches = 0

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)
        self.built = True

    def call(self, x):
        return self.first(x)

    def compile(self, optimizers):
        super().compile()
        self.optimizers = list(optimizers)

    def train_step(self, data):
        x, _ = data
        self.batches += 1
        pairs = zip((self.first, self.second), self.optimizers, strict=True)
        for layer, optimizer in list(pairs)[: 1 + self.batches % 2]:
            gradients = [ops.ones_like(v) for v in layer.trainable_variables]
            optimizer.apply(gradients, layer.trainable_variables)
        return {"loss": ops.mean(x)}


@pytest.mark.skipif(BACKEND == "jax", reason="Keras trains one optimizer on JAX")
@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_the_optimizers_that_are_named(is_built, eager):
    optimizers = [clipped("sgd", 0.5), clipped("adam", None)]
    model = Pair()
    model.compile(optimizers)
    model.run_eagerly = eager
    model.build((None, 4))
    if is_built:
        for layer, optimizer in zip((model.first, model.second), optimizers, strict=True):
            optimizer.build(layer.trainable_variables)
    one, both = (
        kgc.ClipMonitor(every=1, optimizer=optimizers[0]),
        kgc.ClipMonitor(every=1, optimizer=optimizers),
    )
    if not eager:  # one trace of the step, in which both train
        model.batches = 0
    model.fit(X, Y, callbacks=[one, both], **FIT)
    assert len(one.variables) == 2 and one.history["step"] == list(range(6))
    np.testing.assert_allclose(np.linalg.norm(one.history["norm_after"][0]), 0.5, rtol=1e-4)
    assert both.variables[:2] == one.variables and len(both.variables) == 4
    counts = np.isfinite(both.history["norm_before"]).sum(axis=0)
    np.testing.assert_array_equal(counts, [6, 6] + 2 * [3 if eager or BACKEND == "torch" else 6])


@pytest.mark.skipif(BACKEND == "jax", reason="Keras trains one optimizer on JAX")
def test_calibrate_takes_the_optimizers_that_are_named():
    optimizers = [clipped("sgd", 0.5), clipped("adam", None)]
    model = Pair()
    model.compile(optimizers)
    model.build((None, 4))
    with pytest.raises(ValueError, match=r"`optimizer` is not built.*build\(variables\)"):
        kgc.calibrate(model, (X, Y), optimizer=optimizers)
    for layer, optimizer in zip((model.first, model.second), optimizers, strict=True):
        optimizer.build(layer.trainable_variables)
    before = [ops.convert_to_numpy(v) for o in optimizers for v in (*model.weights, *o.variables)]
    found = kgc.calibrate(model, (X, Y), steps=4, batch_size=8, optimizer=optimizers)
    assert [one.updates for one in found.values()] == [4, 4]
    one = kgc.calibrate(model, (X, Y), steps=4, batch_size=8, optimizer=optimizers[1])
    assert one.global_norm == pytest.approx(np.sqrt(5), rel=1e-5)
    after = [ops.convert_to_numpy(v) for o in optimizers for v in (*model.weights, *o.variables)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "use, words",
    [
        (lambda m: kgc.ClipMonitor(100), r"`run_dir` .* is 100\. Write ClipMonitor\(every=100\)"),
        (lambda m: m.fit(X, Y, callbacks=[kgc.ClipMonitor], **FIT), r"\[ClipMonitor\(\)\]"),
        (lambda m: kgc.calibrate(m, X, Y), r"type ndarray.*calibrate\(model, \(x, y\)\)"),
        (
            lambda m: m.fit(X, Y, callbacks=[kgc.ClipMonitor(optimizer="sgd")], **FIT),
            "`optimizer` is 'sgd', which does not clip",
        ),
        (
            lambda m: stacked("sgd").fit(X, Y, callbacks=[kgc.ClipMonitor()], **FIT),
            r"which does not clip.*ClipMonitor\(\.\.\., optimizer=",
        ),
        (lambda m: kgc.calibrate(stacked("sgd"), (X, Y)), r"which does not clip.*calibrate\("),
    ],
)
def test_misuse_is_named(use, words):
    with pytest.raises(ValueError, match=words):
        use(stacked(clipped("sgd")))
