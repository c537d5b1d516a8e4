"""The compiled update against Keras's own: weights and slots after 20 steps."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from helpers import strategy

tf = pytest.importorskip("tensorflow")

import keras_gradclip as kgc  # noqa: E402
from keras_gradclip import _arithmetic as arithmetic  # noqa: E402
from keras_gradclip.clippers.base import selectable  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*Muon:UserWarning")

optimizers = keras.optimizers
SCHEDULE = optimizers.schedules.ExponentialDecay(0.01, 5, 0.9)
BY_KERNELS = {
    "SGD": functools.partial(optimizers.SGD, 0.1),
    "momentum": functools.partial(optimizers.SGD, 0.05, momentum=0.9),
    "nesterov, schedule": functools.partial(optimizers.SGD, SCHEDULE, momentum=0.9, nesterov=True),
    "momentum, decay": functools.partial(optimizers.SGD, 0.05, momentum=0.9, weight_decay=0.01),
    "Adam": optimizers.Adam,
    "Adam, AMSGrad, EMA": functools.partial(
        optimizers.Adam, 0.01, amsgrad=True, use_ema=True, ema_overwrite_frequency=7
    ),
    "AdamW": functools.partial(optimizers.AdamW, SCHEDULE, weight_decay=0.1),
    "Adamax": functools.partial(optimizers.Adamax, 0.01),
    "Adadelta": functools.partial(optimizers.Adadelta, 1.0),
}
BY_XLA = {
    "Adagrad": functools.partial(optimizers.Adagrad, 0.01),
    "Ftrl": functools.partial(optimizers.Ftrl, 0.01, l1_regularization_strength=1e-3),
    "Lion": functools.partial(optimizers.Lion, 0.01, weight_decay=0.01),
    "Nadam": functools.partial(optimizers.Nadam, 0.01),
    "RMSprop": functools.partial(optimizers.RMSprop, 0.01, momentum=0.9, centered=True),
}
INSISTED = {
    "Lamb": functools.partial(optimizers.Lamb, 0.01),
    "Adafactor": functools.partial(optimizers.Adafactor, 0.01),
    "Muon": functools.partial(optimizers.Muon, 0.01),
}
if hasattr(optimizers, "ScheduleFreeAdamW"):
    INSISTED["ScheduleFreeAdamW"] = functools.partial(optimizers.ScheduleFreeAdamW, 0.01)
SHAPES = ((7, 5), (3, 3, 2, 4), (5,), ())


def variables(shapes=SHAPES, **arguments):
    rng = np.random.default_rng(0)
    return [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=f"v{i}", **arguments)
        for i, shape in enumerate(shapes)
    ]


def trained(
    make,
    compiled,
    *,
    shapes=SHAPES,
    steps=20,
    graph=True,
    clipper=None,
    excluded=True,
    replicas=0,
):
    """Weights and states after some steps, and the optimizer."""
    devices = strategy(replicas) or tf.distribute.get_strategy()
    with devices.scope():
        ours = variables(shapes)
        optimizer = kgc.ClippedOptimizer(make(), clipper, compiled=compiled)
        if excluded and optimizer.inner_optimizer.weight_decay:
            optimizer.exclude_from_weight_decay(ours[:1])
        optimizer.build(ours)

    def step(gradients):
        devices.run(lambda: optimizer.apply([tf.identity(g) for g in gradients]))  # its own each

    step = tf.function(step, autograph=False) if graph else step
    rng = np.random.default_rng(1)
    for _ in range(steps):
        step([tf.constant(rng.normal(size=shape), tf.float32) for shape in shapes])
    for variable in (*ours, *optimizer.variables):
        first, *others = map(np.array, devices.experimental_local_results(variable.value))
        assert all(np.array_equal(first, other) for other in others), variable.path
    return [np.array(v) for v in (*ours, *optimizer.inner_optimizer.variables)], optimizer


def assert_equal(ours, keras_own, tolerance=2e-6):
    for x, y in zip(ours, keras_own, strict=True):
        scale = np.max(np.abs(y), initial=0.0)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


@functools.cache
def trained_by_keras(make, **arguments):
    values, plain = trained(make, False, **arguments)
    assert plain.compiled == "no: compiled=False"
    return values


def assert_parity(make, compiled="auto", tolerance=2e-6, **arguments):
    ours, optimizer = trained(make, compiled, **arguments)
    assert optimizer.compiled == "yes", optimizer.compiled
    assert_equal(ours, trained_by_keras(make, **arguments), tolerance)


# Adam's kernels take 1 - β2 in float32, 1.3e-5 off Keras's: it shows in the second moments.
@pytest.mark.parametrize("compiled", ["auto", True])
@pytest.mark.parametrize("name", BY_KERNELS)
def test_kernels_do_what_keras_does(name, compiled):
    """Small variables under "auto" by equations where there is one, else by operations."""
    assert_parity(BY_KERNELS[name], compiled, 2e-5 if name.startswith("Adam") else 2e-6)


def test_adams_weights_are_keras_own():
    ours, _ = trained(BY_KERNELS["Adam"], "auto")
    keras_own, _ = trained(BY_KERNELS["Adam"], False)
    assert_equal(ours[: len(SHAPES)], keras_own[: len(SHAPES)])


def test_xla_does_what_keras_does():
    assert_parity(BY_XLA["Lion"], True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BY_XLA, *INSISTED])
def test_xla_does_what_keras_does_for_every_optimizer(name):
    shapes = ((7, 5), (4, 6)) if name == "Muon" else SHAPES
    assert_parity({**BY_XLA, **INSISTED}[name], True, shapes=shapes)


@pytest.mark.parametrize(("name", "replicas"), [("momentum", 2), ("RMSprop", 4)])
def test_each_replica_does_what_keras_does(name, replicas):
    make = {**BY_KERNELS, **BY_XLA}[name]
    assert_parity(make, True, replicas=replicas, steps=6, clipper="absolute")


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_XLA)
def test_each_replica_does_what_keras_does_for_every_optimizer(name):
    averaged = functools.partial(BY_XLA[name], use_ema=True, ema_overwrite_frequency=7)
    assert_parity(averaged, True, replicas=2)


@pytest.mark.parametrize("compiled", [True, "auto"])
def test_replicas_follow_a_schedule(compiled):
    make = functools.partial(optimizers.RMSprop, SCHEDULE)
    ours, optimizer = trained(make, compiled, replicas=2, steps=6)
    keras_own, _ = trained(make, False, replicas=2, steps=6)
    assert (optimizer.compiled == "yes") == (compiled is True)
    assert_equal(ours, keras_own)


def test_replicas_leave_small_variables_to_keras():
    assert_parity(BY_XLA["Nadam"], shapes=((1500, 1400), (5,)), replicas=2, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSISTED)
def test_who_insists_has_it_on_replicas_too(name):
    shapes = ((7, 5), (4, 6)) if name == "Muon" else SHAPES
    assert_parity(INSISTED[name], True, shapes=shapes, replicas=2, steps=6)


def test_an_unknown_update_is_refused_on_replicas():
    _, optimizer = trained(ThroughPython, "auto", replicas=2, steps=1)
    assert "not known to gain" in optimizer.compiled
    with pytest.raises(ValueError, match="not Keras's, and there are several replicas"):
        trained(ThroughPython, True, replicas=2, steps=1)


def test_eager_updates_are_compiled_by_kernels():
    assert_parity(BY_KERNELS["momentum"], steps=3, graph=False)


def taken(make, change, wrapped, *, graph):
    """Weights after updates before and after a setting of the optimizer is changed."""
    ours = variables(SHAPES[:2])
    inner = make()
    optimizer = kgc.ClippedOptimizer(inner, "exponential") if wrapped else inner
    optimizer.build(ours)
    gradients = [tf.constant(0.1 * np.cos(v.numpy())) for v in ours]
    for settings in ({}, change):
        for name, value in settings.items():
            setattr(inner, name, value)
        step = tf.function(lambda: optimizer.apply(gradients)) if graph else None
        for _ in range(3):
            step() if step else optimizer.apply(gradients)
    return [v.numpy() for v in ours]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("make", "change"),
    [
        ("momentum", {"momentum": 0.0}),
        ("momentum", {"momentum": 0.5}),
        ("momentum", {"nesterov": True}),
        ("nesterov, schedule", {"momentum": 0.0}),
        ("momentum, decay", {"momentum": 0.0, "weight_decay": None}),
        ("Adam", {"weight_decay": 0.1}),
        ("Adam, AMSGrad, EMA", {"amsgrad": False}),
        ("AdamW", {"weight_decay": None, "beta_1": 0.5}),
    ],
)
def test_a_setting_may_change_between_updates(make, change, graph):
    got, want = (taken(BY_KERNELS[make], change, wrapped, graph=graph) for wrapped in (True, False))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (functools.partial(optimizers.SGD, 0.1), {"momentum": 0.9}),
        (functools.partial(optimizers.Adam, 0.1), {"amsgrad": True}),
    ],
)
def test_a_setting_that_needs_what_was_never_made_fails_as_in_keras(make, change):
    errors = []
    for wrapped in (True, False):
        with pytest.raises((IndexError, AttributeError)) as caught:
            taken(make, change, wrapped, graph=False)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("floatx", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["schedule", "function", "number"])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_a_learning_rate_of_any_type_decays_weights_as_in_keras(name, kind, floatx):
    class Falling(optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return tf.constant(0.1, tf.float64) / (1.0 + tf.cast(step, tf.float64))

    rates = {"schedule": Falling(), "function": lambda: tf.constant(0.1, tf.float64), "number": 0.1}

    def run(wrapped):
        inner = getattr(optimizers, name)(rates[kind], weight_decay=0.1)
        optimizer = kgc.ClippedOptimizer(inner) if wrapped else inner
        weight = keras.Variable(np.linspace(-1, 1, 12).reshape(4, 3), dtype=floatx)
        optimizer.build([weight])
        for _ in range(3):
            optimizer.apply([tf.ones((4, 3), floatx)])
        return weight.numpy()

    keras.config.set_floatx(floatx)
    try:
        rtol = 2e-6 if floatx == "float32" else 1e-13
        if name == "AdamW":
            rtol = 1e-4  # Keras rounds its constants to float32
        np.testing.assert_allclose(run(True), run(False), rtol=rtol)
    finally:
        keras.config.set_floatx("float32")


def test_a_clipper_with_a_state_in_front():
    assert_parity(BY_KERNELS["momentum"], clipper=kgc.PercentileClip(50, window=4), steps=6)


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_nan_and_infinity_go_where_they_went(name):
    ours = {}
    for compiled in (False, "auto"):
        weight = keras.Variable(np.ones(4, "float32"))
        optimizer = kgc.ClippedOptimizer(BY_KERNELS[name](), "absolute", compiled=compiled)
        optimizer.apply([tf.constant([np.nan, np.inf, -np.inf, 1.0])], [weight])
        ours[compiled] = np.array(weight)
    assert np.isnan(ours["auto"][0]) and np.isfinite(ours["auto"][1:]).all()
    np.testing.assert_allclose(ours["auto"], ours[False], rtol=2e-6)


def sparse_and_dense(compiled):
    table, bias = (
        keras.Variable(np.ones((6, 2), "float32"), name="embeddings"),
        keras.Variable(np.ones(2, "float32"), name="bias"),
    )
    optimizer = kgc.ClippedOptimizer(BY_KERNELS["momentum"](), "absolute", compiled=compiled)
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 3]), tf.constant([6, 2]))
    for _ in range(3):
        optimizer.apply([rows, tf.ones(2)], [table, bias])
    return [np.array(table), np.array(bias)], optimizer


def test_sparse_rows_alone_are_left_to_keras():
    ours, optimizer = sparse_and_dense("auto")
    keras_own, _ = sparse_and_dense(False)
    assert optimizer.compiled == "yes, except sparse gradient of embeddings"
    assert_equal(ours, keras_own)


def test_who_insists_is_told_what_cannot_be_compiled():
    with pytest.raises(ValueError, match="sparse gradient of embeddings"):
        sparse_and_dense(True)
    with pytest.raises(ValueError, match="`compiled` must be one of"):
        kgc.ClippedOptimizer("sgd", compiled="always")


class ThroughPython(keras.optimizers.SGD):
    """An update that XLA cannot take."""

    def update_step(self, gradient, variable, learning_rate):
        """SGD by way of NumPy."""
        step = tf.numpy_function(lambda g: np.float32(0.1) * g, [gradient], tf.float32)
        self.assign_sub(variable, tf.ensure_shape(step, variable.shape))


def test_an_optimizer_that_xla_refuses():
    _, optimizer = trained(ThroughPython, "auto", steps=1)
    assert optimizer.compiled.startswith("no: ThroughPython is not known to gain")
    with pytest.raises(ValueError, match=r"XLA does not know .*PyFunc"):
        trained(ThroughPython, True, steps=1)


def test_what_is_too_small_is_not_compiled():
    _, optimizer = trained(BY_XLA["Lion"], "auto", steps=1)
    assert "too few" in optimizer.compiled


def test_the_choice_is_saved_and_undone_by_the_next_wrapper():
    inner = keras.optimizers.SGD(0.1)
    optimizer = kgc.ClippedOptimizer(inner, "absolute", compiled=True)
    assert optimizer.compiled == "yes"
    again = kgc.ClippedOptimizer.from_config(optimizer.get_config())
    assert again.get_config()["compiled"] is True
    weight = keras.Variable(np.ones(3, "float32"))
    kgc.ClippedOptimizer(inner, "absolute", compiled=False).build([weight])
    graph = tf.function(lambda: inner.apply([tf.ones(3)])).get_concrete_function().graph
    assert not [op for op in graph.get_operations() if op.type.startswith("ResourceApply")]


# The clip on the way ------------------------------------------------------------------------------

#: One that limits gradients, of those that read the weights; the others limit weight updates.
ON_THE_WAY = {
    "exponential": kgc.ExponentialClip(0.7, gamma=0.3),
    "update ratio": kgc.UpdateRatioClip(0.01, biases=None),
    "update ratio, variable": kgc.UpdateRatioClip(0.01, scope="variable"),
    "update ratio, biases, anneal": kgc.UpdateRatioClip(0.01, anneal="learning_rate"),
    "map of bounds": kgc.ClipMap(
        [("[ad]/.*", kgc.UpdateRatioClip(0.01)), (".*", kgc.AdaptiveClip(0.05))]
    ),
    "chain": kgc.Chain([kgc.NormClip(0.5), kgc.UpdateRatioClip(0.01)]),
    "two bounds": kgc.Chain([kgc.UpdateRatioClip(0.01), kgc.UpdateRatioClip(0.005)]),
}
LAYERS = {
    **{"a/kernel": (16, 3), "a/bias": (3,), "b/kernel": (3, 3, 2, 4), "c/gamma": (4,)},
    **{"d/kernel": (16, 3), "d/bias": (3,)},  # of one shape with the first: they share programs
}


def clipped(inner, clipper, compiled=True, *, replicas=0, steps=5, **arguments):
    """Weights, states and clip fractions after some steps; and the last graph."""
    devices = strategy(replicas) or tf.distribute.get_strategy()
    rng = np.random.default_rng(0)
    with devices.scope():
        ours = []
        for path, shape in LAYERS.items():
            layer, _, name = path.rpartition("/")
            with keras.name_scope(layer):
                value = rng.normal(size=shape).astype("float32")
                ours.append(keras.Variable(value, name=name))
        optimizer = kgc.ClippedOptimizer(
            BY_KERNELS[inner](), clipper, compiled=compiled, telemetry=True, **arguments
        )
        optimizer.build(ours)

    @tf.function(autograph=False)
    def step(gradients):
        devices.run(lambda: optimizer.apply([tf.identity(g) for g in gradients]))

    for scale in np.geomspace(0.01, 10, steps):
        step([tf.constant(scale * rng.normal(size=s), tf.float32) for s in LAYERS.values()])
    for variable in (*ours, *optimizer.variables):
        first, *others = map(np.array, devices.experimental_local_results(variable.value))
        assert all(np.array_equal(first, other) for other in others), variable.path
    figures = optimizer.read_telemetry()
    values = [np.array(v) for v in (*ours, *optimizer.inner_optimizer.variables)]
    return [*values, figures["layer_clip_fraction"], figures["layer_grad_norm"]], step


# Each clipper, and around Adam a limit of each kind: on gradients, on weight updates, on both.
QUICK = [
    *(("momentum", name) for name in ON_THE_WAY),
    *(("Adam, AMSGrad, EMA", name) for name in ("exponential", "map of bounds", "chain")),
]


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        pytest.param(inner, name, marks=() if (inner, name) in QUICK else pytest.mark.slow)
        for inner in ("momentum", "Adam, AMSGrad, EMA", "SGD", "nesterov, schedule")
        for name in ON_THE_WAY
    ],
)
def test_a_clip_on_the_way_is_the_clip(inner, name):
    tolerance = 2e-5 if inner.startswith("Adam") else 2e-6  # see above
    ours, _ = clipped(inner, ON_THE_WAY[name])
    keras_own, _ = clipped(inner, ON_THE_WAY[name], False)
    assert_equal(ours, keras_own, tolerance)


@pytest.mark.parametrize(
    ("inner", "name", "replicas"),
    [
        ("AdamW", "exponential", 2),
        ("Adam, AMSGrad, EMA", "update ratio", 0),
        ("AdamW", "update ratio, biases, anneal", 0),
    ],
)
def test_small_variables_are_written_out(name, inner, replicas):
    """No kernel and no program: a small variable has neither time to earn."""
    ours, _ = clipped(inner, ON_THE_WAY[name], "auto", replicas=replicas)
    keras_own, _ = clipped(inner, ON_THE_WAY[name], False, replicas=replicas)
    assert_equal(ours, keras_own, 2e-6)


@pytest.mark.parametrize(
    ("inner", "name"),
    [("momentum, decay", "exponential"), ("AdamW", "update ratio, biases, anneal")],
)
def test_a_clip_sees_the_weights_before_their_decay(inner, name):
    ours, _ = clipped(inner, ON_THE_WAY[name])
    keras_own, _ = clipped(inner, ON_THE_WAY[name], False)
    assert_equal(ours, keras_own, 2e-5 if inner == "AdamW" else 2e-6)


@pytest.mark.parametrize(
    ("inner", "name", "replicas"),
    [
        ("momentum", "update ratio, biases, anneal", 2),
        ("Adam", "map of bounds", 2),
        *(
            pytest.param(inner, name, n, marks=pytest.mark.slow)
            for inner, name in (("momentum", "exponential"), ("Adam", "update ratio"))
            for n in (1, 4)
        ),
    ],
)
def test_each_replica_clips_on_the_way(inner, name, replicas):
    many = {"replicas": replicas, "skip_nonfinite": True, "gradient_accumulation_steps": 2}
    ours, _ = clipped(inner, ON_THE_WAY[name], steps=6, **many)
    keras_own, _ = clipped(inner, ON_THE_WAY[name], False, steps=6, **many)
    assert_equal(ours, keras_own, 2e-5 if inner == "Adam" else 2e-6)


@pytest.mark.parametrize(
    ("make", "clipper"), [(BY_KERNELS["momentum"], "absolute"), (BY_KERNELS["Adam"], "adaptive")]
)
def test_variables_on_two_devices_without_a_strategy(make, clipper):
    got, optimizer = trained_on_two_devices(make, clipper, True)
    assert optimizer.compiled == "yes"
    assert_equal(got, trained_on_two_devices(make, clipper, False)[0], tolerance=2e-5)
    with pytest.raises(ValueError, match="variables on several devices"):
        trained_on_two_devices(BY_XLA["Lion"], clipper, True)


def trained_on_two_devices(make, clipper, compiled):
    ours = []
    for i in range(2):
        with tf.device(f"CPU:{i}"):
            ours += variables(((6, 3),))
    optimizer = kgc.ClippedOptimizer(make(), clipper, compiled=compiled)
    step = tf.function(lambda: optimizer.apply([tf.ones((6, 3))] * 2, ours), autograph=False)
    step()
    step()
    assert [v.value.device[-1] for v in ours] == ["0", "1"]
    return [v.numpy() for v in ours], optimizer


@pytest.mark.parametrize("accumulate", (None, 2))
def test_variables_of_tensorflow(accumulate):
    def trained(step_of):
        variables = [tf.Variable(tf.ones((4, 3))), tf.Variable(tf.ones((2, 2)))]
        optimizer = kgc.ClippedOptimizer(
            optimizers.Adam(0.1), kgc.UpdateRatioClip(1e-2), accumulate
        )
        step = step_of(lambda: optimizer.apply([2.0 * v for v in variables], variables))
        for _ in range(4):
            step()
        return [v.numpy() for v in variables]

    eager, traced = trained(lambda step: step), trained(tf.function)
    np.testing.assert_allclose(traced[0], eager[0], rtol=1e-6)
    np.testing.assert_allclose(traced[0], 0.99 ** (4 // (accumulate or 1)), rtol=1e-5)
    np.testing.assert_allclose(traced[1], eager[1], rtol=1e-6)


def test_whoever_watches_sees_what_was_clipped():
    class Seen:
        state = ()

        def on_update(self, update):
            self.clipped = [tuple(g.shape) for g in update.clipped]

    ours = variables()
    optimizer = kgc.ClippedOptimizer(BY_KERNELS["momentum"](), "absolute", compiled=True)
    optimizer.build(ours)
    watcher = Seen()
    optimizer.watch(watcher)
    tf.function(lambda: optimizer.apply([tf.ones(v.shape) for v in ours]), autograph=False)()
    assert watcher.clipped == [tuple(v.shape) for v in ours]


LARGE = {
    "units": kgc.UpdateRatioClip(),
    "gradient and update": kgc.Chain([kgc.AdaptiveClip(0.01), kgc.UpdateRatioClip()]),
    "several": kgc.ClipMap(
        {"first/.*": kgc.UpdateRatioClip(1e-3), "second/.*": kgc.UpdateRatioClip(5e-3)},
        default=kgc.NormClip(0.1),
    ),
    "twice": kgc.Chain([kgc.UpdateRatioClip(), kgc.UpdateRatioClip(1e-3, biases=None)]),
}


def trained_large(make, clipper, compiled, replicas=0, watched=True):
    """The weights, the optimizer and the monitor's samples of a network with large kernels."""
    keras.utils.set_random_seed(0)
    where = strategy(replicas)
    with where.scope() if where else contextlib.nullcontext():
        layers = [
            keras.layers.Dense(1024, "tanh", name=name, kernel_initializer="he_normal")
            for name in ("first", "second", "third")
        ]
        model = keras.Sequential(
            [keras.Input((256,), name="x"), *layers, keras.layers.Dense(2, name="head")]
        )
        for v in model.trainable_variables:
            v._path = v.path.removeprefix(f"{model.name}/")
        optimizer = kgc.ClippedOptimizer(make(), clipper, compiled=compiled, telemetry=watched)
        model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, size)).astype("float32") for size in (256, 2))
    monitor = kgc.ClipMonitor(every=1)
    model.fit(
        x, 10 * y, batch_size=4, verbose=0, shuffle=False, callbacks=[monitor] if watched else []
    )
    copies = [getattr(v.value, "values", [v.value]) for v in model.trainable_variables]
    return [[copy.numpy() for copy in of] for of in copies], optimizer, monitor.history


