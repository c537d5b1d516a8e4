"""UpdateRatioClip against its equation, and the learning rate that the optimizer tells it."""

import keras
import numpy as np
import pytest
from helpers import data, gradients, loss, net, to64, train, variables
from keras import ops
from oracles import Clip

import keras_gradclip as kgc
from keras_gradclip.names import path_of


def clip(clipper, gs, vs, rate):
    hyper = {"max_ratio": ops.convert_to_tensor(clipper.max_ratio, "float32")}
    hyper["learning_rate"] = ops.convert_to_tensor(rate, "float32")
    return clipper.apply(gs, vs, {}, hyper)


@pytest.mark.parametrize("biases", [None, "unit"])
@pytest.mark.parametrize("scope", ["unit", "variable", "layer"])
def test_the_rate_that_it_is_told_and_what_it_counts(scope, biases):
    vs = variables(5)
    gs, g64 = gradients(vs, 5)
    clipper = kgc.UpdateRatioClip(0.01, scope=scope, biases=biases)
    w64, paths = [to64(v) for v in vs], [path_of(v) for v in vs]
    for rate in (1e-5, 0.012, 1.0):
        got, _, stats = clip(clipper, gs, vs, rate)
        want = Clip(clipper, lambda step, rate=rate: rate)(g64, w64, paths)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(to64(a), b, rtol=2e-6, atol=1e-6)
        shares = [None if f is None else float(f) for f in stats.fractions()]
        for i in (1, 4):  # a bias is limited element by element
            changed = np.mean(np.abs(want[i] - g64[i]) > 1e-9)
            assert shares[i] is None if biases is None else np.isclose(shares[i], changed)
        assert shares[2] is None
        kernels = [shares[i] for i in (0, 3)]
        assert kernels == [0.0, 0.0] if rate < 1e-4 else max(kernels) > 0
        assert rate < 1 or kernels == [1.0, 1.0]


def test_biases_are_limited_unless_told_otherwise():
    assert kgc.UpdateRatioClip().biases == "unit"
    free = kgc.UpdateRatioClip(biases=None)
    assert kgc.UpdateRatioClip.from_config(free.get_config()) == free


def test_a_bias_without_units_of_its_own_is_left_alone():
    with keras.name_scope("gru"):
        vs = [
            keras.Variable(np.ones(shape, "float32"), name=name)
            for shape, name in (((2, 6), "kernel"), ((2, 6), "bias"), ((3,), "gamma"), ((), "t"))
        ]
    gs = [100 * ops.ones(v.shape) for v in vs]
    got = kgc.UpdateRatioClip()(gs, vs)
    for a, b in zip(got[1:], gs[1:], strict=True):
        np.testing.assert_array_equal(to64(a), to64(b))


def test_one_layer_of_two_kernels_shares_a_norm():
    with keras.name_scope("lstm"):
        vs = [
            keras.Variable(np.full((2, 3), w, "float32"), name=n) for w, n in ((3, "a"), (4, "b"))
        ]
    gs = [ops.ones((2, 3)), 2 * ops.ones((2, 3))]
    got = kgc.UpdateRatioClip(0.1, scope="layer")(gs, vs)
    size = np.sqrt(sum(np.sum(to64(g) ** 2) for g in got))
    np.testing.assert_allclose(size, 0.1 * np.sqrt(6 * (9 + 16)), rtol=1e-6)
    np.testing.assert_allclose(to64(got[1]), 2 * to64(got[0]))


def test_zero_weights_move_by_the_floor_and_called_alone_the_gradient_is_the_step():
    kernel = keras.Variable(np.zeros((4, 3), "float32"), name="kernel")
    (got,) = kgc.UpdateRatioClip(0.5, eps=0.01)([ops.ones((4, 3))], [kernel])
    np.testing.assert_allclose(np.linalg.norm(to64(got), axis=0), 0.005, rtol=1e-6)


