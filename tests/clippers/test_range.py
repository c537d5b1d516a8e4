"""Thresholds, weights and learning rates as far as float32 goes."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradclip as kgc
from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip.clippers import parameters, selectable

SMALLEST, LARGEST = (float(x) for x in (np.finfo("float32").tiny, np.finfo("float32").max))
#: Of weights, as far as each dtype goes.
SIZES = {"float16": (0.0, 6e4), "bfloat16": (8.0, 1e30), "float32": (0.0, 8.0, 1e30)}
if keras.backend.backend() != "jax":  # which has no float64 unless it is asked for
    SIZES["float64"] = (8.0, 1e30)
UNIT = kgc.UpdateRatioClip(eps=SMALLEST)
CLIPPERS = {
    "absolute": (kgc.AbsoluteClip(), "threshold"),
    "absolute, rescaled": (kgc.AbsoluteClip(rescale="norm"), "threshold"),
    "exponential, beta": (kgc.ExponentialClip(), "beta"),
    "exponential, gamma": (kgc.ExponentialClip(weight="rms", rescale="max"), "gamma"),
    "exponential, none": (kgc.ExponentialClip(weight="none"), "beta"),
    "norm": (kgc.NormClip(), "max_norm"),
    "norm, global": (kgc.NormClip(scope="global"), "max_norm"),
    "rms": (kgc.RMSClip(), "threshold"),
    "adaptive": (kgc.AdaptiveClip(eps=SMALLEST), "clip_factor"),
    "adaptive, large eps": (kgc.AdaptiveClip(eps=LARGEST), "clip_factor"),
    "update ratio, unit": (UNIT, "max_ratio"),
    "update ratio, layer": (kgc.UpdateRatioClip(scope="layer"), "max_ratio"),
    "update ratio, annealed": (kgc.UpdateRatioClip(anneal="learning_rate"), "max_ratio"),
    "percentile": (kgc.PercentileClip(window=3), "percentile"),
    "z-score": (kgc.ZScoreClip(warmup_steps=1), "z_threshold"),
    "z-score, small eps": (kgc.ZScoreClip(warmup_steps=1, eps=SMALLEST), "z_threshold"),
    "z-score, mean": (kgc.ZScoreClip(warmup_steps=1, option="mean"), "z_threshold"),
    "ada": (kgc.AdaClip(warmup_steps=1), "lambda_rel"),
    "ada, warm-up": (kgc.AdaClip(), "lambda_abs"),
}
#: By which a threshold of the largest number clips nothing.
LIMITS = [k for k in CLIPPERS if k not in ("percentile", "exponential, beta", "ada")]
LIMITS = [k for k in LIMITS if "z-score," not in k]
INNERS = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam}


def layers():
    result = []
    for dtype, sizes in SIZES.items():
        for size in sizes:
            with keras.name_scope(f"{dtype}_{size:g}".replace("+", "")):
                value = np.full((2, 3), size)
                result.append(keras.Variable(value, dtype=dtype, name="kernel"))
                result.append(keras.Variable(value[0], dtype=dtype, name="bias"))
    return result


def optimizer_of(inner, clipper, rate, variables):
    optimizer = kgc.ClippedOptimizer(inner(rate), clipper)
    optimizer.build(variables)
    return optimizer


OF_UPDATES = [case for case, (clipper, _) in CLIPPERS.items() if clipper.stage == "update"]


@pytest.mark.parametrize(
    ("case", "inner", "rate"),
    [
        *((case, "sgd", 0.0) for case in CLIPPERS),
        *((case, "sgd", 1e-45) for case in OF_UPDATES),
        *((case, "adam", 1e-3) for case in ("absolute", *OF_UPDATES)),
    ],
)
def test_no_limit_is_nan(case, inner, rate):
    clipper, name = CLIPPERS[case]
    variables = [v for v in layers() if inner == "sgd" or v.dtype != "float16"]  # its v overflows
    values = [ops.convert_to_numpy(ops.cast(v, "float32")) for v in variables]
    optimizer = optimizer_of(INNERS[inner], clipper, rate, variables)
    for threshold in (SMALLEST, 100.0) if case == "percentile" else (SMALLEST, 1e36, LARGEST):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        optimizer.clip_hyperparameters[name] = threshold
        for size in (0.0, 1e4):
            optimizer.apply([ops.full(v.shape, size, v.dtype) for v in variables], variables)
            for v in variables:
                x = ops.convert_to_numpy(ops.cast(v, "float32"))
                assert np.isfinite(x).all(), (threshold, size, v.path)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("anneal", [None, "learning_rate"])
@pytest.mark.parametrize("scope", ["unit", "variable", "layer"])
def test_no_step_is_nan_at_the_largest_rate(scope, anneal, inner):
    """Where steps are bounded, no rate may take a weight out of its range."""
    clipper = kgc.UpdateRatioClip(scope=scope, anneal=anneal)
    variables = [v for v in layers() if v.dtype == "float32" and "1e30" not in v.path]
    optimizer = optimizer_of(INNERS[inner], clipper, 3e37, variables)
    for size in (0.0, 1.0, 10.0):
        optimizer.apply([ops.full(v.shape, size, v.dtype) for v in variables], variables)
        assert all(np.isfinite(ops.convert_to_numpy(v)).all() for v in variables), size


def after_two_updates(clipper, **thresholds):
    variables = layers()
    optimizer = optimizer_of(keras.optimizers.SGD, clipper, 1e-3, variables)
    optimizer.clip_hyperparameters.update(thresholds)
    for size in (1.0, 3.0):
        optimizer.apply([ops.full(v.shape, size, v.dtype) for v in variables], variables)
    return [ops.convert_to_numpy(ops.cast(v, "float32")) for v in variables]


@pytest.fixture(scope="module")
def without_a_clip():
    return after_two_updates(None)


@pytest.mark.parametrize("case", LIMITS)
def test_the_largest_threshold_clips_nothing(case, without_a_clip):
    clipper, name = CLIPPERS[case]
    for ours, plain in zip(
        after_two_updates(clipper, **{name: LARGEST}), without_a_clip, strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-6)


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1.0, LARGEST, np.inf])
@pytest.mark.parametrize("limit", [0.0, 1e-45, 1.0, LARGEST, np.inf])
def test_the_factor_of_any_limit(norm, limit):
    factor = float(
        arithmetic.clip_factor(*(ops.convert_to_tensor(x, "float32") for x in (norm, limit)))
    )
    assert 0.0 <= factor <= 1.0
    if limit == np.inf and norm < np.inf:
        assert factor == (1.0 if norm else factor)


# What is refused --------------------------------------------------------------------------------

OUTSIDE = [1e39, 1e308, 10**60, 1e-39, 5e-324, np.float64(1e40)]


def numbers():
    for cls in selectable().values():
        for p in parameters(cls):
            if p.kind == "number":
                yield pytest.param(
                    lambda v, cls=cls, n=p.name: cls(**{n: v}), p, id=f"{cls.__name__}-{p.name}"
                )


@pytest.mark.parametrize("value", OUTSIDE, ids=repr)
@pytest.mark.parametrize("make, parameter", list(numbers()))
def test_a_number_that_float32_lacks(make, parameter, value):
    with pytest.raises(
        ValueError, match=f"`{parameter.name}` must be .*{float(value)!r}".replace("+", r"\+")
    ):
        make(value)


@pytest.mark.parametrize("value", OUTSIDE, ids=repr)
def test_a_number_that_float32_lacks_elsewhere(value):
    optimizer = kgc.ClippedOptimizer("sgd", kgc.ClipMap({".*": kgc.NormClip()}))
    with pytest.raises(ValueError, match="float32"):
        optimizer.clip_hyperparameters[".*/max_norm"] = value
    with pytest.raises(ValueError, match=r"`skip_spikes`.*float32"):
        kgc.ClippedOptimizer("sgd", skip_spikes=value)
    for name in ("clip_value", "gamma", "initial_learning_rate"):
        with pytest.raises(ValueError, match=f"`{name}`.*float32"):
            kgc.ActivationGate(**{name: value})


SCHEDULES = keras.optimizers.schedules


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULES.ExponentialDecay(1e39, 2, 0.5),
        SCHEDULES.PolynomialDecay(1.0, 2, -1e39),
        SCHEDULES.PiecewiseConstantDecay([2], [1.0, float("inf")]),
        SCHEDULES.CosineDecay(float("nan"), 2),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_schedule_of_numbers_that_float32_lacks(schedule):
    with pytest.raises(ValueError, match="schedule of `max_norm` has the constant"):
        kgc.NormClip(schedule)


def test_a_schedule_that_grows_out_of_float32():
    clipper = kgc.NormClip(SCHEDULES.ExponentialDecay(1e30, 1, 1e9))
    (variable,) = [keras.Variable(np.ones((2, 3), "float32"), name="kernel")]
    optimizer = optimizer_of(keras.optimizers.SGD, clipper, 1.0, [variable])
    for _ in range(4):
        optimizer.apply([ops.ones((2, 3))], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), -3.0)


@pytest.mark.parametrize("value", [SMALLEST, LARGEST, 3.4028235e38])
def test_the_ends_of_float32_are_kept(value):
    clipper = kgc.NormClip(value)
    optimizer = kgc.ClippedOptimizer("sgd", clipper)
    again = kgc.ClippedOptimizer.from_config(json.loads(json.dumps(optimizer.get_config())))
    assert again.clip_hyperparameters["max_norm"] == float(np.float32(value))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("gamma", [SMALLEST, 1e-10, 1e10, LARGEST])
def test_a_gate_of_any_factor(gamma, dtype):
    """A gradient of 0 stays 0, where γ is infinite in float16."""
    keras.config.set_dtype_policy(dtype)
    inputs = keras.Input((3,), dtype=dtype)
    model = keras.Sequential([inputs, keras.layers.Dense(2, kernel_initializer="zeros")])
    gate = kgc.ActivationGate(gamma=gamma, initial_learning_rate=LARGEST)
    gated = gate.insert(model)
    gated.compile(keras.optimizers.SGD(1e-3), "mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gated.fit(np.full((4, 3), 100.0), np.zeros((4, 2)), verbose=0)
    for weight in gated.get_weights():
        assert np.isfinite(weight.astype("float32")).all()
    assert np.isfinite(gate.threshold)


def test_what_ends_a_clip():
    optimizer = kgc.ClippedOptimizer("sgd", kgc.NormClip())
    with pytest.raises(TypeError, match="clipper=None") as error:
        del optimizer.clip_hyperparameters["max_norm"]
    assert "large" not in str(error.value)
