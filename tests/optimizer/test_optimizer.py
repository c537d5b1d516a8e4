"""ClippedOptimizer behaves as the inner optimizer does to everything around it."""

import contextlib

import keras
import numpy as np
import pytest
from helpers import data, loss, needs_muon, net, strategy, train, variables, weights
from keras import ops

import keras_gradclip as kgc
from keras_gradclip import aggregation

pytestmark = pytest.mark.filterwarnings("ignore:.*Muon:UserWarning")

tf = pytest.importorskip("tensorflow")

INNER = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
    "Adam": lambda: keras.optimizers.Adam(1e-2),
    "AdamW": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-3),
    "Lion": lambda: keras.optimizers.Lion(1e-3),
    "Adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "Muon": lambda: keras.optimizers.Muon(1e-2),
    "Nadam": lambda: keras.optimizers.Nadam(1e-3),
    "Lamb": lambda: keras.optimizers.Lamb(1e-3),
    "Ftrl": lambda: keras.optimizers.Ftrl(1e-2),
    "EMA": lambda: keras.optimizers.Adam(1e-2, use_ema=True, ema_overwrite_frequency=3),
}


RARE = ("Lamb", "Ftrl", "Nadam", "Adafactor", "Adam", "RMSprop", "Lion")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in RARE else n for n in INNER]
)
def test_without_a_clip_it_is_the_inner_optimizer(name):
    """A threshold that nothing reaches changes no bit."""
    if name == "Muon":
        needs_muon()
    _, _, stock = train(0, INNER[name], model_class=keras.Model, steps=4, scale=1.0)
    _, _, ours = train(
        0,
        lambda: kgc.ClippedOptimizer(INNER[name](), kgc.AbsoluteClip(1e6), compiled=False),
        model_class=keras.Model,
        steps=4,
        scale=1.0,
    )
    np.testing.assert_array_equal(ours, stock)


@pytest.mark.parametrize("name", INNER)
def test_it_clips_what_the_inner_optimizer_gets(name):
    """One step equals the inner optimizer's step on gradients clipped by hand."""
    if name == "Muon":
        needs_muon()
    rng = np.random.default_rng(0)
    start = [rng.normal(size=s).astype("float32") for s in ((4, 3), (3,))]
    grads = [rng.normal(size=s).astype("float32") for s in ((4, 3), (3,))]
    a = [keras.Variable(w, name=f"w{i}") for i, w in enumerate(start)]
    b = [keras.Variable(w, name=f"w{i}") for i, w in enumerate(start)]
    kgc.ClippedOptimizer(INNER[name](), kgc.AbsoluteClip(0.1)).apply(
        [ops.convert_to_tensor(g) for g in grads], a
    )
    INNER[name]().apply([ops.convert_to_tensor(np.clip(g, -0.1, 0.1)) for g in grads], b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), rtol=1e-6, atol=1e-7)


def test_learning_rate_and_schedules():
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(0.5), "absolute")
    assert float(optimizer.learning_rate) == 0.5
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.5])
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(schedule), kgc.AbsoluteClip(0.1))
    v = keras.Variable(np.zeros(1, "float32"))
    seen = [0.0]
    for _ in range(4):
        optimizer.apply([ops.ones(1)], [v])
        seen.append(float(v.numpy()[0]))
    np.testing.assert_allclose(-np.diff(seen), [0.1, 0.1, 0.05, 0.05], rtol=1e-5)


def test_reduce_lr_on_plateau_and_scheduler_callbacks():
    model, history, _ = train(
        2,
        lambda: keras.optimizers.SGD(0.1),
        compile_args={"clipper": "absolute"},
        epochs=3,
        callbacks=[
            keras.callbacks.ReduceLROnPlateau(
                monitor="loss", factor=0.5, patience=0, min_delta=1e9, verbose=0
            ),
        ],
    )
    assert float(model.optimizer.learning_rate.numpy()) < 0.1
    assert history["learning_rate"][0] == pytest.approx(0.1)
    model, _, _ = train(
        0,
        lambda: keras.optimizers.SGD(0.1),
        compile_args={"clipper": "absolute"},
        epochs=2,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))],
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


