"""One threshold means one thing on 1, 2 and 4 replicas; stock Keras is shown to differ."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from helpers import CLASSES, CLIPPERS, data, loss, net, strategy, train, weights

import keras_gradclip as kgc

tf = pytest.importorskip("tensorflow")

OPTIMIZERS = {
    "momentum": functools.partial(keras.optimizers.SGD, 0.02, momentum=0.9),
    "adam": functools.partial(keras.optimizers.Adam, 1e-2),
    "adamw": functools.partial(keras.optimizers.AdamW, 1e-2, weight_decay=0.1),
    "ema": functools.partial(keras.optimizers.Adam, 1e-2, use_ema=True, ema_momentum=0.5),
}
TOLERANCE = 2e-5


def run(replicas, clipper, optimizer, plain=False, **kwargs):
    """Train through ClippedModel, or through ClippedOptimizer in a plain model."""
    if plain:
        return train(
            replicas,
            lambda: kgc.ClippedOptimizer(optimizer(), clipper),
            model_class=keras.Model,
            **kwargs,
        )
    compile_args = {"clipper": clipper, **kwargs.pop("compile_args", {})}
    return train(replicas, optimizer, compile_args=compile_args, **kwargs)


@functools.cache
def one_device(clipper, optimizer):
    _, history, result = run(0, CLIPPERS[clipper], OPTIMIZERS[optimizer])
    assert history["clip_fraction"][0] > 0.05, "the test needs a clip that clips"
    return result


# The full table is in test_parity_full (slow); tests/fuzz draws replicas, too.
PARITY = [
    (1, "map", "adam"),
    (2, "exponential", "adam"),
    (2, "norm-layer", "adamw"),
    (2, "chain", "adam"),
    (4, "norm-global", "ema"),  # and "map", whose telemetry is compared below
]


@pytest.mark.parametrize("replicas, clipper, optimizer", PARITY)
def test_parity(replicas, clipper, optimizer):
    plain = replicas == 2  # the two ways of use share everything below `compile`
    _, _, got = run(replicas, CLIPPERS[clipper], OPTIMIZERS[optimizer], plain=plain)
    np.testing.assert_allclose(got, one_device(clipper, optimizer), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["ClippedModel", "ClippedOptimizer"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_parity_full(clipper, optimizer, replicas, plain):
    _, _, got = run(replicas, CLIPPERS[clipper], OPTIMIZERS[optimizer], plain=plain)
    # A clip that gives the norm back enlarges rounding with the rest: tenfold in four steps.
    atol = 5 * TOLERANCE if clipper == "absolute-norm" else TOLERANCE
    np.testing.assert_allclose(got, one_device(clipper, optimizer), atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_stock_keras_has_no_such_parity(argument):
    """The same comparison fails on Keras's own clipping: the test above can fail."""

    def stock():
        return keras.optimizers.SGD(0.02, momentum=0.9, **{argument: 0.05})

    _, _, one = train(0, stock, model_class=keras.Model)
    _, _, two = train(2, stock, model_class=keras.Model)
    assert np.abs(one - two).max() > 10 * TOLERANCE


def largest_change(replicas, optimizer):
    """The largest weight change of one SGD step with learning rate 1 and a steep loss."""
    x, y = data(16)
    scope = strategy(replicas).scope()
    with scope:
        model = net(keras.Model)
        model.compile(optimizer(), loss(), loss_weights=1e3)
    before = weights(model)
    model.fit(x, y, batch_size=16, verbose=0)
    return np.abs(weights(model) - before).max()


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_threshold_bounds_the_weight_change(replicas):
    ours = largest_change(
        replicas, lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
    )
    stock = largest_change(replicas, lambda: keras.optimizers.SGD(1.0, clipvalue=0.1))
    assert ours == pytest.approx(0.1, rel=1e-4)
    assert stock == pytest.approx(0.1 * replicas, rel=1e-4)


def test_accumulation_clips_the_mean_of_the_micro_batches():
    """4 calls of 4 samples, accumulated, equal one call of 16."""
    adam = OPTIMIZERS["adam"]
    clipper = CLIPPERS["norm-layer"]
    _, _, want = run(0, clipper, adam, steps=4, batch=16)
    model, _, got = train(
        2,
        lambda: kgc.ClippedOptimizer(adam(), clipper, gradient_accumulation_steps=4),
        steps=16,
        batch=4,
    )
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    assert int(model.optimizer.iterations.numpy()) == 4