@pytest.mark.parametrize(
    ("inner", "name", "replicas"),
    [
        ("Adam", "units", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("momentum", "units", 4),
                ("AdamW", "gradient and update", 0),
                ("Adam, AMSGrad, EMA", "several", 0),
                ("nesterov, schedule", "twice", 0),
            )
        ),
    ],
)
def test_programs_of_large_kernels_give_the_same_as_keras_own_code(inner, name, replicas):
    make, clipper = BY_KERNELS[inner], LARGE[name]
    ours, optimizer, seen = trained_large(make, clipper, "auto", replicas)
    plain, left, wanted = trained_large(make, clipper, False)
    assert optimizer.compiled == "yes" and left.compiled.startswith("no")
    for copies, [want] in zip(ours, plain, strict=True):
        for copy in copies:
            np.testing.assert_allclose(
                copy, want, rtol=2e-5, atol=1e-4 if "Adam" in inner else 1e-6
            )
    for figure in ("norm_after", "clip_fraction", "angle"):
        got, want = (np.array(history[figure]) for history in (seen, wanted))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=0.02, err_msg=figure)
    fractions = [o.read_telemetry()["layer_clip_fraction"] for o in (optimizer, left)]
    np.testing.assert_allclose(*fractions, atol=1e-3)
    assert max(fractions[0]) > 0, "nothing was clipped"