def test_threshold_changes_in_the_middle_of_fit_without_a_retrace():

    class Counting(kgc.ClippedModel):
        def train_step(self, data):
            traces.append(1)
            return super().train_step(data)

    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.clip_hyperparameters["threshold"] = [0.01, 0.002, 0.005][epoch]
            self.before = weights(self.model)

        def on_epoch_end(self, epoch, logs=None):
            traced.append(len(traces))
            changes.append(np.abs(weights(self.model) - self.before).max())

    for replicas in (0, 2):
        changes, traced, traces = [], [], []
        train(
            replicas,
            lambda: keras.optimizers.SGD(1.0),
            model_class=Counting,
            compile_args={"clipper": kgc.AbsoluteClip(0.1)},
            steps=1,
            epochs=3,
            scale=1e3,
            callbacks=[Change()],
        )
        np.testing.assert_allclose(changes, [0.01, 0.002, 0.005], rtol=1e-2)
        assert traced[0] > 0 and traced == traced[:1] * 3


def test_clipnorm_of_stock_keras_is_baked_in():
    """The same test on Keras: the threshold set after the first fit does nothing."""
    x, y = data(16)
    model = net(keras.Model)
    model.compile(keras.optimizers.SGD(1.0, clipvalue=0.1), loss(), loss_weights=1e3)
    model.fit(x, y, batch_size=16, verbose=0)
    model.optimizer.clipvalue = 1e-4
    before = weights(model)
    model.fit(x, y, batch_size=16, verbose=0)
    assert np.abs(weights(model) - before).max() > 0.05


def test_a_threshold_schedule_counts_updates():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.4, 0.2, 0.1])
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(schedule))
    v = keras.Variable(np.zeros(1, "float32"))
    seen = [0.0]
    for want in (0.4, 0.2, 0.1):
        assert optimizer.clip_hyperparameters["threshold"] == pytest.approx(want)
        optimizer.apply([ops.ones(1)], [v])
        seen.append(float(v.numpy()[0]))
    np.testing.assert_allclose(-np.diff(seen), [0.4, 0.2, 0.1], rtol=1e-5)


def test_weight_decay_is_not_clipped_and_exclusions_hold():
    vs = variables()
    start = [v.numpy() for v in vs]
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(1.0, weight_decay=0.5), kgc.AbsoluteClip(0.1)
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
    optimizer.apply([ops.zeros(v.shape) for v in vs], vs)
    for v, w in zip(vs, start, strict=True):
        factor = 1.0 if v.name in ("bias", "gamma") else 0.5
        np.testing.assert_allclose(v.numpy(), factor * w, rtol=1e-6)


def test_ema_and_finalize():
    x, y = data(16)
    model = net()
    model.compile(
        keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), loss(), clipper="absolute"
    )
    inner = model.optimizer.inner_optimizer
    model.fit(x, y, epochs=3, batch_size=8, verbose=0)
    for v, average in zip(
        model.trainable_variables, inner._model_variables_moving_average, strict=True
    ):
        np.testing.assert_array_equal(v.numpy(), average.numpy())
    model.fit(x, y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])


def test_constraints_and_overwrite_with_gradient():
    constrained = keras.Variable(np.full(3, 0.05, "float32"), name="c")
    constrained.constraint = keras.constraints.NonNeg()
    overwritten = keras.Variable(np.zeros(2, "float32"), name="scale")
    overwritten.overwrite_with_gradient = True
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
    optimizer.apply([ops.ones(3), ops.convert_to_tensor([7.0, 8.0])], [constrained, overwritten])
    np.testing.assert_array_equal(constrained.numpy(), 0.0)
    np.testing.assert_array_equal(overwritten.numpy(), [7.0, 8.0])  # neither clipped nor scaled


def test_overwrite_with_gradient_while_accumulating():
    overwritten = keras.Variable(np.zeros(2, "float32"), name="scale")
    overwritten.overwrite_with_gradient = True
    plain = keras.Variable(np.zeros(1, "float32"), name="w")
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1), gradient_accumulation_steps=2
    )
    optimizer.apply([ops.convert_to_tensor([7.0, 1.0]), ops.ones(1)], [overwritten, plain])
    np.testing.assert_array_equal(overwritten.numpy(), 0.0)
    optimizer.apply([ops.convert_to_tensor([2.0, 8.0]), ops.ones(1)], [overwritten, plain])
    np.testing.assert_array_equal(overwritten.numpy(), [7.0, 8.0])  # the largest, as in Keras
    np.testing.assert_allclose(plain.numpy(), [-0.1], rtol=1e-6)


