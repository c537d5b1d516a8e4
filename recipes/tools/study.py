"""A study: cells (planned runs) become rows of a CSV file, then a table and a picture.

The file is the state of the study. Only cells without a row are run, so that an interrupted study
resumes, and cells can be added.
"""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.command_line import import_tensorflow
from recipes.errors import RecipeError, plain_errors
from recipes.plugin import files

if TYPE_CHECKING:  # slow imports that flags do not need
    import keras
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_FIRST_STEPS = 5.0  # seconds that an estimate is based on
MOST_LINES = 6  # most clippers in one panel; more get a panel each
_COLOURS = [f"C{k}" for k in range(10) if k != 7]  # without grey


@dataclasses.dataclass(frozen=True)
class Cell:
    """A planned run.

    Attributes:
        key: the columns that identify it.
        name: its name in the log.
        job: runs it and returns the other columns, except "seconds"; takes what `first_steps` does.
        cost: its duration relative to the other cells.
    """

    key: Row
    name: str
    job: Callable[[float | None], Row]
    cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class StudyFile:
    """The file of a study.

    Attributes:
        path: the CSV file.
        key: columns that identify a row.
        results: columns that a run fills in, "seconds" among them.
        numbers: columns that hold a number in every row.
    """

    path: Path
    key: Sequence[str]
    results: Sequence[str]
    numbers: Sequence[str] = ()

    def read(self) -> pd.DataFrame:
        """The rows, with `numbers` as floats and everything else as text.

        Raises:
            RecipeError: the file is a different table, or damaged.
        """
        import pandas as pd

        columns = [*self.key, *self.results]
        with plain_errors():
            rows = files.read_csv(self.path, numbers=False, needs=columns)
        columns = list(rows[0]) if rows else columns  # the user may have added some
        try:
            frame = pd.DataFrame(rows, columns=columns, dtype=str)
            return frame.astype(dict.fromkeys(self.numbers, float))
        except ValueError as error:
            raise RecipeError(
                f"{self.path}: {error}; repair it, or name another --output"
            ) from None

    def drop(self, unwanted: pd.Series) -> None:
        """Removes the rows for which `unwanted` is true, so that they run again."""
        rows = self.read()
        if unwanted.all():  # the next row writes the first line
            self.path.unlink(missing_ok=True)
        elif unwanted.any():
            files.write_csv(self.path, list(rows), rows[~unwanted].to_numpy().tolist())

    def identity(self, row: Row) -> tuple:
        """The values that identify a row or a cell; 0.10 equals 0.1."""
        return tuple(_plain(row[name]) for name in self.key)

    def run(
        self,
        cells: Sequence[Cell],
        outcome: Callable[[Row], str],
        pace: float | None = None,
        after: Callable[[Row], None] = lambda row: None,
    ) -> pd.DataFrame:
        """Runs the cells without a row, and prints how long they will take.

        Args:
            cells: the cells in order.
            outcome: returns the text about a row in the log.
            pace: usual seconds per unit of `cost`, for the estimate before the first row; or None.
            after: called with each new row.

        Returns:
            The rows of these cells, as `read` returns them.
        """
        import pandas as pd

        before = self.read()
        known = [self.identity(row) for row in before.to_dict("records")]
        asked = {self.identity(cell.key): cell for cell in cells}  # each once
        left = [cell for key, cell in asked.items() if key not in known]
        took = zip(known, pd.to_numeric(before["seconds"], errors="coerce"), strict=True)
        paces = [s / asked[key].cost for key, s in took if key in asked and s >= 0]  # no NaN
        usual = [] if pace is None else [pace]
        cost = sum(cell.cost for cell in left)
        if left:
            estimate = _estimate(paces or usual, cost)
            print(f"{len(left)} of {len(asked)} runs to do: {estimate}", flush=True)
        for number, cell in enumerate(left, start=1):
            print(f"{number} of {len(left)}: {cell.name}", flush=True)
            begun, cost = time.monotonic(), cost - cell.cost
            is_first = not paces and not usual
            others = cost / cell.cost if is_first else None
            row = {**dict.fromkeys(self.results, ""), **cell.key, **cell.job(others)}
            seconds = time.monotonic() - begun
            row |= {"seconds": row["seconds"] or f"{seconds:.1f}"}
            paces.append(float(row["seconds"]) / cell.cost)
            files.append_csv(self.path, list(before), [[row.get(name, "") for name in before]])
            more = f"; {_estimate(paces, cost)} left" if number < len(left) else ""
            print(f"  {outcome(row)}, {duration(seconds)}{more}", flush=True)
            after(row)
        rows = self.read()
        return rows[[self.identity(row) in asked for row in rows.to_dict("records")]]


def _plain(value: object) -> object:
    try:
        return float(str(value))
    except ValueError:
        return str(value)


