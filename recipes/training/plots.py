"""The picture of a run, drawn from its tables."""

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

_LABELLED_LAYERS = 36  # more names than this would overlap
_LEAST_SHOWN = 1e-3  # per cent, bottom of the heat map's scale


def draw_curves(history: Sequence[dict], layers: Sequence[dict], path, title: str, metric: str):
    """Loss, the metric, gradient norm, and a map of the clip fraction by layer and epoch.

    Args:
        history: rows of `history.csv`.
        layers: rows of `layers.csv`, in the order of the model's layers.
        path: of the PNG file.
        title: str.
        metric: str, name of the metric beside the loss; also drawn with `val_` and `test_`.
    """
    from matplotlib.figure import Figure

    epochs = np.array([row["epoch"] for row in history])
    names = list(dict.fromkeys(row["layer"] for row in layers))
    heights = [2.9, 2.9] + ([min(1.5 + 0.13 * len(names), 6.0)] if names else [])  # inches
    figure = Figure(figsize=(11, sum(heights)), layout="constrained", dpi=110)
    figure.suptitle(title)
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)

    axis = figure.add_subplot(grid[0, 0])
    _lines(axis, epochs, history, "loss", log=True)
    axis.set_ylabel("loss")
    axis = figure.add_subplot(grid[0, 1])
    _lines(axis, epochs, history, metric)
    axis.set_ylabel(metric.replace("_", " "))

    axis = figure.add_subplot(grid[1, 0])
    if names:
        _layer_norms(axis, epochs, layers, names)
    if "grad_norm" in history[0]:
        values = _column(history, "grad_norm")
        axis.plot(epochs, values, color="black", marker="o", markersize=3, label="all layers")
    if _any_positive(axis):
        axis.set_yscale("log")
    axis.set_ylabel("gradient norm before the clip")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small")
    axis = figure.add_subplot(grid[1, 1])
    if "clip_fraction" in history[0]:
        values = 100 * _column(history, "clip_fraction")
        axis.plot(epochs, values, marker="o", markersize=3, color="tab:red")
        if _any_positive(axis):
            # From all to next to nothing within a run; below a millionth is drawn as none.
            axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(bottom=0, top=2 * np.nanmax(values, initial=1e-4))
    axis.set_ylabel("clipped, % of all (log)")
    for axis in figure.axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)

    if names:
        _heat_map(figure, figure.add_subplot(grid[2, :]), layers, names)
    figure.savefig(path)


def _column(rows, key):
    return np.array([row.get(key, np.nan) or np.nan for row in rows], dtype=float)


def _any_positive(axis) -> bool:
    return any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in axis.lines)


def _lines(axis, epochs, history, name, log=False):
    for prefix, label in (("", "training"), ("val_", "validation"), ("test_", "test")):
        if prefix + name in history[0]:
            values = _column(history, prefix + name)
            axis.plot(epochs, values, marker="o", markersize=3, label=label)
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    if log and np.nanmin(drawn) > 0 and np.nanmax(drawn) > 10 * np.nanmin(drawn):
        axis.set_yscale("log")
    axis.legend(fontsize="small")


def _table(layers, names, key):
    """Array [layers, epochs]."""
    epochs = sorted({row["epoch"] for row in layers})
    rows = {name: i for i, name in enumerate(names)}
    columns = {epoch: i for i, epoch in enumerate(epochs)}
    values = np.full((len(names), len(epochs)), np.nan)
    for row in layers:
        values[rows[row["layer"]], columns[row["epoch"]]] = row[key]
    return np.array(epochs), values


def _layer_norms(axis, epochs, layers, names):
    """The spread over the layers, as quantiles: readable for five layers and for two hundred."""
    at, norms = _table(layers, names, "grad_norm")
    low, middle, high = np.nanquantile(norms, (0.1, 0.5, 0.9), axis=0)
    axis.fill_between(at, low, high, alpha=0.25, label="layers, 10 to 90 %")
    axis.plot(at, middle, label="median layer")


def _heat_map(figure, axis, layers, names):
    from matplotlib.colors import LogNorm

    at, fractions = _table(layers, names, "clip_fraction")
    colours = _colours()
    image = axis.imshow(
        np.clip(100 * fractions, 0, 100),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=LogNorm(vmin=_LEAST_SHOWN, vmax=100),
        extent=(at[0] - 0.5, at[-1] + 0.5, len(names) - 0.5, -0.5),
    )
    every = -(-len(names) // _LABELLED_LAYERS)
    ticks = range(0, len(names), every)
    axis.set_yticks(ticks, [_short(names[i]) for i in ticks], fontsize=6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"layer, input first ({len(names)})")
    figure.colorbar(image, ax=axis, label="clipped, % (black: none)", pad=0.01, extend="min")


def _colours():
    """The colour map of the heat map: what is not clipped at all is black."""
    import matplotlib

    return matplotlib.colormaps["plasma"].with_extremes(under="black", bad="black")


def _short(name: str, length: int = 34) -> str:
    return name if len(name) <= length else "…" + name[-length + 1 :]