def test_duplicate_sparse_rows_are_merged_before_the_clip():
    """An embedding looked up four times: Keras's clipnorm=1 leaves a norm of 2 (its own test)."""

    def step(optimizer):
        v = keras.Variable(np.zeros((5, 1), "float32"))
        g = tf.IndexedSlices(tf.ones((4, 1)), tf.constant([2, 2, 2, 2]), tf.constant([5, 1]))
        optimizer.apply([g], [v])
        return v.numpy().ravel()

    sgd = keras.optimizers.SGD
    want = [0, 0, -1, 0, 0]
    np.testing.assert_allclose(step(kgc.ClippedOptimizer(sgd(1.0), kgc.NormClip(1.0))), want)
    np.testing.assert_allclose(step(kgc.ClippedOptimizer(sgd(1.0), kgc.AbsoluteClip(1.0))), want)
    assert step(sgd(1.0, clipvalue=1.0))[2] == -4.0
    assert step(sgd(1.0, clipnorm=1.0))[2] == -2.0


@pytest.mark.parametrize(
    "clipper",
    [
        kgc.AbsoluteClip(0.3),
        kgc.ExponentialClip(gamma=0.3),
        kgc.ExponentialClip(gamma=0.3, weight="rms", rescale="norm"),
        kgc.ExponentialClip(gamma=0.3, rescale="alpha"),
        kgc.NormClip(0.5),
    ],
    ids=str,
)
def test_a_sparse_gradient_is_clipped_as_its_dense_twin(clipper):
    rng = np.random.default_rng(0)
    v = keras.Variable(rng.normal(size=(6, 2)).astype("float32"), name="embeddings")
    rows = tf.constant([4, 1, 4, 0])
    sparse = tf.IndexedSlices(
        tf.constant(rng.normal(size=(4, 2)), tf.float32), rows, tf.constant([6, 2])
    )
    (got,) = clipper([sparse], [v])
    (want,) = clipper([tf.convert_to_tensor(sparse)], [v])
    np.testing.assert_allclose(tf.convert_to_tensor(got).numpy(), want.numpy(), rtol=1e-5)


def test_sparse_gradients_under_jit_and_while_accumulating():
    inputs = keras.Input((6,), dtype="int32")
    table = keras.layers.Embedding(20, 4, name="table")(inputs)
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(table))
    start = None
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (32, 6)), rng.integers(0, 3, 32)
    results = []
    for options in ({}, {"jit_compile": True}, {"accumulate": 2}):
        model = kgc.ClippedModel(inputs, outputs)
        start = start or model.get_weights()
        model.set_weights(start)
        steps = options.pop("accumulate", None)
        model.compile(
            kgc.ClippedOptimizer(
                keras.optimizers.SGD(0.1), kgc.NormClip(0.5), gradient_accumulation_steps=steps
            ),
            loss(),
            loss_weights=30.0,
            **options,
        )
        model.fit(x, y, batch_size=16 // (steps or 1), shuffle=False, verbose=0)
        results.append(weights(model))
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)


def test_missing_gradients_and_frozen_layers():
    vs = variables()
    start = [v.numpy() for v in vs]
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.NormClip(0.1))
    optimizer.build(vs)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, *[ops.ones(v.shape) for v in vs[1:]]], vs)
    np.testing.assert_array_equal(vs[0].numpy(), start[0])
    optimizer.apply([ops.ones(vs[0].shape)], [vs[0]])  # a subset, as after freezing
    assert np.abs(vs[0].numpy() - start[0]).max() > 0
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None] * len(vs), vs)
    with pytest.raises(ValueError, match=r"unknown variable.*new optimizer"):
        optimizer.apply([ops.ones(2)], [keras.Variable(np.ones(2, "float32"))])
    with pytest.raises(ValueError, match="1 gradients came for 5 variables"):
        optimizer.apply([ops.ones(2)], vs)
    optimizer.apply([], [])  # as in Keras: nothing to do


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("is_built", [True, False])
def test_gradients_of_a_variable_that_comes_twice_are_added_up(is_built, steps):
    """As of two losses that share a layer: `apply(g_actor + g_critic, actor + critic)`."""
    ours, other = keras.Variable([1.0, 1.0]), keras.Variable([1.0])
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.5), gradient_accumulation_steps=steps
    )
    if is_built:
        optimizer.build([ours, other])
    rows = tf.IndexedSlices(tf.constant([0.2]), tf.constant([0]), tf.constant([2]))
    for _ in range(steps or 1):
        gradients = [tf.constant([0.1, 0.4]), tf.ones(1), None, rows, tf.constant([0.0, 0.4])]
        optimizer.apply(gradients, [ours, other, other, ours, ours])
    np.testing.assert_allclose(ours.numpy(), [0.7, 0.5], rtol=1e-6)
    np.testing.assert_allclose(other.numpy(), [0.5])


