"""A skipped update leaves the model and its metrics as they were without its batches."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from helpers import strategy
from keras import ops

import keras_gradclip as kgc
from keras_gradclip.optimizer.clipped_optimizer import find

BACKEND = keras.backend.backend()
BATCH = 8
x = np.random.default_rng(0).normal(size=(8 * BATCH, 6)).astype("float32")
y = x[:, :1].copy()


class OwnStep(kgc.ClippedModel):
    """A custom train step that trains as Keras does."""

    def train_step(self, *args):
        return super().train_step(*args)


def network(model_class=kgc.ClippedModel):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), batch_size=None)
    h = keras.layers.Dense(8, name="one")(inputs)
    h = keras.layers.BatchNormalization(momentum=0.5, name="norm")(h)
    h = keras.layers.Dropout(0.2, seed=1, name="drop")(keras.layers.Activation("relu")(h))
    outputs = keras.layers.Dense(1, dtype="float32", name="two")(h)
    return model_class(inputs, outputs)


def trained(batches, *, bad=(), steps=None, replicas=0, model_class=kgc.ClippedModel, **arguments):
    """A model trained on these batches, some with one NaN, and its history."""
    data = x.copy()
    for i in bad:
        data[i * BATCH + BATCH - 1] = np.nan  # the last example: of the last replica
    rows = np.concatenate([np.arange(i * BATCH, (i + 1) * BATCH) for i in batches])
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        model = network(model_class)
        optimizer = kgc.ClippedOptimizer(
            keras.optimizers.SGD(0.01, momentum=0.9),
            kgc.NormClip(1.0),
            skip_nonfinite=True,
            gradient_accumulation_steps=steps,
        )
        model.compile(optimizer, "mse", metrics=["mae"], **arguments)
    history = model.fit(data[rows], y[rows], batch_size=BATCH, shuffle=False, verbose=0)
    return model, history.history


def variables_of(model):
    """Every copy of every variable: the names of random states count models."""
    return [
        [np.array(c) for c in v.value.values]
        if BACKEND == "tensorflow" and hasattr(v.value, "values")
        else [np.array(ops.convert_to_numpy(v))]
        for v in model.variables
    ]


def assert_equal(got, want, rtol=1e-5, atol=1e-6):
    (model, history), (other, other_history) = got, want
    triples = zip(model.variables, variables_of(model), variables_of(other), strict=True)
    for variable, ours, theirs in triples:
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=variable.path)
    for name in ("loss", "mae"):
        np.testing.assert_allclose(history[name], other_history[name], rtol=rtol, err_msg=name)


CASES = {
    "plain": {},
    "eager": {"run_eagerly": True},
    "own step": {"model_class": OwnStep},
}
if BACKEND == "tensorflow":
    CASES |= {
        "two replicas": {"replicas": 2},
        "two replicas, eager": {"replicas": 2, "run_eagerly": True},
        "several steps": {"steps_per_execution": 2},
    }
if BACKEND != "torch":
    CASES["jit"] = {"jit_compile": True}


#: The first, the last and one in between; the second of the first window, the first of the third.
SKIPS = [([0, 3, 7], None), ([1, 4], 2)]
#: With accumulation where it is traced apart; under XLA, tests/optimizer/test_optimizer.py has it.
SKIPS_OF = {"plain": SKIPS, "two replicas": SKIPS[1:]}  # without it, under a loss scale below

#: The quick cases have these in parts.
SLOW = ("two replicas", "eager", "jit")


@functools.cache
def plain_run(*kept, steps):
    return trained(kept, steps=steps)


@pytest.mark.parametrize(
    ("case", "bad", "steps"),
    [
        pytest.param(case, *skip, marks=pytest.mark.slow if case in SLOW else ())
        for case in CASES
        for skip in SKIPS_OF.get(case, SKIPS[:1])
    ],
)
def test_a_skipped_update_is_as_if_its_batches_had_not_come(case, bad, steps):
    window = steps or 1
    kept = [i for i in range(8) if i // window not in [b // window for b in bad]]
    got = trained(range(8), bad=bad, steps=steps, **CASES[case])
    assert got[0].optimizer.skipped_steps == len(bad)
    if case in ("plain", "eager", "own step", "several steps"):  # what these compute is the same
        assert_equal(got, plain_run(*kept, steps=steps))
    else:
        assert_equal(got, trained(kept, steps=steps, **CASES[case]))
    assert np.isfinite(got[0].evaluate(x, y, verbose=0)).all()


def test_a_plain_model_cannot():
    """The reason for all this: the optimizer alone does not know the model."""
    model, history = trained(range(8), bad=[3], model_class=keras.Model)
    assert model.optimizer.skipped_steps == 1
    assert np.isnan(history["loss"][0])
    assert np.isfinite(np.concatenate([v.ravel() for v in model.get_weights()[:2]])).all()


@pytest.mark.parametrize(
    ("replicas", "steps"), [(0, 2), (2 if BACKEND == "tensorflow" else 0, None)]
)
def test_under_a_loss_scale(replicas, steps):
    keras.config.set_dtype_policy("mixed_float16")
    arguments = {"steps": steps, "replicas": replicas, "loss_weights": 0.01}
    model, history = trained(range(8), bad=[3], **arguments)
    scale = float(ops.convert_to_numpy(model.optimizer.dynamic_scale))
    assert scale == 2.0**14  # the overflow is heard of, and not undone
    kept = [i for i in range(8) if i // (steps or 1) != 3 // (steps or 1)]
    assert_equal((model, history), trained(kept, **arguments), rtol=2e-2, atol=2e-3)


def test_an_epoch_without_an_update_has_no_loss():
    model, history = trained([0, 1], bad=[0, 1])
    assert model.optimizer.skipped_steps == 2
    assert np.isnan(history["loss"]).all() and np.isnan(history["mae"]).all()
    model.fit(x, y, batch_size=BATCH, verbose=0)
    assert np.isfinite(model.history.history["loss"]).all()


def test_the_log_of_a_batch_is_its_own_until_something_was_counted():
    """A loss scale that is too high skips at the start, where the loss itself is finite."""
    losses = []

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(logs["loss"])

    model = network()
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(0.01), None, skip_nonfinite=True)
    model.compile(optimizer, "mse")
    bad = x.copy()
    bad[[0, 2 * BATCH]] = np.nan
    model.fit(bad, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[Note()])
    assert not np.isfinite(losses[0]) and np.isfinite(losses[1:]).all()
    assert losses[1] == pytest.approx(losses[2])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras's stateful layers fail in a second step")
def test_spikes_and_states_of_recurrent_layers():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 2), batch_size=2)
    h = keras.layers.GRU(3, stateful=True)(inputs)
    model = kgc.ClippedModel(inputs, keras.layers.Dense(1)(h))
    model.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(1e-3), None, skip_spikes=6), "mse")
    data = np.random.default_rng(0).normal(size=(2, 4, 2)).astype("float32")
    target = np.ones((2, 1), "float32")
    for _ in range(70):
        model.train_on_batch(data, target)
    before = [np.array(ops.convert_to_numpy(v)) for v in model.variables]
    model.train_on_batch(data, 1e4 * target)
    assert model.optimizer.skipped_steps == 1
    for v, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(v), old, err_msg=v.path)


def test_an_epoch_that_ends_in_an_update_counts_its_own_batches():
    """The metrics of the epoch before are not restored."""
    model = network()
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(0.01), None, skip_nonfinite=True, gradient_accumulation_steps=3
    )
    model.compile(optimizer, "mse")
    good, bad = [x[: 2 * BATCH], y[: 2 * BATCH]], x[: 4 * BATCH].copy()
    bad[0] = np.nan
    model.fit(*good, batch_size=BATCH, shuffle=False, verbose=0)
    history = model.fit(bad, y[: 4 * BATCH], batch_size=BATCH, shuffle=False, verbose=0).history
    assert find(model.optimizer).skipped_steps == 1
    want = model.evaluate(x[BATCH : 4 * BATCH], y[BATCH : 4 * BATCH], verbose=0)
    assert 0.3 * want < history["loss"][0] < 3 * want


def test_without_a_skip_nothing_is_done():
    model = network()
    model.compile("sgd", "mse", clipper="norm")
    assert model._clipping.undo is None
