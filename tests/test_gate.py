"""The activation gate against its equation, in every kind of model, saved and loaded."""

import keras
import numpy as np
import pytest
from helpers import CLASSES, data, loss, net, strategy, train, weights
from keras import ops

import keras_gradclip as kgc
from keras_gradclip.gate import _gateable

tf = pytest.importorskip("tensorflow")

# |x| > 0.5, gradients times 0.1
GATE = kgc.ActivationGate(clip_value=0.05, gamma=0.1, initial_learning_rate=1.0)


def test_threshold_is_c_over_gamma_lr():
    assert kgc.ActivationGate().threshold == pytest.approx(1000.0)
    assert GATE.threshold == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_forward_is_the_identity_and_backward_is_the_equation(dtype):
    x = tf.cast([-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0], dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = GATE(x)
        value = tf.reduce_sum(y * tf.cast([1.0, 2, 3, 4, 5, 6, 7], dtype))
    np.testing.assert_array_equal(y.numpy(), x.numpy())
    got = tape.gradient(value, x)
    assert got.dtype == x.dtype
    want = np.array([0.1, 2, 3, 4, 5, 6, 0.7])
    np.testing.assert_allclose(tf.cast(got, "float64").numpy(), want, rtol=1e-2)


def manual(model, x, y, gated):
    """Gradients of a Dense-Dense net by hand, in float64."""
    (w1, b1), (w2, b2) = (
        [w.astype("float64") for w in model.get_layer(n).get_weights()] for n in ("one", "two")
    )
    h = x @ w1 + b1
    d_out = 2 * (h @ w2 + b2 - y) / y.size
    d_h = d_out @ w2.T
    if gated:
        d_h = np.where(np.abs(h) > 0.5, 0.1 * d_h, d_h)
    return [x.T @ d_h, d_h.sum(0), h.T @ d_out, d_out.sum(0)]


def dense_net(model_class=kgc.ClippedModel):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(5, name="one")(inputs)
    return model_class(inputs, keras.layers.Dense(2, name="two")(h))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["compile", "insert", "attach"])
def test_only_the_gradient_at_the_input_of_a_gated_layer_changes(gated, way):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 2))
    model = dense_net()
    want = manual(model, x, y, gated)
    if gated and way == "compile":
        model.compile("sgd", "mse", activation_gate=GATE)
    elif gated and way == "attach":
        model = keras.Model(model.inputs, model.outputs)
        GATE.attach(model)
    elif gated:
        model = GATE.insert(model)
    with tf.GradientTape() as tape:
        value = tf.reduce_mean(tf.square(model(x.astype("float32")) - y.astype("float32")))
    got = tape.gradient(value, model.trainable_variables)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=1e-6)


def nested():
    inner = keras.Sequential([keras.layers.Dense(6), keras.layers.ReLU()], name="inner")
    inputs = keras.Input((8, 8, 3))
    h = inner(keras.layers.Flatten()(inputs))
    return inputs, keras.layers.Dense(CLASSES, name="head")(h)


class Subclassed(kgc.ClippedModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flatten = keras.layers.Flatten()
        self.one, self.two = keras.layers.Dense(6), keras.layers.Dense(CLASSES)

    def call(self, x):
        return self.two(self.one(self.flatten(x)))


class Stack(kgc.ClippedTrainStep, keras.Sequential):
    pass


MODELS = {
    "functional": net,
    "nested": lambda: kgc.ClippedModel(*nested()),
    "subclassed, not built": Subclassed,
    "sequential": lambda: Stack(
        [keras.layers.Flatten(), keras.layers.Dense(6), keras.layers.Dense(CLASSES)]
    ),
}


def after_training(kind, gate):
    x, y = data(16)
    keras.utils.set_random_seed(3)
    model = MODELS[kind]()
    model.compile(keras.optimizers.SGD(0.1), loss(), activation_gate=gate)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return weights(model)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gate_acts_in_every_kind_of_model(kind):
    assert np.abs(after_training(kind, GATE) - after_training(kind, None)).max() > 1e-3


def test_a_gate_that_nothing_reaches_changes_nothing():
    results = [after_training("functional", g) for g in (None, kgc.ActivationGate(clip_value=1e9))]
    np.testing.assert_array_equal(*results)


def test_parity_under_a_strategy():
    args = {"clipper": kgc.NormClip(0.5), "activation_gate": GATE}
    _, _, want = train(0, lambda: keras.optimizers.Adam(1e-2), compile_args=args)
    _, _, got = train(2, lambda: keras.optimizers.Adam(1e-2), compile_args=args)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_saved_and_loaded_it_goes_on_bit_for_bit(tmp_path):
    x, y = data(16)
    model = net()
    model.compile(
        keras.optimizers.Adam(1e-2), loss(), clipper=kgc.AbsoluteClip(0.05), activation_gate=GATE
    )
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded._clipping.gate == GATE
    for m in (model, loaded):
        m.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(weights(model), weights(loaded))


@pytest.mark.parametrize("kind", ["functional", "sequential", "nested"])
def test_insert_saves_and_loads_in_a_plain_model(kind, tmp_path):
    x, y = data(16)
    if kind == "functional":
        model = net(keras.Model)
    elif kind == "nested":
        model = keras.Model(*nested())
    else:
        model = keras.Sequential(
            [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
        )
    paths = [v.path for v in model.trainable_variables]
    gated = GATE.insert(model)
    assert [v.path for v in gated.trainable_variables] == paths  # clip rules still match
    np.testing.assert_array_equal(gated.predict(x, verbose=0), model.predict(x, verbose=0))
    gated.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(0.1), kgc.AbsoluteClip(0.05)), loss())
    gated.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    gated.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for m in (gated, loaded):
        m.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    np.testing.assert_array_equal(weights(gated), weights(loaded))


