"""`calibrate` restores all that a training step may change, on every backend."""

import random

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradclip as kgc
from keras_gradclip.diagnostics._put_back import everything_put_back

BACKEND = keras.backend.backend()
ROWS = np.random.default_rng(0).normal(size=(32, 2, 4)).astype("float32")
SUMS = ROWS.sum((1, 2))[:, None]
RECURRENT = {"stateful": True, "return_sequences": True, "unroll": True}
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow alone")
only_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone")


def numpy(value):
    return np.array(ops.convert_to_numpy(value))


class Unseeded(layers.Layer):
    """Draws from Keras's global generator, and counts its calls in three ways."""

    def __init__(self):
        super().__init__()
        self.calls, self.own = 0, {"drawn": [keras.Variable(0.0, trainable=False)]}
        self.generator, self.python = np.random.default_rng(1), random.Random(1)

    def call(self, x):
        self.calls += 1
        self.generator.normal()
        self.python.random()
        if BACKEND == "jax":
            return x
        self.own["drawn"][0].assign_add(1.0)
        return x + keras.random.normal(ops.shape(x))


def optimizers():
    inner = {
        # Keras on JAX fails in the second `fit` with averages.
        "sgd": keras.optimizers.SGD(0.01, momentum=0.9, use_ema=BACKEND != "jax"),
        "nadam": keras.optimizers.Nadam(0.01),
        "adafactor": keras.optimizers.Adafactor(0.01),
    }
    made = {name: kgc.ClippedOptimizer(one, "percentile") for name, one in inner.items()}
    made["spikes"] = kgc.ClippedOptimizer(
        "adam", None, 2, telemetry=True, skip_spikes=6, skip_nonfinite=True
    )
    made["scaled"] = keras.optimizers.LossScaleOptimizer(kgc.ClippedOptimizer("adam", None))
    return made


def parts():
    """Layers with each kind of state, in one model, so that one training covers them all."""
    return {
        "counted, drawn": [
            layers.Dropout(0.3),
            Unseeded(),
            layers.BatchNormalization(),
            layers.LSTM(3, dropout=0.2, return_sequences=True, unroll=True),
        ],
        "stateful": [
            layers.LSTM(3, **RECURRENT),
            layers.Bidirectional(layers.SimpleRNN(3, **RECURRENT)),
            layers.RNN([layers.LSTMCell(2), layers.SimpleRNNCell(3)], **RECURRENT),
        ],
    }


def model_with(*parts, optimizer=None, **compile_args):
    inputs = h = keras.Input((2, 4), batch_size=8)
    for part in parts:
        h = part(h)
    outputs = layers.Dense(1)(layers.Flatten()(h))
    model = keras.Model(inputs, outputs)
    optimizer = kgc.ClippedOptimizer("adam", None) if optimizer is None else optimizer
    model.compile(optimizer, "mse", metrics=["mae"], **compile_args)
    return model


def fit(model):
    history = model.fit(ROWS, SUMS, batch_size=8, verbose=0).history
    return history["loss"], [numpy(w) for w in model.weights]


def run(make, calibrates, **arguments):
    """Losses and weights of a second epoch, with or without `calibrate` before it."""
    keras.utils.set_random_seed(1)
    model = make()
    fit(model)
    if calibrates:
        kgc.calibrate(model, (ROWS, SUMS), steps=5, batch_size=8, **arguments)
    return fit(model)


