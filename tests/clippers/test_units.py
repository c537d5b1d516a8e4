"""Units are asked of the layers: what a layer is called makes no difference."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
from helpers import to64

import keras_gradclip as kgc
from keras_gradclip._layers import networks_of
from keras_gradclip.clippers.units import unit_of
from keras_gradclip.names import layers_of, names_of

L = keras.layers
KAPPA = 1e-2


def columns(k):
    return tuple(range(k.ndim - 1))


def norms(k, axes=None):
    return np.sqrt(np.sum(np.square(k), axis=columns(k) if axes is None else axes))


class Scaled(L.Dense):
    """Somebody's own Dense."""


class Minimal(L.Layer):
    """Somebody's own cell, as Keras's guide to recurrent layers has it."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, self.units), name="recurrent_kernel"
        )
        self.bias = self.add_weight(shape=(self.units,), name="bias", initializer="zeros")

    def call(self, x, states):
        h = x @ self.kernel + states[0] @ self.recurrent_kernel + self.bias
        return h, [h]


def einsum(equation, output, bias):
    return L.EinsumDense(equation, output_shape=output, bias_axes=bias, name="transpose")


IMAGE, LINE, WORDS = (6, 6, 4), (7, 4), (5, 6)
DEPTHWISE = "depthwise"
#: A layer of a name that says nothing or lies; its input; a unit's axes of each kernel that is not
#: (..., in, out); for a bias, of the kernels' norms by unit what each of its elements belongs to.
CASES = {
    "dense": (lambda: L.Dense(5, name="conv_dw_1"), (3,), {}, {"bias": lambda n: n["kernel"]}),
    "own dense": (lambda: Scaled(5, name="query"), (3,), {}, {"bias": lambda n: n["kernel"]}),
    "one input": (lambda: L.Dense(5), (1,), {"kernel": (0, 1)}, {"bias": lambda n: n["kernel"]}),
    "one unit": (lambda: L.Dense(1), (4,), {}, {"bias": lambda n: n["kernel"]}),
    "conv": (lambda: L.Conv2D(5, 3, name="transpose_free"), IMAGE, {}, None),
    "grouped": (lambda: L.Conv2D(6, 3, groups=2, name="depthwise"), IMAGE, {}, None),
    "conv 1": (lambda: L.Conv1D(5, 3, name="depthwise_transpose"), LINE, {}, None),
    "conv 3": (lambda: L.Conv3D(5, 2, name="query"), (3, 3, 3, 2), {}, None),
    "up 1": (lambda: L.Conv1DTranspose(5, 3, name="up1"), LINE, {"kernel": (0, 2)}, None),
    "up 2": (lambda: L.Conv2DTranspose(5, 3, name="up1"), IMAGE, {"kernel": (0, 1, 3)}, None),
    "up 3": (
        lambda: L.Conv3DTranspose(5, 2, name="up"),
        (3, 3, 3, 2),
        {"kernel": (0, 1, 2, 4)},
        None,
    ),
    "dw 1": (
        lambda: L.DepthwiseConv1D(3, depth_multiplier=2, name="dwconv"),
        LINE,
        {"kernel": (0,)},
        {"bias": lambda n: n["kernel"].reshape(-1)},
    ),
    "dw 2": (
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2, name="conv_dw_1"),
        IMAGE,
        {"kernel": (0, 1)},
        {"bias": lambda n: n["kernel"].reshape(-1)},
    ),
    "separable 1": (
        lambda: L.SeparableConv1D(5, 3, name="s"),
        LINE,
        {"depthwise_kernel": (0,)},
        {"bias": lambda n: n["pointwise_kernel"]},
    ),
    "separable 2": (
        lambda: L.SeparableConv2D(4, 3, name="s"),  # as many units as channels
        IMAGE,
        {"depthwise_kernel": (0, 1)},
        {"bias": lambda n: n["pointwise_kernel"]},
    ),
    "heads": (
        lambda: einsum("abc,cde->abde", (None, 2, 3), "de"),
        WORDS,
        {"kernel": (0,)},
        {"bias": lambda n: n["kernel"]},
    ),
    "heads first": (  # as keras-hub's Gemma has its queries
        lambda: einsum("btd,ndh->btnh", (None, 2, 3), "nh"),
        WORDS,
        {"kernel": (1,)},
        {"bias": lambda n: n["kernel"]},
    ),
    "other order": (
        lambda: einsum("abc,edc->abde", (None, 2, 3), "de"),
        WORDS,
        {"kernel": (2,)},
        {"bias": lambda n: n["kernel"].T},
    ),
    "shared bias": (
        lambda: einsum("abc,cde->abde", (None, 2, 3), "e"),
        WORDS,
        {"kernel": (0,)},
        {"bias": lambda n: n["kernel"].min(axis=0)},
    ),
    "bias a place": (
        lambda: einsum("abc,cd->abd", (5, 4), "bd"),
        WORDS,
        {"kernel": (0,)},
        {"bias": lambda n: np.broadcast_to(n["kernel"], (5, 4))},
    ),
    "bias a head": (
        lambda: einsum("abc,cde->abde", (None, 2, 3), "d"),
        WORDS,
        {"kernel": (0,)},
        {"bias": lambda n: n["kernel"].min(axis=1)[:, None]},
    ),
    "attention": (
        lambda: L.MultiHeadAttention(2, 3, name="transpose"),
        [WORDS, WORDS],
        {
            **{f"{part}/kernel": (0,) for part in ("query", "key", "value")},
            "attention_output/kernel": (0, 1),
        },
        {
            f"{part}/bias": lambda n, part=part: n[f"{part}/kernel"]
            for part in ("query", "key", "value", "attention_output")
        },
    ),
    "simple": (lambda: L.SimpleRNN(3, name="r"), LINE, {}, "recurrent"),
    "lstm": (lambda: L.LSTM(3, name="transpose"), LINE, {}, "recurrent"),
    "gru": (lambda: L.GRU(3, name="r"), LINE, {}, "rows"),
    "gru of old": (lambda: L.GRU(3, reset_after=False, name="r"), LINE, {}, "recurrent"),
    "both ways": (lambda: L.Bidirectional(L.GRU(3), name="b"), LINE, {}, "rows"),
    "cell": (lambda: L.RNN(L.GRUCell(3), name="b"), LINE, {}, "rows"),
    "own cell": (lambda: L.RNN(Minimal(3), name="b"), LINE, {}, "recurrent"),
    "cells": (lambda: L.RNN([L.LSTMCell(3), L.LSTMCell(2)], name="b"), LINE, {}, "recurrent"),
    "conv lstm": (lambda: L.ConvLSTM1D(2, 2, name="b"), (3, 5, 2), {}, "recurrent"),
    "distributed": (lambda: L.TimeDistributed(L.Dense(2), name="dw"), LINE, {}, None),
}


def model_of(make, shape):
    keras.utils.set_random_seed(0)
    shapes = shape if isinstance(shape, list) else [shape]
    inputs = [keras.Input(s) for s in shapes]
    layer = make()
    return keras.Model(inputs, layer(*inputs)), layer


def expected_bounds(model, axes, biases):
    """What each unit's step may be long, by path; and each element of a bias."""
    values = {v.path.partition("/")[2]: to64(v) for v in model.trainable_variables}
    of_units = {name: norms(k, axes.get(name)) for name, k in values.items() if "kernel" in name}
    bounds = dict(of_units)
    for name in (name for name in values if name not in of_units):
        home = name.rpartition("bias")[0]
        if biases == "recurrent":
            bounds[name] = of_units[f"{home}recurrent_kernel"]
        elif biases == "rows":
            rows = [of_units[f"{home}{k}"] for k in ("kernel", "recurrent_kernel")]
            bounds[name] = np.stack(rows)
        elif biases is None:
            bounds[name] = of_units[f"{home}kernel"]
        else:
            bounds[name] = biases[name](of_units)
    return {name: KAPPA * np.maximum(b, 1e-3) for name, b in bounds.items()}


