"""calibrate: thresholds against gradients taken by hand, and nothing left changed."""

import contextlib
import dataclasses
import json

import keras
import numpy as np
import pytest
from helpers import data, loss, net, strategy

import keras_gradclip as kgc
from keras_gradclip.clippers.base import threshold_of
from keras_gradclip.clippers.units import default_unit_axes
from keras_gradclip.names import layer_of

tf = pytest.importorskip("tensorflow")
STEPS, BATCH = 6, 16
SUGGESTED = kgc.UpdateRatioClip(5e-3)  # without momentum, few kernels


def compiled(clipper=None, replicas=0, optimizer=None, **kwargs):
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        model = net()
        model.compile(
            kgc.ClippedOptimizer(optimizer or keras.optimizers.Adam(0.01), clipper, **kwargs),
            loss(),
            loss_weights=5.0,
            metrics=["accuracy"],
        )
    return model


def dataset(steps=STEPS, batch=BATCH):
    return tf.data.Dataset.from_tensor_slices(data(steps * batch)).batch(batch)


def by_hand(follow, percentile, beta=0.7, eps=1e-3):
    """The thresholds of the same run, in NumPy: kind -> layer -> number."""
    model, rows = compiled(), []
    adam = keras.optimizers.Adam(0.01)
    owners = [layer_of(v) for v in model.trainable_variables]
    for x, y in dataset():
        with tf.GradientTape() as tape:
            value = 5.0 * loss()(y, model(x))
        grads = tape.gradient(value, model.trainable_variables)
        row = {}
        for layer in dict.fromkeys(owners):
            mine = [
                (np.asarray(g, "float64"), v)
                for g, v in zip(grads, model.trainable_variables, strict=True)
                if layer_of(v) == layer
            ]
            arrays = [(g, keras.ops.convert_to_numpy(v), default_unit_axes(v)) for g, v in mine]
            row["norm", layer] = np.sqrt(sum((g**2).sum() for g, _, _ in arrays))
            row["absolute", layer] = max(np.abs(g).max() for g, _, _ in arrays)
            row["exponential", layer] = max(
                (np.abs(g) * np.exp(-beta * w)).max() for g, w, _ in arrays
            )
            row["adaptive", layer] = max(
                (np.sqrt((g**2).sum(a)) / np.maximum(np.sqrt((w**2).sum(a)), eps)).max()
                for g, w, a in arrays
                if len(a) < g.ndim
            )
            # Adam ignores the gradient's scale: η an element.
            row["update_ratio", layer] = float(adam.learning_rate) * max(
                (
                    np.sqrt(g.size / np.prod([n for i, n in enumerate(g.shape) if i not in a]))
                    / np.maximum(np.sqrt((w**2).sum(a)), eps)
                ).max()
                for g, w, a in arrays
                if len(a) < g.ndim
            )
            row["rms", layer] = max(np.sqrt((g**2).mean()) for g, _, _ in arrays)
        row["global", ""] = np.sqrt(sum((np.asarray(g, "float64") ** 2).sum() for g in grads))
        rows.append(row)
        if follow:
            adam.apply(grads, model.trainable_variables)
    return {key: np.percentile([row[key] for row in rows], percentile) for key in rows[0]}


@pytest.fixture(scope="module")
def calibrated():
    """A calibration that the tests share, of Adam without a clipper."""
    return kgc.calibrate(compiled(), dataset(), steps=STEPS)


@pytest.mark.parametrize("follow", [True, False])
def test_against_the_tape(follow):
    want = by_hand(follow, 75.0)
    found = kgc.calibrate(compiled(), dataset(), steps=STEPS, percentile=75.0, follow=follow)
    assert found.updates == STEPS
    assert found.layers == ["stem", "body", "head"]
    for kind, of_layer in found.thresholds.items():
        for layer, value in of_layer.items():
            assert value == pytest.approx(want[kind, layer], rel=1e-3), (kind, layer)
    assert found.global_norm == pytest.approx(want["global", ""], rel=1e-3)


