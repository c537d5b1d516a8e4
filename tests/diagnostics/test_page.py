"""The report: its findings on made-up runs, its page, and a run of a real model."""

import base64
import csv
import dataclasses
import json
import re
import struct
import zlib
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
from helpers import train

import keras_gradclip as kgc
from keras_gradclip.diagnostics.monitor import FIELDS
from keras_gradclip.diagnostics.page import _colours, _heat_map, _png, _ticks, findings, read_run

LAYERS = {"conv1": (72, 4), "conv2": (144, 4), "head": (40, 10)}


def write(folder, samples, clipper="NormClip(max_norm=1, scope=layer)", thresholds=()):
    """A run as ClipMonitor writes it; `samples`: step -> layer -> fields."""
    folder.mkdir(exist_ok=True)
    variables = []
    for layer, sizes in LAYERS.items():
        for name, size in zip(("kernel", "bias"), sizes, strict=True):
            text = clipper or "off"
            variables.append(
                {
                    "path": f"{layer}/{name}",
                    "layer": layer,
                    "shape": [size],
                    "rule": "*",
                    "clipper": text,
                }
            )
    description = {
        "every": 1,
        "clipper": None if clipper is None else {"class_name": "x"},
        "clipper_text": clipper or "off",
        "variables": variables,
    }
    (folder / "monitor.json").write_text(json.dumps(description))
    with (folder / "monitor.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "variable", *FIELDS])
        for step, of_layer in enumerate(samples):
            for layer in LAYERS:
                fields = {
                    "norm_before": 1.0,
                    "norm_after": 1.0,
                    "max_abs": 0.5,
                    **of_layer.get(layer, {}),
                }
                for name in ("kernel", "bias"):
                    row = [fields.get(f, 0.0) for f in FIELDS]
                    writer.writerow([step, 0, f"{layer}/{name}", *row])
    with (folder / "thresholds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "name", "value"], *thresholds])
    return folder


def texts(folder, level=None):
    return [f.text for f in findings(read_run(folder)) if level in (None, f.level)]


CLIPPED = {"clip_fraction": 1.0, "norm_before": 4.0, "norm_after": 1.0}


def test_clipped_too_often_is_named_with_its_share(tmp_path):
    run = write(tmp_path / "r", [{"conv1": CLIPPED if i % 50 else {}} for i in range(100)])
    (bad,) = texts(run, "bad")
    assert bad.startswith("conv1: clipped on 98 % of steps")
    assert "too low" in bad
    # ‖(4, 4)‖: two variables a layer; nearly all samples are the same.
    assert f"90th percentile of its norm is {4 * np.sqrt(2):.3g}" in bad


def test_a_rare_clip_is_good(tmp_path):
    run = write(tmp_path / "r", [{"conv1": CLIPPED if i % 10 == 0 else {}} for i in range(100)])
    assert texts(run, "bad") == []
    (good,) = texts(run, "good")
    assert "at most on 10 % (conv1)" in good


def test_nothing_clipped_and_clipping_off(tmp_path):
    run = write(tmp_path / "r", [{}] * 10)
    (bad,) = texts(run, "bad")
    assert bad.startswith("No layer was ever clipped: the clip does nothing")
    off = write(tmp_path / "off", [{}] * 10, clipper=None)
    assert texts(off) == ["Clipping is off: the gradients were only watched."]


def test_a_few_elements_on_every_step_are_not_too_much(tmp_path):
    few = {"clip_fraction": 0.01, "norm_after": 0.9}
    many = {"clip_fraction": 0.4, "norm_after": 0.5}
    run = write(tmp_path / "r", [{"conv1": few, "conv2": many}] * 10)
    (bad,) = texts(run, "bad")
    assert bad.startswith("conv2: clipped on 100 % of steps (40 % of its elements)")


def test_turned_spiking_silent_and_broken(tmp_path):
    turned = {"angle": 80.0, "clip_fraction": 0.05}
    spike = {"norm_before": 1000.0, "norm_after": 1.0, "clip_fraction": 0.05}
    silent = {"norm_before": 0.0, "norm_after": 0.0}
    samples = [
        {"conv1": turned, "conv2": spike if i == 7 else {}, "head": silent} for i in range(20)
    ]
    run = write(tmp_path / "r", samples)
    said = texts(run)
    assert any(t.startswith("conv1: the clip turns the gradient by 80°") for t in said)
    assert any("1 of 20 samples are spikes, the largest at step 7" in t for t in said)
    assert any(t.startswith("head: the gradient is zero") for t in said)

    nan = {"norm_before": np.nan, "norm_after": np.nan, "nonfinite": 1.0}
    samples = [{"conv2": nan} if i > 14 else {} for i in range(20)]
    said = texts(write(tmp_path / "nan", samples), "bad")
    assert said[0].startswith("Gradients that are not finite, first seen at step 15, in 5 of 20")
    assert "conv2" in said[0]
    # And when nothing was finite at all, the page is still written.
    everywhere = write(tmp_path / "all", [dict.fromkeys(LAYERS, nan)] * 3)
    assert kgc.report(everywhere).exists()


@pytest.mark.parametrize("what", ["clipped", "turned"])
def test_many_layers_are_told_in_one_sentence(what, tmp_path):
    turned = {"angle": 80.0, "clip_fraction": 0.05}
    run = read_run(
        write(tmp_path / "r", [{"conv1": CLIPPED if what == "clipped" else turned}] * 10)
    )
    wide = {name: np.tile(a[:, :1], (1, 30)) for name, a in run.figures.items()}
    many = type(run)(
        run.steps,
        [f"layer{i}" for i in range(30)],
        wide,
        np.ones((10, 30), bool),
        np.zeros(30, bool),
        run.thresholds,
        run.description,
    )
    if what == "clipped":
        (found,) = findings(many)
        assert found.text.startswith("30 of 30 layers are clipped on more than 50 % of steps")
        assert "25 % of their norm is left" in found.text
        assert "layer0 (100 %), layer1 (100 %), layer2 (100 %) and 27 more" in found.text
        assert found.details[4].startswith("layer4: clipped on 100 % of steps, and 25 %")
        assert f"90th percentile of the norm: {4 * np.sqrt(2):.3g}" in found.details[4]
    else:
        found = next(f for f in findings(many) if "turns" in f.text)
        assert found.text.startswith("In 30 of 30 layers the clip turns the gradient by more than")
        assert found.details[0] == "layer0: 80°"
    assert len(found.details) == 30


def test_what_is_left_counts_each_sample_the_same(tmp_path):
    """One enormous gradient that passes must not hide 99 that are cut to a quarter."""
    huge = {"norm_before": 1e6, "norm_after": 1e6}
    run = write(tmp_path / "r", [{"conv1": CLIPPED if i else huge} for i in range(100)])
    (bad,) = texts(run, "bad")
    assert "26 % of its norm is left" in bad


def test_a_clip_at_one_end_of_the_run_is_told_with_the_drift(tmp_path):
    size = np.geomspace(100, 1, 50)
    layer = [
        {"norm_before": x, "norm_after": min(x, 50.0), "clip_fraction": float(x > 50)} for x in size
    ]
    run = write(tmp_path / "r", [dict.fromkeys(LAYERS, of_layer) for of_layer in layer])
    (note,) = texts(run, "note")
    assert note.startswith(
        "The clip acts at one end of the run: on 80 % of the layers in its first"
    )
    assert "on 0 % in its last" in note
    ratio = np.median(size[:10]) / np.median(size[-10:])
    assert f"falls {ratio:.0f}-fold" in note
    # Norms that fall are no spikes; and an even clip has no such note.
    assert not any("spikes" in t for t in texts(run))
    even = write(tmp_path / "e", [{"conv1": CLIPPED if i % 10 == 0 else {}} for i in range(100)])
    assert texts(even, "note") == []


class Page(HTMLParser):
    """Counts tags, checks that they nest, and collects addresses."""

    VOID = ("meta", "img", "line", "polyline", "circle", "br")

    def __init__(self):
        super().__init__()
        self.open, self.count, self.addresses = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    samples = [{"conv1": CLIPPED if i % 2 else {}} for i in range(400)]
    thresholds = [[i, "stem/max_norm", 1.0 - i / 500] for i in range(400)]
    run = write(tmp_path / "r", samples, thresholds=thresholds)
    path = kgc.report(run)
    assert path == run / "report.html"
    page = parsed(path)
    assert all(a.startswith("data:image/png") for a in page.addresses)
    assert page.count["img"] == 2  # the angle is 0 throughout: no map and no curve of it
    assert page.count["svg"] == 4
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    assert "NaN" not in text and "nan," not in text
    assert "prefers-color-scheme:dark" in text
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S):
        cells = json.loads(data)
        assert len(cells["cells"]) == len(LAYERS)
        assert len(cells["cells"][0]) == len(cells["steps"]) == 160
    assert "clipped</span><b>17 %</b>" in text  # a third of the layers on half of the steps
    assert "every layer in numbers" in text
    elsewhere = kgc.report(run, tmp_path / "page.html")
    assert elsewhere.read_text(encoding="utf-8") == text


def test_angles_have_their_map(tmp_path):
    turned = {"angle": 30.0, "clip_fraction": 0.5}
    page = parsed(kgc.report(write(tmp_path / "r", [{"conv1": turned}] * 5)))
    assert page.count["img"] == 3


def test_a_long_clipper_and_many_thresholds_are_summed_up(tmp_path):
    """A map with a rule a layer: not 3,000 words at the top of the page."""
    many = [[i, f"rule{k}/max_norm", (k + 1.0) / (i + 1)] for i in range(5) for k in range(9)]
    run = write(tmp_path / "monitor", [{"conv1": CLIPPED}] * 5, thresholds=many)
    described = json.loads((run / "monitor.json").read_text())
    described["clipper_text"] = "ClipMap(" + "x" * 300 + ")"
    for k, variable in enumerate(described["variables"]):
        variable["rule"] = f"rule{k}"
    (run / "monitor.json").write_text(json.dumps(described))
    text = kgc.report(run).read_text(encoding="utf-8")
    assert "x" * 300 not in text
    assert "ClipMap of 6 rules (NormClip)" in text
    assert f"<h1>{tmp_path.name}</h1>" in text  # not the name "monitor"
    assert "Thresholds: 9 of them" in text
    for word in ("lowest", "median", "highest"):
        assert f"</i>{word}</span>" in text
    still = [[i, f"rule{k}/max_norm", 1.0] for i in range(5) for k in range(9)]
    page = kgc.report(write(tmp_path / "still", [{}] * 5, thresholds=still))
    assert "Thresholds" not in page.read_text(encoding="utf-8")


def test_labels_of_many_layers_can_be_read(tmp_path):
    run = read_run(write(tmp_path / "r", [{"conv1": CLIPPED}] * 4))
    values = np.ones((4, 200))
    figures = {name: values for name in run.figures}
    layers = [f"layer{i}" for i in range(200)]
    many = dataclasses.replace(run, layers=layers, figures=figures)
    drawn = _heat_map("norm", many, values)
    row = int(re.search(r"--row:(\d+)px", drawn).group(1))
    height = int(re.search(r'style="height:(\d+)px"', drawn).group(1))
    labels = re.findall(r"<div>(layer\d+)</div>", drawn)
    assert row >= 11
    assert labels[:2] == ["layer0", f"layer{row * 200 // height}"]
    assert abs(len(labels) * row - height) <= row


def test_names_cannot_break_the_page(tmp_path):
    run = write(tmp_path / "r", [{}] * 3)
    described = json.loads((run / "monitor.json").read_text())
    described["variables"][0]["layer"] = "</script><b>&"
    described["clipper_text"] = "<img src=x>"
    (run / "monitor.json").write_text(json.dumps(described))
    page = parsed(kgc.report(run))
    assert "x" not in page.addresses


def test_the_picture_is_a_png():
    pixels = _colours(np.array([[0.0, 0.5, 1.0], [np.nan, 2.0, -1.0]]))
    file = base64.b64decode(_png(pixels))
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", file[16:24]) == (3, 2)
    length = struct.unpack(">I", file[33:37])[0]
    raw = zlib.decompress(file[41 : 41 + length])
    rows = np.frombuffer(raw, "uint8").reshape(2, 13)
    np.testing.assert_array_equal(rows[:, 0], 0)
    np.testing.assert_array_equal(rows[:, 1:].reshape(2, 3, 4), pixels)
    assert pixels[0, 0].tolist() == [68, 1, 84, 255]
    assert pixels[1, 0, 3] == 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "low, high", [(0.0, 1.0), (-3.0, 4.0), (-0.3, 0.2), (1.0, 1.01), (-12.0, 3.0), (2.0, 3.6)]
)
def test_ticks_are_few_and_inside(low, high, log):
    ticks = _ticks(low, high, log)
    assert 2 <= len(ticks) <= 9
    assert low - 1e-9 <= min(ticks) and max(ticks) <= high + 1e-9


