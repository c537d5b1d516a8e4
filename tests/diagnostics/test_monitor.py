"""ClipMonitor against gradients taken by hand; replicas, accumulation, compilation, files."""

import csv
import json

import keras
import numpy as np
import pytest
from helpers import data, loss, net, train
from keras import ops

import keras_gradclip as kgc
from keras_gradclip.diagnostics.samples import FIELDS

tf = pytest.importorskip("tensorflow")
CLIPPER = kgc.ClipMap({"stem/.*": kgc.AbsoluteClip(0.05), "head/bias": None}, kgc.NormClip(0.5))


def watched(replicas=0, *, clipper=CLIPPER, every=1, steps=6, run_dir=None, plain=False, **options):
    """A monitored run; returns (monitor, history, model)."""
    compile_args = options.pop("compile_args", {})
    kwargs = options.pop("train_args", {})
    monitor = kgc.ClipMonitor(run_dir, every=every, **options.pop("monitor_args", {}))

    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), clipper, **options)

    model, history, _ = train(
        replicas,
        optimizer,
        model_class=keras.Model if plain else None,
        compile_args=compile_args,
        steps=steps,
        callbacks=[monitor],
        **kwargs,
    )
    return monitor, history, model


def by_hand(steps=6):
    """The same run in float64 NumPy arithmetic on gradients of a tape: FIELDS by step."""
    x, y = data(steps * 16)
    model = net(keras.Model)
    rows = []
    for step in range(steps):
        part = slice(16 * step, 16 * step + 16)
        with tf.GradientTape() as tape:
            value = 30.0 * loss()(y[part], model(x[part]))
        grads = tape.gradient(value, model.trainable_variables)
        clipped = CLIPPER(grads, model.trainable_variables)
        row = {name: [] for name in FIELDS}
        for v, g, c in zip(model.trainable_variables, grads, clipped, strict=True):
            g, c = np.asarray(g, "float64"), np.asarray(c, "float64")
            cosine = np.sum(g * c) / (np.linalg.norm(g) * np.linalg.norm(c))
            row["norm_before"].append(np.linalg.norm(g))
            row["norm_after"].append(np.linalg.norm(c))
            row["max_abs"].append(np.abs(g).max())
            row["angle"].append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
            row["nonfinite"].append(0.0)
            elementwise = v.path.startswith("stem/")
            shrunk = np.linalg.norm(c) < np.linalg.norm(g) * (1 - 1e-5)
            row["clip_fraction"].append(np.mean(np.abs(g) > 0.05) if elementwise else shrunk)
            v.assign_sub(0.02 * c.astype("float32"))
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def plain_run():
    keras.utils.set_random_seed(0)
    return watched()


def test_figures_against_the_tape(plain_run):
    monitor, _, model = plain_run
    assert monitor.variables == [v.path for v in model.trainable_variables]
    assert monitor.history["step"] == list(range(6))
    for step, want in enumerate(by_hand()):
        for name in FIELDS:
            got = monitor.history[name][step]
            # arccos loses small angles; the monitor does not.
            atol = 0.05 if name == "angle" else 1e-6
            np.testing.assert_allclose(got, want[name], rtol=2e-3, atol=atol, err_msg=name)
    angles = np.array(monitor.history["angle"])
    assert angles[:, :2].min() > 1.0, "the elementwise clip must turn the gradient"
    assert angles[:, 2:].max() < 1e-3, "a norm clip must not"


