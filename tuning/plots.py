"""The picture of a search: which threshold should I use, and does it matter?"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_gradclip.tuning.space import threshold_of
from tuning.results import best_row, contest, curves, describe, formatter, verdict

_BEST = 5  # learning curves
_COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:cyan")
_LEAST_CLIPPED = 0.01  # per cent, the dark end of the colours
_SYMBOLS = {"threshold": "c", "gamma": "γ", "max_norm": "max_norm"}


def draw(
    rows: Sequence[Mapping],
    path,
    objective,
    title: str,
    folder: Path | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draws the score by threshold, parallel coordinates, and the best trials' learning curves.

    Args:
        rows: of `tuning.results.trial_rows`, best first.
        path: of the PNG file.
        objective: `keras_tuner.Objective`.
        title: str, a head above the verdict.
        folder: of the trials, for the learning curves; None: without them.
        ranges: (low, high) of the thresholds by name, the widths of the axes.
    """
    from matplotlib.figure import Figure

    done = [row for row in rows if row["status"] == "completed"]
    names = list(dict.fromkeys(name for row in rows for name in threshold_of(row["values"])))
    figure = Figure(figsize=(12, 10), layout="constrained", dpi=110)
    lines = textwrap.wrap(verdict(rows, objective), 100)
    figure.suptitle(f"{title}\n" + "\n".join(lines), fontsize=12, fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))

    if names and done:
        _thresholds(above, rows, names, objective, ranges or {})
    left, right = below.subfigures(1, 2, width_ratios=(1.55, 1))
    if done:
        _parallel(left.add_subplot(), rows, objective)
        _curves(right.add_subplot(), done, objective, folder)
    figure.savefig(path)


def _scale(objective):
    """Factor and unit: accuracies in per cent."""
    if "accuracy" in objective.name:
        return 100.0, f"{objective.name.replace('_', ' ')}, %"
    return 1.0, objective.name.replace("_", " ")


def _thresholds(figure, rows, names, objective, ranges):
    """A panel a threshold: score over it, coloured by clip fraction, beside the baseline."""
    import matplotlib
    from matplotlib.colors import LogNorm

    factor, label = _scale(objective)
    done = [row for row in rows if row["status"] == "completed"]
    bottom, top = _limits([factor * row["score"] for row in done], objective)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    rates = [r["values"]["learning_rate"] for r in rows if "learning_rate" in r["values"]]
    norm = LogNorm(vmin=_LEAST_CLIPPED, vmax=100)
    colours = matplotlib.colormaps["viridis"]
    best = best_row(rows)
    image = None
    for axis, name in zip(axes, names, strict=True):
        _unclipped_lines(axis, rows, factor)
        here = [row for row in rows if name in row["values"]]
        for row in here:
            x, size = row["values"][name], _size(row["values"].get("learning_rate"), rates)
            score = factor * row["score"]
            if row["status"] == "diverged":
                axis.scatter(x, bottom, marker="x", s=size, color="tab:red", clip_on=False)
            elif row["status"] == "completed":
                clipped = max(100 * row["clip_fraction"], _LEAST_CLIPPED)
                if row["runs"] > 1:
                    span = [min(max(factor * row[k], bottom), top) for k in ("lowest", "highest")]
                    axis.plot([x, x], span, color="black", linewidth=1.2, zorder=2)
                inside = bottom <= score <= top
                image = axis.scatter(
                    x,
                    min(max(score, bottom), top),
                    c=[_LEAST_CLIPPED if math.isnan(clipped) else clipped],
                    s=size,
                    cmap=colours,
                    norm=norm,
                    marker="o" if inside else ("v" if score < bottom else "^"),
                    edgecolors="black",
                    linewidths=2.2 if row is best else 0.5,
                    zorder=4 if row is best else 3,
                    clip_on=False,
                )
                if row is best:
                    low, high = ranges.get(name, (x, x))
                    left = x * x > low * high  # where there is room
                    axis.annotate(
                        "best" if row["runs"] == 1 else f"best, {row['runs']:.0f} other seeds",
                        (x, score),
                        xytext=(-10 if left else 10, 0),
                        textcoords="offset points",
                        ha="right" if left else "left",
                        va="center",
                    )
        axis.set_xscale("log")
        if name in ranges:
            low, high = ranges[name]
            room = (high / low) ** 0.04
            axis.set_xlim(low / room, high * room)
        _plain_ticks(axis)
        kind, _, rest = name.partition("/")
        parameter, _, group = rest.partition("/")
        symbol = _SYMBOLS.get(parameter, parameter)
        axis.set_xlabel(f"{kind}: {symbol}{f' of the {group}' if group else ''}")
        axis.set_ylim(bottom, top)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(label)
    if objective.direction == "min" and bottom > 0 and top / bottom > 20:
        axes[0].set_yscale("log")
    _key(axes[0], rows, rates)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="clipped, % of all (log)", pad=0.01)