@pytest.mark.parametrize(
    ("replicas", "steps"),
    [(0, None), (2, 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((0, 2), (2, None)))],
)
def test_the_end_of_data_of_unknown_size_is_no_step(replicas, steps):
    """Keras counts one more there, and Adam's rate with it."""
    x, y = data(48)
    scope = strategy(replicas)

    def trained(is_known):
        with scope.scope() if scope else contextlib.nullcontext():
            model = net(kgc.ClippedModel)
            inner = keras.optimizers.Adam(1e-2)
            clipper = kgc.PercentileClip(90, window=4)
            optimizer = kgc.ClippedOptimizer(inner, clipper, steps, telemetry=True)
            model.compile(optimizer, loss())
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16, drop_remainder=True)
        if not is_known:
            batches = batches.filter(lambda *_: True)
        model.fit(batches, epochs=3, verbose=0)
        found = optimizer.read_telemetry()
        return [weights(model), int(aggregation.to_numpy(optimizer.iterations)), found["updates"]]

    known, unknown = trained(True), trained(False)
    assert unknown[1:] == known[1:] == ([9, 3] if steps is None else [4, 1])
    np.testing.assert_allclose(unknown[0], known[0], atol=1e-6)


def test_calibrate_measures_nothing_at_the_end_of_data():
    x, y = data(48)
    model = net(kgc.ClippedModel)
    model.compile("sgd", loss())
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16).filter(lambda *_: True)
    found = kgc.calibrate(model, batches, steps=10)
    assert np.all(found.samples["global"] > 0)
    assert found.updates == 10


def test_trainable_flags_change_between_two_fits():
    model, _, _ = train(
        2,
        lambda: keras.optimizers.Adam(1e-2),
        compile_args={"clipper": kgc.NormClip(0.5)},
        steps=2,
    )
    x, y = data(32)
    model.get_layer("stem").trainable = False
    frozen = model.get_layer("stem").get_weights()
    model.compile(model.optimizer, loss())  # the same optimizer, fewer variables
    model.fit(x, y, batch_size=16, verbose=0)
    for a, b in zip(model.get_layer("stem").get_weights(), frozen, strict=True):
        np.testing.assert_array_equal(a, b)
    model.get_layer("stem").trainable = True
    model.compile(model.optimizer, loss())
    model.fit(x, y, batch_size=16, verbose=0)
    assert np.abs(model.get_layer("stem").get_weights()[0] - frozen[0]).max() > 0


def test_apply_without_variables_needs_a_built_optimizer():
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), "absolute")
    with pytest.raises(ValueError, match="build"):
        optimizer.apply([ops.ones(1)])
    v = keras.Variable(np.zeros(1, "float32"))
    optimizer.build([v])
    optimizer.apply([ops.ones(1)])
    np.testing.assert_allclose(v.numpy(), [-0.1], rtol=1e-6)


@pytest.mark.parametrize("replicas", [0, 2])
def test_run_eagerly(replicas):
    args = {"clipper": kgc.NormClip(0.5)}
    _, _, want = train(0, lambda: keras.optimizers.Adam(1e-2), compile_args=args, steps=2)
    _, _, got = train(
        replicas,
        lambda: keras.optimizers.Adam(1e-2),
        compile_args={**args, "run_eagerly": True},
        steps=2,
    )
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    "clipper, options",
    [
        (kgc.NormClip(0.5), {}),
        (
            kgc.ExponentialClip(gamma=0.05),
            {"skip_nonfinite": True, "gradient_accumulation_steps": 2},
        ),
    ],
    ids=str,
)
def test_jit_compile(clipper, options):
    results = []
    for jit in (False, True):
        _, _, got = train(
            0,
            lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), clipper, **options),
            compile_args={"jit_compile": jit},
            steps=4,
        )
        results.append(got)
    np.testing.assert_allclose(results[1], results[0], atol=2e-5)


