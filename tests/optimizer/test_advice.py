"""`clipper="auto"`, and the warning of a clip in front of Muon."""

import contextlib
import re
import warnings

import keras
import numpy as np
import pytest
from helpers import data, loss, needs_muon, net, strategy

import keras_gradclip as kgc
from keras_gradclip.__main__ import main

SUGGESTED = kgc.UpdateRatioClip(anneal="learning_rate")
LARGER = kgc.UpdateRatioClip(5e-3)
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
    want = kgc.UpdateRatioClip(ratio, anneal=anneal)
    assert optimizer.clipper == want


L = keras.layers


class NormFreeNet(keras.Model):
    """Named after what it does not have; its name is in every path."""

    def __init__(self):
        super().__init__()
        self.body, self.head = L.Dense(8), L.Dense(1)

    def call(self, x):
        return self.head(self.body(x))


class MyLayerNorm(L.Layer):
    """Somebody's own normalisation, without a variable."""

    def call(self, x):
        return x / (1e-3 + keras.ops.std(x, axis=-1, keepdims=True))


class Abnormality(L.Layer):
    """A score of something."""

    def call(self, x):
        return x


def stack(*layers, name=None):
    return keras.Sequential([keras.Input((8,)), L.Dense(4), *layers, L.Dense(1)], name=name)


def frozen_below(layer):
    base = keras.Sequential([keras.Input((8,)), L.Dense(4), layer])
    base.trainable = False
    return keras.Sequential([base, L.Dense(1)])


def norm_free():
    model = NormFreeNet()
    model(np.zeros((1, 8), "float32"))
    return model


@pytest.mark.parametrize(
    "make, is_normalised",
    [
        (stack, False),
        (norm_free, False),
        (lambda: stack(name="abnormality"), False),
        (lambda: stack(L.Dense(3, name="normal"), Abnormality()), False),
        (lambda: stack(L.Normalization(mean=0.0, variance=1.0)), False),  # of the inputs' scale
        (lambda: stack(L.BatchNormalization()), True),
        (lambda: stack(L.BatchNormalization(scale=False, name="bn1")), True),
        (lambda: stack(L.BatchNormalization(scale=False, center=False, name="b")), True),
        (lambda: stack(L.GroupNormalization(2, name="g")), True),
        (lambda: stack(L.UnitNormalization(name="u")), True),
        (lambda: stack(MyLayerNorm(name="x")), True),
        (lambda: frozen_below(L.BatchNormalization(name="b")), True),
        (lambda: frozen_below(L.Dense(3)), False),
    ],
)
def test_auto_goes_by_the_layers_of_the_whole_model(make, is_normalised):
    model = make()
    optimizer = kgc.ClippedOptimizer("sgd", "auto")
    optimizer.build(model.trainable_variables)
    assert optimizer.clipper == (GUARD if is_normalised else LARGER)


def test_auto_bounds_no_tables_and_nothing_that_begins_near_zero():
    word = keras.Input((), dtype="int32")
    h = L.Dense(4, name="body")(L.Embedding(7, 3, name="norm")(word))
    h = L.Dense(4, name="small", kernel_initializer=keras.initializers.RandomNormal(0.0, 1e-3))(h)
    model = keras.Model(word, L.Dense(2, name="head", kernel_initializer="zeros")(h))
    optimizer = kgc.ClippedOptimizer("sgd", "auto")
    optimizer.build(model.trainable_variables)
    rules = [c for _, c in optimizer.clipper.rule_of(model.trainable_variables)]
    bound = kgc.UpdateRatioClip(5e-3)
    # embeddings; kernel and bias of body, of small, of head
    assert rules == [GUARD, bound, bound, GUARD, GUARD, GUARD, GUARD]
    biases = [v for v in model.trainable_variables if v.name == "bias"]
    for part in (model.layers[1].trainable_variables, biases):
        optimizer = kgc.ClippedOptimizer("sgd", "auto")
        optimizer.build(part)  # with nothing that it would bound, and no warning of it
        assert optimizer.clipper == GUARD


@pytest.mark.parametrize("replicas", [0, 2])
def test_auto_says_once_what_it_chose_and_why(replicas, caplog):
    with contextlib.nullcontext() if not replicas else strategy(replicas).scope():
        model = normalised()
        optimizer = kgc.ClippedOptimizer("sgd", "auto")
        assert repr(optimizer) == "<ClippedOptimizer of SGD, 'auto'>"
        model.compile(optimizer, loss())
    for _ in range(2):
        model.fit(*data(16), batch_size=8, verbose=0)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "keras_gradclip"]
    assert said.startswith(f"clipper='auto': {GUARD}, because the model has normalisation (Batch")
    assert repr(optimizer) == f"<ClippedOptimizer of SGD, {GUARD}>"