def duration(seconds: float) -> str:
    """`"40 s"`, `"7 min"`, `"2.5 h"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _estimate(paces: Sequence[float], cost: float) -> str:
    """The expected duration of runs of this `cost`; paces are seconds per unit of it."""
    if not paces:
        return "the first one tells how long"
    return f"about {duration(statistics.median(paces) * cost)}"


def first_steps(others: float | None) -> list[keras.callbacks.Callback]:
    """A Keras callback that prints, after some steps, how long a run and `others` after it take.

    None: the time is known, and there is no callback.
    """
    if others is None:
        return []
    import_tensorflow()
    import keras

    class FirstSteps(keras.callbacks.Callback):
        began: tuple[float, float] | None = None
        is_done = False

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            of_epoch = (batch + 1) / self.params["steps"]
            now, share = time.monotonic(), (self.epoch + of_epoch) / self.params["epochs"]
            self.began = self.began or (now, share)
            seconds = now - self.began[0]
            if not self.is_done and seconds > _FIRST_STEPS:
                self.is_done = True
                left = seconds / (share - self.began[1]) * (1 - share + others)
                print(f"  about {duration(left)} in all, by its first steps", flush=True)

    return [FirstSteps()]


# ----------------------------------------------------------------------------- table and picture


def summary(runs: pd.DataFrame) -> str:
    """`"96.1 (95.8–96.4), 1 of 3 diverged"`: mean and range of the scores of some rows."""
    scores, parts = runs["score"].dropna(), []
    if len(scores):
        spread = f" ({scores.min():.1f}–{scores.max():.1f})" if len(scores) > 1 else ""
        parts.append(f"{statistics.fmean(scores):.1f}{spread}")
    for status in ("diverged", "at chance"):
        if count := (runs["status"] == status).sum():
            parts.append(f"{count} of {len(runs)} {status}")
    return ", ".join(parts)


def cross_table(rows: pd.DataFrame, lines: str, columns: str, cell=summary) -> pd.DataFrame:
    """A table with one line and column per value of two columns, and text for each group of rows.

    Numbers are sorted; words keep the order of the rows.
    """
    import pandas as pd

    groups = rows.groupby([lines, columns], sort=False)
    texts = pd.Series({key: cell(runs) for key, runs in groups}).unstack(fill_value="")
    table = texts.reindex(index=_values(rows[lines]), columns=_values(rows[columns]))
    return table.rename(index=_text, columns=_text).rename_axis(lines).reset_index()


def _values(column: pd.Series) -> list:
    values = column.unique().tolist()
    return values if any(isinstance(value, str) for value in values) else sorted(values)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def log_axis(axis: Axes) -> None:
    """Makes the x axis logarithmic, with plain numbers at 1, 2 and 5 of each of a few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)  # more would overlap
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw(path: Path, *of_picture: Any, **options: Any) -> None:
    """Saves `picture` as a PNG file."""
    figure = picture(*of_picture, **options)
    files.replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def picture(
    rows: pd.DataFrame,
    title: str,
    measures: Mapping[str, str],
    guess: float | None = None,
    label: Callable[[str], str] = str,
) -> Figure:
    """Draws measures over the learning rate: for each clipper its runs as dots, means as bars.

    Lines join the means. A cross at the bottom marks a rate at which a run diverged. More than
    `MOST_LINES` clippers get one panel each, of the first measure, beside the first clipper's line.

    Args:
        rows: with the columns clipper, learning_rate, status and the measures (in %, or NaN).
        title: the picture's title.
        measures: a dict from column to axis label.
        guess: the first measure of random guessing, in %; None if unknown.
        label: returns the legend's name of a clipper.
    """
    from matplotlib.figure import Figure

    clippers, first = list(rows["clipper"].unique()), next(iter(measures))
    panels = [(measure, clippers) for measure in measures]
    if len(clippers) > MOST_LINES:
        panels = [(first, [clippers[0], other]) for other in clippers[1:]]
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(8, 4.5 * columns), 1 + 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (measure, shown) in zip(axes, panels, strict=False):
        if guess is not None and measure == first:
            axis.axhline(guess, color="grey", linestyle=":", linewidth=1, label="a guess")
        for place, clipper in enumerate(shown):
            colour = "black" if clipper == "none" else _COLOURS[place % len(_COLOURS)]
            runs = rows[rows["clipper"] == clipper]
            _line(axis, runs, measure, colour, place, textwrap.fill(label(clipper), 44))
        _finish(axis, rows, measure)
        axis.set_ylabel(measures[measure])
    for axis in axes[len(panels) :]:
        axis.remove()
    note = "\nx: a run diverged" if (rows["status"] == "diverged").any() else ""
    figure.suptitle(title + note, fontsize="medium")
    return figure


def _line(
    axis: Axes, runs: pd.DataFrame, measure: str, colour: str, place: int, label: str
) -> None:
    """Draws one clipper: its runs, their mean at each learning rate, and crosses for divergence."""
    lost = runs["status"] == "diverged"
    by_rate = runs.groupby("learning_rate")
    # If all runs diverged, only the cross is drawn.
    means = by_rate[measure].mean().where(by_rate["status"].agg(lambda s: set(s) != {"diverged"}))
    style = "_--" if colour == "black" else "_-"  # a bar shows a mean that no line reaches
    axis.plot(means.index, means, style, label=label, linewidth=1.6, ms=12, color=colour)
    left = runs[~lost]
    axis.scatter(left["learning_rate"], left[measure], s=9, color=colour, alpha=0.6)
    rates = runs["learning_rate"][lost].unique()
    at_foot = axis.get_xaxis_transform()
    axis.plot(rates, [0.03 + 0.02 * place] * len(rates), "x", color=colour, transform=at_foot)


def _finish(axis: Axes, rows: pd.DataFrame, measure: str) -> None:
    """Labels the axis with each learning rate that was tried."""
    rates = sorted(rows["learning_rate"].unique())
    axis.set(xscale="log", xlabel="learning rate")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize="small")
    axis.set_xticks([], minor=True)
    low, high = rows[measure].min(), rows[measure].max()
    if low <= high:  # not NaN, as the clip fraction is where nothing clips
        span = high - low or 1.0
        axis.set_ylim(low - 0.2 * span, high + 0.06 * span)  # room for the crosses
    axis.grid(alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="x-small")