def check_trains_on_the_same(make, **arguments):
    (losses, weights), (want, want_weights) = (
        run(make, calibrates, **arguments) for calibrates in (True, False)
    )
    assert losses == want
    for a, b in zip(weights, want_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", parts())
@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_trains_on_as_if_it_had_not_been_calibrated(name, eager):
    if BACKEND == "torch" and name == "stateful":
        pytest.skip("Keras cannot train it on PyTorch: a gradient through a state of before")
    if BACKEND == "jax" and eager:
        pytest.skip("eager steps on JAX are another matter")
    check_trains_on_the_same(lambda: model_with(*parts()[name], run_eagerly=eager))


# Without `follow` no optimizer applies anything: one of each way to count is enough.
@pytest.mark.parametrize(
    ("name", "follow"),
    [
        *((name, True) for name in ("nadam", "scaled")),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in optimizers()
            if name not in ("nadam", "scaled")
        ),
        ("spikes", False),
        pytest.param("scaled", False, marks=pytest.mark.slow),
    ],
)
def test_any_optimizer_goes_on(name, follow):
    check_trains_on_the_same(
        lambda: model_with(layers.Dropout(0.1), optimizer=optimizers()[name]), follow=follow
    )


def test_a_models_own_states_are_put_back():
    layer = Unseeded()
    model = model_with(layer)
    fit(model)

    def states():
        return (
            *(layer.calls, layer.generator.bit_generator.state, layer.python.getstate()),
            float(numpy(layer.own["drawn"][0])),
        )

    before = states()
    kgc.calibrate(model, (ROWS, SUMS), steps=5, batch_size=8)
    assert states() == before


def draws():
    """A draw from each generator that `keras.utils.set_random_seed` sets."""
    result = {
        "Python": random.random(),
        "NumPy": np.random.random(),
        "Keras": numpy(keras.random.normal((2,))).tolist(),
    }
    if BACKEND == "tensorflow":
        import tensorflow as tf

        result["an operation"] = tf.random.normal((2,)).numpy().tolist()
        result["the generator"] = tf.random.get_global_generator().normal((2,)).numpy().tolist()
        order = tf.data.Dataset.range(9).shuffle(9)
        result["a data set"] = list(order.as_numpy_iterator())
    if BACKEND == "torch":
        import torch

        result["PyTorch"] = torch.rand(2).tolist()
        order = torch.utils.data.DataLoader(range(9), shuffle=True)
        result["a data loader"] = [int(i) for i in order]
    return result


@pytest.mark.parametrize("drawn", [False, True])
def test_what_set_random_seed_sets_is_put_back(drawn):
    """Also before the first draw, when Keras has no generator yet."""
    model = model_with(layers.Dropout(0.1))

    def prepare():
        keras.utils.set_random_seed(7)
        if BACKEND == "tensorflow":
            import tensorflow as tf

            tf.random.set_global_generator(tf.random.Generator.from_seed(3))
        if drawn:
            draws()

    prepare()
    want = draws()
    prepare()
    with everything_put_back(model, [model.optimizer]):
        draws()
        draws()
    assert draws() == want


@only_torch
def test_buffers_and_generators_of_pytorch_are_put_back():
    import torch

    class Own(layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)  # Keras wraps it and tracks its parameters alone
            self.seen = torch.zeros(())
            self.generator = torch.Generator()

        def call(self, x):
            self.norm(x)
            self.seen += torch.rand((), generator=self.generator)
            return x

    layer = Own()
    model = model_with(layer)
    fit(model)

    def states():
        norm = layer.norm.module
        return (
            *(float(layer.seen), layer.generator.get_state().tolist()),
            *(norm.running_mean.tolist(), int(norm.num_batches_tracked)),
        )

    before = states()
    kgc.calibrate(model, (ROWS, SUMS), steps=5, batch_size=8)
    assert states() == before


@only_tensorflow
def test_each_replica_has_its_own_state_back():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((2, 4), batch_size=4)
        rnn = layers.LSTM(4, stateful=True, unroll=True)
        model = keras.Model(inputs, layers.Dense(1)(rnn(inputs)))
        model.compile(kgc.ClippedOptimizer("adam", None), "mse")
    fit(model)

    def states():
        return [copy.numpy() for v in rnn.states for copy in v.value.values]

    before = states()
    assert (before[0] != before[1]).any(), "two replicas must have seen other rows"
    kgc.calibrate(model, (ROWS, SUMS), steps=5, batch_size=8)
    np.testing.assert_array_equal(states(), before)