@pytest.mark.parametrize("inner", ["sgd", "adam"])
@pytest.mark.parametrize("case", CASES)
def test_no_unit_and_no_bias_moves_further_than_it_may(case, inner):
    make, shape, axes, biases = CASES[case]
    model, _ = model_of(make, shape)
    rate = 1e4
    step = keras.optimizers.SGD(rate) if inner == "sgd" else keras.optimizers.Adam(rate)
    clipper = kgc.UpdateRatioClip(KAPPA)
    optimizer = kgc.ClippedOptimizer(step, clipper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every unit is known, no bias is free
        optimizer.build(model.trainable_variables)
    bounds = expected_bounds(model, axes, biases)
    before = [to64(v) for v in model.trainable_variables]
    rng = np.random.default_rng(0)
    grads = [
        keras.ops.convert_to_tensor(rng.normal(size=v.shape).astype("float32"))
        for v in model.trainable_variables
    ]
    optimizer.apply(grads)
    for v, old in zip(model.trainable_variables, before, strict=True):
        name = v.path.partition("/")[2]
        moved = np.abs(to64(v) - old)
        if "kernel" in name:
            moved = norms(moved, axes.get(name))
        np.testing.assert_allclose(moved, np.broadcast_to(bounds[name], moved.shape), rtol=2e-3)


def test_tables_scales_and_slopes():
    inputs = keras.Input((4,), dtype="int32")
    table, normal, slope = (
        L.Embedding(7, 3, name="kernel"),
        L.LayerNormalization(axis=(1, 2), name="k"),
        L.PReLU(name="dense"),
    )
    keras.Model(inputs, slope(normal(table(inputs))))
    kinds = {v.name: unit_of(v).kind for x in (table, normal, slope) for v in x.variables}
    assert kinds == {"embeddings": "table", "gamma": "other", "beta": "other", "alpha": "other"}
    assert unit_of(table.embeddings).axes == (1,)
    assert unit_of(normal.gamma).axes == (0, 1)  # one unit, and no kernel


def test_a_bias_that_stays_free_is_named_and_warned_of_once():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.Dense(2, name="b")(L.Dense(4, name="a")(inputs)))
    model.get_layer("a").kernel.trainable = False
    clipper = kgc.UpdateRatioClip()
    optimizer = kgc.ClippedOptimizer("sgd", clipper)
    with pytest.warns(UserWarning, match=r"free: a bias without.*\['a/bias'\]") as caught:
        optimizer.build(model.trainable_variables)
    assert len(caught) == 1
    rows = [row for row in clipper.describe(model).splitlines() if "free: a bias" in row]
    assert len(rows) == 1 and rows[0].startswith("a/bias")