def test_whoever_watches_a_large_kernel_changes_nothing():
    watched, alone = (
        trained_large(BY_KERNELS["Adam"], LARGE["units"], "auto", watched=watched)[0]
        for watched in (True, False)
    )
    for [a], [b] in zip(watched, alone, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["exponential", "update ratio"])
def test_nan_and_infinity_on_the_way(name):
    ours = {}
    for compiled in (False, True):
        (weight,) = variables(((6, 3),))
        optimizer = kgc.ClippedOptimizer(
            BY_KERNELS["momentum"](), ON_THE_WAY[name], compiled=compiled
        )
        gradient = np.ones((6, 3), "float32")
        gradient[0, 0], gradient[1, 1] = np.nan, np.inf
        optimizer.build([weight])
        tf.function(optimizer.apply, autograph=False)([tf.constant(gradient)])
        ours[compiled] = np.array(weight)
    assert np.isnan(ours[True][0, 0]) and np.isfinite(ours[True][:, 2]).all()
    np.testing.assert_allclose(ours[True], ours[False], rtol=2e-6)


def operations_of(function):
    """Every operation of a traced function, those of the functions that it calls as well."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return [n for n in nodes if not n.op.startswith("__") and n.op not in ("Placeholder", "NoOp")]


@functools.cache
def gpu_kernels():
    """By TensorFlow's registry, which the wheel fills for GPUs on a machine without one, too."""
    from tensorflow.python.framework import kernels as registry

    on_gpu = {}
    for kernel in registry.get_all_registered_kernels().kernel:
        if kernel.device_type in ("GPU", "DEFAULT"):
            allowed = {c.name: set(c.allowed_values.list.type) for c in kernel.constraint}
            on_gpu.setdefault(kernel.op, []).append((allowed, set(kernel.host_memory_arg)))
    assert not any(c["T"] == {tf.int32.as_datatype_enum} for c, _ in on_gpu["ArgMax"])
    return on_gpu


