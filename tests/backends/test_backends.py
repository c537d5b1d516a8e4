"""The public API on TensorFlow, JAX and PyTorch: `make test-backends`.

Every backend is held against the same run in float64 NumPy, and so against the other two.
"""

import functools

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from oracles import adam

import keras_gradclip as kgc
from keras_gradclip import aggregation
from keras_gradclip.optimizer import _skips
from keras_gradclip.optimizer.clipped_optimizer import find

BACKEND = keras.backend.backend()
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="JAX alone")
BATCH, LR, MOMENTUM = 8, 0.05, 0.9
PATHS = ["one/kernel", "one/bias", "two/kernel", "two/bias"]
RTOL, ATOL = 2e-5, 2e-6


def model_of(model_class=kgc.ClippedModel, seed=3):
    """Two linear layers, whose gradients are simple and too large without a clip."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    h = keras.layers.Dense(5, name="one", bias_initializer="random_normal")(inputs)
    return model_class(inputs, keras.layers.Dense(2, name="two")(h))


def data(steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * BATCH, 4)).astype("float32")
    return x, (4 * rng.normal(size=(steps * BATCH, 2))).astype("float32")


def gradients(ws, x, y, gate=None):
    """d(mean squared error)/d(weights); `gate`: a function of (the input of "two", dx)."""
    w1, b1, w2, b2 = ws
    h = x @ w1 + b1
    d_out = 2 * (h @ w2 + b2 - y) / y.size
    d_h = d_out @ w2.T
    if gate is not None:
        d_h = gate(h, d_h)
    return [x.T @ d_h, d_h.sum(0), h.T @ d_out, d_out.sum(0)]


def numpy_run(ws, x, y, clip, *, epochs=1, accumulate=1, gate=None):
    """SGD with momentum on clipped gradients; updates that are not finite are left out.

    `clip` is a function of (gradients, weights, number of the update), or None. Returns the
    weights after, for each update the global norm before the clip, and the number skipped.
    """
    ws = [w.astype("float64") for w in ws]
    x, y = x.astype("float64"), y.astype("float64")
    slots, norms, micro, skipped = [np.zeros_like(w) for w in ws], [], [], 0
    for _ in range(epochs):
        for i in range(0, len(x), BATCH):
            with np.errstate(invalid="ignore"):
                micro.append(gradients(ws, x[i : i + BATCH], y[i : i + BATCH], gate))
            if len(micro) < accumulate:
                continue
            g = [sum(parts) / accumulate for parts in zip(*micro, strict=True)]
            micro = []
            if not all(np.isfinite(part).all() for part in g):
                skipped += 1
                continue
            clipped = clip(g, ws, len(norms)) if clip else g
            norms.append(np.sqrt(sum((part**2).sum() for part in g)))
            slots = [MOMENTUM * s - LR * c for s, c in zip(slots, clipped, strict=True)]
            ws = [w + s for w, s in zip(ws, slots, strict=True)]
    return ws, norms, skipped


def sgd(**kwargs):
    return keras.optimizers.SGD(LR, momentum=MOMENTUM, **kwargs)


def fit(model, x, y, **kwargs):
    wrapper = find(model.optimizer)
    if wrapper is not None and wrapper.telemetry:
        wrapper.telemetry = True  # every update, for the oracle
    return model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **kwargs).history


def check(model, want, rtol=RTOL):
    for got, expected in zip(model.get_weights(), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=ATOL)


def twin(clipper):
    """The NumPy version of a clipper, for `numpy_run`."""
    clip = oracles.Clip(clipper)
    return lambda g, w, step: clip(g, w, PATHS, step)


CLIPPERS = {
    "off": None,
    "absolute": kgc.AbsoluteClip(0.3),
    "absolute, norm": kgc.AbsoluteClip(0.3, "norm"),
    "exponential": kgc.ExponentialClip(0.7, 0.2),
    "exponential, rms, alpha": kgc.ExponentialClip(0.7, 0.2, "rms", "alpha"),
    "norm, layer": kgc.NormClip(0.5),
    "norm, global": kgc.NormClip(0.5, "global"),
    "map": kgc.ClipMap({".*/bias": None, "two/kernel": kgc.NormClip(0.5)}, kgc.AbsoluteClip(0.3)),
    "chain": kgc.Chain([kgc.AbsoluteClip(0.5), kgc.NormClip(0.8, "global")]),
    "percentile": kgc.PercentileClip(50.0, window=3),
}


@pytest.mark.parametrize("case", CLIPPERS)
def test_fit_is_the_run_in_numpy(case):
    clipper = CLIPPERS[case]
    clip = twin(clipper)
    x, y = data(5)
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, clip, epochs=2)
    unclipped, _, _ = numpy_run(model.get_weights(), x, y, None, epochs=2)
    model.compile(sgd(), "mse", clipper=clipper)
    history = fit(model, x, y, epochs=2)
    check(model, want)
    np.testing.assert_allclose(
        history["grad_norm"], [np.mean(norms[:5]), np.mean(norms[5:])], rtol=RTOL
    )
    moved = max(np.abs(a - b).max() for a, b in zip(want, unclipped, strict=True))
    assert (moved > 1e-3) == (clipper is not None), "the case must clip"
    assert (history["clip_fraction"][0] > 0) == (clipper is not None)


def test_clip_fraction_is_the_share_of_elements():
    x, y = data(3)
    model = model_of()
    shares = []

    def clip(g, w, _):
        flat = np.concatenate([part.ravel() for part in g])
        shares.append(np.mean(np.abs(flat) > 0.3))
        return [np.clip(part, -0.3, 0.3) for part in g]

    numpy_run(model.get_weights(), x, y, clip)
    model.compile(sgd(), "mse", clipper=kgc.AbsoluteClip(0.3))
    history = fit(model, x, y)
    assert 0 < np.mean(shares) < 1
    assert history["clip_fraction"] == pytest.approx([np.mean(shares)], rel=1e-5)
    telemetry = model.optimizer.read_telemetry()
    assert telemetry["layers"] == ["one", "two"]
    assert (telemetry["updates"], telemetry["skipped"]) == (3, 0)
    assert telemetry["clip_fraction"] == pytest.approx(np.mean(shares), rel=1e-5)


@pytest.mark.parametrize("name", ["exponential", "adaptive", "rms", "zscore", "ada"])
def test_the_other_clippers_train(name):
    """Their equations are checked, on every backend, in test_relative.py and test_stateful.py."""
    x, y = data(4)
    model = model_of()
    model.compile(sgd(), "mse", clipper=name)
    history = fit(model, x, y, epochs=2)
    assert np.isfinite(history["loss"]).all()
    state = model.optimizer._clip.state
    assert bool(state) == (name in ("zscore", "ada"))
    for value in state.values():
        assert np.isfinite(ops.convert_to_numpy(value)).all()


@pytest.mark.parametrize(
    "clipper, stock",
    [
        (kgc.AbsoluteClip(0.1), {"clipvalue": 0.1}),
        (kgc.NormClip(0.5, "variable"), {"clipnorm": 0.5}),
        (kgc.NormClip(0.5, "global"), {"global_clipnorm": 0.5}),
    ],
    ids=str,
)
def test_on_one_device_it_is_what_keras_does(clipper, stock):
    x, y = data(4)
    adamw = functools.partial(keras.optimizers.AdamW, 0.01, weight_decay=0.1, use_ema=True)
    results = []
    for optimizer in (adamw(**stock), kgc.ClippedOptimizer(adamw(), clipper)):
        model = model_of(keras.Model)
        model.compile(optimizer, "mse")
        fit(model, x, y)
        results.append(model.get_weights())
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("eager", [False, True])
def test_accumulation_clips_the_mean_and_skips_bad_updates(eager):
    """12 micro-batches, 2 an update; the fourth holds an infinity, so the second is skipped."""
    x, y = data(12)
    x[3 * BATCH + 1, 2] = np.inf
    model = model_of()
    clip = twin(kgc.NormClip(0.5))
    want, norms, skipped = numpy_run(model.get_weights(), x, y, clip, accumulate=2)
    assert (len(norms), skipped) == (5, 1)
    optimizer = kgc.ClippedOptimizer(
        sgd(), kgc.NormClip(0.5), gradient_accumulation_steps=2, skip_nonfinite=True
    )
    model.compile(optimizer, "mse", run_eagerly=eager)
    history = fit(model, x, y)
    check(model, want)
    assert history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)
    assert optimizer.skipped_steps == 1
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 5
    assert optimizer.read_telemetry()["skipped"] == 1


@pytest.mark.parametrize("model_class", [keras.Model, kgc.ClippedModel])
def test_an_inner_optimizer_that_was_built_without_a_variable_is_refused(model_class):
    """As after unfreezing a layer; Keras's own message may print all values of the variable."""
    x, y = data(2)
    model = model_of(model_class)
    model.layers[1].trainable = False
    inner = keras.optimizers.Adam()
    model.compile(kgc.ClippedOptimizer(inner, "absolute"), "mse")
    model.fit(x, y, verbose=0)
    model.layers[1].trainable = True
    model.compile(kgc.ClippedOptimizer(inner, "absolute"), "mse")
    path = model.layers[1].kernel.path
    with pytest.raises(ValueError, match=rf"inner_optimizer.*{path}.*pass a new one") as error:
        model.fit(x, y, verbose=0)
    assert len(str(error.value)) < 400


