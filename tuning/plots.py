"""The picture of a search: scores by threshold, the compared runs, and learning curves."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from keras_gradclip.files import read_csv
from keras_gradclip.tuning.space import threshold_of
from recipes.tools import study
from tuning.results import TrialRow, contest, describe, formatter, verdict

_SHOWN = 5  # learning curves
_UNCLIPPED = "tab:red"


def draw(rows: Sequence[TrialRow], path, objective, title: str, folder: Path | None = None) -> None:
    """Draws scores by threshold, the runs that the verdict compares, and learning curves.

    The rows are `ranked`; `folder` has the trials, for their curves.
    """
    done = [row for row in rows if row.status == "completed"]
    names = list(dict.fromkeys(name for row in rows for name in threshold_of(row.values)))
    if len({row.values.get("learning_rate") for row in rows}) > 1:
        names.append("learning_rate")
    figure = Figure(figsize=(12, 10), layout="constrained", dpi=110)
    lines = textwrap.wrap(verdict(rows, objective).text, 100)
    figure.suptitle(f"{title}\n" + "\n".join(lines), fontsize=12, fontweight="bold")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    above, below = halves
    if names and done:
        _scores(above, rows, names, objective)
    if done:
        left, right = below.subfigures(1, 2, width_ratios=(1.55, 1))
        _seeds(left.add_subplot(), rows, objective)
        _curves(right.add_subplot(), done, objective, folder)
    figure.savefig(path)


def _label(axis: Axis, objective) -> None:
    """Labels an axis with the objective; accuracies are shown in per cent."""
    axis.set_label_text(objective.name.replace("_", " "))
    if "accuracy" in objective.name:
        axis.set_major_formatter(PercentFormatter(1.0))


def _scores(figure, rows, names, objective) -> None:
    """One panel per hyper-parameter, one mark per trial: colour is clip fraction, red unclipped."""
    done = [row for row in rows if row.status == "completed"]
    is_max = objective.direction == "max"
    bottom, top = _limits([row.score for row in done], is_max)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    shades = ScalarMappable(LogNorm(0.01, 100), "viridis")
    best = contest(rows)[1]
    for axis, name in zip(axes, names, strict=True):
        for row in sorted(done, key=lambda row: row.clipped):  # unclipped: below, and larger
            if name in row.values:
                y = row.score
                colour: Any = _UNCLIPPED
                if row.clipped:
                    colour = shades.to_rgba(np.fmax(100 * row.clip_fraction, 0.01))
                mark = "*" if row.confirms else "o" if bottom <= y <= top else "D"
                axis.scatter(
                    row.values[name],
                    np.clip(y, bottom, top),
                    marker=mark,
                    s=(160 if row.confirms else 60) * (1 if row.clipped else 2),
                    color=colour,
                    edgecolor="black" if row.clipped else colour,
                    zorder=3,
                    clip_on=False,
                )
        lost = [r.values[name] for r in rows if r.status == "diverged" and name in r.values]
        worst = [bottom if is_max else top] * len(lost)
        axis.scatter(lost, worst, marker="x", color=_UNCLIPPED, s=64, clip_on=False, zorder=4)
        if best is not None and best.status == "completed":
            axis.axhline(best.score, color=_UNCLIPPED)
            axis.axhspan(best.lowest, best.highest, color=_UNCLIPPED, alpha=0.15)
        study.log_axis(axis)
        axis.set(ylim=(bottom, top), xlabel=name.replace("/", " "))
        axis.margins(x=0.1)
        axis.tick_params("x", rotation=60, labelsize="small")
        axis.grid(alpha=0.3)
    _label(axes[0].yaxis, objective)
    if not is_max and bottom > 0 and top / bottom > 20:
        axes[0].set_yscale("log")
    _legend(figure, axes[0], best)
    if any(row.clipped for row in done):
        figure.colorbar(shades, ax=list(axes), label="clipped, % of all (log)", pad=0.01)


def _limits(scores, large: bool) -> tuple[float, float]:
    """The axis range of the better half of the scores; worse ones are drawn at its edge."""
    ordered = sorted(scores, reverse=large)
    best, middle, worst = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    room = 1.8 * abs(best - middle) or 0.05 * abs(best) or 1.0
    if large:
        return max(best - room, worst - 0.1 * room), best + 0.15 * room
    return best - 0.15 * room, min(best + room, worst + 0.1 * room)


def _legend(figure, axis, unclipped: TrialRow | None) -> None:
    label = "best without clipping, its runs as a band"
    if unclipped is None or unclipped.status == "diverged":
        label = "without clipping: diverged"
    axis.plot([], [], "o-", color=_UNCLIPPED, label=label)
    for mark, colour, status in (
        ("*", "black", "trained again with other seeds"),
        ("D", "black", "beyond the scale"),
        ("x", _UNCLIPPED, "diverged"),
    ):
        axis.plot([], [], mark, color=colour, label=status)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)


def _seeds(axis, rows, objective) -> None:
    """The runs that the verdict compares: one mark for each seed."""
    for place, (row, colour) in enumerate(
        zip(contest(rows), ("tab:blue", _UNCLIPPED), strict=True)
    ):
        if row is None:
            continue
        finite = [score for score in row.scores if math.isfinite(score)]
        axis.scatter(finite, [place] * len(finite), s=90, alpha=0.6, color=colour)
        if finite:
            axis.vlines(np.mean(finite), place - 0.2, place + 0.2, color=colour, linewidth=2)
        lost = row.runs - len(finite)
        text = textwrap.fill(describe(row.values) + (f" ({lost} diverged)" if lost else ""), 60)
        text += "\nother seeds" if row.confirms else "\nthe search's own run"
        across = axis.get_yaxis_transform()
        axis.text(0.5, place + 0.27, text, transform=across, ha="center", size=8)
    axis.set(yticks=[0, 1], yticklabels=["clipped", "unclipped"], ylim=(-0.5, 1.8))
    _label(axis.xaxis, objective)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title("best clipped and best unclipped: one mark for each seed, bar: mean", size=9)


def _curves(axis, done, objective, folder: Path | None) -> None:
    """The metric by epoch: the best five trials, and the baseline in red."""
    show = formatter(objective.name)
    own = [row for row in done if not row.confirms]
    for row in [*own[:_SHOWN], *(row for row in own[_SHOWN:] if row.baseline)]:
        colour = _UNCLIPPED if row.baseline else f"C{own.index(row) % _SHOWN + 4}"
        paths = sorted(folder.glob(f"trial_{row.trial}/run-*/history.csv")) if folder else []
        for path in paths:
            values = [line[objective.name] for line in read_csv(path) if objective.name in line]
            epochs = range(1, len(values) + 1)
            text = f"trial {row.trial}: {show(row.score)}" if path == paths[0] else None
            axis.plot(epochs, values, "o-", ms=3, color=colour, label=text)
    axis.set_title("learning curves of the best (red: the unclipped baseline)", size=9)
    axis.set_xlabel("epoch")
    _label(axis.yaxis, objective)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="small")
