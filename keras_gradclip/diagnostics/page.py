"""The report of a monitored run: one self-contained HTML page."""

from __future__ import annotations

import functools
import html
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keras_gradclip._arithmetic import TINY
from keras_gradclip._types import Config
from keras_gradclip.diagnostics.findings import (
    Clipping,
    findings,
    left_of,
    over_samples,
    percent,
)
from keras_gradclip.diagnostics.samples import MONITOR_CSV, Run, read_run
from keras_gradclip.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Degrees below which the clip counts as keeping the direction.
STRAIGHT = 0.1
#: Above this number, thresholds are drawn as their lowest, median and highest.
SINGLE_THRESHOLDS = 6
#: Most columns of a heat map. Each averages the same number of samples; the last may have fewer.
COLUMNS = 160
#: Above this number of layers, a heat map names only some; the table has all.
NAMED_LAYERS = 48
#: Style of the figures: text stays text, and the same run gives the same page.
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.sans-serif": ["DejaVu Sans"],  # with the reader's own as fallback
    "font.size": 9,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "keras_gradclip",
}

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Report(type(Path())):  # type: ignore[misc]  # Path itself cannot be subclassed before 3.12
    """The path of a report; a notebook shows the page itself."""

    def _repr_html_(self) -> str:
        page = html.escape(self.read_text(encoding="utf-8")) if self.is_file() else ""
        return page and f'<iframe srcdoc="{page}" style="width:100%;height:720px"></iframe>'