def test_chosen_layers_only():
    model = net()
    gate = kgc.ActivationGate(layers=["head", "bo.*"])
    assert [layer.name for layer in _gateable(model) if gate.selects(layer)] == ["body", "head"]
    assert [layer.name for layer in _gateable(model) if GATE.selects(layer)] == [
        *("stem", "body", "head")
    ]


def test_a_layer_made_in_build_is_found_later():
    class Late(kgc.ClippedModel):
        def build(self, input_shape):
            self.late = keras.layers.Dense(CLASSES, name="late")
            self.late.build((None, 192))

        def call(self, x):
            return self.late(keras.ops.reshape(x, (-1, 192)))

    x, y = data(8)
    model = Late()
    model.compile("sgd", loss(), activation_gate=kgc.ActivationGate(layers="late"))
    model.fit(x, y, verbose=0)
    wrong = Late()
    wrong.compile("sgd", loss(), activation_gate=kgc.ActivationGate(layers="lately"))
    wrong(x)
    with pytest.raises(ValueError, match="selects no layer"):
        wrong.fit(x, y, verbose=0)


STRONG = kgc.ActivationGate(clip_value=1e-9, gamma=0.1, initial_learning_rate=1.0)


def input_gradient(model, x):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = tf.reduce_sum(tf.square(model(x)))
    return [g.numpy() for g in tape.gradient(value, [x, *model.trainable_variables])]


@pytest.mark.parametrize("way", ["compile", "insert"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.LSTM(3),
        lambda: keras.layers.Bidirectional(keras.layers.GRU(3)),
        lambda: keras.layers.TimeDistributed(keras.layers.Dense(3)),
    ],
    ids=["LSTM", "Bidirectional", "TimeDistributed"],
)
def test_a_recurrent_layer_is_gated_at_its_input_alone(make, way):
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    inputs = keras.Input((5, 3))
    model = kgc.ClippedModel(inputs, make()(inputs))
    before = input_gradient(model, x)
    if way == "insert":
        model = STRONG.insert(model)
    else:
        model.compile("sgd", "mse", activation_gate=STRONG)
    after = input_gradient(model, x)
    np.testing.assert_allclose(after[0], 0.1 * before[0], rtol=1e-5)
    for a, b in zip(after[1:], before[1:], strict=True):  # its own weights see the un-gated dy
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_attention_is_gated_at_its_inputs():
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    inputs = keras.Input((5, 4))
    model = kgc.ClippedModel(inputs, keras.layers.MultiHeadAttention(2, 3)(inputs, inputs))
    before = input_gradient(model, x)
    after = input_gradient(STRONG.insert(model), x)
    np.testing.assert_allclose(after[0], 0.1 * before[0], rtol=1e-4)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-4)