def test_the_monitor_changes_nothing(plain_run):
    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), CLIPPER)

    keras.utils.set_random_seed(0)
    model, history, _ = train(0, optimizer, steps=6)
    np.testing.assert_allclose(history["loss"], plain_run[1]["loss"], rtol=1e-6)
    for a, b in zip(model.get_weights(), plain_run[2].get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_history_of_fit(plain_run):
    monitor, history, _ = plain_run
    after = [np.linalg.norm(a) for a in monitor.history["norm_after"]]
    assert history["grad_norm_after"] == [pytest.approx(np.mean(after))]
    assert history["grad_max"] == [
        pytest.approx(np.mean([m.max() for m in monitor.history["max_abs"]]))
    ]
    assert history["nonfinite_fraction"] == [0.0]
    # The angle of the whole, from the norms and the angles of the parts.
    angles = []
    for row in zip(
        *(monitor.history[n] for n in ("norm_before", "norm_after", "angle")), strict=True
    ):
        before, after_, angle = row
        cosine = np.sum(before * after_ * np.cos(np.radians(angle)))
        cosine /= np.linalg.norm(before) * np.linalg.norm(after_)
        angles.append(np.degrees(np.arccos(cosine)))
    assert history["clip_angle"] == [pytest.approx(np.mean(angles), rel=1e-4)]


def same(a, b, rtol=1e-3, atol=2e-4):
    assert a.history["step"] == b.history["step"]
    for name in FIELDS:
        np.testing.assert_allclose(a.history[name], b.history[name], rtol=rtol, atol=atol)


def test_replicas_see_the_same(plain_run):
    monitor, history, _ = watched(2)
    same(monitor, plain_run[0])
    assert history["clip_angle"] == [pytest.approx(plain_run[1]["clip_angle"][0], rel=1e-3)]


def test_steps_per_execution(plain_run):
    monitor, _, _ = watched(compile_args={"steps_per_execution": 4})
    same(monitor, plain_run[0])


def test_accumulation_measures_updates(plain_run):
    monitor, _, _ = watched(2, steps=12, gradient_accumulation_steps=2, train_args={"batch": 8})
    assert monitor.history["step"] == list(range(6))
    same(monitor, plain_run[0])


def test_eager_and_a_plain_model(plain_run):
    monitor, _, _ = watched(plain=True, compile_args={"run_eagerly": True})
    same(monitor, plain_run[0])


def test_one_update_in_every(plain_run):
    monitor, _, _ = watched(every=4, train_args={"epochs": 2})
    # Updates 0, 4, 8 and the first of the second epoch.
    assert monitor.history["step"] == [0, 4, 6, 8]
    assert monitor.history["epoch"] == [0, 0, 1, 1]
    for mine, other in ((0, 0), (1, 4)):
        np.testing.assert_allclose(
            monitor.history["norm_before"][mine],
            plain_run[0].history["norm_before"][other],
            rtol=1e-5,
        )


def test_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    monitor, history, model = watched(steps=8, train_args={"scale": 1.0})
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert np.isfinite(monitor.history["norm_before"]).any()
    assert 0 <= history["nonfinite_fraction"][0] < 1


class Poison(keras.layers.Layer):
    """Passes x on; from the fourth call on, the gradient of the layers before it is NaN."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        @ops.custom_gradient
        def poisoned(x, calls):
            def grad(*args, upstream=None):
                upstream = args[0] if upstream is None else upstream
                return ops.where(calls > 3, upstream * np.nan, upstream), ops.zeros(())

            return x, grad

        self.calls.assign_add(1.0)
        return poisoned(x, self.calls.value)


@pytest.mark.parametrize("skip", [True, False])
def test_nonfinite_gradients_are_named(skip):
    x, y = data(96)
    inputs = keras.Input((8, 8, 3))
    h = keras.layers.Conv2D(4, 3, name="before")(inputs)
    h = Poison()(h)
    outputs = keras.layers.Dense(3, name="behind")(keras.layers.Flatten()(h))
    model = keras.Model(inputs, outputs)
    model.compile(
        kgc.ClippedOptimizer(
            keras.optimizers.SGD(0.01), kgc.AbsoluteClip(0.1), skip_nonfinite=skip
        ),
        loss(),
        jit_compile=False,
    )
    monitor = kgc.ClipMonitor(every=1)
    history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[monitor])
    names = monitor.variables
    last = dict(zip(names, monitor.history["nonfinite"][-1], strict=True))
    assert last["before/kernel"] == last["before/bias"] == 1.0
    assert history.history["nonfinite_fraction"][0] > 0.1
    if skip:  # three good updates, then three that were left out
        assert last["behind/kernel"] == 0.0
        assert monitor.history["step"] == [0, 1, 2, 3]
        assert np.isnan(monitor.history["norm_before"][-1]).all()
    assert np.isfinite(monitor.history["norm_before"][2]).all()


@pytest.mark.parametrize("every", [1, 3, 50])
def test_the_share_of_nonfinite_updates_is_of_all_updates(every):
    x, y = data(80)
    x[:4] = x[44:48] = np.nan
    model = net(keras.Model)
    model.compile(kgc.ClippedOptimizer("sgd", CLIPPER, skip_nonfinite=True), loss())
    monitor = kgc.ClipMonitor(every=every)
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[monitor]).history
    assert history["nonfinite_fraction"] == [pytest.approx(2 / 20)]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files(tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 6, 0.01)
    clipper = kgc.ClipMap({"stem/.*": kgc.AbsoluteClip(schedule)}, kgc.NormClip(0.5))
    monitor, _, model = watched(clipper=clipper, run_dir=tmp_path / "run", every=2)
    rows = rows_of(tmp_path / "run/monitor.csv")
    assert len(rows) == 3 * len(monitor.variables)
    assert [r["variable"] for r in rows[: len(monitor.variables)]] == monitor.variables
    assert float(rows[0]["norm_before"]) == pytest.approx(
        monitor.history["norm_before"][0][0], rel=1e-5
    )
    thresholds = rows_of(tmp_path / "run/thresholds.csv")
    stem = [float(r["value"]) for r in thresholds if r["name"] == "stem/.*/threshold"]
    np.testing.assert_allclose(stem, [float(schedule(s)) for s in (0, 2, 4)], rtol=1e-5)
    described = json.loads((tmp_path / "run/monitor.json").read_text())
    assert described["variables"][0]["path"] == model.trainable_variables[0].path
    assert described["variables"][0]["rule"] == "stem/.*"
    assert kgc.serialize(kgc.get(described["clipper"])) == kgc.serialize(clipper)


def test_training_on_appends_and_a_fresh_run_starts_anew(tmp_path):
    x, y = data(64)

    def fit(model, monitor):
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[monitor])
        return [int(r["step"]) for r in rows_of(tmp_path / "monitor.csv")]

    model = net()
    model.compile("sgd", loss(), clipper=CLIPPER)
    count = len(model.trainable_variables)
    assert fit(model, kgc.ClipMonitor(tmp_path, every=1)) == sorted([0, 1, 2, 3] * count)
    # As after a resume from a backup of step 4 - 1: the rows of step 3 are written again.
    model.optimizer.inner_optimizer.iterations.assign(3)
    steps = fit(model, kgc.ClipMonitor(tmp_path, every=1))
    assert steps == sorted([*range(7)] * count)
    other = net()
    other.compile("sgd", loss(), clipper=CLIPPER)
    assert fit(other, kgc.ClipMonitor(tmp_path, every=2)) == sorted([0, 2] * count)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor, _, _ = watched(run_dir=tmp_path, monitor_args={"tensorboard": True})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tensors = events.Tensors("norm_before/stem/kernel")
    assert [e.step for e in tensors] == list(range(6))
    assert float(tf.make_ndarray(tensors[2].tensor_proto)) == pytest.approx(
        monitor.history["norm_before"][2][0], rel=1e-5
    )


@pytest.mark.parametrize("clipper", [kgc.NormClip(0.1), kgc.PercentileClip(scope="layer")], ids=str)
def test_embeddings(clipper):
    """A sparse gradient, some rows twice in a batch: as its dense twin by the tape."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (16, 5)), rng.integers(0, 3, 16)

    def model(model_class):
        keras.utils.set_random_seed(2)
        inputs = keras.Input((5,), dtype="int32")
        h = keras.layers.Flatten()(keras.layers.Embedding(20, 4, name="table")(inputs))
        return model_class(inputs, keras.layers.Dense(3, name="head")(h))

    watched_model = model(kgc.ClippedModel)
    watched_model.compile(keras.optimizers.SGD(0.1), loss(), clipper=clipper)
    found = kgc.calibrate(watched_model, (x, y), steps=1, batch_size=16)
    monitor = kgc.ClipMonitor(every=1)
    watched_model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[monitor])
    plain = model(keras.Model)
    with tf.GradientTape() as tape:
        value = loss()(y, plain(x))
    grads = [
        np.asarray(tf.convert_to_tensor(g)) for g in tape.gradient(value, plain.trainable_variables)
    ]
    want = [np.linalg.norm(g) for g in grads]
    np.testing.assert_allclose(monitor.history["norm_before"][0], want, rtol=1e-4)
    np.testing.assert_allclose(
        monitor.history["max_abs"][0], [np.abs(g).max() for g in grads], rtol=1e-4
    )
    assert found.thresholds["norm"]["table"] == pytest.approx(want[0], rel=1e-4)
    assert found.thresholds["rms"]["table"] == pytest.approx(want[0] / np.sqrt(80), rel=1e-4)


def test_after_training_the_step_has_no_trace_of_it():
    _, _, model = watched()
    assert not model.optimizer.watchers
    assert model.train_function is None
    x, y = data(16)
    model.fit(x, y, batch_size=16, verbose=0)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: kgc.ClipMonitor(every=0), "every"),
        (lambda: kgc.ClipMonitor(every=None), "every"),
        (lambda: kgc.ClipMonitor(tensorboard=True), "run_dir"),
    ],
)
def test_misuse_is_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_a_folder_that_cannot_be_written_leaves_no_monitor(tmp_path):
    model, (x, y) = net(keras.Model), data(16)
    model.compile(kgc.ClippedOptimizer("sgd", CLIPPER), loss())
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        model.fit(x, y, verbose=0, callbacks=[kgc.ClipMonitor(tmp_path / "file")])
    assert not model.optimizer.watchers


def test_a_model_without_a_clipped_optimizer_is_refused():
    model = net(keras.Model)
    model.compile("sgd", loss())
    x, y = data(16)
    with pytest.raises(ValueError, match="ClippedOptimizer"):
        model.fit(x, y, verbose=0, callbacks=[kgc.ClipMonitor()])
