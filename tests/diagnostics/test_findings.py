"""The findings on made-up runs."""

import keras
import numpy as np
import pytest
from run_files import CLIPPED, LAYERS, write_run

import keras_gradclip as kgc
from keras_gradclip.diagnostics.findings import findings
from keras_gradclip.diagnostics.samples import read_run


def texts(folder, level=None):
    return [f.text for f in findings(read_run(folder)) if level in (None, f.level)]


def test_clipped_too_often_is_named_with_its_share(tmp_path):
    run = write_run(tmp_path / "r", [{"conv1": CLIPPED if i % 50 else {}} for i in range(100)])
    (bad,) = texts(run, "bad")
    assert bad.startswith("conv1: clipped on 98 % of steps")
    assert "too low" in bad
    # ‖(4, 4)‖: two variables a layer; nearly all samples are the same.
    assert f"90th percentile of its norm is {4 * np.sqrt(2):.3g}" in bad


def test_a_rare_clip_is_good(tmp_path):
    run = write_run(tmp_path / "r", [{"conv1": CLIPPED if i % 10 == 0 else {}} for i in range(100)])
    assert texts(run, "bad") == []
    (good,) = texts(run, "good")
    assert "at most on 10 % (conv1)" in good


def test_nothing_clipped_and_clipping_off(tmp_path):
    run = write_run(tmp_path / "r", [{}] * 10)
    (bad,) = texts(run, "bad")
    assert bad.startswith("No layer was ever clipped: the clip does nothing")
    off = write_run(tmp_path / "off", [{}] * 10, clipper=None)
    assert texts(off) == ["Clipping is off: the gradients were only watched."]


def test_a_few_elements_on_every_step_are_not_too_much(tmp_path):
    few = {"clip_fraction": 0.01, "norm_after": 0.9}
    many = {"clip_fraction": 0.4, "norm_after": 0.5}
    run = write_run(tmp_path / "r", [{"conv1": few, "conv2": many}] * 10)
    (bad,) = texts(run, "bad")
    assert bad.startswith("conv2: clipped on 100 % of steps (40 % of its elements)")


def test_turned_spiking_silent_and_broken(tmp_path):
    turned = {"angle": 80.0, "clip_fraction": 0.05}
    spike = {"norm_before": 1000.0, "norm_after": 1.0, "clip_fraction": 0.05}
    silent = {"norm_before": 0.0, "norm_after": 0.0}
    samples = [
        {"conv1": turned, "conv2": spike if i == 7 else {}, "head": silent} for i in range(20)
    ]
    run = write_run(tmp_path / "r", samples)
    said = texts(run)
    assert any("turns the gradient by more than 45° on average: conv1 (80°)." in t for t in said)
    assert any("1 of 20 samples are spikes, the largest at step 7" in t for t in said)
    assert any(t.startswith("head: the gradient is zero") for t in said)

    nan = {"norm_before": np.nan, "norm_after": np.nan, "nonfinite": 1.0}
    samples = [{"conv2": nan} if i > 14 else {} for i in range(20)]
    said = texts(write_run(tmp_path / "nan", samples), "bad")
    assert said[0].startswith("Gradients that are not finite, first seen at step 15, in 5 of 20")
    assert "conv2" in said[0]
    # And when nothing was finite at all, the page is still written.
    everywhere = write_run(tmp_path / "all", [dict.fromkeys(LAYERS, nan)] * 3)
    assert kgc.report(everywhere).exists()


@pytest.mark.parametrize("what", ["clipped", "turned"])
def test_many_layers_share_one_sentence(what, tmp_path):
    turned = {"angle": 80.0, "clip_fraction": 0.05}
    run = read_run(
        write_run(tmp_path / "r", [{"conv1": CLIPPED if what == "clipped" else turned}] * 10)
    )
    wide = {name: np.tile(a[:, :1], (1, 30)) for name, a in run.figures.items()}
    many = type(run)(
        run.steps,
        [f"layer{i}" for i in range(30)],
        wide,
        np.ones((10, 30), bool),
        np.zeros(30, bool),
        np.ones((10, 30), bool),
        run.thresholds,
        run.description,
    )
    if what == "clipped":
        (found,) = findings(many)
        assert found.text.startswith("30 of 30 layers are clipped on more than 50 % of steps")
        assert "25 % of their norm is left" in found.text
        assert "layer0 (100 %), layer1 (100 %), layer2 (100 %) and 27 more" in found.text
    else:
        found = next(f for f in findings(many) if "turns" in f.text)
        assert "layer0 (80°), layer1 (80°), layer2 (80°) and 27 more" in found.text


def test_what_is_left_counts_each_sample_the_same(tmp_path):
    """One enormous gradient that passes must not hide 99 that are cut to a quarter."""
    huge = {"norm_before": 1e6, "norm_after": 1e6}
    run = write_run(tmp_path / "r", [{"conv1": CLIPPED if i else huge} for i in range(100)])
    (bad,) = texts(run, "bad")
    assert "26 % of its norm is left" in bad