@pytest.mark.parametrize("bad", [0, -1e-3, float("nan"), None, "x"])
@pytest.mark.parametrize("name", ["max_ratio", "eps"])
def test_misuse(name, bad):
    with pytest.raises(ValueError, match=f"UpdateRatioClip: `{name}`"):
        kgc.UpdateRatioClip(**{name: bad})


def test_inner_optimizer_without_a_learning_rate():
    class Rateless(keras.optimizers.SGD):
        learning_rate = None

    optimizer = kgc.ClippedOptimizer(Rateless(), kgc.Chain([kgc.UpdateRatioClip()]))
    with pytest.raises(ValueError, match=r"Rateless.*no learning rate"):
        optimizer.build([keras.Variable([1.0])])


def ratios(model, before):
    """For each kernel, the largest share of its norm by which a unit moved since `before`."""
    result = []
    for v, old in zip(model.trainable_variables, before, strict=True):
        if len(v.shape) > 1:
            moved = np.linalg.norm((to64(v) - old).reshape(-1, old.shape[-1]), axis=0)
            result.append((moved / np.linalg.norm(old.reshape(-1, old.shape[-1]), axis=0)).max())
    return np.array(result)


def test_the_learning_rate_is_read_at_every_step_without_a_retrace():
    traces = []

    class Counting(kgc.UpdateRatioClip):
        def apply(self, *args):
            traces.append(1)
            return super().apply(*args)

    model = net(keras.Model)
    clipper = kgc.ClipMap({"body/.*": Counting(0.004)}, default=kgc.UpdateRatioClip(0.001))
    model.compile(kgc.ClippedOptimizer(keras.optimizers.SGD(1e3), clipper), loss())
    x, y = data(16)
    initial = model.get_weights()
    before = [to64(v) for v in model.trainable_variables]
    for rate in (1e3, 10.0, 1e-7):
        model.optimizer.learning_rate = rate
        model.set_weights(initial)
        model.fit(x, y, batch_size=16, verbose=0)
        got = ratios(model, before)
        if rate > 1:
            np.testing.assert_allclose(got, [0.001, 0.004, 0.001], rtol=1e-3)
        else:
            assert got.max() < 1e-4
    # JAX traces once more for its own purposes; PyTorch runs every step.
    assert len(traces) <= (3 if keras.backend.backend() == "torch" else 2)


def test_schedule_and_live_ratio():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.0, 50.0])
    model = net(keras.Model)
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(schedule), kgc.UpdateRatioClip(0.002))
    model.compile(optimizer, loss())
    x, y = data(16)
    initial = model.get_weights()
    before = [to64(v) for v in model.trainable_variables]
    for want in (0.0, 0.002, 0.0005):  # warm-up from 0, the bound, the bound set in mid-fit
        if want == 0.0005:
            optimizer.clip_hyperparameters["max_ratio"] = want
        model.set_weights(initial)
        model.fit(x, y, batch_size=16, verbose=0)
        np.testing.assert_allclose(ratios(model, before), want, rtol=1e-3, atol=1e-8)


def set_rate(model, rate, by):
    """One of the ways to set a learning rate; returns the callback that is to do it."""
    optimizer = model.optimizer
    if by == "callback":
        return keras.callbacks.LearningRateScheduler(lambda epoch: rate)
    if by == "assignment":
        optimizer.learning_rate = rate
    elif by == "inner assignment":
        optimizer.inner_optimizer.learning_rate = rate
    elif by == "variable":
        optimizer.learning_rate.assign(rate)
    return keras.callbacks.Callback()


SETTING = ("assignment", "inner assignment", "variable")  # from outside