def test_what_belongs_to_no_variable_changes_once_an_update():
    """Nadam's running product, where only an earlier micro-batch names one of the variables."""
    results = []
    for steps in (2, 1):
        ours = [keras.Variable([1.0, 2.0], name=name) for name in "ab"]
        optimizer = keras.optimizers.Nadam(0.1)
        if steps == 2:
            optimizer = kgc.ClippedOptimizer(optimizer, gradient_accumulation_steps=steps)
        optimizer.build(ours)
        for _ in range(2):
            if steps == 2:
                optimizer.apply([ops.ones(2), ops.ones(2)], ours)
                optimizer.apply([ops.ones(2)], ours[:1])
            else:
                optimizer.apply([ops.ones(2), 0.5 * ops.ones(2)], ours)
        results.append([ops.convert_to_numpy(v) for v in ours])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_unfinished_window_waits():
    x, y = data(3)
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, None, accumulate=2)
    model.compile(kgc.ClippedOptimizer(sgd(), gradient_accumulation_steps=2), "mse")
    fit(model, x, y)
    assert len(norms) == 1
    check(model, want)


def test_a_skipped_update_leaves_the_memory_of_a_clipper_alone():
    x, y = data(4)
    x[2 * BATCH, 0] = np.nan
    model = model_of()
    want, _, skipped = numpy_run(
        model.get_weights(), x, y, twin(kgc.PercentileClip(50.0, window=3))
    )
    assert skipped == 1
    clipper = kgc.PercentileClip(50.0, window=3)
    model.compile(kgc.ClippedOptimizer(sgd(), clipper, skip_nonfinite=True), "mse")
    fit(model, x, y)
    check(model, want)


