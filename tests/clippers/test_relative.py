"""AdaptiveClip and RMSClip against optax and timm where installed, and on Keras's layouts."""

import json

import keras
import numpy as np
import pytest
from helpers import gradients, net, to64, train, variables
from keras import ops
from references import timm_agc

import keras_gradclip as kgc
from keras_gradclip.clippers.units import default_unit_axes

AXES = [(0, 1, 2), (0,), (0,), (0,), (0,)]  # of helpers.variables()


SHAPES = [(4,), (1, 4), (5, 3), (3, 3, 2, 4), (2, 2, 2, 3, 4), (1, 1, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["adaptive_grad_clip", "clip_by_block_rms"])
def test_same_as_optax(name, shape):
    """Ranks 1, 2, 4 and 5, where optax and we agree on the axes."""
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(len(shape))
    w, g = rng.normal(size=(2, *shape)).astype("float32")
    transform = getattr(optax, name)(0.3)
    want, _ = transform.update(g, transform.init(w), w)
    ours = kgc.AdaptiveClip(0.3) if name == "adaptive_grad_clip" else kgc.RMSClip(0.3)
    (got,) = ours([ops.convert_to_tensor(g)], [keras.Variable(w, name="kernel")])
    assert np.abs(np.asarray(want) - g).max() > 0.01, "nothing was clipped"
    np.testing.assert_allclose(to64(got), np.asarray(want), rtol=1e-5)


def test_rank_3_of_optax_is_a_query_kernel():
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 6, 2, 3)).astype("float32")
    transform = optax.adaptive_grad_clip(0.3)
    want, _ = transform.update(g, transform.init(w), w)
    with keras.name_scope("query"):
        v = keras.Variable(w, name="kernel")
    (got,) = kgc.AdaptiveClip(0.3)([ops.convert_to_tensor(g)], [v])
    np.testing.assert_allclose(to64(got), np.asarray(want), rtol=1e-5)


#: Keras's kernel to the layout of PyTorch, whose first axis is the output: name of the layer, shape
#: and permutation. A depthwise kernel (height, width, channels, multiplier) has an output for each
#: of its last two axes.
TORCH_LAYOUTS = {
    "bias": ("dense", (6,), (0,)),
    "dense": ("dense", (5, 3), (1, 0)),
    "conv1d": ("conv1d", (3, 2, 4), (2, 1, 0)),
    "conv2d": ("conv2d", (3, 2, 5, 4), (3, 2, 0, 1)),
    "conv3d": ("conv3d", (2, 3, 2, 5, 4), (4, 3, 0, 1, 2)),
    "transposed": ("conv2d_transpose", (3, 2, 4, 5), (2, 3, 0, 1)),
    "depthwise": ("depthwise_conv2d", (3, 2, 5, 4), (2, 3, 0, 1)),
}


@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["weights", "below-eps"])
@pytest.mark.parametrize("layout", TORCH_LAYOUTS)
def test_same_as_timm(layout, scale):
    torch = pytest.importorskip("torch")
    try:
        agc = timm_agc()
    except ImportError as error:
        pytest.skip(str(error))
    layer, shape, permutation = TORCH_LAYOUTS[layout]
    rng = np.random.default_rng(len(shape))
    w, g = rng.normal(size=(2, *shape)).astype("float32")
    w = scale * w
    # A unit whose gradient is small enough stays as it is.
    g[..., 0] *= 1e-9

    def there(x):
        x = np.transpose(x, permutation)
        if layout == "depthwise":
            x = x.reshape(-1, 1, *x.shape[2:])
        return torch.from_numpy(np.array(x, order="C"))  # a copy: timm clips in place

    parameter = torch.nn.Parameter(there(w))
    parameter.grad = there(g)
    agc.adaptive_clip_grad([parameter], clip_factor=0.3, eps=1e-3)
    with keras.name_scope(layer):
        v = keras.Variable(w, name="bias" if layout == "bias" else "kernel")
    (got,) = kgc.AdaptiveClip(0.3)([ops.convert_to_tensor(g)], [v])
    want = parameter.grad.numpy()
    assert np.abs(want - there(g).numpy()).max() > 0.01, "nothing was clipped"
    np.testing.assert_allclose(there(to64(got)).numpy(), want, rtol=1e-5, atol=1e-12)


def test_a_zero_weight_can_move():
    """The floor of eps: without it, zero-initialised units would stay where they are."""
    v = keras.Variable(np.zeros((3, 2), "float32"), name="kernel")
    (got,) = kgc.AdaptiveClip(0.01, eps=1e-3)([ops.ones((3, 2))], [v])
    np.testing.assert_allclose(np.linalg.norm(to64(got), axis=0), 1e-5, rtol=1e-5)


def test_the_final_layer_can_be_excluded_by_rule():
    vs = variables()
    gs, g64 = gradients(vs)
    got = kgc.ClipMap({"dense/.*": None}, default=kgc.AdaptiveClip(0.01))(gs, vs)
    for i in (3, 4):
        np.testing.assert_array_equal(to64(got[i]), g64[i].astype("float32"))
    assert np.linalg.norm(to64(got[0])) < 0.1 * np.linalg.norm(g64[0])


