"""An accumulated update is about the variables that had a gradient since the last one."""

import itertools

import keras
import numpy as np
import pytest
from helpers import strategy
from keras import ops

import keras_gradclip as kgc

IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
MAKERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.2),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.05, momentum=0.5),
}
#: The variables, of three, that each call names, over and over; a second phase names others.
PATTERNS = {
    "one after the other": [[0], [1], [2]],
    "out of step": [[0], [1]],
    "overlapping": [[0, 1], [1, 2], [0]],
    "frozen later": [[0, 1, 2]] * 7 + [[2]] * 8,
    "frozen and back": [[0, 1, 2]] * 5 + [[1]] * 6 + [[0, 1, 2]] * 4,
}


def weights():
    return [keras.Variable(np.full((3, 2), 1.0 + i, "float32"), name=f"v{i}") for i in range(3)]


def gradient(call, i):
    return np.random.default_rng([call, i]).normal(size=(3, 2)).astype("float32")


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def wanted(make, pattern, steps, calls):
    """Keras's own optimizer on the means, called with the variables that had a gradient."""
    ours, optimizer = weights(), make()
    optimizer.build(ours)
    sums = {}
    for call in range(calls):
        for i in pattern[call % len(pattern)]:
            sums[i] = sums.get(i, 0.0) + gradient(call, i)
        if (call + 1) % steps == 0:
            means = [ops.convert_to_tensor(g / steps) for g in sums.values()]
            optimizer.apply(means, [ours[i] for i in sums])
            sums = {}
    return values(ours)


def got(make, pattern, steps, calls, *, graph=False, replicas=0, with_none=False, **options):
    scope = strategy(replicas)
    options = {"clipper": kgc.NormClip(1e9), **options}

    def build():
        ours = weights()
        optimizer = kgc.ClippedOptimizer(make(), gradient_accumulation_steps=steps, **options)
        optimizer.build(ours)
        return ours, optimizer

    if scope is None:
        ours, optimizer = build()
    else:
        with scope.scope():
            ours, optimizer = build()

    def step_of(named):
        def apply(grads):
            if with_none:
                every = [grads[named.index(i)] if i in named else None for i in range(3)]
                optimizer.apply(every, ours)
            else:
                optimizer.apply(grads, [ours[i] for i in named])

        def step(grads):
            if scope is None:
                apply(grads)
            else:
                scope.run(lambda: apply([g / max(replicas, 1) for g in grads]))

        if not graph:
            return step
        import tensorflow as tf

        return tf.function(step)

    compiled = {}
    for call in range(calls):
        named = pattern[call % len(pattern)]
        step = compiled.setdefault(tuple(named), step_of(named))
        step([ops.convert_to_tensor(gradient(call, i)) for i in named])
    return values(ours)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
# Each pattern with each optimizer, and in turn with each number of steps.
@pytest.mark.parametrize(
    ("pattern", "name", "steps", "with_none"),
    [
        (*case, *((2, True), (3, False))[i % 2])
        for i, case in enumerate(itertools.product(PATTERNS, MAKERS))
    ],
)
def test_it_is_keras_on_what_was_named(pattern, steps, name, with_none):
    pattern = PATTERNS[pattern]
    want = wanted(MAKERS[name], pattern, steps, 15)
    for a, b in zip(got(MAKERS[name], pattern, steps, 15, with_none=with_none), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not IS_TENSORFLOW, reason="one traced function for each set of variables")
@pytest.mark.parametrize(
    ("pattern", "steps", "name", "replicas", "compiled"),
    [
        ("one after the other", 3, "AdamW", 0, "auto"),
        pytest.param("out of step", 3, "SGD", 0, False, marks=pytest.mark.slow),
        ("out of step", 3, "SGD", 2, "auto"),
        ("overlapping", 2, "RMSprop", 0, "auto"),
        pytest.param("frozen later", 3, "SGD", 0, "auto", marks=pytest.mark.slow),
        ("frozen and back", 2, "AdamW", 2, False),
        ("frozen later", 2, "limited", 0, "auto"),
        ("one after the other", 2, "limited", 2, "auto"),
    ],
)
def test_it_is_keras_in_graphs_and_on_replicas(pattern, steps, name, replicas, compiled):
    pattern = PATTERNS[pattern]
    options = {"graph": True, "replicas": replicas, "compiled": compiled, "skip_nonfinite": True}
    if name == "limited":  # its weight update is computed, limited and added
        options["clipper"] = kgc.UpdateRatioClip(1e6)
    make = MAKERS["AdamW" if name == "limited" else name]
    want = wanted(make, pattern, steps, 15)
    for a, b in zip(got(make, pattern, steps, 15, **options), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not IS_TENSORFLOW, reason="one traced function for each set of variables")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("name", "replicas"), [("AdamW", 0), ("SGD", 2)])