def pictures():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 192)
    x = rng.normal(size=(4, 8, 8, 3))[y] + 3 * rng.normal(size=(192, 8, 8, 3))
    wrong = rng.random(192) < 0.15  # so that the loss does not fall to 0, where ratios say nothing
    return x.astype("float32"), np.where(wrong, rng.integers(0, 4, 192), y)


def convolutional(last="glorot_uniform"):
    inputs = h = keras.Input((8, 8, 3))
    for filters in (8, 8):
        h = L.Conv2D(filters, 3, strides=2, activation="relu")(h)
    outputs = L.Dense(4, kernel_initializer=last)(L.GlobalAveragePooling2D()(h))
    return keras.Model(inputs, outputs), *pictures(), 10


def transformer():
    inputs = keras.Input((8, 8, 3))
    h = L.Reshape((16, 8))(L.Conv2D(8, 2, strides=2)(inputs))
    z = L.LayerNormalization()(h)
    h = L.Add()([h, L.MultiHeadAttention(2, 4)(z, z)])
    h = L.Add()([h, L.Dense(8)(L.Dense(16, "gelu")(L.LayerNormalization()(h)))])
    return keras.Model(inputs, L.Dense(4)(L.GlobalAveragePooling1D()(h))), *pictures(), 10


def sums():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(192, 8, 3)).astype("float32")
    inputs = keras.Input((8, 3))
    y = np.cumsum(x, 1)[:, -1, :1] + rng.normal(size=(192, 1))
    return keras.Model(inputs, L.Dense(1)(L.GRU(12)(inputs))), x, y, 20


def ratings():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(40, 4)), rng.normal(size=(30, 4))
    u, i = rng.integers(0, 40, 800), rng.integers(0, 30, 800)
    y = (users[u] * items[i]).sum(1) + 3.5
    a, b = (keras.Input((), dtype="int32") for _ in range(2))
    dot = L.Dot(1)([L.Embedding(40, 4)(a), L.Embedding(30, 4)(b)])
    h = L.Add()([dot, L.Embedding(40, 1)(a), L.Embedding(30, 1)(b)])
    return keras.Model([a, b], h), [u, i], y, 15