def _plain_ticks(axis):
    """0.02 rather than 2×10⁻², at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _unclipped_lines(axis, rows, factor):
    """The best unclipped trial as a line, the range of its seeds as a band; the others dotted."""
    best = contest(rows)[1]
    for row in rows:
        if row["status"] == "completed" and not threshold_of(row["values"]):
            axis.axhline(
                factor * row["score"],
                color="tab:red",
                linewidth=2 if row is best else 0.7,
                linestyle="-" if row is best else ":",
            )
    if best is not None and best["runs"] > 1:
        axis.axhspan(factor * best["lowest"], factor * best["highest"], color="tab:red", alpha=0.15)


def _key(axis, rows, rates):
    """What the marks mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Line2D([], [], color="tab:red", linewidth=2, label="best without clipping")]
    unclipped = contest(rows)[1]
    if unclipped is None or unclipped["status"] == "diverged":
        handles = [Line2D([], [], linestyle="", label="unclipped: diverged")]
    elif unclipped["runs"] > 1:
        handles.append(Patch(color="tab:red", alpha=0.15, label="its range over other seeds"))
    if any(row["status"] == "diverged" and threshold_of(row["values"]) for row in rows):
        handles.append(Line2D([], [], marker="x", linestyle="", color="tab:red", label="diverged"))
    if rates and max(rates) > min(rates):
        for rate in (min(rates), max(rates)):
            size = math.sqrt(_size(rate, rates))
            handles.append(
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="",
                    color="lightgrey",
                    markeredgecolor="black",
                    markersize=size,
                    label=f"learning rate {rate:.2g}",
                )
            )
    axis.legend(handles=handles, fontsize="small", loc="best", framealpha=0.85)


def _size(rate, rates) -> float:
    """Area of a mark: the learning rate."""
    if rate is None or max(rates) == min(rates):
        return 70.0
    share = math.log(rate / min(rates)) / math.log(max(rates) / min(rates))
    return 30.0 + 170.0 * share


