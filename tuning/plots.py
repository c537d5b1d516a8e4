"""The picture of a search: the score of each threshold, and how much it matters."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_gradclip.tuning.space import threshold_of
from recipes.words import counted
from tuning.results import curves
from tuning.rows import TrialRow, best_row, contest, describe, formatter
from tuning.verdict import verdict

_BEST = 5  # learning curves
_COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:cyan")
_LEAST_CLIPPED = 0.01  # per cent, the dark end of the colours
_SYMBOLS = {"threshold": "c", "gamma": "γ", "max_norm": "max_norm"}


def draw(
    rows: Sequence[TrialRow],
    path,
    objective,
    title: str,
    folder: Path | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draws the score by threshold, the runs that decide, and the best trials' learning curves.

    Args:
        rows: as `tuning.rows.ranked` orders them.
        path: of the PNG file.
        objective: with `name` and `direction`.
        title: str, a head above the verdict.
        folder: of the trials, for the learning curves; None: without them.
        ranges: (low, high) of the thresholds by name, the widths of the axes.
    """
    from matplotlib.figure import Figure

    done = [row for row in rows if row.status == "completed"]
    names = list(dict.fromkeys(name for row in rows for name in threshold_of(row.values)))
    figure = Figure(figsize=(12, 10), layout="constrained", dpi=110)
    lines = textwrap.wrap(verdict(rows, objective).text, 100)
    figure.suptitle(f"{title}\n" + "\n".join(lines), fontsize=12, fontweight="bold")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above, below = halves

    if names and done:
        _thresholds(above, rows, names, objective, ranges or {})
    left, right = below.subfigures(1, 2, width_ratios=(1.55, 1))
    if done:
        _seeds(left.add_subplot(), rows, objective)
        _curves(right.add_subplot(), done, objective, folder)
    figure.savefig(path)


def _scale(objective):
    """Factor and unit: accuracies in per cent."""
    if "accuracy" in objective.name:
        return 100.0, f"{objective.name.replace('_', ' ')}, %"
    return 1.0, objective.name.replace("_", " ")


def _thresholds(figure, rows, names, objective, ranges):
    """A panel a threshold: score over it, coloured by clip fraction, beside the baseline."""
    factor, label = _scale(objective)
    done = [row for row in rows if row.status == "completed"]
    limits = _limits([factor * row.score for row in done], objective)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    rates = [r.values["learning_rate"] for r in rows if "learning_rate" in r.values]
    best = best_row(rows)
    image = None
    for axis, name in zip(axes, names, strict=True):
        _unclipped_lines(axis, rows, factor)
        for row in rows:
            if name in row.values:
                size = _size(row.values.get("learning_rate"), rates)
                mark = _mark(axis, row, row.values[name], size, factor, limits, row is best)
                image = mark or image
        if best is not None and name in best.values:
            _annotate_best(axis, best, best.values[name], factor, ranges.get(name))
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
        axis.set_ylim(*limits)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(label)
    if objective.direction == "min" and limits[0] > 0 and limits[1] / limits[0] > 20:
        axes[0].set_yscale("log")
    _key(axes[0], rows, rates)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="clipped, % of all (log)", pad=0.01)


def _mark(axis, row, x, size, factor, limits, best):
    """A trial: a circle, an arrow at the edge that it lies beyond, or a cross where it diverged."""
    from matplotlib.colors import LogNorm

    bottom, top = limits
    if row.status == "diverged":
        axis.scatter(x, bottom, marker="x", s=size, color="tab:red", clip_on=False)
    if row.status != "completed":
        return None
    score = factor * row.score
    clipped = max(100 * row.clip_fraction, _LEAST_CLIPPED)
    if row.runs > 1:
        span = [min(max(factor * end, bottom), top) for end in (row.lowest, row.highest)]
        axis.plot([x, x], span, color="black", linewidth=1.2, zorder=2)
    inside = bottom <= score <= top
    return axis.scatter(
        x,
        min(max(score, bottom), top),
        c=[_LEAST_CLIPPED if math.isnan(clipped) else clipped],
        s=size,
        cmap="viridis",
        norm=LogNorm(vmin=_LEAST_CLIPPED, vmax=100),
        marker="o" if inside else ("v" if score < bottom else "^"),
        edgecolors="black",
        linewidths=2.2 if best else 0.5,
        zorder=4 if best else 3,
        clip_on=False,
    )


