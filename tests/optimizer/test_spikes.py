"""Finite spikes are left out by the rule of the last 128 norms, everywhere and after a resume."""

import keras
import numpy as np
import pytest
from helpers import data, loss, net
from test_nonfinite import build, copies, factors, same

import keras_gradclip as kgc
from keras_gradclip.optimizer import _skips

tf = pytest.importorskip("tensorflow")


def test_the_rule_against_numpy():
    window = _skips.SpikeWindow(3.0)
    window.build(keras.optimizers.SGD().add_variable)
    rng = np.random.default_rng(0)
    stream = rng.uniform(1.0, 2.0, 300)
    stream[[20, 90, 170, 171, 290]] = 40.0
    stream[[50, 200]] = np.inf, np.nan
    stream[[10, 60, 210]] = 0.0
    stream[[30, 220]] = 1e25  # finite, and its square is not
    remembered, skipped = [], []
    for i, norm in enumerate(stream.astype("float32")):
        got = not window.add([keras.ops.convert_to_tensor([norm, 0.0]), None])
        last, limit = np.array(remembered[-128:]), np.inf
        if len(last) >= 64:
            limit = last.mean() + 3.0 * last.std()
        assert got == bool(norm > limit or not norm < 1e19), i
        if 0 < norm < 1e19:
            remembered.append(min(norm, limit))
        if got:
            skipped.append(i)
    assert skipped == [30, 50, 90, 170, 171, 200, 220, 290]
    assert int(window.seen.numpy()) == len(remembered)


def spikes_of(stream, sigmas=6.0):
    """The positions in a stream of norms that are skipped."""
    window = _skips.SpikeWindow(sigmas)
    window.build(keras.optimizers.SGD().add_variable)
    return [i for i, n in enumerate(stream) if not window.add([keras.ops.full((1,), float(n))])]


def test_a_spike_does_not_hide_the_next():
    """Remembered in full, one of 1000 times the usual norm lets one of 100 times pass."""
    stream = np.random.default_rng(0).uniform(1.0, 2.0, 140)
    stream[[100, 110, 139]] = 1000.0, 100.0, 20.0
    assert spikes_of(stream) == [100, 110, 139]


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_norms_that_have_risen_for_good_are_normal_within_a_window(spread):
    stream = 1.0 + spread * np.random.default_rng(0).uniform(-1.0, 1.0, 300)
    stream[100:] *= 30.0
    skipped = spikes_of(stream)
    assert skipped[0] == 100 and skipped[-1] < 200


def test_among_equal_norms_rounding_is_no_spike():
    stream = np.ones(150)
    stream[100:] += 1e-3
    assert spikes_of(stream) == []


@pytest.mark.parametrize("quiet", [0, 40, 200])
def test_updates_without_a_gradient_are_no_evidence(quiet):
    """A reward that did not come makes no spike of the one that does."""
    stream = np.concatenate([np.zeros(quiet), np.ones(3), np.zeros(quiet), np.ones(3)])
    assert spikes_of(stream) == []


