"""Keras on TensorFlow: this library beside Keras's own clipping."""

import functools
import math
import os
import resource
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_gradclip as kgc

#: A threshold that about a third of the elements exceed; norms exceed theirs in every layer.
SIGMA, THRESHOLD, MAX_NORM = 0.1, 0.1, 1.0

OURS = {
    "AbsoluteClip": lambda: kgc.AbsoluteClip(THRESHOLD),
    "ExponentialClip": lambda: kgc.ExponentialClip(0.7, gamma=THRESHOLD),
    "NormClip variable": lambda: kgc.NormClip(MAX_NORM, scope="variable"),
    "NormClip layer": lambda: kgc.NormClip(MAX_NORM),
    "NormClip global": lambda: kgc.NormClip(MAX_NORM, scope="global"),
    "AdaptiveClip": lambda: kgc.AdaptiveClip(0.01),
    "UpdateRatioClip": lambda: kgc.UpdateRatioClip(),
    "RMSClip": lambda: kgc.RMSClip(SIGMA / 2),
    "PercentileClip": lambda: kgc.PercentileClip(),
    "ZScoreClip": lambda: kgc.ZScoreClip(),
    "AdaClip": lambda: kgc.AdaClip(),
}
STOCK = {
    "clipvalue": {"clipvalue": THRESHOLD},
    "clipnorm": {"clipnorm": MAX_NORM},
    "global_clipnorm": {"global_clipnorm": MAX_NORM},
}


INNER = {
    "SGD": lambda **a: keras.optimizers.SGD(1e-9, momentum=0.9, **a),
    "Adam": lambda **a: keras.optimizers.Adam(1e-9, **a),
    "AdamW": lambda **a: keras.optimizers.AdamW(1e-9, **a),
}
_sgd = INNER["SGD"]


def _wrapped(clipper, inner="SGD", **arguments):
    return kgc.ClippedOptimizer(INNER[inner](), clipper, **arguments)


@functools.cache
def _variables(which: str):
    """The trainable variables of a model."""
    if which == "resnet50":
        return keras.applications.ResNet50(weights=None).trainable_variables
    count, size = {"thousand": (500, 64), "tiny": (4, 16)}[which]
    result = []
    for i in range(count):
        with keras.name_scope(f"layer_{i}"):
            for name, shape in (("kernel", (size, size)), ("bias", (size,))):
                initializer = keras.initializers.RandomNormal(stddev=0.05, seed=i)
                result.append(keras.Variable(initializer, shape, name=name))
    return result


def shapes(which: str) -> list[list[int]]:
    """The shapes of a model's trainable variables, for the other frameworks."""
    return [list(v.shape) for v in _variables(which)]


@functools.cache
def _gradients(which: str):
    rng = np.random.default_rng(0)
    # In variables: a constant would be folded into the graph.
    return [
        tf.Variable(rng.normal(scale=SIGMA, size=tuple(v.shape)).astype("float32"))
        for v in _variables(which)
    ]


def _graph(which: str, fn):
    """A compiled function of no arguments that calls `fn(gradients)`."""
    gradients = _gradients(which)
    return tf.function(lambda: fn([tf.convert_to_tensor(g) for g in gradients]), autograph=False)


def _clips(which: str):
    """Name to a function of gradients that only clips."""
    variables = _variables(which)

    def ours(clipper):
        hyper = {k: tf.Variable(v) for k, v in clipper.hyperparameters().items()}
        hyper["learning_rate"] = tf.Variable(0.1)
        state = {k: tf.Variable(v) for k, v in clipper.init(variables).items()}

        def clip(gradients):
            clipped, after, _ = clipper.apply(
                gradients,
                variables,
                {k: tf.convert_to_tensor(v) for k, v in state.items()},
                {k: tf.convert_to_tensor(v) for k, v in hyper.items()},
            )
            for k, v in after.items():
                state[k].assign(tf.cast(v, state[k].dtype))
            return clipped

        return clip

    def stock(arguments):
        return keras.optimizers.SGD(**arguments)._clip_gradients  # what `apply` calls first

    return {
        "copy": lambda gradients: [tf.raw_ops.DeepCopy(x=g) for g in gradients],
        "add (reads two, writes one)": lambda gradients: [
            g + v.value for g, v in zip(gradients, variables, strict=True)
        ],
        **{f"Keras {name}": stock(arguments) for name, arguments in STOCK.items()},
        **{name: ours(make()) for name, make in OURS.items()},
    }