def report(run_dir: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Writes one HTML page about a run: findings, curves, heat maps of layer × time, rules.

    Damaged lines of the files, as after a killed run, are skipped and listed on the page.

    Args:
        run_dir: the folder of a `ClipMonitor(run_dir)`, or its parent if it is called `monitor`.
        output: the page; by default `report.html` beside the monitor's files.

    Returns:
        The path of the page; a notebook displays it as the page.

    Raises:
        ValueError: `run_dir` holds no samples, or its files are unreadable.
        ImportError: jinja2 or matplotlib is not installed.
    """
    if not isinstance(run_dir, (str, os.PathLike)):
        raise ValueError(
            f"report: `run_dir` must be a folder, but is {run_dir!r}. Pass that of a ClipMonitor."
        )
    folder = Path(run_dir)
    if not (folder / MONITOR_CSV).exists() and (folder / "monitor" / MONITOR_CSV).exists():
        folder /= "monitor"
    run = read_run(folder)
    path = Report(folder / "report.html" if output is None else output)
    if not path.name or "\0" in path.name or path.is_dir():
        raise ValueError(
            f"report: `output` ({str(output)!r}) is not the name of a file. Give one, such as "
            "'report.html'."
        )
    try:
        import jinja2  # optional: training needs neither
        from matplotlib import style
    except ImportError as error:
        raise ImportError(
            f"report: needs jinja2 and matplotlib ({error}). Install them: "
            "pip install jinja2 matplotlib"
        ) from error
    template = jinja2.Template(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    with style.context(["default", STYLE]):
        page = template.render(**_context(run, folder.resolve()))
    write_text(path, page)
    return path


def _context(run: Run, folder: Path) -> Config:
    """The values for the template."""
    is_in_a_run = folder.name.startswith("monitor")  # then its parent is named after the run
    variables = run.description["variables"]
    rules = [
        (v["path"], "×".join(map(str, v["shape"])) or "scalar", v["rule"], v["clipper"])
        for v in variables
    ]
    norms = ("norm left", "median norm", "90 % below", "largest")
    layers = ("layer", "clipped on", "elements clipped", *norms, "angle")
    hits = f"which rule hits what: {len(variables)} variables"
    tables = [
        ("every layer in numbers", layers, _layer_rows(run), 12),
        (hits, ("variable", "shape", "rule", "clipper"), rules, 20),
    ]
    return {
        "name": folder.parent.name if is_in_a_run else folder.name,
        "clipper": _clipper(run.description),
        "tiles": _tiles(run),
        "findings": findings(run),
        "curves": _curves(run),
        "maps": _maps(run),
        "tables": tables,
    }


def _clipper(description: Config) -> str:
    """The clipper on one line; a map of many rules as their number and kinds."""
    text = description["clipper_text"]
    if len(text) <= 160:
        return text
    variables = description["variables"]
    rules = len({v["rule"] for v in variables})
    kinds = ", ".join(dict.fromkeys(v["clipper"].partition("(")[0] for v in variables))
    return f"{text.partition('(')[0]} of {rules} rules ({kinds}); the table at the end has them"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Five figures of the run: (name, value, note)."""
    finite = run.finite
    bad = int(np.sum(np.any(run.figures["nonfinite"] > 0, axis=1)))
    is_off = run.description["clipper"] is None
    norm, change, clipped = "–", "", "–"
    if len(finite.steps):
        before, after = finite.global_before, finite.global_after
        norm = f"{np.median(before):.2g}"
        change = f"median; {percent(float(left_of(before, after)))} left after the clip"
        clipped = percent(finite.clipped.sum() / finite.measured.sum())
    return [
        ("measured", f"{len(run.steps)}", f"updates {run.steps.min()} to {run.steps.max()}"),
        ("layers", f"{len(run.layers)}", f"{len(run.description['variables'])} variables"),
        ("clipped", "off" if is_off else clipped, "of all layers and measured steps"),
        ("global norm", norm, change),
        ("not finite", f"{bad}" if bad else "never", "of the measured steps" if bad else ""),
    ]


def _layer_rows(run: Run) -> list[tuple[str, ...]]:
    """The rows of the table of layers."""
    finite = run.finite
    if not len(finite.steps):
        return []
    clipping = Clipping.of(finite)
    norms = finite.figures["norm_before"]
    quantiles = over_samples(functools.partial(np.nanpercentile, q=(50, 90, 100)), norms).T
    return [
        (
            layer,
            percent(clipping.share[i]),
            percent(clipping.fraction[i]),
            percent(clipping.left[i]),
            *("–" if np.isnan(norm) else f"{norm:.3g}" for norm in quantiles[i]),
            f"{clipping.angle[i]:.1f}°",
        )
        for i, layer in enumerate(run.layers)
    ]


# Figures -----------------------------------------------------------------------------------------


def _is_turned(run: Run) -> bool:
    return float(np.nanmax(run.figures["angle"], initial=0.0)) >= STRAIGHT


def _curves(run: Run) -> str:
    """An SVG of line charts over the steps."""
    from matplotlib.figure import Figure

    def largest(name: str) -> Lines:
        return {"": (run.steps, over_samples(np.nanmax, run.figures[name], axis=1))}

    norms = {"before": run.global_before, "after the clip": run.global_after}
    clipped = run.clipped.sum(axis=1) / np.maximum(run.measured.sum(axis=1), 1)
    charts: list[tuple[str, Lines, bool]] = [
        ("Global gradient norm", {n: (run.steps, v) for n, v in norms.items()}, True),
        ("Layers clipped, % of all", {"": (run.steps, 100 * clipped)}, False),
        ("Largest element before the clip", largest("max_abs"), True),
    ]
    if _is_turned(run):
        title = "Largest angle of a layer's gradient, before to after, degrees"
        charts.append((title, largest("angle"), False))
    moving = {n: (s, v) for n, (s, v) in run.thresholds.items() if np.ptp(v) > 0}
    if len(moving) > SINGLE_THRESHOLDS:
        charts.append((f"Thresholds: {len(moving)} of them", _spread(moving), True))
    elif moving:
        charts.append(("Thresholds", moving, True))
    rows = -(-len(charts) // 2)
    figure = Figure(figsize=(11, 2.7 * rows), dpi=144)
    for i, chart in enumerate(charts):
        _draw_lines(figure.add_subplot(rows, 2, i + 1), *chart)
    return _svg(figure)


def _spread(thresholds: Lines) -> Lines:
    """The lowest, median and highest of many thresholds, over the steps of the first."""
    steps = next(iter(thresholds.values()))[0]
    stacked = np.stack([np.interp(steps, s, v) for s, v in thresholds.values()])
    percentiles = {"lowest": 0, "median": 50, "highest": 100}
    return {n: (steps, np.percentile(stacked, q, axis=0)) for n, q in percentiles.items()}


def _draw_lines(axes: Axes, title: str, lines: Lines, log: bool) -> None:
    """Draws lines over the steps, on a log scale or from 0; NaN breaks a line."""
    axes.set_title(title)
    axes.set_xlabel("step")
    for name, (steps, values) in lines.items():
        values = np.where(values > 0, values, np.nan) if log else values
        known = np.pad(np.isfinite(values), 1)
        alone = known[1:-1] & ~known[:-2] & ~known[2:]  # between two NaN: a line would not show it
        axes.plot(steps, values, ".-", lw=1.2, markevery=alone.tolist(), label=_short(name))
        if log and known.any():
            axes.set_yscale("log")
    if not log:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend(frameon=False)


def _maps(run: Run) -> str:
    """An SVG of heat maps: rows are layers, columns samples."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    figures, share = run.figures, Normalize(0, 1)
    median = over_samples(np.nanmedian, figures["norm_before"])
    relative = figures["norm_before"] / np.maximum(median, TINY)
    maps: list[tuple[str, np.ndarray, Normalize]] = []
    if run.clipped.any():
        maps.append(("Share clipped", figures["clip_fraction"], share))
    if np.any(relative > 0):
        title = "Norm before the clip, as a multiple of the layer's median"
        maps.append((title, relative, LogNorm()))
    if _is_turned(run):
        maps.append(("Angle, degrees", figures["angle"], Normalize(0)))
    if np.nanmax(figures["nonfinite"]) > 0:
        maps.append(("Share not finite", figures["nonfinite"], share))
    if not maps:
        return ""
    colours = colormaps["viridis"].with_extremes(bad="lightgrey")
    samples = np.arange(len(run.steps))
    columns = np.split(samples, samples[:: -(-len(samples) // COLUMNS)][1:])
    at_x = np.unique(np.linspace(0, len(columns) - 1, 6).astype(int))
    at_y = np.arange(0, len(run.layers), -(-len(run.layers) // NAMED_LAYERS))
    height = len(maps) * (1.0 + 0.17 * min(len(run.layers), NAMED_LAYERS))
    figure = Figure(figsize=(11, height), dpi=144)
    rows = figure.subplots(len(maps), squeeze=False)[:, 0]
    for axes, (title, values, norm) in zip(rows, maps, strict=True):
        cells = np.stack([over_samples(np.nanmean, values[c]) for c in columns], axis=1)
        cells = np.ma.masked_invalid(cells)
        image = axes.imshow(cells, colours, norm, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(False)
        axes.set_xticks(at_x, [f"{run.steps[columns[i][0]]:,}" for i in at_x])
        axes.set_yticks(at_y, [_short(run.layers[i]) for i in at_y], fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    element = file.getvalue().partition("<svg")[2]
    # Round to hundredths of a point; drop indentation, and ids that other figures share.
    return "<svg" + re.sub(r'(\.\d\d)\d+|\n *(?=<)| id="[\w.]+_\d+"', r"\1", element)


def _short(name: str) -> str:
    """A name short enough for a figure's margin; `$` is escaped."""
    name = name if len(name) <= 40 else f"…{name[-39:]}"
    return name.replace("$", r"\$")
