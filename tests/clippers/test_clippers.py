"""Every clipper against its equation in NumPy, and what holds for all of them."""

import keras
import numpy as np
import pytest
from helpers import DTYPES, RTOL, gradients, to64, variables
from keras import ops
from oracles import Clip

import keras_gradclip as kgc
from keras_gradclip.names import layer_of, path_of

SCOPES = ("layer", "variable", "global")
EQUATIONS = [
    *(kgc.AbsoluteClip(0.1, rescale) for rescale in (None, "norm", "max")),
    *(
        kgc.ExponentialClip(0.7, 0.05, weight, rescale)
        for weight in ("elementwise", "rms", "none")
        for rescale in (None, "norm", "max", "alpha")
    ),
    *(kgc.NormClip(3.0, scope) for scope in SCOPES),
    kgc.RMSClip(0.9),
    kgc.AdaptiveClip(0.8),
    *(
        kgc.UpdateRatioClip(0.8, scope=scope, biases=biases)
        for scope in ("unit", "variable", "layer")
        for biases in ("unit", None)
    ),
]


def wanted(clipper, g64, vs):
    return Clip(clipper)(g64, [to64(v) for v in vs], [path_of(v) for v in vs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipper", EQUATIONS, ids=str)
def test_against_numpy(clipper, dtype):
    """Gradients that are too small to be clipped, some that are clipped, and all of them."""
    for seed, scale in enumerate((1e-3, 1.0, 30.0)):
        vs = variables(seed)
        gs, g64 = gradients(vs, seed, dtype, scale)
        clipped = clipper(gs, vs)
        for got, want, g in zip(clipped, wanted(clipper, g64, vs), gs, strict=True):
            assert got.dtype == g.dtype
            assert tuple(got.shape) == tuple(g.shape)
            np.testing.assert_allclose(to64(got), want, rtol=RTOL[dtype], atol=1e-7 + 1e-6 * scale)
        if getattr(clipper, "rescale", None) is None:
            same = np.mean([np.allclose(to64(a), b) for a, b in zip(clipped, g64, strict=True)])
            assert (same == 1.0) == (scale == 1e-3)


def test_norm_of_float16_does_not_overflow():
    v = keras.Variable(np.ones(2, "float32"))
    (got,) = kgc.NormClip(1.0)([ops.convert_to_tensor([300.0, 300.0], "float16")], [v])
    np.testing.assert_allclose(to64(got), [np.sqrt(0.5)] * 2, rtol=2e-3)


@pytest.mark.parametrize("scope", ["layer", "variable", "global"])
def test_one_infinity_does_not_spoil_the_other_gradients(scope):
    vs = variables()
    gs, _ = gradients(vs)
    bad = np.array(ops.convert_to_numpy(gs[0]))
    bad[0, 0, 0, 0] = np.inf
    clipped = kgc.NormClip(1.0, scope)([ops.convert_to_tensor(bad), *gs[1:]], vs)
    finite = [np.isfinite(to64(g)) for g in clipped]
    assert all(f.all() for f in finite[1:])
    assert finite[0].sum() == finite[0].size - 1  # the infinite element stays visible


@pytest.mark.parametrize(
    "clipper", [kgc.AbsoluteClip(0.1), kgc.ExponentialClip(gamma=0.1), kgc.NormClip(1.0)], ids=str
)
def test_nan_stays_nan(clipper):
    v = keras.Variable(np.ones(70, "float32"))
    g = np.ones(70, "float32")
    g[3] = np.nan
    (got,) = clipper([ops.convert_to_tensor(g)], [v])
    assert np.isnan(to64(got)[3])


ALL = [
    kgc.AbsoluteClip(0.1),
    kgc.AbsoluteClip(0.1, "norm"),
    kgc.AbsoluteClip(0.1, "max"),
    kgc.ExponentialClip(gamma=0.1),
    kgc.ExponentialClip(gamma=0.1, weight="rms", rescale="alpha"),
    kgc.ExponentialClip(gamma=0.1, weight="none"),
    kgc.NormClip(1.0),
    kgc.NormClip(1.0, "variable"),
    kgc.NormClip(1.0, "global"),
    kgc.ClipMap({"conv/.*": kgc.NormClip(0.5), "dense/bias": None}, kgc.AbsoluteClip(0.1)),
    kgc.ClipMap([("conv/.*", kgc.NormClip(0.5)), (".*/bias", None)]),
    kgc.Chain([kgc.AbsoluteClip(0.1), kgc.NormClip(0.5, "global")]),
]


@pytest.mark.parametrize("clipper", ALL, ids=str)
def test_zero_gradient_stays_zero_and_none_stays_none(clipper):
    vs = variables()
    gs = [ops.zeros(v.shape) for v in vs]
    gs[1] = None
    clipped = clipper(gs, vs)
    assert clipped[1] is None
    for i in (0, 2, 3, 4):
        np.testing.assert_array_equal(to64(clipped[i]), 0.0)


@pytest.mark.parametrize(
    "clipper", [c for c in ALL if getattr(c, "rescale", None) is None], ids=str
)
def test_clipping_twice_is_clipping_once(clipper):
    vs = variables()
    once = clipper(gradients(vs)[0], vs)
    for a, b in zip(once, clipper(once, vs), strict=True):
        np.testing.assert_allclose(to64(a), to64(b), rtol=1e-6)


@pytest.mark.parametrize("mode", ["norm", "max"])
def test_rescale_brings_the_size_back(mode):
    vs = variables()
    gs, g64 = gradients(vs)
    size = np.linalg.norm if mode == "norm" else lambda x: np.abs(x).max()
    for got, g in zip(kgc.AbsoluteClip(0.05, mode)(gs, vs), g64, strict=True):
        np.testing.assert_allclose(size(to64(got).ravel()), size(g.ravel()), rtol=1e-5)


def test_huge_weights_do_not_turn_a_zero_gradient_into_nan():
    v = keras.Variable(np.array([1e4, -1e4], "float32"))
    (got,) = kgc.ExponentialClip(rescale="alpha")([ops.zeros(2)], [v])
    np.testing.assert_array_equal(to64(got), 0.0)


def test_chain_applies_in_order():
    vs = variables()
    gs, g64 = gradients(vs)
    got = kgc.Chain([kgc.AbsoluteClip(0.1), kgc.NormClip(0.3, "global")])(gs, vs)
    first = wanted(kgc.AbsoluteClip(0.1), g64, vs)
    for a, b in zip(got, wanted(kgc.NormClip(0.3, "global"), first, vs), strict=True):
        np.testing.assert_allclose(to64(a), b, rtol=2e-6)


def test_stats_count_what_was_clipped():
    vs = variables()
    gs, g64 = gradients(vs)
    _, _, stats = kgc.AbsoluteClip(0.5).apply(gs, vs, {}, {"threshold": 0.5})
    want = [np.mean(np.abs(g) > 0.5) for g in g64]
    np.testing.assert_allclose([float(f) for f in stats.fractions()], want, rtol=1e-6)
    assert stats.weights == [float(g.size) for g in g64]

    _, _, stats = kgc.NormClip(3.0).apply(gs, vs, {}, {"max_norm": 3.0})
    layers = [layer_of(v) for v in vs]
    hit = {
        name: np.sqrt(sum((g**2).sum() for g, k in zip(g64, layers, strict=True) if k == name)) > 3
        for name in layers
    }
    assert [bool(f) for f in stats.fractions()] == [hit[k] for k in layers]
    assert len(set(hit.values())) == 2, "the test needs a clipped layer and an unclipped one"
    assert sum(stats.weights) == pytest.approx(len(set(layers)))


def test_layer_is_everything_before_the_last_slash():
    vs = variables()
    assert [layer_of(v) for v in vs] == ["conv", "conv", "norm", "dense", "dense"]


@pytest.mark.parametrize("clipper", ALL, ids=str)
def test_round_trip(clipper):
    import json

    config = json.loads(json.dumps(kgc.serialize(clipper)))
    again = kgc.get(config)
    assert again == clipper
    assert kgc.serialize(again) == kgc.serialize(clipper)


def test_a_schedule_is_a_threshold_and_round_trips():
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.1)
    clipper = kgc.AbsoluteClip(schedule)
    again = kgc.get(kgc.serialize(clipper))
    assert again.threshold.get_config() == schedule.get_config()
    v = keras.Variable(np.zeros(2, "float32"))
    (got,) = again([ops.convert_to_tensor([5.0, -5.0])], [v])
    np.testing.assert_allclose(to64(got), [1.0, -1.0])


@pytest.mark.parametrize(
    "identifier, want",
    [
        (None, None),
        ("absolute", kgc.AbsoluteClip()),
        ("exponential", kgc.ExponentialClip()),
        ("NormClip", kgc.NormClip()),
        ({"class_name": "absolute", "config": {"threshold": 0.05}}, kgc.AbsoluteClip(0.05)),
        ({"class_name": "AbsoluteClip"}, kgc.AbsoluteClip()),
        (
            {"class_name": "keras_gradclip>NormClip", "config": {"scope": "global"}},
            kgc.NormClip(scope="global"),
        ),
        (kgc.AbsoluteClip(0.3), kgc.AbsoluteClip(0.3)),
    ],
)
def test_get(identifier, want):
    assert kgc.get(identifier) == want


def test_layers_of_the_same_path_are_two_layers():
    """Two towers with a Dense of the same name in each; and variables without a path."""
    vs = [*variables()[3:], *variables()[3:]]
    gs = [ops.ones(v.shape) for v in vs]
    got = kgc.NormClip(1.0)(gs, vs)
    for g in got:
        np.testing.assert_allclose(to64(g), 1 / np.sqrt(18), rtol=1e-6)
    plain = [np.ones(1, "float32"), np.ones(1, "float32")]
    got = kgc.NormClip(1.0)([ops.convert_to_tensor([3.0]), ops.convert_to_tensor([4.0])], plain)
    assert [float(g[0]) for g in got] == [1.0, 1.0]


@pytest.mark.parametrize("make", [kgc.AbsoluteClip, kgc.NormClip], ids=["absolute", "norm"])
def test_a_schedule_that_reaches_zero_or_less_turns_no_gradient_around(make):
    v = keras.Variable(np.zeros(2, "float32"))
    for end in (0.0, -1.0):
        clipper = make(keras.optimizers.schedules.PolynomialDecay(end, 1, end))
        for g in ([0.5, -0.5], [0.0, 0.0]):
            (got,) = clipper([ops.convert_to_tensor(g)], [v])
            np.testing.assert_allclose(to64(got), 0.0, atol=1e-20)


def test_missing_gradients_do_not_count():
    vs = variables()
    gs, _ = gradients(vs)
    _, _, stats = kgc.AbsoluteClip(1e-6).apply([None, *gs[1:]], vs, {}, {"threshold": 1e-6})
    assert stats.weights[0] == 0.0
    assert [float(f) for f in stats.fractions()[1:]] == pytest.approx([1.0] * 4)


def test_mismatched_lists_are_refused():
    vs = variables()
    with pytest.raises(ValueError, match="one to one"):
        kgc.AbsoluteClip(0.1)(gradients(vs)[0][:-1], vs)