class Scale(L.Layer):
    """A custom layer with a vector and no kernel."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="ones", name="scale")
        self.float8 = self.add_weight(shape=(), initializer="ones", name="float8_scale")
        self.float8.overwrite_with_gradient = True  # is no gradient, and never limited

    def call(self, x):
        return x * self.scale


def test_a_vector_without_a_kernel_is_warned_of():
    inputs = keras.Input((3,))
    outputs = L.PReLU()(L.LayerNormalization()(Scale(name="own")(L.Dense(3)(inputs))))
    clipper, variables = kgc.UpdateRatioClip(), keras.Model(inputs, outputs).trainable_variables
    with pytest.warns(UserWarning, match=r"free: a vector.*\['own/scale'\]") as caught:
        kgc.ClippedOptimizer("sgd", clipper).build(variables)
    assert len(caught) == 1
    assert clipper.describe(variables).count("free: ") == 1
    assert "free: " not in kgc.UpdateRatioClip(biases=None).describe(variables)


class Odd(L.Layer):
    """A layer of somebody's own, with a kernel (height, width, out, in)."""

    def build(self, shape):
        self.filters = self.add_weight(shape=(2, 2, 3, shape[-1]), name="filters")

    def call(self, x):
        return x + keras.ops.sum(self.filters)


def test_units_that_nobody_tells_of_are_warned_of_and_can_be_given():
    layer = Odd(name="odd")
    layer.build((None, 5))
    for cls in (kgc.AdaptiveClip, kgc.UpdateRatioClip):
        with pytest.warns(UserWarning, match=r"a guess, pass `axes`: \['odd/filters'\]"):
            kgc.ClippedOptimizer("sgd", cls()).build(layer.trainable_variables)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            given = cls(axes={"odd/filters": (0, 1, 3)})
            kgc.ClippedOptimizer("sgd", given).build(layer.trainable_variables)


