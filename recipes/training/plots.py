"""The picture of a run, drawn from its tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

_LABELLED_LAYERS = 36  # more names than this would overlap
_RARE = 1.0  # per cent; shares that are mostly below are drawn on a logarithmic scale
_LEAST_SHOWN = 1e-3  # per cent, bottom of that scale
_STYLE: dict[str, Any] = {"marker": "o", "markersize": 3}


def draw_curves(
    history: Sequence[Mapping[str, Any]],
    layers: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
    metric: str,
) -> None:
    """Loss, the metric, gradient norm, and a map of the clip fraction by layer and epoch.

    Args:
        history: rows of `history.csv`.
        layers: rows of `layers.csv`, in the order of the model's layers.
        path: of the PNG file.
        title: of the picture.
        metric: name of the metric beside the loss; also drawn with `val_` and `test_`.
    """
    run = pd.DataFrame(history).apply(pd.to_numeric, errors="coerce").set_index("epoch")
    norms, shares = (_by_layer(layers, name) for name in ("grad_norm", "clip_fraction"))
    norms = norms.replace(np.inf, np.nan)  # no quantile lies between a number and infinity
    mosaic: list[Any] = [["loss", "metric"], ["norm", "share"]]
    heights = [2.9, 2.9]  # inches
    if len(shares):
        mosaic.append(["map", "map"])
        heights.append(min(1.5 + 0.13 * len(shares), 6.0))
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", dpi=110)
    figure.suptitle(title)
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    if len(shares):
        _heat_map(axes.pop("map"), 100 * shares)

    for axis, name in ((axes["loss"], "loss"), (axes["metric"], metric)):
        for prefix, label in (("", "training"), ("val_", "validation"), ("test_", "test")):
            if prefix + name in run:
                axis.plot(run.index, run[prefix + name], label=label, **_STYLE)
        axis.set_ylabel(name.replace("_", " "))
    drawn = run.filter(regex="^(val_|test_)?loss$")
    if drawn.min(axis=None) > 0 and drawn.max(axis=None) > 10 * drawn.min(axis=None):
        _logarithmic(axes["loss"])

    axis = axes["norm"]
    if len(norms):
        low, middle, high = norms.quantile([0.1, 0.5, 0.9]).to_numpy()
        axis.fill_between(norms.columns, low, high, alpha=0.25, label="layers, 10 to 90 %")
        axis.plot(norms.columns, middle, label="median layer", **_STYLE)
    if "grad_norm" in run:
        axis.plot(run.index, run["grad_norm"], color="black", label="all layers", **_STYLE)
        if (run["grad_norm"] > 0).any():
            _logarithmic(axis)
    axis.set_ylabel("gradient norm before the clip")

    percent, axis = 100 * run.get("clip_fraction", pd.Series(dtype=float)), axes["share"]
    axis.plot(percent.index, percent, color="tab:red", **_STYLE)
    axis.set_ylabel("clipped, % of all")
    if percent.median() < _RARE and percent.max() > 0:
        # From all to next to nothing within a run; below a millionth is drawn as none.
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(bottom=0, top=2 * percent.max())
    else:
        axis.set_ylim(-2, 102)

    for axis in axes.values():
        axis.set_xlabel("epoch")
        axis.set_xlim(run.index.min() - 0.5, run.index.max() + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(path)


def _by_layer(layers: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """A column of `layers.csv` as a table: a row a layer, a column an epoch."""
    if not layers:
        return pd.DataFrame()
    table = pd.DataFrame(layers).astype({name: float})
    return table.pivot_table(name, "layer", "epoch", aggfunc="last", sort=False, dropna=False)


class _PlainMinor(LogFormatter):
    """Labels minor ticks where there is room, as 0.7 and not 7e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_yscale("log", nonpositive="mask")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(_PlainMinor(minor_thresholds=(1, 0.4)))


def _heat_map(axis: Any, percent: pd.DataFrame) -> None:
    """Draws the clip fraction by layer and epoch; what is not clipped at all is black."""
    is_rare = np.nanmedian(percent) < _RARE
    names, first, last = percent.index, percent.columns.min(), percent.columns.max()
    image = axis.imshow(
        percent.clip(0, 100).mask(percent == 0),
        aspect="auto",
        interpolation="nearest",
        cmap=colormaps["plasma"].with_extremes(under="black", bad="black"),
        norm=LogNorm(vmin=_LEAST_SHOWN, vmax=100) if is_rare else Normalize(0, 100),
        extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
    )
    ticks = range(0, len(names), -(-len(names) // _LABELLED_LAYERS))
    axis.set_yticks(ticks, [_short(names[i]) for i in ticks], fontsize=6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"layer, input first ({len(names)})")
    label = "clipped, % (black: none)"
    extend = "min" if is_rare else "neither"
    axis.figure.colorbar(image, ax=axis, label=label, pad=0.01, extend=extend)


def _short(name: str, length: int = 34) -> str:
    return name if len(name) <= length else "…" + name[-length + 1 :]
