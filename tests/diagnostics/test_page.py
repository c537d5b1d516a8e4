"""The report's page, and a run of a real model."""

import html
import json
import re
import sys
from html.parser import HTMLParser

import keras
import numpy as np
import pytest
from helpers import train
from run_files import CLIPPED, LAYERS, write_run

import keras_gradclip as kgc
from keras_gradclip.diagnostics import page as pages
from keras_gradclip.diagnostics.findings import findings
from keras_gradclip.diagnostics.samples import read_run

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """Counts tags, and collects addresses, cells of tables and the texts of figures."""

    def __init__(self):
        super().__init__()
        self.count, self.addresses, self.cells, self.labels, self.tag = {}, [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        if self.tag in ("td", "text") and data.strip():
            (self.cells if self.tag == "td" else self.labels).append(data)


def parsed(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    samples = [{"conv1": CLIPPED if i % 2 else {}} for i in range(400)]
    thresholds = [[i, "stem/max_norm", 1.0 - i / 500] for i in range(400)]
    run = write_run(tmp_path / "r", samples, thresholds=thresholds)
    path = kgc.report(run)
    assert path == run / "report.html"
    page = parsed(path)
    assert all(address.startswith(("#", "data:image/png;")) for address in page.addresses)
    assert page.count["svg"] == 2 and "script" not in page.count and "link" not in page.count
    titles = [
        "Global gradient norm",
        "Layers clipped, % of all",
        "Largest element before the clip",
        "Thresholds",
        "Share clipped",
        "Norm before the clip, as a multiple of the layer's median",
    ]
    # The angle is 0 throughout: no map and no curve of it.
    assert [label for label in page.labels if label[0].isupper()] == titles
    for layer in LAYERS:
        assert page.labels.count(layer) == 2 and layer in page.cells
    text = path.read_text(encoding="utf-8")
    assert "clipped<br><b>17 %</b>" in text  # a third of the layers on half of the steps
    assert "every layer in numbers" in text
    row = page.cells.index("conv1")  # two variables a layer: ‖(4, 4)‖ on every second step
    share, elements, left, *norms = page.cells[row + 1 : row + 7]
    assert (share, elements, left) == ("50 %", "50 %", "62 %")
    assert norms == [f"{np.sqrt(2) * n:.3g}" for n in (2.5, 4, 4)]
    elsewhere = kgc.report(run, tmp_path / "page.html")
    assert elsewhere.read_text(encoding="utf-8") == text
    assert kgc.report(write_run(tmp_path / "monitor", samples[:3])) == kgc.report(tmp_path)


def test_angles_have_their_map_and_curve(tmp_path):
    turned = {"angle": 30.0, "clip_fraction": 0.5}
    page = parsed(kgc.report(write_run(tmp_path / "r", [{"conv1": turned}] * 5)))
    assert sum("ngle" in label for label in page.labels) == 2


def test_a_long_clipper_and_many_thresholds_are_summed_up(tmp_path):
    """A map with a rule a layer: not 3,000 words at the top of the page."""
    many = [[i, f"rule{k}/max_norm", (k + 1.0) / (i + 1)] for i in range(5) for k in range(9)]
    run = write_run(tmp_path / "monitor", [{"conv1": CLIPPED}] * 5, thresholds=many)
    described = json.loads((run / "monitor.json").read_text())
    described["clipper_text"] = "ClipMap(" + "x" * 300 + ")"
    for k, variable in enumerate(described["variables"]):
        variable["rule"] = f"rule{k}"
    (run / "monitor.json").write_text(json.dumps(described))
    path = kgc.report(run)
    text, labels = path.read_text(encoding="utf-8"), parsed(path).labels
    assert "x" * 300 not in text
    assert "ClipMap of 6 rules (NormClip)" in text
    assert f"<h1>{tmp_path.name}</h1>" in text  # not the name "monitor"
    assert {"Thresholds: 9 of them", "lowest", "median", "highest"} <= set(labels)
    still = [[i, f"rule{k}/max_norm", 1.0] for i in range(5) for k in range(9)]
    page = kgc.report(write_run(tmp_path / "still", [{}] * 5, thresholds=still))
    assert "Thresholds" not in page.read_text(encoding="utf-8")


def test_each_column_of_a_map_has_as_many_samples(tmp_path, monkeypatch):
    """Norms that alternate look the same from the first column to the last."""
    figures = []
    monkeypatch.setattr(pages, "_svg", lambda figure: figures.append(figure) or "")
    kgc.report(write_run(tmp_path, [{}, {"conv1": {"norm_before": 3.0}}] * 150))
    [cells] = [image.get_array() for axes in figures[-1].axes for image in axes.images]
    assert cells.shape == (len(LAYERS), 150)
    assert np.ptp(cells, axis=1).max() < 1e-12


def test_names_cannot_break_the_page(tmp_path):
    """HTML, and the dollars and underscores that mean something to matplotlib."""
    names = ["</script><b>&", "_$a^$", "<!--<script>"]
    rules = [f"({name}|$b$)/max_norm" for name in names]
    moving = [[i, rule, 1 + i] for i in range(3) for rule in rules]
    run = write_run(tmp_path / "r", [{}] * 3, thresholds=moving)
    described = json.loads((run / "monitor.json").read_text())
    for variable, name in zip(described["variables"], np.repeat(names, 2), strict=True):
        variable["layer"] = str(name)
    described["clipper_text"] = "<img src=x>"
    (run / "monitor.json").write_text(json.dumps(described))
    path = kgc.report(run)
    page = parsed(path)
    assert "x" not in page.addresses and "script" not in page.count and "b" in page.count
    assert "<!--<" not in path.read_text(encoding="utf-8")
    assert {*names, *rules} <= set(page.labels) and set(names) <= set(page.cells)


@pytest.mark.parametrize(
    "figures",
    [
        dict.fromkeys(("norm_before", "norm_after", "max_abs"), 0.0),
        {"norm_before": np.nan, "norm_after": np.nan, "max_abs": np.nan, "nonfinite": 1.0},
    ],
)
def test_a_run_without_any_norm_has_a_page(figures, tmp_path):
    run = write_run(tmp_path / "r", [dict.fromkeys(LAYERS, figures)] * 3)
    path = kgc.report(run)
    assert parsed(path).count["svg"] >= 1
    clipped = "–" if np.isnan(figures["norm_before"]) else "0 %"
    assert f"clipped<br><b>{clipped}</b>" in path.read_text(encoding="utf-8")


def test_a_notebook_shows_the_page(tmp_path):
    path = kgc.report(write_run(tmp_path / "r", [{"conv1": CLIPPED}] * 3))
    srcdoc = re.search(r'<iframe srcdoc="([^"]*)"', path._repr_html_()).group(1)
    assert html.unescape(srcdoc) == path.read_text("utf-8")
    assert path.parent._repr_html_() == ""  # a folder has no page


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, monkeypatch):
    run = write_run(tmp_path / "r", [{}] * 3)
    monkeypatch.setitem(sys.modules, package, None)
    named = rf"report: needs jinja2 and matplotlib .*{package}.*pip install jinja2 matplotlib"
    with pytest.raises(ImportError, match=named):
        kgc.report(run)


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