@pytest.mark.parametrize(
    ("by", "inner"),
    [
        ("schedule", "sgd"),
        ("schedule", "adam"),
        ("callback", "adam"),
        *((s, "sgd") for s in SETTING),
    ],
)
def test_annealed_the_bound_falls_with_a_schedule_and_a_rate_that_is_set_gives_it_back(by, inner):
    rates = [10.0, 50.0, 25.0, 5.0, 0.0, 50.0]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(range(5), rates)
    model = net(keras.Model)
    clipper = kgc.Chain([kgc.UpdateRatioClip(0.002, anneal="learning_rate")])
    make = keras.optimizers.SGD if inner == "sgd" else keras.optimizers.Adam
    inner = make(schedule if by == "schedule" else rates[0])
    model.compile(kgc.ClippedOptimizer(inner, clipper), loss())
    x, y = data(16)
    initial = model.get_weights()
    before = [to64(v) for v in model.trainable_variables]
    for step, rate in enumerate(rates):
        callback = set_rate(model, rate, by)
        model.set_weights(initial)
        model.fit(x, y, batch_size=16, verbose=0, callbacks=[callback])
        largest = rate if by in SETTING else max(rates[: step + 1])
        want = 0.002 * rate / largest if rate else 0.0
        np.testing.assert_allclose(ratios(model, before), want, rtol=1e-3, atol=1e-8)


def test_annealed_the_bound_falls_on_a_plateau_and_comes_back_after_it():
    model = net()
    model.compile(
        keras.optimizers.SGD(50.0), loss(), clipper=kgc.UpdateRatioClip(anneal="learning_rate")
    )
    x, y = data(16)
    initial = model.get_weights()
    before = [to64(v) for v in model.trainable_variables]
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=0, min_delta=1e9)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[plateau])
    for want in (0.0002, 0.002, 0.002):
        model.set_weights(initial)
        model.fit(x, y, batch_size=16, verbose=0)
        np.testing.assert_allclose(ratios(model, before), want, rtol=1e-3)
        if want == 0.0002:
            model.optimizer.reset_clip_state()


def test_another_schedule_begins_a_new_phase():
    kernel = keras.Variable(np.ones((4, 4), "float32"), name="kernel")
    decay = keras.optimizers.schedules.PiecewiseConstantDecay([0, 2], [1.0, 0.1, 0.001])
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(decay), kgc.UpdateRatioClip(anneal="learning_rate")
    )
    for want in (2e-3, 2e-4, 2e-4, 2e-3, 2e-3):
        if optimizer.built and int(optimizer.iterations.numpy()) == 3:
            optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(0.01, 9, 1.0)
        kernel.assign(np.ones((4, 4)))
        optimizer.apply([1e6 * ops.ones((4, 4))], [kernel])
        np.testing.assert_allclose(1 - to64(kernel), want, rtol=1e-3)


def test_after_a_range_test_the_bound_is_what_it_was():
    """In a loop of one's own: one step at a thousand times the rate, and back."""
    kernel = keras.Variable(np.ones((4, 4), "float32"), name="kernel")
    optimizer = kgc.ClippedOptimizer(
        keras.optimizers.SGD(0.01), kgc.UpdateRatioClip(anneal="learning_rate")
    )
    for rate in (0.01, 10.0, 0.01, 0.001):
        optimizer.learning_rate = rate
        kernel.assign(np.ones((4, 4)))
        optimizer.apply([1e6 * ops.ones((4, 4))], [kernel])
        np.testing.assert_allclose(1 - to64(kernel), 2e-3, rtol=1e-3)


def test_annealed_around_momentum_as_with_a_schedule_of_its_own():
    decay = keras.optimizers.schedules.CosineDecay
    results = []
    for clipper in (
        kgc.UpdateRatioClip(0.01, anneal="learning_rate"),
        kgc.UpdateRatioClip(decay(0.01, 6), biases="unit"),
    ):
        keras.utils.set_random_seed(0)
        model = net(keras.Model)
        inner = keras.optimizers.SGD(decay(0.5, 6), momentum=0.9)
        model.compile(kgc.ClippedOptimizer(inner, clipper), loss())
        model.fit(*data(16), batch_size=4, epochs=1, shuffle=False, verbose=0)
        results.append([to64(v) for v in model.trainable_variables])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_replicas_and_accumulation():
    def optimizer():
        return kgc.ClippedOptimizer(
            keras.optimizers.SGD(0.05, momentum=0.9),
            kgc.UpdateRatioClip(),
            gradient_accumulation_steps=2,
        )

    _, _, alone = train(0, optimizer)
    _, _, together = train(2, optimizer)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=2e-6)