def test_swap_ema_weights_under_a_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    train(
        0,
        lambda: keras.optimizers.Adam(1e-2, use_ema=True),
        compile_args={"clipper": "absolute"},
        steps=2,
        scale=1.0,
        callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    )


def test_a_state_is_read_before_anything_is_written():
    """A clipper that moves one state into another sees both as they were."""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Shift(kgc.Clipper):
        def init(self, variables):
            return {"a": np.float32(1.0), "b": np.float32(0.0)}

        def apply(self, grads, variables, state, hyper):
            stats = kgc.ClipStats(lambda: [None] * len(grads), [0.0] * len(grads), "elements")
            return list(grads), {"a": state["a"] + 1.0, "b": state["a"]}, stats

    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), Shift())
    v = keras.Variable(np.zeros(1, "float32"))
    for step in (1.0, 2.0):
        optimizer.apply([ops.ones(1)], [v])
        assert float(optimizer._clip.state["b"].numpy()) == step
        assert float(optimizer._clip.state["a"].numpy()) == step + 1.0


def test_an_epoch_of_skipped_updates_is_no_epoch_of_zero_gradients():
    _, history, _ = train(
        0,
        lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), "absolute", skip_nonfinite=True),
        steps=1,
        scale=float("inf"),
    )
    assert np.isnan(history["grad_norm"][0]) and np.isnan(history["clip_fraction"][0])


def test_the_interval_of_telemetry_is_checked_where_it_is_set():
    optimizer = kgc.ClippedOptimizer("sgd", "absolute", telemetry=None)
    assert optimizer.telemetry is False
    with pytest.raises(ValueError, match="`telemetry` must be a whole number"):
        optimizer.telemetry = -3
    assert optimizer.telemetry is False


def test_telemetry_needs_to_be_on():
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), "absolute")
    with pytest.raises(ValueError, match="telemetry=True"):
        optimizer.read_telemetry()


def test_telemetry_before_the_first_update():
    figures = kgc.ClippedOptimizer("sgd", "absolute", telemetry=True).read_telemetry()
    assert figures["layers"] == [] and figures["updates"] == 0
    assert np.isnan([figures["grad_norm"], figures["clip_fraction"]]).all()


def test_telemetry_by_hand():
    vs = variables()
    rng = np.random.default_rng(3)
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(0.0), kgc.AbsoluteClip(0.5), telemetry=True
    )
    norms, fractions, layers = [], [], {"conv": [], "norm": [], "dense": []}
    for _ in range(3):
        gs = [rng.normal(size=tuple(v.shape)).astype("float32") for v in vs]
        optimizer.apply([ops.convert_to_tensor(g) for g in gs], vs)
        flat = np.concatenate([g.ravel() for g in gs])
        norms.append(np.linalg.norm(flat))
        fractions.append(np.mean(np.abs(flat) > 0.5))
        for name, members in zip(layers, (gs[:2], gs[2:3], gs[3:]), strict=True):
            part = np.concatenate([g.ravel() for g in members])
            layers[name].append((np.linalg.norm(part), np.mean(np.abs(part) > 0.5)))
    got = optimizer.read_telemetry()
    assert got["layers"] == list(layers)
    assert got["updates"] == 3 and got["skipped"] == 0
    assert got["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert got["clip_fraction"] == pytest.approx(np.mean(fractions), rel=1e-5)
    for i, figures in enumerate(layers.values()):
        squares, hit = np.array(figures).T
        assert got["layer_grad_norm"][i] == pytest.approx(np.sqrt(np.mean(squares**2)), rel=1e-5)
        assert got["layer_clip_fraction"][i] == pytest.approx(np.mean(hit), rel=1e-5)
    optimizer.reset_telemetry()
    got = optimizer.read_telemetry()
    assert got["layers"] == list(layers) and got["updates"] == 0
    assert np.isnan(got["layer_grad_norm"]).all() and np.isnan(got["layer_clip_fraction"]).all()