def clip(which: str, shapes):
    """The clip alone."""
    del shapes
    return {name: _graph(which, fn) for name, fn in _clips(which).items()}


def _optimizers():
    return {
        "no clip": _sgd,
        **{f"Keras {name}": functools.partial(_sgd, **a) for name, a in STOCK.items()},
        **{name: (lambda make=make: _wrapped(make())) for name, make in OURS.items()},
    }


def _applying(which: str, make):
    optimizer, variables = make(), _variables(which)
    optimizer.build(variables)
    return _graph(which, lambda gradients: optimizer.apply(gradients, variables))


def update(which: str, shapes):
    """The clip and the update of SGD with momentum."""
    del shapes
    return {name: _applying(which, make) for name, make in _optimizers().items()}


def compiled(which: str, shapes):
    """The clip and the update of the common optimizers, against Keras's without any clip."""
    del shapes
    common = ["AbsoluteClip", "ExponentialClip", "NormClip layer", "NormClip global"]
    more = {inner: ["AdaptiveClip", "UpdateRatioClip"] for inner in ("SGD", "Adam")}
    makers = {}
    for inner, keras_own in INNER.items():
        makers[inner] = keras_own
        makers[f"{inner}, clipvalue"] = functools.partial(keras_own, **STOCK["clipvalue"])
        for name in [*common, *more.get(inner, [])]:
            makers[f"{inner}, {name}"] = lambda name=name, inner=inner: _wrapped(
                OURS[name](), inner
            )
    return {name: _applying(which, make) for name, make in makers.items()}


# A whole train step ------------------------------------------------------------------------------


def _model(which: str, clipped: bool):
    if which == "tiny":
        inputs = keras.Input((32, 32, 3))
        hidden = keras.layers.Conv2D(4, 3, strides=4)(inputs)
        outputs = keras.layers.Dense(10)(keras.layers.Flatten()(hidden))
    else:
        body = keras.applications.ResNet50(weights=None, classes=10, input_shape=(32, 32, 3))
        inputs, outputs = body.inputs, body.outputs
    return (kgc.ClippedModel if clipped else keras.Model)(inputs, outputs)


def _trainers(inner="SGD", only=None):
    """Name to a function that makes a compiled model; of those in `only`, and "no clip"."""
    loss = "sparse_categorical_crossentropy"

    def stock(which, **arguments):
        model = _model(which, clipped=False)
        model.compile(INNER[inner](**arguments), loss, jit_compile=False)
        return model

    def ours(which, clipper):
        model = _model(which, clipped=True)
        model.compile(INNER[inner](), loss, clipper=clipper, jit_compile=False)
        return model

    def without_update(which):
        model = stock(which)
        model.train_step = functools.partial(_only_gradients, model)
        return model

    trainers = {
        "no clip": stock,
        "no update": without_update,
        **{f"Keras {name}": functools.partial(stock, **a) for name, a in STOCK.items()},
        **{
            name: (lambda which, make=OURS[name]: ours(which, make()))
            for name in (
                *("AbsoluteClip", "ExponentialClip", "NormClip layer", "NormClip global"),
                "UpdateRatioClip",
            )
        },
    }
    chosen = trainers if only is None else ["no clip", *only]
    return {name: trainers[name] for name in chosen}


def _only_gradients(model, data):
    """A train step that ends where the optimizer begins: what is left when an update is free."""
    x, y = data
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    # Something has to need each of them, or TensorFlow would leave it out.
    needed = tf.add_n([tf.reshape(g, [-1])[0] for g in gradients])
    return {"loss": loss, "needed": needed}


def _batches(size=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 32, 32, 3)).astype("float32")
    return iter(tf.data.Dataset.from_tensors((x, rng.integers(0, 10, size))).repeat())