def test_a_threshold_on_a_schedule_counts_updates():
    x, y = data(6)
    model = model_of()
    limits = [1.0, 0.85, 0.7, 0.55, 0.4, 0.25]
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 5, 0.25)
    want, _, _ = numpy_run(
        model.get_weights(),
        x,
        y,
        lambda g, w, n: [np.clip(part, -limits[n], limits[n]) for part in g],
    )
    model.compile(sgd(), "mse", clipper=kgc.AbsoluteClip(schedule))
    fit(model, x, y)
    check(model, want)
    assert model.optimizer.clip_hyperparameters["threshold"] == pytest.approx(0.25)


@pytest.mark.parametrize("when", ["epoch", "batch"])
def test_a_live_threshold(when):
    """1, 0.1, 0.01 in the epochs, or batches, of one fit."""
    values = [1.0, 0.1, 0.01]

    class Lower(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if when == "epoch":
                self.model.optimizer.clip_hyperparameters["threshold"] = values[epoch]

        def on_train_batch_end(self, batch, logs=None):
            if when == "batch" and batch < 2:
                if BACKEND == "jax":  # as for the learning rate
                    self.model.jax_state_sync()
                self.model.optimizer.clip_hyperparameters["threshold"] = values[batch + 1]

    x, y = data(2 if when == "epoch" else 3)
    per_value = 2 if when == "epoch" else 1
    model = model_of()
    want, _, _ = numpy_run(
        model.get_weights(),
        x,
        y,
        lambda g, w, n: [
            np.clip(part, *(s * values[n // per_value] for s in (-1, 1))) for part in g
        ],
        epochs=3 if when == "epoch" else 1,
    )
    model.compile(sgd(), "mse", clipper=kgc.AbsoluteClip(values[0]))
    fit(model, x, y, epochs=3 if when == "epoch" else 1, callbacks=[Lower()])
    check(model, want)
    assert model.optimizer.clipper.threshold == pytest.approx(0.01)


def test_the_fixed_loss_scale_of_the_inner_optimizer():
    x, y = data(3)
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, twin(kgc.AbsoluteClip(0.3)))
    model.compile(sgd(loss_scale_factor=64.0), "mse", clipper=kgc.AbsoluteClip(0.3))
    history = fit(model, x, y)
    check(model, want)
    assert history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)


def test_a_loss_scale_optimizer_around():
    """The clip sees unscaled gradients; an overflow halves the scale and changes nothing else."""
    x, y = data(4)
    x[BATCH, 0] = np.inf
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, twin(kgc.AbsoluteClip(0.3)))
    outer = keras.optimizers.LossScaleOptimizer(
        kgc.ClippedOptimizer(sgd(), kgc.AbsoluteClip(0.3)), initial_scale=1024.0
    )
    model.compile(outer, "mse")
    history = fit(model, x, y)
    check(model, want)
    assert float(ops.convert_to_numpy(outer.dynamic_scale)) == 512.0
    assert history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)
    assert find(outer).read_telemetry()["updates"] == 3


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone")
def test_the_units_of_pytorch_modules_are_rows():
    import torch

    layers = torch.nn.Linear(4, 6), torch.nn.Unflatten(1, (2, 3)), torch.nn.Conv1d(2, 5, 2)
    module = torch.nn.Sequential(*layers, torch.nn.Flatten())
    model = keras.Sequential([keras.layers.TorchModuleWrapper(module)])
    model(np.zeros((1, 4), "float32"))
    assert [*kgc.unit_axes(model).values()] == [(1,), (1, 2)]


