"""Random models of real layers: what a unit may move, and what a bad batch leaves behind."""

import keras
import numpy as np
import pytest
from examples import EXAMPLES, fuzzed
from hypothesis import strategies as st

import keras_gradclip as kgc

RATIO, EPS = 0.01, 1e-3
L = keras.layers

#: Name to (layer, for each of its kernels the axes that one unit spans); inputs are (6, 6, 4).
LAYERS = {
    "conv": (lambda n: L.Conv2D(3, 2, name=n), {"kernel": (0, 1, 2)}),
    "transposed": (lambda n: L.Conv2DTranspose(3, 2, name=n), {"kernel": (0, 1, 3)}),
    "depthwise": (lambda n: L.DepthwiseConv2D(2, depth_multiplier=2, name=n), {"kernel": (0, 1)}),
    "separable": (
        lambda n: L.SeparableConv2D(3, 2, name=n),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    "normalised": (lambda n: L.BatchNormalization(name=n), {}),
    "dense": (lambda n: L.Dense(3, name=n), {"kernel": (0,)}),
}
#: The same, of what takes sequences; one of them comes last.
SEQUENCES = {
    "gru": (lambda n: L.GRU(3, name=n), {"kernel": (0,), "recurrent_kernel": (0,)}),
    "lstm": (lambda n: L.LSTM(3, name=n), {"kernel": (0,), "recurrent_kernel": (0,)}),
    "rnn": (lambda n: L.SimpleRNN(3, name=n), {"kernel": (0,), "recurrent_kernel": (0,)}),
    "attention": (
        lambda n: L.MultiHeadAttention(2, 3, name=n),
        {
            "query/kernel": (0,),
            "key/kernel": (0,),
            "value/kernel": (0,),
            "attention_output/kernel": (0, 1),
        },
    ),
}
NAMES = ("a", "norm", "transpose", "depthwise", "up_1", "query", "bias")


@st.composite
def models(draw):
    """(kinds of layers, their names, an inner optimizer, how the step runs)."""
    kinds = draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3))
    kinds.append(draw(st.sampled_from(list(SEQUENCES))))
    names = draw(st.permutations(NAMES))
    inner = draw(st.sampled_from(("SGD", "Adam", "RMSprop")))
    return kinds, names, inner, draw(st.sampled_from(("eager", "eager", "eager", "compiled")))


def build(kinds, names):
    """The model, and path of a kernel to the axes of its units."""
    inputs = hidden = keras.Input((6, 6, 4))
    axes = {}
    for kind, name in zip(kinds, names, strict=False):
        make, own = {**LAYERS, **SEQUENCES}[kind]
        layer = make(name)
        if kind in SEQUENCES:
            hidden = L.Reshape((-1, hidden.shape[-1]))(hidden)
        hidden = layer(hidden, hidden) if kind == "attention" else layer(hidden)
        for variable in layer.trainable_variables:
            for end, span in own.items():
                if variable.path.endswith(f"/{end}"):
                    axes[variable.path] = span
    outputs = L.Dense(2, name="head")(L.Flatten()(hidden))
    model = kgc.ClippedModel(inputs, outputs)
    axes["head/kernel"] = (0,)
    return model, axes


def values_of(variables):
    return [np.array(keras.ops.convert_to_numpy(v), "float64") for v in variables]


def state_of(model):
    return [v for v in model.variables if "seed" not in v.path]


def check(drawn):
    kinds, names, inner, how = drawn
    model, axes = build(kinds, names)
    optimizer = kgc.ClippedOptimizer(
        getattr(keras.optimizers, inner)(1.0),
        kgc.UpdateRatioClip(RATIO, eps=EPS),
        skip_nonfinite=True,
    )
    model.compile(optimizer, "mse", run_eagerly=how == "eager")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 6, 4)).astype("float32")
    y = 30 * rng.normal(size=(4, 2)).astype("float32")
    for _ in range(2):
        before = values_of(model.trainable_variables)
        model.train_on_batch(x, y)
        after = values_of(model.trainable_variables)
        shares = []
        for variable, old, new in zip(model.trainable_variables, before, after, strict=True):
            if variable.path in axes:
                span = axes[variable.path]
                norm = np.maximum(np.sqrt(np.sum(old**2, axis=span)), EPS)
                share = np.sqrt(np.sum((new - old) ** 2, axis=span)) / norm
                assert share.max() <= RATIO * (1 + 1e-3), variable.path
                shares.append(share.max())
        assert max(shares) >= RATIO * (1 - 1e-3), "no bound was reached"
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    before = values_of(state_of(model))
    model.train_on_batch(bad, y)
    assert optimizer.skipped_steps == 1
    for variable, old, new in zip(state_of(model), before, values_of(state_of(model)), strict=True):
        np.testing.assert_array_equal(new, old, err_msg=variable.path)


@pytest.mark.timeout(0)
def test_units_and_bad_batches(capsys):
    fuzzed(check, max(EXAMPLES // 25, 4), models(), capsys)
