"""The first step is traced only once: all variables are created before its trace."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import CLASSES, data, strategy, weights

import keras_gradclip as kgc

tf = pytest.importorskip("tensorflow")

LOSS = "sparse_categorical_crossentropy"
X, Y = data(32)


def counting(base):
    """A subclass of a model class, and a list with an entry for each trace of its train step."""
    traces = []

    class Counting(base):
        def train_step(self, batch):
            traces.append(batch)
            return super().train_step(batch)

    return Counting, traces


def with_heads(cls, count):
    inputs = keras.Input(X.shape[1:])
    hidden = keras.layers.Flatten()(inputs)
    outputs = [keras.layers.Dense(CLASSES, "softmax")(hidden) for _ in range(count)]
    return cls(inputs, outputs[0] if count == 1 else outputs)


def count_traces(base, optimizer, heads=1, **arguments):
    """The number of traces of the first step of a network with several outputs."""
    cls, traces = counting(base)
    model = with_heads(cls, heads)
    model.compile(optimizer, LOSS, **arguments)
    history = model.fit(X, Y if heads == 1 else [Y] * heads, batch_size=16, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    return len(traces)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_clipped_model_is_traced_once(jit_compile, heads):
    arguments = {
        "clipper": "auto",
        "metrics": ["accuracy"] if heads == 1 else [["accuracy"]] * heads,
        "jit_compile": jit_compile,
    }
    assert count_traces(kgc.ClippedModel, "adam", heads, **arguments) == 1


@pytest.mark.parametrize("base", [kgc.ClippedModel, keras.Model])
def test_a_dynamic_loss_scale_is_no_constant(base):
    # `LossScaleOptimizer.scale_loss` multiplies by a constant where it is not built.
    keras.config.set_dtype_policy("mixed_float16")
    cls, traced = counting(base)
    model = with_heads(cls, 1)
    model.compile(kgc.ClippedOptimizer("adam", "absolute"), LOSS, jit_compile=False)
    model.fit(X, Y, batch_size=16, verbose=0)
    # A custom step that may be skipped is traced for what it builds: that is put back, too.
    traces = len(traced)
    assert traces == (2 if base is kgc.ClippedModel else 1)
    model.optimizer.dynamic_scale.assign(2.0**100)  # more than float16 has
    before = weights(model)
    model.fit(X, Y, batch_size=16, verbose=0)
    np.testing.assert_array_equal(weights(model), before)
    assert model.optimizer.dynamic_scale.numpy() == 2.0**98  # halved after each of two steps
    assert len(traced) == traces


def test_a_loss_scale_is_made_as_keras_makes_it():
    variable = keras.Variable(np.ones(2, "float32"))

    def own(optimizer):
        count = len(optimizer.variables) - len(optimizer.inner_optimizer.variables)
        return [
            (v.name, v.dtype, v.shape, v.aggregation, v.trainable, float(v.numpy()))
            for v in optimizer.variables[:count]
        ]

    stock = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), 64.0, 5)
    stock.build([variable])
    ours = keras.optimizers.LossScaleOptimizer(kgc.ClippedOptimizer("sgd", "absolute"), 64.0, 5)
    assert tf.function(lambda: ours.scale_loss(tf.ones(())))().numpy() == 64.0
    assert not ours.built
    ours.apply([tf.zeros(2)], [variable])
    ours.step_counter.assign(0)
    assert own(ours) == own(stock), (
        "Keras's LossScaleOptimizer.build makes other variables now: `_make_scale` has to follow"
    )
    assert ours.built and ours.inner_optimizer.built


class Unfreeze(keras.callbacks.Callback):
    """Chooses the trained layers after Keras has made the train function."""

    def on_train_begin(self, logs=None):
        self.model.trainable = True


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_what_is_trained_is_known_at_the_first_step_alone(policy):
    keras.config.set_dtype_policy(policy)
    frozen = with_heads(kgc.ClippedModel, 1)
    frozen.trainable = False
    before = weights(frozen)
    frozen.compile("sgd", LOSS, clipper="norm", jit_compile=False)
    frozen.fit(X, Y, batch_size=16, verbose=0, callbacks=[Unfreeze()])
    assert (weights(frozen) != before).any()


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_step_may_train_a_variable_that_is_none_of_the_models(policy):
    keras.config.set_dtype_policy(policy)
    bias = keras.Variable(np.zeros(X.shape[1:]), name="bias")

    class Biased(kgc.ClippedModel):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x + bias))
                scaled = self.optimizer.scale_loss(loss)
            trained = [*self.trainable_variables, bias]
            self.optimizer.apply(tape.gradient(scaled, [v.value for v in trained]), trained)
            return {"loss": loss}

    model = with_heads(Biased, 1)
    model.compile("sgd", LOSS, clipper="norm", jit_compile=False)
    model.fit(X, Y, batch_size=16, verbose=0)
    assert np.array(bias).any()


def test_any_model_is_traced_once_around_a_clipped_optimizer():
    assert count_traces(keras.Model, "adam", jit_compile=False) == 2, (
        "Keras traces a first step once by itself now: `outside_of_traces` may go"
    )
    clipped = kgc.ClippedOptimizer("adam", "absolute")
    assert count_traces(keras.Model, clipped, jit_compile=False) == 1


def test_a_custom_loop_is_traced_once():
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0, momentum=0.5), kgc.AbsoluteClip(0.1))
    variable = tf.Variable([1.0, 1.0])
    traces = []

    @tf.function
    def step():
        traces.append(1)
        optimizer.apply([tf.constant([1.0, -0.05])], [variable])

    step()
    step()
    assert len(traces) == 1
    np.testing.assert_allclose(variable.numpy(), [1 - 0.1 - 0.15, 1 + 0.05 + 0.075], rtol=1e-6)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_custom_loop_has_nothing_to_warn_of(skip_nonfinite, caplog):
    optimizer = kgc.ClippedOptimizer("sgd", "absolute", skip_nonfinite=skip_nonfinite)
    variable = tf.Variable([1.0, 1.0])

    @tf.function  # with AutoGraph, as in most loops
    def step():
        optimizer.apply([tf.constant([1.0, -0.05])], [variable])

    with caplog.at_level("WARNING", "tensorflow"):
        step()
    assert "AutoGraph" not in caplog.text


class Unbuilt(keras.Model):
    """Creates its variables in its first call, which is traced."""

    def __init__(self):
        super().__init__()
        self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(CLASSES, "softmax")

    def call(self, x):
        return self.dense(self.flatten(x))


class UnbuiltClipped(kgc.ClippedTrainStep, Unbuilt):
    pass


# The last one's state begins as a copy of the weights.
INNER = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Nadam": lambda: keras.optimizers.Nadam(0.01),
    "averaged": lambda: keras.optimizers.Adam(0.01, use_ema=True),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
}


@pytest.mark.parametrize(
    ("replicas", "built", "inner"),
    [
        *((None, "in the fit", inner) for inner in ("Nadam", "ScheduleFreeAdamW")),
        *(
            pytest.param(None, "in the fit", inner, marks=pytest.mark.slow)
            for inner in ("SGD", "averaged")
        ),
        (None, "before the fit", "ScheduleFreeAdamW"),
        pytest.param(2, "in the fit", "ScheduleFreeAdamW", marks=pytest.mark.slow),
    ],
)
def test_where_the_state_is_made_changes_nothing(replicas, built, inner):
    if not hasattr(keras.optimizers, inner) and inner != "averaged":
        pytest.skip("this Keras does not have it")
    scope = strategy(replicas)

    def trained(model_first, optimizer_first):
        keras.utils.set_random_seed(1)
        with scope.scope() if scope else contextlib.nullcontext():
            model = UnbuiltClipped()
            if model_first:
                model(X[:1])
            optimizer = kgc.ClippedOptimizer(INNER[inner](), "norm", skip_spikes=6, telemetry=True)
            model.compile(optimizer, LOSS, metrics=["accuracy"], jit_compile=False)
            if optimizer_first:
                optimizer.build(model.trainable_variables)
        history = model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        return weights(model), history

    ours, history = trained(built == "before the fit", False)
    expected, expected_history = trained(True, True)
    np.testing.assert_array_equal(ours, expected)
    assert history == expected_history