def test_accumulation_while_run_eagerly():
    adam, clipper = OPTIMIZERS["adam"], CLIPPERS["norm-layer"]
    _, _, want = run(0, clipper, adam, steps=2, batch=16)
    _, _, got = train(
        2,
        lambda: kgc.ClippedOptimizer(adam(), clipper, gradient_accumulation_steps=2),
        compile_args={"run_eagerly": True},
        steps=4,
        batch=8,
    )
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_accumulation_is_bit_equal_to_keras_on_one_device():
    _, _, stock = train(
        0,
        lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
        model_class=keras.Model,
    )
    _, _, ours = train(
        0,
        lambda: kgc.ClippedOptimizer(
            keras.optimizers.Adam(1e-2), None, gradient_accumulation_steps=2, compiled=False
        ),
        model_class=keras.Model,
    )
    np.testing.assert_array_equal(ours, stock)


def test_stock_accumulation_crashes_on_two_replicas():
    with pytest.raises(Exception, match=r"merge_call|cond|replica"):
        train(
            2,
            lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
            model_class=keras.Model,
        )


@pytest.mark.parametrize("replicas", [2])
def test_ema_overwrite_frequency(replicas):
    def ema():
        return keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)

    _, _, want = run(0, CLIPPERS["norm-layer"], ema)
    model, _, got = run(replicas, CLIPPERS["norm-layer"], ema)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    config = model.optimizer.get_config()["inner_optimizer"]["config"]
    assert config["ema_overwrite_frequency"] == 3


def averaged(replicas):
    """Two weights after their averages overwrote them; the first had no gradient then."""
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        free, unit = keras.Variable([3.0, 4.0]), keras.Variable([[0.6], [0.8]])
        unit.constraint = keras.constraints.UnitNorm()
        inner = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)
        optimizer = kgc.ClippedOptimizer(inner, kgc.AbsoluteClip(1.0))
        optimizer.build([free, unit])

    def step():
        of_unit = tf.constant([[2.0], [-2.0]]) / max(replicas, 1)
        optimizer.apply([tf.ones(2) / max(replicas, 1), of_unit], [free, unit])

    def last_step():
        optimizer.apply([None, tf.constant([[2.0], [-2.0]]) / max(replicas, 1)], [free, unit])

    for function in (step, step, last_step):
        scope.run(tf.function(function)) if scope else function()
    return [keras.ops.convert_to_numpy(v) for v in (free, unit)]


def test_averages_overwrite_as_on_one_device():
    for got, want in zip(averaged(2), averaged(0), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "replicas, steps_per_execution",
    [(2, 3), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((4, 16), (4, 2)))],
)
def test_steps_per_execution(replicas, steps_per_execution):
    """8 steps an epoch; 3 does not divide them, 16 is more than there are."""
    adam, clipper = OPTIMIZERS["adam"], CLIPPERS["absolute"]
    _, one, want = run(0, clipper, adam, epochs=2)
    model, many, got = run(
        replicas,
        clipper,
        adam,
        epochs=2,
        compile_args={"steps_per_execution": steps_per_execution},
    )
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    assert int(model.optimizer.iterations.numpy()) == 16
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(many["clip_fraction"], one["clip_fraction"], rtol=1e-5)


def test_steps_per_execution_in_evaluate_and_predict():
    x, y = data(40)
    results = []
    for replicas, steps in ((0, 1), (2, 3)):
        scope = strategy(replicas)
        with scope.scope() if scope else contextlib.nullcontext():
            model = net()
            model.compile("sgd", loss(), metrics=["accuracy"], steps_per_execution=steps)
        results.append(
            (
                model.evaluate(x, y, batch_size=8, verbose=0),
                model.predict(x, batch_size=8, verbose=0),
            )
        )
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_telemetry_is_the_same_on_replicas():
    adam, clipper = OPTIMIZERS["adam"], CLIPPERS["map"]
    one, _, want = run(0, clipper, adam)
    many, _, got = run(4, clipper, adam)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    a, b = one.optimizer.read_telemetry(), many.optimizer.read_telemetry()
    assert a["layers"] == b["layers"] == ["stem", "body", "head"]
    assert a["updates"] == b["updates"] == 8
    for key in ("grad_norm", "clip_fraction", "layer_grad_norm", "layer_clip_fraction"):
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_custom_loop(replicas):
    """strategy.run around a gradient tape, without Keras's trainer."""
    mirrored = strategy(replicas)
    x, y = data(16)
    with mirrored.scope():
        model = net(keras.Model)
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
    before = weights(model)

    @tf.function
    def step(batch):
        def replica(x, y):
            with tf.GradientTape() as tape:
                losses = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
                value = 1e3 * tf.reduce_sum(losses) / 16
            grads = tape.gradient(value, model.trainable_variables)
            optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

        mirrored.run(replica, args=batch)

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    step(next(iter(mirrored.experimental_distribute_dataset(dataset))))
    assert np.abs(weights(model) - before).max() == pytest.approx(0.1, rel=1e-4)


