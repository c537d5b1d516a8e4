"""Kernels for large gradients against the oracles, also on replicas."""

import keras
import numpy as np
import pytest
from helpers import DTYPES, RTOL, gradients, strategy, to64, variables
from oracles import Clip

import keras_gradclip as kgc
from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip.names import path_of

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's kernels", allow_module_level=True)


def large(seed=0):
    """Variables above and below `SMALL`, together worth compiling."""
    result = variables(seed)
    rng = np.random.default_rng(seed)
    for layer, shape in (("wide", (1024, 1024)), ("next", (300, 256))):
        with keras.name_scope(layer):
            result += [
                keras.Variable(rng.normal(size=shape).astype("float32"), name="kernel"),
                keras.Variable(rng.normal(size=shape[-1:]).astype("float32"), name="bias"),
            ]
    return result


def traced(clipper, gs, vs):
    """The clip in a graph, which may compile it, and the graph."""
    step = tf.function(lambda *gs: clipper(list(gs), vs), autograph=False)
    concrete = step.get_concrete_function(*gs)
    return step(*gs), concrete.graph


def is_compiled(graph):
    return any(
        "_XlaMustCompile" in op.node_def.attr and op.node_def.attr["_XlaMustCompile"].b
        for op in graph.get_operations()
    )


EXPONENTIALS = [(r, w) for r in (None, "norm", "alpha") for w in ("elementwise", "rms", "none")]


@pytest.mark.parametrize(
    "rescale, weight, dtype",
    [
        *((*kind, "float32") for kind in EXPONENTIALS),
        *(("alpha", "elementwise", dtype) for dtype in DTYPES if dtype != "float32"),
    ],
)
def test_exponential_compiled(rescale, weight, dtype):
    vs = large()
    gs, g64 = gradients(vs, 0, dtype)
    clipper = kgc.ExponentialClip(0.7, 0.3, weight, rescale)
    clipped, graph = traced(clipper, gs, vs)
    assert is_compiled(graph) == (weight == "elementwise")
    wanted = Clip(clipper)(g64, [to64(v) for v in vs], [path_of(v) for v in vs])
    for got, g, want in zip(clipped, gs, wanted, strict=True):
        assert got.dtype == g.dtype and got.shape == g.shape
        # Two float32 functions of exp, and the threshold itself is rounded to the dtype.
        np.testing.assert_allclose(to64(got), want, rtol=2 * RTOL[dtype], atol=1e-6)


def test_small_models_are_not_compiled():
    vs = variables()
    gs, _ = gradients(vs)
    assert not is_compiled(traced(kgc.ExponentialClip(), gs, vs)[1])


def test_compiled_keeps_nan_and_bounds_infinity():
    vs = large()
    gs, _ = gradients(vs)
    spoiled = []
    for g in gs:
        g = g.numpy()
        g.flat[0], g.flat[1], g.flat[2] = np.nan, np.inf, -np.inf
        spoiled.append(tf.constant(g))
    clipped, graph = traced(kgc.ExponentialClip(0.7, 0.3), spoiled, vs)
    assert is_compiled(graph)
    for got, v in zip(clipped, vs, strict=True):
        got, limit = to64(got).ravel(), 0.3 * np.exp(0.7 * to64(v).ravel())
        assert np.isnan(got[0])
        np.testing.assert_allclose(got[1:3], [limit[1], -limit[2]], rtol=1e-5)
        assert np.isfinite(got[1:]).all()


@pytest.mark.parametrize("inside", ["step", "branch", "nested"])
@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize("name", ["absolute", "exponential"])
def test_nan_stays_in_a_compiled_step(name, jit_compile, inside):
    """XLA's ClipByValue would turn it into a limit."""
    vs = variables()
    gs = [tf.fill(v.shape, np.float32(np.nan)) for v in vs]

    def clip():
        return kgc.get(name)(gs, vs)

    def step():
        if inside == "branch":
            return tf.cond(tf.constant(1.0) > 0, clip, lambda: gs)
        return tf.function(clip)() if inside == "nested" else clip()

    for got in tf.function(step, jit_compile=jit_compile, autograph=False)():
        assert np.isnan(to64(got)).all()