def _stepper(model, steps: int, callback=None, batch=64):
    """A function that trains for some steps, as `fit` does inside an epoch."""
    batches = _batches(batch)
    model.make_train_function()
    count = 0
    if callback is not None:
        callback.set_model(model)
        callback.on_train_begin()
        callback.on_epoch_begin(0)

    def run():
        nonlocal count
        for _ in range(steps):
            logs = model.train_function(batches)
            if callback is not None:
                callback.on_train_batch_end(count)
            count += 1
        return {k: float(v) for k, v in logs.items()}

    return run


def step(which: str, shapes, steps: int, inner: str, batch: int, only: list[str] | None = None):
    """Whole train steps, `steps` in a row: the figures of ClippedModel come every 8th."""
    del shapes
    return {
        name: _stepper(make(which), steps, batch=batch)
        for name, make in _trainers(inner, only).items()
    }


def peak_memory(which: str, name: str) -> float:
    """Bytes that this process has held at most, after three steps; a process of its own each."""
    _stepper(_trainers("Adam")[name](which), 3)()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def monitor(which: str, shapes, steps: int, run_dir: str):
    """Train steps without a clip, with one, and with the monitor beside it."""
    del shapes
    make = _trainers()
    watch = kgc.ClipMonitor(run_dir)
    return {
        "no clip": _stepper(make["no clip"](which), steps),
        "NormClip layer": _stepper(make["NormClip layer"](which), steps),
        "NormClip layer, ClipMonitor": _stepper(make["NormClip layer"](which), steps, watch),
    }


def first_step(which: str, name: str) -> float:
    """Seconds of a new model's `fit` of one step: trace, graph optimisation, compilation, step."""
    model, batch = _trainers()[name](which), next(_batches())
    start = time.perf_counter()
    model.fit(tf.data.Dataset.from_tensors(batch), shuffle=False, verbose=0)
    return time.perf_counter() - start


def first_step_names(only: list[str] | None = None) -> list[str]:
    """The contestants of `first_step`."""
    return list(_trainers(only=only))


# Graphs ------------------------------------------------------------------------------------------


def graph_operations(which: str) -> dict[str, dict[str, float]]:
    """Operations a tensor: of the clip alone, and of the clip with its update."""
    tensors = len(_variables(which))
    idle = ("Placeholder", "ReadVariableOp", "Identity", "NoOp", "Const")

    def count(function):
        graph = function.get_concrete_function().graph
        return sum(op.type not in idle for op in graph.get_operations()) / tensors

    result: dict[str, dict[str, float]] = {}
    for name, fn in _clips(which).items():
        result.setdefault(name, {})["clip"] = count(_graph(which, fn))
    for name, make in _optimizers().items():
        result.setdefault(name, {})["update"] = count(_applying(which, make))
    return result


def growth(count: int, name: str) -> dict[str, float]:
    """Seconds to trace, and to run once, an update of `count` kernels of 32 × 32."""
    variables = [
        keras.Variable(keras.initializers.RandomNormal(seed=i), (32, 32), name=f"layer_{i}")
        for i in range(count)
    ]
    gradients = [tf.Variable(v.value) for v in variables]
    optimizer = _optimizers()[name]()
    optimizer.build(variables)
    function = tf.function(
        lambda: optimizer.apply([tf.convert_to_tensor(g) for g in gradients], variables),
        autograph=False,
    )
    start = time.perf_counter()
    function.get_concrete_function()
    trace = time.perf_counter() - start
    function()
    runs = []
    for _ in range(20):
        start = time.perf_counter()
        function()
        runs.append(time.perf_counter() - start)
    return {"trace": trace, "run": float(np.median(runs))}


def growth_names() -> list[str]:
    """The contestants of `growth`."""
    return ["Keras clipvalue", "AbsoluteClip", "Keras clipnorm", "NormClip layer"]


def _logical_devices(replicas: int):
    """A strategy over parts of this machine's processor."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * replicas
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def on_devices(which: str, replicas: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of an update on each of some logical devices, round by round.

    Must be the first call in a process: the logical devices are made here.
    """
    return _updates(_logical_devices(replicas), which, rounds)