def everything(model):
    values = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [np.array(v.numpy()) for v in values]


# tests/backends/test_put_back.py trains on after it, on one device.
@pytest.mark.parametrize(
    "replicas, follow", [pytest.param(0, False, marks=pytest.mark.slow), (2, True)]
)
def test_nothing_is_changed(replicas, follow):
    """With batch normalisation, dropout, a running clipper, and an optimizer in mid-run."""
    x, y = data(64)
    scope = strategy(replicas)
    with scope.scope() if scope else contextlib.nullcontext():
        keras.utils.set_random_seed(3)
        inputs = keras.Input((8, 8, 3))
        h = keras.layers.BatchNormalization()(keras.layers.Flatten()(inputs))
        h = keras.layers.Dropout(0.3)(h)
        model = kgc.ClippedModel(inputs, keras.layers.Dense(3)(h))
        model.compile("adam", loss(), metrics=["accuracy"], clipper=kgc.PercentileClip(window=4))
    history = model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    before = everything(model)
    kgc.calibrate(model, (x, y), steps=5, batch_size=16, follow=follow)
    after = everything(model)
    assert len(after) == len(before)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.history is history
    assert not model.optimizer.watchers
    model.fit(x, y, batch_size=16, verbose=0)  # and it trains on
    assert any((a != b).any() for a, b in zip(everything(model), before, strict=True))


def test_replicas_and_accumulation_watch_updates(calibrated):
    want = calibrated
    many = kgc.calibrate(compiled(replicas=2), dataset(), steps=STEPS)
    micro = kgc.calibrate(
        compiled(gradient_accumulation_steps=2), dataset(2 * STEPS, BATCH // 2), steps=STEPS
    )
    for got in (many, micro):
        assert got.updates == STEPS
        for layer in want.layers:
            for kind in want.thresholds:
                expected = want.thresholds[kind][layer]
                assert got.thresholds[kind][layer] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "kind",
    ["norm", *(pytest.param(k, marks=pytest.mark.slow) for k in ("exponential", "adaptive"))],
)
def test_the_thresholds_clip_as_often_as_they_say(kind):
    """The same updates again, at the same weights, each layer clipped at its 75th percentile.

    A learning rate of 1e-12 keeps the weights where they are.
    """
    steps = 20
    found = kgc.calibrate(compiled(), dataset(steps), steps=steps, percentile=75.0, follow=False)
    model = compiled(found.clip_map(kind), optimizer=keras.optimizers.SGD(1e-12))
    monitor = kgc.ClipMonitor(every=1)
    model.fit(dataset(steps), verbose=0, callbacks=[monitor])
    fractions = np.array(monitor.history["clip_fraction"])
    for layer in found.layers:
        mine = [i for i, path in enumerate(monitor.variables) if path.startswith(layer)]
        assert np.mean((fractions[:, mine] > 0).any(axis=1)) == pytest.approx(0.25, abs=0.051)


def test_the_ratio_of_updates_is_that_of_the_learning_rate_and_at_most_what_auto_takes():
    small, large = (
        kgc.calibrate(
            compiled(optimizer=keras.optimizers.SGD(rate)), dataset(), steps=STEPS, follow=False
        )
        for rate in (1e-6, 10.0)
    )
    for layer in small.layers:
        wanted = 1e-6 * small.thresholds["adaptive"][layer]
        assert small.thresholds["update_ratio"][layer] == pytest.approx(wanted, rel=1e-5)
        assert small.clipper("update_ratio", layer).max_ratio == 2.5e-3  # half of the most
        assert large.thresholds["update_ratio"][layer] > 5e-3
        assert large.clipper("update_ratio", layer) == SUGGESTED
    rules = large.clip_map("update_ratio").rule_of(compiled().trainable_variables)
    assert {clipper for _, clipper in rules} == {SUGGESTED}