def test_sparse_beside_large_gradients():
    """The number of rows changes from step to step, so that XLA cannot compile it."""
    vs = [*large(), keras.Variable(np.ones((50, 3), "float32"), name="embeddings")]
    gs, g64 = gradients(vs)

    @tf.function(autograph=False)
    def step(values, indices):
        sparse = tf.IndexedSlices(values, indices, tf.constant([50, 3]))
        return kgc.ExponentialClip(0.7, 0.3)([*gs[:-1], sparse], vs)

    arguments = gs[-1][:4], tf.constant([3, 1, 4, 1])
    clipped = step(*arguments)
    assert is_compiled(step.get_concrete_function(*arguments).graph)
    dense = np.zeros((50, 3))
    np.add.at(dense, [3, 1, 4, 1], g64[-1][:4])
    wanted = Clip(kgc.ExponentialClip(0.7, 0.3))(
        [*g64[:-1], dense], [to64(v) for v in vs], [path_of(v) for v in vs]
    )
    for i in (-1, 5):
        got = to64(tf.convert_to_tensor(clipped[i]))
        np.testing.assert_allclose(got, wanted[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [3.0, 700.0])  # 700: between the two large norms
@pytest.mark.parametrize("scope", ["layer", "variable", "global"])
def test_norms_of_large_and_small_scopes(scope, max_norm):
    vs = large()
    gs, g64 = gradients(vs)
    clipper = kgc.NormClip(max_norm, scope)
    clipped, _ = traced(clipper, gs, vs)
    wanted = Clip(clipper)(g64, [to64(v) for v in vs], [path_of(v) for v in vs])
    for got, want in zip(clipped, wanted, strict=True):
        np.testing.assert_allclose(to64(got), want, rtol=1e-5, atol=1e-7)


def test_one_operation_a_tensor_for_absolute():
    vs = large()
    gs, _ = gradients(vs)
    _, graph = traced(kgc.AbsoluteClip(0.1), gs, vs)
    types = [op.type for op in graph.get_operations()]
    assert types.count("ClipByValue") == len(vs)
    work = [t for t in types if t not in ("Placeholder", "Const", "Identity", "NoOp")]
    assert len(work) <= 2 * len(vs)


def test_compiled_on_replicas():
    """XLA on each logical device, inside `strategy.run`, equals one device."""

    def stepped(replicas):
        scope = strategy(replicas)
        rng = np.random.default_rng(0)
        g = rng.normal(size=(1100, 1000)).astype("float32")

        def make():
            keras.utils.set_random_seed(1)
            v = keras.Variable(keras.initializers.RandomNormal(seed=3), (1100, 1000))
            optimizer = kgc.ClippedOptimizer(
                keras.optimizers.SGD(0.5, momentum=0.9),
                kgc.ExponentialClip(0.7, 0.3),
                skip_nonfinite=True,
            )
            optimizer.build([v])
            return v, optimizer

        if scope is None:
            v, optimizer = make()
            step = tf.function(lambda: optimizer.apply([tf.constant(g)], [v]), autograph=False)
        else:
            with scope.scope():
                v, optimizer = make()

            def each():
                optimizer.apply([tf.constant(g) / replicas], [v])

            step = tf.function(lambda: scope.run(each), autograph=False)
        for _ in range(3):
            step()
        return to64(v.value)

    np.testing.assert_allclose(stepped(2), stepped(None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(64, 64), (3, 3, 16, 32), (5, 1), (999, 1050), (2**17, 8), (16, 2**16)]
)
def test_column_squares(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    traced = tf.function(arithmetic.column_squares, autograph=False).get_concrete_function(
        tf.TensorSpec(shape)
    )
    axes = tuple(range(len(shape) - 1))
    expected = np.square(x.astype("float64")).sum(axis=axes, keepdims=True)
    np.testing.assert_allclose(traced(tf.constant(x)), expected, rtol=2e-6)
    # A convolution of a small tensor takes eight times as long as a square and a sum.
    convolutions = [op for op in traced.graph.get_operations() if "Depthwise" in op.type]
    assert bool(convolutions) == (x.size >= arithmetic.WORTH_CONVOLVING)


@pytest.mark.parametrize("jit_compile", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (1000003, 3),
        (1 << 20, 3),
        (4001, 1023),
        (1 << 20, 1),
        (999983,),
        (65521, 2),
        (3, 3, 511, 251),
        (7, 300000),
    ],
    ids=str,
)
def test_precision_does_not_depend_on_the_shape(shape, jit_compile):
    """Equal numbers, the worst case of a long sum, are exact to five digits."""
    x = tf.fill(shape, tf.constant(0.1, "float32"))
    square, count = float(np.float32(0.1)) ** 2, np.prod(shape)
    functions = {arithmetic.sum_of_squares: count}
    if len(shape) > 1:
        functions[arithmetic.column_squares] = count / shape[-1]
    for function, count in functions.items():
        got = tf.function(function, jit_compile=jit_compile, autograph=False)(x)
        np.testing.assert_allclose(np.ravel(got), count * square, rtol=3e-5)