def test_mixed_float16():
    """The loss is scaled by 2**15, but the clip sees unscaled gradients."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y = data(1)
    model = model_of()
    before = [w.astype("float64") for w in model.get_weights()]
    model.compile(
        keras.optimizers.SGD(100.0), "mse", loss_weights=1 / 128, clipper=kgc.AbsoluteClip(1e-3)
    )
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model, x, y)
    assert int(ops.convert_to_numpy(model.optimizer.inner_optimizer.iterations)) == 1
    for got, w, g in zip(
        model.get_weights(), before, gradients(before, x.astype("float64"), y), strict=True
    ):
        g = g / 128
        large = np.abs(g) > 1.1e-3
        assert large.any()
        np.testing.assert_allclose((w - got)[large], 0.1 * np.sign(g[large]), rtol=1e-4)
        small = np.abs(g) < 0.9e-3
        np.testing.assert_allclose((w - got)[small], 100.0 * g[small], rtol=0.02, atol=2e-4)


def test_what_adam_applies_is_bounded():
    model, (x, y) = model_of(), data(5)
    ws = [w.astype("float64") for w in model.get_weights()]
    model.compile(keras.optimizers.Adam(0.1), "mse", clipper=kgc.UpdateRatioClip(0.01, biases=None))
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    slots: list[dict] = [{} for _ in ws]
    bound = oracles.Clip(kgc.UpdateRatioClip(0.01, biases=None), steps=True)
    for i in range(5):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        grads = gradients(ws, x[batch].astype("float64"), y[batch].astype("float64"))
        wanted = [adam(w, g, s, i + 1) for w, g, s in zip(ws, grads, slots, strict=True)]
        steps = [b - a for a, b in zip(ws, wanted, strict=True)]
        bounded = bound(steps, ws, PATHS)
        ws = [w + step for w, step in zip(ws, bounded, strict=True)]
    for got, want in zip(model.get_weights(), ws, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert find(model.optimizer).read_telemetry()["clip_fraction"] > 0.9


def test_steps_per_execution():
    x, y = data(4)
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, twin(kgc.NormClip(0.5, "global")))
    model.compile(sgd(), "mse", clipper=kgc.NormClip(0.5, "global"), steps_per_execution=2)
    if BACKEND == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):  # Keras's own word
            fit(model, x, y)
        return
    history = fit(model, x, y)
    check(model, want)
    assert history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)


# What fit logs ----------------------------------------------------------------------------------


def test_the_figures_in_every_kind_of_logs():
    """Batch logs follow the updates; validation and evaluation do not change them."""
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((float(logs["grad_norm"]), float(logs["loss"])))

        def on_test_batch_end(self, batch, logs=None):
            assert not {"grad_norm", "clip_fraction"} & set(logs)

    x, y = data(3)
    model = model_of()
    _, norms, _ = numpy_run(model.get_weights(), x, y, twin(kgc.AbsoluteClip(0.3)), epochs=2)
    model.compile(sgd(), "mse", metrics=["mae"], clipper=kgc.AbsoluteClip(0.3))
    history = fit(model, x, y, epochs=2, validation_data=(x, y), callbacks=[Look()])
    running = [np.mean(norms[start : start + n]) for start in (0, 3) for n in (1, 2, 3)]
    np.testing.assert_allclose([norm for norm, _ in seen], running, rtol=RTOL)
    np.testing.assert_allclose(history["grad_norm"], [running[2], running[5]], rtol=RTOL)
    train = {"loss", "mae", "grad_norm", "clip_fraction"}
    assert set(history) == train | {"val_loss", "val_mae"}
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "mae"}
    assert set(model.test_on_batch(x, y, return_dict=True)) == {"loss", "mae"}
    assert set(model.train_on_batch(x, y, return_dict=True)) == train


def own_step():
    """A `train_step` of the user's own, which triples the loss, as each backend writes it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                value = 3.0 * self.compute_loss(x, y, y_pred)
            grads = tape.gradient(value, self.trainable_variables)
            self.optimizer.apply(grads, self.trainable_variables)
            return self.compute_metrics(x, y, y_pred)

    elif BACKEND == "jax":
        import jax

        def train_step(self, state, data):
            trainable, non_trainable, optimizer, metrics = state
            x, y = data

            def value(trainable):
                y_pred, _ = self.stateless_call(trainable, non_trainable, x, training=True)
                return 3.0 * self.compute_loss(x, y, y_pred)

            loss, grads = jax.value_and_grad(value)(trainable)
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
            logs, first = {}, 0
            for metric in self.metrics:
                mine = metrics[first : first + len(metric.variables)]
                assert metric.name == "loss"
                metrics[first : first + len(mine)] = metric.stateless_update_state(mine, loss)
                logs[metric.name] = metric.stateless_result(mine)
                first += len(mine)
            return logs, (trainable, non_trainable, optimizer, metrics)

    else:
        import torch

        def train_step(self, data):
            x, y = data
            self.zero_grad()
            y_pred = self(x, training=True)
            value = 3.0 * self.compute_loss(x, y, y_pred)
            value.backward()
            weights = self.trainable_weights
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in weights], weights)
            return self.compute_metrics(x, y, y_pred)

    return train_step