def as_worker(which: str, rounds: int) -> dict[str, list[float]]:
    """The same of this process, one of those that its TF_CONFIG names."""
    return _updates(tf.distribute.MultiWorkerMirroredStrategy(), which, rounds)


def _updates(strategy, which: str, rounds: int) -> dict[str, list[float]]:
    """Processor time, for the devices share the cores: a replica's is this process's part of it."""
    makers = {
        "no clip": _sgd,
        "Keras clipnorm": functools.partial(_sgd, clipnorm=MAX_NORM),
        "AbsoluteClip": lambda: _wrapped(OURS["AbsoluteClip"]()),
        "NormClip global": lambda: _wrapped(OURS["NormClip global"]()),
        # XLA's, where the others are updated by one kernel a variable.
        "RMSprop": lambda: keras.optimizers.RMSprop(1e-3),
        "RMSprop, AbsoluteClip": lambda: kgc.ClippedOptimizer(
            keras.optimizers.RMSprop(1e-3), OURS["AbsoluteClip"]()
        ),
    }
    with strategy.scope():
        variables = _model(which, clipped=False).trainable_variables
        gradients = [
            keras.Variable("random_normal", v.shape, trainable=False, dtype=v.dtype)
            for v in variables
        ]

        def updater(make):
            optimizer = make()
            optimizer.build(variables)

            def update():
                # Copies: what is read of a variable knows no device, and Keras asks for it.
                optimizer.apply([tf.identity(g.value) for g in gradients], variables)

            return tf.function(lambda: strategy.run(update), autograph=False)

        updates = {name: updater(make) for name, make in makers.items()}
    replicas = len(strategy.extended.worker_devices)  # in this process
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for k in range(rounds + 2):  # the first two trace, and fill the caches
        for name, update in updates.items():
            start = time.process_time()
            update()
            if k >= 2:
                seconds[name].append((time.process_time() - start) / replicas)
    return seconds


def reductions(which: str, replicas: int, accumulate: int) -> dict[str, dict]:
    """All-reduces and bytes that one update asks for on some replicas.

    Must be the first call in a process: the logical devices are made here.
    """
    strategy = _logical_devices(replicas)
    original, calls = tf.distribute.ReplicaContext.all_reduce, []

    def counting(self, op, value, *args, **kwargs):
        flat = tf.nest.flatten(value)
        calls.append(sum(math.prod(t.shape) * t.dtype.size for t in flat))
        return original(self, op, value, *args, **kwargs)

    def counted(make):
        with strategy.scope():
            model = _model(which, clipped=False)
            optimizer = make()
            optimizer.build(model.trainable_variables)
        variables = model.trainable_variables

        def update():
            optimizer.apply([tf.ones(v.shape) for v in variables], variables)

        calls.clear()
        tf.distribute.ReplicaContext.all_reduce = counting
        try:
            tf.function(lambda: strategy.run(update), autograph=False).get_concrete_function()
        finally:
            tf.distribute.ReplicaContext.all_reduce = original
        parameters = sum(math.prod(v.shape) for v in variables)
        # Every replica's thread joins each all-reduce.
        return {
            "all_reduces": len(calls) / replicas,
            "bytes": sum(calls) / replicas,
            "parameter_bytes": 4 * parameters,
        }

    if accumulate > 1:
        name = f"NormClip layer, {accumulate} micro-batches"
        arguments = {"gradient_accumulation_steps": accumulate}
        return {name: counted(lambda: _wrapped(kgc.NormClip(MAX_NORM), **arguments))}
    return {
        "NormClip layer": counted(lambda: _wrapped(kgc.NormClip(MAX_NORM))),
        "Keras clipnorm": counted(lambda: _sgd(clipnorm=MAX_NORM)),
    }


def versions() -> str:
    """The versions of what is measured."""
    return (
        f"Keras {keras.__version__}, TensorFlow {tf.__version__}, keras_gradclip {kgc.__version__}"
    )