L = keras.layers
#: A layer, its input shape, and for each kernel's name and shape the axes of one output's weights.
LAYOUTS = [
    (lambda n: L.Dense(5, **n), (None, 3), {"kernel": (0,)}),
    (lambda n: L.Conv1D(4, 3, **n), (None, 8, 2), {"kernel": (0, 1)}),
    (lambda n: L.Conv2D(4, 3, groups=2, **n), (None, 8, 8, 4), {"kernel": (0, 1, 2)}),
    (lambda n: L.Conv3D(4, 3, **n), (None, 8, 8, 8, 2), {"kernel": (0, 1, 2, 3)}),
    (lambda n: L.Conv1DTranspose(4, 3, **n), (None, 8, 2), {"kernel": (0, 2)}),
    (lambda n: L.Conv2DTranspose(4, 3, **n), (None, 8, 8, 2), {"kernel": (0, 1, 3)}),
    (lambda n: L.Conv3DTranspose(4, 3, **n), (None, 8, 8, 8, 2), {"kernel": (0, 1, 2, 4)}),
    (lambda n: L.DepthwiseConv1D(3, depth_multiplier=2, **n), (None, 8, 5), {"kernel": (0,)}),
    (lambda n: L.DepthwiseConv2D(3, depth_multiplier=2, **n), (None, 8, 8, 5), {"kernel": (0, 1)}),
    (
        lambda n: L.SeparableConv1D(4, 3, **n),
        (None, 8, 5),
        {"depthwise_kernel": (0,), "pointwise_kernel": (0, 1)},
    ),
    (
        lambda n: L.SeparableConv2D(4, 3, **n),
        (None, 8, 8, 5),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    (lambda n: L.Embedding(7, 3, **n), (None,), {"embeddings": (1,)}),
    (
        lambda n: L.GRU(3, **n),
        (None, 4, 2),
        {"gru_cell/kernel": (0,), "gru_cell/recurrent_kernel": (0,), "gru_cell/bias": (0, 1)},
    ),
    (
        lambda n: L.MultiHeadAttention(2, 3, **n),
        [(None, 4, 6)] * 2,
        {
            "query/kernel": (0,),
            "key/kernel": (0,),
            "value/kernel": (0,),
            "attention_output/kernel": (0, 1),
            "query/bias": (0, 1),
        },
    ),
]


def built(make, shape, name=None):
    layer = make({"name": name} if name else {})
    layer.build(*shape) if isinstance(shape, list) else layer.build(shape)
    return layer


def test_units_by_name():
    for make, shape, axes in LAYOUTS:
        layer = built(make, shape)
        by_name = {v.path.partition("/")[2]: v for v in layer.trainable_variables}
        for name, want in axes.items():
            assert default_unit_axes(by_name[name]) == want, by_name[name].path


def test_units_asked_of_renamed_layers():
    """Names that say nothing: `unit_axes` asks the layers, at any depth."""
    for i, (make, shape, axes) in enumerate(LAYOUTS):
        layer = built(make, shape, f"block{i}")
        got = kgc.unit_axes(layer)
        for name, want in axes.items():
            assert got[f"block{i}/{name}"] == want, (type(layer), name)


@pytest.mark.parametrize(
    "equation, shape, output, want",
    [
        ("abc,cde->abde", (None, 4, 5), (None, 2, 3), (0,)),
        ("abcd,cde->abe", (None, 4, 2, 3), (None, 6), (0, 1)),
        ("...x,xy->...y", (None, 4), (3,), (0,)),
        ("aeb,ecb->aec", (None, 2, 4), (2, 3), (2,)),  # one dense layer for each e
    ],
)
def test_units_of_einsum_dense(equation, shape, output, want):
    layer = keras.layers.EinsumDense(equation, output_shape=output)
    layer.build(shape)
    assert kgc.unit_axes(layer)[layer.kernel.path] == want


def test_axes_change_what_is_clipped_and_round_trip():
    rng = np.random.default_rng(0)
    with keras.name_scope("upsample"):  # no layer tells: (height, width, out, in)
        v = keras.Variable(rng.normal(size=(3, 3, 4, 2)).astype("float32"), name="kernel")
    (g,), (g64,) = gradients([v])
    square_of = lambda x: np.sum(np.square(x), axis=(0, 1, 3), keepdims=True)  # noqa: E731
    want = g64 * np.minimum(1.0, 0.01 * np.sqrt(square_of(to64(v)) / square_of(g64)))
    for cls in (kgc.AdaptiveClip, kgc.UpdateRatioClip):
        clipper = cls(0.01, axes={"upsample/kernel": (0, 1, 3)})
        np.testing.assert_allclose(to64(clipper([g], [v])[0]), want, rtol=1e-5)
        assert np.abs(to64(cls(0.01)([g], [v])[0]) - want).max() > 1e-4
        again = kgc.get(json.loads(json.dumps(kgc.serialize(clipper))))
        assert again == clipper
        assert "a guess, pass `axes`" in cls(0.01).describe([v])
        assert "a guess" not in clipper.describe([v])


@pytest.mark.parametrize("clipper", [kgc.AdaptiveClip(0.3), kgc.RMSClip(0.3)], ids=str)
def test_sparse_is_dense(clipper):
    tf = pytest.importorskip("tensorflow")
    layer = built(LAYOUTS[11][0], LAYOUTS[11][1])
    v = layer.embeddings
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    sparse = tf.IndexedSlices(tf.constant(rows), tf.constant([1, 4, 1, 6]), tf.constant([7, 3]))
    (got,) = clipper([sparse], [v])
    (want,) = clipper([tf.convert_to_tensor(sparse)], [v])
    np.testing.assert_allclose(tf.convert_to_tensor(got), want, rtol=1e-5)
    assert np.abs(want - tf.convert_to_tensor(sparse)).max() > 0.01


@pytest.mark.parametrize("clipper", [kgc.AdaptiveClip(0.1), kgc.RMSClip(0.1)], ids=str)
def test_zero_none_and_infinite_gradients(clipper):
    vs = variables()
    gs = [ops.zeros(v.shape) for v in vs]
    gs[1] = None
    bad = np.ones((5, 3), "float32")
    bad[0, 0] = np.inf
    gs[3] = ops.convert_to_tensor(bad)
    got = clipper(gs, vs)
    assert got[1] is None
    np.testing.assert_array_equal(to64(got[0]), 0.0)
    assert np.isnan(to64(got[3])[0, 0])  # stays visible
    assert np.isfinite(to64(got[3])).sum() == 14


def test_adaptive_stats_count_units():
    vs = variables()
    gs, g64 = gradients(vs)
    _, _, stats = kgc.AdaptiveClip(0.9).apply(gs, vs, {}, {"clip_factor": 0.9})
    assert stats.weights == [4.0, 1.0, 1.0, 3.0, 1.0]
    want = []
    for g, v, axes in zip(g64, vs, AXES, strict=True):
        norm = np.sqrt((g**2).sum(axes))
        want.append(np.mean(norm > 0.9 * np.sqrt((to64(v) ** 2).sum(axes))))
    np.testing.assert_allclose([float(f) for f in stats.fractions()], want)
    assert 0 < np.mean(want) < 1, "the test needs clipped units and others"


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: kgc.AdaptiveClip(0.0), "clip_factor"),
        (lambda: kgc.AdaptiveClip(0.01, eps=-1.0), "eps"),
        (lambda: kgc.AdaptiveClip(0.01, axes=3), "axes"),
        (lambda: kgc.RMSClip(float("nan")), "threshold"),
        (lambda: kgc.AdaptiveClip(axes={"dense/kernel": (2,)})(*[variables()] * 2), "dense/kernel"),
        (lambda: kgc.unit_axes(keras.Sequential([keras.layers.Dense(2)])), "trainable"),
    ],
)
def test_misuse_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize("clipper", [kgc.AdaptiveClip(0.02), kgc.RMSClip(0.005)], ids=str)
def test_replica_parity(clipper):
    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.05), clipper, telemetry=True)

    one_model, _, one = train(0, optimizer, steps=4)
    assert one_model.optimizer.read_telemetry()["clip_fraction"] > 0.2
    _, _, two = train(2, optimizer, steps=4)
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)