def test_a_train_step_of_ones_own():
    own = type("Own", (kgc.ClippedModel,), {"train_step": own_step()})
    x, y = data(3)
    model = model_of(own)
    _, norms, _ = numpy_run(
        model.get_weights(),
        x,
        y,
        lambda g, w, _: [np.clip(3.0 * part, -0.3, 0.3) for part in g],
    )
    model.compile(sgd(), "mse", clipper=kgc.AbsoluteClip(0.3))
    history = fit(model, x, y)
    assert history["grad_norm"] == pytest.approx([3.0 * np.mean(norms)], rel=1e-5)
    assert "train_step" not in vars(model)


@pytest.mark.parametrize("clipper", [kgc.NormClip(0.5), kgc.ExponentialClip(0.7, 0.2)], ids=str)
def test_apply_in_a_loop_of_ones_own(clipper):
    """`apply` builds the optimizer, accepts None, and needs no scope of the backend."""
    x, y = data(1)
    model = model_of(keras.Model)
    before = model.get_weights()
    g = gradients([w.astype("float64") for w in before], x, y)
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), clipper)
    tensors = [ops.convert_to_tensor(part, "float32") for part in g]
    tensors[1] = None
    optimizer.apply(tensors, model.trainable_variables)
    lists = ([values[i] for i in (0, 2, 3)] for values in (g, before, PATHS))
    kept = oracles.Clip(clipper)(*lists)
    want = [b - c for b, c in zip(before, [kept[0], 0.0, *kept[1:]], strict=True)]
    check(model, want)


# The activation gate ----------------------------------------------------------------------------

# |x| > 0.5: the gradient times 0.1
GATE = kgc.ActivationGate(clip_value=0.05, gamma=0.1, initial_learning_rate=1.0, layers=["two"])


def gate_oracle(h, dx):
    return np.where(np.abs(h) > 0.5, 0.1 * dx, dx)


@pytest.mark.parametrize("way", ["compile", "insert"])
def test_activation_gate(way, tmp_path):
    x, y = data(4)
    model = model_of()
    clip = twin(kgc.AbsoluteClip(0.3))
    want, _, _ = numpy_run(model.get_weights(), x, y, clip, gate=gate_oracle)
    plain, _, _ = numpy_run(model.get_weights(), x, y, clip)
    assert np.abs(want[0] - plain[0]).max() > 1e-3
    optimizer = kgc.ClippedOptimizer(sgd(), kgc.AbsoluteClip(0.3))
    before = model.predict(x, verbose=0)
    if way == "insert":
        model = GATE.insert(model)
        model.compile(optimizer, "mse")
    else:
        model.compile(optimizer, "mse", activation_gate=GATE)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    fit(model, x, y)
    check(model, want)

    model.save(tmp_path / "gated.keras")
    again = keras.models.load_model(tmp_path / "gated.keras")
    for one in (model, again):
        fit(one, x, y)
    check(again, model.get_weights(), rtol=0)