def test_other_models_that_share_the_layers_do_not_notice():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(2)(keras.layers.Dense(5)(inputs))
    gated, plain = kgc.ClippedModel(inputs, outputs), keras.Model(inputs, outputs)
    before = input_gradient(plain, x)
    gated.compile("sgd", "mse", activation_gate=STRONG)
    for a, b in zip(input_gradient(plain, x), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(input_gradient(gated, x)[0]).max() < 0.2 * np.abs(before[0]).max()


def test_a_call_that_the_user_replaced_is_kept():
    model = dense_net()
    x = np.ones((1, 4), "float32")
    layer = model.get_layer("two")
    layer.call = lambda h: keras.ops.zeros((1, 2)) + 7.0
    model.compile("sgd", "mse", activation_gate=GATE)
    np.testing.assert_array_equal(model(x), 7.0)


@pytest.mark.parametrize("way", ["compile", "insert"])
def test_sparse_inputs_pass(way):
    inputs = keras.Input((8,), sparse=True)
    model = kgc.ClippedModel(inputs, keras.layers.Dense(2)(inputs))
    if way == "insert":
        model = GATE.insert(model)
    model.compile("sgd", "mse", **{"activation_gate": GATE} if way == "compile" else {})
    x = tf.sparse.from_dense(np.eye(4, 8, dtype="float32"))
    model.fit(tf.data.Dataset.from_tensors((x, np.ones((4, 2)))), verbose=0)


def test_compiling_without_a_gate_removes_it():
    x, y = data(16)
    results = []
    for first in (None, GATE):
        model = net()
        model.compile("sgd", loss(), activation_gate=first)
        model.compile(keras.optimizers.SGD(0.1), loss())
        model.fit(x, y, shuffle=False, verbose=0)
        results.append(weights(model))
    np.testing.assert_array_equal(results[0], results[1])


def test_integer_inputs_and_masks_pass():
    inputs = keras.Input((6,), dtype="int32")
    h = keras.layers.Embedding(10, 4, mask_zero=True)(inputs)
    h = keras.layers.LSTM(4)(h)
    model = kgc.ClippedModel(inputs, keras.layers.Dense(2)(h))
    x = np.array([[1, 2, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0]])
    want = model.predict(x, verbose=0)
    model.compile("sgd", "mse", activation_gate=GATE)
    np.testing.assert_array_equal(model.predict(x, verbose=0), want)


@pytest.mark.parametrize("kind", [keras.Sequential, keras.Model])
@pytest.mark.parametrize("dtypes", [("mixed_float16", "float32"), ("float32", "float64")])
def test_insert_is_the_identity_for_layers_of_another_dtype_than_the_policy(dtypes, kind):
    policy, dtype = dtypes
    x = np.array([[70000.0, 1.00000001, 1e-9, -3.0]], dtype)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((4,), dtype=dtype)
        layer = keras.layers.Dense(4, kernel_initializer="identity", dtype=dtype)
        made = keras.Sequential([inputs, layer])
        model = GATE.insert(made if kind is keras.Sequential else kind(inputs, layer(inputs)))
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_array_equal(model(x).numpy(), x)
    assert {layer.output.dtype for layer in model.layers} == {dtype}


def test_insert_keeps_whole_numbers_of_a_sequential_model():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")  # which has no 3001
    try:
        layers = keras.Input((2,), dtype="int32"), keras.layers.Embedding(4000, 1)
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        gated = GATE.insert(model)
    finally:
        keras.config.set_dtype_policy(before)
    model.layers[0].embeddings.assign(np.arange(4000.0)[:, None] % 2)
    x = np.array([[3000, 3001]])
    np.testing.assert_array_equal(gated(x).numpy(), model(x).numpy())


def test_operations_in_a_graph_are_not_gated():
    inputs = keras.Input((5, 1))
    h = keras.layers.GRU(3, return_sequences=True)(keras.layers.Masking()(inputs))
    h = ops.matmul(h, ops.transpose(h, (0, 2, 1)))
    h = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(h)[:, 1:] * 2.0)
    model = keras.Model(inputs, h)
    x = np.array([[3.0, -2.0, 1.0, 0.0, 0.0]], "float32")[..., None]
    plain = model.predict(x, verbose=0)
    compiled = kgc.ClippedModel(inputs, h)
    compiled.compile("sgd", "mse", activation_gate=GATE)
    inserted = GATE.insert(model)
    np.testing.assert_array_equal(inserted.predict(x, verbose=0), plain)
    gradients = [input_gradient(m, x) for m in (inserted, compiled, model)]
    for ours, theirs in zip(*gradients[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not np.allclose(gradients[0][0], gradients[2][0])


def test_insert_needs_a_graph():
    model = Subclassed()
    model(data(2)[0])
    with pytest.raises(ValueError, match="ClippedModel"):
        GATE.insert(model)
    for layers in ("conv9", ["head", "conv9"]):
        with pytest.raises(ValueError, match="'conv9' selects no layer"):
            kgc.ActivationGate(layers=layers).insert(net())
    with pytest.raises(ValueError, match="gated already"):
        GATE.insert(GATE.insert(net(keras.Model)))


def test_round_trip():
    for gate in (GATE, kgc.ActivationGate(layers=["a", "b.*"])):
        assert kgc.ActivationGate.from_config(gate.get_config()) == gate


def test_attach_works_in_a_scope():
    with strategy(2).scope():
        model = net()
        model.compile("sgd", loss(), activation_gate=GATE)
    x, y = data(8)
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"][0])