def test_a_clip_at_one_end_of_the_run_is_noted_with_the_drift(tmp_path):
    size = np.geomspace(100, 1, 50)
    layer = [
        {"norm_before": x, "norm_after": min(x, 50.0), "clip_fraction": float(x > 50)} for x in size
    ]
    run = write_run(tmp_path / "r", [dict.fromkeys(LAYERS, of_layer) for of_layer in layer])
    (note,) = texts(run, "note")
    assert note.startswith("The clip acts at the start of the run: on 80 % of the layers in its")
    assert "on 0 % in its last" in note
    ratio = np.median(size[:10]) / np.median(size[-10:])
    assert f"falls {ratio:.0f}-fold" in note
    # Norms that fall are no spikes; and an even clip has no such note.
    assert not any("spikes" in t for t in texts(run))
    even = write_run(
        tmp_path / "e", [{"conv1": CLIPPED if i % 10 == 0 else {}} for i in range(100)]
    )
    assert texts(even, "note") == []


def test_a_warm_up_that_clips_is_not_a_threshold_that_is_too_low(tmp_path):
    early = [{"conv1": CLIPPED} if i < 11 else {} for i in range(18)]
    run = write_run(tmp_path / "r", early)
    assert texts(run, "bad") == []
    (note,) = texts(run, "note")
    assert note.startswith("The clip acts at the start of the run: on 33 % of the layers in its")
    assert "on 0 % in its last" in note
    late = write_run(tmp_path / "late", early[::-1])
    (bad,) = texts(late, "bad")
    assert bad.startswith("conv1: clipped on 61 % of steps")


@pytest.mark.parametrize("limited", [("conv1",), ("conv1", "conv2", "head"), ()])
def test_a_limit_on_weight_updates_may_act_on_every_step(limited, tmp_path):
    limits = {name: "weight updates" if name in limited else "gradients" for name in LAYERS}
    turned = {**CLIPPED, "clip_fraction": 0.9, "angle": 80.0}
    samples = [{name: turned if name in limited else {} for name in LAYERS}] * 40
    run = write_run(tmp_path / "r", samples, limits=limits)
    assert not any("too low" in t or "turns" in t for t in texts(run))
    notes = texts(run, "note")
    if limited:
        (note,) = notes
        assert note.startswith(
            f"Weight updates of {len(limited)} of 3 layers are limited, on 100 % of steps"
        )
        assert "That is how such a limit works" in note
    else:
        assert notes == []
    # The others are judged as ever, and in the same words.
    clipped = [dict.fromkeys(LAYERS, turned)] * 40
    both = write_run(tmp_path / "both", clipped, limits=limits)
    told = texts(both, "bad")
    assert len(told) == len(LAYERS) - len(limited)
    assert all("the threshold is too low" in t and t[: t.index(":")] not in limited for t in told)


def test_a_limit_that_no_weight_update_reaches(tmp_path):
    run = write_run(tmp_path / "r", [{}] * 10, limits=dict.fromkeys(LAYERS, "weight updates"))
    (bad,) = texts(run, "bad")
    assert bad.startswith("No layer was ever clipped: every weight update was below the limit")


STEP = kgc.UpdateRatioClip(1e-4)
SGD, ADAM = keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01)


# The limit alone around both optimizers; of the others each around one of them.
@pytest.mark.parametrize(
    "inner, clipper, limited",
    [
        (SGD, STEP, {"one", "two"}),
        (ADAM, STEP, {"one", "two"}),
        (ADAM, kgc.ClipMap({"one/.*": STEP}, default=kgc.NormClip(1e-3)), {"one"}),
        (SGD, kgc.Chain([kgc.NormClip(100.0), STEP]), {"one", "two"}),
        (ADAM, kgc.Chain([kgc.ClipMap({"two/.*": STEP}), kgc.NormClip(100.0)]), {"two"}),
        (SGD, kgc.NormClip(1e-3), set()),
        (ADAM, "auto", {"one", "two"}),
    ],
)
def test_the_monitor_writes_what_each_layers_clipper_limits(inner, clipper, limited, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    h = keras.layers.Dense(3, name="one")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="two")(h))
    inner = type(inner).from_config(inner.get_config())
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(kgc.ClippedOptimizer(inner, clipper), loss)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, x[:, :1] > 0, batch_size=16, verbose=0, callbacks=[kgc.ClipMonitor(tmp_path, 1)])
    run = read_run(tmp_path)
    assert set(np.array(run.layers)[run.limits_updates]) == limited
    told = [f.text for f in findings(run)]
    assert all("too low" not in t or not any(t.startswith(name) for name in limited) for t in told)
    assert any("Weight updates" in t for t in told) == bool(limited)


@pytest.mark.parametrize(
    "clipper, is_named",
    [
        (kgc.NormClip(1e-3), True),
        (kgc.RMSClip(1e-4), False),
        (kgc.NormClip(1e3), True),
        (kgc.AbsoluteClip(1e3), False),
    ],
    ids=str,
)
def test_a_percentile_of_norms_is_advice_for_norms_alone(clipper, is_named, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(kgc.ClippedOptimizer("sgd", clipper), "mse")
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    model.fit(x, 9 * x[:, :1], batch_size=16, verbose=0, callbacks=[kgc.ClipMonitor(tmp_path, 1)])
    (bad,) = texts(tmp_path, "bad")
    assert "too low" in bad or "No layer was ever clipped" in bad
    assert ("90th percentile" in bad) == is_named