def without_gpu_kernel(node):
    """Whether no GPU has a kernel for an operation of these types, or one by way of the host."""
    types = {name: value.type for name, value in node.attr.items() if value.type}
    return not any(
        all(types[name] in allowed for name, allowed in kernel.items() if name in types)
        and not (node.op.startswith("ResourceApply") and host & {"grad", "delta"})
        for kernel, host in gpu_kernels().get(node.op, [])
    )


EVERY_PATH = {"skip_nonfinite": True, "skip_spikes": 6, "telemetry": 2}


@pytest.mark.parametrize(
    ("inner", "name", "options"),
    [
        ("momentum", "absolute", {}),
        ("AdamW", "absolute", {}),
        ("momentum", "absolute", EVERY_PATH),
        *(
            ("momentum", name, {**EVERY_PATH, "gradient_accumulation_steps": 2})
            for name in (None, "auto", *selectable())
        ),
    ],
)
def test_every_operation_of_an_update_has_a_gpu_kernel(inner, name, options, monkeypatch):
    """The branch of a skipped update as well: a compiled step fails where one has no kernel."""
    monkeypatch.setattr(arithmetic, "runs_on_tensorflow_cpu", lambda: False)
    ours = variables(((6, 4), (4,)))
    optimizer = kgc.ClippedOptimizer(BY_KERNELS[inner](), name, **options)
    optimizer.build(ours)
    function = tf.function(lambda: optimizer.apply([tf.ones(v.shape) for v in ours]))
    nodes = operations_of(function.get_concrete_function())
    assert not {node.op for node in nodes if without_gpu_kernel(node)}
    updates = [node for node in nodes if node.op.startswith("ResourceApply")]
    assert len(updates) == len(ours)