@pytest.mark.parametrize("peak", [1e10, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("seen", [0, 100])
def test_a_spike_whose_square_overflows_is_skipped(peak, seen):
    weight = keras.Variable(np.zeros(8, "float32"))
    optimizer = kgc.ClippedOptimizer(keras.optimizers.SGD(1.0), None, skip_spikes=6)
    optimizer.build([weight])
    rng = np.random.default_rng(0)
    for _ in range(seen):
        optimizer.apply([keras.ops.convert_to_tensor(rng.normal(size=8).astype("float32"))])
    before = weight.numpy()
    optimizer.apply([keras.ops.full((8,), peak)])
    if seen or peak > 1e19:  # of a norm that is a number, nothing is known at the start
        np.testing.assert_array_equal(weight.numpy(), before)
        assert optimizer.skipped_steps == 1
    assert optimizer.first_nonfinite_variable is None


@pytest.mark.parametrize("replicas, mixed", [(0, False), (2, True)])
def test_a_spike_is_left_out_on_every_replica_and_the_loss_scale_stays(
    replicas, mixed, monkeypatch
):
    monkeypatch.setattr(_skips, "WINDOW", 4)
    if mixed:
        keras.config.set_dtype_policy("mixed_float16")
    model, optimizer, step = build(
        replicas, lambda: kgc.ClippedOptimizer(keras.optimizers.SGD(1e-3), None, skip_spikes=6)
    )
    clipped = optimizer.inner_optimizer if mixed else optimizer
    for _ in range(4):
        step(factors(replicas))
    before = copies(model)
    scale = float(optimizer.dynamic_scale.numpy()) if mixed else None
    step(factors(replicas, max(replicas - 1, 0), 50.0))
    assert same(copies(model), before)
    assert clipped.skipped_steps == 1
    assert clipped.first_nonfinite_variable is None
    assert not mixed or float(optimizer.dynamic_scale.numpy()) == scale
    step(factors(replicas))
    assert not same(copies(model), before)
    step(factors(replicas, 0, np.nan))
    assert clipped.skipped_steps == 2
    assert clipped.first_nonfinite_variable == model.trainable_variables[0].path


def test_the_memory_is_saved_and_the_model_takes_the_argument(tmp_path):
    model = net()
    model.compile("sgd", loss(), skip_spikes=6)
    x, y = data(48)
    model.fit(x, y, batch_size=16, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert loaded.skip_spikes == 6.0
    assert loaded._spikes.seen.numpy() == 3
    np.testing.assert_array_equal(loaded._spikes.norms, model.optimizer._spikes.norms)
    assert np.count_nonzero(loaded._spikes.norms) == 3


@pytest.mark.parametrize("bad", [0, -6, float("nan"), "six", True])
def test_misuse(bad):
    with pytest.raises(ValueError, match="skip_spikes"):
        kgc.ClippedOptimizer("sgd", skip_spikes=bad)
    with pytest.raises(ValueError, match="skip_spikes"):
        net().compile(kgc.ClippedOptimizer("sgd"), loss(), skip_spikes=6)


@pytest.mark.parametrize("telemetry", [True, 2])
def test_it_is_named_without_a_skip_where_telemetry_measures(telemetry):
    variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "abc"]
    optimizer = kgc.ClippedOptimizer("sgd", telemetry=telemetry)
    good, bad = keras.ops.ones(2), keras.ops.convert_to_tensor([1.0, float("nan")])
    large = keras.ops.full((2,), 1e30)  # its square is not finite, and it is
    for gradients in ([good, good, large], [good] * 3, [good, bad, good], [bad] * 3, [bad] * 3):
        optimizer.apply(gradients, variables)
    assert optimizer.first_nonfinite_variable == "b"
    assert optimizer.skipped_steps == 0


def test_labels_that_are_not_finite_are_noticed_by_a_model():
    model = net()
    model.compile("sgd", "mse", clipper="norm")
    x, _ = data(16)
    assert model.optimizer.first_nonfinite_variable is None
    model.fit(x, np.full((16, 3), np.nan, "float32"), verbose=0)
    assert model.optimizer.first_nonfinite_variable == model.trainable_variables[0].path


def test_the_variable_that_was_first_not_finite():
    variables = [keras.Variable(np.ones(2, "float32"), name=n) for n in "abc"]
    optimizer = kgc.ClippedOptimizer("sgd", skip_nonfinite=True)
    good, bad = keras.ops.ones(2), keras.ops.convert_to_tensor([1.0, float("inf")])
    optimizer.apply([good, None, good], variables)
    assert optimizer.first_nonfinite_variable is None
    optimizer.apply([good, None, bad], variables)
    optimizer.apply([bad, bad, good], variables)
    assert optimizer.first_nonfinite_variable == "c"
    assert optimizer.skipped_steps == 2
