"""Loggers to experiment trackers, for `ClipMonitor(log=...)`.

A logger is any function of `(step, figures)`: the number of updates before the sample, and a dict
of finite floats named as in `ClipMonitor`. Each function here raises a ValueError if its package is
not installed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trackio
    import wandb

Log = Callable[[int, Mapping[str, float]], object]

#: Charts of TensorBoard's page "custom scalars": title to tags.
CHARTS = {
    "Global gradient norm": ["grad_norm", "grad_norm_after"],
    "Share clipped": ["clip_fraction"],
    "Thresholds": ["threshold/.*"],
    "Norm before the clip, by variable": ["norm_before/.*"],
    "Share clipped, by variable": ["clip_fraction/.*"],
    "Angle, degrees, by variable": ["angle/.*"],
}


def to_wandb(run: wandb.Run | None = None) -> Log:
    """Returns a logger to Weights & Biases, under `clip/`, over the steps in `clip/step`.

    Args:
        run: what `wandb.init` returned; by default the active run.
    """
    run = _package("to_wandb", "wandb").run if run is None else run
    if run is None:
        raise ValueError(
            "to_wandb: `run` is None and no run is active. Call wandb.init(project=...) first."
        )
    # W&B has one step counter per run, which WandbMetricsLogger advances; use a separate one.
    run.define_metric("clip/step", hidden=True)
    run.define_metric("clip/*", step_metric="clip/step")
    return lambda step, figures: run.log(
        {"clip/step": step, **{f"clip/{name}": v for name, v in figures.items()}}
    )


def to_mlflow(run_id: str | None = None) -> Log:
    """Returns a logger to MLflow; the figures of the whole gradient under `clip/`.

    Args:
        run_id: the run; by default the active one, which MLflow starts if need be.
    """
    package = _package("to_mlflow", "mlflow")

    def name_of(figure: str) -> str:
        # MLflow cannot store `clip_fraction` beside `clip_fraction/head/kernel`, and it refuses
        # other characters: `dense#2/kernel` becomes `dense_2/kernel`.
        return re.sub(r"[^\w\-. :/]", "_", figure if "/" in figure else f"clip/{figure}")

    return lambda step, figures: package.log_metrics(
        {name_of(figure): value for figure, value in figures.items()}, step=step, run_id=run_id
    )


def to_trackio(run: trackio.Run | None = None) -> Log:
    """Returns a logger to trackio.

    Args:
        run: what `trackio.init` returned; by default the active run.
    """
    target = _package("to_trackio", "trackio") if run is None else run
    return lambda step, figures: target.log(dict(figures), step=step)


def to_tensorboard(folder: str | os.PathLike) -> Log:
    """Returns a logger to TensorBoard, with the charts of `CHARTS` on its page "custom scalars".

    Args:
        folder: for the event files.
    """
    tf = _package("to_tensorboard", "tensorflow")
    layout = _package("to_tensorboard", "tensorboard.plugins.custom_scalar.layout_pb2")
    summary = _package("to_tensorboard", "tensorboard.plugins.custom_scalar.summary")
    charts = [
        layout.Chart(
            title=title, multiline=layout.MultilineChartContent(tag=[f"^{t}$" for t in tags])
        )
        for title, tags in CHARTS.items()
    ]
    page = layout.Layout(category=[layout.Category(title="Gradient clipping", chart=charts)])
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=0):
        tf.summary.experimental.write_raw_pb(summary.pb(page).SerializeToString())

    def log(step: int, figures: Mapping[str, float]) -> None:
        with writer.as_default(step=step):
            for name, value in figures.items():
                tf.summary.scalar(name, value)
        writer.flush()

    return log


def _package(owner: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(
            f"{owner}: the package {package} cannot be imported ({error}). Install it: "
            f"pip install {package}"
        ) from error