# State ------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    x, y = data(5)
    clipper = kgc.Chain([kgc.PercentileClip(50.0, window=3), kgc.AbsoluteClip(0.3)])
    whole = model_of()
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.Adam(0.01), clipper, gradient_accumulation_steps=2
    )
    whole.compile(optimizer, "mse")
    fit(whole, x, y)  # the window of the last update is half full
    optimizer.clip_hyperparameters["1/threshold"] = 0.2
    whole.save(tmp_path / "half.keras")
    resumed = keras.models.load_model(tmp_path / "half.keras")
    assert resumed.optimizer.clip_hyperparameters["1/threshold"] == pytest.approx(0.2)
    for model in (whole, resumed):
        fit(model, x, y)
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# Conditions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer, inner, want", [(1, 1, [12, 0]), (1, 0, [2, 5]), (0, 1, [1, 7])])
def test_cond_writes_what_the_chosen_branch_writes(outer, inner, want):
    """In a compiled function, one condition in the other."""
    a, b = (keras.Variable(v, dtype="float32") for v in (1.0, 0.0))

    def deep(amount):
        a.assign(a + amount)

    def shallow(amount):
        b.assign(b + 5.0)

    def first(flag, amount):
        a.assign(a + 1.0)
        aggregation.cond(flag > 0, deep, shallow, (amount,), state=[a, b])

    def second(flag, amount):
        b.assign(b + 7.0)

    def run(outer, inner, amount):
        aggregation.cond(outer > 0, first, second, (inner, amount), state=[a, b])

    arguments = [ops.convert_to_tensor(v, "float32") for v in (outer, inner, 10.0)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.function(run)(*arguments)
    elif BACKEND == "jax":
        import jax

        def pure(state, *arguments):
            with keras.StatelessScope(state_mapping=zip((a, b), state, strict=True)) as scope:
                run(*arguments)
            return [scope.get_current_value(v) for v in (a, b)]

        for v, new in zip((a, b), jax.jit(pure)([a.value, b.value], *arguments), strict=True):
            v.assign(new)
    else:
        run(*arguments)
    assert [float(ops.convert_to_numpy(v)) for v in (a, b)] == want


# The monitor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2])
def test_monitor(every, tmp_path):
    """Five updates, the third skipped: the samples are those of NumPy."""
    x, y = data(5)
    x[2 * BATCH, 0] = np.nan
    model = model_of()
    clip = twin(kgc.AbsoluteClip(0.3))
    _, norms, _ = numpy_run(model.get_weights(), x, y, clip)
    model.compile(kgc.ClippedOptimizer(sgd(), kgc.AbsoluteClip(0.3), skip_nonfinite=True), "mse")
    monitor = kgc.ClipMonitor(tmp_path, every=every)
    history = fit(model, x, y, callbacks=[monitor])
    assert monitor.history["step"] == list(range(0, 4, every))
    got = [np.linalg.norm(row) for row in monitor.history["norm_before"]]
    np.testing.assert_allclose(got, norms[::every], rtol=RTOL)
    assert max(np.max(row) for row in monitor.history["nonfinite"]) > 0
    assert history["clip_angle"][0] > 0
    assert (tmp_path / "monitor.csv").read_text().count("\n") == 1 + 4 * len(norms[::every])
    fit(model, x, y)  # afterwards nobody looks
    assert len(monitor.history["step"]) == len(norms[::every])


@pytest.mark.parametrize("follow", [True, False])
def test_calibrate_puts_everything_back(follow):
    x, y = data(4)
    model = model_of()
    model.compile(kgc.ClippedOptimizer(sgd()), "mse")
    fit(model, x, y)
    before = model.get_weights()
    state = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
    found = kgc.calibrate(
        model,
        (x, y),
        steps=3,
        percentile=100,
        batch_size=4 * BATCH,
        follow=follow,
        callbacks=keras.callbacks.LambdaCallback() if follow else None,
    )
    if not follow:
        g = gradients([w.astype("float64") for w in before], x, y)
        norm = np.sqrt(sum((part**2).sum() for part in g))
        assert found.global_norm == pytest.approx(norm, rel=1e-5)
    assert found.updates == 3
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    after = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
    for a, b in zip(state, after, strict=True):
        np.testing.assert_array_equal(a, b)


# Norms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clipper, norm",
    [
        (kgc.NormClip(1.0), lambda g: np.sqrt((g**2).sum())),
        (kgc.AdaptiveClip(1.0, eps=1.0), lambda g: np.sqrt((g**2).sum(0))),
    ],
    ids=["whole", "unit"],
)
@pytest.mark.parametrize("rows", [1000003, 1 << 20])
def test_norms_of_long_variables(rows, clipper, norm):
    """Equal numbers, the worst case of a long sum, are exact to five digits."""
    g = np.full((rows, 3), 0.1, "float32")
    variable = keras.Variable(np.zeros(g.shape, "float32"), name="kernel")
    (clipped,) = clipper([ops.convert_to_tensor(g)], [variable])
    want = g.astype("float64") / norm(g.astype("float64"))
    np.testing.assert_allclose(ops.convert_to_numpy(clipped), want, rtol=3e-5)