def test_describe_stays_short():
    text = kgc.AdaptiveClip(axes=kgc.unit_axes(net())).describe(net())
    assert "axes of" in text
    assert max(map(len, text.splitlines())) < 120


def test_schedules_are_shown_with_their_arguments():
    schedules = keras.optimizers.schedules

    class Mine(schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

    shown = {
        "AbsoluteClip(threshold=ExponentialDecay(0.1, 1000, 0.9))": kgc.AbsoluteClip(
            schedules.ExponentialDecay(0.1, 1000, 0.9)
        ),
        "AbsoluteClip(threshold=CosineDecay(0.1, 100, warmup_steps=10))": kgc.AbsoluteClip(
            schedules.CosineDecay(0.1, 100, warmup_steps=10, name="mine")
        ),
        "NormClip(max_norm=PiecewiseConstantDecay([10], [1.0, 0.5]), scope=layer)": kgc.NormClip(
            schedules.PiecewiseConstantDecay([10], [1.0, 0.5])
        ),
        "RMSClip(threshold=Mine)": kgc.RMSClip(Mine()),
        "AdaptiveClip(clip_factor=PolynomialDecay(0.2, 9), eps=0.001)": kgc.AdaptiveClip(
            schedules.PolynomialDecay(0.2, 9, 1e-4)
        ),
    }
    for text, clipper in shown.items():
        assert str(clipper) == text