def _annotate_best(axis, row, x, factor, limits):
    low, high = limits or (x, x)
    left = x * x > low * high  # where there is room
    axis.annotate(
        f"best, {counted(row.runs, 'other seed')}" if row.confirms else "best",
        (x, factor * row.score),
        xytext=(-10 if left else 10, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
    )


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
        if row.status == "completed" and not threshold_of(row.values):
            axis.axhline(
                factor * row.score,
                color="tab:red",
                linewidth=2 if row is best else 0.7,
                linestyle="-" if row is best else ":",
            )
    if best is not None and best.runs > 1:
        axis.axhspan(factor * best.lowest, factor * best.highest, color="tab:red", alpha=0.15)


def _key(axis, rows, rates):
    """What the marks mean."""
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        Line2D([], [], color="tab:red", linewidth=2, label="best without clipping")
    ]
    unclipped = contest(rows)[1]
    if unclipped is None or unclipped.status == "diverged":
        handles = [Line2D([], [], linestyle="", label="unclipped: diverged")]
    elif unclipped.runs > 1:
        handles.append(Patch(color="tab:red", alpha=0.15, label="its range over other seeds"))
    if sum(row.status == "completed" and not row.clipped for row in rows) > 1:
        label = "other trials without clipping"
        handles.append(Line2D([], [], color="tab:red", linewidth=0.7, linestyle=":", label=label))
    if any(row.status == "diverged" and threshold_of(row.values) for row in rows):
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
    # Rates that hardly differ are marks that hardly differ.
    share = math.log(rate / min(rates)) / math.log(max(max(rates) / min(rates), 3.0))
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


def _seeds(axis, rows, objective):
    """The runs that the verdict compares: a mark a seed."""
    factor, label = _scale(objective)
    for place, row in enumerate(contest(rows)):
        colour = "tab:red" if place else "tab:blue"
        if row is None:
            continue
        finite = [factor * score for score in row.scores if math.isfinite(score)]
        lost = row.runs - len(finite)
        axis.scatter(finite, [place] * len(finite), s=90, alpha=0.6, color=colour)
        if finite:
            axis.plot([np.mean(finite)] * 2, [place - 0.2, place + 0.2], color=colour, linewidth=2)
        text = describe(row.values) + (f" ({lost} diverged)" if lost else "")
        seeds = "other seeds" if row.confirms else "the search's own run"
        axis.annotate(
            f"{textwrap.fill(text, 60)}\n{seeds}",
            (0.5, place + 0.27),
            xycoords=("axes fraction", "data"),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axis.set_yticks([0, 1], ["clipped", "unclipped"])
    axis.set_ylim(-0.5, 1.8)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title("the best of each, a mark a seed (bar: mean)", fontsize=9)


def _curves(axis, done, objective, folder):
    """The metric by epoch: the best five trials, and the baseline in red."""
    factor, label = _scale(objective)
    show = formatter(objective.name)
    own = [row for row in done if not row.confirms]
    shown = [*own[:_BEST], *(row for row in own[_BEST:] if row.baseline)]
    longest = 0
    for rank, row in enumerate(shown):
        runs = curves(folder, row, objective.name) if folder else []
        colour = "tab:red" if row.baseline else _COLOURS[rank % _BEST]
        text = f"{show(row.score)}: {describe(row.values)}"
        for number, values in enumerate(runs):
            longest = max(longest, len(values))
            axis.plot(
                np.arange(1, len(values) + 1),
                factor * np.array(values),
                marker="o",
                markersize=3,
                linewidth=1.0 if row.baseline else 1.5,
                label=textwrap.fill(text, 80) if number == 0 else None,
                color=colour,
            )
    axis.set_title("learning curves of the best (red: the unclipped baseline)", fontsize=9)
    axis.set_xlabel("epoch")
    axis.set_ylabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if longest:
        axis.set_xlim(0.5, longest + 0.5)
        axis.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(0.0, -0.2), frameon=False)
    else:
        axis.annotate(
            "the runs are on other machines", (0.5, 0.5), ha="center", xycoords="axes fraction"
        )