def test_the_default_map_is_what_auto_takes_where_the_learning_rate_is_high(tmp_path):
    model = compiled(optimizer=keras.optimizers.SGD(10.0, momentum=0.9))
    found = kgc.calibrate(model, dataset(), steps=STEPS, follow=False)
    auto = kgc.ClippedOptimizer(keras.optimizers.SGD(10.0, momentum=0.9), "auto")
    auto.build(model.trainable_variables)
    assert auto.clipper.anneal == "learning_rate"
    rules = found.at(50.0).clip_map().rule_of(model.trainable_variables)
    assert {clipper for _, clipper in rules} == {auto.clipper}
    found.save(tmp_path / "clip.json")
    content = json.loads((tmp_path / "clip.json").read_text())
    assert kgc.get(content["clipper"]) == found.clip_map()
    assert content["calibration"]["kind"] == "update_ratio"


def test_the_limits_are_what_the_map_clips_by():
    """Under a schedule that falls, fed the watched gradients, the map clips where `limits` says."""
    rate, fall = 1e-4, np.tile([1.0, 0.5, 0.1, 0.02], 5)
    decay = keras.optimizers.schedules.PiecewiseConstantDecay(
        list(range(len(fall) - 1)), [float(f) for f in rate * fall]
    )
    model = compiled(optimizer=keras.optimizers.SGD(decay, momentum=0.9))
    found = kgc.calibrate(model, dataset(20), steps=20, percentile=75.0)
    # As if this were the share that auto takes: the bound is then what was measured.
    share = 1.5 * found.thresholds["update_ratio"]["head"]
    found, k = dataclasses.replace(found, max_ratio=share), found.layers.index("head")
    largest = found.samples["update_ratio"]
    np.testing.assert_allclose(largest, rate * found.samples["adaptive"], rtol=1e-5)
    hits = (largest > found.limits())[:, k]
    assert hits.mean() == pytest.approx(0.25, abs=0.051)
    inner, head = keras.optimizers.SGD(decay, momentum=0.9), found.clipper("update_ratio", "head")
    optimizer = kgc.ClippedOptimizer(inner, head, telemetry=True)
    [kernel] = [v for v in model.trainable_variables if v.path.endswith("head/kernel")]
    optimizer.build([kernel])
    weight = keras.ops.convert_to_numpy(kernel)
    for ratio, hit in zip(found.samples["adaptive"][:, k], hits, strict=True):
        kernel.assign(weight)
        optimizer.apply([keras.ops.convert_to_tensor(weight * ratio)], [kernel])
        fraction = optimizer.read_telemetry()["clip_fraction"]
        optimizer.reset_telemetry()
        assert (fraction > 0) == hit


def test_a_kind_without_any_threshold():
    samples = {"norm": np.ones((4, 1)), "update_ratio": np.full((4, 1), np.nan)}
    samples["global"] = np.ones(4)
    vectors = kgc.Calibration(["scale"], {}, samples, percentile=90.0)
    with pytest.raises(ValueError, match=r"no layer has a kernel of .*\. Others: norm"):
        vectors.clip_map()
    assert vectors.clip_map("norm").rules
    with pytest.raises(ValueError, match="`layer` must be one of 'scale', but is 'scales'"):
        vectors.clipper("norm", "scales")


def test_map_table_and_file(tmp_path, calibrated):
    model, found = compiled(), calibrated
    text, shown = str(found), found._repr_html_()
    for layer in found.layers:
        threshold = f"{found.thresholds['norm'][layer]:.3g}"
        assert layer in text and threshold in text
        assert layer in shown and threshold in shown
    described = found.clip_map("absolute").describe(model)
    assert described.count("AbsoluteClip") == len(model.trainable_variables)
    kernels_only = found.clip_map("adaptive").describe(model)
    assert kernels_only.count("AdaptiveClip") == kernels_only.count("/kernel ")
    assert kernels_only.count("off") == kernels_only.count("/bias ")
    found.save(tmp_path / "clip.json", "absolute")
    content = json.loads((tmp_path / "clip.json").read_text())
    assert kgc.get(content["clipper"]) == found.clip_map("absolute")
    assert content["calibration"]["thresholds"]["rms"] == found.thresholds["rms"]
    assert [p.name for p in tmp_path.iterdir()] == ["clip.json"]


