"""The geometry of the report's line charts and heat maps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from keras_gradclip._types import Tensor
from keras_gradclip.diagnostics._run_files import Run
from keras_gradclip.diagnostics.findings import over_samples

#: Columns of a heat map, at most.
COLUMNS = 160
#: Pixels a label needs to be read.
_LABEL = 13
#: Keeps logarithms finite.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Label:
    """A tick's text and its coordinate in the SVG."""

    at: float
    text: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart, in the coordinates of its SVG; NaN breaks a line.

    Attributes:
        title: what it shows.
        legend: the lines' names.
        x_labels, y_labels: the ticks.
        lines: (number of the series, points of an unbroken line); one point is a dot.
    """

    WIDTH, HEIGHT = 520, 220
    LEFT, RIGHT, TOP, BOTTOM = 58, 508, 10, 190

    title: str
    legend: list[str]
    x_labels: list[Label]
    y_labels: list[Label]
    lines: list[tuple[int, list[tuple[float, float]]]]

    @classmethod
    def of(
        cls,
        title: str,
        series: dict[str, tuple[np.ndarray, np.ndarray]],
        log: bool = False,
        floor: float | None = None,
    ) -> Chart:
        """The chart of some series, name to (steps, values), on a linear or a log axis."""
        points = [(x, np.where(y > 0, y, np.nan) if log else y) for x, y in series.values()]
        values = np.concatenate([y[np.isfinite(y)] for _, y in points])
        legend = [name for name in series if name]
        if not values.size:
            return cls(title, legend, [], [], [])
        scale: Callable[[Tensor], Tensor] = np.log10 if log else (lambda v: v)
        low = float(scale(values.min() if floor is None else min(values.min(), floor)))
        high = float(scale(values.max()))
        if high - low < 1e-9 * max(1.0, abs(high)):
            pad = 0.5 if log else max(abs(high), 1.0) / 2
            low, high = low - (pad if floor is None else 0.0), high + pad
        x0 = min(int(x.min()) for x, _ in points)
        x1 = max(x0 + 1, *(int(x.max()) for x, _ in points))

        def at_x(x: Tensor) -> Tensor:
            return cls.LEFT + (cls.RIGHT - cls.LEFT) * (x - x0) / (x1 - x0)

        def at_y(y: Tensor) -> Tensor:
            return cls.TOP + (cls.BOTTOM - cls.TOP) * (high - y) / (high - low)

        return cls(
            title,
            legend,
            [Label(at_x(x), f"{int(x):,}") for x in ticks(x0, x1) if x == int(x)],
            [Label(at_y(v), number(10**v if log else v)) for v in ticks(low, high, log)],
            [
                (k, line)
                for k, (x, y) in enumerate(points)
                for line in _unbroken(at_x(x), at_y(scale(y)))
            ],
        )


def _unbroken(x: np.ndarray, y: np.ndarray) -> Iterator[list[tuple[float, float]]]:
    """The parts of a line between its NaN."""
    known = np.isfinite(y)
    for part in np.split(np.arange(len(y)), np.flatnonzero(np.diff(known)) + 1):
        if known[part[0]]:
            yield [(round(float(x[i]), 1), round(float(y[i]), 1)) for i in part]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Layers down, time across; the page's script draws it and shows the numbers.

    Attributes:
        title: what it shows.
        scale: the texts at both ends of the colour scale, and what lies between.
        row_labels: the names of the labelled rows, from the top.
        row_height: pixels from one labelled row to the next.
        height: pixels of the picture.
        x_labels: steps, evenly spread over the width.
        cells: for the script: layers, steps, colours (0..255 or null) and numbers.
    """

    title: str
    scale: tuple[str, str, str]
    row_labels: list[str]
    row_height: int
    height: int
    x_labels: list[str]
    cells: dict[str, list]

    @classmethod
    def of(
        cls,
        title: str,
        run: Run,
        values: np.ndarray,
        log: bool = False,
        top: float | None = None,
        numbers: np.ndarray | None = None,
    ) -> HeatMap:
        """The map of `values`, `[samples, layers]`.

        Args:
            title: what it shows.
            run: the run, for its layers and steps.
            values: what the colours stand for.
            log: a logarithmic colour scale.
            top: the value of the brightest colour; by default the largest.
            numbers: what a reader sees beside the pointer, `[samples, layers]`; by default
                `values`.
        """
        count = len(run.steps)
        chunks = [slice(i, i + -(-count // COLUMNS)) for i in range(0, count, -(-count // COLUMNS))]

        def mean(of: np.ndarray) -> np.ndarray:
            return np.stack([over_samples(np.nanmean, of[c]) for c in chunks], axis=1)

        cells = mean(values)
        shown = np.where(cells > 0, np.log10(np.maximum(cells, _TINY)), np.nan) if log else cells
        finite = shown[np.isfinite(shown)]
        low = float(finite.min()) if log and finite.size else 0.0
        high = top if top is not None else float(finite.max()) if finite.size else 1.0
        high = high if high > low else low + 1.0
        ends = [number(float(f"{10**v if log else v:.2g}")) for v in (low, high)]
        pixels = max(5, min(18, 720 // max(len(run.layers), 1)))
        every = -(-_LABEL // pixels)
        colours = np.clip(255 * (shown - low) / (high - low), 0, 255)
        starts = [int(run.steps[c.start]) for c in chunks]
        texts = mean(numbers) if numbers is not None else cells
        return cls(
            title,
            (ends[0], ends[1], "log" if log else "linear"),
            run.layers[::every],
            pixels * every,
            pixels * len(run.layers),
            [f"{starts[i]:,}" for i in _spread(len(starts))],
            {
                "layers": run.layers,
                "steps": starts,
                "colours": [
                    [round(float(v)) if math.isfinite(v) else None for v in row] for row in colours
                ],
                "numbers": [
                    [f"{v:.3g}" if math.isfinite(v) else "–" for v in row] for row in texts
                ],
            },
        )


def _spread(count: int, most: int = 5) -> list[int]:
    """A few of `count` columns, evenly spread from the first to the last."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Three to seven round numbers between low and high; on a log axis, their logarithms."""
    if log and high - low < 3:
        exponents = range(math.floor(low), math.ceil(high) + 1)
        multiples = (1, 2, 5) if high - low < 2 else (1, 3)
        marks = [math.log10(m) + e for e in exponents for m in multiples]
        marks = [t for t in marks if low <= t <= high]
        if len(marks) < 3:  # too narrow for 1, 2, 5: round numbers of the plain axis
            marks = [math.log10(t) for t in ticks(10**low, 10**high) if t > 0]
        return marks
    step = 10 ** math.floor(math.log10((high - low) / 4)) if high > low else 1.0
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    if log:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A figure for people, of at most three digits or so."""
    if not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e3:
        return f"{value:.0f}"
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.0e}"
