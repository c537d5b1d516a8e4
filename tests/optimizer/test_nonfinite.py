"""Overflow: an update is applied on every replica or on none, and the loss scale follows."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
from helpers import loss, net, strategy, train, weights

import keras_gradclip as kgc
from keras_gradclip.optimizer.clipped_optimizer import find

tf = pytest.importorskip("tensorflow")


def build(replicas, optimizer):
    """A model and a step that poisons the gradient of one replica on demand."""
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        model = net(keras.Model)
        model.compile(optimizer(), loss())
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
    variables = model.trainable_variables

    @tf.function
    def step(poison):
        """`poison`: a vector with one factor a replica; the loss is multiplied by it."""

        def replica(poison):
            rank = tf.distribute.get_replica_context().replica_id_in_sync_group
            with tf.GradientTape() as tape:
                squares = [tf.reduce_sum(tf.square(v - 0.5)) for v in variables]
                value = tf.add_n(squares) * poison[rank]
                value = optimizer.scale_loss(value)
            grads = tape.gradient(value, variables)
            optimizer.apply(grads, variables)

        (scope or tf.distribute.get_strategy()).run(replica, args=(poison,))

    return model, optimizer, step


def copies(model):
    """Every replica's copy of every weight and of the inner optimizer's state."""
    result = []
    for v in [*model.variables, *find(model.optimizer).inner_optimizer.variables]:
        for copy in getattr(v.value, "values", [v.value]):
            result.append(copy.numpy())
    return result


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def factors(replicas, bad=None, value=np.inf):
    poison = np.full(max(replicas, 1), 1.0 / max(replicas, 1), "float32")
    if bad is not None:
        poison[bad] = value
    return tf.constant(poison)


# In the tests that follow each replica is the bad one in turn: a step is traced once.


@pytest.mark.parametrize("replicas", [0, 1, 4])
def test_skip_nonfinite(replicas):
    model, optimizer, step = build(
        replicas,
        lambda: kgc.ClippedOptimizer(
            keras.optimizers.Adam(1e-2), kgc.AbsoluteClip(0.1), skip_nonfinite=True
        ),
    )
    step(factors(replicas))
    cases = itertools.product(range(max(replicas, 1)), (np.inf, np.nan))
    for skipped, (bad, value) in enumerate(cases):
        before = copies(model)
        step(factors(replicas, bad, value))
        assert same(copies(model), before), (bad, value)
        assert optimizer.skipped_steps == skipped + 1
        assert int(optimizer.iterations.numpy()) == skipped + 1
        step(factors(replicas))
        assert not same(copies(model), before)
        assert np.isfinite(weights(model)).all()
        assert optimizer.skipped_steps == skipped + 1


@pytest.mark.parametrize("replicas, steps", [(0, None), (1, 2), (2, 2), (4, None)])
def test_loss_scale(replicas, steps):
    """As `compile` builds it under mixed_float16."""
    keras.config.set_dtype_policy("mixed_float16")
    model, optimizer, step = build(
        replicas,
        lambda: kgc.ClippedOptimizer(
            keras.optimizers.SGD(1e-2), kgc.AbsoluteClip(0.1), gradient_accumulation_steps=steps
        ),
    )
    assert type(optimizer) is keras.optimizers.LossScaleOptimizer
    micro = steps or 1
    for _ in range(micro):
        step(factors(replicas))
    for bad in range(max(replicas, 1)):
        before, scale = copies(model), float(optimizer.dynamic_scale.numpy())
        for _ in range(micro):
            step(factors(replicas, bad))
        assert same(copies(model), before), bad
        assert float(optimizer.dynamic_scale.numpy()) == scale / 2
        for copy in getattr(optimizer.dynamic_scale.value, "values", []):
            assert float(copy.numpy()) == scale / 2
        for _ in range(micro):
            step(factors(replicas))
        assert not same(copies(model), before)
        assert np.isfinite(weights(model)).all()


def test_stock_keras_corrupts_the_weights():
    """What this is about: an overflow on the second replica goes into the weights."""
    keras.config.set_dtype_policy("mixed_float16")
    model, optimizer, step = build(2, lambda: keras.optimizers.SGD(1e-2))
    scale = float(optimizer.dynamic_scale.numpy())
    step(factors(2, bad=1))
    assert not np.isfinite(weights(model)).all()
    assert float(optimizer.dynamic_scale.numpy()) == scale


@pytest.mark.parametrize("replicas", [0, 4])
def test_the_clip_sees_unscaled_gradients(replicas):
    """SGD with learning rate 1 and a steep loss moves a weight by the threshold, not by 1/scale."""
    keras.config.set_dtype_policy("mixed_float16")
    model, _, step = build(
        replicas, lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.125))
    )
    before = weights(model)
    step(factors(replicas))
    change = np.abs(weights(model) - before)
    want = np.minimum(2 * np.abs(before - 0.5), 0.125)
    np.testing.assert_allclose(change, want, rtol=1e-3, atol=1e-5)


def test_the_loss_scale_grows_after_enough_finite_steps():
    keras.config.set_dtype_policy("mixed_float16")

    def optimizer():
        return keras.optimizers.LossScaleOptimizer(
            kgc.ClippedOptimizer(keras.optimizers.SGD(1e-2), "absolute"),
            initial_scale=8.0,
            dynamic_growth_steps=3,
        )

    _, outer, step = build(2, optimizer)
    scales = []
    for _ in range(7):
        step(factors(2))
        scales.append(float(outer.dynamic_scale.numpy()))
    assert scales == [8, 8, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("replicas", [0, 2])
def test_fit_in_mixed_float16(replicas):
    """Through ClippedModel; the loss scale starts too high and finds its way down."""
    keras.config.set_dtype_policy("mixed_float16")
    model, history, got = train(
        replicas,
        lambda: keras.optimizers.SGD(0.05),
        compile_args={"clipper": kgc.NormClip(0.5)},
        scale=2000.0,
        epochs=4,
    )
    assert float(model.optimizer.dynamic_scale.numpy()) < 2.0**15
    assert find(model.optimizer).skipped_steps > 0
    assert np.isfinite(got).all()
    # The first epoch counts the few batches that were not skipped, if any.
    assert history["loss"][-1] < history["loss"][1]


def test_fit_in_mixed_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, history, _ = train(
        2,
        lambda: kgc.ClippedOptimizer(
            keras.optimizers.SGD(0.05), kgc.NormClip(0.5), skip_nonfinite=True
        ),
    )
    assert isinstance(model.optimizer, kgc.ClippedOptimizer)
    assert history["loss"][-1] > 0


def test_a_fixed_loss_scale_of_the_inner_optimizer():
    """Keras's `loss_scale_factor`: the clip sees unscaled gradients, the result is the same."""
    _, _, want = train(
        0, lambda: keras.optimizers.SGD(0.05), compile_args={"clipper": kgc.NormClip(0.5)}
    )
    _, _, got = train(
        2,
        lambda: keras.optimizers.SGD(0.05, loss_scale_factor=1024.0),
        compile_args={"clipper": kgc.NormClip(0.5)},
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_unknown_wrapper_that_scales_the_loss_cannot_bring_an_infinity_in():
    """If a future Keras wraps in another way, the update is still left out."""
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), "absolute")
    optimizer.loss_scale_factor = None  # what a wrapper does, from nobody we know
    v = keras.Variable([1.0, 2.0])
    optimizer.apply([tf.constant([np.inf, 1.0])], [v])
    np.testing.assert_array_equal(v.numpy(), [1.0, 2.0])
    assert optimizer.skipped_steps == 1
