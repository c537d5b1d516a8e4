"""Where the inner optimizer ignores a gradient's scale, what it applies is bounded."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
from helpers import data, loss, net, strategy, to64
from oracles import Clip, ReferenceUpdate, adam

import keras_gradclip as kgc

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("replicas are TensorFlow's; tests/backends has the others", allow_module_level=True)

piecewise = keras.optimizers.schedules.PiecewiseConstantDecay
SHAPES = {"a/kernel": (4, 3), "a/bias": (3,), "b/kernel": (3, 2), "b/bias": (2,)}
CLIPPERS = {
    "unit": kgc.UpdateRatioClip(5e-3),
    "layer": kgc.UpdateRatioClip(5e-3, scope="layer"),
    "chain": kgc.Chain([kgc.AbsoluteClip(0.5), kgc.UpdateRatioClip(5e-3)]),
    "map": kgc.ClipMap({"a/.*": kgc.UpdateRatioClip(5e-3)}, default=kgc.NormClip(0.5)),
    "annealed": kgc.UpdateRatioClip(5e-3, anneal="learning_rate"),
    "annealed map": kgc.ClipMap(
        {"a/.*": kgc.UpdateRatioClip(5e-3, anneal="learning_rate")}, default=kgc.NormClip(0.5)
    ),
}


@pytest.mark.parametrize(
    ("name", "replicas", "micro_steps"),
    [
        *(("unit", 0, 1), ("unit", 4, 2), ("layer", 2, 1), ("chain", 0, 2)),
        *(("map", 2, 1), ("annealed", 1, 1), ("annealed map", 2, 2)),
    ],
)
def test_against_the_reference(name, replicas, micro_steps):
    clipper, where = CLIPPERS[name], strategy(replicas)
    rates = [0.02, 0.1, 0.05, 0.01, 0.02, 0.01, 0.005, 0.001]
    if "annealed" not in name:
        rates = [0.1] * 8

    def inner(weight, g, slot, step):
        return adam(weight, g, slot, step, learning_rate=rates[step - 1])

    rng = np.random.default_rng(1)
    values = [rng.normal(size=shape).astype("float32") for shape in SHAPES.values()]
    with where.scope() if where else contextlib.nullcontext():
        variables = [
            keras.Variable(value, name=path.replace("/", "_"))
            for path, value in zip(SHAPES, values, strict=True)
        ]
        for variable, path in zip(variables, SHAPES, strict=True):
            variable._path = path
        optimizer = kgc.ClippedOptimizer(
            keras.optimizers.Adam(piecewise(range(7), rates)),
            clipper,
            gradient_accumulation_steps=micro_steps if micro_steps > 1 else None,
            skip_nonfinite=True,
        )
        optimizer.build(variables)
    reference = ReferenceUpdate(
        [value.astype("float64") for value in values],
        list(SHAPES),
        clip=Clip(clipper, rates.__getitem__, False),
        bound=Clip(clipper, rates.__getitem__, True),
        inner=inner,
        micro_steps=micro_steps,
        skip=True,
    )

    @tf.function(autograph=False)
    def step(grads):
        def replica():
            context = tf.distribute.get_replica_context()
            own = grads[int(tf.get_static_value(context.replica_id_in_sync_group)) if where else 0]
            optimizer.apply(own, variables)

        where.run(replica) if where else replica()

    for call in range(8):
        grads = [
            [rng.normal(size=shape).astype("float32") for shape in SHAPES.values()]
            for _ in range(max(replicas, 1))
        ]
        if call == 3:
            grads[-1][0][0, 0] = np.inf
        step([[tf.constant(g) for g in of_replica] for of_replica in grads])
        reference.call(grads)
    for variable, want in zip(variables, reference.weights, strict=True):
        for copy in getattr(variable.value, "values", [variable.value]):
            np.testing.assert_allclose(np.array(copy), want, rtol=2e-5, atol=2e-5)
    assert optimizer.skipped_steps == reference.skipped == 1


def trained(optimizer, steps=3, **compiled):
    model = net(keras.Model)
    model.compile(optimizer, loss(), **compiled)
    x, y = data(16)
    weights = [[to64(v) for v in model.trainable_variables]]
    for _ in range(steps):
        model.train_on_batch(x, y)
        weights.append([to64(v) for v in model.trainable_variables])
    return weights


OTHERS = ("Adam", "AdamW", "Lion")
MORE = ("RMSprop", "Lamb", "Nadam", "Adagrad", "Adamax", "Adafactor")


@pytest.mark.parametrize(
    ("name", "jit"),
    [
        *((name, False) for name in OTHERS),
        pytest.param("Adam", True, marks=pytest.mark.slow),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in MORE),
        pytest.param("RMSprop", True, marks=pytest.mark.slow),
    ],
)
def test_every_optimizer_is_bounded_and_out_of_reach_nothing_changes(name, jit):
    make = getattr(keras.optimizers, name)
    # Some take steps in proportion to the weights, and so none to clip for a bias near 0.
    biases = None if name in ("Lamb", "Adafactor") else "unit"
    wrapped = {
        ratio: kgc.ClippedOptimizer(
            make(0.1), kgc.UpdateRatioClip(ratio, biases=biases), telemetry=True
        )
        for ratio in (2e-3, 1e6)
    }
    plain = trained(kgc.ClippedOptimizer(make(0.1), None), jit_compile=jit)
    bounded, free = (trained(optimizer, jit_compile=jit) for optimizer in wrapped.values())
    # A limited Adam is computed by an equation, a free one by TensorFlow's operation.
    tolerance = 1e-5 if jit or name.startswith("Adam") else 0
    for a, b in zip(plain[-1], free[-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * tolerance, atol=tolerance)
    assert wrapped[1e6].read_telemetry()["clip_fraction"] == 0
    assert wrapped[2e-3].read_telemetry()["clip_fraction"] > 0.9
    decay = 0.1 * 0.004 if name == "AdamW" else 0.0
    for before, after in itertools.pairwise(bounded):
        for old, new in zip(before, after, strict=True):
            if old.ndim > 1:
                old = (1 - decay) * old  # decoupled decay is not bounded
                moved = np.linalg.norm((new - old).reshape(-1, old.shape[-1]), axis=0)
                size = np.linalg.norm(old.reshape(-1, old.shape[-1]), axis=0)
                assert (moved <= 2.001e-3 * np.maximum(size, 1e-3)).all()
                assert moved.max() > 1.99e-3 * size.min()


def test_the_moving_average_is_of_what_was_applied():
    optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)
    weights = trained(kgc.ClippedOptimizer(optimizer, kgc.UpdateRatioClip()), steps=1)
    # Keras begins with the weights after the first update.
    for average, weight in zip(optimizer._model_variables_moving_average, weights[1], strict=True):
        before = to64(average)
        assert np.abs(before - weight).max() <= 0.01 * max(np.abs(weight).max(), 0.2)


def test_a_monitor_sees_the_gradient_and_the_weights_of_before():
    monitor = kgc.ClipMonitor(every=1)
    model = net(keras.Model)
    model.compile(kgc.ClippedOptimizer(keras.optimizers.Adam(0.1), kgc.UpdateRatioClip()), loss())
    x, y = data(16)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[monitor])
    before, after = (np.array(monitor.history[f"norm_{when}"]) for when in ("before", "after"))
    np.testing.assert_array_equal(before, after)  # no gradient is clipped here
    assert np.max(monitor.history["clip_fraction"]) > 0.9


def test_calibrate_may_leave_the_weights_as_they_are():
    model = net(keras.Model)
    model.compile(kgc.ClippedOptimizer(keras.optimizers.Adam(0.1), kgc.UpdateRatioClip()), loss())
    x, y = data(32)
    before = [to64(v) for v in model.trainable_variables]
    found = kgc.calibrate(model, (x, y), steps=4, batch_size=8, follow=False)
    assert found.updates == 4 and all(found.thresholds["norm"].values())
    for old, v in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, to64(v))


def test_wrapped_a_second_time_there_is_one_bound():
    inner = keras.optimizers.Adam(0.1)
    kgc.ClippedOptimizer(inner, kgc.UpdateRatioClip(1e-5))
    weights = trained(kgc.ClippedOptimizer(inner, kgc.UpdateRatioClip(2e-3)), steps=1)
    old, new = weights[0][0], weights[1][0]
    moved = np.linalg.norm((new - old).reshape(-1, old.shape[-1]), axis=0)
    size = np.linalg.norm(old.reshape(-1, old.shape[-1]), axis=0)
    np.testing.assert_allclose((moved / size).max(), 2e-3, rtol=1e-3)


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("inner", ["adam", "sgd"])
def test_a_bias_is_bounded_by_its_kernel_of_before_the_update(units, inner):
    """Compiled with its clip, a kernel is new before its bias is bounded."""
    rows, kappa = 1 << 20, 0.5
    for compiled in ("auto", False):
        with keras.name_scope("d"):
            kernel = keras.Variable(np.full((rows, units), 1e-3, "float32"), name="kernel")
            bias = keras.Variable(np.zeros(units, "float32"), name="bias")
        make = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}[inner]
        clipper = kgc.UpdateRatioClip(kappa)
        optimizer = kgc.ClippedOptimizer(make(10.0), clipper, compiled=compiled)
        optimizer.build([kernel, bias])
        step = tf.function(optimizer.apply)
        step([tf.fill((rows, units), -1.0), tf.ones(units)])
        np.testing.assert_allclose(bias.numpy(), -kappa * 1e-3 * rows**0.5, rtol=1e-4)


def test_a_limit_counts_the_same_on_gradients_and_on_weight_updates():
    """One kernel of two is clipped, whatever its size."""
    fractions = []
    for inner in (keras.optimizers.SGD(1.0), keras.optimizers.Adam(1.0)):
        kernels = [
            keras.Variable(np.full(shape, size, "float32"), name=f"kernel{k}")
            for k, (shape, size) in enumerate([((100, 2), 1.0), ((2, 2), 1e6)])
        ]
        clipper = kgc.UpdateRatioClip(1e-3, scope="variable", biases=None)
        optimizer = kgc.ClippedOptimizer(inner, clipper, telemetry=True)
        optimizer.apply([np.ones(v.shape, "float32") for v in kernels], kernels)
        fractions.append(optimizer.read_telemetry()["clip_fraction"])
    assert fractions == [0.5, 0.5]
