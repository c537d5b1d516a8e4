"""The inner optimizer: entered by the methods that it overrides, and changed only meanwhile."""

import contextlib
import copy
import pickle

import keras
import numpy as np
import pytest
from helpers import data, loss, net, strategy, weights
from keras import ops

import keras_gradclip as kgc

IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
MAKERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "AdamW": lambda: keras.optimizers.AdamW(0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.1),
    "Nadam": lambda: keras.optimizers.Nadam(0.1),
    "EMA": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
}


def look_of(optimizer):
    """The names and values of what an object has, its variables apart."""
    return {
        name: value if isinstance(value, (int, float, str, type(None))) else type(value)
        for name, value in vars(optimizer).items()
    }


def compiled(optimizer, replicas, model_class=keras.Model, **arguments):
    model = net(model_class)
    model.compile(optimizer, loss(), **arguments)
    return model


def fit(model, epochs):
    x, y = data(24)
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clipper", ["absolute", "update_ratio", "auto"])
def test_an_update_leaves_the_inner_optimizer_as_it_was(name, clipper):
    alone, inner = MAKERS[name](), MAKERS[name]()
    optimizer = kgc.ClippedOptimizer(inner, clipper)
    for built in (alone, optimizer):
        ours = [keras.Variable(np.ones((3, 2), "float32"))]
        built.build(ours)
        built.apply([ops.ones((3, 2))], ours)
    before, after = look_of(alone), look_of(inner)
    assert {**after, "_name": None, "name": None} == {**before, "_name": None, "name": None}
    assert inner.get_config() == {**alone.get_config(), "name": inner.name}


class Failing(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("replicas", [0, 2])
def test_an_error_in_the_middle_leaves_it_as_it_was(replicas):
    scope = strategy(replicas)
    inner = Failing(0.1, use_ema=True, ema_overwrite_frequency=2)
    if scope:
        with scope.scope():
            inner = Failing(0.1, use_ema=True, ema_overwrite_frequency=2)
            optimizer = kgc.ClippedOptimizer(inner, "absolute")
            ours = [keras.Variable(np.ones((3, 2), "float32"))]
            optimizer.build(ours)
        run = lambda: scope.run(lambda: optimizer.apply([ops.ones((3, 2))], ours))  # noqa: E731
    else:
        optimizer = kgc.ClippedOptimizer(inner, "absolute")
        ours = [keras.Variable(np.ones((3, 2), "float32"))]
        optimizer.build(ours)
        run = lambda: optimizer.apply([ops.ones((3, 2))], ours)  # noqa: E731
    before = look_of(inner)
    with pytest.raises(RuntimeError, match="in the middle"):
        run()
    assert look_of(inner) == before
    assert inner.ema_overwrite_frequency == 2


@pytest.mark.parametrize(
    ("name", "replicas"), [("SGD", 0), pytest.param("AdamW", 2, marks=pytest.mark.slow)]
)
def test_taken_out_again_it_is_keras_own(replicas, name):
    """After phases under a clip that clips nothing, on replicas and without."""

    def trained(ways, epochs=1):
        model = compiled(MAKERS[name](), replicas)
        for way in ways:
            inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
            wrapped = {
                "bare": lambda: inner,  # noqa: B023
                "wrapped": lambda: kgc.ClippedOptimizer(inner, kgc.NormClip(1e9)),  # noqa: B023
                "Keras's kernels": lambda: kgc.ClippedOptimizer(inner, None, compiled=False),  # noqa: B023
            }[way]()
            model.compile(wrapped, loss())
            fit(model, epochs)
        if replicas:
            for v in model.variables:
                first, *others = (copy.numpy() for copy in v.value.values)
                assert all(np.array_equal(first, other) for other in others), v.path
        return weights(model)

    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        want = trained(["bare"], epochs=5)
        got = trained(["wrapped", "bare", "Keras's kernels", "wrapped", "bare"])
    np.testing.assert_allclose(got, want, atol=2e-4 if name == "AdamW" else 1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_after_an_update_is_independent(copied):
    ours = [keras.Variable([1.0])]
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.5))
    optimizer.build(ours)
    optimizer.apply([ops.ones(1)])
    other = copied(optimizer)
    theirs = [keras.Variable([1.0])]
    other.build(theirs)
    other.inner_optimizer.learning_rate = 0.1
    other.apply([ops.ones(1)], theirs)
    optimizer.apply([ops.ones(1)])
    np.testing.assert_allclose(ops.convert_to_numpy(ours[0]), [0.0], atol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(theirs[0]), [0.95], atol=1e-6)


# Methods of a subclass ---------------------------------------------------------------------------


def counting(method):
    """An SGD that overrides a method, and the calls of it."""
    calls = []

    def override(self, *args, **kwargs):
        calls.append(method)
        return getattr(super(Own, self), method)(*args, **kwargs)

    Own = type("Own", (keras.optimizers.SGD,), {method: override})
    return Own, calls