def test_a_function_traced_later_may_add(name, replicas):
    """As the losses of tasks drawn at random, with no gradient for another task's head."""
    pattern = [[0], [0], [1], [0], [1], [2], [1], [1], [0], [2]]
    want = wanted(MAKERS[name], pattern, 2, 20)
    ours = got(MAKERS[name], pattern, 2, 20, graph=True, replicas=replicas, with_none=True)
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("SGD", None), ("AdamW", 2), ("RMSprop", 3), ("EMA", 3)],
)
def test_what_is_frozen_in_a_second_fit_stays(name, steps):
    """Also where the first ended in the middle of an update."""
    if keras.backend.backend() == "jax":
        pytest.skip("Keras needs all variables of an optimizer there")
    makers = {**MAKERS, "EMA": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)}
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    inputs = keras.Input((4,))
    head = keras.layers.Dense(1, name="head")
    model = keras.Model(inputs, head(keras.layers.Dense(3, name="body")(inputs)))
    optimizer = kgc.ClippedOptimizer(makers[name](), "norm", gradient_accumulation_steps=steps)
    model.compile(optimizer, "mse")
    model.fit(x, 5 * x[:, :1], batch_size=16, epochs=2, verbose=0)
    model.get_layer("body").trainable = False
    model.compile(optimizer, "mse")
    before = model.get_layer("body").get_weights(), head.get_weights()
    model.fit(x, 5 * x[:, :1], batch_size=16, epochs=2, verbose=0)
    for a, b in zip(model.get_layer("body").get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(head.get_weights()[0] - before[1][0]).max() > 0


def test_a_file_of_before_has_what_was_added_up():
    """Its flags say which variable ever had a gradient, not which has since the last update."""
    stores = {}
    for steps_done in (2, 3):
        ours = weights()
        optimizer = kgc.ClippedOptimizer(MAKERS["SGD"](), None, gradient_accumulation_steps=2)
        optimizer.build(ours)
        for call in range(steps_done):
            optimizer.apply([ops.convert_to_tensor(gradient(call, 0))], ours[:1])
        optimizer.save_own_variables(stores.setdefault(steps_done, {}))
        flags = np.zeros((2, 3), "float32")
        flags[0, 0] = 1.0
        stores[steps_done]["touched"] = flags
    for steps_done, store in stores.items():
        ours = weights()
        optimizer = kgc.ClippedOptimizer(MAKERS["SGD"](), None, gradient_accumulation_steps=2)
        optimizer.build(ours)
        optimizer.load_own_variables(store)
        before = values(ours)
        for call in range(steps_done % 2, 2):
            optimizer.apply([ops.convert_to_tensor(gradient(call, 1))], [ours[1]])
        moved = [not np.array_equal(a, b) for a, b in zip(before, values(ours), strict=True)]
        assert moved == [steps_done == 3, True, False]


def test_a_gradient_of_zero_counts_also_after_loading():
    """Weight decay is due to what had a gradient, whatever its size."""
    results = []
    for is_saved in (False, True):
        ours = weights()
        optimizer = kgc.ClippedOptimizer(MAKERS["SGD"](), None, gradient_accumulation_steps=2)
        optimizer.build(ours)
        optimizer.apply([ops.zeros((3, 2))], ours[:1])
        if is_saved:
            store = {}
            optimizer.save_own_variables(store)
            optimizer = kgc.ClippedOptimizer(MAKERS["SGD"](), None, gradient_accumulation_steps=2)
            optimizer.build(ours)
            optimizer.load_own_variables(store)
        optimizer.apply([ops.ones((3, 2))], ours[1:2])
        results.append(values(ours))
    for through, resumed in zip(*results, strict=True):
        np.testing.assert_array_equal(through, resumed)
    np.testing.assert_allclose(results[0][0], 0.99, rtol=1e-6)