@pytest.mark.parametrize("rate, capped", [(1e-6, "raised"), (10.0, "lowered")])
def test_the_table_has_the_figures_of_the_file(rate, capped, tmp_path):
    """For every kind of clipper, also where the file holds less or more than was watched."""
    model = compiled(optimizer=keras.optimizers.Adam(rate))
    found = kgc.calibrate(model, dataset(), steps=3, follow=False)
    head, *rows = [line.split() for line in str(found).splitlines() if line[:1].isalpha()][:4]
    assert head[1:] == list(found.thresholds) and [row[0] for row in rows] == found.layers
    for kind, *cells in zip(*[head, *rows], strict=True):
        if kind == "layer":
            continue
        found.save(tmp_path / f"{kind}.json", kind)
        saved = kgc.get(json.loads((tmp_path / f"{kind}.json").read_text())["clipper"])
        by_layer = {
            v.path.rpartition("/")[0]: clipper
            for v, (_, clipper) in zip(
                model.trainable_variables, saved.rule_of(model.trainable_variables), strict=True
            )
            if v.path.endswith("/kernel")
        }
        for layer, cell in zip(found.layers, cells, strict=True):
            clipper = by_layer[layer]
            value = getattr(clipper, threshold_of(type(clipper)))
            assert cell.rstrip("*") == f"{value:.3g}"
            assert value == found.limits(kind)[0, found.layers.index(layer)]
            assert cell.endswith("*") == (value != found.thresholds[kind][layer])
    stars = [row[1 + list(found.thresholds).index("update_ratio")].endswith("*") for row in rows]
    assert all(stars), capped
    assert "*: capped" in str(found) and "–:" not in str(found)


def test_layers_without_a_gradient_get_no_rule_but_by_update_ratios():
    inputs = keras.Input((8, 8, 3))
    h = keras.layers.Flatten()(inputs)
    dead = keras.layers.Dense(4, kernel_initializer="zeros", name="dead")(h)
    outputs = keras.layers.Dense(3, kernel_initializer="zeros", name="head")(
        keras.layers.ReLU()(dead)
    )
    model = kgc.ClippedModel(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.1), loss())
    found = kgc.calibrate(model, dataset(), steps=3, follow=False)
    assert found.thresholds["norm"]["dead"] is None
    dead_row = next(line for line in str(found).splitlines() if line.startswith("dead"))
    assert dead_row.split().count("–") == 5 and dead_row.count("*") == 1
    assert "–: no threshold, the layer is left alone" in str(found)
    assert found.thresholds["norm"]["head"] > 0
    assert "off" in found.clip_map("norm").describe(model)
    rules = dict(found.clip_map().rules)  # a step of a layer that wakes up is bounded
    assert rules["dead(/[^/]+)?"] == kgc.UpdateRatioClip(2.5e-3)
    assert np.isnan(found.limits("norm")[:, 0]).all() and (found.limits()[:, 0] == 2.5e-3).all()