def test_apply_outside_strategy_run_says_what_to_do():
    with strategy(2).scope():
        model = net(keras.Model)
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
        grads = [tf.zeros(v.shape) for v in model.trainable_variables]
        with pytest.raises(ValueError, match=r"strategy\.run"):
            optimizer.apply(grads, model.trainable_variables)


def test_an_optimizer_made_and_built_outside_the_strategy_is_refused():
    """It would add up no gradients, and every replica would go its own way."""
    mirrored = strategy(2)
    with mirrored.scope():
        weight = keras.Variable(np.zeros(2, "float32"))
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
    optimizer.build([weight])
    with pytest.raises(ValueError, match="created outside the strategy"):
        mirrored.run(lambda: optimizer.apply([tf.ones(2)], [weight]))


def test_new_scales_of_float8_are_the_largest_of_all_replicas():
    mirrored = strategy(2)
    with mirrored.scope():
        weight, scale = keras.Variable([1.0]), keras.Variable([1.0, 1.0])
        scale.overwrite_with_gradient = True
        optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.1))
        optimizer.build([weight, scale])

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        replica = tf.cast(replica, "float32")
        optimizer.apply([tf.ones(1), tf.stack([2.0 + replica, 5.0 - replica])], [weight, scale])

    mirrored.run(tf.function(step))
    assert [copy.numpy().tolist() for copy in scale.value.values] == [[3.0, 5.0]] * 2


# One all-reduce ------------------------------------------------------------------------------


def all_reduces(replicas, optimizer, model_class=keras.Model, **compile_args):
    """How often `all_reduce` is called, and on how many tensors, while a train step is traced."""
    calls = []
    original = tf.distribute.ReplicaContext.all_reduce

    def counting(self, op, value, options=None):
        calls.append(len(tf.nest.flatten(value)))
        return original(self, op, value, options)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(tf.distribute.ReplicaContext, "all_reduce", counting)
    try:
        model, _, _ = train(
            replicas, optimizer, model_class=model_class, compile_args=compile_args, steps=2
        )
    finally:
        monkey.undo()
    return calls, model


@pytest.mark.parametrize(
    ("replicas", "options"),
    [(2, {}), (2, {"skip_nonfinite": True}), (2, {"gradient_accumulation_steps": 2})],
    ids=str,
)
def test_exactly_one_all_reduce_an_update(replicas, options):
    calls, model = all_reduces(
        replicas,
        lambda: kgc.ClippedOptimizer(OPTIMIZERS["adam"](), kgc.NormClip(0.5), **options),
    )
    # Each replica's thread joins the one all-reduce, with all gradients in one list.
    assert calls == [len(model.trainable_variables)] * replicas


def test_embedding_under_a_strategy():
    """Sparse gradients survive the all-reduce and are merged before the norm."""

    def embedding_net():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,), dtype="int32")
        h = keras.layers.Embedding(20, 4, name="table")(inputs)
        outputs = keras.layers.Dense(CLASSES, name="head")(keras.layers.Flatten()(h))
        return kgc.ClippedModel(inputs, outputs)

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (32, 6)), rng.integers(0, CLASSES, 32)
    results = []
    for replicas in (0, 2):
        scope = strategy(replicas)
        with scope.scope() if scope else contextlib.nullcontext():
            model = embedding_net()
            model.compile(
                keras.optimizers.SGD(0.1), loss(), loss_weights=30.0, clipper=kgc.NormClip(0.5)
            )
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        results.append(weights(model))
    np.testing.assert_allclose(*results, atol=TOLERANCE, rtol=0)


def test_strategies_that_are_not_supported_are_refused():
    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    with central.scope(), pytest.raises(ValueError, match=r"CentralStorageStrategy.*Mirrored"):
        kgc.ClippedOptimizer("sgd", "absolute")


def test_a_captured_constant_is_subtracted_as_often_as_in_keras():
    """Every replica applies one tensor that it captured: Keras takes it for the reduced one."""
    changes = []
    for wrap in (lambda inner: inner, kgc.ClippedOptimizer):
        scope, gradient = strategy(2), tf.constant([1.0, 2.0])
        with scope.scope():
            variable = keras.Variable(np.zeros(2, "float32"))
            optimizer = wrap(keras.optimizers.SGD(1.0))
            optimizer.build([variable])
        scope.run(lambda o=optimizer, v=variable, g=gradient: o.apply([g], [v]))
        changes.append(np.array(variable.value.values[0]))
    np.testing.assert_array_equal(changes[0], changes[1])
