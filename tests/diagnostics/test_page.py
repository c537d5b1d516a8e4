"""The report's page, and a run of a real model."""

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
from helpers import train
from run_files import CLIPPED, LAYERS, write_run

import keras_gradclip as kgc
from keras_gradclip.diagnostics._charts import Chart, HeatMap, ticks
from keras_gradclip.diagnostics._run_files import read_run
from keras_gradclip.diagnostics.findings import findings


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
    run = write_run(tmp_path / "r", samples, thresholds=thresholds)
    path = kgc.report(run)
    assert path == run / "report.html"
    page = parsed(path)
    assert page.addresses == []
    assert page.count["canvas"] == 2  # the angle is 0 throughout: no map and no curve of it
    assert page.count["svg"] == 4
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    assert "NaN" not in text and "nan," not in text
    assert "prefers-color-scheme:dark" in text
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S):
        cells = json.loads(data)
        assert len(cells["numbers"]) == len(cells["colours"]) == len(LAYERS)
        assert len(cells["numbers"][0]) == len(cells["steps"]) == 134  # three samples each
    assert "clipped</span><b>17 %</b>" in text  # a third of the layers on half of the steps
    assert "every layer in numbers" in text
    elsewhere = kgc.report(run, tmp_path / "page.html")
    assert elsewhere.read_text(encoding="utf-8") == text


def test_angles_have_their_map(tmp_path):
    turned = {"angle": 30.0, "clip_fraction": 0.5}
    page = parsed(kgc.report(write_run(tmp_path / "r", [{"conv1": turned}] * 5)))
    assert page.count["canvas"] == 3


def test_a_long_clipper_and_many_thresholds_are_summed_up(tmp_path):
    """A map with a rule a layer: not 3,000 words at the top of the page."""
    many = [[i, f"rule{k}/max_norm", (k + 1.0) / (i + 1)] for i in range(5) for k in range(9)]
    run = write_run(tmp_path / "monitor", [{"conv1": CLIPPED}] * 5, thresholds=many)
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
    page = kgc.report(write_run(tmp_path / "still", [{}] * 5, thresholds=still))
    assert "Thresholds" not in page.read_text(encoding="utf-8")


def test_labels_of_many_layers_can_be_read(tmp_path):
    run = read_run(write_run(tmp_path / "r", [{"conv1": CLIPPED}] * 4))
    many = dataclasses.replace(run, layers=[f"layer{i}" for i in range(200)])
    drawn = HeatMap.of("norm", many, np.ones((4, 200)))
    assert drawn.row_height >= 11
    assert drawn.row_labels[:2] == ["layer0", f"layer{drawn.row_height * 200 // drawn.height}"]
    assert abs(len(drawn.row_labels) * drawn.row_height - drawn.height) <= drawn.row_height


def test_colours_follow_the_scale(tmp_path):
    run = read_run(write_run(tmp_path / "r", [{}] * 3))
    values = np.array([[1.0, 10.0, 100.0], [np.nan, 1.0, 0.0], [50.0, 50.0, 50.0]])
    linear = HeatMap.of("x", run, values, top=100.0)
    assert linear.scale == ("0", "100", "linear")
    assert linear.cells["colours"] == [[3, None, 128], [26, 3, 128], [255, 0, 128]]
    assert linear.cells["numbers"][0] == ["1", "–", "50"]
    logarithmic = HeatMap.of("x", run, values, log=True)
    assert logarithmic.scale == ("1", "100", "log")
    assert logarithmic.cells["colours"][2] == [255, None, 217]  # a zero has no logarithm


def test_a_line_breaks_at_nan():
    steps = np.arange(5)
    chart = Chart.of("x", {"a": (steps, np.array([1.0, 2.0, np.nan, 4.0, np.nan]))})
    assert [len(points) for _, points in chart.lines] == [2, 1]
    assert [label.text for label in chart.x_labels] == ["0", "1", "2", "3", "4"]
    nothing = Chart.of("x", {"a": (steps, np.full(5, np.nan))})
    assert nothing.lines == []


def test_names_cannot_break_the_page(tmp_path):
    run = write_run(tmp_path / "r", [{}] * 3)
    described = json.loads((run / "monitor.json").read_text())
    described["variables"][0]["layer"] = "</script><b>&"
    described["variables"][2]["layer"] = "<!--<script>"
    described["clipper_text"] = "<img src=x>"
    (run / "monitor.json").write_text(json.dumps(described))
    path = kgc.report(run)
    assert "x" not in parsed(path).addresses
    assert "<!--<" not in path.read_text(encoding="utf-8")


def test_a_notebook_shows_the_page(tmp_path):
    path = kgc.report(write_run(tmp_path / "monitor", [{"conv1": CLIPPED}] * 3))
    shown = path._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', shown).group(1)) == path.read_text("utf-8")
    assert path.parent._repr_html_() is None  # a folder has no page
    assert kgc.report(tmp_path) == path  # the folder above will do


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "low, high", [(0.0, 1.0), (-3.0, 4.0), (-0.3, 0.2), (1.0, 1.01), (-12.0, 3.0), (2.0, 3.6)]
)
def test_ticks_are_few_and_inside(low, high, log):
    marks = ticks(low, high, log)
    assert 2 <= len(marks) <= 9
    assert low - 1e-9 <= min(marks) and max(marks) <= high + 1e-9


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
    assert any(f.text.startswith("stem: clipped on 100 %") for f in findings(run))
    text = kgc.report(tmp_path).read_text(encoding="utf-8")
    parsed(tmp_path / "report.html")
    assert "AbsoluteClip(threshold=PolynomialDecay(0.05, 8, end_learning_rate=0.01))" in text
    assert "object at 0x" not in text


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