def far_targets(*hidden):
    """A regression whose targets are further away than the initial weights are long."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(192, 4)).astype("float32")
    y = x @ [[1.0], [2.0], [3.0], [4.0]] + 30 + rng.normal(size=(192, 1))
    layers = [L.Dense(units, "relu") for units in hidden]
    return keras.Sequential([keras.Input((4,)), *layers, L.Dense(1)]), x, y, 20


def adapted(is_normalised):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(192, 6)).astype("float32")
    before, after = (f @ rng.normal(size=(6, 1)) for f in (np.tanh(x), np.sin(2 * x)))
    inputs = keras.Input((6,))
    h = L.Dense(24, "gelu")(inputs)
    h = L.LayerNormalization()(h) if is_normalised else h
    model = keras.Model(inputs, L.Dense(1)(L.Dense(24, "gelu")(h)))
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    model.fit(x, before, epochs=10, verbose=0)
    for layer in model.layers:
        layer.trainable = False
        if isinstance(layer, L.Dense):
            layer.trainable = True
            layer.enable_lora(4)
    return model, x, after, 15


TASKS = {
    "convolutions": (convolutional, keras.optimizers.Adam, 3e-3),
    "a head of zeros": (lambda: convolutional("zeros"), keras.optimizers.Adam, 3e-3),
    "transformer": (transformer, keras.optimizers.Adam, 3e-3),
    "recurrent": (sums, keras.optimizers.Adam, 3e-3),
    "linear regression": (far_targets, keras.optimizers.SGD, 1e-2),
    "regression": (lambda: far_targets(16), keras.optimizers.SGD, 1e-2),
    "regression with Adam": (lambda: far_targets(16), keras.optimizers.Adam, 1e-1),
    "recommender": (ratings, keras.optimizers.Adam, 1e-2),
    "LoRA": (lambda: adapted(False), keras.optimizers.Adam, 3e-3),
    "LoRA, normalised": (lambda: adapted(True), keras.optimizers.Adam, 3e-3),
}


#: One of each way in which a bound could cost; the others are of the same kinds.
QUICK = ("a head of zeros", "transformer", "linear regression", "LoRA, normalised")


@pytest.mark.parametrize(
    "task", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TASKS]
)
def test_auto_costs_little_at_a_rate_that_is_safe(task):
    make, optimizer, rate = TASKS[task]
    losses = {}
    for clipper in ("auto", None):
        keras.utils.set_random_seed(0)
        model, x, y, epochs = make()
        is_one_of_several = model.output_shape[-1] == 4
        model.compile(
            kgc.ClippedOptimizer(optimizer(rate), clipper), loss() if is_one_of_several else "mse"
        )
        history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0).history["loss"]
        losses[clipper] = history[-1]
    assert history[-1] < 0.85 * history[0], "the task must be one that is learned"
    assert losses["auto"] < 2 * losses[None]


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


@pytest.mark.parametrize(
    "losses, is_bounded",
    [
        ("categorical_crossentropy", True),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), True),
        ([keras.losses.Hinge(), "kl_divergence"], True),
        (None, True),  # a custom training loop
        ("mse", False),
        ({"a": keras.losses.BinaryCrossentropy(), "b": keras.losses.Huber()}, False),
        (lambda y, x: x, False),
    ],
)
def test_auto_bounds_updates_by_weights_where_outputs_have_their_scale(losses, is_bounded):
    inputs = keras.Input((2,))
    h = L.Dense(4)(inputs)
    model = keras.Model(inputs, {"a": L.Dense(3)(h), "b": L.Dense(3)(h)})
    optimizer = kgc.ClippedOptimizer("sgd", "auto")
    model.compile(optimizer, losses)
    optimizer.build(model.trainable_variables)
    assert isinstance(optimizer.clipper, kgc.UpdateRatioClip) == is_bounded


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="built before the first call")
@pytest.mark.parametrize("loss, is_bounded", [(None, False), ("categorical_crossentropy", True)])
def test_a_loss_that_a_layer_adds_is_one_of_its_own(loss, is_bounded):
    class Reconstruction(L.Layer):
        def call(self, x, y):
            self.add_loss(keras.ops.mean(keras.ops.square(x - y)))
            return y

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Reconstruction()(inputs, L.Dense(3)(inputs)))
    model.compile(kgc.ClippedOptimizer("sgd", "auto"), loss)
    model.fit(np.ones((4, 3)), None if loss is None else np.ones((4, 3)), verbose=0)
    assert isinstance(model.optimizer.clipper, kgc.UpdateRatioClip) == is_bounded


def test_auto_goes_by_the_loss_that_its_optimizer_is_compiled_with():
    """Not by that of another model of the same layers, in any order."""
    layers = [keras.Input((2,)), L.Dense(4), L.Dense(3)]
    models = [keras.Sequential(layers) for _ in range(4)]
    optimizers = [kgc.ClippedOptimizer("sgd", "auto") for _ in models]
    for i, model in enumerate(models):
        model.compile(optimizers[i], ["mse", "categorical_crossentropy"][i % 2])
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.build(model.trainable_variables)
    kinds = [type(optimizer.clipper) for optimizer in optimizers]
    assert kinds == 2 * [kgc.PercentileClip, kgc.UpdateRatioClip]


def test_a_loss_that_a_custom_loop_keeps_in_the_model_is_its_own():
    model = keras.Sequential([keras.Input((2,)), L.Dense(4), L.Dense(3)])
    model.loss = "wasserstein"
    optimizer = kgc.ClippedOptimizer("sgd", "auto")
    optimizer.build(model.trainable_variables)
    assert isinstance(optimizer.clipper, kgc.UpdateRatioClip)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a train step of TensorFlow")
@pytest.mark.parametrize("is_built", [True, False])
def test_auto_guards_what_a_custom_train_step_creates(is_built):
    """Weights that a traced step creates have no values yet."""
    import tensorflow as tf

    class Lazy(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = L.Dense(3)

        def train_step(self, x):
            with tf.GradientTape() as tape:
                value = tf.reduce_mean(tf.square(self.head(x)))
            weights = self.trainable_weights
            self.optimizer.apply_gradients(zip(tape.gradient(value, weights), weights, strict=True))
            return {"loss": value}

    model, optimizer = Lazy(), kgc.ClippedOptimizer("sgd", "auto")
    model.compile(optimizer)
    if is_built:
        model.head.build((None, 2))
    model.fit(np.ones((4, 2), "float32"), verbose=0)
    assert isinstance(optimizer.clipper, kgc.UpdateRatioClip) == is_built


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="variables of TensorFlow")
def test_auto_for_variables_of_tensorflow():
    import tensorflow as tf

    kernel, bias = tf.Variable(tf.ones((6, 2)), name="w"), tf.Variable(tf.zeros(2), name="bias")
    optimizer = kgc.ClippedOptimizer("sgd", "auto")
    optimizer.apply([tf.ones((6, 2)), tf.ones(2)], [kernel, bias])
    assert isinstance(optimizer.clipper.default, kgc.UpdateRatioClip)