def _limits(scores, objective):
    """The range that the better half of the trials needs; what is outside is drawn at the edge."""
    ordered = sorted(scores, reverse=objective.direction == "max")
    best, middle = ordered[0], ordered[len(ordered) // 2]
    room = 1.8 * abs(best - middle) or 0.05 * abs(best) or 1.0
    worst = ordered[-1]
    if objective.direction == "max":
        return max(best - room, worst - 0.1 * room), best + 0.15 * room
    return best - 0.15 * room, min(best + room, worst + 0.1 * room)


def _parallel(axis, rows, objective):
    """Parallel coordinates: a line a trial, from its hyper-parameters to its score."""
    import matplotlib

    factor, label = _scale(objective)
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    names = [n for n in names if len({str(r["values"].get(n)) for r in rows}) > 1]
    done = [r for r in rows if r["status"] in ("completed", "diverged") and not r["confirms"]]
    scores = [factor * row["score"] for row in done if row["status"] == "completed"]
    low, high = _limits(scores, objective)
    colours = matplotlib.colormaps["viridis"]
    columns = [_Column([row["values"].get(name) for row in rows]) for name in names]
    for position, column in enumerate(columns):
        axis.axvline(position, color="grey", linewidth=0.8)
        for at, text in column.ticks:
            axis.annotate(
                text,
                (position, at),
                fontsize=7,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
                zorder=5,
            )
    last = len(names)
    axis.axvline(last, color="black", linewidth=1.2)
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        axis.annotate(f" {value:.4g}", (last, share), fontsize=7, va="center", zorder=5)
    for row in reversed(done):  # the best on top
        diverged = row["status"] == "diverged"
        worst = 0.0 if objective.direction == "max" else 1.0
        share = worst if diverged else (factor * row["score"] - low) / ((high - low) or 1.0)
        share = min(max(share, 0.0), 1.0)
        good = share if objective.direction == "max" else 1 - share
        heights = [
            column.height(row["values"].get(name))
            for name, column in zip(names, columns, strict=True)
        ]
        axis.plot(
            range(last + 1),
            [*heights, share],
            color="tab:red" if diverged else colours(0.95 * good),
            linestyle=":" if diverged else "-",
            linewidth=2.5 if row is done[0] else 1.0,
            alpha=0.9,
        )
    heads = [name.replace("/", "\n") for name in names]
    axis.set_xticks(range(last + 1), [*heads, label.replace(" ", "\n")], fontsize=7)
    axis.set_yticks([])
    axis.set_ylim(-0.16, 1.06)
    axis.set_title("all trials (light: good; dotted red: diverged; –: not in use)", fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


class _Column:
    """A coordinate: numbers by their log, words by their order, what is not in use below."""

    def __init__(self, values):
        present = [value for value in values if value is not None]
        self.numeric = all(isinstance(v, float) for v in present)
        self.ticks = [] if len(present) == len(values) else [(-0.12, "–")]
        if self.numeric:
            self.low, self.high = math.log(min(present)), math.log(max(present))
            ends = (self.low,) if self.low == self.high else (self.low, self.high)
            self.ticks += [(self.height(math.exp(end)), f"{math.exp(end):.2g}") for end in ends]
        else:
            self.words = sorted({str(value) for value in present})
            self.ticks += [(self.height(word), word) for word in self.words]

    def height(self, value) -> float:
        """The place of a value, 0 to 1; -0.12 for None."""
        if value is None:
            return -0.12
        if self.numeric:
            span = self.high - self.low
            return (math.log(value) - self.low) / span if span else 0.5
        last = len(self.words) - 1
        return self.words.index(str(value)) / last if last else 0.5


def _curves(axis, done, objective, folder):
    """The metric by epoch: the best five trials, and the baseline in red."""
    factor, label = _scale(objective)
    show = formatter(objective.name)
    own = [row for row in done if not row["confirms"]]
    shown = [*own[:_BEST], *(row for row in own[_BEST:] if row["baseline"])]
    anything = False
    for rank, row in enumerate(shown):
        runs = curves(folder, row, objective.name) if folder else []
        colour = "tab:red" if row["baseline"] else _COLOURS[rank % _BEST]
        text = f"{show(row['score'])}: {describe(row['values'])}"
        for number, values in enumerate(runs):
            anything = True
            axis.plot(
                np.arange(1, len(values) + 1),
                factor * np.array(values),
                marker="o",
                markersize=3,
                linewidth=1.0 if row["baseline"] else 1.5,
                label=textwrap.fill(text, 80) if number == 0 else None,
                color=colour,
            )
    axis.set_title("learning curves of the best (red: the unclipped baseline)", fontsize=9)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if anything:
        axis.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(0.0, -0.2), frameon=False)
    else:
        axis.annotate(
            "the runs are on other machines", (0.5, 0.5), ha="center", xycoords="axes fraction"
        )