def test_a_real_run(tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.05, 8, 0.01)
    clipper = kgc.ClipMap({"stem/.*": kgc.AbsoluteClip(schedule)}, kgc.NormClip(100.0))

    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), clipper)

    train(0, optimizer, callbacks=[kgc.ClipMonitor(tmp_path, every=1)])
    run = read_run(tmp_path)
    assert run.layers == ["stem", "body", "head"]
    np.testing.assert_array_equal(run.steps, range(8))
    assert run.partial.tolist() == [True, False, False]
    assert any(t.startswith("stem: clipped on 100 %") for t in texts(tmp_path, "bad"))
    text = kgc.report(tmp_path).read_text(encoding="utf-8")
    parsed(tmp_path / "report.html")
    assert "AbsoluteClip(threshold=PolynomialDecay(0.05, 8, end_learning_rate=0.01))" in text
    assert "object at 0x" not in text


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"monitor\.csv"):
        kgc.report(tmp_path)
    run = write(tmp_path / "r", [])
    with pytest.raises(ValueError, match="no samples"):
        kgc.report(run)
    run = write(tmp_path / "r", [{}])
    with (run / "monitor.csv").open("a") as file:
        file.write("12,0,conv1/kern")
    with pytest.raises(ValueError, match="line 8"):
        kgc.report(run)


def test_two_layers_of_one_path_are_two_rows(tmp_path):
    class Towers(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first, self.second = (keras.layers.Dense(2, name="dense") for _ in range(2))

        def build(self, shape):
            self.first.build(shape)
            self.second.build(shape)

        def call(self, x):
            return self.first(x) + 100.0 * self.second(x)

    inputs = keras.Input((3,))
    model = kgc.ClippedModel(inputs, Towers(name="towers")(inputs))
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    x = np.random.default_rng(0).normal(size=(16, 3))
    monitor = kgc.ClipMonitor(tmp_path, every=1)
    model.fit(x, x[:, :2], batch_size=8, verbose=0, callbacks=[monitor])
    run = read_run(tmp_path)
    assert run.layers == ["towers/dense", "towers/dense#2"]
    first, second = run.figures["norm_before"].T
    np.testing.assert_allclose(second, 100 * first, rtol=1e-3)