def test_not_finite_updates_are_left_out():
    x, y = data(64)
    x[32:] = np.nan
    model = compiled()
    broken = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    found = kgc.calibrate(model, broken, steps=4, follow=False)
    assert (found.updates, found.nonfinite) == (2, 2)
    assert "left out" in str(found)
    x[:] = np.nan
    with pytest.raises(ValueError, match="finite"):
        kgc.calibrate(model, (x, y), steps=2, batch_size=16)
    assert all(np.isfinite(w).all() for w in model.get_weights())


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"steps": 0}, "steps"),
        ({"steps": None}, "steps"),
        ({"percentile": 0}, "percentile"),
        ({"percentile": 101}, "percentile"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_misuse_is_named(arguments, word):
    with pytest.raises(ValueError, match=word) as error:
        kgc.calibrate(compiled(), dataset(), **arguments)
    assert "clipper=None" not in str(error.value)  # no remedy for a wrong percentile


def test_numbers_of_numpy_and_callbacks_as_fit_takes_them():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(kgc.ClippedOptimizer("sgd"), "mse", run_eagerly=True)
    for callbacks in (None, keras.callbacks.LambdaCallback()):
        data = np.ones((1, 2)), np.ones((1, 1))
        found = kgc.calibrate(model, data, steps=np.int64(1), callbacks=callbacks)
        assert found.updates == 1


def test_no_update_at_all_is_not_a_matter_of_finite_gradients():
    with pytest.raises(ValueError, match=r"no update was made\. `data` is empty"):
        kgc.calibrate(compiled(), dataset().filter(lambda *_: False), steps=2)
    model = compiled()
    model.trainable = False
    model.compile(keras.optimizers.SGD(0.1), loss(), clipper=None)
    for watch in (
        lambda: kgc.calibrate(model, dataset()),
        lambda: model.fit(dataset(), verbose=0, callbacks=[kgc.ClipMonitor()]),
    ):
        with pytest.raises(ValueError, match=r"has no variables.* Set `trainable=True`"):
            watch()


def test_sample_weights_count():
    x, y = data(32)
    heavy = (x, y, np.full(32, 3.0))
    plain, weighted = (
        kgc.calibrate(compiled(), d, steps=1, batch_size=32) for d in ((x, y), heavy)
    )
    assert weighted.global_norm == pytest.approx(3 * plain.global_norm, rel=1e-4)
    with pytest.raises(ValueError, match="4 parts"):
        kgc.calibrate(compiled(), (x, y, x, y))


def test_refusals(calibrated):
    plain = net(keras.Model)
    plain.compile("sgd", loss())
    with pytest.raises(ValueError, match="ClippedOptimizer"):
        kgc.calibrate(plain, dataset())
    with pytest.raises(ValueError, match="kind"):
        calibrated.clip_map("median")


class Towers(keras.layers.Layer):
    """Two Dense layers of one path, towers/dense."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = (keras.layers.Dense(4, name="dense") for _ in range(2))

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return self.first(x) + 100.0 * self.second(x)


def two_towers():
    inputs = keras.Input((8, 8, 3))
    h = Towers(name="towers")(keras.layers.Flatten()(inputs))
    model = kgc.ClippedModel(inputs, keras.layers.Dense(3, name="head")(h))
    model.compile(keras.optimizers.SGD(1e-12), loss())
    return model


def test_two_layers_of_one_path_are_two():
    model = two_towers()
    found = kgc.calibrate(model, dataset(), steps=STEPS)
    assert found.layers == ["towers/dense", "towers/dense#2", "head"]
    for kind in ("norm", "absolute", "rms"):  # the second's gradient is 100 times as long
        small, large = (found.thresholds[kind][name] for name in found.layers[:2])
        assert large == pytest.approx(100 * small, rel=1e-3)
        # A rule goes by the path, which they share.
        rules = dict(found.clip_map(kind).rule_of(model.trainable_variables))
        assert len(rules) == 2
        assert rules["towers/dense(/[^/]+)?"] == found.clipper(kind, "towers/dense#2")
    adaptive = found.clip_map("adaptive").rule_of(model.trainable_variables)
    assert [c is None for _, c in adaptive] == [False, True, False, True, False, True]
    monitor = kgc.ClipMonitor(every=1)
    model.fit(dataset(), verbose=0, callbacks=[monitor])
    assert monitor.variables == [
        *("towers/dense/kernel", "towers/dense/bias"),
        *("towers/dense#2/kernel", "towers/dense#2/bias"),
        *("head/kernel", "head/bias"),
    ]


def test_another_percentile_of_the_same_updates(calibrated):
    found = calibrated
    again = found.at(50.0)
    assert (again.percentile, again.updates, again.layers) == (50.0, STEPS, found.layers)
    assert again.kernels == found.kernels and again.at(found.percentile) == found
    for kind, of_layer in again.thresholds.items():
        for k, layer in enumerate(again.layers):
            assert of_layer[layer] == pytest.approx(np.median(found.samples[kind][:, k]))
    with pytest.raises(ValueError, match="percentile"):
        found.at(0.0)


def drifting(updates=40):
    """A Calibration of two layers whose norms fall from step to step; the third has none."""
    norms = np.stack([np.linspace(8, 1, updates), np.linspace(80, 10, updates)], axis=1)
    norms = np.concatenate([norms, np.zeros((updates, 1))], axis=1)
    samples = dict.fromkeys(("norm", "absolute", "exponential", "adaptive", "rms"), norms)
    samples["update_ratio"] = norms * 3e-4  # the stem's are 3e-4 to 2.4e-3
    samples["global"] = np.sqrt((norms**2).sum(axis=1))
    layers = ["stem", "body", "dead"]
    kernels = {layer: ["kernel"] for layer in layers}
    return kgc.Calibration(layers, kernels, samples, percentile=90.0), norms


@pytest.mark.parametrize(
    "kind", ["norm", "absolute", "exponential", "adaptive", "update_ratio", "rms"]
)
def test_segments_are_schedules(kind, tmp_path):
    found, _ = drifting()
    norms = found.samples[kind]
    found.save(tmp_path / "clip.json", kind, segments=4)
    clipper = kgc.get(json.loads((tmp_path / "clip.json").read_text())["clipper"])
    assert str(clipper) == str(found.clip_map(kind, segments=4))
    of_layer = dict(zip(found.layers, (c for _, c in clipper.rules), strict=True))
    assert (of_layer["dead"] is None) == (kind != "update_ratio")
    for k, layer in enumerate(("stem", "body")):
        schedule = next(
            v for v in of_layer[layer].hyperparameters().values() if not isinstance(v, float)
        )
        for step in range(50):
            wanted = np.percentile(norms[10 * min(step // 10, 3) :][:10, k], 90)
            if kind == "update_ratio":
                wanted = np.clip(wanted, 1e-3, 2e-3)
            assert float(schedule(step)) == pytest.approx(wanted, rel=1e-5)


def test_segments_need_updates():
    found, _ = drifting(20)
    assert len(found.clip_map(segments=2).rules) == 3
    with pytest.raises(ValueError, match="segments"):
        found.clip_map(segments=3)
    with pytest.raises(ValueError, match="segments"):
        found.clip_map(segments=0)


def test_a_schedule_trains():
    found = kgc.calibrate(compiled(), dataset(20), steps=20, percentile=75.0)
    model = compiled(found.clip_map("norm", segments=2))
    monitor = kgc.ClipMonitor(every=1)
    model.fit(dataset(20), verbose=0, callbacks=[monitor])
    rules = list(monitor.history["thresholds"][0])
    assert len(rules) == 3
    samples = found.samples["norm"]
    for k, rule in enumerate(rules):
        followed = [row[rule] for row in monitor.history["thresholds"]]
        want = [np.percentile(samples[:10, k], 75)] * 10 + [np.percentile(samples[10:, k], 75)] * 10
        np.testing.assert_allclose(followed, want, rtol=1e-3)


def test_steps_per_execution_loses_no_update():
    """Three batches a call; the fetch comes after each call, and 7 is no multiple of 3."""
    want = kgc.calibrate(compiled(), dataset(9), steps=7)
    model = compiled()
    model.compile(model.optimizer, loss(), loss_weights=5.0, steps_per_execution=3)
    got = kgc.calibrate(model, dataset(9), steps=7)
    assert got.updates == 7
    np.testing.assert_allclose(got.samples["norm"], want.samples["norm"], rtol=1e-3)


def test_callbacks_see_the_watched_batches():
    seen = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda i, logs: seen.append(i))
    kgc.calibrate(compiled(), dataset(), steps=4, callbacks=[count])
    assert seen == [0, 1, 2, 3]