def test_axes_that_a_variable_does_not_have():
    layer = L.Dense(2, name="d")
    layer.build((None, 3))
    with pytest.raises(ValueError, match=r"UpdateRatioClip: `axes` gives \[2\] for 'd/kernel'"):
        kgc.UpdateRatioClip(axes={"d/kernel": (2,)}).describe(layer.trainable_variables)


@pytest.mark.parametrize("order", ["kernel", "kernel kernel bias", "kernel bias kernel bias"])
@pytest.mark.parametrize("have_layers", [True, False])
def test_layers_of_one_path_are_told_apart(order, have_layers):
    """Two towers; of the first (or of both) no bias trains."""
    towers = []
    for _ in range(2):
        if have_layers:
            layer = L.Dense(3, name="proj")
            layer.build((None, 4))
            towers.append({"kernel": layer.kernel, "bias": layer.bias, "layer": layer})
        else:
            with keras.name_scope("proj"):
                pairs = {"kernel": (4, 3), "bias": (3,)}
                towers.append({n: keras.Variable(np.ones(s), name=n) for n, s in pairs.items()})
    first, second = towers
    variables = {
        "kernel": [first["kernel"], second["kernel"]],
        "kernel kernel bias": [first["kernel"], second["kernel"], second["bias"]],
        "kernel bias kernel bias": [tower[n] for tower in towers for n in ("kernel", "bias")],
    }[order]
    owners = [1 if any(v is x for x in first.values()) else 2 for v in variables]
    assert layers_of(variables) == ["proj" if n == 1 else "proj#2" for n in owners]
    tails = [v.name for v in variables]
    both = zip(layers_of(variables), tails, strict=True)
    assert names_of(variables) == [f"{layer}/{tail}" for layer, tail in both]
    if have_layers and order == "kernel kernel bias":
        mixed = [second["bias"], first["kernel"], second["kernel"]]
        assert layers_of(mixed) == ["proj", "proj#2", "proj"]
        unique = [first["kernel"], second["bias"]]  # no path twice, and yet two layers
        assert layers_of(unique) == ["proj", "proj#2"]


def test_tied_weights_belong_to_the_layer_that_made_them():
    class Logits(L.Layer):
        def __init__(self, table, **kwargs):
            super().__init__(**kwargs)
            self.table = table.embeddings

        def call(self, x):
            return x @ keras.ops.transpose(self.table)

    table = L.Embedding(7, 3, name="words")
    table.build()
    keep = Logits(table, name="logits")
    assert unit_of(table.embeddings).kind == "table" and keep.table is table.embeddings


def test_the_network_around_variables():
    def network(*layers):
        inputs = keras.Input((3,))
        return keras.Model(inputs, keras.Sequential(layers)(inputs))

    base = keras.Sequential([L.Dense(4), L.BatchNormalization()], name="base")
    model, critic = network(base, L.Dense(2)), network(L.Dense(1))
    base.trainable = False
    assert networks_of(model.trainable_variables) == [model]  # the frozen layers, too
    both = networks_of([*model.trainable_variables, *critic.trainable_variables])
    assert {id(n) for n in both} == {id(model), id(critic)}
    outer = network(critic, L.Dense(1))  # trains more than the critic
    assert networks_of(critic.trainable_variables) == [critic]
    assert networks_of(outer.trainable_variables) == [outer]


@pytest.mark.parametrize(
    ("clipper", "most"),
    [
        (kgc.AbsoluteClip(), 0),
        (kgc.UpdateRatioClip(), 1),
        (kgc.ClipMap({".*head/.*": None}, kgc.NormClip()), 1),
        ("auto", 1),
    ],
)
def test_a_build_looks_through_memory_once_at_most(clipper, most, monkeypatch):
    scans = []
    monkeypatch.setattr(gc, "get_objects", lambda own=gc.get_objects: scans.append(1) or own())
    model = keras.Sequential([keras.Input((3,)), L.Dense(4), L.Dense(2, name="head")])
    kgc.ClippedOptimizer("adam", clipper).build(model.trainable_variables)
    assert len(scans) <= most


def test_what_was_asked_keeps_no_layer_alive():
    layer = L.Dense(2)
    layer.build((None, 3))
    kernel = layer.kernel
    assert unit_of(kernel).is_known
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None and unit_of(kernel).is_known