# Compiled or not --------------------------------------------------------------------------------


def compile_with(model, how, clipper=None, inner=sgd, outer=None, gate=None, **kwargs):
    optimizer = kgc.ClippedOptimizer(inner(), clipper, **kwargs)
    model.compile(outer(optimizer) if outer else optimizer, "mse", activation_gate=gate, **how)


def loss_scale(optimizer):
    return keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=64.0, dynamic_growth_steps=3
    )


def falling_rate():
    return keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5))


def averaging():
    return sgd(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)


ANNEALED = kgc.UpdateRatioClip(0.01, anneal="learning_rate")
#: What `compile_with` gets for each feature.
FEATURES = {
    "telemetry of every update": {"clipper": kgc.NormClip(0.5), "telemetry": True},
    "telemetry of every third": {"clipper": kgc.NormClip(0.5), "telemetry": 3},
    "monitor": {"clipper": kgc.AbsoluteClip(0.3)},
    "skips": {"clipper": kgc.NormClip(0.5), "skip_nonfinite": True, "telemetry": 3},
    "spikes": {"clipper": kgc.NormClip(0.5), "skip_spikes": 1.0},
    "accumulation": {"clipper": kgc.NormClip(0.5), "gradient_accumulation_steps": 2},
    "accumulation and skips": {
        "clipper": kgc.PercentileClip(50.0, window=3),
        "gradient_accumulation_steps": 2,
        "skip_nonfinite": True,
    },
    "loss scale": {"clipper": kgc.NormClip(0.5), "outer": loss_scale},
    "anneal": {"clipper": ANNEALED, "inner": falling_rate},
    "calibrate": {"clipper": kgc.AbsoluteClip(0.3)},
    "gate": {"clipper": kgc.AbsoluteClip(0.3), "gate": GATE},
    "moving average": {"clipper": kgc.NormClip(0.5), "inner": averaging},
}
NOT_COMPILED = {"eager": {"run_eagerly": True}}
if BACKEND == "jax":  # elsewhere Keras takes no jit by itself on a CPU
    NOT_COMPILED["no jit"] = {"jit_compile": False}


@functools.cache
def run_of(feature, how):
    """The weights and measurements of a model after two epochs with a feature."""
    x, y = data(6)
    if "skips" in feature or feature in ("monitor", "loss scale"):
        x[2 * BATCH, 0] = np.nan
    if feature == "spikes":
        y[4 * BATCH : 5 * BATCH] *= 50.0
    model = model_of()
    settings = {**FEATURES[feature]}
    if feature == "monitor":
        settings["skip_nonfinite"] = True
    compile_with(model, NOT_COMPILED.get(how, {}), **settings)
    monitor, found = kgc.ClipMonitor(every=2), []
    if feature == "calibrate":
        found = [kgc.calibrate(model, (x, y), steps=4, batch_size=BATCH).global_norm]
    callbacks = [monitor] if feature == "monitor" else []
    history = model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=0, epochs=2, callbacks=callbacks
    ).history
    optimizer = find(model.optimizer)
    telemetry = optimizer.read_telemetry()
    state = {
        "telemetry": [v for k, v in telemetry.items() if k != "layers"],
        "history": list(history.values()),
        "calibrated": found,
        "monitor": [monitor.history[k] for k in ("step", "norm_before")] if monitor.history else [],
        "optimizer": [ops.convert_to_numpy(v) for v in model.optimizer.variables],
        "skipped": optimizer.skipped_steps,
    }
    return model.get_weights(), state


