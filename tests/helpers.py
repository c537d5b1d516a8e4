"""A small convolutional network, its data, and a function to train it on n replicas."""

import contextlib

import keras
import numpy as np
import pytest

import keras_gradclip as kgc

CLASSES = 3
DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Relative tolerances: about four units in the last place.
RTOL = {"float32": 2e-6, "float64": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}

#: One of each kind, with thresholds that clip the gradients of `net`.
CLIPPERS = {
    "absolute": kgc.AbsoluteClip(0.05),
    "absolute-norm": kgc.AbsoluteClip(0.05, "norm"),
    "absolute-max": kgc.AbsoluteClip(0.05, "max"),
    "exponential": kgc.ExponentialClip(gamma=0.05),
    "exponential-rms-alpha": kgc.ExponentialClip(gamma=0.05, weight="rms", rescale="alpha"),
    "exponential-none": kgc.ExponentialClip(gamma=0.05, weight="none"),
    "norm-layer": kgc.NormClip(0.5),
    "norm-variable": kgc.NormClip(0.5, "variable"),
    "norm-global": kgc.NormClip(0.5, "global"),
    "map": kgc.ClipMap({"stem/.*": kgc.NormClip(0.5), "body/bias": None}, kgc.AbsoluteClip(0.05)),
    "chain": kgc.Chain([kgc.AbsoluteClip(0.1), kgc.NormClip(0.5, "global")]),
}


@contextlib.contextmanager
def shapes_only():
    """Models built here have shapes only: VGG's 550 MB of weights are never allocated."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()  # else the next `predict` of any model allocates them


def needs_muon():
    """Skip where Keras's own Muon fails: 3.12's asks a native variable for its path."""
    matrix = keras.Variable(np.ones((2, 2), "float32"))
    try:
        keras.optimizers.Muon().apply([keras.ops.ones((2, 2))], [matrix])
    except AttributeError:
        pytest.skip("this Keras's own Muon fails on this backend")


def variables(seed=0, dtype="float32"):
    """Variables of three layers, as Keras names them, with shapes of rank 1 to 4."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv/kernel": (3, 3, 2, 4),
        "conv/bias": (4,),
        "norm/gamma": (4,),
        "dense/kernel": (5, 3),
        "dense/bias": (3,),
    }
    result = []
    for path, shape in shapes.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            v = keras.Variable(rng.normal(size=shape).astype("float32"), dtype=dtype, name=name)
        assert v.path == path
        result.append(v)
    return result


def gradients(like, seed=0, dtype="float32", scale=1.0):
    """Normal gradients for variables: (tensors of `dtype`, the same values in float64)."""
    rng = np.random.default_rng(seed + 1000)
    tensors = [
        keras.ops.convert_to_tensor((scale * rng.normal(size=tuple(v.shape))), dtype=dtype)
        for v in like
    ]
    return tensors, [to64(t) for t in tensors]


def to64(x):
    """A float64 NumPy copy of a tensor or variable of any dtype."""
    return (
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")), "float64")
        if ("float64" not in str(x.dtype))
        else np.asarray(keras.ops.convert_to_numpy(x), "float64")
    )


def data(n=64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 8, 8, 3)).astype("float32")
    return x, rng.integers(0, CLASSES, n).astype("int32")


def net(model_class=None, seed=1):
    """A conv net without anything that depends on the size of a replica's batch."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 3))
    h = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="stem")(inputs)
    h = keras.layers.Conv2D(8, 3, activation="tanh", name="body")(h)
    h = keras.layers.Flatten()(h)
    outputs = keras.layers.Dense(CLASSES, name="head", dtype="float32")(h)
    return (model_class or kgc.ClippedModel)(inputs, outputs)


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def strategy(replicas):
    """MirroredStrategy over logical CPU devices; None for no strategy.

    ReductionToOneDevice, because the collective operations remember the group size for the rest
    of the process, and the tests use several.
    """
    if not replicas:
        return None
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute; tests/backends has JAX's replicas")
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def train(
    replicas,
    optimizer,
    *,
    compile_args=None,
    model_class=None,
    steps=8,
    batch=16,
    epochs=1,
    scale=30.0,
    callbacks=None,
):
    """Train `net` for `steps` steps; `optimizer` is a function, called inside the scope.

    The loss is scaled so that the gradients are large enough for every clipper to clip.
    Returns the model, the history and the weights as one float64 vector.
    """
    x, y = data(steps * batch)
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        model = net(model_class)
        model.compile(optimizer(), loss(), loss_weights=scale, **(compile_args or {}))
    history = model.fit(
        x, y, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )
    return model, history.history, weights(model)


def weights(model):
    return np.concatenate([np.asarray(w, "float64").ravel() for w in model.get_weights()])
