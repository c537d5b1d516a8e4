"""`ClipMonitor(log=...)`: any function, and the real trackers, offline."""

import contextlib
import json
import re
import sqlite3
import sys

import keras
import numpy as np
import pytest
from helpers import train

import keras_gradclip as kgc
from keras_gradclip.diagnostics import loggers


def watched(log, steps=4, **options):
    """A run of a plain model, with a sample at each of its steps."""
    monitor = kgc.ClipMonitor(every=1, log=log, **options)

    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), kgc.NormClip(0.5))

    _, history, _ = train(0, optimizer, model_class=keras.Model, steps=steps, callbacks=[monitor])
    return monitor, history


def test_a_function_gets_each_sample():
    samples, steps = [], []
    monitor, history = watched(
        [lambda step, figures: samples.append(figures), lambda step, figures: steps.append(step)]
    )
    assert steps == monitor.history["step"] == [0, 1, 2, 3]
    norms = np.array(monitor.history["norm_before"])
    np.testing.assert_allclose([s["norm_before/head/bias"] for s in samples], norms[:, -1])
    np.testing.assert_allclose([s["grad_norm"] for s in samples], np.linalg.norm(norms, axis=1))
    assert all(s["grad_norm_after"] < s["grad_norm"] for s in samples)
    assert samples[0]["threshold/max_norm"] == 0.5
    # A plain model's history has the two figures of a ClippedModel.
    assert history["grad_norm"] == [pytest.approx(np.mean([s["grad_norm"] for s in samples]))]
    assert history["clip_fraction"] == [1.0]


def test_what_was_not_measured_is_left_out_of_the_log():
    """No number stands for a norm that is not finite."""
    samples = []

    def optimizer():
        return kgc.ClippedOptimizer(keras.optimizers.SGD(0.02), kgc.NormClip(0.5))

    monitor = kgc.ClipMonitor(every=1, log=lambda step, figures: samples.append(figures))
    _, history, _ = train(
        0, optimizer, model_class=keras.Model, steps=2, scale=np.inf, callbacks=[monitor]
    )
    assert all("grad_norm" not in s and s["nonfinite_fraction"] == 1.0 for s in samples)
    assert np.isnan(history["grad_norm"]).all() and np.isnan(history["clip_fraction"]).all()


@pytest.mark.parametrize("log", [3, ["wandb"]])
def test_a_log_that_is_no_function_is_refused(log):
    with pytest.raises(ValueError, match="`log` must be a function"):
        kgc.ClipMonitor(log=log)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_pip_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        getattr(loggers, f"to_{name}")()


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ValueError, match=r"wandb\.init"):
        loggers.to_wandb()
    with wandb.init(project="test", mode="offline", dir=tmp_path) as run:
        monitor, _ = watched(loggers.to_wandb())
        summary = dict(run.summary)
    assert summary["clip/step"] == 3
    norm = np.linalg.norm(monitor.history["norm_before"][-1])
    assert summary["clip/grad_norm"] == pytest.approx(norm)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        log = loggers.to_mlflow()
        monitor, _ = watched(log)
        log(9, {"angle/dense#2/kernel": 1.0})  # `#` is no letter of MLflow's
    metrics = mlflow.MlflowClient().get_metric_history(run.info.run_id, "clip/grad_norm")
    assert [m.step for m in metrics] == [0, 1, 2, 3]
    norms = np.linalg.norm(monitor.history["norm_before"], axis=1)
    np.testing.assert_allclose([m.value for m in metrics], norms)
    assert mlflow.get_run(run.info.run_id).data.metrics["angle/dense_2/kernel"] == 1.0


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    run = trackio.init(project="test", name="one", embed=False)
    monitor, _ = watched(loggers.to_trackio(run))
    trackio.finish()
    with contextlib.closing(sqlite3.connect(tmp_path / "test.db")) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [0, 1, 2, 3]
    norms = np.linalg.norm(monitor.history["norm_before"], axis=1)
    np.testing.assert_allclose([json.loads(figures)["grad_norm"] for _, figures in rows], norms)


def test_tensorboard_has_a_page_of_charts(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    watched((), steps=2, run_dir=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    tags = events.Tags()["tensors"]
    charts = {c.title: list(c.multiline.tag) for c in layout.category[0].chart}
    assert set(charts) == set(loggers.CHARTS)
    for title, patterns in charts.items():
        assert any(re.fullmatch(p, tag) for p in patterns for tag in tags), title