@pytest.mark.parametrize("how", NOT_COMPILED)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_the_same_without_a_compiled_step(feature, how, monkeypatch):
    monkeypatch.setattr(_skips, "WINDOW", 4)
    weights, state = run_of(feature, "compiled")
    again, same = run_of(feature, how)
    leaves = [np.asarray(leaf) for leaf in keras.tree.flatten([weights, state])]
    others = [np.asarray(leaf) for leaf in keras.tree.flatten([again, same])]
    for a, b in zip(leaves, others, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=ATOL)
    is_skipped = "skips" in feature or feature in ("monitor", "spikes")
    assert bool(state["skipped"]) == is_skipped or feature == "loss scale"
    assert np.isfinite(np.concatenate([w.ravel() for w in weights])).all()


@pytest.mark.parametrize("telemetry", [True, 3])
def test_telemetry_in_a_loop_of_ones_own(telemetry):
    variable = keras.Variable(np.ones(3, "float32"), name="w")
    optimizer = kgc.ClippedOptimizer(sgd(), kgc.NormClip(0.5), telemetry=telemetry)
    optimizer.build([variable])
    for step in range(7):
        optimizer.apply([ops.full((3,), 1.0 + step)], [variable])
    seen = [1.0 + step for step in range(0, 7, int(telemetry))]
    figures = optimizer.read_telemetry()
    assert figures["updates"] == 7
    assert figures["grad_norm"] == pytest.approx(np.sqrt(3) * np.mean(seen), rel=1e-5)
    assert figures["clip_fraction"] == 1.0


# Many devices on JAX ----------------------------------------------------------------------------


@pytest.fixture
def data_parallel():
    """A function that sets the number of devices for the following training."""
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) >= 4, "XLA_FLAGS must ask for four devices before JAX starts"

    def use(count):
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices[:count])
        )

    yield use
    keras.distribution.set_distribution(None)


@only_jax
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("case", CLIPPERS)
def test_data_parallel_is_one_device(case, devices, data_parallel):
    clipper = CLIPPERS[case]
    clip = twin(clipper)
    x, y = data(5)
    data_parallel(devices)
    model = model_of()
    want, norms, _ = numpy_run(model.get_weights(), x, y, clip)
    model.compile(sgd(), "mse", clipper=clipper)
    history = fit(model, x, y)
    assert len(model.trainable_variables[0].value.sharding.device_set) == devices
    check(model, want)
    assert history["grad_norm"] == pytest.approx([np.mean(norms)], rel=1e-5)


@only_jax
def test_data_parallel_skips_what_one_shard_spoils(data_parallel):
    x, y = data(12)
    x[4 * BATCH - 1, 2] = np.inf  # in the last device's share of the fourth micro-batch
    data_parallel(4)
    model = model_of()
    want, _, skipped = numpy_run(model.get_weights(), x, y, twin(kgc.NormClip(0.5)), accumulate=2)
    optimizer = kgc.ClippedOptimizer(
        sgd(), kgc.NormClip(0.5), gradient_accumulation_steps=2, skip_nonfinite=True
    )
    model.compile(optimizer, "mse", activation_gate=kgc.ActivationGate())
    fit(model, x, y)
    check(model, want)
    assert optimizer.skipped_steps == skipped == 1


@only_jax
def test_data_parallel_loss_scale_falls_where_one_shard_overflows(data_parallel):
    x, y = data(4)
    x[2 * BATCH - 1, 0] = np.inf
    data_parallel(4)
    model = model_of()
    want, _, _ = numpy_run(model.get_weights(), x, y, twin(kgc.AbsoluteClip(0.3)))
    outer = keras.optimizers.LossScaleOptimizer(
        kgc.ClippedOptimizer(sgd(), kgc.AbsoluteClip(0.3)), initial_scale=1024.0
    )
    model.compile(outer, "mse")
    fit(model, x, y)
    check(model, want)
    assert float(ops.convert_to_numpy(outer.dynamic_scale)) == 512.0


@only_jax
def test_the_monitor_under_data_parallel(data_parallel):
    x, y = data(4)
    data_parallel(4)
    model = model_of()
    _, norms, _ = numpy_run(model.get_weights(), x, y, twin(kgc.AbsoluteClip(0.3)))
    model.compile(sgd(), "mse", clipper=kgc.AbsoluteClip(0.3))
    monitor = kgc.ClipMonitor(every=1)
    fit(model, x, y, callbacks=[monitor])
    got = [np.linalg.norm(row) for row in monitor.history["norm_before"]]
    np.testing.assert_allclose(got, norms, rtol=RTOL)