@pytest.mark.parametrize("compiled", ["auto", False])
@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize(
    "method",
    ["apply_gradients", "apply", "update_step", "assign_sub", "build", "finalize_variable_values"],
)
def test_a_method_that_a_subclass_overrides_is_called_once(method, steps, compiled):
    """An update; `build` and `finalize_variable_values` once in all."""
    Own, calls = counting(method)
    optimizer = kgc.ClippedOptimizer(
        Own(0.1), "absolute", gradient_accumulation_steps=steps, compiled=compiled
    )
    weight = keras.Variable([1.0])
    for _ in range(3 * (steps or 1)):
        optimizer.apply_gradients([(ops.ones(1), weight)])
    optimizer.finalize_variable_values([weight])
    want = 1 if method in ("build", "finalize_variable_values") else 3
    if method == "assign_sub" and not IS_TENSORFLOW:
        want = 3 if calls else 0  # PyTorch updates lists of variables
    assert len(calls) == want


@pytest.mark.parametrize("method", ["apply_gradients", "apply", "update_step"])
@pytest.mark.parametrize("replicas", [0, 2])
def test_what_a_subclass_does_to_gradients_is_done_to_the_clipped_sum(method, replicas):
    if keras.backend.backend() == "torch" and method == "update_step":
        pytest.skip("PyTorch updates lists of variables")

    def halved(self, *args):
        gradients, *others = args
        if method == "apply_gradients":
            arguments = [[(0.5 * g, v) for g, v in gradients]]
        elif method == "apply":
            arguments = [[0.5 * g for g in gradients], *others]
        else:
            arguments = [0.5 * gradients, *others]
        return getattr(super(Own, self), method)(*arguments)

    Own = type("Own", (keras.optimizers.SGD,), {method: halved})
    scope = strategy(replicas)

    def build():
        optimizer = kgc.ClippedOptimizer(Own(1.0), kgc.AbsoluteClip(0.5))
        weight = keras.Variable([1.0])
        optimizer.build([weight])
        return optimizer, weight

    if scope is None:
        optimizer, weight = build()
        optimizer.apply([ops.ones(1)], [weight])
    else:
        with scope.scope():
            optimizer, weight = build()
        scope.run(lambda: optimizer.apply([ops.ones(1)], [weight]))
    np.testing.assert_allclose(ops.convert_to_numpy(weight), [0.75])


@pytest.mark.parametrize("method", ["apply", "apply_gradients", "update_step", "assign_sub"])
def test_a_method_that_was_set_on_the_object_is_called(method):
    inner, calls = keras.optimizers.SGD(0.1), []
    optimizer = kgc.ClippedOptimizer(inner, kgc.AbsoluteClip(0.5))
    own = getattr(inner, method)
    setattr(inner, method, lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1])
    weight = keras.Variable([1.0])
    optimizer.apply([ops.ones(1)], [weight])
    np.testing.assert_allclose(ops.convert_to_numpy(weight), [0.95])
    if IS_TENSORFLOW:
        assert len(calls) == 1
        assert optimizer.compiled == f"no: {method} was set on this SGD"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone calls it")
def test_a_stateless_apply_of_ones_own_is_refused():
    Own, _ = counting("stateless_apply")
    with pytest.raises(ValueError, match=r"Own.*stateless_apply"):
        kgc.ClippedOptimizer(Own(0.1))


@pytest.mark.skipif(not IS_TENSORFLOW, reason="replaced on TensorFlow alone")
def test_a_loss_scale_of_ones_own_applies_by_its_own_method():
    calls = []

    class Own(keras.optimizers.LossScaleOptimizer):
        def apply(self, grads, trainable_variables=None):
            calls.append(1)
            super().apply(grads, trainable_variables)

    weight = keras.Variable([1.0])
    optimizer = Own(kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), kgc.AbsoluteClip(0.5)))
    optimizer.build([weight])
    optimizer.apply([ops.convert_to_tensor([np.inf])], [weight])
    optimizer.apply([ops.full((1,), 1e5)], [weight])
    assert calls == [1, 1]
    assert optimizer.inner_optimizer.skipped_steps == 1
    np.testing.assert_allclose(ops.convert_to_numpy(weight), [0.5])


class Signs(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * ops.sign(gradient))


class Hundredfold(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply([100.0 * g for g in grads], trainable_variables)


@pytest.mark.parametrize("Own", [Signs, Hundredfold, keras.optimizers.SGD])
def test_a_limit_holds_for_the_update_of_a_subclass_of_sgd(Own):
    if keras.backend.backend() == "torch" and Own is Signs:
        pytest.skip("PyTorch updates lists of variables")
    weight = keras.Variable(np.ones((4, 2), "float32"), name="kernel")
    optimizer = kgc.ClippedOptimizer(Own(0.1, momentum=0.0), kgc.UpdateRatioClip(0.01))
    optimizer.apply([ops.ones((4, 2))], [weight])
    moved = np.linalg.norm(ops.convert_to_numpy(weight) - 1.0, axis=0)
    np.testing.assert_allclose(moved, 0.01 * 2.0, rtol=1e-4)
